"""Step weights with AdamW, and with Muon those that are matrices in the middle of a network."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import AdamW, Optimizer

_WEIGHT_DECAY = 0.01
# Muon's published constants:
_QUINTIC = (3.4445, -4.7750, 2.0315)  # of Newton and Schulz's iteration
_ITERATIONS = 5
_MOMENTUM = 0.95
_RMS = 0.2  # the usual size of AdamW's steps
_EPS = 1e-7


class BatchedMuon(Optimizer):
    """`torch.optim.Muon` with "match_rms_adamw", all matrices of one shape in one batched product.

    One by one, their iterations are some thousand launches of a GPU that has little to do in each.
    The rate may be a tensor, and nothing waits for the device, so that a step can be recorded.
    """

    def __init__(
        self, matrices: Iterable[Parameter], lr: float | Tensor, weight_decay: float = _WEIGHT_DECAY
    ) -> None:
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Step all matrices that have a gradient."""
        for group in self.param_groups:
            shapes = defaultdict[tuple[int, ...], list[Parameter]](list)
            for p in group["params"]:
                if p.grad is not None:
                    shapes[tuple(p.shape)].append(p)
            for same in shapes.values():
                self._step(same, group["lr"], group["weight_decay"])

    def _step(self, matrices: list[Parameter], lr: float | Tensor, weight_decay: float) -> None:
        """Step all of one shape [A, B]."""
        for p in matrices:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(
                    p, memory_format=torch.contiguous_format
                )
        momenta = [self.state[p]["momentum_buffer"] for p in matrices]
        gradients = [p.grad for p in matrices if p.grad is not None]
        torch._foreach_lerp_(momenta, gradients, 1 - _MOMENTUM)
        updates = orthogonal(
            torch.stack(torch._foreach_lerp(gradients, momenta, _MOMENTUM))
        )  # Nesterov's
        scale = -lr * (_RMS * max(matrices[0].shape) ** 0.5)
        keep = 1 - lr * weight_decay
        for p, update in zip(matrices, updates.to(matrices[0].dtype).unbind(), strict=True):
            p.mul_(keep).add_(update * scale)


def orthogonal(matrices: Tensor) -> Tensor:
    """Turn [N, A, B] into bf16 matrices with singular values near 1.

    Computed by Newton and Schulz's iterations.
    """
    a, b, c = _QUINTIC
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.bfloat16()
    x = x.mT if tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(_EPS)
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def _muon(matrices: list[Parameter], lr: float | Tensor) -> Optimizer:
    """Return the Muon optimizer of these matrices.

    Several processes share the matrices, since Newton and Schulz's iterations take as long as the
    exchange of gradients.
    """
    if dist.is_initialized():
        # Importing it compiles functions that are not needed here.
        from torch.distributed.optim import ZeroRedundancyOptimizer

        return ZeroRedundancyOptimizer(matrices, optimizer_class=BatchedMuon, lr=lr)
    return BatchedMuon(matrices, lr)


class Optimizers:
    """Step all parameters of a module at one learning rate.

    matrices: names of those that Muon steps; its update is a matrix with equal singular values,
    scaled to the size of AdamW's. From the same number of images the denoiser learns more with it
    (docs/log.md). AdamW steps embeddings and last projections: their rows stand for codes, not for
    directions. On CUDA the rate is a tensor, and a step can be recorded.
    """

    def __init__(self, module: nn.Module, lr: float, matrices: Iterable[str] = ()) -> None:
        chosen = frozenset(matrices)
        trained = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        others = [p for name, p in trained if name not in chosen]
        device = trained[0][1].device
        self._lr = lr
        self._rate = (
            torch.tensor(lr, device=device)
            if device.type == "cuda" and not dist.is_initialized()
            else None
        )
        rate: float | Tensor = lr if self._rate is None else self._rate
        self.parts: dict[str, Optimizer] = {
            "adamw": AdamW(
                others,
                lr=rate,
                weight_decay=_WEIGHT_DECAY,
                betas=(0.9, 0.98),
                fused=True,
                capturable=self._rate is not None,
            ),
        }
        if chosen:
            self.parts["muon"] = _muon([p for name, p in trained if name in chosen], rate)

    @property
    def lr(self) -> float:
        """Return the learning rate of the next step."""
        return self._lr

    @lr.setter
    def lr(self, rate: float) -> None:
        self._lr = rate
        if self._rate is not None:
            self._rate.fill_(rate)
            return
        for group in self._groups():
            group["lr"] = rate

    def _groups(self) -> Iterator[dict[str, Any]]:
        return (group for part in self.parts.values() for group in part.param_groups)

    def step(self) -> None:
        """Step all parameters that have a gradient."""
        for part in self.parts.values():
            part.step()

    def zero_grad(self) -> None:
        """Set all gradients to None."""
        for part in self.parts.values():
            part.zero_grad(set_to_none=True)

    def forget(self) -> None:
        """Reset momenta and counters to their state before the first step, in the same tensors."""
        for part in self.parts.values():
            for state in part.state.values():
                for value in state.values():
                    if isinstance(value, Tensor):
                        value.zero_()

    def gather(self) -> None:
        """Bring the whole state to the first process, whose `state_dict` is then complete.

        Every process must call this.
        """
        if dist.is_initialized() and "muon" in self.parts:
            self.parts["muon"].consolidate_state_dict()  # type: ignore[attr-defined]

    def state_dict(self) -> dict[str, Any]:
        """Return plain values and tensors; a rate that is a tensor is saved as a number."""
        states = {name: part.state_dict() for name, part in self.parts.items()}
        for state in states.values():
            state["param_groups"] = [group | {"lr": self._lr} for group in state["param_groups"]]
        return states

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state. Raises KeyError for the state of other optimizers."""
        if state.keys() != self.parts.keys():
            raise KeyError(f"the state is of {', '.join(state)}, not of {', '.join(self.parts)}")
        kept = {
            name: [(group["lr"], group.get("capturable")) for group in part.param_groups]
            for name, part in self.parts.items()
        }
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
            for group, (lr, capturable) in zip(part.param_groups, kept[name], strict=True):
                group["lr"] = lr if self._rate is not None else group["lr"]
                if capturable is not None:
                    group["capturable"] = capturable
