"""A finished plan to an answer: one file, an animation, JSON with several images, or a stream."""

from __future__ import annotations

import asyncio
import base64
import json
import math
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from functools import partial
from http import HTTPStatus
from typing import Any, Literal, TypeVar
from urllib.parse import quote

from fastapi import Request, Response

from server.api.errors import ApiError, shortened
from server.api.headers import weighted
from server.api.images.encode import AnimationFormat, Format, animate, encode
from server.api.images.url_store import EXTENSIONS, ImageLinks, StoredImage
from server.api.origins import base_url
from server.api.planning.plan import Plan
from server.api.sse import DeferredEvent, Emit, Event
from server.api.state import AppState, app_state, owner_of, request_state, unless_cancelled
from server.engine.errors import DeadlineExceeded
from server.engine.hooks import Hooks
from server.engine.latency_model import Forecast
from server.engine.messages import Drawn, Finished, Image, Preview

T = TypeVar("T")

# Of those that a client accepts alike, the first is sent.
MEDIA_TYPES: dict[str, Format | Literal["json"]] = {
    "image/png": "png",
    "image/jpeg": "jpeg",
    "image/webp": "webp",
    "application/json": "json",
}


# ── content negotiation ───────────────────────────────────────────────────────────────────────────
# Characters of the header X-Prompt-Read: proxies refuse an answer with long headers.
_PROMPT_READ = 200


def accepted_format(accept: str) -> Format | Literal["json"]:
    """Return the preferred supported type of an `Accept` header; JSON if it has no image type.

    Raises ApiError 406 if it has image types, all of them unsupported.
    """
    return _preferred(accept, MEDIA_TYPES) or _json_for(accept, MEDIA_TYPES)


def accepted_animation(accept: str) -> Format | Literal["gif", "json"]:
    """Return as `accepted_format`, with GIF supported too."""
    known: dict[str, Format | Literal["gif", "json"]] = {**MEDIA_TYPES, "image/gif": "gif"}
    return _preferred(accept, known) or _json_for(accept, known)


def _json_for(accept: str, known: Mapping[str, object]) -> Literal["json"]:
    """Return JSON, unless the client would save the answer as an image that it is not."""
    if "image/" not in accept.lower():
        return "json"
    message = (
        f"Accept: the answer can be {', '.join(known)}; send one of these or */*, or choose by the"
        f" field response_format (sent: {shortened(accept)})"
    )
    raise ApiError(HTTPStatus.NOT_ACCEPTABLE, "not_acceptable", message)


def _preferred(accept: str, known: Mapping[str, T]) -> T | None:
    """Return the value of the known media type with the highest weight, the first one among equals.

    The weight of a type is that of the most exact range that includes it (RFC 9110, 12.5.1).

    None: the client accepts none of them.
    """
    weights = {name.replace("image/jpg", "image/jpeg"): each for name, each in weighted(accept)}
    order = list(weights)

    def preference(media_type: str) -> tuple[float, int]:
        kind = media_type.partition("/")[0]
        ranges = [name for name in (media_type, f"{kind}/*", "*/*") if name in weights]
        return (weights[ranges[0]], -order.index(ranges[0])) if ranges else (0.0, 0)

    best = max(known, key=preference)
    return known[best] if preference(best)[0] > 0 else None


# ── answers ───────────────────────────────────────────────────────────────────────────────────────


async def respond_in_time(
    request: Request, plan: Plan, respond: Callable[[Finished], Coroutine[Any, Any, Response]]
) -> Response:
    """Run the plan's job and return its answer, files included, before the deadline.

    Raises:
        ApiError: 499, the client left or the request was deleted.
        EngineError: the job's, or DeadlineExceeded.
    """

    async def answer() -> Response:
        finished = await app_state(request).engine.run(plan.job)
        async with until_deadline(plan):
            return await respond(finished)

    return await unless_cancelled(request, answer())


@asynccontextmanager
async def until_deadline(plan: Plan) -> AsyncIterator[None]:
    """Bound the time for an answer's files. Raises DeadlineExceeded at the request's deadline."""
    try:
        async with asyncio.timeout(plan.job.deadline - time.monotonic()):
            yield
    except TimeoutError:
        raise DeadlineExceeded("the deadline passed") from None


async def file_response(
    state: AppState, plan: Plan, finished: Finished, format: Format, quality: int
) -> Response:
    """Return the only image as a file."""
    (content,), seconds = await encode_all(state, plan, finished, format, quality)
    stages = stage_seconds(finished, seconds)
    headers = answer_headers(plan, finished, stages, EXTENSIONS[format])
    return Response(content, media_type=f"image/{format}", headers=headers)


async def animation_response(
    state: AppState, plan: Plan, finished: Finished, format: AnimationFormat, quality: int
) -> Response:
    """Return all images in one file."""
    parameters = plan.shared_parameters(finished.truncated)
    marking = state.marker.of(plan.operation)
    frames, began = _Frames(plan, _ordered(finished)), time.perf_counter()
    try:
        content = await state.encoder.run(
            partial(animate, frames, format, quality, parameters, marking=marking),
            len(finished.images),
        )
    finally:
        frames.stop()
    seconds = record_images(state, plan, len(finished.images), began)
    headers = answer_headers(plan, finished, stage_seconds(finished, seconds), format)
    return Response(content, media_type=f"image/{format}", headers=headers)


async def json_response(
    request: Request,
    plan: Plan,
    finished: Finished,
    format: Format,
    quality: int,
    links: ImageLinks | None = None,
) -> Response:
    """Return all images as JSON; with `links` their URLs."""
    contents, seconds = await encode_all(app_state(request), plan, finished, format, quality)
    stages = stage_seconds(finished, seconds)

    def body() -> bytes:
        fields = answer_fields(request, plan, finished, stages)
        return json.dumps(fields | image_entries(plan, contents, format, links)).encode()

    headers = answer_headers(plan, finished, stages, "json")
    content = await asyncio.to_thread(body)
    return Response(content, media_type="application/json", headers=headers)


class _Frames:
    """The images of an animation, finished one by one, until nobody waits for them any more."""

    def __init__(self, plan: Plan, images: Sequence[Image]) -> None:
        self._plan, self._images = plan, images
        self._stopped = False

    def __iter__(self) -> Iterator[Image]:
        for image in self._images:
            if self._stopped:
                raise DeadlineExceeded("nobody waits for the animation any more")
            yield self._plan.result(image)

    def stop(self) -> None:
        """Let the thread that encodes the animation end at its next frame."""
        self._stopped = True


@dataclass(frozen=True, slots=True)
class NativeStream:
    """A native request as events: queue position, start, previews, frames, the JSON answer.

    A preview is the answer if the denoiser stopped there: composited and cropped like the answer.

    Attributes:
        format: of the images' files.
        quality: of JPEG and WebP.
        links: stores the images, whose URLs are then sent in place of the files.
    """

    request: Request
    plan: Plan
    format: Format
    quality: int
    links: ImageLinks | None = None

    async def run(self, emit: Emit) -> None:
        """Run the plan's job and emit its events. Raises EngineError."""
        hooks = Hooks(
            on_admitted=lambda forecast: emit(self._queued(forecast)),
            on_started=lambda: emit(self._started()),
            on_preview=lambda preview: emit(
                DeferredEvent(lambda: self._preview(preview), preview.image.index)
            ),
            on_drawn=lambda drawn: emit(DeferredEvent(lambda: self._image(drawn))),
        )
        finished = await app_state(self.request).engine.run(self.plan.job, hooks)
        emit(await self._completed(finished))

    @property
    def _id(self) -> str:
        return request_state(self.request).id

    def _queued(self, forecast: Forecast) -> Event:
        predicted_s = round(forecast.seconds, 3)
        data = {"id": self._id, "position": forecast.position, "predicted_s": predicted_s}
        return Event("queued", data)

    def _started(self) -> Event:
        return Event("started", {"id": self._id, "steps": self.plan.job.steps})

    def _preview(self, preview: Preview) -> Event:
        # Clients do not keep previews; a JPEG takes at most 1/12 of a PNG's time and 1/6 of its
        # bytes: docs/log.md.
        format: Format = "jpeg" if self.format == "png" else self.format
        marking = app_state(self.request).marker.of_preview(self.plan.operation)
        image = self.plan.preview(preview.image)
        content = encode(image, format, self.quality, {}, marking=marking)
        data = {
            "index": preview.image.index,
            "step": preview.step,
            "of": self.plan.job.steps,
            "b64_json": base64.b64encode(content).decode(),
            "width": self.plan.size[0],
            "height": self.plan.size[1],
            "format": format,
        }
        return Event("preview", data)

    def _image(self, drawn: Drawn) -> Event:
        began = time.perf_counter()
        state, plan = app_state(self.request), self.plan
        index = drawn.image.index
        parameters = plan.parameters(drawn.truncated, index)
        marking = state.marker.of(plan.operation)
        content = encode(
            plan.result(drawn.image), self.format, self.quality, parameters, marking=marking
        )
        record_images(state, plan, 1, began)
        (entry,) = image_entries(plan, [content], self.format, self.links, index)["images"]
        return Event("image", {"index": index, **entry})

    async def _completed(self, finished: Finished) -> DeferredEvent:
        """Return the JSON answer; without its images if those were sent early."""
        state, plan = app_state(self.request), self.plan
        if plan.job.early:
            stages = asdict(finished.timings)
            return DeferredEvent(
                lambda: Event("completed", answer_fields(self.request, plan, finished, stages))
            )
        async with until_deadline(plan):
            contents, seconds = await encode_all(state, plan, finished, self.format, self.quality)
        stages = stage_seconds(finished, seconds)
        fields = answer_fields(self.request, plan, finished, stages)
        return DeferredEvent(
            lambda: Event(
                "completed", fields | image_entries(plan, contents, self.format, self.links)
            )
        )


# ── parts ─────────────────────────────────────────────────────────────────────────────────────────


def image_entries(
    plan: Plan,
    contents: Sequence[bytes],
    format: Format,
    links: ImageLinks | None = None,
    first: int = 0,
) -> dict[str, Any]:
    """Return the files as JSON, in the order of their seeds.

    Args:
        plan: of the request.
        contents: the files.
        format: of the files.
        links: stores the files, whose URLs are then part of the JSON in their place.
        first: the request's index of the first file.

    Raises:
        ApiError: 422, too large for the store.
    """
    forms = file_or_url(plan, contents, format, links, first)
    entries = [
        {
            **form,
            "seed": plan.job.seeds[index],
            "width": plan.answer_size[0],
            "height": plan.answer_size[1],
            "format": format,
        }
        for index, form in enumerate(forms, first)
    ]
    return {"images": entries}


def file_or_url(
    plan: Plan,
    contents: Sequence[bytes],
    format: Format,
    links: ImageLinks | None,
    first: int = 0,
) -> list[dict[str, str]]:
    """Return a file each as `b64_json`, or with `links` as `url`; as `image_entries`."""
    if links is None:
        return [{"b64_json": base64.b64encode(content).decode()} for content in contents]
    images = [
        StoredImage(content, format, file_name(plan, index))
        for index, content in enumerate(contents, first)
    ]
    return [{"url": url} for url in links.publish(images)]


def image_links(request: Request) -> ImageLinks:
    """Return the links of a request for URLs. Raises ApiError 400: none are possible."""
    store = app_state(request).url_store
    store.check_enabled()
    return ImageLinks(store, owner_of(request), base_url(request))


def file_name(plan: Plan, index: int) -> str:
    """Return a name without an extension for clients that save the image `index`."""
    frame = f"-{index}" if plan.job.keyframes else ""
    return f"{plan.operation}-{plan.job.seeds[index]}{frame}"


def answer_fields(
    request: Request, plan: Plan, finished: Finished, stages: dict[str, float]
) -> dict[str, Any]:
    """Return the JSON answer without its images. stages: seconds."""
    return {
        "id": request_state(request).id,
        "created": int(time.time()),
        "model": plan.job.model,
        "parameters": plan.shared_parameters(finished.truncated),
        "timings": stages,
    }


async def encode_all(
    state: AppState,
    plan: Plan,
    finished: Finished,
    format: Format,
    quality: int,
    text_of: Callable[[dict[str, Any]], str] | None = None,
) -> tuple[list[bytes], float]:
    """Return the job's images as files, in the order of its seeds, and the seconds spent.

    text_of: makes the text of a PNG from an image's parameters, in place of their JSON.
    """
    marking = state.marker.of(plan.operation)

    def make(image: Image) -> bytes:
        parameters = plan.parameters(finished.truncated, image.index)
        text = text_of(parameters) if text_of else None
        return encode(plan.result(image), format, quality, parameters, text, marking)

    began = time.perf_counter()
    large = state.decoder.run_large if plan.restoration else None
    # In the encoder's queue, an image counts as so many of the largest ordinary size.
    units = math.ceil(math.prod(plan.size) / state.settings.max_side**2)
    work = (
        state.encoder.run(partial(make, image), units, elsewhere=large)
        for image in _ordered(finished)
    )
    contents = await asyncio.gather(*work)
    return list(contents), record_images(state, plan, len(contents), began)


def record_images(state: AppState, plan: Plan, count: int, began: float) -> float:
    """Count encoded images and observe the seconds since `began`; return the seconds."""
    seconds = time.perf_counter() - began
    state.metrics.image_encode_duration.observe(seconds)
    state.metrics.images.labels(f"/{plan.operation}").inc(count)
    state.metrics.preset_images.labels(plan.job.model, plan.job.sampling.preset).inc(count)
    if state.tracing:
        state.tracing.record_image(seconds, count)
    return seconds


def stage_seconds(finished: Finished, image_seconds: float) -> dict[str, float]:
    """Return the seconds of every stage, image encoding included."""
    return {**asdict(finished.timings), "image": image_seconds}


def answer_headers(
    plan: Plan, finished: Finished, stages: dict[str, float], extension: str
) -> dict[str, str]:
    """Return the headers of an answer with images.

    Args:
        plan: of the request.
        finished: its result.
        stages: seconds.
        extension: of the name under which clients save the answer.
    """
    timing = ", ".join(f"{name};dur={seconds * 1000:.2f}" for name, seconds in stages.items())
    seed = plan.job.seeds[0]
    headers = {
        "X-Seed": str(seed),
        "X-Preset": plan.job.sampling.preset,
        "X-Renoise-Order": plan.job.sampling.renoise_order,
        "X-Model-Sha256": plan.job.model_sha256,
        "Server-Timing": timing,
        "Content-Disposition": f'inline; filename="{plan.operation}-{seed}.{extension}"',
    }
    if plan.prompt_read is not None:
        headers["X-Prompt-Read"] = quote(plan.prompt_read[:_PROMPT_READ], safe=" ,'.-")
    if finished.truncated:
        headers["X-Prompt-Truncated"] = ", ".join(finished.truncated)
    return headers


def _ordered(finished: Finished) -> list[Image]:
    return sorted(finished.images, key=lambda image: image.index)
