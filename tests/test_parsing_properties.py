"""Whatever bytes come: a picture, a form or a body is understood, or refused with an error of ours;
never anything else.

What single odd files and bodies mean: test_images_hostile.py, test_images_decode.py, test_body.py.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import zlib
from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated

import numpy as np
import PIL.Image
from fastapi import Request
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

from server.api.body import FORM, JSON, read_body
from server.api.errors import ApiError
from server.api.images.decode import ImageLimits, decode
from server.api.images.sniff import PNG_MAGIC, DamagedFileError, UnknownFormatError, sniff
from server.api.schemas import ImageBytes, ImageBytesList, file_bytes
from tests.conftest import examples
from tests.hostile import encoded, gif, plain_png

LIMIT = 2**16
LIMITS = ImageLimits(max_bytes=LIMIT, max_pixels=64 * 64)
FILES = [plain_png(), encoded("JPEG"), encoded("WEBP"), gif()]
HEADS = [PNG_MAGIC, b"\xff\xd8\xff", b"RIFF\0\0\0\0WEBP", b"GIF89a", PNG_MAGIC + b"\0\0\0\rIHDR"]
BOUNDARY = "limit"

words = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0\r\n"), min_size=1, max_size=20
)
pixels = arrays(np.uint8, st.tuples(st.integers(1, 20), st.integers(1, 20), st.just(3)))


class Fields(BaseModel):
    """One field of each kind that bodies have."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: Annotated[str, Field(max_length=40)] = ""
    steps: Annotated[int, Field(ge=1, le=64)] | None = None
    scale: Annotated[float, Field(allow_inf_nan=False)] | None = None
    flag: bool = False
    image: ImageBytes | None = None
    images: Annotated[ImageBytesList, Field(max_length=3)] = []


def sent(body: bytes, content_type: str, cuts: Sequence[int] = ()) -> Fields:
    """What a body that arrives in these pieces is understood as. Raises ApiError."""
    edges = sorted({0, len(body), *(cut % (len(body) + 1) for cut in cuts)}) if body else [0, 0]
    pieces = (
        {"type": "http.request", "body": body[a:b], "more_body": b < len(body)}
        for a, b in pairwise(edges)
    )

    async def receive() -> dict[str, object]:
        return next(pieces)

    scope = {
        "type": "http",
        "method": "POST",
        "headers": [(b"content-type", content_type.encode("latin-1"))],
    }
    return asyncio.run(read_body(Request(scope, receive), Fields, LIMIT))


def form(*parts: tuple[str, bytes, bool]) -> bytes:
    """(name, content, whether it is a file) as multipart/form-data."""
    body = b""
    for name, content, is_file in parts:
        body += f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"'.encode() + (
            b'; filename="f"' if is_file else b""
        )
        body += b"\r\n\r\n" + content + b"\r\n"
    return body + f"--{BOUNDARY}--\r\n".encode()


# ── pictures ──────────────────────────────────────────────────────────────────────────────────────


@given(st.sampled_from(HEADS), st.binary(max_size=120))
@examples(200)
def test_what_begins_like_a_picture_has_a_size_or_is_damaged_and_never_grows(
    head: bytes, rest: bytes
) -> None:
    try:
        container = sniff(head + rest)
    except (DamagedFileError, UnknownFormatError):
        return
    assert len(container.content) <= len(head + rest)


@given(st.sampled_from(FILES), st.integers(0, 10_000))
@examples(80)
def test_a_file_cut_anywhere_is_a_picture_or_an_error_of_ours(content: bytes, end: int) -> None:
    decoded_or_refused(content[: end % len(content)])


@given(
    st.sampled_from(FILES), st.sampled_from(FILES), st.integers(0, 10_000), st.integers(0, 10_000)
)
@examples(80)
def test_a_file_with_anothers_middle_is_a_picture_or_an_error_of_ours(
    content: bytes, other: bytes, at: int, size: int
) -> None:
    at, size = at % len(content), size % len(other)
    decoded_or_refused(content[:at] + other[at : at + size] + content[at + size :])


def decoded_or_refused(content: bytes) -> None:
    status = 200
    try:
        assert decode(content, LIMITS).size
    except ApiError as error:
        status = error.status
    assert status in (200, 413, 422)


@given(pixels)
@examples(40)
def test_a_pngs_pixels_arrive_bit_for_bit(rgb: np.ndarray) -> None:
    assert np.array_equal(decode(png(rgb), LIMITS).rgb, rgb)


@given(
    pixels,
    st.lists(
        st.tuples(
            st.sampled_from([b"tEXt", b"iCCP", b"sRGB", b"acTL", b"zzZz"]), st.binary(max_size=40)
        ),
        max_size=5,
    ),
)
@examples(40)
def test_what_stands_in_a_png_beside_its_pixels_changes_nothing(
    rgb: np.ndarray, extras: list[tuple[bytes, bytes]]
) -> None:
    content = png(rgb)
    inserted = b"".join(
        len(data).to_bytes(4) + name + data + zlib.crc32(name + data).to_bytes(4)
        for name, data in extras
    )
    after_header = len(PNG_MAGIC) + 25
    assert np.array_equal(
        decode(content[:after_header] + inserted + content[after_header:], LIMITS).rgb, rgb
    )


def png(rgb: np.ndarray) -> bytes:
    file = io.BytesIO()
    PIL.Image.fromarray(rgb).save(file, "PNG")
    return file.getvalue()


@given(st.binary(max_size=200), st.lists(st.integers(0, 300), max_size=4), st.booleans())
@examples(80)
def test_base64_is_its_bytes_wherever_its_lines_break(
    content: bytes, breaks: list[int], as_url: bool
) -> None:
    text = base64.b64encode(content).decode()
    for at in breaks:
        text = text[:at] + "\r\n" + text[at:]
    assert file_bytes("data:image/png;base64," + text if as_url else text) == content


@given(st.text(max_size=60))
@examples(100)
def test_any_text_is_base64_or_an_error_of_ours(text: str) -> None:
    with contextlib.suppress(PydanticCustomError):
        assert isinstance(file_bytes(text), bytes)


# ── forms ─────────────────────────────────────────────────────────────────────────────────────────


@given(
    words,
    st.integers(1, 64),
    st.booleans(),
    st.binary(min_size=1, max_size=200),
    st.lists(st.binary(min_size=1), max_size=3),
    st.data(),
)
@examples(60)
def test_a_form_means_the_same_however_it_is_cut_into_pieces(
    prompt: str, steps: int, flag: bool, image: bytes, images: list[bytes], data: st.DataObject
) -> None:
    texts = [
        ("prompt", prompt.encode(), False),
        ("steps", str(steps).encode(), False),
        ("flag", str(flag).encode(), False),
    ]
    files = [("image", image, True), *(("images[]", each, True) for each in images)]
    body = form(*texts, *files)
    cuts = data.draw(st.lists(st.integers(0, len(body)), max_size=8))
    understood = sent(body, f"{FORM}; boundary={BOUNDARY}", cuts)
    assert (understood.prompt, understood.steps, understood.flag) == (prompt, steps, flag)
    assert (understood.image, understood.images) == (image, images)


@given(st.binary(max_size=80), st.integers(0, 400), st.integers(0, 80))
@examples(150)
@example(noise=b"\r\n--limit", at=0, skipped=0)
@example(noise=b"", at=300, skipped=80)
def test_a_damaged_form_is_understood_or_refused(noise: bytes, at: int, skipped: int) -> None:
    body = form(
        ("prompt", b"a red ball", False), ("steps", b"8", False), ("image", b"\x89PNG", True)
    )
    at %= len(body)
    refused_or_understood(body[:at] + noise + body[at + skipped :], f"{FORM}; boundary={BOUNDARY}")


@given(
    st.text(st.characters(max_codepoint=255, exclude_characters="\r\n\0"), max_size=40),
    st.binary(max_size=80),
)
@examples(100)
def test_any_parameters_of_the_content_type_are_understood_or_refused(
    parameters: str, body: bytes
) -> None:
    refused_or_understood(body, f"{FORM}; {parameters}")


# ── JSON ──────────────────────────────────────────────────────────────────────────────────────────

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(
    st.dictionaries(
        st.sampled_from(list(Fields.model_fields)) | st.text(max_size=8), values, max_size=4
    )
)
@examples(150)
def test_any_json_is_understood_or_refused(fields: dict[str, object]) -> None:
    refused_or_understood(json.dumps(fields).encode(), JSON)


@given(st.binary(max_size=60))
@examples(100)
def test_any_bytes_called_json_are_understood_or_refused(body: bytes) -> None:
    refused_or_understood(body, JSON)


@given(words, st.binary(min_size=1, max_size=60))
@examples(40)
def test_json_and_form_mean_the_same(prompt: str, image: bytes) -> None:
    as_json = json.dumps({"prompt": prompt, "image": base64.b64encode(image).decode()}).encode()
    as_form = form(("prompt", prompt.encode(), False), ("image", image, True))
    assert sent(as_json, JSON) == sent(as_form, f"{FORM}; boundary={BOUNDARY}")


def refused_or_understood(body: bytes, content_type: str) -> None:
    """The error says what is wrong in words that can be sent."""
    status, said = 200, b"{}"
    try:
        assert isinstance(sent(body, content_type), Fields)
    except ApiError as error:
        status, said = error.status, bytes(error.response().body)
    assert status in (200, 400, 413, 415, 422)
    json.loads(said)
