"""The OpenAPI document: descriptions of the endpoints that generate images, and exact types."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator
from typing import Any

from fastapi import FastAPI
from fastapi.routing import APIRoute
from pydantic import BaseModel

from server.api.body import FORM, JSON
from server.api.form_body import file_fields
from server.api.schemas import IMAGE_DESCRIPTION, ErrorAnswer
from server.api.sse import Event

ERRORS = {
    400: "Malformed JSON or form, unsupported by the weights, or a host that is not allowed",
    401: "API key missing or unknown",
    403: "Sent by a page of another origin",
    404: "Unknown weights",
    406: "Accept names only unsupported image types",
    408: "Timeout while reading the body",
    413: "Body or image too large",
    415: "Unsupported Content-Type",
    422: "A field out of bounds, an undecodable image, or the Idempotency-Key of another request",
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
FILE = {"type": "string", "format": "binary"}
BINARY = {"schema": FILE}
NULL = {"type": "null"}
LIST_KEYS = ("title", "minItems", "maxItems")
FILE_OR_TEXT = "Base64 or a data URL is accepted as text, too"


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
        "X-Prompt-Read": "Prompt in words that the weights know, if it differs; percent-encoded",
        "X-Prompt-Truncated": "Encoders that truncated a prompt, if any, negative ones included",
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
    # The whole stream is a text. Without a type, generated clients take the JSON for anything, too.
    schema = {
        "type": "string",
        "description": f"Server-sent events: {', '.join(dict(events))}, error",
    }
    return {"text/event-stream": {"schema": schema, "example": example}}


def describe_body(schema: type[BaseModel], path: str) -> dict[str, Any]:
    """Return FastAPI's `openapi_extra` of an endpoint that takes JSON and forms.

    Forms come first where there are files: some generators know the first kind alone.
    """
    described = describe_json_body(schema)
    content = described["requestBody"]["content"]
    form = {FORM: _form_body(schema)}
    has_files = any(len(field) == 1 for field in file_fields(schema))
    content = {**form, **content} if has_files else {**content, **form}
    for body in content.values():
        body["example"] = EXAMPLES[path]
    described["requestBody"]["content"] = content
    return described


def describe_json_body(schema: type[BaseModel]) -> dict[str, Any]:
    """Return FastAPI's `openapi_extra` of an endpoint that is described for JSON alone."""
    return {
        "parameters": [IDEMPOTENCY_KEY],
        "requestBody": {"required": True, "content": {JSON: {"schema": _json(schema)}}},
    }


def _json(schema: type[BaseModel]) -> dict[str, Any]:
    described = schema.model_json_schema(ref_template="#/components/schemas/{model}")
    for each in (described, *described.get("$defs", {}).values()):
        each["properties"] = {name: _optional(kind) for name, kind in each["properties"].items()}
    fields = described["properties"]
    for name in fields.keys() - described.get("required", ()):
        fields[name] = _with_null(fields[name])
    return described


def _optional(kind: dict[str, Any]) -> dict[str, Any]:
    """Return a field's schema with its default in words alone.

    Generated clients would require or send a `default`, and a sent value is not an absent one.
    """
    default = _plain(kind.get("default"))
    kept = {name: value for name, value in kind.items() if name != "default"}
    if default in (None, "", [], {}):
        return kept
    text = f"Default: {default if isinstance(default, str) else json.dumps(default)}"
    return kept | {"description": ". ".join(filter(None, (kind.get("description"), text)))}


def _form_body(schema: type[BaseModel]) -> dict[str, Any]:
    described = _form(schema)
    # Entries of other lists are files or objects, which no client joins by commas.
    lists = [name for name, kind in described["properties"].items() if _holds_numbers(kind)]
    encoding = {name: {"style": "form", "explode": True} for name in lists}
    return {"schema": described, **({"encoding": encoding} if encoding else {})}


def _holds_numbers(kind: dict[str, Any]) -> bool:
    lists = [each for each in kind.get("anyOf", [kind]) if each.get("type") == "array"]
    entries = [_plain(each)["items"] for each in lists]
    return any(entry.get("type") == "number" for entry in entries)


def _form(schema: type[BaseModel]) -> dict[str, Any]:
    """Return the schema of a form: files as such, and no null, which a form cannot express."""
    described = _json(schema)
    files = file_fields(schema)
    described["title"] = f"{described['title'].removesuffix('Request')}Form"
    described["properties"] = {
        name: _as_file(kind) if (name,) in files else _without_null(kind)
        for name, kind in described["properties"].items()
    }
    return described


def _as_file(kind: dict[str, Any]) -> dict[str, Any]:
    """Return the form's counterpart of an image, or of a list of them, in JSON."""
    about = {"description": f"{kind.get('description', IMAGE_DESCRIPTION)}. {FILE_OR_TEXT}"}
    for branch in kind.get("anyOf", ()):
        if branch.get("type") == "array":
            whole = branch | kind
            kept = {name: whole[name] for name in LIST_KEYS if name in whole}
            return kept | about | {"items": FILE | {"description": FILE_OR_TEXT}, "type": "array"}
    return FILE | about | {"title": kind["title"]}


def _with_null(kind: dict[str, Any]) -> dict[str, Any]:
    outside = {name: kind[name] for name in ("title", "description") if name in kind}
    inside = {name: value for name, value in kind.items() if name not in outside}
    if not inside:
        return kind
    branches = inside["anyOf"] if inside.keys() == {"anyOf"} else [inside]
    return outside | {"anyOf": [*branches, *([] if NULL in branches else [NULL])]}


def _without_null(kind: dict[str, Any]) -> dict[str, Any]:
    branches = [branch for branch in kind.get("anyOf", ()) if branch != NULL]
    if len(branches) == 1:
        return branches[0] | {key: value for key, value in kind.items() if key != "anyOf"}
    return kind | {"anyOf": branches} if branches else kind


# ── document ──────────────────────────────────────────────────────────────────────────────────────


class DocumentedApp(FastAPI):
    """FastAPI with an exact document: whole bounds, named schemas and operations, keys."""

    def __init__(
        self, needs_key: Callable[[str], bool], elsewhere: Collection[str] = (), **options: Any
    ) -> None:
        """Create the app.

        Args:
            needs_key: whether requests for a path need an API key.
            elsewhere: paths that the API's port does not serve.
            options: of FastAPI.
        """
        super().__init__(generate_unique_id_function=operation_id, **options)
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


def operation_id(route: APIRoute) -> str:
    """Return the route's name as generated clients can use it: generate, sdapi_png_info."""
    return re.sub(r"\W+", "_", route.name)


def exact(document: dict[str, Any]) -> dict[str, Any]:
    """Return the document with whole numbers as integers, plain lists, and named bodies.

    FastAPI's own error, which no endpoint answers with, is left out.
    """
    whole: dict[str, Any] = _plain(document)
    schemas = whole["components"]["schemas"]
    for name in (UNUSED_ERROR, "ValidationError"):
        schemas.pop(name, None)
    for operation in _operations(whole):
        if UNUSED_ERROR in str(operation["responses"].get("422")):
            del operation["responses"]["422"]
        for body in operation.get("requestBody", {}).get("content", {}).values():
            described = body["schema"]
            schemas.update(described.pop("$defs", {}))
            schemas[described["title"]] = described
            body["schema"] = {"$ref": f"#/components/schemas/{described['title']}"}
    return whole


def _operations(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for path in document["paths"].values():
        yield from path.values()


def _plain(value: Any) -> Any:
    """Return a part of the document for readers of exact decimals, and of lists of one type.

    Floats lose the last digits of a 64-bit bound. Some generators cannot read `prefixItems`.
    """
    match value:
        case {"prefixItems": [first, *others], **rest} if all(each == first for each in others):
            return _plain({**rest, "items": first})
        case dict():
            return {key: _plain(inner) for key, inner in value.items()}
        case list():
            return [_plain(inner) for inner in value]
        case float() if value.is_integer():
            return int(value)
    return value


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
