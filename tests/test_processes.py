"""What /proc is read for, on this process and one of its children."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from load_tests import processes

pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc"),
]
NOBODY = 2**30


@pytest.fixture
def child() -> Iterator[int]:
    """A process that has one file open beside the usual three, and lives until its input ends."""
    script = "import sys; file = open(sys.executable); print('ready', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process.pid


def test_a_child_is_found_with_its_files_threads_and_memory(child: int) -> None:
    assert child in processes.children(os.getpid())
    assert child in processes.family(os.getpid())
    assert child not in processes.workers(os.getpid())
    assert processes.open_files(child) == 4
    assert processes.threads(child) == 1
    now, peak = processes.resident_mib(child), processes.resident_mib(child, peak=True)
    assert now is not None
    assert peak is not None
    assert 1 < now <= peak < 1000


def test_the_machine_has_worked_at_least_as_much_as_this_process() -> None:
    assert 0 < processes.cpu_seconds(os.getpid()) <= processes.machine_cpu_seconds()


def test_a_process_that_is_not_there_has_nothing() -> None:
    assert processes.children(NOBODY) == []
    assert processes.resident_mib(NOBODY) is None
    assert processes.threads(NOBODY) is None
    assert processes.open_files(NOBODY) is None
    assert processes.cpu_seconds(NOBODY) == 0
