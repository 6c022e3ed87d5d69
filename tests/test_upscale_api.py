"""`POST /upscale` and `hires` of /generate over the fake worker: sizes, bounds, work, replay."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from model.config import BundleConfig, Operation
from server.api import create_app
from server.api.errors import ApiError
from server.api.images.admission import Uploads, image_limits
from server.api.images.encode_queue import ImageEncoder
from server.api.planning.draft import draft
from server.api.planning.operations import OPERATIONS
from server.api.planning.plan import Plan
from server.api.planning.work import DECODING_WORK, FILE_WORK
from server.settings import Settings
from tests import fake_worker
from tests.conftest import NATIVE_SIZE, micro_preset_config, serving
from tests.test_image_operations import as_form, as_json, noise, opened, pixels, png, refused
from tests.test_sse import Configure, told

PROMPT = {"prompt": "a ball", "seed": 5}


def upscale(client: httpx.Client, width: int = 64, height: int = 32, **fields: Any) -> Any:
    return as_json(client, "upscale", image=png(noise(width, height)), **fields)


@pytest.mark.parametrize(
    ("size", "scale", "expected"),
    [
        ((64, 32), 2, (128, 64)),
        ((50, 37), 2, (100, 74)),
        ((17, 90), 4, (68, 360)),
        ((33, 21), 1, (33, 21)),
        ((31, 40), 1.5, (46, 60)),
        ((1, 1), 4, (4, 4)),
        ((256, 256), 4, (1024, 1024)),
    ],
)
def test_the_answer_is_exactly_so_many_times_as_large(
    client: httpx.Client, size: tuple[int, int], scale: float, expected: tuple[int, int]
) -> None:
    result = pixels(upscale(client, *size, scale=scale, seed=5))
    assert result.shape[1::-1] == expected
    assert (result == list(fake_worker.colour(5))).all()


def test_a_form_is_the_same_request_and_defaults_are_told(client: httpx.Client) -> None:
    fields = {"image": png(noise()), "seed": 5}
    answers = [as_json(client, "upscale", **fields), as_form(client, "upscale", **fields)]
    assert answers[0].content == answers[1].content
    recorded = json.loads(opened(answers[0].content).info["parameters"])
    assert recorded["operation"] == "upscale"
    assert (recorded["scale"], recorded["strength"], recorded["prompt"]) == (2, 0.3, "")
    assert (recorded["width"], recorded["height"]) == (128, 64)
    assert recorded["guidance_scale"] == [1, 1]
    unsent = ("operation", "truncated")
    repeated = {name: value for name, value in recorded.items() if name not in unsent}
    again = as_json(client, "upscale", **repeated | {"image": png(noise())})
    assert again.content == answers[0].content


def test_results_beyond_the_limit_are_422(client: httpx.Client, fake_settings: Configure) -> None:
    refused(upscale(client, 257, 16, scale=4), 422, "invalid_value", "scale", "1024")
    refused(upscale(client, 16, 700), 422, "invalid_value", "scale", "32x1400")
    settings = fake_settings(upscale_max_side=128)
    with (
        serving(create_app(settings, worker=fake_worker.main)) as address,
        httpx.Client(base_url=address, timeout=20) as small,
    ):
        refused(upscale(small, 64, 65), 422, "invalid_value", "scale", "128")
        hires = {"hires": {"scale": 3}}
        refused(as_json(small, "generate", **PROMPT, **hires), 422, "invalid_value", "hires.scale")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"scale": 0.9}, "scale"),
        ({"scale": 4.1}, "scale"),
        ({"scale": "2"}, "scale"),
        ({"strength": 0.7}, "strength"),
        ({"strength": -0.1}, "strength"),
        ({"width": 64}, "width"),
        ({"height": 63}, "height"),
    ],
)
def test_fields_out_of_bounds_are_422(
    client: httpx.Client, fields: dict[str, Any], param: str
) -> None:
    image = png(noise(64, 32))
    refused(as_json(client, "upscale", image=image, **fields), 422, "invalid_value", param)


def test_tiles_count_as_work(fake_settings: Configure) -> None:
    width, height = NATIVE_SIZE
    # Twice the native size: 3 × 3 tiles, of 4 of 12 steps, encoded and decoded.
    tiles = 9 * width * height * (4 + 2 * DECODING_WORK)
    work = tiles + 4 * width * height * FILE_WORK["png"]
    for allowed, status in ((work, 200), (work - 1, 422)):
        settings = fake_settings(max_request_work=allowed)
        with (
            serving(create_app(settings, worker=fake_worker.main)) as address,
            httpx.Client(base_url=address, timeout=20) as client,
        ):
            answer = upscale(client, *NATIVE_SIZE, prompt="a ball", num_inference_steps=12)
            assert answer.status_code == status, answer.text
    refused(answer, 422, "too_much_work", None, str(work))


PIXELS = NATIVE_SIZE[0] * NATIVE_SIZE[1]
# Of an image of twice the native size: 3 × 3 tiles, and the file.
TILES, FILE = 9 * PIXELS, 4 * PIXELS
PREVIEWS = {"stream": True, "partial_images": 8}
BOX = {"prompt": "a box", "box": [0, 0, 1, 1]}


def planned(
    config: BundleConfig,
    operation: Operation,
    max_request_work: int | None = None,
    **fields: Any,
) -> Plan:
    """Plan a request as the server does."""
    settings = (
        Settings() if max_request_work is None else Settings(max_request_work=max_request_work)
    )
    schema, planner = OPERATIONS[operation]
    request = schema.model_validate(PROMPT | fields)
    drafted = draft(request, operation, {config.name: config}, settings)
    return planner(request, drafted, Uploads(image_limits(settings)))


@pytest.mark.parametrize(
    ("operation", "fields", "work"),
    [
        # 4 of 12 steps are taken; a tile is encoded and decoded, which are 3 steps each.
        ("upscale", {}, TILES * (4 + 6) + FILE),
        ("upscale", {"n": 3}, 3 * (TILES * (4 + 6) + FILE)),
        ("upscale", {"strength": 0}, TILES * 6 + FILE),
        ("upscale", {"guidance_scale": 2}, TILES * (2 * 4 + 6) + FILE),
        ("upscale", {"partial_images": 8}, TILES * (4 + 6) + FILE),
        # No preview comes after the last step.
        ("upscale", PREVIEWS, TILES * (4 + 6 + 3 * 3) + (1 + 3) * FILE),
        ("upscale", PREVIEWS | {"partial_images": 2}, TILES * (4 + 6 + 2 * 3) + (1 + 2) * FILE),
        ("upscale", PREVIEWS | {"num_inference_steps": 7}, TILES * (2 + 6 + 3) + (1 + 1) * FILE),
        ("upscale", PREVIEWS | {"num_inference_steps": 4}, TILES * (1 + 6) + FILE),
        ("upscale", PREVIEWS | {"strength": 0}, TILES * 6 + FILE),
        # The first image has 12 guided steps.
        ("generate", {}, PIXELS * (2 * 12 + 3) + TILES * (4 + 6) + FILE),
        ("generate", {"n": 2}, 2 * (PIXELS * (2 * 12 + 3) + TILES * (4 + 6) + FILE)),
        (
            "generate",
            {"regions": [BOX, BOX]},
            PIXELS * (4 * 12 + 3) + TILES * (3 * 4 + 6) + FILE,
        ),
        (
            "generate",
            PREVIEWS,
            PIXELS * (2 * 12 + 3) + TILES * (4 + 6 + 8 * 3) + (1 + 8) * FILE,
        ),
        (
            "generate",
            PREVIEWS | {"num_inference_steps": 1},
            PIXELS * (2 + 3) + TILES * 6 + FILE,
        ),
    ],
)
def test_tiles_previews_and_files_are_the_work_of_a_larger_image(
    bundle: Path, operation: Operation, fields: dict[str, Any], work: int
) -> None:
    own = {"image": png(noise(*NATIVE_SIZE))} if operation == "upscale" else {"hires": {}}
    config, sent = BundleConfig.read(bundle), own | fields
    planned(config, operation, max_request_work=work, **sent)
    with pytest.raises(ApiError, match=f"costs {work},"):
        planned(config, operation, max_request_work=work - 1, **sent)


def test_tiles_of_a_smaller_denoiser_are_less_work() -> None:
    config = micro_preset_config()
    pixels = math.prod(config.native_size)
    fields = {"preset": "fast", "hires": {"strength": 0.5, "steps": 4}}
    enlarge = planned(config, "generate", **fields).job.enlarge
    assert enlarge
    tiles = len(enlarge.tiling) * math.prod(enlarge.tiling.tile)
    # Three steps of the image and two of each tile.
    steps = math.ceil((3 * pixels + 2 * tiles) * config.relative_work("denoiser-fast"))
    work = steps + 3 * (pixels + 2 * tiles) + 4 * pixels
    planned(config, "generate", max_request_work=work, **fields)
    with pytest.raises(ApiError, match=f"costs {work},"):
        planned(config, "generate", max_request_work=work - 1, **fields)


def test_what_would_become_too_large_is_refused_before_it_is_decoded(bundle: Path) -> None:
    config = BundleConfig.read(bundle)
    for width, param in ((700, "scale"), (64, "image")):
        cut_off = png(noise(width, 32))[:-40]
        with pytest.raises(ApiError) as refusal:
            planned(config, "upscale", image=cut_off)
        assert refusal.value.param == param


def test_a_large_file_takes_the_room_of_several(
    fake_settings: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken, run = list[int](), ImageEncoder.run

    def counting(encoder: ImageEncoder, work: Any, images: int = 1, **more: Any) -> Any:
        taken.append(images)
        return run(encoder, work, images, **more)

    monkeypatch.setattr(ImageEncoder, "run", counting)
    settings = fake_settings(max_side=64)
    with (
        serving(create_app(settings, worker=fake_worker.main)) as address,
        httpx.Client(base_url=address, timeout=20) as client,
    ):
        assert upscale(client, 64, 32, scale=1).status_code == 200
        assert upscale(client, 64, 32, scale=4).status_code == 200
    assert taken == [1, 4 * 64 * 4 * 32 // 64**2]


def test_hires_enlarges_what_was_drawn_and_can_be_repeated(client: httpx.Client) -> None:
    fields = {**PROMPT, "hires": {"scale": 2, "strength": 0.5, "steps": 8}}
    answer = as_json(client, "generate", **fields)
    assert pixels(answer).shape[1::-1] == (2 * NATIVE_SIZE[0], 2 * NATIVE_SIZE[1])
    recorded = json.loads(opened(answer.content).info["parameters"])
    assert recorded["hires"] == fields["hires"]
    assert (recorded["width"], recorded["height"]) == NATIVE_SIZE
    unsent = ("operation", "truncated")
    again = {name: value for name, value in recorded.items() if name not in unsent}
    assert as_json(client, "generate", **again).content == answer.content
    form = as_form(client, "generate", **fields)
    assert form.content == answer.content
    listed = as_json(client, "generate", **fields, n=2, response_format="json").json()
    assert [image["width"] for image in listed["images"]] == [2 * NATIVE_SIZE[0]] * 2


def test_hires_takes_the_defaults_regions_and_sizes(client: httpx.Client) -> None:
    regions = [{"prompt": "a box", "box": [0, 0, 0.5, 1]}]
    fields = {**PROMPT, "width": 48, "height": 64, "hires": {}, "regions": regions}
    answer = as_json(client, "generate", **fields)
    assert pixels(answer).shape[1::-1] == (96, 128)
    hires = json.loads(opened(answer.content).info["parameters"])["hires"]
    assert hires == {"scale": 2, "strength": 0.3, "steps": 12}
    refused(
        as_json(client, "generate", **PROMPT, hires={"scale": 2, "size": 1}),
        422,
        "unknown_field",
        "hires",
        "hires.size",
    )


def test_a_stream_counts_both_passes_and_shows_previews_in_the_answer_s_size(
    client: httpx.Client,
) -> None:
    story = told(client, "generate", prompt="show", partial_images=2, hires={"strength": 0.5})
    assert story[1][1]["steps"] == 12 + 6
    previews = [data for name, data in story if name == "preview"]
    assert len(previews) == 2
    for preview in previews:
        assert preview["of"] == 18
        assert (preview["width"], preview["height"]) == (128, 64)


def test_images_are_counted_and_the_operation_is_listed(client: httpx.Client) -> None:
    assert upscale(client).status_code == 200
    assert 'images_total{endpoint="/upscale"}' in client.get("/metrics").text
    (model,) = client.get("/v1/models").json()["data"]
    assert "upscale" in model["capabilities"]["operations"]
    assert math.isclose(np.mean(pixels(upscale(client, seed=5))), np.mean([*fake_worker.colour(5)]))
