"""Encode captioned images as the denoiser and the prior see them: tokens and embeddings.

Scenes of a corpus are encoded once, by a bundle's frozen VQGAN, into a `Pool` on the device, which
training draws from without waiting. The user's own images come through an `ExampleStream`, encoded
by all of a bundle's frozen networks. Letters: B images, H W token grid, L bytes, D channels.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from model.bundle import BundleV3
from model.config import BundleV3Config
from model.networks.text_encoders import ByteEncoder
from model.networks.vqgan_v3 import VQGAN
from model.training.codes import USED, Codes
from model.training.data import Scenes, Source, Text, as_float
from model.training.processes import rank, world
from model.training.scenes import ASPECTS
from model.training.stencils import Stencils

_AT_ONCE = 32  # images that are drawn and encoded together
# Encoders are not as exact as the codes that they learn: noise up to these deviations on a byte's
# channels, and on a caption's.
_BYTE_NOISE, _TEXT_NOISE = 0.4, 0.4


@dataclass(frozen=True, slots=True)
class Examples:
    """B captioned images, encoded.

    tokens: [B, H, W]. byt5: [B, L, D]. mask: [B, L], False at padding. clip_text, clip_image: [B,
    D']. empty: [B], True where there is no caption. shown: [B], the empty ones that are
    nevertheless drawn from their CLIP image embedding; None for none. commonest: [B], each image's
    most frequent code, if it is known. sprites: [B, 4, H', W'] of 0 … 1, the things without their
    background, premultiplied by alpha, if they are known.
    """

    tokens: Tensor
    byt5: Tensor
    mask: Tensor
    clip_text: Tensor
    clip_image: Tensor
    empty: Tensor
    shown: Tensor | None = None
    commonest: Tensor | None = None
    sprites: Tensor | None = None

    @classmethod
    @torch.no_grad()
    def of(
        cls,
        bundle: BundleV3,
        images: Tensor,
        captions: list[str],
        dtype: torch.dtype = torch.float32,
    ) -> Examples:
        """Return encoded images, with the bundle's VQGAN and encoders.

        images: [B, 3, H, W] of 0 … 1 on the bundle's device. dtype: of the products; the results
        are fp32.
        """
        with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
            text = bundle.byt5(captions)
            return cls(
                tokens=bundle.vqgan.encode(images),
                byt5=text.embeddings.float(),
                mask=text.mask,
                clip_text=bundle.clip.encode_text(captions).float(),
                clip_image=bundle.clip.encode_image(images).float(),
                empty=text.mask.sum(-1) <= 1,  # an end mark alone
            )


class ExampleStream:
    """Endless batches from a source, each of captions of about one length, to save padding.

    The source draws `pool` batches at a time; they are encoded once and met `reuse` times: the
    noise is fresh each time, and encoding costs as much as a third of a training step. The seed and
    the pool's number determine the order in a pool, so a checkpoint holds the source's position
    before the pool and the number of batches taken from it.

    pool: a divisor of the number of images that the source draws. dtype: of the encoders' products.
    empty: the share of empty captions.
    """

    def __init__(
        self,
        bundle: BundleV3,
        source: Source,
        seed: int,
        *,
        pool: int,
        reuse: int,
        dtype: torch.dtype = torch.float32,
        empty: float = 0.1,
    ) -> None:
        self.bundle = bundle
        self.source = source
        self.seed = seed
        self.pool = pool
        self.reuse = reuse
        self.empty = empty
        self.dtype = dtype
        self.device = next(bundle.denoiser.parameters()).device
        self._number, self._taken = 0, 0
        self._before = source.state_dict()
        self._batches: list[Examples] = []

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Examples:
        if not self._batches:
            self._batches = self._encoded()
        if self._taken >= len(self._batches):
            self._number, self._taken = self._number + 1, 0
            self._before = self.source.state_dict()
            self._batches = self._encoded()
        self._taken += 1
        return self._batches[self._taken - 1]

    def _encoded(self) -> list[Examples]:
        """Return the next pool's batches in the order in which they are met."""
        rng = np.random.default_rng([self.seed, 1, self._number])
        pixels, captions = self.source.draw()
        captions = ["" if rng.random() < self.empty else caption for caption in captions]
        order = np.argsort([len(caption) for caption in captions], kind="stable")
        batches = []
        for chosen in np.split(order, self.pool):
            images = as_float(pixels[torch.from_numpy(chosen)], self.device)
            batches.append(
                Examples.of(self.bundle, images, [captions[i] for i in chosen], self.dtype)
            )
        return [batches[i] for _ in range(self.reuse) for i in rng.permutation(self.pool)]

    @property
    def skipped(self) -> Mapping[str, int]:
        """Return the number of unusable files, by reason."""
        return self.source.skipped

    def state_dict(self) -> dict[str, Any]:
        """Return the position, which determines all batches that follow."""
        return {
            "source": self.source.identity,
            "before": self._before,
            "pool": self._number,
            "taken": self._taken,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a position.

        Warns and starts at the first image if the position is of another source: other files, or
        another number of processes.
        """
        if state["source"] != self.source.identity:
            warnings.warn(
                "this is not the data the checkpoint was trained on: "
                "it is begun with its first image",
                stacklevel=2,
            )
            return
        self._number = state["pool"]
        self._taken = state["taken"]
        self._before = state["before"]
        self.source.load_state_dict(self._before)
        self._batches = []


def encode_bytes(encoder: ByteEncoder, text: Text) -> Tensor:
    """Return the encoder's embeddings [B, L + 1, D] of captions, with gradients.

    It reads nothing from the device, unlike the encoder's own call.
    """
    t5, mask = encoder.t5.encoder, text.mask
    heads, eps = t5.config.num_heads, t5.config.layer_norm_epsilon
    x = F.embedding(text.ids, encoder.t5.shared.weight)
    length = x.shape[1]
    bias = t5.block[0].layer[0].SelfAttention.compute_bias(length, length)  # [1, heads, L, L]
    bias = bias.masked_fill(~mask[:, None, None], -1e4)
    for block in t5.block:
        own, gate = block.layer[0].SelfAttention, block.layer[1].DenseReluDense
        y = F.rms_norm(x, x.shape[-1:], block.layer[0].layer_norm.weight, eps)
        q, k, v = (m(y).unflatten(-1, (heads, -1)).transpose(1, 2) for m in (own.q, own.k, own.v))
        y = (
            F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype), scale=1.0)
            .transpose(1, 2)
            .flatten(2)
        )
        x = x + own.o(y)
        y = F.rms_norm(x, x.shape[-1:], block.layer[1].layer_norm.weight, eps)
        x = x + gate.wo(F.gelu(gate.wi_0(y), approximate="tanh") * gate.wi_1(y))
    return F.rms_norm(x, x.shape[-1:], t5.final_layer_norm.weight, eps)


def encode_images(vqgan: VQGAN, images: Tensor) -> Tensor:
    """Turn images [B, 3, H, W] of 0 … 1 into codes [B, h, w].

    The nearest code is chosen in fp32, under autocast too.
    """
    latents = vqgan.encode_latents(images)
    with torch.autocast(images.device.type, enabled=False):
        return vqgan.vquantizer.nearest(latents.float())


class Pool:
    """Encoded scenes of one aspect: their tokens and numbers; a full pool replaces the oldest.

    `grow` encodes some more, between steps; `draw` may be part of a recorded step, and draws among
    the scenes encoded so far. The features of captions and images are their codes (`codes.py`).
    Processes that share a training hold a share of the scenes each.

    capacity: the largest number of scenes held. dtype: of the VQGAN's products. sprites: hold the
    things without their background too, for `guides`. stencils: known tokens; without them every
    scene is encoded.
    """

    def __init__(
        self,
        config: BundleV3Config,
        scenes: Scenes,
        aspect: int,
        capacity: int,
        dtype: torch.dtype = torch.float32,
        *,
        sprites: bool = False,
        stencils: Stencils | None = None,
    ) -> None:
        self.scenes = scenes
        self.stencils = stencils
        self.aspect = aspect
        self.dtype = dtype
        self.codes = Codes(scenes.corpus)
        self.members = scenes.of_aspect[aspect][rank() :: world()]
        self.capacity = min(capacity, len(self.members))
        width, height = ASPECTS[aspect]
        f, device = config.vqgan.downscale, scenes.device
        self.tokens = torch.zeros(
            self.capacity, height // f, width // f, dtype=torch.int16, device=device
        )
        self.sprites = (
            torch.zeros(self.capacity, 4, height // 4, width // 4, dtype=torch.uint8, device=device)
            if sprites
            else None
        )
        self.commonest = torch.zeros(self.capacity, dtype=torch.int16, device=device)
        self.index = torch.zeros(self.capacity, dtype=torch.long, device=device)
        self.encoded, self._filled = 0, torch.ones((), device=device)

    @torch.no_grad()
    def grow(self, vqgan: VQGAN, count: int) -> None:
        """Encode `count` more scenes of the corpus, fewer at its end.

        After the last scene it starts again with the first, unless all scenes fit in the pool.
        """
        if self.encoded >= len(self.members) == self.capacity:
            return
        start = self.encoded % len(self.members)
        index = self.members[start : start + count]
        place = (
            torch.arange(self.encoded, self.encoded + len(index), device=index.device)
            % self.capacity
        )
        tokens = self._tokens(vqgan, index)
        self.tokens[place], self.index[place] = tokens.to(torch.int16), index
        self.commonest[place] = commonest(tokens).to(torch.int16)
        if self.sprites is not None:
            self.sprites[place] = self.scenes.sprites(index, self.aspect)
        self.encoded += len(index)
        self._filled.fill_(min(self.encoded, self.capacity))

    def _tokens(self, vqgan: VQGAN, index: Tensor) -> Tensor:
        """Return the tokens of scenes: laid from stencils where they are known, else encoded."""
        if self.stencils is None:
            return self._encoded(vqgan, index)
        tokens, known = self.stencils.lay(self.scenes.corpus.layouts[index], *self.tokens.shape[1:])
        others = (~known).nonzero()[:, 0]
        if len(others):
            encoded = self._encoded(vqgan, index[others])
            self.stencils.settle(self.scenes.corpus.layouts[index[others]], encoded)
            tokens[others] = encoded
        return tokens

    def _encoded(self, vqgan: VQGAN, index: Tensor) -> Tensor:
        with torch.autocast(index.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return torch.cat(
                [
                    encode_images(vqgan, self.scenes.images(part, self.aspect))
                    for part in index.split(_AT_ONCE)
                ]
            )

    def restore(self, vqgan: VQGAN, encoded: int, at_once: int) -> None:
        """Encode again what the pool held after `encoded` scenes, `at_once` at a time.

        The scenes that were replaced since are passed over.
        """
        self.forget()
        while self.encoded < encoded:
            left = len(self.members) - self.encoded % len(self.members)
            if encoded - self.encoded > self.capacity + at_once:
                self.encoded += min(at_once, left)
            else:
                self.grow(vqgan, at_once)

    def fake(self) -> None:
        """Fill the pool with random contents, to record steps before any scene is encoded."""
        self.tokens.random_(0, 1000)
        self.index.copy_(self.members[: self.capacity])
        self._filled.fill_(self.capacity)

    def forget(self) -> None:
        """Empty the pool."""
        self.encoded = 0
        self._filled.fill_(1)

    @torch.no_grad()
    def draw(
        self, count: int, bytes_read: int, empty: float = 0.07, shown: float = 0.05
    ) -> Examples:
        """Return `count` random scenes.

        bytes_read: the number of random bytes read of each caption. empty: the share of empty
        captions without the image's embedding. shown: the share of empty captions with it.
        """
        corpus, device = self.scenes.corpus, self.tokens.device
        chosen = (torch.rand(count, device=device) * self._filled).long()
        which = (torch.rand(count, device=device) * corpus.text.shape[1]).long()
        chance = torch.rand(count, device=device)
        silent, index = chance < empty + shown, self.index[chosen]
        place = (
            torch.rand(count, bytes_read, device=device)
            * (corpus.length[index, which].float()[:, None] + 1)
        ).long()
        said = ~silent[:, None]
        byt5 = self.codes.bytes(index, which, place) * said[..., None]
        byt5[..., :USED] += (
            _BYTE_NOISE
            * torch.rand(count, 1, 1, device=device)
            * torch.randn(count, bytes_read, USED, device=device)
        )
        text = self.codes.text(index, which) * said
        return Examples(
            tokens=self.tokens[chosen].long(),
            byt5=byt5,
            mask=torch.ones(count, bytes_read, dtype=torch.bool, device=device),
            clip_text=text
            + _TEXT_NOISE * torch.rand(count, 1, device=device) * torch.randn_like(text),
            clip_image=self.codes.images(index),
            empty=silent,
            shown=(chance >= empty) & silent,
            commonest=self.commonest[chosen].long(),
            sprites=None if self.sprites is None else self.sprites[chosen].float() / 255,
        )


def commonest(tokens: Tensor) -> Tensor:
    """Return the most frequent code [B] of each row of tokens [B, H, W]."""
    flat = tokens.flatten(1).sort(dim=1).values
    place = torch.arange(flat.shape[1], device=flat.device)
    begins = F.pad(flat[:, 1:] != flat[:, :-1], (1, 0), value=True)
    run = (
        place - torch.where(begins, place, 0).cummax(dim=1).values
    )  # how far into its run of equal codes each is
    return flat.gather(1, run.argmax(dim=1, keepdim=True))[:, 0]
