"""The playground's connection: API keys, proxies, a server that stops, two tabs of one browser."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from playwright.sync_api import Page, Route, expect

from load_tests.browser import CHROMIUM, Playground
from server.api import create_app
from server.settings import Settings
from tests import fake_worker
from tests.conftest import serving, wait_until
from tests.support.browsers import APPLE, FOX, Open, forgive, serious

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium"),
]

KEY = "0123456789abcdef"
BAD_GATEWAY = "<html><head><title>502 Bad Gateway</title></head><body>nginx</body></html>"


@pytest.fixture(scope="module")
def keyed_address(fake_settings: Callable[..., Settings]) -> Iterator[str]:
    """A server that requires an API key."""
    app = create_app(fake_settings(api_keys=KEY), worker=fake_worker.main)
    with serving(app) as url:
        wait_until(lambda: httpx.get(f"{url}/readyz").status_code == 200, timeout_s=120)
        yield url


@pytest.fixture
def keyed(opened: Open, keyed_address: str) -> Playground:
    """Asked for a key."""
    playground = opened(keyed_address)
    expect(playground.page.locator("#key-form")).to_be_visible()
    return playground


def enter_key(playground: Playground, key: str) -> None:
    playground.page.fill("#key", key)
    playground.page.keyboard.press("Enter")


def kept_waiting(opened: Open, address: str, **stored: Any) -> tuple[Playground, list[Route]]:
    """The page before GET /v1/models is answered, and the route that waits.

    stored: the settings that the browser remembers.
    """
    playground = opened(address)
    page = playground.page
    page.evaluate("(form) => localStorage.setItem('paellera.form', form)", json.dumps(stored))
    waiting: list[Route] = []
    page.route("**/v1/models", lambda route: waiting.append(route))
    with page.expect_request("**/v1/models"):
        page.goto(address)
    return playground, waiting


# ── API keys ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("copied", [f" {KEY}\u200b", f"“{KEY}”", f"\ufeff{KEY}\u00a0\n"])
def test_a_key_is_used_without_what_copying_added(keyed: Playground, copied: str) -> None:
    enter_key(keyed, copied)
    keyed.ready()
    expect(keyed.page.locator("#key-form")).to_be_hidden()
    expect(keyed.page.locator("#prompt")).to_be_focused()
    assert keyed.page.evaluate("sessionStorage.getItem('paellera.key')") == KEY
    forgive(keyed, "401")


def test_a_key_that_no_server_can_have_is_refused_and_not_kept(keyed: Playground) -> None:
    page = keyed.page
    enter_key(keyed, "ключ")
    expect(page.locator("#key-error")).to_contain_text("of ASCII")
    expect(page.locator("#key")).to_be_focused()
    assert page.evaluate("sessionStorage.getItem('paellera.key')") is None
    enter_key(keyed, KEY)
    keyed.ready()
    forgive(keyed, "401")


def test_a_stored_key_that_cannot_be_sent_is_asked_for_again(keyed: Playground) -> None:
    page = keyed.page
    page.evaluate("sessionStorage.setItem('paellera.key', 'ключ')")
    page.reload()
    expect(page.locator("#key-form")).to_be_visible()
    enter_key(keyed, KEY)
    keyed.ready()
    forgive(keyed, "401")


def test_each_wrong_key_is_said_at_its_field_and_can_be_typed_over(keyed: Playground) -> None:
    page = keyed.page
    field = page.locator("#key")
    expect(field).to_have_accessible_description("")
    for key, said in (
        ("", "Enter a key."),
        ("ключ", "Keys have only the letters, digits and signs of ASCII."),
        ("first", "The server does not know this key."),
        ("second", "The server does not know this key."),
    ):
        enter_key(keyed, key)
        expect(field).to_have_accessible_description(said)
        expect(field).to_have_attribute("aria-invalid", "true")
        assert field.evaluate(
            "({ selectionStart, selectionEnd }) => [selectionStart, selectionEnd]"
        ) == [
            0,
            len(key),
        ]
        assert serious(keyed) == set()
        page.keyboard.type("0")
        expect(field).to_have_attribute("aria-invalid", "false")
        expect(field).to_have_accessible_description("")
    enter_key(keyed, KEY)
    keyed.ready()
    forgive(keyed, "401")


def test_a_request_that_lacked_the_key_is_no_error_any_more_once_the_key_is_right(
    keyed: Playground,
) -> None:
    page = keyed.page
    enter_key(keyed, KEY)
    keyed.ready()
    page.evaluate("sessionStorage.setItem('paellera.key', 'old')")
    keyed.press(APPLE)
    expect(page.locator("#error")).to_contain_text("unknown API key")
    enter_key(keyed, KEY)
    keyed.ready()
    expect(page.locator("#error")).to_be_empty()
    forgive(keyed, "401")


# ── proxies, and a server that stops ──────────────────────────────────────────────────────────────


def test_a_proxy_s_error_page_is_said_in_words(plain: Playground) -> None:
    page = plain.page
    for pattern in ("**/generate", "**/v1/models"):
        page.route(
            pattern,
            lambda route: route.fulfill(status=502, content_type="text/html", body=BAD_GATEWAY),
        )
    plain.press(APPLE)
    message = "A proxy answered in place of the server: 502 Bad Gateway"
    expect(page.locator("#error p").first).to_have_text(message)
    expect(page.locator("#readiness")).to_have_text(message)
    page.unroute("**/v1/models")
    plain.ready()
    expect(page.locator("#error")).to_be_empty()
    forgive(plain, "502")


def test_a_login_page_in_place_of_an_answer_is_said(opened: Open, plain_address: str) -> None:
    playground = opened("about:blank")
    page = playground.page
    page.route(
        "**/v1/models",
        lambda route: route.fulfill(content_type="text/html", body="<title>Sign in</title>"),
    )
    page.goto(plain_address)
    expect(page.locator("#readiness")).to_contain_text("A web page came in place of an answer")
    page.unroute("**/v1/models")
    playground.ready()
    page.route(
        "**/generate",
        lambda route: route.fulfill(content_type="text/html", body="<title>Sign in</title>"),
    )
    playground.press(APPLE)
    expect(page.locator("#error")).to_contain_text("A web page came in place of an answer")


@pytest.mark.parametrize("noticed_by", ["a request", "the metrics"])
def test_a_server_that_stopped_is_not_shown_as_ready_until_it_answers_again(
    plain: Playground, noticed_by: str
) -> None:
    page = plain.page
    plain.load(FOX)
    plain.choose("Outpaint")
    page.locator(".handle.up").press("PageUp")
    down = "**/*"
    if noticed_by == "a request":
        page.route("**/metrics", lambda route: route.fulfill(body=""))
        down = "**/{outpaint,v1/models,readyz}"
    page.route(down, lambda route: route.abort("connectionrefused"))
    if noticed_by == "a request":
        page.keyboard.press("Control+Enter")
        expect(page.locator("#error")).to_have_text("The server does not answer.")
    expect(page.locator("#readiness")).to_have_text("The server does not answer")
    expect(page.locator("#readiness")).to_have_attribute("data-state", "waiting")
    page.unroute(down)
    plain.ready()
    expect(page.locator("#error")).to_be_empty()
    expect(page.locator(".handle.up")).to_have_attribute("aria-valuenow", "32")
    forgive(plain, "ERR_CONNECTION_REFUSED")


def test_weights_that_the_server_has_no_more_give_way_to_the_default_ones(
    plain: Playground, plain_address: str
) -> None:
    page = plain.page
    plain.draw(APPLE)
    models = httpx.get(f"{plain_address}/v1/models").json()
    other = {**models["data"][0], "id": "other"}
    page.route("**/v1/models", lambda route: route.fulfill(json={**models, "data": [other]}))
    error = {"message": "model: unknown", "type": "invalid_request_error", "param": "model"}
    refusal = {"error": {**error, "code": "model_not_found"}}
    page.route("**/generate", lambda route: route.fulfill(status=404, json=refusal))
    plain.press("a pear")
    expect(page.locator("#error")).to_have_text(
        "The server does not have the weights “fake” any more. "
        "“other” is chosen now: generate again."
    )
    assert page.input_value("#model") == "other"
    assert page.input_value("#prompt") == "a pear"
    # Its request names the former weights.
    expect(page.get_by_role("button", name="Another seed")).to_be_hidden()
    with page.expect_request("**/generate") as request:
        page.keyboard.press("Control+Enter")
    assert request.value.post_data_json["model"] == "other"
    expect(page.locator("#error")).to_contain_text("model: unknown")
    forgive(plain, "404")


# ── before the server answers ─────────────────────────────────────────────────────────────────────


def test_remembered_settings_outlast_what_is_typed_before_the_server_answers(
    opened: Open, plain_address: str
) -> None:
    playground, waiting = kept_waiting(
        opened, plain_address, negative_prompt="blur", seed="5", prompt="old", live=True
    )
    page = playground.page
    page.fill("#prompt", "a pear")
    waiting[0].continue_()
    page.unroute("**/v1/models")
    playground.ready()
    for _ in range(2):
        assert page.input_value("#prompt") == "a pear"
        assert page.input_value("#negative_prompt") == "blur"
        assert page.input_value("#seed") == "5"
        expect(page.get_by_role("switch", name="Live")).to_be_checked()
        page.reload()
        playground.ready()


def test_only_the_chosen_operation_s_fields_are_shown_before_the_server_answers(
    opened: Open, plain_address: str
) -> None:
    playground, _ = kept_waiting(opened, plain_address)
    page = playground.page
    expect(page.locator("#prompt")).to_be_visible()
    for other in ("#keyframes", "#strength", "#feather", "#scale", "#brush", "#margins"):
        expect(page.locator(other)).to_be_hidden()
    playground.choose("Edit")
    expect(page.locator("#strength")).to_be_visible()


# ── what is remembered ────────────────────────────────────────────────────────────────────────────


def test_a_reset_lasts(plain: Playground) -> None:
    page = plain.page
    page.fill("#negative_prompt", "blur")
    page.fill("#seed", "5")
    page.fill("#n", "3")
    page.locator("#reset").click()
    page.reload()
    plain.ready()
    fields = ("#negative_prompt", "#seed", "#n")
    assert [page.input_value(field) for field in fields] == ["", "", "1"]


def test_the_prompt_of_an_example_or_of_a_button_is_remembered(plain: Playground) -> None:
    page = plain.page
    example = page.locator("#examples button").first
    prompt = example.inner_text()
    example.click()
    plain.finished()
    page.reload()
    plain.ready()
    assert page.input_value("#prompt") == prompt
    page.locator("#gallery button").click()
    page.fill("#prompt", "a pear")
    with page.expect_request("**/upscale"):
        page.locator("#upscale").click()
    page.reload()
    plain.ready()
    assert page.input_value("#prompt") == prompt


def test_a_browser_that_keeps_nothing_is_not_said_to_keep_the_history(
    opened: Open, plain_address: str
) -> None:
    playground = opened("about:blank")
    page = playground.page
    page.add_init_script(
        """Object.defineProperty(window, "localStorage", {
          get() {
            throw new DOMException("denied", "SecurityError");
          },
        });"""
    )
    playground.open(plain_address)
    empty = "getComputedStyle(document.getElementById('gallery'), '::after').content"
    assert "until this page is closed" in page.evaluate(empty)
    playground.draw(APPLE)
    expect(page.locator("#history-note")).to_contain_text("Kept until this page is closed.")


# ── two tabs ──────────────────────────────────────────────────────────────────────────────────────


def second_tab(first: Playground) -> Page:
    tab = first.page.context.new_page()
    tab.goto(first.page.url)
    expect(tab.locator("#readiness")).to_have_attribute("data-state", "ready")
    return tab


def test_another_tab_keeps_its_focus_and_its_mark(plain: Playground) -> None:
    tab = second_tab(plain)
    expect(tab.locator("#forget-all")).to_be_hidden()
    plain.draw(APPLE)
    expect(tab.locator("#forget-all")).to_be_visible()
    tab.locator("#gallery button").click()
    tab.evaluate("window.kept = document.activeElement")
    plain.page.fill("#prompt", "a pear")
    plain.page.select_option("#theme", "dark")
    # A second image: its event comes after those of the keys.
    plain.page.evaluate("document.getElementById('status').textContent = ''")
    plain.draw("a pear")
    expect(tab.locator("#gallery img")).to_have_count(2)
    marked = tab.locator("#gallery [aria-current=true] img")
    expect(marked).to_have_attribute("alt", APPLE)
    expect(tab.locator("#gallery button").nth(1)).to_be_focused()


def test_a_key_typed_in_one_tab_leaves_the_gallery_of_another_as_it_is(plain: Playground) -> None:
    plain.draw(APPLE)
    tab = second_tab(plain)
    tab.evaluate(
        """() => {
          window.built = 0;
          const gallery = document.getElementById("gallery");
          new MutationObserver(() => (window.built += 1)).observe(gallery, { childList: true });
          addEventListener("storage", ({ key }) => (window.heard = key));
        }"""
    )
    plain.page.fill("#prompt", "a pear")
    tab.wait_for_function("window.heard === 'paellera.form'")
    assert tab.evaluate("window.built") == 0


def test_an_image_deleted_in_another_tab_is_not_called_removed_for_newer_ones(
    plain: Playground,
) -> None:
    plain.draw(APPLE)
    tab = second_tab(plain)
    tab.fill("#n", "2")
    tab.fill("#prompt", "a pear")
    tab.locator("#run").click()
    expect(plain.page.locator("#gallery button")).to_have_count(3)
    plain.page.locator("#gallery button").first.focus()
    plain.page.keyboard.press("Delete")
    expect(tab.locator("#gallery button")).to_have_count(2)
    tab.locator("#tiles button").last.click()
    expect(tab.locator("#error")).to_contain_text("This image was deleted in another tab.")


def test_an_image_deleted_in_another_tab_is_enlarged_where_it_is_shown(plain: Playground) -> None:
    plain.draw(APPLE)
    tab = second_tab(plain)
    tab.locator("#gallery button").click()
    plain.page.locator("#forget").click()
    expect(tab.locator("#gallery button")).to_have_count(0)
    with tab.expect_request("**/upscale"):
        tab.locator("#upscale").click()
    expect(tab.locator("#gallery button")).to_have_count(1)
