"""Generated images to PNG, JPEG, WebP and GIF files, with the marks that `marking.py` makes."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import numpy as np
import PIL.Image
from PIL.PngImagePlugin import PngInfo, putchunk

from model.canvas import on_white
from server.api.images.marking import MARKED, Marking
from server.api.images.sniff import after_gif_blocks, gif_palette_bytes
from server.engine.messages import Image

Format = Literal["png", "jpeg", "webp"]
AnimationFormat = Literal["gif", "webp"]

FRAME_MS = 80
# From this quality on, JPEG keeps colours at full resolution, as people who ask for it expect.
FULL_COLOUR_QUALITY = 95
# A frame of one transparent pixel: it shows what was there, for the time in its first block.
SAME_FRAME = (
    b"!\xf9\4\5" + struct.pack("<H", FRAME_MS // 10) + b"\0\0"
    b",\0\0\0\0\1\0\1\0\x80" + bytes(6) + b"\2\2\x44\1\0"
)
# Of a WebP's frame: it takes the place of what was there.
WEBP_NO_BLENDING = 0b10
WEBP_ANIMATION, WEBP_XMP, WEBP_EXIF = 0b10, 0b100, 0b1000
# Up to this many pixels a PNG is written in the quickest way, where its time counts most.
QUICK_PNG_PIXELS = 512 * 512
# Of a PNG, by channels: 3 for RGB, 4 for RGBA.
PNG_COLOUR_TYPES = {3: 2, 4: 6}
PNG_UP = 2


def encode(
    image: Image,
    format: Format,
    quality: int,
    parameters: dict[str, Any],
    text: str | None = None,
    marking: Marking = MARKED,
) -> bytes:
    """Return the image as a file; a PNG holds `parameters` in a text chunk, others in EXIF.

    Transparency is kept in PNG and WebP, and becomes white in JPEG.

    The same arguments give the same bytes, unless they are signed. quality: 1…100, for JPEG and
    WebP. text: takes the place of the parameters in a PNG's text chunk.
    """
    file = io.BytesIO()
    match format:
        case "png":
            _save_png(image, file, marking.png_chunks(parameters, text))
        case "jpeg":
            pillow_image = _pillow(image)
            if pillow_image.mode == "RGBA":
                pillow_image = PIL.Image.fromarray(on_white(np.asarray(pillow_image)))
            colours = "4:4:4" if quality >= FULL_COLOUR_QUALITY else "4:2:0"
            options = marking.jpeg_options(parameters)
            pillow_image.save(file, "JPEG", quality=quality, subsampling=colours, **options)
        case "webp":
            # Method 2 of 0…6 takes 0.6 of the default's time for nearly the same size.
            options = marking.webp_options(parameters)
            _pillow(image).save(file, "WEBP", quality=quality, method=2, **options)
    return marking.signed(file.getvalue(), f"image/{format}")


def _save_png(image: Image, file: io.BytesIO, chunks: PngInfo) -> None:
    """Write a PNG with these text chunks.

    Run lengths and Huffman codes alone compress what a filter leaves better than deflate's level 1
    does. Up to `QUICK_PNG_PIXELS` every row has the filter Up, which takes a quarter of the time
    that Pillow takes to choose one; of larger images the chosen filters' smaller file counts more.
    """
    if image.width * image.height > QUICK_PNG_PIXELS:
        pillow_image = _pillow(image)
        pillow_image.save(file, "PNG", compress_level=1, compress_type=zlib.Z_RLE, pnginfo=chunks)
        return
    rows = np.frombuffer(image.pixels, np.uint8).reshape(image.height, -1)
    filtered = np.empty((image.height, 1 + rows.shape[1]), np.uint8)
    filtered[:, 0] = PNG_UP
    filtered[0, 1:] = rows[0]
    np.subtract(rows[1:], rows[:-1], out=filtered[1:, 1:])
    compressor = zlib.compressobj(1, strategy=zlib.Z_RLE)
    colour_type = PNG_COLOUR_TYPES[rows.shape[1] // image.width]
    header = struct.pack(">2I5B", image.width, image.height, 8, colour_type, 0, 0, 0)
    file.write(b"\x89PNG\r\n\x1a\n")
    putchunk(file, b"IHDR", header)
    for name, content, *_ in chunks.chunks:
        putchunk(file, name, content)
    putchunk(file, b"IDAT", compressor.compress(filtered.data) + compressor.flush())
    putchunk(file, b"IEND")


def animate(
    images: Iterable[Image],
    format: AnimationFormat,
    quality: int,
    parameters: dict[str, Any],
    marking: Marking = MARKED,
) -> bytes:
    """Return the images as one animation that repeats endlessly. quality: 1…100, for WebP.

    Both have a frame for every image, also for equal ones: programs that take an animation apart
    count its frames. Images are opaque, and are taken one by one, each when it is encoded.
    """
    frames = (_pillow(image) for image in images)
    if format == "gif":
        content = marking.in_gif(_gif(frames), parameters)
    else:
        content = _webp_animation(frames, quality, marking.webp_options(parameters))
    return marking.signed(content, f"image/{format}")


def _gif(frames: Iterator[PIL.Image.Image]) -> bytes:
    file = io.BytesIO()
    first = next(frames)
    first.save(file, "GIF", save_all=True, append_images=frames, duration=FRAME_MS, loop=0)
    return _with_equal_frames(file.getvalue())


def _webp_animation(
    frames: Iterator[PIL.Image.Image], quality: int, options: dict[str, bytes]
) -> bytes:
    """Return an animated WebP of whole frames; libwebp's own encoder merges equal ones.

    options: `xmp` and `exif`, if the file has them.
    """
    parts: list[bytes] = []
    for frame in frames:
        file = io.BytesIO()
        frame.save(file, "WEBP", quality=quality, method=2)
        size = b"".join((side - 1).to_bytes(3, "little") for side in frame.size)
        place = bytes(6) + size + FRAME_MS.to_bytes(3, "little") + bytes([WEBP_NO_BLENDING])
        # The file of an opaque image without metadata is one chunk.
        parts.append(_riff_chunk(b"ANMF", place + file.getvalue()[12:]))
    flags = WEBP_ANIMATION | WEBP_XMP * ("xmp" in options) | WEBP_EXIF * ("exif" in options)
    head = _riff_chunk(b"VP8X", struct.pack("<I", flags) + size)
    endless = _riff_chunk(b"ANIM", bytes(6))
    exif, xmp = (
        _riff_chunk(name, options[key]) if key in options else b""
        for name, key in ((b"EXIF", "exif"), (b"XMP ", "xmp"))
    )
    return _riff_chunk(b"RIFF", b"".join((b"WEBP", head, endless, *parts, exif, xmp)))


def _riff_chunk(name: bytes, content: bytes) -> bytes:
    return name + struct.pack("<I", len(content)) + content + bytes(len(content) % 2)


def _with_equal_frames(gif: bytes) -> bytes:
    """Return a GIF of Pillow's, which shows equal frames as one, with a frame for every image."""
    start = 13 + gif_palette_bytes(gif[10])
    parts, repeats = [gif[:start]], 0
    while gif[start] != 0x3B:
        if gif[start] == 0x21:
            end = after_gif_blocks(gif, start + 2)
            block = gif[start:end]
            if gif[start + 1] == 0xF9:
                (delay,) = struct.unpack_from("<H", block, 4)
                repeats = max(0, delay * 10 // FRAME_MS - 1)
                block = block[:4] + struct.pack("<H", FRAME_MS // 10) + block[6:]
            parts.append(block)
        else:
            end = after_gif_blocks(gif, start + 11 + gif_palette_bytes(gif[start + 9]))
            parts += [gif[start:end], SAME_FRAME * repeats]
        start = end
    return b"".join([*parts, b";"])


def _pillow(image: Image) -> PIL.Image.Image:
    """Return RGB, or RGBA for an image of four bytes a pixel."""
    transparent = len(image.pixels) == 4 * image.width * image.height
    mode = "RGBA" if transparent else "RGB"
    return PIL.Image.frombytes(mode, (image.width, image.height), image.pixels)
