"""HEIC is decoded as another decoder does, with the extra `heic`, and refused in words without."""

from __future__ import annotations

import itertools
import struct
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from server.api.errors import ApiError
from server.api.images import DamagedFileError, UnknownFormatError, bmff
from server.api.images import decode as decode_module
from server.api.images.decode import ImageLimits, decode
from server.api.images.sniff import sniff
from tests.heic_files import box, tiled
from tests.shown_files import P3, saved

FOLDER = Path(__file__).parent / "data" / "heic"
FILES = {path.stem: path.read_bytes() for path in sorted(FOLDER.glob("*.heic"))}
SIZES = {
    "turned": (64, 96),
    "tiled": (100, 60),
    "cropped": (48, 32),
    "large": (2048, 1024),
}
LIMITS = ImageLimits()


def with_size(content: bytes, width: int, height: int) -> bytes:
    """The file with another size in its header, for all of its images."""
    start = 0
    while (start := content.find(b"ispe", start)) >= 0:
        content = content[: start + 8] + struct.pack(">II", width, height) + content[start + 16 :]
        start += 16
    return content


@pytest.mark.parametrize("name", FILES)
def test_its_header_is_read_without_a_decoder(name: str) -> None:
    file = sniff(FILES[name])
    assert file.format == "HEIF"
    size = (64, 64) if name == "cropped" else SIZES.get(name, (96, 64))
    assert {file.width, file.height} == set(size)
    assert file.colour.get("icc") == (P3 if name == "p3" else None)


@pytest.mark.parametrize("name", [name for name in FILES if name != "large"])
def test_it_shows_what_another_decoder_shows(name: str) -> None:
    pytest.importorskip("pi_heif", reason="the extra heic is not installed")
    picture = decode(FILES[name], LIMITS)
    assert picture.size == SIZES.get(name, (96, 64))
    expected = PIL.Image.open(FOLDER / f"{name}.png")
    if name == "cropped":
        expected = expected.crop((0, 0, 48, 32))
    if name == "turned":
        expected = expected.transpose(PIL.Image.Transpose.ROTATE_270)
    if name == "p3":
        expected = PIL.Image.fromarray(decode(saved("PNG", expected, icc_profile=P3), LIMITS).rgb)
    other = np.asarray(expected).astype(int)
    assert np.abs(picture.rgb - other[..., :3]).max() <= (4 if name == "420" else 2)
    assert picture.has_alpha == (name == "clear")
    if picture.alpha is not None:
        assert np.abs(picture.alpha - other[..., 3]).max() <= 2


def test_an_image_is_reduced_as_any_other() -> None:
    pytest.importorskip("pi_heif", reason="the extra heic is not installed")
    assert decode(FILES["turned"], LIMITS, fit=lambda size: (size[0] // 2, 9)).size == (32, 9)


@pytest.mark.parametrize("name", ["444", "tiled"])
def test_without_the_extra_it_is_refused_and_the_extra_named(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(decode_module, "_heif", lambda: None)
    with pytest.raises(ApiError, match=r"paellera\[heic\]") as refused:
        decode(FILES[name], LIMITS)
    assert (refused.value.status, refused.value.code) == (422, "unsupported_image_format")


def test_neither_metadata_nor_films_reach_a_decoder() -> None:
    film = saved(
        "AVIF",
        exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0" + b"secret",
        xmp=b"<x/>",
        save_all=True,
        append_images=[PIL.Image.new("RGB", (24, 16))],
    )
    content = sniff(film).content
    assert len(content) == len(film)
    assert {b"Exif", b"mime"} < kinds_of(film)
    assert kinds_of(content) == {b"av01", b"free"}
    assert b"moov" in film
    assert b"moov" not in content


def items_of(content: bytes) -> bmff._Items:
    top = bmff._boxes(content, 0, len(content))
    return bmff._items(content, next(box for box in top if box.name == b"meta"))


def kinds_of(content: bytes) -> set[bytes]:
    return {kind.name for kind in items_of(content).types.values()}


@pytest.mark.parametrize(
    "content",
    [
        with_size(FILES["large"], 8, 8),
        with_size(saved("AVIF", PIL.Image.new("RGB", (2048, 1024)), speed=10), 8, 8),
        # Each tile is allowed, all together are not.
        tiled(FILES["large"], FILES["large"], (800, 600), 2),
        tiled(FILES["444"], FILES["444"], (5000, 5000)).replace(
            b"ispe" + struct.pack(">III", 0, 5000, 5000), b"ispe" + struct.pack(">III", 0, 50, 50)
        ),
    ],
    ids=["heic", "avif", "tiles", "canvas"],
)
def test_a_file_that_decodes_to_more_than_its_header_says_is_refused(content: bytes) -> None:
    with pytest.raises(DamagedFileError, match="larger than its header"):
        sniff(content)


def test_sizes_are_bounded_as_of_any_file() -> None:
    with pytest.raises(ApiError) as refused:
        decode(FILES["large"], ImageLimits(max_pixels=2**20))
    assert (refused.value.status, refused.value.code) == (413, "image_too_large")


def test_an_item_is_one_frame() -> None:
    items = items_of(saved("AVIF", speed=10))
    data = items.data(items.primary)
    assert bmff._av1_pixels(data, itertools.count()) == 24 * 16
    with pytest.raises(DamagedFileError, match="more than one frame"):
        bmff._av1_pixels(data * 9, itertools.count())
    with pytest.raises(DamagedFileError, match="coded parts"):
        bmff._av1_pixels(b"\x12\0" * 100, iter(range(50)))


@pytest.mark.parametrize("name", FILES)
def test_cut_and_changed_files_are_pictures_or_errors_of_ours(name: str) -> None:
    random = np.random.default_rng(0)
    content = FILES[name]
    for _ in range(60):
        changed = bytearray(content)
        for at in random.integers(0, min(len(content), 700), 3):
            changed[at] = random.integers(256)
        try:
            file = sniff(bytes(changed[: random.integers(20, 2 * len(content))]))
        except (DamagedFileError, UnknownFormatError):
            continue
        assert len(file.content) <= len(content)


def test_a_video_is_no_image() -> None:
    with pytest.raises(UnknownFormatError, match="video"):
        sniff(box(b"ftyp", b"isom\0\0\2\0isomavc1mp41") + box(b"moov", bytes(100)))
    with pytest.raises(DamagedFileError, match="no still image"):
        sniff(box(b"ftyp", b"avis\0\0\0\0avis") + box(b"moov", bytes(100)))
