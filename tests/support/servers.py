"""Apps with settings and a fake worker of a test's own, their clients and metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import httpx
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families

from server.api import create_app
from server.engine.worker_process import WorkerMain
from server.settings import Settings
from tests import fake_worker
from tests.conftest import serving, wait_until

Configure = Callable[..., Settings]


def asking(settings: Settings) -> TestClient:
    """A client of an app whose worker is not started."""
    return TestClient(create_app(settings, worker=fake_worker.main), raise_server_exceptions=False)


def metric(client: httpx.Client, name: str, **labels: str) -> float:
    for family in text_string_to_metric_families(client.get("/metrics").text):
        for sample in family.samples:
            if sample.name == name and labels.items() <= sample.labels.items():
                return sample.value
    return 0.0


@contextmanager
def served(
    settings: Settings, worker: WorkerMain = fake_worker.main, *, ready: bool = True
) -> Iterator[httpx.Client]:
    """A client of a server of its own, for the tests that would disturb the shared one."""
    with (
        serving(create_app(settings, worker=worker)) as address,
        httpx.Client(base_url=address, timeout=20) as client,
    ):
        if ready:
            wait_until(lambda: client.get("/readyz").status_code == 200)
        yield client
