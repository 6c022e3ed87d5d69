"""`GET /images/{name}`: a generated image that an answer with `response_format: url` named."""

from __future__ import annotations

from http import HTTPStatus

from fastapi import APIRouter, Request, Response

from server.api.errors import ApiError
from server.api.openapi import BINARY
from server.api.schemas import ErrorAnswer
from server.api.state import app_state

router = APIRouter(tags=["images"])

# Nothing in a file may run, whatever a browser takes it for; pages of others may show it.
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'none'; sandbox",
    "Cross-Origin-Resource-Policy": "cross-origin",
    "X-Robots-Tag": "noindex",
}


@router.get(
    "/images/{name}",
    summary="A stored image",
    response_class=Response,
    responses={
        200: {
            "description": "The file",
            "content": {f"image/{format}": BINARY for format in ("png", "jpeg", "webp")},
        },
        404: {"description": "Unknown, expired or evicted", "model": ErrorAnswer},
    },
)
async def stored_image(request: Request, name: str) -> Response:
    """Return the image. Its name, which cannot be guessed, is the only credential."""
    found = app_state(request).url_store.get(name)
    if found is None:
        message = "no image has this URL: it never existed, or has expired"
        headers = {"Cache-Control": "no-store"}
        raise ApiError(HTTPStatus.NOT_FOUND, "not_found", message, headers=headers)
    image, seconds_left = found
    headers = {
        **HEADERS,
        "Cache-Control": f"private, max-age={int(seconds_left)}",
        "Content-Disposition": f'inline; filename="{image.file_name}"',
    }
    return Response(image.content, media_type=f"image/{image.format}", headers=headers)
