"""Regions, references and keyframes of a request: what its rows are conditioned on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from model.canvas import Mask, Pixels, box_mask, fill, outpaint_canvas, region_weight
from model.image_request import Enlarge, InputImage, Keyframe, Reference, Region
from model.tiles import lanczos
from server.api.images.admission import REFERENCE_SIDE, Uploads
from server.api.images.fit import FitMode, Size, View, decode_view, framed
from server.api.planning.draft import Draft, check_operation
from server.api.schemas import KeyframeEntry, RegionEntry


def file_hash(content: bytes) -> str:
    """Return the hash that stands for a sent file in parameters; `paellera replay` needs it."""
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def decode_regions(
    entries: Sequence[RegionEntry], view: View, drafted: Draft, uploads: Uploads
) -> tuple[tuple[Region, ...], dict[str, Any]]:
    """Return the regions of a view, and their parameters; masks are as large as its source."""
    if not entries:
        return (), {}
    check_operation(drafted.config, "regions")
    regions, parameters = [], []
    for i, entry in enumerate(entries):
        mask = _region_mask(entry, view, i, uploads)
        weight = region_weight(mask, entry.weight, entry.softness)
        regions.append(Region(entry.prompt, InputImage.of(drafted.padded(weight))))
        place = {"box": list(entry.box)} if entry.box else {"mask": file_hash(entry.mask or b"")}
        shape = {"weight": entry.weight, "softness": entry.softness}
        reading = drafted.reading(entry.prompt)
        parameters.append({"prompt": entry.prompt, **reading, **place, **shape})
    return tuple(regions), {"regions": parameters}


def _region_mask(entry: RegionEntry, view: View, index: int, uploads: Uploads) -> Mask | Pixels:
    if entry.box:
        return box_mask(entry.box, *view.size)
    param, source, scaled = f"regions.{index}.mask", view.source, view.scaled
    mask = uploads.mask(entry.mask or b"", None, source, param, scaled)
    return view.placed(view.part_of_mask(mask), outside=0)


def decode_references(
    contents: Sequence[bytes], drafted: Draft, uploads: Uploads
) -> tuple[tuple[Reference, ...], dict[str, Any]]:
    """Return images that replace the prior's embedding, and their parameters."""
    if not contents:
        return (), {}
    check_operation(drafted.config, "variations")
    images = [reference_image(content, "references", uploads) for content in contents]
    references = tuple(Reference(image, 1.0) for image in images)
    return references, {"references": [file_hash(content) for content in contents]}


def image_as_prompt(
    prompt: str, content: bytes, drafted: Draft, uploads: Uploads
) -> tuple[Reference, ...]:
    """Return the image itself as the condition if there is no prompt and the weights support it."""
    if prompt.strip() or "variations" not in drafted.config.operations:
        return ()
    return (Reference(reference_image(content, "image", uploads), 1.0),)


def enlarged_region(region: Region, enlarge: Enlarge) -> Region:
    """Return a region with its weight scaled to the tiles' canvas."""
    weight = lanczos(region.weight.array, enlarge.size, enlarge.tiling.canvas)
    return Region(region.prompt, InputImage.of(weight))


def decode_keyframe(entry: KeyframeEntry, prompt: str, index: int, uploads: Uploads) -> Keyframe:
    """Return an entry as a keyframe; an image's prompt is the request's."""
    if entry.image is None:
        return Keyframe(entry.prompt or "")
    return Keyframe(prompt, reference_image(entry.image, f"keyframes.{index}.image", uploads))


def reference_image(content: bytes, param: str, uploads: Uploads) -> InputImage:
    """Return a file's image for CLIP, scaled down if it is much larger than CLIP reads."""
    return InputImage.of(uploads.decode(content, param, reference_size).on_white)


def decode_fitted_reference(
    content: bytes, size: Size | None, mode: FitMode, drafted: Draft, uploads: Uploads
) -> tuple[InputImage, View]:
    """Return a file's image for CLIP in the ratio of this size, and its view.

    size: default: the one that follows the image.
    """

    def choose(source: Size) -> View:
        return framed(source, size or drafted.size_for(source), mode, REFERENCE_SIDE)

    image, view = decode_view(content, "image", choose, uploads)
    canvas, kept = outpaint_canvas(image.on_white, **view.margins)
    return InputImage.of(fill(canvas, ~kept)), view


def reference_size(stored: tuple[int, int]) -> tuple[int, int]:
    """Return (width, height) of at most `REFERENCE_SIDE` pixels in the same ratio."""
    scale = min(1.0, REFERENCE_SIDE / max(stored))
    return max(1, round(stored[0] * scale)), max(1, round(stored[1] * scale))
