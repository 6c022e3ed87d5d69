"""Jobs → rows: what each image reads of prompts, pictures and regions, and what it begins from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from model import rows as operations
from model.conditioning import Shown, between, mean
from model.networks.text_encoders import Prompt
from model.pipeline import Pipeline
from model.rows import AnyCondition, Kept, Row
from model.sampling import Noise
from server.engine.messages import Edit, Job, Raster, Repaint
from server.engine.prompt_cache import Conditions, Encoded, Guess, Sight, Text, as_tensor, negative, pictures_of, sight, text


class Stage(Protocol):
    def __call__(self, stage: str) -> AbstractContextManager[None]: ...


@dataclass(frozen=True, slots=True)
class Wanted:
    """Image `number` of a job."""

    job: Job
    number: int

    def guess(self, prompt: str) -> Guess:
        """What the prior is to draw for it and a prompt."""
        return Guess(text(self.job, prompt), self.job.seeds[self.number], self.job.width, self.job.height)


@dataclass(frozen=True, slots=True)
class Encodings:
    """What new arrivals share: their texts and pictures, encoded."""

    texts: Mapping[Text, Encoded]
    sights: Mapping[Sight, Tensor]
    guesses: dict[Guess, AnyCondition] = field(default_factory=dict)
    sketches: dict[Guess, Tensor] = field(default_factory=dict)


class Starter:
    """Makes rows. Texts, pictures and priors of all that begins together are computed together."""

    def __init__(self, pipelines: Mapping[str, Pipeline], conditions: Conditions) -> None:
        self._pipelines, self._conditions = pipelines, conditions

    def start(self, images: Sequence[Wanted], watch: Stage) -> tuple[list[Row], dict[str, tuple[str, ...]]]:
        """The images' rows, and for each job the encoders that cut one of its prompts."""
        jobs = list({image.job.id: image.job for image in images}.values())
        with watch("encode"):
            encodings = self._encode(jobs)
        with watch("prior"):
            noises = [self._noise(image.job, image.number) for image in images]
            self._guess(images, noises, encodings)
            rows = [self._row(image, noise, encodings) for image, noise in zip(images, noises, strict=True)]
        return rows, {job.id: _truncated(job, encodings.texts) for job in jobs}

    def _noise(self, job: Job, number: int) -> Noise:
        return self._pipelines[job.model].noise(job.seeds[number], job.width, job.height, job.sampling.steps, job.sampling.renoise_mode)

    def _encode(self, jobs: Sequence[Job]) -> Encodings:
        asked = [text(job, prompt) for job in jobs for prompt in job.prompts]
        negatives = [own for job in jobs if (own := negative(job))]
        pictures = {own: picture for job in jobs for own, picture in pictures_of(job).items()}
        return Encodings(self._conditions.encode([*asked, *negatives]), self._conditions.look(pictures))

    def _guess(self, images: Sequence[Wanted], noises: Sequence[Noise], encodings: Encodings) -> None:
        """Fills in all that the prior is to draw."""

        def given(wanted_of: Callable[[Wanted], list[Guess]]) -> tuple[list[Guess], list[Prompt], list[Noise]]:
            wanted = {guess: noise for image, noise in zip(images, noises, strict=True) for guess in wanted_of(image)}
            return list(wanted), [encodings.texts[guess.text].prompt for guess in wanted], list(wanted.values())

        guesses, sketches = given(_guesses), given(_sketches)
        encodings.guesses.update(zip(guesses[0], self._conditions.guess(*guesses), strict=True))
        encodings.sketches.update(zip(sketches[0], self._conditions.sketch(*sketches), strict=True))

    # ── one row ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _row(self, image: Wanted, noise: Noise, encodings: Encodings) -> Row:
        job, pipeline = image.job, self._pipelines[image.job.model]
        downscale = pipeline.config.vqgan.downscale
        regions = [
            operations.Region(
                encodings.guesses[image.guess(region.prompt)], _weight(region.weight, downscale).to(pipeline.device, non_blocking=True)
            )
            for region in job.regions
        ]
        against = negative(job)
        unconditional = encodings.texts[against].unconditional if against else None
        row = pipeline.start(noise, job.sampling, self._conditional(image, encodings), unconditional, regions)
        match job.canvas:
            case Repaint(picture, mask):
                repainted = operations.token_mask(as_tensor(mask).bool(), downscale).to(pipeline.device, non_blocking=True)
                return operations.repaint(row, Kept(encodings.sights[sight(job, "tokens", picture)], ~repainted))
            case Edit(picture, strength):
                return operations.edit(row, encodings.sights[sight(job, "tokens", picture)], strength)
        return row

    def _conditional(self, image: Wanted, encodings: Encodings) -> AnyCondition:
        job, pipeline = image.job, self._pipelines[image.job.model]
        if job.keyframes:
            shown = self._frame(image, encodings)
            return pipeline.condition(shown.prompt, shown.image)
        if job.references:
            seen = [encodings.sights[sight(job, "embedding", reference.picture)] for reference in job.references]
            return pipeline.condition(encodings.texts[text(job)].prompt, mean(seen, [reference.weight for reference in job.references]))
        return encodings.guesses[image.guess(job.prompt)]

    def _frame(self, image: Wanted, encodings: Encodings) -> Shown:
        """What a frame shows: a keyframe, or something between it and the next."""
        job, position = image.job, image.job.position(image.number)
        first = min(int(position), len(job.keyframes) - 2)
        one, other = (self._keyframe(image, number, encodings) for number in (first, first + 1))
        return between(one, other, position - first, job.mode)

    def _keyframe(self, image: Wanted, number: int, encodings: Encodings) -> Shown:
        keyframe = image.job.keyframes[number]
        prompt = encodings.texts[text(image.job, keyframe.prompt)].prompt
        if keyframe.picture is None:
            return Shown(prompt, encodings.sketches[image.guess(keyframe.prompt)])
        return Shown(prompt, encodings.sights[sight(image.job, "embedding", keyframe.picture)])


def _guesses(image: Wanted) -> list[Guess]:
    """Of the prior's pictures those that become a branch as they are."""
    own = [] if image.job.keyframes or image.job.references else [image.job.prompt]
    return [image.guess(prompt) for prompt in (*own, *(region.prompt for region in image.job.regions))]


def _sketches(image: Wanted) -> list[Guess]:
    """Of the prior's pictures those that are mixed first."""
    return [image.guess(keyframe.prompt) for keyframe in image.job.keyframes if keyframe.picture is None]


def _weight(weight: Raster, downscale: int) -> Tensor:
    return operations.token_weight(as_tensor(weight).float() / 255, downscale)


def _truncated(job: Job, texts: Mapping[Text, Encoded]) -> tuple[str, ...]:
    return tuple(sorted({name for prompt in job.prompts for name in texts[text(job, prompt)].prompt.truncated}))
