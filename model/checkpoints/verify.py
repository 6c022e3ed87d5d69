"""Check a bundle without loading it: `paellera weights verify NAME`."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from model.bundle import build, check_fit, state_of
from model.bundle_files import BundleError, is_finite, verify_files
from model.config import BundleConfig


def verify(directory: Path) -> BundleConfig:
    """Check hashes, names, shapes and every value; return the configuration.

    One tensor is in memory at a time. Raises the errors of `model.bundle.load_bundle`, and
    safetensors.SafetensorError.
    """
    config = BundleConfig.read(directory)
    verify_files(directory, config)
    for name, module in build(config, directory).networks():
        _check(directory / f"{name}.safetensors", state_of(module))
    return config


def _check(path: Path, expected: dict[str, Tensor]) -> None:
    with safe_open(path, framework="pt") as file:
        shapes: dict[str, Tensor] = {}
        for name in file.keys():  # noqa: SIM118, it is no dict
            tensor = file.get_tensor(name)
            if not is_finite(tensor):
                raise BundleError(f"{path.name}: tensor {name!r} holds NaN or infinity")
            shapes[name] = torch.empty_like(tensor, device="meta")
    check_fit(shapes, expected, path.name)
