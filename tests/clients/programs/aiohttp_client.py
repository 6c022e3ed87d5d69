"""aiohttp, and the requests that Open WebUI makes with it."""

import asyncio
import base64
import io

import aiohttp
from calls import ADDRESS, BASE, IMAGE, MODEL, check, check_png, run_async

session: aiohttp.ClientSession
KEY = {"Authorization": "Bearer none"}


async def answered(request):
    async with request as answer:
        content = await answer.read()
        check(answer.status == 200, answer.status, content[:300])
        return await answer.json(content_type=None)


def decoded(answer, index=0):
    return check_png(base64.b64decode(answer["data"][index]["b64_json"]))


async def models():
    answer = await answered(session.get(f"{BASE}/models", headers=KEY))
    check(MODEL in [model["id"] for model in answer["data"]], answer)


async def generations(**fields):
    data = {"model": "gpt-image-1", "prompt": "a red ball", "n": 1, **fields}
    return await answered(session.post(f"{BASE}/images/generations", json=data, headers=KEY))


async def generate():
    return decoded(await generations(response_format="b64_json"))


async def several():
    return decoded(await generations(n=2), 1)


async def size():
    return decoded(await generations(size="1024x1024", response_format="b64_json"))


async def url():
    (entry,) = (await generations(response_format="url"))["data"]
    async with session.get(entry["url"], headers=KEY) as answer:
        check(answer.headers["content-type"] == "image/png", answer.headers)
        return check_png(await answer.read())


async def edit():
    form = aiohttp.FormData()
    fields = {"model": "gpt-image-1", "prompt": "a blue ball", "n": 1, "size": "1024x1024"}
    for name, value in {**fields, "response_format": "b64_json"}.items():
        form.add_field(name, str(value))
    for number in range(2):
        file = io.BytesIO(IMAGE)
        form.add_field("image[]", file, filename=f"{number}.png", content_type="image/png")
    return decoded(await answered(session.post(f"{BASE}/images/edits", data=form, headers=KEY)))


async def sdapi():
    # Open WebUI sends the header although there is no password.
    headers = {"authorization": ""}
    base = f"{ADDRESS}/sdapi/v1"
    options = await answered(session.get(f"{base}/options", headers=headers))
    models = await answered(session.get(f"{base}/sd-models", headers=headers))
    options["sd_model_checkpoint"] = models[0]["title"]
    await answered(session.post(f"{base}/options", json=options, headers=headers))
    fields = {"prompt": "a red ball", "batch_size": 1, "width": 512, "height": 512, "steps": 50}
    answer = await answered(session.post(f"{base}/txt2img", json=fields, headers=headers))
    return check_png(base64.b64decode(answer["images"][0]))


async def error():
    data = {"prompt": "a red ball", "n": 99}
    async with session.post(f"{BASE}/images/generations", json=data) as answer:
        check(answer.status == 400, answer.status)


async def main():
    global session
    async with aiohttp.ClientSession() as session:
        await run_async(
            models=models,
            generate=generate,
            several=several,
            size=size,
            url=url,
            edit=edit,
            sdapi=sdapi,
            error=error,
        )


asyncio.run(main())
