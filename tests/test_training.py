"""Training: every objective falls and is what it says, and what comes out is a bundle that draws.

The networks are as small as they can be and the scenes are shapes alone, so neither a GPU nor the emoji font is needed.
"""

from __future__ import annotations

import math
from collections import Counter
from itertools import islice, pairwise
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.bundle import load_bundle
from model.networks.denoiser_v3 import Denoiser
from model.networks.vqgan_v3 import VQGAN
from model.pipeline import PipelineV3
from model.training import assemble, byte_encoder, captions, clip, data, denoiser, features, loop, prior, tiny, vqgan
from model.training.attributes import AttributeHeads, attribute_loss
from model.training.captions import ATTRIBUTES
from model.training.palette import NAMES
from model.training.scenes import KINDS, SIDES, Scene, Thing, sample_shape
from tests.conftest import micro_config, randomise, write_merges
from tests.short_training import run_main


@pytest.fixture(autouse=True)
def _shapes_alone(monkeypatch):
    for module in (captions, byte_encoder):
        monkeypatch.setattr(module, "sample", lambda rng, objects=0: sample_shape(rng))
    monkeypatch.setattr(tiny, "NATIVE_SIZE", (64, 64))


@pytest.fixture
def micro(monkeypatch):
    """The embedded bundle's shapes at the smallest widths."""
    config = micro_config()
    shapes = {
        "VQGAN": config.vqgan,
        "BYTE_ENCODER": config.byt5,
        "CLIP": config.clip,
        "PRIOR": config.prior,
        "DENOISER": config.denoiser,
        "RECIPE": config.recipe,
    }
    for name, shape in shapes.items():
        monkeypatch.setattr(tiny, name, shape)


# ── every trainer learns ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("trainer", "steps", "lr", "falls_to"),
    [
        (vqgan, 60, "5e-3", 0.7),
        (byte_encoder, 60, "1e-2", 0.9),
        (clip, 60, "5e-3", 0.95),
        (prior, 60, "5e-3", 0.9),
        (denoiser, 30, "5e-3", 0.8),
    ],
    ids=lambda value: value.__name__.rpartition(".")[2] if isinstance(value, ModuleType) else None,
)
def test_every_trainer_s_objective_falls(monkeypatch, micro, tmp_path, random_bundle, trainer, steps, lr, falls_to):
    write_merges(tmp_path)
    bundle = [str(random_bundle)] if trainer in (prior, denoiser) else []
    losses = run_main(monkeypatch, trainer, tmp_path / "x.pt", steps, *bundle, "--lr", lr)
    assert len(losses) == steps
    assert np.mean(losses[-10:]) < falls_to * np.mean(losses[:5])


def test_from_nothing_to_a_bundle_that_draws(monkeypatch, micro, tmp_path):
    runs, out = tmp_path / "runs", tmp_path / "out"
    write_merges(runs)
    for trainer, name in ((vqgan, "vqgan"), (byte_encoder, "byte_encoder"), (clip, "clip")):
        run_main(monkeypatch, trainer, runs / f"{name}.pt", 2)
    assemble.assemble(runs, out, torch.float32)
    for trainer, name in ((prior, "prior"), (denoiser, "denoiser")):
        run_main(monkeypatch, trainer, runs / f"{name}.pt", 2, str(out))
    config = assemble.assemble(runs, out, torch.float32)
    assert config.name == "tiny"
    bundle = load_bundle(out, torch.device("cpu"), torch.float32)
    for network, name, prefix in (("vqgan", "vqgan", "vqgan."), ("prior", "prior", ""), ("denoiser", "denoiser", "denoiser.")):
        averaged = assemble.trained_state(loop.load(runs / f"{name}.pt"), prefix)
        assert all(torch.equal(t, averaged[key]) for key, t in getattr(bundle, network).state_dict().items())
    assert PipelineV3(bundle).generate(["a red circle"], [0]).shape == (1, 64, 64, 3)


def test_assembled_embeddings_have_the_variance_the_prior_begins_with(monkeypatch, micro, tmp_path):
    write_merges(tmp_path / "runs")
    run_main(monkeypatch, clip, tmp_path / "runs" / "clip.pt", 2)
    assemble.assemble(tmp_path / "runs", tmp_path / "out", torch.float32)
    pair = load_bundle(tmp_path / "out", torch.device("cpu"), torch.float32).clip
    pixels, texts, _ = next(data.stream(64, seed=5))
    assert pair.encode_image(data.as_float(pixels, pair.device)).std().item() == pytest.approx(1, rel=0.2)
    assert pair.encode_text(texts).std().item() == pytest.approx(1, rel=0.2)


def test_networks_without_a_checkpoint_stay_as_they_were(monkeypatch, micro, tmp_path):
    write_merges(tmp_path / "runs")
    assemble.assemble(tmp_path / "runs", tmp_path / "out", torch.float32)
    before = load_bundle(tmp_path / "out", torch.device("cpu"), torch.float32)
    run_main(monkeypatch, vqgan, tmp_path / "runs" / "vqgan.pt", 2)
    assemble.assemble(tmp_path / "runs", tmp_path / "out", torch.float32)
    after = load_bundle(tmp_path / "out", torch.device("cpu"), torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(before.denoiser.parameters(), after.denoiser.parameters(), strict=True))
    assert not torch.equal(before.vqgan.vquantizer.codebook.weight, after.vqgan.vquantizer.codebook.weight)


def test_a_trainer_resumes_from_its_command_line(monkeypatch, random_bundle, tmp_path):
    checkpoint = tmp_path / "prior.pt"
    run_main(monkeypatch, prior, checkpoint, 2, str(random_bundle))
    run_main(monkeypatch, prior, checkpoint, 3, str(random_bundle), "--resume")
    assert loop.load(checkpoint)["step"] == 5


# ── VQGAN ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_loss_of_a_picture_to_itself_is_nothing_and_edges_count_beside_pixels():
    image = torch.rand(2, 3, 8, 8)
    assert vqgan.reconstruction_loss(image, image) == 0
    assert vqgan.reconstruction_loss(image + 0.1, image).item() == pytest.approx(0.01, rel=1e-3)
    ramp = 0.1 * torch.arange(8.0).expand(2, 3, 8, 8)
    assert vqgan.reconstruction_loss(image + ramp, image).item() == pytest.approx(ramp.square().mean().item() + 0.005, rel=1e-3)


def test_gradients_pass_straight_through_the_quantiser_to_the_encoder():
    trained = vqgan.Autoencoder(VQGAN(micro_config().vqgan))
    randomise(trained)
    output, latents, tokens = trained(torch.rand(2, 3, 16, 16))
    assert output.shape == (2, 3, 16, 16)
    assert latents.shape == (32, 4)
    assert tokens.shape == (32,)
    output.sum().backward()
    assert trained.vqgan.in_block[1].weight.grad.abs().max() > 0
    assert trained.vqgan.vquantizer.codebook.weight.grad is None


def test_codes_begin_as_latents():
    trained = vqgan.Autoencoder(VQGAN(micro_config().vqgan))
    latents = torch.randn(100, 4)
    trained.start_from(latents)
    codes = trained.vqgan.vquantizer.codebook.weight
    assert torch.cdist(codes, latents).amin(-1).max() < 1e-3
    assert torch.equal(trained.codes.sums, codes)


def test_a_code_moves_to_the_mean_of_the_latents_it_wins():
    codebook = vqgan.Codebook(torch.zeros(3, 2))
    latents, tokens = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 5.0]]), torch.tensor([0, 0, 2])
    for _ in range(1500):
        codes = codebook.follow(latents, tokens)
    torch.testing.assert_close(codes, torch.tensor([[2.0, 0.0], [0.0, 0.0], [0.0, 5.0]]), atol=1e-3, rtol=0)
    assert codebook.counts.tolist() == pytest.approx([2, 0, 1], abs=1e-3)


def test_a_dead_code_is_revived_at_a_latent_and_living_ones_stay():
    codebook = vqgan.Codebook(torch.arange(8.0).view(4, 2))
    codebook.counts.copy_(torch.tensor([10.0, 1e-3, 12.0, 0.0]))
    codebook.sums.copy_(torch.arange(8.0).view(4, 2))
    latents = torch.tensor([[5.0, -5.0], [7.0, -7.0]])
    codebook.revive(latents)
    codes = codebook.sums / codebook.counts[:, None]
    assert torch.cdist(codes[[1, 3]], latents).amin(-1).max() < 1e-4
    assert codebook.sums[[0, 2]].tolist() == [[0.0, 1.0], [4.0, 5.0]]
    assert codebook.counts[[0, 2]].tolist() == [10.0, 12.0]
    assert codebook.counts[[1, 3]].min() > 1


@pytest.mark.parametrize(("size", "picture"), [(8, (16, 24)), (16, (16, 16)), (5, (9, 7))])
def test_crops_are_windows_of_their_own_pictures(size, picture):
    images = torch.arange(3 * picture[0] * picture[1]).view(3, 1, *picture).expand(-1, 3, -1, -1)
    crops = vqgan.busy_crops(images, size)
    assert crops.shape == (3, 3, size, size)
    for image, crop in zip(images, crops, strict=True):
        windows = image.unfold(1, size, 1).unfold(2, size, 1)
        assert (windows == crop[:, None, None]).all((-1, -2)).all(0).any()


def test_the_crop_with_most_in_it_is_taken():
    images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    images[0, :, 4, 4] = 255
    images[1, :, 27, 27] = 255
    crops = vqgan.busy_crops(images, 16, tries=200)
    assert (crops.amax((1, 2, 3)) == 255).all()


# ── captions, attributes, CLIP ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_batches_of_captions_are_of_about_one_length_and_keep_their_classes():
    drawn = Counter(caption.text for caption in byte_encoder.draw_captions(np.random.default_rng(0), 8 * 4))
    batches = [batch.texts for batch in islice(byte_encoder.similar_lengths(np.random.default_rng(0), 4), 8)]
    assert Counter(text for batch in batches for text in batch) == drawn
    spans = sorted((min(map(len, batch)), max(map(len, batch))) for batch in batches)
    assert all(longest <= shortest for (_, longest), (shortest, _) in pairwise(spans))


def test_a_byte_is_asked_about_its_own_thing_and_others_about_none():
    scene = Scene("white", (Thing("star", "red", "small"), Thing("ring", "blue")), "above")
    caption = captions.describe(scene, np.random.default_rng(0), complete=True)
    batch = byte_encoder.Captions.of([caption])
    assert {name: classes.tolist() for name, classes in batch.stated.items()} == {name: [c] for name, c in caption.stated.items()}
    star, ring, mark = caption.spans[0].start, caption.spans[1].stop - 1, len(caption.text)
    own = batch.own(torch.tensor([[star, ring, mark]]))
    assert {name: classes.tolist() for name, classes in own.items()} == {
        "kind": [1 + KINDS.index("star"), 1 + KINDS.index("ring"), -1],
        "colour": [1 + NAMES.index("red"), 1 + NAMES.index("blue"), -1],
        "size": [1, 0, -1],
        "side": [1 + SIDES.index("top"), 1 + SIDES.index("bottom"), -1],
    }


def test_attributes_named_right_cost_nothing_and_the_worst_is_reported():
    classes = {name: torch.arange(6) % count for name, count in ATTRIBUTES.items()}
    logits = {name: 100 * F.one_hot(values, ATTRIBUTES[name]).float() for name, values in classes.items()}
    loss, worst = attribute_loss(logits, classes)
    assert (loss.item(), worst.item()) == pytest.approx((0, 1), abs=1e-6)
    name = next(iter(ATTRIBUTES))
    logits[name] = logits[name].roll(1, dims=-1) * (torch.arange(6) < 3)[:, None] + logits[name] * (torch.arange(6) >= 3)[:, None]
    loss, worst = attribute_loss(logits, classes)
    assert worst.item() == pytest.approx(0.5)
    assert loss.item() == pytest.approx(100 * 0.5 / len(ATTRIBUTES), rel=1e-3)
    classes[name][:3] = -1  # not asked
    assert attribute_loss(logits, classes)[1].item() == pytest.approx(1)


def test_there_is_a_head_for_every_attribute():
    logits = AttributeHeads(8)(torch.randn(5, 8))
    assert {name: tuple(x.shape) for name, x in logits.items()} == {name: (5, count) for name, count in ATTRIBUTES.items()}


def test_bytes_are_asked_of_their_own_caption_and_never_padding(micro):
    reader = byte_encoder.Reader()
    reader.heads = reader.own = torch.nn.Identity()
    prompts = ["red", "a large blue square on a very light yellow background"]
    with torch.no_grad():
        asked, whole, own = reader(prompts)
        out = reader.encoder(prompts)
    assert out.mask.gather(1, asked).all()
    assert torch.equal(whole, own)
    assert torch.equal(whole.unflatten(0, (2, -1)), torch.stack([x[i] for x, i in zip(out.embeddings, asked, strict=True)]))
    assert len(asked[1].unique()) > 1


def test_contrast_is_small_for_pairs_and_large_for_strangers():
    image = torch.eye(8)
    paired, found = clip.contrastive_loss(image, 3 * image, torch.tensor(3.0))
    strangers, lost = clip.contrastive_loss(image, image.roll(1, 0), torch.tensor(3.0))
    assert found == 1
    assert lost == 0
    assert paired.item() < 0.01 < strangers.item()
    assert paired.item() == pytest.approx(math.log(1 + 7 * math.exp(-math.exp(3))), abs=1e-6)


def test_contrast_s_scale_is_bounded():
    image = torch.randn(4, 8)
    (at_bound, _), (beyond, _) = (clip.contrastive_loss(image, image, torch.tensor(log_scale)) for log_scale in (math.log(100), 20.0))
    assert at_bound.item() == pytest.approx(beyond.item(), rel=1e-4)


def test_learnt_merges_fill_the_vocabulary_and_shorten_captions(tmp_path, prepared):
    from open_clip.tokenizer import SimpleTokenizer

    path = tmp_path / "merges.txt.gz"
    clip.learn_merges(path, vocabulary=600, captions=200)
    tokenizer = SimpleTokenizer(bpe_path=str(path))
    assert tokenizer.vocab_size == 600
    for text in (caption.text for caption in byte_encoder.draw_captions(np.random.default_rng(1), 50)):
        tokens = tokenizer.encode(text)
        assert max(tokens) < 600 - 2
        assert len(tokens) < 0.8 * len(text)
        assert tokenizer.decode(tokens).replace(" ", "") == text.lower().replace(" ", "")


# ── prior and denoiser ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_tenth_of_the_prior_s_texts_is_blank_and_the_noise_is_what_it_learns():
    seen = []

    def silent(x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        seen.append(text)
        return torch.zeros_like(x)

    loss = prior.diffusion_loss(silent, torch.ones(20_000, 4), torch.randn(20_000, 4))
    assert loss.item() == pytest.approx(1, abs=0.05)
    assert (seen[0] == 0).all(-1).float().mean().item() == pytest.approx(0.1, abs=0.012)
    assert ((seen[0] == 0) | (seen[0] == 1)).all()


def test_tokens_are_replaced_at_the_share_asked_for_by_any_code():
    tokens, t = torch.full((4, 100, 100), 7), torch.tensor([0.0, 0.25, 0.75, 1.0])
    noisy, noised = denoiser.corrupt(tokens, t, codes=10)
    assert noised.float().mean((1, 2)).tolist() == pytest.approx([0, 0.25, 0.75, 1], abs=0.025)
    assert torch.equal(noisy[~noised], tokens[~noised])
    shares = noisy[3].flatten().bincount(minlength=10) / 1e4
    assert shares.tolist() == pytest.approx([0.1] * 10, abs=0.02)


def test_chosen_positions_are_different_ones_and_all_are_chosen_in_time():
    tokens = torch.randint(8, (500, 4, 4))
    chosen = denoiser.choose_positions(tokens, 0.5)
    assert chosen.shape == (500, 8)
    assert all(len(set(row)) == 8 for row in chosen.tolist())
    assert (chosen.flatten().bincount(minlength=16) / 500).sub(0.5).abs().max() < 0.15  # seven standard deviations


def test_focus_prefers_a_thing_and_its_surroundings_on_either_side_of_the_outline():
    tokens = torch.zeros(2000, 8, 8, dtype=torch.int64)
    tokens[:, 2, 2] = 5
    share = denoiser.choose_positions(tokens, 0.1, focus=4.0).flatten().bincount(minlength=64).view(8, 8) / 2000
    near = share[1:4, 1:4]
    assert near.min() > 2 * share[5:, 5:].max()
    assert near.max() < 1.4 * near.min()  # the thing itself no more than what surrounds it


def examples(rows: int, length: int = 6) -> features.Examples:
    mask = torch.arange(length) < (1 + torch.arange(rows) % length)[:, None]
    clip_text, clip_image = torch.randn(2, rows, 16)
    tokens, byt5 = torch.randint(64, (rows, 8, 8)), torch.randn(rows, length, 16)
    return features.Examples(tokens, byt5, mask, clip_text, clip_image, empty=mask.sum(-1) == 1)


def test_some_bytes_are_those_of_the_caption_and_never_padding():
    x = examples(60)
    x.byt5[~x.mask] = torch.nan
    some = denoiser.some_bytes(x, 4)
    assert some.byt5.shape == (60, 4, 16)
    assert some.mask.shape == (60, 4)
    assert some.mask.all()
    assert (some.byt5[:, :, None] == x.byt5[:, None]).all(-1).any(-1).all()
    assert torch.equal(some.empty, x.empty)


def test_text_and_image_are_masked_as_groups_half_of_the_time_and_bytes_never():
    network, x = Denoiser(micro_config().denoiser), examples(3000)
    with torch.no_grad():
        mask = denoiser.dropped_condition(network, x).mask
    assert mask.shape == (3000, 6 + 4 + 4)
    assert torch.equal(mask[:, :6], x.mask)
    text, image = mask[:, 6:10], mask[:, 10:]
    for group in (text, image):
        assert torch.equal(group.all(-1), group.any(-1))
    empty = x.mask.sum(-1) == 1
    assert text[:, 0].float().mean().item() == pytest.approx(0.5, abs=0.05)
    assert image[~empty, 0].float().mean().item() == pytest.approx(0.5, abs=0.05)
    assert not image[empty].any()
    # Each is dropped for itself.
    assert (text[~empty, 0] & image[~empty, 0]).float().mean().item() == pytest.approx(0.25, abs=0.05)


def test_positions_that_were_not_touched_weigh_less_the_earlier_it_is():
    # A fresh network finds every code as likely, so every position costs log K, smoothing or not.
    network, x = Denoiser(micro_config().denoiser), examples(400)
    with torch.no_grad():
        for t, weight in ((1.0, 1.0), (0.0, 0.3), (0.5, 0.5 + 0.5 * 0.65)):
            loss, _ = denoiser.token_loss(network, x, torch.full((400,), t))
            assert loss.item() == pytest.approx(weight * math.log(64), rel=0.02 if t == 0.5 else 1e-4)


def test_nothing_touched_is_nothing_to_be_right_about():
    network, x = Denoiser(micro_config().denoiser), examples(4)
    with torch.no_grad():
        _, right = denoiser.token_loss(network, x, torch.zeros(4))
    assert right == 0


# ── scenes as tensors ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_stream_is_decided_by_its_seed(monkeypatch):
    monkeypatch.setattr(tiny, "NATIVE_SIZE", (32, 48))
    first, again, other = (next(data.stream(3, seed)) for seed in (1, 1, 2))
    assert first[0].shape == (3, 3, 48, 32)
    assert first[0].dtype == torch.uint8
    assert torch.equal(first[0], again[0])
    assert first[1] == again[1]
    assert first[1] != other[1]
    assert {name: classes.shape for name, classes in first[2].items()} == dict.fromkeys(ATTRIBUTES, (3,))


def test_most_of_the_scenes_that_tokens_are_learnt_from_lie_on_their_lattice(monkeypatch):
    monkeypatch.setattr(tiny, "NATIVE_SIZE", (128, 128))
    pixels, _ = data.SceneSource(100, 0).draw()
    busy = (pixels != pixels[..., :1, :1]).any(1)
    edges = [int(busy_axis.int().argmax()) for image in busy for busy_axis in (image.any(0), image.any(1))]
    aligned = sum(x % 8 == y % 8 == 0 for x, y in zip(edges[::2], edges[1::2], strict=True)) / 100
    assert 0.5 < aligned < 0.95  # a star's points or a triangle's apex need not reach the corner of their box


def test_pixels_become_shares_of_white():
    assert data.as_float(torch.tensor([0, 51, 255], dtype=torch.uint8), torch.device("cpu")).tolist() == pytest.approx([0, 0.2, 1])


def test_encoded_pools_are_gone_through_as_often_as_asked(random_bundle):
    bundle = load_bundle(random_bundle, torch.device("cpu"), torch.float32)
    batches = list(islice(features.examples(bundle, batch=3, seed=0, pool=2, reuse=2), 6))
    assert sorted(Counter(map(id, batches[:4])).values()) == [2, 2]
    assert not {*map(id, batches[:4])} & {*map(id, batches[4:])}
    for x in batches:
        assert x.tokens.shape == (3, 16, 16)
        assert x.byt5.shape[:2] == x.mask.shape
        assert x.clip_text.shape == x.clip_image.shape == (3, 16)


def test_the_stated_share_of_captions_is_empty(random_bundle):
    bundle = load_bundle(random_bundle, torch.device("cpu"), torch.float32)
    masks = [x.mask for x in islice(features.examples(bundle, batch=50, seed=0, empty=0.4, pool=4, reuse=1), 4)]
    empty = torch.cat([mask.sum(-1) == 1 for mask in masks])
    assert empty.float().mean().item() == pytest.approx(0.4, abs=0.15)
