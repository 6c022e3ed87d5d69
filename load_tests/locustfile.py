"""Clients for Locust: one picture after the other, all operations mixed, many requests at once.

    locust -f load_tests/locustfile.py --headless --users 8 --run-time 60s --host
    http://127.0.0.1:8000 MixedOperations python -m load_tests.scenarios

A refusal that says when to come back is no failure: the client waits for so long.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from typing import Any, ClassVar

import gevent
import PIL.Image
from locust import HttpUser, between

from load_tests.prompts import prompts
from load_tests.traffic import refused_honestly

SIDE, STEPS = 128, 8
BURST = 8
NEW_PROMPTS = prompts()


def picture(mode: str) -> str:
    """Base64 of a PNG: a gradient, or with mode L a mask whose lower half is white."""
    gradient = PIL.Image.linear_gradient("L").resize((SIDE, SIDE))
    image = (
        gradient.point(lambda value: 255 * (value > 127)) if mode == "L" else gradient.convert(mode)
    )
    file = io.BytesIO()
    image.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


IMAGE, MASK = picture("RGB"), picture("L")


def ask(user: HttpUser, operation: str, fields: Mapping[str, Any]) -> None:
    """Posts the fields with a new prompt. Waits if the server says so."""
    body = {"num_inference_steps": STEPS, "timeout_s": 60, "prompt": next(NEW_PROMPTS), **fields}
    with user.client.post(f"/{operation}", json=body, catch_response=True) as answer:
        if refused_honestly(answer.status_code, answer.headers):
            answer.success()
            gevent.sleep(float(answer.headers["retry-after"]))


def generate(user: HttpUser) -> None:
    ask(user, "generate", {"width": SIDE, "height": SIDE})


def inpaint(user: HttpUser) -> None:
    ask(user, "inpaint", {"image": IMAGE, "mask": MASK})


def outpaint(user: HttpUser) -> None:
    ask(user, "outpaint", {"image": IMAGE, "right": 64})


def edit(user: HttpUser) -> None:
    ask(user, "edit", {"image": IMAGE, "strength": 0.5})


def vary(user: HttpUser) -> None:
    ask(user, "variations", {"image": IMAGE, "n": 2})


def interpolate(user: HttpUser) -> None:
    ends = [{"prompt": next(NEW_PROMPTS)} for _ in range(2)]
    ask(user, "interpolate", {"keyframes": ends, "frames": 4, "prompt": ""})


def list_models(user: HttpUser) -> None:
    user.client.get("/v1/models")


def burst(user: HttpUser) -> None:
    """So many at once; the next ones when the last is answered."""
    gevent.joinall([gevent.spawn(generate, user) for _ in range(BURST)], raise_error=True)


class Generate(HttpUser):  # type: ignore[misc]
    """Somebody who looks at each picture before they ask for the next."""

    wait_time = between(0.2, 1)
    tasks: ClassVar = {generate: 1}


class MixedOperations(HttpUser):  # type: ignore[misc]
    """Somebody at work on a picture."""

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
    """A script that asks for everything at once, and is silent for a while."""

    wait_time = between(1, 3)
    tasks: ClassVar = {burst: 1}
