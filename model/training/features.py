"""Captioned pictures as the denoiser and the prior see them: tokens and embeddings from the frozen networks of a bundle.

Scenes of a corpus are encoded once, into a `Pool` on the device, which training draws from without ever waiting. Somebody's own pictures
come through an `ExampleStream`.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from model.bundle import BundleV3
from model.config import BundleV3Config
from model.text import ByteEncoder
from model.training.data import Scenes, Source, Text, as_float
from model.training.scenes import ASPECTS
from model.vqgan import VQGAN


@dataclass(frozen=True, slots=True)
class Examples:
    """B captioned pictures. tokens [B, H, W]; byt5 [B, L, D] with mask [B, L]; clip_text, clip_image [B, D']; empty [B]: no caption.

    shown: [B], which of the empty ones are nevertheless to be drawn from their CLIP embedding; None is none. commonest: [B], the code that
    is most frequent in each, if it is known.
    """

    tokens: Tensor
    byt5: Tensor
    mask: Tensor
    clip_text: Tensor
    clip_image: Tensor
    empty: Tensor
    shown: Tensor | None = None
    commonest: Tensor | None = None

    @classmethod
    @torch.no_grad()
    def of(cls, bundle: BundleV3, images: Tensor, captions: list[str], dtype: torch.dtype = torch.float32) -> Examples:
        """images: [B, 3, H, W] in [0, 1] on the bundle's device. dtype: of the products; what comes out is fp32."""
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
    """Endless batches from a source, captions of about one length together, because padding costs as much as text.

    The source draws `pool` batches at a time; they are encoded once and gone through `reuse` times: the noise is fresh each time, and
    encoding costs as much as a third of a training step. What a pool does with its pictures follows from the seed and the pool's number, so
    a checkpoint holds where the source stood before the pool and how many of its batches were taken.
    """

    def __init__(
        self, bundle: BundleV3, source: Source, seed: int, *, pool: int, reuse: int, dtype: torch.dtype = torch.float32, empty: float = 0.1
    ) -> None:
        """pool: divides the number of pictures the source draws. dtype: of the encoders' products. empty: share of empty captions."""
        self.bundle, self.source, self.seed, self.pool, self.reuse, self.empty = bundle, source, seed, pool, reuse, empty
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
        """The next pool's batches in the order in which they are met."""
        rng = np.random.default_rng([self.seed, 1, self._number])
        pixels, captions = self.source.draw()
        captions = ["" if rng.random() < self.empty else caption for caption in captions]
        order = np.argsort([len(caption) for caption in captions], kind="stable")
        batches = []
        for chosen in np.split(order, self.pool):
            images = as_float(pixels[torch.from_numpy(chosen)], self.device)
            batches.append(Examples.of(self.bundle, images, [captions[i] for i in chosen], self.dtype))
        return [batches[i] for _ in range(self.reuse) for i in rng.permutation(self.pool)]

    @property
    def skipped(self) -> Mapping[str, int]:
        """How many files could not be used, by reason."""
        return self.source.skipped

    def state_dict(self) -> dict[str, Any]:
        """Where it stands: everything that it will yield follows from this."""
        return {"source": self.source.identity, "before": self._before, "pool": self._number, "taken": self._taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from there; a position in another source (other files, another number of processes) is left alone, and that is said."""
        if state["source"] != self.source.identity:
            warnings.warn("this is not the data the checkpoint was trained on: it is begun with its first picture", stacklevel=2)
            return
        self._number, self._taken, self._before = state["pool"], state["taken"], state["before"]
        self.source.load_state_dict(self._before)
        self._batches = []


def encode_bytes(encoder: ByteEncoder, text: Text) -> Tensor:
    """Captions → embeddings [B, L + 1, D], what `encoder` makes of them, in calls that ask the device for nothing and keep gradients."""
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
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype), scale=1.0).transpose(1, 2).flatten(2)
        x = x + own.o(y)
        y = F.rms_norm(x, x.shape[-1:], block.layer[1].layer_norm.weight, eps)
        x = x + gate.wo(F.gelu(gate.wi_0(y), approximate="tanh") * gate.wi_1(y))
    return F.rms_norm(x, x.shape[-1:], t5.final_layer_norm.weight, eps)


def encode_pictures(vqgan: VQGAN, images: Tensor) -> Tensor:
    """Images [B, 3, H, W] in [0, 1] → codes [B, h, w]; which code is nearest is decided in fp32, under autocast too."""
    latents = vqgan.encode_latents(images)
    with torch.autocast(images.device.type, enabled=False):
        return vqgan.vquantizer.nearest(latents.float())


class Pool:
    """Scenes of one aspect, encoded: up to `capacity` of them, the oldest replaced when there are more.

    `grow` encodes some more, between steps; `draw` may be part of a recorded step. It draws among those encoded so far.
    """

    def __init__(
        self, config: BundleV3Config, scenes: Scenes, aspect: int, capacity: int, dtype: torch.dtype = torch.float32
    ) -> None:
        """dtype: of the encoders' products."""
        self.scenes, self.aspect, self.dtype = scenes, aspect, dtype
        self.members = scenes.of_aspect[aspect]
        self.capacity = min(capacity, len(self.members))
        width, height = ASPECTS[aspect]
        f, device = config.vqgan.downscale, scenes.device
        captions, longest = scenes.corpus.text.shape[1:]
        half = torch.float16 if device.type == "cuda" else torch.bfloat16

        def space(*shape: int, dtype: torch.dtype = half) -> Tensor:
            return torch.zeros(self.capacity, *shape, dtype=dtype, device=device)

        self.tokens = space(height // f, width // f, dtype=torch.int16)
        self.commonest = space(dtype=torch.int16)
        self.byt5 = space(captions, longest, config.byt5.d_model)
        self.length = space(captions, dtype=torch.int16)
        self.clip_text = space(captions, config.clip.embed_dim)
        self.clip_image = space(config.clip.embed_dim)
        self.nothing_byt5 = torch.zeros(config.byt5.d_model, dtype=half, device=device)
        self.nothing_clip = torch.zeros(config.clip.embed_dim, dtype=half, device=device)
        self.encoded, self._filled = 0, torch.ones((), device=device)

    @torch.no_grad()
    def read_nothing(self, bundle: BundleV3) -> None:
        """What the encoders make of an empty caption; called once, when they are there."""
        empty = Text(torch.zeros(1, 1, dtype=torch.uint8, device=self.scenes.device), torch.zeros(1, device=self.scenes.device))
        self.nothing_byt5.copy_(encode_bytes(bundle.byt5, empty)[0, 0])
        self.nothing_clip.copy_(bundle.clip.encode_tokens(bundle.clip.tokenize([""])[0])[0])

    @torch.no_grad()
    def grow(self, bundle: BundleV3, count: int) -> None:
        """Encodes `count` more scenes of the corpus, fewer at its end; after that the first ones again, if not all fit."""
        if self.encoded >= len(self.members) == self.capacity:
            return
        start = self.encoded % len(self.members)
        index = self.members[start : start + count]
        place = torch.arange(self.encoded, self.encoded + len(index), device=index.device) % self.capacity
        device = index.device
        with torch.autocast(device.type, self.dtype, enabled=self.dtype != torch.float32):
            images = self.scenes.pictures(index, self.aspect)
            tokens = encode_pictures(bundle.vqgan, images)
            self.clip_image[place] = bundle.clip.encode_image(images).to(self.clip_image.dtype)
            for which in range(self.byt5.shape[1]):
                text = self.scenes.text(index, torch.full_like(index, which))
                self.byt5[place, which] = encode_bytes(bundle.byt5, text).to(self.byt5.dtype)
                self.length[place, which] = text.length
                self.clip_text[place, which] = self._clip_text(bundle, index, which).to(self.clip_text.dtype)
        self.tokens[place] = tokens.to(torch.int16)
        self.commonest[place] = commonest(tokens).to(torch.int16)
        self.encoded += len(index)
        self._filled.fill_(min(self.encoded, self.capacity))

    def _clip_text(self, bundle: BundleV3, index: Tensor, which: int) -> Tensor:
        known = self.scenes.clip_tokens
        if known is not None:
            return bundle.clip.model.encode_text(known[index, which].long())
        return bundle.clip.encode_text([self.scenes.corpus.caption(i, which) for i in index.tolist()])

    def fake(self) -> None:
        """Random contents, to rehearse with before there are any."""
        self.tokens.random_(0, 1000)
        self.byt5.normal_()
        self.length.random_(5, 60)
        self._filled.fill_(self.capacity)

    def restore(self, bundle: BundleV3, encoded: int, at_once: int) -> None:
        """Goes to where it stood when so many had been encoded, `at_once` at a time; what was replaced since is passed over."""
        self.forget()
        while self.encoded < encoded:
            left = len(self.members) - self.encoded % len(self.members)
            if encoded - self.encoded > self.capacity + at_once:
                self.encoded += min(at_once, left)
            else:
                self.grow(bundle, at_once)

    def forget(self) -> None:
        """Nothing encoded."""
        self.encoded = 0
        self._filled.fill_(1)

    @torch.no_grad()
    def draw(self, count: int, bytes_read: int | None, empty: float = 0.1, shown: float = 0.1) -> Examples:
        """`count` random ones. bytes_read: so many of each caption's bytes, random ones; None is all. empty, shown: shares of captions
        that are empty, without and with the picture's embedding in their place."""
        device = self.tokens.device
        index = (torch.rand(count, device=device) * self._filled).long()
        which = (torch.rand(count, device=device) * self.byt5.shape[1]).long()
        chance = torch.rand(count, device=device)
        silent = chance < empty + shown
        length = self.length[index, which].long()
        mask = torch.arange(self.byt5.shape[2], device=device) <= (length * ~silent)[:, None]
        if bytes_read is None:
            byt5 = self.byt5[index, which]
        else:
            order = torch.rand(mask.shape, device=device).masked_fill_(~mask, -1).topk(bytes_read, dim=1).indices
            byt5, mask = self.byt5[index[:, None], which[:, None], order], mask.gather(1, order)
        first = self.nothing_byt5[None, None].expand_as(byt5)
        return Examples(
            tokens=self.tokens[index].long(),
            byt5=torch.where(silent[:, None, None], first, byt5).float(),
            mask=mask,
            clip_text=torch.where(silent[:, None], self.nothing_clip, self.clip_text[index, which]).float(),
            clip_image=self.clip_image[index].float(),
            empty=silent,
            shown=(chance >= empty) & silent,
            commonest=self.commonest[index].long(),
        )


def commonest(tokens: Tensor) -> Tensor:
    """The most frequent code [B] of each row of tokens [B, H, W]."""
    flat = tokens.flatten(1).sort(dim=1).values
    place = torch.arange(flat.shape[1], device=flat.device)
    begins = F.pad(flat[:, 1:] != flat[:, :-1], (1, 0), value=True)
    run = place - torch.where(begins, place, 0).cummax(dim=1).values  # how far into its run of equal codes each is
    return flat.gather(1, run.argmax(dim=1, keepdim=True))[:, 0]


def first_of(x: Examples, count: int) -> Examples:
    """The first `count` of the examples."""
    fields = {name: getattr(x, name) for name in ("tokens", "byt5", "mask", "clip_text", "clip_image", "empty", "shown", "commonest")}
    return replace(x, **{name: None if t is None else t[:count] for name, t in fields.items()})
