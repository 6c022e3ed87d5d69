"""The server answers only to names that are its own, and changes nothing for foreign pages; probes,
metrics and programs that are no browsers are not concerned.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import httpx
import pytest
from pydantic import ValidationError

from server.api.origins import Authority
from server.settings import Settings
from tests.support.api_keys import KEY
from tests.support.servers import Configure, asking
from tests.support.uvicorn_servers import all_answered, listening

EVIL = "https://evil.example"
BODY = b'{"prompt": ""}'


def sent(
    port: int, path: str, method: str = "GET", headers: Mapping[str, str] | None = None
) -> tuple[int, str | None]:
    """(status, code of the error) of a request whose headers, Host among them, are only these."""
    fields = {"Host": f"127.0.0.1:{port}", **(headers or {})}
    head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    body = b"" if method in ("GET", "HEAD") else BODY
    request = (
        f"{method} {path} HTTP/1.1\r\n{head}Connection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    head, _, content = all_answered(port, request.encode() + body).partition(b"\r\n\r\n")
    status = int(head.split(b" ")[1])
    return status, json.loads(content)["error"]["code"] if content and status >= 400 else None


@pytest.fixture(scope="module")
def local(fake_settings: Configure) -> Iterator[int]:
    """A server with the default settings, bound to loopback."""
    with listening(fake_settings()) as (port,):
        yield port


@contextmanager
def configured(fake_settings: Configure, **settings: object) -> Iterator[int]:
    with listening(fake_settings(**settings)) as (port,):
        yield port


# ── hosts ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.process
@pytest.mark.parametrize(
    "host",
    ["localhost", "LOCALHOST.:8000", "paint.localhost:1", "127.0.0.1", "[::1]:8000", "10.1.2.3"],
)
def test_on_loopback_local_names_and_addresses_are_answered(local: int, host: str) -> None:
    assert sent(local, "/v1/models", headers={"Host": host}) == (200, None)


@pytest.mark.process
@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.evil.example",
     "evil@localhost", "notlocalhost", "2130706433", "localhost/", "local host", ""],
)  # fmt: skip
@pytest.mark.parametrize("path", ["/", "/v1/models", "/docs", "/openapi.json"])
def test_on_loopback_a_name_that_somebody_pointed_here_is_not_answered(
    local: int, host: str, path: str
) -> None:
    assert sent(local, path, headers={"Host": host}) == (400, "host_not_allowed")


def test_a_name_that_is_not_answered_is_shown_to_80_characters(fake_settings: Configure) -> None:
    client = asking(fake_settings())
    answer = client.get("http://127.0.0.1/v1/models", headers={"Host": "x" * 100})
    assert answer.status_code == 400
    assert f"(sent: '{'x' * 80}')" in answer.json()["error"]["message"]


@pytest.mark.process
@pytest.mark.parametrize("path", ["/healthz", "/health", "/metrics"])
def test_probes_and_metrics_are_answered_under_any_name(local: int, path: str) -> None:
    assert sent(local, path, headers={"Host": "prometheus.example"}) == (200, None)
    assert sent(local, path, "HEAD", headers={"Host": "prometheus.example"}) == (200, None)


@pytest.mark.process
def test_beyond_loopback_any_name_is_answered_unless_some_are_listed(
    fake_settings: Configure,
) -> None:
    with configured(fake_settings, host="0.0.0.0") as port:
        assert sent(port, "/v1/models", headers={"Host": "server:8000"})[0] == 200
    listed = {"host": "0.0.0.0", "allowed_hosts": "images.example.com, *.svc.local,[fd00::1]"}
    with configured(fake_settings, **listed, public_url="https://Paint.example:8443/x") as port:
        statuses = {
            host: sent(port, "/v1/models", headers={"Host": host})[0]
            for host in ("images.example.com:80", "a.b.svc.local", "[FD00::1]:8000",
                         "paint.example", "svc.local", "localhost", "127.0.0.1")
        }  # fmt: skip
    assert [host for host, status in statuses.items() if status == 200] == list(statuses)[:4]
    assert set(statuses.values()) == {200, 400}


@pytest.mark.process
def test_a_request_without_a_host_is_no_browser_s_and_of_two_hosts_neither_counts(
    local: int,
) -> None:
    assert all_answered(local, b"GET /v1/models HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 200")
    hosts = b"Host: localhost\r\nHost: evil.example\r\nConnection: close\r\n\r\n"
    assert b" 400 " in all_answered(local, b"GET /v1/models HTTP/1.1\r\n" + hosts)[:20]


@pytest.mark.process
def test_the_operations_port_is_answered_under_any_name(fake_settings: Configure) -> None:
    with listening(fake_settings(), ports=2) as (port, operations):
        assert sent(operations, "/metrics", headers={"Host": "server:8001"})[0] == 200
        assert sent(port, "/v1/models", headers={"Host": "server:8000"})[0] == 400


@pytest.mark.parametrize("host", ["https://x", "x:8000", "x/y", "*x", "a..*", "a b"])
def test_hosts_that_could_never_match_are_refused(host: str) -> None:
    with pytest.raises(ValidationError, match="allowed_hosts"):
        Settings(allowed_hosts=host)


# ── pages ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.process
@pytest.mark.parametrize(
    "headers",
    [
        {"Sec-Fetch-Site": "cross-site", "Origin": EVIL},
        {"Sec-Fetch-Site": "same-site", "Origin": "http://localhost:3000"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "something-new"},
        {"Origin": EVIL},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:1"},
        {"Origin": "https://127.0.0.1"},
        {"Origin": ""},
        {"Origin": EVIL, "X-Forwarded-Host": "evil.example"},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", "/generate"), ("POST", "/v1/images/edits"), ("DELETE", "/requests/x")],
)
def test_a_foreign_page_changes_nothing(
    local: int, headers: dict[str, str], method: str, path: str
) -> None:
    assert sent(local, path, method, headers) == (403, "foreign_origin")


@pytest.mark.process
@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Sec-Fetch-Site": "same-origin", "Origin": EVIL},
        {"Sec-Fetch-Site": "none"},
        {"Origin": "http://127.0.0.1:{port}"},
        {"Origin": "https://localhost", "Host": "localhost"},
        {"Origin": "http://localhost", "Host": "LOCALHOST:80"},
    ],
    ids=str,
)
def test_the_server_s_own_page_and_programs_pass(local: int, headers: dict[str, str]) -> None:
    fields = {name: value.format(port=local) for name, value in headers.items()}
    assert sent(local, "/generate", "POST", fields) == (422, "missing_field")


@pytest.mark.process
def test_reading_is_left_to_the_browser_s_own_rules(local: int) -> None:
    headers = {"Sec-Fetch-Site": "cross-site", "Origin": EVIL}
    assert sent(local, "/v1/models", headers=headers) == (200, None)


@pytest.mark.process
@pytest.mark.parametrize(
    ("settings", "headers"),
    [
        ({"cors_origins": EVIL}, {"Sec-Fetch-Site": "cross-site", "Origin": EVIL}),
        ({"cors_origins": EVIL}, {"Origin": EVIL}),
        ({"cors_origins": "*"}, {"Sec-Fetch-Site": "cross-site", "Origin": "null"}),
        ({"public_url": f"{EVIL}:443/paint/"}, {"Origin": EVIL}),
        (
            {"trusted_proxies": "127.0.0.1"},
            {"Origin": EVIL, "X-Forwarded-Host": "inner.example, evil.example"},
        ),
    ],
    ids=str,
)
def test_what_the_settings_allow_passes(
    fake_settings: Configure, settings: dict[str, str], headers: dict[str, str]
) -> None:
    with configured(fake_settings, **settings) as port:
        assert sent(port, "/generate", "POST", headers) == (422, "missing_field")
        other = headers | {"Origin": "https://other.example"}
        foreign = (403, "foreign_origin")
        assert sent(port, "/generate", "POST", other) == foreign or "*" in settings.values()


@pytest.mark.process
def test_a_foreign_page_is_refused_before_its_key_is_looked_at(fake_settings: Configure) -> None:
    with configured(fake_settings, api_keys=KEY) as port:
        for key in ({}, {"Authorization": f"Bearer {KEY}"}):
            headers = {"Origin": EVIL, **key}
            assert sent(port, "/generate", "POST", headers) == (403, "foreign_origin")


@pytest.mark.process
def test_the_answer_has_the_request_s_id_and_is_counted(local: int) -> None:
    url = f"http://127.0.0.1:{local}"
    headers = {"Origin": EVIL, "X-Request-Id": "mine"}
    answer = httpx.post(f"{url}/generate", json={}, headers=headers)
    assert (answer.status_code, answer.headers["x-request-id"]) == (403, "mine")
    assert "PAELLERA_CORS_ORIGINS" in answer.json()["error"]["message"]
    assert 'paella_rejected_total{reason="foreign_origin"}' in httpx.get(f"{url}/metrics").text


@pytest.mark.parametrize(
    ("origin", "authority"),
    [
        ("https://A.example", Authority("a.example", 443)),
        ("http://a.example.:8080", Authority("a.example", 8080)),
        ("http://[::1]:80", Authority("::1", 80)),
        ("chrome-extension://abc", Authority("abc", None)),
        ("null", None),
        ("https://a.example@b.example", None),
        ("https://a.example/path", None),
    ],
)
def test_origins_are_read_exactly(origin: str, authority: Authority | None) -> None:
    assert Authority.of_origin(origin) == authority
