"""Every operation without a server, for judging what comes of it: the same rows that the server's engine makes.

studio = Studio(pipeline)
picture = studio.drawn([studio.row("a red star on a blue background", seed=7)])[0]      # uint8 [H, W, 3]
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from model import mixing, operations
from model.canvas import Mask, Pixels, fill, outpaint_canvas
from model.mixing import Mode, Shown
from model.operations import Kept, Region, Row
from model.pipeline import Pipeline
from model.sampling import Noise
from model.text import Prompt

_BATCH = 16


class Studio:
    """Rows of one bundle, by its own recipe. All pictures have sides that are multiples of its size step."""

    def __init__(self, pipeline: Pipeline, **wishes: object) -> None:
        """wishes: what `Recipe.sampling` takes."""
        self.pipeline, self.sampling = pipeline, pipeline.config.recipe.sampling(**wishes)  # type: ignore[arg-type]
        self._prompts: dict[str, Prompt] = {}

    # ── rows ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────────

    def row(
        self,
        prompt: str,
        seed: int,
        size: tuple[int, int] | None = None,
        like: Tensor | None = None,
        regions: Sequence[tuple[str, Pixels]] = (),
    ) -> Row:
        """Text → image. size: (width, height). like: a CLIP image embedding, not the prior's. regions: prompts, and weights [H, W]."""
        shown = self.shown(prompt, seed, size) if like is None else Shown(self.prompt(prompt), like)
        made = [self._region(other, weight, seed, size) for other, weight in regions]
        return self._start(shown, seed, size, made)

    def inpainting(self, prompt: str, seed: int, picture: Pixels, mask: Mask) -> Row:
        row = self.row(prompt, seed, (picture.shape[1], picture.shape[0]))
        return self._repainting(row, fill(picture, mask), mask)

    def outpainting(self, prompt: str, seed: int, picture: Pixels, **margins: int) -> Row:
        """Without a prompt, more of the same."""
        canvas, kept = outpaint_canvas(picture, **margins)
        like = None if prompt else self.seen(picture)
        return self._repainting(self.row(prompt, seed, (canvas.shape[1], canvas.shape[0]), like), canvas, ~kept)

    def edit(self, prompt: str, seed: int, picture: Pixels, strength: float) -> Row:
        row = self.row(prompt, seed, (picture.shape[1], picture.shape[0]))
        return operations.edit(row, self._codes(picture), strength)

    def frames(self, prompts: tuple[str, str], seed: int, count: int, mode: Mode = "slerp") -> list[Row]:
        one, other = (self.shown(prompt, seed) for prompt in prompts)
        return [self._start(mixing.between(one, other, i / (count - 1), mode), seed) for i in range(count)]

    # ── pictures ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────

    def drawn(self, rows: Sequence[Row]) -> list[Pixels]:
        """uint8 [H, W, 3] each."""
        pictures: list[Pixels] = []
        for start in range(0, len(rows), _BATCH):
            batch = rows[start : start + _BATCH]
            while unfinished := [row for row in batch if not row.done]:
                self.pipeline.advance(unfinished)
            pictures += list(self.pipeline.decode(torch.stack([row.tokens for row in batch])).numpy())
        return pictures

    # ── parts ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────────

    def prompt(self, text: str) -> Prompt:
        if text not in self._prompts:
            (self._prompts[text],) = self.pipeline.encode([text])
        return self._prompts[text]

    def shown(self, prompt: str, seed: int, size: tuple[int, int] | None = None) -> Shown:
        (image,) = self.pipeline.image_embeddings([self.prompt(prompt)], [self._noise(seed, size)])
        return Shown(self.prompt(prompt), image)

    def seen(self, picture: Pixels) -> Tensor:
        """CLIP's embedding of it."""
        return self.pipeline.picture_embeddings([torch.from_numpy(picture)])[0]

    def _noise(self, seed: int, size: tuple[int, int] | None) -> Noise:
        return self.pipeline.noise(seed, *(size or self.pipeline.config.native_size), self.sampling.steps)

    def _start(self, shown: Shown, seed: int, size: tuple[int, int] | None = None, regions: Sequence[Region] = ()) -> Row:
        against = self.pipeline.condition(self.prompt("")) if self.sampling.guided else None
        conditional = self.pipeline.condition(shown.prompt, shown.image)
        return self.pipeline.start(self._noise(seed, size), self.sampling, conditional, against, regions)

    def _region(self, prompt: str, weight: Pixels, seed: int, size: tuple[int, int] | None) -> Region:
        shown, share = self.shown(prompt, seed, size), torch.from_numpy(weight.astype(np.float32) / 255)
        tokens = operations.token_weight(share, self.pipeline.config.vqgan.downscale).to(self.pipeline.device)
        return Region(self.pipeline.condition(shown.prompt, shown.image), tokens)

    def _repainting(self, row: Row, picture: Pixels, mask: Mask) -> Row:
        repainted = operations.token_mask(torch.from_numpy(mask), self.pipeline.config.vqgan.downscale).to(self.pipeline.device)
        return operations.repaint(row, Kept(self._codes(picture), ~repainted))

    def _codes(self, picture: Pixels) -> Tensor:
        return self.pipeline.codes(torch.from_numpy(picture)[None])[0]
