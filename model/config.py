"""Configurations of bundles and their presets, as frozen dataclasses. No torch here.

A `bundle.json` may come from anybody: every number has bounds, far beyond the published sizes, and
nothing in it names code or a place to fetch from. The bounds hold for what is parsed, by
`BundleConfig.read` and `BundleConfig.parse`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, cast, get_args

from pydantic import Field, TypeAdapter, ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError, from_json, to_jsonable_python

from model.network_config import STRICT, Side
from model.network_config import ByteEncoderConfig as ByteEncoderConfig
from model.network_config import CLIPConfig as CLIPConfig
from model.network_config import CLIPTextConfig as CLIPTextConfig
from model.network_config import CLIPVisionConfig as CLIPVisionConfig
from model.network_config import DenoiserConfig as DenoiserConfig
from model.network_config import DenoiserV1Config as DenoiserV1Config
from model.network_config import PriorConfig as PriorConfig
from model.network_config import VQGANConfig as VQGANConfig
from model.network_config import VQGANV1Config as VQGANV1Config
from model.prompt_reading import Reading, read, read_negative
from model.recipe import DENOISER as DENOISER
from model.recipe import MAX_GUIDANCE as MAX_GUIDANCE
from model.recipe import QUALITY as QUALITY
from model.recipe import Interpolation as Interpolation
from model.recipe import PriorSampler as PriorSampler
from model.recipe import PriorSettings as PriorSettings
from model.recipe import Recipe as Recipe
from model.recipe import RenoiseMode as RenoiseMode
from model.recipe import RenoiseOrder as RenoiseOrder
from model.recipe import Sampler as Sampler
from model.recipe import SamplingConfig as SamplingConfig
from model.vocabulary import Vocabulary

# Where the text encoders are: with the other networks, on the CPU, or with them and ByT5's weights
# in int8.
Encoders = Literal["device", "cpu", "int8"]
# What computes the denoiser's steps; auto is Triton's kernels on CUDA, if Triton is installed.
Kernels = Literal["auto", "triton", "torch"]
Operation = Literal[
    "generate", "inpaint", "outpaint", "variations", "edit", "upscale", "interpolate", "regions"
]

CONFIG_FILE = "bundle.json"
# Of bundle.json; absent is 1.
Format = Literal[1, 2, 3, 4]
FORMAT: Format = 4
_CAME_WITH: dict[Format, str] = {2: "presets", 3: "pruned blocks", 4: "a vocabulary"}
MAX_CONFIG_BYTES = 2**20
_THINGS = "things of the vocabulary, in its JSON"

# A small, quick preset, which clients with a choice of qualities get for the lowest.
FAST = "fast"
MAX_PRESETS = 16
PresetName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,31}$")]


@dataclass(frozen=True)
class Preset:
    """A named recipe of a bundle, with one of its denoisers.

    steps: (fewest, most) denoising steps that it is good for. denoiser: the name of a further
    denoiser of the bundle; None is the first one.
    """

    __pydantic_config__ = STRICT

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

    __pydantic_config__ = STRICT

    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    bytes: Annotated[int, Field(ge=0, le=2**44)]


def needed_format(
    presets: Mapping[str, Preset],
    denoisers: Iterable[DenoiserConfig | DenoiserV1Config],
    vocabulary: Vocabulary | None = None,
) -> Format:
    """Return the first format of `bundle.json` in which all of this can be written."""
    if vocabulary is not None:
        return 4
    if any(isinstance(d, DenoiserConfig) and d.pruned_blocks for d in denoisers):
        return 3
    return 2 if presets else 1


@dataclass(frozen=True, kw_only=True)
class BundleConfig:
    """The contents of `bundle.json`, which describes a weights directory.

    Each family of networks has a class of its own below.

    native_size: (width, height) in pixels the weights were trained at. networks: the fields that
    are networks, each a file of that name. presets: those beside `quality`, which is `recipe` with
    the first denoiser. default_preset: the preset of a request that names none. denoisers: further
    ones, which share all other networks with the first; `denoiser-NAME` is the file of each.
    """

    __pydantic_config__ = STRICT

    networks: ClassVar[tuple[str, ...]]
    samplers: ClassVar[tuple[Sampler, ...]]
    # What all denoisers of a bundle have in common.
    denoiser_inputs: ClassVar[tuple[str, ...]]
    # Whether the denoisers attend to the text and to an image, so that both can be weighed.
    attends: ClassVar[bool] = True
    # What prompts are reduced to before they are encoded; None: nothing is left out.
    vocabulary: Vocabulary | None = None

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
    format: Format = 1

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
        recipes = (self.recipe, *(preset.recipe for preset in self.presets.values()))
        if self.vocabulary is None and any(recipe.auto_regions for recipe in recipes):
            raise ValueError("auto_regions needs a vocabulary, which names the things of a prompt")
        denoisers = (self.denoiser, *self.denoisers.values())
        needed = needed_format(self.presets, denoisers, self.vocabulary)
        if self.format < needed:
            raise ValueError(f"{_CAME_WITH[needed]} need format {needed}, not {self.format}")
        self._check_presets()
        self._check_denoisers()

    def _check_denoisers(self) -> None:
        used = {preset.denoiser for preset in self.presets.values()}
        for name, other in self.denoisers.items():
            for part in self.denoiser_inputs:
                first, further = getattr(self.denoiser, part), getattr(other, part)
                if further != first:
                    raise ValueError(
                        f"denoisers.{name}.{part} must be denoiser's, {first}, not {further}"
                    )
            if self.denoiser.token_step % other.token_step:
                steps = f"{other.token_step} does not divide {self.denoiser.token_step}"
                raise ValueError(f"denoisers.{name} needs larger steps of sizes: {steps}")
            if name not in used:
                raise ValueError(f"denoisers.{name} is used by no preset")

    def _check_presets(self) -> None:
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

    def read_prompt(self, prompt: str) -> Reading:
        """Return what of a prompt is encoded: all of it, unless the weights have a vocabulary."""
        return Reading(prompt) if self.vocabulary is None else read(self.vocabulary, prompt)

    def read_negative(self, prompt: str) -> str:
        """Return what of a negative prompt is encoded, as `read_prompt` does."""
        return prompt if self.vocabulary is None else read_negative(self.vocabulary, prompt)

    # ── presets ───────────────────────────────────────────────────────────────────────────────────

    @property
    def network_names(self) -> tuple[str, ...]:
        """The names of all networks, each a file: those of the family, then further denoisers."""
        return (*self.networks, *map(further_denoiser, self.denoisers))

    @property
    def preset_names(self) -> tuple[str, ...]:
        """The names of all presets, `quality` first."""
        return (QUALITY, *self.presets)

    @property
    def prior_settings(self) -> list[PriorSettings]:
        """The prior's settings of all presets, each once."""
        priors = (self.preset(name).recipe.prior for name in self.preset_names)
        return list(dict.fromkeys(priors))

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
        """Return the work of a denoiser's step in that of the first one. Raises KeyError."""
        return 1.0 if network == DENOISER else self._further_work[network]

    @cached_property
    def _further_work(self) -> dict[str, float]:
        first = self.denoiser.work or 1.0
        return {further_denoiser(name): d.work / first for name, d in self.denoisers.items()}

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
        kept = {key: config for key, config in denoisers.items() if key in used}
        return replace(
            self,
            presets=presets,
            denoisers=kept,
            default_preset=name if default else self.default_preset,
            format=needed_format(presets, (self.denoiser, *kept.values()), self.vocabulary),
        )

    # ── sizes ─────────────────────────────────────────────────────────────────────────────────────

    @cached_property
    def size_step(self) -> int:
        """Width and height are multiples of this number of pixels."""
        return self.vqgan.downscale * self.denoiser.token_step

    @property
    def smallest_side(self) -> int:
        """The smallest width and height, pixels."""
        return self.size_step

    def sides(self, largest: int) -> range:
        """Return the possible widths and heights up to `largest`, pixels."""
        return range(self.smallest_side, largest + 1, self.size_step)

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
        fields = _parser(type(self)).dump_python(self, mode="json", exclude=self._unwritten)
        things: list[str] = []
        if self.vocabulary is not None:  # one thing a line
            things = [
                json.dumps(each.written, ensure_ascii=False, separators=(",", ":"))
                for each in self.vocabulary.things
            ]
            fields["vocabulary"]["things"] = [_THINGS]
        content = json.dumps(fields, indent=1, ensure_ascii=False)
        content = content.replace(json.dumps(_THINGS), ",\n   ".join(things))
        (directory / CONFIG_FILE).write_text(f"{content}\n", encoding="utf-8")

    @property
    def _unwritten(self) -> dict[str, Any]:
        """Return what `bundle.json` leaves out, as pydantic's `exclude`: see `Recipe.unwritten`."""
        recipes = {name: {"recipe": p.recipe.unwritten} for name, p in self.presets.items()}
        absent = {
            "presets": not self.presets,
            "denoisers": not self.denoisers,
            "default_preset": self.default_preset == QUALITY,
            "vocabulary": self.vocabulary is None,
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
    def _unwritten(self) -> dict[str, Any]:
        further = {name: other.unwritten for name, other in self.denoisers.items()}
        return {"denoiser": self.denoiser.unwritten, "denoisers": further, **super()._unwritten}

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
    attends = False

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
    """Return the class for a `bundle.json`; v3's, whose parser rejects them, for unknown families.

    Raises pydantic.ValidationError for a newer format, whose fields may be unknown.
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
    path = Path(name_or_path).expanduser()
    for directory in (shipped, path):
        if (directory / CONFIG_FILE).is_file():
            return directory
    if path.is_file():
        reason = "it is a file; name its directory"
    elif len(path.parts) == 1:
        places = "neither the included weights nor the current directory has"
        reason = f"{places} a {path}/{CONFIG_FILE}"
    else:
        reason = f"there is no {path / CONFIG_FILE}"
    raise FileNotFoundError(f"no bundle {name_or_path!r}: {reason}")
