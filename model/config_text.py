"""The shapes of the text encoders and of CLIP, as frozen dataclasses. No torch here. Import them from `model.config`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pydantic import ConfigDict

_STRICT = ConfigDict(extra="forbid")

# Where the text encoders are: with the other networks, on the CPU, or with them and ByT5's weights in int8.
Encoders = Literal["device", "cpu", "int8"]
# What computes the denoiser's steps; auto is Triton's kernels on CUDA, if Triton is installed.
Kernels = Literal["auto", "triton", "torch"]


@dataclass(frozen=True)
class ByteEncoderConfig:
    """The encoder half of a ByT5: what `transformers.T5Config` needs, and how many bytes a prompt may have (end mark included)."""

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
    """The CLIP pair as open_clip builds it: its own `vision_cfg` and `text_cfg`, and the tokenizer's merges.

    merges: name of a gzipped byte-pair merges file inside the bundle; None is open_clip's published vocabulary.
    """

    __pydantic_config__ = _STRICT

    embed_dim: int
    vision_cfg: dict[str, Any]
    text_cfg: dict[str, Any]
    quick_gelu: bool = False
    merges: str | None = None

    @property
    def context_length(self) -> int:
        return int(self.text_cfg.get("context_length", 77))
