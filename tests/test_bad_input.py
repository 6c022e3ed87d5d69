"""Whatever a client sends, it gets a 4xx in the one error shape that names the field, quickly,
and the server goes on.
"""

from __future__ import annotations

import base64
import http.client
import json
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from pydantic import BaseModel, ValidationError

from server.api import create_app
from server.api.schemas import (
    AttentionWeights,
    EditOrInpaintRequest,
    EditRequest,
    GenerateRequest,
    Hires,
    InpaintRequest,
    InterpolateRequest,
    OutpaintRequest,
    RegionEntry,
    UpscaleRequest,
    VariationsRequest,
)
from server.settings import Settings
from tests import fake_worker
from tests.conftest import serving, wait_until
from tests.support.images import noise, png

pytestmark = pytest.mark.process

JSON = {"Content-Type": "application/json"}


def refused(
    answer: httpx.Response, status: int, param: str | None = None, mention: str = ""
) -> None:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param
    assert mention in error["message"]
    assert len(error["message"]) < 500
    assert "Traceback" not in answer.text


def raw(client: httpx.Client, body: bytes | str) -> httpx.Response:
    return client.post("/generate", content=body, headers=JSON)


@pytest.mark.parametrize(
    ("field", "value", "mention"),
    [
        ("prompt", "", "required: text of 1 to 32000 characters"),
        ("prompt", " \t\n\u3000", "white space"),
        ("prompt", "\x1d\x85\ufeff", "white space"),
        ("prompt", "\u200b\u200d\u2060\xad\ufe0f\u3164", "invisible"),
        ("prompt", "x" * 32_001, "text of 1 to 32000 characters (sent: 32001 characters)"),
        ("prompt", "a\0b", "NUL"),
        ("prompt", 7, "must be text of 1 to"),
        ("prompt", None, "required: text of 1 to"),
        ("prompt", ["a"], "must be text of 1 to"),
        ("negative_prompt", "x" * 32_001, "text of at most 32000 characters"),
        ("n", 0, "a whole number from 1 to 16"),
        ("n", 17, "sent: 17"),
        ("n", True, "a whole number"),
        ("n", 2.5, "a whole number"),
        ("n", "2", "a whole number"),
        ("seed", 2**63, "to 9223372036854775807"),
        ("seed", -(2**63) - 1, "from -9223372036854775808"),
        ("seed", 10**400, "sent: 1000"),
        ("seed", 1.5, "a whole number"),
        ("seed", False, "a whole number"),
        ("width", 17, "multiple of 16"),
        ("width", 0, "a multiple of the weights' size_step"),
        ("width", "wide", "a whole number"),
        ("width", 10**9, "512"),
        ("height", 528, "512"),
        ("height", -16, "sent: -16"),
        ("num_inference_steps", 0, "from 1 to 64"),
        ("num_inference_steps", 65, "64"),
        ("guidance_scale", 30.01, "30"),
        ("guidance_scale", [1, 31], "30"),
        ("guidance_scale", [1], "must be a number from 0 to 30 or a list of 2"),
        ("guidance_scale", [1, 2, 3], "at most 2 entries"),
        ("guidance_scale", True, "a number from 0 to 30"),
        ("guidance_scale", "8", "a number from 0 to 30"),
        ("temperature", 0.04, "0.05"),
        ("temperature", [0.5, 5.1], "5"),
        ("temperature", {}, "a number from 0.05 to 5"),
        ("sampler", "euler", "must be multinomial, "),
        ("typical_mass", 1.1, "from 0 to 1"),
        ("renoise_steps", 13, "num_inference_steps, which is 12"),
        ("guidance_steps", 13, "num_inference_steps, which is 12"),
        ("guidance_steps", -1, "from 0 to 64"),
        ("response_format", "bmp", "must be png, jpeg, webp, json or url (sent: 'bmp')"),
        ("quality", 101, "100"),
        ("timeout_s", 0.04, "0.05"),
        ("timeout_s", 601, "600"),
        ("priority", "urgent", "must be interactive or batch"),
        ("deterministic", 1, "must be true or false"),
        ("promt", "a ball", "unknown field; did you mean prompt? the fields are"),
        ("stream", 1, "must be true or false"),
        ("partial_images", 9, "from 0 to 8"),
    ],
)
def test_a_field_out_of_bounds_is_422_and_named(
    client: httpx.Client, field: str, value: object, mention: str
) -> None:
    refused(client.post("/generate", json={"prompt": "a ball", field: value}), 422, field, mention)


IMAGE = {"image": b"a file"}
PROMPT = {"prompt": "a ball"}
REGION = {**PROMPT, "box": [0, 0, 1, 1]}
KEYFRAMES = {"keyframes": [PROMPT, PROMPT]}


@pytest.mark.parametrize(
    ("schema", "sent", "field", "least", "most"),
    [
        (GenerateRequest, PROMPT, "n", 1, 16),
        (GenerateRequest, PROMPT, "num_inference_steps", 1, 64),
        (GenerateRequest, PROMPT, "guidance_scale", 0, 30.0),
        (GenerateRequest, PROMPT, "temperature", 0.05, 5),
        (GenerateRequest, PROMPT, "typical_mass", 0, 1.0),
        (GenerateRequest, PROMPT, "renoise_steps", 0, 64),
        (GenerateRequest, PROMPT, "guidance_steps", 0, 64),
        (GenerateRequest, PROMPT, "guidance_start", 0, 1.0),
        (GenerateRequest, PROMPT, "guidance_end", 0, 1.0),
        (GenerateRequest, PROMPT, "timeout_s", 0.05, 600),
        (GenerateRequest, PROMPT, "partial_images", 0, 8),
        (GenerateRequest, PROMPT, "width", 1, None),
        (GenerateRequest, PROMPT, "height", 1, None),
        (GenerateRequest, PROMPT, "quality", 1, 100),
        (AttentionWeights, {}, "text", 0, 100.0),
        (RegionEntry, REGION, "weight", 0, 1.0),
        (RegionEntry, REGION, "softness", 0, 1.0),
        (Hires, {}, "scale", 1, 4.0),
        (Hires, {}, "strength", 0, 1.0),
        (Hires, {}, "steps", 1, 64),
        (InpaintRequest, PROMPT | IMAGE, "feather", 0, 64),
        *((OutpaintRequest, IMAGE, side, 0, 4096) for side in ("left", "right", "up", "down")),
        (EditRequest, PROMPT | IMAGE, "strength", 0, 1.0),
        (UpscaleRequest, IMAGE, "scale", 1, 4.0),
        (UpscaleRequest, IMAGE, "strength", 0, 0.6),
        (InterpolateRequest, KEYFRAMES, "frames", 2, 64),
    ],
)
def test_a_number_may_be_as_small_and_as_large_as_its_bounds(
    schema: type[BaseModel], sent: dict[str, Any], field: str, least: float, most: float | None
) -> None:
    """A bound that is a float is that of a number with a fraction."""
    ends = [least] if most is None else [least, most]
    step = 0.01 if float in map(type, ends) else 1
    for end, beyond in zip(ends, (-step, step), strict=False):
        schema.model_validate(sent | {field: end})
        with pytest.raises(ValidationError, match=field):
            schema.model_validate(sent | {field: end + beyond})


@pytest.mark.parametrize(
    ("schema", "sent", "field", "entry", "least", "most"),
    [
        (GenerateRequest, {}, "prompt", "x", 1, 32_000),
        (GenerateRequest, PROMPT, "negative_prompt", "x", 0, 32_000),
        (GenerateRequest, PROMPT, "preset", "x", 0, 64),
        (GenerateRequest, PROMPT, "model", "x", 0, 64),
        (GenerateRequest, PROMPT, "model_sha256", "x", 0, 64),
        (GenerateRequest, PROMPT, "regions", REGION, 0, 8),
        (InpaintRequest, PROMPT | IMAGE, "references", b"a file", 0, 15),
        (EditRequest, PROMPT | IMAGE, "references", b"a file", 0, 15),
        (VariationsRequest, {}, "image", b"a file", 1, 8),
        (VariationsRequest, IMAGE, "weights", 1, 0, 8),
        (InterpolateRequest, {}, "keyframes", PROMPT, 2, 8),
    ],
)
def test_a_text_and_a_list_may_be_as_short_and_as_long_as_their_bounds(
    schema: type[BaseModel], sent: dict[str, Any], field: str, entry: Any, least: int, most: int
) -> None:
    def value(count: int) -> Any:
        return entry * count if isinstance(entry, str) else [entry] * count

    for count in (least, most):
        schema.model_validate(sent | {field: value(count)})
    for count in ([least - 1] if least else []) + [most + 1]:
        with pytest.raises(ValidationError, match=field):
            schema.model_validate(sent | {field: value(count)})


@pytest.mark.parametrize(
    ("schema", "sent", "defaults"),
    [
        (GenerateRequest, PROMPT, {"n": 1, "quality": 90, "partial_images": 0, "stream": False}),
        (AttentionWeights, {}, {"text": 1, "image": 1}),
        (RegionEntry, REGION, {"weight": 1, "softness": 0}),
        (Hires, {}, {"scale": 2, "strength": 0.3}),
        (InpaintRequest, PROMPT | IMAGE, {"keep_unmasked": True, "feather": 8}),
        (OutpaintRequest, IMAGE, {"left": 0, "right": 0, "up": 0, "down": 0, "feather": 8}),
        (EditRequest, PROMPT | IMAGE, {"strength": 0.6}),
        (EditOrInpaintRequest, PROMPT | IMAGE, {"keep_unmasked": True, "feather": 8}),
        (UpscaleRequest, IMAGE, {"scale": 2, "strength": 0.3}),
        (InterpolateRequest, KEYFRAMES, {"frames": 16}),
    ],
)
def test_a_request_without_a_number_or_a_switch_has_the_documented_one(
    schema: type[BaseModel], sent: dict[str, Any], defaults: dict[str, Any]
) -> None:
    assert schema.model_validate(sent).model_dump(include=set(defaults)) == defaults


@pytest.mark.parametrize("field", ["model", "sampler", "seed", "negative_prompt", "n", "colour"])
def test_what_is_left_blank_is_absent(client: httpx.Client, field: str) -> None:
    assert client.post("/generate", json={"prompt": "a ball", field: ""}).status_code == 200
    parts = {"prompt": (None, "a ball"), field: (None, "")}
    assert client.post("/generate", files=parts).status_code == 200


def test_what_is_left_blank_in_an_object_is_absent_in_json_as_in_a_form(
    client: httpx.Client,
) -> None:
    region = {"prompt": "a box", "box": [0, 0, 1, 1], "mask": "", "weight": ""}
    fields = {"prompt": "a ball", "regions": [region], "hires": {"scale": 2, "steps": ""}}
    assert client.post("/generate", json=fields).status_code == 200
    keyframes = [
        {"prompt": "a ball", "image": ""},
        {"prompt": "", "image": base64.b64encode(png(noise())).decode()},
    ]
    answer = client.post("/interpolate", json={"keyframes": keyframes, "frames": 2})
    assert answer.status_code == 200, answer.text
    blank = client.post(
        "/generate", json={"prompt": "a ball", "regions": [region | {"prompt": ""}]}
    )
    refused(blank, 422, "regions", "regions.0.prompt: required")


def test_null_is_absent_in_every_field_as_serializers_write_it(client: httpx.Client) -> None:
    nulls = dict.fromkeys([*GenerateRequest.model_fields, "colour"])
    answer = client.post("/generate", json=nulls | {"prompt": "a ball"})
    assert answer.status_code == 200, answer.text
    region = dict.fromkeys(RegionEntry.model_fields) | {"prompt": "a box", "box": [0, 0, 1, 1]}
    fields = {"prompt": "a ball", "regions": [region], "hires": {"scale": 2, "steps": None}}
    assert client.post("/generate", json=fields).status_code == 200
    refused(client.post("/generate", json={"prompt": None}), 422, "prompt", "required")
    refused(client.post("/generate", json={"prompt": "a", "regions": [None]}), 422, "regions", "")


@pytest.mark.parametrize("schema", [EditRequest, InpaintRequest])
def test_null_in_place_of_images_that_may_be_absent_is_none_of_them(
    schema: type[EditRequest | InpaintRequest],
) -> None:
    assert schema.model_validate(PROMPT | IMAGE | {"references": None}).references == []


def test_partial_images_without_a_stream_are_ignored(client: httpx.Client) -> None:
    answer = client.post("/generate", json={"prompt": "show", "partial_images": 2})
    assert (answer.status_code, answer.headers["content-type"]) == (200, "image/png")


def test_the_prompt_is_required(client: httpx.Client) -> None:
    refused(client.post("/generate", json={}), 422, "prompt", "required")


def test_a_list_that_is_too_short_is_not_absent(client: httpx.Client) -> None:
    for value in ([1], []):
        answer = client.post("/generate", json={"prompt": "a ball", "guidance_scale": value})
        assert answer.json()["error"]["code"] == "invalid_value"


def test_formats_may_be_written_in_upper_case(client: httpx.Client) -> None:
    fields = {"prompt": "a ball", "response_format": "JPG"}
    assert client.post("/generate", json=fields).headers["content-type"] == "image/jpeg"
    fields = {"prompt": "a ball", "output_format": "PNG", "response_format": "B64_JSON"}
    assert client.post("/v1/images/generations", json=fields).json()["output_format"] == "png"


def test_an_image_of_recorded_parameters_is_a_digest_and_no_url(client: httpx.Client) -> None:
    image = {"prompt": "a ball", "response_format": "json"}
    sent = client.post("/generate", json=image).json()["images"][0]["b64_json"]
    drawn = client.post("/edit", json={**image, "image": sent}).json()["parameters"]
    again = {"prompt": drawn["prompt"], "image": drawn["image"]}
    refused(client.post("/edit", json=again), 422, "image", "the digest of the image")


def test_unknown_weights_are_404_and_the_known_ones_listed(client: httpx.Client) -> None:
    refused(
        client.post("/generate", json={"prompt": "a ball", "model": "big"}), 404, "model", "fake"
    )


@pytest.mark.parametrize(
    ("body", "mention"),
    [
        ("", "Expecting value"),
        ("{", "line 1"),
        ('{"prompt": "a\tball"}', "Invalid control character at line 1, column 14"),
        ('{"image": "QUJD\nREVG"}', "base64 needs none (base64 -w0 FILE)"),
        ('{"image": "QUJD\r\nREVG"}', "JSON writes as \\n"),
        ('{"prompt": "a ball"', "delimiter"),
        ('{"prompt": "a ball", "guidance_scale": NaN}', "NaN"),
        ('{"prompt": "a ball", "guidance_scale": -Infinity}', "Infinity"),
        ('{"prompt": "a ball", "seed": ' + "9" * 5000 + "}", "number has too many digits"),
        ("[" * 50_000 + "]" * 50_000, "too deeply"),
        ('{"a":' * 20_000 + "1" + "}" * 20_000, "too deeply"),
        (b'{"prompt": "\xff\xfe"}', "UTF-8"),
        ("prompt=a+ball", "Expecting value"),
    ],
)
def test_malformed_json_is_400(client: httpx.Client, body: bytes | str, mention: str) -> None:
    refused(raw(client, body), 400, None, mention)


@pytest.mark.parametrize("body", ["[]", "null", '"a ball"', "7", '[{"prompt": "a ball"}]'])
def test_json_that_is_not_an_object_is_422(client: httpx.Client, body: str) -> None:
    refused(raw(client, body), 422, None, "object")


@pytest.mark.parametrize("escape", ["\\ud800", "\\udc00", "\\ud800\\ud800", "\\udfff\\ud800"])
def test_a_lone_surrogate_is_422(client: httpx.Client, escape: str) -> None:
    refused(raw(client, f'{{"prompt": "a {escape} ball"}}'), 422, "prompt")
    refused(raw(client, f'{{"prompt": "a ball", "a{escape}": 1}}'), 422, "a" + escape)
    inner = raw(client, f'{{"prompt": "a ball", "hires": {{"a{escape}": 1}}}}')
    refused(inner, 422, "hires", "a" + escape)


@pytest.mark.parametrize("number", ["1e999", "-1e999"])
def test_a_number_beyond_floating_point_is_422(client: httpx.Client, number: str) -> None:
    refused(raw(client, f'{{"prompt": "a ball", "temperature": {number}}}'), 422, "temperature")


def test_of_a_repeated_field_the_last_counts(client: httpx.Client) -> None:
    answer = raw(client, '{"prompt": "a ball", "seed": 1, "seed": 2}')
    assert (answer.status_code, answer.headers["x-seed"]) == (200, "2")


def test_an_unknown_fields_long_name_is_shortened(client: httpx.Client) -> None:
    refused(client.post("/generate", json={"prompt": "a ball", "x" * 50_000: 1}), 422, "x" * 80)
    inner = client.post("/generate", json={"prompt": "a ball", "hires": {"x" * 50_000: 1}})
    refused(inner, 422, "hires", f"hires.{'x' * 80}: unknown field; the fields are scale")


@pytest.mark.parametrize(
    "prompt",
    [
        "🎨🐈‍⬛ a cat",
        "كرة حمراء على طاولة",
        "\u202eright to left\u202c",
        "🎨" * 32_000,
        "x" * 32_000,
        "z̷̡̛a̴lgo",
        "'; DROP TABLE images; --",
        "{{7*7}} ${x} %s\r\nX-Seed: 1",
    ],
)
def test_unusual_prompts_work(client: httpx.Client, prompt: str) -> None:
    answer = client.post("/generate", json={"prompt": prompt, "response_format": "json"})
    assert answer.json()["parameters"]["prompt"] == prompt
    assert client.post("/generate", json={"prompt": prompt}).status_code == 200


@pytest.mark.parametrize(
    "content_type",
    [None, "text/plain", "application/x-www-form-urlencoded", "application/jsonp", "é", "/"],
)
def test_another_content_type_is_415(client: httpx.Client, content_type: str | None) -> None:
    headers = [] if content_type is None else [(b"Content-Type", content_type.encode())]
    refused(
        client.post("/generate", content=b'{"prompt": "a ball"}', headers=headers),
        415,
        None,
        "application/json",
    )


def test_the_content_types_parameters_and_case_do_not_matter(client: httpx.Client) -> None:
    answer = client.post(
        "/generate",
        content=b'{"prompt": "a ball"}',
        headers={"Content-Type": "Application/JSON; charset=utf-8"},
    )
    assert answer.status_code == 200


@pytest.mark.parametrize(
    "body",
    [b"[" + b"[]," * 3_000_000, b"{" + b",".join(b'"k%d":1' % i for i in range(800_000))],
    ids=["many lists", "many fields"],
)
def test_ten_megabytes_of_intricate_json_are_413_before_they_are_parsed(
    client: httpx.Client, body: bytes
) -> None:
    """Were they parsed first, they would be 400: their last bracket is missing."""
    refused(raw(client, body), 413, None, "brackets")


def test_a_prompt_of_ten_megabytes_is_too_long(client: httpx.Client) -> None:
    refused(raw(client, b'{"prompt": "' + b"x" * 10_000_000 + b'"}'), 422, "prompt", "32000")


def test_of_thousands_of_unknown_fields_the_first_is_named_before_any_field_is_validated(
    client: httpx.Client,
) -> None:
    refused(raw(client, json.dumps({"prompt": 7} | {f"k{i}": 1 for i in range(10_000)})), 422, "k0")


def chunks(count: int) -> Iterator[bytes]:
    for _ in range(count):
        yield b" " * 1000


def form_chunks(count: int) -> Iterator[bytes]:
    """A form with one file of `count` kilobytes."""
    yield b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n'
    yield from chunks(count)
    yield b"\r\n--x--\r\n"


def test_a_body_of_unannounced_length_is_bounded_too(client: httpx.Client) -> None:
    refused(client.post("/generate", content=chunks(34_000), headers=JSON), 413, None, "bytes")


@pytest.mark.process
def test_the_configured_bound_holds_for_announced_and_streamed_bodies(
    fake_settings: Callable[..., Settings],
) -> None:
    app = create_app(fake_settings(max_body_bytes=2000), worker=fake_worker.main)
    with serving(app) as address, httpx.Client(base_url=address) as client:
        wait_until(lambda: client.get("/readyz").status_code == 200)
        assert client.post("/generate", json={"prompt": "a ball"}).status_code == 200
        refused(raw(client, b" " * 2001), 413, None, "2000")
        refused(client.post("/generate", content=chunks(3), headers=JSON), 413, None, "2000")
        form = {"Content-Type": "multipart/form-data; boundary=x"}
        refused(client.post("/inpaint", content=form_chunks(5000), headers=form), 413, None, "2000")


def test_too_much_work_is_422_with_the_figure(client: httpx.Client) -> None:
    fields: dict[str, Any] = {
        "prompt": "a ball",
        "n": 16,
        "width": 512,
        "height": 512,
        "num_inference_steps": 64,
    }
    largest = client.post("/generate", json={**fields, "num_inference_steps": 12})
    assert largest.status_code == 200, "12 guided steps of 16 such images are allowed"
    work = 16 * 512 * 512 * (64 * 2 + 4)  # 3 for decoding, 1 for the file
    refused(client.post("/generate", json=fields), 422, None, str(work))
    refused(
        client.post("/generate", json={**fields, "guidance_scale": 1}),
        422,
        None,
        str(16 * 512 * 512 * (64 + 4)),
    )
    for format in ("png", "jpeg", "webp", "json", "url"):
        answer = client.post("/generate", json={**fields, "response_format": format})
        refused(answer, 422, None, f"costs {work},")
    keyframes = {"keyframes": [{"prompt": "a ball"}] * 2, "frames": 64}
    frames = {"width": 512, "height": 512, "num_inference_steps": 12, **keyframes}
    for format, file in (("webp", 1), ("gif", 6)):
        answer = client.post("/interpolate", json={**frames, "response_format": format})
        refused(answer, 422, None, f"costs {64 * 512 * 512 * (12 * 2 + 3 + file)},")


def test_an_unknown_path_is_404(client: httpx.Client) -> None:
    refused(client.get("/no/such/path"), 404, None, "/no/such/path")
    refused(client.post("/generate/x", json={"prompt": "a ball"}), 404)


def test_a_wrong_method_is_405_and_the_right_one_named(client: httpx.Client) -> None:
    answer = client.get("/generate")
    refused(answer, 405, None, "GET")
    assert answer.headers["allow"] == "POST"


def test_a_client_that_hangs_up_in_the_middle_of_its_body_harms_nobody(
    client: httpx.Client, fake_server: str
) -> None:
    connection = http.client.HTTPConnection(urlsplit(fake_server).netloc)
    connection.putrequest("POST", "/generate")
    connection.putheader("Content-Type", "application/json")
    connection.putheader("Content-Length", "1000")
    connection.endheaders(b'{"prompt":')
    connection.close()
    assert client.post("/generate", json={"prompt": "a ball"}).status_code == 200
