"""Every image operation without a server, for judging its results: the rows that the server builds.

studio = Studio(pipeline)
(picture,) = studio.drawn([studio.text("a red star on blue", seed=7)])  # uint8 [H, W, 3]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from model.canvas import Mask, Pixels, fill, outpaint_canvas
from model.config import Interpolation
from model.image_request import (
    Edit,
    ImageRequest,
    InputImage,
    Keyframe,
    Reference,
    Region,
    Repaint,
)
from model.pipeline import Pipeline
from model.row_builder import DictCache, RowBuilder

_BATCH = 16


class Studio:
    """Requests to one bundle by its own recipe, and their pictures."""

    def __init__(self, pipeline: Pipeline, **wishes: object) -> None:
        """wishes: arguments of `Recipe.sampling`."""
        self.pipeline = pipeline
        self.sampling = pipeline.config.recipe.sampling(**wishes)  # type: ignore[arg-type]
        self.builder = RowBuilder(pipeline, DictCache())

    # ── requests ──────────────────────────────────────────────────────────────────────────────────

    def text(
        self,
        prompt: str,
        seed: int,
        size: tuple[int, int] | None = None,
        like: Pixels | None = None,
        regions: Sequence[tuple[str, Pixels]] = (),
    ) -> ImageRequest:
        """Text to image. size: (width, height), multiples of the bundle's size step.

        like: a picture whose CLIP embedding stands in for the prior's. regions: prompts, and where
        they count, [H, W] of 0 … 255.
        """
        width, height = size or self.pipeline.config.native_size
        return ImageRequest(
            prompt,
            seed,
            width,
            height,
            self.sampling,
            references=() if like is None else (Reference(InputImage.of(like), 1.0),),
            regions=tuple(Region(text, InputImage.of(weight)) for text, weight in regions),
        )

    def inpainting(self, prompt: str, seed: int, picture: Pixels, mask: Mask) -> ImageRequest:
        """Draw what the mask [H, W] covers of a picture [H, W, 3] anew."""
        request = self.text(prompt, seed, (picture.shape[1], picture.shape[0]))
        return _repainting(request, fill(picture, mask), mask)

    def outpainting(self, prompt: str, seed: int, picture: Pixels, **margins: int) -> ImageRequest:
        """Continue a picture by margins in pixels; without a prompt, with more of the same."""
        canvas, kept = outpaint_canvas(picture, **margins)
        size = (canvas.shape[1], canvas.shape[0])
        request = self.text(prompt, seed, size, None if prompt else picture)
        return _repainting(request, canvas, ~kept)

    def edit(self, prompt: str, seed: int, picture: Pixels, strength: float) -> ImageRequest:
        """Begin with a picture, the share `strength` of it turned to noise."""
        request = self.text(prompt, seed, (picture.shape[1], picture.shape[0]))
        return replace(request, canvas=Edit(InputImage.of(picture), strength))

    def frames(
        self, prompts: tuple[str, str], seed: int, count: int, mode: Interpolation = "slerp"
    ) -> list[ImageRequest]:
        """Return requests for frames between two prompts, the ends included."""
        ends = (Keyframe(prompts[0]), Keyframe(prompts[1]))
        first = replace(self.text("", seed), keyframes=ends, mode=mode)
        return [replace(first, position=i / (count - 1)) for i in range(count)]

    # ── pictures ──────────────────────────────────────────────────────────────────────────────────

    def drawn(self, requests: Sequence[ImageRequest]) -> list[Pixels]:
        """Return the requests' pictures, uint8 [H, W, 3] each; all of one size."""
        pictures: list[Pixels] = []
        for start in range(0, len(requests), _BATCH):
            rows = self.builder.build(requests[start : start + _BATCH])
            while unfinished := [row for row in rows if not row.done]:
                self.pipeline.advance(unfinished)
            decoded = self.pipeline.decode(torch.stack([row.tokens for row in rows]))
            pictures += list(decoded.numpy())
        return pictures

    def seen(self, picture: Pixels) -> Tensor:
        """Return CLIP's embedding [1, D] of a picture [H, W, 3]."""
        return self.pipeline.embed_images([torch.from_numpy(picture)])[0]


def _repainting(request: ImageRequest, picture: Pixels, mask: Mask) -> ImageRequest:
    return replace(request, canvas=Repaint(InputImage.of(picture), InputImage.of(mask)))
