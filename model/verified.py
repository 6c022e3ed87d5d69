"""Which large files of a bundle were found to be the listed ones, so that a server that starts again need not hash gigabytes.

A file counts as the one that was hashed while its size, its place on the disk and both its times are the same; none of them can stay when
somebody writes to it or copies it. Bit rot is found by `paellera weights verify`, which hashes everything.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path

from model.config import FileEntry

RECORD = ".verified.json"
# Below, hashing costs less than a tenth of a second, and nothing is remembered.
LARGE = 64 * 2**20


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_hashed(path: Path, entry: FileEntry) -> bool:
    """Whether the file's content is the listed one."""
    return sha256(path) == entry.sha256


def is_listed(path: Path, entry: FileEntry) -> bool:
    """The same, but a large file need not be hashed again that was since it was written last."""
    if path.stat().st_size < LARGE:
        return is_hashed(path, entry)
    record = _read(path.parent)
    state = {"sha256": entry.sha256, "file": _identity(path)}
    if record.get(path.name) == state:
        return True
    if not is_hashed(path, entry):
        return False
    # A bundle that cannot be written to is hashed every time.
    with contextlib.suppress(OSError):
        (path.parent / RECORD).write_text(json.dumps({**record, path.name: state}))
    return True


def _identity(path: Path) -> list[int]:
    state = path.stat()
    return [state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns]


def _read(directory: Path) -> dict[str, object]:
    try:
        record = json.loads((directory / RECORD).read_bytes())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}
