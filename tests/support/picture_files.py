"""Pictures with captions as people have them: in folders and shards, good and bad."""

from __future__ import annotations

import io
import tarfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from model.training.captioned import open_collection
from model.training.decoding import Filters
from model.training.image_batches import ImageBatches

RED, WHITE = (200, 30, 40), (255, 255, 255)


def encoded(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def plain(
    colour: tuple[int, ...] = RED, size: tuple[int, int] = (40, 40), mode: str = "RGB"
) -> Image.Image:
    return Image.new(mode, size, colour)


def colours(n: int) -> list[tuple[int, int, int]]:
    """n colours that even a compressed picture tells apart."""
    return [(40 * (i % 6), 40 * (i // 6 % 6), 40 * (i // 36 % 6)) for i in range(n)]


def write_pictures(folder: Path, n: int) -> Path:
    """n plain pictures, `picture i` in the i-th colour."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, colour in enumerate(colours(n)):
        plain(colour).save(folder / f"{i:03}.png")
        (folder / f"{i:03}.txt").write_text(f"picture {i}\n")
    return folder


def write_mixed(folder: Path) -> Counter[str]:
    """Four good pictures at any depth, and one or two of everything that is not; returns what
    must be left out.
    """
    good = encoded(plain())
    files: dict[str, bytes] = {
        "a.png": good,
        "b.JPG": encoded(plain(), "JPEG"),
        "deep/er/c.jpeg": encoded(plain(), "JPEG"),
        "deep/d.webp": encoded(plain(), "WEBP"),
        "cut.png": encoded(Image.effect_noise((90, 90), 50))[:-2000],
        "cut.jpg": encoded(Image.effect_noise((90, 90), 50), "JPEG")[:-900],
        "text.png": b"<html>not found</html>",
        "gif.png": encoded(plain(), "GIF"),
        "silent.png": good,
        "blank.png": good,
        "latin.png": good,
        "small.png": encoded(plain(size=(40, 19))),
        "long.png": encoded(plain(size=(200, 40))),
    }
    for name, contents in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(contents)
        path.with_suffix(".txt").write_text(f"caption of {name}")
    (folder / "silent.txt").unlink()
    (folder / "blank.txt").write_text(" \n\t")
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    (folder / "notes.md").write_text("no picture and no caption")
    reasons = {
        "damaged": 2,
        "not an image": 2,
        "no caption": 1,
        "empty caption": 1,
        "caption is not UTF-8": 1,
    }
    return Counter(reasons | {"too small": 1, "too elongated": 1})


def write_shards(folder: Path, shards: Sequence[Path]) -> str:
    """The files below each directory as a shard; returns the pattern of them all."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, shard in enumerate(shards):
        with tarfile.open(folder / f"shard-{i:03}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for path in sorted(p for p in shard.rglob("*") if p.is_file()):
                tar.add(path, path.relative_to(shard).as_posix())
    return f"{folder}/shard-{{000..{len(shards) - 1:03}}}.tar"


_NO_FILTERS = Filters()


def pictures(
    where: Path | str,
    n: int,
    *,
    size: tuple[int, int] = (16, 16),
    filters: Filters = _NO_FILTERS,
    **rest: Any,
) -> ImageBatches:
    return ImageBatches(open_collection(str(where), rest.get("seed", 0)), n, size, filters, **rest)


def halves(
    left: tuple[int, ...],
    right: tuple[int, ...],
    size: tuple[int, int] = (64, 32),
    mode: str = "RGB",
) -> Image.Image:
    image = plain(left, size, mode)
    image.paste(right, (size[0] // 2, 0, *size))
    return image
