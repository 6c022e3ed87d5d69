"""Compute a step's two halves: features of a batch of branches, and the tokens drawn from them.

Letters: B rows, N branches (one or two a row), H W token grid.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from model import sampling
from model.bundle import Bundle, BundleV3
from model.config import DENOISER, Sampler
from model.networks.denoiser_v3 import Denoiser
from model.rows import AnyCondition

# Their logits over 8192 codes are 1 GiB in fp32, of which a sampler needs several.
_TOKENS_DRAWN_AT_ONCE = 2**15


@dataclass(frozen=True, eq=False)
class BranchBatch:
    """The conditions of one set of rows at one step; the same object for many steps.

    members: each branch's row number and condition. The references keep the conditions alive, so
    that a later one cannot take a freed one's identity. row_of: [N], the row numbers on the device.
    """

    members: list[tuple[int, AnyCondition]]
    row_of: Tensor

    def hold(self, members: list[tuple[int, AnyCondition]]) -> bool:
        """Return whether these are the very same conditions in the same places."""
        pairs = zip(self.members, members, strict=False)
        return len(self.members) == len(members) and all(
            i == j and mine is other for (i, mine), (j, other) in pairs
        )

    @cached_property
    def condition(self) -> Any:
        """All conditions stacked into one batch, of the denoiser's kind, when it is first read."""
        conditions: list[Any] = [condition for _, condition in self.members]
        return type(conditions[0]).stack(conditions)


class SamplingInputs(NamedTuple):
    """The inputs of drawing B rows' tokens beside their features.

    uniform: [B, H, W]. inverse: one over the temperature, [B]. mass: typical mass, [B].
    """

    uniform: Tensor
    inverse: Tensor
    mass: Tensor

    def select(self, members: Tensor) -> SamplingInputs:
        """Return the inputs of these rows."""
        return SamplingInputs(*(part[members] for part in self))


class Executor(Protocol):
    """Compute the two halves of a step, on tensors of one device."""

    def features(
        self, tokens: Tensor, times: Tensor, branches: BranchBatch, weights: Tensor
    ) -> Tensor:
        """Return guided features [B, H, W, c_out].

        tokens: [B, H, W]. times: [B, S]. weights: each branch's guidance weight, [N] or [N, H, W].
        """

    def sample(self, sampler: Sampler, features: Tensor, inputs: SamplingInputs) -> Tensor:
        """Draw tokens [B, H, W] from guided features [B, H, W, c_out]."""

    def log_probability(self, features: Tensor, tokens: Tensor) -> Tensor:
        """Return log p [B, H, W] of tokens [B, H, W] by guided features, at temperature 1."""


class Eager:
    """Compute a step by calling one operator after the other.

    denoiser: the name of the network that takes the step.
    """

    def __init__(self, bundle: Bundle, denoiser: str = DENOISER) -> None:
        self.bundle, self.denoiser = bundle, bundle.every_denoiser[denoiser]

    def features(
        self, tokens: Tensor, times: Tensor, branches: BranchBatch, weights: Tensor
    ) -> Tensor:
        """Compute as `Executor.features`."""
        features = self.denoiser.features(tokens, times, branches.condition, branches.row_of)
        return sampling.mix_branches(features, branches.row_of, weights, len(tokens))

    def sample(self, sampler: Sampler, features: Tensor, inputs: SamplingInputs) -> Tensor:
        """Compute as `Executor.sample`."""
        rows = max(1, _TOKENS_DRAWN_AT_ONCE // math.prod(features.shape[1:3]))
        parts = zip(features.split(rows), *(part.split(rows) for part in inputs), strict=True)
        return torch.cat(
            [self._sample(sampler, part, SamplingInputs(*rest)) for part, *rest in parts]
        )

    def log_probability(self, features: Tensor, tokens: Tensor) -> Tensor:
        """Compute as `Executor.log_probability`."""
        rows = max(1, _TOKENS_DRAWN_AT_ONCE // math.prod(features.shape[1:3]))
        parts = zip(features.split(rows), tokens.split(rows), strict=True)
        project = self.denoiser.project
        return torch.cat([sampling.log_probability(project(part), own) for part, own in parts])

    def _sample(self, sampler: Sampler, features: Tensor, inputs: SamplingInputs) -> Tensor:
        if isinstance(self.denoiser, Denoiser):
            fused = self.denoiser.draw(sampler, features, inputs.uniform, inputs.inverse)
            if fused is not None:
                return fused
        project = self.denoiser.project
        if sampler == "argmax":
            return project(features).argmax(-1)
        inverse = inputs.inverse[:, None, None, None]
        if sampler == "typical":
            logits = project(features).float()
            mass = inputs.mass[:, None, None].expand(logits.shape[:-1])
            return sampling.inverse_cdf(
                sampling.keep_typical(logits, mass) * inverse, inputs.uniform
            )
        logits = self.denoiser.sharpened(features, inverse)
        if sampler == "quant":
            assert isinstance(self.bundle, BundleV3), (
                "a bundle's configuration names the samplers that it knows"
            )
            quantizer = self.bundle.vqgan.vquantizer
            return quantizer.nearest(sampling.quantised_mean(logits, quantizer.codebook.weight))
        return sampling.inverse_cdf(logits, inputs.uniform)
