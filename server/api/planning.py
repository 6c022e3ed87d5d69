"""What each endpoint's request comes to: its pictures decoded and laid out, its job, and how what is drawn becomes the answer.

All of these take a while if there are pictures, so the server runs them in its decoder's threads. They raise ApiError: 413 and 422 for
pictures and fields that do not fit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from http import HTTPStatus
from typing import Any, NamedTuple

import numpy as np

from model.canvas import Mask, Pixels, box_mask, composite, crop, fill, outpaint_canvas, region_weight
from model.config import Operation
from server.api.errors import ApiError, invalid
from server.api.images.decode import Picture, PictureLimits, decode, repaint_mask
from server.api.jobs import Draft, Plan, check_operation, draft, seeds
from server.api.picture_schemas import EditRequest, InpaintRequest, InterpolateRequest, KeyframeEntry, OutpaintRequest, VariationsRequest
from server.api.rasters import array_of, image_of, raster, reference, scaled
from server.api.schemas import GenerateRequest, RegionEntry, SamplingFields
from server.api.state import AppState
from server.engine.protocol import Edit, Image, Keyframe, Reference, Region, Repaint


class Laid(NamedTuple):
    """A picture as it is drawn on, its sides multiples of the size step: rgb [H, W, 3], and where it is repainted [H, W].

    size: (width, height) of the answer, its upper left part.
    """

    rgb: Pixels
    repainted: Mask
    size: tuple[int, int]

    @property
    def canvas(self) -> Repaint:
        return Repaint(raster(fill(self.rgb, self.repainted)), raster(self.repainted))

    @property
    def drawn_size(self) -> tuple[int, int]:
        """(width, height)"""
        return self.rgb.shape[1], self.rgb.shape[0]


def generate(asked: GenerateRequest, made: Draft, limits: PictureLimits) -> Plan:
    size = made.size()
    regions, own = _regions(asked.regions, size, made, limits)
    return Plan("generate", made.job(size, asked.prompt, regions=regions), size, own)


def inpaint(asked: InpaintRequest, made: Draft, limits: PictureLimits) -> Plan:
    picture = decode(asked.image, limits)
    made.check_side(picture.size, "image")
    made.check_sent(picture.size)
    mask = _mask(asked, picture, limits)
    laid = Laid(made.padded(picture.on_white), made.padded(mask), picture.size)
    regions, regional = _regions(asked.regions, picture.size, made, limits)
    references, referred = _references(asked.references, made, limits)
    files = {"image": file_hash(asked.image)} | ({} if asked.mask is None else {"mask": file_hash(asked.mask)})
    own = {**files, "mask_mode": asked.mask_mode, "keep_unmasked": asked.keep_unmasked, **referred, **regional}
    job = made.job(laid.drawn_size, asked.prompt, canvas=laid.canvas, references=references, regions=regions)
    return Plan("inpaint", job, laid.size, own, partial(_put_together if asked.keep_unmasked else _cropped, laid))


def outpaint(asked: OutpaintRequest, made: Draft, limits: PictureLimits) -> Plan:
    margins = {"left": asked.left, "right": asked.right, "up": asked.up, "down": asked.down}
    if not any(margins.values()):
        raise invalid("left", "at least one of left, right, up and down must be above 0", 0)
    picture = decode(asked.image, limits)
    laid = _extended(picture, margins, made)
    made.check_sent(laid.size)
    regions, regional = _regions(asked.regions, laid.size, made, limits)
    # Without words the picture itself says what it shows, to weights that take a picture's word for it.
    alike = not asked.prompt.strip() and "variations" in made.config.operations
    like = (Reference(reference(picture.on_white), 1.0),) if alike else ()
    job = made.job(laid.drawn_size, asked.prompt, canvas=laid.canvas, references=like, regions=regions)
    own = {"image": file_hash(asked.image), **margins, **regional}
    return Plan("outpaint", job, laid.size, own, partial(_put_together, laid))


def variations(asked: VariationsRequest, made: Draft, limits: PictureLimits) -> Plan:
    weights = [1.0] * len(asked.image) if asked.weights is None else asked.weights
    if len(weights) != len(asked.image) or not any(weights):
        raise invalid("weights", f"one for each image ({len(asked.image)}), at least one of them above 0", asked.weights)
    size = made.size()
    shown = [reference(decode(content, limits).on_white) for content in asked.image]
    references = tuple(Reference(picture, weight) for picture, weight in zip(shown, weights, strict=True))
    own = {"image": [file_hash(content) for content in asked.image], "weights": weights}
    return Plan("variations", made.job(size, asked.prompt, references=references), size, own)


def edit(asked: EditRequest, made: Draft, limits: PictureLimits) -> Plan:
    rgb = decode(asked.image, limits).on_white
    size = asked.width or rgb.shape[1], asked.height or rgb.shape[0]
    made.check_side(size, "image")
    rgb = rgb if size == (rgb.shape[1], rgb.shape[0]) else scaled(rgb, *size)
    padded = made.padded(rgb)
    laid = Laid(padded, np.ones(padded.shape[:2], dtype=np.bool_), size)
    steps = round(asked.strength * made.sampling.steps)
    references, referred = _references(asked.references, made, limits)
    job = made.job(laid.drawn_size, asked.prompt, steps=steps, canvas=Edit(raster(padded), asked.strength), references=references)
    own = {"image": file_hash(asked.image), "strength": asked.strength, **referred}
    return Plan("edit", job, size, own, partial(_cropped, laid))


def interpolate(asked: InterpolateRequest, made: Draft, limits: PictureLimits) -> Plan:
    size = made.size()
    if any(entry.image for entry in asked.keyframes):
        check_operation(made.config, "variations")
    keyframes = tuple(_keyframe(entry, asked.prompt, i, limits) for i, entry in enumerate(asked.keyframes))
    # Shared noise: all frames are of one seed.
    job = made.job(size, asked.prompt, seeds=seeds(asked.seed, 1) * asked.frames, keyframes=keyframes, mode=asked.mode, early=asked.stream)
    entries = [{"prompt": entry.prompt} if entry.image is None else {"image": file_hash(entry.image)} for entry in asked.keyframes]
    return Plan("interpolate", job, size, {"keyframes": entries, "frames": asked.frames, "mode": asked.mode})


Planner = Callable[[Any, Draft, PictureLimits], Plan]
OPERATIONS: dict[Operation, tuple[type[SamplingFields], Planner]] = {
    "generate": (GenerateRequest, generate),
    "inpaint": (InpaintRequest, inpaint),
    "outpaint": (OutpaintRequest, outpaint),
    "variations": (VariationsRequest, variations),
    "edit": (EditRequest, edit),
    "interpolate": (InterpolateRequest, interpolate),
}


async def plan(asked: SamplingFields, operation: Operation, state: AppState) -> Plan:
    """Raises ApiError: 404 unknown weights, 413 and 422 for pictures and fields that do not fit."""
    made, planner = draft(asked, operation, state), OPERATIONS[operation][1]
    if isinstance(asked, GenerateRequest) and not asked.regions:
        return planner(asked, made, state.decoder.limits)
    return await state.decoder.run(lambda: planner(asked, made, state.decoder.limits))


def file_hash(content: bytes) -> str:
    """What a picture's parameters say of a file that was sent: `paellera replay` asks for the very same."""
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


# ── layouts ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _mask(asked: InpaintRequest, picture: Picture, limits: PictureLimits) -> Mask:
    """A mask of its own, or where the picture itself is transparent."""
    if asked.mask is not None:
        return repaint_mask(decode(asked.mask, limits, "mask"), asked.mask_mode, picture.size)
    if not picture.had_alpha:
        message = "mask: required, unless the image is transparent where it is to be repainted"
        raise ApiError(HTTPStatus.UNPROCESSABLE_ENTITY, "missing_field", message, "mask")
    return repaint_mask(picture, "alpha", picture.size, "image")


def _extended(picture: Picture, margins: dict[str, int], made: Draft) -> Laid:
    width, height = picture.size[0] + margins["left"] + margins["right"], picture.size[1] + margins["up"] + margins["down"]
    made.check_side((width, height), "image")
    step = made.config.size_step
    # What is drawn beyond a new edge only to fill a multiple is new too; beyond an old one the picture is mirrored.
    beyond = {"right": -width % step if margins["right"] else 0, "down": -height % step if margins["down"] else 0}
    rgb, kept = outpaint_canvas(picture.on_white, **{side: pixels + beyond.get(side, 0) for side, pixels in margins.items()})
    return Laid(made.padded(rgb), made.padded(~kept), (width, height))


def _regions(
    entries: Sequence[RegionEntry], size: tuple[int, int], made: Draft, limits: PictureLimits
) -> tuple[tuple[Region, ...], dict[str, Any]]:
    """The regions of an answer of this size, and what its parameters say of them."""
    if entries:
        check_operation(made.config, "regions")
    regions = tuple(
        Region(entry.prompt, raster(made.padded(region_weight(_where(entry, size, i, limits), entry.weight, entry.softness))))
        for i, entry in enumerate(entries)
    )
    places = [{"box": list(entry.box)} if entry.box else {"mask": file_hash(entry.mask or b"")} for entry in entries]
    named = [
        {"prompt": entry.prompt, **place, "weight": entry.weight, "softness": entry.softness}
        for entry, place in zip(entries, places, strict=True)
    ]
    return regions, {"regions": named} if named else {}


def _where(entry: RegionEntry, size: tuple[int, int], index: int, limits: PictureLimits) -> Mask:
    if entry.box:
        return box_mask(entry.box, *size)
    param = f"regions.{index}.mask"
    return repaint_mask(decode(entry.mask or b"", limits, param), None, size, param)


def _references(contents: Sequence[bytes], made: Draft, limits: PictureLimits) -> tuple[tuple[Reference, ...], dict[str, Any]]:
    """Pictures that stand in for the prior's, and what the parameters say of them."""
    if not contents:
        return (), {}
    check_operation(made.config, "variations")
    shown = [reference(decode(content, limits, "references").on_white) for content in contents]
    return tuple(Reference(picture, 1.0) for picture in shown), {"references": [file_hash(content) for content in contents]}


def _keyframe(entry: KeyframeEntry, prompt: str, index: int, limits: PictureLimits) -> Keyframe:
    if entry.image is None:
        return Keyframe(entry.prompt or "")
    return Keyframe(prompt, reference(decode(entry.image, limits, f"keyframes.{index}.image").on_white))


# ── answers ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _cropped(laid: Laid, image: Image) -> Image:
    return image_of(crop(array_of(image), *laid.size), image.index)


def _put_together(laid: Laid, image: Image) -> Image:
    """The picture bit for bit where it is kept, what was drawn elsewhere, and a soft seam on the drawn side."""
    kept = crop(~laid.repainted, *laid.size)
    return image_of(composite(crop(laid.rgb, *laid.size), crop(array_of(image), *laid.size), kept), image.index)
