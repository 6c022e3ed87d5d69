"""Draw the middle of an image again, and keep the rest bit for bit: python inpaint.py [URL]"""

import io
import os
import sys
from pathlib import Path

import httpx
from PIL import Image

default = os.environ.get("PAELLERA_CLIENT_URL", "http://127.0.0.1:8000")
url = sys.argv[1] if len(sys.argv) > 1 else default
key = os.environ.get("PAELLERA_CLIENT_KEY")
headers = {"Authorization": f"Bearer {key}"} if key else {}

with httpx.Client(base_url=url, headers=headers, timeout=60) as client:
    apple = (
        client.post("/generate", json={"prompt": "a red apple on a white background", "seed": 7})
        .raise_for_status()
        .content
    )
    width, height = Image.open(io.BytesIO(apple)).size

    mask = Image.new("L", (width, height), 0)
    mask.paste(
        255, (width // 8, height // 8, width - width // 8, height - height // 8)
    )  # white is drawn anew
    mask.save("mask.png")

    answer = client.post(
        "/inpaint",
        data={"prompt": "a yellow star on a white background", "seed": "7"},
        files={"image": apple, "mask": Path("mask.png").read_bytes()},
    ).raise_for_status()

Path("before.png").write_bytes(apple)
Path("after.png").write_bytes(answer.content)
print("before.png mask.png after.png")
