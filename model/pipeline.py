"""Run one bundle's networks from prompt to pixels: encode → prior → condition → n steps → decode.

    pipeline = Pipeline.load(find_bundle("tiny"))
    image = pipeline.generate(["a red apple"], seeds=[7])[0]      # uint8 [H, W, 3]

The stages are separate because the server interleaves many requests' stages; scripts call
`generate`. Letters: B rows, N branches (one or two a row), H W token grid, L condition tokens, K
codes.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from model import sampling
from model.bundle import Bundle, BundleV1, BundleV3, load_bundle
from model.config import (
    DENOISER,
    BundleConfig,
    BundleV1Config,
    BundleV3Config,
    Encoders,
    Kernels,
    PriorSettings,
    RenoiseMode,
    RenoiseOrder,
    Sampler,
    SamplingConfig,
)
from model.executor import BranchBatch, Eager, Executor, SamplingInputs
from model.image_request import parted
from model.network_config import Schedule
from model.networks import prior
from model.networks.denoiser_v3 import Condition, Denoiser
from model.networks.layers import to_device
from model.networks.text_encoders import Prompt, bucket
from model.rows import (
    AnyCondition,
    RegionBranch,
    Row,
    as_tensor,
    generate,
    pinned_tokens,
    token_weight,
)
from model.sampling import Noise

# Noises over which an unconditional start is averaged, and token grids whose average is remembered.
_NOISES = 16
_REMEMBERED_STARTS = 64
# Tokens of a batch of them.
_TOKENS_AT_ONCE = 2**12


class Reader(NamedTuple):
    """A denoiser as the reader of a condition, by the network's name.

    attention_weights: factors on the attention that it gives to (text, image) tokens of a
    conditional branch; None is off.
    """

    denoiser: str
    attention_weights: tuple[float, float] | None = None


class _Asked(NamedTuple):
    """A text of an image. weight: of a region's at every token, [H, W]."""

    text: str
    noise: Noise
    weight: Tensor | None = None


# The prior, all of its steps: text embeddings [B, D'] and noise [S + 1, B, D'] → image embeddings
# [B, D'], by these settings.
PriorFn = Callable[[Tensor, Tensor, PriorSettings], Tensor]
# A denoiser's condition, by `Denoiser.condition`'s arguments.
ConditionFn = Callable[
    [Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None], Condition
]
# The decoder: codes [B, H, W] → images uint8 [B, height, width, 3] on the device.
DecodeFn = Callable[[Tensor], Tensor]


class Pipeline(ABC):
    """A bundle ready to compute; the two classes below are its families. Not thread-safe.

    denoisers, executors: each denoiser and what computes its steps, by the network's name.
    executors, decode_tokens: replaced by CUDA graphs where they are captured, or by compiled forms.
    compiled: the root of the folder that holds these; None if everything is plain.
    """

    config: BundleConfig

    def __init__(self, bundle: Bundle) -> None:
        self.bundle, self.config = bundle, bundle.config
        weight = next(bundle.denoiser.parameters())
        self.device, self.dtype = weight.device, weight.dtype
        self.denoisers = bundle.every_denoiser
        self.executors: dict[str, Executor] = {name: Eager(bundle, name) for name in self.denoisers}
        self.decode_tokens: DecodeFn = self._decode_tokens
        self.compiled: Path | None = None
        self._times: dict[tuple[str, int, Schedule], Tensor] = {}
        self._branches: BranchBatch | None = None
        self._starts: dict[tuple[str, tuple[int, ...], Schedule], Tensor] = {}

    @classmethod
    def load(
        cls,
        directory: Path,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        encoders: Encoders = "device",
        kernels: Kernels = "auto",
    ) -> Pipeline:
        """Read a bundle. Raises the errors of `load_bundle`."""
        return cls.of(load_bundle(directory, torch.device(device), dtype, encoders, kernels))

    @staticmethod
    def of(bundle: Bundle) -> Pipeline:
        """Return the pipeline for a bundle's family."""
        return PipelineV3(bundle) if isinstance(bundle, BundleV3) else PipelineV1(bundle)

    @cached_property
    def downscale(self) -> int:
        """Pixels per token and side."""
        return self.config.vqgan.downscale

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """Convert pixels (width, height) to tokens (H, W)."""
        return height // self.downscale, width // self.downscale

    def _here(self, encoded: Tensor) -> Tensor:
        """Move an encoder's result to the denoiser's device and type."""
        return encoded.to(self.device, self.dtype, non_blocking=True)

    @property
    def executor(self) -> Executor:
        """Return what computes the steps of the first denoiser."""
        return self.executors[DENOISER]

    @executor.setter
    def executor(self, executor: Executor) -> None:
        self.executors[DENOISER] = executor

    def prior_settings(self, sampling: SamplingConfig | None = None) -> PriorSettings:
        """Return the prior's settings of an image's preset, by default of the first one."""
        if sampling is None:
            return self.config.recipe.prior
        return self.config.preset(sampling.preset).recipe.prior

    def prior_noise(self, settings: PriorSettings) -> tuple[int, int]:
        """Return (S + 1, D): the shape of the Gaussian noise of an image for the prior."""
        return 0, self.config.clip.embed_dim

    def noise(
        self,
        seed: int,
        width: int,
        height: int,
        steps: int,
        renoise_mode: RenoiseMode = "start",
        renoise_order: RenoiseOrder = "random",
        prior: PriorSettings | None = None,
    ) -> Noise:
        """Return all of one image's randomness, on the CPU.

        prior: the prior's settings, by default the bundle's.
        """
        codes, grid = self.config.vqgan.codebook_size, self.grid(width, height)
        return sampling.draw_noise(
            seed,
            codes=codes,
            grid=grid,
            steps=steps,
            prior=self.prior_noise(prior or self.prior_settings()),
            renoise_mode=renoise_mode,
            renoise_order=renoise_order,
        )

    @abstractmethod
    def text_length(self, prompt: str) -> int:
        """Return the bytes that the prompt alone is padded to; 0 if it is not padded."""

    @abstractmethod
    def encode(self, prompts: Sequence[str]) -> list[Prompt]:
        """Encode texts in one batch. Neighbours in the list do not change each other's result."""

    @abstractmethod
    def prior_embeddings(
        self,
        prompts: Sequence[Prompt],
        noises: Sequence[Noise],
        settings: PriorSettings | None = None,
    ) -> list[Tensor]:
        """Return, for each prompt and noise, the CLIP embedding [1, D'] of a fitting image.

        settings: the prior's, by which the noises were drawn; by default the bundle's.
        """

    @abstractmethod
    def condition(
        self, prompt: Prompt, image: Tensor | None = None, reader: Reader | None = None
    ) -> AnyCondition:
        """Return a denoiser's condition.

        image: a CLIP embedding [1, D'], for the conditional branch. reader: by default the first
        denoiser with the recipe's weights.
        """

    def reader(self, sampling: SamplingConfig | None = None) -> Reader:
        """Return what reads the conditions of an image; by default the first denoiser."""
        if sampling is None:
            return Reader(DENOISER, self.config.recipe.attention_weights)
        recipe = self.config.preset(sampling.preset).recipe
        return Reader(sampling.denoiser, sampling.attention_weights or recipe.attention_weights)

    @torch.inference_mode()
    def encode_images(self, images: Tensor) -> Tensor:
        """Encode images uint8 [B, height, width, 3] to tokens [B, H, W].

        Width and height are multiples of the VQGAN's step.
        """
        return self.bundle.vqgan.encode(
            (images.to(self.device, non_blocking=True).permute(0, 3, 1, 2) / 255).to(self.dtype)
        )

    @torch.inference_mode()
    def embed_images(self, images: Sequence[Tensor]) -> list[Tensor]:
        """Return CLIP embeddings [1, D'] of images uint8 [height, width, 3] of any sizes."""
        clip = self.bundle.clip
        scaled = torch.cat(
            [
                clip.scale((image.to(clip.device, non_blocking=True).permute(2, 0, 1) / 255)[None])
                for image in images
            ]
        )
        return list(self._here(clip.encode_image(scaled)).split(1))

    @torch.inference_mode()
    def start(
        self,
        noise: Noise,
        sampling: SamplingConfig,
        conditional: AnyCondition,
        unconditional: AnyCondition | None,
        regions: Sequence[RegionBranch] = (),
    ) -> Row:
        """Return a text-to-image row, its randomness on the device."""
        on_device = Noise(
            *(
                getattr(noise, field.name).to(self.device, non_blocking=True)
                for field in fields(noise)
            )
        )
        return generate(sampling, on_device, conditional, unconditional, regions=regions)

    @torch.inference_mode()
    def advance(self, rows: Sequence[Row]) -> None:
        """Take one step for every row.

        All rows share a token grid and a denoiser; everything else may differ by row.
        """
        branches = self._branches_of(rows)
        tokens = torch.stack([row.tokens for row in rows])  # [B, H, W]
        times = torch.stack([self._time_table(row)[row.step] for row in rows])  # [B, S]
        weights = self._guidance_weights(rows, tokens.shape[1:])
        inverse, probability, mass = torch.stack(
            [row.schedule[row.step] for row in rows], dim=1
        ).unbind()  # [B] each
        uniform = torch.stack([row.noise.draw[row.step] for row in rows])
        features = self._executor_of(rows).features(tokens, times, branches, weights)
        features = self._guide_first_steps(rows, features)
        drawn = self._sample(rows, features, SamplingInputs(uniform, inverse, mass))
        source = torch.stack([row.source for row in rows])
        uniform = self._renoise_uniforms(rows, features, drawn, probability)
        # Not in the memory that was drawn into, because an executor may draw the next rows there.
        settled = self._renoise_and_pin(drawn, source, uniform, probability, pinned_tokens(rows))
        for row, clean, tokens in zip(rows, *settled, strict=True):
            row.drawn, row.tokens = clean, tokens
            row.step += 1

    def denoise(
        self, rows: Sequence[Row], progress: Callable[[int], object] = lambda steps: None
    ) -> Tensor:
        """Step rows of one token grid and denoiser until all are done; return tokens [B, H, W].

        progress: called after every step with the number of steps since the call.
        """
        steps = 0
        while unfinished := [row for row in rows if not row.done]:
            self.advance(unfinished)
            steps += 1
            progress(steps)
        return torch.stack([row.tokens for row in rows])

    def _guide_first_steps(self, rows: Sequence[Row], features: Tensor) -> Tensor:
        """Guide those rows' features [B, H, W, c_out] whose unconditional ones are known."""
        known = [(i, row.known_unconditional) for i, row in enumerate(rows)]
        members = [i for i, own in known if own is not None]
        if not members:
            return features
        unconditional = torch.stack([own for _, own in known if own is not None])
        guidance = to_device([rows[i].guidances[0] for i in members], self.device)
        if len(members) == len(rows):
            return sampling.guide(features, unconditional, guidance)
        places = to_device(members, self.device)
        guided = sampling.guide(features[places], unconditional, guidance)
        return features.index_copy(0, places, guided)

    @torch.inference_mode()
    def unconditional_start(
        self, noise: Noise, config: SamplingConfig, negative_prompt: str
    ) -> Tensor | None:
        """Return the features [H, W, c_out] of an unconditional branch that sees nothing but noise.

        They say nothing about the image, so their average over several noises stands for them, and
        is remembered for each token grid. None where the recipe does not ask for it, for another
        unconditional text than the empty one, and for deterministic images, since the average may
        be rounded otherwise in another process.
        """
        asked = self.config.preset(config.preset).recipe.averaged_start
        if not asked or not config.guided or negative_prompt or config.deterministic:
            return None
        key = config.denoiser, tuple(noise.start.shape), config.schedule
        if key not in self._starts:
            if len(self._starts) == _REMEMBERED_STARTS:
                self._starts.pop(next(iter(self._starts)))
            self._starts[key] = self._averaged_start(*key)
        return self._starts[key]

    def _averaged_start(self, name: str, grid: tuple[int, ...], schedule: Schedule) -> Tensor:
        """Return a denoiser's unconditional features at the first time, [H, W, c_out]."""
        denoiser: Any = self.denoisers[name]
        (prompt,) = self.encode([""])
        condition: Any = self.condition(prompt, reader=Reader(name))
        rng = np.random.Generator(np.random.Philox(0))
        noise = torch.from_numpy(rng.integers(denoiser.config.num_labels, size=(_NOISES, *grid)))
        times = denoiser.times(to_device([sampling.timesteps(1, schedule)[0]], self.device))
        total = torch.zeros((), device=self.device)
        for tokens in noise.split(max(1, _TOKENS_AT_ONCE // math.prod(grid))):
            row_of = torch.arange(len(tokens), device=self.device)
            several = type(condition).stack([condition] * len(tokens))
            features = denoiser.features(
                tokens.to(self.device), times.expand(len(tokens), -1).contiguous(), several, row_of
            )
            total = total + features.float().sum(0)
        return (total / _NOISES).to(self.dtype)

    def _executor_of(self, rows: Sequence[Row]) -> Executor:
        """Return what computes the steps of rows of one denoiser."""
        return self.executors[rows[0].sampling.denoiser]

    def _renoise_uniforms(
        self, rows: Sequence[Row], features: Tensor, drawn: Tensor, probability: Tensor
    ) -> Tensor:
        """Return uniforms [B, H, W], of which this step renoises the smallest.

        features: guided, [B, H, W, c_out]. drawn: [B, H, W]. probability: of renoising, [B].
        """
        uniform = torch.stack([row.noise.renoise[row.step] for row in rows])
        numbers = [i for i, row in enumerate(rows) if row.renoises_by_confidence]
        if not numbers:
            return uniform
        executor = self._executor_of(rows)
        if len(numbers) == len(rows):
            log_p = executor.log_probability(features, drawn)
            return sampling.least_confident_first(log_p, uniform, probability)
        members = to_device(numbers, self.device)
        log_p = executor.log_probability(features[members], drawn[members])
        uniform[members] = sampling.least_confident_first(
            log_p, uniform[members], probability[members]
        )
        return uniform

    @cached_property
    def _renoise_and_pin(self) -> Callable[..., tuple[Tensor, Tensor]]:
        """`sampling.renoise_and_pin`, or its kernel where the denoiser has kernels."""
        if not (isinstance(self.bundle.denoiser, Denoiser) and self.bundle.denoiser.fused):
            return sampling.renoise_and_pin
        from model.kernels.triton.renoise_and_pin import renoise_and_pin

        return renoise_and_pin

    def _guidance_weights(self, rows: Sequence[Row], grid: Sequence[int]) -> Tensor:
        """Return every branch's weight: [N], or [N, H, W] where a row has regions."""
        weights = [row.guidance_weights[row.step, : len(row.branches)] for row in rows]
        if all(row.coverage is None for row in rows):
            return torch.cat(weights)
        maps = [weight[:, None, None].expand(-1, *grid) for weight in weights]
        return torch.cat(
            [
                m if row.coverage is None else m * row.coverage[: len(m)]
                for m, row in zip(maps, rows, strict=True)
            ]
        )

    def _branches_of(self, rows: Sequence[Row]) -> BranchBatch:
        """Return the rows' branches; another object only when rows or branches have changed."""
        members = [(i, condition) for i, row in enumerate(rows) for condition in row.branches]
        if self._branches is None or not self._branches.hold(members):
            self._branches = BranchBatch(members, to_device([i for i, _ in members], self.device))
        return self._branches

    def _time_table(self, row: Row) -> Tensor:
        """Return the time's part of the denoiser's blocks at every step of the schedule, [n, S]."""
        sampling = row.sampling
        key = sampling.denoiser, sampling.steps, sampling.schedule
        if key not in self._times:
            denoiser = self.denoisers[sampling.denoiser]
            self._times[key] = denoiser.times(to_device(row.times[:-1], self.device))
        return self._times[key]

    def _sample(self, rows: Sequence[Row], features: Tensor, inputs: SamplingInputs) -> Tensor:
        """Draw tokens [B, H, W] from guided features [B, H, W, c_out], by each row's sampler."""
        executor = self._executor_of(rows)
        families: dict[Sampler, list[int]] = {}
        for i, row in enumerate(rows):
            families.setdefault(row.sampling.sampler, []).append(i)
        if len(families) == 1:
            return executor.sample(rows[0].sampling.sampler, features, inputs)
        tokens = torch.empty(features.shape[:-1], dtype=torch.int64, device=self.device)
        for family, numbers in families.items():
            members = to_device(numbers, self.device)
            tokens[members] = executor.sample(family, features[members], inputs.select(members))
        return tokens

    @torch.inference_mode()
    def _decode_tokens(self, tokens: Tensor) -> Tensor:
        return self.pixels(tokens)

    def pixels(self, tokens: Tensor) -> Tensor:
        """Decode tokens, in plain operators; see `DecodeFn`."""
        image = self.bundle.vqgan.decode(tokens).float().clamp_(0, 1).mul_(255).round_()
        return image.to(torch.uint8).permute(0, 2, 3, 1).contiguous()

    def decode(self, tokens: Tensor) -> Tensor:
        """Decode tokens [B, H, W] to images uint8 [B, height, width, 3] on the CPU."""
        return self.decode_tokens(tokens).cpu()

    def generate(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        config: SamplingConfig | None = None,
        *,
        width: int | None = None,
        height: int | None = None,
        negative_prompt: str = "",
        progress: Callable[[int], object] = lambda step: None,
    ) -> Tensor:
        """Return one image per prompt and seed, all in one batch: uint8 [B, height, width, 3].

        progress: called after every step with the number of steps so far.
        """
        return self.decode(
            self.generate_tokens(
                prompts,
                seeds,
                config,
                width=width,
                height=height,
                negative_prompt=negative_prompt,
                progress=progress,
            )
        )

    def generate_tokens(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        config: SamplingConfig | None = None,
        *,
        width: int | None = None,
        height: int | None = None,
        negative_prompt: str = "",
        progress: Callable[[int], object] = lambda step: None,
    ) -> Tensor:
        """Return tokens [B, H, W]; the arguments are those of `generate`."""
        config = config or self.config.sampling()
        w, h = width or self.config.native_size[0], height or self.config.native_size[1]
        settings, reader = self.prior_settings(config), self.reader(config)
        drawn = config.steps, config.renoise_mode, config.renoise_order, settings
        noises = [self.noise(seed, w, h, *drawn) for seed in seeds]
        requests = [
            asked
            for prompt, noise in zip(prompts, noises, strict=True)
            for asked in self._read(prompt, noise, config, w, h)
        ]
        texts = [asked.text for asked in requests]
        read_negative = self.config.read_negative(negative_prompt)
        *encoded, negative = self.encode([*texts, read_negative])
        images = self.prior_embeddings(encoded, [asked.noise for asked in requests], settings)
        unconditional = self.condition(negative, reader=reader) if config.guided else None
        rows: list[Row] = []
        regions: list[RegionBranch] = []
        for asked, text, image in zip(requests, encoded, images, strict=True):
            condition = self.condition(text, image, reader)
            if asked.weight is not None:
                regions.append(RegionBranch(condition, asked.weight))
                continue
            row = self.start(asked.noise, config, condition, unconditional, regions)
            row.unconditional_start = self.unconditional_start(asked.noise, config, read_negative)
            rows.append(row)
            regions = []
        return self.denoise(rows, progress)

    def _read(
        self, prompt: str, noise: Noise, config: SamplingConfig, width: int, height: int
    ) -> list[_Asked]:
        """Return the texts of an image: those of its regions, then the prompt's."""
        reading = self.config.read_prompt(prompt)
        if not (reading.parts and self.config.preset(config.preset).recipe.auto_regions):
            return [_Asked(reading.whole, noise)]
        first, regions = parted(reading.parts, width, height)
        weights = [
            token_weight(as_tensor(region.weight).to(self.device) / 255, self.downscale)
            for region in regions
        ]
        texts = [region.prompt for region in regions]
        return [*map(_Asked, texts, [noise] * len(texts), weights), _Asked(first, noise)]


class PipelineV3(Pipeline):
    """Bytes, CLIP's text and the prior's image are keys and values for the denoiser's attention.

    run_prior: all steps of the prior. conditions: what computes each denoiser's condition, by the
    network's name. Both may be replaced by faster forms.
    """

    bundle: BundleV3
    config: BundleV3Config

    def __init__(self, bundle: BundleV3) -> None:
        super().__init__(bundle)
        self.run_prior: PriorFn = self.sample_prior
        self.conditions: dict[str, ConditionFn] = {
            name: cast(Denoiser, denoiser).condition for name, denoiser in self.denoisers.items()
        }

    def prior_noise(self, settings: PriorSettings) -> tuple[int, int]:
        """Return (S + 1, D), by the number of the prior's steps."""
        return settings.steps + 1, self.config.clip.embed_dim

    def text_length(self, prompt: str) -> int:
        """Return the length class of the prompt's bytes, as far as they are read."""
        limit = self.config.byt5.max_bytes
        return bucket(min(len(prompt.encode("utf-8", "replace")) + 1, limit), limit)

    @torch.inference_mode()
    def encode(self, prompts: Sequence[str]) -> list[Prompt]:
        """Encode by both text encoders."""
        b = self.bundle
        tokens, cut = b.clip.tokenize(prompts)
        out, clip = b.byt5(prompts), b.clip.encode_tokens(tokens)
        named = [
            tuple(n for n, is_cut in (("byt5", x), ("clip", y)) if is_cut)
            for x, y in zip(out.truncated, cut, strict=True)
        ]
        parts = (
            self._here(out.embeddings),
            out.mask.to(self.device, non_blocking=True),
            self._here(clip),
        )
        rows = zip(*(part.split(1) for part in parts), named, strict=True)
        return [Prompt(*row) for row in rows]

    @torch.inference_mode()
    def prior_embeddings(
        self,
        prompts: Sequence[Prompt],
        noises: Sequence[Noise],
        settings: PriorSettings | None = None,
    ) -> list[Tensor]:
        """Run the prior."""
        text = torch.cat([p.clip for p in prompts])
        noise = torch.stack([n.prior for n in noises], dim=1).to(self.device, non_blocking=True)
        images = self.run_prior(text, noise, settings or self.prior_settings())
        return list(images.to(text.dtype).split(1))

    def sample_prior(self, text: Tensor, noise: Tensor, settings: PriorSettings) -> Tensor:
        """Return the prior's image embeddings, in plain operators; see `PriorFn`."""
        return prior.sample(
            self.bundle.prior,
            text,
            noise * settings.temperature,
            guidance=settings.guidance,
            sampler=settings.sampler,
        )

    @torch.inference_mode()
    def condition(
        self, prompt: Prompt, image: Tensor | None = None, reader: Reader | None = None
    ) -> AnyCondition:
        """Return keys and values; the conditional branch's are weighted."""
        reader = reader or self.reader()
        weights = self._attention_weights(prompt, reader) if image is not None else None
        condition = self.conditions[reader.denoiser]
        return condition(prompt.byt5, prompt.mask, prompt.clip, image, weights)

    def _attention_weights(self, prompt: Prompt, reader: Reader) -> Tensor | None:
        """Return the reader's weights [1, L] of condition tokens."""
        if reader.attention_weights is None:
            return None
        config: Any = self.config.denoiser_of(reader.denoiser)
        return attention_weights(prompt.mask, config.clip_seq_len, reader.attention_weights)


def attention_weights(mask: Tensor, clip_seq_len: int, weights: tuple[float, float]) -> Tensor:
    """Return the published recipe's weights [B, L + 2 clip_seq_len] of condition tokens.

    Counted from the end and without padding, the last `clip_seq_len` weigh `image`, and those
    before them, as many as the prompt has bytes, `text`. mask: [B, L], False where bytes are
    padding. weights: (text, image).
    """
    text, image = weights
    real = F.pad(mask, (0, 2 * clip_seq_len), value=True)
    # Counted from the end, the last is 1. Nothing asks the device for a number: the answer would
    # come when all before it is computed.
    place = real.flip(1).cumsum(1).flip(1)
    factors = torch.where(place <= clip_seq_len, image, text)
    return torch.where(real & (place <= mask.sum(1, keepdim=True)), factors, 1.0)


class PipelineV1(Pipeline):
    """A CLIP embedding scales and shifts the denoiser's blocks.

    There is no prior: the embedding is the prompt's own.
    """

    bundle: BundleV1
    config: BundleV1Config

    def text_length(self, prompt: str) -> int:
        """Return 0: CLIP pads every text alike."""
        return 0

    @torch.inference_mode()
    def encode(self, prompts: Sequence[str]) -> list[Prompt]:
        """Encode by CLIP. The empty text is the zero embedding, v1's unconditional one."""
        clip, nothing = self.bundle.clip, torch.empty(1, 0, device=self.device)
        written = to_device([bool(prompt) for prompt in prompts], self.device)[:, None]
        tokens, too_long = clip.tokenize(prompts)
        embeddings = (self._here(clip.encode_tokens(tokens)) * written).split(1)
        cut = [("clip",) if is_cut else () for is_cut in too_long]
        return [
            Prompt(nothing[..., None], nothing.bool(), *row)
            for row in zip(embeddings, cut, strict=True)
        ]

    def prior_embeddings(
        self,
        prompts: Sequence[Prompt],
        noises: Sequence[Noise],
        settings: PriorSettings | None = None,
    ) -> list[Tensor]:
        """Return the texts' own embeddings."""
        return [prompt.clip for prompt in prompts]

    @torch.inference_mode()
    def condition(
        self, prompt: Prompt, image: Tensor | None = None, reader: Reader | None = None
    ) -> AnyCondition:
        """Return the blocks' scales and shifts, of the image if there is one, else of the text."""
        denoiser: Any = self.denoisers[(reader or self.reader()).denoiser]
        condition: AnyCondition = denoiser.condition(prompt.clip if image is None else image)
        return condition
