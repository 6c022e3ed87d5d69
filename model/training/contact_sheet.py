"""Draw many prompts by a bundle's recipe, on one sheet with their words below."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from model.pipeline import Pipeline
from model.training.prompts import CONTACT_SHEET

_BATCH = 16


def contact_sheet(
    pipeline: Pipeline, path: Path, prompts: Sequence[str] = CONTACT_SHEET, columns: int = 8
) -> None:
    """Write the prompts' images with their words below; seeds are the positions."""
    sampling = pipeline.config.recipe.sampling()
    parts = [
        pipeline.generate(
            prompts[i : i + _BATCH], range(i, min(i + _BATCH, len(prompts))), sampling
        )
        for i in range(0, len(prompts), _BATCH)
    ]
    images = torch.cat(parts).numpy()
    _, height, width, _ = images.shape
    cell = (width + 12, height + 40)
    rows = -(-len(prompts) // columns)
    sheet = Image.new("RGB", (cell[0] * columns, cell[1] * rows), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (prompt, image) in enumerate(zip(prompts, images, strict=True)):
        x, y = i % columns * cell[0] + 6, i // columns * cell[1] + 6
        sheet.paste(Image.fromarray(image), (x, y))
        text = "\n".join(textwrap.wrap(prompt, max(12, width // 7)))
        pen.text((x, y + height + 3), text, fill="black", font_size=12, spacing=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, quality=70, method=6)
