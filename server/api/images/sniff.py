"""Format and size of an image file from its header, and the part of the file a decoder needs.

This module decodes and decompresses nothing, and bounds every walk over a file. It removes texts,
comments and everything else that may grow on decoding, before a decoder sees the file. Colour
profiles are taken out, for server/api/images/colour.py.
"""

from __future__ import annotations

import re
import struct

import numpy as np
from numpy.typing import NDArray

from server.api.images import DamagedFileError, ImageFile, UnknownFormatError
from server.api.images.bmff import still_image

PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
# The chunks that affect the image; without the others an animation is its default image.
PNG_CHUNKS = frozenset({b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"eXIf", b"IEND"})
PNG_COLOURS = frozenset({b"cICP", b"iCCP", b"sRGB", b"gAMA", b"cHRM"})
# Encoders write chunks of 8 KiB and more; millions of empty ones keep a decoder busy for a minute.
MAX_PNG_CHUNKS = 20_000

JPEG_SOI = b"\xff\xd8"
JPEG_EOI = b"\xff\xd9"
EOI, SOS, JPEG_LS = 0xD9, 0xDA, 0xF7
JPEG_FRAMES = frozenset(
    {0xC0, 0xC1, 0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF, JPEG_LS}
)
JPEG_PROGRESSIVE = frozenset({0xC2, 0xC6, 0xCA, 0xCE})
# Comments and application data, except JFIF (E0) and Adobe (EE), which define the colour coding.
JPEG_EXTRAS = frozenset({0xFE, 0xEF, *range(0xE1, 0xEE)})
# The second bytes of markers with data, and of the end: padding, stuffing, TEM and the restart
# markers are none.
JPEG_MARKERS = ~np.isin(np.arange(256), [0x00, 0x01, 0xFF, *range(0xD0, 0xD8)])
# Markers that may follow the pixels of a scan: tables, another scan, comments, and the end.
JPEG_AFTER_SCAN = np.isin(
    np.arange(256), [0xC4, 0xCC, EOI, SOS, 0xDB, 0xDC, 0xDD, 0xFE, *range(0xE0, 0xF0)]
)
EXIF = b"Exif\0\0"
ICC = b"ICC_PROFILE\0"
MAX_JPEG_SEGMENTS = 2000
# A progressive file has about ten. Each scan costs a pass over all pixels and may take four bytes.
MAX_JPEG_SCANS = 100
SEARCH_BYTES = 64 * 1024

# Other files that clients send, recognised only to be named in the error: by how they begin, …
OTHER_FORMATS: dict[str, tuple[bytes, ...]] = {
    "PDF": (b"%PDF",),
    "EPS or PostScript": (b"%!PS", b"\xc5\xd0\xd3\xc6"),
    "ZIP": (b"PK\x03\x04",),
    "gzip": (b"\x1f\x8b",),
    "BMP": (b"BM",),
    "TIFF": (b"II*\0", b"MM\0*"),
    "BigTIFF": (b"II+\0", b"MM\0+"),
    "PSD": (b"8BPS",),
    "ICO": (b"\0\0\x01\0",),
    "JPEG 2000": (b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51"),
    "JPEG XL": (b"\0\0\0\x0cJXL ", b"\xff\x0a"),
    "JPEG XR": (b"II\xbc",),
    "PNM": tuple(b"P%d\n" % kind for kind in range(1, 8)),
    "WebM or Matroska video": (b"\x1aE\xdf\xa3",),
    "a Git LFS pointer; fetch the file with git lfs pull": (b"version https://git-lfs",),
    "an image that was converted as UTF-8 text; read it as bytes": (
        b"\xef\xbf\xbdPNG",
        b"\xef\xbf\xbd" * 3,
        b"\xc2\x89PNG",
        b"\xc3\xbf\xc3\x98\xc3\xbf",
    ),
    "a PNG whose line ends were converted; read it as bytes": (
        b"\x89PNG\n\x1a\n",
        b"\x89PNG\r\r\n",
    ),
}
# … and texts by what they begin with, behind a byte order mark and white space.
OTHER_TEXTS = {
    "base64 or a data URL as the content of a file; send the image itself": re.compile(
        rb"data:|iVBORw0KGgo|/9j/|UklGR|R0lGOD|AAAA..Z0eX"
    ),
    "JSON": re.compile(rb"[{\[]"),
    "SVG": re.compile(rb".*<svg", re.DOTALL | re.IGNORECASE),
    "HTML or XML": re.compile(rb"<"),
}
TGA_END = b"TRUEVISION-XFILE.\0"


def sniff(content: bytes) -> ImageFile:
    """Return format, size and content of an image file.

    Raises:
        UnknownFormatError: the file is no PNG, JPEG, WebP, GIF, AVIF or HEIC.
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
        if content[4:8] == b"ftyp":
            return still_image(content)
    except (struct.error, IndexError):
        raise DamagedFileError("it ends within its header") from None
    raise UnknownFormatError(_other_format(content))


def _png(content: bytes) -> ImageFile:
    if content[12:16] != b"IHDR":
        raise DamagedFileError("the first chunk is not IHDR")
    width, height = struct.unpack_from(">II", content, 16)
    kept, start = [PNG_MAGIC], len(PNG_MAGIC)
    colour: dict[str, bytes] = {}
    for _ in range(MAX_PNG_CHUNKS):
        name, end = (
            content[start + 4 : start + 8],
            start + 12 + int.from_bytes(content[start : start + 4]),
        )
        if name in PNG_CHUNKS:
            kept.append(content[start:end])
        elif name in PNG_COLOURS:
            colour.setdefault(name.decode(), content[start + 8 : end - 4])
        start = end
        if name == b"IEND" or start >= len(content):
            return ImageFile("PNG", width, height, b"".join(kept), colour)
    raise DamagedFileError(f"it has more than {MAX_PNG_CHUNKS} chunks")


def _webp(content: bytes) -> ImageFile:
    colour: dict[str, bytes] = {}
    match content[12:16]:
        case b"VP8X":
            width, height = (1 + int.from_bytes(content[at : at + 3], "little") for at in (24, 27))
            if content[30:34] == b"ICCP":
                colour["icc"] = content[38 : 38 + int.from_bytes(content[34:38], "little")]
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
    return ImageFile("WEBP", width, height, content, colour)


def _gif(content: bytes) -> ImageFile:
    """Return the larger of the canvas and the first frame, which may exceed the canvas."""
    width, height, flags = struct.unpack_from("<HHB", content, 6)
    head = start = 13 + gif_palette_bytes(flags)
    control = b""
    while content[start] == 0x21:
        end = after_gif_blocks(content, start + 2)
        if content[start + 1] == 0xF9:  # the graphic control holds the transparent colour
            control = content[start:end]
        start = end
    if content[start] != 0x2C:
        raise DamagedFileError("it has no frame")
    x, y, frame_width, frame_height = struct.unpack_from("<HHHH", content, start + 1)
    content = content[:head] + control + content[start:]
    area = x, y, x + frame_width, y + frame_height
    width, height = max(width, area[2]), max(height, area[3])
    covered = area == (0, 0, width, height)
    return ImageFile("GIF", width, height, content, area=None if covered else area)


def gif_palette_bytes(flags: int) -> int:
    """Return the length of the palette that the flags of a GIF or of one of its frames announce."""
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0


def after_gif_blocks(content: bytes, start: int) -> int:
    """Return where a GIF's chain of length-prefixed blocks ends."""
    while length := content[start]:
        start += 1 + length
    return start + 1


def _other_format(content: bytes) -> str:
    for name, beginnings in OTHER_FORMATS.items():
        if content.startswith(beginnings):
            return name
    text = content[:1000].lstrip(b"\xef\xbb\xbf \t\r\n")
    for name, beginning in OTHER_TEXTS.items():
        if beginning.match(text):
            return name
    return "TGA" if content.endswith(TGA_END) else "none of these"


# ── JPEG ──────────────────────────────────────────────────────────────────────────────────────────


def _jpeg(content: bytes) -> ImageFile:
    """Read the segments before the pixels. Bytes between segments are skipped, as viewers do."""
    kept: list[bytes] = []
    profile: dict[int, bytes] = {}
    exif, size = b"", None
    start = 2
    for _ in range(MAX_JPEG_SEGMENTS):
        start = _next_marker(content, start, JPEG_MARKERS)
        marker = content[start + 1]
        if marker == EOI:
            raise DamagedFileError("it ends before its pixels")
        if marker == SOS:
            break
        end = start + 2 + struct.unpack_from(">H", content, start + 2)[0]
        if marker in JPEG_FRAMES:
            size = _frame_size(content, start)
        if marker not in JPEG_EXTRAS:
            kept.append(content[start:end])
        elif not exif and content.startswith(EXIF, start + 4):
            exif = content[start:end]
        elif content.startswith(ICC, start + 4):
            # The number of this part, and of all parts.
            profile[256 * content[start + 17] + content[start + 16]] = content[start + 18 : end]
        start = end
    else:
        raise DamagedFileError(f"it has more than {MAX_JPEG_SEGMENTS} segments")
    if size is None:
        raise DamagedFileError("it has no frame header")
    end_of_image = _end_of_image(content, start)
    pixels = content[start:end_of_image].removesuffix(b"\xff")
    ended = end_of_image is not None
    parts = [JPEG_SOI, exif, *kept, pixels, JPEG_EOI if ended else b""]
    colour = _whole_profile(profile)
    return ImageFile("JPEG", size[1], size[0], b"".join(parts), colour, ended=ended)


def _frame_size(content: bytes, start: int) -> tuple[int, int]:
    """Return height and width by a frame header. Raises UnknownFormatError for rare codings."""
    if content[start + 1] == JPEG_LS:
        raise UnknownFormatError("JPEG-LS")
    bits, height, width = struct.unpack_from(">BHH", content, start + 4)
    if bits > 8:
        raise UnknownFormatError(f"JPEG with {bits} bits a channel; send 8")
    return height, width


def _end_of_image(content: bytes, start: int) -> int | None:
    """Return where the end marker is of the image whose first scan is at `start`; None if absent.

    Whatever follows is another file: a phone's video, a second view, a gain map.
    """
    scans = 0
    for _ in range(MAX_JPEG_SEGMENTS):
        try:
            start = _next_marker(content, start, JPEG_AFTER_SCAN)
        except DamagedFileError:
            return None
        if content[start + 1] == EOI:
            return start
        scans += content[start + 1] == SOS
        if scans > MAX_JPEG_SCANS:
            raise DamagedFileError(f"it has more than {MAX_JPEG_SCANS} scans")
        start += 2 + int.from_bytes(content[start + 2 : start + 4])
    raise DamagedFileError(f"it has more than {MAX_JPEG_SEGMENTS} segments")


def _next_marker(content: bytes, start: int, markers: NDArray[np.bool_]) -> int:
    """Return where the next marker is whose second byte is true in `markers`, [256].

    Raises DamagedFileError if there is none.
    """
    for begin in range(start, len(content) - 1, SEARCH_BYTES):
        block = np.frombuffer(content[begin : begin + SEARCH_BYTES + 1], np.uint8)
        found = (block[:-1] == 0xFF) & markers[block[1:]]
        if found.any():
            return begin + int(found.argmax())
    raise DamagedFileError("a marker of it is missing")


def _whole_profile(parts: dict[int, bytes]) -> dict[str, bytes]:
    """Return the ICC profile whose parts have keys 256 × their count + 1…; nothing if one lacks."""
    count = len(parts)
    if not count or sorted(parts) != [256 * count + i for i in range(1, count + 1)]:
        return {}
    return {"icc": b"".join(data for _, data in sorted(parts.items()))}


def coefficient_bytes(file: ImageFile) -> int:
    """Return the bytes of coefficients that a decoder of a JPEG holds until it has read all scans.

    0 if the first scan has all components, so that the image is decoded row by row.
    """
    content, start = file.content, len(JPEG_SOI)
    components, is_progressive = b"", False
    while start + 5 <= len(content) and content[start + 1] != SOS:
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
