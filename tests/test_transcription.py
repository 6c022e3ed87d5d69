"""The transcription against the published recordings, and the engine's denoiser and loop against
the transcription.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from load_tests.stages import denoiser_arguments
from load_tests.transcription import Transcription, denoise
from model.config import DenoiserConfig, SamplingConfig
from model.networks.denoiser_v3 import Denoiser
from model.pipeline import Pipeline
from tests.conftest import golden, randomise

PUBLISHED_TOLERANCE = 1e-4

SMALL = DenoiserConfig(
    byt5_embd=20,
    c_in=12,
    c_out=8,
    num_labels=48,
    c_r=16,
    c_cond=24,
    c_hidden=(16, 32, 32),
    nhead=(-1, 4, 2),
    blocks=(1, 2, 1),
    level_config=("CT", "CTA", "CTA"),
    clip_embd=20,
)
VARIANTS = {
    "published layout": SMALL,
    "attention everywhere": replace(SMALL, nhead=(2, 4, 2), level_config=("CTA", "CTA", "CTA")),
    "one level": replace(SMALL, c_hidden=(16,), nhead=(2,), blocks=(2,), level_config=("CTA",)),
    "no patches": replace(SMALL, patch_size=1),
    "wide kernels": replace(SMALL, kernel_size=5),
    "no self-attention": replace(SMALL, self_attn=False),
    "pruned": replace(SMALL, pruned_blocks=("down_blocks.1.3", "down_blocks.1.4", "up_blocks.0.2")),
}


def published_transcription() -> tuple[Transcription, dict[str, Tensor]]:
    config, weights, recorded = golden("denoiser_v3")
    model = Transcription(DenoiserConfig(**config)).eval()
    model.load_state_dict(weights)
    return model, recorded


@pytest.mark.parametrize(
    ("output", "names"),
    [
        ("logits_byt5", ("byt5",)),
        ("logits_byt5_clip", ("byt5", "clip")),
        ("logits_all", ("byt5", "clip", "clip_image")),
        ("logits_attn_weights", ("byt5", "clip", "clip_image", "attn_weights")),
    ],
)
@torch.no_grad()
def test_transcription_reproduces_the_published_logits(output: str, names: tuple[str, ...]) -> None:
    model, recorded = published_transcription()
    logits = model(recorded["tokens"], recorded["t"], **{name: recorded[name] for name in names})
    torch.testing.assert_close(logits, recorded[output], rtol=0, atol=PUBLISHED_TOLERANCE)


@torch.no_grad()
def test_transcription_reproduces_the_published_logits_of_two_images() -> None:
    model, recorded = published_transcription()
    images = [recorded["clip_image"], recorded["clip_image_2"]]
    logits = model(recorded["tokens"], recorded["t"], recorded["byt5"], recorded["clip"], images)
    torch.testing.assert_close(
        logits, recorded["logits_two_images"], rtol=0, atol=PUBLISHED_TOLERANCE
    )


@torch.no_grad()
def test_transcription_reproduces_the_published_sampling_trace() -> None:
    model, inputs = published_transcription()
    settings, _, recorded = golden("sampler_v3")
    config = SamplingConfig(
        steps=settings["steps"],
        renoise_steps=settings["renoise_steps"],
        guidance=tuple(settings["cfg"]),
        guidance_steps=settings["cfg_steps"],
        temperature=tuple(settings["temperature"]),
        sampler=settings["mode"],
    )
    conditional = {name: inputs[name] for name in ("byt5", "clip", "clip_image", "attn_weights")}
    unconditional = {"byt5": recorded["uncond_byt5"], "clip": recorded["uncond_clip"]}
    trace = list(
        denoise(
            model,
            recorded["init_noise"],
            conditional,
            unconditional,
            config,
            recorded["renoise_uniform"],
        )
    )
    assert torch.equal(torch.stack([tokens for tokens, _ in trace]), recorded["tokens_after_step"])
    for step in (0, 5):
        torch.testing.assert_close(
            trace[step][1], recorded[f"guided_logits_step{step}"], rtol=0, atol=PUBLISHED_TOLERANCE
        )


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())
@torch.no_grad()
def test_denoiser_equals_the_transcription_on_random_weights(config: DenoiserConfig) -> None:
    transcription, denoiser = Transcription(config).eval(), Denoiser(config).eval()
    randomise(transcription)
    denoiser.load_state_dict(transcription.state_dict())
    generator = torch.Generator().manual_seed(1)
    H, W = 2 * config.token_step, 3 * config.token_step
    tokens = torch.randint(config.num_labels, (2, H, W), generator=generator)
    byt5, clip, image, other = (
        torch.randn(*shape, generator=generator)
        for shape in ((2, 7, 20), (2, 20), (2, 20), (2, 20))
    )
    arguments = (
        tokens,
        torch.tensor([0.9, 0.2]),
        byt5,
        clip,
        [image, other],
        torch.tensor([1.2, 1.2, 0.4, 0.3, 0.0]),
    )
    expected = transcription(*arguments)
    assert expected.std() > 0.1
    torch.testing.assert_close(denoiser(*arguments), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "attention_weights", [None, (1.2, 0.4)], ids=["plain", "attention weights"]
)
@torch.no_grad()
def test_engine_draws_the_tokens_that_the_transcription_draws(
    random_bundle: Path, attention_weights: tuple[float, float] | None
) -> None:
    pipeline = Pipeline.load(random_bundle)
    pipeline.config = replace(
        pipeline.config, recipe=replace(pipeline.config.recipe, attention_weights=attention_weights)
    )
    transcription = Transcription(pipeline.config.denoiser).eval()
    transcription.load_state_dict(pipeline.bundle.denoiser.state_dict())
    config = pipeline.config.recipe.sampling(
        steps=4, renoise_steps=3, guidance=(3.0, 2.0), guidance_steps=3, sampler="argmax"
    )
    noise = pipeline.noise(5, *pipeline.config.native_size, config.steps)
    prompt, negative = pipeline.encode(["a red apple on a white table", ""])
    (image,) = pipeline.prior_embeddings([prompt], [noise])

    row = pipeline.start(
        noise, config, pipeline.condition(prompt, image), pipeline.condition(negative)
    )
    arguments = (
        denoiser_arguments(pipeline, prompt, image),
        denoiser_arguments(pipeline, negative),
    )
    for tokens, _ in denoise(
        transcription, noise.start[None], *arguments, config, noise.renoise[:, None]
    ):
        pipeline.advance([row])
        assert torch.equal(row.tokens, tokens[0])
    assert len(row.tokens.unique()) > 2


@torch.no_grad()
def test_multinomial_at_a_vanishing_temperature_draws_the_most_likely_code() -> None:
    model, inputs = published_transcription()
    byt5 = {"byt5": inputs["byt5"]}
    config = SamplingConfig(
        2, 0, guidance=(1.0, 1.0), guidance_steps=0, temperature=(1e-6, 1e-6), sampler="multinomial"
    )
    for tokens, logits in denoise(model, inputs["tokens"], byt5, byt5, config):
        assert torch.equal(tokens, logits.argmax(dim=1))


def test_samplers_that_the_transcription_lacks_are_refused() -> None:
    model, inputs = published_transcription()
    byt5 = {"byt5": inputs["byt5"]}
    config = SamplingConfig(
        1, 0, guidance=(1.0, 1.0), guidance_steps=0, temperature=(1.0, 1.0), sampler="typical"
    )
    with pytest.raises(ValueError, match="not typical"):
        next(denoise(model, inputs["tokens"], byt5, byt5, config))
