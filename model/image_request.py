"""Everything that decides what one image looks like. No torch here: the API process reads it too.

Images, masks and weights are bytes with a size and a digest, so that a request is small to compare
and its parts can be cached by content. `model/row_builder.py` turns requests into rows.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pickle import PickleBuffer
from typing import Any, SupportsIndex

import numpy as np
from numpy.typing import NDArray

from model.config import Interpolation, SamplingConfig


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

    picture: InputImage
    mask: InputImage


@dataclass(frozen=True, slots=True)
class Edit:
    """Begin with the image, the share `strength` of it turned to noise. As large as the request."""

    picture: InputImage
    strength: float


@dataclass(frozen=True, slots=True)
class Reference:
    """An image of any size whose CLIP embedding counts `weight` among the other references'."""

    picture: InputImage
    weight: float


@dataclass(frozen=True, slots=True)
class Keyframe:
    """One end of an interpolation: a prompt, or an image of any size with the prompt beside it."""

    prompt: str
    picture: InputImage | None = None


@dataclass(frozen=True, slots=True)
class Region:
    """A prompt for a part of the image. weight: as large as the request."""

    prompt: str
    weight: InputImage


@dataclass(frozen=True, slots=True)
class ImageRequest:
    """One image to draw. width, height: pixels, multiples of the bundle's size step.

    canvas: what the row begins from, nothing but noise if absent. references: their mixed CLIP
    embedding stands in for the prior's. keyframes: if any, the image is a frame at `position` among
    them (1.5 is half way between the second and the third), on the path that `mode` names.
    cache_scope: decides nothing about the image; encodings are shared only within one scope, so
    that the time that a request takes reveals nothing about those of other scopes.
    """

    prompt: str
    seed: int
    width: int
    height: int
    sampling: SamplingConfig
    negative_prompt: str = ""
    canvas: Repaint | Edit | None = None
    references: tuple[Reference, ...] = ()
    keyframes: tuple[Keyframe, ...] = ()
    position: float = 0.0
    mode: Interpolation = "slerp"
    regions: tuple[Region, ...] = ()
    cache_scope: str = ""

    @property
    def prompts(self) -> tuple[str, ...]:
        """Every text that a conditional branch reads."""
        return conditional_prompts(self.prompt, self.keyframes, self.regions)


def steps_skipped(strength: float, steps: int) -> int:
    """Return how many of a schedule's steps lie before the one at which as much is noise."""
    return steps - round(strength * steps)


def conditional_prompts(
    prompt: str, keyframes: tuple[Keyframe, ...], regions: tuple[Region, ...]
) -> tuple[str, ...]:
    """Return the prompts of the keyframes, or else the prompt; then those of the regions."""
    first = tuple(keyframe.prompt for keyframe in keyframes) or (prompt,)
    return first + tuple(region.prompt for region in regions)
