"""Measure the playground: from pressing Generate to the first preview and to the image.

    python -m load_tests.playground --requests 30

The server's figures stand beside those of the page. Needs Chromium. One request at a time, every
prompt new to the server, the page's own number of previews. The `PAELLERA_*` variables apply as
they do to the server. The last line of output is JSON; `first_to_whole` is the first preview's time
over the image's, by request.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.table import Table

from load_tests.browser import Playground, browser
from load_tests.prompts import prompts
from load_tests.report import Report, quantiles
from load_tests.serving import serving
from server.settings import Settings

WARM_UP = 3
ROWS = {
    "first_preview": "to the first preview",
    "picture": "to the picture",
    "server": "of that, in the server's stages",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print.

    Raises SystemExit for bad arguments, playwright's Error without Chromium.
    """
    parser = argparse.ArgumentParser(
        description="The playground's first preview and picture; the last line of output is JSON."
    )
    parser.add_argument("--requests", type=int, default=30)
    sent = list(sys.argv[1:] if arguments is None else arguments)
    options = parser.parse_args(sent)
    report = Report(
        "playground", command=shlex.join(["python", "-m", "load_tests.playground", *sent])
    )
    measured = summary(drawn(options.requests))
    report.add(_table(measured))
    report.emit(measured)


def drawn(requests: int) -> list[dict[str, Any]]:
    """Return the page's own history entries of `requests` images.

    `preview` and `seconds` count from the button on; `timings` are the server's stages.
    """
    new = prompts()
    with serving({"PAELLERA_WEIGHTS": Settings().bundles[0]}) as server, browser() as chromium:
        playground = Playground(chromium.new_page())
        playground.open(server.url)
        for _ in range(WARM_UP + requests):
            playground.draw(next(new))
        history: list[dict[str, Any]] = json.loads(
            playground.page.evaluate("localStorage.getItem('paellera.history')")
        )
    return history[:requests]


def summary(entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return milliseconds until each event, and the first preview's share of the whole time."""
    first, whole = ([entry[name] for entry in entries] for name in ("preview", "seconds"))
    shares = np.array(first) / np.array(whole)
    return {
        "first_preview": quantiles(first),
        "picture": quantiles(whole),
        "server": quantiles([sum(entry["timings"].values()) for entry in entries]),
        "first_to_whole": {
            "p50": round(float(np.median(shares)), 3),
            "p95": round(float(np.quantile(shares, 0.95)), 3),
        },
    }


def _table(measured: dict[str, Any]) -> Table:
    table = Table("", "p50 ms", "p95 ms", title="From the button")
    for name, words in ROWS.items():
        table.add_row(words, f"{measured[name]['p50_ms']:.0f}", f"{measured[name]['p95_ms']:.0f}")
    share = measured["first_to_whole"]
    table.add_row("first preview / picture", f"{share['p50']:.2f}", f"{share['p95']:.2f}")
    return table


if __name__ == "__main__":
    main()
