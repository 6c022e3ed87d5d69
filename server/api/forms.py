"""multipart/form-data → the dict that the same request would be as JSON, so that one schema serves both."""

from __future__ import annotations

import json
from functools import cache
from http import HTTPStatus
from typing import Any

from fastapi import Request
from pydantic import BaseModel
from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from server.api.errors import ApiError

# A part of text holds a prompt, or a list of them; pictures are sent as files.
LIMITS = {"max_files": 16, "max_fields": 64, "max_part_size": 128 * 1024}

# Beyond, a float may stand for several integers.
LARGEST_EXACT = 2**53
BOOLEANS = {"true": True, "false": False}


async def read_form(request: Request, schema: type[BaseModel], limit: int) -> dict[str, Any]:
    """The parts by name: files as bytes, text as the schema's field wants it, several of one name (or `name[]`) as a list.

    A file named `keyframes.1.image` goes into entry 1 of the JSON text `keyframes`. Raises ApiError: 400 malformed, 413 more or larger
    parts than a form may have, 422 a file for an entry that is not there.
    """
    parts = await _parts(request, limit)
    fields = _collect([(name, part) for name, part in parts if "." not in name], schema)
    for name, part in parts:
        if "." in name:
            _place(fields, name, part)
    return fields


class _Parser(MultiPartParser):
    """Knows whether it has seen the closing boundary; what comes before it may be cut anywhere otherwise."""

    complete = False

    def on_end(self) -> None:
        self.complete = True

    def close(self) -> None:
        """All of its files, that of an unfinished part among them, of which the form does not know."""
        for file in self._files_to_close_on_error:
            file.close()


async def _parts(request: Request, limit: int) -> list[tuple[str, str | bytes]]:
    parser = _Parser(_without_charset(request.headers), request.stream(), **LIMITS)
    parser.spool_max_size = limit  # nothing is written to disk: the body is bounded already
    try:
        form = await parser.parse()
        if not parser.complete:
            raise _refusal("it ends before its closing boundary")
        return [(name, await part.read() if isinstance(part, UploadFile) else part) for name, part in form.multi_items() if _sent(part)]
    except MultiPartException as error:
        raise _refusal(error.message) from None
    finally:
        parser.close()


def _without_charset(headers: Headers) -> Headers:
    """Only the Content-Type, without the parameter that may choose any of Python's codecs; some of them take minutes."""
    options = headers["content-type"].split(";")
    return Headers({"content-type": ";".join(option for option in options if not option.strip().lower().startswith("charset"))})


def _sent(part: str | UploadFile) -> bool:
    """Browsers send an unnamed empty file for a file input that nobody used."""
    return isinstance(part, str) or bool(part.filename or part.size)


def _refusal(reason: str) -> ApiError:
    if reason.startswith(("Too many", "Part exceeded")):
        return ApiError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "form_too_large", f"the form is too large: {reason}")
    return ApiError(HTTPStatus.BAD_REQUEST, "malformed_form", f"the body is not multipart/form-data: {reason}")


def _collect(parts: list[tuple[str, str | bytes]], schema: type[BaseModel]) -> dict[str, Any]:
    values: dict[str, list[Any]] = {}
    listed = {name.removesuffix("[]") for name, _ in parts if name.endswith("[]")}
    for name, part in parts:
        field = name.removesuffix("[]")
        values.setdefault(field, []).append(part if isinstance(part, bytes) else _value(part, field, schema))
    return {field: sent if len(sent) > 1 or field in listed else _alone(sent[0], field, schema) for field, sent in values.items()}


def _alone(value: Any, field: str, schema: type[BaseModel]) -> Any:
    """A value as its field wants it: where only a list fits, it is one of one. What could not be read is left for the schema to refuse."""
    return value if isinstance(value, list | str) or field not in _list_fields(schema) else [value]


def _value(text: str, field: str, schema: type[BaseModel]) -> object:
    """Text for the fields that take text, otherwise the JSON it is; what is not JSON stays text, and the schema refuses it."""
    if field not in schema.model_fields or field in _text_fields(schema):
        return text
    if (word := text.strip().lower()) in BOOLEANS:
        return BOOLEANS[word]
    try:
        return json.loads(text, parse_float=number)
    except (ValueError, RecursionError):
        return text


def number(text: str) -> int | float:
    """A JSON number with a fraction or an exponent; 2.0 is an integer, as JSON Schema has it."""
    value = float(text)
    return int(value) if value.is_integer() and abs(value) <= LARGEST_EXACT else value


@cache
def _text_fields(schema: type[BaseModel]) -> frozenset[str]:
    return frozenset(name for name, types in _types(schema).items() if "string" in types)


@cache
def _list_fields(schema: type[BaseModel]) -> frozenset[str]:
    return frozenset(name for name, types in _types(schema).items() if types - {"null"} == {"array"})


def _types(schema: type[BaseModel]) -> dict[str, set[str | None]]:
    """Every field's JSON types; None for what has a name of its own in the schema."""
    properties = schema.model_json_schema()["properties"]
    return {name: {branch.get("type") for branch in kind.get("anyOf", [kind])} for name, kind in properties.items()}


def _place(fields: dict[str, Any], name: str, part: str | bytes) -> None:
    """Puts `keyframes.1.image` where it belongs."""
    *path, last = name.split(".")
    try:
        target: Any = fields
        for key in path:
            target = target[int(key)] if isinstance(target, list) else target[key]
        if not isinstance(target, dict) or target is fields or isinstance(part, str):
            raise TypeError
        target[last] = part
    except (KeyError, IndexError, ValueError, TypeError):
        message = f"{name[:80]}: names no entry of the JSON text before its first dot, or is no file"
        raise ApiError(HTTPStatus.UNPROCESSABLE_ENTITY, "invalid_value", message, path[0][:80] or None) from None
