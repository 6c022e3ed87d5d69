"""Read and write a training's checkpoint: one file, which is always complete."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def load(checkpoint: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Return a checkpoint's contents. Raises FileNotFoundError without the file.

    `ema` (the weights to use), `model`, `optimizers`, `step`, `seconds`, the random states, and the
    data's position.
    """
    return torch.load(checkpoint, map_location=device, weights_only=True)


def averaged(checkpoint: dict[str, Any], prefix: str) -> dict[str, Tensor]:
    """Return the averaged weights of the network below `prefix`, by published name."""
    return {
        name.removeprefix(prefix): t
        for name, t in checkpoint["ema"].items()
        if name.startswith(prefix)
    }


def save(path: Path, contents: Any) -> None:
    """Write a checkpoint or a tensor with `torch.save`, the whole file or none of it."""
    partial = _beside(path)
    torch.save(contents, partial)
    partial.replace(path)


def write(path: Path, content: bytes) -> None:
    """Write the whole file or none of it."""
    partial = _beside(path)
    partial.write_bytes(content)
    partial.replace(path)


def _beside(path: Path) -> Path:
    """Return the partial file that later replaces `path`, in its folder, which is created."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f"{path.name}.partial")
