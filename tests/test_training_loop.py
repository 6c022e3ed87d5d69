"""The training loop: a resumed run is the run that never stopped, and what is kept is the average."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from model.prior import Prior
from model.training import loop, prior
from tests.conftest import micro_config
from tests.short_training import fit


@pytest.fixture
def o(tmp_path: Path) -> loop.Options:
    return loop.Options(
        minutes=1,
        checkpoint=tmp_path / "runs" / "x.pt",
        resume=False,
        batch=8,
        lr=3e-3,
        warmup=2,
        ema=0.99,
        seed=0,
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
    whole_average, whole_losses = fit(monkeypatch, 4, whole, prior_loss(whole), replace(o, checkpoint=o.checkpoint.with_name("whole.pt")))

    first = small_prior()
    _, losses = fit(monkeypatch, 2, first, prior_loss(first), o)
    second = small_prior(seed=99)  # other weights and another state of the generator, both to be replaced
    average, more = fit(monkeypatch, 2, second, prior_loss(second), replace(o, resume=True))

    assert losses + more == whole_losses
    for one, other in ((whole, second), (whole_average, average)):
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
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
    update, average, expected = loop.ema(decay), torch.zeros(1), 0.0
    for n in range(1, 40):
        update([average], [torch.full((1,), float(n))], n)
        weight = min(decay, (1 + n) / (10 + n))
        expected = weight * expected + (1 - weight) * n
    assert average.item() == pytest.approx(expected, rel=1e-5)


def test_the_average_of_a_counter_is_the_counter():
    counter = torch.tensor(3)
    loop.ema(0.9)([counter], [torch.tensor(8)], 5)
    assert counter.item() == 8


@pytest.mark.parametrize(
    ("done", "share", "rate"), [(0, 0.0, 0.25), (1, 0.5, 0.5), (3, 0.0, 1.0), (9, 0.7, 1.0), (9, 0.85, 0.5), (9, 1.0, 0.02)]
)
def test_the_learning_rate_warms_up_by_steps_and_falls_by_time(o, done, share, rate):
    network = small_prior()
    run = loop._Run(network, replace(o, warmup=4))
    run.step = done
    run.learn(prior_loss(network), share)
    assert run.optimizer.param_groups[0]["lr"] == pytest.approx(o.lr * rate)


def test_only_what_needs_a_gradient_is_trained(monkeypatch, o):
    network = small_prior()
    frozen = network.get_parameter("blocks.0.weight").requires_grad_(False)
    before = frozen.clone()
    fit(monkeypatch, 2, network, prior_loss(network), o)
    assert torch.equal(frozen, before)


def test_options_come_from_the_command_line():
    parser = loop.parser("Trains.", name="x", batch=32, lr=1e-3, minutes=5)
    options = loop.options(parser.parse_args(["--minutes", "2", "--device", "cpu", "--dtype", "float16"]))
    assert (options.minutes, options.batch, options.checkpoint) == (2.0, 32, Path("runs/x.pt"))
    assert options.dtype == torch.bfloat16
    assert options.workers == 0


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
    assert loop.load(o.checkpoint)["step"] == 3


def test_two_processes_take_the_same_steps(tmp_path):
    """What torchrun starts: both draw their own scenes, average their gradients and stay one network."""
    script = tmp_path / "train.py"
    script.write_text(
        "import sys, torch\n"
        "from model.training import loop\n"
        "o = loop.options(loop.parser(None, name='x', batch=1, lr=0.1, minutes=0.02).parse_args())\n"
        "network = torch.nn.Linear(3, 1)\n"
        "loss = lambda: (network(torch.randn(4, 3)).square().mean(), {})\n"
        "loop.fit(network, loss, o)\n"
        "torch.save(network.state_dict(), f'{sys.argv[-1]}.{loop.rank()}')\n"
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0", "--standalone"]
    arguments = ["--threads", "1", "--device", "cpu", "--checkpoint", str(tmp_path / "x.pt")]
    subprocess.run([*torchrun, str(script), *arguments], check=True, timeout=120, capture_output=True, cwd=Path(__file__).parents[1])
    first, second = (torch.load(f"{tmp_path / 'x.pt'}.{rank}", weights_only=True) for rank in (0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
