"""Configurations of the networks, recipes and bundles, as frozen dataclasses. No torch here.

A `bundle.json` may come from anybody: every number has bounds, far beyond the published sizes, and
nothing in it names code or a place to fetch from. The bounds hold for what is parsed, by
`BundleConfig.read` and `BundleConfig.parse`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self, cast, get_args

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError, from_json, to_jsonable_python

_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)

MAX_SIDE = 8192  # pixels
MAX_LEVELS = 8

# Channels of a layer, and codes or tokens of a vocabulary.
Width = Annotated[int, Field(ge=1, le=65_536)]
Vocabulary = Annotated[int, Field(ge=2, le=2**20)]
# Channels of a sinusoidal embedding.
TimeWidth = Annotated[int, Field(ge=4, le=4096, multiple_of=2)]
Layers = Annotated[int, Field(ge=1, le=256)]
Blocks = Annotated[int, Field(ge=0, le=128)]
Heads = Annotated[int, Field(ge=1, le=1024)]
Ratio = Annotated[float, Field(gt=0, le=64)]
Side = Annotated[int, Field(ge=1, le=MAX_SIDE)]
# A file in the bundle's directory.
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]
Levels = Field(min_length=1, max_length=MAX_LEVELS)

# Where the text encoders are: with the other networks, on the CPU, or with them and ByT5's weights
# in int8.
Encoders = Literal["device", "cpu", "int8"]
# What computes the denoiser's steps; auto is Triton's kernels on CUDA, if Triton is installed.
Kernels = Literal["auto", "triton", "torch"]


@dataclass(frozen=True)
class ByteEncoderConfig:
    """The encoder half of a ByT5: the arguments of `transformers.T5Config`.

    max_bytes: most bytes of a prompt, end mark included.
    """

    __pydantic_config__ = _STRICT

    d_model: Width
    d_kv: Width
    d_ff: Width
    num_layers: Layers
    num_heads: Heads
    vocab_size: Annotated[int, Field(ge=259, le=2**20)] = 384
    relative_attention_num_buckets: Annotated[int, Field(ge=4, le=1024, multiple_of=4)] = 32
    relative_attention_max_distance: Annotated[int, Field(ge=2, le=65_536)] = 128
    feed_forward_proj: Literal["gated-gelu", "relu"] = "gated-gelu"
    max_bytes: Annotated[int, Field(ge=2, le=4096)] = 768

    def __post_init__(self) -> None:
        if self.relative_attention_max_distance <= self.relative_attention_num_buckets // 4:
            raise ValueError("relative_attention_max_distance must exceed a quarter of the buckets")


@dataclass(frozen=True)
class CLIPVisionConfig:
    """The sizes in open_clip's `vision_cfg`. layers: four numbers are a residual network's."""

    __pydantic_config__ = _STRICT

    image_size: Annotated[int, Field(ge=8, le=2048)] = 224
    patch_size: Annotated[int, Field(ge=1, le=256)] = 16
    width: Width = 768
    layers: Layers | tuple[Layers, Layers, Layers, Layers] = 12
    head_width: Width = 64
    mlp_ratio: Ratio = 4.0

    def __post_init__(self) -> None:
        if isinstance(self.layers, int):
            _divides("head_width", self.head_width, "width", self.width)
            _divides("patch_size", self.patch_size, "image_size", self.image_size)
        else:
            _divides("head_width", self.head_width, "32 width", 32 * self.width)


@dataclass(frozen=True)
class CLIPTextConfig:
    """The sizes in open_clip's `text_cfg`."""

    __pydantic_config__ = _STRICT

    context_length: Annotated[int, Field(ge=3, le=1024)] = 77
    vocab_size: Vocabulary = 49408
    width: Width = 512
    heads: Heads = 8
    layers: Layers = 12
    mlp_ratio: Ratio = 4.0

    def __post_init__(self) -> None:
        _divides("heads", self.heads, "width", self.width)


def _divides(name: str, divisor: int, of: str, number: int) -> None:
    if divisor < 1 or number % divisor:
        raise ValueError(f"{name} must divide {of}, and {divisor} does not divide {number}")


@dataclass(frozen=True)
class CLIPConfig:
    """The CLIP pair: sizes of open_clip's `vision_cfg` and `text_cfg`, and the tokenizer's merges.

    merges: name of a gzipped byte-pair merges file inside the bundle; None is open_clip's published
    vocabulary.
    """

    __pydantic_config__ = _STRICT

    embed_dim: Width
    vision_cfg: CLIPVisionConfig
    text_cfg: CLIPTextConfig
    quick_gelu: bool = False
    merges: FileName | None = None

    @property
    def context_length(self) -> int:
        """Tokens of a text, start and end marks included."""
        return self.text_cfg.context_length


# Maps of C to C channels in a block of each kind.
_MAPS = {"C": 8, "T": 0, "A": 4}


@dataclass(frozen=True)
class DenoiserV1Config:
    """The v1 denoiser (github.com/dome272/Paella, `DenoiseUNet`).

    The defaults count 577,995,184 parameters.

    down_levels: blocks of every level, finest first; up_levels: deepest first. c_hidden: the
    deepest level's width, halved for each above.
    """

    __pydantic_config__ = _STRICT

    schedule: ClassVar[Literal["cosine"]] = "cosine"

    num_labels: Width = 8192
    c_hidden: Width = 1280
    c_clip: Width = 1024
    c_r: TimeWidth = 64
    down_levels: Annotated[tuple[Blocks, ...], Levels] = (4, 8, 16)
    up_levels: Annotated[tuple[Blocks, ...], Levels] = (16, 8, 4)

    def __post_init__(self) -> None:
        for name in ("down_levels", "up_levels"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if len(self.down_levels) != len(self.up_levels):
            raise ValueError("down_levels and up_levels must name the same number of levels")
        _divides("2 to the number of halvings", self.token_step, "c_hidden", self.c_hidden)

    @property
    def token_step(self) -> int:
        """Divisor of the token grid's sides, which are halved once between every two levels."""
        return int(2 ** (len(self.down_levels) - 1))

    @property
    def work(self) -> float:
        """Multiplications of a step for one token of a branch, those of the blocks."""
        deepest = len(self.down_levels) - 1
        return sum(
            (down + up) * _MAPS["C"] * (self.c_hidden / 2 ** (deepest - level)) ** 2 / 4**level
            for level, (down, up) in enumerate(
                zip(self.down_levels, reversed(self.up_levels), strict=True)
            )
        )


@dataclass(frozen=True)
class VQGANV1Config:
    """The v1 VQGAN (github.com/CompVis/taming-transformers, `GumbelVQ`).

    The arguments are those of `ddconfig`, then the model's own; the defaults are ruDALL-E's f8.

    resolution, attn_resolutions: attention sits at the levels where a picture of `resolution`
    pixels would have one of these sides.
    """

    __pydantic_config__ = _STRICT

    double_z: bool = False
    z_channels: Width = 256
    resolution: Side = 256
    in_channels: Literal[3] = 3
    out_ch: Literal[3] = 3
    ch: Annotated[int, Field(ge=32, le=4096, multiple_of=32)] = 128
    ch_mult: Annotated[tuple[Annotated[int, Field(ge=1, le=64)], ...], Levels] = (1, 1, 2, 4)
    num_res_blocks: Layers = 2
    attn_resolutions: Annotated[tuple[Side, ...], Field(max_length=MAX_LEVELS)] = (32,)
    n_embed: Width = 8192
    embed_dim: Width = 256

    def __post_init__(self) -> None:
        for name in ("ch_mult", "attn_resolutions"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.double_z or self.z_channels != self.embed_dim:
            needed = "z_channels = embed_dim latents, not means and variances (double_z)"
            raise ValueError(f"the Gumbel quantiser takes {needed}")

    @property
    def widths(self) -> list[int]:
        """Channels of every level, finest first."""
        return [self.ch * factor for factor in self.ch_mult]

    @property
    def codebook_size(self) -> int:
        """Number of codes."""
        return self.n_embed

    @property
    def downscale(self) -> int:
        """Pixels per token and side: the picture is halved between each two levels."""
        return int(2 ** (len(self.ch_mult) - 1))

    def attends(self, level: int) -> bool:
        """Return whether a level has attention, for images of any size."""
        return self.resolution >> level in self.attn_resolutions


Sampler = Literal["multinomial", "argmax", "typical", "quant"]
PriorSampler = Literal["ddpm", "ddim"]
# How the share of noise falls from 1 to 0 over the steps: v3's way and v1's.
Schedule = Literal["linear", "cosine"]
# The path between two conditionings: straight, or along the great circle.
Interpolation = Literal["lerp", "slerp"]
# What takes a renoised token's place: its start token, what it was before the step, or a fresh
# random one.
RenoiseMode = Literal["start", "prev", "rand"]
# Which tokens become noise again: independent random ones; the first in a low-discrepancy order,
# which spreads them evenly; or those that the denoiser is least sure of.
RenoiseOrder = Literal["random", "halton", "confidence"]
Operation = Literal[
    "generate", "inpaint", "outpaint", "variations", "edit", "upscale", "interpolate", "regions"
]

CONFIG_FILE = "bundle.json"
# Of bundle.json; absent is 1. Presets came with 2.
FORMAT = 2
PRESETS_FORMAT: Literal[2] = 2
MAX_CONFIG_BYTES = 2**20


@dataclass(frozen=True)
class DenoiserConfig:
    """The v3 denoiser (github.com/dome272/Paella, `Paella`).

    The defaults count 1,008,350,592 parameters.
    """

    __pydantic_config__ = _STRICT

    schedule: ClassVar[Schedule] = "linear"

    byt5_embd: Width = 2560
    c_in: Width = 256
    c_out: Width = 256
    num_labels: Width = 8192
    c_r: TimeWidth = 64
    patch_size: Annotated[int, Field(ge=1, le=16)] = 2
    c_cond: Width = 1024
    c_hidden: Annotated[tuple[Width, ...], Levels] = (640, 1280, 1280)
    nhead: Annotated[tuple[Annotated[int, Field(ge=-1, le=1024)], ...], Levels] = (-1, 16, 16)
    blocks: Annotated[tuple[Blocks, ...], Levels] = (6, 16, 6)
    level_config: Annotated[tuple[Annotated[str, Field(max_length=8)], ...], Levels] = (
        "CT",
        "CTA",
        "CTA",
    )
    clip_embd: Width = 1024
    clip_seq_len: Annotated[int, Field(ge=1, le=256)] = 4
    kernel_size: Annotated[int, Field(ge=1, le=31)] = 3
    self_attn: bool = True

    def __post_init__(self) -> None:
        for name in ("c_hidden", "nhead", "blocks", "level_config"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if (
            len({len(self.c_hidden), len(self.nhead), len(self.blocks), len(self.level_config)})
            != 1
        ):
            raise ValueError(
                "c_hidden, nhead, blocks and level_config must name the same number of levels"
            )
        if unknown := set("".join(self.level_config)) - set("CTA"):
            raise ValueError(f"level_config may hold C, T and A, not {''.join(sorted(unknown))}")
        if self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, not {self.kernel_size}")
        for heads, width, kinds in zip(self.nhead, self.c_hidden, self.level_config, strict=True):
            if "A" in kinds:
                _divides("nhead", heads, "c_hidden", width)

    @property
    def token_step(self) -> int:
        """Divisor of the token grid's sides: the patch, halved once between every two levels."""
        return self.patch_size * 2 ** (len(self.c_hidden) - 1)

    @property
    def work(self) -> float:
        """Multiplications of a step for one token of a branch, those of the blocks' maps."""
        levels = zip(self.c_hidden, self.blocks, self.level_config, strict=True)
        return sum(
            2
            * blocks
            * sum(map(_MAPS.__getitem__, kinds))
            * width**2
            / (self.patch_size * 2**i) ** 2
            for i, (width, blocks, kinds) in enumerate(levels)
        )


@dataclass(frozen=True)
class VQGANConfig:
    """The v3 VQGAN (github.com/dome272/Paella, `VQModel`).

    Every level after the first halves the image once more.
    """

    __pydantic_config__ = _STRICT

    levels: Annotated[int, Field(ge=1, le=MAX_LEVELS)] = 2
    bottleneck_blocks: Blocks = 12
    c_hidden: Width = 384
    c_latent: Width = 4
    codebook_size: Width = 8192
    scale_factor: Annotated[float, Field(gt=0, le=1e6)] = 0.3764

    def __post_init__(self) -> None:
        _divides("2 to the number of halvings", 2 ** (self.levels - 1), "c_hidden", self.c_hidden)

    @property
    def downscale(self) -> int:
        """Pixels per token and side: 2 by the pixel-unshuffle, 2 by each strided convolution."""
        return 2**self.levels


@dataclass(frozen=True)
class PriorConfig:
    """The CLIP text → CLIP image diffusion prior (github.com/dome272/Paella, `PriorModel`)."""

    __pydantic_config__ = _STRICT

    c_hidden: Width = 1280
    c_r: TimeWidth = 64
    clip_r: Width = 1024
    num_blocks: Layers = 48


# The preset that every bundle has: its recipe and its first denoiser.
QUALITY = "quality"
# A small, quick preset, which clients with a choice of qualities get for the lowest.
FAST = "fast"
# The name of the first denoiser, as of its file.
DENOISER = "denoiser"
MAX_PRESETS = 16
PresetName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,31}$")]


@dataclass(frozen=True)
class SamplingConfig:
    """The sampling of one image, with all defaults filled in.

    guidance, temperature: (first step's value, last step's value), linear in between; guidance
    applies to `guidance_steps` steps, of which the first is number `guidance_start`. renoise_steps:
    after how many of the first steps start tokens are put back. preset: its prior's settings are
    used. denoiser: the network that takes the steps. attention_weights: as of a recipe; None: the
    preset's.
    """

    steps: int
    renoise_steps: int
    guidance: tuple[float, float]
    guidance_steps: int
    temperature: tuple[float, float]
    sampler: Sampler
    typical_mass: float = 0.2
    deterministic: bool = False
    schedule: Schedule = "linear"
    renoise_mode: RenoiseMode = "start"
    renoise_order: RenoiseOrder = "random"
    guidance_start: int = 0
    preset: str = QUALITY
    denoiser: str = DENOISER
    attention_weights: tuple[float, float] | None = None

    @property
    def guided(self) -> bool:
        """Whether any step needs the unconditional branch."""
        return self.guidance_steps > 0 and self.guidance != (1.0, 1.0)

    @property
    def unguided(self) -> SamplingConfig:
        """The same sampling without guidance."""
        return replace(self, guidance=(1.0, 1.0))

    def with_steps(self, steps: int) -> SamplingConfig:
        """Return the same sampling in so many steps; other step counts keep their share of them."""
        guidance_steps = round(steps * self.guidance_steps / self.steps)
        return replace(
            self,
            steps=steps,
            renoise_steps=round(steps * self.renoise_steps / self.steps),
            guidance_steps=guidance_steps,
            guidance_start=min(
                steps - guidance_steps, round(steps * self.guidance_start / self.steps)
            ),
        )


# As in a request.
StepCount = Annotated[int, Field(ge=0, le=64)]
MAX_GUIDANCE = 30
Guidance = Annotated[float, Field(ge=0, le=MAX_GUIDANCE)]
Temperature = Annotated[float, Field(ge=0.05, le=5)]
AttentionWeight = Annotated[float, Field(ge=0, le=100)]


# Of a recipe, in the order in which they were added.
_ADDED_FIELDS = ("renoise_order", "guidance_start")


class PriorSettings(NamedTuple):
    """Settings that decide the prior's result, beside its text and its noise."""

    steps: int
    guidance: float
    sampler: PriorSampler


@dataclass(frozen=True)
class Recipe:
    """A bundle's sampling defaults, as its authors recommend them.

    attention_weights: factors on the attention given to the (text, image) condition tokens of the
    conditional branch; None is off.
    """

    __pydantic_config__ = _STRICT

    num_inference_steps: Annotated[int, Field(ge=1, le=64)]
    renoise_steps: StepCount
    guidance_scale: tuple[Guidance, Guidance]
    guidance_steps: StepCount
    temperature: tuple[Temperature, Temperature]
    sampler: Sampler = "multinomial"
    typical_mass: Annotated[float, Field(ge=0, le=1)] = 0.2
    attention_weights: tuple[AttentionWeight, AttentionWeight] | None = None
    prior_steps: Annotated[int, Field(ge=1, le=1000)] = 60
    prior_guidance: Guidance = 3.0
    prior_sampler: PriorSampler = "ddpm"
    schedule: Schedule = "linear"
    renoise_mode: RenoiseMode = "start"
    renoise_order: RenoiseOrder = "random"
    guidance_start: StepCount = 0

    def __post_init__(self) -> None:
        if max(self.renoise_steps, self.guidance_steps) > self.num_inference_steps:
            raise ValueError("renoise_steps and guidance_steps must not exceed num_inference_steps")
        if self.guidance_start + self.guidance_steps > self.num_inference_steps:
            raise ValueError("guidance_start + guidance_steps must not exceed num_inference_steps")

    def sampling(  # noqa: PLR0913  (one argument for each field that a request may set)
        self,
        *,
        steps: int | None = None,
        renoise_steps: int | None = None,
        guidance: tuple[float, float] | None = None,
        guidance_steps: int | None = None,
        temperature: tuple[float, float] | None = None,
        sampler: Sampler | None = None,
        typical_mass: float | None = None,
        renoise_mode: RenoiseMode | None = None,
        renoise_order: RenoiseOrder | None = None,
        guidance_start: int | None = None,
        attention_weights: tuple[float, float] | None = None,
        deterministic: bool = False,
    ) -> SamplingConfig:
        """Return the recipe with a request's values.

        Absent step counts keep the recipe's share of the steps. If guidance_steps is given without
        guidance_start, guidance starts with the first step.
        """
        n = steps or self.num_inference_steps

        def share(of: int) -> int:
            return min(n, round(n * of / self.num_inference_steps))

        if guidance_start is None:
            last = n - share(self.guidance_steps)
            guidance_start = min(last, share(self.guidance_start)) if guidance_steps is None else 0

        return SamplingConfig(
            steps=n,
            renoise_steps=share(self.renoise_steps) if renoise_steps is None else renoise_steps,
            guidance=guidance or self.guidance_scale,
            guidance_steps=share(self.guidance_steps) if guidance_steps is None else guidance_steps,
            temperature=temperature or self.temperature,
            sampler=sampler or self.sampler,
            typical_mass=self.typical_mass if typical_mass is None else typical_mass,
            deterministic=deterministic,
            schedule=self.schedule,
            renoise_mode=renoise_mode or self.renoise_mode,
            renoise_order=renoise_order or self.renoise_order,
            guidance_start=guidance_start,
            attention_weights=attention_weights or self.attention_weights,
        )

    @property
    def prior(self) -> PriorSettings:
        """The prior's settings."""
        return PriorSettings(self.prior_steps, self.prior_guidance, self.prior_sampler)

    @property
    def unwritten(self) -> set[str]:
        """Fields that `bundle.json` leaves out.

        They came after the first bundles and have their default. Without them an older bundle keeps
        its hash, and an older release reads a bundle that does not use them.
        """
        return {name for name in _ADDED_FIELDS if getattr(self, name) == getattr(Recipe, name)}


@dataclass(frozen=True)
class Preset:
    """A named recipe of a bundle, with one of its denoisers.

    steps: (fewest, most) denoising steps that it is good for. denoiser: the name of a further
    denoiser of the bundle; None is the first one.
    """

    __pydantic_config__ = _STRICT

    recipe: Recipe
    steps: tuple[Annotated[int, Field(ge=1, le=64)], Annotated[int, Field(ge=1, le=64)]] = (1, 64)
    denoiser: PresetName | None = None

    def __post_init__(self) -> None:
        fewest, most = self.steps
        if not fewest <= self.recipe.num_inference_steps <= most:
            needed = f"a range that holds the recipe's {self.recipe.num_inference_steps} steps"
            raise ValueError(f"steps must be {needed}, not {fewest} to {most}")

    @property
    def network(self) -> str:
        """The name of its denoiser, as of the file."""
        return DENOISER if self.denoiser is None else further_denoiser(self.denoiser)

    @property
    def guided(self) -> bool:
        """Return whether its recipe uses guidance, so that it can follow a negative prompt."""
        return self.recipe.sampling().guided


def further_denoiser(name: str) -> str:
    """Return the network's name of a further denoiser."""
    return f"{DENOISER}-{name}"


@dataclass(frozen=True)
class FileEntry:
    """One file of a bundle, by which a damaged or replaced one is detected before it is used."""

    __pydantic_config__ = _STRICT

    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    bytes: Annotated[int, Field(ge=0, le=2**44)]


@dataclass(frozen=True, kw_only=True)
class BundleConfig:
    """The contents of `bundle.json`, which describes a weights directory.

    Each family of networks has a class of its own below.

    native_size: (width, height) in pixels the weights were trained at. networks: the fields that
    are networks, each a file of that name. presets: those beside `quality`, which is `recipe` with
    the first denoiser. default_preset: the preset of a request that names none. denoisers: further
    ones, which share all other networks with the first; `denoiser-NAME` is the file of each.
    """

    __pydantic_config__ = _STRICT

    networks: ClassVar[tuple[str, ...]]
    samplers: ClassVar[tuple[Sampler, ...]]
    # What all denoisers of a bundle have in common.
    denoiser_inputs: ClassVar[tuple[str, ...]]

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    family: str
    native_size: tuple[Side, Side]
    denoiser: DenoiserConfig | DenoiserV1Config
    vqgan: VQGANConfig | VQGANV1Config
    clip: CLIPConfig
    recipe: Recipe
    presets: Annotated[Mapping[PresetName, Preset], Field(max_length=MAX_PRESETS)] = field(
        default_factory=dict
    )
    default_preset: PresetName = QUALITY
    denoisers: Mapping[PresetName, DenoiserConfig | DenoiserV1Config] = field(default_factory=dict)
    files: Annotated[dict[str, FileEntry], Field(max_length=64)] = field(default_factory=dict)
    format: Literal[1, 2] = 1

    def __post_init__(self) -> None:
        for names, (a, b) in self._agreements.items():
            if a != b:
                raise ValueError(f"{names} must be equal, not {a} and {b}")
        if self.recipe.sampler not in self.samplers:
            known, sampler = ", ".join(self.samplers), self.recipe.sampler
            raise ValueError(f"recipe.sampler: these networks draw by {known}, not by {sampler}")
        if any(side < self.smallest_side or side % self.size_step for side in self.native_size):
            sizes = f"multiples of {self.size_step} from {self.smallest_side} on"
            raise ValueError(f"native_size must be two {sizes}, not {self.native_size}")
        self._check_presets()
        self._check_denoisers()

    def _check_denoisers(self) -> None:
        used = {preset.denoiser for preset in self.presets.values()}
        for name, other in self.denoisers.items():
            for part in self.denoiser_inputs:
                first, own = getattr(self.denoiser, part), getattr(other, part)
                if own != first:
                    raise ValueError(
                        f"denoisers.{name}.{part} must be denoiser's, {first}, not {own}"
                    )
            if self.denoiser.token_step % other.token_step:
                steps = f"{other.token_step} does not divide {self.denoiser.token_step}"
                raise ValueError(f"denoisers.{name} needs larger steps of sizes: {steps}")
            if name not in used:
                raise ValueError(f"denoisers.{name} is used by no preset")

    def _check_presets(self) -> None:
        if self.presets and self.format < PRESETS_FORMAT:
            raise ValueError(f"presets need format {PRESETS_FORMAT}, not {self.format}")
        if QUALITY in self.presets:
            raise ValueError(f"presets.{QUALITY}: this preset is the bundle's recipe")
        if self.default_preset not in self.preset_names:
            known = ", ".join(self.preset_names)
            raise ValueError(f"default_preset must be one of {known}, not {self.default_preset}")
        for name, preset in self.presets.items():
            if preset.denoiser is not None and preset.denoiser not in self.denoisers:
                known = ", ".join(self.denoisers) or "none"
                unknown = f"denoisers has {known}, not {preset.denoiser}"
                raise ValueError(f"presets.{name}.denoiser: {unknown}")
            if preset.recipe.sampler not in self.samplers:
                known = ", ".join(self.samplers)
                drawn = f"these networks draw by {known}, not by {preset.recipe.sampler}"
                raise ValueError(f"presets.{name}.recipe.sampler: {drawn}")
            if preset.recipe.schedule != self.denoiser.schedule:
                needed = f"must be the denoiser's, {self.denoiser.schedule}"
                raise ValueError(f"presets.{name}.recipe.schedule {needed}")

    @property
    def _agreements(self) -> dict[str, tuple[object, object]]:
        """Pairs of values that must be equal in two networks, by the names of both."""
        return {
            "denoiser.num_labels and vqgan.codebook_size": (
                self.denoiser.num_labels,
                self.vqgan.codebook_size,
            ),
            "recipe.schedule and the denoiser's schedule": (
                self.recipe.schedule,
                self.denoiser.schedule,
            ),
        }

    @property
    def operations(self) -> tuple[Operation, ...]:
        """The operations that these weights were trained for."""
        raise NotImplementedError

    @property
    def text_limits(self) -> dict[str, int]:
        """The longest prompt of each encoder, end marks included."""
        return {"clip_tokens": self.clip.context_length}

    # ── presets ───────────────────────────────────────────────────────────────────────────────────

    @property
    def network_names(self) -> tuple[str, ...]:
        """The names of all networks, each a file: those of the family, then further denoisers."""
        return (*self.networks, *map(further_denoiser, self.denoisers))

    @property
    def preset_names(self) -> tuple[str, ...]:
        """The names of all presets, `quality` first."""
        return (QUALITY, *self.presets)

    def preset(self, name: str) -> Preset:
        """Return a preset by its name. Raises KeyError."""
        return Preset(self.recipe) if name == QUALITY else self.presets[name]

    def denoiser_of(self, network: str) -> DenoiserConfig | DenoiserV1Config:
        """Return the configuration of a denoiser by its network's name. Raises KeyError."""
        if network == DENOISER:
            return self.denoiser
        return self.denoisers[network.removeprefix(further_denoiser(""))]

    def presets_of(self, network: str) -> list[Preset]:
        """Return the presets that use a denoiser, by its network's name."""
        presets = map(self.preset, self.preset_names)
        return [preset for preset in presets if preset.network == network]

    def sampling(self, preset: str | None = None, **asked: Any) -> SamplingConfig:
        """Return a preset's recipe with a request's values, as `Recipe.sampling` does.

        preset: None is the default one. Raises KeyError for an unknown one.
        """
        name = self.default_preset if preset is None else preset
        chosen = self.preset(name)
        return replace(chosen.recipe.sampling(**asked), preset=name, denoiser=chosen.network)

    def relative_work(self, network: str) -> float:
        """Return the work of a denoiser's step in that of the first one."""
        if not self.denoisers:
            return 1.0
        return self.denoiser_of(network).work / (self.denoiser.work or 1.0)

    def with_preset(
        self,
        name: str,
        preset: Preset,
        denoiser: DenoiserConfig | DenoiserV1Config | None = None,
        *,
        default: bool = False,
    ) -> Self:
        """Return the configuration with a preset more, or one that replaces that of its name.

        denoiser: the configuration of `preset.denoiser`, unless it is there already. default:
        whether it becomes the default preset.
        """
        presets = {**self.presets, name: preset}
        denoisers = dict(self.denoisers)
        if preset.denoiser is not None and denoiser is not None:
            denoisers[preset.denoiser] = denoiser
        used = {each.denoiser for each in presets.values()}
        return replace(
            self,
            presets=presets,
            denoisers={key: kept for key, kept in denoisers.items() if key in used},
            default_preset=name if default else self.default_preset,
            format=PRESETS_FORMAT,
        )

    # ── sizes ─────────────────────────────────────────────────────────────────────────────────────

    @property
    def size_step(self) -> int:
        """Width and height are multiples of this number of pixels."""
        return self.vqgan.downscale * self.denoiser.token_step

    @property
    def smallest_side(self) -> int:
        """The smallest width and height, pixels."""
        return self.size_step

    @cached_property
    def sha256(self) -> str:
        """A name for exactly these weights: the hash of everything but the bundle's name.

        That is the configuration, the recipe, and the listed files' hashes.
        """
        fields = to_jsonable_python(self, exclude={"name": True, **self._unwritten})
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()

    @classmethod
    def read(cls, directory: Path) -> Self:
        """Parse `bundle.json`.

        Raises FileNotFoundError, ValueError for an oversized file, or pydantic.ValidationError
        naming the wrong field.
        """
        with (directory / CONFIG_FILE).open("rb") as file:
            content = file.read(MAX_CONFIG_BYTES + 1)
        if len(content) > MAX_CONFIG_BYTES:
            raise ValueError(f"{CONFIG_FILE} has more than {MAX_CONFIG_BYTES} bytes")
        return cast(Self, _parser(_family_of(content)).validate_json(content))

    @staticmethod
    def parse(fields: dict[str, Any]) -> BundleConfig:
        """Return the configuration with these fields, of the family that they name.

        Raises pydantic.ValidationError.
        """
        return _parser(_FAMILIES.get(fields.get("family"), BundleV3Config)).validate_python(fields)

    def write(self, directory: Path) -> None:
        """Write `bundle.json`."""
        content = _parser(type(self)).dump_json(self, indent=2, exclude=self._unwritten)
        (directory / CONFIG_FILE).write_bytes(content + b"\n")

    @property
    def _unwritten(self) -> dict[str, Any]:
        """Return what `bundle.json` leaves out, as pydantic's `exclude`: see `Recipe.unwritten`."""
        recipes = {name: {"recipe": p.recipe.unwritten} for name, p in self.presets.items()}
        absent = {
            "presets": not self.presets,
            "denoisers": not self.denoisers,
            "default_preset": self.default_preset == QUALITY,
        }
        return {
            "recipe": self.recipe.unwritten,
            "presets": recipes,
            **{name: True for name, is_absent in absent.items() if is_absent},
        }


@dataclass(frozen=True, kw_only=True)
class BundleV3Config(BundleConfig):
    """Bytes and CLIP text as inputs, and a prior from CLIP's text to CLIP's image."""

    networks = ("denoiser", "vqgan", "prior", "byt5", "clip")
    samplers = ("multinomial", "argmax", "typical", "quant")
    denoiser_inputs = ("num_labels", "byt5_embd", "clip_embd")

    family: Literal["v3"] = "v3"
    denoiser: DenoiserConfig
    denoisers: Mapping[PresetName, DenoiserConfig] = field(default_factory=dict)
    vqgan: VQGANConfig
    prior: PriorConfig
    byt5: ByteEncoderConfig

    @property
    def _agreements(self) -> dict[str, tuple[object, object]]:
        return {
            "denoiser.byt5_embd and byt5.d_model": (self.denoiser.byt5_embd, self.byt5.d_model),
            "denoiser.clip_embd and clip.embed_dim": (self.denoiser.clip_embd, self.clip.embed_dim),
            "prior.clip_r and clip.embed_dim": (self.prior.clip_r, self.clip.embed_dim),
            **super()._agreements,
        }

    @property
    def operations(self) -> tuple[Operation, ...]:
        """All operations."""
        return get_args(Operation)

    @property
    def text_limits(self) -> dict[str, int]:
        """Bytes and CLIP's tokens."""
        return {"bytes": self.byt5.max_bytes, **super().text_limits}


@dataclass(frozen=True, kw_only=True)
class BundleV1Config(BundleConfig):
    """One CLIP embedding as input, of a text or of an image.

    embedding: what the denoiser was trained on last; the published checkpoints are one of each.
    """

    networks = ("denoiser", "vqgan", "clip")
    samplers = ("multinomial", "argmax", "typical")
    denoiser_inputs = ("num_labels", "c_clip")

    family: Literal["v1"] = "v1"
    denoiser: DenoiserV1Config
    denoisers: Mapping[PresetName, DenoiserV1Config] = field(default_factory=dict)
    vqgan: VQGANV1Config
    embedding: Literal["text", "image"] = "text"

    @property
    def _agreements(self) -> dict[str, tuple[object, object]]:
        return {
            "denoiser.c_clip and clip.embed_dim": (self.denoiser.c_clip, self.clip.embed_dim),
            **super()._agreements,
        }

    @property
    def smallest_side(self) -> int:
        """Reflection padding takes two pixels of the deepest level."""
        return 2 * self.size_step

    @property
    def operations(self) -> tuple[Operation, ...]:
        """Variations for an image embedding, all others for a text embedding."""
        return (
            ("variations",)
            if self.embedding == "image"
            else tuple(o for o in get_args(Operation) if o != "variations")
        )


_FAMILIES: dict[object, type[BundleConfig]] = {"v3": BundleV3Config, "v1": BundleV1Config}


_PARSERS: dict[str, TypeAdapter[Any]] = {}


def _parser(family: type[BundleConfig]) -> TypeAdapter[Any]:
    """Return the class's parser, which is built once."""
    if family.__name__ not in _PARSERS:
        _PARSERS[family.__name__] = TypeAdapter(family)
    return _PARSERS[family.__name__]


def _family_of(content: bytes) -> type[BundleConfig]:
    """Return the class for a `bundle.json`.

    An absent or unknown family gives v3's class, whose parser then rejects it.

    A newer format is said to be that before its unknown fields are complained about. Raises
    pydantic.ValidationError.
    """
    try:
        fields = from_json(content)
    except ValueError:
        return BundleV3Config  # the parser that follows says what is wrong
    if not isinstance(fields, dict):
        return BundleV3Config
    version = fields.get("format")
    if isinstance(version, int) and FORMAT < version < 10**9:
        limit = f"this Paellera reads formats up to {FORMAT}: a newer Paellera is needed"
        message = f"these weights are of format {version}, {limit}"
        error = PydanticCustomError("newer_format", "{message}", {"message": message})
        raise ValidationError.from_exception_data(
            "BundleConfig", [InitErrorDetails(type=error, loc=("format",), input=version)]
        )
    return _FAMILIES.get(str(fields.get("family")), BundleV3Config)


def find_bundle(name_or_path: str) -> Path:
    """Return the directory of a bundle: one in `weights/`, else a path.

    Raises FileNotFoundError.
    """
    import weights

    shipped = Path(weights.__path__[0]) / name_or_path
    for directory in (shipped, Path(name_or_path).expanduser()):
        if (directory / CONFIG_FILE).is_file():
            return directory
    places = f"neither weights/{name_or_path} nor that path holds a {CONFIG_FILE}"
    raise FileNotFoundError(f"no bundle {name_or_path!r}: {places}")
