"""Whether a network is computed by Triton's kernels or by torch's: the one place that decides, asked when a bundle is loaded."""

from __future__ import annotations

import logging
from importlib.util import find_spec

import torch

from model.config import DenoiserConfig, Kernels, PriorConfig

log = logging.getLogger(__name__)


def fused(kernels: Kernels, device: torch.device, dtype: torch.dtype, config: DenoiserConfig | PriorConfig) -> bool:
    """auto: on CUDA, if Triton is there and its kernels agree with their twins. triton: everywhere; on a CPU interpreted, or failing."""
    if kernels == "auto":
        return device.type == "cuda" and find_spec("triton") is not None and _agree(device, dtype, config)
    return kernels == "triton"


def _agree(device: torch.device, dtype: torch.dtype, config: DenoiserConfig | PriorConfig) -> bool:
    """A device or a version of Triton that a kernel does not suit must not keep a server from starting, nor spoil its pictures."""
    try:
        from model.kernels.fused.trial import disagreeing

        wrong = disagreeing(device, dtype, config)
    except Exception:  # a compiler's errors are of many kinds
        log.warning("Triton's kernels do not run here, torch computes instead: %s", config, exc_info=True)
        return False
    if wrong:
        log.warning("Triton's kernels are wrong here, torch computes instead: %s", ", ".join(wrong))
    return not wrong
