"""Find the regions of images that are unlike their backgrounds, and those that may be one thing.

    unlike = difference(images, backgrounds, painted)  # ΔE [N, H, W]
    labels = regions(unlike[0].numpy())  # the numbers of regions [H, W]
    groups = list(candidates(0, labels))  # regions alone, and near ones together
    things = partition(groups, left, energy)  # those that explain the image best

The geometry of the second judge (`templates.py`), which compares the groups with its templates.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from scipy import ndimage  # type: ignore[import-untyped]
from torch import Tensor

from model.training.backdrops import lab

SIDE = 128  # pixels of the shorter side, as the second judge sees images
# ΔE from which a pixel is a thing's, and its growth with the background's error: see `regions`.
_UNLIKE, _NOISE = 10.0, 3.0
_UNLIKE_MOST = 20.0
_ROUGH = 1.5  # median ΔE from which specks of background are cleared away
_SPECK = 0.0015  # share of a square image below which a region is nothing
LEAST = 0.008  # … below which it is no thing, but perhaps a part of one
PARTS = 6  # regions of an image that are looked at
_NEAR = 14.0  # pixels between the parts of one thing, at most
_ANOTHER = 0.04  # share of the image's contrast that a thing more must explain
_BEYOND = 0.06  # share of an edge covered by a thing that goes beyond it

Labels = npt.NDArray[np.int32]
Box = tuple[int, int, int, int]


class Group(NamedTuple):
    """Regions of an image that may be one thing: the image's number, theirs, and their box.

    box: (left, top, right, bottom) in pixels. area: pixels.
    """

    image: int
    regions: tuple[int, ...]
    box: Box
    area: int

    @property
    def side(self) -> int:
        """Return the box's longer side in pixels."""
        return max(self.box[2] - self.box[0], self.box[3] - self.box[1])


def difference(images: Tensor, behind: Tensor, painted: Tensor) -> Tensor:
    """Return the smoothed ΔE [N, H, W] between images and backgrounds [N, 3, H, W].

    painted: [N], where the background has details of its own; these are blurred away beforehand.
    """
    blur = painted[:, None, None, None]
    one, other = (torch.where(blur, smooth(smooth(x)), x) for x in (images, behind))
    return smooth((lab(one) - lab(other)).square().sum(1).sqrt())


def regions(unlike: npt.NDArray[np.float32]) -> Labels:
    """Return the regions' numbers [H, W] of ΔE above a threshold, 1 the largest; 0 elsewhere.

    The threshold grows with the median, which is the background's: it is not drawn exactly.
    """
    noise = float(np.median(unlike))
    mask = unlike > min(_UNLIKE + _NOISE * noise, _UNLIKE_MOST)
    if noise > _ROUGH:
        mask = ndimage.binary_opening(mask)
    labels, count = ndimage.label(mask)
    areas = np.bincount(labels.ravel(), minlength=count + 1)
    areas[0] = 0
    largest = [i for i in np.argsort(-areas)[:PARTS] if areas[i] >= _SPECK * SIDE**2]
    order = np.zeros(count + 1, dtype=np.int32)
    order[largest] = np.arange(1, len(largest) + 1)
    return np.asarray(order[labels], dtype=np.int32)


def cropped(labels: Labels) -> bool:
    """Return whether things [H, W] go beyond the image on two sides at least."""
    mask = labels > 0
    edges = (mask[0], mask[-1], mask[:, 0], mask[:, -1])
    return sum(float(edge.mean()) > _BEYOND for edge in edges) >= 2


def candidates(image: int, labels: Labels) -> Iterator[Group]:
    """Return every region as a group, and those near to each other also together."""
    boxes = [
        (x.start, y.start, x.stop, y.stop) for y, x in ndimage.find_objects(labels) if y is not None
    ]
    areas = np.bincount(labels.ravel())
    for size in range(1, len(boxes) + 1):
        for members in combinations(range(len(boxes)), size):
            if size == 1 or _connected([boxes[i] for i in members]):
                corners = np.array([boxes[i] for i in members])
                low, high = corners[:, :2].min(0), corners[:, 2:].max(0)
                box = (int(low[0]), int(low[1]), int(high[0]), int(high[1]))
                numbers = tuple(i + 1 for i in members)
                yield Group(image, numbers, box, int(areas[list(numbers)].sum()))


def _connected(boxes: Sequence[Box]) -> bool:
    """Return whether each box can be reached from the first by steps between near boxes."""
    reached, rest = [boxes[0]], list(boxes[1:])
    while near := [box for box in rest if any(_gap(box, other) <= _NEAR for other in reached)]:
        reached += near
        rest = [box for box in rest if box not in near]
    return not rest


def _gap(one: Box, other: Box) -> float:
    """Return the pixels between two boxes, 0 where they overlap."""
    across = max(0, other[0] - one[2], one[0] - other[2])
    down = max(0, other[1] - one[3], one[1] - other[3])
    return max(across, down)


def partition(
    groups: Sequence[Group], left: Sequence[float], energy: Sequence[float]
) -> list[Group]:
    """Return those groups of one image, no region in two of them, that leave least over.

    left, energy: what each group's best template leaves over, and of how much. A thing more must
    explain a share of it all.
    """
    singles = [i for i, group in enumerate(groups) if len(group.regions) == 1]
    price = _ANOTHER * sum(energy[i] for i in singles)

    def best(rest: frozenset[int]) -> tuple[float, list[Group]]:
        if not rest:
            return 0.0, []
        first = min(rest)
        options = []
        for i, group in enumerate(groups):
            if first in group.regions and rest.issuperset(group.regions):
                cost, others = best(rest - set(group.regions))
                options.append((cost + left[i] + price, [group, *others]))
        return min(options, key=lambda option: option[0])

    return best(frozenset(groups[i].regions[0] for i in singles))[1]


def smooth(planes: Tensor) -> Tensor:
    """Blur planes [..., H, W]: a judge must not expect details that no decoder draws."""
    flat = planes.flatten(0, -3)
    return F.avg_pool2d(flat, 3, 1, 1, count_include_pad=False).view_as(planes)
