"""Draw docs/photos.md: five photos, painted here, that the playground changes in Chromium.

python docs/photos.py        # needs Chromium; writes docs/photos.md and docs/photos/
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from load_tests.browser import Playground, browser
from load_tests.serving import serving

DOCS = Path(__file__).parent
FOLDER = DOCS / "photos"
WIDTH, HEIGHT = 4032, 3024
SCALE = 4  # photos are painted at a quarter of their size; only the sensor's grain is at full size
ORIENTATION, TURN_RIGHT = 0x0112, 6
QUALITY = 80

HEAD = """# Photos in the playground

*For users of the browser page.* Photos of 12 megapixels, as phones store them, opened and changed
in the [playground](playground.md) with the embedded weights: before and after. The photos are
painted by `python docs/photos.py`, which draws this page. The seed is 7 in all cases, and none was
chosen for its result. The embedded weights learnt from emoji, not from photos: judge how the photos
are opened, scaled and blended, not what is drawn into them.
"""

Floats = NDArray[np.float32]


# ── photos ────────────────────────────────────────────────────────────────────────────────────────


def noise(rng: np.random.Generator, size: tuple[int, int], cells: tuple[int, int]) -> Floats:
    """Smooth noise from -1 to 1, float32 [H, W]: five octaves.

    size: (width, height). cells: of the coarsest octave, across and down.
    """
    total = np.zeros(size[::-1], np.float32)
    for octave in range(5):
        across, down = cells[0] << octave, cells[1] << octave
        grid = rng.uniform(-1, 1, (down + 1, across + 1)).astype(np.float32)
        total += (
            np.asarray(Image.fromarray(grid).resize(size, Image.Resampling.BICUBIC)) / 2**octave
        )
    return total / np.abs(total).max()


def mix(low: tuple[int, int, int], high: tuple[int, int, int], share: Floats) -> Floats:
    """A colour for each share from 0 to 1, float32 [H, W, 3]."""
    weight = np.clip(share, 0, 1)[..., None]
    return (np.array(low) * (1 - weight) + np.array(high) * weight).astype(np.float32)


def places(size: tuple[int, int]) -> tuple[Floats, Floats]:
    """x and y from 0 to 1, each float32 [H, W]."""
    x, y = np.meshgrid(np.linspace(0, 1, size[0]), np.linspace(0, 1, size[1]))
    return x.astype(np.float32), y.astype(np.float32)


def seaside(rng: np.random.Generator, size: tuple[int, int]) -> Floats:
    """Clouds over a calm sea, and a beach."""
    x, y = places(size)
    sky = mix((86, 140, 205), (236, 222, 205), y / 0.45)
    clouds = np.clip(noise(rng, size, (3, 4)) * 1.6 - 0.1, 0, 1)[..., None] * 0.8
    sky = sky * (1 - clouds) + 246 * clouds
    waves = noise(rng, size, (6, 60))
    sea = mix((28, 84, 112), (96, 160, 170), (y - 0.45) / 0.35 + 0.25 * waves)
    glitter = np.clip(noise(rng, size, (40, 160)) - 0.45, 0, 1) * np.exp(-((x - 0.6) ** 2) / 0.03)
    sea += 420 * glitter[..., None]
    sand = mix((196, 170, 130), (150, 122, 88), y + 0.3 * noise(rng, size, (20, 20)))
    shore = 0.8 + 0.03 * noise(rng, size, (4, 1))
    return np.where((y < 0.45)[..., None], sky, np.where((y < shore)[..., None], sea, sand))


def hills(rng: np.random.Generator, size: tuple[int, int]) -> Floats:
    """Ridges in the haze behind a meadow."""
    _, y = places(size)
    photo = mix((120, 170, 226), (226, 232, 232), y / 0.5)
    for layer in range(5):
        ridge = 0.38 + 0.1 * layer + 0.09 * noise(rng, (size[0], 1), (3 + layer, 1))
        haze = layer / 4
        ground = mix(
            (round(150 - 80 * haze), round(176 - 50 * haze), round(186 - 140 * haze)),
            (round(120 - 80 * haze), round(150 - 60 * haze), round(160 - 130 * haze)),
            0.5 + 0.9 * noise(rng, size, (10 + 12 * layer, 14 + 20 * layer)),
        )
        photo = np.where((y > ridge)[..., None], ground, photo)
    return photo


def table(rng: np.random.Generator, size: tuple[int, int]) -> Floats:
    """A wooden table before a wall out of focus, lit from the left."""
    x, y = places(size)
    grain = noise(rng, size, (2, 70)) + 0.4 * np.sin(60 * y + 5 * noise(rng, size, (3, 6)))
    wood = mix((92, 54, 30), (186, 126, 78), 0.5 + 0.4 * grain)
    wall = mix((206, 196, 180), (150, 140, 128), 0.5 + 0.5 * noise(rng, size, (2, 2)))
    light = (1.15 - 0.5 * x)[..., None]
    edge = np.clip((y - 0.36) / 0.03, 0, 1)[..., None]
    return (wall * (1 - edge) + wood * edge) * light


def bricks(rng: np.random.Generator, size: tuple[int, int]) -> Floats:
    """A wall of bricks with mortar, the corners darker."""
    x, y = places(size)
    row = np.floor(y * 18)
    along = x * 9 * size[0] / size[1] + 0.5 * (row % 2)
    tone = rng.uniform(-1, 1, (40, 40)).astype(np.float32)
    brick = mix(
        (120, 58, 44),
        (190, 104, 78),
        0.5
        + 0.3 * tone[row.astype(int), np.floor(along).astype(int) % 40]
        + 0.35 * noise(rng, size, (40, 50)),
    )
    mortar = np.maximum(np.abs((y * 18) % 1 - 0.5) > 0.43, np.abs(along % 1 - 0.5) > 0.465)
    wall = np.where(mortar[..., None], 178 + 18 * noise(rng, size, (60, 60))[..., None], brick)
    corners = 1 - 0.55 * ((x - 0.5) ** 2 + (y - 0.5) ** 2)
    return wall * corners[..., None]


def night(rng: np.random.Generator, size: tuple[int, int]) -> Floats:
    """A street at night, its lamps out of focus over wet asphalt."""
    x, y = places(size)
    photo = mix((14, 16, 30), (34, 30, 36), y + 0.2 * noise(rng, size, (4, 4)))
    for _ in range(46):
        radius = rng.uniform(0.015, 0.05)
        centre = rng.uniform(0, 1), rng.normal(0.42, 0.12)
        colour = np.array([(255, 176, 84), (255, 96, 70), (150, 200, 255)][rng.integers(3)])
        for height, strength in ((centre[1], 0.55), (1.25 - centre[1] / 2, 0.18)):
            distance = np.hypot(x - centre[0], (y - height) * size[1] / size[0])
            disc = np.clip((radius - distance) / 0.004, 0, 1) * strength
            photo += disc[..., None] * colour
    return photo


def develop(photo: Floats, rng: np.random.Generator) -> Image.Image:
    """Enlarge to the size of a phone's photo, with a sensor's grain."""
    small = Image.fromarray(np.clip(photo, 0, 255).astype(np.uint8))
    size = small.width * SCALE, small.height * SCALE
    large = np.asarray(small.resize(size, Image.Resampling.BICUBIC)).astype(np.float32)
    grain = rng.normal(0, 4, (*large.shape[:2], 1)).astype(np.float32)
    return Image.fromarray(np.clip(large + grain, 0, 255).astype(np.uint8))


# ── what the playground does with them ────────────────────────────────────────────────────────────


def inpaint(playground: Playground) -> str:
    playground.choose("Inpaint")
    playground.page.fill("#feather", "24")
    for y in (0.3, 0.38, 0.46, 0.54):
        playground.drag("#mask", (0.36, y), (0.6, y))
    return "a red sailboat"


def outpaint(playground: Playground) -> str:
    playground.choose("Outpaint")
    playground.drag(".handle.right", (0.5, 0.5), (3.5, 0.5))
    playground.drag(".handle.left", (0.5, 0.5), (-2.5, 0.5))
    return ""


def regions(playground: Playground) -> str:
    page = playground.page
    playground.choose("Inpaint")
    for x in (0.26, 0.7):
        for y in (0.5, 0.6, 0.7):
            playground.drag("#mask", (x - 0.1, y), (x + 0.1, y))
    page.check("#draw-regions")
    for left, prompt in ((0.1, "a red apple"), (0.54, "a green pear")):
        playground.drag("#layer", (left, 0.38), (left + 0.33, 0.84))
        page.keyboard.type(f"{prompt} on a wooden table")
    return "a wooden table"


def edit(playground: Playground) -> str:
    page = playground.page
    playground.choose("Edit")
    page.fill("#strength", "0.5")
    page.check("#resize")
    side = page.input_value("#width")
    page.select_option("#height", side)
    page.select_option("#fit", "pad")
    return "a wall of green leaves"


def upscale(playground: Playground) -> str:
    playground.choose("Upscale")
    playground.page.fill("#scale", "2")
    return "lights at night"


@dataclass(frozen=True)
class Case:
    """A photo and what is done with it. act: fills the form, and returns the prompt."""

    title: str
    words: str
    paint: Callable[[np.random.Generator, tuple[int, int]], Floats]
    act: Callable[[Playground], str]
    upright: bool = False

    def photo(self, path: Path, seed: int) -> None:
        """Write the photo; an upright one lies on its side in the file, as phones store it."""
        rng = np.random.default_rng(seed)
        size = WIDTH // SCALE, HEIGHT // SCALE
        photo = develop(self.paint(rng, size[::-1] if self.upright else size), rng)
        exif = photo.getexif()
        if self.upright:
            photo = photo.transpose(Image.Transpose.ROTATE_90)
            exif[ORIENTATION] = TURN_RIGHT
        photo.save(path, quality=88, exif=exif)


CASES = (
    Case("inpaint", "A mask with a feather of 24 pixels, “a red sailboat”.", seaside, inpaint),
    Case("outpaint", "Extended on both sides without a prompt.", hills, outpaint, upright=True),
    Case("regions", "Two masked places with a region each: an apple and a pear.", table, regions),
    Case("edit", "Padded to a square, redrawn with strength 0.5.", bricks, edit, upright=True),
    Case("upscale", "Enlarged twice with strength 0.3.", night, upscale),
)


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    pages = [HEAD]
    settings = {"PAELLERA_WEIGHTS": "tiny", "PAELLERA_TIMEOUT_S": "600"}
    with serving(settings) as server, browser() as chromium, tempfile.TemporaryDirectory() as files:
        for i, case in enumerate(CASES):
            path = Path(files) / f"IMG_{i + 1:04}.JPG"
            case.photo(path, seed=i)
            page = chromium.new_context(viewport={"width": 1000, "height": 900}).new_page()
            playground = Playground(page)
            playground.open(server.url)
            page.fill("#seed", "7")
            shown = [shot(playground) for _ in change(playground, path, case)]
            beside(*shown).save(FOLDER / f"{case.title}.webp", quality=QUALITY)
            page.context.close()
            picture = f"![{case.title}, before and after](photos/{case.title}.webp)"
            pages.append(f"## {case.title}\n\n{case.words}\n\n{picture}\n")
    (DOCS / "photos.md").write_text("\n".join(pages))


def change(playground: Playground, photo: Path, case: Case) -> Iterator[None]:
    """Yield once the request is filled in, and once its image is there."""
    playground.load(photo)
    prompt = case.act(playground)
    yield
    playground.draw(prompt)
    playground.page.locator("#draw-regions").evaluate("(box) => box.checked && box.click()")
    yield


def shot(playground: Playground) -> Image.Image:
    """The canvas with its tools and the status below."""
    content = playground.page.locator(".work").screenshot()
    return Image.open(io.BytesIO(content)).convert("RGB")


def beside(*pictures: Image.Image) -> Image.Image:
    """Return the pictures side by side."""
    width, height = sum(each.width for each in pictures), max(each.height for each in pictures)
    sheet = Image.new("RGB", (width, height), "white")
    left = 0
    for picture in pictures:
        sheet.paste(picture, (left, 0))
        left += picture.width
    return sheet


if __name__ == "__main__":
    main()
