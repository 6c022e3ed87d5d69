"""`response_format: url` and `GET /images/…` over the fake worker."""

from __future__ import annotations

import base64
import json
import logging
import re
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import openai
import pytest
from starlette.requests import Request
from starlette.types import Scope

from server.api import create_app
from server.api.errors import ApiError
from server.api.images.url_store import OVERHEAD_BYTES, StoredImage, UrlStore
from server.api.middleware import logged_path
from server.api.origins import FORWARDED_HOSTS, base_url
from server.settings import Settings
from tests.conftest import wait_until
from tests.support.servers import metric, served

KEY = "key-0123456789abcdef"
# An id has 128 bits.
NAME = re.compile(r"[A-Za-z0-9_-]{22}\.(png|jpg|webp)")
GENERATIONS = "/v1/images/generations"


@pytest.fixture(scope="module")
def server(fake_settings: Callable[..., Settings]) -> Iterator[httpx.Client]:
    with served(fake_settings()) as client:
        yield client


def post(
    client: httpx.Client,
    path: str = "/generate",
    headers: dict[str, str] | None = None,
    **fields: Any,
) -> httpx.Response:
    sent = {"prompt": "a ball", "response_format": "url", **fields}
    return client.post(path, json=sent, headers=headers)


def urls(answer: httpx.Response) -> list[str]:
    assert answer.status_code == 200, answer.text
    entries = answer.json().get("images") or answer.json()["data"]
    assert all("b64_json" not in entry for entry in entries)
    return [entry["url"] for entry in entries]


# ── answers ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.process
@pytest.mark.parametrize("path", ["/generate", GENERATIONS])
def test_urls_lead_to_the_files_that_json_would_have(server: httpx.Client, path: str) -> None:
    found = urls(post(server, path, n=2, seed=7))
    encoded = "b64_json" if path == GENERATIONS else "json"
    answer = post(server, path, n=2, seed=7, response_format=encoded).json()
    files = [
        base64.b64decode(entry["b64_json"]) for entry in answer.get("images") or answer["data"]
    ]
    assert [httpx.get(url).content for url in found] == files


@pytest.mark.process
def test_a_url_is_absolute_and_cannot_be_guessed(server: httpx.Client) -> None:
    found = [*urls(post(server)), *urls(post(server))]
    assert len(set(found)) == 2
    for url in found:
        base, _, name = url.rpartition("/images/")
        assert base == str(server.base_url).rstrip("/")
        assert NAME.fullmatch(name)


@pytest.mark.process
@pytest.mark.parametrize(
    ("format", "extension"), [("png", "png"), ("jpeg", "jpg"), ("webp", "webp")]
)
def test_the_file_has_the_requested_format_and_headers_that_keep_it_harmless(
    server: httpx.Client, format: str, extension: str
) -> None:
    (url,) = urls(post(server, GENERATIONS, output_format=format, seed=7))
    answer = httpx.get(url)
    assert answer.headers["content-type"] == f"image/{format}"
    assert url.endswith(f".{extension}")
    name = f'inline; filename="generate-7.{extension}"'
    assert answer.headers["content-disposition"] == name
    assert answer.headers["content-security-policy"] == "default-src 'none'; sandbox"
    assert answer.headers["cross-origin-resource-policy"] == "cross-origin"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["x-robots-tag"] == "noindex"
    age = re.fullmatch(r"private, max-age=(\d+)", answer.headers["cache-control"])
    assert age
    assert 3590 <= int(age[1]) <= 3600


@pytest.mark.process
def test_head_is_get_without_the_body(server: httpx.Client) -> None:
    (url,) = urls(post(server))
    head, answer = httpx.head(url), httpx.get(url)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == str(len(answer.content))


@pytest.mark.process
def test_frames_of_an_interpolation_have_urls_streamed_or_not(server: httpx.Client) -> None:
    keyframes = {"keyframes": [{"prompt": "a"}, {"prompt": "b"}], "frames": 3}
    fields = {**keyframes, "response_format": "url"}
    found = urls(server.post("/interpolate", json=fields))
    stream = server.post("/interpolate", json={**fields, "stream": True}).text
    events = re.findall(r"event: image\ndata: (.*)\n", stream)
    streamed = [json.loads(data)["url"] for data in events]
    assert len({*found, *streamed}) == 6
    assert all(httpx.get(url).status_code == 200 for url in (*found, *streamed))


@pytest.mark.process
def test_a_native_stream_ends_with_urls(server: httpx.Client) -> None:
    stream = post(server, stream=True).text
    (data,) = re.findall(r"event: completed\ndata: (.*)\n", stream)
    (entry,) = json.loads(data)["images"]
    assert httpx.get(entry["url"]).status_code == 200
    assert "b64_json" not in entry


@pytest.mark.process
def test_streams_for_openais_clients_have_files(server: httpx.Client) -> None:
    stream = post(server, GENERATIONS, stream=True).text
    assert "b64_json" in stream
    assert '"url"' not in stream


@pytest.mark.process
def test_openais_client_gets_urls(server: httpx.Client) -> None:
    client = openai.OpenAI(base_url=str(server.base_url.join("/v1")), api_key="none")
    answer = client.images.generate(prompt="a ball", response_format="url")
    assert answer.data is not None
    (image,) = answer.data
    assert image.b64_json is None
    assert image.url is not None
    assert httpx.get(image.url).content.startswith(b"\x89PNG")


# ── where they are, and for how long ──────────────────────────────────────────────────────────────


@pytest.mark.process
def test_unknown_and_expired_images_are_the_same_404(
    fake_settings: Callable[..., Settings],
) -> None:
    with served(fake_settings(url_ttl_s=0.2)) as client:
        (url,) = urls(post(client))
        wait_until(lambda: httpx.get(url).status_code == 404, 10)
        expired, unknown = httpx.get(url), client.get("/images/unknown.png")
        assert metric(client, "paella_url_store_bytes") == 0
    assert expired.json() == unknown.json()
    ignored = {"x-request-id", "date"}
    assert {name: value for name, value in expired.headers.items() if name not in ignored} == {
        name: value for name, value in unknown.headers.items() if name not in ignored
    }
    assert expired.headers["cache-control"] == "no-store"


@pytest.mark.process
def test_the_public_url_is_the_base(fake_settings: Callable[..., Settings]) -> None:
    with served(fake_settings(public_url="https://images.example.com/paella/")) as client:
        (url,) = urls(post(client))
        assert url.startswith("https://images.example.com/paella/images/")
        assert client.get(url.removeprefix("https://images.example.com/paella")).is_success


@pytest.mark.process
def test_a_url_needs_no_key_and_shows_in_no_log_line_and_no_metric(
    fake_settings: Callable[..., Settings], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    headers = {"Authorization": f"Bearer {KEY}"}
    with served(fake_settings(api_keys=KEY)) as client:
        (url,) = urls(post(client, headers=headers))
        id = url.rpartition("/")[2].partition(".")[0]
        assert client.get("/images/", headers=headers).status_code == 404
        for form in (url, f"{url}/", f"{url}/x", url.replace("/images/", "//images//")):
            httpx.get(form)
            httpx.post(form)
        assert httpx.get(url).status_code == 200
        metrics = client.get("/metrics", headers=headers).text
    lines = [record.__dict__.get("fields", {}) for record in caplog.records]
    assert "/images/{name}" in metrics
    assert id not in metrics
    assert id not in str([line for line in lines if line])
    assert "/images/…" in [line.get("path") for line in lines]


@pytest.mark.process
def test_the_store_can_be_off(fake_settings: Callable[..., Settings]) -> None:
    with served(fake_settings(url_store_bytes=0)) as client:
        answers = [post(client), post(client, GENERATIONS)]
    assert [answer.status_code for answer in answers] == [400, 400]
    assert {answer.json()["error"]["code"] for answer in answers} == {"unsupported_value"}
    assert "b64_json" in answers[1].json()["error"]["message"]


@pytest.mark.process
def test_images_larger_than_the_store_are_refused(fake_settings: Callable[..., Settings]) -> None:
    with served(fake_settings(url_store_bytes=5000)) as client:
        answer = post(client, prompt="noise", n=2)
        error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (422, "images_too_large")
    assert error["param"] == "response_format"


# ── the store alone ───────────────────────────────────────────────────────────────────────────────


def image(size: int) -> StoredImage:
    return StoredImage(b"x" * (size - OVERHEAD_BYTES), "png", "generate-7")


def test_the_oldest_of_the_key_that_holds_most_make_room() -> None:
    store = UrlStore(10 * 2**20, 60)
    (small,) = store.add("small", [image(2**20)])
    large = [store.add("large", [image(2**20)])[0] for _ in range(12)]
    assert store.get(small) is not None
    assert [store.get(name) is not None for name in large] == [False] * 3 + [True] * 9
    assert store.bytes == 10 * 2**20


# ── the server's address ──────────────────────────────────────────────────────────────────────────


def request(settings: Settings, host: str = "a.example:8000", **scope: Any) -> Request:
    app = create_app(settings)
    whole: Scope = {
        "type": "http",
        "scheme": "http",
        "path": "/generate",
        "headers": [(b"host", host.encode())] if host else [],
        "app": app,
        **scope,
    }
    return Request(whole)


def test_the_base_is_the_hosts_own_or_the_proxys(fake_settings: Callable[..., Settings]) -> None:
    settings = fake_settings()
    assert base_url(request(settings)) == "http://a.example:8000"
    proxied = {FORWARDED_HOSTS: ["b.example"], "scheme": "https", "root_path": "/paella"}
    assert base_url(request(settings, **proxied)) == "https://b.example/paella"
    public = fake_settings(public_url="https://c.example/")
    assert base_url(request(public, **proxied)) == "https://c.example"


@pytest.mark.parametrize("host", ["", "a b", "evil.example/path", "user@evil.example", 'a"b\\'])
def test_a_host_that_is_none_gives_no_url(
    fake_settings: Callable[..., Settings], host: str
) -> None:
    with pytest.raises(ApiError) as caught:
        base_url(request(fake_settings(), host))
    assert caught.value.code == "invalid_host"


@pytest.mark.parametrize(
    ("path", "root", "shown"),
    [
        ("/images/secret.png", "", "/images/…"),
        ("/images/secret.png/more", "", "/images/…"),
        ("/paella/images/secret.png", "/paella", "/paella/images/…"),
        ("/v1/images/generations", "", "/v1/images/generations"),
        ("/generate", "", "/generate"),
    ],
)
def test_logs_have_no_id(path: str, root: str, shown: str) -> None:
    assert logged_path({"type": "http", "path": path, "root_path": root}) == shown
