"""Every example runs as its first lines say, against one live server, and leaves the files it
names.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import httpx
import PIL.Image
import pytest

from server.api import create_app
from tests import fake_worker
from tests.conftest import serving, wait_until
from tests.support.api_keys import KEY
from tests.support.servers import Configure

pytestmark = pytest.mark.process

EXAMPLES = Path(__file__).parent.parent / "examples"
NAMES = sorted(path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".sh"))


def run(directory: Path, name: str, *arguments: str, key: str | None = None) -> str:
    """What it prints."""
    interpreter = "sh" if name.endswith(".sh") else sys.executable
    environment = dict(os.environ)
    environment.pop("PAELLERA_CLIENT_URL", None)
    environment.pop("PAELLERA_CLIENT_KEY", None)
    if key is not None:
        environment["PAELLERA_CLIENT_KEY"] = key
    command = [interpreter, str(EXAMPLES / name), *arguments]
    done = subprocess.run(
        command, cwd=directory, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("name", "widths", "pictures"),
    [
        ("curl.sh", 1, ["apple.png", "green.png"]),
        ("generate.py", 1, [f"star-{seed}.png" for seed in (7, 8, 9, 10)]),
        ("openai_client.py", 1, ["cat.png", "edited.png"]),
        ("inpaint.py", 1, ["before.png", "mask.png", "after.png"]),
        ("outpaint.py", 2, ["wide.png"]),
        ("regions.py", 2, ["halves.png"]),
    ],
)
def test_an_example_draws_its_pictures(
    live_server: str,
    native: tuple[int, int],
    tmp_path: Path,
    name: str,
    widths: int,
    pictures: list[str],
) -> None:
    size = widths * native[0], native[1]
    printed = run(tmp_path, name, live_server)
    for picture in pictures:
        assert picture in printed
        with PIL.Image.open(tmp_path / picture) as image:
            image.load()
            assert image.size == size


@pytest.mark.parametrize(
    ("name", "picture", "least"),
    [
        ("stream_to_gif.py", "cat.gif", 2),
        # Equal frames become one.
        pytest.param("interpolate.py", "way.gif", 10, marks=pytest.mark.judges_weights),
    ],
)
def test_an_example_makes_its_animation(
    live_server: str, tmp_path: Path, name: str, picture: str, least: int
) -> None:
    assert picture in run(tmp_path, name, live_server)
    with PIL.Image.open(tmp_path / picture) as image:
        assert getattr(image, "n_frames", 1) >= least


def test_the_batch_is_as_large_as_asked(live_server: str, tmp_path: Path) -> None:
    assert "20 images" in run(tmp_path, "batch.py", live_server, "20")
    assert len(list(tmp_path.glob("circle-*.png"))) == 20


def test_the_address_may_come_from_the_environment(
    live_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "load.py")],
        env=os.environ | {"PAELLERA_CLIENT_URL": live_server},
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    assert [line.split("  ")[0] for line in done.stdout.splitlines()][:2] == [
        "images",
        "latency mean, s",
    ]


class Prometheus(BaseHTTPRequestHandler):
    """Answers every query with 1.5."""

    def do_GET(self) -> None:
        assert self.path.startswith("/api/v1/query?query=")
        self.send_response(200)
        self.end_headers()
        self.wfile.write(
            json.dumps({"data": {"result": [{"metric": {}, "value": [0, "1.5"]}]}}).encode()
        )

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture
def prometheus() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), Prometheus) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_load_can_be_read_from_prometheus_too(prometheus: str, tmp_path: Path) -> None:
    figures = [
        line.split()
        for line in run(tmp_path, "load.py", "http://127.0.0.1:1", prometheus).splitlines()
    ]
    assert len(figures) == 7
    assert {figure[-1] for figure in figures} == {"1.5"}


@pytest.fixture(scope="module")
def keyed(fake_settings: Configure) -> Iterator[str]:
    """The address of a server that asks for KEY."""
    with serving(create_app(fake_settings(api_keys=KEY), worker=fake_worker.main)) as address:
        wait_until(lambda: httpx.get(f"{address}/readyz").status_code == 200)
        yield address


@pytest.mark.parametrize("name", NAMES)
def test_every_example_sends_the_key_of_the_environment(
    keyed: str, tmp_path: Path, name: str
) -> None:
    count = ["2"] if name == "batch.py" else []
    assert run(tmp_path, name, keyed, *count, key=KEY)


def test_every_example_is_run_here() -> None:
    text = Path(__file__).read_text()
    assert all(f'"{name}"' in text for name in NAMES)
