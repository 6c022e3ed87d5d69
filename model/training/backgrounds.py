"""The backgrounds of the synthetic pictures: plain colours and simple scenes of smooth gradients, painted in batches on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from model.training.palette import COLOURS, NAMES
from model.training.scenery import BACKGROUNDS, GROUND, HORIZON, SCENES

__all__ = ["BACKGROUNDS", "GROUND", "HORIZON", "PARAMETERS", "SCENES", "paint"]

PARAMETERS = 8  # random numbers a background takes

_WOBBLE = 6.0  # levels by which a plain colour varies


def _plain(number: int, params: Tensor, height: int, width: int) -> Tensor:
    colour = params.new_tensor(COLOURS[NAMES[number]])
    colours = (colour + _WOBBLE * (2 * params[:, :3] - 1)).clamp(0, 255)
    return colours[:, :, None, None].expand(-1, -1, height, width)


def paint(background: Tensor, params: Tensor, height: int, width: int) -> Tensor:
    """Pictures of backgrounds `[N,3,height,width]` of 0…255, float32.

    background: indices into `BACKGROUNDS` `[N]`; params: uniform numbers of 0…1 `[N,8]` that vary colours and places.
    """
    pictures = torch.empty(len(background), 3, height, width, dtype=torch.float32, device=params.device)
    for number in torch.unique(background).tolist():
        rows = (background == number).nonzero()[:, 0]
        pictures[rows] = _plain(number % 12, params[rows].float(), height, width)
    return pictures
