"""List the shapes of the CUDA graphs that a server captures: the rows, sizes and lengths it meets.

Pure Python, no torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import NamedTuple

from model.config import DENOISER, BundleConfig, BundleV3Config, further_denoiser
from model.network_config import DenoiserConfig
from server.engine.scheduler import LENGTHS


class Bucket(NamedTuple):
    """The shapes of one step's graph.

    grid: (H, W). branches_per_row: 1 or 2. length: condition tokens of each branch, 1 for v1.
    """

    grid: tuple[int, int]
    rows: int
    branches_per_row: int
    length: int

    @property
    def branches(self) -> int:
        """Branches of all rows together."""
        return self.rows * self.branches_per_row

    @property
    def work(self) -> int:
        """Tokens of all branches together."""
        return self.branches * math.prod(self.grid)


@dataclass(frozen=True)
class GraphShapes:
    """The shapes to capture.

    buckets: of the first denoiser's steps; further: of further denoisers', by the network's name.
    decode_rows, prior_rows: numbers of images.
    """

    buckets: Sequence[Bucket]
    grids: Sequence[tuple[int, int]]
    decode_rows: Sequence[int]
    prior_rows: Sequence[int]
    further: Mapping[str, Sequence[Bucket]] = field(default_factory=dict)

    @classmethod
    def for_server(
        cls, config: BundleConfig, sizes: Iterable[tuple[int, int]], max_rows: int, decode_rows: int
    ) -> GraphShapes:
        """Return all shapes that a server meets: these image sizes and at most `max_rows` rows.

        sizes: (width, height) in pixels.
        """
        sizes = list(sizes)
        return cls(
            buckets=step_buckets(config, max_rows, sizes),
            grids=grids(config, sizes),
            decode_rows=row_counts(decode_rows),
            prior_rows=row_counts(max_rows),
            further={
                network: step_buckets(config, max_rows, sizes, network)
                for network in map(further_denoiser, config.denoisers)
            },
        )


def row_counts(most: int) -> list[int]:
    """Return the powers of two below `most`, and `most`."""
    return [2**i for i in range(most.bit_length()) if 2**i < most] + [most]


def step_buckets(
    config: BundleConfig,
    max_rows: int,
    sizes: Iterable[tuple[int, int]],
    network: str = DENOISER,
) -> list[Bucket]:
    """Return every bucket of these image sizes and the scheduler's classes of lengths.

    Rows have one branch where no preset of the denoiser is guided. sizes: (width, height) in
    pixels. network: the denoiser's name.
    """
    lengths, denoiser = [1], config.denoiser_of(network)
    if isinstance(config, BundleV3Config) and isinstance(denoiser, DenoiserConfig):
        # A class counts a text's bytes; CLIP's text and image follow them.
        longest, clip = config.byt5.max_bytes, 2 * denoiser.clip_seq_len
        lengths = sorted({min(length, longest) + clip for length in LENGTHS})
    guided = network == DENOISER or any(p.guided for p in config.presets_of(network))
    per_row = (1, 2) if guided else (1,)
    return [
        Bucket(*shape)
        for shape in product(grids(config, sizes), row_counts(max_rows), per_row, lengths)
    ]


def grids(config: BundleConfig, sizes: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Convert image sizes (width, height) to token grids (H, W)."""
    return [
        (height // config.vqgan.downscale, width // config.vqgan.downscale)
        for width, height in sizes
    ]
