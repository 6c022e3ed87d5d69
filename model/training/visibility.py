"""Measure how wide each object is and before which backgrounds it can be seen.

`python -m model.training.visibility` writes both into `kinds.jsonl`, after a change of the kinds or
the backgrounds; images are then laid out without the art.
"""

from __future__ import annotations

import json

import numpy as np
import numpy.typing as npt
import torch

from model.training import command
from model.training.art import atlas
from model.training.backgrounds import PARAMETERS, paint
from model.training.kinds import FILE, SHAPES
from model.training.palette import COLOURS, lab
from model.training.scenery import BACKGROUNDS, SCENES

ALIKE = 20.0  # ΔE below which a pixel is lost in its background
SIDE = 64  # pixels a side of the sprites that are compared
DRAWS = 4  # images of each background

Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]


def seen(colours: Floats, solid: Flags, behind: Floats) -> bool:
    """Tell whether neither much of a thing nor a part of its outline vanishes before a background.

    colours: the thing's CIELAB `[H,W,3]`; solid: where it is `[H,W]`; behind: the background's
    CIELAB, `[1,1,3]` for a plain one, else `[H,W,3]`. A scene hides different parts of a thing at
    different places, so there less has to be seen.
    """
    visible = solid & (np.linalg.norm(colours - behind, axis=-1) >= ALIKE)
    if behind.size > 3:
        return bool(visible.sum() >= 0.5 * solid.sum())
    shrinks = any(
        visible.any(axis=axis).sum() < 0.9 * solid.any(axis=axis).sum() for axis in (0, 1)
    )
    return not shrinks and bool(visible.sum() >= 0.7 * solid.sum())


def _scene(number: int) -> Floats:
    params = torch.rand(DRAWS, PARAMETERS, generator=torch.Generator().manual_seed(number))
    images = paint(torch.full((DRAWS,), number), params, 256, 256)
    return lab(torch.nn.functional.avg_pool2d(images, 256 // SIDE).permute(0, 2, 3, 1).numpy())


def main() -> None:
    """Measure every object, and write the results into `kinds.jsonl`."""
    sprites = atlas(SIDE).numpy().astype(np.float64)
    plain = {name: lab(colour)[None, None] for name, colour in COLOURS.items()}
    scenes = {name: _scene(BACKGROUNDS.index(name)) for name in SCENES}

    def hidden(colours: Floats, solid: Flags) -> list[str]:
        names = [name for name, behind in plain.items() if not seen(colours, solid, behind)]
        return names + [
            name
            for name, images in scenes.items()
            if sum(seen(colours, solid, image) for image in images) * 2 < DRAWS
        ]

    lines = []
    for row, sprite in zip(
        map(json.loads, FILE.read_text(encoding="utf-8").splitlines()),
        sprites[len(SHAPES) :],
        strict=True,
    ):
        solid = sprite[3] > 127
        colours = lab((sprite[:3] * 255 / np.maximum(sprite[3], 1)).clip(0, 255).transpose(1, 2, 0))
        width, height = (int((sprite[3] > 8).any(axis=axis).sum()) for axis in (0, 1))
        row |= {"aspect": round(width / height, 2), "hidden": hidden(colours, solid)}
        if not row["hidden"]:
            del row["hidden"]
        lines.append(json.dumps(row, ensure_ascii=False, separators=(",", ":")))
    FILE.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    command.run(main)
