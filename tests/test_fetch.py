"""Fetching from a hub: what arrives is what was published, and whatever goes wrong is one line
that leaves nothing behind.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import Result
from typer.testing import CliRunner

from model.checkpoints import fetch as fetching
from model.checkpoints import manifest
from model.checkpoints.fetch import FetchError, fetch, fetched
from model.checkpoints.manifest import Manifest, PublishedBundle, PublishedFile, published
from server.cli import app
from tests.hub import COMMIT, Hub, serving

FILE = PublishedFile(
    network="vqgan",
    generation="v3",
    path="vqgan.pt",
    licence="MIT",
    format="pickle",
    repository="someone/Weights",
    bytes=307_200,
)
CONTENT = bytes(range(256)) * 1200


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with one file, and an empty cache beside it. Waiting for the next attempt takes no
    time.
    """
    from huggingface_hub import constants, file_download
    from huggingface_hub.utils import _http, disable_progress_bars, enable_progress_bars

    impatient = SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None})
    with serving(Hub({FILE.where: CONTENT})) as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.address)
        monkeypatch.setattr(
            constants,
            "HUGGINGFACE_CO_URL_TEMPLATE",
            hub.address + "/{repo_id}/resolve/{revision}/{filename}",
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache" / "hub"))
        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1024)
        monkeypatch.setattr(file_download, "time", impatient)
        monkeypatch.setattr(_http, "time", impatient)
        monkeypatch.setattr(manifest, "published", lambda: Manifest({"weights": FILE}))
        disable_progress_bars()
        yield hub
        enable_progress_bars()


def paellera_fetch(name: str = "weights") -> Result:
    return CliRunner().invoke(app, ["weights", "fetch", name])


def assert_refused(result: Result, *words: str) -> None:
    assert result.exit_code == 1, result.output
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("paellera: ")]
    for word in (FILE.where, *words):
        assert word in line
    assert "Traceback" not in result.output


def left_behind(tmp_path: Path) -> list[Path]:
    """Files with content in the cache: whole ones, and parts of one."""
    cache = tmp_path / "cache"
    return [
        path
        for path in cache.rglob("*")
        if path.name.endswith("incomplete") or path.parent.name in {"blobs"} or path.is_symlink()
    ]


def test_a_fetched_file_has_the_published_content_and_is_fetched_once(hub: Hub) -> None:
    assert fetch(FILE).read_bytes() == CONTENT
    assert fetch(FILE) == fetched(FILE)
    assert hub.downloads() == [None]


def test_the_command_prints_where_the_file_lies(hub: Hub) -> None:
    result = paellera_fetch()
    assert result.exit_code == 0, result.output
    assert Path(result.stdout.strip().removeprefix(f"{FILE.where}: ")).read_bytes() == CONTENT


def test_a_broken_connection_is_resumed_where_it_broke(hub: Hub) -> None:
    hub.cuts = 2
    assert fetch(FILE).read_bytes() == CONTENT
    first, *later = hub.downloads()
    assert first is None
    assert [span for span in later if span and span != "bytes=0-"]


def test_a_connection_that_keeps_breaking_leaves_nothing(hub: Hub, tmp_path: Path) -> None:
    hub.cuts = 10_000
    assert_refused(paellera_fetch(), "did not finish")
    assert left_behind(tmp_path) == []


@pytest.mark.parametrize(
    ("status", "words"), [(403, "403"), (401, "401"), (404, "404"), (429, "429"), (500, "500")]
)
def test_a_hub_that_refuses_is_told_in_one_line(
    hub: Hub, tmp_path: Path, status: int, words: str
) -> None:
    hub.status = status
    assert_refused(paellera_fetch(), words)
    assert left_behind(tmp_path) == []


def test_a_disk_that_is_too_small_is_noticed_before_the_download(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    assert_refused(paellera_fetch(), f"{len(CONTENT):,} bytes", "1,000 are free")
    assert hub.downloads() == []


def test_content_that_the_hub_states_otherwise_is_removed(hub: Hub, tmp_path: Path) -> None:
    hub.etag = "0" * 64
    assert_refused(paellera_fetch(), sha256(CONTENT).hexdigest(), "0" * 64)
    assert left_behind(tmp_path) == []


def test_the_manifest_s_checksum_is_enforced(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(FetchError, match="sha256"):
        fetch(replace(FILE, sha256="1" * 64))
    assert left_behind(tmp_path) == []


def test_the_checksum_of_the_first_fetch_is_enforced_later(hub: Hub) -> None:
    first = fetch(FILE)
    shutil.rmtree(first.parents[2])
    hub.files[FILE.where] = CONTENT[::-1]
    assert_refused(paellera_fetch(), sha256(CONTENT).hexdigest())
    hub.files[FILE.where] = CONTENT
    assert fetch(FILE).read_bytes() == CONTENT


def test_a_file_that_was_damaged_in_the_cache_is_removed_and_comes_anew(hub: Hub) -> None:
    for damaged, words in ((CONTENT[:-1], "307,199 bytes"), (bytes(len(CONTENT)), "sha256")):
        fetch(FILE).resolve().write_bytes(damaged)
        with pytest.raises(FetchError, match=words):
            fetch(FILE)
        assert fetch(FILE).read_bytes() == CONTENT


@pytest.mark.parametrize("content", [b"18 bytes are no VQ", CONTENT + b"x"])
def test_a_file_of_another_size_is_refused_before_the_download(
    hub: Hub, tmp_path: Path, content: bytes
) -> None:
    hub.files[FILE.where] = content
    assert_refused(paellera_fetch(), f"{len(content):,} bytes", "307,200 were published")
    assert hub.downloads() == []
    assert left_behind(tmp_path) == []


def test_the_commit_of_the_first_fetch_is_asked_for_later_and_the_manifest_s_always(
    hub: Hub,
) -> None:
    shutil.rmtree(fetch(FILE).parents[2])
    hub.asked.clear()
    fetch(FILE)
    assert hub.asked
    assert all(f"/resolve/{COMMIT}/" in path for _, path, _ in hub.asked)
    with pytest.raises(FetchError, match="404"):
        fetch(replace(FILE, revision="f" * 40))
    assert f"/resolve/{'f' * 40}/" in hub.asked[-1][1]


def test_a_rounded_size_covers_its_last_digit_and_an_exact_one_nothing() -> None:
    rounded, exact = (replace(FILE, bytes=size) for size in (4_030_000_000, 14_951_437_144))
    assert [rounded.has_size(4_030_000_000 + off) for off in (9_999_999, -(10**7), 10**7 + 1)] == [
        True,
        True,
        False,
    ]
    assert [exact.has_size(14_951_437_144 + off) for off in (0, 1)] == [True, False]
    assert not replace(FILE, bytes=73_700_000).has_size(18)
    with pytest.raises(ValueError, match="size must be given"):
        replace(FILE, bytes=0)


def test_files_without_a_known_hash_are_named() -> None:
    result = CliRunner().invoke(app, ["weights", "list"])
    unknown = {file.where for file in published().files.values() if file.sha256 is None}
    lines = [line for line in result.stdout.splitlines() if "(no known sha256)" in line]
    assert len(lines) == len(unknown) > 0
    for file in published().files.values():
        # Where the content is known, so is a commit that has it.
        assert file.sha256 is None or file.pinned


def test_offline_the_cache_serves_and_an_empty_one_says_so(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    close_session()
    assert_refused(paellera_fetch(), "HF_HUB_OFFLINE")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    close_session()
    fetch(FILE)
    asked = len(hub.asked)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    close_session()
    assert fetch(FILE).read_bytes() == CONTENT
    assert len(hub.asked) == asked
    monkeypatch.undo()
    close_session()


def test_a_hub_that_is_not_there_is_told_in_one_line(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(
        constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}",
    )
    assert_refused(paellera_fetch(), "did not finish")


def test_what_was_not_fetched_or_is_not_on_the_hub_is_said(hub: Hub) -> None:
    with pytest.raises(
        FetchError,
        match=r"is not here yet: `paellera weights fetch someone/Weights/vqgan\.pt` gets it",
    ):
        fetched(FILE)
    with pytest.raises(FetchError, match=r"vqgan\.pt is not on the hub; it is among friends"):
        fetch(replace(FILE, repository=None, source="friends"))
    assert hub.asked == []


def test_of_a_bundle_what_the_hub_has_is_fetched_and_the_rest_is_said_to_lie_elsewhere(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {
        "weights": FILE,
        "elsewhere": replace(FILE, path="f8.pt", repository=None, source="friends"),
    }
    bundle = PublishedBundle(files=tuple(files), recipes=(), config={})
    monkeypatch.setattr(manifest, "published", lambda: Manifest(files, bundles={"both": bundle}))
    result = paellera_fetch("both")
    assert result.exit_code == 0, result.output
    unknown = (
        f"{FILE.where}: no published sha256 is known. The hash of this first download is stored, "
        "and later downloads must match it"
    )
    assert result.stderr.splitlines() == [unknown, "f8.pt is not on the hub; it is among friends"]
    assert fetched(FILE).read_bytes() == CONTENT


def test_an_unknown_name_is_refused_with_the_known_ones(hub: Hub) -> None:
    result = paellera_fetch("surprise")
    assert result.exit_code == 2
    assert (
        result.stderr == "paellera: 'surprise' is no published file or bundle; there are weights\n"
    )


# ── the manifest ──────────────────────────────────────────────────────────────────────────────────


def test_every_published_bundle_has_one_file_per_network_and_every_recipe_fits_it() -> None:
    for name, bundle in published().bundles.items():
        assert sorted(file.network for file in published().select(name).values()) == sorted(
            published().config(name).networks
        )
        for recipe in bundle.recipes:
            assert published().config(name, recipe).recipe == published().recipes[recipe]


def test_every_published_file_is_on_the_hub_or_says_where_else() -> None:
    for file in published().files.values():
        assert (file.repository is None) != (file.source is None)


def test_a_file_name_that_two_repositories_have_is_refused() -> None:
    with pytest.raises(ValueError, match="more than one"):
        published().select("open_clip_pytorch_model.bin")
