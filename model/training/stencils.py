"""Tokens of things on plain backgrounds, encoded once and laid wherever a scene has them.

A VQGAN sees a few tokens around each of its own, so the tokens of a thing on a plain background do
not depend on where on the lattice it lies, but for the last bit. Encoding takes longer than a
training step of the same image; laying known tokens takes nothing. So a denoiser can see each scene
once or twice instead of a few scenes often, which it would learn by heart. Things that lie near
each other get the tokens they have alone.

    python -m model.training.stencils OUT --vqgan runs/vqgan.pt

Letters: S stencils, h w the grid of an image.
"""

from __future__ import annotations

import argparse
import multiprocessing
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from model.networks.vqgan_v3 import VQGAN
from model.training import art, command
from model.training.arguments import COUNT
from model.training.data import as_float
from model.training.kinds import NAMES_OF_KINDS, SHAPES
from model.training.palette import COLOURS, NAMES
from model.training.render import Layouts, render
from model.training.scene_layout import LONE_LENGTHS, PAIR_LENGTHS
from model.training.scenery import BACKGROUNDS
from model.training.scenes import SQUARE, TOKEN, backgrounds, object_named
from model.training.vqgan import trained_vqgan
from model.whole_file import check_place, whole_file

_AT_ONCE = 32  # images
_GROUPS = 8  # things that a process encodes at a time
_NO_TINT = (255, 255, 255)
Colour = tuple[int, int, int]
Key = tuple[int, float, int, Colour]  # sprite, length, background, tint
Look = tuple[int, float, Colour]  # a key without its background


@dataclass(frozen=True)
class Stencils:
    """Known tokens. keys: [S, 6], a `Key` a row. tokens: int16 [S, h, w], the thing in the middle.

    plain: int16 [P, h, w], the tokens of each plain background without a thing. Those at an
    image's border are others than those in its middle, and must not be laid elsewhere.
    """

    keys: Tensor
    tokens: Tensor
    plain: Tensor

    @cached_property
    def _numbers(self) -> dict[Key, int]:
        """Return the row of each key."""
        rows = self.keys.tolist()
        return {(s, n, b, (r, g, k)): i for i, (s, n, b, r, g, k) in enumerate(rows)}

    @classmethod
    def load(cls, path: Path) -> Stencils:
        """Return those of a file.

        Raises FileNotFoundError without it, and ValueError for another kind of file.
        """
        if not path.is_file():
            raise FileNotFoundError(f"no stencils {path}: model.training.stencils writes them")
        try:
            return cls(**load_file(path))
        except (SafetensorError, TypeError) as error:
            raise ValueError(f"{path} has no stencils ({error})") from None

    def save(self, path: Path) -> None:
        """Write them to a safetensors file."""
        with whole_file(path) as partial:
            save_file({"keys": self.keys, "tokens": self.tokens, "plain": self.plain}, partial)

    @cached_property
    def _covered(self) -> dict[Look, Tensor]:
        """Return the tokens [h, w] that a look has before all its backgrounds, −1 elsewhere."""
        rows = defaultdict[Look, list[int]](list)
        for (sprite, length, _, tint), row in self._numbers.items():
            rows[sprite, length, tint].append(row)
        found = {}
        for look, numbers in rows.items():
            own = self.tokens[numbers]
            empty = self.plain[int(self.keys[numbers[0], 2])]
            # Of one background alone nothing tells what the thing covers.
            same = (own == own[0]).all(0) if len(own) > 1 else torch.zeros_like(own[0]).bool()
            found[look] = torch.where(same & (own[0] != empty), own[0], -1)
        return found

    def lay(self, layouts: Layouts, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Return (the tokens [N, height, width] of layouts, which of them are known [N]).

        height, width: in tokens. Known are layouts on plain backgrounds whose sprites all lie
        upright on the lattice and have a stencil.
        """
        background = layouts.background.long()
        known = background < len(self.plain)
        rows, columns = (
            _stretched(old, new)
            for old, new in zip(self.plain.shape[1:], (height, width), strict=True)
        )
        empty = self.plain[:, rows][:, :, columns].long()
        tokens = empty[background.clamp(max=len(self.plain) - 1)]
        for row in known.nonzero()[:, 0].tolist():
            behind = int(background[row])
            for spot in _spots(layouts, row):
                number = None if spot is None else self._numbers.get(spot.before(behind))
                if spot is None or number is None:
                    known[row] = False
                    break
                stencil = self.tokens[number]
                _put(tokens[row], stencil.long(), spot, stencil != self.plain[behind])
        return tokens, known

    def settle(self, layouts: Layouts, tokens: Tensor) -> None:
        """Give encoded tokens [N, h, w] of layouts those that things have before all backgrounds.

        It changes what is wholly covered by an upright sprite on the lattice that has stencils.
        """
        for row in range(len(layouts)):
            spots = _spots(layouts, row)
            if None in spots:
                continue  # that sprite may lie over another
            for spot in spots:
                if spot is not None and spot.look in self._covered:
                    covered = self._covered[spot.look].long()
                    _put(tokens[row], covered, spot, covered >= 0)


class _Spot(NamedTuple):
    """A thing's look, and its middle on the lattice, in tokens."""

    look: Look
    x: int
    y: int

    def before(self, background: int) -> Key:
        """Return the key of the look before a background."""
        sprite, length, tint = self.look
        return sprite, length, background, tint


def _spots(layouts: Layouts, row: int) -> list[_Spot | None]:
    """Return where a layout's sprites lie; None for one that is turned or off the lattice."""
    found: list[_Spot | None] = []
    for slot in (layouts.sprite[row] >= 0).nonzero()[:, 0].tolist():
        sprite, length = int(layouts.sprite[row, slot]), float(layouts.length[row, slot])
        tint = _NO_TINT
        if sprite < len(SHAPES):
            red, green, blue = layouts.tint[row, slot].tolist()
            tint = red, green, blue
        x, y = (layouts.centre[row, slot] / TOKEN).tolist()
        turned = bool(layouts.mirror[row, slot]) or bool(layouts.angle[row, slot])
        upright = not turned and x == int(x) and y == int(y)
        found.append(_Spot((sprite, length, tint), int(x), int(y)) if upright else None)
    return found


def _put(grid: Tensor, stencil: Tensor, spot: _Spot, chosen: Tensor) -> None:
    """Put a stencil's chosen tokens on the grid, as far as they lie within it."""
    top, left = spot.y - stencil.shape[0] // 2, spot.x - stencil.shape[1] // 2
    within = (
        slice(max(0, -top), max(0, grid.shape[0] - top)),
        slice(max(0, -left), max(0, grid.shape[1] - left)),
    )
    part = stencil[within]
    below = grid[max(0, top) :, max(0, left) :][: part.shape[0], : part.shape[1]]
    below[chosen[within]] = part[chosen[within]]


def _stretched(length: int, wanted: int) -> Tensor:
    """Return `wanted` of the places 0 … length − 1, the middle one repeated."""
    half = length // 2
    middle = torch.full((wanted - length,), half)
    return torch.cat([torch.arange(half), middle, torch.arange(half, length)])


def _layouts(things: Iterable[Key]) -> Layouts:
    """Return layouts with one sprite each in the middle of a square image."""
    things = list(things)
    layouts = Layouts.blank(len(things))
    for row, (sprite, length, background, tint) in enumerate(things):
        layouts.background[row] = background
        layouts.sprite[row, 0] = sprite
        layouts.length[row, 0] = length
        layouts.centre[row, 0] = torch.tensor([SQUARE[0] / 2, SQUARE[1] / 2])
        layouts.tint[row, 0] = torch.tensor(tint, dtype=torch.uint8)
    return layouts


def groups(lengths: Iterable[int]) -> list[list[Key]]:
    """Return the keys of all things in these lengths, one list for each thing and length.

    A list has the plain backgrounds that training shows the thing before.
    """
    found: list[list[Key]] = []
    for length in lengths:
        for number, name in enumerate(NAMES_OF_KINDS):
            if number >= len(SHAPES):
                looks = [(object_named(name).colour, _NO_TINT)]
            else:
                looks = [(colour, COLOURS[colour]) for colour in NAMES]
            for colour, tint in looks:
                behind = [BACKGROUNDS.index(b) for b in backgrounds(name, colour) if b in NAMES]
                if behind:
                    found.append([(number, length, b, tint) for b in behind])
    return found


@torch.no_grad()
def stencils_of(
    vqgan: VQGAN, atlas: Tensor, keys: list[list[Key]], spread: float = 0.6
) -> Stencils:
    """Return the tokens of things before each of their backgrounds.

    A token that the thing covers wholly is the same before all of them: the code nearest to the
    mean of its latents, unless they lie further than `spread` from it. What lies a few tokens away
    moves them a little, and which of two near codes is nearer would depend on that.
    """
    tokens = []
    for group in keys:
        layouts = _layouts(group)
        latents = torch.cat(
            [
                vqgan.encode_latents(as_float(render(part, atlas, *SQUARE), atlas.device))
                for part in (layouts[i : i + _AT_ONCE] for i in range(0, len(layouts), _AT_ONCE))
            ]
        ).float()
        own = vqgan.vquantizer.nearest(latents)
        mean = latents.mean(0)
        same = vqgan.vquantizer.nearest(mean)
        cover = render(layouts[:1], atlas, *SQUARE, sprites_only=True)[0, 3]
        whole = cover.view(SQUARE[1] // TOKEN, TOKEN, -1, TOKEN).amin((1, 3)) >= 250
        near = (latents - mean).norm(dim=-1).amax(0) < spread
        tokens.append(torch.where(whole & near, same, own).to(torch.int16))
    blank = Layouts.blank(len(NAMES))
    blank.background[:] = torch.arange(len(NAMES))
    plain = vqgan.encode(as_float(render(blank, atlas, *SQUARE), atlas.device))
    rows = torch.tensor([(s, n, b, *tint) for group in keys for s, n, b, tint in group])
    return Stencils(rows, torch.cat(tokens), plain.to(torch.int16))


_worker: tuple[VQGAN, Tensor] | None = None


def _begin(path: Path) -> None:
    """Load what a process needs for its groups."""
    global _worker
    torch.set_num_threads(1)
    _worker = trained_vqgan(path).vqgan.eval().requires_grad_(False), art.atlas()


def _encoded(keys: list[list[Key]]) -> Stencils:
    assert _worker is not None
    return stencils_of(*_worker, keys)


def main() -> None:
    """Encode the usual lengths as the command line says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="the safetensors file to write")
    parser.add_argument("--vqgan", type=Path, required=True, help="a VQGAN's checkpoint or weights")
    parser.add_argument(
        "--processes",
        type=COUNT,
        default=multiprocessing.cpu_count(),
        help="how many encode at once (default one for each core, %(default)s)",
    )
    options = parser.parse_args()
    check_place(options.out)
    # What every process will read; there an error would only break the pool.
    trained_vqgan(options.vqgan)
    art.art_file()
    keys = groups((LONE_LENGTHS["normal"], PAIR_LENGTHS["normal"], LONE_LENGTHS["large"]))
    chunks = [keys[i : i + _GROUPS] for i in range(0, len(keys), _GROUPS)]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        options.processes, mp_context=context, initializer=_begin, initargs=(options.vqgan,)
    ) as pool:
        parts = list(tqdm(pool.map(_encoded, chunks), total=len(chunks)))
    stencils = Stencils(
        torch.cat([part.keys for part in parts]),
        torch.cat([part.tokens for part in parts]),
        parts[0].plain,
    )
    stencils.save(options.out)
    print(f"{len(stencils.keys)} stencils of {len(keys)} things")


if __name__ == "__main__":
    command.run(main)
