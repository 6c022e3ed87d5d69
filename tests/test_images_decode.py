"""What the arrays hold, beyond what tests/test_images_hostile.py asks of every odd file."""

from __future__ import annotations

import asyncio
import io
import struct
import threading
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import AvifImagePlugin, Image

from server.api.errors import ApiError
from server.api.images import DamagedFileError
from server.api.images import decode as decode_module
from server.api.images.admission import ImageDecoder, Uploads
from server.api.images.decode import ImageLimits, decode
from server.api.images.decoded_image import DecodedImage, repaint_mask
from server.api.images.orientation import TRANSPOSITIONS, orientation
from server.api.images.sniff import sniff
from tests.conftest import examples
from tests.hostile import (
    GREY,
    GREY_ALPHA,
    PALETTE,
    RED,
    RGBA,
    SIZE,
    chunk,
    encoded,
    exif,
    gif,
    plain_png,
    png,
    segment,
    two_colours,
)
from tests.shown_files import COLOURS, ycck

LIMITS = ImageLimits()
W, H = SIZE


def test_the_pixels_arrive() -> None:
    picture = decode(plain_png(), LIMITS)
    np.testing.assert_array_equal(picture.rgb, np.asarray(two_colours()))
    assert picture.rgb.dtype == np.uint8
    assert (picture.size, picture.alpha, picture.has_alpha) == (SIZE, None, False)
    assert picture.on_white is picture.rgb


def test_bytes_behind_the_picture_change_nothing() -> None:
    plain, polyglot = decode(plain_png(), LIMITS), decode(plain_png() + b"PK\x03\x04", LIMITS)
    np.testing.assert_array_equal(plain.rgb, polyglot.rgb)


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("order", ["<", ">"])
def test_a_rotated_picture_stands_upright(turn: int, order: str) -> None:
    upright = np.random.default_rng(turn).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    inverse = {6: 8, 8: 6}.get(turn, turn)
    stored = (
        Image.fromarray(upright)
        if turn == 1
        else Image.fromarray(upright).transpose(TRANSPOSITIONS[inverse])
    )
    rows = [row.tobytes() for row in np.asarray(stored)]
    content = png(rows, width=stored.width, extra=chunk(b"eXIf", exif(turn, order)))  # type: ignore[arg-type]
    np.testing.assert_array_equal(decode(content, LIMITS).rgb, upright)


def test_rotation_agrees_with_pillows() -> None:
    from PIL import ImageOps

    jpeg = encoded("JPEG")
    content = jpeg[:2] + segment(0xE1, b"Exif\0\0" + exif(7)) + jpeg[2:]
    with Image.open(io.BytesIO(content)) as image:
        expected = np.asarray(ImageOps.exif_transpose(image))
    np.testing.assert_array_equal(decode(content, LIMITS).rgb, expected)


def test_the_first_of_two_exif_blocks_counts() -> None:
    jpeg = encoded("JPEG")
    turned, upright = (segment(0xE1, b"Exif\0\0" + exif(turn)) for turn in (6, 1))
    for blocks, size in ((turned + upright, (H, W)), (upright + turned, (W, H))):
        assert decode(jpeg[:2] + blocks + jpeg[2:], LIMITS).size == size


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("before", [0, 1, 5])
def test_the_orientation_may_stand_anywhere_in_its_directory(order: str, before: int) -> None:
    head = (b"MM\0*" if order == ">" else b"II*\0") + struct.pack(f"{order}I", 14) + bytes(6)
    other = struct.pack(f"{order}HHII", 0x010E, 2, 4, 3)
    turned = struct.pack(f"{order}HHIHH", 0x0112, 3, 1, 6, 0)
    count, fewer = (struct.pack(f"{order}H", number) for number in (before + 2, before + 1))
    assert orientation(head + count + other * before + turned + other) == 6
    # Upright: without the entry, or where the directory is cut off before it.
    assert orientation(head + fewer + other * (before + 1)) == 1
    assert orientation(head + count + other * before + turned[:-3]) == 1


@given(st.binary(max_size=80))
@examples(100)
def test_any_exif_block_has_an_orientation(block: bytes) -> None:
    assert orientation(b"MM\0*" + block) >= 0


def test_sixteen_bits_keep_their_upper_byte() -> None:
    values = np.arange(0, 65536, 2731, dtype=np.uint16)[:W]
    grey = decode(png([values.astype(">u2").tobytes()], depth=16, colours=GREY), LIMITS)
    np.testing.assert_array_equal(
        grey.rgb[0], (values >> 8).astype(np.uint8)[:, None].repeat(3, axis=1)
    )
    colour = decode(png([values.astype(">u2").tobytes()], width=W // 3, depth=16), LIMITS)
    np.testing.assert_array_equal(colour.rgb[0].ravel(), values >> 8)


def test_a_palettes_transparency_becomes_alpha() -> None:
    extra = chunk(b"PLTE", bytes(RED) + b"\0\0\0") + chunk(b"tRNS", b"\x10")
    picture = decode(png([b"\0\1"], width=2, colours=PALETTE, extra=extra), LIMITS)
    assert picture.rgb.tolist() == [[list(RED), [0, 0, 0]]]
    assert picture.alpha is not None
    assert picture.alpha.tolist() == [[0x10, 255]]


def test_cmyk_is_the_colour_its_viewer_shows() -> None:
    picture = decode(encoded("JPEG", Image.new("CMYK", SIZE, (0, 255, 255, 0))), LIMITS)
    assert np.abs(picture.rgb.astype(int) - (255, 0, 0)).max() <= 3


def test_an_animations_first_frame_is_taken() -> None:
    first, second = two_colours(), Image.new("RGB", SIZE, (0, 0, 255))
    for form, options in (("PNG", {}), ("WEBP", {"lossless": True})):
        content = encoded(form, first, save_all=True, append_images=[second], **options)
        np.testing.assert_array_equal(decode(content, LIMITS).rgb, np.asarray(first))
    assert decode(gif(frames=3), LIMITS).rgb.shape == (2, 2, 3)


def test_transparent_pixels_are_white_on_white_and_opaque_ones_keep_their_bits() -> None:
    picture = decode(
        png(
            [b"\x0a\x14\x1e\0" + b"\x0a\x14\x1e\xff" + b"\0\0\0\x80" + b"\x7f\x7f\x7f\1"],
            width=4,
            colours=RGBA,
        ),
        LIMITS,
    )
    # The last pixel is 254.498, which is rounded down.
    shown = [[255, 255, 255], [10, 20, 30], [127, 127, 127], [254, 254, 254]]
    assert picture.on_white.tolist() == [shown]


@pytest.mark.parametrize(
    ("limits", "mention"),
    [
        (ImageLimits(max_bytes=100), "at most 100 bytes"),
        (ImageLimits(max_pixels=W * H - 1), f"at most {W * H - 1} pixels (sent: 24x16)"),
    ],
)
def test_both_limits_are_413_and_named(limits: ImageLimits, mention: str) -> None:
    with pytest.raises(ApiError) as refused:
        decode(plain_png(), limits, "image")
    assert (refused.value.status, refused.value.code, refused.value.param) == (
        413,
        "image_too_large",
        "image",
    )
    assert mention in refused.value.message
    assert decode(plain_png(), ImageLimits(len(plain_png()), W * H)).size == SIZE


def test_too_many_pixels_are_refused_before_a_decoder_sees_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        decode_module.PIL.Image, "open", lambda *_, **__: pytest.fail("the file was opened")
    )
    for content in (plain_png(), encoded("JPEG"), encoded("WEBP"), gif()):
        with pytest.raises(ApiError) as refused:
            decode(content, ImageLimits(max_pixels=3))
        assert refused.value.status == 413


def status_of(content: bytes) -> int:
    try:
        decode(content, LIMITS)
    except ApiError as error:
        return error.status
    return 200


@given(st.sampled_from([plain_png(), encoded("JPEG"), encoded("WEBP"), gif()]), st.data())
@examples(150)
def test_a_file_with_flipped_bytes_is_a_picture_or_an_error_of_ours(
    content: bytes, data: st.DataObject
) -> None:
    broken = bytearray(content)
    for at in data.draw(st.lists(st.integers(0, len(content) - 1), max_size=4)):
        broken[at] = data.draw(st.integers(0, 255))
    end = data.draw(st.integers(len(content) // 2, len(content)))
    outcome = status_of(bytes(broken[:end]))
    assert outcome in (200, 413, 422)


def test_decoders_start_no_threads_of_their_own() -> None:
    assert AvifImagePlugin.DEFAULT_MAX_THREADS == 1
    heif = decode_module._heif()
    assert heif is None or heif.options.DECODE_THREADS == 1


def test_pillows_warnings_are_not_heard() -> None:
    jpeg = encoded("JPEG")
    broken = jpeg[:2] + segment(0xE1, b"Exif\0\0II*\0\x08\0\0\0\x02\0\x1a\x01\x05\0") + jpeg[2:]
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        Image.open(io.BytesIO(broken)).close()
        assert heard, "Pillow has nothing to say about this file any more"
        heard.clear()
        assert decode(broken, LIMITS).size == SIZE
    assert not heard


def test_luminance_is_the_sum_of_itu_r_601_rounded() -> None:
    colours = {(255, 0, 0): 76, (0, 200, 0): 117, (0, 0, 100): 11, (0, 0, 250): 29, (0, 1, 8): 1}
    picture = decode(png([b"".join(map(bytes, colours))], width=len(colours)), LIMITS)
    assert picture.luminance.tolist() == [[*colours.values()]]


def as_mask(rows: list[bytes], colours: int) -> DecodedImage:
    return decode(png(rows, width=2, colours=colours), LIMITS, "mask")


def test_without_a_mode_alpha_counts_if_there_is_any_and_white_otherwise() -> None:
    assert repaint_mask(as_mask([b"\xff\0\0\xff"], GREY_ALPHA), None, (2, 1)).tolist() == [[255, 0]]
    assert repaint_mask(as_mask([b"\xff\0"], GREY), None, (2, 1)).tolist() == [[255, 0]]


def test_an_alpha_channel_that_is_opaque_everywhere_is_none() -> None:
    opaque = as_mask([b"\xff\xff\0\xff"], GREY_ALPHA)
    assert (opaque.alpha, opaque.has_alpha, opaque.stored is opaque.rgb) == (None, False, True)
    assert repaint_mask(opaque, None, (2, 1)).tolist() == [[255, 0]]
    with pytest.raises(ApiError, match="no pixel is transparent"):
        repaint_mask(opaque, "alpha", (2, 1))


def test_values_between_the_extremes_are_weights() -> None:
    assert repaint_mask(as_mask([b"\x01\x80"], GREY), None, (2, 1)).tolist() == [[1, 128]]
    nearly_opaque = as_mask([b"\0\xfe\0\x64"], GREY_ALPHA)
    assert repaint_mask(nearly_opaque, None, (2, 1)).tolist() == [[1, 155]]
    assert nearly_opaque.stored.shape == (1, 2, 4)


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("quality", [5, 31, 48, 63, 70, 75, 95])
def test_black_and_white_of_a_jpeg_are_black_and_white(quality: int, mode: str) -> None:
    mask = Image.new("L", (64, 64))
    mask.paste(255, (32, 0, 64, 64))  # along the blocks of a JPEG, so that no edge rings
    file = io.BytesIO()
    mask.convert(mode).save(file, "JPEG", quality=quality)
    weights = repaint_mask(decode(file.getvalue(), LIMITS, "mask"), None, (64, 64))
    np.testing.assert_array_equal(weights, np.asarray(mask))


def test_black_and_white_of_video_are_black_and_white_and_weights_never_jump() -> None:
    ramp = np.arange(256, dtype=np.uint8)[None, :, None].repeat(3, axis=2)
    weights = DecodedImage(ramp, None, lossy=True).whiteness[0].astype(int)
    assert weights[[0, 16, 17, 234, 235, 255]].tolist() == [0, 0, 2, 252, 255, 255]
    assert weights[32:224].tolist() == list(range(32, 224))
    assert set(np.diff(weights)) <= {0, 1, 2, 3}


def test_an_empty_mask_is_told_its_brightest_value() -> None:
    file = io.BytesIO()
    Image.new("L", (8, 8), 1).save(file, "JPEG", quality=95)
    with pytest.raises(ApiError, match="white pixels are repainted, and the mask's brightest is 1"):
        repaint_mask(decode(file.getvalue(), LIMITS, "mask"), None, (8, 8))


def test_luminance_takes_no_notice_of_colours_that_transparency_hides() -> None:
    assert repaint_mask(as_mask([b"\xff\0\xff\xff"], GREY_ALPHA), "luminance", (2, 1)).tolist() == [
        [0, 255]
    ]


def test_every_colour_of_every_alpha_is_blended_with_white_to_the_nearest() -> None:
    colour, alpha = np.meshgrid(np.arange(256), np.arange(256))
    rgb = colour[..., None].repeat(3, axis=2)
    picture = DecodedImage(rgb.astype(np.uint8), alpha.astype(np.uint8))
    exact = (rgb * alpha[..., None] + 255 * (255 - alpha[..., None])) / 255
    np.testing.assert_array_equal(picture.on_white, exact.round())


def test_luminance_is_itu_r_601_to_the_nearest() -> None:
    # More rows than are computed at once.
    rgb = np.random.default_rng(0).integers(0, 256, (300, 256, 3), dtype=np.uint8)
    red, green, blue = np.moveaxis(rgb.astype(int), -1, 0)
    expected = (299 * red + 587 * green + 114 * blue + 500) // 1000
    np.testing.assert_array_equal(DecodedImage(rgb, None).luminance, expected)


def test_an_image_can_be_its_own_mask() -> None:
    image = decode(png([b"\1\2\3\0" + b"\1\2\3\xff"], width=2, colours=RGBA), LIMITS)
    assert repaint_mask(image, "alpha", image.size, "image").tolist() == [[255, 0]]


def test_a_mask_of_another_size_names_both() -> None:
    with pytest.raises(ApiError, match="5x4 pixels \\(sent: 2x1\\)"):
        repaint_mask(as_mask([b"\xff\0"], GREY), None, (5, 4))


def test_a_mask_that_lies_on_its_side_is_told_of_the_orientation() -> None:
    with pytest.raises(ApiError, match="turned by its EXIF orientation first"):
        repaint_mask(as_mask([b"\xff\0"], GREY), None, (1, 2))


async def test_no_more_requests_pictures_than_threads_are_worked_on_at_once() -> None:
    running, most, lock, both = 0, 0, threading.Lock(), threading.Barrier(2, timeout=30)

    def slow(_: Uploads) -> DecodedImage:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        both.wait()
        with lock:
            running -= 1
        return decode(plain_png(), ImageLimits())

    decoder = ImageDecoder(threads=2)
    pictures = await asyncio.gather(*(decoder.run(slow) for _ in range(6)))
    decoder.close()
    assert len(pictures) == 6
    assert most == 2


def test_a_gif_keeps_its_transparent_colour_and_loses_its_other_extensions() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, 0, 0, 0])
    image.putpixel((1, 0), 1)
    content = encoded("GIF", image, transparency=1, comment=b"a comment")
    assert b"a comment" in content
    assert b"a comment" not in sniff(content).content
    decoded = decode(content, ImageLimits())
    assert decoded.alpha is not None
    assert decoded.alpha.tolist() == [[255, 0]]


@pytest.mark.parametrize(
    ("canvas", "frame", "size", "area"),
    [
        ((4, 3), (4, 3), (4, 3), None),
        ((1, 1), (2, 3), (2, 3), None),
        ((3, 5), (7, 2), (7, 5), (0, 0, 7, 2)),
        ((5, 3), (2, 7), (5, 7), (0, 0, 2, 7)),
    ],
)
def test_a_gif_is_as_large_as_its_canvas_and_its_first_frame(
    canvas: tuple[int, int],
    frame: tuple[int, int],
    size: tuple[int, int],
    area: tuple[int, ...] | None,
) -> None:
    file = sniff(gif(canvas, frame))
    assert ((file.width, file.height), file.area) == (size, area)


def test_a_jpeg_keeps_the_marker_that_says_how_its_colours_are_coded() -> None:
    """Without Adobe's marker the four channels would be inks, not luma, chroma and black."""
    decoded = decode(ycck(), LIMITS).rgb
    # It holds the complements, and its black leaves 200 of 255 parts of their light.
    assert abs(decoded - (255 - COLOURS[..., :3]) * (200 / 255)).mean() < 8


def test_a_gif_s_palette_may_be_the_frame_s_own_beside_the_size_of_none() -> None:
    content = gif()
    flags = content[10]
    assert flags & 0x80
    end = 13 + (3 << (flags & 7) + 1)
    frame = content.index(b",", end)
    header = content[:10] + bytes([flags & 0x7F | 1]) + content[11:13]
    own = content[end : frame + 9] + bytes([flags]) + content[13:end] + content[frame + 10 :]
    assert (decode(header + own, LIMITS).rgb == decode(content, LIMITS).rgb).all()


def test_a_gif_that_ends_before_its_first_frame_is_damaged() -> None:
    before_frame = gif().index(b",")
    with pytest.raises(DamagedFileError, match="no frame"):
        sniff(gif()[:before_frame] + b";" + bytes(20))
