"""The packed kernels compute what the plain modules do, for the shapes they were packed for and for all others."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from model.config import DenoiserConfig
from model.denoiser import Denoiser
from model.kernels.packed import PackedDepthwise, PackedLinear, supported
from tests.conftest import golden

DTYPES = [dtype for dtype in (torch.float32, torch.bfloat16) if supported(torch.empty(1, dtype=dtype))]
pytestmark = pytest.mark.skipif(not DTYPES, reason="this build of torch has no packed kernels")


def tolerance(dtype: torch.dtype) -> float:
    return 1e-5 if dtype == torch.float32 else 2e-2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["none", "gelu"])
@pytest.mark.parametrize("shape", [(6, 24), (2, 3, 24), (1, 2, 3, 24), (5, 24), (40, 24)])
def test_packed_linear_is_linear_for_any_number_of_rows(shape: tuple[int, ...], activation: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(24, 40).to(dtype), torch.randn(*shape).to(dtype)
    with torch.inference_mode():
        expected = linear(x) if activation == "none" else F.gelu(linear(x))
        packed = PackedLinear(linear.weight, linear.bias, 6, "gelu" if activation == "gelu" else "none")
        torch.testing.assert_close(packed(x), expected, atol=tolerance(dtype), rtol=tolerance(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_stored_by_columns_are_packed_alike(dtype: torch.dtype) -> None:
    weight, x = torch.randn(40, 24).to(dtype), torch.randn(6, 24).to(dtype)
    by_columns = weight.T.contiguous().T
    with torch.inference_mode():
        assert PackedLinear(by_columns, None, 6)(x).equal(PackedLinear(weight, None, 6)(x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 8, 8, 24), (1, 8, 8, 24), (3, 5, 1, 24)])
def test_packed_depthwise_is_the_convolution_for_any_size(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    conv, x = nn.Conv2d(24, 24, 3, padding=1, groups=24).to(dtype), torch.randn(*shape).to(dtype)
    with torch.inference_mode():
        expected = conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        y = PackedDepthwise(conv.weight, conv.bias, (2, 8, 8, 24))(x)
    assert y.is_contiguous()
    torch.testing.assert_close(y, expected, atol=tolerance(dtype), rtol=tolerance(dtype))


def test_half_precision_and_other_devices_stay_plain() -> None:
    assert not supported(torch.empty(1, dtype=torch.float16))
    assert not supported(torch.empty(1, device="meta"))


def test_packing_the_denoiser_changes_nothing() -> None:
    config, weights, recorded = golden("denoiser_v3")
    denoiser = Denoiser(DenoiserConfig(**config))
    denoiser.load_state_dict(weights, strict=True)
    with torch.inference_mode():
        denoiser.pack(*recorded["tokens"].shape[1:])
        logits = denoiser(recorded["tokens"], recorded["t"], recorded["byt5"])
    torch.testing.assert_close(logits, recorded["logits_byt5"], atol=1e-4, rtol=0)
    assert denoiser.state_dict().keys() == weights.keys()
