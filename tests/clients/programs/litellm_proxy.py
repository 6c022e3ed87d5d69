"""LiteLLM's proxy between OpenAI's client and the server, configured as in docs/clients.md."""

import base64
import contextlib
import os
import secrets
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import openai
from calls import IMAGE, check, check_png, run

# Without one it does not start, whoever may reach it.
KEY = f"sk-{secrets.token_hex(32)}"


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def wait_for(url, seconds=120):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5):
            return
        time.sleep(0.5)
    raise TimeoutError(url)


port = free_port()
command = [Path(sys.executable).with_name("litellm"), "--config", "snippet.yaml"]
with open("litellm.log", "wb") as log:
    proxy = subprocess.Popen(
        [*command, "--host", "127.0.0.1", "--port", str(port)],
        stdout=log,
        stderr=log,
        env=os.environ | {"LITELLM_MASTER_KEY": KEY, "LITELLM_LOCAL_MODEL_COST_MAP": "True"},
    )
try:
    wait_for(f"http://127.0.0.1:{port}/health/liveliness")
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=KEY, max_retries=0)

    def checked(answer):
        return check_png(base64.b64decode(answer.data[0].b64_json))

    def models():
        check("paella" in [model.id for model in client.models.list()])

    def generate():
        return checked(client.images.generate(model="paella", prompt="a red ball"))

    def edit():
        image = ("image.png", IMAGE)
        return checked(client.images.edit(model="paella", image=image, prompt="a blue ball"))

    run(models=models, generate=generate, edit=edit)
finally:
    proxy.terminate()
    proxy.wait(30)
