"""Know the words of the captions that small weights were trained on.

Text encoders that were trained on a million web captions know "a crimson automobile, 4k"; those of
small weights know "a red car", and read noise in other words. `model/prompt_reading.py` puts
prompts into the words of a `Vocabulary`. No torch here.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Annotated, Any, NamedTuple

from pydantic import Field

from model.network_config import STRICT

ARTICLES = frozenset(("a", "an", "the", "some"))
_FUNCTION = """
    a an the and or of with in on at by for from to into near under over behind between is are it
    its this that some front inside
"""
FUNCTION = frozenset(_FUNCTION.split())
_NUMBER_WORDS = "one two three four five six seven eight nine ten pair couple dozen"
NUMBERS = frozenset(_NUMBER_WORDS.split())
_WORD = re.compile(r"[^\W_]+(?:['\u2019-][^\W_]+)*")
_AN = ("a", "e", "i", "o", "u", "hour", "x-ray", "suv", "8 ")
_NOT_AN = ("uni", "use", "uku", "ufo", "eu", "one", "u-")
LONGEST_PHRASE = 6  # words
_LONGEST_WORD = 32  # letters of one that may be misspelt
_SHORTEST_MISSPELT = 5  # letters
_SHORTEST_FOREIGN = 7  # letters of one in a prompt that is not in English
_SHORTEST_OF_SEVERAL = 4  # letters of a word that may be misspelt in a name of several

Phrase = tuple[str, ...]
Text = Annotated[str, Field(min_length=1, max_length=200)]


@dataclass(frozen=True)
class Thing:
    """One kind of thing that can be drawn: its name, its plural and its other names.

    tags: what people say of it without its name. colour: the one that it has, if it has one. bare:
    whether its name has no article, as "bread".
    """

    __pydantic_config__ = STRICT

    name: Text
    plural: Text
    synonyms: tuple[Text, ...] = ()
    tags: tuple[Text, ...] = ()
    colour: Text | None = None
    bare: bool = False

    @property
    def written(self) -> dict[str, Any]:
        """Its fields for `bundle.json`, without those that have their default."""
        return {name: value for name, value in asdict(self).items() if value}


class Named(NamedTuple):
    """A name of a thing as it stands in a prompt. plural: whether it names several."""

    thing: Thing
    plural: bool

    @property
    def name(self) -> str:
        """The name that the captions use most."""
        return self.thing.plural if self.plural else self.thing.name


@dataclass(frozen=True)
class Vocabulary:
    """Know what captions of the training say.

    things: what can be drawn. places: words for scenes, sides and views. colours, sizes, words:
    what captions have beside names, separated by spaces; words are the rest, such as "cute" and
    "background". aliases: words of a caption for words that no caption has, such as red for
    crimson. backgrounds: what is behind the things of a prompt that does not say, such as "on a
    white background", and the things that are hard to see there, separated by commas; the first is
    the usual one. kinds: tags that name many things at once, such as "fruit". english:
    words that differ from a known one by a letter and are correct all the same. scenes: what a
    prompt that names only a scene is read as, such as "a sun at sunset", and words for the scene,
    separated by commas. painted: the usual colour of things that captions always give one.
    """

    __pydantic_config__ = STRICT

    things: Annotated[tuple[Thing, ...], Field(min_length=1, max_length=2**14)]
    places: tuple[Text, ...] = ()
    colours: Annotated[str, Field(max_length=2**16)] = ""
    sizes: Annotated[str, Field(max_length=2**16)] = ""
    words: Annotated[str, Field(max_length=2**16)] = ""
    aliases: Mapping[Text, Text] = field(default_factory=dict)
    backgrounds: Mapping[Text, Annotated[str, Field(max_length=2**16)]] = field(
        default_factory=dict
    )
    kinds: Annotated[str, Field(max_length=2**16)] = ""
    english: Annotated[str, Field(max_length=2**16)] = ""
    scenes: Mapping[Text, Annotated[str, Field(max_length=2**16)]] = field(default_factory=dict)
    painted: Mapping[Text, Text] = field(default_factory=dict)

    def thing(self, phrase: Phrase) -> Named | None:
        """Return the thing of this name: the usual one, a synonym, or the plural of either.

        Of a name of several words, one may be misspelt. A name of one may be written apart.
        """
        if named := self._names.get(phrase):
            return named
        apart = len(phrase) == 2 and not self.is_property(phrase[0])
        if apart and FUNCTION.isdisjoint(phrase) and ("".join(phrase),) in self._names:
            return self._names["".join(phrase),]  # "a pine apple"
        unknown = [i for i, word in enumerate(phrase) if word not in self._known]
        for i in unknown if len(phrase) > 1 else ():
            for known, named in self._with_a_gap.get((*phrase[:i], "", *phrase[i + 1 :]), ()):
                if _differ_by_a_letter(phrase[i], known):
                    return named
        return None

    def _may_be_misspelt(self, word: str) -> bool:
        return len(word) >= _SHORTEST_OF_SEVERAL and word not in self._words | FUNCTION

    def longest(self, word: str) -> int:
        """Return how many words the longest phrase has that begins with this one."""
        return self._longest.get(word, 1 if word in self._known else LONGEST_PHRASE)

    def is_place(self, phrase: Phrase) -> bool:
        """Return whether captions have this phrase for a scene, a side, a relation or a view."""
        return phrase in self._places

    def is_property(self, word: str) -> bool:
        """Return whether captions have this word beside names: a colour, a size, a number."""
        return word in self._words

    def is_colour(self, word: str) -> bool:
        """Return whether this word is a colour of captions."""
        return word in self._colours

    def is_size(self, word: str) -> bool:
        """Return whether this word is a size of captions."""
        return word in self._sizes

    def background(self, things: Collection[tuple[Thing, Collection[str]]]) -> str:
        """Return words for a background on which things are easy to see; none if there are no such.

        things: each with the colours that are said of it.
        """

        def hides(background: str, thing: Thing, colours: Collection[str]) -> bool:
            if colours:
                return not set(colours).isdisjoint(background.split())
            return thing.name in self._hidden[background]

        for background in self.backgrounds:
            if not any(hides(background, *each) for each in things):
                return background
        return next(iter(self.backgrounds), "")

    def alias(self, phrase: Phrase) -> Phrase | None:
        """Return a caption's words for others of this meaning."""
        return self._aliases.get(phrase)

    def scene(self, phrase: Phrase) -> str:
        """Return a caption that shows a scene; nothing for other words."""
        return self._scenes.get(phrase, "")

    def corrected(self, word: str, *, foreign: bool = False) -> str | None:
        """Return the known word for a misspelt one or a genitive, None for another word.

        Hardly anybody gets the first letter wrong. foreign: whether it is of another language, in
        which only long words are nearly the same.
        """
        shortest = _SHORTEST_FOREIGN if foreign else _SHORTEST_MISSPELT
        is_long = shortest <= len(word) <= _LONGEST_WORD
        if word.endswith("'s") and word not in self._known and (word[:-2],) in self._names:
            return word[:-2]  # "a lion's mane"
        if not foreign and len(word) == shortest - 1 and not self._is_correct(word):
            return next((other for other in _with_a_double(word) if other in self._known), None)
        if not is_long or "'" in word or self._is_correct(word):
            return None
        sounds = (other for other in _as_it_sounds(word) if other in self._known)
        return self._nearest(word) or next(sounds, None)

    def _is_correct(self, word: str) -> bool:
        """Return whether a word is spelt right: the plurals of the list's words are, too."""
        return word in self._correct or (word[-1] == "s" and word[:-1] in self._english)

    def _nearest(self, word: str) -> str | None:
        """Return the known word that differs by a letter: less, more, changed or swapped."""
        if word in self._shortened:
            return self._shortened[word]
        parts = sorted(_without_a_letter(word))  # the same choice every time
        longer = [part for part in parts if part in self._known]
        near = [self._shortened[part] for part in parts if part in self._shortened]
        near.sort(key=lambda known: len(known) != len(word))
        return next(iter((*longer, *near)), None)

    def described(self, phrases: Iterable[Phrase], colours: Iterable[str] = ()) -> Thing | None:
        """Return the thing that most of these tags are said of; None without a tag.

        Of several, one of these colours, then the one with the fewest other tags.
        """
        said = self._said_of(phrases)
        if not said:
            return None
        shown = set(colours)

        def rank(number: int) -> tuple[int, bool, int, int]:
            thing = self.things[number]
            return said.count(number), thing.colour in shown, -len(thing.tags), -number

        return self.things[max(set(said), key=rank)]

    def says_enough(self, phrases: Iterable[Phrase]) -> bool:
        """Return whether these tags describe a thing: two of one, several words, or a kind."""
        tags, said = set(phrases), self._said_of(phrases)
        kinds = frozenset(self.kinds.split())
        return len(set(said)) < len(said) or any(len(p) > 1 or p[0] in kinds for p in tags)

    def _said_of(self, phrases: Iterable[Phrase]) -> list[int]:
        """Return the numbers of the things that each of these tags is said of."""
        return [number for phrase in set(phrases) for number in self._tagged.get(phrase, ())]

    def is_tag(self, phrase: Phrase) -> bool:
        """Return whether this phrase is said of things without their names."""
        return phrase in self._tagged

    # ── indices ───────────────────────────────────────────────────────────────────────────────────

    @cached_property
    def _names(self) -> dict[Phrase, Named]:
        """Every name by its words: usual names come before synonyms, and both before guesses."""
        found: dict[Phrase, Named] = {}
        for thing in self.things:
            found.setdefault(words_of(thing.name), Named(thing, plural=False))
            found.setdefault(words_of(thing.plural), Named(thing, plural=True))
        for thing in self.things:
            for name in thing.synonyms:
                found.setdefault(words_of(name), Named(thing, plural=False))
        for phrase, named in list(found.items()):
            if not named.plural:
                first = phrase[phrase[0] in ARTICLES : -1]  # "oranges" for "an orange"
                several = "and" not in phrase  # "sun and clouds" is one picture
                for plural in _plurals(phrase[-1]):
                    found.setdefault((*first, plural), Named(named.thing, plural=several))
        for phrase, named in list(found.items()):
            if len(phrase) == 2:
                found.setdefault(("".join(phrase),), named)
            if len(phrase) == 3 and phrase[1] == "of":
                found.setdefault((phrase[2], phrase[0]), named)  # "a ramen bowl"
        return found

    @cached_property
    def _with_a_gap(self) -> dict[Phrase, list[tuple[str, Named]]]:
        """The names of several words by all but one of their words, and that word."""
        found: dict[Phrase, list[tuple[str, Named]]] = {}
        for phrase, named in self._names.items():
            for i, word in enumerate(phrase if len(phrase) > 1 else ()):
                if self._may_be_misspelt(word):
                    gap = (*phrase[:i], "", *phrase[i + 1 :])
                    found.setdefault(gap, []).append((word, named))
        return found

    @cached_property
    def _places(self) -> frozenset[Phrase]:
        phrases = [*map(words_of, self.places)]
        bare = [phrase[1:] for phrase in phrases if phrase[0] in ARTICLES]
        return frozenset((*phrases, *bare)) - {()}

    @cached_property
    def _longest(self) -> dict[str, int]:
        found: dict[str, int] = {}
        for phrase in (*self._names, *self._places, *self._aliases):
            found[phrase[0]] = max(len(phrase), found.get(phrase[0], 1))
        return found

    @cached_property
    def _colours(self) -> frozenset[str]:
        return frozenset(self.colours.split())

    @cached_property
    def listed_colours(self) -> re.Pattern[str]:
        """The pattern of several colours in front of a last one, such as "red, white and"."""
        colour = "(?:" + "|".join(map(re.escape, self.colours.split() or ["-"])) + ")"
        return re.compile(rf"\b{colour}(?:, {colour}){{1,4}},? and (?={colour}\b)", re.I)

    @cached_property
    def _sizes(self) -> frozenset[str]:
        return frozenset(self.sizes.split())

    @cached_property
    def _words(self) -> frozenset[str]:
        return self._colours | self._sizes | (frozenset(self.words.split()) - FUNCTION)

    @cached_property
    def _hidden(self) -> dict[str, frozenset[str]]:
        """The names of the things that are hard to see on each background."""
        return {words: frozenset(names.split(", ")) for words, names in self.backgrounds.items()}

    @cached_property
    def _aliases(self) -> dict[Phrase, Phrase]:
        return {words_of(other): words_of(own) for other, own in self.aliases.items()}

    @cached_property
    def _scenes(self) -> dict[Phrase, str]:
        each = self.scenes.items()
        return {words_of(other): own for own, others in each for other in others.split(",")}

    @cached_property
    def _tagged(self) -> dict[Phrase, list[int]]:
        """The numbers of the things that each tag is said of."""
        found: dict[Phrase, list[int]] = {}
        for number, thing in enumerate(self.things):
            for tag in set(map(words_of, thing.tags)):
                found.setdefault(tag, []).append(number)
        return found

    @cached_property
    def _known(self) -> frozenset[str]:
        """Every word that captions have."""
        phrases = (*self._names, *self._places)
        return self._words | {word for phrase in phrases for word in phrase}

    @cached_property
    def _correct(self) -> frozenset[str]:
        """Every word that is spelt right."""
        phrases = (*self._aliases, *self._tagged)
        others = {word for phrase in phrases for word in phrase}
        return self._known | FUNCTION | others | self._english

    @cached_property
    def _english(self) -> frozenset[str]:
        return frozenset(self.english.split())

    @cached_property
    def _shortened(self) -> dict[str, str]:
        """The known words by what is left of them without one of their letters."""
        names = [
            name for thing in self.things for name in (thing.name, thing.plural, *thing.synonyms)
        ]
        known = self._words.union(*map(words_of, (*names, *self.places)))
        long = sorted(word for word in known if len(word) >= _SHORTEST_MISSPELT)
        return {part: word for word in reversed(long) for part in _without_a_letter(word)}


def words_of(text: str) -> Phrase:
    """Return the words of a text in lower case; hyphens part words."""
    return tuple(
        part for word in _WORD.findall(text) for part in re.split("-", _plain(word)) if part
    )


def _plain(word: str) -> str:
    return word.lower().replace("\u2019", "'")


def with_article(words: str) -> str:
    """Return the words with "a" or "an" in front."""
    vowel = words.startswith(_AN) and not words.startswith(_NOT_AN)
    return ("an " if vowel else "a ") + words


def _plurals(noun: str) -> Iterator[str]:
    """Yield what may be the plural of a noun."""
    yield f"{noun}s"
    if noun.endswith(("s", "x", "z", "ch", "sh", "o")):
        yield f"{noun}es"
    if noun.endswith("y"):
        yield f"{noun[:-1]}ies"
    if noun.endswith(("f", "fe")):
        yield f"{noun.rstrip('e')[:-1]}ves"


def _with_a_double(word: str) -> Iterator[str]:
    """Yield a word with one of its letters twice: "pizza" for "piza"."""
    return (word[:i] + word[i - 1 :] for i in range(1, len(word) + 1))


def _as_it_sounds(word: str) -> Iterator[str]:
    """Yield a word with letters that sound alike: "elephant" for "elefant"."""
    for letters, others in (("f", "ph"), ("k", "c"), ("c", "k"), ("y", "i"), ("i", "y")):
        if letters in word[1:]:
            yield word[0] + word[1:].replace(letters, others)


def _differ_by_a_letter(one: str, other: str) -> bool:
    """Return whether two words differ by a letter: less, more, changed or swapped."""
    if abs(len(one) - len(other)) > 1 or one[0] != other[0]:
        return False
    return bool(({one} | _without_a_letter(one)) & ({other} | _without_a_letter(other)))


def _without_a_letter(word: str) -> set[str]:
    """Return a word without one of its letters, but for the first."""
    return {word[:i] + word[i + 1 :] for i in range(1, len(word))}
