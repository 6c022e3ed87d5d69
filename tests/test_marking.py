"""Every generated file says in XMP that it is generated, holds its parameters, and is the same to
the byte each time, unless it is signed.
"""

from __future__ import annotations

import base64
import datetime
import io
import json
import re
import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import PIL.Image
import pytest

from server.api import create_app
from server.api.images.decode import ImageLimits, decode
from server.api.images.encode import Format, animate, encode
from server.api.images.marking import (
    COMPOSITES,
    MAX_JPEG_SEGMENT,
    Marker,
    Marking,
    is_marked,
    read_parameters,
    source_type,
    unsigned,
    user_comment,
)
from server.api.images.signing import SOURCE_TYPES
from server.api.planning.operations import OPERATIONS
from server.engine.messages import Image
from server.settings import Settings
from tests import fake_worker
from tests.conftest import serving, wait_until
from tests.test_image_operations import as_json, fields_of

Configure = Callable[..., Settings]

WIDTH, HEIGHT = 32, 16
PICTURE = Image(0, WIDTH, HEIGHT, bytes(range(256)) * (WIDTH * HEIGHT * 3 // 256))
PARAMETERS: dict[str, Any] = {"operation": "generate", "prompt": "a <red> ball & 赤", "seed": 7}
TRAINED = SOURCE_TYPES + "trainedAlgorithmicMedia"
COMPOSITE = SOURCE_TYPES + "compositeWithTrainedAlgorithmicMedia"
UNMARKED = Marking(source=None, embed_parameters=False)


def made(format: str, marking: Marking | None = None, **parameters: Any) -> bytes:
    """A file of this format: png, jpeg, webp, or an animation, gif and webp-animation."""
    marking = marking or Marking()
    recorded = PARAMETERS | parameters
    match format:
        case "gif":
            return animate([PICTURE, turned(), PICTURE], "gif", 90, recorded, marking=marking)
        case "webp-animation":
            return animate([PICTURE, turned(), PICTURE], "webp", 90, recorded, marking=marking)
    return encode(PICTURE, format, 90, recorded, marking=marking)  # type: ignore[arg-type]


def turned() -> Image:
    return Image(1, WIDTH, HEIGHT, PICTURE.pixels[::-1])


FORMATS = ("png", "jpeg", "webp", "gif", "webp-animation")


def packet(content: bytes) -> str:
    """The XMP packet of a file; GIF and PNG hold it as plain text, as all others do."""
    found = re.search(rb"<x:xmpmeta.*</x:xmpmeta>", content, re.DOTALL)
    return found[0].decode() if found else ""


def source(content: bytes) -> str:
    found = re.search(r"<Iptc4xmpExt:DigitalSourceType>(.*)</", packet(content))
    return found[1] if found else ""


# ── marks ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_says_where_its_picture_comes_from(format: str) -> None:
    assert source(made(format)) == TRAINED
    assert source(made(format, Marking("compositeWithTrainedAlgorithmicMedia"))) == COMPOSITE


@pytest.mark.parametrize("format", FORMATS)
def test_a_file_is_the_same_each_time_and_has_no_date(format: str) -> None:
    content = made(format)
    assert made(format) == content
    assert not re.search(r"20\d\d[-:]\d\d[-:]\d\dT|Date", packet(content))


@pytest.mark.parametrize("format", FORMATS)
def test_a_mark_changes_no_pixel(format: str) -> None:
    marked, bare = (PIL.Image.open(io.BytesIO(made(format, m))) for m in (Marking(), UNMARKED))
    for frame in range(getattr(bare, "n_frames", 1)):
        marked.seek(frame)
        bare.seek(frame)
        assert marked.convert("RGB").tobytes() == bare.convert("RGB").tobytes()
    assert marked.info.get("loop") == bare.info.get("loop")
    assert getattr(marked, "n_frames", 1) == getattr(bare, "n_frames", 1)


@pytest.mark.parametrize("format", FORMATS)
def test_without_mark_and_parameters_nothing_is_said(format: str) -> None:
    content = made(format, UNMARKED)
    assert packet(content) == ""
    assert b"red" not in content
    assert b"Exif" not in content
    assert not PIL.Image.open(io.BytesIO(content)).getexif()


@pytest.mark.parametrize("format", FORMATS)
def test_a_marked_file_can_be_uploaded(format: str) -> None:
    assert decode(made(format), ImageLimits()).size == (WIDTH, HEIGHT)


@pytest.mark.parametrize("format", ["png", "jpeg", "webp"])
def test_pillow_finds_the_packet(format: str) -> None:
    info = PIL.Image.open(io.BytesIO(made(format))).info
    found = info.get("xmp") or info["XML:com.adobe.xmp"].encode()
    assert TRAINED.encode() in found


def test_results_that_contain_a_sent_image_are_composites() -> None:
    kinds = {operation: source_type(operation) for operation in OPERATIONS}
    assert {operation for operation, kind in kinds.items() if kind.startswith("composite")} == (
        COMPOSITES & set(OPERATIONS)
    )
    assert {"inpaint", "outpaint", "edit"} <= COMPOSITES
    assert not {"generate", "variations", "interpolate"} & COMPOSITES


@pytest.mark.parametrize(
    ("operation", "expected"),
    [("generate", TRAINED), ("inpaint", COMPOSITE), ("outpaint", COMPOSITE), ("edit", COMPOSITE)],
)
def test_the_server_marks_by_the_operation(
    client: httpx.Client, operation: str, expected: str
) -> None:
    fields = {"prompt": "a ball"} if operation == "generate" else fields_of(operation)
    for format in ("png", "jpeg", "webp"):
        answer = as_json(client, operation, **fields, response_format=format)
        assert answer.status_code == 200, answer.text
        assert source(answer.content) == expected


def test_animations_and_previews_are_marked_too(client: httpx.Client) -> None:
    keyframes = [{"prompt": "a ball"}, {"prompt": "a box"}]
    for format in ("gif", "webp"):
        body = {"keyframes": keyframes, "frames": 3, "response_format": format}
        assert source(client.post("/interpolate", json=body).content) == TRAINED
    body = {"prompt": "show", "stream": True, "partial_images": 2}
    for path in ("/generate", "/v1/images/generations"):
        events = client.post(path, json=body).text
        files = re.findall(r'"b64_json": "([^"]+)"', events)
        assert len(files) == 3
        assert all(source(base64.b64decode(each)) == TRAINED for each in files)


@pytest.mark.parametrize("mark", [True, False])
@pytest.mark.parametrize("embed_parameters", [True, False])
def test_a_preview_is_marked_as_its_result_is(mark: bool, embed_parameters: bool) -> None:
    marker = Marker(Settings(mark=mark, embed_parameters=embed_parameters))
    assert marker.of("edit") == Marking(source_type("edit") if mark else None, embed_parameters)
    assert marker.of_preview("edit") == marker.of("edit")


@pytest.mark.process
def test_an_operator_can_leave_out_marks_and_parameters(fake_settings: Configure) -> None:
    settings = fake_settings(mark=False, embed_parameters=False)
    with (
        serving(create_app(settings, worker=fake_worker.main)) as address,
        httpx.Client(base_url=address) as client,
    ):
        wait_until(lambda: client.get("/readyz").status_code == 200)
        for format in ("png", "jpeg", "webp"):
            body = {"prompt": "a ball", "response_format": format}
            answer = client.post("/generate", json=body)
            assert packet(answer.content) == ""
            assert b"a ball" not in answer.content


# ── parameters ────────────────────────────────────────────────────────────────────────────────────


def comment(content: bytes) -> dict[str, Any]:
    """The parameters in a file's EXIF."""
    value = PIL.Image.open(io.BytesIO(content)).getexif().get_ifd(0x8769)[0x9286]
    assert value.startswith(b"UNICODE\0")
    return dict(json.loads(value[8:].decode("utf-16-be")))


def directory(tiff: bytes, start: int) -> tuple[list[tuple[Any, ...]], int]:
    """A directory's entries (tag, type, count, value or its place), and where the next one is."""
    (count,) = struct.unpack_from(">H", tiff, start)
    entries = [struct.unpack_from(">HHII", tiff, start + 2 + 12 * i) for i in range(count)]
    return entries, struct.unpack_from(">I", tiff, start + 2 + 12 * count)[0]


def test_an_exif_block_is_what_its_directories_say() -> None:
    """Pillow passes over faults that other readers report."""
    block = user_comment("a ball, 赤")
    text = b"UNICODE\0" + "a ball, 赤".encode("utf-16-be")
    long, undefined = 4, 7
    assert block[:4] == b"MM\0*"
    ((*pointer, exif),), following = directory(block, int.from_bytes(block[4:8]))
    assert (pointer, following) == ([0x8769, long, 1], 0)
    ((*version, digits), (*held, at)), following = directory(block, exif)
    assert (version, digits.to_bytes(4)) == ([0x9000, undefined, 4], b"0232")
    assert (held, following) == ([0x9286, undefined, len(text)], 0)
    assert block[at:] == text


@pytest.mark.parametrize("format", ["jpeg", "webp", "webp-animation"])
def test_parameters_stand_in_exif(format: str) -> None:
    assert comment(made(format)) == PARAMETERS


def test_parameters_stand_in_a_png_s_text_and_a_gif_s_xmp() -> None:
    assert read_parameters(made("png")) == PARAMETERS
    text = re.search(r"<rdf:li xml:lang=\"x-default\">(.*)</rdf:li>", packet(made("gif")))
    assert text
    assert json.loads(text[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")) == (
        PARAMETERS
    )


def test_parameters_that_a_jpeg_cannot_hold_are_left_out() -> None:
    content = made("jpeg", prompt="x" * (MAX_JPEG_SEGMENT // 2))
    assert not PIL.Image.open(io.BytesIO(content)).getexif()
    assert source(content) == TRAINED
    assert comment(made("webp", prompt="x" * MAX_JPEG_SEGMENT))["prompt"] == "x" * MAX_JPEG_SEGMENT


def test_a_jpeg_holds_parameters_up_to_the_end_of_a_segment() -> None:
    # A segment has 65533 bytes, 70 of them before the text, which takes two for a character.
    others = len(json.dumps(PARAMETERS | {"prompt": ""}, ensure_ascii=False))
    longest = "x" * ((65_533 - 70) // 2 - others)
    assert comment(made("jpeg", prompt=longest))["prompt"] == longest
    assert not PIL.Image.open(io.BytesIO(made("jpeg", prompt=longest + "x"))).getexif()


@pytest.mark.parametrize("format", ["png", "jpeg", "webp"])
def test_a_file_without_parameters_has_no_empty_ones(format: Format) -> None:
    file = PIL.Image.open(io.BytesIO(encode(PICTURE, format, 90, {})))
    assert "parameters" not in file.info
    assert not file.getexif()
    assert b"UserComment" not in animate([PICTURE], "gif", 90, {})


@pytest.mark.parametrize("format", FORMATS)
def test_parameters_may_be_kept_out_of_marked_files(format: str) -> None:
    content = made(format, Marking(embed_parameters=False))
    assert source(content) == TRAINED
    assert b"prompt" not in content
    assert "prompt".encode("utf-16-be") not in content


def test_a_replay_sees_whether_the_original_was_marked() -> None:
    assert is_marked(made("png"))
    assert not is_marked(made("png", Marking(source=None)))


# ── exiftool ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.skipif(shutil.which("exiftool") is None, reason="no exiftool: libimage-exiftool-perl")
@pytest.mark.process
def test_exiftool_reads_all_formats(tmp_path: Path) -> None:
    names = {f"{format}.{format.partition('-')[0]}": format for format in FORMATS}
    for name, format in names.items():
        (tmp_path / name).write_bytes(made(format))
    tags = ("DigitalSourceType", "UserComment", "Parameters", "Warning")
    command = ["exiftool", "-json", "-n", *(f"-{tag}" for tag in tags), *names]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    for entry in json.loads(done.stdout):
        name = entry["SourceFile"]
        assert entry["DigitalSourceType"] == TRAINED, name
        parameters = entry.get("Parameters") or entry["UserComment"]
        assert json.loads(parameters) == PARAMETERS, name
        assert "Warning" not in entry, entry


# ── signatures ────────────────────────────────────────────────────────────────────────────────────


def test_a_png_is_compared_without_its_signature() -> None:
    png = made("png")
    chunk = b"\0\0\0\3caBXabc\0\0\0\0"
    assert unsigned(png[:33] + chunk + png[33:]) == png
    assert unsigned(png) == png


def test_certificate_and_key_are_needed_together() -> None:
    with pytest.raises(ValueError, match="together"):
        Settings(c2pa_certificate="a.pem")
    with pytest.raises(ValueError, match="nothing to sign"):
        Settings(c2pa_certificate="a.pem", c2pa_key="b.pem", mark=False)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """A chain and a key as an operator has them, and the root that a reader trusts."""
    pytest.importorskip("c2pa")
    pytest.importorskip("cryptography")
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    def named(name: str) -> x509.Name:
        organization = x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Test")
        return x509.Name([organization, x509.NameAttribute(NameOID.COMMON_NAME, name)])

    def usage(signs: bool) -> x509.KeyUsage:
        return x509.KeyUsage(
            digital_signature=signs,
            content_commitment=False,
            key_encipherment=False,
            data_encipherment=False,
            key_agreement=False,
            key_cert_sign=not signs,
            crl_sign=not signs,
            encipher_only=False,
            decipher_only=False,
        )

    root_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    now = datetime.datetime.now(datetime.UTC)

    def certified(name: str, public: Any, is_root: bool) -> x509.Certificate:
        builder = (
            x509.CertificateBuilder()
            .subject_name(named(name))
            .issuer_name(named("root"))
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=30))
            .add_extension(x509.BasicConstraints(ca=is_root, path_length=None), critical=True)
            .add_extension(usage(signs=not is_root), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(root_key.public_key()),
                critical=False,
            )
        )
        if not is_root:
            purposes = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION])
            builder = builder.add_extension(purposes, critical=False)
        return builder.sign(root_key, hashes.SHA256())

    root = certified("root", root_key.public_key(), is_root=True)
    signer = certified("signer", key.public_key(), is_root=False)
    directory = tmp_path_factory.mktemp("certificates")
    chain, secret = directory / "chain.pem", directory / "key.pem"
    pem = serialization.Encoding.PEM
    chain.write_bytes(signer.public_bytes(pem) + root.public_bytes(pem))
    plain = serialization.NoEncryption()
    secret.write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))
    return chain, secret, root.public_bytes(pem).decode()


@pytest.mark.parametrize("format", FORMATS)
def test_a_signature_is_verified_by_the_library_s_reader(
    certificate: tuple[Path, Path, str], format: str
) -> None:
    import c2pa

    chain, key, root = certificate
    settings = Settings(c2pa_certificate=str(chain), c2pa_key=str(key))
    marking = Marker(settings).of("inpaint")
    content = made(format, marking)
    assert source(content) == COMPOSITE
    context = c2pa.Context.from_dict({"trust": {"user_anchors": root}})
    media_type = f"image/{format.partition('-')[0]}"
    with c2pa.Reader(media_type, io.BytesIO(content), context=context) as reader:
        assert reader.get_validation_state() == "Trusted", reader.json()
        manifest = reader.get_active_manifest()
    assert "thumbnail" not in manifest
    (actions,) = (a for a in manifest["assertions"] if a["label"].startswith("c2pa.actions"))
    assert actions["data"]["actions"][0]["digitalSourceType"] == COMPOSITE
    damaged = bytearray(content)
    damaged[-20] ^= 1
    with c2pa.Reader(media_type, io.BytesIO(bytes(damaged)), context=context) as reader:
        assert reader.get_validation_state() == "Invalid"


def test_a_signed_png_is_its_replay_but_for_the_signature(
    certificate: tuple[Path, Path, str],
) -> None:
    chain, key, _ = certificate
    marker = Marker(Settings(c2pa_certificate=str(chain), c2pa_key=str(key)))
    signed = made("png", marker.of("generate"))
    assert signed != made("png")
    assert unsigned(signed) == made("png")
    assert made("png", marker.of_preview("generate")) == made("png")


def test_a_certificate_that_cannot_sign_is_refused_at_the_start(
    certificate: tuple[Path, Path, str], tmp_path: Path
) -> None:
    _, key, root = certificate
    wrong = tmp_path / "root.pem"
    wrong.write_text(root)
    with pytest.raises(ValueError, match="C2PA_CERTIFICATE"):
        Marker(Settings(c2pa_certificate=str(wrong), c2pa_key=str(key)))
    absent = str(tmp_path / "absent.pem")
    for name, files in (("CERTIFICATE", (absent, str(key))), ("KEY", (str(wrong), absent))):
        with pytest.raises(ValueError, match=rf"PAELLERA_C2PA_{name}: .*absent.*No such file"):
            Marker(Settings(c2pa_certificate=files[0], c2pa_key=files[1]))
