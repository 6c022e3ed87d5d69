"""Everything that decides what one image looks like. No torch here: the API process reads it too.

Images, masks and weights are bytes with a size and a digest, so that a request is small to compare
and its parts can be cached by content. `model/row_builder.py` turns requests into rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pickle import PickleBuffer
from typing import Any, SupportsIndex

import numpy as np
from numpy.typing import NDArray

from model.canvas import box_weight
from model.config import BundleConfig, Interpolation, SamplingConfig
from model.prompt_parts import Part
from model.tiles import Tiling


@dataclass(frozen=True, slots=True)
class InputImage:
    """A client's image, mask or weight, one row after the other.

    content: height × width × 3 bytes of RGB; or height × width bytes, of a mask (not 0: repaint) or
    of a region's weight (255: all of it). digest: a name for size and content.
    """

    width: int
    height: int
    content: bytes | memoryview
    digest: str

    @classmethod
    def of(cls, array: NDArray[np.uint8] | NDArray[np.bool_]) -> InputImage:
        """Copy an array [H, W, 3] or [H, W]; a bool becomes 0 or 1."""
        content = np.ascontiguousarray(array).view(np.uint8).tobytes()
        person = str(array.shape).encode()[:16]
        digest = hashlib.blake2b(content, digest_size=16, person=person).hexdigest()
        return cls(array.shape[1], array.shape[0], content, digest)

    @property
    def array(self) -> NDArray[np.uint8]:
        """The pixels [H, W, 3], or [H, W] where there is one byte a pixel; not to be written to."""
        flat = np.frombuffer(self.content, dtype=np.uint8)
        channels = flat.size // (self.width * self.height)
        return flat.reshape(self.height, self.width, *[channels] * (channels > 1))

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        content = out_of_band(self.content, protocol)
        return InputImage, (self.width, self.height, content, self.digest)


def out_of_band(content: bytes | memoryview, protocol: SupportsIndex) -> PickleBuffer | bytes:
    """Let a pickle of protocol 5 or newer leave a buffer out, to be sent as it lies in memory."""
    return PickleBuffer(content) if protocol.__index__() >= 5 else bytes(content)


@dataclass(frozen=True, slots=True)
class Repaint:
    """Inpainting and outpainting: new tokens where the mask touches them, the image's elsewhere.

    Both are as large as the request.
    """

    image: InputImage
    mask: InputImage


@dataclass(frozen=True, slots=True)
class Edit:
    """Begin with the image, the share `strength` of it turned to noise. As large as the request."""

    image: InputImage
    strength: float


@dataclass(frozen=True, slots=True)
class Refine:
    """Draw the share `strength` of the image's tokens anew, and keep the others.

    As large as the request.
    """

    image: InputImage
    strength: float


@dataclass(frozen=True, slots=True)
class Reference:
    """An image of any size whose CLIP embedding counts `weight` among the other references'."""

    image: InputImage
    weight: float


@dataclass(frozen=True, slots=True)
class Keyframe:
    """One end of an interpolation: a prompt, or an image of any size with the prompt beside it."""

    prompt: str
    image: InputImage | None = None


@dataclass(frozen=True, slots=True)
class Region:
    """A prompt for a part of the image. weight: as large as the request."""

    prompt: str
    weight: InputImage


def parted(parts: Sequence[Part], width: int, height: int) -> tuple[str, tuple[Region, ...]]:
    """Return the prompt and the regions of an image whose parts have prompts of their own.

    The first part's stands for the prompt, which has what the regions leave. width, height: pixels.
    """
    first, *others = parts
    regions = (
        Region(part.prompt, InputImage.of(box_weight(part.box, width, height))) for part in others
    )
    return first.prompt, tuple(regions)


@dataclass(frozen=True, slots=True)
class Tile:
    """The place of a request in a larger image that is drawn in tiles.

    All tiles share the larger image's randomness, each its own part, so that they agree where they
    overlap.

    x, y: upper left corner in the larger image, pixels, multiples of a token's side. width, height:
    of the larger image. prior_size: (width, height) of the request whose prior is the tiles' too.
    """

    x: int
    y: int
    width: int
    height: int
    prior_size: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Enlarge:
    """Draw images larger, in tiles that begin with the scaled image.

    size: (width, height) of the scaled image, the upper left part of the tiling's canvas. strength:
    the share of its tokens that is drawn anew. sampling: of the tiles. regions: with weights
    as large as the canvas. image: the client's image, scaled, as large as the canvas; None: the
    images are drawn first. sources: those images, scaled likewise, by number; None until they are
    drawn.
    """

    tiling: Tiling
    size: tuple[int, int]
    strength: float
    sampling: SamplingConfig
    regions: tuple[Region, ...] = ()
    image: InputImage | None = None
    sources: tuple[InputImage | None, ...] = ()

    @classmethod
    def of(
        cls,
        config: BundleConfig,
        size: tuple[int, int],
        scale: float,
        strength: float,
        sampling: SamplingConfig,
    ) -> Enlarge:
        """Return how images of `size` (width, height) are drawn `scale` times as large.

        The tiles are as large as the images that the weights were trained with.
        """
        width, height = round(size[0] * scale), round(size[1] * scale)
        step, least = config.size_step, config.smallest_side
        canvas = max(least, width + -width % step), max(least, height + -height % step)
        tiling = Tiling.of(canvas, config.native_size, config.vqgan.downscale)
        return cls(tiling, (width, height), strength, sampling)

    @property
    def steps(self) -> int:
        """Steps that each tile takes."""
        return self.sampling.steps - steps_skipped(self.strength, self.sampling.steps)

    def tile(self, request: ImageRequest, source: InputImage, number: int) -> ImageRequest:
        """Return the request for a tile.

        request: for the image before it is enlarged. source: that image, as large as the canvas.
        """
        tiling = self.tiling
        part = InputImage.of(tiling.part(source.array, number))
        regions = [
            Region(region.prompt, InputImage.of(tiling.part(region.weight.array, number)))
            for region in self.regions
        ]
        return replace(
            request,
            width=tiling.tile[0],
            height=tiling.tile[1],
            sampling=self.sampling,
            canvas=Refine(part, self.strength),
            regions=tuple(regions),
            tile=Tile(*tiling.corner(number), *tiling.canvas, request.prior_size),
        )


@dataclass(frozen=True, slots=True)
class ImageRequest:
    """One image to draw. width, height: pixels, multiples of the bundle's size step.

    canvas: what the row begins from, nothing but noise if absent. references: their mixed CLIP
    embedding stands in for the prior's. keyframes: if any, the image is a frame at `position` among
    them (1.5 is half way between the second and the third), on the path that `mode` names.
    tile: the place in the larger image of which this is a part.
    cache_scope: decides nothing about the image; encodings are shared only within one scope, so
    that the time that a request takes reveals nothing about those of other scopes.
    """

    prompt: str
    seed: int
    width: int
    height: int
    sampling: SamplingConfig
    negative_prompt: str = ""
    canvas: Repaint | Edit | Refine | None = None
    references: tuple[Reference, ...] = ()
    keyframes: tuple[Keyframe, ...] = ()
    position: float = 0.0
    mode: Interpolation = "slerp"
    regions: tuple[Region, ...] = ()
    cache_scope: str = ""
    tile: Tile | None = None

    @property
    def prior_size(self) -> tuple[int, int]:
        """(width, height) whose randomness the prior uses."""
        return (self.width, self.height) if self.tile is None else self.tile.prior_size

    @property
    def prompts(self) -> tuple[str, ...]:
        """Every text that a conditional branch reads."""
        return conditional_prompts(self.prompt, self.keyframes, self.regions)

    def read_as(self, readings: Mapping[str, str], negative_prompt: str) -> ImageRequest:
        """Return the request with other texts for some of its own, and for the negative prompt."""

        def read(text: str) -> str:
            return readings.get(text, text)

        return replace(
            self,
            prompt=read(self.prompt),
            negative_prompt=negative_prompt,
            keyframes=tuple(replace(each, prompt=read(each.prompt)) for each in self.keyframes),
            regions=tuple(replace(each, prompt=read(each.prompt)) for each in self.regions),
        )


def steps_skipped(strength: float, steps: int) -> int:
    """Return how many of a schedule's steps lie before the one at which as much is noise."""
    return steps - round(strength * steps)


def conditional_prompts(
    prompt: str, keyframes: tuple[Keyframe, ...], regions: tuple[Region, ...]
) -> tuple[str, ...]:
    """Return the prompts of the keyframes, or else the prompt; then those of the regions."""
    first = tuple(keyframe.prompt for keyframe in keyframes) or (prompt,)
    return first + tuple(region.prompt for region in regions)
