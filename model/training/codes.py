"""Define the codes that link text and images: the target vector of a byte, a caption and an image.

A denoiser that waits for its encoders wastes their training time, and one that trains with them
never learns to read captions (docs/log.md). So the features are fixed before any network learns: a
random vector for every kind, and a channel for every colour, size, side, count, background and
relation. The denoiser learns from these codes, which cost nothing; the byte encoder and CLIP's
towers learn to predict them, at the same time or later. The codes follow from the corpus's classes
alone. Letters: N scenes, B of them, L bytes, D channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from model.networks.denoiser_v3 import Denoiser
from model.training.captions import ATTRIBUTES, PLACES, THING_ATTRIBUTES
from model.training.corpus import Corpus
from model.training.kinds import NAMES_OF_KINDS, SHAPES

_SEED = 20_261_128  # of the kinds' vectors: networks that learnt others do not understand these
KIND_WIDTH = 96  # channels
ONE = 4.0  # what stands in a class' own place
WIDTH = 192

# Where in a byte's vector stands what: the attributes of its own thing, which thing it is, then
# what the whole caption says.
_OWN = tuple(name for name in THING_ATTRIBUTES if name != "kind")
_WHOLE = ("background", "relation", "view")


def _starts() -> tuple[dict[str, int], int]:
    starts, at = {}, KIND_WIDTH
    for name in _OWN:
        starts[name], at = at, at + THING_ATTRIBUTES[name] - 1
    starts["place"], at = at, at + len(PLACES)
    for name in _WHOLE:
        starts[name], at = at, at + ATTRIBUTES[name] - 1
    return starts, at


STARTS, USED = (
    _starts()
)  # of WIDTH channels; the rest are free, because a layer norm must put its energy somewhere


def classes_of(name: str) -> int:
    """Return the number of classes of an attribute in STARTS, the silent class among them."""
    return 1 + len(PLACES) if name == "place" else {**ATTRIBUTES, **THING_ATTRIBUTES}[name]


@torch.no_grad()
def quiet(denoiser: Denoiser) -> None:
    """Make a denoiser that has learnt from codes ignore the channels without a code.

    Trained encoders may give any value there.
    """
    if denoiser.config.byt5_embd == WIDTH:
        denoiser.byt5_mapper.weight[:, USED:] = 0


def _one_hot(classes: Tensor, count: int) -> Tensor:
    """Turn classes […], 0 and below for silent, into […, count − 1]."""
    return ONE * (classes[..., None] == torch.arange(1, count, device=classes.device)).float()


@dataclass(frozen=True)
class Codes:
    """The codes of a corpus, on its device."""

    corpus: Corpus

    @cached_property
    def kinds(self) -> Tensor:
        """Return a vector for every kind, [1 + kinds, KIND_WIDTH]; the first is zero: silent."""
        table = torch.randn(
            1 + len(NAMES_OF_KINDS), KIND_WIDTH, generator=torch.Generator().manual_seed(_SEED)
        )
        table[0] = 0
        return table.to(self.corpus.text.device)

    def things(self, classes: Tensor) -> Tensor:
        """Return the codes […, 3, D] of the things in captions.

        classes: […, 3, T], −1 where there is no thing.
        """
        names = list(THING_ATTRIBUTES)
        classes = classes.long()
        parts = [self.kinds[classes[..., names.index("kind")].clamp_min(0)]]
        parts += [
            _one_hot(classes[..., names.index(name)], THING_ATTRIBUTES[name]) for name in _OWN
        ]
        there = (classes[..., :1] >= 0).float()
        place = ONE * torch.eye(len(PLACES), device=classes.device).expand(
            *classes.shape[:-2], -1, -1
        )
        vectors = torch.cat([*parts, place], dim=-1) * there
        return F.pad(vectors, (0, WIDTH - vectors.shape[-1]))

    def whole(self, stated: Tensor) -> Tensor:
        """Return the codes […, D] that all bytes of a caption share, by classes […, A]."""
        names = list(ATTRIBUTES)
        parts = [
            _one_hot(stated[..., names.index(name)].long(), ATTRIBUTES[name]) for name in _WHOLE
        ]
        vectors = torch.cat(parts, dim=-1)
        return F.pad(
            vectors, (STARTS["background"], WIDTH - STARTS["background"] - vectors.shape[-1])
        )

    def bytes(self, index: Tensor, which: Tensor, place: Tensor) -> Tensor:
        """Return the codes [B, L, D] of the bytes at `place` [B, L].

        index: the scenes [B]. which: the number [B] of each scene's caption.
        """
        c = self.corpus
        span = c.span[index, which][:, None].long()  # [B, 1, 3, 2]
        inside = (place[..., None] >= span[..., 0]) & (place[..., None] < span[..., 1])  # [B, L, 3]
        own = self.things(c.things[index, which])
        return inside.float() @ own + self.whole(c.stated[index, which])[:, None]

    def text(self, index: Tensor, which: Tensor) -> Tensor:
        """Return CLIP's vectors [B, D] for captions: all things together, in the same channels."""
        own = self.things(self.corpus.things[index, which])
        whole = self.whole(self.corpus.stated[index, which])
        return self._together(own) + whole

    def _together(self, own: Tensor) -> Tensor:
        """Turn things' vectors [B, 3, D] into [B, D], as long as one thing's."""
        there = (own != 0).any(-1).sum(-1, keepdim=True).clamp_min(1)
        return own.sum(1) / there.float().sqrt()

    @cached_property
    def colours(self) -> Tensor:
        """Return the palette's values [colours, 3] of 0 … 1."""
        from model.training.palette import COLOURS, NAMES

        return (
            torch.tensor([COLOURS[name] for name in NAMES], device=self.corpus.text.device).float()
            / 255
        )

    def images(self, index: Tensor) -> Tensor:
        """Return CLIP's vectors [B, D] for images: all that they show, stated or not."""
        drawn = self.corpus.layouts[index]
        device = drawn.sprite.device
        there = (drawn.sprite >= 0).float()  # [B, M]
        count = there.sum(-1, keepdim=True)
        kinds = (self.kinds[drawn.sprite.long() + 1] * there[..., None]).sum(1) / count.clamp_min(1)
        # Several things of one kind give that kind's vector; several kinds each have their share,
        # scaled to the length of one kind's vector.
        kinds = F.normalize(kinds, dim=-1) * KIND_WIDTH**0.5 * (count > 0)
        shape = there * (drawn.sprite < len(SHAPES))
        nearest = (
            (drawn.tint[:, :, None].float() / 255 - self.colours).square().sum(-1).argmin(-1)
        )  # [B, M]
        colour = (
            ONE
            * (F.one_hot(nearest, len(self.colours)).float() * shape[..., None]).sum(1)
            / count.clamp_min(1)
        )
        sides = (
            torch.tensor([384.0, 256.0], device=device),
            torch.tensor([256.0, 384.0], device=device),
        )
        wide = (self.corpus.aspect[index] == 1)[:, None]
        tall = (self.corpus.aspect[index] == 2)[:, None]
        extent = 256.0 + wide * (sides[0] - 256.0) + tall * (sides[1] - 256.0)  # [B, 2]
        middle = (drawn.centre / extent[:, None] - 0.5) * there[..., None]
        where = 2 * ONE * middle.sum(1) / count.clamp_min(1)  # [B, 2]
        spread = (
            2
            * ONE
            * (middle - middle.sum(1, keepdim=True) / count.clamp_min(1)[..., None])
            .abs()
            .mul(there[..., None])
            .sum(1)
        )
        length = ONE * ((drawn.length * there).sum(1, keepdim=True) / count.clamp_min(1) / 128 - 1)
        number = _one_hot(count[:, 0], 1 + drawn.sprite.shape[1])
        background = _one_hot(drawn.background.long() + 1, ATTRIBUTES["background"])
        vectors = torch.cat([kinds, colour, where, spread, length, number], dim=-1)
        vectors = F.pad(vectors, (0, STARTS["background"] - vectors.shape[-1]))
        vectors = torch.cat([vectors, background], dim=-1)
        return F.pad(vectors, (0, WIDTH - vectors.shape[-1]))
