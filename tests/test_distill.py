"""Distillation: the teacher's target is what guidance comes to in use, the student follows it, and
an interrupted run ends as one that was not."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from model.bundle import load_v3
from model.config import BundleConfig, SamplingConfig
from model.networks.denoiser_v3 import Condition, Denoiser
from model.pipeline import Pipeline, PipelineV3
from model.rows import generate
from model.sampling import timesteps
from model.training import assemble, denoiser, distill, loop
from model.training.captioned import DataError
from model.training.codes import quiet
from model.training.distillation import (
    Draws,
    Student,
    Teacher,
    consistency_loss,
    frozen_copy,
    guidance_loss,
    joined,
    progressive_loss,
    step_times,
)
from model.training.judged import divergence
from model.training.objective import ConditionInputs, NoisePath, condition_of, corrupt
from model.training.palette import NAMES
from model.training.stencils import Stencils
from tests.conftest import (
    micro_config,
    randomise,
    write_random_bundle,
)
from tests.support.checkpoints import identical, without_clock
from tests.support.picture_files import write_pictures
from tests.support.short_training import Crash, run, run_main
from tests.support.small_training import (  # noqa: F401, fixtures
    art_of_our_own_fixture,
    corpus_file_fixture,
    scenes_fixture,
    small_config,
)
from tests.support.training_examples import examples

pytestmark = pytest.mark.training

SAMPLING = SamplingConfig(
    steps=6,
    renoise_steps=5,
    guidance=(4.0, 2.0),
    guidance_steps=4,
    temperature=(1.0, 1.0),
    sampler="multinomial",
    guidance_start=1,
)


@pytest.fixture
def bundle(tmp_path, prepared):
    """Of random weights, at the widths of the codes."""
    return write_random_bundle(tmp_path / "random", small_config())


def teacher_of(path, config=SAMPLING) -> tuple[Pipeline, Teacher]:
    pipeline = Pipeline.load(path)
    network = Denoiser(pipeline.config.denoiser)
    network.load_state_dict(pipeline.bundle.denoiser.state_dict())
    return pipeline, Teacher.of(network, pipeline.bundle, config, torch.float32)


# ── the target ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("step", range(6))
def test_the_target_is_what_a_guided_row_s_step_computes(random_bundle, step):
    """With the recipe's weights of attention, and guidance by the time of the step."""
    pipeline, teacher = teacher_of(random_bundle)
    assert isinstance(pipeline, PipelineV3)
    assert pipeline.config.recipe.attention_weights is not None
    noise = pipeline.noise(0, 32, 32, 6)
    prompt, negative = pipeline.encode(["red apple", ""])
    (image,) = pipeline.prior_embeddings([prompt], [noise])
    conditions = pipeline.condition(prompt, image), pipeline.condition(negative)
    row = generate(SAMPLING, noise, *conditions)
    row.step = step
    seen = []
    sample = pipeline.executor.sample

    def watched(sampler, features, inputs):
        seen.append(features)
        return sample(sampler, features, inputs)

    pipeline.executor.sample = watched
    pipeline.advance([row])
    kept = torch.ones(1, 2, dtype=torch.bool)
    inputs = ConditionInputs(prompt.byt5, prompt.mask, prompt.clip, image, kept)
    t = torch.tensor(timesteps(6)[step : step + 1])
    target = teacher.features(noise.start[None], t, teacher.conditions(inputs))
    torch.testing.assert_close(target, seen[0], atol=1e-3, rtol=1e-3)


def test_guidance_at_a_time_is_that_of_the_recipe_s_step(random_bundle):
    _, teacher = teacher_of(random_bundle)
    steps = teacher.guidance(torch.tensor(timesteps(6)[:-1])).tolist()
    assert steps == pytest.approx([1.0, 3.6, 3.2, 2.8, 2.4, 1.0])
    # Between two steps it is that of the earlier one, which begins at the larger time.
    assert teacher.guidance(torch.tensor([0.7, 0.0])).tolist() == pytest.approx([3.6, 1.0])


def test_guidance_of_a_number_is_constant_and_by_default_the_recipe_s():
    recipe = replace(micro_config().recipe, guidance_start=2, guidance_steps=4)
    assert distill.guided_sampling(recipe, "recipe") == recipe.sampling()
    constant = distill.guided_sampling(recipe, 2.0)
    interval = constant.guidance_start, constant.guidance_steps
    assert (constant.guidance, *interval) == ((2.0, 2.0), 0, 6)


@pytest.mark.parametrize("lengths", [(3, 5), (5, 3), (4, 4)])
def test_a_shorter_condition_is_padded_with_masked_keys(lengths):
    asked, nothing = (
        Condition(torch.randn(rows, length, 6), None)
        for rows, length in zip((2, 1), lengths, strict=True)
    )
    both = joined(asked, nothing)
    assert both.kv.shape == (4, max(lengths), 6)
    for i, own in enumerate((asked.kv[0], asked.kv[1], nothing.kv[0], nothing.kv[0])):
        assert torch.equal(both.kv[i, : len(own)], own)
        assert both.mask[i].tolist() == [k < len(own) for k in range(max(lengths))]


@pytest.mark.parametrize("reverse", [False, True])
def test_divergences_and_gradients_are_those_of_the_logits(reverse):
    features, projection = torch.randn(600, 20), torch.randn(300, 20)
    target, other = torch.randn(600, 12), torch.randn(300, 12)
    weights = torch.rand(600)
    results = []
    for fused in (False, True):
        f, p = features.clone().requires_grad_(), projection.clone().requires_grad_()
        if fused:
            value, agreed = divergence(f, p, target, other, weights, reverse=reverse)
            same = (features @ projection.T).argmax(-1) == (target @ other.T).argmax(-1)
            assert torch.equal(agreed, same)
        else:
            log_p, log_q = (f @ p.T).log_softmax(-1), (target @ other.T).log_softmax(-1)
            own, to = (log_q, log_p) if reverse else (log_p, log_q)
            value = (F.kl_div(own, to, reduction="none", log_target=True).sum(-1) * weights).sum()
        results.append([value, *torch.autograd.grad(2 * value, [f, p])])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)


# ── the student ───────────────────────────────────────────────────────────────────────────────────


def test_a_student_of_an_unguided_teacher_has_nothing_to_learn(random_bundle):
    """Same weights, noise, conditions and positions: the same prediction."""
    unguided = replace(SAMPLING, guidance=(1.0, 1.0))
    pipeline, teacher = teacher_of(random_bundle, unguided)
    for weights in (teacher.attention_weights, None):
        own = replace(teacher, attention_weights=weights)
        network = Denoiser(pipeline.config.denoiser)
        network.load_state_dict(pipeline.bundle.denoiser.state_dict())
        loss = guidance_loss(Student(network), own, Draws(lambda: examples(8)))
        value, figures = loss()
        assert value.item() == pytest.approx(0, abs=1e-5)
        assert figures["agreed"] > 0.99
        guided = replace(own, guidances=torch.full((6,), 4.0))
        assert guidance_loss(Student(network), guided, Draws(lambda: examples(8)))()[0] > 0.01


def test_gradients_reach_the_student_alone(random_bundle):
    pipeline, teacher = teacher_of(random_bundle)
    network = Denoiser(pipeline.config.denoiser)
    randomise(network, seed=1)
    before = {name: t.clone() for name, t in teacher.denoiser.state_dict().items()}
    value, _ = guidance_loss(Student(network), teacher, Draws(lambda: examples(8)))()
    value.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
    assert all(p.grad is None for p in teacher.denoiser.parameters())
    after = teacher.denoiser.state_dict()
    assert all(torch.equal(t, after[name]) for name, t in before.items())


def test_the_student_s_loss_falls_and_it_is_no_longer_its_teacher(
    monkeypatch, bundle, corpus_file, tmp_path
):
    arguments = [str(bundle), "--guidance", "8", "--corpus", str(corpus_file), "--lr", "5e-3"]
    losses = run_main(monkeypatch, distill, tmp_path / "x.pt", 60, *arguments)
    assert np.mean(losses[-10:]) < 0.7 * np.mean(losses[:5]), losses
    before = load_v3(bundle, torch.device("cpu"), torch.float32).denoiser.state_dict()
    after = assemble.averaged(loop.load(tmp_path / "x.pt"), "denoiser.")
    assert before.keys() == after.keys()
    assert not torch.equal(before["clf.1.weight"], after["clf.1.weight"])


def test_a_distilled_bundle_draws_with_one_branch(monkeypatch, bundle, corpus_file, tmp_path):
    checkpoint = tmp_path / "x.pt"
    run_main(
        monkeypatch, distill, checkpoint, 1, str(bundle), "--guidance", "--corpus", str(corpus_file)
    )
    arguments = ["--base", str(bundle), "--denoiser", str(checkpoint), "--recipe", "guidance=1"]
    monkeypatch.setattr(sys, "argv", ["assemble", str(tmp_path / "one"), *arguments])
    assemble.main()
    assert not BundleConfig.read(tmp_path / "one").recipe.sampling().guided
    pipeline, branches = Pipeline.load(tmp_path / "one"), []
    features = pipeline.bundle.denoiser.features

    def watched(tokens, times, condition, row_of):
        branches.append(len(condition.kv))
        return features(tokens, times, condition, row_of)

    pipeline.bundle.denoiser.features = watched
    pipeline.generate(["a red circle"], [0])
    assert branches == [1] * 6


@pytest.mark.parametrize(("trainer", "more"), [(denoiser, []), (distill, ["--guidance"])])
def test_known_tokens_are_laid_instead_of_encoded(
    monkeypatch, bundle, corpus_file, tmp_path, trainer, more
):
    nothing = Stencils(
        torch.zeros(0, 6), torch.zeros(0, 2, 2).short(), torch.zeros(len(NAMES), 2, 2).short()
    )
    nothing.save(tmp_path / "stencils.safetensors")
    laid, lay = [], Stencils.lay

    def watched(self, layouts, height, width):
        laid.append((height, width))
        return lay(self, layouts, height, width)

    monkeypatch.setattr(Stencils, "lay", watched)
    stencils = ["--stencils", str(tmp_path / "stencils.safetensors")]
    where = [str(bundle), "--corpus", str(corpus_file), *stencils, *more]
    run_main(monkeypatch, trainer, tmp_path / "x.pt", 1, *where)
    assert laid


@pytest.mark.parametrize("form", ["scenes", "images"])
def test_an_interrupted_distillation_ends_as_one_that_was_not(
    monkeypatch, bundle, random_bundle, corpus_file, tmp_path, form
):
    if form == "scenes":
        where = [bundle, "--corpus", corpus_file]
    else:
        where = [random_bundle, "--data", write_pictures(tmp_path / "data", 20)]
    common = [*where, "--guidance", "--updates", 7, "--batch", 2]
    run(monkeypatch, distill, tmp_path / "whole.pt", *common)
    torch.manual_seed(99)
    with pytest.raises(Crash):
        run(monkeypatch, distill, tmp_path / "parts.pt", *common, crash_at=4)
    run(monkeypatch, distill, tmp_path / "parts.pt", *common, "--resume")
    whole, parts = (
        without_clock(loop.load(tmp_path / f"{name}.pt")) for name in ("whole", "parts")
    )
    assert whole["step"] == 7
    assert identical(whole, parts)


def test_the_teacher_may_be_a_checkpoint(monkeypatch, bundle, corpus_file, tmp_path):
    network = Denoiser(small_config().denoiser)
    randomise(network, seed=5)
    quiet(network)
    weights = {f"denoiser.{name}": t for name, t in network.state_dict().items()}
    torch.save({"ema": weights}, tmp_path / "teacher.pt")
    arguments = [str(bundle), "--guidance", "--teacher", str(tmp_path / "teacher.pt")]
    run_main(
        monkeypatch,
        distill,
        tmp_path / "x.pt",
        1,
        *arguments,
        "--corpus",
        str(corpus_file),
        "--lr",
        "0",
    )
    after = assemble.averaged(loop.load(tmp_path / "x.pt"), "denoiser.")
    assert all(torch.equal(t, after[name]) for name, t in network.state_dict().items())


# ── fewer steps ───────────────────────────────────────────────────────────────────────────────────


def test_tokens_that_are_noise_early_are_the_same_noise_later():
    tokens = torch.randint(64, (50, 8, 8))
    path = NoisePath.of(tokens, 64)
    (early, at_s), (late, at_t) = (path.at(torch.full((50,), t)) for t in (0.3, 0.7))
    assert (at_t | ~at_s).all()
    assert torch.equal(late[at_s], early[at_s])
    assert torch.equal(early[~at_s], tokens[~at_s])
    shares = at_s.float().mean().item(), at_t.float().mean().item()
    assert shares == pytest.approx((0.3, 0.7), abs=0.03)
    torch.manual_seed(1)
    noisy, noised = corrupt(tokens, torch.ones(50), 64)
    assert noised.all()
    assert (noisy == tokens).float().mean() < 0.1


def test_steps_of_a_length_begin_at_1_as_often_as_at_any_other_stretch_of_it():
    t, s = step_times(20_000, torch.device("cpu"), 0.25)
    torch.testing.assert_close(t - s, torch.full_like(t, 0.25))
    assert s.min() >= 0
    assert t.max() <= 1
    assert (t == 1).float().mean().item() == pytest.approx(0.25, abs=0.02)
    early, _ = step_times(20_000, torch.device("cpu"), 0.25, early=1.5)
    assert (early == 1).float().mean() > 0.3


class Watched:
    """A network's inputs, in the order of its passes."""

    def __init__(self, monkeypatch, network):
        self.passes = []
        features, times = network.features, network.times

        def noted(t):
            self.passes.append([t])
            return times(t)

        def watched(tokens, *rest):
            self.passes[-1].append(tokens)
            return features(tokens, *rest)

        monkeypatch.setattr(network, "times", noted)
        monkeypatch.setattr(network, "features", watched)


def unguided(teacher):
    return replace(teacher, nothing=None)


def network_like(pipeline):
    network = Denoiser(pipeline.config.denoiser)
    network.load_state_dict(pipeline.bundle.denoiser.state_dict())
    return network


def test_the_teacher_answers_one_step_later_with_the_same_noise(monkeypatch, random_bundle):
    pipeline, guided = teacher_of(random_bundle)
    teacher, network = unguided(guided), network_like(pipeline)
    x = examples(16)
    seen, answered = Watched(monkeypatch, network), Watched(monkeypatch, teacher.denoiser)
    consistency_loss(Student(network), teacher, Draws(lambda: x), 4)()
    ((t, late),), ((s, early),) = seen.passes, answered.passes
    torch.testing.assert_close(t - s, torch.full_like(t, 0.25))
    assert len(early) == len(late) == 16  # one branch
    changed = early != x.tokens
    assert torch.equal(late[changed], early[changed])
    assert (late != x.tokens).sum() > changed.sum()


def test_progressively_one_step_follows_two_of_the_teacher_s_sampler(monkeypatch, random_bundle):
    """The first of the two draws tokens; as many as the time says become the image's noise."""
    pipeline, guided = teacher_of(random_bundle)
    teacher, network = unguided(guided), network_like(pipeline)
    x = examples(16)
    seen, answered = Watched(monkeypatch, network), Watched(monkeypatch, teacher.denoiser)
    monkeypatch.setattr(Teacher, "_draw", lambda *_: torch.full((16, 8, 8), 63))
    progressive_loss(Student(network), teacher, Draws(lambda: x), 2)()
    ((t, late),), ((first, same), (middle, between)) = seen.passes, answered.passes
    assert torch.equal(first, t)
    assert torch.equal(same, late)
    torch.testing.assert_close(t - middle, torch.full_like(t, 0.25))
    noise = between != 63
    assert noise.float().mean() == pytest.approx(middle.mean().item(), abs=0.05)
    both = noise & (late != x.tokens)
    assert torch.equal(between[both], late[both])


def test_a_teacher_s_step_draws_at_the_temperature_of_the_recipe(random_bundle):
    config = replace(SAMPLING, temperature=(1.0, 0.05))
    _, guided = teacher_of(random_bundle, config)
    teacher = unguided(guided)
    x = examples(64)
    kept = torch.ones(64, 2, dtype=torch.bool)
    inputs = ConditionInputs(x.byt5, x.mask, x.clip_text, x.clip_image, kept)
    conditions = teacher.conditions(inputs)
    shares = []
    for t in (1.0, 1 / 6):
        times = torch.full((64,), t)
        likeliest = teacher.denoiser.project(teacher.features(x.tokens, times, conditions))
        drawn = teacher.step(x.tokens, times, torch.full((64,), -1.0), conditions, x.tokens)
        shares.append((drawn == likeliest.argmax(-1)).float().mean().item())
        greedy = replace(teacher, greedy=True)
        same = greedy.step(x.tokens, times, torch.full((64,), -1.0), conditions, x.tokens)
        assert torch.equal(same, likeliest.argmax(-1))
    assert shares[0] < 0.5 < 0.8 < shares[1]


@pytest.mark.parametrize("loss_of", [consistency_loss, progressive_loss])
def test_a_student_s_own_prediction_one_step_later_is_something_to_learn(random_bundle, loss_of):
    pipeline, guided = teacher_of(random_bundle)
    network = network_like(pipeline)
    draws = Draws(lambda: examples(8))
    for teacher in (guided, unguided(guided)):
        values = [loss_of(Student(network), teacher, draws, 2, own)()[0] for own in (True, False)]
        assert all(value > 0.01 for value in values)
        assert values[0] != values[1]
    value, _ = loss_of(Student(network), unguided(guided), draws, 2)()
    value.backward()
    assert all(p.grad is not None for p in network.parameters())
    assert all(p.grad is None for p in guided.denoiser.parameters())


@pytest.mark.parametrize("kind", [[], ["--progressive"]])
def test_the_loss_of_a_round_falls(monkeypatch, bundle, corpus_file, tmp_path, kind):
    arguments = [bundle, "--steps", "2", "--updates", 30, "--corpus", corpus_file, "--lr", 1e-2]
    losses = run(monkeypatch, distill, tmp_path / "x.pt", *arguments, "--batch", 8, *kind)
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5]), losses


def rounds_with_teachers(monkeypatch):
    """Return a list that gets (steps, teacher) of every round that is trained."""
    seen = []

    def watched(student, teacher, draws, steps, reverse=True):
        if not seen or seen[-1][1] is not teacher:
            seen.append((steps, teacher))
        return consistency_loss(student, teacher, draws, steps, reverse)

    monkeypatch.setattr(distill, "consistency_loss", watched)
    return seen


def test_the_student_of_a_round_is_the_teacher_of_the_next(
    monkeypatch, bundle, corpus_file, tmp_path
):
    rounds = rounds_with_teachers(monkeypatch)
    arguments = [bundle, "--guidance", "--steps", "4,2", "--updates", 3, "--corpus", corpus_file]
    run(monkeypatch, distill, tmp_path / "x.pt", *arguments, "--batch", 4)
    (first, guided), (second, teacher) = rounds
    assert (first, second) == (4, 2)
    assert guided.nothing is not None
    assert teacher.nothing is None
    student = assemble.averaged(loop.load(tmp_path / "x-4.pt"), "denoiser.")
    before = load_v3(bundle, torch.device("cpu"), torch.float32).denoiser.state_dict()
    taught = teacher.denoiser.state_dict()
    assert all(torch.equal(t, taught[name]) for name, t in student.items())
    assert not torch.equal(student["clf.1.weight"], before["clf.1.weight"])
    after = assemble.averaged(loop.load(tmp_path / "x-2.pt"), "denoiser.")
    assert not torch.equal(student["clf.1.weight"], after["clf.1.weight"])


def test_without_guidance_the_first_teacher_has_one_branch(
    monkeypatch, bundle, corpus_file, tmp_path
):
    rounds = rounds_with_teachers(monkeypatch)
    arguments = [bundle, "--steps", "4", "--updates", 1, "--corpus", corpus_file]
    run(monkeypatch, distill, tmp_path / "x.pt", *arguments, "--batch", 4)
    assert rounds[0][1].nothing is None


@pytest.mark.parametrize("form", ["scenes", "images"])
@pytest.mark.parametrize("crash_at", [2, 3])
def test_interrupted_rounds_end_as_those_that_were_not(
    monkeypatch, bundle, random_bundle, corpus_file, tmp_path, form, crash_at
):
    """In the middle of the second round, and between both."""
    if form == "scenes":
        where = [bundle, "--corpus", corpus_file]
    else:
        where = [random_bundle, "--data", write_pictures(tmp_path / "data", 20)]
    common = [*where, "--steps", "4,2", "--progressive", "--updates", 3, "--batch", 2]
    run(monkeypatch, distill, tmp_path / "whole.pt", *common)
    torch.manual_seed(99)
    if crash_at == 2:
        with pytest.raises(Crash):
            run(
                monkeypatch,
                distill,
                tmp_path / "parts.pt",
                *common,
                crash_in=tmp_path / "parts-2.pt",
                crash_at=crash_at,
            )
    else:
        run(monkeypatch, distill, tmp_path / "parts.pt", *common)
        (tmp_path / "parts-2.pt").unlink()
    torch.manual_seed(98)
    run(monkeypatch, distill, tmp_path / "parts.pt", *common, "--resume")
    for steps in (4, 2):
        whole, parts = (
            without_clock(loop.load(tmp_path / f"{name}-{steps}.pt")) for name in ("whole", "parts")
        )
        assert whole["step"] == 3
        assert identical(whole, parts)


def test_all_rounds_done_leave_nothing_to_resume(monkeypatch, bundle, corpus_file, tmp_path):
    arguments = [bundle, "--steps", "4,2", "--updates", 2, "--corpus", corpus_file, "--batch", 2]
    assert len(run(monkeypatch, distill, tmp_path / "x.pt", *arguments)) == 4
    assert run(monkeypatch, distill, tmp_path / "x.pt", *arguments, "--resume") == []


def test_a_bundle_of_the_last_round_draws_in_its_steps(
    monkeypatch, capsys, bundle, corpus_file, tmp_path
):
    arguments = [bundle, "--steps", "4,2", "--updates", 1, "--corpus", corpus_file, "--batch", 2]
    run(monkeypatch, distill, tmp_path / "x.pt", *arguments)
    line = next(line for line in capsys.readouterr().out.splitlines() if "to use it" in line)
    command = line.partition("assemble ")[2].replace("NEW_BUNDLE", str(tmp_path / "two")).split()
    monkeypatch.setattr(sys, "argv", ["assemble", *command])
    assemble.main()
    sampling = BundleConfig.read(tmp_path / "two").recipe.sampling()
    assert (sampling.steps, sampling.guided) == (2, False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "2,4"], "falling numbers"),
        (["--steps", "4,0"], "falling numbers"),
        (["--steps", "80"], "falling numbers"),
        (["--steps", "4,two"], "'two' is no whole number"),
        (["--guidance", "--progressive"], "go with --steps"),
        (["--guidance", "--forward"], "go with --steps"),
    ],
)
def test_impossible_rounds_are_refused(monkeypatch, capsys, bundle, arguments, message):
    monkeypatch.setattr(sys, "argv", ["distill", str(bundle), *arguments])
    with pytest.raises(SystemExit):
        distill.main()
    assert message in capsys.readouterr().err


def test_a_round_s_checkpoint_is_not_replaced_without_resume(monkeypatch, bundle, tmp_path):
    (tmp_path / "x-2.pt").touch()
    with pytest.raises(DataError, match=r"x-2\.pt exists: go on with --resume"):
        run(monkeypatch, distill, tmp_path / "x.pt", bundle, "--steps", "4,2")


def test_without_a_kind_of_distillation_there_is_a_message(monkeypatch, capsys, bundle):
    monkeypatch.setattr(sys, "argv", ["distill", str(bundle)])
    with pytest.raises(SystemExit):
        distill.main()
    assert "--guidance or --steps is needed" in capsys.readouterr().err


def test_unusable_images_end_with_a_message(monkeypatch, random_bundle, tmp_path):
    arguments = ["--guidance", "--data", str(tmp_path), "--checkpoint", str(tmp_path / "x.pt")]
    monkeypatch.setattr(sys, "argv", ["distill", str(random_bundle), *arguments, "--device", "cpu"])
    with pytest.raises(DataError, match=str(tmp_path)):
        distill.main()


def test_folded_weights_of_attention_are_those_unfolded():
    network = Denoiser(micro_config().denoiser)
    randomise(network)
    x = examples(4)
    inputs = ConditionInputs(
        x.byt5, x.mask, x.clip_text, x.clip_image, torch.ones(4, 2, dtype=torch.bool)
    )
    plain = condition_of(network, inputs, (1.2, 0.4))
    frozen = frozen_copy(network, torch.float32)
    folded = condition_of(frozen, inputs, (1.2, 0.4))
    torch.testing.assert_close(folded.kv, plain.kv, atol=1e-4, rtol=1e-4)
    assert torch.equal(folded.mask, plain.mask)
