"""Assemble trained networks into a bundle.

    python -m model.training.assemble runs/tiny                      # from the checkpoints in runs/
    python -m model.training.assemble weights/tiny --dtype float16
    python -m model.training.assemble mine --base tiny --denoiser runs/denoiser.pt
    python -m model.training.assemble one --base tiny --denoiser runs/x.pt --recipe guidance=1
    python -m model.training.assemble mine --preset fast --denoiser runs/x.pt --recipe steps=4

With --preset the bundle gets a named recipe, beside `quality`, and with --denoiser a further
denoiser of its own, which shares all other networks. Without --base it is added to OUT itself.

A network without a checkpoint keeps the weights of the bundle that OUT already holds, or random
weights if there is none: the prior and the denoiser train on a bundle whose encoders and VQGAN are
trained.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from model.bundle import Bundle, BundleV3, assign, build, inner, load_bundle, load_v3, save_bundle
from model.bundle_files import BundleError
from model.config import (
    CONFIG_FILE,
    BundleConfig,
    BundleV3Config,
    Preset,
    find_bundle,
    needed_format,
)
from model.network_config import DenoiserConfig
from model.networks.denoiser_v3 import Denoiser
from model.runtime import prepare
from model.training import command, loop, tiny
from model.training.arguments import COUNT
from model.training.checkpoint import averaged
from model.training.codes import quiet
from model.training.pruning import names, pruned_config
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
    if not merges.exists():
        raise FileNotFoundError(
            f"there is no {runs / merges.name}, which model.training.clip writes, and {out} holds"
            " no bundle yet"
        )
    kept = None
    if (out / CONFIG_FILE).exists():
        kept = load_bundle(out, torch.device("cpu"), torch.float32)
        config = _with_presets_of(kept, config)
    bundle = build(config, merges.parent, "cpu")
    if kept is not None:
        _keep(bundle, kept)
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
    base: Path,
    checkpoint: Path,
    out: Path,
    dtype: torch.dtype,
    recipe: str = "",
    prune: Sequence[str] = (),
) -> BundleConfig:
    """Write the bundle `base` with a trained denoiser, and return its configuration.

    The new bundle has the name of the directory `out`; the other networks stay as they are.
    recipe: changes of its recipe, as `recipe_text.changed` reads them. prune: blocks that the
    denoiser does without.

    Raises the errors of `load_v3`, BundleError for a checkpoint of another shape, unknown blocks or
    a name that a bundle cannot have, and RecipeError for an invalid recipe.
    """
    bundle = load_v3(base, torch.device("cpu"), torch.float32)
    old = bundle.config
    try:
        sizes = pruned_config(old.denoiser, prune)
    except ValueError as error:
        raise BundleError(str(error)) from None
    changes = {
        "name": out.resolve().name,
        "recipe": asdict(changed(old.recipe, recipe)),
        "denoiser": asdict(sizes),
        "format": needed_format(old.presets, (sizes, *old.denoisers.values()), old.vocabulary),
    }
    try:
        config = TypeAdapter(BundleV3Config).validate_python(asdict(old) | changes)
    except ValidationError as error:
        raise BundleError(_first_problem(error)) from None
    merges = None if config.clip.merges is None else base / config.clip.merges
    denoiser = _denoiser(sizes, checkpoint)
    return save_bundle(replace(bundle, config=config, denoiser=denoiser), out, dtype, merges)


@dataclass(frozen=True)
class NewPreset:
    """A preset to add to a bundle, or to change.

    recipe: changes of the preset's recipe, or of the bundle's if the preset is new. steps: (fewest,
    most) that it is made for; None is as before, and 1 to the recipe's if that does not fit.
    checkpoint: of a denoiser of its own. sizes: what its configuration changes of the first
    denoiser's. prune: blocks that it does without, beside those that the first one lacks.
    denoiser_of: the preset whose denoiser it shares; None keeps its denoiser, and is the first for
    a new preset. default: whether it becomes the default preset.
    """

    name: str
    recipe: str = ""
    steps: tuple[int, int] | None = None
    checkpoint: Path | None = None
    sizes: dict[str, Any] = field(default_factory=dict)
    prune: Sequence[str] = ()
    denoiser_of: str | None = None
    default: bool = False


def with_preset(base: Path, new: NewPreset, out: Path, dtype: torch.dtype) -> BundleConfig:
    """Write the bundle `base` with a preset more, and return its configuration.

    The new bundle has the name of the directory `out`.

    Raises the errors of `load_v3`, BundleError for a checkpoint of another shape, RecipeError for
    an invalid recipe, and PresetError for a preset that the bundle cannot have.
    """
    bundle = load_v3(base, torch.device("cpu"), torch.float32)
    try:
        config = _extended(bundle.config, new, out.resolve().name)
    except RecipeError:
        raise
    except ValidationError as error:
        raise PresetError(_first_problem(error)) from None
    except ValueError as error:
        raise PresetError(str(error)) from None
    denoisers = dict(bundle.denoisers)
    if new.checkpoint is not None:
        denoisers[new.name] = _denoiser(config.denoisers[new.name], new.checkpoint)
    kept = {name: denoisers[name] for name in config.denoisers}
    merges = None if config.clip.merges is None else base / config.clip.merges
    return save_bundle(replace(bundle, config=config, denoisers=kept), out, dtype, merges)


def _first_problem(error: ValidationError) -> str:
    first = error.errors()[0]
    if first["loc"] == ("name",):
        allowed = "up to 64 letters, digits, dots, hyphens and underscores"
        return f"a bundle cannot have the name {first['input']!r}: {allowed} are allowed"
    return "".join(f"{part}: " for part in first["loc"]) + first["msg"]


class PresetError(ValueError):
    """A preset that a bundle cannot have."""


def _extended(config: BundleV3Config, new: NewPreset, name: str) -> BundleV3Config:
    """Return a configuration of this name with the preset. Raises ValueError and RecipeError."""
    sizes = None
    if new.checkpoint is not None:
        sizes = TypeAdapter(DenoiserConfig).validate_python(asdict(config.denoiser) | new.sizes)
        sizes = pruned_config(sizes, new.prune)
    extended = config.with_preset(new.name, _preset(new, config), sizes, default=new.default)
    return TypeAdapter(BundleV3Config).validate_python(asdict(extended) | {"name": name})


def _preset(new: NewPreset, config: BundleV3Config) -> Preset:
    known = config.presets.get(new.name)
    recipe = changed(known.recipe if known else config.recipe, new.recipe)
    steps = new.steps or (known.steps if known else (0, 0))
    if new.steps is None and not steps[0] <= recipe.num_inference_steps <= steps[1]:
        steps = 1, recipe.num_inference_steps
    if new.checkpoint is not None:
        return Preset(recipe, steps, new.name)
    if new.denoiser_of is None:
        return Preset(recipe, steps, known.denoiser if known else None)
    if new.denoiser_of not in config.preset_names:
        names = ", ".join(config.preset_names)
        raise ValueError(f"there is no preset {new.denoiser_of!r}, only {names}")
    return Preset(recipe, steps, config.preset(new.denoiser_of).denoiser)


def _denoiser(config: DenoiserConfig, checkpoint: Path) -> Denoiser:
    with torch.device("meta"):
        denoiser = Denoiser(config)
    weights = averaged(loop.load(checkpoint), SOURCES["denoiser"][1])
    assign(denoiser, weights, torch.float32, where=str(checkpoint))
    return denoiser.eval().requires_grad_(False)


def _with_presets_of(kept: Bundle, config: BundleV3Config) -> BundleV3Config:
    """Return a configuration with the presets of a bundle of the same family."""
    if not isinstance(kept, BundleV3):
        return config
    old = kept.config
    return replace(
        config,
        presets=old.presets,
        denoisers=old.denoisers,
        default_preset=old.default_preset,
        format=old.format,
    )


def _keep(bundle: Bundle, old: Bundle) -> None:
    for (_, module), (_, kept) in zip(bundle.networks(), old.networks(), strict=True):
        module.load_state_dict(kept.state_dict())


def main() -> None:
    """Assemble the bundle that the command line asks for, and print the sizes of its files."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("out", type=Path, help="folder of the bundle to write")
    p.add_argument(
        "--runs",
        type=Path,
        default=Path("runs"),
        help="folder of the trainers' checkpoints (default %(default)s)",
    )
    p.add_argument(
        "--base", help="name or path of the bundle that all but the denoiser is taken from"
    )
    p.add_argument(
        "--denoiser", type=Path, help="checkpoint of the denoiser for --base, or for --preset"
    )
    p.add_argument(
        "--dtype",
        choices=["float16", "bfloat16", "float32"],
        default="float16",
        help="number type of the written weights (default %(default)s)",
    )
    p.add_argument(
        "--recipe", default="", help="changes of the recipe of --base, such as steps=4,guidance=1"
    )
    p.add_argument("--preset", help="name of a preset to add, such as fast")
    p.add_argument(
        "--steps",
        type=_range,
        metavar="FEWEST:MOST",
        help="steps that --preset is made for; default: 1 to those of its recipe",
    )
    p.add_argument(
        "--sizes",
        type=_json_object,
        default={},
        help="what differs from the first denoiser, such as '{\"blocks\": [1, 2]}'",
    )
    p.add_argument(
        "--prune",
        type=names,
        default=(),
        metavar="BLOCK[,BLOCK…]",
        help="blocks that the checkpoint's denoiser does without (docs/distillation.md)",
    )
    p.add_argument("--denoiser-of", help="preset whose denoiser --preset shares")
    p.add_argument(
        "--default", action="store_true", help="make --preset the one of requests that name none"
    )
    args = p.parse_args()
    if args.preset is None and (args.base is None) != (args.denoiser is None):
        p.error("--base and --denoiser go together")
    if args.prune and args.denoiser is None:
        p.error("--prune is about the blocks of --denoiser")
    if args.preset is None and (args.steps or args.sizes or args.denoiser_of or args.default):
        p.error("--steps, --sizes, --denoiser-of and --default need --preset")
    prepare()
    try:
        config = _assemble_as_told(args, getattr(torch, args.dtype))
    except (RecipeError, PresetError, BundleError) as error:
        p.error(str(error))
    print_files(config)


def _assemble_as_told(args: argparse.Namespace, dtype: torch.dtype) -> BundleConfig:
    """Assemble what the command line says. Raises RecipeError, PresetError and BundleError."""
    if args.preset is not None:
        new = NewPreset(
            args.preset,
            args.recipe,
            args.steps,
            args.denoiser,
            args.sizes,
            args.prune,
            args.denoiser_of,
            args.default,
        )
        base = args.out if args.base is None else find_bundle(args.base)
        return with_preset(base, new, args.out, dtype)
    if args.base is None:
        return assemble(args.runs, args.out, dtype)
    return with_denoiser(
        find_bundle(args.base), args.denoiser, args.out, dtype, args.recipe, args.prune
    )


def _range(text: str) -> tuple[int, int]:
    """Return "1:4" as (1, 4)."""
    fewest, _, most = text.partition(":")
    return COUNT(fewest), COUNT(most or fewest)


def _json_object(text: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON ({error})") from None
    if not isinstance(content, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON object")
    return content


def print_files(config: BundleConfig) -> None:
    """Print the size of each of a bundle's files."""
    for name, entry in config.files.items():
        print(f"{entry.bytes / 1e6:8.2f} MB  {name}")


if __name__ == "__main__":
    command.run(main)
