"""Load a bundle as the settings say: device, precision, kernels, and compiled networks if any."""

from __future__ import annotations

from pathlib import Path

from model.compiled.use import default_root, use_compiled
from model.config import find_bundle
from model.pipeline import Pipeline
from model.runtime import pick_device, pick_dtype, use
from server.settings import Settings


def load_pipeline(name: str, settings: Settings) -> Pipeline:
    """Load a bundle by name or path, and compute by what `paellera compile` has made for it.

    Raises the errors of `Pipeline.load`.
    """
    pipeline = load_plain(name, settings)
    if settings.compiled:
        use_compiled(pipeline, compiled_root(settings))
    return pipeline


def compiled_root(settings: Settings) -> Path:
    """Return where compiled networks are kept."""
    given = settings.compiled_dir
    return default_root() if given is None else given.expanduser()


def load_plain(name: str, settings: Settings) -> Pipeline:
    """Load a bundle without compiled networks. Raises the errors of `Pipeline.load`."""
    device = use(pick_device(settings.device))
    dtype = pick_dtype(settings.dtype, device)
    return Pipeline.load(find_bundle(name), device, dtype, settings.encoders, settings.kernels)
