"""Somebody's own pictures: what is read and how, what is left out, and where a source stands."""

from __future__ import annotations

import io
import json
import os
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from model.training import captioned, image_batches
from model.training.captioned import DataError, open_collection
from model.training.decoding import Filters, Unusable, cover, decode, rgb
from tests.support.picture_files import (
    RED,
    WHITE,
    encoded,
    halves,
    pictures,
    plain,
    write_mixed,
    write_pictures,
    write_shards,
)

# ── a file becomes pixels ─────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("orientation", "top_left"), [(1, RED), (2, WHITE), (3, WHITE), (4, RED), (6, RED), (8, WHITE)]
)
def test_a_camera_s_rotation_is_undone(orientation, top_left):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = halves(RED, WHITE)
    upright = decode(
        encoded(image, "JPEG", exif=exif, quality=95),
        (32, 64) if orientation > 4 else (64, 32),
        Filters(),
    )
    assert upright.shape == ((64, 32, 3) if orientation > 4 else (32, 64, 3))
    np.testing.assert_allclose(upright[4, 4], top_left, atol=12)
    bottom_right = WHITE if top_left == RED else RED
    np.testing.assert_allclose(upright[-4, -4], bottom_right, atol=12)


def palette(transparent: bool) -> bytes:
    image = halves(RED, (0, 0, 255)).quantize(4)
    where = image.getpixel((60, 5))
    return encoded(image, transparency=where) if transparent else encoded(image)


@pytest.mark.parametrize(
    ("raw", "left", "right"),
    [
        (encoded(halves((*RED, 255), (0, 0, 0, 0), mode="RGBA")), RED, WHITE),
        (encoded(halves((*RED, 255), (0, 0, 0, 128), mode="RGBA")), RED, (127, 127, 127)),
        (encoded(halves((90, 255), (0, 0), mode="LA")), (90, 90, 90), WHITE),
        (encoded(halves(RED, (0, 0, 255)), transparency=(0, 0, 255)), RED, WHITE),
        (
            encoded(halves((*RED, 255), (0, 0, 0, 0), mode="RGBA"), "WEBP", lossless=True),
            RED,
            WHITE,
        ),
        (palette(transparent=False), RED, (0, 0, 255)),
        (palette(transparent=True), RED, WHITE),
        (
            encoded(halves((0, 0, 0, 0), (0, 255, 255, 0), mode="CMYK"), "JPEG", quality=95),
            WHITE,
            (255, 0, 0),
        ),
        (encoded(halves((60,), (200,), mode="L")), (60, 60, 60), (200, 200, 200)),
        (encoded(halves((0,), (1,), mode="1")), (0, 0, 0), (255, 255, 255)),
        (
            encoded(
                Image.fromarray(
                    np.repeat(np.array([[60 * 257, 200 * 257]], np.uint16), 32, 1).repeat(32, 0)
                )
            ),
            (60,) * 3,
            (200,) * 3,
        ),
    ],
    ids=[
        "RGBA",
        "half-transparent",
        "LA",
        "RGB+key",
        "WebP",
        "palette",
        "palette+alpha",
        "CMYK",
        "grey",
        "bilevel",
        "16-bit",
    ],
)
def test_every_mode_becomes_rgb_and_what_is_transparent_white(raw, left, right):
    pixels = decode(raw, (64, 32), Filters())
    assert pixels.shape == (32, 64, 3)
    assert pixels.dtype == np.uint8
    np.testing.assert_allclose(pixels[16, 8], left, atol=6)
    np.testing.assert_allclose(pixels[16, -8], right, atol=6)


def test_sixteen_bits_of_grey_keep_their_order():
    ramp = np.linspace(0, 65535, 256).astype(np.uint16)[None].repeat(4, 0)
    grey = np.asarray(rgb(Image.open(io.BytesIO(encoded(Image.fromarray(ramp))))))
    np.testing.assert_allclose(grey[0, :, 0], np.arange(256), atol=1)


@pytest.mark.parametrize("size", [(100, 40), (40, 100), (300, 7), (64, 48), (33, 31)])
def test_pictures_cover_what_is_asked_for_and_are_cropped_from_end_to_end(size):
    """A ramp along x and one along y: the crop's corners say where it was taken, and that
    nothing was squeezed.
    """
    x, y = np.meshgrid(np.linspace(0, 255, size[0]), np.linspace(0, 255, size[1]))
    image = Image.fromarray(np.stack([x, y, 0 * x], -1).round().astype(np.uint8))
    scale = max(64 / size[0], 48 / size[1])
    for place in ((0.0, 0.0), (1.0, 1.0), (0.5, 0.5)):
        crop = np.asarray(cover(image, (64, 48), place)).astype(float)
        assert crop.shape == (48, 64, 3)
        for axis, wanted in ((0, 64), (1, 48)):
            part = wanted / (size[axis] * scale)  # of the picture's length
            start = place[axis] * (1 - part)
            line = crop[24, :, 0] if axis == 0 else crop[:, 32, 1]
            slack = 255 / wanted + 255 / size[axis]
            assert line[0] == pytest.approx(255 * start, abs=slack)
            assert line[-1] == pytest.approx(255 * (start + part), abs=slack)


def test_a_large_jpeg_comes_out_as_its_reduction():
    """It is decoded at a fraction of its size, which must not be less than what is asked for."""
    coarse = Image.fromarray(np.random.default_rng(0).integers(0, 255, (100, 100, 3), np.uint8))
    large = coarse.resize((1600, 1600), Image.Resampling.BICUBIC)
    expected = np.asarray(large.resize((256, 256), Image.Resampling.BICUBIC)).astype(int)
    assert (
        np.abs(
            decode(encoded(large, "JPEG", quality=95, subsampling=0), (256, 256), Filters())
            - expected
        ).mean()
        < 2
    )


@pytest.mark.parametrize(
    ("size", "reason"),
    [((40, 20), None), ((40, 19), "too small"), ((60, 20), None), ((61, 20), "too elongated")],
)
def test_filters_hold_at_their_bounds(size, reason):
    filters = Filters(min_side=20, max_aspect=3.0)
    for turned in (size, size[::-1]):
        if reason is None:
            assert decode(encoded(plain(size=turned)), (8, 8), filters).shape == (8, 8, 3)
        else:
            with pytest.raises(Unusable, match=reason):
                decode(encoded(plain(size=turned)), (8, 8), filters)


# ── folders and shards ────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("threads", [0, 3])
@pytest.mark.parametrize("form", ["folder", "shards"])
def test_what_cannot_be_used_is_left_out_and_counted_once_by_reason(tmp_path, form, threads):
    reasons = write_mixed(tmp_path / "mixed")
    where: Path | str = tmp_path / "mixed"
    if form == "shards":
        where = write_shards(tmp_path / "shards", [tmp_path / "mixed"])
        # `cut.png` and `cut.jpg` share a name, so in a shard they are one sample.
        reasons["damaged"] = 1
        reasons["no image"] = 1  # notes.md
    source = pictures(where, 4, filters=Filters(min_side=20, max_aspect=4), threads=threads)
    images, texts = source.draw()
    assert images.shape == (4, 3, 16, 16)
    assert images.dtype == torch.uint8
    assert sorted(texts) == [
        f"caption of {name}" for name in ("a.png", "b.JPG", "deep/d.webp", "deep/er/c.jpeg")
    ]
    np.testing.assert_allclose(images.float().mean((2, 3)), [RED] * 4, atol=6)
    source.draw()
    assert source.skipped == reasons
    source.draw()
    assert source.skipped == reasons


def test_metadata_says_captions_before_text_files_do(tmp_path):
    write_pictures(tmp_path, 3)
    plain().save(tmp_path / "sub.png")
    (tmp_path / "deep").mkdir()
    plain().save(tmp_path / "deep" / "x.png")
    lines = [
        {"file_name": "000.png", "text": "from metadata", "width": 40},
        {"file_name": "deep/x.png", "text": "a picture further down"},
        {"file_name": "gone.png", "text": "nothing"},
        {"file_name": "001.txt", "text": "no picture"},
        {"text": "of nothing"},
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join([*map(json.dumps, lines), "", "{not json"]))
    source = pictures(tmp_path, 4)
    assert sorted(source.draw()[1]) == [
        "a picture further down",
        "from metadata",
        "picture 1",
        "picture 2",
    ]
    source.draw()
    assert source.skipped == {
        "no such file": 1,
        "not an image": 1,
        "metadata not understood": 2,
        "no caption": 1,
    }


def test_metadata_may_begin_with_a_byte_order_mark(tmp_path):
    write_pictures(tmp_path, 1)
    line = json.dumps({"file_name": "000.png", "text": "from metadata"})
    (tmp_path / "metadata.jsonl").write_bytes(line.encode("utf-8-sig"))
    source = pictures(tmp_path, 1)
    assert source.draw()[1] == ["from metadata"]
    assert not source.skipped


@pytest.mark.parametrize(
    ("name", "written"),
    [
        (unicodedata.normalize("NFD", "é.png"), unicodedata.normalize("NFC", "é.png")),
        (unicodedata.normalize("NFC", "é.png"), unicodedata.normalize("NFD", "é.png")),
        ("s/a.png", "s/../s/./a.png"),
        ("s/a.png", "s\\a.png"),
        ("a\\b.png", "a\\b.png"),
    ],
    ids=["composed", "decomposed", "dots", "backslash", "backslash in the name"],
)
def test_metadata_names_a_file_however_its_path_is_written(tmp_path, name, written):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    plain().save(tmp_path / name)
    line = json.dumps({"file_name": written, "text": "from metadata"})
    (tmp_path / "metadata.jsonl").write_text(line)
    source = pictures(tmp_path, 1)
    assert source.draw()[1] == source.draw()[1] == ["from metadata"]
    assert not source.skipped


def test_a_caption_s_suffix_may_be_in_capitals(tmp_path):
    plain().save(tmp_path / "NAME.PNG")
    (tmp_path / "NAME.TXT").write_text("in capitals")
    assert pictures(tmp_path, 1).draw()[1] == ["in capitals"]
    (tmp_path / "NAME.txt").write_text("in small letters")
    assert pictures(tmp_path, 1).draw()[1] == ["in small letters"]


def test_folders_behind_links_are_read_once(tmp_path):
    data = write_pictures(tmp_path / "data", 2)
    write_pictures(tmp_path / "elsewhere" / "deep", 1)
    (data / "a link").symlink_to(tmp_path / "elsewhere")
    (data / "z link").symlink_to(tmp_path / "elsewhere")
    (data / "loop").symlink_to(data)
    (tmp_path / "elsewhere" / "back").symlink_to(data)
    names = captioned._listed(data)
    assert sorted(names) == ["000.png", "001.png", "a link/deep/000.png"]


def test_a_folder_that_cannot_be_read_is_counted(monkeypatch, tmp_path):
    data = write_pictures(tmp_path / "data", 1)
    (data / "closed").mkdir()
    scandir = os.scandir

    def refused(folder: Path) -> object:
        if folder.name == "closed":
            raise PermissionError
        return scandir(folder)

    monkeypatch.setattr(captioned.os, "scandir", refused)
    source = pictures(data, 1)
    source.draw()
    source.draw()
    assert source.skipped == {"unreadable folder": 1}


@pytest.mark.parametrize("form", ["folder", "shards"])
def test_images_of_other_formats_are_counted(tmp_path, form):
    data = write_pictures(tmp_path / "data", 1)
    others = ["a.heic", "b.AVIF", "c.gif", "d.bmp", "e.tif", "f.tiff", "g.jfif"]
    for name in others:
        (data / name).write_bytes(b"an image")
        (data / name).with_suffix(".txt").write_text("a caption")
    source = pictures(data if form == "folder" else write_shards(tmp_path / "shards", [data]), 1)
    source.draw()
    source.draw()
    assert source.skipped == {"format not supported": len(others)}


@pytest.mark.parametrize(
    ("caption", "reason"),
    [
        ("a caption".encode("utf-16-le"), "caption is not UTF-8"),
        ("a caption".encode("utf-16"), "caption is not UTF-8"),
        ("\u200b\u2060 \n".encode(), "empty caption"),
        ("\ufeff\ufeff".encode(), "empty caption"),
    ],
)
def test_a_caption_without_a_visible_letter_is_none(tmp_path, caption, reason):
    write_pictures(tmp_path, 2)
    (tmp_path / "000.txt").write_bytes(caption)
    source = pictures(tmp_path, 1)
    assert source.draw()[1] == source.draw()[1] == ["picture 1"]
    assert source.skipped == {reason: 1}


@pytest.mark.parametrize("form", ["folder", "shards"])
def test_a_tilde_is_the_home_folder(monkeypatch, tmp_path, form):
    monkeypatch.setenv("HOME", str(tmp_path))
    data = write_pictures(tmp_path / "data", 1)
    where = str(data) if form == "folder" else write_shards(tmp_path / "shards", [data])
    assert pictures(where.replace(str(tmp_path), "~"), 1).draw()[1] == ["picture 0"]


def test_a_shard_is_read_up_to_where_it_is_cut_and_the_next_ones_whole(tmp_path):
    parts = [write_pictures(tmp_path / f"part{i}", 6) for i in range(2)]
    for path in (tmp_path / "part1").glob("*.txt"):
        path.write_text(f"whole {path.stem}")
    pattern = write_shards(tmp_path / "shards", parts)
    first = tmp_path / "shards" / "shard-000.tar"
    first.write_bytes(
        first.read_bytes()[: 512 * 9 + 100]
    )  # four blocks a sample: the third one's picture is cut
    source = pictures(pattern, 20)
    texts = source.draw()[1]
    assert {*texts} == {"picture 0", "picture 1", *(f"whole {i:03}" for i in range(6))}
    assert source.skipped == {"damaged shard": 1}


@pytest.mark.parametrize(
    ("prepare", "words"),
    [
        (lambda folder: write_pictures(folder, 0), "no .png, .jpg, .jpeg, .webp"),
        (lambda folder: folder / "nothing", "no such folder"),
        (lambda folder: folder / "shard-{000..003}.tar", "nor 3 more"),
        (lambda folder: write_pictures(folder, 3) / "000.png", "is a file: name the folder"),
        (lambda folder: write_pictures(folder, 3) / "*.tar", "patterns use braces, such as shards"),
        (lambda folder: "", "the name of the data is empty"),
        (lambda folder: write_shards(folder, [write_pictures(folder / "empty", 0)]), "it is empty"),
        (
            lambda folder: (
                [path.unlink() for path in write_pictures(folder, 3).glob("*.txt")] and folder
            ),
            "3 no caption",
        ),
        (lambda folder: write_shards(folder, [write_pictures(folder / "small", 3)]), "3 too small"),
    ],
    ids=[
        "no pictures",
        "no folder",
        "no shards",
        "file",
        "star",
        "no name",
        "empty shard",
        "no captions",
        "too small",
    ],
)
@pytest.mark.parametrize("threads", [0, 2])
def test_nothing_to_train_on_is_an_error_that_says_why(tmp_path, prepare, words, threads):
    where = prepare(tmp_path / "data")
    with pytest.raises(DataError, match=words):
        pictures(where, 4, filters=Filters(min_side=41), threads=threads).draw()


@pytest.mark.parametrize("form", ["folder", "shards"])
def test_an_epoch_meets_every_picture_once_and_the_next_in_another_order_and_crop(tmp_path, form):
    folder = write_pictures(tmp_path / "data", 30)
    for path in folder.glob("*.png"):
        halves(RED, WHITE, (60, 40)).save(path)
    source = pictures(
        folder if form == "folder" else write_shards(tmp_path / "shards", [folder]), 30
    )
    (first, texts), (second, again) = source.draw(), source.draw()
    assert sorted(texts) == sorted(again) == sorted(f"picture {i}" for i in range(30))
    assert texts != again
    crops = [images.float().mean((1, 2, 3)) for images in (first, second)]
    assert all(len(crop.round().unique()) > 10 for crop in crops)
    by_name = [
        dict(zip(names, crop.tolist(), strict=True))
        for names, crop in ((texts, crops[0]), (again, crops[1]))
    ]
    assert by_name[0] != by_name[1]


@pytest.mark.parametrize("form", ["folder", "shards"])
def test_a_source_goes_on_from_its_position_whoever_reads_ahead(tmp_path, form):
    write_mixed(tmp_path / "mixed")
    write_pictures(tmp_path / "mixed", 17)
    where = (
        tmp_path / "mixed"
        if form == "folder"
        else write_shards(tmp_path / "shards", [tmp_path / "mixed"] * 2)
    )
    whole = pictures(where, 7, seed=5, threads=3)
    states, drawn = [], []
    for _ in range(9):
        states.append(json.loads(json.dumps(whole.state_dict())))
        drawn.append(whole.draw())
    assert states[-1]["epoch"] > 0
    for start in (1, 4, 8):
        resumed = pictures(where, 7, seed=5)
        resumed.load_state_dict(states[start])
        images, texts = resumed.draw()
        assert torch.equal(images, drawn[start][0])
        assert texts == drawn[start][1]
    assert resumed.skipped == whole.skipped


@pytest.mark.parametrize("form", ["folder", "shards"])
def test_processes_share_a_collection_without_overlap(monkeypatch, tmp_path, form):
    parts = [write_pictures(tmp_path / "parts" / str(i), 5) for i in range(3)]
    for i, part in enumerate(parts):
        for path in part.glob("*.txt"):
            path.write_text(f"part {i}, {path.stem}")
    where = (
        str(tmp_path / "parts") if form == "folder" else write_shards(tmp_path / "shards", parts)
    )
    monkeypatch.setattr(captioned, "world", lambda: 2)
    seen: list[set[str]] = []
    for rank in (0, 1):
        monkeypatch.setattr(captioned, "rank", lambda rank=rank: rank)
        seen.append({*pictures(where, 30).draw()[1]})
    assert not seen[0] & seen[1]
    assert len(seen[0] | seen[1]) == 15
    monkeypatch.setattr(captioned, "world", lambda: 16)
    with pytest.raises(DataError, match="for 16 processes"):
        open_collection(where, 0)


def test_counts_of_a_checkpoint_are_taken_over_by_one_process_alone(monkeypatch, tmp_path):
    source = pictures(write_pictures(tmp_path, 3), 2)
    for rank, counts in ((0, {"damaged": 2}), (1, {})):
        monkeypatch.setattr(image_batches, "rank", lambda rank=rank: rank)
        source.load_state_dict({"epoch": 1, "index": 2, "skipped": {"damaged": 2}})
        assert source.skipped == counts
