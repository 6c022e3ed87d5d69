"""The playground as files: all of it from here, small, under a strict policy, and kept by
browsers until it changes.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import httpx
import pytest

from server.api import create_app
from server.api.static import DIRECTORY, SWAGGER_UI, static_files, swagger_ui
from server.settings import Settings
from tests import fake_worker
from tests.conftest import serving

NAMES = sorted(path.name for path in DIRECTORY.iterdir())
# What the page loads by name: scripts, styles and pictures in HTML, modules in scripts.
LOADED = re.compile(r'(?:src|href)="(playground/[^"]+)"|from "\./([^"]+)"')


def test_the_page_is_the_root(client: httpx.Client) -> None:
    answer = client.get("/")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert "<title>Paellera</title>" in answer.text


def test_what_the_page_loads_is_there_and_nothing_else_lies_about(client: httpx.Client) -> None:
    loaded, waiting = set[str](), {"index.html", "docs.html"}
    while waiting:
        name = waiting.pop()
        loaded.add(name)
        answer = client.get(f"/playground/{name}")
        assert answer.status_code == 200, name
        waiting |= {
            (page or module).rpartition("/")[2] for page, module in LOADED.findall(answer.text)
        } - loaded
    assert loaded == {*NAMES, *SWAGGER_UI}


@pytest.mark.parametrize("name", NAMES)
def test_no_file_names_another_origin_and_nothing_is_inline(name: str) -> None:
    text = (DIRECTORY / name).read_text()
    assert set(re.findall(r"\w+://[^\s\"']+", text)) <= {"http://www.w3.org/2000/svg"}
    assert not re.search(
        r"<style|\sstyle=|\son\w+=|<script(?! src=| type=\"module\" src=)|\beval\(|new Function",
        text,
    )


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/docs",
        "/playground/main.js",
        "/playground/style.css",
        "/playground/icon.svg",
        "/playground/swagger-ui-bundle.js",
    ],
)
def test_the_policy_lets_a_browser_ask_this_server_alone(client: httpx.Client, path: str) -> None:
    headers = client.get(path).headers
    policy = dict(
        directive.split(" ", 1) for directive in headers["content-security-policy"].split("; ")
    )
    assert policy == {
        "default-src": "'none'",
        "script-src": "'self'",
        "style-src": "'self'",
        "img-src": "'self' blob: data:",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    assert headers["x-content-type-options"] == "nosniff"


def test_a_file_that_a_browser_has_is_not_sent_again_until_it_changes(client: httpx.Client) -> None:
    first = client.get("/playground/main.js")
    assert first.headers["cache-control"] == "no-cache"
    again = client.get(
        "/playground/main.js", headers={"If-None-Match": f'"other", {first.headers["etag"]}'}
    )
    assert (again.status_code, again.content) == (304, b"")
    assert again.headers["etag"] == first.headers["etag"]
    assert client.get("/", headers={"If-None-Match": "*"}).status_code == 304
    assert (
        client.get("/playground/main.js", headers={"If-None-Match": '"other"'}).status_code == 200
    )


def test_the_reference_loads_nothing_from_elsewhere_and_by_relative_addresses_only(
    client: httpx.Client,
) -> None:
    page = client.get("/docs")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    addresses = re.findall(r'(?:src|href|data-document)="([^"]+)"', page.text)
    assert "openapi.json" in addresses
    for address in addresses:
        assert not re.match(r"/|\w+:", address)
        assert client.get(f"/{address}").status_code == 200


def test_no_oauth_page_of_the_framework_is_left(client: httpx.Client) -> None:
    assert client.get("/docs/oauth2-redirect").status_code == 404
    assert client.get("/redoc").status_code == 404


def test_swagger_ui_is_the_package_s_and_new_enough_for_openapi_3_1() -> None:
    assert set(swagger_ui()) == set(SWAGGER_UI)
    assert b'PACKAGE_VERSION:"5.' in swagger_ui()["swagger-ui-bundle.js"].content


def test_its_head_can_be_asked_for(client: httpx.Client) -> None:
    answer = client.head("/")
    assert (answer.status_code, answer.content) == (200, b"")


@pytest.mark.parametrize("name", ["nothing.js", "..%2Fcli.py", "%2e%2e", "index.html%00"])
def test_what_is_no_file_of_the_page_is_404_in_the_one_shape(
    client: httpx.Client, name: str
) -> None:
    answer = client.get(f"/playground/{name}")
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "not_found"


def test_all_of_it_is_small() -> None:
    assert sum(len(file.content) for file in static_files().values()) <= 150_000


def test_it_is_no_part_of_the_documented_interface(client: httpx.Client) -> None:
    assert not {"/", "/docs", "/playground/{name}"} & set(
        client.get("/openapi.json").json()["paths"]
    )


@pytest.mark.process
def test_the_page_needs_no_key_where_what_it_asks_does(
    fake_settings: Callable[..., Settings],
) -> None:
    with serving(
        create_app(fake_settings(api_keys="0123456789abcdef"), worker=fake_worker.main)
    ) as url:
        assert [
            httpx.get(url + path).status_code for path in ("/", "/playground/main.js", "/v1/models")
        ] == [200, 200, 401]
