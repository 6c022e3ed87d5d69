"""The VQGAN encodes and decodes as the published one does."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.config import VQGANConfig
from model.networks.layers import norm, norm_of_few, pixel_shuffle, pixel_unshuffle
from model.networks.vqgan_v3 import VQGAN, VectorQuantizer
from tests.conftest import golden, randomise

pytestmark = pytest.mark.usefixtures("no_grad")

TOLERANCE = {"atol": 1e-4, "rtol": 0}


@pytest.fixture(
    scope="module",
    params=[torch.contiguous_format, torch.channels_last],
    ids=["published", "channels-last"],
)
def recorded(request) -> tuple[VQGAN, dict[str, Tensor]]:
    config, weights, tensors = golden("vqgan_v3")
    vqgan = VQGAN(VQGANConfig(**config)).eval()
    vqgan.load_state_dict(weights, strict=True)
    vqgan.to(memory_format=request.param)
    return vqgan, tensors


def test_the_state_dict_has_exactly_the_published_names():
    config, weights, _ = golden("vqgan_v3")
    ours = VQGAN(VQGANConfig(**config)).state_dict()
    assert {name: t.shape for name, t in ours.items()} == {
        name: t.shape for name, t in weights.items()
    }


def test_codes_equal_the_recorded_ones(recorded):
    vqgan, x = recorded
    assert torch.equal(vqgan.encode(x["image"]), x["indices"])


def test_latents_equal_the_recorded_ones_but_for_their_scale(recorded):
    vqgan, x = recorded
    latents = vqgan.encode_latents(x["image"]) / vqgan.config.scale_factor
    torch.testing.assert_close(latents.permute(0, 3, 1, 2), x["latents"], **TOLERANCE)


def test_code_vectors_equal_the_recorded_quantized_latents(recorded):
    vqgan, x = recorded
    quantized = vqgan.vquantizer.codebook(x["indices"]) / vqgan.config.scale_factor
    torch.testing.assert_close(quantized.permute(0, 3, 1, 2), x["quantized"], **TOLERANCE)


@pytest.mark.parametrize("packed", [False, True])
def test_decoded_codes_equal_the_recorded_picture(recorded, packed):
    vqgan, x = recorded
    if packed:
        vqgan = copy.deepcopy(vqgan)
        vqgan.pack(*x["indices"].shape[1:])
    torch.testing.assert_close(vqgan.decode(x["indices"]), x["decoded_from_indices"], **TOLERANCE)


def test_decoded_latents_equal_the_recorded_picture(recorded):
    vqgan, x = recorded
    latents = x["quantized"].permute(0, 2, 3, 1) * vqgan.config.scale_factor
    torch.testing.assert_close(
        vqgan.decode_latents(latents), x["decoded_from_quantized"], **TOLERANCE
    )


def test_the_output_is_not_clamped(recorded):
    _, x = recorded
    assert x["decoded_from_indices"].max() > 1 or x["decoded_from_indices"].min() < 0


@pytest.mark.parametrize(("levels", "factor"), [(1, 2), (2, 4), (3, 8)])
@pytest.mark.parametrize("grid", [(1, 1), (2, 5), (6, 3)])
def test_any_multiple_of_the_downscale_goes_in_and_comes_out(levels, factor, grid):
    vqgan = VQGAN(
        VQGANConfig(levels=levels, bottleneck_blocks=1, c_hidden=16, codebook_size=32)
    ).eval()
    assert vqgan.config.downscale == factor
    image = torch.rand(2, 3, grid[0] * factor, grid[1] * factor)
    tokens = vqgan.encode(image)
    assert tokens.shape == (2, *grid)
    assert vqgan.decode(tokens).shape == image.shape


def test_pictures_of_a_batch_do_not_see_each_other(recorded):
    vqgan, x = recorded
    torch.testing.assert_close(
        vqgan.decode(x["indices"][1:]), x["decoded_from_indices"][1:], **TOLERANCE
    )
    assert torch.equal(vqgan.encode(x["image"][1:]), x["indices"][1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels", [1, 6, 24, 31])
def test_the_norm_of_few_channels_is_the_layer_norm(channels, dtype):
    torch.manual_seed(0)
    x = (5 * torch.randn(2, 3, 4, channels) + 20).to(dtype)
    x[0, 0] = 0.3  # all channels alike
    before = x.clone()
    expected = norm(x.float()).to(dtype)
    torch.testing.assert_close(norm_of_few(x), expected, atol=2e-4, rtol=1e-2)
    assert x.equal(before)


def test_the_nearest_code_is_the_one_of_smallest_distance():
    quantizer = VectorQuantizer(50, 4)
    randomise(quantizer)
    latents = torch.randn(3, 5, 7, 4)
    distances = torch.cdist(latents.flatten(0, 2).double(), quantizer.codebook.weight.double())
    assert torch.equal(quantizer.nearest(latents), distances.argmin(-1).view(3, 5, 7))


def test_every_code_is_nearest_to_itself():
    quantizer = VectorQuantizer(100, 4)
    randomise(quantizer)
    assert torch.equal(quantizer.nearest(quantizer.codebook.weight), torch.arange(100))


@pytest.mark.parametrize("factor", [1, 2, 4])
def test_shuffles_order_channels_as_torch_does_and_undo_each_other(factor):
    x = torch.randn(2, 4 * factor, 3 * factor, 5)
    folded = pixel_unshuffle(x, factor)
    assert torch.equal(folded.permute(0, 3, 1, 2), F.pixel_unshuffle(x.permute(0, 3, 1, 2), factor))
    assert torch.equal(pixel_shuffle(folded, factor), x)
