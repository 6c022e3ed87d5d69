"""Four images of a prompt, by plain HTTP: python generate.py [URL]"""

import base64
import os
import sys
from pathlib import Path

import httpx

default = os.environ.get("PAELLERA_CLIENT_URL", "http://127.0.0.1:8000")
url = sys.argv[1] if len(sys.argv) > 1 else default
key = os.environ.get("PAELLERA_CLIENT_KEY")
headers = {"Authorization": f"Bearer {key}"} if key else {}

answer = httpx.post(
    f"{url}/generate",
    json={
        "prompt": "a yellow star on a blue background",
        "negative_prompt": "red",
        "seed": 7,
        "n": 4,
    },
    headers=headers,
    timeout=60,
)
answer.raise_for_status()
for image in answer.json()["images"]:
    path = Path(f"star-{image['seed']}.png")
    path.write_bytes(base64.b64decode(image["b64_json"]))
    print(path)
print(answer.headers["server-timing"])
