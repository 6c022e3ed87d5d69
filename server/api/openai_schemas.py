"""The fields of OpenAI's image endpoints, with the native ones that its clients send as `extra_body`, and what they mean here."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, model_validator

from model.config import Operation
from server.api.images.decode import MaskMode
from server.api.picture_fields import PictureFile, PictureFiles
from server.api.schemas import Format, RecipeFields, Regions, Share, Text, WordsText

Quality = Literal["low", "medium", "high"]
AnyQuality = Literal["auto", "low", "medium", "high", "xhigh", "max", "standard", "hd"]

QUALITIES: dict[AnyQuality, Quality] = {
    "auto": "medium",
    "low": "low",
    "medium": "medium",
    "standard": "medium",
    "high": "high",
    "hd": "high",
    "xhigh": "high",
    "max": "high",
}
# Times the recipe's steps.
STEPS: dict[Quality, float] = {"low": 0.5, "medium": 1.0, "high": 2.0}
MOST_STEPS = 64
FILES: dict[str, Format] = {"png": "png", "jpeg": "jpeg", "webp": "webp"}

Size = tuple[int, int] | None


class ImagesFields(RecipeFields):
    """What all of OpenAI's image endpoints take. null is the same as absent."""

    size: Annotated[str, Field(max_length=32, description="WIDTHxHEIGHT in pixels; auto: native, or the picture's own")] = "auto"
    quality: Annotated[
        AnyQuality, Field(description="Denoising steps: low half of the recipe's, high, hd, xhigh and max twice; else the recipe's")
    ] = "auto"
    output_format: Annotated[Literal["png", "jpeg", "webp", "gif", "svg"], Field(description="gif and svg are answered with 400")] = "png"
    output_compression: Annotated[int | None, Field(ge=0, le=100, description="JPEG and WebP: their quality; default: 90")] = None
    response_format: Annotated[Literal["b64_json", "url"], Field(description="url is answered with 400")] = "b64_json"
    background: Annotated[Literal["auto", "opaque", "transparent"], Field(description="transparent is answered with 400")] = "auto"
    user: Annotated[Text | None, Field(description="Taken, and neither used nor kept")] = None
    safety_identifier: Annotated[Text | None, Field(description="As user")] = None

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, sent: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in sent.items() if value is not None}

    @property
    def file_format(self) -> Format:
        """Of the pictures in the answer."""
        return FILES.get(self.output_format, "png")

    @property
    def file_quality(self) -> int:
        return 90 if self.output_compression is None else max(1, self.output_compression)

    @property
    def effective_quality(self) -> Quality:
        return QUALITIES[self.quality]

    def native(self, size: Size, recipe_steps: int) -> tuple[Operation, dict[str, Any]]:
        """The native request that does this: its operation and its fields. size: (width, height) as asked for; None: auto."""
        raise NotImplementedError

    def _common(self, size: Size, recipe_steps: int) -> dict[str, Any]:
        fields: dict[str, Any] = {name: getattr(self, name) for name in RecipeFields.model_fields}
        if self.num_inference_steps is None:
            fields["num_inference_steps"] = min(MOST_STEPS, max(1, round(STEPS[self.effective_quality] * recipe_steps)))
        return fields if size is None else fields | {"width": size[0], "height": size[1]}


class GenerationsRequest(ImagesFields):
    """Text → image."""

    prompt: WordsText
    moderation: Annotated[Literal["auto", "low"], Field(description="Taken; nothing is moderated here")] = "auto"
    style: Annotated[Literal["vivid", "natural"] | None, Field(description="Taken; the prompt says what style it is to be")] = None
    regions: Regions = ()

    def native(self, size: Size, recipe_steps: int) -> tuple[Operation, dict[str, Any]]:
        return "generate", {**self._common(size, recipe_steps), "prompt": self.prompt, "regions": self.regions}


class EditsRequest(ImagesFields):
    """Picture → image: what is transparent in the mask drawn anew, or, without one, the whole picture over its own structure."""

    prompt: WordsText
    image: Annotated[PictureFiles, Field(min_length=1, max_length=8, description="The first is edited; the others say what is to be seen")]
    mask: Annotated[PictureFile | None, Field(description="As large as the first image; where its alpha is 0, that is drawn anew")] = None
    input_fidelity: Annotated[
        Literal["high", "low"] | None, Field(description="Without mask and strength: high keeps more of the picture, strength 0.4")
    ] = None
    moderation: Annotated[Literal["auto", "low"], Field(description="Taken; nothing is moderated here")] = "auto"
    strength: Annotated[Share | None, Field(description="Without mask: how much of the picture is turned to noise first; default: 0.6")] = (
        None
    )
    mask_mode: Annotated[MaskMode, Field(description="luminance: what is white is drawn anew")] = "alpha"
    keep_unmasked: Annotated[bool, Field(description="Pixels outside the mask come back bit for bit")] = True

    def native(self, size: Size, recipe_steps: int) -> tuple[Operation, dict[str, Any]]:
        first, *others = self.image
        shown = {"prompt": self.prompt, "image": first, "references": others}
        if self.mask is None:
            return "edit", {**self._common(size, recipe_steps), **shown, **self._strength()}
        # In the picture's own size: whoever asks for another is told so when it is known.
        masked = {"mask": self.mask, "mask_mode": self.mask_mode, "keep_unmasked": self.keep_unmasked}
        return "inpaint", {**self._common(None, recipe_steps), **shown, **masked}

    def _strength(self) -> dict[str, float]:
        if self.strength is not None:
            return {"strength": self.strength}
        return {"strength": 0.4} if self.input_fidelity == "high" else {}


class VariationRequest(ImagesFields):
    """Picture → other pictures that show the same."""

    image: Annotated[PictureFiles, Field(min_length=1, max_length=8)]
    prompt: Annotated[Text, Field(description="What else they should show")] = ""

    def native(self, size: Size, recipe_steps: int) -> tuple[Operation, dict[str, Any]]:
        return "variations", {**self._common(size, recipe_steps), "image": self.image, "prompt": self.prompt}


# ── answers ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


class ImageData(BaseModel):
    """seed is an extension."""

    b64_json: str
    seed: int


class InputDetails(BaseModel):
    text_tokens: int
    image_tokens: int


class Usage(BaseModel):
    """text: the prompt's bytes. image: the VQGAN's tokens, and one for each picture that says what is to be seen."""

    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    total_tokens: int


class ImagesResponse(BaseModel):
    """OpenAI's answer. size, quality, background and output_format: as they took effect."""

    created: int
    data: list[ImageData]
    usage: Usage
    size: str
    quality: Quality
    background: Literal["opaque"]
    output_format: Format
