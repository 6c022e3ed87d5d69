"""Generated images that clients fetch by URL: in memory, bounded in bytes and time, unguessable.

Per process: docs/scale.md.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from http import HTTPStatus

from server.api.errors import ApiError, unprocessable
from server.api.images.encode import Format
from server.fair_cache import FairCache
from server.paths import IMAGES

# Of an id, which is the only credential.
ID_BYTES = 16
# Memory of an entry beside the file.
OVERHEAD_BYTES = 1024
EXTENSIONS: dict[Format, str] = {"png": "png", "jpeg": "jpg", "webp": "webp"}


@dataclass(frozen=True, slots=True)
class StoredImage:
    """A file. name: for clients that save it, without the extension."""

    content: bytes
    format: Format
    name: str

    @property
    def file_name(self) -> str:
        """The name with the extension."""
        return f"{self.name}.{EXTENSIONS[self.format]}"


class UrlStore:
    """Files by `<id>.<extension>`. All methods may be called from any thread."""

    def __init__(self, limit: int, lifetime_s: float) -> None:
        """Create an empty store.

        Args:
            limit: bytes of all files; 0: nothing is stored.
            lifetime_s: seconds after which a file is gone.
        """
        self._files = FairCache[str, StoredImage](limit, lifetime_s)

    @property
    def bytes(self) -> int:
        """Bytes of all files."""
        return self._files.bytes

    def check_enabled(self) -> None:
        """Raise ApiError 400 if nothing is stored."""
        if not self._files.limit:
            message = "response_format: images are not stored, so they have no URL; send b64_json"
            message = f"{message}, or json to the native endpoints (sent: 'url')"
            raise ApiError(HTTPStatus.BAD_REQUEST, "unsupported_value", message, "response_format")

    def add(self, owner: str, images: Sequence[StoredImage]) -> list[str]:
        """Store the images of one answer and return their names.

        The owner that holds most loses its oldest files first if there is no room.

        Raises:
            ApiError: 422, they are larger than the whole store.
        """
        names = [f"{secrets.token_urlsafe(ID_BYTES)}.{EXTENSIONS[each.format]}" for each in images]
        sizes = [len(each.content) + OVERHEAD_BYTES for each in images]
        files = dict(zip(names, zip(images, sizes, strict=True), strict=True))
        if not self._files.add(owner, files):
            problem = f"the images take {sum(sizes)} bytes, and the store for URLs has"
            problem = f"{problem} {self._files.limit}; ask for fewer or smaller ones"
            raise unprocessable("images_too_large", "response_format", problem)
        return names

    def get(self, name: str) -> tuple[StoredImage, float] | None:
        """Return a file and the seconds that it is left; None if it is unknown or gone."""
        return self._files.get(name)

    def expire(self) -> None:
        """Remove the files whose time is over."""
        self._files.expire()


@dataclass(frozen=True, slots=True)
class ImageLinks:
    """Stores the images of one answer. base: the server's URL without a slash at its end."""

    store: UrlStore
    owner: str
    base: str

    def publish(self, images: Sequence[StoredImage]) -> list[str]:
        """Store the images and return their URLs. Raises ApiError 422 as `UrlStore.add`."""
        return [f"{self.base}{IMAGES}{name}" for name in self.store.add(self.owner, images)]
