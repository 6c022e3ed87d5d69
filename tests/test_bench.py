"""The bench runs from end to end and keeps its promises about its output. How fast anything is,
no test says.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from load_tests import bench
from load_tests.bench import _overheads, main
from load_tests.report import quantiles
from load_tests.stages import Workload, flops, measure
from model.config import BundleConfig
from model.pipeline import Pipeline


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[list[str], dict[str, Any]]:
    """The lines before the last, and the last one as JSON."""
    main(arguments, program="bench")
    *lines, last = capsys.readouterr().out.splitlines()
    return lines, json.loads(last)


def test_the_command_runs_anew_in_a_worker_s_environment_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    begun: list[tuple[str, list[str], dict[str, str]]] = []
    monkeypatch.setattr(bench.os, "execve", lambda *how: begun.append(how))
    monkeypatch.setenv("LD_PRELOAD", "other.so")
    bench.begin_as_a_worker()
    assert not begun, "the environment's own allocator takes precedence"
    monkeypatch.delenv("LD_PRELOAD")
    monkeypatch.setattr("server.engine.cpu_environment.faster_allocator", lambda: "fast.so")
    bench.begin_as_a_worker()
    ((program, words, environment),) = begun
    assert (program, words) == (sys.executable, sys.orig_argv)
    assert environment["LD_PRELOAD"] == "fast.so"
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    bench.begin_as_a_worker()
    assert len(begun) == 1


def test_last_line_holds_every_stage_the_server_and_the_machine(
    random_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines, report = run(
        capsys,
        "--weights",
        str(random_bundle),
        "--steps",
        "1,2",
        "--repeats",
        "1",
        "--requests",
        "1",
    )
    assert report["overhead_ms"].keys() == {"1", "2"}
    for overhead in report["overhead_ms"].values():
        assert overhead.keys() == {"beyond_request", "beyond_loop"}
    stages = {
        "request_1",
        "request_2",
        "encode",
        "prior",
        "condition",
        "step",
        "loop_1",
        "loop_2",
        "decode",
        "transcription_loop_1",
        "transcription_loop_2",
    }
    assert stages <= report["stages"].keys()
    for figures in report["stages"].values():
        assert figures.keys() == {"n", "p50_ms", "p95_ms", "p99_ms", "gflop", "floor_ms"}
        assert all(figure > 0 for figure in figures.values())
    assert report["speedup"].keys() >= {"transcription_loop_1", "transcription_loop_2"}
    assert report["http"]["requests"].keys() == {"1", "2"}
    for figures in report["http"]["requests"].values():
        assert figures["server_timing_ms"].keys() == {
            "queue",
            "encode",
            "prior",
            "denoise",
            "decode",
            "image",
        }
    assert report["http"]["start_to_ready_s"] > 0
    assert report["sha256"] == BundleConfig.read(random_bundle).sha256
    assert report["command"].startswith("bench --weights")
    assert {"cpu", "cores", "cpu_flags", "load_average"} <= report["hardware"].keys()
    assert {"python", "torch"} <= report["versions"].keys()
    assert any("loop_2" in line for line in lines)


def test_quick_options_leave_out_what_they_say(
    random_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = (
        "--steps",
        "1",
        "--repeats",
        "1",
        "--requests",
        "0",
        "--no-transcription",
        "--json-only",
    )
    lines, report = run(capsys, "--weights", str(random_bundle), *options)
    assert lines == []
    assert "http" not in report
    assert not any(name.startswith("transcription") for name in report["stages"])


def test_a_preset_is_measured_beside_quality(
    preset_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--steps", "2", "--repeats", "1", "--requests", "1", "--no-transcription")
    weights = ("--weights", str(preset_bundle), "--preset", "fast")
    lines, report = run(capsys, *weights, *options)
    assert {"prior_fast", "condition_fast", "step_fast", "loop_fast", "request_fast"} <= report[
        "stages"
    ].keys()
    assert report["http"]["requests"].keys() == report["overhead_ms"].keys() == {"2", "fast"}
    assert report["speedup"]["fast"] > 0
    assert any("fast" in line for line in lines)
    with pytest.raises(ValueError, match="has fast, and not best"):
        main(["--weights", str(preset_bundle), "--preset", "best"])


@pytest.mark.parametrize("arguments", [["--steps", "0"], ["--steps", "8,"], ["--repeats", "0"]])
def test_impossible_arguments_are_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)


def test_stages_take_turns_and_the_warm_up_is_not_counted() -> None:
    calls: list[str] = []
    stages = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    seconds = measure(stages, torch.device("cpu"), warm_up=1, repeats=2)
    assert calls == ["a", "b"] * 3
    assert {name: len(taken) for name, taken in seconds.items()} == {"a": 2, "b": 2}


def test_quantiles_are_milliseconds_of_the_sorted_times() -> None:
    assert quantiles([i / 1000 for i in range(100, -1, -1)]) == {
        "n": 101,
        "p50_ms": 50,
        "p95_ms": 95,
        "p99_ms": 99,
    }


def test_overheads_are_the_medians_over_http_less_those_in_this_process() -> None:
    http = {"requests": {"8": {"p50_ms": 70.0}}}
    assert _overheads(http, {"request_8": {"p50_ms": 55.5}, "loop_8": {"p50_ms": 40.0}}) == {
        "8": {"beyond_request": 14.5, "beyond_loop": 30.0}
    }


def test_flops_count_the_attention_kernel_of_the_cpu() -> None:
    q, k, v = torch.randn(1, 2, 8, 16), torch.randn(1, 2, 12, 16), torch.randn(1, 2, 12, 16)
    # Two products of 8 × 16 × 12 in each of two heads.
    assert flops(lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v)) == 2 * 2 * (
        2 * 8 * 16 * 12
    )


def test_loop_costs_its_steps(pipeline: Pipeline) -> None:
    stages = Workload(pipeline).engine_stages((2, 3))
    for name in ("loop_2", "loop_3"):
        stages[name]()  # the first one also fills the time tables
    assert flops(stages["loop_3"]) == 3 * flops(stages["step"])
    assert flops(stages["loop_2"]) == 2 * flops(stages["step"])
