"""The fields of the operations that begin with pictures. Their bounds here are the validation and the documentation."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, Field, model_validator

from server.api.images.decode import MaskMode
from server.api.picture_fields import PictureFile, PictureFiles
from server.api.schemas import STRICT, Format, Regions, SamplingFields, Share, Text, WordsText
from server.engine.protocol import Mode

AnyFormat = Format | Literal["gif", "json"]
References = Annotated[
    PictureFiles,
    Field(max_length=7, description="Pictures that say, with the prompt, what is to be seen: as /variations reads them, all alike"),
]
Margin = Annotated[int, Field(ge=0, le=4096, description="Pixels added on this side; at least one of the four must be above 0")]


class InpaintRequest(SamplingFields):
    """A part of a picture drawn anew. Width and height, if given, must be the picture's."""

    prompt: WordsText
    image: PictureFile
    mask: Annotated[PictureFile | None, Field(description="As large as the image; default: the image's own transparency")] = None
    mask_mode: Annotated[
        MaskMode | None,
        Field(description="alpha: transparent is repainted; luminance: white is; default: alpha if the mask has an alpha channel"),
    ] = None
    keep_unmasked: Annotated[bool, Field(description="Pixels outside the mask come back bit for bit")] = True
    references: References = Field(default_factory=list)
    regions: Regions = ()


class OutpaintRequest(SamplingFields):
    """A picture continued beyond its edges. Width and height, if given, must be those of the result."""

    prompt: Annotated[Text, Field(description="Empty: the picture is continued")] = ""
    image: PictureFile
    left: Margin = 0
    right: Margin = 0
    up: Margin = 0
    down: Margin = 0
    regions: Regions = ()


class VariationsRequest(SamplingFields):
    """Other pictures that show the same, as CLIP sees it."""

    image: Annotated[PictureFiles, Field(min_length=1, max_length=8)]
    weights: Annotated[
        list[Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]] | None, Field(description="One for each image; default: equal")
    ] = None
    prompt: Annotated[Text, Field(description="What else they should show")] = ""


class EditRequest(SamplingFields):
    """A picture drawn anew over its own structure. Width and height, if given, are what it is scaled to first."""

    prompt: WordsText
    image: PictureFile
    strength: Annotated[Share, Field(description="How much of it is turned to noise first: 0 returns it, 1 ignores it")] = 0.6
    references: References = Field(default_factory=list)


class KeyframeEntry(BaseModel):
    """What an interpolation comes by: a prompt or a picture."""

    model_config = STRICT

    prompt: WordsText | None = None
    image: PictureFile | None = None

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if (self.prompt is None) == (self.image is None):
            raise ValueError("needs a prompt or an image, and not both")
        return self


class InterpolateRequest(SamplingFields):
    """Pictures on the way between others, all from the same noise."""

    keyframes: Annotated[list[KeyframeEntry], Field(min_length=2, max_length=8)]
    frames: Annotated[int, Field(ge=2, le=64, description="How many pictures, the first and the last keyframe included")] = 16
    mode: Annotated[Mode, Field(description="The path between two keyframes: straight, or along the great circle")] = "slerp"
    prompt: Annotated[Text, Field(description="Goes with the keyframes that are images")] = ""
    n: Literal[1] = 1
    # One more format than the other operations know.
    response_format: Annotated[AnyFormat | None, Field(description="Overrides the Accept header; gif and webp are animations")] = None  # type: ignore[assignment]
