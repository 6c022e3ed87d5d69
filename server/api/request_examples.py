"""A body for every endpoint that draws, by path, for the OpenAPI document. A test sends them all."""

from __future__ import annotations

from typing import Any

# A red square on white, a white square on black, and black with a transparent square, all of 64 × 64 pixels.
PICTURE = (
    "iVBORw0KGgoAAAANSUhEUgAAAEAAAABAAQMAAACQp+OdAAAABlBMVEX6+vrIKCgNZfwnAAAAGklEQVR42mNgGJKA////DwwMTDDu"
    "8GAMRQAAxtQDLKllrNgAAAAASUVORK5CYII="
)
MASK = "iVBORw0KGgoAAAANSUhEUgAAAEAAAABAAQAAAACCEkxzAAAAHklEQVR42mNgGFyAkYHhPwMDAyMDE0xklIHMGGwAAPa7AUAn7aGOAAAAAElFTkSuQmCC"
CUT_OUT = (
    "iVBORw0KGgoAAAANSUhEUgAAAEAAAABACAQAAAAAYLlVAAAATklEQVR42u3ZMQoAIAwDwFT8/5f1CQ4OFbzMhRx0TGWlNSMBAAAA"
    "AAAA6M08XtRlw/ICAAAAAAAAAAAAAAAAAIDHAWUvAAAAAAAA+B6wAU68A3/6aluKAAAAAElFTkSuQmCC"
)

EXAMPLES: dict[str, dict[str, Any]] = {
    "/generate": {"prompt": "a red ball on a blue table", "seed": 7, "n": 2, "guidance_scale": [2, 8], "temperature": 0.8},
    "/inpaint": {"prompt": "a yellow star on a white background", "image": PICTURE, "mask": MASK},
    "/outpaint": {"image": PICTURE, "left": 32, "right": 32},
    "/variations": {"image": [PICTURE, f"data:image/png;base64,{MASK}"], "weights": [0.8, 0.2]},
    "/edit": {"prompt": "a green square on a white background", "image": PICTURE, "strength": 0.7},
    "/interpolate": {"keyframes": [{"prompt": "a red circle"}, {"prompt": "a blue square"}], "frames": 4, "response_format": "gif"},
    "/v1/images/generations": {"prompt": "a red ball on a blue table", "n": 2, "quality": "low", "output_format": "webp", "seed": 7},
    "/v1/images/edits": {"prompt": "a yellow star on a white background", "image": PICTURE, "mask": CUT_OUT},
    "/v1/images/variations": {"image": PICTURE, "n": 2},
}
