"""Format and size of an image file from its header, and the part of the file a decoder needs.

This module decodes and decompresses nothing, and bounds every walk over a file. It removes texts,
colour profiles, comments and everything else that may grow on decoding, before a decoder sees
the file.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Literal

FileFormat = Literal["PNG", "JPEG", "WEBP", "GIF"]

PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
# The chunks that affect the image; without the others an animation is its default image.
PNG_CHUNKS = frozenset({b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"eXIf", b"IEND"})
# Encoders write chunks of 8 KiB and more; millions of empty ones keep a decoder busy for a minute.
MAX_PNG_CHUNKS = 20_000

JPEG_SOI, JPEG_SOS = b"\xff\xd8", b"\xff\xda"
JPEG_FRAMES = frozenset(
    {0xC0, 0xC1, 0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF}
)
JPEG_PROGRESSIVE = frozenset({0xC2, 0xC6, 0xCA, 0xCE})
# Comments and application data, except JFIF (E0) and Adobe (EE), which define the colour coding.
JPEG_EXTRAS = frozenset({0xFE, 0xEF, *range(0xE1, 0xEE)})
EXIF = b"Exif\0\0"
MAX_JPEG_SEGMENTS = 2000
# A progressive file has about ten. Each scan costs a pass over all pixels and may take four bytes.
MAX_JPEG_SCANS = 100

# Other formats that clients send, recognised only to be named in the error.
OTHER_FORMATS = {
    b"%PDF": "PDF",
    b"PK\x03\x04": "ZIP",
    b"BM": "BMP",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"8BPS": "PSD",
    b"\0\0\x01\0": "ICO",
    b"\0\0\0\x0cjP  ": "JPEG 2000",
    b"\xff\x0a": "JPEG XL",
    b"\x1f\x8b": "gzip",
}


class UnknownFormatError(Exception):
    """The file has none of the four formats. The message names the format, if known."""


class DamagedFileError(Exception):
    """The file begins as one of the four formats but is damaged. The message says where."""


@dataclass(frozen=True, slots=True)
class ImageFile:
    """An image file whose header was read.

    Attributes:
        width: pixels, as in the header, before any rotation.
        height: as width.
        content: the file without the parts that do not affect the image.
    """

    format: FileFormat
    width: int
    height: int
    content: bytes

    @property
    def pixels(self) -> int:
        """Width times height."""
        return self.width * self.height


def sniff(content: bytes) -> ImageFile:
    """Return format, size and content of an image file.

    Raises:
        UnknownFormatError: the file is no PNG, JPEG, WebP or GIF.
        DamagedFileError: the file has no readable size.
    """
    try:
        if content.startswith(PNG_MAGIC):
            return _png(content)
        if content.startswith(JPEG_SOI + b"\xff"):
            return _jpeg(content)
        if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
            return _webp(content)
        if content.startswith((b"GIF87a", b"GIF89a")):
            return _gif(content)
    except (struct.error, IndexError):
        raise DamagedFileError("it ends within its header") from None
    raise UnknownFormatError(_other_format(content))


def _png(content: bytes) -> ImageFile:
    if content[12:16] != b"IHDR":
        raise DamagedFileError("the first chunk is not IHDR")
    width, height = struct.unpack_from(">II", content, 16)
    kept, start = [PNG_MAGIC], len(PNG_MAGIC)
    for _ in range(MAX_PNG_CHUNKS):
        name, end = (
            content[start + 4 : start + 8],
            start + 12 + int.from_bytes(content[start : start + 4]),
        )
        if name in PNG_CHUNKS:
            kept.append(content[start:end])
        start = end
        if name == b"IEND" or start >= len(content):
            return ImageFile("PNG", width, height, b"".join(kept))
    raise DamagedFileError(f"it has more than {MAX_PNG_CHUNKS} chunks")


def _jpeg(content: bytes) -> ImageFile:
    kept: list[bytes] = []
    exif, start, size = b"", 2, None
    for _ in range(MAX_JPEG_SEGMENTS):
        while content[start : start + 2] == b"\xff\xff":  # a marker may be padded
            start += 1
        marker, end = (
            content[start + 1],
            start + 2 + struct.unpack_from(">H", content, start + 2)[0],
        )
        if content[start] != 0xFF:
            raise DamagedFileError("there is no marker where a segment must begin")
        if marker in JPEG_FRAMES:
            size = struct.unpack_from(">HH", content, start + 5)
        if marker == JPEG_SOS[1]:
            return _jpeg_of(b"".join([JPEG_SOI, exif, *kept, content[start:]]), size)
        if marker not in JPEG_EXTRAS:
            kept.append(content[start:end])
        elif not exif and content.startswith(EXIF, start + 4):
            exif = content[start:end]
        start = end
    raise DamagedFileError(f"it has more than {MAX_JPEG_SEGMENTS} segments")


def _jpeg_of(content: bytes, size: tuple[int, int] | None) -> ImageFile:
    if size is None:
        raise DamagedFileError("it has no frame header")
    # Coded pixels never hold these two bytes.
    if content.count(JPEG_SOS) > MAX_JPEG_SCANS:
        raise DamagedFileError(f"it has more than {MAX_JPEG_SCANS} scans")
    return ImageFile("JPEG", size[1], size[0], content)


def coefficient_bytes(file: ImageFile) -> int:
    """Return the bytes of coefficients that a decoder of a JPEG holds until it has read all scans.

    0 if the first scan has all components, so that the image is decoded row by row.
    """
    content, start = file.content, len(JPEG_SOI)
    components, is_progressive = b"", False
    while start + 5 <= len(content) and content[start + 1] != JPEG_SOS[1]:
        end = start + 2 + int.from_bytes(content[start + 2 : start + 4])
        if content[start + 1] in JPEG_FRAMES:
            is_progressive = content[start + 1] in JPEG_PROGRESSIVE
            components = content[start + 10 : end]
        start = end
    if not is_progressive and content[start + 4 : start + 5] == bytes([len(components) // 3]):
        return 0
    # Horizontal and vertical sampling factors, four bits each.
    factors = [(byte >> 4, byte & 15) for byte in components[1::3]]
    densest = max((x for x, _ in factors), default=1) * max((y for _, y in factors), default=1)
    return 2 * file.pixels * sum(x * y for x, y in factors) // max(1, densest)


def _webp(content: bytes) -> ImageFile:
    match content[12:16]:
        case b"VP8X":
            width, height = (1 + int.from_bytes(content[at : at + 3], "little") for at in (24, 27))
        case b"VP8L":
            (bits,) = struct.unpack_from("<I", content, 21)
            width, height = 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
        case b"VP8 ":
            width, height = (side & 0x3FFF for side in struct.unpack_from("<HH", content, 26))
        case _:
            raise DamagedFileError("the first chunk is none of WebP's")
    # A size beyond the end of the file would read as zeros.
    if len(content) < 30:
        raise DamagedFileError("it ends within its header")
    return ImageFile("WEBP", width, height, content)


def _gif(content: bytes) -> ImageFile:
    """Return the larger of the canvas and the first frame, which may exceed the canvas."""
    width, height, flags = struct.unpack_from("<HHB", content, 6)
    head = start = 13 + _palette_bytes(flags)
    control = b""
    while content[start] == 0x21:
        end = _after_blocks(content, start + 2)
        if content[start + 1] == 0xF9:  # the graphic control holds the transparent colour
            control = content[start:end]
        start = end
    if content[start] != 0x2C:
        raise DamagedFileError("it has no frame")
    x, y, frame_width, frame_height = struct.unpack_from("<HHHH", content, start + 1)
    content = content[:head] + control + content[start:]
    return ImageFile("GIF", max(width, x + frame_width), max(height, y + frame_height), content)


def _palette_bytes(flags: int) -> int:
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0


def _after_blocks(content: bytes, start: int) -> int:
    """Return where a chain of length-prefixed blocks ends."""
    while length := content[start]:
        start += 1 + length
    return start + 1


def _other_format(content: bytes) -> str:
    for magic, name in OTHER_FORMATS.items():
        if content.startswith(magic):
            return name
    if content[4:8] == b"ftyp":
        return "AVIF, HEIC or video"
    text = content[:1000].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if b"<svg" in text:
        return "SVG"
    return "HTML or XML" if text.startswith(b"<") else "none of these"
