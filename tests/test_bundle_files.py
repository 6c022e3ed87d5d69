"""A large file is hashed once, and again whenever it may have changed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from model import bundle_files
from model.bundle_files import RECORD, is_listed, remember
from model.config import FileEntry


@pytest.fixture
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(bundle_files, "LARGE", 4)
    path = tmp_path / "bundle" / "denoiser.safetensors"
    path.parent.mkdir()
    path.write_bytes(b"weights")
    return path


def entry_of(path: Path) -> FileEntry:
    """As an importer lists it, hashed apart from the code under test."""
    content = path.read_bytes()
    return FileEntry(sha256=hashlib.sha256(content).hexdigest(), bytes=len(content))


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were hashed since."""
    paths: list[Path] = []
    original = bundle_files.sha256
    monkeypatch.setattr(bundle_files, "sha256", lambda path: paths.append(path) or original(path))
    return paths


def test_a_large_file_is_hashed_once(large, hashed):
    entry = entry_of(large)
    assert is_listed(large, entry)
    assert is_listed(large, entry)
    assert hashed == [large]


def test_what_is_remembered_is_not_hashed(large, hashed):
    entry = entry_of(large)
    remember(large, entry)
    assert is_listed(large, entry)
    assert hashed == []


def test_files_that_are_hashed_side_by_side_are_all_remembered(large, hashed):
    files = [large.with_name(f"{i}.safetensors") for i in range(16)]
    for path in files:
        path.write_bytes(path.name.encode())
    entries = [entry_of(path) for path in files]
    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(is_listed, files, entries))
    assert all(map(is_listed, files, entries))
    assert len(hashed) == len(files)


def test_a_small_one_is_hashed_every_time_and_nothing_is_written(large, hashed, monkeypatch):
    monkeypatch.setattr(bundle_files, "LARGE", 100)
    entry = entry_of(large)
    assert is_listed(large, entry)
    assert is_listed(large, entry)
    assert hashed == [large, large]
    assert not (large.parent / RECORD).exists()


def test_another_content_of_the_same_size_and_time_is_noticed(large):
    entry, state = entry_of(large), large.stat()
    assert is_listed(large, entry)
    large.write_bytes(b"WEIGHTS")
    os.utime(large, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert not is_listed(large, entry)


def test_a_file_that_changes_while_it_is_hashed_is_not_taken_for_verified(large, monkeypatch):
    entry, original = entry_of(large), bundle_files.sha256

    def replaced(path: Path) -> str:
        digest = original(path)
        path.write_bytes(b"something else")
        return digest

    monkeypatch.setattr(bundle_files, "sha256", replaced)
    assert is_listed(large, entry), "the content that was hashed is the listed one"
    monkeypatch.setattr(bundle_files, "sha256", original)
    assert not is_listed(large, entry)


def test_another_entry_is_noticed(large, tmp_path):
    assert is_listed(large, entry_of(large))
    (tmp_path / "other").write_bytes(b"WEIGHTS")
    assert not is_listed(large, entry_of(tmp_path / "other"))


def test_a_copy_is_hashed_though_the_record_came_with_it(large, hashed):
    entry = entry_of(large)
    assert is_listed(large, entry)
    copy = Path(shutil.copytree(large.parent, large.parent.with_name("copy"))) / large.name
    assert is_listed(copy, entry)
    assert hashed == [large, copy]


@pytest.mark.parametrize(
    "record", [b"", b"[]", b"{", json.dumps({"denoiser.safetensors": True}).encode()]
)
def test_a_damaged_record_is_none(large, hashed, record):
    (large.parent / RECORD).write_bytes(record)
    assert is_listed(large, entry_of(large))
    assert hashed == [large]


def test_a_bundle_that_cannot_be_written_to_is_hashed_every_time(large, hashed, monkeypatch):
    def refused(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(Path, "write_text", refused)
    entry = entry_of(large)
    assert is_listed(large, entry)
    assert is_listed(large, entry)
    assert len(hashed) == 2
