"""Importing: published checkpoints become a bundle that computes with them, and bad ones are
refused with file and tensor.
"""

from __future__ import annotations

import gzip
import json
import pickle
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file
from typer.testing import CliRunner

from model import bundle_files
from model.bundle import load_bundle
from model.bundle_files import BundleError
from model.checkpoints import convert
from model.checkpoints.checkpoint import open_checkpoint, read_state
from model.checkpoints.convert import import_bundle
from model.config import BundleConfig, BundleV1Config
from model.networks.text_encoders import check_merges
from model.pipeline import Pipeline
from server.cli import app
from tests.conftest import NETWORKS, golden
from tests.support.pickles import Explosive

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def states(random_bundle: Path) -> dict[str, Tensors]:
    """Every network's published state dict."""
    return {name: load_file(random_bundle / f"{name}.safetensors") for name in NETWORKS}


@pytest.fixture
def sources(states: dict[str, Tensors], tmp_path: Path) -> dict[str, Path]:
    """The five checkpoints as their authors save them: pickles of bare state dicts, ByT5 with
    its decoder.
    """
    paths = {name: tmp_path / f"{name}.pt" for name in NETWORKS}
    for name, path in paths.items():
        decoder = (
            {"decoder.block.0.weight": torch.ones(2), "lm_head.weight": torch.ones(2)}
            if name == "byt5"
            else {}
        )
        torch.save(states[name] | decoder, path)
    return paths


@pytest.fixture
def run(
    random_bundle: Path, sources: dict[str, Path], tmp_path: Path
) -> Callable[..., BundleConfig]:
    """Imports the checkpoints, some of them replaced."""

    def run(dtype: torch.dtype = torch.float16, **changed: Path) -> BundleConfig:
        config = BundleConfig.read(random_bundle)
        return import_bundle(
            sources | changed, config, tmp_path / "out", dtype, random_bundle / "merges.txt.gz"
        )

    return run


def refusal(run: Callable[..., BundleConfig], tmp_path: Path, **changed: Path) -> str:
    """The message of a refused import, which leaves nothing behind."""
    with pytest.raises(BundleError) as error:
        run(**changed)
    assert not list(tmp_path.glob("out*"))
    return str(error.value)


def saved(content: Any, path: Path) -> Path:
    torch.save(content, path)
    return path


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_an_imported_bundle_holds_every_tensor_rounded_once(run, states, tmp_path, dtype):
    run(dtype)
    for name in NETWORKS:
        written = load_file(tmp_path / "out" / f"{name}.safetensors")
        assert written.keys() == states[name].keys()
        for key, tensor in states[name].items():
            assert torch.equal(
                written[key], tensor.to(dtype) if tensor.is_floating_point() else tensor
            ), key
    load_bundle(tmp_path / "out", torch.device("cpu"), torch.float32)


def test_what_was_imported_is_not_hashed_again(run, tmp_path, monkeypatch):
    monkeypatch.setattr(bundle_files, "LARGE", 1)
    run()
    monkeypatch.setattr(bundle_files, "is_hashed", lambda *_: pytest.fail("hashed"))
    load_bundle(tmp_path / "out", torch.device("cpu"), torch.float32)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"state_dict": state, "epoch": 3, "optimizer": {"param_groups": []}},
        lambda state: {
            "state_dict": {name: torch.zeros_like(t) for name, t in state.items()},
            "ema_state_dict": state,
        },
        lambda state: {"model": {"state_dict": state}},
        lambda state: {f"module._orig_mod.{name}": tensor for name, tensor in state.items()},
        *(
            lambda state, prefix=prefix: {
                "model": {f"{prefix}{name}": torch.zeros_like(t) for name, t in state.items()},
                "ema": {f"{prefix}{name}": t for name, t in state.items()}
                | {"beside.weight": torch.zeros(2)},
                "step": 3,
            }
            for prefix in ("denoiser.", "vqgan.", "t5.", "model.")
        ),
    ],
    ids=["training", "averaged", "nested", "distributed", "denoiser", "vqgan", "t5", "clip"],
)
def test_training_checkpoints_are_unwrapped(states, tmp_path, wrap):
    state = read_state(saved(wrap(states["prior"]), tmp_path / "training.pt"))
    assert state.keys() == states["prior"].keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in states["prior"].items())


def test_shards_are_one_checkpoint_and_an_absent_one_is_named(run, states, tmp_path):
    names = list(states["byt5"])
    shards = {"one.bin": names[::2], "two.bin": names[1::2]}
    for shard, held in shards.items():
        saved({name: states["byt5"][name] for name in held}, tmp_path / shard)
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(
        json.dumps({"weight_map": {name: shard for shard, held in shards.items() for name in held}})
    )
    assert open_checkpoint(index).tensors.keys() == states["byt5"].keys()
    (tmp_path / "two.bin").unlink()
    assert (
        refusal(run, tmp_path, byt5=index)
        == "pytorch_model.bin.index.json: shard two.bin is missing"
    )


def v1_sources(directory: Path, tmp_path: Path) -> dict[str, Path]:
    """The three checkpoints of the v1 family, the VQGAN's as its training left it."""
    states = {
        name: load_file(directory / f"{name}.safetensors") for name in BundleV1Config.networks
    }
    trained = states | {
        "vqgan": {
            "state_dict": states["vqgan"] | {"loss.discriminator.main.0.weight": torch.ones(2)},
            "epoch": 3,
        }
    }
    return {name: saved(content, tmp_path / f"{name}.pt") for name, content in trained.items()}


def test_v1_checkpoints_become_a_bundle_that_draws(random_v1_bundle, tmp_path):
    config = BundleConfig.read(random_v1_bundle)
    merges = random_v1_bundle / "merges.txt.gz"
    import_bundle(
        v1_sources(random_v1_bundle, tmp_path), config, tmp_path / "out", torch.float16, merges
    )
    written = load_file(tmp_path / "out" / "denoiser.safetensors")
    assert all(
        torch.equal(written[name], t.half())
        for name, t in load_file(random_v1_bundle / "denoiser.safetensors").items()
    )
    assert Pipeline.load(tmp_path / "out").generate(["red apple"], [0]).shape == (1, 32, 32, 3)


def test_the_v3_denoiser_is_not_taken_for_the_v1_one(random_v1_bundle, sources, tmp_path):
    config = BundleConfig.read(random_v1_bundle)
    with pytest.raises(BundleError, match="it is the v3 denoiser"):
        import_bundle(
            sources, config, tmp_path / "out", torch.float16, random_v1_bundle / "merges.txt.gz"
        )
    assert not (tmp_path / "out").exists()


# ── refusals ──────────────────────────────────────────────────────────────────────────────────────


def test_a_checkpoint_of_another_network_is_called_by_its_name(run, sources, tmp_path):
    message = refusal(run, tmp_path, vqgan=sources["denoiser"])
    assert (
        message == "denoiser.pt is not this bundle's vqgan: "
        "tensor 'byt5_mapper.weight' says that it is the v3 denoiser"
    )


def test_the_v1_denoiser_is_not_taken_for_the_v3_one(run, tmp_path):
    _, weights, _ = golden("denoiser_v1")
    message = refusal(run, tmp_path, denoiser=saved(weights, tmp_path / "f8_600000.pt"))
    assert message.startswith("f8_600000.pt is not this bundle's denoiser: ")
    assert message.endswith("it is the v1 denoiser")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("blocks.1.1.bias"), "tensor 'blocks.1.1.bias' is missing"),
        (lambda t: t.update(surprise=torch.ones(1)), "tensor 'surprise' is unknown"),
        (lambda t: t.update({"blocks.1.1.bias": torch.ones(1)}), "tensor 'blocks.1.1.bias' is [1]"),
        (
            lambda t: t.update({"blocks.1.1.bias": t["blocks.1.1.bias"].double()}),
            "tensor 'blocks.1.1.bias' is torch.float64",
        ),
        (
            lambda t: t.update({"blocks.1.1.bias": t["blocks.1.1.bias"] + torch.nan}),
            "tensor 'blocks.1.1.bias' holds NaN",
        ),
        (
            lambda t: t.update({"blocks.1.1.bias": t["blocks.1.1.bias"] * 0 + 1e5}),
            "'blocks.1.1.bias' holds 100000, which float16 cannot",
        ),
        (
            lambda t: t.update({"blocks.1.1.bias": t["blocks.1.1.bias"].to_sparse()}),
            "tensor 'blocks.1.1.bias' is no plain array",
        ),
        (lambda t: t.update(epoch=3), "entry 'epoch' is no tensor"),
    ],
)
def test_a_wrong_tensor_is_refused_by_name(run, states, tmp_path, change, words):
    tensors = dict(states["prior"])
    change(tensors)
    message = refusal(run, tmp_path, prior=saved(tensors, tmp_path / "wrong.pt"))
    assert message.startswith("wrong.pt: ")
    assert words in message


def test_an_optimizer_s_state_is_called_that(run, tmp_path):
    path = saved({"state": {}, "param_groups": [{"lr": 1e-4}]}, tmp_path / "optimizer.pt")
    assert "optimizer.pt: this is an optimizer's state" in refusal(run, tmp_path, denoiser=path)


@pytest.mark.parametrize("share", [0.5, 0.99])
def test_a_truncated_pickle_is_refused(run, sources, tmp_path, share):
    content = sources["denoiser"].read_bytes()
    sources["denoiser"].write_bytes(content[: int(len(content) * share)])
    assert (
        refusal(run, tmp_path) == "denoiser.pt is cut short: the end of its zip archive is missing"
    )


@pytest.mark.parametrize(
    "content", [b"", b"<html>Not Found</html>", b"version https://git-lfs.github.com/spec/v1\n"]
)
def test_what_is_no_checkpoint_is_refused(run, sources, tmp_path, content):
    sources["denoiser"].write_bytes(content)
    assert refusal(run, tmp_path).startswith("denoiser.pt is refused: ")


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_pickle_that_torch_did_not_write_is_refused_without_torch_s_words(
    run, sources, tmp_path, protocol
):
    sources["denoiser"].write_bytes(pickle.dumps({"a": [1.0]}, protocol=protocol))
    message = refusal(run, tmp_path)
    assert message.endswith("it is no checkpoint that torch.save wrote, or it is damaged")


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_with_code_in_it_is_refused_and_nothing_runs(run, tmp_path, zipped):
    mark, path = tmp_path / "opened", tmp_path / "hostile.pt"
    if zipped:
        torch.save({"weight": Explosive(mark)}, path)
    else:
        path.write_bytes(pickle.dumps({"weight": Explosive(mark)}, protocol=2))
    assert "hostile.pt is refused: " in refusal(run, tmp_path, denoiser=path)
    assert not mark.exists()


def test_a_shard_s_name_may_not_lead_elsewhere(tmp_path):
    index = tmp_path / "x.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../../a.bin"}}))
    with pytest.raises(BundleError, match="no plain file name"):
        open_checkpoint(index)


# ── all or nothing ────────────────────────────────────────────────────────────────────────────────


def test_an_interruption_leaves_nothing(run, tmp_path, monkeypatch):
    def interrupted(file: object, piece: torch.Tensor) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(convert, "_append", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run()
    assert not list(tmp_path.glob("out*"))


def test_what_is_there_is_never_overwritten(run, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(BundleError, match="exists already"):
        run()


def test_a_disk_that_is_too_small_is_noticed_before_anything_is_written(run, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(convert.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match="only 1,000 are free"):
        run()
    assert not list(tmp_path.glob("out*"))


# Not by getrusage: there a process inherits the peak of the one that started it.
MEASURE = """
import os, sys, torch
from pathlib import Path
from load_tests.processes import resident_mib
from model.checkpoints.checkpoint import open_checkpoint
from model.checkpoints.convert import _write
baseline = resident_mib(os.getpid(), peak=True)
_write(Path(sys.argv[2]), open_checkpoint(Path(sys.argv[1])), torch.float16, lambda size: None)
print((resident_mib(os.getpid(), peak=True) - baseline) * 2**20)
"""


@pytest.mark.process
def test_memory_is_bounded_by_the_largest_tensor_and_not_by_the_file(tmp_path):
    largest = 16 * 2**20
    path = saved({f"layer.{i}": torch.ones(largest // 4) for i in range(24)}, tmp_path / "large.pt")
    command = [sys.executable, "-c", MEASURE, str(path), str(tmp_path / "large.safetensors")]
    peak = float(
        subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    )
    assert largest < peak < 1.3 * largest + 240e6 < path.stat().st_size


# ── the command ───────────────────────────────────────────────────────────────────────────────────


def paellera_import(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["weights", "import", *map(str, arguments)])


def test_the_command_replaces_one_network_of_a_bundle_and_the_result_verifies(
    random_bundle, sources, tmp_path
):
    result = paellera_import(
        random_bundle,
        tmp_path / "new",
        "--prior",
        sources["prior"],
        "--dtype",
        "bfloat16",
        "--recipe",
        "demo",
    )
    assert result.exit_code == 0, result.output
    assert BundleConfig.read(tmp_path / "new").recipe.num_inference_steps == 32
    assert CliRunner().invoke(app, ["weights", "verify", str(tmp_path / "new")]).exit_code == 0


def test_the_command_tells_what_is_wrong_in_one_line(random_bundle, sources, tmp_path):
    result = paellera_import(random_bundle, tmp_path / "new", "--prior", sources["vqgan"])
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("paellera: vqgan.pt is not this bundle's prior")


# ── hostile files ─────────────────────────────────────────────────────────────────────────────────


def import_refused(bundle: Path, tmp_path: Path, prior: Path) -> str:
    """The one line of a refused `weights import`, which takes a minute at most."""
    command = ["weights", "import", str(bundle), str(tmp_path / "out"), "--prior", str(prior)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith("paellera: ")
    assert line.isprintable()
    return line


def test_dicts_that_contain_themselves_or_are_too_deep_are_refused(random_bundle, tmp_path, states):
    itself: dict[str, Any] = {}
    itself["model"] = itself
    path = saved(itself, tmp_path / "itself.pt")
    assert "no state dict within" in import_refused(random_bundle, tmp_path, path)
    deep = states["prior"]
    for _ in range(5):
        deep = {"model": deep}
    path = saved(deep, tmp_path / "deep.pt")
    assert "no state dict within" in import_refused(random_bundle, tmp_path, path)


def test_compressed_members_are_refused_before_they_are_unpacked(random_bundle, tmp_path):
    path = tmp_path / "bomb.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb/data.pkl", bytes(50 * 2**20))
        archive.writestr("bomb/version", "3")
    assert path.stat().st_size < 2**20
    line = import_refused(random_bundle, tmp_path, path)
    assert "'bomb/data.pkl' is compressed" in line


def test_an_oversized_pickle_is_refused(random_bundle, tmp_path, monkeypatch):
    monkeypatch.setattr("model.checkpoints.checkpoint.MAX_PICKLE_BYTES", 100)
    path = saved({f"a{i}": torch.ones(1) for i in range(10)}, tmp_path / "large.pt")
    assert "100 are allowed" in import_refused(random_bundle, tmp_path, path)


@pytest.mark.parametrize(
    "content",
    [
        b"[" * 100_000,
        b'{"weight_map": []}',
        b'{"weight_map": {}}',
        b'{"weight_map": {"a": 5}}',
        b'{"weight_map": {"a": ["x"]}}',
        b'{"weight_map": {"a": "one", "b": null}}',
        b'{"weight_map": {"a": ""}}',
        b'{"weight_map": {"a": "\\u001b[31m/x"}}',
        b"\xff\xfe",
    ],
)
def test_an_index_with_wrong_types_is_refused(random_bundle, tmp_path, content):
    path = tmp_path / "model.index.json"
    path.write_bytes(content)
    assert "model.index.json" in import_refused(random_bundle, tmp_path, path)


@pytest.mark.parametrize("content", [{(("a",),): 1}, {"a\x1b[31m": 1}, {"x" * 600: torch.ones(1)}])
def test_odd_keys_are_refused_in_printable_words(random_bundle, tmp_path, content):
    import_refused(random_bundle, tmp_path, saved(content, tmp_path / "odd.pt"))


def test_a_merges_file_that_unpacks_to_too_much_is_refused(tmp_path):
    path = tmp_path / "merges.txt.gz"
    path.write_bytes(gzip.compress(bytes(20 * 2**20)))
    with pytest.raises(ValueError, match="when unpacked"):
        check_merges(path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="no gzipped text"):
        check_merges(path)
