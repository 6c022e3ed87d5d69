"""Metrics of many processes as one exposition, with the label `replica` on every sample."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from prometheus_client import CollectorRegistry, Metric


class MergedRegistry(CollectorRegistry):
    """The replicas' latest metrics, in place of those of this process.

    Attributes:
        replicas: metrics by name of the replica.
    """

    def __init__(self) -> None:
        super().__init__()
        self.replicas: Mapping[str, Iterable[Metric]] = {}

    def collect(self) -> Iterable[Metric]:
        """Return the merged metrics."""
        return merge_metrics(self.replicas)


def merge_metrics(replicas: Mapping[str, Iterable[Metric]]) -> list[Metric]:
    """Return one family per name: the exposition may name each only once."""
    families: dict[str, Metric] = {}
    for replica, metrics in replicas.items():
        for metric in metrics:
            empty = Metric(metric.name, metric.documentation, metric.type)
            family = families.setdefault(metric.name, empty)
            family.samples += [
                sample._replace(labels={**sample.labels, "replica": replica})
                for sample in metric.samples
            ]
    return list(families.values())
