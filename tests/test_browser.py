"""The playground driven as people drive it, by mouse and by keyboard, against a server with the
embedded weights.
"""

from __future__ import annotations

import base64
import io
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
import PIL.Image
import pytest
from fastapi import Response
from playwright.sync_api import expect

from load_tests.browser import CHROMIUM, Playground
from server.api import create_app
from server.settings import Settings
from tests import fake_worker
from tests.conftest import serving, wait_until
from tests.support.browsers import (
    APPLE,
    FOX,
    FOX_HEIGHT,
    FOX_WIDTH,
    Open,
    forgive,
    rows,
    serious,
)

pytestmark = [
    pytest.mark.process,
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium"),
]

ROOT = Path(__file__).parents[1]
SHOWN = (
    "a strawberry on a cyan background",
    "a dog on a yellow background",
    "a big yellow star on a purple background",
    "a cat on a blue background",
    "a green cactus on an orange background",
    "a red mushroom on a black background",
)


# ── with the embedded weights ─────────────────────────────────────────────────────────────────────


def test_a_picture_is_seen_at_least_twice_before_it_is_done(playground: Playground) -> None:
    playground.page.select_option("#preset", "quality")
    playground.page.evaluate(
        """() => {
          window.seen = [];
          const watch = (records) => window.seen.push(...records.map(({ target }) => target.src));
          new MutationObserver(watch).observe(document.getElementById("picture"), { attributeFilter: ["src"] });
        }"""
    )
    said = playground.draw(APPLE)
    assert "first preview after" in said
    assert len(playground.page.evaluate("window.seen")) >= 3


@pytest.mark.judges_weights
def test_the_last_of_the_previews_is_the_picture_of_the_prompt(playground: Playground) -> None:
    playground.draw(APPLE)
    height, width, _ = playground.shown.shape
    middle = playground.shown[height * 2 // 5 : height * 3 // 5, width * 2 // 5 : width * 3 // 5]
    red, green, blue = np.median(middle.reshape(-1, 3), axis=0)
    assert red > max(green, blue) + 60


def test_what_is_painted_over_is_drawn_anew_and_the_rest_is_kept(playground: Playground) -> None:
    playground.load(FOX)
    playground.choose("Inpaint")
    playground.drag("#mask", (0.3, 0.3), (0.7, 0.3), (0.5, 0.7))
    before = playground.shown
    playground.draw("a yellow circle on a blue background")
    changed = (playground.shown != before).any(axis=-1)
    height, width = changed.shape
    assert changed[height // 4 : height * 2 // 5, width // 3 : width * 2 // 3].any()
    assert not changed[: height // 11].any()
    assert not changed[-(height // 11) :].any()


def test_a_border_that_is_dragged_outwards_is_where_the_picture_goes_on(
    playground: Playground,
) -> None:
    playground.load(FOX)
    playground.choose("Outpaint")
    before = playground.shown
    playground.drag(".handle.right", (0.5, 0.5), (5.5, 0.5))
    added = int(playground.page.get_attribute(".handle.right", "aria-valuenow") or 0)
    assert added > 0
    playground.draw()
    assert playground.shown.shape == (FOX_HEIGHT, FOX_WIDTH + added, 3)
    assert (playground.shown[:, :FOX_WIDTH] == before).all()


@pytest.mark.judges_weights
def test_frames_between_two_prompts_can_be_looked_at_one_by_one(playground: Playground) -> None:
    page = playground.page
    playground.choose("Interpolate")
    page.fill("#frames", "3")
    for i, prompt in enumerate(("a red circle on white", "a blue square on white")):
        page.locator("#keyframes input").nth(i).fill(prompt)
    playground.draw()
    first = playground.shown
    page.locator("#frame-number").focus()
    page.keyboard.press("End")
    assert page.get_attribute("#frame-number", "max") == "2"
    assert (playground.shown != first).any()


def test_the_history_is_there_when_the_page_is_opened_again_and_makes_the_same_picture(
    playground: Playground,
) -> None:
    page = playground.page
    playground.draw(APPLE)
    first = playground.shown
    playground.draw("a blue square on a yellow background")
    page.select_option("#theme", "dark")
    page.reload()
    playground.ready()
    assert page.get_attribute("html", "data-theme") == "dark"
    assert page.locator("#gallery img").evaluate_all("images => images.map(({ alt }) => alt)") == [
        "a blue square on a yellow background",
        APPLE,
    ]
    page.locator("#gallery button").nth(1).click()
    assert (playground.shown == first).all()
    page.get_by_role("button", name="Use its settings").click()
    assert page.input_value("#prompt") == APPLE
    page.evaluate("document.getElementById('status').textContent = ''")
    page.keyboard.press("Control+Enter")
    playground.finished()
    assert np.abs(playground.shown - first).mean() < 8
    page.locator("#gallery button").nth(0).focus()
    page.keyboard.press("Delete")
    assert page.locator("#gallery button").count() == 2


def test_the_page_fits_desktops_and_phones_and_both_themes(
    opened: Open, live_server: str, screenshots: Path
) -> None:
    for name, width, height, scheme in (
        ("desktop", 1280, 900, "light"),
        ("dark", 1280, 900, "dark"),
        ("phone", 390, 844, "light"),
    ):
        playground = opened(
            live_server, viewport={"width": width, "height": height}, color_scheme=scheme
        )
        playground.ready()
        playground.page.evaluate("document.getElementById('seed').value = 2")
        for prompt in SHOWN:
            playground.draw(prompt)
        assert playground.page.evaluate("document.documentElement.scrollWidth") == width
        playground.page.evaluate("document.activeElement.blur(); scrollTo(0, 0)")
        picture = PIL.Image.open(io.BytesIO(playground.page.screenshot(full_page=name == "phone")))
        path = screenshots / f"{name}.webp"
        picture.convert("RGB").save(path, quality=60, method=6)
        assert path.stat().st_size < 100_000


# ── with plain colours ────────────────────────────────────────────────────────────────────────────


def test_no_mouse_is_needed_for_masks_and_borders(plain: Playground) -> None:
    page = plain.page
    plain.load(FOX)
    plain.choose("Inpaint")
    page.locator("#mask").focus()
    for key in ("ArrowUp", "d", "ArrowRight", "Shift+ArrowRight", "d", "Shift+ArrowDown", " "):
        page.keyboard.press(key)
    before = plain.shown
    plain.draw("a yellow circle on a blue background")
    assert (plain.shown != before).any()
    plain.choose("Outpaint")
    page.locator(".handle.up").focus()
    for key in ("ArrowUp", "ArrowUp", "ArrowUp", "ArrowDown", "PageUp"):
        page.keyboard.press(key)
    plain.draw()
    assert plain.shown.shape == (FOX_HEIGHT + 2 * 8 + 4 * 8, FOX_WIDTH, 3)


def test_several_pictures_are_drawn_beside_each_other_and_one_is_chosen(plain: Playground) -> None:
    plain.page.fill("#n", "3")
    plain.draw(APPLE)
    assert plain.page.locator("#gallery img").count() == 3
    plain.choose("Inpaint")
    expect(plain.page.locator("#operation-hint")).to_contain_text("Choose one of the images first.")
    plain.press(APPLE)
    expect(plain.page.locator("#error")).to_have_text("Choose one of the images first.")
    plain.page.locator("#tiles button").nth(2).click()
    expect(plain.page.locator("#operation-hint")).not_to_contain_text("first")
    assert plain.shown.shape == (32, 64, 3)


def test_the_empty_state_says_whether_there_are_images_to_choose(plain: Playground) -> None:
    title = plain.page.locator("#empty-title")
    expect(title).to_have_text("No images yet")
    plain.draw(APPLE)
    plain.page.reload()
    expect(title).to_have_text("No image chosen")


def test_a_prompt_is_written_in_the_direction_of_its_script(plain: Playground) -> None:
    plain.draw("تفاحة حمراء")
    for text in ("#prompt", "#caption"):
        expect(plain.page.locator(text)).to_have_css("direction", "rtl")


def test_the_settings_of_an_interpolation_say_that_its_images_are_missing(
    plain: Playground,
) -> None:
    page = plain.page
    plain.draw(APPLE)
    plain.choose("Interpolate")
    page.get_by_role("button", name="Remove keyframe 2").click()
    page.get_by_role("button", name="Add the shown image").click()
    page.evaluate("document.getElementById('status').textContent = ''")
    page.locator("#run").click()
    plain.finished()
    page.get_by_role("button", name="Use its settings").click()
    expect(page.locator("#error")).to_contain_text("does not keep the images of keyframes")


def test_variations_and_edits_begin_with_the_picture_that_is_shown(plain: Playground) -> None:
    plain.load(FOX)
    for operation, prompt, size in (
        ("Edit", "a green star", (FOX_HEIGHT, FOX_WIDTH, 3)),
        ("Vary", "", (32, 64, 3)),
    ):
        before = plain.shown
        plain.choose(operation)
        plain.draw(prompt)
        assert plain.shown.shape == size
        assert plain.shown.shape != before.shape or (plain.shown != before).any()


def test_a_picture_can_be_dropped_and_pasted(plain: Playground) -> None:
    for event, holder in (("drop", "dataTransfer"), ("paste", "clipboardData")):
        plain.page.evaluate(
            """async ({ event, holder }) => {
              const canvas = Object.assign(document.createElement("canvas"), { width: 64, height: 32 });
              const blob = await new Promise((resolve) => canvas.toBlob(resolve));
              const transfer = new DataTransfer();
              transfer.items.add(new File([blob], `${event}.png`, { type: "image/png" }));
              const Kind = event === "drop" ? DragEvent : ClipboardEvent;
              document.body.dispatchEvent(new Kind(event, { [holder]: transfer, bubbles: true, cancelable: true }));
            }""",
            {"event": event, "holder": holder},
        )
        expect(plain.page.locator("#caption")).to_have_text(f"{event}.png")
        assert plain.shown.shape == (32, 64, 3)


def test_text_wins_over_its_picture_where_text_is_written(plain: Playground) -> None:
    page = plain.page
    taken = page.evaluate(
        """() => ["#prompt", "#guidance_scale"].map((field) => {
          const transfer = new DataTransfer();
          transfer.setData("text/plain", "a red apple");
          transfer.setData("text/html", "<td>a red apple</td>");
          transfer.items.add(new File(["no image"], "image.png", { type: "image/png" }));
          const paste = { clipboardData: transfer, bubbles: true, cancelable: true };
          return !document.querySelector(field).dispatchEvent(new ClipboardEvent("paste", paste));
        })"""
    )
    assert taken == [False, True]


@pytest.mark.parametrize("text", ["cut this long prompt", "a short prompt"])
def test_a_prompt_that_was_cut_is_said(plain: Playground, text: str) -> None:
    said = plain.draw(text)
    is_cut = text.startswith("cut")
    assert ("A prompt was too long: its end was cut." in said) == is_cut
    assert ("end cut (byt5, clip)" in plain.page.inner_text("#facts")) == is_cut


def test_a_long_prompt_scrolls_in_its_caption(plain: Playground) -> None:
    page = plain.page
    caption = page.locator("#caption")
    plain.draw(APPLE)
    assert caption.get_attribute("tabindex") is None
    page.evaluate("document.getElementById('status').textContent = ''")
    plain.draw("a pear and " * 2900)
    box = caption.bounding_box()
    assert box is not None
    assert box["height"] < 300
    assert serious(plain) == set()
    caption.focus()
    page.keyboard.press("End")
    wait_until(lambda: caption.evaluate("(caption) => caption.scrollTop") > 0, timeout_s=60)


def test_a_text_that_does_not_fit_into_its_field_is_said_to_be_cut(plain: Playground) -> None:
    page = plain.page
    page.focus("#prompt")
    page.keyboard.insert_text("pears " * 5000)
    expect(page.locator("#error")).to_be_empty()
    page.keyboard.insert_text("apples " * 1000)
    expect(page.locator("#error")).to_have_text(
        "Only 32000 characters fit into this field: the end of the text was cut."
    )
    assert len(page.input_value("#prompt")) == 32000


def test_the_picture_and_its_caption_alone_are_printed_on_white(
    opened: Open, plain_address: str
) -> None:
    playground = opened(plain_address, color_scheme="dark")
    playground.ready()
    page = playground.page
    playground.draw(APPLE)
    page.emulate_media(media="print")
    for printed in ("#picture", "#caption"):
        expect(page.locator(printed)).to_be_visible()
    for other in (".masthead", "#form", "#facts", "#download", "#timings", "#code", ".history"):
        expect(page.locator(other).first).to_be_hidden()
    expect(page.locator("#caption")).to_have_css("color", "rgb(36, 29, 21)")


@pytest.mark.parametrize("path", ["", "docs"])
def test_without_scripts_the_page_says_what_it_lacks(
    opened: Open, plain_address: str, path: str
) -> None:
    playground = opened(f"{plain_address}/{path}", java_script_enabled=False)
    notice = playground.page.locator("noscript p")
    expect(notice).to_be_visible()
    expect(notice).to_contain_text("needs JavaScript")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_serious_keeps_anybody_from_using_it(
    opened: Open, plain_address: str, scheme: str
) -> None:
    playground = opened(plain_address, color_scheme=scheme)
    playground.ready()
    found = serious(playground)
    playground.draw(APPLE)
    playground.page.locator("#code summary").click()
    playground.page.select_option("#hires_scale", "2")
    playground.page.get_by_role("button", name="Add a region").click()
    for operation in ("Generate", "Inpaint", "Outpaint", "Vary", "Edit", "Interpolate", "Upscale"):
        playground.choose(operation)
        found |= serious(playground)
    assert found == set()


def test_the_same_request_from_a_terminal_is_the_same_request(
    plain: Playground, tmp_path: Path
) -> None:
    page = plain.page
    page.fill("#seed", "7")
    plain.draw('it\'s a "red" apple')
    page.locator("#code summary").click()
    page.get_by_role("button", name="Copy as Python").click()
    expect(page.locator("#snippet")).to_contain_text("import httpx")
    subprocess.run(
        [sys.executable, "-c", page.inner_text("#snippet")], cwd=tmp_path, check=True, timeout=60
    )
    picture = np.asarray(PIL.Image.open(tmp_path / "result.png").convert("RGB")).astype(int)
    assert np.abs(picture - plain.shown).mean() < 8


def test_a_request_with_pictures_is_a_form_whose_files_can_be_had(
    plain: Playground, tmp_path: Path
) -> None:
    page = plain.page
    plain.load(FOX)
    plain.choose("Inpaint")
    plain.drag("#mask", (0.4, 0.4), (0.6, 0.6))
    page.fill("#prompt", "it's a heart")
    page.locator("#code summary").click()
    page.get_by_role("button", name="Copy as curl").click()
    for name in ("image.png", "mask.png"):
        with page.expect_download() as download:
            page.get_by_role("link", name=name).click()
        download.value.save_as(tmp_path / name)
    subprocess.run(page.inner_text("#snippet"), shell=True, cwd=tmp_path, check=True, timeout=60)
    with PIL.Image.open(tmp_path / "result.png") as picture:
        assert picture.size == (FOX_WIDTH, FOX_HEIGHT)


def test_a_refusal_is_shown_in_the_server_s_words_at_the_field_it_blames(plain: Playground) -> None:
    page = plain.page
    page.route(
        "**/generate",
        lambda route: route.continue_(
            post_data=json.dumps({**route.request.post_data_json, "num_inference_steps": 65})
        ),
    )
    plain.press(APPLE)
    expect(page.locator("#error")).to_contain_text(
        "num_inference_steps: must be a whole number from 1 to 64 (sent: 65)"
    )
    expect(page.locator("#error")).to_contain_text("422 invalid_value")
    expect(page.locator("#num_inference_steps")).to_be_focused()
    assert [complaint for complaint in plain.complaints if "422" not in complaint] == []
    plain.complaints.clear()


def test_a_cancelled_request_leaves_the_server_and_the_picture_stays(
    plain: Playground, plain_address: str
) -> None:
    plain.draw(APPLE)
    before = plain.shown
    plain.press("hold this until it is cancelled")
    wait_until(lambda: rows(plain_address) == 1, timeout_s=60)
    plain.page.keyboard.press("Escape")
    expect(plain.page.locator("#status")).to_have_text("Cancelled.")
    assert (plain.shown == before).all()
    wait_until(lambda: rows(plain_address) == 0, timeout_s=60)


def test_a_server_with_keys_is_asked_with_the_key_that_was_typed(
    opened: Open, fake_settings: Callable[..., Settings]
) -> None:
    with serving(
        create_app(fake_settings(api_keys="0123456789abcdef"), worker=fake_worker.main)
    ) as url:
        wait_until(lambda: httpx.get(f"{url}/readyz").status_code == 200, timeout_s=120)
        playground = opened("about:blank")
        page = playground.page
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(url)
        expect(page.locator("#readiness")).to_contain_text("an API key is required")
        page.get_by_label("This server requires an API key").fill("0123456789abcdef")
        assert "/metrics" not in [urlsplit(address).path for address in asked]
        page.keyboard.press("Enter")
        playground.ready()
        expect(page.locator("#key-form")).to_be_hidden()
        expect(page.get_by_role("link", name="API")).to_be_hidden()
        expect(page.locator("#latency-summary")).to_have_text(re.compile("No request"))
        assert page.input_value("#model") == "fake"
        playground.complaints[:] = [
            complaint for complaint in playground.complaints if "401" not in complaint
        ]
        page.close()


@pytest.fixture(scope="module")
def below_a_path(fake_settings: Callable[..., Settings]) -> Iterator[str]:
    """A server behind a proxy that passes /paint/x on as /x."""
    app = create_app(fake_settings(), worker=fake_worker.main)

    async def proxy(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            inner = scope["path"].removeprefix("/paint")
            if inner == scope["path"]:
                await Response(status_code=404)(scope, receive, send)
                return
            scope = {**scope, "path": inner, "raw_path": inner.encode()}
        await app(scope, receive, send)

    with serving(proxy) as url:
        wait_until(lambda: httpx.get(f"{url}/paint/readyz").status_code == 200, timeout_s=120)
        yield f"{url}/paint"


def test_the_api_reference_sends_a_request_also_below_a_path(
    opened: Open, below_a_path: str
) -> None:
    playground = opened(f"{below_a_path}/")
    page = playground.page
    playground.ready()
    page.get_by_role("link", name="API").click()
    page.locator('.opblock-summary:has([data-path="/generate"])').click()
    page.get_by_role("button", name="Try it out").first.click()
    page.get_by_role("button", name="Execute").click()
    expect(page.locator(".request-url pre").first).to_have_text(f"{below_a_path}/generate")
    expect(page.locator(".live-responses-table tbody .response-col_status").first).to_contain_text(
        "200"
    )


@pytest.mark.parametrize(
    "stored", ["{not json", "5", "null,", '[{"id": 5}]', "[null]", '[{"id": "a", "timings": 5}]']
)
def test_a_damaged_history_is_deleted_and_said_and_the_page_works(
    plain: Playground, stored: str
) -> None:
    page = plain.page
    page.evaluate(
        """(stored) => {
          localStorage.setItem("paellera.history", stored);
          localStorage.setItem("paellera.pictures.a", "orphan");
          localStorage.setItem("paellera.form", "{");
        }""",
        stored,
    )
    page.reload()
    plain.ready()
    expect(page.locator("#error")).to_contain_text("The saved history cannot be read")
    assert page.evaluate("localStorage.getItem('paellera.pictures.a')") is None
    plain.draw(APPLE)
    assert page.locator("#gallery img").count() == 1
    expect(page.locator("#error")).to_be_empty()


def test_a_damaged_picture_of_the_history_counts_as_removed(plain: Playground) -> None:
    page = plain.page
    plain.draw(APPLE)
    page.evaluate(
        """() => {
          const name = Object.keys(localStorage).find((each) => each.startsWith("paellera.pictures."));
          localStorage.setItem(name, "{");
        }"""
    )
    page.reload()
    plain.ready()
    page.locator("#gallery button").click()
    expect(page.locator("#error")).to_contain_text("This image was removed")


def evict(playground: Playground, index: int) -> None:
    """Remove the image of an entry from the history, as newer images do."""
    playground.page.evaluate(
        """(index) => {
          const { id } = JSON.parse(localStorage["paellera.history"])[index];
          localStorage.removeItem(`paellera.pictures.${id}`);
        }""",
        index,
    )


def test_an_image_that_the_history_has_lost_leaves_no_other_one_on_the_canvas(
    plain: Playground,
) -> None:
    page = plain.page
    plain.draw(APPLE)
    page.evaluate("document.getElementById('status').textContent = ''")
    plain.draw("a pear")
    evict(plain, 1)
    for _ in range(2):
        page.locator("#gallery button").nth(1).click()
        expect(page.locator("#caption")).to_have_text(APPLE)
        expect(page.locator("#picture")).to_be_hidden()
        expect(page.locator("#empty-title")).to_have_text("This image was removed for newer ones")
        expect(page.locator("#error")).to_contain_text("its seed gives the same image")
        for button in ("#download", "#upscale"):
            expect(page.locator(button)).to_be_hidden()
        plain.choose("Edit")
        plain.press("a plum")
        expect(page.locator("#error")).to_contain_text("An image is required")
        page.reload()
        plain.ready()
    page.locator("#gallery button").nth(0).click()
    for button in ("#download", "#upscale"):
        expect(page.locator(button)).to_be_visible()


@pytest.mark.parametrize("operation", ["Edit", "Vary", "Interpolate"])
def test_a_lost_image_that_was_made_from_another_one_needs_that_again(
    plain: Playground, operation: str
) -> None:
    page = plain.page
    plain.load(FOX)
    plain.choose(operation)
    if operation == "Interpolate":
        page.get_by_role("button", name="Remove keyframe 2").click()
        page.locator("#keyframes input").fill(APPLE)
        page.get_by_role("button", name="Add the shown image").click()
    plain.draw(APPLE)
    for index, said in enumerate(("another image: open that image again", "Open its file")):
        evict(plain, index)
        page.locator("#gallery button").nth(index).click()
        expect(page.locator("#error")).to_contain_text(said)
        expect(page.locator("#error")).not_to_contain_text("the same image")


def test_the_link_under_an_image_is_that_image(plain: Playground) -> None:
    page = plain.page
    plain.choose("Interpolate")
    page.fill("#frames", "3")
    for i, prompt in enumerate(("red", "blue")):
        page.locator("#keyframes input").nth(i).fill(prompt)
    plain.draw()
    page.locator("#frame-number").focus()
    page.keyboard.press("End")
    link = page.locator("#download")
    expect(link).to_have_attribute("href", re.compile("^blob:"))
    with page.expect_download() as download:
        link.click()
    assert download.value.suggested_filename.endswith(".webp")
    picture = page.get_attribute("#picture", "src") or ""
    assert download.value.path().read_bytes() == base64.b64decode(picture.partition(",")[2])


def test_all_frames_are_saved_as_one_animation(plain: Playground) -> None:
    page = plain.page
    plain.draw(APPLE)
    expect(page.locator("#animate")).to_be_hidden()
    plain.choose("Interpolate")
    page.fill("#frames", "3")
    for i, prompt in enumerate(("red", "blue")):
        page.locator("#keyframes input").nth(i).fill(prompt)
    page.evaluate("document.getElementById('status').textContent = ''")
    plain.draw()
    with page.expect_request("**/interpolate") as request, page.expect_download() as download:
        page.locator("#animate").click()
    seed = request.value.post_data_json["seed"]
    assert f"{seed}" in page.inner_text("#facts")
    assert download.value.suggested_filename == f"paellera-{seed}.gif"
    with PIL.Image.open(download.value.path()) as animation:
        assert (animation.format, getattr(animation, "n_frames", 1)) == ("GIF", 3)
    expect(page.locator("#status")).to_have_text("Saved as a GIF.")
    expect(page.locator("#player")).to_be_visible()


def test_images_side_by_side_stay_when_the_next_request_is_refused(plain: Playground) -> None:
    page = plain.page
    page.fill("#n", "4")
    page.fill("#partial_images", "0")
    plain.draw(APPLE)
    before = page.locator("#tiles img").evaluate_all("images => images.map(({ src }) => src)")
    refusal = {"error": {"message": "busy", "type": "server_error", "param": None, "code": "full"}}
    page.route("**/generate", lambda route: route.fulfill(status=503, json=refusal))
    plain.press("a pear")
    expect(page.locator("#error")).to_contain_text("busy")
    tiles = page.locator("#tiles img")
    assert all(before)
    assert tiles.evaluate_all("images => images.map(({ src }) => src)") == before
    expect(tiles.first).to_be_visible()
    tiles.nth(2).click()
    expect(page.locator("#picture")).to_have_attribute("src", before[2])
    forgive(plain, "503")


def test_what_the_weights_cannot_do_is_off_and_said(opened: Open, plain_address: str) -> None:
    playground = opened("about:blank")
    page = playground.page
    models = httpx.get(f"{plain_address}/v1/models").json()
    other = json.loads(json.dumps(models["data"][0]))
    other["id"] = "other"
    other["capabilities"] = {
        **other["capabilities"],
        "operations": ["generate", "inpaint"],
        "samplers": ["argmax"],
    }
    page.route(
        "**/v1/models",
        lambda route: route.fulfill(json={**models, "data": [*models["data"], other]}),
    )
    playground.open(plain_address)
    expect(page.locator("#incapable")).to_be_hidden()
    page.select_option("#model", "other")
    expect(page.get_by_role("radio", name="Vary")).to_be_disabled()
    expect(page.locator("#incapable")).to_have_text(
        "other does not support: outpaint, vary, edit, interpolate, upscale."
    )
    expect(page.locator("#draw-regions, #add-region").first).to_be_hidden()
    assert page.locator("#sampler option").all_inner_texts() == ["argmax"]


def test_the_chosen_weights_stay_chosen_while_the_server_starts(
    opened: Open, plain_address: str
) -> None:
    playground = opened("about:blank")
    page = playground.page
    models = httpx.get(f"{plain_address}/v1/models").json()
    both = [models["data"][0], {**models["data"][0], "id": "other"}]
    page.route("**/v1/models", lambda route: route.fulfill(json={**models, "data": both}))
    page.route("**/readyz", lambda route: route.fulfill(status=503, body="starting"))
    page.goto(plain_address)
    page.select_option("#model", "other")
    for _ in range(2):
        with page.expect_response("**/v1/models"):
            pass
    page.unroute("**/readyz")
    playground.ready()
    assert page.input_value("#model") == "other"
    playground.complaints[:] = [
        complaint for complaint in playground.complaints if "503" not in complaint
    ]


def test_old_pictures_make_room_for_new_ones_and_their_parameters_stay(plain: Playground) -> None:
    left = plain.page.evaluate(
        """async () => {
          const { History } = await import("/playground/history.js");
          const kept = new Map();
          const size = () => [...kept.values()].reduce((sum, text) => sum + text.length, 0);
          const storage = {
            getItem: (name) => kept.get(name) ?? null,
            removeItem: (name) => kept.delete(name),
            setItem: (name, text) => {
              if (size() - (kept.get(name)?.length ?? 0) + text.length > 1000) throw new Error("quota");
              kept.set(name, text);
            },
          };
          const history = new History(storage);
          for (const id of ["a", "b", "c", "d"]) history.add({ id }, ["x".repeat(300)]);
          return history.entries.map(({ id }) => [id, history.images(id) !== null]);
        }"""
    )
    assert left == [["d", True], ["c", True], ["b", True], ["a", False]]


def test_quantiles_are_read_off_the_server_s_histogram_as_prometheus_does(
    plain: Playground,
) -> None:
    line = 'paella_request_duration_seconds_bucket{{endpoint="{}",le="{}",status="{}"}} {}'
    counts = (
        ("/generate", "0.1", 200, 10),
        ("/generate", "0.2", 200, 10),
        ("/upscale", "0.2", 200, 10),
        ("/sdapi/v1/txt2img", "0.2", 200, 10),
        ("/generate", "+Inf", 200, 40),
    )
    others = (
        ("/generate", "0.1", 422, 99),
        ("/metrics", "0.1", 200, 99),
        ("/v1/models/{name}", "0.1", 200, 99),
    )
    text = "\n".join(line.format(*sample) for sample in (*counts, *others))
    found = plain.page.evaluate(
        """async (text) => {
          const { histogram, quantile, difference } = await import("/playground/latency.js");
          const counts = histogram(text);
          const none = difference(counts, counts);
          return [quantile(0.125, counts), quantile(0.5, counts), quantile(0.9, counts), Number.isNaN(quantile(0.5, none))];
        }""",
        text,
    )
    assert found == [pytest.approx(0.05), pytest.approx(0.15), pytest.approx(0.2), True]


def test_the_latency_chart_follows_the_server_s_figures(plain: Playground) -> None:
    plain.draw(APPLE)
    expect(plain.page.locator("#latency-summary")).to_have_text(
        re.compile(r"Last minute: \d+ answered, p50 \d+ ms")
    )
    assert plain.page.locator("#chart circle").count() == 2
