"""Read a published checkpoint, pickle or safetensors, whole or in shards, tensor by tensor.

Pickles are mapped into memory and unpickled with `weights_only=True`: nothing in them runs. A file
takes no more memory than it has bytes: what `torch.save` writes is not compressed, and what is
compressed is refused.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from model.bundle_files import BundleError

# Where training checkpoints keep the weights, the averaged ones first: those are what one samples
# with.
_NESTED = (
    "ema_state_dict",
    "state_dict_ema",
    "params_ema",
    "ema",
    "state_dict",
    "model_state_dict",
    "model",
    "params",
    "weights",
)
_WRAPPERS = (
    "module.",
    "_orig_mod.",
)  # what DistributedDataParallel and torch.compile put before every name
# Before the network's names in what our trainers train; what they train beside it is not kept.
_TRAINED = ("denoiser.", "vqgan.", "t5.", "model.")

# State dicts lie at most so deep in a training checkpoint.
MAX_NESTING = 4
MAX_NAME_LENGTH = 512
# Of an index of shards, and of a pickle beside its tensors.
MAX_INDEX_BYTES = 16 * 2**20
MAX_PICKLE_BYTES = 64 * 2**20

# Pages of a mapped file count as the process's memory until it is unmapped: after this many bytes
# it is, and mapped anew.
_BATCH_BYTES = 128 * 2**20


@dataclass(frozen=True)
class Checkpoint:
    """The names and shapes of a checkpoint, and the files that hold the tensors.

    path: as it was given. tensors: on the meta device, by name. files: the file of each tensor.
    """

    path: Path
    tensors: dict[str, Tensor]
    files: dict[str, Path]

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield the named tensors in this order, each valid until the next is yielded.

        Raises BundleError.
        """
        for path, batch in self._batches(names):
            state = read_state(path)
            for name in batch:
                yield name, state.pop(name)

    def _batches(self, names: Iterable[str]) -> Iterator[tuple[Path, list[str]]]:
        batch: list[str] = []
        size = 0
        for name in names:
            if batch and (size >= _BATCH_BYTES or self.files[name] != self.files[batch[0]]):
                yield self.files[batch[0]], batch
                batch, size = [], 0
            batch.append(name)
            size += self.tensors[name].nbytes
        if batch:
            yield self.files[batch[0]], batch


def open_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint's names and shapes.

    path: the file, or a `*.index.json` that names its shards.

    Raises BundleError, FileNotFoundError.
    """
    tensors: dict[str, Tensor] = {}
    files: dict[str, Path] = {}
    for shard in _shards(path):
        for name, tensor in read_state(shard).items():
            tensors[name] = torch.empty_like(tensor, device="meta")
            files[name] = shard
    return Checkpoint(path, tensors, files)


def _shards(path: Path) -> list[Path]:
    """Return the files that an index names, or the file itself."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    if not path.name.endswith(".index.json"):
        return [path]
    if path.stat().st_size > MAX_INDEX_BYTES:
        raise BundleError(f"{path.name} has more than {MAX_INDEX_BYTES} bytes; no index has")
    try:
        names = set(json.loads(path.read_bytes())["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise BundleError(f"{path.name} is no index of shards: it has no weight_map") from None
    if not names or not all(isinstance(name, str) for name in names):
        raise BundleError(f"{path.name}: weight_map must map tensors to file names")
    for name in sorted(names):
        if not name or Path(name).name != name:
            raise BundleError(f"{path.name} names {name!r}, which is no plain file name")
        if not path.with_name(name).is_file():
            raise BundleError(f"{path.name}: shard {name} is missing")
    return [path.with_name(name) for name in sorted(names)]


def read_state(path: Path) -> dict[str, Tensor]:
    """Return one file's tensors under the network's names, mapped where the format allows it.

    Raises BundleError.
    """
    content = read_content(path, mmap=True)
    state = {_plain(name): tensor for name, tensor in _unwrapped(content, path.name).items()}
    state = _network(state)
    for name, tensor in state.items():
        if len(name) > MAX_NAME_LENGTH:
            raise BundleError(f"{path.name}: tensor {name[:40]!r}… has too long a name")
        if tensor.dtype == torch.float64:
            published = "published weights are float32, float16 or bfloat16"
            raise BundleError(f"{path.name}: tensor {name!r} is torch.float64; {published}")
        if tensor.is_quantized or tensor.layout != torch.strided or tensor.is_meta:
            raise BundleError(f"{path.name}: tensor {name!r} is no plain array of numbers")
    return state


def read_content(path: Path, device: torch.device | str = "cpu", *, mmap: bool = False) -> Any:
    """Return all that a file holds, a safetensors file or what `torch.save` wrote.

    mmap: map a pickle's tensors into memory, on the CPU. Raises BundleError, and OSError for a file
    that cannot be read.
    """
    if path.suffix == ".safetensors":
        return _safetensors(path, device)
    return _unpickled(path, device, mmap)


def _safetensors(path: Path, device: torch.device | str) -> dict[str, Tensor]:
    try:
        return load_file(path, str(device))
    except SafetensorError as error:
        raise BundleError(f"{path.name} is not a readable safetensors file ({error})") from None


def _unpickled(path: Path, device: torch.device | str, mmap: bool) -> Any:
    zipped = zipfile.is_zipfile(path)
    if zipped:
        _check_archive(path)
    with path.open("rb") as file:
        if not zipped and file.read(2) == b"PK":
            raise BundleError(f"{path.name} is cut short: the end of its zip archive is missing")
    try:
        return torch.load(path, map_location=device, weights_only=True, mmap=mmap and zipped)
    except OSError:
        raise
    except Exception as error:  # a hostile or damaged pickle can raise whatever it likes
        raise BundleError(f"{path.name} is refused: {_why(error)}") from None


def _check_archive(path: Path) -> None:
    """Check that an archive unpacks to no more bytes than it has. Raises BundleError."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise BundleError(f"{path.name} is no readable zip archive ({error})") from None
    for member in members:
        stored = member.compress_type == zipfile.ZIP_STORED
        if not stored or member.file_size != member.compress_size:
            raise BundleError(
                f"{path.name} is refused: {member.filename[:80]!r} is compressed, and torch.save"
                " compresses nothing"
            )
        if member.filename.endswith(".pkl") and member.file_size > MAX_PICKLE_BYTES:
            raise BundleError(
                f"{path.name} is refused: its pickle has {member.file_size:,} bytes beside the"
                f" tensors, and {MAX_PICKLE_BYTES:,} are allowed"
            )


def _why(error: Exception) -> str:
    text = str(error)
    if wanted := re.search(r"GLOBAL ([\w.]+)", text):
        return f"its pickle asks for {wanted[1]}, and weights need no code"
    return "it is no checkpoint that torch.save wrote, or it is damaged"


def _unwrapped(content: Any, where: str) -> dict[str, Tensor]:
    """Return the state dict from a checkpoint that also holds other things."""
    for _ in range(MAX_NESTING):
        if not isinstance(content, dict):
            raise BundleError(f"{where} holds a {type(content).__name__}, not a state dict")
        if content and all(
            isinstance(value, Tensor) and isinstance(name, str) for name, value in content.items()
        ):
            return content
        nested = next(
            (
                content[key]
                for key in _NESTED
                if isinstance(content.get(key), dict) and content[key]
            ),
            None,
        )
        if nested is None:
            raise BundleError(f"{where}: {_no_weights(content)}")
        content = nested
    raise BundleError(f"{where}: there is no state dict within {MAX_NESTING} dicts")


def _no_weights(content: dict[Any, Any]) -> str:
    if "param_groups" in content:
        return "this is an optimizer's state; there are no weights in it"
    other = next((name for name, value in content.items() if not isinstance(value, Tensor)), None)
    return (
        "there are no tensors in it"
        if other is None
        else f"entry {_key(other)} is no tensor, and there is no state dict in it"
    )


def _key(key: object) -> str:
    """Return a dict's key for a message: others than texts may be large, or contain themselves."""
    return repr(key[:80]) if isinstance(key, str) else f"of type {type(key).__name__}"


def _network(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the network of what a trainer of ours trained, else the state itself."""
    for prefix in _TRAINED:
        own = {
            name.removeprefix(prefix): tensor
            for name, tensor in state.items()
            if name.startswith(prefix)
        }
        if own:
            return own
    return state


def _plain(name: str) -> str:
    while wrapper := next((w for w in _WRAPPERS if name.startswith(w)), None):
        name = name.removeprefix(wrapper)
    return name
