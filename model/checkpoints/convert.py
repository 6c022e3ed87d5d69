"""Convert published checkpoints to a bundle: `paellera weights import paella-v3 DIRECTORY`.

One tensor is in memory at a time, and of a large one a piece; the bundle appears when all of it is
written, or not at all.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import BinaryIO

import torch
from torch import Tensor

from model.bundle import build, check_fit, state_of
from model.bundle_files import BundleError, file_entry, is_finite, remember
from model.checkpoints.checkpoint import Checkpoint, open_checkpoint
from model.config import BundleConfig

# A tensor by which each published network is known, so that a file in the wrong place can be called
# by its name.
_MARKS = {
    "byt5_mapper.weight": "the v3 denoiser",
    "down_blocks.0.0.cond_mapper.weight": "the v1 denoiser",
    "vquantizer.codebook.weight": "the v3 VQGAN",
    "quantize.embed.weight": "the v1 VQGAN",
    "blocks.1.0.weight": "the prior",
    "encoder.block.0.layer.0.SelfAttention.q.weight": "a T5 encoder",
    "visual.conv1.weight": "CLIP",
}

_NAMES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64"}
_PIECE = 4 * 2**20  # elements that are converted at a time


def import_bundle(
    sources: Mapping[str, Path],
    config: BundleConfig,
    directory: Path,
    dtype: torch.dtype,
    merges: Path | None = None,
    progress: Callable[[int], object] = lambda size: None,
) -> BundleConfig:
    """Write a new bundle in half precision; return its configuration.

    sources: every network's checkpoint. dtype: float16 or bfloat16. progress: called with the bytes
    of each piece that was written.

    Raises BundleError naming file and tensor, FileNotFoundError, or OSError for a disk that is too
    small.
    """
    if directory.exists():
        raise BundleError(f"{directory} exists already; an import makes a new directory")
    modules = dict(build(config, None if merges is None else merges.parent).networks())
    plans = {
        name: _fitting(open_checkpoint(sources[name]), name, state_of(modules[name]))
        for name in config.network_names
    }
    directory.parent.mkdir(parents=True, exist_ok=True)
    _check_space(plans.values(), directory)
    with TemporaryDirectory(dir=directory.parent, prefix=f"{directory.name}.") as name:
        partial = Path(name) / "bundle"
        partial.mkdir()
        for network, checkpoint in plans.items():
            _write(partial / f"{network}.safetensors", checkpoint, dtype, progress)
        if merges is not None and config.clip.merges is not None:
            shutil.copyfile(merges, partial / config.clip.merges)
        written = replace(
            config, files={path.name: file_entry(path) for path in sorted(partial.iterdir())}
        )
        written.write(partial)
        partial.rename(directory)
    for file, entry in written.files.items():
        remember(directory / file, entry)
    return written


def _fitting(checkpoint: Checkpoint, network: str, expected: dict[str, Tensor]) -> Checkpoint:
    """Return the checkpoint without tensors that the network does not need.

    Raises BundleError if it is a checkpoint of another network.
    """
    where = checkpoint.path.name
    found = [(mark, title) for mark, title in _MARKS.items() if mark in checkpoint.tensors]
    if found and not any(mark in expected for mark, _ in found):
        mark, title = found[0]
        raise BundleError(
            f"{where} is not this bundle's {network}: tensor {mark!r} says that it is {title}"
        )
    kept = _needed(checkpoint, network, expected)
    check_fit(kept.tensors, expected, where)
    return kept


def _needed(checkpoint: Checkpoint, network: str, expected: dict[str, Tensor]) -> Checkpoint:
    """Return the checkpoint without tensors that were published beside the network.

    These are a T5's decoder and its embedding's second name, and the v1 VQGAN's losses.
    """
    beside = {"byt5": ("decoder.", "lm_head.", "encoder.embed_tokens."), "vqgan": ("loss.",)}.get(
        network, ()
    )
    return replace(
        checkpoint,
        tensors={
            name: t
            for name, t in checkpoint.tensors.items()
            if name in expected or not name.startswith(beside)
        },
    )


def _check_space(plans: Iterable[Checkpoint], directory: Path) -> None:
    needed = sum(2 * tensor.numel() for plan in plans for tensor in plan.tensors.values())
    free = shutil.disk_usage(directory.parent).free
    if free < needed:
        raise OSError(
            f"the bundle needs {needed:,} bytes, but only {free:,} are free in {directory.parent}"
        )


def _write(
    path: Path, checkpoint: Checkpoint, dtype: torch.dtype, progress: Callable[[int], object]
) -> None:
    """Write a safetensors file, tensor by tensor.

    The file holds eight bytes of header length, the header (padded to eight), and the data in its
    order.
    """
    types = {
        name: dtype if tensor.is_floating_point() else torch.int64
        for name, tensor in checkpoint.tensors.items()
    }
    header: dict[str, object] = {}
    end = 0
    for name, tensor in checkpoint.tensors.items():
        start, end = end, end + tensor.numel() * types[name].itemsize
        header[name] = {
            "dtype": _NAMES[types[name]],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, tensor in checkpoint.read(checkpoint.tensors):
            for piece in _pieces(tensor, types[name], f"{checkpoint.path.name}: tensor {name!r}"):
                _append(file, piece)
                progress(piece.nbytes)


def _pieces(tensor: Tensor, dtype: torch.dtype, where: str) -> Iterator[Tensor]:
    """Yield the tensor's elements in order, converted to `dtype`.

    Raises BundleError for an element that is not finite, before or after the conversion.
    """
    for piece in tensor.detach().reshape(-1).split(_PIECE):
        converted = piece.to(dtype)
        if not is_finite(converted):
            if not is_finite(piece):
                raise BundleError(f"{where} holds NaN or infinity")
            largest, narrow = piece.abs().max(), str(dtype).removeprefix("torch.")
            raise BundleError(f"{where} holds {largest:.6g}, which {narrow} cannot; bfloat16 can")
        yield converted


def _append(file: BinaryIO, piece: Tensor) -> None:
    file.write(piece.contiguous().view(torch.uint8).numpy().data)
