"""Compile Triton's kernels for absent devices, and print the resources that each will use.

    python -m load_tests.gpu.compiled                       # A100 (sm_80) and H100, H200 (sm_90)
    python -m load_tests.gpu.compiled --targets 86 --dtypes bfloat16

The kernels are launched as at the published sizes, without a GPU: tensors are on the meta device,
and a launch ends when its kernel is compiled. This finds faults that the interpreter cannot show:
types that do not fit each other, registers that spill, shared memory that a device does not have.
The last line of output is JSON. Exits with 1 if a kernel spills or asks for more shared memory than
the device has; a kernel that does not compile raises.
"""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch
from rich.table import Table

from load_tests.batching import numbers
from load_tests.gpu.kernels import ALL_SHAPES, cases
from load_tests.report import Report

_COMMAND = "python -m load_tests.gpu.compiled"
# What one program may have of it, in bytes, by compute capability: CUDA's programming guide.
SHARED = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
# Bytes: with a few the assembler buys itself a round number of registers.
_SPILLED = 32
DTYPES = ("float16", "bfloat16", "float32")


@dataclass(frozen=True, slots=True)
class Compiled:
    """One kernel, compiled for one device.

    registers: of a thread. spilled: bytes of a thread. shared: bytes of a program. programs: the
    number launched.
    """

    kernel: str
    dtype: str
    target: int
    shape: str
    programs: int
    warps: int
    registers: int
    spilled: int
    shared: int

    @property
    def good(self) -> bool:
        return self.spilled <= _SPILLED and self.shared <= SHARED[self.target]


class _Absent:
    """A replacement for Triton's driver of an absent device.

    Its number is its compute capability.
    """

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)


@contextmanager
def _compiling(capability: int) -> Iterator[list[tuple[Any, tuple[int, ...]]]]:
    """Compile kernels instead of launching them, for this context; yield the list of them."""
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    launched: list[tuple[Any, tuple[int, ...]]] = []
    run = JITFunction.run

    def compile_only(
        kernel: Any, *arguments: Any, grid: tuple[int, ...], warmup: bool, **options: Any
    ) -> None:
        launched.append((run(kernel, *arguments, grid=grid, warmup=True, **options), grid))

    before = driver._active
    driver.set_active(_Absent(capability))
    try:
        with patch.object(JITFunction, "run", compile_only):
            yield launched
    finally:
        driver._active = before


def compiled(capability: int, dtype: torch.dtype) -> Iterator[Compiled]:
    """Yield every kernel of every published shape, each once.

    Raises the errors of Triton's compiler.
    """
    seen = set()
    with _compiling(capability) as launched:
        for shape in ALL_SHAPES:
            for case in cases(shape, "meta", dtype):
                case.kernel()
                for kernel, grid in launched:
                    if kernel.hash not in seen:
                        seen.add(kernel.hash)
                        yield _described(
                            kernel, grid, capability, dtype, f"{case.name}, {shape.label}"
                        )
                launched.clear()


def _described(
    kernel: Any, grid: tuple[int, ...], capability: int, dtype: torch.dtype, shape: str
) -> Compiled:
    usage = _usage(kernel.asm["cubin"])
    return Compiled(
        kernel=kernel.metadata.name.lstrip("_"),
        dtype=str(dtype).removeprefix("torch."),
        target=capability,
        shape=shape,
        programs=torch.Size(grid).numel(),
        warps=kernel.metadata.num_warps,
        registers=usage["REG"],
        spilled=usage["STACK"] + usage["LOCAL"],
        shared=kernel.metadata.shared,
    )


def _usage(binary: bytes) -> dict[str, int]:
    """Return the resources of a kernel's binary, by the NVIDIA tool that comes with Triton."""
    from triton import knobs

    with TemporaryDirectory() as directory:
        file = Path(directory) / "kernel.cubin"
        file.write_bytes(binary)
        said = subprocess.run(
            [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", said)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile for the devices that the command line names, and return the exit status."""
    sent = list(sys.argv[1:] if arguments is None else arguments)
    p = argparse.ArgumentParser(
        prog=_COMMAND, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument(
        "--targets", type=numbers, default=(80, 90), help="compute capabilities, 80,90 by default"
    )
    p.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float16"])
    parsed = p.parse_args(sent)
    found = [
        each
        for target in parsed.targets
        for dtype in parsed.dtypes
        for each in compiled(target, getattr(torch, dtype))
    ]
    report = Report("compiled", command=f"{_COMMAND} {shlex.join(sent)}")
    report.add(_table(found))
    report.emit({"triton": version("triton"), "kernels": [asdict(each) for each in found]})
    return int(not all(each.good for each in found))


def _table(found: Sequence[Compiled]) -> Table:
    table = Table(title="kernels", title_justify="left")
    for column in Compiled.__dataclass_fields__:
        table.add_column(column, justify="right")
    for each in found:
        table.add_row(*map(str, asdict(each).values()))
    return table


if __name__ == "__main__":
    sys.exit(main())
