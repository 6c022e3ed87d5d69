"""A training's state in one file, which is always whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def load(checkpoint: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """A checkpoint's contents: `ema` (the weights to use), `model`, `optimizers`, `step`, `seconds`, random states, the data's position."""
    return torch.load(checkpoint, map_location=device, weights_only=True)


def save(path: Path, contents: dict[str, Any]) -> None:
    """Writes beside the old file, then takes its place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(contents, partial)
    partial.replace(path)
