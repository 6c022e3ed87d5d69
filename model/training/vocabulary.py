"""Collect the words of the captions, and write them into a bundle's configuration.

    python -m model.training.vocabulary runs/tiny

`model.vocabulary` says what they are for.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
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
from model.vocabulary import FUNCTION, Vocabulary, words_of


def vocabulary() -> Vocabulary:
    """Return what captions can say."""
    things = {
        " ".join(words_of(name))
        for names in map(names_of, NAMES_OF_KINDS)
        for name in (names.usual, names.plural, *names.synonyms)
    }
    scenes = [text for scene in SCENE_WORDS.values() for texts in scene for text in texts]
    positions = (*SIDE_WORDS.values(), *RELATION_WORDS.values())
    sides = [text for texts in positions for text in texts]
    views = [*CLOSE_UP_BEFORE, *CLOSE_UP_AFTER, *SCENES]
    places = {" ".join(words_of(text)) for text in (*scenes, *sides, *views)} - FUNCTION
    properties = (*COLOUR_WORDS.values(), *SIZE_WORDS.values(), *NUMBER_WORDS.values())
    texts = [text for texts in properties for text in texts]
    words = _words_of([*texts, *FILLERS, *PLAIN, *TAGGED, *NAMES, "in front of"])
    tags = _words_of(tag for kind in KINDS for tag in kind.tags)
    return Vocabulary(
        things=", ".join(sorted(things)),
        places=", ".join(sorted(places)),
        words=" ".join(sorted(words)),
        tags=" ".join(sorted(tags - words)),
    )


def _words_of(texts: Iterable[str]) -> set[str]:
    return {word for text in texts for word in words_of(text)}


def with_vocabulary(config: BundleConfig, words: Vocabulary | None) -> BundleConfig:
    """Return the configuration with another vocabulary, or with none, and the format for it."""
    denoisers = (config.denoiser, *config.denoisers.values())
    format = needed_format(config.presets, denoisers, words)
    return replace(config, vocabulary=words, format=format)


def main() -> None:
    """Write or remove the vocabulary of the bundle that the command line names."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("bundle", help="name or path; only its bundle.json changes")
    p.add_argument(
        "--remove", action="store_true", help="read prompts as they are: for captions of your own"
    )
    args = p.parse_args()
    directory = find_bundle(args.bundle)
    words = None if args.remove else vocabulary()
    with_vocabulary(BundleConfig.read(directory), words).write(directory)
    kept = f"{words.things.count(',') + 1} names" if words else "no vocabulary"
    print(f"{directory}: {kept}")


if __name__ == "__main__":
    main()
