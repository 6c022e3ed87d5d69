"""Prepare loaded networks for inference: lay out weights, fold, pack, and choose the kernels.

All of it happens when a bundle is loaded, once its weights are fixed; training never calls it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from importlib.util import find_spec

import torch
from torch import nn

from model.config import Kernels
from model.network_config import DenoiserConfig, PriorConfig
from model.networks.denoiser_v3 import Denoiser
from model.networks.layers import Pointwise
from model.networks.prior import Prior
from model.networks.text_encoders import CLIP, ByteEncoder
from model.networks.vqgan_v3 import VQGAN

log = logging.getLogger(__name__)

# Packed and folded weights are copies. They make a pass faster that is bound by its calls, which
# one with more weights than this is not.
_FOLDED_BYTES = 256 * 2**20


def optimize(
    networks: Iterable[nn.Module], grid: tuple[int, int], kernels: Kernels = "auto"
) -> None:
    """Fold and pack each network, and choose its kernels.

    grid: the token grid (H, W) that most inputs have; other sizes are computed as exactly.
    """
    for network in networks:
        device = next(network.parameters()).device
        # A GPU gets its work by calls, and nothing is packed for it: only the condition's map is
        # copied, a ninth of the published denoiser.
        small = size(network) <= _FOLDED_BYTES or device.type == "cuda"
        if isinstance(network, Denoiser | Prior):
            network.fold()
        if isinstance(network, CLIP):
            # open_clip's own pass takes three times as long in bfloat16 on a CPU.
            network.fold(packed=small)
        if isinstance(network, ByteEncoder) and small:
            network.fold()
        if isinstance(network, Denoiser) and small:
            network.fold_condition()
        if isinstance(network, Denoiser | VQGAN) and small:
            network.pack(*grid)
        if isinstance(network, Denoiser | Prior):
            _fuse(network, kernels)


def size(module: nn.Module) -> int:
    """Return the bytes of a module's parameters and buffers."""
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


@torch.no_grad()
def lay_out_weights(module: nn.Module) -> None:
    """Lay the weights out in memory as the kernels that read them like it; keep shapes and values.

    Convolutions: channels last. Linear maps in fp32 on a CPU: by columns, because MKL takes 1.2 to
    2.4 times as long for a product of a few dozen rows with a transposed matrix as with a plain
    one (docs/log.md).
    """
    for part in module.modules():
        for name, weight in part.named_parameters(recurse=False):
            is_weight = name == "weight" and isinstance(part, nn.Linear | Pointwise)
            linear = name == "in_proj_weight" or is_weight
            if linear and weight.dtype == torch.float32 and weight.device.type == "cpu":
                weight.data = weight.data.transpose(0, 1).contiguous().transpose(0, 1)
            elif isinstance(part, nn.Conv2d | nn.ConvTranspose2d) and name == "weight":
                weight.data = weight.data.contiguous(memory_format=torch.channels_last)


def _fuse(network: Denoiser | Prior, kernels: Kernels) -> None:
    weight = next(network.parameters())
    if not use_triton(kernels, weight.device, weight.dtype, network.config):
        return
    if isinstance(network, Denoiser):
        network.fuse()
        return
    from model.kernels.triton.prior_block import ROWS, prior_block

    network.fuse(prior_block, ROWS)


def use_triton(
    kernels: Kernels, device: torch.device, dtype: torch.dtype, config: DenoiserConfig | PriorConfig
) -> bool:
    """Return whether Triton's kernels compute a network.

    auto: on CUDA, if Triton is installed and its kernels pass their trial. triton: everywhere; on a
    CPU by its interpreter, or failing.
    """
    if kernels == "auto":
        return (
            device.type == "cuda"
            and find_spec("triton") is not None
            and _pass_trial(device, dtype, config)
        )
    return kernels == "triton"


def _pass_trial(
    device: torch.device, dtype: torch.dtype, config: DenoiserConfig | PriorConfig
) -> bool:
    """Return whether the kernels agree with their plain twins on this device.

    A device or a Triton version that a kernel does not suit must neither keep a server from
    starting nor change its images.
    """
    try:
        from model.kernels.triton.trial import disagreeing

        wrong = disagreeing(device, dtype, config)
    except Exception:  # compilers raise errors of many kinds
        log.warning("Triton kernels failed, torch computes instead: %s", config, exc_info=True)
        return False
    if wrong:
        log.warning("Triton kernels disagree, torch computes instead: %s", ", ".join(wrong))
    return not wrong
