"""Assemble trained networks into a bundle.

    python -m model.training.assemble runs/tiny                      # from the checkpoints in runs/
    python -m model.training.assemble weights/tiny --dtype float16
    python -m model.training.assemble mine --base tiny --denoiser runs/denoiser.pt
    python -m model.training.assemble one --base tiny --denoiser runs/x.pt --recipe guidance=1

A network without a checkpoint keeps the weights of the bundle that OUT already holds, or random
weights if there is none: the prior and the denoiser train on a bundle whose encoders and VQGAN are
trained.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, replace
from pathlib import Path

import torch
from pydantic import TypeAdapter
from torch import Tensor

from model.bundle import Bundle, BundleV3, assign, build, inner, load_bundle, load_v3, save_bundle
from model.config import CONFIG_FILE, BundleConfig, BundleV3Config, find_bundle
from model.runtime import prepare
from model.training import loop, tiny
from model.training.checkpoint import averaged
from model.training.codes import quiet
from model.training.recipe_text import RecipeError, changed

# Network → (checkpoint, where the published module sits in what was trained).
SOURCES = {
    "vqgan": ("vqgan", "vqgan."),
    "byt5": ("byte_encoder", "t5."),
    "clip": ("clip", "model."),
    "prior": ("prior", ""),
    "denoiser": ("denoiser", "denoiser."),
}


def tiny_config() -> BundleV3Config:
    """Return the configuration of the embedded bundle, with the sizes in `tiny`."""
    return BundleV3Config(
        name="tiny",
        native_size=tiny.NATIVE_SIZE,
        denoiser=tiny.DENOISER,
        vqgan=tiny.VQGAN,
        prior=tiny.PRIOR,
        byt5=tiny.BYTE_ENCODER,
        clip=tiny.CLIP,
        recipe=tiny.RECIPE,
    )


def assemble(runs: Path, out: Path, dtype: torch.dtype) -> BundleConfig:
    """Write the bundle `out` from the checkpoints in `runs`, and return its configuration.

    dtype: of the saved weights. Raises FileNotFoundError if neither `runs` nor `out` has CLIP's
    merges, which every bundle needs.
    """
    config = tiny_config()
    merges = runs / str(config.clip.merges)
    there = out / str(config.clip.merges)
    merges = merges if merges.exists() else there
    bundle = build(config, merges.parent, "cpu")
    if (out / CONFIG_FILE).exists():
        _keep(bundle, load_bundle(out, torch.device("cpu"), torch.float32))
    for network, (name, prefix) in SOURCES.items():
        checkpoint = runs / f"{name}.pt"
        if checkpoint.exists():
            load_network(bundle, network, averaged(loop.load(checkpoint), prefix))
            print(f"{network}: {checkpoint}")
    return save_bundle(bundle, out, dtype, merges)


def load_network(bundle: Bundle, network: str, weights: dict[str, Tensor]) -> None:
    """Load a network's trained weights, by published name, into a bundle.

    A denoiser is made to ignore the channels that its codes leave free.
    """
    # The byte encoder's embedding table has two names, one of which may be absent.
    inner(getattr(bundle, network)).load_state_dict(weights, strict=network != "byt5")
    if network == "denoiser" and isinstance(bundle, BundleV3):
        quiet(bundle.denoiser)


def with_denoiser(
    base: Path, checkpoint: Path, out: Path, dtype: torch.dtype, recipe: str = ""
) -> BundleConfig:
    """Write the bundle `base` with a trained denoiser, and return its configuration.

    The new bundle has the name of the directory `out`; the other networks stay as they are.
    recipe: changes of its recipe, as `recipe_text.changed` reads them.

    Raises the errors of `load_v3`, BundleError for a checkpoint of another shape, RecipeError for
    an invalid recipe, and pydantic.ValidationError for a name that a bundle cannot have.
    """
    bundle = load_v3(base, torch.device("cpu"), torch.float32)
    assign(
        bundle.denoiser,
        averaged(loop.load(checkpoint), SOURCES["denoiser"][1]),
        torch.float32,
        where=str(checkpoint),
    )
    changes = {
        "name": out.resolve().name,
        "recipe": asdict(changed(bundle.config.recipe, recipe)),
    }
    config = TypeAdapter(BundleV3Config).validate_python(asdict(bundle.config) | changes)
    merges = None if config.clip.merges is None else base / config.clip.merges
    return save_bundle(replace(bundle, config=config), out, dtype, merges)


def _keep(bundle: Bundle, old: Bundle) -> None:
    for (_, module), (_, kept) in zip(bundle.networks(), old.networks(), strict=True):
        module.load_state_dict(kept.state_dict())


def main() -> None:
    """Assemble the bundle that the command line asks for, and print the sizes of its files."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("out", type=Path)
    p.add_argument("--runs", type=Path, default=Path("runs"))
    p.add_argument(
        "--base", help="name or path of the bundle that all but the denoiser is taken from"
    )
    p.add_argument("--denoiser", type=Path, help="checkpoint of the denoiser that goes into --base")
    p.add_argument("--dtype", choices=["float16", "bfloat16", "float32"], default="float16")
    p.add_argument(
        "--recipe", default="", help="changes of the recipe of --base, such as steps=4,guidance=1"
    )
    args = p.parse_args()
    if (args.base is None) != (args.denoiser is None):
        p.error("--base and --denoiser go together")
    prepare()
    dtype = getattr(torch, args.dtype)
    if args.base is None:
        config = assemble(args.runs, args.out, dtype)
    else:
        try:
            config = with_denoiser(
                find_bundle(args.base), args.denoiser, args.out, dtype, args.recipe
            )
        except RecipeError as error:
            p.error(str(error))
    print_files(config)


def print_files(config: BundleConfig) -> None:
    """Print the size of each of a bundle's files."""
    for name, entry in config.files.items():
        print(f"{entry.bytes / 1e6:8.2f} MB  {name}")


if __name__ == "__main__":
    main()
