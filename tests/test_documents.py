"""The documents: links lead to a file and a heading, examples are whole, settings exist."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from server.environment import OTHER_READERS, PREFIX
from server.settings import Settings

ROOT = Path(__file__).parents[1]
FOLDERS = (".", "docs", "docs/contributing", "weights", "tests/data")
NAMES = sorted(
    path.relative_to(ROOT).as_posix() for folder in FOLDERS for path in (ROOT / folder).glob("*.md")
)
# Records of the past, with the names that things had then.
RECORDS = {"CHANGELOG.md", "docs/log.md"}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")
SETTING = re.compile(rf"{PREFIX}([A-Z0-9]+(?:_[A-Z0-9]+)*)")
SERVICE = "SERVICE_HOST"  # of Kubernetes' service variables, which docs/deploy.md explains


def prose(name: str) -> str:
    """Return a document without its examples."""
    return FENCE.sub("", (ROOT / name).read_text())


def anchors(name: str) -> set[str]:
    """Return the anchors of a document's headings, as GitHub makes them."""
    titles = (re.sub(r"[^\w\- ]", "", title.lower()) for title in HEADING.findall(prose(name)))
    return {title.strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", NAMES)
def test_a_relative_link_leads_to_a_file_and_a_heading(name: str) -> None:
    for link in LINK.findall(prose(name)):
        if ":" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / name).parent / path if path else ROOT / name
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.resolve().relative_to(ROOT).as_posix()), link


@pytest.mark.parametrize("name", NAMES)
def test_an_example_in_python_or_yaml_or_json_is_valid(name: str) -> None:
    for language, text in FENCE.findall((ROOT / name).read_text()):
        if language == "python":
            compile(text, name, "exec")
        elif language == "yaml":
            assert list(yaml.safe_load_all(text))
        elif language == "json":
            assert json.loads(text if text.startswith("{") else f"{{{text}}}")


@pytest.mark.parametrize("name", sorted(set(NAMES) - RECORDS))
def test_a_setting_in_a_document_exists(name: str) -> None:
    known = {field.upper() for field in Settings.model_fields} | set(OTHER_READERS) | {SERVICE}
    assert set(SETTING.findall((ROOT / name).read_text())) <= known
