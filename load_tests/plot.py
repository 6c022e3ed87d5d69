"""Plot the latency–throughput curve.

python -m load_tests.plot load_tests/results/curve-2026-11-21.json docs/curve.svg
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

TARGET_MS = 500
# The right edge, over the highest rate.
RIGHT = 1.05
COLOURS = {"p50": "#2a9d8f", "p95": "#e9a23b", "p99": "#d1495b"}
INK, FAINT = "#333333", "#999999"
# The same file for the same figures, with text that stays text.
STYLE = {
    "svg.hashsalt": "paellera",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
}


def draw(measured: Mapping[str, Any], path: Path) -> None:
    """Plot latency quantiles over the rate of arrivals.

    path: its suffix, .svg or .png, is the format.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 3.8), layout="constrained")
        axes = figure.add_subplot()
        _lines(axes, measured)
        _frame(axes, max(point["arrived"] for point in measured["points"]))
        figure.savefig(
            path, dpi=150, metadata={"Date": None, "Creator": None} if path.suffix == ".svg" else {}
        )


def _lines(axes: Axes, measured: Mapping[str, Any]) -> None:
    points = [point for point in measured["points"] if point["latency"]]
    rates = [point["arrived"] for point in points]
    for name, colour in COLOURS.items():
        latencies = [point["latency"][f"{name}_ms"] for point in points]
        axes.plot(rates, latencies, "o-", color=colour, markersize=4, linewidth=1.8)
        axes.annotate(
            name,
            (rates[0], latencies[0]),
            (-6, 0),
            textcoords="offset points",
            ha="right",
            va="center",
            color=colour,
        )
    axes.axhline(TARGET_MS, color=INK, linewidth=1, linestyle=(0, (4, 3)))
    axes.annotate(
        "500 ms",
        (0, TARGET_MS),
        (4, 4),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
    )
    saturated = min(point["arrived"] for point in measured["points"] if not point["sustained"])
    axes.axvspan(saturated, RIGHT * max(rates[-1], saturated), color=FAINT, alpha=0.15, linewidth=0)
    axes.annotate(
        "saturated",
        (saturated, 1),
        (4, -12),
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        color=FAINT,
    )


def _frame(axes: Axes, rightmost: float) -> None:
    axes.set_yscale("log")
    axes.set_yticks([50, 100, 200, 500, 1000, 2000, 5000])
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.minorticks_off()
    axes.set_xlim(0, RIGHT * rightmost)
    axes.set_xlabel("requests per second, arriving as a Poisson process")
    axes.set_ylabel("latency, ms")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.grid(axis="y", color=FAINT, alpha=0.25)
    axes.tick_params(color=FAINT)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m load_tests.plot", description="Draws what load_tests.curve measured."
    )
    parser.add_argument("measured", type=Path, help="its last line")
    parser.add_argument("to", type=Path, help="an SVG or PNG file")
    options = parser.parse_args()
    draw(json.loads(options.measured.read_text()), options.to)
