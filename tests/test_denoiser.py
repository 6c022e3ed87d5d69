"""The denoiser computes what the published one computes, for every row alone, and its shortcuts
change nothing.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.config import DenoiserConfig
from model.networks.blocks_v3 import AttentionBlock, ConvBlock, GlobalResponseNorm
from model.networks.denoiser_v3 import Condition, Denoiser
from model.networks.layers import Downsample, Upsample, norm
from tests.conftest import golden, randomise

pytestmark = pytest.mark.usefixtures("no_grad")

TOLERANCE = {"atol": 1e-4, "rtol": 0}
# Where both sides are ours, only the order of additions differs.
SAME = {"atol": 2e-5, "rtol": 1e-5}
CASES: dict[str, dict[str, str | tuple[str, ...]]] = {
    "logits_byt5": {},
    "logits_byt5_clip": {"clip": "clip"},
    "logits_all": {"clip": "clip", "clip_image": "clip_image"},
    "logits_two_images": {"clip": "clip", "clip_image": ("clip_image", "clip_image_2")},
    "logits_attn_weights": {
        "clip": "clip",
        "clip_image": "clip_image",
        "attn_weights": "attn_weights",
    },
}


@pytest.fixture(
    scope="module",
    params=[torch.contiguous_format, torch.channels_last],
    ids=["published", "channels-last"],
)
def recorded(request) -> tuple[Denoiser, dict[str, Tensor]]:
    config, weights, tensors = golden("denoiser_v3")
    denoiser = Denoiser(DenoiserConfig(**config)).eval()
    denoiser.load_state_dict(weights, strict=True)
    denoiser.to(memory_format=request.param)
    return denoiser, tensors


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_the_recorded_ones(recorded, case):
    denoiser, x = recorded
    arguments = {
        name: [x[k] for k in key] if isinstance(key, tuple) else x[key]
        for name, key in CASES[case].items()
    }
    torch.testing.assert_close(
        denoiser(x["tokens"], x["t"], x["byt5"], **arguments), x[case], **TOLERANCE
    )


def test_every_recorded_case_is_checked():
    _, _, tensors = golden("denoiser_v3")
    assert set(CASES) == {name for name in tensors if name.startswith("logits")}


def test_the_state_dict_has_exactly_the_published_names():
    config, weights, _ = golden("denoiser_v3")
    ours = Denoiser(DenoiserConfig(**config)).state_dict()
    assert {name: t.shape for name, t in ours.items()} == {
        name: t.shape for name, t in weights.items()
    }


def test_the_published_size_counts_its_published_parameters():
    with torch.device("meta"):
        denoiser = Denoiser(DenoiserConfig())
    assert sum(p.numel() for p in denoiser.parameters()) == 1_008_350_592


@pytest.mark.parametrize("grid", [(8, 8), (8, 32), (40, 16), (24, 8)])
def test_any_multiple_of_the_token_step_is_a_grid(recorded, grid):
    denoiser, x = recorded
    assert all(side % denoiser.config.token_step == 0 for side in grid)
    tokens = torch.randint(64, (2, *grid), generator=torch.Generator().manual_seed(0))
    logits = denoiser(tokens, x["t"], x["byt5"])
    assert logits.shape == (2, 64, *grid)
    assert logits.isfinite().all()


def test_a_grid_and_its_transpose_are_different_pictures(recorded):
    denoiser, x = recorded
    upright = denoiser(x["tokens"].mT.contiguous(), x["t"], x["byt5"])
    assert upright.shape == (2, 64, 24, 16)
    assert not torch.allclose(upright.mT, x["logits_byt5"], atol=0.1)


def test_a_row_does_not_see_its_neighbours(recorded):
    denoiser, x = recorded
    for i in range(2):
        alone = denoiser(
            x["tokens"][i : i + 1],
            x["t"][i : i + 1],
            x["byt5"][i : i + 1],
            x["clip"][i : i + 1],
            x["clip_image"][i : i + 1],
        )
        torch.testing.assert_close(alone[0], x["logits_all"][i], **TOLERANCE)


def test_masked_padding_changes_nothing_whatever_it_holds(recorded):
    denoiser, x = recorded
    mask = torch.tensor([[True] * 5 + [False] * 4, [True] * 9])
    byt5 = x["byt5"].clone()
    byt5[0, 5:] = 1e3
    padded = denoiser(x["tokens"], x["t"], byt5, x["clip"], x["clip_image"], byt5_mask=mask)
    short = denoiser(
        x["tokens"][:1], x["t"][:1], x["byt5"][:1, :5], x["clip"][:1], x["clip_image"][:1]
    )
    torch.testing.assert_close(padded[:1], short, **SAME)
    torch.testing.assert_close(padded[1], x["logits_all"][1], **TOLERANCE)


def test_stacked_conditions_of_any_lengths_draw_what_each_draws_alone(recorded):
    denoiser, x = recorded
    conditions = [
        denoiser.condition(x["byt5"][:1]),
        denoiser.condition(x["byt5"][1:, :2], None, x["clip"][1:]),
        denoiser.condition(
            x["byt5"][:1],
            torch.arange(9)[None] < 4,
            x["clip"][:1],
            [x["clip_image"][:1], x["clip_image_2"][:1]],
        ),
    ]
    tokens, times = x["tokens"][[0, 1, 0]], denoiser.times(x["t"][[0, 1, 1]])
    together = denoiser.features(tokens, times, Condition.stack(conditions))
    for i, condition in enumerate(conditions):
        alone = denoiser.features(tokens[i : i + 1], times[i : i + 1], condition)
        torch.testing.assert_close(together[i : i + 1], alone, **SAME)


def test_folded_weights_lead_from_a_prompt_to_the_same_keys_and_values(recorded):
    denoiser, x = recorded
    folded = copy.deepcopy(denoiser)
    folded.fold_condition()
    weights = torch.rand(2, 9 + 2 * denoiser.config.clip_seq_len) + 0.2
    for given in (None, weights):
        kv, expected = (
            d.condition(x["byt5"], None, x["clip"], x["clip_image"], given).kv
            for d in (folded, denoiser)
        )
        torch.testing.assert_close(kv, expected, **SAME)


def test_a_single_condition_is_stacked_unchanged(recorded):
    denoiser, x = recorded
    condition = denoiser.condition(x["byt5"][:1])
    stacked = Condition.stack([condition])
    assert torch.equal(stacked.kv, condition.kv)
    assert stacked.mask is not None
    assert stacked.mask.all()


def test_attention_weights_multiply_the_attention_after_its_softmax():
    B, H, W, C, L, heads = 2, 4, 6, 16, 5, 4
    block = AttentionBlock(C, 12, heads, self_attn=True)
    randomise(block)
    x, sequence, weights = torch.randn(B, H, W, C), torch.randn(B, L, 12), torch.rand(B, L) + 0.2

    attn = block.attention.attn
    pixels = norm(x).flatten(1, 2)
    keys = torch.cat([pixels, block.kv_mapper(sequence)], dim=1)
    projections = zip(
        (pixels, keys, keys), attn.in_proj_weight.chunk(3), attn.in_proj_bias.chunk(3), strict=True
    )
    q, k, v = (
        F.linear(*projection).unflatten(-1, (heads, -1)).transpose(1, 2)
        for projection in projections
    )
    attention = (q @ k.mT / (C // heads) ** 0.5).softmax(-1)
    attention[..., -L:] *= weights[:, None, None]
    expected = x + attn.out_proj((attention @ v).transpose(1, 2).flatten(2)).view(B, H, W, C)

    torch.testing.assert_close(
        block(x, block.condition_kv(sequence, weights), None), expected, **SAME
    )


def test_without_self_attention_pixels_read_the_condition_alone():
    block = AttentionBlock(16, 12, 4, self_attn=False)
    randomise(block)
    pixels, sequence = torch.randn(1, 2, 2, 16), torch.randn(1, 3, 12)
    kv = block.condition_kv(sequence, None)
    out = block(pixels, kv, torch.tensor([[True, True, False]]))
    # Every pixel is read by itself: moving them moves their outputs and does nothing else.
    torch.testing.assert_close(
        block(pixels.flip(1), kv, torch.tensor([[True, True, False]])), out.flip(1), **SAME
    )
    torch.testing.assert_close(block(pixels, kv[:, :2], None), out, **SAME)


def test_more_attention_weights_than_condition_tokens_are_refused(recorded):
    denoiser, x = recorded
    with pytest.raises(ValueError, match="10 entries, but there are only 9"):
        denoiser(x["tokens"], x["t"], x["byt5"], attn_weights=torch.ones(10))


@pytest.mark.parametrize("grid", [(4, 4), (3, 7)])
@pytest.mark.parametrize("kernel_size", [3, 5])
def test_the_depthwise_shortcut_equals_the_plain_grouped_convolution(grid, kernel_size):
    block = ConvBlock(8, kernel_size, skip=True)
    randomise(block)
    x, skip = torch.randn(2, *grid, 8), torch.randn(2, *grid, 8)
    conv = block.depthwise
    both = torch.cat([x, skip], dim=-1).permute(0, 3, 1, 2)
    plain = F.conv2d(both, conv.weight, conv.bias, padding=kernel_size // 2, groups=8).permute(
        0, 2, 3, 1
    )
    torch.testing.assert_close(block(x, skip), x + block.channelwise(norm(plain)), **SAME)


@pytest.mark.parametrize(
    ("ours", "plain"), [(Downsample, F.conv2d), (Upsample, F.conv_transpose2d)]
)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_resampling_as_a_linear_map_equals_the_plain_convolution(ours, plain, memory_format):
    layer = ours(6, 10)
    randomise(layer)
    layer.to(memory_format=memory_format)
    x = torch.randn(2, 4, 6, 6)
    expected = plain(x.permute(0, 3, 1, 2), layer.weight, layer.bias, stride=2).permute(0, 2, 3, 1)
    torch.testing.assert_close(layer(x), expected, **SAME)


def test_response_norm_survives_large_half_precision_activations():
    # 300² is beyond fp16: squares taken in half precision made every output NaN.
    layer = GlobalResponseNorm(4).half()
    layer.gamma.data.fill_(1)
    x = torch.tensor([1.0, 2.0, 3.0, 4.0]).half() * 100
    assert torch.equal(layer(x.expand(1, 2, 2, 4))[0, 0, 0], (x * (1 + x / x.mean())).half())


def test_time_and_condition_tables_computed_beforehand_give_the_same_logits(recorded):
    denoiser, x = recorded
    table = denoiser.times(torch.cat([x["t"], torch.tensor([0.5])]))
    condition = denoiser.condition(x["byt5"], None, x["clip"], x["clip_image"])
    logits = denoiser.project(denoiser.features(x["tokens"], table[:2], condition)).permute(
        0, 3, 1, 2
    )
    torch.testing.assert_close(logits, x["logits_all"], **TOLERANCE)


def test_projection_is_linear_so_guidance_may_be_mixed_before_it(recorded):
    denoiser, _ = recorded
    a, b = torch.randn(2, 3, 3, 16).unbind(0)
    torch.testing.assert_close(
        denoiser.project(8 * a - 7 * b),
        8 * denoiser.project(a) - 7 * denoiser.project(b),
        atol=1e-4,
        rtol=1e-4,
    )


def test_a_fresh_network_says_nothing_yet_and_can_learn():
    config, _, x = golden("denoiser_v3")
    with torch.enable_grad():
        denoiser = Denoiser(DenoiserConfig(**config))
        logits = denoiser(x["tokens"], x["t"], x["byt5"], x["clip"], x["clip_image"])
        assert logits.abs().max() < 1e-6
        logits[:, 0].sum().backward()
        gradient = denoiser.clf[1].weight.grad
    assert gradient is not None
    assert gradient.abs().max() > 0


def test_a_channel_that_is_zero_everywhere_gives_no_nan_gradient():
    # It did: the root of a zero energy has an infinite slope, and an hour of training was lost to
    # it.
    block = GlobalResponseNorm(4)
    block.gamma.data.fill_(1.0)
    x = torch.randn(2, 3, 3, 4)
    x[..., 1] = 0
    x.requires_grad_()
    with torch.enable_grad():
        block(x).sum().backward()
    assert x.grad.isfinite().all()


def test_folding_changes_nothing():
    config, weights, recorded = golden("denoiser_v3")
    denoiser = Denoiser(DenoiserConfig(**config))
    denoiser.load_state_dict(weights, strict=True)
    with torch.inference_mode():
        denoiser.fold()
        logits = denoiser(recorded["tokens"], recorded["t"], recorded["byt5"])
    torch.testing.assert_close(logits, recorded["logits_byt5"], atol=1e-4, rtol=0)


def test_branches_computed_together_until_attention_are_those_computed_apart():
    config, weights, recorded = golden("denoiser_v3")
    denoiser = Denoiser(DenoiserConfig(**config))
    denoiser.load_state_dict(weights, strict=True)
    tokens, times = recorded["tokens"], denoiser.times(recorded["t"])
    row_of = torch.tensor([0, 1, 1, 0])
    byt5 = recorded["byt5"][row_of] * torch.tensor([1.0, 1.0, 0.0, 0.5])[:, None, None]
    with torch.inference_mode():
        condition = denoiser.condition(byt5)
        together = denoiser.features(tokens, times, condition, row_of)
        apart = denoiser.features(tokens[row_of], times[row_of], condition)
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=1e-5)
