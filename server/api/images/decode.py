"""Pictures in: bytes from a client → arrays, or the error that says what is wrong with them. What each odd file means: docs/uploads.md.

The bytes are hostile until proven otherwise: format and size come from the content alone and are checked before anything is decoded.
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http import HTTPStatus
from typing import Literal, TypeVar

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from server.api.errors import ApiError
from server.api.images.sniff import Container, DamagedFileError, UnknownFormatError, inspect, orientation

MaskMode = Literal["alpha", "luminance"]
Pixels = NDArray[np.uint8]
Mask = NDArray[np.bool_]
Result = TypeVar("Result")

MIB = 2**20
HALF = 128
# ITU-R 601 in parts of 1000.
LUMA = np.array([299, 587, 114], dtype=np.uint32)
# How a picture must be turned that was stored in EXIF orientation 2…8.
TURNS = {
    2: PIL.Image.Transpose.FLIP_LEFT_RIGHT,
    3: PIL.Image.Transpose.ROTATE_180,
    4: PIL.Image.Transpose.FLIP_TOP_BOTTOM,
    5: PIL.Image.Transpose.TRANSPOSE,
    6: PIL.Image.Transpose.ROTATE_270,
    7: PIL.Image.Transpose.TRANSVERSE,
    8: PIL.Image.Transpose.ROTATE_90,
}

_warnings = threading.Lock()


@dataclass(frozen=True, slots=True)
class PictureLimits:
    """Of one uploaded picture: its file, and what it would be when decoded."""

    max_bytes: int = 16 * MIB
    max_pixels: int = 16 * MIB


@dataclass(frozen=True, slots=True, eq=False)
class Picture:
    """rgb: uint8 [H, W, 3] as stored, transparent pixels too. alpha: uint8 [H, W] if the file had any. sha256: of the uploaded bytes."""

    rgb: Pixels
    alpha: Pixels | None
    sha256: str

    @property
    def had_alpha(self) -> bool:
        return self.alpha is not None

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels."""
        return self.rgb.shape[1], self.rgb.shape[0]

    @property
    def on_white(self) -> Pixels:
        """uint8 [H, W, 3] as a viewer shows it; opaque pixels keep their bits."""
        return self._over(255)

    @property
    def luminance(self) -> Pixels:
        """uint8 [H, W], ITU-R 601; transparent pixels are black, whatever colour they hide."""
        return ((self._over(0) @ LUMA + 500) // 1000).astype(np.uint8)

    def _over(self, background: int) -> Pixels:
        if self.alpha is None:
            return self.rgb
        alpha = self.alpha[..., None].astype(np.uint16)  # 255 × 255 + 127 just fits
        return ((self.rgb * alpha + background * (255 - alpha) + 127) // 255).astype(np.uint8)


def decode(content: bytes, limits: PictureLimits, param: str = "image") -> Picture:
    """Raises ApiError naming `param`: 413 beyond the limits, 422 for what is no PNG, JPEG, WebP or GIF or cannot be decoded."""
    if len(content) > limits.max_bytes:
        raise _too_large(param, f"a file may have at most {limits.max_bytes} bytes", f"{len(content)}")
    container = _inspect(content, limits, param)
    try:
        rgb, alpha = _arrays(_load(container))
    except MemoryError:
        raise
    except Exception:
        # Pillow's decoders raise nearly anything, and their messages hold object addresses.
        raise _undecodable(param, f"this {container.format} file is damaged or cut off") from None
    return Picture(rgb, alpha, hashlib.sha256(content).hexdigest())


def repaint_mask(picture: Picture, mode: MaskMode | None, size: tuple[int, int], param: str = "mask") -> Mask:
    """bool [H, W], true where the picture of `size` (width, height) is repainted; half-way values count as the nearer end.

    mode: alpha, transparent is repainted; luminance, white is repainted; None, alpha if the mask has an alpha channel. An image without
    a mask of its own may serve as one with mode alpha. Raises ApiError 422: another size, no alpha channel, nothing to repaint.
    """
    if picture.size != size:
        message = f"{param}: must be as large as the image, {size[0]}x{size[1]} pixels (sent: {picture.size[0]}x{picture.size[1]})"
        raise ApiError(HTTPStatus.UNPROCESSABLE_ENTITY, "mask_size_mismatch", message, param)
    if mode == "alpha" and picture.alpha is None:
        message = f"{param}: has no alpha channel; send one, or mask_mode luminance with white where the image is repainted"
        raise ApiError(HTTPStatus.UNPROCESSABLE_ENTITY, "mask_without_alpha", message, param)
    by_alpha = picture.alpha is not None and mode != "luminance"
    mask: Mask = picture.alpha < HALF if by_alpha and picture.alpha is not None else picture.luminance >= HALF
    if not mask.any():
        message = f"{param}: leaves nothing to repaint; {'transparent' if by_alpha else 'white'} pixels are repainted, and it has none"
        raise ApiError(HTTPStatus.UNPROCESSABLE_ENTITY, "empty_mask", message, param)
    return mask


class Decoder:
    """Threads for what is done with pictures: those of at most `threads` requests at once, however many wait."""

    def __init__(self, limits: PictureLimits = PictureLimits(), threads: int = 2) -> None:
        self.limits = limits
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def run(self, work: Callable[[], Result]) -> Result:
        """Does this in one of the threads."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)


def _inspect(content: bytes, limits: PictureLimits, param: str) -> Container:
    if not content:
        raise _undecodable(param, "the file is empty")
    try:
        container = inspect(content)
    except UnknownFormatError as error:
        message = f"{param}: must be a PNG, JPEG, WebP or GIF file (sent: {error})"
        raise ApiError(HTTPStatus.UNPROCESSABLE_ENTITY, "unsupported_image_format", message, param) from None
    except DamagedFileError as error:
        raise _undecodable(param, f"the file is damaged: {error}") from None
    if not container.pixels:
        raise _undecodable(param, "the file is damaged: its width or height is 0")
    if container.pixels > limits.max_pixels:
        raise _too_large(param, f"may have at most {limits.max_pixels} pixels", f"{container.width}x{container.height}")
    return container


def _load(container: Container) -> PIL.Image.Image:
    """The first picture of the file, upright."""
    # Pillow's warnings are about a client's file and would fill our log. The lock, because filters are shared by all threads.
    with _warnings, warnings.catch_warnings(action="ignore"):
        image = PIL.Image.open(io.BytesIO(container.content), formats=(container.format,))
    if image.size != (container.width, container.height):
        raise ValueError("the file has two sizes")
    image.load()
    turn = TURNS.get(orientation(image.info.get("exif", b"")))
    return image if turn is None else image.transpose(turn)


def _arrays(image: PIL.Image.Image) -> tuple[Pixels, Pixels | None]:
    """The image in 8 bits: rgb [H, W, 3] and, where the file has transparency, alpha [H, W]."""
    if image.mode.startswith("I"):
        return _from_16_bits(np.asarray(image), image.info.get("transparency"))
    if not image.has_transparency_data:
        return np.array(image.convert("RGB")), None
    rgba = np.asarray(image.convert("RGBA"))
    return rgba[..., :3].copy(), rgba[..., 3].copy()


def _from_16_bits(grey: NDArray[np.integer], transparent: int | None) -> tuple[Pixels, Pixels | None]:
    """The upper byte, as Pillow takes it from 16-bit colours; its own conversion of greys would clip."""
    rgb = np.repeat((grey >> 8).astype(np.uint8)[..., None], 3, axis=2)
    alpha = None if transparent is None else np.where(grey == transparent, 0, 255).astype(np.uint8)
    return rgb, alpha


def _too_large(param: str, allowed: str, sent: str) -> ApiError:
    return ApiError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "image_too_large", f"{param}: {allowed} (sent: {sent})", param)


def _undecodable(param: str, reason: str) -> ApiError:
    return ApiError(HTTPStatus.UNPROCESSABLE_ENTITY, "undecodable_image", f"{param}: {reason}", param)
