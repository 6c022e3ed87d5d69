"""Fields of OpenAI's image endpoints, and their meaning as native fields.

Native fields that OpenAI's API lacks come as the client's `extra_body`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from model.compositing import FEATHER
from model.config import FAST, QUALITY, BundleConfig, Operation
from server.api.images.decoded_image import MaskMode
from server.api.images.encode import Format
from server.api.planning.sampling_choice import fitting_preset
from server.api.schemas import (
    IMAGE_DESCRIPTION,
    STRICT,
    AutoRegions,
    Base64Text,
    Feather,
    FitChoice,
    Fraction,
    ImageBytesList,
    KeepUnmasked,
    NonBlankText,
    RecipeFields,
    Regions,
    ReturnSizeChoice,
    Text,
    as_list,
    file_bytes,
    format_name,
)

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
# Factors of the steps of the preset `quality`.
STEP_FACTORS: dict[Quality, float] = {"low": 0.5, "medium": 1.0, "high": 2.0}
MAX_STEPS = 64
# Fields of OpenAI's newest models that the weights have no counterpart of, and the advice.
UNSUPPORTED_FIELDS = {
    "complexity": "choose the number of steps by quality or num_inference_steps",
    "frame_count": "POST /interpolate makes animations",
    "frame_duration_ms": "POST /interpolate makes animations",
    "svg": "images are png, jpeg or webp",
    "markup": "send a mask for the part to change",
}
# OpenAI's models that answer with URLs unless they are asked for files. Without a model it is the
# first.
URL_MODELS = ("dall-e-2", "dall-e-3")
UNSUPPORTED = "Any value but null is answered with 400"

# OpenAI's most for one edit.
MAX_EDIT_IMAGES = 16

Size = tuple[int, int] | None


def _supported_format(sent: object) -> object:
    """Return a format's name. Raises PydanticCustomError for OpenAI's others than the server's."""
    name = format_name(sent)
    if name in ("gif", "svg"):
        raise PydanticCustomError("unsupported_format", "images are png, jpeg or webp")
    return name


# ── images ────────────────────────────────────────────────────────────────────────────────────────


class ImageReference(BaseModel):
    """An image in OpenAI's JSON."""

    model_config = STRICT

    image_url: Annotated[
        str, Field(min_length=1, description="A data URL with base64: data:image/png;base64,…")
    ]


def referenced_bytes(sent: object) -> bytes:
    """Return an image file sent as in native requests, or as OpenAI's `{"image_url": "data:…"}`.

    Raises:
        PydanticCustomError: for anything else.
    """
    if not isinstance(sent, dict):
        return file_bytes(sent)
    sent = {name: value for name, value in sent.items() if value is not None}
    if "file_id" in sent:
        message = (
            "this server keeps no files, so file_id is not supported; "
            'send the image as {"image_url": "data:image/png;base64,…"}'
        )
        raise PydanticCustomError("image_file_id", message)
    if set(sent) != {"image_url"} or not isinstance(sent["image_url"], str):
        message = (
            'an image in JSON is {"image_url": "data:image/png;base64,…"}, base64 or a data URL'
        )
        raise PydanticCustomError("image_reference", message)
    return file_bytes(sent["image_url"])


OpenAIImage = Annotated[
    bytes,
    BeforeValidator(referenced_bytes, json_schema_input_type=Base64Text | ImageReference),
    Field(description=IMAGE_DESCRIPTION),
]
SentList = Annotated[list[Base64Text | ImageReference], Field(max_length=MAX_EDIT_IMAGES)]
OpenAIImageList = Annotated[
    list[OpenAIImage],
    Field(max_length=MAX_EDIT_IMAGES),
    BeforeValidator(as_list, json_schema_input_type=Base64Text | ImageReference | SentList),
]


# ── requests ──────────────────────────────────────────────────────────────────────────────────────


class ImagesFields(RecipeFields):
    """Fields of all of OpenAI's image endpoints."""

    size: Annotated[
        str,
        Field(
            max_length=32,
            description="WIDTHxHEIGHT in pixels; auto: the native size, or the sent image's",
        ),
    ] = "auto"
    quality: Annotated[
        AnyQuality,
        Field(
            description="auto: the weights' default preset. low: the preset fast, or half of the"
            " steps of quality where the weights have none or it does not suit the request. medium,"
            " standard: quality. high, hd, xhigh, max: quality with twice its steps. Without effect"
            " beside preset"
        ),
    ] = "auto"
    output_format: Annotated[
        Format,
        BeforeValidator(_supported_format),
        Field(description="File format; OpenAI's gif and svg are answered with 400"),
    ] = "png"
    output_compression: Annotated[
        int | None,
        Field(
            ge=0,
            le=100,
            description="Quality of JPEG and WebP; default: 90. For PNG only 100, which changes"
            " nothing",
        ),
    ] = None
    response_format: Annotated[
        Literal["b64_json", "url"],
        BeforeValidator(format_name),
        Field(
            description="url: a file that this server keeps for a while; not for streams. Absent:"
            " both, if model is absent too, or is dall-e-2 or dall-e-3"
        ),
    ] = "b64_json"
    background: Annotated[
        Literal["auto", "opaque", "transparent"],
        Field(description="transparent is answered with 400"),
    ] = "auto"
    user: Annotated[Text | None, Field(description="Accepted, but neither used nor stored")] = None
    safety_identifier: Annotated[Text | None, Field(description="As user")] = None
    complexity: Annotated[Any, Field(description=UNSUPPORTED)] = None
    frame_count: Annotated[Any, Field(description=UNSUPPORTED)] = None
    frame_duration_ms: Annotated[Any, Field(description=UNSUPPORTED)] = None
    svg: Annotated[Any, Field(description=UNSUPPORTED)] = None
    markup: Annotated[Any, Field(description=UNSUPPORTED)] = None

    @property
    def file_quality(self) -> int:
        """Quality of JPEG and WebP, 1…100."""
        return 90 if self.output_compression is None else max(1, self.output_compression)

    @property
    def url_by_default(self) -> bool:
        """Return whether programs written for the requested model of OpenAI's expect a URL, too."""
        name = (self.model or URL_MODELS[0]).rpartition("/")[2]
        return name in URL_MODELS and "response_format" not in self.model_fields_set

    def effective_quality(self, preset: str) -> Quality:
        """Return the quality of images that a preset drew, one of three."""
        if self.preset is None and self.quality != "auto":
            return QUALITIES[self.quality]
        return "low" if preset == FAST else "medium"

    def native(self, size: Size, config: BundleConfig) -> tuple[Operation, dict[str, Any]]:
        """Return the operation and the fields of the native request that does the same.

        Args:
            size: requested (width, height), None for auto.
            config: of the weights that draw.
        """
        raise NotImplementedError

    def _common(self, size: Size, config: BundleConfig) -> dict[str, Any]:
        fields: dict[str, Any] = {name: getattr(self, name) for name in RecipeFields.model_fields}
        if self.preset is None:
            preset = self._preset(config)
            fields["preset"] = preset
            if preset == QUALITY and self.num_inference_steps is None:
                factor = STEP_FACTORS[QUALITIES[self.quality]]
                steps = round(factor * config.recipe.num_inference_steps)
                fields["num_inference_steps"] = min(MAX_STEPS, max(1, steps))
        return fields if size is None else fields | {"width": size[0], "height": size[1]}

    def _preset(self, config: BundleConfig) -> str:
        """Return the preset for the requested quality."""
        wanted = {"auto": config.default_preset, "low": FAST}.get(self.quality, QUALITY)
        return fitting_preset(wanted, self, config)


class GenerationsRequest(ImagesFields):
    """Text to image."""

    model_config = ConfigDict(title="OpenAIGenerationRequest")

    prompt: NonBlankText
    moderation: Annotated[
        Literal["auto", "low"], Field(description="Accepted without effect: nothing is moderated")
    ] = "auto"
    style: Annotated[
        Literal["vivid", "natural"] | None,
        Field(description="Accepted without effect: describe the style in the prompt"),
    ] = None
    regions: Regions = ()
    auto_regions: AutoRegions = None

    def native(self, size: Size, config: BundleConfig) -> tuple[Operation, dict[str, Any]]:
        """Return /generate."""
        own = {name: getattr(self, name) for name in ("prompt", "regions", "auto_regions")}
        return "generate", {**self._common(size, config), **own}


class EditsRequest(ImagesFields):
    """Repaint the masked part of an image, or its transparent part, or redraw all of it."""

    # Nothing is `required` where one of two fields is: generated clients cannot express that.
    model_config = ConfigDict(title="OpenAIEditRequest")

    prompt: NonBlankText
    image: Annotated[
        OpenAIImageList,
        Field(
            default_factory=list,
            description="Required unless there is `images`. The first is edited; the others show"
            " the wanted content",
        ),
    ]
    images: Annotated[
        OpenAIImageList,
        Field(
            default_factory=list,
            description="In place of image: its name in OpenAI's JSON",
        ),
    ]
    mask: Annotated[
        OpenAIImage | None,
        Field(
            description="As large as the first image; transparent pixels are repainted; default: "
            "the image's transparent ones"
        ),
    ] = None
    input_fidelity: Annotated[
        Literal["high", "low"] | None,
        Field(description="Without mask and strength: high keeps more of the image, strength 0.4"),
    ] = None
    moderation: Annotated[
        Literal["auto", "low"], Field(description="Accepted without effect: nothing is moderated")
    ] = "auto"
    strength: Annotated[
        Fraction | None,
        Field(description="Without mask: fraction turned to noise first; default: 0.6"),
    ] = None
    mask_mode: Annotated[
        MaskMode | None,
        Field(
            description="Repaint transparent (alpha) or white pixels (luminance); default: alpha "
            "if the mask is transparent anywhere"
        ),
    ] = None
    keep_unmasked: KeepUnmasked = True
    feather: Feather = FEATHER
    fit: FitChoice = "crop"
    return_size: ReturnSizeChoice = "result"

    @property
    def needs_steps(self) -> bool:
        """Return whether there is no mask, as with /edit."""
        return self.mask is None and self._strength().get("strength", 0.0) < 1

    @model_validator(mode="after")
    def _images_once(self) -> Self:
        if self.image and self.images:
            message = "send image or images, not both"
            raise PydanticCustomError("image_twice", message, {"param": "images"})
        if not self.image and not self.images:
            message = "required: the image to edit, or a list of at most {most}"
            details = {"param": "image", "most": MAX_EDIT_IMAGES}
            raise PydanticCustomError("image_missing", message, details)
        return self

    def native(self, size: Size, config: BundleConfig) -> tuple[Operation, dict[str, Any]]:
        """Return /inpaint with a mask; without, /edit, or /inpaint of a transparent image."""
        first, *others = self.image or self.images
        inputs = {
            **self._common(size, config),
            "prompt": self.prompt,
            "image": first,
            "references": others,
            "keep_unmasked": self.keep_unmasked,
            "feather": self.feather,
            "fit": self.fit,
            "return_size": self.return_size,
        }
        if self.mask is None:
            return "edit", {**inputs, **self._strength()}
        masked = {"mask": self.mask, "mask_mode": self.mask_mode}
        return "inpaint", {**inputs, **masked}

    def _strength(self) -> dict[str, float]:
        if self.strength is not None:
            return {"strength": self.strength}
        return {"strength": 0.4} if self.input_fidelity == "high" else {}


class VariationRequest(ImagesFields):
    """Other images with the same content."""

    model_config = ConfigDict(title="OpenAIVariationRequest")

    image: Annotated[ImageBytesList, Field(min_length=1, max_length=8)]
    prompt: Annotated[Text, Field(description="Additional content of the images")] = ""
    fit: FitChoice = "crop"

    def native(self, size: Size, config: BundleConfig) -> tuple[Operation, dict[str, Any]]:
        """Return /variations."""
        fields = self._common(size, config)
        own = {"image": self.image, "prompt": self.prompt, "fit": self.fit}
        return "variations", {**fields, **own}


# ── answers ───────────────────────────────────────────────────────────────────────────────────────


class ImageData(BaseModel):
    """One image, as its file or its URL. seed is an extension."""

    b64_json: str | None = None
    url: str | None = None
    seed: int


class InputDetails(BaseModel):
    """Input tokens by kind."""

    text_tokens: int
    image_tokens: int


class Usage(BaseModel):
    """Token counts. Text: bytes of prompts. Image: VQGAN tokens, and one per image read by CLIP."""

    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    total_tokens: int


class ImagesResponse(BaseModel):
    """OpenAI's answer. size, quality, background, output_format: effective values."""

    created: int
    data: list[ImageData]
    usage: Usage
    size: str
    quality: Quality
    background: Literal["opaque", "transparent"]
    output_format: Format
