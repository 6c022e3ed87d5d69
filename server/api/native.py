"""The native endpoints: everything Paella can do, under its own names."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from server.api.body import read_json
from server.api.images import accepted_format, encode
from server.api.jobs import parameters, plan
from server.api.requests import unless_cancelled
from server.api.schemas import ErrorAnswer, Format, GenerateRequest, ImagesAnswer
from server.api.state import AppState, request_id_of, state_of
from server.engine.protocol import Finished, Job

router = APIRouter(tags=["native"])

ERRORS = {
    400: "Malformed JSON",
    404: "Unknown weights",
    413: "Body too large",
    415: "Wrong content type",
    422: "A field out of bounds",
    429: "Queue full, or timeout_s too short for what is queued; Retry-After says when to come back",
    500: "Failed; x-should-retry: false if repeating cannot help",
    503: "Starting, draining, or the worker was lost",
    504: "Deadline passed",
}
BINARY = {"schema": {"type": "string", "format": "binary"}}
HEADERS = {
    name: {"description": meaning, "schema": {"type": "string"}}
    for name, meaning in {
        "X-Seed": "The image's seed",
        "X-Request-Id": "The client's, or one made here",
        "Server-Timing": "queue, encode, prior, denoise, decode, image; milliseconds",
        "X-Prompt-Truncated": "The encoders that could not take the whole prompt, if any",
    }.items()
}
RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "One image as a file; JSON for several, or if asked for",
        "model": ImagesAnswer,
        "content": {"image/png": BINARY, "image/jpeg": BINARY, "image/webp": BINARY},
        "headers": HEADERS,
    },
    **{status: {"description": description, "model": ErrorAnswer} for status, description in ERRORS.items()},
}


@router.post(
    "/generate",
    summary="Text → image",
    response_class=JSONResponse,
    responses=RESPONSES,
    openapi_extra={"requestBody": {"required": True, "content": {"application/json": {"schema": GenerateRequest.model_json_schema()}}}},
)
async def generate(request: Request) -> Response:
    state = state_of(request)
    asked = await read_json(request, GenerateRequest)
    job = plan(asked, state)
    finished = await unless_cancelled(request, state.engine.run(job))
    wanted = asked.response_format or accepted_format(request.headers.get("accept", "*/*"))
    if wanted == "json" or len(job.seeds) > 1:
        return await _json_answer(request, job, finished, "png" if wanted == "json" else wanted, asked.quality)
    return await _image_answer(state, job, finished, wanted, asked.quality)


async def _image_answer(state: AppState, job: Job, finished: Finished, format: Format, quality: int) -> Response:
    (content,), seconds = await _encode_all(state, job, finished, format, quality)
    return Response(content, media_type=f"image/{format}", headers=_headers(job, finished, _stages(finished, seconds)))


async def _json_answer(request: Request, job: Job, finished: Finished, format: Format, quality: int) -> Response:
    contents, seconds = await _encode_all(state_of(request), job, finished, format, quality)
    stages = _stages(finished, seconds)

    def body() -> bytes:
        entries = [
            {"b64_json": base64.b64encode(content).decode(), "seed": seed, "width": job.width, "height": job.height, "format": format}
            for content, seed in zip(contents, job.seeds, strict=True)
        ]
        answer = {
            "id": request_id_of(request),
            "created": int(time.time()),
            "model": job.model,
            "images": entries,
            "parameters": {**parameters(job, finished.truncated, 0), "n": len(job.seeds)},
            "timings": stages,
        }
        return json.dumps(answer).encode()

    return Response(await asyncio.to_thread(body), media_type="application/json", headers=_headers(job, finished, stages))


async def _encode_all(state: AppState, job: Job, finished: Finished, format: Format, quality: int) -> tuple[list[bytes], float]:
    """The job's pictures as files, in the order of its seeds, and the seconds that took."""
    began = time.perf_counter()
    images = sorted(finished.images, key=lambda image: image.index)
    contents = await asyncio.gather(
        *(asyncio.to_thread(encode, image, format, quality, parameters(job, finished.truncated, image.index)) for image in images)
    )
    seconds = time.perf_counter() - began
    state.metrics.image_encode_duration.observe(seconds)
    state.metrics.images.labels("/generate").inc(len(images))
    return contents, seconds


def _stages(finished: Finished, image_seconds: float) -> dict[str, float]:
    return {**asdict(finished.timings), "image": image_seconds}


def _headers(job: Job, finished: Finished, stages: dict[str, float]) -> dict[str, str]:
    """What every answer says beside its pictures; stages: seconds."""
    timing = ", ".join(f"{name};dur={seconds * 1000:.2f}" for name, seconds in stages.items())
    headers = {"X-Seed": str(job.seeds[0]), "Server-Timing": timing}
    if finished.truncated:
        headers["X-Prompt-Truncated"] = ", ".join(finished.truncated)
    return headers
