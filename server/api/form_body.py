"""multipart/form-data bodies to the fields that the same request has as JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
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
from server.api.validation import Kind, field_schema, shown_name, unknown_field

# OpenAI's edits take 16 images and a mask. A text part holds a prompt, 32,000 characters of at most
# four bytes, or a list of short ones; images are sent as files.
FORM_LIMITS = {"max_files": 17, "max_fields": 64, "max_part_size": 128 * 1024}
# As written by programs, and by the checkboxes of pages.
SWITCHES = {
    **dict.fromkeys(("true", "on", "yes", "1"), True),
    **dict.fromkeys(("false", "off", "no", "0"), False),
}
NUMBER = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)(e[+-]?[0-9]+)?")

# Names of parts as PHP and qs write them: image[] and image[0], hires[scale], keyframes[0].image.
NAME = re.compile(r"([^.\[\]]+)((?:\.[^.\[\]]+|\[[^.\[\]]*\])*)")
KEY = re.compile(r"\.([^.\[\]]+)|\[([^.\[\]]*)\]")
MAX_DIGITS = 4
TAKEN = "sent twice, or its place has another value"

Path = tuple[str, ...]
Part = tuple[str, str | bytes]


async def read_form(request: Request, schema: type[BaseModel], limit: int) -> dict[str, Any]:
    """Return the parts by name: files as bytes, text as the schema's field needs it.

    Several parts of one name (or `name[]`, or `name[0]` and so on) become a list. Parts named
    `hires[scale]` or `regions[0].prompt` become an object or a list of them. A file of such a name
    may also belong into a field that is sent as JSON text.

    Raises:
        ApiError: 400 malformed, 413 more or larger parts than allowed, 422 a part that has no place
            in the schema or among the other parts.
    """
    # What is left blank is absent.
    parts = [(name, part) for name, part in await _parts(request, limit, schema) if part != ""]
    _check_form_structure(part for _, part in parts if isinstance(part, str))
    fields = _collect([part for part in parts if not _is_nested(_path(part[0]))], schema)
    _nest(fields, [part for part in parts if _is_nested(_path(part[0]))], schema)
    return fields


class _Parser(MultiPartParser):
    """Reads parts of some names as files, with or without a file name.

    Attributes:
        complete: whether it reached the closing boundary; a form without it may be cut anywhere.
        schema: of the request, which says what is a file.
    """

    complete = False
    schema: type[BaseModel]

    def on_headers_finished(self) -> None:
        """Open a file for a part. Raises MultiPartException for one without a name."""
        part = self._current_part
        _, options = parse_options_header(part.content_disposition)
        name = options.get(b"name", b"").decode("utf-8", "replace")
        if b"filename" not in options and _takes_file(_path(name), self.schema):
            part.content_disposition = (part.content_disposition or b"") + b'; filename=""'
        super().on_headers_finished()

    def on_end(self) -> None:
        self.complete = True

    def close(self) -> None:
        """Close all files, including that of an unfinished part, unknown to the form."""
        for file in self._files_to_close_on_error:
            file.close()


async def _parts(request: Request, limit: int, schema: type[BaseModel]) -> list[Part]:
    parser = _Parser(_without_charset(request.headers), request.stream(), **FORM_LIMITS)
    parser.schema = schema
    parser.spool_max_size = limit  # nothing is written to disk: the body is bounded already
    try:
        form = await parser.parse()
        if not parser.complete:
            raise _malformed_form("it ends before its closing boundary")
        return [
            (name, await _content(part) if isinstance(part, UploadFile) else part)
            for name, part in form.multi_items()
            if _is_sent(part)
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


# ── names of parts ────────────────────────────────────────────────────────────────────────────────


def _path(name: str) -> Path:
    """Return (keyframes, 0, image) for `keyframes[0][image]` or `keyframes.0.image`.

    The position of a part named `image[]` is "". A name of another form is a path of itself.
    """
    if not (match := NAME.fullmatch(name)):
        return (name,)
    return (match[1], *(dotted or bracketed for dotted, bracketed in KEY.findall(match[2])))


def _is_position(key: str) -> bool:
    return key == "" or (len(key) <= MAX_DIGITS and key.isascii() and key.isdigit())


def _is_nested(path: Path) -> bool:
    """Return False for a field, and for an entry of its list."""
    return len(path) > 2 or (len(path) == 2 and not _is_position(path[1]))


def _takes_file(path: Path, schema: type[BaseModel]) -> bool:
    return tuple(key for key in path if not _is_position(key)) in file_fields(schema)


@cache
def file_fields(schema: type[BaseModel]) -> frozenset[Path]:
    """Return the paths, without positions, of the fields that take files."""
    found = set[Path]()
    for name, field in schema.model_fields.items():
        for kind in _kinds(field.annotation):
            if kind is bytes:
                found.add((name,))
            elif isinstance(kind, type) and issubclass(kind, BaseModel):
                found.update((name, *inner) for inner in file_fields(kind))
    return frozenset(found)


def _kinds(annotation: object) -> Iterator[object]:
    """Yield the types that an annotation names."""
    yield annotation
    for part in get_args(annotation):
        yield from _kinds(part)


# ── values ────────────────────────────────────────────────────────────────────────────────────────


def _value(text: str, path: Path, schema: type[BaseModel]) -> object:
    """Return the text for text fields, otherwise the value in it, or the text if it has none.

    Numbers may be written as in the inputs of pages (.5, +7, 007).
    """
    types = _types(path, schema)
    if "string" in types or not types:
        return text
    word = text.strip().lower()
    if word in SWITCHES and "boolean" in types:
        return SWITCHES[word]
    try:
        if NUMBER.fullmatch(word):
            return int(word) if word.lstrip("+-").isdigit() else number(word)
        return json.loads(text, parse_float=number)
    except (ValueError, RecursionError):
        return text


def _types(path: Path, schema: type[BaseModel]) -> set[str | None]:
    """Return the JSON types of the field or entry at a path, none if there is none there."""
    if path[0] not in schema.model_fields:
        return set()
    kind = _kind(path, schema)
    return set() if kind is None else {each.get("type") for each in kind.get("anyOf", [kind])}


def _kind(path: Path, schema: type[BaseModel]) -> Kind | None:
    """Return the JSON Schema at a path, the same for every position in a list."""
    return field_schema(schema, ["0" if _is_position(key) else key for key in path])


# ── fields ────────────────────────────────────────────────────────────────────────────────────────


def _in_order(entries: list[tuple[int, Any]]) -> list[Any]:
    """Return the values of (position, value) pairs by position."""
    return [value for _, value in sorted(entries, key=itemgetter(0))]


def _collect(parts: Iterable[Part], schema: type[BaseModel]) -> dict[str, Any]:
    """Return the fields of parts that are whole fields or entries of their lists."""
    values: dict[str, list[tuple[int, Any]]] = {}
    lists: set[str] = set()
    for name, content in parts:
        field, *positions = _path(name)
        if positions and "array" in _types((field,), schema):
            lists.add(field)
        value = content if isinstance(content, bytes) else _value(content, (field,), schema)
        position = int(positions[0] or 0) if positions else 0
        values.setdefault(field, []).append((position, value))
    ordered = {field: _in_order(entries) for field, entries in values.items()}
    return {
        field: sent if len(sent) > 1 or field in lists else _single(sent[0], field, schema)
        for field, sent in ordered.items()
    }


def _single(value: Any, field: str, schema: type[BaseModel]) -> Any:
    """Return a field's only value, in a list if the field takes only lists.

    Text that could not be parsed is left for the schema to reject.
    """
    if isinstance(value, list | str) or _types((field,), schema) != {"array"}:
        return value
    return [value]


def _nest(fields: dict[str, Any], parts: Iterable[Part], schema: type[BaseModel]) -> None:
    """Put parts of objects and of lists within fields into their places.

    Raises ApiError 422 for a part that has no place.
    """
    whole = frozenset(fields)
    # In the order of their positions, so that each is the next entry of its list.
    for name, content in sorted(parts, key=lambda part: _positions(_path(part[0]))):
        path = _path(name)
        if path[0] not in schema.model_fields:
            fields[path[0]] = content  # to be refused or ignored like any unknown field
            continue
        _check_path(name, path, schema)
        value = content if isinstance(content, bytes) else _value(content, path, schema)
        try:
            if path[0] not in whole:
                _place(fields, path, value, grows=True)
            elif _takes_file(path, schema):
                _place(fields, path, value, grows=False)
            else:
                raise LookupError(f"{path[0]} is also sent as one value; send all of it in one way")
        except LookupError as error:
            raise _misplaced(name, path, str(error)) from None


def _positions(path: Path) -> list[int]:
    return [int(key or 0) if _is_position(key) else 0 for key in path]


def _check_path(name: str, path: Path, schema: type[BaseModel]) -> None:
    """Raise ApiError 422 for a part of a field that the schema does not have."""
    for depth in range(1, len(path)):
        if path[depth] == "" and depth < len(path) - 1:
            raise _misplaced(name, path, "write the entry's position, from 0, into the brackets")
        if _kind(path[: depth + 1], schema) is not None:
            continue
        within = path[:depth]
        fields = (_kind(within, schema) or {}).get("properties")
        if fields:
            raise unknown_field(path[depth], fields, within)
        is_list = "array" in _types(within, schema)
        entries = "a list, with positions from 0" if is_list else "no list"
        raise _misplaced(name, path, f"{'.'.join(within)} has no such entry; it is {entries}")


def _misplaced(name: str, path: Path, reason: str) -> ApiError:
    message = f"{shown_name(name)}: {reason}"
    return ApiError(HTTPStatus.UNPROCESSABLE_ENTITY, "invalid_value", message, path[0])


def _place(target: Any, path: Sequence[str], value: object, *, grows: bool) -> None:
    """Set the value at a path in an object or a list, and make what is missing on the way.

    Args:
        target: an object or a list, or another value, which has no room.
        path: keys of objects and positions in lists.
        value: of the part.
        grows: whether a list takes another entry after its last.

    Raises LookupError that says why there is no place.
    """
    key, *rest = path
    place: Any = key
    if isinstance(target, list) and _is_position(key):
        place = int(key) if key else len(target)
        if place == len(target) and grows:
            target.append(None)
        if place >= len(target):
            raise LookupError("no such entry; positions start at 0 and have no gaps")
    elif isinstance(target, dict) and not _is_position(key):
        target.setdefault(key, None)
    else:
        raise LookupError(TAKEN)
    if rest and target[place] is None:
        target[place] = [] if _is_position(rest[0]) else {}
    if rest:
        _place(target[place], rest, value, grows=grows)
    elif target[place] in (None, ""):
        target[place] = value
    else:
        raise LookupError(TAKEN)
