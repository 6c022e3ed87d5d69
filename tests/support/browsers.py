"""A browser, the playground's pages in it, and the servers behind them."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import PIL.Image
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser
from prometheus_client.parser import text_string_to_metric_families

from load_tests.browser import Playground, browser
from server.api import create_app
from server.settings import Settings
from tests import fake_worker
from tests.conftest import micro_preset_config, serving, wait_until

ROOT = Path(__file__).parents[2]
APPLE = "a red apple on a white background"
FOX = ROOT / "docs" / "gallery" / "fox.png"
with PIL.Image.open(FOX) as fox:
    FOX_WIDTH, FOX_HEIGHT = fox.size
Open = Callable[..., Playground]


@pytest.fixture(scope="module")
def plain_address(fake_settings: Callable[..., Settings]) -> Iterator[str]:
    with serving(create_app(fake_settings(), worker=fake_worker.main)) as url:
        wait_until(lambda: httpx.get(f"{url}/readyz").status_code == 200, timeout_s=120)
        yield url


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with browser() as launched:
        yield launched


@pytest.fixture
def opened(chromium: Browser) -> Iterator[Open]:
    """Opens the page in a browser that remembers nothing; in the end nothing must have been
    complained about but what was expected.
    """
    pages: list[Playground] = []

    def open(url: str, **context: Any) -> Playground:
        size = {"width": 1280, "height": 900}
        playground = Playground(
            chromium.new_context(
                **{"viewport": size, "reduced_motion": "reduce", **context}
            ).new_page()
        )
        pages.append(playground)
        playground.page.goto(url)
        return playground

    yield open
    for playground in pages:
        playground.page.context.close()
    assert [complaint for playground in pages for complaint in playground.complaints] == []


@pytest.fixture
def playground(opened: Open, live_server: str) -> Playground:
    """With the embedded weights."""
    playground = opened(live_server)
    playground.ready()
    return playground


@pytest.fixture
def plain(opened: Open, plain_address: str) -> Playground:
    """With a worker that answers at once, in plain colours of 64 × 32 pixels."""
    playground = opened(plain_address)
    playground.ready()
    return playground


def serious(playground: Playground) -> set[str]:
    """Return what axe finds to be serious or critical on the page as it is."""
    violations = Axe().run(playground.page).response["violations"]
    return {
        f"{violation['id']}: {node['html']} {node['failureSummary']}"
        for violation in violations
        if violation["impact"] in ("serious", "critical")
        for node in violation["nodes"]
    }


def rows(address: str) -> float:
    families = text_string_to_metric_families(httpx.get(f"{address}/metrics").text)
    names = ("paella_rows_running", "paella_queue_depth")
    return sum(
        sample.value for family in families for sample in family.samples if sample.name in names
    )


def forgive(playground: Playground, *texts: str) -> None:
    """Drop the console's errors that contain one of the texts."""
    playground.complaints[:] = [
        complaint
        for complaint in playground.complaints
        if not any(text in complaint for text in texts)
    ]


RED, BLUE = (200, 30, 30), (30, 30, 200)
# The fake weights' images.
WIDTH, HEIGHT = 64, 32


def png(size: tuple[int, int]) -> bytes:
    file = io.BytesIO()
    PIL.Image.new("RGB", size, BLUE).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def hasty_address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Weights with the presets `quality` and `fast`, the default one."""
    directory = tmp_path_factory.mktemp("hasty")
    micro_preset_config("hasty", default=True).write(directory)
    app = create_app(Settings(weights=str(directory)), worker=fake_worker.main)
    with serving(app) as url:
        wait_until(lambda: httpx.get(f"{url}/readyz").status_code == 200, timeout_s=120)
        yield url
