"""The figures of many processes as one exposition: each sample says in its label `replica` whose it is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from prometheus_client import CollectorRegistry, Metric


class Fleet(CollectorRegistry):
    """What the replicas said last, in place of what this process alone would say."""

    def __init__(self) -> None:
        super().__init__()
        self.replicas: Mapping[str, Iterable[Metric]] = {}

    def collect(self) -> Iterable[Metric]:
        return merged(self.replicas)


def merged(replicas: Mapping[str, Iterable[Metric]]) -> list[Metric]:
    """One family a name, since the exposition may name each only once."""
    families: dict[str, Metric] = {}
    for replica, metrics in replicas.items():
        for metric in metrics:
            family = families.setdefault(metric.name, Metric(metric.name, metric.documentation, metric.type))
            family.samples += [sample._replace(labels={**sample.labels, "replica": replica}) for sample in metric.samples]
    return list(families.values())
