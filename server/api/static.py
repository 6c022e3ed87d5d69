"""The playground at `/`: one page and what it loads, all of it from here and with a policy that lets the browser ask nobody else."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from http import HTTPStatus
from pathlib import Path

from fastapi import APIRouter, Request, Response

from server.api.errors import ApiError

router = APIRouter(include_in_schema=False)

DIRECTORY = Path(__file__).parents[1] / "playground"
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
    "Content-Security-Policy": "; ".join(f"{directive} {sources}" for directive, sources in POLICY.items()),
    # Kept by the browser, but asked for again every time: an upgraded server never meets an old script.
    "Cache-Control": "no-cache",
}


@dataclass(frozen=True, slots=True)
class StaticFile:
    content: bytes
    media_type: str
    etag: str

    @classmethod
    def read(cls, path: Path) -> StaticFile:
        content = path.read_bytes()
        return cls(content, MEDIA_TYPES[path.suffix], f'"{hashlib.sha256(content).hexdigest()[:32]}"')


@router.api_route("/", methods=["GET", "HEAD"])
async def page(request: Request) -> Response:
    return _answer(request, "index.html")


@router.api_route("/playground/{name}", methods=["GET", "HEAD"])
async def file(request: Request, name: str) -> Response:
    return _answer(request, name)


@cache
def static_files() -> dict[str, StaticFile]:
    """By name; read and hashed once."""
    return {path.name: StaticFile.read(path) for path in sorted(DIRECTORY.iterdir())}


def _answer(request: Request, name: str) -> Response:
    """Raises ApiError 404 for what is no file of the page."""
    if (file := static_files().get(name)) is None:
        raise ApiError(HTTPStatus.NOT_FOUND, "not_found", "the playground has no such file")
    headers = {**HEADERS, "ETag": file.etag}
    if file.etag in request.headers.get("if-none-match", ""):
        return Response(status_code=HTTPStatus.NOT_MODIFIED, headers=headers)
    return Response(file.content, media_type=file.media_type, headers=headers)
