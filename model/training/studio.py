"""Run every image operation without a server, on the same rows as the server, to judge the results.

studio = Studio(pipeline)
(image,) = studio.drawn([studio.text("a red star on blue", seed=7)])  # uint8 [H, W, 3]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from model.batch_encoder import DictCache
from model.canvas import Mask, Pixels, crop, fill, outpaint_canvas
from model.config import Interpolation
from model.image_request import (
    Edit,
    Enlarge,
    ImageRequest,
    InputImage,
    Keyframe,
    Reference,
    Region,
    Repaint,
)
from model.pipeline import Pipeline
from model.row_builder import RowBuilder
from model.tiles import lanczos

_BATCH = 16


class Studio:
    """Requests to one bundle by its own recipe, and their images.

    wishes: arguments of `Recipe.sampling`.
    """

    def __init__(self, pipeline: Pipeline, **wishes: object) -> None:
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
        """Return a request for text to image.

        size: (width, height), multiples of the bundle's size step. like: an image whose CLIP
        embedding replaces the prior's. regions: prompts, and where they count, [H, W] of 0 … 255.
        """
        width, height = size or self.pipeline.config.native_size
        read = self.pipeline.config.read_prompt
        return ImageRequest(
            read(prompt).text,
            seed,
            width,
            height,
            self.sampling,
            references=() if like is None else (Reference(InputImage.of(like), 1.0),),
            regions=tuple(
                Region(read(text).text, InputImage.of(weight)) for text, weight in regions
            ),
        )

    def inpainting(self, prompt: str, seed: int, image: Pixels, mask: Mask) -> ImageRequest:
        """Return a request to repaint an image [H, W, 3] where a mask [H, W] is set."""
        request = self.text(prompt, seed, (image.shape[1], image.shape[0]))
        return _repainting(request, image, mask)

    def outpainting(self, prompt: str, seed: int, image: Pixels, **margins: int) -> ImageRequest:
        """Return a request to extend an image by margins in pixels.

        Without a prompt, it continues the image itself.
        """
        canvas, kept = outpaint_canvas(image, **margins)
        size = (canvas.shape[1], canvas.shape[0])
        request = self.text(prompt, seed, size, None if prompt else image)
        return _repainting(request, canvas, ~kept)

    def edit(self, prompt: str, seed: int, image: Pixels, strength: float) -> ImageRequest:
        """Return a request that starts from an image.

        strength: the share of the image that is turned to noise.
        """
        request = self.text(prompt, seed, (image.shape[1], image.shape[0]))
        return replace(request, canvas=Edit(InputImage.of(image), strength))

    def upscaled(
        self, prompt: str, seed: int, image: Pixels, scale: float, strength: float
    ) -> Pixels:
        """Return an image [H, W, 3] drawn `scale` times as large, in tiles.

        Without a prompt, the image itself is the content. strength: the share that is drawn.
        """
        config, size = self.pipeline.config, (image.shape[1], image.shape[0])
        enlarge = Enlarge.of(config, size, scale, strength, self.sampling.unguided)
        tiling = enlarge.tiling
        source = InputImage.of(lanczos(image, enlarge.size, tiling.canvas))
        request = self.text(prompt, seed, tiling.tile, None if prompt else image)
        tiles = self.drawn([enlarge.tile(request, source, i) for i in range(len(tiling))])
        return crop(tiling.blend(tiles), *enlarge.size)

    def frames(
        self, prompts: tuple[str, str], seed: int, count: int, mode: Interpolation = "slerp"
    ) -> list[ImageRequest]:
        """Return requests for frames between two prompts, the ends included."""
        first, second = (self.pipeline.config.read_prompt(prompt).text for prompt in prompts)
        ends = (Keyframe(first), Keyframe(second))
        start = replace(self.text("", seed), keyframes=ends, mode=mode)
        return [replace(start, position=i / (count - 1)) for i in range(count)]

    # ── images ──────────────────────────────────────────────────────────────────────────────────

    def drawn(self, requests: Sequence[ImageRequest]) -> list[Pixels]:
        """Return the requests' images, uint8 [H, W, 3] each; all of one size."""
        images: list[Pixels] = []
        for start in range(0, len(requests), _BATCH):
            rows = self.builder.build(requests[start : start + _BATCH])
            while unfinished := [row for row in rows if not row.done]:
                self.pipeline.advance(unfinished)
            decoded = self.pipeline.decode(torch.stack([row.tokens for row in rows]))
            images += list(decoded.numpy())
        return images

    def seen(self, image: Pixels) -> Tensor:
        """Return CLIP's embedding [1, D] of an image [H, W, 3]."""
        return self.pipeline.embed_images([torch.from_numpy(image)])[0]


def _repainting(request: ImageRequest, image: Pixels, mask: Mask) -> ImageRequest:
    filled = InputImage.of(fill(image, mask))
    return replace(request, canvas=Repaint(filled, InputImage.of(mask)))
