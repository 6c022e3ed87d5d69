"""Part prompts into units: things with their properties, places, sides and relations.

A clause becomes groups of words without a preposition between them, and these become units
(`model/prompt_groups.py`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from model.prompt_groups import (
    IS,
    LOOKS,
    MEDIA,
    PAIRS,
    Item,
    Kind,
    Unit,
    Units,
    agreeing,
    is_noun,
    is_number,
    joined,
)
from model.prompt_translation import is_foreign_word
from model.vocabulary import (
    ARTICLES,
    FUNCTION,
    LONGEST_PHRASE,
    NUMBERS,
    Named,
    Phrase,
    Vocabulary,
    words_of,
)

_LINE_END = re.compile(r"\b(\w+)[ \t]*\r?\n(?![ \t]*\r?\n)")
_CLAUSE_END = re.compile(r"[,;|\n\u3001\u3002\uff0c\uff1b]+|[.!?:](?=\s|$)")

_CAPITALISED = re.compile(r"(?<=\w )[A-Z]\w+")

_BETWEEN_COLOURS = frozenset(("one", "another", "the", "other", "a", "an", "and"))
_SO_MANY = {2: {"two", "2"}, 3: {"three", "3"}, 4: {"four", "4"}}

# What follows one of these is not in the image: not wanted, or only like the thing before it.
_NEGATION_WORDS = """
    no not without never except excluding minus don't isn't doesn't aren't won't avoid instead
    rather neither nor or like as made named called dressed resembling
"""
_NEGATIONS = frozenset(_NEGATION_WORDS.split())
_LIKENESSES = frozenset((("shape", "of"), ("form", "of"), ("size", "of"), ("shaped", "like")))
_ENDS_NEGATION = frozenset(("but", "just", "only"))
_PLACING = frozenset(("on", "in", "at", "under", "near", "behind", "by"))
# Words of other languages, and those that show that a prompt is in English all the same.
_FOREIGN_WORDS = """
    ein eine einen einem einer der das dem und mit im auf ist une un le les des du et dans sur avec
    el la los las una con en del il lo che di uma um com na het een op ett och med bir
"""
_FOREIGN = frozenset(_FOREIGN_WORDS.split())
_ENGLISH = frozenset(("a", "an", "the", "of", "and", "with"))
_BEFORE_VERBS = frozenset(("i", "we", "he", "she", "they", "can", "will"))
_ONLY_WITH_ARTICLE = (("die",),)  # "a die", but "die cut" and "die Katze"
# They say of a thing what an article does.
_LIKE_ARTICLES = frozenset(("one", "my", "our", "your", "his", "her", "their", "another"))
_THE = [Item("article", ("the",))]
_SIDE_WORDS = {word: word for word in ("top", "bottom", "left", "right")}
_SIDES = frozenset((word,) for word in _SIDE_WORDS)
_SIDE_WORDS |= {"upper": "top", "lower": "bottom"}
_SIDE_WORDS |= dict.fromkeys(("middle", "center", "centre", "centered"), "centre")
_SIDE_PHRASES = FUNCTION | {*_SIDE_WORDS, "side", "corner", "part"}
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


class Clauses:
    """A text, clause by clause."""

    def __init__(self, vocabulary: Vocabulary, text: str) -> None:
        text = _unwrapped(vocabulary, text)
        texts = map(words_of, _CLAUSE_END.split(_with_and(vocabulary, text)))
        foreign, names = is_foreign(words_of(text)), _proper_names(text)
        clauses = [
            Clause(words, Parser(vocabulary, words, foreign=foreign, names=names).units)
            for words in texts
            if words
        ]
        # "Oil painting" beside something else is no painting in the image.
        said = [clause for clause in clauses if not clause.is_medium]
        said = said if any(clause.units for clause in said) else clauses
        self._all = [
            clause._replace(units=[_painted(vocabulary, unit) for unit in clause.units])
            for clause in _one_of_each_colour(vocabulary, said)
        ]

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


def _unwrapped(vocabulary: Vocabulary, text: str) -> str:
    """Return a text without the line breaks that part a phrase, as in "a red⏎apple"."""

    def joined(match: re.Match[str]) -> str:
        word = match[1].lower()
        goes_on = word in FUNCTION or vocabulary.is_property(word)
        return f"{match[1]} " if goes_on else match[0]

    return _LINE_END.sub(joined, text)


class Clause(NamedTuple):
    """The words of a clause, and its units."""

    words: Phrase
    units: Sequence[Unit]

    @property
    def is_medium(self) -> bool:
        """Return whether it only names a kind of images that is also a thing, as "oil painting"."""
        return len(self.units) == 1 and self.units[0].words[0] in MEDIA

    @property
    def asks_for_a_look(self) -> bool:
        """Return whether it says nothing but how the image should look."""
        known = LOOKS | FUNCTION
        return not self.units and all(word in known or word.isdigit() for word in self.words)


class Parser:
    """Part the words of a clause into units.

    Words without a preposition between them are a group, such as "a small red apple", which becomes
    a unit when it ends.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        words: Phrase,
        *,
        foreign: bool = False,
        names: frozenset[str] = frozenset(),
    ) -> None:
        self._vocabulary = vocabulary
        self._said = Units(vocabulary)
        self._group: list[Item] = []
        self._as_written = words
        corrected = [
            word if word in names else _corrected(vocabulary, word, foreign=foreign)
            for word in words
        ]
        words = _with_articles(corrected)
        i = 0
        while i < len(words):
            i += self._take(words, i)
        self._close()
        self.units: Sequence[Unit] = self._connected(_in_usual_order(self._said.all))

    def _close(self, before: str = "") -> None:
        """End a group. before: the function word behind it."""
        group, self._group = self._group, []
        self._said.add_group(group, before)

    def _connected(self, units: Sequence[Unit]) -> list[Unit]:
        """Return units of which a relation is between two things; others lead to a place or go.

        A colour that is said of a thing becomes one of its properties, and one that is said of the
        background goes with it.
        """
        kept: list[Unit] = []
        for i, unit in enumerate(units):
            before, after = kept[-1:], units[i + 1 : i + 2]
            if before and self._says_of(unit, before[0]):
                kept[-1] = _coloured(before[0], unit)
            elif unit.role == "relation":
                related = [u.role for u in (*before, *after)] == ["thing"] * 2
                if related and not after[0].gap:
                    kept.append(unit)
            elif i and units[i - 1].role == "relation" and kept[-1:] != [units[i - 1]]:
                leads = unit.role == "place" and not unit.gap
                lead = (*units[i - 1].words, *unit.lead) if leads else unit.lead
                kept.append(replace(unit, lead=lead, gap=not leads))
            else:
                kept.append(unit)
        return kept

    def _says_of(self, unit: Unit, before: Unit) -> bool:
        """Return whether a unit is the colour of what is before it: "a cat that is black"."""
        colours = unit.role == "property" and all(map(self._vocabulary.is_colour, unit.words))
        takes_one = before.role == "thing" or before.words[-1] == "background"
        return colours and takes_one and not IS.isdisjoint(unit.lead)

    def _take(self, words: Phrase, i: int) -> int:
        """Take the longest known phrase at a place, or one word; return how many words it has."""
        if words[i] in _NEGATIONS or (i > 1 and words[i : i + 2] in _LIKENESSES):
            self._close()
            self._said.leave_out()
            return self._denied(words, i) - i
        if words[i] == "and" and self._goes_on_describing(words[i + 1 : i + 3]):
            colours = self._is_colour(words[i + 1]) and self._is_colour(self._group[-1].words[-1])
            return 2 if colours else 1  # captions have one colour
        if n := self._take_measured(words, i):
            return n
        longest = max(self._vocabulary.longest(words[i]), _LONGEST_RELATION.get(words[i], 2))
        for n in range(min(longest, LONGEST_PHRASE, len(words) - i), 0, -1):
            written = self._as_written[i : i + n]
            phrase = written if n > 1 and self._vocabulary.thing(written) else words[i : i + n]
            if self._take_phrase(phrase, words[i + n : i + n + LONGEST_PHRASE]):
                return n
        self._take_word(words[i])
        return 1

    def _take_measured(self, words: Phrase, i: int) -> int:
        """Take the slice of cake of "a slice of chocolate cake"; return how many words it has."""
        known = self._vocabulary
        if words[i + 1 : i + 2] != ("of",) or words[i] in FUNCTION | PAIRS:
            return 0
        if known.thing(words[i : i + 3]):
            return 0
        end = i + 2
        while end < min(i + 6, len(words)) and words[end] not in FUNCTION:
            end += 1
        for start in range(i + 3, end):
            if known.thing(words[i + 2 : start + 1]):
                return 0  # "a cup of bubble tea"
            for stop in range(end, start, -1):
                phrase = (*words[i : i + 2], *words[start:stop])
                if named := known.thing(phrase):
                    self._group.append(Item("thing", phrase, named))
                    return stop - i
        return 0

    def _goes_on_describing(self, following: Phrase) -> bool:
        """Return whether "and" is between two properties of a thing: "a black and white cat"."""
        last = self._group[-1] if self._group else None
        if last is None or last.kind != "property" or last.words == ("background",):
            return False
        ends = len(following) < 2 or following[1] in FUNCTION - {"and"}
        of_a_thing = not IS.isdisjoint(self._said.lead)  # "a cat that is black and white"
        if not following or (ends and not of_a_thing):
            return False
        if of_a_thing and following[1:] == ("background",):
            return False  # "a cat that is cute and black background"
        named = self._vocabulary.thing(following[1:])
        if named and named.plural and self._group[0].kind == "property":
            return False  # of "red and blue balloons" some are blue
        return self._vocabulary.is_size(following[0]) or self._is_colour(following[0])

    def _is_colour(self, word: str) -> bool:
        known = self._vocabulary
        return all(map(known.is_colour, known.alias((word,)) or (word,)))

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

    def _take_phrase(self, phrase: Phrase, rest: Phrase) -> bool:
        """Take a known phrase, if it is one. rest: the next words behind it."""
        known = self._vocabulary
        following = rest[0] if rest else None
        alias = known.alias(phrase)
        named = known.thing(phrase)
        relation = _OTHER_RELATIONS.get(phrase, phrase)
        if relation in _RELATIONS and named is None:
            self._close()
            self._said.add("relation", relation, sides=_RELATIONS[relation])
        elif phrase[0] in ARTICLES and FUNCTION.isdisjoint(phrase[1:]) and named is None:
            return False
        elif alias is not None and named is None and not known.is_place(alias):
            self._group.append(Item("property", alias))
        elif phrase in _SIDES and self._is_no_side(rest):
            return False
        elif known.is_place(alias or phrase) and not (named and self._is_thing(following)):
            self._take_place(alias or phrase)
        elif named and not (following == "of" and phrase[-1] in MEDIA):
            if phrase in _ONLY_WITH_ARTICLE and not self._group:
                return False
            if self._describes(phrase, rest) or (len(phrase) == 1 and self._is_verb(named, rest)):
                return False
            if phrase[0] in ARTICLES:
                self._take_word(phrase[0])
                phrase = phrase[1:]
            self._group.append(Item("thing", phrase, named))
        else:
            return False
        return True

    def _is_thing(self, following: str | None) -> bool:
        """Return whether a word for a place and a thing is the latter here: "a big mountain"."""
        related = following is not None and any(following == words[0] for words in _RELATIONS)
        described = self._group not in ([], _THE)  # not "the mountains"
        return self._said.lead[-2:] != ["front", "of"] and (described or related)

    def _describes(self, phrase: Phrase, rest: Phrase) -> bool:
        """Return whether the name of a thing and a colour is the latter: "an orange cat"."""
        if phrase[0] not in ARTICLES or not all(map(self._vocabulary.is_colour, phrase[1:])):
            return False
        if rest[:1] == ("and",):
            return len(rest) > 1 and self._is_colour(rest[1])
        return bool(rest) and rest[0] not in FUNCTION and is_noun(rest[0])

    def _is_verb(self, named: Named, rest: Phrase) -> bool:
        """Return whether a name is a verb: "birds fly", "a bird that can fly", "I saw"."""
        if not self._group:
            lead, before = self._said.lead[-1:], self._said.last_named
            plural = before is not None and before.plural
            return (lead == ["that"] and named.plural != plural) or (
                lead == ["to"] and not named.plural
            )
        first, last = self._group[0].words, self._group[-1]
        is_one = first in (("a",), ("an",))
        if last.named:
            return named.plural != last.named.plural and last.named.plural != is_one
        object_follows = not ARTICLES.isdisjoint(rest[:1])
        return last.words[-1] in _BEFORE_VERBS or (named.plural and is_one and object_follows)

    def _is_no_side(self, rest: Phrase) -> bool:
        """Return whether a side word describes another one: "top view", "looking left"."""
        known, group = self._vocabulary, self._group
        if group and group[-1].kind == "unknown" and group[-1].words[0].endswith("ing"):
            return True
        if not rest or rest[0] in FUNCTION | NUMBERS or known.is_property(rest[0]):
            return False
        phrases = [rest[:n] for n in range(1, len(rest) + 1)]
        return not any(known.thing(phrase) or known.is_place(phrase) for phrase in phrases)

    def _take_place(self, phrase: Phrase) -> None:
        is_side = _SIDE_PHRASES.issuperset(phrase)  # not "in the middle of a forest"
        words = (_SIDE_WORDS[word] for word in phrase if word in _SIDE_WORDS)
        side = " ".join(dict.fromkeys(words)) if is_side else ""
        if side or not FUNCTION.isdisjoint(phrase[1:] if phrase[0] in ARTICLES else phrase):
            self._close()
            self._said.add("side" if side else "place", phrase, sides=(side,) if side else ())
            return
        if phrase[0] in ARTICLES:
            self._take_word(phrase[0])
            phrase = phrase[1:]
        self._group.append(Item("place", phrase))

    def _take_word(self, word: str) -> None:
        known = self._vocabulary
        if word in ARTICLES:
            self._close()
            self._group.append(Item("article", (word,)))
        elif word in FUNCTION:
            self._close(before=word)
            self._said.lead.append(word)
        elif is_number(word):
            kind: Kind = "number" if known.is_property(word) else "unknown"
            self._group.append(Item(kind, (word,)))
        else:
            kind = "property" if known.is_property(word) else "unknown"
            if word.endswith("ing") and self._group and self._group[-1].kind == "unknown":
                self._close()  # "a little girl holding …"
            self._group.append(Item(kind, (word,)))


def _corrected(vocabulary: Vocabulary, word: str, *, foreign: bool) -> str:
    """Return a word as it is spelt right."""
    known = vocabulary.corrected(word, foreign=foreign)
    return word if known is None or is_foreign_word(word, known) else known


def _one_of_each_colour(vocabulary: Vocabulary, clauses: list[Clause]) -> list[Clause]:
    """Return clauses with a red and a white rose for "two roses, one red and one white"."""
    for i, clause in enumerate(clauses[:-1]):
        several = clause.units[-1] if clause.units else None
        if several is None or several.named is None or not several.named.plural:
            continue
        colours: list[str] = []
        end = i + 1
        while end < len(clauses) and (found := _colours_alone(vocabulary, clauses[end].words)):
            colours += found
            end += 1
        if {*several.numbers} <= _SO_MANY.get(len(colours), set()) and len(colours) in _SO_MANY:
            units = [*clause.units[:-1], *_each(several, colours)]
            return [*clauses[:i], Clause(clause.words, units), *clauses[end:]]
    return clauses


def _painted(vocabulary: Vocabulary, unit: Unit) -> Unit:
    """Return a unit with the colour that captions always give its thing: "a red heart"."""
    colour = vocabulary.painted.get(unit.named.thing.name) if unit.named else None
    if unit.named is None or colour is None or any(map(vocabulary.is_colour, unit.beside_name)):
        return unit
    words = (*unit.beside_name, colour, *words_of(unit.named.name))
    return replace(unit, words=agreeing(words, unit.named))


def _colours_alone(vocabulary: Vocabulary, words: Phrase) -> list[str]:
    """Return the colours of a clause that says nothing else."""
    colours = [word for word in words if vocabulary.is_colour(word)]
    return colours if {*words} - {*colours} <= _BETWEEN_COLOURS else []


def _each(several: Unit, colours: Sequence[str]) -> Iterator[Unit]:
    """Yield one of several things in each colour."""
    assert several.named is not None
    one = several.named._replace(plural=False)
    described = [w for w in several.beside_name if w not in ARTICLES and not is_number(w)]
    for colour in colours:
        words = agreeing(("a", *described, colour, *words_of(one.name)), one)
        yield replace(several, words=words, named=one)
        several = replace(several, lead=("and",), gap=False)


def _with_and(vocabulary: Vocabulary, text: str) -> str:
    """Return a text in which "red, white and blue" are no clauses of their own."""
    return vocabulary.listed_colours.sub(lambda found: found[0].replace(",", " and"), text)


def is_foreign(words: Phrase) -> bool:
    """Return whether words are of another language than English."""
    return not _FOREIGN.isdisjoint(words) and _ENGLISH.isdisjoint(words)


def _proper_names(text: str) -> frozenset[str]:
    """Return the capitalised words within a text, unless it has capitals throughout."""
    capitalised = _CAPITALISED.findall(text)
    if 2 * len(capitalised) > len(words_of(text)) or is_foreign(words_of(text)):
        return frozenset()
    return frozenset(map(str.lower, capitalised))


def _with_articles(words: Sequence[str]) -> Phrase:
    """Return words with an article for "one" and "my"."""
    return tuple(
        "a"
        if word in _LIKE_ARTICLES and not (word == "one" and words[i + 1 : i + 2] in ([], ["of"]))
        else word
        for i, word in enumerate(words)
    )


def _in_usual_order(units: Sequence[Unit]) -> Sequence[Unit]:
    """Return "a cat left of a dog" for "left of a dog is a cat"."""
    if [unit.role for unit in units[:3]] != ["relation", "thing", "thing"]:
        return units
    relation, one, other, *rest = units
    return [*(replace(u, lead=(), gap=False) for u in (other, relation, one)), *rest]


def _coloured(unit: Unit, colours: Unit) -> Unit:
    """Return a thing or a background with the colours that are said of it."""
    if unit.named is None:
        return replace(unit, words=(*unit.words, *colours.lead, *colours.words))
    words = (*unit.beside_name, *colours.words, *unit.named.name.split())
    return replace(unit, words=agreeing(words, unit.named))
