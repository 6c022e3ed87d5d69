"""Streams of server-sent events."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from typing import Any

import httpx

from tests.support.native_api import fields_of

Told = list[tuple[str, dict[str, Any]]]


def events(lines: Iterator[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the events in a stream's lines, as a browser reads them; comments are none."""
    name = ""
    for line in lines:
        field, _, value = line.partition(": ")
        if field == "event":
            name = value
        elif field == "data":
            yield name, json.loads(value)


def body_of(operation: str, **changes: Any) -> dict[str, Any]:
    fields = {"prompt": "a ball", "seed": 5} if operation == "generate" else fields_of(operation)
    fields = {
        name: base64.b64encode(value).decode() if isinstance(value, bytes) else value
        for name, value in fields.items()
    }
    return fields | {"response_format": "png"} | changes


def told(
    client: httpx.Client, operation: str, headers: dict[str, str] | None = None, **changes: Any
) -> Told:
    with client.stream(
        "POST", f"/{operation}", json=body_of(operation, stream=True, **changes), headers=headers
    ) as answer:
        assert answer.status_code == 200, answer.read()
        assert answer.headers["content-type"].startswith("text/event-stream")
        return list(events(answer.iter_lines()))
