"""Tell Schemathesis which strings are images, and make most valid requests small."""

from __future__ import annotations

import base64
import io
import os
import re
import zlib
from typing import Any

import httpx
import PIL.Image
import schemathesis
from hypothesis import strategies

# The smallest possible side in pixels, from `load_tests.fuzz`.
SIDE = int(os.environ.get("FUZZ_SIDE", "64"))
STEPS, FRAMES = 4, 3
# Why a request that fits the document may be refused all the same: what fields, images and
# weights ask of each other.
SEMANTIC = (
    "multiple of",
    "needs a prompt or an image, and not both",
    "needs a box or a mask, and not both",
    "a box is ",
    "required, unless the image is transparent",
    "required: the image to edit",
    "send image or images, not both",
    "file_id is not supported",
    "not supported; leave it out",
    "must be the result's",
    "at least one of left, right, up and down",
    "one for each image",
    "nothing to repaint",
    "must be as large as the image",
    "this request costs",
    "base64",
    "must be a PNG",
    "is damaged",
    "frames of a stream are",
    "must be a multiple",
    "may have at most",
    "have no URL",
    "images are png, jpeg or webp",
    "images are opaque",
    "a png has no quality",
    "supports auto",
    "num_inference_steps, which is",
    "another request was sent with this key",
    "the store for URLs",
    "may be 1 to 4 times as large",
    "when multiplied by n_iter",
    "must be the name of a model",
    "must be absent beside guidance_start",
    "to draw with these weights",
)
# The document allows null for JSON. Written into a form it is the text "null", which is no null.
NULL_IN_A_FORM = "(sent: 'null')"
IDEMPOTENCY_KEY = "Idempotency-Key"
SDAPI = "/sdapi/"
# Fields of any endpoint.
NAMES: set[str] = set()
MARGINS = ("left", "right", "up", "down")


def images() -> list[str]:
    """Return small files of all formats in base64, with transparency and without."""
    found = []
    for format, mode in (
        ("PNG", "RGB"),
        ("PNG", "RGBA"),
        ("PNG", "L"),
        ("JPEG", "RGB"),
        ("WEBP", "RGBA"),
        ("GIF", "P"),
    ):
        file = io.BytesIO()
        PIL.Image.linear_gradient("L").resize((SIDE, SIDE)).convert(mode).save(file, format)
        found.append(base64.b64encode(file.getvalue()).decode())
    return found


IMAGES = images()


def before_load_schema(context: Any, raw_schema: dict[str, Any]) -> None:
    """Say what the document says in words: which strings are images, that blank is absent."""
    _mark(raw_schema)
    bodies = dict[str, dict[str, Any]]()
    for methods in raw_schema["paths"].values():
        for operation in methods.values():
            for body in operation.get("requestBody", {}).get("content", {}).values():
                name = body["schema"]["$ref"].rpartition("/")[2]
                bodies[name] = raw_schema["components"]["schemas"][name]
    for schema in bodies.values():
        _allow_blank(schema)


def _allow_blank(schema: dict[str, Any]) -> None:
    """Allow empty text in all optional fields."""
    properties = schema.get("properties", {})
    for name in properties.keys() - schema.get("required", ()):
        properties[name] = {"anyOf": [properties[name], {"const": ""}]}
    NAMES.update(properties)


def _mark(value: Any) -> None:
    for inner in (
        value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    ):
        _mark(inner)
    if (
        isinstance(value, dict)
        and value.get("type") == "string"
        and "base64" in value.get("description", "").lower()
    ):
        value["format"] = "image"


def refused_for_a_reason(context: Any, response: Any, case: Any) -> None:
    """Check a refusal.

    Raises AssertionError if a request that fits the document is rejected for a rule that the
    document could have stated.
    """
    if (
        case.meta is None
        or not case.meta.generation.mode.is_positive
        or response.status_code not in (400, 413, 415, 422)
    ):
        return
    message = response.json()["error"]["message"]
    if message.endswith(NULL_IN_A_FORM) and "multipart" in response.request.headers["Content-Type"]:
        return
    assert any(re.search(reason, message) for reason in SEMANTIC), f"valid, but refused: {message}"


def same_answer_to_a_repeat(context: Any, response: Any, case: Any) -> None:
    """Send a successful request with an Idempotency-Key again.

    Raises AssertionError if the repeat gets another answer.
    """
    sent = response.request
    if IDEMPOTENCY_KEY not in sent.headers or response.status_code != httpx.codes.OK:
        return
    headers = dict(sent.headers)
    again = httpx.request(sent.method, sent.url, headers=headers, content=sent.body, timeout=300)
    assert again.headers.get("idempotent-replayed") == "true", "a repeat was drawn again"
    if "text/event-stream" not in again.headers["content-type"]:
        assert again.content == response.content, "a repeat got another answer"


def stored_images_are_served(context: Any, response: Any, case: Any) -> None:
    """Fetch the images that a JSON answer has URLs of.

    Raises AssertionError if one of them is not there.
    """
    if response.headers.get("content-type") != ["application/json"]:
        return
    answer = response.json()
    entries = (answer.get("images") or answer.get("data") or ()) if isinstance(answer, dict) else ()
    for url in (entry.get("url") for entry in entries if isinstance(entry, dict)):
        if url is not None:
            fetched = httpx.get(url, timeout=30)
            assert fetched.status_code == httpx.codes.OK, f"a stored image: {fetched.text}"
            assert fetched.headers["content-type"].startswith("image/")


def before_call(context: Any, case: Any, kwargs: dict[str, Any]) -> None:
    """Make 90 % of valid requests cheap, so that thousands of images are drawn."""
    if isinstance(case.body, dict):
        # Blank values of unknown fields are ignored, so only others make a request invalid.
        blank = [name for name, value in case.body.items() if value in (None, "")]
        case.body |= {name: "x" for name in blank if name not in NAMES}
    _use_own_key(case)
    if (
        case.meta is None
        or not case.meta.generation.mode.is_positive
        or not isinstance(case.body, dict)
    ):
        return
    if "timeout_s" in case.body:
        case.body["timeout_s"] = 300
    if zlib.crc32(case.id.encode()) % 10:
        _shrink(case.body, case.operation.path)


def _use_own_key(case: Any) -> None:
    """Replace most valid keys: the document's bounds are the same few values in every request."""
    is_valid = case.meta is not None and case.meta.generation.mode.is_positive
    has_key = case.headers and IDEMPOTENCY_KEY in case.headers
    if is_valid and has_key and zlib.crc32(case.id.encode()) % 10:
        case.headers[IDEMPOTENCY_KEY] = case.id


def _shrink(body: dict[str, Any], path: str) -> None:
    """Set fields to values that are cheap and fit together, whatever the other fields are."""
    if path.startswith(SDAPI):
        _shrink_sdapi(body, path)
        return
    body.pop("model", None)
    body["num_inference_steps"] = STEPS
    body |= {
        name: min(body[name] or 0, STEPS)
        for name in ("renoise_steps", "guidance_steps")
        if name in body
    }
    for entry in body.get("regions") or ():
        entry.pop("mask", None)
        entry["box"] = [0, 0, 0.5, 1]
    if path.startswith("/v1/"):
        _shrink_openai(body, path)
    else:
        _shrink_native(body, path)


def _shrink_native(body: dict[str, Any], path: str) -> None:
    if path in ("/generate", "/variations", "/interpolate"):
        body |= {"width": SIDE, "height": SIDE}
    else:
        body.pop("width", None)
        body.pop("height", None)
    match path:
        case "/inpaint":
            body |= {"image": IMAGES[0], "mask": IMAGES[2], "mask_mode": "luminance"}
        case "/outpaint":
            body |= {side: SIDE * bool(body.get(side)) for side in MARGINS} | {"right": SIDE}
        case "/variations":
            body.pop("weights", None)
        case "/generate" if body.get("hires"):
            body["hires"] = {"scale": 2, "steps": STEPS}
        case "/upscale":
            body |= {"image": IMAGES[0], "scale": min(body.get("scale", 2), 2)}
        case "/interpolate":
            body |= {
                "frames": FRAMES,
                "keyframes": [{"prompt": "a red ball"}, {"image": IMAGES[0]}],
            }


def _shrink_openai(body: dict[str, Any], path: str) -> None:
    for name in ("output_format", "output_compression", "background"):
        body.pop(name, None)
    body["size"] = f"{SIDE}x{SIDE}"
    if path == "/v1/images/edits" and body.get("mask"):
        body |= {
            "size": "auto",
            "image": IMAGES[0],
            "mask": IMAGES[2],
            "mask_mode": "luminance",
        }


def _shrink_sdapi(body: dict[str, Any], path: str) -> None:
    match path.removeprefix(SDAPI):
        case "v1/txt2img" | "v1/img2img":
            body |= {"steps": STEPS, "width": SIDE, "height": SIDE, "batch_size": 1, "n_iter": 1}
            for name in ("override_settings", "hr_resize_x", "hr_resize_y"):
                body.pop(name, None)
            body |= {"hr_scale": 2} if body.get("enable_hr") else {}
            body |= {"init_images": [IMAGES[0]]} if "init_images" in body else {}
            body |= {"mask": IMAGES[2]} if body.get("mask") else {}
        case "v1/extra-single-image":
            body |= {"image": IMAGES[0], "resize_mode": 0, "upscaling_resize": 1.5}
        case "v1/extra-batch-images":
            body |= {"imageList": [{"data": IMAGES[0], "name": "a"}]}
            body |= {"resize_mode": 0, "upscaling_resize": 1.5}
        case "v1/options":
            # Others would answer all later requests of this client with 404.
            body.pop("sd_model_checkpoint", None)


schemathesis.openapi.format("image", strategies.sampled_from(IMAGES))
schemathesis.hook(before_load_schema)
schemathesis.hook(before_call)
schemathesis.check(refused_for_a_reason)
schemathesis.check(same_answer_to_a_repeat)
schemathesis.check(stored_images_are_served)
