"""Attack the server in every known way at once, with legitimate requests beside the attacks.

    python -m load_tests.hostile
    python -m load_tests.hostile --seconds 30 --scale 0.5 --set QUEUE_ROWS=64

Legitimate requests first arrive alone (the quiet phase), and then beside all attacks of
`load_tests/attacks.py`, at the rates of `ATTACKS`. The attackers are one process of the lowest
priority. In the end it stops without closing its connections, which the server must do by itself.
Exits with 1 if a process took more memory than docs/limits.md allows, if the p99 of legitimate
requests was more than three times that of the quiet phase, if one of them was lost, if a connection
or a row is left, or if the server is not ready. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import shlex
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

import httpx
from rich.table import Table

from load_tests.attacks import LOWEST_PRIORITY, Attack, attackers_of, chosen
from load_tests.processes import fewest_open_files, resident_mib, workers
from load_tests.report import Report, quantiles
from load_tests.serving import PAELLERA, RESTARTS, RUNNING, WAITING, Server, figures, serving
from load_tests.traffic import Answer, Load, generate_endpoint, kinds_of, open_client, poisson_trace
from load_tests.under_load import SCALES, STEP_COUNTS
from server.environment import PREFIX
from server.settings import Settings

# MiB of resident memory that docs/limits.md states for the default settings.
STATED_MIB: Mapping[str, float] = {"api": 2600, "worker": 2150}
# Likewise, of the API process with AUTOMATIC1111's endpoints.
SDAPI_API_MIB = 2800
P99_FACTOR = 3.0
SETTLED_S = 2.0
# Beyond the longest timeout that a silent client can use up.
MARGIN_S = 15.0


# ── the judge ─────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Measurement:
    """The server while and after it was attacked.

    refused: legitimate requests, with an error that says when to come back. quiet, attacked: their
    latency. peak_mib: resident memory of the API process and of the largest worker at its largest.
    files_left: open in the API process beyond those before the attack. closed_after_s: seconds
    until the last connection was closed, once the attackers were silent.
    """

    sent: int
    answered: int
    refused: int
    quiet: dict[str, float]
    attacked: dict[str, float]
    idle_mib: dict[str, float]
    peak_mib: dict[str, float]
    files_left: int
    rows_left: int
    restarts: int
    ready: bool
    closed_after_s: float
    attempts: list[Counter[str]] = field(default_factory=list)

    @property
    def lost(self) -> int:
        return self.sent - self.answered - self.refused


def judge(found: Measurement, allowed_mib: Mapping[str, float], p99_factor: float) -> list[str]:
    """Return in words what is not as it must be."""
    violations = [
        f"{name}: {found.peak_mib[name]:g} MiB, allowed are {allowed:g}"
        for name, allowed in allowed_mib.items()
        if found.peak_mib[name] > allowed
    ]
    allowed_ms = p99_factor * found.quiet["p99_ms"]
    if found.attacked["p99_ms"] > allowed_ms:
        violations.append(f"p99: {found.attacked['p99_ms']:g} ms, allowed are {allowed_ms:g}")
    violations += [
        f"{name}: {number}"
        for name in ("lost", "files_left", "rows_left", "restarts")
        if (number := getattr(found, name))
    ]
    if not found.ready:
        violations.append("not ready")
    return violations


# ── the trial ─────────────────────────────────────────────────────────────────────────────────────


def main(arguments: Sequence[str] | None = None, command: Sequence[str] = PAELLERA) -> None:
    """Run the test on a server of its own. Raises SystemExit with 1 for violations.

    command: the server's, as of `serving`.
    """
    sent = list(sys.argv[1:] if arguments is None else arguments)
    options = _parse(sent)
    report = Report("hostile", command=shlex.join(["python", "-m", "load_tests.hostile", *sent]))
    changes = dict(change.partition("=")[::2] for change in options.set)
    environment = {f"{PREFIX}{name}": value for name, value in changes.items()}
    with serving({f"{PREFIX}LOG_LEVEL": "error", **environment}, command) as server:
        settings = Settings(**{name.lower(): value for name, value in changes.items()})
        found = asyncio.run(Trial(server, settings, options).run())
    allowed = {"api": options.api_mib, "worker": options.worker_mib}
    violations = judge(found, allowed, options.p99_factor)
    report.add(_attack_table(found, chosen(options.only), options.scale))
    report.add(_table(found, allowed, options.p99_factor))
    measured = asdict(found) | {
        "attempts": [
            {"entry": attack.entry, "name": attack.name, **outcomes}
            for attack, outcomes in zip(chosen(options.only), found.attempts, strict=True)
        ]
    }
    judged = {"lost": found.lost, "allowed_mib": allowed, "violations": violations}
    report.emit(measured | judged | {"good": not violations})
    sys.exit(bool(violations))


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m load_tests.hostile",
        description="All attacks at once, beside legitimate requests; the last line is JSON.",
    )
    add = parser.add_argument
    add("--seconds", type=float, default=120, help="of attacks, 120 by default")
    add("--quiet-seconds", type=float, default=60, help="before them, 60 by default")
    add("--rate", type=float, default=2, help="legitimate requests per second, 2 by default")
    add("--scale", type=float, default=1, help="of the attacks' rates, 1 by default")
    add("--only", action="append", default=[], metavar="ENTRY", help="an attack: T4; default: all")
    add("--nice", type=int, default=LOWEST_PRIORITY, help="the attackers' priority, 19 by default")
    add("--set", action="append", default=[], metavar="NAME=VALUE", help="a server's setting")
    add("--api-mib", type=float, default=STATED_MIB["api"], help="ceiling of the API process")
    add("--worker-mib", type=float, default=STATED_MIB["worker"], help="ceiling of a worker")
    add("--p99-factor", type=float, default=P99_FACTOR, help="over the quiet phase, 3 by default")
    return parser.parse_args(arguments)


class Trial:
    """One server and its legitimate requests, in a quiet phase and under attack."""

    def __init__(self, server: Server, settings: Settings, options: argparse.Namespace) -> None:
        self._server, self._settings, self._options = server, settings, options
        self._target = generate_endpoint(server.url)
        sizes = server.sizes()
        self._kinds = kinds_of([sizes.side(scale) for scale in SCALES], STEP_COUNTS)

    async def run(self) -> Measurement:
        idle = self._memory_mib()
        async with open_client(self._server.url) as client:
            await Load(client).alone(self._target, self._kinds, repeats=2)
            quiet = await self._requests(client, self._options.quiet_seconds)
            before = await figures(client)
        files = await fewest_open_files(self._server.pid, 0, SETTLED_S)
        async with open_client(self._server.url) as client:
            options = self._options
            attackers = attackers_of(
                self._server.url, options.seconds, options.scale, options.nice, options.only
            )
            with attackers.running() as report:
                answers = await self._requests(client, self._options.seconds)
                attempts = await asyncio.to_thread(report.recv)
                await client.aclose()
                silent_since = time.monotonic()
                files_left = (
                    await fewest_open_files(self._server.pid, files, self._longest_timeout_s())
                    - files
                )
                closed_after_s = time.monotonic() - silent_since
        async with open_client(self._server.url) as client:
            after = await figures(client)
            ready = (await client.get("/readyz")).status_code == httpx.codes.OK
        return Measurement(
            sent=len(answers),
            answered=sum(answer.status == httpx.codes.OK for answer in answers),
            refused=sum(answer.refused for answer in answers),
            quiet=quantiles([answer.seconds for answer in quiet]),
            attacked=quantiles([answer.seconds for answer in answers]),
            idle_mib=idle,
            peak_mib=self._memory_mib(peak=True),
            files_left=max(0, files_left),
            rows_left=int(after[RUNNING] + after[WAITING]),
            restarts=int(after[RESTARTS] - before[RESTARTS]),
            ready=ready,
            closed_after_s=round(closed_after_s, 1),
            attempts=attempts,
        )

    async def _requests(self, client: httpx.AsyncClient, seconds: float) -> list[Answer]:
        trace = poisson_trace(self._kinds, self._options.rate, seconds, seed=0)
        return await Load(client).open_loop(self._target, trace)

    def _memory_mib(self, *, peak: bool = False) -> dict[str, float]:
        def largest(pids: Sequence[int]) -> float:
            return max((resident_mib(pid, peak=peak) or 0.0 for pid in pids), default=0.0)

        return {
            "api": largest([self._server.pid]),
            "worker": largest(workers(self._server.pid)),
        }

    def _longest_timeout_s(self) -> float:
        """Return how long a connection may be kept for a client that says and reads nothing."""
        waits = (
            self._settings.keep_alive_s,
            self._settings.receive_timeout_s,
            self._settings.timeout_s + self._settings.send_timeout_s,
        )
        return max(waits) + MARGIN_S


def _attack_table(found: Measurement, attacks: Sequence[Attack], scale: float) -> Table:
    table = Table(title="Attacks, all at once", title_justify="left")
    for column in ("entry", "attack", "clients", "attempts/s", "how attempts ended"):
        table.add_column(column)
    for attack, outcomes in zip(attacks, found.attempts, strict=True):
        rate = scale * attack.clients / attack.every_s
        ended = ", ".join(f"{outcome}: {n}" for outcome, n in sorted(outcomes.items()))
        table.add_row(attack.entry, attack.name, f"{attack.clients}", f"{rate:.2g}", ended)
    return table


def _table(found: Measurement, allowed_mib: Mapping[str, float], p99_factor: float) -> Table:
    table = Table(title="The server", title_justify="left")
    table.add_column("")
    table.add_column("quiet or idle", justify="right")
    table.add_column("attacked", justify="right")
    table.add_column("allowed", justify="right")
    for name, allowed in allowed_mib.items():
        sizes = (found.idle_mib[name], found.peak_mib[name], allowed)
        table.add_row(f"{name} process, MiB", *(f"{mib:.0f}" for mib in sizes))
    quiet, attacked = found.quiet, found.attacked
    table.add_row("p50 ms", f"{quiet['p50_ms']:.0f}", f"{attacked['p50_ms']:.0f}", "")
    limit = f"{p99_factor * quiet['p99_ms']:.0f}"
    table.add_row("p99 ms", f"{quiet['p99_ms']:.0f}", f"{attacked['p99_ms']:.0f}", limit)
    table.add_row("answered", f"{quiet['n']}", f"{found.answered} of {found.sent}", "")
    table.add_row("refused", "", f"{found.refused}", "")
    table.add_row("lost", "", f"{found.lost}", "0")
    table.add_row("connections left", "", f"{found.files_left}", "0")
    table.add_row("seconds until the last was closed", "", f"{found.closed_after_s:g}", "")
    table.add_row("images left", "", f"{found.rows_left}", "0")
    table.add_row("worker restarts", "", f"{found.restarts}", "0")
    table.add_row("ready", "", "yes" if found.ready else "NO", "yes")
    return table


if __name__ == "__main__":
    main()
