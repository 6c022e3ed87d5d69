"""What the playground sends and shows: regions, photos, blending, fit, upscaling, a second pass.

Where the server's part is tested elsewhere, an endpoint is answered here in place of the server.
"""

from __future__ import annotations

import base64
import io
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
from playwright.sync_api import Page, Route, expect

from load_tests.browser import CHROMIUM, Playground
from tests.support.browsers import (
    APPLE,
    BLUE,
    FOX,
    FOX_HEIGHT,
    FOX_WIDTH,
    HEIGHT,
    RED,
    WIDTH,
    Open,
    png,
    serious,
)

pytestmark = [
    pytest.mark.process,
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium"),
]

ORIENTATION = 0x0112
TURN_RIGHT = 6


def answering(
    playground: Playground, operation: str, size: tuple[int, int], **parameters: Any
) -> list[dict[str, Any]]:
    """Answer an endpoint with one image of this (width, height), in place of the server.

    Returns the list to which every sent body is added. parameters: of the answer.
    """
    sent: list[dict[str, Any]] = []
    common = {"operation": operation, "width": WIDTH, "height": HEIGHT, "prompt": "", "seed": 7}
    recipe = {"num_inference_steps": 2, "guidance_scale": [1, 1], "sampler": "argmax"}
    image = {"seed": 7, "width": size[0], "height": size[1], "format": "png"}
    answer = {
        "model": "fake",
        "timings": {},
        "parameters": {**common, **recipe, **parameters},
        "images": [{**image, "b64_json": base64.b64encode(png(size)).decode()}],
    }

    def fulfill(route: Route) -> None:
        sent.append(route.request.post_data_json)
        body = f"event: completed\ndata: {json.dumps(answer)}\n\n"
        route.fulfill(body=body, content_type="text/event-stream")

    playground.page.route(f"**/{operation}", fulfill)
    return sent


def refusing(playground: Playground, operation: str, param: str) -> None:
    """Refuse an endpoint's requests for the sake of this field, in place of the server."""
    error = {"message": f"{param}: no", "type": "invalid_request_error", "param": param}
    playground.page.route(
        f"**/{operation}",
        lambda route: route.fulfill(status=422, json={"error": {**error, "code": "no"}}),
    )


def sent_image(body: dict[str, Any], name: str) -> PIL.Image.Image:
    head, _, content = body[name].partition(",")
    assert head == "data:image/png;base64"
    return PIL.Image.open(io.BytesIO(base64.b64decode(content)))


# ── regions ───────────────────────────────────────────────────────────────────────────────────────


def test_boxes_drawn_on_the_sheet_are_regions_with_a_prompt_each(plain: Playground) -> None:
    page = plain.page
    page.check("#draw-regions")
    box = page.locator("#layer").bounding_box()
    assert box is not None
    assert box["width"] / box["height"] == pytest.approx(WIDTH / HEIGHT, rel=0.02)
    plain.drag("#layer", (0.1, 0.2), (0.5, 0.6))
    page.keyboard.type("a red apple")
    plain.drag("#layer", (0.9, 0.9), (0.6, 0.3))
    page.keyboard.type("a green pear")
    with page.expect_request("**/generate") as request:
        plain.draw("fruit on a table")
    regions = request.value.post_data_json["regions"]
    assert [region["prompt"] for region in regions] == ["a red apple", "a green pear"]
    assert regions[0]["box"] == pytest.approx([0.1, 0.2, 0.5, 0.6], abs=0.015)
    assert regions[1]["box"] == pytest.approx([0.6, 0.3, 0.9, 0.9], abs=0.015)
    assert plain.shown.shape == (HEIGHT, WIDTH, 3)
    expect(page.locator("#layer div")).to_have_count(2)

    for _ in range(2):
        page.get_by_role("button", name="Remove region 1").click()
    expect(page.locator("#regions li")).to_have_count(0)
    page.get_by_role("button", name="Use its settings").click()
    written = page.locator("#regions li input[placeholder]")
    assert [field.input_value() for field in written.all()] == ["a red apple", "a green pear"]


def test_a_box_is_moved_at_its_middle_and_resized_at_its_edges(plain: Playground) -> None:
    page = plain.page
    page.get_by_role("button", name="Add a region").click()
    assert edges(page) == [25, 25, 75, 75]
    plain.drag("#layer div", (0.5, 0.5), (0.7, 0.5))
    assert edges(page) == pytest.approx([35, 25, 85, 75], abs=1.1)
    plain.drag("#layer div", (0.5, 0.5), (2.5, -2.5))
    assert edges(page) == [50, 0, 100, 50]
    plain.drag("#layer div", (0.02, 0.95), (0.52, 1.45))
    assert edges(page) == pytest.approx([75, 0, 100, 75], abs=2)
    plain.drag("#layer", (0.1, 0.5), (0.1, 0.5))
    expect(page.locator("#regions li")).to_have_count(1)


def edges(page: Page) -> list[float]:
    """The first region's box in percent, as written beside its prompt."""
    numbers = page.locator("#regions li").first.locator("input[type=number]")
    return [float(field.input_value()) for field in numbers.all()]


def test_no_mouse_is_needed_for_regions(plain: Playground) -> None:
    page = plain.page
    page.locator("#add-region").focus()
    page.keyboard.press("Enter")
    page.keyboard.type("a pear")
    for key in ("Tab", "Tab", "ArrowUp", "Tab", "Tab", "ArrowDown"):
        page.keyboard.press(key)
    sent = answering(plain, "generate", (WIDTH, HEIGHT))
    plain.draw("fruit")
    assert sent[0]["regions"] == [{"prompt": "a pear", "box": [0.26, 0.25, 0.74, 0.75]}]
    page.get_by_role("button", name="Remove region 1").focus()
    page.keyboard.press("Enter")
    expect(page.locator("#add-region")).to_be_focused()
    plain.draw("fruit")
    assert "regions" not in sent[1]


def test_a_region_that_lacks_something_is_said_and_focused(plain: Playground) -> None:
    page = plain.page
    page.get_by_role("button", name="Add a region").click()
    plain.press("fruit")
    expect(page.locator("#error")).to_have_text("Region 1 needs a prompt.")
    expect(page.get_by_label("Region 1, a prompt")).to_be_focused()
    page.keyboard.type("a pear")
    page.get_by_label("Region 1, right edge").fill("10")
    plain.press("fruit")
    expect(page.locator("#error")).to_contain_text("left before right")
    for _ in range(8):
        page.locator("#add-region").evaluate("(button) => button.click()")
    expect(page.locator("#regions li")).to_have_count(8)
    expect(page.locator("#add-region")).to_be_disabled()


def test_masks_and_regions_go_together_and_with_other_operations_none_are_sent(
    plain: Playground,
) -> None:
    page = plain.page
    plain.load(FOX)
    plain.choose("Inpaint")
    page.get_by_role("button", name="Add a region").click()
    page.keyboard.type("a pear")
    page.uncheck("#draw-regions")
    plain.drag("#mask", (0.3, 0.3), (0.6, 0.6))
    with page.expect_request("**/inpaint") as request:
        plain.draw("fruit")
    assert {"mask", "regions"} <= request.value.post_data_json.keys()
    plain.choose("Edit")
    expect(page.locator("#add-region")).to_be_hidden()
    with page.expect_request("**/edit") as request:
        plain.draw("fruit")
    assert "regions" not in request.value.post_data_json


def test_the_sheet_gives_way_to_the_image_and_comes_only_for_another_shape(
    plain: Playground,
) -> None:
    page = plain.page
    plain.load(FOX)
    page.check("#draw-regions")
    expect(page.locator("#picture")).to_be_hidden()
    page.uncheck("#draw-regions")
    expect(page.locator("#picture")).to_be_visible()
    expect(page.locator("#layer")).to_be_hidden()
    page.check("#draw-regions")
    plain.draw(APPLE)
    expect(page.locator("#picture")).to_be_visible()
    expect(page.locator("#layer")).to_be_visible()


# ── photos ────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A photo as phones store it, lying on its side: upright 3024 × 4032, its upper half red."""
    stored = PIL.Image.new("RGB", (4032, 3024), BLUE)
    stored.paste(RED, (0, 0, 2016, 3024))
    exif = stored.getexif()
    exif[ORIENTATION] = TURN_RIGHT
    path = tmp_path_factory.mktemp("photos") / "IMG_0001.JPG"
    stored.save(path, "JPEG", exif=exif)
    return path


def test_a_phone_s_photo_is_shown_upright_and_sent_as_small_as_it_is_shown(
    plain: Playground, photo: Path
) -> None:
    page = plain.page
    plain.load(photo)
    expect(page.locator("#status")).to_have_text(re.compile("the file has 3024 . 4032"))
    height, width, _ = plain.shown.shape
    longest = page.evaluate("async () => (await (await fetch('v1/models')).json()).data[0].limits")
    assert (width, height) == (longest["max_side"] * 3 // 4, longest["max_side"])
    assert abs(plain.shown[height // 4, width // 2] - RED).max() < 8
    assert abs(plain.shown[height * 3 // 4, width // 2] - BLUE).max() < 8
    plain.choose("Inpaint")
    plain.drag("#mask", (0.3, 0.7), (0.7, 0.7))
    with page.expect_request("**/inpaint") as request:
        plain.draw("a boat")
    body = request.value.post_data_json
    image, mask = sent_image(body, "image"), sent_image(body, "mask")
    assert image.size == mask.size == (width, height)
    assert not image.getexif()
    white = mask.convert("L").point(lambda value: 255 * (value > 127)).getbbox()
    assert white is not None
    assert 0.55 < (white[1] + white[3]) / 2 / height < 0.85
    assert plain.shown.shape == (height, width, 3)


def test_a_photo_can_be_extended_though_it_is_as_wide_as_the_weights_draw(
    plain: Playground, photo: Path
) -> None:
    page = plain.page
    plain.load(photo)
    sent = answering(plain, "outpaint", (WIDTH, HEIGHT))
    plain.choose("Outpaint")
    plain.drag(".handle.down", (0.5, 0.5), (0.5, 2.5))
    expect(page.locator("#margins")).to_contain_text("scales it to fit")
    plain.draw()
    assert sent[0]["down"] > 0
    assert "feather" not in sent[0]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("IMG_2.HEIC", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "a HEIC photo, which this browser"),
        ("notes.png", b"no image at all", "notes.png is not a readable image."),
    ],
)
def test_a_file_that_no_browser_shows_is_refused_in_plain_words(
    plain: Playground, name: str, content: bytes, message: str
) -> None:
    file = {"name": name, "mimeType": "image/png", "buffer": content}
    plain.page.set_input_files("#open", file)  # type: ignore[arg-type]
    expect(plain.page.locator("#error")).to_contain_text(message)


# ── blending, fit, larger images ──────────────────────────────────────────────────────────────────


def test_the_feather_is_sent_once_it_is_moved(plain: Playground) -> None:
    plain.load(FOX)
    sent = answering(plain, "inpaint", (FOX_WIDTH, FOX_HEIGHT), feather=20)
    plain.choose("Inpaint")
    for feather in ("", "20"):
        plain.drag("#mask", (0.3, 0.3), (0.6, 0.6))
        if feather:
            plain.page.fill("#feather", feather)
        plain.draw("a pear")
    assert [body.get("feather") for body in sent] == [None, 20]
    plain.page.get_by_role("button", name="Reset to the weights").click()
    assert plain.page.input_value("#feather") == "8"
    plain.page.get_by_role("button", name="Use its settings").click()
    assert plain.page.input_value("#feather") == "20"


def test_an_edit_of_another_size_says_how_the_image_fits(plain: Playground) -> None:
    page = plain.page
    plain.load(FOX)
    sent = answering(plain, "edit", (WIDTH, HEIGHT))
    plain.choose("Edit")
    for name in ("#width", "#height", "#fit"):
        expect(page.locator(name)).to_be_disabled()
    plain.draw("a pear")
    page.check("#resize")
    page.select_option("#fit", "pad")
    plain.draw("a pear")
    assert not {"width", "height", "fit"} & sent[0].keys()
    assert {name: sent[1][name] for name in ("width", "height", "fit")} == {
        "width": WIDTH,
        "height": HEIGHT,
        "fit": "pad",
    }


def test_variations_say_how_the_image_fits(plain: Playground) -> None:
    plain.load(FOX)
    sent = answering(plain, "variations", (WIDTH, HEIGHT))
    plain.choose("Vary")
    plain.page.select_option("#fit", "stretch")
    plain.draw()
    assert sent[0]["fit"] == "stretch"


def test_a_result_is_enlarged_by_one_button(plain: Playground) -> None:
    page = plain.page
    plain.draw(APPLE)
    scale = {"scale": 2, "strength": 0.3}
    sent = answering(plain, "upscale", (2 * WIDTH, 2 * HEIGHT), **scale, prompt=APPLE)
    page.evaluate("document.getElementById('status').textContent = ''")
    page.locator("#upscale").click()
    plain.finished()
    assert {name: sent[0][name] for name in ("prompt", *scale)} == {"prompt": APPLE, **scale}
    assert sent_image(sent[0], "image").size == (WIDTH, HEIGHT)
    assert not {"n", "width", "height"} & sent[0].keys()
    assert plain.shown.shape == (2 * HEIGHT, 2 * WIDTH, 3)
    expect(page.locator("#facts")).to_contain_text("2 times")
    expect(page.get_by_role("radio", name="Upscale")).to_be_checked()
    page.fill("#scale", "3")
    page.fill("#upscale_strength", "0.5")
    plain.draw()
    assert (sent[1]["scale"], sent[1]["strength"]) == (3, 0.5)
    assert "prompt" not in sent[1]


def test_a_second_pass_enlarges_a_generated_image(plain: Playground) -> None:
    page = plain.page
    hires = {"scale": 2, "strength": 0.4, "steps": 3}
    sent = answering(plain, "generate", (2 * WIDTH, 2 * HEIGHT), hires=hires, prompt=APPLE)
    plain.draw(APPLE)
    page.select_option("#hires_scale", "2")
    page.fill("#hires_strength", "0.4")
    page.fill("#hires_steps", "3")
    plain.draw(APPLE)
    assert "hires" not in sent[0]
    assert sent[1]["hires"] == hires
    expect(page.locator("#facts")).to_have_text(re.compile(f"{2 * WIDTH} . {2 * HEIGHT}"))
    page.get_by_role("button", name="Reset to the weights").click()
    assert page.input_value("#hires_scale") == ""
    page.get_by_role("button", name="Use its settings").click()
    assert page.input_value("#hires_scale") == "2"
    assert page.input_value("#width") == str(WIDTH)


@pytest.mark.parametrize(
    ("operation", "label", "param", "field"),
    [
        ("generate", "Generate", "hires.scale", "#hires_scale"),
        ("upscale", "Upscale", "strength", "#upscale_strength"),
        ("edit", "Edit", "strength", "#strength"),
    ],
)
def test_a_refusal_goes_to_the_field_of_the_operation(
    plain: Playground, operation: str, label: str, param: str, field: str
) -> None:
    refusing(plain, operation, param)
    plain.load(FOX)
    plain.choose(label)
    plain.press(APPLE)
    expect(plain.page.locator(field)).to_be_focused()
    assert [complaint for complaint in plain.complaints if "422" not in complaint] == []
    plain.complaints.clear()


def test_what_the_weights_read_of_a_prompt_is_said_to_lack_unknown_words(
    plain: Playground,
) -> None:
    facts = plain.page.locator("#facts")
    note = "Words that the weights do not know are left out."
    plain.draw(APPLE)
    expect(facts).not_to_contain_text(note)
    answering(plain, "generate", (WIDTH, HEIGHT), prompt_read="a fox")
    plain.page.evaluate("document.getElementById('status').textContent = ''")
    plain.draw("a fox on a zeppelin")
    expect(facts).to_contain_text("a fox")
    expect(facts).to_contain_text(note)
    assert serious(plain) == set()


# ── with the server's part ────────────────────────────────────────────────────────────────────────


def test_the_code_of_a_request_with_regions_and_feather_runs(
    plain: Playground, tmp_path: Path
) -> None:
    page = plain.page
    plain.load(FOX)
    plain.choose("Inpaint")
    plain.drag("#mask", (0.4, 0.4), (0.6, 0.6))
    page.get_by_role("button", name="Add a region").click()
    page.keyboard.type("it's a heart")
    page.fill("#feather", "12")
    page.fill("#prompt", "a star")
    page.locator("#code summary").click()
    page.get_by_role("button", name="Copy as curl").click()
    for name in ("image.png", "mask.png"):
        with page.expect_download() as download:
            page.get_by_role("link", name=name).click()
        download.value.save_as(tmp_path / name)
    text = page.inner_text("#snippet")
    assert "feather=12" in text
    subprocess.run(text, shell=True, cwd=tmp_path, check=True, timeout=60)
    with PIL.Image.open(tmp_path / "result.png") as picture:
        assert picture.size == (FOX_WIDTH, FOX_HEIGHT)
        assert json.loads(picture.info["parameters"])["feather"] == 12


def test_a_drawn_image_is_enlarged_and_a_second_pass_draws_as_large_a_one(
    playground: Playground,
) -> None:
    page = playground.page
    page.fill("#num_inference_steps", "4")
    playground.draw(APPLE)
    height, width, _ = playground.shown.shape
    page.evaluate("document.getElementById('status').textContent = ''")
    page.locator("#upscale").click()
    playground.finished()
    assert playground.shown.shape == (2 * height, 2 * width, 3)
    playground.choose("Generate")
    page.select_option("#hires_scale", "2")
    said = playground.draw(APPLE)
    assert "first preview after" in said
    assert playground.shown.shape == (2 * height, 2 * width, 3)


# ── presets ───────────────────────────────────────────────────────────────────────────────────────


def test_a_preset_is_chosen_with_its_recipe_and_sent(opened: Open, hasty_address: str) -> None:
    playground = opened(hasty_address)
    playground.ready()
    page = playground.page
    preset, steps = page.locator("#preset"), page.locator("#num_inference_steps")
    expect(preset).to_be_visible()
    assert preset.locator("option").all_inner_texts() == ["Quality", "Fast"]
    expect(preset).to_have_value("fast")
    expect(steps).to_have_value("3")
    sent = answering(playground, "generate", (32, 32), preset="quality")
    playground.draw("a ball")
    assert not {"preset", "num_inference_steps"} & sent[-1].keys()
    page.select_option("#width", "64")
    page.fill("#num_inference_steps", "2")
    page.select_option("#preset", "quality")
    expect(steps).to_have_value("6")
    expect(page.locator("#width")).to_have_value("64")
    playground.draw("a ball")
    assert (sent[-1]["preset"], sent[-1]["width"]) == ("quality", 64)
    assert "num_inference_steps" not in sent[-1]
    page.locator("#reset").click()
    expect(preset).to_have_value("fast")
    expect(steps).to_have_value("3")
    page.locator("#reuse").click()
    expect(preset).to_have_value("quality")


def test_what_few_steps_draw_worse_shows_quality(opened: Open, hasty_address: str) -> None:
    playground = opened(hasty_address)
    playground.ready()
    page = playground.page
    preset, steps = page.locator("#preset"), page.locator("#num_inference_steps")
    page.select_option("#sampler", "argmax")
    for operation, usual, count in (
        ("Edit", "quality", "6"),
        ("Inpaint", "fast", "3"),
        ("Upscale", "quality", "6"),
        ("Generate", "fast", "3"),
    ):
        playground.choose(operation)
        expect(preset).to_have_value(usual)
        expect(steps).to_have_value(count)
        expect(page.locator("#sampler")).to_have_value("argmax")
    page.locator("#add-region").click()
    expect(preset).to_have_value("quality")
    page.get_by_role("button", name="Remove region 1").click()
    expect(preset).to_have_value("fast")
    page.select_option("#hires_scale", "2")
    expect(preset).to_have_value("quality")
    sent = answering(playground, "generate", (32, 32), preset="fast", hires={"scale": 2})
    playground.draw("a ball")
    assert "preset" not in sent[-1]
    # That image was asked for by name.
    page.locator("#reuse").click()
    expect(preset).to_have_value("fast")
    playground.draw("a ball")
    assert sent[-1]["preset"] == "fast"
    page.locator("#reset").click()
    page.select_option("#preset", "quality")
    page.select_option("#preset", "fast")
    playground.choose("Edit")
    expect(preset).to_have_value("fast")


def test_a_conflict_is_said_at_the_field(opened: Open, hasty_address: str) -> None:
    playground = opened(hasty_address)
    playground.ready()
    page = playground.page
    page.select_option("#preset", "quality")
    page.select_option("#preset", "fast")
    page.fill("#negative_prompt", "blur")
    playground.press("a ball")
    expect(page.locator("#error")).to_contain_text("preset fast draws without guidance")
    expect(page.locator("#negative_prompt")).to_be_focused()
    assert [complaint for complaint in playground.complaints if "400" not in complaint] == []
    playground.complaints.clear()


def test_a_temperature_may_lie_between_the_steps_of_its_arrows(plain: Playground) -> None:
    page = plain.page
    sent = answering(plain, "generate", (WIDTH, HEIGHT))
    page.fill("#temperature_start", "0.333")
    page.fill("#temperature_end", "0.05")
    plain.draw(APPLE)
    assert sent[-1]["temperature"] == [0.333, 0.05]
    for field, number, bounds in (
        ("#temperature_start", "5.01", "from 0.05 to 5"),
        ("#temperature_start", "0.01", "from 0.05 to 5"),
        ("#n", "1.5", "from 1 to 16"),
    ):
        before = page.input_value(field)
        page.fill(field, number)
        plain.press(APPLE)
        expect(page.locator("#error")).to_contain_text(f"must be a number {bounds}")
        page.fill(field, before)
    assert len(sent) == 1


def test_weights_with_one_preset_offer_no_choice(plain: Playground) -> None:
    expect(plain.page.locator("#preset")).to_be_hidden()


# ── everybody's page ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("width", [390, 320])
def test_it_fits_phones_and_nothing_serious_keeps_anybody_from_using_it(
    opened: Open, plain_address: str, width: int
) -> None:
    playground = opened(plain_address, viewport={"width": width, "height": 800}, has_touch=True)
    playground.ready()
    page = playground.page
    page.locator("#settings summary").click()
    page.get_by_role("button", name="Add a region").click()
    page.keyboard.type("a pear")
    found = serious(playground)
    for operation in ("Inpaint", "Outpaint", "Edit", "Vary", "Upscale", "Generate"):
        playground.choose(operation)
        assert page.evaluate("document.documentElement.scrollWidth") == width, operation
    found |= serious(playground)
    assert found == set()
