"""Uploaded and generated image files: header checks, decoding, encoding, metadata."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

FileFormat = Literal["PNG", "JPEG", "WEBP", "GIF", "AVIF", "HEIF"]


class UnknownFormatError(Exception):
    """The file has none of the formats. The message names the format, if known."""


class DamagedFileError(Exception):
    """The file begins as one of the formats but is damaged. The message says where."""


@dataclass(frozen=True, slots=True)
class ImageFile:
    """An image file whose header was read.

    Attributes:
        width: pixels, as in the header, before any rotation or cropping.
        height: as width.
        content: the file without the parts that do not affect the image.
        colour: descriptions of its colours by name: `icc` is an ICC profile, `nclx` the code points
            of AVIF and HEIC; the others are the contents of PNG chunks.
        area: (left, top, right, bottom) of the first image, if it leaves a part of the canvas free.
        ended: whether a JPEG has an end marker.
        compact: whether a HEIC has 8 bits and 4:2:0 or grey, as photos have; it takes less memory.
    """

    format: FileFormat
    width: int
    height: int
    content: bytes
    colour: Mapping[str, bytes] = field(default_factory=dict)
    area: tuple[int, int, int, int] | None = None
    ended: bool = True
    compact: bool = False

    @property
    def pixels(self) -> int:
        """Width times height."""
        return self.width * self.height
