"""Log lines are JSON, whatever is in them, and a reader that stands still stops nobody."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import httpx
import pytest

from load_tests.serving import free_port, wait_until_ready
from server.logs import BackgroundHandler, JSONFormatter

PIPE_BYTES = 64 * 1024


def test_a_line_is_one_json_object_with_the_records_fields() -> None:
    record = logging.LogRecord(
        "server.access", logging.INFO, __file__, 1, "got %s", ('a "quoted"\nline',), None
    )
    record.fields = {"status": 200}
    text = JSONFormatter().format(record)
    line = json.loads(text)
    assert (line["message"], line["status"], line["level"]) == ('got a "quoted"\nline', 200, "info")
    assert datetime.fromisoformat(line["time"]).timestamp() == pytest.approx(
        record.created, abs=1e-3
    )
    assert "\n" not in text


def test_an_exception_is_part_of_its_line() -> None:
    try:
        raise ValueError("why")
    except ValueError:
        record = logging.LogRecord(
            "server", logging.ERROR, __file__, 1, "failed", (), sys.exc_info()
        )
    assert "ValueError: why" in json.loads(JSONFormatter().format(record))["exception"]


# ── a reader that stands still ────────────────────────────────────────────────────────────────────


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """Descriptors for reading and writing."""
    reading, writing = os.pipe()
    yield reading, writing
    os.close(reading)
    # The handler's thread ends with the process; its descriptor must not become another file's.


def record_of(message: str, level: int = logging.INFO) -> logging.LogRecord:
    return logging.LogRecord("server", level, __file__, 1, message, (), None)


def test_lines_beyond_the_bound_are_dropped_and_their_number_is_logged(
    pipe: tuple[int, int],
) -> None:
    reading, writing = pipe
    handler = BackgroundHandler(writing, max_bytes=10_000)
    for _ in range(2 * PIPE_BYTES // 100):
        handler.emit(record_of("x" * 100))
    assert handler.dropped > 0
    told = 0
    with os.fdopen(os.dup(reading)) as lines:
        while told < handler.dropped:
            told += json.loads(lines.readline()).get("dropped", 0)
    assert told == handler.dropped


def test_a_critical_line_is_written_before_the_process_ends(pipe: tuple[int, int]) -> None:
    reading, writing = pipe
    handler = BackgroundHandler(writing)
    handler.emit(record_of("device failed", logging.CRITICAL))
    os.set_blocking(reading, False)
    assert json.loads(os.read(reading, 10_000))["message"] == "device failed"


def test_a_critical_line_does_not_wait_for_a_reader_without_end(pipe: tuple[int, int]) -> None:
    handler = BackgroundHandler(pipe[1])
    began = time.monotonic()
    handler.emit(record_of("x" * 2 * PIPE_BYTES, logging.CRITICAL))
    assert time.monotonic() - began < 30


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="writes to /dev/full")
def test_lines_that_find_a_full_disk_are_counted_and_told_when_there_is_room_again(
    tmp_path: Path,
) -> None:
    descriptor = os.open("/dev/full", os.O_WRONLY)
    handler = BackgroundHandler(descriptor)
    for _ in range(3):
        handler.emit(record_of("lost"))
    handler.flush()
    assert handler.dropped == 3
    with (tmp_path / "log").open("w") as file:
        os.dup2(file.fileno(), descriptor)
    handler.emit(record_of("written"))
    handler.flush()
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert [line["message"] for line in lines] == ["written", "log lines dropped"]
    assert (lines[1]["dropped"], handler.dropped) == (3, 3)


@pytest.mark.process
def test_a_server_whose_log_nobody_reads_answers_and_stops(bundle: Path) -> None:
    port = free_port()
    environment = {**os.environ, "PAELLERA_WEIGHTS": str(bundle), "PAELLERA_LOG_LEVEL": "info"}
    command = [sys.executable, "-m", "tests.fake_server", "--port", str(port)]
    server = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)
    assert server.stderr is not None
    try:
        wait_until_ready(server, f"http://127.0.0.1:{port}/readyz")
        headers = {"X-Request-Id": "x" * 128}
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", headers=headers) as client:
            for _ in range(PIPE_BYTES // 300):
                assert client.get("/healthz", timeout=60).status_code == 200
            assert client.post("/generate", json={"prompt": "a"}, timeout=60).status_code == 200
        server.terminate()
        assert server.wait(60) == 0
    finally:
        server.kill()
        server.wait()
        server.stderr.close()


# ── no reader at all ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.process
@pytest.mark.parametrize("closed", ["2>&-", "<&- >&- 2>&-"])
def test_a_server_whose_standard_streams_are_closed_serves_without_a_log(
    bundle: Path, closed: str
) -> None:
    port = free_port()
    environment = {**os.environ, "PAELLERA_WEIGHTS": str(bundle), "PAELLERA_LOG_LEVEL": "info"}
    command = [sys.executable, "-m", "tests.fake_server", "--port", str(port)]
    server = subprocess.Popen(["sh", "-c", f'exec "$@" {closed}', "sh", *command], env=environment)
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until_ready(server, f"{url}/readyz")
        if Path("/proc/self/fd").exists():
            # No socket or pipe: native code would write its messages into it.
            assert Path(f"/proc/{server.pid}/fd/2").readlink() == Path(os.devnull)
        assert httpx.post(f"{url}/generate", json={"prompt": "a"}, timeout=60).status_code == 200
        server.terminate()
        assert server.wait(60) == 0
    finally:
        server.kill()
        server.wait()
