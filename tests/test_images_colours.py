"""Colours and transparency of odd files, against what the formats' documents say."""

from __future__ import annotations

import logging
import struct
import zlib

import numpy as np
import PIL.Image
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import ImageCms

from server.api.errors import ApiError
from server.api.images import ImageFile, colour
from server.api.images.colour import (
    UnreadableProfileError,
    colorants,
    matrix_profile,
    profile_of,
)
from server.api.images.decode import ImageLimits, decode
from server.api.images.sniff import sniff
from tests.conftest import examples
from tests.hostile import GREY, GREY_ALPHA, PALETTE, RGB, RGBA, chunk, png, segment
from tests.shown_files import (
    ADOBE_RGB,
    COLOURS,
    PROFILES,
    H,
    W,
    any_png,
    chromaticities,
    gamma,
    gifs,
    grey_profile,
    icc,
    interlaced,
    jpegs,
    motion_photo,
    rows_of,
    saved,
    stored,
    webps,
)

LIMITS = ImageLimits()
MIB = 2**20
# Of ITU-T H.273: x and y of white, red, green and blue.
PRIMARIES = {
    1: (0.3127, 0.3290, 0.640, 0.330, 0.300, 0.600, 0.150, 0.060),
    5: (0.3127, 0.3290, 0.640, 0.330, 0.290, 0.600, 0.150, 0.060),
    6: (0.3127, 0.3290, 0.630, 0.340, 0.310, 0.595, 0.155, 0.070),
    9: (0.3127, 0.3290, 0.708, 0.292, 0.170, 0.797, 0.131, 0.046),
    11: (0.314, 0.351, 0.680, 0.320, 0.265, 0.690, 0.150, 0.060),
    12: (0.3127, 0.3290, 0.680, 0.320, 0.265, 0.690, 0.150, 0.060),
}
SRGB = PRIMARIES[1]
VIDEO_TRANSFERS = (1, 6, 14, 15)
EXPONENTS = {4: 2.2, 5: 2.8, 8: 1.0, 13: None}


def rgb_of(content: bytes) -> NDArray[np.int_]:
    return decode(content, LIMITS).rgb.astype(int)


def eight_bits(numbers: NDArray[np.uint16], depth: int) -> NDArray[np.int_]:
    return (numbers >> 8 if depth == 16 else numbers * (255 // ((1 << depth) - 1))).astype(int)


# ── transparency of PNG ───────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_grey_of_any_depth_may_have_a_transparent_value(depth: int) -> None:
    numbers = stored(depth, GREY)
    key = int(numbers[3, 5, 0])
    # Bits above the depth mean nothing, but Pillow takes all of them for one bit.
    sent = key if depth in (1, 16) else key | 0xFF << depth & 0xFFFF
    picture = decode(any_png(depth, GREY, chunk(b"tRNS", struct.pack(">H", sent))), LIMITS)
    grey = eight_bits(numbers, depth)
    np.testing.assert_array_equal(picture.rgb, grey.repeat(3, axis=2))
    assert picture.alpha is not None
    np.testing.assert_array_equal(picture.alpha == 0, numbers[..., 0] == key)
    assert (picture.alpha == 0).any()
    assert (picture.alpha == 255).any()


@pytest.mark.parametrize("depth", [8, 16])
@pytest.mark.parametrize("in_passes", [False, True])
def test_a_colour_of_any_depth_may_be_transparent(depth: int, in_passes: bool) -> None:
    numbers = stored(depth, RGB)
    for key, clear in ((numbers[3, 5], 1), (numbers[3, 5] ^ [0, 0, 1], 0)):
        extra = chunk(b"tRNS", struct.pack(">3H", *key))
        content = (
            interlaced(numbers, depth, RGB, extra) if in_passes else any_png(depth, RGB, extra)
        )
        picture = decode(content, LIMITS)
        np.testing.assert_array_equal(picture.rgb, eight_bits(numbers, depth))
        transparent = (numbers == key).all(axis=2)
        assert transparent.sum() == clear
        assert picture.has_alpha == bool(clear)
        if picture.alpha is not None:
            np.testing.assert_array_equal(picture.alpha == 0, transparent)


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_a_palette_of_any_depth_may_have_alphas(depth: int) -> None:
    alphas = [0, 90, 200, 30][: 1 << depth]
    picture = decode(any_png(depth, PALETTE, chunk(b"tRNS", bytes(alphas))), LIMITS)
    expected = np.array(alphas + [255] * (256 - len(alphas)))[stored(depth, PALETTE)[..., 0]]
    assert picture.alpha is not None
    np.testing.assert_array_equal(picture.alpha, expected)


@pytest.mark.parametrize("depth", [8, 16])
@pytest.mark.parametrize("colours", [GREY_ALPHA, RGBA])
def test_hidden_colours_are_kept(depth: int, colours: int) -> None:
    numbers = stored(depth, colours)
    numbers[:8, :, -1] = 0
    picture = decode(png(rows_of(numbers, depth), W, depth, colours), LIMITS)
    expected = eight_bits(numbers, depth)
    assert picture.alpha is not None
    np.testing.assert_array_equal(picture.alpha, expected[..., -1])
    np.testing.assert_array_equal(picture.rgb, np.broadcast_to(expected[..., :-1], (H, W, 3)))


def test_where_a_gif_draws_nothing_it_is_transparent() -> None:
    picture = decode(dict(gifs())["frame_within_canvas"], LIMITS)
    assert picture.size == (32, 20)
    assert picture.alpha is not None
    expected = np.zeros((20, 32), bool)
    expected[2 : 2 + H, 3 : 3 + W] = True
    np.testing.assert_array_equal(picture.alpha == 255, expected)


# ── profiles ──────────────────────────────────────────────────────────────────────────────────────


def linear(coded: NDArray[np.float64], exponent: float | None) -> NDArray[np.float64]:
    if exponent is not None:
        return coded**exponent
    return np.where(coded <= 0.04045, coded / 12.92, ((coded + 0.055) / 1.055) ** 2.4)


def in_srgb(
    colours: NDArray[np.uint8], space: tuple[float, ...], exponent: float | None
) -> NDArray[np.float64]:
    """The same colours in sRGB, out of gamut ones clipped, without LittleCMS."""
    source, target = (colorants(np.array(values).reshape(4, 2)) for values in (space, SRGB))
    shown = (linear(colours / 255, exponent) @ source @ np.linalg.inv(target)).clip(0, 1)
    return 255 * np.where(shown <= 0.0031308, 12.92 * shown, 1.055 * shown ** (1 / 2.4) - 0.055)


SPACES = {
    "p3": (PRIMARIES[12], None),
    "adobe": (ADOBE_RGB, 2.2),
    "linear": (SRGB, 1.0),
}


@pytest.mark.parametrize("name", SPACES)
@pytest.mark.parametrize("alpha", [False, True])
def test_a_profiles_colours_become_srgbs(name: str, alpha: bool) -> None:
    picture = decode(any_png(8, RGBA if alpha else RGB, icc(PROFILES[name])), LIMITS)
    expected = in_srgb(COLOURS[..., :3], *SPACES[name])
    assert np.abs(picture.rgb - expected).max() <= 1.5
    assert np.abs(expected - COLOURS[..., :3]).max() > 10
    assert picture.has_alpha == alpha
    if picture.alpha is not None:
        np.testing.assert_array_equal(picture.alpha, COLOURS[..., 3])


@pytest.mark.parametrize("format", ["JPEG", "WEBP", "AVIF"])
def test_every_format_has_profiles(format: str) -> None:
    options = {"quality": 100} | ({"subsampling": "4:4:4"} if format != "WEBP" else {})
    plain = rgb_of(saved(format, **options)).astype(np.uint8)
    shown = rgb_of(saved(format, **options, icc_profile=PROFILES["p3"]))
    assert np.abs(shown - in_srgb(plain, *SPACES["p3"])).max() <= 1.5


def test_a_profile_in_several_segments_is_whole_or_nothing() -> None:
    long = PROFILES["p3"] + bytes(100_000)
    content = saved("JPEG", quality=95, icc_profile=long)
    assert sniff(content).colour["icc"] == long
    at = content.index(b"ICC_PROFILE\0\2")
    assert sniff(content[:at] + b"X" + content[at + 1 :]).colour == {}


@pytest.mark.parametrize("order", [(1, 2, 3), (3, 1, 2), (3, 2, 1)])
def test_parts_of_a_profile_may_come_in_any_order(order: tuple[int, ...]) -> None:
    jpeg = saved("JPEG")
    parts = b"".join(segment(0xE2, b"ICC_PROFILE\0" + bytes([i, 3, i])) for i in order)
    assert sniff(jpeg[:2] + parts + jpeg[2:]).colour == {"icc": b"\1\2\3"}
    assert sniff(jpeg).colour == {}


@pytest.mark.parametrize(
    "profile",
    [PROFILES["srgb"], ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()],
)
def test_srgbs_profile_changes_no_bit(profile: bytes) -> None:
    np.testing.assert_array_equal(rgb_of(any_png(8, RGB, icc(profile))), COLOURS[..., :3])


@pytest.mark.parametrize("colours", [GREY, RGB])
@pytest.mark.parametrize(("levels", "kept"), [(1, True), (2, False)])
def test_a_profile_that_moves_no_colour_by_more_than_a_level_is_srgbs(
    colours: int, levels: int, kept: bool
) -> None:
    usual, moved = (
        struct.pack(">i", round(65536 * (0.055 + by / 255) / 1.055)) for by in (0, levels)
    )
    profile = grey_profile(None) if colours == GREY else PROFILES["srgb"]
    assert profile.count(usual) == (1 if colours == GREY else 3)
    every = np.arange(256)
    row = every[:, None].repeat(1 if colours == GREY else 3, axis=1).astype(np.uint8).tobytes()
    shown = rgb_of(png([row], 256, 8, colours, icc(profile.replace(usual, moved))))[0]
    if kept:
        np.testing.assert_array_equal(shown, every[:, None].repeat(3, axis=1))
        return
    # Up to 10 the curve is a line, which stays.
    expected = np.where(every > 10, np.minimum(every + levels, 255), every)
    assert np.abs(shown - expected[:, None]).max() <= (0 if colours == GREY else 1)


def test_the_curve_of_srgb_s_profile_is_srgbs() -> None:
    at = PROFILES["srgb"].index(b"para\0\0\0\0\0\3\0\0") + 12
    numbers = struct.unpack_from(">5i", PROFILES["srgb"], at)
    exponent, scale, offset, slope, end = (number / 65536 for number in numbers)
    coded = np.arange(256) / 255
    curve = np.where(coded >= end, (scale * coded + offset) ** exponent, slope * coded)
    assert np.abs(curve - linear(coded, None)).max() < 1e-4


def test_gamma_and_chromaticities_are_a_profile_unless_there_is_another() -> None:
    half = any_png(8, RGB, gamma(0.5) + chromaticities(ADOBE_RGB))
    assert profile_of(sniff(half)) == matrix_profile(ADOBE_RGB, 2.0)
    both = gamma(0.45455) + chromaticities(ADOBE_RGB)
    for alone in (chromaticities(ADOBE_RGB), gamma(0)):
        np.testing.assert_array_equal(rgb_of(any_png(8, RGB, alone)), COLOURS[..., :3])
    expected = rgb_of(any_png(8, RGB, icc(PROFILES["adobe"])))
    assert np.abs(rgb_of(any_png(8, RGB, both)) - expected).max() <= 1
    np.testing.assert_array_equal(
        rgb_of(any_png(8, RGB, both + chunk(b"sRGB", b"\0"))), COLOURS[..., :3]
    )
    np.testing.assert_array_equal(
        rgb_of(any_png(8, RGB, both + icc(PROFILES["srgb"]))), COLOURS[..., :3]
    )


@pytest.mark.parametrize(
    ("value", "is_srgb"),
    [
        (0.43181, False),
        (0.43182, True),
        (0.45, True),
        (0.4545, True),
        (0.45455, True),
        (0.47727, True),
        (0.47728, False),
    ],
)
@pytest.mark.parametrize("moved", [None, 0, 0.0009])
def test_a_gamma_near_that_of_srgb_is_srgb_alone_and_with_its_chromaticities(
    value: float, is_srgb: bool, moved: float | None
) -> None:
    """ImageMagick writes both beside values of sRGB, and libpng takes them for these."""
    beside = b"" if moved is None else chromaticities((*SRGB[:-1], SRGB[-1] + moved))
    profile = profile_of(sniff(any_png(8, RGB, gamma(value) + beside)))
    assert (profile is None) == is_srgb


def test_a_gamma_of_srgb_beside_other_chromaticities_is_another_space() -> None:
    for at in range(8):
        moved = (*SRGB[:at], SRGB[at] + 0.0011, *SRGB[at + 1 :])
        extra = gamma(0.45455) + chromaticities(moved)
        assert profile_of(sniff(any_png(8, RGB, extra))) is not None


def code_points(primaries: int, transfer: int) -> bytes:
    return chunk(b"cICP", bytes([primaries, transfer, 0, 1]))


SPACES_BY_CODE = [(code, 13) for code in PRIMARIES if code != 1]
SPACES_BY_CODE += [(code, transfer) for code in (1, 12) for transfer in (4, 5, 8)]
SPACES_BY_CODE += [(code, transfer) for code in (1, 12) for transfer in VIDEO_TRANSFERS]


@pytest.mark.parametrize(("primaries", "transfer"), SPACES_BY_CODE)
def test_code_points_are_a_space_and_video_s_curve_is_srgb_s_in_avif_alone(
    primaries: int, transfer: int
) -> None:
    shown = rgb_of(any_png(8, RGB, code_points(primaries, transfer)))
    # Browsers show the curve of video by a gamma of 2.4 in PNG.
    space = PRIMARIES[primaries], EXPONENTS.get(transfer, 2.4)
    assert np.abs(shown - in_srgb(COLOURS[..., :3], *space)).max() <= 1.5
    avif = ImageFile("AVIF", W, H, b"", {"nclx": struct.pack(">3HB", primaries, transfer, 0, 128)})
    in_avif = PRIMARIES[primaries], EXPONENTS.get(transfer)
    is_srgb = in_avif == (SRGB, None)
    assert profile_of(avif) == (None if is_srgb else matrix_profile(*in_avif))


OTHER_COLOURS = {
    "profile": icc(PROFILES["adobe"]),
    "gamma": gamma(1.0),
    "both": gamma(1.0) + icc(PROFILES["adobe"]),
}


@pytest.mark.parametrize("name", OTHER_COLOURS)
def test_code_points_come_before_every_other_description(name: str) -> None:
    srgb = any_png(8, RGB, code_points(1, 13) + OTHER_COLOURS[name])
    np.testing.assert_array_equal(rgb_of(srgb), COLOURS[..., :3])
    p3 = any_png(8, RGB, code_points(12, 13) + OTHER_COLOURS[name])
    np.testing.assert_array_equal(rgb_of(p3), rgb_of(any_png(8, RGB, code_points(12, 13))))


@pytest.mark.parametrize("name", OTHER_COLOURS)
def test_code_points_of_hdr_and_unknown_ones_leave_the_other_descriptions(name: str) -> None:
    others = [(12, 16), (12, 18), (9, 0), (12, 2), (2, 13), (3, 8), (1, 16)]
    cut = [chunk(b"cICP"), chunk(b"cICP", b"\x0c")]
    expected = rgb_of(any_png(8, RGB, OTHER_COLOURS[name]))
    for extra in [*(code_points(*pair) for pair in others), *cut]:
        np.testing.assert_array_equal(rgb_of(any_png(8, RGB, extra)), COLOURS[..., :3])
        other = rgb_of(any_png(8, RGB, extra + OTHER_COLOURS[name]))
        np.testing.assert_array_equal(other, expected)


def test_grey_has_profiles_of_its_own() -> None:
    every = np.arange(256, dtype=np.uint8)
    content = png([every.tobytes()], 256, 8, GREY, icc(grey_profile(1.0)))
    expected = in_srgb(every[None, :, None].repeat(3, axis=2), SRGB, 1.0)
    assert np.abs(rgb_of(content) - expected).max() <= 0.6
    with_alpha = decode(any_png(8, GREY_ALPHA, icc(grey_profile(1.0))), LIMITS)
    assert np.abs(with_alpha.rgb - expected[0, COLOURS[..., 0]]).max() <= 0.6
    assert with_alpha.has_alpha
    deep = rgb_of(any_png(16, GREY, icc(grey_profile(1.0))))
    assert np.abs(deep - expected[0, stored(16, GREY)[..., 0] >> 8]).max() <= 0.6


UNREADABLE = {
    "cut": icc(PROFILES["p3"][:150]),
    "too long": icc(PROFILES["p3"].ljust(4 * MIB + 1, b"\0")),
    "not compressed": chunk(b"iCCP", b"p\0\0" + PROFILES["p3"]),
    "of grey": icc(grey_profile(1.0)),
    "impossible chromaticities": gamma(1)
    + chromaticities((0.3, 0.3, 0.2, 0.0, 0.1, 0.1, 0.2, 0.2)),
    "chromaticities in a line": gamma(1) + chromaticities((0.3, 0.3, 0.1, 0.1, 0.2, 0.2, 0.4, 0.4)),
    "cut chromaticities": gamma(1) + chunk(b"cHRM", b"\0\0"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_a_profile_that_cannot_be_read_is_ignored_and_logged(
    caplog: pytest.LogCaptureFixture, name: str
) -> None:
    with caplog.at_level(logging.INFO, "server.api.images.decode"):
        picture = decode(any_png(8, RGB, UNREADABLE[name]), LIMITS, "mask")
    np.testing.assert_array_equal(picture.rgb, COLOURS[..., :3])
    (record,) = caplog.records
    assert record.message == "image profile ignored"
    assert record.fields["param"] == "mask"  # type: ignore[attr-defined]
    assert len(record.fields["reason"]) < 80  # type: ignore[attr-defined]


def test_a_profile_may_have_4_mib() -> None:
    longest = any_png(8, RGB, icc(PROFILES["adobe"].ljust(4 * MIB, b"\0")))
    np.testing.assert_array_equal(rgb_of(longest), rgb_of(any_png(8, RGB, icc(PROFILES["adobe"]))))


def test_a_space_that_does_not_exist_has_no_profile() -> None:
    with pytest.raises(UnreadableProfileError):
        matrix_profile(SRGB, 1e9)


@given(st.data())
@examples(60)
def test_a_damaged_profile_is_used_or_ignored(data: st.DataObject) -> None:
    profile = bytearray(data.draw(st.sampled_from([PROFILES["p3"], grey_profile(2.2)])))
    for at in data.draw(st.lists(st.integers(0, len(profile) - 1), max_size=6)):
        profile[at] = data.draw(st.integers(0, 255))
    assert decode(any_png(8, RGB, icc(bytes(profile))), LIMITS).size == (W, H)


def test_a_profile_is_inflated_no_further_than_allowed() -> None:
    bomb = any_png(8, RGB, chunk(b"iCCP", b"p\0\0" + zlib.compress(bytes(64 * 2**20), 9)))
    assert len(profile_of(sniff(bomb)) or b"") == 4 * MIB + 1
    np.testing.assert_array_equal(rgb_of(bomb), COLOURS[..., :3])


def test_a_profile_s_programs_are_hidden_from_the_library() -> None:
    profile = PROFILES["p3"]
    program = profile[:132] + profile[132:].replace(b"bTRC", b"D2B0", 1)
    assert colour._without_programs(program)[132:].count(b"D2B0") == 0
    # What stands behind the table of tags is their data.
    for unchanged in (profile, profile + b"D2B0" * 100):
        assert colour._without_programs(unchanged) == unchanged
    # LittleCMS reads no more than 100 tags.
    tags = [b"%04d" % i + bytes(8) for i in range(99)]
    most = b"".join([profile[:128], struct.pack(">I", 100), *tags, b"D2B3" + bytes(8)])
    assert colour._without_programs(most) == most.replace(b"D2B3", b"none")


# ── JPEG as viewers open it ───────────────────────────────────────────────────────────────────────

JPEGS = dict(jpegs())


@pytest.mark.parametrize(
    "name",
    [
        "bytes_behind",
        "motion_photo",
        "no_end",
        "zeros_for_the_end",
        "padded_markers",
        "bytes_between_segments",
    ],
)
def test_odd_bytes_around_the_picture_change_nothing(name: str) -> None:
    np.testing.assert_array_equal(rgb_of(JPEGS[name]), rgb_of(JPEGS["444"]))


def test_nine_megabytes_of_video_behind_a_photo_count_for_nothing() -> None:
    content = motion_photo(JPEGS["444"]) + b"\xff\xda\xff\xd9" * (9 * 2**18)
    assert sniff(content).content == sniff(JPEGS["444"]).content


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("cut", [300, 2000])  # less than a block need not be noticed
def test_a_jpeg_without_its_last_pixels_is_damaged(progressive: bool, cut: int) -> None:
    levels = np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8)
    content = saved("JPEG", PIL.Image.fromarray(levels), quality=90, progressive=progressive)
    np.testing.assert_array_equal(rgb_of(content[:-2]), rgb_of(content))
    with pytest.raises(ApiError, match="damaged or cut off"):
        decode(content[: -2 - cut], LIMITS)


def test_a_jpeg_without_an_end_may_be_reduced_too() -> None:
    content = saved("JPEG", PIL.Image.new("RGB", (800, 600), (9, 90, 180)))[:-2]
    assert decode(content, LIMITS, fit=lambda _: (80, 60)).size == (80, 60)


def test_inks_with_and_without_a_marker_look_alike() -> None:
    np.testing.assert_array_equal(rgb_of(JPEGS["cmyk"]), rgb_of(JPEGS["cmyk_unmarked"]))


def test_a_webp_of_several_frames_shows_its_first() -> None:
    frames = dict(webps())
    np.testing.assert_array_equal(rgb_of(frames["animated"]), rgb_of(frames["lossless"]))
