"""OpenAI's image endpoints, mapped to the native operations so that its clients work unchanged.

docs/api.md has the mapping.
"""

from __future__ import annotations

import asyncio
import base64
import json
import re
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from functools import partial
from http import HTTPStatus
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from model.config import BundleConfig
from server.api.body import read_body
from server.api.errors import ApiError, as_bad_request, shortened
from server.api.images.encode import Format, encode
from server.api.images.url_store import ImageLinks
from server.api.openai_schemas import (
    UNSUPPORTED_FIELDS,
    EditsRequest,
    GenerationsRequest,
    ImagesFields,
    ImagesResponse,
    Size,
    VariationRequest,
)
from server.api.openapi import describe_answers, describe_body, describe_events
from server.api.planning.draft import find_model
from server.api.planning.operations import OPERATIONS
from server.api.planning.plan import Plan
from server.api.planning.plan_request import plan_request
from server.api.planning.sizes import nearest_size
from server.api.responses import (
    answer_headers,
    encode_all,
    file_or_url,
    image_links,
    respond_in_time,
    stage_seconds,
    until_deadline,
)
from server.api.schemas import EditOrInpaintRequest
from server.api.sse import Comment, DeferredEvent, Emit, Event, stream_events
from server.api.state import app_state, request_state
from server.engine.hooks import Hooks
from server.engine.messages import Finished, Preview
from server.settings import Settings

SIZE = re.compile(r"([1-9]\d{0,4})x([1-9]\d{0,4})")

router = APIRouter(prefix="/v1/images", tags=["openai"])


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One of OpenAI's endpoints. event_prefix: first part of its events' names."""

    path: str
    schema: type[ImagesFields]
    event_prefix: str
    summary: str


ENDPOINTS = (
    Endpoint("/generations", GenerationsRequest, "image_generation", "Text to image"),
    Endpoint("/edits", EditsRequest, "image_edit", "Redraw an image, or repaint its masked part"),
    Endpoint(
        "/variations", VariationRequest, "image_generation", "Other images with the same content"
    ),
)


def _handler(endpoint: Endpoint) -> Callable[[Request], Awaitable[Response]]:
    async def handle(request: Request) -> Response:
        state = app_state(request)
        fields = await read_body(request, endpoint.schema, state.settings.max_body_bytes)
        if (earlier := await request_state(request).earlier_answer(request, fields)) is not None:
            return earlier
        links = _links(request, fields)
        planned = await _plan(request, fields)
        answer = OpenAIAnswer(
            request,
            planned,
            fields.output_format,
            fields.file_quality,
            fields.effective_quality(planned.job.sampling.preset),
            links,
            with_files=fields.response_format == "b64_json",
        )
        stream = fields.stream
        # The files may be large, and are not needed while the job waits.
        del fields
        if stream:
            return await stream_events(request, partial(answer.stream, endpoint.event_prefix))
        return await respond_in_time(request, planned, answer.respond)

    return _refusing_with_400(handle)


def _refusing_with_400(
    handle: Callable[[Request], Awaitable[Response]],
) -> Callable[[Request], Awaitable[Response]]:
    async def refusing(request: Request) -> Response:
        try:
            return await handle(request)
        except ApiError as error:
            raise as_bad_request(error) from None

    return refusing


# ── request ───────────────────────────────────────────────────────────────────────────────────────


def _links(request: Request, fields: ImagesFields) -> ImageLinks | None:
    """Return where the answer's URLs come from, None if it has none. Raises ApiError 400."""
    if fields.stream:
        return None
    if fields.response_format == "url":
        return image_links(request)
    if not fields.url_by_default:
        return None
    try:
        return image_links(request)
    except ApiError:
        return None


async def _plan(request: Request, fields: ImagesFields) -> Plan:
    state = app_state(request)
    config = find_model(fields.model, state.models, state.settings.aliases)
    _check_supported(fields)
    size = _size(fields.size, config, state.settings)
    operation, native = fields.native(size, config)
    # Validated already: the native fields have the same types.
    schema = EditOrInpaintRequest if operation == "edit" else OPERATIONS[operation][0]
    native_fields = schema.model_construct(**native)
    planned = await plan_request(request, native_fields, operation, fields.output_format)
    return replace(planned, opaque=True) if fields.background == "opaque" else planned


def _unsupported(param: str, supported: str, sent: object) -> ApiError:
    """Return the error for a value that OpenAI's API has and the weights do not support."""
    message = f"{param}: {supported} (sent: {shortened(sent)})"
    return ApiError(HTTPStatus.BAD_REQUEST, "unsupported_value", message, param)


def _check_supported(fields: ImagesFields) -> None:
    if fields.background == "transparent":
        raise _unsupported("background", "images are opaque; send opaque or auto", "transparent")
    if fields.output_compression not in (None, 100) and fields.output_format == "png":
        message = "is for jpeg and webp; a png has no quality: send 100, or leave it out"
        raise _unsupported("output_compression", message, fields.output_compression)
    for name, advice in UNSUPPORTED_FIELDS.items():
        if (sent := getattr(fields, name)) is not None:
            raise _unsupported(name, f"not supported; leave it out: {advice}", sent)


def _size(sent: str, config: BundleConfig, settings: Settings) -> Size:
    """Return (width, height), None for auto. Raises ApiError 400 that lists possible sizes.

    With the setting `sizes` nearest, it is the nearest possible one.
    """
    if sent == "auto":
        return None
    sides = config.sides(settings.max_side)
    if match := SIZE.fullmatch(sent):
        size = int(match[1]), int(match[2])
        if settings.sizes == "nearest":
            return nearest_size(size, config, settings)
        if size[0] in sides and size[1] in sides:
            return size
    native = "x".join(map(str, config.native_size))
    listed = ", ".join(map(str, sides))
    message = (
        f"{config.name} supports auto ({native}) and WIDTHxHEIGHT of any of these pixels: {listed}"
    )
    raise _unsupported("size", message, sent)


# ── answer ────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class OpenAIAnswer:
    """A finished plan as OpenAI's JSON answer or events.

    Attributes:
        format: of the images' files.
        file_quality: of JPEG and WebP.
        quality: the field `quality` of the answer.
        links: stores the images, whose URLs are then part of the answer. Streams have files.
        with_files: whether the answer has the files, besides URLs if there are `links`.
    """

    request: Request
    plan: Plan
    format: Format
    file_quality: int
    quality: str
    links: ImageLinks | None = None
    with_files: bool = True

    async def respond(self, finished: Finished) -> Response:
        """Return all images as one JSON answer."""
        contents, stages = await self._encode(finished)

        def body() -> bytes:
            forms = self._forms(contents)
            seeds = self.plan.job.seeds
            data = [{**form, "seed": seed} for form, seed in zip(forms, seeds, strict=True)]
            answer = {
                "created": int(time.time()),
                "data": data,
                "usage": self._usage(len(data)),
                **self._effective,
            }
            return json.dumps(answer).encode()

        headers = answer_headers(self.plan, finished, stages, "json")
        content = await asyncio.to_thread(body)
        return Response(content, media_type="application/json", headers=headers)

    def _forms(self, contents: list[bytes]) -> list[dict[str, str]]:
        """Return each image as file, URL or both. Raises ApiError 422 if there is room for none."""
        if self.links is None or not self.with_files:
            return file_or_url(self.plan, contents, self.format, self.links)
        files = file_or_url(self.plan, contents, self.format, None)
        try:
            urls = file_or_url(self.plan, contents, self.format, self.links)
        except ApiError:
            # Nobody asked for a URL.
            return files
        return [{**file, **url} for file, url in zip(files, urls, strict=True)]

    async def stream(self, prefix: str, emit: Emit) -> None:
        """Run the plan's job; emit `prefix`.partial_image, and `prefix`.completed per image."""
        hooks = Hooks(
            # OpenAI has no such event, but the answer's headers should not wait for an image.
            on_admitted=lambda _: emit(Comment("queued")),
            on_preview=lambda preview: emit(
                DeferredEvent(
                    lambda: self._partial(f"{prefix}.partial_image", preview), preview.image.index
                )
            ),
        )
        finished = await app_state(self.request).engine.run(self.plan.job, hooks)
        async with until_deadline(self.plan):
            contents, _ = await self._encode(finished)
        usage = self._usage(1)
        for index, content in enumerate(contents):
            name = f"{prefix}.completed"
            emit(DeferredEvent(partial(self._event, name, content, index=index, usage=usage)))

    def _partial(self, name: str, preview: Preview) -> Event:
        # In the requested format: clients save previews under that name.
        image = self.plan.preview(preview.image)
        marking = app_state(self.request).marker.of_preview(self.plan.operation)
        content = encode(image, self.format, self.file_quality, {}, marking=marking)
        index = preview.image.index
        return self._event(name, content, index=index, partial_image_index=preview.number)

    def _event(self, name: str, content: bytes, **extra: Any) -> Event:
        """Return an event with a file. index, of the request's image, is an extension."""
        data = {
            "type": name,
            "b64_json": base64.b64encode(content).decode(),
            "created_at": int(time.time()),
            **self._effective,
            **extra,
        }
        return Event(name, data)

    async def _encode(self, finished: Finished) -> tuple[list[bytes], dict[str, float]]:
        """Return the images' files, and the seconds of every stage."""
        contents, seconds = await encode_all(
            app_state(self.request),
            self.plan,
            finished,
            self.format,
            self.file_quality,
        )
        return contents, stage_seconds(finished, seconds)

    @property
    def _effective(self) -> dict[str, str]:
        return {
            "size": f"{self.plan.answer_size[0]}x{self.plan.answer_size[1]}",
            "quality": self.quality,
            "background": "transparent" if self._transparent else "opaque",
            "output_format": self.format,
        }

    @property
    def _transparent(self) -> bool:
        plan = self.plan
        return plan.is_transparent and not plan.opaque and self.format != "jpeg"

    def _usage(self, images: int) -> dict[str, Any]:
        """Return token counts: bytes of prompts, VQGAN tokens, one per image read by CLIP."""
        job = self.plan.job
        config = app_state(self.request).models[job.model]
        tokens = job.width * job.height // config.vqgan.downscale**2
        text = sum(len(prompt.encode("utf-8", "replace")) for prompt in job.prompts)
        image = len(job.references) + (tokens if job.canvas else 0)
        return {
            "input_tokens": text + image,
            "input_tokens_details": {"text_tokens": text, "image_tokens": image},
            "output_tokens": images * tokens,
            "total_tokens": text + image + images * tokens,
        }


_example = {
    "b64_json": "…",
    "created_at": 1763749200,
    "size": "256x256",
    "quality": "medium",
    "background": "opaque",
    "output_format": "png",
}
for _endpoint in ENDPOINTS:
    _prefix = _endpoint.event_prefix
    _events = describe_events(
        (f"{_prefix}.partial_image", {**_example, "partial_image_index": 0, "index": 0}),
        (f"{_prefix}.completed", {**_example, "index": 0, "usage": {"…": 0}}),
    )
    router.add_api_route(
        _endpoint.path,
        _handler(_endpoint),
        methods=["POST"],
        summary=_endpoint.summary,
        name=f"openai{_endpoint.path.replace('/', '_')}",
        response_class=JSONResponse,
        responses=describe_answers("The images; with stream, events", ImagesResponse, _events),
        openapi_extra=describe_body(_endpoint.schema, f"{router.prefix}{_endpoint.path}"),
    )
