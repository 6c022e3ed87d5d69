"""What the hostile load test calls a violation, and that it attacks a server and reports."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from load_tests.attacks import ATTACKS
from load_tests.hostile import SDAPI_API_MIB, STATED_MIB, Measurement, judge, main
from load_tests.misbehaving import CLOSED, LEFT, Client
from load_tests.serving import serving
from server.settings import Settings
from tests.hostile import huge_animation

GOOD = Measurement(
    sent=100,
    answered=90,
    refused=10,
    quiet={"p99_ms": 100.0},
    attacked={"p99_ms": 300.0},
    idle_mib={"api": 80.0, "worker": 700.0},
    peak_mib={"api": 2000.0, "worker": 1500.0},
    files_left=0,
    rows_left=0,
    restarts=0,
    ready=True,
    closed_after_s=75.0,
)
ALLOWED = {"api": 2000.0, "worker": 1500.0}
ROOT = Path(__file__).parents[1]
FAKE_SERVER = ("-m", "tests.fake_server")


def test_a_server_within_its_bounds_violates_nothing() -> None:
    assert judge(GOOD, ALLOWED, 3) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"answered": 89}, "lost: 1"),
        ({"attacked": {"p99_ms": 301.0}}, "p99: 301 ms, allowed are 300"),
        ({"peak_mib": {"api": 2001.0, "worker": 1.0}}, "api: 2001 MiB, allowed are 2000"),
        ({"peak_mib": {"api": 1.0, "worker": 1501.0}}, "worker: 1501 MiB, allowed are 1500"),
        ({"files_left": 2}, "files_left: 2"),
        ({"rows_left": 3}, "rows_left: 3"),
        ({"restarts": 1}, "restarts: 1"),
        ({"ready": False}, "not ready"),
    ],
)
def test_anything_else_is_named(change: dict[str, Any], words: str) -> None:
    assert judge(replace(GOOD, **change), ALLOWED, 3) == [words]


def memory_tables() -> list[dict[str, int]]:
    """Return the tables of docs/limits.md about memory: MiB by part, the sum last."""
    _, memory = (ROOT / "docs" / "limits.md").read_text().split("\n## Memory\n")
    blocks = [block for block in memory.split("\n## ")[0].split("\n\n") if "**sum" in block]
    tables = []
    for block in blocks:
        rows = [
            [cell.strip(" *") for cell in row.split("|")[1:3]] for row in block.splitlines()[2:]
        ]
        tables.append({part: int(mib.replace(",", "")) for part, mib in rows})
    return tables


def test_the_ceilings_are_those_of_the_documentation_and_the_sums_of_their_parts() -> None:
    tables = memory_tables()
    stated = (STATED_MIB["api"], SDAPI_API_MIB, STATED_MIB["worker"])
    for ceiling, table in zip(stated, tables, strict=True):
        *parts, total = table.values()
        assert total == ceiling
        assert 0 <= total - sum(parts) < 60, "rounded up"


def test_parts_that_settings_bound_follow_from_their_defaults() -> None:
    settings = Settings()
    mib = 2**20
    results = settings.queue_rows * 3 * settings.max_side**2 / mib
    expected = {
        "BODY_BUDGET_BYTES": settings.body_budget_bytes / mib,
        "MAX_BODY_BYTES": 5 * settings.max_body_bytes / mib,
        "QUEUE_BYTES": 2 * settings.queue_bytes / mib,
        "QUEUE_ROWS": 2 * results,
        "ANSWER_BUDGET_BYTES": settings.answer_budget_bytes / mib,
        "IDEMPOTENCY_BYTES": settings.idempotency_bytes / mib,
        "URL_STORE_BYTES": settings.url_store_bytes / mib,
    }
    api, with_sdapi, worker = memory_tables()
    for name, size in expected.items():
        # A name may come after "five times", and is in quotes of code.
        (part,) = (part for part in api if f"`{name}`" in part.split(":")[0])
        assert api[part] == size, part
    *parts, kept, total = api.values()
    assert kept == round(0.05 * sum(parts))
    base, previews, more_kept, _ = with_sdapi.values()
    assert (base, previews) == (sum(parts), results)
    assert more_kept == pytest.approx(0.05 * (base + previews), abs=1)
    assert worker["`QUEUE_BYTES`"] == settings.queue_bytes / mib
    assert worker["`PROMPT_CACHE_BYTES`"] == settings.prompt_cache_bytes / mib
    assert total == STATED_MIB["api"]


@pytest.mark.process
def test_it_attacks_a_server_and_reports(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PAELLERA_WEIGHTS", str(bundle))
    timeouts = ("RECEIVE_TIMEOUT_S=1", "KEEP_ALIVE_S=1", "SEND_TIMEOUT_S=1", "TIMEOUT_S=5")
    arguments = ["--seconds=3", "--quiet-seconds=1", "--rate=5", "--scale=5", "--p99-factor=1e6"]
    arguments += [
        "--api-mib=1e6",
        "--worker-mib=1",
        "--nice=0",
        *(f"--set={change}" for change in timeouts),
    ]
    with pytest.raises(SystemExit) as ended:
        main(arguments, FAKE_SERVER)
    found = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert (ended.value.code, found["good"]) == (1, False), "the worker has more than 1 MiB"
    assert [violation.split(":")[0] for violation in found["violations"]] == ["worker"]
    assert [attack["name"] for attack in found["attempts"]] == [attack.name for attack in ATTACKS]
    outcomes = {outcome for attack in found["attempts"] for outcome in attack}
    assert {"403", "413", LEFT} <= outcomes


@pytest.fixture(scope="module")
def address(bundle: Path) -> Iterator[httpx.URL]:
    with serving({"PAELLERA_WEIGHTS": str(bundle)}, FAKE_SERVER) as server:
        yield httpx.URL(server.url)


@pytest.mark.process
@pytest.mark.parametrize(
    ("attack", "outcome"),
    [
        (Client.send_endless_trailers, {"400", CLOSED}),
        (Client.ask_for_http2, {"200"}),
        (Client.send_deep_form, {"413", "422"}),
        (Client.send_long_list, {"413", "422"}),
        (Client.call_as_foreign_page, {"400"}),
        (lambda client: client.send_files([huge_animation(4096)] * 8, None), {"413"}),
    ],
)
async def test_every_attack_meets_its_bound(
    address: httpx.URL, attack: Any, outcome: set[str]
) -> None:
    assert await attack(Client(address.host, address.port or 80, 0)) in outcome
