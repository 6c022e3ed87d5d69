"""From one prompt to another and on to a third, as an animation: python interpolate.py [URL]"""

import os
import sys
from pathlib import Path

import httpx

default = os.environ.get("PAELLERA_CLIENT_URL", "http://127.0.0.1:8000")
url = sys.argv[1] if len(sys.argv) > 1 else default
key = os.environ.get("PAELLERA_CLIENT_KEY")
headers = {"Authorization": f"Bearer {key}"} if key else {}

prompts = (
    "a red apple on a white background",
    "a yellow star on a white background",
    "a cat on a white background",
)
answer = httpx.post(
    f"{url}/interpolate",
    json={
        "keyframes": [{"prompt": prompt} for prompt in prompts],
        "frames": 13,
        "mode": "slerp",
        "seed": 7,
        "response_format": "gif",
    },
    headers=headers,
    timeout=60,
)
Path("way.gif").write_bytes(answer.raise_for_status().content)
print("way.gif")
