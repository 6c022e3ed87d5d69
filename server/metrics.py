"""Every figure the server measures, under the names of the HTTP contract. One registry per app; nothing global."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.exposition import choose_encoder

from server.engine.protocol import Beat, Timings

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.65, 0.8, 1, 2, 5, 10, 30)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128)
RATIOS = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1)
# Characters of names and values together, by the OpenMetrics specification.
LONGEST_EXEMPLAR = 128


class Metrics:
    """The collectors, one attribute each."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.request_duration = self._seconds(
            "request_duration", "From the request's headers to the answer's last byte", "endpoint", "status"
        )
        self.queue_duration = self._seconds("queue_duration", "From arrival to the first encode, waiting for a worker included")
        self.encode_duration = self._seconds("encode_duration", "Text encoders, per request")
        self.prior_duration = self._seconds("prior_duration", "Prior, per request")
        self.step_duration = self._seconds("step_duration", "One denoiser step of one batch")
        self.decode_duration = self._seconds("decode_duration", "Tokens to pixels, per request")
        self.image_encode_duration = self._seconds("image_encode_duration", "Pixels to PNG, JPEG or WebP, per request")
        self.step_rows = Histogram("step_rows", "Rows per denoiser step", namespace="paella", buckets=ROWS, registry=self.registry)
        self.batch_fill_ratio = Histogram(
            "batch_fill_ratio", "Rows per denoiser step over max_batch_rows", namespace="paella", buckets=RATIOS, registry=self.registry
        )
        self.queue_depth = self._gauge("queue_depth", "Rows admitted and not yet stepping")
        self.rows_running = self._gauge("rows_running", "Rows being stepped")
        self.images = self._counter("images", "Pictures answered", "endpoint")
        self.rejected = self._counter("rejected", "Requests refused, by error code", "reason")
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

    def record_request(self, endpoint: str, status: int, seconds: float, request_id: str) -> None:
        """The id becomes the exemplar of its bucket, unless it is longer than exemplars may be."""
        exemplar = {"request_id": request_id} if len(request_id) <= LONGEST_EXEMPLAR - len("request_id") else None
        self.request_duration.labels(endpoint, status).observe(seconds, exemplar)

    def record_timings(self, timings: Timings) -> None:
        self.queue_duration.observe(timings.queue)
        self.encode_duration.observe(timings.encode)
        self.prior_duration.observe(timings.prior)
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

    def _seconds(self, name: str, documentation: str, *labels: str) -> Histogram:
        return Histogram(f"{name}_seconds", documentation, labels, namespace="paella", buckets=SECONDS, registry=self.registry)

    def _gauge(self, name: str, documentation: str, *labels: str) -> Gauge:
        return Gauge(name, documentation, labels, namespace="paella", registry=self.registry)

    def _counter(self, name: str, documentation: str, *labels: str) -> Counter:
        return Counter(name, documentation, labels, namespace="paella", registry=self.registry)
