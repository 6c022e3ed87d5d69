"""Read prompts as captions: the things, places and colours that small weights know, in their words.

A prompt is cut into clauses and these into units: a thing with its properties ("a small red
apple"), a place ("at the beach"), a side ("on the left"), a relation ("above"), or a property of
the whole ("a blue background"). A noun that is not known takes its properties with it: of "a red
cup" nothing stays. What is left are a caption, and the parts of the image that it names.

A prompt that names nothing known stays as it is, whatever its language.
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

Box = tuple[float, float, float, float]
Role = Literal["thing", "place", "side", "relation", "property"]
Kind = Literal["article", "property", "number", "thing", "place", "unknown"]

# ── what other programs and people write around a prompt ──────────────────────────────────────────

_LONGEST_READ = 1024  # characters; encoders of small weights read a few hundred
_INFOTEXT = re.compile(r"^\s*(?:negative prompt:|steps: \d).*", re.I | re.M | re.S)
_TAG = re.compile(r"<[^<>]{0,200}>")  # <lora:name:0.8>
_WITHOUT_FLAG = re.compile(r"(?:--|[\u2014\u2013])no\b(?:(?!\s--).)*", re.I | re.S)
_FLAG = re.compile(
    r"(?:^|(?<=\s))(?:--|[\u2014\u2013])[a-z]+\b(?:[ =][\d.:/x]+)?", re.I
)  # --ar 16:9
_WEIGHT = re.compile(r"::?-?\d+(?:\.\d+)?(?=[)\]\s,]|$)")  # (word:1.2), word::2
_BRACKETS = re.compile(r"[()\[\]{}]")
_OPTICS = re.compile(r"\bf/\d+(?:\.\d+)?|\b\d+(?:\.\d+)?(?:mm|k|p|px|:\d+|/\d+|x\d+)\b", re.I)
_AGE = re.compile(
    r"\b(?:\w+|\d+)[ -](?:year|month|week|day)s?[ -]olds?\b"
    r"|\b\w+[ -](?:legged|headed|eyed|seater|wheeled|dimensional)\b",
    re.I,
)
_BY_ARTIST = re.compile(r"\bby [A-Z][\w.'-]*(?: (?:[A-Z][\w.'-]*|van|von|de|da|di|der|el))*")
_IN_STYLE = re.compile(
    r"\b(?:in|with) (?:the )?styles? of (?:(?!(?:on|in|at|with|near|under|above|and)\b)[\w.'-]+ ?)"
    r"{1,4}",
    re.I,
)
_ASKED = re.compile(
    r"^[^\w<(]*(?:/?imagine(?: prompt)?\b[: ]*)?"
    r"(?:(?:hi|hello|hey|please|kindly|ok|okay)\b[ ,.!]*)*"
    r"(?:(?:can|could|would|will) you\b[ ,]*(?:please )?)?"
    r"(?:(?:i want|i need|i'd like|i would like|give me|let's see|let me see)\b *"
    r"(?:you to |to (?:see|have) )?)?"
    r"(?:(?:please )?(?:draw|paint|make|create|generate|render|produce|design|illustrate|show)\b *"
    r"(?:me |us |for me )?)?",
    re.I,
)
_CLAUSE_END = re.compile(r"[,;|\n\u3001\u3002\uff0c\uff1b]+|[.!?:](?=\s|$)")

# ── words ─────────────────────────────────────────────────────────────────────────────────────────

# Kinds of images, which are not things in them: "an oil painting of a cat".
_MEDIA_WORDS = """
    photo photograph photography picture image drawing painting illustration render rendering
    sketch portrait icon artwork art shot view style styled aesthetic wallpaper poster sticker logo
    clipart cartoon anime 3d emoji screenshot print
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
_LOOKS = _MEDIA | frozenset(_LOOK_WORDS.split())
_NEGATION_WORDS = "no not without never except excluding minus don't isn't doesn't"
_NEGATIONS = frozenset(_NEGATION_WORDS.split())
_ENDS_NEGATION = frozenset(("and", "but", "just", "only"))
_CLOSE_UP = frozenset(("close", "closeup", "macro"))
# Words that ask for something by what is said of it.
_SOMETHING_WORDS = "something anything thing things stuff do this like about with an a"
_SOMETHING = frozenset(_SOMETHING_WORDS.split())
_DESCRIBED = re.compile(
    r"\bsomething (?:to do with|like|about|for|with)|\ba thing (?:like|about)", re.I
)
_IS = frozenset(("is", "are", "that", "it", "its", "this"))
_PREPOSITIONS = FUNCTION - ARTICLES - _IS - frozenset(("and", "or", "of"))

_SIDE_WORDS = {word: word for word in ("top", "bottom", "left", "right")}
_SIDE_WORDS |= {"upper": "top", "lower": "bottom"}
_SIDE_WORDS |= dict.fromkeys(("middle", "center", "centre", "centered"), "centre")
_BESIDE, _RIGHT_OF, _ABOVE, _BELOW = (
    ("left", "right"), ("right", "left"), ("top", "bottom"), ("bottom", "top"),
)  # fmt: skip
# How captions say where one thing is to another, and the sides of the two.
_RELATIONS: dict[Phrase, tuple[str, str]] = {
    words_of(said): sides
    for sides, many in (
        (_BESIDE, "next to, beside, left of, to the left of, on the left of"),
        (_RIGHT_OF, "right of, to the right of, on the right of"),
        (_ABOVE, "above, over"),
        (_BELOW, "below, under"),
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
# Where a part of an image lies, and how captions say that.
_SIDES: dict[str, tuple[str, Box]] = {
    "left": ("on the left", (0, 0, 0.5, 1)),
    "right": ("on the right", (0.5, 0, 1, 1)),
    "top": ("at the top", (0, 0, 1, 0.5)),
    "bottom": ("at the bottom", (0, 0.5, 1, 1)),
    "top left": ("at the top left", (0, 0, 0.5, 0.5)),
    "top right": ("at the top right", (0.5, 0, 1, 0.5)),
    "bottom left": ("at the bottom left", (0, 0.5, 0.5, 1)),
    "bottom right": ("at the bottom right", (0.5, 0.5, 1, 1)),
}
_OPPOSITE = {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}
_PLACES_OF: dict[int, tuple[str, ...]] = {
    2: _BESIDE,
    3: ("top left", "top right", "bottom"),
    4: ("top left", "top right", "bottom left", "bottom right"),
}


class Part(NamedTuple):
    """A part of an image, and the prompt for it. box: (x0, y0, x1, y1), fractions of the image."""

    prompt: str
    box: Box


class Reading(NamedTuple):
    """What is read of a prompt.

    text: a caption. parts: if it names two to four things, a caption of each, and where it is; the
    first has what the others leave of the image.
    """

    text: str
    parts: tuple[Part, ...] = ()


@dataclass(frozen=True)
class _Unit:
    """What a few words of a clause say.

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


def read(vocabulary: Vocabulary, prompt: str) -> Reading:
    """Return what a vocabulary's captions can say of a prompt.

    Left out are requests ("could you draw me"), media and looks ("oil painting, highly detailed"),
    what is not wanted ("without a hat"), marks of other programs (`<lora:x:1>`, `--ar 16:9`) and
    nouns that no caption has, with their properties. Synonyms, misspelt words and descriptions
    become the usual names.
    """
    text = _caption(vocabulary, prompt)
    text = prompt if words_of(text) == words_of(prompt) else text
    text = text.lower() if prompt.isupper() else text
    if len(text) > _LONGEST_READ:
        return Reading(text)
    return Reading(text, _parts(vocabulary, _Clauses(vocabulary, text)))


def read_negative(vocabulary: Vocabulary, prompt: str) -> str:
    """Return what of a negative prompt captions can say; nothing of what they do not know."""
    clauses = _Clauses(vocabulary, _cleaned(prompt))
    return clauses.text if clauses.units else ""


def _caption(vocabulary: Vocabulary, prompt: str) -> str:
    cleaned = _cleaned(prompt)
    clauses = _Clauses(vocabulary, _requested(vocabulary, cleaned))
    described = bool(_DESCRIBED.search(cleaned))
    if any(unit.role == "thing" for unit in clauses.units) and not described:
        return clauses.text
    if caption := _described(vocabulary, clauses, certain=described):
        return caption
    return prompt if described else _unnamed(clauses, prompt)


def _cleaned(prompt: str) -> str:
    """Return a prompt without the marks of other programs."""
    text = _TAG.sub(" ", _INFOTEXT.sub(" ", prompt[:_LONGEST_READ]))
    text = _WEIGHT.sub(" , ", _FLAG.sub(" ", _WITHOUT_FLAG.sub(" ", text)))
    text = _OPTICS.sub(" ", _BRACKETS.sub(" ", text))
    return _AGE.sub(" ", _IN_STYLE.sub(" ", _BY_ARTIST.sub(" ", text))).strip()


def _requested(vocabulary: Vocabulary, text: str) -> str:
    """Return a text without "could you draw me", unless it begins with a name ("paint brush")."""
    first = words_of(text[:200])[:LONGEST_PHRASE]
    if any(vocabulary.thing(first[:n]) for n in range(2, len(first) + 1)):
        return text
    return _ASKED.sub("", text, count=1)


def _unnamed(clauses: _Clauses, prompt: str) -> str:
    """Return a prompt that names no thing: all of it, unless it begins with a scene or a colour."""
    each = list(clauses)
    while each and each[0].asks_for_a_look:
        each.pop(0)
    if not each or not each[0].units:
        return prompt
    first, *others = each
    return ", ".join([" ".join(first.words), *(_joined(o.units) for o in others if o.units)])


def _described(vocabulary: Vocabulary, clauses: _Clauses, *, certain: bool) -> str | None:
    """Return the caption of a thing that is described without its name; None if none is.

    certain: whether the prompt says that it describes. Otherwise each of its words must be one that
    is said of things.
    """
    tags: list[Phrase] = []
    others: list[_Unit] = []
    for clause in clauses:
        said, rest = _tags(vocabulary, clause.words, certain=certain)
        units = [unit for unit in _Parser(vocabulary, rest).units if unit.role != "thing"]
        known = {word for unit in units for word in unit.words} | _SOMETHING | FUNCTION | _LOOKS
        if not certain and not known.issuperset(rest):
            return None
        tags += said
        others += units
    colours = [word for unit in others for word in unit.words if vocabulary.is_colour(word)]
    thing = vocabulary.described(tags, colours)
    if thing is None:
        return None
    sides = [unit.text for unit in others if unit.role == "side"][:1]
    scenes = [u.text for u in others if u.role == "place" or "background" in u.words][:1]
    name = thing.name if thing.bare else with_article(thing.name)
    return ", ".join([" ".join([name, *sides]), *scenes])


def _tags(vocabulary: Vocabulary, words: Phrase, *, certain: bool) -> tuple[list[Phrase], Phrase]:
    """Return the phrases of a clause that are said of things, and its other words."""

    def is_tag(phrase: Phrase) -> bool:
        if not vocabulary.is_tag(phrase) or FUNCTION.issuperset(phrase):
            return False
        means_more = vocabulary.is_place(phrase) or vocabulary.alias(phrase)
        return certain or not (means_more or vocabulary.is_property(phrase[0]))

    found, rest, i = list[Phrase](), list[str](), 0
    while i < len(words):
        longest = min(LONGEST_PHRASE, len(words) - i)
        tag = next((p for n in range(longest, 0, -1) if is_tag(p := words[i : i + n])), None)
        if tag and words[i + len(tag) : i + len(tag) + 1] != ("background",):
            found.append(tag)
        else:
            rest.append(words[i])
            tag = None
        i += len(tag or words[:1])
    return found, tuple(rest)


class _Clauses:
    """A text, clause by clause."""

    def __init__(self, vocabulary: Vocabulary, text: str) -> None:
        texts = map(words_of, _CLAUSE_END.split(text))
        clauses = [_Clause(words, _Parser(vocabulary, words).units) for words in texts if words]
        # "Oil painting" beside something else is no painting in the image.
        said = [clause for clause in clauses if not clause.is_medium]
        self._all = said if any(clause.units for clause in said) else clauses

    def __iter__(self) -> Iterator[_Clause]:
        return iter(self._all)

    @property
    def units(self) -> list[_Unit]:
        return [unit for clause in self for unit in clause.units]

    @property
    def text(self) -> str:
        """The caption."""
        return ", ".join(_joined(clause.units) for clause in self if clause.units)


class _Clause(NamedTuple):
    """The words of a clause, and its units."""

    words: Phrase
    units: Sequence[_Unit]

    @property
    def is_medium(self) -> bool:
        """Whether it only names a kind of images that is also a thing, as "oil painting"."""
        return len(self.units) == 1 and self.units[0].words[0] in _MEDIA

    @property
    def asks_for_a_look(self) -> bool:
        """Whether it says nothing but how the image should look."""
        return not self.units and all(w in _LOOKS | FUNCTION or w.isdigit() for w in self.words)


class _Parser:
    """Part the words of a clause into units.

    Words without a preposition between them are a group, such as "a small red apple", which becomes
    a unit when it ends.
    """

    def __init__(self, vocabulary: Vocabulary, words: Phrase) -> None:
        self._vocabulary = vocabulary
        self._units: list[_Unit] = []
        self._lead: list[str] = []
        self._group: list[_Item] = []
        self._gap = False
        self._late: list[_Unit] = []
        self._as_written = words
        words = tuple(vocabulary.corrected(word) or word for word in words)
        i = 0
        while i < len(words):
            i += self._take(words, i)
        self._close()
        self._units += self._late

    @property
    def units(self) -> list[_Unit]:
        """The units; a relation that is not between two things leads to a place or is left out."""
        kept: list[_Unit] = []
        for i, unit in enumerate(self._units):
            before, after = kept[-1:], self._units[i + 1 : i + 2]
            if before and self._says_of(unit, before[0]):
                kept[-1] = _coloured(before[0], unit.words)
                continue
            if unit.role != "relation" or [u.role for u in before + after] == ["thing", "thing"]:
                relation = self._units[i - 1] if i else unit
                leads = unit.role == "place" and relation.role == "relation"
                lead = (*relation.words, *unit.lead) if leads else unit.lead
                kept.append(replace(unit, lead=lead))
        return kept

    def _says_of(self, unit: _Unit, before: _Unit) -> bool:
        """Return whether a unit is the colour of the thing before it: "a cat that is black"."""
        colours = unit.role == "property" and all(map(self._vocabulary.is_colour, unit.words))
        return colours and before.role == "thing" and not _IS.isdisjoint(unit.lead)

    def _take(self, words: Phrase, i: int) -> int:
        """Take the longest known phrase at a place, or one word; return how many words it has."""
        if words[i] in _NEGATIONS:
            self._close()
            self._gap = True
            ends = (k for k in range(i + 1, len(words)) if words[k] in _ENDS_NEGATION)
            return next(ends, len(words)) - i
        longest = max(self._vocabulary.longest(words[i]), _LONGEST_RELATION.get(words[i], 1))
        for n in range(min(longest, LONGEST_PHRASE, len(words) - i), 0, -1):
            following = words[i + n] if i + n < len(words) else None
            written = self._as_written[i : i + n]
            phrase = written if n > 1 and self._vocabulary.thing(written) else words[i : i + n]
            if self._take_phrase(phrase, following):
                return n
        self._take_word(words[i])
        return 1

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
        elif (alias or known.is_place(phrase)) and not (named and self._is_thing(following)):
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
        elif "thing" in kinds:
            self._add_thing(group)
        elif before == "of" and last.words[-1] in _MEDIA | _CLOSE_UP:
            self._add_medium(group)
        elif last.kind == "unknown" and not (last.words[0] in _LOOKS and "place" in kinds):
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
        if _CLOSE_UP & set(_words_of(group)):
            self._add("place", ("a", "close-up", "of"))
            return
        if place := _words_of(group, ("place",)):
            self._late.append(_Unit("place", place, gap=True))
        self._leave_out()

    def _says_something(self, group: Sequence[_Item], before: str) -> bool:
        """Return whether a group without a noun does: a colour, a background, "a pair"."""
        words = [word for item in group for word in item.words]
        if before == "of" and any(item.kind == "number" for item in group):
            return True
        return any(word == "background" or self._vocabulary.is_colour(word) for word in words)

    def _with_properties(self, group: list[_Item]) -> list[_Item]:
        """Return a group in which names that only describe another one are properties.

        So is "orange" in "an orange cat", "an orange background" and "on orange".
        """
        known, result = self._vocabulary, list(group)
        for i, item in enumerate(group):
            describes = any(other.kind == "thing" for other in group[i + 1 :])
            describes |= any(other.words == ("background",) for other in group[i + 1 :])
            describes |= len(group) == 1 and self._lead[-1:] == ["on"]
            words = [word for word in item.words if word not in ARTICLES]
            if item.kind == "thing" and describes and all(map(known.is_property, words)):
                result[i : i + 1] = [_Item("property", item.words)]
        return result

    def _add_thing(self, group: Sequence[_Item]) -> None:
        number = max(i for i, item in enumerate(group) if item.kind == "thing")
        named = group[number].named
        assert named is not None
        kept = [item for item in group[: number + 1] if item.kind != "unknown"]
        words = (*_words_of(kept[:-1]), *named.name.split())
        self._add("thing", _agreeing(words, named), named=named)

    def _add(
        self,
        role: Role,
        words: Phrase,
        *,
        named: Named | None = None,
        sides: tuple[str, ...] = (),
    ) -> None:
        self._units.append(_Unit(role, words, tuple(self._lead), self._gap, named, sides))
        self._lead, self._gap = [], False


def _coloured(unit: _Unit, colours: Phrase) -> _Unit:
    """Return a thing with further colours."""
    assert unit.named is not None
    words = (*unit.beside_name, *colours, *unit.named.name.split())
    return replace(unit, words=_agreeing(words, unit.named))


def _agreeing(words: Phrase, named: Named) -> Phrase:
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


def _joined(units: Sequence[_Unit]) -> str:
    """Return the caption of a clause's units."""
    text, before, has_thing = "", None, False
    for unit in units:
        text = _with(text, unit, _lead(unit, before, has_thing=has_thing))
        before, has_thing = unit, has_thing or unit.role == "thing"
    return text


def _with(text: str, unit: _Unit, lead: Sequence[str]) -> str:
    """Return a text and one unit more, behind a comma if nothing else joins them."""
    words = " ".join((*lead, *unit.words))
    if not text:
        return words
    bare = unit.gap and unit.role in ("place", "property") and not lead
    return f"{text}, {words}" if bare and unit.words[0] not in _PREPOSITIONS else f"{text} {words}"


def _lead(unit: _Unit, before: _Unit | None, *, has_thing: bool) -> Sequence[str]:
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


# ── captions → parts ──────────────────────────────────────────────────────────────────────────────


def _parts(vocabulary: Vocabulary, clauses: _Clauses) -> tuple[Part, ...]:
    """Return the parts of an image that show one thing each; none if one prompt says it better.

    Small weights draw one thing far better than two, and hardly ever three. Each is called small,
    because a thing of the usual size does not fit into a part.
    """
    units = clauses.units
    things = [i for i, unit in enumerate(units) if unit.role == "thing"]
    words = {word for unit in units for word in unit.beside_name}
    if (
        len(things) not in _PLACES_OF
        or words & (NUMBERS | _CLOSE_UP)
        or any(map(str.isdigit, words))
    ):
        return ()
    sides = _sides_of(units, things)
    scenes = [unit for unit in units if unit.role in ("place", "property")]
    parts = []
    for i, side in zip(things, sides, strict=True):
        phrase, box = _SIDES[side]
        text = f"{_small(vocabulary, units[i])} {phrase}"
        for scene in scenes:
            text = _with(text, replace(scene, gap=True), _lead(scene, units[i], has_thing=True))
        if not scenes and vocabulary.background:
            text = f"{text} {vocabulary.background}"
        parts.append(Part(text, box))
    return tuple(parts)


def _sides_of(units: Sequence[_Unit], things: Sequence[int]) -> Sequence[str]:
    """Return where each thing lies: as said, or side by side."""
    usual = _PLACES_OF[len(things)]
    if len(things) > 2:
        return usual
    first, second = things
    between = units[first + 1 : second]
    relation = next((unit.sides for unit in between if unit.role == "relation"), None)
    if relation:
        return relation
    leading = any(unit.role == "side" for unit in units[:first])
    places = (units[:first], between) if leading else (between, units[second + 1 :])
    one, other = (_side_in(part) for part in places)
    if one and other:
        return (one, other) if one != other else usual
    if one in _OPPOSITE:
        return one, _OPPOSITE[one]
    return (_OPPOSITE[other], other) if other in _OPPOSITE else usual


def _side_in(units: Sequence[_Unit]) -> str:
    """Return the first side that is said of a part of an image, or nothing."""
    sides = (unit.sides[0] for unit in units if unit.role == "side")
    return next((side for side in sides if side in _SIDES), "")


def _small(vocabulary: Vocabulary, unit: _Unit) -> str:
    """Return a thing with its properties, and called small."""
    article = [word for word in unit.words[:1] if word in ARTICLES]
    rest = [word for word in unit.words[len(article) :] if not vocabulary.is_size(word)]
    return " ".join([*(["a"] if article else []), "small", *rest])
