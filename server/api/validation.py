"""Pydantic's errors as sentences: the field as the client wrote it, what it may be, what was sent.

The permitted values come from the schema, so every field of every endpoint is described alike.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from http import HTTPStatus
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from pydantic_core.core_schema import ErrorType

from server.api.errors import ApiError, shortened

Kind = Mapping[str, Any]
"""A JSON Schema."""

# Types of validation errors, pydantic's and ours, that have a code of their own.
CODES = {
    "missing": "missing_field",
    "image_missing": "missing_field",
    "extra_forbidden": "unknown_field",
    "image_url": "url_refused",
    "image_file_id": "unsupported_value",
    "unsupported_format": "unsupported_value",
}
# Errors of a value that no description of the permitted ones explains.
TEXTS = {
    "finite_number": "must be a finite number",
    "string_unicode": "holds half of a surrogate pair, which is no character",
}
# Errors whose text needs no value after it, or must not have one.
COMPLETE = frozenset({"secret", "image_missing", "image_twice"})
# Validators of this server raise ValueError, or PydanticCustomError with another type than these.
PYDANTIC_TYPES = frozenset(get_args(ErrorType)) - {"value_error"}

# Fields of this server, and their names in other APIs. The first that the endpoint has is meant.
OTHER_NAMES = (
    ("num_inference_steps", "steps num_steps inference_steps sampling_steps ddim_steps"),
    ("width and height", "size image_size resolution"),
    ("n", "num_images num_images_per_prompt num_outputs batch_size samples"),
    ("guidance_scale", "cfg_scale cfg guidance"),
    ("negative_prompt", "negative negative_text"),
    ("prompt", "text"),
    ("image", "init_image init_images input_image source_image"),
    ("mask", "mask_image mask_img"),
    ("strength", "denoising_strength denoise prompt_strength"),
    ("output_format", "format file_format image_format"),
    ("response_format", "format file_format image_format output_format"),
    ("seed", "random_seed noise_seed"),
    ("sampler", "sampler_name scheduler"),
    ("model", "model_name model_id checkpoint"),
    ("timeout_s", "timeout"),
)
# Names less alike than this, from 0 to 1, are other words rather than misspelt ones.
ALIKE = 0.8


def unknown_field(name: str, known: Iterable[str], within: Sequence[str] = ()) -> ApiError:
    """Return the error for a field that the endpoint, or an object at a path in it, lacks."""
    path = [*within, shown_name(name)]
    message = f"{'.'.join(path)}: {_unknown(path[-1], list(known))}"
    return ApiError(HTTPStatus.UNPROCESSABLE_ENTITY, "unknown_field", message, path[0])


def shown_name(name: str) -> str:
    """Return a field's name as messages show it: it may be long and hold lone surrogates."""
    return name[:80].encode("utf-8", "backslashreplace").decode()


def _unknown(name: str, known: Sequence[str]) -> str:
    meant = _meant(name, known)
    hint = f"; did you mean {meant}?" if meant else ";"
    return f"unknown field{hint} the fields are {', '.join(known)}"


def _meant(name: str, known: Sequence[str]) -> str | None:
    """Return the field, or the fields, that a client probably means."""
    plain = _plain(name)
    for fields, others in OTHER_NAMES:
        if plain in map(_plain, others.split()) and set(fields.split(" and ")) <= set(known):
            return fields
    by_plain = {_plain(field): field for field in known}
    near = difflib.get_close_matches(plain, by_plain, 1, ALIKE)
    return by_plain[near[0]] if near else None


def _plain(name: str) -> str:
    """Return a name without what differs between conventions, such as camelCase and snake_case."""
    return name.lower().replace("_", "").replace("-", "")


def from_validation(
    error: ValidationError,
    schema: type[BaseModel] | None = None,
    sent: object = None,
    whole: str = "body",
) -> ApiError:
    """Return the first of pydantic's errors.

    Args:
        error: pydantic's.
        schema: the request's; without it, pydantic's own words describe the permitted values.
        sent: the request's fields, so that the error names only what the client wrote.
        whole: the name of the object itself; empty: an error of no single field has only its text.
    """
    first = _of_lists(error.errors(include_url=False)[0])
    path = _path(first, sent) if schema else [str(part) for part in first["loc"]]
    param = first.get("ctx", {}).get("param") or (path[0] if path else None)
    where = ".".join(path) or param or whole
    problem = _problem(first, schema, path or [param or ""])
    message = f"{where}: {problem}" if where else problem
    code = CODES.get(first["type"], "invalid_value")
    return ApiError(HTTPStatus.UNPROCESSABLE_ENTITY, code, message, param)


def _of_lists(error: ErrorDetails) -> ErrorDetails:
    """Return the error; that of an entry which a list of fixed length lacks, as the list's."""
    *place, last = error["loc"] or ("",)
    if error["type"] != "missing" or not isinstance(last, int):
        return error
    return {**error, "type": "too_short", "loc": tuple(place)}


def _path(error: ErrorDetails, sent: object) -> list[str]:
    """Return the part of an error's location that the client wrote, without names of types."""
    path = list[str]()
    value: Any = sent
    for part in error["loc"]:
        is_entry = isinstance(value, list) and isinstance(part, int) and part < len(value)
        if is_entry or (isinstance(value, dict) and part in value):
            value = value[part]
        elif error["type"] != "missing" or part != error["loc"][-1]:
            continue
        path.append(shown_name(str(part)))
    return path


def _problem(error: ErrorDetails, schema: type[BaseModel] | None, path: Sequence[str]) -> str:
    """Return what is wrong, what is permitted and what was sent."""
    kind = field_schema(schema, path) if schema else None
    if error["type"] == "missing":
        return f"required: {permitted(kind)}" if kind else "required"
    if error["type"] == "extra_forbidden" and schema:
        parent = field_schema(schema, path[:-1]) or {}
        return _unknown(path[-1], list(parent.get("properties", ())))
    if error["type"] in COMPLETE:
        return error["msg"]
    if error["type"] in PYDANTIC_TYPES and kind:
        text = TEXTS.get(error["type"]) or f"must be {permitted(kind)}"
    else:
        text = error["msg"].removeprefix("Value error, ")
    # The whole object may hold secrets, and says nothing of what is wrong with it.
    if (kind and kind.get("writeOnly")) or not error["loc"]:
        return text
    return f"{text} (sent: {_sent(error)}){_file_hint(error)}"


def _file_hint(error: ErrorDetails) -> str:
    """Return the advice for a form's file where no field takes one."""
    if not isinstance(error["input"], bytes) or error["type"] not in PYDANTIC_TYPES:
        return ""
    return "; send it as text, not as a file (with curl: -F 'field=<file' in place of '=@file')"


def _sent(error: ErrorDetails) -> str:
    """Return the value; of a text or a list of the wrong length, the length."""
    value = error["input"]
    if error["type"] == "string_too_long" and isinstance(value, str):
        return f"{len(value)} characters"
    if error["type"] in ("too_long", "too_short") and isinstance(value, list | tuple):
        return "1 entry" if len(value) == 1 else f"{len(value)} entries"
    return shortened(value)


# ── permitted values ──────────────────────────────────────────────────────────────────────────────


@cache
def json_schema(schema: type[BaseModel]) -> dict[str, Any]:
    """Return a model's JSON Schema, made once; do not change it."""
    return schema.model_json_schema()


def field_schema(schema: type[BaseModel], path: Sequence[str]) -> Kind | None:
    """Return the JSON Schema of the field at a path (regions, 0, box), None if there is none."""
    whole = json_schema(schema)
    found: Kind = whole
    for part in path:
        inner = (_inner(branch, part) for branch in _branches(found, whole))
        first = next((each for each in inner if each is not None), None)
        if first is None:
            return None
        found = first
    branches = _branches(found, whole)
    return branches[0] if len(branches) == 1 else {"anyOf": branches}


def _inner(kind: Kind, part: str) -> Kind | None:
    """Return the JSON Schema of a property or of an entry of a list."""
    if not part.isdigit():
        inner = kind.get("properties", {}).get(part)
    else:
        entries = kind.get("prefixItems", ())
        inner = entries[int(part)] if int(part) < len(entries) else kind.get("items")
    return inner if isinstance(inner, dict) else None


def _branches(kind: Kind, whole: Kind) -> list[Kind]:
    """Return the alternatives of a JSON Schema except null, with references resolved."""
    if "$ref" in kind:
        return _branches(whole["$defs"][kind["$ref"].rpartition("/")[2]], whole)
    if "anyOf" in kind and "properties" not in kind:
        branches = [branch for each in kind["anyOf"] for branch in _branches(each, whole)]
        described = {"description": kind["description"]} if "description" in kind else {}
        return [{**described, **branch} for branch in branches]
    return [] if kind.get("type") == "null" else [kind]


def permitted(kind: Kind) -> str:
    """Return the values that a JSON Schema allows, in words."""
    branches = kind.get("anyOf", [kind])
    choices = [value for branch in branches for value in _choices(branch)]
    others = [branch for branch in branches if not _choices(branch)]
    if choices or len(branches) > 1:
        return _joined(list(dict.fromkeys([*choices, *map(permitted, others)])))
    words = WORDS.get(kind.get("type", "object"), _object)
    return words(kind)


def _choices(kind: Kind) -> list[str]:
    return [str(value) for value in kind.get("enum", [kind["const"]] if "const" in kind else [])]


def _object(kind: Kind) -> str:
    return f"an object with {_joined(list(kind.get('properties', ['fields'])))}"


def _joined(words: Sequence[str]) -> str:
    *others, last = words
    return f"{', '.join(others)} or {last}" if others else last


def _range(kind: Kind, step: int) -> str:
    """Return the bounds of a number in words. step: 1 for whole numbers, else 0."""
    low, high = kind.get("minimum"), kind.get("maximum")
    if "exclusiveMaximum" in kind:
        high = kind["exclusiveMaximum"] - step
    if step and "exclusiveMinimum" in kind:
        low = kind["exclusiveMinimum"] + step
    elif "exclusiveMinimum" in kind:
        least = f" above {_number(kind['exclusiveMinimum'])}"
        return least if high is None else f"{least}, at most {_number(high)}"
    if low is None:
        return "" if high is None else f" of at most {_number(high)}"
    return (
        f" of at least {_number(low)}"
        if high is None
        else f" from {_number(low)} to {_number(high)}"
    )


def _number(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _text(kind: Kind) -> str:
    if "maxLength" in kind:
        least = "1 to" if kind.get("minLength") else "at most"
        return f"text of {least} {kind['maxLength']} characters"
    described = str(kind.get("description", ""))
    return described[:1].lower() + described[1:] if "base64" in described else "text"


def _list(kind: Kind) -> str:
    low, high = kind.get("minItems"), kind.get("maxItems")
    entries = kind.get("prefixItems")
    if entries and all(entry == entries[0] for entry in entries):
        return f"a list of {len(entries)}, each {permitted(entries[0])}"
    if high is None:
        return "a list"
    return f"a list of {low} to {high}" if low else f"a list of at most {high}"


WORDS: dict[str, Callable[[Kind], str]] = {
    "integer": lambda kind: f"a whole number{_range(kind, 1)}",
    "number": lambda kind: f"a number{_range(kind, 0)}",
    "boolean": lambda _: "true or false",
    "string": _text,
    "array": _list,
}
