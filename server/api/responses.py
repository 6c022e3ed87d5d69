"""What the engine made of a plan → the answer: one file, an animation, or several pictures as JSON."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, TypeVar

from fastapi import Request, Response

from server.api.images.encode import Animation, animate, encode
from server.api.jobs import Plan
from server.api.schemas import Format
from server.api.state import AppState, request_id_of, state_of
from server.engine.protocol import Finished, Image

Result = TypeVar("Result")


async def one_file(state: AppState, plan: Plan, finished: Finished, format: Format, quality: int) -> Response:
    (content,), seconds = await encode_all(state, plan, finished, format, quality)
    return Response(content, media_type=f"image/{format}", headers=headers_of(plan, finished, stages_of(finished, seconds)))


async def animation(state: AppState, plan: Plan, finished: Finished, format: Animation, quality: int) -> Response:
    """All pictures in one file, which has no parameters in it."""

    def make() -> bytes:
        return animate([plan.finish(image) for image in _ordered(finished)], format, quality)

    content, seconds = await _timed(state, plan, len(finished.images), make)
    return Response(content, media_type=f"image/{format}", headers=headers_of(plan, finished, stages_of(finished, seconds)))


async def listed(request: Request, plan: Plan, finished: Finished, format: Format, quality: int) -> Response:
    contents, seconds = await encode_all(state_of(request), plan, finished, format, quality)
    stages = stages_of(finished, seconds)

    def body() -> bytes:
        return json.dumps(about(request, plan, finished, stages) | entries(plan, contents, format)).encode()

    return Response(await asyncio.to_thread(body), media_type="application/json", headers=headers_of(plan, finished, stages))


# ── parts ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def entries(plan: Plan, contents: Sequence[bytes], format: Format) -> dict[str, Any]:
    """The files, in the order of their seeds, as JSON has them."""
    return {"images": [entry(plan, i, content, format) for i, content in enumerate(contents)]}


def entry(plan: Plan, index: int, content: bytes, format: Format) -> dict[str, Any]:
    size = {"width": plan.size[0], "height": plan.size[1]}
    return {"b64_json": base64.b64encode(content).decode(), "seed": plan.job.seeds[index], **size, "format": format}


def about(request: Request, plan: Plan, finished: Finished, stages: dict[str, float]) -> dict[str, Any]:
    """What an answer says beside its pictures; stages: seconds."""
    parameters = plan.parameters(finished.truncated, 0) | {"n": 1 if plan.job.keyframes else len(plan.job.seeds)}
    parameters.pop("frame", None)
    answer = {"id": request_id_of(request), "created": int(time.time()), "model": plan.job.model}
    return {**answer, "parameters": parameters, "timings": stages}


def _ordered(finished: Finished) -> list[Image]:
    return sorted(finished.images, key=lambda image: image.index)


async def encode_all(state: AppState, plan: Plan, finished: Finished, format: Format, quality: int) -> tuple[list[bytes], float]:
    """The job's pictures as files, in the order of its seeds, and the seconds that took."""

    def make(image: Image) -> bytes:
        return encode(plan.finish(image), format, quality, plan.parameters(finished.truncated, image.index))

    began = time.perf_counter()
    contents = await asyncio.gather(*(asyncio.to_thread(make, image) for image in _ordered(finished)))
    return list(contents), count(state, plan, len(contents), began)


async def _timed(state: AppState, plan: Plan, images: int, work: Callable[[], Result]) -> tuple[Result, float]:
    began = time.perf_counter()
    result = await asyncio.to_thread(work)
    return result, count(state, plan, images, began)


def count(state: AppState, plan: Plan, images: int, began: float) -> float:
    seconds = time.perf_counter() - began
    state.metrics.image_encode_duration.observe(seconds)
    state.metrics.images.labels(f"/{plan.operation}").inc(images)
    return seconds


def stages_of(finished: Finished, image_seconds: float) -> dict[str, float]:
    return {**asdict(finished.timings), "image": image_seconds}


def headers_of(plan: Plan, finished: Finished, stages: dict[str, float]) -> dict[str, str]:
    """stages: seconds."""
    timing = ", ".join(f"{name};dur={seconds * 1000:.2f}" for name, seconds in stages.items())
    headers = {"X-Seed": str(plan.job.seeds[0]), "Server-Timing": timing}
    if finished.truncated:
        headers["X-Prompt-Truncated"] = ", ".join(finished.truncated)
    return headers
