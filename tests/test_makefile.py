"""The Makefile makes a virtual environment where none is usable, and lists its targets."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.process

ROOT = Path(__file__).parents[1]
MADE_ANEW = ".venv has no pip, or no Python 3.11 or newer: making it anew"

# A Python of another version. Its environments hold itself, with a pip that installs nothing.
PYTHON = """#!{real}
import pathlib, shutil, sys

sys.version_info = {version}


def write(name, text):
    path = directory / name
    path.write_text(text)
    path.chmod(0o755)


match sys.argv[1:]:
    case ["-c", code]:
        exec(code)
    case ["-m", "venv", "--clear", name]:
        directory = pathlib.Path(name)
        shutil.rmtree(directory, ignore_errors=True)
        (directory / "bin").mkdir(parents=True)
        write("pyvenv.cfg", "")
        shutil.copy(__file__, directory / "bin" / "python")
        if not {has_ensurepip}:
            sys.exit("ensurepip is not available")
        write("bin/pip", "#!/bin/sh\\necho install >> .venv/installed\\n")
        write("bin/paellera", "#!/bin/sh\\necho served\\n")
    case unknown:
        sys.exit(f"unexpected arguments: {{unknown}}")
"""

Make = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What the Makefile reads, without an environment."""
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "requirements", tmp_path / "requirements")
    return tmp_path


@pytest.fixture
def make(checkout: Path) -> Make:
    """Run make with a Python of a version, which may lack ensurepip."""

    def run(
        *targets: str, version: tuple[int, int, int] = (3, 11, 7), has_ensurepip: bool = True
    ) -> subprocess.CompletedProcess[str]:
        python = checkout / "python"
        text = PYTHON.format(real=sys.executable, version=version, has_ensurepip=has_ensurepip)
        python.write_text(text)
        python.chmod(0o755)
        # MAKEFLAGS and the like belong to the make that may run the tests.
        environment = {name: value for name, value in os.environ.items() if "MAKE" not in name}
        return subprocess.run(
            ["make", *targets],
            cwd=checkout,
            env=environment | {"PYTHON": str(python)},
            capture_output=True,
            text=True,
            check=False,
        )

    return run


def installations(checkout: Path) -> int:
    """Return how often pip was called in the environment."""
    return len((checkout / ".venv" / "installed").read_text().splitlines())


def test_the_environment_is_made_once(make: Make, checkout: Path) -> None:
    first = make("serve")
    assert first.returncode == 0, first.stderr
    assert first.stdout.endswith("served\n")
    assert MADE_ANEW not in first.stdout
    installed = installations(checkout)
    second = make("serve")
    assert second.stdout.splitlines()[-1] == "served"
    assert "venv --clear" not in second.stdout
    assert installations(checkout) == installed > 0


def test_a_python_that_is_too_old_is_told_before_anything_is_made(
    make: Make, checkout: Path
) -> None:
    done = make("serve", version=(3, 10, 13))
    assert done.returncode == 2
    assert done.stderr.splitlines()[0] == (
        "Python 3.11 or newer is required, this is 3.10.13; PYTHON=python3.12 make serve"
    )
    assert not (checkout / ".venv").exists()
    assert make("serve", version=(3, 12, 1)).stdout.endswith("served\n")


def test_the_makefile_wants_the_python_that_the_package_requires() -> None:
    required = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    text = (ROOT / "Makefile").read_text()
    versions = re.findall(r"Python (3\.\d+) or newer|--python-version (\S+)", text)
    assert {f">={one or other}" for one, other in versions} == {required}
    (new_enough,) = re.findall(r"sys\.version_info >= \((\d+), (\d+)\)", text)
    assert f">={'.'.join(new_enough)}" == required


def test_a_failed_creation_leaves_nothing_and_the_next_try_succeeds(
    make: Make, checkout: Path
) -> None:
    failed = make("serve", has_ensurepip=False)
    assert failed.returncode == 2
    assert "ensurepip is not available" in failed.stderr
    assert not (checkout / ".venv").exists()
    assert make("serve").stdout.endswith("served\n")


def break_pip(environment: Path) -> None:
    (environment / "bin" / "pip").unlink()


def make_older(environment: Path) -> None:
    python = environment / "bin" / "python"
    python.write_text(python.read_text().replace("(3, 11, 7)", "(3, 10, 13)"))


def remove_python(environment: Path) -> None:
    """As after an upgrade of the system's Python."""
    python = environment / "bin" / "python"
    python.unlink()
    python.symlink_to("/absent/python3.11")


@pytest.mark.parametrize("damage", [break_pip, make_older, remove_python])
def test_an_environment_that_cannot_be_used_is_made_anew_and_filled(
    make: Make, checkout: Path, damage: Callable[[Path], None]
) -> None:
    make("serve")
    installed = installations(checkout)
    damage(checkout / ".venv")
    done = make("serve")
    assert MADE_ANEW in done.stdout.splitlines()
    assert done.stdout.endswith("served\n")
    assert installations(checkout) == installed
    assert MADE_ANEW not in make("serve").stdout


def test_an_old_environment_is_kept_until_there_is_a_python_for_a_new_one(
    make: Make, checkout: Path
) -> None:
    make("serve")
    make_older(checkout / ".venv")
    assert make("serve", version=(3, 10, 13)).returncode == 2
    assert (checkout / ".venv" / "installed").exists()


def test_a_directory_that_is_no_environment_is_kept(make: Make, checkout: Path) -> None:
    (checkout / ".venv").mkdir()
    (checkout / ".venv" / "notes").touch()
    done = make("serve")
    assert done.returncode == 2
    assert ".venv is no virtual environment: move it away" in done.stderr
    assert (checkout / ".venv" / "notes").exists()


@pytest.mark.parametrize("targets", [[], ["help"]])
def test_make_alone_and_help_list_every_target(
    make: Make, checkout: Path, targets: list[str]
) -> None:
    done = make(*targets)
    assert done.returncode == 0, done.stderr
    listed = [re.split(r"\s{2,}", line, maxsplit=1) for line in done.stdout.splitlines()]
    assert all(len(entry) == 2 for entry in listed), listed
    (phony,) = re.findall(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert sorted(" ".join(names for names, _ in listed).split()) == sorted(phony.split())
    assert not (checkout / ".venv").exists()
