"""Compile a pipeline's programs by torch.export and AOTInductor; needs a C++ compiler.

Each becomes a shared library with its weights inside, which many processes map once.
"""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from model.compiled.programs import MOST, Program, programs_of
from model.compiled.use import MANIFEST, directory_of, library, origin
from model.pipeline import Pipeline, PipelineV3

# Weights are constants that may be laid out anew, and the number of threads is the caller's.
_OPTIONS = {"freezing": True, "cpp.dynamic_threads": True}


class CompileError(Exception):
    """The programs cannot be compiled here; the message says why."""


def compile_pipeline(
    pipeline: Pipeline, root: Path, report: Callable[[Program], object] = lambda program: None
) -> Path:
    """Compile all programs into the folder below `root` where `use_compiled` looks for them.

    The folder is complete or absent; an older one is replaced. report: called before each program.
    Raises CompileError for what cannot be compiled, and OSError.
    """
    if not isinstance(pipeline, PipelineV3) or pipeline.device.type != "cpu":
        raise CompileError("only v3 bundles on a CPU are compiled")
    target = directory_of(pipeline.config, pipeline.dtype, root)
    target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with TemporaryDirectory(dir=target.parent, prefix="compiling-") as name:
        made = Path(name) / target.name
        made.mkdir(mode=0o700)
        with _compiler_files_in(Path(name) / "files"):
            programs = programs_of(pipeline)
            for program in programs:
                report(program)
                _compile(program, library(made, program.name))
        names = [program.name for program in programs]
        content = {"programs": names, "made_from": origin(pipeline.config, pipeline.dtype)}
        (made / MANIFEST).write_text(json.dumps(content, indent=2) + "\n")
        if target.exists():
            target.rename(Path(name) / "replaced")
        made.rename(target)
    return target


@contextmanager
def _compiler_files_in(directory: Path) -> Iterator[None]:
    """Let the compiler keep its files in this directory, and nowhere else."""
    variable = "TORCHINDUCTOR_CACHE_DIR"
    before = os.environ.get(variable)
    os.environ[variable] = str(directory)
    try:
        yield
    finally:
        del os.environ[variable]
        if before is not None:
            os.environ[variable] = before


class _Module(nn.Module):
    """A program as torch.export takes it: a module that holds the weights."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.networks, self._compute = nn.ModuleList(program.networks), program.compute

    def forward(self, *inputs: Tensor) -> Tensor:
        """Compute the program."""
        return self._compute(*inputs)


@torch.no_grad()
def _compile(program: Program, output: Path) -> None:
    from torch._inductor import aoti_compile_and_package
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InductorError, InvalidCxxCompiler

    package = output.with_suffix(".pt2")
    try:
        get_cpp_compiler()
        exported = torch.export.export(
            _Module(program).eval(), program.example, dynamic_shapes=(_axes(program),)
        )
        aoti_compile_and_package(exported, package_path=str(package), inductor_configs=_OPTIONS)
    except InvalidCxxCompiler as error:
        raise CompileError(
            "no C++ compiler was found; install g++ or clang, or name one in CXX"
        ) from error
    except (InductorError, RuntimeError) as error:
        first = str(error).strip().partition("\n")[0]
        raise CompileError(f"{program.name}: {first}") from error
    with zipfile.ZipFile(package) as archive:
        (inside,) = (name for name in archive.namelist() if name.endswith(".wrapper.so"))
        with archive.open(inside) as source, output.open("xb") as file:
            shutil.copyfileobj(source, file)
    package.unlink()


def _axes(program: Program) -> tuple[dict[int, Any], ...]:
    """Return the free axes as torch.export names them."""
    letters = {letter for axes in program.axes for letter in axes.values()}
    sizes = {
        letter: torch.export.Dim(letter, min=1, max=program.most.get(letter, MOST))
        for letter in letters
    }
    return tuple({axis: sizes[letter] for axis, letter in axes.items()} for axes in program.axes)
