"""Each operation's planner: from a request and its files to a `Plan`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from model.canvas import Pixels, crop
from model.config import Operation
from model.image_request import Edit, Enlarge, InputImage, Reference, Region, parted
from model.tiles import lanczos
from server.api.errors import invalid_value
from server.api.images.admission import Uploads
from server.api.images.decoded_image import repaint_mask
from server.api.images.fit import Size, decode_view, whole
from server.api.planning.conditions import (
    decode_fitted_reference,
    decode_keyframe,
    decode_references,
    decode_regions,
    enlarged_region,
    file_hash,
    image_as_prompt,
)
from server.api.planning.draft import Draft, check_operation, seeds
from server.api.planning.layout import (
    choose_canvas,
    choose_view,
    inpaint_weight,
    lay_out,
    nothing_left,
    restore,
)
from server.api.planning.plan import Plan
from server.api.planning.work import TooMuchWorkError
from server.api.schemas import (
    EditOrInpaintRequest,
    EditRequest,
    GenerateRequest,
    InpaintRequest,
    InterpolateRequest,
    OutpaintRequest,
    SamplingFields,
    UpscaleRequest,
    VariationsRequest,
)
from server.engine.messages import Image


def _generate(request: GenerateRequest, drafted: Draft, uploads: Uploads) -> Plan:
    size = drafted.size()
    if request.regions:
        regions, parameters = decode_regions(request.regions, whole(size, size), drafted, uploads)
        return _generate_with(request, drafted, size, parameters, regions=regions)
    auto_regions = drafted.auto_regions(request)
    if drafted.config.vocabulary is None:
        return _generate_with(request, drafted, size, {})
    reading = drafted.read(request.prompt)
    if auto_regions and reading.parts:
        first, regions = parted(reading.parts, *size)
        readings = ((request.prompt, first),)
        try:
            return _generate_with(
                request, drafted, size, {"auto_regions": True}, regions=regions, readings=readings
            )
        except TooMuchWorkError:
            auto_regions = False
    parameters = {"auto_regions": auto_regions}
    readings = ((request.prompt, reading.whole),)
    return _generate_with(request, drafted, size, parameters, readings=readings)


def _generate_with(
    request: GenerateRequest,
    drafted: Draft,
    size: Size,
    parameters: dict[str, Any],
    *,
    regions: tuple[Region, ...] = (),
    readings: tuple[tuple[str, str], ...] = (),
) -> Plan:
    """Return the plan with these regions. The other arguments are those of `Draft.job`."""
    job_with = partial(drafted.job, size, request.prompt, regions=regions, readings=readings)
    if request.hires is None:
        return Plan("generate", job_with(), size, parameters)
    scale, strength = request.hires.scale, request.hires.strength
    sampling = drafted.sampling.with_steps(request.hires.steps or drafted.sampling.steps).unguided
    enlarge = drafted.enlarge(size, scale, strength, sampling, "hires.scale")
    enlarge = replace(enlarge, regions=tuple(enlarged_region(each, enlarge) for each in regions))
    job = job_with(enlarge=enlarge)
    hires = {"scale": scale, "strength": strength, "steps": sampling.steps}
    parameters |= {"width": size[0], "height": size[1], "hires": hires}
    return Plan("generate", job, enlarge.size, parameters, partial(_shown, enlarge))


def _inpaint(request: InpaintRequest, drafted: Draft, uploads: Uploads) -> Plan:
    choose = choose_view(request, drafted, uploads, regions=len(request.regions))
    image, view = decode_view(request.image, "image", choose, uploads)
    weight = inpaint_weight(request, image, view, uploads)
    # Without a mask, the transparent part is drawn, and the answer is opaque.
    is_cut_out = request.mask is None
    layout = lay_out(
        replace(image, alpha=None) if is_cut_out else image,
        view.placed(weight, outside=255),
        view,
        drafted,
        request.feather,
    )
    if not layout.weight.any():
        raise nothing_left("mask")
    regions, region_parameters = decode_regions(request.regions, view, drafted, uploads)
    references, reference_parameters = decode_references(request.references, drafted, uploads)
    parameters = {
        "image": file_hash(request.image),
        **({} if request.mask is None else {"mask": file_hash(request.mask)}),
        "mask_mode": request.mask_mode,
        "keep_unmasked": request.keep_unmasked,
        "feather": request.feather,
        "fit": request.fit,
        "return_size": request.return_size,
        **reference_parameters,
        **region_parameters,
    }
    # Only the files that the result needs: the others need not wait with it.
    kept = request.model_copy(update={"references": [], "regions": ()})

    def original() -> tuple[Pixels, Pixels]:
        files = Uploads(uploads.limits)
        if kept.mask is None:
            sent = files.decode(kept.image)
            return sent.rgb, repaint_mask(sent, "alpha", sent.size, "image")
        # The mask first, which takes a third of the decoded image's memory.
        sent_weight = files.mask(kept.mask, kept.mask_mode, view.source)
        return files.decode(kept.image).stored, sent_weight

    files = [kept.image, *([] if kept.mask is None else [kept.mask])]
    keeps = request.keep_unmasked
    restoration, held = restore(request, layout, view, original if keeps else None, files)
    job = drafted.job(
        layout.padded_size,
        request.prompt,
        canvas=layout.canvas,
        references=references,
        regions=regions,
        **held,
    )
    finish = layout.composited if keeps else layout.cropped
    has_alpha = keeps and layout.transparent is not None
    return Plan("inpaint", job, layout.size, parameters, finish, restoration, has_alpha)


def _outpaint(request: OutpaintRequest, drafted: Draft, uploads: Uploads) -> Plan:
    margins = {
        "left": request.left,
        "right": request.right,
        "up": request.up,
        "down": request.down,
    }
    if not any(margins.values()):
        allowed = "at least one of left, right, up and down must be above 0"
        raise invalid_value("left", allowed, 0)
    choose = choose_canvas(request, margins, drafted, uploads)
    image, view = decode_view(request.image, "image", choose, uploads)
    kept = np.zeros(image.rgb.shape[:2], dtype=np.uint8)
    layout = lay_out(image, view.placed(kept, outside=255), view, drafted, request.feather)
    canvas = whole(view.full_size, view.size)
    regions, region_parameters = decode_regions(request.regions, canvas, drafted, uploads)
    references = image_as_prompt(request.prompt, request.image, drafted, uploads)
    content = request.image

    def original() -> tuple[Pixels, Pixels]:
        sent = Uploads(uploads.limits).decode(content).stored
        return sent, np.zeros(sent.shape[:2], dtype=np.uint8)

    restoration, held = restore(request, layout, view, original, [content])
    job = drafted.job(
        layout.padded_size,
        request.prompt,
        canvas=layout.canvas,
        references=references,
        regions=regions,
        **held,
    )
    parameters = {
        "image": file_hash(request.image),
        **margins,
        "feather": request.feather,
        "return_size": request.return_size,
        **region_parameters,
    }
    finish, has_alpha = layout.composited, layout.transparent is not None
    return Plan("outpaint", job, layout.size, parameters, finish, restoration, has_alpha)


def _variations(request: VariationsRequest, drafted: Draft, uploads: Uploads) -> Plan:
    count = len(request.image)
    weights = [1.0] * count if request.weights is None else request.weights
    if len(weights) != count or not any(weights):
        allowed = f"one for each image ({count}), at least one of them above 0"
        raise invalid_value("weights", allowed, request.weights)
    size: Size | None = None
    images: list[InputImage] = []
    for content in request.image:
        image, view = decode_fitted_reference(content, size, request.fit, drafted, uploads)
        images.append(image)
        # A missing side follows the first image.
        size = size or drafted.size_for(view.source)
    assert size
    references = tuple(map(Reference, images, weights))
    job = drafted.job(size, request.prompt, references=references)
    hashes = [file_hash(content) for content in request.image]
    parameters = {"image": hashes, "weights": weights, "fit": request.fit}
    return Plan("variations", job, size, parameters)


def _edit(request: EditRequest, drafted: Draft, uploads: Uploads) -> Plan:
    steps = round(request.strength * drafted.sampling.steps)
    choose = choose_view(request, drafted, uploads, steps=steps)
    image, view = decode_view(request.image, "image", choose, uploads)
    is_cut_out = image.has_alpha and not image.is_nearly_opaque
    if isinstance(request, EditOrInpaintRequest) and is_cut_out:
        check_operation(drafted.config, "inpaint")
        return _inpaint(request.inpaint, drafted, uploads)
    beyond = view.placed(np.zeros(image.rgb.shape[:2], dtype=np.uint8), outside=255)
    layout = lay_out(image, beyond, view, drafted)
    references, reference_parameters = decode_references(request.references, drafted, uploads)
    restoration, held = restore(request, layout, view, None, [])
    job = drafted.job(
        layout.padded_size,
        request.prompt,
        steps=steps,
        canvas=Edit(layout.canvas.image, request.strength),
        references=references,
        **held,
    )
    parameters = {
        "image": file_hash(request.image),
        "strength": request.strength,
        "fit": request.fit,
        "return_size": request.return_size,
        **reference_parameters,
    }
    return Plan("edit", job, layout.size, parameters, layout.cropped, restoration)


def _upscale(request: UpscaleRequest, drafted: Draft, uploads: Uploads) -> Plan:
    strength = request.strength
    # Each tile knows the whole prompt, and guidance would draw all of it in every tile.
    if request.guidance_scale is None:
        drafted = replace(drafted, sampling=drafted.sampling.unguided)
    # Before the image is decoded. A rotation swaps the sides, which have one bound.
    drafted.enlarge(uploads.stored_size(request.image), request.scale, strength)
    image = uploads.decode(request.image)
    scale = request.scale_for(image.size)
    enlarge = drafted.enlarge(image.size, scale, strength)
    for param, side, actual in (
        ("width", request.width, enlarge.size[0]),
        ("height", request.height, enlarge.size[1]),
    ):
        if side not in (None, actual):
            raise invalid_value(param, f"must be the result's, {actual}; leave it out", side)
    canvas = lanczos(image.on_white, enlarge.size, enlarge.tiling.canvas)
    references = image_as_prompt(request.prompt, request.image, drafted, uploads)
    job = drafted.job(
        enlarge.tiling.tile,
        request.prompt,
        references=references,
        enlarge=replace(enlarge, image=InputImage.of(canvas)),
    )
    parameters = {"image": file_hash(request.image), "scale": scale, "strength": strength}
    return Plan("upscale", job, enlarge.size, parameters, partial(_shown, enlarge))


def _interpolate(request: InterpolateRequest, drafted: Draft, uploads: Uploads) -> Plan:
    size = drafted.size()
    if any(entry.image for entry in request.keyframes):
        check_operation(drafted.config, "variations")
    keyframes = tuple(
        decode_keyframe(entry, request.prompt, i, uploads)
        for i, entry in enumerate(request.keyframes)
    )
    job = drafted.job(
        size,
        request.prompt,
        # Shared noise: all frames have one seed.
        seeds=seeds(request.seed, 1) * request.frames,
        keyframes=keyframes,
        mode=request.mode,
        early=request.stream,
    )
    entries = [
        {"image": file_hash(entry.image)}
        if entry.image is not None
        else {"prompt": entry.prompt, **drafted.reading(entry.prompt or "")}
        for entry in request.keyframes
    ]
    parameters = {"keyframes": entries, "frames": request.frames, "mode": request.mode}
    return Plan("interpolate", job, size, parameters)


Planner = Callable[[Any, Draft, Uploads], Plan]


def _with_reading(planner: Planner) -> Planner:
    """Return the planner, whose plans also tell what of the prompt is encoded."""

    def plan_and_read(request: Any, drafted: Draft, uploads: Uploads) -> Plan:
        planned = planner(request, drafted, uploads)
        whole = isinstance(request, GenerateRequest) and not request.regions
        reading = drafted.reading(planned.job.prompt, whole=whole)
        return replace(planned, prompt_read=reading.get("prompt_read"))

    return plan_and_read


OPERATIONS: dict[Operation, tuple[type[SamplingFields], Planner]] = {
    "generate": (GenerateRequest, _with_reading(_generate)),
    "inpaint": (InpaintRequest, _with_reading(_inpaint)),
    "outpaint": (OutpaintRequest, _with_reading(_outpaint)),
    "variations": (VariationsRequest, _with_reading(_variations)),
    "edit": (EditRequest, _with_reading(_edit)),
    "upscale": (UpscaleRequest, _with_reading(_upscale)),
    "interpolate": (InterpolateRequest, _with_reading(_interpolate)),
}


def _shown(enlarge: Enlarge, image: Image) -> Image:
    """Return an enlarged image without the padding, or a preview from before it is enlarged."""
    if (image.width, image.height) != enlarge.tiling.canvas:
        return Image.of(lanczos(image.array, enlarge.size), image.index)
    return Image.of(crop(image.array, *enlarge.size), image.index)
