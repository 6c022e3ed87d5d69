"""The first lines of a worker process. The standard library alone, so that they run at once."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading

_PR_SET_PDEATHSIG = 1


def enter(parent: int) -> None:
    """Leave Ctrl-C and SIGTERM to the API process, and end when it ends.

    A terminal's Ctrl-C and a service manager's SIGTERM reach every process of the group, but only
    the API process decides when the worker stops: after the drain.

    parent: the API process's number.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    if not killed_with_parent():
        threading.Thread(target=exit_at_end_of_input, name="lifeline", daemon=True).start()
    # The parent may have ended before the kernel was told.
    if os.getppid() != parent:
        os._exit(1)


def killed_with_parent() -> bool:
    """Ask Linux to kill this process when the thread that started it ends; return whether it will.

    It then ends even while it is stopped, or loads weights and runs no Python.
    """
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    return prctl is not None and prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) == 0


def exit_at_end_of_input() -> None:
    """Exit once nobody holds the other end of standard input: the API process is gone."""
    while os.read(sys.stdin.fileno(), 1):
        pass
    os._exit(1)
