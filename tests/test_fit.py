"""Images of any size on every endpoint: scaled, cropped and padded, and returned as they were."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

import httpx
import numpy as np
import PIL.Image
import pytest

from model.compositing import blended
from model.config import BundleConfig, find_bundle
from model.image_request import Repaint
from server.api.errors import ApiError
from server.api.images.admission import Uploads, decoding_cost, image_limits
from server.api.images.decode import ImageLimits, checked_file, decode
from server.api.images.decoded_image import DecodedImage
from server.api.images.encode import encode
from server.api.images.fit import (
    FitMode,
    Size,
    extended,
    fitted,
    follow,
    framed,
    keeps_ratio,
    scaled_mask,
    whole,
    within,
)
from server.api.images.sniff import coefficient_bytes, sniff
from server.api.planning.draft import draft
from server.api.planning.operations import OPERATIONS
from server.api.planning.plan import Plan
from server.cli.offline import recorded_request
from server.engine.messages import Image
from server.settings import Settings
from tests.conftest import NATIVE_SIZE
from tests.test_image_operations import as_json, noise, opened, pixels, png, refused, white

PHONE = (4032, 3024)
ORIENTATION = 0x0112
ROTATED = 6


def photo(size: Size, quality: int = 90, orientation: int = 1, **options: Any) -> bytes:
    """A JPEG with a gradient and coarse noise; size: as stored."""
    rng = np.random.default_rng(3)
    small = rng.integers(256, size=(9, 12, 3), dtype=np.uint8)
    image = PIL.Image.fromarray(small).resize(size, PIL.Image.Resampling.BILINEAR)
    exif = PIL.Image.Exif()
    exif[ORIENTATION] = orientation
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality, exif=exif, **options)
    return file.getvalue()


def mask_of(size: Size) -> bytes:
    """A PNG whose middle is white."""
    width, height = size
    box = width // 4, height // 4, -(-width * 3 // 4), -(-height * 3 // 4)
    return png(white(width, height, box))


def plan_of(operation: Any, settings: Settings | None = None, **fields: Any) -> Plan:
    """Plan a request as the server does, with the embedded weights."""
    settings = settings or Settings()
    schema, planner = OPERATIONS[operation]
    config = BundleConfig.read(find_bundle("tiny"))
    request = schema.model_validate(fields)
    drafted = draft(request, operation, {config.name: config}, settings)
    return planner(request, drafted, Uploads(image_limits(settings)))


def drawn(plan: Plan, value: int = 77) -> Image:
    """An image as the worker would return it, of one colour."""
    size = plan.job.height, plan.job.width, 3
    return Image.of(np.full(size, value, dtype=np.uint8), 0)


def array(image: Image) -> np.ndarray[Any, np.dtype[np.uint8]]:
    flat = np.frombuffer(image.pixels, np.uint8)
    return flat.reshape(image.height, image.width, 3)


# ── geometry ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("source", "side", "expected"),
    [
        (PHONE, 512, (512, 384)),
        ((3024, 4032), 512, (384, 512)),
        ((10_000, 10), 512, (512, 1)),
        ((1, 10_000), 512, (1, 512)),
        ((600, 600), 512, (512, 512)),
    ],
)
def test_the_longer_side_is_scaled_and_the_other_follows(
    source: Size, side: int, expected: Size
) -> None:
    assert within(source, side) == expected
    assert keeps_ratio(source, expected)


def test_a_missing_side_follows_the_ratio() -> None:
    assert follow(PHONE, 256, None) == (256, 192)
    assert follow(PHONE, None, 192) == (256, 192)
    assert follow(PHONE, 100, 100) == (100, 100)
    assert follow(PHONE, None, None) == PHONE
    assert follow((1000, 1), 10, None) == (10, 1)


@pytest.mark.parametrize(
    ("mode", "scaled", "offset", "box"),
    [
        ("crop", (512, 256), (-128, 0), (1000, 0, 3000, 2000)),
        ("pad", (256, 128), (0, 64), (0, -1000, 4000, 3000)),
        ("stretch", (256, 256), (0, 0), (0, 0, 4000, 2000)),
    ],
)
def test_three_ways_to_fit_a_wide_image_into_a_square(
    mode: FitMode, scaled: Size, offset: Size, box: tuple[int, ...]
) -> None:
    view = fitted((4000, 2000), (256, 256), mode)
    assert (view.scaled, view.offset, view.box) == (scaled, offset, box)
    tall = fitted((2000, 4000), (256, 256), mode)
    assert (tall.scaled, tall.offset) == (scaled[::-1], offset[::-1])


@pytest.mark.parametrize(
    ("ratio", "mode", "size", "offset"),
    [
        ((128, 64), "crop", (100, 50), (0, 0)),
        ((64, 64), "crop", (50, 50), (-25, 0)),
        ((64, 64), "pad", (100, 100), (0, 25)),
        ((64, 64), "stretch", (100, 50), (0, 0)),
        ((64, 128), "crop", (25, 50), (-38, 0)),
        ((64, 128), "pad", (100, 200), (0, 75)),
        ((256, 64), "crop", (100, 25), (0, -13)),
        ((256, 64), "pad", (200, 50), (50, 0)),
    ],
)
def test_a_frame_in_a_ratio_shows_the_image_unscaled_if_it_fits(
    ratio: Size, mode: FitMode, size: Size, offset: Size
) -> None:
    view = framed((100, 50), ratio, mode, max(size))
    assert (view.size, view.scaled, view.offset) == (size, (100, 50), offset)
    halved = framed((100, 50), ratio, mode, max(size) // 2)
    assert halved.size == tuple(-(-each // 2) for each in size)


@pytest.mark.parametrize("mode", ["crop", "pad", "stretch"])
def test_views_of_any_size_are_whole_images(mode: FitMode) -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        source, size = (tuple(int(each) for each in rng.integers(1, 300, 2)) for _ in range(2))
        view = fitted((source[0], source[1]), (size[0], size[1]), mode)
        rgb = np.zeros((view.decoded[1], view.decoded[0], 3), dtype=np.uint8)
        assert rgb.size <= 3 * 300 * 300
        part = view.part_of(DecodedImage(rgb, rgb[..., 0]))
        assert part.size == view.inner
        assert part.alpha is not None
        assert part.alpha.shape == part.rgb.shape[:2]
        mask = view.part_of_mask(np.zeros(source[::-1], dtype=np.bool_))
        assert mask.shape == part.alpha.shape
        assert view.placed(mask, outside=1).shape == (size[1], size[0])
        assert not (mode == "crop" and any(view.margins.values()))
        assert mode == "pad" or part.size == (size[0], size[1])
        assert min(view.full_size) >= 1
        frame = framed((source[0], source[1]), (size[0], size[1]), mode, 40)
        assert max(frame.size) <= 40


def test_an_image_in_the_sizes_own_ratio_loses_no_row_to_rounding() -> None:
    for width in range(500, 530):
        source = (8 * width + 3, 8 * 333 + 5)
        size = within(source, 512)
        assert fitted(source, size, "crop") == whole(source, size)


def test_a_canvas_is_scaled_with_its_margins() -> None:
    margins = {"left": 0, "right": 1000, "up": 500, "down": 500}
    view = extended((4000, 3000), margins, (500, 400))
    assert view.scaled == (400, 300)
    assert view.margins == {"left": 0, "right": 100, "up": 50, "down": 50}
    assert view.full_size == (5000, 4000)
    same = extended((40, 30), margins, (1040, 1030))
    assert same.scaled == (40, 30)
    assert same.margins == margins


@pytest.mark.parametrize("margins", [(1, 0), (0, 1), (1, 1), (4096, 0), (4096, 4096)])
@pytest.mark.parametrize("width", [1, 4032])
def test_a_margin_remains_however_much_is_scaled(width: int, margins: tuple[int, int]) -> None:
    whole_width = width + sum(margins)
    size = min(512, whole_width)
    named = {"left": margins[0], "right": margins[1], "up": 0, "down": 0}
    view = extended((width, 1), named, (size, 1))
    assert 1 <= view.scaled[0] < size
    assert view.margins["left"] + view.margins["right"] == size - view.scaled[0]


@pytest.mark.parametrize("size", [(512, 384), (5, 3), (4032, 3024), (63, 1)])
def test_no_pixel_of_a_mask_is_lost(size: Size) -> None:
    mask = np.zeros((3024, 4032), dtype=np.bool_)
    mask[1234, 2345] = True
    scaled = scaled_mask(mask, size)
    assert scaled.shape == size[::-1]
    assert scaled.sum() == 1
    y, x = (int(axis[0]) for axis in scaled.nonzero())
    assert abs(y - 1234 * size[1] / 3024) <= 1
    assert abs(x - 2345 * size[0] / 4032) <= 1
    assert not scaled_mask(~mask, size)[:0].any()


def test_a_mask_can_be_enlarged() -> None:
    mask = np.array([[True, False]])
    assert scaled_mask(mask, (4, 2)).tolist() == [[True, True, False, False]] * 2


# ── bounds ────────────────────────────────────────────────────────────────────────────────────────


def test_a_jpeg_costs_what_is_decoded_of_it() -> None:
    phone, png_file = sniff(photo(PHONE)), sniff(png(white(64, 32)))
    assert decoding_cost(phone, 512) == PHONE[0] * PHONE[1] * 3 // 8
    assert decoding_cost(phone, 4096) == PHONE[0] * PHONE[1]
    assert decoding_cost(png_file, 1) == 64 * 32
    small = sniff(photo((64, 32)))
    assert decoding_cost(small, 512) == 64 * 32
    uploads = Uploads(ImageLimits())
    uploads.check([("image", photo(PHONE, 50 + i)) for i in range(8)])
    assert uploads.pixels == 8 * PHONE[0] * PHONE[1] * 3 // 8


@pytest.mark.parametrize(
    ("size", "side", "cost"),
    [
        ((400, 320), 81, 400 * 320),
        ((400, 320), 80, 200 * 160 + 16_000),
        ((400, 320), 40, 100 * 80 + 16_000),
        ((400, 320), 20, 50 * 40 + 16_000),
        ((401, 321), 40, 101 * 81 + 16_090),
        # The shorter side decides, whichever it is.
        ((400, 100), 50, 400 * 100),
        ((100, 400), 50, 100 * 400),
    ],
)
def test_a_jpeg_s_cost_is_of_what_is_decoded_and_of_an_eighth_of_its_codes(
    size: Size, side: int, cost: int
) -> None:
    assert decoding_cost(sniff(photo(size)), side) == cost


@pytest.mark.parametrize(("max_side", "side"), [(256, 512), (512, 512), (1024, 1024)])
def test_an_image_is_needed_as_large_as_what_is_drawn_or_a_reference(
    max_side: int, side: int
) -> None:
    assert image_limits(Settings(max_side=max_side)).scaled_side == side


def test_a_jpeg_may_declare_more_pixels_than_are_decoded() -> None:
    limits = ImageLimits(max_pixels=100 * 80, max_jpeg_pixels=400 * 320)
    content = photo((400, 320))
    assert decode(content, limits, "image", lambda _: (50, 40)).size == (50, 40)
    for fit in (None, lambda _: (150, 120)):
        with pytest.raises(ApiError, match=r"at most 8000 pixels \(sent: 400x320\)"):
            decode(content, limits, "image", fit)
    with pytest.raises(ApiError, match="at most 128000 pixels"):
        checked_file(photo((401, 320)), limits, "image")
    with pytest.raises(ApiError, match="at most 8000 pixels"):
        checked_file(png(white(400, 320)), limits, "image")


@pytest.mark.parametrize(
    ("side", "scale"), [(399, 1), (400, 2), (799, 2), (800, 4), (1599, 4), (1600, 8), (3200, 8)]
)
def test_a_jpeg_is_reduced_by_2_4_or_8_as_long_as_twice_the_needed_side_is_left(
    side: int, scale: int
) -> None:
    content = photo((side, 64))
    pixels = -(-side // scale) * (64 // scale)
    assert decode(content, ImageLimits(max_pixels=pixels), fit=lambda _: (100, 1)).size == (100, 1)
    with pytest.raises(ApiError, match=f"at most {pixels - 1} pixels"):
        decode(content, ImageLimits(max_pixels=pixels - 1), fit=lambda _: (100, 1))


def test_a_progressive_jpeg_may_have_as_many_coefficients_as_a_decoder_may_hold() -> None:
    size = (400, 320)
    pixels = size[0] * size[1]
    held = {
        "4:2:0": (3, {"subsampling": "4:2:0"}),
        "4:4:4": (6, {"subsampling": "4:4:4"}),
    }
    for factor, options in held.values():
        assert coefficient_bytes(sniff(photo(size, **options))) == 0
        file = sniff(photo(size, progressive=True, **options))
        assert coefficient_bytes(file) == factor * pixels
    # 16 bytes for each of the other formats' pixels.
    limits = ImageLimits(max_pixels=4 * pixels // 16)
    checked_file(photo(size, progressive=True, subsampling="4:2:0"), limits, "image")
    with pytest.raises(ApiError, match=f"at most {pixels * 4 // 6} pixels"):
        checked_file(photo(size, progressive=True, subsampling="4:4:4"), limits, "image")


# ── every endpoint ────────────────────────────────────────────────────────────────────────────────

# Stored size, EXIF orientation, and size at which it is drawn.
PICTURES: dict[str, tuple[Size, int, Size]] = {
    "phone": (PHONE, 1, (512, 384)),
    "portrait": (PHONE, ROTATED, (384, 512)),
    "tiny": ((3, 2), 1, (3, 2)),
    "one pixel": ((1, 1), 1, (1, 1)),
    "wide": ((6000, 7), 1, (512, 1)),
    "tall": ((7, 6000), 1, (1, 512)),
    "native": ((64, 32), 1, (64, 32)),
}


@pytest.fixture(scope="module", params=PICTURES)
def picture(request: pytest.FixtureRequest) -> tuple[bytes, Size, Size]:
    """(file, size of the upright image, size at which it is drawn)."""
    stored, orientation, expected = PICTURES[request.param]
    upright = stored[::-1] if orientation == ROTATED else stored
    return photo(stored, orientation=orientation), upright, expected


def sent_with(operation: str, content: bytes, upright: Size) -> dict[str, Any]:
    """Fields of a request with an image of this size."""
    return {
        "inpaint": {"prompt": "a ball", "image": content, "mask": mask_of(upright)},
        "outpaint": {"image": content, "right": min(upright[0], 4096)},
        "variations": {"image": content},
        "edit": {"prompt": "a ball", "image": content},
        "interpolate": {"keyframes": [{"prompt": "a ball"}, {"image": content}], "frames": 2},
    }[operation] | {"seed": 5, "response_format": "json"}


@pytest.mark.parametrize("operation", ["inpaint", "outpaint", "variations", "edit", "interpolate"])
def test_any_photo_works_on_every_endpoint(
    client: httpx.Client, operation: str, picture: tuple[bytes, Size, Size]
) -> None:
    content, upright, expected = picture
    answer = as_json(client, operation, **sent_with(operation, content, upright))
    assert answer.status_code == 200, answer.text
    parameters, entry = answer.json()["parameters"], answer.json()["images"][0]
    if operation == "outpaint":
        canvas = upright[0] + min(upright[0], 4096), upright[1]
        expected = canvas if max(canvas) <= 512 else within(canvas, 512)
    elif operation not in ("inpaint", "edit"):
        expected = NATIVE_SIZE
    assert (parameters["width"], parameters["height"]) == expected
    assert (entry["width"], entry["height"]) == expected
    file = base64.b64decode(entry["b64_json"])
    assert opened(file).size == expected


@pytest.mark.parametrize("path", ["edits", "variations"])
def test_openais_endpoints_take_any_photo(
    client: httpx.Client, path: str, picture: tuple[bytes, Size, Size]
) -> None:
    content, upright, expected = picture
    body = {"image": base64.b64encode(content).decode(), "prompt": "a ball"}
    answer = client.post(f"/v1/images/{path}", json=body)
    assert answer.status_code == 200, answer.text
    expected = expected if path == "edits" else NATIVE_SIZE
    assert answer.json()["size"] == f"{expected[0]}x{expected[1]}"
    if path == "variations":
        return
    mask = base64.b64encode(mask_of(upright)).decode()
    masked = client.post(
        "/v1/images/edits",
        json=body | {"mask": mask, "mask_mode": "luminance", "size": "256x256", "fit": "pad"},
    )
    assert masked.json()["size"] == "256x256"


def test_kept_pixels_are_those_of_the_scaled_photo(client: httpx.Client) -> None:
    content = photo(PHONE, orientation=ROTATED)
    mask = np.zeros(PHONE, dtype=np.uint8)
    mask[1000:3000, 1000:2000] = 255
    result = pixels(
        as_json(client, "inpaint", prompt="a ball", image=content, mask=png(mask), seed=5)
    )
    scaled = decode(content, ImageLimits(), "image", lambda _: (384, 512)).rgb
    kept = ~scaled_mask(mask > 0, (384, 512))
    np.testing.assert_array_equal(result[kept], scaled[kept])
    assert (result[~kept] != scaled[~kept]).mean() > 0.9


def test_a_mask_must_be_as_large_as_the_photo(client: httpx.Client) -> None:
    fields = {"prompt": "a ball", "image": photo(PHONE)}
    answer = as_json(client, "inpaint", **fields, mask=mask_of((512, 384)))
    refused(answer, 422, "mask_size_mismatch", "mask", "4032x3024")


# ── fit ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("operation", ["edit", "inpaint"])
def test_one_side_is_followed_by_the_other(client: httpx.Client, operation: str) -> None:
    fields = sent_with(operation, photo(PHONE), PHONE) | {"response_format": "png"}
    assert pixels(as_json(client, operation, **fields, width=256)).shape == (192, 256, 3)
    assert pixels(as_json(client, operation, **fields, height=96)).shape == (96, 128, 3)
    refused(
        as_json(client, operation, **fields, height=500), 422, "invalid_value", "height", "667x500"
    )


def test_variations_follow_their_first_image_in_sizes_that_are_drawn(client: httpx.Client) -> None:
    fields = {"image": [photo((4000, 2900)), photo((10, 100))]}
    assert pixels(as_json(client, "variations", **fields, width=128)).shape == (96, 128, 3)
    assert pixels(as_json(client, "variations", **fields, height=96)).shape == (96, 128, 3)
    assert pixels(as_json(client, "variations", **fields, height=512)).shape == (512, 512, 3)
    refused(as_json(client, "variations", **fields, width=100), 422, "invalid_value", "width")


@pytest.mark.parametrize(("sent", "weights"), [({}, [1, 1]), ({"weights": [0.0, 0.5]}, [0, 0.5])])
def test_images_of_a_variation_count_alike_unless_weights_say_otherwise(
    sent: dict[str, Any], weights: list[float]
) -> None:
    plan = plan_of("variations", image=[png(noise()), png(noise(32, 32))], **sent)
    assert [reference.weight for reference in plan.job.references] == weights
    assert plan.parameters((), 0)["weights"] == weights


def test_references_and_an_image_without_a_prompt_count_fully() -> None:
    image = png(noise())
    plans = (
        plan_of("edit", prompt="a ball", image=image, references=[image, png(noise(32, 32))]),
        plan_of("outpaint", image=image, right=32),
        plan_of("outpaint", image=image, right=32, prompt="a ball"),
    )
    weights = [[reference.weight for reference in plan.job.references] for plan in plans]
    assert weights == [[1, 1], [1], []]


@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
def test_a_narrow_image_in_a_square_takes_no_more_memory_than_the_square(fit: FitMode) -> None:
    view = fitted((30_000, 3), (512, 512), fit)
    assert max(view.decoded) <= 30_000
    assert view.decoded[1] <= 512
    fields = {"prompt": "a ball", "image": photo((30_000, 3)), "fit": fit}
    assert plan_of("edit", **fields, width=512, height=512).size == (512, 512)


def halves() -> bytes:
    """400x200: the left quarter red, the right quarter blue, green between them."""
    image = np.zeros((200, 400, 3), dtype=np.uint8)
    image[:, :100, 0] = 255
    image[:, 100:300, 1] = 255
    image[:, 300:, 2] = 255
    return png(image)


@pytest.mark.parametrize(("fit", "edge"), [("crop", "green"), ("pad", "red"), ("stretch", "red")])
@pytest.mark.parametrize("operation", ["edit", "variations"])
def test_both_sides_fit_as_asked_for(operation: str, fit: str, edge: str) -> None:
    colours = {"red": [255, 0, 0], "green": [0, 255, 0]}
    fields: dict[str, Any] = {"prompt": "a ball", "image": halves(), "fit": fit}
    plan = plan_of(operation, **fields, width=256, height=256)
    assert plan.size == (256, 256)
    if operation == "edit":
        assert plan.job.canvas
        shown = plan.job.canvas.picture
    else:
        shown = plan.job.references[0].picture
    image = np.frombuffer(shown.content, np.uint8).reshape(shown.height, shown.width, 3)
    if operation == "edit" or fit != "stretch":  # CLIP stretches what it reads
        assert shown.width == shown.height
    middle = image[shown.height // 2]
    assert np.abs(middle[1].astype(int) - colours[edge]).max() < 8
    assert image.sum(2).min() > 200, "what is beyond the image has its colours"
    assert np.abs(middle[shown.width // 2].astype(int) - colours["green"]).max() < 8
    assert plan.parameters((), 0)["fit"] == fit


def test_a_padded_image_is_drawn_beyond_its_edges() -> None:
    image = np.full((100, 200, 3), 50, dtype=np.uint8)
    mask = np.zeros((100, 200), dtype=np.uint8)
    mask[40:60, 90:110] = 255
    fields = {"prompt": "a ball", "image": png(image), "mask": png(mask), "fit": "pad"}
    plan = plan_of("inpaint", **fields, width=200, height=200)
    result = array(plan.result(drawn(plan, 250)))
    assert result.shape == (200, 200, 3)
    kept = np.zeros((200, 200), dtype=np.bool_)
    kept[50:150] = mask == 0
    assert (result[kept] == 50).all()
    assert (result[:20] == 250).all()


@pytest.mark.parametrize(("side", "size"), [("right", (110, 100)), ("down", (100, 110))])
def test_padding_is_drawn_beyond_a_new_edge_and_mirrors_the_image_beyond_an_old_one(
    side: str, size: Size
) -> None:
    """The embedded weights draw multiples of 64 pixels."""
    image = noise(100, 100)
    plan = plan_of("outpaint", image=png(image), **{side: 10})
    assert plan.size == size
    assert isinstance(plan.job.canvas, Repaint)
    repainted = np.zeros((128, 128), dtype=np.bool_)
    repainted[:, 100:] = True
    expected = repainted if side == "right" else repainted.T
    np.testing.assert_array_equal(plan.job.canvas.mask.array, expected)
    edited = plan_of("edit", prompt="a ball", image=png(image)).job.canvas
    assert edited
    mirrored = np.pad(image, [(0, 28), (0, 28), (0, 0)], mode="reflect")
    np.testing.assert_array_equal(edited.picture.array, mirrored)


@pytest.mark.parametrize(
    ("width", "height", "param"),
    [
        (600, 500, "width"),
        (600, 600, "width"),
        (500, 600, "height"),
        (600, None, "width"),
        (None, 600, "height"),
    ],
)
def test_of_a_size_that_is_too_large_the_longer_side_is_named(
    width: int | None, height: int | None, param: str
) -> None:
    fields = {"prompt": "a ball", "image": png(noise()), "width": width, "height": height}
    with pytest.raises(ApiError, match="at most 512 pixels a side") as caught:
        plan_of("edit", **fields)
    assert caught.value.param == param


def test_the_faintest_grey_of_a_mask_is_repainted() -> None:
    mask = np.zeros((64, 64), dtype=np.uint8)
    mask[8, 8] = 1
    plan = plan_of("inpaint", prompt="a ball", image=png(noise(64, 64)), mask=png(mask))
    assert isinstance(plan.job.canvas, Repaint)
    np.testing.assert_array_equal(plan.job.canvas.mask.array[:64, :64], mask)


def test_a_mask_outside_the_crop_is_refused() -> None:
    mask = np.zeros((200, 400), dtype=np.uint8)
    mask[:, :50] = 255
    fields = {"prompt": "a ball", "image": halves(), "mask": png(mask)}
    with pytest.raises(ApiError, match="nothing to repaint") as caught:
        plan_of("inpaint", **fields, width=128, height=128)
    assert caught.value.code == "empty_mask"


def test_the_masks_of_regions_are_as_large_as_what_was_sent() -> None:
    content, size = photo((1024, 512)), (1024, 512)
    region = [{"prompt": "a box", "mask": mask_of(size)}]
    mask = mask_of(size)
    plan = plan_of("inpaint", prompt="a ball", image=content, mask=mask, regions=region)
    assert plan.size == (512, 256)
    assert len(plan.job.regions[0].weight.content) == plan.job.width * plan.job.height
    beyond = [{"prompt": "a box", "mask": mask_of((2048, 512))}]
    plan = plan_of("outpaint", image=content, right=1024, regions=beyond)
    assert plan.size == (512, 128)
    with pytest.raises(ApiError, match="2048x512"):
        plan_of("outpaint", image=content, right=1024, regions=region)


# ── work ──────────────────────────────────────────────────────────────────────────────────────────


def test_a_photo_is_scaled_to_what_the_requests_work_allows() -> None:
    fields = {"prompt": "a ball", "image": photo((2048, 1024)), "strength": 1.0}
    full = plan_of("edit", **fields)
    assert full.size == (512, 256)
    heavy = {"n": 16, "num_inference_steps": 64}
    reduced = plan_of("edit", **fields, **heavy)
    step = BundleConfig.read(find_bundle("tiny")).size_step
    assert reduced.size[0] < 512
    assert reduced.size[0] % step == 0
    with pytest.raises(ApiError) as caught:
        plan_of("edit", **fields, **heavy, width=512)
    assert caught.value.code == "too_much_work"


DRAWN_WORK = 512 * 256 * (2 * 12 + 4)  # 12 guided steps, 3 for decoding, 1 for the file


@pytest.mark.parametrize(
    ("operation", "fields", "size", "work"),
    [
        ("edit", {"image": photo((512, 256))}, (512, 256), DRAWN_WORK),
        # It is padded to the size before.
        ("edit", {"image": photo((500, 250))}, (500, 250), DRAWN_WORK),
        # Nothing is enlarged.
        ("edit", {"image": photo((1024, 512)), "return_size": "result"}, (512, 256), DRAWN_WORK),
        (
            "outpaint",
            {"image": photo((512, 512)), "right": 512, "return_size": "result"},
            (512, 256),
            DRAWN_WORK,
        ),
        # 2 for an enlarged pixel, 1 for its file.
        ("edit", {"image": photo((1024, 512))}, (512, 256), DRAWN_WORK + 1024 * 512 * 3),
        (
            "outpaint",
            {"image": photo((512, 512)), "right": 512},
            (512, 256),
            DRAWN_WORK + 1024 * 512 * 3,
        ),
    ],
)
def test_pixels_that_are_enlarged_to_an_original_are_work_too(
    operation: str, fields: dict[str, Any], size: Size, work: int
) -> None:
    sent = {"prompt": "a ball", "num_inference_steps": 12, "return_size": "original", **fields}
    if operation == "edit":
        sent["strength"] = 1.0

    def plan_within(allowed: int, **more: int) -> Plan:
        return plan_of(operation, Settings(max_request_work=allowed), **sent, **more)

    assert plan_within(work).size == size
    assert plan_within(work - 1).size == (448, 224)
    with pytest.raises(ApiError, match=f"costs {work},"):
        plan_within(work - 1, width=size[0])
    with pytest.raises(ApiError, match=f"costs {work},"):
        plan_within(1)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ((512, 40), (512, 40)),
        ((40, 512), (40, 512)),
        ((513, 40), (512, 40)),
        ((40, 513), (40, 512)),
        ((2048, 400), (512, 100)),
        ((400, 2048), (100, 512)),
    ],
)
def test_an_image_has_its_own_size_up_to_the_largest_side(source: Size, expected: Size) -> None:
    assert plan_of("edit", prompt="a ball", image=photo(source)).size == expected


# ── return_size ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("orientation", [1, ROTATED])
def test_kept_pixels_of_an_original_are_exact(orientation: int) -> None:
    content = photo((1030, 771), orientation=orientation)
    whole_image = decode(content, ImageLimits()).rgb
    height, width = whole_image.shape[:2]
    mask = np.zeros((height, width), dtype=np.uint8)
    mask[101:607, 203:611] = 255
    fields = {"prompt": "a ball", "image": content, "mask": png(mask), "return_size": "original"}
    fields["feather"] = 0
    plan = plan_of("inpaint", **fields)
    assert max(plan.size) == 512
    assert plan.answer_size == (width, height)
    assert plan.job.held_bytes == len(content) + len(fields["mask"])
    result = array(plan.result(drawn(plan)))
    np.testing.assert_array_equal(result[mask == 0], whole_image[mask == 0])
    assert (result[300:400, 350:450] == 77).all()
    preview = plan.finish(drawn(plan))
    assert (preview.width, preview.height) == plan.size


@pytest.mark.parametrize(
    "margins",
    [
        {"left": 33, "down": 200},
        {"right": 90, "up": 57},
        {"left": 33, "right": 90, "up": 57, "down": 200},
    ],
)
def test_an_outpainted_original_grows_by_its_margins_exactly(margins: dict[str, int]) -> None:
    content = photo((1000, 600))
    left, right, up, down = (margins.get(side, 0) for side in ("left", "right", "up", "down"))
    plan = plan_of("outpaint", image=content, **margins, return_size="original", feather=0)
    assert plan.answer_size == (left + 1000 + right, up + 600 + down)
    expected = np.full((up + 600 + down, left + 1000 + right, 3), 77, dtype=np.uint8)
    expected[up : up + 600, left : left + 1000] = decode(content, ImageLimits()).rgb
    np.testing.assert_array_equal(array(plan.result(drawn(plan))), expected)


@pytest.mark.parametrize(
    ("size", "fit", "box"),
    [
        ((1000, 600), "crop", (202, 0, 800, 600)),
        ((600, 1000), "crop", (0, 202, 600, 800)),
        ((1000, 600), "pad", (0, -198, 1000, 798)),
        ((600, 1000), "pad", (-198, 0, 798, 1000)),
    ],
)
def test_an_original_in_a_square_is_the_part_of_its_plane_that_was_drawn(
    size: Size, fit: str, box: tuple[int, int, int, int]
) -> None:
    content = photo(size)
    mask = np.zeros(size[::-1], dtype=np.uint8)
    mask[250:350, 250:350] = 255
    fields = {"prompt": "a ball", "image": content, "mask": png(mask), "fit": fit, "feather": 0}
    plan = plan_of("inpaint", **fields, width=256, height=256, return_size="original")
    plane = decode(content, ImageLimits()).rgb
    plane[mask > 0] = 77
    beyond = 200
    plane = np.pad(plane, [(beyond, beyond), (beyond, beyond), (0, 0)], constant_values=77)
    x0, y0, x1, y1 = (beyond + edge for edge in box)
    np.testing.assert_array_equal(array(plan.result(drawn(plan))), plane[y0:y1, x0:x1])


@pytest.mark.parametrize("source", [(400, 200), (200, 400)])
@pytest.mark.parametrize("fit", ["crop", "pad"])
def test_all_of_a_drawn_view_is_enlarged_to_its_edges(source: Size, fit: FitMode) -> None:
    view = fitted(source, (100, 100), fit)
    ramp = np.arange(100, dtype=np.uint8)
    x, y = np.meshgrid(ramp, ramp)
    enlarged = view.enlarged(np.dstack([x, y, x]))
    side = 200 if fit == "crop" else 400
    assert enlarged.shape == (side, side, 3)
    expected = (np.arange(side) + 0.5) * 100 / side - 0.5
    inside = slice(20, -20)  # there the filter sees both sides
    for channel, values in ((0, expected[None, :]), (1, expected[:, None])):
        assert np.abs(enlarged[..., channel] - values)[inside, inside].max() < 0.75


def test_an_edit_is_enlarged_to_the_original() -> None:
    fields = {"prompt": "a ball", "image": photo((1000, 600)), "return_size": "original"}
    plan = plan_of("edit", **fields)
    assert (plan.size, plan.answer_size) == ((512, 307), (1000, 600))
    assert plan.job.held_bytes == 0
    assert (array(plan.result(drawn(plan))) == 77).all()
    assert plan_of("edit", **fields | {"image": photo((100, 60))}).restoration is None


def test_a_cut_out_original_is_opaque_and_keeps_what_was_opaque() -> None:
    image = np.full((800, 1200, 4), (200, 100, 50, 255), dtype=np.uint8)
    image[:, 900:, 3] = 0
    content = png(image)
    fields = {"prompt": "a ball", "image": content, "return_size": "original", "feather": 0}
    plan = plan_of("inpaint", **fields)
    assert (plan.answer_size, plan.is_transparent) == ((1200, 800), False)
    assert plan.job.held_bytes == len(content)
    result = array(plan.result(drawn(plan)))
    np.testing.assert_array_equal(result[:, :900], image[:, :900, :3])
    assert (result[:, 910:] == 77).all()


def test_an_offset_of_the_decoder_disappears_from_an_original_too() -> None:
    image = np.full((800, 1200, 3), 100, dtype=np.uint8)
    mask = np.zeros((800, 1200), dtype=np.uint8)
    mask[:, 600:] = 255
    fields = {"prompt": "a ball", "image": png(image), "mask": png(mask)}
    plan = plan_of("inpaint", **fields, return_size="original")
    result = array(plan.result(drawn(plan, 120))).astype(int)
    assert np.abs(result - image).max() <= 2


def test_an_original_is_answered_recorded_and_repeated(client: httpx.Client) -> None:
    size = (1200, 900)
    content = photo(size)
    fields = {"prompt": "a ball", "image": content, "mask": mask_of(size), "seed": 5}
    answer = as_json(client, "inpaint", **fields, return_size="original")
    assert opened(answer.content).size == size
    recorded = json.loads(opened(answer.content).info["parameters"])
    assert (recorded["width"], recorded["height"]) == (512, 384)
    assert recorded["return_size"] == "original"
    files = {"image": content, "mask": fields["mask"]}
    again = {**recorded, **files, "response_format": "png"}
    for name in ("operation", "truncated"):
        del again[name]
    assert as_json(client, "inpaint", **again).content == answer.content


def test_a_stream_of_an_original_has_previews_as_drawn(client: httpx.Client) -> None:
    size = (1200, 900)
    fields = {"prompt": "show", "image": photo(size), "mask": mask_of(size)}
    more = {"stream": True, "partial_images": 2, "return_size": "original"}
    text = as_json(client, "inpaint", **fields, **more).text
    blocks = [block.split("\n", 1) for block in text.split("\n\n") if block.startswith("event")]
    events = [(name[7:], json.loads(data[6:])) for name, data in blocks]
    shown = [data for name, data in events if name == "preview"]
    assert shown
    assert {(each["width"], each["height"]) for each in shown} == {(512, 384)}
    entry = events[-1][1]["images"][0]
    assert (entry["width"], entry["height"]) == size


def test_an_original_has_bounds_of_its_own() -> None:
    settings = Settings(max_image_pixels=1_500_000)
    fields = {"prompt": "a ball", "image": photo((2400, 2400)), "return_size": "original"}
    with pytest.raises(ApiError, match="an original may have at most 1500000 pixels") as caught:
        plan_of("edit", settings, **fields)
    assert caught.value.param == "return_size"
    assert plan_of("edit", settings, **fields | {"return_size": "result"}).size == (512, 512)
    wide = fields | {"image": photo((2400, 1600))}
    with pytest.raises(ApiError, match=r"3840000 pixels \* 3 to enlarge") as caught:
        plan_of("edit", Settings(max_request_work=4_000_000), **wide)
    assert caught.value.code == "too_much_work"


@pytest.mark.parametrize(
    ("operation", "fields", "most"),
    [
        ("edit", {"prompt": "a ball"}, 1200 * 900),
        # The answer is a part, but the whole image is decoded.
        ("edit", {"prompt": "a ball", "width": 256, "height": 256}, 1200 * 900),
        ("outpaint", {"right": 300}, 1500 * 900),
    ],
)
def test_the_larger_of_the_sent_image_and_the_answer_bounds_an_original(
    operation: str, fields: dict[str, Any], most: int
) -> None:
    sent = {"image": photo((1200, 900)), "return_size": "original", **fields}
    assert plan_of(operation, Settings(max_image_pixels=most), **sent).restoration
    with pytest.raises(ApiError, match=f"at most {most - 1} pixels") as caught:
        plan_of(operation, Settings(max_image_pixels=most - 1), **sent)
    assert caught.value.param == "return_size"


def test_replaying_the_effective_size_needs_no_luck_with_rounding() -> None:
    for size in ((4000, 3001), (4000, 3005), (6000, 7), (777, 10_01)):
        content = photo(size)
        fields = {"prompt": "a ball", "image": content}
        first = plan_of("edit", **fields)
        again = plan_of("edit", **fields, width=first.size[0], height=first.size[1])
        assert first.job.canvas == again.job.canvas


def test_weights_are_averaged_and_never_lost() -> None:
    weights = np.zeros((40, 60), dtype=np.uint8)
    weights[10:20, 30:45] = 255
    weights[37, 1] = 9
    scaled = scaled_mask(weights, (6, 4))
    expected = np.zeros((4, 6))
    expected[1, 3], expected[1, 4], expected[3, 0] = 255, 127, 1
    assert scaled.dtype == np.uint8
    np.testing.assert_array_equal(scaled, expected)


def test_weights_blend_the_original_into_what_is_enlarged() -> None:
    view = whole((4, 2), (2, 1))
    original = np.full((2, 4, 3), 100, dtype=np.uint8)
    weights = np.array([[0, 128, 255, 255]] * 2, dtype=np.uint8)
    drawn_view = np.full((1, 2, 3), 200, dtype=np.uint8)
    result = view.restored(drawn_view, original, weights, unmix=False)
    assert result[..., 0].tolist() == [[100, 150, 200, 200]] * 2


def test_an_original_is_blended_in_strips_as_it_would_be_at_once() -> None:
    rng = np.random.default_rng(0)
    size = (50, 200)
    original, drawn_view = (rng.integers(256, size=(200, 50, 3), dtype=np.uint8) for _ in range(2))
    weights = rng.choice(np.array([0, 90, 255], dtype=np.uint8), size=(200, 50))
    results = [
        whole(size, size).restored(drawn_view, original, weights, unmix) for unmix in (True, False)
    ]
    for result, unmix in zip(results, (True, False), strict=True):
        np.testing.assert_array_equal(result, blended(original, drawn_view, weights, unmix))
    assert (results[0] != results[1]).any()


@pytest.mark.parametrize(("feather", "unmix"), [(0, False), (1, True), (8, True)])
def test_an_original_s_edges_are_unmixed_unless_the_weights_alone_decide(
    feather: int, unmix: bool
) -> None:
    size = (600, 400)
    fields = {"prompt": "a ball", "image": photo(size), "mask": mask_of(size)}
    plan = plan_of("inpaint", **fields, return_size="original", feather=feather)
    assert plan.restoration
    assert plan.restoration.unmix is unmix


def test_an_original_is_blended_once_and_keeps_its_transparency() -> None:
    size = (1200, 800)
    image = np.zeros((800, 1200, 4), dtype=np.uint8)
    image[...] = (200, 100, 50, 255)
    image[:, :300, 3] = 90
    mask = np.zeros((800, 1200), dtype=np.uint8)
    mask[300:500, 500:700], mask[:, 900:] = 128, 255
    fields = {"prompt": "a ball", "image": png(image), "mask": png(mask), "feather": 0}
    plan = plan_of("inpaint", **fields, return_size="original")
    assert plan.answer_size == size != plan.size
    assert plan.is_transparent
    result = plan.result(drawn(plan))
    pixels = np.frombuffer(result.pixels, np.uint8).reshape(800, 1200, 4)
    np.testing.assert_array_equal(pixels[mask == 0], image[mask == 0])
    assert (pixels[:, 910:] == (77, 77, 77, 255)).all()
    half = image[400, 600, :3] * (127 / 255) + 77 * (128 / 255)
    assert np.abs(pixels[400, 600, :3] - half).max() <= 1


def test_without_a_feather_the_weights_alone_blend_an_original() -> None:
    """With one, the edge's pixels would lose what they have of the removed colour."""
    image = np.full((800, 1200, 3), 100, dtype=np.uint8)
    image[:, 600], image[:, 601:] = 150, 200
    mask = np.zeros((800, 1200), dtype=np.uint8)
    mask[:, 600], mask[:, 601:] = 128, 255
    fields = {"prompt": "a ball", "image": png(image), "mask": png(mask), "feather": 0}
    plan = plan_of("inpaint", **fields, return_size="original")
    result = array(plan.result(drawn(plan)))
    assert (result[:, :600] == 100).all()
    assert (result[:, 601:] == 77).all()
    assert np.abs(result[:, 600] - (150 * 127 + 77 * 128) / 255).max() <= 1


@pytest.mark.parametrize("operation", ["inpaint", "outpaint", "variations", "edit"])
def test_a_recorded_image_of_a_photo_is_planned_again(operation: str) -> None:
    size = (1500, 800)
    content = photo(size, orientation=ROTATED)
    sent = sent_with(operation, content, size[::-1])
    del sent["response_format"]
    if operation != "variations":
        sent["return_size"] = "original"
    if operation not in ("outpaint", "variations"):
        sent |= {"width": 200, "fit": "pad", "height": 200}
    first = plan_of(operation, **sent)
    recorded = encode(first.result(drawn(first)), "png", 90, first.parameters((), 0))
    files = [value for value in sent.values() if isinstance(value, bytes)]
    again_operation, fields, _ = recorded_request(recorded, files)
    again = plan_of(again_operation, **fields)
    assert again.job.canvas == first.job.canvas
    assert again.job.references == first.job.references
    assert again.parameters((), 0) == first.parameters((), 0)
    assert again.answer_size == first.answer_size
