"""What a terminal's Ctrl-C or a service manager tells the whole process group ends the server in
order.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from load_tests.processes import workers
from load_tests.serving import free_port, wait_until_ready
from tests.conftest import wait_until

pytestmark = pytest.mark.process

REQUESTS = 12
PATIENCE_S = 60


@pytest.fixture
def server(bundle: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process that leads a group of its own, and its address."""
    port = free_port()
    environment = {
        **os.environ,
        "PAELLERA_WEIGHTS": str(bundle),
        "PAELLERA_LOG_LEVEL": "warning",
        "PAELLERA_DRAIN_TIMEOUT_S": "30",
    }
    command = [sys.executable, "-m", "tests.fake_server", "--port", str(port)]
    process = subprocess.Popen(
        command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        wait_until_ready(process, f"http://127.0.0.1:{port}/readyz")
        yield process, f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.communicate()


def unfinished(address: str) -> int:
    (line,) = (
        line
        for line in httpx.get(f"{address}/metrics").text.splitlines()
        if line.startswith("paella_queue_depth ")
    )
    return int(float(line.split()[1]))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_to_the_whole_group_lets_the_worker_finish_what_is_running(server, number):
    process, address = server
    (worker,) = workers(process.pid)

    def ask(seed: int) -> int:
        return httpx.post(
            f"{address}/generate", json={"prompt": "slow", "seed": seed}, timeout=PATIENCE_S
        ).status_code

    with ThreadPoolExecutor(REQUESTS) as pool:
        statuses = [pool.submit(ask, seed) for seed in range(REQUESTS)]
        # The worker does one after the other.
        wait_until(
            lambda: sum(status.done() for status in statuses) + unfinished(address) == REQUESTS,
            PATIENCE_S,
        )
        os.killpg(process.pid, number)
        assert [status.result() for status in statuses] == [200] * REQUESTS
    _, log = process.communicate(timeout=PATIENCE_S)
    assert "worker lost" not in log
    assert process.returncode == 0
    assert not Path(f"/proc/{worker}").exists()
