"""The operations on the command line: each has a twin here, and what it drew can be drawn again
from its own parameters.
"""

from __future__ import annotations

from pathlib import Path

import httpx
import PIL.Image
import pytest
from click.testing import Result

from load_tests.serving import Server
from tests.test_cli import assert_one_line, paellera, server  # noqa: F401, the fixture


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
    ],
    "outpaint": ["--image", "image.png", "--right", "24", "--up", "3"],
    "vary": ["--image", "image.png", "--image", "mask.png", "--image-weights", "0.3,0.7"],
    "edit": ["red apple", "--image", "image.png", "--strength", "0.5"],
}


def twin(command: str, folder: Path, bundle: Path, *more: str | Path) -> Result:
    named = [str(folder / word) if word.endswith(".png") else word for word in TWINS[command]]
    return paellera(
        command,
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
        if command == "generate"
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
    server: Server,  # noqa: F811
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
    result = paellera("replay", files / "image.png", "-o", tmp_path / "again.png")
    assert_one_line(result.stderr, result.exit_code, 2, "parameters")


def test_a_replay_that_differs_says_so(random_bundle: Path, tmp_path: Path) -> None:
    paellera(
        "generate",
        "apple",
        "-o",
        tmp_path / "first.png",
        "--weights",
        random_bundle,
        "--steps",
        "1",
    )
    changed = (tmp_path / "first.png").read_bytes() + b"more"
    (tmp_path / "changed.png").write_bytes(changed)
    result = paellera(
        "replay", tmp_path / "changed.png", "-o", tmp_path / "again.png", "--weights", random_bundle
    )
    assert_one_line(result.stderr, result.exit_code, 1, "differs")
