"""Read and write a training's checkpoint: one file, which is always complete."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.bundle_files import BundleError
from model.checkpoints.checkpoint import read_content
from model.whole_file import whole_file


def load(checkpoint: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Return a checkpoint's contents.

    `ema` (the weights to use), `model`, `optimizers`, `step`, `seconds`, the random states, and the
    data's position. Raises FileNotFoundError without the file, and BundleError for a file that is
    no checkpoint.
    """
    if not checkpoint.is_file():
        reason = "it is a folder" if checkpoint.is_dir() else "there is no such file"
        raise FileNotFoundError(f"no checkpoint {checkpoint}: {reason}")
    content = read_content(checkpoint, device)
    if not isinstance(content, dict):
        raise BundleError(f"{checkpoint} is no checkpoint: it holds a {type(content).__name__}")
    return content


def resumable(checkpoint: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Return the contents of a checkpoint to go on from. Raises as `load` for one that is none."""
    if not checkpoint.exists():
        raise FileNotFoundError(f"no checkpoint {checkpoint}: begin without --resume")
    content = load(checkpoint, device)
    if "step" not in content:
        raise BundleError(f"{checkpoint} holds weights alone, and --resume needs a checkpoint")
    return content


def averaged(checkpoint: dict[str, Any], prefix: str) -> dict[str, Tensor]:
    """Return the averaged weights of the network below `prefix`, by published name.

    Raises BundleError for contents without averaged weights.
    """
    if not isinstance(checkpoint.get("ema"), dict):
        raise BundleError("there are no averaged weights, so it is no trainer's checkpoint")
    return {
        name.removeprefix(prefix): t
        for name, t in checkpoint["ema"].items()
        if name.startswith(prefix)
    }


def save(path: Path, contents: Any) -> None:
    """Write a checkpoint or a tensor with `torch.save`, the whole file or none of it.

    Raises OSError where it cannot be written.
    """
    with whole_file(path) as partial:
        try:
            torch.save(contents, partial)
        except RuntimeError as error:  # torch's own words for a full disk
            if "inline_container" not in str(error):
                raise
            free = shutil.disk_usage(path.parent).free
            raise OSError(f"{path} was not written: {free:,} bytes are free on its disk") from None


def write(path: Path, content: bytes) -> None:
    """Write the whole file or none of it."""
    with whole_file(path) as partial:
        partial.write_bytes(content)
