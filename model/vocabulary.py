"""Read prompts as the captions that small weights were trained on: leave out what those never say.

People write "photo of a red apple, highly detailed, 4k". Text encoders that were trained on a
million web captions know such words; those of small weights, which know "a red apple", read noise.
A bundle with a `Vocabulary` has its prompts reduced to what it can draw.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Annotated

from pydantic import Field

from model.network_config import STRICT

# Words that ask for a look or name furniture. They count only within the name of a thing.
_LOOKS = """
    art artistic artwork comic cinematic photo photograph photographic photography photorealistic
    realistic realism film movie cinema light lights lighting bright dark dramatic moody soft sharp
    focus detail details detailed high low hd quality best masterpiece colorful colourful colors
    colours vivid vibrant studio professional landscape portrait ink oil watercolor watercolour
    painted paint digital pixel vector sketch pencil drawing illustration render rendered rendering
    line lines retro vintage fantasy magic magical elegant cool cold wide view angle shot grain
    award trending glowing epic style styled aesthetic resolution table tables desk shelf
"""
LOOKS = frozenset(_LOOKS.split())
_FUNCTION = """
    a an the and or of with in on at by for from to into near under over behind between is are it
    its this that some very
"""
FUNCTION = frozenset(_FUNCTION.split())
ARTICLES = frozenset(("a", "an", "the", "some"))
# Words that mean nothing on their own.
_EMPTY = LOOKS | FUNCTION

# Ways to ask, before what is asked for. "Draw" and "show me" are captions' own words.
_ASKED = re.compile(
    r"^\W*(?:/?imagine(?: prompt)?\b[: ]*)?"
    r"(?:(?:hi|hello|hey|please|kindly|just|ok|okay)\b[ ,!]*)*"
    r"(?:(?:can|could|would|will) you\b[ ,]*(?:please )?)?"
    r"(?:(?:i want|i need|i'd like|i would like|give me|let's see|let me see)\b *"
    r"(?:you to |to (?:see|have) )?)?"
    r"(?:(?:please )?(?:draw|paint|make|create|generate|render|produce|design|illustrate|show)\b *"
    r"(?:me |us |for me )?)?",
    re.IGNORECASE,
)
# A medium, before what is shown in it.
_MEDIUM = re.compile(
    r"^(?:an? |the )?(?:[\w-]+ ){0,3}"
    r"(?:photo|photograph|picture|image|drawing|painting|illustration|render|rendering|sketch"
    r"|portrait|icon|artwork|shot|view) of ",
    re.IGNORECASE,
)
# A medium or a look, behind what is shown in it: "oil painting", "comic book style".
_MEDIUM_AFTER = re.compile(
    r"\W*(?:(?!and |or |an? |the )[\w-]+ ){0,3}"
    r"(?:style|styled|aesthetic|art|artwork|painting|drawing"
    r"|illustration|photo|photograph|photography|picture|image|render|rendering|sketch|portrait"
    r"|wallpaper|poster|sticker|logo|icon|clipart|cartoon|anime|3d|emoji)\W*",
    re.IGNORECASE,
)
_IN_STYLE = re.compile(
    r"\b(?:in|with) (?:(?:the|an?) )?(?:style of [^,;|.\n]*|(?:[\w-]+ ){1,3}style\b)", re.IGNORECASE
)
_THANKS = re.compile(r"[ ,]*\b(?:please|thanks|thank you)\b[ .!?]*$", re.IGNORECASE)
_TAG = re.compile(r"<[^<>]{0,200}>")  # <lora:name:0.8>
_FLAG = re.compile(r"(?:^|\s)--[a-z]+(?: [\w.:]+)?", re.IGNORECASE)  # --ar 16:9
_EMPHASIS = re.compile(r":-?\d+(?:\.\d+)?(?=[)\]])|[()\[\]{}]")  # (word:1.2)
_CLAUSE_END = re.compile(r"[,;|\n]+|[.!?](?=\s|$)")
_WORD = re.compile(r"[^\W_]+(?:['\u2019-][^\W_]+)*")
# A caption that describes a thing by tags, some of which may name others.
_TAGGED = re.compile(r"something to do with|a thing (?:like this|about)", re.IGNORECASE)
# What stands between two things that captions would join by "and".
_BETWEEN = frozenset(("on", "in", "with", "inside", "near", "behind", "by", "at"))
_LONGEST_READ = 4096  # characters; encoders of small weights read a few hundred
_LONGEST_NAME = 5  # words
_LONGEST_WORD = 32  # letters of one that may be misspelt
_SHORTEST_MISSPELT = 5  # letters


@dataclass(frozen=True)
class Vocabulary:
    """Know what captions of the training say.

    things: names of what can be drawn, separated by commas. places: words for scenes, sides and
    views, separated by commas. words: further words that captions have beside these, such as
    colours and sizes, separated by spaces. tags: words that describe a thing instead of its name,
    and mean nothing beside one, separated by spaces.
    """

    __pydantic_config__ = STRICT

    things: Annotated[str, Field(min_length=1, max_length=2**20)]
    places: Annotated[str, Field(max_length=2**20)] = ""
    words: Annotated[str, Field(max_length=2**20)] = ""
    tags: Annotated[str, Field(max_length=2**20)] = ""

    @cached_property
    def _things(self) -> frozenset[tuple[str, ...]]:
        return frozenset(tuple(words_of(name)) for name in self.things.split(","))

    @cached_property
    def _places(self) -> frozenset[tuple[str, ...]]:
        return frozenset(tuple(words_of(name)) for name in self.places.split(",")) - {()}

    @cached_property
    def _beside_names(self) -> frozenset[str]:
        """Words that mean something beside the name of a thing."""
        return frozenset(self.words.split()) - _EMPTY

    @cached_property
    def _without_names(self) -> frozenset[str]:
        """Words that mean something where nothing is named."""
        return self._beside_names | (frozenset(self.tags.split()) - _EMPTY)

    @cached_property
    def _known(self) -> frozenset[str]:
        phrases = self._things | self._places
        return self._beside_names | {word for phrase in phrases for word in phrase}

    @cached_property
    def _nearly(self) -> frozenset[str]:
        """Every known word without one of its letters, by which misspelt ones are found."""
        long = (word for word in self._known if len(word) >= _SHORTEST_MISSPELT)
        return frozenset(part for word in long for part in _shortened(word))

    def read(self, prompt: str) -> str:
        """Return what of a prompt the captions of the training could say.

        Left out are requests ("could you draw me"), media, marks of other programs
        (`<lora:x:1>`, `(word:1.2)`, `--ar 16:9`), looks ("highly detailed, 4k") and further words
        that no caption has. What a prompt begins with stays as it is if it names nothing known.
        """
        plain = _EMPHASIS.sub(" ", _FLAG.sub(" ", _TAG.sub(" ", prompt[:_LONGEST_READ])))
        plain = _THANKS.sub("", _ASKED.sub("", plain.strip(), count=1))
        first, *others = _CLAUSE_END.split(_IN_STYLE.sub("", plain))
        others = [clause for clause in others if not _MEDIUM_AFTER.fullmatch(clause)]
        clauses = [
            _WORD.findall(_MEDIUM.sub(_close_up, clause.strip(), count=1))
            for clause in (first, *others)
        ]
        named = any(map(self._thing_places, clauses))
        meaning = self._beside_names if named else self._without_names
        if _TAGGED.search(prompt) or not self._means(clauses[0], meaning):
            return prompt
        kept = [self._kept(clause, meaning) for clause in clauses]
        if not named:
            kept[0] = clauses[0]
        text = ", ".join(" ".join(clause) for clause in kept if clause)
        text = prompt if words_of(text) == words_of(prompt) else text
        return text.lower() if prompt.isupper() else text

    def _kept(self, clause: list[str], meaning: frozenset[str]) -> list[str]:
        """Return a clause without the words that captions do not have, or nothing of it.

        meaning: the words that count beside names.
        """
        if not self._means(clause, meaning):
            return []
        places = self._thing_places(clause) | _found(clause, self._places)
        known = [
            i in places or word in FUNCTION or word in meaning or self._is_misspelt(word)
            for i, word in enumerate(map(str.lower, clause))
        ]
        return self._side_by_side(_joined(clause, known))

    def _means(self, clause: list[str], meaning: frozenset[str]) -> bool:
        """Return whether a clause says something that captions say, perhaps misspelt."""
        known = any(word in meaning or self._is_misspelt(word) for word in map(str.lower, clause))
        return known or bool(self._thing_places(clause) or _found(clause, self._places))

    def _side_by_side(self, clause: list[str]) -> list[str]:
        """Return "a cat and a sofa" for "a cat on a sofa", a relation that captions do not have."""
        things, places = self._thing_places(clause), _found(clause, self._places)
        result = list(clause)
        for i, word in enumerate(clause):
            if word.lower() not in _BETWEEN or i in things | places or i - 1 not in things:
                continue
            rest = (k for k in range(i + 1, len(clause)) if clause[k].lower() not in ARTICLES)
            noun = next((k for k in rest if clause[k].lower() not in self._beside_names), None)
            if noun in things and noun not in places:
                result[i] = "and"
        return result

    def _thing_places(self, clause: list[str]) -> set[int]:
        """Return the places of words that belong to the name of a thing."""
        return _found(clause, self._things)

    def _is_misspelt(self, word: str) -> bool:
        """Return whether a word is a known one but for one letter."""
        if not _SHORTEST_MISSPELT <= len(word) <= _LONGEST_WORD or word in _EMPTY:
            return False
        return word in self._nearly or any(
            part in self._known or part in self._nearly for part in _shortened(word)
        )


def _found(clause: list[str], phrases: frozenset[tuple[str, ...]]) -> set[int]:
    """Return the places of words that belong to one of the phrases."""
    words = [word.lower() for word in clause]
    places: set[int] = set()
    for start in range(len(words)):
        for length in range(min(_LONGEST_NAME, len(words) - start), 0, -1):
            if tuple(words[start : start + length]) in phrases:
                places.update(range(start, start + length))
                break
    return places


def _close_up(medium: re.Match[str]) -> str:
    near = re.search(r"\bclose|\bmacro", medium[0], re.IGNORECASE)
    return "a close-up of " if near else ""


def words_of(text: str) -> list[str]:
    """Return the words of a text in lower case."""
    return [word.lower() for word in _WORD.findall(text)]


def _shortened(word: str) -> set[str]:
    """Return a word without one of its letters; hardly anybody gets the first one wrong."""
    return {word[:i] + word[i + 1 :] for i in range(1, len(word))}


def _joined(clause: list[str], known: list[bool]) -> list[str]:
    """Return the known words, without articles and prepositions that are left without a noun."""
    result: list[str] = []
    for i, word in enumerate(clause):
        if not known[i]:
            continue
        gap = i > 0 and not known[i - 1]
        if gap and word.lower() in FUNCTION:
            _strip(result)
            if result and word.lower() in ARTICLES:
                result.append("and")
        elif gap and result and result[-1].lower() in ("a", "an"):
            result[-1] = result[-1][0] + ("n" if word[0].lower() in "aeiou" else "")
        result.append(word)
    if not all(known[-1:]):
        _strip(result)
    repeated = [a.lower() == b.lower() == "and" for a, b in pairwise(result)]
    return [word for word, again in zip(result, [*repeated, False], strict=True) if not again]


def _strip(words: list[str]) -> None:
    while words and words[-1].lower() in FUNCTION:
        words.pop()
