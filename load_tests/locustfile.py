"""Define clients for Locust: one image after the other, all operations mixed, bursts of requests.

    locust -f load_tests/locustfile.py --headless --users 8 --host URL MixedOperations
    python -m load_tests.scenarios

A rejection with a Retry-After header is no failure: the client waits for that time.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, ClassVar

import gevent
import PIL.Image
from locust import HttpUser, between

from load_tests.prompts import prompts
from load_tests.serving import Sizes
from load_tests.traffic import refused_honestly

STEPS = 8
BURST = 8
NEW_PROMPTS = prompts()


@lru_cache(maxsize=1)
def native_size(host: str) -> tuple[int, int]:
    """Return (width, height) of the server's default model in pixels."""
    return Sizes.of(host).native


@lru_cache(maxsize=2)
def picture(size: tuple[int, int], mode: str) -> str:
    """Return a PNG in base64: a gradient, or with mode L a mask with its lower half white."""
    gradient = PIL.Image.linear_gradient("L").resize(size)
    image = (
        gradient.point(lambda value: 255 * (value > 127)) if mode == "L" else gradient.convert(mode)
    )
    file = io.BytesIO()
    image.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def image(user: HttpUser) -> str:
    """Return an image of the native size."""
    return picture(native_size(user.host), "RGB")


def ask(user: HttpUser, operation: str, fields: Mapping[str, Any]) -> None:
    """Post the fields with a new prompt. Waits if the server asks for it."""
    body = {"num_inference_steps": STEPS, "timeout_s": 60, "prompt": next(NEW_PROMPTS), **fields}
    with user.client.post(f"/{operation}", json=body, catch_response=True) as answer:
        if refused_honestly(answer.status_code, answer.headers):
            answer.success()
            gevent.sleep(float(answer.headers["retry-after"]))


def generate(user: HttpUser) -> None:
    ask(user, "generate", {})


def inpaint(user: HttpUser) -> None:
    ask(user, "inpaint", {"image": image(user), "mask": picture(native_size(user.host), "L")})


def outpaint(user: HttpUser) -> None:
    width, _ = native_size(user.host)
    ask(user, "outpaint", {"image": image(user), "right": width // 2})


def edit(user: HttpUser) -> None:
    ask(user, "edit", {"image": image(user), "strength": 0.5})


def vary(user: HttpUser) -> None:
    ask(user, "variations", {"image": image(user), "n": 2})


def interpolate(user: HttpUser) -> None:
    ends = [{"prompt": next(NEW_PROMPTS)} for _ in range(2)]
    ask(user, "interpolate", {"keyframes": ends, "frames": 4, "prompt": ""})


def list_models(user: HttpUser) -> None:
    user.client.get("/v1/models")


def burst(user: HttpUser) -> None:
    """Send a number of requests at once, and wait for all answers."""
    gevent.joinall([gevent.spawn(generate, user) for _ in range(BURST)], raise_error=True)


class Generate(HttpUser):  # type: ignore[misc]
    """A user who looks at each image before they request the next."""

    wait_time = between(0.2, 1)
    tasks: ClassVar = {generate: 1}


class MixedOperations(HttpUser):  # type: ignore[misc]
    """A user who edits an image."""

    wait_time = between(0.2, 1)
    tasks: ClassVar = {
        generate: 6,
        inpaint: 2,
        outpaint: 1,
        edit: 2,
        vary: 1,
        interpolate: 1,
        list_models: 1,
    }


class Bursts(HttpUser):  # type: ignore[misc]
    """A script that requests everything at once, then pauses."""

    wait_time = between(1, 3)
    tasks: ClassVar = {burst: 1}
