"""An image that is partly repainted, laid out on the canvas that the networks see."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from model.canvas import Pixels, crop, fill, outpaint_canvas
from model.compositing import FEATHER, composite, corrected
from model.image_request import InputImage, Repaint
from server.api.errors import ApiError, invalid_value, unprocessable
from server.api.images.admission import Uploads
from server.api.images.decoded_image import OPAQUE, DecodedImage, repaint_mask
from server.api.images.fit import Restoration, Size, View, extended, fitted, keeps_ratio
from server.api.planning.draft import Draft
from server.api.schemas import EditRequest, InpaintRequest, OutpaintRequest
from server.engine.messages import Image


class Layout(NamedTuple):
    """An image padded for the networks, its sides multiples of the size step.

    Attributes:
        rgb: uint8 [H, W, 3], as the networks see it.
        weight: uint8 [H, W], how much of each pixel is repainted: 0 keeps it.
        size: (width, height) of the answer, the upper left part.
        transparent: uint8 [height, width, 4] of this size, the image as stored, if the answer keeps
            its transparency.
        feather: of the composite, in pixels.
    """

    rgb: Pixels
    weight: Pixels
    size: tuple[int, int]
    transparent: Pixels | None = None
    feather: int = FEATHER

    @property
    def canvas(self) -> Repaint:
        """The worker's input: the image, filled where it is repainted, and the mask."""
        repainted = self.weight > 0
        return Repaint(InputImage.of(fill(self.rgb, repainted)), InputImage.of(repainted))

    @property
    def padded_size(self) -> tuple[int, int]:
        """(width, height) in pixels."""
        return self.rgb.shape[1], self.rgb.shape[0]

    def cropped(self, image: Image) -> Image:
        """Return a generated image without the padding."""
        return Image.of(self.cropped_pixels(image.array), image.index)

    def cropped_pixels(self, image: Pixels) -> Pixels:
        """Return a generated image [H, W, 3] without the padding."""
        return crop(image, *self.size)

    def composited(self, image: Image) -> Image:
        """Return the kept pixels bit for bit, generated ones elsewhere, without a seam."""
        weight = crop(self.weight, *self.size)
        original = crop(self.rgb, *self.size) if self.transparent is None else self.transparent
        generated = crop(image.array, *self.size)
        return Image.of(composite(original, generated, weight, self.feather), image.index)

    def corrected(self, image: Pixels) -> Pixels:
        """Return a generated image [H, W, 3] without the padding and without a seam to the kept."""
        weight, original = crop(self.weight, *self.size), crop(self.rgb, *self.size)
        return corrected(original, crop(image, *self.size), weight > 0, self.feather)


def choose_view(
    request: InpaintRequest | EditRequest,
    drafted: Draft,
    uploads: Uploads,
    *,
    steps: int | None = None,
    regions: int = 0,
) -> Callable[[Size], View]:
    """Return the choice of an image's view by its size. steps, regions: as in `fitted_size`."""

    def choose(source: Size) -> View:
        enlarged = source[0] * source[1] if request.return_size == "original" else 0
        view = fitted(source, drafted.fitted_size(source, steps, regions, enlarged), request.fit)
        _check_restorable(request, view, uploads)
        return view

    return choose


def choose_canvas(
    request: OutpaintRequest, margins: dict[str, int], drafted: Draft, uploads: Uploads
) -> Callable[[Size], View]:
    """Return the choice of a canvas with these margins by the image's size.

    margins: in pixels of the sent image.
    """

    def choose(source: Size) -> View:
        width = source[0] + margins["left"] + margins["right"]
        height = source[1] + margins["up"] + margins["down"]
        enlarged = width * height if request.return_size == "original" else 0
        size = drafted.fitted_size(
            (width, height), steps=None, regions=len(request.regions), enlarged=enlarged
        )
        if not keeps_ratio((width, height), size):
            allowed = f"must keep the ratio of the canvas, {width}x{height}; leave it out"
            raise invalid_value("width", allowed, f"{size[0]}x{size[1]}")
        view = extended(source, margins, size)
        _check_restorable(request, view, uploads)
        return view

    return choose


def _check_restorable(
    request: InpaintRequest | OutpaintRequest | EditRequest, view: View, uploads: Uploads
) -> None:
    """Raise ApiError 422 if an image is to be returned in a size that is too large for that."""
    most = uploads.limits.max_pixels
    width, height = view.full_size
    if request.return_size == "result" or not view.is_scaled:
        return
    if max(width * height, view.source[0] * view.source[1]) > most:
        allowed = f"an original may have at most {most} pixels; send result"
        raise invalid_value("return_size", allowed, f"original, {width}x{height}")


def restore(
    request: InpaintRequest | OutpaintRequest | EditRequest,
    layout: Layout,
    view: View,
    original: Callable[[], tuple[Pixels, Pixels]] | None,
    files: Sequence[bytes],
) -> tuple[Restoration | None, dict[str, int]]:
    """Return how to restore the sent image's resolution, if at all, and what the job counts for it.

    files: those that `original` decodes.
    """
    if request.return_size == "result" or not view.is_scaled:
        return None, {}
    # Kept pixels come from the sent image, so only the drawn ones are enlarged.
    drawn = layout.corrected if original else layout.cropped_pixels
    restoration = Restoration(view, drawn, original, layout.feather > 0)
    held = sum(map(len, files)) if original else 0
    return restoration, {"enlarged": restoration.pixels, "held_bytes": held}


def inpaint_weight(
    request: InpaintRequest, image: DecodedImage, view: View, uploads: Uploads
) -> Pixels:
    """Return how much of each pixel is repainted, by the mask or the image's transparency.

    image: the part of the sent image that lies in the view.
    """
    if request.mask is not None:
        mode, source = request.mask_mode, view.source
        return view.part_of_mask(uploads.mask(request.mask, mode, source, scaled=view.scaled))
    if image.alpha is None:
        problem = "required, unless the image is transparent where it is to be repainted"
        raise unprocessable("missing_field", "mask", problem)
    if image.alpha.min() == OPAQUE:
        raise nothing_left("image")
    return repaint_mask(image, "alpha", image.size, "image")


def nothing_left(param: str) -> ApiError:
    """Return the error for a mask, or an image as its own, whose part in the view keeps all."""
    problem = "nothing to repaint in the part that width and height leave"
    return unprocessable("empty_mask", param, problem)


def lay_out(
    image: DecodedImage, weight: Pixels, view: View, drafted: Draft, feather: int = FEATHER
) -> Layout:
    """Lay an image out on its view, and the view on a size that the weights generate.

    Args:
        image: the part of the image that lies in the view.
        weight: uint8 [H, W] of the view, how much of each pixel is repainted.
        view: the view.
        drafted: the request.
        feather: of the composite, in pixels.
    """
    step, margins = drafted.config.size_step, view.margins
    # Padding beyond a new edge is generated; beyond an old one it mirrors the image.
    right = -view.size[0] % step if margins["right"] else 0
    down = -view.size[1] % step if margins["down"] else 0
    padded_margins = {
        **margins,
        "right": margins["right"] + right,
        "down": margins["down"] + down,
    }
    canvas, _ = outpaint_canvas(image.on_white, **padded_margins)
    stored = outpaint_canvas(image.stored, **margins)[0] if image.has_alpha else None
    weight = np.pad(weight, [(0, down), (0, right)], constant_values=255)
    return Layout(drafted.padded(canvas), drafted.padded(weight), view.size, stored, feather)
