"""Tell what groups of words mean: things with their properties, places, properties of the whole.

A group is a few words without a preposition between them, such as "a small red apple". A noun that
is not known takes its properties with it: of "a red cup" nothing stays.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from model.vocabulary import (
    ARTICLES,
    FUNCTION,
    NUMBERS,
    Named,
    Phrase,
    Vocabulary,
    with_article,
    words_of,
)

Role = Literal["thing", "place", "side", "relation", "property"]
Kind = Literal["article", "property", "number", "thing", "place", "unknown"]

# Kinds of images, which are not things in them: "an oil painting of a cat".
_MEDIA_WORDS = """
    photo photograph photography picture image drawing painting illustration render rendering
    sketch portrait icon artwork art shot view style styled aesthetic wallpaper poster sticker logo
    clipart cartoon anime 3d emoji screenshot print page
"""
MEDIA = frozenset(_MEDIA_WORDS.split())
_STYLES = frozenset(("style", "styled", "aesthetic"))
# Words that ask for a look.
_LOOK_WORDS = """
    artistic comic cinematic photographic photorealistic realistic realism film movie cinema light
    lights lighting bright dark dramatic moody soft sharp focus detail details detailed high highly
    low hd hdr uhd quality best masterpiece colorful colourful colors colours vivid vibrant studio
    professional oil ink watercolor watercolour digital pixel vector fantasy magic magical elegant
    vintage retro wide angle award winning trending artstation glowing epic resolution ultra raw
"""
LOOKS = MEDIA | frozenset(_LOOK_WORDS.split())

# Behind a name that says only what something looks like: "a heart shaped balloon".
_LIKE = frozenset(("shaped", "colored", "coloured", "striped", "print", "patterned", "flavored"))
# Parts of a thing, which no caption has beside it: "a cat with blue eyes".
_OWN_PARTS = frozenset(("eye", "eyes", "wing", "wings", "tooth", "teeth", "wheel", "wheels"))
_OWN_PARTS |= {"door", "doors", "window", "windows", "ear", "ears", "leaf", "leaves"}
_HIGHEST_NUMBER, _HIGHEST_WORDS = 4, ("four", "4")
_HIGHER_NUMBERS = NUMBERS - {"one", "two", "three", "four", "pair", "couple"}
_HIGHER_NUMBERS |= {"many", "several", "numerous"}
PAIRS = frozenset(("pair", "couple", "dozen"))
_UPON = (("on",), ("in",), ("inside",), ("into",))
_HEADWEAR = frozenset(("headwear", "crown"))
_COLOUR = frozenset(("color", "colour"))
# What words end in that say what a thing does: "a dog running", "a cat painted".
_ENDS_OF_VERBS = ("ing", "ed", "en", "ly")
_ADVERB_WORDS = """
    out up down off away back around about through across along against toward towards onto upon
    together upside facing cut while than bigger smaller larger faster taller who which where when
    outside outdoors here there too please pls etc alone asleep apart today yesterday play fight run
    sit kiss hug talk dance walk sleep eat swim fly stand look jump share watch ride drink read cook
    hold meet sing chase
"""
_ADVERBS = frozenset(_ADVERB_WORDS.split())
CLOSE_UP = frozenset(("close", "closeup", "macro"))
_SEEN_AS = MEDIA | CLOSE_UP
IS = frozenset(("is", "are", "that", "it", "its", "this"))
PREPOSITIONS = FUNCTION - ARTICLES - IS - frozenset(("and", "or", "of"))


@dataclass(frozen=True)
class Unit:
    """Tell what a few words of a clause say.

    words: in a caption. lead: words such as "and" or "on a" before it. gap: whether something
    before it was left out.
    """

    role: Role
    words: Phrase
    lead: Phrase = ()
    gap: bool = False
    named: Named | None = None
    sides: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """The words of a caption."""
        return " ".join(self.words)

    @property
    def beside_name(self) -> Phrase:
        """The words but for the name of a thing."""
        return self.words[: -len(self.named.name.split())] if self.named else self.words

    @property
    def numbers(self) -> list[str]:
        """The words beside the name that count, such as "two" or "pair"."""
        return [word for word in self.beside_name if is_number(word)]


class Item(NamedTuple):
    """A word or a name within a group of words without a preposition."""

    kind: Kind
    words: Phrase
    named: Named | None = None


class Units:
    """The units of a clause so far.

    lead: function words since the last unit. gap: whether something since then was left out. late:
    units that go behind all others.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._units: list[Unit] = []
        self._late: list[Unit] = []
        self._gap = False
        self._tail: Phrase = ()
        self._follows_thing = False
        self._pending: tuple[Phrase, Phrase] | None = None
        self.lead: list[str] = []

    @property
    def all(self) -> Sequence[Unit]:
        """The units in the order of a caption."""
        return [*self._units, *self._late]

    @property
    def last_named(self) -> Named | None:
        """The name of the last unit, if it is a thing."""
        return self._units[-1].named if self._units else None

    def add_group(self, group: Sequence[Item], before: str = "") -> None:
        """Add what a group says. before: the function word behind it."""
        for part in _parted(self._described(group)):
            self._add_part(part, before)

    def add(
        self,
        role: Role,
        words: Phrase,
        *,
        named: Named | None = None,
        sides: tuple[str, ...] = (),
    ) -> None:
        """Add a unit."""
        self._units.append(Unit(role, words, tuple(self.lead), self._gap, named, sides))
        self.lead, self._gap, self._tail, self._pending = [], False, (), None

    def leave_out(self) -> None:
        """Leave out words, and those that lead to them."""
        self._gap = True
        self._tail, self._pending = (), None
        self.lead = []

    def _add_part(self, group: Sequence[Item], before: str) -> None:
        kinds, last = [item.kind for item in group], group[-1]
        if last.words[-1] in _STYLES and "place" not in kinds:
            self.leave_out()
        elif before == "of" and last.words[-1] in _SEEN_AS:
            self._add_medium(group)
        elif "thing" in kinds:
            self._add_thing(group)
        elif last.kind == "unknown" and not (last.words[0] in LOOKS and "place" in kinds):
            self.leave_out()
        elif "place" in kinds:
            words = _words_of(group, ("article", "property", "place"))
            self._gap |= group[0].kind == "unknown"  # "flying through space"
            self.add("place", _with_its_article(words))
        elif self._says_something(group, before):
            words = _words_of(group, ("article", "property", "number"))
            self.add("property", _with_its_article(words))
        elif kinds != ["article"]:
            lead, described = tuple(self.lead), set(kinds[1:]) == {"property"}
            self.leave_out()
            if kinds[0] == "article" and described and before == "and":
                self._pending = (lead, _words_of(group))

    def _add_medium(self, group: Sequence[Item]) -> None:
        """Leave out "a photo of", but not what it says of the image: where, or from how near."""
        if CLOSE_UP & set(_words_of(group)):
            self.add("place", ("a", "close-up", "of"))
            return
        if place := _words_of(group, ("place",)):
            self._late.append(Unit("place", place, gap=True))
        self.leave_out()

    def _says_something(self, group: Sequence[Item], before: str) -> bool:
        """Return whether a group without a noun does: a colour, a background, "a pair"."""
        words = _words_of(group)
        if before == "of" and any(item.kind == "number" for item in group):
            return True
        has_colour = any(map(self._vocabulary.is_colour, words))
        if "background" in words:
            return has_colour or before in IS  # not "on a plain background"
        if group[0].kind == "article":
            return False  # "a violet" is a flower
        return has_colour and {"of", "with"}.isdisjoint(self.lead)

    def _described(self, group: Sequence[Item]) -> list[Item]:
        """Return a group in which names that only describe another one are properties.

        So is "orange" in "an orange cat", "an orange background" and "on orange". "Heart" in "a
        heart shaped balloon" says nothing that captions could.
        """
        known, result = self._vocabulary, list(group)
        fruit = known.thing(("an", *group[-1].words)) if group else None
        if (
            fruit
            and _COLOUR.isdisjoint(_words_of(group))
            and any(item.kind in ("article", "number") for item in group)
        ):
            result[-1] = Item("thing", group[-1].words, fruit)  # "a small orange"
        last_described = max(
            (i for i, each in enumerate(group) if each.named or each.words == ("background",)),
            default=-1,
        )
        for i, item in enumerate(group):
            if item.kind == "thing" and not _LIKE.isdisjoint(_words_of(group[i + 1 : i + 2])):
                result[i] = Item("unknown", item.words)
                continue
            describes = i < last_described or (len(group) == 1 and self.lead[-1:] == ["on"])
            said = known.alias(item.words) or item.words
            if item.kind == "thing" and describes and all(map(known.is_property, said)):
                result[i] = Item("property", said)
        return result

    def _add_thing(self, group: Sequence[Item]) -> None:
        things = [i for i, item in enumerate(group) if item.kind == "thing"]
        painted = len(things) > 1 and group[things[-1]].words[-1] in MEDIA  # "a dog painting"
        number = things[-2] if painted else things[-1]
        named = group[number].named
        assert named is not None
        tail = _words_of(group[things[-1] + 1 :])
        own_part = self.lead[-1:] == ["with"] and named.name in _OWN_PARTS and self._units
        describes = self._follows_thing and not named.plural and tail and is_noun(tail[0])
        if own_part or describes:  # "a cat with blue eyes", "a cat on a coffee table"
            self.leave_out()
            return
        kept: list[Item] = []
        unknowns = [i for i, item in enumerate(group[:number]) if item.kind == "unknown"]
        for i, item in enumerate(group[:number]):
            unknown = bool(unknowns) and i <= unknowns[-1]
            unknown |= (
                i > 0 and group[i - 1].words in (("a",), ("an",)) and item.words[0] not in PAIRS
            )
            if item.kind == "number" and unknown and not (named.plural or named.thing.bare):
                continue  # "a 3 tier cake", "a two door car"
            several = named.thing.plural in (named.name, named.thing.name)
            if item.kind == "unknown" and i == unknowns[-1] and several:
                kept += self._nearest_number(item.words[0])
            elif item.kind == "place":
                self._late.append(Unit("place", item.words, gap=True))
            elif item.kind not in ("unknown", "thing"):
                kept.append(item)
        words = (*_words_of(kept), *named.name.split())
        if self._pending and self.lead == ["and"] and group[0].kind == "article":
            self._add_pending(named, *self._pending)
        self._empty_container(named)
        self.add("thing", agreeing(words, named), named=named)
        self._follows_thing = True
        self._tail, self._gap = tail, bool(tail)

    def _nearest_number(self, word: str) -> Sequence[Item]:
        """Return the highest number of captions for a higher one."""
        many = word in _HIGHER_NUMBERS or (word.isdecimal() and int(word) > _HIGHEST_NUMBER)
        highest = next(filter(self._vocabulary.is_property, _HIGHEST_WORDS), None)
        return [Item("number", (highest,))] if many and highest else []

    def _add_pending(self, named: Named, lead: Phrase, described: Phrase) -> None:
        """Add the red one of "a red and a blue balloon"."""
        first, *others = words_of(named.name)
        if self._vocabulary.is_colour(first):  # the name of "a green apple"
            named = self._vocabulary.thing(tuple(others)) or named
        self.lead = list(lead)
        self.add("thing", agreeing((*described, *words_of(named.name)), named), named=named)
        self.lead = ["and"]

    def _empty_container(self, named: Named) -> None:
        """Leave out the bowl of "a bowl of apples"; move the field of "a field of flowers" back.

        So is the pair of "a pair of jeans" left out. Nothing is in "a rabbit coming out of a hat".
        """
        if self.lead != ["of"] or not self._units:
            return
        contains = not self._gap or (self._tail and is_noun(self._tail[-1]))
        pair = named.thing.bare and not named.plural and self._units[-1].words[-1] == "pair"
        if contains and (self._units[-1].named or pair):
            container = self._units.pop()
            self.lead, self._gap = list(container.lead), container.gap
        elif contains and self._units[-1].role == "place" and self._units[-1].words[-1] != "of":
            self._late.append(replace(self._units.pop(), gap=True))
            self.lead = []


def is_number(word: str) -> bool:
    """Return whether a word counts."""
    return word in NUMBERS or word.isdigit()


def is_noun(word: str) -> bool:
    """Return whether an unknown word behind a name seems to be a noun, as in "an ice sculpture".

    It is a verb or an adverb in "a dog running", "a dog sits" and "a dog outside".
    """
    verb = len(word) > 4 and word.endswith(_ENDS_OF_VERBS)
    verb |= word.endswith("s") and not word.endswith("ss")
    return len(word) > 2 and not verb and word not in _ADVERBS | LOOKS


def _with_its_article(words: Phrase) -> Phrase:
    if words[0] not in ("a", "an") or words[-1].endswith("s"):
        return words
    return words_of(with_article(" ".join(words[1:])))


def agreeing(words: Phrase, named: Named) -> Phrase:
    """Return the words of a thing with the article that its first word needs."""
    if words[0] not in ("a", "an"):
        return words
    if named.plural or named.thing.bare:
        return words[1:]
    return tuple(with_article(" ".join(words[1:])).split())


def _parted(group: Sequence[Item]) -> Iterator[Sequence[Item]]:
    """Yield the parts of a group: each thing but a name's first words, and what is behind the last.

    "A cat wearing sunglasses" and "red circle blue square" have two, "an arrow black background"
    has a thing and a property, "a black background please" a property and an unknown word.
    """
    named = [item.named for item in group if item.named]
    if len(group) == len(named) > 2 and not any(name.thing.bare for name in named[:-1]):
        yield from ([item] for item in group)  # "cat dog bird"
        return
    start = 0
    for i, item in enumerate(group[:-1]):
        if item.words == ("background",):
            yield group[start : i + 1]
            start = i + 1
        elif item.kind == "thing" and group[i + 1].kind != "thing":
            rest = {other.kind for other in group[i + 1 :]}
            if not rest.isdisjoint(("thing", "property", "place")):
                yield group[start : i + 1]
                start = i + 1
    if group:
        yield group[start:]


def _words_of(group: Sequence[Item], kinds: Sequence[str] | None = None) -> Phrase:
    chosen = (item for item in group if kinds is None or item.kind in kinds)
    return tuple(word for item in chosen for word in item.words)


# ── units → captions ──────────────────────────────────────────────────────────────────────────────


def joined(units: Sequence[Unit]) -> str:
    """Return the caption of a clause's units."""
    text, before, has_thing = "", None, False
    for unit in units:
        text = with_unit(text, unit, lead_of(unit, before, has_thing=has_thing))
        before, has_thing = unit, has_thing or unit.role == "thing"
    return text


def with_unit(text: str, unit: Unit, lead: Sequence[str]) -> str:
    """Return a text and one unit more, behind a comma if nothing else joins them."""
    words = " ".join((*lead, *unit.words))
    if not text:
        return words
    bare = unit.gap and unit.role in ("thing", "place", "property") and not lead
    joins = text.endswith(" of") or unit.words[0] in PREPOSITIONS
    return f"{text}, {words}" if bare and not joins else f"{text} {words}"


def lead_of(unit: Unit, before: Unit | None, *, has_thing: bool) -> Sequence[str]:
    """Return the words that go before a unit: its own, or "and" between two things."""
    if before is None:
        return () if unit.gap or unit.role == "thing" else unit.lead
    if unit.role == "thing" and has_thing:
        if before.role == "relation":
            return ()
        as_written = not unit.gap and (before.role != "thing" or unit.lead == ("and",))
        joined = unit.lead if as_written else ("and",)
        return (before.role == "thing" and _side_of(unit)) or joined
    if before.words[-1] == "of":
        return ()
    if not unit.gap:
        joins = before.role == "property" or unit.role == "relation"
        return unit.lead if joins else [word for word in unit.lead if word not in IS]
    return [word for word in unit.lead if word in PREPOSITIONS]


def _side_of(unit: Unit) -> Phrase:
    """Return how captions say where a thing is to the one before: "above" of "a bird on a tree"."""
    assert unit.named is not None
    if not _HEADWEAR.isdisjoint((*unit.named.thing.tags, unit.named.thing.name)) and unit.lead in (
        (),
        ("in",),
        ("with",),
    ):
        return ("below",)  # "a cat wearing a hat"
    return ("above",) if unit.lead in _UPON else ()
