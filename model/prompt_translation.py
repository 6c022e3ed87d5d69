"""Put emoji, words of other languages and ideas into the words of captions.

A prompt of "🐶 on the beach", "un perro en la playa" or "christmas" names nothing that English
captions have. Its words are replaced by those of captions; what is not known stays.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from model.vocabulary import (
    ARTICLES,
    FUNCTION,
    LONGEST_PHRASE,
    NUMBERS,
    Phrase,
    Vocabulary,
    words_of,
)

_FILE = Path(__file__).with_name("translations.txt")
_IDEOGRAPH = "\u3040-\u30ff\u3400-\u9fff"
_ONE_EMOJI = (
    "[\u2190-\u21ff\u231a-\u23ff\u25a0-\u27bf\u2900-\u297f\u2b00-\u2bff\U0001f000-\U0001faff]"
    "[\ufe0f\U0001f3fb-\U0001f3ff]*"
)
_TOKEN = re.compile(
    f"{_ONE_EMOJI}(?:\u200d{_ONE_EMOJI})*|[{_IDEOGRAPH}]|(?:(?![{_IDEOGRAPH}])[^\\W_])+"
)
_VARIANTS = re.compile("[\u0300-\u036f\ufe0f\U0001f3fb-\U0001f3ff]")
_BETWEEN = " \t-'\u2019"  # what may stand between the words of a phrase
_LONGEST_OF_EMOJI = 3  # words of a thing in a Unicode name: "slice of pizza"
_COUNTS = ("two", "three", "four")


class _Token(NamedTuple):
    """A word, an emoji or a Chinese or Japanese character. joined: with the one before it."""

    word: str
    start: int
    end: int
    joined: bool

    @property
    def is_emoji(self) -> bool:
        return not self.word[0].isalnum()

    @property
    def is_ideograph(self) -> bool:
        return len(self.word) == 1 and "\u3040" <= self.word <= "\u9fff"


def translated(vocabulary: Vocabulary, text: str) -> str:
    """Return a text with all that can be said in the words of captions."""
    return _replaced(vocabulary, text, _tokens(text), only_emoji=False)


def with_emoji_named(vocabulary: Vocabulary, text: str) -> str:
    """Return a text with the names of those emoji that are part of a sentence.

    In "a cat with a 🎩" it is; in "a cat 🐱✨" it is a decoration.
    """
    tokens = _tokens(text)
    if not any(token.is_emoji for token in tokens):
        return text
    return _replaced(vocabulary, text, tokens, only_emoji=True)


def _tokens(text: str) -> list[_Token]:
    """Return words in lower case and without accents, emoji without their variants."""
    found: list[_Token] = []
    end = 0
    for match in _TOKEN.finditer(text):
        word = _VARIANTS.sub("", unicodedata.normalize("NFD", match[0].lower()))
        joined = not text[end : match.start()].strip(_BETWEEN)
        found.append(_Token(word, match.start(), match.end(), joined))
        end = match.end()
    return found


@cache
def _dictionary() -> dict[Phrase, Phrase]:
    """Return the words of captions for all others."""
    found: dict[Phrase, Phrase] = {}
    for own, others in translations():
        for other in others:
            found.setdefault(tuple(token.word for token in _tokens(other)), words_of(own))
    return found


@cache
def _longest() -> dict[str, int]:
    """Return how many words the longest phrase has that begins with each."""
    found: dict[str, int] = {}
    for phrase in _dictionary():
        found[phrase[0]] = max(len(phrase), found.get(phrase[0], 1))
    return found


def is_foreign_word(word: str, english: str) -> bool:
    """Return whether a word is one of another language that does not mean this English one."""
    return _dictionary().get((word,), (english,)) != (english,)


def translations() -> Iterator[tuple[str, list[str]]]:
    """Yield words of captions, and emoji and words of other languages and for ideas for them."""
    for line in _FILE.read_text(encoding="utf-8").splitlines():
        own, _, others = line.partition(": ")
        if others and not own.startswith("#"):
            yield own, others.split(", ")


def _known(vocabulary: Vocabulary, phrase: Phrase) -> Phrase:
    """Return the words for a phrase, if a vocabulary's captions have them; else nothing."""
    words = _dictionary().get(phrase, ())
    shown = words and (
        words[0] in FUNCTION
        or vocabulary.thing(words)
        or vocabulary.is_place(words)
        or vocabulary.is_property(words[0])
    )
    return words if shown else ()


def _replaced(
    vocabulary: Vocabulary, text: str, tokens: Sequence[_Token], *, only_emoji: bool
) -> str:
    """Return a text with other words for its tokens."""
    result = _Text(vocabulary)
    within = _within(tokens)
    end = i = 0
    while i < len(tokens):
        token, gap = tokens[i], text[end : tokens[i].start]
        if not token.joined:
            result.add_marks(gap)
        if only_emoji and token.is_emoji and i not in within:
            end, i = token.end, i + 1
            continue
        n, words = _translation(vocabulary, tokens, i)
        end = tokens[i + n - 1].end
        if token.is_emoji:
            count = _repeated(tokens, i)
            end, n = tokens[i + count - 1].end, count
            result.add_emoji(words, count)
        elif words and not only_emoji:
            result.add_words(words)
        elif only_emoji or not token.is_ideograph:
            result.add_as_written(text[token.start : end], gap)
        i += n
    result.add_marks(text[end:])
    return " ".join([*result.parts, *result.scene])


def _phrase(tokens: Sequence[_Token], i: int, most: int) -> Phrase:
    """Return the words from a place on that nothing but spaces parts."""
    end = i + 1
    while end < min(i + most, len(tokens)) and tokens[end].joined:
        end += 1
    return tuple(token.word for token in tokens[i:end])


def _scene(vocabulary: Vocabulary, tokens: Sequence[_Token], i: int) -> int:
    """Return how many tokens a scene has that begins there in the words of captions."""
    phrase = _phrase(tokens, i, LONGEST_PHRASE)
    lengths = range(len(phrase), 0, -1)
    return next((n for n in lengths if vocabulary.is_place(phrase[:n])), 0)


def _translation(vocabulary: Vocabulary, tokens: Sequence[_Token], i: int) -> tuple[int, Phrase]:
    """Return how many tokens the longest known phrase at a place has, and the words for it.

    A scene in the words of captions has no others: "in winter".
    """
    if known := _scene(vocabulary, tokens, i):
        return known, ()
    longest = _phrase(tokens, i, _longest().get(tokens[i].word, 1))
    for n in range(len(longest), 0, -1):
        phrase = longest[:n]
        if n == 1 and (phrase[0] in FUNCTION or vocabulary.is_property(phrase[0])):
            break  # English, though "the" is tea in French
        if words := _known(vocabulary, phrase):
            return n, words
    return 1, _unicode_name(vocabulary, tokens[i].word) if tokens[i].is_emoji else ()


def _unicode_name(vocabulary: Vocabulary, emoji: str) -> Phrase:
    """Return what captions have of the Unicode names of an emoji's characters, such as "globe"."""
    names = [words_of(unicodedata.name(each, "")) for each in emoji if each != "\u200d"]
    for name in names:
        if name[:1] == ("regional",):  # half of a flag
            continue
        for n in range(min(len(name), _LONGEST_OF_EMOJI), 0, -1):
            for start in range(len(name) - n + 1):
                phrase = name[start : start + n]
                if named := vocabulary.thing(phrase):
                    coloured = start > 0 and vocabulary.is_colour(name[start - 1])
                    return (*name[start - coloured : start], *words_of(named.name))
                if n > 1 and (words := _known(vocabulary, phrase)):
                    return words
    return ()


def _repeated(tokens: Sequence[_Token], i: int) -> int:
    """Return how many equal tokens follow each other, this one included."""
    end = i + 1
    while end < len(tokens) and tokens[end].joined and tokens[end].word == tokens[i].word:
        end += 1
    return end - i


def _within(tokens: Sequence[_Token]) -> set[int]:
    """Return the numbers of the emoji that are beside a function word of their sentence."""
    found: set[int] = set()
    start = 0
    for is_emoji, run in groupby(tokens, key=lambda token: token.is_emoji):
        end = start + sum(1 for _ in run)
        before = tokens[start - 1].word if start and tokens[start].joined else ""
        after = tokens[end].word if end < len(tokens) and tokens[end].joined else ""
        if is_emoji and (before in FUNCTION | NUMBERS or after in FUNCTION - ARTICLES):
            found.update(range(start, end))
        start = end
    return found


class _Text:
    """A text as it grows. parts: its words and marks. scene: one said before all, for the end."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._thing_at: int | None = None  # where the last thing begins, if nothing follows it
        self._several = False
        self._after_emoji = False
        self._as_written = False
        self.parts: list[str] = []
        self.scene: Phrase = ()

    def add_marks(self, marks: str) -> None:
        """Add what stands between words."""
        if marks := marks.strip():
            self._add(marks)
            self._several = False

    def add_as_written(self, words: str, gap: str) -> None:
        """Add words that have no others. gap: what is between them and the words before."""
        if self._as_written and gap.strip():  # "don't"
            words = f"{self.parts.pop()}{gap}{words}"
        self._add(words)
        self._as_written = True
        self._several = words.lower() in (*_COUNTS, "2", "3", "4")

    def add_emoji(self, words: Phrase, count: int) -> None:
        """Add the name of an emoji that stands there so many times."""
        if not words:
            return
        several = count > 1 and not self._several
        if self._after_emoji:
            self.parts.append(",")
        if several:
            self._add(_COUNTS[min(count, len(_COUNTS) + 1) - 2])
        self._add(" ".join(self._plural(words) if several or self._several else words))
        self._after_emoji, self._several = True, False

    def add_words(self, words: Phrase) -> None:
        """Add words of captions: a colour before the thing that it follows."""
        known = self._vocabulary
        if known.is_place(words) and words[0] in FUNCTION and not self.parts:
            self.scene = words
            return
        if self._thing_at is not None and all(map(known.is_property, words)):
            self.parts.insert(self._thing_at, " ".join(words))
            return
        if self._several:
            words = self._plural(words)
        self._add(" ".join(words))
        is_thing = known.thing(words) is not None
        self._thing_at = len(self.parts) - 1 if is_thing else None
        if is_thing or not ARTICLES.isdisjoint(words):
            self._several = False
        self._several |= " ".join(words) in _COUNTS

    def _add(self, words: str) -> None:
        self.parts.append(words)
        self._thing_at, self._after_emoji, self._as_written = None, False, False

    def _plural(self, words: Phrase) -> Phrase:
        """Return words for several of what words are for one of."""
        for start in range(len(words)):
            named = self._vocabulary.thing(words[start:])
            if named:
                return (*words[:start], *words_of(named.thing.plural))
        return words
