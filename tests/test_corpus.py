"""The corpus: the same whatever the processes, complete, and the same after a trip to a file."""

from __future__ import annotations

import os
import stat
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from model.training import corpus
from model.training.captions import ATTRIBUTES, LONGEST, PLACES, THING_ATTRIBUTES
from model.training.scenes import ASPECTS, Scene, Thing


@pytest.fixture(scope="module")
def small() -> corpus.Corpus:
    return corpus.generate(600, seed=3)


def test_shapes_and_ranges(small):
    n = len(small)
    assert n == 600
    assert small.text.shape == (n, 2, LONGEST)
    assert small.text.dtype == torch.uint8
    assert small.stated.shape == (n, 2, len(ATTRIBUTES))
    assert small.span.shape == (n, 2, len(PLACES), 2)
    assert small.things.shape == (n, 2, len(PLACES), len(THING_ATTRIBUTES))
    assert small.layouts.sprite.shape == (n, 4)
    for index, classes in enumerate(ATTRIBUTES.values()):
        assert 0 <= small.stated[..., index].min() <= small.stated[..., index].max() < classes
    for index, classes in enumerate(THING_ATTRIBUTES.values()):
        assert -1 <= small.things[..., index].min() <= small.things[..., index].max() < classes
    assert {*small.aspect.tolist()} == {*range(len(ASPECTS))}


def test_both_captions_are_about_the_picture(small):
    shown = small.layouts.background.long()
    for which in range(2):
        stated = small.stated[:, which, list(ATTRIBUTES).index("background")].long()
        assert ((stated == 0) | (stated == 1 + shown)).all()
        kinds = small.stated[:, which, list(ATTRIBUTES).index("kind_1")].long()
        assert (kinds == 1 + small.layouts.sprite[:, 0].long()).all()
    different = [small.caption(i, 0) != small.caption(i, 1) for i in range(len(small))]
    assert np.mean(different) > 0.95


def test_spans_and_lengths_fit_the_bytes(small):
    for i in range(len(small)):
        for which in range(2):
            length = int(small.length[i, which])
            assert 0 < length < LONGEST
            assert not small.text[i, which, length:].any()
            assert small.text[i, which, :length].all()
            assert small.span[i, which].max() <= length
            there = small.things[i, which, :, 0] >= 0
            start, stop = small.span[i, which].unbind(-1)
            assert torch.equal(there, start < stop)


@pytest.mark.process
def test_the_number_of_processes_changes_nothing(monkeypatch):
    monkeypatch.setattr(corpus, "_CHUNK", 50)
    alone, two = (corpus.sample_arrays(120, 5, processes) for processes in (1, 2))
    assert alone.keys() == two.keys()
    assert all(np.array_equal(alone[name], two[name]) for name in alone)
    assert not np.array_equal(alone["text"], corpus.sample_arrays(120, 6, 1)["text"])


def test_the_command_line_samples_the_mixture_it_names(monkeypatch, tmp_path):
    found = {}
    for name in ("full", "first"):
        out = tmp_path / f"{name}.safetensors"
        arguments = [str(out), "--images", "3000", "--processes", "1", "--mixture", name]
        monkeypatch.setattr("sys.argv", ["corpus", *arguments])
        corpus.main()
        layouts = corpus.load(out).layouts
        found[name] = ((layouts.sprite >= 0).sum(1) == 1) & (layouts.length[:, 0] == 176)
    assert found["first"].sum() > 1.2 * found["full"].sum()


def test_a_file_holds_everything(small, tmp_path):
    small.save(tmp_path / "corpus.safetensors")
    again = corpus.load(tmp_path / "corpus.safetensors")
    for name in corpus._FIELDS:
        assert torch.equal(getattr(again, name), getattr(small, name))
    for name in corpus._layout_arrays(0):
        assert torch.equal(getattr(again.layouts, name), getattr(small.layouts, name))


def test_a_saved_file_can_be_read_by_whom_the_umask_says(small, tmp_path):
    before = os.umask(0o027)
    try:
        small.save(tmp_path / "corpus.safetensors")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "corpus.safetensors").stat().st_mode) == 0o640


def test_a_file_that_is_no_corpus_is_called_that(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no corpus .*absent: `python -m"):
        corpus.load(tmp_path / "absent")
    (tmp_path / "text").write_text("no corpus")
    with pytest.raises(ValueError, match="text is no corpus"):
        corpus.load(tmp_path / "text")
    save_file({"other": np.zeros(3)}, tmp_path / "other")
    with pytest.raises(ValueError, match="other is no corpus"):
        corpus.load(tmp_path / "other")


def test_the_place_of_the_corpus_is_checked_before_it_is_sampled(monkeypatch, tmp_path):
    monkeypatch.setattr(corpus, "sample_arrays", lambda *_: pytest.fail("sampled"))
    monkeypatch.setattr(sys, "argv", ["corpus", str(tmp_path)])
    with pytest.raises(ValueError, match="is a folder; name a file"):
        corpus.main()


@pytest.mark.process
def test_sampling_needs_no_torch():
    code = "import sys; from model.training import corpus; corpus.sample_arrays(20, 0, 1); "
    code += "sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_layouts_of_given_scenes():
    scenes = [Scene("red", (Thing("star", "blue"),)), Scene("sea")]
    drawn = corpus.layouts(scenes, seed=0)
    assert (drawn.sprite >= 0).sum(1).tolist() == [1, 0]
    assert torch.equal(drawn.params, corpus.layouts(scenes, seed=0).params)
