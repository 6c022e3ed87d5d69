"""Pictures out: RGB bytes → PNG, JPEG or WebP, and which of them a client wants."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar

import PIL.Image
from PIL.PngImagePlugin import PngInfo

from server.api.schemas import Format
from server.engine.protocol import Image

Animation = Literal["gif", "webp"]
T = TypeVar("T")

MEDIA_TYPES: dict[str, Format | Literal["json"]] = {
    "application/json": "json",
    "image/png": "png",
    "image/jpeg": "jpeg",
    "image/webp": "webp",
    "image/*": "png",
    "*/*": "png",
}
FRAME_MS = 80


def encode(image: Image, format: Format, quality: int, parameters: dict[str, Any]) -> bytes:
    """The picture as a file; a PNG carries `parameters` in its text. The same arguments always give the same bytes."""
    picture = PIL.Image.frombytes("RGB", (image.width, image.height), image.pixels)
    file = io.BytesIO()
    match format:
        case "png":
            text = PngInfo()
            text.add_text("parameters", json.dumps(parameters))
            # Of a slightly noisy picture, level 1 takes a quarter of the default's time for a file a fifth larger.
            picture.save(file, "PNG", compress_level=1, pnginfo=text)
        case "jpeg":
            picture.save(file, "JPEG", quality=quality)
        case "webp":
            # Method 2 of 0…6 takes about 0.6 of the default's time for files of nearly the same size.
            picture.save(file, "WEBP", quality=quality, method=2)
    return file.getvalue()


def animate(images: Sequence[Image], format: Animation, quality: int) -> bytes:
    """The pictures one after the other, for ever, as one file."""
    first, *others = (PIL.Image.frombytes("RGB", (image.width, image.height), image.pixels) for image in images)
    file = io.BytesIO()
    together: dict[str, Any] = {"save_all": True, "append_images": others, "duration": FRAME_MS, "loop": 0}
    if format == "gif":
        first.save(file, "GIF", **together)
    else:
        first.save(file, "WEBP", quality=quality, method=2, **together)
    return file.getvalue()


def accepted_format(accept: str) -> Format | Literal["json"]:
    """The first of an `Accept` header's most wanted types that is known; JSON if it names none of the image types."""
    return _most_wanted(accept, MEDIA_TYPES) or "json"


def accepted_animation(accept: str) -> Format | Literal["gif", "json"]:
    """As `accepted_format`, where GIF is known too."""
    return _most_wanted(accept, {**MEDIA_TYPES, "image/gif": "gif"}) or "json"


def _most_wanted(accept: str, known: Mapping[str, T]) -> T | None:
    wanted = []
    for entry in accept.split(","):
        media_type, *options = (part.strip().lower() for part in entry.split(";"))
        quality = next((option[2:] for option in options if option.startswith("q=")), "1")
        wanted.append((-_number(quality), media_type))
    ranked = sorted((entry for entry in wanted if entry[0] < 0), key=lambda entry: entry[0])
    return next((known[name] for _, name in ranked if name in known), None)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0
