"""Presets of a bundle: their format, their checks, and a second denoiser beside the first."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from typer.testing import CliRunner

from model.bundle import load_bundle, save_bundle
from model.bundle_files import BundleError
from model.checkpoints.convert import import_bundle
from model.checkpoints.memory import contents
from model.checkpoints.verify import verify
from model.config import (
    CONFIG_FILE,
    DENOISER,
    QUALITY,
    BundleConfig,
    BundleV1Config,
    DenoiserConfig,
    DenoiserV1Config,
    Preset,
)
from model.networks.denoiser_v3 import Denoiser
from model.training.recipe_text import changed
from server.cli import app
from tests.conftest import (
    micro_config,
    micro_preset_config,
    micro_v1_config,
    random_networks,
    randomise,
    write_merges,
    write_random_bundle,
)
from tests.support.checkpoints import assembled, saved

CPU = torch.device("cpu")


# ── the configuration ─────────────────────────────────────────────────────────────────────────────


def test_a_bundle_without_presets_has_one_which_is_its_recipe():
    config = micro_config()
    assert config.preset_names == (QUALITY,)
    assert config.default_preset == QUALITY
    assert config.preset(QUALITY) == Preset(config.recipe, steps=(1, 64))
    assert config.sampling() == config.recipe.sampling()
    assert config.network_names == config.networks


def test_a_preset_samples_by_its_own_recipe_and_denoiser():
    config = micro_preset_config()
    fast, quality = config.sampling("fast"), config.sampling()
    assert (fast.preset, fast.denoiser, fast.steps) == ("fast", "denoiser-fast", 3)
    assert (quality.preset, quality.denoiser, quality.steps) == (QUALITY, DENOISER, 6)
    assert config.sampling("fast", steps=2).steps == 2
    assert micro_preset_config(default=True).sampling() == fast
    assert not fast.guided
    assert not config.preset("fast").guided
    assert config.preset(QUALITY).guided


def test_the_presets_of_a_bundle_come_back_from_its_file(tmp_path):
    config = micro_preset_config(default=True)
    config.write(tmp_path)
    written = json.loads((tmp_path / CONFIG_FILE).read_text())
    assert written["format"] == 2
    assert written["presets"]["fast"]["denoiser"] == "fast"
    assert "guidance_start" not in written["presets"]["fast"]["recipe"]
    assert BundleConfig.read(tmp_path) == config


def test_presets_are_part_of_a_bundle_s_hash():
    plain, config = micro_config("presets"), micro_preset_config()
    slower = replace(config.presets["fast"], steps=(1, 3))
    hashes = {
        plain.sha256,
        config.sha256,
        micro_preset_config(default=True).sha256,
        config.with_preset("fast", slower).sha256,
        config.with_preset("live", replace(slower, steps=(1, 4))).sha256,
    }
    assert len(hashes) == 5


def test_a_denoiser_that_no_preset_uses_any_more_goes_with_its_preset():
    config = micro_preset_config()
    fast = replace(config.presets["fast"], denoiser=None)
    assert config.with_preset("fast", fast).denoisers == {}


def test_the_smaller_denoiser_costs_less():
    config = micro_preset_config()
    assert config.relative_work(DENOISER) == 1.0
    assert 0 < config.relative_work("denoiser-fast") < 0.7
    assert micro_config().relative_work(DENOISER) == 1.0


def test_work_is_about_the_published_networks_multiplications():
    # 472 and 108 GFLOP of one branch at 256×256 (docs/weights.md), two for a multiplication.
    assert DenoiserConfig().work * 2 * 64**2 == pytest.approx(472e9, rel=0.1)
    assert DenoiserV1Config().work * 2 * 32**2 == pytest.approx(108e9, rel=0.15)


Change = Callable[[dict[str, Any]], object]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(format=1), "presets need format 2, not 1"),
        (lambda c: c.update(default_preset="best"), "must be one of quality, fast, not best"),
        (lambda c: c["presets"].update(quality=c["presets"]["fast"]), "presets.quality: this"),
        (lambda c: c["presets"].update({"FAST!": c["presets"]["fast"]}), "FAST!"),
        (lambda c: c["presets"]["fast"].update(steps=[4, 8]), "the recipe's 3 steps, not 4 to 8"),
        (lambda c: c["presets"]["fast"].update(steps=[0, 4]), "steps"),
        (lambda c: c["presets"]["fast"].update(denoiser="other"), "has fast, not other"),
        (lambda c: c["presets"]["fast"].update(denoiser=None), "denoisers.fast is used by no"),
        (lambda c: c["presets"]["fast"].update(speed=1), "presets.fast.speed"),
        (lambda c: c["presets"]["fast"]["recipe"].update(schedule="cosine"), "recipe.schedule"),
        (lambda c: c["denoisers"]["fast"].update(num_labels=32), "fast.num_labels must be .* 64"),
        (lambda c: c["denoisers"]["fast"].update(clip_embd=32), "denoisers.fast.clip_embd"),
        (lambda c: c["denoisers"]["fast"].update(patch_size=8), "8 does not divide 4"),
        (lambda c: c.update(presets={f"p{i}": c["presets"]["fast"] for i in range(17)}), "16"),
    ],
)
def test_a_senseless_preset_is_refused_by_name(tmp_path: Path, change: Change, message: str):
    micro_preset_config().write(tmp_path)
    fields = json.loads((tmp_path / CONFIG_FILE).read_text())
    change(fields)
    (tmp_path / CONFIG_FILE).write_text(json.dumps(fields))
    with pytest.raises(ValidationError, match=message):
        BundleConfig.read(tmp_path)


def test_a_sampler_that_the_networks_lack_is_refused():
    config = micro_v1_config()
    recipe = replace(config.recipe, sampler="quant")
    with pytest.raises(ValueError, match=r"presets\.other\.recipe\.sampler"):
        config.with_preset("other", Preset(recipe))


# ── files ─────────────────────────────────────────────────────────────────────────────────────────


def test_a_second_denoiser_has_a_file_of_its_own_and_comes_back(tmp_path: Path):
    merges = write_merges(tmp_path / "merges")
    networks = random_networks(merges, micro_preset_config())
    config = save_bundle(networks, tmp_path / "presets", torch.float32, merges)
    assert "denoiser-fast.safetensors" in config.files
    loaded = load_bundle(tmp_path / "presets", CPU, torch.float32)
    assert loaded.config == config
    assert list(loaded.every_denoiser) == [DENOISER, "denoiser-fast"]
    file = load_file(tmp_path / "presets" / "denoiser-fast.safetensors")
    fast = loaded.denoisers["fast"]
    for name, tensor in networks.denoisers["fast"].state_dict().items():
        assert torch.equal(file[name], tensor)
        assert torch.equal(fast.state_dict()[name], tensor)
    assert not fast.training
    assert not any(p.requires_grad for p in fast.parameters())


def test_a_v1_bundle_may_have_a_second_denoiser(tmp_path: Path):
    config = micro_v1_config()
    fast = replace(config.recipe, num_inference_steps=2, renoise_steps=1, guidance_steps=2)
    smaller = replace(config.denoiser, c_hidden=16)
    config = config.with_preset("fast", Preset(fast, (1, 4), "small"), smaller)
    loaded = load_bundle(write_random_bundle(tmp_path / "v1", config), CPU, torch.float32)
    assert isinstance(loaded.config, BundleV1Config)
    assert list(loaded.every_denoiser) == [DENOISER, "denoiser-small"]


def test_a_missing_or_damaged_second_denoiser_is_refused_by_its_name(preset_bundle, tmp_path):
    config = BundleConfig.read(preset_bundle)
    unlisted = {n: f for n, f in config.files.items() if n != "denoiser-fast.safetensors"}
    for file in preset_bundle.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    replace(config, files=unlisted).write(tmp_path)
    with pytest.raises(BundleError, match="does not list denoiser-fast"):
        load_bundle(tmp_path, CPU, torch.float32)
    config.write(tmp_path)
    path = tmp_path / "denoiser-fast.safetensors"
    path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\0")
    with pytest.raises(BundleError, match=r"denoiser-fast\.safetensors: not what was listed"):
        load_bundle(tmp_path, CPU, torch.float32)


def test_a_second_denoiser_is_verified_and_counted(preset_bundle):
    assert verify(preset_bundle).preset_names == (QUALITY, "fast")
    _, parts = contents(str(preset_bundle))
    assert 0 < parts["denoiser-fast"].parameters < parts["denoiser"].parameters


# ── assembling ────────────────────────────────────────────────────────────────────────────────────


def checkpoint(directory: Path, config: DenoiserConfig, seed: int) -> Path:
    """A training's checkpoint of a denoiser with weights of its own."""
    denoiser = Denoiser(config)
    randomise(denoiser, seed)
    return saved(denoiser, directory / "x.pt")


def test_a_preset_is_added_to_a_bundle_with_a_denoiser_of_its_own(
    random_bundle, monkeypatch, tmp_path
):
    base, out = load_bundle(random_bundle, CPU, torch.float32), tmp_path / "mine"
    config = base.config
    assert isinstance(config.denoiser, DenoiserConfig)
    weights = checkpoint(tmp_path, replace(config.denoiser, blocks=(1, 1)), 7)
    recipe = "steps=3,guidance=1,guidance_steps=0"
    network = ("--denoiser", weights, "--sizes", '{"blocks": [1, 1]}')
    more = ("--recipe", recipe, "--steps", "1:4", "--default")
    assembled(monkeypatch, out, "--base", random_bundle, "--preset", "fast", *network, *more)
    loaded = load_bundle(out, CPU, torch.float32)
    fast = loaded.config.preset("fast")
    assert (loaded.config.name, loaded.config.default_preset) == ("mine", "fast")
    assert (fast.steps, fast.network, fast.guided) == ((1, 4), "denoiser-fast", False)
    assert fast.recipe == changed(config.recipe, recipe)
    assert loaded.config.recipe == config.recipe
    for file in ("denoiser", "vqgan", "prior", "byt5", "clip"):
        name = f"{file}.safetensors"
        assert loaded.config.files[name] == config.files[name]
    expected = torch.load(weights)["ema"]["denoiser.byt5_mapper.weight"]
    assert torch.equal(loaded.denoisers["fast"].state_dict()["byt5_mapper.weight"], expected)

    # A second one shares its denoiser; it is added to the bundle itself.
    assembled(monkeypatch, out, "--preset", "live", "--denoiser-of", "fast", "--recipe", "steps=1")
    loaded = load_bundle(out, CPU, torch.float32)
    assert loaded.config.preset_names == ("quality", "fast", "live")
    assert loaded.config.preset("live").network == "denoiser-fast"
    assert loaded.config.preset("live").steps == (1, 1)
    assert list(loaded.denoisers) == ["fast"]
    assert verify(out) == loaded.config

    # What is not named stays.
    assembled(monkeypatch, out, "--preset", "fast", "--recipe", "steps=2")
    config = BundleConfig.read(out)
    fast = config.preset("fast")
    assert (fast.recipe.num_inference_steps, fast.steps) == (2, (1, 4))
    assert (fast.network, config.default_preset) == ("denoiser-fast", "fast")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--preset", "quality"], "this preset is the bundle's recipe"),
        (["--preset", "Fast!"], "pattern"),
        (["--preset", "fast", "--steps", "7:9"], "holds the recipe's 6 steps, not 7 to 9"),
        (["--preset", "fast", "--denoiser-of", "live"], "there is no preset 'live'"),
        (["--preset", "fast", "--recipe", "step=1"], "NAME=VALUE"),
        (["--preset", "fast", "--denoiser", "x.pt", "--sizes", '{"size": 1}'], "size: "),
        (["--steps", "1:4"], "need --preset"),
    ],
)
def test_a_preset_that_cannot_be_is_refused_in_words(
    random_bundle, monkeypatch, tmp_path, capsys, arguments, words
):
    base = ["--base", random_bundle] if "--preset" in arguments else []
    with pytest.raises(SystemExit):
        assembled(monkeypatch, tmp_path / "mine", *base, *arguments)
    assert words in capsys.readouterr().err
    assert not (tmp_path / "mine").exists()


def test_a_checkpoint_of_another_shape_is_refused_by_its_tensor(
    random_bundle, monkeypatch, tmp_path, capsys
):
    other = replace(micro_config().denoiser, c_in=8)
    arguments = ["--preset", "fast", "--denoiser", checkpoint(tmp_path, other, 0)]
    with pytest.raises(SystemExit):
        assembled(monkeypatch, tmp_path / "mine", "--base", random_bundle, *arguments)
    assert "x.pt: tensor" in capsys.readouterr().err


def test_an_import_keeps_the_presets_of_its_origin(preset_bundle, tmp_path):
    config = BundleConfig.read(preset_bundle)
    sources = {name: preset_bundle / f"{name}.safetensors" for name in config.network_names}
    out, merges = tmp_path / "imported", preset_bundle / "merges.txt.gz"
    written = import_bundle(sources, config, out, torch.float16, merges)
    assert written.preset_names == (QUALITY, "fast")
    assert load_bundle(out, CPU, torch.float32).config == written
    shown = CliRunner().invoke(app, ["weights", "info", str(out)])
    assert "preset fast, for 1 to 4 steps, by denoiser-fast" in shown.stdout
    assert "renoise_order" in shown.stdout
