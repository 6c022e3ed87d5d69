"""The command line, called in this process, and what it says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from load_tests.serving import Server, serving
from server.cli import app


def paellera(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def assert_one_line(stderr: str, code: int, expected_code: int, *words: str) -> None:
    assert code == expected_code, stderr
    (line,) = stderr.splitlines()
    assert line.startswith("paellera: ")
    for word in words:
        assert word in line


@pytest.fixture(name="server", scope="module")
def server_fixture(random_bundle: Path) -> Iterator[Server]:
    with serving({"PAELLERA_WEIGHTS": str(random_bundle)}) as server:
        yield server
