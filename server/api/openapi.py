"""The OpenAPI document, where FastAPI's own is not exact: bounds of integers are integers, and a form has no null."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

from server.api.body import FORM


class DocumentedApp(FastAPI):
    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            self.openapi_schema = exact(super().openapi())
        return self.openapi_schema


def exact(document: dict[str, Any]) -> dict[str, Any]:
    """The document with whole numbers for whole numbers, and forms whose fields are absent where JSON's may be null."""
    whole: dict[str, Any] = _whole(document)
    for path in whole["paths"].values():
        for operation in path.values():
            form = operation.get("requestBody", {}).get("content", {}).get(FORM)
            if form and "properties" in form["schema"]:
                form["schema"]["properties"] = {name: _without_null(kind) for name, kind in form["schema"]["properties"].items()}
    return whole


def _whole(value: Any) -> Any:
    """Floats lose the last digits of a 64-bit bound, and readers that parse decimals exactly see another one."""
    match value:
        case dict():
            return {key: _whole(inner) for key, inner in value.items()}
        case list():
            return [_whole(inner) for inner in value]
        case float() if value.is_integer():
            return int(value)
    return value


def _without_null(kind: dict[str, Any]) -> dict[str, Any]:
    branches = [branch for branch in kind.get("anyOf", ()) if branch != {"type": "null"}]
    if len(branches) == 1:
        return branches[0] | {key: value for key, value in kind.items() if key != "anyOf"}
    return kind | {"anyOf": branches} if branches else kind
