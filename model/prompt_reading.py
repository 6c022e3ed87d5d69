"""Read prompts as captions: the things, places and colours that small weights know, in their words.

A prompt is cut into clauses and these into units: a thing with its properties ("a small red
apple"), a place ("at the beach"), a side ("on the left"), a relation ("above"), or a property of
the whole ("a blue background"). A noun that is not known takes its properties with it: of "a red
cup" nothing stays. What is left are a caption, and the parts of the image that it names.

A prompt that names nothing known stays as it is, whatever its language.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from model.prompt_groups import LOOKS, Unit, joined
from model.prompt_parts import Part, background_of, parts_of
from model.prompt_translation import translated, with_emoji_named
from model.prompt_units import Clauses, Parser, is_foreign
from model.vocabulary import FUNCTION, LONGEST_PHRASE, Phrase, Vocabulary, with_article, words_of

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
_PREPOSITION = r"(?:on|in|at|with|near|under|above|and|of|an?|the|\w+ing)\b"
_IN_STYLE = re.compile(
    rf"\b(?:in|with) (?:the )?styles? of (?:(?!{_PREPOSITION})[\w.'-]+ ?){{1,4}}", re.I
)
_ARTIST = re.compile(
    r"(?:\b(?:by|in the style of) )?\b(?:(?:vincent )?van gogh|picasso|(?:claude )?monet|manet"
    r"|dali|rembrandt|(?:leonardo )?da vinci|klimt|warhol|banksy|hokusai|kandinsky|matisse|cezanne"
    r"|(?:studio )?ghibli|disney|pixar)\b(?: style)?",
    re.I,
)
_BY_NAME = re.compile(r"\bby [A-Z][\w.'-]*(?: (?:[A-Z][\w.'-]*|van|von|de|da|di|der|el))*")
_BLACK_AND_WHITE = re.compile(
    r"\bblack[- ]and[- ]white(?= (?:\w+ )?(?:photo|picture|image|drawing|sketch|line|film))", re.I
)
_AND = re.compile(r"[&+/]")
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

_CLAUSE_MARKS = " \t\r\n.,;:!?"

# Words that ask for something by what is said of it.
_SOMETHING_WORDS = "something anything thing things stuff do this like about with an a"
_SOMETHING = frozenset(_SOMETHING_WORDS.split())
_DESCRIBED = re.compile(
    r"\bsomething (?:to do with|like|about|for|with)|\ba thing (?:like|about)", re.I
)


class Reading(NamedTuple):
    """Tell what is read of a prompt.

    text: a caption. parts: if it names two to four things, a caption of each, and where it is; the
    first has what the others leave of the image. background: what the caption of a whole image has
    behind the text, because it names a thing and no scene. shown: the caption of a whole image
    for a text that names a scene and no thing.
    """

    text: str
    parts: tuple[Part, ...] = ()
    background: str = ""
    shown: str = ""

    @property
    def whole(self) -> str:
        """The caption of a whole image, not of a part of one."""
        if not self.background:
            return self.shown or self.text
        return f"{self.text.rstrip(_CLAUSE_MARKS)} {self.background}"


def read(vocabulary: Vocabulary, prompt: str) -> Reading:
    """Return what a vocabulary's captions can say of a prompt.

    Left out are requests ("could you draw me"), media and looks ("oil painting, highly detailed"),
    what is not wanted ("without a hat"), marks of other programs (`<lora:x:1>`, `--ar 16:9`) and
    nouns that no caption has, with their properties. Synonyms, misspelt words and descriptions
    become the usual names.
    """
    written = _cleaned(prompt)
    cleaned = with_emoji_named(vocabulary, written)
    text = _caption(vocabulary, prompt, written, cleaned)
    if words_of(text) == words_of(prompt) and cleaned == prompt.strip() and "\n" not in cleaned:
        text = prompt
    text = text.lower() if prompt.isupper() else text
    if len(text) > _LONGEST_READ:
        return Reading(text)
    clauses = Clauses(vocabulary, text)
    if not _names_thing(clauses):
        return Reading(text, shown=_scene(vocabulary, clauses))
    units = clauses.units
    return Reading(text, parts_of(vocabulary, units), background_of(vocabulary, units))


def read_negative(vocabulary: Vocabulary, prompt: str) -> str:
    """Return what of a negative prompt captions can say; nothing of what they do not know."""
    clauses = Clauses(vocabulary, _cleaned(prompt))
    return clauses.text if clauses.units else ""


def _caption(vocabulary: Vocabulary, prompt: str, written: str, cleaned: str) -> str:
    """Return the caption of a prompt.

    written: the same without the marks of other programs. cleaned: that without emoji.
    """
    in_english = translated(vocabulary, cleaned) if is_foreign(words_of(cleaned)) else cleaned
    clauses = Clauses(vocabulary, _requested(vocabulary, in_english))
    described = bool(_DESCRIBED.search(cleaned))
    if _names_thing(clauses) and not described:
        return clauses.text
    if caption := _described(vocabulary, clauses, certain=described):
        return caption
    if described:
        return prompt
    for text in (cleaned, written):
        other = Clauses(vocabulary, _requested(vocabulary, translated(vocabulary, text)))
        if _names_thing(other):
            return other.text
    return other.text if _scene(vocabulary, other) else _unnamed(clauses, prompt)


def _names_thing(clauses: Clauses) -> bool:
    return any(unit.role == "thing" for unit in clauses.units)


def _scene(vocabulary: Vocabulary, clauses: Clauses) -> str:
    """Return a caption that shows the scene of a prompt that names no thing; nothing without one.

    Of several scenes, the first is shown before the last: "mountains at night".
    """
    scenes = [unit for unit in clauses.units if unit.role == "place"]
    shown = [*filter(None, (_shown(vocabulary, unit.words) for unit in scenes))]
    if not shown or (len(scenes) > 1 and vocabulary.thing(scenes[0].words)):
        return ""
    thing, *_ = Clauses(vocabulary, shown[0]).units
    *_, behind = Clauses(vocabulary, shown[-1]).units
    return " ".join([thing.text, *behind.lead, behind.text])


def _shown(vocabulary: Vocabulary, words: Phrase) -> str:
    """Return a caption that shows the scene that words end with."""
    ends = (vocabulary.scene(words[start:]) for start in range(len(words)))
    return next(filter(None, ends), "")


def _cleaned(prompt: str) -> str:
    """Return a prompt without the marks of other programs."""
    text = _TAG.sub(" ", _INFOTEXT.sub(" ", prompt[:_LONGEST_READ]))
    text = _WEIGHT.sub(" , ", _FLAG.sub(" ", _WITHOUT_FLAG.sub(" ", text)))
    text = _OPTICS.sub(" ", _BRACKETS.sub(" ", text))
    text = _BLACK_AND_WHITE.sub(" ", _IN_STYLE.sub(" ", _BY_NAME.sub(" ", _ARTIST.sub(" ", text))))
    return _AND.sub(" and ", _AGE.sub(" ", text).replace("#", ",")).strip()


def _requested(vocabulary: Vocabulary, text: str) -> str:
    """Return a text without "could you draw me", unless it begins with a name ("paint brush")."""
    first = words_of(text[:200])[:LONGEST_PHRASE]
    if any(vocabulary.thing(first[:n]) for n in range(2, len(first) + 1)):
        return text
    return _ASKED.sub("", text, count=1)


def _unnamed(clauses: Clauses, prompt: str) -> str:
    """Return a prompt that names no thing: all of it, unless it begins with a scene or a colour."""
    each = list(clauses)
    while each and each[0].asks_for_a_look:
        each.pop(0)
    if not each or not each[0].units:
        return prompt
    first, *others = each
    return ", ".join([" ".join(first.words), *(joined(o.units) for o in others if o.units)])


def _described(vocabulary: Vocabulary, clauses: Clauses, *, certain: bool) -> str | None:
    """Return the caption of a thing that is described without its name; None if none is.

    certain: whether the prompt says that it describes. Otherwise each of its words must be one that
    is said of things.
    """
    tags: list[Phrase] = []
    others: list[Unit] = []
    colours: list[str] = []
    background: Phrase = ()
    for clause in clauses:
        words, named = _without_background(vocabulary, clause.words)
        background = background or named
        said, rest = _tags(vocabulary, words, certain=certain)
        units = [unit for unit in Parser(vocabulary, rest).units if unit.role != "thing"]
        shows_scene = any(u.role == "place" and "background" not in u.words for u in units)
        known = {word for unit in units for word in unit.words} | _SOMETHING | FUNCTION | LOOKS
        known |= {*filter(vocabulary.is_property, rest)}
        colours += filter(vocabulary.is_colour, rest)
        if not certain and (shows_scene or not known.issuperset(rest)):
            return None
        tags += said
        others += units
    thing = vocabulary.described(tags, colours)
    if thing is None or not (certain or vocabulary.says_enough(tags)):
        return None
    sides = [unit.text for unit in others if unit.role == "side"][:1]
    scenes = [u.text for u in others if u.role == "place" or "background" in u.words][:1]
    name = thing.name if thing.bare else with_article(thing.name)
    text = " ".join([name, *sides])
    if background[:1] == ("on",):
        return " ".join([text, *background])
    return ", ".join([text, " ".join(background)] if background else [text, *scenes])


def _without_background(vocabulary: Vocabulary, words: Phrase) -> tuple[Phrase, Phrase]:
    """Part a clause from the background at its end: "on red", "the background is red"."""
    if words[-4:-1] == ("the", "background", "is"):
        return words[:-4], words[-4:]
    if len(words) > 2 and words[-2] == "on" and vocabulary.is_colour(words[-1]):
        return words[:-2], words[-2:]
    return words, ()


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
