"""Write docs/performance.md and docs/curve.svg from the newest results.

    python -m load_tests.performance

The newest result of each kind and machine in load_tests/results counts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from load_tests.curve import Point, summary
from load_tests.soak import SETTLING

ROOT = Path(__file__).parents[1]
RESULTS, DOCS = ROOT / "load_tests" / "results", ROOT / "docs"
PAGE = DOCS / "performance.md"

INTRODUCTION = """# Performance

*For evaluators.* Each table names its command, machine and date. The weights are the embedded ones
of that date, unless the table says otherwise. Until 2026-11-28 those drew 128x128 pixels; now they
draw 256x256 in fewer steps.
`python -m load_tests.performance` writes this page from `load_tests/results/`."""

Result = Mapping[str, Any]
# A sentence, and a table's header and rows.
Section = tuple[str, list[str], list[list[Any]]]


def main() -> None:
    """Write the page, and the plot of the newest curve. Needs the extra `load`."""
    found = results(RESULTS)
    PAGE.write_text(page(found))
    for name, result in {_plot(r): r for r in reversed(newest(found, "curve"))}.items():
        from load_tests.plot import draw

        draw(result, DOCS / name)


def results(directory: Path) -> list[dict[str, Any]]:
    """Return all results, oldest first, each with its file's name under `file`."""
    found = [
        json.loads(path.read_text()) | {"file": path.name} for path in directory.glob("*.json")
    ]
    return sorted(
        (result for result in found if "report" in result), key=lambda result: str(result["date"])
    )


def newest(found: Iterable[Result], report: str) -> list[Result]:
    """Return the last result of this kind on each machine, the latest first.

    Results of different families of networks, of other workers, and of compiled networks count as
    different kinds.
    """
    last = {
        (
            r["hardware"]["cpu"],
            *r.get("families", ()),
            r.get("devices", ""),
            r.get("compiled", False),
        ): r
        for r in found
        if r["report"] == report
    }
    return sorted(last.values(), key=lambda result: str(result["date"]), reverse=True)


def page(found: Sequence[Result]) -> str:
    """Return the whole page in Markdown."""
    parts = [INTRODUCTION]
    for report, (title, render) in SECTIONS.items():
        measured = newest(found, report)
        parts += [f"## {title}"] * bool(measured)
        for result in measured:
            said, header, rows = render(result)
            parts += [_origin(result), said, *([_table(header, rows)] if rows else [])]
    return "\n\n".join(parts) + "\n"


def _origin(result: Result) -> str:
    """Return a result's command, place and date, and the machine's other load if known."""
    hardware = result["hardware"]
    flags = hardware["cpu_flags"]
    special = (
        "AMX"
        if "amx_bf16" in flags
        else "AVX512-BF16"
        if "avx512_bf16" in flags
        else "AVX-512"
        if "avx512f" in flags
        else ""
    )
    machine = f"{hardware['usable_cores']} cores of {hardware['cpu']}" + (
        f" ({special})" if special else ""
    )
    others = result.get("others_share_of_the_machine")
    busy = "" if others is None else f", {_percent(max(0.0, others))} of it busy with other things"
    source = f"[all of it](../load_tests/results/{result['file']})"
    compiled = ", compiled networks" if result.get("compiled") else ""
    return f"`{result['command']}`{compiled}: {machine}{busy}, {result['date'][:10]}; {source}."


# ── sections ──────────────────────────────────────────────────────────────────────────────────────


def _bench(result: Result) -> Section:
    http, stages = result["http"], result["stages"]
    overhead = result.get("overhead_ms", {})
    rows = []
    for steps, row in http["requests"].items():
        loop = stages[f"loop_{steps}"]
        transcribed, beyond = (
            stages.get(f"transcription_loop_{steps}", {}).get("p50_ms"),
            overhead.get(steps, {}).get("beyond_request"),
        )
        times = (
            row["p50_ms"],
            row["p95_ms"],
            row["p99_ms"],
            loop["p50_ms"],
            loop["floor_ms"],
            transcribed,
            beyond,
        )
        rows.append([steps, *map(_ms, times)])
    width, height = result["size"]
    memory = http["peak_memory_mib"]
    said = (
        f"{width}x{height} pixels, {result['dtype']}, one request at a time; milliseconds. "
        f"Ready after {http['start_to_ready_s']:.1f} s;"
    )
    said += (
        f" at most {max(memory['api']):.0f} MiB in the API process, "
        f"{max(memory['children']):.0f} in the worker."
    )
    return (
        said,
        ["steps", "p50", "p95", "p99", "loop", "its floor", "published loop", "HTTP and processes"],
        rows,
    )


def _neighbours(result: Result) -> Section:
    rows = [
        [
            r["threads"],
            r["neighbours"],
            *(_ms(r[key]) for key in ("p50_ms", "p95_ms", "longest_ms")),
        ]
        for r in result["rows"]
    ]
    said = (
        "One request at a time. Chosen is what the worker does by itself (engine.md says "
        "how); the others are fixed numbers of threads,"
    )
    said += " the last with OpenMP's own waiting."
    return said, ["threads", "busy processes", "p50 ms", "p95 ms", "longest"], rows


def _curve(result: Result) -> Section:
    points = [Point.of(point) for point in result["points"]]
    rows = []
    for point in points:
        rates = (f"{point.arrived:.1f}", f"{point.served:.1f}")
        shares = (_percent(point.under_target), _percent(point.refused))
        rows.append([*rates, *_latencies(point.latency), *shares])
    top = summary(points)
    said = (
        f"{', '.join(result['kinds'])}. Requests are sent when they are due, whatever the server "
        f"does. It answers up to {top['knee_per_s']:.1f} a second before it saturates, and up to "
        f"{top['on_target_per_s']:.1f} a second with 99 of 100 requests answered within half a "
        "second. An answer counts in the second of its end, so a row can have a few more or fewer "
        "answers than arrivals."
    )
    if result.get("devices"):
        said = f"Workers: {', '.join(result['devices'].split(','))}. {said}"
    said += f"\n\n![latency over the rate of arrivals]({_plot(result)})"
    return (
        said,
        ["arrived /s", "answered /s", "p50 ms", "p95 ms", "p99 ms", "under 500 ms", "refused"],
        rows,
    )


def _plot(result: Result) -> str:
    """Return the name of a curve's plot in docs/, one for each number of workers and form."""
    workers = len(result.get("devices", "").split(","))
    compiled = "-compiled" if result.get("compiled") else ""
    return f"curve{compiled}.svg" if workers == 1 else f"curve-{workers}-workers{compiled}.svg"


def _batching(result: Result) -> Section:
    peer, own = result["litserve"], result["paellera"]
    ratio = result["ratios"]["throughput"]
    rows = [
        [
            "answers /s, saturated",
            f"{peer['throughput_per_s']:.1f}",
            f"{own['throughput_per_s']:.1f}",
            f"{ratio:.2f}",
        ]
    ]
    for name, key, quantile in (
        ("latency p99, ms", "latency", "p99_ms"),
        ("slowdown p99", "slowdown", "p99"),
    ):
        theirs, ours = peer[key][quantile], own[key][quantile]
        rows.append([name, _ms(theirs), _ms(ours), f"{ours / theirs:.2f}"])
    said = (
        "Nine kinds of requests arrive at either server, at 80 % of what LitServe with "
        "whole-request batching can do. A slowdown is a"
    )
    return (
        f"{said} latency over the same request's on the idle server.",
        ["", "LitServe", "Paellera", "ratio"],
        rows,
    )


def _operations(result: Result) -> Section:
    rows = []
    for name, row in result["operations"].items():
        rows.append([f"`/{name}`", *_latencies(row), f"{row['ratio']:.2f}"])
    return "One request at a time.", ["", "p50 ms", "p95 ms", "p99 ms", "of `/generate`"], rows


def _faults(result: Result) -> Section:
    keys = ("fault", "in_flight", "answered", "failed_as_meant", "lost")
    rows = [
        [*(f[key] for key in keys), "yes" if f["same_bytes"] else "no", f["ready_after_s"]]
        for f in result["faults"]
    ]
    said = "Every deterministic image must have the bytes that it has without a fault."
    return (
        said,
        [
            "fault",
            "in flight",
            "answered",
            "failed as meant",
            "lost",
            "same bytes",
            "ready again, s",
        ],
        rows,
    )


def _faults_under_load(result: Result) -> Section:
    keys = ("fault", "sent", "answered", "refused", "lost", "replayed", "unready_s")
    rows = [[*(f[key] for key in keys), _ms(f["latency"]["p99_ms"])] for f in result["faults"]]
    said = (
        "Requests keep arriving during the fault. A request is lost if it gets neither an image "
        "nor an error with a retry time."
    )
    return (
        said,
        ["fault", "sent", "answered", "refused", "lost", "replayed", "not ready, s", "p99 ms"],
        rows,
    )


def _soak(result: Result) -> Section:
    hostile = "--hostile" in result["command"]
    first, last = result["snapshots"][SETTLING - 1 if hostile else 0], result["snapshots"][-1]
    said = f"{last['requests']:,} requests in {result['seconds'] / 60:.0f} minutes."
    if hostile:
        said = (
            f"{said[:-1]}, all attacks beside them; {result['refused']} refused, "
            f"{result['errors']} errors. The first {SETTLING} snapshots settle the level: the "
            "allocator keeps memory that held uploads."
        )
    elif "p99_drift" in result:
        slope = result["memory_mib_per_hour"]
        said += (
            f" Per hour {slope['api_mib']:+.1f} MiB in the API process and "
            f"{slope['worker_mib']:+.1f} in the worker; p99"
        )
        said += (
            f" {result['p99_drift']:+.1%} from the first tenth to the last; "
            f"{result['errors']} errors."
        )
    names = {
        "api_mib": "API process, MiB",
        "worker_mib": "worker, MiB",
        "api_files": "files",
        "api_threads": "threads",
        "tasks": "tasks",
    }
    header = ["idle", f"after {first['requests']:,}", f"after {last['requests']:,}"]
    return said, header, [[name, first[key], last[key]] for key, name in names.items()]


def _full_size(result: Result) -> Section:
    rows = []
    for name, family in result["families"].items():
        parameters = sum(part["parameters"] for part in family["parts"].values())
        seconds = (
            family["import"]["seconds"],
            family["load"]["seconds"],
            family["serving"]["seconds_per_step"],
        )
        peak = max(family["serving"]["peak_rss_mib"]["children"]) / 1024
        rows.append(
            [
                name,
                f"{parameters / 1e9:.2f} billion",
                *(f"{each:.1f}" for each in seconds),
                f"{peak:.1f}",
            ]
        )
    return (
        "The published networks with random values.",
        ["", "parameters", "import, s", "load, s", "a step, s", "worker, GiB"],
        rows,
    )


def _scenarios(result: Result) -> Section:
    rows = [
        [row["scenario"], f"`{row['request']}`", row["requests"], row["failures"], *_latencies(row)]
        for row in result["rows"]
    ]
    said = f"{result['users']} clients at once, in Locust's scenarios (`load_tests/locustfile.py`)."
    return said, ["scenario", "request", "sent", "failed", "p50 ms", "p95 ms", "p99 ms"], rows


def _fuzz(result: Result) -> Section:
    found = ", ".join(result["found"] + result["errors"]) or "nothing"
    return (
        f"{result['requests']:,} requests to {result['operations']['tested']} operations; "
        f"faults found: {found}.",
        [],
        [],
    )


SECTIONS: dict[str, tuple[str, Callable[[Result], Section]]] = {
    "bench": ("One image", _bench),
    "neighbours": ("One image beside busy processes", _neighbours),
    "operations": ("Other operations", _operations),
    "curve": ("Latency and throughput", _curve),
    "batching": ("Mixed requests, beside whole-request batching", _batching),
    "scenarios": ("Simulated users", _scenarios),
    "faults": ("Faults with requests in flight", _faults),
    "faults-under-load": ("Faults while requests arrive", _faults_under_load),
    "soak": ("Thousands of consecutive requests", _soak),
    "fuzz": ("Malformed requests", _fuzz),
    "full_size": ("At full size", _full_size),
}


# ── words ─────────────────────────────────────────────────────────────────────────────────────────


def _table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def _latencies(row: Mapping[str, float]) -> list[str]:
    return [_ms(row.get(f"p{q}_ms")) for q in (50, 95, 99)]


def _ms(milliseconds: float | None) -> str:
    return (
        ""
        if milliseconds is None
        else f"{milliseconds:.0f}"
        if milliseconds >= 10
        else f"{milliseconds:.1f}"
    )


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


if __name__ == "__main__":
    main()
