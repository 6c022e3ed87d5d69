"""Collect the words of the captions, and write them into a bundle's configuration.

    python -m model.training.vocabulary runs/tiny

`model.vocabulary` says what they are for.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

from model.config import BundleConfig, find_bundle, needed_format
from model.training.caption_words import (
    CLOSE_UP_AFTER,
    CLOSE_UP_BEFORE,
    COLOUR_WORDS,
    FILLERS,
    NUMBER_WORDS,
    PLAIN,
    RELATION_WORDS,
    SCENE_WORDS,
    SIDE_WORDS,
    SIZE_WORDS,
    TAGGED,
    names_of,
)
from model.training.kinds import KINDS, NAMES_OF_KINDS
from model.training.palette import NAMES
from model.training.scenery import SCENES
from model.vocabulary import Vocabulary, words_of


def vocabulary() -> Vocabulary:
    """Return what captions can say: the names of all kinds, and further words."""
    things = {
        " ".join(words_of(name))
        for names in map(names_of, NAMES_OF_KINDS)
        for name in (names.usual, names.plural, *names.synonyms)
    }
    tables = (COLOUR_WORDS, SIZE_WORDS, SIDE_WORDS, RELATION_WORDS, NUMBER_WORDS)
    texts = [
        *(text for table in tables for texts in table.values() for text in texts),
        *(text for scene in SCENE_WORDS.values() for texts in scene for text in texts),
        *(*CLOSE_UP_BEFORE, *CLOSE_UP_AFTER, *FILLERS, *PLAIN, *TAGGED, *NAMES, *SCENES),
        *(tag for kind in KINDS for tag in kind.tags),
    ]
    words = {word for text in texts for word in words_of(text)}
    return Vocabulary(", ".join(sorted(things)), " ".join(sorted(words)))


def main() -> None:
    """Write the vocabulary into the bundle that the command line names."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("bundle", help="name or path; only its bundle.json changes")
    directory = find_bundle(p.parse_args().bundle)
    config = BundleConfig.read(directory)
    collected = vocabulary()
    format = needed_format(config.presets, (config.denoiser, *config.denoisers.values()), collected)
    replace(config, vocabulary=collected, format=format).write(directory)
    names, words = collected.things.count(",") + 1, len(collected.words.split())
    print(f"{directory}: {names} names, {words} further words")


if __name__ == "__main__":
    main()
