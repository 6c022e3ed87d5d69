"""A picture and an edit of it with OpenAI's own client, which is only told another address:
python openai_client.py [URL]
"""

import base64
import os
import sys
from pathlib import Path

from openai import OpenAI

url = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("PAELLERA_URL", "http://127.0.0.1:8000")

with OpenAI(
    base_url=f"{url}/v1", api_key=os.environ.get("PAELLERA_API_KEY", "none needed")
) as client:
    drawn = client.images.generate(
        prompt="a red apple on a white background", extra_body={"seed": 7}
    )
    apple = base64.b64decode(drawn.data[0].b64_json)
    Path("apple.png").write_bytes(apple)
    edited = client.images.edit(
        image=apple, prompt="a green apple on a white background", extra_body={"strength": 0.7}
    )
    Path("edited.png").write_bytes(base64.b64decode(edited.data[0].b64_json))
print("apple.png edited.png", drawn.usage.to_json(indent=None))
