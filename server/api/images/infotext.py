"""AUTOMATIC1111's text of an image's parameters, which its programs keep in a PNG's text chunk.

The prompt comes first, then `Negative prompt: …`, then one line such as `Steps: 12, Sampler: Euler
a, CFG scale: 7, Seed: 7, Size: 256x256`. Values with commas, colons or line breaks are JSON texts.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

from server.api.images.sniff import PNG_MAGIC

# Text chunks that are read from a file, and the bytes of all their texts together.
MAX_TEXTS = 64
MAX_TEXT_BYTES = 256 * 1024
# Chunks that are looked at; `sniff.MAX_PNG_CHUNKS` bounds those of a file that is decoded.
MAX_CHUNKS = 20_000

NEGATIVE = "Negative prompt:"
# Fewer fields than these in the last line make it a part of the prompt.
MIN_FIELDS = 3
_NAME = re.compile(r"\w[\w /-]*", re.ASCII)
_QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"')
_SIZE = re.compile(r"(\d{1,5})x(\d{1,5})", re.ASCII)


def write_infotext(prompt: str, negative_prompt: str, fields: Mapping[str, object]) -> str:
    """Return the text of an image. fields: of the last line, in order; None is left out."""
    shown = [f"{name}: {_quoted(value)}" for name, value in fields.items() if value is not None]
    negative = [f"{NEGATIVE} {negative_prompt}"] if negative_prompt else []
    return "\n".join([prompt, *negative, ", ".join(shown)]).strip()


def _quoted(value: object) -> str:
    # As their programs write numbers: 4, not 4.0.
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return json.dumps(text, ensure_ascii=False) if re.search(r'[,:\n"]', text) else text


def read_infotext(text: str) -> dict[str, Any]:
    """Return the fields of an image's text, under AUTOMATIC1111's names.

    `Prompt` and `Negative prompt` are always there; `Size: 64x32` becomes `Size-1` and `Size-2`.
    The JSON that Paellera's own endpoints write is returned as it is.
    """
    if (recorded := _recorded(text)) is not None:
        return recorded
    *lines, last = text.strip().split("\n")
    fields = dict(_fields(last))
    if len(fields) < MIN_FIELDS:
        lines, fields = [*lines, last], {}
    negative_from = next((i for i, line in enumerate(lines) if _is_negative(line)), len(lines))
    negative = [line.strip().removeprefix(NEGATIVE).strip() for line in lines[negative_from:]]
    prompt = [line.strip() for line in lines[:negative_from]]
    return {"Prompt": "\n".join(prompt), "Negative prompt": "\n".join(negative), **fields}


def _recorded(text: str) -> dict[str, Any] | None:
    """Return the object in a JSON text, None for other texts."""
    if not text.startswith("{"):
        return None
    try:
        fields = json.loads(text)
        json.dumps(fields, allow_nan=False)
    except (ValueError, RecursionError):
        return None
    return dict(fields)


def _is_negative(line: str) -> bool:
    return line.strip().startswith(NEGATIVE)


def _fields(line: str) -> Iterator[tuple[str, str]]:
    """Yield the (name, value) pairs of a line; what is not a pair is skipped."""
    start = 0
    while start < len(line):
        comma = line.find(",", start)
        end = len(line) if comma < 0 else comma
        name, colon, value = line[start:end].partition(":")
        quote = start + len(name) + 1 + len(value) - len(value.lstrip())
        if colon and (quoted := _QUOTED.match(line, quote)):
            value, end = _unquoted(quoted[0]), quoted.end()
            comma = line.find(",", end)
            end = len(line) if comma < 0 else comma
        start = end + 1
        if colon and _NAME.fullmatch(name.strip()):
            yield from _expanded(name.strip(), value.strip())


def _unquoted(text: str) -> str:
    try:
        return str(json.loads(text))
    except ValueError:
        return text


def _expanded(name: str, value: str) -> Iterator[tuple[str, str]]:
    if size := _SIZE.fullmatch(value):
        yield f"{name}-1", size[1]
        yield f"{name}-2", size[2]
    else:
        yield name, value


# ── text chunks of a PNG ──────────────────────────────────────────────────────────────────────────


def png_texts(content: bytes) -> dict[str, str]:
    """Return the texts in a PNG by keyword; none for other files.

    Damaged chunks, and those beyond `MAX_TEXTS` and `MAX_TEXT_BYTES`, are left out.
    """
    texts: dict[str, str] = {}
    left = MAX_TEXT_BYTES
    for name, data in _chunks(content):
        if len(texts) >= MAX_TEXTS or left <= 0:
            break
        try:
            keyword, text = _text(name, data, left)
        except (ValueError, zlib.error):
            continue
        left -= len(text)
        texts.setdefault(keyword, text)
    return texts


def _chunks(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield the text chunks of a PNG: (type, data)."""
    if not content.startswith(PNG_MAGIC):
        return
    start = len(PNG_MAGIC)
    for _ in range(MAX_CHUNKS):
        size, name = int.from_bytes(content[start : start + 4]), content[start + 4 : start + 8]
        if len(name) < 4 or name == b"IEND":
            return
        if name in (b"tEXt", b"zTXt", b"iTXt"):
            yield name, content[start + 8 : start + 8 + size]
        start += 12 + size


def _text(name: bytes, data: bytes, limit: int) -> tuple[str, str]:
    """Return keyword and text of a chunk. Raises ValueError or zlib.error if it is damaged."""
    keyword, _, rest = data.partition(b"\0")
    encoding, is_compressed = "latin-1", name == b"zTXt"
    if name == b"iTXt":
        encoding, is_compressed = "utf-8", rest[:1] == b"\1"
        # Compression flag and method, then language and translated keyword.
        _, _, translated = rest[2:].partition(b"\0")
        _, _, rest = translated.partition(b"\0")
    elif is_compressed:
        rest = rest[1:]
    if is_compressed:
        rest = zlib.decompressobj().decompress(rest, limit + 1)
    if len(rest) > limit:
        raise ValueError("the text is too long")
    return keyword.decode("latin-1"), rest.decode(encoding)
