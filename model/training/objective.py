"""Noise tokens, drop parts of conditions and choose positions, for every denoiser's objective.

Letters: B rows, H W token grid, n positions, N of them of all rows, L bytes, D channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.stateless import _reparametrize_module

from model.networks.denoiser_v3 import Condition, Denoiser
from model.pipeline import attention_weights
from model.training.attention import PlainAttention
from model.training.features import Examples

# Published: CLIP text and image are each dropped 9 times in 10, on 600 million images. Ours sees
# a thousandth of that.
DROP_CLIP = 0.5
# The prior's embeddings are not quite those of an image; noise of this share keeps the denoiser
# from trusting them to the last digit.
_IMAGE_NOISE = 0.5
# The prior is mistaken at times. This share of the captioned rows gets another image's embedding,
# so that the words count.
_MISTAKEN = 0.03
# What a position that was not replaced weighs less than one that was, at time 0.
_UNTOUCHED = 0.7


def draw_times(count: int, device: torch.device, early: float = 1.0) -> Tensor:
    """Return times [count] in (0, 1], evenly spread as published where `early` is 1.

    The larger `early`, the nearer to 1 they are.
    """
    return 1 - torch.rand(count, device=device) ** early


@dataclass(frozen=True, slots=True)
class NoisePath:
    """Images on their way to noise. Where one is noise at a time, it is the same noise later.

    tokens: clean, [B, H, W]. uniform: the time [B, H, W] from which on each is noise. noise: the
    codes [B, H, W] that take their places.
    """

    tokens: Tensor
    uniform: Tensor
    noise: Tensor

    @classmethod
    def of(cls, tokens: Tensor, codes: int) -> NoisePath:
        """Return a random path of tokens [B, H, W]. codes: the number of codes."""
        uniform = torch.rand(tokens.shape, device=tokens.device)
        return cls(tokens, uniform, torch.randint_like(tokens, codes))

    def at(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return the tokens [B, H, W] at times t [B], and where they are noise."""
        noised = self.uniform < t[:, None, None]
        return torch.where(noised, self.noise, self.tokens), noised


def corrupt(tokens: Tensor, t: Tensor, codes: int) -> tuple[Tensor, Tensor]:
    """Return tokens [B, H, W] with random codes at a share t [B] of them, and where those are."""
    return NoisePath.of(tokens, codes).at(t)


@contextmanager
def folded(denoiser: Denoiser) -> Iterator[None]:
    """Fold the condition's two maps to every block's keys and values into one, for this context.

    The one map is their product; gradients pass through it to both.
    """
    parts = [block.folded_kv() for block in denoiser.attention_blocks]
    if parts:
        weights, biases = zip(*parts, strict=True)
        denoiser.kv_weight, denoiser.kv_bias = torch.cat(weights), torch.cat(biases)
    try:
        yield
    finally:
        denoiser.kv_weight = denoiser.kv_bias = None


@dataclass(frozen=True, slots=True)
class ConditionInputs:
    """The inputs of B conditions. kept: [B, 2], whether CLIP's text and its image are read.

    byt5: [B, L, D]. mask: [B, L], False at padding. clip_text, clip_image: [B, D'].
    """

    byt5: Tensor
    mask: Tensor
    clip_text: Tensor
    clip_image: Tensor
    kept: Tensor


def disturbed(x: Examples, drop_clip: float = DROP_CLIP) -> ConditionInputs:
    """Return the inputs of a training batch's conditions, with noise, and with CLIP's dropped.

    drop_clip: the probability of dropping each of a row's CLIP text and CLIP image.
    """
    B = len(x.tokens)
    device = x.tokens.device
    image = x.clip_image + _IMAGE_NOISE * x.clip_image.std() * torch.rand(
        B, 1, device=device
    ) * torch.randn_like(x.clip_image)
    alone = torch.zeros_like(x.empty) if x.shown is None else x.shown
    mistaken = (torch.rand(B, device=device) < _MISTAKEN) & ~x.empty
    image = torch.where(mistaken[:, None], image.roll(1, 0), image)
    # The image of an empty caption would tell what the missing text may not, unless it is all
    # that is told.
    text, with_image = (torch.rand(B, 2, device=device) >= drop_clip).unbind(1)
    kept = torch.stack([text, (with_image & ~x.empty) | alone], dim=1)
    return ConditionInputs(x.byt5, x.mask, x.clip_text, image, kept)


def condition_of(
    denoiser: Denoiser, inputs: ConditionInputs, weights: tuple[float, float] | None = None
) -> Condition:
    """Return the condition of a batch, where what is not read has masked keys.

    weights: of the attention, as a recipe's `attention_weights`.
    """
    dtype = denoiser.byt5_mapper.weight.dtype
    seq = denoiser.config.clip_seq_len
    byt5, text, image = (
        part.to(dtype) for part in (inputs.byt5, inputs.clip_text, inputs.clip_image)
    )
    factors = None if weights is None else attention_weights(inputs.mask, seq, weights)
    condition = denoiser.condition(byt5, inputs.mask, text, image, factors)
    kept = inputs.kept.repeat_interleave(seq, dim=1)
    return replace(condition, mask=torch.cat([inputs.mask, kept], dim=1))


def dropped_condition(denoiser: Denoiser, x: Examples, drop_clip: float = DROP_CLIP) -> Condition:
    """Return the condition of a training batch, with CLIP's tokens dropped at random.

    Each row keeps or loses its CLIP text and its CLIP image tokens by masking their keys.
    drop_clip: the probability of each.
    """
    inputs = disturbed(x, drop_clip)
    with folded(denoiser):
        return condition_of(denoiser, inputs)


def attention(device: torch.device) -> AbstractContextManager[None]:
    """Choose the computation of attention: plain products on a CPU, else torch's."""
    return PlainAttention() if device.type == "cpu" else nullcontext()


def choose_positions(
    tokens: Tensor, share: float, focus: float = 1.0, commonest: Tensor | None = None
) -> Tensor:
    """Return random positions [B, n] in tokens [B, H, W], numbered in the flattened grid.

    share: of the positions that are chosen. focus: how many times as likely a position is if its
    token, or one beside it, is not the image's most frequent code. commonest: that code [B]; it is
    computed if it is not given. Both sides of an outline are in there: choosing by the token alone
    would teach that things are larger than they are.
    """
    B, H, W = tokens.shape
    usual = tokens.flatten(1).mode(dim=1).values if commonest is None else commonest
    busy = F.max_pool2d(
        (tokens != usual[:, None, None]).float(), kernel_size=3, stride=1, padding=1
    )
    weight = 1 + (focus - 1) * busy.flatten(1)
    # The n largest of u^(1/w) are a draw without replacement with weights w (Efraimidis and
    # Spirakis, 2006).
    return (
        torch.rand(B, H * W, device=tokens.device)
        .pow(1 / weight)
        .topk(max(1, int(H * W * share)), dim=1)
        .indices
    )


def gathered(features: Tensor, judged: Tensor) -> Tensor:
    """Return the features [N, C] of judged positions [B, n], from features [B, H, W, C]."""
    flat = features.flatten(1, 2)
    return flat.gather(1, judged[..., None].expand(-1, -1, flat.shape[-1])).flatten(0, 1)


def projection_of(denoiser: Denoiser) -> Tensor:
    """Return the weight [K, C] of the last projection, to the codebook."""
    return denoiser.out_mapper.get_parameter("1.weight").flatten(1)


def position_weights(t: Tensor, noised: Tensor, judged: Tensor) -> Tensor:
    """Return the weights [N] of judged positions [B, n]: as published, less where nothing changed.

    t: times [B]. noised: [B, H, W].
    """
    touched = noised.flatten(1).gather(1, judged).flatten()
    return 1 - _UNTOUCHED * (1 - t).repeat_interleave(judged.shape[1]) * ~touched


@contextmanager
def in_products(denoiser: Denoiser) -> Iterator[None]:
    """Compute in half precision for this context, by casting the network's weights.

    They get the type that autocast would cast its products to.

    Activations are cast as well, as in inference; gradients reach the network's own weights.
    Autocast itself casts to and fro at every norm, which is a quarter of a step on a CPU.
    """
    device = next(denoiser.parameters()).device.type
    if not torch.is_autocast_enabled(device):
        yield
        return
    dtype = torch.get_autocast_dtype(device)
    cast = {name: p.to(dtype) for name, p in denoiser.named_parameters()}
    with torch.autocast(device, enabled=False), _reparametrize_module(denoiser, cast):
        yield
