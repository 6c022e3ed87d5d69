"""Comments and docstrings name modules and classes that exist."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCES = [
    path
    for folder in ("server", "model", "load_tests", "tests", "docs", "weights")
    for path in (ROOT / folder).rglob("*.py")
]
FILE = re.compile(r"`([\w/]+\.py)\b")
# `module.Class` and `module.CONSTANT`; other names may be fields of an object.
MEMBER = re.compile(r"`([a-z_]\w*)\.([A-Z]\w*)")


def defined_in(path: Path) -> Iterator[str]:
    """The classes and constants at a module's top level."""
    for statement in ast.parse(path.read_text()).body:
        if isinstance(statement, ast.ClassDef):
            yield statement.name
        if isinstance(statement, ast.Assign | ast.AnnAssign):
            yield from (
                node.id
                for node in ast.walk(statement)
                if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
            )


def stale_names(text: str) -> list[str]:
    """The files and members of modules that a text names and the repository lacks."""
    members: dict[str, set[str]] = defaultdict(set)
    for path in SOURCES:
        members[path.stem].update(defined_in(path))
    paths = [path.as_posix() for path in SOURCES]
    found = [
        file for file in FILE.findall(text) if not any(path.endswith(f"/{file}") for path in paths)
    ]
    for module, name in MEMBER.findall(text):
        is_other = module not in members and find_spec(module) is not None
        if not is_other and name not in members[module]:
            found.append(f"{module}.{name}")
    return found


def test_comments_and_docstrings_name_modules_and_classes_that_exist() -> None:
    texts = [path.read_text() for path in SOURCES if path.relative_to(ROOT).parts[0] in
             ("server", "model")]  # fmt: skip
    assert stale_names("\n".join(texts)) == []


def test_a_name_that_is_gone_is_found() -> None:
    text = "`nowhere.py`, `nowhere.Guard`, `auth.Nobody`, `auth.Keys`, `random.Random`"
    assert stale_names(text) == ["nowhere.py", "nowhere.Guard", "auth.Nobody"]
