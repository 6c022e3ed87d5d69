"""The endpoints that begin with pictures, over the fake worker: fields, sizes, what is kept,
what is refused.
"""

from __future__ import annotations

import base64
import json
import re
from typing import Any

import httpx
import numpy as np
import pytest

from model.config import BundleConfig
from server.api import create_app
from server.api.images.admission import ImageDecoder
from server.api.planning.work import DECODING_WORK, FILE_WORK, PREVIEW_WORK
from server.settings import Settings
from tests import fake_worker
from tests.conftest import NATIVE_SIZE, serving, wait_until
from tests.support.images import noise, opened, png, white
from tests.support.native_api import as_form, as_json, fields_of, pixels, refused
from tests.support.servers import metric

OPERATIONS = ("inpaint", "outpaint", "variations", "edit", "upscale", "interpolate")


# ── every operation ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("operation", OPERATIONS)
def test_forms_and_json_give_the_same_bytes(client: httpx.Client, operation: str) -> None:
    fields = fields_of(operation)
    answers = [as_json(client, operation, **fields), as_form(client, operation, **fields)]
    assert [answer.status_code for answer in answers] == [200, 200]
    assert answers[0].content == answers[1].content
    assert answers[0].headers["x-seed"] == "5"


@pytest.mark.parametrize("operation", OPERATIONS[:5])
@pytest.mark.parametrize("format", ["png", "jpeg", "webp"])
def test_every_operation_answers_in_every_format(
    client: httpx.Client, operation: str, format: str
) -> None:
    answer = as_json(client, operation, **fields_of(operation), response_format=format)
    assert opened(answer.content).format == format.upper()


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_operation_takes_the_common_fields_and_tells_how_they_took_effect(
    client: httpx.Client, operation: str
) -> None:
    common = {
        "negative_prompt": "blur",
        "num_inference_steps": 6,
        "guidance_scale": [2, 5],
        "guidance_steps": 4,
        "temperature": [0.9, 0.2],
        "sampler": "typical",
        "typical_mass": 0.5,
        "renoise_steps": 3,
        "deterministic": True,
    }
    answer = as_json(
        client, operation, **fields_of(operation) | {"response_format": "json"}, **common
    )
    parameters = answer.json()["parameters"]
    assert parameters["operation"] == operation
    assert {name: parameters[name] for name in common} == common
    assert as_json(client, operation, **fields_of(operation), sampler="euler").status_code == 422


@pytest.mark.parametrize("operation", OPERATIONS[:5])
def test_a_png_names_its_files_by_their_hash_and_holds_no_picture(
    client: httpx.Client, operation: str
) -> None:
    recorded = json.loads(
        opened(as_json(client, operation, **fields_of(operation)).content).info["parameters"]
    )
    image = recorded["image"][0] if operation == "variations" else recorded["image"]
    assert image.startswith("sha256:")
    assert len(json.dumps(recorded)) < 2000


@pytest.mark.parametrize("operation", OPERATIONS[:5])
def test_a_picture_is_required_and_may_be_no_url(client: httpx.Client, operation: str) -> None:
    fields = fields_of(operation)
    refused(
        as_json(client, operation, **fields | {"image": "http://example.org/cat.png"}),
        422,
        "url_refused",
        "image",
    )
    refused(
        as_json(client, operation, **fields | {"image": b"<svg/>"}),
        422,
        "unsupported_image_format",
        "image",
    )
    del fields["image"]
    refused(as_json(client, operation, **fields), 422, "missing_field", "image", "required")


@pytest.mark.parametrize("operation", OPERATIONS)
def test_unknown_fields_are_refused(client: httpx.Client, operation: str) -> None:
    refused(
        as_json(client, operation, **fields_of(operation), colour="red"),
        422,
        "unknown_field",
        "colour",
    )


def test_openapi_describes_both_kinds_of_body_without_dangling_references(
    client: httpx.Client,
) -> None:
    document = client.get("/openapi.json").json()
    for operation in ("generate", *OPERATIONS):
        content = document["paths"][f"/{operation}"]["post"]["requestBody"]["content"]
        assert set(content) == {"application/json", "multipart/form-data"}
    named = set(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(document)))
    assert named == document["components"]["schemas"].keys()


# ── inpainting ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("size", [(64, 32), (50, 37), (17, 90)])
def test_outside_the_mask_the_picture_comes_back_bit_for_bit_in_its_own_size(
    client: httpx.Client, size: tuple[int, int]
) -> None:
    image, mask = noise(*size), white(*size, box=(3, 4, 13, 30))
    result = pixels(
        as_json(client, "inpaint", prompt="a ball", image=png(image), mask=png(mask), seed=5)
    )
    assert np.array_equal(result[mask == 0], image[mask == 0])
    assert (result[mask > 0] != image[mask > 0]).mean() > 0.9


def test_without_keep_unmasked_everything_is_as_it_was_drawn(client: httpx.Client) -> None:
    result = pixels(as_json(client, "inpaint", **fields_of("inpaint"), keep_unmasked=False))
    assert (result == list(fake_worker.colour(5))).all()


def test_an_image_that_is_transparent_somewhere_needs_no_mask(client: httpx.Client) -> None:
    image = noise(channels=4)
    image[..., 3] = 255
    image[8:24, 16:40, 3] = 0
    result = pixels(as_json(client, "inpaint", prompt="a ball", image=png(image)))
    opaque = image[..., 3] == 255
    assert np.array_equal(result[opaque], image[opaque][:, :3])
    refused(
        as_json(client, "inpaint", prompt="a ball", image=png(noise())),
        422,
        "missing_field",
        "mask",
        "transparent",
    )


@pytest.mark.parametrize(
    ("changes", "code", "param"),
    [
        ({"mask": png(white(32, 32))}, "mask_size_mismatch", "mask"),
        ({"mask": png(white() * 0)}, "empty_mask", "mask"),
        ({"mask_mode": "alpha"}, "mask_without_alpha", "mask"),
        ({"width": 513}, "invalid_value", "width"),
        ({"fit": "squeeze"}, "invalid_value", "fit"),
        ({"return_size": "large"}, "invalid_value", "return_size"),
        ({"mask_mode": "red"}, "invalid_value", "mask_mode"),
    ],
)
def test_masks_and_sizes_that_do_not_fit_are_422(
    client: httpx.Client, changes: dict[str, Any], code: str, param: str
) -> None:
    refused(as_json(client, "inpaint", **fields_of("inpaint") | changes), 422, code, param)


def test_a_mask_of_everything_is_drawn_anew(client: httpx.Client) -> None:
    result = pixels(
        as_json(
            client, "inpaint", **fields_of("inpaint") | {"mask": png(white(box=(0, 0, 64, 32)))}
        )
    )
    assert (result == list(fake_worker.colour(5))).all()


# ── outpainting ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "margins",
    [
        {"left": 10},
        {"right": 7, "up": 21},
        {"left": 1, "right": 2, "up": 3, "down": 4},
        {"left": 0, "right": 0, "up": 0, "down": 1},
        {"down": 64},
    ],
)
def test_outpainting_grows_by_the_margins_and_keeps_the_original(
    client: httpx.Client, margins: dict[str, int]
) -> None:
    image = noise()
    fields = {name: value for name, value in fields_of("outpaint").items() if name != "right"}
    result = pixels(as_json(client, "outpaint", **fields, **margins))
    left, up = margins.get("left", 0), margins.get("up", 0)
    assert result.shape == (
        32 + up + margins.get("down", 0),
        64 + left + margins.get("right", 0),
        3,
    )
    assert np.array_equal(result[up : up + 32, left : left + 64], image)


@pytest.mark.parametrize(
    "changes", [{"right": 0}, {"right": -1}, {"right": 5000}, {"height": 500}, {"right": 1.5}]
)
def test_margins_that_do_not_fit_are_422(client: httpx.Client, changes: dict[str, Any]) -> None:
    assert as_json(client, "outpaint", **fields_of("outpaint") | changes).status_code == 422


# ── variations, editing, regions ──────────────────────────────────────────────────────────────────


def test_variations_have_the_native_size_or_the_one_asked_for(client: httpx.Client) -> None:
    fields = fields_of("variations") | {
        "image": [png(noise(3, 400)), png(noise())],
        "weights": [0.2, 0.8],
    }
    assert pixels(as_json(client, "variations", **fields)).shape[1::-1] == NATIVE_SIZE
    assert pixels(as_json(client, "variations", **fields, width=32, height=48)).shape == (48, 32, 3)


@pytest.mark.parametrize("weights", [[1.0, 1.0], [], [0.0], [1.5], ["1"]])
def test_weights_that_do_not_fit_their_images_are_422(
    client: httpx.Client, weights: list[Any]
) -> None:
    refused(
        as_json(client, "variations", **fields_of("variations"), weights=weights),
        422,
        "invalid_value",
        "weights",
    )


def test_twenty_pictures_are_too_many(client: httpx.Client) -> None:
    many = [png(noise(8, 8))] * 20
    refused(as_json(client, "variations", image=many), 422, "invalid_value", "image")
    parts = [("image", ("a.png", content)) for content in many]
    refused(client.post("/variations", files=parts), 413, "form_too_large", None)


def test_an_edit_has_the_pictures_size_or_the_one_it_is_scaled_to(client: httpx.Client) -> None:
    image = png(noise(50, 37))
    assert pixels(as_json(client, "edit", prompt="a ball", image=image)).shape == (37, 50, 3)
    assert pixels(
        as_json(client, "edit", prompt="a ball", image=image, width=40, height=70)
    ).shape == (70, 40, 3)


def test_only_what_is_brought_to_an_original_s_size_takes_a_thread_for_large_images(
    client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken, run_large = list[str](), ImageDecoder.run_large

    def counting(decoder: ImageDecoder, work: Any) -> Any:
        taken.append("a thread")
        return run_large(decoder, work)

    monkeypatch.setattr(ImageDecoder, "run_large", counting)
    fields = {"prompt": "a ball", "image": png(noise(600, 40))}
    assert pixels(as_json(client, "edit", **fields)).shape[1] == 512
    assert taken == []
    assert pixels(as_json(client, "edit", **fields, return_size="original")).shape[1] == 600
    assert taken == ["a thread"]


@pytest.mark.parametrize("strength", [-0.1, 1.1, "high"])
def test_a_strength_beyond_its_bounds_is_422(client: httpx.Client, strength: object) -> None:
    refused(
        as_json(client, "edit", **fields_of("edit"), strength=strength),
        422,
        "invalid_value",
        "strength",
    )


@pytest.mark.parametrize(
    "region",
    [
        {"prompt": "a box"},
        {"box": [0, 0, 1, 1]},
        {"prompt": "a box", "box": [0, 0, 1, 1], "mask": png(white())},
        {"prompt": "a box", "box": [0.5, 0, 0.5, 1]},
        {"prompt": "a box", "box": [0, 0, 1, 2]},
        {"prompt": "a box", "box": [0, 0, 1]},
        {"prompt": "a box", "box": [0, 0, 1, 1], "weight": 2},
        {"prompt": "a box", "box": [0, 0, 1, 1], "hardness": 1},
    ],
)
def test_regions_that_do_not_fit_are_422(client: httpx.Client, region: dict[str, Any]) -> None:
    answer = as_json(client, "generate", prompt="a ball", regions=[region])
    assert (answer.status_code, answer.json()["error"]["param"]) == (422, "regions")


def test_a_regions_mask_is_as_large_as_the_picture(client: httpx.Client) -> None:
    fields = {"prompt": "a ball", "regions": [{"prompt": "a box", "mask": png(white(32, 32))}]}
    refused(as_json(client, "generate", **fields), 422, "mask_size_mismatch", "regions.0.mask")
    parts = {
        "prompt": (None, "a ball"),
        "regions": (None, '[{"prompt": "a box"}]'),
        "regions.0.mask": ("m.png", png(white())),
    }
    assert client.post("/generate", files=parts).status_code == 200


@pytest.mark.process
def test_work_counts_regions_frames_and_the_steps_an_edit_takes(embedded: BundleConfig) -> None:
    width, height = embedded.native_size
    settings = Settings(weights="tiny", max_request_work=64 * 64 * 4)
    app = create_app(settings, worker=fake_worker.main)
    box = {"prompt": "a box", "box": [0, 0, 1, 1]}
    image = png(noise(width, height))
    with serving(app) as address, httpx.Client(base_url=address) as client:
        wait_until(lambda: client.get("/readyz").status_code == 200)
        pixels, steps = width * height, embedded.sampling().steps
        more_steps = embedded.recipe.num_inference_steps
        result = DECODING_WORK + FILE_WORK["png"]
        refused(
            as_json(client, "generate", prompt="a ball", regions=[box, box]),
            422,
            "too_much_work",
            None,
            f"costs {pixels * (4 * more_steps + result)},",
        )
        refused(
            as_json(client, "edit", prompt="a ball", image=image, strength=0.5),
            422,
            "too_much_work",
            None,
            f"costs {pixels * (more_steps + result)},",
        )
        keyframes = [{"prompt": "a ball"}, {"prompt": "a box"}]
        for format in ("png", "gif"):
            result = DECODING_WORK + FILE_WORK[format]
            frames = {"keyframes": keyframes, "frames": 5, "response_format": format}
            refused(
                as_json(client, "interpolate", **frames),
                422,
                "too_much_work",
                None,
                f"costs {5 * pixels * (2 * steps + result)},",
            )
        animation = client.post(
            "/interpolate",
            json={"keyframes": keyframes, "frames": 5},
            headers={"Accept": "image/gif"},
        )
        refused(animation, 422, "too_much_work", None, f"{5 * pixels * (2 * steps + result)},")
        previews = {"prompt": "a ball", "stream": True, "partial_images": 8}
        each = DECODING_WORK + PREVIEW_WORK
        unread = previews | {"stream": False}
        for body, sent, made in (
            (previews, 12, 8),
            (previews, 3, 2),
            (previews, 1, 0),
            (unread, 12, 0),
        ):
            result = DECODING_WORK + FILE_WORK["png"] + made * each
            refused(
                as_json(client, "generate", **body, num_inference_steps=sent),
                422,
                "too_much_work",
                None,
                f"costs {pixels * (2 * sent + result)},",
            )


def test_64_frames_of_512_pixels_as_a_gif_are_too_much_at_any_number_of_steps() -> None:
    """Their file alone took 22 s."""
    settings = Settings()
    frames, pixels = 64, settings.max_side**2
    assert frames * pixels * (1 + DECODING_WORK + FILE_WORK["gif"]) > settings.max_request_work
    # What the setting's comment promises.
    guided = 12 * 2
    for images, side, format in ((64, 256, "gif"), (16, 512, "png")):
        work = images * side**2 * (guided + DECODING_WORK + FILE_WORK[format])
        assert work <= settings.max_request_work


# ── interpolating ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("format", ["gif", "webp"])
def test_frames_become_an_animation(client: httpx.Client, format: str) -> None:
    # Of one colour each, which an encoder would join if they were of one seed.
    answer = as_json(
        client, "interpolate", **fields_of("interpolate") | {"response_format": format}
    )
    assert answer.headers["content-type"] == f"image/{format}"
    assert opened(answer.content).size == NATIVE_SIZE


def test_frames_come_as_a_list_unless_an_animation_is_asked_for(client: httpx.Client) -> None:
    fields = fields_of("interpolate")
    del fields["response_format"]
    images = as_json(client, "interpolate", **fields).json()["images"]
    assert [(image["seed"], image["format"]) for image in images] == [(5, "png")] * 3
    recorded = [
        json.loads(opened(base64.b64decode(image["b64_json"])).info["parameters"])
        for image in images
    ]
    assert [each["frame"] for each in recorded] == [0, 1, 2]
    accepted = client.post("/interpolate", json=fields, headers={"Accept": "image/gif"})
    assert accepted.headers["content-type"] == "image/gif"


@pytest.mark.parametrize(
    "changes",
    [
        {"keyframes": [{"prompt": "a ball"}]},
        {"keyframes": [{"prompt": "a ball"}] * 9},
        {"keyframes": [{"prompt": "a ball"}, {}]},
        {"keyframes": [{"prompt": "a ball"}, {"prompt": "a", "image": png(noise())}]},
        {"frames": 1},
        {"frames": 65},
        {"mode": "cubic"},
        {"n": 2},
        {"stream": True},
    ],
)
def test_keyframes_and_frames_that_do_not_fit_are_422(
    client: httpx.Client, changes: dict[str, Any]
) -> None:
    assert as_json(client, "interpolate", **fields_of("interpolate") | changes).status_code == 422


def events(answer: httpx.Response) -> list[tuple[str, dict[str, Any]]]:
    assert answer.headers["content-type"].startswith("text/event-stream")
    blocks = [block.split("\n", 1) for block in answer.text.split("\n\n") if block]
    return [
        (name.removeprefix("event: "), json.loads(data.removeprefix("data: ")))
        for name, data in blocks
    ]


def test_streamed_frames_come_each_once_between_queued_and_completed(client: httpx.Client) -> None:
    fields = fields_of("interpolate") | {"response_format": "png", "stream": True}
    counted = metric(client, "paella_images_total", endpoint="/interpolate")
    told = events(client.post("/interpolate", json=fields, headers={"X-Request-Id": "mine"}))
    assert metric(client, "paella_images_total", endpoint="/interpolate") == counted + 3
    assert [name for name, _ in told] == [
        "queued",
        "started",
        "image",
        "image",
        "image",
        "completed",
    ]
    assert sorted(data["index"] for _, data in told[2:-1]) == [0, 1, 2]
    shared = told[-1][1]["parameters"]
    assert (shared["frames"], shared["n"], "frame" in shared) == (3, 1, False)
    assert "images" not in told[-1][1]
    del fields["stream"], fields["response_format"]
    listed = as_json(client, "interpolate", **fields).json()["images"]
    assert {data["index"]: data["b64_json"] for _, data in told[2:-1]} == {
        i: image["b64_json"] for i, image in enumerate(listed)
    }


def test_a_stream_that_fails_says_so_in_its_last_event(client: httpx.Client) -> None:
    fields = {"keyframes": [{"prompt": "fail"}, {"prompt": "a box"}], "stream": True}
    told = events(client.post("/interpolate", json=fields))
    assert [name for name, _ in told] == ["queued", "started", "error"]
    assert told[-1][1]["error"]["code"] == "internal"


def test_a_stream_that_is_refused_has_the_refusals_status(client: httpx.Client) -> None:
    fields = {
        "keyframes": [{"prompt": "a ball"}, {"prompt": "a box"}],
        "stream": True,
        "frames": 64,
        "width": 512,
        "height": 512,
    }
    refused(client.post("/interpolate", json=fields), 422, "too_much_work", None)
