"""Write a run's networks as parts of at most 15 MiB, and join the parts into a bundle.

A run that is killed leaves parts that are complete, so that its networks are not lost. A part is a
piece of one safetensors file: tensors named `network:parameter` in fp16, and CLIP's merges as bytes
named `file:NAME`.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from safetensors.torch import load, save
from torch import Tensor

from model.bundle import build, save_bundle
from model.training import checkpoint
from model.training.assemble import SOURCES, load_network, print_files, tiny_config

_PART = 15 * 2**20  # bytes
_STATE = "state.safetensors"


def collected(scratch: Path) -> dict[str, Tensor]:
    """Return the weights of every network that `scratch` has, in fp16, and CLIP's merges as bytes.

    A network's final weights are in `NAME.net`; before that, its checkpoint's average counts.
    """
    tensors: dict[str, Tensor] = {}
    for network, (name, prefix) in SOURCES.items():
        if (scratch / f"{network}.net").exists():
            state = torch.load(scratch / f"{network}.net", map_location="cpu")
        elif (scratch / f"{name}.pt").exists():
            state = checkpoint.averaged(checkpoint.load(scratch / f"{name}.pt"), prefix)
        else:
            continue
        tensors |= {
            f"{network}:{key}": t.half() if t.is_floating_point() else t for key, t in state.items()
        }
    if (scratch / "vqgan.pt").exists():  # the codebook's training continues from these
        codes = checkpoint.averaged(checkpoint.load(scratch / "vqgan.pt"), "codes.")
        tensors |= {f"codes:{key}": t.float() for key, t in codes.items()}
    for merges in scratch.glob("*.txt.gz"):
        tensors[f"file:{merges.name}"] = torch.frombuffer(
            bytearray(merges.read_bytes()), dtype=torch.uint8
        )
    return tensors


def write_parts(out: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors to `out` as parts."""
    content = save({name: t.detach().cpu().contiguous() for name, t in tensors.items()})
    for number, start in enumerate(range(0, len(content), _PART)):
        checkpoint.write(out / f"{_STATE}.{number}", content[start : start + _PART])


def read_parts(out: Path) -> dict[str, Tensor]:
    """Return the tensors of the parts in `out`. Raises FileNotFoundError without parts."""
    parts = [path for path in out.glob(f"{_STATE}.*") if path.suffix[1:].isdigit()]
    if not parts:
        raise FileNotFoundError(f"{out}: no {_STATE}.0 in it")
    parts.sort(key=lambda path: int(path.suffix[1:]))
    return load(b"".join(path.read_bytes() for path in parts))


def state_of(tensors: dict[str, Tensor], network: str) -> dict[str, Tensor]:
    """Return a network's weights in fp32 under their published names; empty if there are none."""
    own = {key.partition(":")[2]: t for key, t in tensors.items() if key.startswith(f"{network}:")}
    return {key: t.float() if t.is_floating_point() else t for key, t in own.items()}


def merges_of(tensors: dict[str, Tensor]) -> bytes:
    """Return CLIP's merges as a file's contents."""
    return bytes(next(t for name, t in tensors.items() if name.startswith("file:")).tolist())


def join(out: Path, bundle: Path, dtype: torch.dtype = torch.float16) -> None:
    """Write a bundle from the parts in `out`; a network without weights gets random ones.

    dtype: of the saved weights. Raises FileNotFoundError without parts.
    """
    tensors, config = read_parts(out), tiny_config()
    with tempfile.TemporaryDirectory() as folder:
        merges = Path(folder) / str(config.clip.merges)
        merges.write_bytes(merges_of(tensors))
        built = build(config, merges.parent, "cpu")
        for name, _ in built.networks():
            if state := state_of(tensors, name):
                load_network(built, name, state)
        print_files(save_bundle(built, bundle, dtype, merges))
