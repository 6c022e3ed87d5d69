"""Encode the texts and images of many requests, and run their prior, in as few batches as possible.

Results are cached by keys that hold all of their inputs. The same arithmetic may round differently
at another batch size, so everything that a deterministic request needs is computed one text, one
image or one prior at a time, and cached apart from the results of shared batches.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from model.config import PriorSettings
from model.image_request import InputImage
from model.networks.text_encoders import Prompt
from model.pipeline import Pipeline, Reader
from model.rows import AnyCondition, as_tensor
from model.sampling import Noise

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

# The kinds of results that are worth caching.
Cached = Literal["text", "prior", "picture"]


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


class BatchEncoder:
    """Encode by the pipeline, in as few batches as the keys allow, through the cache."""

    def __init__(self, pipeline: Pipeline, cache: EncodingCache) -> None:
        self._pipeline, self._cache = pipeline, cache

    def encode_texts(self, keys: Sequence[TextKey]) -> dict[TextKey, EncodedText]:
        """Return each text encoded."""
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
