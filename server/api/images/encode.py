"""Generated RGB images to PNG, JPEG, WebP and GIF files, in a bounded number of threads.

Requests are rejected while too many images wait for these threads. Files say what they are: XMP
marks, parameters in text or EXIF, C2PA signatures. No mark has a date or anything else that differs
from one time to the next, so the same request gives the same bytes, unless they are signed. Reasons
and limits: docs/marking.md.
"""

from __future__ import annotations

import asyncio
import io
import json
import os
import struct
import time
import zlib
from collections.abc import Callable, Coroutine, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar
from xml.sax.saxutils import escape

import numpy as np
import PIL.Image
from PIL.PngImagePlugin import PngInfo, putchunk

from model.canvas import on_white
from server.api.images.signing import SOURCE_TYPES, Signer
from server.api.images.sniff import after_gif_blocks, gif_palette_bytes
from server.engine.errors import Draining, QueueFull
from server.engine.messages import Image
from server.engine.retry_slots import RetrySlots
from server.pace import Pace

if TYPE_CHECKING:
    from server.settings import Settings

Result = TypeVar("Result")
Format = Literal["png", "jpeg", "webp"]
AnimationFormat = Literal["gif", "webp"]

FRAME_MS = 80
# Seconds per image before the first measurement.
FIRST_IMAGE_S = 0.02
# From this quality on, JPEG keeps colours at full resolution, as people who ask for it expect.
FULL_COLOUR_QUALITY = 95
# A frame of one transparent pixel: it shows what was there, for the time in its first block.
SAME_FRAME = (
    b"!\xf9\4\5" + struct.pack("<H", FRAME_MS // 10) + b"\0\0"
    b",\0\0\0\0\1\0\1\0\x80" + bytes(6) + b"\2\2\x44\1\0"
)

SourceType = Literal["trainedAlgorithmicMedia", "compositeWithTrainedAlgorithmicMedia"]
# Operations whose results contain, or are redrawn from, an image that the client sent.
COMPOSITES = frozenset({"inpaint", "outpaint", "edit", "upscale"})

# Up to this many pixels a PNG is written in the quickest way, where its time counts most.
QUICK_PNG_PIXELS = 512 * 512
# Of a PNG, by channels: 3 for RGB, 4 for RGBA.
PNG_COLOUR_TYPES = {3: 2, 4: 6}
PNG_UP = 2

XMP_KEYWORD = "XML:com.adobe.xmp"
# Bytes of a JPEG's marker segment, less those of its length.
MAX_JPEG_SEGMENT = 65_533
JPEG_EXIF = b"Exif\0\0"
# What Adobe's specification appends to XMP in a GIF: a reader that takes the packet for blocks with
# length prefixes gets to the last byte, wherever it enters.
GIF_TRAILER = b"\1" + bytes(range(255, -1, -1)) + b"\0"
GIF_LOOP = b"!\xff\x0bNETSCAPE2.0"

PACKET = """\
<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/">
 <rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
  <rdf:Description rdf:about=""
    xmlns:xmp="http://ns.adobe.com/xap/1.0/"
    xmlns:exif="http://ns.adobe.com/exif/1.0/"
    xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/">
{properties}  </rdf:Description>
 </rdf:RDF>
</x:xmpmeta>
<?xpacket end="r"?>"""
SOURCE_PROPERTIES = """\
   <xmp:CreatorTool>Paellera</xmp:CreatorTool>
   <Iptc4xmpExt:AISystemUsed>Paellera</Iptc4xmpExt:AISystemUsed>
   <Iptc4xmpExt:DigitalSourceType>{source}</Iptc4xmpExt:DigitalSourceType>
"""
COMMENT_PROPERTY = """\
   <exif:UserComment>
    <rdf:Alt><rdf:li xml:lang="x-default">{comment}</rdf:li></rdf:Alt>
   </exif:UserComment>
"""


# ── what files say about themselves ───────────────────────────────────────────────────────────────


def source_type(operation: str) -> SourceType:
    """Return the digital source type of the results of an operation."""
    if operation in COMPOSITES:
        return "compositeWithTrainedAlgorithmicMedia"
    return "trainedAlgorithmicMedia"


@dataclass(frozen=True, slots=True)
class Marking:
    """Marks of a file: its source, the request's parameters, a signature.

    Attributes:
        source: None leaves the mark out.
        embed_parameters: whether the parameters of the request stand in the file.
        signer: adds a C2PA manifest; None: no signature.
    """

    source: SourceType | None = "trainedAlgorithmicMedia"
    embed_parameters: bool = True
    signer: Signer | None = None

    def text(self, parameters: dict[str, Any]) -> str | None:
        """Return the parameters as a PNG holds them, None if it holds none."""
        return json.dumps(parameters) if parameters and self.embed_parameters else None

    def xmp(self, parameters: dict[str, Any] | None = None) -> str | None:
        """Return the XMP packet, None if there is nothing to say.

        parameters: those that have no other place in the file.
        """
        properties = ""
        if self.source:
            properties += SOURCE_PROPERTIES.format(source=SOURCE_TYPES + self.source)
        if comment := self.text(parameters or {}):
            properties += COMMENT_PROPERTY.format(comment=escape(comment))
        return PACKET.format(properties=properties) if properties else None

    def webp_options(self, parameters: dict[str, Any]) -> dict[str, bytes]:
        """Return Pillow's options `xmp` and `exif` for a WebP file."""
        options = {}
        if (packet := self.xmp()) is not None:
            options["xmp"] = packet.encode()
        if parameters and self.embed_parameters:
            options["exif"] = user_comment(json.dumps(parameters, ensure_ascii=False))
        return options

    def jpeg_options(self, parameters: dict[str, Any]) -> dict[str, bytes]:
        """Return Pillow's options for a JPEG file; parameters too long for it are left out."""
        options = self.webp_options(parameters)
        exif = JPEG_EXIF + options.pop("exif", b"")
        has_room = len(JPEG_EXIF) < len(exif) <= MAX_JPEG_SEGMENT
        return options | ({"exif": exif} if has_room else {})

    def in_gif(self, content: bytes, parameters: dict[str, Any]) -> bytes:
        """Return a GIF file with the XMP packet as an application extension."""
        packet = self.xmp(parameters)
        if packet is None:
            return content
        start = _after_gif_head(content)
        extension = b"!\xff\x0bXMP DataXMP" + packet.encode() + GIF_TRAILER
        # Extensions came with this version; files without any have the older one's name.
        return b"GIF89a" + content[6:start] + extension + content[start:]

    def signed(self, content: bytes, media_type: str) -> bytes:
        """Return the file, with a C2PA manifest if there is a signer."""
        if self.signer is None or self.source is None:
            return content
        return self.signer.sign(content, media_type, self.source)


def user_comment(text: str) -> bytes:
    """Return an EXIF block with its version and the text, as UserComment in UTF-16."""
    comment = b"UNICODE\0" + text.encode("utf-16-be", "replace")
    # Big-endian; a directory of one entry that points to another one, with the comment behind it.
    # Each entry: tag, type, count, value or offset. Then the offset of a further directory: none.
    header = b"MM" + struct.pack(">HI", 42, 8)
    first = struct.pack(">HHHIII", 1, 0x8769, 4, 1, 26, 0)
    version = struct.pack(">HHI4s", 0x9000, 7, 4, b"0232")
    second = struct.pack(">HHIII", 0x9286, 7, len(comment), 56, 0)
    return header + first + struct.pack(">H", 2) + version + second + comment


def _after_gif_head(content: bytes) -> int:
    """Return where a GIF's palette and loop count end; readers look for the loop count there."""
    start = 13 + gif_palette_bytes(content[10])
    return start + 19 if content.startswith(GIF_LOOP, start) else start


def is_marked(png: bytes) -> bool:
    """Return whether a PNG of this server has the mark."""
    return b"iTXt" + XMP_KEYWORD.encode() + b"\0" in png


def unsigned(png: bytes) -> bytes:
    """Return a PNG without its C2PA manifest, the chunk caBX."""
    kept, start = [png[:8]], 8
    while start < len(png):
        end = start + 12 + int.from_bytes(png[start : start + 4])
        if png[start + 4 : start + 8] != b"caBX":
            kept.append(png[start:end])
        start = end
    return b"".join(kept)


def largest_difference(png: bytes, other: bytes) -> int:
    """Return the largest difference of two PNGs' values, 0…255; 255 if their sizes differ.

    Raises ValueError for a damaged file.
    """
    try:
        first, second = (
            np.asarray(PIL.Image.open(io.BytesIO(content), formats=("PNG",)).convert("RGBA"))
            for content in (png, other)
        )
    except (OSError, SyntaxError):
        raise ValueError("a damaged PNG cannot be compared") from None
    if first.shape != second.shape:
        return 255
    return int(np.abs(first.astype(np.int16) - second).max())


class Marker:
    """Chooses the marking of generated files, as the settings say."""

    def __init__(self, settings: Settings | None = None) -> None:
        """Load the certificate, if there is one.

        Raises:
            ValueError: the extra `provenance` is missing, a file of the certificate or the key
                cannot be read, or nothing can be signed with them.
        """
        self._mark = settings is None or settings.mark
        self._embed_parameters = settings is None or settings.embed_parameters
        self._signer: Signer | None = None
        if settings is not None and settings.c2pa_certificate:
            self._signer = Signer(
                Path(settings.c2pa_certificate), Path(settings.c2pa_key), settings.c2pa_algorithm
            )

    def of(self, operation: str) -> Marking:
        """Return the marking of an operation's results."""
        source = source_type(operation) if self._mark else None
        return Marking(source, self._embed_parameters, self._signer)

    def of_preview(self, operation: str) -> Marking:
        """Return the marking of an operation's previews, which are not signed."""
        return Marking(source_type(operation) if self._mark else None, self._embed_parameters)


MARKED = Marking()


# ── files ─────────────────────────────────────────────────────────────────────────────────────────


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
            _save_png(image, file, png_text(parameters, text, marking))
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

    A GIF has a frame for every image; WebP shows equal ones as one frame.

    Images are taken one by one, for GIF each when it is encoded.
    """
    others = (_pillow(image) for image in images)
    first = next(others)
    file = io.BytesIO()
    options: dict[str, Any] = {
        "save_all": True,
        "append_images": others,
        "duration": FRAME_MS,
        "loop": 0,
    }
    if format == "gif":
        first.save(file, "GIF", **options)
        content = marking.in_gif(_with_equal_frames(file.getvalue()), parameters)
    else:
        options |= marking.webp_options(parameters)
        first.save(file, "WEBP", quality=quality, method=2, **options)
        content = file.getvalue()
    return marking.signed(content, f"image/{format}")


def _with_equal_frames(gif: bytes) -> bytes:
    """Return a GIF of Pillow's, which shows equal frames as one, with as many frames as were sent.

    Programs that take an animation apart count its frames.
    """
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


def png_text(
    parameters: dict[str, Any], text: str | None = None, marking: Marking = MARKED
) -> PngInfo:
    """Return the text chunks of a generated PNG: `parameters`, and the mark.

    text: in place of the parameters' JSON.
    """
    chunks = PngInfo()
    if (recorded := marking.text(parameters)) is not None:
        chunks.add_text("parameters", recorded if text is None else text)
    if (packet := marking.xmp()) is not None:
        chunks.add_itxt(XMP_KEYWORD, packet)
    return chunks


def read_parameters(png: bytes) -> dict[str, Any]:
    """Return the parameters in a PNG's text chunk. Raises ValueError if there are none."""
    try:
        with PIL.Image.open(io.BytesIO(png), formats=("PNG",)) as image:
            parameters = json.loads(image.info["parameters"])
    except (
        KeyError,
        ValueError,
        TypeError,
        AttributeError,
        OSError,
        RecursionError,
        SyntaxError,
        PIL.Image.DecompressionBombError,
    ):
        raise ValueError("not a PNG with parameters in it") from None
    if not isinstance(parameters, dict):
        raise ValueError("not a PNG with parameters in it")
    return parameters


# ── threads ───────────────────────────────────────────────────────────────────────────────────────


def submit(pool: ThreadPoolExecutor, work: Callable[[], Result]) -> asyncio.Future[Result]:
    """Run `work` in a thread of the pool. Raises Draining after the pool's shutdown."""
    try:
        return asyncio.get_running_loop().run_in_executor(pool, work)
    except RuntimeError:
        raise Draining("the server is stopping") from None


class ImageEncoder:
    """Threads that make files of generated images, in order of arrival.

    A job's images leave the engine's queue when they are generated. If files take longer than
    generation, their images would fill the memory without this bound.
    """

    def __init__(self, queue_images: int = 256, threads: int | None = None) -> None:
        """Create the threads.

        Args:
            queue_images: images without a file, above which requests are rejected.
            threads: files made at once; default: one per CPU, at least two, because an animation
                takes a hundred times as long as an image.
        """
        self._queue_images = queue_images
        self._pool = ThreadPoolExecutor(threads or max(2, os.cpu_count() or 1), "encode")
        self._pace = Pace(seconds=FIRST_IMAGE_S)  # of images
        self._retry_slots = RetrySlots()
        self.images_unfinished = 0

    def close(self) -> None:
        """Refuse further work; do not wait for running work."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def check_room(self, images: int) -> None:
        """Raise QueueFull if a request for so many images must not be generated now."""
        excess = self.images_unfinished + images - self._queue_images
        # A request larger than the queue is still answered, alone.
        if self.images_unfinished and excess > 0:
            pace = self._pace.seconds_per_unit
            now = time.monotonic()
            raise QueueFull(self._retry_slots.take(excess * pace, images * pace, now))

    async def run(
        self,
        work: Callable[[], Result],
        images: int = 1,
        elsewhere: Callable[[Callable[[], Result]], Coroutine[Any, Any, Result]] | None = None,
    ) -> Result:
        """Return the result of `work`, run in one of the threads.

        Cancelling the awaiting task cancels work that is not begun.

        Args:
            work: makes the file.
            images: images in it.
            elsewhere: runs the work in other threads, if it takes more memory than these may.

        Raises:
            Draining: the server is stopping.
        """
        future = asyncio.ensure_future(elsewhere(work)) if elsewhere else submit(self._pool, work)
        began = time.monotonic()
        self.images_unfinished += images

        def end(done: asyncio.Future[Result]) -> None:
            self.images_unfinished -= images
            if not (elsewhere or done.cancelled()):
                self._pace.record(images, began)

        future.add_done_callback(end)
        return await future
