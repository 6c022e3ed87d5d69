"""Paths, methods and names over the fake worker: HEAD, extra slashes, query parameters, file names,
compressed JSON.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import unquote

import httpx
import pytest

from server.api import create_app
from server.api.auth import Keys
from server.api.middleware import canonical_path
from server.api.openapi import EXAMPLES
from server.settings import Settings
from tests import fake_worker
from tests.conftest import NAME, serving, wait_until
from tests.support.servers import metric

KEY = "key-0123456789abcdef"
pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def closed(fake_settings: Callable[..., Settings]) -> Iterator[httpx.Client]:
    """A client without a key of a server that needs one."""
    with (
        serving(create_app(fake_settings(api_keys=KEY), worker=fake_worker.main)) as address,
        httpx.Client(base_url=address, timeout=20) as client,
    ):
        wait_until(lambda: client.get("/readyz").status_code == 200)
        yield client


def raw(client: httpx.Client, path: str, method: str = "GET", **options: Any) -> httpx.Response:
    """Send a path as it is, which httpx would normalise."""
    url = client.base_url.copy_with(raw_path=path.encode())
    return client.request(method, url, **options)


# ── HEAD ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "path",
    [
        "/healthz",
        "/health",
        "/readyz",
        "/v1/models",
        f"/v1/models/{NAME}",
        "/v1/models/unknown",
        "/openapi.json",
        "/",
        "/docs",
        "/playground/main.js",
        "/images/unknown.png",
    ],
)
def test_head_is_get_without_a_body(client: httpx.Client, path: str) -> None:
    head, answer = client.head(path), client.get(path)
    assert (head.status_code, head.content) == (answer.status_code, b"")
    varying = {"date", "x-request-id"}
    names = set(answer.headers) - varying
    assert {name: head.headers[name] for name in names} == {
        name: answer.headers[name] for name in names
    }


def test_head_of_metrics_is_answered_and_counted_under_its_route(client: httpx.Client) -> None:
    assert client.head("/metrics").status_code == 200
    client.head(f"/v1/models/{NAME}")
    name = "paella_request_duration_seconds_count"
    assert metric(client, name, endpoint="/v1/models/{name}", status="200")


@pytest.mark.parametrize("path", ["/generate", "/v1/images/generations"])
def test_head_of_what_has_no_get_is_405(client: httpx.Client, path: str) -> None:
    answer = client.head(path)
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")


@pytest.mark.parametrize("path", ["/", "/v1/models", "/metrics", "/images/a.png"])
def test_head_is_among_the_methods_of_what_has_get(client: httpx.Client, path: str) -> None:
    answer = client.put(path)
    assert (answer.status_code, answer.headers["allow"]) == (405, "GET, HEAD")


def test_head_is_documented_nowhere(client: httpx.Client) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    assert not [path for path, methods in paths.items() if "head" in methods]


# ── slashes ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("path", "canonical"),
    [
        ("/", "/"),
        ("//", "/"),
        ("/generate/", "/generate"),
        ("//v1///models//", "/v1/models"),
        ("/playground/main.js", "/playground/main.js"),
    ],
)
def test_empty_segments_are_removed(path: str, canonical: str) -> None:
    assert canonical_path({"path": path, "raw_path": path.encode()}) == canonical
    assert canonical_path({"path": path}) == canonical


@pytest.mark.parametrize(
    ("sent", "path"),
    [
        ("/v1//models/maker%2Fname/", "/v1/models/maker/name"),
        ("/requests/b64+%2F%2F==", "/requests/b64+//=="),
        ("/requests/50%25%2F", "/requests/50%/"),
    ],
)
def test_slashes_in_names_stay(sent: str, path: str) -> None:
    assert canonical_path({"path": unquote(sent), "raw_path": sent.encode()}) == path


def test_a_path_without_v1_is_told_the_right_one(client: httpx.Client) -> None:
    for path in ("/images/generations", "/models"):
        answer = client.post(path) if path.endswith("s/generations") else client.get(path)
        assert f"did you mean /v1{path}?" in answer.json()["error"]["message"]
    assert "did you mean" not in client.get("/no/such").json()["error"]["message"]


def test_extra_slashes_do_not_matter(client: httpx.Client) -> None:
    for path in ("/v1/models/", "//v1/models", f"/v1//models/{NAME}/", "/healthz/", "//"):
        assert raw(client, path).status_code == 200, path
    for path in ("/generate/", "//generate"):
        assert raw(client, path, "POST", json={"prompt": "a ball"}).status_code == 200, path


def test_they_open_no_path_that_needs_a_key(closed: httpx.Client) -> None:
    for path in ("/v1/models/", "//v1/models", "/images/../v1/models", "/healthz//../metrics"):
        assert raw(closed, path).status_code in (401, 404), path
    assert raw(closed, "//generate/", "POST", json={"prompt": "a"}).status_code == 401
    for path in ("/healthz/", "//readyz", "/images//unknown.png"):
        assert raw(closed, path).status_code in (200, 404), path


def test_an_open_path_may_be_written_with_a_slash(fake_settings: Callable[..., Settings]) -> None:
    settings = fake_settings(api_keys=KEY, open_paths="/docs/,/,/v1/*")
    keys = Keys(settings.keys, settings.paths_without_key)
    assert not keys.needed_for("/docs")
    assert not keys.needed_for("/")
    assert not keys.needed_for("/v1/models")
    assert keys.needed_for("/metrics")


# ── query parameters ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("path", [path for path in EXAMPLES if not path.startswith("/v1/")])
def test_native_endpoints_refuse_query_parameters(client: httpx.Client, path: str) -> None:
    answer = client.post(f"{path}?seed=7", json=EXAMPLES[path])
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (422, "unknown_field", "seed")
    assert "body" in error["message"]


@pytest.mark.parametrize("query", ["", "?", "?&"])
def test_an_empty_query_is_none(client: httpx.Client, query: str) -> None:
    assert raw(client, f"/generate{query}", "POST", json={"prompt": "a"}).status_code == 200


def test_other_endpoints_ignore_query_parameters(client: httpx.Client) -> None:
    azure = "/v1/images/generations?api-version=2025-04-01-preview"
    assert client.post(azure, json={"prompt": "a"}).status_code == 200
    for path in ("/healthz?cache=1", "/v1/models?x=y", "/metrics?name=z"):
        assert client.get(path).status_code == 200


# ── names ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("path", "fields", "name"),
    [
        ("/generate", {"prompt": "a"}, "generate-7.png"),
        ("/generate", {"prompt": "a", "response_format": "jpeg"}, "generate-7.jpg"),
        ("/generate", {"prompt": "a", "response_format": "webp"}, "generate-7.webp"),
        ("/generate", {"prompt": "a", "n": 2}, "generate-7.json"),
        ("/interpolate", EXAMPLES["/interpolate"], "interpolate-7.gif"),
        ("/v1/images/generations", {"prompt": "a"}, "generate-7.json"),
    ],
)
def test_an_answer_has_a_name_for_clients_that_save_it(
    client: httpx.Client, path: str, fields: dict[str, Any], name: str
) -> None:
    answer = client.post(path, json={**fields, "seed": 7})
    assert answer.headers["content-disposition"] == f'inline; filename="{name}"'


# ── compression ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("path", "format"), [("/generate", "json"), ("/v1/images/generations", "b64_json")]
)
def test_json_is_compressed_when_asked(client: httpx.Client, path: str, format: str) -> None:
    fields = {"prompt": "noise", "seed": 7, "n": 2, "response_format": format}
    plain = client.post(path, json=fields, headers={"Accept-Encoding": "identity"})
    zipped = client.post(path, json=fields, headers={"Accept-Encoding": "gzip"})
    assert ("content-encoding" in plain.headers, zipped.headers["content-encoding"]) == (
        False,
        "gzip",
    )
    assert int(zipped.headers["content-length"]) < 0.8 * int(plain.headers["content-length"])
    kind = "data" if path.startswith("/v1") else "images"
    assert json.loads(zipped.content)[kind] == plain.json()[kind]


def test_files_are_not_compressed(client: httpx.Client) -> None:
    answer = client.post("/generate", json={"prompt": "a"}, headers={"Accept-Encoding": "gzip"})
    assert "content-encoding" not in answer.headers
