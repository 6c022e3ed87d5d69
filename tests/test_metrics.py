"""The figures carry the names and edges the HTTP contract promises."""

from __future__ import annotations

from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from server.engine.messages import Heartbeat, ProcessStats, Step
from server.metrics import (
    KEY_REJECTIONS,
    LOAD_REJECTIONS,
    WORKER_METRICS,
    Metrics,
    WorkerState,
    document,
)
from tests.conftest import NAME
from tests.support.servers import Configure, asking


def names(metrics: Metrics) -> set[str]:
    return {family.name for family in text_string_to_metric_families(metrics.render()[0].decode())}


def test_every_figure_of_the_contract_is_exposed() -> None:
    latencies = {
        f"paella_{stage}_duration_seconds"
        for stage in (
            "request",
            "queue",
            "encode",
            "prior",
            "denoise",
            "step",
            "decode",
            "image_encode",
            "cancel",
        )
    }
    counters = {
        f"paella_{name}"
        for name in ("images", "rejected", "cancelled", "worker_restarts", "requests_replayed")
    }
    counters |= {
        f"paella_{name}"
        for name in ("prompt_cache_hits", "prompt_cache_misses", "graph_captures", "graph_replays")
    }
    others = {
        "paella_step_rows",
        "paella_batch_fill_ratio",
        "paella_prompt_cache_bytes",
        "paella_queue_depth",
        "paella_rows_running",
        "paella_weights_info",
        "process_resident_memory_bytes",
    }
    assert latencies | counters | others <= names(Metrics())


def test_latencies_have_an_edge_at_exactly_half_a_second() -> None:
    metrics = Metrics()
    metrics.queue_duration.observe(0.5)
    metrics.queue_duration.observe(0.5001)
    assert (
        metrics.registry.get_sample_value("paella_queue_duration_seconds_bucket", {"le": "0.5"})
        == 1
    )


def test_two_apps_count_apart() -> None:
    one, other = Metrics(), Metrics()
    one.images.labels("/generate").inc()
    other.expect(["/generate"])
    assert other.registry.get_sample_value("paella_images_total", {"endpoint": "/generate"}) == 0


def test_a_beat_s_steps_and_counts_are_added_to_the_figures() -> None:
    metrics = Metrics()
    counts = {
        ("prompt_cache_hits", "text"): 3,
        ("graph_captures", "false"): 2,
        ("graph_replays", ""): 5,
    }
    for _ in range(2):
        metrics.record_heartbeat(Heartbeat((Step(4, 8, 32, 0.1),), 4, 0, counts), max_rows=16)
    value = metrics.registry.get_sample_value
    assert value("paella_prompt_cache_hits_total", {"what": "text"}) == 6
    assert value("paella_graph_captures_total", {"after_ready": "false"}) == 4
    assert value("paella_graph_replays_total") == 10
    assert value("paella_batch_fill_ratio_sum") == 0.5
    assert value("paella_step_rows_sum") == 8


def test_the_documented_figures_are_those_that_are_shown() -> None:
    metrics = Metrics()
    metrics.watch(list)
    documented = {
        figure.name.removesuffix("_total"): figure.kind
        for figure in (*metrics.infos, *WORKER_METRICS)
    }
    families = {
        family.name: family.type
        for family in metrics.registry.collect()
        if not family.name.startswith("process_")
    }
    assert families == documented
    assert (Path(__file__).parents[1] / "docs/metrics.md").read_text() == document(), (
        "python -m server.metrics > docs/metrics.md"
    )


def test_figures_with_known_labels_are_there_before_anything_has_happened() -> None:
    metrics = Metrics()
    metrics.expect(["/generate"], ["/v1/images/generations"])
    value = metrics.registry.get_sample_value
    assert value("paella_images_total", {"endpoint": "/v1/images/generations"}) is None
    assert (
        value(
            "paella_request_duration_seconds_count",
            {"endpoint": "/v1/images/generations", "status": "200"},
        )
        == 0
    )
    assert {
        value("paella_rejected_total", {"reason": reason})
        for reason in (*LOAD_REJECTIONS, *KEY_REJECTIONS)
    } == {0}
    assert (
        value(
            "paella_request_duration_seconds_bucket",
            {"endpoint": "/generate", "status": "200", "le": "0.5"},
        )
        == 0
    )
    assert value("paella_prompt_cache_hits_total", {"what": "prior"}) == 0
    assert value("paella_graph_captures_total", {"after_ready": "true"}) == 0


@pytest.mark.parametrize("sdapi", [False, True])
def test_endpoints_that_draw_and_presets_are_shown_before_their_first_request(
    fake_settings: Configure, sdapi: bool
) -> None:
    text = asking(fake_settings(sdapi=sdapi)).get("/metrics").text
    samples = [sample for each in text_string_to_metric_families(text) for sample in each.samples]
    requests = {
        sample.labels["endpoint"]: sample.value
        for sample in samples
        if sample.name == "paella_request_duration_seconds_count"
    }
    endpoints = ["generate", "inpaint", "outpaint", "variations", "edit", "upscale", "interpolate"]
    endpoints += [f"v1/images/{name}" for name in ("generations", "edits", "variations")]
    if sdapi:
        drawing = ("txt2img", "img2img", "extra-single-image", "extra-batch-images")
        endpoints += [f"sdapi/v1/{name}" for name in drawing]
    assert requests == {f"/{endpoint}": 0 for endpoint in endpoints}
    presets = [
        (sample.labels, sample.value)
        for sample in samples
        if sample.name == "paella_preset_images_total"
    ]
    assert presets == [({"model": NAME, "preset": "quality"}, 0)]


def test_of_a_worker_that_is_lost_no_figure_of_its_process_is_left() -> None:
    metrics, states = (
        Metrics(),
        [
            WorkerState(True, 0, ProcessStats(7, 1.5, 2, {"allocated": 3})),
            WorkerState(True, 2, ProcessStats(9, 2.5, 1)),
        ],
    )
    metrics.watch(lambda: states)
    value = metrics.registry.get_sample_value
    assert [
        value("paella_worker_resident_memory_bytes", {"worker": worker}) for worker in "01"
    ] == [7, 9]
    assert [value("paella_worker_threads", {"worker": worker}) for worker in "01"] == [2, 1]
    assert value("paella_gpu_memory_bytes", {"worker": "0", "kind": "allocated"}) == 3
    assert value("paella_worker_silent_seconds", {"worker": "1"}) == 2
    states[0] = WorkerState(False, 0, None)
    assert [value("paella_worker_cpu_seconds_total", {"worker": worker}) for worker in "01"] == [
        None,
        2.5,
    ]
    assert value("paella_gpu_memory_bytes", {"worker": "0", "kind": "allocated"}) is None
    assert [value("paella_worker_ready", {"worker": worker}) for worker in "01"] == [0, 1]
