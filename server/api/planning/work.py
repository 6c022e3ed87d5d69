"""The work of a request, which the settings bound: pixels times steps, decoding and files."""

from __future__ import annotations

import math
from dataclasses import dataclass
from http import HTTPStatus

from model.image_request import Enlarge
from server.api.errors import ApiError
from server.api.images.fit import Size
from server.api.schemas import AnyFormat, InterpolateRequest, SamplingFields
from server.engine.job import Job

# The cost of a result per pixel beside its steps, in branches of a step: tokens to pixels, and
# pixels to a file. Measured on a CPU: docs/log.md.
DECODING_WORK = 3
FILE_WORK: dict[AnyFormat, int] = {
    "png": 1,
    "json": 1,
    "url": 1,
    "jpeg": 1,
    "webp": 1,
    "gif": 6,
}
PREVIEW_WORK = 1
# The cost of a pixel that is enlarged to the sent image's resolution, beside that of its file.
ENLARGING_WORK = 2


@dataclass(frozen=True, slots=True)
class Workload:
    """The work of a request but for its size, in branches of a step for each pixel.

    Attributes:
        images: images or frames.
        steps: steps of each image.
        branches: branches of a step.
        output: work for decoding, previews and files.
        enlarging: work for a pixel that is enlarged, its file included.
        share: a branch's work in that of the weights' first denoiser.
    """

    images: int
    steps: int
    branches: int
    output: int
    enlarging: int
    share: float

    def of(self, size: Size, enlarged: int) -> int:
        """Return the work. size: of the generated images. enlarged: pixels of each result."""
        each = self.steps * self.branches * self.share + self.output
        generated = math.ceil(size[0] * size[1] * each)
        return self.images * (generated + enlarged * self.enlarging)

    def check(self, size: Size, enlarged: int, allowed: int) -> None:
        """Raise ApiError 422 if the work is more than allowed."""
        work = self.of(size, enlarged)
        if work > allowed:
            share = f" * {self.share:.2g}" if self.share != 1 else ""
            steps = f"{_counted(self.steps, 'step')} * {_counted(self.branches, 'branch', 'es')}"
            each = f"{size[0] * size[1]} pixels * ({steps}{share} + {self.output})"
            if enlarged:
                each = f"({each} + {enlarged} pixels * {self.enlarging} to enlarge)"
            raise _too_much_work(work, allowed, f"Cost = {_counted(self.images, 'image')} * {each}")


def check_tiles_work(job: Job, enlarge: Enlarge, output: AnyFormat, allowed: int) -> None:
    """Raise ApiError 422 if a job with enlarged images is more work than allowed.

    Tiles are encoded and decoded, those of previews decoded once more each.
    """
    images, tiles = len(job.seeds), len(enlarge.tiling)
    tile_pixels = images * tiles * math.prod(enlarge.tiling.tile)
    previews = min(job.previews, max(0, job.steps - 1))
    drawn = 0 if enlarge.image else images * job.width * job.height
    decoded = drawn + (2 + previews) * tile_pixels
    files = images * math.prod(enlarge.size) * (FILE_WORK[output] + previews * PREVIEW_WORK)
    branches = 1 + len(job.regions)
    steps = drawn * job.passes[0][1] * (branches + job.sampling.guided)
    steps += tile_pixels * enlarge.steps * (branches + enlarge.sampling.guided)
    work = math.ceil(steps * job.step_work) + decoded * DECODING_WORK + files
    if work > allowed:
        drawn_tiles = f"{tiles} tiles of {math.prod(enlarge.tiling.tile)} pixels"
        parts = f"{_counted(images, 'image')} in {drawn_tiles}, {_counted(job.steps, 'step')}"
        raise _too_much_work(work, allowed, f"It has {parts}, encoding, decoding and files")


class TooMuchWorkError(ApiError):
    """422: a request costs more than the settings allow."""


def _too_much_work(work: int, allowed: int, reason: str) -> ApiError:
    limit = f"more than PAELLERA_MAX_REQUEST_WORK ({allowed})"
    message = f"this request costs {work}, {limit}. {reason}"
    return TooMuchWorkError(HTTPStatus.UNPROCESSABLE_ENTITY, "too_much_work", message)


def _counted(count: int, noun: str, plural: str = "s") -> str:
    return f"{count} {noun}{plural if count != 1 else ''}"


def rows_of(fields: SamplingFields) -> int:
    """Return the number of images or frames that a request asks for."""
    return fields.frames if isinstance(fields, InterpolateRequest) else fields.n
