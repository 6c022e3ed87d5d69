"""A worker's process from outside, on a real server process: it ends with the server, is replaced
when it stands still, needs nothing of the start directory, and says why it did not start.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import torch

from load_tests.processes import runs, workers
from load_tests.serving import free_port
from server.engine.child import MAX_REASON, describe
from server.engine.cpu_environment import faster_allocator
from tests.conftest import wait_until
from tests.fake_worker import LOADING
from tests.test_api import metric

ROOT = Path(__file__).parents[1]
FAKE_SERVER = ("-m", "tests.fake_server")
PAELLERA = ("-m", "server.cli", "serve")


@dataclass(frozen=True)
class Started:
    """A server process, whether it is ready or not."""

    process: subprocess.Popen[bytes]
    url: str
    log: Path

    @property
    def workers(self) -> list[int]:
        return workers(self.process.pid)

    def readiness(self) -> httpx.Response | None:
        """None while nobody listens."""
        try:
            return httpx.get(f"{self.url}/readyz", timeout=20)
        except httpx.TransportError:
            return None

    @property
    def ready(self) -> bool:
        answer = self.readiness()
        return answer is not None and answer.status_code == 200

    @property
    def reason(self) -> str:
        """Empty while it is ready, or nobody listens."""
        answer = self.readiness()
        if answer is None or answer.status_code == 200:
            return ""
        return str(answer.json()["error"]["message"])

    def lines(self) -> list[dict[str, object]]:
        """The log. Fails for a line that is not JSON."""
        return [json.loads(line) for line in self.log.read_text().splitlines()]


@contextmanager
def started(folder: Path, *command: str, cwd: Path = ROOT, **settings: object) -> Iterator[Started]:
    """A server; settings without their prefix. cwd: its start directory."""
    port, log = free_port(), folder / "log.jsonl"
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        **{f"PAELLERA_{name.upper()}": str(value) for name, value in settings.items()},
    }
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-P", *command, "--port", str(port)],
            env=environment,
            stderr=file,
            cwd=cwd,
        )
    try:
        yield Started(process, f"http://127.0.0.1:{port}", log)
    finally:
        process.kill()
        process.wait()


def loading_worker(server: Started) -> int:
    """The process of a `slow_to_start` worker, once it does what this worker does: by then it has
    told the kernel that it ends with the server.
    """
    wait_until(lambda: server.reason == "starting" and LOADING in server.log.read_text())
    (worker,) = server.workers
    return worker


# ── it ends with the server ───────────────────────────────────────────────────────────────────────


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
@pytest.mark.parametrize("stopped", [True, False])
def test_a_loading_worker_ends_with_a_killed_server_even_if_it_is_stopped(
    tmp_path: Path, bundle: Path, stopped: bool
) -> None:
    with started(tmp_path, *FAKE_SERVER, "slow_to_start", weights=bundle) as server:
        worker = loading_worker(server)
        if stopped:
            os.kill(worker, signal.SIGSTOP)
        server.process.kill()
        wait_until(lambda: not runs(worker), timeout_s=20)


@pytest.mark.skipif(faster_allocator() is None, reason="install libtcmalloc-minimal4")
@pytest.mark.parametrize("said", [None, ""])
def test_tcmalloc_is_in_the_worker_and_not_in_the_api_process_unless_it_was_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, bundle: Path, said: str | None
) -> None:
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    if said is not None:
        monkeypatch.setenv("LD_PRELOAD", said)
    with started(tmp_path, *FAKE_SERVER, weights=bundle) as server:
        wait_until(lambda: server.ready)
        (worker,) = server.workers
        loaded = {
            process: "tcmalloc" in Path(f"/proc/{process}/maps").read_text()
            for process in (worker, server.process.pid)
        }
        assert loaded == {worker: said is None, server.process.pid: False}


def test_elsewhere_than_on_linux_it_ends_with_its_standard_input() -> None:
    code = "import time; from server.engine.child import *; enter(__import__('os').getppid());"
    start = f"import server.engine.child as c; c.killed_with_parent = lambda: False; {code}"
    command = [sys.executable, "-c", f"{start} print(1, flush=True); time.sleep(60)"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT
    ) as process:
        assert process.stdin
        assert process.stdout
        assert process.stdout.readline() == b"1\n"
        process.stdin.close()
        assert process.wait(20) == 1


def test_a_parent_that_has_ended_before_the_kernel_was_told_is_noticed() -> None:
    code = "from server.engine.child import enter; enter(1); print('lives on')"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, check=False, cwd=ROOT, timeout=60
    )
    assert (found.returncode, found.stdout) == (1, b"")


# ── it is replaced ────────────────────────────────────────────────────────────────────────────────


def test_an_idle_worker_that_is_stopped_is_reported_and_replaced(
    tmp_path: Path, bundle: Path
) -> None:
    with started(tmp_path, *FAKE_SERVER, weights=bundle, stall_timeout_s=2) as server:
        wait_until(lambda: server.ready)
        (worker,) = server.workers
        os.kill(worker, signal.SIGSTOP)
        wait_until(lambda: "has not answered for 2 s" in server.reason)
        wait_until(lambda: server.ready)
        assert worker not in server.workers


def test_a_loading_worker_that_is_stopped_is_replaced_after_the_start_timeout(
    tmp_path: Path, bundle: Path
) -> None:
    settings = {"weights": bundle, "start_timeout_s": 2}
    with started(tmp_path, *FAKE_SERVER, "slow_to_start", **settings) as server:
        worker = loading_worker(server)
        os.kill(worker, signal.SIGSTOP)
        wait_until(lambda: "was not ready after 2 s and was killed" in server.reason)
        wait_until(lambda: server.workers not in ([], [worker]))


def test_a_worker_needs_neither_the_start_directory_nor_the_modules_in_it(
    tmp_path: Path, bundle: Path
) -> None:
    directory = tmp_path / "start"
    directory.mkdir()
    for name in ("pickle", "signal", "logging"):
        (directory / f"{name}.py").write_text("raise SystemExit('imported from here')")
    with started(tmp_path, *FAKE_SERVER, cwd=directory, weights=bundle) as server:
        wait_until(lambda: server.ready)
        shutil.rmtree(directory)
        (worker,) = server.workers
        os.kill(worker, signal.SIGKILL)
        wait_until(lambda: server.workers not in ([], [worker]) and server.ready)
        # Each line is JSON: the greeting, a lost worker, python-multipart's warnings.
        kind = {"content-type": "multipart/form-data; boundary=x"}
        httpx.post(f"{server.url}/generate", content=b"--y\r\n", headers=kind, timeout=20)
        wait_until(lambda: "boundary character" in server.log.read_text())
        messages = [line["message"] for line in server.lines()]
    assert {"server starting", "worker lost"} <= set(messages)


def test_a_server_stays_ready_while_one_of_two_workers_is_replaced(
    tmp_path: Path, bundle: Path
) -> None:
    with (
        started(tmp_path, *FAKE_SERVER, weights=bundle, devices="cpu,cpu") as server,
        httpx.Client(base_url=server.url) as client,
    ):
        wait_until(lambda: server.ready)
        # It is while any worker is.
        wait_until(lambda: all(metric(client, "paella_worker_ready", worker=w) for w in "01"))
        first, second = server.workers
        os.kill(first, signal.SIGSTOP)
        os.kill(first, signal.SIGKILL)
        answers = []
        while len(server.workers) < 2 or first in server.workers:
            answers.append(server.ready)
        assert answers
        assert all(answers)
        assert second in server.workers


# ── two of them share a CPU ───────────────────────────────────────────────────────────────────────


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core is not shared")
def test_workers_that_compute_at_once_share_the_cores_and_draw_the_same_bytes(
    tmp_path: Path, random_bundle: Path
) -> None:
    settings = {"weights": random_bundle, "devices": "cpu,cpu", "dtype": "float32"}
    body = {"prompt": "a red circle", "seed": 1, "deterministic": True, "num_inference_steps": 32}

    def threads(client: httpx.Client) -> list[float]:
        return [metric(client, "paella_worker_threads", worker=w) for w in "01"]

    with (
        started(tmp_path, *PAELLERA, **settings) as server,
        httpx.Client(base_url=server.url, timeout=60) as client,
        ThreadPoolExecutor(4) as callers,
    ):
        wait_until(lambda: server.ready)
        wait_until(lambda: all(metric(client, "paella_worker_ready", worker=w) for w in "01"))
        long = body | {"n": 8, "deterministic": False, "response_format": "json"}
        held = [callers.submit(client.post, "/generate", json=long) for _ in range(2)]
        cores = len(os.sched_getaffinity(0))
        wait_until(lambda: all(0 < each <= cores // 2 for each in threads(client)))
        answers = [callers.submit(client.post, "/generate", json=body) for _ in range(4)]
        assert len({answer.result().content for answer in answers}) == 1
        assert {answer.result().status_code for answer in (*held, *answers)} == {200}


# ── it says why it did not start ──────────────────────────────────────────────────────────────────


def cut(bundle: Path, folder: Path) -> Path:
    """The bundle with half of its VQGAN."""
    shutil.copytree(bundle, folder)
    content = (folder / "vqgan.safetensors").read_bytes()
    (folder / "vqgan.safetensors").write_bytes(content[: len(content) // 2])
    return folder


@pytest.mark.parametrize("fault", ["truncated weights", "absent device"])
def test_a_first_start_that_can_never_succeed_ends_the_server_with_its_reason(
    tmp_path: Path, random_bundle: Path, fault: str
) -> None:
    if fault == "absent device":
        if torch.cuda.is_available():
            pytest.skip("this machine has CUDA")
        settings, words = {"weights": random_bundle, "device": "cuda"}, "device 'cuda' is not there"
    else:
        settings = {"weights": cut(random_bundle, tmp_path / "cut")}
        words = "vqgan.safetensors has"
    with started(tmp_path, *PAELLERA, **settings) as server:
        assert server.process.wait(120) == 2
        last = next(line for line in server.lines() if line["message"] == "server stopped")
    assert words in str(last["reason"])
    assert "another is starting" not in str(last["reason"])


def test_a_start_that_fails_for_a_passing_reason_is_repeated_and_explained(
    tmp_path: Path, bundle: Path
) -> None:
    with started(tmp_path, *FAKE_SERVER, "out_of_memory", weights=bundle) as server:
        reason = "the worker did not start: MemoryError: all of it is taken; another is starting"
        wait_until(lambda: server.reason == reason)
        wait_until(lambda: [line["message"] for line in server.lines()].count("worker lost") > 1)
        crash = next(line for line in server.lines() if line["message"] == "worker crashed")
        assert "Traceback" in str(crash["exception"])
        assert server.process.poll() is None


def test_an_error_is_described_in_one_printable_line_of_bounded_length() -> None:
    assert describe(ValueError("a\n\x1b[31mb")) == "a [31mb"
    assert describe(RuntimeError("no")) == "RuntimeError: no"
    assert describe(ValueError()) == "ValueError"
    assert len(describe(ValueError("x" * 10_000))) == MAX_REASON + 1
