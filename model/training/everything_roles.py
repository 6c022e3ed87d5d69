"""Train one network of a timed run: the work of each process that `everything.py` starts.

Processes of a run share a scratch folder: a process waits for the files it needs, and leaves its
network there once it is final. Modules are imported where they are needed, so that a process starts
fast.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from model.training import checkpoint

if TYPE_CHECKING:
    from model.training.data import Scenes
    from model.training.options import Options

_JUDGE_SECONDS = 50.0  # of the judge's training
_WAIT_SECONDS = 0.05  # between two looks for a file


@dataclass(frozen=True)
class Plan:
    """Sizes and times of a run. Deadlines are readings of `time.time()`."""

    scratch: Path
    encoders_until: float
    denoiser_until: float
    end: float
    smoke: bool
    vqgan: str | None
    images: int
    record: bool = True

    @property
    def device(self) -> torch.device:
        """Return the device to train on."""
        return torch.device("cuda" if torch.cuda.is_available() and not self.smoke else "cpu")

    def batch(self, usual: int, smallest: int) -> int:
        """Return the size for this run: `smallest` in a smoke run, else `usual`."""
        return smallest if self.smoke else usual

    def save(self) -> None:
        """Write the plan to the scratch folder."""
        fields = {
            name: str(value) if isinstance(value, Path) else value
            for name, value in self.__dict__.items()
        }
        checkpoint.write(self.scratch / "plan.json", json.dumps(fields).encode())

    @classmethod
    def load(cls, scratch: Path) -> Plan:
        """Return the plan in the scratch folder."""
        fields = json.loads((scratch / "plan.json").read_text())
        return cls(**{**fields, "scratch": scratch})


def network_file(plan: Plan, network: str) -> Path:
    """Return the file with a network's final weights, under their published names."""
    return plan.scratch / f"{network}.net"


def log(text: str) -> None:
    """Print a line with the time of day in seconds."""
    print(f"[{time.time() % 1e5:9.2f}] {text}", flush=True)


def _wait_for(*paths: Path) -> None:
    while not all(path.exists() for path in paths):
        time.sleep(_WAIT_SECONDS)


def _options(
    plan: Plan,
    name: str,
    until: float,
    *,
    batch: int,
    lr: float,
    ema: float = 0.999,
) -> Options:
    """Return the options of a trainer that stops at the time `until`."""
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
        warmup=3 if plan.smoke else 100,
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


def _scenes(plan: Plan, tokens: bool) -> Scenes:
    """Wait for the corpus and the art, and return them on the device.

    tokens: wait for CLIP's tokens of the captions too.
    """
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
    from model.training.depthwise import accelerated

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
    with accelerated(trained, 64, 64):
        network = vqgan.train(
            trained, scenes, loop.replace(o, record=False), crop=64 if plan.smoke else 128
        )
    _final(plan, "vqgan", network)
    _figures(plan, "vqgan", {"psnr": vqgan.held_out_psnr(network, scenes, *_few(plan))})


def _few(plan: Plan) -> tuple[int, int]:
    """Return the number of images that figures are measured on, and of one batch of them."""
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


def _held_out(plan: Plan, scenes: Scenes) -> Tensor:
    """Return the numbers of the scenes that no trainer has met."""
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
    (plan.scratch / "judge.pt").unlink(missing_ok=True)  # of a process that failed
    minutes = max(min(_JUDGE_SECONDS, left), 1) / 60
    arguments = {
        "--minutes": minutes,
        "--batch": plan.batch(512, 8),
        "--lr": "3e-3",
        "--device": plan.device.type,
        "--checkpoint": plan.scratch / "judge.pt",
        "--out": plan.scratch / "detector.safetensors",
    }
    sys.argv = ["judge", *(str(part) for pair in arguments.items() for part in pair)]
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
    from model.training.depthwise import accelerated
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
    encoding = denoiser.Encoding.of(config, vqgan, scenes, batch, capacity, o.dtype, sprites=True)
    losses = denoiser.scene_losses(guided, encoding)
    with accelerated(guided, batch, 8):
        for pool in encoding.pools.values():
            pool.fake()
        run = loop.prepared(guided, losses.losses, o, denoiser.matrices_of(guided))
        log("denoiser: prepared")
        _wait_for(network_file(plan, "vqgan"))
        vqgan.load_state_dict(torch.load(network_file(plan, "vqgan"), map_location=plan.device))
        guided.use_codebook(vqgan.vquantizer.codebook.weight)
        for pool in encoding.pools.values():
            pool.forget()
        encoding.begin(8 if plan.smoke else 32)
        log("denoiser: begins")
        o = loop.replace(o, minutes=max(plan.denoiser_until - time.time(), 0.5) / 60)
        matrices = denoiser.matrices_of(guided)
        loop.fit(guided, losses, o, None, matrices, encoding.grow, run=run)
    encoded = {f"encoded {aspect}": pool.encoded for aspect, pool in encoding.pools.items()}
    _figures(plan, "denoiser", {"steps": run.step, "skipped": run.skipped, **encoded})


ROLES: dict[str, Callable[[Plan], None]] = {
    "judge": _role_judge,
    "vqgan": _role_vqgan,
    "bytes": _role_bytes,
    "clip": _role_clip,
    "denoiser": _role_denoiser,
    "prior": _role_prior,
}


def _final(plan: Plan, name: str, network: nn.Module) -> None:
    """Write a network's final weights."""
    from model.bundle import state_of

    checkpoint.save(
        network_file(plan, name), {key: t.detach().cpu() for key, t in state_of(network).items()}
    )
    log(f"{name}: done")


def _figures(plan: Plan, name: str, figures: dict[str, Any]) -> None:
    """Print figures, and write them for the report of the run."""
    log(f"{name}: {figures}")
    checkpoint.write(
        plan.scratch / f"{name.replace(' ', '_')}.figures", json.dumps({name: figures}).encode()
    )
