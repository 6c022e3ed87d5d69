"""Serve the captioned scenes of a corpus on the training device.

Images are drawn on demand; captions are read from the corpus's tensors. Nothing here reads a number
from the device or sends one to it, so all of it may be part of a recorded step. Letters: N scenes,
B of them, L bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from model.training import art, corpus
from model.training.corpus import Corpus
from model.training.render import Layouts, render
from model.training.scenes import ASPECTS

# ByT5's vocabulary: three marks, then the bytes.
_END, _FIRST_BYTE = 1, 3
# Scenes of a corpus that a trainer samples for itself, and the processes that do it.
_OWN_SCENES = 20_000


class Source(Protocol):
    """Captioned images without end, a fixed number at a time."""

    identity: str  # differs for another source: a position in one says nothing about another

    @property
    def skipped(self) -> Mapping[str, int]:
        """Return the number of unusable files, by reason."""

    def draw(self) -> tuple[Tensor, list[str]]:
        """Return (uint8 [N, 3, H, W], N captions)."""

    def state_dict(self) -> dict[str, Any]:
        """Return the position, which determines everything that `draw` will return."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a position that `state_dict` returned."""


@dataclass(frozen=True)
class Text:
    """B captions: bytes uint8 [B, L], 0 behind their ends, and how many each has, [B]."""

    bytes: Tensor
    length: Tensor

    @property
    def ids(self) -> Tensor:
        """Return ByT5's input [B, L + 1]: the bytes' numbers, an end mark, then padding."""
        padded = F.pad(self.bytes.long(), (0, 1))
        place = torch.arange(padded.shape[1], device=padded.device)
        length = self.length.long()[:, None]
        return (padded + _FIRST_BYTE) * (place < length) + _END * (place == length)

    @property
    def mask(self) -> Tensor:
        """Return [B, L + 1], False at padding."""
        return (
            torch.arange(self.bytes.shape[1] + 1, device=self.bytes.device)
            <= self.length.long()[:, None]
        )


@dataclass(frozen=True)
class Scenes:
    """A corpus and the art to render it, on one device.

    clip_tokens: int16 [N, C, context], CLIP's tokens of its captions, if they are known.
    """

    corpus: Corpus
    atlas: Tensor
    clip_tokens: Tensor | None = None

    @classmethod
    def load(
        cls,
        path: Path | None,
        device: torch.device,
        seed: int = 0,
        scenes: int = _OWN_SCENES,
        images: bool = True,
    ) -> Scenes:
        """Return the corpus of a file, or without one a corpus of `scenes` sampled at once.

        images: load the art too. Raises FileNotFoundError without the file, or without the art if
        it is needed.
        """
        atlas = (art.atlas() if images else torch.empty(0)).to(device)
        known = corpus.load(path) if path is not None else corpus.generate(scenes, seed, 1)
        return cls(known.to(device), atlas)

    @property
    def device(self) -> torch.device:
        """Return the device of the corpus and the art."""
        return self.atlas.device

    @cached_property
    def of_aspect(self) -> tuple[Tensor, ...]:
        """Return the numbers of the scenes of each of ASPECTS."""
        return tuple(
            (self.corpus.aspect == number).nonzero()[:, 0] for number in range(len(ASPECTS))
        )

    def images(self, index: Tensor, aspect: int = 0) -> Tensor:
        """Return the images [B, 3, H, W] of 0 … 1 of scenes [B], all of one aspect."""
        return as_float(
            render(self.corpus.layouts[index], self.atlas, *ASPECTS[aspect]), self.device
        )

    @cached_property
    def small_atlas(self) -> Tensor:
        """Return the art at half its size."""
        return torch.cat(
            [F.avg_pool2d(part.float(), 2).round().to(torch.uint8) for part in self.atlas.split(64)]
        )

    def small_images(self, index: Tensor, aspect: int = 0) -> Tensor:
        """Return the same as `images`, at half the size."""
        width, height = ASPECTS[aspect]
        small = render(self._halved(index), self.small_atlas, width // 2, height // 2)
        return as_float(small, self.device)

    def _halved(self, index: Tensor) -> Layouts:
        drawn = self.corpus.layouts[index]
        return replace(drawn, centre=drawn.centre / 2, length=drawn.length / 2)

    def sprites(self, index: Tensor, aspect: int = 0) -> Tensor:
        """Return the things of scenes [B] without background, at a quarter of the images' size.

        The result is uint8 [B, 4, H/4, W/4], premultiplied by alpha.
        """
        width, height = ASPECTS[aspect]
        halved = render(
            self._halved(index), self.small_atlas, width // 2, height // 2, sprites_only=True
        )
        return F.avg_pool2d(halved.float(), 2).round().to(torch.uint8)

    def text(self, index: Tensor, which: Tensor, longest: int | None = None) -> Text:
        """Return captions number `which` [B] of scenes [B], cut to the first `longest` bytes."""
        cut = self.corpus.text.shape[-1] - 1 if longest is None else longest
        return Text(
            self.corpus.text[index, which, :cut], self.corpus.length[index, which].clamp(max=cut)
        )

    def stated(self, index: Tensor, which: Tensor) -> dict[str, Tensor]:
        """Return the classes [B] that a caption states, per attribute."""
        return dict(
            zip(
                self.corpus.attributes,
                self.corpus.stated[index, which].long().unbind(-1),
                strict=True,
            )
        )

    def own(self, index: Tensor, which: Tensor, asked: Tensor) -> dict[str, Tensor]:
        """Return the classes [B · k] of the things at the bytes `asked` [B, k], per attribute.

        A class is −1 at a byte that belongs to no thing.
        """
        span = self.corpus.span[index, which]  # [B, 3, 2]
        things = self.corpus.things[index, which].long()  # [B, 3, T]
        inside = (asked[..., None] >= span[:, None, :, 0]) & (
            asked[..., None] < span[:, None, :, 1]
        )  # [B, k, 3]
        place = inside.int().argmax(-1)
        classes = things.gather(1, place[..., None].expand(-1, -1, things.shape[-1]))
        classes = classes.masked_fill(~inside.any(-1, keepdim=True), -1).flatten(0, 1)
        return dict(zip(self.corpus.thing_attributes, classes.unbind(-1), strict=True))

    def some(self, count: int, among: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return random scenes [count], and for each the number of one of its captions [count].

        among: the numbers of the scenes to choose from, by default all.
        """
        n = len(self.corpus) if among is None else len(among)
        index = (torch.rand(count, device=self.device) * n).long().clamp_(max=n - 1)
        which = (torch.rand(count, device=self.device) * self.corpus.text.shape[1]).long()
        return (index if among is None else among[index]), which

    def shorter_than(self, longest: int) -> Tensor:
        """Return the numbers of the square scenes with captions of at most `longest` bytes."""
        short = (self.corpus.length <= longest).all(-1)
        return (short & (self.corpus.aspect == 0)).nonzero()[:, 0]

    def captions(self, count: int) -> Iterator[str]:
        """Return the captions of the first `count` scenes as text."""
        return (
            self.corpus.caption(i, which)
            for i in range(min(count, len(self.corpus)))
            for which in range(self.corpus.text.shape[1])
        )


def as_float(pixels: Tensor, device: torch.device) -> Tensor:
    """Turn uint8 images into float32 of 0 … 1 on the device."""
    return pixels.to(device, non_blocking=True).float().div_(255)
