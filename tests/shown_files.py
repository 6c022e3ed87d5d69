"""Image files of every kind that people send and browsers show, generated, each small.

Translucent pixels have profiles within sRGB's gamut only: Chromium clips colours outside it after
weighting them by alpha. Colours are smooth: differences that decoders may have (sampling of chroma,
inverse transforms) stay small, and differences in meaning (profiles, keys, polarity) stand out.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from server.api.images.colour import D50, PRIMARIES, SRGB, colorants, matrix_profile
from tests.hostile import (
    GREY,
    GREY_ALPHA,
    PALETTE,
    PNG,
    RGB,
    RGBA,
    chunk,
    exif,
    png,
    segment,
)

W, H = 24, 16
ADOBE_RGB = (0.3127, 0.329, 0.64, 0.33, 0.21, 0.71, 0.15, 0.06)
PRO_PHOTO = (0.3457, 0.3585, 0.7347, 0.2653, 0.1596, 0.8404, 0.0366, 0.0001)
P3 = matrix_profile(PRIMARIES[12], None)
PROFILES = {
    "srgb": matrix_profile(SRGB, None),
    "p3": P3,
    "adobe": matrix_profile(ADOBE_RGB, 2.2),
    "prophoto": matrix_profile(PRO_PHOTO, 1.8),
    "linear": matrix_profile(SRGB, 1.0),
}
# Part of the light, as sRGB's numbers, that passes an ink of the generated profile.
LIGHT_THROUGH_INK = 0.15
CHANNELS = {GREY: 1, RGB: 3, PALETTE: 1, GREY_ALPHA: 2, RGBA: 4}


@dataclass(frozen=True, slots=True)
class Shown:
    """A file, its media type, and how much a browser's image may differ, in parts of 255."""

    content: bytes
    type: str
    tolerance: int = 2


# ── pixels ────────────────────────────────────────────────────────────────────────────────────────


def gradient(width: int = W, height: int = H) -> NDArray[np.uint8]:
    """[H, W, 4]: red grows to the right, green downwards, blue against red, alpha to the right."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return np.stack([x, y, 255 - x, 40 + 0.8 * x], axis=-1).astype(np.uint8)


COLOURS = gradient()


def image(mode: str = "RGB") -> PIL.Image.Image:
    whole = PIL.Image.fromarray(COLOURS)
    if mode == "LA":
        grey = whole.convert("L")
        grey.putalpha(whole.getchannel("A"))
        return grey
    return whole if mode == "RGBA" else whole.convert("RGB").convert(mode)


def saved(format: str, picture: PIL.Image.Image | None = None, **options: Any) -> bytes:
    file = io.BytesIO()
    (picture or image()).save(file, format, **options)
    return file.getvalue()


# ── PNG ───────────────────────────────────────────────────────────────────────────────────────────


def stored(depth: int, colours: int) -> NDArray[np.uint16]:
    """[H, W, channels] of numbers of `depth` bits, smooth but for palettes."""
    channels = CHANNELS[colours]
    most = (1 << depth) - 1
    if colours in (GREY, PALETTE):
        step = most // 40 if colours == GREY and depth > 4 else 1
        diagonal = np.arange(W)[None, :, None] + np.arange(H)[:, None, None]
        return (step * diagonal % (most + 1)).astype(np.uint16)
    picked = COLOURS[..., {2: [0, 3], 3: [0, 1, 2], 4: [0, 1, 2, 3]}[channels]]
    return (picked.astype(np.float64) / 255 * most).round().astype(np.uint16)


def rows_of(numbers: NDArray[np.uint16], depth: int) -> list[bytes]:
    if depth == 16:
        return [row.astype(">u2").tobytes() for row in numbers]
    if depth == 8:
        return [row.astype(np.uint8).tobytes() for row in numbers]
    shifts = np.arange(depth)[::-1]
    return [np.packbits(row.reshape(-1, 1) >> shifts & 1).tobytes() for row in numbers]


def palette(depth: int) -> bytes:
    count = 1 << depth
    entries = np.stack([np.arange(count) * 255 // (count - 1), np.arange(count)[::-1]] * 2)[:3]
    return chunk(b"PLTE", entries.T.astype(np.uint8).tobytes())


def any_png(depth: int, colours: int, extra: bytes = b"") -> bytes:
    before = palette(depth) if colours == PALETTE else b""
    return png(rows_of(stored(depth, colours), depth), W, depth, colours, before + extra)


def interlaced(numbers: NDArray[np.uint16], depth: int, colours: int, extra: bytes = b"") -> bytes:
    """A PNG in seven passes (Adam7), of 8 or 16 bits."""
    passes = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2))
    lines = [
        line
        for x, y, dx, dy in (*passes, (0, 1, 1, 2))
        for line in rows_of(numbers[y::dy, x::dx], depth)
    ]
    head = struct.pack(">IIBBBBB", W, H, depth, colours, 0, 0, 1)
    pixels = zlib.compress(b"".join(b"\0" + line for line in lines))
    return PNG + chunk(b"IHDR", head) + extra + chunk(b"IDAT", pixels) + chunk(b"IEND")


def icc(profile: bytes) -> bytes:
    return chunk(b"iCCP", b"a profile\0\0" + zlib.compress(profile))


def gamma(value: float) -> bytes:
    return chunk(b"gAMA", struct.pack(">I", round(value * 100_000)))


def chromaticities(values: tuple[float, ...]) -> bytes:
    return chunk(b"cHRM", struct.pack(">8I", *(round(value * 100_000) for value in values)))


def grey_profile(exponent: float | None) -> bytes:
    """A profile of grey. exponent: None is for sRGB's curve."""
    colours = matrix_profile(SRGB, exponent)
    return profile_of(b"mntrGRAYXYZ ", {b"kTRC": colours[colours.rindex(b"para") :]})


def profile_of(kind: bytes, tags: dict[bytes, bytes]) -> bytes:
    """An ICC profile of class, colours and connection space, with a white point of D50."""
    white = struct.pack(">3i", 63190, 65536, 54061)
    tags = {b"wtpt": b"XYZ \0\0\0\0" + white, **tags}
    start = 132 + 12 * len(tags)
    table = data = b""
    for name, tag in tags.items():
        tag += bytes(-len(tag) % 4)
        table += name + struct.pack(">II", start + len(data), len(tag))
        data += tag
    head = struct.pack(
        ">I4xI12s12x4s28x12s48x", start + len(data), 0x02400000, kind, b"acsp", white
    )
    return head + struct.pack(">I", len(tags)) + table + data


@cache
def ink_profile(bits: int = 8, points: int = 17) -> bytes:
    """A profile of CMYK whose inks filter light: a table of points⁴ colours in Lab.

    bits: of each number of the table, 8 or 16.
    """
    levels = np.linspace(1, LIGHT_THROUGH_INK, points)
    cyan, magenta, yellow, black = np.meshgrid(*[levels] * 4, indexing="ij")
    rgb = np.stack([cyan, magenta, yellow], axis=-1) * black[..., None]
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    xyz = linear @ colorants(np.array(SRGB).reshape(4, 2)) / D50
    root = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
    x, y, z = np.moveaxis(root, -1, 0)
    lab = np.stack([(116 * y - 16) * 2.55, 500 * (x - y) + 128, 200 * (y - z) + 128], axis=-1)
    identity = struct.pack(">9i", *(65536 * np.eye(3, dtype=int)).ravel())
    head = bytes([4, 3, points, 0]) + identity
    if bits == 8:
        straight, table = bytes(range(256)), lab.round().clip(0, 255).astype(np.uint8).tobytes()
        head = b"mft1\0\0\0\0" + head
    else:
        straight = b"\0\0\xff\xff"
        table = (256 * lab).round().clip(0, 65535).astype(">u2").tobytes()
        head = b"mft2\0\0\0\0" + head + b"\0\2\0\2"
    return profile_of(b"prtrCMYKLab ", {b"A2B0": head + straight * 4 + table + straight * 3})


def pngs() -> Iterator[tuple[str, bytes]]:
    for depth in (1, 2, 4, 8, 16):
        yield f"grey_{depth}", any_png(depth, GREY)
        key = chunk(b"tRNS", struct.pack(">H", *stored(depth, GREY)[3, 5]))
        yield f"grey_{depth}_keyed", any_png(depth, GREY, key)
    for depth in (1, 2, 4, 8):
        yield f"palette_{depth}", any_png(depth, PALETTE)
        alphas = chunk(b"tRNS", bytes([0, 90, 200, 30][: 1 << depth]))
        yield f"palette_{depth}_clear", any_png(depth, PALETTE, alphas)
    for depth in (8, 16):
        yield f"rgb_{depth}", any_png(depth, RGB)
        numbers = stored(depth, RGB)
        key = chunk(b"tRNS", struct.pack(">3H", *numbers[3, 5]))
        yield f"rgb_{depth}_keyed", any_png(depth, RGB, key)
        yield f"rgb_{depth}_keyed_interlaced", interlaced(numbers, depth, RGB, key)
        yield f"grey_alpha_{depth}", any_png(depth, GREY_ALPHA)
        yield f"rgba_{depth}", any_png(depth, RGBA)
    near = stored(16, RGB)
    key = chunk(b"tRNS", struct.pack(">3H", *(near[3, 5] ^ 1)))
    yield "rgb_16_keyed_by_the_lower_byte", any_png(16, RGB, key)
    for name, profile in PROFILES.items():
        yield f"icc_{name}", any_png(8, RGB, icc(profile))
    yield "icc_rgba", any_png(8, RGBA, icc(PROFILES["linear"]))
    yield "icc_rgba_16", any_png(16, RGBA, icc(PROFILES["linear"]))
    indices = rows_of(stored(8, PALETTE), 8)
    yield "icc_palette", png(indices, W, 8, PALETTE, icc(P3) + palette(8))
    yield "icc_grey", any_png(8, GREY, icc(grey_profile(1.0)))
    yield "icc_grey_alpha", any_png(8, GREY_ALPHA, icc(grey_profile(1.8)))
    yield "icc_damaged", any_png(8, RGB, icc(P3[:200]))
    yield "icc_not_compressed", any_png(8, RGB, chunk(b"iCCP", b"p\0\0" + P3))
    yield "gamma_1", any_png(8, RGB, gamma(1.0))
    yield "gamma_of_2.2", any_png(8, RGB, gamma(0.45455))
    yield "chromaticities", any_png(8, RGB, chromaticities(ADOBE_RGB))
    yield "gamma_chromaticities", any_png(8, RGB, gamma(0.45455) + chromaticities(ADOBE_RGB))
    yield "srgb_over_gamma", any_png(8, RGB, chunk(b"sRGB", b"\0") + gamma(1.0))
    yield "gamma_chromaticities_of_srgb", any_png(8, RGB, gamma(0.45455) + chromaticities(SRGB))
    yield "gamma_grey", any_png(8, GREY, gamma(1.0))
    yield "gamma_near_2.2", any_png(8, RGB, gamma(0.45))
    for name, codes in (("p3", (12, 13)), ("video", (1, 1)), ("srgb_over_profile", (1, 13))):
        other = icc(PROFILES["adobe"]) if name == "srgb_over_profile" else b""
        yield f"code_points_{name}", any_png(8, RGB, chunk(b"cICP", bytes([*codes, 0, 1])) + other)
    yield "turned", any_png(8, RGB, chunk(b"eXIf", exif(6)))


# ── JPEG ──────────────────────────────────────────────────────────────────────────────────────────


def with_segment(jpeg: bytes, marker: int, data: bytes) -> bytes:
    return jpeg[:2] + segment(marker, data) + jpeg[2:]


def without_segment(jpeg: bytes, marker: int) -> bytes:
    at = jpeg.index(bytes((0xFF, marker)))
    return jpeg[:at] + jpeg[at + 2 + int.from_bytes(jpeg[at + 2 : at + 4]) :]


def ycck() -> bytes:
    """Pillow writes no YCCK: its four channels are written as CMYK, and the marker changed."""
    luma = PIL.Image.fromarray(COLOURS[..., :3]).convert("YCbCr")
    coded = np.dstack([np.asarray(luma), np.full((H, W), 200, np.uint8)])
    ink = PIL.Image.frombytes("CMYK", (W, H), (255 - coded).tobytes())
    jpeg = saved("JPEG", ink, quality=95)
    at = jpeg.index(b"Adobe") + 11
    assert jpeg[at] == 0
    return jpeg[:at] + b"\2" + jpeg[at + 1 :]


def ink() -> PIL.Image.Image:
    """CMYK in all four inks."""
    black = COLOURS[..., 1] // 3
    return PIL.Image.frombytes("CMYK", (W, H), np.dstack([COLOURS[..., :3], black]).tobytes())


def motion_photo(jpeg: bytes) -> bytes:
    """A phone's: a video behind the picture, with bytes in it that look like JPEG's markers."""
    return jpeg + b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom" + b"\xff\xda\0\x08\xff\xd8" * 400


def two_views(jpeg: bytes, other: bytes) -> bytes:
    """MPO: a second picture behind the first, and an index of both."""
    file = io.BytesIO()
    first, second = (PIL.Image.open(io.BytesIO(content)) for content in (jpeg, other))
    first.save(file, "MPO", save_all=True, append_images=[second], quality=95)
    return file.getvalue()


def jpegs() -> Iterator[tuple[str, bytes]]:
    fine = saved("JPEG", quality=95, subsampling=0)
    yield "444", fine
    yield "420", saved("JPEG", gradient_image(48, 32), quality=95, subsampling=2)
    yield "progressive", saved("JPEG", quality=95, progressive=True, subsampling=0)
    yield "grey", saved("JPEG", image("L"), quality=95)
    yield "restarts", saved("JPEG", quality=95, subsampling=0, restart_marker_blocks=1)
    for name in ("srgb", "p3", "adobe"):
        yield (
            f"icc_{name}",
            saved("JPEG", quality=95, subsampling=0, icc_profile=PROFILES[name]),
        )
    yield "icc_grey", saved("JPEG", image("L"), quality=95, icc_profile=grey_profile(1.0))
    yield "icc_of_ink_on_colours", saved("JPEG", quality=95, icc_profile=ink_profile())
    yield "bytes_behind", fine + b"PK\3\4" + bytes(100)
    yield "motion_photo", motion_photo(fine)
    yield "no_end", fine[:-2]
    yield "no_end_progressive", saved("JPEG", quality=95, progressive=True, subsampling=0)[:-2]
    yield "zeros_for_the_end", fine[:-2] + bytes(64)
    yield "padded_markers", fine[:2] + b"\xff\xff\xff" + fine[2:]
    noted = with_segment(fine, 0xFE, b"note")
    yield "bytes_between_segments", noted.replace(b"note", b"note\0\0\1\2")
    yield "turned", with_segment(fine, 0xE1, b"Exif\0\0" + exif(6))
    yield "two_views", two_views(fine, saved("JPEG", image("L").convert("RGB")))
    cmyk = saved("JPEG", ink(), quality=95)
    yield "cmyk", cmyk
    yield "cmyk_unmarked", without_segment(cmyk, 0xEE)
    yield "ycck", ycck()
    yield "cmyk_icc", saved("JPEG", ink(), quality=95, icc_profile=ink_profile(16))
    # The same inks but black.
    colours = PIL.Image.merge("CMYK", [*ink().split()[:3], PIL.Image.new("L", (W, H))])
    yield "cmyk_icc_no_black", saved("JPEG", colours, quality=95, icc_profile=ink_profile())


def gradient_image(width: int, height: int) -> PIL.Image.Image:
    return PIL.Image.fromarray(gradient(width, height)).convert("RGB")


# ── WebP, GIF and AVIF ────────────────────────────────────────────────────────────────────────────


def webps() -> Iterator[tuple[str, bytes]]:
    yield "lossy", saved("WEBP", quality=95)
    yield "lossless", saved("WEBP", lossless=True)
    # Without `exact`, Pillow's encoder changes colours that nobody sees.
    yield "clear_lossless", saved("WEBP", image("RGBA"), lossless=True, exact=True)
    yield "clear_lossy", saved("WEBP", image("RGBA"), quality=95, exact=True)
    yield "icc", saved("WEBP", lossless=True, icc_profile=P3)
    linear = {"lossless": True, "exact": True, "icc_profile": PROFILES["linear"]}
    yield "icc_clear", saved("WEBP", image("RGBA"), **linear)
    yield "turned", saved("WEBP", lossless=True, exif=b"Exif\0\0" + exif(6))
    frames = {"save_all": True, "append_images": [image("L").convert("RGB")], "duration": 60_000}
    yield "animated", saved("WEBP", lossless=True, **frames)


def gifs() -> Iterator[tuple[str, bytes]]:
    few = image().quantize(64)
    yield "plain", saved("GIF", few)
    yield "grey", saved("GIF", image("L"))
    yield "clear", saved("GIF", few, transparency=int(np.asarray(few)[3, 5]))
    frames = {"save_all": True, "append_images": [image("L").convert("RGB")], "duration": 60_000}
    yield "animated", saved("GIF", few, **frames)
    plain = saved("GIF", few)
    # The frame begins at (3, 2) of a canvas of 32 × 20.
    at = plain.index(struct.pack("<BHHHH", 0x2C, 0, 0, W, H))
    moved = plain[:at] + struct.pack("<BHHHH", 0x2C, 3, 2, W, H) + plain[at + 9 :]
    yield "frame_within_canvas", moved[:6] + struct.pack("<HH", 32, 20) + moved[10:]


def avifs() -> Iterator[tuple[str, bytes]]:
    fine = {"quality": 100, "subsampling": "4:4:4", "speed": 10}
    plain = saved("AVIF", **fine)
    yield "444", plain
    yield "420", saved("AVIF", gradient_image(48, 32), quality=95, speed=10)
    yield "grey", saved("AVIF", image("L"), quality=100, speed=10)
    yield "clear", saved("AVIF", image("RGBA"), **fine)
    yield "icc", saved("AVIF", icc_profile=P3, **fine)
    # Display P3 by code points.
    at = plain.index(b"colrnclx") + 8
    yield "code_points_p3", plain[:at] + struct.pack(">HH", 12, 13) + plain[at + 4 :]
    for turn in (2, 3, 6, 7):
        yield f"turned_{turn}", saved("AVIF", exif=b"Exif\0\0" + exif(turn), **fine)
    frames = {"save_all": True, "append_images": [image("L").convert("RGB")], "duration": 60_000}
    yield "video_range", saved("AVIF", range="limited", **fine)
    yield "animated", saved("AVIF", range="limited", **frames, **fine)
    yield "animated_full_range", saved("AVIF", **frames, **fine)


FAMILIES: dict[str, Callable[[], Iterator[tuple[str, bytes]]]] = {
    "png": pngs,
    "jpeg": jpegs,
    "webp": webps,
    "gif": gifs,
    "avif": avifs,
}
# CMYK goes through a table of few colours; chroma of half the resolution is enlarged by filters.
TOLERANCES = dict.fromkeys(
    ("jpeg_cmyk", "jpeg_cmyk_unmarked", "jpeg_ycck", "jpeg_cmyk_icc_no_black"), 6
)


def files() -> dict[str, Shown]:
    """All files by name."""
    return {
        f"{family}_{name}": Shown(content, f"image/{family}", TOLERANCES.get(f"{family}_{name}", 2))
        for family, generate in FAMILIES.items()
        for name, content in generate()
    }
