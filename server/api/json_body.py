"""JSON bodies to the object in them, or a precise error."""

from __future__ import annotations

import json
from decimal import Decimal
from http import HTTPStatus
from typing import Any, Never

from fastapi import Request

from server.api.body_limit import TEXT_BODY_BYTES, body_too_large
from server.api.errors import ApiError, reason

# A body with images in it is long strings and little else: as many commas, brackets and braces as
# a full text body could have.
STRUCTURE = (b",", b"[", b"{")
# From there on, a float may stand for several integers, and no field takes whole numbers as large.
LARGEST_EXACT, LARGEST_WHOLE = 2**53, 2**64

LINE_BREAK = (
    ": a text holds a line break, which JSON writes as \\n; base64 needs none (base64 -w0 FILE)"
)


async def read_json(request: Request, limit: int) -> dict[str, Any]:
    """Return the object in a body.

    Raises:
        ApiError: 413 beyond `limit` bytes or `TEXT_BODY_BYTES` marks of structure, 400 malformed,
            422 another value than an object.
    """
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise body_too_large(limit)
    _check_structure(body)
    return _parse(body)


def _check_structure(body: bytearray) -> None:
    if len(body) > TEXT_BODY_BYTES and structure(body) > TEXT_BODY_BYTES:
        message = f"the body may have at most {TEXT_BODY_BYTES} commas, brackets and braces"
        raise ApiError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "body_too_large", message)


def structure(text: bytes | bytearray) -> int:
    """Return how many values a JSON text may hold at most."""
    return sum(text.count(mark) for mark in STRUCTURE)


def _parse(body: bytearray) -> dict[str, Any]:
    try:
        fields = json.loads(body, parse_float=number, parse_constant=_reject_constant)
    except (ValueError, RecursionError) as error:
        message = f"the body is not JSON: {_reason(error)}"
        raise ApiError(HTTPStatus.BAD_REQUEST, "malformed_json", message) from None
    if not isinstance(fields, dict):
        message = "the body must be a JSON object"
        raise ApiError(HTTPStatus.UNPROCESSABLE_ENTITY, "invalid_value", message)
    return fields


def number(text: str) -> int | float:
    """Return a JSON number with a fraction or an exponent; 2.0 is an integer, as in JSON Schema."""
    value = float(text)
    if not value.is_integer() or abs(value) > LARGEST_WHOLE:
        return value
    if abs(value) < LARGEST_EXACT:
        return int(value)
    exact = Decimal(text)
    return int(exact) if exact == exact.to_integral_value() else value


def _reject_constant(name: str) -> Never:
    raise ValueError(f"{name} is not a JSON number")


def _reason(error: Exception) -> str:
    match error:
        case json.JSONDecodeError():
            place = f"{error.msg.removesuffix(' at')} at line {error.lineno}, column {error.colno}"
            is_line_break = "control" in error.msg and error.doc[error.pos] in "\r\n"
            return place + LINE_BREAK if is_line_break else place
        case UnicodeDecodeError():
            return "it is not UTF-8"
        case RecursionError():
            return "it is nested too deeply"
    return reason(error)[:200]
