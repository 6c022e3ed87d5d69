"""Make random weights at the published sizes, on the device or as a bundle for a server.

No file is needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import torch
from torch import Tensor, nn

from model.bundle import Bundle, assign, build, optimize_bundle, save_bundle, state_of
from model.checkpoints.manifest import published
from model.config import BundleConfig, BundleV1Config, BundleV3Config, Kernels
from model.network_config import CLIPConfig, CLIPVisionConfig

Family = Literal["v3", "v1"]
BUNDLES: dict[Family, str] = {"v3": "paella-v3", "v1": "paella-v1"}


def config_of(family: Family, *, micro: bool) -> BundleConfig:
    """Return the published configuration; micro: one of the same form that takes milliseconds."""
    config = published().config(BUNDLES[family])
    return _micro(config) if micro else config


def random_bundle(
    config: BundleConfig, device: torch.device, dtype: torch.dtype, kernels: Kernels = "torch"
) -> Bundle:
    """Return a bundle of random values, ready for steps.

    The values are the same in every type, up to rounding, on one kind of device.
    """
    bundle = build(config, None)
    for seed, (name, module) in enumerate(bundle.networks()):
        generator = torch.Generator(device).manual_seed(seed)
        assign(
            module,
            {key: _random(key, t, generator, dtype) for key, t in state_of(module).items()},
            dtype,
            where=name,
        )
        module.eval().requires_grad_(False)
    optimize_bundle(bundle, kernels)
    return bundle


def _random(name: str, like: Tensor, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """Return random values spread as in a fresh network, so that activations stay in bounds."""
    device = generator.device
    if not like.is_floating_point():
        return torch.zeros(like.shape, dtype=like.dtype, device=device)
    fan_in = like[0].numel() if like.dim() > 1 else 4
    values = torch.randn(like.shape, generator=generator, device=device).mul_(fan_in**-0.5)
    return (values.abs_() if name.endswith("running_var") else values).to(
        dtype
    )  # variances are not negative


@contextmanager
def written(
    config: BundleConfig, device: torch.device, dtype: torch.dtype, directory: Path | None
) -> Iterator[Path]:
    """Write a bundle to disk for this context, and yield its directory.

    directory: a folder with room for it; default: the system's temporary directory.
    """
    with TemporaryDirectory(prefix="paellera-gpu-", dir=directory) as name:
        save_bundle(random_bundle(config, device, dtype), Path(name) / config.name, dtype)
        if device.type == "cuda":
            torch.cuda.empty_cache()  # the server needs the room
        yield Path(name) / config.name


def weight_bytes(module: nn.Module, but: str = "-") -> int:
    """Return the bytes of a module's parameters, without those whose names begin with `but`."""
    return sum(
        parameter.nbytes
        for name, parameter in module.named_parameters()
        if not name.startswith(but)
    )


def _micro(config: BundleConfig) -> BundleConfig:
    clip = _micro_clip(config.clip)
    if isinstance(config, BundleV1Config):
        denoiser = replace(
            config.denoiser,
            num_labels=64,
            c_hidden=64,
            c_clip=16,
            c_r=16,
            down_levels=(1, 1),
            up_levels=(1, 1),
        )
        vqgan = replace(
            config.vqgan,
            ch=32,
            ch_mult=(1, 1),
            num_res_blocks=1,
            resolution=32,
            attn_resolutions=(16,),
            z_channels=32,
            embed_dim=32,
            n_embed=64,
        )
        return replace(config, native_size=(32, 32), denoiser=denoiser, vqgan=vqgan, clip=clip)
    assert isinstance(config, BundleV3Config)
    return replace(
        config,
        native_size=(32, 32),
        denoiser=replace(
            config.denoiser, byt5_embd=16, num_labels=64, clip_embd=16,
            c_in=16, c_out=16, c_cond=16, c_hidden=(16, 32, 32),
            nhead=(-1, 4, 4), blocks=(1, 1, 1),
        ),
        vqgan=replace(config.vqgan, c_hidden=16, codebook_size=64, bottleneck_blocks=1),
        prior=replace(config.prior, c_hidden=16, c_r=16, clip_r=16, num_blocks=2),
        byt5=replace(config.byt5, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2),
        clip=clip,
        recipe=replace(config.recipe, prior_steps=4),
    )  # fmt: skip


def _micro_clip(clip: CLIPConfig) -> CLIPConfig:
    vision = CLIPVisionConfig(
        image_size=16, patch_size=8, width=16, layers=1, head_width=8, mlp_ratio=2.0
    )
    return replace(
        clip,
        embed_dim=16,
        vision_cfg=vision,
        text_cfg=replace(clip.text_cfg, width=16, heads=2, layers=1),
    )
