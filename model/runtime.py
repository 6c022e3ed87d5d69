"""Set up a process before it computes: worker, command line and trainers call this first.

Nothing here runs at import.
"""

from __future__ import annotations

import ctypes
import sys

import torch

_libraries: list[torch.library.Library] = []


def declare_missing_torchvision_operators() -> None:
    """Let open_clip and transformers be imported beside a CPU build of torch.

    PyPI's torchvision is built for CUDA; next to a CPU build of torch its extension does not load,
    and its import then dies with "operator torchvision::nms does not exist", because it registers a
    fake kernel for an operator that nobody declared. Nothing here calls those two operators, so
    declaring their schemas is the whole cure. Where the extension loads, it declares them itself.
    """
    if _libraries or "torchvision" in sys.modules or torch.version.cuda is not None:
        return
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _libraries.append(library)  # a library's operators go when it is collected


def keep_freed_memory() -> None:
    """Let glibc's malloc keep freed memory instead of returning it to the kernel.

    PyTorch has no caching allocator on the CPU: each large tensor would be a fresh mmap, whose
    pages fault in again. Only glibc is affected; a preloaded tcmalloc or jemalloc has a cache.
    """
    m_trim_threshold, m_mmap_threshold = -1, -3
    largest_mmap_threshold = 32 << 20
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(m_mmap_threshold, largest_mmap_threshold)
        mallopt(m_trim_threshold, (1 << 31) - 1)


def prepare(threads: int = 0) -> None:
    """Declare missing operators, keep freed memory, and set the number of threads.

    threads: CPU threads for tensor operations; 0 keeps torch's choice.
    """
    declare_missing_torchvision_operators()
    keep_freed_memory()
    if threads:
        torch.set_num_threads(threads)


def pick_device(name: str = "auto") -> torch.device:
    """Return the device of this name; "auto" is CUDA if there is one, else the CPU.

    Raises ValueError for an unknown or absent one.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda", "mps"):
        raise ValueError(f"device {name!r} is none of auto, cpu, cuda, cuda:1 and mps")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        present = torch.cuda.device_count()
        raise ValueError(f"device {name!r} is not there: this machine has {present} CUDA devices")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError(f"device {name!r} is not there: this machine has no MPS device")
    return device


def use(device: torch.device) -> torch.device:
    """Make the device the current one, on which graphs are captured and kernels run; return it."""
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the type of this name; "auto" is what the device multiplies fastest.

    That is fp16 on CUDA, bf16 on a CPU with AMX or AVX512-BF16, else fp32. Raises ValueError for
    an unknown one.
    """
    named = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    if name != "auto":
        if name not in named:
            raise ValueError(f"number type {name!r} is none of auto, {', '.join(named)}")
        return named[name]
    if device.type == "cuda":
        return torch.float16
    # A private function, and no worse without it than fp32.
    has_bf16 = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    return torch.bfloat16 if has_bf16 else torch.float32
