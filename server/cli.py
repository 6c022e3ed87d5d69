"""The command line: `paellera serve | generate | weights | bench`.

Imports wait inside the commands, so that `paellera --help` is instant and `serve` keeps torch out of the API process.
Exit codes: 1 something failed, 2 something was asked for that cannot be.
"""

from __future__ import annotations

import contextlib
import math
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Never

import typer

if TYPE_CHECKING:
    from fastapi import FastAPI

    from model.config import BundleConfig
    from server.api.schemas import Format
    from server.engine.protocol import Image, Job
    from server.settings import Settings

FAILED, REFUSED = 1, 2
MIB = 2**20

FORMATS: dict[str, Format] = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}

app = typer.Typer(
    help="An inference server for Paella: a prompt becomes a picture.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
weights_app = typer.Typer(help="The weights that come with Paellera, and others.", no_args_is_help=True)
app.add_typer(weights_app, name="weights")

Weights = Annotated[str | None, typer.Option(help="Bundle name or path; default: PAELLERA_WEIGHTS, else tiny")]
BundleName = Annotated[str, typer.Argument(metavar="NAME", help="Bundle name or path")]


@app.command()
def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on; default: PAELLERA_HOST, else 127.0.0.1")] = None,
    port: Annotated[int | None, typer.Option(help="Default: PAELLERA_PORT, else 8000; 0 is any free one")] = None,
    weights: Weights = None,
) -> None:
    """Answer requests over HTTP until stopped. Everything else is set by PAELLERA_* variables."""
    from server import logs
    from server.api import create_app

    with _one_line_errors():
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
    with _one_line_errors():
        format = _format_of(output)
        settings = _settings(weights=weights, device=device)
        job, quality = _plan({name: value for name, value in fields.items() if value is not None}, settings)
        images, truncated = _draw(job, settings)
        _write(images, job, truncated, output, format, quality)


@weights_app.command("list")
def list_weights() -> None:
    """Name and size of every bundle that came with Paellera."""
    import weights
    from model.config import CONFIG_FILE, BundleConfig

    with _one_line_errors():
        for path in sorted(Path(weights.__path__[0]).glob(f"*/{CONFIG_FILE}")):
            config = BundleConfig.read(path.parent)
            typer.echo(f"{path.parent.name}  {_bytes_of(config) / MIB:.1f} MiB")


@weights_app.command()
def info(name: BundleName) -> None:
    """What a bundle holds: its networks, sizes and recipe."""
    from dataclasses import asdict

    from model.config import BundleConfig, find_bundle

    with _one_line_errors():
        directory = find_bundle(name)
        config = BundleConfig.read(directory)
        networks = _networks(directory, config)
    _print_pairs({"name": config.name, "sha256": config.sha256, "bytes": f"{_bytes_of(config):,}"})
    _print_pairs({"native size": " x ".join(map(str, config.native_size)), "size step": config.size_step})
    typer.echo("\nnetworks")
    _print_pairs(networks, indent="  ")
    typer.echo("\nrecipe")
    _print_pairs(asdict(config.recipe), indent="  ")


@weights_app.command()
def verify(name: BundleName) -> None:
    """Load a bundle as strictly as the server does, and say what is wrong with it."""
    import torch

    from model.bundle import load_bundle
    from model.config import find_bundle
    from model.runtime import prepare

    prepare()
    with _one_line_errors(refused=FAILED):
        bundle = load_bundle(find_bundle(name), torch.device("cpu"), torch.float32)
    typer.echo(f"{bundle.config.name}: ok, sha256 {bundle.config.sha256}")


@app.command(add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def bench(context: typer.Context) -> None:
    """Measure every stage, the published code beside it, and a server over HTTP (`paellera bench --help`)."""
    from load_tests.bench import main

    with _one_line_errors():
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
        _fail("the server could not start; the log says why", FAILED)


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket. It is made here and not by uvicorn, whose own complaint about a used port is a log line."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        _fail(f"cannot listen on {host} port {port}: {error.strerror}", FAILED)


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
        _fail(f"{option}: a number, or two with a comma between them (sent: {text!r})", REFUSED)
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


# ── weights ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _bytes_of(config: BundleConfig) -> int:
    return sum(entry.bytes for entry in config.files.values())


def _networks(directory: Path, config: BundleConfig) -> dict[str, str]:
    """Parameters (running statistics included) and bytes of every network, from the files' headers alone."""
    from safetensors import safe_open

    def parameters(path: Path) -> int:
        with safe_open(path, framework="np") as file:
            return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118, it is no dict

    files = {name: entry for name, entry in config.files.items() if name.endswith(".safetensors")}
    return {Path(n).stem: f"{parameters(directory / n):>13,} parameters {e.bytes:>14,} bytes" for n, e in files.items()}


def _print_pairs(pairs: dict[str, Any], indent: str = "") -> None:
    for key, value in pairs.items():
        typer.echo(f"{indent}{key:<22}{value}")


# ── all ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _settings(**given: object) -> Settings:
    """The environment's settings with the given options on top."""
    from server.settings import Settings

    options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    return Settings(**options)


def _fail(message: str, code: int) -> Never:
    typer.echo(f"paellera: {message}", err=True)
    raise typer.Exit(code)


@contextlib.contextmanager
def _one_line_errors(refused: int = REFUSED) -> Iterator[None]:
    """Turns what can be expected to go wrong into one line and an exit code. refused: that of whatever the user asked for wrongly."""
    from pydantic import ValidationError
    from safetensors import SafetensorError

    from server.api.errors import ApiError, from_validation

    try:
        yield
    except ValidationError as error:
        where = "bundle.json: " if error.title == "BundleConfig" else ""
        _fail(where + from_validation(error).message, refused)
    except ApiError as error:
        _fail(error.message, refused)
    except (ValueError, FileNotFoundError) as error:
        _fail(str(error), refused)
    except (OSError, SafetensorError) as error:
        _fail(str(error), FAILED)


if __name__ == "__main__":
    app()
