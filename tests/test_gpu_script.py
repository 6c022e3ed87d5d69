"""The program for a CUDA device, on micro sizes: every part runs, is judged, and keeps what it
found. How fast it is, no test says.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from load_tests.gpu.__main__ import main
from load_tests.gpu.batch import costs
from load_tests.gpu.budget import PLAN, BudgetRun, Progress, Task, choose, run_tasks
from load_tests.gpu.checks import Check, error
from load_tests.gpu.recorders import poisoned, rerun
from load_tests.gpu.results import Results
from load_tests.gpu.timing import Budget, Ceilings, measure
from load_tests.gpu.weights import config_of, random_bundle
from load_tests.report import Report

pytestmark = pytest.mark.heavy

STAGES = {"encode", "prior", "condition", "step", "decode", "loop_2", "request_2"}


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    """The last line, of a run that says all is well."""
    assert main(["--smoke", *arguments]) == 0
    report: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return report


def test_without_a_device_it_says_so_in_a_line_and_measures_nothing(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([]) == 2
    printed = capsys.readouterr()
    assert (printed.out, printed.err.count("\n")) == ("", 1)


def test_all_is_checked_and_every_stage_is_put_beside_its_floor(capsys, tmp_path):
    report = run(
        capsys,
        "--part",
        "checks",
        "stages",
        "--families",
        "v3",
        "--rows",
        "1",
        "--out",
        str(tmp_path),
    )
    checked = {row["check"] for row in report["checks"]}
    assert {
        "logits in float16",
        "prior in bfloat16",
        "features of 3 rows, replayed",
        "argmax draw of 2 rows, replayed",
        "pixels of 1 rows, replayed",
    } <= checked
    for executor in ("eager", "graphs"):
        rows = [row for row in report["stages"] if row.get("executor") == executor]
        assert {row["stage"] for row in rows} == STAGES
        assert all(row["floor_ms"] > 0 and row["p50_ms"] > 0 and row["tflop"] > 0 for row in rows)
    for part in ("checks", "stages"):
        assert json.loads((tmp_path / f"{part}.json").read_text()) == report[part]


def test_v1_is_measured_as_v3_is_and_the_published_sampler_beside_ours(capsys, tmp_path):
    report = run(
        capsys,
        "--part",
        "stages",
        "transcription",
        "profile",
        "--rows",
        "1",
        "--families",
        "v1",
        "v3",
        "--out",
        str(tmp_path),
    )
    assert {
        row["executor"]
        for row in report["stages"]
        if row.get("family") == "v1" and "executor" in row
    } == {"eager", "graphs"}
    assert {row["sampler"].split(",")[0] for row in report["transcription"]} == {
        "ours",
        "published",
    }
    assert all(row["kernels_ms"] for row in report["profile"] if row["launches"])
    assert (tmp_path / "profiles" / "v3-1-step.txt").read_text()


def test_a_server_on_random_weights_answers_and_draws_what_was_promised(capsys):
    report = run(capsys, "--part", "served", "--families", "v3", "--rows", "2")
    rows = {row["what"]: row for row in report["served"]}
    assert rows["one client"]["n"] == 1
    assert rows["saturated"]["pictures_per_s"] > 0
    assert {
        "arrivals at 50%",
        "arrivals at 80%",
        "arrivals at 95%",
        "memory",
        "counters",
    } <= rows.keys()
    (promised,) = (row for row in report["served"] if row.get("deterministic"))
    assert promised["same"] == promised["pictures"]


def test_what_was_found_is_there_after_every_row(tmp_path):
    results = Results("stages", tmp_path)
    for number in range(3):
        results.add({"number": number, "long": {"not": "in the table"}})
        assert json.loads((tmp_path / "stages.json").read_text()) == results.rows
    assert [column.header for column in results.table().columns] == ["number"]


def test_nan_is_an_error_beyond_every_limit():
    reference = torch.randn(10)
    assert error(reference * 1.01, reference) == pytest.approx(0.01, rel=1e-3)
    spoiled = reference.clone()
    spoiled[3] = math.nan
    assert not Check("", error(spoiled, reference), limit=math.inf).good


def test_what_a_replay_leaves_unwritten_shows():
    output = torch.zeros(4)

    def write_half() -> torch.Tensor:
        output[:2] = 1
        return output[:2]

    class Half:
        def replay(self) -> None:
            write_half()

    half = Half()
    half.output = output
    recording = poisoned(lambda function: half)(write_half)
    recording.replay()
    assert output[:2].tolist() == [1, 1]
    assert output[2:].isnan().all()
    whole = poisoned(rerun)(lambda: torch.arange(3))
    whole.replay()
    assert whole.output.tolist() == [0, 1, 2]


def test_a_floor_is_the_longer_of_arithmetic_and_memory():
    ceilings = Ceilings(flops=1e12, bytes=1e9)
    assert ceilings.floor_ms(2e9, 1e6) == pytest.approx(2)
    assert ceilings.floor_ms(1e9, 5e6) == pytest.approx(5)


def test_a_request_costs_what_its_stages_cost():
    bundle = random_bundle(config_of("v3", micro=True), torch.device("cpu"), torch.float32)
    found = costs(bundle, (32, 32), (2, 3))
    for n in (2, 3):
        parts = [found[name].flops for name in ("encode", "prior", "condition", "decode")] + [
            n * found["step"].flops
        ]
        assert found[f"request_{n}"].flops == pytest.approx(sum(parts))
    assert found["step"].read == sum(p.nbytes for p in bundle.denoiser.parameters())


def test_a_slow_stage_is_repeated_less_often_but_never_less_than_asked():
    calls = []
    figures = measure(
        lambda: calls.append(1), torch.device("cpu"), Budget(runs=50, seconds=0.0, least=5)
    )
    assert figures["n"] == 5
    assert len(calls) == 8  # three of them to warm up


def test_random_weights_are_the_same_in_every_type_up_to_rounding(tmp_path: Path):
    config = config_of("v1", micro=True)
    exact, half = (
        random_bundle(config, torch.device("cpu"), dtype)
        for dtype in (torch.float32, torch.bfloat16)
    )
    for (name, one), (_, other) in zip(
        exact.denoiser.state_dict().items(), half.denoiser.state_dict().items(), strict=True
    ):
        torch.testing.assert_close(one.to(torch.bfloat16), other, msg=name)


def report_of_nothing() -> Report:
    return Report("gpu", command="test", hardware={})


def test_run_by_budget_records_every_task_and_ends_in_one_json_line(capsys, tmp_path):
    status = main(
        ["--smoke", "--budget-minutes", "3", "--out", str(tmp_path), "--tasks", "stages-v1"]
    )
    assert status == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    task = report["tasks"]["stages-v1"]
    assert task["outcome"] == "passed"
    assert {"loop_2", "decode"} <= {row.get("stage") for row in task["rows"]["stages"]}
    assert json.loads((tmp_path / "gpu.json").read_text())["tasks"] == report["tasks"]


def test_task_that_no_longer_fits_the_budget_is_skipped_and_says_so(tmp_path):
    long = Task("long", seconds=3600, arguments=())
    assert BudgetRun([long], minutes=0.2, out=tmp_path, report=report_of_nothing()).run() == 0
    assert Progress(tmp_path).read()["ended"]["long"]["outcome"] == "skipped: no time left"


def test_failed_task_is_recorded_and_the_next_one_still_runs(tmp_path):
    def run(arguments: Sequence[str]) -> int:
        if "broken" in arguments:
            raise RuntimeError("device-side assert")
        return 1 if "wrong" in arguments else 0

    tasks = [Task(name, 0.0, (name,)) for name in ("broken", "wrong", "fine")]
    assert run_tasks(tasks, 60, tmp_path, run, device_works=lambda: True) == 0
    outcomes = {
        name: ended["outcome"] for name, ended in Progress(tmp_path).read()["ended"].items()
    }
    assert outcomes == {
        "broken": "failed: RuntimeError: device-side assert",
        "wrong": "failed: a check did not pass",
        "fine": "passed",
    }


def test_device_that_no_longer_works_asks_for_a_new_process(tmp_path):
    def run(arguments: Sequence[str]) -> int:
        raise RuntimeError("an illegal memory access was encountered")

    tasks = [Task("broken", 0.0, ()), Task("next", 0.0, ())]
    assert run_tasks(tasks, 60, tmp_path, run, device_works=lambda: False) != 0
    assert list(Progress(tmp_path).read()["ended"]) == ["broken"]


def test_unknown_task_names_the_known_ones():
    with pytest.raises(ValueError, match="checks-v3"):
        choose(PLAN, ["check"])
