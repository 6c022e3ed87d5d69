"""Tokens of things on plain backgrounds: laid where a scene has them, and encoded where they are
not known."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from model.networks.vqgan_v3 import VQGAN
from model.training import art, stencils
from model.training.features import Pool
from model.training.kinds import NAMES_OF_KINDS, SHAPES
from model.training.render import Layouts, render
from model.training.scenery import BACKGROUNDS
from model.training.stencils import Key, Stencils
from tests.conftest import randomise
from tests.support.small_training import small_config

SQUARE, STAR = SHAPES.index("square"), SHAPES.index("star")
WHITE, BLUE = BACKGROUNDS.index("white"), BACKGROUNDS.index("blue")
SEA = BACKGROUNDS.index("sea")
RED = (220, 30, 35)


def key(sprite: int, length: int, background: int) -> Key:
    return sprite, length, background, RED


KEYS = [[key(s, n, WHITE), key(s, n, BLUE)] for s in (SQUARE, STAR) for n in (96, 128)]


@pytest.fixture(scope="module")
def network() -> VQGAN:
    torch.manual_seed(3)
    network = VQGAN(small_config().vqgan).eval().requires_grad_(False)
    randomise(network)
    return network


@pytest.fixture(scope="module")
def known(network: VQGAN) -> Stencils:
    return stencils.stencils_of(network, art.shapes(), KEYS, spread=100.0)


def one(sprite: int, length: int, background: int, x: float = 128, y: float = 128) -> Layouts:
    layouts = stencils._layouts([key(sprite, length, background)])
    layouts.centre[0, 0] = torch.tensor([x, y])
    return layouts


def test_a_thing_in_the_middle_has_its_stencil(known: Stencils) -> None:
    tokens, laid = known.lay(one(STAR, 96, BLUE), 16, 16)
    assert laid.tolist() == [True]
    row = known.keys.tolist().index([STAR, 96, BLUE, *RED])
    assert torch.equal(tokens[0], known.tokens[row].long())


def by_hand(backgrounds: tuple[int, ...]) -> Stencils:
    """Return stencils of a square, with tokens of their own at the border of every image.

    Covered tokens are 7 and 8, the outline is 100 + the background, the background 20 + its number,
    at the border 50 + its number.
    """
    plain = (torch.arange(12) + 20)[:, None, None].repeat(1, 16, 16)
    plain[:, [0, -1]] += 30
    plain[:, 1:-1, [0, -1]] += 30
    plain = plain.to(torch.int16)
    grids = plain[list(backgrounds)].clone()
    for grid, background in zip(grids, backgrounds, strict=True):
        grid[4:12, 4:12] = 100 + background
        grid[5:11, 5:8], grid[5:11, 8:11] = 7, 8
    keys = torch.tensor([[SQUARE, 96, background, *RED] for background in backgrounds])
    return Stencils(keys, grids, plain)


def expected(*lefts: int, top: int = 4, width: int = 16, background: int = BLUE) -> Tensor:
    """Return the tokens of an image with squares of `by_hand` at these columns."""
    image = torch.full((16, width), 20 + background)
    image[[0, -1]] += 30
    image[1:-1, [0, -1]] += 30
    for left in lefts:
        thing = by_hand((background,)).tokens[0, 4:12, 4:12].long()[:, max(0, -left) :]
        image[top : top + 8, max(0, left) : left + 8] = thing[:, : width - left]
    return image


def test_what_is_laid_elsewhere_is_the_thing_moved_and_cut_at_the_border() -> None:
    known = by_hand((WHITE, BLUE))
    for x, y, width in (
        (128, 128, 16),
        (64, 160, 16),
        (16, 128, 16),
        (240, 96, 16),
        (256, 128, 24),
    ):
        tokens, laid = known.lay(one(SQUARE, 96, BLUE, x, y), 16, width)
        assert laid.all()
        place = expected(x // 16 - 4, top=y // 16 - 4, width=width)
        assert torch.equal(tokens[0], place), (x, y)


def test_a_thing_s_own_border_is_not_laid_over_another_thing() -> None:
    layouts = one(SQUARE, 96, BLUE, 64)
    layouts.sprite[0, 1], layouts.length[0, 1] = SQUARE, 96
    layouts.centre[0, 1] = torch.tensor([192.0, 128.0])
    layouts.tint[0, 1] = torch.tensor(RED, dtype=torch.uint8)
    tokens, laid = by_hand((WHITE, BLUE)).lay(layouts, 16, 16)
    assert laid.all()
    assert torch.equal(tokens[0], expected(0, 8))


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.mirror.fill_(True),
        lambda x: x.angle.fill_(3.0),
        lambda x: x.centre.add_(3.0),
        lambda x: x.length.fill_(100.0),
        lambda x: x.tint.fill_(9),
        lambda x: x.background.fill_(SEA),
    ],
    ids=["mirrored", "turned", "off the lattice", "length", "colour", "painted"],
)
def test_nothing_else_is_known(known: Stencils, change: object) -> None:
    layouts = one(STAR, 96, WHITE)
    change(layouts)  # type: ignore[operator]
    assert known.lay(layouts, 16, 16)[1].tolist() == [False]


def test_a_token_that_the_thing_covers_is_the_same_before_all_backgrounds(
    known: Stencils, network: VQGAN
) -> None:
    white, blue = known.tokens[:2]
    whole = slice(5, 11)  # tokens of the square of 96 pixels
    assert torch.equal(white[whole, whole], blue[whole, whole])
    assert not torch.equal(white, blue)
    apart = stencils.stencils_of(network, art.shapes(), KEYS[:1], spread=0.0)
    image = render(one(SQUARE, 96, BLUE), art.shapes()).float() / 255
    assert torch.equal(apart.tokens[1].long(), network.encode(image)[0])


def settled(known: Stencils, layouts: Layouts, width: int = 16) -> Tensor:
    tokens = torch.full((1, 16, width), -5)
    known.settle(layouts, tokens)
    return tokens[0]


def test_encoded_scenes_take_over_what_is_the_same_before_all_backgrounds() -> None:
    known = by_hand((WHITE, BLUE))
    tokens = settled(known, one(SQUARE, 96, SEA, 128 - 64), width=24)
    covered = torch.full((16, 24), -5)
    covered[5:11, 1:4], covered[5:11, 4:7] = 7, 8
    assert torch.equal(tokens, covered)
    cut = settled(known, one(SQUARE, 96, SEA, 16, 128))
    assert torch.equal(cut[5:11, :4], torch.tensor([7, 8, 8, 8]).expand(6, 4))
    assert (cut[:, 4:] == -5).all()


@pytest.mark.parametrize("change", ["mirror", "angle", "centre", "tint"])
def test_encoded_scenes_keep_their_own_tokens_where_a_sprite_is_another(change: str) -> None:
    layouts = one(SQUARE, 96, SEA)
    getattr(layouts, change)[0, 0] = 1
    assert (settled(by_hand((WHITE, BLUE)), layouts) == -5).all()


def test_one_background_alone_does_not_tell_what_a_thing_covers() -> None:
    assert (settled(by_hand((WHITE,)), one(SQUARE, 96, SEA)) == -5).all()


def test_they_are_the_same_after_a_file(known: Stencils, tmp_path: Path) -> None:
    known.save(tmp_path / "s.safetensors")
    again = Stencils.load(tmp_path / "s.safetensors")
    layouts = one(STAR, 96, BLUE, 96)
    assert torch.equal(again.lay(layouts, 16, 16)[0], known.lay(layouts, 16, 16)[0])


def test_every_thing_has_a_stencil_before_every_background_that_training_shows_it_in() -> None:
    keys = stencils.groups((176,))
    flat = [k for group in keys for k in group]
    assert len(set(flat)) == len(flat)
    assert {k[0] for k in flat} == set(range(len(NAMES_OF_KINDS)))
    assert all(group for group in keys)


class Counting:
    """A VQGAN that counts what it encodes."""

    def __init__(self, network: VQGAN) -> None:
        self.network, self.encoded = network, 0
        self.vquantizer = network.vquantizer

    def encode_latents(self, images: Tensor) -> Tensor:
        self.encoded += len(images)
        return self.network.encode_latents(images)


def test_an_absent_vqgan_is_noticed_before_any_process_starts(monkeypatch, tmp_path):
    monkeypatch.setattr(stencils, "ProcessPoolExecutor", lambda *_, **rest: pytest.fail("started"))
    arguments = [str(tmp_path / "out"), "--vqgan", str(tmp_path / "absent.pt")]
    monkeypatch.setattr(sys, "argv", ["stencils", *arguments])
    with pytest.raises(FileNotFoundError, match=r"no checkpoint .*absent\.pt"):
        stencils.main()


def test_a_file_that_has_no_stencils_is_called_that(tmp_path):
    with pytest.raises(FileNotFoundError, match="no stencils"):
        Stencils.load(tmp_path / "absent")
    (tmp_path / "text").write_text("no stencils")
    with pytest.raises(ValueError, match="text has no stencils"):
        Stencils.load(tmp_path / "text")


def test_a_pool_encodes_only_what_is_not_known(known: Stencils, network: VQGAN) -> None:
    from model.training import corpus
    from model.training.data import Scenes

    sampled = corpus.generate(40, seed=0)
    layouts = Layouts.cat([one(STAR, 96, BLUE), one(STAR, 96, SEA)] * 20)
    sampled = replace(sampled, layouts=layouts, aspect=torch.zeros(40, dtype=torch.uint8))
    pool = Pool(small_config(), Scenes(sampled, art.shapes()), 0, 40, stencils=known, sprites=False)
    counting = Counting(network)
    pool.grow(counting, 40)  # type: ignore[arg-type]
    assert counting.encoded == 20
    assert torch.equal(pool.tokens[0], known.lay(layouts[:1], 16, 16)[0][0].to(torch.int16))
    encoded = network.encode(render(layouts[1:2], art.shapes()).float() / 255)
    known.settle(layouts[1:2], encoded)
    assert torch.equal(pool.tokens[1].long(), encoded[0])


@pytest.mark.parametrize(("with_stencils", "uses"), [(True, 6), (False, 16)])
def test_scenes_are_met_less_often_where_most_need_not_be_encoded(
    known: Stencils, network: VQGAN, with_stencils: bool, uses: int
) -> None:
    from model.training import corpus
    from model.training.data import Scenes
    from model.training.denoiser import Encoding

    sampled = corpus.generate(400, seed=0)
    layouts = Layouts.cat([one(STAR, 96, BLUE)] * 400)
    sampled = replace(sampled, layouts=layouts, aspect=torch.zeros(400, dtype=torch.uint8))
    encoding = Encoding.of(
        small_config(),
        network,
        Scenes(sampled, art.shapes()),
        8,
        400,
        torch.float32,
        stencils=known if with_stencils else None,
    )
    steps = 100
    for _ in range(steps):
        encoding.grow()
    share = sum(share for aspect, _, share in encoding.mixture if aspect == 0)
    drawn = steps * 8 * share
    assert encoding.pools[0].encoded == pytest.approx(drawn / uses, abs=4 * 8)
