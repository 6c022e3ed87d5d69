"""Request bodies, JSON and multipart/form-data, to a validated schema or a precise error.

A form becomes the dict that the same request has as JSON, so one schema serves both. `BodyLimit`
bounds the bytes and the time of a body in transit, `BodyBudget` the bytes of all bodies together;
docs/limits.md lists the bounds.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from http import HTTPStatus
from operator import itemgetter
from typing import Any, Never, TypeVar, get_args

from fastapi import Request
from pydantic import BaseModel, ValidationError
from python_multipart.multipart import parse_options_header
from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.errors import ApiError, reason, retry_headers
from server.api.validation import from_validation, json_schema, unknown_field
from server.engine.retry_slots import RetrySlots

# Bodies of text alone are shorter, unless their prompts are far beyond what encoders read. Parsing
# megabytes of brackets would block the event loop for seconds.
TEXT_BODY_BYTES = 128 * 1024
# A body with images in it is long strings and little else: as many commas, brackets and braces as
# a full text body could have.
STRUCTURE = (b",", b"[", b"{")
# Entries of lists and objects in one field. Eight regions with every field have about a hundred.
MAX_ENTRIES = 1000
# OpenAI's edits take 16 images and a mask. A text part holds a prompt, 32,000 characters of at most
# four bytes, or a list of short ones; images are sent as files.
FORM_LIMITS = {"max_files": 17, "max_fields": 64, "max_part_size": 128 * 1024}
# Beyond, a float may stand for several integers.
LARGEST_EXACT = 2**53
BOOLEANS = {"true": True, "false": False}

# How long others' bodies take is unknown here, seconds.
BUDGET_RETRY_S = 1.0
BUDGET_SPACING_S = 0.25

# Names of parts as PHP and qs write them: image[] and image[0]; keyframes[0][image] and
# keyframes[0].image.
LIST_PART = re.compile(r"(\w+)\[(\d{0,4})\]")
NESTED_PART = re.compile(r"(\w+)\[(\d{1,4})\](?:\.(\w+)|\[(\w+)\])")

JSON = "application/json"
FORM = "multipart/form-data"

Schema = TypeVar("Schema", bound=BaseModel)


async def read_body(request: Request, schema: type[Schema], limit: int) -> Schema:
    """Read and validate a body: JSON with images as base64, or a form with images as files.

    Args:
        request: the request.
        schema: the fields, for both content types.
        limit: bytes.

    Raises:
        ApiError: 415 for other content types and encoded bodies, 413 beyond `limit` or the parts a
            form may have, 400 malformed, 422 rejected by the schema.
    """
    _check_encoding(request)
    if _media_type(request) == FORM:
        return _validate(await _read_form(request, schema, limit), schema)
    body = await _read(request, limit)
    _check_structure(body)
    return _validate(_parse(body), schema)


def body_too_large(limit: int) -> ApiError:
    """Return the error for a body beyond `limit` bytes."""
    message = f"the body may have at most {limit} bytes"
    return ApiError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "body_too_large", message)


def body_too_slow(message: str) -> ApiError:
    """Return the error for a body that did not arrive in time."""
    # On a kept connection, the rest of the body would be taken for the next request.
    headers = {"Connection": "close"}
    return ApiError(HTTPStatus.REQUEST_TIMEOUT, "body_too_slow", message, headers=headers)


def _check_encoding(request: Request) -> None:
    sent = request.headers.get("content-encoding", "").strip()
    if sent.lower() not in ("", "identity"):
        message = f"Content-Encoding is not supported; send the body as it is (sent: {sent[:80]!r})"
        # By RFC 9110 the header that tells this status from an unsupported Content-Type.
        headers = {"Accept-Encoding": "identity"}
        status = HTTPStatus.UNSUPPORTED_MEDIA_TYPE
        raise ApiError(status, "unsupported_content_encoding", message, headers=headers)


def _media_type(request: Request) -> str:
    sent = request.headers.get("content-type", "")
    media_type = sent.partition(";")[0].strip().lower()
    if media_type not in (JSON, FORM):
        message = f"Content-Type must be {JSON} or {FORM} (sent: {sent[:80]!r})"
        raise ApiError(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "unsupported_media_type", message)
    return media_type


def _validate(sent: dict[str, Any], schema: type[Schema]) -> Schema:
    fields = _without_absent(sent, schema)
    if schema.model_config.get("extra") == "ignore":
        fields = {name: value for name, value in fields.items() if name in schema.model_fields}
    # Pydantic rejects these too, but only after writing an error for every single one.
    unknown = next((name for name in fields if name not in schema.model_fields), None)
    if unknown is not None:
        raise unknown_field(unknown, schema.model_fields)
    for name, value in fields.items():
        _check_length(name, value, _max_entries(schema).get(name))
    try:
        return schema.model_validate(fields)
    except ValidationError as error:
        raise from_validation(error, schema, fields) from None


def _without_absent(fields: dict[str, Any], schema: type[BaseModel]) -> dict[str, Any]:
    """Return the fields without those that clients send empty because they were left blank.

    Empty text is absent, and null in a field that the endpoint does not have. null in others is the
    schema's business.
    """
    known = schema.model_fields
    return {
        name: value
        for name, value in fields.items()
        if value != "" and not (value is None and name not in known)
    }


def _check_length(name: str, value: object, limit: int | None) -> None:
    """Check the length of a field's value before pydantic validates its entries.

    limit: entries that the schema allows, None if it does not say.

    Raises ApiError 422 for a longer list, or for more than `MAX_ENTRIES` at all levels together.
    """
    if isinstance(value, list) and limit is not None and len(value) > limit:
        message = f"{name}: at most {limit} entries (sent: {len(value)})"
        raise ApiError(HTTPStatus.UNPROCESSABLE_ENTITY, "invalid_value", message, name)
    entries, unvisited = 0, [value]
    while unvisited:
        entry = unvisited.pop()
        if isinstance(entry, list | dict):
            entries += len(entry)
            if entries > MAX_ENTRIES:
                message = f"{name}: at most {MAX_ENTRIES} entries at all levels together"
                raise ApiError(HTTPStatus.UNPROCESSABLE_ENTITY, "invalid_value", message, name)
            unvisited.extend(entry.values() if isinstance(entry, dict) else entry)


# ── JSON ──────────────────────────────────────────────────────────────────────────────────────────


async def _read(request: Request, limit: int) -> bytearray:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise body_too_large(limit)
    return body


def _check_structure(body: bytearray) -> None:
    if len(body) > TEXT_BODY_BYTES and _structure(body) > TEXT_BODY_BYTES:
        message = f"the body may have at most {TEXT_BODY_BYTES} commas, brackets and braces"
        raise ApiError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "body_too_large", message)


def _structure(text: bytes | bytearray) -> int:
    """Return how many values a JSON text may hold at most."""
    return sum(text.count(mark) for mark in STRUCTURE)


def _parse(body: bytearray) -> dict[str, Any]:
    try:
        fields = json.loads(body, parse_float=_number, parse_constant=_reject_constant)
    except (ValueError, RecursionError) as error:
        message = f"the body is not JSON: {_reason(error)}"
        raise ApiError(HTTPStatus.BAD_REQUEST, "malformed_json", message) from None
    if not isinstance(fields, dict):
        message = "the body must be a JSON object"
        raise ApiError(HTTPStatus.UNPROCESSABLE_ENTITY, "invalid_value", message)
    return fields


def _number(text: str) -> int | float:
    """Return a JSON number with a fraction or an exponent; 2.0 is an integer, as in JSON Schema."""
    value = float(text)
    return int(value) if value.is_integer() and abs(value) <= LARGEST_EXACT else value


def _reject_constant(name: str) -> Never:
    raise ValueError(f"{name} is not a JSON number")


def _reason(error: Exception) -> str:
    match error:
        case json.JSONDecodeError():
            return f"{error.msg} at line {error.lineno}, column {error.colno}"
        case UnicodeDecodeError():
            return "it is not UTF-8"
        case RecursionError():
            return "it is nested too deeply"
    return reason(error)[:200]


# ── multipart/form-data ───────────────────────────────────────────────────────────────────────────


async def _read_form(request: Request, schema: type[BaseModel], limit: int) -> dict[str, Any]:
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
    if sum(_structure(text.encode("utf-8", "replace")) for text in texts) > TEXT_BODY_BYTES:
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
        return json.loads(text, parse_float=_number)
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


@cache
def _max_entries(schema: type[BaseModel]) -> dict[str, int]:
    """Return the maximum length of every field that is a list."""
    limits = {}
    for name, kind in json_schema(schema)["properties"].items():
        for branch in (kind, *kind.get("anyOf", ())):
            if "maxItems" in branch:
                limits[name] = branch["maxItems"]
    return limits


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


# ── in transit ────────────────────────────────────────────────────────────────────────────────────


@dataclass(eq=False, slots=True)
class _Body:
    """The body of one request, from its first byte until its answer begins.

    Attributes:
        began: loop time in seconds.
        received: bytes so far.
        counted: bytes that count towards the budget.
        wait: the timeout of the wait for the next chunk.
    """

    began: float
    received: int = 0
    counted: int = 0
    complete: bool = False
    rejected: bool = False
    wait: asyncio.Timeout | None = None

    def rate(self, now: float) -> float:
        """Return the average bytes per second."""
        return self.received / max(now - self.began, 1e-3)


class BodyBudget:
    """Bounds the bytes of all bodies whose answers have not begun, together.

    Beyond `limit` bytes the slowest unfinished body is rejected, so that clients which stall cannot
    exclude the others. Bodies of `TEXT_BODY_BYTES` or less are exempt; the number of connections
    bounds them.
    """

    def __init__(self, limit: int) -> None:
        self._limit, self._total = limit, 0
        self._bodies: set[_Body] = set()
        self._retry_slots = RetrySlots()

    def add(self, body: _Body, size: int) -> None:
        """Count received bytes; reject one or more bodies, perhaps this one, beyond the limit."""
        body.received += size
        if body.received <= TEXT_BODY_BYTES or body.rejected:
            return
        self._bodies.add(body)
        self._total += body.received - body.counted
        body.counted = body.received
        while self._total > self._limit:
            self._reject(self._slowest(body))

    def release(self, body: _Body) -> None:
        """Stop counting a body."""
        self._bodies.discard(body)
        self._total -= body.counted
        body.counted = 0

    def exceeded(self) -> ApiError:
        """Return the error for a rejected body; each client is told another time to retry."""
        now = asyncio.get_running_loop().time()
        wait_s = self._retry_slots.take(BUDGET_RETRY_S, BUDGET_SPACING_S, now)
        return ApiError(
            HTTPStatus.TOO_MANY_REQUESTS,
            "body_budget_exceeded",
            "the bodies of all unanswered requests together are too large; try again",
            headers=retry_headers(wait_s),
        )

    def _slowest(self, latest: _Body) -> _Body:
        now = asyncio.get_running_loop().time()
        unfinished = (body for body in self._bodies if not body.complete)
        return min(unfinished, key=lambda body: body.rate(now), default=latest)

    def _reject(self, body: _Body) -> None:
        body.rejected = True
        self.release(body)
        if body.wait is not None and not body.wait.expired():
            body.wait.reschedule(asyncio.get_running_loop().time())


class BodyLimit:
    """Bounds a body to `limit` bytes, announced or not, and the time that it takes.

    The reader of the body gets ApiError 413, 408 or, beyond the budget, 429.

    Args:
        limit: bytes.
        timeout_s: seconds between two chunks.
        total_s: seconds for the whole body.
        budget: of all bodies together.
    """

    def __init__(
        self,
        app: ASGIApp,
        limit: int,
        timeout_s: float,
        total_s: float = math.inf,
        budget: BodyBudget | None = None,
    ) -> None:
        self._app = app
        self._limit = limit
        self._timeout_s, self._total_s = timeout_s, total_s
        self._budget = budget or BodyBudget(limit)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass one request on with a bounded body."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = Headers(scope=scope).get("content-length", "0")
        too_large = announced.isdecimal() and int(announced) > self._limit
        body = _Body(asyncio.get_running_loop().time())

        async def receive_bounded() -> Message:
            if body.complete:
                # After the body only the client's disconnect follows; it has no timeout.
                return await receive()
            if too_large:
                raise body_too_large(self._limit)
            message = await self._next(receive, body)
            self._budget.add(body, len(message.get("body", b"")))
            body.complete = not message.get("more_body", False)
            if body.received > self._limit:
                raise body_too_large(self._limit)
            if body.rejected:
                raise self._budget.exceeded()
            return message

        async def send_and_release(message: Message) -> None:
            # The handler has returned, and with it the last reference to the fields.
            self._budget.release(body)
            await send(message)

        try:
            await self._app(scope, receive_bounded, send_and_release)
        finally:
            self._budget.release(body)

    async def _next(self, receive: Receive, body: _Body) -> Message:
        if body.rejected:
            raise self._budget.exceeded()
        last = body.began + self._total_s
        pause_ends = asyncio.get_running_loop().time() + self._timeout_s
        try:
            async with asyncio.timeout_at(min(pause_ends, last)) as body.wait:
                return await receive()
        except TimeoutError:
            if body.rejected:
                raise self._budget.exceeded() from None
            raise body_too_slow(
                f"no data of the body arrived for {self._timeout_s:g} s"
                if pause_ends < last
                else f"the body took longer than {self._total_s:g} s"
            ) from None
        finally:
            body.wait = None
