"""The image's health check asks the address that the server listens on."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from load_tests.serving import serving
from server.health_check import address
from server.settings import Settings


def listens_at(environment: dict[str, str], url: str) -> bool:
    """Return whether the server of this environment has the URL's port and kind of address."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        settings = Settings()
    asked = httpx.URL(url)
    local = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host)
    return (asked.host, asked.port or 80) == (local, settings.operations_port or settings.port)


def test_the_check_imports_nothing_but_the_standard_library() -> None:
    code = (
        "import sys; import server.health_check;"
        " sys.exit(str(sys.modules.keys() & {'pydantic', 'fastapi', 'torch'} or ''))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == ""


@pytest.mark.parametrize(
    ("environment", "url"),
    [
        ({}, "http://127.0.0.1:8000/readyz"),
        ({"PAELLERA_HOST": "", "PAELLERA_PORT": ""}, "http://127.0.0.1:8000/readyz"),
        ({"PAELLERA_HOST": "0.0.0.0", "PAELLERA_PORT": "9"}, "http://127.0.0.1:9/readyz"),
        ({"PAELLERA_HOST": "::"}, "http://[::1]:8000/readyz"),
        ({"PAELLERA_HOST": "fd00::7"}, "http://[fd00::7]:8000/readyz"),
        ({"PAELLERA_HOST": "10.0.0.7"}, "http://10.0.0.7:8000/readyz"),
        ({"PAELLERA_HOST": "localhost"}, "http://localhost:8000/readyz"),
        ({"PAELLERA_PORT": "tcp://10.96.12.3:8000"}, "http://127.0.0.1:8000/readyz"),
        ({"PAELLERA_PORT": "9", "PAELLERA_OPERATIONS_PORT": "10"}, "http://127.0.0.1:10/readyz"),
        ({"PAELLERA_PORT": " 9\r"}, "http://127.0.0.1:9/readyz"),
        ({"PAELLERA_PORT": "9", "PAELLERA_OPERATIONS_PORT": " "}, "http://127.0.0.1:9/readyz"),
        ({"PAELLERA_HOST": " "}, "http://127.0.0.1:8000/readyz"),
        ({"paellera_host": "0.0.0.0", "Paellera_Port": "9"}, "http://127.0.0.1:9/readyz"),
    ],
)
def test_the_check_asks_the_configured_address(environment: dict[str, str], url: str) -> None:
    assert address(environment) == url
    assert listens_at(environment, url)


@pytest.mark.process
@pytest.mark.skipif(not socket.has_ipv6, reason="needs IPv6")
def test_a_server_on_all_addresses_answers_ipv4_and_ipv6_and_its_check(bundle: Path) -> None:
    settings = {"PAELLERA_HOST": "::", "PAELLERA_WEIGHTS": str(bundle)}
    with serving(settings, ("-m", "tests.fake_server")) as server:
        port = server.url.rpartition(":")[2]
        for host in ("127.0.0.1", "[::1]"):
            assert httpx.get(f"http://{host}:{port}/healthz").status_code == 200
        check = [sys.executable, "-P", "-m", "server.health_check"]
        root = Path(__file__).parents[1]
        environment = {**settings, "PAELLERA_PORT": port, "PYTHONPATH": str(root)}
        done = subprocess.run(check, env=environment, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr
    done = subprocess.run(check, env=environment, capture_output=True, check=False)
    assert done.returncode == 1
