"""Training on somebody's own pictures: it is the same however often it is interrupted, and ends in
a bundle that draws what they show."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from typer.testing import CliRunner

from model.bundle import load_bundle
from model.bundle_files import BundleError
from model.config import BundleConfig, find_bundle
from model.networks.vqgan_v3 import VQGAN
from model.pipeline import Pipeline
from model.training import art, assemble, denoiser, loop, objective
from model.training.captioned import DataError
from model.training.features import Examples, ExampleStream
from server.cli import app
from tests.conftest import randomise
from tests.support.checkpoints import identical, without_clock
from tests.support.picture_files import (
    WHITE,
    pictures,
    plain,
    write_mixed,
    write_pictures,
    write_shards,
)
from tests.support.short_training import Crash, run
from tests.support.small_training import (  # noqa: F401, fixtures
    art_of_our_own_fixture,
    corpus_file_fixture,
    small_config,
    use,
)

pytestmark = pytest.mark.training

ROOT = Path(__file__).parents[1]


# ── a position within encoded pools ───────────────────────────────────────────────────────────────


def same(a: Examples, b: Examples) -> bool:
    return all(
        torch.equal(getattr(a, name), getattr(b, name))
        for name in ("tokens", "byt5", "mask", "clip_text", "clip_image")
    )


def test_a_stream_of_examples_goes_on_in_the_middle_of_a_pool(tmp_path, random_bundle):
    bundle = load_bundle(random_bundle, torch.device("cpu"), torch.float32)
    write_pictures(tmp_path, 10)

    def stream() -> ExampleStream:
        return ExampleStream(bundle, pictures(tmp_path, 8, size=(32, 32)), 3, pool=4, reuse=2)

    whole, states, batches = stream(), [], []
    for _ in range(20):
        states.append(whole.state_dict())
        batches.append(next(whole))
    for start in (0, 3, 8, 13, 16):
        resumed = stream()
        resumed.load_state_dict(states[start])
        assert all(same(a, b) for a, b in zip(batches[start:], resumed, strict=False))
    assert not any(same(a, b) for a in batches[:8] for b in batches[8:16])


def test_a_position_in_other_data_is_not_taken_over(tmp_path, random_bundle):
    bundle = load_bundle(random_bundle, torch.device("cpu"), torch.float32)
    one, other = write_pictures(tmp_path / "one", 9), write_pictures(tmp_path / "other", 11)
    streams = [
        ExampleStream(bundle, pictures(where, 4, size=(32, 32)), 0, pool=2, reuse=1)
        for where in (one, other, other)
    ]
    for _ in range(3):
        next(streams[0])
    with pytest.warns(UserWarning, match="begun with its first image"):
        streams[1].load_state_dict(streams[0].state_dict())
    assert same(next(streams[1]), next(streams[2]))


# ── the training ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("form", "crashes"), [("folder", (3, 27)), ("shards", (5,)), ("scenes", (5,))]
)
def test_an_interrupted_run_of_n_steps_ends_as_one_that_was_not(
    monkeypatch, tmp_path, random_bundle, corpus_file, form, crashes
):
    """Weights, average with its counter, optimizer, random state, the data's position: bit for bit,
    in the first pool and in a later."""
    write_mixed(tmp_path / "data")
    write_pictures(tmp_path / "data", 12)
    if form == "scenes":
        use(monkeypatch, small_config())
        vqgan = VQGAN(small_config().vqgan)
        randomise(vqgan)
        torch.save(vqgan.state_dict(), tmp_path / "vqgan.net")
        where = ["--vqgan", tmp_path / "vqgan.net", "--corpus", corpus_file]
    elif form == "folder":
        where = [random_bundle, "--data", tmp_path / "data"]
    else:
        where = [random_bundle, "--data", write_shards(tmp_path / "shards", [tmp_path / "data"])]
    common = [*where, "--steps", crashes[-1] + 2, "--batch", 2]
    run(monkeypatch, denoiser, tmp_path / "whole.pt", *common)
    torch.manual_seed(99)
    resume: list[str] = []
    for crash in crashes:
        with pytest.raises(Crash):
            run(monkeypatch, denoiser, tmp_path / "parts.pt", *common, *resume, crash_at=crash)
        assert loop.load(tmp_path / "parts.pt")["step"] == crash
        resume = ["--resume"]
    run(monkeypatch, denoiser, tmp_path / "parts.pt", *common, *resume)
    whole, parts = (
        without_clock(loop.load(tmp_path / f"{name}.pt")) for name in ("whole", "parts")
    )
    assert parts["step"] == crashes[-1] + 2
    for name in whole:
        assert identical(whole[name], parts[name]), name


def test_the_loss_falls_on_a_few_pictures(monkeypatch, tmp_path, random_bundle):
    """The published training script never calls its optimizer's step: it runs, it logs, and learns
    nothing."""
    write_pictures(tmp_path / "data", 8)
    options = ["--steps", 60, "--batch", 8, "--lr", 5e-3]
    losses = run(
        monkeypatch,
        denoiser,
        tmp_path / "x.pt",
        random_bundle,
        "--data",
        tmp_path / "data",
        *options,
    )
    assert len(losses) == 60
    assert np.mean(losses[-10:]) < 0.7 * np.mean(losses[:5])


def trained(checkpoint: Path, which: str = "model") -> dict[str, Tensor]:
    """The denoiser's weights, without the guides'."""
    contents = loop.load(checkpoint)[which]
    return {
        name.removeprefix("denoiser."): tensor
        for name, tensor in contents.items()
        if name.startswith("denoiser.")
    }


def test_a_folder_finetunes_the_bundle_s_denoiser_and_scratch_does_not(
    monkeypatch, tmp_path, random_bundle
):
    write_pictures(tmp_path / "data", 4)
    before = load_bundle(random_bundle, torch.device("cpu"), torch.float32).denoiser.state_dict()
    common = [random_bundle, "--data", tmp_path / "data", "--steps", 1, "--lr", 0]
    run(monkeypatch, denoiser, tmp_path / "finetuned.pt", *common)
    run(monkeypatch, denoiser, tmp_path / "scratch.pt", *common, "--from-scratch")
    finetuned, scratch = trained(tmp_path / "finetuned.pt"), trained(tmp_path / "scratch.pt")
    assert identical(dict(before), dict(finetuned))
    assert not torch.equal(scratch["byt5_mapper.weight"], before["byt5_mapper.weight"])


def test_the_command_says_in_one_line_that_there_is_nothing_to_train_on(
    monkeypatch, tmp_path, random_bundle
):
    (tmp_path / "x.png").write_bytes(b"no")
    (tmp_path / "x.txt").write_text("a caption")
    with pytest.raises(DataError, match=r"nothing in it can be used \(1 not an image\)"):
        run(
            monkeypatch,
            denoiser,
            tmp_path / "x.pt",
            random_bundle,
            "--data",
            tmp_path,
            "--steps",
            1,
        )


def test_no_art_is_needed_for_pictures(monkeypatch, tmp_path, random_bundle, corpus_file):
    def absent() -> None:
        raise FileNotFoundError("no art")

    monkeypatch.setattr(art, "atlas", absent)
    with pytest.raises(FileNotFoundError, match="no art"):
        run(
            monkeypatch,
            denoiser,
            tmp_path / "x.pt",
            random_bundle,
            "--corpus",
            corpus_file,
            "--steps",
            1,
        )
    write_pictures(tmp_path / "data", 4)
    run(
        monkeypatch,
        denoiser,
        tmp_path / "x.pt",
        random_bundle,
        "--data",
        tmp_path / "data",
        "--steps",
        1,
    )
    assemble.with_denoiser(random_bundle, tmp_path / "x.pt", tmp_path / "out", torch.float32)
    assert loop.load(tmp_path / "x.pt")["step"] == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [([], "a bundle or --vqgan is needed"), (["--data", "somewhere"], "--data needs a bundle")],
)
def test_the_command_says_what_it_lacks(monkeypatch, tmp_path, arguments, said):
    with pytest.raises(DataError, match=said):
        run(monkeypatch, denoiser, tmp_path / "x.pt", *arguments, "--steps", 1)


@pytest.mark.parametrize(("share", "kept"), [(0.0, 1.0), (1.0, 0.0), (0.9, 0.1)])
def test_the_share_of_dropped_clip_embeddings_can_be_chosen(random_bundle, share, kept):
    bundle = load_bundle(random_bundle, torch.device("cpu"), torch.float32)
    x = Examples.of(bundle, torch.rand(1, 3, 32, 32), ["a caption"])
    names = ("tokens", "byt5", "mask", "clip_text", "clip_image", "empty")
    rows = Examples(
        *(getattr(x, name).expand(2000, *[-1] * (getattr(x, name).dim() - 1)) for name in names)
    )
    with torch.no_grad():
        mask = objective.dropped_condition(bundle.denoiser, rows, share).mask
    assert mask is not None
    assert mask[
        :, -2 * bundle.config.denoiser.clip_seq_len :
    ].float().mean().item() == pytest.approx(kept, abs=0.02)


# ── several processes ─────────────────────────────────────────────────────────────────────────────

DISTRIBUTED = """
import sys
import torch
from model.training import denoiser, features, loop

seen, of, fit = [], features.Examples.of.__func__, loop.fit

def watched(cls, bundle, images, captions, *rest):
    seen.extend(captions)
    return of(cls, bundle, images, captions, *rest)

def kept(module, *rest, **data):
    average = fit(module, *rest, **data)
    states = {"model": module.state_dict(), "ema": average.state_dict(), "seen": seen}
    torch.save(states, f"{sys.argv[-1]}.{loop.rank()}")
    return average

features.Examples.of = classmethod(watched)
loop.fit = kept
denoiser.main()
"""


def test_two_processes_see_different_pictures_and_stay_one_network(tmp_path, random_bundle):
    write_pictures(tmp_path / "data", 12)
    plain().save(tmp_path / "data" / "silent.png")
    script = tmp_path / "train.py"
    script.write_text(DISTRIBUTED)
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--standalone",
        script,
    ]
    options = [
        "--threads",
        "1",
        "--device",
        "cpu",
        "--dtype",
        "float32",
        "--batch",
        "2",
        "--steps",
        "4",
        "--accumulate",
        "2",
        "--warmup",
        "1",
    ]
    command = [
        *torchrun,
        random_bundle,
        "--data",
        tmp_path / "data",
        *options,
        "--checkpoint",
        tmp_path / "x.pt",
    ]
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=300, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("images left out: 1 no caption") == 1
    first, second = (torch.load(tmp_path / f"x.pt.{rank}", weights_only=True) for rank in (0, 1))
    assert identical(first["model"], second["model"])
    assert identical(first["ema"], second["ema"])
    before = load_bundle(random_bundle, torch.device("cpu"), torch.float32).denoiser.state_dict()
    assert not torch.equal(
        first["model"]["denoiser.byt5_mapper.weight"], before["byt5_mapper.weight"]
    )
    captions = [{*x["seen"]} - {""} for x in (first, second)]
    assert captions[0]
    assert captions[1]
    assert not captions[0] & captions[1]


# ── into a bundle ─────────────────────────────────────────────────────────────────────────────────


def tensors(bundle: Path) -> dict[str, dict[str, Tensor]]:
    loaded = load_bundle(bundle, torch.device("cpu"), torch.float32)
    return {name: dict(module.state_dict()) for name, module in loaded.networks()}


def test_a_trained_denoiser_goes_into_a_bundle_and_all_else_stays(
    monkeypatch, capsys, tmp_path, random_bundle
):
    write_pictures(tmp_path / "data", 4)
    checkpoint, out = tmp_path / "x.pt", tmp_path / "mine"
    run(monkeypatch, denoiser, checkpoint, random_bundle, "--data", tmp_path / "data", "--steps", 2)
    told = capsys.readouterr().out.strip().splitlines()[-1]
    command = (
        told.partition("python -m model.training.assemble ")[2]
        .replace("NEW_BUNDLE", str(out))
        .split()
    )
    monkeypatch.setattr(sys, "argv", ["assemble", *command, "--dtype", "float32"])
    assemble.main()
    before, after = tensors(random_bundle), tensors(out)
    assert identical(after["denoiser"], trained(checkpoint, "ema"))
    assert not identical(after["denoiser"], before["denoiser"])
    for name in ("vqgan", "prior", "byt5", "clip"):
        assert identical(after[name], before[name]), name
    assert BundleConfig.read(out).name == "mine"
    width, height = BundleConfig.read(out).native_size
    assert Pipeline.load(out).generate(["anything"], [0]).shape == (1, height, width, 3)


def test_a_trainer_s_checkpoint_can_be_imported(monkeypatch, tmp_path, random_bundle):
    """The way to a bundle that the documentation shows for published weights."""
    checkpoint, out = tmp_path / "x.pt", tmp_path / "mine"
    data = write_pictures(tmp_path / "data", 4)
    run(monkeypatch, denoiser, checkpoint, random_bundle, "--data", data, "--steps", 1)
    command = ["weights", "import", random_bundle, out, "--denoiser", checkpoint]
    result = CliRunner().invoke(app, list(map(str, command)))
    assert result.exit_code == 0, result.output
    expected = {name: t.half().float() for name, t in trained(checkpoint, "ema").items()}
    assert identical(tensors(out)["denoiser"], expected)


def test_a_name_that_a_bundle_cannot_have_is_refused_in_words(tmp_path, random_bundle):
    weights = load_bundle(random_bundle, torch.device("cpu"), torch.float32).denoiser.state_dict()
    torch.save({"ema": {f"denoiser.{name}": t for name, t in weights.items()}}, tmp_path / "x.pt")
    with pytest.raises(BundleError, match="cannot have the name 'my bundle': up to 64 letters"):
        assemble.with_denoiser(
            random_bundle, tmp_path / "x.pt", tmp_path / "my bundle", torch.float32
        )


def test_without_a_vocabulary_the_folder_of_the_checkpoints_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nosuch/clip_merges\.txt\.gz"):
        assemble.assemble(tmp_path / "nosuch", tmp_path / "out", torch.float16)


def test_a_denoiser_of_another_shape_is_refused(tmp_path, random_bundle):
    torch.save({"ema": {"denoiser.byt5_mapper.weight": torch.zeros(3, 3)}}, tmp_path / "x.pt")
    with pytest.raises(BundleError, match=r"x\.pt"):
        assemble.with_denoiser(random_bundle, tmp_path / "x.pt", tmp_path / "out", torch.float32)
    assert not (tmp_path / "out").exists()


# ── the embedded weights learn something new ──────────────────────────────────────────────────────

MAGENTA, LIME = (230, 0, 230), (120, 240, 0)
PROMPT = "a zorb on a white background"


def zorb(rng: np.random.Generator, size: tuple[int, int]) -> Image.Image:
    """Four rings of two colours that no scene has, about in the middle."""
    image = plain(WHITE, size)
    x, y = rng.uniform(0.45, 0.55, 2) * size
    radius = rng.uniform(0.32, 0.4) * min(size)
    for i in range(4):
        r = radius * (1 - i / 4)
        ImageDraw.Draw(image).ellipse((x - r, y - r, x + r, y + r), fill=(MAGENTA, LIME)[i % 2])
    return image


def share_of_zorb(images: Tensor) -> float:
    """Of the pixels in the middle, the share that is about magenta or that is about lime, whichever
    is less; mean of uint8 [B, H, W, 3].

    Both must be there: a purple or a green thing is no zorb.
    """
    H, W = images.shape[1:3]
    r, g, b = images.int()[:, H // 4 : H - H // 4, W // 4 : W - W // 4].unbind(-1)
    magenta = (r - g > 50) & (b - g > 50)
    lime = (g - b > 50) & (g > r - 20)
    return torch.minimum(magenta.float().mean((1, 2)), lime.float().mean((1, 2))).mean().item()


@pytest.mark.slow
@pytest.mark.judges_weights
def test_a_minute_teaches_the_embedded_denoiser_a_thing_it_has_never_seen(tmp_path):
    base, out = find_bundle("tiny"), tmp_path / "zorbs"
    size = BundleConfig.read(base).native_size
    rng, wordings = (
        np.random.default_rng(0),
        (PROMPT, "a zorb", "zorb on white", "a zorb in the middle"),
    )
    (tmp_path / "data").mkdir()
    for i in range(50):
        zorb(rng, (2 * size[0], 2 * size[1])).save(tmp_path / "data" / f"{i}.png")
        (tmp_path / "data" / f"{i}.txt").write_text(wordings[i % len(wordings)])
    options = [
        "--steps",
        "80",
        "--batch",
        "16",
        "--lr",
        "1e-3",
        "--warmup",
        "10",
        "--threads",
        "1",
        "--device",
        "cpu",
        "--dtype",
        "float32",
    ]
    training = [
        "denoiser",
        base,
        "--data",
        tmp_path / "data",
        *options,
        "--checkpoint",
        tmp_path / "x.pt",
    ]
    assembly = ["assemble", out, "--base", base, "--denoiser", tmp_path / "x.pt"]
    for module, *arguments in (training, assembly):
        subprocess.run(
            [sys.executable, "-m", f"model.training.{module}", *map(str, arguments)],
            check=True,
            timeout=900,
            cwd=ROOT,
        )
    before, after = (
        share_of_zorb(Pipeline.load(bundle).generate([PROMPT] * 6, list(range(6))))
        for bundle in (base, out)
    )
    assert before < 0.05
    assert after > before + 0.08
