"""The native endpoints: all of Paella's operations under their own names."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from http import HTTPStatus

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from model.config import Operation
from server.api.body import read_body
from server.api.errors import ApiError, invalid_value, unprocessable
from server.api.images.encode import Format
from server.api.images.url_store import ImageLinks
from server.api.openapi import (
    BINARY,
    describe_answers,
    describe_body,
    describe_error,
    describe_events,
)
from server.api.planning.operations import OPERATIONS
from server.api.planning.plan import Plan
from server.api.planning.plan_request import plan_request
from server.api.responses import (
    NativeStream,
    accepted_animation,
    accepted_format,
    animation_response,
    file_response,
    image_links,
    json_response,
    respond_in_time,
)
from server.api.schemas import (
    AnyFormat,
    ErrorAnswer,
    ImagesAnswer,
    InterpolateRequest,
    SamplingFields,
)
from server.api.sse import stream_events
from server.api.state import app_state, cancel, request_state
from server.engine.messages import Finished

router = APIRouter()

_FILE = {"b64_json": "…", "width": 256, "height": 256}
_ANSWER = {
    "id": "mine",
    "created": 1763749200,
    "model": "tiny",
    "images": [],
    "parameters": {},
    "timings": {},
}
IMAGES = {f"image/{format}": BINARY for format in ("png", "jpeg", "webp")}
ANIMATIONS = {f"image/{format}": BINARY for format in ("gif", "webp")}
EVENTS = describe_events(
    ("queued", {"id": "mine", "position": 0, "predicted_s": 0.08}),
    ("started", {"id": "mine", "steps": 2}),
    ("preview", {"index": 0, "step": 1, "of": 2, **_FILE, "format": "jpeg"}),
    ("image", {"index": 0, **_FILE, "seed": 7, "format": "png"}),
    ("completed", _ANSWER),
)
RESPONSES = describe_answers(
    "One image as a file; JSON for several or on request; events with stream",
    ImagesAnswer,
    IMAGES | EVENTS,
)
ANIMATION_RESPONSES = describe_answers(
    "An animation; JSON on request; events with stream", ImagesAnswer, ANIMATIONS | EVENTS
)

SUMMARIES: dict[Operation, str] = {
    "generate": "Text to image",
    "inpaint": "Repaint a part of an image",
    "outpaint": "Extend an image beyond its edges",
    "variations": "Other images with the same content",
    "edit": "Redraw an image, keeping its structure",
    "upscale": "Enlarge an image and draw its detail",
    "interpolate": "Images between prompts or images",
}


def _endpoint(
    operation: Operation, schema: type[SamplingFields]
) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        _check_query(request)
        limit = app_state(request).settings.max_body_bytes
        fields = await read_body(request, schema, limit)
        wanted = _output(request, fields)
        # By its headers a request may ask for another answer than one with the same fields.
        fields = fields.model_copy(update={"response_format": wanted})
        if (earlier := await request_state(request).earlier_answer(request, fields)) is not None:
            return earlier
        quality, stream = fields.quality, fields.stream
        links = image_links(request) if wanted == "url" else None
        planned = await plan_request(request, fields, operation, wanted)
        # The files may be large, and are not needed while the job waits.
        del fields
        if stream:
            events = NativeStream(request, planned, _file_format(wanted), quality, links)
            return await stream_events(request, events.run)
        respond = partial(_respond, request, planned, wanted, quality, links)
        return await respond_in_time(request, planned, respond)

    return endpoint


def _check_query(request: Request) -> None:
    """Raise ApiError 422 for parameters in the URL, which nothing would read."""
    if name := next(iter(request.query_params), None):
        problem = "the URL takes no parameters; send fields in the body"
        raise unprocessable("unknown_field", name[:80], problem)


def _file_format(wanted: AnyFormat) -> Format:
    """Return the format of an answer's files: PNG in JSON."""
    assert wanted != "gif"
    return "png" if wanted == "json" or wanted == "url" else wanted


def _output(request: Request, fields: SamplingFields) -> AnyFormat:
    """Return the format of the answer; of the frames of an interpolation it may be an animation's.

    Raises ApiError 422 for a format that a stream cannot have.
    """
    accept = request.headers.get("accept", "*/*")
    if not isinstance(fields, InterpolateRequest):
        return fields.response_format or accepted_format(accept)
    wanted = fields.response_format or accepted_animation(accept)
    if fields.stream and wanted == "gif":
        allowed = "frames of a stream are png, jpeg or webp"
        raise invalid_value("response_format", allowed, wanted)
    return wanted


async def _respond(
    request: Request,
    planned: Plan,
    wanted: AnyFormat,
    quality: int,
    links: ImageLinks | None,
    finished: Finished,
) -> Response:
    """Return one file, an animation of several frames, or JSON."""
    state = app_state(request)
    if planned.job.keyframes and (wanted == "gif" or wanted == "webp"):
        return await animation_response(state, planned, finished, wanted, quality)
    format = _file_format(wanted)
    if wanted == "json" or wanted == "url" or len(planned.job.seeds) > 1:
        return await json_response(request, planned, finished, format, quality, links)
    return await file_response(state, planned, finished, format, quality)


for _operation, (_schema, _) in OPERATIONS.items():
    router.add_api_route(
        f"/{_operation}",
        _endpoint(_operation, _schema),
        methods=["POST"],
        tags=["native"],
        summary=SUMMARIES[_operation],
        name=_operation,
        response_class=JSONResponse,
        responses=ANIMATION_RESPONSES if _schema is InterpolateRequest else RESPONSES,
        openapi_extra=describe_body(_schema, f"/{_operation}"),
    )


@router.delete(
    "/requests/{id:path}",
    tags=["requests"],
    status_code=204,
    summary="Cancel a running request",
    response_class=Response,
    responses={
        204: {"description": "Cancelled; its rows leave at the next step"},
        404: {"description": "No such request", "model": ErrorAnswer},
        **describe_error(403),
    },
)
async def delete_request(request: Request, id: str) -> Response:
    """Cancel all running requests of the caller's API key with this `X-Request-Id`."""
    if not cancel(request, id):
        message = "no request with this id is running"
        raise ApiError(HTTPStatus.NOT_FOUND, "request_not_found", message, "id")
    return Response(status_code=HTTPStatus.NO_CONTENT)
