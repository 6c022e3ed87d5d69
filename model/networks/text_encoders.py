"""The text encoders in few calls: transformers' T5 and open_clip's CLIP, which stay their twins.

At a prompt's length a pass is some dozen small products, and most of its time went to what lay
between them: modules, masks, position biases made anew for every text. Made after the weights are
loaded (`ByteEncoder.fold`, `CLIP.fold`): packed ones are copies.

Letters: B prompts, L tokens, D width.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.kernels.cpu import LinearMap, linear_map
from model.network_config import ByteEncoderConfig, CLIPConfig
from model.networks.layers import to_device
from model.runtime import declare_missing_torchvision_operators

# Passes are packed for a text of about this many tokens.
TYPICAL_LENGTH = 64
# The text tower reads a multiple of so many tokens, so that few shapes occur.
_TOKEN_STEP = 8
# transformers keeps T5's fp16 activations from overflowing at this distance from the largest.
_FP16_MARGIN = 1000


@dataclass(frozen=True, slots=True)
class _ByteLayer:
    """One T5 block; names as in its published state dict."""

    attention_norm: Tensor
    qkv: LinearMap
    o: LinearMap
    gate_norm: Tensor
    wi_0: LinearMap
    wi_1: LinearMap
    wo: LinearMap


class ByteTower:
    """A T5 encoder with a gated GELU: byte ids [B, L] and mask [B, L] → embeddings [B, L, D].

    layers: `plain_layers`, unless a compiled form has taken their place.
    """

    def __init__(self, t5: Any) -> None:
        self._t5, encoder = t5, t5.encoder
        self.heads, self.eps = t5.config.num_heads, t5.config.layer_norm_epsilon
        self._layers = [_byte_layer(*block.layer) for block in encoder.block]
        self._biases: dict[int, Tensor] = {}
        self.layers: Callable[[Tensor, Tensor], Tensor] = self.plain_layers

    @staticmethod
    def supports(t5: Any) -> bool:
        """Return whether a T5's weights are plain and its feed-forward gated by GELU."""
        # Not what is kept in int8.
        plain = isinstance(t5.encoder.block[0].layer[0].SelfAttention.q, nn.Linear)
        return bool(plain and t5.config.feed_forward_proj == "gated-gelu")

    def __call__(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Encode byte ids [B, L] with mask [B, L]."""
        return self.layers(tokens, self.masked_bias(mask))

    def masked_bias(self, mask: Tensor) -> Tensor:
        """Return the position bias of texts with mask [B, L], −∞ at padding: [B, heads, L, L]."""
        return self._bias(mask.shape[1]).masked_fill(~mask[:, None, None], -torch.inf)

    def plain_layers(self, tokens: Tensor, bias: Tensor) -> Tensor:
        """Encode byte ids [B, L], given `masked_bias`."""
        x = F.embedding(tokens, self._t5.shared.weight)
        for layer in self._layers:
            qkv = layer.qkv(self._norm(x, layer.attention_norm))
            q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind()
            y = (
                F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)
                .transpose(1, 2)
                .flatten(2)
            )
            x = _bounded(x + layer.o(y))
            y = self._norm(x, layer.gate_norm)
            x = _bounded(x + layer.wo(layer.wi_0(y) * layer.wi_1(y)))
        return self._norm(x, self._t5.encoder.final_layer_norm.weight)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], weight, self.eps)

    def _bias(self, length: int) -> Tensor:
        """Return the position bias [1, heads, L, L], the same for every text of a length."""
        if length not in self._biases:
            self._biases[length] = (
                self._t5.encoder.block[0]
                .layer[0]
                .SelfAttention.compute_bias(length, length)
                .contiguous()
            )
        return self._biases[length]


def _byte_layer(attention: Any, feed_forward: Any) -> _ByteLayer:
    own, gate = attention.SelfAttention, feed_forward.DenseReluDense
    return _ByteLayer(
        attention.layer_norm.weight,
        linear_map(joined([own.q, own.k, own.v]), None, TYPICAL_LENGTH),
        linear_map(own.o.weight, None, TYPICAL_LENGTH),
        feed_forward.layer_norm.weight,
        linear_map(gate.wi_0.weight, None, TYPICAL_LENGTH, "gelu_tanh"),
        linear_map(gate.wi_1.weight, None, TYPICAL_LENGTH),
        linear_map(gate.wo.weight, None, TYPICAL_LENGTH),
    )


def joined(parts: list[Any]) -> Tensor:
    """Join the weights of several linear maps of the same input.

    The maps' own weights become views, so nothing is in memory twice.
    """
    weight = torch.cat([part.weight.data for part in parts])
    for part, own in zip(parts, weight.split([len(part.weight) for part in parts]), strict=True):
        part.weight.data = own
    return weight


def _bounded(x: Tensor) -> Tensor:
    limit = torch.finfo(torch.float16).max - _FP16_MARGIN
    return x.clamp_(-limit, limit) if x.dtype == torch.float16 else x


class TextTower:
    """CLIP's text tower: token ids [B, context] on the CPU → embeddings [B, D'].

    It is causal and read at the end mark, so what comes after the longest text's is not computed.

    layers: `plain_layers`, unless a compiled form has taken their place.
    """

    def __init__(self, clip: Any, packed: bool = True) -> None:
        self._clip, self._blocks = clip, list(clip.transformer.resblocks)
        rows = TYPICAL_LENGTH // 2 if packed else None
        self._maps = [_text_maps(block, rows) for block in self._blocks]
        self.layers: Callable[[Tensor, Tensor], Tensor] = self.plain_layers

    @staticmethod
    def supports(clip: Any) -> bool:
        """Return whether the tower can compute this CLIP."""
        plain = all(
            type(block).__name__ == "ResidualAttentionBlock" for block in clip.transformer.resblocks
        )
        return bool(plain and clip.text_pool_type == "argmax" and clip.attn_mask is not None)

    def __call__(self, tokens: Tensor) -> Tensor:
        """Encode token ids [B, context]."""
        device = self._clip.positional_embedding.device
        return self.layers(*(t.to(device, non_blocking=True) for t in self.read_part(tokens)))

    def read_part(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return the columns [B, L] that are read, up to the last end mark, and the marks [B]."""
        ends = tokens.argmax(-1)  # the end mark has the largest number
        length = -(-(int(ends.max()) + 1) // _TOKEN_STEP) * _TOKEN_STEP
        return tokens[:, :length], ends

    def plain_layers(self, tokens: Tensor, ends: Tensor) -> Tensor:
        """Encode what `read_part` returned, on the weights' device."""
        clip, (B, length) = self._clip, tokens.shape
        x = F.embedding(tokens, clip.token_embedding.weight)
        x = x + clip.positional_embedding[:length]
        for block, maps in zip(self._blocks, self._maps, strict=True):
            x = _text_block(x, block, *maps)
        x = clip.ln_final(x[torch.arange(B, device=x.device), ends])
        if clip.text_projection is None:
            return x
        return (
            clip.text_projection(x)
            if isinstance(clip.text_projection, nn.Linear)
            else x @ clip.text_projection
        )


def _text_maps(block: Any, rows: int | None) -> tuple[LinearMap, LinearMap, LinearMap, LinearMap]:
    """Return a block's maps into and out of the heads, and into and out of the MLP."""
    attn, mlp, gelu = block.attn, block.mlp, block.mlp.gelu
    expand: LinearMap
    if isinstance(gelu, nn.GELU) and gelu.approximate == "none":
        expand = linear_map(mlp.c_fc.weight, mlp.c_fc.bias, rows, "gelu")
    else:
        expand = nn.Sequential(mlp.c_fc, gelu)
    return (
        linear_map(attn.in_proj_weight, attn.in_proj_bias, rows),
        linear_map(attn.out_proj.weight, attn.out_proj.bias, rows),
        expand,
        linear_map(mlp.c_proj.weight, mlp.c_proj.bias, rows),
    )


def _text_block(
    x: Tensor, block: Any, into: LinearMap, out: LinearMap, expand: LinearMap, contract: LinearMap
) -> Tensor:
    q, k, v = (
        into(block.ln_1(x))
        .unflatten(-1, (3, block.attn.num_heads, -1))
        .permute(2, 0, 3, 1, 4)
        .unbind()
    )
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
    x = x + block.ls_1(out(y))
    return x + block.ls_2(contract(expand(block.ln_2(x))))


# Byte sequences are padded to one of these lengths, so that few shapes occur.
BYTE_BUCKETS = (32, 48, 64, 96, 128, 192, 256, 384, 512, 768)

# ByT5's vocabulary: three marks, then the bytes.
_PADDING, _END, _FIRST_BYTE = 0, 1, 3

# A tokenizer's merges, unpacked; open_clip's own have 3.2 MB.
MAX_MERGES_BYTES = 16 * 2**20

# Characters of a prompt that CLIP's tokenizer reads, and lines that it cleans one by one.
MAX_CHARACTERS = 4000
MAX_LINES = 100

# Published channel statistics of CLIP: mean and standard deviation of red, green and blue.
PIXEL_STATISTICS = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


@dataclass(frozen=True, slots=True)
class Prompt:
    """One encoded prompt: byte embeddings [1, L, D] and mask [1, L], CLIP embedding [1, D'].

    truncated: names of the encoders that cut the prompt.

    L is 0 where there is no byte encoder.
    """

    byt5: Tensor
    mask: Tensor
    clip: Tensor
    truncated: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ByteEmbeddings:
    """Encoded bytes of B prompts.

    embeddings: [B, L, d_model], L a bucket. mask: [B, L], False at padding. truncated: whether each
    prompt was cut.
    """

    embeddings: Tensor
    mask: Tensor
    truncated: tuple[bool, ...]


class ByteEncoder(nn.Module):
    """transformers' T5 encoder on UTF-8 bytes; the state dict is that of a `T5EncoderModel`."""

    def __init__(self, config: ByteEncoderConfig) -> None:
        declare_missing_torchvision_operators()
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
        """Tie the embedding's second name to the first, after a meta module got its tensors."""
        self.t5.set_input_embeddings(self.t5.shared)

    def fold(self) -> None:
        """Compute by `ByteTower` from now on, in few calls; the weights are fixed."""
        self.tower = ByteTower(self.t5) if ByteTower.supports(self.t5) else None

    def tokenize(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor, tuple[bool, ...]]:
        """Return byte ids [B, L] padded to a bucket, mask [B, L], and which prompts were cut.

        A prompt is cut to `max_bytes`, end mark included.
        """
        limit = self.config.max_bytes
        # A prompt is text: "</s>" in it is four characters, not the end mark.
        texts = [prompt.encode("utf-8", "replace") for prompt in prompts]
        rows = [[byte + _FIRST_BYTE for byte in text[: limit - 1]] + [_END] for text in texts]
        length = bucket(max(map(len, rows)), limit)
        tokens = torch.tensor([row + [_PADDING] * (length - len(row)) for row in rows])
        mask = torch.arange(length) < torch.tensor([len(row) for row in rows])[:, None]
        return tokens, mask, tuple(len(text) > limit - 1 for text in texts)

    def forward(self, prompts: Sequence[str]) -> ByteEmbeddings:
        """Encode prompts."""
        tokens, mask, truncated = self.tokenize(prompts)
        device = self.t5.shared.weight.device
        tokens, mask = (t.to(device, non_blocking=True) for t in (tokens, mask))
        # Packed operators know nothing of autocast.
        if self.tower is None or torch.is_autocast_enabled(device.type):
            embeddings = self.t5(input_ids=tokens, attention_mask=mask.long()).last_hidden_state
        else:
            embeddings = self.tower(tokens, mask)
        return ByteEmbeddings(embeddings, mask, truncated)


def bucket(length: int, limit: int) -> int:
    """Return the smallest bucket that holds `length`, at most `limit`."""
    return next((b for b in BYTE_BUCKETS if length <= b < limit), limit)


def check_merges(path: Path) -> None:
    """Check that a merges file is gzipped text of bounded length: the tokenizer reads all of it.

    Raises ValueError.
    """
    try:
        with gzip.open(path) as file:
            text = file.read(MAX_MERGES_BYTES + 1)
        text.decode("utf-8")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError):
        raise ValueError(f"{path.name} is no gzipped text") from None
    if len(text) > MAX_MERGES_BYTES:
        raise ValueError(f"{path.name} has more than {MAX_MERGES_BYTES} bytes when unpacked")


class CLIP(nn.Module):
    """open_clip's CLIP, both towers.

    Embeddings are not normalised, as the published system uses them.
    """

    def __init__(self, config: CLIPConfig, directory: Path | None = None) -> None:
        """Build the networks.

        directory: of the bundle's own merges file, for configurations that name one. Raises
        ValueError for a file that is no list of merges, or too long for the vocabulary.
        """
        declare_missing_torchvision_operators()
        import open_clip
        from open_clip.tokenizer import SimpleTokenizer

        super().__init__()
        self.config = config
        towers: dict[str, Any] = {
            "vision_cfg": asdict(config.vision_cfg),
            "text_cfg": asdict(config.text_cfg),
        }
        self.model = open_clip.CLIP(config.embed_dim, quick_gelu=config.quick_gelu, **towers)
        merges = {}
        if config.merges is not None and directory is not None:
            check_merges(directory / config.merges)
            merges = {"bpe_path": str(directory / config.merges)}
        self.tokenizer = SimpleTokenizer(context_length=config.context_length, **merges)
        if merges and self.tokenizer.vocab_size > config.text_cfg.vocab_size:
            sizes = f"{self.tokenizer.vocab_size} tokens, and vocab_size is"
            raise ValueError(f"{config.merges} makes {sizes} {config.text_cfg.vocab_size}")
        self.image_size = config.vision_cfg.image_size
        self.tower: TextTower | None = None

    def complete(self) -> None:
        """Build the causal mask, which no state dict has, after a meta module got its tensors."""
        length = self.tokenizer.context_length
        mask = torch.full(
            (length, length), -torch.inf, device=self.device, dtype=self.model.logit_scale.dtype
        ).triu_(1)
        self.model.register_buffer("attn_mask", mask, persistent=False)

    def fold(self, packed: bool = True) -> None:
        """Compute texts by `TextTower` from now on, in few calls; the weights are fixed.

        packed: by copies of the weights.
        """
        self.tower = TextTower(self.model, packed) if TextTower.supports(self.model) else None

    @property
    def device(self) -> torch.device:
        """The weights' device."""
        return self.model.logit_scale.device

    def tokenize(self, prompts: Sequence[str]) -> tuple[Tensor, tuple[bool, ...]]:
        """Return token ids [B, context] on the CPU, and which prompts have more tokens.

        Start and end marks count.
        """
        context, t = self.tokenizer.context_length, self.tokenizer
        words = [self._token_ids(prompt) for prompt in prompts]
        rows = [[t.sot_token_id, *ids, t.eot_token_id] for ids, _ in words]
        tokens = torch.zeros(len(rows), context, dtype=torch.int64)
        for own, row in zip(tokens, rows, strict=True):
            own[: len(row)] = torch.tensor(
                [*row[: context - 1], row[-1]] if len(row) > context else row
            )
        cut = (cut for _, cut in words)
        return tokens, tuple(
            len(row) > context or each for row, each in zip(rows, cut, strict=True)
        )

    def _token_ids(self, prompt: str) -> tuple[list[int], bool]:
        """Return the ids that the tokenizer's `encode` would, and whether it read less than that.

        It reads a bounded part of the prompt and stops behind the context's end, because cleaning
        takes longer with every line, and a word takes the square of its length.
        """
        t, ids, text = self.tokenizer, list[int](), prompt
        if len(text) > MAX_CHARACTERS or text.count("\n") > MAX_LINES:
            text = " ".join(text.split())
        is_cut = len(text) > MAX_CHARACTERS
        for match in t.pat.finditer(t.clean_fn(text[:MAX_CHARACTERS])):
            word = "".join(t.byte_encoder[byte] for byte in match.group().encode("utf-8"))
            ids += [t.encoder[part] for part in t.bpe(word).split(" ")]
            if len(ids) > t.context_length:
                return ids, True
        return ids, is_cut

    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        """Encode prompts as [B, embed_dim]."""
        return self.encode_tokens(self.tokenize(prompts)[0])

    def encode_tokens(self, tokens: Tensor) -> Tensor:
        """Encode the tokens of `tokenize` as [B, embed_dim]."""
        if self.tower is None or torch.is_autocast_enabled(self.device.type):
            return self.model.encode_text(tokens.to(self.device, non_blocking=True))
        return self.tower(tokens)

    def scale(self, image: Tensor) -> Tensor:
        """Scale images [B, 3, H, W] in [0, 1] to the size that the image tower reads."""
        size = (self.image_size, self.image_size)
        if image.shape[-2:] == size:
            return image
        return F.interpolate(
            image, size, mode="bicubic", antialias=True, align_corners=False
        ).clamp(0, 1)

    def encode_image(self, image: Tensor) -> Tensor:
        """Encode images [B, 3, H, W] in [0, 1], of any size, as [B, embed_dim]."""
        image = self.scale(image)
        mean, std = (to_device(values, image.device).view(3, 1, 1) for values in PIXEL_STATISTICS)
        return self.model.encode_image(((image - mean) / std).to(self.model.logit_scale.dtype))
