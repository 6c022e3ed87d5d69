"""The first judge: a small detector that says which things a picture shows, where and before what.

    judge = Detector.load()
    judge.read(pictures)  # uint8 [N, H, W, 3] → list[Reading]

`judge.py` trains it, on damaged renders alone: it has never seen what the judged networks draw. A
cell of its grid is one of the VQGAN's tokens: 16 pixels of 256. Every cell answers whether a
thing's middle lies in it, how large the thing's box is and which kind it is; the whole picture
answers for the background. A shape's colour is read from the pixels that the shape covers.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from model.training.art import shapes
from model.training.checker import Found, Reading
from model.training.kinds import NAMES_OF_KINDS, SHAPES
from model.training.palette import nearest
from model.training.scenery import BACKGROUNDS

WEIGHTS = Path(__file__).parent / "judges" / "detector.safetensors"
CELL = 16  # pixels of a picture whose shorter side is 256
SIDE = 128  # pixels of the shorter side, as the network sees it
_SURE = 0.35  # confidence from which a cell holds a thing
_CANDIDATES = 12
_OVERLAP = 0.45  # share of the smaller box that lies in the other, from which both are one thing
_BATCH = 64


class _Conv(nn.Sequential):
    """Convolution, batch normalisation and, by default, ReLU."""

    def __init__(self, c_in: int, c_out: int, size: int, stride: int = 1, act: bool = True) -> None:
        conv = nn.Conv2d(c_in, c_out, size, stride, size // 2, bias=False)
        super().__init__(conv, nn.BatchNorm2d(c_out), nn.ReLU() if act else nn.Identity())


class _Bottleneck(nn.Module):
    """A residual block whose 3×3 convolution has fewer channels."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            _Conv(channels, inner, 1), _Conv(inner, inner, 3), _Conv(inner, channels, 1, act=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.layers(x))


class Seen(NamedTuple):
    """The network's answer for N pictures of h × w cells.

    middles: logits [N, h, w] of holding a thing's middle. boxes: [N, h, w, 4], the middle's offset
    (x, y) from the cell's in cells, and log2 of the box's width and height in cells.
    cells: features [N, h, w, D] for `kinds`. background: logits [N, backgrounds]. pooled: [N, P].
    """

    middles: Tensor
    boxes: Tensor
    cells: Tensor
    background: Tensor
    pooled: Tensor


class Detector(nn.Module):
    """A residual network with a grid of cells as its answer."""

    def __init__(self, widths: Sequence[int] = (64, 128, 256), features: int = 192) -> None:
        super().__init__()
        b, c, d = widths
        self.stem = nn.Sequential(_Conv(3, b, 7, 4), _Bottleneck(b, b // 2))
        self.middle = nn.Sequential(_Conv(b, c, 3, 2), *[_Bottleneck(c, c // 2) for _ in range(3)])
        inner = d * 3 // 8
        self.deep = nn.Sequential(_Conv(c, d, 3, 2), *[_Bottleneck(d, inner) for _ in range(4)])
        self.lateral = _Conv(c, features, 1, act=False)
        self.down = _Conv(d, features, 1, act=False)
        self.neck = nn.Sequential(nn.ReLU(), *[_Bottleneck(features, features // 3) for _ in "ab"])
        self.place = nn.Conv2d(features, 5, 1)
        self.kinds = nn.Linear(features, len(NAMES_OF_KINDS))
        self.background = nn.Linear(c + d, len(BACKGROUNDS))
        with torch.no_grad():  # few cells hold a thing's middle
            self.place.get_parameter("bias")[0] = -4.0

    @classmethod
    def load(cls, path: Path = WEIGHTS, device: torch.device | str = "cpu") -> Detector:
        """Read trained weights.

        Raises FileNotFoundError without the file and ValueError where it knows other kinds.
        """
        if not path.is_file():
            message = f"{path} is missing: train it with `python -m model.training.judge`"
            raise FileNotFoundError(message)
        with safe_open(path, "pt") as file:
            names = json.loads((file.metadata() or {})["names"])
            weights = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
        if names != _names():
            raise ValueError(f"{path} was trained on other kinds or backgrounds: train it again")
        detector = cls()
        detector.load_state_dict(weights, strict=False)
        return detector.eval().requires_grad_(False).to(device)

    def save(self, path: Path) -> None:
        """Write the weights in float16, replacing the file as a whole."""
        path.parent.mkdir(parents=True, exist_ok=True)
        state = {
            name: tensor.to("cpu", torch.float16).contiguous()
            for name, tensor in self.state_dict().items()
            if tensor.is_floating_point()
        }
        partial = path.with_suffix(".partial")
        save_file(state, partial, {"names": json.dumps(_names())})
        os.replace(partial, path)

    # ── network ───────────────────────────────────────────────────────────────────────────────────

    def forward(self, pictures: Tensor) -> Seen:
        """Pictures float [N, 3, H, W] of 0 … 1, the shorter side 128, both multiples of 16."""
        fine = self.middle(self.stem(pictures * 4 - 2))
        deep = self.deep(fine)
        up = F.interpolate(self.down(deep), fine.shape[-2:], mode="nearest")
        cells = self.neck(self.lateral(fine) + up)
        middles, boxes = self.place(cells).split((1, 4), dim=1)
        pooled = torch.cat([fine.mean((2, 3)), deep.mean((2, 3))], dim=1)
        return Seen(
            middles[:, 0],
            boxes.permute(0, 2, 3, 1),
            cells.permute(0, 2, 3, 1),
            self.background(pooled),
            pooled,
        )

    @property
    def device(self) -> torch.device:
        return self.kinds.weight.device

    def _see(self, pictures: Tensor) -> Seen:
        """Look at pictures uint8 [N, H, W, 3]."""
        dtype = torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32
        with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
            return Seen(*(part.float() for part in self(as_seen(pictures.to(self.device)))))

    # ── answers ───────────────────────────────────────────────────────────────────────────────────

    @torch.inference_mode()
    def read(self, pictures: Tensor) -> list[Reading]:
        """Return what pictures uint8 [N, H, W, 3] of one size show."""
        return [reading for part in pictures.split(_BATCH) for reading in self._read(part)]

    @torch.inference_mode()
    def features(self, pictures: Tensor) -> Tensor:
        """Return features [N, P] on the CPU, for distances between sets of pictures."""
        return torch.cat([self._see(part).pooled.cpu() for part in pictures.split(_BATCH)])

    def kind_scores(self, pictures: Tensor, sprites: Tensor) -> Tensor:
        """Return log-probabilities [N] that pictures show a thing of the sprites' kinds.

        Pictures float [N, 3, H, W] of 0 … 1 in their own size, sprites [N]. Differentiable.
        """
        seen = self(shrunk(pictures))
        kinds = F.log_softmax(self.kinds(seen.cells.flatten(1, 2)).float(), dim=-1)
        index = sprites.long().to(kinds.device)[:, None, None].expand(-1, kinds.shape[1], 1)
        own = kinds.gather(-1, index)[..., 0]
        return (own + F.logsigmoid(seen.middles.float().flatten(1))).max(dim=1).values

    def _read(self, pictures: Tensor) -> list[Reading]:
        seen = self._see(pictures)
        certainty = seen.middles.sigmoid()
        peaks = certainty * (F.max_pool2d(certainty[:, None], 3, 1, 1)[:, 0] == certainty)
        scores, cells = peaks.flatten(1).topk(_CANDIDATES)
        boxes = _gather(seen.boxes, cells)
        kinds = self.kinds(_gather(seen.cells, cells)).argmax(-1)
        columns = seen.middles.shape[2]
        middles = torch.stack([cells % columns, cells // columns], -1) + 0.5 + boxes[..., :2]
        answers = [x.cpu().numpy() for x in (scores, middles * CELL, boxes[..., 2:].exp2() * CELL)]
        names, backgrounds = kinds.tolist(), seen.background.argmax(-1).tolist()
        return [
            Reading(
                BACKGROUNDS[backgrounds[i]],
                tuple(_things(pixels, names[i], *(answer[i] for answer in answers))),
                (pixels.shape[0], pixels.shape[1]),
            )
            for i, pixels in enumerate(pictures.cpu().numpy())
        ]


def _names() -> list[str]:
    return [*NAMES_OF_KINDS, *BACKGROUNDS]


def _gather(grid: Tensor, cells: Tensor) -> Tensor:
    """Return what a grid [N, h, w, D] holds at cells [N, M] → [N, M, D]."""
    return grid.flatten(1, 2).gather(1, cells[..., None].expand(-1, -1, grid.shape[-1]))


def shrunk(pictures: Tensor) -> Tensor:
    """Scale pictures [N, 3, H, W] until the shorter side is what the network sees."""
    height, width = pictures.shape[-2:]
    scale = SIDE / min(height, width)
    if scale == 1:
        return pictures
    size = [max(1, round(side * scale / CELL)) * CELL for side in (height, width)]
    return F.interpolate(pictures, size, mode="bilinear", antialias=True)


def as_seen(pictures: Tensor) -> Tensor:
    """Pictures uint8 [N, H, W, 3] → float [N, 3, h, w] of 0 … 1 as the network takes them."""
    return shrunk(pictures.permute(0, 3, 1, 2).float() / 255).contiguous(
        memory_format=torch.channels_last
    )


# ── things ────────────────────────────────────────────────────────────────────────────────────────

Floats = npt.NDArray[np.float32]


def _things(
    picture: npt.NDArray[np.uint8],
    kinds: Sequence[int],
    scores: Floats,
    middles: Floats,
    boxes: Floats,
) -> list[Found]:
    """Return the certain candidates that are not parts of others; middles and boxes in pixels."""
    kept: list[int] = []
    for i in np.argsort(-scores):
        apart = all(overlap(middles[i], boxes[i], middles[j], boxes[j]) < _OVERLAP for j in kept)
        if scores[i] >= _SURE and apart:
            kept.append(int(i))
    height, width = picture.shape[:2]
    unit = min(height, width) / (2 * SIDE)
    return [
        Found(
            kind := NAMES_OF_KINDS[kinds[i]],
            shape_colour(picture, kind, middles[i] * unit, boxes[i] * unit)
            if kind in SHAPES
            else None,
            (float(middles[i][0] * unit / width), float(middles[i][1] * unit / height)),
            (float(boxes[i][0] / (2 * SIDE)), float(boxes[i][1] / (2 * SIDE))),
            float(scores[i]),
        )
        for i in kept
    ]


def overlap(middle: Floats, box: Floats, other_middle: Floats, other_box: Floats) -> float:
    """Return the boxes' intersection as a share of the smaller box."""
    low = np.maximum(middle - box / 2, other_middle - other_box / 2)
    high = np.minimum(middle + box / 2, other_middle + other_box / 2)
    shared = float(np.prod(np.clip(high - low, 0, None)))
    return shared / max(float(min(np.prod(box), np.prod(other_box))), 1e-6)


@lru_cache(maxsize=1)
def _shape_masks() -> Floats:
    """Return the opacity of every shape's sprite [9, 64, 64], its longer side 64."""
    return shapes(64)[:, 3].float().div(255).numpy()


def shape_colour(
    picture: npt.NDArray[np.uint8], shape: str, middle: Floats, box: Floats
) -> str | None:
    """Name the palette colour of the pixels that a shape of a picture [H, W, 3] covers.

    middle, box: (x, y) and (width, height) in pixels. None where it covers none.
    """
    mask = _shape_masks()[SHAPES.index(shape)]
    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    mask = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    # Every pixel of the mask is looked up in the picture, so that neither needs scaling.
    y, x = (
        middle[axis] + ((np.arange(extent) + 0.5) / extent - 0.5) * box[axis]
        for axis, extent in ((1, mask.shape[0]), (0, mask.shape[1]))
    )
    inside = (y >= 0) & (y < picture.shape[0]), (x >= 0) & (x < picture.shape[1])
    covered = _core(mask)[np.ix_(*inside)]
    if not covered.any():
        return None
    places = np.ix_(y[inside[0]].astype(int), x[inside[1]].astype(int))
    return nearest(np.median(picture[places][covered], axis=0))


def _core(mask: Floats) -> npt.NDArray[np.bool_]:
    """Return where a mask [h, w] is solid for three pixels around: a blurred edge has no colour."""
    padded = np.pad(mask > 0.9, 3)
    h, w = mask.shape
    shifts = ((3, 0), (3, 6), (0, 3), (6, 3), (3, 3))
    return np.logical_and.reduce([padded[y : y + h, x : x + w] for y, x in shifts])
