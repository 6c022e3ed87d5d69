"""A bundle comes back bit for bit, and one that is not what it says is refused with the name of
what is wrong.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from model.bundle import build, load_bundle, load_v3, save_bundle, state_of
from model.bundle_files import BundleError, file_entry, read_tensors, verify_files
from model.config import CONFIG_FILE, BundleConfig
from tests.conftest import NETWORKS, micro_v1_config, random_networks, write_merges
from tests.support.pickles import Explosive

CPU = torch.device("cpu")
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def directory(random_bundle: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(random_bundle, tmp_path / "bundle"))


def relist(directory: Path) -> None:
    """Lists the files as they are now: damage that hashes alone would not find."""
    config = BundleConfig.read(directory)
    replace(config, files={name: file_entry(directory / name) for name in config.files}).write(
        directory
    )


def rewrite(directory: Path, network: str, change: Callable[[Tensors], object]) -> None:
    path = directory / f"{network}.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    relist(directory)


def load(directory: Path) -> None:
    load_bundle(directory, CPU, torch.float32)


def test_every_tensor_comes_back_bit_for_bit(random_bundle, tmp_path):
    saved = random_networks(write_merges(tmp_path))
    loaded = load_bundle(random_bundle, CPU, torch.float32)
    for (name, one), (_, other) in zip(saved.networks(), loaded.networks(), strict=True):
        before, after = state_of(one), state_of(other)
        assert before.keys() == after.keys(), name
        assert all(torch.equal(before[key], after[key]) for key in before), name


def test_saving_what_was_loaded_writes_the_same_files(random_bundle, tmp_path):
    loaded = load_bundle(random_bundle, CPU, torch.float32)
    config = save_bundle(loaded, tmp_path / "again", torch.float32, random_bundle / "merges.txt.gz")
    assert config == loaded.config
    assert config.sha256 == BundleConfig.read(random_bundle).sha256


def test_a_loaded_bundle_computes_what_the_saved_one_did(random_bundle, tmp_path):
    saved = random_networks(write_merges(tmp_path))
    loaded = load_bundle(random_bundle, CPU, torch.float32)
    prompts, image = ["red apple", "the"], torch.rand(1, 3, 16, 16)
    for one, other in ((saved, loaded),):
        for _, module in one.networks():
            module.eval()
        with torch.no_grad():
            torch.testing.assert_close(one.byt5(prompts).embeddings, other.byt5(prompts).embeddings)
            torch.testing.assert_close(
                one.clip.encode_text(prompts), other.clip.encode_text(prompts)
            )
            torch.testing.assert_close(one.clip.encode_image(image), other.clip.encode_image(image))
            assert torch.equal(one.vqgan.encode(image), other.vqgan.encode(image))


def test_loading_leaves_nothing_on_meta_nothing_to_train_and_everything_in_evaluation(
    random_bundle,
):
    bundle = load_bundle(random_bundle, CPU, torch.float32)
    for name, module in bundle.networks():
        tensors = [*module.parameters(), *module.buffers()]
        assert all(t.device == CPU for t in tensors), name
        assert not any(t.requires_grad for t in tensors), name
        assert not any(m.training for m in module.modules()), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_load_as_the_type_asked_for_and_counters_stay_whole(random_bundle, dtype):
    bundle = load_bundle(random_bundle, CPU, dtype)
    for name, module in bundle.networks():
        # Two rows at a time are faster in fp32.
        assert {p.dtype for p in module.parameters()} == {
            torch.float32 if name == "prior" else dtype
        }, name
    assert bundle.vqgan.state_dict()["down_blocks.3.1.num_batches_tracked"].dtype == torch.int64


def test_half_precision_files_are_half_the_size(random_bundle, tmp_path):
    config = save_bundle(
        load_bundle(random_bundle, CPU, torch.float32),
        tmp_path / "half",
        torch.float16,
        random_bundle / "merges.txt.gz",
    )
    full = BundleConfig.read(random_bundle)
    assert (
        config.files["denoiser.safetensors"].bytes < 0.6 * full.files["denoiser.safetensors"].bytes
    )
    load(tmp_path / "half")


# ── refusals ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("network", NETWORKS)
def test_an_unknown_tensor_is_refused_by_name(directory, network):
    rewrite(directory, network, lambda t: t.update(surprise=torch.zeros(1)))
    with pytest.raises(BundleError, match=rf"{network}\.safetensors: tensor 'surprise' is unknown"):
        load(directory)


@pytest.mark.parametrize("network", NETWORKS)
def test_a_missing_tensor_is_refused_by_name(directory, network):
    missing = next(iter(load_file(directory / f"{network}.safetensors")))
    rewrite(directory, network, lambda t: t.pop(missing))
    with pytest.raises(
        BundleError, match=rf"{network}\.safetensors: tensor '{missing}' is missing"
    ):
        load(directory)


@pytest.mark.parametrize("network", NETWORKS)
def test_a_misshapen_tensor_is_refused_with_both_shapes(directory, network):
    name, tensor = next(
        (n, t) for n, t in load_file(directory / f"{network}.safetensors").items() if t.dim() == 2
    )
    rewrite(directory, network, lambda t: t.update({name: tensor[1:].clone()}))
    with pytest.raises(BundleError) as refusal:
        load(directory)
    assert (
        f"tensor {name!r} is {list(tensor[1:].shape)}, this configuration needs "
        f"{list(tensor.shape)}" in str(refusal.value)
    )


def test_a_tensor_of_another_kind_is_refused(directory):
    rewrite(directory, "denoiser", lambda t: t.update({"clf.1.bias": t["clf.1.bias"].long()}))
    with pytest.raises(
        BundleError,
        match=r"'clf\.1\.bias' is torch\.int64, this configuration needs torch\.float32",
    ):
        load(directory)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_tensor_that_is_not_finite_is_refused_by_name(directory, value):
    rewrite(directory, "prior", lambda t: t["blocks.1.1.weight"].view(-1)[-1:].fill_(value))
    with pytest.raises(
        BundleError,
        match=r"prior\.safetensors: tensor 'blocks\.1\.1\.weight' holds NaN or infinity",
    ):
        load(directory)


def test_a_truncated_file_is_refused_with_the_first_incomplete_tensor(directory):
    path = directory / "vqgan.safetensors"
    os.truncate(path, path.stat().st_size - 3)
    with pytest.raises(
        BundleError,
        match=(
            rf"vqgan\.safetensors has \d+ bytes, {CONFIG_FILE} says \d+; the first incomplete "
            rf"tensor is '\S+'"
        ),
    ):
        load(directory)


@pytest.mark.parametrize("size", [0, 4, 40])
def test_a_file_cut_within_its_header_is_refused(directory, size):
    os.truncate(directory / "vqgan.safetensors", size)
    with pytest.raises(BundleError, match="it ends within its header"):
        load(directory)


def test_a_truncated_file_that_was_listed_so_is_refused_too(directory):
    path = directory / "vqgan.safetensors"
    os.truncate(path, path.stat().st_size - 3)
    relist(directory)
    with pytest.raises(
        BundleError,
        match=(
            r"vqgan\.safetensors is not a readable safetensors file .*; the first incomplete "
            r"tensor is '\S+'"
        ),
    ):
        load(directory)


def test_something_else_under_a_network_s_name_is_refused(directory):
    (directory / "clip.safetensors").write_bytes(pickle.dumps({"weight": [0.0] * 100}))
    relist(directory)
    with pytest.raises(BundleError, match=r"clip\.safetensors is not a readable safetensors file"):
        load(directory)


def test_a_changed_byte_is_refused(directory):
    path = directory / "byt5.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(
        BundleError, match=r"byt5\.safetensors: not what was listed, the sha256 differs"
    ):
        load(directory)


def test_swapped_files_are_refused(directory):
    one, other = directory / "prior.safetensors", directory / "vqgan.safetensors"
    kept = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(kept)
    with pytest.raises(BundleError, match=r"(prior|vqgan)\.safetensors"):
        load(directory)


@pytest.mark.parametrize("name", ["denoiser.safetensors", "merges.txt.gz"])
def test_an_absent_file_is_refused_by_name(directory, name):
    (directory / name).unlink()
    with pytest.raises(BundleError, match=f"{name} is listed but is not there"):
        load(directory)


@pytest.mark.parametrize(
    "name", [*(f"{network}.safetensors" for network in NETWORKS), "merges.txt.gz"]
)
def test_a_file_that_is_needed_but_not_listed_is_refused_by_name(directory, name):
    # Merges that nobody listed were read without a check.
    config = BundleConfig.read(directory)
    replace(config, files={n: f for n, f in config.files.items() if n != name}).write(directory)
    with pytest.raises(BundleError, match=f"{CONFIG_FILE} does not list {name}"):
        load(directory)


@pytest.mark.parametrize(
    ("old", "new", "field"),
    [
        ('"format": 1', '"format": 99', "format"),
        ('"num_labels"', '"labels"', "labels"),
        ('"name"', '"title"', "title"),
    ],
)
def test_a_configuration_of_another_format_is_refused_by_field(directory, old, new, field):
    path = directory / CONFIG_FILE
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(ValidationError, match=field):
        load(directory)


def test_a_directory_without_a_configuration_is_not_a_bundle(tmp_path):
    with pytest.raises(FileNotFoundError, match=CONFIG_FILE):
        load(tmp_path)


# ── what else lies there, and where one stands ────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["denoiser.pt", "pytorch_model.bin", "clip.ckpt"])
def test_pickles_are_never_opened(directory, tmp_path, name):
    mark = tmp_path / "opened"
    (directory / name).write_bytes(pickle.dumps(Explosive(mark)))
    load(directory)
    assert not mark.exists()


def test_loading_from_another_working_directory_changes_nothing(
    random_bundle, tmp_path, monkeypatch
):
    monkeypatch.chdir(random_bundle.parent)
    here = load_bundle(Path(random_bundle.name), CPU, torch.float32)
    monkeypatch.chdir(tmp_path)
    there = load_bundle(random_bundle, CPU, torch.float32)
    assert here.clip.tokenizer.encode("red apple") == there.clip.tokenizer.encode("red apple")
    assert all(
        torch.equal(a, b)
        for a, b in zip(here.clip.parameters(), there.clip.parameters(), strict=True)
    )


def test_where_only_v3_networks_will_do_others_are_refused_by_their_family(
    random_bundle, random_v1_bundle
):
    assert load_v3(random_bundle, CPU, torch.float32).config.family == "v3"
    with pytest.raises(BundleError, match="random-v1 holds v1 networks, and v3 ones are needed"):
        load_v3(random_v1_bundle, CPU, torch.float32)


def test_v1_networks_come_back_bit_for_bit(random_v1_bundle, tmp_path):
    loaded = load_bundle(random_v1_bundle, CPU, torch.float32)
    saved = random_networks(write_merges(tmp_path), micro_v1_config())
    for (name, one), (_, other) in zip(saved.networks(), loaded.networks(), strict=True):
        assert all(torch.equal(t, state_of(other)[key]) for key, t in state_of(one).items()), name


def test_leftovers_of_an_interrupted_save_are_no_obstacle(random_bundle, tmp_path):
    out = tmp_path / "new"
    (tmp_path / "new.partial").write_text("a file where an earlier save had its directory")
    save_bundle(
        load_bundle(random_bundle, CPU, torch.float32),
        out,
        torch.float32,
        random_bundle / "merges.txt.gz",
    )
    load(out)
    assert {path.name for path in tmp_path.iterdir()} == {"new", "new.partial"}


def test_a_save_that_fails_leaves_the_old_bundle_as_it_was(directory, monkeypatch):
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    loaded = load_bundle(directory, CPU, torch.float32)
    with pytest.raises(FileNotFoundError):
        save_bundle(loaded, directory, torch.float16, merges=directory / "no such file")
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before
    assert list(directory.parent.iterdir()) == [directory]


def test_a_saved_bundle_s_files_can_be_read_by_whom_the_umask_says(directory):
    loaded = load_bundle(directory, CPU, torch.float32)
    before = os.umask(0o027)
    try:
        save_bundle(loaded, directory, torch.float32, directory / "merges.txt.gz")
    finally:
        os.umask(before)
    weights = list(directory.glob("*.safetensors"))
    assert weights
    assert {stat.S_IMODE(path.stat().st_mode) for path in weights} == {0o640}


def test_saving_over_a_bundle_replaces_it(directory):
    loaded = load_bundle(directory, CPU, torch.float32)
    loaded.prior.get_parameter("blocks.0.bias").data.fill_(7)
    save_bundle(loaded, directory, torch.float32, directory / "merges.txt.gz")
    assert (
        load_bundle(directory, CPU, torch.float32).prior.get_parameter("blocks.0.bias") == 7
    ).all()


def test_a_bundle_can_be_built_without_weights_or_memory(random_bundle):
    bundle = build(BundleConfig.read(random_bundle), random_bundle)
    assert all(p.is_meta for _, module in bundle.networks() for p in module.parameters())


def test_read_tensors_takes_integers_and_empty_files(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"counts": torch.arange(3)}, path)
    assert read_tensors(path)["counts"].tolist() == [0, 1, 2]
    save_file({}, path)
    assert read_tensors(path) == {}


# ── names that lead out of the bundle, and formats to come ────────────────────────────────────────


def list_as(directory: Path, name: str) -> None:
    config = BundleConfig.read(directory)
    replace(config, files={**config.files, name: config.files["merges.txt.gz"]}).write(directory)


@pytest.mark.parametrize(
    "name",
    [
        "../merges.txt.gz",
        "sub/../merges.txt.gz",
        "..",
        ".",
        "",
        "/etc/hostname",
        "sub\\merges.txt.gz",
    ],
)
def test_a_listed_name_that_is_no_plain_file_name_is_refused(directory, name):
    # Such a file was read wherever it lay.
    shutil.copyfile(directory / "merges.txt.gz", directory.parent / "merges.txt.gz")
    list_as(directory, name)
    with pytest.raises(BundleError, match="no plain file name"):
        load(directory)


def test_a_symbolic_link_out_of_the_bundle_is_refused(directory):
    # Such a link was followed.
    outside = directory.parent / "outside.safetensors"
    (directory / "prior.safetensors").rename(outside)
    (directory / "prior.safetensors").symlink_to(outside)
    with pytest.raises(
        BundleError, match=r"prior\.safetensors is a symbolic link out of the bundle"
    ):
        load(directory)


def test_a_bundle_may_itself_be_reached_through_a_symbolic_link(directory):
    link = directory.parent / "link"
    link.symlink_to(directory, target_is_directory=True)
    verify_files(link, BundleConfig.read(link))


def test_a_newer_format_is_refused_as_that_before_its_unknown_fields_are(directory):
    path = directory / CONFIG_FILE
    path.write_text(path.read_text().replace('"format": 1', '"format": 5, "surprise": 1'))
    with pytest.raises(
        ValidationError, match="these weights are of format 5, this Paellera reads formats up to 4"
    ) as refusal:
        load(directory)
    assert "surprise" not in str(refusal.value)


def test_a_bundle_that_states_no_format_is_of_the_first(directory):
    path = directory / CONFIG_FILE
    fields = json.loads(path.read_text())
    assert fields.pop("format") == 1
    path.write_text(json.dumps(fields))
    assert BundleConfig.read(directory).format == 1
