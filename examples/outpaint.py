"""A picture continued to both sides: python outpaint.py [URL]"""

import os
import sys
from pathlib import Path

import httpx

url = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("PAELLERA_URL", "http://127.0.0.1:8000")

with httpx.Client(base_url=url, timeout=60) as client:
    apple = (
        client.post("/generate", json={"prompt": "a red apple on a blue background", "seed": 7})
        .raise_for_status()
        .content
    )
    # Without a prompt the picture itself says what it shows.
    wide = (
        client.post(
            "/outpaint", data={"left": "64", "right": "64", "seed": "7"}, files={"image": apple}
        )
        .raise_for_status()
        .content
    )

Path("wide.png").write_bytes(wide)
print("wide.png")
