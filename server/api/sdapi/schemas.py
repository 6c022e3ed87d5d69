"""Fields of AUTOMATIC1111's endpoints, and their meaning as native fields.

Unknown fields are ignored, because its clients send about 45 of them. null and an empty text mean
that a field is absent.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from functools import cache
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)
from pydantic_core import PydanticCustomError, PydanticUseDefault

from model.compositing import MAX_FEATHER
from model.config import FAST, QUALITY, BundleConfig, Operation, Preset, Recipe
from server.api.errors import invalid_value
from server.api.images.fit import Size
from server.api.planning.sizes import drawn_size
from server.api.schemas import (
    Fraction,
    Hires,
    ImageBytes,
    ImageBytesList,
    Scale,
    Seed,
    Text,
    UpscaleRequest,
)
from server.api.validation import json_schema
from server.settings import Settings

MAX_IMAGES = 16
MAX_GUIDANCE = 30.0
# The cfg_scale that stands for the recipe's guidance; 1 is none, and others follow linearly.
CFG_SCALE = 7.0
# Steps that clients of few-step models send: a preset of fewer takes them too, where it can.
FEW_STEPS = 4
# Previews of a request's images together; each image has at least one.
PREVIEWS = 2
# Names of upscalers that add no detail.
PLAIN_UPSCALERS = frozenset({"none", "lanczos", "nearest"})

# The field `fit` by resize_mode; 3 is "just resize (latent upscale)".
FITS = ("stretch", "crop", "pad", "stretch")
Name = Annotated[Text, Field(max_length=200)]
# Clients send 0 and 1 too.
Flag = Annotated[
    bool, BeforeValidator(lambda sent: sent, json_schema_input_type=bool | Literal[0, 1])
]

# The field that chooses the model of one request.
CHECKPOINT = "override_settings.sd_model_checkpoint"


def _ignored_unless(is_used: Callable[[dict[str, Any]], bool]) -> WrapValidator:
    """Return a validator that takes the default for a wrong value of a field without effect.

    Clients send the fields of what they have switched off too. is_used: says by the fields before
    this one whether it has an effect.
    """

    def validate(sent: Any, handler: ValidatorFunctionWrapHandler, info: ValidationInfo) -> Any:
        try:
            return handler(sent)
        except ValidationError:
            if is_used(info.data):
                raise
            raise PydanticUseDefault from None

    return WrapValidator(validate)


HIRES_ONLY = _ignored_unless(lambda sent: sent.get("enable_hr") is True)
MASKED_ONLY = _ignored_unless(lambda sent: sent.get("mask") is not None)
UNMASKED_ONLY = _ignored_unless(lambda sent: sent.get("mask") is None)
FACTOR_ONLY = _ignored_unless(lambda sent: sent.get("resize_mode") == 0)
SIZE_ONLY = _ignored_unless(lambda sent: sent.get("resize_mode") == 1)


def _known_settings(sent: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that have a meaning here."""
    return {
        "sd_model_checkpoint": sent.get("sd_model_checkpoint") or None,
        "live_previews_enable": sent.get("live_previews_enable") is not False,
    }


@cache
def _numbers(schema: type[BaseModel]) -> frozenset[str]:
    """Return the names of a request's fields that are numbers."""

    def is_number(kind: dict[str, Any]) -> bool:
        types = {branch.get("type") for branch in kind.get("anyOf", [kind])}
        return bool(types & {"integer", "number"}) and "boolean" not in types

    fields = json_schema(schema)["properties"].items()
    return frozenset(name for name, kind in fields if is_number(kind))


class SdFields(BaseModel):
    """A request to one of AUTOMATIC1111's endpoints."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _without_empty(cls, sent: dict[str, Any]) -> dict[str, Any]:
        numbers = _numbers(cls)
        return {
            # pydantic would read true as 1. As text it is no number.
            name: json.dumps(value) if isinstance(value, bool) and name in numbers else value
            for name, value in sent.items()
            if value != ""
        }

    @property
    def sent_names(self) -> dict[str, str]:
        """The fields as the client names them, by the native names that errors have."""
        return {"model": "sd_model_checkpoint"}


class SdRequest(SdFields):
    """Fields of the endpoints that draw."""

    job: ClassVar[str]

    prompt: Text = ""
    negative_prompt: Text = ""
    seed: Annotated[Seed, Field(description="Random seed; -1, the default: random")] = None
    batch_size: Annotated[int, Field(ge=1, le=MAX_IMAGES, description="Images, times n_iter")] = 1
    n_iter: Annotated[int, Field(ge=1, le=MAX_IMAGES, description="Images, times batch_size")] = 1
    steps: Annotated[
        int | None,
        Field(
            description="Denoising steps; default and maximum: the preset's. As few as the preset"
            " fast has, or up to 4 if it can take them, choose it, unless it cannot follow the"
            " negative prompt"
        ),
    ] = None
    cfg_scale: Annotated[
        float,
        Field(allow_inf_nan=False, description="Guidance: 1 is none, 7 the recipe's, linearly"),
    ] = CFG_SCALE
    width: Annotated[int | None, Field(ge=1, description="Pixels; default: the native size")] = None
    height: Annotated[int | None, Field(ge=1, description="As width")] = None
    sampler_name: Annotated[
        Name | None, Field(description="One of /samplers; others are accepted and reported")
    ] = None
    sampler_index: Annotated[
        Any, Field(description="As sampler_name, which wins; others than /samplers are ignored")
    ] = None
    override_settings: Annotated[
        dict[str, Any],
        AfterValidator(_known_settings),
        Field(description="sd_model_checkpoint: the model; live_previews_enable: false for none"),
    ] = Field(default_factory=lambda: _known_settings({}))
    send_images: Annotated[Flag, Field(description="Whether the answer has the images")] = True

    def native(self, config: BundleConfig, settings: Settings) -> tuple[Operation, dict[str, Any]]:
        """Return the operation and the fields of the native request that does the same.

        config: of the weights that draw. Raises ApiError 422 for contradictory fields.
        """
        raise NotImplementedError

    @property
    def sent_names(self) -> dict[str, str]:
        """The fields as the client names them, by the native names that errors have."""
        names = {
            "n": "batch_size",
            "num_inference_steps": "steps",
            "guidance_scale": "cfg_scale",
            "sampler": "sampler_name",
        }
        return super().sent_names | names | ({"model": CHECKPOINT} if self.checkpoint else {})

    @property
    def cropped_size(self) -> Size | None:
        """(width, height) to which the images are cropped, None if they are not."""
        return None

    def without_files(self) -> SdRequest:
        """Return the request without its images, which are large and not needed any more."""
        return self

    @property
    def echoed(self) -> dict[str, Any]:
        """The answer's `parameters`: the request's fields."""
        return self.model_dump()

    @property
    def checkpoint(self) -> object:
        """The model that the request chooses, None if it chooses none."""
        return self.override_settings["sd_model_checkpoint"]

    def details(self, config: BundleConfig, settings: Settings) -> dict[str, object]:
        """Return what the images' text says beyond the common fields."""
        return {}

    def _common(self, config: BundleConfig) -> dict[str, Any]:
        images = self.batch_size * self.n_iter
        if images > MAX_IMAGES:
            allowed = f"must be at most {MAX_IMAGES} when multiplied by n_iter"
            raise invalid_value("batch_size", allowed, images)
        sampler = (self.sampler_name or str(self.sampler_index)).lower()
        shows_previews = bool(self.override_settings["live_previews_enable"])
        name = self.preset(config)
        preset = config.preset(name)
        return {
            "prompt": self.prompt,
            "negative_prompt": self.negative_prompt,
            "seed": self.seed,
            "n": images,
            "model": config.name,
            "preset": name,
            "num_inference_steps": clamped_steps(self.steps, preset),
            "guidance_scale": guidance(self.cfg_scale, preset.recipe) if preset.guided else None,
            "sampler": sampler if sampler in config.samplers else None,
            # Only a stream has previews.
            "stream": shows_previews,
            "partial_images": max(1, PREVIEWS // images) if shows_previews else 0,
        }

    def preset(self, config: BundleConfig) -> str:
        """Return the preset that draws: its clients choose by the number of steps.

        A few steps without a negative prompt are for `fast`, none at all for the default one.
        What few steps draw worse is for `quality`, as with the native endpoints.
        """
        name = config.default_preset if self.steps is None else FAST
        if name not in config.preset_names or self.needs_steps:
            return QUALITY
        preset = config.preset(name)
        too_many = self.steps is not None and self.steps > most_steps(preset)
        is_unsuited = bool(self.negative_prompt.strip()) and not preset.guided
        return QUALITY if too_many or is_unsuited else name

    @property
    def needs_steps(self) -> bool:
        """Return whether some of an image is kept, see `RecipeFields`."""
        return False

    @property
    def _size(self) -> dict[str, Any]:
        return {"width": self.width, "height": self.height}


def most_steps(preset: Preset) -> int:
    """Return how many steps a client may have.

    These are the recipe's, or FEW_STEPS if that is more, and in the preset's range.
    """
    return max(preset.recipe.num_inference_steps, min(FEW_STEPS, preset.steps[1]))


def clamped_steps(steps: int | None, preset: Preset) -> int | None:
    """Return a client's number of steps, within the preset's; None if it sent none."""
    if steps is None:
        return None
    return max(preset.steps[0], min(steps, most_steps(preset)))


def guidance(cfg_scale: float, recipe: Recipe) -> tuple[float, float] | None:
    """Return the guidance at the first and the last step; None is the recipe's."""
    if cfg_scale == CFG_SCALE:
        return None
    share = (cfg_scale - 1) / (CFG_SCALE - 1)
    first, last = (
        round(min(MAX_GUIDANCE, max(0.0, 1 + share * (scale - 1))), 4)
        for scale in recipe.guidance_scale
    )
    return first, last


class Txt2ImgRequest(SdRequest):
    """Text to image."""

    job = "txt2img"

    enable_hr: Annotated[
        Flag, Field(description="Draw again, hr_scale times as large, by denoising_strength")
    ] = False
    hr_scale: Annotated[
        float, Field(allow_inf_nan=False, description="1…4, with enable_hr"), HIRES_ONLY
    ] = 2.0
    denoising_strength: Annotated[
        Fraction | None,
        Field(description="With enable_hr: fraction turned to noise before"),
        HIRES_ONLY,
    ] = None
    hr_second_pass_steps: Annotated[int, Field(description="0: as steps"), HIRES_ONLY] = 0
    hr_resize_x: Annotated[
        int, Field(description="Width of the result, instead of hr_scale"), HIRES_ONLY
    ] = 0
    hr_resize_y: Annotated[
        int, Field(description="Height of the result, likewise; both: cropped to them"), HIRES_ONLY
    ] = 0

    @property
    def needs_steps(self) -> bool:
        """Return whether there is a second pass."""
        return self.enable_hr

    @property
    def sent_names(self) -> dict[str, str]:
        """As in every request, and those of the second pass."""
        return super().sent_names | {
            "hires.scale": self._scaling_field,
            "hires.strength": "denoising_strength",
            "hires.steps": "hr_second_pass_steps" if self.hr_second_pass_steps else "steps",
        }

    @property
    def cropped_size(self) -> Size | None:
        """The size that was asked for, if the second pass has one."""
        width, height = self.hr_resize_x, self.hr_resize_y
        return (width, height) if self.enable_hr and width > 0 and height > 0 else None

    def native(self, config: BundleConfig, settings: Settings) -> tuple[Operation, dict[str, Any]]:
        """Return /generate."""
        hires = self._hires(config, settings) if self.enable_hr else None
        return "generate", {**self._common(config), **self._size, "hires": hires}

    def details(self, config: BundleConfig, settings: Settings) -> dict[str, object]:
        """Return the second pass."""
        if not self.enable_hr:
            return {}
        hires = self._hires(config, settings)
        size = self.cropped_size
        return {
            "Denoising strength": hires.strength,
            **({"Hires resize": "{}x{}".format(*size)} if size else {"Hires upscale": hires.scale}),
            "Hires steps": hires.steps,
            "Hires upscaler": "Paella",
        }

    @property
    def _scaling_field(self) -> str:
        if self.hr_resize_x > 0:
            return "hr_resize_x"
        return "hr_resize_y" if self.hr_resize_y > 0 else "hr_scale"

    def _hires(self, config: BundleConfig, settings: Settings) -> Hires:
        drawn = drawn_size(self.width, self.height, config, settings)
        scale: float = self.hr_scale
        sent: object = scale
        if self._scaling_field != "hr_scale":
            wanted = max(0, self.hr_resize_x), max(0, self.hr_resize_y)
            scale, sent = covering_scale(drawn, wanted), "{}x{}".format(*wanted)
        _check_scale(self._scaling_field, scale, "drawn", drawn, sent)
        preset = config.preset(self.preset(config))
        steps = clamped_steps(self.hr_second_pass_steps or self.steps, preset)
        strength = {} if self.denoising_strength is None else {"strength": self.denoising_strength}
        return Hires(scale=scale, steps=steps, **strength)


def covering_scale(size: Size, wanted: Size) -> float:
    """Return by how much an image is enlarged to cover a size; a side of 0 pixels is any."""
    return max(wanted[0] / size[0], wanted[1] / size[1])


def _check_scale(param: str, scale: float, kind: str, size: Size, sent: object) -> None:
    """Raise ApiError 422 for a result that is smaller than its image, or too large.

    Args:
        param: the field to name.
        scale: of the result.
        kind: of the image, in words.
        size: (width, height) of the image in pixels.
        sent: what the client asked for.
    """
    if not 1 <= scale <= 4:
        width, height = size
        sizes = f"{width}x{height} to {4 * width}x{4 * height}"
        allowed = f"the result may be 1 to 4 times as large as the {kind} image: {sizes}"
        raise invalid_value(param, allowed, sent)


def _some_image(sent: object) -> object:
    if sent == []:
        raise PydanticCustomError("image_missing", "one image is required")
    return sent


class Img2ImgRequest(SdRequest):
    """Redraw an image, or with a mask only a part of it."""

    job = "img2img"

    init_images: Annotated[
        ImageBytesList, Field(min_length=1, max_length=1), BeforeValidator(_some_image)
    ]
    mask: Annotated[
        ImageBytes | None,
        Field(description="White is repainted, or what is opaque if the mask is transparent"),
    ] = None
    mask_blur: Annotated[
        float | None,
        Field(ge=0, allow_inf_nan=False, description="Pixels, as `feather`, rounded"),
        MASKED_ONLY,
    ] = None
    inpainting_mask_invert: Annotated[
        Flag, Field(description="Repaint the other part"), MASKED_ONLY
    ] = False
    inpaint_full_res: Annotated[
        Flag,
        Field(description="With a mask: in the image's own size, not width and height"),
        MASKED_ONLY,
    ] = True
    resize_mode: Annotated[
        int, Field(ge=0, le=3, description="0, 3: stretch; 1: crop; 2: fill")
    ] = 0
    include_init_images: Annotated[Flag, Field(description="Return the sent images too")] = False
    denoising_strength: Annotated[
        Fraction, Field(description="Without a mask: fraction turned to noise first"), UNMASKED_ONLY
    ] = 0.75

    @property
    def needs_steps(self) -> bool:
        """Return whether there is no mask, as with /edit."""
        return self.mask is None and self.denoising_strength < 1

    @property
    def sent_names(self) -> dict[str, str]:
        """As in every request, and those of the image and its mask."""
        return super().sent_names | {
            "image": "init_images.0",
            "strength": "denoising_strength",
            "feather": "mask_blur",
            "fit": "resize_mode",
            "return_size": "inpaint_full_res",
        }

    def native(self, config: BundleConfig, settings: Settings) -> tuple[Operation, dict[str, Any]]:
        """Return /inpaint with a mask, /edit without."""
        fields = {**self._common(config), "image": self.init_images[0]}
        fitted = {**self._size, "fit": FITS[self.resize_mode]}
        if self.mask is None:
            return "edit", {**fields, **fitted, "strength": self.denoising_strength}
        masked: dict[str, Any] = {"mask": self.mask, "mask_mode": "luminance"}
        if self.mask_blur is not None:
            masked["feather"] = min(MAX_FEATHER, round(self.mask_blur))
        placed = {"return_size": "original"} if self.inpaint_full_res else fitted
        return "inpaint", {**fields, **masked, **placed}

    def details(self, config: BundleConfig, settings: Settings) -> dict[str, object]:
        """Return strength, or blur."""
        if self.mask is None:
            return {"Denoising strength": self.denoising_strength}
        return {"Mask blur": self.mask_blur}

    def without_files(self) -> SdRequest:
        """Return the request without its images, unless the answer has them too."""
        if self.include_init_images:
            return self
        mask = None if self.mask is None else b""
        return self.model_copy(update={"init_images": [], "mask": mask})

    @property
    def echoed(self) -> dict[str, Any]:
        """The request's fields; its images in base64 if they are asked for, otherwise null."""
        files: dict[str, Any] = {"init_images": None, "mask": None}
        if self.include_init_images:
            files = {"init_images": [_base64(each) for each in self.init_images]}
            files["mask"] = None if self.mask is None else _base64(self.mask)
        return self.model_dump(exclude=set(files)) | files


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


class Enlargement(UpscaleRequest):
    """/upscale by a factor or, with `covered`, by what it takes to cover a size.

    covered: (width, height) in pixels; 0 is any.
    """

    scale: Scale = 1.0
    covered: Size | None = None

    def scale_for(self, size: Size) -> float:
        """Return the factor for an upright image of this size. Raises ApiError 422."""
        if self.covered is None:
            return self.scale
        param = "upscaling_resize_w" if self.covered[0] else "upscaling_resize_h"
        scale = covering_scale(size, self.covered)
        _check_scale(param, scale, "sent", size, "{}x{}".format(*self.covered))
        return scale


class ExtrasRequest(SdFields):
    """Fields of the endpoints that enlarge images."""

    resize_mode: Annotated[
        Literal[0, 1], Field(description="0: by a factor; 1: to a width and a height")
    ] = 0
    upscaling_resize: Annotated[Scale, Field(description="Factor"), FACTOR_ONLY] = 2.0
    upscaling_resize_w: Annotated[
        int, Field(ge=0, description="Pixels, with resize_mode 1"), SIZE_ONLY
    ] = 512
    upscaling_resize_h: Annotated[
        int, Field(ge=0, description="Pixels, with resize_mode 1"), SIZE_ONLY
    ] = 512
    upscaling_crop: Annotated[
        Flag,
        Field(
            description="With resize_mode 1: crop what is larger than width and height, around the"
            " middle"
        ),
        SIZE_ONLY,
    ] = True
    upscaler_1: Annotated[
        Name, Field(description="None, Lanczos, Nearest: without new detail; others: with it")
    ] = "None"

    @property
    def sent_names(self) -> dict[str, str]:
        """As in every request, and that of the factor."""
        by_size = "upscaling_resize_w" if self.upscaling_resize_w else "upscaling_resize_h"
        return super().sent_names | {"scale": by_size if self.resize_mode else "upscaling_resize"}

    @property
    def cropped_size(self) -> Size | None:
        """(width, height) to which the images are cropped, None if they are not."""
        width, height = self.upscaling_resize_w, self.upscaling_resize_h
        is_cropped = self.resize_mode == 1 and self.upscaling_crop and width and height
        return (width, height) if is_cropped else None

    def native(self, image: bytes) -> dict[str, Any]:
        """Return the fields of `Enlargement` for an image file."""
        by_size = {"covered": (self.upscaling_resize_w, self.upscaling_resize_h)}
        sized = by_size if self.resize_mode == 1 else {"scale": self.upscaling_resize}
        plain = {"strength": 0.0} if self.upscaler_1.lower() in PLAIN_UPSCALERS else {}
        return {"image": image, **sized, **plain}


class ExtraSingleImageRequest(ExtrasRequest):
    """Enlarge an image."""

    image: ImageBytes


class BatchEntry(BaseModel):
    """An image of several. Its name is ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    data: ImageBytes


class ExtraBatchImagesRequest(ExtrasRequest):
    """Enlarge images, all alike."""

    imageList: Annotated[  # noqa: N815
        list[BatchEntry], Field(min_length=1, max_length=MAX_IMAGES)
    ]


class PngInfoRequest(SdFields):
    """Read the parameters in an image."""

    image: ImageBytes


class OptionsRequest(SdFields):
    """Change options. Only the model can be changed."""

    sd_model_checkpoint: Annotated[
        Name | None, Field(description="Model of this client's next requests; it must be loaded")
    ] = None


# ── answers ───────────────────────────────────────────────────────────────────────────────────────


class SdAnswer(BaseModel):
    """Images in base64, the request's fields, and a JSON text about the images."""

    images: list[str]
    parameters: dict[str, Any]
    info: str


class ExtraAnswer(BaseModel):
    """An enlarged image in base64."""

    html_info: str
    image: str


class ExtraBatchAnswer(BaseModel):
    """Enlarged images in base64."""

    html_info: str
    images: list[str]


class PngInfoAnswer(BaseModel):
    """The text of an image's parameters, all its texts, and its parameters by name."""

    info: str
    items: dict[str, str]
    parameters: dict[str, Any]
