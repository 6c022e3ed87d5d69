"""Configurations carry the published values, agree with each other, and survive being written
down.
"""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import fields, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

import weights
from model.config import (
    CONFIG_FILE,
    BundleConfig,
    DenoiserConfig,
    FileEntry,
    PriorConfig,
    SamplingConfig,
    VQGANConfig,
    find_bundle,
)
from tests.conftest import golden, micro_config, write_bundle

DIGEST = "0123456789abcdef" * 4
# Of micro_config, computed by the release before `renoise_order` and `guidance_start`.
HASH_BEFORE_THEY_WERE_ADDED = "b4db825f46b453d7293ff6ad3f6113df7574337e01ce501699f2eaea2194a43c"


@pytest.mark.parametrize(
    ("config", "name", "sampler_settings"),
    [
        (DenoiserConfig, "denoiser_v3", set()),
        (VQGANConfig, "vqgan_v3", set()),
        (PriorConfig, "prior_v1", {"timesteps", "cfg"}),
    ],
)
def test_fields_are_the_published_arguments(config, name, sampler_settings):
    arguments, _, _ = golden(name)
    ours = {field.name for field in fields(config)} - {"pruned_blocks"}
    assert ours == set(arguments) - sampler_settings


def test_published_sizes_follow_from_the_defaults():
    assert DenoiserConfig().token_step == 8
    assert VQGANConfig().downscale == 4


def test_levels_may_come_as_lists_and_compare_as_tuples():
    listed = DenoiserConfig(
        c_hidden=[640, 1280, 1280],
        nhead=[-1, 16, 16],
        blocks=[6, 16, 6],
        level_config=["CT", "CTA", "CTA"],
    )
    assert listed == DenoiserConfig()
    assert hash(listed) == hash(DenoiserConfig())


@pytest.mark.parametrize(
    ("change", "message"),
    [({"blocks": (1, 2)}, "same number of levels"), ({"level_config": ("CX", "C", "C")}, "not X")],
)
def test_levels_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        DenoiserConfig(**change)


@pytest.mark.parametrize(
    ("network", "field"),
    [
        ("denoiser", "byt5_embd"),
        ("denoiser", "clip_embd"),
        ("prior", "clip_r"),
        ("denoiser", "num_labels"),
    ],
)
def test_networks_that_do_not_fit_each_other_are_refused_by_name(network, field):
    config = micro_config()
    with pytest.raises(ValueError, match=rf"{network}\.{field} and .* must be equal, not 99 and"):
        replace(config, **{network: replace(getattr(config, network), **{field: 99})})


def test_the_size_step_is_the_token_step_in_pixels():
    assert micro_config().size_step == 16


def test_a_written_bundle_reads_back_equal(tmp_path):
    config = replace(micro_config(), files={"denoiser.safetensors": FileEntry(DIGEST, 12)})
    config.write(tmp_path)
    assert BundleConfig.read(tmp_path) == config


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("surprise",), 1, "surprise"),
        (("denoiser", "dropout"), 0.1, "denoiser.dropout"),
        (("recipe", "sampler"), "magic", "recipe.sampler"),
        (("format",), 5, "format"),
        (("name",), "../tiny", "name"),
        (("native_size",), [64], "native_size"),
        (("files", "merges"), {"sha256": "abc", "bytes": 1}, "files.merges.sha256"),
        (("clip",), None, "clip"),
    ],
)
def test_a_wrong_field_is_refused_by_name(tmp_path, path, value, message):
    write_changed(tmp_path, path, value)
    with pytest.raises(ValidationError, match=message):
        BundleConfig.read(tmp_path)


def write_changed(directory, path, value):
    """A bundle.json whose field at this path has this value."""
    micro_config().write(directory)
    content = json.loads((directory / CONFIG_FILE).read_text())
    parent = content
    for key in path[:-1]:
        parent = parent[key]
    parent[path[-1]] = value
    (directory / CONFIG_FILE).write_text(json.dumps(content))


@pytest.mark.parametrize("tower", ["vision_cfg", "text_cfg"])
@pytest.mark.parametrize(
    "field",
    [
        "hf_model_name",
        "hf_tokenizer_name",
        "timm_model_name",
        "timm_model_pretrained",
        "act_kwargs",
    ],
)
def test_clip_has_nothing_but_sizes(tmp_path, tower, field):
    write_changed(tmp_path, ("clip", tower, field), "hf-hub:somebody/something")
    with pytest.raises(ValidationError, match=field):
        BundleConfig.read(tmp_path)


# Fields that are no numbers, or whose bounds are not one interval for all.
NOT_NUMBERS = {"format", "bytes"}


def numbers(value, path=()):
    """The path of every number in a bundle.json."""
    if isinstance(value, dict | list):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        return [found for key, inner in pairs for found in numbers(inner, (*path, key))]
    known = isinstance(value, int | float) and not isinstance(value, bool)
    return [path] if known and path[-1] not in NOT_NUMBERS else []


@pytest.mark.parametrize("value", [-2, 10**9, 10**300, 1e308, float("nan"), float("inf")])
def test_every_number_has_bounds_on_both_sides(tmp_path, value):
    config = replace(
        micro_config(), recipe=replace(micro_config().recipe, attention_weights=(1.0, 1.0))
    )
    config.write(tmp_path)
    content = json.loads((tmp_path / CONFIG_FILE).read_text())
    found = numbers(content)
    assert len(found) > 50
    for path in found:
        changed = deepcopy(content)
        parent = changed
        for key in path[:-1]:
            parent = parent[key]
        parent[path[-1]] = value
        (tmp_path / CONFIG_FILE).write_text(json.dumps(changed))
        with pytest.raises(ValidationError):
            BundleConfig.read(tmp_path)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("native_size",), [0, 0]),
        (("native_size",), [24, 32]),
        (("recipe", "num_inference_steps"), 0),
        (("recipe", "guidance_steps"), 7),
        (("denoiser", "kernel_size"), 2),
        (("denoiser", "nhead"), [-1, 4]),
        (("denoiser", "blocks"), [1] * 9),
        (("vqgan", "scale_factor"), 0),
        (("clip", "text_cfg", "heads"), 3),
        (("clip", "vision_cfg", "patch_size"), 7),
        (("clip", "merges"), "../../etc/passwd"),
        (("byt5", "feed_forward_proj"), "gated-os.system"),
    ],
)
def test_sizes_that_make_no_network_are_refused(tmp_path, path, value):
    write_changed(tmp_path, path, value)
    with pytest.raises(ValidationError):
        BundleConfig.read(tmp_path)


def test_an_oversized_file_is_not_parsed(tmp_path):
    (tmp_path / CONFIG_FILE).write_bytes(b"[" * 2**21)
    with pytest.raises(ValueError, match="more than 1048576 bytes"):
        BundleConfig.read(tmp_path)


@pytest.mark.parametrize("content", [b"[" * 2**19, b'{"format": ' + b"9" * 9999 + b"}"])
def test_deep_nesting_and_long_numbers_are_refused_like_other_nonsense(tmp_path, content):
    (tmp_path / CONFIG_FILE).write_bytes(content)
    with pytest.raises(ValidationError):
        BundleConfig.read(tmp_path)


def test_a_file_that_is_no_json_is_refused(tmp_path):
    (tmp_path / CONFIG_FILE).write_text('{"name": "tiny"')
    with pytest.raises(ValidationError, match="JSON"):
        BundleConfig.read(tmp_path)


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("recipe", {"temperature": (0.7, 0.4)}),
        ("recipe", {"prior_sampler": "ddim"}),
        ("denoiser", {"self_attn": False}),
        ("clip", {"quick_gelu": True}),
    ],
)
def test_the_name_of_the_weights_covers_configuration_and_recipe(part, change):
    config = micro_config()
    changed = replace(config, **{part: replace(getattr(config, part), **change)})
    assert changed.sha256 != config.sha256
    assert replace(config, name="other").sha256 == config.sha256


def test_the_weights_have_one_name_that_every_file_changes():
    entries = {"a": FileEntry(DIGEST, 1), "b": FileEntry(DIGEST, 2)}
    config = replace(micro_config(), files=entries)
    assert config.sha256 == replace(config, files=dict(reversed(entries.items()))).sha256
    swapped = replace(config, files={**entries, "b": FileEntry(DIGEST[::-1], 2)})
    assert swapped.sha256 != config.sha256


# ── the recipe ────────────────────────────────────────────────────────────────────────────────────


def test_a_recipe_alone_is_what_its_authors_recommend():
    recipe = micro_config().recipe
    assert recipe.sampling() == SamplingConfig(
        steps=6,
        renoise_steps=5,
        guidance=(4.0, 4.0),
        guidance_steps=6,
        temperature=(0.7, 0.3),
        sampler="multinomial",
        attention_weights=(1.2, 0.4),
    )


@given(st.integers(1, 64))
def test_other_step_counts_keep_the_recipe_s_shares(steps):
    sampling = micro_config().recipe.sampling(steps=steps)
    assert sampling.steps == steps
    assert abs(sampling.renoise_steps - steps * 5 / 6) <= 0.5
    assert sampling.guidance_steps == steps


def test_every_wish_is_granted():
    wishes = {
        "steps": 9,
        "renoise_steps": 0,
        "guidance": (0.0, 2.0),
        "guidance_steps": 0,
        "temperature": (1.0, 0.5),
        "sampler": "typical",
        "typical_mass": 0.0,
        "attention_weights": (1.0, 0.5),
        "deterministic": True,
    }
    assert micro_config().recipe.sampling(**wishes) == SamplingConfig(**wishes)


@pytest.mark.parametrize(
    ("guidance", "steps", "guided"),
    [((8.0, 8.0), 6, True), ((1.0, 1.0), 6, False), ((8.0, 8.0), 0, False), ((1.0, 2.0), 6, True)],
)
def test_guidance_of_one_or_for_no_step_is_none(guidance, steps, guided):
    assert micro_config().recipe.sampling(guidance=guidance, guidance_steps=steps).guided == guided


def test_fields_added_later_change_neither_hash_nor_file_while_they_have_their_default(tmp_path):
    config = micro_config()
    config.write(tmp_path)
    written = json.loads((tmp_path / CONFIG_FILE).read_text())["recipe"]
    assert "renoise_mode" in written
    assert not {"renoise_order", "guidance_start"} & written.keys()
    assert config.sha256 == HASH_BEFORE_THEY_WERE_ADDED
    assert BundleConfig.read(tmp_path) == config


@pytest.mark.parametrize(
    "change",
    [{"renoise_order": "halton"}, {"guidance_start": 2, "guidance_steps": 4}],
    ids=["renoise_order", "guidance_start"],
)
def test_a_recipe_may_name_its_order_of_renoising_and_its_interval_of_guidance(tmp_path, change):
    config = micro_config()
    named = replace(config, recipe=replace(config.recipe, **change))
    named.write(tmp_path)
    assert BundleConfig.read(tmp_path) == named
    assert named.sha256 != config.sha256
    sampling = named.recipe.sampling()
    assert {name: getattr(sampling, name) for name in change} == change


def test_an_interval_of_guidance_is_inside_of_the_steps():
    recipe = micro_config().recipe
    with pytest.raises(ValueError, match="guidance_start"):
        replace(recipe, guidance_start=1)
    for steps in range(1, 65):
        late = replace(recipe, guidance_start=3, guidance_steps=3)
        for sampling in (late.sampling(steps=steps), late.sampling().with_steps(steps)):
            assert abs(sampling.guidance_start - steps / 2) <= 1
            assert sampling.guidance_start + sampling.guidance_steps <= steps


def test_a_number_of_first_steps_with_guidance_overrides_a_later_start():
    late = replace(micro_config().recipe, guidance_start=3, guidance_steps=3)
    sampling = late.sampling(guidance_steps=2)
    assert (sampling.guidance_start, sampling.guidance_steps) == (0, 2)


# ── finding bundles ───────────────────────────────────────────────────────────────────────────────


def test_a_shipped_name_is_found_from_any_directory_and_before_one_of_that_name_there(
    tmp_path, monkeypatch
):
    shipped = write_bundle(tmp_path / "shipped" / "tiny")
    write_bundle(tmp_path / "elsewhere" / "tiny")
    monkeypatch.setattr(weights, "__path__", [str(tmp_path / "shipped")])
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert find_bundle("tiny") == shipped


def test_a_path_is_a_bundle_too(tmp_path, monkeypatch):
    directory = write_bundle(tmp_path / "mine")
    assert find_bundle(str(directory)) == directory
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_bundle("~/mine") == directory
    monkeypatch.chdir(tmp_path)
    assert find_bundle("mine").samefile(directory)


def test_what_is_not_there_is_said_by_name(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="no bundle 'huge'"):
        find_bundle("huge")
    with pytest.raises(FileNotFoundError, match=CONFIG_FILE):
        find_bundle(str(tmp_path))
