"""The words that small weights know: collected, written into a bundle, and used by the server."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from model.batch_encoder import DictCache
from model.bundle import load_bundle
from model.canvas import box_weight
from model.config import BundleConfig, find_bundle
from model.image_request import ImageRequest, InputImage, Region
from model.pipeline import Pipeline
from model.prompt_reading import Reading
from model.row_builder import RowBuilder
from model.training.vocabulary import main, vocabulary, with_vocabulary
from server.api.errors import ApiError
from server.api.planning.plan import Plan
from server.cli.offline import plan
from server.engine.scheduler import Pool
from server.settings import Settings
from tests.hostile import plain_png
from tests.support.reader_vocabulary import WORDS
from tests.support.uvicorn_servers import served


def test_the_embedded_weights_have_the_captions_vocabulary() -> None:
    assert BundleConfig.read(find_bundle("tiny")).vocabulary == vocabulary()


def test_a_vocabulary_needs_its_format_and_survives_writing(tmp_path: Path) -> None:
    config = BundleConfig.read(find_bundle("tiny"))
    with pytest.raises(ValueError, match="a vocabulary need format 4, not 2"):
        replace(config, format=2)
    config.write(tmp_path)
    assert BundleConfig.read(tmp_path).sha256 == config.sha256
    without = with_vocabulary(config, None)
    assert without.sha256 != config.sha256
    without.write(tmp_path)
    assert "vocabulary" not in (tmp_path / "bundle.json").read_text()


def test_regions_of_its_own_need_a_vocabulary() -> None:
    config = BundleConfig.read(find_bundle("tiny"))
    with pytest.raises(ValueError, match="auto_regions needs a vocabulary"):
        replace(config, vocabulary=None)


def reading_pipeline(random_bundle: Path, *, auto_regions: bool = False) -> Pipeline:
    bundle = load_bundle(random_bundle, torch.device("cpu"), torch.float32)
    recipe = replace(bundle.config.recipe, auto_regions=auto_regions)
    config = replace(bundle.config, vocabulary=WORDS, recipe=recipe, format=4)
    return Pipeline.of(replace(bundle, config=config))


def test_a_pipeline_draws_what_is_read(random_bundle: Path) -> None:
    plain = Pipeline.load(random_bundle, torch.device("cpu"), torch.float32)
    reading = reading_pipeline(random_bundle)
    (drawn,) = reading.generate(["a crimson apple, 4k"], [1], negative_prompt="blurry")
    (known,) = plain.generate(["a red apple"], [1])
    assert drawn.equal(known)


def test_a_pipeline_draws_two_things_by_prompts_of_their_own(random_bundle: Path) -> None:
    plain = Pipeline.load(random_bundle, torch.device("cpu"), torch.float32)
    reading = reading_pipeline(random_bundle, auto_regions=True)
    prompts = ["a cat and a dog, 4k", "a cat", "a cat above a dog"]
    parted = reading.generate(prompts, [1, 2, 3])
    width, height = plain.config.native_size
    right = InputImage.of(box_weight((0.5, 0, 1, 1), width, height))
    below = InputImage.of(box_weight((0, 0.5, 1, 1), width, height))
    sampling = plain.config.sampling()
    requests = [
        ImageRequest(text, seed, width, height, sampling, regions=regions)
        for seed, (text, regions) in enumerate(
            [
                ("a small cat on the left", (Region("a small dog on the right", right),)),
                ("a cat", ()),
                ("a small cat at the top", (Region("a small dog at the bottom", below),)),
            ],
            start=1,
        )
    ]
    rows = RowBuilder(plain, DictCache()).build(requests)
    assert plain.decode(plain.denoise(rows)).equal(parted)


def planned(prompt: str, **fields: object) -> Plan:
    made, _ = plan("generate", {"prompt": prompt, "seed": 1, **fields}, Settings())
    return made


def test_a_plan_tells_what_is_read_of_a_prompt_and_only_then() -> None:
    reduced = planned("a red apple, 4k")
    assert reduced.parameters((), 0)["prompt"] == "a red apple, 4k"
    assert reduced.parameters((), 0)["prompt_read"] == "a red apple on a white background"
    assert reduced.job.image(0).prompt == "a red apple on a white background"
    assert "prompt_read" not in planned("a red apple at the beach").parameters((), 0)


def test_only_what_draws_a_whole_image_adds_a_background() -> None:
    image = plain_png()
    edited, _ = plan("edit", {"prompt": "a cat", "image": image, "strength": 0.5}, Settings())
    assert edited.job.image(0).prompt == "a cat"
    box = {"prompt": "a dog", "box": [0, 0, 0.5, 1]}
    regions = planned("a cat", regions=[box]).job.image(0)
    assert [regions.prompt, *(each.prompt for each in regions.regions)] == ["a cat", "a dog"]


def test_every_text_of_a_request_is_read() -> None:
    region = {"prompt": "an automobile, 4k", "box": [0, 0, 0.5, 1]}
    request = {"prompt": "crimson", "negative_prompt": "blurry, a puppy", "regions": [region]}
    image, parameters = planned(**request).job.image(0), planned(**request).parameters((), 0)
    assert [each.prompt for each in image.regions] == ["a car"]
    assert image.negative_prompt == "a dog"
    assert parameters["negative_prompt"] == "blurry, a puppy"
    assert parameters["regions"][0]["prompt_read"] == "a car"
    frames, _ = plan(
        "interpolate", {"keyframes": [{"prompt": "a cat, 4k"}, {"prompt": "a dog"}]}, Settings()
    )
    assert [each.prompt for each in frames.job.image(0).keyframes] == ["a cat", "a dog"]
    assert frames.parameters((), 0)["keyframes"][0]["prompt_read"] == "a cat"


def test_each_text_of_a_request_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    texts, read_prompt = list[str](), BundleConfig.read_prompt

    def counting(config: BundleConfig, prompt: str) -> Reading:
        texts.append(prompt)
        return read_prompt(config, prompt)

    monkeypatch.setattr(BundleConfig, "read_prompt", counting)
    planned("a puppy and a cat, 4k")
    assert texts[0] == "a puppy and a cat, 4k"
    assert len(texts) == len(set(texts))


def test_rows_share_steps_by_the_length_of_what_is_read() -> None:
    long = planned("a red apple" + ", 4k" * 100).job
    assert Pool.of(long, 0) == Pool.of(planned("a red apple").job, 0)


def test_two_things_become_regions_unless_the_request_says_otherwise() -> None:
    parted = planned("a puppy and a cat, 4k")
    image = parted.job.image(0)
    assert image.prompt == "a small dog on the left on a white background"
    (region,) = image.regions
    assert region.prompt == "a small cat on the right on a white background"
    assert parted.parameters((), 0)["auto_regions"] is True
    assert parted.parameters((), 0)["prompt"] == "a puppy and a cat, 4k"
    assert parted.parameters((), 0)["prompt_read"] == "a dog and a cat on a white background"
    whole = planned("a puppy and a cat, 4k", auto_regions=False)
    assert whole.job.image(0).prompt == "a dog and a cat on a white background"
    assert whole.parameters((), 0)["auto_regions"] is False
    assert planned("a puppy").parameters((), 0)["auto_regions"] is True
    own = planned("a puppy and a cat", regions=[{"prompt": "a hat", "box": [0, 0, 1, 0.5]}])
    assert own.job.image(0).prompt == "a dog and a cat"
    assert "auto_regions" not in own.parameters((), 0)


def test_regions_that_would_cost_too_much_are_left_out() -> None:
    fields = {"num_inference_steps": 4, "width": 256, "height": 256}
    needed = 256 * 256 * (4 * 2 + 4)
    settings = Settings(max_request_work=needed)
    whole, _ = plan("generate", {"prompt": "a dog and a cat", **fields}, settings)
    assert whole.parameters((), 0)["auto_regions"] is False
    larger = Settings(max_request_work=needed + 256 * 256 * 4)
    parted, _ = plan("generate", {"prompt": "a dog and a cat", **fields}, larger)
    assert parted.parameters((), 0)["auto_regions"] is True


def test_weights_without_a_vocabulary_part_no_prompts(random_bundle: Path) -> None:
    settings = Settings(weights=str(random_bundle))
    fields = {"prompt": "a dog and a cat"}
    whole, _ = plan("generate", fields, settings)
    assert "auto_regions" not in whole.parameters((), 0)
    with pytest.raises(ApiError, match="has no vocabulary") as raised:
        plan("generate", {**fields, "auto_regions": True}, settings)
    assert raised.value.status == 400


@pytest.mark.process
def test_the_answer_says_what_was_read() -> None:
    with served(Settings(weights="tiny")) as client:
        reduced = client.post("/generate", json={"prompt": "a red apple, 4k, naïve"})
        known = client.post("/generate", json={"prompt": "a red apple in the snow"})
        listed = client.post("/generate", json={"prompt": "an ugly cat", "response_format": "json"})
        openai = client.post("/v1/images/generations", json={"prompt": "a lion, 8k"})
    assert reduced.headers["x-prompt-read"] == "a red apple on a white background"
    assert "x-prompt-read" not in known.headers
    assert listed.json()["parameters"]["prompt_read"] == "a cat on a white background"
    assert openai.headers["x-prompt-read"] == "a lion on a white background"


@pytest.mark.process
def test_parameters_of_an_image_draw_it_again() -> None:
    region = {"prompt": "a sofa, 4k", "box": [0, 0, 0.5, 1]}
    json = {"response_format": "json", "deterministic": True}
    with served(Settings(weights="tiny")) as client:
        for request in (
            {"prompt": "a crimson apple, 4k"},
            {"prompt": "a puppy and a cat, 4k"},
            {"prompt": "a puppy and a cat", "auto_regions": False},
            {"prompt": "a cat, 4k", "regions": [region]},
        ):
            first = client.post("/generate", json=request | json).json()
            parameters = dict(first["parameters"])
            del parameters["operation"], parameters["truncated"]
            again = client.post("/generate", json=parameters | json)
            assert again.status_code == 200, again.text
            assert again.json()["images"][0]["b64_json"] == first["images"][0]["b64_json"]


@pytest.mark.process
def test_a_long_reading_makes_no_long_header() -> None:
    prompt = "2 \u53ea, " + "\u732b" * 900 + ", a cat" + ", blue background" * 60
    with served(Settings(weights="tiny")) as client:
        answer = client.post("/generate", json={"prompt": prompt})
    assert len(answer.headers["x-prompt-read"]) <= 2400


def test_a_vocabulary_can_be_removed_and_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = BundleConfig.read(find_bundle("tiny"))
    config.write(tmp_path)
    for options, expected in ((["--remove"], None), ([], config.vocabulary)):
        monkeypatch.setattr("sys.argv", ["vocabulary", str(tmp_path), *options])
        main()
        assert BundleConfig.read(tmp_path).vocabulary == expected
    assert BundleConfig.read(tmp_path) == config
