"""AUTOMATIC1111's endpoints over the fake worker: mapping, answers, progress, interruption."""

from __future__ import annotations

import asyncio
import base64
import concurrent.futures
import io
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import httpx
import numpy as np
import PIL.Image
import pytest
from fastapi.testclient import TestClient
from pydantic import BaseModel, ValidationError

from model.compositing import MAX_FEATHER
from model.config import Recipe
from server.api import create_app
from server.api.errors import ApiError
from server.api.images.decode import ImageLimits, decode
from server.api.images.orientation import ORIENTATION
from server.api.planning.plan import Plan
from server.api.sdapi.clients import LEAST_PROGRESS, MAX_CHOICES, MOST_PROGRESS, Clients, Drawing
from server.api.sdapi.schemas import (
    PREVIEWS,
    Enlargement,
    ExtraSingleImageRequest,
    Img2ImgRequest,
    SdRequest,
    Txt2ImgRequest,
    guidance,
)
from server.engine.client import EngineClient
from server.engine.hooks import Hooks
from server.engine.job import Job
from server.engine.latency_model import Forecast
from server.engine.messages import Finished, Image, Preview, Timings
from server.settings import Settings
from tests import fake_worker
from tests.conftest import NAME, body_schema, micro_config, micro_preset_config, serving, wait_until
from tests.hostile import exif
from tests.support.api_keys import AUTHORIZED, KEY, OTHER
from tests.support.app_requests import endless
from tests.support.fake_jobs import job, picture
from tests.support.images import noise, png, white
from tests.support.servers import asking
from tests.support.virtual_time import settle, virtual_time

Configure = Callable[..., Settings]
SETTINGS = Settings()

# What webuiapi 0.9.17 sends besides the fields that a test names.
SENT_TOO = {
    "hr_checkpoint_name": None,
    "script_name": None,
    "script_args": [],
    "styles": [],
    "subseed": -1,
    "alwayson_scripts": {},
    "override_settings": {},
    "sampler_index": "Euler a",
    "eta": 1.0,
    "tiling": False,
}


def url(content: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def opened(image: str) -> PIL.Image.Image:
    return PIL.Image.open(io.BytesIO(base64.b64decode(image)))


def pixels(image: str) -> np.ndarray[Any, Any]:
    return np.asarray(opened(image).convert("RGB"))


@pytest.fixture(scope="module")
def sd(fake_settings: Configure) -> Iterator[httpx.Client]:
    """A client of a server with these endpoints; what it changes, it changes for its address."""
    with (
        serving(create_app(fake_settings(sdapi=True), worker=fake_worker.main)) as address,
        httpx.Client(base_url=f"{address}/sdapi/v1/", timeout=20) as client,
    ):
        wait_until(lambda: httpx.get(f"{address}/readyz").status_code == 200)
        yield client


def post(client: httpx.Client, path: str, **fields: Any) -> dict[str, Any]:
    answer = client.post(path, json=SENT_TOO | fields)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def at_root(client: httpx.Client, path: str) -> str:
    """The address of another endpoint of the server."""
    return str(client.base_url.copy_with(path=path))


def drawn(client: httpx.Client, **fields: Any) -> dict[str, Any]:
    """What /txt2img says about its images."""
    return dict(json.loads(post(client, "txt2img", prompt="a ball", **fields)["info"]))


def refused(client: httpx.Client, path: str, **fields: Any) -> tuple[int, str, str | None]:
    answer = client.post(path, json=fields)
    return answer.status_code, *(answer.json()["error"][name] for name in ("code", "param"))


def test_without_the_setting_there_are_no_such_endpoints(client: httpx.Client) -> None:
    for method, path in (("POST", "txt2img"), ("GET", "options"), ("PUT", "no/such/path")):
        answer = client.request(method, f"/sdapi/v1/{path}")
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")
        assert "PAELLERA_SDAPI=true" in answer.json()["error"]["message"]
    assert "PAELLERA_SDAPI" not in client.get("/no/such/path").text
    assert "/sdapi/v1/txt2img" not in client.get("/openapi.json").text


# ── text to image ─────────────────────────────────────────────────────────────────────────────────


def test_txt2img_answers_with_images_parameters_and_a_text_about_them(sd: httpx.Client) -> None:
    answer = post(
        sd, "txt2img", prompt="a ball", negative_prompt="blur, text", seed=5, batch_size=2, n_iter=2
    )
    assert len(answer["images"]) == 4
    assert [tuple(pixels(image)[0, 0]) for image in answer["images"]] == [
        tuple(fake_worker.colour(seed)) for seed in (5, 6, 7, 8)
    ]
    assert (answer["parameters"]["prompt"], answer["parameters"]["batch_size"]) == ("a ball", 2)
    info = json.loads(answer["info"])
    assert (info["seed"], info["all_seeds"], info["index_of_first_image"]) == (5, [5, 6, 7, 8], 0)
    assert (info["width"], info["height"], info["steps"], info["cfg_scale"]) == (64, 32, 12, 7)
    assert info["all_prompts"] == ["a ball"] * 4
    unused = {
        "subseed_strength": 0,
        "restore_faces": False,
        "seed_resize_from_w": -1,
        "seed_resize_from_h": -1,
        "clip_skip": 1,
        "is_using_inpainting_conditioning": False,
    }
    assert unused.items() <= info.items()
    texts = [opened(image).info["parameters"] for image in answer["images"]]
    assert texts == info["infotexts"]
    assert texts[1].startswith(
        "a ball\nNegative prompt: blur, text\nSteps: 12, Sampler: multinomial, Schedule type:"
        " Automatic, CFG scale: 7, Seed: 6, Size: 64x32, Model hash: "
    )
    assert texts[1].endswith(f"Model hash: {info['sd_model_hash']}, Model: {NAME}")


def test_the_image_is_the_native_endpoint_s(sd: httpx.Client) -> None:
    (image,) = post(sd, "txt2img", prompt="a ball", seed=5, steps=7, cfg_scale=1)["images"]
    fields = {"prompt": "a ball", "seed": 5, "num_inference_steps": 7, "guidance_scale": 1}
    native = sd.post(at_root(sd, "/generate"), json=fields)
    with PIL.Image.open(io.BytesIO(native.content)) as same:
        assert np.array_equal(np.asarray(same), pixels(image))


@pytest.mark.parametrize(
    ("cfg_scale", "scale"), [(1, 1), (7, 8), (4, 4.5), (0, 0), (-3, 0), (14, 16.1667), (99, 30)]
)
def test_the_recipe_s_guidance_is_that_of_cfg_scale_7(
    sd: httpx.Client, cfg_scale: float, scale: float
) -> None:
    assert drawn(sd, cfg_scale=cfg_scale)["guidance_scale"] == pytest.approx([scale, scale])


def test_guidance_that_changes_over_the_steps_keeps_its_shape() -> None:
    recipe = Recipe(12, 11, (3.0, 9.0), 12, (1.0, 1.0))
    assert guidance(7, recipe) is None
    assert guidance(1, recipe) == (1, 1)
    assert guidance(4, recipe) == (2, 5)


@pytest.mark.parametrize("cfg_scale", [0, 4, 7, 12])
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_a_preset_without_guided_steps_is_drawn_whatever_cfg_scale_says(
    cfg_scale: float, scale: float
) -> None:
    config = micro_preset_config()
    fast = config.presets["fast"]
    unguided = replace(fast, recipe=replace(fast.recipe, guidance_scale=(scale, scale)))
    request = Txt2ImgRequest(steps=3, cfg_scale=cfg_scale)
    _, fields = request.native(config.with_preset("fast", unguided), SETTINGS)
    assert (fields["preset"], fields["guidance_scale"]) == ("fast", None)


@pytest.mark.parametrize(
    ("fields", "preset"),
    [
        ({"steps": 1}, "fast"),
        ({"steps": 3}, "fast"),
        ({"steps": 4}, "fast"),
        ({"steps": 5}, "quality"),
        ({"steps": 3, "negative_prompt": " "}, "fast"),
        ({"steps": 3, "negative_prompt": "blur"}, "quality"),
        ({}, "quality"),
    ],
)
def test_up_to_four_steps_choose_fast_unless_a_negative_prompt_needs_guidance(
    fields: dict[str, Any], preset: str
) -> None:
    assert Txt2ImgRequest(**fields).preset(micro_preset_config()) == preset


@pytest.mark.parametrize(
    ("recipe", "most", "sent", "drawn"),
    [
        (2, 6, 1, ("fast", 1)),
        (2, 6, 4, ("fast", 4)),
        (2, 6, 5, ("quality", 5)),
        (2, 3, 3, ("fast", 3)),
        (2, 3, 4, ("quality", 4)),
        (6, 8, 6, ("fast", 6)),
        (6, 8, 7, ("quality", 6)),
    ],
)
def test_few_steps_are_drawn_by_fast_as_sent_within_its_range(
    recipe: int, most: int, sent: int, drawn: tuple[str, int]
) -> None:
    config = micro_preset_config()
    fast = config.presets["fast"]
    fewer = replace(fast, recipe=replace(fast.recipe, num_inference_steps=recipe), steps=(1, most))
    _, fields = Txt2ImgRequest(steps=sent).native(config.with_preset("fast", fewer), SETTINGS)
    assert (fields["preset"], fields["num_inference_steps"]) == drawn


@pytest.mark.parametrize(
    ("request_", "preset"),
    [
        (Txt2ImgRequest(enable_hr=True), "quality"),
        (Txt2ImgRequest(enable_hr=True, steps=2), "quality"),
        (Img2ImgRequest(init_images=[b"1"]), "quality"),
        (Img2ImgRequest(init_images=[b"1"], steps=2), "quality"),
        (Img2ImgRequest(init_images=[b"1"], denoising_strength=1), "fast"),
        (Img2ImgRequest(init_images=[b"1"], mask=b"2"), "fast"),
    ],
)
def test_what_keeps_a_share_of_an_image_is_for_quality(request_: SdRequest, preset: str) -> None:
    assert request_.preset(micro_preset_config(default=True)) == preset


def test_a_negative_prompt_is_for_fast_too_if_it_is_guided() -> None:
    config = micro_preset_config()
    fast = config.presets["fast"]
    guided = replace(fast.recipe, guidance_scale=(2.0, 2.0), guidance_steps=3)
    request = Txt2ImgRequest(steps=3, negative_prompt="blur")
    assert request.preset(config.with_preset("fast", replace(fast, recipe=guided))) == "fast"


@pytest.mark.parametrize(("sent", "steps"), [(20, 12), (7, 7), (0, 1), (150, 12), (None, 12)])
def test_steps_are_at_most_the_recipe_s(sd: httpx.Client, sent: Any, steps: int) -> None:
    assert drawn(sd, steps=sent)["steps"] == steps


def test_a_sampler_of_others_is_reported_and_one_of_these_weights_is_used(sd: httpx.Client) -> None:
    info = drawn(sd, sampler_name="DPM++ 2M, Karras", steps=20)
    assert info["sampler_name"] == "multinomial"
    assert info["extra_generation_params"] == {
        "Requested sampler": "DPM++ 2M, Karras",
        "Requested steps": 20,
    }
    assert 'Requested sampler: "DPM++ 2M, Karras"' in info["infotexts"][0]
    own = drawn(sd, sampler_name="Typical")
    assert (own["sampler_name"], own["extra_generation_params"]) == ("typical", {})


@pytest.mark.parametrize(
    ("sent", "sampler"),
    [
        ({"sampler_index": "Argmax"}, "argmax"),
        ({"sampler_index": "argmax", "sampler_name": "typical"}, "typical"),
        ({"sampler_index": "argmax", "sampler_name": ""}, "argmax"),
        ({"sampler_index": "argmax", "sampler_name": "Euler"}, "multinomial"),
        ({"sampler_index": "Euler"}, "multinomial"),
        ({"sampler_index": 3}, "multinomial"),
        ({"sampler_index": None}, "multinomial"),
    ],
)
def test_a_sampler_may_come_under_its_old_name(
    sd: httpx.Client, sent: dict[str, Any], sampler: str
) -> None:
    assert drawn(sd, **sent)["sampler_name"] == sampler


def test_a_sampler_s_name_has_at_most_200_characters() -> None:
    assert Txt2ImgRequest(sampler_name="x" * 200).sampler_name == "x" * 200
    with pytest.raises(ValidationError, match="sampler_name"):
        Txt2ImgRequest(sampler_name="x" * 201)


@pytest.mark.parametrize("seed", [-1, None, "", "absent"])
def test_minus_one_and_nothing_are_random_seeds(sd: httpx.Client, seed: Any) -> None:
    fields = {} if seed == "absent" else {"seed": seed}
    first, second = drawn(sd, **fields), drawn(sd, **fields)
    assert -1 != first["seed"] != second["seed"] != -1
    assert drawn(sd, seed=-2)["seed"] == -2


def test_a_prompt_may_be_absent_as_there(sd: httpx.Client) -> None:
    info = json.loads(post(sd, "txt2img", prompt=None)["info"])
    assert info["infotexts"][0].startswith("Steps: 12")


def test_images_are_left_out_on_request(sd: httpx.Client) -> None:
    assert post(sd, "txt2img", prompt="a ball", send_images=False)["images"] == []


def test_a_second_pass_is_hires(sd: httpx.Client) -> None:
    answer = post(
        sd, "txt2img", prompt="a ball", enable_hr=True, hr_scale=1.5, denoising_strength=0.4, seed=5
    )
    info = json.loads(answer["info"])
    assert opened(answer["images"][0]).size == (96, 48)
    assert (info["width"], info["height"], info["denoising_strength"]) == (64, 32, 0.4)
    assert (
        "Denoising strength: 0.4, Hires upscale: 1.5, Hires upscaler: Paella"
        in (info["infotexts"][0])
    )
    resized = post(sd, "txt2img", prompt="a ball", enable_hr=True, hr_resize_x=128, hr_scale=9)
    assert opened(resized["images"][0]).size == (128, 64)


def test_a_second_pass_to_a_width_and_a_height_is_cropped_to_them(sd: httpx.Client) -> None:
    fields = {"prompt": "a ball", "enable_hr": True, "hr_resize_x": 96, "hr_resize_y": 96}
    answer = post(sd, "txt2img", **fields)
    assert opened(answer["images"][0]).size == (96, 96)
    assert "Size: 64x32" in json.loads(answer["info"])["infotexts"][0]
    assert "Hires resize: 96x96" in json.loads(answer["info"])["infotexts"][0]


@pytest.mark.parametrize(
    ("side", "resized", "scale"),
    [(1024, 128, 4), (512, 128, 4), (64, 64, 2), (96, 64, 2), (32, 64, 2), (None, 64, 2)],
)
def test_a_second_pass_to_a_size_is_from_the_size_that_is_drawn(
    side: int | None, resized: int, scale: float
) -> None:
    nearest = Settings(sizes="nearest")
    fields = {"width": side, "height": side, "hr_resize_x": resized, "hr_resize_y": resized}
    request = Txt2ImgRequest.model_validate({"enable_hr": True, **fields})
    assert request.native(micro_config(), nearest)[1]["hires"].scale == scale
    assert request.details(micro_config(), nearest)["Hires resize"] == f"{resized}x{resized}"


def test_hr_scale_multiplies_the_size_that_is_drawn() -> None:
    request = Txt2ImgRequest(width=1024, height=1024, enable_hr=True, hr_scale=5)
    with pytest.raises(ApiError, match="as the drawn image: 32x32 to 128x128"):
        request.native(micro_config(), Settings(sizes="nearest"))


@pytest.mark.parametrize(
    ("request_", "unused"),
    [
        (Txt2ImgRequest, {"denoising_strength": 1.5, "hr_scale": "much", "hr_resize_x": 1.5}),
        (Img2ImgRequest, {"mask_blur": -1, "inpainting_mask_invert": 2}),
        (Img2ImgRequest, {"mask": b"a mask", "denoising_strength": 1.5}),
        (ExtraSingleImageRequest, {"resize_mode": 1, "upscaling_resize": 0}),
        (ExtraSingleImageRequest, {"upscaling_resize_w": -1, "upscaling_crop": 2}),
    ],
)
def test_fields_without_effect_are_not_checked(
    request_: type[BaseModel], unused: dict[str, Any]
) -> None:
    files = {"init_images": [b"an image"], "image": b"an image"}
    request = request_.model_validate(files | unused)
    defaults = {name: field.default for name, field in request_.model_fields.items()}
    ignored = unused.keys() - {"mask", "resize_mode"}
    assert all(getattr(request, name) == defaults[name] for name in ignored)
    used = {"enable_hr": True, "mask": b"a mask", "resize_mode": 1} | unused
    used |= {"mask": None} if "mask" in unused else {}
    used |= {"resize_mode": 0} if "upscaling_resize" in unused else {}
    with pytest.raises(ValidationError) as refused:
        request_.model_validate(files | used)
    assert {error["loc"][0] for error in refused.value.errors()} == ignored


LARGER = {"prompt": "a ball", "width": 64, "height": 32, "enable_hr": True}


@pytest.mark.parametrize(
    ("fields", "scale"),
    [
        ({"hr_scale": 1}, 1),
        ({"hr_scale": 4}, 4),
        ({"hr_scale": 0.99}, None),
        ({"hr_scale": 4.01}, None),
        ({"hr_resize_x": 64}, 1),
        ({"hr_resize_y": 32}, 1),
        ({"hr_resize_x": 256, "hr_resize_y": 32}, 4),
        ({"hr_resize_x": 64, "hr_resize_y": 128}, 4),
        ({"hr_resize_x": 63}, None),
        ({"hr_resize_x": 1}, None),
        ({"hr_resize_y": 1}, None),
        ({"hr_resize_x": 257}, None),
        ({"hr_resize_y": 129}, None),
    ],
)
def test_a_second_pass_is_from_1_to_4_times_as_large(
    fields: dict[str, Any], scale: float | None
) -> None:
    request = Txt2ImgRequest.model_validate(LARGER | fields)
    if scale is None:
        param = list(fields)[-1]
        with pytest.raises(ApiError, match=f"{param}: the result may be 1 to 4 times as large"):
            request.native(micro_config(), SETTINGS)
    else:
        assert request.native(micro_config(), SETTINGS)[1]["hires"].scale == scale


@pytest.mark.parametrize(
    ("fields", "steps"),
    [
        ({}, None),
        ({"steps": 4}, 4),
        ({"hr_second_pass_steps": 5}, 5),
        ({"hr_second_pass_steps": 0, "steps": 4}, 4),
        ({"hr_second_pass_steps": 2, "steps": 4}, 2),
        ({"hr_second_pass_steps": 7}, 6),
    ],
)
def test_a_second_pass_has_steps_of_its_own_or_as_many_as_the_first(
    fields: dict[str, Any], steps: int | None
) -> None:
    request = Txt2ImgRequest.model_validate({"enable_hr": True, **fields})
    hires = request.native(micro_config(), SETTINGS)[1]["hires"]
    assert (hires.scale, hires.steps) == (2, steps)


@pytest.mark.parametrize(
    ("size", "scale"),
    [
        ((64, 32), 1),
        ((0, 32), 1),
        ((256, 0), 4),
        ((64, 128), 4),
        ((63, 31), None),
        ((0, 0), None),
        ((257, 128), None),
        ((256, 129), None),
    ],
)
def test_an_image_is_enlarged_to_a_size_from_1_to_4_times_its_own(
    size: tuple[int, int], scale: float | None
) -> None:
    fields = {"image": b"a file", "resize_mode": 1}
    fields |= {"upscaling_resize_w": size[0], "upscaling_resize_h": size[1]}
    request = ExtraSingleImageRequest.model_validate(fields)
    if scale is None:
        with pytest.raises(ApiError, match="as the sent image: 64x32 to 256x128"):
            scale_of(request, (64, 32))
    else:
        assert scale_of(request, (64, 32)) == scale


def test_sixteen_images_are_the_most_together() -> None:
    for batch_size, n_iter in ((16, 1), (1, 16), (4, 4)):
        request = Txt2ImgRequest(batch_size=batch_size, n_iter=n_iter)
        assert request.native(micro_config(), SETTINGS)[1]["n"] == 16
    with pytest.raises(ApiError, match="batch_size: must be at most 16"):
        Txt2ImgRequest(batch_size=9, n_iter=2).native(micro_config(), SETTINGS)


@pytest.mark.parametrize(
    ("fields", "refusal"),
    [
        ({"batch_size": 16, "n_iter": 2}, (422, "invalid_value", "batch_size")),
        ({"n_iter": 17}, (422, "invalid_value", "n_iter")),
        ({"width": 50}, (422, "invalid_value", "width")),
        ({"enable_hr": True, "hr_scale": 9}, (422, "invalid_value", "hr_scale")),
        ({"enable_hr": True, "hr_resize_y": 999}, (422, "invalid_value", "hr_resize_y")),
        ({"seed": 2**63}, (422, "invalid_value", "seed")),
        ({"cfg_scale": "much"}, (422, "invalid_value", "cfg_scale")),
        (
            {"override_settings": {"sd_model_checkpoint": "sdxl"}},
            (404, "model_not_found", "override_settings"),
        ),
        (
            {"override_settings": {"sd_model_checkpoint": 7}},
            (422, "invalid_value", "override_settings"),
        ),
    ],
)
def test_what_cannot_be_drawn_is_refused_by_its_name(
    sd: httpx.Client, fields: Any, refusal: tuple[int, str, str]
) -> None:
    assert refused(sd, "txt2img", prompt="a ball", **fields) == refusal


# ── image to image ────────────────────────────────────────────────────────────────────────────────


def test_img2img_edits_and_echoes_the_images_only_on_request(sd: httpx.Client) -> None:
    fields = {"prompt": "a ball", "init_images": [url(png(noise()))], "denoising_strength": 0.6}
    answer = post(sd, "img2img", **fields, seed=5)
    assert tuple(pixels(answer["images"][0])[0, 0]) == tuple(fake_worker.colour(5))
    assert (answer["parameters"]["init_images"], answer["parameters"]["mask"]) == (None, None)
    assert json.loads(answer["info"])["denoising_strength"] == 0.6
    included = post(sd, "img2img", **fields, include_init_images=True)["parameters"]
    assert base64.b64decode(included["init_images"][0]) == png(noise())


def redrawing(**fields: Any) -> Img2ImgRequest:
    return Img2ImgRequest.model_validate({"init_images": [b"an image"], **fields})


@pytest.mark.parametrize(
    ("blur", "feather"),
    [
        (None, None),
        (0, 0),
        (4.6, 5),
        (MAX_FEATHER, MAX_FEATHER),
        (MAX_FEATHER + 1, MAX_FEATHER),
        (1e300, MAX_FEATHER),
    ],
)
def test_a_mask_s_blur_is_the_feather_up_to_the_largest(
    blur: float | None, feather: int | None
) -> None:
    operation, fields = redrawing(mask=b"a mask", mask_blur=blur).native(micro_config(), SETTINGS)
    assert (operation, fields.get("feather")) == ("inpaint", feather)


def test_the_mask_is_echoed_and_kept_for_it_only_on_request() -> None:
    request = redrawing(mask=b"a mask", include_init_images=True)
    assert request.without_files() == request
    sent = [base64.b64encode(content).decode() for content in (b"an image", b"a mask")]
    assert [*request.echoed["init_images"], request.echoed["mask"]] == sent
    assert redrawing(include_init_images=True).echoed["mask"] is None
    without = redrawing(mask=b"a mask", mask_blur=4).without_files()
    assert (without.init_images, without.mask) == ([], b"")
    assert (without.echoed["init_images"], without.echoed["mask"]) == (None, None)
    assert without.details(micro_config(), SETTINGS) == {"Mask blur": 4}
    unmasked = redrawing().without_files()
    assert unmasked.mask is None
    assert unmasked.details(micro_config(), SETTINGS) == {"Denoising strength": 0.75}


@pytest.mark.parametrize("resize_mode", range(4))
def test_width_and_height_resize_the_image_first(sd: httpx.Client, resize_mode: int) -> None:
    answer = post(
        sd,
        "img2img",
        init_images=[url(png(noise()))],
        width=48,
        height=48,
        resize_mode=resize_mode,
    )
    assert opened(answer["images"][0]).size == (48, 48)


def kept(mask: np.ndarray[Any, Any], **fields: Any) -> Callable[[httpx.Client], list[bool]]:
    """Return whether the image's left and right half are kept."""

    def halves(client: httpx.Client) -> list[bool]:
        answer = post(
            client,
            "img2img",
            prompt="a ball",
            init_images=[url(png(noise()))],
            mask=url(png(mask)),
            mask_blur=0,
            seed=5,
            **fields,
        )
        result, original = pixels(answer["images"][0]), noise()
        assert result.shape == original.shape
        return [np.array_equal(result[:, at], original[:, at]) for at in (4, 60)]

    return halves


def test_white_is_repainted_and_the_mask_may_be_inverted(sd: httpx.Client) -> None:
    left = white(box=(0, 0, 32, 32))
    assert kept(left)(sd) == [False, True]
    assert kept(left, inpainting_mask_invert=1)(sd) == [True, False]
    assert kept(left, width=512, height=512)(sd) == [False, True]


def test_of_a_transparent_mask_the_opaque_part_is_repainted(sd: httpx.Client) -> None:
    strokes = np.zeros((32, 64, 4), dtype=np.uint8)
    strokes[:, :32, 3] = 255
    assert kept(strokes)(sd) == [False, True]
    strokes[..., 3] = 255
    strokes[:, 32:, :3] = 255
    assert kept(strokes)(sd) == [True, False]
    strokes[..., 3], strokes[:, :32, 3] = 128, 129
    assert kept(strokes)(sd) == [False, True]


@pytest.mark.parametrize("size", [(32, 16), (16, 32), (128, 64)])
def test_a_mask_of_another_size_is_stretched_to_the_image(
    sd: httpx.Client, size: tuple[int, int]
) -> None:
    left = white(*size, box=(0, 0, size[0] // 2, size[1]))
    assert kept(left)(sd) == [False, True]
    assert kept(left, inpainting_mask_invert=1)(sd) == [True, False]


@pytest.mark.parametrize("size", [(32, 64), (16, 32), (64, 32)])
def test_a_mask_is_stretched_to_the_image_as_it_is_shown(
    sd: httpx.Client, size: tuple[int, int]
) -> None:
    file = io.BytesIO()
    PIL.Image.fromarray(noise()).save(file, "JPEG", exif=b"Exif\0\0" + exif(6), quality=95)
    upper = url(png(white(*size, box=(0, 0, size[0], size[1] // 2))))
    fields = {"init_images": [url(file.getvalue())], "mask": upper, "mask_blur": 0}
    if size == (64, 32):  # that of the stored image: its client does not know of the orientation
        assert refused(sd, "img2img", **fields) == (422, "mask_size_mismatch", "mask")
        return
    result = pixels(post(sd, "img2img", **fields, seed=5)["images"][0])
    shown = decode(file.getvalue(), ImageLimits()).rgb
    assert result.shape == shown.shape
    np.testing.assert_array_equal(result[60:], shown[60:])
    assert (result[4] == tuple(fake_worker.colour(5))).all()


def test_a_mask_is_not_stretched_to_more_pixels_than_an_image_may_have(
    fake_settings: Configure,
) -> None:
    file = io.BytesIO()
    PIL.Image.new("RGB", (640, 320)).save(file, "JPEG")
    # The image is decoded at a quarter of its size.
    app = create_app(fake_settings(sdapi=True, max_image_pixels=160 * 80), worker=fake_worker.main)
    fields = {"init_images": [url(file.getvalue())], "mask": url(png(white()))}
    fields |= {"width": 64, "height": 32, "inpaint_full_res": False}
    with (
        serving(app) as address,
        httpx.Client(base_url=f"{address}/sdapi/v1/", timeout=20) as client,
    ):
        wait_until(lambda: httpx.get(f"{address}/readyz").status_code == 200)
        assert refused(client, "img2img", **fields) == (422, "mask_size_mismatch", "mask")


def strokes(alpha: int) -> np.ndarray[Any, Any]:
    """White strokes of this alpha in the left half of a transparent mask."""
    mask = np.zeros((32, 64, 4), dtype=np.uint8)
    mask[:, :32] = (255, 255, 255, alpha)
    return mask


@pytest.mark.parametrize(
    ("mask", "inverted", "reason"),
    [
        (white() // 255, False, "brightest is 1 of 255; multiply a mask of 0 and 1 by 255"),
        (white() // 255, True, "brightest is 1 of 255; multiply a mask of 0 and 1 by 255"),
        (white() * 0, False, "brightest is 0 of 255"),
        (strokes(128), False, "alpha above 128 is repainted, and the mask's highest alpha is 128"),
    ],
)
def test_a_mask_that_repaints_nothing_is_told_why(
    sd: httpx.Client, mask: np.ndarray[Any, Any], inverted: bool, reason: str
) -> None:
    fields = {"init_images": [url(png(noise()))], "mask": url(png(mask))}
    answer = sd.post("img2img", json=fields | {"inpainting_mask_invert": inverted})
    assert (answer.status_code, answer.json()["error"]["code"]) == (422, "empty_mask")
    assert answer.json()["error"]["message"].startswith("mask: nothing to repaint; ")
    assert reason in answer.json()["error"]["message"]


@pytest.mark.parametrize("mask", [white() * 0, strokes(128)])
def test_a_mask_of_nothing_may_be_inverted(sd: httpx.Client, mask: np.ndarray[Any, Any]) -> None:
    assert kept(mask, inpainting_mask_invert=1)(sd) == [False, False]


@pytest.mark.parametrize(
    ("fields", "refusal"),
    [
        ({}, (422, "missing_field", "init_images")),
        ({"init_images": [url(png(noise()))] * 2}, (422, "invalid_value", "init_images")),
        ({"init_images": ["http://x/y.png"]}, (422, "url_refused", "init_images")),
        (
            {"init_images": [url(png(noise()))], "mask": url(b"no image")},
            (422, "unsupported_image_format", "mask"),
        ),
        (
            {"init_images": [url(png(noise()))], "resize_mode": 4},
            (422, "invalid_value", "resize_mode"),
        ),
    ],
)
def test_images_and_masks_that_do_not_fit_are_refused(
    sd: httpx.Client, fields: Any, refusal: tuple[int, str, str]
) -> None:
    assert refused(sd, "img2img", prompt="a ball", **fields) == refusal


@pytest.mark.parametrize(
    ("resize_mode", "fit"),
    [(0, "stretch"), (1, "crop"), (2, "pad"), (3, "stretch")],
)
def test_a_resize_mode_says_how_an_image_fits_its_size(resize_mode: int, fit: str) -> None:
    operation, fields = redrawing(resize_mode=resize_mode).native(micro_config(), SETTINGS)
    assert (operation, fields["fit"]) == ("edit", fit)


def enlarging(**fields: Any) -> ExtraSingleImageRequest:
    return ExtraSingleImageRequest.model_validate({"image": b"a file", **fields})


def scale_of(request: ExtraSingleImageRequest, size: tuple[int, int]) -> float:
    """The factor for an image of this size."""
    return Enlargement.model_construct(**request.native(request.image)).scale_for(size)


@pytest.mark.parametrize(
    ("upscaler", "strength"),
    [("None", 0), ("LANCZOS", 0), ("Nearest", 0), ("R-ESRGAN 4x+", None)],
)
def test_plain_upscalers_draw_nothing(upscaler: str, strength: float | None) -> None:
    assert enlarging(upscaler_1=upscaler).native(b"a file").get("strength") == strength


def test_an_image_is_enlarged_by_2_or_to_512_pixels_by_default() -> None:
    assert scale_of(enlarging(), (256, 256)) == 2
    assert scale_of(enlarging(resize_mode=1), (256, 256)) == 2


def test_an_image_is_enlarged(sd: httpx.Client) -> None:
    fields = {"image": url(png(noise())), "upscaler_1": "R-ESRGAN 4x+"}
    answer = post(sd, "extra-single-image", **fields, upscaling_resize=1.5)
    assert opened(answer["image"]).size == (96, 48)
    assert "Upscaled by: 1.5" in answer["html_info"]
    unused = {"upscaling_resize_w": 0, "upscaling_resize_h": 0}
    assert opened(post(sd, "extra-single-image", **fields, **unused)["image"]).size == (128, 64)
    sized = {"resize_mode": 1, "upscaling_resize_w": 128, "upscaling_resize_h": 64}
    assert opened(post(sd, "extra-single-image", **fields, **sized)["image"]).size == (128, 64)
    refusal = (422, "invalid_value", "upscaling_resize")
    assert refused(sd, "extra-single-image", **fields, upscaling_resize=9) == refusal


def test_an_image_is_cropped_to_a_width_and_a_height_unless_the_client_says_no(
    sd: httpx.Client,
) -> None:
    fields = {"image": url(png(noise())), "resize_mode": 1}
    fields |= {"upscaling_resize_w": 128, "upscaling_resize_h": 128}
    cropped = post(sd, "extra-single-image", **fields)
    assert opened(cropped["image"]).size == (128, 128)
    assert "Upscaled by: 4" in cropped["html_info"]
    whole = post(sd, "extra-single-image", **fields, upscaling_crop=False)
    assert opened(whole["image"]).size == (256, 128)
    fields |= {"upscaling_resize_w": 0}
    assert opened(post(sd, "extra-single-image", **fields)["image"]).size == (256, 128)


def test_a_cropped_plan_is_for_the_middle_of_the_images() -> None:
    plan = Plan("upscale", job(), (6, 3), {"scale": 2.0})
    pixels = np.arange(6 * 3 * 3, dtype=np.uint8).reshape(3, 6, 3)
    cropped = plan.cropped((3, 2))
    assert np.array_equal(cropped.result(Image.of(pixels, 1)).array, pixels[0:2, 1:4])
    assert (cropped.answer_size, cropped.result(Image.of(pixels, 1)).index) == ((3, 2), 1)
    parameters = cropped.parameters((), 0)
    assert (parameters["width"], parameters["height"], parameters["scale"]) == (6, 3, 2.0)
    assert plan.cropped(None) == plan.cropped((6, 3)) == plan


def test_an_image_is_enlarged_to_a_size_as_it_is_shown_not_as_it_is_stored(
    sd: httpx.Client,
) -> None:
    exif, file = PIL.Image.Exif(), io.BytesIO()
    exif[ORIENTATION] = 6
    PIL.Image.fromarray(noise(32, 64)).save(file, "JPEG", exif=exif)
    fields = {"image": url(file.getvalue()), "resize_mode": 1, "upscaling_crop": False}
    fields |= {"upscaling_resize_w": 128, "upscaling_resize_h": 64}
    answer = post(sd, "extra-single-image", **fields)
    assert opened(answer["image"]).size == (128, 64)
    assert "Upscaled by: 2" in answer["html_info"]


# ── several images ────────────────────────────────────────────────────────────────────────────────


def listed(*sizes: tuple[int, int]) -> list[dict[str, str]]:
    return [{"data": url(png(noise(*size))), "name": f"{size}"} for size in sizes]


def test_images_are_enlarged_alike_in_their_order(sd: httpx.Client) -> None:
    sizes = (64, 32), (32, 48)
    answer = post(sd, "extra-batch-images", imageList=listed(*sizes), upscaling_resize=1.5)
    assert [opened(image).size for image in answer["images"]] == [(96, 48), (48, 72)]
    assert answer["html_info"].count("Upscaled by: 1.5") == 2
    to = {"resize_mode": 1, "upscaling_resize_w": 96, "upscaling_resize_h": 96}
    answer = post(sd, "extra-batch-images", imageList=listed(*sizes), **to)
    assert [opened(image).size for image in answer["images"]] == [(96, 96)] * 2
    assert running(sd) == 0


def black(job: Job) -> Finished:
    """The result of a job that enlarges an image."""
    assert job.enlarge is not None
    width, height = job.enlarge.tiling.canvas
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    return Finished(job.id, (Image.of(pixels, 0),), Timings())


@pytest.fixture
def drawn_jobs(monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """The jobs of an engine that draws black at once."""
    jobs = list[Job]()

    async def run(_: EngineClient, job: Job, hooks: Hooks) -> Finished:
        jobs.append(job)
        return black(job)

    monkeypatch.setattr(EngineClient, "run", run)
    return jobs


BATCH = "/sdapi/v1/extra-batch-images"


def test_several_images_have_the_work_of_one_request(
    fake_settings: Configure, drawn_jobs: list[Job]
) -> None:
    client = asking(fake_settings(sdapi=True, max_request_work=400_000))
    too_many = client.post(BATCH, json={"imageList": listed(*[(64, 32)] * 4)})
    assert too_many.json()["error"]["code"] == "too_much_work"
    assert not drawn_jobs
    assert client.post(BATCH, json={"imageList": listed(*[(64, 32)] * 3)}).status_code == 200


def test_several_images_have_the_deadline_of_one_request(
    fake_settings: Configure, drawn_jobs: list[Job]
) -> None:
    client = asking(fake_settings(sdapi=True))
    assert client.post(BATCH, json={"imageList": listed((64, 32), (32, 48))}).status_code == 200
    first, second = drawn_jobs
    # They arrive one after the other.
    assert abs(second.deadline - first.deadline) < (second.arrived_at - first.arrived_at) / 2


def test_several_images_have_the_pixels_of_one_request_and_are_all_checked_first(
    fake_settings: Configure, drawn_jobs: list[Job]
) -> None:
    client = asking(fake_settings(sdapi=True, max_request_pixels=64 * 32 * 2))
    unread = {"data": base64.b64encode(b"no image").decode()}
    for files, code in (
        (listed(*[(64, 32)] * 3), "image_too_large"),
        ([*listed((64, 32)), unread], "unsupported_image_format"),
    ):
        error = client.post(BATCH, json={"imageList": files}).json()["error"]
        assert (error["code"], error["param"]) == (code, "imageList")
    assert not drawn_jobs


@pytest.mark.parametrize(("finished", "status"), [(0, 499), (1, 200)])
def test_an_interruption_leaves_the_images_that_are_finished(
    fake_settings: Configure, monkeypatch: pytest.MonkeyPatch, finished: int, status: int
) -> None:
    app = create_app(fake_settings(sdapi=True), worker=fake_worker.main)
    jobs = list[Job]()

    async def run(_: EngineClient, job: Job, hooks: Hooks) -> Finished:
        if len(jobs) == finished:
            app.state.sdapi.interrupt("address testclient")
            await asyncio.Event().wait()
        jobs.append(job)
        return black(job)

    monkeypatch.setattr(EngineClient, "run", run)
    answer = TestClient(app).post(BATCH, json={"imageList": listed((64, 32), (32, 48))})
    assert answer.status_code == status
    assert len(answer.json().get("images", [])) == finished


def test_an_image_of_several_that_fails_is_named(sd: httpx.Client) -> None:
    sent = {"imageList": listed((64, 32), (32, 48)), "resize_mode": 1, "upscaling_resize_w": 256}
    sent["upscaling_resize_h"] = 32
    refusal = (422, "invalid_value", "upscaling_resize_w")
    assert refused(sd, "extra-batch-images", **sent) == refusal
    damaged = base64.b64encode(png(noise())[:-40]).decode()
    answer = sd.post("extra-batch-images", json={"imageList": [{"data": damaged}]})
    assert answer.json()["error"]["message"].startswith("imageList.0.data: ")
    assert answer.json()["error"]["param"] == "imageList"


def test_images_cannot_be_described(sd: httpx.Client) -> None:
    answer = sd.post("interrogate", json={"image": url(png(noise())), "model": "clip"})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (400, "unsupported_operation")
    assert "no model that describes" in error["message"]


def test_a_deadline_is_the_server_s_and_no_field(fake_settings: Configure) -> None:
    app = create_app(fake_settings(sdapi=True, timeout_s=0.5), worker=fake_worker.main)
    with (
        serving(app) as address,
        httpx.Client(base_url=f"{address}/sdapi/v1/", timeout=20) as client,
    ):
        wait_until(lambda: client.get(at_root(client, "/readyz")).status_code == 200)
        answer = client.post("txt2img", json={"prompt": "hold"})
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == ("deadline_exceeded", None)
    assert error["message"].startswith("PAELLERA_TIMEOUT_S passed")


# ── parameters of images ──────────────────────────────────────────────────────────────────────────


def test_png_info_reads_what_the_images_hold_and_it_draws_them_again(sd: httpx.Client) -> None:
    answer = post(sd, "txt2img", prompt="a ball: red, round", negative_prompt="blur", cfg_scale=4)
    (image,) = answer["images"]
    info = post(sd, "png-info", image=image)
    text = json.loads(answer["info"])["infotexts"][0]
    assert (info["info"], info["items"]["parameters"]) == (text, text)
    found = info["parameters"]
    assert (found["Prompt"], found["Negative prompt"], found["Size-1"], found["Size-2"]) == (
        "a ball: red, round",
        "blur",
        "64",
        "32",
    )
    again = post(
        sd,
        "txt2img",
        prompt=found["Prompt"],
        negative_prompt=found["Negative prompt"],
        seed=found["Seed"],
        steps=found["Steps"],
        cfg_scale=found["CFG scale"],
        sampler_name=found["Sampler"],
    )
    assert again["images"] == [image]


def test_png_info_of_other_images(sd: httpx.Client) -> None:
    native = sd.post(at_root(sd, "/generate"), json={"prompt": "a ball", "seed": 5}).content
    assert post(sd, "png-info", image=url(native))["parameters"]["seed"] == 5
    empty = post(sd, "png-info", image=url(png(noise())))
    assert (empty["info"], empty["parameters"]["Prompt"]) == ("", "")
    assert refused(sd, "png-info", image=url(b"no image"))[1] == "unsupported_image_format"


# ── progress and interruption ─────────────────────────────────────────────────────────────────────


def running(client: httpx.Client) -> int:
    return int(client.get("progress").json()["state"]["job_count"])


def test_an_idle_server_says_so(sd: httpx.Client) -> None:
    idle = sd.get("progress").json()
    assert (idle["progress"], idle["eta_relative"], idle["current_image"]) == (0, 0, None)
    assert idle["state"] == {
        "skipped": False,
        "interrupted": False,
        "stopping_generation": False,
        "job": "",
        "job_count": 0,
        "job_timestamp": "0",
        "job_no": 0,
        "sampling_step": 0,
        "sampling_steps": 0,
    }


def test_a_running_request_has_a_progress_and_an_interrupted_one_without_previews_is_499(
    sd: httpx.Client,
) -> None:
    with concurrent.futures.ThreadPoolExecutor() as threads:
        held = threads.submit(sd.post, "txt2img", json={"prompt": "hold"})
        wait_until(lambda: sd.get("progress").json()["state"]["sampling_steps"] == 12)
        state = sd.get("progress").json()
        assert 0 < state["progress"] < 1
        assert state["progress"] == round(state["progress"], 4)
        assert state["eta_relative"] == round(state["eta_relative"], 3)
        assert (state["state"]["job"], state["state"]["job_count"]) == ("txt2img", 1)
        assert state["state"]["interrupted"] is False
        assert sd.post("interrupt").json() == {}
        assert (held.result().status_code, held.result().json()["error"]["code"]) == (
            499,
            "cancelled",
        )
        wait_until(lambda: not running(sd))


def test_previews_are_shown_meanwhile_and_are_the_images_of_an_interrupted_request(
    sd: httpx.Client,
) -> None:
    with concurrent.futures.ThreadPoolExecutor() as threads:
        held = threads.submit(post, sd, "txt2img", prompt="show-hold", seed=5)
        wait_until(lambda: sd.get("progress").json()["current_image"] is not None)
        wait_until(lambda: sd.get("progress").json()["progress"] >= PREVIEWS / (PREVIEWS + 1))
        state = sd.get("progress").json()
        latest = tuple(fake_worker.colour(PREVIEWS - 1))
        assert tuple(pixels(state["current_image"])[0, 0]) == latest
        assert state["state"]["sampling_step"] >= 8
        assert state["eta_relative"] >= 0
        skipped = sd.get("progress", params={"skip_current_image": "true"}).json()
        assert skipped["current_image"] is None
        sd.post("interrupt")
        answer = held.result()
    assert [tuple(pixels(image)[0, 0]) for image in answer["images"]] == [latest]
    info = json.loads(answer["info"])
    assert info["extra_generation_params"] == {"Interrupted": True}
    assert info["all_seeds"] == [5]


@virtual_time
async def test_progress_follows_the_previews_or_the_predicted_time_whichever_is_further() -> None:
    drawing = Drawing("txt2img", began=time.monotonic())
    assert drawing.steps == 0
    drawing.plan = Plan("generate", job(rows=2, previews=2), (32, 16))
    assert drawing.steps == 10
    await asyncio.sleep(4)
    assert drawing.progress == LEAST_PROGRESS
    drawing.admit(Forecast(0, 8.0))
    assert drawing.progress == LEAST_PROGRESS
    await asyncio.sleep(2)
    assert drawing.progress == pytest.approx(2 / 8)
    # If six seconds were a quarter of it.
    assert drawing.eta_s == pytest.approx(18)
    # (image, preview, progress): each image has two previews, and a third part after them.
    for index, number, progress in ((0, 0, 2 / 8), (1, 1, 3 / 6), (0, 1, 4 / 6)):
        drawing.preview(Preview("id", number, 1, picture(index)))
        assert drawing.progress == pytest.approx(progress)
    await asyncio.sleep(5)
    assert drawing.progress == pytest.approx(7 / 8)
    await asyncio.sleep(5)
    assert drawing.progress == MOST_PROGRESS


async def test_a_request_that_is_predicted_to_take_no_time_has_a_progress() -> None:
    drawing = Drawing("txt2img")
    drawing.admit(Forecast(0, 0.0))
    assert drawing.progress == LEAST_PROGRESS


async def test_a_drawn_request_keeps_no_previews_and_cannot_be_interrupted() -> None:
    drawing = Drawing("txt2img")
    preview = Preview("id", 0, 1, Image(0, 1, 1, b"123"))
    drawing.preview(preview)
    drawing.shown = preview, asyncio.get_running_loop().create_future()
    drawing.finish_drawing()
    assert (drawing.previews, drawing.shown, drawing.progress) == ({}, None, MOST_PROGRESS)
    drawing.interrupt()
    assert not drawing.interrupted.done()


async def test_an_interrupted_request_keeps_its_previews_although_it_is_drawn_then() -> None:
    drawing = Drawing("txt2img")
    drawing.preview(Preview("id", 0, 1, Image(0, 1, 1, b"123")))
    drawing.interrupt()
    drawing.finish_drawing()
    assert drawing.interrupted.done()
    assert len(drawing.previews) == 1


async def test_a_client_s_requests_are_those_that_still_run_the_oldest_first() -> None:
    clients = Clients()
    with clients.drawing("one", "txt2img") as first:
        with clients.drawing("one", "img2img") as second:
            assert clients.drawings("one") == [first, second]
            assert clients.drawings("other") == []
        assert clients.drawings("one") == [first]
        clients.interrupt("one")
        assert (first.interrupted.done(), second.interrupted.done()) == (True, False)
    assert clients.drawings("one") == []


async def test_an_interrupted_request_s_work_has_ended_when_it_is_answered() -> None:
    drawing, ended = Drawing("txt2img"), list[str]()
    task = asyncio.create_task(drawing.unless_interrupted(endless(ended)))
    await settle()
    drawing.interrupt()
    assert await task is None
    assert ended == ["work"]


@pytest.mark.parametrize(("images", "previews"), [(1, 2), (2, 1), (3, 1), (16, 1)])
def test_a_request_has_two_previews_together_and_one_of_each_image_at_least(
    images: int, previews: int
) -> None:
    off = {"live_previews_enable": False}
    for sent, expected in (({}, (True, previews)), (off, (False, 0))):
        request = Txt2ImgRequest(batch_size=images, override_settings=sent)
        fields = request.native(micro_config(), SETTINGS)[1]
        assert (fields["stream"], fields["partial_images"]) == expected


def test_previews_can_be_switched_off(sd: httpx.Client) -> None:
    off = {"override_settings": {"live_previews_enable": False}}
    with concurrent.futures.ThreadPoolExecutor() as threads:
        held = threads.submit(sd.post, "txt2img", json={"prompt": "show-hold", **off})
        wait_until(lambda: sd.get("progress").json()["state"]["sampling_steps"] == 12)
        sd.post("interrupt")
        assert held.result().status_code == 499


@pytest.mark.parametrize("path", ["interrupt", "skip"])
def test_a_client_sees_and_ends_only_its_own_requests(fake_settings: Configure, path: str) -> None:
    settings = fake_settings(sdapi=True, api_keys=f"{KEY},{OTHER}", key_concurrency=1)
    with (
        serving(create_app(settings, worker=fake_worker.main)) as address,
        httpx.Client(base_url=f"{address}/sdapi/v1/", auth=("me", KEY), timeout=20) as mine,
        httpx.Client(base_url=f"{address}/sdapi/v1/", auth=("you", OTHER), timeout=20) as yours,
        concurrent.futures.ThreadPoolExecutor() as threads,
    ):
        wait_until(lambda: mine.get(at_root(mine, "/readyz")).status_code == 200)
        held = threads.submit(mine.post, "txt2img", json={"prompt": "hold"})
        wait_until(lambda: running(mine) == 1)
        assert running(yours) == 0
        assert yours.post(path).status_code == 200
        assert running(mine) == 1
        # Although the key's only concurrent request is running.
        assert mine.post(path).status_code == 200
        assert held.result().status_code == 499


def test_a_repeat_under_an_idempotency_key_gets_the_first_answer(sd: httpx.Client) -> None:
    headers = {"Idempotency-Key": "mine"}
    body = {"prompt": "a ball", "seed": -1}
    first, again = (sd.post("txt2img", json=body, headers=headers) for _ in range(2))
    assert again.json() == first.json()
    assert again.headers["idempotent-replayed"] == "true"
    other = sd.post("txt2img", json={"prompt": "a box"}, headers=headers)
    assert other.json()["error"]["code"] == "idempotency_mismatch"


# ── keys ──────────────────────────────────────────────────────────────────────────────────────────


def test_a_key_may_be_the_password_of_http_basic_here_alone(fake_settings: Configure) -> None:
    client = asking(fake_settings(sdapi=True, api_keys=KEY))

    def status(path: str, **options: Any) -> int:
        return int(client.get(path, **options).status_code)

    path = "/sdapi/v1/samplers"
    assert status(path, auth=("anybody", KEY)) == 200
    assert status(path, headers=AUTHORIZED) == 200
    assert status(path, auth=("anybody", f"{KEY}x")) == 401
    assert status(path, auth=(KEY, "")) == 401
    for malformed in ("Basic", "Basic ä", "Basic !!!", "Basic YQ==", f"Basic {KEY}", ""):
        assert status(path, headers={"Authorization": malformed.encode()}) == 401
    assert client.get(path).headers["www-authenticate"].startswith("Basic ")
    assert status("/v1/models", auth=("anybody", KEY)) == 401
    assert client.get("/v1/models").headers["www-authenticate"].startswith("Bearer ")
    without = asking(fake_settings(api_keys=KEY)).get(path, auth=("anybody", KEY))
    assert without.status_code == 401
    assert without.headers["www-authenticate"].startswith("Bearer ")


# ── models and lists ──────────────────────────────────────────────────────────────────────────────


def test_the_model_is_chosen_by_name_title_or_hash_if_it_is_loaded(sd: httpx.Client) -> None:
    (model,) = sd.get("sd-models").json()
    assert model["title"] == f"{NAME} [{model['hash']}]"
    assert len(model["sha256"]) == 64
    assert model["hash"] == model["sha256"][:10]
    assert sd.get("options").json() == {
        "sd_model_checkpoint": model["title"],
        "sd_checkpoint_hash": model["sha256"],
        "sd_vae": "Automatic",
        "CLIP_stop_at_last_layers": 1,
        "enable_pnginfo": True,
        "samples_format": "png",
        "live_previews_enable": True,
        "live_previews_image_format": "png",
    }
    for name in (NAME, model["title"], model["title"].upper(), model["hash"], f"{NAME}.ckpt"):
        assert sd.post("options", json={"sd_model_checkpoint": name, "x": 1}).json() is None
        assert drawn(sd, override_settings={"sd_model_checkpoint": name})["sd_model_name"] == NAME
    refusal = (404, "model_not_found", "sd_model_checkpoint")
    assert refused(sd, "options", sd_model_checkpoint="sdxl") == refusal
    assert sd.post("options", json=sd.get("options").json()).status_code == 200


def test_each_client_s_choice_is_its_own() -> None:
    clients = Clients()
    clients.choose("one", "tiny")
    assert (clients.chosen("one"), clients.chosen("other")) == ("tiny", None)


def test_beyond_the_most_choices_the_client_that_has_not_chosen_for_longest_is_forgotten() -> None:
    clients = Clients()
    clients.choose("one", "tiny")
    for number in range(MAX_CHOICES - 1):
        clients.choose(str(number), "tiny")
    assert clients.chosen("one") == "tiny"
    clients.choose("one", "large")
    clients.choose("late", "tiny")
    choices = [clients.chosen(client) for client in ("0", "1", "one", "late")]
    assert choices == [None, "tiny", "large", "tiny"]


def upscaler(name: str) -> dict[str, Any]:
    return {"name": name, "model_name": None, "model_path": None, "model_url": None, "scale": 4}


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        (
            "schedulers",
            [
                {
                    "name": "automatic",
                    "label": "Automatic",
                    "aliases": None,
                    "default_rho": -1,
                    "need_inner_model": False,
                }
            ],
        ),
        ("upscalers", [upscaler(name) for name in ("None", "Lanczos", "Nearest", "Paella")]),
        ("latent-upscale-modes", [{"name": "Paella"}]),
        ("sd-vae", []),
        ("loras", []),
        ("embeddings", {"loaded": {}, "skipped": {}}),
        ("hypernetworks", []),
        ("face-restorers", []),
        ("realesrgan-models", []),
        ("prompt-styles", []),
        ("scripts", {"txt2img": [], "img2img": []}),
        ("script-info", []),
        ("extensions", []),
        ("cmd-flags", {"api": True, "nowebui": True}),
    ],
)
def test_the_lists_that_clients_ask_for_are_there(
    sd: httpx.Client, path: str, expected: object
) -> None:
    answer = sd.get(path)
    assert (answer.status_code, answer.json()) == (200, expected)


@pytest.mark.parametrize(
    "path",
    [
        "refresh-checkpoints",
        "refresh-vae",
        "refresh-loras",
        "reload-checkpoint",
        "unload-checkpoint",
    ],
)
def test_what_cannot_change_is_accepted_without_effect(sd: httpx.Client, path: str) -> None:
    before = sd.get("options").json()
    answer = sd.post(path)
    assert (answer.status_code, answer.json()) == (200, None)
    assert sd.get("options").json() == before


def test_samplers_begin_with_the_recipe_s_and_memory_is_in_bytes(sd: httpx.Client) -> None:
    samplers = [sampler["name"] for sampler in sd.get("samplers").json()]
    assert samplers[0] == "multinomial"
    assert set(samplers) == {"multinomial", "argmax", "typical", "quant"}
    ram = sd.get("memory").json()["ram"]
    assert math.isclose(ram["free"] + ram["used"], ram["total"])
    assert ram["used"] > 2**20


def test_a_path_of_two_methods_names_both(sd: httpx.Client) -> None:
    answer = sd.put("options", json={})
    assert (answer.status_code, answer.headers["allow"]) == (405, "GET, HEAD, POST")
    assert sd.get("interrupt").headers["allow"] == "POST"


GETS = ("options", "sd-models", "samplers", "progress", "memory")


def test_the_document_has_them_and_unknown_fields_are_allowed(sd: httpx.Client) -> None:
    document = sd.get(at_root(sd, "/openapi.json")).json()
    operation = document["paths"]["/sdapi/v1/img2img"]["post"]
    assert operation["requestBody"]["required"] is True
    assert "Idempotency-Key" in [each["name"] for each in operation["parameters"]]
    schema = body_schema(document, "/sdapi/v1/img2img")
    assert "additionalProperties" not in schema
    assert schema["required"] == ["init_images"]
    batch = body_schema(document, "/sdapi/v1/extra-batch-images")
    assert batch["properties"]["imageList"]["items"] == {"$ref": "#/components/schemas/BatchEntry"}
    entry = document["components"]["schemas"]["BatchEntry"]
    assert entry["required"] == ["data"]
    paths = document["paths"]
    summaries = {path: paths[f"/sdapi/v1/{path}"]["get"]["summary"] for path in GETS}
    assert summaries["sd-models"] == "Return the loaded weights"
    assert all(each.startswith("Return ") and "." not in each for each in summaries.values())
    for path in ("img2img", "options"):
        assert {"400", "404", "415", "422"} <= set(paths[f"/sdapi/v1/{path}"]["post"]["responses"])
    assert not {"200", "422"} & set(paths["/sdapi/v1/interrogate"]["post"]["responses"])
