"""How well a bundle draws what it is asked, judged by reading pixels.

    python -m model.training.evaluate                                 # the embedded weights, all of it
    python -m model.training.evaluate --bundle runs/tiny --quick      # 100 prompts at 12 steps
    python -m model.training.evaluate --contact-sheet docs/contact_sheet.png
    python -m model.training.evaluate --operations                    # what becomes of pictures: inpainting, outpainting, …

Fixed prompts, fixed seeds, no network among the judges. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from rich.console import Console
from rich.table import Table

from model.config import SamplingConfig, find_bundle
from model.pipeline import Pipeline
from model.runtime import pick_device, pick_dtype, prepare
from model.training import captions
from model.training.checker import Verdict, judge
from model.training.data import as_float
from model.training.prompts import CONTACT_SHEET, evaluation_prompts, first_hundred
from model.training.repertoire import OPERATIONS
from model.training.scenes import SHAPES, Scene
from model.training.studio import Studio

Case = tuple[str, Scene]
FIGURES = ("background", "shape_colour", "both_colours", "object_colour", "shape", "object", "position", "both_of_two")
_BATCH = 20
_HELD_OUT_SEED = 987_654_321  # no trainer's stream starts from it


def draw(pipeline: Pipeline, prompts: Sequence[str], sampling: SamplingConfig) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Pictures [N, H, W, 3] of the prompts, the i-th with seed i."""
    parts = [
        pipeline.generate(prompts[i : i + _BATCH], range(i, min(i + _BATCH, len(prompts))), sampling)
        for i in range(0, len(prompts), _BATCH)
    ]
    return torch.cat(parts).numpy()


def adherence(pipeline: Pipeline, cases: Sequence[Case], sampling: SamplingConfig) -> dict[str, float]:
    """Shares of pictures that are what the prompt says, by `FIGURES`; a figure without cases is left out."""
    pictures = draw(pipeline, [prompt for prompt, _ in cases], sampling)
    verdicts = [(scene, judge(picture, scene)) for (_, scene), picture in zip(cases, pictures, strict=True)]
    single = [(s, v) for s, v in verdicts if len(s.things) == 1]
    shapes = [(s, v) for s, v in single if s.things[0].kind in SHAPES]
    objects = [(s, v) for s, v in single if s.things[0].kind not in SHAPES]
    groups: dict[str, list[bool]] = {
        "background": [v.background for _, v in verdicts],
        "shape_colour": [v.colours for _, v in shapes],
        "both_colours": [v.background and v.colours for _, v in shapes],
        "object_colour": [v.colours for _, v in objects],
        "shape": [v.shapes for _, v in shapes],
        "object": [v.shapes for _, v in objects],
        "position": [v.positions for _, v in single],
        "both_of_two": [_both(v) for s, v in verdicts if len(s.things) == 2],
    }
    return {name: round(float(np.mean(hits)), 4) for name, hits in groups.items() if hits}


def _both(verdict: Verdict) -> bool:
    return verdict.colours and verdict.shapes and verdict.positions


@torch.inference_mode()
def networks(pipeline: Pipeline, scenes: int = 256) -> dict[str, float]:
    """The other networks on held-out scenes: VQGAN reconstruction, CLIP retrieval among `scenes` pictures, the prior's likeness."""
    bundle, device = pipeline.bundle, pipeline.device
    pixels, texts, _ = captions.batch(np.random.default_rng(_HELD_OUT_SEED), scenes, *bundle.config.native_size)
    image = as_float(torch.from_numpy(pixels).permute(0, 3, 1, 2), device)
    dtype = next(bundle.vqgan.parameters()).dtype
    tokens = bundle.vqgan.encode(image.to(dtype))
    error = F.mse_loss(bundle.vqgan.decode(tokens).float().clamp(0, 1), image, reduction="none").mean((1, 2, 3))
    prompts = pipeline.encode(texts)
    text, truth = torch.cat([p.clip for p in prompts]).float(), bundle.clip.encode_image(image).float()
    similarity = F.normalize(truth, dim=-1) @ F.normalize(text, dim=-1).T
    own = torch.arange(scenes, device=device)
    width, height = pipeline.config.native_size
    guessed = torch.cat(pipeline.image_embeddings(prompts, [pipeline.noise(i, width, height, 1) for i in range(scenes)])).float()
    return {
        "vqgan_psnr": round(float((-10 * error.log10()).mean()), 2),
        "codes_used": tokens.unique().numel(),
        "clip_text_found": round(float((similarity.argmax(1) == own).float().mean()), 4),
        "clip_image_found": round(float((similarity.argmax(0) == own).float().mean()), 4),
        "prior_cosine": round(float(F.cosine_similarity(guessed, truth).mean()), 4),
        "prior_cosine_shuffled": round(float(F.cosine_similarity(guessed, truth.roll(1, 0)).mean()), 4),
    }


def contact_sheet(pipeline: Pipeline, path: Path, prompts: Sequence[str] = CONTACT_SHEET, columns: int = 8, scale: int = 2) -> None:
    """Writes the prompts' pictures with their words below; seeds are the positions."""
    pictures = draw(pipeline, prompts, pipeline.config.recipe.sampling())
    _, height, width, _ = pictures.shape
    cell = (width * scale + 12, height * scale + 44)
    rows = -(-len(prompts) // columns)
    sheet = Image.new("RGB", (cell[0] * columns, cell[1] * rows), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (prompt, picture) in enumerate(zip(prompts, pictures, strict=True)):
        x, y = i % columns * cell[0] + 6, i // columns * cell[1] + 6
        sheet.paste(Image.fromarray(picture).resize((width * scale, height * scale), Image.Resampling.LANCZOS), (x, y))
        pen.text((x, y + height * scale + 4), _wrapped(prompt, 24), fill="black", font_size=10, spacing=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, optimize=True)


def _wrapped(text: str, width: int) -> str:
    return "\n".join(textwrap.wrap(text, width))


def _show(title: str, rows: dict[str, dict[str, float]]) -> None:
    table = Table("", *FIGURES, title=title)
    for name, figures in rows.items():
        table.add_row(name, *(f"{figures[f]:.1%}" if f in figures else "" for f in FIGURES))
    Console(width=120).print(table)


def judge_operations(pipeline: Pipeline, cases: int) -> dict[str, Any]:
    """Every operation's figures, with a table of them."""
    studio, table = Studio(pipeline), Table("", "figure", "share", title=f"{cases} cases each")
    figures = {name: judged(studio, cases) for name, judged in OPERATIONS.items()}
    for operation, row in figures.items():
        for name, share in row.items():
            table.add_row(operation, name.replace("_", " "), f"{share:.1%}")
    Console(width=120).print(table)
    return {"bundle": pipeline.config.name, "sha256": pipeline.config.sha256, "cases": cases, "operations": figures}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--bundle", default="tiny")
    p.add_argument("--quick", action="store_true", help="a hundred single-thing prompts at 12 steps only")
    p.add_argument("--contact-sheet", type=Path, help="also writes 32 untuned prompts' pictures there")
    p.add_argument("--operations", action="store_true", help="judges inpaint, outpaint, variations, edit, interpolate and regions instead")
    p.add_argument("--cases", type=int, default=100, help="of every operation, 100 by default")
    p.add_argument("--threads", type=int, default=0)
    args = p.parse_args()
    prepare(args.threads)
    device = pick_device()
    pipeline = Pipeline.load(find_bundle(args.bundle), device, pick_dtype("auto", device))
    began = time.monotonic()
    if args.operations:
        print(json.dumps(judge_operations(pipeline, args.cases) | {"seconds": round(time.monotonic() - began, 1)}))
        return
    recipe = pipeline.config.recipe
    if args.contact_sheet:
        contact_sheet(pipeline, args.contact_sheet)
    cases = first_hundred() if args.quick else evaluation_prompts()
    by_steps = {f"{n} steps": adherence(pipeline, cases, recipe.sampling(steps=n)) for n in ((12,) if args.quick else (8, 12))}
    _show(f"{len(cases)} prompts, guidance {recipe.guidance_scale[0]:g} to {recipe.guidance_scale[1]:g}", by_steps)
    result: dict[str, Any] = {
        "bundle": pipeline.config.name,
        "sha256": pipeline.config.sha256,
        "prompts": len(cases),
        "adherence": by_steps,
    }
    if not args.quick:
        guidances = {f"guidance {g}": adherence(pipeline, first_hundred(), recipe.sampling(guidance=(g, g))) for g in (1.0, 2.0, 4.0, 8.0)}
        _show("100 single-thing prompts, 12 steps", guidances)
        result["guidance"] = guidances
    result["networks"] = networks(pipeline)
    result["seconds"] = round(time.monotonic() - began, 1)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
