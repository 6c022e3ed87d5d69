"""OpenAI's image endpoints: its names for what the native endpoints do, so that its clients work unchanged. How they map: docs/api.md."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from model.config import BundleConfig
from server.api.body import read_body
from server.api.cancellation import unless_cancelled
from server.api.documents import events, request_body, responses
from server.api.errors import ApiError
from server.api.jobs import Plan, sides
from server.api.openai_answers import Answer
from server.api.openai_schemas import EditsRequest, GenerationsRequest, ImagesFields, ImagesResponse, Size, VariationRequest
from server.api.planning import OPERATIONS, plan
from server.api.routes_models import model_asked
from server.api.sse import streamed
from server.api.state import AppState, note, state_of
from server.settings import Settings

SIZE = re.compile(r"([1-9]\d{0,4})x([1-9]\d{0,4})")

router = APIRouter(prefix="/v1/images", tags=["openai"])


@dataclass(frozen=True, slots=True)
class Endpoint:
    """events: the first part of its events' names."""

    path: str
    schema: type[ImagesFields]
    events: str
    summary: str


ENDPOINTS = (
    Endpoint("/generations", GenerationsRequest, "image_generation", "Text → image"),
    Endpoint("/edits", EditsRequest, "image_edit", "A picture drawn anew, as a whole or where the mask says"),
    Endpoint("/variations", VariationRequest, "image_generation", "Other pictures that show the same"),
)


def _handler(endpoint: Endpoint) -> Callable[[Request], Awaitable[Response]]:
    async def handle(request: Request) -> Response:
        state = state_of(request)
        asked = await read_body(request, endpoint.schema, state.settings.max_body_bytes)
        answer = Answer(request, asked, await _plan(asked, state))
        note(request, answer.plan.job)
        if asked.stream:
            return await streamed(request, partial(answer.tell, endpoint.events))
        return await answer.respond(await unless_cancelled(request, state.engine.run(answer.plan.job)))

    return handle


async def _plan(asked: ImagesFields, state: AppState) -> Plan:
    config = model_asked(asked.model, state.models)
    _check_possible(asked)
    size = _size(asked.size, config, state.settings)
    operation, fields = asked.native(size, config.recipe.num_inference_steps)
    # Validated as they are: the fields are of the same types.
    planned = await plan(OPERATIONS[operation][0].model_construct(**fields), operation, state)
    if size not in (None, planned.size):
        width, height = planned.size
        raise unsupported("size", f"an edit with a mask has the image's own size: send auto or {width}x{height}", asked.size)
    return planned


def unsupported(param: str, message: str, sent: object) -> ApiError:
    """Something that OpenAI's API knows and these weights cannot do. message: what they can."""
    return ApiError(HTTPStatus.BAD_REQUEST, "unsupported_value", f"{param}: {message} (sent: {sent!r})", param)


def _check_possible(asked: ImagesFields) -> None:
    if asked.response_format == "url":
        raise unsupported("response_format", "pictures are not kept, so they have no URL; send b64_json", "url")
    if asked.output_format != asked.file_format:
        raise unsupported("output_format", "pictures are png, jpeg or webp", asked.output_format)
    if asked.background == "transparent":
        raise unsupported("background", "pictures are opaque; send opaque or auto", "transparent")
    if asked.output_compression is not None and asked.output_format == "png":
        raise unsupported("output_compression", "is for jpeg and webp; a png has no quality to choose", asked.output_compression)


def _size(sent: str, config: BundleConfig, settings: Settings) -> Size:
    """(width, height), None for auto. Raises ApiError 400 that lists what there is."""
    if sent == "auto":
        return None
    possible = sides(config, settings)
    if match := SIZE.fullmatch(sent):
        size = int(match[1]), int(match[2])
        if size[0] in possible and size[1] in possible:
            return size
    native = "x".join(map(str, config.native_size))
    listed = ", ".join(map(str, possible))
    raise unsupported("size", f"{config.name} draws auto ({native}) and any WIDTHxHEIGHT of these pixels: {listed}", sent)


_told = {"b64_json": "…", "created_at": 1763749200, "size": "128x128", "quality": "medium", "background": "opaque", "output_format": "png"}
for _endpoint in ENDPOINTS:
    _events = events(
        (f"{_endpoint.events}.partial_image", {**_told, "partial_image_index": 0, "index": 0}),
        (f"{_endpoint.events}.completed", {**_told, "index": 0, "usage": {"…": 0}}),
    )
    router.add_api_route(
        _endpoint.path,
        _handler(_endpoint),
        methods=["POST"],
        summary=_endpoint.summary,
        name=f"openai{_endpoint.path.replace('/', '_')}",
        response_class=JSONResponse,
        responses=responses("The pictures; with stream, events", ImagesResponse, _events),
        openapi_extra=request_body(_endpoint.schema, f"{router.prefix}{_endpoint.path}"),
    )
