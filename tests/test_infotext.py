"""AUTOMATIC1111's text of parameters: written, read again, and read from hostile files."""

from __future__ import annotations

import io
import json
import timeit
import zlib

import hypothesis.strategies as st
import PIL.Image
import pytest
from hypothesis import given
from PIL.PngImagePlugin import PngInfo

from server.api.images.infotext import (
    MAX_TEXT_BYTES,
    png_texts,
    read_infotext,
    write_infotext,
)
from server.api.images.sniff import PNG_MAGIC
from tests.hostile import chunk

# As A1111 1.10 wrote it.
ORIGINAL = (
    "a red ball, (glossy:1.2)\non a blue table\n"
    "Negative prompt: blurry, text\nworst quality\n"
    "Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7.5, Seed: 1234567890,"
    " Size: 512x768, Model hash: 6ce0161689, Model: v1-5-pruned, Denoising strength: 0.7,"
    ' Lora hashes: "a: 12ab, b: 34cd", Version: v1.10.1'
)


def test_the_original_s_text_is_read() -> None:
    assert read_infotext(ORIGINAL) == {
        "Prompt": "a red ball, (glossy:1.2)\non a blue table",
        "Negative prompt": "blurry, text\nworst quality",
        "Steps": "20",
        "Sampler": "DPM++ 2M",
        "Schedule type": "Karras",
        "CFG scale": "7.5",
        "Seed": "1234567890",
        "Size-1": "512",
        "Size-2": "768",
        "Model hash": "6ce0161689",
        "Model": "v1-5-pruned",
        "Denoising strength": "0.7",
        "Lora hashes": "a: 12ab, b: 34cd",
        "Version": "v1.10.1",
    }


def test_what_is_written_is_in_the_original_s_form() -> None:
    fields = {"Steps": 12, "Sampler": "Euler a", "Nothing": None, "Note": "a, b: c"}
    assert write_infotext("a ball", "blur", fields) == (
        'a ball\nNegative prompt: blur\nSteps: 12, Sampler: Euler a, Note: "a, b: c"'
    )
    assert write_infotext("", "", fields).startswith("Steps: 12")
    assert write_infotext("a ball", "", {"Seed": -3}) == "a ball\nSeed: -3"
    numbers = {"Mask blur": 4.0, "Hires upscale": 2.0, "Denoising strength": 0.75}
    assert write_infotext("", "", numbers) == (
        "Mask blur: 4, Hires upscale: 2, Denoising strength: 0.75"
    )


VALUES = st.text(st.characters(exclude_categories=("C", "Z")) | st.sampled_from(' ,:"\\'))
LINES = st.lists(
    st.text(st.characters(exclude_categories=("C", "Z")) | st.just(" "), min_size=1)
    .map(str.strip)
    .filter(lambda line: line and not line.startswith(("Negative prompt:", "{"))),
    min_size=1,
)


@given(LINES, LINES | st.just([]), VALUES.map(str.strip).filter(bool))
def test_what_is_written_is_read_again(prompt: list[str], negative: list[str], value: str) -> None:
    fields = {"Steps": 12, "Seed": -7, "Requested sampler": value}
    text = write_infotext("\n".join(prompt), "\n".join(negative), fields)
    found = read_infotext(text)
    assert found.pop("Prompt") == "\n".join(prompt)
    assert found.pop("Negative prompt") == "\n".join(negative)
    if "x" not in value:
        assert found == {name: str(each) for name, each in fields.items()}


@pytest.mark.parametrize(
    "text",
    ["", "a ball", "a ball: red, box: blue", "{no json", '{"a": NaN}', "[1]", "{" * 100_000],
)
def test_a_text_without_parameters_is_a_prompt(text: str) -> None:
    assert read_infotext(text) == {"Prompt": text, "Negative prompt": ""}


def test_the_json_of_the_native_endpoints_is_returned_as_it_is() -> None:
    assert read_infotext('{"prompt": "a ball", "seed": 7}') == {"prompt": "a ball", "seed": 7}


@given(st.text())
def test_any_text_is_read(text: str) -> None:
    json.dumps(read_infotext(text))


@pytest.mark.parametrize("unit", ['a:"', 'a:"\\', "a,", "a:", '"', 'a:"b",'])
def test_a_long_line_is_read_in_linear_time(unit: str) -> None:
    def seconds(size: int) -> float:
        text = unit * (size // len(unit))
        return min(timeit.repeat(lambda: read_infotext(text), number=1, repeat=3))

    assert seconds(MAX_TEXT_BYTES) < 8 * seconds(MAX_TEXT_BYTES // 4)


# ── text chunks ───────────────────────────────────────────────────────────────────────────────────


def with_chunks(*chunks: bytes) -> bytes:
    return b"".join([PNG_MAGIC, *chunks, chunk(b"IEND", b"")])


def test_pillow_s_texts_are_read_whatever_their_chunk() -> None:
    info = PngInfo()
    info.add_text("parameters", "grün")
    info.add_text("zipped", "a" * 1000, zip=True)
    info.add_itxt("utf-8", "❤", "en", "Herz")
    info.add_itxt("zipped utf-8", "❤" * 1000, "en", "Herz", zip=True)
    file = io.BytesIO()
    PIL.Image.new("RGB", (1, 1)).save(file, "PNG", pnginfo=info)
    assert png_texts(file.getvalue()) == {
        "parameters": "grün",
        "zipped": "a" * 1000,
        "utf-8": "❤",
        "zipped utf-8": "❤" * 1000,
    }


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"JFIF",
        PNG_MAGIC,
        with_chunks(chunk(b"zTXt", b"bomb\0\0" + zlib.compress(bytes(100 * MAX_TEXT_BYTES)))),
        with_chunks(chunk(b"zTXt", b"no zlib\0\0\0\0")),
        with_chunks(chunk(b"iTXt", b"no utf-8\0\0\0\0\0\xff")),
        with_chunks(chunk(b"tEXt", b"long\0" + bytes(MAX_TEXT_BYTES + 1))),
        PNG_MAGIC + b"\0" * 100,
        PNG_MAGIC + b"\xff\xff\xff\xfftEX",
    ],
)
def test_damaged_and_endless_texts_are_left_out(content: bytes) -> None:
    assert png_texts(content) == {}


def test_the_number_of_texts_and_their_sum_are_bounded() -> None:
    many = with_chunks(*[chunk(b"tEXt", f"{i}\0".encode()) for i in range(1000)])
    assert len(png_texts(many)) == 64
    half = bytes(MAX_TEXT_BYTES // 2 + 1)
    large = with_chunks(*[chunk(b"tEXt", f"{i}\0".encode() + half) for i in range(3)])
    assert len(png_texts(large)) == 1


@pytest.mark.parametrize(("before", "texts"), [(19_999, {"k": "a text"}), (20_000, {})])
def test_a_text_is_looked_for_in_the_first_20000_chunks(before: int, texts: dict[str, str]) -> None:
    text = chunk(b"tEXt", b"k\0a text")
    assert png_texts(with_chunks(*[chunk(b"IDAT")] * before, text)) == texts


def test_a_text_as_long_as_all_may_be_is_read() -> None:
    for name, data in (
        (b"tEXt", bytes(MAX_TEXT_BYTES)),
        (b"zTXt", b"\0" + zlib.compress(bytes(MAX_TEXT_BYTES))),
    ):
        longest = chunk(name, b"long\0" + data)
        assert png_texts(with_chunks(longest)) == {"long": "\0" * MAX_TEXT_BYTES}
        assert list(png_texts(with_chunks(longest, chunk(b"tEXt", b"k\0more")))) == ["long"]
