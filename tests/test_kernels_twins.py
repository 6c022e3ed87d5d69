"""Triton's kernels beside their plain twins: on a CUDA device compiled, elsewhere by Triton's
interpreter, which knows nothing of speed.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from load_tests.gpu.kernels import Shape, cases
from load_tests.gpu.recorders import poisoned_memory
from model import sampling
from model.kernels.cpu import BlockWeights, plain_block
from model.kernels.triton.depthwise_norm import depthwise_norm, plain_depthwise_norm, taps_of
from model.kernels.triton.draw import SAMPLERS, draw, plain_draw
from model.kernels.triton.gelu_response import gelu_response, plain_gelu_response
from model.kernels.triton.prior_block import ROWS, prior_block
from model.kernels.triton.renoise_and_pin import renoise_and_pin

pytestmark = pytest.mark.heavy

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@pytest.fixture(autouse=True)
def _spoiled() -> Iterator[None]:
    with poisoned_memory():
        yield


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(DEVICE, dtype)


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize(
    ("C", "skip"),
    [(12, False), (12, True), (11, True)],
    ids=["plain", "skip", "a channel of x and of the skip"],
)
def test_convolution_and_norm_at_once_are_one_after_the_other(dtype, C, skip):
    x, weight, bias = (
        random(2, 3, 5, C, dtype=dtype),
        random(C, 1 + skip, 3, 3, dtype=dtype),
        random(C, dtype=dtype),
    )
    other = random(2, 3, 5, C, dtype=dtype) if skip else None
    exact = plain_depthwise_norm(
        x.float(), None if other is None else other.float(), weight.float(), bias.float()
    )
    assert error(depthwise_norm(x, other, taps_of(weight), bias), exact) < LIMITS[dtype]


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("pixels", [1, 7, 300])
def test_gelu_and_response_norm_in_three_passes_are_the_plain_ones(dtype, pixels):
    x, gamma, beta = (
        random(2, pixels, 70, dtype=dtype),
        random(70, dtype=dtype),
        random(70, dtype=dtype),
    )
    exact = plain_gelu_response(x.float(), gamma.float(), beta.float())
    assert error(gelu_response(x, gamma, beta), exact) < LIMITS[dtype]


def test_a_channel_that_is_zero_everywhere_is_no_nan():
    x = torch.zeros(1, 9, 70, device=DEVICE)
    assert torch.equal(
        gelu_response(x, torch.ones(70, device=DEVICE), torch.full((70,), 0.5, device=DEVICE)),
        torch.full_like(x, 0.5),
    )


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16]
)  # the interpreter multiplies bfloat16's bits as whole numbers
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_codes_drawn_without_logits_are_those_drawn_from_them(sampler, dtype):
    features, weight = random(70, 16, dtype=dtype), random(200, 16, dtype=dtype)
    inverse, uniform = torch.rand(70).to(DEVICE) + 0.5, torch.rand(70).to(DEVICE)
    drawn = draw(sampler, features, weight, inverse, uniform)
    same = drawn == plain_draw(sampler, features, weight, inverse, uniform)
    assert same.float().mean() >= (0.97 if dtype == torch.float32 else 0.9)
    assert drawn.min() >= 0
    assert drawn.max() < 200


def test_uniforms_at_the_ends_draw_the_first_and_the_last_code_that_can_be_drawn():
    features, weight = torch.ones(2, 16, device=DEVICE), torch.zeros(100, 16, device=DEVICE)
    uniform = torch.tensor([0.0, 1 - 2**-24], device=DEVICE)
    assert draw(
        "multinomial", features, weight, torch.ones(2, device=DEVICE), uniform
    ).tolist() == [0, 99]


def test_of_equal_logits_the_first_code_is_the_largest():
    weight = torch.zeros(100, 16, device=DEVICE)
    weight[[70, 99]] = 1
    assert (
        draw(
            "argmax",
            torch.ones(1, 16, device=DEVICE),
            weight,
            torch.ones(1, device=DEVICE),
            torch.ones(1, device=DEVICE),
        ).item()
        == 70
    )


def block_weights(D: int, inner: int, dtype: torch.dtype) -> BlockWeights:
    """The first is a view by columns, as a prior has it."""
    first = random(inner, D + 7, dtype=dtype)[:, :D].T
    return BlockWeights(
        first,
        *(random(inner, dtype=dtype) for _ in range(2)),
        random(D, inner, dtype=dtype),
        *random(2, D, dtype=dtype),
    )


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16]
)  # the interpreter multiplies bfloat16's bits as whole numbers
@pytest.mark.parametrize(("rows", "D", "inner"), [(1, 40, 160), (5, 280, 530), (ROWS, 16, 300)])
def test_a_prior_s_block_in_three_kernels_is_the_plain_one(rows, D, inner, dtype):
    h, extra, w = (
        random(rows, D, dtype=dtype),
        random(rows, inner, dtype=dtype),
        block_weights(D, inner, dtype),
    )
    exact = plain_block(h.float(), extra.float(), BlockWeights(*(part.float() for part in w)))
    assert error(prior_block(h, extra, w), exact) < LIMITS[dtype]


def test_a_prior_s_row_has_the_same_bits_whatever_other_rows_there_are():
    h, extra, w = random(ROWS, 40), random(ROWS, 160), block_weights(40, 160, torch.float32)
    together = prior_block(h, extra, w)
    h[1:] = torch.nan
    assert torch.equal(prior_block(h, extra, w)[0], together[0])
    assert torch.equal(prior_block(h[:1], extra[:1], w)[0], together[0])


@pytest.mark.parametrize("grid", [(5, 7), (40, 33)], ids=["less than a program's tokens", "more"])
@pytest.mark.parametrize("keeping", [False, True])
def test_what_a_step_leaves_is_the_same_in_one_kernel(grid, keeping):
    drawn, source, pinned = (torch.randint(99, (3, *grid), device=DEVICE) for _ in range(3))
    # A chance below every uniform number puts nothing back, and one of zero only where the number
    # is zero, too.
    probability, uniform = (
        torch.tensor([0.5, sampling.NEVER, 0.0], device=DEVICE),
        torch.rand(3, *grid, device=DEVICE),
    )
    uniform[2, 0] = 0
    kept = (torch.rand(3, *grid, device=DEVICE) < 0.3, pinned) if keeping else None
    found, expected = (
        each(drawn, source, uniform, probability, kept)
        for each in (renoise_and_pin, sampling.renoise_and_pin)
    )
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    assert {part.data_ptr() for part in (*found, *expected)}.isdisjoint({drawn.data_ptr()})


def test_every_kernel_is_put_beside_its_twin_and_its_twin_in_fp32():
    made = list(
        cases(
            Shape(rows=1, side=2, channels=8, codes=32, features=16, prior=8), DEVICE, torch.float32
        )
    )
    names = {
        "depthwise norm",
        "GELU and response norm",
        "multinomial",
        "argmax",
        "prior blocks",
        "renoise_and_pin",
    }
    assert {case.name.split(",")[0] for case in made} == names
    for case in made:
        assert case.judge().good, case.name
        assert case.bytes > 0
