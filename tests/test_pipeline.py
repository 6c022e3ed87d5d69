"""A picture is its own: the same alone and in any company, of any size, with any sampler.

Tokens are compared, not pixels. Other company means other shapes of matrix products, and those add
in another order, so a draw within rounding of a boundary may fall to the other side: what is
promised is 99 % of the tokens, and all of them in company of the same shape.
"""

from __future__ import annotations

import weakref
from dataclasses import replace
from itertools import count

import pytest
import torch
from torch import Tensor

from model import sampling
from model.config import SamplingConfig
from model.networks.denoiser_v3 import Condition
from model.pipeline import Pipeline, PipelineV3
from model.rows import Row, generate
from model.sampling import NEVER

PROMPTS = ("red apple", "", "the red apple in the red apple and on and on, until it is cut", "🍎")
PLAIN = SamplingConfig(
    steps=6,
    renoise_steps=5,
    guidance=(4.0, 4.0),
    guidance_steps=6,
    temperature=(0.7, 0.3),
    sampler="multinomial",
    typical_mass=0.4,
)
UNGUIDED = replace(PLAIN, guidance=(1.0, 1.0))
SAMPLERS = ("multinomial", "argmax", "typical", "quant")


def row(
    pipeline: Pipeline, prompt: str = PROMPTS[0], seed: int = 0, config: SamplingConfig = PLAIN
) -> Row:
    noise = pipeline.noise(seed, 32, 32, config.steps, config.renoise_mode, config.renoise_order)
    encoded, negative = pipeline.encode([prompt, ""])
    (image,) = pipeline.prior_embeddings([encoded], [noise])
    return pipeline.start(
        noise, config, pipeline.condition(encoded, image), pipeline.condition(negative)
    )


def run(pipeline: Pipeline, *rows: Row) -> list[Tensor]:
    while unfinished := [r for r in rows if not r.done]:
        pipeline.advance(unfinished)
    return [r.tokens for r in rows]


def agreement(one: Tensor, other: Tensor) -> float:
    return (one == other).float().mean().item()


@pytest.fixture(scope="module")
def alone(pipeline: Pipeline) -> Tensor:
    return run(pipeline, row(pipeline))[0]


# ── company ───────────────────────────────────────────────────────────────────────────────────────


def test_the_same_seed_draws_exactly_the_same_tokens_again(pipeline, alone):
    assert torch.equal(run(pipeline, row(pipeline))[0], alone)


def test_other_seeds_and_other_prompts_draw_other_tokens(pipeline, alone):
    assert agreement(run(pipeline, row(pipeline, seed=1))[0], alone) < 0.9
    assert agreement(run(pipeline, row(pipeline, prompt=PROMPTS[2]))[0], alone) < 0.99


@pytest.mark.parametrize("position", range(4))
def test_a_row_is_the_same_at_every_place_of_a_batch(pipeline, alone, position):
    rows = [row(pipeline, prompt, seed) for seed, prompt in enumerate(PROMPTS[1:], start=5)]
    rows.insert(position, row(pipeline))
    assert agreement(run(pipeline, *rows)[position], alone) >= 0.99


def test_neighbours_of_another_kind_change_nothing_when_they_join_and_leave(pipeline, alone):
    mine = row(pipeline)
    pipeline.advance([mine])
    short = row(pipeline, PROMPTS[2], 9, replace(PLAIN, steps=2, sampler="argmax"))
    pipeline.advance([short, mine])
    unguided = row(
        pipeline, PROMPTS[1], 8, replace(PLAIN, steps=12, guidance=(1.0, 1.0), sampler="quant")
    )
    late = row(
        pipeline,
        PROMPTS[3],
        7,
        replace(PLAIN, steps=3, guidance_steps=1, sampler="typical", temperature=(5.0, 0.05)),
    )
    pipeline.advance([unguided, mine, short])
    assert short.done
    pipeline.advance([late, unguided, mine])
    pipeline.advance([late, mine])
    pipeline.advance([mine, late, unguided])
    assert mine.done
    assert agreement(mine.tokens, alone) >= 0.99


def test_rows_of_one_batch_with_the_same_seed_are_equal(pipeline):
    first, second = run(pipeline, row(pipeline), row(pipeline))
    assert torch.equal(first, second)


def test_image_i_of_seed_s_is_image_0_of_seed_s_plus_i(pipeline):
    several = pipeline.generate(["red apple"] * 3, seeds=[10, 11, 12])
    for i in range(3):
        single = pipeline.generate(["red apple"], seeds=[10 + i])[0]
        assert (single == several[i]).float().mean() >= 0.99


def test_a_negative_seed_and_its_unsigned_twin_are_one(pipeline):
    assert torch.equal(
        pipeline.noise(-1, 32, 32, 2).start, pipeline.noise(2**64 - 1, 32, 32, 2).start
    )


def test_another_prompt_never_meets_the_conditions_of_a_finished_row(pipeline):
    # Stacked conditions were remembered by id(), and a new row's condition can lie where a finished
    # row's lay.
    config = replace(PLAIN, guidance=(1.0, 1.0))
    finished = row(pipeline, config=config)
    pipeline.advance([finished])
    identity, noise = id(finished.conditional), finished.noise
    (prompt,) = pipeline.encode([PROMPTS[2]])
    del finished
    other = pipeline.condition(prompt, torch.ones(1, 16))
    conditions = [replace(other) for _ in range(20_000)]
    condition = next((c for c in conditions if id(c) == identity), conditions[0])
    mine, expected = (pipeline.start(noise, config, condition, None) for _ in range(2))
    pipeline.advance([mine])
    PipelineV3(pipeline.bundle).advance([expected])
    assert torch.equal(mine.tokens, expected.tokens)


def test_conditions_are_let_go_once_other_rows_step(pipeline):
    mine = row(pipeline)
    pipeline.advance([mine])
    held = weakref.ref(mine.conditional.kv)
    del mine
    pipeline.advance([row(pipeline, seed=3)])
    assert held() is None


def test_stacked_conditions_are_kept_while_the_same_rows_step(pipeline, monkeypatch):
    stacked = count()
    stack = Condition.stack
    monkeypatch.setattr(
        Condition, "stack", lambda conditions: (next(stacked), stack(conditions))[1]
    )
    run(pipeline, row(pipeline), row(pipeline, seed=1))
    assert next(stacked) == 1


# ── guidance and schedules ────────────────────────────────────────────────────────────────────────


def test_without_guidance_there_is_one_branch_and_the_negative_prompt_is_not_read(pipeline):
    config = replace(PLAIN, guidance=(1.0, 1.0))
    mine = row(pipeline, config=config)
    assert mine.unconditional is None
    assert len(mine.branches) == 1
    plain, negated = (
        pipeline.generate(["red apple"], [0], config, negative_prompt=text)
        for text in ("", "the apple")
    )
    assert torch.equal(plain, negated)


def test_with_guidance_the_negative_prompt_counts(pipeline):
    plain, negated = (
        pipeline.generate(["red apple"], [0], PLAIN, negative_prompt=text)
        for text in ("", "the apple")
    )
    assert not torch.equal(plain, negated)


def test_guidance_stops_after_its_steps(pipeline):
    mine = row(pipeline, config=replace(PLAIN, guidance=(8.0, 5.5), guidance_steps=4))
    shares = []
    while not mine.done:
        shares.append(mine.guidance_weights[mine.step, : len(mine.branches)].tolist())
        pipeline.advance([mine])
    assert shares == [[8.0, -7.0], [7.5, -6.5], [7.0, -6.0], [6.5, -5.5], [1.0], [1.0]]


def test_guidance_may_start_late(pipeline):
    mine = row(pipeline, config=replace(PLAIN, guidance_start=2, guidance_steps=3))
    branches = []
    while not mine.done:
        branches.append(len(mine.branches))
        pipeline.advance([mine])
    assert branches == [1, 1, 2, 2, 2, 1]


def test_a_ramp_that_reaches_one_needs_no_unconditional_branch_there():
    mine = generate(
        replace(PLAIN, guidance=(3.5, 1.0)),
        noise=_Start(),
        conditional=_condition(),
        unconditional=_condition(),
    )
    mine.step = 5
    assert len(mine.branches) == 1


def test_guidance_is_cond_times_g_plus_uncond_times_one_minus_g(pipeline):
    config = replace(PLAIN, steps=1, renoise_steps=0, guidance=(3.0, 3.0), sampler="argmax")
    mine = row(pipeline, config=config)
    denoiser, times = pipeline.bundle.denoiser, pipeline.bundle.denoiser.times(torch.ones(1))
    unconditional = mine.unconditional
    assert unconditional is not None
    cond, uncond = (
        denoiser.project(denoiser.features(mine.tokens[None], times, c))
        for c in (mine.conditional, unconditional)
    )
    (tokens,) = run(pipeline, mine)
    assert agreement(tokens, (3 * cond - 2 * uncond).argmax(-1)[0]) >= 0.99


@pytest.mark.parametrize("sampler", ["multinomial", "typical"])
def test_each_step_draws_from_logits_divided_by_its_own_temperature(pipeline, sampler):
    config = replace(UNGUIDED, steps=2, renoise_steps=0, temperature=(2.0, 0.25), sampler=sampler)
    mine, denoiser = row(pipeline, config=config), pipeline.bundle.denoiser
    for step, temperature in enumerate(config.temperature):
        times = denoiser.times(torch.tensor([mine.times[step]]))
        logits = denoiser.project(denoiser.features(mine.tokens[None], times, mine.conditional))
        if sampler == "typical":
            mass = torch.full(logits.shape[:-1], config.typical_mass)
            logits = sampling.keep_typical(logits, mass)
        expected = sampling.inverse_cdf(logits / temperature, mine.noise.draw[step][None])
        pipeline.advance([mine])
        assert agreement(mine.tokens, expected[0]) >= 0.99


def test_renoising_falls_with_time_and_stops_after_its_steps():
    mine = generate(
        replace(PLAIN, renoise_steps=3),
        noise=_Start(),
        conditional=_condition(),
        unconditional=None,
    )
    assert mine.renoise_probabilities == pytest.approx([5 / 6, 4 / 6, 3 / 6, NEVER, NEVER, NEVER])


class _Start:
    start = torch.zeros(4, 4)


def _condition() -> Condition:
    return Condition(torch.zeros(1, 1, 2), None)


@pytest.mark.parametrize("order", ["halton", "confidence"])
def test_an_order_of_renoising_renoises_exactly_the_share_of_its_time(pipeline, order):
    mine = row(pipeline, config=replace(PLAIN, renoise_order=order, renoise_mode="rand"))
    # Tokens that no draw returns, so that what became noise again is seen.
    mine.noise = replace(mine.noise, fresh=torch.full_like(mine.noise.fresh, -1))
    embed = pipeline.bundle.denoiser._embed
    pipeline.bundle.denoiser._embed = lambda tokens: embed(tokens.clamp_min(0))
    try:
        counts = []
        while not mine.done:
            pipeline.advance([mine])
            counts.append(int((mine.tokens < 0).sum()))
    finally:
        del pipeline.bundle.denoiser._embed
    assert counts == [round(64 * t) for t in mine.times[1:]]


def test_confidence_renoises_what_the_denoiser_is_least_sure_of(pipeline, monkeypatch):
    monkeypatch.setattr(sampling, "CONFIDENCE_NOISE", 0.0)
    mine = row(pipeline, config=replace(PLAIN, renoise_order="confidence"))
    seen = []
    log_probability = pipeline.executor.log_probability

    def watched(features: Tensor, tokens: Tensor) -> Tensor:
        seen.append(log_probability(features, tokens))
        return seen[-1]

    monkeypatch.setattr(pipeline.executor, "log_probability", watched)
    pipeline.advance([mine])
    (log_p,) = seen
    unsure = log_p[0].flatten().argsort()[: round(64 * mine.times[1])]
    expected = mine.drawn.flatten().clone()
    expected[unsure] = mine.noise.start.flatten()[unsure]
    assert torch.equal(mine.tokens.flatten(), expected)


@pytest.mark.parametrize("order", ["halton", "confidence"])
def test_rows_of_other_orders_change_nothing_for_a_row(pipeline, order):
    def mine() -> Row:
        return row(pipeline, config=replace(PLAIN, renoise_order=order))

    alone = run(pipeline, mine())[0]
    mixed = run(pipeline, row(pipeline, seed=1), mine(), row(pipeline, PROMPTS[2], 2))[1]
    assert agreement(mixed, alone) >= 0.99
    assert agreement(alone, run(pipeline, row(pipeline))[0]) < 0.99


def test_attention_weights_go_to_the_last_real_tokens_of_the_conditional_branch(pipeline):
    (prompt,) = pipeline.encode(["red apple"])  # 9 bytes and an end mark
    weights = pipeline._attention_weights(prompt, pipeline.reader())
    padding = prompt.mask.shape[1] - 10
    expected = [1.0] * 8 + [1.2] * 2 + [1.0] * padding + [1.2] * 4 + [0.4] * 4
    assert weights.tolist() == [pytest.approx(expected)]


def test_a_bundle_s_attention_weights_change_the_conditional_branch_alone(pipeline, monkeypatch):
    prompt, negative = pipeline.encode(["red apple", ""])
    image = torch.randn(1, 16)
    weighted, unconditional = pipeline.condition(prompt, image), pipeline.condition(negative)
    off = PipelineV3(pipeline.bundle)
    off.config = replace(
        pipeline.config, recipe=replace(pipeline.config.recipe, attention_weights=None)
    )
    assert not torch.equal(off.condition(prompt, image).kv, weighted.kv)
    assert torch.equal(off.condition(negative).kv, unconditional.kv)


# ── samplers, sizes, stages ───────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_draws_codes_that_exist_and_moves_away_from_the_noise(pipeline, sampler):
    mine = row(pipeline, config=replace(PLAIN, sampler=sampler))
    (tokens,) = run(pipeline, mine)
    assert 0 <= tokens.min() <= tokens.max() < 64
    assert agreement(tokens, mine.noise.start) < 0.5


def test_samplers_of_one_batch_draw_what_each_draws_alone(pipeline):
    rows = [row(pipeline, seed=4, config=replace(PLAIN, sampler=sampler)) for sampler in SAMPLERS]
    for tokens, sampler in zip(run(pipeline, *rows), SAMPLERS, strict=True):
        (single,) = run(pipeline, row(pipeline, seed=4, config=replace(PLAIN, sampler=sampler)))
        assert agreement(tokens, single) >= 0.99


@pytest.mark.parametrize("size", [(16, 16), (48, 32), (16, 64)])
def test_pictures_have_the_size_asked_for(pipeline, size):
    width, height = size
    image = pipeline.generate(["red apple", "apple"], [0, 1], PLAIN, width=width, height=height)
    assert image.shape == (2, height, width, 3)
    assert image.dtype == torch.uint8
    assert image.device.type == "cpu"


def test_the_recipe_and_the_native_size_are_the_defaults(pipeline):
    steps = []
    image = pipeline.generate([""], [0], progress=steps.append)
    assert image.shape == (1, 32, 32, 3)
    assert steps == [1, 2, 3, 4, 5, 6]


def test_decoding_rounds_and_clamps_the_vqgan_s_picture(pipeline):
    tokens = torch.randint(64, (2, 4, 8))
    expected = (pipeline.bundle.vqgan.decode(tokens).clamp(0, 1) * 255).round().permute(0, 2, 3, 1)
    assert torch.equal(pipeline.decode(tokens).float(), expected)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_encoding_does_not_depend_on_the_other_prompts(pipeline, prompt):
    (single,) = pipeline.encode([prompt])
    company = pipeline.encode([*PROMPTS[::-1], prompt])[-1]
    real = int(single.mask.sum())
    assert int(company.mask.sum()) == real
    torch.testing.assert_close(company.byt5[:, :real], single.byt5[:, :real], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(company.clip, single.clip, atol=1e-5, rtol=1e-5)


def test_what_was_cut_is_said_by_encoder(pipeline):
    fits, bytes_cut, both = pipeline.encode(["red apple", "é" * 40, "the red apple " * 20])
    assert fits.truncated == ()
    assert "byt5" in bytes_cut.truncated
    assert both.truncated == ("byt5", "clip")


def test_prior_embeddings_belong_to_their_prompt_and_noise(pipeline):
    prompts, noises = (
        pipeline.encode(PROMPTS[:2]),
        [pipeline.noise(seed, 32, 32, 1) for seed in (1, 2)],
    )
    together = pipeline.prior_embeddings(prompts, noises)
    for prompt, noise, embedding in zip(prompts, noises, together, strict=True):
        torch.testing.assert_close(
            pipeline.prior_embeddings([prompt], [noise])[0], embedding, atol=1e-4, rtol=1e-4
        )
    assert not torch.allclose(together[0], together[1], atol=0.1)


def test_the_prior_s_noise_is_scaled_by_its_temperature(pipeline):
    (prompt,) = pipeline.encode(PROMPTS[:1])
    noises = [pipeline.noise(seed, 32, 32, 1) for seed in (1, 2)]

    def embeddings(temperature):
        settings = pipeline.prior_settings()._replace(temperature=temperature)
        return pipeline.prior_embeddings([prompt] * 2, noises, settings)

    one, other = embeddings(1.0)
    assert not torch.allclose(one, other, atol=0.1)
    one, other = embeddings(0.0)
    torch.testing.assert_close(one, other)
    halved = [replace(noise, prior=noise.prior / 2) for noise in noises]
    for found, expected in zip(
        embeddings(0.5), pipeline.prior_embeddings([prompt] * 2, halved), strict=True
    ):
        torch.testing.assert_close(found, expected)
