"""Let a pipeline compute by programs that were compiled for it, this CPU and this torch.

They are looked for in a folder whose name is the hash of everything that they were made from, and
tried beside their plain forms before any is used. What is not compiled, such as another token grid
or sampler, computes in plain operators as before.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from pydantic_core import to_jsonable_python
from torch import Tensor

from model import sampling
from model.bundle import Bundle
from model.compiled.programs import (
    ROWS,
    Program,
    of_denoiser,
    of_prior,
    programs_of,
    rows_of,
)
from model.config import BundleConfig, PriorSettings, Sampler
from model.executor import BranchBatch, Eager, SamplingInputs
from model.networks.denoiser_v3 import Condition
from model.networks.text_encoders import ByteTower, TextTower
from model.pipeline import ConditionFn, DecodeFn, Pipeline, PipelineV3, PriorFn

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
# Counted up when the programs or their inputs change.
_FORMAT = 1
# The largest relative error beside the plain form; bf16 has eight bits.
_ERROR = 0.05
# The smallest share of equal codes.
_EQUAL = 0.95

Compiled = Callable[..., Tensor]


def default_root() -> Path:
    """Return where compiled networks are kept: in the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "paellera" / "compiled"


def origin(config: BundleConfig, dtype: torch.dtype) -> dict[str, str]:
    """Return everything that compiled programs depend on."""
    from importlib.metadata import version

    return {
        "format": str(_FORMAT),
        "paellera": version("paellera"),
        "torch": torch.__version__,
        "weights": _weights(config),
        "dtype": str(dtype).removeprefix("torch."),
        "cpu": _cpu(),
    }


def _weights(config: BundleConfig) -> str:
    """Return the hash of the files, the networks and the prior's settings.

    The vocabulary and other settings of the recipe are no part of a program.
    """
    names = *config.networks, "denoisers", "files", "native_size"
    fields = {name: to_jsonable_python(getattr(config, name)) for name in names}
    fields["priors"] = to_jsonable_python(config.prior_settings)
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def _cpu() -> str:
    """Return the processor's instruction set: libraries may use all of it."""
    machine = f"{platform.system()} {platform.machine()} {platform.processor()}"
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    flags = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    return f"{machine} {' '.join(sorted(flags.partition(':')[2].split()))}".strip()


def directory_of(config: BundleConfig, dtype: torch.dtype, root: Path) -> Path:
    """Return the folder of a bundle's compiled programs, present or not."""
    made_from = json.dumps(origin(config, dtype), sort_keys=True)
    return root / hashlib.sha256(made_from.encode()).hexdigest()[:32]


def has_programs(directory: Path) -> bool:
    """Return whether a folder of `directory_of` is there."""
    return (directory / MANIFEST).is_file()


def library(directory: Path, program: str) -> Path:
    """Return the path of a program's shared library."""
    return directory / f"{program}.so"


def use_compiled(pipeline: Pipeline, root: Path) -> bool:
    """Compute by the programs compiled for this pipeline; return whether there are any.

    All or none is taken. A program that fails or disagrees with its plain form costs one line in
    the log, and nothing is taken.
    """
    if not isinstance(pipeline, PipelineV3) or pipeline.device.type != "cpu":
        return False
    directory = directory_of(pipeline.config, pipeline.dtype, root)
    if not has_programs(directory):
        return False
    if _others_may_write(directory):
        log.warning("%s is ignored: other users may write to it", directory)
        return False
    programs = programs_of(pipeline)
    try:
        compiled = {each.name: _load(library(directory, each.name)) for each in programs}
        wrong = [each.name for each in programs if not _agrees(each, compiled[each.name])]
    except Exception:  # a private loader may be gone, and a library is other people's code
        log.warning("compiled networks failed: %s", directory, exc_info=True)
        return False
    if wrong:
        log.warning("compiled networks disagree, none is used: %s", ", ".join(wrong))
        return False
    _attach(pipeline, compiled)
    pipeline.compiled = root
    return True


def _others_may_write(directory: Path) -> bool:
    """Return whether another user could replace what is loaded and run here."""
    if os.name != "posix":
        return False
    kinds = [path.stat() for path in (directory, *directory.iterdir())]
    return any(kind.st_mode & 0o022 or kind.st_uid not in (0, os.geteuid()) for kind in kinds)


def _load(path: Path) -> Compiled:
    """Load a library. It is mapped from where it lies; torch's public loader unpacks a copy."""
    runner = torch._C._aoti.AOTIModelContainerRunnerCpu(str(path), 1)

    def compute(*inputs: Tensor) -> Tensor:
        (output,) = runner.run([tensor.contiguous() for tensor in inputs])
        return output

    return compute


@torch.inference_mode()
def _agrees(program: Program, compiled: Compiled) -> bool:
    """Compare with the plain form for one row and for several."""
    for rows in (1, ROWS):
        inputs = rows_of(program, rows)
        found, expected = compiled(*inputs), program.compute(*inputs)
        if found.shape != expected.shape or found.dtype != expected.dtype:
            return False
        if found.dtype == torch.int64:
            agrees = (found == expected).float().mean() >= _EQUAL
        else:
            error = (found.float() - expected.float()).norm()
            agrees = error <= _ERROR * expected.float().norm()
        if not agrees:
            return False
    return True


def _attach(pipeline: PipelineV3, compiled: Mapping[str, Compiled]) -> None:
    """Put the programs in the places of what they compute."""
    bundle, grid = pipeline.bundle, pipeline.grid(*pipeline.config.native_size)
    if isinstance(bundle.byt5.tower, ByteTower):
        bundle.byt5.tower.layers = compiled["bytes"]
    if isinstance(bundle.clip.tower, TextTower):
        bundle.clip.tower.layers = compiled["text"]
    own = enumerate(pipeline.config.prior_settings)
    pipeline.run_prior = _prior(pipeline, {each: compiled[of_prior(i)] for i, each in own})
    for name in pipeline.denoisers:
        parts = (compiled[of_denoiser(name, part)] for part in ("condition", "features", "draw"))
        condition, features, draw = parts
        pipeline.conditions[name] = _condition(pipeline.conditions[name], condition)
        pipeline.executors[name] = CompiledExecutor(bundle, name, grid, features, draw)
    pipeline.decode_tokens = _decode(pipeline.decode_tokens, compiled["decode"], grid)


def _prior(pipeline: PipelineV3, compiled: Mapping[PriorSettings, Compiled]) -> PriorFn:
    """Return the prior, compiled for the presets' settings."""

    def run(text: Tensor, noise: Tensor, settings: PriorSettings) -> Tensor:
        if settings in compiled:
            return compiled[settings](text, noise)
        return pipeline.sample_prior(text, noise, settings)

    return run


def _condition(plain: ConditionFn, compiled: Compiled) -> ConditionFn:
    """Return a denoiser's condition, compiled for a text with an image and without weights."""

    def condition(
        byt5: Tensor,
        mask: Tensor | None,
        clip: Tensor | None,
        image: Tensor | None,
        weights: Tensor | None,
    ) -> Condition:
        if mask is None or clip is None or image is None or weights is not None:
            return plain(byt5, mask, clip, image, weights)
        kv = compiled(byt5, clip, image)
        return Condition(kv, F.pad(mask, (0, kv.shape[1] - byt5.shape[1]), value=True))

    return condition


def _decode(plain: DecodeFn, compiled: Compiled, grid: tuple[int, int]) -> DecodeFn:
    """Return the decoder, compiled for one token grid."""

    def decode(tokens: Tensor) -> Tensor:
        return compiled(tokens) if tokens.shape[1:] == grid else plain(tokens)

    return decode


class CompiledExecutor(Eager):
    """Compute a step by two programs: the network on one token grid, and multinomial draws."""

    def __init__(
        self,
        bundle: Bundle,
        denoiser: str,
        grid: tuple[int, int],
        features: Compiled,
        draw: Compiled,
    ) -> None:
        super().__init__(bundle, denoiser)
        self._grid, self._features, self._draw = grid, features, draw

    def features(
        self, tokens: Tensor, times: Tensor, branches: BranchBatch, weights: Tensor
    ) -> Tensor:
        """Compute as `Executor.features`."""
        condition = branches.condition
        if tokens.shape[1:] != self._grid or condition.mask is None:
            return super().features(tokens, times, branches, weights)
        features = self._features(tokens, times, condition.kv, condition.mask, branches.row_of)
        return sampling.mix_branches(features, branches.row_of, weights, len(tokens))

    def _sample(self, sampler: Sampler, features: Tensor, inputs: SamplingInputs) -> Tensor:
        if sampler != "multinomial":
            return super()._sample(sampler, features, inputs)
        inverse = inputs.inverse[:, None, None].expand_as(inputs.uniform)
        codes = self._draw(features.flatten(0, 2), inputs.uniform.flatten(), inverse.flatten())
        return codes.view_as(inputs.uniform)
