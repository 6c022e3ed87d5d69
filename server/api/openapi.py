"""The OpenAPI document: descriptions of the endpoints that generate images, and exact types."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel

from server.api.body import FORM, JSON
from server.api.schemas import ErrorAnswer
from server.api.sse import Event
from server.api.validation import json_schema

ERRORS = {
    400: "Malformed JSON or form, unsupported by the weights, or a host that is not allowed",
    401: "API key missing or unknown",
    403: "Sent by a page of another origin",
    404: "Unknown weights",
    406: "Accept names only unsupported image types",
    408: "Timeout while reading the body",
    413: "Body or image too large",
    415: "Unsupported Content-Type",
    422: "A field out of bounds, an image that cannot be decoded, or an Idempotency-Key used twice",
    429: "Queue full, deadline unreachable, or the key's limits exceeded; Retry-After says when",
    500: "Failed; x-should-retry: false if a retry cannot help",
    503: "Starting, draining, or the worker was lost",
    504: "Deadline exceeded",
}
# FastAPI declares it for every path with a parameter.
UNUSED_ERROR = "HTTPValidationError"
BEARER, KEY_DESCRIPTION = "HTTPBearer", "One of PAELLERA_API_KEYS"
KEY_MISSING = {
    "description": ERRORS[401],
    "content": {JSON: {"schema": {"$ref": f"#/components/schemas/{ErrorAnswer.__name__}"}}},
}
BINARY = {"schema": {"type": "string", "format": "binary"}}


def _headers(descriptions: dict[str, str]) -> dict[str, Any]:
    return {
        name: {"description": description, "schema": {"type": "string"}}
        for name, description in descriptions.items()
    }


HEADERS = _headers(
    {
        "X-Seed": "Seed of the first image",
        "X-Preset": "Preset that drew the images",
        "X-Renoise-Order": "Order in which tokens became noise again",
        "X-Model-Sha256": "Hash of the weights",
        "X-Request-Id": "The client's id, or a generated one",
        "Server-Timing": "queue, encode, prior, denoise, decode, image, in milliseconds",
        "X-Prompt-Read": "What of the prompt the weights read, percent-encoded, unless it is all",
        "X-Prompt-Truncated": "Encoders that truncated the prompt, if any",
    }
)
RETRY_HEADERS = _headers(
    {
        "Retry-After": "Seconds until a retry; with 429 and 503",
        "retry-after-ms": "The same in milliseconds",
        "x-should-retry": "false if a retry cannot help",
    }
)


IDEMPOTENCY_KEY = {
    "name": "Idempotency-Key",
    "in": "header",
    "required": False,
    "description": "A repeat within ten minutes gets the first answer, or waits for it",
    # Printable ASCII, without the white space at both ends that HTTP removes.
    "schema": {
        "type": "string",
        "minLength": 1,
        "maxLength": 255,
        "pattern": "^[!-~]([ -~]*[!-~])?$",
    },
}


# ── endpoints ─────────────────────────────────────────────────────────────────────────────────────


def describe_answers(
    description: str, model: type[BaseModel], content: dict[str, Any]
) -> dict[int | str, dict[str, Any]]:
    """Return FastAPI's `responses` of an endpoint that generates images.

    Args:
        description: the successful answer.
        model: the JSON answer.
        content: other media types of the answer.
    """
    answer = {"description": description, "model": model, "content": content, "headers": HEADERS}
    return {200: answer, **describe_errors()}


def describe_errors() -> dict[int | str, dict[str, Any]]:
    """Return FastAPI's `responses` for the errors of an endpoint that reads a body."""
    return {status: _error(status, text) for status, text in ERRORS.items()}


def describe_error(status: int) -> dict[int | str, dict[str, Any]]:
    """Return FastAPI's `responses` for one of the errors in `ERRORS`."""
    return {status: _error(status, ERRORS[status])}


def _error(status: int, description: str) -> dict[str, Any]:
    answer = {"description": description, "model": ErrorAnswer}
    return answer | ({"headers": RETRY_HEADERS} if status in (429, 500, 503) else {})


def describe_events(*events: tuple[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the content of a stream. events: names and example data."""
    example = "".join(Event(name, data).encode().decode() for name, data in events)
    # No type: some readers take it for the whole stream, a text, others for an event, an object.
    schema = {"description": f"Server-sent events: {', '.join(dict(events))}, error"}
    return {"text/event-stream": {"schema": schema, "example": example}}


def describe_body(schema: type[BaseModel], path: str) -> dict[str, Any]:
    """Return FastAPI's `openapi_extra` of an endpoint that takes JSON and forms."""
    described = without_references(schema)
    content: dict[str, Any] = {media_type: {"schema": described} for media_type in (JSON, FORM)}
    content[JSON]["example"] = EXAMPLES[path]
    return {
        "parameters": [IDEMPOTENCY_KEY],
        "requestBody": {"required": True, "content": content},
    }


def without_references(schema: type[BaseModel]) -> dict[str, Any]:
    """Return the schema with inlined definitions: the document has no place for them."""
    whole = json_schema(schema)
    definitions = whole.get("$defs", {})

    def inlined(value: Any) -> Any:
        if isinstance(value, dict):
            if "$ref" in value:
                return inlined(definitions[value["$ref"].rpartition("/")[2]])
            return {name: inlined(inner) for name, inner in value.items()}
        return [inlined(inner) for inner in value] if isinstance(value, list) else value

    return {name: inlined(value) for name, value in whole.items() if name != "$defs"}


# ── document ──────────────────────────────────────────────────────────────────────────────────────


class DocumentedApp(FastAPI):
    """FastAPI with an exact document: whole bounds, forms without null, keys where needed."""

    def __init__(
        self, needs_key: Callable[[str], bool], elsewhere: Collection[str] = (), **options: Any
    ) -> None:
        """Create the app.

        Args:
            needs_key: whether requests for a path need an API key.
            elsewhere: paths that the API's port does not serve.
            options: of FastAPI.
        """
        super().__init__(**options)
        self._needs_key, self._elsewhere = needs_key, elsewhere

    def openapi(self) -> dict[str, Any]:
        """Return the document."""
        if self.openapi_schema is None:
            document = exact(super().openapi())
            for path in self._elsewhere:
                del document["paths"][path]
            self._describe_keys(document)
            self.openapi_schema = document
        return self.openapi_schema

    def _describe_keys(self, document: dict[str, Any]) -> None:
        closed = [path for path in document["paths"] if self._needs_key(path)]
        for operation in (each for path in closed for each in document["paths"][path].values()):
            operation["security"] = [{BEARER: []}]
            operation["responses"].setdefault("401", KEY_MISSING)
        if closed:
            scheme = {"type": "http", "scheme": "bearer", "description": KEY_DESCRIPTION}
            document["components"]["securitySchemes"] = {BEARER: scheme}


def exact(document: dict[str, Any]) -> dict[str, Any]:
    """Return the document with whole numbers as integers and without null in forms.

    FastAPI's own error, which no endpoint answers with, is left out.
    """
    whole: dict[str, Any] = _with_integers(document)
    for name in (UNUSED_ERROR, "ValidationError"):
        whole["components"]["schemas"].pop(name, None)
    for path in whole["paths"].values():
        for operation in path.values():
            if UNUSED_ERROR in str(operation["responses"].get("422")):
                del operation["responses"]["422"]
            form = operation.get("requestBody", {}).get("content", {}).get(FORM)
            if form and "properties" in form["schema"]:
                fields = form["schema"]["properties"].items()
                form["schema"]["properties"] = {name: _without_null(kind) for name, kind in fields}
    return whole


def _with_integers(value: Any) -> Any:
    """Floats lose the last digits of a 64-bit bound, which exact readers of decimals notice."""
    match value:
        case dict():
            return {key: _with_integers(inner) for key, inner in value.items()}
        case list():
            return [_with_integers(inner) for inner in value]
        case float() if value.is_integer():
            return int(value)
    return value


def _without_null(kind: dict[str, Any]) -> dict[str, Any]:
    branches = [branch for branch in kind.get("anyOf", ()) if branch != {"type": "null"}]
    if len(branches) == 1:
        return branches[0] | {key: value for key, value in kind.items() if key != "anyOf"}
    return kind | {"anyOf": branches} if branches else kind


# ── examples ──────────────────────────────────────────────────────────────────────────────────────

# A red square on white, a white square on black, and black with a transparent square, all of 64 ×
# 64 pixels.
IMAGE = (
    "iVBORw0KGgoAAAANSUhEUgAAAEAAAABAAQMAAACQp+OdAAAABlBMVEX6+vrIKCgNZfwnAAAAGklEQVR42mNgGJKA////DwwMTDDu"
    "8GAMRQAAxtQDLKllrNgAAAAASUVORK5CYII="
)
MASK = (
    "iVBORw0KGgoAAAANSUhEUgAAAEAAAABAAQAAAACCEkxzAAAAHklEQVR42mNgGFyAkYHhPwMDAyMDE0xk"
    "lIHMGGwAAPa7AUAn7aGOAAAAAElFTkSuQmCC"
)  # fmt: skip
CUT_OUT = (
    "iVBORw0KGgoAAAANSUhEUgAAAEAAAABACAQAAAAAYLlVAAAATklEQVR42u3ZMQoAIAwDwFT8/5f1CQ4OFbzMhRx0TGWlNSMBAAAA"
    "AAAA6M08XtRlw/ICAAAAAAAAAAAAAAAAAIDHAWUvAAAAAAAA+B6wAU68A3/6aluKAAAAAElFTkSuQmCC"
)

# A request body for every endpoint that generates images, by path. A test sends them all.
EXAMPLES: dict[str, dict[str, Any]] = {
    "/generate": {
        "prompt": "a red ball on a blue table",
        "seed": 7,
        "n": 2,
        "guidance_scale": [2, 8],
        "temperature": 0.8,
    },
    "/inpaint": {"prompt": "a yellow star on a white background", "image": IMAGE, "mask": MASK},
    "/outpaint": {"image": IMAGE, "left": 32, "right": 32},
    "/variations": {"image": [IMAGE, f"data:image/png;base64,{MASK}"], "weights": [0.8, 0.2]},
    "/edit": {"prompt": "a green square on a white background", "image": IMAGE, "strength": 0.7},
    "/upscale": {"image": IMAGE, "scale": 2, "prompt": "a red square on a white background"},
    "/interpolate": {
        "keyframes": [{"prompt": "a red circle"}, {"prompt": "a blue square"}],
        "frames": 4,
        "response_format": "gif",
    },
    "/v1/images/generations": {
        "prompt": "a red ball on a blue table",
        "n": 2,
        "quality": "low",
        "output_format": "webp",
        "seed": 7,
    },
    "/v1/images/edits": {
        "prompt": "a yellow star on a white background",
        "image": IMAGE,
        "mask": CUT_OUT,
    },
    "/v1/images/variations": {"image": IMAGE, "n": 2},
}
