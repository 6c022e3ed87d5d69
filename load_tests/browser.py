"""Drive the playground in a browser without a window, and read what the page shows."""

from __future__ import annotations

import base64
import io
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import PIL.Image
from numpy.typing import NDArray
from playwright.sync_api import Browser, Page, expect, sync_playwright

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
PATIENCE_MS = 120_000
expect.set_options(timeout=PATIENCE_MS)


@contextmanager
def browser() -> Iterator[Browser]:
    """Yield a browser without a window. Raises playwright's Error without Chromium."""
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        try:
            yield launched
        finally:
            launched.close()


@dataclass
class Playground:
    """The playground's page in a browser.

    page: opened at the server's address. complaints: errors on the browser's console.
    """

    page: Page
    complaints: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.page.set_default_timeout(PATIENCE_MS)
        self.page.on(
            "console",
            lambda message: (
                self.complaints.append(message.text)
                if message.type in ("error", "warning")
                else None
            ),
        )
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))

    def open(self, address: str) -> None:
        """Open the page, and wait until it knows the server's weights."""
        self.page.goto(address)
        self.ready()

    def ready(self) -> None:
        expect(self.page.locator("#readiness")).to_have_attribute("data-state", "ready")

    def choose(self, operation: str) -> None:
        self.page.get_by_role("radio", name=operation, exact=True).check()

    def load(self, path: Path) -> None:
        """Load an image from a file onto the canvas."""
        self.page.set_input_files("#open", path)
        expect(self.page.locator("#caption")).to_have_text(path.name)

    def press(self, prompt: str = "") -> None:
        """Type the prompt, and press Control and Enter."""
        self.page.fill("#prompt", prompt)
        self.page.keyboard.press("Control+Enter")

    def draw(self, prompt: str = "") -> str:
        """Draw an image of the prompt, and return the page's text about it."""
        self.press(prompt)
        return self.finished()

    def finished(self) -> str:
        expect(self.page.locator("#status")).to_have_text(re.compile(r"in \d"))
        expect(self.page.locator("#run")).to_have_attribute("aria-disabled", "false")
        return self.page.inner_text("#status")

    @property
    def shown(self) -> NDArray[np.int_]:
        """Return the image on the canvas, [H, W, 3]."""
        source = self.page.get_attribute("#picture", "src") or ""
        picture = PIL.Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2])))
        return np.asarray(picture.convert("RGB")).astype(int)

    def drag(self, selector: str, *path: tuple[float, float]) -> None:
        """Drag the mouse along a path, in shares of the element's box."""
        box = self.page.locator(selector).bounding_box()
        assert box is not None
        places = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in path]
        self.page.mouse.move(*places[0])
        self.page.mouse.down()
        for place in places[1:]:
            self.page.mouse.move(*place, steps=6)
        self.page.mouse.up()
