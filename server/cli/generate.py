"""Image commands, in this process without a server: `paellera generate` … `paellera replay`.

Functions import what they need, so that `paellera --help` is instant.
"""

from __future__ import annotations

import functools
import inspect
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from server.cli.errors import FAILED, INVALID, fail, one_line_errors, settings_problem

if TYPE_CHECKING:
    from model.config import Operation
    from server.api.images.marking import Marking
    from server.api.planning.plan import Plan
    from server.engine.messages import Image
    from server.settings import Settings

FORMATS = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}
ANIMATIONS = {".gif": "gif", ".webp": "webp"}

Prompt = Annotated[str, typer.Argument(help="Description of the image")]
OptionalPrompt = Annotated[str, typer.Option(help="Text prompt, used together with the images")]
ImageFile = Annotated[Path, typer.Option(help="A PNG, JPEG, WebP, GIF, AVIF or HEIC file")]
RegionList = Annotated[
    list[str] | None,
    typer.Option(
        help='Another prompt for a part of the image: {"prompt": "a star", "box": [0, 0, 0.5, 1]}, '
        'or "mask": a file instead of the box; may be repeated'
    ),
]
ReferenceList = Annotated[
    list[Path] | None,
    typer.Option(
        help="An image of the wanted content beside the prompt; may be repeated, up to 15"
    ),
]
Margin = Annotated[int, typer.Option(help="Pixels to add on this side")]
Feather = Annotated[
    int | None,
    typer.Option(help="Scale of the seam's correction in pixels, 0 to 64; 0 is none; default: 8"),
]
Fit = Annotated[
    str | None, typer.Option(help="crop, pad or stretch the image to another ratio; default: crop")
]
ReturnSize = Annotated[
    str | None,
    typer.Option(help="result, as drawn, or original, the image's own size; default: result"),
]
Weights = Annotated[
    str | None, typer.Option(help="Bundle name or path; default: PAELLERA_WEIGHTS, else tiny")
]
Device = Annotated[
    str | None,
    typer.Option(help="auto, cpu, cuda, cuda:1 or mps; default: PAELLERA_DEVICE, else auto"),
]
Fields = dict[str, Any]


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


def _operation(
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


# ── operations ────────────────────────────────────────────────────────────────────────────────────


@_operation("generate")
def generate(
    prompt: Prompt,
    region: RegionList = None,
    hires: Annotated[
        float | None, typer.Option(help="Enlarge by this factor (1 to 4) and draw again")
    ] = None,
    hires_strength: Annotated[
        float | None, typer.Option(help="Fraction of the scaled image that is drawn again")
    ] = None,
    hires_steps: Annotated[
        int | None, typer.Option(help="Denoising steps of the second pass; default: --steps")
    ] = None,
    auto_regions: Annotated[
        bool | None,
        typer.Option(
            help="Draw two to four things of the prompt each in its own part of the image"
        ),
    ] = None,
) -> Fields:
    """Generate images from a prompt. Absent options follow the recipe of the weights."""
    options = {"scale": hires, "strength": hires_strength, "steps": hires_steps}
    second = {name: value for name, value in options.items() if value is not None}
    return {
        "prompt": prompt,
        "regions": _regions(region),
        "auto_regions": auto_regions,
        "hires": second or None,
    }


@_operation("inpaint")
def inpaint(
    prompt: Prompt,
    image: ImageFile,
    mask: Annotated[
        Path | None, typer.Option(help="As large as the image; default: the image's transparency")
    ] = None,
    mask_mode: Annotated[
        str | None, typer.Option(help="alpha repaints transparent pixels, luminance white ones")
    ] = None,
    keep_unmasked: Annotated[
        bool, typer.Option(help="Leave pixels outside the mask unchanged")
    ] = True,
    feather: Feather = None,
    fit: Fit = None,
    return_size: ReturnSize = None,
    reference: ReferenceList = None,
    region: RegionList = None,
) -> Fields:
    """Repaint a part of an image."""
    files = {
        "image": _content("image", image),
        "mask": None if mask is None else _content("mask", mask),
    }
    return {
        "prompt": prompt,
        **files,
        "mask_mode": mask_mode,
        "keep_unmasked": keep_unmasked,
        "feather": feather,
        "fit": fit,
        "return_size": return_size,
        "references": _contents("reference", reference),
        "regions": _regions(region),
    }


@_operation("outpaint")
def outpaint(
    image: ImageFile,
    prompt: OptionalPrompt = "",
    left: Margin = 0,
    right: Margin = 0,
    up: Margin = 0,
    down: Margin = 0,
    feather: Feather = None,
    return_size: ReturnSize = None,
    region: RegionList = None,
) -> Fields:
    """Extend an image beyond its edges; without a prompt, continue it."""
    margins = {"left": left, "right": right, "up": up, "down": down}
    return {
        "prompt": prompt,
        "image": _content("image", image),
        **margins,
        "feather": feather,
        "return_size": return_size,
        "regions": _regions(region),
    }


@_operation("variations")
def vary(
    image: Annotated[
        list[Path], typer.Option(help="A PNG, JPEG, WebP, GIF, AVIF or HEIC file; may be repeated")
    ],
    prompt: OptionalPrompt = "",
    image_weights: Annotated[
        str | None, typer.Option(help="Comma-separated, one for each image; default: equal")
    ] = None,
    fit: Fit = None,
) -> Fields:
    """Generate other images with the same content."""
    return {
        "prompt": prompt,
        "image": _contents("image", image),
        "weights": _numbers("image-weights", image_weights),
        "fit": fit,
    }


@_operation("edit")
def edit(
    prompt: Prompt,
    image: ImageFile,
    strength: Annotated[
        float | None,
        typer.Option(help="Fraction turned to noise first: 0 returns the image, 1 ignores it"),
    ] = None,
    fit: Fit = None,
    return_size: ReturnSize = None,
    reference: ReferenceList = None,
) -> Fields:
    """Redraw an image, keeping its structure."""
    return {
        "prompt": prompt,
        "image": _content("image", image),
        "strength": strength,
        "fit": fit,
        "return_size": return_size,
        "references": _contents("reference", reference),
    }


@_operation("upscale", without=("width", "height"))
def upscale(
    image: ImageFile,
    prompt: OptionalPrompt = "",
    scale: Annotated[
        float | None, typer.Option(help="Factor of width and height, 1 to 4; default: 2")
    ] = None,
    strength: Annotated[
        float | None,
        typer.Option(help="Fraction of the scaled image that is drawn; default: 0.3"),
    ] = None,
) -> Fields:
    """Enlarge an image and draw its detail."""
    content = _content("image", image)
    return {"prompt": prompt, "image": content, "scale": scale, "strength": strength}


@_operation(
    "interpolate",
    without=("n",),
    output="A .gif or .webp file for one animation; a .png or .jpg one becomes NAME-0, NAME-1, …",
)
def interpolate(
    keyframe: Annotated[
        list[str],
        typer.Option(help="A prompt, or @ and the name of an image file; two to eight of them"),
    ],
    frames: Annotated[int | None, typer.Option(help="Number of images")] = None,
    mode: Annotated[str | None, typer.Option(help="lerp or slerp")] = None,
    prompt: OptionalPrompt = "",
) -> Fields:
    """Generate the images between others; an animation for .gif and .webp output."""
    entries = [
        {"image": _content("keyframe", Path(each[1:]))}
        if each.startswith("@")
        else {"prompt": each}
        for each in keyframe
    ]
    return {"keyframes": entries, "frames": frames, "mode": mode, "prompt": prompt}


def replay(
    png: Annotated[Path, typer.Argument(help="A PNG generated by Paellera")],
    output: Annotated[Path, typer.Option("--output", "-o", help="A .png file")],
    force: Annotated[bool, typer.Option("--force", help="Overwrite the output file")] = False,
    image: Annotated[
        list[Path] | None,
        typer.Option(
            help="Every image that was sent with the request, references included; may be repeated"
        ),
    ] = None,
    mask: Annotated[
        list[Path] | None,
        typer.Option(help="Every mask that was sent with the request; may be repeated"),
    ] = None,
    weights: Weights = None,
    device: Device = None,
) -> None:
    """Generate an image again from the parameters in it; exit code 1 if any pixel differs."""
    _limit_spin_count()
    from server.api.images.encode import encode
    from server.api.images.marking import Marking, is_marked, source_type, unsigned
    from server.cli.offline import generate as generate_images
    from server.cli.offline import largest_difference, plan, recorded_request

    with one_line_errors():
        original = _content("png", png)
        _format_of(output, {".png": "png"})
        if output.exists() and not force:
            raise ValueError(f"output: {output} exists already; --force overwrites it")
        operation, fields, frame = recorded_request(
            original,
            _contents("image", image) + _contents("mask", mask),
        )
        settings = read_settings(weights=weights, device=device)
        planned, _ = plan(operation, fields, settings, recorded=True)
        if frame >= (images := len(planned.job.seeds)):
            raise ValueError(f"the image says that it is frame {frame} of {images}")
        (generated,), truncated = generate_images(planned.job, settings, only=frame)
        marking = Marking(source_type(planned.operation) if is_marked(original) else None)
        parameters = planned.parameters(truncated, frame)
        content = encode(planned.result(generated), "png", 90, parameters, marking=marking)
        with output.open("wb" if force else "xb") as file:
            file.write(content)
        same_file = content == unsigned(original)
        difference = 0 if same_file else largest_difference(content, original)
    if difference:
        causes = "other weights, another device or version, another number of CPU threads"
        if not fields.get("deterministic"):
            causes += (
                ", or a batch with others (`deterministic` avoids the last two on one machine)"
            )
        if fields.get("model_sha256") not in (None, planned.job.model_sha256):
            causes = f"it was drawn by other weights, of sha256 {fields['model_sha256']}"
        fail(f"{output} differs from {png} by up to {difference} of 255: {causes}", FAILED)
    typer.echo(f"{output}  {'identical' if same_file else 'same pixels, in another file'}")


def register(app: typer.Typer) -> None:
    """Add all commands to an app."""
    for command in (generate, inpaint, outpaint, vary, edit, upscale, interpolate, replay):
        app.command()(command)


# ── shared ────────────────────────────────────────────────────────────────────────────────────────


def _limit_spin_count() -> None:
    """Bound how long OpenMP's waiting threads spin; called before torch is imported."""
    from server.engine.cpu_environment import limit_spin_count

    limit_spin_count()


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
    _limit_spin_count()
    from server.api.images.marking import Marker
    from server.cli.offline import generate as generate_images
    from server.cli.offline import plan

    known = FORMATS | ANIMATIONS if operation == "interpolate" else FORMATS
    format = _format_of(output, known)
    _check_encoding([own, others])
    numbers = {
        "guidance_scale": _pair("guidance", guidance),
        "temperature": _pair("temperature", temperature),
        "attention_weights": _attention_weights(attention_weights),
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
        typer.echo(f"the prompt was truncated for {' and '.join(truncated)}", err=True)


def _format_of(output: Path, known: dict[str, str]) -> str:
    """Return the format by the name's end. Raises ValueError."""
    if not output.parent.is_dir():
        raise ValueError(f"output: there is no directory {str(output.parent)!r}")
    if output.suffix.lower() not in known:
        raise ValueError(f"output: the name must end in {', '.join(known)} (sent: {output.name!r})")
    return known[output.suffix.lower()]


def _content(option: str, path: Path) -> bytes:
    """Return a file's content, or fail with the option's name."""
    try:
        return path.read_bytes()
    except OSError as error:
        fail(f"{option}: {path}: {error.strerror}", INVALID)


def _contents(option: str, paths: Sequence[Path] | None) -> list[bytes]:
    """Return the files' contents, or fail with the option's name."""
    return [_content(option, path) for path in paths or ()]


def _check_encoding(value: Any) -> None:
    """Fail if a text in the fields has bytes that the locale's encoding could not decode."""
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            _check_encoding(inner)
    elif isinstance(value, str) and any("\udc80" <= character <= "\udcff" for character in value):
        encoding = sys.getfilesystemencoding()
        message = f"a text has bytes that the encoding of the locale, {encoding}, does not know"
        fail(f"{message}: set a UTF-8 locale, such as LC_ALL=C.UTF-8", INVALID)


def _numbers(option: str, text: str | None) -> list[float] | None:
    """Return "2,8" as [2, 8]; the request checks count and bounds."""
    try:
        return None if text is None else [float(part) for part in text.split(",")]
    except ValueError:
        fail(f"{option}: must be comma-separated numbers (sent: {text!r})", INVALID)


def _pair(option: str, text: str | None) -> list[float] | None:
    """Return "8" as [8, 8]."""
    numbers = _numbers(option, text)
    return numbers * 2 if numbers and len(numbers) == 1 else numbers


def _attention_weights(text: str | None) -> Fields | None:
    """Return "1.2,0.4" as {"text": 1.2, "image": 0.4}."""
    numbers = _numbers("attention-weights", text)
    if numbers is None:
        return None
    if len(numbers) != 2:
        fail(f"attention-weights: must be two numbers, TEXT,IMAGE (sent: {text!r})", INVALID)
    return dict(zip(("text", "image"), numbers, strict=True))


def _regions(texts: Sequence[str] | None) -> list[Fields]:
    entries = []
    for text in texts or ():
        try:
            entry = json.loads(text)
        except ValueError:
            example = '{"prompt": "a star", "box": [0, 0, 0.5, 1]}'
            fail(f"region: must be JSON such as {example} (sent: {text!r})", INVALID)
        if isinstance(entry, dict) and isinstance(entry.get("mask"), str):
            entry["mask"] = _content("region", Path(entry["mask"]))
        entries.append(entry)
    return entries


def read_settings(**given: object) -> Settings:
    """Return the environment's settings, overridden by the given options. Raises ValueError."""
    from pydantic import ValidationError

    from server.settings import Settings

    options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    try:
        return Settings(**options)
    except ValidationError as error:
        raise ValueError(settings_problem(error, options)) from None
