"""Uploads are decoded to what a browser shows: the same pixels, over any background."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator

import numpy as np
import PIL.Image
import pytest
from numpy.typing import NDArray
from playwright.sync_api import sync_playwright

from load_tests.browser import CHROMIUM
from server.api.images.decode import ImageLimits, decode
from tests.shown_files import COLOURS, LIGHT_THROUGH_INK, Shown, files

FILES = files()
LIMITS = ImageLimits()
BACKGROUNDS = ((255, 255, 255), (30, 90, 160))
# Pixels between two images on the page, and images in a row.
CELL, COLUMNS = 64, 10
# Where Chromium 156 falls short of what the file holds.
NOT_SHOWN = {
    "jpeg_no_end": "Chromium leaves out the last rows",
    "webp_turned": "Chromium ignores EXIF in WebP",
    "avif_clear": "Chromium takes the alpha for video's range, though the file says full range",
    "avif_animated_full_range": "Chromium takes an animation's colours for video's range",
    "png_gamma_chromaticities_of_srgb": "Chromium applies a gamma of 2.2 beside sRGB's "
    "chromaticities, though encoders of sRGB write both",
    "jpeg_cmyk_icc": "Chromium converts to RGB first and takes that for the inks C, M and Y; it "
    "reads the Lab of lut16Type as version 4 of ICC encodes other tables",
}


def test_there_are_at_least_60_files() -> None:
    assert len(FILES) >= 60


@pytest.mark.parametrize("name", FILES)
def test_every_file_is_decoded(name: str) -> None:
    assert decode(FILES[name].content, LIMITS).rgb.size


def test_avif_has_the_alpha_that_was_encoded() -> None:
    picture = decode(FILES["avif_clear"].content, LIMITS)
    assert picture.alpha is not None
    assert np.abs(picture.alpha.astype(int) - COLOURS[..., 3]).max() <= 2
    assert np.abs(picture.rgb.astype(int) - COLOURS[..., :3]).max() <= 4


def test_the_values_that_encoders_of_srgb_write_change_no_bit() -> None:
    picture = decode(FILES["png_gamma_chromaticities_of_srgb"].content, LIMITS)
    np.testing.assert_array_equal(picture.rgb, COLOURS[..., :3])


@pytest.mark.parametrize("name", ["avif_animated", "avif_animated_full_range"])
def test_an_animated_avif_has_the_colours_that_were_encoded(name: str) -> None:
    picture = decode(FILES[name].content, LIMITS)
    assert np.abs(picture.rgb.astype(int) - COLOURS[..., :3]).max() <= 5


def test_inks_with_a_profile_have_the_colours_that_it_was_made_of() -> None:
    file = FILES["jpeg_cmyk_icc"].content
    inks = np.asarray(PIL.Image.open(io.BytesIO(file))) / 255
    light = 1 - (1 - LIGHT_THROUGH_INK) * inks
    wanted = 255 * light[..., :3] * light[..., 3:]
    assert np.abs(decode(file, LIMITS).rgb - wanted).max() <= 2


@pytest.fixture(scope="module")
def shown() -> Iterator[list[dict[str, NDArray[np.uint8] | None]]]:
    """What Chromium shows of every file over each background; None if it refuses the file."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--force-color-profile=srgb"]
        )
        height = CELL * (1 + len(FILES) // COLUMNS)
        page = browser.new_page(viewport={"width": CELL * COLUMNS, "height": height})
        page.set_content("<style>img { position: absolute }</style>" + "".join(images()))
        sizes = page.evaluate(
            """async () => {
              const images = [...document.images];
              await Promise.allSettled(images.map((image) => image.decode()));
              return images.map((image) => [image.naturalWidth, image.naturalHeight]);
            }"""
        )
        pictures = []
        for background in BACKGROUNDS:
            page.evaluate(f"document.body.style.background = 'rgb{background}'")
            screen = PIL.Image.open(io.BytesIO(page.screenshot()))
            pictures.append(dict(zip(FILES, cells(screen, sizes), strict=True)))
        yield pictures
        browser.close()


def images() -> Iterator[str]:
    for i, file in enumerate(FILES.values()):
        left, top = CELL * (i % COLUMNS), CELL * (i // COLUMNS)
        url = f"data:{file.type};base64,{base64.b64encode(file.content).decode()}"
        yield f'<img src="{url}" style="left: {left}px; top: {top}px">'


def cells(
    screen: PIL.Image.Image, sizes: list[tuple[int, int]]
) -> Iterator[NDArray[np.uint8] | None]:
    whole = np.asarray(screen.convert("RGB"))
    for i, (width, height) in enumerate(sizes):
        left, top = CELL * (i % COLUMNS), CELL * (i // COLUMNS)
        yield whole[top : top + height, left : left + width] if width else None


def over(file: Shown, background: tuple[int, int, int]) -> NDArray[np.float64]:
    picture = decode(file.content, LIMITS)
    opacity = 1.0 if picture.alpha is None else picture.alpha[..., None] / 255
    return picture.rgb * opacity + np.array(background) * (1 - opacity)


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium")
@pytest.mark.parametrize("name", FILES)
def test_a_browser_shows_the_same(
    shown: list[dict[str, NDArray[np.uint8] | None]], name: str
) -> None:
    if name in NOT_SHOWN:
        pytest.skip(NOT_SHOWN[name])
    file = FILES[name]
    for background, pictures in zip(BACKGROUNDS, shown, strict=True):
        picture, expected = pictures[name], over(file, background)
        assert picture is not None, "Chromium refuses it"
        assert picture.shape == expected.shape
        assert np.abs(picture - expected).max() <= file.tolerance
