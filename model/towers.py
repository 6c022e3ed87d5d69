"""The text encoders' passes in few calls, on the parameters of transformers' T5 and open_clip's CLIP, whose own forwards are their twins.

At a prompt's length a pass is some dozen small products, and most of its time went to what lay between them: modules, masks, position
biases made anew for every text. Made after the weights are loaded (`ByteEncoder.fold`, `CLIP.fold`): packed ones are copies.

Letters: B prompts, L tokens, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.kernels.packed import LinearMap, linear_map

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
    """A T5 encoder with a gated GELU: byte ids [B, L] and mask [B, L] → embeddings [B, L, D]."""

    def __init__(self, t5: Any) -> None:
        self._t5, encoder = t5, t5.encoder
        self.heads, self.eps = t5.config.num_heads, t5.config.layer_norm_epsilon
        self._layers = [_byte_layer(*block.layer) for block in encoder.block]
        self._biases: dict[int, Tensor] = {}

    @staticmethod
    def supports(t5: Any) -> bool:
        # Not what is kept in int8.
        plain = isinstance(t5.encoder.block[0].layer[0].SelfAttention.q, nn.Linear)
        return bool(plain and t5.config.feed_forward_proj == "gated-gelu")

    def __call__(self, tokens: Tensor, mask: Tensor) -> Tensor:
        bias = self._bias(tokens.shape[1]).masked_fill(~mask[:, None, None], -torch.inf)  # [B, heads, L, L]
        x = F.embedding(tokens, self._t5.shared.weight)
        for layer in self._layers:
            qkv = layer.qkv(self._norm(x, layer.attention_norm))
            q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind()
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0).transpose(1, 2).flatten(2)
            x = _bounded(x + layer.o(y))
            y = self._norm(x, layer.gate_norm)
            x = _bounded(x + layer.wo(layer.wi_0(y) * layer.wi_1(y)))
        return self._norm(x, self._t5.encoder.final_layer_norm.weight)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], weight, self.eps)

    def _bias(self, length: int) -> Tensor:
        """[1, heads, L, L], the same for every text of a length."""
        if length not in self._biases:
            self._biases[length] = self._t5.encoder.block[0].layer[0].SelfAttention.compute_bias(length, length).contiguous()
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
    """The weights of several linear maps of the same input as one, of which theirs become views: nothing is in memory twice."""
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
    """

    def __init__(self, clip: Any, packed: bool = True) -> None:
        self._clip, self._blocks = clip, list(clip.transformer.resblocks)
        rows = TYPICAL_LENGTH // 2 if packed else None
        self._maps = [_text_maps(block, rows) for block in self._blocks]

    @staticmethod
    def supports(clip: Any) -> bool:
        plain = all(type(block).__name__ == "ResidualAttentionBlock" for block in clip.transformer.resblocks)
        return bool(plain and clip.text_pool_type == "argmax" and clip.attn_mask is not None)

    def __call__(self, tokens: Tensor) -> Tensor:
        clip, (B, context) = self._clip, tokens.shape
        ends = tokens.argmax(-1)  # the end mark has the largest number
        length = min(-(-(int(ends.max()) + 1) // _TOKEN_STEP) * _TOKEN_STEP, context)
        device = clip.positional_embedding.device
        tokens, ends = (t.to(device, non_blocking=True) for t in (tokens[:, :length], ends))
        x = F.embedding(tokens, clip.token_embedding.weight)
        x = x + clip.positional_embedding[:length]
        for block, maps in zip(self._blocks, self._maps, strict=True):
            x = _text_block(x, block, *maps)
        x = clip.ln_final(x[torch.arange(B, device=device), ends])
        if clip.text_projection is None:
            return x
        return clip.text_projection(x) if isinstance(clip.text_projection, nn.Linear) else x @ clip.text_projection


def _text_maps(block: Any, rows: int | None) -> tuple[LinearMap, LinearMap, LinearMap, LinearMap]:
    """Into the heads and out of them, into the MLP and out of it."""
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


def _text_block(x: Tensor, block: Any, into: LinearMap, out: LinearMap, expand: LinearMap, contract: LinearMap) -> Tensor:
    q, k, v = into(block.ln_1(x)).unflatten(-1, (3, block.attn.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind()
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
    x = x + block.ls_1(out(y))
    return x + block.ls_2(contract(expand(block.ln_2(x))))
