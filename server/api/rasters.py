"""Arrays ↔ what crosses the pipe to the worker and comes back. Pure functions."""

from __future__ import annotations

import hashlib

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from model.canvas import Mask, Pixels
from server.engine.protocol import Image, Raster

# CLIP reads pictures of at most a few hundred pixels a side: no more than this crosses the pipe.
REFERENCE_SIDE = 512


def raster(array: NDArray[np.uint8] | Mask) -> Raster:
    """[H, W, 3] or [H, W]; a bool becomes 0 or 1."""
    content = np.ascontiguousarray(array).view(np.uint8).tobytes()
    name = hashlib.blake2b(content, digest_size=16, person=str(array.shape).encode()[:16]).hexdigest()
    return Raster(array.shape[1], array.shape[0], content, name)


def reference(rgb: Pixels) -> Raster:
    """A picture for CLIP's eyes: scaled down if it is much larger than those see."""
    height, width = rgb.shape[:2]
    scale = REFERENCE_SIDE / max(width, height)
    return raster(rgb if scale >= 1 else scaled(rgb, max(1, round(width * scale)), max(1, round(height * scale))))


def scaled(rgb: Pixels, width: int, height: int) -> Pixels:
    return np.asarray(PIL.Image.fromarray(rgb).resize((width, height), PIL.Image.Resampling.BICUBIC))


def array_of(image: Image) -> Pixels:
    """[H, W, 3]"""
    return np.frombuffer(image.pixels, np.uint8).reshape(image.height, image.width, 3)


def image_of(array: Pixels, index: int) -> Image:
    return Image(index, array.shape[1], array.shape[0], np.ascontiguousarray(array).tobytes())
