"""Prompts and pictures into the embeddings that the denoiser and the prior read: a ByT5 encoder, and CLIP's text and image towers.

The networks are those of transformers and open_clip, built from our own configurations: nothing is downloaded. `model.runtime.prepare`
must have run before the first of them is built.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ByteEncoderConfig, CLIPConfig
from model.runtime import send
from model.towers import ByteTower, TextTower

# Byte sequences are padded to one of these lengths, so that few shapes occur.
BYTE_BUCKETS = (32, 48, 64, 96, 128, 192, 256, 384, 512, 768)

# ByT5's vocabulary: three marks, then the bytes.
_PADDING, _END, _FIRST_BYTE = 0, 1, 3

# CLIP's published channel statistics: mean and standard deviation of red, green and blue.
PIXEL_STATISTICS = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


@dataclass(frozen=True, slots=True)
class Prompt:
    """One encoded prompt: byte embeddings [1, L, D] with mask [1, L], CLIP text embedding [1, D']; truncated: encoders that cut it.

    L is 0 where there is no byte encoder.
    """

    byt5: Tensor
    mask: Tensor
    clip: Tensor
    truncated: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ByteEmbeddings:
    """embeddings [B, L, d_model], L a bucket; mask [B, L], False at padding; truncated: whether each prompt was cut."""

    embeddings: Tensor
    mask: Tensor
    truncated: tuple[bool, ...]


class ByteEncoder(nn.Module):
    """transformers' T5 encoder on UTF-8 bytes; the state dict is that of a `T5EncoderModel`."""

    def __init__(self, config: ByteEncoderConfig) -> None:
        from transformers import T5Config, T5EncoderModel

        super().__init__()
        self.config = config
        t5 = T5Config(
            vocab_size=config.vocab_size,
            d_model=config.d_model,
            d_kv=config.d_kv,
            d_ff=config.d_ff,
            num_layers=config.num_layers,
            num_heads=config.num_heads,
            relative_attention_num_buckets=config.relative_attention_num_buckets,
            relative_attention_max_distance=config.relative_attention_max_distance,
            feed_forward_proj=config.feed_forward_proj,
            dropout_rate=0.0,
            use_cache=False,
        )
        self.t5 = T5EncoderModel(t5)
        self.tower: ByteTower | None = None

    def complete(self) -> None:
        """After tensors were assigned to a module built on the meta device: ties the second name of the embedding to the first."""
        self.t5.set_input_embeddings(self.t5.shared)

    def fold(self) -> None:
        """From now on the weights are fixed, and a pass takes few calls."""
        self.tower = ByteTower(self.t5) if ByteTower.supports(self.t5) else None

    def tokenize(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor, tuple[bool, ...]]:
        """Prompts → byte ids [B, L] padded to a bucket, mask [B, L], and which prompts were cut to `max_bytes` (end mark included)."""
        limit = self.config.max_bytes
        # A prompt is text: "</s>" in it is four characters, not the end mark.
        texts = [prompt.encode("utf-8", "replace") for prompt in prompts]
        rows = [[byte + _FIRST_BYTE for byte in text[: limit - 1]] + [_END] for text in texts]
        length = bucket(max(map(len, rows)), limit)
        tokens = torch.tensor([row + [_PADDING] * (length - len(row)) for row in rows])
        mask = torch.arange(length) < torch.tensor([len(row) for row in rows])[:, None]
        return tokens, mask, tuple(len(text) > limit - 1 for text in texts)

    def forward(self, prompts: Sequence[str]) -> ByteEmbeddings:
        tokens, mask, truncated = self.tokenize(prompts)
        device = self.t5.shared.weight.device
        tokens, mask = (t.to(device, non_blocking=True) for t in (tokens, mask))
        if self.tower is None or torch.is_autocast_enabled(device.type):  # packed operators know nothing of autocast
            embeddings = self.t5(input_ids=tokens, attention_mask=mask.long()).last_hidden_state
        else:
            embeddings = self.tower(tokens, mask)
        return ByteEmbeddings(embeddings, mask, truncated)


def bucket(length: int, limit: int) -> int:
    """The smallest bucket that holds `length`, at most `limit`."""
    return next((b for b in BYTE_BUCKETS if length <= b < limit), limit)


class CLIP(nn.Module):
    """open_clip's CLIP, both towers; embeddings are not normalised, as the published system uses them."""

    def __init__(self, config: CLIPConfig, directory: Path | None = None) -> None:
        """directory: where the bundle's own merges file lies, for configurations that name one."""
        import open_clip
        from open_clip.tokenizer import SimpleTokenizer

        super().__init__()
        self.config = config
        towers: dict[str, Any] = {"vision_cfg": config.vision_cfg, "text_cfg": config.text_cfg}
        self.model = open_clip.CLIP(config.embed_dim, quick_gelu=config.quick_gelu, **towers)
        merges = {} if config.merges is None or directory is None else {"bpe_path": str(directory / config.merges)}
        self.tokenizer = SimpleTokenizer(context_length=config.context_length, **merges)
        size = config.vision_cfg["image_size"]
        self.image_size: int = size if isinstance(size, int) else size[0]
        self.tower: TextTower | None = None

    def complete(self) -> None:
        """After tensors were assigned to a module built on the meta device: its causal mask is no part of the state."""
        length = self.config.context_length
        mask = torch.full((length, length), -torch.inf, device=self.device, dtype=self.model.logit_scale.dtype).triu_(1)
        self.model.register_buffer("attn_mask", mask, persistent=False)

    def fold(self, packed: bool = True) -> None:
        """From now on the weights are fixed, and a text's pass takes few calls; packed: by copies of them."""
        self.tower = TextTower(self.model, packed) if TextTower.supports(self.model) else None

    @property
    def device(self) -> torch.device:
        return self.model.logit_scale.device

    def tokenize(self, prompts: Sequence[str]) -> tuple[Tensor, tuple[bool, ...]]:
        """Prompts → token ids [B, context] on the CPU, and which have more tokens than that (start and end marks included)."""
        context, t = self.config.context_length, self.tokenizer
        rows = [[t.sot_token_id, *t.encode(prompt), t.eot_token_id] for prompt in prompts]
        tokens = torch.zeros(len(rows), context, dtype=torch.int64)
        for own, row in zip(tokens, rows, strict=True):
            own[: len(row)] = torch.tensor([*row[: context - 1], row[-1]] if len(row) > context else row)
        return tokens, tuple(len(row) > context for row in rows)

    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        """Prompts → [B, embed_dim]."""
        return self.encode_tokens(self.tokenize(prompts)[0])

    def encode_tokens(self, tokens: Tensor) -> Tensor:
        """What `tokenize` gives → [B, embed_dim]."""
        if self.tower is None or torch.is_autocast_enabled(self.device.type):
            return self.model.encode_text(tokens.to(self.device, non_blocking=True))
        return self.tower(tokens)

    def scale(self, image: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] in [0, 1] → the size that the image tower reads."""
        size = (self.image_size, self.image_size)
        if image.shape[-2:] == size:
            return image
        return F.interpolate(image, size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)

    def encode_image(self, image: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] in [0, 1], any size → [B, embed_dim]."""
        image = self.scale(image)
        mean, std = (send(values, image.device).view(3, 1, 1) for values in PIXEL_STATISTICS)
        return self.model.encode_image(((image - mean) / std).to(self.model.logit_scale.dtype))
