"""A request leaves one span per stage, under the caller's; without tracing nothing is loaded."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from load_tests.serving import free_port, wait_until_ready
from server.api import create_app
from server.settings import Settings
from server.tracing import Tracing
from tests import fake_worker
from tests.conftest import serving, wait_until

STAGES = ["queue", "encode", "prior", "denoise", "decode", "image"]
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SAMPLED, UNSAMPLED = f"00-{TRACE}-{PARENT}-01", f"00-{TRACE}-{PARENT}-00"
PATIENCE_S = 60
MS = 1_000_000

pytestmark = pytest.mark.process


@dataclass
class Traced:
    """A server whose spans are kept in memory."""

    client: httpx.Client
    exporter: InMemorySpanExporter

    def generate(self, prompt: str = "a ball", **more: object) -> httpx.Response:
        headers = more.pop("headers", {})
        return self.client.post("/generate", json={"prompt": prompt, **more}, headers=headers)

    def spans(self) -> dict[str, ReadableSpan]:
        """The spans of the only finished request, by name; `""` is the request's."""
        wait_until(lambda: any(self.is_request(s) for s in self.exporter.get_finished_spans()))
        spans = self.exporter.get_finished_spans()
        return {"" if self.is_request(span) else span.name: span for span in spans}

    @staticmethod
    def is_request(span: ReadableSpan) -> bool:
        return span.kind is SpanKind.SERVER


@pytest.fixture(scope="module")
def server(fake_settings: Callable[..., Settings]) -> Iterator[Traced]:
    exporter = InMemorySpanExporter()
    tracing = Tracing(SimpleSpanProcessor(exporter))
    app = create_app(fake_settings(), worker=fake_worker.main, tracing=tracing)
    with serving(app) as address, httpx.Client(base_url=address, timeout=PATIENCE_S) as client:
        wait_until(lambda: client.get("/readyz").status_code == 200)
        yield Traced(client, exporter)


@pytest.fixture
def traced(server: Traced) -> Traced:
    server.exporter.clear()
    return server


def test_every_stage_is_a_child_of_the_request_s_span_one_after_the_other(traced: Traced) -> None:
    assert traced.generate().status_code == 200
    spans = traced.spans()
    request = spans.pop("")
    assert sorted(spans) == sorted(STAGES)
    assert {span.parent.span_id for span in spans.values()} == {request.context.span_id}
    assert {span.context.trace_id for span in spans.values()} == {request.context.trace_id}
    stages = [spans[name] for name in STAGES]
    for earlier, later in pairwise(stages[:-1]):
        assert earlier.end_time == later.start_time
    assert request.start_time <= stages[0].start_time
    assert stages[-1].end_time <= request.end_time
    # As the fake worker says.
    lengths = [span.end_time - span.start_time for span in stages[1:-1]]
    assert lengths == [2 * MS, 3 * MS, 4 * MS, 5 * MS]


def test_steps_are_events_of_the_denoiser_s_span(traced: Traced) -> None:
    traced.generate()
    denoise = traced.spans()["denoise"]
    assert [(event.name, event.attributes["paellera.step"]) for event in denoise.events] == [
        ("step", 1),
        ("step", 2),
    ]
    # 6 and 9 ms after the first encode; the denoiser's own span begins 5 ms after it.
    offsets = [event.timestamp - denoise.start_time for event in denoise.events]
    assert offsets == [1 * MS, 4 * MS]


def test_the_request_s_span_says_what_was_asked_and_no_prompt(traced: Traced) -> None:
    traced.generate("a secret ball", n=2, headers={"X-Request-Id": "mine"})
    request = traced.spans()[""]
    assert request.name == "POST /generate"
    expected = {
        "http.request.method": "POST",
        "http.route": "/generate",
        "http.response.status_code": 200,
        "paellera.request_id": "mine",
        "paellera.images": 2,
    }
    assert expected.items() <= dict(request.attributes).items()
    assert "secret" not in str(dict(request.attributes))


def test_traceparent_is_the_parent_and_the_answer_names_the_span(traced: Traced) -> None:
    answer = traced.generate(headers={"traceparent": SAMPLED, "tracestate": "vendor=1"})
    request = traced.spans()[""]
    assert f"{request.context.trace_id:032x}" == TRACE
    assert f"{request.parent.span_id:016x}" == PARENT
    assert request.context.trace_state["vendor"] == "1"
    span_id = f"{request.context.span_id:016x}"
    assert answer.headers["traceresponse"] == f"00-{TRACE}-{span_id}-01"


def test_an_unsampled_caller_s_request_leaves_no_span(traced: Traced) -> None:
    answer = traced.generate(headers={"traceparent": UNSAMPLED})
    assert answer.status_code == 200
    assert answer.headers["traceresponse"].startswith(f"00-{TRACE}-")
    assert not traced.exporter.get_finished_spans()


@pytest.mark.parametrize(
    "headers",
    [
        [("traceparent", "nonsense")],
        [("traceparent", f"00-{'0' * 32}-{PARENT}-01")],
        [("traceparent", SAMPLED), ("traceparent", SAMPLED)],
    ],
)
def test_an_invalid_traceparent_begins_a_trace_of_its_own(
    traced: Traced, headers: list[tuple[str, str]]
) -> None:
    assert traced.generate(headers=headers).status_code == 200
    request = traced.spans()[""]
    assert request.parent is None
    assert f"{request.context.trace_id:032x}" != TRACE


def test_requests_are_answered_without_spans_while_the_sdk_is_disabled(
    fake_settings: Callable[..., Settings],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    exporter = InMemorySpanExporter()
    tracing = Tracing(SimpleSpanProcessor(exporter))
    app = create_app(fake_settings(), worker=fake_worker.main, tracing=tracing)
    with serving(app) as address, httpx.Client(base_url=address, timeout=PATIENCE_S) as client:
        wait_until(lambda: client.get("/readyz").status_code == 200)
        with caplog.at_level(logging.INFO, logger="server"):
            answer = client.post("/generate", json={"prompt": "a ball"})
    assert answer.status_code == 200, answer.text
    assert "traceresponse" not in answer.headers
    logged = [record.fields for record in caplog.records if record.msg == "request"]
    assert "trace_id" not in logged[-1]
    assert not exporter.get_finished_spans()


def test_a_stream_s_span_lasts_until_its_last_event(traced: Traced) -> None:
    answer = traced.generate(stream=True, headers={"Accept": "application/json"})
    assert "event: completed" in answer.text
    spans = traced.spans()
    assert sorted(spans) == sorted(["", *STAGES])
    assert spans["image"].parent.span_id == spans[""].context.span_id
    assert spans["image"].end_time <= spans[""].end_time


@pytest.mark.parametrize("stream", [False, True])
def test_a_failed_job_marks_the_span_also_behind_a_stream_s_200(
    traced: Traced, stream: bool
) -> None:
    traced.generate("fail", stream=stream)
    request = traced.spans()[""]
    assert request.status.status_code is StatusCode.ERROR
    assert request.attributes["error.type"]


def test_an_invalid_request_is_no_failure_of_the_server(traced: Traced) -> None:
    assert traced.generate(steps="many").status_code == 422
    request = traced.spans()[""]
    assert request.status.status_code is StatusCode.UNSET
    assert request.attributes["http.response.status_code"] == 422


def test_a_server_that_stops_has_its_last_spans_exported(
    fake_settings: Callable[..., Settings],
) -> None:
    exporter = InMemorySpanExporter()
    processor = BatchSpanProcessor(exporter, schedule_delay_millis=3_600_000)
    app = create_app(fake_settings(), worker=fake_worker.main, tracing=Tracing(processor))
    with serving(app) as address, httpx.Client(base_url=address, timeout=PATIENCE_S) as client:
        wait_until(lambda: client.get("/readyz").status_code == 200)
        client.post("/generate", json={"prompt": "a ball"}).raise_for_status()
        assert exporter.get_finished_spans() == ()
    assert any(Traced.is_request(span) for span in exporter.get_finished_spans())


def test_probes_leave_no_span(traced: Traced) -> None:
    assert traced.client.get("/readyz").status_code == 200
    assert traced.client.get("/metrics").status_code == 200
    assert not traced.exporter.get_finished_spans()


# ── in a process of its own ───────────────────────────────────────────────────────────────────────


@dataclass
class Collector:
    """An OTLP endpoint. received: the spans' names, and the resources' attributes."""

    endpoint: str = ""
    names: list[str] = field(default_factory=list)
    resource: dict[str, str] = field(default_factory=dict)

    def take(self, body: bytes) -> None:
        for each in ExportTraceServiceRequest.FromString(body).resource_spans:
            self.resource |= {a.key: a.value.string_value for a in each.resource.attributes}
            self.names += [span.name for scope in each.scope_spans for span in scope.spans]


@contextmanager
def collecting() -> Iterator[Collector]:
    collector = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.path == "/v1/traces":
                collector.take(body)
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        collector.endpoint = f"http://127.0.0.1:{http.server_port}"
        try:
            yield collector
        finally:
            http.shutdown()
            thread.join()


@contextmanager
def process(bundle: Path, log: Path, **environment: str) -> Iterator[tuple[subprocess.Popen, str]]:
    port = free_port()
    command = [sys.executable, "-m", "tests.fake_server", "--port", str(port)]
    variables = {**os.environ, "PAELLERA_WEIGHTS": str(bundle), **environment}
    with (
        log.open("w") as stderr,
        subprocess.Popen(command, env=variables, stderr=stderr) as server,
    ):
        try:
            wait_until_ready(server, f"http://127.0.0.1:{port}/readyz")
            yield server, f"http://127.0.0.1:{port}"
        finally:
            server.kill()


def traced_answer(
    bundle: Path, log: Path, collector: Collector, **environment: str
) -> httpx.Response:
    """Return an answer of a server that exports to the collector, once the server has stopped."""
    variables = {"PAELLERA_TRACING": "true", "OTEL_EXPORTER_OTLP_ENDPOINT": collector.endpoint}
    with process(bundle, log, **variables, **environment) as (server, address):
        answer = httpx.post(f"{address}/generate", json={"prompt": "a"}, timeout=PATIENCE_S)
        server.send_signal(signal.SIGTERM)
        assert server.wait(PATIENCE_S) == 0
    return answer


def test_spans_arrive_at_an_otlp_collector_at_the_latest_when_the_server_stops(
    bundle: Path, tmp_path: Path
) -> None:
    with collecting() as collector:
        answer = traced_answer(bundle, tmp_path / "log", collector, OTEL_SERVICE_NAME="pictures")
    assert sorted(collector.names) == sorted(["POST /generate", *STAGES])
    assert collector.resource["service.name"] == "pictures"
    trace_id = answer.headers["traceresponse"].split("-")[1]
    assert f'"trace_id": "{trace_id}"' in (tmp_path / "log").read_text()


def test_a_collector_that_is_away_costs_neither_answers_nor_the_end_of_the_process(
    bundle: Path, tmp_path: Path
) -> None:
    environment = {
        "PAELLERA_TRACING": "true",
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{free_port()}",
        "OTEL_BSP_SCHEDULE_DELAY": "100",
    }
    with process(bundle, tmp_path / "log", **environment) as (server, address):
        answer = httpx.post(f"{address}/generate", json={"prompt": "a"}, timeout=PATIENCE_S)
        assert answer.status_code == 200
        server.send_signal(signal.SIGTERM)
        began = time.monotonic()
        assert server.wait(PATIENCE_S) == 0
        # FLUSH_TIMEOUT_S, on a machine that is busy with everything else.
        assert time.monotonic() - began < 20
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert lines[0]["message"] == "server starting"
    assert any(line["logger"].startswith("opentelemetry") for line in lines)


def test_without_the_setting_the_server_loads_nothing_of_it(bundle: Path) -> None:
    code = (
        "import sys; from server.api import create_app; create_app();"
        "loaded = [name for name in sys.modules if name.startswith(('opentelemetry.sdk',"
        " 'opentelemetry.exporter', 'google.protobuf'))]; sys.exit(str(loaded) if loaded else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PAELLERA_WEIGHTS": str(bundle)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_with_the_exporter_none_nothing_is_sent_and_answers_still_have_a_trace_id(
    bundle: Path, tmp_path: Path
) -> None:
    with collecting() as collector:
        answer = traced_answer(bundle, tmp_path / "log", collector, OTEL_TRACES_EXPORTER="none")
    assert list(collector.names) == []
    assert answer.headers["traceresponse"]


@pytest.mark.parametrize(
    ("variable", "value", "warned"),
    [
        ("OTEL_TRACES_EXPORTER", "otlp", False),
        ("OTEL_TRACES_EXPORTER", "console", True),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf", False),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc", True),
        ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "grpc", True),
    ],
)
async def test_exporters_and_protocols_that_are_not_supported_are_warned_of_once(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    variable: str,
    value: str,
    warned: bool,
) -> None:
    monkeypatch.setenv(variable, value)
    await Tracing().stop()
    lines = [line for line in caplog.records if line.msg == "tracing variable ignored"]
    assert [line.__dict__["fields"]["variable"] for line in lines] == [variable] * warned


@pytest.mark.parametrize(
    "module",
    ["server.cli.main", "server.api", "server.uvicorn_server", "server.engine.worker_process"],
)
def test_propagators_that_are_not_installed_are_ignored(module: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"import {module}, fastapi"],
        env={**os.environ, "OTEL_PROPAGATORS": "tracecontext,baggage,b3"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_without_the_extra_the_error_says_what_to_install(
    fake_settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert find_spec("opentelemetry.sdk")
    monkeypatch.setitem(sys.modules, "server.tracing", None)
    with pytest.raises(ValueError, match=r"pip install 'paellera\[otel\]'"):
        create_app(fake_settings(tracing=True), worker=fake_worker.main)
