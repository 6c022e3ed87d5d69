"""The v1 family computes what the published one computes and draws the tokens that it drew, and
its shortcuts change nothing.
"""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.config import DenoiserV1Config, RenoiseMode, Sampler, SamplingConfig, VQGANV1Config
from model.executor import Eager, SamplingInputs
from model.networks.denoiser_v1 import VQGANV1, ConditionV1, DenoiserV1, noise_probability
from model.pipeline import Pipeline, PipelineV1
from model.rows import PinnedTokens, RegionBranch, Row, generate, repaint
from model.sampling import Noise, draw_noise, keep_typical
from tests.conftest import golden, randomise

pytestmark = pytest.mark.usefixtures("no_grad")

TOLERANCE = {"atol": 1e-4, "rtol": 0}
# Where both sides are ours, only the order of additions differs.
SAME = {"atol": 2e-5, "rtol": 1e-5}
BOTH_LAYOUTS = pytest.mark.parametrize(
    "layout", [torch.contiguous_format, torch.channels_last], ids=["published", "channels-last"]
)


@pytest.fixture(scope="module")
def recorded() -> tuple[DenoiserV1, dict[str, Tensor]]:
    config, weights, tensors = golden("denoiser_v1")
    denoiser = DenoiserV1(DenoiserV1Config(**config)).eval()
    denoiser.load_state_dict(weights, strict=True)
    return denoiser, tensors


def published_vqgan() -> tuple[VQGANV1Config, dict[str, Tensor], dict[str, Tensor]]:
    arguments, weights, tensors = golden("vqgan_v1")
    ddconfig = arguments.pop("ddconfig")
    del ddconfig["dropout"]
    return VQGANV1Config(**ddconfig, **arguments), weights, tensors


@pytest.fixture(scope="module")
def recorded_vqgan() -> tuple[VQGANV1, dict[str, Tensor]]:
    config, weights, tensors = published_vqgan()
    vqgan = VQGANV1(config).eval()
    vqgan.load_state_dict(weights, strict=True)
    return vqgan, tensors


# ── configurations ────────────────────────────────────────────────────────────────────────────────


def test_fields_are_the_published_arguments_without_dropout():
    assert {field.name for field in fields(DenoiserV1Config)} == set(golden("denoiser_v1")[0])
    arguments, _, _ = golden("vqgan_v1")
    assert {field.name for field in fields(VQGANV1Config)} == (
        set(arguments) | set(arguments["ddconfig"])
    ) - {"ddconfig", "dropout"}


def test_published_sizes_follow_from_the_defaults():
    assert DenoiserV1Config().token_step == 4
    assert VQGANV1Config().downscale == 8


def test_lists_compare_as_tuples():
    assert DenoiserV1Config(down_levels=[4, 8, 16], up_levels=[16, 8, 4]) == DenoiserV1Config()
    assert VQGANV1Config(ch_mult=[1, 1, 2, 4], attn_resolutions=[32]) == VQGANV1Config()


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="same number of levels"):
        DenoiserV1Config(up_levels=(4, 8))
    for change in ({"double_z": True}, {"embed_dim": 128}):
        with pytest.raises(ValueError, match="z_channels = embed_dim"):
            VQGANV1Config(**change)


# ── denoiser ──────────────────────────────────────────────────────────────────────────────────────


@BOTH_LAYOUTS
def test_logits_equal_the_recorded_ones(recorded, layout):
    denoiser, x = recorded
    denoiser.to(memory_format=layout)
    cases = {
        "logits": x["clip"],
        "logits_spatial": x["clip_spatial"],
        "logits_uncond": torch.zeros_like(x["clip"]),
    }
    assert set(cases) == {name for name in x if name.startswith("logits")}
    for name, clip in cases.items():
        torch.testing.assert_close(denoiser(x["tokens"], clip, x["r"]), x[name], **TOLERANCE)


def test_the_noise_probability_equals_the_recorded_one(recorded):
    _, x = recorded
    torch.testing.assert_close(noise_probability(x["r"]), x["noise_prob"], **SAME)


def test_the_state_dicts_have_exactly_the_published_names():
    config, weights, _ = golden("denoiser_v1")
    vqgan_config, vqgan_weights, _ = published_vqgan()
    for network, published in (
        (DenoiserV1(DenoiserV1Config(**config)), weights),
        (VQGANV1(vqgan_config), vqgan_weights),
    ):
        assert {name: t.shape for name, t in network.state_dict().items()} == {
            name: t.shape for name, t in published.items()
        }


def test_the_published_size_counts_its_published_parameters():
    with torch.device("meta"):
        denoiser = DenoiserV1(DenoiserV1Config())
    assert sum(p.numel() for p in denoiser.parameters()) == 577_995_184


@pytest.mark.parametrize("grid", [(8, 8), (8, 20), (12, 16)])
def test_any_multiple_of_the_token_step_is_a_grid(recorded, grid):
    denoiser, x = recorded
    assert all(side % denoiser.config.token_step == 0 for side in grid)
    for clip in (x["clip"], x["clip_spatial"]):
        logits = denoiser(torch.randint(64, (2, *grid)), clip, x["r"])
        assert logits.shape == (2, 64, *grid)
        assert logits.isfinite().all()


def test_a_row_does_not_see_its_neighbours(recorded):
    denoiser, x = recorded
    alone = denoiser(x["tokens"][1:], x["clip"][1:], x["r"][1:])
    torch.testing.assert_close(alone, x["logits"][1:], **TOLERANCE)


def test_the_same_condition_everywhere_is_the_condition_of_the_image(recorded):
    denoiser, x = recorded
    everywhere = x["clip"][:, :, None, None].expand(-1, -1, 5, 7)
    torch.testing.assert_close(denoiser(x["tokens"], everywhere, x["r"]), x["logits"], **TOLERANCE)


def test_a_position_s_condition_counts_there_and_not_far_away():
    denoiser = DenoiserV1(
        DenoiserV1Config(
            num_labels=8, c_hidden=8, c_clip=4, c_r=4, down_levels=(1, 1), up_levels=(1, 1)
        )
    )
    randomise(denoiser)
    tokens, r, clip = torch.randint(8, (1, 8, 64)), torch.tensor([0.5]), torch.zeros(1, 4, 8, 64)
    changed = clip.clone()
    changed[..., :8] = 1
    difference = (denoiser(tokens, changed, r) - denoiser(tokens, clip, r)).abs().amax((0, 1, 2))
    assert difference[:8].min() > 1e-3
    assert difference[32:].max() == 0


def test_branches_of_a_row_are_what_each_is_alone(recorded):
    denoiser, x = recorded
    clip, row_of = torch.cat([x["clip"], torch.zeros(1, 20)]), torch.tensor([0, 1, 1])
    times = denoiser.times(noise_probability(x["r"]))
    logits = denoiser.project(
        denoiser.features(x["tokens"], times, denoiser.condition(clip), row_of)
    ).permute(0, 3, 1, 2)
    torch.testing.assert_close(
        logits, torch.cat([x["logits"], x["logits_uncond"][1:]]), **TOLERANCE
    )


def test_stacked_conditions_draw_what_each_draws_alone(recorded):
    denoiser, x = recorded
    grid = (x["tokens"].shape[1], x["tokens"].shape[2])
    conditions = [
        denoiser.condition(x["clip"][:1]),
        denoiser.condition(x["clip_spatial"][1:], grid),
    ]
    together = denoiser.features(
        x["tokens"], denoiser.times(noise_probability(x["r"])), ConditionV1.stack(conditions)
    )
    logits = denoiser.project(together).permute(0, 3, 1, 2)
    torch.testing.assert_close(
        logits, torch.cat([x["logits"][:1], x["logits_spatial"][1:]]), **TOLERANCE
    )


def test_blended_conditions_are_the_condition_of_the_blended_map(recorded):
    denoiser, x = recorded
    coverage = torch.rand(2, 16, 24).softmax(0)
    one, other = (denoiser.condition(x["clip"][i : i + 1]) for i in range(2))
    blended = one.blended([other], coverage)
    expected = denoiser.condition(torch.einsum("nc,nhw->chw", x["clip"], coverage)[None], (16, 24))
    for mine, theirs in zip(blended.levels, expected.levels, strict=True):
        torch.testing.assert_close(mine, theirs, **SAME)


def test_a_fresh_network_can_be_trained():
    denoiser = DenoiserV1(
        DenoiserV1Config(
            num_labels=16, c_hidden=16, c_clip=8, c_r=8, down_levels=(1, 1), up_levels=(1, 1)
        )
    )
    tokens = torch.randint(16, (2, 4, 4))
    with torch.enable_grad():
        F.cross_entropy(denoiser(tokens, torch.randn(2, 8), torch.rand(2)), tokens).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in denoiser.parameters())


# ── VQGAN ─────────────────────────────────────────────────────────────────────────────────────────


@BOTH_LAYOUTS
def test_codes_and_decoded_pictures_equal_the_recorded_ones(recorded_vqgan, layout):
    vqgan, x = recorded_vqgan
    vqgan.to(memory_format=layout)
    assert torch.equal(vqgan.encode(x["image"]), x["indices"])
    torch.testing.assert_close(vqgan.decode(x["indices"]), x["decoded"], **TOLERANCE)


def test_attention_sits_where_the_configured_resolution_says_whatever_the_picture_s_size():
    config = replace(
        published_vqgan()[0], resolution=64, attn_resolutions=[32, 8], ch_mult=[1, 1, 1, 1]
    )
    vqgan = VQGANV1(config)
    assert [len(level.attn) for level in vqgan.encoder.down] == [0, 1, 0, 1]
    assert [len(level.attn) for level in vqgan.decoder.up] == [0, 2, 0, 2]


def test_any_multiple_of_the_downscale_goes_in_and_comes_out_within_bounds(recorded_vqgan):
    vqgan, _ = recorded_vqgan
    image = torch.rand(2, 3, 8, 24)
    tokens = vqgan.encode(image)
    assert tokens.shape == (2, 1, 3)
    decoded = vqgan.decode(tokens)
    assert decoded.shape == image.shape
    assert 0 <= decoded.min() <= decoded.max() <= 1


# ── sampling ──────────────────────────────────────────────────────────────────────────────────────


class BundleOf:
    """As much of a bundle as stepping needs."""

    def __init__(self, denoiser: DenoiserV1) -> None:
        self.denoiser, self.config = denoiser, None
        self.every_denoiser = {"denoiser": denoiser}
        self.every_denoiser = {"denoiser": denoiser}


class Recorded(Eager):
    """Draws with recorded Gumbel noise, which stands where a row's uniforms are."""

    def sample(self, sampler: Sampler, features: Tensor, inputs: SamplingInputs) -> Tensor:
        assert sampler == "typical"
        logits = keep_typical(
            self.denoiser.project(features), inputs.mass[:, None, None].expand(features.shape[:-1])
        )
        return (logits * inputs.inverse[:, None, None, None] + inputs.uniform).argmax(-1)


def recorded_rows(denoiser: DenoiserV1, clip: Tensor, mode: RenoiseMode) -> list[Row]:
    """The traces' settings and noise as rows of the engine."""
    settings, _, x = golden("sampler_v1")
    config = SamplingConfig(
        steps=settings["steps"],
        renoise_steps=settings["renoise_steps"],
        guidance=(settings["guidance"], settings["guidance"]),
        guidance_steps=settings["steps"],
        temperature=tuple(settings["temperature"]),
        sampler="typical",
        typical_mass=settings["typical_mass"],
        schedule="cosine",
        renoise_mode=mode,
    )
    gumbel = x["gumbel"].view(settings["steps"], *x["init_noise"].shape, -1)
    kept = torch.ones(1, *x["init_noise"].shape)
    uniform, fresh = (
        torch.cat([x["renoise_uniform"], kept]),
        torch.cat([x["renoise_fresh"], kept.long()]),
    )
    unconditional = denoiser.condition(torch.zeros_like(clip[:1]))
    noises = [
        Noise(x["init_noise"][i], torch.empty(0), gumbel[:, i], uniform[:, i], fresh[:, i])
        for i in range(2)
    ]
    return [
        generate(config, noise, denoiser.condition(clip[i : i + 1]), unconditional)
        for i, noise in enumerate(noises)
    ]


def traced(denoiser: DenoiserV1, rows: list[Row]) -> Tensor:
    """Tokens after every step, [n, B, H, W]."""
    pipeline = PipelineV1(BundleOf(denoiser))
    pipeline.executor = Recorded(pipeline.bundle)
    after = []
    while not rows[0].done:
        pipeline.advance(rows)
        after.append(torch.stack([row.tokens for row in rows]))
    return torch.stack(after)


@pytest.mark.parametrize("mode", ["start", "prev", "rand"])
def test_tokens_after_every_step_equal_the_recorded_ones(recorded, mode):
    denoiser, x = recorded
    assert torch.equal(
        traced(denoiser, recorded_rows(denoiser, x["clip"], mode)),
        golden("sampler_v1")[2][f"tokens_{mode}"],
    )


def test_inpainted_tokens_after_every_step_equal_the_recorded_ones(recorded):
    denoiser, x = recorded
    trace = golden("sampler_v1")[2]
    kept = zip(x["tokens"], trace["mask"] == 0, strict=True)
    rows = [
        repaint(row, PinnedTokens(*known))
        for row, known in zip(recorded_rows(denoiser, x["clip"], "start"), kept, strict=True)
    ]
    assert torch.equal(traced(denoiser, rows), trace["tokens_inpaint"])


def test_every_recorded_trace_is_checked():
    assert {name for name in golden("sampler_v1")[2] if name.startswith("tokens_")} == {
        "tokens_start",
        "tokens_prev",
        "tokens_rand",
        "tokens_inpaint",
    }


# ── from prompt to picture ────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def pipeline(random_v1_bundle: Path) -> PipelineV1:
    return Pipeline.load(random_v1_bundle)


def prompted(pipeline: PipelineV1, seed: int, prompt: str = "red apple", **changes: object) -> Row:
    config = replace(pipeline.config.recipe.sampling(), **changes)
    noise = pipeline.noise(seed, 32, 32, config.steps, config.renoise_mode)
    encoded, negative = pipeline.encode([prompt, ""])
    (image,) = pipeline.prior_embeddings([encoded], [noise])
    return pipeline.start(
        noise, config, pipeline.condition(encoded, image), pipeline.condition(negative)
    )


def drawn(pipeline: PipelineV1, *rows: Row) -> list[Tensor]:
    while unfinished := [row for row in rows if not row.done]:
        pipeline.advance(unfinished)
    return [row.tokens for row in rows]


def test_the_empty_text_is_the_zero_embedding(pipeline):
    empty, written = pipeline.encode(["", "red apple"])
    assert not empty.clip.any()
    assert written.clip.any()
    assert written.byt5.shape[:2] == written.mask.shape == (1, 0)


def test_a_text_that_clip_cuts_is_said_to_be_cut(pipeline):
    assert [prompt.truncated for prompt in pipeline.encode(["red", "the red apple " * 20])] == [
        (),
        ("clip",),
    ]


@pytest.mark.parametrize("mode", ["start", "prev", "rand"])
def test_an_image_is_the_same_alone_and_among_rows_of_other_modes(pipeline, mode):
    (alone,) = drawn(pipeline, prompted(pipeline, 5, renoise_mode=mode))
    others = [
        prompted(pipeline, 6, steps=3, sampler="argmax"),
        prompted(pipeline, -7, guidance=(1.0, 1.0), sampler="multinomial"),
    ]
    assert (
        drawn(pipeline, others[0], prompted(pipeline, 5, renoise_mode=mode), others[1])[1] == alone
    ).float().mean() >= 0.99


def test_the_renoise_modes_draw_different_pictures(pipeline):
    pictures = [
        drawn(pipeline, prompted(pipeline, 5, renoise_mode=mode))[0]
        for mode in ("start", "prev", "rand")
    ]
    assert all(
        (one != other).any()
        for one, other in (
            (pictures[0], pictures[1]),
            (pictures[1], pictures[2]),
            (pictures[0], pictures[2]),
        )
    )


def test_regions_are_one_condition_that_differs_by_position_and_no_branches(pipeline):
    base, other = prompted(pipeline, 3), prompted(pipeline, 3, prompt="in the")
    everywhere = generate(
        base.sampling,
        base.noise,
        base.conditional,
        base.unconditional,
        regions=[RegionBranch(other.conditional, torch.ones(16, 16))],
    )
    assert len(everywhere.branches) == 2
    assert (drawn(pipeline, everywhere)[0] == drawn(pipeline, other)[0]).float().mean() >= 0.99


def test_the_temperature_divides_after_the_bias(pipeline):
    features, denoiser = torch.randn(1, 4, 4, 16), pipeline.bundle.denoiser
    inverse = torch.full((1, 1, 1, 1), 2.0)
    torch.testing.assert_close(
        denoiser.sharpened(features, inverse), 2 * denoiser.project(features)
    )


def test_fresh_tokens_are_any_of_the_codes_and_the_same_at_more_steps():
    few, many = (
        draw_noise(0, codes=3, grid=(40, 40), steps=n, prior=(0, 1), renoise_mode="rand")
        for n in (1, 5)
    )
    assert few.fresh.unique().tolist() == [0, 1, 2]
    assert torch.equal(few.fresh, many.fresh[:1])
    assert not torch.equal(few.fresh[0], few.start)
    assert draw_noise(0, codes=3, grid=(40, 40), steps=1, prior=(0, 1)).fresh.numel() == 0


def test_a_picture_is_drawn_from_a_prompt(pipeline):
    image = pipeline.generate(["red apple", "in the"], [0, 1], width=32, height=16)
    assert image.shape == (2, 16, 32, 3)
    assert not torch.equal(image[0], image[1])
