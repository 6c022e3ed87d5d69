"""Load and save bundles: `bundle.json`, a safetensors file per network, and the tokenizer's merges.

Loading is strict: every file must be the listed one and every tensor finite (`bundle_files.py`),
expected, present and of the right shape. Modules are built on the meta device and take the tensors
as they come from the file, so a bundle is in memory once.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from model.bundle_files import BundleError, file_entry, is_listed, read_tensors, verify_files
from model.config import (
    CONFIG_FILE,
    DENOISER,
    QUALITY,
    BundleConfig,
    BundleV1Config,
    BundleV3Config,
    Encoders,
    Kernels,
    further_denoiser,
)
from model.kernels.int8 import to_int8
from model.network_config import (
    ByteEncoderConfig,
    CLIPConfig,
    DenoiserConfig,
    DenoiserV1Config,
    PriorConfig,
    VQGANConfig,
    VQGANV1Config,
)
from model.networks.denoiser_v1 import VQGANV1, DenoiserV1
from model.networks.denoiser_v3 import Denoiser
from model.networks.prior import Prior
from model.networks.text_encoders import CLIP, ByteEncoder
from model.networks.vqgan_v3 import VQGAN
from model.optimize import lay_out_weights, optimize
from model.runtime import pick_dtype
from model.whole_file import whole_file

# Parameters of a prior; 32 MiB of fp32, about what a core's caches hold.
_SMALL_PRIOR = 2**23

# What each part of a configuration describes.
_NETWORKS: dict[type, Any] = {
    DenoiserConfig: Denoiser,
    DenoiserV1Config: DenoiserV1,
    VQGANConfig: VQGAN,
    VQGANV1Config: VQGANV1,
    PriorConfig: Prior,
    ByteEncoderConfig: ByteEncoder,
}


@dataclass(frozen=True)
class Bundle:
    """One set of weights, in evaluation mode, on one device.

    Each family of networks has a class of its own below. denoisers: the further ones, by the names
    in the configuration's `denoisers`.
    """

    config: BundleConfig
    denoiser: Denoiser | DenoiserV1
    vqgan: VQGAN | VQGANV1
    clip: CLIP
    denoisers: Mapping[str, Denoiser | DenoiserV1] = field(default_factory=dict, kw_only=True)

    def networks(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield each network and its name."""
        for name in self.config.networks:
            yield name, getattr(self, name)
        for name, denoiser in self.denoisers.items():
            yield further_denoiser(name), denoiser

    @property
    def every_denoiser(self) -> dict[str, Denoiser | DenoiserV1]:
        """All denoisers by their networks' names, the first one first."""
        further = {further_denoiser(name): each for name, each in self.denoisers.items()}
        return {DENOISER: self.denoiser, **further}


@dataclass(frozen=True)
class BundleV3(Bundle):
    """The v3 networks."""

    config: BundleV3Config
    denoiser: Denoiser
    vqgan: VQGAN
    prior: Prior
    byt5: ByteEncoder


@dataclass(frozen=True)
class BundleV1(Bundle):
    """The v1 networks."""

    config: BundleV1Config
    denoiser: DenoiserV1
    vqgan: VQGANV1


_BUNDLES: dict[type, type[Bundle]] = {BundleV3Config: BundleV3, BundleV1Config: BundleV1}


def build(
    config: BundleConfig, directory: Path | None, device: torch.device | str = "meta"
) -> Bundle:
    """Build a bundle's networks without weights. directory: of the tokenizer's own merges.

    Raises BundleError for sizes that make no network.
    """
    with torch.device(device):
        networks = {
            name: _build(name, getattr(config, name), directory) for name in config.networks
        }
        denoisers = {
            name: _build(further_denoiser(name), part, directory)
            for name, part in config.denoisers.items()
        }
    return _BUNDLES[type(config)](config=config, denoisers=denoisers, **networks)


def _build(name: str, part: Any, directory: Path | None) -> Any:
    """Return the network that a part of a configuration describes. Raises BundleError."""
    try:
        if isinstance(part, CLIPConfig):
            return CLIP(part, directory)
        return _NETWORKS[type(part)](part)
    except (ArithmeticError, AssertionError, LookupError, RuntimeError, ValueError) as error:
        raise BundleError(f"{CONFIG_FILE}: {name} cannot be built ({error})") from error


def load_bundle(
    directory: Path,
    device: torch.device,
    dtype: torch.dtype,
    encoders: Encoders = "device",
    kernels: Kernels = "auto",
) -> Bundle:
    """Read a bundle and check it.

    Raises BundleError, FileNotFoundError, or pydantic.ValidationError for an invalid `bundle.json`.
    """
    config = BundleConfig.read(directory)
    verify_files(directory, config, is_listed)
    bundle = build(config, directory)
    for name, module in bundle.networks():
        elsewhere = encoders == "cpu" and isinstance(module, ByteEncoder | CLIP)
        place = torch.device("cpu") if elsewhere else device
        kind = _dtype_of(module, place, pick_dtype("auto", place) if place != device else dtype)
        assign(
            module,
            read_tensors(directory / f"{name}.safetensors", place),
            kind,
            where=f"{name}.safetensors",
        )
        if encoders == "int8" and isinstance(module, ByteEncoder):
            to_int8(module.t5.encoder.block)
        module.eval().requires_grad_(False)
    optimize_bundle(bundle, kernels)
    return bundle


def optimize_bundle(bundle: Bundle, kernels: Kernels = "auto") -> None:
    """Prepare loaded, fixed weights for inference at the bundle's native size."""
    width, height = (
        pixels // bundle.config.vqgan.downscale for pixels in bundle.config.native_size
    )
    optimize((network for _, network in bundle.networks()), (height, width), kernels)


def _dtype_of(module: nn.Module, device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """Return the type to keep a network in.

    The prior's products have two rows for each image, and a CPU computes those fastest in fp32, as
    long as reading the weights is not what takes the time.
    """
    few_rows = (
        isinstance(module, Prior) and sum(p.numel() for p in module.parameters()) < _SMALL_PRIOR
    )
    return torch.float32 if few_rows and device.type == "cpu" else dtype


def of_preset(bundle: Bundle, name: str) -> Bundle:
    """Return the bundle as if a preset were its only one, by its recipe and its denoiser.

    Raises ValueError for an unknown preset.
    """
    config = bundle.config
    if name not in config.preset_names:
        raise ValueError(f"{config.name} has {', '.join(config.preset_names)}, not {name!r}")
    preset = config.preset(name)
    fields: dict[str, Any] = {"denoiser": config.denoiser_of(preset.network)}
    alone = replace(
        config,
        recipe=preset.recipe,
        presets={},
        denoisers={},
        default_preset=QUALITY,
        **fields,
    )
    denoiser: Any = bundle.every_denoiser[preset.network]
    return replace(bundle, config=alone, denoiser=denoiser, denoisers={})


def load_v3(directory: Path, device: torch.device, dtype: torch.dtype) -> BundleV3:
    """Load a bundle of v3 networks.

    Raises BundleError for another family, and the errors of `load_bundle`.
    """
    bundle = load_bundle(directory, device, dtype)
    if not isinstance(bundle, BundleV3):
        raise BundleError(
            f"{bundle.config.name} holds {bundle.config.family} networks, and v3 ones are needed"
        )
    return bundle


def assign(module: nn.Module, tensors: dict[str, Tensor], dtype: torch.dtype, where: str) -> None:
    """Give a meta module its tensors, converted to `dtype` where they are floating point.

    A file may still hold the blocks that a denoiser's configuration prunes; they are not used.
    Raises the errors of `check_fit`.
    """
    if isinstance(module, Denoiser):
        pruned = tuple(f"{name}." for name in module.config.pruned_blocks)
        tensors = {name: t for name, t in tensors.items() if not name.startswith(pruned)}
    check_fit(tensors, state_of(module), where)
    converted = {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}
    inner(module).load_state_dict(
        converted, strict=not isinstance(module, ByteEncoder), assign=True
    )
    if isinstance(module, ByteEncoder | CLIP):
        module.complete()
    lay_out_weights(module)


def check_fit(tensors: dict[str, Tensor], expected: dict[str, Tensor], where: str) -> None:
    """Compare names, kinds and shapes; the values may be on the meta device.

    Raises BundleError naming the first tensor that does not fit.
    """
    for name in tensors:
        if name not in expected:
            raise BundleError(f"{where}: tensor {name!r} is unknown to this configuration")
    for name, wanted in expected.items():
        if name not in tensors:
            raise BundleError(f"{where}: tensor {name!r} is missing")
        found, needs = tensors[name], "this configuration needs"
        if found.is_floating_point() != wanted.is_floating_point():
            raise BundleError(f"{where}: tensor {name!r} is {found.dtype}, {needs} {wanted.dtype}")
        if found.shape != wanted.shape:
            shapes = f"{list(found.shape)}, {needs} {list(wanted.shape)}"
            raise BundleError(f"{where}: tensor {name!r} is {shapes}")


def state_of(module: nn.Module) -> dict[str, Tensor]:
    """Return a network's tensors under their published names, as in its safetensors file."""
    state = inner(module).state_dict()
    if isinstance(module, ByteEncoder):
        state.pop("encoder.embed_tokens.weight", None)  # the same tensor as `shared.weight`
    return state


def inner(module: nn.Module) -> nn.Module:
    """Return the network whose names are published, without our wrapper around it."""
    if isinstance(module, ByteEncoder):
        return module.t5
    return module.model if isinstance(module, CLIP) else module


def save_bundle(
    bundle: Bundle, directory: Path, dtype: torch.dtype, merges: Path | None = None
) -> BundleConfig:
    """Write a bundle; replace files only after all are written.

    merges: the tokenizer's file, if the configuration names one.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=directory.parent, prefix=f"{directory.name}.") as name:
        partial = Path(name)
        for network, module in bundle.networks():
            state = {
                k: (t.to(dtype) if t.is_floating_point() else t).cpu().contiguous()
                for k, t in state_of(module).items()
            }
            with whole_file(partial / f"{network}.safetensors") as file:
                save_file(state, file)
        if merges is not None and bundle.config.clip.merges is not None:
            shutil.copyfile(merges, partial / bundle.config.clip.merges)
        config = replace(
            bundle.config, files={path.name: file_entry(path) for path in sorted(partial.iterdir())}
        )
        config.write(partial)
        for path in partial.iterdir():
            path.replace(directory / path.name)
    return config
