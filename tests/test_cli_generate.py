"""The operations on the command line: each has a twin here, and what it drew can be drawn again
from its own parameters.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import PIL.Image
import pytest
import torch
from click.testing import Result
from PIL.PngImagePlugin import PngInfo

from load_tests.serving import Server, serving
from model.bundle import save_bundle
from model.config import BundleConfig
from tests.conftest import micro_preset_config, random_networks, randomise, write_merges
from tests.support.command_line import assert_one_line, paellera, server_fixture  # noqa: F401, fixtures

pytestmark = pytest.mark.heavy


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture and a mask."""
    folder = tmp_path_factory.mktemp("files")
    PIL.Image.effect_noise((40, 24), 90).convert("RGB").save(folder / "image.png")
    mask = PIL.Image.new("L", (40, 24))
    mask.paste(255, (8, 4, 30, 20))
    mask.save(folder / "mask.png")
    return folder


REGION = '{"prompt": "on", "box": [0, 0, 0.5, 1]}'
TWINS: dict[str, list[str]] = {
    "generate": ["red apple", "--region", REGION],
    "inpaint": [
        "red apple",
        "--image",
        "image.png",
        "--mask",
        "mask.png",
        "--mask-mode",
        "luminance",
        "--reference",
        "mask.png",
    ],
    "outpaint": ["--image", "image.png", "--right", "24", "--up", "3"],
    "vary": ["--image", "image.png", "--image", "mask.png", "--image-weights", "0.3,0.7"],
    "edit": [
        "red apple",
        "--image",
        "image.png",
        "--strength",
        "0.5",
        "--reference",
        "mask.png",
        "--reference",
        "image.png",
    ],
    "upscale": ["--image", "image.png", "--scale", "2", "--strength", "0.4"],
    "hires": ["red apple", "--hires", "1.5", "--hires-strength", "0.5", "--region", REGION],
}


def twin(command: str, folder: Path, bundle: Path, *more: str | Path) -> Result:
    named = [str(folder / word) if word.endswith(".png") else word for word in TWINS[command]]
    return paellera(
        "generate" if command == "hires" else command,
        *named,
        "--weights",
        bundle,
        "--seed",
        "3",
        "--steps",
        "3",
        "--temperature",
        "0.9",
        *more,
    )


@pytest.mark.parametrize("command", TWINS)
def test_what_an_operation_draws_can_be_replayed_to_the_same_bytes(
    command: str, files: Path, random_bundle: Path, tmp_path: Path
) -> None:
    first = twin(command, files, random_bundle, "-o", tmp_path / "first.png")
    assert first.exit_code == 0, first.stderr
    sent = (
        []
        if command in ("generate", "hires")
        else ["--image", files / "image.png", "--mask", files / "mask.png"]
    )
    again = paellera(
        "replay",
        tmp_path / "first.png",
        "-o",
        tmp_path / "again.png",
        "--weights",
        random_bundle,
        *sent,
    )
    assert (again.exit_code, again.stdout) == (0, f"{tmp_path / 'again.png'}  identical\n"), (
        again.stderr
    )
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "first.png").read_bytes()


def test_a_replay_is_marked_as_its_original_is(
    files: Path, random_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PAELLERA_MARK", "false")
    twin("generate", files, random_bundle, "-o", tmp_path / "bare.png")
    monkeypatch.delenv("PAELLERA_MARK")
    bare = tmp_path / "bare.png"
    assert b"DigitalSourceType" not in bare.read_bytes()
    again = tmp_path / "again.png"
    replayed = paellera("replay", bare, "-o", again, "--weights", random_bundle)
    assert replayed.exit_code == 0, replayed.stderr
    assert again.read_bytes() == bare.read_bytes()


def test_a_frame_is_replayed_alone(random_bundle: Path, tmp_path: Path) -> None:
    keyframes = [
        "--keyframe",
        "red apple",
        "--keyframe",
        "the red apple",
        "--frames",
        "3",
        "--deterministic",
    ]
    paellera(
        "interpolate",
        *keyframes,
        "-o",
        tmp_path / "frame.png",
        "--weights",
        random_bundle,
        "--seed",
        "3",
        "--steps",
        "3",
    )
    again = paellera(
        "replay", tmp_path / "frame-1.png", "-o", tmp_path / "again.png", "--weights", random_bundle
    )
    assert again.exit_code == 0, again.stderr


def test_frames_become_an_animation_if_the_output_is_one(
    random_bundle: Path, files: Path, tmp_path: Path
) -> None:
    keyframes = [
        "--keyframe",
        "red apple",
        "--keyframe",
        f"@{files / 'image.png'}",
        "--frames",
        "3",
    ]
    paellera(
        "interpolate",
        *keyframes,
        "-o",
        tmp_path / "out.gif",
        "--weights",
        random_bundle,
        "--steps",
        "2",
    )
    with PIL.Image.open(tmp_path / "out.gif") as animation:
        assert animation.format == "GIF"
        assert animation.n_frames > 1


def test_inpaint_writes_the_bytes_that_serve_answers(
    server: Server,
    random_bundle: Path,
    files: Path,
    tmp_path: Path,
) -> None:
    fields = {
        "prompt": "red apple",
        "seed": "3",
        "num_inference_steps": "3",
        "temperature": "0.9",
        "mask_mode": "luminance",
    }
    parts = {name: (files / f"{name}.png").read_bytes() for name in ("image", "mask")}
    parts["references"] = parts["mask"]
    answer = httpx.post(
        f"{server.url}/inpaint", data=fields, files=parts, timeout=60
    ).raise_for_status()
    twin("inpaint", files, random_bundle, "-o", tmp_path / "twin.png")
    assert (tmp_path / "twin.png").read_bytes() == answer.content


def test_a_replay_without_the_file_that_was_sent_is_refused_in_one_line(
    files: Path, random_bundle: Path, tmp_path: Path
) -> None:
    twin("edit", files, random_bundle, "-o", tmp_path / "first.png")
    for given in ([], ["--image", files / "mask.png"]):
        result = paellera("replay", tmp_path / "first.png", "-o", tmp_path / "again.png", *given)
        assert_one_line(result.stderr, result.exit_code, 2, "image", "sha256:")
    given = ["--image", files / "image.png"]
    result = paellera("replay", tmp_path / "first.png", "-o", tmp_path / "again.png", *given)
    words = "the image with sha256:", "is missing; give it by --image"
    assert_one_line(result.stderr, result.exit_code, 2, *words)
    result = paellera("replay", files / "image.png", "-o", tmp_path / "again.png")
    assert_one_line(result.stderr, result.exit_code, 2, "parameters")


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        (lambda pixels: pixels, 0, "same pixels, in another file"),
        (lambda pixels: pixels ^ 1, 1, "by up to 1 of 255"),
        (lambda pixels: pixels[:, :-1], 1, "by up to 255 of 255"),
    ],
    ids=["as it was", "other pixels", "another size"],
)
def test_a_replay_compares_pixels_where_files_differ(
    change: Callable[[Any], Any],
    code: int,
    words: str,
    random_bundle: Path,
    tmp_path: Path,
) -> None:
    first, other, again = (tmp_path / f"{name}.png" for name in ("first", "other", "again"))
    rest = ["--weights", random_bundle]
    paellera("generate", "apple", "-o", first, "--steps", "1", *rest)
    with PIL.Image.open(first) as image:
        text = PngInfo()
        text.add_text("parameters", image.info["parameters"])
        PIL.Image.fromarray(change(np.asarray(image))).save(other, pnginfo=text)
    result = paellera("replay", other, "-o", again, *rest)
    assert result.exit_code == code
    assert words in result.stdout + result.stderr


@pytest.mark.parametrize("options", [[], ["--deterministic"]])
def test_a_replay_that_differs_names_what_may_have_changed(
    options: list[str], random_bundle: Path, tmp_path: Path
) -> None:
    first, again = tmp_path / "first.png", tmp_path / "again.png"
    rest = ["--weights", random_bundle]
    paellera("generate", "apple", "-o", first, "--steps", "1", *options, *rest)
    with PIL.Image.open(first) as image:
        text = PngInfo()
        text.add_text("parameters", image.info["parameters"])
        PIL.Image.fromarray(np.asarray(image) ^ 1).save(first, pnginfo=text)
    result = paellera("replay", first, "-o", again, *rest)
    assert "another number of CPU threads" in result.stderr
    assert ("a batch with others" in result.stderr) is not bool(options)


# ── replay: its files and other people's ──────────────────────────────────────────────────────────


def test_a_replay_overwrites_nothing_unasked_and_compares_with_what_was_there(
    random_bundle: Path, tmp_path: Path
) -> None:
    path, rest = tmp_path / "first.png", ["--weights", str(random_bundle)]
    paellera("generate", "apple", "-o", path, "--steps", "1", *rest)
    original = path.read_bytes()
    path.write_bytes(original + b"more")
    result = paellera("replay", path, "-o", path, *rest)
    assert_one_line(result.stderr, result.exit_code, 2, "exists already", "--force")
    assert path.read_bytes() == original + b"more"
    result = paellera("replay", path, "-o", path, "--force", *rest)
    assert (result.exit_code, result.stdout.strip()) == (0, f"{path}  same pixels, in another file")
    assert path.read_bytes() == original
    result = paellera("replay", path, "-o", path, "--force", *rest)
    assert (result.exit_code, result.stdout.strip()) == (0, f"{path}  identical")


BASE = {"prompt": "apple", "seed": 1, "num_inference_steps": 1}


@pytest.mark.parametrize(
    "parameters",
    [
        [],
        5,
        BASE | {"operation": []},
        BASE | {"operation": {"\x1b[31m": 1}},
        BASE | {"operation": "\x1b]0;title\x07"},
        BASE | {"frame": 10**12},
        BASE | {"frame": -1},
        BASE | {"frame": "\x1b[31m"},
        BASE | {"frame": True},
        BASE | {"\x1b[2J": 1},
        BASE | {"model": "\x1b[31mred\x1b[0m"},
        BASE | {"sampler": "\u202egnp.exe\x9b31m"},
        BASE | {"n": 10**30},
        {"operation": "edit", "prompt": "a", "image": "\x1b[31m" + "x" * 10_000},
        {"operation": "edit", "prompt": "a", "image": ["x", None, {}]},
        {"operation": "interpolate", "keyframes": [{"image": 5}] * 2},
    ],
)
def test_odd_parameters_of_an_image_are_one_printable_line(
    random_bundle: Path, tmp_path: Path, parameters: Any
) -> None:
    text = PngInfo()
    text.add_text("parameters", json.dumps(parameters))
    assert_replay_refused(random_bundle, tmp_path, text)


@pytest.mark.parametrize("content", ["[" * 100_000, "9" * 10_000, '{"a":' * 900 + "1" + "}" * 900])
def test_deep_or_long_parameters_are_one_printable_line(
    random_bundle: Path, tmp_path: Path, content: str
) -> None:
    text = PngInfo()
    text.add_text("parameters", content)
    assert_replay_refused(random_bundle, tmp_path, text)


def assert_replay_refused(bundle: Path, folder: Path, text: PngInfo) -> None:
    PIL.Image.new("RGB", (8, 8)).save(folder / "odd.png", pnginfo=text)
    result = paellera("replay", folder / "odd.png", "-o", folder / "again.png", "--weights", bundle)
    assert_one_line(result.stderr, result.exit_code, 2)
    assert result.stderr.strip().isprintable()
    assert len(result.stderr) < 2000
    assert not (folder / "again.png").exists()


# ── presets ───────────────────────────────────────────────────────────────────────────────────────


def parameters_of(path: Path) -> dict[str, Any]:
    with PIL.Image.open(path) as image:
        return dict(json.loads(image.info["parameters"]))


SAMPLING = {
    "preset": ["--preset", "fast"],
    "sampling": [
        "--renoise-order",
        "confidence",
        "--guidance-start",
        "0.3",
        "--guidance-end",
        "0.7",
        "--attention-weights",
        "0.5,2",
    ],
}


@pytest.mark.parametrize("options", SAMPLING)
@pytest.mark.parametrize("command", TWINS)
def test_a_preset_and_every_field_of_sampling_are_replayed(
    command: str, options: str, files: Path, preset_bundle: Path, tmp_path: Path
) -> None:
    first, again = tmp_path / "first.png", tmp_path / "again.png"
    made = twin(command, files, preset_bundle, *SAMPLING[options], "-o", first)
    assert made.exit_code == 0, made.stderr
    recorded = parameters_of(first)
    if options == "preset":
        assert (recorded["preset"], recorded["renoise_order"]) == ("fast", "halton")
    else:
        assert recorded["renoise_order"] == "confidence"
        assert recorded["attention_weights"] == {"text": 0.5, "image": 2}
        assert (recorded["guidance_start"], recorded["guidance_end"]) == (1 / 3, 2 / 3)
    without = command in ("generate", "hires")
    sent = [] if without else ["--image", files / "image.png", "--mask", files / "mask.png"]
    replayed = paellera("replay", first, "-o", again, "--weights", preset_bundle, *sent)
    assert replayed.exit_code == 0, replayed.stderr
    assert again.read_bytes() == first.read_bytes()


def test_a_preset_s_image_is_the_server_s_and_its_parameters_repeat_it(
    preset_bundle: Path, tmp_path: Path
) -> None:
    made = paellera(
        "generate", "red apple", "--preset", "fast", "--seed", "3", "--weights", preset_bundle,
        "--deterministic", "-o", tmp_path / "own.png",
    )  # fmt: skip
    assert made.exit_code == 0, made.stderr
    content = (tmp_path / "own.png").read_bytes()
    fields = {"prompt": "red apple", "preset": "fast", "seed": 3, "deterministic": True}
    with (
        serving({"PAELLERA_WEIGHTS": str(preset_bundle)}) as running,
        httpx.Client(base_url=running.url, timeout=60) as client,
    ):
        answer = client.post("/generate", json=fields)
        assert answer.content == content
        recorded = parameters_of(tmp_path / "own.png")
        for name in ("operation", "truncated"):
            del recorded[name]
        assert client.post("/generate", json=recorded).content == content
        conflict = client.post("/generate", json={**fields, "negative_prompt": "on"})
        assert conflict.json()["error"]["code"] == "preset_conflict"


def test_a_replay_by_other_weights_names_those_that_drew(
    preset_bundle: Path, tmp_path: Path
) -> None:
    first, config = tmp_path / "first.png", BundleConfig.read(preset_bundle)
    made = paellera("generate", "red apple", "--weights", preset_bundle, "-o", first)
    assert made.exit_code == 0, made.stderr
    merges = write_merges(tmp_path / "merges")
    others = random_networks(merges, micro_preset_config(config.name))
    randomise(others.vqgan, 5)
    save_bundle(others, tmp_path / "others", torch.float32, merges)
    again = tmp_path / "again.png"
    result = paellera("replay", first, "-o", again, "--weights", tmp_path / "others")
    words = "drawn by other weights, of sha256", config.sha256
    assert_one_line(result.stderr, result.exit_code, 1, *words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--preset", "best"], "quality, fast"),
        (["--preset", "fast", "--steps", "9"], "1 to 4 steps"),
        (["--attention-weights", "1"], "must be two numbers"),
        (["--guidance-steps", "2", "--guidance-start", "0.5"], "must be absent beside"),
        (["--renoise-order", "up"], "random, halton or confidence"),
    ],
)
def test_senseless_sampling_is_one_line(
    arguments: list[str], words: str, preset_bundle: Path, tmp_path: Path
) -> None:
    result = paellera(
        "generate", "red apple", "--weights", preset_bundle, "-o", tmp_path / "a.png", *arguments
    )
    assert_one_line(result.stderr, result.exit_code, 2, words)
