"""What the OpenAPI document says of the endpoints that draw."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from server.api.body import FORM, JSON
from server.api.request_examples import EXAMPLES
from server.api.schemas import ErrorAnswer
from server.api.sse import Event

ERRORS = {
    400: "Malformed JSON or form, or something that these weights cannot do",
    401: "No API key, or an unknown one, where the server wants one",
    404: "Unknown weights",
    408: "The body did not go on",
    413: "Body or picture too large",
    415: "Wrong content type",
    422: "A field out of bounds, or a picture that cannot be read",
    429: "Queue full, timeout_s too short for what is queued, or the key's limits reached; Retry-After says when to come back",
    500: "Failed; x-should-retry: false if repeating cannot help",
    503: "Starting, draining, or the worker was lost",
    504: "Deadline passed",
}
BINARY = {"schema": {"type": "string", "format": "binary"}}


def _headers(meanings: dict[str, str]) -> dict[str, Any]:
    return {name: {"description": meaning, "schema": {"type": "string"}} for name, meaning in meanings.items()}


HEADERS = _headers(
    {
        "X-Seed": "The image's seed",
        "X-Request-Id": "The client's, or one made here",
        "Server-Timing": "queue, encode, prior, denoise, decode, image; milliseconds",
        "X-Prompt-Truncated": "The encoders that could not take the whole prompt, if any",
    }
)
RETRY = _headers(
    {
        "Retry-After": "Seconds; with 429 and 503",
        "retry-after-ms": "The same in milliseconds",
        "x-should-retry": "false if repeating cannot help",
    }
)


def responses(description: str, model: type[BaseModel], content: dict[str, Any]) -> dict[int | str, dict[str, Any]]:
    """model: what a JSON answer holds; content: what else an answer may be."""
    answer = {"description": description, "model": model, "content": content, "headers": HEADERS}
    return {200: answer, **{status: _error(status, text) for status, text in ERRORS.items()}}


def _error(status: int, description: str) -> dict[str, Any]:
    answer = {"description": description, "model": ErrorAnswer}
    return answer | ({"headers": RETRY} if status in (429, 500, 503) else {})


def events(*told: tuple[str, dict[str, Any]]) -> dict[str, Any]:
    """A stream's content. told: events and their data, as an example."""
    example = "".join(Event(name, data).encode().decode() for name, data in told)
    # Without a type: some readers take it for the whole stream, a text, others for an event, an object.
    schema = {"description": f"Server-sent events: {', '.join(dict(told))}, error"}
    return {"text/event-stream": {"schema": schema, "example": example}}


def request_body(schema: type[BaseModel], path: str) -> dict[str, Any]:
    """JSON and form, for `openapi_extra`."""
    described = _without_references(schema)
    content: dict[str, Any] = {media_type: {"schema": described} for media_type in (JSON, FORM)}
    content[JSON]["example"] = EXAMPLES[path]
    return {"requestBody": {"required": True, "content": content}}


def _without_references(schema: type[BaseModel]) -> dict[str, Any]:
    """The schema with its parts in place of references, which would point nowhere in the document it becomes a part of."""
    whole = schema.model_json_schema()
    parts = whole.pop("$defs", {})

    def inlined(value: Any) -> Any:
        if isinstance(value, dict):
            if "$ref" in value:
                return inlined(parts[value["$ref"].rpartition("/")[2]])
            return {name: inlined(inner) for name, inner in value.items()}
        return [inlined(inner) for inner in value] if isinstance(value, list) else value

    return dict(inlined(whole))
