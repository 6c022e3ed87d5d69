"""Collect the words of the captions, and write them into a bundle's configuration.

    python -m model.training.vocabulary runs/tiny

`model.vocabulary` says what they are for.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from model.config import BundleConfig, Recipe, find_bundle, needed_format
from model.training import command
from model.training.caption_words import (
    CLOSE_UP_AFTER,
    CLOSE_UP_BEFORE,
    COLOUR_WORDS,
    FILLERS,
    NUMBER_WORDS,
    PLAIN,
    SCENE_WORDS,
    SIDE_WORDS,
    SIZE_WORDS,
    names_of,
)
from model.training.kinds import KINDS, NAMES_OF_KINDS
from model.training.palette import NAMES
from model.training.scenery import SCENES
from model.training.scenes import DEFAULTS, kind_of, visible_on
from model.vocabulary import ARTICLES, FUNCTION, Thing, Vocabulary, words_of

# Words of English that `Vocabulary.corrected` would take for misspelt words of captions: of the
# small and the middle word list of SCOWL, whose licence permits any use, but for rare ones; and
# about a hundred names and informal words, found with wordfreq (CC BY-SA 4.0). Plurals of other
# words of the list are left out.
_ENGLISH = Path(__file__).with_name("english.txt")

# Names that captions do not have, because they would be those of colours.
SYNONYMS = {
    "tangerine": ("an orange", "the orange", "orange fruit"),
    "tulip": ("flower",),
    "bouquet": ("flowers",),
    "soccer ball": ("ball",),
    "cup of coffee": ("cup", "mug"),
    "handbag": ("bag",),
    "bowl with spoon": ("bowl",),
    "lotion bottle": ("bottle",),
    "t-shirt": ("shirt",),
    "crossed swords": ("sword", "swords"),
    "palm tree": ("palm",),
}
# Kinds of things for the thing that is most like them.
SYNONYMS |= {
    usual: (*SYNONYMS.get(usual, ()), *kinds.split(", "))
    for usual, kinds in {
        "cricket bat": "baseball bat",
        "crystal ball": "snow globe",
        "lollipop": "candy cane",
        "cookie": "gingerbread man, gingerbread",
        "bird": "sparrow, seagull, gull, robin, woodpecker, hummingbird, canary, finch, blue jay, "
        "kingfisher, pelican, stork, heron, toucan, vulture",
        "dove": "pigeon",
        "eagle": "hawk, falcon",
        "dog": "golden retriever, labrador, pug, bulldog, german shepherd, husky, dalmatian, "
        "chihuahua, corgi, beagle, dachshund, shiba inu, border collie, terrier, rottweiler, "
        "pomeranian, doggo, pup",
        "fish": "goldfish, koi, trout, tuna, catfish",
        "tropical fish": "clownfish",
        "whale": "orca, narwhal",
        "seal": "walrus",
        "lizard": "iguana, chameleon, salamander, newt",
        "monkey": "chimpanzee, chimp, baboon",
        "t-rex": "triceratops, velociraptor",
        "tulip": "daffodil, poppy, lily, orchid",
        "tree": "oak, tree branch",
        "house": "cabin, mansion, villa",
        "church": "cathedral",
        "chair": "armchair",
        "window": "window sill",
        "coat": "raincoat",
        "cup of coffee": "hot chocolate, cup of hot chocolate, cup of cocoa",
        "fire truck": "firefighter truck",
        "pickup truck": "monster truck",
        "horse": "mare, foal",
        "guitar": "ukulele",
        "piece of cake": "cheesecake",
    }.items()
}
# Names that people use for other things.
_MISLEADING = frozenset(("big wheel", "world"))
_KINDS = """
    animal bird fish insect fruit vegetable flower plant vehicle building clothing footwear headwear
    instrument weapon tool dessert sport pet reptile rodent mammal food drink
"""

# Words of captions for those that people also use.
ALIASES: dict[str, str] = {
    other: word
    for word, others in {
        "red": "crimson, scarlet, ruby, cherry red, maroon, burgundy, vermilion, brick red, "
        "blood red, fire engine red, wine red, carmine, cardinal red",
        "orange": "amber, apricot coloured, tangerine coloured, copper, rust coloured, ginger, "
        "terracotta, carrot orange, coral",
        "yellow": "golden, gold, lemon yellow, mustard yellow, blond, blonde, ginger yellow, "
        "mustard, canary yellow, sunny yellow",
        "green": "emerald, emerald green, lime green, olive green, mint green, olive, lime, mint, "
        "jade, forest green, sage green, khaki, chartreuse, grass green, sea green",
        "cyan": "teal, aqua, aquamarine, sky blue, light blue, baby blue, pale blue, blue green, "
        "turquoise blue",
        "blue": "navy, navy blue, royal blue, cobalt, azure, sapphire, indigo, cobalt blue, "
        "ultramarine, denim blue, midnight blue, electric blue",
        "purple": "lavender, lilac, mauve, plum coloured, plum, amethyst, orchid purple, lavendar",
        "pink": "magenta, fuchsia, rosy, hot pink, salmon pink, salmon, coral pink, rose gold, "
        "baby pink, bubblegum pink, peach coloured, peach colored, coral coloured, coral colored",
        "brown": "tan, chestnut, chocolate brown, beige, wooden, bronze, caramel, sepia, "
        "hazel, taupe, auburn, sand coloured, coffee coloured",
        "gray": "silver, silvery, charcoal, slate gray, slate grey, ash grey, ash gray",
        "white": "ivory, cream coloured, cream colored, snow white, off white, pearl white",
        "black": "ebony, jet black, pitch black, onyx",
        "large": "giant, gigantic, enormous, massive, oversized",
        "small": "miniature, mini, teeny, wee",
        "background": "backdrop, back ground",
        "black background": "dark background",
        "forest": "jungle, rainforest, rain forest",
        "in a forest": "in a jungle, in the jungle, in a rainforest, in the rainforest",
        "meadow": "garden, park, field, farm, hill, countryside, prairie, backyard, farmland",
        "in a meadow": "in a garden, in the garden, in a park, in the park, in a field, on a lawn, "
        "on a farm, on the farm, on a hill, at the farm, at the park, in the countryside, "
        "in nature, on a green field",
        "room": "kitchen, bedroom, bathroom, classroom, museum, library",
        "in a room": "in a museum, in a kitchen, in the kitchen, in a bedroom, in an office, "
        "in a house, in the house, in my house, at school, in a cafe, in a restaurant",
        "city": "town, village, new york, nyc",
        "in a city": "in a town, in new york, in the streets, in tokyo, in paris, in london, "
        "on the road, on a road, in a village, in the village, in traffic",
        "sandy beach": "seashore, lagoon, coast",
        "at the beach": "at the seaside, on the shore, at the shore, on an island, by the ocean",
        "sea": "lake, river, pond, swimming pool, sea water",
        "on the sea": "in the water, in the ocean, on a lake, on the lake, in a lake, on a river, "
        "in a pond, on a pond, in the pond, in a pool, in the pool, in a river, in the river",
        "in the mountains": "on a mountain, on the mountain, in the hills",
        "in the snow": "at the north pole, on an iceberg, on the ice, on ice, in antarctica, "
        "in the arctic, in the winter, in a snowstorm, in a blizzard, at the south pole",
        "in the desert": "in egypt, in the sahara, in the savanna, in the savannah, on the sand",
        "in the sky": "in the air, in the clouds, flying in the sky, above the clouds",
        "at sunset": "at dawn, at sunrise, at twilight, in the evening, during sunset, "
        "at golden hour, in the sunset",
        "sunset": "sunrise, dawn, dusk, twilight, golden hour",
        "at night": "at midnight, at nighttime, during the night, in the dark, "
        "in the moonlight, under the moon, under a full moon, in darkness",
        "night sky": "night, midnight, nighttime",
        "in space": "in the universe, among the stars, on the moon, on mars, from space",
        "outer space": "universe, cosmos, milky way",
        "underwater": "below the sea, beneath the sea, on the sea bed, under the ocean",
    }.items()
    for other in others.split(", ")
}


# What a prompt of nothing but a scene shows.
_SHOWN_IN = {
    "day sky": "a cloud in the sky",
    "sunset": "a sun at sunset",
    "starry night": "a crescent moon at night",
    "sea": "a sailboat at sea",
    "meadow": "a sunflower in a meadow",
    "desert": "a cactus in the desert",
    "snow": "a snowman in the snow",
    "forest": "a tree in a forest",
    "space": "saturn in space",
    "beach": "a beach umbrella on the beach",
    "mountains": "a mountain in the mountains",
    "city": "an office building in the city",
    "underwater": "a dolphin underwater",
    "room": "a couch in a room",
}

# Shapes are drawn in all colours; without one in the caption, in several at once.
_PAINTED = {
    "circle": "red",
    "square": "blue",
    "triangle": "green",
    "star": "yellow",
    "heart": "red",
    "cross": "red",
    "diamond": "blue",
    "ring": "yellow",
    "crescent": "yellow",
}


def vocabulary() -> Vocabulary:
    """Return what captions can say."""
    scenes = [text for scene in SCENE_WORDS.values() for texts in scene for text in texts]
    sides = [text for texts in SIDE_WORDS.values() for text in texts]
    views = [*CLOSE_UP_BEFORE, *CLOSE_UP_AFTER, *SCENES]
    places = {" ".join(words_of(text)) for text in (*scenes, *sides, *views)} - FUNCTION
    colours = _words_of([*NAMES, *(word for words in COLOUR_WORDS.values() for word in words)])
    sizes = _words_of(word for words in SIZE_WORDS.values() for word in words)
    numbers = [text for texts in NUMBER_WORDS.values() for text in texts]
    return Vocabulary(
        things=tuple(map(_thing, NAMES_OF_KINDS)),
        places=tuple(sorted(places)),
        colours=" ".join(sorted(colours)),
        sizes=" ".join(sorted(sizes)),
        words=" ".join(sorted(_words_of([*numbers, *FILLERS, *PLAIN]) - FUNCTION)),
        aliases=ALIASES,
        backgrounds={f"on a {colour} background": _hidden_by(colour) for colour in DEFAULTS},
        kinds=" ".join(_KINDS.split()),
        english=" ".join(_ENGLISH.read_text().split()),
        scenes={shown: ", ".join(_said_of(name)) for name, shown in _SHOWN_IN.items()},
        painted=_PAINTED,
    )


def _said_of(scene: str) -> list[str]:
    """Return the words of captions for a scene, and without their articles."""
    said = [text for texts in SCENE_WORDS[scene] for text in texts]
    bare = [" ".join(text.split()[1:]) for text in said if text.split()[0] in ARTICLES]
    return [*dict.fromkeys((*said, *bare))]


def _hidden_by(colour: str) -> str:
    """Return the names of the objects that are hard to see on a background of this colour."""
    return ", ".join(
        kind.name for kind in KINDS if colour not in visible_on(kind.name, kind.colour)
    )


def _thing(kind: str) -> Thing:
    names, of_art = names_of(kind), kind_of(kind)
    return Thing(
        names.usual,
        names.plural,
        tuple(
            name
            for name in (*names.synonyms, *SYNONYMS.get(names.usual, ()))
            if name not in _MISLEADING
        ),
        tags=of_art.tags if of_art else (),
        colour=of_art.colour if of_art else None,
        bare=names.usual in names.bare,
    )


def _words_of(texts: Iterable[str]) -> set[str]:
    return {word for text in texts for word in words_of(text)}


def with_vocabulary(config: BundleConfig, words: Vocabulary | None) -> BundleConfig:
    """Return the configuration with another vocabulary, or with none, and the format for it.

    With one, all presets draw the things of a prompt each in its own part of the image.
    """

    def with_regions(recipe: Recipe) -> Recipe:
        return replace(recipe, auto_regions=words is not None)

    denoisers = (config.denoiser, *config.denoisers.values())
    presets = {
        name: replace(preset, recipe=with_regions(preset.recipe))
        for name, preset in config.presets.items()
    }
    return replace(
        config,
        vocabulary=words,
        recipe=with_regions(config.recipe),
        presets=presets,
        format=needed_format(presets, denoisers, words),
    )


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
    kept = f"{len(words.things)} things" if words else "no vocabulary"
    print(f"{directory}: {kept}")


if __name__ == "__main__":
    command.run(main)
