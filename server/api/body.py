"""Request bodies, JSON and multipart/form-data, to a validated schema or a precise error.

A form becomes the dict that the same request has as JSON, so one schema serves both.
"""

from __future__ import annotations

from functools import cache
from http import HTTPStatus
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError

from server.api.errors import ApiError, unprocessable
from server.api.form_body import read_form
from server.api.json_body import read_json
from server.api.validation import from_validation, json_schema, unknown_field

# Entries of lists and objects in one field. Eight regions with every field have about a hundred.
MAX_ENTRIES = 1000

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
        return _validate(await read_form(request, schema, limit), schema)
    return _validate(await read_json(request, limit), schema)


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
    fields = _without_blanks(sent)
    if schema.model_config.get("extra") == "ignore":
        fields = {name: value for name, value in fields.items() if name in schema.model_fields}
    # Pydantic rejects these too, but only after writing an error for every single one.
    unknown = next((name for name in fields if name not in schema.model_fields), None)
    if unknown is not None:
        raise unknown_field(unknown, schema.model_fields)
    for name, value in fields.items():
        _check_length(name, value, _max_entries(schema).get(name))
    fields = {name: _without_inner_blanks(value) for name, value in fields.items()}
    try:
        return schema.model_validate(fields)
    except ValidationError as error:
        raise from_validation(error, schema, fields) from None


def _without_blanks(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields without those that are null or empty text.

    Forms send what their users left blank as empty text, and the serializers of many languages
    write null for every field that is not set.
    """
    return {name: value for name, value in fields.items() if value is not None and value != ""}


def _without_inner_blanks(value: Any) -> Any:
    """Return an object, or a list of objects, without the fields that are null or empty text."""
    if isinstance(value, list):
        return [_without_blanks(entry) if isinstance(entry, dict) else entry for entry in value]
    return _without_blanks(value) if isinstance(value, dict) else value


def _check_length(name: str, value: object, limit: int | None) -> None:
    """Check the length of a field's value before pydantic validates its entries.

    limit: entries that the schema allows, None if it does not say.

    Raises ApiError 422 for a longer list, or for more than `MAX_ENTRIES` at all levels together.
    """
    if isinstance(value, list) and limit is not None and len(value) > limit:
        problem = f"at most {limit} entries (sent: {len(value)})"
        raise unprocessable("invalid_value", name, problem)
    entries, unvisited = 0, [value]
    while unvisited:
        entry = unvisited.pop()
        if isinstance(entry, list | dict):
            entries += len(entry)
            if entries > MAX_ENTRIES:
                problem = f"at most {MAX_ENTRIES} entries at all levels together"
                raise unprocessable("invalid_value", name, problem)
            unvisited.extend(entry.values() if isinstance(entry, dict) else entry)


@cache
def _max_entries(schema: type[BaseModel]) -> dict[str, int]:
    """Return the maximum length of every field that is a list."""
    limits = {}
    for name, kind in json_schema(schema)["properties"].items():
        for branch in (kind, *kind.get("anyOf", ())):
            if "maxItems" in branch:
                limits[name] = branch["maxItems"]
    return limits
