"""The shapes of the v1 family's networks, as frozen dataclasses. No torch here. Import them from `model.config`.

Field names are the published constructor arguments; defaults are the published values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from pydantic import ConfigDict

_STRICT = ConfigDict(extra="forbid")


@dataclass(frozen=True)
class DenoiserV1Config:
    """The v1 denoiser (github.com/dome272/Paella, `DenoiseUNet`); the defaults count 577,995,184 parameters.

    down_levels: blocks of every level, finest first; up_levels: deepest first. c_hidden: the deepest level's width, halved for each above.
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
        """The token grid's sides are multiples of this, halved once between each two levels."""
        return int(2 ** (len(self.down_levels) - 1))


@dataclass(frozen=True)
class VQGANV1Config:
    """The v1 VQGAN (github.com/CompVis/taming-transformers, `GumbelVQ`): `ddconfig`, then its own arguments; defaults are ruDALL-E's f8.

    resolution, attn_resolutions: attention sits at the levels where a picture of `resolution` pixels would have one of these sides.
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
            raise ValueError("the Gumbel quantiser takes z_channels = embed_dim latents, not means and variances (double_z)")

    @property
    def widths(self) -> list[int]:
        """Channels of every level, finest first."""
        return [self.ch * factor for factor in self.ch_mult]

    @property
    def codebook_size(self) -> int:
        return self.n_embed

    @property
    def downscale(self) -> int:
        """Pixels per token and side: the picture is halved between each two levels."""
        return int(2 ** (len(self.ch_mult) - 1))

    def attends(self, level: int) -> bool:
        """Whether a level has attention, whatever the size of the picture that goes through."""
        return self.resolution >> level in self.attn_resolutions
