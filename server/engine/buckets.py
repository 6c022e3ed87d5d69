"""The shapes that steps are recorded in, and the memory that all of them read their inputs from.

Letters: B rows, N branches, H W token grid, L condition tokens, S widths of what time and condition do to the blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from model.config import BundleConfig, BundleV3Config
from model.denoiser import Condition, Denoiser
from model.operations import AnyCondition
from model.v1 import ConditionV1, DenoiserV1
from server.engine.scheduler import LENGTHS


class Bucket(NamedTuple):
    """The shapes of one graph. branches: lanes of each row, 1 or 2; length: condition tokens of each lane, 1 for v1."""

    grid: tuple[int, int]
    rows: int
    branches: int
    length: int

    @property
    def lanes(self) -> int:
        return self.rows * self.branches

    @property
    def work(self) -> int:
        return self.lanes * math.prod(self.grid)


def row_counts(most: int) -> list[int]:
    """Powers of two, and the most."""
    return [2**i for i in range(most.bit_length()) if 2**i < most] + [most]


def buckets(config: BundleConfig, max_rows: int, sizes: Iterable[tuple[int, int]]) -> list[Bucket]:
    """What a server records: these picture sizes (width, height), rows in powers of two, the scheduler's classes of condition lengths."""
    lengths = [1]
    if isinstance(config, BundleV3Config):
        # A class counts a text's bytes; CLIP's text and image follow them.
        longest, clip = config.byt5.max_bytes, 2 * config.denoiser.clip_seq_len
        lengths = sorted({min(length, longest) + clip for length in LENGTHS})
    return [Bucket(*shape) for shape in product(grids(config, sizes), row_counts(max_rows), (1, 2), lengths)]


def grids(config: BundleConfig, sizes: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Picture sizes (width, height) → token grids (H, W)."""
    return [(height // config.vqgan.downscale, width // config.vqgan.downscale) for width, height in sizes]


class Memory:
    """The inputs of all steps, allocated once for the largest; graphs that never run at once can read the same memory."""

    def __init__(self, denoiser: Denoiser | DenoiserV1, buckets: Iterable[Bucket], device: torch.device) -> None:
        buckets = list(buckets)
        self.tokens = torch.zeros(max(b.rows * math.prod(b.grid) for b in buckets), dtype=torch.int64, device=device)
        self.times = denoiser.times(torch.ones(max(b.rows for b in buckets), device=device))
        self.share = torch.zeros(max(b.lanes for b in buckets), device=device)
        self.condition = _conditions(denoiser, max(b.lanes * b.length for b in buckets), self.times)

    def views(self, b: Bucket) -> tuple[Tensor, Tensor, Tensor, AnyCondition]:
        """(tokens, times, share, condition) in a bucket's shapes."""
        tokens = self.tokens[: b.rows * math.prod(b.grid)].view(b.rows, *b.grid)
        return tokens, self.times[: b.rows], self.share[: b.lanes], self.condition(b)


def _conditions(denoiser: Denoiser | DenoiserV1, most: int, like: Tensor) -> Callable[[Bucket], AnyCondition]:
    """Room for `most` condition tokens of all lanes together, seen in a bucket's shapes. like: of the type and device."""
    if isinstance(denoiser, DenoiserV1):
        levels = [like.new_zeros(most, 1, 1, width) for width in denoiser.modulation_widths]
        return lambda b: ConditionV1(tuple(level[: b.lanes] for level in levels))
    kv, mask = like.new_zeros(most, denoiser.condition_width), torch.ones(most, dtype=torch.bool, device=like.device)

    def view(b: Bucket) -> Condition:
        keys = b.lanes * b.length
        return Condition(kv[:keys].view(b.lanes, b.length, -1), mask[:keys].view(b.lanes, b.length))

    return view
