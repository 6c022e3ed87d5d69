"""The planted faults are those that are meant, each once, and their count is honest."""

from __future__ import annotations

import ast
import subprocess
from pathlib import Path

import pytest

from load_tests import mutate
from load_tests.equivalent_mutants import EQUIVALENT
from load_tests.mutants import Mutant, find_mutants
from load_tests.mutate import Copy, Kept, Result, related_tests, run_mutant, sample, summary
from load_tests.related_tests import RELATED_TESTS
from load_tests.report import wilson_interval

SOURCE = '''"""A docstring."""
import logging
log = logging.getLogger(__name__)

@dataclass(frozen=True)
class Box:
    size: int = 3

    def put(self, n: int = 2) -> float:
        """Return 1."""
        log.info("put %d", 1 + n)
        self.size += n
        if n < self.size and not self.full:
            return max(n, 1) / 2.5
        return [f"{n + 1}" for n in range(n) if n]
'''


def changes(source: str) -> set[tuple[str, str]]:
    return {(mutant.before, mutant.after) for mutant in find_mutants("a.py", source)}


def test_operators_constants_conditions_and_statements_are_changed() -> None:
    assert changes(SOURCE) == {
        ("3", "4"),
        ("2", "3"),
        ("1", "2"),
        ("2.5", "5.0"),
        ("self.size += n", "pass"),
        ("self.size += n", "self.size -= n"),
        ("n < self.size", "n <= self.size"),
        ("n < self.size", "n >= self.size"),
        ("n < self.size and (not self.full)", "n < self.size or not self.full"),
        ("n < self.size and (not self.full)", "not (n < self.size and (not self.full))"),
        ("not self.full", "self.full"),
        ("max(n, 1) / 2.5", "max(n, 1) * 2.5"),
        ("max(n, 1)", "min(n, 1)"),
        ("n", "not (n)"),
    }


def test_every_mutant_is_the_module_with_one_change_and_has_a_name_of_its_own() -> None:
    mutants = find_mutants("a.py", SOURCE)
    assert (
        len({mutant.source for mutant in mutants})
        == len(mutants)
        == len({mutant.identity for mutant in mutants})
    )
    for mutant in mutants:
        ast.parse(mutant.source)
        assert len(mutant.source.splitlines()) == len(SOURCE.splitlines())
    assert "server/x.py:Box.put: self.size += n -> pass" in {
        m.identity for m in find_mutants("server/x.py", SOURCE)
    }


def test_a_text_of_several_bytes_a_letter_is_changed_in_its_place() -> None:
    (mutant,) = find_mutants("a.py", 'x = "ä", 1 \n')
    assert mutant.source == 'x = "ä", (2) \n'


def test_a_draw_depends_on_its_seed_alone() -> None:
    modules = ["server/engine/scheduler.py", "model/rows.py"]
    drawn = sample(modules, 10, seed=1)
    assert drawn == sample(modules, 10, seed=1) != sample(modules, 10, seed=2)
    assert len(set(drawn)) == 10
    assert {mutant.module for mutant in sample(modules, 0, seed=1)} == set(modules)
    with pytest.raises(FileNotFoundError):
        sample(["server/none.py"], 1, seed=0)


@pytest.fixture(scope="module")
def every_mutant() -> list[Mutant]:
    return sample(mutate.MODULES, 0, seed=0)


def test_every_module_with_mutants_has_tests(every_mutant: list[Mutant]) -> None:
    for module in {mutant.module for mutant in every_mutant}:
        assert related_tests(module)


def test_modules_and_tests_that_are_related_exist() -> None:
    for module, tests in RELATED_TESTS.items():
        assert (mutate.ROOT / module).exists()
        assert all((mutate.ROOT / "tests" / f"{name}.py").exists() for name in tests), module


def planted(name: str) -> Mutant:
    return Mutant("a.py", 1, "", "x", "x", name, "source")


@pytest.mark.parametrize(
    ("code", "outcome"),
    [(0, "survived"), (1, "caught"), (2, "caught"), (4, "caught"), (None, "timeout")],
)
def test_an_outcome_is_pytest_s_exit_code(tmp_path: Path, code: int | None, outcome: str) -> None:
    class Played(Copy):
        def __init__(self) -> None:
            self.directory = tmp_path

        def run_tests(self, tests, timeout_s):
            assert (tmp_path / "a.py").read_text() == "source"
            return code, 1.0

    (tmp_path / "a.py").write_text("original")
    assert run_mutant(Played(), planted("x"), ["tests/test_a.py"], 60.0).outcome == outcome
    assert (tmp_path / "a.py").read_text() == "original"


def test_equivalent_mutants_are_not_run_and_do_not_count(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(mutate, "EQUIVALENT", {planted("x").identity: "why"})
    assert run_mutant(None, planted("x"), [], 60.0).outcome == "equivalent"  # type: ignore[arg-type]
    outcomes = ["caught"] * 7 + ["timeout"] + ["survived"] * 2 + ["equivalent"] * 5
    figures = summary([Result(planted("x"), outcome, 1.0) for outcome in outcomes])  # type: ignore[arg-type]
    assert (figures["mutants"], figures["rate"], figures["equivalent"]) == (15, 0.8, 5)
    assert figures["survivors"] == [planted("x").identity] * 2


def test_what_was_caught_is_not_run_again_and_a_survivor_is(tmp_path: Path) -> None:
    path = tmp_path / "outcomes.jsonl"
    for name, outcome in (("a", "caught"), ("b", "survived"), ("c", "timeout")):
        Kept(path).add(Result(planted(name), outcome, 1.26))  # type: ignore[arg-type]
    again = Kept(path)
    assert again.get(planted("a")) == Result(planted("a"), "caught", 1.3)
    assert again.get(planted("b")) is None
    assert again.get(planted("c")) == Result(planted("c"), "timeout", 1.3)
    assert again.get(planted("d")) is None
    Kept(None).add(Result(planted("a"), "caught", 1.0))
    assert Kept(None).get(planted("a")) is None


def test_wilson_s_interval_is_the_published_one() -> None:
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)  # Newcombe 1998
    assert wilson_interval(0, 20) == pytest.approx((0, 0.1611), abs=1e-4)
    assert wilson_interval(0, 0) == (0.0, 1.0)


@pytest.mark.process
def test_a_copy_has_the_files_of_the_working_tree_and_runs_their_tests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "root"
    (root / "tests").mkdir(parents=True)
    (root / "a.py").write_text("def f(n):\n    return n < 3\n")
    (root / "tests" / "test_a.py").write_text(
        "from a import f\n\ndef test_f():\n    assert f(2) and not f(3)\n"
    )
    (root / "ignored.txt").write_text("")
    (root / ".gitignore").write_text("ignored.txt\n")
    subprocess.run(["git", "init", "-q"], cwd=root, check=True)
    monkeypatch.setattr(mutate, "ROOT", root)
    monkeypatch.setattr(mutate, "MARKERS", "")
    copy = Copy(tmp_path / "copy")
    assert not (copy.directory / "ignored.txt").exists()
    assert copy.run_tests(["tests/test_a.py"], 300.0)[0] == 0
    (boundary, *_) = find_mutants("a.py", (root / "a.py").read_text())
    assert run_mutant(copy, boundary, ["tests/test_a.py"], 300.0).outcome == "caught"


def test_every_fault_said_to_change_nothing_is_still_in_the_code(
    every_mutant: list[Mutant],
) -> None:
    known = {mutant.identity for mutant in every_mutant}
    assert [identity for identity in EQUIVALENT if identity not in known] == []
