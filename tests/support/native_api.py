"""Requests to the native API, and what is expected of their answers."""

from __future__ import annotations

import base64
import json
from typing import Any

import httpx
import numpy as np

from tests.support.images import Array, noise, opened, png, white


def post(
    client: httpx.Client,
    prompt: str = "a ball",
    headers: dict[str, str] | None = None,
    **fields: Any,
) -> httpx.Response:
    return client.post("/generate", json={"prompt": prompt, **fields}, headers=headers)


def error_of(answer: httpx.Response) -> dict[str, Any]:
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return dict(error)


def fields_of(operation: str) -> dict[str, Any]:
    """The least each of them takes; pictures are bytes."""
    image = {"image": png(noise())}
    return {
        "inpaint": {"prompt": "a ball", **image, "mask": png(white())},
        "outpaint": {**image, "right": 32},
        "variations": image,
        "edit": {"prompt": "a ball", **image},
        "upscale": image,
        "interpolate": {
            "keyframes": [{"prompt": "a ball"}, {"prompt": "a box"}],
            "frames": 3,
            "response_format": "gif",
        },
    }[operation] | {"seed": 5}


def as_json(client: httpx.Client, operation: str, **fields: Any) -> httpx.Response:
    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: plain(inner) for name, inner in value.items()}
        if isinstance(value, list):
            return [plain(inner) for inner in value]
        return base64.b64encode(value).decode() if isinstance(value, bytes) else value

    return client.post(f"/{operation}", json=plain(fields))


def as_form(client: httpx.Client, operation: str, **fields: Any) -> httpx.Response:
    files = {name: value for name, value in fields.items() if isinstance(value, bytes)}
    texts = {
        name: value if isinstance(value, str) else json.dumps(value)
        for name, value in fields.items()
        if name not in files
    }
    parts = [(name, (None, text)) for name, text in texts.items()] + [
        (name, (f"{name}.png", content)) for name, content in files.items()
    ]
    return client.post(f"/{operation}", files=parts)


def pixels(answer: httpx.Response) -> Array:
    assert answer.status_code == 200, answer.text
    return np.asarray(opened(answer.content).convert("RGB"))


def refused(
    answer: httpx.Response, status: int, code: str, param: str | None, mention: str = ""
) -> None:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == (code, param), error
    assert mention in error["message"]
