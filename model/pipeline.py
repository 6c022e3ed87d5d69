"""The whole way from prompt to pixels on one bundle's networks: encode → prior → condition → advance × n → decode.

    pipeline = Pipeline.load(find_bundle("tiny"))
    image = pipeline.generate(["a red apple on a white background"], seeds=[7])[0]      # uint8 [H, W, 3]

The stages are separate because the server interleaves many requests' stages; `generate` is what a script wants.
Letters: B rows, N branches (one or two a row), H W token grid, L condition tokens, K codes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, Protocol, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from model import operations, prior, sampling
from model.bundle import Bundle, load_bundle
from model.config import Sampler, SamplingConfig
from model.denoiser import Condition
from model.operations import Row
from model.sampling import Noise
from model.text import bucket


@dataclass(frozen=True, slots=True)
class Prompt:
    """One encoded prompt: byte embeddings [1, L, D] with mask [1, L], CLIP text embedding [1, D']; truncated: encoders that cut it."""

    byt5: Tensor
    mask: Tensor
    clip: Tensor
    truncated: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Lanes:
    """The conditions of one set of rows at one set of branches; the same for many steps.

    members: each branch's row number and condition. Holding the conditions keeps a later one from taking a freed one's identity.
    row_of: [N], the row numbers on the device.
    """

    members: list[tuple[int, Condition]]
    row_of: Tensor

    def hold(self, members: list[tuple[int, Condition]]) -> bool:
        """Whether these are the very same conditions in the same places."""
        pairs = zip(self.members, members, strict=False)
        return len(self.members) == len(members) and all(i == j and mine is other for (i, mine), (j, other) in pairs)

    @cached_property
    def condition(self) -> Condition:
        """All of them as one batch, stacked when it is first asked for."""
        return stack_conditions([condition for _, condition in self.members])


class Drawing(NamedTuple):
    """What drawing B rows' tokens takes beside their features: uniform [B, H, W], inverse temperature and typical mass [B]."""

    uniform: Tensor
    inverse: Tensor
    mass: Tensor

    def of(self, members: list[int]) -> Drawing:
        """Only these rows'."""
        return Drawing(*(part[members] for part in self))


class Executor(Protocol):
    """Computes the two halves of a step, on tensors of one device."""

    def features(self, tokens: Tensor, times: Tensor, lanes: Lanes, share: Tensor) -> Tensor:
        """Tokens [B, H, W], times [B, S] and each branch's share [N] or [N, H, W] → guided features [B, H, W, c_out]."""

    def draw(self, sampler: Sampler, features: Tensor, drawing: Drawing) -> Tensor:
        """Guided features [B, H, W, c_out] → tokens [B, H, W]."""


class Eager:
    """Computes a step by calling one operator after the other."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle, self.denoiser = bundle, bundle.denoiser

    def features(self, tokens: Tensor, times: Tensor, lanes: Lanes, share: Tensor) -> Tensor:
        branches = self.denoiser.features(tokens, times, lanes.condition, lanes.row_of)
        return sampling.mix(branches, lanes.row_of, share, len(tokens))

    def draw(self, sampler: Sampler, features: Tensor, drawing: Drawing) -> Tensor:
        project = self.denoiser.project
        if sampler == "argmax":
            return project(features).argmax(-1)
        inverse = drawing.inverse[:, None, None, None]
        if sampler == "typical":
            logits = project(features).float()
            mass = drawing.mass[:, None, None].expand(logits.shape[:-1])
            return sampling.inverse_cdf(sampling.keep_typical(logits, mass) * inverse, drawing.uniform)
        # The projection is linear: dividing what goes in costs a sixteenth of dividing the logits.
        logits = project((features * inverse).to(features.dtype))
        if sampler == "quant":
            quantizer = self.bundle.vqgan.vquantizer
            return quantizer.nearest(sampling.quantised_mean(logits, quantizer.codebook.weight))
        return sampling.inverse_cdf(logits, drawing.uniform)


class Pipeline:
    """A bundle ready to compute. Not thread-safe: one thread steps it."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle, self.config = bundle, bundle.config
        self.device = next(bundle.denoiser.parameters()).device
        self.executor: Executor = Eager(bundle)
        self._times: dict[int, Tensor] = {}
        self._lanes: Lanes | None = None

    @classmethod
    def load(cls, directory: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Self:
        """Reads a bundle; raises what `load_bundle` raises."""
        return cls(load_bundle(directory, torch.device(device), dtype))

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """Pixels (width, height) → tokens (H, W)."""
        f = self.config.vqgan.downscale
        return height // f, width // f

    def noise(self, seed: int, width: int, height: int, steps: int) -> Noise:
        """All of one image's randomness, on the CPU."""
        shape = (self.config.recipe.prior_steps + 1, self.config.clip.embed_dim)
        return sampling.draw_noise(seed, codes=self.config.vqgan.codebook_size, grid=self.grid(width, height), steps=steps, prior=shape)

    def text_length(self, prompt: str) -> int:
        """Bytes the prompt is padded to by itself; encoded beside longer ones it is padded to theirs."""
        limit = self.config.byt5.max_bytes
        return bucket(min(len(prompt.encode("utf-8", "replace")) + 1, limit), limit)

    @torch.inference_mode()
    def encode(self, prompts: Sequence[str]) -> list[Prompt]:
        """Text encoders, once per prompt. Neighbours in the list do not change each other's result."""
        b = self.bundle
        out, clip = b.byt5(prompts), b.clip.encode_text(prompts)
        cut = b.clip.truncated(prompts)
        named = [tuple(n for n, is_cut in (("byt5", x), ("clip", y)) if is_cut) for x, y in zip(out.truncated, cut, strict=True)]
        rows = zip(out.embeddings.split(1), out.mask.split(1), clip.split(1), named, strict=True)
        return [Prompt(*row) for row in rows]

    @torch.inference_mode()
    def image_embeddings(self, prompts: Sequence[Prompt], noises: Sequence[Noise]) -> list[Tensor]:
        """The prior: for each prompt and noise, a CLIP image embedding [1, D'] of a picture that fits."""
        r = self.config.recipe
        text = torch.cat([p.clip for p in prompts])
        noise = torch.stack([n.prior for n in noises], dim=1).to(self.device)
        drawn = prior.sample(self.bundle.prior, text, noise, guidance=r.prior_guidance, sampler=r.prior_sampler)
        return list(drawn.to(text.dtype).split(1))

    @torch.inference_mode()
    def condition(self, prompt: Prompt, image: Tensor | None = None) -> Condition:
        """What the denoiser's attention reads. With an image embedding [1, D'] it is the conditional branch, weighted by the recipe."""
        weights = self._attention_weights(prompt) if image is not None else None
        return self.bundle.denoiser.condition(prompt.byt5, prompt.mask, prompt.clip, image, weights)

    def _attention_weights(self, prompt: Prompt) -> Tensor | None:
        """The published recipe: of the condition tokens but for padding, the last n (the byte count) weigh `text`, the last 4 `image`."""
        if self.config.recipe.attention_weights is None:
            return None
        text, image = self.config.recipe.attention_weights
        seq, length = self.config.denoiser.clip_seq_len, prompt.mask.shape[1]
        real = F.pad(prompt.mask, (0, 2 * seq), value=True)[0]
        count = int(prompt.mask.sum())
        weights = torch.full((count,), text, device=real.device)
        weights[-seq:] = image
        full = torch.ones(length + 2 * seq, device=real.device)
        full[real.nonzero()[-count:, 0]] = weights
        return full[None]

    @torch.inference_mode()
    def start(self, noise: Noise, sampling: SamplingConfig, conditional: Condition, unconditional: Condition | None) -> Row:
        """A generate row, its randomness on the device."""
        on_device = Noise(*(getattr(noise, name).to(self.device, non_blocking=True) for name in ("start", "prior", "draw", "renoise")))
        return operations.generate(sampling, on_device, conditional, unconditional)

    @torch.inference_mode()
    def advance(self, rows: Sequence[Row]) -> None:
        """One step for every row. All rows share a token grid; everything else is each row's own."""
        lanes = self._lanes_of(rows)
        tokens = torch.stack([row.tokens for row in rows])  # [B, H, W]
        times = torch.stack([self._time_table(row.sampling.steps)[row.step] for row in rows])  # [B, S]
        share = self._shares(rows, tokens.shape[1:])
        inverse, probability, mass = torch.stack([row.schedule[row.step] for row in rows], dim=1).unbind()  # [B] each
        uniform = torch.stack([row.noise.draw[row.step] for row in rows])
        features = self.executor.features(tokens, times, lanes, share)
        drawn = self._draw(rows, features, Drawing(uniform, inverse, mass))
        start = torch.stack([row.noise.start for row in rows])
        uniform = torch.stack([row.noise.renoise[row.step] for row in rows])
        fresh = sampling.renoise(drawn, start, uniform, probability)
        # A copy, because an executor may draw the next rows into the same memory.
        for row, clean, tokens in zip(rows, drawn.clone(), fresh, strict=True):
            row.drawn, row.tokens = row.pinned(clean), row.pinned(tokens)
            row.step += 1

    def _shares(self, rows: Sequence[Row], grid: Sequence[int]) -> Tensor:
        """What every branch counts: [N], or [N, H, W] where a row has regions."""
        shares = [row.shares[row.step, : len(row.branches)] for row in rows]
        if all(row.coverage is None for row in rows):
            return torch.cat(shares)
        maps = [share[:, None, None].expand(-1, *grid) for share in shares]
        return torch.cat([m if row.coverage is None else m * row.coverage[: len(m)] for m, row in zip(maps, rows, strict=True)])

    def _lanes_of(self, rows: Sequence[Row]) -> Lanes:
        """The rows' branches; another object only when rows or branches have changed."""
        members = [(i, condition) for i, row in enumerate(rows) for condition in row.branches]
        if self._lanes is None or not self._lanes.hold(members):
            self._lanes = Lanes(members, torch.tensor([i for i, _ in members], device=self.device))
        return self._lanes

    def _time_table(self, steps: int) -> Tensor:
        """Scales and shifts of the T blocks at every step of an n-step schedule, [n, S]."""
        if steps not in self._times:
            ts = torch.tensor(sampling.timesteps(steps)[:-1], device=self.device)
            self._times[steps] = self.bundle.denoiser.times(ts)
        return self._times[steps]

    def _draw(self, rows: Sequence[Row], features: Tensor, drawing: Drawing) -> Tensor:
        """Guided features [B, H, W, c_out] → tokens [B, H, W], each row by its own sampler."""
        families: dict[Sampler, list[int]] = {}
        for i, row in enumerate(rows):
            families.setdefault(row.sampling.sampler, []).append(i)
        if len(families) == 1:
            return self.executor.draw(rows[0].sampling.sampler, features, drawing)
        tokens = torch.empty(features.shape[:-1], dtype=torch.int64, device=self.device)
        for family, members in families.items():
            tokens[members] = self.executor.draw(family, features[members], drawing.of(members))
        return tokens

    @torch.inference_mode()
    def pictures(self, tokens: Tensor) -> Tensor:
        """Codes [B, H, W] → pictures uint8 [B, height, width, 3] on the device."""
        image = self.bundle.vqgan.decode(tokens).float().clamp_(0, 1).mul_(255).round_()
        return image.to(torch.uint8).permute(0, 2, 3, 1).contiguous()

    def decode(self, tokens: Tensor) -> Tensor:
        """Codes [B, H, W] → pictures uint8 [B, height, width, 3] on the CPU."""
        return self.pictures(tokens).cpu()

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
        """One picture per prompt and seed, all in one batch: uint8 [B, height, width, 3]. progress: called after every step."""
        config = config or self.config.recipe.sampling()
        w, h = width or self.config.native_size[0], height or self.config.native_size[1]
        noises = [self.noise(seed, w, h, config.steps) for seed in seeds]
        *encoded, negative = self.encode([*prompts, negative_prompt])
        images = self.image_embeddings(encoded, noises)
        unconditional = self.condition(negative) if config.guided else None
        rows = [
            self.start(noise, config, self.condition(prompt, image), unconditional)
            for noise, prompt, image in zip(noises, encoded, images, strict=True)
        ]
        for step in range(config.steps):
            self.advance(rows)
            progress(step + 1)
        return self.decode(torch.stack([row.tokens for row in rows]))


def stack_conditions(conditions: Sequence[Condition]) -> Condition:
    """Conditions of one row each → one of many, the shorter ones padded with masked keys."""
    longest = max(c.length for c in conditions)
    kv = torch.cat([F.pad(c.kv, (0, 0, 0, longest - c.length)) for c in conditions])
    masks = [c.mask if c.mask is not None else torch.ones(1, c.length, dtype=torch.bool, device=kv.device) for c in conditions]
    return Condition(kv, torch.cat([F.pad(mask, (0, longest - mask.shape[1])) for mask in masks]))
