"""Train all of the embedded networks within one budget of seconds, on one machine.

    python -m model.training.everything OUT --budget-seconds 300
    python -m model.training.everything OUT --smoke          # on the CPU, small and short
    python -m model.training.everything ONE --phases vqgan,bytes,clip,prior --budget-seconds 110
    python -m model.training.everything TWO --phases denoiser --from ONE --budget-seconds 290
    python -m model.training.everything --join TWO weights/tiny     # parts of a run → a bundle

The VQGAN, the byte encoder, CLIP, the judge of images, the denoiser and the prior train in one
process each (`everything_roles.py`). This process samples the corpus, watches the clock, and writes
every new result to OUT: parts of at most 15 MiB (`everything_parts.py`), a log, figures. A run that
is killed leaves its latest results there.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from model.runtime import prepare
from model.training import checkpoint, command
from model.training.arguments import COUNT, POSITIVE
from model.training.everything_roles import ROLES, Plan, log, network_file
from model.whole_file import whole_file

# Share of the budget for encoders and VQGAN where the denoiser follows them; seconds for the work
# after the last step.
_ENCODERS, _AFTERWARDS = 0.29, 9.0
_LOOK_SECONDS = 1.0  # between two looks at the processes
_CHECKPOINTS = ("vqgan.pt", "byte_encoder.pt", "clip.pt", "prior.pt", "denoiser.pt")
_ROLE_OF = {
    "vqgan": "vqgan",
    "byt5": "bytes",
    "clip": "clip",
    "prior": "prior",
    "denoiser": "denoiser",
}  # network → the role that trains it
_LOG_BYTES = 8 * 2**20


class Watch:
    """The processes of a run, and the results they have written so far."""

    def __init__(self, plan: Plan, out: Path, started: float) -> None:
        self.plan = plan
        self.out = out
        self.started = started
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.tried: dict[str, int] = {}
        self.exported: dict[str, float] = {}
        self.seen_log: dict[str, int] = {}

    def start(self, role: str) -> None:
        """Start a role's process; after a failure, without recorded steps."""
        self.tried[role] = self.tried.get(role, 0) + 1
        output = (self.plan.scratch / f"{role}.log").open("ab")
        again = ["--no-record"] if self.tried[role] > 1 else []
        arguments = ["--role", role, "--scratch", str(self.plan.scratch), *again]
        command = [sys.executable, "-u", "-m", "model.training.everything", *arguments]
        self.processes[role] = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)

    def look(self) -> None:
        """Show new output, restart a failed process once, and export new results."""
        self.show()
        for role, process in self.processes.items():
            late = role in ("denoiser", "prior")
            until = self.plan.denoiser_until if late else self.plan.encoders_until
            failed = process.poll() not in (None, 0)
            if failed and self.tried[role] == 1 and time.time() < until - 15:
                log(f"{role} ended with {process.returncode}; once more, step by step")
                self.start(role)
        self.export()

    def show(self) -> None:
        """Print the new output of all processes, and write all of it to the log."""
        whole = []
        for role in self.processes:
            path = self.plan.scratch / f"{role}.log"
            text = path.read_bytes() if path.exists() else b""
            fresh, self.seen_log[role] = text[self.seen_log.get(role, 0) :], len(text)
            for line in fresh.decode(errors="replace").replace("\r", "\n").splitlines():
                if line.strip():
                    print(f"{role}: {line.strip()}", flush=True)
            whole.append(f"==== {role}\n{text.decode(errors='replace')}")
        content = "\n".join(whole).replace("\r", "\n").encode()
        checkpoint.write(self.out / "log.txt", content[-_LOG_BYTES:])

    def export(self) -> None:
        """Write figures, and parts if a network is newer than the latest parts."""
        from model.training.everything_parts import collected, write_parts

        scratch = self.plan.scratch
        files = [*(scratch / name for name in _CHECKPOINTS), *scratch.glob("*.net")]
        there = {path.name: path.stat().st_mtime for path in files if path.exists()}
        self._write_figures()
        judge = scratch / "detector.safetensors"
        if judge.exists():
            shutil.copyfile(judge, self.out / judge.name)
        if there == self.exported:
            return
        try:
            write_parts(self.out, collected(scratch))
            self.exported = there
        except Exception:  # the next look tries again
            traceback.print_exc()

    def _write_figures(self) -> None:
        figures: dict[str, Any] = {"seconds": round(time.time() - self.started, 1)}
        for path in sorted(self.plan.scratch.glob("*.figures")):
            figures |= json.loads(path.read_text())
        checkpoint.write(self.out / "figures.json", json.dumps(figures, indent=1).encode())

    @property
    def working(self) -> bool:
        """Return whether any process is running."""
        return any(process.poll() is None for process in self.processes.values())

    def stop(self) -> None:
        """Kill the processes that are still running."""
        for process in self.processes.values():
            if process.poll() is None:
                process.kill()


def _begin_from(plan: Plan, out: Path, phases: list[str]) -> None:
    """Copy the networks that this run does not train from an earlier run to the scratch folder."""
    from model.training import tiny
    from model.training.everything_parts import merges_of, read_parts, state_of

    tensors = read_parts(out)
    (plan.scratch / str(tiny.CLIP.merges)).write_bytes(merges_of(tensors))
    for network, role in _ROLE_OF.items():
        state = state_of(tensors, network)
        if state and role not in phases:
            checkpoint.save(network_file(plan, network), state)


def _prepare_data(plan: Plan) -> None:
    """Write atlas, corpus, vocabulary and tokens to the scratch folder, each in one piece."""
    from safetensors.numpy import save_file

    from model.networks.text_encoders import CLIP
    from model.training import art, clip, corpus, tiny
    from model.training.data import Scenes

    s = plan.scratch
    with ThreadPoolExecutor(1) as thread:
        drawn = thread.submit(art.atlas)
        arrays = corpus.sample_arrays(plan.images, 0, max(1, (os.cpu_count() or 2) - 3))
        with whole_file(s / "corpus.safetensors") as partial:
            save_file(arrays, partial)
        log(f"corpus: {plan.images}")
        known = corpus.load(s / "corpus.safetensors")
        checkpoint.save(s / "atlas.pt", drawn.result())
        log("atlas")
    scenes = Scenes(known, torch.empty(0))
    merges = s / str(tiny.CLIP.merges)
    if not merges.exists():
        clip.learn_merges(
            s / "learnt.gz",
            tiny.CLIP.text_cfg.vocab_size,
            scenes.captions(1000 if plan.smoke else 20_000),
        )
        (s / "learnt.gz").rename(merges)
    log("merges")
    checkpoint.save(s / "clip_tokens.pt", clip.tokenize(CLIP(tiny.CLIP, s), scenes))
    log("tokens")


def _plan(args: argparse.Namespace, started: float, phases: list[str]) -> Plan:
    """Return the run's plan, with a new scratch folder: in memory where that has 8 GiB free."""
    memory = Path("/dev/shm")
    root = memory if memory.is_dir() and shutil.disk_usage(memory).free > 8 * 2**30 else None
    budget = args.budget_seconds
    denoiser_until = started + budget - (0.2 * budget if args.smoke else _AFTERWARDS)
    encoders_until = started + (0.5 if args.smoke else _ENCODERS) * budget
    return Plan(
        scratch=Path(tempfile.mkdtemp(prefix="everything-", dir=root)),
        encoders_until=encoders_until if "denoiser" in phases else denoiser_until,
        denoiser_until=denoiser_until,
        end=started + budget,
        smoke=args.smoke,
        vqgan=None if args.vqgan is None else str(args.vqgan.resolve()),
        images=400 if args.smoke else args.images,
    )


def everything(args: argparse.Namespace) -> None:
    """Run the phases that the parsed command line names, until its budget is spent."""
    started = args.started or time.time()
    args.out.mkdir(parents=True, exist_ok=True)
    phases = args.phases.split(",")
    plan = _plan(args, started, phases)
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
            time.sleep(_LOOK_SECONDS)
        watch.look()
    finally:
        watch.stop()
        watch.show()
        shutil.rmtree(plan.scratch, ignore_errors=True)
    log(f"{time.time() - started:.1f} s")


def _parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("out", type=Path, nargs="?", help="folder for parts, log and figures")
    p.add_argument("--budget-seconds", type=POSITIVE, default=300, help="of all (default 300)")
    p.add_argument(
        "--started",
        type=float,
        help="when the budget began, as `date +%%s` prints it (default now)",
    )
    p.add_argument(
        "--phases",
        default=",".join(ROLES),
        help=f"which networks to train (default {','.join(ROLES)})",
    )
    p.add_argument(
        "--from",
        dest="from_run",
        type=Path,
        help="an earlier run's OUT, for the networks that this run does not train",
    )
    p.add_argument("--vqgan", type=Path, help="checkpoint of `model.training.vqgan` to go on with")
    p.add_argument("--images", "--pictures", type=COUNT, default=300_000, help="size of the corpus")
    p.add_argument("--smoke", action="store_true", help="a short run on the CPU, all sizes small")
    p.add_argument(
        "--join",
        type=Path,
        nargs=2,
        metavar=("OUT", "BUNDLE"),
        help="make a bundle of a run's parts",
    )
    p.add_argument("--role", choices=ROLES, help=argparse.SUPPRESS)
    p.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    p.add_argument("--no-record", action="store_true", help=argparse.SUPPRESS)
    return p


def main() -> None:
    """Run everything, train one role, or join a run's parts, as the command line says."""
    p = _parser()
    args = p.parse_args()
    if unknown := set(args.phases.split(",")) - ROLES.keys():
        p.error(f"no such phase: {', '.join(sorted(unknown))}")
    if args.role:
        plan = Plan.load(args.scratch)
        plan = Plan(**{**plan.__dict__, "record": not args.no_record})
        prepare(1 if plan.smoke else 2)
        ROLES[args.role](plan)
    elif args.join:
        from model.training.everything_parts import join

        prepare()
        join(*args.join)
    elif args.out is None:
        p.error("OUT is missing")
    else:
        prepare()
        everything(args)


if __name__ == "__main__":
    command.run(main)
