"""Files that people upload by mistake, by malice or with odd cameras, and what the server says to
each.

    python -m tests.hostile tests/data/hostile

writes them and `manifest.json`. Files of the exact encoders here come out the same everywhere;
those that Pillow or zlib compress (`"exact": false`) may differ between versions, so the committed
ones count.
"""

from __future__ import annotations

import io
import json
import struct
import sys
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from PIL import Image

SIZE = (24, 16)
PNG = b"\x89PNG\r\n\x1a\n"
GREY, RGB, PALETTE, GREY_ALPHA, RGBA = 0, 2, 3, 4, 6
RED, GREEN = (200, 30, 40), (20, 160, 60)


@dataclass(frozen=True, slots=True)
class Expected:
    """status: 200 is accepted. size: (width, height) then; alpha: whether it has any. code: of the
    error otherwise.

    role: a mask is decoded in mask_mode `mode` for an image of SIZE, and `repainted` of its pixels
    are true.
    """

    status: int
    code: str | None = None
    size: tuple[int, int] | None = None
    alpha: bool = False
    role: Literal["image", "mask"] = "image"
    mode: Literal["alpha", "luminance"] | None = None
    repainted: int | None = None
    exact: bool = True


Case = tuple[str, bytes, Expected]
DAMAGED = Expected(422, "undecodable_image")
UNSUPPORTED = Expected(422, "unsupported_image_format")
TOO_LARGE = Expected(413, "image_too_large")


def accepted(size: tuple[int, int] = SIZE, *, alpha: bool = False, exact: bool = True) -> Expected:
    return Expected(200, size=size, alpha=alpha, exact=exact)


# ── encoders whose output depends on nothing ──────────────────────────────────────────────────────


def chunk(name: bytes, data: bytes = b"") -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def stored(data: bytes) -> bytes:
    """A zlib stream without compression, for at most 65535 bytes."""
    return (
        b"\x78\x01\x01"
        + struct.pack("<HH", len(data), ~len(data) & 0xFFFF)
        + data
        + struct.pack(">I", zlib.adler32(data))
    )


def header(size: tuple[int, int], depth: int, colours: int) -> bytes:
    return PNG + chunk(b"IHDR", struct.pack(">IIBBBBB", *size, depth, colours, 0, 0, 0))


def png(
    rows: list[bytes], width: int = SIZE[0], depth: int = 8, colours: int = RGB, extra: bytes = b""
) -> bytes:
    """rows: the bytes of every line; extra: chunks before the pixels."""
    pixels = b"".join(b"\0" + row for row in rows)
    return (
        header((width, len(rows)), depth, colours)
        + extra
        + chunk(b"IDAT", stored(pixels))
        + chunk(b"IEND")
    )


def plain_png(extra: bytes = b"") -> bytes:
    """Red above green, so that rotations show."""
    return png(
        [bytes(RED) * SIZE[0]] * (SIZE[1] // 2) + [bytes(GREEN) * SIZE[0]] * (SIZE[1] // 2),
        extra=extra,
    )


def bomb_header(size: tuple[int, int], depth: int = 1, colours: int = GREY) -> bytes:
    return header(size, depth, colours) + chunk(b"IDAT", stored(bytes(2000))) + chunk(b"IEND")


def gif(
    canvas: tuple[int, int] = (2, 2),
    frame: tuple[int, int] = (2, 2),
    before: bytes = b"",
    frames: int = 1,
) -> bytes:
    """Two colours, 2×2 coded pixels a frame, whatever the sizes say."""
    start = b"GIF89a" + struct.pack("<HHBBB", *canvas, 0x80, 0, 0) + bytes(RED) + bytes(GREEN)
    picture = b"," + struct.pack("<HHHHB", 0, 0, *frame, 0) + b"\x02\x03\x44\x02\x05\0"
    return start + before + picture * frames + b";"


def exif(orientation: int, order: Literal["<", ">"] = ">") -> bytes:
    mark = b"MM\0*" if order == ">" else b"II*\0"
    return mark + struct.pack(f"{order}IHHHIHHI", 8, 1, 0x0112, 3, 1, orientation, 0, 0)


# ── encoders of Pillow's ──────────────────────────────────────────────────────────────────────────


def encoded(form: str, image: Image.Image | None = None, **options: Any) -> bytes:
    file = io.BytesIO()
    (image or two_colours()).save(file, form, **options)
    return file.getvalue()


def two_colours(mode: str = "RGB", size: tuple[int, int] = SIZE) -> Image.Image:
    image = Image.new("RGB", size, GREEN)
    image.paste(RED, (0, 0, size[0], size[1] // 2))
    return image.convert(mode)


def with_scans(count: int) -> bytes:
    """A progressive JPEG, its last scan repeated, which every decoder reads: nothing is wrong
    with it but the time it takes.
    """
    content = encoded("JPEG", progressive=True)
    last = content.rindex(b"\xff\xda\0")
    return (
        content[:last]
        + content[last:-2] * (count - content.count(b"\xff\xda\0") + 1)
        + content[-2:]
    )


def huge_animation(side: int) -> bytes:
    """Two frames of side x side pixels in about 140 bytes: soon sent, and slow to decode."""
    frames = [Image.new("RGB", (side, side), colour) for colour in ((0, 0, 0), RED)]
    return encoded(
        "WEBP",
        frames[0],
        save_all=True,
        append_images=frames[1:],
        lossless=True,
        method=0,
        quality=0,
    )


def padded(size: int) -> bytes:
    """A PNG with bytes behind its end, so many in all."""
    picture = plain_png()
    return picture + bytes(size - len(picture))


def segment(marker: int, data: bytes) -> bytes:
    return bytes((0xFF, marker)) + struct.pack(">H", len(data) + 2) + data


# ── the files ─────────────────────────────────────────────────────────────────────────────────────


def plain() -> Iterator[Case]:
    yield "plain.png", plain_png(), accepted()
    yield "plain.jpg", encoded("JPEG"), accepted(exact=False)
    yield "plain.webp", encoded("WEBP"), accepted(exact=False)
    yield "lossless.webp", encoded("WEBP", lossless=True), accepted(exact=False)
    yield "plain.gif", gif(), accepted((2, 2))
    yield "jpeg_named.png", encoded("JPEG"), accepted(exact=False)
    yield "png_named.html", plain_png(), accepted()
    yield "one_pixel.png", png([bytes(RED)], width=1), accepted((1, 1))
    yield "needle.png", png([bytes(1)] * 10_000, width=1, colours=GREY), accepted((1, 10_000))
    yield "lying.png", png([bytes(30_000)], width=10_000), accepted((10_000, 1))


def depths_and_colours() -> Iterator[Case]:
    w, h = SIZE
    palette, half_clear = chunk(b"PLTE", bytes(RED + GREEN)), chunk(b"tRNS", b"\0\x80")
    yield "grey_1_bit.png", png([b"\xaa\x55\xff"] * h, depth=1, colours=GREY), accepted()
    yield "grey_8_bit.png", png([bytes(range(w))] * h, colours=GREY), accepted()
    yield (
        "grey_16_bit.png",
        png([struct.pack(f">{w}H", *range(0, 60_000, 2500))] * h, depth=16, colours=GREY),
        accepted(),
    )
    yield (
        "grey_16_bit_keyed.png",
        png([bytes(2 * w)] * h, depth=16, colours=GREY, extra=chunk(b"tRNS", b"\0\0")),
        accepted(alpha=True),
    )
    yield "grey_alpha.png", png([b"\x80\x40" * w] * h, colours=GREY_ALPHA), accepted(alpha=True)
    yield "rgb_16_bit.png", png([b"\xff\0\x80\0\x10\0" * w] * h, depth=16), accepted()
    yield (
        "rgba_16_bit.png",
        png([b"\xff\0\x80\0\x10\0\x7f\xff" * w] * h, depth=16, colours=RGBA),
        accepted(alpha=True),
    )
    yield (
        "rgb_keyed.png",
        png([bytes(RED) * w] * h, extra=chunk(b"tRNS", struct.pack(">HHH", *RED))),
        accepted(alpha=True),
    )
    yield "palette.png", png([b"\0\1" * (w // 2)] * h, colours=PALETTE, extra=palette), accepted()
    yield (
        "palette_clear.png",
        png([b"\0\1" * (w // 2)] * h, colours=PALETTE, extra=palette + half_clear),
        accepted(alpha=True),
    )
    yield (
        "palette_beyond.png",
        png([b"\0\x09" * (w // 2)] * h, colours=PALETTE, extra=palette),
        accepted(),
    )
    yield "cmyk.jpg", encoded("JPEG", two_colours("CMYK")), accepted(exact=False)
    yield "grey.jpg", encoded("JPEG", two_colours("L")), accepted(exact=False)
    yield "progressive.jpg", encoded("JPEG", progressive=True), accepted(exact=False)
    yield "clear.webp", encoded("WEBP", two_colours("RGBA")), accepted(exact=False)
    yield (
        "half_clear.webp",
        encoded("WEBP", Image.new("RGBA", SIZE, (*RED, 99))),
        accepted(alpha=True, exact=False),
    )


def rotated() -> Iterator[Case]:
    for orientation in range(1, 9):
        size = SIZE if orientation < 5 else SIZE[::-1]
        yield (
            f"exif_{orientation}.png",
            plain_png(chunk(b"eXIf", exif(orientation))),
            accepted(size),
        )
    jpeg, block = encoded("JPEG"), segment(0xE1, b"Exif\0\0" + exif(6, "<"))
    yield "exif_6.jpg", jpeg[:2] + block + jpeg[2:], accepted(SIZE[::-1], exact=False)
    yield (
        "exif_6.webp",
        encoded("WEBP", exif=b"Exif\0\0" + exif(6)),
        accepted(SIZE[::-1], exact=False),
    )
    yield "exif_unknown_turn.png", plain_png(chunk(b"eXIf", exif(99))), accepted()
    yield "exif_damaged.png", plain_png(chunk(b"eXIf", b"MM\0*\xff\xff\xff\xff")), accepted()
    yield (
        "exif_cut.jpg",
        jpeg[:2] + segment(0xE1, b"Exif\0\0II*\0\x08\0\0\0\xff\xff") + jpeg[2:],
        accepted(exact=False),
    )


def animated() -> Iterator[Case]:
    yield "animated.gif", gif(frames=3), accepted((2, 2))
    yield "many_frames.gif", gif(frames=500), accepted((2, 2))
    yield (
        "animated.webp",
        encoded("WEBP", save_all=True, append_images=[two_colours("L").convert("RGB")]),
        accepted(exact=False),
    )
    yield (
        "animated.png",
        encoded("PNG", save_all=True, append_images=[Image.new("RGB", SIZE)]),
        accepted(exact=False),
    )
    yield "frame_beyond_canvas.gif", gif(canvas=(1, 1)), accepted((2, 2))


def damaged() -> Iterator[Case]:
    picture, jpeg, webp = plain_png(), encoded("JPEG"), encoded("WEBP")
    soft = Expected(422, "undecodable_image", exact=False)
    yield "empty.png", b"", DAMAGED
    yield "magic_only.png", PNG, DAMAGED
    yield "header_only.png", header(SIZE, 8, RGB), DAMAGED
    yield "cut_header.png", picture[:20], DAMAGED
    yield "cut.png", picture[: len(picture) // 2], DAMAGED
    yield "no_pixels.png", header(SIZE, 8, RGB) + chunk(b"IEND"), DAMAGED
    yield "no_header.png", PNG + chunk(b"IDAT", stored(b"")) + chunk(b"IEND"), DAMAGED
    yield "wrong_sum.png", picture[:29] + b"\0\0\0\0" + picture[33:], DAMAGED
    yield "zero_width.png", bomb_header((0, 5)), DAMAGED
    yield (
        "no_such_depth.png",
        header(SIZE, 3, RGB) + chunk(b"IDAT", stored(b"\0" * 99)) + chunk(b"IEND"),
        DAMAGED,
    )
    yield (
        "noise_for_pixels.png",
        header(SIZE, 8, RGB) + chunk(b"IDAT", b"\x55" * 99) + chunk(b"IEND"),
        DAMAGED,
    )
    yield "no_palette.png", png([b"\0\1" * (SIZE[0] // 2)] * SIZE[1], colours=PALETTE), DAMAGED
    yield (
        "chunk_beyond_end.png",
        header(SIZE, 8, RGB) + b"\x7f\xff\xff\xffIDAT" + bytes(40),
        DAMAGED,
    )
    yield "magic_only.jpg", b"\xff\xd8\xff", DAMAGED
    yield "cut.jpg", jpeg[: len(jpeg) - 60], soft
    yield "cut_header.jpg", jpeg[:40], soft
    yield (
        "no_scan.jpg",
        b"\xff\xd8" + segment(0xC0, b"\x08\0\x10\0\x18\x01\x01\x11\0") + b"\xff\xd9",
        DAMAGED,
    )
    yield "junk_for_segments.jpg", b"\xff\xd8\xff\xe0\0\x04ab" + bytes(5000), DAMAGED
    yield "many_segments.jpg", b"\xff\xd8" + segment(0xFE, b"") * 2500, DAMAGED
    yield "many_scans.jpg", with_scans(101), soft
    yield "cut.webp", webp[: len(webp) // 2], soft
    yield "magic_only.webp", b"RIFF\x04\0\0\0WEBP", DAMAGED
    yield "no_frame.gif", b"GIF89a" + struct.pack("<HHBBB", 2, 2, 0, 0, 0) + b";", DAMAGED
    yield "cut.gif", gif()[:32], DAMAGED


def bombs() -> Iterator[Case]:
    text = b"Comment\0\0" + zlib.compress(bytes(2**22), 9)
    swollen = accepted(exact=False)
    yield "100_megapixels.png", bomb_header((10_000, 10_000)), TOO_LARGE
    yield "2_gigapixels.png", bomb_header((2**31 - 1, 1)), TOO_LARGE
    yield "largest_sides.png", bomb_header((2**32 - 1, 2**32 - 1)), TOO_LARGE
    frame, scan = (
        segment(0xC0, b"\x08\xff\xff\xff\xff\x01\x01\x11\0"),
        segment(0xDA, b"\x01\x01\0\0\x3f\0"),
    )
    yield "4_gigapixels.jpg", b"\xff\xd8" + frame + scan, TOO_LARGE
    yield "4_gigapixels.gif", gif(canvas=(65535, 65535)), TOO_LARGE
    yield "4_gigapixel_frame.gif", gif(frame=(65535, 65535)), TOO_LARGE
    yield (
        "256_megapixels.webp",
        b"RIFF\x1a\0\0\0WEBPVP8L\x0d\0\0\0\x2f\xff\xff\xff\x0f" + bytes(12),
        TOO_LARGE,
    )
    yield (
        "4_gigapixels.webp",
        b"RIFF\x16\0\0\0WEBPVP8X\x0a\0\0\0" + bytes(4) + b"\xff\xff\0" * 2,
        TOO_LARGE,
    )
    yield "text_bomb.png", plain_png(chunk(b"zTXt", text) * 5), swollen
    yield (
        "international_text_bomb.png",
        plain_png(chunk(b"iTXt", b"k\0\1\0\0\0" + text[9:])),
        swollen,
    )
    yield "profile_bomb.png", plain_png(chunk(b"iCCP", b"p\0\0" + text[9:])), swollen
    yield "comment_blocks.gif", gif(before=b"!\xfe" + (b"\x01x") * 5000 + b"\0"), accepted((2, 2))
    yield "many_chunks.png", plain_png(chunk(b"tEXt", b"k\0") * 1500), accepted()
    yield (
        "rows_missing.png",
        header((400, 400), 1, GREY) + chunk(b"IDAT", stored(bytes(510))) + chunk(b"IEND"),
        accepted((400, 400)),
    )


def disguised() -> Iterator[Case]:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as opened:
        opened.writestr(zipfile.ZipInfo("a.png", (2020, 1, 1, 0, 0, 0)), "not a picture")
    picture = plain_png()
    yield (
        "svg.png",
        b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
        UNSUPPORTED,
    )
    yield (
        "svg_with_prolog.jpg",
        b'\xef\xbb\xbf<?xml version="1.0"?>\n<!DOCTYPE svg [<!ENTITY a "b">]>\n<svg/>',
        UNSUPPORTED,
    )
    yield "html.png", b"<!doctype html><script>alert(1)</script>", UNSUPPORTED
    yield "pdf.png", b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", UNSUPPORTED
    yield "zip.png", archive.getvalue(), UNSUPPORTED
    yield "postscript.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", UNSUPPORTED
    yield "bitmap.png", b"BM" + bytes(60), UNSUPPORTED
    yield "tiff.png", b"II*\0" + bytes(60), UNSUPPORTED
    yield "avif.png", b"\0\0\0\x1cftypavif" + bytes(20), DAMAGED
    yield "video.png", b"\0\0\0\x1cftypisom" + bytes(20), UNSUPPORTED
    yield "text.png", b"not a picture\n", UNSUPPORTED
    yield "zeros.png", bytes(1000), UNSUPPORTED
    yield "zip_behind.png", picture + archive.getvalue(), accepted()
    yield "script_behind.gif", gif() + b"<script>alert(1)</script>", accepted((2, 2))
    yield "html_behind.jpg", encoded("JPEG") + b"<html></html>", accepted(exact=False)
    yield "bytes_before.png", b"\n" + picture, UNSUPPORTED


def masks() -> Iterator[Case]:
    w, h = SIZE
    half = h // 2 * w

    def repainting(
        count: int, mode: Literal["alpha", "luminance"] | None = None, alpha: bool = False
    ) -> Expected:
        return Expected(200, size=SIZE, alpha=alpha, role="mask", mode=mode, repainted=count)

    def refused(code: str, mode: Literal["alpha", "luminance"] | None = None) -> Expected:
        return Expected(422, code, role="mask", mode=mode)

    upper_clear = png(
        [b"\xff\xff\xff\0" * w] * (h // 2) + [b"\0\0\0\xff" * w] * (h // 2), colours=RGBA
    )
    upper_white = png([b"\xff" * w] * (h // 2) + [bytes(w)] * (h // 2), colours=GREY)
    yield "mask_alpha.png", upper_clear, repainting(half, alpha=True)
    yield "mask_alpha_as_luminance.png", upper_clear, refused("empty_mask", "luminance")
    yield "mask_luminance.png", upper_white, repainting(half)
    yield "mask_luminance_as_alpha.png", upper_white, refused("mask_without_alpha", "alpha")
    yield "mask_all.png", png([b"\xff" * w] * h, colours=GREY), repainting(w * h)
    yield "mask_none.png", png([bytes(w)] * h, colours=GREY), refused("empty_mask")
    yield "mask_opaque.png", png([b"\0\0\0\xff" * w] * h, colours=RGBA), refused("empty_mask")
    yield "mask_small.png", png([b"\xff"], width=1, colours=GREY), refused("mask_size_mismatch")
    yield (
        "mask_half_grey.png",
        png([b"\x7f\x80" * (w // 2)] * h, colours=GREY),
        repainting(w * h),
    )
    yield (
        "mask_half_clear.png",
        png([b"\0\x7f\0\x80" * (w // 2)] * h, colours=GREY_ALPHA),
        repainting(w * h, "alpha", alpha=True),
    )


def cases() -> list[Case]:
    families = (plain, depths_and_colours, rotated, animated, damaged, bombs, disguised, masks)
    return [case for family in families for case in family()]


def write(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    made = cases()
    for name, content, _ in made:
        (folder / name).write_bytes(content)
    manifest = {
        name: {key: value for key, value in asdict(expected).items() if value is not None}
        for name, _, expected in made
    }
    lines = ",\n".join(
        f"  {json.dumps(name)}: {json.dumps(entry)}" for name, entry in manifest.items()
    )
    (folder / "manifest.json").write_text(f"{{\n{lines}\n}}\n")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
