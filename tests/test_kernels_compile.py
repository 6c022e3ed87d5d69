"""Every kernel compiles for devices that are not here, and fits them: what the interpreter
cannot show.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from load_tests.gpu.compiled import Compiled
from load_tests.gpu.kernels import ODD

KERNELS = {
    "depthwise_norm",
    "gelu_energy",
    "scales",
    "apply",
    "multinomial",
    "argmax",
    "expand",
    "contract",
    "join",
    "renoise_and_pin",
}


@pytest.mark.process
def test_at_the_published_sizes_every_kernel_compiles_for_a100_and_h100_and_fits_them():
    # In a process of its own: in this one Triton interprets.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "load_tests.gpu.compiled", "--targets", "80,90"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])["kernels"]
    for target in (80, 90):
        assert {each["kernel"] for each in found if each["target"] == target} == KERNELS
    assert not [each for each in found if any(shape.label in each["shape"] for shape in ODD)], (
        "an odd size has a kernel of its own"
    )


@pytest.mark.parametrize(
    ("spilled", "shared", "good"),
    [(0, 227 << 10, True), (8, 0, True), (200, 0, False), (0, 256 << 10, False)],
)
def test_a_kernel_that_spills_or_asks_for_more_than_there_is_is_not_good(spilled, shared, good):
    assert Compiled("draw", "float16", 90, "", 1, 4, 255, spilled, shared).good == good
