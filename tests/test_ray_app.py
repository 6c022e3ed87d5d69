"""The application on a real Ray of this machine: whatever happens to a replica, its requests are
answered.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from load_tests.processes import family
from load_tests.serving import free_port
from tests.conftest import wait_until

pytestmark = [pytest.mark.process, pytest.mark.ray]

# Ray's own processes take a minute to start on a busy machine.
PATIENCE_S = 300
LOADS = 6
ENVIRONMENT = {
    "PAELLERA_LOG_LEVEL": "warning",
    "PAELLERA_THREADS": "1",
    "PAELLERA_DTYPE": "float32",
    "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "0.5",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "120",
    "RAY_agent_register_timeout_ms": "240000",
    "RAY_USAGE_STATS_ENABLED": "0",
}


@dataclass(frozen=True, slots=True)
class Cluster:
    """process: `tests.ray_cluster`, which leads a session of its own."""

    process: subprocess.Popen[str]
    client: httpx.Client

    def deploy(
        self, *, fake: bool = True, settings: dict[str, str] | None = None, **scale: Any
    ) -> None:
        """Returns when all replicas are there."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(
            json.dumps({"scale": scale, "settings": settings or {}, "fake": fake}) + "\n"
        )
        self.process.stdin.flush()
        # Ray, too, has things to say there.
        assert "deployed\n" in iter(self.process.stdout.readline, "")
        self.wait_for_engines(scale["min_replicas"])

    def figures(self, name: str) -> Counter[str]:
        """A figure by replica, summed over its other labels."""
        families = text_string_to_metric_families(self.client.get("/metrics").text)
        sums: Counter[str] = Counter()
        for sample in (
            sample for each in families for sample in each.samples if sample.name == name
        ):
            sums[sample.labels["replica"]] += sample.value  # type: ignore[assignment]
        return sums

    def engines(self) -> set[str]:
        return {
            replica
            for replica in self.figures("paella_queue_depth")
            if replica.startswith("Engine-")
        }

    def wait_for_engines(self, count: int) -> None:
        eventually(lambda: len(self.engines()) == count)
        eventually(lambda: self.client.get("/readyz").status_code == 200)

    def generate(self, prompt: str, seed: int, **headers: str) -> httpx.Response:
        return self.client.post(
            "/generate",
            json={"prompt": prompt, "seed": seed, "timeout_s": PATIENCE_S},
            headers=headers,
        )

    def processes(self, deployment: str) -> list[int]:
        """Of a deployment's replicas."""
        title = f"ray::ServeReplica:paellera:{deployment}"
        return [
            pid
            for pid in family(self.process.pid)
            if Path(f"/proc/{pid}/cmdline").read_text().startswith(title)
        ]


def eventually(condition: Callable[[], bool]) -> None:
    """Not as often as elsewhere: what is asked makes replicas work."""
    wait_until(condition, PATIENCE_S, interval_s=0.2)


@pytest.fixture(scope="module")
def cluster(bundle: Path) -> Iterator[Cluster]:
    """Two HTTP replicas, two engines with fake workers."""
    port = free_port()
    command = [sys.executable, "-m", "tests.ray_cluster", "--port", str(port)]
    environment = {**os.environ, **ENVIRONMENT, "PAELLERA_WEIGHTS": str(bundle)}
    with (
        subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as process,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE_S) as client,
    ):
        cluster = Cluster(process, client)
        cluster.deploy(min_replicas=2, max_replicas=2, api_replicas=2)
        yield cluster
        assert process.stdin is not None
        process.stdin.close()
        process.wait(PATIENCE_S)


@contextmanager
def load(cluster: Cluster) -> Iterator[list[httpx.Response]]:
    """Some clients that ask again whenever they are answered; afterwards, what they all were
    answered.
    """
    answers: list[httpx.Response] = []
    over = threading.Event()

    def ask(number: int) -> None:
        for seed in range(number, sys.maxsize, LOADS):
            if over.is_set():
                return
            answers.append(cluster.generate("slow", seed))

    with ThreadPoolExecutor(LOADS) as pool:
        clients = [pool.submit(ask, number) for number in range(LOADS)]
        try:
            yield answers
        finally:
            over.set()
    for client in clients:
        client.result()


def all_pictures(answers: list[httpx.Response]) -> bool:
    return len(answers) >= LOADS and {
        (answer.status_code, answer.headers["content-type"]) for answer in answers
    } == {(200, "image/png")}


def test_both_engines_are_asked_and_both_are_measured(cluster: Cluster) -> None:
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda seed: cluster.generate("slow", seed), range(16)))
    assert [answer.status_code for answer in answers] == [200] * 16
    # The longer wait is avoided, so that neither is left idle: of sixteen alike, each has at least
    # a quarter.
    eventually(lambda: sum(cluster.figures("paella_queue_duration_seconds_count").values()) >= 16)
    done = cluster.figures("paella_queue_duration_seconds_count")
    assert min(done[engine] for engine in cluster.engines()) >= 4


def test_an_answer_is_what_the_contract_says(cluster: Cluster) -> None:
    sent = uuid.uuid4().hex
    answer = cluster.generate("cut", 7, **{"X-Request-Id": sent})
    assert answer.headers["x-request-id"] == sent
    assert answer.headers["x-seed"] == "7"
    assert answer.headers["x-prompt-truncated"] == "byt5, clip"
    assert answer.headers["server-timing"].startswith("queue;dur=")
    failed = cluster.generate("fail", 7)
    assert (
        failed.status_code,
        failed.json()["error"]["code"],
        failed.headers["x-should-retry"],
    ) == (500, "internal", "false")
    late = cluster.client.post("/generate", json={"prompt": "hold", "timeout_s": 0.5})
    assert (late.status_code, late.json()["error"]["code"]) == (504, "deadline_exceeded")


def test_events_come_as_they_happen_and_who_goes_away_frees_the_slot(cluster: Cluster) -> None:
    before = sum(cluster.figures("paella_cancelled_total").values())
    body = {"keyframes": [{"prompt": "hold"}, {"prompt": "b"}], "frames": 2, "stream": True}
    with cluster.client.stream("POST", "/interpolate", json=body) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        # The job never ends: a stream that were held back would say nothing.
        lines = answer.iter_lines()
        assert next(lines) == "event: queued"
        eventually(lambda: sum(cluster.figures("paella_rows_running").values()) == 2)
    eventually(lambda: sum(cluster.figures("paella_rows_running").values()) == 0)
    eventually(lambda: sum(cluster.figures("paella_cancelled_total").values()) == before + 1)


def test_a_request_is_deleted_whichever_replica_has_it(cluster: Cluster) -> None:
    ids = [uuid.uuid4().hex for _ in range(4)]
    with ThreadPoolExecutor(len(ids)) as pool:
        held = [pool.submit(cluster.generate, "hold", 0, **{"X-Request-Id": id}) for id in ids]
        for id in ids:
            eventually(lambda id=id: cluster.client.delete(f"/requests/{id}").status_code == 204)
        assert {answer.result().status_code for answer in held} == {499}
    assert (
        cluster.client.delete(f"/requests/{ids[0]}").json()["error"]["code"] == "request_not_found"
    )


def test_an_image_is_found_by_its_url_whichever_replica_has_it(cluster: Cluster) -> None:
    body = {"prompt": "a ball", "n": 2, "response_format": "url"}
    answers = [cluster.client.post("/generate", json=body).json() for _ in range(4)]
    for url in (image["url"] for answer in answers for image in answer["images"]):
        path = httpx.URL(url).path
        for _ in range(4):
            assert cluster.client.get(path).headers["content-type"] == "image/png"
        assert cluster.client.head(path).status_code == 200
    assert cluster.client.get("/images/unknown.png").status_code == 404


def test_what_a_killed_engine_had_is_begun_again_on_the_other(cluster: Cluster) -> None:
    before = cluster.engines()
    ids = [uuid.uuid4().hex for _ in range(6)]
    with ThreadPoolExecutor(len(ids)) as pool:
        held = [pool.submit(cluster.generate, "hold", 0, **{"X-Request-Id": id}) for id in ids]
        eventually(lambda: sum(cluster.figures("paella_rows_running").values()) == len(ids))
        had = min(cluster.figures("paella_rows_running")[engine] for engine in before)
        os.kill(cluster.processes("Engine")[0], signal.SIGKILL)
        eventually(
            lambda: (
                before - cluster.engines() != set()
                and sum(cluster.figures("paella_rows_running").values()) == len(ids)
            )
        )
        eventually(
            lambda: sum(cluster.figures("paella_requests_replayed_total").values()) >= had > 0
        )
        for id in ids:
            eventually(lambda id=id: cluster.client.delete(f"/requests/{id}").status_code == 204)
        assert {answer.result().status_code for answer in held} == {499}
    cluster.wait_for_engines(2)


def test_none_is_lost_when_an_engine_is_killed(cluster: Cluster) -> None:
    undisturbed = {seed: cluster.generate("slow", seed).content for seed in range(4)}
    with load(cluster) as answers:
        eventually(lambda: len(answers) > LOADS)
        os.kill(cluster.processes("Engine")[0], signal.SIGKILL)
        asked = len(answers)
        eventually(lambda: len(answers) > asked + 3 * LOADS)
    assert all_pictures(answers)
    again = [answer.content for answer in answers if int(answer.headers["x-seed"]) in undisturbed]
    assert set(again) == set(undisturbed.values())
    cluster.wait_for_engines(2)


def test_none_is_lost_while_all_replicas_are_replaced(cluster: Cluster) -> None:
    before = cluster.engines()
    with load(cluster) as answers:
        cluster.deploy(
            min_replicas=2, max_replicas=2, api_replicas=2, settings={"PAELLERA_QUEUE_ROWS": "255"}
        )
        eventually(lambda: not cluster.engines() & before)
    assert all_pictures(answers)


def test_there_are_more_engines_under_load_and_fewer_afterwards_and_none_is_lost(
    cluster: Cluster,
) -> None:
    times = {"upscale_delay_s": 0, "downscale_delay_s": 0.5, "look_back_s": 10.1}
    cluster.deploy(min_replicas=1, max_replicas=2, api_replicas=2, target_rows=3, **times)
    with load(cluster) as answers:
        eventually(lambda: len(cluster.engines()) == 2)
    assert all_pictures(answers)
    seeds = iter(range(sys.maxsize))
    later = []

    def only_one_is_left() -> bool:
        later.append(cluster.generate("slow", next(seeds)).status_code)
        return len(cluster.engines()) == 1

    eventually(only_one_is_left)
    assert set(later) == {200}


def test_a_seed_gives_the_same_bytes_on_both_engines(cluster: Cluster, random_bundle: Path) -> None:
    cluster.deploy(
        min_replicas=2,
        max_replicas=2,
        settings={"PAELLERA_WEIGHTS": str(random_bundle)},
        fake=False,
    )
    body = {"prompt": "a red apple", "seed": 3, "deterministic": True, "timeout_s": PATIENCE_S}
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: cluster.client.post("/generate", json=body), range(8)))
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.content for answer in answers}) == 1
    eventually(
        lambda: all(
            cluster.figures("paella_queue_duration_seconds_count")[engine]
            for engine in cluster.engines()
        )
    )
