"""Live mode of the playground: images while one types. Most answers come from the test itself."""

from __future__ import annotations

import base64
import json
import re
import time
from typing import Any

import pytest
from playwright.sync_api import Request, Route, expect

from load_tests.browser import CHROMIUM, Playground
from load_tests.playground import waits_of
from tests.conftest import wait_until
from tests.support.browsers import APPLE, HEIGHT, WIDTH, Open, forgive, png, rows, serious

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium"),
]


class Endpoint:
    """The endpoint /generate, which keeps requests until the test answers them.

    bodies: of all requests. superseded: number of requests that the page aborted.
    """

    def __init__(self, playground: Playground) -> None:
        self.page = playground.page
        self.bodies: list[dict[str, Any]] = []
        self.routes: list[Route] = []
        self.superseded = 0
        self.page.route("**/generate", self._keep)
        self.page.on("requestfailed", self._count)

    def _keep(self, route: Route) -> None:
        self.bodies.append(route.request.post_data_json)
        self.routes.append(route)

    def _count(self, request: Request) -> None:
        self.superseded += request.url.endswith("/generate")

    @property
    def prompts(self) -> list[str]:
        return [body["prompt"] for body in self.bodies]

    def expect_requests(self, count: int) -> None:
        """Wait until so many requests have arrived, and a moment for one too many."""
        for _ in range(200):
            if len(self.bodies) >= count:
                break
            self.page.wait_for_timeout(25)
        self.page.wait_for_timeout(150)
        assert len(self.bodies) == count, self.prompts

    def answer(self, index: int = -1, width: int = WIDTH) -> None:
        """Answer a request with an image of this width."""
        body = self.bodies[index]
        parameters = {"operation": "generate", **body, "width": width, "height": HEIGHT}
        parameters = {"num_inference_steps": 4, "guidance_scale": [1, 1], **parameters}
        image = {"seed": body["seed"], "width": width, "height": HEIGHT, "format": "png"}
        file = base64.b64encode(png((width, HEIGHT))).decode()
        answer = {
            "model": "fake",
            "timings": {"denoise": 0.02},
            "parameters": {"sampler": "multinomial", **parameters},
            "images": [{**image, "b64_json": file}],
        }
        if body.get("stream"):
            event = f"event: completed\ndata: {json.dumps(answer)}\n\n"
            self.routes[index].fulfill(body=event, content_type="text/event-stream")
        else:
            self.routes[index].fulfill(json=answer)

    def refuse(self, status: int, index: int = -1, **headers: str) -> None:
        error = {"message": "too many requests", "type": "server_error", "param": None}
        self.routes[index].fulfill(
            status=status, headers=headers, json={"error": {**error, "code": "busy"}}
        )


@pytest.fixture
def blank(opened: Open) -> Playground:
    return opened("about:blank", reduced_motion="no-preference")


@pytest.fixture
def endpoint(blank: Playground) -> Endpoint:
    """Before the page is opened: a route that comes later may miss the first request."""
    return Endpoint(blank)


@pytest.fixture
def live(blank: Playground, endpoint: Endpoint, plain_address: str) -> Playground:
    """With live mode on."""
    return switched_on(blank, plain_address)


def switched_on(playground: Playground, address: str) -> Playground:
    playground.open(address)
    playground.page.get_by_role("switch", name="Live").focus()
    playground.page.keyboard.press("Space")
    playground.page.focus("#prompt")
    return playground


def type_at_once(playground: Playground, text: str) -> None:
    """Type the text key by key without a pause, however slow the machine is."""
    playground.page.locator("#prompt").evaluate(
        """(prompt, text) => {
          for (const key of text) {
            prompt.value += key;
            prompt.dispatchEvent(new InputEvent("input", { bubbles: true }));
          }
        }""",
        text,
    )


def expect_shown(playground: Playground, prompt: str) -> None:
    expect(playground.page.locator("#picture")).to_have_attribute("alt", prompt)


# ── requests ──────────────────────────────────────────────────────────────────────────────────────


def test_the_first_key_is_sent_at_once_and_keys_in_quick_succession_together(
    live: Playground,
    endpoint: Endpoint,
) -> None:
    type_at_once(live, "apple")
    endpoint.expect_requests(2)
    assert endpoint.prompts == ["a", "apple"]
    assert endpoint.superseded == 1


def test_a_superseded_request_is_aborted_and_the_newest_text_wins(
    live: Playground, endpoint: Endpoint
) -> None:
    for count, key in enumerate("abc", 1):
        live.page.keyboard.press(key)
        endpoint.expect_requests(count)
    assert endpoint.superseded == 2
    endpoint.answer(2)
    expect_shown(live, "abc")
    for index in (0, 1):
        endpoint.answer(index)
    live.page.wait_for_timeout(200)
    expect_shown(live, "abc")


def test_keys_faster_than_images_do_not_keep_images_from_appearing(
    live: Playground, endpoint: Endpoint
) -> None:
    live.page.keyboard.press("a")
    endpoint.expect_requests(1)
    live.page.evaluate("() => { performance.now = () => 0; }")
    live.page.keyboard.type("bcd", delay=80)
    endpoint.expect_requests(1)
    assert endpoint.superseded == 0
    endpoint.answer()
    expect_shown(live, "a")


def test_an_answer_after_which_a_key_waits_is_shown_and_the_next_request_sent_at_once(
    live: Playground,
    endpoint: Endpoint,
) -> None:
    live.page.keyboard.press("a")
    endpoint.expect_requests(1)
    # A wait that only the answer ends.
    live.page.evaluate("() => { window.setTimeout = () => 1e6; }")
    live.page.keyboard.press("b")
    endpoint.answer()
    endpoint.expect_requests(2)
    expect_shown(live, "a")
    assert endpoint.superseded == 0
    endpoint.answer()
    expect_shown(live, "ab")


def test_all_of_them_have_one_seed_which_is_shown(live: Playground, endpoint: Endpoint) -> None:
    seed = live.page.input_value("#seed")
    assert seed.isdigit()
    for count, key in enumerate("abc", 1):
        live.page.keyboard.press(key)
        endpoint.expect_requests(count)
        endpoint.answer()
        expect_shown(live, "abc"[:count])
    assert [str(body["seed"]) for body in endpoint.bodies] == [seed] * 3
    assert {body["response_format"] for body in endpoint.bodies} == {"json"}
    live.page.fill("#seed", "7")
    endpoint.expect_requests(4)
    assert endpoint.bodies[-1]["seed"] == 7
    live.page.fill("#seed", "")
    endpoint.expect_requests(4)
    live.page.focus("#prompt")
    endpoint.expect_requests(5)
    assert live.page.input_value("#seed") == str(endpoint.bodies[-1]["seed"])


def test_one_quick_image_is_drawn_whatever_the_form_says_of_quality(
    live: Playground, endpoint: Endpoint
) -> None:
    page = live.page
    page.fill("#n", "3")
    page.select_option("#hires_scale", "2")
    page.check("#deterministic")
    page.fill("#num_inference_steps", "20")
    page.fill("#prompt", APPLE)
    endpoint.expect_requests(1)
    (body,) = endpoint.bodies
    assert body["num_inference_steps"] == 4
    assert not {"n", "hires", "deterministic", "preset", "stream", "partial_images"} & body.keys()


def test_the_preset_fast_draws_where_there_is_one(
    blank: Playground, endpoint: Endpoint, hasty_address: str
) -> None:
    playground = switched_on(blank, hasty_address)
    page = playground.page
    page.select_option("#preset", "quality")
    page.fill("#guidance_scale", "3")
    page.fill("#num_inference_steps", "6")
    page.fill("#negative_prompt", "blur")
    page.fill("#prompt", APPLE)
    endpoint.expect_requests(1)
    assert endpoint.bodies[0]["preset"] == "fast"
    unsuited = {"guidance_scale", "num_inference_steps", "negative_prompt"}
    assert not unsuited & endpoint.bodies[0].keys()
    endpoint.answer()
    expect_shown(playground, APPLE)


def test_an_empty_prompt_draws_nothing_and_spaces_draw_nothing_new(
    live: Playground, endpoint: Endpoint
) -> None:
    page = live.page
    page.keyboard.press("a")
    endpoint.expect_requests(1)
    page.keyboard.press("Backspace")
    page.keyboard.type("   ")
    endpoint.expect_requests(1)
    assert endpoint.superseded == 1
    page.keyboard.press("b")
    endpoint.expect_requests(2)
    endpoint.answer()
    expect_shown(live, "b")
    page.keyboard.press("Space")
    endpoint.expect_requests(2)


def test_with_reduced_motion_images_change_when_typing_pauses(
    opened: Open, plain_address: str
) -> None:
    playground = opened("about:blank")
    endpoint = Endpoint(playground)
    switched_on(playground, plain_address)
    type_at_once(playground, "apple")
    endpoint.expect_requests(1)
    assert endpoint.prompts == ["apple"]


def test_other_operations_and_a_switch_that_is_off_draw_nothing(
    live: Playground, endpoint: Endpoint
) -> None:
    live.page.uncheck("#live")
    live.page.fill("#prompt", APPLE)
    live.page.check("#live")
    endpoint.expect_requests(1)
    endpoint.answer()
    expect_shown(live, APPLE)
    live.choose("Edit")
    expect(live.page.locator("#live")).to_be_hidden()
    live.page.fill("#prompt", "a pear")
    endpoint.expect_requests(1)
    expect(live.page.locator("#gallery img")).to_have_count(1)


# ── errors ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("status", [429, 503])
def test_a_refusal_is_quiet_and_the_next_key_waits_as_long_as_the_server_says(
    live: Playground, endpoint: Endpoint, status: int
) -> None:
    page = live.page
    page.keyboard.press("a")
    endpoint.expect_requests(1)
    began = time.monotonic()
    endpoint.refuse(status, **{"Retry-After": "4"})
    expect(page.locator("#status")).to_have_text("too many requests. Live mode waits for 4 s.")
    page.keyboard.type("bc")
    expect(page.locator("#error")).to_be_empty()
    expect(page.locator("#prompt")).to_be_focused()
    endpoint.expect_requests(2)
    assert time.monotonic() - began > 3.9
    assert endpoint.prompts == ["a", "abc"]
    endpoint.answer()
    expect_shown(live, "abc")
    expect(page.locator("#status")).to_have_text("")
    forgive(live, str(status))


def test_a_refused_text_is_drawn_without_another_key_as_soon_as_the_server_allows(
    live: Playground, endpoint: Endpoint
) -> None:
    page = live.page
    page.keyboard.press("a")
    endpoint.expect_requests(1)
    began = time.monotonic()
    endpoint.refuse(429, **{"Retry-After": "1"})
    endpoint.expect_requests(2)
    assert time.monotonic() - began > 0.9
    assert endpoint.prompts == ["a", "a"]
    endpoint.answer()
    expect_shown(live, "a")
    forgive(live, "429")


def test_without_a_connection_the_next_key_tries_again(
    live: Playground, endpoint: Endpoint
) -> None:
    page = live.page
    page.keyboard.press("a")
    endpoint.expect_requests(1)
    endpoint.routes[-1].abort("internetdisconnected")
    expect(page.locator("#status")).to_have_text(
        "The server does not answer. The next key tries again."
    )
    endpoint.expect_requests(1)
    page.keyboard.press("Space")
    endpoint.expect_requests(2)
    endpoint.answer()
    expect_shown(live, "a")
    forgive(live, "ERR_INTERNET_DISCONNECTED")


def test_a_key_that_the_server_does_not_know_any_more_is_asked_for_without_taking_the_focus(
    live: Playground, endpoint: Endpoint
) -> None:
    page = live.page
    page.keyboard.press("a")
    endpoint.expect_requests(1)
    expect(page.locator("#key-form")).to_be_hidden()
    endpoint.refuse(401)
    expect(page.locator("#key-form")).to_be_visible()
    expect(page.locator("#prompt")).to_be_focused()
    page.keyboard.press("b")
    endpoint.expect_requests(2)
    endpoint.answer()
    expect_shown(live, "ab")
    forgive(live, "401")


# ── the history, the button, announcements ────────────────────────────────────────────────────────


def draw_while_typing(live: Playground, endpoint: Endpoint, text: str) -> None:
    """Type the text key by key, with an image for each."""
    before = len(endpoint.bodies)
    for count, key in enumerate(text, 1):
        live.page.keyboard.press(key)
        endpoint.expect_requests(before + count)
        endpoint.answer()
    expect_shown(live, text)


def test_only_the_last_image_is_kept_when_live_mode_ends(
    live: Playground, endpoint: Endpoint
) -> None:
    page = live.page
    draw_while_typing(live, endpoint, "abc")
    expect(page.locator("#gallery img")).to_have_count(0)
    page.uncheck("#live")
    expect(page.locator("#gallery img")).to_have_count(1)
    expect_shown(live, "abc")
    expect(page.locator("#caption")).to_have_text("abc")


def test_leaving_the_page_ends_live_mode_too(live: Playground, endpoint: Endpoint) -> None:
    draw_while_typing(live, endpoint, "ab")
    live.page.reload()
    live.ready()
    expect(live.page.locator("#gallery img")).to_have_attribute("alt", "ab")


def test_the_button_draws_the_form_s_request_with_the_same_seed_and_the_image_stays(
    live: Playground,
    endpoint: Endpoint,
) -> None:
    page = live.page
    draw_while_typing(live, endpoint, "abc")
    page.keyboard.press("d")
    endpoint.expect_requests(4)
    page.keyboard.press("Control+Enter")
    endpoint.expect_requests(5)
    assert endpoint.superseded == 1
    quick, full = endpoint.bodies[2], endpoint.bodies[4]
    assert full["seed"] == quick["seed"]
    assert full["stream"] is True
    assert "num_inference_steps" not in full
    expect(page.locator("#gallery img")).to_have_count(1)
    endpoint.answer()
    live.finished()
    expect(page.locator("#gallery img")).to_have_count(2)
    page.focus("#prompt")
    page.keyboard.press("End")
    page.keyboard.press("Space")
    endpoint.expect_requests(5)
    expect(page.locator("#status")).to_have_text(re.compile("^Generated in"))


def test_a_key_during_the_button_s_request_is_drawn_after_it(
    live: Playground, endpoint: Endpoint
) -> None:
    page = live.page
    page.uncheck("#live")
    page.fill("#prompt", "abc")
    page.check("#live")
    endpoint.expect_requests(1)
    page.focus("#prompt")
    page.keyboard.press("Control+Enter")
    endpoint.expect_requests(2)
    page.keyboard.press("End")
    page.keyboard.press("d")
    endpoint.expect_requests(2)
    endpoint.answer()
    endpoint.expect_requests(3)
    assert endpoint.prompts == ["abc", "abc", "abcd"]
    expect(page.locator("#gallery img")).to_have_count(1)


@pytest.mark.parametrize("button", ["Another seed", "Delete", "Upscale"])
def test_buttons_of_the_shown_image_act_on_the_image_of_live_mode(
    live: Playground, endpoint: Endpoint, button: str
) -> None:
    page = live.page
    draw_while_typing(live, endpoint, "ab")
    expect(page.locator("#status")).to_have_text(re.compile("Drawn in"))
    page.unroute("**/generate")
    page.get_by_role("button", name=button, exact=True).click()
    if button != "Delete":
        live.finished()
    expect(page.locator("#gallery img")).to_have_count(0 if button == "Delete" else 2)


def test_an_image_of_the_history_is_not_replaced_by_an_answer(
    live: Playground, endpoint: Endpoint
) -> None:
    page = live.page
    draw_while_typing(live, endpoint, "ab")
    page.uncheck("#live")
    page.check("#live")
    endpoint.expect_requests(3)
    page.locator("#gallery button").click()
    page.wait_for_timeout(100)
    assert endpoint.superseded == 1
    page.fill("#prompt", "abc")
    endpoint.expect_requests(4)


def test_it_is_announced_when_typing_rests_and_not_image_by_image(
    live: Playground, endpoint: Endpoint
) -> None:
    page = live.page
    page.evaluate(
        """() => {
          window.announced = [];
          const status = document.getElementById("status");
          const note = () => window.announced.push(status.textContent);
          new MutationObserver(note).observe(status, { childList: true });
        }"""
    )
    draw_while_typing(live, endpoint, "abcde")
    expect(page.locator("#status")).to_have_text(re.compile(r"^Drawn in .* Seed \d+\.$"))
    announced = [text for text in page.evaluate("window.announced") if text]
    assert len(announced) == 1
    expect(page.locator("#caption")).to_have_text("abcde")
    expect(page.locator("#facts")).to_contain_text("Steps")


def test_nothing_moves_while_images_change(live: Playground, endpoint: Endpoint) -> None:
    page = live.page
    places = ("#run", "#canvas", "#status")
    before = [page.locator(place).bounding_box() for place in places]
    page.keyboard.press("a")
    endpoint.expect_requests(1)
    endpoint.answer()
    expect_shown(live, "a")
    assert [page.locator(place).bounding_box() for place in places] == before
    page.evaluate(
        """() => {
          window.jumps = 0;
          const count = (list) => list.getEntries().forEach(({ value }) => (window.jumps += value));
          new PerformanceObserver(count).observe({ type: "layout-shift" });
        }"""
    )
    page.keyboard.press("b")
    endpoint.expect_requests(2)
    assert page.locator("#picture").evaluate("(image) => image.complete && image.naturalWidth")
    endpoint.answer()
    expect_shown(live, "ab")
    page.wait_for_timeout(100)
    assert page.evaluate("window.jumps") == 0


def test_the_switch_and_the_seed_are_remembered_and_nothing_is_drawn_before_a_key(
    live: Playground,
    endpoint: Endpoint,
) -> None:
    page = live.page
    seed = page.input_value("#seed")
    page.reload()
    live.ready()
    expect(page.get_by_role("switch", name="Live")).to_be_checked()
    assert page.input_value("#seed") == seed
    page.wait_for_timeout(300)
    assert endpoint.bodies == []
    page.focus("#prompt")
    page.keyboard.press("a")
    endpoint.expect_requests(1)


# ── the load test's figures ───────────────────────────────────────────────────────────────────────


def test_each_key_counts_until_the_first_image_that_contains_it() -> None:
    keys = [(0.0, ""), (100.0, "a"), (220.0, "a"), (340.0, "a c"), (460.0, "a ca")]
    pictures = [(150.0, "a"), (400.0, "a"), (500.0, "a c"), (600.0, "a ca")]
    assert waits_of(keys, pictures) == pytest.approx([0.05, 0.16, 0.14])


# ── with the server ───────────────────────────────────────────────────────────────────────────────


def test_the_server_draws_what_is_typed_and_stops_what_is_superseded(
    blank: Playground, plain_address: str
) -> None:
    live = switched_on(blank, plain_address)
    page = live.page
    page.fill("#prompt", "hold this")
    wait_until(lambda: rows(plain_address) == 1, timeout_s=60)
    page.fill("#prompt", "")
    wait_until(lambda: rows(plain_address) == 0, timeout_s=60)
    page.keyboard.type("a red apple", delay=40)
    expect_shown(live, "a red apple")
    assert live.shown.shape == (HEIGHT, WIDTH, 3)
    assert json.loads(page.evaluate("localStorage.getItem('paellera.history') ?? '[]'")) == []
    expect(page.locator("#status")).to_have_text(re.compile("Drawn in"))
    assert serious(live) == set()
    page.keyboard.press("Control+Enter")
    live.finished()
    expect(page.locator("#gallery img")).to_have_count(2)


def test_the_embedded_weights_draw_while_one_types(blank: Playground, live_server: str) -> None:
    playground = switched_on(blank, live_server)
    page = playground.page
    page.keyboard.type("a red apple", delay=60)
    expect_shown(playground, "a red apple")
    page.uncheck("#live")
    expect(page.locator("#gallery img")).to_have_count(1)
    seed = page.input_value("#seed")
    page.evaluate("document.getElementById('status').textContent = ''")
    page.locator("#run").click()
    assert f"Seed {seed}." in playground.finished()
