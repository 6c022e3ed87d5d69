"""A log that cannot be written, because the disk under it is full, is no reason not to serve."""

from __future__ import annotations

import re
from pathlib import Path

import httpx
import pytest

from load_tests.serving import serving

pytestmark = pytest.mark.process

FULL = Path("/dev/full")
FAKE_SERVER = ("-m", "tests.fake_server")


def test_a_server_whose_log_has_no_room_starts_answers_and_stops_in_order(bundle: Path) -> None:
    settings = {"PAELLERA_WEIGHTS": str(bundle), "PAELLERA_LOG_LEVEL": "debug"}
    with serving(settings, FAKE_SERVER, output=FULL) as server:
        statuses = [
            httpx.post(f"{server.url}/generate", json={"prompt": "a ball"}, timeout=60).status_code
            for _ in range(3)
        ]
        lost = re.search(
            r"^paella_log_lines_dropped_total (\S+)",
            httpx.get(f"{server.url}/metrics").text,
            re.MULTILINE,
        )
        server.process.terminate()
        assert server.process.wait(60) == 0
    assert statuses == [200] * 3
    assert lost is not None
    assert float(lost[1]) > 0
