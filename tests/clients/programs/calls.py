"""For the Python programs: addresses, small images, and one line of JSON per call."""

from __future__ import annotations

import json
import os
import struct
import urllib.request
import zlib
from collections.abc import Awaitable, Callable
from typing import Any

ADDRESS = os.environ["CLIENT_TEST_URL"]
MODEL = os.environ["CLIENT_TEST_MODEL"]
BASE = f"{ADDRESS}/v1"
SIDE = 64


def png(hole: bool = False) -> bytes:
    """A red square as RGBA; hole: its middle is transparent."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    rows = b""
    for y in range(SIDE):
        inside = [hole and SIDE // 4 <= v < 3 * SIDE // 4 for v in (y, *range(SIDE))]
        rows += b"\0" + b"".join(
            bytes((220, 40, 30, 0 if inside[0] and each else 255)) for each in inside[1:]
        )
    header = struct.pack(">IIBBBBB", SIDE, SIDE, 8, 6, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*each) for each in chunks)


IMAGE, MASK = png(), png(hole=True)


def check(condition: object, *what: object) -> None:
    if not condition:
        raise AssertionError(*what)


def check_png(content: bytes | None, size: tuple[int, int] | None = None) -> str:
    """Check that it is a PNG; return its size."""
    check(content is not None and content.startswith(b"\x89PNG"), content and content[:16])
    assert content is not None
    width, height = struct.unpack(">II", content[16:24])
    check(size in (None, (width, height)), size, (width, height))
    return f"{width}x{height}"


def fetched(url: str) -> bytes:
    """What stands at an address."""
    with urllib.request.urlopen(url, timeout=60) as answer:
        return bytes(answer.read())


def report(call: str, ok: bool, note: object) -> None:
    print(json.dumps({"call": call, "ok": ok, "note": str(note)}), flush=True)


def run(**calls: Callable[[], Any]) -> None:
    """Make the calls, one after the other."""
    for name, call in calls.items():
        try:
            report(name, True, call() or "")
        except Exception as error:
            report(name, False, f"{type(error).__name__}: {error}"[:300])


async def run_async(**calls: Callable[[], Awaitable[Any]]) -> None:
    """As `run`, for coroutines."""
    for name, call in calls.items():
        try:
            report(name, True, await call() or "")
        except Exception as error:
            report(name, False, f"{type(error).__name__}: {error}"[:300])
