"""All metrics under the names of the HTTP contract. One registry per app; nothing global.

Engine messages are described by protocols, so that this module does not import the engine.

python -m server.metrics > docs/metrics.md
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from server.logs import dropped_lines

SECONDS = (
    *(0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4),
    *(0.5, 0.65, 0.8, 1, 2, 5, 10, 30),
)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128)
RATIOS = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1)
# Characters of an exemplar's names and values together, by the OpenMetrics specification.
MAX_EXEMPLAR = 128
# Error codes of requests rejected for lack of room, time or a worker, and by keys and their limits.
# Other codes appear when they first occur.
LOAD_REJECTIONS = (
    "queue_full",
    "deadline_unreachable",
    "starting",
    "worker_lost",
    "draining",
    "too_many_connections",
    "body_budget_exceeded",
)
KEY_REJECTIONS = ("rate_limit_exceeded", "concurrency_exceeded", "invalid_api_key")


# ── what the engine reports ───────────────────────────────────────────────────────────────────────


class StageTimings(Protocol):
    """Seconds per stage of one request."""

    @property
    def queue(self) -> float:
        """Waiting in the queue."""

    @property
    def encode(self) -> float:
        """Text encoders."""

    @property
    def prior(self) -> float:
        """Prior."""

    @property
    def denoise(self) -> float:
        """All denoiser steps."""

    @property
    def decode(self) -> float:
        """Tokens to pixels."""


class DenoiserStep(Protocol):
    """One denoiser step of one batch."""

    @property
    def rows(self) -> int:
        """Rows in the batch."""

    @property
    def seconds(self) -> float:
        """Duration."""


class WorkerReport(Protocol):
    """Work since the worker's last report."""

    @property
    def steps(self) -> Sequence[DenoiserStep]:
        """Denoiser steps."""

    @property
    def counts(self) -> Mapping[Any, int]:
        """Counts by (name, label value)."""


class ProcessStats(Protocol):
    """A worker's process."""

    @property
    def resident_bytes(self) -> int:
        """Resident memory."""

    @property
    def cpu_seconds(self) -> float:
        """CPU time of all threads."""

    @property
    def threads(self) -> int:
        """Threads that compute steps."""

    @property
    def device_bytes(self) -> Mapping[str, int]:
        """GPU memory by kind; empty on CPU."""


@dataclass(frozen=True, slots=True)
class WorkerState:
    """One worker at the time of a scrape.

    Attributes:
        ready: whether it accepts jobs.
        silent_s: seconds since its last message; 0 while it is not ready.
        usage: None until its first report.
    """

    ready: bool
    silent_s: float
    usage: ProcessStats | None


# ── collectors ────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class MetricInfo:
    """A line of docs/metrics.md."""

    name: str
    kind: str
    labels: tuple[str, ...]
    help: str


WORKER_METRICS = (
    MetricInfo(
        "paella_worker_ready",
        "gauge",
        ("worker",),
        "1 while the worker accepts jobs, 0 while it starts or is replaced",
    ),
    MetricInfo(
        "paella_worker_silent_seconds",
        "gauge",
        ("worker",),
        "Seconds since the worker's last message; 0 while it is not ready",
    ),
    MetricInfo(
        "paella_worker_resident_memory_bytes",
        "gauge",
        ("worker",),
        "Resident memory of the worker process",
    ),
    MetricInfo(
        "paella_worker_cpu_seconds_total",
        "counter",
        ("worker",),
        "CPU time of the worker process, all threads",
    ),
    MetricInfo(
        "paella_worker_threads",
        "gauge",
        ("worker",),
        "Threads that currently compute steps; fewer on a CPU shared with other processes",
    ),
    MetricInfo(
        "paella_gpu_memory_bytes",
        "gauge",
        ("worker", "kind"),
        "On CUDA: allocated by tensors, reserved by torch, total of the device",
    ),
)


class WorkerCollector(Collector):
    """Metrics of the worker processes, read at every scrape; a lost worker leaves none behind."""

    def __init__(self, read: Callable[[], Sequence[WorkerState]]) -> None:
        self._read = read

    def collect(self) -> Iterable[GaugeMetricFamily | CounterMetricFamily]:
        """Yield `WORKER_METRICS`."""
        states = {str(number): state for number, state in enumerate(self._read())}
        usages = {worker: state.usage for worker, state in states.items() if state.usage}
        samples: tuple[Mapping[tuple[str, ...], float], ...] = (
            {(worker,): state.ready for worker, state in states.items()},
            {(worker,): state.silent_s for worker, state in states.items()},
            {(worker,): usage.resident_bytes for worker, usage in usages.items()},
            {(worker,): usage.cpu_seconds for worker, usage in usages.items()},
            {(worker,): usage.threads for worker, usage in usages.items()},
            {
                (worker, kind): size
                for worker, usage in usages.items()
                for kind, size in usage.device_bytes.items()
            },
        )
        for info, values in zip(WORKER_METRICS, samples, strict=True):
            kind = GaugeMetricFamily if info.kind == "gauge" else CounterMetricFamily
            family = kind(info.name, info.help, labels=info.labels)
            for labels, value in values.items():
                family.add_metric(labels, value)
            yield family


LOG_METRIC = MetricInfo(
    "paella_log_lines_dropped_total",
    "counter",
    (),
    "Log lines of the API process lost because the log's reader stopped reading or a write failed",
)


class LogCollector(Collector):
    """Dropped log lines, read at every scrape."""

    def collect(self) -> Iterable[CounterMetricFamily]:
        """Yield `LOG_METRIC`."""
        yield CounterMetricFamily(LOG_METRIC.name, LOG_METRIC.help, value=dropped_lines())


class Metrics:
    """The collectors, one attribute each.

    Attributes:
        registry: of this app alone.
        infos: all metrics in order, except those of the workers.
        endpoints: endpoints whose metrics exist from the start.
    """

    def __init__(self, *, exemplars: bool = True) -> None:
        """Create all metrics. exemplars: whether request ids become exemplars."""
        self._exemplars = exemplars
        self.registry = CollectorRegistry()
        self.infos: list[MetricInfo] = []
        self.endpoints: frozenset[str] = frozenset()
        ProcessCollector(registry=self.registry)
        self.registry.register(LogCollector())
        self.infos.append(LOG_METRIC)
        self.request_duration = self._seconds(
            "request_duration",
            "From the request's headers to the last byte of the answer",
            "endpoint",
            "status",
        )
        self.queue_duration = self._seconds(
            "queue_duration", "From arrival to the first encoding, waiting for a worker included"
        )
        self.encode_duration = self._seconds("encode_duration", "Text encoders, per request")
        self.prior_duration = self._seconds("prior_duration", "Prior, per request")
        self.denoise_duration = self._seconds(
            "denoise_duration", "All steps of a request, waiting between steps included"
        )
        self.step_duration = self._seconds("step_duration", "One denoiser step of one batch")
        self.decode_duration = self._seconds("decode_duration", "Tokens to pixels, per request")
        self.image_encode_duration = self._seconds(
            "image_encode_duration", "Pixels to PNG, JPEG or WebP, per request"
        )
        self.step_rows = self._histogram("step_rows", "Rows per denoiser step", ROWS)
        self.batch_fill_ratio = self._histogram(
            "batch_fill_ratio", "Rows per denoiser step divided by max_batch_rows", RATIOS
        )
        self.queue_depth = self._gauge(
            "queue_depth", "Admitted rows that wait for their first step"
        )
        self.rows_running = self._gauge("rows_running", "Rows in denoising")
        self.images = self._counter("images", "Images answered, by native endpoint", "endpoint")
        self.preset_images = self._counter(
            "preset_images", "Images answered, by weights and preset", "model", "preset"
        )
        self.rejected = self._counter(
            "rejected", "Rejected requests, by error code; without /readyz probes", "reason"
        )
        self.cancelled = self._counter(
            "cancelled",
            "Requests cancelled by a disconnect or a DELETE: during their upload or its decoding, "
            "in the queue, or after a worker started them",
            "stage",
        )
        self.cancel_duration = self._seconds(
            "cancel_duration", "From a cancellation to the last step of the request's rows"
        )
        self.requests_replayed = self._counter(
            "requests_replayed", "Requests restarted because their worker was lost"
        )
        self.worker_restarts = self._counter(
            "worker_restarts", "Workers restarted after a crash or a stall"
        )
        self.prompt_cache_bytes = self._gauge(
            "prompt_cache_bytes", "Size of the workers' caches of encoded prompts and priors"
        )
        # Counted by the workers, under these names.
        self.counts = {
            "prompt_cache_hits": self._counter(
                "prompt_cache_hits", "Texts, images and priors found in the prompt cache", "what"
            ),
            "prompt_cache_misses": self._counter(
                "prompt_cache_misses", "Texts and images encoded and priors computed", "what"
            ),
            "graph_captures": self._counter(
                "graph_captures", "CUDA graphs captured", "after_ready"
            ),
            "graph_replays": self._counter("graph_replays", "CUDA graphs replayed"),
            "graph_eager_steps": self._counter(
                "graph_eager_steps", "Denoiser steps on CUDA without a matching graph"
            ),
        }
        self.idempotent_repeats = self._counter(
            "idempotent_repeats",
            "Repeats under an Idempotency-Key: answered again, joined to the running request, or"
            " rejected as a mismatch",
            "outcome",
        )
        self.idempotency_bytes = self._gauge(
            "idempotency_bytes", "Size of the answers kept for repeats under an Idempotency-Key"
        )
        self.url_store_bytes = self._gauge(
            "url_store_bytes", "Size of the images kept for response_format url"
        )
        self.weights_info = self._gauge(
            "weights_info", "Always 1; the labels identify the served weights", "model", "sha256"
        )
        self._begin_at_zero()

    def expect(self, native: Sequence[str], others: Sequence[str] = ()) -> None:
        """Create the metrics of these endpoints at 0, so that a rate sees their first request.

        Images are counted by native endpoint, whichever endpoint was called.
        """
        self.endpoints = frozenset((*native, *others))
        for endpoint in native:
            self.images.labels(endpoint)
        for endpoint in (*native, *others):
            self.request_duration.labels(endpoint, 200)

    def watch(self, read: Callable[[], Sequence[WorkerState]]) -> None:
        """Expose the workers that `read` returns at every scrape."""
        self.registry.register(WorkerCollector(read))

    def record_request(self, endpoint: str, status: int, seconds: float, request_id: str) -> None:
        """Observe a request. The id becomes its bucket's exemplar, if wanted and not too long."""
        fits = len("request_id") + len(request_id) <= MAX_EXEMPLAR
        exemplar = {"request_id": request_id} if fits and self._exemplars else None
        self.request_duration.labels(endpoint, status).observe(seconds, exemplar)

    def record_timings(self, timings: StageTimings) -> None:
        """Observe the stages of a finished request."""
        self.queue_duration.observe(timings.queue)
        self.encode_duration.observe(timings.encode)
        self.prior_duration.observe(timings.prior)
        self.denoise_duration.observe(timings.denoise)
        self.decode_duration.observe(timings.decode)

    def record_heartbeat(self, report: WorkerReport, max_rows: int) -> None:
        """Add a worker's report. max_rows: rows that a batch may have."""
        for step in report.steps:
            self.step_rows.observe(step.rows)
            self.batch_fill_ratio.observe(step.rows / max_rows)
            self.step_duration.observe(step.seconds)
        for (name, label), count in report.counts.items():
            counter = self.counts[name]
            (counter.labels(label) if label else counter).inc(count)

    def render(self, accept: str = "") -> tuple[bytes, str]:
        """Return all metrics and their media type.

        OpenMetrics, which has exemplars, for clients that accept it; otherwise Prometheus text.
        """
        encode, media_type = choose_encoder(accept)
        return encode(self.registry), media_type

    def _begin_at_zero(self) -> None:
        for counter, values in {
            self.rejected: (*LOAD_REJECTIONS, *KEY_REJECTIONS),
            self.cancelled: ("upload", "queue", "worker"),
            self.idempotent_repeats: ("answered", "joined", "mismatch"),
            self.counts["prompt_cache_hits"]: ("text", "picture", "prior"),
            self.counts["prompt_cache_misses"]: ("text", "picture", "prior"),
            self.counts["graph_captures"]: ("false", "true"),
        }.items():
            for value in values:
                counter.labels(value)

    def _seconds(self, name: str, help: str, *labels: str) -> Histogram:
        return self._histogram(f"{name}_seconds", help, SECONDS, *labels)

    def _histogram(self, name: str, help: str, buckets: Sequence[float], *labels: str) -> Histogram:
        self._add(name, "histogram", labels, help)
        return Histogram(
            name, help, labels, namespace="paella", buckets=buckets, registry=self.registry
        )

    def _gauge(self, name: str, help: str, *labels: str) -> Gauge:
        self._add(name, "gauge", labels, help)
        return Gauge(name, help, labels, namespace="paella", registry=self.registry)

    def _counter(self, name: str, help: str, *labels: str) -> Counter:
        self._add(f"{name}_total", "counter", labels, help)
        return Counter(name, help, labels, namespace="paella", registry=self.registry)

    def _add(self, name: str, kind: str, labels: tuple[str, ...], help: str) -> None:
        self.infos.append(MetricInfo(f"paella_{name}", kind, labels, help))


# ── docs/metrics.md ───────────────────────────────────────────────────────────────────────────────

HEAD = f"""\
# Metrics

*For operators.* `/metrics` serves these metrics in Prometheus' text format or, if the client
accepts it, as OpenMetrics, where each bucket of `paella_request_duration_seconds` has an exemplar:
the id of a request that fell into it. With `PAELLERA_API_KEYS` there are exemplars only beside
`PAELLERA_OPERATIONS_PORT`: clients must not read each other's request ids. Generated by
`python -m server.metrics > docs/metrics.md`.

Counters, and the metrics of endpoints that generate images, exist at 0 from the start. Metrics are
summed over workers, except those with a label `worker`, its index in `PAELLERA_DEVICES`.
`paella_worker_ready` and `paella_worker_silent_seconds` always exist; the other metrics of a worker
are absent until its first heartbeat, and end with its process. Counters continue when a worker is
replaced. A worker's counts arrive with its heartbeats, four per second under load. `process_*`
describe the API process.

Bucket edges of every latency, in seconds, include 0.5, so that the share below 500 ms is exact:
{", ".join(f"{edge:g}" for edge in SECONDS)}.

| name | type | labels | |
|---|---|---|---|
"""


def document() -> str:
    """Return docs/metrics.md."""
    infos = (*Metrics().infos, *WORKER_METRICS)
    lines = [f"| `{m.name}` | {m.kind} | {', '.join(m.labels)} | {m.help} |" for m in infos]
    return HEAD + "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(document(), end="")
