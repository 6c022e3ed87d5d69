"""The Dockerfile's instructions."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
Instruction = tuple[str, str]


def stages() -> list[list[Instruction]]:
    """The Dockerfile's instructions after each FROM."""
    text = re.sub(r"^#.*\n", "", (DOCKER / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = [line for line in re.sub(r"\\\n", " ", text).splitlines() if line]
    made: list[list[Instruction]] = []
    for keyword, _, rest in (line.partition(" ") for line in lines):
        if keyword == "FROM":
            made.append([])
        made[-1].append((keyword, rest.strip()))
    return made
