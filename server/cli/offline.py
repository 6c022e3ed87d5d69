"""Requests carried out here, without a server: planned as it plans them and drawn by the worker's own code, so the bits are its own."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

import PIL.Image
from tqdm import tqdm

from model.config import BundleConfig, Operation, find_bundle
from model.runtime import prepare
from server.api.images.decode import Decoder, PictureLimits
from server.api.jobs import Plan, draft
from server.api.planning import OPERATIONS, file_hash
from server.api.state import AppState
from server.engine.client import EngineClient
from server.engine.protocol import Image, Job
from server.engine.runner import Runner, Stopwatch
from server.engine.scheduler import RowId
from server.metrics import Metrics
from server.settings import Settings


def plan(operation: Operation, fields: dict[str, Any], settings: Settings) -> tuple[Plan, int]:
    """What the server would do for this request, and its quality. Raises what the server would answer with."""
    schema, planner = OPERATIONS[operation]
    config = BundleConfig.read(find_bundle(settings.bundles[0]))
    asked = schema.model_validate(fields)
    limits = PictureLimits(settings.max_image_bytes, settings.max_image_pixels)
    state = AppState(settings, Metrics(), EngineClient(settings), {config.name: config}, Decoder(limits))
    return planner(asked, draft(asked, operation, state), limits), asked.quality


def draw(job: Job, settings: Settings, only: int | None = None) -> tuple[list[Image], tuple[str, ...]]:
    """The job's pictures as they were drawn, or the one of this number, and the encoders that cut its prompt."""
    prepare(settings.threads)
    runner = Runner(settings.model_copy(update={"weights": settings.bundles[0]}))
    indices = list(range(len(job.seeds))) if only is None else [only]
    at_once = 1 if job.sampling.deterministic else settings.max_batch_rows
    images, truncated = list[Image](), tuple[str, ...]()
    with tqdm(total=len(indices) * job.sampling.steps, desc="denoising", unit="step", leave=False, disable=None) as bar:
        for start in range(0, len(indices), at_once):
            (truncated,) = runner.start([(job, indices[start : start + at_once])], Stopwatch())
            images += _drawn(runner, job, [RowId(job.id, i) for i in indices[start : start + at_once]], bar)
    return images, truncated


def _drawn(runner: Runner, job: Job, rows: Sequence[RowId], bar: tqdm[Any]) -> list[Image]:
    while runner.steps_done(rows[0]) < job.sampling.steps:
        runner.step(job.model, rows)
        bar.update(len(rows))
    images = runner.decode(job.model, rows).images()
    runner.drop(rows)
    return images


def recorded(picture: bytes, files: Sequence[bytes]) -> tuple[Operation, dict[str, Any], int]:
    """(operation, the request's fields, number of the frame) that a PNG of ours tells of itself.

    files: those that were sent with the request. Raises ValueError for a picture that tells nothing, and for files other than those.
    """
    try:
        with PIL.Image.open(io.BytesIO(picture), formats=("PNG",)) as opened:
            fields = json.loads(opened.info["parameters"])
        operation, frame = fields.pop("operation", "generate"), fields.pop("frame", 0)
    except (KeyError, ValueError, AttributeError, OSError):
        raise ValueError("it is no PNG with parameters in it") from None
    if operation not in OPERATIONS:
        raise ValueError(f"it was made by an operation unknown here, {operation!r}")
    fields.pop("truncated", None)
    by_hash = {file_hash(content): content for content in files}
    return operation, _with_files(fields, by_hash), frame


def _with_files(value: Any, files: Mapping[str, bytes], name: str = "") -> Any:
    """The value with every hash in it replaced by the file of this hash. Raises ValueError naming one that is missing."""
    if isinstance(value, dict):
        return {key: _with_files(inner, files, key) for key, inner in value.items()}
    if isinstance(value, list):
        return [_with_files(inner, files, name) for inner in value]
    if name not in ("image", "mask", "references"):
        return value
    if value not in files:
        raise ValueError(f"it takes the {name} with {value}; give it by --{name}")
    return files[value]
