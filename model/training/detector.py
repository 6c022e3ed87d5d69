"""Define the first judge: two small networks that name an image's things, places and background.

    judge = Detector.load()
    judge.read(images)  # uint8 [N, H, W, 3] → list[Reading]

The finder sees the whole image. Every cell of its grid, one of the VQGAN's tokens of 16 pixels,
predicts whether a thing's middle lies in it and how large the thing's box is; the pooled features
predict the background. The namer sees the contents of one box and predicts its kind. A shape's
colour is read from the pixels that the shape covers. `judge.py` trains both, on damaged renders
alone: they have never seen an image of the judged networks.
"""

from __future__ import annotations

import json
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
from model.whole_file import whole_file

WEIGHTS = Path(__file__).parent / "judges" / "detector.safetensors"
NATIVE = 256  # pixels of an image's shorter side, in which boxes are given
CELL = 16  # pixels of the grid's cells
SIDE = 64  # pixels of the shorter side, as the finder sees images
CROP = 48  # pixels a side of what the namer sees
ROOM = 1.12  # side of a crop, in longer sides of the box it shows
GREY = 0.5  # what the namer sees beyond a box
_STRIDE = NATIVE // SIDE
_SURE = 0.35  # confidence from which a cell holds a thing
# A thing larger than the image has no middle to be sure of, but the image is not empty either.
_CLOSE_LOW, _CLOSE_HIGH = 0.15, 0.55
_CLOSE_NAMED = 0.4  # the namer's confidence from which the whole image is such a thing
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
        """Return x plus the block's output, [N, C, H, W]."""
        return F.relu(x + self.layers(x))


class Seen(NamedTuple):
    """The finder's answer for N images of h × w cells.

    middles: logits [N, h, w] of holding a thing's middle. boxes: [N, h, w, 4], the middle's offset
    (x, y) from the cell's in cells, and log2 of the box's width and height in cells.
    background: logits [N, backgrounds]. pooled: [N, P].
    """

    middles: Tensor
    boxes: Tensor
    background: Tensor
    pooled: Tensor


class Finder(nn.Module):
    """A residual network with a grid of cells as its answer."""

    def __init__(self) -> None:
        super().__init__()
        self.fine = nn.Sequential(
            _Conv(3, 32, 5, 2), _Conv(32, 64, 3, 2), _Bottleneck(64, 32), _Bottleneck(64, 32)
        )
        self.deep = nn.Sequential(_Conv(64, 128, 3, 2), *[_Bottleneck(128, 64) for _ in range(3)])
        self.lateral = _Conv(64, 96, 1, act=False)
        self.down = _Conv(128, 96, 1, act=False)
        self.neck = nn.Sequential(nn.ReLU(), _Bottleneck(96, 48))
        self.place = nn.Conv2d(96, 5, 1)
        self.background = nn.Linear(64 + 128, len(BACKGROUNDS))
        with torch.no_grad():  # few cells hold a thing's middle
            self.place.get_parameter("bias")[0] = -4.0

    def forward(self, images: Tensor) -> Seen:
        """Return the answer for images float [N, 3, H, W] of 0 … 1.

        The shorter side has 64 pixels; both sides are multiples of 8.
        """
        fine = self.fine(images * 4 - 2)
        deep = self.deep(fine)
        up = F.interpolate(self.down(deep), fine.shape[-2:], mode="nearest")
        places = self.place(self.neck(self.lateral(fine) + up))
        middles, boxes = places.split((1, 4), dim=1)
        pooled = torch.cat([fine.mean((2, 3)), deep.mean((2, 3))], dim=1)
        background = self.background(pooled)
        return Seen(middles[:, 0], boxes.permute(0, 2, 3, 1), background, pooled)


class Namer(nn.Module):
    """A residual network that names what is in a crop."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            _Conv(3, 48, 5, 2),
            _Bottleneck(48, 32),
            _Conv(48, 96, 3, 2),
            *[_Bottleneck(96, 64) for _ in range(2)],
            _Conv(96, 192, 3, 2),
            *[_Bottleneck(192, 96) for _ in range(3)],
        )
        self.embed = nn.Sequential(nn.Linear(2 * 192, 192), nn.BatchNorm1d(192), nn.ReLU())
        self.kinds = nn.Linear(192, len(NAMES_OF_KINDS))

    def embedding(self, crops: Tensor) -> Tensor:
        """Turn crops float [N, 3, 48, 48] of 0 … 1 into [N, 192]."""
        features = self.layers(crops * 4 - 2)
        return self.embed(torch.cat([features.mean((2, 3)), features.amax((2, 3))], dim=1))

    def forward(self, crops: Tensor) -> Tensor:
        """Return logits [N, kinds]."""
        return self.kinds(self.embedding(crops))


class Detector(nn.Module):
    """Finder and namer together."""

    def __init__(self) -> None:
        super().__init__()
        self.finder, self.namer = Finder(), Namer()

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
        state = {
            name: tensor.to("cpu", torch.float16).contiguous()
            for name, tensor in self.state_dict().items()
            if tensor.is_floating_point()
        }
        with whole_file(path) as partial:
            save_file(state, partial, {"names": json.dumps(_names())})

    @property
    def device(self) -> torch.device:
        """Return the device of the weights."""
        return self.namer.kinds.weight.device

    # ── answers ───────────────────────────────────────────────────────────────────────────────────

    @torch.inference_mode()
    def read(self, images: Tensor) -> list[Reading]:
        """Return what images uint8 [N, H, W, 3] of one size show."""
        return [reading for part in images.split(_BATCH) for reading in self._read(part)]

    @torch.inference_mode()
    def features(self, images: Tensor) -> Tensor:
        """Return features [N, P] on the CPU, for distances between sets of images.

        They are the finder's pooled features, and the namer's embedding of the whole image.
        """
        parts = []
        for some in images.split(_BATCH):
            planes = _planes(some.to(self.device))
            whole = F.interpolate(planes, (CROP, CROP), mode="bilinear", antialias=True)
            seen = [self.finder(shrunk(planes, SIDE)).pooled, self.namer.embedding(whole)]
            parts.append(torch.cat(seen, dim=1).float().cpu())
        return torch.cat(parts)

    def _read(self, images: Tensor) -> list[Reading]:
        planes = _planes(images.to(self.device))
        seen = self.finder(shrunk(planes, SIDE))
        certainty = seen.middles.sigmoid()
        peaks = certainty * (F.max_pool2d(certainty[:, None], 3, 1, 1)[:, 0] == certainty)
        scores, cells = peaks.flatten(1).topk(_CANDIDATES)
        boxes = gather(seen.boxes, cells)
        columns = seen.middles.shape[2]
        middles = torch.stack([cells % columns, cells // columns], -1) + 0.5 + boxes[..., :2]
        middles, extents = middles * CELL, boxes[..., 2:].exp2() * CELL
        self._fill_with_close_ups(planes, scores, middles, extents)
        answers = [x.cpu().numpy() for x in (scores, middles, extents)]
        kept = [_distinct(*(answer[i] for answer in answers)) for i in range(len(planes))]
        rows = torch.tensor([(i, k) for i, some in enumerate(kept) for k in some], dtype=torch.long)
        names = self._name(planes, rows.view(-1, 2).to(self.device), middles, extents)
        backgrounds = seen.background.argmax(-1).tolist()
        readings, at = [], 0
        for i, image in enumerate(images.cpu().numpy()):
            kinds = names[at : at + len(kept[i])]
            at += len(kept[i])
            values = [answer[i][kept[i]] for answer in answers]
            things = tuple(map(_found, [image] * len(kinds), kinds, *values))
            shape = (image.shape[0], image.shape[1])
            readings.append(Reading(BACKGROUNDS[backgrounds[i]], things, shape))
        return readings

    def _fill_with_close_ups(
        self, planes: Tensor, scores: Tensor, middles: Tensor, extents: Tensor
    ) -> None:
        """Make one candidate of a whole image that shows a part of a larger thing, in place."""
        best = scores.amax(1)
        rows = ((best > _CLOSE_LOW) & (best < _CLOSE_HIGH)).nonzero()[:, 0]
        if not len(rows):
            return
        unit = NATIVE / min(planes.shape[-2:])
        whole = extents.new_tensor([planes.shape[-1], planes.shape[-2]]) * unit
        box = whole.expand(len(rows), 2)
        crops = cut(shrunk(planes[rows], NATIVE // 2), box / 2, box)
        named = self.namer(crops).softmax(-1).amax(1)
        rows, named = rows[named > _CLOSE_NAMED], named[named > _CLOSE_NAMED]
        scores[rows] = 0.0
        scores[rows, 0] = named
        middles[rows, 0], extents[rows, 0] = whole / 2, whole

    def _name(self, planes: Tensor, rows: Tensor, middles: Tensor, extents: Tensor) -> list[str]:
        """Name the things of rows [R, 2]: an image's number and a candidate's."""
        if not len(rows):
            return []
        image, candidate = rows.unbind(1)
        middle, extent = middles[image, candidate], extents[image, candidate]
        crops = cut(shrunk(planes, NATIVE // 2)[image], middle, extent)
        return [NAMES_OF_KINDS[k] for k in self.namer(crops).argmax(-1).tolist()]


def _names() -> list[str]:
    return [*NAMES_OF_KINDS, *BACKGROUNDS]


def gather(grid: Tensor, cells: Tensor) -> Tensor:
    """Return what a grid [N, h, w, D] holds at cells [N, M] → [N, M, D]."""
    return grid.flatten(1, 2).gather(1, cells[..., None].expand(-1, -1, grid.shape[-1]))


def _planes(images: Tensor) -> Tensor:
    """Turn images uint8 [N, H, W, 3] into float [N, 3, H, W] of 0 … 1."""
    return images.permute(0, 3, 1, 2).float() / 255


def shrunk(images: Tensor, side: int) -> Tensor:
    """Scale images [N, 3, H, W] to a shorter side of `side` pixels, both multiples of 8."""
    height, width = images.shape[-2:]
    scale = side / min(height, width)
    size = [max(1, round(extent * scale / 8)) * 8 for extent in (height, width)]
    if size == [height, width]:
        return images
    return F.interpolate(images, size, mode="bilinear", antialias=True)


def cut(images: Tensor, middle: Tensor, extent: Tensor) -> Tensor:
    """Cut a box out of every image [R, 3, H, W] → [R, 3, 48, 48], as the namer takes them.

    middle, extent: [R, 2] in pixels of an image whose shorter side is 256. A box that reaches
    beyond the image is cut off there. Pixels outside a box are grey.
    """
    height, width = images.shape[-2:]
    unit = min(height, width) / NATIVE
    limit = extent.new_tensor([width, height])
    low = ((middle - extent / 2) * unit).clamp_min(0).minimum(limit - 1)
    high = ((middle + extent / 2) * unit).clamp_min(1).minimum(limit)
    centre, size = (low + high) / 2, (high - low).clamp_min(1)
    side = ROOM * size.amax(1)
    steps = ((torch.arange(2 * CROP, device=images.device) + 0.5) / CROP - 1) / 2
    along = centre[..., None] + side[:, None, None] * steps  # [R, axis, 96]
    places = along * 2 / limit[:, None] - 1
    n = len(steps)
    grid = torch.stack(
        [places[:, 0, None, :].expand(-1, n, -1), places[:, 1, :, None].expand(-1, -1, n)], dim=-1
    )
    crops = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    share = size / side[:, None]
    return masked(F.avg_pool2d(crops, 2), share)


def masked(crops: Tensor, share: Tensor) -> Tensor:
    """Grey out crops [R, 3, C, C] beyond boxes whose (width, height) are these shares [R, 2]."""
    steps = ((torch.arange(CROP, device=crops.device) + 0.5) / CROP * 2 - 1).abs()
    inside = steps <= (share * ROOM)[..., None]  # [R, axis, C]
    mask = inside[:, None, 1, :, None] & inside[:, None, 0, None, :]
    return torch.where(mask, crops, GREY)


# ── things ────────────────────────────────────────────────────────────────────────────────────────

Floats = npt.NDArray[np.float32]


def _distinct(scores: Floats, middles: Floats, boxes: Floats) -> list[int]:
    """Return the certain candidates that are not parts of others, the most certain first."""
    kept: list[int] = []
    for i in np.argsort(-scores).tolist():
        apart = all(overlap(middles[i], boxes[i], middles[j], boxes[j]) < _OVERLAP for j in kept)
        if scores[i] >= _SURE and apart:
            kept.append(i)
    return kept


def _found(
    image: npt.NDArray[np.uint8], kind: str, score: np.float32, middle: Floats, box: Floats
) -> Found:
    """Return the thing of a box.

    middle, box: in pixels of an image whose shorter side is 256.
    """
    height, width = image.shape[:2]
    unit = min(height, width) / NATIVE
    colour = shape_colour(image, kind, middle * unit, box * unit) if kind in SHAPES else None
    return Found(
        kind,
        colour,
        (float(middle[0] * unit / width), float(middle[1] * unit / height)),
        (float(box[0] / NATIVE), float(box[1] / NATIVE)),
        float(score),
    )


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
    image: npt.NDArray[np.uint8], shape: str, middle: Floats, box: Floats
) -> str | None:
    """Name the palette colour of the pixels that a shape of an image [H, W, 3] covers.

    middle, box: (x, y) and (width, height) in pixels. None where it covers none.
    """
    mask = _shape_masks()[SHAPES.index(shape)]
    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    mask = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    # Every pixel of the mask is looked up in the image, so that neither needs scaling.
    y, x = (
        middle[axis] + ((np.arange(extent) + 0.5) / extent - 0.5) * box[axis]
        for axis, extent in ((1, mask.shape[0]), (0, mask.shape[1]))
    )
    inside = (y >= 0) & (y < image.shape[0]), (x >= 0) & (x < image.shape[1])
    covered = _core(mask)[np.ix_(*inside)]
    if not covered.any():
        return None
    places = np.ix_(y[inside[0]].astype(int), x[inside[1]].astype(int))
    return nearest(np.median(image[places][covered], axis=0))


def _core(mask: Floats) -> npt.NDArray[np.bool_]:
    """Return where a mask [h, w] is solid for three pixels around: a blurred edge has no colour."""
    padded = np.pad(mask > 0.9, 3)
    h, w = mask.shape
    shifts = ((3, 0), (3, 6), (0, 3), (6, 3), (3, 3))
    return np.logical_and.reduce([padded[y : y + h, x : x + w] for y, x in shifts])
