"""Encode prompts and images in batches, run the prior, and remember the results.

New arrivals share batches. The same arithmetic may round differently at another batch size, so
everything that a deterministic job needs is computed one text, one image or one prior at a time,
and cached apart from the results of shared batches.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Literal, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from model.networks.text_encoders import Prompt
from model.pipeline import Pipeline
from model.rows import AnyCondition
from model.sampling import Noise
from server.engine.messages import Count, Edit, Job, Raster, Repaint

T = TypeVar("T")


def grouped(items: Iterable[T], key: Callable[[T], Hashable]) -> list[list[T]]:
    """The items of each key, in order."""
    groups: dict[Hashable, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.values())


K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

What = Literal["text", "prior", "picture"]


class Cache:
    """size: bytes of a value. capacity: bytes of all values together; one that is larger by itself is not kept. held: bytes now."""

    def __init__(self, capacity: int, size: Callable[[object], int], counters: Counter[Count]) -> None:
        self.capacity, self.held = capacity, 0
        self._size, self._counters = size, counters
        self._values: OrderedDict[Hashable, object] = OrderedDict()

    def __len__(self) -> int:
        return len(self._values)

    def fetch(self, what: What, keys: Sequence[K], compute: Callable[[list[K]], list[V]]) -> list[V]:
        """The keys' values; those that are not held are computed, all of them in one call and each once. Keys differ between kinds."""
        values = {key: cast(V, self._values[key]) for key in keys if key in self._values}
        missing = [key for key in dict.fromkeys(keys) if key not in values]
        self._counters["prompt_cache_hits", what] += len(keys) - len(missing)
        self._counters["prompt_cache_misses", what] += len(missing)
        if missing:
            values.update(zip(missing, compute(missing), strict=True))
        for key in keys:
            self._use(key, values[key])
        return [values[key] for key in keys]

    def _use(self, key: Hashable, value: object) -> None:
        """Puts the value in the last place to be given up."""
        if key not in self._values:
            size = self._size(value)
            if size > self.capacity:
                return
            self._values[key] = value
            self.held += size
        self._values.move_to_end(key)
        while self.held > self.capacity:
            self.held -= self._size(self._values.popitem(last=False)[1])


class Text(NamedTuple):
    """What an encoded text depends on. together: its batch may have held others. negative: it comes with an unconditional branch."""

    model: str
    prompt: str
    together: bool
    negative: bool


class Guess(NamedTuple):
    """What the prior's image embedding depends on, beside the weights' recipe: where in the seed's randomness its noise lies is a matter
    of the picture's size."""

    text: Text
    seed: int
    width: int
    height: int


class Sketch(NamedTuple):
    """An image embedding that the prior draws, wanted as such."""

    guess: Guess


class Sight(NamedTuple):
    """What a picture is encoded to, by which weights: its tokens, or CLIP's embedding of it. together: its batch may have held others."""

    model: str
    kind: Literal["tokens", "embedding"]
    digest: str
    width: int
    height: int
    together: bool


@dataclass(frozen=True, slots=True)
class Encoded:
    """unconditional: for negative prompts."""

    prompt: Prompt
    unconditional: AnyCondition | None


class Conditions:
    """Texts and image embeddings → what `Pipeline.start` takes."""

    def __init__(self, pipelines: Mapping[str, Pipeline], cache: Cache) -> None:
        self._pipelines, self._cache = pipelines, cache

    def encode(self, texts: Sequence[Text]) -> dict[Text, Encoded]:
        """Each text encoded, with its unconditional branch if it is a negative one."""
        return dict(zip(texts, self._cache.fetch("text", texts, self._encode), strict=True))

    def look(self, pictures: Mapping[Sight, Raster]) -> dict[Sight, Tensor]:
        """Each picture as it was to be encoded: tokens [H, W], or a CLIP embedding [1, D']."""
        sights = list(pictures)
        return dict(zip(sights, self._cache.fetch("picture", sights, lambda missing: self._look(missing, pictures)), strict=True))

    def guess(self, guesses: Sequence[Guess], prompts: Sequence[Prompt], noises: Sequence[Noise]) -> list[AnyCondition]:
        """The conditional branch of each image: its prompt, and the picture that the prior draws for it from its noise."""
        given = dict(zip(guesses, zip(prompts, noises, strict=True), strict=True))
        return self._cache.fetch("prior", guesses, lambda missing: self._guess(missing, given))

    def sketch(self, guesses: Sequence[Guess], prompts: Sequence[Prompt], noises: Sequence[Noise]) -> list[Tensor]:
        """The pictures that the prior draws as embeddings [1, D'], which are to be mixed before a branch is made of them."""
        given = dict(zip(guesses, zip(prompts, noises, strict=True), strict=True))
        return self._cache.fetch("prior", [Sketch(g) for g in guesses], lambda missing: self._sketch([s.guess for s in missing], given))

    def _encode(self, texts: list[Text]) -> list[Encoded]:
        def batch_of(each: Text) -> Hashable:
            # Texts of one length: a short one would be padded to its neighbours', and pay for it in every step.
            return (each.model, self._pipelines[each.model].text_length(each.prompt)) if each.together else each

        def encode(batch: list[Text]) -> list[Encoded]:
            pipeline = self._pipelines[batch[0].model]
            # Parts of a batch share its memory, all of which the last of them would hold.
            prompts = [
                Prompt(p.byt5.clone(), p.mask.clone(), p.clip.clone(), p.truncated) for p in pipeline.encode([t.prompt for t in batch])
            ]
            return [Encoded(p, pipeline.condition(p) if t.negative else None) for t, p in zip(batch, prompts, strict=True)]

        return _in_batches(texts, batch_of, encode)

    def _look(self, sights: list[Sight], pictures: Mapping[Sight, Raster]) -> list[Tensor]:
        def batch_of(each: Sight) -> Hashable:
            # CLIP scales every picture to one size; the VQGAN takes it as it is.
            size = (each.width, each.height) if each.kind == "tokens" else None
            return (each.model, each.kind, size) if each.together else each

        def look(batch: list[Sight]) -> list[Tensor]:
            pipeline, pixels = self._pipelines[batch[0].model], [as_tensor(pictures[each]) for each in batch]
            if batch[0].kind == "embedding":
                return [embedding.clone() for embedding in pipeline.picture_embeddings(pixels)]
            return [tokens.clone() for tokens in pipeline.codes(torch.stack(pixels))]

        return _in_batches(sights, batch_of, look)

    def _sketch(self, guesses: list[Guess], given: Mapping[Guess, tuple[Prompt, Noise]]) -> list[Tensor]:
        def batch_of(each: Guess) -> Hashable:
            return each.text.model if each.text.together else each

        def sketch(batch: list[Guess]) -> list[Tensor]:
            prompts, noises = zip(*(given[each] for each in batch), strict=True)
            return [image.clone() for image in self._pipelines[batch[0].text.model].image_embeddings(prompts, noises)]

        return _in_batches(guesses, batch_of, sketch)

    def _guess(self, guesses: list[Guess], given: Mapping[Guess, tuple[Prompt, Noise]]) -> list[AnyCondition]:
        images = self._sketch(guesses, given)
        return [self._pipelines[g.text.model].condition(given[g][0], image) for g, image in zip(guesses, images, strict=True)]


def text(job: Job, prompt: str | None = None) -> Text:
    """prompt: by default the job's own."""
    return Text(job.model, job.prompt if prompt is None else prompt, together=not job.sampling.deterministic, negative=False)


def negative(job: Job) -> Text | None:
    """None without guidance."""
    return text(job, job.negative_prompt)._replace(negative=True) if job.sampling.guided else None


def sight(job: Job, kind: Literal["tokens", "embedding"], picture: Raster) -> Sight:
    return Sight(job.model, kind, picture.digest, picture.width, picture.height, together=not job.sampling.deterministic)


def pictures_of(job: Job) -> dict[Sight, Raster]:
    """Everything of a job that is to be looked at."""
    seen = [reference.picture for reference in job.references] + [frame.picture for frame in job.keyframes if frame.picture]
    sights = {sight(job, "embedding", picture): picture for picture in seen}
    match job.canvas:
        case Repaint(picture=picture) | Edit(picture=picture):
            sights[sight(job, "tokens", picture)] = picture
    return sights


def as_tensor(raster: Raster) -> Tensor:
    """uint8 [height, width, 3], or [height, width] where there is one byte a pixel."""
    flat = torch.frombuffer(bytearray(raster.content), dtype=torch.uint8)
    channels = flat.numel() // (raster.width * raster.height)
    return flat.view(raster.height, raster.width, *[channels] * (channels > 1))


def tensors_in(value: object) -> Iterator[Tensor]:
    """Every tensor in a tree of dataclasses and tuples."""
    if isinstance(value, Tensor):
        yield value
    elif is_dataclass(value):
        for field in fields(value):
            yield from tensors_in(getattr(value, field.name))
    elif isinstance(value, tuple):
        for part in value:
            yield from tensors_in(part)


def size(value: object) -> int:
    """Bytes of the memory that the tensors in it hold."""
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors_in(value))


def _in_batches(items: Sequence[K], batch_of: Callable[[K], Hashable], compute: Callable[[list[K]], list[V]]) -> list[V]:
    """Computes items of the same batch in one call; answers in the order of the items, which differ from each other."""
    computed = {item: value for batch in grouped(items, batch_of) for item, value in zip(batch, compute(batch), strict=True)}
    return [computed[item] for item in items]
