"""webuiapi, AUTOMATIC1111's client in Python, unchanged, and the program of docs/automatic1111.md.

It is no dependency: `pip install webuiapi` lets these tests run.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import PIL.Image
import pytest

from server.api import create_app
from server.settings import Settings
from tests import fake_worker
from tests.conftest import NAME, serving, wait_until
from tests.support.api_keys import KEY
from tests.support.images import noise, white

webuiapi = pytest.importorskip("webuiapi", reason="pip install webuiapi")
pytestmark = pytest.mark.process

DOCUMENT = Path(__file__).parents[2] / "docs" / "automatic1111.md"


@pytest.fixture(scope="module")
def address(fake_settings: Callable[..., Settings]) -> Iterator[str]:
    settings = fake_settings(sdapi=True, sizes="nearest", api_keys=KEY)
    with serving(create_app(settings, worker=fake_worker.main)) as address:
        wait_until(lambda: httpx.get(f"{address}/readyz").status_code == 200)
        yield address


@pytest.fixture(scope="module")
def api(address: str) -> Any:
    return webuiapi.WebUIApi(baseurl=f"{address}/sdapi/v1", username="me", password=KEY)


def at(image: PIL.Image.Image, x: int) -> tuple[int, ...]:
    return tuple(np.asarray(image.convert("RGB"))[0, x])


def test_txt2img_and_its_parameters(api: Any) -> None:
    result = api.txt2img(prompt="a ball", negative_prompt="blur", seed=5, batch_size=2, n_iter=2)
    assert len(result.images) == 4
    assert at(result.image, 0) == tuple(fake_worker.colour(5))
    assert result.info["all_seeds"] == [5, 6, 7, 8]
    # 512 × 512 was asked for.
    assert (result.image.size, result.info["width"]) == ((48, 48), 48)
    info = api.png_info(result.images[1])
    assert info.info == result.info["infotexts"][1]
    assert (info.parameters["Seed"], info.parameters["Prompt"]) == ("6", "a ball")


def test_img2img_and_inpainting(api: Any) -> None:
    image = PIL.Image.fromarray(noise())
    redrawn = api.img2img(images=[image], prompt="a ball", denoising_strength=0.6, seed=5)
    assert at(redrawn.image, 0) == tuple(fake_worker.colour(5))
    mask = PIL.Image.fromarray(white(box=(0, 0, 32, 32)))
    painted = api.img2img(images=[image], mask_image=mask, prompt="a ball", mask_blur=0)
    assert painted.image.size == image.size
    assert at(painted.image, 60) == at(image, 60)
    assert at(painted.image, 4) != at(image, 4)


def test_hires_and_upscaling(api: Any) -> None:
    hires = api.txt2img(prompt="a ball", width=64, height=32, enable_hr=True, hr_scale=2)
    assert hires.image.size == (128, 64)
    image = PIL.Image.fromarray(noise())
    upscaler = webuiapi.Upscaler.ESRGAN_4x
    large = api.extra_single_image(image=image, upscaler_1=upscaler, upscaling_resize=1.5)
    assert large.image.size == (96, 48)
    names = {"name_list": ["one", "two"]}
    several = api.extra_batch_images(images=[image] * 2, upscaling_resize=1.5, **names)
    assert [each.size for each in several.images] == [(96, 48)] * 2
    fields = {"resize_mode": 1, "upscaling_resize_w": 128, "upscaling_resize_h": 128}
    assert api.extra_single_image(image=image, **fields).image.size == (128, 128)


def test_what_this_server_cannot_do_is_said(api: Any) -> None:
    with pytest.raises(RuntimeError, match="no model that describes"):
        api.interrogate(PIL.Image.fromarray(noise()))


def test_progress_with_a_preview_and_interruption(api: Any) -> None:
    results = []
    request = threading.Thread(target=lambda: results.append(api.txt2img(prompt="show-hold")))
    request.start()
    wait_until(lambda: api.get_progress()["current_image"] is not None)
    state = api.get_progress()
    assert 0 < state["progress"] < 1
    assert state["state"]["job_count"] == 1
    api.interrupt()
    request.join()
    assert len(results[0].images) == 1
    api.util_wait_for_ready(check_interval=0.05)


def test_options_and_lists(api: Any) -> None:
    (title,) = api.util_get_model_names()
    assert title.startswith(NAME)
    api.util_set_model(NAME)
    assert api.util_get_current_model() == title
    assert "multinomial" in api.util_get_sampler_names()
    assert api.util_get_scheduler_names() == ["automatic"]
    for read in (
        api.get_cmd_flags,
        api.get_upscalers,
        api.get_latent_upscale_modes,
        api.get_sd_vae,
        api.get_loras,
        api.get_memory,
        api.get_hypernetworks,
        api.get_face_restorers,
        api.get_realesrgan_models,
        api.get_prompt_styles,
        api.get_scripts,
        api.get_embeddings,
    ):
        assert "error" not in read()


def test_a_wrong_key_is_refused(address: str) -> None:
    api = webuiapi.WebUIApi(baseurl=f"{address}/sdapi/v1", username="me", password="x" * 16)
    with pytest.raises(RuntimeError, match="401"):
        api.txt2img(prompt="a ball")


def test_the_documented_program_runs(address: str, tmp_path: Path) -> None:
    match = re.search(r"<!-- client: webuiapi -->\n```python\n(.*?)```", DOCUMENT.read_text(), re.S)
    assert match is not None
    port = address.rpartition(":")[2]
    credentials = f'port={port}, username="me", password="{KEY}"'
    program = match[1].replace("port=8000", credentials)
    # The fake worker keeps it until it is interrupted.
    program = program.replace("a yellow star", "show-hold")
    program = program.replace('"batch_size": 4', '"batch_size": 1')
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=os.environ,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    last = done.stdout.splitlines()[-1]
    assert last.startswith("1 ")
    assert last.endswith("'Interrupted': True}")
    assert {file.name for file in tmp_path.iterdir()} == {
        "apple.png",
        "pear.png",
        "preview.png",
    }
