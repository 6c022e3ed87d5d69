"""An uploaded image as arrays, and what it repaints as a mask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from model.canvas import Pixels, blended
from server.api.errors import ApiError, unprocessable

MaskMode = Literal["alpha", "luminance"]
OPAQUE = 255
# ITU-R 601 in parts of 1000.
LUMA = np.array([299, 587, 114], dtype=np.uint32)
# Formats that store flat black as 1 to 3 and white as 252 to 254, in video's range as 16 and 235.
LOSSY = ("JPEG", "WEBP", "AVIF", "HEIF")
# The luminance that was meant, by the one that they hold: without a jump, and the same in between.
NEARLY_BLACK, GREY_FROM = 16, 32
GREY_UP_TO, NEARLY_WHITE = 223, 235
MEANT = (
    np.interp(
        np.arange(256),
        [0, NEARLY_BLACK, GREY_FROM, GREY_UP_TO, NEARLY_WHITE, OPAQUE],
        [0, 0, GREY_FROM, GREY_UP_TO, OPAQUE, OPAQUE],
    )
    .round()
    .astype(np.uint8)
)
# Weights up to this alone draw nothing that anyone sees: a mask of 0 and 1 is of another scale.
FAINT = 8
# Rows of which the luminance is computed at once: it takes sixteen times the memory of its result.
GREY_ROWS = 256


@dataclass(frozen=True, slots=True, eq=False)
class DecodedImage:
    """An uploaded image.

    Attributes:
        rgb: uint8 [H, W, 3] as stored, transparent pixels included.
        alpha: uint8 [H, W], None if every pixel is opaque.
        lossy: whether the file's format may have changed the pixels a little.
    """

    rgb: Pixels
    alpha: NDArray[np.uint8] | None
    lossy: bool = False

    @property
    def has_alpha(self) -> bool:
        """Return whether any pixel is not opaque."""
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
        return self.rgb if self.alpha is None else blended(self.rgb, self.alpha, 255)

    @property
    def whiteness(self) -> NDArray[np.uint8]:
        """uint8 [H, W], the luminance as it was meant: of a lossy mask, nearly black is black."""
        return MEANT[self.luminance] if self.lossy else self.luminance

    @property
    def clearness(self) -> NDArray[np.uint8] | None:
        """uint8 [H, W], 255 − alpha as it was meant, as `whiteness`; None without alpha."""
        if self.alpha is None:
            return None
        clear = OPAQUE - self.alpha
        return MEANT[clear] if self.lossy else clear

    @property
    def is_nearly_opaque(self) -> bool:
        """Return whether pixels are transparent, and all of them so little that nobody sees it."""
        clear = self.clearness
        if self.alpha is None or clear is None:
            return False
        return bool(self.alpha.min() < OPAQUE and clear.max() <= FAINT)

    @property
    def luminance(self) -> NDArray[np.uint8]:
        """uint8 [H, W], ITU-R 601; transparent pixels are black, whatever colour they hide."""
        grey = np.empty(self.rgb.shape[:2], dtype=np.uint8)
        for top in range(0, len(grey), GREY_ROWS):
            rows = slice(top, top + GREY_ROWS)
            rgb = self.rgb[rows]
            shown = rgb if self.alpha is None else blended(rgb, self.alpha[rows], 0)
            grey[rows] = (shown @ LUMA + 500) // 1000
        return grey


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
        ApiError: 422 for another size, mode alpha without transparency, or nothing to repaint,
            which is no weight above `FAINT`.
    """
    if image.size != size:
        raise mask_size_mismatch(param, size, image.size)
    clear = image.clearness
    if mode == "alpha" and clear is None:
        message = "no pixel is transparent; mask_mode luminance repaints the white ones"
        raise unprocessable("mask_without_alpha", param, message)
    # Lossy files may have some alpha below 255 where none was meant.
    if mode == "luminance" or clear is None or (mode is None and not clear.any()):
        white = image.whiteness
        if white.max() <= FAINT:
            raise empty_mask(param, int(image.luminance.max()))
        return white
    if clear.max() <= FAINT:
        lowest = f"its lowest alpha is {OPAQUE - clear.max()} of {OPAQUE}"
        message = f"nothing to repaint; transparent pixels are repainted, and {lowest}"
        raise unprocessable("empty_mask", param, message)
    return clear


def empty_mask(param: str, brightest: int) -> ApiError:
    """Return the error for a mask without white. brightest: its largest luminance."""
    message = (
        "nothing to repaint; white pixels are repainted, "
        f"and the mask's brightest is {brightest} of {OPAQUE}"
    )
    if brightest:
        message += "; multiply a mask of 0 and 1 by 255"
    return unprocessable("empty_mask", param, message)


def mask_size_mismatch(param: str, wanted: tuple[int, int], sent: tuple[int, int]) -> ApiError:
    """Return the error for a mask of another size than its image. Sizes: (width, height)."""
    message = (
        f"must be as large as the image, {wanted[0]}x{wanted[1]} pixels (sent: {sent[0]}x{sent[1]})"
    )
    if sent == wanted[::-1]:
        message += "; the image is turned by its EXIF orientation first"
    return unprocessable("mask_size_mismatch", param, message)
