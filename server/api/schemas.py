"""The fields of requests and answers. Their bounds here are the validation and the documentation."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from model.config import RenoiseMode, Sampler
from server.api.picture_fields import PictureFile
from server.engine.protocol import Priority

INT64 = 2**63

Format = Literal["png", "jpeg", "webp"]


# The document's words for what the two validators say, in syntax that Python's and ECMA's engines read alike.
_SHOWN = r"[^\s\x00-\x1f\x7f-\x9f\ufeff]"
_NO_NUL = r"^[^\x00]*$"
_WORDS = rf"^[^\x00]*{_SHOWN}[^\x00]*$"


def _without_nul(text: str) -> str:
    if "\0" in text:
        raise ValueError("may not hold NUL characters")
    return text


def _with_words(text: str) -> str:
    if not re.search(_SHOWN, text):
        raise ValueError("must hold more than white space and control characters")
    return text


def _both_ends(value: object) -> object:
    if value is None:
        return None
    return tuple(value) if isinstance(value, list) else (value, value)


def _as_tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


Text = Annotated[str, Field(max_length=4000, json_schema_extra={"pattern": _NO_NUL}), AfterValidator(_without_nul)]
Guidance = Annotated[float, Field(ge=0, le=30, allow_inf_nan=False)]
Temperature = Annotated[float, Field(ge=0.05, le=5, allow_inf_nan=False)]
StepCount = Annotated[int, Field(ge=0, le=64)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
WordsText = Annotated[Text, Field(min_length=1, json_schema_extra={"pattern": _WORDS}), AfterValidator(_with_words)]

STRICT = ConfigDict(extra="forbid", strict=True, frozen=True)


class RecipeFields(BaseModel):
    """What every endpoint that draws takes, OpenAI's too. Absent fields follow the weights' own recipe."""

    model_config = STRICT

    negative_prompt: Annotated[Text, Field(description="Replaces the empty unconditional text")] = ""
    n: Annotated[int, Field(ge=1, le=16, description="Images; image i of seed s equals image 0 of seed s + i")] = 1
    seed: Annotated[int | None, Field(ge=-INT64, lt=INT64, description="Absent: drawn, and returned")] = None
    num_inference_steps: Annotated[int | None, Field(ge=1, le=64, description="Denoising steps")] = None
    guidance_scale: Annotated[
        tuple[Guidance, Guidance] | None,
        BeforeValidator(_both_ends, json_schema_input_type=Guidance | tuple[Guidance, Guidance]),
        Field(description="Classifier-free guidance, or its [start, end]; 1 is off"),
    ] = None
    temperature: Annotated[
        tuple[Temperature, Temperature] | None,
        BeforeValidator(_both_ends, json_schema_input_type=Temperature | tuple[Temperature, Temperature]),
        Field(description="Of the token draws, or its [start, end]"),
    ] = None
    sampler: Annotated[Sampler | None, Field(description="How tokens are drawn")] = None
    typical_mass: Annotated[float | None, Field(ge=0, le=1, allow_inf_nan=False, description="For the typical sampler")] = None
    renoise_steps: Annotated[StepCount | None, Field(description="After how many of the first steps noise is put back")] = None
    renoise_mode: Annotated[
        RenoiseMode | None,
        Field(description="Which noise: the start tokens, those of before the step (prev), or fresh ones (rand)"),
    ] = None
    guidance_steps: Annotated[StepCount | None, Field(description="How many of the first steps are guided")] = None
    timeout_s: Annotated[float | None, Field(ge=0.05, le=600, allow_inf_nan=False, description="The answer is worthless after this")] = None
    priority: Annotated[Priority, Field(description="Batch work makes room for interactive work")] = "interactive"
    deterministic: Annotated[
        bool | None, Field(description="The same bits whatever else runs, at the cost of steps that are shared with nobody")
    ] = None
    model: Annotated[str | None, Field(max_length=64, description="Which loaded weights; default: the first")] = None
    stream: Annotated[bool, Field(description="Answer with server-sent events, from the place in the queue to the pictures")] = False
    partial_images: Annotated[
        int, Field(ge=0, le=8, description="With stream: previews of each picture, at most, evenly spread over its steps")
    ] = 0


class SamplingFields(RecipeFields):
    """What every native endpoint takes."""

    width: Annotated[int | None, Field(ge=1, description="Pixels, a multiple of the weights' size step; default: their native size")] = None
    height: Annotated[int | None, Field(ge=1, description="As width")] = None
    response_format: Annotated[Format | Literal["json"] | None, Field(description="Overrides the Accept header")] = None
    quality: Annotated[int, Field(ge=1, le=100, description="JPEG and WebP")] = 90


class RegionEntry(BaseModel):
    """A prompt for a part of the picture."""

    model_config = STRICT

    prompt: WordsText
    box: Annotated[
        tuple[Share, Share, Share, Share] | None,
        BeforeValidator(_as_tuple),
        Field(description="[x0, y0, x1, y1] in shares of the picture, origin top left"),
    ] = None
    mask: Annotated[PictureFile | None, Field(description="Instead of a box: the region is what /inpaint would repaint")] = None
    weight: Annotated[Share, Field(description="How much it counts there; the main prompt has the rest")] = 1.0
    softness: Annotated[Share, Field(description="Its borders' ramp, in shares of half the picture's shorter side")] = 0.0

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if (self.box is None) == (self.mask is None):
            raise ValueError("needs a box or a mask, and not both")
        if self.box and not (self.box[0] < self.box[2] and self.box[1] < self.box[3]):
            raise ValueError("a box is [x0, y0, x1, y1] with x0 < x1 and y0 < y1")
        return self


Regions = Annotated[
    tuple[RegionEntry, ...],
    # Before the validator, or the document calls it a string's length.
    Field(max_length=8, description="Other prompts for parts of the picture; each costs one more branch"),
    BeforeValidator(_as_tuple),
]


class GenerateRequest(SamplingFields):
    """Text → image."""

    prompt: WordsText
    regions: Regions = ()


class ImageEntry(BaseModel):
    b64_json: str
    seed: int
    width: int
    height: int
    format: Format


class ImagesAnswer(BaseModel):
    """The JSON answer. parameters: everything as it took effect; timings: seconds per stage."""

    id: str
    created: int
    model: str
    images: list[ImageEntry]
    parameters: dict[str, Any]
    timings: dict[str, float]


class ErrorDetail(BaseModel):
    message: str
    type: Literal["invalid_request_error", "rate_limit_error", "server_error"]
    param: str | None
    code: str


class ErrorAnswer(BaseModel):
    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "error": {
                    "message": "n: Input should be less than or equal to 16 (sent: 17)",
                    "type": "invalid_request_error",
                    "param": "n",
                    "code": "invalid_value",
                }
            }
        }
    )

    error: ErrorDetail
