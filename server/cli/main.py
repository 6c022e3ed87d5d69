"""The command line: `serve`, `config`, the image commands, `weights`, `compile` and `bench`.

Commands import what they need, so that `paellera --help` is instant and `serve` keeps torch out of
the API process. Exit codes: 1 failed, 2 invalid request.
"""

from __future__ import annotations

import contextlib
import json
import logging
import signal
import socket
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from server.cli.errors import FAILED, INVALID, Commands, fail, one_line_errors
from server.cli.generate import register
from server.cli.options import Weights, read_settings
from server.cli.weights import weights_app

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from fastapi import FastAPI

    from server.settings import Settings

app = typer.Typer(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.add_typer(weights_app, name="weights")
register(app)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"paellera {version('paellera')}")
        raise typer.Exit


@app.callback(help="An inference server for Paella, a text-to-image model.")
def main(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit"
        ),
    ] = False,
) -> None:
    """Take the options that belong to no command."""


Host = Annotated[
    str | None, typer.Option(help="Address to listen on; default: PAELLERA_HOST, else 127.0.0.1")
]
Port = Annotated[
    int | None, typer.Option(help="Default: PAELLERA_PORT, else 8000; 0 is any free one")
]


@app.command()
def serve(host: Host = None, port: Port = None, weights: Weights = None) -> None:
    """Serve the HTTP API until stopped. All other settings are PAELLERA_* variables."""
    from server import logs
    from server.api import create_app

    with one_line_errors():
        settings = read_settings(host=host, port=port, weights=weights)
        logs.configure(settings.log_level)
        api = create_app(settings)
    run_server(api, settings)


@app.command()
def config(
    host: Host = None,
    port: Port = None,
    weights: Weights = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object")] = False,
) -> None:
    """Print the settings of `serve` with their sources, or the reason why `serve` refuses them.

    Only the weights' configuration and the sizes of their files are checked. `paellera weights
    verify` checks the content.
    """
    from server.api import create_app
    from server.cli.config import check_sizes, describe, lines

    options = {"host": host, "port": port, "weights": weights}
    with one_line_errors():
        settings = read_settings(**options)
        create_app(settings)
        check_sizes(settings)
    described = describe(settings, options)
    typer.echo(json.dumps(described, indent=2) if as_json else "\n".join(lines(described)))
    for warning in settings.warnings:
        typer.echo(f"warning: {warning}", err=True)


@app.command("compile")
def compile_weights(weights: Weights = None) -> None:
    """Compile the networks for this machine's CPU: two minutes, and a C++ compiler is needed.

    `serve` and the image commands compute by the result from their next start, until the weights,
    torch, the precision or the CPU change.
    """
    from model.compiled.build import CompileError, compile_pipeline
    from model.runtime import prepare
    from server.engine.loading import compiled_root, load_plain

    with one_line_errors():
        settings = read_settings(weights=weights)
        prepare(settings.threads)
        for name in settings.bundles:
            pipeline, root = load_plain(name, settings), compiled_root(settings)
            try:
                directory = compile_pipeline(
                    pipeline, root, lambda program: typer.echo(program.name)
                )
            except CompileError as error:
                fail(f"{name}: {error}", FAILED)
            typer.echo(f"{name}: {directory}")


@app.command(
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def bench(context: typer.Context) -> None:
    """Measure every stage, the published code, and a server over HTTP (`paellera bench --help`)."""
    from load_tests.bench import begin_as_a_worker, main

    begin_as_a_worker()
    with one_line_errors():
        main(context.args, program="paellera bench")


# ── serve ─────────────────────────────────────────────────────────────────────────────────────────


def run_server(api: FastAPI, settings: Settings) -> None:
    """Serve until SIGINT, SIGTERM or SIGHUP (unless it is ignored, as by `nohup`), then drain.

    Raises:
        SystemExit: 0 after SIGTERM, 1 if the server could not start, 2 if no worker ever can.
    """
    from server.uvicorn_server import Server

    ports = (
        [settings.port]
        if settings.operations_port is None
        else [settings.port, settings.operations_port]
    )
    listeners = [_listen(settings.host, port) for port in ports]
    _greet(settings, listeners[0].getsockname()[1])
    server = Server(api)
    # After a drain, uvicorn raises the signal again, which would count as killed by it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    # uvicorn leaves it alone, and the default kills.
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        signal.signal(signal.SIGHUP, server.handle_exit)
    with contextlib.suppress(KeyboardInterrupt):
        server.run(sockets=listeners)
    if server.failure:
        log.critical("server stopped", extra={"fields": {"reason": server.failure}})
        sys.exit(INVALID)
    if not server.started:
        fail(server.start_error or "the server could not start; the log has the reason", FAILED)


def _listen(host: str, port: int) -> socket.socket:
    """Return a listening socket; uvicorn would report a used port only in the log.

    An IPv6 host listens for IPv4 too, if the system can: `::` is then every address.
    """
    try:
        if ":" not in host:
            return socket.create_server((host, port))
        dual = socket.has_dualstack_ipv6()
        return socket.create_server((host, port), family=socket.AF_INET6, dualstack_ipv6=dual)
    except OSError as error:
        # Without Python's "(while attempting to bind on address …)", which repeats host and port.
        reason = (error.strerror or str(error)).partition(" (while ")[0]
        fail(f"cannot listen on {host} port {port}: {reason}", FAILED)


def _greet(settings: Settings, port: int) -> None:
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    fields = {
        "address": f"http://{host}:{port}",
        "weights": settings.bundles,
        "readiness": "/readyz"
        if settings.operations_port is None
        else f"/readyz on port {settings.operations_port}",
    }
    log.info("server starting", extra={"fields": fields})
