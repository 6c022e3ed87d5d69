"""Compiled networks: what is compiled, when it is used, and what computes everything else.

Most tests take the plain forms for compiled ones; the last compile real libraries.
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from model.bundle import of_preset
from model.compiled import build, use
from model.compiled.build import CompileError, compile_pipeline
from model.compiled.programs import ROWS, Program, programs_of, rows_of
from model.compiled.use import CompiledExecutor, default_root, directory_of, use_compiled
from model.config import DENOISER, PriorSettings
from model.executor import Eager
from model.pipeline import Pipeline, PipelineV3, Reader
from server.engine.loading import load_pipeline
from server.engine.runner import Runner
from server.settings import Settings

PROMPT = "a red apple"


@pytest.fixture
def plain(preset_bundle: Path) -> PipelineV3:
    return loaded(preset_bundle)


def loaded(bundle: Path, dtype: torch.dtype = torch.float32) -> PipelineV3:
    pipeline = Pipeline.load(bundle, dtype=dtype)
    assert isinstance(pipeline, PipelineV3)
    return pipeline


def folder(pipeline: Pipeline, root: Path) -> Path:
    return directory_of(pipeline.config, pipeline.dtype, root)


@dataclass
class Libraries:
    """A folder of empty files, loaded as the plain forms of a pipeline's programs.

    used: names of the programs that were called. wrong: a program that returns zeros.
    """

    root: Path
    used: set[str] = field(default_factory=set)
    wrong: str = ""

    def load(self, path: Path) -> Callable[..., Tensor]:
        program = self.programs[path.stem]
        path.read_bytes()  # fails if there is none

        def compute(*inputs: Tensor) -> Tensor:
            self.used.add(program.name)
            computed = program.compute(*inputs)
            return torch.zeros_like(computed) if program.name == self.wrong else computed

        return compute

    def plant(self, pipeline: PipelineV3) -> Path:
        """Write the folder that is read for this pipeline."""
        self.programs: dict[str, Program] = {each.name: each for each in programs_of(pipeline)}
        directory = directory_of(pipeline.config, pipeline.dtype, self.root)
        directory.mkdir(parents=True, mode=0o700)
        for name in (*(f"{name}.so" for name in self.programs), use.MANIFEST):
            (directory / name).touch(mode=0o600)
        return directory


@pytest.fixture
def libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Libraries:
    made = Libraries(tmp_path)
    monkeypatch.setattr(use, "_load", made.load)
    return made


@pytest.fixture
def compiled(preset_bundle: Path, libraries: Libraries) -> PipelineV3:
    """A pipeline like `plain` that computes by the libraries."""
    pipeline = loaded(preset_bundle)
    libraries.plant(pipeline)
    assert use_compiled(pipeline, libraries.root)
    return pipeline


# ── the programs ──────────────────────────────────────────────────────────────────────────────────


def test_every_network_but_the_image_encoders_has_programs(plain: PipelineV3) -> None:
    assert [program.name for program in programs_of(plain)] == [
        "bytes",
        "text",
        "prior-0",
        "prior-1",
        "denoiser-condition",
        "denoiser-features",
        "denoiser-draw",
        "denoiser-fast-condition",
        "denoiser-fast-features",
        "denoiser-fast-draw",
        "decode",
    ]


@torch.inference_mode()
def test_rows_of_a_program_do_not_change_each_other(plain: PipelineV3) -> None:
    for program in programs_of(plain):
        one, several = (program.compute(*rows_of(program, rows)) for rows in (1, ROWS))
        torch.testing.assert_close(one, several[: len(one)], atol=1e-4, rtol=1e-4)


def test_the_example_of_a_program_fills_its_free_axes_with_equal_sizes(plain: PipelineV3) -> None:
    for program in programs_of(plain):
        sizes: dict[str, set[int]] = {}
        for tensor, axes in zip(program.example, program.axes, strict=True):
            for axis, letter in axes.items():
                sizes.setdefault(letter, set()).add(tensor.shape[axis])
        assert all(len(found) == 1 for found in sizes.values()), program.name


# ── when they are used ────────────────────────────────────────────────────────────────────────────


def test_an_image_is_drawn_by_the_programs_alone(
    plain: PipelineV3, compiled: PipelineV3, libraries: Libraries
) -> None:
    assert compiled.compiled == libraries.root
    for preset in compiled.config.preset_names:
        libraries.used.clear()
        sampling = plain.config.sampling(preset)
        expected = plain.generate([PROMPT, "two blue boxes"], [0, 1], sampling)
        assert torch.equal(
            compiled.generate([PROMPT, "two blue boxes"], [0, 1], sampling), expected
        )
        own = {"bytes", "text", "decode"}
        denoiser = "denoiser" if preset == "quality" else "denoiser-fast"
        own |= {f"{denoiser}-{part}" for part in ("condition", "features", "draw")}
        assert libraries.used - own in ({"prior-0"}, {"prior-1"})


def test_another_size_is_drawn_by_plain_operators(
    plain: PipelineV3, compiled: PipelineV3, libraries: Libraries
) -> None:
    libraries.used.clear()
    found, expected = (p.generate([PROMPT], [3], width=48, height=32) for p in (compiled, plain))
    assert torch.equal(found, expected)
    assert libraries.used.isdisjoint({"decode", "denoiser-features"})
    assert "denoiser-draw" in libraries.used


@pytest.mark.parametrize("sampler", ["argmax", "typical", "quant"])
def test_other_samplers_draw_by_plain_operators(
    sampler: str, plain: PipelineV3, compiled: PipelineV3, libraries: Libraries
) -> None:
    libraries.used.clear()
    config = replace(plain.config.sampling(), sampler=sampler)  # type: ignore[arg-type]
    found, expected = (p.generate([PROMPT], [3], config) for p in (compiled, plain))
    assert torch.equal(found, expected)
    assert "denoiser-draw" not in libraries.used


@torch.inference_mode()
def test_settings_of_the_prior_and_conditions_that_are_not_compiled_are_plain(
    compiled: PipelineV3, libraries: Libraries
) -> None:
    (prompt,) = compiled.encode([PROMPT])
    libraries.used.clear()
    other = PriorSettings(steps=5, guidance=1.5, sampler="ddim")
    noise = compiled.noise(0, 32, 32, 2, prior=other)
    (image,) = compiled.prior_embeddings([prompt], [noise], other)
    compiled.condition(prompt)
    compiled.condition(prompt, image, Reader(DENOISER, (0.5, 2.0)))
    assert not libraries.used
    compiled.condition(prompt, image, Reader(DENOISER))
    assert libraries.used == {"denoiser-condition"}


def test_without_a_folder_everything_is_plain_and_nothing_is_logged(
    plain: PipelineV3, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert not use_compiled(plain, tmp_path / "absent")
    assert plain.compiled is None
    assert not caplog.records


def test_v1_bundles_are_plain(random_v1_bundle: Path, tmp_path: Path) -> None:
    pipeline = Pipeline.load(random_v1_bundle)
    assert not use_compiled(pipeline, tmp_path)
    with pytest.raises(CompileError, match="only v3 bundles on a CPU"):
        compile_pipeline(pipeline, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_program_that_disagrees_is_named_and_none_is_used(
    plain: PipelineV3, libraries: Libraries, caplog: pytest.LogCaptureFixture
) -> None:
    libraries.plant(plain)
    for name in libraries.programs:
        libraries.wrong = name
        caplog.clear()
        assert not use_compiled(plain, libraries.root)
        assert caplog.messages == [f"compiled networks disagree, none is used: {name}"]
    assert type(plain.executor) is Eager


def test_a_library_that_cannot_be_loaded_costs_a_line_in_the_log(
    plain: PipelineV3, libraries: Libraries, caplog: pytest.LogCaptureFixture
) -> None:
    (libraries.plant(plain) / "decode.so").unlink()
    assert not use_compiled(plain, libraries.root)
    assert "compiled networks failed" in caplog.text


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX")
@pytest.mark.parametrize("name", ["", "decode.so"])
def test_a_folder_that_others_may_write_to_is_ignored(
    name: str, plain: PipelineV3, libraries: Libraries, caplog: pytest.LogCaptureFixture
) -> None:
    (libraries.plant(plain) / name).chmod(0o777)
    assert not use_compiled(plain, libraries.root)
    assert "other users may write to it" in caplog.text
    assert not libraries.used


def test_the_folder_depends_on_all_that_a_program_is_made_from(
    plain: PipelineV3, preset_bundle: Path, random_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path("root")
    folders = [
        folder(pipeline, root)
        for pipeline in (plain, loaded(random_bundle), loaded(preset_bundle, torch.bfloat16))
    ]
    for changed in ("torch", "cpu", "paellera", "format"):
        origin = use.origin(plain.config, plain.dtype) | {changed: "other"}
        with monkeypatch.context() as patch:
            patch.setattr(use, "origin", lambda config, dtype, origin=origin: origin)
            folders.append(folder(plain, root))
    assert len(set(folders)) == len(folders)
    assert folder(loaded(preset_bundle), root) == folders[0]


def test_a_changed_recipe_needs_no_other_programs(plain: PipelineV3) -> None:
    recipe = replace(plain.config.recipe, guidance_scale=(3.0, 3.0))
    changed = Pipeline.of(replace(plain.bundle, config=replace(plain.config, recipe=recipe)))
    assert folder(changed, Path()) == folder(plain, Path())


def test_the_users_cache_is_the_default_place(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_root() == tmp_path / "paellera" / "compiled"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_root() == Path.home() / ".cache" / "paellera" / "compiled"


def test_the_server_uses_them_unless_it_is_told_not_to(
    preset_bundle: Path, libraries: Libraries
) -> None:
    libraries.plant(loaded(preset_bundle))
    name = str(preset_bundle)
    settings = Settings(weights=name, device="cpu", dtype="float32", compiled_dir=libraries.root)
    assert isinstance(load_pipeline(name, settings).executor, CompiledExecutor)
    off = settings.model_copy(update={"compiled": False})
    assert type(load_pipeline(name, off).executor) is Eager


def test_a_worker_computes_by_its_compiled_networks_from_its_warm_up_on(
    preset_bundle: Path, libraries: Libraries
) -> None:
    libraries.plant(loaded(preset_bundle))
    settings = Settings(
        weights=str(preset_bundle), device="cpu", dtype="float32", compiled_dir=libraries.root
    )
    runner = Runner(settings)
    assert all(pipeline.compiled for pipeline in runner.pipelines.values())
    runner.warm_up()
    assert libraries.used >= {"bytes", "text", "denoiser-features", "denoiser-fast-draw", "decode"}


# ── compiling ─────────────────────────────────────────────────────────────────────────────────────


def test_a_failed_compilation_leaves_nothing_behind(
    plain: PipelineV3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(program: Program, output: Path) -> None:
        if program.name == "decode":
            raise CompileError("decode: no")
        output.touch()

    monkeypatch.setattr(build, "_compile", fail)
    before = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    with pytest.raises(CompileError, match="decode: no"):
        compile_pipeline(plain, tmp_path / "root")
    assert not list((tmp_path / "root").iterdir())
    assert os.environ.get("TORCHINDUCTOR_CACHE_DIR") == before


def test_compiling_again_replaces_what_was_there(
    plain: PipelineV3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "_compile", lambda program, output: output.touch())
    first = compile_pipeline(plain, tmp_path)
    (first / "decode.so").write_text("old")
    names: list[str] = []
    second = compile_pipeline(plain, tmp_path, lambda program: names.append(program.name))
    assert second == first
    assert (first / "decode.so").read_text() == ""
    assert names == [program.name for program in programs_of(plain)]
    assert list(tmp_path.iterdir()) == [first]


def run_compile(bundle: Path, root: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "server.cli", "compile", "--weights", str(bundle)],
        env={**os.environ, "PAELLERA_COMPILED_DIR": str(root), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.process
def test_without_a_compiler_the_command_says_what_to_install(
    random_bundle: Path, tmp_path: Path
) -> None:
    run = run_compile(random_bundle, tmp_path, CXX=str(tmp_path / "no-compiler"))
    assert run.returncode == 1
    reason = "no C++ compiler was found; install g++ or clang, or name one in CXX"
    assert run.stderr.splitlines()[-1] == f"paellera: {random_bundle}: {reason}"


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++ to compile with")
def test_a_compiled_bundle_draws_what_the_plain_one_draws(
    random_bundle: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    run = run_compile(random_bundle, tmp_path, PAELLERA_DTYPE="float32", PAELLERA_DEVICE="cpu")
    assert run.returncode == 0, run.stderr
    plain, compiled = loaded(random_bundle), loaded(random_bundle)
    assert use_compiled(compiled, tmp_path), caplog.text
    assert run.stdout.splitlines()[-1].endswith(str(folder(plain, tmp_path)))
    for prompts, seeds in (([PROMPT], [0]), (["", PROMPT, "x" * 60, PROMPT], [1, 2, 3, 4])):
        found, expected = (p.generate(prompts, seeds) for p in (compiled, plain))
        # A code may be drawn otherwise where a uniform lies at a bound.
        assert (found.float() - expected.float()).abs().mean() < 1
    guided, unguided = (
        replace(plain.config.sampling(), guidance=(scale, scale)) for scale in (3.0, 1.0)
    )
    for config in (guided, unguided):
        found, expected = (p.generate([PROMPT], [5], config) for p in (compiled, plain))
        assert (found.float() - expected.float()).abs().mean() < 1
    alone = Pipeline.of(of_preset(plain.bundle, plain.config.preset_names[0]))
    assert use_compiled(alone, tmp_path)
