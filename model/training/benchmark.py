"""Compute PaellaBench: the share of images that show what their prompts say, by category.

After GenEval and DrawBench, in the world of `scenes.py`. A category has prompts of its own
(`prompts.py`), each drawn with a few seeds of its own; a judge reads the images and `checker.check`
compares its reading with the prompt's scene. A category's score is the share of images that fulfil
its criterion, with a 95 % interval by bootstrap over prompts; PaellaBench is the mean of all
categories, each with the same weight.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from model.config import BundleConfig, SamplingConfig
from model.pipeline import Pipeline
from model.training import prompts
from model.training.checker import Judge, Reading, Verdict, check
from model.training.corpus import layouts
from model.training.prompts import BenchPrompt
from model.training.render import Layouts, render
from model.training.scenes import Aspect, Scene

SEEDS = 4
FRESH = range(100, 116)  # for kinds of which at most two in four images were right
CONTROL = "seen_combinations"  # beside unseen_combinations; not in the mean
_RESAMPLES = 2000
_BATCH = 16
_KID_SUBSETS, _KID_SIZE = 50, 500

Bools = npt.NDArray[np.bool_]
Criterion = Callable[[Verdict, Scene], bool]


def _kinds(verdict: Verdict, scene: Scene) -> bool:
    return verdict.kinds


def _counted(verdict: Verdict, scene: Scene) -> bool:
    return verdict.kinds and verdict.count


def _attribution(verdict: Verdict, scene: Scene) -> bool:
    return verdict.attribution


def _colours(verdict: Verdict, scene: Scene) -> bool:
    return verdict.colours


def _positions(verdict: Verdict, scene: Scene) -> bool:
    return verdict.positions


def _background(verdict: Verdict, scene: Scene) -> bool:
    return verdict.background


def _combined(verdict: Verdict, scene: Scene) -> bool:
    return verdict.attribution and verdict.background


def _things(verdict: Verdict, scene: Scene) -> bool:
    """Judge the things, and their number where the scene has several of one kind."""
    several = any(thing.count > 1 for thing in scene.things)
    return verdict.attribution and (verdict.count or not several)


CRITERIA: dict[str, Criterion] = {
    "single_object": _kinds,
    "shape_colour": _attribution,
    "two_objects": _kinds,
    "counting": _counted,
    "position": _positions,
    "colour_attribution": _attribution,
    "background_scene": _background,
    "synonyms_misspellings": _kinds,
    "descriptions": _kinds,
    "unseen_combinations": _combined,
    "close_up": _kinds,
    "three_two": _things,
    CONTROL: _combined,
}
# Further figures of a category: (its name, the category, the criterion).
_MORE: tuple[tuple[str, str, Criterion], ...] = (
    ("shape", "shape_colour", _kinds),
    ("shape's colour", "shape_colour", _colours),
)


def categories(set_name: str, most: int | None = None) -> dict[str, list[BenchPrompt]]:
    """Return a set's prompts by category and the control's.

    most: the largest number of each; None for all of them. Raises KeyError for an unknown set.
    """
    found = {**prompts.bench(set_name), CONTROL: prompts.seen_combinations(set_name)}
    # Every k-th of a category, since some list shape by shape.
    return {name: cases[:: _stride(len(cases), most)][:most] for name, cases in found.items()}


def _stride(count: int, most: int | None) -> int:
    return max(1, count // most) if most else 1


# ── images ──────────────────────────────────────────────────────────────────────────────────────


class Source(Protocol):
    """Make images of prompts."""

    def images(self, cases: Sequence[BenchPrompt], seeds: Sequence[int]) -> Tensor:
        """Return uint8 [N, H, W, 3] on the CPU, one per case and seed; all cases of one aspect."""


@dataclass(frozen=True)
class Drawn:
    """The images of a bundle."""

    pipeline: Pipeline
    sampling: SamplingConfig

    def images(self, cases: Sequence[BenchPrompt], seeds: Sequence[int]) -> Tensor:
        """Return one image per case and seed, drawn by the bundle's pipeline; see `Source`."""
        width, height = size_of(cases[0].scene.aspect, self.pipeline.config)
        texts = [case.text for case in cases]
        own = [seed_of(text, number) for text, number in zip(texts, seeds, strict=True)]
        return self.pipeline.generate(texts, own, self.sampling, width=width, height=height)


def seed_of(prompt: str, number: int) -> int:
    """Return the seed of a prompt's image of this number, different for every prompt.

    All images of a seed begin with the same tokens. If all prompts shared a seed, one that suits
    the network, or does not, would count for all of them at once.
    """
    return zlib.crc32(prompt.encode()) * 2**16 + number


def size_of(aspect: Aspect, config: BundleConfig) -> Aspect:
    """Return the (width, height) in which a bundle of any native size draws an aspect."""
    unit = min(config.native_size) / 256
    step = config.size_step
    width, height = (max(step, round(side * unit / step) * step) for side in aspect)
    return width, height


@dataclass(frozen=True)
class Rendered:
    """The scenes themselves, and what a VQGAN makes of them where there is one."""

    atlas: Tensor
    pipeline: Pipeline | None = None

    def images(self, cases: Sequence[BenchPrompt], seeds: Sequence[int]) -> Tensor:
        """Return true renders, through the VQGAN if there is one; see `Source`."""
        images = rendered([case.scene for case in cases], seeds, self.atlas)
        if self.pipeline is not None:
            return self.pipeline.decode(self.pipeline.encode_images(images))
        return images


def rendered(
    scenes: Sequence[Scene], seeds: Sequence[int], atlas: Tensor, size: Aspect | None = None
) -> Tensor:
    """Return the scenes as they are meant, uint8 [N, H, W, 3] on the CPU; all of one aspect.

    Things lie on the lattice of tokens; seeds choose among places and backgrounds. size: (width,
    height), by default the aspect.
    """
    parts = [layouts([scene], seed) for scene, seed in zip(scenes, seeds, strict=True)]
    rows = Layouts.cat(parts).to(atlas.device)
    aspect = scenes[0].aspect
    size = size or aspect
    scale = size[0] / aspect[0]
    rows = replace(rows, centre=rows.centre * scale, length=rows.length * scale)
    return render(rows, atlas, *size).permute(0, 2, 3, 1).contiguous().cpu()


@dataclass(frozen=True)
class Sheet:
    """The judges' readings of a category's images, of N prompts and S seeds.

    readings: by judge, [N][S]. features: [N, P] of the first seed's images.
    """

    cases: Sequence[BenchPrompt]
    readings: Mapping[str, list[list[Reading]]]
    features: Tensor


class Featured(Judge, Protocol):
    """A judge that also has features for distances between sets of images."""

    def features(self, images: Tensor) -> Tensor:
        """Return features [N, P] on the CPU of images uint8 [N, H, W, 3]."""


def judged(
    source: Source,
    cases: Sequence[BenchPrompt],
    seeds: Sequence[int],
    first: Featured,
    second: Judge | None = None,
    *,
    second_seeds: int = 1,
    progress: Callable[[int], object] = lambda images: None,
) -> Sheet:
    """Make and read images of a category; the second judge reads those of the first few seeds."""
    ones: list[list[Reading]] = [[] for _ in cases]
    others: list[list[Reading]] = [[] for _ in cases]
    features = list[Tensor]([torch.empty(0)] * len(cases))
    for rows in _batches(cases, seeds):
        made = source.images([cases[i] for i, _ in rows], [seed for _, seed in rows])
        for (i, _), reading in zip(rows, first.read(made), strict=True):
            ones[i].append(reading)
        lead = [k for k, (_, seed) in enumerate(rows) if seed == seeds[0]]
        if lead:
            for k, feature in zip(lead, first.features(made[lead]), strict=True):
                features[rows[k][0]] = feature
        late = [k for k, (_, seed) in enumerate(rows) if seed in seeds[:second_seeds]]
        if second is not None and late:
            for k, reading in zip(late, second.read(made[late]), strict=True):
                others[rows[k][0]].append(reading)
        progress(len(rows))
    readings = {"detector": ones} | ({"templates": others} if second is not None else {})
    return Sheet(cases, readings, torch.stack(features))


def _batches(cases: Sequence[BenchPrompt], seeds: Sequence[int]) -> Iterator[list[tuple[int, int]]]:
    """Yield (case's number, seed) in batches of one aspect, one case's seeds beside each other."""
    aspects = [case.scene.aspect for case in cases]
    for aspect in dict.fromkeys(aspects):
        members = [i for i, other in enumerate(aspects) if other == aspect]
        rows = list(product(members, seeds))
        yield from (rows[i : i + _BATCH] for i in range(0, len(rows), _BATCH))


# ── figures ───────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Figure:
    """A share of right images with its 95 % interval. best: of prompts with any right image."""

    n: int
    seeds: int
    mean: float
    low: float
    high: float
    best: float

    @classmethod
    def of(cls, hits: Bools) -> Figure:
        """Return the figure of hits [prompts, seeds]. Raises ValueError without prompts."""
        if not len(hits):
            raise ValueError("no prompts, no figure")
        low, high = bootstrap(hits.mean(1))
        n, seeds = hits.shape
        return cls(n, seeds, float(hits.mean()), low, high, float(hits.any(1).mean()))

    def as_dict(self) -> dict[str, float | int]:
        """Return plain values for JSON, the shares with four digits."""
        shares = {"score": self.mean, "low": self.low, "high": self.high, "best_of": self.best}
        rounded = {name: round(share, 4) for name, share in shares.items()}
        return {"prompts": self.n, "seeds": self.seeds, **rounded}


def bootstrap(means: npt.NDArray[np.floating], seed: int = 0) -> tuple[float, float]:
    """Return the 95 % interval of the mean of prompts' means [N], resampling prompts."""
    rng = np.random.default_rng(seed)
    drawn = means[rng.integers(0, len(means), (_RESAMPLES, len(means)))].mean(1)
    low, high = np.quantile(drawn, (0.025, 0.975))
    return float(low), float(high)


def verdicts(sheet: Sheet, judge: str, shift: int = 0) -> list[list[Verdict]]:
    """Return each image's verdict [N][S].

    shift: compare with the scene of the prompt so much further on: the shuffled prompts.
    """
    scenes = [case.scene for case in sheet.cases]
    return [
        [check(reading, scenes[(i + shift) % len(scenes)]) for reading in row]
        for i, row in enumerate(sheet.readings[judge])
    ]


def hits(sheet: Sheet, judge: str, criterion: Criterion, shift: int = 0) -> Bools:
    """Return which images fulfil a criterion, [prompts, seeds]."""
    scenes = [case.scene for case in sheet.cases]
    rows = [
        [criterion(verdict, scenes[(i + shift) % len(scenes)]) for verdict in row]
        for i, row in enumerate(verdicts(sheet, judge, shift))
    ]
    return np.array(rows, dtype=np.bool_)


def figures(sheets: Mapping[str, Sheet], judge: str, shift: int = 0) -> dict[str, Figure]:
    """Return every category's figure by one judge; those it read nothing of are left out."""
    return {
        name: Figure.of(hits(sheet, judge, CRITERIA[name], shift))
        for name, sheet in sheets.items()
        if judge in sheet.readings
    }


def more_figures(sheets: Mapping[str, Sheet], judge: str) -> dict[str, Figure]:
    """Return figures beside the categories': parts of them, and whole scenes of all categories."""
    parts = {
        name: Figure.of(hits(sheets[category], judge, criterion))
        for name, category, criterion in _MORE
        if category in sheets
    }
    whole = [hits(s, judge, lambda verdict, _: verdict.all)[:, :1] for s in sheets.values()]
    return parts | {"whole scene": Figure.of(np.concatenate(whole))}


def mean(by_category: Mapping[str, Figure]) -> float:
    """Return PaellaBench: the categories' mean, the control left out. NaN without any."""
    scores = [figure.mean for name, figure in by_category.items() if name != CONTROL]
    return float(np.mean(scores)) if scores else float("nan")


def best_mean(by_category: Mapping[str, Figure]) -> float:
    """Return the mean of the best-of shares; see `mean`."""
    scores = [figure.best for name, figure in by_category.items() if name != CONTROL]
    return float(np.mean(scores)) if scores else float("nan")


def weak_kinds(sheet: Sheet, judge: str = "detector") -> list[BenchPrompt]:
    """Return the prompts of single_object with at most half of their images right."""
    right = hits(sheet, judge, _kinds).mean(1)
    return [case for case, share in zip(sheet.cases, right, strict=True) if share <= 0.5]


def kid(one: Tensor, other: Tensor, seed: int = 0) -> tuple[float, float]:
    """Return the kernel inception distance of two sets of features [N, P], times 1,000, ± its std.

    The unbiased squared MMD with the kernel (x·y / P + 1)³, over random subsets; the features are
    the first judge's, standardised by the second set's.
    """
    centre, spread = other.mean(0), other.std(0).clamp_min(1e-6)
    one, other = (one - centre) / spread, (other - centre) / spread
    size = min(_KID_SIZE, len(one), len(other))
    rng = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(_KID_SUBSETS):
        x, y = (z[torch.randperm(len(z), generator=rng)[:size]].double() for z in (one, other))
        cross = _kernel(x, y).mean()
        own = [(k.sum() - k.diagonal().sum()) / (size * (size - 1)) for k in map(_kernel, (x, y))]
        values.append(float(own[0] + own[1] - 2 * cross))
    return 1000 * float(np.mean(values)), 1000 * float(np.std(values))


def _kernel(x: Tensor, y: Tensor | None = None) -> Tensor:
    return (x @ (x if y is None else y).T / x.shape[1] + 1) ** 3
