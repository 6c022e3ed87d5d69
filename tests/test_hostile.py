"""Every file of tests/data/hostile meets the outcome its manifest tells."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI, Request
from fastapi.testclient import TestClient
from pydantic import BaseModel, ConfigDict

from server.api import errors
from server.api.body import read_body
from server.api.errors import ApiError
from server.api.picture_fields import PictureFile
from server.api.uploads import Decoder, MaskMode, PictureLimits, decode, repaint_mask
from tests import hostile

FOLDER = Path(__file__).parent / "data" / "hostile"
MANIFEST: dict[str, dict[str, Any]] = json.loads((FOLDER / "manifest.json").read_text())


class Sent(BaseModel):
    """The fields that all the endpoints with pictures share."""

    model_config = ConfigDict(extra="forbid", strict=True)
    image: PictureFile
    mask: PictureFile | None = None
    mask_mode: MaskMode | None = None


@pytest.fixture(scope="module")
def endpoint() -> Iterator[TestClient]:
    """An app with nothing but one upload."""
    app, decoder = FastAPI(), Decoder()

    @app.post("/")
    async def upload(request: Request) -> dict[str, Any]:
        sent = await read_body(request, Sent, 2**20)
        image = await decoder.picture(sent.image)
        mask = None if sent.mask is None else await decoder.mask(sent.mask, sent.mask_mode, image.size)
        return {"size": image.size, "alpha": image.had_alpha, "repainted": None if mask is None else int(mask.sum())}

    app.add_exception_handler(ApiError, lambda _, error: error.response())  # type: ignore[attr-defined, arg-type]
    yield TestClient(app)
    decoder.close()


def test_the_manifest_lists_every_file_and_they_are_small() -> None:
    files = {path.name: path.stat().st_size for path in FOLDER.iterdir() if path.name != "manifest.json"}
    assert set(files) == set(MANIFEST)
    assert len(files) >= 60
    assert sum(files.values()) < 300_000


def test_the_files_are_what_the_script_makes(tmp_path: Path) -> None:
    hostile.write(tmp_path)
    assert json.loads((tmp_path / "manifest.json").read_text()) == MANIFEST
    exact = [name for name, entry in MANIFEST.items() if entry["exact"]]
    assert len(exact) >= 60
    assert not [name for name in exact if (tmp_path / name).read_bytes() != (FOLDER / name).read_bytes()]


@pytest.mark.parametrize("name", MANIFEST)
def test_every_file_has_its_expected_outcome(name: str) -> None:
    entry, content = MANIFEST[name], (FOLDER / name).read_bytes()
    if entry["status"] == 200:
        picture = decode(content, PictureLimits())
        assert picture.size == tuple(entry["size"])
        assert picture.had_alpha == entry["alpha"]
        assert "repainted" not in entry or repaint_mask(picture, entry.get("mode"), hostile.SIZE).sum() == entry["repainted"]
        return
    with pytest.raises(ApiError) as refused:
        repaint_mask(decode(content, PictureLimits()), entry.get("mode"), hostile.SIZE)
    assert (refused.value.status, refused.value.code) == (entry["status"], entry["code"])


@pytest.mark.parametrize("name", MANIFEST)
def test_over_http_every_refusal_has_the_one_shape_and_tells_no_secrets(endpoint: TestClient, name: str) -> None:
    entry, content = MANIFEST[name], (FOLDER / name).read_bytes()
    fields = {"mask_mode": entry["mode"]} if "mode" in entry else {}
    files = {entry["role"]: ("../../etc/" + name, content)}
    if entry["role"] == "mask":
        files["image"] = ("image.png", (FOLDER / "plain.png").read_bytes())
    answer = endpoint.post("/", data=fields, files=files)
    assert answer.status_code == entry["status"], answer.text
    if answer.status_code == 200:
        assert answer.json()["repainted"] == entry.get("repainted")
        return
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["code"], error["param"], error["type"]) == (entry["code"], entry["role"], "invalid_request_error")
    assert error["message"].startswith(f"{entry['role']}: ")
    for secret in ("Traceback", "/", " at 0x", "PIL", "Error"):
        assert secret not in error["message"]


def test_errors_register_the_handler_that_the_small_app_stands_for() -> None:
    app = FastAPI()
    errors.register(app)
    assert ApiError in app.exception_handlers
