"""extra-single-image and extra-batch-images: enlarge one image, or several after each other."""

from __future__ import annotations

import asyncio
import base64
import html
import json
import time
from functools import partial
from typing import NamedTuple

from fastapi import Request, Response

from server.api.body import JSON, read_body
from server.api.errors import cancelled
from server.api.planning.plan import Plan
from server.api.planning.plan_request import plan_request
from server.api.responses import answer_headers, encode_all, stage_seconds, until_deadline
from server.api.sdapi.checkpoints import find_checkpoint
from server.api.sdapi.clients import Drawing, clients_of
from server.api.sdapi.errors import as_sent
from server.api.sdapi.schemas import (
    Enlargement,
    ExtraBatchImagesRequest,
    ExtraSingleImageRequest,
    ExtrasRequest,
)
from server.api.state import app_state, owner_of, request_state, unless_cancelled
from server.engine.errors import DeadlineExceeded
from server.engine.hooks import Hooks


class Enlarged(NamedTuple):
    """An enlarged image: a PNG in base64, what was done, as HTML, and headers for the answer."""

    image: str
    html: str
    headers: dict[str, str]


async def extra_single_image(request: Request) -> Response:
    """Return the image, enlarged."""
    with clients_of(request).drawing(owner_of(request), "extras") as drawing:
        answer = await drawing.unless_interrupted(_single(request, drawing))
        if answer is None:
            raise cancelled()
        return answer


async def _single(request: Request, drawing: Drawing) -> Response:
    limit = app_state(request).settings.max_body_bytes
    fields = await read_body(request, ExtraSingleImageRequest, limit)
    if (earlier := await request_state(request).earlier_answer(request, fields)) is not None:
        return earlier
    upscaler, names = fields.upscaler_1, fields.sent_names
    with as_sent(names):
        planned = await _enlarging(request, fields, fields.image)
        # The files may be large, and are not needed while the job waits.
        del fields
        image, html_info, headers = await _enlarged(request, drawing, planned, upscaler)
    return await _large_json({"html_info": html_info, "image": image}, headers)


async def extra_batch_images(request: Request) -> Response:
    """Return the images, enlarged one after the other; of an interrupted request the first ones."""
    state = app_state(request)
    deadline = time.monotonic() + state.settings.timeout_s
    fields = await read_body(request, ExtraBatchImagesRequest, state.settings.max_body_bytes)
    if (earlier := await request_state(request).earlier_answer(request, fields)) is not None:
        return earlier
    files = [(f"imageList.{i}.data", entry.data) for i, entry in enumerate(fields.imageList)]
    with as_sent(fields.sent_names):
        # All headers, before the first image is drawn.
        check = state.decoder.run(lambda _: None, files, deadline)
        await unless_cancelled(request, check)
    done = list[Enlarged]()
    for name, file in files:
        work = partial(_one_of, request, fields, file, deadline, len(files))
        with (
            as_sent({**fields.sent_names, "image": name}),
            clients_of(request).drawing(owner_of(request), "extras") as drawing,
        ):
            enlarged = await drawing.unless_interrupted(work(drawing))
        if enlarged is None:
            break
        done.append(enlarged)
    if not done:
        raise cancelled()
    shown = "".join(each.html for each in done)
    return await _large_json({"html_info": shown, "images": [each.image for each in done]})


async def _one_of(
    request: Request,
    fields: ExtrasRequest,
    file: bytes,
    deadline: float,
    parts: int,
    drawing: Drawing,
) -> Enlarged:
    left_s = deadline - time.monotonic()
    if left_s <= 0:
        raise DeadlineExceeded("the deadline passed")
    planned = await _enlarging(request, fields, file, left_s, parts)
    return await _enlarged(request, drawing, planned, fields.upscaler_1)


async def _enlarging(
    request: Request,
    fields: ExtrasRequest,
    file: bytes,
    timeout_s: float | None = None,
    parts: int = 1,
) -> Plan:
    """Plan to enlarge a file. parts: files of the request. Raises ApiError and EngineError."""
    native = {
        **fields.native(file),
        "model": find_checkpoint(request, None).name,
        "timeout_s": timeout_s,
    }
    # Validated already: the native fields have the same types.
    native_fields = Enlargement.model_construct(**native)
    planned = await plan_request(request, native_fields, "upscale", parts=parts)
    return planned.cropped(fields.cropped_size)


async def _enlarged(request: Request, drawing: Drawing, planned: Plan, upscaler: str) -> Enlarged:
    """Run a plan. upscaler: its name, to be shown. Raises ApiError and EngineError."""
    state = app_state(request)
    drawing.plan = planned

    async def run() -> Enlarged:
        finished = await state.engine.run(planned.job, Hooks(on_admitted=drawing.admit))
        drawing.finish_drawing()
        async with until_deadline(planned):
            (content,), seconds = await encode_all(state, planned, finished, "png", 90)
        scale = planned.operation_parameters["scale"]
        shown = html.escape(f"Upscaled by: {scale:g}, upscaler: {upscaler}")
        headers = answer_headers(planned, finished, stage_seconds(finished, seconds), "json")
        return Enlarged(base64.b64encode(content).decode(), f"<p>{shown}</p>", headers)

    return await unless_cancelled(request, run())


async def _large_json(body: object, headers: dict[str, str] | None = None) -> Response:
    content = await asyncio.to_thread(lambda: json.dumps(body).encode())
    return Response(content, media_type=JSON, headers=headers)
