"""Checkpoints: written, assembled, and compared."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from model.networks.denoiser_v3 import Denoiser
from model.training import assemble


def without_clock(saved: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in saved.items() if name != "seconds"}


def identical(a: Any, b: Any) -> bool:
    """Equality down to the last bit of every tensor."""
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(identical(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(identical, a, b))
    return bool(a == b)


def saved(denoiser: Denoiser, path: Path) -> Path:
    """A training's checkpoint of this denoiser."""
    weights = {f"denoiser.{name}": t for name, t in denoiser.state_dict().items()}
    torch.save({"ema": weights}, path)
    return path


def assembled(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["assemble", *map(str, arguments), "--dtype", "float32"])
    assemble.main()
