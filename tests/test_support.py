"""Test modules share by way of `tests/support` and `tests/conftest.py`, never with each other."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).parent
SUPPORT = TESTS / "support"


def imported_by(path: Path) -> Iterator[str]:
    """Yield the modules that a file imports, and the names in them, as `module.name`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_nothing_imports_a_test_module() -> None:
    found = [
        f"{path.relative_to(TESTS)} imports {name}"
        for path in TESTS.rglob("*.py")
        for name in imported_by(path)
        if name.startswith("tests.") and any(part.startswith("test_") for part in name.split("."))
    ]
    assert found == []


def test_every_module_of_the_support_is_used_by_several_others() -> None:
    users = defaultdict(set)
    for path in TESTS.rglob("*.py"):
        for name in imported_by(path):
            users[".".join(name.split(".")[:3])].add(path)
    modules = [path.stem for path in SUPPORT.glob("*.py") if path.stem != "__init__"]
    assert modules
    assert [name for name in modules if len(users[f"tests.support.{name}"]) < 2] == []
