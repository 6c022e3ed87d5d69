"""AVIF and HEIC files: the still image in ISO media boxes, and how large its decoder's images get.

Boxes: ISO 14496-12; items: ISO 23008-12. A decoder believes the coded images, not the header, so
their own headers are read here too. Nothing is decoded, and every walk is bounded.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from server.api.images import DamagedFileError, FileFormat, ImageFile, UnknownFormatError

# An iPhone's photo has about 60 items, of which 48 are tiles.
MAX_ITEMS = 4096
# OBUs and NAL units of all items together; a photo has one to four for each tile.
MAX_UNITS = 20_000
MAX_FRAMES = 8
MAX_HIDDEN_PIXELS = 20 * 2**20
CODECS: Mapping[bytes, FileFormat] = {b"av01": "AVIF", b"hvc1": "HEIF"}
BRANDS = {"AVIF": b"avif", "HEIF": b"heic"}
SEQUENCES = frozenset({b"avis", b"msf1", b"hevc", b"hevx"})
# Brands of files that should hold an image; others with the same first box are video.
IMAGE_BRANDS = frozenset(
    {b"avif", b"avis", b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}
)

# By the first brand, files without images that are no video.
OTHER_BRANDS = {b"crx ": "CR3, a camera's raw format", b"M4A ": "M4A audio", b"M4B ": "M4B audio"}


@dataclass(frozen=True, slots=True)
class _Box:
    """Where a box's contents are; its name precedes `name_end`."""

    name: bytes
    name_end: int
    start: int
    end: int


@dataclass(slots=True)
class _Reader:
    """Reads big-endian integers from `at` on."""

    content: bytes
    at: int
    end: int

    def uint(self, size: int) -> int:
        """Return the next integer of `size` bytes. Raises DamagedFileError beyond the end."""
        if self.at + size > self.end:
            raise DamagedFileError("a box ends too early")
        self.at += size
        return int.from_bytes(self.content[self.at - size : self.at])


@dataclass(frozen=True, slots=True)
class _Items:
    """The images of a file, their parts and metadata.

    Attributes:
        primary: the id of the image that is shown.
        types: by id, the type, and where it is written.
        extents: by id, (start, end) of each piece of the data.
        properties: by id.
        tiles: ids of the images that an image is derived from, by its id.
        sizes: all boxes `ispe`, whichever image they belong to.
    """

    content: bytes
    primary: int
    types: dict[int, _Box]
    extents: dict[int, list[tuple[int, int]]]
    properties: dict[int, list[_Box]]
    tiles: dict[int, list[int]]
    sizes: list[_Box]

    def kind(self, item: int) -> bytes:
        """Return an item's type. Raises DamagedFileError if there is no such item."""
        if item not in self.types:
            raise DamagedFileError("an image of it is missing")
        return self.types[item].name

    def data(self, item: int) -> bytes:
        """Return the pieces of an item's data in one."""
        return b"".join(self.content[start:end] for start, end in self.extents.get(item, ()))

    def property(self, item: int, name: bytes) -> _Box | None:
        """Return an item's first property of this name."""
        boxes = self.properties.get(item, ())
        return next((box for box in boxes if box.name == name), None)


def still_image(content: bytes) -> ImageFile:
    """Return the still image of a file that begins with a box `ftyp`, without any metadata.

    Raises:
        UnknownFormatError: the file is a video or the like, or its images are neither AV1 nor HEVC.
        DamagedFileError: it has no image, or one that decodes to more pixels than the header says.
        struct.error: it ends too early, as does IndexError.
    """
    top = list(_boxes(content, 0, len(content)))
    meta = next((box for box in top if box.name == b"meta"), None)
    if meta is None:
        brands = {content[8:12], *(content[at : at + 4] for at in range(16, top[0].end, 4))}
        if brands & IMAGE_BRANDS:
            raise DamagedFileError("it holds no still image")
        raise UnknownFormatError(OTHER_BRANDS.get(content[8:12], "video"))
    items = _items(content, meta)
    codecs = {items.kind(item) for item in _coded(items, items.primary)}
    if len(codecs) != 1 or not codecs <= set(CODECS):
        raise UnknownFormatError("HEIF with images other than AV1 and HEVC")
    format = CODECS[codecs.pop()]
    width, height = _size(items, items.primary)
    _check_coded_sizes(items, _most_coded_pixels(width * height))
    others = [box for box in top if box.name in (b"moov", b"meta") and box is not meta]
    content, colour = _still(items, others, format), _colour(items)
    compact = format == "HEIF" and _is_compact(items)
    return ImageFile(format, width, height, content, colour, compact=compact)


def _most_coded_pixels(stated: int) -> int:
    """Return how many pixels the coded images may have in a file that states so many.

    Sides are coded in blocks, and some headers bound them only by powers of two.
    """
    return min(4 * stated, stated + MAX_HIDDEN_PIXELS) + 2**20


def _boxes(content: bytes, start: int, end: int) -> Iterator[_Box]:
    """Yield the boxes in a part of a file, up to the first that is cut off."""
    for _ in range(MAX_ITEMS):
        size, name = int.from_bytes(content[start : start + 4]), content[start + 4 : start + 8]
        head = 16 if size == 1 else 8
        if size == 1:
            size = int.from_bytes(content[start + 8 : start + 16])
        elif size == 0:
            size = end - start
        if size < head or start + size > end:
            return
        yield _Box(name, start + 8, start + head, start + size)
        start += size
    raise DamagedFileError(f"it has more than {MAX_ITEMS} boxes")


def _children(content: bytes, box: _Box, skip: int = 0) -> dict[bytes, _Box]:
    """Return the boxes in a box by name. Raises DamagedFileError if there are two of a name.

    skip: bytes before the first.
    """
    found: dict[bytes, _Box] = {}
    for child in _boxes(content, box.start + skip, box.end):
        if found.setdefault(child.name, child) is not child and child.name not in (
            b"free",
            b"uuid",
            b"ipma",
        ):
            raise DamagedFileError("it has two boxes of a kind")
    return found


def _items(content: bytes, meta: _Box) -> _Items:
    boxes = _children(content, meta, 4)
    try:
        inner = _children(content, boxes[b"iprp"])
        primary = _versioned(content, boxes[b"pitm"])
        properties = list(_boxes(content, inner[b"ipco"].start, inner[b"ipco"].end))
        return _Items(
            content,
            primary[0].uint(4 if primary[1] else 2),
            _types(content, boxes[b"iinf"]),
            _extents(content, boxes[b"iloc"], boxes.get(b"idat")),
            _properties(content, boxes[b"iprp"], properties),
            _tiles(content, boxes.get(b"iref")),
            [box for box in properties if box.name == b"ispe"],
        )
    except KeyError:
        raise DamagedFileError("it holds no still image") from None


def _versioned(content: bytes, box: _Box) -> tuple[_Reader, int]:
    """Return a reader behind a box's version and flags, and the version."""
    return _Reader(content, box.start + 4, box.end), content[box.start]


def _types(content: bytes, box: _Box) -> dict[int, _Box]:
    reader, version = _versioned(content, box)
    reader.uint(4 if version else 2)
    types: dict[int, _Box] = {}
    for entry in _boxes(content, reader.at, box.end):
        entry_reader, entry_version = _versioned(content, entry)
        if entry_version < 2:
            raise DamagedFileError("its items have no types")
        item = entry_reader.uint(4 if entry_version > 2 else 2)
        at = entry_reader.at + 2
        if item in types:
            raise DamagedFileError("it has two items of a number")
        types[item] = _Box(content[at : at + 4], at + 4, entry.start, entry.end)
    return types


def _extents(content: bytes, box: _Box, data: _Box | None) -> dict[int, list[tuple[int, int]]]:
    """Return where the items' data are: in the file, or in the box `idat`."""
    reader, version = _versioned(content, box)
    sizes = reader.uint(2)
    offset_size = sizes >> 12
    length_size = sizes >> 8 & 15
    base_size = sizes >> 4 & 15
    index_size = sizes & 15 if version else 0
    extents: dict[int, list[tuple[int, int]]] = {}
    total = 0
    for _ in range(_count(reader, 4 if version > 1 else 2)):
        item = reader.uint(4 if version > 1 else 2)
        method = reader.uint(2) & 15 if version else 0
        reader.uint(2)
        origin = reader.uint(base_size)
        if method == 1 and data is not None:
            origin += data.start
        elif method:
            raise DamagedFileError("its data are not in the file")
        if item in extents:
            raise DamagedFileError("it has two items of a number")
        extents[item] = []
        for _ in range(_count(reader, 2)):
            reader.uint(index_size)
            start = origin + reader.uint(offset_size)
            end = start + reader.uint(length_size)
            total += end - start
            if end > len(content) or total > 2 * len(content):
                raise DamagedFileError("it is cut off")
            extents[item].append((start, end))
    return extents


def _count(reader: _Reader, size: int) -> int:
    count = reader.uint(size)
    if count > MAX_ITEMS:
        raise DamagedFileError(f"it has more than {MAX_ITEMS} items")
    return count


def _properties(content: bytes, box: _Box, properties: list[_Box]) -> dict[int, list[_Box]]:
    by_item: dict[int, list[_Box]] = {}
    for entry in _boxes(content, box.start, box.end):
        if entry.name != b"ipma":
            continue
        reader, version = _versioned(content, entry)
        size = 2 if content[entry.start + 3] & 1 else 1
        for _ in range(_count(reader, 4)):
            boxes = by_item.setdefault(reader.uint(4 if version else 2), [])
            for _ in range(reader.uint(1)):
                index = reader.uint(size) & (0x7FFF if size == 2 else 0x7F)
                boxes.extend(properties[index - 1 : index])  # from 1; 0 means none
    return by_item


def _tiles(content: bytes, box: _Box | None) -> dict[int, list[int]]:
    if box is None:
        return {}
    size = 4 if content[box.start] else 2
    tiles: dict[int, list[int]] = {}
    for entry in _boxes(content, box.start + 4, box.end):
        reader = _Reader(content, entry.start, entry.end)
        if entry.name == b"dimg":
            into = tiles.setdefault(reader.uint(size), [])
            into.extend(reader.uint(size) for _ in range(_count(reader, 2)))
    return tiles


def _coded(items: _Items, item: int) -> list[int]:
    """Return the item, or the tiles it consists of."""
    return items.tiles.get(item, []) if items.kind(item) == b"grid" else [item]


def _size(items: _Items, item: int) -> tuple[int, int]:
    box = items.property(item, b"ispe")
    if box is None:
        raise DamagedFileError("it has no size")
    return struct.unpack_from(">II", items.content, box.start + 4)


def _check_coded_sizes(items: _Items, most: int) -> None:
    """Check that no image in the file, hidden ones included, is decoded to more than `most` pixels.

    A decoder believes the coded image, not the header.

    Raises:
        DamagedFileError: a larger one, or more parts than a photo has.
    """
    units = iter(range(MAX_UNITS))
    pixels = {item: _coded_pixels(items, item, units) for item in items.types}
    grids = [item for item, kind in items.types.items() if kind.name == b"grid"]

    def tiles_of(grid: int) -> int:
        return sum(pixels.get(tile, 0) for tile in _coded(items, grid))

    tiled = map(tiles_of, grids)
    stated = [struct.unpack_from(">II", items.content, box.start + 4) for box in items.sizes]
    stated += [_grid_size(items.data(grid)) for grid in grids]
    largest = max(*pixels.values(), *tiled, *(width * height for width, height in stated))
    if largest > most:
        raise DamagedFileError("its coded images are larger than its header says")


def _coded_pixels(items: _Items, item: int, units: Iterator[int]) -> int:
    match items.types[item].name:
        case b"av01":
            return _av1_pixels(items.data(item), units)
        case b"hvc1":
            return _hevc_pixels(items, item, units)
    return 0


def _grid_size(data: bytes) -> tuple[int, int]:
    """Return (width, height) of an image of tiles, from its item's data."""
    reader = _Reader(data, 0, len(data))
    size = 4 if reader.uint(2) & 1 else 2
    reader.uint(2)
    return reader.uint(size), reader.uint(size)


def _colour(items: _Items) -> dict[str, bytes]:
    """Return the colour descriptions of the image that is shown."""
    colour: dict[str, bytes] = {}
    for box in items.properties.get(items.primary, ()):
        if box.name == b"colr":
            kind = items.content[box.start : box.start + 4]
            name = "nclx" if kind == b"nclx" else "icc"
            if kind in (b"nclx", b"prof", b"rICC"):
                colour.setdefault(name, items.content[box.start + 4 : box.end])
    return colour


def _still(items: _Items, others: list[_Box], format: FileFormat) -> bytes:
    """Return the file with metadata, unknown images and `others` renamed, so that none is read."""
    still = bytearray(items.content)
    still[8:12] = BRANDS[format]
    for at in range(16, int.from_bytes(still[:4]), 4):
        if bytes(still[at : at + 4]) in SEQUENCES:  # a brand without its tracks counts as cut off
            still[at : at + 4] = b"mif1"
    hidden = list(others)
    hidden += [kind for kind in items.types.values() if kind.name not in (*CODECS, b"grid")]
    for box in hidden:
        still[box.name_end - 4 : box.name_end] = b"free"
    return bytes(still)


class _Bits:
    """Reads bits from the first."""

    def __init__(self, data: bytes) -> None:
        self._value, self._left = int.from_bytes(data), 8 * len(data)

    def read(self, count: int) -> int:
        """Return the next bits as an integer. Raises DamagedFileError beyond the end."""
        self._left -= count
        if self._left < 0:
            raise DamagedFileError("a coded image ends within its header")
        return self._value >> self._left & (1 << count) - 1

    def golomb(self) -> int:
        """Return the next unsigned Exp-Golomb code."""
        zeros = 0
        while not self.read(1):
            zeros += 1
        return (1 << zeros) - 1 + self.read(zeros)


def _next_unit(units: Iterator[int]) -> None:
    if next(units, None) is None:
        raise DamagedFileError(f"it has more than {MAX_UNITS} coded parts")


def _av1_pixels(data: bytes, units: Iterator[int]) -> int:
    """Return the most pixels that a frame of an AV1 item can have."""
    start = frames = largest = 0
    while start < len(data):
        _next_unit(units)
        head = data[start]
        start += 2 if head & 4 else 1
        size = len(data) - start
        if head & 2:
            size = shift = 0
            while shift < 56:
                part = data[start]
                size |= (part & 127) << shift
                start, shift = start + 1, shift + 7
                if part < 128:
                    break
        kind = head >> 3 & 15
        if kind == 1:
            largest = max(largest, _av1_sequence(_Bits(data[start : start + min(size, 1000)])))
        frames += kind in (3, 6)
        start += size
    if frames > MAX_FRAMES:
        raise DamagedFileError("an image of it has more than one frame")
    return largest


def _av1_sequence(bits: _Bits) -> int:
    """Return the most pixels of a frame, from a sequence header (AV1, 5.5.1)."""
    bits.read(4)
    reduced = bits.read(1)
    if reduced:
        bits.read(5)
    else:
        _skip_av1_operating_points(bits)
    width_bits, height_bits = bits.read(4) + 1, bits.read(4) + 1
    width, height = bits.read(width_bits) + 1, bits.read(height_bits) + 1
    # A frame of a longer sequence may have any size that these bits can say.
    return width * height if reduced else 1 << width_bits + height_bits


def _skip_av1_operating_points(bits: _Bits) -> None:
    delay_bits = 0
    if bits.read(1):  # timing
        bits.read(64)
        if bits.read(1):
            bits.golomb()
        if bits.read(1):  # decoder model
            delay_bits = bits.read(5) + 1
            bits.read(42)
    display_delay = bits.read(1)
    for _ in range(bits.read(5) + 1):
        bits.read(12)
        if bits.read(5) > 7:
            bits.read(1)
        if delay_bits and bits.read(1):
            bits.read(2 * delay_bits + 1)
        if display_delay and bits.read(1):
            bits.read(4)


def _is_compact(items: _Items) -> bool:
    """Return whether every HEVC image has 8 bits, and colours of half the resolution or none."""
    return all(
        _hevc_sequence(unit)[1]
        for item, kind in items.types.items()
        if kind.name == b"hvc1"
        for unit in _hevc_units(items, item)
    )


def _hevc_pixels(items: _Items, item: int, units: Iterator[int]) -> int:
    """Return the most pixels that a frame of an HEVC item can have."""
    largest = frames = 0
    for unit in _hevc_units(items, item):
        _next_unit(units)
        largest = max(largest, _hevc_sequence(unit)[0])
        # The first slice of a picture begins with a bit that is set.
        frames += len(unit) > 2 and unit[0] < 64 and unit[2] > 127
    if frames > MAX_FRAMES:
        raise DamagedFileError("an image of it has more than one frame")
    return largest


def _hevc_units(items: _Items, item: int) -> Iterator[bytes]:
    """Yield the beginning of each NAL unit of an HEVC item, those among its parameters first."""
    box = items.property(item, b"hvcC")
    if box is None:
        raise DamagedFileError("a coded image has no parameters")
    reader = _Reader(items.content, box.start + 21, box.end)
    length_size = (reader.uint(1) & 3) + 1
    for _ in range(reader.uint(1)):
        reader.uint(1)
        for _ in range(reader.uint(2)):
            yield _next_hevc_unit(reader, 2)
    data = items.data(item)
    reader = _Reader(data, 0, len(data))
    while reader.at < len(data):
        yield _next_hevc_unit(reader, length_size)


def _next_hevc_unit(reader: _Reader, length_size: int) -> bytes:
    size = reader.uint(length_size)
    unit = reader.content[reader.at : reader.at + min(size, 1000)]
    reader.at += size
    return unit


def _hevc_sequence(unit: bytes) -> tuple[int, bool]:
    """Return a frame's pixels and whether it is compact, by a sequence parameter set.

    (HEVC, 7.3.2.2.) (0, True) for any other NAL unit.
    """
    if len(unit) < 2 or unit[0] >> 1 & 63 != 33 or (unit[0] & 1, unit[1] >> 3) != (0, 0):
        return 0, True  # another unit, or that of a second view, which no decoder here reads
    bits = _Bits(unit[2:1000].replace(b"\0\0\3", b"\0\0"))
    bits.read(4)
    layers = bits.read(3)
    bits.read(1 + 96)
    present = [(bits.read(1), bits.read(1)) for _ in range(layers)]
    bits.read(2 * (8 - layers) if layers else 0)
    for profile, level in present:
        bits.read(88 * profile + 8 * level)
    bits.golomb()
    chroma = bits.golomb()
    if chroma == 3:
        bits.read(1)
    pixels = bits.golomb() * bits.golomb()
    for _ in range(4 * bits.read(1)):  # what is cropped
        bits.golomb()
    further_bits = bits.golomb(), bits.golomb()
    return pixels, chroma <= 1 and further_bits == (0, 0)
