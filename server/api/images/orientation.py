"""Turn images upright as their EXIF blocks say."""

from __future__ import annotations

import struct

import PIL.Image

EXIF = b"Exif\0\0"
ORIENTATION = 0x0112
# Transpositions that undo EXIF orientation 2…8.
TRANSPOSITIONS = {
    2: PIL.Image.Transpose.FLIP_LEFT_RIGHT,
    3: PIL.Image.Transpose.ROTATE_180,
    4: PIL.Image.Transpose.FLIP_TOP_BOTTOM,
    5: PIL.Image.Transpose.TRANSPOSE,
    6: PIL.Image.Transpose.ROTATE_270,
    7: PIL.Image.Transpose.TRANSVERSE,
    8: PIL.Image.Transpose.ROTATE_90,
}
SIDES_SWAPPED = {
    PIL.Image.Transpose.TRANSPOSE,
    PIL.Image.Transpose.ROTATE_270,
    PIL.Image.Transpose.TRANSVERSE,
    PIL.Image.Transpose.ROTATE_90,
}


def upright_size(image: PIL.Image.Image, size: tuple[int, int]) -> tuple[int, int]:
    """Return (width, height) of the upright image from that of the stored one, or the reverse."""
    return size[::-1] if transposition_of(image) in SIDES_SWAPPED else size


def transposition_of(image: PIL.Image.Image) -> PIL.Image.Transpose | None:
    """Return what turns the stored image upright, None if it is."""
    return TRANSPOSITIONS.get(orientation(image.info.get("exif") or b""))


def orientation(exif: bytes) -> int:
    """Return the orientation in an EXIF block, 1…8; 1, upright, if it is absent or damaged.

    `PIL.ImageOps.exif_transpose` is no substitute for hostile files: docs/log.md.
    """
    tiff = exif.removeprefix(EXIF)
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None:
        return 1
    try:
        (start,) = struct.unpack_from(f"{order}I", tiff, 4)
        (count,) = struct.unpack_from(f"{order}H", tiff, start)
        offsets = (start + 2 + 12 * i for i in range(count))
        entries = (struct.unpack_from(f"{order}HHIH", tiff, offset) for offset in offsets)
        return next((value for tag, _, _, value in entries if tag == ORIENTATION), 1)
    except struct.error:
        return 1
