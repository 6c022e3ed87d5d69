"""Fields of the native endpoints' requests and answers; their bounds validate and document them."""

from __future__ import annotations

import base64
import re
from typing import Annotated, Any, Literal, Self
from urllib.parse import unquote

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from model.compositing import FEATHER, MAX_FEATHER
from model.config import Interpolation, RenoiseMode, RenoiseOrder, Sampler
from server.api.images.decoded_image import MaskMode
from server.api.images.encode import Format
from server.api.images.fit import FitMode, ReturnSize
from server.engine.job import Priority

INT64 = 2**63
# Characters of a prompt, as in OpenAI's API. Encoders read their own limits' worth of it.
MAX_TEXT = 32_000
STRICT = ConfigDict(extra="forbid", strict=True, frozen=True)

AnyFormat = Literal[Format, "gif", "json", "url"]


# ── text and numbers ──────────────────────────────────────────────────────────────────────────────

# The two text validators as patterns for the document, read alike by Python's and ECMA's engines.
_VISIBLE = (
    r"[^\s\x00-\x1f\x7f-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f"
    r"\u202a-\u202e\u2060-\u206f\u2800\u3164\ufe00-\ufe0f\ufeff\uffa0]"
)
_NO_NUL = r"^[^\x00]*$"
_NOT_BLANK = rf"^[^\x00]*{_VISIBLE}[^\x00]*$"


def _without_nul(text: str) -> str:
    if "\0" in text:
        raise ValueError("may not hold NUL characters; remove them")
    return text


def _not_blank(text: str) -> str:
    if not re.search(_VISIBLE, text):
        raise ValueError(
            "must hold more than white space and invisible characters: describe the image"
        )
    return text


def _pair(value: object) -> object:
    if value is None:
        return None
    return tuple(value) if isinstance(value, list) else (value, value)


def format_name(value: object) -> object:
    """Return a format's name in lower case; the common file name extension stands for JPEG."""
    name = value.lower() if isinstance(value, str) else value
    return "jpeg" if name == "jpg" else name


def _as_tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def _above_zero(pixels: int) -> int:
    if pixels < 1:
        raise ValueError("must be a multiple of the weights' size_step (GET /v1/models) above 0")
    return pixels


def _drawn_seed(seed: int | None) -> int | None:
    """Return None, a random seed, for -1: programs for Stable Diffusion send that."""
    return None if seed == -1 else seed


Text = Annotated[
    str,
    Field(max_length=MAX_TEXT, json_schema_extra={"pattern": _NO_NUL}),
    AfterValidator(_without_nul),
]
NonBlankText = Annotated[
    Text,
    Field(min_length=1, json_schema_extra={"pattern": _NOT_BLANK}),
    AfterValidator(_not_blank),
]
Guidance = Annotated[float, Field(ge=0, le=30, allow_inf_nan=False)]
Temperature = Annotated[float, Field(ge=0.05, le=5, allow_inf_nan=False)]
StepCount = Annotated[int, Field(ge=0, le=64)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
AttentionWeight = Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)]
Scale = Annotated[
    float,
    Field(ge=1, le=4, allow_inf_nan=False, description="Factor of width and height, in pixels"),
]
Side = Annotated[int, Field(json_schema_extra={"exclusiveMinimum": 0}), AfterValidator(_above_zero)]
Seed = Annotated[int | None, Field(ge=-INT64, lt=INT64), AfterValidator(_drawn_seed)]


# ── images ────────────────────────────────────────────────────────────────────────────────────────

# One letter is a drive of Windows.
URL_SCHEME = re.compile(r"([a-z][a-z0-9+.-]{1,30}):", re.IGNORECASE)
IMAGE_DESCRIPTION = (
    "A PNG, JPEG, WebP, GIF, AVIF or (if the server has its decoder) HEIC file: base64 or a data "
    "URL in JSON, a file in a form"
)
# Those of the alphabet for URLs, as the usual ones.
_URL_SAFE = bytes.maketrans(b"-_", b"+/")
# Likely mistakes, by what is around the first character that is not base64's.
MOST_BEFORE = 60
_HINTS = {
    "the text begins with a byte order mark; leave it out": re.compile(r"\A\ufeff"),
    "'data:…;base64,' is there twice": re.compile(r"\Adata:"),
    "'data:' is missing before it": re.compile(r"\A\w+/[\w+-]+;"),
    "this is Python's b'…'; send base64.b64encode(…).decode()": re.compile(r"\Ab['\"]"),
    "line breaks are escaped twice; send none": re.compile(r"\\[nr]\Z"),
    "was '+' decoded as a space?": re.compile(r" .?\Z", re.DOTALL),
    "is it the name of a file?": re.compile(r"[.:\\].?\Z", re.DOTALL),
}
_NOT_BASE64 = re.compile(r"[^A-Za-z0-9+/=\r\n\t_-]")


def file_bytes(sent: object) -> bytes:
    """Return an image file sent as bytes, base64 (of either alphabet) or a data URL with base64.

    Raises:
        PydanticCustomError: for anything else.
    """
    if isinstance(sent, bytes):
        return sent
    if not isinstance(sent, str):
        message = "one image is expected, as a file, base64 or a data URL"
        raise PydanticCustomError("image_type", message)
    text, is_url = _payload(sent.strip())
    return _from_base64(text.strip(), is_url)


def _payload(sent: str) -> tuple[str, bool]:
    """Return the part of a data URL after the comma, or all of a text that is no URL."""
    scheme = URL_SCHEME.match(sent)
    if scheme is None:
        return sent, False
    if scheme[1].lower() == "sha256":
        message = (
            "this is the digest of the image that was used, as in an image's parameters; "
            "send the image itself, as base64, a data URL or a file"
        )
        raise PydanticCustomError("image_digest", message)
    if scheme[1].lower() != "data":
        message = (
            "{scheme} URLs are refused, because the server fetches nothing; "
            "send the image as base64, a data URL or a file"
        )
        raise PydanticCustomError("image_url", message, {"scheme": scheme[1].lower()})
    head, comma, payload = sent.partition(",")
    if not comma or not head.lower().replace(" ", "").endswith(";base64"):
        message = "a data URL must hold base64: data:image/png;base64,…"
        raise PydanticCustomError("image_encoding", message)
    return unquote(payload) if "%" in payload else payload, True


def _from_base64(text: str, is_url: bool) -> bytes:
    """Return the bytes. Data URLs and the alphabet for URLs are commonly written without padding.

    Raises PydanticCustomError that says what is wrong.
    """
    if " " in text and "\n" in text:  # indented, as in YAML
        text = "\n".join(line.strip() for line in text.split("\n"))
    stray = _NOT_BASE64.search(text)
    if stray is not None:
        hint = _hint(text[max(0, stray.start() - MOST_BEFORE) : stray.end() + 1])
        raise _no_base64(f"character {stray.start() + 1} is {stray[0]!r}{hint}")
    # Mail and command-line encoders break lines.
    letters = text.encode().translate(None, b"\r\n\t")
    standard = letters.translate(_URL_SAFE)
    lacking = -len(standard) % 4
    if lacking == 3 or (lacking and not is_url and standard == letters):
        raise _no_base64(f"{len(letters)} characters are no multiple of 4; it may be cut off")
    try:
        return base64.b64decode(standard + b"=" * lacking, validate=True)
    except ValueError:
        raise _no_base64("there is padding, '=', before its end") from None


def _hint(around: str) -> str:
    """Return the likely mistake behind a character that is not base64's.

    around: what precedes it, the character, and the next one.
    """
    return next((f": {hint}" for hint, found in _HINTS.items() if found.search(around)), "")


def _no_base64(reason: str) -> PydanticCustomError:
    message = "must be base64, or a data URL that holds it; {reason}"
    return PydanticCustomError("image_encoding", message, {"reason": reason})


def as_list(sent: Any) -> Any:
    """Return a list; null as an empty one, anything else as a list of one."""
    return [] if sent is None else sent if isinstance(sent, list) else [sent]


Base64Text = Annotated[str, Field(min_length=1, description=IMAGE_DESCRIPTION)]

ImageBytes = Annotated[
    bytes,
    BeforeValidator(file_bytes, json_schema_input_type=Base64Text),
    Field(description=IMAGE_DESCRIPTION),
]
"""One image file."""

ImageBytesList = Annotated[
    list[ImageBytes],
    BeforeValidator(as_list, json_schema_input_type=Base64Text | list[Base64Text]),
]
"""One image file or several; give it `Field(max_length=…)`."""


# ── common fields ─────────────────────────────────────────────────────────────────────────────────


class AttentionWeights(BaseModel):
    """Factors on the attention that the denoiser gives to the prompt and to the prior's image."""

    model_config = STRICT

    text: Annotated[AttentionWeight, Field(description="Factor for the prompt's bytes")] = 1.0
    image: Annotated[
        AttentionWeight, Field(description="Factor for the prior's image, or the sent one")
    ] = 1.0


PromptRead = Annotated[
    str | None, Field(max_length=2**17, description="As in an image's parameters; ignored")
]


class RecipeFields(BaseModel):
    """Fields of every endpoint that generates images, OpenAI's included.

    Absent fields follow the recipe of the preset.
    """

    model_config = STRICT

    preset: Annotated[
        str | None,
        Field(
            max_length=64,
            description="Named recipe of the weights, such as quality or fast; /v1/models lists"
            " them. Default: the weights' default preset, or quality for a request that this preset"
            " does not suit",
        ),
    ] = None

    negative_prompt: Annotated[
        Text, Field(description="Content to avoid; replaces the empty unconditional prompt")
    ] = ""
    n: Annotated[
        int,
        Field(
            ge=1,
            le=16,
            description="Number of images; image i of seed s equals image 0 of seed s + i",
        ),
    ] = 1
    seed: Annotated[
        Seed, Field(description="Random seed; absent or -1: chosen, and part of the answer")
    ] = None
    num_inference_steps: Annotated[
        int | None, Field(ge=1, le=64, description="Denoising steps")
    ] = None
    guidance_scale: Annotated[
        tuple[Guidance, Guidance] | None,
        BeforeValidator(_pair, json_schema_input_type=Guidance | tuple[Guidance, Guidance] | None),
        Field(description="Classifier-free guidance, a number or [start, end]; 1 is off"),
    ] = None
    temperature: Annotated[
        tuple[Temperature, Temperature] | None,
        BeforeValidator(
            _pair, json_schema_input_type=Temperature | tuple[Temperature, Temperature] | None
        ),
        Field(description="Sampling temperature of the tokens, a number or [start, end]"),
    ] = None
    sampler: Annotated[Sampler | None, Field(description="Method that samples tokens")] = None
    typical_mass: Annotated[
        float | None,
        Field(ge=0, le=1, allow_inf_nan=False, description="Probability mass of sampler typical"),
    ] = None
    renoise_steps: Annotated[
        StepCount | None, Field(description="Number of first steps that add noise again")
    ] = None
    renoise_mode: Annotated[
        RenoiseMode | None,
        Field(description="Source of the noise: start tokens, tokens before the step, or random"),
    ] = None
    renoise_order: Annotated[
        RenoiseOrder | None,
        Field(
            description="Tokens that become noise again: random ones, evenly spread ones (halton),"
            " or those that the denoiser is least sure of (confidence)"
        ),
    ] = None
    guidance_steps: Annotated[
        StepCount | None, Field(description="Number of first steps with guidance")
    ] = None
    guidance_start: Annotated[
        Fraction | None,
        Field(
            description="Start of the steps with guidance, as a fraction of all steps; not beside"
            " guidance_steps"
        ),
    ] = None
    guidance_end: Annotated[
        Fraction | None, Field(description="End of the steps with guidance; as guidance_start")
    ] = None
    attention_weights: Annotated[
        AttentionWeights | None,
        Field(description="Factors on the attention to the prompt's text and to the prior's image"),
    ] = None
    prompt_read: PromptRead = None
    timeout_s: Annotated[
        float | None,
        Field(
            ge=0.05,
            le=600,
            allow_inf_nan=False,
            description="Deadline, in seconds from arrival; after it the answer is an error 504",
        ),
    ] = None
    priority: Annotated[
        Priority, Field(description="batch requests give way to interactive ones")
    ] = "interactive"
    deterministic: Annotated[
        bool | None,
        Field(
            description="Bit-identical images whatever else runs; slower, because no step is shared"
        ),
    ] = None
    model: Annotated[
        str | None, Field(max_length=64, description="Name of loaded weights; default: the first")
    ] = None
    model_sha256: Annotated[
        str | None,
        Field(
            max_length=64,
            description="Hash of the weights that must draw, as in an image's parameters; other"
            " weights are an error",
        ),
    ] = None
    stream: Annotated[
        bool, Field(description="Answer with server-sent events: queue position to images")
    ] = False
    partial_images: Annotated[
        int,
        Field(
            ge=0,
            le=8,
            description="With stream: maximum number of previews of each image, evenly spread over"
            " its steps; ignored without stream",
        ),
    ] = 0

    @property
    def needs_steps(self) -> bool:
        """Return whether few steps draw it worse than many.

        So it is with regions, and where a share of an image is kept, because how much is counted in
        steps (docs/operations.md has the figures).
        """
        return bool(getattr(self, "regions", ()))


class SamplingFields(RecipeFields):
    """Fields of every native endpoint."""

    width: Annotated[
        Side | None,
        Field(
            description="Pixels, a multiple of the weights' size step; default: their native size",
        ),
    ] = None
    height: Annotated[Side | None, Field(description="As width")] = None
    response_format: Annotated[
        Literal[Format, "json", "url"] | None,
        BeforeValidator(format_name),
        Field(description="Overrides the Accept header; url: JSON with URLs of stored PNGs"),
    ] = None
    quality: Annotated[int, Field(ge=1, le=100, description="Quality of JPEG and WebP")] = 90


class RegionEntry(BaseModel):
    """A prompt for a part of the image."""

    model_config = STRICT

    prompt: NonBlankText
    box: Annotated[
        tuple[Fraction, Fraction, Fraction, Fraction] | None,
        BeforeValidator(_as_tuple),
        Field(description="[x0, y0, x1, y1] as fractions of the image, origin top left"),
    ] = None
    mask: Annotated[
        ImageBytes | None,
        Field(description="Instead of a box: the region is the part that /inpaint would repaint"),
    ] = None
    weight: Annotated[
        Fraction, Field(description="Weight in the region; the main prompt has the rest")
    ] = 1.0
    softness: Annotated[
        Fraction,
        Field(description="Width of the border's ramp, as a fraction of half the shorter side"),
    ] = 0.0
    prompt_read: PromptRead = None

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
    Field(
        max_length=8,
        description="Other prompts for parts of the image; each costs one more branch",
    ),
    BeforeValidator(_as_tuple),
]
AutoRegions = Annotated[
    bool | None,
    Field(
        description="Draw two to four things of the prompt each by a separate prompt, in a separate"
        " part of the image; not beside regions. Default: the preset's choice"
    ),
]
References = Annotated[
    ImageBytesList,
    Field(
        max_length=15,
        description="Images of the wanted content, as in /variations; equal weights",
    ),
]
Margin = Annotated[
    int,
    Field(
        ge=0,
        le=4096,
        description="Pixels of the sent image added on this side; at least one side above 0",
    ),
]
FitChoice = Annotated[
    FitMode,
    Field(
        description="Adapt the image to another ratio: crop to the centre, pad and draw the rest,"
        " or stretch"
    ),
]
ReturnSizeChoice = Annotated[
    ReturnSize,
    Field(
        description="Size of the answer: result, as drawn; or original, the sent image's, with"
        " its own pixels where they are kept"
    ),
]
Feather = Annotated[
    int,
    Field(
        ge=0,
        le=MAX_FEATHER,
        description="Scale of the seam's correction in pixels; 0: drawn pixels as they are",
    ),
]
KeepUnmasked = Annotated[
    bool, Field(description="Return pixels outside the mask unchanged, bit for bit")
]
AnimationChoice = Annotated[
    AnyFormat | None,
    BeforeValidator(format_name),
    Field(
        description="Overrides the Accept header; gif and webp are animations; url: JSON with URLs"
        " of stored PNGs"
    ),
]


ImageSide = Annotated[
    Side | None,
    Field(
        description="Pixels; default: the image's, scaled down to the server's limits. An absent"
        " side follows from the other, in the image's ratio"
    ),
]
CanvasSide = Annotated[
    Side | None,
    Field(
        description="Pixels, in the canvas' ratio; default: the canvas', scaled down to the"
        " server's limits"
    ),
]
ResultSide = Annotated[
    Side | None,
    Field(description="Pixels of the result, which follow from `scale`; another value is an error"),
]


# ── requests ──────────────────────────────────────────────────────────────────────────────────────


class Hires(BaseModel):
    """A second pass, in which an image is drawn again, larger."""

    model_config = STRICT

    scale: Scale = 2.0
    strength: Annotated[
        Fraction, Field(description="Fraction of the scaled image that is drawn again")
    ] = 0.3
    steps: Annotated[
        int | None,
        Field(
            ge=1,
            le=64,
            description="Denoising steps, of which the pass takes the fraction `strength`;"
            " default: num_inference_steps",
        ),
    ] = None


class GenerateRequest(SamplingFields):
    """Text to image."""

    prompt: NonBlankText
    regions: Regions = ()
    auto_regions: AutoRegions = None
    hires: Annotated[
        Hires | None,
        Field(
            description="Draw the image at width and height, then again `scale` times as large, by"
            " the same request without guidance"
        ),
    ] = None

    @property
    def needs_steps(self) -> bool:
        """Return whether there are regions, or a second pass, which keeps some of the first."""
        return super().needs_steps or self.hires is not None


class InpaintRequest(SamplingFields):
    """Repaint a part of an image. Width and height, if given, scale it first."""

    width: ImageSide = None
    height: ImageSide = None
    prompt: NonBlankText
    image: ImageBytes
    mask: Annotated[
        ImageBytes | None,
        Field(
            description="As large as the image; values between are blended; default: the image's "
            "own transparency"
        ),
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
    references: References = Field(default_factory=list)
    regions: Regions = ()


class OutpaintRequest(SamplingFields):
    """Extend an image beyond its edges. Width and height, if given, must keep its ratio."""

    width: CanvasSide = None
    height: CanvasSide = None
    prompt: Annotated[Text, Field(description="Empty: continue the image")] = ""
    image: ImageBytes
    left: Margin = 0
    right: Margin = 0
    up: Margin = 0
    down: Margin = 0
    feather: Feather = FEATHER
    return_size: ReturnSizeChoice = "result"
    regions: Regions = ()


class VariationsRequest(SamplingFields):
    """Other images with the same content, as CLIP sees it."""

    image: Annotated[ImageBytesList, Field(min_length=1, max_length=8)]
    weights: Annotated[
        Annotated[list[Fraction], Field(max_length=8)] | None,
        Field(description="Weight of each image; default: equal"),
    ] = None
    prompt: Annotated[Text, Field(description="Additional content of the images")] = ""
    fit: FitChoice = "crop"


class EditRequest(SamplingFields):
    """Redraw an image, keeping its structure. Width and height, if given, scale it first."""

    width: ImageSide = None
    height: ImageSide = None
    prompt: NonBlankText
    image: ImageBytes
    strength: Annotated[
        Fraction,
        Field(description="Fraction turned to noise first: 0 returns the image, 1 ignores it"),
    ] = 0.6
    fit: FitChoice = "crop"
    return_size: ReturnSizeChoice = "result"
    references: References = Field(default_factory=list)

    @property
    def needs_steps(self) -> bool:
        """Return whether some of the image is kept."""
        return self.strength < 1


class UpscaleRequest(SamplingFields):
    """Enlarge an image and draw its detail, by default without guidance.

    Width and height, if given, must be the result's.
    """

    width: ResultSide = None
    height: ResultSide = None
    prompt: Annotated[Text, Field(description="Empty: the image itself is the content")] = ""
    image: ImageBytes
    scale: Scale = 2.0
    strength: Annotated[
        float,
        Field(
            ge=0,
            le=0.6,
            allow_inf_nan=False,
            description="Fraction of the scaled image that is drawn",
        ),
    ] = 0.3

    @property
    def needs_steps(self) -> bool:
        """Return true: most of the image is kept."""
        return True

    def scale_for(self, size: tuple[int, int]) -> float:
        """Return the scale for an upright image of this size, (width, height) in pixels."""
        return self.scale


class EditOrInpaintRequest(EditRequest):
    """OpenAI's edit without a mask: /inpaint if the image is transparent anywhere, else /edit."""

    keep_unmasked: KeepUnmasked = True
    feather: Feather = FEATHER

    @property
    def inpaint(self) -> InpaintRequest:
        """The request to repaint the transparent part."""
        names = InpaintRequest.model_fields.keys() & type(self).model_fields.keys()
        return InpaintRequest.model_construct(**{name: getattr(self, name) for name in names})


class KeyframeEntry(BaseModel):
    """A point of an interpolation: a prompt or an image."""

    model_config = STRICT

    prompt: NonBlankText | None = None
    prompt_read: PromptRead = None
    image: ImageBytes | None = None

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if (self.prompt is None) == (self.image is None):
            raise ValueError("needs a prompt or an image, and not both")
        return self


class InterpolateRequest(SamplingFields):
    """Images between prompts or images, all from the same noise."""

    keyframes: Annotated[list[KeyframeEntry], Field(min_length=2, max_length=8)]
    frames: Annotated[
        int, Field(ge=2, le=64, description="Number of images, first and last keyframe included")
    ] = 16
    mode: Annotated[
        Interpolation,
        Field(description="Path between two keyframes: linear (lerp) or spherical (slerp)"),
    ] = "slerp"
    prompt: Annotated[Text, Field(description="Prompt of the keyframes that are images")] = ""
    n: Literal[1] = 1
    # One more format than the other operations have.
    response_format: AnimationChoice = None  # type: ignore[assignment]


# ── answers ───────────────────────────────────────────────────────────────────────────────────────


class ImageEntry(BaseModel):
    """One image of a JSON answer: its file, or with response_format url its URL."""

    b64_json: str | None = None
    url: str | None = None
    seed: int
    width: int
    height: int
    format: Format


class ImagesAnswer(BaseModel):
    """The JSON answer. parameters: all effective values; timings: seconds per stage."""

    id: str
    created: int
    model: str
    images: list[ImageEntry]
    parameters: dict[str, Any]
    timings: dict[str, float]


class ErrorDetail(BaseModel):
    """An error: a message for people, a stable code for programs, the field at fault if any."""

    message: str
    type: Literal["invalid_request_error", "rate_limit_error", "server_error"]
    param: str | None
    code: str


class ErrorAnswer(BaseModel):
    """The body of every error answer."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "error": {
                    "message": "n: must be a whole number from 1 to 16 (sent: 17)",
                    "type": "invalid_request_error",
                    "param": "n",
                    "code": "invalid_value",
                }
            }
        }
    )

    error: ErrorDetail
