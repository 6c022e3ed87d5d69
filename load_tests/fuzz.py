"""Run Schemathesis over the whole OpenAPI document, against a real server.

    python -m load_tests.fuzz
    python -m load_tests.fuzz --examples 20 --url http://127.0.0.1:8000 --only /sdapi

No answer may be a 5xx or break the document's promises. All of Schemathesis's checks and one of
ours run in four phases: the document's examples, every bound of every field, random requests valid
and invalid, and sequences of requests. Most valid requests are made cheap before they are sent
(`fuzz_hooks.py`). Exits with 1 if there are findings or fewer requests than --at-least were sent;
the last line is JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from load_tests.report import Report
from load_tests.serving import Sizes, serving
from model.config import BundleConfig, find_bundle
from server.settings import Settings

ROOT = Path(__file__).parents[1]
# What else may become of a request that fits the document; why, a check of our own looks at.
REFUSALS = (400, 404, 409, 413, 422, 429)
CONFIGURATION = f"""
hooks = "load_tests.fuzz_hooks"
request-timeout = 300
continue-on-failure = true
warnings = false

[checks]
# How fast it is, other programs say.
max_response_time = 300

[checks.positive_data_acceptance]
expected-statuses = ["2xx", {", ".join(map(str, REFUSALS))}]
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run Schemathesis and print its findings.

    Raises SystemExit with 1 if there are findings or too few requests, FileNotFoundError without
    Schemathesis.
    """
    sent = list(sys.argv[1:] if arguments is None else arguments)
    options = _parse(sent)
    report = Report("fuzz", command=shlex.join(["python", "-m", "load_tests.fuzz", *sent]))
    with _server(options.url) as url, tempfile.TemporaryDirectory() as directory:
        summary, answers = fuzz(url, options, Path(directory))
    measured = judge(summary, options.at_least, partial=bool(options.only)) | {
        "answers": {" ".join(map(str, key)): n for key, n in sorted(answers.items())}
    }
    report.add(_table(answers))
    report.emit(measured)
    sys.exit(not measured["good"])


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m load_tests.fuzz", description="Schemathesis; the last line is JSON."
    )
    parser.add_argument(
        "--url",
        help="of a server that runs already; otherwise one with the embedded weights is started",
    )
    parser.add_argument(
        "--examples",
        type=int,
        default=150,
        help="random requests for each endpoint, 150 by default",
    )
    parser.add_argument(
        "--at-least",
        type=int,
        default=5000,
        help="requests that must be sent in all, 5000 by default",
    )
    parser.add_argument("--clients", type=int, default=4, help="requests at once, 4 by default")
    parser.add_argument("--seed", type=int, default=0, help="of what is random")
    parser.add_argument("--only", help="paths to test, as a regular expression; default: all")
    parser.add_argument(
        "--keep", type=Path, help="where every request and answer is written to, as lines of JSON"
    )
    return parser.parse_args(arguments)


@contextlib.contextmanager
def _server(url: str | None) -> Iterator[str]:
    if url:
        yield url
        return
    work = native_work(BundleConfig.read(find_bundle(Settings().bundles[0])))
    settings = {
        "PAELLERA_LOG_LEVEL": "error",
        "PAELLERA_MAX_REQUEST_WORK": str(work),
        "PAELLERA_SDAPI": "true",
    }
    with serving(settings) as server:
        yield server.url


def native_work(config: BundleConfig) -> int:
    """Return the work of one guided native image with the recipe's steps.

    A request with more work is rejected.
    """
    width, height = config.native_size
    return 2 * config.recipe.num_inference_steps * width * height


def fuzz(
    url: str, options: argparse.Namespace, directory: Path
) -> tuple[dict[str, Any], Counter[tuple[str, str, int]]]:
    """Return Schemathesis's own summary, and the number of answers.

    The numbers are by (phase, valid or invalid, status).
    """
    configuration, summary, events = (
        directory / name for name in ("schemathesis.toml", "summary.json", "events.ndjson")
    )
    configuration.write_text(CONFIGURATION)
    command = [sys.executable, "-m", "schemathesis.cli", "--config-file", str(configuration)]
    command += ["run", f"{url}/openapi.json", "--checks", "all"]
    command += [
        "--max-examples",
        str(options.examples),
        "--workers",
        str(options.clients),
        "--seed",
        str(options.seed),
    ]
    command += [
        "--report",
        "json,ndjson",
        "--report-json-path",
        str(summary),
        "--report-ndjson-path",
        str(events),
    ]
    if options.only:
        command += ["--include-path-regex", options.only]
    # Its own report is for people; ours ends in JSON.
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    command += ["--generation-database", "none"]
    environment = {**os.environ, "PYTHONPATH": path, "FUZZ_SIDE": str(Sizes.of(url).low)}
    subprocess.run(command, stdout=sys.stderr, cwd=directory, env=environment, check=False)
    if options.keep:
        shutil.copy(events, options.keep)
    with events.open() as lines:
        return json.loads(summary.read_text()), count(json.loads(line) for line in lines)


def count(events: Iterator[Mapping[str, Any]]) -> Counter[tuple[str, str, int]]:
    """Return the number of answers in Schemathesis's events.

    The numbers are by (phase, valid or invalid, status); status 0 is no answer.
    """
    counts: Counter[tuple[str, str, int]] = Counter()
    for event in events:
        scenario = event.get("ScenarioFinished", {})
        recorded = scenario.get("recorder", {})
        for id, interaction in recorded.get("interactions", {}).items():
            mode = recorded["cases"][id]["value"]["meta"]["generation"]["mode"]
            counts[
                scenario["phase"], mode, (interaction.get("response") or {}).get("status_code", 0)
            ] += 1
    return counts


def judge(summary: Mapping[str, Any], at_least: int, *, partial: bool = False) -> dict[str, Any]:
    """Return the figures that matter of Schemathesis's summary.

    good: all phases ran without findings, and sent at least `at_least` requests. partial: the
    selected paths may have nothing for a phase.
    """
    sent = summary["test_cases"]["generated"]
    found = [
        failure["title"] if "title" in failure else str(failure) for failure in summary["failures"]
    ]
    errors = [str(error) for error in summary["errors"]]
    fine = ("success", "skip") if partial else ("success",)
    finished = all(phase["status"] in fine for phase in summary["phases"].values())
    # All, unless --only selects some.
    total = summary["operations"].get("selected", summary["operations"]["total"])
    operations = {"total": total, "tested": summary["operations"]["tested"]}
    good = (
        finished
        and not found
        and not errors
        and sent >= at_least
        and operations["tested"] == operations["total"]
    )
    return {
        "requests": sent,
        "operations": operations,
        "found": found,
        "errors": errors,
        "seed": summary["seed"],
        "good": good,
    }


def _table(answers: Mapping[tuple[str, str, int], int]) -> Table:
    table = Table(
        title="Answers, by phase and by whether the request fits the document", title_justify="left"
    )
    table.add_column("phase")
    table.add_column("request")
    statuses = sorted({status for _, _, status in answers})
    for status in statuses:
        table.add_column(str(status), justify="right")
    for phase, mode in dict.fromkeys((phase, mode) for phase, mode, _ in answers):
        table.add_row(
            phase,
            "valid" if mode == "positive" else "invalid",
            *(str(answers.get((phase, mode, s), "")) for s in statuses),
        )
    return table


if __name__ == "__main__":
    main()
