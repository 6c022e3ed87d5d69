"""Measure the playground: from pressing Generate to the first preview and to the image.

    python -m load_tests.playground --requests 30
    python -m load_tests.playground --live --requests 10 --key-ms 120

The server's figures stand beside those of the page. Needs Chromium. One request at a time, every
prompt new to the server, the page's own number of previews. The `PAELLERA_*` variables apply as
they do to the server. The last line of output is JSON; `first_to_whole` is the first preview's time
over the image's, by request.

With `--live`, prompts are typed key by key in live mode. Measured is the time from each key to the
frame that shows the first image whose prompt contains the key; a pause at a prompt's end lets its
last image appear. Keys that leave the prompt as it is, such as a space at its end, count with the
next one. `superseded` counts requests that the page aborted for newer text.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from playwright.sync_api import Request
from rich.table import Table

from load_tests.browser import Playground, browser
from load_tests.prompts import prompts
from load_tests.report import Report, quantiles
from load_tests.serving import finds_compiled, serving
from server.settings import Settings

Seen = tuple[float, str]

WARM_UP = 3
KEY_MS = 120
GENERATE = "/generate"
# Notes keys and images as [milliseconds, prompt]: a key when it is pressed, an image in the task
# after its first frame. The page keeps the image's prompt in `alt`.
WATCH = """() => {
  const [prompt, picture] = ["prompt", "picture"].map((id) => document.getElementById(id));
  window.keys = [];
  window.pictures = [];
  let pressed = 0;
  prompt.addEventListener("keydown", (event) => (pressed = event.timeStamp), true);
  prompt.addEventListener("input", () => window.keys.push([pressed, prompt.value.trim()]), true);
  const note = () => {
    const text = picture.alt;
    requestAnimationFrame(() => setTimeout(() => window.pictures.push([performance.now(), text])));
  };
  new MutationObserver(note).observe(picture, { attributeFilter: ["src"] });
}"""
TYPED = """(prompt) => {
  const { keys, pictures } = window;
  if (pictures.at(-1)?.[1] !== prompt) return null;
  Object.assign(window, { keys: [], pictures: [] });
  return { keys, pictures };
}"""
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
    parser.add_argument("--requests", type=int, default=30, help="images, or prompts to type")
    parser.add_argument("--live", action="store_true", help="type in live mode")
    parser.add_argument("--key-ms", type=int, default=KEY_MS, help="time between keys")
    sent = list(sys.argv[1:] if arguments is None else arguments)
    options = parser.parse_args(sent)
    report = Report(
        "playground", command=shlex.join(["python", "-m", "load_tests.playground", *sent])
    )
    if options.live:
        measured = typed(options.requests, options.key_ms)
        report.add(_live_table(measured))
    else:
        measured = summary(drawn(options.requests))
        report.add(_table(measured))
    report.emit(measured | {"compiled": finds_compiled()})


def typed(count: int, key_ms: int) -> dict[str, Any]:
    """Type prompts in live mode, and return the figures from the keys to the images.

    Raises playwright's Error if a prompt's last image does not appear.
    """
    new, waits = prompts(), list[float]()
    requests, superseded, images = (Counter[bool]() for _ in range(3))
    with serving({"PAELLERA_WEIGHTS": Settings().bundles[0]}) as server, browser() as chromium:
        playground = Playground(chromium.new_page())
        page = playground.page
        measuring = False
        playground.open(server.url)
        page.evaluate(WATCH)
        page.check("#live")

        def count_in(counter: Counter[bool]) -> Callable[[Request], None]:
            def add(request: Request) -> None:
                if request.url.endswith(GENERATE):
                    counter[measuring] += 1

            return add

        page.on("request", count_in(requests))
        page.on("requestfailed", count_in(superseded))
        for number in range(WARM_UP + count):
            measuring = number >= WARM_UP
            prompt = next(new)
            page.fill("#prompt", "")
            page.evaluate("Object.assign(window, { keys: [], pictures: [] })")
            page.keyboard.type(prompt, delay=key_ms)
            seen = page.wait_for_function(TYPED, arg=prompt).json_value()
            images[measuring] += len(seen["pictures"])
            waits += waits_of(seen["keys"], seen["pictures"]) if measuring else []
    return {
        "keystroke_to_picture": quantiles(waits),
        "key_ms": key_ms,
        "requests": requests[True],
        "superseded": superseded[True],
        "pictures": images[True],
    }


def waits_of(keys: Sequence[Seen], pictures: Sequence[Seen]) -> list[float]:
    """Return the seconds from each key to the first image whose prompt contains it.

    Both are [milliseconds, prompt], in order, of one prompt that is typed from an empty field and
    whose last image is among the images.
    """
    waits, before = list[float](), ""
    for pressed, text in keys:
        if text in ("", before):
            continue
        before = text
        shown = next(at for at, prompt in pictures if at >= pressed and prompt.startswith(text))
        waits.append((shown - pressed) / 1000)
    return waits


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


def _live_table(measured: dict[str, Any]) -> Table:
    title = f"Live, a key every {measured['key_ms']} ms"
    table = Table("", "p50 ms", "p95 ms", "n", title=title)
    waits = measured["keystroke_to_picture"]
    figures = (f"{waits['p50_ms']:.0f}", f"{waits['p95_ms']:.0f}", str(waits["n"]))
    table.add_row("from a key to the image that contains it", *figures)
    table.add_row("requests", "", "", str(measured["requests"]))
    table.add_row("superseded requests", "", "", str(measured["superseded"]))
    return table


if __name__ == "__main__":
    main()
