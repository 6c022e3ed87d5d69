"""Denoisers without some of their blocks: what they compute, their bundles, and the search."""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from load_tests import blocks
from model.bundle import load_bundle
from model.bundle_files import BundleError, sha256
from model.config import CONFIG_FILE, BundleConfig, DenoiserConfig
from model.networks.blocks_v3 import AttentionBlock, ConvBlock, TimeBlock
from model.networks.denoiser_v3 import Denoiser
from model.pipeline import Pipeline
from model.training import distill, loop, prune
from model.training.block_losses import Lost
from model.training.block_skips import removable, without
from model.training.captioned import DataError
from model.training.pruning import pruned, pruned_config
from tests.conftest import micro_config, randomise, write_random_bundle
from tests.support.checkpoints import assembled, saved
from tests.support.short_training import run
from tests.support.small_training import art_of_our_own_fixture, corpus_file_fixture, small_config  # noqa: F401, fixtures
from tests.support.training_examples import examples, features

CPU = torch.device("cpu")
FIRST, SECOND = "down_blocks.1.3", "up_blocks.0.3"  # an attention and a convolution block
CONFIGS = {
    "published": DenoiserConfig(),
    "two levels": micro_config().denoiser,
    "one level": DenoiserConfig(c_hidden=(16,), nhead=(2,), blocks=(2,), level_config=("CTA",)),
    "two convolutions": DenoiserConfig(
        c_hidden=(16, 32), nhead=(2, 2), blocks=(2, 1), level_config=("CCT", "CA")
    ),
}


@pytest.fixture
def network():
    own = Denoiser(micro_config().denoiser)
    randomise(own)
    return own


# ── the configuration ─────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_configuration_names_the_blocks_of_its_network(config):
    with torch.device("meta"):
        network = Denoiser(config)
    kinds = {ConvBlock: "C", TimeBlock: "T", AttentionBlock: "A"}
    found = {name: kinds[type(m)] for name, m in network.named_modules() if type(m) in kinds}
    assert {name: block.kind for name, block in config.every_block.items()} == found
    skips = [name for name in found if found[name] == "C" and reads_two(network, name)]
    assert skips == [name for name, block in config.every_block.items() if block.reads_skip]
    assert config.prunable_blocks == tuple(removable(network))


def reads_two(network, name):
    """Return whether a convolution block has weights for what it is given and for a skip."""
    return network.get_submodule(name).depthwise.weight.shape[1] == 2


@pytest.mark.parametrize(
    "name", ["down_blocks.1.0", "down_blocks.1.2", "up_blocks.1.0", "down_blocks.2.1", "clf"]
)
def test_what_is_no_block_that_adds_cannot_be_pruned(name):
    with pytest.raises(ValueError, match=f"not {name}"):
        replace(micro_config().denoiser, pruned_blocks=(name,))


def test_one_attention_block_stays_because_nothing_else_reads_the_prompt():
    config = micro_config().denoiser
    attention = [name for name, block in config.every_block.items() if block.kind == "A"]
    some = replace(config, pruned_blocks=tuple(attention[1:]))
    assert not prune.may_go(some, attention[0])
    assert prune.may_go(some, "down_blocks.0.0")
    with pytest.raises(ValueError, match="must leave one attention block"):
        pruned_config(some, attention[:1])


def test_a_pruned_network_s_steps_count_less():
    config = micro_config().denoiser
    less = replace(config, pruned_blocks=(FIRST,)).work
    assert config.work - less == pytest.approx(4 * 32**2 / 4**2)


def test_blocks_are_named_once_and_in_the_order_of_a_pass():
    config = pruned_config(micro_config().denoiser, [SECOND, FIRST])
    assert config.pruned_blocks == (FIRST, SECOND)
    assert pruned_config(config, [FIRST]) == config


def test_a_bundle_with_pruned_blocks_is_of_the_third_format(tmp_path):
    plain = micro_config()
    with pytest.raises(ValueError, match="pruned blocks need format 3, not 1"):
        replace(plain, denoiser=replace(plain.denoiser, pruned_blocks=(FIRST,)))
    config = replace(plain, denoiser=replace(plain.denoiser, pruned_blocks=(FIRST,)), format=3)
    config.write(tmp_path)
    assert json.loads((tmp_path / CONFIG_FILE).read_text())["denoiser"]["pruned_blocks"] == [FIRST]
    assert BundleConfig.read(tmp_path) == config
    assert config.sha256 != plain.sha256


def test_a_bundle_without_them_does_not_mention_them(tmp_path):
    micro_config().write(tmp_path)
    assert "pruned" not in (tmp_path / CONFIG_FILE).read_text()


# ── what it computes ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("gone", [(FIRST,), (SECOND,), (FIRST, SECOND)])
def test_a_pruned_network_computes_what_the_whole_one_does_without_the_blocks(network, gone):
    x = examples(4)
    smaller = pruned(network, gone)
    every, kept = (dict(own.named_parameters()) for own in (network, smaller))
    assert kept.keys() == {n for n in every if not n.startswith(tuple(f"{g}." for g in gone))}
    found = features(smaller, x)
    with ExitStack() as stack:
        for name in gone:
            stack.enter_context(without(network.get_submodule(name)))
        assert torch.equal(found, features(network, x))


def test_a_copy_does_not_change_with_its_original(network):
    smaller = pruned(network, ())
    before = smaller.byt5_mapper.weight.clone()
    torch.nn.init.zeros_(network.byt5_mapper.weight)
    assert torch.equal(smaller.byt5_mapper.weight, before)


def test_a_pruned_bundle_draws_packed_as_plain(network, tmp_path, monkeypatch, random_bundle):
    checkpoint = saved(network, tmp_path / "x.pt")
    names = f"{FIRST},{SECOND}"
    out = tmp_path / "less"
    assembled(monkeypatch, out, "--base", random_bundle, "--denoiser", checkpoint, "--prune", names)
    config = BundleConfig.read(out)
    assert config.denoiser.pruned_blocks == (FIRST, SECOND)
    assert not [name for name in load_file(out / "denoiser.safetensors") if FIRST in name]
    pipeline, x = Pipeline.load(out, CPU, torch.float32), examples(3)
    assert torch.isfinite(features(pipeline.bundle.denoiser, x)).all()
    torch.testing.assert_close(
        features(pipeline.bundle.denoiser, x),
        features(pruned(network, (FIRST, SECOND)), x),
        rtol=1e-3,
        atol=1e-4,
    )
    pipeline.generate(["a red circle"], [0])


def test_a_file_may_still_hold_what_is_pruned(tmp_path):
    path = write_random_bundle(tmp_path / "random", micro_config())
    whole = load_bundle(path, CPU, torch.float32)
    edited = json.loads((path / CONFIG_FILE).read_text())
    edited["denoiser"]["pruned_blocks"], edited["format"] = [FIRST], 3
    (path / CONFIG_FILE).write_text(json.dumps(edited))
    loaded = load_bundle(path, CPU, torch.float32)
    x = examples(2)
    expected = features(pruned(whole.denoiser, [FIRST]), x)
    torch.testing.assert_close(features(loaded.denoiser, x), expected, rtol=1e-3, atol=1e-4)
    # What is unknown otherwise is refused as before.
    file = path / "denoiser.safetensors"
    save_file({**load_file(file), "down_blocks.1.33.bias": torch.zeros(1)}, file)
    edited["files"]["denoiser.safetensors"] = {"sha256": sha256(file), "bytes": file.stat().st_size}
    (path / CONFIG_FILE).write_text(json.dumps(edited))
    with pytest.raises(BundleError, match=r"down_blocks\.1\.33\.bias"):
        load_bundle(path, CPU, torch.float32)


def test_the_table_of_blocks_has_no_line_for_a_pruned_one(network):
    names = [block.name for block in blocks.blocks_of(pruned(network, [FIRST]))]
    assert FIRST not in names
    assert len(names) == len(blocks.blocks_of(network)) - 1


# ── assembling ────────────────────────────────────────────────────────────────────────────────────


def test_a_preset_may_have_a_pruned_denoiser(network, tmp_path, monkeypatch, random_bundle):
    checkpoint = saved(pruned(network, [FIRST]), tmp_path / "x.pt")
    out = tmp_path / "mine"
    more = ("--denoiser", checkpoint, "--prune", FIRST, "--recipe", "steps=2")
    assembled(monkeypatch, out, "--base", random_bundle, "--preset", "fast", *more)
    config = BundleConfig.read(out)
    assert config.denoiser.pruned_blocks == ()
    assert config.denoisers["fast"].pruned_blocks == (FIRST,)
    assert config.format == 3
    assert config.relative_work("denoiser-fast") < 1


def test_a_preset_of_a_pruned_bundle_lacks_its_blocks_and_its_own(
    network, tmp_path, monkeypatch, random_bundle
):
    base, out = tmp_path / "base", tmp_path / "mine"
    first = saved(pruned(network, [FIRST]), tmp_path / "first.pt")
    assembled(monkeypatch, base, "--base", random_bundle, "--denoiser", first, "--prune", FIRST)
    both = saved(pruned(network, [FIRST, SECOND]), tmp_path / "both.pt")
    more = ("--denoiser", both, "--prune", SECOND, "--recipe", "steps=2")
    assembled(monkeypatch, out, "--base", base, "--preset", "fast", *more)
    assert BundleConfig.read(out).denoisers["fast"].pruned_blocks == (FIRST, SECOND)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prune", FIRST], "--prune is about the blocks of --denoiser"),
        (["--base", "BASE", "--denoiser", "FILE", "--prune", "clf"], "not clf"),
        (["--base", "BASE", "--denoiser", "FILE"], f"'{FIRST}"),
    ],
)
def test_impossible_prunings_are_refused(
    network, tmp_path, monkeypatch, capsys, random_bundle, arguments, message
):
    file = saved(pruned(network, [FIRST]), tmp_path / "x.pt")
    named = {"BASE": random_bundle, "FILE": file}
    with pytest.raises(SystemExit):
        assembled(monkeypatch, tmp_path / "out", *(named.get(a, a) for a in arguments))
    assert message in capsys.readouterr().err


# ── training ──────────────────────────────────────────────────────────────────────────────────────


def test_a_whole_teacher_teaches_a_pruned_student(
    monkeypatch, capsys, tmp_path, corpus_file, prepared
):
    bundle = write_random_bundle(tmp_path / "random", small_config())
    common = [bundle, "--corpus", corpus_file, "--batch", 4, "--updates", 2, "--guidance"]
    losses = run(monkeypatch, distill, tmp_path / "x.pt", *common, "--prune", f"{SECOND},{FIRST}")
    assert len(losses) == 2
    said = capsys.readouterr().out
    assert f"--prune {SECOND},{FIRST}" in said
    held = loop.load(tmp_path / "x.pt")["ema"]
    assert not [name for name in held if FIRST in name or SECOND in name]
    assembled(
        monkeypatch,
        tmp_path / "out",
        "--base",
        bundle,
        "--denoiser",
        tmp_path / "x.pt",
        "--prune",
        f"{SECOND},{FIRST}",
    )
    config = BundleConfig.read(tmp_path / "out")
    assert config.denoiser.pruned_blocks == (FIRST, SECOND)


def test_unknown_blocks_end_a_training_with_a_message(monkeypatch, tmp_path, corpus_file, prepared):
    bundle = write_random_bundle(tmp_path / "random", small_config())
    common = [bundle, "--corpus", corpus_file, "--batch", 4, "--updates", 1, "--guidance"]
    with pytest.raises(DataError, match=r"not down_blocks\.7\.1"):
        run(monkeypatch, distill, tmp_path / "x.pt", *common, "--prune", "down_blocks.7.1")


# ── the search ────────────────────────────────────────────────────────────────────────────────────


def measured(table):
    """Losses that are looked up: of each block alone, and of pairs where they differ."""

    def losses_without(gone):
        names = [name for name in "abc" if name not in gone]
        return [Lost(n, 1, table.get((*gone, n), table[(n,)]), 0.0) for n in names]

    return losses_without


def test_the_block_goes_that_is_missed_least_for_its_time():
    lost = measured({("a",): 0.2, ("b",): 0.3, ("c",): 0.1})
    rounds = prune.search(lost, {"a": 4.0, "b": 1.0, "c": 1.0}, 1, 1.0)
    assert [(r.block, r.more, r.milliseconds, r.others) for r in rounds] == [
        ("a", 0.2, 4.0, {"b": 0.3, "c": 0.1})
    ]


def test_what_is_gone_changes_what_goes_next():
    lost = measured({("a",): 0.1, ("b",): 0.2, ("c",): 0.3, ("a", "b"): 0.9})
    rounds = prune.search(lost, dict.fromkeys("abc", 1.0), 2, 9.0)
    assert [(r.block, r.more) for r in rounds] == [("a", 0.1), ("c", 0.4)]


@pytest.mark.parametrize(
    ("blocks", "most", "expected"), [(9, 9.0, "abc"), (9, 0.31, "ab"), (0, 9, "")]
)
def test_the_search_ends_with_the_blocks_their_number_or_the_loss(blocks, most, expected):
    lost = measured({("a",): 0.1, ("b",): 0.2, ("c",): 0.3})
    rounds = prune.search(lost, dict.fromkeys("abc", 1.0), blocks, most)
    assert "".join(r.block for r in rounds) == expected


def test_a_block_whose_absence_helps_goes_first():
    lost = measured({("a",): 0.1, ("b",): -0.2, ("c",): -0.1})
    rounds = prune.search(lost, {"a": 1.0, "b": 1.0, "c": 2.0}, 2, 9.0)
    assert [r.block for r in rounds] == ["c", "b"]


def test_the_command_searches_a_bundle_s_blocks(
    monkeypatch, capsys, tmp_path, corpus_file, prepared
):
    bundle = write_random_bundle(tmp_path / "random", small_config())
    arguments = [str(bundle), "--corpus", str(corpus_file), "--batches", "2", "--batch", "4"]
    arguments += ["--blocks", "2", "--passes", "3", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", ["prune", *arguments])
    prune.main()
    *said, line = capsys.readouterr().out.splitlines()
    result = json.loads(line)
    assert len(result["pruned"]) == 2
    assert {*result["pruned"]} <= {*small_config().denoiser.prunable_blocks}
    assert [r["block"] for r in result["rounds"]] == result["pruned"]
    assert f"--prune {','.join(result['pruned'])}" in said
    first, second = result["rounds"]
    assert len(first["others"]) == len(second["others"]) + 1
