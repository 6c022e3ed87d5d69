"""Marks that generated files carry: XMP, parameters in text or EXIF, C2PA signatures.

No mark has a date or anything else that differs from one time to the next, so the same request
gives the same bytes, unless they are signed. Reasons and limits: docs/marking.md.
"""

from __future__ import annotations

import io
import json
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from xml.sax.saxutils import escape

import PIL.Image
from PIL.PngImagePlugin import PngInfo

from server.api.images.signing import SOURCE_TYPES, Signer
from server.api.images.sniff import gif_palette_bytes

if TYPE_CHECKING:
    from server.settings import Settings

SourceType = Literal["trainedAlgorithmicMedia", "compositeWithTrainedAlgorithmicMedia"]
# Operations whose results contain, or are redrawn from, an image that the client sent.
COMPOSITES = frozenset({"inpaint", "outpaint", "edit", "upscale"})

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
        return replace(self.of(operation), signer=None)


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

    def png_chunks(self, parameters: dict[str, Any], text: str | None = None) -> PngInfo:
        """Return a PNG's text chunks. text: takes the place of the parameters' JSON."""
        chunks = PngInfo()
        if (recorded := self.text(parameters)) is not None:
            chunks.add_text("parameters", recorded if text is None else text)
        if (packet := self.xmp()) is not None:
            chunks.add_itxt(XMP_KEYWORD, packet)
        return chunks

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


MARKED = Marking()


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
