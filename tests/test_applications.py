"""Requests as finished applications send them, byte for byte where that matters.

Written after the applications' public sources: Open WebUI (routers/images.py), LibreChat
(DALLE3.js, OpenAIImageTools.js, StableDiffusion.js), SillyTavern (stable-diffusion), n8n, LangChain
and Home Assistant. Each reads from the answer what the application reads.
"""

from __future__ import annotations

import base64
import http.client
import io
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import httpx
import PIL.Image
import pytest

from server.api import create_app
from server.settings import Settings
from tests import fake_worker
from tests.conftest import NAME, body_schema, serving, wait_until
from tests.support.api_keys import KEY
from tests.support.images import noise, png, white

pytestmark = pytest.mark.process

GENERATIONS, EDITS = "/v1/images/generations", "/v1/images/edits"
SD = "/sdapi/v1"


@contextmanager
def opened(settings: Settings) -> Iterator[httpx.Client]:
    with (
        serving(create_app(settings, worker=fake_worker.main)) as address,
        httpx.Client(base_url=address, timeout=20) as client,
    ):
        wait_until(lambda: client.get("/readyz").status_code == 200)
        yield client


@pytest.fixture(scope="module")
def server(fake_settings: Callable[..., Settings]) -> Iterator[httpx.Client]:
    """A client of a server with the settings that docs/clients.md recommends."""
    settings = fake_settings(model_aliases=f"*={NAME}", sizes="nearest", sdapi=True)
    with opened(settings) as client:
        yield client


def image(content: bytes) -> PIL.Image.Image:
    return PIL.Image.open(io.BytesIO(content))


def decoded(entry: dict[str, Any]) -> PIL.Image.Image:
    return image(base64.b64decode(entry["b64_json"]))


def data_of(answer: httpx.Response) -> list[dict[str, Any]]:
    assert answer.status_code == 200, answer.text
    return list(answer.json()["data"])


def with_header(client: httpx.Client, method: str, path: str, authorization: str) -> int:
    """Return the status of a request with a header that httpx refuses to send."""
    place = urlsplit(str(client.base_url))
    connection = http.client.HTTPConnection(place.netloc, timeout=20)
    connection.request(method, path, headers={"Authorization": authorization})
    try:
        return connection.getresponse().status
    finally:
        connection.close()


# ── Open WebUI ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("size", [{"size": "512x512"}, {"size": "1024x1024"}, {"size": "auto"}, {}])
@pytest.mark.parametrize("version", ["", "?api-version=2025-04-01-preview"])
def test_open_webui_generates(server: httpx.Client, size: dict[str, str], version: str) -> None:
    body = {"model": "gpt-image-1.5", "prompt": "a ball", "n": 2, **size}
    body |= {"response_format": "b64_json"}
    answer = server.post(GENERATIONS + version, json=body, headers={"Authorization": "Bearer none"})
    # It prefers a URL where there is one.
    assert [entry.get("url") for entry in data_of(answer)] == [None, None]
    assert decoded(data_of(answer)[1]).format == "PNG"


def test_open_webui_generates_with_a_model_that_answers_with_urls(server: httpx.Client) -> None:
    # What matches IMAGE_URL_RESPONSE_MODELS_REGEX_PATTERN is sent without response_format.
    body = {"model": "gpt-image-1", "prompt": "a ball", "n": 1, "size": "1024x1024"}
    (entry,) = data_of(server.post(GENERATIONS, json=body))
    assert decoded(entry).size == (48, 48)


def form(fields: dict[str, str], files: list[tuple[str, bytes]], boundary: str) -> bytes:
    """A form of aiohttp: its texts have a type and a charset too."""
    parts = []
    for name, text in fields.items():
        disposition = f'form-data; name="{name}"'
        head = f"Content-Type: text/plain; charset=utf-8\r\nContent-Disposition: {disposition}"
        parts.append(f"--{boundary}\r\n{head}\r\n\r\n{text}\r\n".encode())
    for name, content in files:
        disposition = f'form-data; name="{name}"; filename="c0ffee.png"'
        head = f"Content-Type: image/png\r\nContent-Disposition: {disposition}"
        parts.append(f"--{boundary}\r\n{head}\r\n\r\n".encode() + content + b"\r\n")
    return b"".join(parts) + f"--{boundary}--\r\n".encode()


@pytest.mark.parametrize("names", [["image"], ["image[]"], ["image[]"] * 3])
def test_open_webui_edits(server: httpx.Client, names: list[str]) -> None:
    fields = {"model": "gpt-image-1", "prompt": "a blue ball", "n": "1", "size": "1024x1024"}
    fields |= {"background": "auto", "response_format": "b64_json"}
    boundary = "8b1a9953c4611296a827abf8c47804d7"
    content = form(fields, [(name, png(noise())) for name in names], boundary)
    headers = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
    (entry,) = data_of(server.post(EDITS, content=content, headers=headers))
    assert decoded(entry).format == "PNG"


def test_open_webui_draws_by_automatic1111(server: httpx.Client) -> None:
    # It sends the header although it has no password.
    headers = {"Authorization": ""}
    options = server.get(f"{SD}/options", headers=headers).json()
    models = server.get(f"{SD}/sd-models", headers=headers).json()
    assert models[0]["title"] == options["sd_model_checkpoint"]
    # All options come back, one of them changed.
    options["sd_model_checkpoint"] = models[0]["title"]
    assert server.post(f"{SD}/options", json=options, headers=headers).status_code == 200
    body = {"prompt": "a ball", "batch_size": 1, "width": 512, "height": 512, "steps": 50}
    body |= {"negative_prompt": "blur", "sampler_name": "Euler", "scheduler": "Simple"}
    answer = server.post(f"{SD}/txt2img", json={**body, "cfg_scale": 7}, headers=headers).json()
    assert image(base64.b64decode(answer["images"][0])).size == (48, 48)
    assert isinstance(answer["info"], str)


# ── LibreChat ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("size", ["1024x1024", "1792x1024", "1024x1792"])
def test_librechat_s_dall_e_tool_reads_a_url_that_it_did_not_ask_for(
    server: httpx.Client, size: str
) -> None:
    body = {"model": "dall-e-3", "quality": "standard", "style": "vivid", "size": size}
    answer = server.post(GENERATIONS, json={**body, "prompt": "a ball", "n": 1})
    (entry,) = data_of(answer)
    # The file's name in the URL is that of the saved file.
    assert entry["url"].endswith(".png")
    fetched = httpx.get(entry["url"])
    assert "x".join(map(str, image(fetched.content).size)) == answer.json()["size"]
    # Programs that read the file instead find it too.
    assert base64.b64decode(entry["b64_json"]) == fetched.content


def test_librechat_s_openai_tool_generates(server: httpx.Client) -> None:
    body = {"model": "gpt-image-1", "prompt": "a ball", "n": 1, "background": "auto"}
    body |= {"quality": "auto", "size": "auto"}
    for more in ({"output_format": "png"}, {"output_format": "webp", "output_compression": 100}):
        (entry,) = data_of(server.post(GENERATIONS, json={**body, **more}))
        assert decoded(entry).format == str(more["output_format"]).upper()
        assert "url" not in entry


def test_librechat_s_openai_tool_edits(server: httpx.Client) -> None:
    fields = {"model": "gpt-image-1", "prompt": "a ball", "quality": "auto", "size": "auto"}
    files = [("image[]", (f"{i}.webp", png(noise()), "image/webp")) for i in range(2)]
    # Axios accepts JSON before anything else.
    headers = {"Accept": "application/json, text/plain, */*"}
    (entry,) = data_of(server.post(EDITS, data=fields, files=files, headers=headers))
    assert decoded(entry).size == (64, 32)


def test_librechat_s_stable_diffusion_tool(server: httpx.Client) -> None:
    body = {"prompt": "a ball", "negative_prompt": "blur", "cfg_scale": 4.5, "steps": 22}
    answer = server.post(f"{SD}/txt2img", json={**body, "width": 1024, "height": 1024}).json()
    info = json.loads(answer["info"])
    assert (info["width"], info["height"]) == image(base64.b64decode(answer["images"][0])).size
    assert info["infotexts"][0].split("\n").pop().startswith("Steps: 12")
    assert isinstance(info["seed"], int)


# ── SillyTavern ───────────────────────────────────────────────────────────────────────────────────

# What its page asks of its own server, which passes all of it on.
SILLYTAVERN = {
    "url": "http://localhost:7860",
    "auth": "",
    "prompt": "a ball",
    "negative_prompt": "lowres, bad anatomy",
    "sampler_name": "DDIM",
    "scheduler": "normal",
    "steps": 20,
    "cfg_scale": 7,
    "width": 512,
    "height": 768,
    "restore_faces": False,
    "enable_hr": False,
    "hr_upscaler": "Latent",
    "hr_scale": 1.0,
    "denoising_strength": 0.7,
    "hr_second_pass_steps": 0,
    "override_settings": {"CLIP_stop_at_last_layers": 1},
    "override_settings_restore_afterwards": True,
    "clip_skip": 1,
    "save_images": True,
    "send_images": True,
    "do_not_save_grid": False,
    "do_not_save_samples": False,
}


@pytest.mark.parametrize(
    ("hires", "size"),
    [
        ({}, (32, 48)),
        ({"enable_hr": True}, (32, 48)),
        ({"enable_hr": True, "hr_scale": 2.0}, (64, 96)),
    ],
)
def test_sillytavern_draws(
    server: httpx.Client, hires: dict[str, Any], size: tuple[int, int]
) -> None:
    body = SILLYTAVERN | hires
    answer = server.post(f"{SD}/txt2img", json=body)
    assert answer.status_code == 200, answer.text
    assert image(base64.b64decode(answer.json()["images"][0])).size == size


def test_sillytavern_reads_lists_and_chooses_a_model(server: httpx.Client) -> None:
    # Without a password it sends the name of the scheme alone.
    for path in ("options", "upscalers", "latent-upscale-modes", "sd-vae", "samplers"):
        assert with_header(server, "GET", f"{SD}/{path}", "Basic ") == 200
    for path in ("upscalers", "latent-upscale-modes", "samplers", "schedulers"):
        assert all(isinstance(entry["name"], str) for entry in server.get(f"{SD}/{path}").json())
    title = server.get(f"{SD}/sd-models").json()[0]["title"]
    assert server.post(f"{SD}/options", json={"sd_model_checkpoint": title}).status_code == 200
    state = server.get(f"{SD}/progress").json()
    # It waits until both are zero.
    assert (state["progress"], state["state"]["job_count"]) == (0, 0)
    assert with_header(server, "POST", f"{SD}/interrupt", "Basic ") == 200


def test_sillytavern_with_a_password(fake_settings: Callable[..., Settings]) -> None:
    with opened(fake_settings(sdapi=True, sizes="nearest", api_keys=KEY)) as client:
        sent = base64.b64encode(f"user:{KEY}".encode()).decode()
        headers = {"Authorization": f"Basic {sent}"}
        assert client.post(f"{SD}/txt2img", json=SILLYTAVERN, headers=headers).status_code == 200
        assert with_header(client, "GET", f"{SD}/options", "Basic ") == 401


def test_sillytavern_s_openai_source(server: httpx.Client) -> None:
    body = {"prompt": "a ball", "model": "dall-e-3", "size": "1024x1792", "n": 1}
    body |= {"quality": "standard", "style": "vivid", "response_format": "b64_json"}
    (entry,) = data_of(server.post(GENERATIONS, json=body))
    assert set(entry) == {"b64_json", "seed"}


# ── others ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("model", ["dall-e-2", "dall-e-3", "gpt-image-1"])
@pytest.mark.parametrize("returns_urls", [False, True])
def test_n8n(server: httpx.Client, model: str, returns_urls: bool) -> None:
    body: dict[str, Any] = {"prompt": "a ball", "model": model}
    # JSON.stringify leaves out undefined.
    if model != "gpt-image-1":
        body["response_format"] = "url" if returns_urls else "b64_json"
    options = {"quality": "hd", "size": "1792x1024", "style": "natural"}
    (entry,) = data_of(server.post(GENERATIONS, json={**body, **options}))
    expected = "url" if returns_urls and model != "gpt-image-1" else "b64_json"
    assert set(entry) == {expected, "seed"}


def test_langchain_reads_urls_that_it_did_not_ask_for(server: httpx.Client) -> None:
    body = {"prompt": "a ball", "n": 2, "size": "1024x1024", "model": "dall-e-2"}
    for entry in data_of(server.post(GENERATIONS, json=body)):
        assert httpx.get(entry["url"]).headers["content-type"] == "image/png"


def test_home_assistant(server: httpx.Client) -> None:
    body = {"model": "dall-e-3", "prompt": "a ball", "size": "1024x1024", "quality": "standard"}
    body |= {"style": "vivid", "response_format": "url", "n": 1}
    (entry,) = data_of(server.post(GENERATIONS, json=body))
    assert image(httpx.get(entry["url"]).content).format == "PNG"


# ── URLs that nobody asked for ────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("fields", "forms"),
    [
        ({"model": "dall-e-3"}, {"b64_json", "url"}),
        ({"model": "openai/dall-e-3"}, {"b64_json", "url"}),
        ({"model": "dall-e-3", "response_format": None}, {"b64_json", "url"}),
        ({"model": "dall-e-3", "response_format": ""}, {"b64_json", "url"}),
        ({"model": "dall-e-3", "response_format": "b64_json"}, {"b64_json"}),
        ({"model": "dall-e-3", "response_format": "url"}, {"url"}),
        ({"model": "gpt-image-1"}, {"b64_json"}),
        ({"model": NAME}, {"b64_json"}),
        ({}, {"b64_json", "url"}),
        ({"model": None}, {"b64_json", "url"}),
        ({"model": ""}, {"b64_json", "url"}),
        ({"response_format": "b64_json"}, {"b64_json"}),
    ],
)
def test_files_and_urls_follow_the_model_unless_one_is_asked_for(
    server: httpx.Client, fields: dict[str, Any], forms: set[str]
) -> None:
    (entry,) = data_of(server.post(GENERATIONS, json={"prompt": "a ball", **fields}))
    assert set(entry) == {*forms, "seed"}


def test_edits_and_variations_follow_it_too(server: httpx.Client) -> None:
    picture, hole = png(noise()), png(white(box=(0, 0, 32, 32)))
    files = {"image": ("a.png", picture), "mask": ("m.png", hole)}
    edit = server.post(EDITS, data={"model": "dall-e-2", "prompt": "a ball"}, files=files)
    fields = {"model": "dall-e-2", "n": "2", "size": "1024x1024"}
    image = {"image": ("a.png", picture)}
    variation = server.post("/v1/images/variations", data=fields, files=image)
    for entry in (*data_of(edit), *data_of(variation)):
        assert set(entry) == {"b64_json", "url", "seed"}


def test_a_stream_has_files_alone(server: httpx.Client) -> None:
    body = {"model": "dall-e-3", "prompt": "a ball", "stream": True}
    text = server.post(GENERATIONS, json=body).text
    assert "b64_json" in text
    assert '"url"' not in text


@pytest.mark.parametrize("store", [0, 100])
def test_where_no_url_is_possible_the_file_is_enough(
    fake_settings: Callable[..., Settings], store: int
) -> None:
    settings = fake_settings(model_aliases=f"*={NAME}", url_store_bytes=store)
    with opened(settings) as client:
        body = {"model": "dall-e-3", "prompt": "a ball"}
        (entry,) = data_of(client.post(GENERATIONS, json=body))
        assert set(entry) == {"b64_json", "seed"}
        refused = client.post(GENERATIONS, json={**body, "response_format": "url"})
        assert refused.status_code == 400


# ── empty values ──────────────────────────────────────────────────────────────────────────────────

# Fields that a request cannot do without.
PICTURE = base64.b64encode(png(noise())).decode()
NEEDED: dict[str, dict[str, Any]] = {
    GENERATIONS: {"prompt": "a ball"},
    EDITS: {"prompt": "a ball", "image": PICTURE},
    "/v1/images/variations": {"image": PICTURE},
    f"{SD}/txt2img": {},
    f"{SD}/img2img": {"init_images": [PICTURE]},
    f"{SD}/extra-single-image": {"image": PICTURE},
    f"{SD}/options": {},
    "/generate": {"prompt": "a ball"},
    "/edit": {"prompt": "a ball", "image": PICTURE},
    "/upscale": {"image": PICTURE},
}


def others(client: httpx.Client, path: str) -> list[str]:
    """Return the names of all fields of an endpoint but those that it needs."""
    schema = body_schema(client.get("/openapi.json").json(), path)
    return sorted(set(schema["properties"]) - set(NEEDED[path]))


# null is no value of native fields.
@pytest.mark.parametrize(
    ("path", "empty"),
    [(path, "") for path in NEEDED]
    + [(path, None) for path in NEEDED if path.startswith(("/v1/", SD))],
)
def test_empty_values_of_all_other_fields_are_absent(
    server: httpx.Client, path: str, empty: str | None
) -> None:
    sent = NEEDED[path] | dict.fromkeys(others(server, path), empty)
    answer = server.post(path, json=sent)
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("path", [path for path in NEEDED if path.startswith(("/v1/", SD))])
def test_the_document_allows_null_where_it_is_absent(server: httpx.Client, path: str) -> None:
    fields = body_schema(server.get("/openapi.json").json(), path)["properties"]
    for name in others(server, path):
        values = fields[name].get("anyOf", [{"type": "null"}] if "type" not in fields[name] else [])
        assert {"type": "null"} in values, name


@pytest.mark.parametrize("path", [EDITS, "/v1/images/variations", "/edit", "/upscale"])
def test_so_are_those_of_a_form(server: httpx.Client, path: str) -> None:
    texts = {name: text for name, text in NEEDED[path].items() if name != "image"}
    fields = texts | dict.fromkeys(others(server, path), "")
    answer = server.post(path, data=fields, files={"image": ("a.png", png(noise()))})
    assert answer.status_code == 200, answer.text
