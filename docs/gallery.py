"""Draw docs/gallery.md: the curl command of every operation, run against a server, and its result.

python docs/gallery.py        # needs curl; writes docs/gallery.md and docs/gallery/
"""

from __future__ import annotations

import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

from load_tests.serving import serving
from model.config import BundleConfig, find_bundle

DOCS = Path(__file__).parent
FOLDER = DOCS / "gallery"
HOST = "localhost:8000"  # as the page shows it
WIDTH, HEIGHT = BundleConfig.read(find_bundle("tiny")).native_size

HEAD = """# Gallery

*For client developers.* Each operation ([operations.md](operations.md)) with the embedded weights.
`python docs/gallery.py` draws this page: it runs exactly these commands against `paellera serve`,
in order, in one folder. Seeds are fixed, and none was chosen for its result.
"""


@dataclass(frozen=True)
class Entry:
    """One example. fields: of the form; `@name` is a file. shown: (label, file) of the inputs.
    output: the resulting file.
    """

    title: str
    words: str
    endpoint: str
    fields: dict[str, str]
    output: str
    shown: tuple[tuple[str, str], ...] = ()

    def command(self, host: str) -> list[str]:
        suffix = Path(self.output).suffix[1:]
        format = {} if suffix == "png" else {"response_format": suffix}
        fields = {**self.fields, **format, "seed": "7"}
        form = [word for name, value in fields.items() for word in ("-F", f"{name}={value}")]
        return ["curl", "-sSf", *form, f"{host}/{self.endpoint}", "-o", self.output]


ENTRIES = (
    Entry(
        "generate",
        "One prompt.",
        "generate",
        {"prompt": "a fox on a white background"},
        "fox.png",
    ),
    Entry(
        "inpaint",
        "The white area of the mask is drawn anew; all other pixels are returned bit for bit.",
        "inpaint",
        {
            "image": "@fox.png",
            "mask": "@mask.png",
            "prompt": "a frog on a white background",
        },
        "inpainted.webp",
        (("image", "fox.png"), ("mask", "mask.png")),
    ),
    Entry(
        "outpaint",
        "The canvas is extended on three sides in one pass, without a prompt.",
        "outpaint",
        {
            "image": "@fox.png",
            "left": str(WIDTH // 2),
            "right": str(WIDTH // 2),
            "down": str(HEIGHT // 4),
        },
        "outpainted.webp",
        (("image", "fox.png"),),
    ),
    Entry(
        "variations",
        "Another image with a similar CLIP embedding.",
        "variations",
        {"image": "@fox.png"},
        "variation.webp",
        (("image", "fox.png"),),
    ),
    Entry(
        "variations of two images",
        "The weighted mean of two CLIP embeddings.",
        "variations",
        {"image": "@fox.png", "image[]": "@inpainted.webp", "weights": "[0.5, 0.5]"},
        "mixed.webp",
        (("image", "fox.png"), ("image", "inpainted.webp")),
    ),
    Entry(
        "edit",
        "60 % of the tokens are replaced by noise and drawn anew with another prompt.",
        "edit",
        {
            "image": "@fox.png",
            "prompt": "a koala on a white background",
            "strength": "0.6",
        },
        "edited.webp",
        (("image", "fox.png"),),
    ),
    Entry(
        "upscale",
        "Twice the size: overlapping tiles of the native size, each an edit of the enlarged image.",
        "upscale",
        {
            "image": "@fox.png",
            "prompt": "a fox on a white background",
            "scale": "2",
            "strength": "0.1",
        },
        "upscaled.webp",
        (("image", "fox.png"),),
    ),
    Entry(
        "regions",
        "Two prompts, one for each half, with soft borders.",
        "generate",
        {
            "prompt": "a plain white background",
            "regions": '[{"prompt": "a small red heart on the left, white background", "box": [0, 0, 0.5, 1], "softness": 0.2},'
            ' {"prompt": "a small blue circle on the right, white background", "box": [0.5, 0, 1, 1], "softness": 0.2}]',
        },
        "regions.webp",
    ),
    Entry(
        "interpolate",
        "16 frames between two prompts, from the same noise.",
        "interpolate",
        {
            "keyframes": '[{"prompt": "a fox on a white background"}, {"prompt": "a penguin on a white background"}]',
            "frames": "16",
        },
        "between.webp",
    ),
)


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    pages = [HEAD]
    with serving({"PAELLERA_WEIGHTS": "tiny", "PAELLERA_TIMEOUT_S": "600"}) as server:
        for entry in ENTRIES:
            subprocess.run(entry.command(server.url), cwd=FOLDER, check=True)
            if entry.output == "fox.png":
                _draw_mask(FOLDER / "mask.png", Image.open(FOLDER / "fox.png").size)
            pages.append(_page(entry))
    (DOCS / "gallery.md").write_text("\n".join(pages))


def _draw_mask(path: Path, size: tuple[int, int]) -> None:
    """White in the middle, where the fox is."""
    mask = Image.new("L", size)
    ImageDraw.Draw(mask).rectangle(
        (size[0] // 8, size[1] // 8, size[0] * 7 // 8, size[1] * 7 // 8), fill=255
    )
    mask.save(path)


def _page(entry: Entry) -> str:
    pictures = (*entry.shown, ("result", entry.output))
    rows = [
        (name for name, _ in pictures),
        ("---" for _ in pictures),
        (f"![{name}](gallery/{file})" for name, file in pictures),
    ]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return (
        f"## {entry.title}\n\n{entry.words}\n\n```console\n$ "
        f"{shlex.join(entry.command(HOST))}\n```\n\n{table}\n"
    )


if __name__ == "__main__":
    main()
