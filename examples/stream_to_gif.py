"""Save the previews of an image as an animation: python stream_to_gif.py [URL]"""

import base64
import io
import json
import os
import sys

import httpx
from PIL import Image

default = os.environ.get("PAELLERA_CLIENT_URL", "http://127.0.0.1:8000")
url = sys.argv[1] if len(sys.argv) > 1 else default
key = os.environ.get("PAELLERA_CLIENT_KEY")
headers = {"Authorization": f"Bearer {key}"} if key else {}

frames: list[Image.Image] = []
body = {
    "prompt": "a cat on a blue background",
    "seed": 7,
    "num_inference_steps": 12,
    "stream": True,
    "partial_images": 8,
}
with httpx.stream("POST", f"{url}/generate", json=body, headers=headers, timeout=60) as answer:
    answer.raise_for_status()
    for line in answer.iter_lines():
        name, _, value = line.partition(": ")
        if name == "event":
            print(value)
        elif name == "data":
            event = json.loads(value)
            if "error" in event:
                sys.exit(event["error"]["message"])
            files = [
                image["b64_json"] for image in event.get("images", [event]) if "b64_json" in image
            ]
            frames += [
                Image.open(io.BytesIO(base64.b64decode(file))).convert("RGB") for file in files
            ]

frames[0].save(
    "cat.gif",
    save_all=True,
    append_images=frames[1:],
    duration=[150] * (len(frames) - 1) + [1500],
    loop=0,
)
print("cat.gif")
