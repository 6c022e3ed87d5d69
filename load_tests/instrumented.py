"""Run `paellera serve` with a worker that breaks on demand, and report asyncio tasks in /metrics.

    python -m load_tests.instrumented --port 8100

The worker's runner is that of `faulty_runner.py`.
"""

from __future__ import annotations

import argparse
import asyncio
from multiprocessing.connection import Connection

from prometheus_client import Gauge

from server import logs
from server.api import create_app
from server.api.state import AppState
from server.cli.main import run_server
from server.settings import Settings


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m load_tests.instrumented",
        description="A server whose worker breaks on demand.",
    )
    parser.add_argument("--port", type=int, default=8100)
    settings = Settings(host="127.0.0.1", port=parser.parse_args().port)
    logs.configure(settings.log_level)
    api = create_app(settings, worker=run_faulty_worker)
    state: AppState = api.state.paellera
    tasks = Gauge(
        "asyncio_tasks", "Unfinished tasks of the API process", registry=state.metrics.registry
    )
    tasks.set_function(lambda: len(asyncio.all_tasks()))
    run_server(api, settings)


def run_faulty_worker(connection: Connection, settings: Settings) -> None:
    """Run the worker process with a faulty runner.

    The import is here because it brings torch, which the API process does not load.
    """
    from load_tests.faulty_runner import main

    main(connection, settings)


if __name__ == "__main__":
    main()
