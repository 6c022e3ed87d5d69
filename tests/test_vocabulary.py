"""Prompts as people write them, read as the captions that small weights know."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from model.bundle import load_bundle
from model.config import BundleConfig, find_bundle
from model.pipeline import Pipeline
from model.training.prompts import bench
from model.training.vocabulary import main, vocabulary
from model.vocabulary import Vocabulary, words_of
from server.cli.offline import plan
from server.settings import Settings
from tests.test_auth import served

WORDS = Vocabulary(
    things="apple, apples, cat, cats, duck, dragon, hat, horse, ice cream, lion, oil drum, "
    "painting, robot, sofa, van, zebra, zebras, circle, square",
    places="on the left, right, above, at the beach, beach, sunset, at sunset, at night, in snow, "
    "snow, evening light, close-up, up close, a close-up of",
    words="red green blue yellow small large two three background plain cute white",
    tags="sitting bones scary table light",
)


@pytest.mark.parametrize(
    ("prompt", "read"),
    [
        ("a red apple, highly detailed, 4k", "a red apple"),
        ("photo of a red apple, trending on artstation, masterpiece", "a red apple"),
        ("A photograph of an ugly apple", "an apple"),
        ("Could you draw me an apple please?", "an apple"),
        ("Please generate a picture of three green apples", "three green apples"),
        ("/imagine prompt: a lion, golden rays --ar 16:9 --v 6", "a lion"),
        ("(a red apple:1.2), ((masterpiece)), <lora:x:0.8>", "a red apple"),
        ("a red apple in the style of Van Gogh", "a red apple"),
        ("a lion in a cartoon style on the left", "a lion on the left"),
        ("a robot, comic book style, vibrant colors", "a robot"),
        ("sunset at the beach, oil painting", "sunset at the beach"),
        ("an oil painting of a cat", "a cat"),
        ("a highly detailed red apple", "a red apple"),
        ("a wonderful apple", "an apple"),
        ("a cute cat wearing a hat", "a cute cat and a hat"),
        ("knight fighting a dragon", "a dragon"),
        ("a close-up photo of a lion", "a close-up of a lion"),
        ("a lion standing on the left, golden hour", "a lion on the left"),
        ("A beautiful red apple on a table, cinematic lighting", "A red apple"),
        ("a cat sitting on a sofa", "a cat and a sofa"),
        ("Blue background, photo of a cat", "Blue background, a cat"),
        ("RED APPLE", "red apple"),
        ("PHOTO OF A CAT, 4K", "a cat"),
    ],
)
def test_a_prompt_is_reduced_to_what_captions_say(prompt: str, read: str) -> None:
    assert WORDS.read(prompt) == read


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "a red apple",
        "A red apple.",
        "two cats in the snow, blue background",
        "a blue circle above a red square",
        "a zebrra and a drgon",
        "oil drum",
        "ice cream, a painting",
        "a robot, a hat and a painting",
        "a platypus",
        "ein roter Apfel, hochauflösend",
        "猫",
        "bones and scary",
        "something to do with bones, a scary light and a cat",
        "a duck in the evening light",
        "a cat on the left of a duck",
        "a dragon at the beach",
    ],
)
def test_what_captions_say_and_what_begins_with_nothing_known_stay(prompt: str) -> None:
    assert WORDS.read(prompt) == prompt


def test_reading_twice_changes_nothing_more() -> None:
    for prompt in ("a cat wearing a hat, 4k", "Could you draw me an ugly apple?", "RED APPLE"):
        assert WORDS.read(WORDS.read(prompt)) == WORDS.read(prompt)


@pytest.mark.parametrize(
    "part", ["a cat ", "((", "in ", "<", "a", "imagine ", "please ", "the-", ","]
)
def test_long_prompts_are_read_up_to_a_bound(part: str) -> None:
    assert len(WORDS.read(part * 32_000)) <= len(part) * 32_000
    assert len(WORDS.read("a cat and " + "a dragon and " * 10_000)) < 5_000


def test_the_captions_vocabulary_leaves_the_benchmark_s_prompts_as_they_are() -> None:
    collected = vocabulary()
    cases = [
        case for name, cases in bench("report").items() if name != "descriptions" for case in cases
    ]
    media = re.compile(
        r"\b((an? )?(photo|picture|image|drawing|illustration|3d render|icon) of|draw|show me) "
    )
    for case in cases:
        asked = words_of(media.sub("", case.text.lower()))
        assert words_of(media.sub("", collected.read(case.text).lower())) == asked
    assert len(cases) > 1500


def test_the_captions_vocabulary_leaves_captions_as_they_are() -> None:
    collected = vocabulary()
    for prompt in (
        "a small red heart on the left, a zebra and a grey diamond",
        "something to do with bones, head and scary",
        "zoomed in, a lion in front of a starry sky",
        "Three yellow ducks on a blue background.",
    ):
        assert collected.read(prompt) == prompt


def test_the_embedded_weights_have_the_captions_vocabulary() -> None:
    assert BundleConfig.read(find_bundle("tiny")).vocabulary == vocabulary()


def test_a_vocabulary_needs_its_format_and_survives_writing(tmp_path: Path) -> None:
    config = BundleConfig.read(find_bundle("tiny"))
    with pytest.raises(ValueError, match="a vocabulary need format 4, not 2"):
        replace(config, format=2)
    config.write(tmp_path)
    assert BundleConfig.read(tmp_path).sha256 == config.sha256
    without = replace(config, vocabulary=None)
    assert without.sha256 != config.sha256
    without.write(tmp_path)
    assert "vocabulary" not in (tmp_path / "bundle.json").read_text()


def test_a_pipeline_encodes_what_is_read(random_bundle: Path) -> None:
    bundle = load_bundle(random_bundle, torch.device("cpu"), torch.float32)
    config = replace(bundle.config, vocabulary=WORDS, format=4)
    reading, plain = Pipeline.of(replace(bundle, config=config)), Pipeline.of(bundle)
    (read,), (known,) = reading.encode(["a red apple, 4k"]), plain.encode(["a red apple"])
    assert read.byt5.equal(known.byt5)
    assert read.clip.equal(known.clip)
    assert reading.text_length("a red apple" + ", 4k" * 30) == plain.text_length("a red apple")


def test_a_plan_tells_what_is_read_of_a_prompt_and_only_then() -> None:
    reduced, _ = plan("generate", {"prompt": "a red apple, 4k", "seed": 1}, Settings())
    assert reduced.parameters((), 0)["prompt"] == "a red apple, 4k"
    assert reduced.parameters((), 0)["prompt_read"] == "a red apple"
    whole, _ = plan("generate", {"prompt": "a red apple", "seed": 1}, Settings())
    assert "prompt_read" not in whole.parameters((), 0)


@pytest.mark.process
def test_the_answer_says_what_was_read() -> None:
    with served(Settings(weights="tiny")) as client:
        reduced = client.post("/generate", json={"prompt": "a red apple, 4k, naïve"})
        whole = client.post("/generate", json={"prompt": "a red apple"})
        listed = client.post("/generate", json={"prompt": "an ugly cat", "response_format": "json"})
        openai = client.post("/v1/images/generations", json={"prompt": "a lion, 8k"})
    assert reduced.headers["x-prompt-read"] == "a red apple"
    assert "x-prompt-read" not in whole.headers
    assert listed.json()["parameters"]["prompt_read"] == "a cat"
    assert openai.headers["x-prompt-read"] == "a lion"


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
