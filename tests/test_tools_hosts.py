"""The names by which tools call a server: Prometheus, the image's health check, curl, nginx's
default and OpenAI's client by service name work beyond loopback; on loopback only probes and
metrics are for every name.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import yaml

from load_tests.serving import free_port, serving
from tests.conftest import wait_until
from tests.support.nginx import is_listening, start_nginx
from tests.support.prometheus import needs_prometheus

pytestmark = pytest.mark.process

# The service's name in a composition or a cluster, which resolves to no loopback address there.
SERVICE = "paellera"
FAKE = ("-m", "tests.fake_server")
PATIENCE_S = 60
PROXY = """
server {{
    listen 127.0.0.1:{port};
    location / {{ proxy_pass http://{upstream}; }}
}}
upstream paellera {{ server 127.0.0.1:{server_port}; }}
"""


def port_of(url: str) -> int:
    return int(url.rpartition(":")[2])


@pytest.fixture(scope="module")
def beyond(bundle: Path) -> Iterator[str]:
    """The address of a server on all addresses, as in the image."""
    with serving({"PAELLERA_HOST": "0.0.0.0", "PAELLERA_WEIGHTS": str(bundle)}, FAKE) as server:
        yield server.url


@pytest.fixture(scope="module")
def local(bundle: Path) -> Iterator[str]:
    """The address of a server on loopback, the default."""
    with serving({"PAELLERA_WEIGHTS": str(bundle)}, FAKE) as server:
        yield server.url


@pytest.fixture(params=["beyond", "local"])
def either(request: pytest.FixtureRequest) -> str:
    return str(request.getfixturevalue(request.param))


@pytest.fixture
def resolving(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the service's name mean this machine."""
    resolve = socket.getaddrinfo

    def resolve_service(host: Any, *rest: Any, **options: Any) -> Any:
        return resolve("127.0.0.1" if host == SERVICE else host, *rest, **options)

    monkeypatch.setattr(socket, "getaddrinfo", resolve_service)


# ── probes and metrics: under any name, wherever the server listens ───────────────────────────────


@needs_prometheus
def test_prometheus_scrapes_the_service_by_its_name(either: str, tmp_path: Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    # As a proxy the server is sent what the service would be sent.
    scrape = {
        "job_name": "paellera",
        "scrape_interval": "1s",
        "proxy_url": either,
        "static_configs": [{"targets": [f"{SERVICE}:8000"]}],
    }
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump({"scrape_configs": [scrape]}))
    command = ["prometheus", f"--config.file={tmp_path / 'prometheus.yml'}",
               f"--storage.tsdb.path={tmp_path / 'data'}",
               f"--web.listen-address={address}"]  # fmt: skip

    def targets() -> list[dict[str, Any]]:
        try:
            answer = httpx.get(f"http://{address}/api/v1/targets")
        except httpx.TransportError:
            return []
        if answer.status_code != httpx.codes.OK:
            return []
        found: list[dict[str, Any]] = answer.json()["data"]["activeTargets"]
        return [target for target in found if target["health"] != "unknown"]

    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        try:
            wait_until(lambda: bool(targets()), timeout_s=PATIENCE_S)
            (target,) = targets()
        finally:
            process.terminate()
    assert target["scrapeUrl"] == f"http://{SERVICE}:8000/metrics"
    assert (target["health"], target["lastError"]) == ("up", "")


@pytest.mark.parametrize("path", ["/healthz", "/health", "/readyz", "/metrics"])
def test_curl_asks_for_health_by_the_service_s_name(either: str, path: str) -> None:
    assert curl(either, path) == 200


def test_the_image_s_check_asks_an_address_that_is_not_among_the_allowed_hosts(
    bundle: Path,
) -> None:
    settings = {
        "PAELLERA_HOST": "0.0.0.0",
        "PAELLERA_ALLOWED_HOSTS": "images.example.com",
        "PAELLERA_WEIGHTS": str(bundle),
    }
    with serving(settings, FAKE) as server:
        assert httpx.get(f"{server.url}/v1/models").status_code == 400
        environment = {
            **settings,
            "PAELLERA_PORT": str(port_of(server.url)),
            "PYTHONPATH": str(Path(__file__).parents[1]),
        }
        check = [sys.executable, "-P", "-m", "server.health_check"]
        done = subprocess.run(check, env=environment, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr


# ── the API: beyond loopback under any name, on loopback under its own ────────────────────────────


def test_curl_asks_the_api_by_the_service_s_name(beyond: str, local: str) -> None:
    assert curl(beyond, "/v1/models") == 200
    assert curl(local, "/v1/models") == 400


@pytest.mark.usefixtures("resolving")
def test_openai_s_client_draws_by_the_service_s_name(beyond: str, local: str) -> None:
    with client_of(beyond) as client:
        assert client.images.generate(prompt="a").data[0].b64_json
    with client_of(local) as client, pytest.raises(openai.BadRequestError) as refused:
        client.images.generate(prompt="a")
    assert refused.value.code == "host_not_allowed"
    assert "PAELLERA_ALLOWED_HOSTS" in refused.value.message


@pytest.mark.skipif(
    shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin") is None,
    reason="no nginx: install nginx-light, as `make nginx` does",
)
@pytest.mark.parametrize("upstream", ["name", "address"])
def test_nginx_passes_its_own_name_for_the_server_on_by_default(
    beyond: str, local: str, tmp_path: Path, upstream: str
) -> None:
    """The Host is then what `proxy_pass` names."""
    statuses = {}
    for where, url in (("beyond", beyond), ("local", local)):
        directory = tmp_path / where
        directory.mkdir()
        named = SERVICE if upstream == "name" else f"127.0.0.1:{port_of(url)}"
        with proxied(directory, named, port_of(url)) as front:
            answer = httpx.post(f"{front}/generate", json={"prompt": "a"}, timeout=PATIENCE_S)
            statuses[where] = answer.status_code
    assert statuses == {"beyond": 200, "local": 400 if upstream == "name" else 200}


def curl(url: str, path: str) -> int:
    """Return the status of a request for the service."""
    port = port_of(url)
    command = ["curl", "--silent", "--output", os.devnull, "--write-out", "%{http_code}"]
    command += ["--resolve", f"{SERVICE}:{port}:127.0.0.1", f"http://{SERVICE}:{port}{path}"]
    return int(subprocess.run(command, capture_output=True, check=True).stdout)


@contextmanager
def proxied(directory: Path, upstream: str, server_port: int) -> Iterator[str]:
    """nginx with nothing but a `proxy_pass`; gives its address."""
    port = free_port()
    text = PROXY.format(port=port, upstream=upstream, server_port=server_port)
    with start_nginx(directory, text) as process:
        try:
            wait_until(lambda: is_listening(port))
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()


def client_of(url: str) -> openai.OpenAI:
    address = f"http://{SERVICE}:{port_of(url)}/v1"
    return openai.OpenAI(base_url=address, api_key="none needed", max_retries=0)
