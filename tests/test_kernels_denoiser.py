"""What Triton's kernels compute is what plain networks compute, whoever decides that they do.
Interpreted where there is no CUDA device.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from model.config import PriorConfig
from model.executor import Eager, SamplingInputs
from model.kernels.triton import trial
from model.kernels.triton.prior_block import ROWS, prior_block
from model.networks.blocks_v3 import ConvBlock
from model.networks.denoiser_v3 import Denoiser
from model.networks.prior import Prior, sample
from model.optimize import use_triton
from model.pipeline import Pipeline, PipelineV3
from server.engine.runner import Runner
from server.settings import Settings
from tests.conftest import micro_config, randomise

pytestmark = pytest.mark.heavy


def test_a_fused_denoiser_sees_what_the_plain_one_sees():
    denoiser = Denoiser(micro_config().denoiser).eval().requires_grad_(False)
    randomise(denoiser)
    given = (
        torch.randint(64, (2, 4, 4)),
        torch.tensor([0.9, 0.2]),
        torch.randn(2, 5, 16),
        torch.randn(2, 16),
    )
    expected = denoiser(*given)
    denoiser.fuse()
    assert all(block.fused for block in denoiser.modules() if isinstance(block, ConvBlock))
    torch.testing.assert_close(denoiser(*given), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("sampler", ["multinomial", "argmax", "typical", "quant"])
def test_every_sampler_draws_the_same_codes_fused_or_not(pipeline: Pipeline, sampler):
    bundle = replace(pipeline.bundle, denoiser=copy.copy(pipeline.bundle.denoiser))
    features, uniform = torch.randn(2, 4, 4, 16), torch.rand(2, 4, 4)
    drawing = SamplingInputs(uniform, torch.tensor([0.7, 1.5]), torch.tensor([0.4, 0.9]))
    expected = Eager(bundle).sample(sampler, features, drawing)
    bundle.denoiser.fused = True
    assert torch.equal(Eager(bundle).sample(sampler, features, drawing), expected)


@pytest.mark.parametrize(
    "rows", [1, 3, 9], ids=["one picture", "three", "more than the kernels are for"]
)
def test_a_fused_prior_imagines_what_the_plain_one_imagines(rows):
    prior = (
        Prior(PriorConfig(c_hidden=24, c_r=8, clip_r=16, num_blocks=3)).eval().requires_grad_(False)
    )
    given = torch.randn(rows, 16), torch.randn(4, rows, 16)
    expected = sample(prior, *given, guidance=2.0)
    prior.fuse(prior_block, ROWS)
    torch.testing.assert_close(sample(prior, *given, guidance=2.0), expected, atol=1e-4, rtol=1e-4)


CPU, CUDA = torch.device("cpu"), torch.device("cuda")
CONFIG = micro_config().denoiser


def test_kernels_that_agree_are_chosen_for_cuda_alone_unless_somebody_says_otherwise(monkeypatch):
    monkeypatch.setattr(trial, "disagreeing", lambda *_: [])
    assert [use_triton("auto", device, torch.float16, CONFIG) for device in (CPU, CUDA)] == [
        False,
        True,
    ]
    assert [
        use_triton("torch", CUDA, torch.float16, CONFIG),
        use_triton("triton", CPU, torch.float16, CONFIG),
    ] == [False, True]


def test_kernels_that_are_wrong_or_do_not_compile_are_not_chosen_and_the_log_says_why(
    monkeypatch, caplog
):
    monkeypatch.setattr(trial, "disagreeing", lambda *_: ["argmax draw"])
    assert not use_triton("auto", CUDA, torch.float16, CONFIG)
    assert "argmax draw" in caplog.text
    monkeypatch.setattr(trial, "disagreeing", lambda *_: 1 / 0)
    assert not use_triton("auto", CUDA, torch.float16, CONFIG)
    assert "ZeroDivisionError" in caplog.text


def test_the_trial_passes_kernels_that_agree_and_names_one_that_does_not(monkeypatch):
    assert trial.disagreeing(CPU, torch.float32, CONFIG) == []
    assert trial.disagreeing(CPU, torch.float32, micro_config().prior) == []
    monkeypatch.setattr(trial, "prior_block", lambda h, extra, w: h)
    assert trial.disagreeing(CPU, torch.float32, micro_config().prior) == ["prior_block"]
    monkeypatch.setattr(
        trial, "gelu_response", lambda x, gamma, beta: torch.full_like(x, torch.nan)
    )
    assert trial.disagreeing(CPU, torch.float32, CONFIG) == [
        f"gelu_response of {C} channels" for C in sorted({*CONFIG.c_hidden})
    ]


def test_the_setting_decides_for_the_server_s_networks(random_bundle):
    for kernels in ("torch", "triton", "auto"):
        runner = Runner(
            Settings(weights=str(random_bundle), device="cpu", dtype="float32", kernels=kernels)
        )
        (pipeline,) = runner.pipelines.values()
        assert isinstance(pipeline, PipelineV3)
        assert (
            pipeline.bundle.denoiser.fused == pipeline.bundle.prior.fused == (kernels == "triton")
        )
