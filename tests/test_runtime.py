"""What a process does before it computes works in a fresh one, and a second time."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from model.runtime import declare_missing_torchvision_operators, pick_device, pick_dtype, prepare

pytestmark = pytest.mark.process


def run_fresh(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_open_clip_and_transformers_import_after_prepare_in_a_fresh_interpreter():
    done = run_fresh(
        "from model.runtime import prepare\n"
        "prepare(); prepare()\n"
        "import open_clip\n"
        "from transformers import ByT5Tokenizer, T5EncoderModel\n"
        "prepare()\n"
        "print(open_clip.CLIP.__name__, T5EncoderModel.__name__)"
    )
    assert done.stdout == "CLIP T5EncoderModel\n", done.stderr
    assert done.stderr == ""


def test_importing_a_network_computes_and_declares_nothing():
    done = run_fresh(
        "import sys, model.pipeline, model.training.denoiser, model.training.clip\n"
        "print(*sorted({'open_clip', 'transformers', 'torchvision'} & set(sys.modules)))\n"
        "import model.runtime\n"
        "print(len(model.runtime._libraries))"
    )
    assert done.stdout == "\n0\n", done.stderr


def test_a_bundle_loads_in_a_process_that_prepared_nothing():
    done = run_fresh(
        "import torch\n"
        "from model.bundle import load_v3\n"
        "from model.config import find_bundle\n"
        "load_v3(find_bundle('tiny'), torch.device('cpu'), torch.float32)\n"
        "print('loaded')"
    )
    assert done.stdout == "loaded\n", done.stderr


def test_prepare_may_be_called_again_with_another_thread_count():
    before = torch.get_num_threads()
    try:
        prepare(threads=1)
        assert torch.get_num_threads() == 1
        prepare()
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(
    torch.version.cuda is not None, reason="a CUDA build of torch brings torchvision's operators"
)
def test_the_missing_operators_are_declared_and_not_implemented():
    declare_missing_torchvision_operators()
    assert "Tensor dets, Tensor scores, float iou_threshold" in str(
        torch.ops.torchvision.nms.default._schema
    )
    with pytest.raises(NotImplementedError):
        torch.ops.torchvision.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)


def test_a_named_device_is_taken_at_its_word_if_it_is_there(monkeypatch):
    assert pick_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(ValueError, match="'cuda:2' is not there: this machine has 2"):
        pick_device("cuda:2")


@pytest.mark.parametrize("name", ["gpu", "xpu", "meta", "cuda:x", ""])
def test_an_unknown_device_is_refused_with_those_that_are_known(name):
    with pytest.raises(ValueError, match="is none of auto, cpu, cuda, cuda:1 and mps"):
        pick_device(name)


def test_an_unknown_dtype_is_refused_with_those_that_are_known():
    with pytest.raises(ValueError, match="'fp16x' is none of auto, float32, float16, bfloat16"):
        pick_dtype("fp16x", torch.device("cpu"))


@pytest.mark.parametrize(("cuda", "expected"), [(True, "cuda"), (False, "cpu")])
def test_auto_is_cuda_where_there_is_one(monkeypatch, cuda, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    assert pick_device().type == expected


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16"])
def test_a_named_dtype_is_taken_at_its_word(name):
    assert pick_dtype(name, torch.device("cpu")) == getattr(torch, name)


@pytest.mark.parametrize(
    ("device", "bf16", "expected"),
    [("cuda", False, "float16"), ("cpu", True, "bfloat16"), ("cpu", False, "float32")],
)
def test_auto_dtype_is_what_the_device_multiplies_fastest(monkeypatch, device, bf16, expected):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16)
    assert pick_dtype("auto", torch.device(device)) == getattr(torch, expected)
