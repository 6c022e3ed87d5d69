"""Data in an image file besides its pixels: EXIF orientation, and the parameters in a PNG."""

from __future__ import annotations

import io
import json
import struct
from typing import Any

import PIL.Image
from PIL.PngImagePlugin import PngInfo

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


def upright(image: PIL.Image.Image) -> PIL.Image.Image:
    """Return the image rotated and mirrored as its EXIF orientation says."""
    transposition = TRANSPOSITIONS.get(orientation(image.info.get("exif", b"")))
    return image if transposition is None else image.transpose(transposition)


def png_text(parameters: dict[str, Any]) -> PngInfo:
    """Return the text chunk `parameters` of a generated PNG."""
    text = PngInfo()
    text.add_text("parameters", json.dumps(parameters))
    return text


def read_parameters(png: bytes) -> dict[str, Any]:
    """Return the parameters in a PNG's text chunk. Raises ValueError if there are none."""
    try:
        with PIL.Image.open(io.BytesIO(png), formats=("PNG",)) as image:
            parameters = json.loads(image.info["parameters"])
    except (KeyError, ValueError, AttributeError, OSError):
        raise ValueError("not a PNG with parameters in it") from None
    if not isinstance(parameters, dict):
        raise ValueError("not a PNG with parameters in it")
    return parameters
