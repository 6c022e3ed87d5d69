"""Generate an image and edit it with OpenAI's own client, at another address:
python openai_client.py [URL]
"""

import base64
import os
import sys
from pathlib import Path

from openai import OpenAI

default = os.environ.get("PAELLERA_CLIENT_URL", "http://127.0.0.1:8000")
url = sys.argv[1] if len(sys.argv) > 1 else default

with OpenAI(
    base_url=f"{url}/v1", api_key=os.environ.get("PAELLERA_CLIENT_KEY", "none needed")
) as client:
    drawn = client.images.generate(prompt="a cat on a white background", extra_body={"seed": 7})
    cat = base64.b64decode(drawn.data[0].b64_json)
    Path("cat.png").write_bytes(cat)
    edited = client.images.edit(
        image=cat, prompt="a dog on a white background", extra_body={"strength": 0.7}
    )
    Path("edited.png").write_bytes(base64.b64decode(edited.data[0].b64_json))
print("cat.png edited.png", drawn.usage.to_json(indent=None))
