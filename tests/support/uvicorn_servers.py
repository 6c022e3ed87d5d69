"""The command line's own server, with a fake worker, on free ports."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager

import httpx

from server.api import create_app
from server.settings import Settings
from server.uvicorn_server import Server
from tests import fake_worker
from tests.conftest import running, wait_until


@contextmanager
def listening(settings: Settings, ports: int = 1) -> Iterator[list[int]]:
    """The command line's own server; gives its ports, of which `operations_port` may be the
    last.
    """
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(ports)]
    numbers = [listener.getsockname()[1] for listener in listeners]
    if ports > 1:
        settings = settings.model_copy(update={"operations_port": numbers[-1]})
    with running(Server(create_app(settings, worker=fake_worker.main)), *listeners):
        yield numbers


@contextmanager
def served(settings: Settings) -> Iterator[httpx.Client]:
    """A client of it, once the fake worker is ready."""
    with (
        listening(settings) as (port,),
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=20) as client,
    ):
        wait_until(lambda: client.get("/readyz").status_code == 200)
        yield client


def all_answered(port: int, sent: bytes) -> bytes:
    """Return what comes until the server closes the connection on which this was sent."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall(sent)
        return b"".join(iter(lambda: connection.recv(1000), b""))
