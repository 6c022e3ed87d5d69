"""A vocabulary for the prompt reader."""

from __future__ import annotations

from model.vocabulary import Thing, Vocabulary


def named(*names: str) -> tuple[Thing, ...]:
    return tuple(Thing(name, f"{name}s") for name in names)


THINGS = named(
    *("apple", "cat", "bird", "duck", "dragon", "horse", "lion", "robot", "van", "zebra", "circle"),
    *("square", "painting", "umbrella", "hotel", "scarf", "fire engine", "bell", "dog face"),
)
WORDS = Vocabulary(
    things=(
        *THINGS,
        Thing("couch", "couches", ("sofa",)),
        Thing("sun hat", "sun hats", ("hat",), ("straw", "beach wear")),
        Thing("dog", "dogs", ("puppy",), ("pet", "loyal", "animal")),
        Thing("banana", "bananas", (), ("fruit", "monkey food"), "yellow"),
        Thing("cherry", "cherries", (), ("fruit", "cake topping"), "red"),
        Thing("lemon", "lemons", (), ("fruit", "sour"), "yellow"),
        Thing("gloves", "pairs of gloves", ("pair of gloves",), bare=True),
        Thing("tangerine", "tangerines", ("an orange", "orange fruit"), ("fruit",), "orange"),
        Thing("melon", "melons", (), ("fruit",)),
        Thing("grapes", "grapes", (), ("fruit",)),
        Thing("mountain", "mountains"),
        Thing("silver medal", "silver medals"),
        Thing("dice", "dice", ("die",)),
        Thing("rainbow", "rainbows"),
        Thing("wand", "wands"),
        Thing("sheep", "sheep"),
        Thing("hay", "hay", ("bundle of straw",)),
        Thing("helmet", "helmets", (), ("headwear",)),
    ),
    places=(
        *("on the left", "on the right", "at the top", "in the top left corner", "top", "bottom"),
        *(
            "in the bottom right corner",
            "at the beach",
            "beach",
            "the beach",
            "sunset",
            "at sunset",
        ),
        *(
            "in the snow",
            "snow",
            "forest",
            "a forest",
            "in a forest",
            "sea",
            "mountain",
            "mountains",
        ),
        *("close-up", "up close", "a close-up of", "underwater", "deep in the ocean"),
        *("in the middle", "against the sky", "under the stars", "floating in space"),
    ),
    colours="red green blue yellow white black orange brown",
    sizes="small tiny large big",
    words="two three four 2 3 4 couple pair cute background plain just",
    kinds="fruit animal",
    aliases={"crimson": "red", "sky blue": "blue", "in a jungle": "in a forest"},
    english="spots crowd there score",
)
