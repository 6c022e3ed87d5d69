"""A prompt for the whole image, and others for its halves: python regions.py [URL]"""

import os
import sys
from pathlib import Path

import httpx

default = os.environ.get("PAELLERA_CLIENT_URL", "http://127.0.0.1:8000")
url = sys.argv[1] if len(sys.argv) > 1 else default
key = os.environ.get("PAELLERA_CLIENT_KEY")
headers = {"Authorization": f"Bearer {key}"} if key else {}

models = httpx.get(f"{url}/v1/models", headers=headers).raise_for_status().json()["data"]
width, height = models[0]["native_size"]
answer = httpx.post(
    f"{url}/generate",
    json={
        "prompt": "a white background",
        "regions": [
            {"prompt": "a red apple on a white background", "box": [0, 0, 0.5, 1], "softness": 0.1},
            {
                "prompt": "a blue square on a white background",
                "box": [0.5, 0, 1, 1],
                "softness": 0.1,
            },
        ],
        "width": 2 * width,
        "height": height,
        "seed": 7,
    },
    headers=headers,
    timeout=60,
)
Path("halves.png").write_bytes(answer.raise_for_status().content)
print("halves.png")
