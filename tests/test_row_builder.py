"""What each operation's rows read and begin from, on networks of random weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from model.batch_encoder import DictCache
from model.image_request import Edit, Keyframe, Reference, Region, Repaint
from server.engine.runner import Runner, Stopwatch
from server.engine.scheduler import RowId
from server.settings import Settings
from tests.conftest import emptied
from tests.support.operation_inputs import (
    CANVAS,
    EVERY_KIND,
    drawn,
    mask,
    picture,
    tokens_of,
    weight,
)
from tests.support.workers import SAMPLING, Far, far_fixture, job  # noqa: F401, fixtures

FIXED = replace(SAMPLING, deterministic=True)


FRAMES = {"seeds": (0, 0, 0), "keyframes": (Keyframe("red apple"), Keyframe("the red apple"))}


@pytest.fixture(name="runner")
def _fresh(runner: Runner) -> Runner:
    return emptied(runner)


def test_tokens_under_the_mask_are_drawn_and_the_others_are_the_pictures(runner):
    (tokens,) = drawn(runner, job("a", canvas=CANVAS))
    own = tokens_of(runner, CANVAS.image)
    assert torch.equal(tokens[:, 4:], own[:, 4:])
    assert (tokens[:, :4] != own[:, :4]).float().mean() > 0.5


def test_one_masked_pixel_has_its_token_drawn(runner):
    images = drawn(runner, job("a", seeds=(0, 1, 2, 3), canvas=Repaint(picture(), mask(1, 1))))
    own = tokens_of(runner, picture())
    # One seed may draw the very token that was there.
    assert {tuple(at) for tokens in images for at in (tokens != own).nonzero().tolist()} == {(0, 0)}


def test_a_mask_of_everything_is_generating(runner):
    (tokens,) = drawn(runner, job("a", canvas=Repaint(picture(), mask(32, 32))))
    assert torch.equal(tokens, drawn(runner, job("b"))[0])


def test_an_edit_of_strength_zero_is_the_picture_and_one_of_strength_one_ignores_it(runner):
    none, all_of_it = drawn(
        runner, job("a", canvas=Edit(picture(), 0.0)), job("b", canvas=Edit(picture(), 1.0))
    )
    assert torch.equal(none, tokens_of(runner, picture()))
    assert torch.equal(all_of_it, drawn(runner, job("c"))[0])


def test_variations_ask_no_prior_and_follow_their_pictures_and_weights(runner, monkeypatch):
    monkeypatch.setattr(type(runner.pipelines["random"]), "prior_embeddings", None)
    one, other = Reference(picture(1), 1.0), Reference(picture(2), 1.0)
    each = [
        (one,),
        (other,),
        (one, other),
        (one, replace(other, weight=0.1)),
        (one, replace(other, weight=0.0)),
    ]
    drawn(runner, *(job(str(i), references=r, prompt="") for i, r in enumerate(each)))
    first, second, both, mostly, only = (
        runner.rows[RowId(str(i), 0)].conditional.kv for i in range(5)
    )
    torch.testing.assert_close(only, first)
    distances = [(mixed - first).norm().item() for mixed in (mostly, both, second)]
    assert 0 < distances[0] < distances[1] < distances[2]


def test_the_first_and_the_last_frame_are_what_their_prompts_draw_with_the_same_seed(runner):
    ends = drawn(runner, job("a", **FRAMES))
    alone = drawn(runner, job("b"), job("c", prompt="the red apple"))
    assert torch.equal(ends[0], alone[0])
    assert torch.equal(ends[-1], alone[1])


def test_a_prior_is_asked_once_for_a_keyframe_however_many_frames(runner, monkeypatch):
    asked: list[int] = []
    pipeline = runner.pipelines["random"]
    draw = pipeline.prior_embeddings
    monkeypatch.setattr(
        pipeline,
        "prior_embeddings",
        lambda prompts, *rest: asked.append(len(prompts)) or draw(prompts, *rest),
    )
    drawn(runner, job("a", **FRAMES | {"seeds": (0,) * 6}))
    assert asked == [2]


def test_without_noise_the_prior_is_asked_once_for_a_prompt_whatever_the_seeds(runner, monkeypatch):
    asked: list[int] = []
    pipeline = runner.pipelines["random"]
    settings, draw = pipeline.prior_settings(), pipeline.prior_embeddings
    monkeypatch.setattr(
        pipeline, "prior_settings", lambda sampling=None: settings._replace(temperature=0.0)
    )
    monkeypatch.setattr(
        pipeline,
        "prior_embeddings",
        lambda prompts, *rest: asked.append(len(prompts)) or draw(prompts, *rest),
    )
    one, other = drawn(runner, job("a", seeds=(0, 1)))
    assert not torch.equal(one, other)
    (again,) = drawn(runner, job("b", seeds=(1,)))
    assert torch.equal(again, other)
    assert asked == [1]


def test_a_region_of_full_weight_everywhere_is_its_prompt(runner):
    (tokens,) = drawn(runner, job("a", regions=(Region("the red apple", weight()),)))
    assert torch.equal(tokens, drawn(runner, job("b", prompt="the red apple"))[0])


def test_a_negative_prompt_that_is_cut_is_told_unless_nothing_reads_it(runner):
    long = job("a", negative_prompt="the red apple " * 20)
    unread = replace(long, id="b", sampling=replace(SAMPLING, guidance_steps=0))
    parts = [(each, range(1)) for each in (long, unread, job("c"))]
    assert runner.start(parts, Stopwatch()) == [("byt5", "clip"), (), ()]


def test_pictures_are_encoded_once_and_together_with_those_of_other_arrivals(runner, monkeypatch):
    batches: list[int] = []
    pipeline = runner.pipelines["random"]
    codes = pipeline.encode_images
    monkeypatch.setattr(
        pipeline, "encode_images", lambda pictures: batches.append(len(pictures)) or codes(pictures)
    )
    jobs = [job(str(i), canvas=Repaint(picture(i % 2), mask(16, 16))) for i in range(4)]
    drawn(runner, *jobs)
    drawn(runner, replace(jobs[0], id="again"))
    assert batches == [2]
    assert runner.counters["prompt_cache_hits", "picture"] == 1


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_encodings_are_shared_within_a_scope_only(runner, kind):
    def hits() -> int:
        return sum(
            count for (name, _), count in runner.counters.items() if name == "prompt_cache_hits"
        )

    mine = job("a", cache_scope="one", **EVERY_KIND[kind])
    tokens = drawn(runner, mine)
    within = hits()
    theirs = drawn(runner, replace(mine, id="b", cache_scope="other"))
    assert hits() == 2 * within, "as if nobody had asked before"
    assert all(map(torch.equal, tokens, theirs)), "it changes no image"
    drawn(runner, replace(mine, id="c"))
    assert hits() > 3 * within


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_a_deterministic_job_of_any_kind_has_the_same_tokens_in_any_company(runner, kind):
    alone = drawn(runner, job("a", sampling=FIXED, **EVERY_KIND[kind]))
    runner = emptied(runner)
    mine = job("b", sampling=FIXED, **EVERY_KIND[kind])
    others = [
        job(f"{other}{i}", prompt="apple", **parts)
        for i, (other, parts) in enumerate(EVERY_KIND.items())
    ]
    runner.start([(each, range(len(each.seeds))) for each in (*others, mine)], Stopwatch())
    rows = [RowId("b", i) for i in range(len(mine.seeds))]
    for row in rows:
        while not runner.rows[row].done:
            runner.step("random", [row])
    assert all(
        torch.equal(runner.rows[row].tokens, tokens)
        for row, tokens in zip(rows, alone, strict=True)
    )


def test_the_first_generation_does_all_of_it_too(random_v1_bundle):
    runner = Runner(Settings(weights=str(random_v1_bundle), device="cpu", dtype="float32"))
    sampling = replace(SAMPLING, sampler="typical", schedule="cosine")
    jobs = [
        job(kind, model="random-v1", sampling=sampling, **parts)
        for kind, parts in EVERY_KIND.items()
    ]
    made = drawn(runner, *jobs)
    assert len(made) == sum(len(each.seeds) for each in jobs)
    assert len({tuple(tokens.flatten().tolist()) for tokens in made}) > len(EVERY_KIND)


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_every_kind_comes_back_from_a_worker(far: Far, kind):
    far.send(job(kind, **EVERY_KIND[kind]))
    answer = far.answer(kind)
    assert [len(image.pixels) for image in answer.images] == [32 * 32 * 3] * len(
        EVERY_KIND[kind].get("seeds", (0,))
    )


def test_an_edit_without_a_step_comes_back_as_the_reconstruction(far: Far, pipeline):
    far.send(job("a", canvas=Edit(picture(), 0.0)))
    pixels = np.frombuffer(far.answer("a").images[0].pixels, np.uint8)
    shown = torch.frombuffer(bytearray(picture().content), dtype=torch.uint8).view(1, 32, 32, 3)
    assert np.array_equal(pixels, pipeline.decode(pipeline.encode_images(shown)).flatten().numpy())


def test_an_early_job_sends_each_image_and_then_all_of_them(far: Far):
    far.send(job("a", early=True, **FRAMES))
    early = [far.receive(lambda m: hasattr(m, "image")).image for _ in range(3)]
    assert {image.index: bytes(image.pixels) for image in early} == {
        i.index: bytes(i.pixels) for i in far.answer("a").images
    }


def test_a_job_crosses_the_pipe_with_its_pictures_beside_the_pickle(tmp_path: Path):
    import pickle

    sent = job("a", canvas=CANVAS, regions=(Region("on", weight()),))
    buffers: list[pickle.PickleBuffer] = []
    header = pickle.dumps(sent, protocol=5, buffer_callback=buffers.append)
    assert len(header) < 1500
    assert sum(len(buffer.raw()) for buffer in buffers) == 32 * 32 * 5
    received = pickle.loads(header, buffers=[bytes(buffer.raw()) for buffer in buffers])
    assert received == sent == pickle.loads(pickle.dumps(sent, protocol=4))


def test_positions_of_frames_are_even_and_end_at_the_last_keyframe():
    frames: Sequence[float] = [
        job("a", seeds=(0,) * 5, keyframes=(Keyframe("a"),) * 3).position(i) for i in range(5)
    ]
    assert frames == [0.0, 0.5, 1.0, 1.5, 2.0]


def test_a_dict_cache_computes_what_it_lacks_in_one_call_and_keeps_what_it_accepts():
    computed: list[list[str]] = []

    def compute(keys: list[str]) -> list[str]:
        computed.append(keys)
        return [key.upper() for key in keys]

    cache = DictCache(lambda key: key != "b")
    assert cache.fetch("text", ["a", "b", "a"], compute) == ["A", "B", "A"]
    assert cache.fetch("text", ["b", "a"], compute) == ["B", "A"]
    assert cache.fetch("text", ["a"], compute) == ["A"]
    assert computed == [["a", "b"], ["b"]]
