"""Check and read a bundle's files: they are the listed ones, and their tensors are finite.

A large file is hashed once: it counts as the hashed one while its size, its place on the disk and
both its times are the same. `paellera weights verify` hashes everything. Nothing here reads a
pickle.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import struct
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from model.config import CONFIG_FILE, BundleConfig, FileEntry

RECORD = ".verified.json"
# Below, hashing costs less than a tenth of a second, and nothing is remembered.
LARGE = 64 * 2**20

_writing = threading.Lock()  # files are hashed side by side


class BundleError(ValueError):
    """A bundle that must not be served; the message says which file and which tensor, and why."""


def file_entry(path: Path) -> FileEntry:
    """Return a file's entry in `bundle.json`."""
    return FileEntry(sha256=sha256(path), bytes=path.stat().st_size)


def sha256(path: Path) -> str:
    """Return a file's hash, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_hashed(path: Path, entry: FileEntry) -> bool:
    """Return whether the file's content is the listed one."""
    return sha256(path) == entry.sha256


def verify_files(
    directory: Path, config: BundleConfig, same: Callable[[Path, FileEntry], bool] = is_hashed
) -> None:
    """Check that every needed file is listed, and that every listed file is the listed one.

    Raises BundleError. same: compares a file of the right size. A listed file lies in the directory
    itself: neither its name nor a symbolic link may lead out of it.
    """
    needed = [f"{name}.safetensors" for name in config.network_names] + (
        [config.clip.merges] if config.clip.merges else []
    )
    if absent := [name for name in needed if name not in config.files]:
        raise BundleError(f"{CONFIG_FILE} does not list {', '.join(absent)}")
    for name, entry in config.files.items():
        _check_place(directory, name, entry.bytes)
    # Side by side: hashing lets go of the interpreter's lock, and gigabytes take longer to hash
    # than to read.
    with ThreadPoolExecutor() as threads:
        results = threads.map(lambda name: same(directory / name, config.files[name]), config.files)
        if changed := [
            name for name, is_same in zip(config.files, results, strict=True) if not is_same
        ]:
            raise BundleError(f"{', '.join(changed)}: not what was listed, the sha256 differs")


def _check_place(directory: Path, name: str, expected: int) -> None:
    """Check that a listed file lies in the directory itself and has the expected size.

    Raises BundleError otherwise.
    """
    path = directory / name
    if Path(name).name != name or name in {"", ".."} or "\\" in name:
        raise BundleError(f"{CONFIG_FILE} lists {name!r}, which is no plain file name")
    if path.resolve().parent != directory.resolve():
        raise BundleError(f"{name} is a symbolic link out of the bundle")
    if not path.is_file():
        raise BundleError(f"{name} is listed but is not there")
    found = path.stat().st_size
    if found != expected:
        cut = f"; {_cut_tensor(path)}" if name.endswith(".safetensors") and found < expected else ""
        raise BundleError(f"{name} has {found} bytes, {CONFIG_FILE} says {expected}{cut}")


def is_listed(path: Path, entry: FileEntry) -> bool:
    """Return as `is_hashed`, but hash a large file only if it may have changed since."""
    if path.stat().st_size < LARGE:
        return is_hashed(path, entry)
    # Before the file is read: a file that changes meanwhile must not count as verified.
    state = _state(path, entry)
    if _read_record(path.parent).get(path.name) == state:
        return True
    if not is_hashed(path, entry):
        return False
    _write_record(path, state)
    return True


def remember(path: Path, entry: FileEntry) -> None:
    """Record that the present content of a file is the listed one, if it is large."""
    if path.stat().st_size >= LARGE:
        _write_record(path, _state(path, entry))


def _write_record(path: Path, state: dict[str, object]) -> None:
    # A bundle that cannot be written to is hashed every time.
    with _writing, contextlib.suppress(OSError):
        record = {**_read_record(path.parent), path.name: state}
        (path.parent / RECORD).write_text(json.dumps(record))


def _state(path: Path, entry: FileEntry) -> dict[str, object]:
    stat = path.stat()
    return {
        "sha256": entry.sha256,
        "file": [stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns],
    }


def _read_record(directory: Path) -> dict[str, object]:
    try:
        record = json.loads((directory / RECORD).read_bytes())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def read_tensors(path: Path, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Return a safetensors file's tensors by name.

    Raises BundleError for another format, and for NaN or infinity.
    """
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dict
    except SafetensorError as error:
        raise BundleError(
            f"{path.name} is not a readable safetensors file ({error}); {_cut_tensor(path)}"
        ) from None
    for name, tensor in tensors.items():
        if not is_finite(tensor):
            raise BundleError(f"{path.name}: tensor {name!r} holds NaN or infinity")
    return tensors


def is_finite(tensor: Tensor) -> bool:
    """Return whether no value is NaN or infinite.

    The extremes tell as much as all values, in a hundredth of the time (docs/log.md).
    """
    if tensor.numel() == 0 or not tensor.is_floating_point():
        return True
    return bool(torch.stack(torch.aminmax(tensor)).isfinite().all())


def _cut_tensor(path: Path) -> str:
    """Name the tensor that a truncated safetensors file ends in."""
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        try:
            header = json.loads(file.read(length))
        except ValueError:
            return "it ends within its header"
    end = path.stat().st_size - 8 - length
    cut = [
        (entry["data_offsets"][0], name)
        for name, entry in header.items()
        if name != "__metadata__" and entry["data_offsets"][1] > end
    ]
    return f"the first incomplete tensor is {min(cut)[1]!r}" if cut else "no tensor is incomplete"
