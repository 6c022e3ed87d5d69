"""Configurations of the networks, recipes and bundles, as frozen dataclasses. No torch here."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, cast, get_args

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError, from_json

_STRICT = ConfigDict(extra="forbid")

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

    d_model: int
    d_kv: int
    d_ff: int
    num_layers: int
    num_heads: int
    vocab_size: int = 384
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    feed_forward_proj: str = "gated-gelu"
    max_bytes: int = 768


@dataclass(frozen=True)
class CLIPConfig:
    """The CLIP pair: open_clip's `vision_cfg` and `text_cfg`, and the tokenizer's merges.

    merges: name of a gzipped byte-pair merges file inside the bundle; None is open_clip's published
    vocabulary.
    """

    __pydantic_config__ = _STRICT

    embed_dim: int
    vision_cfg: dict[str, Any]
    text_cfg: dict[str, Any]
    quick_gelu: bool = False
    merges: str | None = None

    @property
    def context_length(self) -> int:
        """Tokens of a text, start and end marks included."""
        return int(self.text_cfg.get("context_length", 77))


_STRICT = ConfigDict(extra="forbid")


@dataclass(frozen=True)
class DenoiserV1Config:
    """The v1 denoiser (github.com/dome272/Paella, `DenoiseUNet`).

    The defaults count 577,995,184 parameters.

    down_levels: blocks of every level, finest first; up_levels: deepest first. c_hidden: the
    deepest level's width, halved for each above.
    """

    __pydantic_config__ = _STRICT

    schedule: ClassVar[Literal["cosine"]] = "cosine"

    num_labels: int = 8192
    c_hidden: int = 1280
    c_clip: int = 1024
    c_r: int = 64
    down_levels: tuple[int, ...] = (4, 8, 16)
    up_levels: tuple[int, ...] = (16, 8, 4)

    def __post_init__(self) -> None:
        for name in ("down_levels", "up_levels"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if len(self.down_levels) != len(self.up_levels):
            raise ValueError("down_levels and up_levels must name the same number of levels")

    @property
    def token_step(self) -> int:
        """Divisor of the token grid's sides, which are halved once between every two levels."""
        return int(2 ** (len(self.down_levels) - 1))


@dataclass(frozen=True)
class VQGANV1Config:
    """The v1 VQGAN (github.com/CompVis/taming-transformers, `GumbelVQ`).

    The arguments are those of `ddconfig`, then the model's own; the defaults are ruDALL-E's f8.

    resolution, attn_resolutions: attention sits at the levels where a picture of `resolution`
    pixels would have one of these sides.
    """

    __pydantic_config__ = _STRICT

    double_z: bool = False
    z_channels: int = 256
    resolution: int = 256
    in_channels: int = 3
    out_ch: int = 3
    ch: int = 128
    ch_mult: tuple[int, ...] = (1, 1, 2, 4)
    num_res_blocks: int = 2
    attn_resolutions: tuple[int, ...] = (32,)
    n_embed: int = 8192
    embed_dim: int = 256

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
Operation = Literal[
    "generate", "inpaint", "outpaint", "variations", "edit", "interpolate", "regions"
]

CONFIG_FILE = "bundle.json"
FORMAT = 1  # of bundle.json; absent is 1

_STRICT = ConfigDict(extra="forbid")


@dataclass(frozen=True)
class DenoiserConfig:
    """The v3 denoiser (github.com/dome272/Paella, `Paella`).

    The defaults count 1,008,350,592 parameters.
    """

    __pydantic_config__ = _STRICT

    schedule: ClassVar[Schedule] = "linear"

    byt5_embd: int = 2560
    c_in: int = 256
    c_out: int = 256
    num_labels: int = 8192
    c_r: int = 64
    patch_size: int = 2
    c_cond: int = 1024
    c_hidden: tuple[int, ...] = (640, 1280, 1280)
    nhead: tuple[int, ...] = (-1, 16, 16)
    blocks: tuple[int, ...] = (6, 16, 6)
    level_config: tuple[str, ...] = ("CT", "CTA", "CTA")
    clip_embd: int = 1024
    clip_seq_len: int = 4
    kernel_size: int = 3
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

    @property
    def token_step(self) -> int:
        """Divisor of the token grid's sides: the patch, halved once between every two levels."""
        return self.patch_size * 2 ** (len(self.c_hidden) - 1)


@dataclass(frozen=True)
class VQGANConfig:
    """The v3 VQGAN (github.com/dome272/Paella, `VQModel`).

    Every level after the first halves the image once more.
    """

    __pydantic_config__ = _STRICT

    levels: int = 2
    bottleneck_blocks: int = 12
    c_hidden: int = 384
    c_latent: int = 4
    codebook_size: int = 8192
    scale_factor: float = 0.3764

    @property
    def downscale(self) -> int:
        """Pixels per token and side: 2 by the pixel-unshuffle, 2 by each strided convolution."""
        return 2**self.levels


@dataclass(frozen=True)
class PriorConfig:
    """The CLIP text → CLIP image diffusion prior (github.com/dome272/Paella, `PriorModel`)."""

    __pydantic_config__ = _STRICT

    c_hidden: int = 1280
    c_r: int = 64
    clip_r: int = 1024
    num_blocks: int = 48


@dataclass(frozen=True)
class SamplingConfig:
    """The sampling of one image, with all defaults filled in.

    guidance, temperature: (first step's value, last step's value), linear in between; guidance
    applies to the first `guidance_steps`. renoise_steps: after how many of the first steps start
    tokens are put back.
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

    @property
    def guided(self) -> bool:
        """Whether any step needs the unconditional branch."""
        return self.guidance_steps > 0 and self.guidance != (1.0, 1.0)


@dataclass(frozen=True)
class Recipe:
    """A bundle's sampling defaults, as its authors recommend them.

    attention_weights: factors on the attention given to the (text, image) condition tokens of the
    conditional branch; None is off.
    """

    __pydantic_config__ = _STRICT

    num_inference_steps: int
    renoise_steps: int
    guidance_scale: tuple[float, float]
    guidance_steps: int
    temperature: tuple[float, float]
    sampler: Sampler = "multinomial"
    typical_mass: float = 0.2
    attention_weights: tuple[float, float] | None = None
    prior_steps: int = 60
    prior_guidance: float = 3.0
    prior_sampler: PriorSampler = "ddpm"
    schedule: Schedule = "linear"
    renoise_mode: RenoiseMode = "start"

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
        deterministic: bool = False,
    ) -> SamplingConfig:
        """Return the recipe with a request's values.

        Absent step counts keep the recipe's share of the steps.
        """
        n = steps or self.num_inference_steps

        def share(of: int) -> int:
            return min(n, round(n * of / self.num_inference_steps))

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
        )


@dataclass(frozen=True)
class FileEntry:
    """One file of a bundle, by which a damaged or replaced one is detected before it is used."""

    __pydantic_config__ = _STRICT

    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    bytes: Annotated[int, Field(ge=0)]


@dataclass(frozen=True, kw_only=True)
class BundleConfig:
    """The contents of `bundle.json`, which describes a weights directory.

    Each family of networks has a class of its own below.

    native_size: (width, height) in pixels the weights were trained at. networks: the fields that
    are networks, each a file of that name.
    """

    __pydantic_config__ = _STRICT

    networks: ClassVar[tuple[str, ...]]
    samplers: ClassVar[tuple[Sampler, ...]]

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    family: str
    native_size: tuple[int, int]
    denoiser: DenoiserConfig | DenoiserV1Config
    vqgan: VQGANConfig | VQGANV1Config
    clip: CLIPConfig
    recipe: Recipe
    files: dict[str, FileEntry] = field(default_factory=dict)
    format: Literal[1] = 1

    def __post_init__(self) -> None:
        for names, (a, b) in self._agreements.items():
            if a != b:
                raise ValueError(f"{names} must be equal, not {a} and {b}")
        if self.recipe.sampler not in self.samplers:
            known, sampler = ", ".join(self.samplers), self.recipe.sampler
            raise ValueError(f"recipe.sampler: these networks draw by {known}, not by {sampler}")

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

    @property
    def size_step(self) -> int:
        """Width and height are multiples of this number of pixels."""
        return self.vqgan.downscale * self.denoiser.token_step

    @property
    def smallest_side(self) -> int:
        """The smallest width and height, pixels."""
        return self.size_step

    @property
    def sha256(self) -> str:
        """A name for exactly these weights: the hash over the listed files' hashes."""
        return hashlib.sha256(
            "".join(f"{n}:{f.sha256}\n" for n, f in sorted(self.files.items())).encode()
        ).hexdigest()

    @classmethod
    def read(cls, directory: Path) -> Self:
        """Parse `bundle.json`.

        Raises FileNotFoundError, or pydantic.ValidationError naming the wrong field.
        """
        content = (directory / CONFIG_FILE).read_bytes()
        return cast(Self, TypeAdapter(_family_of(content)).validate_json(content))

    @staticmethod
    def parse(fields: dict[str, Any]) -> BundleConfig:
        """Return the configuration with these fields, of the family that they name.

        Raises pydantic.ValidationError.
        """
        return TypeAdapter(_FAMILIES.get(fields.get("family"), BundleV3Config)).validate_python(
            fields
        )

    def write(self, directory: Path) -> None:
        """Write `bundle.json`."""
        (directory / CONFIG_FILE).write_bytes(
            TypeAdapter(type(self)).dump_json(self, indent=2) + b"\n"
        )


@dataclass(frozen=True, kw_only=True)
class BundleV3Config(BundleConfig):
    """Bytes and CLIP text as inputs, and a prior from CLIP's text to CLIP's image."""

    networks = ("denoiser", "vqgan", "prior", "byt5", "clip")
    samplers = ("multinomial", "argmax", "typical", "quant")

    family: Literal["v3"] = "v3"
    denoiser: DenoiserConfig
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

    family: Literal["v1"] = "v1"
    denoiser: DenoiserV1Config
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
    if isinstance(version, int) and version > FORMAT:
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
