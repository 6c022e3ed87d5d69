"""Tokens are drawn from the distribution they should be, with the randomness that belongs to the
image and no other.
"""

from __future__ import annotations

import math

import hypothesis.extra.numpy as npst
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from model import rows as operations
from model import sampling
from model.config import DenoiserConfig, SamplingConfig
from model.networks.denoiser_v3 import Denoiser
from model.pipeline import PipelineV3
from tests.conftest import golden

# A correct sampler fails a chi-square test this rarely, were the seed to change.
FALSE_ALARM = 1e-6
LARGEST_UNIFORM = 1 - 2**-24
INT64 = st.integers(-(2**63), 2**63 - 1)


def uniforms_of(shape: tuple[int, ...]) -> st.SearchStrategy[Tensor]:
    return npst.arrays(np.float32, shape, elements=st.floats(0, LARGEST_UNIFORM, width=32)).map(
        torch.from_numpy
    )


def logits_of(shape: tuple[int, ...]) -> st.SearchStrategy[Tensor]:
    return npst.arrays(np.float32, shape, elements=st.floats(-30, 30, width=32)).map(
        torch.from_numpy
    )


# ── the recorded trace ────────────────────────────────────────────────────────────────────────────


class RecordingDenoiser(Denoiser):
    """Keeps the logits of every step."""

    def project(self, features: Tensor) -> Tensor:
        logits = super().project(features)
        self.__dict__.setdefault("seen", []).append(logits.permute(0, 3, 1, 2))
        return logits


@pytest.fixture(scope="module")
def trace():
    """The published sampler's settings and record, and ours: (recorded, logits of every step,
    tokens after every step).
    """
    settings, _, recorded = golden("sampler_v3")
    config, weights, x = golden("denoiser_v3")
    denoiser = RecordingDenoiser(DenoiserConfig(**config)).eval()
    denoiser.load_state_dict(weights)
    wanted = SamplingConfig(
        steps=settings["steps"],
        renoise_steps=settings["renoise_steps"],
        guidance=tuple(settings["cfg"]),
        guidance_steps=settings["cfg_steps"],
        temperature=tuple(settings["temperature"]),
        sampler=settings["mode"],
    )
    steps, tokens = settings["steps"], []
    with torch.no_grad():
        rows = [trace_row(denoiser, wanted, x, recorded, i) for i in range(2)]
        pipeline = PipelineV3(BundleOf(denoiser))
        for _ in range(steps):
            pipeline.advance(rows)
            tokens.append(torch.stack([row.tokens for row in rows]))
    return recorded, denoiser.seen, torch.stack(tokens)


class BundleOf:
    """As much of a bundle as stepping with argmax needs."""

    def __init__(self, denoiser: Denoiser) -> None:
        self.denoiser, self.config = denoiser, None
        self.every_denoiser = {"denoiser": denoiser}


def trace_row(
    denoiser: Denoiser,
    wanted: SamplingConfig,
    x: dict[str, Tensor],
    recorded: dict[str, Tensor],
    i: int,
) -> operations.Row:
    row = slice(i, i + 1)
    tokens = x["byt5"].shape[1] + 2 * denoiser.config.clip_seq_len
    weights = torch.ones(1, tokens)
    weights[:, -len(x["attn_weights"]) :] = x["attn_weights"]
    conditional = denoiser.condition(
        x["byt5"][row], None, x["clip"][row], x["clip_image"][row], weights
    )
    unconditional = denoiser.condition(
        recorded["uncond_byt5"][row], None, recorded["uncond_clip"][row]
    )
    kept = torch.ones(wanted.steps - wanted.renoise_steps, *recorded["init_noise"].shape[1:])
    noise = sampling.Noise(
        start=recorded["init_noise"][i],
        prior=torch.empty(0),
        draw=torch.empty(wanted.steps, 0),
        renoise=torch.cat([recorded["renoise_uniform"][:, i], kept]),
    )
    return operations.generate(wanted, noise, conditional, unconditional)


def test_tokens_after_every_step_equal_the_recorded_ones(trace):
    recorded, _, tokens = trace
    assert torch.equal(tokens, recorded["tokens_after_step"])


@pytest.mark.parametrize("step", [0, 5])
def test_guided_logits_equal_the_recorded_ones(trace, step):
    recorded, logits, _ = trace
    torch.testing.assert_close(
        logits[step], recorded[f"guided_logits_step{step}"], atol=1e-4, rtol=0
    )


# ── drawing tokens ────────────────────────────────────────────────────────────────────────────────


def chance(observed: Tensor, expected: Tensor) -> float:
    """Return the p-value of Pearson's chi-square test; scipy.stats takes a second to import."""
    expected = expected.double()
    statistic = ((observed - expected) ** 2 / expected).sum()
    return torch.special.gammaincc(torch.tensor((len(expected) - 1) / 2), statistic / 2).item()


@pytest.mark.parametrize("spread", [0.0, 1.0, 4.0])
@pytest.mark.parametrize("codes", [2, 17, 200])
def test_draws_are_distributed_as_the_softmax_says(spread, codes):
    draws = 200_000
    logits = torch.randn(codes) * spread
    uniform = torch.from_numpy(np.random.default_rng(0).random(draws, dtype=np.float32))
    counts = (
        sampling.inverse_cdf(logits.expand(draws, codes), uniform)
        .bincount(minlength=codes)
        .double()
    )
    expected = logits.double().softmax(-1) * draws
    common = expected >= 20
    # Rare codes are judged as one.
    observed, wanted = (torch.cat([t[common], t[~common].sum()[None]]) for t in (counts, expected))
    if not (~common).any():
        observed, wanted = observed[:-1], wanted[:-1]
    assert chance(observed, wanted) > FALSE_ALARM


def test_a_biased_draw_would_be_noticed():
    draws, codes = 200_000, 17
    uniform = torch.from_numpy(np.random.default_rng(0).random(draws, dtype=np.float32))
    counts = sampling.inverse_cdf(torch.zeros(draws, codes), uniform**1.05).bincount(
        minlength=codes
    )
    assert chance(counts, torch.full((codes,), draws / codes)) < FALSE_ALARM


@given(logits_of((5, 12)), st.floats(0, LARGEST_UNIFORM, width=32))
def test_the_drawn_code_is_where_the_cumulated_probability_passes_the_uniform(logits, u):
    drawn = sampling.inverse_cdf(logits, torch.full((5,), u))
    cdf = torch.nn.functional.pad(logits.double().softmax(-1).cumsum(-1), (1, 0))
    below, above = cdf.gather(-1, drawn[:, None]), cdf.gather(-1, drawn[:, None] + 1)
    assert (below <= u + 1e-6).all()
    assert (above >= u - 1e-6).all()


@pytest.mark.parametrize("codes", [1, 2, 3, 31, 64, 1000, 8192])
def test_any_number_of_codes_is_drawn_from_by_the_cumulated_probability(codes):
    logits, uniform = 3 * torch.randn(300, codes), torch.rand(300)
    cdf = torch.nn.functional.pad(logits.double().softmax(-1).cumsum(-1), (1, 0))
    drawn = sampling.inverse_cdf(logits, uniform)[:, None]
    assert (cdf.gather(-1, drawn)[:, 0] <= uniform + 1e-6).all()
    assert (cdf.gather(-1, drawn + 1)[:, 0] >= uniform - 1e-6).all()


@given(
    logits_of((8, 16)),
    npst.arrays(np.bool_, (8, 16)),
    st.sampled_from([0.0, 2**-24, 0.5, LARGEST_UNIFORM]),
)
def test_a_code_of_no_probability_is_never_drawn(logits, excluded, u):
    excluded = torch.from_numpy(excluded)
    excluded[:, 7] = False
    drawn = sampling.inverse_cdf(logits.masked_fill(excluded, -torch.inf), torch.full((8,), u))
    assert not excluded.gather(-1, drawn[:, None]).any()


@pytest.mark.parametrize("u", [0.0, 2**-24, 0.5, LARGEST_UNIFORM, 1.0])
def test_a_code_of_no_probability_is_never_drawn_from_a_large_vocabulary(u):
    # Runs of such codes at the start, at the end and in the middle, longer than any block of sums.
    excluded = torch.rand(64, 1000) < torch.rand(64, 1)
    excluded[:, :150] = excluded[:, 400:600] = excluded[:, -150:] = True
    excluded[:, 300] = False
    logits = (8 * torch.randn(64, 1000)).masked_fill(excluded, -torch.inf)
    drawn = sampling.inverse_cdf(logits, torch.full((64,), u))
    assert not excluded.gather(-1, drawn[:, None]).any()


@pytest.mark.parametrize("kept", [0, 3, 8191])
@pytest.mark.parametrize("u", [0.0, 0.5, LARGEST_UNIFORM])
def test_a_certain_code_is_drawn_by_every_uniform(kept, u):
    logits = torch.full((8192,), -torch.inf)
    logits[kept] = -50.0
    assert sampling.inverse_cdf(logits, torch.tensor(u)).item() == kept


def test_the_extreme_uniforms_draw_the_first_and_the_last_code():
    logits = torch.zeros(2, 8192)
    assert sampling.inverse_cdf(logits, torch.tensor([0.0, LARGEST_UNIFORM])).tolist() == [0, 8191]


@given(logits_of((3, 9)))
def test_even_a_uniform_of_one_draws_a_code_that_exists(logits):
    assert (sampling.inverse_cdf(logits, torch.ones(3)) < 9).all()


@given(logits_of((4, 10)), uniforms_of((4,)), st.integers(-50, 50))
def test_adding_a_constant_to_the_logits_changes_nothing(logits, uniform, constant):
    # Whole numbers, so that the addition itself does not round.
    assert torch.equal(
        sampling.inverse_cdf(logits.round(), uniform),
        sampling.inverse_cdf(logits.round() + constant, uniform),
    )


def test_a_row_that_is_not_a_number_draws_a_code_and_changes_no_other_row():
    logits, uniform = torch.randn(3, 128), torch.rand(3)
    expected = sampling.inverse_cdf(logits, uniform)
    logits[1] = torch.nan
    drawn = sampling.inverse_cdf(logits, uniform)
    assert torch.equal(drawn[::2], expected[::2])
    assert 0 <= drawn[1] < 128


def test_half_precision_logits_are_summed_in_single_precision():
    # In fp16 the sum of 8192 equal weights stops growing at 2048.
    drawn = sampling.inverse_cdf(torch.zeros(3, 8192).half(), torch.tensor([0.25, 0.5, 0.75]))
    assert drawn.tolist() == [2048, 4096, 6144]


# ── typical sampling ──────────────────────────────────────────────────────────────────────────────


def typical_row(logits: Tensor, mass: float) -> list[bool]:
    """The definition, one code after the other, in double precision."""
    p = logits.double().softmax(-1).tolist()
    entropy = -sum(x * math.log(x) for x in p if x > 0)
    distance = [abs(-math.log(x) - entropy) if x > 0 else math.inf for x in p]
    total, threshold = 0.0, 0.0
    for i in sorted(range(len(p)), key=distance.__getitem__):
        total, threshold = total + p[i], distance[i]
        if total >= mass:
            break
    return [d <= threshold for d in distance]


@pytest.mark.parametrize("mass", [0.2, 0.6])
def test_typical_masks_equal_the_recorded_ones(mass):
    _, _, x = golden("denoiser_v1")
    ours = sampling.typical_mask(x["typical_logits"], torch.tensor(mass).expand(768))
    assert torch.equal(ours, x[f"typical_keep_{mass}"])


@pytest.mark.parametrize("mass", [0.05, 0.3, 0.9])
def test_typical_masks_equal_the_definition(mass):
    logits = torch.randn(60, 40) * torch.linspace(0.1, 6, 60)[:, None]
    expected = torch.tensor([typical_row(row, mass) for row in logits])
    assert torch.equal(sampling.typical_mask(logits, torch.full((60,), mass)), expected)


def test_typical_mass_is_each_row_s_own():
    logits = torch.randn(1, 50).expand(3, 50)
    counts = sampling.typical_mask(logits, torch.tensor([0.1, 0.5, 0.9])).sum(-1).tolist()
    assert counts[0] < counts[1] < counts[2]


def test_ties_are_kept_together():
    assert sampling.typical_mask(torch.zeros(1, 32), torch.tensor([0.1])).all()


def test_mass_one_keeps_everything_and_mass_zero_the_most_typical_alone():
    logits = torch.randn(1, 30)
    assert (
        sampling.typical_mask(logits, torch.tensor([1.0])).sum() >= 29
    )  # the rest may be lost to rounding
    assert sampling.typical_mask(logits, torch.tensor([0.0])).sum() == 1


def test_a_mass_that_rounding_leaves_out_of_reach_keeps_everything():
    assert sampling.typical_mask(torch.randn(2, 30), torch.tensor([2.0, 2.0])).all()


def test_codes_of_no_probability_do_not_disturb_the_entropy():
    logits = torch.randn(1, 20)
    padded = torch.cat([logits, torch.full((1, 5), -torch.inf)], dim=-1)
    mass = torch.tensor([0.4])
    assert torch.equal(
        sampling.typical_mask(padded, mass)[:, :20], sampling.typical_mask(logits, mass)
    )
    assert not sampling.typical_mask(padded, mass)[:, 20:].any()


@given(logits_of((4, 15)), uniforms_of((4,)), st.floats(0, 1))
def test_something_is_always_kept_and_only_that_is_drawn(logits, uniform, mass):
    masses = torch.full((4,), mass)
    kept = sampling.keep_typical(logits, masses)
    assert kept.isfinite().any(-1).all()
    drawn = sampling.inverse_cdf(kept, uniform)
    assert sampling.typical_mask(logits, masses).gather(-1, drawn[:, None]).all()


# ── quantised mean, renoising, guidance, schedules ────────────────────────────────────────────────


def test_the_quantised_mean_is_the_expectation_of_code_vectors():
    logits, codebook = torch.randn(2, 3, 10), torch.randn(10, 4)
    expected = sum(logits.softmax(-1)[..., k, None] * codebook[k] for k in range(10))
    torch.testing.assert_close(sampling.quantised_mean(logits, codebook), expected)


def test_renoising_puts_start_tokens_back_with_each_row_s_probability():
    side, probabilities = 200, [0.0, 0.1, 0.75, 1.0, sampling.NEVER]
    shape = (len(probabilities), side, side)
    uniform = torch.from_numpy(np.random.default_rng(0).random(shape, dtype=np.float32))
    out = sampling.renoise(
        torch.zeros(shape), torch.ones(shape), uniform, torch.tensor(probabilities)
    )
    shares = out.mean((1, 2))
    # Five standard deviations of a share of 40 000.
    assert shares.tolist() == pytest.approx([0, 0.1, 0.75, 1, 0], abs=5 * 0.5 / side)
    assert shares[3] == 1
    assert shares[4] == 0


def test_a_token_is_renoised_up_to_the_very_probability():
    uniform = torch.tensor([[[0.5 - 2**-25, 0.5, 0.5 + 2**-24]]])
    tokens, start = torch.zeros_like(uniform), torch.ones_like(uniform)
    out = sampling.renoise(tokens, start, uniform, torch.tensor([0.5]))
    assert out.flatten().tolist() == [1, 1, 0]


def test_even_a_uniform_of_zero_is_not_renoised_after_the_last_renoising_step():
    tokens, start, zero = torch.zeros(1, 2, 2), torch.ones(1, 2, 2), torch.zeros(1, 2, 2)
    assert sampling.renoise(tokens, start, zero, torch.tensor([sampling.NEVER])).sum() == 0


def test_mixing_weighs_branches_of_each_row_and_of_no_other():
    features = torch.randn(5, 2, 3, 4)
    mixed = sampling.mix_branches(
        features, torch.tensor([0, 0, 1, 2, 2]), torch.tensor([3.0, -2.0, 1.0, 1.5, -0.5]), rows=3
    )
    expected = torch.stack(
        [3 * features[0] - 2 * features[1], features[2], 1.5 * features[3] - 0.5 * features[4]]
    )
    torch.testing.assert_close(mixed, expected)


def test_a_row_that_is_not_a_number_harms_no_other():
    features = torch.randn(4, 2, 2, 3)
    features[:2] = torch.nan
    mixed = sampling.mix_branches(
        features, torch.tensor([0, 0, 1, 1]), torch.tensor([3.0, -2.0, 3.0, -2.0]), rows=2
    )
    torch.testing.assert_close(mixed[1], 3 * features[2] - 2 * features[3])


def test_mixing_half_precision_adds_in_single_precision():
    # 8 · 9000 is beyond fp16, the difference is not.
    features = torch.tensor([9000.0, 9010.0]).half().view(2, 1, 1, 1)
    mixed = sampling.mix_branches(features, torch.tensor([0, 0]), torch.tensor([8.0, -7.0]), rows=1)
    assert mixed.dtype == torch.float16
    assert (
        mixed.item() == torch.tensor(8 * features[0].item() - 7 * features[1].item()).half().item()
    )


def test_times_fall_evenly_from_one_to_zero():
    assert sampling.timesteps(4) == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert len(sampling.timesteps(1)) == 2


def test_the_first_version_s_times_fall_along_a_cosine():
    assert sampling.timesteps(4, "cosine") == pytest.approx(
        [1, 0.9239, 0.7071, 0.3827, 0], abs=1e-4
    )
    assert sampling.timesteps(4, "cosine")[-1] == 0


@given(st.floats(-30, 30), st.floats(-30, 30), st.integers(1, 64))
def test_ramps_go_evenly_from_end_to_end(first, last, steps):
    values = sampling.ramp((first, last), steps)
    assert len(values) == steps
    assert values[0] == pytest.approx(first, abs=1e-5)
    if steps > 1:
        assert values == pytest.approx(np.linspace(first, last, steps), abs=1e-4)


# ── one image's randomness ────────────────────────────────────────────────────────────────────────


def draw(seed: int, steps: int = 3, grid: tuple[int, int] = (4, 6)) -> sampling.Noise:
    return sampling.draw_noise(seed, codes=64, grid=grid, steps=steps, prior=(3, 8))


def tensors(noise: sampling.Noise) -> tuple[Tensor, ...]:
    return noise.start, noise.prior, noise.draw, noise.renoise


def test_shapes_and_ranges_are_those_promised():
    noise = draw(0)
    assert [tuple(t.shape) for t in tensors(noise)] == [(4, 6), (3, 8), (3, 4, 6), (3, 4, 6)]
    assert noise.start.dtype == torch.int64
    assert 0 <= noise.start.min() <= noise.start.max() < 64
    for uniform in (noise.draw, noise.renoise):
        assert 0 <= uniform.min() <= uniform.max() < 1


@given(INT64)
def test_a_seed_gives_the_same_noise_every_time(seed):
    assert all(
        torch.equal(a, b) for a, b in zip(tensors(draw(seed)), tensors(draw(seed)), strict=True)
    )


@given(INT64, INT64)
def test_different_seeds_give_different_noise(one, other):
    same = [
        torch.equal(a, b) for a, b in zip(tensors(draw(one)), tensors(draw(other)), strict=True)
    ]
    assert all(same) if one == other else not any(same)


@given(st.integers(-(2**31), 2**31), st.integers(32, 62))
def test_bits_above_the_32nd_count(seed, bit):
    assert not any(
        torch.equal(a, b)
        for a, b in zip(tensors(draw(seed)), tensors(draw(seed ^ (1 << bit))), strict=True)
    )


def test_the_stream_of_a_seed_is_pinned():
    # A seed that somebody wrote down draws the same picture in every later version.
    noise = draw(42)
    assert noise.start[0].tolist() == [59, 5, 9, 9, 26, 17]
    ends = [noise.prior[0, 0].item(), noise.draw[0, 0, 0].item(), noise.renoise[-1, -1, -1].item()]
    assert ends == pytest.approx([0.4382453, 0.45246707, 0.60042232], abs=1e-6)


def of_all_streams(seed: int) -> sampling.Noise:
    return sampling.draw_noise(
        seed,
        codes=64,
        grid=(16, 16),
        steps=3,
        prior=(3, 8),
        renoise_mode="rand",
        renoise_order="halton",
    )


def test_fresh_tokens_are_a_stream_of_their_own():
    stream = np.random.Generator(np.random.Philox(42).jumped(1))
    expected = stream.integers(64, size=(3, 16, 16), dtype=np.int64)
    noise = of_all_streams(42)
    assert torch.equal(noise.fresh, torch.from_numpy(expected))
    plain = draw(42, grid=(16, 16))
    assert torch.equal(noise.start, plain.start)
    assert torch.equal(noise.draw, plain.draw)


def test_all_64_bits_of_a_seed_count_in_every_stream():
    noise, unsigned = of_all_streams(-7), of_all_streams(2**64 - 7)
    for one, twin in ((noise.fresh, unsigned.fresh), (noise.renoise, unsigned.renoise)):
        assert torch.equal(one, twin)
    for bit in (7, 31, 40, 62):
        assert not torch.equal(of_all_streams(-7 ^ (1 << bit)).fresh, noise.fresh)


def test_more_steps_begin_with_the_same_randomness():
    few, many = draw(7, steps=3), draw(7, steps=9)
    assert torch.equal(few.start, many.start)
    assert torch.equal(few.prior, many.prior)
    assert torch.equal(few.draw, many.draw[:3])
    assert torch.equal(few.renoise, many.renoise[:3])


def test_draws_of_a_token_are_independent_of_its_renoising():
    noise = sampling.draw_noise(0, codes=2, grid=(64, 64), steps=8, prior=(1, 1))
    correlation = torch.corrcoef(torch.stack([noise.draw.flatten(), noise.renoise.flatten()]))[0, 1]
    assert abs(correlation) < 5 / math.sqrt(8 * 64 * 64)


def test_start_tokens_and_prior_noise_are_uniform_and_normal():
    noise = sampling.draw_noise(0, codes=16, grid=(256, 256), steps=1, prior=(100, 1000))
    counts = noise.start.flatten().bincount(minlength=16)
    assert chance(counts, torch.full((16,), 256 * 256 / 16)) > FALSE_ALARM
    assert (noise.prior.mean().item(), noise.prior.std().item()) == pytest.approx((0, 1), abs=0.02)


# ── the order in which tokens become noise again ──────────────────────────────────────────────────


@pytest.mark.parametrize("grid", [(16, 16), (8, 24), (1, 7), (17, 33), (64, 64)])
def test_a_halton_order_visits_every_position_once(grid):
    ranks = sampling.halton_ranks(grid)
    assert ranks.shape == grid
    assert sorted(ranks.ravel().tolist()) == list(range(grid[0] * grid[1]))


def test_a_halton_order_is_the_published_sequence():
    # 0, 1/2, 1/4, 3/4, 1/8 along the columns and 0, 1/3, 2/3, 1/9, 4/9 along the rows.
    ranks = sampling.halton_ranks((9, 8))
    places = [(0, 0), (3, 4), (6, 2), (1, 6), (4, 1)]
    assert [ranks[place] for place in places] == [0, 1, 2, 3, 4]


def mirrored(number: int, base: int) -> float:
    """A number's digits behind the point, the last first."""
    value, scale = 0.0, 1.0
    while number:
        scale /= base
        number, digit = divmod(number, base)
        value += digit * scale
    return value


@pytest.mark.parametrize("grid", [(1, 1), (1, 7), (4, 6), (16, 16), (7, 6)])
def test_a_halton_order_is_that_of_the_first_visits(grid):
    """In a grid of (7, 6) the last position is visited by the 204th number only."""
    H, W = grid
    visits = [(int(mirrored(i, 3) * H), int(mirrored(i, 2) * W)) for i in range(5 * H * W)]
    ranks = sampling.halton_ranks(grid)
    assert [ranks[place] for place in dict.fromkeys(visits)] == list(range(H * W))


def test_a_halton_order_which_all_share_cannot_be_changed():
    with pytest.raises(ValueError, match="read-only"):
        sampling.halton_ranks((4, 6))[0, 0] = 7


def with_order(seed: int, order: str, **changes: object) -> sampling.Noise:
    known = {"codes": 64, "grid": (16, 16), "steps": 3, "prior": (3, 8)}
    return sampling.draw_noise(seed, **{**known, **changes}, renoise_order=order)


@given(INT64)
def test_an_order_of_renoising_changes_no_other_randomness(seed):
    plain, halton = with_order(seed, "random"), with_order(seed, "halton")
    assert all(
        torch.equal(getattr(plain, name), getattr(halton, name))
        for name in ("start", "prior", "draw")
    )
    assert not torch.equal(plain.renoise, halton.renoise)
    assert torch.equal(with_order(seed, "confidence").renoise, plain.renoise)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8, 12])
@given(INT64)
def test_a_halton_order_renoises_an_exact_number_of_tokens(steps, seed):
    noise = with_order(seed, "halton", steps=steps)
    times = sampling.timesteps(steps)[1:-1]
    for uniform, t in zip(noise.renoise, times, strict=False):
        assert int((uniform <= t).sum()) == round(256 * t)
    assert (noise.renoise > sampling.NEVER).all()
    assert 0 <= noise.renoise.min() <= noise.renoise.max() < 1


@given(INT64)
def test_a_halton_order_spreads_noise_evenly(seed):
    """A quarter of the tokens: in each quarter of the picture between 10 and 22 of its 64."""
    renoised = with_order(seed, "halton").renoise[0] <= 0.25
    quarters = renoised.view(2, 8, 2, 8).sum((1, 3))
    assert 10 <= quarters.min() <= quarters.max() <= 22


def test_the_halton_order_of_a_seed_is_pinned():
    noise = with_order(42, "halton", grid=(4, 6))
    assert (noise.renoise[0] * 24 - 0.5).round().int()[0].tolist() == [9, 21, 15, 18, 12, 5]


def test_seeds_start_at_other_places_of_the_halton_order():
    orders = {tuple(with_order(seed, "halton").renoise[0].flatten().tolist()) for seed in range(20)}
    assert len(orders) > 15


def test_a_part_of_the_grid_has_its_part_of_the_order():
    whole = with_order(3, "halton")
    part = whole.part(slice(4, 8), slice(0, 16))
    assert torch.equal(part.renoise, whole.renoise[:, 4:8])


def test_the_least_confident_come_first_and_noise_mixes_them(monkeypatch):
    log_p = -torch.arange(64.0).view(1, 8, 8)
    uniform = torch.rand(1, 8, 8)
    monkeypatch.setattr(sampling, "CONFIDENCE_NOISE", 0.0)
    order = sampling.least_confident_first(log_p, uniform, torch.tensor([0.5]))
    assert torch.equal(order.flatten(), (torch.arange(63, -1, -1) + 0.5) / 64)
    monkeypatch.setattr(sampling, "CONFIDENCE_NOISE", 1e6)
    mixed = sampling.least_confident_first(log_p, uniform, torch.tensor([0.5]))
    assert torch.equal(mixed.flatten().argsort(), uniform.flatten().argsort())
    # At the end no noise is left, whatever its strength.
    last = sampling.least_confident_first(log_p, uniform, torch.tensor([0.0]))
    assert torch.equal(last, order)


@pytest.mark.parametrize(
    ("share", "ranks"),
    [
        (sampling.NEVER, [3, 2, 1, 0]),
        (0.0, [3, 2, 1, 0]),
        (0.5, [3, 1, 2, 0]),
        (1.0, [2, 1, 3, 0]),
    ],
)
def test_gumbel_noise_is_added_to_confidence_in_proportion_to_the_share_of_noise(share, ranks):
    """The sums are 0, -1, -0.3, -2.5 at a share of 0.5, and 1, -0.5, 1.4, -2.5 at 1."""
    log_p, gumbel = torch.tensor([[-1.0, -1.5, -2.0, -2.5], [2.0, 1.0, 3.4, 0.0]]).view(2, 1, 2, 2)
    order = sampling.least_confident_first(log_p, (-(-gumbel).exp()).exp(), torch.tensor([share]))
    assert order.flatten().tolist() == [(rank + 0.5) / 4 for rank in ranks]


def test_extreme_uniforms_spoil_no_order_of_confidence():
    log_p = torch.tensor([[[-1.0, 0.0, -1.5]]])
    uniform = torch.tensor([[[0.0, LARGEST_UNIFORM, 0.5]]])
    order = sampling.least_confident_first(log_p, uniform, torch.tensor([0.0]))
    assert (3 * order - 0.5).round().flatten().tolist() == [1, 2, 0]


def test_each_row_has_its_own_order_of_confidence():
    log_p, uniform = torch.randn(3, 4, 4), torch.rand(3, 4, 4)
    share = torch.tensor([0.9, 0.5, 0.1])
    together = sampling.least_confident_first(log_p, uniform, share)
    for i in range(3):
        row = slice(i, i + 1)
        alone = sampling.least_confident_first(log_p[row], uniform[row], share[row])
        assert torch.equal(together[row], alone)


def test_log_probabilities_are_those_of_the_softmax():
    logits, tokens = torch.randn(2, 3, 10), torch.randint(10, (2, 3))
    expected = logits.softmax(-1).gather(-1, tokens[..., None])[..., 0].log()
    torch.testing.assert_close(sampling.log_probability(logits, tokens), expected)
