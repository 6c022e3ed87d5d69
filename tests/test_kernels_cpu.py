"""The packed kernels compute what the plain modules do, for the shapes they were packed for and
for all others.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.bundle import load_bundle
from model.config import DenoiserConfig
from model.kernels import cpu
from model.kernels.cpu import PackedDepthwise, PackedLinear, supported
from model.networks.blocks_v3 import ConvBlock
from model.networks.denoiser_v3 import Denoiser
from model.networks.layers import ConvTranspose, Downsample, Upsample
from tests.conftest import golden

DTYPES = [
    dtype for dtype in (torch.float32, torch.bfloat16) if supported(torch.empty(1, dtype=dtype))
]
pytestmark = pytest.mark.skipif(not DTYPES, reason="this build of torch has no packed kernels")


def tolerance(dtype: torch.dtype) -> float:
    return 1e-5 if dtype == torch.float32 else 2e-2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["none", "gelu"])
@pytest.mark.parametrize("shape", [(6, 24), (2, 3, 24), (1, 2, 3, 24), (5, 24), (40, 24)])
def test_packed_linear_is_linear_for_any_number_of_rows(
    shape: tuple[int, ...], activation: str, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(24, 40).to(dtype), torch.randn(*shape).to(dtype)
    with torch.inference_mode():
        expected = linear(x) if activation == "none" else F.gelu(linear(x))
        packed = PackedLinear(
            linear.weight, linear.bias, 6, "gelu" if activation == "gelu" else "none"
        )
        torch.testing.assert_close(
            packed(x), expected, atol=tolerance(dtype), rtol=tolerance(dtype)
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [6, 5, 40])
def test_a_packed_map_adds_to_a_residual_without_changing_it(rows: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(24, 40).to(dtype), torch.randn(rows, 24).to(dtype)
    residual = torch.randn(rows, 40).to(dtype)
    before = residual.clone()
    with torch.inference_mode():
        expected = (residual.double() + linear.double()(x.double())).to(dtype)
        linear = linear.to(dtype)
        y = PackedLinear(linear.weight, linear.bias, 6).add_to(residual, x)
    torch.testing.assert_close(y, expected, atol=tolerance(dtype), rtol=tolerance(dtype))
    assert residual.equal(before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", [Downsample, Upsample])
@pytest.mark.parametrize("shape", [(1, 4, 4, 24), (2, 4, 4, 24), (1, 6, 2, 24)])
def test_packed_changes_of_size_are_the_plain_ones(
    shape: tuple[int, ...], kind: type[Downsample | Upsample], bias: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    layer, x = kind(24, 40).to(dtype), torch.randn(*shape).to(dtype)
    if not bias:
        layer.bias = None
    with torch.inference_mode():
        expected = layer(x)
        layer.pack(1, 4, 4)
        y = layer(x)
    torch.testing.assert_close(y, expected, atol=tolerance(dtype), rtol=tolerance(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_stored_by_columns_are_packed_alike(dtype: torch.dtype) -> None:
    weight, x = torch.randn(40, 24).to(dtype), torch.randn(6, 24).to(dtype)
    by_columns = weight.T.contiguous().T
    with torch.inference_mode():
        assert PackedLinear(by_columns, None, 6)(x).equal(PackedLinear(weight, None, 6)(x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 8, 8, 24), (1, 8, 8, 24), (3, 5, 1, 24)])
def test_packed_depthwise_is_the_convolution_for_any_size(
    shape: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    conv, x = nn.Conv2d(24, 24, 3, padding=1, groups=24).to(dtype), torch.randn(*shape).to(dtype)
    with torch.inference_mode():
        expected = conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        y = PackedDepthwise(conv.weight, conv.bias, (2, 8, 8, 24))(x)
    assert y.is_contiguous()
    torch.testing.assert_close(y, expected, atol=tolerance(dtype), rtol=tolerance(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 8, 8, 24), (2, 8, 8, 24), (1, 5, 3, 24)])
def test_a_packed_transposed_convolution_is_the_plain_one_for_any_size(
    shape: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    conv = ConvTranspose(24, 16, 4, stride=2, padding=1).to(dtype)
    x = torch.randn(*shape).to(dtype)
    with torch.inference_mode():
        expected = conv(x)
        conv.pack(8, 8)
        y = conv(x)
    assert y.shape == (shape[0], 2 * shape[1], 2 * shape[2], 16)
    assert y.is_contiguous()
    torch.testing.assert_close(y, expected, atol=tolerance(dtype), rtol=tolerance(dtype))


def test_half_precision_and_other_devices_stay_plain() -> None:
    assert not supported(torch.empty(1, dtype=torch.float16))
    assert not supported(torch.empty(1, device="meta"))


@pytest.fixture
def trial() -> Iterator[None]:
    """Every type is tried again, before the test and after it."""
    cpu._passes_trial.cache_clear()
    yield
    cpu._passes_trial.cache_clear()


def missing(*_: object) -> Tensor:
    raise AttributeError("'_OpNamespace' 'mkldnn' object has no attribute")


def wrong(x: Tensor, packed: Tensor, *rest: object) -> Tensor:
    return torch.zeros(*x.shape[:-1], 40, dtype=x.dtype)


COMPUTING = [
    ("mkldnn", "_linear_pointwise"),
    ("mkldnn", "_convolution_pointwise"),
    ("mkldnn", "_convolution_transpose_pointwise"),
    ("mkl", "_mkl_linear"),
]
PACKING = [
    ("mkldnn", "_reorder_linear_weight"),
    ("mkldnn", "_reorder_convolution_weight"),
    ("mkldnn", "_reorder_convolution_transpose_weight"),
    ("mkl", "_mkl_reorder_linear_weight"),
]


@pytest.mark.parametrize(
    ("namespace", "name", "operator"),
    [(*each, missing) for each in (*COMPUTING, *PACKING)] + [(*each, wrong) for each in COMPUTING],
)
def test_an_operator_that_fails_or_disagrees_leaves_a_bundle_plain_with_one_line_in_the_log(
    random_bundle: Path,
    trial: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    namespace: str,
    name: str,
    operator,
) -> None:
    monkeypatch.setattr(getattr(torch.ops, namespace), name, operator)
    bundle = load_bundle(random_bundle, torch.device("cpu"), torch.float32)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "packed CPU kernels" in caplog.text
    monkeypatch.undo()
    condition = bundle.denoiser.condition(torch.zeros(1, 16, 16), None, torch.zeros(1, 16))
    tokens = torch.zeros(1, 8, 8, dtype=torch.int64)
    assert (
        bundle.denoiser.features(tokens, bundle.denoiser.times(torch.ones(1)), condition)
        .isfinite()
        .all()
    )
    assert all(
        block.packed is None for block in bundle.denoiser.modules() if isinstance(block, ConvBlock)
    )


def test_packing_the_denoiser_changes_nothing() -> None:
    config, weights, recorded = golden("denoiser_v3")
    denoiser = Denoiser(DenoiserConfig(**config))
    denoiser.load_state_dict(weights, strict=True)
    with torch.inference_mode():
        denoiser.pack(*recorded["tokens"].shape[1:])
        logits = denoiser(recorded["tokens"], recorded["t"], recorded["byt5"])
    torch.testing.assert_close(logits, recorded["logits_byt5"], atol=1e-4, rtol=0)
    assert denoiser.state_dict().keys() == weights.keys()
