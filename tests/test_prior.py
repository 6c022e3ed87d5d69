"""The prior predicts and samples what the published one does."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor

from model.config import PriorConfig
from model.networks.prior import Prior, add_noise, alpha_bar, ddim_step, sample, trajectory
from tests.conftest import golden

pytestmark = pytest.mark.usefixtures("no_grad")

# Some of the recorded values are above 100, where 1e-4 is a dozen float32 steps: one processor's
# products are within that, another's not.
TOLERANCE = {"atol": 1e-4, "rtol": 1e-5}


@pytest.fixture(scope="module")
def recorded() -> tuple[Prior, dict[str, Tensor], float]:
    config, weights, tensors = golden("prior_v1")
    guidance = config.pop("cfg")
    assert config.pop("timesteps") == len(tensors["ddpm_x_after_step"])
    prior = Prior(PriorConfig(**config)).eval()
    prior.load_state_dict(weights, strict=True)
    return prior, tensors, guidance


def test_the_state_dict_has_exactly_the_published_names(recorded):
    prior, _, _ = recorded
    _, weights, _ = golden("prior_v1")
    assert {name: t.shape for name, t in prior.state_dict().items()} == {
        name: t.shape for name, t in weights.items()
    }


def test_predicted_noise_equals_the_recorded_one(recorded):
    prior, x, _ = recorded
    torch.testing.assert_close(prior(x["x"], x["t"], x["clip_text"]), x["noise_pred"], **TOLERANCE)


def test_every_ddpm_step_equals_the_recorded_one(recorded):
    prior, x, guidance = recorded
    noise = torch.cat([x["ddpm_init"][None], x["ddpm_step_noise"]])
    ours = torch.stack(
        list(trajectory(prior, x["clip_text"], noise, guidance=guidance, sampler="ddpm"))
    )
    torch.testing.assert_close(ours, x["ddpm_x_after_step"], **TOLERANCE)


def test_every_ddim_step_equals_the_recorded_one(recorded):
    prior, x, guidance = recorded
    # Whatever noise is there for the steps is not used.
    noise = torch.cat([x["ddim_init"][None], torch.full((7, 2, 20), torch.nan)])
    ours = torch.stack(
        list(trajectory(prior, x["clip_text"], noise, guidance=guidance, sampler="ddim"))
    )
    torch.testing.assert_close(ours, x["ddim_x_after_step"], **TOLERANCE)


def test_a_sample_is_where_the_trajectory_ends(recorded):
    prior, x, guidance = recorded
    noise = torch.cat([x["ddpm_init"][None], x["ddpm_step_noise"]])
    torch.testing.assert_close(
        sample(prior, x["clip_text"], noise, guidance=guidance),
        x["ddpm_x_after_step"][-1],
        **TOLERANCE,
    )


def test_a_folded_prior_draws_the_same_at_any_number_of_steps(recorded):
    prior, x, _ = recorded
    folded = copy.deepcopy(prior)
    folded.fold()
    noise = torch.cat([x["ddpm_init"][None], x["ddpm_step_noise"]])
    for steps in (len(noise) - 1, 2, len(noise) - 1):
        assert torch.equal(
            sample(folded, x["clip_text"], noise[: steps + 1]),
            sample(prior, x["clip_text"], noise[: steps + 1]),
        )


def test_the_last_ddpm_step_adds_no_noise(recorded):
    prior, x, _ = recorded
    noise = torch.cat([x["ddpm_init"][None], x["ddpm_step_noise"]])
    without = noise.clone()
    without[-1] = torch.nan
    assert torch.equal(sample(prior, x["clip_text"], noise), sample(prior, x["clip_text"], without))


def test_guidance_one_is_the_conditional_prediction_alone(recorded):
    prior, x, _ = recorded
    noise = torch.cat([x["ddim_init"][None], torch.zeros(1, 2, 20)])
    ts = torch.linspace(1, 0, 3)[1:]
    a = alpha_bar(ts).tolist()
    by_hand = ddim_step(noise[0], prior(noise[0], ts[:1].expand(2), x["clip_text"]), a[0], a[1])
    torch.testing.assert_close(
        sample(prior, x["clip_text"], noise, guidance=1.0, sampler="ddim"), by_hand, **TOLERANCE
    )


def test_rows_do_not_see_each_other(recorded):
    prior, x, guidance = recorded
    noise = torch.cat([x["ddpm_init"][None], x["ddpm_step_noise"]])
    alone = sample(prior, x["clip_text"][1:], noise[:, 1:], guidance=guidance)
    torch.testing.assert_close(alone, x["ddpm_x_after_step"][-1, 1:], **TOLERANCE)


def test_the_signal_s_share_falls_from_nearly_one_to_nearly_nothing():
    a = alpha_bar(torch.linspace(0, 1, 101))
    assert (a.diff() <= 0).all()
    assert (a[0].item(), a[-1].item()) == pytest.approx((0.9999, 1e-4))
    by_hand = [
        math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
        / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
        for t in (0.25, 0.5, 0.75)
    ]
    assert a[[25, 50, 75]].tolist() == pytest.approx(by_hand, abs=1e-6)


def test_noised_embeddings_keep_their_variance():
    generator = torch.Generator().manual_seed(0)
    x, noise = torch.randn(2, 4, 20_000, generator=generator).unbind(0)
    noised = add_noise(x, torch.tensor([0.0, 0.3, 0.7, 1.0]), noise)
    assert noised.var(-1).tolist() == pytest.approx([1.0] * 4, abs=0.05)
    torch.testing.assert_close(noised[0], x[0], atol=0.06, rtol=0)
    torch.testing.assert_close(noised[3], noise[3], atol=0.06, rtol=0)
