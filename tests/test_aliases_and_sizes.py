"""Models, sizes and seeds as other servers' clients send them: aliases, the nearest size, -1."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import httpx
import hypothesis.strategies as st
import pytest
from hypothesis import given
from pydantic import ValidationError

from model.config import BundleConfig
from server.api import create_app
from server.api.errors import ApiError
from server.api.planning.draft import find_model
from server.api.planning.sizes import NEAREST_AREAS, nearest_size
from server.api.schemas import GenerateRequest
from server.cli.offline import plan as offline_plan
from server.settings import Settings
from tests import fake_worker
from tests.conftest import NAME, micro_config, micro_v1_config, serving, wait_until
from tests.support.images import noise, opened, png, white
from tests.support.native_api import as_json, fields_of, post
from tests.support.servers import asking

Configure = Callable[..., Settings]
ALIASES = f"dall-e-3={NAME},stabilityai/sdxl-turbo={NAME}"


@pytest.fixture(scope="module")
def lenient(fake_settings: Configure) -> Iterator[httpx.Client]:
    """A client of a server that takes any model's name and any size."""
    settings = fake_settings(model_aliases=f"{ALIASES},*={NAME}", sizes="nearest")
    with (
        serving(create_app(settings, worker=fake_worker.main)) as address,
        httpx.Client(base_url=address, timeout=20) as client,
    ):
        wait_until(lambda: client.get("/readyz").status_code == 200)
        yield client


# ── aliases ───────────────────────────────────────────────────────────────────────────────────────


def test_by_default_there_are_no_aliases(client: httpx.Client) -> None:
    assert post(client, model="dall-e-3").json()["error"]["code"] == "model_not_found"
    assert [entry["id"] for entry in client.get("/v1/models").json()["data"]] == [NAME]


@pytest.mark.parametrize("model", ["dall-e-3", "stabilityai/sdxl-turbo", "whatever", NAME])
def test_an_alias_stands_for_a_model_which_the_answer_names(
    lenient: httpx.Client, model: str
) -> None:
    answer = post(lenient, model=model, response_format="json").json()
    assert (answer["model"], answer["parameters"]["model"]) == (NAME, NAME)
    body = {"prompt": "a ball", "model": model}
    assert lenient.post("/v1/images/generations", json=body).status_code == 200


def test_aliases_are_listed_after_the_models_but_for_every_other_name(
    lenient: httpx.Client,
) -> None:
    listed = lenient.get("/v1/models").json()["data"]
    assert [(entry["id"], entry["alias_of"]) for entry in listed] == [
        (NAME, None),
        ("dall-e-3", NAME),
        ("stabilityai/sdxl-turbo", NAME),
    ]
    assert lenient.get("/v1/models/dall-e-3").json() == listed[1]
    assert lenient.get("/v1/models/whatever").json()["alias_of"] == NAME


@pytest.mark.parametrize("path", ["stabilityai/sdxl-turbo", "stabilityai%2Fsdxl-turbo"])
def test_an_alias_with_a_slash_is_found_by_its_name(lenient: httpx.Client, path: str) -> None:
    answer = lenient.get(f"/v1/models/{path}")
    assert answer.json()["id"] == "stabilityai/sdxl-turbo"


def test_an_unknown_model_with_a_slash_is_not_an_unknown_path(client: httpx.Client) -> None:
    error = client.get("/v1/models/stabilityai/sdxl-turbo").json()["error"]
    assert error["code"] == "model_not_found"


def test_an_unknown_name_is_told_the_aliases_too() -> None:
    models: dict[str, BundleConfig] = {"tiny": micro_config("tiny")}
    with pytest.raises(ApiError, match=r"loaded are tiny, dall-e-3 \(sent: 'dall-e-2'\)"):
        find_model("dall-e-2", models, {"dall-e-3": "tiny"})


@pytest.mark.parametrize("aliases", [f"dall-e-3=other,x={NAME}", f"{NAME}={NAME}"])
def test_an_alias_of_no_model_and_a_model_s_own_name_are_refused_at_the_start(
    fake_settings: Configure, aliases: str
) -> None:
    with pytest.raises(ValueError, match="PAELLERA_MODEL_ALIASES"):
        asking(fake_settings(model_aliases=aliases))


@pytest.mark.parametrize("aliases", ["dall-e-3", "=tiny", "a=b=c", "a =b", f"{'a' * 65}=tiny"])
def test_malformed_aliases_are_refused(aliases: str) -> None:
    with pytest.raises(ValidationError, match="model_aliases"):
        Settings(model_aliases=aliases)


# ── sizes ─────────────────────────────────────────────────────────────────────────────────────────


def test_by_default_an_impossible_size_is_refused(client: httpx.Client) -> None:
    assert post(client, width=1024, height=1024).status_code == 422
    body = {"prompt": "a ball", "size": "1024x1024"}
    assert client.post("/v1/images/generations", json=body).status_code == 400


# The native size is 64 × 32, the step 16.
@pytest.mark.parametrize(
    ("sent", "drawn"),
    [
        ((1024, 1024), (48, 48)),
        ((1792, 1024), (64, 32)),
        ((1024, 1792), (32, 64)),
        ((512, 256), (64, 32)),
        # The most and the least area.
        ((64, 48), (64, 48)),
        ((32, 32), (32, 32)),
        ((16, 16), (48, 48)),
        ((99999, 1), (192, 16)),
    ],
)
def test_the_nearest_size_is_drawn_and_reported(
    lenient: httpx.Client, sent: tuple[int, int], drawn: tuple[int, int]
) -> None:
    picture = opened(post(lenient, width=sent[0], height=sent[1]).content)
    parameters = json.loads(picture.info["parameters"])
    assert (picture.size, parameters["width"], parameters["height"]) == (drawn, *drawn)
    body = {"prompt": "a ball", "size": f"{sent[0]}x{sent[1]}"}
    answer = lenient.post("/v1/images/generations", json=body).json()
    assert answer["size"] == f"{drawn[0]}x{drawn[1]}"


@pytest.mark.parametrize("operation", ["edit", "variations", "interpolate"])
def test_operations_with_a_size_of_their_own_take_the_nearest_too(
    lenient: httpx.Client, operation: str
) -> None:
    fields = fields_of(operation) | {"width": 1024, "height": 1024, "response_format": "json"}
    answer = as_json(lenient, operation, **fields).json()
    assert {(image["width"], image["height"]) for image in answer["images"]} == {(48, 48)}


# Images of 32 × 16 pixels; the canvas is 64 × 16.
@pytest.mark.parametrize(
    ("operation", "sent", "drawn"),
    [
        ("edit", {"width": 1000}, (64, 32)),
        ("edit", {"height": 1000}, (64, 32)),
        ("inpaint", {"width": 1000}, (64, 32)),
        ("variations", {"width": 1000}, (64, 32)),
        ("variations", {"height": 1000}, (64, 32)),
        ("outpaint", {"width": 1000}, (512, 128)),
        ("outpaint", {"width": 1000, "height": 250}, (512, 128)),
        ("outpaint", {"width": 50}, (50, 13)),
    ],
)
def test_a_missing_side_follows_the_image_before_the_nearest_size_is_chosen(
    lenient: httpx.Client, operation: str, sent: dict[str, int], drawn: tuple[int, int]
) -> None:
    images = {"image": png(noise(32, 16))}
    if operation == "inpaint":
        images["mask"] = png(white(32, 16, (8, 4, 24, 12)))
    fields = fields_of(operation) | images | sent
    assert opened(as_json(lenient, operation, **fields).content).size == drawn


def test_a_size_that_is_no_size_is_refused_all_the_same(lenient: httpx.Client) -> None:
    for size in ("large", "0x64", "64", "-1x64"):
        body = {"prompt": "a ball", "size": size}
        assert lenient.post("/v1/images/generations", json=body).status_code == 400


SIDE = st.integers(1, 100_000)
CONFIGS: list[BundleConfig] = [
    micro_config(),
    micro_v1_config(),
    replace(micro_config(), native_size=(256, 256)),
    replace(micro_config(), native_size=(512, 32)),
    replace(micro_config(), native_size=(16, 16)),
]


@given(st.sampled_from(CONFIGS), SIDE, SIDE)
def test_the_nearest_size_is_possible_near_the_native_area_and_of_no_worse_ratio(
    config: BundleConfig, width: int, height: int
) -> None:
    settings = Settings()
    found = nearest_size((width, height), config, settings)
    assert nearest_size(found, config, settings) == found
    sides = config.sides(settings.max_side)
    assert found[0] in sides
    assert found[1] in sides
    native = config.native_size[0] * config.native_size[1]
    assert NEAREST_AREAS[0] <= found[0] * found[1] / native <= NEAREST_AREAS[1]
    others = [
        (x, y)
        for x in sides
        for y in sides
        if NEAREST_AREAS[0] <= x * y / native <= NEAREST_AREAS[1]
    ]
    if len(others) < 1000 and (width, height) not in others:

        def distance(size: tuple[int, int]) -> float:
            return abs(math.log(size[0] / size[1] / (width / height)))

        assert distance(found) == pytest.approx(min(map(distance, others)))


# ── seeds ─────────────────────────────────────────────────────────────────────────────────────────


def test_the_seed_minus_one_is_absent_and_others_are_literal(client: httpx.Client) -> None:
    first, second = (post(client, seed=-1).headers["x-seed"] for _ in range(2))
    assert "-1" != first != second != "-1"
    assert post(client, seed=-2).headers["x-seed"] == "-2"
    seeds = [image["seed"] for image in post(client, seed=-3, n=4).json()["images"]]
    assert seeds == [-3, -2, -1, 0]
    body = {"prompt": "a ball", "seed": -1}
    answer = client.post("/v1/images/generations", json=body).json()
    assert answer["data"][0]["seed"] != -1


def test_a_replayed_image_has_its_seed_even_if_that_is_minus_one(bundle: Any) -> None:
    fields = {"prompt": "a ball", "seed": -1}
    settings = Settings(weights=str(bundle))
    assert GenerateRequest(**fields).seed is None
    replayed, _ = offline_plan("generate", fields, settings, recorded=True)
    assert replayed.job.seeds == (-1,)
    drawn, _ = offline_plan("generate", fields, settings)
    assert drawn.job.seeds != (-1,)
