"""The playground on a phone: small screens, touch keyboards, and fingers on masks."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from playwright.sync_api import Locator, expect

from load_tests.browser import CHROMIUM, Playground
from tests.support.browsers import APPLE, FOX, Open, forgive, serious

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium"),
]

PHONE = {"viewport": {"width": 360, "height": 640}, "is_mobile": True, "has_touch": True}


@pytest.fixture
def phone(opened: Open, plain_address: str) -> Playground:
    playground = opened(plain_address, **PHONE)
    playground.ready()
    return playground


def visible_share(element: Locator) -> float:
    """The share of the element that is on the screen and not covered, by sampling its points."""
    share: float = element.evaluate(
        """(element) => {
          const { left, top, width, height } = element.getBoundingClientRect();
          const rows = [0.1, 0.3, 0.5, 0.7, 0.9];
          const at = (row) => document.elementFromPoint(left + width / 2, top + row * height);
          return rows.filter((row) => element.contains(at(row))).length / rows.length;
        }"""
    )
    return share


def test_an_empty_prompt_is_said_where_it_is_seen(phone: Playground) -> None:
    page = phone.page
    page.tap("#run")
    expect(page.locator("#error")).to_have_text("A prompt is required.")
    assert visible_share(page.locator("#error")) == 1
    expect(page.locator("#prompt")).to_have_attribute("aria-invalid", "true")
    expect(page.locator("#prompt")).to_be_focused()
    page.keyboard.type("a")
    expect(page.locator("#prompt")).not_to_have_attribute("aria-invalid", "true")


def test_a_mask_that_is_missing_is_said_where_it_is_seen(phone: Playground) -> None:
    page = phone.page
    phone.load(FOX)
    phone.choose("Inpaint")
    page.fill("#prompt", APPLE)
    page.tap("#run")
    expect(page.locator("#error")).to_contain_text("Paint over the part")
    assert visible_share(page.locator("#error")) == 1


def test_a_refusal_is_said_where_it_is_seen(phone: Playground) -> None:
    page = phone.page
    error = {"message": "the queue is full", "type": "x", "param": None, "code": "queue_full"}
    page.route("**/generate", lambda route: route.fulfill(status=429, json={"error": error}))
    page.fill("#prompt", APPLE)
    page.tap("#run")
    expect(page.locator("#error")).to_contain_text("the queue is full")
    assert visible_share(page.locator("#error")) == 1
    forgive(phone, "429")


def test_a_wrong_number_is_said_and_marked_where_it_is_seen(phone: Playground) -> None:
    page = phone.page
    page.fill("#prompt", APPLE)
    page.locator("#settings summary").tap()
    page.fill("#temperature_end", "9")
    page.tap("#run")
    expect(page.locator("#error")).to_contain_text("must be a number from 0.05 to 5")
    expect(page.locator("#temperature_end")).to_have_attribute("aria-invalid", "true")
    assert visible_share(page.locator("#error")) == 1
    assert visible_share(page.locator("#temperature_end")) == 1


def test_the_go_key_of_a_touch_keyboard_draws(phone: Playground) -> None:
    page = phone.page
    page.tap("#prompt")
    page.keyboard.type(APPLE)
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("below")
    with page.expect_request("**/generate"):
        page.keyboard.press("Enter")
    phone.finished()
    assert page.input_value("#prompt") == f"{APPLE}\nbelow"


def test_enter_while_a_word_is_composed_draws_nothing(phone: Playground) -> None:
    page = phone.page
    page.fill("#prompt", "りんご")
    taken = page.locator("#prompt").evaluate(
        """(prompt) => [true, false].map((isComposing) => {
          const key = { key: "Enter", isComposing, bubbles: true, cancelable: true };
          return !prompt.dispatchEvent(new KeyboardEvent("keydown", key));
        })"""
    )
    assert taken == [False, True]
    phone.finished()


def test_live_mode_shows_its_image_above_the_prompt_while_the_keyboard_is_open(
    phone: Playground,
) -> None:
    page = phone.page
    page.get_by_role("switch", name="Live").check()
    page.set_viewport_size({"width": 360, "height": 340})
    page.tap("#prompt")
    page.keyboard.type("a red apple")
    expect(page.locator("#picture")).to_have_attribute("alt", "a red apple")
    assert visible_share(page.locator("#canvas")) == 1
    assert visible_share(page.locator("#prompt")) == 1
    expect(page.locator("#status")).to_contain_text("Drawn in")
    assert visible_share(page.locator("#status")) == 1
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    assert serious(phone) == set()


def test_a_second_finger_on_a_mask_paints_nothing(phone: Playground) -> None:
    page = phone.page
    phone.load(FOX)
    phone.choose("Inpaint")
    page.locator("#mask").scroll_into_view_if_needed()
    box = page.locator("#mask").bounding_box()
    assert box is not None
    left, right = box["x"] + 0.2 * box["width"], box["x"] + 0.8 * box["width"]
    middle = box["y"] + 0.5 * box["height"]
    touches = page.context.new_cdp_session(page)

    def touch(kind: str, *places: float) -> None:
        points: list[dict[str, Any]] = [
            {"x": x, "y": middle, "id": number} for number, x in enumerate(places)
        ]
        touches.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})

    touch("touchStart", left)
    touch("touchStart", left, right)
    for step in range(1, 4):
        touch("touchMove", left - step, right + step)
    touch("touchEnd")
    painted = page.locator("#mask").evaluate(
        """(mask) => {
          const row = mask.getContext("2d").getImageData(0, mask.height / 2, mask.width, 1).data;
          return [0.2, 0.5, 0.8].map((share) => row[4 * Math.round(share * mask.width) + 3] > 0);
        }"""
    )
    assert painted == [True, False, False]


def test_the_empty_state_fits_with_its_padding(phone: Playground) -> None:
    page = phone.page
    canvas = page.locator("#canvas").bounding_box()
    title = page.locator("#empty-title").bounding_box()
    last = page.locator("#examples button").last.bounding_box()
    assert canvas is not None
    assert title is not None
    assert last is not None
    assert title["y"] - canvas["y"] >= 16
    assert canvas["y"] + canvas["height"] - last["y"] - last["height"] >= 16


def test_the_chart_s_minutes_do_not_overlap(opened: Open, plain_address: str) -> None:
    playground = opened(plain_address, viewport={"width": 320, "height": 640})
    playground.ready()
    minutes = playground.page.locator("#chart text", has_text="min")
    expect(minutes).to_have_count(5)
    boxes = [minute.bounding_box() for minute in minutes.all()]
    ordered = sorted((box["x"], box["x"] + box["width"]) for box in boxes if box)
    assert all(end < start for (_, end), (start, _) in pairwise(ordered))
