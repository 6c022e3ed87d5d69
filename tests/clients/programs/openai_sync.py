"""OpenAI's Python client."""

import base64

import openai
from calls import BASE, IMAGE, MASK, MODEL, check, check_png, fetched, run

client = openai.OpenAI(
    base_url=BASE, api_key="none needed", max_retries=0, _strict_response_validation=True
)


def decoded(answer, index=0):
    return base64.b64decode(answer.data[index].b64_json)


def models():
    names = [model.id for model in client.models.list()]
    check(MODEL in names, names)
    return client.models.retrieve(MODEL).id


def generate():
    answer = client.images.generate(prompt="a red ball", size="auto", extra_body={"seed": 7})
    return check_png(decoded(answer))


def several():
    answer = client.images.generate(prompt="a red ball", n=2)
    check(len(answer.data) == 2)
    return check_png(decoded(answer, 1))


def other_size():
    answer = client.images.generate(model="dall-e-3", prompt="a red ball", size="1024x1024")
    return f"1024x1024 → {answer.size}"


def url():
    answer = client.images.generate(prompt="a red ball", response_format="url")
    return check_png(fetched(answer.data[0].url))


def edit():
    return check_png(decoded(client.images.edit(image=IMAGE, prompt="a blue ball")))


def mask():
    answer = client.images.edit(image=[IMAGE, IMAGE], mask=MASK, prompt="a blue ball")
    return check_png(decoded(answer), (64, 64))


def variation():
    return check_png(decoded(client.images.create_variation(image=IMAGE)))


def stream():
    events = list(client.images.generate(prompt="show a red ball", stream=True, partial_images=2))
    check(events[-1].type == "image_generation.completed", events[-1].type)
    return f"{len(events) - 1} previews"


def error():
    try:
        client.images.generate(prompt="a red ball", n=99)
    except openai.BadRequestError as refusal:
        check(refusal.param == "n", refusal)
        return "BadRequestError"
    raise AssertionError("accepted")


run(
    models=models,
    generate=generate,
    several=several,
    size=other_size,
    url=url,
    edit=edit,
    mask=mask,
    variation=variation,
    stream=stream,
    error=error,
)
