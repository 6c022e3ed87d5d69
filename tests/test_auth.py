"""Who may ask, how often, how much at once, from which pages; what every answer carries and what
the log says of it.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import hashlib
import json
import logging
import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import hypothesis
import hypothesis.strategies as st
import pytest
from fastapi import FastAPI, Response
from fastapi.testclient import TestClient
from prometheus_client.openmetrics.parser import text_string_to_metric_families
from pydantic import ValidationError

from server.api import create_app
from server.api.auth import ConcurrencyLimit, Keys, RateLimit
from server.api.errors import ApiError
from server.api.head_guard import MAX_HEADER_BYTES, MAX_URL_BYTES, check_head
from server.api.validation import from_validation
from server.paths import OPEN_PATHS, PROBES
from server.settings import Settings
from tests import fake_worker
from tests.conftest import wait_until
from tests.support.access_log import said
from tests.support.api_keys import AUTHORIZED, KEY, OTHER
from tests.support.servers import Configure, asking
from tests.support.uvicorn_servers import all_answered, listening, served


def code(answer: httpx.Response) -> str:
    return str(answer.json()["error"]["code"])


def rejected(client: TestClient, reason: str) -> float | None:
    app = client.app
    assert isinstance(app, FastAPI)
    return app.state.paellera.metrics.registry.get_sample_value(
        "paella_rejected_total", {"reason": reason}
    )


@pytest.fixture
def access_log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, "server.access")
    return caplog


# ── keys ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ("", "an API key is required"),
        (KEY, "with the word Bearer"),
        ("Bearer", "unknown API key"),
        (f"Basic {KEY}", "HTTP Basic is accepted under /sdapi only"),
        (f"Bearer {KEY}x", "unknown API key"),
        (f"Bearer {KEY[:-1]}", "unknown API key"),
        ("Bearer é", "unknown API key"),
    ],
)
def test_what_is_no_key_of_the_list_is_401_as_openai_s_client_expects_it(
    fake_settings: Configure, header: str, said: str
) -> None:
    client = asking(fake_settings(api_keys=f"{OTHER},{KEY}"))
    answer = client.get("/v1/models", headers={"Authorization": header.encode()} if header else {})
    assert answer.status_code == 401
    assert (
        answer.json()["error"].items()
        >= {"code": "invalid_api_key", "type": "invalid_request_error"}.items()
    )
    challenge = answer.headers["www-authenticate"]
    assert challenge.startswith("Bearer ")
    # A key that was sent is wrong; none is merely missing (RFC 6750).
    assert ('error="invalid_token"' in challenge) == bool(header)
    message = answer.json()["error"]["message"]
    assert said in message
    assert KEY not in message
    assert rejected(client, "invalid_api_key") == 1


@pytest.mark.parametrize("header", [f"Bearer {KEY}", f"bearer {OTHER}", f"Bearer  {KEY} "])
def test_every_key_of_the_list_is_let_in(fake_settings: Configure, header: str) -> None:
    assert (
        asking(fake_settings(api_keys=f" {OTHER} , {KEY},"))
        .get("/v1/models", headers={"Authorization": header})
        .status_code
        == 200
    )


def test_a_key_is_needed_before_anything_else_is_looked_at(fake_settings: Configure) -> None:
    client = asking(fake_settings(api_keys=KEY, max_body_bytes=10))
    assert {
        client.post("/generate", content=b"x" * 99).status_code,
        client.delete("/requests/x").status_code,
    } == {401}
    assert client.get("/no/such/path").status_code == 401


def test_with_keys_only_probes_and_the_page_are_open_unless_the_settings_say_otherwise(
    fake_settings: Configure,
) -> None:
    client = asking(fake_settings(api_keys=KEY))
    opened = {
        "/": 200,
        "/playground/main.js": 200,
        "/healthz": 200,
        "/health": 200,
        "/readyz": 503,
        "/images/x": 404,
        "/metrics": 401,
        "/docs": 401,
        "/openapi.json": 401,
        "/v1/models": 401,
    }
    assert {path: client.get(path).status_code for path in opened} == opened
    closed = asking(fake_settings(api_keys=KEY, open_paths="/healthz,/x/*"))
    assert [
        closed.get(path).status_code for path in ("/healthz", "/metrics", "/docs", "/x/y", "/x")
    ] == [200, 401, 401, 404, 401]
    assert closed.get("/metrics", headers=AUTHORIZED).status_code == 200


@pytest.mark.process
def test_metrics_on_a_port_of_their_own_need_no_key_unless_the_settings_say_otherwise(
    fake_settings: Configure,
) -> None:
    for open_paths, status in ((None, 200), ("/healthz", 401)):
        settings = fake_settings(api_keys=KEY, open_paths=open_paths)
        with listening(settings, ports=2) as (_, port):
            assert httpx.get(f"http://127.0.0.1:{port}/metrics").status_code == status


@pytest.mark.process
def test_probes_on_a_port_of_their_own_need_no_key_whatever_the_settings_say(
    fake_settings: Configure,
) -> None:
    settings = fake_settings(api_keys=KEY, open_paths="/docs,/openapi.json")
    with listening(settings, ports=2) as (_, port):
        answers = [httpx.get(f"http://127.0.0.1:{port}{path}") for path in PROBES]
    assert 401 not in [answer.status_code for answer in answers]


DOCUMENTED = "/docs, /openapi.json"


@pytest.mark.parametrize(
    ("settings", "missing"),
    [
        ({"open_paths": DOCUMENTED}, ["/healthz, /readyz", "/images/*", "/playground/*"]),
        (
            {"open_paths": "/healthz, /docs, /playground/*"},
            ["/readyz", "/images/*", "/openapi.json"],
        ),
        ({"open_paths": "/images/*", "operations_port": 9}, ["/metrics"]),
        ({"open_paths": "/healthz, /readyz"}, ["/images/*"]),
        ({"open_paths": "/healthz, /readyz", "url_store_bytes": 0}, []),
        ({"open_paths": "/healthz, /readyz, /images/*"}, []),
        ({"open_paths": "/*"}, []),
        ({"open_paths": DOCUMENTED, "api_keys": ""}, []),
        ({}, []),
    ],
)
def test_a_list_of_open_paths_that_lacks_needed_ones_is_warned_of(
    settings: dict[str, Any], missing: list[str]
) -> None:
    warnings = Settings(**{"api_keys": KEY, **settings}).warnings
    assert len(warnings) == len(missing)
    for warning, paths in zip(warnings, missing, strict=True):
        assert f"PAELLERA_OPEN_PATHS replaces the default list and lacks {paths}:" in warning


@pytest.mark.parametrize(
    ("page", "opened"),
    [
        ("docs/deploy.md", {"/docs", "/openapi.json"}),
        ("CHANGELOG.md", {"/docs", "/openapi.json", "/metrics"}),
    ],
)
def test_the_lists_in_the_documents_open_more_and_close_nothing(
    page: str, opened: set[str]
) -> None:
    text = (Path(__file__).parents[1] / page).read_text()
    (value,) = re.findall(r"PAELLERA_OPEN_PATHS=([^\s`]+)", text)
    settings = Settings(api_keys=KEY, open_paths=value)
    assert set(settings.paths_without_key) == {*OPEN_PATHS, *opened}
    assert settings.warnings == []


def test_a_key_s_name_is_the_beginning_of_its_hash() -> None:
    assert Keys([KEY]).name(f"Bearer {KEY}") == hashlib.sha256(KEY.encode()).hexdigest()[:8]


def test_a_key_reaches_neither_the_log_nor_what_is_said_of_wrong_settings(
    fake_settings: Configure, access_log: pytest.LogCaptureFixture
) -> None:
    settings = fake_settings(api_keys=KEY)
    for number, header in enumerate((f"Bearer {KEY}", f"Bearer {OTHER}")):
        asking(settings).get(
            "/v1/models", headers={"Authorization": header, "X-Request-Id": f"{number}"}
        )
    assert said(access_log, "0")["key"] == Keys([KEY]).name(f"Bearer {KEY}")
    assert "key" not in said(access_log, "1")
    assert said(access_log, "1")["code"] == "invalid_api_key"
    wrong = _complaint({"api_keys": f"{KEY},a space"})
    shown = (
        repr(settings)
        + str([record.__dict__ for record in access_log.records])
        + str(wrong)
        + from_validation(wrong).message
    )
    assert KEY not in shown
    assert OTHER not in shown


def _complaint(values: dict[str, Any]) -> ValidationError:
    with pytest.raises(ValidationError, match="api_keys") as raised:
        Settings.model_validate(values)
    return raised.value


@pytest.mark.parametrize(
    "keys", [" , ", "short", f"{KEY},with a space in it", "Ümläute-sind-hier-verboten"]
)
def test_keys_that_would_be_no_protection_are_refused(keys: str) -> None:
    _complaint({"api_keys": keys})


# ── rate and concurrency ──────────────────────────────────────────────────────────────────────────


@hypothesis.given(st.lists(st.floats(0, 30), max_size=60), st.integers(1, 5), st.floats(1, 600))
def test_no_stretch_of_time_lets_more_in_than_the_burst_and_the_rate(
    pauses: list[float], burst: int, per_minute: float
) -> None:
    now, let_in = 0.0, []
    rate = RateLimit(per_minute, burst, clock=lambda: now)
    for pause in pauses:
        now += pause
        try:
            rate.take("one")
        except ApiError as error:
            now += int((error.headers or {})["retry-after-ms"]) / 1000
            rate.take("one")
        let_in.append(now)
    for i, first in enumerate(let_in):
        for n, last in enumerate(let_in[i:], start=1):
            assert n <= burst + (last - first) * per_minute / 60 + 1e-3


def test_one_key_s_rate_is_not_another_s_and_0_is_none() -> None:
    rate = RateLimit(1, 2, clock=lambda: 0.0)
    for client in ("one", "one", "other"):
        rate.take(client)
    with pytest.raises(ApiError):
        rate.take("one")
    unlimited = RateLimit(0, 1, clock=lambda: 0.0)
    for _ in range(100):
        unlimited.take("one")


def told(limit: Callable[[str], None], client: str = "one") -> float:
    """Seconds after which the refused client should come back."""
    with pytest.raises(ApiError) as refused:
        limit(client)
    return int((refused.value.headers or {})["retry-after-ms"]) / 1000


def test_refused_requests_of_one_key_are_told_different_times_at_which_each_is_let_in() -> None:
    now = 0.0
    rate = RateLimit(60, 1, clock=lambda: now)
    rate.take("one")
    times = [told(rate.take) for _ in range(25)]
    assert times == pytest.approx(range(1, 26))
    for now in times:  # noqa: B007, the clock reads it
        rate.take("one")
    rate.take("other")
    assert told(rate.take, "other") == 1, "another key has a line of its own"


def test_requests_beyond_a_key_s_number_are_told_different_times_too() -> None:
    concurrency = ConcurrencyLimit(4, clock=lambda: 0.0)
    with contextlib.ExitStack() as running:
        for _ in range(4):
            running.enter_context(concurrency.count("one"))
        times = [told(concurrency.check) for _ in range(25)]
    assert times == pytest.approx([1 + i / 4 for i in range(25)])
    concurrency.check("one")


def test_posts_beyond_the_rate_are_429_with_the_time_to_come_back_and_the_rest_is_not_counted(
    fake_settings: Configure,
) -> None:
    client = asking(fake_settings(api_keys=KEY, key_rate_per_minute=0.01, key_burst=2))
    assert {client.get("/v1/models", headers=AUTHORIZED).status_code for _ in range(5)} == {200}
    answers = [client.post("/generate", content=b"no JSON", headers=AUTHORIZED) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [415, 415, 429]
    assert (code(answers[2]), answers[2].json()["error"]["type"]) == (
        "rate_limit_exceeded",
        "rate_limit_error",
    )
    assert (
        0
        < int(answers[2].headers["retry-after-ms"])
        <= 1000 * int(answers[2].headers["retry-after"])
    )
    assert rejected(client, "rate_limit_exceeded") == 1


@pytest.mark.process
def test_a_key_s_requests_beyond_its_number_are_429_others_are_not_and_only_it_can_end_its_own(
    fake_settings: Configure,
) -> None:
    with (
        served(fake_settings(api_keys=f"{KEY},{OTHER}", key_concurrency=1)) as client,
        concurrent.futures.ThreadPoolExecutor() as threads,
    ):
        other = {"Authorization": f"Bearer {OTHER}"}
        hold = {"json": {"prompt": "hold"}, "headers": AUTHORIZED | {"X-Request-Id": "held"}}
        held = threads.submit(client.post, "/generate", **hold)
        wait_until(lambda: "paella_rows_running 1.0" in client.get("/metrics", headers=other).text)
        refused = client.post("/generate", json={"prompt": "a"}, headers=AUTHORIZED)
        assert (refused.status_code, code(refused), refused.headers["retry-after"]) == (
            429,
            "concurrency_exceeded",
            "1",
        )
        assert client.post("/generate", json={"prompt": "a"}, headers=other).status_code == 200
        assert client.delete("/requests/held", headers=other).status_code == 404
        assert client.delete("/requests/held", headers=AUTHORIZED).status_code == 204
        assert held.result().status_code == 499
        assert client.post("/generate", json={"prompt": "a"}, headers=AUTHORIZED).status_code == 200


# ── the head ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.process
def test_urls_and_headers_that_are_too_long_are_refused_in_the_one_shape(
    fake_settings: Configure,
) -> None:
    client = asking(fake_settings())
    url, headers = (
        client.get("/" + "x" * MAX_URL_BYTES),
        client.get("/healthz", headers={"X-Long": "x" * MAX_HEADER_BYTES}),
    )
    assert (url.status_code, code(url)) == (414, "url_too_long")
    assert (headers.status_code, code(headers)) == (431, "headers_too_large")


@pytest.mark.parametrize(
    ("path", "query", "headers", "status"),
    [
        (8192, 0, 32_768, None),
        (8000, 192, 9, None),
        (8193, 0, 9, 414),
        (8000, 193, 9, 414),
        (1, 8192, 9, 414),
        (1, 0, 32_769, 431),
    ],
)
def test_a_url_may_have_8192_bytes_and_headers_32768(
    path: int, query: int, headers: int, status: int | None
) -> None:
    scope = {
        "http_version": "1.0",
        "raw_path": b"/" * path,
        "query_string": b"q" * query,
        "headers": [(b"short", b"y"), (b"x", b"y" * (headers - 7))],
    }
    rejected = pytest.raises(ApiError) if status else contextlib.nullcontext()
    with rejected as error:
        check_head(scope)
    assert error is None or error.value.status == status


@pytest.mark.parametrize(
    ("version", "names", "refusal"),
    [
        ("1.1", ["host"], None),
        ("1.1", ["host", "transfer-encoding"], None),
        ("1.1", [], "invalid_host"),
        ("1.1", ["host", "host"], "invalid_host"),
        ("1.0", [], None),
        ("1.0", ["host"], None),
        ("1.0", ["host", "host"], "invalid_host"),
        ("1.0", ["host", "transfer-encoding"], "invalid_transfer_encoding"),
        ("2", [], None),
    ],
)
def test_a_head_must_not_be_ambiguous(version: str, names: list[str], refusal: str | None) -> None:
    scope = {
        "http_version": version,
        "query_string": b"",
        "headers": [(name.encode(), b"chunked") for name in names],
    }
    rejected = pytest.raises(ApiError) if refusal else contextlib.nullcontext()
    with rejected as error:
        check_head(scope)
    if error is not None:
        assert (error.value.status, error.value.code) == (400, refusal)
        assert error.value.headers == {"Connection": "close"}


@pytest.mark.parametrize(
    ("endless", "status"),
    [(b"GET /", 414), (b"GET / HTTP/1.1\r\nX: ", 431), (b"GET / HTTP/1.1\r\n", 431)],
)
@pytest.mark.process
def test_a_head_that_does_not_end_is_not_kept(
    fake_settings: Configure, endless: bytes, status: int
) -> None:
    more = b"X: x\r\n" if endless.endswith(b"\n") else b"x"
    with (
        listening(fake_settings()) as (port,),
        socket.create_connection(("127.0.0.1", port), timeout=20) as connection,
    ):
        connection.sendall(endless + more * (MAX_URL_BYTES + MAX_HEADER_BYTES))
        assert connection.recv(100).startswith(b"HTTP/1.1 %d " % status)


@pytest.mark.parametrize(
    "begun",
    [b"", b"GET / HTTP/1.1\r\nX: ", b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\nGET /"],
)
@pytest.mark.process
def test_a_head_that_takes_too_long_is_not_waited_for(
    fake_settings: Configure, begun: bytes
) -> None:
    with listening(fake_settings(receive_timeout_s=0.2)) as (port,):
        received = all_answered(port, begun)
    assert received.count(b"HTTP/1.1 ") == begun.count(b"\r\n\r\n")


@pytest.mark.process
def test_a_body_that_does_not_go_on_is_answered_and_not_waited_for(
    fake_settings: Configure, access_log: pytest.LogCaptureFixture
) -> None:
    head = (
        b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: 99\r\nX-Request-Id: slow\r\n\r\n"
    )
    with listening(fake_settings(receive_timeout_s=0.2)) as (port,):
        received = all_answered(port, head + b'{"prompt": ')
    assert received.startswith(b"HTTP/1.1 408 ")
    assert json.loads(received.partition(b"\r\n\r\n")[2])["error"]["code"] == "body_too_slow"
    assert said(access_log, "slow")["status"] == 408


@pytest.mark.process
def test_an_answer_may_take_longer_than_its_request_may(fake_settings: Configure) -> None:
    with served(fake_settings(receive_timeout_s=0.2)) as client:
        assert client.post("/generate", json={"prompt": "hold", "timeout_s": 1}).status_code == 504


@pytest.mark.process
def test_a_long_body_is_no_long_head(fake_settings: Configure) -> None:
    with listening(fake_settings()) as (port,):
        for _ in range(2):
            answer = httpx.post(
                f"http://127.0.0.1:{port}/generate",
                content=b"x" * 2_000_000,
                headers={"Content-Type": "text/plain"},
            )
            assert answer.status_code == 415


def test_a_body_that_is_alone_may_be_larger_than_the_budget_of_all(
    fake_settings: Configure,
) -> None:
    client = asking(fake_settings(max_body_bytes=300_000, body_budget_bytes=1))
    json_type = {"Content-Type": "application/json"}
    answer = client.post("/generate", content=b" " * 300_000, headers=json_type)
    assert (answer.status_code, code(answer)) == (400, "malformed_json")


# ── ports, proxies, pages ─────────────────────────────────────────────────────────────────────────


@pytest.mark.process
def test_health_and_metrics_can_be_on_a_port_of_their_own_and_only_there(
    fake_settings: Configure,
) -> None:
    with listening(fake_settings(), ports=2) as ports:
        paths = ("/healthz", "/metrics", "/v1/models", "/docs")
        statuses = [
            [httpx.get(f"http://127.0.0.1:{port}{path}").status_code for path in paths]
            for port in ports
        ]
    assert statuses == [[404, 404, 200, 200], [200, 200, 404, 404]]


@pytest.mark.parametrize(
    ("trusted", "client"),
    [("", "127.0.0.1"), ("10.0.0.0/8", "127.0.0.1"), ("127.0.0.0/8", "203.0.113.9")],
)
@pytest.mark.process
def test_who_a_proxy_says_is_asking_is_believed_of_trusted_proxies_alone(
    fake_settings: Configure, access_log: pytest.LogCaptureFixture, trusted: str, client: str
) -> None:
    with listening(fake_settings(trusted_proxies=trusted)) as (port,):
        httpx.get(
            f"http://127.0.0.1:{port}/healthz",
            headers={"X-Forwarded-For": "203.0.113.9", "X-Request-Id": "proxied"},
        )
    assert said(access_log, "proxied")["client"] == client


def test_pages_of_other_origins_may_ask_only_if_they_are_listed(fake_settings: Configure) -> None:
    def allowed(origin: str, **settings: str) -> str | None:
        return (
            asking(fake_settings(**settings))
            .get("/healthz", headers={"Origin": origin})
            .headers.get("access-control-allow-origin")
        )

    listed = "https://a.example,http://localhost:3000"
    assert allowed("https://a.example") is None
    assert allowed("https://a.example", cors_origins=listed) == "https://a.example"
    assert allowed("https://b.example", cors_origins=listed) is None
    assert allowed("https://b.example", cors_origins="*") == "*"


def test_a_browser_s_question_beforehand_needs_no_key(fake_settings: Configure) -> None:
    asked = {
        "Origin": "https://a.example",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization",
    }
    client = asking(fake_settings(api_keys=KEY, cors_origins="https://a.example"))
    answer = client.options("/generate", headers=asked)
    assert (answer.status_code, answer.headers["access-control-allow-headers"]) == (
        200,
        "authorization",
    )
    refused = client.post("/generate", headers={"Origin": "https://a.example"})
    assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (
        401,
        "https://a.example",
    )


PAGE = "https://a.example"


def preflight(method: str = "POST", origin: str = PAGE, **more: str) -> dict[str, str]:
    return {"Origin": origin, "Access-Control-Request-Method": method, **more}


@pytest.mark.parametrize("origins", [PAGE, "*"])
@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "DELETE"])
def test_a_preflight_for_a_server_on_a_private_network_is_granted(
    fake_settings: Configure, origins: str, method: str
) -> None:
    asked = preflight(method, **{"Access-Control-Request-Private-Network": "true"})
    answer = asking(fake_settings(cors_origins=origins)).options("/generate", headers=asked)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-private-network"] == "true"
    assert answer.headers["access-control-allow-origin"] == origins


@pytest.mark.parametrize(
    ("asked", "status", "code"),
    [
        (preflight(), 200, None),
        (preflight(origin="https://b.example"), 403, "foreign_origin"),
        (preflight("PATCH"), 405, "method_not_allowed"),
    ],
)
def test_a_preflight_is_logged_measured_and_refused_in_the_one_shape(
    fake_settings: Configure,
    access_log: pytest.LogCaptureFixture,
    asked: dict[str, str],
    status: int,
    code: str | None,
) -> None:
    client = asking(fake_settings(cors_origins=PAGE))
    answer = client.options("/generate", headers={**asked, "X-Request-Id": "asked-before"})
    assert (answer.status_code, answer.headers["x-request-id"]) == (status, "asked-before")
    line = said(access_log, "asked-before")
    assert (line["method"], line["status"], line.get("code")) == ("OPTIONS", status, code)
    metrics = client.get("/metrics").text
    labels = f'{{endpoint="unmatched",status="{status}"}}'
    assert f"paella_request_duration_seconds_count{labels} 1.0" in metrics
    allowed = asked["Origin"] == PAGE
    assert answer.headers.get("access-control-allow-origin") == (PAGE if allowed else None)
    assert "Origin" in answer.headers["vary"]
    if code:
        assert answer.json()["error"]["code"] == code
        assert f'paella_rejected_total{{reason="{code}"}} 1.0' in metrics


def test_pages_may_read_every_error(fake_settings: Configure) -> None:
    app = create_app(fake_settings(cors_origins=PAGE), worker=fake_worker.main)
    app.get("/broken")(lambda: 1 / 0)
    client = TestClient(app, raise_server_exceptions=False)
    answers = [
        client.get("/broken", headers={"Origin": PAGE}),
        client.get("/nothing", headers={"Origin": PAGE}),
        client.patch("/generate", headers={"Origin": PAGE}),
        client.post("/generate", content=b"{", headers={"Origin": PAGE}),
    ]
    assert [answer.status_code for answer in answers] == [500, 404, 405, 415]
    assert {answer.headers.get("access-control-allow-origin") for answer in answers} == {PAGE}
    assert all("x-request-id" in answer.headers for answer in answers)


# ── answers and the log ───────────────────────────────────────────────────────────────────────────


def test_every_answer_has_the_security_headers_and_keeps_a_policy_of_its_own(
    fake_settings: Configure,
) -> None:
    app = create_app(
        fake_settings(api_keys=KEY, open_paths="/healthz,/own,/broken", cors_origins="*"),
        worker=fake_worker.main,
    )
    app.get("/own")(lambda: Response(headers={"Content-Security-Policy": "default-src 'self'"}))
    app.get("/broken")(lambda: 1 / 0)
    client = TestClient(app, raise_server_exceptions=False)
    policies = {
        path: client.get(path).headers["content-security-policy"]
        for path in ("/healthz", "/metrics", "/own", "/broken")
    }
    assert policies.pop("/own") == "default-src 'self'"
    assert set(policies.values()) == {"frame-ancestors 'none'"}
    for path in ("/healthz", "/metrics", "/own", "/broken"):
        headers = client.get(path).headers
        names = ("x-content-type-options", "referrer-policy", "x-frame-options")
        assert [headers[name] for name in names] == ["nosniff", "no-referrer", "DENY"]
        assert "strict-transport-security" not in headers


@pytest.mark.parametrize("log_prompts", [False, True])
@pytest.mark.process
def test_a_request_s_line_says_what_was_asked_and_its_prompts_only_if_switched_on(
    fake_settings: Configure, access_log: pytest.LogCaptureFixture, log_prompts: bool
) -> None:
    with served(fake_settings(log_prompts=log_prompts)) as client:
        fields = {
            "prompt": "a wish",
            "negative_prompt": "a fear",
            "seed": 7,
            "regions": [{"prompt": "a dream", "box": [0, 0, 1, 1]}],
        }
        answer = client.post("/generate", json=fields, headers={"X-Request-Id": "asked"})
    line = said(access_log, "asked")
    asked = {
        "model": "fake",
        "images": 1,
        "seed": 7,
        "size": "64x32",
        "steps": 12,
        "key": "anybody",
        "status": 200,
    }
    assert line.items() >= asked.items()
    assert line["server_timing"] == answer.headers["server-timing"]
    assert [wish in json.dumps(line) for wish in ("a wish", "a fear", "a dream")] == [
        log_prompts
    ] * 3


@pytest.mark.parametrize(
    ("request_id", "is_exemplar"), [("seen", True), ("x" * 118, True), ("x" * 128, False)]
)
def test_a_bucket_of_the_latency_names_a_request_that_fell_into_it(
    fake_settings: Configure, request_id: str, is_exemplar: bool
) -> None:
    client = asking(fake_settings())
    client.get("/healthz", headers={"X-Request-Id": request_id})
    answer = client.get(
        "/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"}
    )
    assert answer.headers["content-type"].startswith("application/openmetrics-text")
    families = {family.name: family for family in text_string_to_metric_families(answer.text)}
    exemplars = [
        sample.exemplar
        for sample in families["paella_request_duration_seconds"].samples
        if sample.exemplar
    ]
    assert [exemplar.labels for exemplar in exemplars] == (
        [{"request_id": request_id}] if is_exemplar else []
    )


@pytest.mark.parametrize(
    ("settings", "shown"),
    [({}, True), ({"api_keys": KEY}, False), ({"api_keys": KEY, "operations_port": 9}, True)],
)
def test_the_metrics_name_requests_only_where_no_other_client_reads_them(
    fake_settings: Configure, settings: dict[str, Any], shown: bool
) -> None:
    client = asking(fake_settings(**settings))
    base = f"http://testserver:{settings.get('operations_port', 80)}"
    client.get(f"{base}/healthz", headers={"X-Request-Id": "a-secret-of-mine"})
    accept = {"Accept": "application/openmetrics-text; version=1.0.0"}
    answer = client.get(f"{base}/metrics", headers=AUTHORIZED | accept)
    assert answer.status_code == 200
    assert ("a-secret-of-mine" in answer.text) == shown


def test_prometheus_own_text_is_what_others_get(fake_settings: Configure) -> None:
    answer = asking(fake_settings()).get("/metrics")
    assert re.match(r"text/plain; version=0\.0\.4", answer.headers["content-type"])
    assert "# EOF" not in answer.text


def test_the_documentation_asks_for_a_key_where_one_is_needed(fake_settings: Configure) -> None:
    def security(keys: str, **settings: object) -> dict[str, Any]:
        client = asking(fake_settings(api_keys=keys, **settings))
        document = client.get("/openapi.json", headers=AUTHORIZED).json()
        return {
            path: operation.get("security")
            for path, operations in document["paths"].items()
            for operation in operations.values()
        }

    assert set(map(str, security("").values())) == {"None"}
    assert security(KEY)["/generate"] == [{"HTTPBearer": []}]
    assert security(KEY)["/healthz"] is None
    assert security(KEY)["/metrics"] == [{"HTTPBearer": []}]
    opened = security(KEY, open_paths="/metrics,/v1/*")
    assert [opened[path] for path in ("/metrics", "/v1/models/{name}")] == [None, None]
    assert opened["/healthz"] == [{"HTTPBearer": []}]


def test_the_documentation_has_health_and_metrics_unless_they_are_on_a_port_of_their_own(
    fake_settings: Configure,
) -> None:
    def paths(**settings: object) -> set[str]:
        return set(asking(fake_settings(**settings)).get("/openapi.json").json()["paths"])

    assert {*PROBES, "/metrics"} <= paths()
    assert paths() - paths(operations_port=9) == {*PROBES, "/metrics"}


def test_the_documentation_has_401_where_a_key_is_needed(fake_settings: Configure) -> None:
    def answers(keys: str, path: str) -> dict[str, Any]:
        client = asking(fake_settings(api_keys=keys))
        document = client.get("/openapi.json", headers=AUTHORIZED).json()
        assert "ErrorAnswer" in document["components"]["schemas"]
        return dict(document["paths"][path]["get"]["responses"])

    missing = answers(KEY, "/v1/models")["401"]
    (content,) = missing["content"].values()
    assert content["schema"] == {"$ref": "#/components/schemas/ErrorAnswer"}
    assert "key" in missing["description"]
    assert "401" not in answers(KEY, "/healthz")
    assert "401" not in answers("", "/v1/models")
