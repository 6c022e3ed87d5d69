"""A hundred images, as many at once as the server steps together, each in a file of its own:
python batch.py [URL] [COUNT]

Batch work makes room for interactive work. Rejected requests are sent again when the server says.
"""

import asyncio
import os
import sys
import time
from pathlib import Path

import httpx

default = os.environ.get("PAELLERA_CLIENT_URL", "http://127.0.0.1:8000")
url = sys.argv[1] if len(sys.argv) > 1 else default
key = os.environ.get("PAELLERA_CLIENT_KEY")
headers = {"Authorization": f"Bearer {key}"} if key else {}
count = int(sys.argv[2]) if len(sys.argv) > 2 else 100
AT_ONCE = 16


async def draw(client: httpx.AsyncClient, places: asyncio.Semaphore, seed: int) -> bytes:
    body = {
        "prompt": "a small blue circle on a yellow background",
        "seed": seed,
        "priority": "batch",
        "timeout_s": 600,
    }
    async with places:
        answer = await client.post("/generate", json=body)
    if answer.status_code == 429:
        await asyncio.sleep(int(answer.headers["retry-after-ms"]) / 1000)
        return await draw(client, places, seed)
    return answer.raise_for_status().content


async def draw_all() -> list[bytes]:
    places = asyncio.Semaphore(AT_ONCE)
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=660) as client:
        return await asyncio.gather(*(draw(client, places, seed) for seed in range(count)))


began = time.perf_counter()
images = asyncio.run(draw_all())
print(f"{count} images, {count / (time.perf_counter() - began):.1f} a second")
for seed, image in enumerate(images):
    Path(f"circle-{seed}.png").write_bytes(image)
