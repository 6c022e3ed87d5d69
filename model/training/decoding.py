"""Decode an image file to the pixels that a network is trained on.

They are upright, RGB, scaled to cover the wanted size and cropped to it.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

# The formats of web pages and cameras. Pillow knows more, some of which run other programs on the
# file.
_FORMATS = ("JPEG", "PNG", "WEBP")


class Unusable(Exception):  # noqa: N818, being left out is no error of the training
    """A file that is left out; the message is the reason under which it is counted."""


@dataclass(frozen=True)
class Filters:
    """Limits on the images to train on.

    min_side: least pixels of the shorter side. max_aspect: largest ratio of longer to shorter side.
    """

    min_side: int = 0
    max_aspect: float = math.inf

    def check(self, width: int, height: int) -> None:
        """Raise Unusable for an image of (width, height) pixels outside the limits."""
        shorter, longer = sorted((width, height))
        if shorter < self.min_side:
            raise Unusable("too small")
        if longer > self.max_aspect * shorter:
            raise Unusable("too elongated")


def decode(
    raw: bytes, size: tuple[int, int], filters: Filters, place: tuple[float, float] = (0.5, 0.5)
) -> npt.NDArray[np.uint8]:
    """Return the pixels [height, width, 3] of a JPEG, PNG or WebP file.

    size: (width, height) in pixels. place: where the crop lies on the spare length, 0 left or top,
    1 right or bottom. Raises Unusable for another format, a damaged file, or an image outside the
    limits.
    """
    return np.array(cover(rgb(_opened(raw, size, filters)), size, place))


def _opened(raw: bytes, size: tuple[int, int], filters: Filters) -> Image.Image:
    try:
        image: Image.Image = Image.open(io.BytesIO(raw), formats=_FORMATS)
    except UnidentifiedImageError:
        raise Unusable("not an image") from None
    except Image.DecompressionBombError:
        raise Unusable("too large") from None
    except Exception:
        raise Unusable("damaged") from None
    filters.check(*image.size)
    try:
        # A JPEG may be decoded at a half, quarter or eighth of its size; twice what is wanted
        # leaves the rest to a better filter.
        image.draft(None, (2 * max(size), 2 * max(size)))
        image.load()
        return ImageOps.exif_transpose(image)
    except Exception:  # any error of a decoder on a damaged file
        raise Unusable("damaged") from None


def rgb(image: Image.Image) -> Image.Image:
    """Return any mode as RGB: transparency on white, 16 bits of grey scaled, not clipped."""
    if image.mode.startswith("I;16"):
        grey = np.asarray(image).astype(np.uint32)
        image = Image.fromarray(((grey + 128) // 257).astype(np.uint8))
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return image.convert("RGB")


def cover(image: Image.Image, size: tuple[int, int], place: tuple[float, float]) -> Image.Image:
    """Return the largest part of the image with the proportions of `size`, resized to it.

    place: where the part lies on the spare length, as in `decode`.
    """
    scale = max(size[0] / image.width, size[1] / image.height)
    width, height = min(image.width, size[0] / scale), min(image.height, size[1] / scale)
    left, top = place[0] * (image.width - width), place[1] * (image.height - height)
    return image.resize(size, Image.Resampling.BICUBIC, box=(left, top, left + width, top + height))
