"""Build rows from image requests: encode texts and images, run the prior, start each row.

    builder = RowBuilder(pipeline)
    sampling = pipeline.config.recipe.sampling()
    rows = builder.build([ImageRequest("a red apple", 7, 128, 128, sampling)])
    tokens = pipeline.denoise(rows)                     # [B, H, W]

The engine, the command line, the evaluation and the GPU checks all build their rows here.

Requests of one call share batches. The same arithmetic may round differently at another batch size,
so everything that a deterministic request needs is computed one text, one image or one prior at a
time, and cached apart from the results of shared batches.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from model.conditioning import Conditioning, interpolate, mean
from model.config import PriorSettings
from model.image_request import Edit, ImageRequest, InputImage, Refine, Repaint, Tile
from model.networks.text_encoders import Prompt
from model.pipeline import Pipeline, Reader
from model.rows import (
    AnyCondition,
    PinnedTokens,
    RegionBranch,
    Row,
    as_tensor,
    edit,
    refine,
    repaint,
    token_mask,
    token_weight,
)
from model.sampling import Noise

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

# The kinds of results that are worth caching.
Cached = Literal["text", "prior", "picture"]
# Measure a stage: "encode" or "prior".
StageTimer = Callable[[str], AbstractContextManager[None]]


class EncodingCache(Protocol):
    """Remember encoded texts and images, and results of the prior, by their keys."""

    def fetch(
        self, kind: Cached, keys: Sequence[K], compute: Callable[[list[K]], list[V]]
    ) -> list[V]:
        """Return the keys' values; compute the missing ones in one call, each once."""


class NoCache:
    """Compute everything at every call, each distinct key once."""

    def fetch(
        self, kind: Cached, keys: Sequence[K], compute: Callable[[list[K]], list[V]]
    ) -> list[V]:
        """Compute every distinct key."""
        distinct = list(dict.fromkeys(keys))
        values = dict(zip(distinct, compute(distinct), strict=True)) if distinct else {}
        return [values[key] for key in keys]


class DictCache:
    """Remember everything, or the keys that `keeps` accepts, without a bound."""

    def __init__(self, keeps: Callable[[Hashable], bool] = lambda key: True) -> None:
        self._keeps = keeps
        self._values: dict[Hashable, Any] = {}

    def fetch(
        self, kind: Cached, keys: Sequence[K], compute: Callable[[list[K]], list[V]]
    ) -> list[V]:
        """Return remembered values; compute the others in one call."""
        missing = [key for key in dict.fromkeys(keys) if key not in self._values]
        values = dict(zip(missing, compute(missing), strict=True)) if missing else {}
        found = [values[key] if key in values else self._values[key] for key in keys]
        self._values.update((key, value) for key, value in values.items() if self._keeps(key))
        return found


class TextKey(NamedTuple):
    """The inputs of an encoded text.

    shared: whether its batch may have held others. negative: the denoiser that reads it as its
    unconditional branch; empty if none does. scope: the request's `cache_scope`.
    """

    model: str
    prompt: str
    shared: bool
    negative: str
    scope: str


class PriorKey(NamedTuple):
    """The inputs of the prior's result.

    The size is part of it because a seed's noise for the prior comes after its start tokens. At a
    temperature of 0, seed and size are 0, because no noise counts.
    """

    text: TextKey
    seed: int
    width: int
    height: int
    settings: PriorSettings


class EmbeddingKey(NamedTuple):
    """The prior's result as an embedding, not yet as a condition."""

    prior: PriorKey


class BranchKey(NamedTuple):
    """The inputs of a conditional branch: the prior's result as the condition of a denoiser."""

    prior: PriorKey
    reader: Reader


class ImageKey(NamedTuple):
    """The inputs of an encoded image: its tokens, or CLIP's embedding of it.

    scope: the request's `cache_scope`.
    """

    model: str
    kind: Literal["tokens", "embedding"]
    digest: str
    width: int
    height: int
    shared: bool
    scope: str


@dataclass(frozen=True, slots=True)
class EncodedText:
    """A prompt; unconditional: its unconditional branch, for negative prompts only."""

    prompt: Prompt
    unconditional: AnyCondition | None


@dataclass(frozen=True, slots=True)
class _Encodings:
    """The encoded parts of the requests of one call.

    conditions: the conditional branches of prompts with the prior's embedding. embeddings: those of
    the prior that are mixed before they become a branch.
    """

    texts: Mapping[TextKey, EncodedText]
    images: Mapping[ImageKey, Tensor]
    conditions: Mapping[BranchKey, AnyCondition]
    embeddings: Mapping[PriorKey, Tensor]


class RowBuilder:
    """Build the rows of one pipeline."""

    def __init__(self, pipeline: Pipeline, cache: EncodingCache | None = None) -> None:
        self.pipeline = pipeline
        self._encoder = _BatchEncoder(pipeline, NoCache() if cache is None else cache)
        self._model = pipeline.config.name
        # The larger image whose tiles were built last.
        self._whole: dict[Hashable, Noise] = {}

    def build(
        self,
        requests: Sequence[ImageRequest],
        timed: StageTimer = lambda stage: nullcontext(),
        noises: Sequence[Noise] | None = None,
    ) -> list[Row]:
        """Return the requests' rows, in order.

        timed: entered around each stage, with its name. noises: by default drawn from the seeds.
        """
        with timed("encode"):
            texts = self._encoder.encode_texts(self._text_keys(requests))
            images = self._encoder.encode_images(
                {key: image for each in requests for key, image in self._images(each)}
            )
        with timed("prior"):
            noises = [self.noise(each) for each in requests] if noises is None else noises
            by_request = list(zip(requests, noises, strict=True))
            branches = {key: noise for each, noise in by_request for key in self._branch_keys(each)}
            mixed = {key: noise for each, noise in by_request for key in self._mixed_keys(each)}
            encodings = _Encodings(
                texts,
                images,
                self._encoder.condition_on_prior(branches, texts),
                self._encoder.run_prior(mixed, texts),
            )
            return [self._row(each, noise, encodings) for each, noise in by_request]

    def noise(self, request: ImageRequest) -> Noise:
        """Return all of an image's randomness, on the CPU; a tile's is a part of the whole's."""
        if request.tile is None:
            return self._noise(request, request.width, request.height)
        height, width = self.pipeline.grid(request.width, request.height)
        y, x = self.pipeline.grid(request.tile.x, request.tile.y)
        whole = self._whole_noise(request, request.tile)
        return whole.part(slice(y, y + height), slice(x, x + width))

    def _noise(self, request: ImageRequest, width: int, height: int) -> Noise:
        sampling = request.sampling
        settings = self.pipeline.prior_settings(sampling)
        drawn = sampling.steps, sampling.renoise_mode, sampling.renoise_order, settings
        return self.pipeline.noise(request.seed, width, height, *drawn)

    def _whole_noise(self, request: ImageRequest, tile: Tile) -> Noise:
        """Return the randomness that an image's tiles share; drawn once while they are built."""
        sampling, size = request.sampling, (tile.width, tile.height)
        settings = self.pipeline.prior_settings(sampling)
        modes = sampling.renoise_mode, sampling.renoise_order, settings
        key = request.seed, size, tile.prior_size, sampling.steps, modes
        if key not in self._whole:
            drawn = self.pipeline.noise(request.seed, *tile.prior_size, steps=0, prior=settings)
            prior = drawn.prior
            self._whole = {key: replace(self._noise(request, *size), prior=prior)}
        return self._whole[key]

    # ── keys ──────────────────────────────────────────────────────────────────────────────────────

    def _text_keys(self, requests: Sequence[ImageRequest]) -> list[TextKey]:
        """Return each text once: all prompts, then all negative prompts."""
        prompts = [self._text_key(each, prompt) for each in requests for prompt in each.prompts]
        negatives = [self._negative_key(each) for each in requests if each.sampling.guided]
        return list(dict.fromkeys([*prompts, *negatives]))

    def _text_key(self, request: ImageRequest, prompt: str) -> TextKey:
        return TextKey(
            self._model,
            prompt,
            shared=not request.sampling.deterministic,
            negative="",
            scope=request.cache_scope,
        )

    def _negative_key(self, request: ImageRequest) -> TextKey:
        key = self._text_key(request, request.negative_prompt)
        return key._replace(negative=request.sampling.denoiser)

    def _image_key(
        self, request: ImageRequest, kind: Literal["tokens", "embedding"], image: InputImage
    ) -> ImageKey:
        shared = not request.sampling.deterministic
        return ImageKey(
            self._model,
            kind,
            image.digest,
            image.width,
            image.height,
            shared,
            scope=request.cache_scope,
        )

    def _prior_key(self, request: ImageRequest, prompt: str) -> PriorKey:
        settings = self.pipeline.prior_settings(request.sampling)
        text = self._text_key(request, prompt)
        if settings.temperature == 0:
            return PriorKey(text, seed=0, width=0, height=0, settings=settings)
        return PriorKey(text, request.seed, *request.prior_size, settings)

    def _branch_key(self, request: ImageRequest, prompt: str) -> BranchKey:
        return BranchKey(self._prior_key(request, prompt), self._reader(request))

    def _reader(self, request: ImageRequest) -> Reader:
        return self.pipeline.reader(request.sampling)

    def _images(self, request: ImageRequest) -> Iterable[tuple[ImageKey, InputImage]]:
        seen = [reference.picture for reference in request.references]
        seen += [keyframe.picture for keyframe in request.keyframes if keyframe.picture]
        for image in seen:
            yield self._image_key(request, "embedding", image), image
        if request.canvas is not None:
            image = request.canvas.picture
            yield self._image_key(request, "tokens", image), image

    def _branch_keys(self, request: ImageRequest) -> list[BranchKey]:
        """Return those of the prior's results that become a branch as they are."""
        mixed = bool(request.keyframes or request.references)
        prompts = [] if mixed else [request.prompt]
        prompts += [region.prompt for region in request.regions]
        return [self._branch_key(request, prompt) for prompt in prompts]

    def _mixed_keys(self, request: ImageRequest) -> list[PriorKey]:
        """Return those of the prior's results that are mixed with others first."""
        prompts = [keyframe.prompt for keyframe in request.keyframes if keyframe.picture is None]
        return [self._prior_key(request, prompt) for prompt in prompts]

    # ── one row ───────────────────────────────────────────────────────────────────────────────────

    def _row(self, request: ImageRequest, noise: Noise, encodings: _Encodings) -> Row:
        unconditional = (
            encodings.texts[self._negative_key(request)].unconditional
            if request.sampling.guided
            else None
        )
        conditional, regions = (
            self._conditional(request, encodings),
            self._regions(request, encodings),
        )
        row = self.pipeline.start(noise, request.sampling, conditional, unconditional, regions)
        row.truncated = self._truncated(request, encodings)
        if request.canvas is None:
            return row
        tokens = encodings.images[self._image_key(request, "tokens", request.canvas.picture)]
        match request.canvas:
            case Repaint(mask=mask):
                keep = ~token_mask(as_tensor(mask).bool(), self.pipeline.downscale)
                return repaint(row, PinnedTokens(tokens, self._on_device(keep)))
            case Edit(strength=strength):
                return edit(row, tokens, strength)
            case Refine(strength=strength):
                return refine(row, tokens, strength)

    def _regions(self, request: ImageRequest, encodings: _Encodings) -> list[RegionBranch]:
        branches = []
        for region in request.regions:
            weight = token_weight(as_tensor(region.weight).float() / 255, self.pipeline.downscale)
            condition = encodings.conditions[self._branch_key(request, region.prompt)]
            branches.append(RegionBranch(condition, self._on_device(weight)))
        return branches

    def _conditional(self, request: ImageRequest, encodings: _Encodings) -> AnyCondition:
        if request.keyframes:
            frame = self._frame(request, encodings)
            return self.pipeline.condition(frame.prompt, frame.image, self._reader(request))
        if request.references:
            embeddings = [
                self._embedding(request, reference.picture, encodings)
                for reference in request.references
            ]
            prompt = encodings.texts[self._text_key(request, request.prompt)].prompt
            image = mean(embeddings, [reference.weight for reference in request.references])
            return self.pipeline.condition(prompt, image, self._reader(request))
        return encodings.conditions[self._branch_key(request, request.prompt)]

    def _frame(self, request: ImageRequest, encodings: _Encodings) -> Conditioning:
        """Return a keyframe's conditioning, or one between it and the next."""
        first = min(int(request.position), len(request.keyframes) - 2)
        one, other = (self._keyframe(request, number, encodings) for number in (first, first + 1))
        return interpolate(one, other, request.position - first, request.mode)

    def _keyframe(self, request: ImageRequest, number: int, encodings: _Encodings) -> Conditioning:
        keyframe = request.keyframes[number]
        prompt = encodings.texts[self._text_key(request, keyframe.prompt)].prompt
        if keyframe.picture is None:
            return Conditioning(
                prompt, encodings.embeddings[self._prior_key(request, keyframe.prompt)]
            )
        return Conditioning(prompt, self._embedding(request, keyframe.picture, encodings))

    def _embedding(self, request: ImageRequest, image: InputImage, encodings: _Encodings) -> Tensor:
        return encodings.images[self._image_key(request, "embedding", image)]

    def _truncated(self, request: ImageRequest, encodings: _Encodings) -> tuple[str, ...]:
        keys = [self._text_key(request, prompt) for prompt in request.prompts]
        return tuple(
            sorted({name for key in keys for name in encodings.texts[key].prompt.truncated})
        )

    def _on_device(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.pipeline.device, non_blocking=True)


class _BatchEncoder:
    """Encode by the pipeline, in as few batches as the keys allow, through the cache."""

    def __init__(self, pipeline: Pipeline, cache: EncodingCache) -> None:
        self._pipeline, self._cache = pipeline, cache

    def encode_texts(self, keys: Sequence[TextKey]) -> dict[TextKey, EncodedText]:
        return dict(zip(keys, self._cache.fetch("text", keys, self._encode_texts), strict=True))

    def encode_images(self, images: Mapping[ImageKey, InputImage]) -> dict[ImageKey, Tensor]:
        """Return tokens [H, W], or a CLIP embedding [1, D'], as each key says."""
        keys = list(images)
        encoded = self._cache.fetch(
            "picture", keys, lambda missing: self._encode_images(missing, images)
        )
        return dict(zip(keys, encoded, strict=True))

    def condition_on_prior(
        self, branches: Mapping[BranchKey, Noise], texts: Mapping[TextKey, EncodedText]
    ) -> dict[BranchKey, AnyCondition]:
        """Return the conditional branch of each prompt with the prior's image embedding."""

        def condition(missing: list[BranchKey]) -> list[AnyCondition]:
            # Branches of several denoisers may share a result of the prior.
            noises = {key.prior: branches[key] for key in missing}
            embeddings = self._run_prior(list(noises), noises, texts)
            images = dict(zip(noises, embeddings, strict=True))
            return [
                self._pipeline.condition(
                    texts[key.prior.text].prompt, images[key.prior], key.reader
                )
                for key in missing
            ]

        keys = list(branches)
        return dict(zip(keys, self._cache.fetch("prior", keys, condition), strict=True))

    def run_prior(
        self, noises: Mapping[PriorKey, Noise], texts: Mapping[TextKey, EncodedText]
    ) -> dict[PriorKey, Tensor]:
        """Return the prior's image embeddings [1, D']."""

        def embed(missing: list[EmbeddingKey]) -> list[Tensor]:
            return self._run_prior([key.prior for key in missing], noises, texts)

        keys = [EmbeddingKey(key) for key in noises]
        return dict(zip(noises, self._cache.fetch("prior", keys, embed), strict=True))

    def _encode_texts(self, keys: list[TextKey]) -> list[EncodedText]:
        def batch_of(key: TextKey) -> Hashable:
            # Texts of one length: a short one would be padded to its neighbours', and pay for it in
            # every step.
            return self._pipeline.text_length(key.prompt) if key.shared else key

        def encode(batch: list[TextKey]) -> list[EncodedText]:
            # Parts of a batch share its memory, all of which the last of them would hold.
            prompts = [
                Prompt(p.byt5.clone(), p.mask.clone(), p.clip.clone(), p.truncated)
                for p in self._pipeline.encode([key.prompt for key in batch])
            ]
            pairs = zip(batch, prompts, strict=True)
            return [
                EncodedText(
                    p,
                    self._pipeline.condition(p, reader=Reader(key.negative))
                    if key.negative
                    else None,
                )
                for key, p in pairs
            ]

        return _in_batches(keys, batch_of, encode)

    def _encode_images(
        self, keys: list[ImageKey], images: Mapping[ImageKey, InputImage]
    ) -> list[Tensor]:
        def batch_of(key: ImageKey) -> Hashable:
            # CLIP scales every image to one size; the VQGAN takes it as it is.
            size = (key.width, key.height) if key.kind == "tokens" else None
            return (key.kind, size) if key.shared else key

        def encode(batch: list[ImageKey]) -> list[Tensor]:
            pixels = [as_tensor(images[key]) for key in batch]
            if batch[0].kind == "embedding":
                return [embedding.clone() for embedding in self._pipeline.embed_images(pixels)]
            return [tokens.clone() for tokens in self._pipeline.encode_images(torch.stack(pixels))]

        return _in_batches(keys, batch_of, encode)

    def _run_prior(
        self,
        keys: list[PriorKey],
        noises: Mapping[PriorKey, Noise],
        texts: Mapping[TextKey, EncodedText],
    ) -> list[Tensor]:
        def run(batch: list[PriorKey]) -> list[Tensor]:
            prompts = [texts[key.text].prompt for key in batch]
            embeddings = self._pipeline.prior_embeddings(
                prompts, [noises[key] for key in batch], batch[0].settings
            )
            return [embedding.clone() for embedding in embeddings]

        return _in_batches(keys, lambda key: key.settings if key.text.shared else key, run)


def group_by(items: Iterable[T], key: Callable[[T], Hashable]) -> list[list[T]]:
    """Return the items of each key, in order."""
    groups: dict[Hashable, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.values())


def _in_batches(
    keys: Sequence[K], batch_of: Callable[[K], Hashable], compute: Callable[[list[K]], list[V]]
) -> list[V]:
    """Compute the keys of one batch in one call; return the values in the order of the keys."""
    computed = {
        key: value
        for batch in group_by(keys, batch_of)
        for key, value in zip(batch, compute(batch), strict=True)
    }
    return [computed[key] for key in keys]
