"""A worker process's beginning: `enter`, then `run`.

Little is imported before `run`, so that the first lines run at once.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading

_PR_SET_PDEATHSIG = 1
MAX_REASON = 300
# Errors that the next attempt would meet again: wrong settings, weights and installations. Others
# may pass: a device or a disk that is full or busy.
_LASTING = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ImportError,
    FileNotFoundError,
    NotADirectoryError,
    PermissionError,
)


def enter(parent: int) -> None:
    """Leave Ctrl-C, SIGTERM and SIGHUP to the API process, and end when it ends.

    A terminal's Ctrl-C and a service manager's SIGTERM reach every process of the group, but only
    the API process decides when the worker stops: after the drain.

    parent: the API process's number.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
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


def run(pipe: int) -> None:
    """Run the function that the API process names. An error becomes a log line and a message."""
    import contextlib
    import importlib
    import logging
    from multiprocessing.connection import Connection

    from server import logs
    from server.engine.messages import Crashed, send_message

    connection = Connection(pipe)
    try:
        module, name, settings = connection.recv()
    except EOFError:  # the API process is gone
        sys.exit(1)
    sys.argv = ["paellera-worker"]
    log = logging.getLogger(__name__)
    logs.configure(settings.log_level)
    try:
        getattr(importlib.import_module(module), name)(connection, settings)
    except Exception as error:
        crash = Crashed(describe(error), isinstance(error, _LASTING))
        log.critical("worker crashed", exc_info=True, extra={"fields": {"reason": crash.reason}})
        with contextlib.suppress(OSError):
            send_message(connection, crash)
        sys.exit(1)


def describe(error: Exception) -> str:
    """Return the error as one printable line."""
    text = " ".join("".join(c if c.isprintable() else " " for c in str(error)).split())
    if not text or not isinstance(error, ValueError | OSError):
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return text if len(text) <= MAX_REASON else f"{text[:MAX_REASON]}…"
