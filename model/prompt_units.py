"""Part prompts into units: things with their properties, places, sides and relations.

A clause becomes groups of words without a preposition between them, and these become units. A noun
that is not known takes its properties with it: of "a red cup" nothing stays.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from model.vocabulary import (
    ARTICLES,
    FUNCTION,
    LONGEST_PHRASE,
    NUMBERS,
    Named,
    Phrase,
    Vocabulary,
    with_article,
    words_of,
)

Role = Literal["thing", "place", "side", "relation", "property"]
Kind = Literal["article", "property", "number", "thing", "place", "unknown"]

_CLAUSE_END = re.compile(r"[,;|\n\u3001\u3002\uff0c\uff1b]+|[.!?:](?=\s|$)")

# Kinds of images, which are not things in them: "an oil painting of a cat".
_MEDIA_WORDS = """
    photo photograph photography picture image drawing painting illustration render rendering
    sketch portrait icon artwork art shot view style styled aesthetic wallpaper poster sticker logo
    clipart cartoon anime 3d emoji screenshot print page
"""
_MEDIA = frozenset(_MEDIA_WORDS.split())
_STYLES = frozenset(("style", "styled", "aesthetic"))
# Words that ask for a look.
_LOOK_WORDS = """
    artistic comic cinematic photographic photorealistic realistic realism film movie cinema light
    lights lighting bright dark dramatic moody soft sharp focus detail details detailed high highly
    low hd hdr uhd quality best masterpiece colorful colourful colors colours vivid vibrant studio
    professional oil ink watercolor watercolour digital pixel vector fantasy magic magical elegant
    vintage retro wide angle award winning trending artstation glowing epic resolution ultra raw
"""
LOOKS = _MEDIA | frozenset(_LOOK_WORDS.split())
_LOOKS_ONLY = LOOKS | FUNCTION
# What follows one of these is not in the image: not wanted, or only like the thing before it.
_NEGATION_WORDS = """
    no not without never except excluding minus don't isn't doesn't aren't won't avoid instead
    rather neither nor or like as made named called dressed resembling
"""
_NEGATIONS = frozenset(_NEGATION_WORDS.split())
_ENDS_NEGATION = frozenset(("but", "just", "only"))
_PLACING = frozenset(("on", "in", "at", "under", "near", "behind", "by"))
# Behind a name that says only what something looks like: "a heart shaped balloon".
_LIKE = frozenset(("shaped", "colored", "coloured", "striped", "print", "patterned", "flavored"))
# Parts of a thing, which no caption has beside it: "a cat with blue eyes".
_OWN_PARTS = frozenset(("eye", "eyes", "wing", "wings", "tooth", "teeth", "wheel", "wheels"))
_OWN_PARTS |= {"door", "doors", "window", "windows", "ear", "ears", "leaf", "leaves"}
CLOSE_UP = frozenset(("close", "closeup", "macro"))
_SEEN_AS = _MEDIA | CLOSE_UP
_IS = frozenset(("is", "are", "that", "it", "its", "this"))
_PREPOSITIONS = FUNCTION - ARTICLES - _IS - frozenset(("and", "or", "of"))
_SIDE_WORDS = {word: word for word in ("top", "bottom", "left", "right")}
_SIDE_WORDS |= {"upper": "top", "lower": "bottom"}
_SIDE_WORDS |= dict.fromkeys(("middle", "center", "centre", "centered"), "centre")
# How captions say where one thing is to another, and the sides of the two.
_RELATIONS: dict[Phrase, tuple[str, str]] = {
    words_of(said): sides
    for sides, many in (
        (("left", "right"), "next to, beside, left of, to the left of, on the left of"),
        (("right", "left"), "right of, to the right of, on the right of"),
        (("top", "bottom"), "above, over"),
        (("bottom", "top"), "below, under"),
    )
    for said in many.split(", ")
}
# Further ones, by those.
_OTHER_RELATIONS = {
    words_of(said): words_of(caption)
    for caption, many in (
        ("next to", "close to, besides, alongside"),
        ("above", "on top of, atop"),
        ("below", "underneath, beneath"),
    )
    for said in many.split(", ")
}
_LONGEST_RELATION = {
    words[0]: max(len(other) for other in (*_RELATIONS, *_OTHER_RELATIONS) if other[0] == words[0])
    for words in (*_RELATIONS, *_OTHER_RELATIONS)
}


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


class _Item(NamedTuple):
    """A word or a name within a group of words without a preposition."""

    kind: Kind
    words: Phrase
    named: Named | None = None


class Clauses:
    """A text, clause by clause."""

    def __init__(self, vocabulary: Vocabulary, text: str) -> None:
        texts = map(words_of, _CLAUSE_END.split(text))
        clauses = [Clause(words, Parser(vocabulary, words).units) for words in texts if words]
        # "Oil painting" beside something else is no painting in the image.
        said = [clause for clause in clauses if not clause.is_medium]
        self._all = said if any(clause.units for clause in said) else clauses

    def __iter__(self) -> Iterator[Clause]:
        return iter(self._all)

    @property
    def units(self) -> list[Unit]:
        """The units of all clauses."""
        return [unit for clause in self for unit in clause.units]

    @property
    def text(self) -> str:
        """The caption."""
        return ", ".join(joined(clause.units) for clause in self if clause.units)


class Clause(NamedTuple):
    """The words of a clause, and its units."""

    words: Phrase
    units: Sequence[Unit]

    @property
    def is_medium(self) -> bool:
        """Return whether it only names a kind of images that is also a thing, as "oil painting"."""
        return len(self.units) == 1 and self.units[0].words[0] in _MEDIA

    @property
    def asks_for_a_look(self) -> bool:
        """Return whether it says nothing but how the image should look."""
        return not self.units and all(w in _LOOKS_ONLY or w.isdigit() for w in self.words)


class Parser:
    """Part the words of a clause into units.

    Words without a preposition between them are a group, such as "a small red apple", which becomes
    a unit when it ends.
    """

    def __init__(self, vocabulary: Vocabulary, words: Phrase) -> None:
        self._vocabulary = vocabulary
        self._units: list[Unit] = []
        self._lead: list[str] = []
        self._group: list[_Item] = []
        self._gap = False
        self._late: list[Unit] = []
        self._as_written = words
        words = tuple(vocabulary.corrected(word) or word for word in words)
        i = 0
        while i < len(words):
            i += self._take(words, i)
        self._close()
        self.units: Sequence[Unit] = self._connected(_in_usual_order([*self._units, *self._late]))

    def _connected(self, units: Sequence[Unit]) -> list[Unit]:
        """Return units of which a relation is between two things; others lead to a place or go.

        A colour that is said of a thing becomes one of its properties.
        """
        kept: list[Unit] = []
        for i, unit in enumerate(units):
            before, after = kept[-1:], units[i + 1 : i + 2]
            if before and self._says_of(unit, before[0]):
                kept[-1] = _coloured(before[0], unit.words)
            elif unit.role == "place" and i and units[i - 1].role == "relation":
                kept.append(replace(unit, lead=(*units[i - 1].words, *unit.lead)))
            elif unit.role != "relation" or [u.role for u in (*before, *after)] == ["thing"] * 2:
                kept.append(unit)
        return kept

    def _says_of(self, unit: Unit, before: Unit) -> bool:
        """Return whether a unit is the colour of the thing before it: "a cat that is black"."""
        colours = unit.role == "property" and all(map(self._vocabulary.is_colour, unit.words))
        return colours and before.role == "thing" and not _IS.isdisjoint(unit.lead)

    def _take(self, words: Phrase, i: int) -> int:
        """Take the longest known phrase at a place, or one word; return how many words it has."""
        if words[i] in _NEGATIONS:
            self._close()
            self._leave_out()
            return self._denied(words, i) - i
        longest = max(self._vocabulary.longest(words[i]), _LONGEST_RELATION.get(words[i], 1))
        for n in range(min(longest, LONGEST_PHRASE, len(words) - i), 0, -1):
            following = words[i + n] if i + n < len(words) else None
            written = self._as_written[i : i + n]
            phrase = written if n > 1 and self._vocabulary.thing(written) else words[i : i + n]
            if self._take_phrase(phrase, following):
                return n
        self._take_word(words[i])
        return 1

    @staticmethod
    def _denied(words: Phrase, start: int) -> int:
        """Return the end of what a negation denies: a noun, or several, up to a preposition."""
        for i in range(start + 1, len(words)):
            noun_before = i > start + 1 and words[i - 1] not in FUNCTION
            listed = words[start] in ("no", "without", "neither") and words[i] == "and"
            article_follows = not ARTICLES.isdisjoint(words[i + 1 : i + 2])
            if words[i] in _ENDS_NEGATION or (noun_before and words[i] in _PLACING):
                return i
            if words[i] == "and" and noun_before and (article_follows or not listed):
                return i
        return len(words)

    def _take_phrase(self, phrase: Phrase, following: str | None) -> bool:
        known = self._vocabulary
        alias = known.alias(phrase)
        named = known.thing(phrase)
        relation = _OTHER_RELATIONS.get(phrase, phrase)
        if relation in _RELATIONS and named is None:
            self._close()
            self._add("relation", relation, sides=_RELATIONS[relation])
        elif phrase[0] in ARTICLES and FUNCTION.isdisjoint(phrase[1:]) and named is None:
            return False
        elif alias is not None and named is None and not known.is_place(alias):
            self._group.append(_Item("property", alias))
        elif known.is_place(alias or phrase) and not (named and self._is_thing(following)):
            self._take_place(alias or phrase)
        elif named and not (following == "of" and phrase[-1] in _MEDIA):
            if phrase[0] in ARTICLES:
                self._take_word(phrase[0])
                phrase = phrase[1:]
            self._group.append(_Item("thing", phrase, named))
        else:
            return False
        return True

    def _is_thing(self, following: str | None) -> bool:
        """Return whether a word for a place and a thing is the latter here: "a big mountain"."""
        related = following is not None and any(following == words[0] for words in _RELATIONS)
        return self._lead[-2:] != ["front", "of"] and (bool(self._group) or related)

    def _take_place(self, phrase: Phrase) -> None:
        side = " ".join(dict.fromkeys(_SIDE_WORDS[w] for w in phrase if w in _SIDE_WORDS))
        if side or not FUNCTION.isdisjoint(phrase[1:] if phrase[0] in ARTICLES else phrase):
            self._close()
            self._add("side" if side else "place", phrase, sides=(side,) if side else ())
            return
        if phrase[0] in ARTICLES:
            self._take_word(phrase[0])
            phrase = phrase[1:]
        self._group.append(_Item("place", phrase))

    def _take_word(self, word: str) -> None:
        known = self._vocabulary
        if word in ARTICLES:
            self._close()
            self._group.append(_Item("article", (word,)))
        elif word in FUNCTION:
            self._close(before=word)
            self._lead.append(word)
        elif word in NUMBERS or word.isdigit():
            kind: Kind = "number" if known.is_property(word) else "unknown"
            self._group.append(_Item(kind, (word,)))
        else:
            kind = "property" if known.is_property(word) else "unknown"
            if word.endswith("ing") and self._group and self._group[-1].kind == "unknown":
                self._close()  # "a little girl holding …"
            self._group.append(_Item(kind, (word,)))

    # ── groups ────────────────────────────────────────────────────────────────────────────────────

    def _close(self, before: str = "") -> None:
        """End a group; before: the function word behind it."""
        group, self._group = self._group, []
        for part in _parted(self._with_properties(group)):
            self._add_group(part, before)

    def _add_group(self, group: Sequence[_Item], before: str) -> None:
        kinds, last = [item.kind for item in group], group[-1]
        if last.words[-1] in _STYLES and "place" not in kinds:
            self._leave_out()
        elif before == "of" and last.words[-1] in _SEEN_AS:
            self._add_medium(group)
        elif "thing" in kinds:
            self._add_thing(group)
        elif last.kind == "unknown" and not (last.words[0] in LOOKS and "place" in kinds):
            self._leave_out()
        elif "place" in kinds:
            self._add("place", _words_of(group, ("article", "property", "place")))
        elif self._says_something(group, before):
            self._add("property", _words_of(group, ("article", "property", "number")))
        elif kinds != ["article"]:
            self._leave_out()

    def _leave_out(self) -> None:
        self._gap = True
        self._lead = []

    def _add_medium(self, group: Sequence[_Item]) -> None:
        """Leave out "a photo of", but not what it says of the image: where, or from how near."""
        if CLOSE_UP & set(_words_of(group)):
            self._add("place", ("a", "close-up", "of"))
            return
        if place := _words_of(group, ("place",)):
            self._late.append(Unit("place", place, gap=True))
        self._leave_out()

    def _says_something(self, group: Sequence[_Item], before: str) -> bool:
        """Return whether a group without a noun does: a colour, a background, "a pair"."""
        words = _words_of(group)
        if before == "of" and any(item.kind == "number" for item in group):
            return True
        if "background" in words:
            return True
        if group[0].kind == "article":
            return False  # "a violet" is a flower
        return any(map(self._vocabulary.is_colour, words)) and "of" not in self._lead

    def _with_properties(self, group: list[_Item]) -> list[_Item]:
        """Return a group in which names that only describe another one are properties.

        So is "orange" in "an orange cat", "an orange background" and "on orange". "Heart" in "a
        heart shaped balloon" says nothing that captions could.
        """
        known, result = self._vocabulary, list(group)
        for i, item in enumerate(group):
            if item.kind == "thing" and not _LIKE.isdisjoint(_words_of(group[i + 1 : i + 2])):
                result[i] = _Item("unknown", item.words)
                continue
            describes = any(other.kind == "thing" for other in group[i + 1 :])
            describes |= any(other.words == ("background",) for other in group[i + 1 :])
            describes |= len(group) == 1 and self._lead[-1:] == ["on"]
            if item.kind == "thing" and describes and all(map(known.is_property, item.words)):
                result[i] = _Item("property", item.words)
        return result

    def _add_thing(self, group: Sequence[_Item]) -> None:
        things = [i for i, item in enumerate(group) if item.kind == "thing"]
        painted = len(things) > 1 and group[things[-1]].words[-1] in _MEDIA  # "a dog painting"
        number = things[-2] if painted else things[-1]
        named = group[number].named
        assert named is not None
        if self._lead[-1:] == ["with"] and named.name in _OWN_PARTS and self._units:
            self._leave_out()
            return
        kept: list[_Item] = []
        for i, item in enumerate(group[:number]):
            unknown = any(other.kind == "unknown" for other in group[i:number])
            if item.kind == "number" and unknown and not (named.plural or named.thing.bare):
                continue  # "a 3 tier cake"
            if item.kind == "place":
                self._late.append(Unit("place", item.words, gap=True))
            elif item.kind not in ("unknown", "thing"):
                kept.append(item)
        words = (*_words_of(kept), *named.name.split())
        if self._lead == ["of"] and not self._gap and self._units[-1:] and self._units[-1].named:
            container = self._units.pop()  # "a bowl of apples", "a school of fish"
            self._lead, self._gap = list(container.lead), container.gap
        self._add("thing", agreeing(words, named), named=named)

    def _add(
        self,
        role: Role,
        words: Phrase,
        *,
        named: Named | None = None,
        sides: tuple[str, ...] = (),
    ) -> None:
        self._units.append(Unit(role, words, tuple(self._lead), self._gap, named, sides))
        self._lead, self._gap = [], False


def _in_usual_order(units: Sequence[Unit]) -> Sequence[Unit]:
    """Return "a cat left of a dog" for "left of a dog is a cat"."""
    if [unit.role for unit in units[:3]] != ["relation", "thing", "thing"]:
        return units
    relation, one, other, *rest = units
    return [*(replace(u, lead=(), gap=False) for u in (other, relation, one)), *rest]


def _coloured(unit: Unit, colours: Phrase) -> Unit:
    """Return a thing with further colours."""
    assert unit.named is not None
    words = (*unit.beside_name, *colours, *unit.named.name.split())
    return replace(unit, words=agreeing(words, unit.named))


def agreeing(words: Phrase, named: Named) -> Phrase:
    """Return the words of a thing with the article that its first word needs."""
    if words[0] not in ("a", "an"):
        return words
    if named.plural or named.thing.bare:
        return words[1:]
    return tuple(with_article(" ".join(words[1:])).split())


def _parted(group: Sequence[_Item]) -> Iterator[Sequence[_Item]]:
    """Yield the parts of a group: each thing but a name's first words, and what is behind the last.

    "A cat wearing sunglasses" and "red circle blue square" have two, "an arrow black background"
    has a thing and a property.
    """
    start = 0
    for i, item in enumerate(group[:-1]):
        if item.kind == "thing" and group[i + 1].kind != "thing":
            rest = {other.kind for other in group[i + 1 :]}
            if not rest.isdisjoint(("thing", "property", "place")):
                yield group[start : i + 1]
                start = i + 1
    if group:
        yield group[start:]


def _words_of(group: Sequence[_Item], kinds: Sequence[str] | None = None) -> Phrase:
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
    bare = unit.gap and unit.role in ("place", "property") and not lead
    return f"{text}, {words}" if bare and unit.words[0] not in _PREPOSITIONS else f"{text} {words}"


def lead_of(unit: Unit, before: Unit | None, *, has_thing: bool) -> Sequence[str]:
    """Return the words that go before a unit: its own, or "and" between two things."""
    if before is None:
        return () if unit.gap or unit.role == "thing" else unit.lead
    if unit.role == "thing" and has_thing:
        if before.role == "relation":
            return ()
        as_written = not unit.gap and (before.role != "thing" or unit.lead == ("and",))
        return unit.lead if as_written else ("and",)
    if before.words[-1] == "of":
        return ()
    if not unit.gap:
        joins = before.role == "property" or unit.role == "relation"
        return unit.lead if joins else [word for word in unit.lead if word not in _IS]
    return [word for word in unit.lead if word in _PREPOSITIONS]
