"""Draw tokens: schedules, guidance, samplers, renoising, and an image's randomness.

Pure functions.

Letters: B rows, H W token grid, K codes, n steps.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from model.config import RenoiseMode, RenoiseOrder, SamplingConfig
from model.network_config import Schedule

NEVER = -1.0  # a renoising probability below every uniform number
# The Gumbel noise on a token's log probability when confidence chooses what becomes noise again;
# it falls with the share of noise.
CONFIDENCE_NOISE = 1.0
_BLOCK = 64  # codes whose probabilities are summed at once
_GRIDS = 16  # whose Halton orders are remembered


@dataclass(frozen=True, slots=True)
class Noise:
    """The randomness of one image, drawn up front, so that nothing else in a batch can change it.

    start: [H, W] tokens the denoising begins with. draw, renoise: [n, H, W] uniforms in [0, 1), one
    per token and step each; a step renoises the tokens with the smallest. prior: [S + 1, D]
    standard normal, for the prior's start and steps. fresh: [n, H, W] tokens, for the renoise mode
    `rand` only.
    """

    start: Tensor
    prior: Tensor
    draw: Tensor
    renoise: Tensor
    fresh: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))

    def part(self, rows: slice, columns: slice) -> Noise:
        """Return the randomness of a part of the token grid, with the same for the prior."""
        start, draw, renoise = (
            grid[..., rows, columns].contiguous() for grid in (self.start, self.draw, self.renoise)
        )
        fresh = self.fresh[..., rows, columns].contiguous() if self.fresh.numel() else self.fresh
        return Noise(start, self.prior, draw, renoise, fresh)


def draw_noise(
    seed: int,
    *,
    codes: int,
    grid: tuple[int, int],
    steps: int,
    prior: tuple[int, int],
    renoise_mode: RenoiseMode = "start",
    renoise_order: RenoiseOrder = "random",
) -> Noise:
    """Draw everything random about the image of `seed` (any int64), on the CPU.

    grid: (H, W). prior: (S + 1, D). NumPy's Philox takes all 64 bits of the seed (torch's CPU
    generator keeps 32). Start tokens come first and the steps' uniforms last and step by step, so
    the same seed at another step count begins from the same image; fresh tokens and the start of
    a Halton order have streams of their own, for the same reason.
    """
    rng = np.random.Generator(np.random.Philox(seed % 2**64))
    start = rng.integers(codes, size=grid, dtype=np.int64)
    gaussian = rng.standard_normal(prior, dtype=np.float32)
    uniforms = rng.random((steps, 2, *grid), dtype=np.float32)
    noise = Noise(
        start=torch.from_numpy(start),
        prior=torch.from_numpy(gaussian),
        draw=torch.from_numpy(uniforms[:, 0].copy()),
        renoise=torch.from_numpy(uniforms[:, 1].copy()),
    )
    if renoise_order == "halton":
        first = int(_stream(seed, 2).integers(grid[0] * grid[1]))
        order = torch.from_numpy(rolled_halton(grid, first))
        noise = replace(noise, renoise=order.expand(steps, *grid).contiguous())
    if renoise_mode != "rand":
        return noise
    fresh = _stream(seed, 1).integers(codes, size=(steps, *grid), dtype=np.int64)
    return replace(noise, fresh=torch.from_numpy(fresh))


def _stream(seed: int, number: int) -> np.random.Generator:
    """Return a seed's further stream of random numbers, independent of the others."""
    return np.random.Generator(np.random.Philox(seed % 2**64).jumped(number))


def rolled_halton(grid: tuple[int, int], first: int) -> npt.NDArray[np.float32]:
    """Return uniforms [H, W], in whose order positions are those of a Halton sequence.

    Each is (rank + ½) / HW, so round(t · HW) of them are at most t, and those lie evenly over the
    grid. first: the position in the sequence that becomes rank 0, 0 … HW − 1.
    """
    ranks = halton_ranks(grid)
    return (((ranks - first) % ranks.size + 0.5) / ranks.size).astype(np.float32)


@lru_cache(maxsize=_GRIDS)
def halton_ranks(grid: tuple[int, int]) -> npt.NDArray[np.int64]:
    """Return each position's rank [H, W]: the order in which a Halton sequence first visits them.

    Bases are 2 for columns and 3 for rows. The result is read-only.
    """
    H, W = grid
    n = H * W
    first, known = np.full(n, -1, dtype=np.int64), 0
    start = 0
    while known < n:
        index = np.arange(start, start + 4 * n)
        column = (_radical_inverse(index, 2) * W).astype(np.int64)
        row = (_radical_inverse(index, 3) * H).astype(np.int64)
        cells, at = np.unique(row * W + column, return_index=True)
        new = first[cells] < 0
        first[cells[new]] = start + at[new]
        known, start = int((first >= 0).sum()), start + len(index)
    ranks = np.empty(n, dtype=np.int64)
    ranks[first.argsort()] = np.arange(n)
    ranks.flags.writeable = False
    return ranks.reshape(H, W)


def _radical_inverse(index: npt.NDArray[np.int64], base: int) -> npt.NDArray[np.float64]:
    """Return the numbers' digits mirrored at the point, 0 ≤ x < 1."""
    value, scale = np.zeros(len(index)), 1.0
    rest = index.copy()
    while rest.any():
        scale /= base
        rest, digit = np.divmod(rest, base)
        value += digit * scale
    return value


def timesteps(steps: int, schedule: Schedule = "linear") -> list[float]:
    """Return the n + 1 times from 1 (all noise) to 0.

    At time t a token is noise with probability t. Step i goes from entry i to entry i + 1.
    """
    if schedule == "cosine":
        return [*torch.cos(torch.linspace(0, 1, steps + 1)[:-1] * (torch.pi / 2)).tolist(), 0.0]
    return torch.linspace(1, 0, steps + 1).tolist()


def ramp(ends: tuple[float, float], steps: int) -> list[float]:
    """Return n values evenly from the first end to the second: temperatures or guidances."""
    return torch.linspace(*ends, steps).tolist()


def guidances(sampling: SamplingConfig) -> list[float]:
    """Return the guidance of every step; 1 outside of its interval of steps."""
    s = sampling
    guided = range(s.guidance_start, s.guidance_start + s.guidance_steps)
    return [g if i in guided else 1.0 for i, g in enumerate(ramp(s.guidance, s.steps))]


def inverse_cdf(logits: Tensor, uniform: Tensor) -> Tensor:
    """Draw codes [...] from softmax(logits [..., K]), with one uniform in [0, 1) each.

    The first code whose cumulated probability exceeds the uniform's share of the total, in fp32:
    first the block of codes, then the code in it, which reads most probabilities once only. A code
    of probability zero is never drawn.
    """
    p = logits.softmax(-1, dtype=torch.float32)
    if spare := -p.shape[-1] % _BLOCK:
        p = F.pad(p, (0, spare))  # it would copy even if there were nothing to add
    p = p.unflatten(-1, (-1, _BLOCK))
    blocks = p.sum(-1).cumsum(-1)
    block, target = _first_above(blocks, uniform.unsqueeze(-1) * blocks[..., -1:])
    rest = target - F.pad(blocks, (1, 0)).gather(-1, block)
    codes = p.gather(-2, block.unsqueeze(-1).expand(*block.shape, _BLOCK)).squeeze(-2).cumsum(-1)
    code, _ = _first_above(codes, rest)
    return (block * _BLOCK + code).squeeze(-1)


def _first_above(cdf: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first places [..., 1] where cdf [..., n] exceeds target [..., 1], and the target.

    A target that rounding has left at the end or beyond is taken as just below it.
    """
    target = torch.minimum(target, torch.nextafter(cdf[..., -1:], cdf.new_zeros(())))
    place = torch.searchsorted(cdf, target, right=True)
    place = place.clamp_(max=cdf.shape[-1] - 1)  # of a row that is NaN
    return place, target


def typical_mask(logits: Tensor, mass: Tensor) -> Tensor:
    """Return the codes to keep in locally typical sampling (arXiv 2202.00666), [..., K].

    Codes in order of |−log p − entropy|, up to and including the one whose cumulated probability
    first reaches `mass` [...]; ties are kept.
    """
    log_p = logits.float().log_softmax(-1)
    p = log_p.exp()
    # A code of probability zero adds nothing to the entropy, though its logarithm is infinite.
    entropy = -(p * log_p).nan_to_num(0.0).sum(-1, keepdim=True)
    distance = (-log_p - entropy).abs()
    ordered, order = distance.sort(dim=-1)
    cumulated = p.gather(-1, order).cumsum(-1)
    last = (cumulated < mass[..., None]).sum(-1, keepdim=True).clamp(max=logits.shape[-1] - 1)
    return distance <= ordered.gather(-1, last)


def keep_typical(logits: Tensor, mass: Tensor) -> Tensor:
    """Return logits [..., K] with every untypical code at −∞; mass [...]."""
    return logits.masked_fill(~typical_mask(logits, mass), -torch.inf)


def quantised_mean(logits: Tensor, codebook: Tensor) -> Tensor:
    """Return the probability-weighted mean of codebook vectors, [..., c].

    logits: [..., K]. codebook: [K, c].
    """
    return logits.float().softmax(-1) @ codebook.float()


def log_probability(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return log p [...] of tokens [...] in softmax(logits [..., K]), in fp32."""
    return logits.float().log_softmax(-1).gather(-1, tokens[..., None])[..., 0]


def least_confident_first(log_p: Tensor, uniform: Tensor, share: Tensor) -> Tensor:
    """Return uniforms [B, H, W] in the order of log p plus Gumbel noise, each (rank + ½) / HW.

    log_p, uniform: [B, H, W]. share: of noise, [B], to which the Gumbel noise is proportional. The
    smallest are of the tokens that the denoiser is least sure of; round(share · HW) are at most
    `share`.
    """
    clamped = uniform.float().clamp(1e-6, 1 - 1e-6)
    gumbel = -(-clamped.log()).log()
    strength = CONFIDENCE_NOISE * share.clamp_min(0)[:, None, None]
    order = (log_p.float() + strength * gumbel).flatten(1).argsort(dim=1, stable=True)
    n = order.shape[1]
    even = (torch.arange(n, device=order.device) + 0.5) / n
    return (
        torch.empty_like(even.expand_as(order))
        .scatter_(1, order, even.expand_as(order))
        .view(uniform.shape)
    )


def renoise(tokens: Tensor, start: Tensor, uniform: Tensor, probability: Tensor) -> Tensor:
    """Put start tokens back where uniform ≤ probability; `NEVER` puts none back.

    tokens, start, uniform: [B, H, W]. probability: [B].
    """
    return torch.where(uniform <= probability[:, None, None], start, tokens)


def renoise_and_pin(
    drawn: Tensor,
    source: Tensor,
    uniform: Tensor,
    probability: Tensor,
    kept: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the decodable tokens after a step, and the next step's input, in new memory.

    Both are [B, H, W].

    drawn, source [B, H, W]: this step's tokens, and what takes the place of those that become noise
    again; uniform, probability as for `renoise`. kept: where tokens stay as they are (True) and
    which they are, [B, H, W] each.
    """
    following = renoise(drawn, source, uniform, probability)
    if kept is None:
        return drawn.clone(), following
    return torch.where(*kept, drawn), torch.where(*kept, following)


def guide(features: Tensor, unconditional: Tensor, guidance: Tensor) -> Tensor:
    """Apply guidance between features of rows [B, H, W, C]; guidance [B]. Sums are fp32."""
    weight = guidance[:, None, None, None]
    return torch.lerp(unconditional.float(), features.float(), weight).to(features.dtype)


def mix_branches(branches: Tensor, row_of: Tensor, weights: Tensor, rows: int) -> Tensor:
    """Apply guidance: mix features of branches [N, H, W, C] into those of rows [B, H, W, C].

    Sums are fp32. row_of [N] is each branch's row, weights [N] or [N, H, W] its guidance weight
    there. Rows are summed apart, so that one with NaN in it harms no other.
    """
    if len(branches) == rows:
        return branches
    weighted = branches.float() * (
        weights[:, None, None, None] if weights.dim() == 1 else weights[..., None]
    )
    mixed = weighted.new_zeros(rows, *branches.shape[1:]).index_add_(0, row_of, weighted)
    return mixed.to(branches.dtype)
