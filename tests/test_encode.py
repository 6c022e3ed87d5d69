"""Files of generated images: what the formats keep of them."""

from __future__ import annotations

import io
import json

import numpy as np
import PIL.Image
import pytest

from server.api.images.encode import FRAME_MS, animate, encode
from server.api.images.marking import MARKED, Marking
from server.engine.messages import Image


def image(seed: int, size: int = 32) -> Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    return Image(0, size, size, pixels.tobytes())


@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize(
    ("width", "height"), [(1, 1), (1, 40), (40, 1), (48, 32), (512, 512), (512, 513)]
)
def test_a_png_has_exactly_the_pixels_and_the_texts(width: int, height: int, channels: int) -> None:
    sent = np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)
    sent[: height // 2] //= 64  # with runs, and with differences of both signs
    content = encode(Image.of(sent, 0), "png", 90, {"prompt": "ein Apfel, 苹果"})
    with PIL.Image.open(io.BytesIO(content)) as file:
        assert file.mode == {3: "RGB", 4: "RGBA"}[channels]
        np.testing.assert_array_equal(np.asarray(file), sent)
        assert json.loads(file.info["parameters"])["prompt"] == "ein Apfel, 苹果"
    with PIL.Image.open(io.BytesIO(content)) as file:
        file.verify()  # every chunk's checksum
    assert content.endswith(b"\0\0\0\0IEND\xaeB\x60\x82")


@pytest.mark.parametrize("width", [256, 1024])
def test_a_png_of_a_plain_image_is_small(width: int) -> None:
    plain = np.full((256, width, 3), 200, np.uint8)
    assert len(encode(Image.of(plain, 0), "png", 90, {})) < plain.nbytes / 50


@pytest.mark.parametrize(("quality", "vertical"), [(50, 2), (94, 2), (95, 1), (100, 1)])
def test_jpeg_keeps_the_colours_of_every_pixel_from_quality_95(quality: int, vertical: int) -> None:
    file = PIL.Image.open(io.BytesIO(encode(image(0), "jpeg", quality, {})))
    assert file.layer[0][1:3] == (vertical, vertical)  # type: ignore[attr-defined]


def test_at_quality_100_coloured_edges_are_sharp() -> None:
    stripes = np.zeros((32, 32, 3), np.uint8)
    stripes[:, ::2, 0] = stripes[:, 1::2, 2] = 255
    sent = Image(0, 32, 32, stripes.tobytes())
    shown = np.asarray(PIL.Image.open(io.BytesIO(encode(sent, "jpeg", 100, {}))))
    assert np.abs(shown.astype(int) - stripes).max() <= 4


@pytest.mark.parametrize("order", [[0], [0, 0, 0], [0, 1, 1, 2], [0, 1, 1, 1, 0, 0], [0, 1, 2]])
def test_a_gif_has_a_frame_for_every_image(order: list[int]) -> None:
    few = [
        np.random.default_rng(i).integers(0, 2, (16, 24, 3), dtype=np.uint8) * 255 for i in range(3)
    ]
    content = animate((Image(0, 24, 16, few[i].tobytes()) for i in order), "gif", 90, {})
    with PIL.Image.open(io.BytesIO(content)) as file:
        assert file.n_frames == len(order)  # type: ignore[attr-defined]
        for frame, i in enumerate(order):
            file.seek(frame)
            assert file.info["duration"] == FRAME_MS
            np.testing.assert_array_equal(np.asarray(file.convert("RGB")), few[i])


@pytest.mark.parametrize("metadata", [True, False])
@pytest.mark.parametrize("order", [[0], [0, 0, 0], [0, 1, 1, 2], [0, 1, 1, 1, 0, 0], [0, 1, 2]])
def test_an_animated_webp_has_a_frame_for_every_image_as_its_own_file_shows_it(
    order: list[int], metadata: bool
) -> None:
    images = [image(i, 25) for i in range(3)]
    marking = MARKED if metadata else Marking(source=None, embed_parameters=False)
    content = animate((images[i] for i in order), "webp", 40, {"seed": 7}, marking)
    with PIL.Image.open(io.BytesIO(content)) as file:
        assert (file.n_frames, file.mode) == (len(order), "RGB")  # type: ignore[attr-defined]
        assert (file.info["loop"], "xmp" in file.info, "exif" in file.info) == (0, *[metadata] * 2)
        for frame, i in enumerate(order):
            file.seek(frame)
            shown = np.asarray(file)
            assert file.info["duration"] == FRAME_MS
            alone = PIL.Image.open(io.BytesIO(encode(images[i], "webp", 40, {})))
            np.testing.assert_array_equal(shown, np.asarray(alone))


def test_similar_frames_stay_frames_of_a_webp_of_low_quality() -> None:
    plain = [Image.of(np.full((32, 32, 3), level, np.uint8), 0) for level in range(100, 108)]
    with PIL.Image.open(io.BytesIO(animate(plain, "webp", 1, {}))) as file:
        assert file.n_frames == len(plain)  # type: ignore[attr-defined]
