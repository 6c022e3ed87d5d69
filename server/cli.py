"""The command line: `paellera serve | generate | weights | bench`.

Imports wait inside the commands, so that `paellera --help` is instant and `serve` keeps torch out of the API process.
Exit codes: 1 something failed, 2 something was asked for that cannot be.
"""

from __future__ import annotations

import contextlib
import signal
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from server.cli_errors import FAILED, REFUSED, fail, one_line_errors
from server.weights_cli import weights_app

if TYPE_CHECKING:
    from fastapi import FastAPI

    from server.api.schemas import Format
    from server.engine.protocol import Image, Job
    from server.settings import Settings

FORMATS: dict[str, Format] = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}

app = typer.Typer(
    help="An inference server for Paella: a prompt becomes a picture.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.add_typer(weights_app, name="weights")

Weights = Annotated[str | None, typer.Option(help="Bundle name or path; default: PAELLERA_WEIGHTS, else tiny")]


@app.command()
def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on; default: PAELLERA_HOST, else 127.0.0.1")] = None,
    port: Annotated[int | None, typer.Option(help="Default: PAELLERA_PORT, else 8000; 0 is any free one")] = None,
    weights: Weights = None,
) -> None:
    """Answer requests over HTTP until stopped. Everything else is set by PAELLERA_* variables."""
    from server import logs
    from server.api import create_app

    with one_line_errors():
        settings = _settings(host=host, port=port, weights=weights)
        logs.configure(settings.log_level)
        api = create_app(settings)
    run_server(api, settings)


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="What the picture shows")],
    output: Annotated[Path, typer.Option("--output", "-o", help="A .png, .jpg or .webp file; several become NAME-0, NAME-1, …")],
    negative_prompt: Annotated[str | None, typer.Option(help="What it should not show")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same picture; default: drawn")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps")] = None,
    guidance: Annotated[str | None, typer.Option(help="Classifier-free guidance, a number or START,END; 1 is off")] = None,
    temperature: Annotated[str | None, typer.Option(help="Of the token draws, a number or START,END")] = None,
    sampler: Annotated[str | None, typer.Option(help="multinomial, argmax, typical or quant")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels")] = None,
    n: Annotated[int | None, typer.Option("-n", help="How many pictures")] = None,
    weights: Weights = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1 or mps; default: PAELLERA_DEVICE, else auto")] = None,
) -> None:
    """Draw pictures here, without a server. What is not given follows the weights' own recipe."""
    fields = {
        "prompt": prompt,
        "negative_prompt": negative_prompt,
        "seed": seed,
        "num_inference_steps": steps,
        "guidance_scale": _numbers("guidance", guidance),
        "temperature": _numbers("temperature", temperature),
        "sampler": sampler,
        "width": width,
        "height": height,
        "n": n,
    }
    with one_line_errors():
        format = _format_of(output)
        settings = _settings(weights=weights, device=device)
        job, quality = _plan({name: value for name, value in fields.items() if value is not None}, settings)
        images, truncated = _draw(job, settings)
        _write(images, job, truncated, output, format, quality)


@app.command(add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def bench(context: typer.Context) -> None:
    """Measure every stage, the published code beside it, and a server over HTTP (`paellera bench --help`)."""
    from load_tests.bench import main

    with one_line_errors():
        main(context.args, program="paellera bench")


# ── serve ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def run_server(api: FastAPI, settings: Settings) -> None:
    """Serves until SIGINT or SIGTERM, then finishes what is running. Raises SystemExit: 0 after SIGTERM, 1 if it could not start."""
    from server.api.serve import Server

    listener = _listen(settings.host, settings.port)
    _greet(settings, listener.getsockname()[1])
    server = Server(api)
    # Having stopped for a signal, uvicorn sends it to itself again, which would count as killed by it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with contextlib.suppress(KeyboardInterrupt):
        server.run(sockets=[listener])
    if not server.started:
        fail("the server could not start; the log says why", FAILED)


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket. It is made here and not by uvicorn, whose own complaint about a used port is a log line."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        fail(f"cannot listen on {host} port {port}: {error.strerror}", FAILED)


def _greet(settings: Settings, port: int) -> None:
    from rich.console import Console

    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    message = f"Paellera is starting on http://{host}:{port} with {', '.join(settings.bundles)}; /readyz says when it is ready."
    Console(stderr=True).print(message, markup=False, soft_wrap=True)


# ── generate ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _numbers(option: str, text: str | None) -> list[float] | None:
    """ "8" → [8, 8], "2,8" → [2, 8]; how many and how large they may be is the request's to say."""
    if text is None:
        return None
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        fail(f"{option}: a number, or two with a comma between them (sent: {text!r})", REFUSED)
    return numbers * 2 if len(numbers) == 1 else numbers


def _format_of(output: Path) -> Format:
    if not output.parent.is_dir():
        raise ValueError(f"output: there is no directory {str(output.parent)!r}")
    if output.suffix.lower() not in FORMATS:
        raise ValueError(f"output: the name must end in {', '.join(FORMATS)} (sent: {output.name!r})")
    return FORMATS[output.suffix.lower()]


def _plan(fields: dict[str, Any], settings: Settings) -> tuple[Job, int]:
    """The job that the server would make of this request, and its quality. Raises what the server would answer with."""
    from model.config import BundleConfig, find_bundle
    from server.api.jobs import plan
    from server.api.schemas import GenerateRequest
    from server.api.state import AppState
    from server.api.uploads import Decoder
    from server.engine.client import EngineClient
    from server.metrics import Metrics

    config = BundleConfig.read(find_bundle(settings.bundles[0]))
    request = GenerateRequest.model_validate(fields)
    state = AppState(settings, Metrics(), EngineClient(settings), {config.name: config}, Decoder())
    return plan(request, state), request.quality


def _draw(job: Job, settings: Settings) -> tuple[list[Image], tuple[str, ...]]:
    """The job's pictures, and the encoders that cut its prompt. The worker's own code runs, so the bits are the server's."""
    from tqdm import tqdm

    from model.runtime import prepare
    from server.engine.runner import Runner, Stopwatch
    from server.engine.scheduler import RowId

    prepare(settings.threads)
    runner = Runner(settings.model_copy(update={"weights": settings.bundles[0]}))
    rows = [RowId(job.id, i) for i in range(len(job.seeds))]
    pools = [[row] for row in rows] if job.sampling.deterministic else [rows]
    (truncated,) = runner.start([(job, range(len(job.seeds)))], Stopwatch())
    for _ in tqdm(range(job.sampling.steps), desc="denoising", unit="step", leave=False, disable=None):
        for pool in pools:
            runner.step(job.model, pool)
    return [image for pool in pools for image in runner.decode(job.model, pool).images()], truncated


def _write(images: list[Image], job: Job, truncated: tuple[str, ...], output: Path, format: Format, quality: int) -> None:
    from server.api.images import encode
    from server.api.jobs import parameters

    for image in images:
        path = output if len(images) == 1 else output.with_stem(f"{output.stem}-{image.index}")
        path.write_bytes(encode(image, format, quality, parameters(job, truncated, image.index)))
        typer.echo(f"{path}  seed {job.seeds[image.index]}")
    if truncated:
        typer.echo(f"the prompt was cut for {' and '.join(truncated)}", err=True)


# ── all ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _settings(**given: object) -> Settings:
    """The environment's settings with the given options on top."""
    from server.settings import Settings

    options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    return Settings(**options)


if __name__ == "__main__":
    app()
