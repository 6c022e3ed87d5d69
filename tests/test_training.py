"""Training: every objective falls and is what it says, and what comes out is a bundle that draws.

The networks are as small as they can be and the sprites are rectangles, so neither a GPU nor the
art is needed.
"""

from __future__ import annotations

import io
import math
import pickletools
import sys
import zipfile
from dataclasses import replace
from itertools import islice
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from model.bundle import load_bundle, state_of
from model.networks.denoiser_v3 import Denoiser
from model.networks.text_encoders import CLIP, ByteEncoder
from model.networks.vqgan_v3 import VQGAN, ResidualBlock
from model.pipeline import PipelineV3
from model.training import (
    assemble,
    byte_encoder,
    clip,
    codes,
    data,
    denoiser,
    depthwise,
    everything,
    everything_parts,
    features,
    loop,
    objective,
    prior,
    vqgan,
)
from model.training.captions import THING_ATTRIBUTES
from model.training.codes import Codes
from model.training.data import Text
from model.training.features import Pool, encode_bytes, encode_images
from model.training.guides import Guided
from model.training.judged import Neighbours, cross_entropy
from tests.conftest import micro_config, randomise, write_merges
from tests.support.short_training import run_main
from tests.support.small_training import (  # noqa: F401, fixtures
    art_of_our_own_fixture,
    corpus_file_fixture,
    scenes_fixture,
    small_config,
    use,
)
from tests.support.training_examples import examples

pytestmark = pytest.mark.training


@pytest.fixture
def small(monkeypatch, prepared):
    """The embedded bundle's shapes at the smallest widths."""
    config = small_config()
    use(monkeypatch, config)
    return config


@pytest.fixture
def vqgan_file(small, tmp_path):
    torch.manual_seed(0)
    network = vqgan.Autoencoder.fresh(small.vqgan).vqgan
    randomise(network)
    torch.save(network.state_dict(), tmp_path / "vqgan.net")
    return tmp_path / "vqgan.net"


# ── every trainer learns ──────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("trainer", "steps", "lr", "falls_to"),
    [
        (vqgan, 40, "5e-3", 0.7),
        (byte_encoder, 60, "1e-2", 0.9),
        (clip, 40, "5e-3", 0.95),
        (prior, 60, "5e-3", 0.9),
        (denoiser, 30, "5e-3", 0.9),
    ],
    ids=lambda value: value.__name__.rpartition(".")[2] if isinstance(value, ModuleType) else None,
)
def test_every_trainer_s_objective_falls(
    monkeypatch, vqgan_file, corpus_file, tmp_path, trainer, steps, lr, falls_to
):
    write_merges(tmp_path)
    more = {denoiser: ["--vqgan", str(vqgan_file)], vqgan: ["--crop", "32"]}.get(trainer, [])
    losses = run_main(
        monkeypatch,
        trainer,
        tmp_path / "x.pt",
        steps,
        *more,
        "--corpus",
        str(corpus_file),
        "--lr",
        lr,
    )
    assert len(losses) == steps
    assert np.mean(losses[-10:]) < falls_to * np.mean(losses[:5])


def train_all(monkeypatch, runs, corpus_file, steps=2):
    write_merges(runs)
    common = ["--corpus", str(corpus_file)]
    run_main(monkeypatch, vqgan, runs / "vqgan.pt", steps, "--crop", "32", *common)
    for trainer, name in ((byte_encoder, "byte_encoder"), (clip, "clip"), (prior, "prior")):
        run_main(monkeypatch, trainer, runs / f"{name}.pt", steps, *common)
    run_main(
        monkeypatch,
        denoiser,
        runs / "denoiser.pt",
        steps,
        "--vqgan",
        str(runs / "vqgan.pt"),
        *common,
    )


def test_the_printed_command_makes_a_bundle_of_a_denoiser_trained_from_nothing(
    monkeypatch, capsys, small, vqgan_file, corpus_file, tmp_path
):
    write_merges(tmp_path)
    more = ["--vqgan", str(vqgan_file), "--corpus", str(corpus_file)]
    run_main(monkeypatch, denoiser, tmp_path / "denoiser.pt", 1, *more)
    line = next(line for line in capsys.readouterr().out.splitlines() if "to use it" in line)
    command = line.partition("assemble ")[2].replace("NEW_BUNDLE", str(tmp_path / "out")).split()
    monkeypatch.setattr(sys, "argv", ["assemble", *command])
    assemble.main()
    assert load_bundle(tmp_path / "out", torch.device("cpu"), torch.float32)


def test_from_nothing_to_a_bundle_that_draws(monkeypatch, small, corpus_file, tmp_path):
    runs, out = tmp_path / "runs", tmp_path / "out"
    train_all(monkeypatch, runs, corpus_file)
    config = assemble.assemble(runs, out, torch.float32)
    assert config.name == "tiny"
    bundle = load_bundle(out, torch.device("cpu"), torch.float32)
    for network, name, prefix in (
        ("vqgan", "vqgan", "vqgan."),
        ("prior", "prior", ""),
        ("denoiser", "denoiser", "denoiser."),
    ):
        averaged = assemble.averaged(loop.load(runs / f"{name}.pt"), prefix)
        if network == "denoiser":
            averaged["byt5_mapper.weight"][:, codes.USED :] = (
                0  # what the codes leave free is not listened to
            )
        assert all(
            torch.equal(t, averaged[key])
            for key, t in getattr(bundle, network).state_dict().items()
        )
    assert PipelineV3(bundle).generate(["a red circle"], [0]).shape == (1, 256, 256, 3)


def test_networks_without_a_checkpoint_stay_as_they_were(monkeypatch, small, corpus_file, tmp_path):
    write_merges(tmp_path / "runs")
    assemble.assemble(tmp_path / "runs", tmp_path / "out", torch.float32)
    before = load_bundle(tmp_path / "out", torch.device("cpu"), torch.float32)
    run_main(
        monkeypatch,
        vqgan,
        tmp_path / "runs" / "vqgan.pt",
        2,
        "--crop",
        "32",
        "--corpus",
        str(corpus_file),
    )
    assemble.assemble(tmp_path / "runs", tmp_path / "out", torch.float32)
    after = load_bundle(tmp_path / "out", torch.device("cpu"), torch.float32)
    assert all(
        torch.equal(a, b)
        for a, b in zip(before.denoiser.parameters(), after.denoiser.parameters(), strict=True)
    )
    assert not torch.equal(
        before.vqgan.vquantizer.codebook.weight, after.vqgan.vquantizer.codebook.weight
    )


def test_a_trainer_resumes_from_its_command_line(monkeypatch, small, corpus_file, tmp_path):
    checkpoint = tmp_path / "prior.pt"
    run_main(monkeypatch, prior, checkpoint, 2, "--corpus", str(corpus_file))
    run_main(monkeypatch, prior, checkpoint, 3, "--corpus", str(corpus_file), "--resume")
    assert loop.load(checkpoint)["step"] == 5


def test_every_trainer_can_begin_with_a_bundle(monkeypatch, small, corpus_file, tmp_path):
    write_merges(tmp_path / "runs")
    out = tmp_path / "out"
    assemble.assemble(tmp_path / "runs", out, torch.float32)
    kept = load_bundle(out, torch.device("cpu"), torch.float32)
    common = ["--corpus", str(corpus_file), "--lr", "0"]
    for network, trainer, prefix, own in (
        ("vqgan", vqgan, "vqgan.", ["--from-bundle", str(out), "--decoder-only", "--crop", "32"]),
        ("byt5", byte_encoder, "t5.", ["--from-bundle", str(out)]),
        ("clip", clip, "model.", ["--from-bundle", str(out)]),
        ("prior", prior, "", ["--from-bundle", str(out)]),
        ("denoiser", denoiser, "denoiser.", [str(out), "--from-bundle"]),
    ):
        run_main(monkeypatch, trainer, tmp_path / network / "x.pt", 1, *own, *common)
        averaged = assemble.averaged(loop.load(tmp_path / network / "x.pt"), prefix)
        for name, tensor in state_of(getattr(kept, network)).items():
            if tensor.is_floating_point() and "running" not in name:
                assert torch.equal(averaged[name], tensor), f"{network}: {name}"


def test_a_checkpoint_holds_tensors_and_plain_values_and_no_name_of_ours(
    monkeypatch, vqgan_file, corpus_file, tmp_path
):
    """So that it loads after files are renamed."""
    path = tmp_path / "denoiser.pt"
    run_main(
        monkeypatch, denoiser, path, 2, "--vqgan", str(vqgan_file), "--corpus", str(corpus_file)
    )
    with zipfile.ZipFile(path) as archive:
        (pickled,) = (name for name in archive.namelist() if name.endswith("data.pkl"))
        strings = {
            str(argument)
            for _, argument, _ in pickletools.genops(io.BytesIO(archive.read(pickled)))
            if argument is not None
        }
    assert not [
        text for text in strings if text.startswith(("model.training", "model.denoiser", "tests"))
    ]
    assert loop.load(path)["step"] == 2


# ── VQGAN ─────────────────────────────────────────────────────────────────────────────────────────


def test_the_loss_of_a_picture_to_itself_is_nothing_and_edges_count_beside_pixels():
    image = torch.rand(2, 3, 8, 8)
    assert vqgan.reconstruction_loss(image, image) == 0
    assert vqgan.reconstruction_loss(image + 0.1, image).item() == pytest.approx(
        0.01 + 0.05 * 0.1, rel=1e-3
    )
    ramp = 0.1 * torch.arange(8.0).expand(2, 3, 8, 8)
    expected = ramp.square().mean() + 0.005 + 0.05 * ramp.mean()
    assert vqgan.reconstruction_loss(image + ramp, image).item() == pytest.approx(
        expected.item(), rel=1e-3
    )


def test_a_vqgan_continues_from_a_checkpoint_and_from_weights_alone(tmp_path):
    """A checkpoint may be lost; the weights of a bundle remain, and stencils are made with them."""
    config = micro_config().vqgan
    network = vqgan.Autoencoder.fresh(config)
    torch.save({"ema": network.state_dict()}, tmp_path / "vqgan.pt")
    save_file(state_of(network.vqgan), tmp_path / "vqgan.safetensors")
    for name in ("vqgan.pt", "vqgan.safetensors"):
        found = vqgan.trained_vqgan(tmp_path / name, config)
        for key, value in network.vqgan.state_dict().items():
            torch.testing.assert_close(found.vqgan.state_dict()[key], value)
        torch.testing.assert_close(found.codes.sums, network.vqgan.vquantizer.codebook.weight)


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
    torch.testing.assert_close(
        codes, torch.tensor([[2.0, 0.0], [0.0, 0.0], [0.0, 5.0]]), atol=1e-3, rtol=0
    )
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


def test_only_the_decoder_learns_where_codes_are_frozen(small):
    trained = vqgan.Autoencoder.fresh(small.vqgan)
    trained.start_from(torch.randn(100, 4))
    trained.freeze_codes()
    trained.train()
    image = torch.rand(2, 3, 32, 32)
    before = trained.vqgan.encode(image), trained.vqgan.down_blocks[-1][1].running_mean.clone()
    loss, figures = vqgan.training_loss(trained, image)
    loss.backward()
    assert figures.keys() == {"psnr"}
    assert trained.vqgan.in_block[1].weight.grad is None
    assert trained.vqgan.out_block[0].weight.grad.abs().max() > 0
    assert torch.equal(trained.vqgan.encode(image), before[0])
    assert torch.equal(trained.vqgan.down_blocks[-1][1].running_mean, before[1])


def test_the_nearest_code_is_found_in_fp32_under_autocast(small):
    network = vqgan.Autoencoder.fresh(small.vqgan).vqgan.eval()
    network.vquantizer.codebook.weight.data.normal_()
    image = torch.rand(4, 3, 32, 32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        latents = network.encode_latents(image)
        tokens = encode_images(network, image)
    assert torch.equal(tokens, network.vquantizer.nearest(latents.float()))


def test_a_picture_s_own_psnr():
    image = torch.full((2, 3, 4, 4), 0.5)
    assert vqgan.psnr(image + 0.1, image).item() == pytest.approx(20, rel=1e-3)


# ── the language of codes ─────────────────────────────────────────────────────────────────────────


def test_kinds_vectors_are_those_that_the_weights_were_trained_with(scenes):
    table = Codes(scenes.corpus).kinds
    assert table[0].abs().max() == 0
    assert table[1, :3].tolist() == pytest.approx([0.14428, 0.01810, 0.92268], abs=1e-4)


def test_a_byte_says_what_its_own_thing_is_like_and_what_the_whole_says(scenes):
    known, index = Codes(scenes.corpus), torch.arange(len(scenes.corpus))
    for which in (0, 1):
        own_which = torch.full_like(index, which)
        place = torch.arange(100).expand(len(index), -1)
        vectors = known.bytes(index, own_which, place)
        classes = scenes.own(index, own_which, place)
        for name in THING_ATTRIBUTES:
            assert torch.equal(
                byte_encoder.read(vectors, known, name).flatten(), classes[name].clamp_min(0)
            )
        stated = scenes.stated(index, own_which)
        for name in ("background", "relation", "view"):
            assert torch.equal(byte_encoder.read(vectors, known, name)[:, 0], stated[name])
        assert vectors[..., codes.USED :].abs().max() == 0


def test_a_picture_s_code_is_most_like_its_captions(scenes):
    known, index = Codes(scenes.corpus), scenes.of_aspect[0]
    image = known.images(index)
    assert image.isfinite().all()
    assert clip.found(image, known.text(index, torch.zeros_like(index))) > 0.8
    assert image.std().item() == pytest.approx(
        0.9, abs=0.2
    )  # the prior's diffusion begins with about unit variance


def test_what_is_free_is_not_listened_to(small):
    network = Denoiser(small.denoiser)
    codes.quiet(network)
    vectors = torch.randn(1, 5, codes.WIDTH)
    other = vectors.clone()
    other[..., codes.USED :] = 100
    assert torch.equal(network.byt5_mapper(vectors), network.byt5_mapper(other))


# ── captions and encoders ─────────────────────────────────────────────────────────────────────────


def test_text_as_bytes_is_what_the_encoder_reads_of_it(small):
    encoder = ByteEncoder(small.byt5).eval()
    randomise(encoder)
    prompts = ["a red circle on the left", "été", ""]
    rows = [prompt.encode() for prompt in prompts]
    padded = torch.zeros(3, 40, dtype=torch.uint8)
    for row, own in zip(padded, rows, strict=True):
        row[: len(own)] = torch.tensor(list(own), dtype=torch.uint8)
    text = Text(padded, torch.tensor([len(own) for own in rows]))
    with torch.no_grad():
        out, ours = encoder(prompts), encode_bytes(encoder, text)
    for i, own in enumerate(rows):
        assert torch.equal(text.mask[i].int().sum(), torch.tensor(len(own) + 1))
        torch.testing.assert_close(
            ours[i, : len(own) + 1], out.embeddings[i, : len(own) + 1], atol=1e-4, rtol=1e-4
        )


def test_pieces_are_cut_out_of_captions_around_a_thing(scenes):
    known = Codes(scenes.corpus)
    text, target = next(byte_encoder.pieces(scenes, known, 64, held_out=0))
    everything_said = {
        scenes.corpus.caption(i, which) for i in range(len(scenes.corpus)) for which in (0, 1)
    }
    spoken = (target[..., : codes.KIND_WIDTH] != 0).any(-1)
    for row, length, about in zip(text.bytes, text.length.tolist(), spoken, strict=True):
        piece = bytes(row[:length].tolist()).decode(errors="ignore")
        assert any(piece in caption for caption in everything_said)
        assert not about[length + 1 :].any()
    assert spoken.any(-1).float().mean() > 0.8


def test_batches_of_captions_are_of_about_one_length(scenes):
    drawn = byte_encoder.captions(
        scenes, Codes(scenes.corpus), 16, np.random.default_rng(0), held_out=20
    )
    for text, target in islice(drawn, 8):
        assert text.length.max() - text.length.min() <= 2 * 16
        assert target.shape == (16, int(text.length.max()) + 1, codes.WIDTH)


def test_an_encoder_begins_with_heads_that_look_at_their_neighbours(small):
    encoder = byte_encoder.fresh(replace(small.byt5, num_heads=3))
    bias = encoder.t5.encoder.block[0].layer[0].SelfAttention.compute_bias(9, 9)[0]
    assert (bias[0].argmax(-1)[1:] == torch.arange(8)).all()
    assert (bias[1].argmax(-1)[:-1] == torch.arange(1, 9)).all()


def test_captions_tokens_are_the_tokenizer_s(small, tmp_path, scenes):
    towers = CLIP(small.clip, write_merges(tmp_path).parent)
    tokens = clip.tokenize(towers, scenes)
    for i in range(40):
        for which in (0, 1):
            expected = towers.tokenize([scenes.corpus.caption(i, which)])[0][0]
            assert torch.equal(tokens[i, which].long(), expected), scenes.corpus.caption(i, which)


def test_a_text_without_its_padding_is_encoded_alike(small, tmp_path):
    towers = CLIP(small.clip, write_merges(tmp_path).parent).eval()
    randomise(towers)
    tokens = towers.tokenize(["a red circle", "hi"])[0]
    with torch.no_grad():
        short = clip.encode_tokens(towers, tokens, int(tokens.argmax(-1).max()) + 1)
        torch.testing.assert_close(short, towers.model.encode_text(tokens), atol=1e-4, rtol=1e-4)


def test_learnt_merges_fill_the_vocabulary_and_shorten_captions(tmp_path, prepared, scenes):
    from open_clip.tokenizer import SimpleTokenizer

    path = tmp_path / "merges.txt.gz"
    clip.learn_merges(path, 600, scenes.captions(150))
    tokenizer = SimpleTokenizer(bpe_path=str(path))
    assert tokenizer.vocab_size == 600
    texts = [text for i in range(150, 200) if (text := scenes.corpus.caption(i)).isascii()]
    assert sum(len(tokenizer.encode(text)) for text in texts) < 0.6 * sum(map(len, texts))
    for text in texts:
        tokens = tokenizer.encode(text)
        assert max(tokens) < 600 - 2
        assert tokenizer.decode(tokens).replace(" ", "") == text.lower().replace(" ", "")


# ── pools ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def pool(small, scenes):
    network = VQGAN(small.vqgan).eval().requires_grad_(False)
    randomise(network)
    return Pool(small, scenes, 0, 48), network


def test_a_pool_holds_the_tokens_of_its_pictures(pool, scenes):
    own, network = pool
    own.grow(network, 20)
    assert own.encoded == 20
    index = own.index[:20]
    assert torch.equal(index, scenes.of_aspect[0][:20])
    assert torch.equal(own.tokens[:20].long(), network.encode(scenes.images(index)))
    x = own.draw(64, 5)
    assert x.tokens.shape == (64, 16, 16)
    assert x.byt5.shape == (64, 5, codes.WIDTH)
    assert x.byt5[..., codes.USED :].abs().max() == 0
    assert {*map(tuple, x.tokens.flatten(1).tolist())} <= {
        *map(tuple, own.tokens[:20].flatten(1).tolist())
    }


def test_a_pool_knows_the_things_without_their_background(small, scenes):
    network = VQGAN(small.vqgan).eval().requires_grad_(False)
    randomise(network)
    own = Pool(small, scenes, 0, 48, sprites=True)
    own.grow(network, 20)
    sprites = own.draw(16, 5).sprites
    assert sprites.shape == (16, 4, 64, 64)
    rgb, alpha = sprites[:, :3], sprites[:, 3:]
    assert 0 < alpha.mean() < 1
    assert (rgb <= alpha + 0.02).all()  # premultiplied
    assert Pool(small, scenes, 0, 48).draw(4, 5).sprites is None


def test_a_pool_goes_on_where_it_stood(pool, small, scenes):
    own, network = pool
    for _ in range(7):
        own.grow(network, 20)
    again = Pool(small, scenes, 0, 48)
    again.restore(network, own.encoded, 20)
    assert again.encoded == own.encoded > own.capacity
    assert torch.equal(again.tokens, own.tokens)
    assert torch.equal(again.index, own.index)


def test_some_captions_are_empty_and_some_of_those_have_the_image_in_their_place(pool):
    own, network = pool
    own.grow(network, 4)
    x = own.draw(4000, 3)
    assert x.empty.float().mean().item() == pytest.approx(0.12, abs=0.02)
    assert x.shown.float().mean().item() == pytest.approx(0.05, abs=0.015)
    assert not (x.shown & ~x.empty).any()


def test_the_commonest_code_is_one_that_no_other_is_more_frequent_than():
    tokens = torch.randint(6, (50, 8, 8))
    counts = F.one_hot(tokens.flatten(1), 6).sum(1)
    assert torch.equal(counts.gather(1, features.commonest(tokens)[:, None])[:, 0], counts.amax(1))


def test_pictures_of_half_the_size_show_the_same(scenes):
    index = scenes.of_aspect[0][:8]
    whole, half = scenes.images(index), scenes.small_images(index)
    assert half.shape == (8, 3, 128, 128)
    assert (F.avg_pool2d(whole, 2) - half).abs().mean() < 0.03


def test_pixels_become_shares_of_white():
    assert data.as_float(
        torch.tensor([0, 51, 255], dtype=torch.uint8), torch.device("cpu")
    ).tolist() == pytest.approx([0, 0.2, 1])


# ── everything at once ────────────────────────────────────────────────────────────────────────────


def test_what_a_run_leaves_becomes_a_bundle(monkeypatch, small, corpus_file, tmp_path):
    runs, out = tmp_path / "runs", tmp_path / "out"
    train_all(monkeypatch, runs, corpus_file)
    (runs / "merges.txt.gz").replace(runs / str(small.clip.merges))
    out.mkdir()
    monkeypatch.setattr(everything_parts, "_PART", 2**14)
    everything_parts.write_parts(out, everything_parts.collected(runs))
    assert len(list(out.iterdir())) > 2
    everything_parts.join(out, tmp_path / "joined", torch.float32)
    expected = assemble.assemble(runs, tmp_path / "assembled", torch.float16)
    joined, assembled = (
        load_bundle(tmp_path / name, torch.device("cpu"), torch.float32)
        for name in ("joined", "assembled")
    )
    assert expected.name == joined.config.name
    for (name, one), (_, other) in zip(joined.networks(), assembled.networks(), strict=True):
        for key, tensor in state_of(one).items():
            assert torch.equal(tensor, state_of(other)[key]), f"{name}: {key}"


def test_joining_nothing_says_so(small, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"state\.safetensors"):
        everything_parts.join(tmp_path, tmp_path / "out")


def test_an_unknown_phase_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["everything", "out", "--phases", "vqgan,cooking"])
    with pytest.raises(SystemExit):
        everything.main()
    assert "no such phase: cooking" in capsys.readouterr().err


# ── depthwise convolutions ────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("way", [name for name in depthwise.WAYS if name != "library"])
@pytest.mark.parametrize(
    ("shape", "padding"), [((3, 8, 8, 40), 1), ((2, 10, 12, 24), 0), ((5, 4, 4, 33), 1)]
)
def test_every_way_is_the_library_s(way, shape, padding):
    if way == "triton":
        pytest.importorskip("triton")
    x, weight, bias = torch.randn(shape), torch.randn(shape[-1], 1, 3, 3), torch.randn(shape[-1])
    results = []
    for own in (depthwise.by_library, depthwise.WAYS[way]):
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
        y = own(*leaves, padding)
        gradient = torch.linspace(-1, 1, y.numel()).view(y.shape)
        results.append([y, *torch.autograd.grad(y, leaves, gradient)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_redirected_blocks_compute_the_same_and_are_put_back(monkeypatch):
    network = Denoiser(micro_config().denoiser)
    randomise(network)
    tokens, t, byt5 = torch.randint(64, (2, 8, 8)), torch.rand(2), torch.randn(2, 3, 16)
    block = ResidualBlock(8)
    block.gammas.data.fill_(0.5)
    x = torch.randn(2, 6, 6, 8)
    with torch.no_grad():
        expected, plain = network(tokens, t, byt5), block(x)
        for part in network.modules():
            if isinstance(part, depthwise.ConvBlock):
                depthwise._redirect(part, depthwise.by_planes)
        depthwise._redirect(block, depthwise.by_planes)
        torch.testing.assert_close(network(tokens, t, byt5), expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(block(x), plain, atol=1e-5, rtol=1e-5)


# ── prior and denoiser ────────────────────────────────────────────────────────────────────────────


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
    noisy, noised = objective.corrupt(tokens, t, codes=10)
    assert noised.float().mean((1, 2)).tolist() == pytest.approx([0, 0.25, 0.75, 1], abs=0.025)
    assert torch.equal(noisy[~noised], tokens[~noised])
    shares = noisy[3].flatten().bincount(minlength=10) / 1e4
    assert shares.tolist() == pytest.approx([0.1] * 10, abs=0.02)


def test_chosen_positions_are_different_ones_and_all_are_chosen_in_time():
    tokens = torch.randint(8, (500, 4, 4))
    chosen = objective.choose_positions(tokens, 0.5)
    assert chosen.shape == (500, 8)
    assert all(len(set(row)) == 8 for row in chosen.tolist())
    assert (chosen.flatten().bincount(minlength=16) / 500).sub(
        0.5
    ).abs().max() < 0.15  # seven standard deviations


def test_focus_prefers_a_thing_and_its_surroundings_on_either_side_of_the_outline():
    tokens = torch.zeros(2000, 8, 8, dtype=torch.int64)
    tokens[:, 2, 2] = 5
    share = (
        objective.choose_positions(tokens, 0.1, focus=4.0)
        .flatten()
        .bincount(minlength=64)
        .view(8, 8)
        / 2000
    )
    near = share[1:4, 1:4]
    assert near.min() > 2 * share[5:, 5:].max()
    assert near.max() < 1.4 * near.min()  # the thing itself no more than what surrounds it


def test_text_and_image_are_masked_as_groups_half_of_the_time_and_bytes_never():
    network, x = Denoiser(micro_config().denoiser), examples(3000)
    with torch.no_grad():
        mask = objective.dropped_condition(network, x).mask
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
    assert (text[~empty, 0] & image[~empty, 0]).float().mean().item() == pytest.approx(
        0.25, abs=0.05
    )


def test_positions_that_were_not_touched_weigh_less_the_earlier_it_is():
    # A fresh network finds every code as likely, so every position costs log K, smoothing or not.
    network, x = Denoiser(micro_config().denoiser), examples(400)
    with torch.no_grad():
        for t, weight in ((1.0, 1.0), (0.0, 0.3), (0.5, 0.5 + 0.5 * 0.65)):
            loss, _ = denoiser.token_loss(network, x, torch.full((400,), t))
            assert loss.item() == pytest.approx(
                weight * math.log(64), rel=0.02 if t == 0.5 else 1e-4
            )


def test_nothing_touched_is_nothing_to_be_right_about():
    network, x = Denoiser(micro_config().denoiser), examples(4)
    with torch.no_grad():
        _, right = denoiser.token_loss(network, x, torch.zeros(4))
    assert right == 0


def test_the_picture_of_an_empty_caption_is_told_where_it_is_all_that_is_told():
    network, x = Denoiser(micro_config().denoiser), examples(500)
    with torch.no_grad():
        mask = objective.dropped_condition(network, replace(x, shown=x.empty)).mask
    assert mask[x.empty, 10:].all()


def test_errors_and_gradients_of_the_judged_positions_are_those_of_the_logits():
    features_, projection = torch.randn(600, 20), torch.randn(300, 20)
    target, weights = torch.randint(300, (600,)), torch.rand(600)
    results = []
    for fused in (False, True):
        f, p = features_.clone().requires_grad_(), projection.clone().requires_grad_()
        if fused:
            value, right = cross_entropy(f, p, target, weights, 0.1)
            assert torch.equal(right, (features_ @ projection.T).argmax(-1) == target)
        else:
            value = (
                F.cross_entropy(f @ p.T, target, reduction="none", label_smoothing=0.1) * weights
            ).sum()
        results.append([value, *torch.autograd.grad(2 * value, [f, p])])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_a_label_that_its_neighbours_share_has_the_errors_and_gradients_of_soft_labels():
    features_, projection = torch.randn(600, 20), torch.randn(300, 20)
    target, weights = torch.randint(300, (600,)), torch.rand(600)
    near = Neighbours.of(torch.randn(300, 8), 0.2, count=5)
    soft = torch.full((600, 300), 0.05 / 300)
    soft.scatter_add_(1, target[:, None], torch.full((600, 1), 0.75))
    soft.scatter_add_(1, near.codes[target], 0.2 * near.weights[target])
    torch.testing.assert_close(soft.sum(-1), torch.ones(600))
    results = []
    for fused in (False, True):
        f, p = features_.clone().requires_grad_(), projection.clone().requires_grad_()
        if fused:
            value, _ = cross_entropy(f, p, target, weights, 0.05, near)
        else:
            value = (F.cross_entropy(f @ p.T, soft, reduction="none") * weights).sum()
        results.append([value, *torch.autograd.grad(2 * value, [f, p])])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_neighbours_are_the_nearest_codes_the_nearer_the_heavier():
    codebook = torch.tensor([[0.0], [1.0], [3.0], [10.0]])
    near = Neighbours.of(codebook, 0.3, count=2)
    assert near.codes.tolist() == [[1, 2], [0, 2], [1, 0], [2, 1]]
    assert (near.weights[:, 0] > near.weights[:, 1]).all()
    torch.testing.assert_close(near.weights.sum(-1), torch.ones(4))


def test_in_products_the_network_is_bf16_and_its_own_weights_get_the_gradients(pool):
    own, network = pool
    own.grow(network, 8)
    guided = Guided(Denoiser(small_config().denoiser), network.vquantizer.codebook.weight)
    randomise(guided.denoiser)
    gradients = []
    for half in (False, True):
        torch.manual_seed(0)
        guided.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            value, _ = denoiser.scene_loss(guided, own, 8, 6)()
        value.backward()
        gradients.append(
            {name: p.grad for name, p in guided.named_parameters() if p.grad is not None}
        )
    assert {p.dtype for p in guided.parameters()} == {torch.float32}
    assert gradients[0].keys() == gradients[1].keys()
    whole, halves = (
        torch.cat([g.flatten() for g in own_gradients.values()]) for own_gradients in gradients
    )
    assert F.cosine_similarity(whole, halves, dim=0) > 0.98


def test_a_condition_by_one_map_is_that_by_two():
    network = Denoiser(micro_config().denoiser)
    randomise(network)
    byt5 = torch.randn(2, 5, 16)
    with torch.no_grad():
        expected = network.condition(byt5).kv
        with objective.folded(network):
            torch.testing.assert_close(network.condition(byt5).kv, expected, atol=1e-4, rtol=1e-4)
    assert network.kv_weight is None
