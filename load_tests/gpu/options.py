"""Define the options that all parts of the program share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from load_tests.gpu.timing import Budget, Ceilings, ceilings
from load_tests.gpu.weights import Family, config_of, random_bundle
from model.bundle import Bundle
from model.config import BundleConfig, Kernels

_MICRO_SIDE = 64


@dataclass(frozen=True)
class Options:
    """Options of all parts.

    micro: sizes that try the program and measure nothing. quick: fewer and shorter loads. out: for
    results; room: for a bundle; None: nowhere, the system's choice.
    """

    kernels: Kernels
    device: torch.device
    dtype: torch.dtype
    families: tuple[Family, ...]
    rows: tuple[int, ...]
    sides: tuple[int, ...]
    steps: tuple[int, ...]
    budget: Budget
    micro: bool
    quick: bool
    out: Path | None
    room: Path | None

    def config(self, family: Family) -> BundleConfig:
        return config_of(family, micro=self.micro)

    def bundle(
        self, family: Family, dtype: torch.dtype | None = None, kernels: Kernels | None = None
    ) -> Bundle:
        return random_bundle(
            self.config(family), self.device, dtype or self.dtype, kernels or self.kernels
        )

    def size(self, family: Family) -> tuple[int, int]:
        """Return the (width, height) that the family was made for."""
        return self.config(family).native_size

    def ceilings(self) -> Ceilings:
        if self.micro:
            return ceilings(self.device, self.dtype, self.budget, side=_MICRO_SIDE)
        return ceilings(self.device, self.dtype, self.budget)
