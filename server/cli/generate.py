"""Image commands, in this process without a server: each returns the fields of its request."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from server.cli.image_command import image_command
from server.cli.options import Fields, numbers_of, read_file, read_files, regions_of
from server.cli.replay import replay

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


@image_command("generate")
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
        "regions": regions_of(region),
        "auto_regions": auto_regions,
        "hires": second or None,
    }


@image_command("inpaint")
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
        "image": read_file("image", image),
        "mask": None if mask is None else read_file("mask", mask),
    }
    return {
        "prompt": prompt,
        **files,
        "mask_mode": mask_mode,
        "keep_unmasked": keep_unmasked,
        "feather": feather,
        "fit": fit,
        "return_size": return_size,
        "references": read_files("reference", reference),
        "regions": regions_of(region),
    }


@image_command("outpaint")
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
        "image": read_file("image", image),
        **margins,
        "feather": feather,
        "return_size": return_size,
        "regions": regions_of(region),
    }


@image_command("variations")
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
        "image": read_files("image", image),
        "weights": numbers_of("image-weights", image_weights),
        "fit": fit,
    }


@image_command("edit")
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
        "image": read_file("image", image),
        "strength": strength,
        "fit": fit,
        "return_size": return_size,
        "references": read_files("reference", reference),
    }


@image_command("upscale", without=("width", "height"))
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
    content = read_file("image", image)
    return {"prompt": prompt, "image": content, "scale": scale, "strength": strength}


@image_command(
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
        {"image": read_file("keyframe", Path(each[1:]))}
        if each.startswith("@")
        else {"prompt": each}
        for each in keyframe
    ]
    return {"keyframes": entries, "frames": frames, "mode": mode, "prompt": prompt}


def register(app: typer.Typer) -> None:
    """Add all commands to an app."""
    for command in (generate, inpaint, outpaint, vary, edit, upscale, interpolate, replay):
        app.command()(command)
