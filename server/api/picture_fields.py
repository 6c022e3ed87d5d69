"""The type of a picture in a request's schema: the bytes of a file, whether they came as a form's part, as base64 or in a data URL."""

from __future__ import annotations

import base64
import re
from typing import Annotated, Any

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

SCHEME = re.compile(r"([a-z][a-z0-9+.-]{0,30}):", re.IGNORECASE)
DESCRIPTION = "A PNG, JPEG, WebP or GIF file: base64 or a data URL in JSON, a file in a form"


def file_bytes(sent: object) -> bytes:
    """Raises PydanticCustomError for anything but bytes, base64 and data URLs with base64."""
    if isinstance(sent, bytes):
        return sent
    if not isinstance(sent, str):
        raise PydanticCustomError("picture_type", "one picture is expected, as a file, base64 or a data URL")
    return _from_base64(_payload(sent))


def _payload(sent: str) -> str:
    """What follows the comma of a data URL, or all of it."""
    scheme = SCHEME.match(sent)
    if scheme is None:
        return sent
    if scheme[1].lower() != "data":
        reason = "{scheme} URLs are refused, the server fetches nothing; send the picture as base64, a data URL or a file"
        raise PydanticCustomError("picture_url", reason, {"scheme": scheme[1].lower()})
    head, comma, payload = sent.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise PydanticCustomError("picture_encoding", "a data URL must hold base64: data:image/png;base64,…")
    return payload


def _from_base64(text: str) -> bytes:
    try:
        # Mail and command-line encoders break lines.
        return base64.b64decode(text.encode("ascii").translate(None, b"\r\n\t"), validate=True)
    except ValueError:
        raise PydanticCustomError("picture_encoding", "must be base64 with its padding, or a data URL that holds it") from None


def _listed(sent: Any) -> Any:
    return sent if isinstance(sent, list) else [sent]


Encoded = Annotated[str, Field(min_length=1, description=DESCRIPTION)]

PictureFile = Annotated[bytes, BeforeValidator(file_bytes, json_schema_input_type=Encoded), Field(description=DESCRIPTION)]
"""One picture."""

PictureFiles = Annotated[list[PictureFile], BeforeValidator(_listed, json_schema_input_type=Encoded | list[Encoded])]
"""One picture or several; give it `Field(max_length=…)`."""
