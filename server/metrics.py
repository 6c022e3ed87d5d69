"""Every figure the server measures, under the names of the HTTP contract. One registry per app; nothing global.

python -m server.metrics > docs/metrics.md
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from server.engine.messages import Beat, Timings, Usage

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.65, 0.8, 1, 2, 5, 10, 30)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128)
RATIOS = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1)
# Characters of names and values together, by the OpenMetrics specification.
LONGEST_EXEMPLAR = 128
# The error codes of requests refused for lack of room, time or a worker, and for their key. Others appear when they first occur.
REFUSALS = ("queue_full", "deadline_unreachable", "starting", "worker_lost", "draining")
LIMITS = ("rate_limit_exceeded", "concurrency_exceeded", "invalid_api_key")


@dataclass(frozen=True, slots=True)
class Figure:
    """A line of docs/metrics.md."""

    name: str
    kind: str
    labels: tuple[str, ...]
    meaning: str


@dataclass(frozen=True, slots=True)
class WorkerState:
    """Of one worker, now. silent_s: since it was last heard, while it owes an answer. usage: None until it is heard."""

    ready: bool
    silent_s: float
    usage: Usage | None


WORKERS = (
    Figure("paella_worker_ready", "gauge", ("worker",), "1 while the worker takes jobs, 0 while it starts or is replaced"),
    Figure("paella_worker_silent_seconds", "gauge", ("worker",), "Since the worker was last heard, while it owes an answer; otherwise 0"),
    Figure("paella_worker_resident_memory_bytes", "gauge", ("worker",), "Resident memory of the worker's process"),
    Figure("paella_worker_cpu_seconds_total", "counter", ("worker",), "Processor time of the worker's process, all its threads"),
    Figure("paella_worker_threads", "gauge", ("worker",), "Threads that compute its steps just now; on a CPU with busy neighbours fewer"),
    Figure("paella_gpu_memory_bytes", "gauge", ("worker", "kind"), "On CUDA: allocated by tensors, reserved by torch, total of the device"),
)


class Workers(Collector):
    """What the workers say of their processes, read when it is asked for: nothing is left of one that is gone."""

    def __init__(self, read: Callable[[], Sequence[WorkerState]]) -> None:
        self._read = read

    def collect(self) -> Iterable[GaugeMetricFamily | CounterMetricFamily]:
        states = {str(number): state for number, state in enumerate(self._read())}
        heard = {worker: state.usage for worker, state in states.items() if state.usage}
        samples: tuple[Mapping[tuple[str, ...], float], ...] = (
            {(worker,): state.ready for worker, state in states.items()},
            {(worker,): state.silent_s for worker, state in states.items()},
            {(worker,): usage.resident_bytes for worker, usage in heard.items()},
            {(worker,): usage.cpu_seconds for worker, usage in heard.items()},
            {(worker,): usage.threads for worker, usage in heard.items()},
            {(worker, kind): size for worker, usage in heard.items() for kind, size in usage.device_bytes.items()},
        )
        for figure, values in zip(WORKERS, samples, strict=True):
            made = GaugeMetricFamily if figure.kind == "gauge" else CounterMetricFamily
            family = made(figure.name, figure.meaning, labels=figure.labels)
            for labels, value in values.items():
                family.add_metric(labels, value)
            yield family


class Metrics:
    """The collectors, one attribute each. figures: what there is, in order. endpoints: those that are there from the start."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.figures: list[Figure] = []
        self.endpoints: frozenset[str] = frozenset()
        ProcessCollector(registry=self.registry)
        self.request_duration = self._seconds(
            "request_duration", "From the request's headers to the answer's last byte", "endpoint", "status"
        )
        self.queue_duration = self._seconds("queue_duration", "From arrival to the first encode, waiting for a worker included")
        self.encode_duration = self._seconds("encode_duration", "Text encoders, per request")
        self.prior_duration = self._seconds("prior_duration", "Prior, per request")
        self.denoise_duration = self._seconds("denoise_duration", "All steps of a request, waits for other rows' turns included")
        self.step_duration = self._seconds("step_duration", "One denoiser step of one batch")
        self.decode_duration = self._seconds("decode_duration", "Tokens to pixels, per request")
        self.image_encode_duration = self._seconds("image_encode_duration", "Pixels to PNG, JPEG or WebP, per request")
        self.step_rows = self._histogram("step_rows", "Rows per denoiser step", ROWS)
        self.batch_fill_ratio = self._histogram("batch_fill_ratio", "Rows per denoiser step over max_batch_rows", RATIOS)
        self.queue_depth = self._gauge("queue_depth", "Rows admitted and not yet stepping")
        self.rows_running = self._gauge("rows_running", "Rows being stepped")
        self.images = self._counter("images", "Pictures answered, by native endpoint", "endpoint")
        self.rejected = self._counter("rejected", "Requests refused, by error code; probes of /readyz are none", "reason")
        self.cancelled = self._counter("cancelled", "Requests whose client went away", "stage")
        self.cancel_duration = self._seconds("cancel_duration", "From a cancellation until none of the request's rows is stepped any more")
        self.requests_replayed = self._counter("requests_replayed", "Requests begun again because their worker was lost")
        self.worker_restarts = self._counter("worker_restarts", "Workers started to replace one that died or stalled")
        self.prompt_cache_bytes = self._gauge("prompt_cache_bytes", "Bytes of encoded prompts and drawn priors that the workers remember")
        # What workers count, by the names they give it.
        self.counts = {
            "prompt_cache_hits": self._counter("prompt_cache_hits", "Encoded texts and drawn priors that were remembered", "what"),
            "prompt_cache_misses": self._counter("prompt_cache_misses", "Texts that were encoded and priors that were drawn", "what"),
            "graph_captures": self._counter("graph_captures", "CUDA graphs recorded", "after_ready"),
            "graph_replays": self._counter("graph_replays", "CUDA graphs replayed"),
            "graph_eager_steps": self._counter("graph_eager_steps", "Denoiser steps on CUDA that no graph fitted"),
        }
        self.weights_info = self._gauge("weights_info", "Always 1; the labels say which weights are served", "model", "sha256")
        self._begin_at_zero()

    def expect(self, own: Sequence[str], others: Sequence[str] = ()) -> None:
        """Endpoints that draw: their figures are there, at 0, before the first request, so that a rate sees it.

        own: the native ones, under which pictures are counted whoever asked for them.
        """
        self.endpoints = frozenset((*own, *others))
        for endpoint in own:
            self.images.labels(endpoint)
        for endpoint in (*own, *others):
            self.request_duration.labels(endpoint, 200)

    def watch(self, read: Callable[[], Sequence[WorkerState]]) -> None:
        """read: what the workers' figures are whenever somebody asks."""
        self.registry.register(Workers(read))

    def record_request(self, endpoint: str, status: int, seconds: float, request_id: str) -> None:
        """The id becomes the exemplar of its bucket, unless it is longer than exemplars may be."""
        exemplar = {"request_id": request_id} if len(request_id) <= LONGEST_EXEMPLAR - len("request_id") else None
        self.request_duration.labels(endpoint, status).observe(seconds, exemplar)

    def record_timings(self, timings: Timings) -> None:
        self.queue_duration.observe(timings.queue)
        self.encode_duration.observe(timings.encode)
        self.prior_duration.observe(timings.prior)
        self.denoise_duration.observe(timings.denoise)
        self.decode_duration.observe(timings.decode)

    def record_beat(self, beat: Beat, max_rows: int) -> None:
        for step in beat.steps:
            self.step_rows.observe(step.rows)
            self.batch_fill_ratio.observe(step.rows / max_rows)
            self.step_duration.observe(step.seconds)
        for (name, label), count in beat.counts.items():
            counter = self.counts[name]
            (counter.labels(label) if label else counter).inc(count)

    def render(self, accept: str = "") -> tuple[bytes, str]:
        """The exposition and its media type: OpenMetrics, which has exemplars, for who accepts it, otherwise Prometheus' own text."""
        encode, media_type = choose_encoder(accept)
        return encode(self.registry), media_type

    def _begin_at_zero(self) -> None:
        for counter, values in {
            self.rejected: (*REFUSALS, *LIMITS),
            self.cancelled: ("queue", "worker"),
            self.counts["prompt_cache_hits"]: ("text", "picture", "prior"),
            self.counts["prompt_cache_misses"]: ("text", "picture", "prior"),
            self.counts["graph_captures"]: ("false", "true"),
        }.items():
            for value in values:
                counter.labels(value)

    def _seconds(self, name: str, documentation: str, *labels: str) -> Histogram:
        return self._histogram(f"{name}_seconds", documentation, SECONDS, *labels)

    def _histogram(self, name: str, documentation: str, buckets: Sequence[float], *labels: str) -> Histogram:
        self.figures.append(Figure(f"paella_{name}", "histogram", labels, documentation))
        return Histogram(name, documentation, labels, namespace="paella", buckets=buckets, registry=self.registry)

    def _gauge(self, name: str, documentation: str, *labels: str) -> Gauge:
        self.figures.append(Figure(f"paella_{name}", "gauge", labels, documentation))
        return Gauge(name, documentation, labels, namespace="paella", registry=self.registry)

    def _counter(self, name: str, documentation: str, *labels: str) -> Counter:
        self.figures.append(Figure(f"paella_{name}_total", "counter", labels, documentation))
        return Counter(name, documentation, labels, namespace="paella", registry=self.registry)


HEAD = f"""\
# Metrics

What `/metrics` shows, in Prometheus' text or, for who accepts it, as OpenMetrics, where a bucket of `paella_request_duration_seconds`
names a request that fell into it. Written by `python -m server.metrics > docs/metrics.md`.

Counters, and the figures of endpoints that draw, are there at 0 from the start. Several workers are counted together, but for the figures
with a `worker`, its place in `PAELLERA_DEVICES`: those of its process are absent until it is heard, and end with it. Counters of the
server go on when a worker is replaced. What a worker counts arrives with its beats, four a second under load. `process_*` are the API
process's own.

Edges of every latency, in seconds, 0.5 among them, so that the share under 500 ms is exact:
{", ".join(f"{edge:g}" for edge in SECONDS)}.

| name | type | labels | |
|---|---|---|---|
"""


def document() -> str:
    """docs/metrics.md."""
    lines = [f"| `{f.name}` | {f.kind} | {', '.join(f.labels)} | {f.meaning} |" for f in (*Metrics().figures, *WORKERS)]
    return HEAD + "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(document(), end="")
