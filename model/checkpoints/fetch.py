"""Fetch a published file into the hub's cache and check it: `paellera weights fetch NAME`.

`huggingface_hub` does the transfer: what its environment says (HF_ENDPOINT, HF_HOME,
HF_HUB_OFFLINE, HF_TOKEN) holds here too. A connection that breaks is resumed where it broke; what
cannot be finished leaves nothing behind. No torch here.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import NamedTemporaryFile

from model.checkpoints.manifest import PublishedFile

RECORD = "paellera-checksums.json"

_LFS_ETAG = re.compile(r"[0-9a-f]{64}")  # the hub's ETag of a large file is its sha256


class FetchError(OSError):
    """A file could not be fetched; the message names it and the reason, in one line."""


def fetch(file: PublishedFile) -> Path:
    """Return a file's path, downloaded if it is absent, with its size and checksum verified.

    Raises FetchError.

    Commit and checksum are the manifest's, else those recorded at the first fetch, else (and then
    they are recorded) those that the hub states. The size is the manifest's.
    """
    repository = _repository(file)
    from huggingface_hub import hf_hub_download

    revision = revision_of(file)
    with _one_line(file):
        plan = hf_hub_download(repository, file.path, revision=revision, dry_run=True)
        if plan.will_download:
            if plan.file_size and not file.has_size(plan.file_size):
                raise FetchError(_wrong_size(file, plan.file_size))
            _check_space(file, plan.file_size or file.bytes, Path(plan.local_path))
        # The very commit that was asked about, should the revision move meanwhile.
        revision = plan.commit_hash or revision
        path = Path(hf_hub_download(repository, file.path, revision=revision))
    _check_content(file, path, revision)
    return path


def revision_of(file: PublishedFile) -> str:
    """Return the manifest's commit, else that of the first fetch, else `main`."""
    if file.pinned:
        return file.revision
    return _read_record().get(_commit_key(file), file.revision)


def fetched(file: PublishedFile) -> Path:
    """Return the path of a file that was fetched before, without network access.

    Raises FetchError.
    """
    repository = _repository(file)
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(repository, file.path, revision=revision_of(file))
    if not isinstance(path, str):
        raise FetchError(
            f"{file.where} is not here yet: `paellera weights fetch {file.where}` gets it"
        )
    return Path(path)


def _repository(file: PublishedFile) -> str:
    if file.repository is None:
        raise FetchError(f"{file.path} is not on the hub; it is among {file.source}")
    return file.repository


@contextmanager
def _one_line(file: PublishedFile) -> Iterator[None]:
    """Turn every error inside the context into a FetchError of one line.

    `huggingface_hub` passes its HTTP library's errors on, and the library depends on its version:
    hence `Exception`.
    """
    try:
        yield
    except FetchError:
        raise
    except Exception as error:
        raise FetchError(f"{file.where}: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    """Return the cause in words.

    The hub's error for a file that is neither reachable nor cached has its cause in `__cause__`.
    """
    from huggingface_hub.errors import (
        EntryNotFoundError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
    )

    if isinstance(error, LocalEntryNotFoundError) and error.__cause__ is not None:
        return _reason(error.__cause__)
    if isinstance(error, OfflineModeIsEnabled | LocalEntryNotFoundError):
        return "it is not in the cache, and the hub may not be asked (HF_HUB_OFFLINE)"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, EntryNotFoundError):
        status = 404
    if status is not None:
        return _status_reason(status)
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return f"the download did not finish: {lines[0]}"


def _status_reason(status: int) -> str:
    """Return the meaning of the hub's HTTP status, in words."""
    if status in {401, 403}:
        remedy = "log in with `hf auth login`, or accept the repository's terms on its page"
        return f"the hub denies access ({status}): {remedy}"
    if status == 404:
        return "the hub has no such file or repository (404)"
    if status == 429:
        return "the hub limits the request rate (429, too many requests): try again later"
    return f"the hub answered {status}"


def _check_space(file: PublishedFile, size: int, target: Path) -> None:
    """Check that the disk has room for a file of `size` bytes. Raises FetchError otherwise.

    target: the path of the future file.
    """
    directory = next(parent for parent in target.parents if parent.exists())
    free = shutil.disk_usage(directory).free
    if free < size:
        raise FetchError(
            f"{file.where} has {size:,} bytes, but only {free:,} are free in {directory}"
        )


def _wrong_size(file: PublishedFile, found: int) -> str:
    return f"{file.where} has {found:,} bytes, and {file.bytes:,} were published"


def _commit_key(file: PublishedFile) -> str:
    return f"{file.where}@{file.revision}"


def _check_content(file: PublishedFile, path: Path, commit: str) -> None:
    """Compare a file's content with its size and checksum; record checksum and commit.

    Removes the file from the cache and raises FetchError if they differ.
    """
    if not file.has_size(size := path.stat().st_size):
        path.resolve().unlink()
        path.unlink(missing_ok=True)
        raise FetchError(f"{_wrong_size(file, size)}; it was removed")
    with path.open("rb") as content:
        found = hashlib.file_digest(content, "sha256").hexdigest()
    stored = path.resolve()
    record = _read_record()
    stated = stored.name if _LFS_ETAG.fullmatch(stored.name) else None
    expected = file.sha256 or record.get(file.where) or stated or found
    if found != expected:
        path.unlink()
        stored.unlink(missing_ok=True)
        raise FetchError(f"{file.where} has sha256 {found}, not {expected}; it was removed")
    known = {file.where: found} | ({} if file.pinned else {_commit_key(file): commit})
    if not known.items() <= record.items():
        _write_record({**record, **known})


def _record_path() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).parent / RECORD


def _read_record() -> dict[str, str]:
    path = _record_path()
    try:
        return dict(json.loads(path.read_bytes()))
    except FileNotFoundError:
        return {}
    except ValueError:
        raise FetchError(
            f"{path} is damaged; without it no checksum is known: repair or remove it"
        ) from None


def _write_record(record: dict[str, str]) -> None:
    path = _record_path()
    with NamedTemporaryFile("w", dir=path.parent, prefix=f"{path.name}.", delete=False) as partial:
        partial.write(json.dumps(record, indent=2, sort_keys=True) + "\n")
    os.replace(partial.name, path)
