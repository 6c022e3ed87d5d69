"""multipart/form-data bodies to the fields that the same request has as JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from functools import cache
from http import HTTPStatus
from operator import itemgetter
from typing import Any, get_args

from fastapi import Request
from pydantic import BaseModel
from python_multipart.multipart import parse_options_header
from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from server.api.body_limit import TEXT_BODY_BYTES
from server.api.errors import ApiError
from server.api.json_body import number, structure
from server.api.validation import json_schema

# OpenAI's edits take 16 images and a mask. A text part holds a prompt, 32,000 characters of at most
# four bytes, or a list of short ones; images are sent as files.
FORM_LIMITS = {"max_files": 17, "max_fields": 64, "max_part_size": 128 * 1024}
BOOLEANS = {"true": True, "false": False}

# Names of parts as PHP and qs write them: image[] and image[0]; keyframes[0][image] and
# keyframes[0].image.
LIST_PART = re.compile(r"(\w+)\[(\d{0,4})\]")
NESTED_PART = re.compile(r"(\w+)\[(\d{1,4})\](?:\.(\w+)|\[(\w+)\])")


async def read_form(request: Request, schema: type[BaseModel], limit: int) -> dict[str, Any]:
    """Return the parts by name: files as bytes, text as the schema's field needs it.

    Several parts of one name (or `name[]`, or `name[0]` and so on) become a list. A file named
    `keyframes.1.image` goes into entry 1 of the JSON text `keyframes`.

    Raises:
        ApiError: 400 malformed, 413 more or larger parts than allowed, 422 a file for an entry
            that does not exist.
    """
    parts = await _parts(request, limit, schema)
    fields = _collect([(name, part) for name, part in parts if "." not in name], schema)
    for name, part in parts:
        if "." in name:
            _place(fields, name, part)
    return fields


class _Parser(MultiPartParser):
    """Reads parts of some names as files, with or without a file name.

    Attributes:
        complete: whether it reached the closing boundary; a form without it may be cut anywhere.
        file_fields: names of parts that are files.
    """

    complete = False
    file_fields: frozenset[str] = frozenset()

    def on_headers_finished(self) -> None:
        """Open a file for a part. Raises MultiPartException for one without a name."""
        part = self._current_part
        _, options = parse_options_header(part.content_disposition)
        name = _dotted(options.get(b"name", b"").decode("utf-8", "replace"))
        field = match[1] if (match := LIST_PART.fullmatch(name)) else name
        if b"filename" not in options and ("." in name or field in self.file_fields):
            part.content_disposition = (part.content_disposition or b"") + b'; filename=""'
        super().on_headers_finished()

    def on_end(self) -> None:
        self.complete = True

    def close(self) -> None:
        """Close all files, including that of an unfinished part, unknown to the form."""
        for file in self._files_to_close_on_error:
            file.close()


async def _parts(
    request: Request, limit: int, schema: type[BaseModel]
) -> list[tuple[str, str | bytes]]:
    parser = _Parser(_without_charset(request.headers), request.stream(), **FORM_LIMITS)
    parser.file_fields = _file_fields(schema)
    parser.spool_max_size = limit  # nothing is written to disk: the body is bounded already
    try:
        form = await parser.parse()
        if not parser.complete:
            raise _malformed_form("it ends before its closing boundary")
        parts = [(_dotted(name), part) for name, part in form.multi_items() if _is_sent(part)]
        return [
            (name, await _content(part) if isinstance(part, UploadFile) else part)
            for name, part in parts
        ]
    except MultiPartException as error:
        raise _malformed_form(error.message) from None
    finally:
        parser.close()


def _without_charset(headers: Headers) -> Headers:
    """Return only the Content-Type, without `charset`: some of Python's codecs take minutes."""
    options = headers["content-type"].split(";")
    kept = (option for option in options if not option.strip().lower().startswith("charset"))
    return Headers({"content-type": ";".join(kept)})


def _is_sent(part: str | UploadFile) -> bool:
    """Return False for the unnamed empty file that browsers send for an unused file input."""
    return isinstance(part, str) or bool(part.filename or part.size)


async def _content(part: UploadFile) -> str | bytes:
    """Return a file's bytes, but base64 without a file name as the text it is."""
    content = await part.read()
    return content if part.filename or not content.isascii() else content.decode()


def _dotted(name: str) -> str:
    """Return `keyframes.0.image` for the other ways to write it, any other name as it is."""
    match = NESTED_PART.fullmatch(name)
    return f"{match[1]}.{match[2]}.{match[3] or match[4]}" if match else name


def _malformed_form(reason: str) -> ApiError:
    if reason.startswith(("Too many", "Part exceeded")):
        message = f"the form is too large: {reason}"
        return ApiError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "form_too_large", message)
    message = f"the body is not multipart/form-data: {reason}"
    return ApiError(HTTPStatus.BAD_REQUEST, "malformed_form", message)


def _check_form_structure(texts: Iterable[str]) -> None:
    """Check that all texts of a form together are no more intricate than a JSON body may be."""
    if sum(structure(text.encode("utf-8", "replace")) for text in texts) > TEXT_BODY_BYTES:
        reason = f"Too many commas, brackets and braces. Maximum is {TEXT_BODY_BYTES}."
        raise _malformed_form(reason)


def _collect(parts: list[tuple[str, str | bytes]], schema: type[BaseModel]) -> dict[str, Any]:
    _check_form_structure([part for _, part in parts if isinstance(part, str)])
    values: dict[str, list[tuple[int, Any]]] = {}
    lists: set[str] = set()
    for name, part in parts:
        match = LIST_PART.fullmatch(name)
        field = match[1] if match else name
        if match and field in _array_fields(schema):
            lists.add(field)
        value = part if isinstance(part, bytes) else _value(part, field, schema)
        values.setdefault(field, []).append((int(match[2] or 0) if match else 0, value))
    ordered = {
        field: [value for _, value in sorted(entries, key=itemgetter(0))]
        for field, entries in values.items()
    }
    return {
        field: sent if len(sent) > 1 or field in lists else _single(sent[0], field, schema)
        for field, sent in ordered.items()
    }


def _single(value: Any, field: str, schema: type[BaseModel]) -> Any:
    """Return a field's only value, in a list if the field takes only lists.

    Text that could not be parsed is left for the schema to reject.
    """
    if isinstance(value, list | str) or field not in _list_fields(schema):
        return value
    return [value]


@cache
def _file_fields(schema: type[BaseModel]) -> frozenset[str]:
    """Return the fields that take files."""
    fields = schema.model_fields.items()
    return frozenset(name for name, field in fields if _mentions_bytes(field.annotation))


def _mentions_bytes(kind: object) -> bool:
    return kind is bytes or any(_mentions_bytes(part) for part in get_args(kind))


def _value(text: str, field: str, schema: type[BaseModel]) -> object:
    """Return the text for text fields, otherwise the JSON in it, or the text if it is not JSON."""
    if field not in schema.model_fields or field in _text_fields(schema):
        return text
    if (word := text.strip().lower()) in BOOLEANS:
        return BOOLEANS[word]
    try:
        return json.loads(text, parse_float=number)
    except (ValueError, RecursionError):
        return text


@cache
def _text_fields(schema: type[BaseModel]) -> frozenset[str]:
    return frozenset(name for name, types in _types(schema).items() if "string" in types)


@cache
def _array_fields(schema: type[BaseModel]) -> frozenset[str]:
    return frozenset(name for name, types in _types(schema).items() if "array" in types)


@cache
def _list_fields(schema: type[BaseModel]) -> frozenset[str]:
    return frozenset(
        name for name, types in _types(schema).items() if types - {"null"} == {"array"}
    )


def _types(schema: type[BaseModel]) -> dict[str, set[str | None]]:
    """Return every field's JSON types; None for a type that is a reference in the schema."""
    properties = json_schema(schema)["properties"]
    return {name: _types_of(kind) for name, kind in properties.items()}


def _types_of(kind: dict[str, Any]) -> set[str | None]:
    return {branch.get("type") for branch in kind.get("anyOf", [kind])}


def _place(fields: dict[str, Any], name: str, part: str | bytes) -> None:
    """Put the part `keyframes.1.image` into its entry."""
    *path, last = name.split(".")
    try:
        target: Any = fields
        for key in path:
            target = target[_position(key)] if isinstance(target, list) else target[key]
        if not isinstance(target, dict) or isinstance(part, str):
            raise TypeError
        target[last] = part
    except (KeyError, IndexError, ValueError, TypeError):
        message = f"{name[:80]}: not a file, or no such entry in the JSON text before the first dot"
        param = path[0][:80] or None
        raise ApiError(HTTPStatus.UNPROCESSABLE_ENTITY, "invalid_value", message, param) from None


def _position(key: str) -> int:
    """Return a list's position. Raises ValueError for others than digits, such as −1."""
    if not (key.isascii() and key.isdigit()):
        raise ValueError
    return int(key)
