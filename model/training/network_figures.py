"""Measure what a bundle's networks beside the denoiser do on held-out scenes."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from model.pipeline import Pipeline
from model.training import scene_samplers
from model.training.benchmark import Rendered
from model.training.captions import COMPLETE, describe
from model.training.prompts import BenchPrompt
from model.training.scenes import SQUARE, Scene

HELD_OUT_SEED = 987_654_321  # no trainer's stream starts from it
_BATCH = 16


@torch.inference_mode()
def networks(pipeline: Pipeline, sprites: Tensor, count: int = 256) -> dict[str, float]:
    """Return figures of the other networks on held-out scenes.

    VQGAN reconstruction, CLIP retrieval among `count` images, the prior's likeness.
    """
    rng = np.random.default_rng(HELD_OUT_SEED)
    chosen = [_square(rng) for _ in range(count)]
    texts = [describe(scene, rng, wording=COMPLETE).text for scene in chosen]
    cases = [BenchPrompt(text, scene) for text, scene in zip(texts, chosen, strict=True)]
    errors = []
    truths = []
    used = set[int]()
    renders = Rendered(sprites)
    for start in range(0, count, _BATCH):
        images = renders.images(cases[start : start + _BATCH], [start] * _BATCH)
        tokens = pipeline.encode_images(images)
        used.update(tokens.unique().tolist())
        apart = (pipeline.decode(tokens).float() - images.float()) / 255
        errors.append(apart.square().mean((1, 2, 3)))
        truths += pipeline.embed_images(list(images))
    prompts = pipeline.encode(texts)
    truth, text = torch.cat(truths).float(), torch.cat([prompt.clip for prompt in prompts]).float()
    similarity = F.normalize(truth, dim=-1) @ F.normalize(text, dim=-1).T
    correct = torch.arange(count, device=similarity.device)
    width, height = pipeline.config.native_size
    noises = [pipeline.noise(i, width, height, 1) for i in range(count)]
    guessed = torch.cat(pipeline.prior_embeddings(prompts, noises)).float()
    likeness = F.cosine_similarity
    return {
        "vqgan_psnr": round(float((-10 * torch.cat(errors).log10()).mean()), 2),
        "codes_used": len(used),
        "clip_text_found": round(float((similarity.argmax(1) == correct).float().mean()), 4),
        "clip_image_found": round(float((similarity.argmax(0) == correct).float().mean()), 4),
        "prior_cosine": round(float(likeness(guessed, truth).mean()), 4),
        "prior_cosine_shuffled": round(float(likeness(guessed, truth.roll(1, 0)).mean()), 4),
    }


def _square(rng: np.random.Generator) -> Scene:
    while True:
        scene = scene_samplers.sample(rng)
        if scene.aspect == SQUARE:
            return scene
