"""Make a command of a function that returns a request's fields: run the request, write the images.

Functions import what they need, so that `paellera --help` is instant.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from server.cli.errors import one_line_errors
from server.cli.options import (
    Device,
    Fields,
    Weights,
    attention_weights_of,
    check_encoding,
    format_of,
    pair_of,
    read_settings,
)

if TYPE_CHECKING:
    from model.config import Operation
    from server.api.images.marking import Marking
    from server.api.planning.plan import Plan
    from server.engine.messages import Image

FORMATS = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}
ANIMATIONS = {".gif": "gif", ".webp": "webp"}


def _common(
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help="A .png, .jpg or .webp file; several images become NAME-0, NAME-1, …",
        ),
    ],
    negative_prompt: Annotated[
        str | None, typer.Option(help="Description of unwanted content")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="The same seed gives the same image; default: random")
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="Named recipe of the weights, such as quality or fast")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps")] = None,
    guidance: Annotated[
        str | None, typer.Option(help="Classifier-free guidance, a number or START,END; 1 is off")
    ] = None,
    guidance_steps: Annotated[
        int | None, typer.Option(help="Number of first steps with guidance")
    ] = None,
    guidance_start: Annotated[
        float | None,
        typer.Option(help="Start of the steps with guidance, as a fraction of all steps"),
    ] = None,
    guidance_end: Annotated[
        float | None,
        typer.Option(help="End of the steps with guidance, as a fraction of all steps"),
    ] = None,
    attention_weights: Annotated[
        str | None,
        typer.Option(
            help="Factors TEXT,IMAGE on the attention to the prompt and the prior's image"
        ),
    ] = None,
    temperature: Annotated[
        str | None, typer.Option(help="Sampling temperature of the tokens, a number or START,END")
    ] = None,
    sampler: Annotated[
        str | None, typer.Option(help="multinomial, argmax, typical or quant")
    ] = None,
    typical_mass: Annotated[
        float | None, typer.Option(help="Probability mass of sampler typical")
    ] = None,
    renoise_mode: Annotated[
        str | None, typer.Option(help="Source of the added noise: start, prev or rand")
    ] = None,
    renoise_steps: Annotated[
        int | None, typer.Option(help="Number of first steps that add noise again")
    ] = None,
    renoise_order: Annotated[
        str | None,
        typer.Option(help="Tokens that become noise again: random, halton or confidence"),
    ] = None,
    width: Annotated[int | None, typer.Option(help="Pixels")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels")] = None,
    n: Annotated[int | None, typer.Option("-n", help="Number of images")] = None,
    deterministic: Annotated[
        bool | None, typer.Option(help="Bit-identical images, one at a time")
    ] = None,
    weights: Weights = None,
    device: Device = None,
) -> None:
    """Declare the options that all operations share."""


def image_command(
    name: Operation, *, without: Sequence[str] = (), output: str | None = None
) -> Callable[[Callable[..., Fields]], Callable[..., None]]:
    """Return a decorator that makes a command of a function that returns request fields.

    Args:
        name: the operation.
        without: common options that it does not take.
        output: the help of the option `--output`, in place of the common one.
    """

    def decorated(function: Callable[..., Fields]) -> Callable[..., None]:
        own, common = (inspect.signature(each, eval_str=True) for each in (function, _common))
        options = {key: each for key, each in common.parameters.items() if key not in without}
        if output is not None:
            told = Annotated[Path, typer.Option("--output", "-o", help=output)]
            options["output"] = options["output"].replace(annotation=told)

        @functools.wraps(function)
        def command(**given: Any) -> None:
            shared = {option: given.pop(option) for option in options}
            with one_line_errors():
                _run(name, function(**given), **shared)

        every = [*own.parameters.values(), *options.values()]
        command.__signature__ = inspect.Signature(sorted(every, key=_has_default))  # type: ignore[attr-defined]
        command.__annotations__ = {
            **function.__annotations__,
            **{key: each.annotation for key, each in options.items()},
            "return": None,
        }
        return command

    return decorated


def _has_default(parameter: inspect.Parameter) -> bool:
    return parameter.default is not inspect.Parameter.empty


def _run(
    operation: Operation,
    own: Fields,
    *,
    output: Path,
    steps: int | None,
    guidance: str | None,
    temperature: str | None,
    attention_weights: str | None,
    weights: str | None,
    device: str | None,
    **others: Any,
) -> None:
    limit_openmp_spinning()
    from server.api.images.marking import Marker
    from server.cli.offline import generate as generate_images
    from server.cli.offline import plan

    known = FORMATS | ANIMATIONS if operation == "interpolate" else FORMATS
    format = format_of(output, known)
    check_encoding([own, others])
    numbers = {
        "guidance_scale": pair_of("guidance", guidance),
        "temperature": pair_of("temperature", temperature),
        "attention_weights": attention_weights_of(attention_weights),
    }
    fields = {**own, **others, "num_inference_steps": steps, **numbers}
    settings = read_settings(weights=weights, device=device)
    planned, quality = plan(
        operation, {name: value for name, value in fields.items() if value is not None}, settings
    )
    marking = Marker(settings).of(planned.operation)
    images, truncated = generate_images(planned.job, settings)
    finished = [planned.result(image) for image in images]
    _write(finished, planned, truncated, output, format, quality, marking)


def _write(
    images: Sequence[Image],
    planned: Plan,
    truncated: tuple[str, ...],
    output: Path,
    format: Any,
    quality: int,
    marking: Marking,
) -> None:
    from server.api.images.encode import animate, encode

    if planned.job.keyframes and output.suffix.lower() in ANIMATIONS:
        parameters = planned.shared_parameters(truncated)
        output.write_bytes(animate(images, format, quality, parameters, marking=marking))
        typer.echo(f"{output}  seed {planned.job.seeds[0]}")
        images = []
    for image in images:
        path = (
            output
            if len(planned.job.seeds) == 1
            else output.with_stem(f"{output.stem}-{image.index}")
        )
        parameters = planned.parameters(truncated, image.index)
        path.write_bytes(encode(image, format, quality, parameters, marking=marking))
        typer.echo(f"{path}  seed {planned.job.seeds[image.index]}")
    if truncated:
        typer.echo(f"a prompt was truncated for {' and '.join(truncated)}", err=True)


def limit_openmp_spinning() -> None:
    """Bound how long OpenMP's waiting threads spin; called before torch is imported."""
    from server.engine.cpu_environment import limit_spin_count

    limit_spin_count()
