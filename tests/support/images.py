"""Images as arrays and files, to send and to compare."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import PIL.Image

Array = np.ndarray[Any, np.dtype[np.uint8]]


def noise(width: int = 64, height: int = 32, channels: int = 3) -> Array:
    return np.random.default_rng(1).integers(256, size=(height, width, channels), dtype=np.uint8)


def png(array: Array) -> bytes:
    file = io.BytesIO()
    PIL.Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


def white(
    width: int = 64, height: int = 32, box: tuple[int, int, int, int] = (16, 8, 40, 24)
) -> Array:
    mask = np.zeros((height, width), dtype=np.uint8)
    mask[box[1] : box[3], box[0] : box[2]] = 255
    return mask


def opened(content: bytes) -> PIL.Image.Image:
    return PIL.Image.open(io.BytesIO(content))


def encoded(image: PIL.Image.Image, format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **({"compress_level": 1} if format == "PNG" else {}), **options)
    return file.getvalue()
