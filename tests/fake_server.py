"""A server with a fake worker as a process of its own, for tests that send it signals: python -m
tests.fake_server --port 8000.
"""

from __future__ import annotations

import sys

from server import logs
from server.api import create_app
from server.cli.main import run_server
from server.settings import Settings
from tests import fake_worker

if __name__ == "__main__":
    settings = Settings(port=int(sys.argv[-1]))
    logs.configure(settings.log_level)
    run_server(create_app(settings, worker=fake_worker.main), settings)
