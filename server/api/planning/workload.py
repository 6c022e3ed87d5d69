"""The work of a request, and the refusal of more than the settings allow."""

from __future__ import annotations

import math
from dataclasses import dataclass
from http import HTTPStatus

from model.image_request import Enlarge
from server.api.errors import ApiError
from server.api.images.fit import Size
from server.api.schemas import AnyFormat, InterpolateRequest, SamplingFields
from server.engine.messages import Job

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
    share: float = 1.0

    def of(self, size: Size, enlarged: int = 0) -> int:
        """Return the work. size: of the generated images. enlarged: pixels of each result."""
        each = self.steps * self.branches * self.share + self.output
        generated = math.ceil(size[0] * size[1] * each)
        return self.images * (generated + enlarged * self.enlarging)

    def check(self, size: Size, enlarged: int, allowed: int) -> None:
        """Raise ApiError 422 if the work is more than allowed."""
        work, pixels = self.of(size, enlarged), size[0] * size[1]
        if work > allowed:
            enlarging = f", {enlarged} pixels as much as {self.enlarging} to enlarge"
            share = f", each {self.share:.2g} of a full one" if self.share != 1 else ""
            message = (
                f"the request's work is {work}, the maximum {allowed}"
                f" ({self.images} images of {pixels} pixels, {self.steps} steps of {self.branches}"
                f" branches{share}, and as much as {self.output} for decoding and files"
                f"{enlarging if enlarged else ''})"
            )
            raise ApiError(HTTPStatus.UNPROCESSABLE_ENTITY, "too_much_work", message)


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
        message = (
            f"the request's work is {work}, the maximum {allowed}"
            f" ({images} images in {tiles} tiles of {math.prod(enlarge.tiling.tile)} pixels,"
            f" {job.steps} steps, encoding, decoding and files)"
        )
        raise ApiError(HTTPStatus.UNPROCESSABLE_ENTITY, "too_much_work", message)


def rows_of(fields: SamplingFields) -> int:
    """Return the number of images or frames that a request asks for."""
    return fields.frames if isinstance(fields, InterpolateRequest) else fields.n
