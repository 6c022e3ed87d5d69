"""The command line, `paellera`."""

from server.cli.main import app

__all__ = ["app"]
