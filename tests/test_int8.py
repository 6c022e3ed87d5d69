"""Weights in int8 compute nearly what their plain twins do, in half the memory, and only where
they are asked for.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from model.bundle import load_bundle
from model.config import find_bundle
from model.kernels.int8 import Int8Linear
from model.optimize import size
from model.pipeline import Pipeline

CPU = torch.device("cpu")
PROMPTS = ("a red apple on a white background", "", "two green boxes 🍎")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_map_is_its_twin_within_half_a_step_of_every_weight(bias, dtype):
    twin = nn.Linear(48, 20, bias=bias, dtype=dtype)
    x = torch.randn(3, 5, 48, dtype=dtype)
    half_a_step = twin.weight.float().abs().amax(1) / 127 / 2
    bound = x.float().abs().sum(-1, keepdim=True) * half_a_step + 0.05 * (dtype == torch.bfloat16)
    assert ((Int8Linear(twin)(x).float() - twin(x).float()).abs() <= bound + 1e-5).all()


def test_rows_of_zeros_stay_zero():
    twin = nn.Linear(8, 4, bias=False)
    twin.weight.data[1] = 0
    assert (Int8Linear(twin)(torch.randn(2, 8))[:, 1] == 0).all()


@torch.no_grad()
def test_the_byte_encoder_in_int8_says_nearly_the_same_with_trained_weights():
    plain, small = (
        load_bundle(find_bundle("tiny"), CPU, torch.float32, encoders).byt5
        for encoders in ("device", "int8")
    )
    one, other = (encoder(PROMPTS) for encoder in (plain, small))
    real = one.mask
    error = (one.embeddings - other.embeddings)[real].norm() / one.embeddings[real].norm()
    assert 0 < error < 0.05
    assert size(small) < 0.4 * size(plain)


@pytest.mark.parametrize("encoders", ["cpu", "int8"])
def test_wherever_the_encoders_are_pictures_are_drawn(random_bundle, random_v1_bundle, encoders):
    for directory in (random_bundle, random_v1_bundle):
        assert Pipeline.load(directory, encoders=encoders).generate(["red apple"], [0]).shape == (
            1,
            32,
            32,
            3,
        )


def test_what_is_encoded_elsewhere_comes_as_the_denoiser_takes_it(random_bundle):
    pipeline = Pipeline.load(random_bundle, dtype=torch.bfloat16, encoders="cpu")
    for encoder in (pipeline.bundle.byt5, pipeline.bundle.clip):
        encoder.float()
        encoder.fold()
    (prompt,) = pipeline.encode(["red apple"])
    assert prompt.byt5.dtype == prompt.clip.dtype == torch.bfloat16
