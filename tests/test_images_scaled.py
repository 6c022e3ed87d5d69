"""Images that are needed at another size are reduced while they are decoded."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import PIL.Image
import pytest

from server.api.errors import ApiError, invalid_value
from server.api.images.admission import REFERENCE_SIDE
from server.api.images.decode import ImageLimits, decode
from server.api.images.decoded_image import DecodedImage
from server.api.planning.conditions import reference_size

SIDE = 4 * REFERENCE_SIDE
LIMITS = ImageLimits()


@pytest.fixture
def resized(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The sizes that images have before they are resized."""
    sizes: list[tuple[int, int]] = []
    real = PIL.Image.Image.resize

    def noting(self: PIL.Image.Image, *arguments: Any, **more: Any) -> PIL.Image.Image:
        sizes.append(self.size)
        return real(self, *arguments, **more)

    monkeypatch.setattr(PIL.Image.Image, "resize", noting)
    return sizes


def gradient(width: int, height: int, channels: int = 3) -> PIL.Image.Image:
    """Red grows to the right, green downwards; the upper half is transparent with an alpha."""
    array = np.zeros((height, width, channels), dtype=np.uint8)
    array[..., 0] = np.linspace(0, 255, width)[None]
    array[..., 1] = np.linspace(0, 255, height)[:, None]
    if channels == 4:
        array[height // 2 :, :, 3] = 255
    return PIL.Image.fromarray(array)


def encoded(image: PIL.Image.Image, format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **({"compress_level": 1} if format == "PNG" else {}), **options)
    return file.getvalue()


def for_clip(content: bytes) -> DecodedImage:
    return decode(content, LIMITS, "image", reference_size)


def assert_alike(image: DecodedImage, expected: PIL.Image.Image, tolerance: float = 3.0) -> None:
    """Compare with the whole image, resampled."""
    assert image.size == expected.size
    difference = np.abs(image.on_white.astype(float) - np.asarray(expected))
    assert difference.mean() < tolerance


@pytest.mark.parametrize("stored", [(1, 1), (512, 512), (512, 3), (20, 50)])
def test_what_is_small_already_is_not_touched(stored: tuple[int, int]) -> None:
    content = encoded(gradient(*stored), "PNG")
    np.testing.assert_array_equal(for_clip(content).rgb, decode(content, LIMITS).rgb)


@pytest.mark.parametrize(
    ("stored", "needed"),
    [((1024, 512), (512, 256)), ((513, 3), (512, 3)), ((4096, 1), (512, 1)), ((3, 900), (2, 512))],
)
def test_a_reference_has_at_most_512_pixels_a_side_in_the_same_ratio(
    stored: tuple[int, int], needed: tuple[int, int]
) -> None:
    assert for_clip(encoded(gradient(*stored), "PNG")).size == needed


@pytest.mark.parametrize(
    ("format", "options"),
    [
        ("PNG", {}),
        ("JPEG", {"quality": 95}),
        ("JPEG", {"quality": 95, "progressive": True}),
        ("WEBP", {"quality": 95}),
        ("GIF", {}),
    ],
)
def test_every_format_is_reduced_to_what_it_shows(format: str, options: dict[str, Any]) -> None:
    whole = gradient(SIDE, SIDE // 2)
    expected = whole.resize((512, 256), PIL.Image.Resampling.BICUBIC)
    assert_alike(for_clip(encoded(whole, format, **options)), expected)


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "I;16", "LA", "RGBA"])
def test_every_mode_is_reduced_in_its_colours(mode: str) -> None:
    whole = gradient(SIDE, SIDE // 2)
    if mode == "I;16":
        grey = np.asarray(whole.convert("L")).astype(np.uint16) << 8
        content = encoded(PIL.Image.fromarray(grey), "PNG")
    else:
        converted = whole.convert(mode)
        content = encoded(converted, "JPEG" if mode == "CMYK" else "PNG")
    expected = PIL.Image.fromarray(decode(content, LIMITS).on_white)
    expected = expected.resize((512, 256), PIL.Image.Resampling.BICUBIC)
    # Of a dithered image, filters keep different amounts of noise.
    assert_alike(for_clip(content), expected, 20 if mode == "1" else 4)


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_transparent_pixels_stay_transparent_and_colour_nothing(format: str) -> None:
    content = encoded(
        gradient(SIDE, SIDE, 4), format, **({"quality": 95} if format == "WEBP" else {})
    )
    image = for_clip(content)
    assert image.alpha is not None
    assert image.on_white[:250].min() == 255
    assert (image.alpha[260:] == 255).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_a_rotated_image_is_fitted_upright(orientation: int, format: str) -> None:
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 95} if format == "JPEG" else {}
    content = encoded(gradient(SIDE, SIDE // 2), format, exif=exif, **options)
    whole = PIL.Image.fromarray(decode(content, LIMITS).rgb)
    needed = reference_size(whole.size)
    assert needed == ((512, 256) if orientation < 5 else (256, 512))
    assert_alike(for_clip(content), whole.resize(needed, PIL.Image.Resampling.BICUBIC))


def test_a_large_jpeg_is_never_whole_in_memory(resized: list[tuple[int, int]]) -> None:
    content = encoded(gradient(SIDE, SIDE), "JPEG")
    assert for_clip(content).size == (512, 512)
    assert resized[0] == (SIDE // 2, SIDE // 2), "reduced by the decoder, to twice what is needed"


@pytest.mark.parametrize("stored", [(1600, 400), (400, 1600)])
def test_either_side_of_a_jpeg_bounds_what_the_decoder_reduces(
    resized: list[tuple[int, int]], stored: tuple[int, int]
) -> None:
    content = encoded(gradient(*stored), "JPEG")
    assert decode(content, LIMITS, fit=lambda _: (100, 100)).size == (100, 100)
    assert resized[0] == (stored[0] // 2, stored[1] // 2)


def test_an_image_can_be_needed_larger_than_it_is() -> None:
    small = gradient(20, 10)
    for format in ("PNG", "JPEG"):
        image = decode(encoded(small, format), LIMITS, "image", lambda _: (64, 48))
        assert image.size == (64, 48)


def test_a_size_that_is_refused_is_no_damaged_file() -> None:
    def refuse(stored: tuple[int, int]) -> tuple[int, int]:
        raise invalid_value("width", "too large", stored)

    with pytest.raises(ApiError, match="width: too large"):
        decode(encoded(gradient(4, 4), "PNG"), LIMITS, "image", refuse)
