"""`python -m server.cli` runs the command line."""

from server.cli import app

app(prog_name="paellera")
