"""HEIC is decoded as another decoder does, with the extra `heic`, and refused in words without."""

from __future__ import annotations

import itertools
import re
import struct
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from server.api.errors import ApiError
from server.api.images import DamagedFileError, UnknownFormatError, bmff
from server.api.images import decode as decode_module
from server.api.images.decode import ImageLimits, checked_file, decode
from server.api.images.sniff import sniff
from tests.heic_files import box, full, hevc_config, single, tiled
from tests.shown_files import P3, saved

FOLDER = Path(__file__).parent / "data" / "heic"
FILES = {path.stem: path.read_bytes() for path in sorted(FOLDER.glob("*.heic"))}
SIZES = {
    "turned": (64, 96),
    "tiled": (100, 60),
    "cropped": (48, 32),
    "large": (2048, 1024),
}
LIMITS = ImageLimits()
MIB = 2**20


def with_size(content: bytes, width: int, height: int) -> bytes:
    """The file with another size in its header, for all of its images."""
    start = 0
    while (start := content.find(b"ispe", start)) >= 0:
        content = content[: start + 8] + struct.pack(">II", width, height) + content[start + 16 :]
        start += 16
    return content


@pytest.mark.parametrize("name", FILES)
def test_its_header_is_read_without_a_decoder(name: str) -> None:
    file = sniff(FILES[name])
    assert file.format == "HEIF"
    size = (64, 64) if name == "cropped" else SIZES.get(name, (96, 64))
    assert {file.width, file.height} == set(size)
    assert file.colour.get("icc") == (P3 if name == "p3" else None)


@pytest.mark.parametrize("name", [name for name in FILES if name != "large"])
def test_it_shows_what_another_decoder_shows(name: str) -> None:
    pytest.importorskip("pi_heif", reason="the extra heic is not installed")
    picture = decode(FILES[name], LIMITS)
    assert picture.size == SIZES.get(name, (96, 64))
    expected = PIL.Image.open(FOLDER / f"{name}.png")
    if name == "cropped":
        expected = expected.crop((0, 0, 48, 32))
    if name == "turned":
        expected = expected.transpose(PIL.Image.Transpose.ROTATE_270)
    if name == "p3":
        expected = PIL.Image.fromarray(decode(saved("PNG", expected, icc_profile=P3), LIMITS).rgb)
    other = np.asarray(expected).astype(int)
    assert np.abs(picture.rgb - other[..., :3]).max() <= (4 if name == "420" else 2)
    assert picture.has_alpha == (name == "clear")
    if picture.alpha is not None:
        assert np.abs(picture.alpha - other[..., 3]).max() <= 2


def test_an_image_is_reduced_as_any_other() -> None:
    pytest.importorskip("pi_heif", reason="the extra heic is not installed")
    assert decode(FILES["turned"], LIMITS, fit=lambda size: (size[0] // 2, 9)).size == (32, 9)


@pytest.mark.parametrize("name", ["444", "tiled"])
def test_without_the_extra_it_is_refused_and_the_extra_named(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(decode_module, "_heif", lambda: None)
    with pytest.raises(ApiError, match=r"paellera\[heic\]") as refused:
        decode(FILES[name], LIMITS)
    assert (refused.value.status, refused.value.code) == (422, "unsupported_image_format")


def test_neither_metadata_nor_films_reach_a_decoder() -> None:
    film = saved(
        "AVIF",
        exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0" + b"secret",
        xmp=b"<x/>",
        save_all=True,
        append_images=[PIL.Image.new("RGB", (24, 16))],
    )
    content = sniff(film).content
    assert len(content) == len(film)
    assert {b"Exif", b"mime"} < kinds_of(film)
    assert kinds_of(content) == {b"av01", b"free"}
    assert b"moov" in film
    assert b"moov" not in content


@pytest.mark.parametrize("brand", [b"avis", b"msf1", b"hevc", b"hevx"])
def test_a_film_s_brands_become_a_still_s_and_nothing_else_changes(brand: bytes) -> None:
    for before in ((b"mif1", brand), (brand, b"heic"), (brand, brand)):
        after = tuple(b"mif1" if each == brand else each for each in before)
        film, still = (
            TILES[:8] + main + bytes(4) + b"".join(compatible) + TILES[24:]
            for main, compatible in ((brand, before), (b"heic", after))
        )
        assert sniff(film).content == still
    # Coded data may look like a brand.
    for shift in range(4):
        data = av1_unit(SMALL) + av1_unit(bytes(shift) + brand, kind=15)
        content = single(b"av01", data, STATED)
        assert sniff(content).content == content[:8] + b"avif" + content[12:]


def items_of(content: bytes) -> bmff._Items:
    top = bmff._boxes(content, 0, len(content))
    return bmff._items(content, next(box for box in top if box.name == b"meta"))


def kinds_of(content: bytes) -> set[bytes]:
    return {kind.name for kind in items_of(content).types.values()}


@pytest.mark.parametrize(
    "content",
    [
        with_size(FILES["large"], 8, 8),
        with_size(saved("AVIF", PIL.Image.new("RGB", (2048, 1024)), speed=10), 8, 8),
        # Each tile is allowed, all together are not.
        tiled(FILES["large"], FILES["large"], (800, 600), 2),
        tiled(FILES["444"], FILES["444"], (5000, 5000)).replace(
            b"ispe" + struct.pack(">III", 0, 5000, 5000), b"ispe" + struct.pack(">III", 0, 50, 50)
        ),
    ],
    ids=["heic", "avif", "tiles", "canvas"],
)
def test_a_file_that_decodes_to_more_than_its_header_says_is_refused(content: bytes) -> None:
    with pytest.raises(DamagedFileError, match="larger than its header"):
        sniff(content)


@pytest.mark.parametrize(
    ("stated", "coded"),
    [
        # Four times as many pixels as the header states, or 20 Mi more, and 1 Mi for the blocks.
        ((1024, 1024), (2**15, 5 * 32)),
        ((4096, 2048), (2**15, (8 + 21) * 32)),
    ],
)
def test_coded_images_may_be_somewhat_larger(
    stated: tuple[int, int], coded: tuple[int, int]
) -> None:
    def of(width: int, height: int) -> bytes:
        content = tiled(FILES["444"], FILES["444"], (width, height))
        canvas = b"ispe" + struct.pack(">III", 0, width, height)
        return content.replace(canvas, b"ispe" + struct.pack(">III", 0, *stated))

    file = sniff(of(*coded))
    assert (file.width, file.height) == stated
    with pytest.raises(DamagedFileError, match="larger than its header"):
        sniff(of(coded[0], coded[1] + 1))


def test_numbers_of_any_width_are_read() -> None:
    usual, wide = (tiled(FILES["444"], FILES["p3"], wide=wide) for wide in (False, True))
    for content in (usual, wide):
        items = items_of(content)
        assert (items.primary, items.tiles) == (3, {3: [1, 2]})
        assert [items.data(item) for item in (1, 2)] == [
            items_of(FILES[name]).data(1) for name in ("444", "p3")
        ]
        names = [[each.name for each in items.properties[item]] for item in (1, 2, 3)]
        assert names == [[b"hvcC", b"ispe"], [b"hvcC", b"ispe"], [b"ispe", b"pixi"]]
    file = sniff(wide)
    assert (file.width, file.height) == (100, 60)
    pytest.importorskip("pi_heif", reason="the extra heic is not installed")
    np.testing.assert_array_equal(decode(wide, LIMITS).rgb, decode(usual, LIMITS).rgb)


# ── sizes in coded images ─────────────────────────────────────────────────────────────────────────

STATED = (1024, 1024)


def packed(bits: str) -> bytes:
    """The bytes of binary digits, with 0 behind them; blanks do not count."""
    digits = bits.replace(" ", "")
    return int(digits.ljust(-(-len(digits) // 8) * 8, "0"), 2).to_bytes(-(-len(digits) // 8))


def assert_allowed(content: bytes, allowed: bool) -> None:
    """Assert that a file that states `STATED` has coded images of at most 5 Mi pixels, or not."""
    if allowed:
        file = sniff(content)
        assert (file.width, file.height) == STATED
    else:
        with pytest.raises(DamagedFileError, match="larger than its header"):
            sniff(content)


TICKS = "1" * 64
# Profile, still picture, and no reduced header.
AV1 = "000 0 0"
# The head of an AV1 sequence (AV1, 5.5.1), up to its sizes. A level above 7 has a tier behind it.
AV1_HEADS = {
    "short": f"{AV1} 0 0 00000 {'0' * 12} 00111",
    "with a tier": f"{AV1} 0 0 00000 {'0' * 12} 01000 1",
    "with a time": f"{AV1} 1 {TICKS} 0 0 0 00000 {'1' * 12} 00100",
    "with equal intervals": f"{AV1} 1 {TICKS} 1 00110 0 0 00000 {'1' * 12} 00100",
    "with a decoder": f"{AV1} 1 {TICKS} 0 1 00010 {'1' * 42} 0 00000 {'1' * 12} 00100 1 1111111",
    "with another's decoder": f"{AV1} 1 {TICKS} 0 1 00010 {'1' * 42} 0 00000 {'1' * 12} 00100 0",
    "with a delay": f"{AV1} 0 1 00000 {'1' * 12} 00100 1 1111",
    "with another's delay": f"{AV1} 0 1 00000 {'1' * 12} 00100 0",
    "with all of it, twice": f"{AV1} 1 {TICKS} 1 1 1 00000 {'1' * 42} 1 00001"
    + f"{'1' * 12} 11111 0 1 111 1 1111" * 2,
}


def av1_unit(sequence: bytes, kind: int = 1, head: int = 2, extension: bytes = b"") -> bytes:
    return bytes([kind << 3 | head]) + extension + bytes([len(sequence)]) + sequence


@pytest.mark.parametrize("name", AV1_HEADS)
def test_an_av1_frame_has_as_many_pixels_as_its_sequence_can_say(name: str) -> None:
    for width_bits, height_bits, allowed in ((11, 11, True), (12, 11, False), (11, 12, False)):
        counts = f"{width_bits - 1:04b} {height_bits - 1:04b} {'1' * (width_bits + height_bits)}"
        unit = av1_unit(packed(f"{AV1_HEADS[name]} {counts}"))
        assert_allowed(single(b"av01", unit, STATED), allowed)


@pytest.mark.parametrize(
    ("width", "height", "allowed"),
    [(5120, 1024, True), (5121, 1024, False), (1024, 5120, True), (1024, 5121, False)],
)
def test_an_av1_still_has_the_size_that_it_says(width: int, height: int, allowed: bool) -> None:
    sizes = f"1100 1101 {width - 1:013b} {height - 1:014b}"
    unit = av1_unit(packed(f"000 1 1 00100 {sizes}"))
    assert_allowed(single(b"av01", unit, STATED), allowed)


LARGE, SMALL = (
    packed(f"000 1 1 00100 1100 1100 {side - 1:013b} {side - 1:013b}") for side in (8192, 8)
)


@pytest.mark.parametrize(
    "data",
    [
        av1_unit(LARGE),
        av1_unit(SMALL) + av1_unit(LARGE),
        av1_unit(LARGE) + av1_unit(SMALL),
        b"\x08" + LARGE,  # without a length it has the rest
        av1_unit(LARGE, head=6, extension=b"\0"),
        b"\x0c\0" + LARGE,
        # A reserved bit means nothing.
        av1_unit(LARGE, head=3),
        b"\x09" + LARGE,
        # A length of two bytes, and the longest, of eight.
        bytes([0x0A, len(LARGE) | 0x80, 0]) + LARGE,
        bytes([0x0A, len(LARGE) | 0x80]) + b"\x80" * 7 + LARGE,
        b"\x12\0\x7a\xac\2" + bytes(300) + av1_unit(LARGE),  # behind 300 bytes of padding
    ],
)
def test_the_largest_av1_sequence_counts_wherever_it_is(data: bytes) -> None:
    assert_allowed(single(b"av01", data, STATED), allowed=False)
    assert_allowed(single(b"av01", data.replace(LARGE, SMALL), STATED), allowed=True)


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        (b"av01", av1_unit(LARGE[:3])),
        (b"hvc1", b"\0\0\0\4B\1\xf1\0"),
        (b"hvc1", b"\0\0\0\2B\1"),
    ],
)
def test_a_sequence_that_is_cut_off_is_not_read_on(kind: bytes, data: bytes) -> None:
    content = single(kind, data + bytes(2000), STATED, hevc_config())
    with pytest.raises(DamagedFileError, match="ends within its header"):
        sniff(content)


def test_what_is_no_av1_sequence_has_no_size() -> None:
    for kind in (0, 2, 3, 5, 9, 15):
        assert_allowed(single(b"av01", av1_unit(LARGE, kind), STATED), allowed=True)


def golomb(value: int) -> str:
    return "0" * ((value + 1).bit_length() - 1) + f"{value + 1:b}"


def hevc_unit(
    width: int,
    height: int,
    layers: str = "",
    chroma: int = 1,
    kind: int = 33,
    cropped: str = "0",
    depths: tuple[int, int] = (8, 8),
) -> bytes:
    """A sequence parameter set (HEVC, 7.3.2.2).

    layers: two digits for each further one, whether it has a profile and whether it has a level.
    cropped: the digits that say what is cropped. depths: bits of luma and of chroma.
    """
    flags = [layers[at : at + 2] for at in range(0, len(layers), 2)]
    reserved = "00" * (8 - len(flags)) if flags else ""
    lengths = [88 * int(profile) + 8 * int(level) for profile, level in flags]
    colours = golomb(chroma) + ("1" if chroma == 3 else "")
    bits = f"1111 {len(flags):03b} 1 {'0' * 96} {layers} {reserved} {'1' * sum(lengths)}"
    sizes = f"{golomb(width)} {golomb(height)} {cropped}"
    further_bits = "".join(golomb(depth - 8) for depth in depths)
    payload = packed(f"{bits} {golomb(0)} {colours} {sizes} {further_bits} 1")
    # Three bytes that could begin another unit are kept apart by a 3.
    return bytes([kind << 1, 1]) + re.sub(rb"\0\0(?=[\0-\3])", b"\0\0\3", payload)


def hevc(*units: bytes, stored: tuple[bytes, ...] = (), length_size: int = 4) -> bytes:
    """A file of these coded units. stored: those among its parameters."""
    data = b"".join(len(unit).to_bytes(length_size) + unit for unit in units)
    return single(b"hvc1", data, STATED, hevc_config(*stored, length_size=length_size))


@pytest.mark.parametrize("layers", ["", "11", "10", "01", "00", "001101", "111111111111"])
@pytest.mark.parametrize("chroma", [0, 1, 2, 3])
def test_an_hevc_frame_has_the_size_that_its_sequence_says(layers: str, chroma: int) -> None:
    for width, height, allowed in ((5120, 1024, True), (5121, 1024, False), (1024, 5121, False)):
        unit = hevc_unit(width, height, layers, chroma)
        assert_allowed(hevc(unit), allowed)
        assert_allowed(hevc(stored=(unit,)), allowed)


@pytest.mark.parametrize("cropped", ["0", "1" + golomb(0) * 2 + golomb(5) * 2])
@pytest.mark.parametrize(
    ("chroma", "depths", "compact"),
    [
        (0, (8, 8), True),
        (1, (8, 8), True),
        (2, (8, 8), False),
        (3, (8, 8), False),
        (1, (10, 8), False),
        (1, (8, 10), False),
    ],
)
def test_8_bits_with_reduced_colours_are_compact(
    chroma: int, depths: tuple[int, int], compact: bool, cropped: str
) -> None:
    unit = hevc_unit(8, 8, chroma=chroma, depths=depths, cropped=cropped)
    small = hevc_unit(8, 8)
    for file in (hevc(unit), hevc(small, unit), hevc(small, stored=(unit,))):
        assert sniff(file).compact == compact
    # Only the memory of HEVC's decoder was measured.
    assert not sniff(single(b"av01", av1_unit(SMALL), STATED)).compact


def test_a_photo_that_is_to_be_scaled_may_have_more_pixels_than_other_images() -> None:
    photo, deep = (hevc(hevc_unit(8, 8, depths=(depth, depth))) for depth in (8, 10))
    pixels = STATED[0] * STATED[1]
    larger = ImageLimits(max_pixels=pixels - 1, max_heic_pixels=pixels)
    assert checked_file(photo, larger, "image").compact
    assert checked_file(photo, ImageLimits(max_pixels=pixels, max_heic_pixels=1), "image").compact
    refusals = [
        (photo, ImageLimits(max_pixels=9, max_heic_pixels=pixels - 1), pixels - 1, "HEIC"),
        (deep, larger, pixels - 1, "IMAGE"),
    ]
    for content, limits, most, setting in refusals:
        with pytest.raises(ApiError) as refused:
            checked_file(content, limits, "image")
        assert refused.value.status == 413
        assert refused.value.message == (
            f"image: may have at most {most} pixels as HEIC (the server's "
            f"PAELLERA_MAX_{setting}_PIXELS); send a smaller one, or a JPEG of up to 67108864 "
            "pixels (sent: 1024x1024)"
        )
    default = ImageLimits()
    assert default.max_pixels < 5712 * 4284 < default.max_heic_pixels


def test_a_photo_beyond_the_bound_of_other_images_is_decoded_only_to_be_scaled() -> None:
    pytest.importorskip("pi_heif", reason="the extra heic is not installed")
    limits = ImageLimits(max_pixels=2048 * 1024 - 1)
    assert decode(FILES["large"], limits, fit=lambda _: (64, 32)).size == (64, 32)
    with pytest.raises(ApiError, match="at most 2097151 pixels as HEIC"):
        decode(FILES["large"], limits)


WIDE = hevc_unit(8192, 8192)


@pytest.mark.parametrize(
    ("content", "allowed"),
    [
        (hevc(hevc_unit(8, 8), WIDE), False),
        (hevc(WIDE, hevc_unit(8, 8)), False),
        (hevc(WIDE, length_size=2), False),
        (hevc(stored=(hevc_unit(8, 8), WIDE, hevc_unit(8, 8))), False),
        (hevc(hevc_unit(8192, 8192, kind=32)), True),
        (hevc(hevc_unit(8192, 8192, kind=34)), True),
        # Those of another layer.
        (hevc(WIDE[:1] + b"\x09" + WIDE[2:]), True),
        (hevc(bytes([WIDE[0] | 1]) + WIDE[1:]), True),
        (hevc(WIDE[:1], b""), True),
    ],
)
def test_the_largest_hevc_sequence_counts_wherever_it_is(content: bytes, allowed: bool) -> None:
    assert_allowed(content, allowed)


SLICE = b"\x26\1\x80"


@pytest.mark.parametrize(
    ("units", "frames"),
    [
        ([SLICE] * 8, 8),
        ([SLICE] * 9, 9),
        ([SLICE] + [b"\x26\1\x7f"] * 9, 1),  # further slices of one picture
        ([b"\x3e\1\x80"] * 9, 9),
        ([b"\x40\1\x80"] * 9, 0),
        ([b"\x26\1"] * 9, 0),
    ],
)
def test_an_hevc_image_has_at_most_eight_frames(units: list[bytes], frames: int) -> None:
    content = hevc(hevc_unit(8, 8), *units)
    if frames > 8:
        with pytest.raises(DamagedFileError, match="more than one frame"):
            sniff(content)
    else:
        assert_allowed(content, allowed=True)


@pytest.mark.parametrize("kind", [3, 6])
def test_an_av1_image_has_at_most_eight_frames(kind: int) -> None:
    frame = av1_unit(b"", kind)
    assert_allowed(single(b"av01", av1_unit(SMALL) + frame * 8, STATED), allowed=True)
    with pytest.raises(DamagedFileError, match="more than one frame"):
        sniff(single(b"av01", av1_unit(SMALL) + frame * 9, STATED))


def meta_of(content: bytes) -> bytes:
    """Return what is in the file's box `meta`."""
    at = content.index(b"meta") - 4
    return content[at + 8 : at + int.from_bytes(content[at : at + 4])]


def with_meta(content: bytes, meta: bytes) -> bytes:
    """Return the file with another box `meta`, its last one, so that its data stay in place."""
    return content.replace(b"meta", b"free") + box(b"meta", meta)


def test_a_box_may_have_a_size_of_64_bits_or_the_rest_of_the_file() -> None:
    for sequence, allowed in ((SMALL, True), (LARGE, False)):
        content = single(b"av01", av1_unit(sequence), STATED)
        meta, others = meta_of(content), content.replace(b"meta", b"free")
        assert_allowed(others + bytes(4) + b"meta" + meta, allowed)
        assert_allowed(others + struct.pack(">I4sQ", 1, b"meta", 16 + len(meta)) + meta, allowed)
        for size in (15, 17 + len(meta)):
            with pytest.raises(DamagedFileError, match="no still image"):
                sniff(others + struct.pack(">I4sQ", 1, b"meta", size) + meta)


@pytest.mark.parametrize(
    ("width", "height", "allowed"),
    [(5120, 1024, True), (5121, 1024, False), (1024, 5121, False)],
)
def test_every_size_that_a_file_states_counts(width: int, height: int, allowed: bool) -> None:
    another = box(b"ispe", struct.pack(">III", 0, width, height))
    assert_allowed(single(b"av01", av1_unit(SMALL), STATED, another), allowed)


def test_only_some_kinds_of_boxes_may_be_there_twice() -> None:
    content = single(b"av01", av1_unit(SMALL), STATED)
    meta = meta_of(content)
    for name in (b"free", b"uuid"):
        assert_allowed(with_meta(content, meta + 2 * box(name)), allowed=True)
    for name in (b"pitm", b"iinf", b"iprp", b"iloc", b"more"):
        with pytest.raises(DamagedFileError, match="two boxes of a kind"):
            sniff(with_meta(content, meta + 2 * box(name)))


def test_properties_may_be_listed_in_several_boxes() -> None:
    content = single(b"av01", av1_unit(SMALL), STATED)
    meta = meta_of(content)
    start, listed, end = (meta.index(name) - 4 for name in (b"iprp", b"ipma", b"iloc"))
    kept, owned, none = meta[start + 8 : listed], meta[listed:end], box(b"ipma", bytes(8))
    for lists in (owned + none, none + owned):
        several = meta[:start] + box(b"iprp", kept, lists) + meta[end:]
        assert_allowed(with_meta(content, several), allowed=True)


def test_an_image_s_parts_may_overlap_up_to_twice_the_file() -> None:
    data = av1_unit(SMALL)
    content = single(b"av01", data, STATED)
    meta, begin = meta_of(content), len(content) - len(data)
    start, listed, end = (meta.index(name) - 4 for name in (b"iinf", b"iprp", b"iloc"))
    kinds = ((1, b"av01"), (2, b"mime"))
    infos = (
        full(b"infe", struct.pack(">HH", item, 0), kind, b"\0", version=2) for item, kind in kinds
    )
    listed_items = full(b"iinf", b"\0\2", *infos)

    def of(first: int, second: int) -> bytes:
        """The file with two parts of these lengths, both from its beginning, in metadata."""
        places = struct.pack(">HH", 0x4400, 2) + struct.pack(">HHHII", 1, 0, 1, begin, len(data))
        places += struct.pack(">HHHIIII", 2, 0, 2, 0, first, 0, second)
        parts = meta[:start], listed_items, meta[listed:end], full(b"iloc", places)
        return with_meta(content, b"".join(parts))

    size = len(of(0, 0))
    assert_allowed(of(size, size - len(data)), allowed=True)
    with pytest.raises(DamagedFileError, match="cut off"):
        sniff(of(size, size - len(data) + 1))


TILES = tiled(FILES["444"], FILES["444"])


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (TILES[:-1], "cut off"),
        (TILES.replace(b"infe\2", b"infe\1"), "have no types"),
        (TILES.replace(b"infe\2\0\0\0\0\2", b"infe\2\0\0\0\0\1"), "two items of a number"),
        (
            TILES.replace(struct.pack(">4H", 2, 0, 0, 1), struct.pack(">4H", 1, 0, 0, 1)),
            "two items of a number",
        ),
        (
            TILES.replace(struct.pack(">4H", 3, 1, 0, 1), struct.pack(">4H", 3, 2, 0, 1)),
            "not in the file",
        ),
        (TILES.replace(b"dimg\0\3\0\2", b"dimg\0\3\x10\1"), "more than 4096 items"),
        (TILES.replace(b"dimg\0\3\0\2", b"dimg\0\3\x10\0"), "ends too early"),
        (TILES.replace(b"hvcC", b"free"), "no parameters"),
        (TILES.replace(b"pitm", b"free"), "no still image"),
    ],
)
def test_what_is_wrong_in_a_file_s_boxes_is_named(content: bytes, reason: str) -> None:
    assert content != TILES
    with pytest.raises(DamagedFileError, match=reason):
        sniff(content)


def test_all_items_together_have_at_most_twice_the_file_s_bytes() -> None:
    data = av1_unit(SMALL)

    def of(*others: tuple[int, int]) -> bytes:
        return single(b"av01", data, STATED, others=others)

    size = len(of((0, 0), (0, 0)))
    assert_allowed(of((0, size), (0, size - len(data))), allowed=True)
    assert_allowed(of((0, size), (size, 0)), allowed=True)
    for others in (
        [(0, size), (0, size - len(data) + 1)],
        [(0, size), (size, 1)],
        [(1, size), (0, 0)],
    ):
        with pytest.raises(DamagedFileError, match="cut off"):
            sniff(of(*others))


def test_coded_parts_and_boxes_are_counted_to_a_bound() -> None:
    delimiter = b"\x12\0"
    assert_allowed(single(b"av01", av1_unit(SMALL) + delimiter * 19_999, STATED), allowed=True)
    with pytest.raises(DamagedFileError, match="20000 coded parts"):
        sniff(single(b"av01", av1_unit(SMALL) + delimiter * 20_000, STATED))
    assert_allowed(hevc(hevc_unit(8, 8), *[b""] * 19_998, stored=(b"",)), allowed=True)
    with pytest.raises(DamagedFileError, match="20000 coded parts"):
        sniff(hevc(hevc_unit(8, 8), *[b""] * 19_999, stored=(b"",)))
    # Beside ftyp, meta and mdat.
    assert sniff(FILES["444"] + box(b"free") * 4092).format == "HEIF"
    with pytest.raises(DamagedFileError, match="4096 boxes"):
        sniff(FILES["444"] + box(b"free") * 4093)


def test_sizes_are_bounded_as_of_any_file() -> None:
    with pytest.raises(ApiError) as refused:
        decode(FILES["large"], ImageLimits(max_pixels=2**20))
    assert (refused.value.status, refused.value.code) == (413, "image_too_large")


def test_an_item_is_one_frame() -> None:
    items = items_of(saved("AVIF", speed=10))
    data = items.data(items.primary)
    assert bmff._av1_pixels(data, itertools.count()) == 24 * 16
    with pytest.raises(DamagedFileError, match="more than one frame"):
        bmff._av1_pixels(data * 9, itertools.count())
    with pytest.raises(DamagedFileError, match="coded parts"):
        bmff._av1_pixels(b"\x12\0" * 100, iter(range(50)))


@pytest.mark.parametrize("name", FILES)
def test_cut_and_changed_files_are_pictures_or_errors_of_ours(name: str) -> None:
    random = np.random.default_rng(0)
    content = FILES[name]
    for _ in range(60):
        changed = bytearray(content)
        for at in random.integers(0, min(len(content), 700), 3):
            changed[at] = random.integers(256)
        try:
            file = sniff(bytes(changed[: random.integers(20, 2 * len(content))]))
        except (DamagedFileError, UnknownFormatError):
            continue
        assert len(file.content) <= len(content)


def test_a_video_is_no_image() -> None:
    with pytest.raises(UnknownFormatError, match="video"):
        sniff(box(b"ftyp", b"isom\0\0\2\0isomavc1mp41") + box(b"moov", bytes(100)))
    with pytest.raises(DamagedFileError, match="no still image"):
        sniff(box(b"ftyp", b"avis\0\0\0\0avis") + box(b"moov", bytes(100)))
