"""The v1 family computes what the published one computes and draws the tokens that it drew, and its shortcuts change nothing."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model import sampling_v1
from model.config import DenoiserV1Config, SamplingConfig, VQGANV1Config
from model.sampling import NEVER, typical_mask
from model.sampling_v1 import Known, Noise, draw_noise, sample
from model.v1 import VQGANV1, DenoiserV1, modulate, noise_probability
from tests.conftest import golden, randomise

TOLERANCE = {"atol": 1e-4, "rtol": 0}
# Where both sides are ours, only the order of additions differs.
SAME = {"atol": 2e-5, "rtol": 1e-5}
BOTH_LAYOUTS = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["published", "channels-last"])


@pytest.fixture(scope="module", autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


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


# ── configurations ────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_fields_are_the_published_arguments_without_dropout():
    assert {field.name for field in fields(DenoiserV1Config)} == set(golden("denoiser_v1")[0])
    arguments, _, _ = golden("vqgan_v1")
    assert {field.name for field in fields(VQGANV1Config)} == (set(arguments) | set(arguments["ddconfig"])) - {"ddconfig", "dropout"}


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


# ── denoiser ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


@BOTH_LAYOUTS
def test_logits_equal_the_recorded_ones(recorded, layout):
    denoiser, x = recorded
    denoiser.to(memory_format=layout)
    cases = {"logits": x["clip"], "logits_spatial": x["clip_spatial"], "logits_uncond": torch.zeros_like(x["clip"])}
    assert set(cases) == {name for name in x if name.startswith("logits")}
    for name, clip in cases.items():
        torch.testing.assert_close(denoiser(x["tokens"], clip, x["r"]), x[name], **TOLERANCE)


def test_the_noise_probability_equals_the_recorded_one(recorded):
    _, x = recorded
    torch.testing.assert_close(noise_probability(x["r"]), x["noise_prob"], **SAME)


def test_the_state_dicts_have_exactly_the_published_names():
    config, weights, _ = golden("denoiser_v1")
    vqgan_config, vqgan_weights, _ = published_vqgan()
    for network, published in ((DenoiserV1(DenoiserV1Config(**config)), weights), (VQGANV1(vqgan_config), vqgan_weights)):
        assert {name: t.shape for name, t in network.state_dict().items()} == {name: t.shape for name, t in published.items()}


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
    denoiser = DenoiserV1(DenoiserV1Config(num_labels=8, c_hidden=8, c_clip=4, c_r=4, down_levels=(1, 1), up_levels=(1, 1)))
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
    modulation = modulate(denoiser.condition(clip, (16, 24)), denoiser.times(x["r"][row_of]))
    logits = denoiser.project(denoiser.features(x["tokens"], modulation, row_of)).permute(0, 3, 1, 2)
    torch.testing.assert_close(logits, torch.cat([x["logits"], x["logits_uncond"][1:]]), **TOLERANCE)


def test_a_fresh_network_can_be_trained():
    denoiser = DenoiserV1(DenoiserV1Config(num_labels=16, c_hidden=16, c_clip=8, c_r=8, down_levels=(1, 1), up_levels=(1, 1)))
    tokens = torch.randint(16, (2, 4, 4))
    with torch.enable_grad():
        F.cross_entropy(denoiser(tokens, torch.randn(2, 8), torch.rand(2)), tokens).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in denoiser.parameters())


# ── VQGAN ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


@BOTH_LAYOUTS
def test_codes_and_decoded_pictures_equal_the_recorded_ones(recorded_vqgan, layout):
    vqgan, x = recorded_vqgan
    vqgan.to(memory_format=layout)
    assert torch.equal(vqgan.encode(x["image"]), x["indices"])
    torch.testing.assert_close(vqgan.decode(x["indices"]), x["decoded"], **TOLERANCE)


def test_attention_sits_where_the_configured_resolution_says_whatever_the_picture_s_size():
    config = replace(published_vqgan()[0], resolution=64, attn_resolutions=[32, 8], ch_mult=[1, 1, 1, 1])
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


# ── sampling ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def recorded_settings() -> tuple[SamplingConfig, Noise, dict[str, Tensor]]:
    """The traces' settings, and their noise: `draw` holds Gumbel noise instead of uniforms."""
    settings, _, x = golden("sampler_v1")
    config = SamplingConfig(
        steps=settings["steps"],
        renoise_steps=settings["renoise_steps"],
        guidance=(settings["guidance"], settings["guidance"]),
        guidance_steps=settings["steps"],
        temperature=tuple(settings["temperature"]),
        sampler="typical",
        typical_mass=settings["typical_mass"],
    )
    gumbel = x["gumbel"].view(settings["steps"], *x["init_noise"].shape, -1)
    return config, Noise(x["init_noise"], gumbel, x["renoise_uniform"], x["renoise_fresh"]), x


def gumbel_argmax(logits: Tensor, gumbel: Tensor) -> Tensor:
    return (logits + gumbel).argmax(-1)


@pytest.mark.parametrize("mode", ["start", "prev", "rand"])
def test_tokens_after_every_step_equal_the_recorded_ones(recorded, mode):
    denoiser, x = recorded
    config, noise, trace = recorded_settings()
    tokens = sample(denoiser, x["clip"], noise, config, renoise_mode=mode, draw=gumbel_argmax)
    assert torch.equal(torch.stack(list(tokens)), trace[f"tokens_{mode}"])


def test_inpainted_tokens_after_every_step_equal_the_recorded_ones(recorded):
    denoiser, x = recorded
    config, noise, trace = recorded_settings()
    known = Known(x["tokens"], trace["mask"] == 1)
    tokens = sample(denoiser, x["clip"], noise, config, known=known, draw=gumbel_argmax)
    assert torch.equal(torch.stack(list(tokens)), trace["tokens_inpaint"])


def test_every_recorded_trace_is_checked():
    assert {name for name in golden("sampler_v1")[2] if name.startswith("tokens_")} == {
        "tokens_start",
        "tokens_prev",
        "tokens_rand",
        "tokens_inpaint",
    }


@pytest.fixture(scope="module")
def small() -> tuple[DenoiserV1, SamplingConfig]:
    denoiser = DenoiserV1(DenoiserV1Config(num_labels=32, c_hidden=16, c_clip=8, c_r=8, down_levels=(1, 1), up_levels=(1, 1)))
    randomise(denoiser)
    config = SamplingConfig(
        steps=3, renoise_steps=2, guidance=(4.0, 4.0), guidance_steps=3, temperature=(1.0, 0.5), sampler="typical", typical_mass=0.4
    )
    return denoiser.eval(), config


def picture(denoiser: DenoiserV1, clip: Tensor, config: SamplingConfig, seeds: list[int], **how: object) -> Tensor:
    noise = draw_noise(seeds, codes=32, grid=(4, 6), steps=config.steps)
    return list(sample(denoiser, clip, noise, config, **how))[-1]


@pytest.mark.parametrize("mode", ["start", "prev", "rand"])
def test_known_tokens_stay_in_every_mode(small, mode):
    denoiser, config = small
    known = Known(torch.randint(32, (1, 4, 6)), torch.arange(24).view(1, 4, 6) % 3 == 0)
    noise = draw_noise([1], codes=32, grid=(4, 6), steps=3)
    for tokens in sample(denoiser, torch.randn(1, 8), noise, config, renoise_mode=mode, known=known):
        assert torch.equal(tokens[~known.repaint], known.tokens[~known.repaint])


@pytest.mark.parametrize("mode", ["start", "prev", "rand"])
def test_an_image_is_the_same_alone_and_among_others(small, mode):
    denoiser, config = small
    clip = torch.randn(3, 8)
    together = picture(denoiser, clip, config, [5, 6, -7], renoise_mode=mode)
    for i, seed in enumerate([5, 6, -7]):
        assert torch.equal(picture(denoiser, clip[i : i + 1], config, [seed], renoise_mode=mode)[0], together[i])


def test_guidance_beyond_its_steps_is_none(small):
    denoiser, config = small
    clip = torch.randn(1, 8)
    unguided = picture(denoiser, clip, replace(config, guidance=(1.0, 1.0)), [3])
    assert torch.equal(picture(denoiser, clip, replace(config, guidance_steps=0), [3]), unguided)
    assert not torch.equal(picture(denoiser, clip, config, [3]), unguided)


def test_only_typical_codes_are_left_and_only_by_that_sampler(small):
    _, config = small
    logits = torch.randn(2, 3, 32)
    kept = sampling_v1.filtered(logits, config).isfinite()
    assert torch.equal(kept, typical_mask(logits, torch.full((2, 3), 0.4)))
    assert torch.equal(sampling_v1.filtered(logits, replace(config, sampler="multinomial")), logits)


def test_a_sampler_that_v1_does_not_know_is_refused(small):
    denoiser, config = small
    with pytest.raises(ValueError, match="not by quant"):
        picture(denoiser, torch.randn(1, 8), replace(config, sampler="quant"), [0])


def test_noise_dwindles_from_step_to_step_and_the_last_step_leaves_none():
    assert sampling_v1.times(4).tolist() == [0, 0.25, 0.5, 0.75, 1]
    chances = sampling_v1.renoise_probabilities(4, 9)
    assert chances[:3] == pytest.approx([0.9239, 0.7071, 0.3827], abs=1e-4)
    assert chances[3] == NEVER
    assert sampling_v1.renoise_probabilities(4, 1)[1:] == [NEVER] * 3


def test_more_steps_begin_with_the_same_randomness():
    few, many = (draw_noise([7, 8], codes=64, grid=(4, 6), steps=n) for n in (2, 5))
    assert torch.equal(few.start, many.start)
    for one, other in ((few.draw, many.draw), (few.renoise, many.renoise), (few.fresh, many.fresh)):
        assert torch.equal(one, other[:2])


def test_fresh_tokens_are_any_of_the_codes():
    fresh = draw_noise([0], codes=3, grid=(40, 40), steps=1).fresh
    assert fresh.unique().tolist() == [0, 1, 2]
