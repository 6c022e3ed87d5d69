"""The command line: what it writes, and that whatever is asked for wrongly is answered with one
line.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import httpx
import PIL.Image
import pytest
import typer

import weights
from load_tests.serving import Server, serving
from model.config import CONFIG_FILE, BundleConfig, Operation
from server.api.planning.operations import OPERATIONS
from server.cli import app
from server.cli.main import _listen
from tests.conftest import wait_until
from tests.support.command_line import (
    assert_one_line,
    paellera,
    server_fixture,  # noqa: F401, fixtures
)


def paellera_process(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """For commands that set up their process's logging."""
    return subprocess.run(
        [sys.executable, "-m", "server.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture
def damaged_bundle(random_bundle: Path, tmp_path: Path) -> Path:
    """One bit of one weight is not what was listed."""
    copy = tmp_path / "damaged"
    shutil.copytree(random_bundle, copy)
    content = bytearray((copy / "vqgan.safetensors").read_bytes())
    content[-1] ^= 1
    (copy / "vqgan.safetensors").write_bytes(content)
    return copy


@pytest.mark.process
def test_help_needs_none_of_the_heavy_libraries() -> None:
    script = (
        "import sys, server.cli; print(*({'torch', 'fastapi', 'pydantic', 'PIL', 'numpy'} & "
        "set(sys.modules)))"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True
        ).stdout.strip()
        == ""
    )


# ── generate ──────────────────────────────────────────────────────────────────────────────────────


def test_generate_writes_the_bytes_that_serve_answers(
    server: Server, random_bundle: Path, tmp_path: Path
) -> None:
    fields = {
        "prompt": "a red apple",
        "seed": -7,
        "num_inference_steps": 3,
        "guidance_scale": [2, 5],
        "width": 48,
        "negative_prompt": "on",
    }
    answer = httpx.post(f"{server.url}/generate", json=fields, timeout=60).raise_for_status()
    options = (
        "--seed",
        "-7",
        "--steps",
        "3",
        "--guidance",
        "2,5",
        "--width",
        "48",
        "--negative-prompt",
        "on",
    )
    result = paellera(
        "generate",
        "a red apple",
        "-o",
        tmp_path / "apple.png",
        "--weights",
        random_bundle,
        *options,
    )
    assert result.exit_code == 0, result.stderr
    assert (tmp_path / "apple.png").read_bytes() == answer.content


def test_generate_numbers_several_pictures_and_counts_their_seeds(
    random_bundle: Path, tmp_path: Path
) -> None:
    command = ("generate", "the red apple", "--weights", random_bundle, "--steps", "2")
    result = paellera(*command, "-o", tmp_path / "out.png", "-n", "2", "--seed", "5")
    assert result.stdout.splitlines() == [
        f"{tmp_path / 'out-0.png'}  seed 5",
        f"{tmp_path / 'out-1.png'}  seed 6",
    ]
    paellera(*command, "-o", tmp_path / "alone.png", "--seed", "6")
    with (
        PIL.Image.open(tmp_path / "out-1.png") as second,
        PIL.Image.open(tmp_path / "alone.png") as alone,
    ):
        assert second.text == alone.text
        assert second.tobytes() == alone.tobytes()


def test_drawn_seed_is_printed_and_stored_in_the_picture(
    random_bundle: Path, tmp_path: Path
) -> None:
    result = paellera(
        "generate", "apple", "-o", tmp_path / "out.png", "--weights", random_bundle, "--steps", "1"
    )
    with PIL.Image.open(tmp_path / "out.png") as picture:
        assert (
            result.stdout
            == f"{tmp_path / 'out.png'}  seed {json.loads(picture.text['parameters'])['seed']}\n"
        )


@pytest.mark.parametrize(
    ("name", "format"),
    [("out.jpg", "JPEG"), ("out.JPEG", "JPEG"), ("out.webp", "WEBP"), ("out.png", "PNG")],
)
def test_file_name_chooses_the_format(
    random_bundle: Path, tmp_path: Path, name: str, format: str
) -> None:
    paellera("generate", "apple", "-o", tmp_path / name, "--weights", random_bundle, "--steps", "1")
    with PIL.Image.open(tmp_path / name) as picture:
        assert picture.format == format


def test_generate_says_which_encoders_cut_the_prompt(random_bundle: Path, tmp_path: Path) -> None:
    result = paellera(
        "generate",
        "apple " * 40,
        "-o",
        tmp_path / "out.png",
        "--weights",
        random_bundle,
        "--steps",
        "1",
    )
    assert "truncated for byt5 and clip" in result.stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--width", "33"], ["width", "multiple of 16", "33"]),
        (["--height", "4096"], ["height", "4096"]),
        (["--steps", "65"], ["num_inference_steps", "64", "65"]),
        (["--guidance", "high"], ["guidance", "high"]),
        (["--guidance", "1,2,3"], ["guidance_scale", "a list of 2"]),
        (["--temperature", "0"], ["temperature", "0.05"]),
        (["--sampler", "euler"], ["sampler", "argmax", "euler"]),
        (["--seed", str(2**63)], ["seed", str(2**63)]),
        (["-n", "0"], ["n:", "0"]),
        (["--device", "tpu"], ["device", "tpu"]),
        (["--weights", "absent"], ["absent", CONFIG_FILE]),
        (["-o", "picture.gif"], [".png", "picture.gif"]),
        (["-o", "absent/out.png"], ["absent"]),
    ],
)
def test_impossible_request_is_refused_in_one_line(
    random_bundle: Path, tmp_path: Path, options: Sequence[str], words: list[str]
) -> None:
    result = paellera(
        "generate", "apple", "-o", tmp_path / "out.png", "--weights", random_bundle, *options
    )
    assert_one_line(result.stderr, result.exit_code, 2, *words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["edit", "apple", "--image", "FILE"], "image: "),
        (["inpaint", "apple", "--image", "GOOD", "--mask", "FILE"], "mask: "),
        (["vary", "--image", "GOOD", "--image", "FILE"], "image: "),
        (["interpolate", "--keyframe", "apple", "--keyframe", "@FILE"], "keyframe: "),
        (["generate", "apple", "--region", '{"prompt": "a", "mask": "FILE"}'], "region: "),
        (["replay", "FILE"], "png: "),
        (["replay", "GOOD", "--mask", "FILE"], "mask: "),
    ],
)
@pytest.mark.parametrize("name", ["absent.png", "."])
def test_a_file_that_cannot_be_read_is_told_with_its_option(
    random_bundle: Path, tmp_path: Path, command: list[str], words: str, name: str
) -> None:
    good = tmp_path / "good.png"
    PIL.Image.new("RGB", (16, 16)).save(good)
    bad = str(tmp_path / name)
    arguments = [part.replace("FILE", bad).replace("GOOD", str(good)) for part in command]
    result = paellera(*arguments, "-o", tmp_path / "out.png", "--weights", random_bundle)
    assert_one_line(result.stderr, result.exit_code, 2, f"paellera: {words}{bad}: ")
    assert "Errno" not in result.stderr


@pytest.mark.parametrize("name", ["out.jpg", "out.webp", "out"])
def test_replay_writes_png_alone(tmp_path: Path, name: str) -> None:
    png = tmp_path / "first.png"
    PIL.Image.new("RGB", (16, 16)).save(png)
    result = paellera("replay", png, "-o", tmp_path / name)
    assert_one_line(result.stderr, result.exit_code, 2, "output", ".png", name)


NOT_FIELDS = {"output", "weights", "device", "help"}
# Options that have another name than the fields, or become fields of an object.
FIELDS = {
    "steps": "num_inference_steps",
    "guidance": "guidance_scale",
    "reference": "references",
    "region": "regions",
    "keyframe": "keyframes",
    "image_weights": "weights",
    "hires_strength": "hires",
    "hires_steps": "hires",
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_command_has_only_options_that_its_requests_take(operation: Operation) -> None:
    name = "vary" if operation == "variations" else operation
    command = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
    options = {option.name for option in command.params} - NOT_FIELDS
    fields = OPERATIONS[operation][0].model_fields.keys()
    assert {FIELDS.get(option, option) for option in options} <= fields


def test_the_help_of_interpolate_tells_how_frames_are_written() -> None:
    assert "one animation" in " ".join(paellera("interpolate", "--help").stdout.split())


def test_bytes_that_the_locale_does_not_know_are_told_with_it(
    random_bundle: Path, tmp_path: Path
) -> None:
    result = paellera(
        "generate", "w\udcc3\udcbcrfel", "-o", tmp_path / "a.png", "--weights", random_bundle
    )
    assert_one_line(result.stderr, result.exit_code, 2, "locale", "LC_ALL=C.UTF-8")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("absent", "neither the included weights nor the current directory has a absent/"),
        ("/no/such", "there is no /no/such/bundle.json"),
        ("BUNDLE/bundle.json", "it is a file; name its directory"),
    ],
)
def test_weights_that_are_not_there_are_told_by_their_path(
    random_bundle: Path, name: str, words: str
) -> None:
    result = paellera("weights", "verify", name.replace("BUNDLE", str(random_bundle)))
    assert_one_line(result.stderr, result.exit_code, 1, words)


def test_a_configuration_that_is_no_json_is_told_by_its_file(tmp_path: Path) -> None:
    (tmp_path / CONFIG_FILE).write_text("{")
    result = paellera("weights", "verify", tmp_path)
    assert_one_line(result.stderr, result.exit_code, 1, f"{CONFIG_FILE}: Invalid JSON")
    assert "body" not in result.stderr


@pytest.mark.parametrize("memory", ["nan", "-5", "0", "inf"])
def test_a_machine_has_a_memory_of_more_than_nothing(random_bundle: Path, memory: str) -> None:
    result = paellera("weights", "info", random_bundle, "--memory", memory)
    assert_one_line(result.stderr, result.exit_code, 2, "memory", memory)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="writes to /dev/full")
@pytest.mark.parametrize("command", [["config"], ["weights", "list"], ["--version"]])
@pytest.mark.process
def test_output_on_a_full_disk_is_told_in_one_line(command: list[str]) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "server.cli", *command],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=120,
            check=False,
        )
    assert_one_line(done.stderr, done.returncode, 1, "No space left on device")


@pytest.mark.parametrize("arguments", [["-h"], ["--help"], ["generate", "-h"], ["weights", "-h"]])
def test_help_has_a_short_option_too(arguments: list[str]) -> None:
    result = paellera(*arguments)
    assert result.exit_code == 0
    assert result.stdout.startswith("Usage: ")


def test_the_version_is_that_of_the_package() -> None:
    assert paellera("--version").stdout == f"paellera {version('paellera')}\n"


def test_damaged_bundle_is_refused_in_one_line(damaged_bundle: Path, tmp_path: Path) -> None:
    result = paellera("generate", "apple", "-o", tmp_path / "out.png", "--weights", damaged_bundle)
    assert_one_line(result.stderr, result.exit_code, 2, "vqgan.safetensors", "sha256")


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("clip", {"text_cfg": {"hf_model_name": "somebody/code"}}),
        ("recipe", {"prior_steps": 10**9}),
        ("recipe", {"num_inference_steps": 0}),
        ("denoiser", {"blocks": [10**9, 1]}),
        ("denoiser", {"patch_size": -2}),
        ("denoiser", {"c_cond": 60_000}),
        ("vqgan", {"levels": 8}),
    ],
)
def test_hostile_numbers_are_refused_by_verify_in_one_line(
    random_bundle: Path, tmp_path: Path, part: str, change: dict[str, object]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(random_bundle, copy)
    content = json.loads((copy / CONFIG_FILE).read_text())
    content[part] |= change
    (copy / CONFIG_FILE).write_text(json.dumps(content))
    result = paellera("weights", "verify", copy)
    assert_one_line(result.stderr, result.exit_code, 1)


# ── serve ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads /proc")
def test_serve_keeps_torch_out_of_the_api_process(server: Server) -> None:
    assert "libtorch" not in Path(f"/proc/{server.pid}/maps").read_text()


@pytest.mark.parametrize(("drain_timeout_s", "status"), [("600", 200), ("0", 503)])
@pytest.mark.process
def test_a_terminated_server_gives_what_is_running_its_time_and_exits_with_0(
    random_bundle: Path, drain_timeout_s: str, status: int
) -> None:
    settings = {
        "PAELLERA_WEIGHTS": str(random_bundle),
        "PAELLERA_THREADS": "1",
        "PAELLERA_DRAIN_TIMEOUT_S": drain_timeout_s,
    }
    long = {
        "prompt": "a red apple",
        "seed": 1,
        "n": 8,
        "num_inference_steps": 64,
        "deterministic": True,
        "timeout_s": 600,
    }
    with serving(settings) as server, ThreadPoolExecutor(1) as thread:
        answer = thread.submit(httpx.post, f"{server.url}/generate", json=long, timeout=600)
        wait_until(
            lambda: "paella_rows_running 8.0" in httpx.get(f"{server.url}/metrics").text,
            timeout_s=60,
        )
        server.process.terminate()
        assert answer.result().status_code == status
        assert server.process.wait(60) == 0
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{server.url}/healthz")


@pytest.mark.process
def test_used_port_is_told_in_one_line(bundle: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as used:
        port = str(used.getsockname()[1])
        result = paellera_process("serve", "--port", port, "--weights", bundle)
    assert_one_line(result.stderr, result.returncode, 1, "127.0.0.1", port, "in use")


NO_PROCESS = """
import errno
from server.cli import app
from server.engine import worker_process

def refuse(pipe):
    raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

worker_process._popen = refuse
app(["serve", "--port", "0"])
"""


@pytest.mark.process
def test_no_process_for_the_first_worker_is_told_in_one_line_behind_the_log(bundle: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", NO_PROCESS],
        env={**os.environ, "PAELLERA_WEIGHTS": str(bundle)},
        capture_output=True,
        text=True,
        check=False,
    )
    *logged, last = done.stderr.splitlines()
    words = "no worker process could be started: Resource temporarily unavailable"
    assert_one_line(last, done.returncode, 1, words)
    assert "Traceback" not in done.stderr
    assert {json.loads(line)["level"] for line in logged} == {"info", "error"}


# 192.0.2.1 and 2001:db8::1 are for documentation and nobody's, `.invalid` is no domain.
@pytest.mark.parametrize("host", ["192.0.2.1", "2001:db8::1", "host.invalid"])
@pytest.mark.process
def test_a_host_that_is_not_this_machine_is_told_in_one_line_that_names_it_once(
    bundle: Path, host: str
) -> None:
    result = paellera_process("serve", "--host", host, "--port", "0", "--weights", bundle)
    assert_one_line(result.stderr, result.returncode, 1, f"cannot listen on {host} port 0: ")
    assert result.stderr.count(host) == 1


def test_a_port_that_needs_more_rights_is_told_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(address: tuple[str, int]) -> None:
        # As Python words it; root may have such a port.
        raise PermissionError(
            errno.EACCES, f"Permission denied (while attempting to bind on address {address})"
        )

    monkeypatch.setattr(socket, "create_server", refuse)
    with pytest.raises(typer.Exit) as exit_:
        _listen("127.0.0.1", 80)
    assert exit_.value.exit_code == 1
    expected = "paellera: cannot listen on 127.0.0.1 port 80: Permission denied\n"
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--weights", "absent"], ["absent", CONFIG_FILE]),
        (["--weights", ","], ["weights"]),
        (["--port", "65536"], ["--port", "65535", "65536"]),
    ],
)
@pytest.mark.process
def test_settings_that_cannot_be_served_are_refused_in_one_line(
    options: list[str], words: list[str]
) -> None:
    result = paellera_process("serve", *options)
    assert_one_line(result.stderr, result.returncode, 2, *words)


@pytest.mark.process
def test_bad_environment_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAELLERA_QUEUE_ROWS", "many")
    result = paellera_process("serve")
    assert_one_line(result.stderr, result.returncode, 2, "PAELLERA_QUEUE_ROWS", "many")


# ── weights ───────────────────────────────────────────────────────────────────────────────────────


def test_weights_list_names_the_shipped_bundles_and_their_sizes(
    random_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(random_bundle, tmp_path / "shipped")
    (tmp_path / "no-bundle").mkdir()
    monkeypatch.setattr(weights, "__path__", [str(tmp_path)])
    listed = sum(entry.bytes for entry in BundleConfig.read(random_bundle).files.values())
    lines = paellera("weights", "list").stdout.splitlines()
    assert lines[:2] == [f"shipped  {listed / 2**20:.1f} MiB", ""]
    assert any(line.split()[:3] == ["paella_v3", "v3", "denoiser"] for line in lines)


def test_weights_info_counts_parameters_and_bytes(random_bundle: Path) -> None:
    lines = [
        line.split() for line in paellera("weights", "info", random_bundle).stdout.splitlines()
    ]
    config = BundleConfig.read(random_bundle)
    assert ["sha256", config.sha256] in lines
    assert ["native", "size", "32", "x", "32"] in lines
    assert ["size", "step", "16"] in lines
    size = config.files["prior.safetensors"].bytes
    # in 16·16 + 16, out 16·16 + 16, and two blocks of 48·64 + 2·64 + 64·16 + 2·16
    assert ["prior", f"{2 * 272 + 2 * 4256:,}", "parameters", f"{size:,}", "bytes", "F32"] in lines


def test_weights_info_says_what_the_weights_fit_into(random_bundle: Path) -> None:
    lines = paellera("weights", "info", random_bundle, "--memory", "8").stdout.splitlines()
    assert {line.split()[0] for line in lines if line.endswith(", fits in 8 GB")} == {
        "device",
        "cpu",
        "int8",
    }
    assert (
        "does not fit in 1e-09 GB"
        in paellera("weights", "info", random_bundle, "--memory", "1e-9").stdout
    )


def test_weights_info_knows_a_published_bundle_by_its_shapes() -> None:
    lines = paellera("weights", "info", "paella-v3", "--memory", "8").stdout.splitlines()
    parameters = {line.split()[0]: line.split()[1] for line in lines if " parameters " in line}
    assert parameters["denoiser"] == "1,008,350,592"
    fits = {
        line.split()[0]: line.endswith("fits in 8 GB") for line in lines if line.endswith(" 8 GB")
    }
    assert "does not fit" in next(line for line in lines if line.strip().startswith("device"))
    assert fits["cpu"]


def test_weights_verify_accepts_a_whole_bundle(random_bundle: Path) -> None:
    result = paellera("weights", "verify", random_bundle)
    assert result.exit_code == 0
    assert "ok" in result.stdout


def test_weights_verify_says_what_is_wrong(damaged_bundle: Path) -> None:
    result = paellera("weights", "verify", damaged_bundle)
    assert_one_line(result.stderr, result.exit_code, 1, "vqgan.safetensors", "sha256")


def test_weights_verify_names_the_wrong_field_of_the_configuration(damaged_bundle: Path) -> None:
    config = json.loads((damaged_bundle / CONFIG_FILE).read_text())
    config["recipe"]["sampler"] = "euler"
    (damaged_bundle / CONFIG_FILE).write_text(json.dumps(config))
    result = paellera("weights", "verify", damaged_bundle)
    assert_one_line(result.stderr, result.exit_code, 1, CONFIG_FILE, "recipe.sampler", "euler")
