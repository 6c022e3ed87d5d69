"""`paellera weights list | info | verify | check | fetch | import`: bundles and published files.

Commands import what they need, so that `paellera --help` is instant.
"""

from __future__ import annotations

import math
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from server.cli.errors import FAILED, INVALID, fail, one_line_errors

if TYPE_CHECKING:
    from model.checkpoints.manifest import PublishedFile
    from model.config import BundleConfig

MIB, GB = 2**20, 10**9

weights_app = typer.Typer(
    help="List, fetch, import, verify and check weights.", no_args_is_help=True
)

BundleName = Annotated[str, typer.Argument(metavar="NAME", help="Bundle name or path")]
Checkpoint = Annotated[
    Path | None, typer.Option(help="A checkpoint in place of the fetched one", metavar="FILE")
]


class HalfType(StrEnum):
    """Half-precision types."""

    float16 = "float16"
    bfloat16 = "bfloat16"


@weights_app.command("list")
def list_weights() -> None:
    """List the included bundles and all known published files."""
    import weights
    from model.checkpoints.manifest import published
    from model.config import CONFIG_FILE, BundleConfig

    with one_line_errors():
        for path in sorted(Path(weights.__path__[0]).glob(f"*/{CONFIG_FILE}")):
            config = BundleConfig.read(path.parent)
            typer.echo(f"{path.parent.name}  {_bytes_of(config) / MIB:.1f} MiB")
        manifest = published()
    typer.echo("\npublished (`paellera weights fetch NAME`)")
    for name, bundle in manifest.bundles.items():
        typer.echo(f"  {name:<16} {', '.join(bundle.files)}; recipes {', '.join(bundle.recipes)}")
    for key, file in manifest.files.items():
        network = f"{file.generation} {file.network:<9}{_size(file.bytes)}"
        note = "" if file.sha256 else "  (no known sha256)"
        typer.echo(f"  {key:<16} {network}  {file.licence:<11} {file.where}{note}")


@weights_app.command()
def fetch(
    name: Annotated[
        str, typer.Argument(help="A published bundle or file of `paellera weights list`")
    ],
) -> None:
    """Download published files into the hub's cache and verify all of them."""
    from model.checkpoints.fetch import fetch as fetch_file
    from model.checkpoints.manifest import published

    with one_line_errors():
        files = published().select(name).values()
        for file in files:
            if file.repository is None and len(files) > 1:
                typer.echo(f"{file.path} is not on the hub; it is among {file.source}", err=True)
            else:
                typer.echo(f"{file.where}: {fetch_file(file)}")
                if file.sha256 is None:
                    note = "no published sha256 is known. The hash of this first download is"
                    note = f"{note} stored, and later downloads must match it"
                    typer.echo(f"{file.where}: {note}", err=True)


@weights_app.command("import")
def import_weights(
    name: Annotated[
        str,
        typer.Argument(
            help="A published bundle, or a bundle whose configuration and other networks to use"
        ),
    ],
    directory: Annotated[Path, typer.Argument(help="The new bundle's directory")],
    denoiser: Checkpoint = None,
    vqgan: Checkpoint = None,
    prior: Checkpoint = None,
    byt5: Checkpoint = None,
    clip: Checkpoint = None,
    dtype: Annotated[
        HalfType, typer.Option(help="Precision of the written weights")
    ] = HalfType.float16,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="Sampling defaults, such as model-card or demo; default: the bundle's own"
        ),
    ] = None,
) -> None:
    """Write a bundle from fetched or given checkpoints.

    Files may be .pt, .bin, .ckpt, .safetensors, or an .index.json of shards.
    """
    import torch
    from tqdm import tqdm

    from model.checkpoints.convert import import_bundle
    from model.runtime import prepare

    given = {"denoiser": denoiser, "vqgan": vqgan, "prior": prior, "byt5": byt5, "clip": clip}
    prepare()
    with one_line_errors():
        config, sources, merges = _origin(
            name, recipe, {network: path for network, path in given.items() if path is not None}
        )
        with tqdm(unit="B", unit_scale=True, desc="writing", leave=False, disable=None) as bar:
            written = import_bundle(
                sources, config, directory, getattr(torch, dtype), merges, bar.update
            )
    typer.echo(f"{directory}: {_bytes_of(written):,} bytes, sha256 {written.sha256}")


@weights_app.command()
def info(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="Bundle name or path, or a published bundle")
    ],
    memory: Annotated[
        float | None, typer.Option(help="GB of a machine or GPU: show the placements that fit")
    ] = None,
) -> None:
    """Show a bundle's networks, sizes, presets and memory needs."""
    from dataclasses import asdict

    from model.checkpoints.memory import contents, needs

    if memory is not None and not 0 < memory < math.inf:
        fail(f"memory: must be a number of GB above 0 (sent: {memory:g})", INVALID)
    with one_line_errors():
        config, parts = contents(name)
    _print_pairs(
        {
            "name": config.name,
            "family": config.family,
            "sha256": config.sha256 if config.files else "-",
        }
    )
    _print_pairs(
        {"native size": " x ".join(map(str, config.native_size)), "size step": config.size_step}
    )
    typer.echo("\nnetworks")
    _print_pairs(
        {
            n: f"{p.parameters:>13,} parameters {p.bytes:>14,} bytes  {p.types}"
            for n, p in parts.items()
        },
        indent="  ",
    )
    typer.echo("\nmemory in half precision, for the weights alone, by PAELLERA_ENCODERS")
    _print_pairs(
        {encoders: need.words(memory) for encoders, need in needs(parts).items()}, indent="  "
    )
    typer.echo("\nrecipe")
    _print_pairs(asdict(config.recipe), indent="  ")
    for name, preset in config.presets.items():
        default = ", the default" if name == config.default_preset else ""
        steps = "for {} to {} steps".format(*preset.steps)
        typer.echo(f"\npreset {name}{default}, {steps}, by {preset.network}")
        own, first = asdict(preset.recipe), asdict(config.recipe)
        _print_pairs({key: own[key] for key in own if own[key] != first[key]}, indent="  ")


@weights_app.command()
def verify(name: BundleName) -> None:
    """Verify a bundle as strictly as the server does, in little memory."""
    from model.checkpoints.verify import verify as verify_bundle
    from model.config import find_bundle
    from model.runtime import prepare

    prepare()
    with one_line_errors(invalid_code=FAILED):
        config = verify_bundle(find_bundle(name))
    typer.echo(f"{config.name}: ok, sha256 {config.sha256}")


@weights_app.command()
def check(
    name: BundleName,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="File for the eight images")
    ] = Path("weights-check.png"),
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 or mps")] = "auto",
    preset: Annotated[
        str | None, typer.Option(help="A preset of the bundle; default: its default one")
    ] = None,
) -> None:
    """Generate eight fixed prompts and check the images by CLIP, and for NaN."""
    from tqdm import tqdm

    from model.checkpoints.check import PROMPTS, write_sheet
    from model.checkpoints.check import check as check_pipeline
    from model.config import find_bundle
    from model.pipeline import Pipeline
    from model.runtime import pick_device, pick_dtype, prepare

    prepare()
    with one_line_errors():
        where = pick_device(device)
        pipeline = Pipeline.load(find_bundle(name), where, pick_dtype("auto", where))
        with tqdm(
            total=len(PROMPTS), desc="generating", unit="image", leave=False, disable=None
        ) as bar:
            found = check_pipeline(pipeline, bar.update, preset)
        write_sheet(found.images, output)
    for i, prompt in enumerate(PROMPTS):
        typer.echo(f"{found.similarity[i, i]:6.3f}  {prompt}")
    others = f"{found.shuffled:.3f} with those of other images"
    typer.echo(f"CLIP score {found.matched:.3f} with their own prompts, {others}")
    typer.echo(f"{found.chance:.2%} of all assignments of prompts to images score as high")
    codes = f"{found.codes_used} of {found.codes} codes, {found.entropy:.1f} bits per token"
    typer.echo(f"{codes}, the most frequent code {found.most_common:.0%}")
    typer.echo(f"{output}: the images in this order, four per row")
    if found.problems:
        fail(f"{pipeline.config.name} fails the check: {'; '.join(found.problems)}", FAILED)
    typer.echo(f"{pipeline.config.name} passes the check: its images match their prompts")


def _origin(
    name: str, recipe: str | None, given: dict[str, Path]
) -> tuple[BundleConfig, dict[str, Path], Path | None]:
    """Return a new bundle's configuration, checkpoints by network, and own tokenizer merges."""
    from dataclasses import replace

    from model.bundle_files import verify_files
    from model.checkpoints.fetch import fetched
    from model.checkpoints.manifest import published
    from model.config import BundleConfig, find_bundle

    if name in published().bundles:
        files: dict[str, PublishedFile] = {
            file.network: file for file in published().select(name).values()
        }
        config = published().config(name, recipe)
        return (
            config,
            {network: given.get(network) or fetched(files[network]) for network in config.networks},
            None,
        )
    directory = find_bundle(name)
    config = BundleConfig.read(directory)
    verify_files(directory, config)
    if recipe is not None:
        config = replace(config, recipe=published().recipe(recipe))
    kept = {network: directory / f"{network}.safetensors" for network in config.network_names}
    sources = kept | given
    return config, sources, None if config.clip.merges is None else directory / config.clip.merges


def _bytes_of(config: BundleConfig) -> int:
    return sum(entry.bytes for entry in config.files.values())


def _size(count: int) -> str:
    return f"{count / GB:>6.2f} GB" if count else "  unknown"


def _print_pairs(pairs: dict[str, Any], indent: str = "") -> None:
    for key, value in pairs.items():
        typer.echo(f"{indent}{key:<22}{value}")
