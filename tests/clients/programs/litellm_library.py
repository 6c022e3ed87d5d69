"""LiteLLM as a library."""

import base64
import io

import litellm
from calls import BASE, IMAGE, check, check_png, run

litellm.telemetry = False
TARGET = {"model": "openai/gpt-image-1", "api_base": BASE, "api_key": "none needed"}


def checked(answer):
    return check_png(base64.b64decode(answer.data[0].b64_json))


def generate():
    return checked(litellm.image_generation(prompt="a red ball", **TARGET))


def several():
    answer = litellm.image_generation(prompt="a red ball", n=2, **TARGET)
    check(len(answer.data) == 2)


def size():
    return checked(litellm.image_generation(prompt="a red ball", size="1024x1024", **TARGET))


def edit():
    file = io.BytesIO(IMAGE)
    file.name = "image.png"
    return checked(litellm.image_edit(image=file, prompt="a blue ball", **TARGET))


def error():
    try:
        litellm.image_generation(prompt="a red ball", n=99, **TARGET)
    except litellm.BadRequestError:
        return "BadRequestError"
    raise AssertionError("accepted")


run(generate=generate, several=several, size=size, edit=edit, error=error)
