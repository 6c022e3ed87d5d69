"""Fit uploaded images to the size at which they are drawn, and results to the images again.

Sizes are (width, height) in pixels, those of images after their EXIF orientation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import PIL.Image

from model.canvas import Array, Mask, Pixels
from model.compositing import EDGE, blended
from server.api.images.admission import Uploads
from server.api.images.decoded_image import DecodedImage

FitMode = Literal["crop", "pad", "stretch"]
ReturnSize = Literal["result", "original"]
Size = tuple[int, int]

# Rows of an image that are blended at once.
BLENDED_ROWS = 64


@dataclass(frozen=True, slots=True)
class View:
    """A rectangle of an image's plane at the size at which it is drawn.

    The rectangle may leave parts of the image out, and may extend beyond its edges.

    Attributes:
        source: size of the image as it was sent.
        box: (x0, y0, x1, y1), the rectangle in pixels of the sent image.
        size: size of the view.
        scaled: size of the whole image at the view's scale.
        offset: (x, y) of the scaled image's upper left corner in the view, in pixels of the view.
    """

    source: Size
    box: tuple[int, int, int, int]
    size: Size
    scaled: Size
    offset: Size = (0, 0)

    @property
    def margins(self) -> dict[str, int]:
        """Pixels of the view beyond each of the image's edges: left, right, up, down."""
        (x, y), (width, height) = self.offset, self.scaled
        return {
            "left": max(0, x),
            "right": max(0, self.size[0] - x - width),
            "up": max(0, y),
            "down": max(0, self.size[1] - y - height),
        }

    @property
    def full_size(self) -> Size:
        """Size of the view at the sent image's resolution."""
        x0, y0, x1, y1 = self.box
        return x1 - x0, y1 - y0

    @property
    def is_scaled(self) -> bool:
        """Return whether the view has another resolution than the sent image."""
        return self.scaled != self.source

    @property
    def inner(self) -> Size:
        """Size of the part of the image that lies in the view."""
        margins = self.margins
        width = self.size[0] - margins["left"] - margins["right"]
        return width, self.size[1] - margins["up"] - margins["down"]

    @property
    def decoded(self) -> Size:
        """Size at which the whole image is to be decoded.

        An image that is enlarged is cut first: a narrow one would become huge.
        """
        is_enlarged = self.scaled[0] * self.scaled[1] > self.source[0] * self.source[1]
        return self.source if is_enlarged else self.scaled

    def part_of(self, image: DecodedImage) -> DecodedImage:
        """Return the part that lies in the view, at its scale, of an image of size `decoded`."""
        if self.decoded == self.scaled:
            rgb, alpha = self._cut(image.rgb), image.alpha
            return replace(image, rgb=rgb, alpha=None if alpha is None else self._cut(alpha))
        y, x = self._inside
        rgb, alpha = image.rgb[y, x], image.alpha
        channels = rgb if alpha is None else np.dstack([rgb, alpha[y, x]])
        resample = PIL.Image.Resampling.BICUBIC
        part = np.array(PIL.Image.fromarray(channels).resize(self.inner, resample))
        return replace(image, rgb=part[..., :3], alpha=None if alpha is None else part[..., 3])

    def part_of_mask(self, mask: Array) -> Array:
        """Return the part that lies in the view, at its scale, as `scaled_mask` does.

        mask: [H, W], as large as the sent image or as `scaled`.
        """
        if mask.shape == self.source[::-1]:
            return scaled_mask(mask[self._inside], self.inner)
        return self._cut(mask)

    def placed(self, part: Array, *, outside: int) -> Array:
        """Return [H, W] of the size of the view from the part of a mask or weights in it.

        outside: the value beyond the image.
        """
        margins = self.margins
        placed = np.full(self.size[::-1], outside, dtype=part.dtype)
        left, up = margins["left"], margins["up"]
        placed[up : up + part.shape[0], left : left + part.shape[1]] = part
        return placed

    def enlarged(self, drawn: Pixels) -> Pixels:
        """Return an image of the view [h, w, 3] at the sent image's resolution."""
        x0, y0, x1, y1 = self.box
        box = self._drawn(0, x0), self._drawn(1, y0), self._drawn(0, x1), self._drawn(1, y1)
        resample = PIL.Image.Resampling.LANCZOS
        return np.array(PIL.Image.fromarray(drawn).resize(self.full_size, resample, box))

    def _drawn(self, axis: int, edge: int) -> float:
        """Return where an edge in the sent image lies in the view."""
        inside = edge * self.scaled[axis] / self.source[axis] + self.offset[axis]
        return min(max(inside, 0.0), float(self.size[axis]))

    def restored(
        self, drawn: Pixels, original: Pixels, repainted: Mask | Pixels, unmix: bool
    ) -> Pixels:
        """Return the drawn view enlarged, with the original's own pixels where it is kept.

        Args:
            drawn: uint8 [h, w, 3], the view.
            original: uint8 [H, W, C], the sent image; the result has as many channels.
            repainted: [H, W], true where the drawn image replaces the original, or the drawn
                image's share of 255.
            unmix: of `model.compositing.blended`.
        """
        x0, y0, _, _ = self.box
        result = self.enlarged(drawn)
        if original.shape[2] == 4:
            result = np.dstack([result, np.full(result.shape[:2], 255, dtype=np.uint8)])
        part, mask = original[self._inside], repainted[self._inside]
        _blend(result[max(0, -y0) :, max(0, -x0) :], part, mask, unmix)
        return result

    @property
    def _inside(self) -> tuple[slice, slice]:
        """Rows and columns of the sent image that lie in the view."""
        x0, y0, x1, y1 = self.box
        return slice(max(0, y0), y1), slice(max(0, x0), x1)

    def _cut(self, array: Array) -> Array:
        """Return the part of the scaled image [H, W, …] that lies in the view."""
        (x, y), (width, height) = self.offset, self.size
        return array[max(0, -y) : height - y, max(0, -x) : width - x]


@dataclass(frozen=True, slots=True)
class Restoration:
    """The way of a finished image to the sent image's resolution.

    Attributes:
        view: the part of the sent image that was drawn.
        drawn: returns the view [h, w, 3] of a generated image [H, W, 3], without kept pixels.
        original: decodes the sent image, uint8 [H, W, C], and what is repainted in it, [H, W], as
            for `View.restored`; None if no pixel is kept.
        unmix: of `View.restored`.
    """

    view: View
    drawn: Callable[[Pixels], Pixels]
    original: Callable[[], tuple[Pixels, Mask | Pixels]] | None
    unmix: bool

    @property
    def pixels(self) -> int:
        """Pixels of the result."""
        return self.view.full_size[0] * self.view.full_size[1]

    def restored(self, generated: Pixels) -> Pixels:
        """Return a generated image [H, W, 3] enlarged, with the sent image's kept pixels."""
        drawn = self.drawn(generated)
        if self.original is None:
            return self.view.enlarged(drawn)
        return self.view.restored(drawn, *self.original(), unmix=self.unmix)


def _blend(drawn: Pixels, original: Pixels, repainted: Mask | Pixels, unmix: bool) -> None:
    """Blend the original into the drawn image's upper left part, where it is not repainted."""
    height, width = original.shape[:2]
    for top in range(0, height, BLENDED_ROWS):
        first, end = max(0, top - EDGE), min(height, top + BLENDED_ROWS)
        rows = slice(first, min(height, end + EDGE))
        part = blended(original[rows], drawn[rows, :width, :3], repainted[rows], unmix)
        drawn[top:end, :width] = part[top - first : end - first]


# ── sizes ─────────────────────────────────────────────────────────────────────────────────────────


def follow(source: Size, width: int | None, height: int | None) -> Size:
    """Return the size of this width and height; a missing side follows the image's ratio."""
    if width is None and height is None:
        return source
    if height is None:
        assert width is not None
        return width, _proportion(source[1], width, source[0])
    return _proportion(source[0], height, source[1]) if width is None else width, height


def within(source: Size, side: int) -> Size:
    """Return the size in the image's ratio whose longer side has this many pixels."""
    is_wide = source[0] >= source[1]
    return follow(source, side, None) if is_wide else follow(source, None, side)


def keeps_ratio(source: Size, size: Size) -> bool:
    """Return whether the size has the image's ratio, but for a side rounded to a pixel."""
    return size in (follow(source, size[0], None), follow(source, None, size[1]))


def _proportion(side: int, new: int, old: int) -> int:
    """Return side × new / old, rounded; at least 1."""
    return max(1, (2 * side * new + old) // (2 * old))


# ── views ─────────────────────────────────────────────────────────────────────────────────────────


def whole(source: Size, size: Size) -> View:
    """Return the view of the whole image at this size, stretched if the ratios differ."""
    return View(source, (0, 0, *source), size, size)


def fitted(source: Size, size: Size, mode: FitMode) -> View:
    """Return the view of this size that shows the image's centre.

    mode: `crop` leaves out what is too much on two sides, `pad` extends the view beyond two sides,
    `stretch` shows the whole image at another ratio.
    """
    if mode == "stretch" or keeps_ratio(source, size):
        return whole(source, size)
    is_wider = size[0] * source[1] > size[1] * source[0]
    if is_wider == (mode == "crop"):
        scaled = follow(source, size[0], None)
    else:
        scaled = follow(source, None, size[1])
    x, y = ((size[axis] - scaled[axis]) // 2 for axis in (0, 1))
    x0, x1 = _edges(x, size[0], scaled[0], source[0])
    y0, y1 = _edges(y, size[1], scaled[1], source[1])
    return View(source, (x0, y0, x1, y1), size, scaled, (x, y))


def _edges(offset: int, length: int, scaled: int, source: int) -> tuple[int, int]:
    """Return where a view begins and ends along an axis of the sent image, within the view."""
    begin = min(-(offset * source // scaled), source - 1)
    return begin, max(begin + 1, (length - offset) * source // scaled)


def extended(source: Size, margins: dict[str, int], size: Size) -> View:
    """Return the view of this size that extends beyond the image's edges.

    margins: left, right, up and down, in pixels of the sent image. If there are any along an axis,
    the view has at least one pixel beyond the image there, however much it is reduced.
    """
    left, right, up, down = (margins[side] for side in ("left", "right", "up", "down"))
    width, x = _inner(size[0], left, source[0], right)
    height, y = _inner(size[1], up, source[1], down)
    box = -left, -up, source[0] + right, source[1] + down
    return View(source, box, size, (width, height), (x, y))


def _inner(size: int, before: int, inside: int, after: int) -> tuple[int, int]:
    """Return length and offset of an image along an axis of its view of this size."""
    added = before + after
    if not added:
        return size, 0
    scaled = min(_proportion(inside, size, inside + added), max(1, size - 1))
    return scaled, (2 * (size - scaled) * before + added) // (2 * added)


def framed(source: Size, ratio: Size, mode: FitMode, side: int) -> View:
    """Return the view of the image in this ratio, reduced to at most `side` pixels a side."""
    frame = source
    if mode != "stretch" and not keeps_ratio(source, ratio):
        is_wider = ratio[0] * source[1] > ratio[1] * source[0]
        keeps_width = is_wider == (mode == "crop")
        frame = (
            (source[0], _proportion(source[0], ratio[1], ratio[0]))
            if keeps_width
            else (_proportion(source[1], ratio[0], ratio[1]), source[1])
        )
    return fitted(source, within(frame, side) if max(frame) > side else frame, mode)


# ── images ────────────────────────────────────────────────────────────────────────────────────────


def decode_view(
    content: bytes, param: str, choose: Callable[[Size], View], uploads: Uploads
) -> tuple[DecodedImage, View]:
    """Decode an image at the scale of the view that `choose` returns for its size.

    Returns:
        The part of the image that lies in the view, at its scale, and the view.

    Raises:
        ApiError: as `decode`, and those of `choose`, which comes before the pixels are decoded.
    """
    views: list[View] = []

    def fit(source: Size) -> Size:
        views.append(choose(source))
        return views[-1].decoded

    image = uploads.decode(content, param, fit)
    return views[-1].part_of(image), views[-1]


def scaled_mask(mask: Array, size: Size) -> Array:
    """Return the mask or weights [H, W] at this size.

    Every true pixel has a true one in its place. Weights are averaged, and at least 1 if any of
    them is.
    """
    for axis, length in ((0, size[1]), (1, size[0])):
        stored = mask.shape[axis]
        if stored == length:
            continue
        starts = np.arange(length) * stored // length
        largest = np.maximum.reduceat(mask, starts, axis=axis)
        if mask.dtype == np.bool_ or stored < length:
            mask = largest
            continue
        counts = np.diff(starts, append=stored).reshape((-1, 1) if axis == 0 else (1, -1))
        means = np.add.reduceat(mask, starts, axis=axis, dtype=np.uint32) // counts
        mask = np.maximum(means, np.minimum(largest, 1)).astype(mask.dtype)
    return mask
