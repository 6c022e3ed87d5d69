"""Between and among conditions: ends are what they are between, steps are even, and nothing
shrinks on the way.
"""

from __future__ import annotations

import pytest
import torch

from model.conditioning import Conditioning, interpolate, lerp, mean, slerp
from model.pipeline import Pipeline

MODES = ("lerp", "slerp")


@pytest.fixture
def shown(pipeline: Pipeline) -> list[Conditioning]:
    """Prompts of 4, 10 and 40 bytes and their pictures."""
    prompts = pipeline.encode(["red", "red apple", "the red apple in the red apple on and on"])
    noise = pipeline.noise(0, 32, 32, 1)
    return [
        Conditioning(p, image)
        for p, image in zip(prompts, pipeline.prior_embeddings(prompts, [noise] * 3), strict=True)
    ]


@pytest.mark.parametrize("mode", MODES)
def test_the_ends_are_the_very_keyframes(shown, mode):
    assert interpolate(shown[0], shown[1], 0.0, mode) is shown[0]
    assert interpolate(shown[0], shown[1], 1.0, mode) is shown[1]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("share", [0.001, 0.999])
def test_beside_an_end_everything_is_nearly_there(shown, mode, share):
    end, made = shown[1] if share > 0.5 else shown[0], interpolate(shown[0], shown[1], share, mode)
    assert torch.equal(made.prompt.mask.sum(), end.prompt.mask.sum())
    for mine, its in ((made.image, end.image), (made.prompt.clip, end.prompt.clip)):
        torch.testing.assert_close(mine, its, rtol=0.02, atol=0.02)
    real = made.prompt.byt5[made.prompt.mask]
    torch.testing.assert_close(real, end.prompt.byt5[end.prompt.mask], rtol=0.02, atol=0.02)


@pytest.mark.parametrize("mode", MODES)
def test_in_the_middle_there_are_as_many_bytes_as_on_the_mean_and_no_more_padding_than_needed(
    shown, mode
):
    made = interpolate(shown[0], shown[2], 0.5, mode)
    assert int(made.prompt.mask.sum()) == 22
    assert made.prompt.byt5.shape[:2] == made.prompt.mask.shape == (1, 32)
    assert made.prompt.byt5.isfinite().all()


def test_slerp_keeps_lengths_and_goes_in_even_angles():
    one, other = torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 3.0]])
    third = slerp(one, other, 1 / 3)
    assert third.norm().item() == pytest.approx(3)
    assert torch.atan2(third[0, 1], third[0, 0]).item() == pytest.approx(torch.pi / 6)
    assert lerp(one, other, 0.5).tolist() == [[1.5, 1.5]]


@pytest.mark.parametrize("factor", [1.0, -1.0, 0.0])
def test_slerp_has_an_answer_where_there_is_no_circle_to_choose(factor):
    one = torch.tensor([[1.0, 2.0]])
    assert slerp(one, factor * one, 0.5).isfinite().all()


def test_a_mean_of_one_is_it_and_of_several_is_as_long_as_they_are():
    embeddings = [torch.tensor([[4.0, 0.0]]), torch.tensor([[0.0, 2.0]])]
    assert mean(embeddings[:1], [0.3]) is embeddings[0]
    assert torch.allclose(mean(embeddings, [1.0, 0.0]), embeddings[0])
    half = mean(embeddings, [1.0, 1.0])
    assert half.norm().item() == pytest.approx(3)
    assert half[0, 0] == pytest.approx(2 * half[0, 1].item())
    with pytest.raises(ValueError, match="above 0"):
        mean(embeddings, [0.0, 0.0])
