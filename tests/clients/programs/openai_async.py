"""OpenAI's Python client, asynchronous."""

import asyncio
import base64

import openai
from calls import BASE, IMAGE, MASK, MODEL, check, check_png, run_async

client = openai.AsyncOpenAI(
    base_url=BASE, api_key="none needed", max_retries=0, _strict_response_validation=True
)


def checked(answer):
    return check_png(base64.b64decode(answer.data[0].b64_json))


async def models():
    check(MODEL in [model.id async for model in client.models.list()])


async def generate():
    return checked(await client.images.generate(prompt="a red ball"))


async def several():
    prompts = ("a red ball", "a blue box", "a green star")
    await asyncio.gather(*(client.images.generate(prompt=prompt) for prompt in prompts))
    return "3 at once"


async def edit():
    return checked(await client.images.edit(image=IMAGE, prompt="a blue ball"))


async def mask():
    return checked(await client.images.edit(image=IMAGE, mask=MASK, prompt="a blue ball"))


async def variation():
    return checked(await client.images.create_variation(image=IMAGE))


async def stream():
    events = await client.images.edit(
        image=IMAGE, prompt="show a blue ball", stream=True, partial_images=2
    )
    types = [event.type async for event in events]
    check(types[-1] == "image_edit.completed", types)
    return f"{len(types) - 1} previews"


async def error():
    try:
        await client.images.generate(prompt="a red ball", n=99)
    except openai.BadRequestError as refusal:
        return check(refusal.param == "n", refusal) or "BadRequestError"
    raise AssertionError("accepted")


asyncio.run(
    run_async(
        models=models,
        generate=generate,
        several=several,
        edit=edit,
        mask=mask,
        variation=variation,
        stream=stream,
        error=error,
    )
)
