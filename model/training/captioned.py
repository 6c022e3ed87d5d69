"""List captioned images: a folder of files, or webdataset shards. No image is opened here.

A folder holds `name.png` (.jpg, .jpeg, .webp) with `name.txt` beside it, at any depth; a
`metadata.jsonl` with `file_name` and `text` may hold the captions instead. Links to folders are
followed, and every folder is read once. Shards are tar files of such pairs, named by a path with
braces: `shards-{000..009}.tar`.

Several processes share a collection: each has its own files or shards, so that no two processes
read the same image.
"""

from __future__ import annotations

import codecs
import hashlib
import os
import random
import tarfile
import unicodedata
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from pydantic import BaseModel

from model.training.decoding import Unusable
from model.training.processes import rank, world

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
# Counted, so that nobody wonders where they are.
_OTHER_SUFFIXES = (
    *(".avif", ".bmp", ".gif", ".heic", ".heif", ".jfif", ".jp2", ".jpe", ".jxl", ".svg"),
    *(".tif", ".tiff"),
)
_UNSUPPORTED = "format not supported"
_METADATA = "metadata.jsonl"

T = TypeVar("T")

# Samples of a shard lie in the order in which they were written; this many are held to mix them.
_SHUFFLED = 1000


class DataError(ValueError):
    """A collection that cannot be trained on; the message says why."""


@dataclass(frozen=True, slots=True)
class Record:
    """An image and its caption, each a file or the contents of a file.

    caption: None if there is none.
    """

    image: Path | bytes
    caption: Path | bytes | str | None


class _Line(BaseModel):
    """One line of a metadata.jsonl; other fields are ignored."""

    file_name: str
    text: str


class Collection(Protocol):
    """Captioned images in an order that follows from the seed and the number of the epoch."""

    name: str
    identity: str  # differs for another collection, or for other images in it

    def epoch(self, number: int) -> Iterator[Record | Unusable]:
        """Yield this process's records, each once; Unusable for an unreadable one."""


def open_collection(where: str, seed: int) -> Collection:
    """Return the collection at `where`: a folder, or a pattern of shards.

    Raises DataError if it is neither, or holds fewer items than there are processes.
    """
    if not where.strip():
        raise DataError("the name of the data is empty: name a folder, or shards")
    path = Path(os.path.expanduser(where))
    if path.is_dir():
        return Folder(path, seed)
    if path.is_file() and ".tar" not in path.suffixes and not tarfile.is_tarfile(path):
        raise DataError(f"{where} is a file: name the folder that it is in")
    if ":" not in where and not path.exists() and any(sign in where for sign in "*?["):
        raise DataError(f"{where}: patterns use braces, such as shards-{{000..009}}.tar")
    return Shards(where, seed)


class Folder:
    """The images in a directory and below it."""

    def __init__(self, directory: Path, seed: int) -> None:
        listed = sorted(_listed(directory).items())
        if not listed:
            raise DataError(f"{directory}: no {', '.join(_SUFFIXES)} in it or below it")
        self.name, self.seed = str(directory), seed
        self.identity = _identity([name for name, _ in listed])
        self.records = _share(directory, [record for _, record in listed], "images")

    def epoch(self, number: int) -> Iterator[Record | Unusable]:
        """Yield this process's records; see `Collection.epoch`."""
        for i in np.random.default_rng([self.seed, number]).permutation(len(self.records)):
            yield self.records[i]


class Shards:
    """Tar files as webdataset writes them.

    The parts of a sample follow each other and share their name up to the first dot.
    """

    def __init__(self, pattern: str, seed: int) -> None:
        from webdataset.shardlists import expand_urls  # type: ignore[import-untyped]

        # os.path's function, because a Path would make one slash of a URL's two.
        urls = [os.path.expanduser(url) for url in expand_urls(pattern)]
        # A URL with a scheme (http:, pipe:) is opened later, when it is read.
        if absent := [url for url in urls if ":" not in url and not Path(url).is_file()]:
            raise DataError(
                f"{absent[0]}: no such folder and no such shard"
                + (f", nor {len(absent) - 1} more" if absent[1:] else "")
            )
        self.name, self.seed = pattern, seed
        self.identity = _identity(urls)
        self.urls = _share(pattern, urls, "shards")

    def epoch(self, number: int) -> Iterator[Record | Unusable]:
        """Yield this process's records, mixed; see `Collection.epoch`."""
        from webdataset.filters import shuffle  # type: ignore[import-untyped]

        order = np.random.default_rng([self.seed, number]).permutation(len(self.urls))
        samples = (sample for i in order for sample in _samples(self.urls[i]))
        yield from shuffle(_SHUFFLED, rng=random.Random(f"{self.seed} {number}"))(samples)


def _identity(names: Iterable[str]) -> str:
    return hashlib.sha256(
        "\n".join([str(world()), *names]).encode(errors="surrogateescape")
    ).hexdigest()


def _share(where: Path | str, items: Sequence[T], what: str) -> Sequence[T]:
    if len(items) < world():
        raise DataError(f"{where}: {len(items)} {what} for {world()} processes")
    return items[rank() :: world()]


def _listed(directory: Path) -> dict[str, Record | Unusable]:
    """Return every image, and every entry of the metadata, by path relative to the directory."""
    files, found = _below(directory)
    # `.txt` comes after `.TXT`, and the later one counts.
    texts = {_key(path.with_suffix("")): path for path in files if path.suffix.lower() == ".txt"}
    by_key = {_key(path): path for path in files}
    described = {
        path if path in files else by_key.get(_key(path), path): caption
        for file in files
        if file.name == _METADATA
        for path, caption in _described(file)
    }
    for path in files:
        if path.suffix.lower() in _SUFFIXES:
            caption = described.get(path)
            beside = texts.get(_key(path.with_suffix("")))
            found[path] = Record(path, caption if isinstance(caption, str) else beside)
        elif path.suffix.lower() in _OTHER_SUFFIXES:
            found[path] = Unusable(_UNSUPPORTED)
    for path, caption in described.items():
        if path not in found:
            found[path] = (
                caption
                if isinstance(caption, Unusable)
                else Unusable("not an image" if path in files else "no such file")
            )
    return {os.path.relpath(path, directory): record for path, record in found.items()}


def _below(directory: Path) -> tuple[dict[Path, None], dict[Path, Record | Unusable]]:
    """Return the files in a directory and below it, in order, and the folders that are unreadable.

    Every folder is read once, by its own name rather than by that of a link to it.
    """
    files: list[Path] = []
    unreadable: dict[Path, Record | Unusable] = {}
    seen, waiting = set[tuple[int, int]](), deque([directory])
    while waiting:
        folder = waiting.popleft()
        try:
            own = folder.stat()
            if (own.st_dev, own.st_ino) in seen:
                continue
            seen.add((own.st_dev, own.st_ino))
            with os.scandir(folder) as entries:
                for entry in sorted(entries, key=lambda entry: entry.name):
                    if not entry.is_dir():
                        files.append(Path(entry))
                    elif entry.is_symlink():
                        waiting.append(Path(entry))
                    else:
                        waiting.appendleft(Path(entry))
        except OSError:
            unreadable[folder] = Unusable("unreadable folder")
    return dict.fromkeys(sorted(files)), unreadable


def _key(path: Path) -> str:
    """Return the same text for paths that are written differently: macOS decomposes letters."""
    return unicodedata.normalize("NFC", os.path.normpath(str(path).replace("\\", "/")))


def _described(metadata: Path) -> Iterator[tuple[Path, str | Unusable]]:
    """Yield (image, caption) for every line; for an invalid line its place, and Unusable."""
    content = metadata.read_bytes().removeprefix(codecs.BOM_UTF8)
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = _Line.model_validate_json(line)
            yield metadata.parent / entry.file_name, entry.text
        except ValueError:
            yield (
                metadata.with_name(f"{metadata.name}:{number}"),
                Unusable("metadata not understood"),
            )


def _samples(url: str) -> Iterator[Record | Unusable]:
    """Yield the samples of one shard, up to the place where it is damaged."""
    from webdataset import gopen  # type: ignore[import-untyped]
    from webdataset.tariterators import group_by_keys, tar_file_expander  # type: ignore[import-untyped]

    errors: list[Exception] = []

    def noted(error: Exception) -> bool:
        errors.append(error)
        return True  # webdataset's word for going on, if it can

    try:
        with gopen(url) as stream:
            files = tar_file_expander([{"url": url, "stream": stream}], handler=noted)
            # If a name comes twice in a sample, the first counts.
            for sample in group_by_keys(files, handler=lambda error: True):
                yield _record(sample)
    except Exception as error:  # any error of a disk, a pipe or a network
        noted(error)
    if errors:
        yield Unusable("damaged shard")


def _record(sample: dict[str, Any]) -> Record | Unusable:
    image = next((sample[suffix[1:]] for suffix in _SUFFIXES if suffix[1:] in sample), None)
    if image is not None:
        return Record(image, sample.get("txt"))
    other = any(suffix[1:] in sample for suffix in _OTHER_SUFFIXES)
    return Unusable(_UNSUPPORTED if other else "no image")
