"""Read changes of a recipe from short text, for command lines: `steps=4,renoise_order=halton`."""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import Any

from pydantic import TypeAdapter, ValidationError

from model.config import Recipe


class RecipeError(ValueError):
    """A text that is no change of a recipe."""


_SHORT = {"steps": "num_inference_steps", "guidance": "guidance_scale"}
_PAIRS = ("guidance_scale", "temperature", "attention_weights")
# Step counts that keep their share of the steps.
_SHARES = ("renoise_steps", "guidance_steps", "guidance_start")


def changed(recipe: Recipe, text: str) -> Recipe:
    """Return a recipe with the changes in a text such as `steps=4,temperature=0.5:0.2`.

    A pair is `first:last`, or one number for both. `steps` and `guidance` are short for
    num_inference_steps and guidance_scale. Step counts that are not named keep their share of the
    steps. Raises ValueError for an unknown name or an invalid value.
    """
    changes = _parsed(text)
    kept = recipe.sampling(steps=int(changes.get("num_inference_steps", 0)) or None)
    shares = {name: getattr(kept, name) for name in _SHARES}
    try:
        return TypeAdapter(Recipe).validate_python(asdict(recipe) | shares | changes)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "recipe"
        raise RecipeError(f"{text!r}: {where}: {first['msg']}") from None


def _parsed(text: str) -> dict[str, Any]:
    """Return the changed fields by name; the values of pairs are pairs, all others text."""
    known = {field.name for field in fields(Recipe)}
    changes: dict[str, Any] = {}
    for part in filter(None, text.split(",")):
        name, _, value = part.partition("=")
        name = _SHORT.get(name, name)
        if name not in known or not value:
            allowed = ", ".join(sorted(known | _SHORT.keys()))
            raise RecipeError(f"{part!r} is not NAME=VALUE with a NAME of {allowed}")
        first, _, last = value.partition(":")
        changes[name] = (first, last or first) if name in _PAIRS else value
    if not changes.get("num_inference_steps", "1").isdigit():
        raise RecipeError(f"steps must be a number, not {changes['num_inference_steps']!r}")
    return changes
