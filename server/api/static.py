"""The playground at `/` and the API reference at `/docs`, under a policy against other origins.

The reference is Swagger UI from the package fastapi-offline, whose code is not executed here.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from http import HTTPStatus
from importlib.util import find_spec
from pathlib import Path

from fastapi import APIRouter, Request, Response

from server.api.errors import ApiError

router = APIRouter(include_in_schema=False)

DIRECTORY = Path(__file__).parents[1] / "playground"
SWAGGER_UI = ("swagger-ui-bundle.js", "swagger-ui.css")
MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
POLICY = {
    "default-src": "'none'",
    "script-src": "'self'",
    "style-src": "'self'",
    "img-src": "'self' blob: data:",
    "connect-src": "'self'",
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
}
HEADERS = {
    "Content-Security-Policy": "; ".join(f"{name} {sources}" for name, sources in POLICY.items()),
    # Browsers revalidate every time, so that an upgraded server never meets an old script.
    "Cache-Control": "no-cache",
}


@dataclass(frozen=True, slots=True)
class StaticFile:
    """A file of the playground."""

    content: bytes
    media_type: str
    etag: str

    @classmethod
    def read(cls, path: Path) -> StaticFile:
        """Read and hash the file."""
        content = path.read_bytes()
        etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
        return cls(content, MEDIA_TYPES[path.suffix], etag)


@router.get("/")
async def page(request: Request) -> Response:
    """Return the page."""
    return _response(request, "index.html")


@router.get("/docs")
async def docs(request: Request) -> Response:
    """Return the page of the API reference."""
    return _response(request, "docs.html")


@router.get("/playground/{name}")
async def file(request: Request, name: str) -> Response:
    """Return a file of either page."""
    return _response(request, name)


@cache
def static_files() -> dict[str, StaticFile]:
    """Return the files of this repository by name; they are read once."""
    return {path.name: StaticFile.read(path) for path in sorted(DIRECTORY.iterdir())}


@cache
def swagger_ui() -> dict[str, StaticFile]:
    """Return Swagger UI's files by name, none without the package; they are read once."""
    package = find_spec("fastapi_offline")
    if package is None or package.origin is None:
        return {}
    directory = Path(package.origin).parent / "static"
    return {name: StaticFile.read(directory / name) for name in SWAGGER_UI}


def _response(request: Request, name: str) -> Response:
    """Return the file, or 304 if the client has it. Raises ApiError 404."""
    if (file := static_files().get(name) or swagger_ui().get(name)) is None:
        raise ApiError(HTTPStatus.NOT_FOUND, "not_found", "the playground has no such file")
    headers = {**HEADERS, "ETag": file.etag}
    known = request.headers.get("if-none-match", "")
    if known == "*" or file.etag in known:
        return Response(status_code=HTTPStatus.NOT_MODIFIED, headers=headers)
    return Response(file.content, media_type=file.media_type, headers=headers)
