"""Uploaded image files to arrays, or the error that names the problem. Odd files: docs/uploads.md.

Uploads are hostile until checked: format and size come from the content alone and are checked
before anything is decoded.
"""

from __future__ import annotations

import importlib
import io
import logging
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from http import HTTPStatus
from typing import Any

import numpy as np
import PIL.features
import PIL.Image
from numpy.typing import NDArray
from PIL import AvifImagePlugin, PngImagePlugin

from model.canvas import Pixels
from server.api.errors import ApiError, unprocessable
from server.api.images import DamagedFileError, ImageFile, UnknownFormatError
from server.api.images.colour import UnreadableProfileError, profile_of, to_srgb
from server.api.images.decoded_image import LOSSY, OPAQUE, DecodedImage
from server.api.images.orientation import transposition_of, upright_size
from server.api.images.sniff import JPEG_EOI, coefficient_bytes, sniff
from server.settings import MIB

log = logging.getLogger(__name__)

# The size at which an image of (width, height) pixels is needed.
Fit = Callable[[tuple[int, int]], tuple[int, int]]

# A decoder that can decode a smaller image directly, and Pillow's own reduction, leave at least so
# many times the pixels a side that are needed.
REDUCING_GAP = 2.0
# Coefficients of a JPEG that a decoder may hold, in bytes per pixel of the largest other image.
COEFFICIENT_BYTES = 16
GREY_MODES = ("1", "L", "LA")
# Coded pixels as good as any, to tell a JPEG without an end marker from one that is cut off.
FILLER = bytes(range(64))

# The threads that decode have a low priority, and are counted.
AvifImagePlugin.DEFAULT_MAX_THREADS = 1

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


def decode(
    content: bytes,
    limits: ImageLimits,
    param: str = "image",
    fit: Fit | None = None,
) -> DecodedImage:
    """Decode a PNG, JPEG, WebP, GIF, AVIF or HEIC file to what a browser shows, in sRGB.

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
        bounded = None if fit is None else _bounded(fit, file, limits, param)
        rgb, alpha = _arrays(_load(file, bounded, param))
    except (ApiError, MemoryError):
        raise
    except Exception:
        # Pillow's decoders raise nearly anything, and their messages hold object addresses.
        raise _undecodable(param, f"this {file.format} file is damaged or cut off") from None
    if alpha is not None and alpha.min() == OPAQUE:
        alpha = None  # editors store an alpha channel in files that are not transparent anywhere
    return DecodedImage(rgb, alpha, file.format in LOSSY)


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
        raise _unsupported(param, str(error)) from None
    except DamagedFileError as error:
        raise _undecodable(param, f"the file is damaged: {error}") from None
    _check_decoder(file, param)
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


def _check_decoder(file: ImageFile, param: str) -> None:
    """Raise ApiError 422 if the server has no decoder of the file's format."""
    if file.format == "HEIF" and _heif() is None:
        extra = "HEIC, which needs the server's optional extra heic: pip install 'paellera[heic]'"
        raise _unsupported(param, extra)
    if file.format == "AVIF" and not PIL.features.check("avif"):
        raise _unsupported(param, "AVIF, which the server's build of Pillow cannot decode")


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


@cache
def _heif() -> Any | None:
    """Return the decoder of HEIC, pi_heif, or None if it is not installed."""
    try:
        decoder = importlib.import_module("pi_heif")
    except ImportError:
        return None
    decoder.options.DECODE_THREADS = 1
    decoder.options.THUMBNAILS = False
    decoder.options.DEPTH_IMAGES = False
    decoder.options.AUX_IMAGES = False
    return decoder


def _load(file: ImageFile, fit: Fit | None, param: str) -> PIL.Image.Image:
    """Return the first image of the file, upright, in sRGB, and resized as `fit` says."""
    image = _decoded(file, fit)
    stored = image.size if file.format == "HEIF" else (file.width, file.height)
    size = stored if fit is None else fit(upright_size(image, stored))
    grey = image.mode in GREY_MODES or image.mode.startswith("I")
    transposition = transposition_of(image)
    shown = _in_8_bits(image, file)
    if transposition is not None:
        shown = shown.transpose(transposition)
    if fit is not None and shown.size != size:
        resample = PIL.Image.Resampling.BICUBIC
        shown = shown.resize(size, resample, reducing_gap=REDUCING_GAP)
    try:
        profile = profile_of(file)
        return shown if profile is None else to_srgb(shown, profile, grey)
    except UnreadableProfileError as error:
        log.info("image profile ignored", extra={"fields": {"param": param, "reason": str(error)}})
        return shown


def _decoded(file: ImageFile, fit: Fit | None) -> PIL.Image.Image:
    """Return the image as stored, its pixels decoded; JPEG may be smaller, but no less than needed.

    Raises ValueError if a JPEG is cut off. One that lacks only its end marker is complete: whatever
    is put behind it changes nothing.
    """
    if file.ended:
        return _decoded_content(file, file.content, fit)
    image = _decoded_content(file, file.content + JPEG_EOI, fit)
    other = _decoded_content(file, file.content + FILLER + JPEG_EOI, fit)
    if image.tobytes() != other.tobytes():
        raise ValueError("the file is cut off")
    return image


def _decoded_content(file: ImageFile, content: bytes, fit: Fit | None) -> PIL.Image.Image:
    image = _opened(file, content)
    if fit is not None and file.format == "JPEG":
        # Only JPEG can be decoded smaller, and its orientation is known before its pixels.
        width, height = upright_size(image, fit(upright_size(image, image.size)))
        image.draft(None, (round(width * REDUCING_GAP), round(height * REDUCING_GAP)))
    image.load()
    return image


def _opened(file: ImageFile, content: bytes) -> PIL.Image.Image:
    if decoder := _heif() if file.format == "HEIF" else None:
        image: PIL.Image.Image = decoder.open_heif(io.BytesIO(content)).to_pillow()
        # It is upright already, and may be cropped.
        if image.width * image.height > file.pixels:
            raise ValueError("the file has two sizes")
        return image
    # Pillow's warnings concern a client's file and would fill the log. All threads share the
    # warning filters, hence the lock.
    with _warnings_lock, warnings.catch_warnings(action="ignore"):
        image = PIL.Image.open(io.BytesIO(content), formats=(file.format,))
    if image.size != (file.width, file.height):
        raise ValueError("the file has two sizes")
    return image


def _in_8_bits(image: PIL.Image.Image, file: ImageFile) -> PIL.Image.Image:
    """Return the image in a mode that can be resampled: L, RGB, RGBA or CMYK."""
    key = image.info.get("transparency")
    if image.mode.startswith("I"):
        grey = np.asarray(image)
        # The upper byte, as Pillow takes of 16-bit colours; its conversion of grey clips.
        return _with_alpha((grey >> 8).astype(np.uint8), None if key is None else grey != key)
    if file.format == "PNG" and image.mode in ("L", "RGB") and key is not None:
        return _with_alpha(np.asarray(image), _differs_from_key(image, file))
    if image.has_transparency_data:
        image = image.convert("RGBA")
    elif image.mode not in ("L", "RGB", "CMYK"):
        image = image.convert("RGB")
    if file.area is not None:
        # Browsers show the background where an animation's first frame does not reach.
        image = image.convert("RGBA")
        alpha = PIL.Image.new("L", image.size, 0)
        alpha.paste(image.getchannel("A").crop(file.area), file.area)
        image.putalpha(alpha)
    return image


def _with_alpha(colours: NDArray[np.uint8], opaque: NDArray[np.bool_] | None) -> PIL.Image.Image:
    """Return an image of [H, W] or [H, W, 3], in mode RGBA if some pixels may not be opaque."""
    image = PIL.Image.fromarray(colours)
    if opaque is None:
        return image
    image = image.convert("RGBA")
    image.putalpha(PIL.Image.fromarray(opaque.astype(np.uint8) * 255))
    return image


def _differs_from_key(image: PIL.Image.Image, file: ImageFile) -> NDArray[np.bool_]:
    """Return bool [H, W], false where a PNG without a palette has its transparent colour.

    Pillow compares it, at any depth, with the 8 bits that it keeps.
    """
    depth = file.content[24]
    stored = np.asarray(image).reshape(image.height, image.width, -1)
    key = np.atleast_1d(image.info["transparency"]) & (1 << depth) - 1
    if depth < 16:
        return _differs(stored, key * (255 // ((1 << depth) - 1)))
    # The lower bytes: the same decoder, told that the file stores the lower byte first.
    other = _opened(file, file.content)
    assert isinstance(other, PngImagePlugin.PngImageFile)
    other.tile = [tile._replace(args="RGB;16L") for tile in other.tile]
    other.load()
    return _differs(stored, key >> 8) | _differs(np.asarray(other), key & 255)


def _differs(colours: NDArray[np.uint8], key: NDArray[np.int_]) -> NDArray[np.bool_]:
    """Return bool [H, W], false where all channels of colours [H, W, C] are those of key [C]."""
    differs = np.zeros(colours.shape[:2], np.bool_)
    for channel, value in enumerate(key):
        differs |= colours[..., channel] != value
    return differs


def _arrays(image: PIL.Image.Image) -> tuple[Pixels, NDArray[np.uint8] | None]:
    """Return rgb [H, W, 3] and, if the image has transparency, alpha [H, W]."""
    if image.mode != "RGBA":
        return np.array(image.convert("RGB")), None
    rgba = np.asarray(image)
    return rgba[..., :3].copy(), rgba[..., 3].copy()


def _too_large(param: str, allowed: str, sent: str) -> ApiError:
    message = f"{param}: {allowed} (sent: {sent})"
    return ApiError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "image_too_large", message, param)


def _too_many_pixels(param: str, allowed: int, file: ImageFile) -> ApiError:
    return _too_large(param, f"may have at most {allowed} pixels", f"{file.width}x{file.height}")


def _unsupported(param: str, sent: str) -> ApiError:
    message = f"must be a PNG, JPEG, WebP, GIF, AVIF or HEIC file (sent: {sent})"
    return unprocessable("unsupported_image_format", param, message)


def _undecodable(param: str, reason: str) -> ApiError:
    return unprocessable("undecodable_image", param, reason)
