"""Request bodies: bytes from the client → a validated schema, or the error that says what is wrong with them."""

from __future__ import annotations

import json
from http import HTTPStatus
from typing import Any, Never, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError

from server.api.errors import ApiError, from_validation, unknown_field
from server.api.forms import number, read_form

# Two prompts of 4000 characters, each escaped as a surrogate pair, take 96,000 bytes. What is longer holds nothing useful,
# and parsing megabytes of brackets would stop the event loop for seconds.
TEXT_BODY_BYTES = 128 * 1024
# A body with pictures in it is long strings and little else: commas, brackets and braces, as many as a full text body could have.
STRUCTURE = (b",", b"[", b"{")

JSON = "application/json"
FORM = "multipart/form-data"

Schema = TypeVar("Schema", bound=BaseModel)


async def read_body(request: Request, schema: type[Schema], limit: int) -> Schema:
    """The body of an endpoint that takes pictures: JSON with base64 in it, or a form with files; the same schema serves both.

    Raises ApiError: 415 unless it is one of them, 413 beyond `limit` bytes or the parts a form may have, 400 malformed, 422 what the
    schema refuses.
    """
    if _media_type(request, JSON, FORM) == FORM:
        return _validate(await read_form(request, schema, limit), schema)
    return _validate(_parse(_check_structure(await _read(request, limit))), schema)


async def read_json(request: Request, schema: type[Schema], limit: int = TEXT_BODY_BYTES) -> Schema:
    """Raises ApiError: 415 unless it is JSON, 413 beyond `limit` bytes, 400 malformed, 422 what the schema refuses."""
    _media_type(request, JSON)
    return _validate(_parse(await _read(request, limit)), schema)


def too_large(limit: int) -> ApiError:
    return ApiError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "body_too_large", f"the body may have at most {limit} bytes")


def too_slow(timeout_s: float) -> ApiError:
    # The rest of the body would be taken for the next request.
    headers = {"Connection": "close"}
    return ApiError(HTTPStatus.REQUEST_TIMEOUT, "body_too_slow", f"the body did not go on for {timeout_s:g} s", headers=headers)


def _media_type(request: Request, *allowed: str) -> str:
    sent = request.headers.get("content-type", "")
    media_type = sent.partition(";")[0].strip().lower()
    if media_type not in allowed:
        message = f"Content-Type must be {' or '.join(allowed)} (sent: {sent[:80]!r})"
        raise ApiError(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "unsupported_media_type", message)
    return media_type


def _validate(fields: dict[str, Any], schema: type[Schema]) -> Schema:
    # pydantic would refuse these too, but only after it has written an error for every single one.
    unknown = next((name for name in fields if name not in schema.model_fields), None)
    if unknown is not None:
        raise unknown_field(unknown, schema.model_fields)
    try:
        return schema.model_validate(fields)
    except ValidationError as error:
        raise from_validation(error) from None


async def _read(request: Request, limit: int) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise too_large(limit)
    return bytes(body)


def _check_structure(body: bytes) -> bytes:
    if len(body) > TEXT_BODY_BYTES and sum(body.count(mark) for mark in STRUCTURE) > TEXT_BODY_BYTES:
        message = f"the body may have at most {TEXT_BODY_BYTES} commas, brackets and braces"
        raise ApiError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "body_too_large", message)
    return body


def _parse(body: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(body, parse_float=number, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ApiError(HTTPStatus.BAD_REQUEST, "malformed_json", f"the body is not JSON: {_reason(error)}") from None
    if not isinstance(fields, dict):
        raise ApiError(HTTPStatus.UNPROCESSABLE_ENTITY, "invalid_value", "the body must be a JSON object")
    return fields


def _refuse_constant(name: str) -> Never:
    raise ValueError(f"{name} is not a JSON number")


def _reason(error: Exception) -> str:
    match error:
        case json.JSONDecodeError():
            return f"{error.msg} at line {error.lineno}, column {error.colno}"
        case UnicodeDecodeError():
            return "it is not UTF-8"
        case RecursionError():
            return "it is nested too deeply"
    return str(error)[:200]
