"""Build rows from image requests: encode texts and images, run the prior, start each row.

    builder = RowBuilder(pipeline)
    sampling = pipeline.config.recipe.sampling()
    rows = builder.build([ImageRequest("a red apple", 7, 128, 128, sampling)])
    tokens = pipeline.denoise(rows)                     # [B, H, W]

The engine, the command line, the evaluation and the GPU checks all build their rows here.

Requests of one call share batches (`batch_encoder.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from model.batch_encoder import (
    BatchEncoder,
    BranchKey,
    EncodedText,
    EncodingCache,
    ImageKey,
    NoCache,
    PriorKey,
    TextKey,
)
from model.conditioning import Conditioning, interpolate, mean
from model.image_request import Edit, ImageRequest, InputImage, Refine, Repaint, Tile
from model.pipeline import Pipeline, Reader
from model.rows import (
    AnyCondition,
    PinnedTokens,
    RegionBranch,
    Row,
    as_tensor,
    edit,
    refine,
    repaint,
    token_mask,
    token_weight,
)
from model.sampling import Noise

# Measure a stage: "encode" or "prior".
StageTimer = Callable[[str], AbstractContextManager[None]]


@dataclass(frozen=True, slots=True)
class _Encodings:
    """The encoded parts of the requests of one call.

    conditions: the conditional branches of prompts with the prior's embedding. embeddings: those of
    the prior that are mixed before they become a branch.
    """

    texts: Mapping[TextKey, EncodedText]
    images: Mapping[ImageKey, Tensor]
    conditions: Mapping[BranchKey, AnyCondition]
    embeddings: Mapping[PriorKey, Tensor]


class RowBuilder:
    """Build the rows of one pipeline."""

    def __init__(self, pipeline: Pipeline, cache: EncodingCache | None = None) -> None:
        self.pipeline = pipeline
        self._encoder = BatchEncoder(pipeline, NoCache() if cache is None else cache)
        self._model = pipeline.config.name
        # The larger image whose tiles were built last.
        self._whole: dict[Hashable, Noise] = {}

    def build(
        self,
        requests: Sequence[ImageRequest],
        timed: StageTimer = lambda stage: nullcontext(),
        noises: Sequence[Noise] | None = None,
    ) -> list[Row]:
        """Return the requests' rows, in order.

        timed: entered around each stage, with its name. noises: by default drawn from the seeds.
        """
        with timed("encode"):
            texts = self._encoder.encode_texts(self._text_keys(requests))
            images = self._encoder.encode_images(
                {key: image for each in requests for key, image in self._images(each)}
            )
        with timed("prior"):
            noises = [self.noise(each) for each in requests] if noises is None else noises
            by_request = list(zip(requests, noises, strict=True))
            branches = {key: noise for each, noise in by_request for key in self._branch_keys(each)}
            mixed = {key: noise for each, noise in by_request for key in self._mixed_keys(each)}
            encodings = _Encodings(
                texts,
                images,
                self._encoder.condition_on_prior(branches, texts),
                self._encoder.run_prior(mixed, texts),
            )
            return [self._row(each, noise, encodings) for each, noise in by_request]

    def noise(self, request: ImageRequest) -> Noise:
        """Return all of an image's randomness, on the CPU; a tile's is a part of the whole's."""
        if request.tile is None:
            return self._noise(request, request.width, request.height)
        height, width = self.pipeline.grid(request.width, request.height)
        y, x = self.pipeline.grid(request.tile.x, request.tile.y)
        whole = self._whole_noise(request, request.tile)
        return whole.part(slice(y, y + height), slice(x, x + width))

    def _noise(self, request: ImageRequest, width: int, height: int) -> Noise:
        sampling = request.sampling
        settings = self.pipeline.prior_settings(sampling)
        drawn = sampling.steps, sampling.renoise_mode, sampling.renoise_order, settings
        return self.pipeline.noise(request.seed, width, height, *drawn)

    def _whole_noise(self, request: ImageRequest, tile: Tile) -> Noise:
        """Return the randomness that an image's tiles share; drawn once while they are built."""
        sampling, size = request.sampling, (tile.width, tile.height)
        settings = self.pipeline.prior_settings(sampling)
        modes = sampling.renoise_mode, sampling.renoise_order, settings
        key = request.seed, size, tile.prior_size, sampling.steps, modes
        if key not in self._whole:
            drawn = self.pipeline.noise(request.seed, *tile.prior_size, steps=0, prior=settings)
            prior = drawn.prior
            self._whole = {key: replace(self._noise(request, *size), prior=prior)}
        return self._whole[key]

    # ── keys ──────────────────────────────────────────────────────────────────────────────────────

    def _text_keys(self, requests: Sequence[ImageRequest]) -> list[TextKey]:
        """Return each text once: all prompts, then all negative prompts."""
        prompts = [self._text_key(each, prompt) for each in requests for prompt in each.prompts]
        negatives = [self._negative_key(each) for each in requests if each.sampling.guided]
        return list(dict.fromkeys([*prompts, *negatives]))

    def _text_key(self, request: ImageRequest, prompt: str) -> TextKey:
        return TextKey(
            self._model,
            prompt,
            shared=not request.sampling.deterministic,
            negative="",
            scope=request.cache_scope,
        )

    def _negative_key(self, request: ImageRequest) -> TextKey:
        key = self._text_key(request, request.negative_prompt)
        return key._replace(negative=request.sampling.denoiser)

    def _image_key(
        self, request: ImageRequest, kind: Literal["tokens", "embedding"], image: InputImage
    ) -> ImageKey:
        shared = not request.sampling.deterministic
        return ImageKey(
            self._model,
            kind,
            image.digest,
            image.width,
            image.height,
            shared,
            scope=request.cache_scope,
        )

    def _prior_key(self, request: ImageRequest, prompt: str) -> PriorKey:
        settings = self.pipeline.prior_settings(request.sampling)
        text = self._text_key(request, prompt)
        if settings.temperature == 0:
            return PriorKey(text, seed=0, width=0, height=0, settings=settings)
        return PriorKey(text, request.seed, *request.prior_size, settings)

    def _branch_key(self, request: ImageRequest, prompt: str) -> BranchKey:
        return BranchKey(self._prior_key(request, prompt), self._reader(request))

    def _reader(self, request: ImageRequest) -> Reader:
        return self.pipeline.reader(request.sampling)

    def _images(self, request: ImageRequest) -> Iterable[tuple[ImageKey, InputImage]]:
        seen = [reference.image for reference in request.references]
        seen += [keyframe.image for keyframe in request.keyframes if keyframe.image]
        for image in seen:
            yield self._image_key(request, "embedding", image), image
        if request.canvas is not None:
            image = request.canvas.image
            yield self._image_key(request, "tokens", image), image

    def _branch_keys(self, request: ImageRequest) -> list[BranchKey]:
        """Return those of the prior's results that become a branch as they are."""
        mixed = bool(request.keyframes or request.references)
        prompts = [] if mixed else [request.prompt]
        prompts += [region.prompt for region in request.regions]
        return [self._branch_key(request, prompt) for prompt in prompts]

    def _mixed_keys(self, request: ImageRequest) -> list[PriorKey]:
        """Return those of the prior's results that are mixed with others first."""
        prompts = [keyframe.prompt for keyframe in request.keyframes if keyframe.image is None]
        return [self._prior_key(request, prompt) for prompt in prompts]

    # ── one row ───────────────────────────────────────────────────────────────────────────────────

    def _row(self, request: ImageRequest, noise: Noise, encodings: _Encodings) -> Row:
        unconditional = (
            encodings.texts[self._negative_key(request)].unconditional
            if request.sampling.guided
            else None
        )
        conditional = self._conditional(request, encodings)
        regions = self._regions(request, encodings)
        row = self.pipeline.start(noise, request.sampling, conditional, unconditional, regions)
        row.truncated = self._truncated(request, encodings)
        if request.canvas is None:
            row.unconditional_start = self.pipeline.unconditional_start(
                noise, request.sampling, request.negative_prompt
            )
            return row
        tokens = encodings.images[self._image_key(request, "tokens", request.canvas.image)]
        match request.canvas:
            case Repaint(mask=mask):
                keep = ~token_mask(as_tensor(mask).bool(), self.pipeline.downscale)
                return repaint(row, PinnedTokens(tokens, self._on_device(keep)))
            case Edit(strength=strength):
                return edit(row, tokens, strength)
            case Refine(strength=strength):
                return refine(row, tokens, strength)

    def _regions(self, request: ImageRequest, encodings: _Encodings) -> list[RegionBranch]:
        branches = []
        for region in request.regions:
            weight = token_weight(as_tensor(region.weight).float() / 255, self.pipeline.downscale)
            condition = encodings.conditions[self._branch_key(request, region.prompt)]
            branches.append(RegionBranch(condition, self._on_device(weight)))
        return branches

    def _conditional(self, request: ImageRequest, encodings: _Encodings) -> AnyCondition:
        if request.keyframes:
            frame = self._frame(request, encodings)
            return self.pipeline.condition(frame.prompt, frame.image, self._reader(request))
        if request.references:
            embeddings = [
                self._embedding(request, reference.image, encodings)
                for reference in request.references
            ]
            prompt = encodings.texts[self._text_key(request, request.prompt)].prompt
            image = mean(embeddings, [reference.weight for reference in request.references])
            return self.pipeline.condition(prompt, image, self._reader(request))
        return encodings.conditions[self._branch_key(request, request.prompt)]

    def _frame(self, request: ImageRequest, encodings: _Encodings) -> Conditioning:
        """Return a keyframe's conditioning, or one between it and the next."""
        first = min(int(request.position), len(request.keyframes) - 2)
        one, other = (self._keyframe(request, number, encodings) for number in (first, first + 1))
        return interpolate(one, other, request.position - first, request.mode)

    def _keyframe(self, request: ImageRequest, number: int, encodings: _Encodings) -> Conditioning:
        keyframe = request.keyframes[number]
        prompt = encodings.texts[self._text_key(request, keyframe.prompt)].prompt
        if keyframe.image is None:
            return Conditioning(
                prompt, encodings.embeddings[self._prior_key(request, keyframe.prompt)]
            )
        return Conditioning(prompt, self._embedding(request, keyframe.image, encodings))

    def _embedding(self, request: ImageRequest, image: InputImage, encodings: _Encodings) -> Tensor:
        return encodings.images[self._image_key(request, "embedding", image)]

    def _truncated(self, request: ImageRequest, encodings: _Encodings) -> tuple[str, ...]:
        texts = [encodings.texts[key] for key in self._text_keys([request])]
        return tuple(sorted({name for text in texts for name in text.prompt.truncated}))

    def _on_device(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.pipeline.device, non_blocking=True)
