"""A server with a fake worker as a process of its own, for tests that send it signals: python -m
tests.fake_server [function of tests.fake_worker] --port 8000.
"""

from __future__ import annotations

import sys

from server import logs
from server.api import create_app
from server.cli.main import run_server
from server.settings import Settings
from tests import fake_worker

if __name__ == "__main__":
    *names, _, port = sys.argv[1:]
    settings = Settings(port=int(port))
    logs.configure(settings.log_level)
    worker = getattr(fake_worker, names[0] if names else "main")
    run_server(create_app(settings, worker=worker), settings)
