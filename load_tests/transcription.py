"""Transcribe the published v3 denoiser and sampler, to compare the engine's speed and numbers.

Written as the description reads and not for speed: activations [B, C, H, W] with a permutation
around every layer norm and channel MLP, PyTorch's own attention module, the condition computed anew
at every step, the conditional and the unconditional pass one after the other through all K logits,
`torch.multinomial`. It shares no code with `model.denoiser`, but takes the same published state
dict.

Letters: B rows of the batch, H W token grid, L condition tokens, C channels, K codes, n steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import SamplingConfig
from model.network_config import DenoiserConfig


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of [B, C, H, W], without parameters."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-6, elementwise_affine=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class GlobalResponseNorm(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, channels))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, channels))

    def forward(self, x: Tensor) -> Tensor:
        energy = torch.norm(x, p=2, dim=(1, 2), keepdim=True)
        relative = energy / (energy.mean(dim=-1, keepdim=True) + 1e-6)
        return self.gamma * (x * relative) + self.beta + x


class ConvBlock(nn.Module):
    def __init__(self, channels: int, c_skip: int, kernel_size: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(
            channels + c_skip, channels, kernel_size, padding=kernel_size // 2, groups=channels
        )
        self.norm = ChannelNorm(channels)
        self.channelwise = nn.Sequential(
            nn.Linear(channels, 4 * channels),
            nn.GELU(),
            GlobalResponseNorm(4 * channels),
            nn.Dropout(0.0),
            nn.Linear(4 * channels, channels),
        )

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        y = x if skip is None else torch.cat([x, skip], dim=1)
        y = self.norm(self.depthwise(y))
        return x + self.channelwise(y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class TimeBlock(nn.Module):
    def __init__(self, channels: int, c_r: int) -> None:
        super().__init__()
        self.mapper = nn.Linear(c_r, 2 * channels)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        a, b = self.mapper(time)[:, :, None, None].chunk(2, dim=1)
        return x * (1 + a) + b


class Attention(nn.Module):
    def __init__(self, channels: int, nhead: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(channels, nhead, batch_first=True)

    def forward(self, queries: Tensor, keys: Tensor, weights: Tensor | None) -> Tensor:
        """Attend from queries [B, H·W, C] to keys [B, H·W + L, C], which are the values too.

        weights: [n], for the last n keys.
        """
        if weights is None:
            return self.attn(queries, keys, keys, need_weights=False)[0]
        return self._weighted(queries, keys, weights)

    def _weighted(self, queries: Tensor, keys: Tensor, weights: Tensor) -> Tensor:
        """Compute the module's own arithmetic, with a multiplication after the softmax.

        The module itself does not offer that.
        """
        inputs = (queries, keys, keys)
        projections = zip(
            inputs, self.attn.in_proj_weight.chunk(3), self.attn.in_proj_bias.chunk(3), strict=True
        )
        q, k, v = (
            F.linear(x, w, b).unflatten(-1, (self.attn.num_heads, -1)).transpose(1, 2)
            for x, w, b in projections
        )
        attention = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(dim=-1)
        attention = torch.cat(
            [attention[..., : -len(weights)], attention[..., -len(weights) :] * weights], dim=-1
        )
        return self.attn.out_proj((attention.to(v.dtype) @ v).transpose(1, 2).flatten(2))


class AttentionBlock(nn.Module):
    def __init__(self, channels: int, c_cond: int, nhead: int, self_attn: bool) -> None:
        super().__init__()
        self.self_attn = self_attn
        self.norm = ChannelNorm(channels)
        self.attention = Attention(channels, nhead)
        self.kv_mapper = nn.Sequential(nn.SiLU(), nn.Linear(c_cond, channels))

    def forward(self, x: Tensor, condition: Tensor, weights: Tensor | None) -> Tensor:
        pixels = self.norm(x).flatten(2).transpose(1, 2)
        keys = self.kv_mapper(condition)
        if self.self_attn:
            keys = torch.cat([pixels, keys], dim=1)
        return x + self.attention(pixels, keys, weights).transpose(1, 2).reshape(x.shape)


class Transcription(nn.Module):
    """The v3 denoiser under its published parameter names."""

    def __init__(self, config: DenoiserConfig) -> None:
        super().__init__()
        self.config = c = config
        self.byt5_mapper = nn.Linear(c.byt5_embd, c.c_cond)
        self.clip_mapper = nn.Linear(c.clip_embd, c.c_cond * c.clip_seq_len)
        self.clip_image_mapper = nn.Linear(c.clip_embd, c.c_cond * c.clip_seq_len)
        self.condition_norm = nn.LayerNorm(c.c_cond, eps=1e-6, elementwise_affine=False)
        self.in_mapper = nn.Sequential(
            nn.Embedding(c.num_labels, c.c_in),
            nn.LayerNorm(c.c_in, eps=1e-6, elementwise_affine=False),
        )
        self.embedding = nn.Sequential(
            nn.PixelUnshuffle(c.patch_size),
            nn.Conv2d(c.c_in * c.patch_size**2, c.c_hidden[0], 1),
            ChannelNorm(c.c_hidden[0]),
        )
        levels = range(len(c.c_hidden))
        self.down_blocks = nn.ModuleList(
            nn.ModuleList([*self._entry(i), *self._blocks(i, c_skip=0)]) for i in levels
        )
        self.up_blocks = nn.ModuleList(
            nn.ModuleList(
                [*self._blocks(i, c_skip=c.c_hidden[i] if i < levels[-1] else 0), *self._exit(i)]
            )
            for i in reversed(levels)
        )
        for block in c.pruned_blocks:
            self.set_submodule(block, nn.Identity())
        self.clf = nn.Sequential(
            ChannelNorm(c.c_hidden[0]),
            nn.Conv2d(c.c_hidden[0], c.c_out * c.patch_size**2, 1),
            nn.PixelShuffle(c.patch_size),
        )
        self.out_mapper = nn.Sequential(
            ChannelNorm(c.c_out), nn.Conv2d(c.c_out, c.num_labels, 1, bias=False)
        )

    def _entry(self, level: int) -> list[nn.Module]:
        c = self.config.c_hidden
        return (
            [
                nn.Sequential(
                    ChannelNorm(c[level - 1]), nn.Conv2d(c[level - 1], c[level], 2, stride=2)
                )
            ]
            if level
            else []
        )

    def _exit(self, level: int) -> list[nn.Module]:
        c = self.config.c_hidden
        return (
            [
                nn.Sequential(
                    ChannelNorm(c[level]), nn.ConvTranspose2d(c[level], c[level - 1], 2, stride=2)
                )
            ]
            if level
            else []
        )

    def _blocks(self, level: int, c_skip: int) -> Iterator[nn.Module]:
        c, channels = self.config, self.config.c_hidden[level]
        for kind in c.level_config[level] * c.blocks[level]:
            if kind == "C":
                yield ConvBlock(channels, c_skip, c.kernel_size)
                c_skip = 0
            elif kind == "T":
                yield TimeBlock(channels, c.c_r)
            else:
                yield AttentionBlock(channels, c.c_cond, c.nhead[level], c.self_attn)

    def forward(
        self,
        tokens: Tensor,
        t: Tensor,
        byt5: Tensor,
        clip: Tensor | None = None,
        clip_image: Tensor | Sequence[Tensor] | None = None,
        attn_weights: Tensor | None = None,
    ) -> Tensor:
        """Return logits [B, K, H, W]; the arguments are those of `model.denoiser.Denoiser`."""
        time = self._time_embedding(t)
        condition = self._condition(byt5, clip, clip_image)
        x = self.embedding(self.in_mapper(tokens).permute(0, 3, 1, 2))
        skips: list[Tensor] = []
        for level in self.down_blocks:
            x = self._level(level, x, time, condition, attn_weights)
            skips.insert(0, x)
        for i, level in enumerate(self.up_blocks):
            x = self._level(level, x, time, condition, attn_weights, skips[i] if i else None)
        return self.out_mapper(self.clf(x))

    def _level(
        self,
        level: nn.Module,
        x: Tensor,
        time: Tensor,
        condition: Tensor,
        weights: Tensor | None,
        skip: Tensor | None = None,
    ) -> Tensor:
        for block in level.children():
            if isinstance(block, ConvBlock):
                x, skip = block(x, skip), None
            elif isinstance(block, TimeBlock):
                x = block(x, time)
            elif isinstance(block, AttentionBlock):
                x = block(x, condition, weights)
            else:
                x = block(x)
        return x

    def _time_embedding(self, t: Tensor) -> Tensor:
        half = self.config.c_r // 2
        frequencies = torch.exp(
            torch.arange(half, device=t.device) * -(math.log(10000) / (half - 1))
        )
        angles = (t * 10000)[:, None] * frequencies[None, :]
        return torch.cat([angles.sin(), angles.cos()], dim=1).to(self.byt5_mapper.weight.dtype)

    def _condition(
        self, byt5: Tensor, clip: Tensor | None, clip_image: Tensor | Sequence[Tensor] | None
    ) -> Tensor:
        def group(mapped: Tensor) -> Tensor:
            return mapped.view(len(mapped), self.config.clip_seq_len, -1)

        parts = [self.byt5_mapper(byt5)]
        if clip is not None:
            parts.append(group(self.clip_mapper(clip)))
        if clip_image is not None:
            images = [clip_image] if isinstance(clip_image, Tensor) else clip_image
            parts += [group(self.clip_image_mapper(image)) for image in images]
        return self.condition_norm(torch.cat(parts, dim=1))


def denoise(
    model: Transcription,
    start: Tensor,
    conditional: Mapping[str, Tensor],
    unconditional: Mapping[str, Tensor],
    config: SamplingConfig,
    renoise_uniform: Sequence[Tensor] | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Run the published sampler; yield the tokens and their logits after every step.

    Tokens are [B, H, W], guided logits [B, K, H, W]. start: [B, H, W] random tokens. conditional,
    unconditional: keyword arguments of the model's forward. renoise_uniform: recorded uniforms [B,
    H, W] for every renoised step, fresh ones if absent. Draws by `multinomial` or `argmax`; raises
    ValueError for another sampler.
    """
    if config.sampler not in ("multinomial", "argmax"):
        raise ValueError(f"the transcription draws by multinomial or argmax, not {config.sampler}")
    tokens = start
    times = torch.linspace(1, 0, config.steps + 1, device=start.device)
    guidances = torch.linspace(*config.guidance, config.steps)
    temperatures = torch.linspace(*config.temperature, config.steps)
    for i in range(config.steps):
        t = times[i].expand(len(tokens))
        logits = model(tokens, t, **conditional)
        if i < config.guidance_steps:
            logits = guidances[i] * logits + (1 - guidances[i]) * model(tokens, t, **unconditional)
        tokens = (
            logits.argmax(dim=1)
            if config.sampler == "argmax"
            else _multinomial(logits / temperatures[i])
        )
        if i < config.renoise_steps:
            uniform = (
                torch.rand(tokens.shape, device=tokens.device)
                if renoise_uniform is None
                else renoise_uniform[i]
            )
            tokens = torch.where(uniform <= times[i + 1], start, tokens)
        yield tokens, logits


def _multinomial(logits: Tensor) -> Tensor:
    B, K, H, W = logits.shape
    probabilities = logits.softmax(dim=1).permute(0, 2, 3, 1).reshape(-1, K)
    return torch.multinomial(probabilities, 1).view(B, H, W)
