"""The documents: links lead somewhere, and examples and names are valid."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from server.environment import KNOWN
from server.settings import Settings

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(
    path
    for folder in (".", "docs", "docs/contributing", "weights", "tests/data")
    for path in (ROOT / folder).glob("*.md")
)
NAMES = [path.relative_to(ROOT).as_posix() for path in DOCUMENTS]
FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")
