"""The table of docs/operations.md: mask sent, the image's alpha, endpoint; repainted, kept, answer.

Over the fake worker, which draws one colour, so that every expected pixel can be computed.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Iterator
from typing import Any, Literal

import httpx
import numpy as np
import PIL.Image
import pytest

from server.api import create_app
from server.settings import Settings
from tests import fake_worker
from tests.conftest import serving, wait_until
from tests.support.images import png

pytestmark = pytest.mark.process

Array = np.ndarray[Any, np.dtype[Any]]
Endpoint = Literal["inpaint", "v1/images/edits"]

SIZE = (64, 32)
SEED = 5
COLOUR = tuple(fake_worker.colour(SEED))
BOTH: tuple[Endpoint, ...] = ("inpaint", "v1/images/edits")


@pytest.fixture(scope="module")
def sd(fake_settings: Callable[..., Settings]) -> Iterator[httpx.Client]:
    """A client of a server with AUTOMATIC1111's endpoints."""
    app = create_app(fake_settings(sdapi=True), worker=fake_worker.main)
    with serving(app) as address, httpx.Client(base_url=address, timeout=20) as client:
        wait_until(lambda: client.get("/readyz").status_code == 200)
        yield client


def stored(alpha: bool) -> Array:
    """Return noise, with four columns of alpha 255, 200, 64 and 0 if wanted."""
    image = np.random.default_rng(1).integers(256, size=(32, 64, 4), dtype=np.uint8)
    image[..., 3] = np.repeat([255, 200, 64, 0], 16) if alpha else 255
    return image


WEIGHTS = np.repeat(np.repeat([0, 100, 255], [8, 8, 16])[:, None], 64, axis=1).astype(np.uint8)
"""Rows that are kept, blended and repainted."""


def image_file(kind: str) -> bytes:
    image = stored(alpha=kind == "transparent")
    return png(image[..., :3] if kind == "rgb" else image)


def mask_file(kind: str) -> bytes:
    """Return a file that repaints by WEIGHTS."""
    if kind == "alpha":
        return png(np.dstack([np.zeros_like(WEIGHTS)] * 3 + [255 - WEIGHTS]))
    if kind == "grey":
        return png(WEIGHTS)
    opaque = np.full_like(WEIGHTS, 255)
    levels = 1 if kind == "opaque LA" else 3
    return png(np.dstack([WEIGHTS] * levels + [opaque]))


def answer_of(
    client: httpx.Client, endpoint: str, image: bytes, mask: bytes | None = None, **fields: Any
) -> httpx.Response:
    files = {"image": ("image.png", image)} | ({"mask": ("mask.png", mask)} if mask else {})
    sent = {"prompt": "a ball", "seed": str(SEED), **fields}
    return client.post(f"/{endpoint}", data=sent, files=files)


def opened(answer: httpx.Response) -> PIL.Image.Image:
    assert answer.status_code == 200, answer.text
    content = answer.content
    if answer.headers["content-type"] == "application/json":
        content = base64.b64decode(answer.json()["data"][0]["b64_json"])
    return PIL.Image.open(io.BytesIO(content))


def operation(picture: PIL.Image.Image) -> str:
    return str(json.loads(picture.info["parameters"])["operation"])


def blended(image: Array, share: Array) -> Array:
    """Return RGBA [H, W, 4]: the image, and over it `share` of the drawn colour, opaque."""
    opacity, share = image[..., 3:] / 255, share[..., None] / 255
    kept = opacity * (1 - share)
    total = np.maximum(kept + share, 1e-9)
    colours = (image[..., :3] * kept + np.array(COLOUR) * share) / total
    return np.dstack([colours, 255 * (kept + share)])


def assert_blended(result: PIL.Image.Image, image: Array, share: Array) -> None:
    expected = blended(image, share)
    has_alpha = bool((expected[..., 3] < 254.9).any())
    assert result.mode == ("RGBA" if has_alpha else "RGB")
    pixels, channels = np.asarray(result), len(result.mode)
    kept = share == 0
    assert np.abs(pixels - expected[..., :channels])[~kept].max() <= 0.51
    assert np.array_equal(pixels[kept], image[kept][:, :channels])


@pytest.mark.parametrize("endpoint", BOTH)
@pytest.mark.parametrize("mask", ["alpha", "grey", "opaque RGBA", "opaque LA"])
@pytest.mark.parametrize("image", ["rgb", "opaque", "transparent"])
def test_a_mask_says_what_is_repainted_and_the_rest_keeps_colour_and_alpha(
    client: httpx.Client, endpoint: Endpoint, mask: str, image: str
) -> None:
    answer = answer_of(client, endpoint, image_file(image), mask_file(mask), feather="0")
    result = opened(answer)
    assert operation(result) == "inpaint"
    assert_blended(result, stored(image == "transparent"), WEIGHTS)
    if endpoint != "inpaint":
        background = "transparent" if image == "transparent" else "opaque"
        assert answer.json()["background"] == background


@pytest.mark.parametrize("endpoint", BOTH)
def test_without_a_mask_the_image_is_drawn_over_by_as_much_as_it_is_transparent(
    client: httpx.Client, endpoint: Endpoint
) -> None:
    result = opened(answer_of(client, endpoint, image_file("transparent"), feather="0"))
    assert operation(result) == "inpaint"
    image = stored(alpha=True)
    share = 255 - image[..., 3]
    image[..., 3] = 255
    assert_blended(result, image, share)


@pytest.mark.parametrize("image", ["rgb", "opaque"])
def test_an_opaque_image_without_a_mask_is_edited_or_lacks_its_mask(
    client: httpx.Client, image: str
) -> None:
    result = opened(answer_of(client, "v1/images/edits", image_file(image)))
    assert operation(result) == "edit"
    assert_blended(result, stored(alpha=False), np.full_like(WEIGHTS, 255))
    refused = answer_of(client, "inpaint", image_file(image))
    assert (refused.status_code, refused.json()["error"]["code"]) == (422, "missing_field")


@pytest.mark.parametrize(("lowest", "drawn"), [(254, "edit"), (247, "edit"), (246, "inpaint")])
def test_an_image_with_nothing_to_repaint_is_edited_as_a_whole(
    client: httpx.Client, lowest: int, drawn: str
) -> None:
    image = stored(alpha=False)
    image[:, 20, 3] = lowest
    assert operation(opened(answer_of(client, "v1/images/edits", png(image)))) == drawn
    native = answer_of(client, "inpaint", png(image))
    assert native.status_code == (200 if drawn == "inpaint" else 422)
    if drawn == "edit":
        message = native.json()["error"]["message"]
        assert message.startswith("image: nothing to repaint; ")
        assert message.endswith(f"its lowest alpha is {lowest} of 255")


def test_a_photo_whose_format_changed_its_alpha_a_little_is_edited_as_a_whole(
    client: httpx.Client,
) -> None:
    image = stored(alpha=False)
    image[:, 20, 3] = 240
    file = io.BytesIO()
    PIL.Image.fromarray(image).save(file, "WEBP", quality=80)
    assert operation(opened(answer_of(client, "v1/images/edits", file.getvalue()))) == "edit"


@pytest.mark.parametrize("endpoint", BOTH)
def test_an_image_whose_transparent_part_is_cropped_away_is_not_drawn_anew(
    client: httpx.Client, endpoint: Endpoint
) -> None:
    image = stored(alpha=False)
    image[:, :8, 3] = 0
    size = {"width": "32", "height": "32"} if endpoint == "inpaint" else {"size": "32x32"}
    error = answer_of(client, endpoint, png(image), **size).json()["error"]
    assert (error["param"], error["code"]) == ("image", "empty_mask")
    assert "in the part that width and height leave" in error["message"]


def test_a_native_edit_redraws_a_transparent_image_and_answers_opaque(client: httpx.Client) -> None:
    result = opened(answer_of(client, "edit", image_file("transparent")))
    assert_blended(result, stored(alpha=True), np.full_like(WEIGHTS, 255))


@pytest.mark.parametrize(
    ("endpoint", "fields"), [("variations", {}), ("upscale", {"prompt": "a ball"})]
)
def test_variations_and_enlargements_of_a_transparent_image_are_opaque(
    client: httpx.Client, endpoint: str, fields: dict[str, str]
) -> None:
    files = {"image": ("image.png", image_file("transparent"))}
    answer = client.post(f"/{endpoint}", data={"seed": str(SEED), **fields}, files=files)
    assert opened(answer).mode == "RGB"


@pytest.mark.parametrize("inverted", [False, True])
@pytest.mark.parametrize("image", ["rgb", "transparent"])
@pytest.mark.parametrize("mask", ["alpha", "grey", "opaque RGBA", None])
def test_automatic1111_repaints_opaque_pixels_of_a_mask_with_alpha(
    sd: httpx.Client, mask: str | None, image: str, inverted: bool
) -> None:
    sent = {"prompt": "a ball", "seed": SEED, "mask_blur": 0, "inpainting_mask_invert": inverted}
    sent["init_images"] = [base64.b64encode(image_file(image)).decode()]
    if mask is not None:
        sent["mask"] = base64.b64encode(mask_file(mask)).decode()
    answer = sd.post("/sdapi/v1/img2img", json=sent | {"width": SIZE[0], "height": SIZE[1]})
    assert answer.status_code == 200, answer.text
    result = PIL.Image.open(io.BytesIO(base64.b64decode(answer.json()["images"][0])))
    if mask is None:
        share, kept = np.full_like(WEIGHTS, 255), stored(alpha=False)
    else:
        white = np.where(WEIGHTS < 128, np.uint8(255), np.uint8(0)) if mask == "alpha" else WEIGHTS
        share, kept = 255 - white if inverted else white, stored(image == "transparent")
    assert_blended(result, kept, share)


def test_an_outpainted_image_keeps_its_alpha_beside_what_is_new(client: httpx.Client) -> None:
    answer = answer_of(client, "outpaint", image_file("transparent"), left="16", feather="0")
    result = np.asarray(opened(answer))
    assert result.shape == (32, 80, 4)
    assert np.array_equal(result[:, 16:], stored(alpha=True))
    assert (result[:, :16] == [*COLOUR, 255]).all()


@pytest.mark.parametrize("endpoint", BOTH)
def test_without_keep_unmasked_the_answer_is_what_was_drawn(
    client: httpx.Client, endpoint: Endpoint
) -> None:
    image, mask = image_file("transparent"), mask_file("grey")
    result = opened(answer_of(client, endpoint, image, mask, keep_unmasked="false"))
    assert_blended(result, stored(alpha=True), np.full_like(WEIGHTS, 255))


def test_transparency_is_kept_in_webp_and_white_in_jpeg_or_if_opaque_is_asked_for(
    client: httpx.Client,
) -> None:
    image, mask = image_file("transparent"), mask_file("grey")
    webp = opened(answer_of(client, "inpaint", image, mask, response_format="webp"))
    alpha = blended(stored(alpha=True), WEIGHTS)[..., 3]
    assert np.abs(np.asarray(webp.convert("RGBA"))[..., 3] - alpha).max() <= 0.51
    jpeg = opened(answer_of(client, "inpaint", image, mask, response_format="jpeg", quality="95"))
    assert jpeg.mode == "RGB"
    assert np.asarray(jpeg)[:7, 50:].mean() >= 240
    for fields in ({"background": "opaque"}, {"output_format": "jpeg"}):
        answer = answer_of(client, "v1/images/edits", image, mask, **fields)
        assert answer.json()["background"] == "opaque"
        result = np.asarray(opened(answer).convert("RGB"))
        assert result[:7, 50:].mean() >= 240


@pytest.mark.parametrize("endpoint", BOTH)
@pytest.mark.parametrize(
    ("mask", "mode", "code"),
    [
        (png(np.zeros((32, 64), np.uint8)), None, "empty_mask"),
        (png(np.eye(32, 64, dtype=np.uint8)), None, "empty_mask"),
        (png(np.full((32, 64, 4), (0, 0, 0, 255), np.uint8)), None, "empty_mask"),
        (mask_file("opaque RGBA"), "alpha", "mask_without_alpha"),
        (mask_file("grey"), "alpha", "mask_without_alpha"),
        (mask_file("alpha"), "luminance", "empty_mask"),
    ],
)
def test_masks_that_repaint_nothing_are_refused(
    client: httpx.Client, endpoint: Endpoint, mask: bytes, mode: str | None, code: str
) -> None:
    fields = {} if mode is None else {"mask_mode": mode}
    refused = answer_of(client, endpoint, image_file("rgb"), mask, **fields)
    status = 400 if endpoint.startswith("v1/") else 422
    assert (refused.status_code, refused.json()["error"]["code"]) == (status, code)


def test_a_transparent_image_is_edited_at_the_size_that_is_asked_for(client: httpx.Client) -> None:
    image = image_file("transparent")
    assert opened(answer_of(client, "v1/images/edits", image)).size == SIZE
    result = opened(answer_of(client, "v1/images/edits", image, size="32x32"))
    assert (operation(result), result.size, result.mode) == ("inpaint", (32, 32), "RGB")


def test_the_white_of_a_viewer_reaches_neither_the_kept_rim_nor_the_drawn_part(
    client: httpx.Client,
) -> None:
    """A disk with an antialiased edge: reported as a white rim of kept pixels."""
    y, x = np.mgrid[:256, :256]
    disk = PIL.Image.fromarray(((x - 128) ** 2 + (y - 128) ** 2 < 96**2).astype(np.uint8) * 255)
    alpha = np.asarray(disk.resize((64, 64), PIL.Image.Resampling.LANCZOS))
    image = np.dstack([np.full((64, 64), level, np.uint8) for level in (220, 30, 30)] + [alpha])
    answer = answer_of(client, "inpaint", png(image))
    result = np.asarray(opened(answer).convert("RGB")).astype(int)
    assert np.array_equal(result[alpha == 255], image[alpha == 255][:, :3])
    ends = np.array([(220, 30, 30), COLOUR])
    # The correction of the seam may add its share; white would be 200 levels beyond.
    assert (result >= ends.min(0) - 36).all()
    assert (result <= ends.max(0) + 36).all()
