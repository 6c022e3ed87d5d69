"""OpenAI's own client against a running server: every method, sync and async, streamed and raw,
refused, overloaded and cancelled.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import httpx
import numpy as np
import openai
import PIL.Image
import pytest
from openai import AsyncOpenAI, OpenAI
from openai.types import (
    ImageEditCompletedEvent,
    ImageEditPartialImageEvent,
    ImageGenCompletedEvent,
    ImageGenPartialImageEvent,
    ImagesResponse,
)
from pydantic import ValidationError

from server.api import create_app
from server.api.openai_schemas import GenerationsRequest
from server.settings import Settings
from tests import fake_worker
from tests.conftest import NAME, micro_config, serving, wait_until
from tests.support.images import Array, noise, png
from tests.support.servers import metric

pytestmark = pytest.mark.process

Configure = Callable[..., Settings]
IMAGE = png(noise())


def connect(server: str, **options: Any) -> OpenAI:
    # Strict: an answer that is not exactly what the client's types say is an error.
    return OpenAI(
        base_url=f"{server}/v1",
        **{"api_key": "any", "max_retries": 0, "_strict_response_validation": True, **options},
    )


@pytest.fixture(scope="module")
def api(fake_server: str) -> Iterator[OpenAI]:
    with connect(fake_server) as api:
        yield api


def file(b64_json: str | None) -> PIL.Image.Image:
    assert b64_json is not None
    return PIL.Image.open(io.BytesIO(base64.b64decode(b64_json)))


def parameters(answer: ImagesResponse) -> dict[str, Any]:
    """What the first picture, a PNG, says it was made with."""
    assert answer.data
    return dict(json.loads(file(answer.data[0].b64_json).info["parameters"]))


def pixels(answer: ImagesResponse) -> Array:
    assert answer.data
    return np.asarray(file(answer.data[0].b64_json).convert("RGB"))


def half_transparent() -> Array:
    mask = np.full((32, 64, 4), 255, dtype=np.uint8)
    mask[:, 32:, 3] = 0
    return mask


# ── pictures ──────────────────────────────────────────────────────────────────────────────────────


def test_a_prompt_alone_gives_one_picture_of_the_native_size(api: OpenAI) -> None:
    answer = api.images.generate(prompt="a ball")
    assert answer.data is not None
    assert (
        len(answer.data),
        answer.size,
        answer.quality,
        answer.background,
        answer.output_format,
    ) == (
        1,
        "64x32",
        "medium",
        "opaque",
        "png",
    )
    assert file(answer.data[0].b64_json).size == (64, 32)
    assert answer.usage is not None
    tokens = 64 * 32 // 16
    assert (answer.usage.input_tokens, answer.usage.output_tokens, answer.usage.total_tokens) == (
        6,
        tokens,
        6 + tokens,
    )


def test_the_native_fields_go_with_it_as_extra_body_and_give_the_native_bytes(
    api: OpenAI, client: httpx.Client
) -> None:
    extra = {
        "seed": 5,
        "negative_prompt": "blur",
        "num_inference_steps": 7,
        "guidance_scale": [2, 5],
        "temperature": 0.5,
    }
    answer = api.images.generate(prompt="a ball", n=2, size="48x32", extra_body=extra)
    native = client.post(
        "/generate", json={"prompt": "a ball", "n": 2, "width": 48, "height": 32, **extra}
    ).json()
    assert [each.b64_json for each in answer.data or []] == [
        image["b64_json"] for image in native["images"]
    ]
    assert [each.seed for each in answer.data or []] == [5, 6]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("quality", "steps"), [("auto", 12), ("low", 6), ("medium", 12), ("high", 24), ("hd", 24)]
)
def test_quality_is_a_number_of_steps_unless_one_is_given(
    api: OpenAI, quality: Any, steps: int
) -> None:
    assert (
        parameters(api.images.generate(prompt="a ball", quality=quality))["num_inference_steps"]
        == steps
    )
    given = api.images.generate(
        prompt="a ball", quality=quality, extra_body={"num_inference_steps": 3}
    )
    assert parameters(given)["num_inference_steps"] == 3


@pytest.mark.parametrize(
    ("quality", "usual", "steps"),
    [
        ("high", 31, 62),
        ("high", 32, 64),
        ("max", 33, 64),
        ("hd", 64, 64),
        ("auto", 64, 64),
        ("low", 4, 2),
        ("low", 2, 1),
        ("low", 1, 1),
    ],
)
def test_quality_means_from_1_to_64_steps_whatever_the_recipe_has(
    quality: Any, usual: int, steps: int
) -> None:
    micro = micro_config()
    recipe = replace(micro.recipe, num_inference_steps=usual, renoise_steps=0, guidance_steps=0)
    request = GenerationsRequest(prompt="a ball", quality=quality)
    _, fields = request.native(None, replace(micro, recipe=recipe))
    assert fields["num_inference_steps"] == steps


@pytest.mark.parametrize(("sent", "quality"), [(None, 90), (0, 1), (1, 1), (2, 2), (100, 100)])
def test_compression_is_a_file_s_quality_from_1_to_100(sent: int | None, quality: int) -> None:
    assert GenerationsRequest(prompt="a ball", output_compression=sent).file_quality == quality
    for beyond in (-1, 101):
        with pytest.raises(ValidationError, match="output_compression"):
            GenerationsRequest(prompt="a ball", output_compression=beyond)


@pytest.mark.parametrize("format", ["jpeg", "webp"])
def test_output_format_and_compression_decide_the_file(api: OpenAI, format: Any) -> None:
    answer = api.images.generate(
        prompt="a ball", output_format=format, output_compression=10, background="opaque"
    )
    assert answer.data is not None
    assert (file(answer.data[0].b64_json).format, answer.output_format) == (format.upper(), format)


def test_what_openai_knows_and_has_no_meaning_here_is_taken(api: OpenAI) -> None:
    answer = api.images.generate(
        prompt="a ball",
        model=NAME,
        moderation="low",
        style="vivid",
        user="u",
        response_format="b64_json",
        size="auto",
        n=1,
        stream=False,
    )
    assert parameters(answer)["model"] == NAME
    assert api.images.generate(
        prompt="a ball", n=None, size=None, quality=None, background=None
    ).data


def test_an_edit_with_a_mask_keeps_what_is_opaque_in_it(api: OpenAI) -> None:
    answer = api.images.edit(
        image=IMAGE,
        mask=png(half_transparent()),
        prompt="a ball",
        extra_body={"seed": 5, "feather": 0},
    )
    assert np.array_equal(pixels(answer)[:, :32], noise()[:, :32])
    assert (pixels(answer)[:, 32:] == list(fake_worker.colour(5))).all()
    assert parameters(answer)["operation"] == "inpaint"


def test_an_edit_takes_objects_and_lists_as_extra_body(api: OpenAI) -> None:
    """The client writes them into a form, as attention_weights[text] and guidance_scale[]."""
    weights, guidance = {"text": 1.1, "image": 0.4}, [2, 4.5]
    fields = {"attention_weights": weights, "guidance_scale": guidance, "deterministic": True}
    answer = api.images.edit(image=IMAGE, prompt="a ball", extra_body=fields)
    recorded = parameters(answer)
    assert (recorded["attention_weights"], recorded["guidance_scale"]) == (weights, guidance)


def test_an_edit_without_a_mask_is_of_the_whole_picture(api: OpenAI) -> None:
    answer = api.images.edit(image=("cat.png", io.BytesIO(IMAGE)), prompt="a ball")
    assert (parameters(answer)["operation"], parameters(answer)["strength"]) == ("edit", 0.6)
    assert (
        parameters(api.images.edit(image=IMAGE, prompt="a ball", input_fidelity="high"))["strength"]
        == 0.4
    )
    assert pixels(api.images.edit(image=IMAGE, prompt="a ball", size="48x16")).shape == (16, 48, 3)
    assert answer.usage is not None
    assert answer.usage.input_tokens_details.image_tokens == 64 * 32 // 16


def test_of_several_pictures_the_first_is_edited_and_the_others_say_what_is_to_be_seen(
    api: OpenAI,
) -> None:
    others = [png(noise(20, 20)), png(noise(30, 10))]
    whole = parameters(api.images.edit(image=[IMAGE, *others], prompt="a ball"))
    part = parameters(
        api.images.edit(image=[IMAGE, *others], mask=png(half_transparent()), prompt="a ball")
    )
    assert len(whole["references"]) == len(part["references"]) == 2
    assert whole["image"] == part["image"] not in whole["references"]


@pytest.mark.filterwarnings(
    "ignore:deprecated:DeprecationWarning"
)  # the client's word about OpenAI's own endpoint
def test_variations_take_a_picture_alone(api: OpenAI) -> None:
    answer = api.images.create_variation(image=IMAGE, n=2, size="48x32")  # type: ignore[arg-type]
    assert (parameters(answer)["operation"], len(answer.data or []), pixels(answer).shape) == (
        "variations",
        2,
        (32, 48, 3),
    )


def test_models_are_listed_and_shown(api: OpenAI) -> None:
    assert [model.id for model in api.models.list()] == [NAME]
    assert api.models.retrieve(NAME).owned_by == "paellera"


def test_edits_may_come_as_json_too(client: httpx.Client) -> None:
    body = {"prompt": "a ball", "image": base64.b64encode(IMAGE).decode(), "n": None}
    assert client.post("/v1/images/edits", json=body).json()["size"] == "64x32"


def reference(content: bytes) -> dict[str, str]:
    """An image in OpenAI's JSON."""
    return {"image_url": f"data:image/png;base64,{base64.b64encode(content).decode()}"}


def test_edits_may_come_as_openai_s_json(client: httpx.Client) -> None:
    body = {
        "prompt": "a ball",
        "images": [reference(IMAGE), reference(png(noise(20, 20)))],
        "mask": reference(png(half_transparent())),
        "seed": 5,
    }
    answer = client.post("/v1/images/edits", json=body)
    assert answer.status_code == 200, answer.text
    picture = file(answer.json()["data"][0]["b64_json"])
    recorded = json.loads(picture.info["parameters"])
    assert (recorded["operation"], len(recorded["references"])) == ("inpaint", 1)
    assert np.array_equal(np.asarray(picture.convert("RGB"))[:, :32], noise()[:, :32])
    unset = reference(IMAGE) | {"file_id": None}
    alone = client.post("/v1/images/edits", json={"prompt": "a ball", "image": unset})
    assert alone.json()["size"] == "64x32"


@pytest.mark.parametrize(
    ("fields", "code", "param", "mention"),
    [
        ({}, "missing_field", "image", "required: the image to edit"),
        ({"images": []}, "missing_field", "image", "at most 16"),
        (
            {"image": reference(IMAGE), "images": [reference(IMAGE)]},
            "invalid_value",
            "images",
            "not both",
        ),
        ({"images": [{"file_id": "f"}]}, "unsupported_value", "images", "keeps no files"),
        ({"images": [{"url": "f"}]}, "invalid_value", "images", '{"image_url": "data:'),
        ({"images": [{"image_url": 5}]}, "invalid_value", "images", '{"image_url": "data:'),
        (
            {"images": [reference(IMAGE) | {"detail": "high"}]},
            "invalid_value",
            "images",
            '{"image_url": "data:',
        ),
        (
            {"images": [{"image_url": "https://example.org/a.png"}]},
            "url_refused",
            "images",
            "data URL",
        ),
        ({"images": [reference(IMAGE)] * 17}, "invalid_value", "images", "at most 16 entries"),
    ],
)
def test_an_edit_in_json_that_has_no_usable_image_is_400_and_says_what_to_send(
    client: httpx.Client, fields: dict[str, Any], code: str, param: str, mention: str
) -> None:
    answer = client.post("/v1/images/edits", json={"prompt": "a ball", **fields})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, code, param)
    assert mention in error["message"]


def test_sixteen_images_and_a_mask_may_be_sent(api: OpenAI) -> None:
    others = [png(noise(8, 8))] * 15
    answer = api.images.edit(image=[IMAGE, *others], mask=png(half_transparent()), prompt="a ball")
    assert len(parameters(answer)["references"]) == 15


def test_fields_of_other_models_are_taken_where_they_ask_for_nothing(
    api: OpenAI, client: httpx.Client
) -> None:
    assert api.images.generate(
        prompt="a ball", output_format="png", output_compression=100, partial_images=1
    ).data
    body = {"prompt": "a ball", "model": "", "size": "", "quality": "", "user": ""}
    nothing = dict.fromkeys(("complexity", "frame_count", "frame_duration_ms", "svg", "markup"))
    answer = client.post("/v1/images/generations", json=body | nothing | {"future": None})
    assert answer.status_code == 200, answer.text
    jpg = client.post("/v1/images/generations", json={"prompt": "a ball", "output_format": "jpg"})
    assert jpg.json()["output_format"] == "jpeg"


def test_a_long_prompt_is_read_as_far_as_the_encoders_read(client: httpx.Client) -> None:
    answer = client.post("/v1/images/generations", json={"prompt": "cut " + "🎨" * 31_996})
    assert (answer.status_code, answer.headers["x-prompt-truncated"]) == (200, "byt5, clip")
    answer = client.post("/v1/images/generations", json={"prompt": "x" * 32_001})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "prompt")


@pytest.mark.filterwarnings(
    "ignore:deprecated:DeprecationWarning"
)  # the client's word about OpenAI's own endpoint
async def test_the_async_client_does_the_same(fake_server: str) -> None:
    async with AsyncOpenAI(base_url=f"{fake_server}/v1", api_key="any", max_retries=0) as api:
        answers = await asyncio.gather(
            api.images.generate(prompt="a ball"),
            api.images.edit(image=[IMAGE], prompt="a ball"),
            api.images.create_variation(image=IMAGE),
            *(api.images.generate(prompt="a ball", extra_body={"seed": seed}) for seed in range(8)),
        )
        assert [answer.size for answer in answers] == ["64x32"] * 11
        events = [
            event
            async for event in await api.images.generate(
                prompt="show", stream=True, partial_images=2
            )
        ]
        assert [event.type for event in events] == ["image_generation.partial_image"] * 2 + [
            "image_generation.completed"
        ]


def test_a_raw_answer_has_the_request_id_the_seed_and_the_timing(api: OpenAI) -> None:
    raw = api.images.with_raw_response.generate(
        prompt="a ball", extra_headers={"X-Request-Id": "mine"}, extra_body={"seed": 7}
    )
    assert (raw.headers["x-request-id"], raw.headers["x-seed"], raw.request_id) == (
        "mine",
        "7",
        "mine",
    )
    assert "denoise;dur=" in raw.headers["server-timing"]
    assert raw.parse()._request_id == "mine"


# ── streams ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("format", ["png", "webp"])
def test_a_streamed_generation_sends_partial_images_and_the_picture(
    api: OpenAI, format: Any
) -> None:
    events = list(
        api.images.generate(
            prompt="show",
            stream=True,
            partial_images=2,
            output_format=format,
            extra_body={"seed": 5},
        )
    )
    *partial, completed = events
    assert all(isinstance(event, ImageGenPartialImageEvent) for event in partial)
    assert [
        event.partial_image_index
        for event in partial
        if isinstance(event, ImageGenPartialImageEvent)
    ] == [0, 1]
    assert isinstance(completed, ImageGenCompletedEvent)
    assert completed.usage.output_tokens == 128
    for event in events:
        assert (event.size, event.quality, event.background, event.output_format) == (
            "64x32",
            "medium",
            "opaque",
            format,
        )
        assert (file(event.b64_json).format, file(event.b64_json).size) == (
            format.upper(),
            (64, 32),
        )
    whole = api.images.generate(prompt="show", output_format=format, extra_body={"seed": 5})
    assert completed.b64_json == (whole.data or [])[0].b64_json


def test_a_streamed_edit_has_events_of_its_own_and_its_previews_keep_what_the_answer_keeps(
    api: OpenAI,
) -> None:
    events = list(
        api.images.edit(
            image=IMAGE, mask=png(half_transparent()), prompt="show", stream=True, partial_images=2
        )
    )
    assert [type(event) for event in events] == [ImageEditPartialImageEvent] * 2 + [
        ImageEditCompletedEvent
    ]
    for event in events:
        assert np.array_equal(
            np.asarray(file(event.b64_json).convert("RGB"))[:, :32], noise()[:, :32]
        )


def test_a_stream_of_several_pictures_says_which(api: OpenAI) -> None:
    events = list(api.images.generate(prompt="a ball", n=3, stream=True))
    assert [(event.type, event.index) for event in events] == [
        ("image_generation.completed", i) for i in range(3)
    ]  # type: ignore[attr-defined]


def test_a_stream_that_fails_raises_in_the_client(api: OpenAI) -> None:
    with pytest.raises(openai.APIError) as failure:
        list(api.images.generate(prompt="fail", stream=True))
    assert (failure.value.code, failure.value.type) == ("internal", "server_error")


@pytest.mark.process
def test_closing_a_stream_frees_its_rows(fake_settings: Configure) -> None:
    with (
        serving(create_app(fake_settings(), worker=fake_worker.main)) as address,
        httpx.Client(base_url=address) as client,
    ):
        with connect(address) as api, api.images.generate(prompt="hold", n=3, stream=True):
            wait_until(lambda: metric(client, "paella_rows_running") == 3)
        wait_until(lambda: metric(client, "paella_rows_running") == 0)


# ── refusals ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("fields", "param", "mention"),
    [
        ({"size": "1024x1024"}, "size", "16, 32, 48"),
        ({"size": "50x32"}, "size", "512"),
        ({"size": "large"}, "size", "auto (64x32)"),
        ({"background": "transparent"}, "background", "opaque"),
        ({"output_format": "gif"}, "output_format", "webp"),
        ({"output_compression": 50}, "output_compression", "jpeg"),
        ({"extra_body": {"complexity": "low"}}, "complexity", "quality"),
        ({"extra_body": {"frame_count": 4}}, "frame_count", "/interpolate"),
        ({"extra_body": {"svg": {"model": "x"}}}, "svg", "png"),
    ],
)
def test_what_these_weights_cannot_do_is_400_and_says_what_they_can(
    api: OpenAI, fields: Any, param: str, mention: str
) -> None:
    with pytest.raises(openai.BadRequestError) as refusal:
        api.images.generate(prompt="a ball", **fields)
    assert (refusal.value.code, refusal.value.param, refusal.value.type) == (
        "unsupported_value",
        param,
        "invalid_request_error",
    )
    assert mention in refusal.value.message


def test_an_edit_with_a_mask_has_the_pictures_own_size_or_the_one_asked_for(api: OpenAI) -> None:
    mask = png(half_transparent())
    for size, expected in (("auto", "64x32"), ("64x32", "64x32"), ("96x96", "96x96")):
        answer = api.images.edit(image=IMAGE, mask=mask, prompt="a ball", size=size)
        assert answer.size == expected
        assert "x".join(map(str, file(answer.data[0].b64_json).size)) == expected


@pytest.mark.parametrize("model", ["gpt-image-1", "dall-e-2", "dall-e-3"])
def test_weights_that_are_not_loaded_are_404(api: OpenAI, model: str) -> None:
    with pytest.raises(openai.NotFoundError) as refusal:
        api.images.generate(prompt="a ball", model=model)
    assert (refusal.value.code, refusal.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.NotFoundError):
        api.models.retrieve(model)


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"prompt": " "}, "invalid_value", "prompt"),
        ({"n": 17}, "invalid_value", "n"),
        ({"quality": "best"}, "invalid_value", "quality"),
        ({"partial_images": 9, "stream": True}, "invalid_value", "partial_images"),
        ({"extra_body": {"seeds": 1}}, "unknown_field", "seeds"),
    ],
)
def test_fields_out_of_bounds_are_bad_requests(
    api: OpenAI, fields: Any, code: str, param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as refusal:
        api.images.generate(**{"prompt": "a ball", **fields})
    assert (refusal.value.code, refusal.value.param) == (code, param)
    assert refusal.value.request_id


def test_a_mask_without_alpha_is_read_by_its_luminance_unless_alpha_is_asked_for(
    api: OpenAI,
) -> None:
    mask = png(np.repeat(np.array([0, 255], np.uint8), 32)[None].repeat(32, axis=0))
    with pytest.raises(openai.BadRequestError) as refusal:
        api.images.edit(image=IMAGE, mask=mask, prompt="a ball", extra_body={"mask_mode": "alpha"})
    assert refusal.value.code == "mask_without_alpha"
    for fields in ({}, {"mask_mode": "luminance"}):
        answer = api.images.edit(image=IMAGE, mask=mask, prompt="a ball", extra_body=fields)
        assert np.array_equal(pixels(answer)[:, :32], noise()[:, :32])


@pytest.mark.parametrize(("prompt", "tries"), [("fail", 1), ("oom", 3)])
def test_the_client_repeats_a_failure_only_if_that_can_help(
    fake_server: str, client: httpx.Client, prompt: str, tries: int
) -> None:
    labels = {"endpoint": "/v1/images/generations", "status": "500"}
    before = metric(client, "paella_request_duration_seconds_count", **labels)
    with connect(fake_server, max_retries=2) as api, pytest.raises(openai.InternalServerError):
        api.images.generate(prompt=prompt)
    wait_until(
        lambda: metric(client, "paella_request_duration_seconds_count", **labels) == before + tries
    )


@pytest.mark.process
def test_a_wrong_key_is_401_and_the_right_one_is_let_in(fake_settings: Configure) -> None:
    with serving(
        create_app(fake_settings(api_keys="sk-0123456789abcdef"), worker=fake_worker.main)
    ) as address:
        with connect(address) as stranger, pytest.raises(openai.AuthenticationError) as refusal:
            stranger.images.generate(prompt="a ball")
        assert refusal.value.code == "invalid_api_key"
        with connect(address, api_key="sk-0123456789abcdef") as known:
            assert known.images.generate(prompt="a ball").size == "64x32"


@pytest.mark.process
def test_the_client_comes_back_when_a_full_queue_says_so(fake_settings: Configure) -> None:
    settings = fake_settings(queue_rows=1, drain_timeout_s=0)
    with (
        serving(create_app(settings, worker=fake_worker.main)) as address,
        httpx.Client(base_url=address, timeout=20) as client,
    ):
        held = {"json": {"prompt": "hold"}, "headers": {"X-Request-Id": "h"}}
        holder = threading.Thread(target=client.post, args=("/generate",), kwargs=held)
        holder.start()
        wait_until(lambda: metric(client, "paella_rows_running") == 1)
        with connect(address) as impatient, pytest.raises(openai.RateLimitError) as refusal:
            impatient.images.generate(prompt="a ball")
        assert refusal.value.code == "queue_full"
        assert int(refusal.value.response.headers["retry-after-ms"]) > 0
        with connect(address, max_retries=1000) as patient:
            waiting = threading.Thread(target=patient.images.generate, kwargs={"prompt": "a ball"})
            waiting.start()
            wait_until(lambda: metric(client, "paella_rejected_total", reason="queue_full") >= 3)
            assert client.delete("/requests/h").status_code == 204
            waiting.join(timeout=20)
            holder.join(timeout=20)
            assert not waiting.is_alive()
        assert metric(client, "paella_images_total", endpoint="/generate") == 1


# ── with the embedded weights ─────────────────────────────────────────────────────────────────────


def test_a_stream_that_is_closed_after_its_first_preview_is_drawn_no_further(
    live_server: str, step: int
) -> None:
    width, height = 4 * step, 8 * step
    with (
        httpx.Client(base_url=live_server, timeout=60) as client,
        connect(live_server, timeout=120) as api,
    ):
        cancelled = metric(client, "paella_cancelled_total", stage="worker")
        with api.images.generate(
            prompt="a red ball",
            size=f"{width}x{height}",
            stream=True,
            partial_images=8,
            extra_body={"num_inference_steps": 64},
        ) as stream:
            event = next(iter(stream))
            assert isinstance(event, ImageGenPartialImageEvent)
            assert (event.partial_image_index, file(event.b64_json).size) == (0, (width, height))
        wait_until(
            lambda: metric(client, "paella_cancelled_total", stage="worker") == cancelled + 1
        )
        wait_until(lambda: metric(client, "paella_rows_running") == 0, timeout_s=60)


@pytest.mark.judges_weights
def test_references_change_what_an_edit_shows(live_server: str, native: tuple[int, int]) -> None:
    width, height = native
    grey, red = (
        png(np.full((height, width, 3), colour, np.uint8)) for colour in ([128] * 3, [220, 20, 20])
    )
    with connect(live_server, timeout=120) as api:
        edits = [
            api.images.edit(image=images, prompt="a ball", extra_body={"seed": 1, "strength": 1})
            for images in ([grey], [grey, red])
        ]
    assert (pixels(edits[0]) != pixels(edits[1])).any()
