"""webuiapi, the usual Python client of AUTOMATIC1111's web UI."""

import io
import threading
import time
from urllib.parse import urlsplit

import webuiapi
from calls import ADDRESS, IMAGE, check, run
from PIL import Image, ImageDraw

place = urlsplit(ADDRESS)
api = webuiapi.WebUIApi(host=place.hostname, port=place.port, sampler="Euler a", steps=20)
image = Image.open(io.BytesIO(IMAGE)).convert("RGB")


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        check(time.monotonic() < deadline, "waited in vain")
        time.sleep(0.02)


def models():
    return api.util_get_model_names()[0]


def generate():
    result = api.txt2img(prompt="a red ball", seed=7, width=512, height=512, cfg_scale=7)
    check(result.info["seed"] == 7, result.info)
    return f"{result.image.size[0]}x{result.image.size[1]}"


def several():
    check(len(api.txt2img(prompt="a red ball", batch_size=2).images) == 2)


def edit():
    result = api.img2img(images=[image], prompt="a blue ball", denoising_strength=0.6)
    return f"{result.image.size[0]}x{result.image.size[1]}"


def mask():
    hole = Image.new("L", image.size)
    ImageDraw.Draw(hole).rectangle((16, 16, 47, 47), fill=255)
    api.img2img(images=[image], mask_image=hole, prompt="a blue ball", mask_blur=4)


def upscale():
    result = api.extra_single_image(image, upscaling_resize=2)
    check(result.image.size == (128, 128), result.image.size)


def info():
    result = api.txt2img(prompt="a red ball", seed=7)
    check("Seed: 7" in api.png_info(result.image).info)


def progress():
    answers, previews = [], 0
    # The tests' worker draws previews, then nothing more until the request is cancelled.
    fields = {"prompt": "show-hold", "batch_size": 4}
    thread = threading.Thread(target=lambda: answers.append(api.txt2img(**fields)))
    # Earlier requests have ended, and this one is not interrupted before it has begun.
    wait_for(lambda: api.get_progress()["state"]["job_count"] == 0)
    thread.start()
    wait_for(lambda: api.get_progress()["state"]["job_count"] == 1)
    deadline = time.monotonic() + 60
    while thread.is_alive() and time.monotonic() < deadline:
        if api.get_progress()["current_image"]:
            previews += 1
            api.interrupt()
        time.sleep(0.05)
    check(answers, "not interrupted")
    check(previews, "no preview")
    check(api.get_progress()["state"]["job_count"] == 0, "still running")
    return f"{previews} previews, {len(answers[0].images)} images"


def refresh():
    api.refresh_checkpoints()
    api.skip()


def options():
    api.set_options({"sd_model_checkpoint": models()})
    return api.get_options()["sd_model_checkpoint"]


run(
    models=models,
    generate=generate,
    several=several,
    edit=edit,
    mask=mask,
    upscale=upscale,
    info=info,
    progress=progress,
    options=options,
    refresh=refresh,
)
