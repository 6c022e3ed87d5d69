"""HEIC files, and what they show by a second decoder.

    python -m tests.heic_files tests/data/heic

writes them. It needs pillow-heif, whose x265 (GPL) makes them, and PyAV, whose FFmpeg decodes the
HEVC in them: `pip install pillow-heif av`, in another environment. The tests need neither.
"""

from __future__ import annotations

import io
import struct
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from server.api.images import bmff
from tests.hostile import exif
from tests.shown_files import P3, gradient

TILE = 64


def written() -> Iterator[tuple[str, bytes]]:
    """Yield the files by name."""
    rgba = PIL.Image.fromarray(gradient(96, 64))
    rgb = rgba.convert("RGB")
    yield "444", saved(rgb)
    yield "420", saved(rgb, chroma=420)
    yield "grey", saved(rgb.convert("L"))
    yield "clear", saved(rgba)
    yield "p3", saved(rgb, icc_profile=P3)
    # x265 codes at least 64 × 64 pixels, of which this file shows a part.
    yield "cropped", saved(rgb.crop((0, 0, 48, 32)))
    yield "turned", saved(rgb, exif=b"Exif\0\0" + exif(6))
    tiles = PIL.Image.fromarray(gradient(2 * TILE, TILE)).convert("RGB")
    left, right = (tiles.crop((x, 0, x + TILE, TILE)) for x in (0, TILE))
    yield "tiled", tiled(saved(left), saved(right))
    yield "large", saved(PIL.Image.new("RGB", (2048, 1024)), quality=1, chroma=420)


def saved(image: PIL.Image.Image, **options: Any) -> bytes:
    import pillow_heif

    pillow_heif.register_heif_opener()
    file = io.BytesIO()
    image.save(file, "HEIF", **{"quality": 95, "chroma": 444, **options})
    return file.getvalue()


# ── files of tiles, as phones write them ──────────────────────────────────────────────────────────


def box(name: bytes, *parts: bytes) -> bytes:
    data = b"".join(parts)
    return struct.pack(">I", 8 + len(data)) + name + data


def full(name: bytes, *parts: bytes, version: int = 0, flags: int = 0) -> bytes:
    return box(name, struct.pack(">I", version << 24 | flags), *parts)


def tiled(
    left: bytes,
    right: bytes,
    size: tuple[int, int] = (100, 60),
    tiles: int = 2,
    wide: bool = False,
) -> bytes:
    """A file of tiles side by side, of which `size` (width, height) is shown.

    left, right: files of one tile; further ones are the right one again. wide: the boxes are of
    the versions whose numbers have 32 or 64 bits.
    """
    first, second = (_parsed(content) for content in (left, right))
    config = first.property(first.primary, b"hvcC")
    assert config is not None
    pieces = [items.data(items.primary) for items in (first, second)]
    ids = [1, *([2] * (tiles - 1))]
    number = "I" if wide else "H"
    grid = struct.pack(f">4B2{number}", 0, wide, 0, tiles - 1, *size)
    properties = box(
        b"ipco",
        left[config.start - 8 : config.end],
        full(b"ispe", struct.pack(">II", TILE, TILE)),
        full(b"ispe", struct.pack(">II", *size)),
        full(b"pixi", b"\3\x08\x08\x08"),
    )
    owned = struct.pack(">I", 3)
    for item, numbers in ((1, (0x81, 2)), (2, (0x81, 2)), (3, (3, 4))):
        # Of either size, the highest bit says that the property is essential.
        indices = [(each & 0x80) << 8 | each & 0x7F for each in numbers] if wide else numbers
        owned += struct.pack(f">{number}B2{'H' if wide else 'B'}", item, 2, *indices)
    kinds = ((1, b"hvc1"), (2, b"hvc1"), (3, b"grid"))
    infos = (
        full(b"infe", struct.pack(f">{number}H", item, 0), kind, b"\0", version=3 if wide else 2)
        for item, kind in kinds
    )

    def meta(at: int) -> bytes:
        starts = (at, at + len(pieces[0]), 0)
        places = struct.pack(f">H{number}", 0x8884 if wide else 0x4400, 3)
        for item, begin, data in zip((1, 2, 3), starts, (*pieces, grid), strict=True):
            places += struct.pack(f">{number}HH", item, item == 3, 0)
            if wide:
                # The origin, one extent, its index, and its place from there.
                places += struct.pack(">QHIQQ", begin, 1, 7, 0, len(data))
            else:
                places += struct.pack(">HII", 1, begin, len(data))
        return full(
            b"meta",
            handler,
            full(b"pitm", struct.pack(f">{number}", 3), version=int(wide)),
            listed,
            referred,
            box(b"iprp", properties, full(b"ipma", owned, version=int(wide), flags=int(wide))),
            full(b"iloc", places, version=2 if wide else 1),
            box(b"idat", grid),
        )

    handler = full(b"hdlr", bytes(4) + b"pict" + bytes(13))
    listed = full(b"iinf", struct.pack(f">{number}", 3), *infos, version=int(wide))
    references = struct.pack(f">{number}H{tiles}{number}", 3, tiles, *ids)
    referred = full(b"iref", box(b"dimg", references), version=int(wide))
    start = box(b"ftyp", b"heic\0\0\0\0mif1heic")
    at = len(start) + len(meta(0)) + 8
    return start + meta(at) + box(b"mdat", *pieces)


def single(
    kind: bytes,
    data: bytes,
    size: tuple[int, int],
    *properties: bytes,
    others: Sequence[tuple[int, int]] = (),
) -> bytes:
    """A file of one image of this type and coded data that states this size.

    others: where further items without a type are, (start, bytes) of each.
    """
    owned = [full(b"ispe", struct.pack(">II", *size)), *properties]
    indices = struct.pack(">IHB", 1, 1, len(owned)) + bytes(range(1, len(owned) + 1))
    info = full(b"infe", struct.pack(">HH", 1, 0), kind, b"\0", version=2)

    def meta(at: int) -> bytes:
        places = b"".join(
            struct.pack(">HHHII", item, 0, 1, *place)
            for item, place in enumerate([(at, len(data)), *others], start=1)
        )
        return full(
            b"meta",
            full(b"pitm", b"\0\1"),
            full(b"iinf", b"\0\1", info),
            box(b"iprp", box(b"ipco", *owned), full(b"ipma", indices)),
            full(b"iloc", struct.pack(">HH", 0x4400, 1 + len(others)), places),
        )

    start = box(b"ftyp", b"mif1\0\0\0\0mif1")
    return start + meta(len(start) + len(meta(0)) + 8) + box(b"mdat", data)


def hevc_config(*units: bytes, length_size: int = 4) -> bytes:
    """The parameters of an HEVC image. length_size: bytes of a length before each coded unit."""
    listed = b"".join(struct.pack(">H", len(unit)) + unit for unit in units)
    head = bytes(21) + bytes([0xFC | length_size - 1, len(units) > 0])
    return box(b"hvcC", head, b"\x21" + struct.pack(">H", len(units)) + listed if units else b"")


def _parsed(content: bytes) -> bmff._Items:
    top = bmff._boxes(content, 0, len(content))
    return bmff._items(content, next(box for box in top if box.name == b"meta"))


# ── the second decoder ────────────────────────────────────────────────────────────────────────────


def shown(content: bytes) -> NDArray[np.uint8]:
    """[H, W, 3] or, with transparency, [H, W, 4], as stored: neither rotated nor cropped."""
    items = _parsed(content)
    tiles = [_rgb(items, item) for item in bmff._coded(items, items.primary)]
    width, height = bmff._size(items, items.primary)
    rgb = np.concatenate(tiles, axis=1)[:height, :width]
    others = [item for item, kind in items.types.items() if kind.name == b"hvc1"]
    alphas = [item for item in others if items.property(item, b"auxC") is not None]
    return np.dstack([rgb, *(_rgb(items, item)[..., 0] for item in alphas)])


def _rgb(items: bmff._Items, item: int) -> NDArray[np.uint8]:
    import av

    decoder = av.CodecContext.create("hevc", "r")
    stream = b"".join(b"\0\0\0\1" + unit for unit in _units(items, item))
    packets = [*decoder.parse(stream), *decoder.parse(b"")]
    frames = [frame for packet in [*packets, None] for frame in decoder.decode(packet)]
    planes = [
        np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size)[:, : plane.width]
        for plane in frames[0].planes
    ]
    height, width = planes[0].shape
    luma, *chroma = (
        np.asarray(
            PIL.Image.fromarray(plane).resize((width, height), PIL.Image.Resampling.BILINEAR)
        ).astype(float)
        for plane in planes
    )
    if not chroma:
        return luma.astype(np.uint8)[..., None].repeat(3, axis=2)
    # ITU-R BT.601, full range.
    blue, red = (plane - 128 for plane in chroma)
    rgb = np.stack(
        [luma + 1.402 * red, luma - 0.344136 * blue - 0.714136 * red, luma + 1.772 * blue]
    )
    return np.moveaxis(rgb, 0, -1).round().clip(0, 255).astype(np.uint8)


def _units(items: bmff._Items, item: int) -> Iterator[bytes]:
    config = items.property(item, b"hvcC")
    assert config is not None
    data = items.content[config.start : config.end]
    at = 23
    for _ in range(data[22]):
        (count,) = struct.unpack_from(">H", data, at + 1)
        at += 3
        for _ in range(count):
            (size,) = struct.unpack_from(">H", data, at)
            yield data[at + 2 : at + 2 + size]
            at += 2 + size
    coded, at = items.data(item), 0
    while at < len(coded):
        (size,) = struct.unpack_from(">I", coded, at)
        yield coded[at + 4 : at + 4 + size]
        at += 4 + size


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in written():
        (folder / f"{name}.heic").write_bytes(content)
        if name != "large":
            PIL.Image.fromarray(shown(content)).save(folder / f"{name}.png")
