"""A PNG is read by others as the pixels and the text that were put into it."""

from __future__ import annotations

import io

import numpy as np
import PIL.Image
import pytest

from server.api.png import png


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (5, 1), (64, 48)])
@pytest.mark.parametrize("kind", ["noise", "flat"])
def test_pixels_come_back_as_they_were(size, kind):
    width, height = size
    shape = (height, width, 3)
    pixels = np.random.default_rng(0).integers(256, size=shape, dtype=np.uint8) if kind == "noise" else np.full(shape, 200, np.uint8)
    picture = PIL.Image.open(io.BytesIO(png(pixels.tobytes(), width, height, {})))
    assert (picture.format, picture.mode, picture.size) == ("PNG", "RGB", size)
    assert np.array_equal(np.asarray(picture), pixels)


def test_texts_are_found_by_their_keywords():
    content = png(bytes(3), 1, 1, {"parameters": '{"prompt": "\\u00e4"}', "more": ""})
    assert PIL.Image.open(io.BytesIO(content)).text == {"parameters": '{"prompt": "\\u00e4"}', "more": ""}


def test_flat_pictures_take_little():
    assert len(png(bytes(512 * 512 * 3), 512, 512, {})) < 512 * 512 / 100
