"""Uploaded image files to arrays, or the error that names the problem. Odd files: docs/uploads.md.

Uploads are hostile until checked: format and size come from the content alone and are checked
before anything is decoded.
"""

from __future__ import annotations

import hashlib
import io
import struct
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Literal

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from model.canvas import Pixels
from server.api.errors import ApiError
from server.api.images.sniff import (
    DamagedFileError,
    ImageFile,
    UnknownFormatError,
    coefficient_bytes,
    sniff,
)

MaskMode = Literal["alpha", "luminance"]
# The size at which an image of (width, height) pixels is needed.
Fit = Callable[[tuple[int, int]], tuple[int, int]]

MIB = 2**20
# A decoder that can decode a smaller image directly, and Pillow's own reduction, leave at least so
# many times the pixels a side that are needed.
REDUCING_GAP = 2.0
# Coefficients of a JPEG that a decoder may hold, in bytes per pixel of the largest other image.
COEFFICIENT_BYTES = 16
OPAQUE = 255
# ITU-R 601 in parts of 1000.
LUMA = np.array([299, 587, 114], dtype=np.uint32)
# Rows of which the luminance is computed at once: it takes sixteen times the memory of its result.
GREY_ROWS = 256

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

_warnings_lock = threading.Lock()


@dataclass(frozen=True, slots=True)
class ImageLimits:
    """Limits of uploaded images.

    Attributes:
        max_bytes: of a file.
        max_pixels: of one image, at the size at which it is decoded.
        max_request_pixels: of a request's images together, likewise.
        max_jpeg_pixels: of a JPEG as its header declares it; it may be decoded smaller.
        scaled_side: the longest side at which an image is needed; references have a smaller one.
    """

    max_bytes: int = 16 * MIB
    max_pixels: int = 16 * MIB
    max_request_pixels: int = 64 * MIB
    max_jpeg_pixels: int = 64 * MIB
    scaled_side: int = 512


@dataclass(frozen=True, slots=True, eq=False)
class DecodedImage:
    """An uploaded image.

    Attributes:
        rgb: uint8 [H, W, 3] as stored, transparent pixels included.
        alpha: uint8 [H, W], None if every pixel is opaque.
        sha256: hex digest of the uploaded file.
    """

    rgb: Pixels
    alpha: NDArray[np.uint8] | None
    sha256: str

    @property
    def has_alpha(self) -> bool:
        """Whether any pixel is not opaque."""
        return self.alpha is not None

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels."""
        return self.rgb.shape[1], self.rgb.shape[0]

    @property
    def stored(self) -> Pixels:
        """uint8 [H, W, 3], or [H, W, 4] with alpha, as stored."""
        return self.rgb if self.alpha is None else np.dstack([self.rgb, self.alpha])

    @property
    def on_white(self) -> Pixels:
        """uint8 [H, W, 3] over white, as a viewer shows it; opaque pixels are unchanged."""
        return self.rgb if self.alpha is None else self._over(255)

    @property
    def luminance(self) -> NDArray[np.uint8]:
        """uint8 [H, W], ITU-R 601; transparent pixels are black, whatever colour they hide."""
        grey = np.empty(self.rgb.shape[:2], dtype=np.uint8)
        for top in range(0, len(grey), GREY_ROWS):
            rows = slice(top, top + GREY_ROWS)
            grey[rows] = (self._over(0, rows) @ LUMA + 500) // 1000
        return grey

    def _over(self, background: int, rows: slice = slice(None)) -> Pixels:
        if self.alpha is None:
            return self.rgb[rows]
        alpha = self.alpha[rows, :, None].astype(np.uint16)  # 255 × 255 + 127 just fits
        blended = (self.rgb[rows] * alpha + background * (255 - alpha) + 127) // 255
        return blended.astype(np.uint8)


def decode(
    content: bytes,
    limits: ImageLimits,
    param: str = "image",
    fit: Fit | None = None,
) -> DecodedImage:
    """Decode a PNG, JPEG, WebP or GIF file.

    Args:
        content: the file.
        limits: of the file.
        param: the field to name in errors.
        fit: returns the size at which the upright image is needed; a large one is reduced while it
            is decoded. It may raise ApiError.

    Raises:
        ApiError: names `param`; 413 beyond the limits, 422 for other formats and damaged files.
    """
    file = checked_file(content, limits, param)
    if fit is None and file.pixels > limits.max_pixels:
        raise _too_many_pixels(param, limits.max_pixels, file)
    try:
        rgb, alpha = _arrays(
            _load(file, None if fit is None else _bounded(fit, file, limits, param))
        )
    except (ApiError, MemoryError):
        raise
    except Exception:
        # Pillow's decoders raise nearly anything, and their messages hold object addresses.
        raise _undecodable(param, f"this {file.format} file is damaged or cut off") from None
    if alpha is not None and alpha.min() == OPAQUE:
        alpha = None  # editors store an alpha channel in files that are not transparent anywhere
    return DecodedImage(rgb, alpha, hashlib.sha256(content).hexdigest())


def repaint_mask(
    image: DecodedImage, mode: MaskMode | None, size: tuple[int, int], param: str = "mask"
) -> Pixels:
    """Return uint8 [H, W]: how much of each pixel of the image of `size` is repainted.

    0 keeps a pixel, 255 repaints it, and values between blend it. An image without a separate mask
    may serve as its own with mode alpha.

    Args:
        image: the decoded mask.
        mode: alpha repaints transparent pixels, luminance white ones; None is alpha if any pixel
            of the mask is not opaque.
        size: (width, height) of the image that is repainted.
        param: the field to name in errors.

    Raises:
        ApiError: 422 for another size, mode alpha without transparency, or nothing to repaint.
    """
    if image.size != size:
        raise mask_size_mismatch(param, size, image.size)
    if mode == "alpha" and image.alpha is None:
        message = "no pixel is transparent; mask_mode luminance repaints the white ones"
        raise _unprocessable("mask_without_alpha", param, message)
    alpha = None if mode == "luminance" else image.alpha
    mask = image.luminance if alpha is None else OPAQUE - alpha
    if not mask.any():
        kind = "white" if alpha is None else "transparent"
        message = f"nothing to repaint; {kind} pixels are repainted, and the mask has none"
        raise _unprocessable("empty_mask", param, message)
    return mask


def mask_size_mismatch(param: str, wanted: tuple[int, int], sent: tuple[int, int]) -> ApiError:
    """Return the error for a mask of another size than its image. Sizes: (width, height)."""
    message = (
        f"must be as large as the image, {wanted[0]}x{wanted[1]} pixels (sent: {sent[0]}x{sent[1]})"
    )
    return _unprocessable("mask_size_mismatch", param, message)


def checked_file(content: bytes, limits: ImageLimits, param: str) -> ImageFile:
    """Return format, size and content of an image file, of which only the header was read.

    Raises:
        ApiError: as `decode`.
    """
    if len(content) > limits.max_bytes:
        allowed = f"a file may have at most {limits.max_bytes} bytes"
        raise _too_large(param, allowed, f"{len(content)}")
    if not content:
        raise _undecodable(param, "the file is empty")
    try:
        file = sniff(content)
    except UnknownFormatError as error:
        message = f"must be a PNG, JPEG, WebP or GIF file (sent: {error})"
        raise _unprocessable("unsupported_image_format", param, message) from None
    except DamagedFileError as error:
        raise _undecodable(param, f"the file is damaged: {error}") from None
    if not file.pixels:
        raise _undecodable(param, "the file is damaged: its width or height is 0")
    most = limits.max_pixels
    if file.format == "JPEG":
        # A decoder holds all coefficients of a progressive file at once, whatever the scale.
        held = coefficient_bytes(file)
        allowed_bytes = COEFFICIENT_BYTES * limits.max_pixels
        most = limits.max_jpeg_pixels
        if held > allowed_bytes:
            most = min(most, file.pixels * allowed_bytes // held)
    if file.pixels > most:
        raise _too_many_pixels(param, most, file)
    return file


def _bounded(fit: Fit, file: ImageFile, limits: ImageLimits, param: str) -> Fit:
    """Return `fit`, but raise ApiError 413 if the decoder would have to decode too many pixels."""

    def bounded(stored: tuple[int, int]) -> tuple[int, int]:
        size = fit(stored)
        scale = jpeg_scale(stored, size) if file.format == "JPEG" else 1
        if -(-stored[0] // scale) * -(-stored[1] // scale) > limits.max_pixels:
            raise _too_many_pixels(param, limits.max_pixels, file)
        return size

    return bounded


def jpeg_scale(stored: tuple[int, int], needed: tuple[int, int]) -> int:
    """Return by how much a decoder reduces a JPEG's sides: 1, 2, 4 or 8. Sizes: (width, height)."""
    times = min(
        side // round(need * REDUCING_GAP) for side, need in zip(stored, needed, strict=True)
    )
    return next((scale for scale in (8, 4, 2) if scale <= times), 1)


def _load(file: ImageFile, fit: Fit | None) -> PIL.Image.Image:
    """Return the first image of the file, upright, and resized as `fit` says."""
    # Pillow's warnings concern a client's file and would fill the log. All threads share the
    # warning filters, hence the lock.
    with _warnings_lock, warnings.catch_warnings(action="ignore"):
        image = PIL.Image.open(io.BytesIO(file.content), formats=(file.format,))
    if image.size != (file.width, file.height):
        raise ValueError("the file has two sizes")
    stored = file.width, file.height
    if fit is not None and file.format == "JPEG":
        # Only JPEG can be decoded smaller, and its orientation is known before its pixels.
        width, height = _turned(image, fit(_turned(image, stored)))
        image.draft(None, (round(width * REDUCING_GAP), round(height * REDUCING_GAP)))
    image.load()
    size = stored if fit is None else fit(_turned(image, stored))
    shown = upright(image)
    if fit is None or shown.size == size:
        return shown
    resample = PIL.Image.Resampling.BICUBIC
    return _in_8_bits(shown).resize(size, resample, reducing_gap=REDUCING_GAP)


def _in_8_bits(image: PIL.Image.Image) -> PIL.Image.Image:
    """Return the image in a mode that can be resampled: RGB, RGBA or L."""
    if image.mode in ("L", "RGB") and not image.has_transparency_data:
        return image
    if not image.mode.startswith("I"):
        return image.convert("RGBA" if image.has_transparency_data else "RGB")
    rgb, alpha = _arrays(image)
    converted = PIL.Image.fromarray(rgb)
    if alpha is not None:
        converted.putalpha(PIL.Image.fromarray(alpha))
    return converted


def _arrays(image: PIL.Image.Image) -> tuple[Pixels, NDArray[np.uint8] | None]:
    """Return the image in 8 bits: rgb [H, W, 3] and, if it has transparency, alpha [H, W]."""
    if image.mode.startswith("I"):
        return _from_16_bits(np.asarray(image), image.info.get("transparency"))
    if not image.has_transparency_data:
        return np.array(image.convert("RGB")), None
    rgba = np.asarray(image.convert("RGBA"))
    return rgba[..., :3].copy(), rgba[..., 3].copy()


def _from_16_bits(
    grey: NDArray[np.integer], transparent: int | None
) -> tuple[Pixels, NDArray[np.uint8] | None]:
    """Return the upper byte, as Pillow does for 16-bit colours; its grey conversion clips."""
    rgb = np.repeat((grey >> 8).astype(np.uint8)[..., None], 3, axis=2)
    alpha = None if transparent is None else np.where(grey == transparent, 0, 255).astype(np.uint8)
    return rgb, alpha


def _too_large(param: str, allowed: str, sent: str) -> ApiError:
    message = f"{param}: {allowed} (sent: {sent})"
    return ApiError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "image_too_large", message, param)


def _too_many_pixels(param: str, allowed: int, file: ImageFile) -> ApiError:
    return _too_large(param, f"may have at most {allowed} pixels", f"{file.width}x{file.height}")


def _undecodable(param: str, reason: str) -> ApiError:
    return _unprocessable("undecodable_image", param, reason)


def _unprocessable(code: str, param: str, message: str) -> ApiError:
    return ApiError(HTTPStatus.UNPROCESSABLE_ENTITY, code, f"{param}: {message}", param)


# ── EXIF orientation ──────────────────────────────────────────────────────────────────────────────


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
    transposition = _transposition(image)
    return image if transposition is None else image.transpose(transposition)


def _turned(image: PIL.Image.Image, size: tuple[int, int]) -> tuple[int, int]:
    """Return (width, height) of the upright image from that of the stored one, or the reverse."""
    return size[::-1] if _transposition(image) in SIDES_SWAPPED else size


def _transposition(image: PIL.Image.Image) -> PIL.Image.Transpose | None:
    return TRANSPOSITIONS.get(orientation(image.info.get("exif", b"")))
