"""The native endpoints: everything Paella can do, under its own names."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Literal

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from model.config import Operation
from server.api.body import read_body
from server.api.cancellation import unless_cancelled
from server.api.documents import BINARY, events, request_body, responses
from server.api.errors import invalid
from server.api.images.encode import accepted_animation, accepted_format
from server.api.jobs import Plan
from server.api.picture_schemas import InterpolateRequest
from server.api.planning import OPERATIONS, plan
from server.api.responses import animation, listed, one_file
from server.api.schemas import Format, ImagesAnswer, SamplingFields
from server.api.sse import streamed
from server.api.state import note, state_of
from server.api.streaming import Story

router = APIRouter(tags=["native"])

IMAGES = {f"image/{format}": BINARY for format in ("png", "jpeg", "webp")}
ANIMATIONS = {f"image/{format}": BINARY for format in ("gif", "webp")}
EVENTS = events(
    ("queued", {"id": "mine", "position": 0, "predicted_s": 0.08}),
    ("started", {"id": "mine", "steps": 12}),
    ("preview", {"index": 0, "step": 6, "of": 12, "b64_json": "…", "width": 128, "height": 128, "format": "jpeg"}),
    ("image", {"index": 0, "b64_json": "…", "seed": 7, "width": 128, "height": 128, "format": "png"}),
    ("completed", {"id": "mine", "created": 1763749200, "model": "tiny", "images": [], "parameters": {}, "timings": {}}),
)
RESPONSES = responses("One image as a file; JSON for several, or if asked for; events with stream", ImagesAnswer, IMAGES | EVENTS)
ANIMATED = responses("An animation; JSON if asked for; events with stream", ImagesAnswer, ANIMATIONS | EVENTS)

SUMMARIES: dict[Operation, str] = {
    "generate": "Text → image",
    "inpaint": "A part of a picture drawn anew",
    "outpaint": "A picture continued beyond its edges",
    "variations": "Other pictures that show the same",
    "edit": "A picture drawn anew over its own structure",
    "interpolate": "Pictures on the way between prompts or pictures",
}


def _endpoint(operation: Operation, schema: type[SamplingFields]) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        state = state_of(request)
        asked = await read_body(request, schema, state.settings.max_body_bytes)
        planned = await plan(asked, operation, state)
        note(request, planned.job)
        if isinstance(asked, InterpolateRequest):
            return await _animate(request, asked, planned)
        return await _answer(request, asked, planned)

    return endpoint


async def _answer(request: Request, asked: SamplingFields, planned: Plan) -> Response:
    state = state_of(request)
    wanted = asked.response_format or accepted_format(request.headers.get("accept", "*/*"))
    format: Format = "png" if wanted == "json" else wanted
    if asked.stream:
        return await streamed(request, Story(request, planned, format, asked.quality).tell)
    finished = await unless_cancelled(request, state.engine.run(planned.job))
    if wanted == "json" or len(planned.job.seeds) > 1:
        return await listed(request, planned, finished, format, asked.quality)
    return await one_file(state, planned, finished, format, asked.quality)


async def _animate(request: Request, asked: InterpolateRequest, planned: Plan) -> Response:
    """An animation if the client wants GIF or WebP, otherwise the frames one by one or all at once."""
    wanted = asked.response_format or accepted_animation(request.headers.get("accept", "*/*"))
    format: Format | Literal["gif"] = "png" if wanted == "json" else wanted
    if asked.stream:
        if format == "gif":
            raise invalid("response_format", "frames that are streamed are png, jpeg or webp", format)
        return await streamed(request, Story(request, planned, format, asked.quality).tell)
    finished = await unless_cancelled(request, state_of(request).engine.run(planned.job))
    if format == "gif" or format == "webp":
        return await animation(state_of(request), planned, finished, format, asked.quality)
    return await listed(request, planned, finished, format, asked.quality)


for _operation, (_schema, _) in OPERATIONS.items():
    router.add_api_route(
        f"/{_operation}",
        _endpoint(_operation, _schema),
        methods=["POST"],
        summary=SUMMARIES[_operation],
        name=_operation,
        response_class=JSONResponse,
        responses=ANIMATED if _schema is InterpolateRequest else RESPONSES,
        openapi_extra=request_body(_schema, f"/{_operation}"),
    )
