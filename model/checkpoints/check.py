"""Check weights by the images of eight prompts: `paellera weights check NAME`.

The bundle's own CLIP compares the images with their prompts. The owner of published weights runs
this, because they cannot be exercised where this is developed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from model.bundle_files import is_finite
from model.config import Sampler
from model.executor import BranchBatch, Eager, SamplingInputs
from model.pipeline import Pipeline

# Simple things in plain colours, which every generation of weights has seen; the seeds are their
# places.
PROMPTS = (
    "a red apple on a white background",
    "a big yellow star on a black background",
    "a cat on a blue background",
    "a red car on a cyan background",
    "a house on a green background",
    "a dog on a yellow background",
    "a pink heart on a black background",
    "a green cactus on an orange background",
)
COLUMNS = 4

# The right prompts must fit better than others by so much cosine, which trained pairs do by ten
# times that and random ones by a hundredth, and better than all but so small a share of
# assignments.
MARGIN, CHANCE = 0.02, 0.01
COLLAPSED, BLANK = 0.95, 2.0


@dataclass(frozen=True, eq=False)
class Findings:
    """The generated images and their scores.

    images: uint8 [8, height, width, 3]. tokens: [8, H, W] of `codes` codes. similarity: [8, 8],
    cosine of each image with each prompt. broken: the stages whose results had NaN or infinity.
    """

    images: Tensor
    tokens: Tensor
    codes: int
    similarity: Tensor
    broken: tuple[str, ...]

    @property
    def matched(self) -> float:
        """CLIP score of the images with their own prompts."""
        return self.similarity.diag().mean().item()

    @property
    def shuffled(self) -> float:
        """CLIP score of the images with each other's prompts."""
        n = len(self.similarity)
        return ((self.similarity.sum() - self.similarity.diag().sum()) / (n * n - n)).item()

    @property
    def chance(self) -> float:
        """Share of all assignments of prompts to images that fit as well as the right one."""
        scores = self.similarity.double().numpy()
        every = scores[
            np.arange(len(scores)), np.array(list(permutations(range(len(scores)))))
        ].sum(1)
        return float((every >= np.trace(scores) - 1e-9).mean())

    @property
    def codes_used(self) -> int:
        """Number of different codes in all images."""
        return len(self.tokens.unique())

    @property
    def most_common(self) -> float:
        """The share of the most common code, in the image where it is largest."""
        return max(t.flatten().bincount().max().item() / t.numel() for t in self.tokens)

    @property
    def entropy(self) -> float:
        """Bits of a token, over all images; log2 of `codes` if every code is as common."""
        share = self.tokens.flatten().bincount(minlength=self.codes) / self.tokens.numel()
        return torch.special.entr(share).sum().item() / float(np.log(2))

    @property
    def problems(self) -> list[str]:
        """The problems of the weights, in words; none if they behave."""
        found = [f"there is NaN or infinity in the {where}" for where in self.broken]
        if self.most_common > COLLAPSED:
            found.append(f"one code fills {self.most_common:.0%} of an image")
        if (blank := int((self.images.float().std((1, 2, 3)) < BLANK).sum())) > 0:
            found.append(f"{blank} of the images are blank")
        if self.matched - self.shuffled < MARGIN or self.chance > CHANCE:
            scores = f"{self.matched:.3f} for those, {self.shuffled:.3f} for others"
            found.append(f"the images do not show their prompts: CLIP scores {scores}")
        return found


class _Watched(Eager):
    """Record whether the denoiser's results are finite."""

    broken = False

    def features(
        self, tokens: Tensor, times: Tensor, branches: BranchBatch, weights: Tensor
    ) -> Tensor:
        """Compute as `Eager.features`."""
        features = super().features(tokens, times, branches, weights)
        self.broken = self.broken or not is_finite(features)
        return features

    def sample(self, sampler: Sampler, features: Tensor, inputs: SamplingInputs) -> Tensor:
        """Compute as `Eager.sample`, with NaN as zero."""
        return super().sample(sampler, features.nan_to_num(), inputs)


@torch.inference_mode()
def check(
    pipeline: Pipeline, progress: Callable[[], object] = lambda: None, preset: str | None = None
) -> Findings:
    """Generate the prompts' images, one after the other, by the bundle's own recipe.

    progress: called after every image. preset: by default the bundle's default one. Raises
    ValueError for an unknown one.
    """
    if preset is not None and preset not in pipeline.config.preset_names:
        known = ", ".join(pipeline.config.preset_names)
        raise ValueError(f"preset: {pipeline.config.name} has {known}, not {preset}")
    sampling = pipeline.config.sampling(preset)
    watched = _Watched(pipeline.bundle, sampling.denoiser)
    pipeline.executors[sampling.denoiser] = watched
    tokens = []
    for seed, prompt in enumerate(PROMPTS):
        tokens.append(pipeline.generate_tokens([prompt], [seed], sampling)[0].cpu())
        progress()
    drawn = torch.stack(tokens)
    decoded = torch.cat(
        [pipeline.bundle.vqgan.decode(t[None].to(pipeline.device)).float().cpu() for t in drawn]
    )
    clip = pipeline.bundle.clip
    images = torch.cat(
        [
            clip.encode_image(image[None].clamp(0, 1).nan_to_num().to(clip.device))
            for image in decoded
        ]
    )
    texts = clip.encode_text(PROMPTS)
    stages = {
        "denoiser": not watched.broken,
        "VQGAN": is_finite(decoded),
        "CLIP": is_finite(images) and is_finite(texts),
    }
    similarity = F.normalize(images.float(), dim=1) @ F.normalize(texts.float(), dim=1).T
    return Findings(
        images=(decoded.nan_to_num().clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1),
        tokens=drawn,
        codes=pipeline.config.vqgan.codebook_size,
        similarity=similarity.nan_to_num().cpu(),
        broken=tuple(stage for stage, whole in stages.items() if not whole),
    )


def write_sheet(images: Tensor, path: Path) -> None:
    """Write the images in rows of four.

    Raises ValueError for a file name that is no image's, and OSError.
    """
    _, height, width, _ = images.shape
    rows = -(-len(images) // COLUMNS)
    sheet = Image.new("RGB", (width * COLUMNS, height * rows), "white")
    for i, image in enumerate(images):
        sheet.paste(Image.fromarray(image.numpy()), (i % COLUMNS * width, i // COLUMNS * height))
    sheet.save(path)
