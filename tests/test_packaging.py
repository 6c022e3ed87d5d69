"""The wheel holds everything that an installed Paellera needs, the embedded weights among it."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from model.config import BundleConfig

pytestmark = pytest.mark.process

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The files of a freshly built wheel."""
    out = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        str(out),
        str(ROOT),
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    (wheel,) = out.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_the_wheel_holds_the_embedded_weights(names: set[str]) -> None:
    listed = BundleConfig.read(ROOT / "weights" / "tiny").files
    assert {f"weights/tiny/{name}" for name in (*listed, "bundle.json")} <= names
    assert "weights/manifest.toml" in names


def test_the_wheel_holds_the_playground(names: set[str]) -> None:
    files = {path.name for path in (ROOT / "server" / "playground").iterdir()}
    assert "index.html" in files
    assert {f"server/playground/{name}" for name in files} <= names


def test_the_wheel_holds_the_packages_and_nothing_of_the_tests(names: set[str]) -> None:
    assert {"server/cli/main.py", "model/denoiser.py", "load_tests/bench.py"} <= names
    outside = ("tests/", "runs/", "docs/", "model/training/judges/")
    assert not [name for name in names if name.startswith(outside)]


def test_the_embedded_weights_are_small_enough_for_a_repository() -> None:
    size = sum(path.stat().st_size for path in (ROOT / "weights" / "tiny").iterdir())
    assert size <= 40e6
