"""OpenTelemetry spans of requests and of their stages, exported by OTLP over HTTP.

Imported only with `PAELLERA_TRACING=true`; needs the extra `otel`. Runs in the API process alone:
the workers' timings travel in `Finished`. docs/observability.md lists the spans.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from itertools import pairwise

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.engine.errors import DeadlineUnreachable, EngineError, QueueFull
from server.engine.hooks import NO_HOOKS, Hooks
from server.engine.interface import Engine
from server.engine.job import Job
from server.engine.messages import Finished
from server.engine.supervisor import WorkerStatus

log = logging.getLogger(__name__)

# The only values of these variables; others are warned of.
SUPPORTED = {
    "OTEL_TRACES_EXPORTER": "otlp",
    "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
    "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",
}
# Key of a traced request's trace id in its ASGI scope, for the access log.
TRACE_ID = "paellera.trace_id"
# A collector that does not answer delays the end of the process by this much at most.
FLUSH_TIMEOUT_S = 3
SERVER_ERROR = 500
# Not the server's failures.
REJECTIONS = (QueueFull, DeadlineUnreachable)
MAX_PATH_LENGTH = 200

# Returns attributes of an answered request.
DescribeRequest = Callable[[Scope], Mapping[str, str | None]]

_propagator = TraceContextTextMapPropagator()


class Tracing:
    """Makes the spans of one app.

    Endpoint, sampler, batches and resource are those of OpenTelemetry's `OTEL_*` variables. An
    exporter that fails loses spans and logs it; requests do not wait for it.
    """

    def __init__(self, processor: SpanProcessor | None = None) -> None:
        """Create the spans' provider. processor: default: batches to an OTLP collector."""
        # Otherwise Python prints the exporter's failures as plain text.
        logger = logging.getLogger("opentelemetry")
        logger.handlers, logger.propagate = [*logging.getLogger("server").handlers], False
        defaults = {"service.name": "paellera", "service.version": version("paellera")}
        resource = Resource.create(defaults).merge(OTELResourceDetector().detect())
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        if processor := processor or _exporting_processor():
            self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("paellera", version("paellera"))

    def middleware(
        self, app: ASGIApp, untraced: Collection[str], describe: DescribeRequest
    ) -> ASGIApp:
        """Return the app with spans of its requests. untraced: paths of probes and metrics."""
        return TracedRequests(app, self, untraced, describe)

    def engine(self, engine: Engine) -> Engine:
        """Return the engine with spans of the stages of traced requests' jobs."""
        return TracedEngine(engine, self)

    @contextmanager
    def request(self, method: str, headers: Headers) -> Iterator[Span]:
        """Make a request's span current. Its parent is the one of the header `traceparent`."""
        # A repeated header is ambiguous.
        sent = {name: headers.getlist(name) for name in ("traceparent", "tracestate")}
        carrier = sent if len(sent["traceparent"]) == 1 else {}
        with self._tracer.start_as_current_span(
            method,
            _propagator.extract(carrier),
            SpanKind.SERVER,
            record_exception=True,
            set_status_on_exception=True,
        ) as span:
            yield span

    def record_image(self, seconds: float, count: int) -> None:
        """Record that `count` images were encoded as files in the last `seconds`."""
        now = time.time_ns()
        self._record("image", now - _ns(seconds), now, {"paellera.images": count})

    def record_stages(self, arrived_at: int, finished: Finished) -> None:
        """Record a finished job's stages, one after the other, and the steps as events.

        arrived_at: Unix time of the job's arrival, nanoseconds.
        """
        seconds = asdict(finished.timings)
        ends = [arrived_at]
        for each in seconds.values():
            ends.append(ends[-1] + _ns(each))
        first_encode = ends[1]
        for name, (began, ended) in zip(seconds, pairwise(ends), strict=True):
            steps = finished.step_seconds if name == "denoise" else ()
            events = [first_encode + _ns(step) for step in steps]
            self._record(name, began, ended, {}, events)

    def _record(
        self,
        name: str,
        began: int,
        ended: int,
        attributes: Mapping[str, int],
        steps: list[int] | None = None,
    ) -> None:
        span = self._tracer.start_span(name, attributes=attributes, start_time=began)
        for number, at in enumerate(steps or (), 1):
            span.add_event("step", {"paellera.step": number}, at)
        span.end(ended)

    async def stop(self) -> None:
        """Export the remaining spans; wait for it `FLUSH_TIMEOUT_S` at most."""
        # The thread may outlive the timeout and must not keep the process alive.
        flushing = threading.Thread(target=self._provider.shutdown, daemon=True)
        flushing.start()
        await asyncio.to_thread(flushing.join, FLUSH_TIMEOUT_S)


class TracedRequests:
    """ASGI middleware that makes each request's span; answers have a header `traceresponse`."""

    def __init__(
        self,
        app: ASGIApp,
        tracing: Tracing,
        untraced: Collection[str],
        describe: DescribeRequest,
    ) -> None:
        """Wrap an app. untraced: paths."""
        self._app, self._tracing = app, tracing
        self._untraced, self._describe = untraced, describe

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Trace one request."""
        if scope["type"] != "http" or scope["path"] in self._untraced:
            await self._app(scope, receive, send)
            return
        status = None

        async def send_with_context(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if context := current_context():
                    MutableHeaders(scope=message)["traceresponse"] = context
            await send(message)

        with self._tracing.request(scope["method"], Headers(scope=scope)) as span:
            if (context := span.get_span_context()).is_valid:
                scope[TRACE_ID] = trace.format_trace_id(context.trace_id)
            try:
                await self._app(scope, receive, send_with_context)
            finally:
                self._finish(span, scope, status)

    def _finish(self, span: Span, scope: Scope, status: int | None) -> None:
        if not span.is_recording():
            return
        if route := getattr(scope.get("route"), "path_format", None):
            span.update_name(f"{scope['method']} {route}")
        attributes = {
            "http.request.method": scope["method"],
            "http.route": route,
            "url.path": scope["path"][:MAX_PATH_LENGTH],
            "http.response.status_code": status,
            **self._describe(scope),
        }
        span.set_attributes({name: value for name, value in attributes.items() if value})
        if status is not None and status >= SERVER_ERROR:
            span.set_status(StatusCode.ERROR)


@dataclass(frozen=True, slots=True)
class TracedEngine:
    """An engine whose jobs of traced requests have spans."""

    engine: Engine
    tracing: Tracing

    async def start(self) -> None:
        """Start the workers; return before they are ready."""
        await self.engine.start()

    async def stop(self) -> None:
        """Drain, then stop the workers."""
        await self.engine.stop()

    def status(self) -> WorkerStatus:
        """Return whether a job sent now would be started, and if not, why."""
        return self.engine.status()

    def check_room(self, rows: int) -> None:
        """Raise QueueFull or Draining if a job of so many images would be rejected now."""
        self.engine.check_room(rows)

    async def run(self, job: Job, hooks: Hooks = NO_HOOKS) -> Finished:
        """Run a job; record the stages of a traced request's."""
        request = trace.get_current_span()
        if not request.is_recording():
            return await self.engine.run(job, hooks)
        request.set_attributes(_job_attributes(job))
        arrived_at = time.time_ns()
        try:
            finished = await self.engine.run(replace(job, traceparent=current_context()), hooks)
        except EngineError as error:
            # A stream has sent its status already.
            request.set_attribute("error.type", type(error).__name__)
            if not isinstance(error, REJECTIONS):
                request.set_status(StatusCode.ERROR)
            raise
        except asyncio.CancelledError:
            request.add_event("cancelled")
            raise
        self.tracing.record_stages(arrived_at, finished)
        return finished


def _exporting_processor() -> SpanProcessor | None:
    """Return what exports by OTLP over HTTP, None with `OTEL_TRACES_EXPORTER=none`."""
    if os.environ.get("OTEL_TRACES_EXPORTER", "").strip().lower() == "none":
        return None
    for variable, supported in SUPPORTED.items():
        value = os.environ.get(variable, "").strip()
        if value and value.lower() != supported:
            fields = {"variable": variable, "value": value[:80], "used": supported}
            log.warning("tracing variable ignored", extra={"fields": fields})
    return BatchSpanProcessor(OTLPSpanExporter())


def current_context() -> str:
    """Return the current span as the value of a header `traceparent`, "" if it is invalid."""
    carrier: dict[str, str] = {}
    _propagator.inject(carrier)
    return carrier.get("traceparent", "")


def _job_attributes(job: Job) -> dict[str, str | int]:
    # No prompts: they belong to the clients, and traces leave this machine.
    return {
        "paellera.job": job.id,
        "paellera.model": job.model,
        "paellera.images": len(job.seeds),
        "paellera.size": "{}x{}".format(*job.drawn_size),
        "paellera.steps": job.sampling.steps,
        "paellera.priority": job.priority,
    }


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)
