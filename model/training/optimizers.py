"""What turns gradients into steps: AdamW, and Muon for those weights that are matrices in the middle of a network."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.nn import Parameter
from torch.optim import AdamW, Muon, Optimizer

_WEIGHT_DECAY = 0.01


def _muon(matrices: list[Parameter], lr: float) -> Optimizer:
    """Several processes share the matrices out among them, since Newton and Schulz's iterations take as long as the gradients' exchange."""
    options: dict[str, Any] = {"lr": lr, "weight_decay": _WEIGHT_DECAY, "adjust_lr_fn": "match_rms_adamw"}
    if dist.is_initialized():
        from torch.distributed.optim import ZeroRedundancyOptimizer  # which compiles functions that nobody here needs

        return ZeroRedundancyOptimizer(matrices, optimizer_class=Muon, **options)
    return Muon(matrices, **options)


class Optimizers:
    """Steps all parameters of a module at one learning rate.

    matrices: names of those that Muon steps; its update is a matrix with all singular values alike, scaled to the size of AdamW's. From the
    same number of pictures the denoiser learns more that way (docs/log.md). Embeddings and last projections are AdamW's: their rows stand
    for codes, not for directions.
    """

    def __init__(self, module: nn.Module, lr: float, matrices: Iterable[str] = ()) -> None:
        chosen = frozenset(matrices)
        trained = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        others = [p for name, p in trained if name not in chosen]
        self.parts: dict[str, Optimizer] = {
            "adamw": AdamW(others, lr=lr, weight_decay=_WEIGHT_DECAY, betas=(0.9, 0.98), fused=True),
        }
        if chosen:
            self.parts["muon"] = _muon([p for name, p in trained if name in chosen], lr)

    @property
    def lr(self) -> float:
        """The learning rate of the next step."""
        return float(next(self._groups())["lr"])

    @lr.setter
    def lr(self, rate: float) -> None:
        for group in self._groups():
            group["lr"] = rate

    def _groups(self) -> Iterator[dict[str, Any]]:
        return (group for part in self.parts.values() for group in part.param_groups)

    def step(self) -> None:
        for part in self.parts.values():
            part.step()

    def zero_grad(self) -> None:
        for part in self.parts.values():
            part.zero_grad(set_to_none=True)

    def gather(self) -> None:
        """Brings the whole state to the first process, whose `state_dict` is then everybody's; every process must ask."""
        if dist.is_initialized() and "muon" in self.parts:
            self.parts["muon"].consolidate_state_dict()  # type: ignore[attr-defined]

    def state_dict(self) -> dict[str, Any]:
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises KeyError for the state of other optimizers."""
        if state.keys() != self.parts.keys():
            raise KeyError(f"the state is of {', '.join(state)}, not of {', '.join(self.parts)}")
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
