"""What rows read of their prompts: texts encoded, image embeddings drawn by the prior, keys and values; remembered by `Cache`.

New arrivals share batches. The same arithmetic may round differently at another batch size, so what a deterministic job needs is computed
for one text or one image at a time, and remembered apart from what was computed together.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import NamedTuple, TypeVar

from torch import Tensor

from model.operations import AnyCondition
from model.pipeline import Pipeline, Prompt
from model.sampling import Noise
from server.engine.cache import Cache
from server.engine.grouping import grouped
from server.engine.protocol import Job

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


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


@dataclass(frozen=True, slots=True)
class Encoded:
    """unconditional: for negative prompts."""

    prompt: Prompt
    unconditional: AnyCondition | None


class Conditions:
    """Texts and image embeddings → what `Pipeline.start` takes."""

    def __init__(self, pipelines: Mapping[str, Pipeline], cache: Cache) -> None:
        self._pipelines, self._cache = pipelines, cache

    def encode(self, jobs: Sequence[Job]) -> tuple[list[Prompt], list[AnyCondition | None]]:
        """Each job's encoded prompt, and its unconditional branch if it is guided."""
        texts, negatives = [text(job) for job in jobs], [negative(job) for job in jobs]
        wanted = [*texts, *(each for each in negatives if each)]
        encoded = dict(zip(wanted, self._cache.fetch("text", wanted, self._encode), strict=True))
        return [encoded[each].prompt for each in texts], [encoded[each].unconditional if each else None for each in negatives]

    def guess(self, guesses: Sequence[Guess], prompts: Sequence[Prompt], noises: Sequence[Noise]) -> list[AnyCondition]:
        """The conditional branch of each image: its prompt, and the picture that the prior draws for it from its noise."""
        given = dict(zip(guesses, zip(prompts, noises, strict=True), strict=True))
        return self._cache.fetch("prior", guesses, lambda missing: self._guess(missing, given))

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

    def _guess(self, guesses: list[Guess], given: Mapping[Guess, tuple[Prompt, Noise]]) -> list[AnyCondition]:
        def batch_of(each: Guess) -> Hashable:
            return each.text.model if each.text.together else each

        def guess(batch: list[Guess]) -> list[AnyCondition]:
            pipeline = self._pipelines[batch[0].text.model]
            prompts, noises = zip(*(given[each] for each in batch), strict=True)
            images = pipeline.image_embeddings(prompts, noises)
            return [pipeline.condition(prompt, image) for prompt, image in zip(prompts, images, strict=True)]

        return _in_batches(guesses, batch_of, guess)


def text(job: Job) -> Text:
    return Text(job.model, job.prompt, together=not job.sampling.deterministic, negative=False)


def negative(job: Job) -> Text | None:
    """None without guidance."""
    return text(job)._replace(prompt=job.negative_prompt, negative=True) if job.sampling.guided else None


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
