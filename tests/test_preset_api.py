"""Presets over HTTP: how a request chooses one, what conflicts, what is told and repeated."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from model.config import BundleConfig
from server.api import create_app
from server.api.planning.work import Workload
from server.settings import Settings
from tests import fake_worker
from tests.conftest import micro_config, micro_preset_config, serving, wait_until
from tests.test_api import metric, opened
from tests.test_image_operations import as_json, noise, png, refused, white

PROMPT = {"prompt": "a ball"}
REGION = {"prompt": "a cube", "box": [0, 0, 0.5, 1]}
# Of every endpoint with steps, beside the prompt.
OPERATIONS: dict[str, dict[str, Any]] = {
    "generate": {},
    "inpaint": {"image": png(noise()), "mask": png(white())},
    "outpaint": {"image": png(noise()), "left": 16},
    "variations": {"image": [png(noise())]},
    "edit": {"image": png(noise()), "strength": 0.7},
    "upscale": {"image": png(noise())},
    "interpolate": {
        "keyframes": [{"prompt": "a ball"}, {"prompt": "a cube"}],
        "frames": 2,
        "response_format": "json",
    },
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """Weights whose default preset is `quality`, others with `fast`, and some without presets."""
    directories: list[Path] = []
    for config in (
        micro_preset_config("choosing"),
        micro_preset_config("hasty", default=True),
        micro_config("plain"),
    ):
        directories.append(tmp_path_factory.mktemp(config.name))
        config.write(directories[-1])
    settings = Settings(weights=",".join(map(str, directories)), sdapi=True)
    app = create_app(settings, worker=fake_worker.main)
    with serving(app) as address, httpx.Client(base_url=address, timeout=20) as client:
        wait_until(lambda: client.get("/readyz").status_code == 200)
        yield client


def parameters(client: httpx.Client, operation: str = "generate", **fields: Any) -> dict[str, Any]:
    """The effective parameters of a request."""
    fields = PROMPT | OPERATIONS[operation] | {"response_format": "json"} | fields
    answer = as_json(client, operation, **fields)
    assert answer.status_code == 200, answer.text
    return dict(answer.json()["parameters"])


def drawn(client: httpx.Client, **fields: Any) -> tuple[str, int]:
    told = parameters(client, **fields)
    return told["preset"], told["num_inference_steps"]


# ── choosing ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_operation_is_drawn_by_the_preset_that_it_names(server, operation):
    told = parameters(server, operation, preset="fast")
    assert (told["preset"], told["num_inference_steps"]) == ("fast", 3)
    assert (told["guidance_scale"], told["renoise_order"]) == ([1, 1], "halton")
    assert parameters(server, operation)["preset"] == "quality"
    # A strength is counted in steps, so few steps do not suit it.
    usual = "quality" if operation in ("edit", "upscale") else "fast"
    assert parameters(server, operation, model="hasty")["preset"] == usual


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, ("fast", 3)),
        ({"num_inference_steps": 4}, ("fast", 4)),
        ({"num_inference_steps": 5}, ("quality", 5)),
        ({"negative_prompt": "blur"}, ("quality", 6)),
        ({"negative_prompt": " \n"}, ("fast", 3)),
        ({"guidance_scale": 1}, ("fast", 3)),
        ({"guidance_scale": 3}, ("quality", 6)),
        ({"guidance_scale": [1, 2]}, ("quality", 6)),
        ({"hires": {"steps": 12}}, ("quality", 6)),
        ({"hires": {}}, ("quality", 6)),
        ({"hires": {}, "preset": "fast"}, ("fast", 3)),
        ({"operation": "edit", "strength": 0.9}, ("quality", 6)),
        ({"regions": [REGION]}, ("quality", 6)),
        ({"regions": [REGION], "preset": "fast"}, ("fast", 3)),
        ({"operation": "inpaint", "regions": [REGION]}, ("quality", 6)),
        ({"operation": "outpaint", "regions": [REGION]}, ("quality", 6)),
        ({"operation": "edit", "strength": 1}, ("fast", 3)),
        ({"operation": "edit", "num_inference_steps": 3}, ("quality", 3)),
        ({"renoise_steps": 3}, ("fast", 3)),
        ({"renoise_steps": 4}, ("quality", 6)),
        ({"guidance_steps": 5}, ("quality", 6)),
        ({"temperature": 1, "sampler": "argmax", "renoise_order": "random"}, ("fast", 3)),
        ({"preset": "quality", "num_inference_steps": 2}, ("quality", 2)),
    ],
)
def test_a_request_that_the_default_preset_does_not_suit_has_quality(server, fields, expected):
    assert drawn(server, model="hasty", **fields) == expected


def test_fields_override_a_preset_s_recipe(server):
    told = parameters(
        server, preset="fast", num_inference_steps=2, temperature=0.9, renoise_order="confidence"
    )
    assert told["num_inference_steps"] == 2
    assert told["temperature"] == [0.9, 0.9]
    assert told["renoise_order"] == "confidence"


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"num_inference_steps": 5}, "num_inference_steps", "preset fast is made for 1 to 4 steps"),
        ({"negative_prompt": "blur"}, "negative_prompt", "draws without guidance"),
        ({"guidance_scale": 3}, "guidance_scale", "or send another preset, such as quality"),
        ({"hires": {"steps": 12}}, "hires.steps", "1 to 4 steps"),
        ({"renoise_steps": 4}, "renoise_steps", "takes 3 steps"),
    ],
)
def test_a_preset_that_does_not_suit_its_request_is_400(server, fields, param, words):
    for model in ("choosing", "hasty"):
        answer = as_json(server, "generate", **PROMPT, model=model, preset="fast", **fields)
        refused(answer, 400, "preset_conflict", param, words)


def test_an_unknown_preset_is_refused_with_those_there_are(server):
    answer = as_json(server, "generate", **PROMPT, preset="best")
    refused(answer, 422, "invalid_value", "preset", "quality, fast")
    answer = as_json(server, "generate", **PROMPT, model="plain", preset="fast")
    refused(answer, 422, "invalid_value", "preset", "plain has: quality")
    answer = server.post("/v1/images/generations", json={**PROMPT, "preset": "best"})
    refused(answer, 400, "invalid_value", "preset", "quality, fast")


def test_quality_suits_every_request_even_without_guidance(tmp_path):
    micro = micro_config("unguided")
    recipe = {"num_inference_steps": 4, "guidance_scale": (1.0, 1.0)}
    fields = {**json.loads(_written(micro, tmp_path)), "name": "unguided"}
    fields["recipe"] |= {**recipe, "renoise_steps": 3, "guidance_steps": 4}
    (tmp_path / "bundle.json").write_text(json.dumps(fields))
    app = create_app(Settings(weights=str(tmp_path)), worker=fake_worker.main)
    with serving(app) as address, httpx.Client(base_url=address, timeout=20) as client:
        wait_until(lambda: client.get("/readyz").status_code == 200)
        told = parameters(client, preset="quality", negative_prompt="blur", guidance_scale=2)
        assert told["guidance_scale"] == [2, 2]


def _written(config: BundleConfig, directory: Path) -> str:
    config.write(directory)
    return (directory / "bundle.json").read_text()


# ── guidance, attention ───────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"guidance_start": 0.25, "guidance_end": 0.75}, (2 / 6, 4 / 6)),
        ({"guidance_start": 0.5}, (3 / 6, 1.0)),
        ({"guidance_start": 0.5, "num_inference_steps": 8}, (4 / 8, 1.0)),
        ({"guidance_start": 1}, (1.0, 1.0)),
    ],
)
def test_guidance_may_begin_later(server, fields, expected):
    told = parameters(server, **fields)
    assert (told["guidance_start"], told["guidance_end"]) == pytest.approx(expected)
    assert "guidance_steps" not in told
    again = parameters(server, **{name: told[name] for name in ("guidance_start", "guidance_end")})
    if "num_inference_steps" not in fields:
        assert again["guidance_start"] == told["guidance_start"]
        assert again["guidance_end"] == told["guidance_end"]


def test_guidance_may_end_earlier(server):
    assert parameters(server, guidance_end=0.5)["guidance_steps"] == 3
    assert parameters(server, guidance_start=0, guidance_end=0)["guidance_steps"] == 0


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"guidance_steps": 2, "guidance_start": 0.5}, "guidance_steps", "must be absent beside"),
        ({"guidance_steps": 2, "guidance_end": 0.5}, "guidance_steps", "must be absent beside"),
        ({"guidance_start": 0.6, "guidance_end": 0.5}, "guidance_start", "at most guidance_end"),
        ({"guidance_start": 1.5}, "guidance_start", "from 0 to 1"),
        ({"renoise_order": "sideways"}, "renoise_order", "random, halton or confidence"),
        ({"attention_weights": {"text": -1}}, "attention_weights", "from 0 to 100"),
        ({"attention_weights": 2}, "attention_weights", "text or image"),
        ({"model_sha256": "0" * 64}, "model_sha256", "leave it out"),
    ],
)
def test_senseless_fields_are_refused(server, fields, param, words):
    answer = as_json(server, "generate", **PROMPT, **fields)
    refused(answer, 422, "invalid_value", param, words)


def test_attention_weights_are_the_request_s_or_the_recipe_s(server):
    assert parameters(server)["attention_weights"] == {"text": 1.2, "image": 0.4}
    assert parameters(server, preset="fast")["attention_weights"] is None
    sent = {"attention_weights": {"image": 2}}
    assert parameters(server, **sent)["attention_weights"] == {"text": 1, "image": 2}
    form = {**PROMPT, "response_format": "json", "attention_weights": '{"image": 2}'}
    answer = server.post("/generate", files={name: (None, sent) for name, sent in form.items()})
    assert answer.json()["parameters"]["attention_weights"] == {"text": 1, "image": 2}


# ── what is told ──────────────────────────────────────────────────────────────────────────────────


def test_a_file_tells_preset_order_and_weights_and_its_parameters_repeat_it(server):
    config = micro_preset_config("choosing")
    answer = as_json(server, "generate", **PROMPT, preset="fast", guidance_start=0.5, seed=3)
    assert answer.headers["x-preset"] == "fast"
    assert answer.headers["x-renoise-order"] == "halton"
    assert answer.headers["x-model-sha256"] == config.sha256
    told = json.loads(opened(answer.content).info["parameters"])
    assert (told["preset"], told["renoise_order"]) == ("fast", "halton")
    assert told["model_sha256"] == config.sha256
    for name in ("operation", "truncated"):
        del told[name]
    again = as_json(server, "generate", **told)
    assert again.content == answer.content
    other = as_json(server, "generate", **told | {"model": "hasty"})
    refused(other, 422, "invalid_value", "model_sha256")


def test_models_tell_their_presets(server):
    entries = {entry["id"]: entry for entry in server.get("/v1/models").json()["data"]}
    entry = entries["choosing"]
    assert entry["default_preset"] == "quality"
    assert list(entry["presets"]) == ["quality", "fast"]
    assert entry["presets"]["fast"]["steps"] == [1, 4]
    assert entry["presets"]["fast"]["recipe"]["num_inference_steps"] == 3
    assert [each["guided"] for each in entry["presets"].values()] == [True, False]
    assert entry["presets"]["fast"]["denoiser"] == "denoiser-fast"
    assert "denoiser-fast" in entry["capabilities"]["networks"]
    assert entry["recipe"] == entry["presets"]["quality"]["recipe"]
    assert entries["hasty"]["recipe"] == entries["hasty"]["presets"]["fast"]["recipe"]
    assert list(entries["plain"]["presets"]) == ["quality"]


def test_images_are_counted_by_preset(server):
    def counted(preset: str) -> float:
        name = "paella_preset_images_total"
        return metric(server, name, model="choosing", preset=preset)

    before = counted("fast"), counted("quality")
    parameters(server, preset="fast", n=2)
    assert (counted("fast"), counted("quality")) == (before[0] + 2, before[1])


def test_a_smaller_denoiser_s_steps_are_less_work():
    share = micro_preset_config().relative_work("denoiser-fast")
    whole = Workload(images=1, steps=4, branches=1, output=3, enlarging=2, share=1.0)
    less = Workload(images=1, steps=4, branches=1, output=3, enlarging=2, share=share)
    assert less.of((32, 32), 0) < whole.of((32, 32), 0)
    assert less.of((32, 32), 0) == pytest.approx(32 * 32 * (4 * share + 3), abs=1)


def test_work_that_is_too_much_for_one_denoiser_may_not_be_for_another(tmp_path):
    config = micro_preset_config()
    config.write(tmp_path)
    pixels = 32 * 32
    allowed = pixels * (3 + 4)
    settings = Settings(weights=str(tmp_path), max_request_work=allowed)
    with (
        serving(create_app(settings, worker=fake_worker.main)) as address,
        httpx.Client(base_url=address, timeout=20) as client,
    ):
        wait_until(lambda: client.get("/readyz").status_code == 200)
        refused(
            as_json(client, "generate", **PROMPT, num_inference_steps=4, guidance_scale=1),
            422,
            "too_much_work",
            None,
        )
        assert drawn(client, preset="fast", num_inference_steps=4) == ("fast", 4)
        answer = as_json(client, "generate", **PROMPT, preset="fast", n=4)
        refused(answer, 422, "too_much_work", None, "1 branch * 0.")


# ── other faces ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("model", "fields", "expected", "told"),
    [
        ("choosing", {}, ("quality", 6), "medium"),
        ("choosing", {"quality": "low"}, ("fast", 3), "low"),
        ("choosing", {"quality": "standard"}, ("quality", 6), "medium"),
        ("choosing", {"quality": "hd"}, ("quality", 12), "high"),
        ("hasty", {}, ("fast", 3), "low"),
        ("hasty", {"quality": "medium"}, ("quality", 6), "medium"),
        ("hasty", {"quality": "high"}, ("quality", 12), "high"),
        ("hasty", {"negative_prompt": "blur"}, ("quality", 6), "medium"),
        ("hasty", {"regions": [REGION]}, ("quality", 6), "medium"),
        ("hasty", {"quality": "low", "negative_prompt": "blur"}, ("quality", 3), "low"),
        ("hasty", {"quality": "low", "num_inference_steps": 2}, ("fast", 2), "low"),
        ("hasty", {"quality": "low", "num_inference_steps": 9}, ("quality", 9), "low"),
        ("hasty", {"quality": "high", "preset": "fast"}, ("fast", 3), "low"),
        ("plain", {"quality": "low"}, ("quality", 3), "low"),
        ("plain", {}, ("quality", 6), "medium"),
    ],
)
def test_openai_s_quality_chooses_the_preset(server, model, fields, expected, told):
    body = {**PROMPT, "model": model, **fields}
    answer = server.post("/v1/images/generations", json=body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["quality"] == told
    assert answer.headers["x-preset"] == expected[0]
    content = answer.json()["data"][0]["b64_json"]
    recorded = json.loads(opened(base64.b64decode(content)).info["parameters"])
    assert (recorded["preset"], recorded["num_inference_steps"]) == expected


@pytest.mark.parametrize(
    ("fields", "files", "expected"),
    [
        ({}, {}, ("quality", 6)),
        ({"quality": "low"}, {}, ("quality", 3)),
        ({"strength": "1"}, {}, ("fast", 3)),
        ({}, {"mask": png(white())}, ("fast", 3)),
        ({"preset": "fast"}, {}, ("fast", 3)),
    ],
)
def test_openai_s_edits_have_quality_where_a_share_of_the_image_is_kept(
    server, fields, files, expected
):
    data = {**PROMPT, "model": "hasty", "mask_mode": "luminance", **fields}
    if not files:
        del data["mask_mode"]
    answer = server.post("/v1/images/edits", data=data, files={"image": png(noise()), **files})
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-preset"] == expected[0]
    content = answer.json()["data"][0]["b64_json"]
    recorded = json.loads(opened(base64.b64decode(content)).info["parameters"])
    assert (recorded["preset"], recorded["num_inference_steps"]) == expected


def test_openai_s_conflict_is_400(server):
    body = {**PROMPT, "preset": "fast", "negative_prompt": "blur"}
    answer = server.post("/v1/images/generations", json=body)
    refused(answer, 400, "preset_conflict", "negative_prompt")


@pytest.mark.parametrize(
    ("model", "fields", "expected"),
    [
        ("choosing", {"steps": 3}, ("fast", 3)),
        ("choosing", {"steps": 1, "cfg_scale": 5}, ("fast", 1)),
        ("choosing", {"steps": 20}, ("quality", 6)),
        ("choosing", {"steps": 3, "negative_prompt": "blur"}, ("quality", 3)),
        ("choosing", {}, ("quality", 6)),
        ("hasty", {}, ("fast", 3)),
        ("hasty", {"negative_prompt": "blur"}, ("quality", 6)),
        ("hasty", {"steps": 20}, ("quality", 6)),
        ("plain", {"steps": 3}, ("quality", 3)),
    ],
)
def test_automatic1111_s_steps_choose_the_preset(server, model, fields, expected):
    body = {**PROMPT, **fields, "override_settings": {"sd_model_checkpoint": model}}
    answer = server.post("/sdapi/v1/txt2img", json=body)
    assert answer.status_code == 200, answer.text
    info = json.loads(answer.json()["info"])
    assert answer.headers["x-preset"] == expected[0]
    assert info["steps"] == expected[1]
    shown = None if model == "plain" else expected[0]
    assert info["extra_generation_params"].get("Preset") == shown
    assert (f"Preset: {shown}" in info["infotexts"][0]) == (shown is not None)
    assert ("Renoise order: halton" in info["infotexts"][0]) == (expected[0] == "fast")
    assert info["guidance_scale"] == ([1, 1] if expected[0] == "fast" else info["guidance_scale"])


def test_automatic1111_s_options_choose_the_model_that_draws_the_client_s_next_requests(server):
    def drawn_by(**fields):
        answer = server.post("/sdapi/v1/txt2img", json={**PROMPT, **fields})
        return json.loads(answer.json()["info"])["sd_model_name"]

    assert drawn_by() == "choosing"
    for name in ("plain", "choosing"):
        chosen = server.post("/sdapi/v1/options", json={"sd_model_checkpoint": name})
        assert chosen.status_code == 200
        assert server.get("/sdapi/v1/options").json()["sd_model_checkpoint"].startswith(name)
        assert drawn_by() == name
        assert drawn_by(override_settings={"sd_model_checkpoint": "hasty"}) == "hasty"


def test_automatic1111_s_second_pass_is_within_the_preset_s_steps(server):
    body = {**PROMPT, "steps": 2, "enable_hr": True, "hr_second_pass_steps": 30}
    answer = server.post("/sdapi/v1/txt2img", json=body)
    assert answer.status_code == 200, answer.text
    assert "Hires steps: 6" in json.loads(answer.json()["info"])["infotexts"][0]
