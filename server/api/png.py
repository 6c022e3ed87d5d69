"""RGB pixels → a PNG file.

Pillow tries five filters on every line, which takes longer than the compression does. One filter for all lines, and a compressor that looks
for runs alone, give files of a generated picture that are a fourteenth larger in two fifths of the time.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping

import numpy as np

SIGNATURE = b"\x89PNG\r\n\x1a\n"
_EIGHT_BITS, _RGB = 8, 2
# Every byte less that of the pixel on its left.
_SUB = 1
_CHANNELS = 3


def png(pixels: bytes | memoryview, width: int, height: int, text: Mapping[str, str]) -> bytes:
    """pixels: height × width × 3 bytes. text: by keyword, both ASCII."""
    header = struct.pack(">IIBBBBB", width, height, _EIGHT_BITS, _RGB, 0, 0, 0)
    texts = [_chunk(b"tEXt", b"\0".join((key.encode("ascii"), value.encode("ascii")))) for key, value in text.items()]
    compressor = zlib.compressobj(level=1, strategy=zlib.Z_RLE)
    data = compressor.compress(_filtered(np.frombuffer(pixels, np.uint8).reshape(height, -1))) + compressor.flush()
    return b"".join([SIGNATURE, _chunk(b"IHDR", header), *texts, _chunk(b"IDAT", data), _chunk(b"IEND", b"")])


def _filtered(lines: np.ndarray) -> bytes:
    """[height, width × 3] → every line's filter type, then what the filter leaves."""
    filtered = np.empty((len(lines), 1 + lines.shape[1]), np.uint8)
    filtered[:, 0] = _SUB
    filtered[:, 1 : 1 + _CHANNELS] = lines[:, :_CHANNELS]
    np.subtract(lines[:, _CHANNELS:], lines[:, :-_CHANNELS], out=filtered[:, 1 + _CHANNELS :])
    return filtered.tobytes()


def _chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
