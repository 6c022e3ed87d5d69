"""Report the sizes of a bundle's networks and their memory needs: `paellera weights info NAME`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from model.checkpoints.manifest import published
from model.config import CONFIG_FILE, BundleConfig, Encoders, find_bundle

GB = 10**9


@dataclass(frozen=True, slots=True)
class Part:
    """The size of one network.

    parameters: running statistics included. types: of its numbers, by safetensors' names.
    """

    parameters: int
    bytes: int
    types: str


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes of weights on the device and beside it, in the CPU's memory."""

    device: int
    cpu: int = 0

    def words(self, gb: float | None = None) -> str:
        """Return the need in words, and whether it fits.

        gb: memory of the device, if it is known. Activations need more memory, which grows with the
        batch and the image.
        """
        beside = f", {self.cpu / GB:.2f} GB on the CPU" if self.cpu else ""
        fits = (
            ""
            if gb is None
            else f", {'fits' if self.device < gb * GB else 'does not fit'} in {gb:g} GB"
        )
        return f"{self.device / GB:.2f} GB on the device{beside}{fits}"


def contents(name: str) -> tuple[BundleConfig, dict[str, Part]]:
    """Return a bundle's configuration and networks.

    The networks of a published bundle that is absent are computed from their shapes.

    Raises FileNotFoundError or ValueError.
    """
    try:
        directory = find_bundle(name)
    except FileNotFoundError:
        if name not in published().bundles:
            raise
        config = published().config(name)
        return config, shapes(config)
    config = BundleConfig.read(directory)
    missing = [
        network
        for network in config.network_names
        if not (directory / f"{network}.safetensors").is_file()
    ]
    if missing:
        raise FileNotFoundError(
            f"{directory / CONFIG_FILE} is there, but {', '.join(missing)}.safetensors is not"
        )
    return config, {
        network: _read(directory / f"{network}.safetensors") for network in config.network_names
    }


def shapes(config: BundleConfig) -> dict[str, Part]:
    """Return the networks' sizes in half precision, from their configuration alone."""
    from model.bundle import build, state_of
    from model.runtime import prepare

    prepare()
    counts = {
        name: sum(t.numel() for t in state_of(module).values())
        for name, module in build(config, None).networks()
    }
    return {name: Part(count, 2 * count, "not here") for name, count in counts.items()}


def _read(path: Path) -> Part:
    """Return the size of a safetensors file's network, from its header alone."""
    from safetensors import safe_open

    with safe_open(path, framework="np") as file:
        slices = [file.get_slice(name) for name in file.keys()]  # noqa: SIM118, it is no dict
        types = {part.get_dtype() for part in slices if part.get_dtype() not in {"I64", "I32"}}
        return Part(
            sum(math.prod(part.get_shape()) for part in slices),
            path.stat().st_size,
            ", ".join(sorted(types)),
        )


def needs(parts: Mapping[str, Part]) -> dict[Encoders, Need]:
    """Return the memory of the weights in half precision for every place of the text encoders."""
    half = {name: 2 * part.parameters for name, part in parts.items()}
    total, text = sum(half.values()), sum(half.get(name, 0) for name in ("byt5", "clip"))
    return {
        "device": Need(total),
        "cpu": Need(total - text, text),
        "int8": Need(total - half.get("byt5", 0) // 2),
    }
