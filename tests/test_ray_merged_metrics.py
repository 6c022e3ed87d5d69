"""Many processes' figures in one exposition."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from server.metrics import Metrics
from server.ray_serve.merged_metrics import MergedRegistry, merge_metrics


def registry(pictures: int) -> CollectorRegistry:
    metrics = Metrics()
    metrics.images.labels("/generate").inc(pictures)
    return metrics.registry


def test_every_sample_says_whose_it_is_and_every_family_stands_once() -> None:
    fleet = MergedRegistry()
    fleet.replicas = {"a": registry(2).collect(), "b": registry(3).collect()}
    text = generate_latest(fleet).decode()
    families = list(text_string_to_metric_families(text))
    assert len({family.name for family in families}) == len(families)
    assert text.count("# TYPE paella_images_total counter") == 1
    (images,) = (family for family in families if family.name == "paella_images")
    counts = {
        sample.labels["replica"]: sample.value
        for sample in images.samples
        if sample.name == "paella_images_total"
    }
    assert counts == {"a": 2, "b": 3}


def test_without_replicas_there_are_no_figures() -> None:
    assert generate_latest(MergedRegistry()) == b""
    assert merge_metrics({}) == []
