"""Continue an image on both sides: python outpaint.py [URL]"""

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
        client.post("/generate", json={"prompt": "a red apple on a blue background", "seed": 7})
        .raise_for_status()
        .content
    )
    half = str(Image.open(io.BytesIO(apple)).width // 2)
    # Without a prompt the image itself is the prompt.
    wide = (
        client.post(
            "/outpaint", data={"left": half, "right": half, "seed": "7"}, files={"image": apple}
        )
        .raise_for_status()
        .content
    )

Path("wide.png").write_bytes(wide)
print("wide.png")
