"""How long OpenMP's threads spin while they wait for each other."""

from __future__ import annotations

import os

# Measured: fewer make an undisturbed step longer, more a disturbed one (docs/log.md).
SPINS = 10_000


def bound_spinning() -> None:
    """Before torch is imported: lets threads that wait go to sleep sooner, unless the environment has a say in it.

    Undisturbed they do not get there. By default they spin for longer than the kernel lets a neighbour compute, and take from each other
    what they wait for.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPINS))
