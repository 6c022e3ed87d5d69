"""Trains all of the embedded networks within one budget of seconds, on one machine, from a corpus
to a bundle.

    python -m model.training.everything OUT --budget-seconds 300
    python -m model.training.everything OUT --smoke          # on the CPU, small and short
    python -m model.training.everything ONE --phases vqgan,bytes,clip,prior --budget-seconds 110
    python -m model.training.everything TWO --phases denoiser --from ONE --budget-seconds 290
    python -m model.training.everything --join TWO weights/tiny     # what a run has left → a bundle

A process each for the VQGAN, the byte encoder, CLIP, the judge of pictures, the denoiser and the
prior; this one samples the corpus, watches the clock, and writes what there is to OUT every time
that something is new: parts of at most 15 MiB, a log, figures. A run that is killed has left that.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.runtime import prepare

_PART = 15 * 2**20  # bytes
_STATE = "state.safetensors"
# Of the budget, the share that encoders and VQGAN have where the denoiser follows them; seconds for
# what comes after the last step.
_ENCODERS, _AFTERWARDS = 0.29, 9.0
_JUDGE = 50.0  # seconds that the judge learns for
_POLL = 0.25  # seconds


@dataclass(frozen=True)
class Plan:
    """Sizes and times of a run. Deadlines are readings of `time.time()`."""

    scratch: Path
    encoders_until: float
    denoiser_until: float
    end: float
    smoke: bool
    vqgan: str | None
    pictures: int
    record: bool = True

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if torch.cuda.is_available() and not self.smoke else "cpu")

    def batch(self, usual: int, smallest: int) -> int:
        return smallest if self.smoke else usual

    def save(self) -> None:
        fields = {
            name: str(value) if isinstance(value, Path) else value
            for name, value in self.__dict__.items()
        }
        _write(self.scratch / "plan.json", json.dumps(fields).encode())

    @classmethod
    def load(cls, scratch: Path) -> Plan:
        fields = json.loads((scratch / "plan.json").read_text())
        return cls(**{**fields, "scratch": scratch})


def _write(path: Path, content: bytes) -> None:
    """Write the whole file or none of it."""
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content)
    partial.replace(path)


def _save(path: Path, contents: Any) -> None:
    partial = path.with_name(path.name + ".partial")
    torch.save(contents, partial)
    partial.replace(path)


def _wait_for(*paths: Path) -> None:
    while not all(path.exists() for path in paths):
        time.sleep(_POLL / 5)


def _net(plan: Plan, name: str) -> Path:
    """Return where a network's weights are once they are final, under their published names."""
    return plan.scratch / f"{name}.net"


def _say(text: str) -> None:
    print(f"[{time.time() % 1e5:9.2f}] {text}", flush=True)


# ── what each process does ────────────────────────────────────────────────────────────────────────


def _options(
    plan: Plan,
    name: str,
    until: float,
    *,
    batch: int,
    lr: float,
    ema: float = 0.999,
    warmup: int = 100,
) -> Any:
    from model.training.options import Options

    return Options(
        minutes=max(until - time.time(), 0.5) / 60,
        steps=None,
        checkpoint=plan.scratch / f"{name}.pt",
        log_dir=None,
        resume=False,
        batch=batch,
        accumulate=1,
        lr=lr,
        warmup=3 if plan.smoke else warmup,
        ema=ema,
        seed=0,
        data_seed=0,
        device=plan.device,
        dtype=torch.bfloat16
        if plan.device.type == "cuda" or torch.cpu._is_avx512_bf16_supported()
        else torch.float32,
        workers=0,
        save_seconds=3.0 if plan.smoke else 40.0,
        record=plan.record,
    )


def _scenes(plan: Plan, tokens: bool) -> Any:
    """Return the corpus and the art, on the device, as soon as they are there."""
    from model.training import corpus
    from model.training.data import Scenes

    s = plan.scratch
    _wait_for(s / "atlas.pt", s / "corpus.safetensors", *([s / "clip_tokens.pt"] if tokens else []))
    known = torch.load(s / "clip_tokens.pt").to(plan.device) if tokens else None
    return Scenes(
        corpus.load(s / "corpus.safetensors").to(plan.device),
        torch.load(s / "atlas.pt").to(plan.device),
        known,
    )


def _seed(number: int) -> None:
    torch.manual_seed(number)
    torch.backends.cudnn.benchmark = True


def _role_vqgan(plan: Plan) -> None:
    from model.training import loop, tiny, vqgan

    _seed(1)
    trained = (
        vqgan.trained_vqgan(Path(plan.vqgan)) if plan.vqgan else vqgan.Autoencoder.fresh(tiny.VQGAN)
    )
    trained.to(plan.device)
    scenes = _scenes(plan, tokens=False)
    _figures(
        plan,
        "vqgan before",
        {"psnr": vqgan.held_out_psnr(trained.vqgan.eval(), scenes, *_few(plan))}
        if plan.vqgan
        else {},
    )
    o = _options(plan, "vqgan", plan.encoders_until, batch=plan.batch(256, 8), lr=1e-3, ema=0.98)
    with _accelerated(trained, plan, 64, 64):
        network = vqgan.train(
            trained, scenes, loop.replace(o, record=False), crop=64 if plan.smoke else 128
        )
    _final(plan, "vqgan", network)
    _figures(plan, "vqgan", {"psnr": vqgan.held_out_psnr(network, scenes, *_few(plan))})


def _few(plan: Plan) -> tuple[int, int]:
    """Return how many pictures figures are measured on, and how many of them at a time."""
    return (16, 8) if plan.smoke else (1024, 128)


def _role_bytes(plan: Plan) -> None:
    from model.training import byte_encoder, tiny

    _seed(2)
    encoder = byte_encoder.fresh(tiny.BYTE_ENCODER).to(plan.device)
    scenes = _scenes(plan, tokens=False)
    o = _options(plan, "byte_encoder", plan.encoders_until, batch=plan.batch(512, 16), lr=2e-3)
    trained = byte_encoder.train(encoder, scenes, o, _few(plan)[0])
    _final(plan, "byt5", trained)
    _figures(plan, "bytes", byte_encoder.accuracies(trained, scenes, _held_out(plan, scenes)))


def _held_out(plan: Plan, scenes: Any) -> Tensor:
    """Return scenes that no trainer has met."""
    return torch.arange(len(scenes.corpus) - _few(plan)[0], len(scenes.corpus), device=plan.device)


def _role_clip(plan: Plan) -> None:
    from model.networks.text_encoders import CLIP
    from model.training import clip, tiny

    _seed(3)
    _wait_for(plan.scratch / str(tiny.CLIP.merges))
    towers = CLIP(tiny.CLIP, plan.scratch).to(plan.device)
    scenes = _scenes(plan, tokens=True)
    o = _options(plan, "clip", plan.encoders_until, batch=plan.batch(512, 16), lr=2e-3)
    trained = clip.train(towers, scenes, o, _few(plan)[0])
    _final(plan, "clip", trained)
    index = _held_out(plan, scenes)
    index = index[scenes.corpus.aspect[index] == 0]
    among = 8 if plan.smoke else 256
    _figures(plan, "clip", {"found": clip.retrieval(trained, scenes, index, among)})


def _role_judge(plan: Plan) -> None:
    from model.training import judge

    left = plan.encoders_until - time.time() - (4 if plan.smoke else 12)
    minutes = max(min(_JUDGE, left), 1) / 60
    own = [
        "--minutes",
        str(minutes),
        "--batch",
        str(plan.batch(512, 8)),
        "--lr",
        "3e-3",
        "--device",
        plan.device.type,
    ]
    sys.argv = [
        "judge",
        *own,
        "--checkpoint",
        str(plan.scratch / "judge.pt"),
        "--out",
        str(plan.scratch / "detector.safetensors"),
    ]
    judge.main()


def _role_prior(plan: Plan) -> None:
    from model.networks.prior import Prior
    from model.training import prior, tiny

    _seed(5)
    scenes = _scenes(plan, tokens=False)
    o = _options(plan, "prior", plan.encoders_until, batch=plan.batch(1024, 32), lr=1e-3)
    trained = prior.train(Prior(tiny.PRIOR).to(plan.device), scenes, o, _few(plan)[0])
    _final(plan, "prior", trained)
    _figures(plan, "prior", prior.likeness(trained, scenes, _held_out(plan, scenes)))


def _role_denoiser(plan: Plan) -> None:
    from model.networks.denoiser_v3 import Denoiser
    from model.networks.vqgan_v3 import VQGAN
    from model.training import denoiser, loop
    from model.training.assemble import tiny_config
    from model.training.guides import Guided

    _seed(4)
    config = tiny_config()
    vqgan = VQGAN(config.vqgan).to(plan.device).eval().requires_grad_(False)
    scenes = _scenes(plan, tokens=False)
    guided = Guided(Denoiser(config.denoiser), vqgan.vquantizer.codebook.weight).to(plan.device)
    batch = plan.batch(512, 8)
    capacity = plan.batch(400_000, 64)
    o = _options(
        plan, "denoiser", plan.denoiser_until, batch=batch, lr=2e-3 if plan.smoke else 4e-3
    )
    encoding = denoiser.Encoding.of(config, vqgan, scenes, batch, capacity, o.dtype)
    losses = denoiser.scene_losses(guided, encoding)
    with _accelerated(guided, plan, batch, 8):
        for pool in encoding.pools.values():
            pool.fake()
        run = loop.prepared(guided, losses.losses, o, denoiser.matrices_of(guided))
        _say("denoiser: prepared")
        _wait_for(_net(plan, "vqgan"))
        vqgan.load_state_dict(torch.load(_net(plan, "vqgan"), map_location=plan.device))
        guided.codebook.copy_(vqgan.vquantizer.codebook.weight)
        for pool in encoding.pools.values():
            pool.forget()
        encoding.begin(8 if plan.smoke else 32)
        _say("denoiser: begins")
        o = loop.replace(o, minutes=max(plan.denoiser_until - time.time(), 0.5) / 60)
        matrices = denoiser.matrices_of(guided)
        loop.fit(guided, losses, o, None, matrices, encoding.grow, run=run)
    encoded = {f"encoded {aspect}": pool.encoded for aspect, pool in encoding.pools.items()}
    _figures(plan, "denoiser", {"steps": run.step, "skipped": run.skipped, **encoded})


@contextlib.contextmanager
def _accelerated(module: Any, plan: Plan, batch: int, side: int) -> Iterator[None]:
    from model.training.depthwise import accelerated

    with accelerated(module, batch, side):
        yield


_ROLES: dict[str, Callable[[Plan], None]] = {
    "judge": _role_judge,
    "vqgan": _role_vqgan,
    "bytes": _role_bytes,
    "clip": _role_clip,
    "denoiser": _role_denoiser,
    "prior": _role_prior,
}


def _replace(o: Any, **changes: Any) -> Any:
    from model.training import loop

    return loop.replace(o, **changes)


def _final(plan: Plan, name: str, network: Any) -> None:
    from model.bundle import state_of

    _save(_net(plan, name), {key: t.detach().cpu() for key, t in state_of(network).items()})
    _say(f"{name}: done")


def _figures(plan: Plan, name: str, figures: dict[str, Any]) -> None:
    _say(f"{name}: {figures}")
    _write(plan.scratch / f"{name.replace(' ', '_')}.figures", json.dumps({name: figures}).encode())


# ── the one that watches ──────────────────────────────────────────────────────────────────────────


class Watch:
    """The other processes, and what they have left so far."""

    def __init__(self, plan: Plan, out: Path, started: float) -> None:
        self.plan, self.out, self.started = plan, out, started
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.tried: dict[str, int] = {}
        self.exported: dict[str, float] = {}
        self.seen_log: dict[str, int] = {}

    def start(self, role: str) -> None:
        self.tried[role] = self.tried.get(role, 0) + 1
        log = (self.plan.scratch / f"{role}.log").open("ab")
        again = ["--no-record"] if self.tried[role] > 1 else []
        command = [
            sys.executable,
            "-u",
            "-m",
            "model.training.everything",
            "--role",
            role,
            "--scratch",
            str(self.plan.scratch),
            *again,
        ]
        self.processes[role] = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)

    def look(self) -> None:
        """Show what was said, start again what has failed, and export what is new."""
        self.show()
        for role, process in self.processes.items():
            until = (
                self.plan.denoiser_until
                if role in ("denoiser", "prior")
                else self.plan.encoders_until
            )
            if (
                process.poll() not in (None, 0)
                and self.tried[role] == 1
                and time.time() < until - 15
            ):
                _say(f"{role} ended with {process.returncode}; once more, step by step")
                self.start(role)
        self.export()

    def show(self) -> None:
        whole = []
        for role in self.processes:
            path = self.plan.scratch / f"{role}.log"
            text = path.read_bytes() if path.exists() else b""
            fresh, self.seen_log[role] = text[self.seen_log.get(role, 0) :], len(text)
            for line in fresh.decode(errors="replace").replace("\r", "\n").splitlines():
                if line.strip():
                    print(f"{role}: {line.strip()}", flush=True)
            whole.append(f"==== {role}\n{text.decode(errors='replace')}")
        _write(self.out / "log.txt", "\n".join(whole).replace("\r", "\n").encode()[-8 * 2**20 :])

    def export(self) -> None:
        """Write parts and figures if a checkpoint is newer than those written last."""
        names = ("vqgan.pt", "byte_encoder.pt", "clip.pt", "prior.pt", "denoiser.pt")
        files = [*(self.plan.scratch / name for name in names), *self.plan.scratch.glob("*.net")]
        there = {path.name: path.stat().st_mtime for path in files if path.exists()}
        self._write_figures()
        judge = self.plan.scratch / "detector.safetensors"
        if judge.exists():
            shutil.copyfile(judge, self.out / judge.name)
        if there == self.exported:
            return
        try:
            _write_parts(self.out, _collected(self.plan.scratch))
            self.exported = there
        except Exception:
            traceback.print_exc()

    def _write_figures(self) -> None:
        figures: dict[str, Any] = {"seconds": round(time.time() - self.started, 1)}
        for path in sorted(self.plan.scratch.glob("*.figures")):
            figures |= json.loads(path.read_text())
        _write(self.out / "figures.json", json.dumps(figures, indent=1).encode())

    @property
    def working(self) -> bool:
        return any(process.poll() is None for process in self.processes.values())

    def stop(self) -> None:
        for process in self.processes.values():
            if process.poll() is None:
                process.kill()


def _collected(scratch: Path) -> dict[str, Tensor]:
    """Return the averaged weights of every network that there is a checkpoint of, in fp16, and
    CLIP's merges as bytes."""
    from model.training import loop
    from model.training.assemble import _SOURCES
    from model.training.checkpoint import averaged

    tensors: dict[str, Tensor] = {}
    for network, (name, prefix) in _SOURCES.items():
        if (scratch / f"{network}.net").exists():
            state = torch.load(scratch / f"{network}.net", map_location="cpu")
        elif (scratch / f"{name}.pt").exists():
            state = averaged(loop.load(scratch / f"{name}.pt"), prefix)
        else:
            continue
        tensors |= {
            f"{network}:{key}": t.half() if t.is_floating_point() else t for key, t in state.items()
        }
    if (scratch / "vqgan.pt").exists():  # what the codebook's training goes on with
        codes = averaged(loop.load(scratch / "vqgan.pt"), "codes.")
        tensors |= {f"codes:{key}": t.float() for key, t in codes.items()}
    for merges in scratch.glob("*.txt.gz"):
        tensors[f"file:{merges.name}"] = torch.frombuffer(
            bytearray(merges.read_bytes()), dtype=torch.uint8
        )
    return tensors


def _write_parts(out: Path, tensors: dict[str, Tensor]) -> None:
    from safetensors.torch import save

    content = save({name: t.detach().cpu().contiguous() for name, t in tensors.items()})
    parts = [content[start : start + _PART] for start in range(0, len(content), _PART)]
    for number, part in enumerate(parts):
        _write(out / f"{_STATE}.{number}", part)


def join(out: Path, bundle: Path, dtype: torch.dtype = torch.float16) -> None:
    """Make a bundle of the parts that a run has left in `out`; networks that were not trained are
    random.

    Raises FileNotFoundError where there are no parts.
    """
    from model.bundle import build, inner, save_bundle
    from model.networks.denoiser_v3 import Denoiser
    from model.training.assemble import tiny_config
    from model.training.codes import quiet

    tensors, config = _read_parts(out), tiny_config()
    with tempfile.TemporaryDirectory() as folder:
        merges = Path(folder) / str(config.clip.merges)
        merges.write_bytes(_merges(tensors))
        made = build(config, merges.parent, "cpu")
        for name, network in made.networks():
            if state := _state(tensors, name):
                inner(network).load_state_dict(state, strict=name != "byt5")
                if isinstance(network, Denoiser):
                    quiet(network)
        written = save_bundle(made, bundle, dtype, merges)
    for name, entry in written.files.items():
        print(f"{entry.bytes / 1e6:8.2f} MB  {name}")


def _read_parts(out: Path) -> dict[str, Tensor]:
    """Return what the parts hold. Raises FileNotFoundError where there are no parts."""
    from safetensors.torch import load

    parts = sorted(out.glob(f"{_STATE}.*"), key=lambda path: int(path.suffix[1:]))
    if not parts:
        raise FileNotFoundError(f"{out}: no {_STATE}.0 in it")
    return load(b"".join(path.read_bytes() for path in parts))


def _state(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """Return one network's weights in fp32 under their published names; empty if it was not
    trained."""
    own = {key.partition(":")[2]: t for key, t in tensors.items() if key.startswith(f"{name}:")}
    return {key: t.float() if t.is_floating_point() else t for key, t in own.items()}


def _merges(tensors: dict[str, Tensor]) -> bytes:
    return bytes(next(t for name, t in tensors.items() if name.startswith("file:")).tolist())


def _begin_from(plan: Plan, out: Path, phases: list[str]) -> None:
    """Put an earlier run's networks where those that this run does not train are looked for."""
    from model.training import tiny

    tensors = _read_parts(out)
    (plan.scratch / str(tiny.CLIP.merges)).write_bytes(_merges(tensors))
    for network, role in (
        ("vqgan", "vqgan"),
        ("byt5", "bytes"),
        ("clip", "clip"),
        ("prior", "prior"),
        ("denoiser", "denoiser"),
    ):
        state = _state(tensors, network)
        if state and role not in phases:
            _save(_net(plan, network), state)


def _prepare_data(plan: Plan) -> None:
    """Make atlas, corpus, vocabulary and tokens, each a file as soon as it is there."""
    from concurrent.futures import ThreadPoolExecutor

    from safetensors.numpy import save_file

    from model.networks.text_encoders import CLIP
    from model.training import art, clip, corpus, tiny
    from model.training.data import Scenes

    s = plan.scratch
    with ThreadPoolExecutor(1) as thread:
        drawn = thread.submit(art.atlas)
        arrays = corpus.sample_arrays(plan.pictures, 0, max(1, (os.cpu_count() or 2) - 3))
        save_file(arrays, s / "corpus.partial")
        (s / "corpus.partial").rename(s / "corpus.safetensors")
        _say(f"corpus: {plan.pictures}")
        known = corpus.load(s / "corpus.safetensors")
        _save(s / "atlas.pt", drawn.result())
        _say("atlas")
    scenes = Scenes(known, torch.empty(0))
    merges = s / str(tiny.CLIP.merges)
    if not merges.exists():
        clip.learn_merges(
            s / "learnt.gz",
            tiny.CLIP.text_cfg.vocab_size,
            scenes.captions(1000 if plan.smoke else 20_000),
        )
        (s / "learnt.gz").rename(merges)
    _say("merges")
    _save(s / "clip_tokens.pt", clip.tokenize(CLIP(tiny.CLIP, s), scenes))
    _say("tokens")


def everything(args: argparse.Namespace) -> None:
    started = args.started or time.time()
    args.out.mkdir(parents=True, exist_ok=True)
    memory = Path("/dev/shm")
    root = memory if memory.is_dir() and shutil.disk_usage(memory).free > 8 * 2**30 else None
    scratch = Path(tempfile.mkdtemp(prefix="everything-", dir=root))
    end, phases = started + args.budget_seconds, args.phases.split(",")
    denoiser_until = end - (0.2 * args.budget_seconds if args.smoke else _AFTERWARDS)
    share = 0.5 if args.smoke else _ENCODERS
    plan = Plan(
        scratch=scratch,
        encoders_until=started + share * args.budget_seconds
        if "denoiser" in phases
        else denoiser_until,
        denoiser_until=denoiser_until,
        end=end,
        smoke=args.smoke,
        vqgan=None if args.vqgan is None else str(args.vqgan.resolve()),
        pictures=400 if args.smoke else args.pictures,
    )
    plan.save()
    watch = Watch(plan, args.out, started)
    try:
        if args.from_run is not None:
            _begin_from(plan, args.from_run, phases)
        for role in phases:
            watch.start(role)
        _prepare_data(plan)
        while watch.working and time.time() < plan.end - (1 if args.smoke else 4):
            watch.look()
            time.sleep(4 * _POLL)
        watch.look()
    finally:
        watch.stop()
        watch.show()
        shutil.rmtree(scratch, ignore_errors=True)
    _say(f"{time.time() - started:.1f} s")


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("out", type=Path, nargs="?")
    p.add_argument("--budget-seconds", type=float, default=300)
    p.add_argument(
        "--started", type=float, help="when the budget began, as `date +%%s` says it (default now)"
    )
    p.add_argument(
        "--phases",
        default=",".join(_ROLES),
        help=f"which networks to train (default {','.join(_ROLES)})",
    )
    p.add_argument(
        "--from",
        dest="from_run",
        type=Path,
        help="what an earlier run has left: the networks that this one does not train",
    )
    p.add_argument("--vqgan", type=Path, help="checkpoint of `model.training.vqgan` to go on with")
    p.add_argument("--pictures", type=int, default=300_000)
    p.add_argument(
        "--smoke", action="store_true", help="on the CPU, with next to nothing of everything"
    )
    p.add_argument(
        "--join",
        type=Path,
        nargs=2,
        metavar=("OUT", "BUNDLE"),
        help="make a bundle of what a run has left",
    )
    p.add_argument("--role", choices=_ROLES, help=argparse.SUPPRESS)
    p.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    p.add_argument("--no-record", action="store_true", help=argparse.SUPPRESS)
    args = p.parse_args()
    if unknown := set(args.phases.split(",")) - _ROLES.keys():
        p.error(f"no such phase: {', '.join(sorted(unknown))}")
    if args.role:
        plan = Plan.load(args.scratch)
        plan = Plan(**{**plan.__dict__, "record": not args.no_record})
        prepare(1 if plan.smoke else 2)
        _ROLES[args.role](plan)
    elif args.join:
        prepare()
        join(*args.join)
    elif args.out is None:
        p.error("where to?")
    else:
        prepare()
        everything(args)


if __name__ == "__main__":
    main()
