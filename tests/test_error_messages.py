"""Every message about a request's fields, word for word: what is wrong, what is allowed, what was
sent, and, where it is not the same, what to send instead.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient
from pydantic import BaseModel

from server.api import create_app
from server.api.openai_schemas import EditsRequest, GenerationsRequest, VariationRequest
from server.api.planning.operations import OPERATIONS
from server.api.schemas import IMAGE_DESCRIPTION
from server.api.sdapi.schemas import (
    ExtraBatchImagesRequest,
    ExtraSingleImageRequest,
    Img2ImgRequest,
    OptionsRequest,
    PngInfoRequest,
    Txt2ImgRequest,
)
from server.api.validation import from_validation
from server.settings import Settings
from tests import fake_worker
from tests.support.error_texts import JARGON
from tests.support.images import noise, png, white

JSON = {"Content-Type": "application/json"}
FILE = IMAGE_DESCRIPTION[0].lower() + IMAGE_DESCRIPTION[1:]
IMAGE = base64.b64encode(png(noise())).decode()
MASK = base64.b64encode(png(white())).decode()
LARGE = base64.b64encode(png(noise(512, 256))).decode()
NO_IMAGE = base64.b64encode(b"no image").decode()
BALL = {"prompt": "a ball"}
REGION_FIELDS = "prompt, box, mask, weight, softness, prompt_read"
TEXT = "text of 1 to 32000 characters"

# (path, fields, message); the field at fault comes first in the message.
MESSAGES: list[tuple[str, dict[str, Any], str]] = [
    # ── text ──
    ("/generate", {}, f"prompt: required: {TEXT}"),
    ("/generate", {"prompt": ""}, f"prompt: required: {TEXT}"),
    (
        "/generate",
        {"prompt": " "},
        "prompt: must hold more than white space and invisible characters: describe the image"
        " (sent: ' ')",
    ),
    ("/generate", {"prompt": 7}, f"prompt: must be {TEXT} (sent: 7)"),
    ("/generate", {"prompt": "x" * 32_001}, f"prompt: must be {TEXT} (sent: 32001 characters)"),
    (
        "/generate",
        {"prompt": "a\0b"},
        "prompt: may not hold NUL characters; remove them (sent: 'a\\x00b')",
    ),
    (
        "/generate",
        {"prompt": "\ud800"},
        "prompt: holds half of a surrogate pair, which is no character (sent: '\\ud800')",
    ),
    # ── numbers and choices ──
    ("/generate", BALL | {"n": 17}, "n: must be a whole number from 1 to 16 (sent: 17)"),
    ("/generate", BALL | {"n": True}, "n: must be a whole number from 1 to 16 (sent: true)"),
    (
        "/generate",
        BALL | {"temperature": float("inf")},
        "temperature: must be a finite number (sent: Infinity)",
    ),
    ("/generate", BALL | {"n": "2"}, "n: must be a whole number from 1 to 16 (sent: '2')"),
    (
        "/generate",
        BALL | {"seed": 2**63},
        "seed: must be a whole number from -9223372036854775808 to 9223372036854775807"
        " (sent: 9223372036854775808)",
    ),
    (
        "/generate",
        BALL | {"guidance_scale": 31},
        "guidance_scale: must be a number from 0 to 30 or a list of 2, each a number from 0 to 30"
        " (sent: 31)",
    ),
    (
        "/generate",
        BALL | {"temperature": [1, 9]},
        "temperature.1: must be a number from 0.05 to 5 (sent: 9)",
    ),
    ("/generate", BALL | {"stream": 1}, "stream: must be true or false (sent: 1)"),
    (
        "/generate",
        BALL | {"sampler": "Euler a"},
        "sampler: must be multinomial, argmax, typical or quant (sent: 'Euler a')",
    ),
    (
        "/generate",
        BALL | {"response_format": "bmp"},
        "response_format: must be png, jpeg, webp, json or url (sent: 'bmp')",
    ),
    (
        "/generate",
        BALL | {"width": 0},
        "width: must be a multiple of the weights' size_step (GET /v1/models) above 0 (sent: 0)",
    ),
    (
        "/generate",
        BALL | {"width": 100},
        "width: must be a multiple of 16 from 16 to 512 pixels (sent: 100)",
    ),
    (
        "/generate",
        BALL | {"guidance_steps": 13},
        "guidance_steps: must be from 0 to num_inference_steps, which is 12 (sent: 13)",
    ),
    # ── names ──
    (
        "/edit",
        BALL | {"image": IMAGE, "strenght": 1},
        "strenght: unknown field; did you mean strength? the fields are ",
    ),
    (
        "/generate",
        BALL | {"model": "dall-e-3"},
        "model: unknown; loaded are fake (sent: 'dall-e-3')",
    ),
    (
        "/generate",
        BALL | {"regions": [{**BALL, "box": [0, 0, 1, 1], "hardness": 1}]},
        f"regions.0.hardness: unknown field; the fields are {REGION_FIELDS}",
    ),
    (
        "/generate",
        BALL | {"steps": 8},
        "steps: unknown field; did you mean num_inference_steps? the fields are ",
    ),
    (
        "/generate",
        BALL | {"size": "64x32"},
        "size: unknown field; did you mean width and height? the fields are ",
    ),
    (
        "/generate",
        BALL | {"num_images": 2},
        "num_images: unknown field; did you mean n? the fields are ",
    ),
    (
        "/generate",
        BALL | {"negativePrompt": "red"},
        "negativePrompt: unknown field; did you mean negative_prompt? the fields are ",
    ),
    (
        "/generate",
        BALL | {"format": "png"},
        "format: unknown field; did you mean response_format? the fields are ",
    ),
    ("/generate", BALL | {"request": "x"}, "request: unknown field; the fields are "),
    ("/generate", BALL | {"init_image": "x"}, "init_image: unknown field; the fields are "),
    (
        "/edit",
        BALL | {"image": IMAGE, "denoising_strength": 1},
        "denoising_strength: unknown field; did you mean strength? the fields are ",
    ),
    (
        "/v1/images/generations",
        BALL | {"steps": 8},
        "steps: unknown field; did you mean num_inference_steps? the fields are ",
    ),
    (
        "/v1/images/generations",
        BALL | {"format": "png"},
        "format: unknown field; did you mean output_format? the fields are ",
    ),
    # ── lists ──
    (
        "/generate",
        BALL | {"guidance_scale": [1]},
        "guidance_scale: must be a number from 0 to 30 or a list of 2, each a number from 0 to 30"
        " (sent: 1 entry)",
    ),
    (
        "/generate",
        BALL | {"temperature": []},
        "temperature: must be a number from 0.05 to 5 or a list of 2, each a number from 0.05 to 5"
        " (sent: 0 entries)",
    ),
    (
        "/generate",
        BALL | {"regions": [{**BALL, "box": [0, 0, 1]}]},
        "regions.0.box: must be a list of 4, each a number from 0 to 1 (sent: 3 entries)",
    ),
    (
        "/generate",
        BALL | {"regions": [{**BALL, "box": [0, 0, 1, 1], "weight": 2}]},
        "regions.0.weight: must be a number from 0 to 1 (sent: 2)",
    ),
    (
        "/generate",
        BALL | {"regions": [BALL]},
        "regions.0: needs a box or a mask, and not both (sent: {'prompt': 'a ball'})",
    ),
    (
        "/generate",
        BALL | {"regions": [{**BALL, "box": [0, 0, 0, 1]}]},
        "regions.0: a box is [x0, y0, x1, y1] with x0 < x1 and y0 < y1",
    ),
    ("/generate", BALL | {"regions": [BALL] * 9}, "regions: at most 8 entries (sent: 9)"),
    (
        "/interpolate",
        {"keyframes": [BALL]},
        "keyframes: must be a list of 2 to 8 (sent: 1 entry)",
    ),
    (
        "/interpolate",
        {"keyframes": [BALL, {}]},
        "keyframes.1: needs a prompt or an image, and not both (sent: {})",
    ),
    (
        "/interpolate",
        {"keyframes": [BALL, BALL], "stream": True, "response_format": "gif"},
        "response_format: frames of a stream are png, jpeg or webp (sent: 'gif')",
    ),
    (
        "/variations",
        {"image": IMAGE, "weights": [1, 1]},
        "weights: one for each image (1), at least one of them above 0 (sent: [1.0, 1.0])",
    ),
    # ── images ──
    ("/edit", BALL, f"image: required: {FILE}"),
    (
        "/edit",
        BALL | {"image": 7},
        "image: one image is expected, as a file, base64 or a data URL (sent: 7)",
    ),
    (
        "/edit",
        BALL | {"image": "https://example.org/a.png"},
        "image: https URLs are refused, because the server fetches nothing; send the image as"
        " base64, a data URL or a file (sent: 'https://example.org/a.png')",
    ),
    (
        "/edit",
        BALL | {"image": "sha256:" + "0f" * 32},
        "image: this is the digest of the image that was used, as in an image's parameters; send"
        " the image itself, as base64, a data URL or a file (sent: 'sha256:0f0f",
    ),
    (
        "/outpaint",
        {"image": IMAGE},
        "left: at least one of left, right, up and down must be above 0 (sent: 0)",
    ),
    (
        "/inpaint",
        BALL | {"image": IMAGE},
        "mask: required, unless the image is transparent where it is to be repainted",
    ),
    # ── OpenAI's ──
    (
        "/v1/images/generations",
        BALL | {"quality": "best"},
        "quality: must be auto, low, medium, high, xhigh, max, standard or hd (sent: 'best')",
    ),
    (
        "/v1/images/generations",
        BALL | {"size": "50x32"},
        "size: fake supports auto (64x32) and WIDTHxHEIGHT of any of these pixels: 16, 32, 48, ",
    ),
    (
        "/v1/images/generations",
        BALL | {"background": "transparent"},
        "background: images are opaque; send opaque or auto (sent: 'transparent')",
    ),
    (
        "/v1/images/generations",
        BALL | {"output_format": "gif"},
        "output_format: images are png, jpeg or webp (sent: 'gif')",
    ),
    (
        "/v1/images/generations",
        BALL | {"output_format": "bmp"},
        "output_format: must be png, jpeg or webp (sent: 'bmp')",
    ),
    (
        "/v1/images/generations",
        BALL | {"output_compression": 50},
        "output_compression: is for jpeg and webp; a png has no quality: send 100, or leave it out"
        " (sent: 50)",
    ),
    (
        "/v1/images/generations",
        BALL | {"svg": {"model": "x"}},
        "svg: not supported; leave it out: images are png, jpeg or webp (sent: {'model': 'x'})",
    ),
    (
        "/v1/images/generations",
        BALL | {"frame_count": 4},
        "frame_count: not supported; leave it out: POST /interpolate makes animations (sent: 4)",
    ),
    ("/v1/images/edits", BALL, "image: required: the image to edit, or a list of at most 16"),
    (
        "/v1/images/edits",
        BALL | {"image": IMAGE, "images": [IMAGE]},
        "images: send image or images, not both",
    ),
    (
        "/v1/images/edits",
        BALL | {"images": [{"file_id": "f"}]},
        "images.0: this server keeps no files, so file_id is not supported; send the image as"
        " {\"image_url\": \"data:image/png;base64,…\"} (sent: {'file_id': 'f'})",
    ),
    (
        "/v1/images/edits",
        BALL | {"images": [{"url": "x"}]},
        'images.0: an image in JSON is {"image_url": "data:image/png;base64,…"}, base64 or a data'
        " URL (sent: {'url': 'x'})",
    ),
    # ── AUTOMATIC1111 ──
    (
        "/sdapi/v1/txt2img",
        BALL | {"batch_size": 3, "n_iter": 6},
        "batch_size: must be at most 16 when multiplied by n_iter (sent: 18)",
    ),
    (
        "/sdapi/v1/txt2img",
        BALL | {"enable_hr": True, "hr_scale": 5},
        "hr_scale: the result may be 1 to 4 times as large as the drawn image: 64x32 to 256x128"
        " (sent: 5.0)",
    ),
    (
        "/sdapi/v1/txt2img",
        BALL | {"enable_hr": True, "hr_resize_x": 32, "hr_resize_y": 16},
        "hr_resize_x: the result may be 1 to 4 times as large as the drawn image: 64x32 to 256x128"
        " (sent: '32x16')",
    ),
    (
        "/sdapi/v1/txt2img",
        BALL | {"width": 512, "height": 512, "enable_hr": True, "hr_scale": 4},
        "hr_scale: the result may have at most 1024 pixels a side; 4 times the drawn 512x512 is"
        " 2048x2048",
    ),
    (
        "/sdapi/v1/txt2img",
        BALL | {"width": 512, "height": 512, "enable_hr": True, "hr_resize_y": 1536},
        "hr_resize_y: the result may have at most 1024 pixels a side; 3 times the drawn 512x512 is"
        " 1536x1536",
    ),
    (
        "/sdapi/v1/txt2img",
        BALL | {"width": 0},
        "width: must be a whole number of at least 1 (sent: 0)",
    ),
    (
        "/sdapi/v1/txt2img",
        BALL | {"override_settings": {"sd_model_checkpoint": 5}},
        "override_settings.sd_model_checkpoint: must be the name of a model (sent: 5)",
    ),
    (
        "/sdapi/v1/txt2img",
        BALL | {"override_settings": {"sd_model_checkpoint": "v1-5-pruned"}},
        "override_settings.sd_model_checkpoint: unknown; loaded are ",
    ),
    ("/sdapi/v1/img2img", BALL, "init_images: required: "),
    ("/sdapi/v1/img2img", BALL | {"init_images": []}, "init_images: one image is required"),
    (
        "/sdapi/v1/img2img",
        BALL | {"init_images": [NO_IMAGE]},
        "init_images.0: must be a PNG, JPEG, WebP, ",
    ),
    (
        "/sdapi/v1/img2img",
        BALL | {"init_images": [IMAGE], "mask": MASK, "mask_blur": -1},
        "mask_blur: must be a number of at least 0 (sent: -1)",
    ),
    (
        "/sdapi/v1/img2img",
        BALL | {"init_images": ["https://x.y/z.png"]},
        "init_images.0: https URLs are refused, because the server fetches nothing; send the image",
    ),
    (
        "/sdapi/v1/img2img",
        BALL | {"init_images": [IMAGE], "denoising_strength": 2},
        "denoising_strength: must be a number from 0 to 1 (sent: 2)",
    ),
    (
        "/sdapi/v1/extra-single-image",
        {"image": IMAGE, "upscaling_resize": 8},
        "upscaling_resize: must be a number from 1 to 4 (sent: 8)",
    ),
    (
        "/sdapi/v1/extra-single-image",
        {"image": IMAGE, "resize_mode": 1, "upscaling_resize_w": 9000},
        "upscaling_resize_w: the result may be 1 to 4 times as large as the sent image: 64x32 to"
        " 256x128 (sent: '9000x512')",
    ),
    (
        "/sdapi/v1/extra-single-image",
        {"image": LARGE, "upscaling_resize": 4},
        "upscaling_resize: the result may have at most 1024 pixels a side; 4 times the sent 512x256"
        " is 2048x1024",
    ),
    (
        "/sdapi/v1/extra-single-image",
        {"image": LARGE, "resize_mode": 1, "upscaling_resize_w": 0, "upscaling_resize_h": 768},
        "upscaling_resize_h: the result may have at most 1024 pixels a side; 3 times the sent"
        " 512x256 is 1536x768",
    ),
    ("/sdapi/v1/extra-batch-images", {}, "imageList: required: "),
    (
        "/sdapi/v1/extra-batch-images",
        {"imageList": [{"data": IMAGE}, {"data": "https://x.y/z.png"}]},
        "imageList.1.data: https URLs are refused, because the server fetches nothing; send the",
    ),
    (
        "/sdapi/v1/extra-batch-images",
        {"imageList": [{"data": IMAGE}, {"data": NO_IMAGE}]},
        "imageList.1.data: must be a PNG, JPEG, WebP, ",
    ),
    (
        "/sdapi/v1/extra-batch-images",
        {"imageList": [{"data": IMAGE}] * 17},
        "imageList: at most 16 entries (sent: 17)",
    ),
    (
        "/sdapi/v1/txt2img",
        BALL | {"steps": True},
        "steps: must be a whole number (sent: 'true')",
    ),
    (
        "/sdapi/v1/txt2img",
        BALL | {"send_images": 2},
        "send_images: must be 0, 1 or true or false (sent: 2)",
    ),
    ("/sdapi/v1/png-info", {}, "image: required: "),
    (
        "/sdapi/v1/options",
        {"sd_model_checkpoint": "x"},
        "sd_model_checkpoint: unknown; loaded are ",
    ),
]


@pytest.fixture(scope="module")
def idle(fake_settings: Callable[..., Settings]) -> TestClient:
    """A client of an app whose worker is not started: no request here gets that far."""
    return TestClient(create_app(fake_settings(sdapi=True), worker=fake_worker.main))


@pytest.mark.parametrize(("path", "fields", "message"), MESSAGES)
def test_a_message_says_what_is_wrong_and_what_is_allowed(
    idle: TestClient, path: str, fields: dict[str, Any], message: str
) -> None:
    body = json.dumps(fields).replace("Infinity", "1e999")
    answer = idle.post(path, content=body, headers=JSON)
    error = answer.json()["error"]
    wrong_status = 400 if path.startswith("/v1/") else 422
    assert answer.status_code == (404 if error["code"] == "model_not_found" else wrong_status)
    assert error["message"].startswith(message), error["message"]
    assert error["param"] == re.split(r"[.:]", message)[0]


# ── every field of every request ──────────────────────────────────────────────────────────────────

SCHEMAS: list[type[BaseModel]] = [
    *(schema for schema, _ in OPERATIONS.values()),
    GenerationsRequest,
    EditsRequest,
    VariationRequest,
    Txt2ImgRequest,
    Img2ImgRequest,
    ExtraSingleImageRequest,
    ExtraBatchImagesRequest,
    PngInfoRequest,
    OptionsRequest,
]
SENT = (object(), -(10**30), 10**30, "\ud800", "no such value", [None] * 50, {"no": "field"}, 1.5)


def wrong_values() -> Iterator[tuple[type[BaseModel], str, object]]:
    for schema in SCHEMAS:
        for name in schema.model_fields:
            for value in SENT:
                yield schema, name, value


def test_every_field_of_every_request_is_described_in_words() -> None:
    messages = []
    for schema, name, value in wrong_values():
        sent = {name: value}
        try:
            schema.model_validate(sent)
        except ValueError as error:
            refused = from_validation(error, schema, sent)  # type: ignore[arg-type]
            messages.append((schema.__name__, name, refused))
    assert len(messages) > 1000
    for place in messages:
        message = place[2].message
        assert not JARGON.search(message), place
        assert len(message) < 700, place
        assert message.startswith(f"{place[2].param}"), place
