"""The figures carry the names and edges the HTTP contract promises."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from server.metrics import Metrics


def names(metrics: Metrics) -> set[str]:
    return {family.name for family in text_string_to_metric_families(metrics.render().decode())}


def test_every_figure_of_the_contract_is_exposed() -> None:
    latencies = {
        f"paella_{stage}_duration_seconds" for stage in ("request", "queue", "encode", "prior", "step", "decode", "image_encode", "cancel")
    }
    counters = {f"paella_{name}" for name in ("images", "rejected", "cancelled", "worker_restarts", "requests_replayed")}
    others = {"paella_step_rows", "paella_queue_depth", "paella_rows_running", "paella_weights_info", "process_resident_memory_bytes"}
    assert latencies | counters | others <= names(Metrics())


def test_latencies_have_an_edge_at_exactly_half_a_second() -> None:
    metrics = Metrics()
    metrics.queue_duration.observe(0.5)
    metrics.queue_duration.observe(0.5001)
    assert metrics.registry.get_sample_value("paella_queue_duration_seconds_bucket", {"le": "0.5"}) == 1


def test_two_apps_count_apart() -> None:
    one, other = Metrics(), Metrics()
    one.images.labels("/generate").inc()
    assert other.registry.get_sample_value("paella_images_total", {"endpoint": "/generate"}) is None
