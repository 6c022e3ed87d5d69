"""The v3 denoiser: a U-Net of C, T and A blocks (`model.networks.blocks_v3`).

Letters: B rows of the batch, H W grid, L condition tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.kernels.cpu import PackedLinear, supported
from model.network_config import DenoiserConfig
from model.networks.blocks_v3 import AttentionBlock, ConvBlock, TimeBlock
from model.networks.layers import (
    Downsample,
    Norm,
    Pointwise,
    Upsample,
    by_place,
    from_patches,
    norm,
    pixel_unshuffle,
    sinusoid,
)


@dataclass(frozen=True, slots=True)
class Condition:
    """The input of the attention blocks from the prompt, for B rows.

    kv: [B, L, S], for one attention block after the other its keys, then its values, already
    projected; the values carry the attention weights. mask: [B, L], False where a row's bytes are
    padding; None when no row has any.
    """

    kv: Tensor
    mask: Tensor | None

    @classmethod
    def stack(cls, conditions: Sequence[Condition]) -> Condition:
        """Stack conditions of one row each, the shorter ones padded with masked keys.

        A single one shares its memory with the result.
        """
        longest = max(c.length for c in conditions)
        keys, masks = [], []
        for c in conditions:
            mask, spare = c.mask, longest - c.length
            if mask is None:
                mask = torch.ones(1, c.length, dtype=torch.bool, device=c.kv.device)
            # Padding by nothing would copy.
            keys.append(F.pad(c.kv, (0, 0, 0, spare)) if spare else c.kv)
            masks.append(F.pad(mask, (0, spare)) if spare else mask)
        if len(conditions) == 1:
            return cls(keys[0], masks[0])
        return cls(torch.cat(keys), torch.cat(masks))

    @property
    def length(self) -> int:
        """Condition tokens of each row."""
        return self.kv.shape[1]

    def put(self, row: int, other: Condition) -> None:
        """Overwrite one row with a condition of one row that is not longer; this one has a mask."""
        if self.mask is None:
            raise ValueError("without a mask, what is shorter cannot be told from what is there")
        self.kv[row, : other.length] = other.kv[0]
        self.kv[row, other.length :] = (
            0  # a masked key counts nothing, but nothing times NaN is NaN
        )
        self.mask[row] = False
        self.mask[row, : other.length] = True if other.mask is None else other.mask[0]


class Denoiser(nn.Module):
    """The published `Paella` module.

    Weights start at random (published initialisation); `load_state_dict` takes a published state
    dict.
    """

    patch_table: Tensor | None
    patch_offsets: Tensor | None
    unpatch_weight: Tensor | None
    unpatch_bias: Tensor | None
    kv_weight: Tensor | None
    kv_bias: Tensor | None

    def __init__(self, config: DenoiserConfig) -> None:
        super().__init__()
        self.config = c = config
        self.byt5_mapper = nn.Linear(c.byt5_embd, c.c_cond)
        self.clip_mapper = nn.Linear(c.clip_embd, c.c_cond * c.clip_seq_len)
        self.clip_image_mapper = nn.Linear(c.clip_embd, c.c_cond * c.clip_seq_len)

        self.in_mapper = nn.Sequential(nn.Embedding(c.num_labels, c.c_in), Norm())
        # Index 0 is the published pixel-unshuffle, done by `_embed` because it needs the patch
        # size.
        self.embedding = nn.Sequential(
            nn.Identity(), Pointwise(c.c_in * c.patch_size**2, c.c_hidden[0]), Norm()
        )
        for name in (
            "patch_table",
            "patch_offsets",
            "unpatch_weight",
            "unpatch_bias",
            "kv_weight",
            "kv_bias",
        ):
            self.register_buffer(name, None, persistent=False)  # until `fold`
        levels = range(len(c.c_hidden))
        self.down_blocks = nn.ModuleList(self._down_level(i) for i in levels)
        self.up_blocks = nn.ModuleList(self._up_level(i) for i in reversed(levels))
        for block in c.pruned_blocks:
            self.set_submodule(block, nn.Identity())
        self.clf = nn.Sequential(Norm(), Pointwise(c.c_hidden[0], c.c_out * c.patch_size**2))
        self.out_mapper = nn.Sequential(Norm(), Pointwise(c.c_out, c.num_labels, bias=False))

        # In the order of a forward pass: `modules` walks down_blocks, then up_blocks, each in its
        # own order.
        self._time_blocks = tuple(b for b in self.modules() if isinstance(b, TimeBlock))
        self._attention_blocks = tuple(b for b in self.modules() if isinstance(b, AttentionBlock))
        self.fused = False
        self.packed: tuple[PackedLinear, PackedLinear] | None = None  # `_unpatch`, `project`
        self._kv_widths = [
            2 * b.attention.attn.out_proj.in_features for b in self._attention_blocks
        ]
        self._init_weights()

    @property
    def attention_blocks(self) -> tuple[AttentionBlock, ...]:
        """The attention blocks in the order of a forward pass."""
        return self._attention_blocks

    @property
    def condition_width(self) -> int:
        """S of a `Condition`."""
        return sum(self._kv_widths)

    def _blocks(self, level: int, skip: bool) -> list[nn.Module]:
        c, channels = self.config, self.config.c_hidden[level]
        blocks: list[nn.Module] = []
        for repeat in range(c.blocks[level]):
            for kind in c.level_config[level]:
                if kind == "C":
                    blocks.append(ConvBlock(channels, c.kernel_size, skip=skip and repeat == 0))
                elif kind == "T":
                    blocks.append(TimeBlock(channels, c.c_r))
                else:
                    blocks.append(AttentionBlock(channels, c.c_cond, c.nhead[level], c.self_attn))
        return blocks

    def _down_level(self, level: int) -> nn.ModuleList:
        c = self.config.c_hidden
        entry = [nn.Sequential(Norm(), Downsample(c[level - 1], c[level]))] if level else []
        return nn.ModuleList([*entry, *self._blocks(level, skip=False)])

    def _up_level(self, level: int) -> nn.ModuleList:
        c = self.config.c_hidden
        leave = [nn.Sequential(Norm(), Upsample(c[level], c[level - 1]))] if level else []
        return nn.ModuleList([*self._blocks(level, skip=level < len(c) - 1), *leave])

    def _init_weights(self) -> None:
        """Initialise as published: small conditions, residual branches close to zero."""
        c = self.config
        depth = sum(c.blocks)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=c.num_labels**-0.5)
        for mapper in (self.byt5_mapper, self.clip_mapper, self.clip_image_mapper):
            nn.init.normal_(mapper.weight, std=0.02)
        nn.init.zeros_(self.clf.get_parameter("1.weight"))
        nn.init.normal_(self.out_mapper.get_parameter("1.weight"), std=c.num_labels**-0.5)
        for module in self.modules():
            if isinstance(module, ConvBlock):
                module.channelwise.get_parameter("4.weight").data *= depth**-0.5
            elif isinstance(module, TimeBlock):
                nn.init.zeros_(module.mapper.weight)

    def forward(
        self,
        tokens: Tensor,
        t: Tensor,
        byt5: Tensor,
        clip: Tensor | None = None,
        clip_image: Tensor | Sequence[Tensor] | None = None,
        attn_weights: Tensor | None = None,
        byt5_mask: Tensor | None = None,
    ) -> Tensor:
        """Return logits [B, K, H, W] of the clean tokens.

        tokens: [B, H, W] codes; H and W are multiples of `config.token_step`. t: [B] in [0, 1], 1
        is all noise. byt5: [B, bytes, byt5_embd]; byt5_mask [B, bytes] is False at padding. clip:
        [B, clip_embd]. clip_image: one such or several. attn_weights: [n], factors on the attention
        given to the last n condition tokens. Raises ValueError if there are fewer than n.
        """
        weights = (
            None
            if attn_weights is None
            else self._last_weights(attn_weights, byt5, clip, clip_image)
        )
        condition = self.condition(byt5, byt5_mask, clip, clip_image, weights)
        return self.project(self.features(tokens, self.times(t), condition)).permute(0, 3, 1, 2)

    def _last_weights(
        self,
        last: Tensor,
        byt5: Tensor,
        clip: Tensor | None,
        image: Tensor | Sequence[Tensor] | None,
    ) -> Tensor:
        groups = (clip is not None) + len(_as_list(image))
        L = byt5.shape[1] + groups * self.config.clip_seq_len
        if len(last) > L:
            raise ValueError(
                f"attn_weights has {len(last)} entries, but there are only {L} condition tokens"
            )
        return F.pad(last, (L - len(last), 0), value=1.0).expand(byt5.shape[0], L)

    def condition(
        self,
        byt5: Tensor,
        byt5_mask: Tensor | None = None,
        clip: Tensor | None = None,
        clip_image: Tensor | Sequence[Tensor] | None = None,
        weights: Tensor | None = None,
    ) -> Condition:
        """Return the condition of a prompt, computed once per request.

        weights: factors on the attention given to each token, [B, L].
        """
        B = byt5.shape[0]
        parts = [self.byt5_mapper(byt5)]
        if clip is not None:
            parts.append(self.clip_mapper(clip).view(B, self.config.clip_seq_len, -1))
        parts += [
            self.clip_image_mapper(image).view(B, self.config.clip_seq_len, -1)
            for image in _as_list(clip_image)
        ]
        sequence = norm(torch.cat(parts, dim=1))  # [B, L, c_cond]
        mask = (
            None
            if byt5_mask is None
            else F.pad(byt5_mask, (0, sequence.shape[1] - byt5.shape[1]), value=True)
        )
        return Condition(self._condition_kv(sequence, weights), mask)

    def _condition_kv(self, sequence: Tensor, weights: Tensor | None) -> Tensor:
        """Map a condition sequence [B, L, c_cond] to [B, L, S]."""
        if self.kv_weight is None:
            return torch.cat(
                [block.condition_kv(sequence, weights) for block in self._attention_blocks], dim=-1
            )
        kv = F.linear(F.silu(sequence), self.kv_weight, self.kv_bias)
        if weights is not None:
            for own in kv.split(self._kv_widths, dim=-1):
                own.chunk(2, dim=-1)[1].mul_(weights[..., None].to(kv.dtype))
        return kv

    def times(self, t: Tensor) -> Tensor:
        """Map times [B] to [B, S]: scale and shift of every T block, one after the other."""
        embedding = sinusoid(t, self.config.c_r).to(self.byt5_mapper.weight.dtype)
        return torch.cat([block.scale_and_shift(embedding) for block in self._time_blocks], dim=-1)

    def features(
        self, tokens: Tensor, times: Tensor, condition: Condition, row_of: Tensor | None = None
    ) -> Tensor:
        """Run a forward pass up to the last projection: codes [B, H, W] → [N, H, W, c_out].

        The result has one entry for each of N conditions.

        row_of: [N], the row of tokens and times that each condition is for; absent if each has its
        own. A row's branches are the same until the first attention block tells them apart, so up
        to there rows are computed, not branches.
        """
        state = _Pass(
            self._time_blocks,
            times,
            condition.kv.split(self._kv_widths, dim=-1),
            condition.mask,
            row_of,
        )
        x = self._embed(tokens)
        skips = []
        for level in self.down_blocks:
            x = state.run(level, x)
            skips.append(x)
        for depth, level in enumerate(self.up_blocks):
            x = state.run(level, x, state.branches(skips[-1 - depth]) if depth else None)
        return norm(self._unpatch(norm(state.branches(x))))

    def _embed(self, tokens: Tensor) -> Tensor:
        p, table, offsets = self.config.patch_size, self.patch_table, self.patch_offsets
        if table is None or offsets is None:
            return self.embedding(pixel_unshuffle(self.in_mapper(tokens), p))
        B, H, W = tokens.shape
        patches = tokens.view(B, H // p, p, W // p, p).transpose(2, 3).reshape(-1, p * p)
        x = F.embedding_bag(patches + offsets, table, mode="sum") + self.embedding.get_parameter(
            "1.bias"
        )
        return norm(x).view(B, H // p, W // p, -1)

    @torch.no_grad()
    def fold(self) -> None:
        """Fold fixed weights; only `model.optimize` calls this, because training needs them apart.

        Each code's embedding, normed and projected, for each of its places in a patch: embedding,
        norm, unshuffle and projection become one lookup and sum. And the last map's weights in the
        order in which its patches are laid out.
        """
        embedding, projection = (
            self.in_mapper.get_parameter("0.weight"),
            self.embedding.get_parameter("1.weight"),
        )
        codes = norm(embedding.float())  # [K, c_in]
        places = projection.float().flatten(1).unflatten(1, (codes.shape[1], -1))  # [C, c_in, p²]
        self.patch_table = (
            torch.einsum("kc,ocp->pko", codes, places).flatten(0, 1).to(embedding.dtype)
        )  # [p²·K, C]
        self.patch_offsets = torch.arange(
            0, len(self.patch_table), len(codes), device=embedding.device
        )
        self.unpatch_weight, self.unpatch_bias = self._unpatch_parameters()

    @torch.no_grad()
    def fold_condition(self) -> None:
        """Fold the two linear maps from the condition to the attention blocks' keys and values."""
        if self._attention_blocks:
            weights, biases = zip(
                *(block.folded_kv() for block in self._attention_blocks), strict=True
            )
            self.kv_weight, self.kv_bias = torch.cat(weights), torch.cat(biases)

    def pack(self, height: int, width: int) -> None:
        """Pack the weights for the CPU's kernels if supported.

        The packed form is fastest for one guided row of this token grid.
        """
        if not supported(self.in_mapper.get_parameter("0.weight")):
            return
        levels, batch = range(len(self.down_blocks)), 1
        for depth, level in [
            *zip(levels, self.down_blocks, strict=True),
            *zip(reversed(levels), self.up_blocks, strict=True),
        ]:
            factor = self.config.patch_size << depth
            for block in level.children():
                if isinstance(block, AttentionBlock):
                    batch = 2  # where a guided row's branches part
                if isinstance(block, ConvBlock | AttentionBlock):
                    block.pack(batch, height // factor, width // factor)
                elif isinstance(block, nn.Sequential):  # a norm, then the change of size
                    resize = cast(Downsample | Upsample, block[1])
                    resize.pack(batch, height // factor, width // factor)
        patches = batch * height * width // self.config.patch_size**2
        self.packed = (
            PackedLinear(*self._unpatch_parameters(), patches),
            PackedLinear(
                self.out_mapper.get_parameter("1.weight").flatten(1), None, height * width
            ),
        )

    def fuse(self) -> None:
        """Compute convolution blocks and draws by Triton's kernels from now on.

        Later changes of the weights have no effect.
        """
        self.fused = True
        for block in self.modules():
            if isinstance(block, ConvBlock):
                block.fuse()

    def draw(
        self, sampler: str, features: Tensor, uniform: Tensor, inverse: Tensor
    ) -> Tensor | None:
        """Draw codes [B, H, W] without logits in memory; None where that is not fused.

        features: guided, [B, H, W, c_out]. uniform: [B, H, W]. inverse: inverse temperature, [B].
        """
        if not self.fused:
            return None
        from model.kernels.triton.draw import draw_grid

        return draw_grid(
            sampler,
            features,
            self.out_mapper.get_parameter("1.weight").flatten(1),
            uniform,
            inverse,
        )

    def _unpatch(self, x: Tensor) -> Tensor:
        """Map [B, h, w, C] to [B, h·p, w·p, c_out]: `clf`, then the published pixel-shuffle."""
        if self.packed is not None:
            return from_patches(self.packed[0](x), self.config.patch_size)
        weight, bias = self.unpatch_weight, self.unpatch_bias
        if weight is None:
            weight, bias = self._unpatch_parameters()
        return from_patches(F.linear(x, weight, bias), self.config.patch_size)

    def _unpatch_parameters(self) -> tuple[Tensor, Tensor]:
        """Return `clf`'s weight and bias in the order of `from_patches`."""
        weight, bias = (by_place(p, self.config.patch_size) for p in self.clf[1].parameters())
        return weight.flatten(1), bias

    def project(self, features: Tensor) -> Tensor:
        """Map features [..., c_out] to logits [..., K].

        The map is linear and without bias, so features may be mixed instead of logits.
        """
        return self.out_mapper[1](features) if self.packed is None else self.packed[1](features)

    def sharpened(self, features: Tensor, inverse: Tensor) -> Tensor:
        """Return logits divided by a temperature. inverse: one over it, [B, 1, 1, 1]."""
        # The projection is linear: dividing what goes in costs a sixteenth of dividing the logits.
        return self.project((features * inverse).to(features.dtype))


class _Pass:
    """One walk through the levels, which gives T and A blocks their precomputed parts."""

    def __init__(
        self,
        time_blocks: Sequence[TimeBlock],
        times: Tensor,
        kv: Iterable[Tensor],
        mask: Tensor | None,
        row_of: Tensor | None,
    ) -> None:
        self.widths = [block.mapper.out_features // 2 for block in time_blocks for _ in range(2)]
        self.times, self.row_of, self.parted = times, row_of, row_of is None
        self.modulations, self.used = self._split(times), 0
        self.kv, self.mask = iter(kv), mask
        self.biases: dict[int, Tensor] = {}

    def _split(self, times: Tensor) -> tuple[Tensor, ...]:
        """Return scale, shift, scale, … [B, 1, 1, C] of every T block."""
        return times[:, None, None].split(self.widths, dim=-1)

    def branches(self, x: Tensor) -> Tensor:
        """Expand rows [B, …] to branches [N, …]; branches stay."""
        return (
            x
            if self.row_of is None or x.shape[0] == self.row_of.shape[0]
            else x.index_select(0, self.row_of)
        )

    def run(self, level: nn.Module, x: Tensor, skip: Tensor | None = None) -> Tensor:
        """Run one level."""
        for block in level.children():
            if isinstance(block, ConvBlock):
                x, skip = block(x, skip), None
            elif isinstance(block, TimeBlock):
                x = self._modulate(x)
            elif isinstance(block, AttentionBlock):
                x = block(self._part(x), next(self.kv), self._bias(x, block.self_attn))
            else:
                x = block(x)
        return x

    def _modulate(self, x: Tensor) -> Tensor:
        scale, shift = self.modulations[self.used : self.used + 2]
        self.used += 2
        return torch.addcmul(shift, x, scale)

    def _part(self, x: Tensor) -> Tensor:
        """Expand to branches, in the first attention block."""
        if not self.parted:
            self.parted, self.modulations = True, self._split(self.branches(self.times))
        return self.branches(x)

    def _bias(self, x: Tensor, self_attn: bool) -> Tensor | None:
        """Return an attention block's addition to its scores: −∞ at padding.

        The blocks of a level have the same.

        [B, 1, 1, keys], or None without padding.
        """
        if self.mask is None:
            return None
        pixels = x.shape[1] * x.shape[2] if self_attn else 0
        if pixels not in self.biases:
            bias = torch.zeros_like(self.mask, dtype=x.dtype).masked_fill_(~self.mask, -torch.inf)
            self.biases[pixels] = F.pad(bias, (pixels, 0))[:, None, None]
        return self.biases[pixels]


def _as_list(image: Tensor | Sequence[Tensor] | None) -> list[Tensor]:
    if image is None:
        return []
    return [image] if isinstance(image, Tensor) else list(image)
