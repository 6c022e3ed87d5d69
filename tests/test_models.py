"""Several weights at once: they are listed with what they can do, chosen by name, and asked for
nothing else.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from model.config import BundleConfig
from server.api import create_app
from server.settings import Settings
from tests import fake_worker
from tests.conftest import NAME, micro_v1_config, serving, wait_until
from tests.support.images import noise, png

pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def several(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A server with v3 weights, v1 weights for texts and v1 weights for pictures."""
    directories = [bundle]
    for config in (
        micro_v1_config("of-text"),
        replace(micro_v1_config("of-image"), embedding="image"),
    ):
        directory = tmp_path_factory.mktemp(config.name)
        config.write(directory)
        directories.append(directory)
    app = create_app(Settings(weights=",".join(map(str, directories))), worker=fake_worker.main)
    with serving(app) as address, httpx.Client(base_url=address, timeout=20) as client:
        wait_until(lambda: client.get("/readyz").status_code == 200)
        yield client


def listed(client: httpx.Client) -> dict[str, dict]:
    answer = client.get("/v1/models").json()
    assert answer["object"] == "list"
    return {entry["id"]: entry for entry in answer["data"]}


def test_every_bundle_is_listed_with_the_default_first(several):
    assert list(listed(several)) == [NAME, "of-text", "of-image"]


def test_an_entry_says_what_the_weights_are_and_can_do(several, bundle):
    config, entry = BundleConfig.read(bundle), listed(several)[NAME]
    assert (entry["object"], entry["owned_by"], entry["family"], entry["sha256"]) == (
        "model",
        "paellera",
        "v3",
        config.sha256,
    )
    assert isinstance(entry["created"], int)
    assert entry["native_size"] == list(config.native_size)
    assert entry["limits"]["size_step"] == entry["limits"]["min_side"] == 16
    assert entry["limits"]["max_side"] == 512
    assert entry["limits"]["text"] == {"bytes": 768, "clip_tokens": 77}
    assert entry["recipe"]["num_inference_steps"] == 12
    assert {"generate", "variations", "regions"} <= set(entry["capabilities"]["operations"])
    assert "quant" in entry["capabilities"]["samplers"]


def test_what_v1_cannot_do_is_said_there(several):
    text, image = listed(several)["of-text"], listed(several)["of-image"]
    assert {"byt5", "prior"}.isdisjoint(text["capabilities"]["networks"])
    assert "quant" not in text["capabilities"]["samplers"]
    assert "variations" not in text["capabilities"]["operations"]
    assert image["capabilities"]["operations"] == ["variations"]
    assert text["limits"]["text"] == {"clip_tokens": 16}


def test_one_is_shown_by_its_name_and_an_unknown_one_is_not_there(several):
    assert several.get("/v1/models/of-text").json() == listed(several)["of-text"]
    answer = several.get("/v1/models/of-nothing")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")


def generate(client: httpx.Client, **fields: object) -> httpx.Response:
    return client.post("/generate", json={"prompt": "a ball", "response_format": "json", **fields})


def test_the_request_chooses(several):
    assert generate(several).json()["model"] == NAME
    answer = generate(several, model="of-text")
    assert answer.json()["model"] == "of-text"
    assert answer.json()["parameters"]["sampler"] == "typical"


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"model": "of-text", "sampler": "quant"}, "sampler", "unsupported_sampler"),
        ({"model": "of-image"}, "model", "unsupported_operation"),
    ],
)
def test_what_weights_cannot_do_is_answered_with_400_and_what_they_can(
    several, fields, param, code
):
    answer = generate(several, **fields)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (400, param, code)
    assert "typical" in error["message"] or "variations" in error["message"]


def test_weights_without_attention_refuse_weights_for_it(several):
    sent = {"attention_weights": {"text": 2}}
    error = generate(several, model="of-text", **sent).json()["error"]
    assert (error["code"], error["param"]) == ("unsupported_value", "attention_weights")
    assert "of-text has no attention" in error["message"]
    answer = generate(several, model="of-text", attention_weights=None)
    assert answer.json()["parameters"]["attention_weights"] is None
    assert generate(several, **sent).status_code == 200


@pytest.mark.parametrize(
    ("model", "endpoint"),
    [("of-text", "/variations"), ("of-image", "/inpaint"), ("of-image", "/edit")],
)
def test_an_operation_they_were_not_made_for_is_answered_with_400(several, model, endpoint):
    words = {} if endpoint == "/variations" else {"prompt": "a ball"}
    answer = several.post(endpoint, json={"image": "aGk=", "model": model, **words})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "unsupported_operation")


IMAGE = base64.b64encode(png(noise())).decode()


@pytest.mark.parametrize(
    ("endpoint", "fields"),
    [
        ("/interpolate", {"keyframes": [{"prompt": "a ball"}, {"image": IMAGE}], "frames": 2}),
        ("/edit", {"prompt": "a ball", "image": IMAGE, "references": [IMAGE]}),
    ],
)
def test_one_image_that_is_to_be_understood_needs_weights_for_images(several, endpoint, fields):
    answer = several.post(endpoint, json={**fields, "model": "of-text"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "unsupported_operation")
    assert several.post(endpoint, json=fields).status_code == 200


def test_a_side_too_short_for_the_networks_is_refused_with_the_shortest(several):
    answer = generate(several, model="of-text", width=4)
    assert answer.status_code == 422
    assert "from 8 to 512" in answer.json()["error"]["message"]
    assert generate(several, model="of-text", width=8).status_code == 200


@pytest.mark.parametrize("mode", ["start", "prev", "rand"])
def test_the_renoise_mode_is_the_request_s_and_is_told_back(client, mode):
    assert generate(client, renoise_mode=mode).json()["parameters"]["renoise_mode"] == mode


def test_a_bundle_of_a_family_to_come_is_refused_by_that_name(tmp_path):
    micro_v1_config().write(tmp_path)
    path = tmp_path / "bundle.json"
    path.write_text(path.read_text().replace('"family": "v1"', '"family": "v9"'))
    with pytest.raises(ValueError, match="family"):
        create_app(Settings(weights=str(tmp_path)), worker=fake_worker.main)
