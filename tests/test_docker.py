"""The image's recipe and the composition: linted, valid, of one mind, and the recipe's own
commands run, if not in a container.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import string
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import httpx
import pytest
import yaml

from load_tests.serving import free_port
from server.settings import Settings
from server.uvicorn_server import WRITE_TIMEOUT_S
from tests.conftest import wait_until
from tests.support.dockerfile import Instruction, stages

pytestmark = pytest.mark.process

ROOT = Path(__file__).parents[1]
DOCKER = ROOT / "docker"
COMPOSE = yaml.safe_load((DOCKER / "compose.yaml").read_text())
SERVERS = ("server-cpu", "server-gpu")
PATIENCE_S = 300


def test_hadolint_finds_nothing_in_the_dockerfile() -> None:
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent))
    if hadolint is None:
        pytest.skip("no hadolint for this system")
    done = subprocess.run(
        [hadolint, DOCKER / "Dockerfile"],
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 0, done.stdout


def test_the_composition_follows_the_published_schema() -> None:
    command = [
        sys.executable,
        "-m",
        "check_jsonschema",
        "--builtin-schema",
        "vendor.compose-spec",
        str(DOCKER / "compose.yaml"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stdout


def test_the_image_holds_what_the_wheel_is_made_of_and_serves_as_nobody() -> None:
    build, final = stages()
    copied = {name for keyword, rest in build if keyword == "COPY" for name in rest.split()[:-1]}
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"][
        "targets"
    ]["wheel"]["packages"]
    allowed = {
        line[1:]
        for line in (DOCKER / "Dockerfile.dockerignore").read_text().splitlines()
        if line.startswith("!")
    }
    assert copied == allowed == {*wheel, "pyproject.toml", "requirements", "README.md", "LICENSE"}
    assert all((ROOT / name).exists() for name in copied)
    assert dict(final)["USER"] not in ("0", "root")


def test_the_composition_asks_prometheus_to_look_where_the_image_has_its_metrics() -> None:
    environment = dict(part.split("=", 1) for part in shlex.split(dict(stages()[1])["ENV"]))
    scraped = yaml.safe_load((DOCKER / "prometheus/prometheus.yml").read_text())["scrape_configs"][
        0
    ]["static_configs"][0]["targets"]
    for name in SERVERS:
        server = COMPOSE["services"][name]
        (alias,) = server["networks"]["default"]["aliases"]
        assert scraped == [f"{alias}:{environment['PAELLERA_OPERATIONS_PORT']}"]
        assert server["ports"] == [f"127.0.0.1:8000:{environment['PAELLERA_PORT']}"]
        assert {
            variable.removeprefix("PAELLERA_").lower() for variable in server["environment"]
        } <= set(Settings.model_fields)
    assert COMPOSE["services"]["server-gpu"]["build"]["args"] == {"DEVICE": "cuda"}


def test_the_composition_passes_on_what_an_operator_of_a_public_server_sets() -> None:
    names = ("ALLOWED_HOSTS", "API_KEYS", "CORS_ORIGINS", "KEEP_ALIVE_S", "MAX_CONNECTIONS",
             "OPEN_PATHS", "PUBLIC_URL", "TRUSTED_PROXIES")  # fmt: skip
    for name in SERVERS:
        environment = COMPOSE["services"][name]["environment"]
        for variable in (f"PAELLERA_{name}" for name in names):
            assert re.fullmatch(rf"\$\{{{variable}:-.*\}}", environment[variable])


def test_what_the_composition_passes_on_unset_is_the_server_s_default(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    passed = COMPOSE["services"]["server-cpu"]["environment"]
    for variable, value in passed.items():
        monkeypatch.setenv(variable, re.sub(r"\$\{\w+:-(.*)\}", r"\1", value))
    defaults = {name: field.default for name, field in Settings.model_fields.items()}
    assert Settings().model_dump() == defaults


def test_containers_have_time_to_drain_before_they_are_killed() -> None:
    longest_delay_s = 20
    drain_s = Settings.model_fields["drain_timeout_s"].default + WRITE_TIMEOUT_S
    for name in SERVERS:
        server = COMPOSE["services"][name]
        assert "PAELLERA_SHUTDOWN_DELAY_S" in server["environment"]
        assert float(server["stop_grace_period"].removesuffix("s")) >= longest_delay_s + drain_s


def test_containers_are_read_only_without_capabilities_and_published_on_loopback() -> None:
    for name, service in COMPOSE["services"].items():
        assert service["read_only"], name
        assert service["cap_drop"] == ["ALL"]
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        mounted = [
            Path(volume.split(":")[0]) for volume in service["volumes"] if volume.startswith("./")
        ]
        assert all((DOCKER / path).exists() for path in mounted)


def test_the_grace_period_covers_the_delay_the_drain_and_the_answers() -> None:
    settings = Settings()
    needed = settings.shutdown_delay_s + settings.drain_timeout_s + 2 * WRITE_TIMEOUT_S
    for name in SERVERS:
        grace = COMPOSE["services"][name]["stop_grace_period"]
        assert int(grace.removesuffix("s")) >= needed + 20, "room for a delay of 20 s"
        assert "PAELLERA_SHUTDOWN_DELAY_S" in COMPOSE["services"][name]["environment"]


def test_on_a_gpu_triton_can_compile_its_launchers_and_run_them() -> None:
    """A tmpfs is mounted noexec unless told otherwise, and the slim image has no compiler:
    without either torch would compute.
    """
    assert any(keyword == "RUN" and "gcc libc6-dev" in rest for keyword, rest in stages()[1])
    assert COMPOSE["services"]["server-gpu"]["tmpfs"] == ["/tmp:exec"]
    assert COMPOSE["services"]["server-cpu"]["tmpfs"] == ["/tmp"]


def test_on_a_cpu_the_worker_finds_the_faster_allocator() -> None:
    assert any(keyword == "RUN" and "libtcmalloc-minimal4" in rest for keyword, rest in stages()[1])


# ── its commands ──────────────────────────────────────────────────────────────────────────────────


def assign(environment: dict[str, str], rest: str) -> None:
    for name, value in (part.split("=", 1) for part in shlex.split(rest)):
        environment[name] = string.Template(value).substitute(environment)


def build(stage: list[Instruction], directory: Path, environment: dict[str, str]) -> Path:
    """Does what the first stage says, in a directory in place of the root; returns its virtual
    environment, which finds installed dependencies in ours and so need not load a gigabyte."""
    venv, work = directory / "venv", directory / "build"
    work.mkdir()
    for keyword, rest in ((keyword, rest.replace("/venv", str(venv))) for keyword, rest in stage):
        match keyword:
            case "ARG" | "ENV":
                assign(environment, rest)
            case "COPY":
                *sources, target = rest.split()
                for source in sources:
                    copy = shutil.copytree if (ROOT / source).is_dir() else shutil.copy
                    copy(ROOT / source, work / target if (ROOT / source).is_dir() else work)
            case "RUN":
                done = subprocess.run(
                    ["sh", "-c", rest],
                    cwd=work,
                    env=environment,
                    capture_output=True,
                    text=True,
                    check=False,
                )
                assert done.returncode == 0, done.stderr
                for packages in venv.glob("lib/python3*/site-packages"):
                    (packages / "installed.pth").write_text(sysconfig.get_path("purelib"))
    return venv


def contents(directory: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in directory.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_the_image_s_own_commands_install_start_and_stop_a_server_that_writes_nothing(
    tmp_path: Path,
) -> None:
    first, final = stages()
    environment = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
    }
    venv = build(first, tmp_path, environment)
    instructions = {keyword: rest.replace("/venv", str(venv)) for keyword, rest in final}
    assign(environment, instructions["ENV"])
    ports = {"PAELLERA_PORT": str(free_port()), "PAELLERA_OPERATIONS_PORT": str(free_port())}
    home = tmp_path / "home"
    home.mkdir()
    environment |= {**ports, "PAELLERA_HOST": "127.0.0.1", "HOME": str(home), "TMPDIR": str(home)}
    before = contents(venv)
    command = [*json.loads(instructions["ENTRYPOINT"]), *json.loads(instructions["CMD"])]
    check = json.loads(instructions["HEALTHCHECK"].partition("CMD ")[2])

    def is_healthy() -> bool:
        return (
            subprocess.run(check, env=environment, capture_output=True, check=False).returncode == 0
        )

    # To a file: a pipe that nobody reads would stop the server.
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(
            [venv / "bin" / command[0], *command[1:]], env=environment, cwd=home, stderr=log
        )
    try:
        wait_until(lambda: server.poll() is not None or is_healthy(), PATIENCE_S)
        answer = httpx.post(
            f"http://127.0.0.1:{ports['PAELLERA_PORT']}/generate",
            json={"prompt": "a red ball"},
            timeout=PATIENCE_S,
        )
        assert answer.headers["content-type"] == "image/png"
        server.send_signal(getattr(signal, instructions["STOPSIGNAL"]))
        assert server.wait(PATIENCE_S) == 0, (tmp_path / "log").read_text()
    finally:
        server.kill()
        server.wait()
    assert contents(venv) == before
