"""Draw a batch of images on one pipeline, stage by stage, and count each stage's least cost."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch

from load_tests.gpu.recorders import recorder_for
from load_tests.gpu.timing import Ceilings, Stage
from load_tests.gpu.weights import weight_bytes
from load_tests.prompts import prompts
from load_tests.stages import flops
from model.bundle import Bundle, BundleV3
from model.image_request import ImageRequest
from model.networks.prior import Block
from model.pipeline import Pipeline
from model.row_builder import DictCache, RowBuilder, TextKey
from model.rows import Row
from server.engine.cuda_graphs import Recorder, use_cuda_graphs
from server.engine.graph_shapes import GraphShapes, grids, step_buckets

STAGES = ("encode", "prior", "condition", "step", "decode")


@dataclass(frozen=True, slots=True)
class Cost:
    """flops: of one picture; they add up. read: bytes of weights, which all pictures share."""

    flops: float
    read: float

    def floor_ms(self, ceilings: Ceilings, rows: int) -> float:
        return ceilings.floor_ms(self.flops * rows, self.read)


class Batch:
    """`rows` different prompts and seeds at one size (width, height)."""

    def __init__(self, pipeline: Pipeline, rows: int, size: tuple[int, int]) -> None:
        self.pipeline, self.size, self.rows = pipeline, size, rows
        self.texts = list(itertools.islice(prompts(), rows))
        self.noises = [pipeline.noise(seed, *size, steps=64) for seed in range(rows)]
        self.prompts = pipeline.encode(self.texts)
        (negative,) = pipeline.encode([""])
        self.images = pipeline.prior_embeddings(self.prompts, self.noises)
        self.conditions = [
            pipeline.condition(prompt, image)
            for prompt, image in zip(self.prompts, self.images, strict=True)
        ]
        self.unconditional = pipeline.condition(negative)
        self.tokens = torch.stack([noise.start for noise in self.noises]).to(pipeline.device)

    def record(
        self, new_recorder: Callable[[], Recorder] | None = None, *, room_for: int | None = None
    ) -> None:
        """Record these shapes as graphs, wired as the server's runner wires them.

        room_for: rows of the graphs; default: those of this batch.
        """
        config, device, rows = self.pipeline.config, self.pipeline.device, room_for or self.rows
        fitting = [
            b
            for b in step_buckets(config, rows, [self.size])
            if b.rows == rows and b.branches_per_row == 2
        ]
        # The first is that of the shortest texts, as these are.
        shapes = GraphShapes(fitting[:1], grids(config, [self.size]), [rows], [rows])
        use_cuda_graphs(
            self.pipeline, shapes, new_recorder or (lambda: recorder_for(device)), Counter()
        )

    @cached_property
    def _builder(self) -> RowBuilder:
        return RowBuilder(self.pipeline, DictCache())

    @cached_property
    def _builder_of_new(self) -> RowBuilder:
        """Return a row builder that, like the server, knows the empty negative prompt only."""
        return RowBuilder(
            self.pipeline, DictCache(lambda key: isinstance(key, TextKey) and bool(key.negative))
        )

    def started(self, steps: int) -> list[Row]:
        """Return rows of known prompts, with conditions of their own, as every request brings some.

        The pipeline would otherwise keep the last stacked ones.
        """
        rows = self._builder.build(self._requests(steps), noises=self.noises)
        for row in rows:
            row.conditional = replace(row.conditional)
            row.unconditional = replace(row.unconditional) if row.unconditional else None
        return rows

    def _requests(self, steps: int) -> list[ImageRequest]:
        sampling = self.pipeline.config.recipe.sampling(steps=steps, sampler="multinomial")
        return [
            ImageRequest(text, seed, *self.size, sampling) for seed, text in enumerate(self.texts)
        ]

    def stages(self, step_counts: Sequence[int]) -> dict[str, Stage]:
        p, rows = self.pipeline, self.started(step_counts[0])
        return {
            "encode": lambda: p.encode(self.texts),
            "prior": lambda: p.prior_embeddings(self.prompts, self.noises),
            "condition": lambda: [
                p.condition(prompt, image)
                for prompt, image in zip(self.prompts, self.images, strict=True)
            ],
            "step": lambda: self._step(rows),
            "decode": lambda: p.decode_tokens(self.tokens),
            **{f"loop_{n}": partial(self.loop, n) for n in step_counts},
            **{f"request_{n}": partial(self.request, n) for n in step_counts},
        }

    def _step(self, rows: Sequence[Row]) -> None:
        for row in rows:
            row.step = 0
        self.pipeline.advance(rows)

    def loop(self, steps: int) -> torch.Tensor:
        """Return the tokens [B, H, W] after `steps` steps."""
        return self.pipeline.denoise(self.started(steps))

    def request(self, steps: int) -> torch.Tensor:
        """Compute everything for new prompts, stage by stage, up to pixels on the CPU."""
        rows = self._builder_of_new.build(self._requests(steps), noises=self.noises)
        return self.pipeline.decode(self.pipeline.denoise(rows))


def costs(bundle: Bundle, size: tuple[int, int], step_counts: Sequence[int]) -> dict[str, Cost]:
    """Return the cost of every stage, counted in one eager run of one image.

    A family without a prior has none for it.
    """
    stages, read = Batch(Pipeline.of(bundle), 1, size).stages(step_counts), _read(bundle)
    found = {name: Cost(flops(stages[name]), read[name]) for name in STAGES}
    for n in step_counts:
        found[f"loop_{n}"] = Cost(n * found["step"].flops, n * found["step"].read)
        parts = [found[name] for name in ("encode", "prior", "condition", f"loop_{n}", "decode")]
        found[f"request_{n}"] = Cost(
            sum(part.flops for part in parts), sum(part.read for part in parts)
        )
    return found


def _read(b: Bundle) -> dict[str, float]:
    """Return the bytes of weights that each stage reads at least once.

    The part that is still in a cache from the pass before is too small to count.
    """
    read: dict[str, float] = {
        "encode": weight_bytes(b.clip.model, but="visual."),
        "prior": 0,
        "condition": 0,
        "step": weight_bytes(b.denoiser),
        "decode": weight_bytes(b.vqgan) / 2,
    }
    if isinstance(b, BundleV3):
        kv = b.denoiser.kv_weight
        read["encode"] += weight_bytes(b.byt5)
        # At every step only the columns that see the picture: the text's and the time's parts are
        # computed beforehand.
        blocks = [block for block in b.prior.blocks if isinstance(block, Block)]
        used = sum(
            block.shares()[0].nbytes + block.get_parameter("3.weight").nbytes for block in blocks
        )
        read["prior"] = b.config.recipe.prior_steps * used
        read["condition"] = 0 if kv is None else kv.nbytes
    return read
