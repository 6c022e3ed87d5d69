"""Configurations of the networks, as frozen dataclasses with bounds. No torch here.

The bounds are far beyond the published sizes, and hold for what is parsed (`model/config.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, ClassVar, Literal

from pydantic import ConfigDict, Field

STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)

MAX_SIDE = 8192  # pixels
MAX_LEVELS = 8

# Channels of a layer, and codes or tokens of a vocabulary.
Width = Annotated[int, Field(ge=1, le=65_536)]
VocabularySize = Annotated[int, Field(ge=2, le=2**20)]
# Channels of a sinusoidal embedding.
TimeWidth = Annotated[int, Field(ge=4, le=4096, multiple_of=2)]
Layers = Annotated[int, Field(ge=1, le=256)]
Blocks = Annotated[int, Field(ge=0, le=128)]
Heads = Annotated[int, Field(ge=1, le=1024)]
Ratio = Annotated[float, Field(gt=0, le=64)]
Side = Annotated[int, Field(ge=1, le=MAX_SIDE)]
# A block of a v3 denoiser, as its parameters' names begin.
BlockName = Annotated[str, Field(pattern=r"^(down|up)_blocks\.\d\.\d{1,4}$")]
# A file in the bundle's directory.
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]
Levels = Field(min_length=1, max_length=MAX_LEVELS)
# How the share of noise falls from 1 to 0 over the steps: v3's way and v1's.
Schedule = Literal["linear", "cosine"]


@dataclass(frozen=True)
class ByteEncoderConfig:
    """The encoder half of a ByT5: the arguments of `transformers.T5Config`.

    max_bytes: most bytes of a prompt, end mark included.
    """

    __pydantic_config__ = STRICT

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

    __pydantic_config__ = STRICT

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

    __pydantic_config__ = STRICT

    context_length: Annotated[int, Field(ge=3, le=1024)] = 77
    vocab_size: VocabularySize = 49408
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

    __pydantic_config__ = STRICT

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

    __pydantic_config__ = STRICT

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

    resolution, attn_resolutions: attention sits at the levels where an image of `resolution`
    pixels would have one of these sides.
    """

    __pydantic_config__ = STRICT

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
        """Pixels per token and side: the image is halved between each two levels."""
        return int(2 ** (len(self.ch_mult) - 1))

    def attends(self, level: int) -> bool:
        """Return whether a level has attention, for images of any size."""
        return self.resolution >> level in self.attn_resolutions


@dataclass(frozen=True)
class Block:
    """A block of a v3 denoiser. kind: C, T or A. level: 0 is the finest."""

    kind: str
    level: int
    reads_skip: bool


@dataclass(frozen=True)
class DenoiserConfig:
    """The v3 denoiser (github.com/dome272/Paella, `Paella`).

    The defaults count 1,008,350,592 parameters.

    pruned_blocks: blocks that the network does without, by their parameters' names. The others keep
    the names they would have with them.
    """

    __pydantic_config__ = STRICT

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
    pruned_blocks: tuple[BlockName, ...] = ()

    def __post_init__(self) -> None:
        for name in ("c_hidden", "nhead", "blocks", "level_config", "pruned_blocks"):
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
        if self.pruned_blocks:
            self._check_pruned_blocks()

    def _check_pruned_blocks(self) -> None:
        if wrong := [name for name in self.pruned_blocks if name not in self.prunable_blocks]:
            known = ", ".join(self.prunable_blocks)
            raise ValueError(f"pruned_blocks may hold {known}, not {', '.join(wrong)}")
        attention = {name for name, block in self.every_block.items() if block.kind == "A"}
        if attention and attention <= {*self.pruned_blocks}:
            raise ValueError("pruned_blocks must leave one attention block, which reads the prompt")

    @property
    def unwritten(self) -> set[str]:
        """Fields that `bundle.json` leaves out: see `Recipe.unwritten`."""
        return set() if self.pruned_blocks else {"pruned_blocks"}

    @property
    def token_step(self) -> int:
        """Divisor of the token grid's sides: the patch, halved once between every two levels."""
        return self.patch_size * 2 ** (len(self.c_hidden) - 1)

    @cached_property
    def every_block(self) -> dict[str, Block]:
        """All blocks by name, in the order of a pass, those that are pruned too."""
        levels = range(len(self.c_hidden))
        ways = [("down", i, i) for i in levels]
        ways += [("up", i, level) for i, level in enumerate(reversed(levels))]
        result = {}
        for way, place, level in ways:
            kinds = self.level_config[level] * self.blocks[level]
            # On the way down a level begins with a change of resolution.
            before = int(way == "down" and level > 0)
            first_repeat = len(self.level_config[level])
            for number, kind in enumerate(kinds):
                reads_skip = way == "up" and place > 0 and kind == "C" and number < first_repeat
                name = f"{way}_blocks.{place}.{before + number}"
                result[name] = Block(kind, level, reads_skip)
        return result

    @cached_property
    def prunable_blocks(self) -> tuple[str, ...]:
        """The blocks that the network can do without: C and A, which add to what they are given.

        The first C of an up level is not among them: it also reads what the way down has left.
        """
        every = self.every_block.items()
        return tuple(name for name, b in every if b.kind in "CA" and not b.reads_skip)

    @property
    def work(self) -> float:
        """Multiplications of a step for one token of a branch, those of the blocks' maps."""
        return sum(
            _MAPS[block.kind]
            * self.c_hidden[block.level] ** 2
            / (self.patch_size * 2**block.level) ** 2
            for name, block in self.every_block.items()
            if name not in self.pruned_blocks
        )


@dataclass(frozen=True)
class VQGANConfig:
    """The v3 VQGAN (github.com/dome272/Paella, `VQModel`).

    Every level after the first halves the image once more.
    """

    __pydantic_config__ = STRICT

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

    __pydantic_config__ = STRICT

    c_hidden: Width = 1280
    c_r: TimeWidth = 64
    clip_r: Width = 1024
    num_blocks: Layers = 48
