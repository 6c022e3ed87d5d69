"""A real server with a real worker under a stream that never lets up: nobody starves, nothing is
refused on a guess, and no key learns what another one asked for.
"""

from __future__ import annotations

import concurrent.futures
import itertools
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest
from pydantic import SecretStr

from server.api import create_app
from server.settings import Settings
from tests.conftest import serving, wait_until
from tests.support.servers import metric

pytestmark = pytest.mark.process

KEYS = ("the-first-key-of-two", "the-other-key-of-two")
CLIENTS = 6
# Requests of the stream after which it ends, though somebody may still wait.
MOST = 90


@pytest.fixture(scope="module")
def client(random_settings: Settings) -> Iterator[httpx.Client]:
    """A client, with the first key, of a server that draws one image at a time."""
    changes = {"api_keys": SecretStr(",".join(KEYS)), "max_batch_rows": 1, "threads": 1}
    with (
        serving(create_app(random_settings.model_copy(update=changes))) as address,
        httpx.Client(base_url=address, timeout=120, headers=key(0)) as client,
    ):
        wait_until(lambda: client.get("/readyz").status_code == 200, timeout_s=300)
        yield client


def key(number: int) -> dict[str, str]:
    return {"Authorization": f"Bearer {KEYS[number]}"}


def ask(client: httpx.Client, prompt: str = "red apple", **fields: object) -> httpx.Response:
    small = {"width": 32, "height": 32, "num_inference_steps": 2}
    return client.post("/generate", json={"prompt": prompt, "seed": 1, **small, **fields})


class Stream:
    """Clients that ask again as soon as they are answered."""

    def __init__(self, client: httpx.Client) -> None:
        self._client, self._numbers = client, itertools.count()
        self.answered = 0
        self.ended = threading.Event()

    @contextmanager
    def running(self) -> Iterator[None]:
        with concurrent.futures.ThreadPoolExecutor(CLIENTS) as threads:
            clients = [threads.submit(self._ask_on) for _ in range(CLIENTS)]
            try:
                wait_until(lambda: self.answered >= CLIENTS)
                yield
            finally:
                self.ended.set()
        for each in clients:
            each.result()

    def _ask_on(self) -> None:
        while not self.ended.is_set() and next(self._numbers) < MOST:
            assert ask(self._client).status_code == 200
            self.answered += 1

    def answered_before(self, **fields: object) -> int:
        """Ask beside the stream; return how many of its requests were answered meanwhile."""
        before = self.answered
        assert ask(self._client, **fields).status_code == 200
        return self.answered - before


def test_who_allows_ten_minutes_is_answered_in_turn_and_batch_later_but_not_never(
    client: httpx.Client,
) -> None:
    patient, batch = Stream(client), Stream(client)
    with patient.running():
        passed_patient = patient.answered_before(timeout_s=600)
    with batch.running():
        passed_batch = batch.answered_before(timeout_s=600, priority="batch")
    # Those before it, and those that are answered while its own answer is on its way.
    assert passed_patient <= 2 * CLIENTS
    assert passed_patient - 1 <= passed_batch < MOST - 2 * CLIENTS


def test_an_idle_server_that_has_seen_small_images_refuses_no_large_one_unseen(
    client: httpx.Client,
) -> None:
    for _ in range(5):
        assert ask(client, num_inference_steps=1).status_code == 200
    wait_until(lambda: metric(client, "paella_step_duration_seconds_count") >= 5)
    steps = metric(client, "paella_step_duration_seconds_count")
    small_s = metric(client, "paella_step_duration_seconds_sum") / steps
    large = {"width": 128, "height": 128, "num_inference_steps": 64, "guidance_scale": 4}
    in_proportion = 64 * (128 / 32) ** 2 * small_s
    answer = ask(client, timeout_s=max(0.05, min(600.0, in_proportion / 2)), **large)
    assert answer.status_code in (200, 504), answer.text


def test_a_key_does_not_find_what_another_one_asked_for_in_the_prompt_cache(
    client: httpx.Client,
) -> None:
    def hits() -> float:
        # Counts arrive with heartbeats: one more request is answered after the one in question.
        return metric(client, "paella_prompt_cache_hits_total", what="text")

    def misses() -> float:
        return metric(client, "paella_prompt_cache_misses_total", what="text")

    def texts(number: int) -> tuple[float, float]:
        """Ask with a key for a prompt of one's own, without guidance; return hits and misses."""
        before = hits(), misses()
        fields = {"prompt": "an apple that nobody else asks for", "guidance_scale": 1}
        answer = client.post("/generate", json={**fields, "seed": 3}, headers=key(number))
        assert answer.status_code == 200
        wait_until(lambda: hits() + misses() > sum(before))
        return hits() - before[0], misses() - before[1]

    assert texts(0) == (0, 1)
    assert texts(0) == (1, 0), "a key's own prompts are remembered"
    assert texts(1) == (0, 1), "as if nobody had asked before"
    assert texts(1) == (1, 0)


def test_request_ids_of_others_are_no_exemplars(client: httpx.Client) -> None:
    client.post(
        "/generate", json={"prompt": "red apple"}, headers={"X-Request-Id": "a-secret-of-mine"}
    )
    accept = {"Accept": "application/openmetrics-text", **key(1)}
    answer = client.get("/metrics", headers=accept)
    assert answer.headers["content-type"].startswith("application/openmetrics-text")
    assert "paella_request_duration_seconds_bucket" in answer.text
    assert "request_id" not in answer.text
