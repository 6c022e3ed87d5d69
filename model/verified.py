"""Which large files of a bundle were found to be the listed ones, so that a server that starts again need not hash gigabytes.

A file counts as the one that was hashed while its size, its place on the disk and both its times are the same; none of them can stay when
somebody writes to it or copies it. An import knows what it wrote and remembers that too. Bit rot is found by `paellera weights verify`,
which hashes everything.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from pathlib import Path

from model.config import FileEntry

RECORD = ".verified.json"
# Below, hashing costs less than a tenth of a second, and nothing is remembered.
LARGE = 64 * 2**20

_writing = threading.Lock()  # files are hashed side by side


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
    if _read(path.parent).get(path.name) == _state(path, entry):
        return True
    if not is_hashed(path, entry):
        return False
    remember(path, entry)
    return True


def remember(path: Path, entry: FileEntry) -> None:
    """That a file's content is the listed one, if it is large."""
    if path.stat().st_size < LARGE:
        return
    # A bundle that cannot be written to is hashed every time.
    with _writing, contextlib.suppress(OSError):
        (path.parent / RECORD).write_text(json.dumps({**_read(path.parent), path.name: _state(path, entry)}))


def _state(path: Path, entry: FileEntry) -> dict[str, object]:
    own = path.stat()
    return {"sha256": entry.sha256, "file": [own.st_dev, own.st_ino, own.st_size, own.st_mtime_ns, own.st_ctime_ns]}


def _read(directory: Path) -> dict[str, object]:
    try:
        record = json.loads((directory / RECORD).read_bytes())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}
