"""The committed nginx configuration, in Debian's nginx before a real server: events at once,
connections kept, bodies bounded, clients named, probes not published.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from load_tests.serving import free_port, wait_until_ready
from server.api import create_app
from server.paths import HEALTH_PATHS
from server.settings import Settings
from server.uvicorn_server import Server
from tests import fake_worker
from tests.conftest import wait_until
from tests.support.nginx import is_listening, start_nginx

CONFIGURATION = Path(__file__).parents[1] / "docker/nginx/paellera.conf"
TEXT = CONFIGURATION.read_text()
MIB = 2**20
PATIENCE_S = 60
# The client's own address: not the one from which nginx calls the server.
CLIENT = "127.0.0.3"

pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(
        shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin") is None,
        reason="no nginx: install nginx-light, as `make nginx` does",
    ),
]


def setting(name: str) -> str:
    """The only value of a directive."""
    (value,) = re.findall(rf"^\s*{name} (.+);", TEXT, flags=re.MULTILINE)
    return value


def seconds(name: str) -> float:
    return float(setting(name).removesuffix("s"))


@dataclass
class Proxied:
    """nginx and the server behind it. port: the server's own."""

    client: httpx.Client
    port: int
    log: Path

    def upstream_connections(self) -> set[int]:
        """nginx's ports of open connections to the server."""
        lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        established = [(line[1], line[2]) for line in lines if line[3] == "01"]
        return {
            int(local.split(":")[1], 16)
            for local, remote in established
            if int(remote.split(":")[1], 16) == self.port
        }

    def metric(self, name: str) -> float:
        """A figure of the server, summed over its labels."""
        text = httpx.get(f"http://127.0.0.1:{self.port}/metrics", timeout=PATIENCE_S).text
        return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name))

    def requests_logged(self) -> list[dict[str, object]]:
        lines = [json.loads(line) for line in self.log.read_text().splitlines() if line[0] == "{"]
        return [line for line in lines if line["message"] == "request"]


def listening(port: int, server_port: int) -> str:
    """Return the committed configuration for these ports."""
    text = TEXT.replace("listen 80;", f"listen 127.0.0.1:{port};")
    return text.replace("server 127.0.0.1:8000;", f"server 127.0.0.1:{server_port};")


@pytest.fixture(scope="module")
def proxied(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxied]:
    directory, port = tmp_path_factory.mktemp("nginx"), free_port()
    environment = {
        **os.environ,
        "PAELLERA_WEIGHTS": str(bundle),
        "PAELLERA_TRUSTED_PROXIES": "127.0.0.1",
    }
    command = [sys.executable, "-m", "tests.fake_server", "--port", str(port)]
    with (
        (directory / "log").open("w") as log,
        subprocess.Popen(command, env=environment, stderr=log) as server,
    ):
        nginx = None
        try:
            wait_until_ready(server, f"http://127.0.0.1:{port}/readyz")
            front = free_port()
            nginx = start_nginx(directory, listening(front, port))
            wait_until(lambda: is_listening(front))
            transport = httpx.HTTPTransport(local_address=CLIENT)
            address = f"http://127.0.0.1:{front}"
            with httpx.Client(base_url=address, transport=transport, timeout=PATIENCE_S) as client:
                yield Proxied(client, port, directory / "log")
        finally:
            for process in (nginx, server):
                if process is not None:
                    process.terminate()
                    process.wait(PATIENCE_S)


def test_its_bounds_are_those_of_the_server(fake_settings: Callable[..., Settings]) -> None:
    fields = Settings.model_fields
    assert setting("client_max_body_size") == f"{fields['max_body_bytes'].default // MIB}m"
    longest = next(each.le for each in fields["timeout_s"].metadata if hasattr(each, "le"))
    assert seconds("proxy_read_timeout") > longest
    assert seconds("proxy_read_timeout") > fields["heartbeat_s"].default
    # uvicorn's own default is 5 s: with it, every hundredth POST through nginx was a 502.
    config = Server(create_app(fake_settings(), worker=fake_worker.main)).config
    assert config.timeout_keep_alive == fields["keep_alive_s"].default
    assert seconds("keepalive_timeout") < config.timeout_keep_alive


def test_an_image_comes_through_and_the_client_is_known_by_its_own_address(
    proxied: Proxied,
) -> None:
    headers = {"X-Request-Id": "through-nginx", "X-Forwarded-For": "203.0.113.7"}
    answer = proxied.client.post("/generate", json={"prompt": "a"}, headers=headers)
    assert answer.headers["content-type"] == "image/png"
    assert answer.headers["x-request-id"] == "through-nginx"

    def logged() -> list[dict[str, object]]:
        return [r for r in proxied.requests_logged() if r["request_id"] == "through-nginx"]

    wait_until(lambda: bool(logged()))
    assert [request["client"] for request in logged()] == [CLIENT]


@pytest.mark.parametrize(("origin", "status"), [("http://evil.example", 403), ("own", 200)])
def test_a_page_is_judged_by_the_address_that_it_asked_not_by_one_that_it_claims(
    proxied: Proxied, origin: str, status: int
) -> None:
    own = str(proxied.client.base_url).rstrip("/")
    headers = {"X-Forwarded-Host": "evil.example", "Origin": own if origin == "own" else origin}
    answer = proxied.client.post("/generate", json={"prompt": "a"}, headers=headers)
    assert answer.status_code == status


def test_events_arrive_while_the_job_still_runs_and_a_leaving_client_cancels_it(
    proxied: Proxied,
) -> None:
    body = {"prompt": "hold", "stream": True}
    with proxied.client.stream("POST", "/generate", json=body) as answer:
        events = answer.iter_lines()
        assert next(events) == "event: queued"
        assert answer.headers["content-type"].startswith("text/event-stream")
        # The server's word to nginx, which keeps it to itself.
        assert "x-accel-buffering" not in answer.headers
        wait_until(lambda: proxied.metric("paella_rows_running") == 1)
    wait_until(lambda: proxied.metric("paella_rows_running") == 0)


def test_a_request_of_http_1_0_without_a_host_is_served(proxied: Proxied) -> None:
    address = proxied.client.base_url
    with socket.create_connection((address.host, address.port), PATIENCE_S) as connection:
        connection.sendall(b"GET /v1/models HTTP/1.0\r\n\r\n")
        status_line = connection.makefile("rb").readline()
    assert status_line.split()[1] == b"200"


def test_connections_to_the_server_outlive_a_pause(proxied: Proxied) -> None:
    def post() -> None:
        assert proxied.client.post("/generate", json={"prompt": "a"}).status_code == 200

    post()
    before = proxied.upstream_connections()
    assert before
    time.sleep(0.5)
    assert proxied.upstream_connections() == before
    post()
    assert proxied.upstream_connections() == before


def test_a_body_as_large_as_the_server_takes_is_passed_on_and_a_larger_one_refused_by_nginx(
    proxied: Proxied,
) -> None:
    limit = Settings.model_fields["max_body_bytes"].default
    headers = {"Content-Type": "application/json"}
    within = proxied.client.post("/generate", content=b" " * limit, headers=headers)
    assert within.json()["error"]["code"]
    beyond = proxied.client.post("/generate", content=b" " * (limit + 1), headers=headers)
    assert beyond.status_code == 413
    assert "nginx" in beyond.headers["server"]
    assert "nginx" in beyond.text


@pytest.mark.parametrize("written", ["{}", "{}/", "/{}", "{}//", "{}/.", "{}?a=1", "/x/..{}"])
@pytest.mark.parametrize("path", HEALTH_PATHS)
def test_health_and_metrics_are_not_published(proxied: Proxied, path: str, written: str) -> None:
    target = written.format(path)
    answer = proxied.client.get("/", extensions={"target": target.encode()})
    assert answer.status_code == 404
    assert "nginx" in answer.text
