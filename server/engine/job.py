"""Define a job: one request as the engine sees it, and the rows of which it consists.

Plain data, no torch. `deadline` and every other time point is `time.monotonic()`, one clock for all
processes of a machine.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal

from model.config import Interpolation, SamplingConfig
from model.image_request import (
    Edit,
    Enlarge,
    ImageRequest,
    InputImage,
    Keyframe,
    Reference,
    Region,
    Repaint,
    conditional_prompts,
    steps_skipped,
)

Priority = Literal["interactive", "batch"]


@dataclass(frozen=True, slots=True)
class Job:
    """One request: an image for each seed.

    Its rows are numbered: one for each image, then, if the images are enlarged, one for each tile
    of each image. The rows of tiles start when their image is known, at once if the client sent it.

    width, height: pixels, multiples of the bundle's size step; of the images before they are
    enlarged. arrived_at: the request's arrival, the order in which jobs are served. alone: its rows
    share no step with another job's, because it is suspected of having crashed a worker. previews:
    how many of each image, at most, are sent before it is done. early: each image is sent as soon
    as it is done, and all of them again with the answer. traceparent: the W3C trace context of a
    traced request, whose answer has `step_seconds`; otherwise empty. held_bytes: size of the
    client's files that the API process keeps until the images are done. model_sha256: the weights'
    hash, for the answer. step_work: of a step of its denoiser, in that of the weights' first one.
    readings: texts, and what is encoded of each, where that is not all of it. negative_reading:
    what is encoded of the negative prompt; None: all of it.

    The other fields are those of `model.image_request.ImageRequest`. With keyframes the rows are
    frames, evenly spaced from the first keyframe to the last.
    """

    id: str
    model: str
    prompt: str
    negative_prompt: str
    width: int
    height: int
    seeds: tuple[int, ...]
    sampling: SamplingConfig
    deadline: float
    arrived_at: float = 0.0
    priority: Priority = "interactive"
    alone: bool = False
    previews: int = 0
    early: bool = False
    traceparent: str = ""
    canvas: Repaint | Edit | None = None
    references: tuple[Reference, ...] = ()
    keyframes: tuple[Keyframe, ...] = ()
    mode: Interpolation = "slerp"
    regions: tuple[Region, ...] = ()
    cache_scope: str = ""
    held_bytes: int = 0
    enlarge: Enlarge | None = None
    model_sha256: str = ""
    step_work: float = 1.0
    readings: tuple[tuple[str, str], ...] = ()
    negative_reading: str | None = None
    # Bytes of the longest text that is encoded. Every forecast needs it of every unfinished job.
    text_bytes: int = field(init=False, compare=False)

    def __post_init__(self) -> None:
        longest = max(len(text.encode("utf-8", "replace")) for text in self.encoded_texts)
        object.__setattr__(self, "text_bytes", longest)

    @property
    def prompts(self) -> tuple[str, ...]:
        """Every text that a conditional branch stands for."""
        return conditional_prompts(self.prompt, self.keyframes, self.regions)

    @property
    def encoded_texts(self) -> tuple[str, ...]:
        """Return what is encoded of every text, the negative prompt included if it is used."""
        readings = dict(self.readings)
        read = tuple(readings.get(text, text) for text in self.prompts)
        return (*read, self.encoded_negative) if self.sampling.guided else read

    @property
    def encoded_negative(self) -> str:
        """Return what is encoded of the negative prompt."""
        return self.negative_prompt if self.negative_reading is None else self.negative_reading

    @property
    def image_bytes(self) -> int:
        """Bytes of the client's images, masks and weights, decoded, and of files that are kept."""
        canvas = () if self.canvas is None else (self.canvas.picture,)
        masks = (self.canvas.mask,) if isinstance(self.canvas, Repaint) else ()
        seen = (reference.picture for reference in self.references)
        shown = (keyframe.picture for keyframe in self.keyframes if keyframe.picture)
        weights = [region.weight for region in self.regions]
        if self.enlarge:
            weights += [region.weight for region in self.enlarge.regions]
            weights += [self.enlarge.image] if self.enlarge.image else []
        images = (*canvas, *masks, *seen, *shown, *weights)
        return self.held_bytes + sum(len(image.content) for image in images)

    # ── rows ──────────────────────────────────────────────────────────────────────────────────────

    @property
    def passes(self) -> tuple[tuple[range, int], ...]:
        """The rows of each pass, and the steps that each row of it takes."""
        images = range(len(self.seeds))
        drawn = (images, self.sampling.steps - self.steps_skipped)
        if self.enlarge is None:
            return (drawn,)
        tiles = range(len(images), len(images) * (1 + len(self.enlarge.tiling)))
        tiled = (tiles, self.enlarge.steps)
        return (tiled,) if self.enlarge.image else (drawn, tiled)

    @property
    def rows(self) -> int:
        """The number of rows, of all passes."""
        return sum(len(rows) for rows, _ in self.passes)

    @property
    def steps(self) -> int:
        """Steps of an image, from its first pass to the end of its last."""
        return sum(steps for _, steps in self.passes)

    @property
    def row_steps(self) -> int:
        """Steps of all rows together."""
        return sum(len(rows) * steps for rows, steps in self.passes)

    @property
    def work(self) -> float:
        """Steps of all rows together, each times its row's pixels and branches' work."""
        return self.step_work * sum(
            math.prod(self.row_size(rows[0])) * self.row_branches(rows[0]) * len(rows) * steps
            for rows, steps in self.passes
        )

    @property
    def drawn_size(self) -> tuple[int, int]:
        """(width, height) of its images in pixels, multiples of the size step."""
        return self.enlarge.tiling.canvas if self.enlarge else (self.width, self.height)

    def row_size(self, row: int) -> tuple[int, int]:
        """Return (width, height) of a row in pixels."""
        if self.enlarge and row >= len(self.seeds):
            return self.enlarge.tiling.tile
        return self.width, self.height

    def tile(self, row: int) -> tuple[int, int] | None:
        """Return the numbers of a row's image and of its tile; None if it is no tile's row."""
        if self.enlarge is None or row < len(self.seeds):
            return None
        return divmod(row - len(self.seeds), len(self.enlarge.tiling))

    def tile_rows(self, image: int) -> range:
        """Return the rows of an image's tiles."""
        count = len(self.enlarge.tiling) if self.enlarge else 0
        first = len(self.seeds) + image * count
        return range(first, first + count)

    def with_source(self, image: int, source: InputImage) -> Job:
        """Return the job with an image, scaled to the canvas, that its tiles begin with."""
        assert self.enlarge is not None
        sources = [*self.enlarge.sources] or [None] * len(self.seeds)
        sources[image] = source
        return replace(self, enlarge=replace(self.enlarge, sources=tuple(sources)))

    def image(self, index: int) -> ImageRequest:
        """Return everything that decides what row `index` looks like."""
        if self.enlarge and (place := self.tile(index)):
            image, number = place
            source = self.enlarge.image or self.enlarge.sources[image]
            assert source is not None
            tile = self.enlarge.tile(self.image(image), source, number)
            return tile.read_as(dict(self.readings), self.encoded_negative)
        return ImageRequest(
            prompt=self.prompt,
            seed=self.seeds[index],
            width=self.width,
            height=self.height,
            sampling=self.sampling,
            negative_prompt=self.negative_prompt,
            canvas=self.canvas,
            references=self.references,
            keyframes=self.keyframes,
            position=self.position(index) if self.keyframes else 0.0,
            mode=self.mode,
            regions=self.regions,
            cache_scope=self.cache_scope,
        ).read_as(dict(self.readings), self.encoded_negative)

    def position(self, index: int) -> float:
        """Return a frame's place among the keyframes; 1.5 is half way from second to third."""
        return index * (len(self.keyframes) - 1) / max(1, len(self.seeds) - 1)

    @property
    def steps_skipped(self) -> int:
        """Steps of the schedule before each row's first: an edit joins where as much is noise."""
        steps = self.sampling.steps
        return steps_skipped(self.canvas.strength, steps) if isinstance(self.canvas, Edit) else 0

    @property
    def preview_steps(self) -> tuple[int, ...]:
        """The steps of an image after which there is a preview: even, none at the start or the end.

        Fewer than asked for if steps are few.
        """
        due = {(i + 1) * self.steps // (self.previews + 1) for i in range(self.previews)}
        return tuple(sorted(due - {0}))

    def steps_taken(self, row: int, step: int) -> int:
        """Return how many of its image's steps are taken.

        step: the steps of its own schedule that a row has behind it, skipped ones included.
        """
        if self.enlarge is None or row < len(self.seeds):
            return step - self.steps_skipped
        return self.steps - self.enlarge.sampling.steps + step

    def row_branches(self, row: int) -> float:
        """Return the branches of a row, averaged over the steps that it takes."""
        tiled = self.enlarge if row >= len(self.seeds) else None
        sampling = tiled.sampling if tiled else self.sampling
        taken = tiled.steps if tiled else sampling.steps - self.steps_skipped
        return 1 + len(self.regions) + _guided_share(sampling, taken)


def _guided_share(sampling: SamplingConfig, taken: int) -> float:
    """Return the share of steps with guidance among so many of the last ones of a schedule."""
    if not (sampling.guided and taken):
        return 0.0
    first = max(sampling.guidance_start, sampling.steps - taken)
    return max(0, sampling.guidance_start + sampling.guidance_steps - first) / taken
