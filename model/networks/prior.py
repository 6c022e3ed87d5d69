"""The prior: a prompt's CLIP text embedding to the CLIP image embedding of a fitting image.

A diffusion model in continuous time.

    image_embedding = sample(prior, clip_text, noise, guidance=3.0, sampler="ddpm")

Published parameter names (github.com/dome272/Paella `PriorModel`). Letters: B rows, D embedding, S
steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import PriorSampler
from model.kernels.cpu import BlockFn, BlockWeights, plain_block
from model.network_config import PriorConfig
from model.networks.layers import sinusoid

Predictor = Callable[[Tensor, Iterable[Tensor], float | None], Tensor]


class Block(nn.Sequential):
    """One residual MLP.

    Its first projection reads [h, text, t-embedding] side by side, so it is taken apart by columns.
    """

    def __init__(self, config: PriorConfig) -> None:
        inner = 4 * config.c_hidden
        super().__init__(
            nn.Linear(config.c_hidden + config.clip_r + config.c_r, inner, bias=False),
            nn.LayerNorm(inner),
            nn.GELU(),
            nn.Linear(inner, config.c_hidden, bias=False),
            nn.LayerNorm(config.c_hidden),
        )
        self._columns = (config.c_hidden, config.clip_r, config.c_r)

    def shares(self) -> tuple[Tensor, ...]:
        """Return the first projection's weights for h, text and time, [4·c_hidden, …] each."""
        return self.get_parameter("0.weight").split(self._columns, dim=1)


class Prior(nn.Module):
    """Predict the noise in x [B, D] at time t [B], given the text embedding [B, D]."""

    def __init__(self, config: PriorConfig) -> None:
        super().__init__()
        self.config = c = config
        self._residual = tuple(Block(c) for _ in range(c.num_blocks))
        self.blocks = nn.ModuleList(
            [nn.Linear(c.clip_r, c.c_hidden), *self._residual, nn.Linear(c.c_hidden, c.clip_r)]
        )
        self._schedules: dict[int, tuple[list[float], Tensor]] | None = None
        self._fused: tuple[BlockFn, int] | None = None

    def fold(self) -> None:
        """Compute everything that depends on times alone once, from now on; weights are fixed."""
        self._schedules = {}

    @property
    def fused(self) -> bool:
        """Return whether a fused kernel computes the blocks of a few rows."""
        return self._fused is not None

    def fuse(self, block: BlockFn, most_rows: int) -> None:
        """Compute the blocks of at most `most_rows` rows by `block` from now on."""
        self._fused = block, most_rows

    def schedule(self, steps: int) -> tuple[list[float], Tensor]:
        """Return ᾱ at the steps' times and at the end, and the parts of the times.

        The parts are [S, blocks, 1, 4·c_hidden].
        """
        known = {} if self._schedules is None else self._schedules
        if steps not in known:
            ts = torch.linspace(1, 0, steps + 2)[1:]
            device = self.get_parameter("blocks.0.weight").device
            times = torch.stack(self.times(ts[:-1].to(device)), dim=1)[:, :, None]
            known[steps] = alpha_bar(ts).tolist(), times
        return known[steps]

    def condition(self, clip_text: Tensor) -> tuple[Tensor, ...]:
        """Return the text's part of every block's first projection, [B, 4·c_hidden] each.

        It is the same at every step.
        """
        return tuple(F.linear(clip_text, block.shares()[1]) for block in self._residual)

    def times(self, t: Tensor) -> tuple[Tensor, ...]:
        """Return the time's part of every block's first projection, [B, 4·c_hidden] each."""
        embedding = sinusoid(t, self.config.c_r).to(self.get_parameter("blocks.0.weight").dtype)
        return tuple(F.linear(embedding, block.shares()[2]) for block in self._residual)

    def predictor(self) -> Predictor:
        """Return a function (x [B, D], the blocks' parts of text and time, guidance) → noise in x.

        With guidance the parts are [2·B, 4·c_hidden], the conditional half first. Made once for
        many steps: on a CPU, at a few rows, looking the weights up costs as much as using them.
        """
        enter, leave = (tuple(self.blocks[i].parameters()) for i in (0, -1))
        names = ("1.weight", "1.bias", "3.weight", "4.weight", "4.bias")
        weights = tuple(
            BlockWeights(block.shares()[0].T, *map(block.get_parameter, names))
            for block in self._residual
        )

        def predict(x: Tensor, extras: Iterable[Tensor], guidance: float | None = None) -> Tensor:
            h = F.linear(x, *enter)
            if guidance is not None:
                h = torch.cat([h, h])
            block = self._block_for(h.shape[0])
            for own, extra in zip(weights, extras, strict=True):
                h = block(h, extra, own)
            if guidance is not None:
                # The last map is linear and the shares add up to one, so one mixed row leaves
                # instead of two.
                conditional, unconditional = h.float().unflatten(0, (2, -1)).unbind()
                h = torch.lerp(unconditional, conditional, guidance).to(x.dtype)
            return F.linear(h, *leave)

        return predict

    def _block_for(self, rows: int) -> BlockFn:
        if self._fused is not None and rows <= self._fused[1]:
            return self._fused[0]
        return plain_block

    def forward(self, x: Tensor, t: Tensor, clip_text: Tensor) -> Tensor:
        """Return the predicted noise [B, D], without anything computed beforehand."""
        parts = zip(self.condition(clip_text), self.times(t), strict=True)
        return self.predictor()(x, (text + time for text, time in parts), None)


def alpha_bar(t: Tensor) -> Tensor:
    """Return the share of signal left at time t, clamped to [1e-4, 0.9999].

    The schedule is the cosine one with s = 0.008.
    """
    s = 0.008
    start = math.cos(s / (1 + s) * math.pi / 2) ** 2
    return (torch.cos((t + s) / (1 + s) * (math.pi / 2)).square() / start).clamp(1e-4, 0.9999)


def add_noise(x: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """Return x [B, D] with the noise of time t [B], the network's input in training."""
    a = alpha_bar(t)[:, None]
    return a.sqrt() * x + (1 - a).sqrt() * noise


def ddpm_step(
    x: Tensor, noise_pred: Tensor, a_t: float, a_s: float, noise: Tensor | None
) -> Tensor:
    """Step from time t to s < t, given ᾱ at both.

    noise: standard normal, or None on the last step.
    """
    a = a_t / a_s
    mean = torch.sub(x, noise_pred, alpha=(1 - a) / math.sqrt(1 - a_t)) / math.sqrt(a)
    return (
        mean
        if noise is None
        else torch.add(mean, noise, alpha=math.sqrt((1 - a) * (1 - a_s) / (1 - a_t)))
    )


def ddim_step(x: Tensor, noise_pred: Tensor, a_t: float, a_s: float) -> Tensor:
    """Step from time t to s < t without noise (η = 0); x₀ is not clipped."""
    x0 = torch.sub(x, noise_pred, alpha=math.sqrt(1 - a_t)) / math.sqrt(a_t)
    return torch.add(math.sqrt(a_s) * x0, noise_pred, alpha=math.sqrt(1 - a_s))


def trajectory(
    prior: Prior,
    clip_text: Tensor,
    noise: Tensor,
    *,
    guidance: float = 3.0,
    sampler: PriorSampler = "ddpm",
) -> Iterator[Tensor]:
    """Yield x [B, D] in fp32 after every step, from noise to CLIP image embeddings.

    clip_text: text embeddings, [B, D]. noise: [S + 1, B, D] standard normal: the start, then one
    for every step (DDIM and the last DDPM step use none of theirs). guidance: unconditional (an
    all-zero text) to conditional prediction by lerp; 1 is off. Sums are fp32, products the weights'
    type.
    """
    S, dtype = noise.shape[0] - 1, prior.get_parameter("blocks.0.weight").dtype
    guided = guidance != 1.0
    text = clip_text.to(dtype)
    condition = torch.stack(
        prior.condition(torch.cat([text, torch.zeros_like(text)]) if guided else text)
    )  # [blocks, B or 2B, inner]
    a, times = prior.schedule(S)
    predict = prior.predictor()
    noise = noise.float()
    x = noise[0]
    for i in range(S):
        predicted = predict(
            x.to(dtype), (condition + times[i]).unbind(), guidance if guided else None
        ).float()
        if sampler == "ddim":
            x = ddim_step(x, predicted, a[i], a[i + 1])
        else:
            x = ddpm_step(x, predicted, a[i], a[i + 1], noise[i + 1] if i < S - 1 else None)
        yield x


def sample(
    prior: Prior,
    clip_text: Tensor,
    noise: Tensor,
    *,
    guidance: float = 3.0,
    sampler: PriorSampler = "ddpm",
) -> Tensor:
    """Return CLIP image embeddings [B, D] in fp32 for text embeddings [B, D].

    They are the end of `trajectory`. noise: [S + 1, B, D], S ≥ 1.
    """
    *_, end = trajectory(prior, clip_text, noise, guidance=guidance, sampler=sampler)
    return end
