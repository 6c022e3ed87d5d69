"""Sample the corpus of captioned layouts, which all trainers read, once, in many processes.

    python -m model.training.corpus OUT --images 400000 --processes 16
    python -m model.training.corpus OUT --mixture first

Each image has one layout and two captions. The images themselves are not stored: a layout takes 200
bytes and `render.render` draws thousands a second. Image i is the same for a seed, whatever the
number of processes. Importing this module does not import torch, so that a process starts fast.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from model.training import command
from model.training.arguments import COUNT, at_least
from model.training.captions import ATTRIBUTES, LONGEST, PLACES, THING_ATTRIBUTES, Caption, describe
from model.training.scene_layout import Layout, layout
from model.training.scene_samplers import FULL, MIXTURES, Mixture, sample
from model.training.scenes import ASPECTS, MOST, Random, Scene
from model.whole_file import check_place, whole_file

if TYPE_CHECKING:
    from torch import Tensor

    from model.training.render import Layouts

Arrays = dict[str, npt.NDArray[Any]]

CAPTIONS = 2  # of each image
_LONGEST = LONGEST - 1  # bytes of a caption, so that an end mark fits behind it
_CHUNK = 2000  # images that one process samples at a time
_ATTEMPTS = 5  # at a caption of at most _LONGEST bytes
_LAYOUT = "layout."  # before the names of what render.Layouts holds

_FIELDS = ("text", "length", "stated", "span", "things", "aspect")
_NAMES = tuple(ATTRIBUTES)
_THING_NAMES = tuple(THING_ATTRIBUTES)


def _layout_arrays(n: int) -> Arrays:
    """Return the arrays of n empty layouts, named as the fields of render.Layouts."""
    return {
        "background": np.zeros(n, np.int16),
        "params": np.zeros((n, 8), np.float32),
        "sprite": np.full((n, MOST), -1, np.int16),
        "centre": np.zeros((n, MOST, 2), np.float32),
        "length": np.zeros((n, MOST), np.float32),
        "mirror": np.zeros((n, MOST), bool),
        "angle": np.zeros((n, MOST), np.float32),
        "tint": np.zeros((n, MOST, 3), np.uint8),
    }


def _fill_layout(arrays: Arrays, row: int, drawn: Layout) -> None:
    arrays["background"][row] = drawn.background
    arrays["params"][row] = drawn.params
    if drawn.sprites:
        used = slice(len(drawn.sprites))
        numbers, xs, ys, lengths, mirrors, angles, tints = zip(*drawn.sprites, strict=True)
        arrays["sprite"][row, used] = numbers
        arrays["centre"][row, used, 0] = xs
        arrays["centre"][row, used, 1] = ys
        arrays["length"][row, used] = lengths
        arrays["mirror"][row, used] = mirrors
        arrays["angle"][row, used] = angles
        arrays["tint"][row, used] = tints


def _caption_arrays(n: int) -> Arrays:
    return {
        "text": np.zeros((n, CAPTIONS, LONGEST), np.uint8),
        "length": np.zeros((n, CAPTIONS), np.int16),
        "stated": np.zeros((n, CAPTIONS, len(_NAMES)), np.int16),
        "span": np.zeros((n, CAPTIONS, len(PLACES), 2), np.int16),
        "things": np.full((n, CAPTIONS, len(PLACES), len(_THING_NAMES)), -1, np.int16),
    }


def _short(scene: Scene, rng: Random) -> Caption:
    """Return a caption of at most _LONGEST bytes, if one comes up in a few attempts."""
    for _ in range(_ATTEMPTS):
        caption = describe(scene, rng)
        if len(caption.text) <= _LONGEST:
            break
    return caption


def _byte_spans(caption: Caption) -> list[tuple[int, int]]:
    """Return where each thing's words begin and end, in bytes of UTF-8."""
    if caption.text.isascii():
        return [(span.start, span.stop) for span in caption.spans]
    before = np.cumsum([0, *(len(character.encode()) for character in caption.text)])
    return [(int(before[span.start]), int(before[span.stop])) for span in caption.spans]


def _fill_caption(arrays: Arrays, row: tuple[int, int], caption: Caption) -> None:
    encoded = caption.text.encode()[:_LONGEST]
    arrays["text"][row][: len(encoded)] = np.frombuffer(encoded, np.uint8)
    arrays["length"][row] = len(encoded)
    arrays["stated"][row] = tuple(caption.stated.values())
    if caption.spans:
        count = len(caption.spans)
        arrays["span"][row][:count] = np.minimum(_byte_spans(caption), len(encoded))
        arrays["things"][row][:count] = [tuple(thing.values()) for thing in caption.things]


def _chunk(task: tuple[int, int, int, Mixture]) -> Arrays:
    """Return the arrays of chunk number `task[1]` of seed `task[0]`, of `task[2]` images."""
    seed, number, n, mix = task
    rng = random.Random(f"{seed}/{number}")
    drawn = _layout_arrays(n)
    captions = _caption_arrays(n)
    aspects = np.zeros(n, np.uint8)
    for row in range(n):
        scene = sample(rng, mix)
        aspects[row] = ASPECTS.index(scene.aspect)
        _fill_layout(drawn, row, layout(scene, rng, aligned=rng.random() < mix.aligned))
        for which in range(CAPTIONS):
            _fill_caption(captions, (row, which), _short(scene, rng))
    return {**{_LAYOUT + name: a for name, a in drawn.items()}, **captions, "aspect": aspects}


def sample_arrays(n: int, seed: int, processes: int, mix: Mixture = FULL) -> Arrays:
    """Return the arrays of n images; processes: 1 samples in this one."""
    sizes = [min(_CHUNK, n - start) for start in range(0, n, _CHUNK)]
    tasks = [(seed, number, size, mix) for number, size in enumerate(sizes)]
    if processes == 1:
        return _assembled(n, map(_chunk, tasks))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        return _assembled(n, pool.map(_chunk, tasks))


def _assembled(n: int, chunks: Iterator[Arrays]) -> Arrays:
    whole: Arrays = {}
    start = 0
    for chunk in chunks:
        stop = start + len(chunk["aspect"])
        for name, part in chunk.items():
            if name not in whole:
                whole[name] = np.empty((n, *part.shape[1:]), part.dtype)
            whole[name][start:stop] = part
        start = stop
    return whole


@dataclass
class Corpus:
    """N captioned images, everything on the CPU unless moved.

    layouts: of N images. text: uint8 [N, 2, 160], the captions' bytes, 0 behind their ends; a
    byte's number for the byte encoder is the byte + 3. length: int16 [N, 2], in bytes. stated:
    int16 [N, 2, A], the class of each of ATTRIBUTES. span: int16 [N, 2, 3, 2], the bytes (first,
    behind the last) about each thing, both 0 where there is none. things: int16 [N, 2, 3, T], the
    class of each of THING_ATTRIBUTES, −1 where there is no thing. aspect: uint8 [N], a number of
    scenes.ASPECTS.
    """

    layouts: Layouts
    text: Tensor
    length: Tensor
    stated: Tensor
    span: Tensor
    things: Tensor
    aspect: Tensor

    def __len__(self) -> int:
        return len(self.aspect)

    @property
    def attributes(self) -> tuple[str, ...]:
        """Return the names of the last axis of `stated`."""
        return _NAMES

    @property
    def thing_attributes(self) -> tuple[str, ...]:
        """Return the names of the last axis of `things`."""
        return _THING_NAMES

    def to(self, device: str | Any) -> Corpus:
        """Return the corpus on the device."""
        moved = {field.name: getattr(self, field.name).to(device) for field in fields(self)}
        return Corpus(**moved)

    @staticmethod
    def load(path: Path | str) -> Corpus:
        """Return the corpus in a file. Raises FileNotFoundError without it."""
        return load(path)

    def save(self, path: Path | str) -> None:
        """Write the corpus to a safetensors file."""
        tensors = {name: getattr(self, name) for name in _FIELDS}
        for name in _layout_arrays(0):
            tensors[_LAYOUT + name] = getattr(self.layouts, name)
        _write({name: tensor.cpu().numpy() for name, tensor in tensors.items()}, path)

    def caption(self, image: int, which: int = 0) -> str:
        """Return one caption as text."""
        length = int(self.length[image, which])
        return bytes(self.text[image, which, :length].tolist()).decode(errors="replace")


def _write(arrays: Arrays, path: Path | str) -> None:
    with whole_file(Path(path)) as partial:
        save_file(arrays, partial)


def _corpus(arrays: Arrays) -> Corpus:
    import torch

    from model.training.render import Layouts

    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    drawn = {n.removeprefix(_LAYOUT): t for n, t in tensors.items() if n.startswith(_LAYOUT)}
    rest = {name: t for name, t in tensors.items() if not name.startswith(_LAYOUT)}
    return Corpus(layouts=Layouts(**drawn), **rest)


def generate(n: int, seed: int, processes: int = 1) -> Corpus:
    """Return a corpus of n images, sampled by `processes` processes."""
    return _corpus(sample_arrays(n, seed, processes))


def load(path: Path | str) -> Corpus:
    """Return the corpus in a file.

    Raises FileNotFoundError without it, and ValueError for another kind of file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no corpus {path}: `python -m model.training.corpus` writes one")
    try:
        return _corpus(load_file(path))
    except (SafetensorError, TypeError) as error:
        raise ValueError(f"{path} is no corpus ({error})") from None


def save(corpus: Corpus, path: Path | str) -> None:
    """Write a corpus to a safetensors file."""
    corpus.save(path)


def layouts(scenes: Sequence[Scene], seed: int, *, aligned: bool = True) -> Layouts:
    """Return layouts of given scenes of one aspect, such as those of prompts."""
    import torch

    from model.training.render import Layouts

    arrays = _layout_arrays(len(scenes))
    rng = random.Random(seed)
    for row, scene in enumerate(scenes):
        _fill_layout(arrays, row, layout(scene, rng, aligned=aligned))
    return Layouts(**{name: torch.from_numpy(array) for name, array in arrays.items()})


def main() -> None:
    """Sample the corpus that the command line asks for, and print the rate."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="the safetensors file to write")
    parser.add_argument(
        "--images",
        "--pictures",
        type=COUNT,
        default=400_000,
        help="how many to sample (default %(default)s)",
    )
    parser.add_argument(
        "--processes",
        type=COUNT,
        default=multiprocessing.cpu_count(),
        help="how many sample at once (default one for each core, %(default)s)",
    )
    parser.add_argument(
        "--seed", type=at_least(0), default=0, help="of the samples (default %(default)s)"
    )
    parser.add_argument(
        "--mixture",
        choices=MIXTURES,
        default="full",
        help="first: mostly one object in the middle; several: more of what is hard, to go on with",
    )
    options = parser.parse_args()
    check_place(options.out)
    began = time.perf_counter()
    mix = MIXTURES[options.mixture]
    arrays = sample_arrays(options.images, options.seed, options.processes, mix)
    _write(arrays, options.out)
    taken = time.perf_counter() - began
    print(f"{options.images} images in {taken:.1f} s, {options.images / taken:.0f} a second")


if __name__ == "__main__":
    command.run(main)
