"""The art: fetched once, checked, packed into one file, read as sprites.

Tests of the art itself are marked `art` and skipped where it is not fetched.
"""

from __future__ import annotations

import hashlib
import io
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from model.training import art
from model.training.kinds import KINDS, SHAPES, aspect


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty place for the art."""
    monkeypatch.setenv("PAELLERA_ART", str(tmp_path))
    return tmp_path


def _tar(path: Path, codes: list[str]) -> None:
    """A tar file like the package's, with a blue disc for each code."""
    image = Image.new("RGBA", (32, 32))
    image.paste((0, 0, 255, 255), (8, 4, 24, 28))
    data = io.BytesIO()
    image.save(data, "WEBP", lossless=True)
    with tarfile.open(path, "w:gz") as tar:
        for code in codes:
            member = tarfile.TarInfo(f"package/assets/{code}.webp")
            member.size = len(data.getvalue())
            tar.addfile(member, io.BytesIO(data.getvalue()))


# ── files ─────────────────────────────────────────────────────────────────────────────────────────


def test_without_art_the_message_says_what_to_do(cache: Path) -> None:
    with pytest.raises(FileNotFoundError, match="run `make art`"):
        art.atlas()


def test_without_npm_the_message_says_what_to_do(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(FileNotFoundError, match="npm is not installed"):
        art.fetch()


def test_the_art_is_fetched_once_and_checked(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []

    def npm(command: list[str], **_: object) -> None:
        calls.append(command)
        Path(command[-2], art.TARBALL).write_bytes(b"art")

    monkeypatch.setattr("shutil.which", lambda name: "/bin/npm")
    monkeypatch.setattr(subprocess, "run", npm)
    with pytest.raises(ValueError, match="SHA-256"):
        art.fetch()
    monkeypatch.setattr(art, "SHA256", hashlib.sha256(b"art").hexdigest())
    assert art.fetch() == cache / art.TARBALL
    assert len(calls) == 1
    assert calls[0][-1] == "@lobehub/fluent-emoji-3d@1.1.0"


def test_a_packed_file_is_read_in_place_of_the_package(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _tar(cache / art.TARBALL, [kind.code for kind in KINDS] + ["1f600"])
    packed = cache / "sprites.tar"
    art.pack(packed)
    monkeypatch.setenv("PAELLERA_ART", str(packed))
    assert art.fetch() == packed
    sprites = art.atlas(16)
    assert sprites.shape == (len(SHAPES) + len(KINDS), 4, 16, 16)
    assert sprites.dtype == torch.uint8


def test_missing_files_are_named(cache: Path) -> None:
    _tar(cache / art.TARBALL, ["1f600"])
    with pytest.raises(KeyError, match="1f34e"):
        art.read({"1f600", "1f34e"})


# ── sprites ───────────────────────────────────────────────────────────────────────────────────────


def test_a_sprite_is_cropped_centred_and_premultiplied() -> None:
    image = Image.new("RGBA", (64, 64))
    image.paste((200, 100, 0, 128), (10, 20, 30, 60))
    sprite = art.fit(image, 40)
    solid = sprite[3] > 0
    assert solid.any(axis=1).sum() == 40
    assert solid.any(axis=0).sum() == 20
    assert solid[:, 10:30].all()
    assert sprite[:, 20, 20].tolist() == pytest.approx([100, 50, 0, 128], abs=1)


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_fill_their_box_as_their_aspect_says(name: str) -> None:
    sprite = art.shapes(128)[SHAPES.index(name)]
    assert torch.equal(sprite[0], sprite[3])  # white
    solid = sprite[3] > 0
    width, height = int(solid.any(dim=0).sum()), int(solid.any(dim=1).sum())
    assert max(width, height) == 128
    assert width / height == pytest.approx(aspect(name), rel=0.02)


# ── the art itself ────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def sprites() -> torch.Tensor:
    try:
        return art.atlas(64)
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.mark.art
def test_every_kind_has_a_sprite_of_its_aspect(sprites: torch.Tensor) -> None:
    assert len(sprites) == len(SHAPES) + len(KINDS)
    solid = sprites[:, 3] > 8
    widths, heights = solid.any(dim=1).sum(dim=1), solid.any(dim=2).sum(dim=1)
    for number, (width, height) in enumerate(zip(widths.tolist(), heights.tolist(), strict=True)):
        assert max(width, height) >= 60
        assert width == pytest.approx(64 * min(1, aspect(number)), abs=2.5), number
    assert (sprites[:, :3] <= sprites[:, 3:]).all()


@pytest.mark.art
def test_no_two_sprites_look_the_same(sprites: torch.Tensor) -> None:
    small = torch.nn.functional.avg_pool2d(sprites.float(), 4).flatten(1).numpy()
    distances = np.linalg.norm(small[:, None] - small[None], axis=-1) / small.shape[1] ** 0.5
    np.fill_diagonal(distances, np.inf)
    first, second = np.unravel_index(distances.argmin(), distances.shape)
    assert distances.min() > 8, (int(first), int(second))
