"""The training loop: a resumed run is the run that never stopped, and what is kept is the
average."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from itertools import cycle
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from load_tests.serving import free_port
from model.bundle_files import BundleError
from model.networks.prior import Prior
from model.training import (
    checkpoint,
    command,
    denoiser,
    distill,
    evaluate,
    loop,
    prior,
    prune,
    recipes,
    reward,
)
from model.training.captioned import DataError
from tests.conftest import micro_config
from tests.support.short_training import fit

pytestmark = pytest.mark.training


@pytest.fixture
def o(tmp_path: Path) -> loop.Options:
    return loop.Options(
        minutes=1,
        steps=None,
        checkpoint=tmp_path / "runs" / "x.pt",
        log_dir=None,
        resume=False,
        batch=8,
        accumulate=1,
        lr=3e-3,
        warmup=2,
        ema=0.99,
        seed=0,
        data_seed=0,
        device=torch.device("cpu"),
        dtype=torch.float32,
        workers=0,
    )


def small_prior(seed: int = 0) -> Prior:
    torch.manual_seed(seed)
    return Prior(micro_config().prior)


def prior_loss(network: Prior) -> loop.Loss:
    text, image = torch.randn(2, 32, 16, generator=torch.Generator().manual_seed(0)).unbind(0)
    return lambda: (prior.diffusion_loss(network, text, image), {})


def test_a_resumed_run_is_the_run_that_never_stopped(monkeypatch, o):
    whole = small_prior()
    whole_average, whole_losses = fit(
        monkeypatch,
        4,
        whole,
        prior_loss(whole),
        replace(o, checkpoint=o.checkpoint.with_name("whole.pt")),
    )

    first = small_prior()
    _, losses = fit(monkeypatch, 2, first, prior_loss(first), o)
    second = small_prior(
        seed=99
    )  # other weights and another state of the generator, both to be replaced
    average, more = fit(monkeypatch, 2, second, prior_loss(second), replace(o, resume=True))

    assert losses + more == whole_losses
    for one, other in ((whole, second), (whole_average, average)):
        assert all(
            torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True)
        )
    assert loop.load(o.checkpoint)["step"] == 4


def test_a_checkpoint_is_written_whole_or_not_at_all(monkeypatch, o):
    network = small_prior()
    fit(monkeypatch, 1, network, prior_loss(network), o)
    before = o.checkpoint.read_bytes()

    def broken(contents, path):
        Path(path).write_bytes(b"half")
        raise OSError("the disk is full")

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(OSError, match="full"):
        fit(monkeypatch, 1, network, prior_loss(network), o)
    assert o.checkpoint.read_bytes() == before
    assert [path.name for path in o.checkpoint.parent.iterdir()] == [o.checkpoint.name]


def test_a_full_disk_is_called_that_and_leaves_nothing(monkeypatch, tmp_path):
    def full(contents, path):
        Path(path).write_bytes(b"half")
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match=r"x\.pt was not written: [\d,]+ bytes are free"):
        checkpoint.save(tmp_path / "x.pt", {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["SIGINT", "SIGTERM"]
)
def test_an_interrupted_run_finishes_its_step_and_can_be_resumed(o, capsys, number, status):
    o = replace(o, steps=4)
    whole = small_prior()
    loop.fit(whole, prior_loss(whole), replace(o, checkpoint=o.checkpoint.with_name("whole.pt")))

    first, taken = small_prior(), []
    inner = prior_loss(first)

    def loss():
        taken.append(1)
        if len(taken) == 2:
            signal.raise_signal(number)
        return inner()

    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as ended:
        loop.fit(first, loss, o)
    assert ended.value.code == status
    assert signal.getsignal(number) is before
    assert "interrupted at step 2; continue with --resume" in capsys.readouterr().err
    assert loop.load(o.checkpoint)["step"] == 2

    second = small_prior(seed=99)
    loop.fit(second, prior_loss(second), replace(o, resume=True))
    assert all(
        torch.equal(a, b) for a, b in zip(whole.parameters(), second.parameters(), strict=True)
    )


def test_a_second_signal_ends_the_run_at_once(o):
    network = small_prior()

    def loss():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError

    with pytest.raises(KeyboardInterrupt):
        loop.fit(network, loss, replace(o, steps=4))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_kept_weights_are_the_average_not_the_last(monkeypatch, o):
    network = small_prior()
    average, _ = fit(monkeypatch, 5, network, prior_loss(network), o)
    saved = loop.load(o.checkpoint)
    for name, parameter in network.state_dict().items():
        assert torch.equal(saved["model"][name], parameter)
        assert torch.equal(saved["ema"][name], average.state_dict()[name])
    assert not torch.equal(saved["ema"]["blocks.0.weight"], saved["model"]["blocks.0.weight"])


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.999])
def test_the_average_forgets_no_slower_than_its_decay_and_faster_at_first(decay):
    module = nn.Linear(1, 1, bias=False)
    average, expected = loop.Average(module, decay), 0.0
    for n in range(40):
        nn.init.constant_(module.weight, float(n))
        average.advance()
        average.update()
        weight = min(decay, (1 + n) / (10 + n)) if n else 0.0
        expected = weight * expected + (1 - weight) * n
    assert average.module.weight.item() == pytest.approx(expected, rel=1e-5)


def test_the_average_of_a_counter_is_the_counter():
    module = nn.BatchNorm1d(2)
    average = loop.Average(module, 0.9)
    module.num_batches_tracked.fill_(8)
    average.advance()
    average.update()
    assert average.module.num_batches_tracked == 8


def test_a_tensor_of_two_names_is_averaged_once_and_a_mask_not_at_all():
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    module[1].weight = module[0].weight
    module.register_buffer("mask", torch.full((2,), -torch.inf), persistent=False)
    average = loop.Average(module, 0.5)
    for value in (1.0, 3.0):
        nn.init.constant_(module[0].weight, value)
        average.advance()
        average.update()
    assert average.module[1].weight is average.module[0].weight
    assert average.module[0].weight.mean().item() == pytest.approx(1 + 2 * (1 - 2 / 11))
    assert average.module.mask.isinf().all()


def test_a_mixture_takes_every_loss_at_its_share_and_the_same_one_at_the_same_step():
    losses = tuple(lambda name=name: name for name in "ab")
    mixture = loop.Mixture(losses, (0.8, 0.2))
    chosen = [mixture.of(step)() for step in range(2000)]
    assert chosen == [mixture.of(step)() for step in range(2000)]
    assert chosen.count("b") / 2000 == pytest.approx(0.2, abs=0.04)


@pytest.mark.parametrize(
    ("done", "share", "rate"),
    [(0, 0.0, 0.25), (1, 0.5, 0.5), (3, 0.0, 1.0), (9, 0.7, 1.0), (9, 0.85, 0.5), (9, 1.0, 0.02)],
)
def test_the_learning_rate_warms_up_by_steps_and_falls_by_time(o, done, share, rate):
    network = small_prior()
    run = loop._Run(network, replace(o, warmup=4))
    run.step = done
    run.learn(prior_loss(network), share)
    assert run.optimizers.lr == pytest.approx(o.lr * rate)


@pytest.mark.parametrize(("done", "rate"), [(0, 0.25), (3, 1.0), (14, 1.0), (17, 0.5), (19, 1 / 6)])
def test_by_steps_the_learning_rate_falls_over_the_last_of_them_whatever_time_it_is(o, done, rate):
    run = loop._Run(small_prior(), replace(o, warmup=4, steps=20))
    run.step = done
    assert run.share(elapsed=1e9) == done / 20
    assert run.rate(run.share(elapsed=1e9)) == pytest.approx(o.lr * rate)


@pytest.mark.parametrize(("share", "rate"), [(0.2, 1.0), (0.5, 0.625), (0.9, 0.125)])
def test_the_last_share_of_the_training_can_be_chosen(o, share, rate):
    run = loop._Run(small_prior(), replace(o, warmup=1, fall=0.8))
    assert run.rate(share) == pytest.approx(o.lr * rate)


@pytest.mark.parametrize("sent", ["0", "1.5", "-0.1"])
def test_a_share_is_above_0_and_at_most_1(sent, capsys):
    with pytest.raises(SystemExit):
        loop.parser("", name="x", batch=1, lr=1.0, minutes=1).parse_args(["--fall", sent])
    assert "at most 1" in capsys.readouterr().err


def test_steps_are_counted_from_the_very_first(o):
    o = replace(o, steps=5)
    network = small_prior()
    loop.fit(network, prior_loss(network), replace(o, steps=3))
    counted = []

    def loss():
        counted.append(1)
        return prior_loss(network)()

    loop.fit(network, loss, replace(o, resume=True))
    assert len(counted) == 2
    loop.fit(network, loss, replace(o, resume=True))
    assert len(counted) == 2
    assert loop.load(o.checkpoint)["step"] == 5


def slices_of(network: Prior, size: int) -> loop.Loss:
    """One fixed batch of 24, `size` rows at a time."""
    x, text = torch.randn(2, 24, 16, generator=torch.Generator().manual_seed(0)).unbind(0)
    t = torch.linspace(0.1, 0.9, 24)
    parts = cycle(zip(x.split(size), t.split(size), text.split(size), strict=True))

    def loss() -> tuple[Tensor, dict[str, Tensor]]:
        output = network(*next(parts))
        return output.square().mean(), {"size": output.detach().abs().mean()}

    return loss


def test_accumulated_batches_have_the_gradient_of_one_as_large(o):
    network = small_prior()
    figures, gradients = [], []
    for accumulate in (1, 4):
        run = loop._Run(network, replace(o, accumulate=accumulate))
        figures.append(run.gradients(slices_of(network, 24 // accumulate)))
        gradients.append([p.grad.clone() for p in network.parameters()])
    assert max(g.abs().max() for g in gradients[0]) > 0.01
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
    assert figures[0].keys() == figures[1].keys() == {"loss", "size"}
    for name in figures[0]:
        torch.testing.assert_close(figures[0][name], figures[1][name])


def test_gradients_are_exchanged_once_a_step_however_many_batches_it_has(monkeypatch, o):
    network, passes, exchanges = small_prior(), [], []
    healthy = slices_of(network, 4)

    def loss():
        passes.append(1)
        return healthy()

    monkeypatch.setattr(
        loop, "average_over_processes", lambda gradients: exchanges.append(len(gradients))
    )
    loop.fit(network, loss, replace(o, accumulate=3, steps=2))
    assert len(passes) == 6
    assert exchanges == [len(list(network.parameters()))] * 2


class Files:
    """Data of which two files could not be used."""

    skipped = {"not an image": 2}  # noqa: RUF012

    def state_dict(self):
        return {}


def scalars(directory: Path) -> dict[str, dict[int, float]]:
    events = EventAccumulator(str(directory)).Reload()
    return {
        tag: {event.step: event.value for event in events.Scalars(tag)}
        for tag in events.Tags()["scalars"]
    }


def test_tensorboard_gets_means_of_ten_steps_and_the_rest_at_the_end(o, capsys):
    network, losses = small_prior(), []
    inner = prior_loss(network)

    def loss():
        value, _ = inner()
        losses.append(value.item())
        return value, {"twice": 2 * value.detach()}

    o = replace(o, steps=23, log_dir=o.checkpoint.parent / "logs", accumulate=1, warmup=30)
    loop.fit(network, loss, o, Files())
    seen = scalars(o.log_dir)
    means = {10: sum(losses[:10]) / 10, 20: sum(losses[10:20]) / 10, 23: sum(losses[20:]) / 3}
    assert seen["loss"] == pytest.approx(means, rel=1e-5)
    assert seen["twice"] == pytest.approx(
        {step: 2 * mean for step, mean in means.items()}, rel=1e-5
    )
    assert seen["learning_rate"] == pytest.approx(
        {10: o.lr * 10 / 30, 20: o.lr * 20 / 30 * (4 / 23) / 0.3, 23: o.lr * 23 / 30 / 23 / 0.3}
    )
    assert min(seen["images_per_second"].values()) > 0
    assert {*seen["skipped/files"].values()} == {*seen["skipped/not_an_image"].values()} == {2}
    assert {*seen["skipped/steps"].values()} == {0}
    assert "images left out: 2 not an image" in capsys.readouterr().out


def test_a_resumed_run_s_scalars_replace_those_after_its_checkpoint(o):
    network, o = small_prior(), replace(o, log_dir=o.checkpoint.parent / "logs")
    loop.fit(network, prior_loss(network), replace(o, steps=20))
    saved = loop.load(o.checkpoint)
    loop.fit(network, prior_loss(network), replace(o, steps=40, resume=True))
    torch.save(
        saved, o.checkpoint
    )  # as if the run had died after 40 steps, its last checkpoint that of step 20
    loop.fit(network, prior_loss(network), replace(o, steps=30, resume=True))
    assert sorted(scalars(o.log_dir)["loss"]) == [10, 20, 30]


def test_without_a_log_directory_nothing_is_written(o):
    network = small_prior()
    loop.fit(network, prior_loss(network), replace(o, steps=1))
    assert [path.name for path in o.checkpoint.parent.iterdir()] == [o.checkpoint.name]


def test_only_what_needs_a_gradient_is_trained(monkeypatch, o):
    network = small_prior()
    frozen = network.get_parameter("blocks.0.weight").requires_grad_(False)
    before = frozen.clone()
    fit(monkeypatch, 2, network, prior_loss(network), o)
    assert torch.equal(frozen, before)


def test_options_come_from_the_command_line():
    parser = loop.parser("Trains.", name="x", batch=32, lr=1e-3, minutes=5)
    options = loop.options(
        parser.parse_args(["--minutes", "2", "--device", "cpu", "--dtype", "float16"])
    )
    assert (options.minutes, options.batch, options.checkpoint) == (2.0, 32, Path("runs/x.pt"))
    assert options.dtype == torch.bfloat16
    assert options.workers == 0
    assert (options.steps, options.accumulate, options.log_dir) == (None, 1, None)


def given(*arguments: object) -> loop.Options:
    parser = loop.parser("Trains.", name="x", batch=32, lr=1e-3, minutes=5)
    return loop.options(parser.parse_args(["--device", "cpu", *map(str, arguments)]))


def test_a_checkpoint_is_not_replaced_by_a_run_that_does_not_resume_it(tmp_path):
    torch.save({"step": 7}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"x\.pt exists: go on from it with --resume"):
        given("--checkpoint", tmp_path / "x.pt")
    assert given("--checkpoint", tmp_path / "x.pt", "--resume").resume


def test_without_a_checkpoint_there_is_nothing_to_resume(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint .*x\.pt: begin without --resume"):
        given("--checkpoint", tmp_path / "x.pt", "--resume")


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"text", "no checkpoint that torch.save wrote"), (b"PK\x03\x04", "is cut short")],
)
def test_what_is_no_checkpoint_cannot_be_resumed(tmp_path, content, words):
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(BundleError, match=words):
        given("--checkpoint", tmp_path / "x.pt", "--resume")
    torch.save({"weight": torch.ones(1)}, tmp_path / "x.pt")
    with pytest.raises(BundleError, match="holds weights alone"):
        given("--checkpoint", tmp_path / "x.pt", "--resume")


def test_where_nothing_can_be_written_is_noticed_before_the_training(tmp_path):
    with pytest.raises(ValueError, match="is a folder; name a file"):
        given("--checkpoint", tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        given("--checkpoint", tmp_path / "file" / "x.pt")
    with pytest.raises(ValueError, match="is a file; name a folder"):
        given("--checkpoint", tmp_path / "x.pt", "--log-dir", tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("option", "sent", "words"),
    [
        ("--minutes", "-3", "-3 is not a number above 0"),
        ("--minutes", "0", "0 is not a number above 0"),
        ("--minutes", "nan", "nan is not a number above 0"),
        ("--minutes", "inf", "inf is not a number above 0"),
        ("--minutes", "ten", "'ten' is no number"),
        ("--steps", "1.5", "'1.5' is no whole number"),
        ("--lr", "-1", "-1 is not a number from 0 on"),
        ("--ema", "2", "2 is not from 0 to below 1"),
        ("--seed", "-1", "-1 is not at least 0"),
        ("--threads", "-1", "-1 is not at least 0"),
        ("--dtype", "fp16x", "invalid choice: 'fp16x'"),
        ("--drop-clip", "5", "5 is not from 0 to 1"),
        ("--max-aspect", "nan", "nan is not at least 1"),
        ("--min-side", "-1", "-1 is not at least 0"),
        ("--kept", "0", "0 is not at least 1"),
    ],
)
def test_a_number_out_of_its_range_is_refused_in_words(option, sent, words, capsys):
    with pytest.raises(SystemExit):
        denoiser.parser().parse_args([f"{option}={sent}"])
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    "parser",
    [
        denoiser.parser,
        distill.parser,
        evaluate._parser,
        prune.parser,
        recipes.parser,
        reward.parser,
    ],
    ids=lambda parser: parser.__module__.rpartition(".")[2],
)
def test_every_option_of_a_command_is_explained(parser):
    assert [action.dest for action in parser()._actions if not action.help] == []
    assert parser().format_help()


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (DataError("nothing\nin it"), 2, "train: nothing in it"),
        (BundleError("x.pt is cut short"), 2, "train: x.pt is cut short"),
        (FileNotFoundError("no bundle"), 2, "train: no bundle"),
        (FileNotFoundError(2, "No such file or directory", "x"), 2, "train: x: No such file"),
        (PermissionError(13, "Permission denied", "x.pt"), 1, "train: x.pt: Permission denied"),
        (ModuleNotFoundError("No module named 'tensorboard'"), 2, "train: No module named"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_a_command_ends_in_one_sentence_for_what_its_user_can_mend(
    monkeypatch, capsys, error, status, said
):
    def main():
        raise error

    monkeypatch.setattr(sys, "argv", ["/somewhere/train.py"])
    with pytest.raises(SystemExit) as ended:
        command.run(main)
    assert ended.value.code == status
    told = capsys.readouterr().err
    assert told.startswith(said)
    assert told.count("\n") == (1 if said else 0)


def test_weights_of_another_network_are_called_that(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train"])
    with pytest.raises(SystemExit):
        command.run(lambda: nn.Linear(2, 2).load_state_dict({}))
    assert capsys.readouterr().err == (
        'train: the weights are another network\'s: Missing key(s) in state_dict: "weight"\n'
    )


def test_a_fault_of_the_program_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        command.run(lambda: print(1 / 0))


@pytest.mark.process
def test_a_trainer_s_command_ends_in_one_sentence(tmp_path):
    arguments = ["nosuch", "--data", str(tmp_path), "--checkpoint", str(tmp_path / "x.pt")]
    done = subprocess.run(
        [sys.executable, "-m", "model.training.denoiser", *arguments, "--device", "cpu"],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(__file__).parents[1],
    )
    assert done.returncode == 2
    assert done.stderr.startswith("denoiser: no bundle 'nosuch': ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("option", ["--steps", "--accumulate", "--batch", "--warmup"])
def test_counts_of_nothing_are_refused(option, capsys):
    with pytest.raises(SystemExit):
        loop.parser("Trains.", name="x", batch=32, lr=1e-3, minutes=5).parse_args([option, "0"])
    assert "0 is not at least 1" in capsys.readouterr().err


def test_by_time_a_resumed_run_draws_anew_and_goes_on_where_positioned_data_stood(tmp_path):
    parser = loop.parser("Trains.", name="x", batch=32, lr=1e-3, minutes=5)
    arguments = ["--seed", "3", "--device", "cpu", "--checkpoint", str(tmp_path / "x.pt")]
    first = loop.options(parser.parse_args(arguments))
    assert (first.seed, first.data_seed) == (3, 3)
    for data, data_seed in (({"data": {}}, 3), ({}, 10)):
        torch.save({"step": 7, **data}, tmp_path / "x.pt")
        resumed = loop.options(parser.parse_args([*arguments, "--resume"]))
        assert (resumed.seed, resumed.data_seed) == (10, data_seed)


def test_a_step_that_is_not_a_number_is_skipped(monkeypatch, o):
    network, poison = small_prior(), iter([1.0, float("nan"), 1.0])
    before = [p.clone() for p in network.parameters()]
    healthy = prior_loss(network)

    def loss():
        value, figures = healthy()
        return value * next(poison), figures

    fit(monkeypatch, 3, network, loss, o)
    assert all(p.isfinite().all() for p in network.parameters())
    assert any(not torch.equal(p, b) for p, b in zip(network.parameters(), before, strict=True))
    saved = loop.load(o.checkpoint)
    assert (saved["step"], saved["averaged"]) == (3, 2)
    assert loop._Run(small_prior(), replace(o, resume=True)).average.n_averaged == 2


def matrices_and_a_loss() -> tuple[nn.Module, loop.Loss]:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 1))
    x = torch.randn(32, 6)
    return network, lambda: (network(x).square().mean(), {})


def train_matrices(folder: Path, steps: int) -> None:
    """What a process that torchrun started does: the same data in each, three matrices for Muon,
    and their sum as a file of its own."""
    flags = [
        "--threads",
        "1",
        "--device",
        "cpu",
        "--dtype",
        "float32",
        "--warmup",
        "1",
        "--steps",
        str(steps),
    ]
    flags += [
        "--checkpoint",
        str(folder / "x.pt"),
        *(["--resume"] if (folder / "x.pt").exists() else []),
    ]
    o = loop.options(loop.parser(None, name="x", batch=1, lr=0.02, minutes=1).parse_args(flags))
    network, loss = matrices_and_a_loss()
    loop.fit(network, loss, o, matrices=["0.weight", "2.weight", "4.weight"])
    torch.save(network.state_dict(), folder / f"{loop.rank()}.pt")


def said_by(*arguments: str, **environment: str) -> str:
    """Return what Python, which can import the tests, prints with these arguments, to the end."""
    root = Path(__file__).parents[1]
    return subprocess.run(
        [sys.executable, *arguments],
        check=True,
        timeout=120,
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root), **environment},
        stdout=subprocess.PIPE,
        text=True,
    ).stdout


def test_no_thread_of_the_group_outlives_a_training(tmp_path):
    # One that frees a tensor while Python ends aborts the process at times, after all its work.
    script = tmp_path / "train.py"
    script.write_text(
        "import atexit\n"
        "from pathlib import Path\n"
        "from tests.test_training_loop import train_matrices\n"
        "def names():\n"
        "    return [p.read_text().strip() for p in Path('/proc/self/task').glob('*/comm')]\n"
        "atexit.register(lambda: print(*names()))\n"
        f"train_matrices(Path({str(tmp_path)!r}), 2)\n"
        "print(*names())\n"
    )
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    said = said_by(str(script), MASTER_PORT=str(free_port()), **alone)
    during, after = said.splitlines()
    assert "gloo" in during
    assert "gloo" not in after


def test_two_processes_stay_one_network_and_take_the_steps_of_one(tmp_path):
    together, alone = tmp_path / "together", tmp_path / "alone"
    together.mkdir(), alone.mkdir()
    torchrun = (
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        "0",
        "--standalone",
    )
    script = tmp_path / "train.py"
    script.write_text(
        "from pathlib import Path\n"
        "from tests.test_training_loop import train_matrices\n"
        f"train_matrices(Path({str(together)!r}), 3)\n"
    )
    said_by(*torchrun, str(script))
    train_matrices(alone, 3)
    first, second, one = (
        torch.load(path, weights_only=True)
        for path in (together / "0.pt", together / "1.pt", alone / "0.pt")
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.allclose(first[name], one[name], atol=1e-5) for name in first)

    # The shares of both are in the checkpoint: one process goes on where two stopped.
    for folder in (together, alone):
        train_matrices(folder, 5)
    further, one = (torch.load(folder / "0.pt", weights_only=True) for folder in (together, alone))
    assert all(torch.allclose(further[name], one[name], atol=1e-5) for name in one)
    assert not any(
        torch.allclose(further[name], first[name], atol=1e-4) for name in ("0.weight", "2.weight")
    )
