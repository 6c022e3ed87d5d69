"""Every file of tests/data/hostile meets the outcome its manifest tells."""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import PIL.Image
import pytest
from PIL.PngImagePlugin import PngInfo

from server.api import create_app
from server.api.errors import ApiError
from server.api.images import UnknownFormatError
from server.api.images.decode import ImageLimits, decode
from server.api.images.decoded_image import repaint_mask
from server.api.images.sniff import DamagedFileError, coefficient_bytes, sniff
from server.engine.job import Job
from server.settings import Settings
from tests import fake_worker, hostile
from tests.conftest import serving, wait_until
from tests.shown_files import PROFILES

FOLDER = Path(__file__).parent / "data" / "hostile"
MAX_SIDE = Settings.model_fields["max_side"].default
EXIF_DIRECTORY, EXIF_VERSION, USER_COMMENT = 0x8769, 0x9000, 0x9286
IMAGE_DESCRIPTION, GPS_DIRECTORY = 0x010E, 0x8825
MANIFEST: dict[str, dict[str, Any]] = json.loads((FOLDER / "manifest.json").read_text())


@pytest.fixture(scope="module")
def inpaint(fake_settings: Callable[..., Settings]) -> Iterator[tuple[httpx.Client, list[Job]]]:
    """A client of a server of its own, and every job that its engine was given."""
    app, jobs = create_app(fake_settings(), worker=fake_worker.main), list[Job]()
    run = app.state.paellera.engine.run
    app.state.paellera.engine.run = lambda job, *rest, **more: (
        jobs.append(job) or run(job, *rest, **more)
    )
    with serving(app) as address, httpx.Client(base_url=address, timeout=20) as client:
        wait_until(lambda: client.get("/readyz").status_code == 200)
        yield client, jobs


def test_the_manifest_lists_every_file_and_they_are_small() -> None:
    files = {
        path.name: path.stat().st_size for path in FOLDER.iterdir() if path.name != "manifest.json"
    }
    assert set(files) == set(MANIFEST)
    assert len(files) >= 60
    assert sum(files.values()) < 300_000


def test_the_files_are_what_the_script_makes(tmp_path: Path) -> None:
    hostile.write(tmp_path)
    assert json.loads((tmp_path / "manifest.json").read_text()) == MANIFEST
    exact = [name for name, entry in MANIFEST.items() if entry["exact"]]
    assert len(exact) >= 60
    assert not [
        name for name in exact if (tmp_path / name).read_bytes() != (FOLDER / name).read_bytes()
    ]


@pytest.mark.parametrize("name", MANIFEST)
def test_every_file_has_its_expected_outcome(name: str) -> None:
    entry, content = MANIFEST[name], (FOLDER / name).read_bytes()
    if entry["status"] == 200:
        picture = decode(content, ImageLimits())
        assert picture.size == tuple(entry["size"])
        assert picture.has_alpha == entry["alpha"]
        assert (
            "repainted" not in entry
            or (repaint_mask(picture, entry.get("mode"), hostile.SIZE) > 0).sum()
            == entry["repainted"]
        )
        return
    with pytest.raises(ApiError) as refused:
        repaint_mask(decode(content, ImageLimits()), entry.get("mode"), hostile.SIZE)
    assert (refused.value.status, refused.value.code) == (entry["status"], entry["code"])


def test_scans_are_bounded_though_a_decoder_would_read_more() -> None:
    many = (FOLDER / "many_scans.jpg").read_bytes()
    with PIL.Image.open(io.BytesIO(many)) as image:
        image.load()
    with pytest.raises(DamagedFileError, match="100 scans"):
        sniff(many)
    assert decode(hostile.with_scans(100), ImageLimits()).size == hostile.SIZE


def headers_of(jpeg: bytes) -> int:
    """The number of segments before the pixels."""
    at, count = 2, 0
    while jpeg[at + 1] != 0xDA:
        at, count = at + 2 + int.from_bytes(jpeg[at + 2 : at + 4]), count + 1
    return count


def with_parts(place: str, count: int) -> bytes:
    """An image of so many chunks or segments: in a PNG, or in a JPEG before or behind its scan."""
    if place == "png":
        return hostile.plain_png(hostile.chunk(b"tEXt") * (count - 3))  # beside IHDR, IDAT, IEND
    jpeg, comment = hostile.encoded("JPEG"), hostile.segment(0xFE, b"")
    if place == "before":
        return jpeg[:2] + comment * (count - headers_of(jpeg) - 1) + jpeg[2:]
    return jpeg[:-2] + comment * (count - 2) + jpeg[-2:]


@pytest.mark.parametrize(
    ("place", "most", "parts"),
    [
        ("png", 20_000, "20000 chunks"),
        ("before", 2000, "2000 segments"),
        ("behind", 2000, "2000 segments"),
    ],
)
def test_parts_are_counted_to_a_bound(place: str, most: int, parts: str) -> None:
    assert decode(with_parts(place, most), ImageLimits()).size == hostile.SIZE
    with pytest.raises(DamagedFileError, match=parts):
        sniff(with_parts(place, most + 1))


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (b"%PDF-1.7", "PDF"),
        (b"PK\x03\x04", "ZIP"),
        (b"BM", "BMP"),
        (b"II*\0", "TIFF"),
        (b"MM\0*", "TIFF"),
        (b"8BPS", "PSD"),
        (b"\0\0\x01\0", "ICO"),
        (b"\0\0\0\x0cjP  \r\n", "JPEG 2000"),
        (b"\xff\x0a", "JPEG XL"),
        (b"\x1f\x8b", "gzip"),
        (b"\xef\xbb\xbf \t\r\n<P>", "HTML or XML"),
        # An image begins within the first 1000 bytes.
        (b" " * 996 + b"<SVG", "SVG"),
        (b" " * 997 + b"<SVG", "HTML or XML"),
        # Either of WebP's two names alone is none.
        (b"RIFF\x24\0\0\0WAVEfmt ", "none of these"),
        (b"RIFX\x24\0\0\0WEBPVP8 ", "none of these"),
    ],
)
def test_a_file_of_another_format_is_refused_by_its_name(content: bytes, name: str) -> None:
    with pytest.raises(UnknownFormatError, match=f"^{name}$"):
        sniff(content)


def jpeg_segments(frame: int, scan: bytes, factors: bytes = b"\x22\x11\x11") -> bytes:
    """A JPEG of 400x320 pixels without their data. frame: the marker of its header.

    scan: components of the first scan, from 1 on. factors: of each component's sampling.
    """
    components = b"".join(bytes([i, each, 0]) for i, each in enumerate(factors, 1))
    header = b"\x08" + struct.pack(">HHB", 320, 400, len(factors)) + components
    first = bytes([len(scan)]) + b"".join(bytes([i, 0]) for i in scan) + b"\0\x3f\0"
    segments = hostile.segment(frame, header) + hostile.segment(0xDA, first)
    return b"\xff\xd8" + segments + b"\xff\xd9"


def test_a_jpeg_that_ends_before_its_pixels_is_damaged_whatever_follows() -> None:
    jpeg = jpeg_segments(0xC0, b"\1\2\3")
    pixels = jpeg.index(b"\xff\xda")
    for behind in (b"", jpeg[pixels:]):
        with pytest.raises(DamagedFileError, match="ends before its pixels"):
            sniff(jpeg[:pixels] + b"\xff\xd9" + behind)


# Bytes are searched in blocks of 65536, and a marker is two of them.
@pytest.mark.parametrize("skipped", [0, 65_534, 65_535, 65_536, 65_537])
def test_a_marker_is_found_behind_any_number_of_bytes(skipped: int) -> None:
    jpeg, comment = jpeg_segments(0xC0, b"\1\2\3"), hostile.segment(0xFE, b"")
    assert sniff(jpeg[:2] + comment + bytes(skipped) + jpeg[2:]).content == jpeg
    long = jpeg[:-2] + bytes(skipped) + jpeg[-2:]
    assert (sniff(long).content, sniff(long).ended) == (long, True)


@pytest.mark.parametrize("frame", range(0xC0, 0xD0))
def test_a_decoder_holds_the_coefficients_of_progressive_files_and_of_separate_scans(
    frame: int,
) -> None:
    together, apart = jpeg_segments(frame, b"\1\2\3"), jpeg_segments(frame, b"\1")
    if frame in (0xC4, 0xC8, 0xCC):  # tables, and a reserved marker
        with pytest.raises(DamagedFileError, match="no frame header"):
            sniff(together)
        return
    held, is_progressive = 3 * 400 * 320, frame in (0xC2, 0xC6, 0xCA, 0xCE)
    assert coefficient_bytes(sniff(apart)) == held
    assert coefficient_bytes(sniff(together)) == (held if is_progressive else 0)


@pytest.mark.parametrize(
    ("factors", "bytes_per_pixel"),
    [
        (b"\x11", 2),
        (b"\x22", 2),
        (b"\x11\x11\x11", 6),
        (b"\x22\x11\x11", 3),
        (b"\x41\x11\x11", 3),
        (b"\x14\x11\x11", 3),
        # The densest component of either direction counts.
        (b"\x21\x12\x11", 2.5),
        (b"\x22\x22\x11\x22", 6.5),
        (b"\0", 0),
    ],
)
def test_coefficients_are_two_bytes_each_and_as_many_as_components_are_sampled(
    factors: bytes, bytes_per_pixel: float
) -> None:
    file = sniff(jpeg_segments(0xC2, b"\1", factors))
    assert coefficient_bytes(file) == bytes_per_pixel * 400 * 320


@pytest.mark.parametrize("name", MANIFEST)
def test_inpaint_answers_what_it_can_and_refuses_the_rest_before_the_engine(
    inpaint: tuple[httpx.Client, list[Job]], name: str
) -> None:
    client, jobs = inpaint
    entry, content, plain = (
        MANIFEST[name],
        (FOLDER / name).read_bytes(),
        (FOLDER / "plain.png").read_bytes(),
    )
    is_mask = entry["role"] == "mask"
    fields = {"prompt": "a ball", "num_inference_steps": "1"} | (
        {"mask_mode": entry["mode"]} if "mode" in entry else {}
    )
    size = (24, 16) if is_mask else tuple(entry.get("size") or (24, 16))
    files = {entry["role"]: ("../../etc/" + name, content)}
    files |= {"image": ("image.png", plain)} if is_mask else {"mask": ("mask.png", white(size))}
    jobs.clear()
    answer = client.post("/inpaint", data=fields, files=files)
    if entry["status"] == 200:
        assert answer.status_code == 200, answer.text
        fitting = min(1, MAX_SIDE / max(size))
        with PIL.Image.open(io.BytesIO(answer.content)) as result:
            assert result.size == tuple(max(1, round(side * fitting)) for side in size)
        assert len(jobs) == 1
        return
    refused(answer, entry["status"], entry["code"], entry["role"])
    assert not jobs, "the engine was not asked"


@pytest.mark.parametrize("format", ["png", "jpeg", "webp"])
@pytest.mark.parametrize("sent", ["PNG", "JPEG", "WEBP", "AVIF"])
def test_where_a_photo_was_taken_reaches_no_result(
    inpaint: tuple[httpx.Client, list[Job]], sent: str, format: str
) -> None:
    client, _ = inpaint
    exif, secret = PIL.Image.Exif(), "Zeughausgasse 17"
    exif[IMAGE_DESCRIPTION] = secret
    exif.get_ifd(GPS_DIRECTORY).update({1: "N", 2: (46.0, 57.0, 3.0), 29: secret})
    options: dict[str, Any] = {"exif": exif, "xmp": f"<x>{secret}</x>".encode()}
    if sent == "PNG":
        options["pnginfo"] = PngInfo()
        options["pnginfo"].add_text("Comment", secret)
    if sent == "JPEG":
        options["comment"] = secret
    if sent != "AVIF":
        options["icc_profile"] = PROFILES["p3"] + secret.encode()
    photo = hostile.encoded(sent, **options)
    assert secret.encode() in photo
    answer = client.post(
        "/inpaint",
        data={"prompt": "a ball", "num_inference_steps": "1", "response_format": format},
        files={"image": ("photo", photo), "mask": ("mask", white(hostile.SIZE))},
    )
    assert answer.status_code == 200, answer.text
    assert secret not in str(answer.headers)
    for encoding in ("utf-8", "utf-16-be", "utf-16-le"):
        assert secret.encode(encoding) not in answer.content
    with PIL.Image.open(io.BytesIO(answer.content)) as image:
        assert image.format == format.upper()
        assert "icc_profile" not in image.info
        assert secret not in str(image.info)
        # The server's own: a directory with the request's parameters.
        assert set(image.getexif()) <= {EXIF_DIRECTORY}
        assert set(image.getexif().get_ifd(EXIF_DIRECTORY)) <= {EXIF_VERSION, USER_COMMENT}
        assert not image.getexif().get_ifd(GPS_DIRECTORY)


def white(size: tuple[int, ...]) -> bytes:
    file = io.BytesIO()
    PIL.Image.new("L", (size[0], size[1]), 255).save(file, "PNG")
    return file.getvalue()


def refused(answer: httpx.Response, status: int, code: str, param: str) -> None:
    """In the one shape, and without secrets."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["code"], error["param"], error["type"]) == (code, param, "invalid_request_error")
    assert error["message"].startswith(f"{param}: ")
    for secret in ("Traceback", "/", " at 0x", "PIL", "Error"):
        assert secret not in error["message"]
