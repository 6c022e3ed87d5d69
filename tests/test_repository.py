"""Keep what everybody who clones the repository downloads small."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.process

ROOT = Path(__file__).parents[1]
MB = 1_000_000


@pytest.fixture(scope="module")
def sizes() -> dict[str, int]:
    """The bytes of every tracked file."""
    if not (ROOT / ".git").exists():
        pytest.skip("no git checkout")
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True
    )
    names = [name for name in listed.stdout.split("\0") if name]
    return {name: (ROOT / name).stat().st_size for name in names if (ROOT / name).exists()}


def test_all_tracked_files_are_at_most_48_mb(sizes: dict[str, int]) -> None:
    assert sum(sizes.values()) <= 48 * MB


def test_the_embedded_weights_are_at_most_32_mb_and_a_file_20(sizes: dict[str, int]) -> None:
    weights = {name: size for name, size in sizes.items() if name.startswith("weights/")}
    assert weights
    assert sum(weights.values()) <= 32 * MB
    assert max(weights.values()) <= 20 * MB


def test_the_judges_weights_are_at_most_4_mb(sizes: dict[str, int]) -> None:
    judges = [size for name, size in sizes.items() if name.startswith("model/training/judges/")]
    assert 0 < sum(judges) <= 4 * MB


def test_images_in_the_documentation_are_compressed_well(sizes: dict[str, int]) -> None:
    images = {
        name: size
        for name, size in sizes.items()
        if name.startswith("docs/") and Path(name).suffix in {".png", ".webp", ".jpg"}
    }
    assert {name: size for name, size in images.items() if size > 300_000} == {}
