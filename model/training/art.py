"""Fetch and read the objects' art: Microsoft's Fluent Emoji 3D (MIT licence), from npm.

Training and evaluation need it; nothing of it is committed. `make art`, that is
`python -m model.training.art`, fetches it. `python -m model.training.art --pack FILE` writes the
sprites of `KINDS` into one file, which `$PAELLERA_ART` may name on a machine without network.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import math
import os
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from model.training import command
from model.training.kinds import KINDS, SHAPES

PACKAGE = "@lobehub/fluent-emoji-3d@1.1.0"
TARBALL = "lobehub-fluent-emoji-3d-1.1.0.tgz"
SHA256 = "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58"
SIDE = 256  # pixels a side of an atlas' sprites

_FETCH_SECONDS = 300.0
_FAINT = 8  # alpha up to which a pixel at the rim does not count as the outline's
_MASTER = 512  # pixels a side of a shape before it is scaled down

Point = tuple[float, float]


# ── the files ─────────────────────────────────────────────────────────────────────────────────────


def art_folder() -> Path:
    """Return where the art is or belongs.

    That is `$PAELLERA_ART`, a folder or a packed file, else a cache in the home folder.
    """
    return Path(os.environ.get("PAELLERA_ART") or Path.home() / ".cache" / "paellera" / "art")


def art_file() -> Path:
    """Return the tar file with the art. Raises FileNotFoundError when it has not been fetched."""
    place = art_folder()
    path = place / TARBALL if place.is_dir() else place
    if not path.is_file():
        raise FileNotFoundError(
            f"no art at {path}: run `make art`, which needs npm, or set PAELLERA_ART to a "
            f"folder or file that has it"
        )
    return path


def _check(path: Path) -> None:
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != SHA256:
        raise ValueError(f"{path} has the SHA-256 {found}, not {SHA256}: delete it and try again")


def fetch() -> Path:
    """Fetch the art with npm unless it is there, check it and return its file.

    Raises FileNotFoundError without npm, subprocess.SubprocessError when npm fails, ValueError for
    a file of another content.
    """
    folder = art_folder()
    if folder.is_file():
        return folder
    path = folder / TARBALL
    if not path.is_file():
        npm = shutil.which("npm")
        if npm is None:
            raise FileNotFoundError(
                f"npm is not installed: install it, or download {PACKAGE} from npm and "
                f"put it at {path}"
            )
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(
            [npm, "pack", "--silent", "--pack-destination", str(folder), PACKAGE],
            check=True,
            timeout=_FETCH_SECONDS,
        )
    _check(path)
    return path


def read(codes: set[str]) -> dict[str, bytes]:
    """Return the WebP files of some codes.

    Raises FileNotFoundError without the art, KeyError when it lacks one of them.
    """
    files: dict[str, bytes] = {}
    with tarfile.open(art_file()) as tar:
        for member in tar:
            path = Path(member.name)
            if path.suffix == ".webp" and path.stem in codes:
                files[path.stem] = tar.extractfile(member).read()  # type: ignore[union-attr]
    if missing := codes - files.keys():
        raise KeyError(f"the art lacks {', '.join(sorted(missing))}")
    return files


def pack(path: Path) -> None:
    """Write the files of `KINDS` as one tar file of about 4 MB. Raises as `read` does."""
    with tarfile.open(path, "w") as tar:
        for code, data in sorted(read({kind.code for kind in KINDS}).items()):
            member = tarfile.TarInfo(f"assets/{code}.webp")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


# ── the shapes ────────────────────────────────────────────────────────────────────────────────────


def _star() -> list[Point]:
    turns = [(math.pi * i / 5, 0.5 if i % 2 == 0 else 0.21) for i in range(10)]
    return [(0.5 + r * math.sin(a), 0.5 - r * math.cos(a)) for a, r in turns]


def _heart() -> list[Point]:
    turns = np.linspace(0, 2 * math.pi, 240)
    x = 16 * np.sin(turns) ** 3
    y = 13 * np.cos(turns) - 5 * np.cos(2 * turns) - 2 * np.cos(3 * turns) - np.cos(4 * turns)
    return [(0.5 + a / 34, 0.48 - b / 34) for a, b in zip(x.tolist(), y.tolist(), strict=True)]


def _cross() -> list[Point]:
    a, b = 0.33, 0.67
    return [
        (a, 0),
        (b, 0),
        (b, a),
        (1, a),
        (1, b),
        (b, b),
        (b, 1),
        (a, 1),
        (a, b),
        (0, b),
        (0, a),
        (a, a),
    ]


_POLYGONS: dict[str, Callable[[], list[Point]]] = {
    "square": lambda: [(0, 0), (1, 0), (1, 1), (0, 1)],
    "triangle": lambda: [(0.5, 0.05), (1, 0.95), (0, 0.95)],
    "star": _star,
    "heart": _heart,
    "cross": _cross,
    "diamond": lambda: [(0.5, 0), (0.88, 0.5), (0.5, 1), (0.12, 0.5)],
}
# Ellipses drawn one over the other, each (x0, y0, x1, y1, filled); an empty one cuts a hole.
_ELLIPSES: dict[str, list[tuple[float, float, float, float, bool]]] = {
    "circle": [(0, 0, 1, 1, True)],
    "ring": [(0, 0, 1, 1, True), (0.24, 0.24, 0.76, 0.76, False)],
    "crescent": [(0, 0, 1, 1, True), (0.36, 0.08, 1.2, 0.92, False)],
}


def draw_shape(name: str) -> Image.Image:
    """Return one of `SHAPES`, white on nothing, as an RGBA image."""
    last = 2 * _MASTER - 1  # drawn at twice the size for smooth edges
    mask = Image.new("L", (2 * _MASTER, 2 * _MASTER))
    draw = ImageDraw.Draw(mask)
    if name in _POLYGONS:
        draw.polygon([(x * last, y * last) for x, y in _POLYGONS[name]()], fill=255)
    for x0, y0, x1, y1, filled in _ELLIPSES.get(name, []):
        draw.ellipse((x0 * last, y0 * last, x1 * last, y1 * last), fill=255 if filled else 0)
    image = Image.new("RGBA", (_MASTER, _MASTER), (255, 255, 255, 255))
    image.putalpha(mask.resize(image.size, Image.Resampling.BOX))
    return image


# ── the atlas ─────────────────────────────────────────────────────────────────────────────────────


def fit(image: Image.Image, side: int) -> npt.NDArray[np.uint8]:
    """Return an RGBA image cropped to its outline, centred, its longer side `side` pixels.

    The result is `[4,side,side]`, premultiplied by its alpha.
    """
    visible = image.getchannel("A").point([255 * (alpha > _FAINT) for alpha in range(256)])
    cropped = image.crop(visible.getbbox()).convert("RGBa")
    scale = side / max(cropped.size)
    width, height = (max(1, round(extent * scale)) for extent in cropped.size)
    resized = (
        cropped.resize((width, height), Image.Resampling.LANCZOS)
        if cropped.size != (width, height)
        else cropped
    )
    pixels = np.zeros((side, side, 4), dtype=np.uint8)
    top, left = (side - height) // 2, (side - width) // 2
    pixels[top : top + height, left : left + width] = np.asarray(resized)
    pixels[..., :3] = np.minimum(pixels[..., :3], pixels[..., 3:])  # Lanczos rings a little
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def shapes(side: int = SIDE) -> Tensor:
    """Return the nine shapes, white: `[9,4,side,side]` uint8, RGBA, premultiplied by alpha."""
    return torch.from_numpy(np.stack([fit(draw_shape(name), side) for name in SHAPES]))


def atlas(side: int = SIDE) -> Tensor:
    """Return all sprites in the order of `NAMES_OF_KINDS`: `[S,4,side,side]` uint8.

    They are RGBA, premultiplied by alpha. Raises FileNotFoundError without the art.
    """
    files = read({kind.code for kind in KINDS})
    objects = [
        fit(Image.open(io.BytesIO(files[kind.code])).convert("RGBA"), side) for kind in KINDS
    ]
    return torch.cat([shapes(side), torch.from_numpy(np.stack(objects))])


def main() -> None:
    """Fetch the art, and pack it into one file if the command line asks for that."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--pack", type=Path, metavar="FILE", help="also write the objects' files into this one file"
    )
    arguments = parser.parse_args()
    print(fetch())
    if arguments.pack:
        pack(arguments.pack)
        print(f"{arguments.pack}: {arguments.pack.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    command.run(main)
