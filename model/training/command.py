"""End a command in one sentence where somebody made an ordinary mistake."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import SubprocessError

from pydantic import ValidationError
from safetensors import SafetensorError

INTERRUPTED = 130
FAILED, INVALID = 1, 2


def run(main: Callable[[], None]) -> None:
    """Run a command's `main`; exit with one sentence for an error that its user can mend.

    The status is 2 for something wrong in what was asked for, 1 for a system that failed, and 130
    for Ctrl-C. Other errors keep their traceback.
    """
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None
    except Exception as error:
        words = _words(error)
        if words is None:
            raise
        line = " ".join(words.split())
        print(f"{Path(sys.argv[0]).stem}: {line}", file=sys.stderr, flush=True)
        raise SystemExit(_status(error)) from None


def _status(error: Exception) -> int:
    failed = isinstance(error, OSError | SubprocessError)
    return FAILED if failed and not isinstance(error, FileNotFoundError) else INVALID


def _words(error: Exception) -> str | None:
    """Return what to say of an error; None for one that is a fault of the program."""
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return "".join(f"{part}: " for part in first["loc"]) + first["msg"]
    if isinstance(error, BrokenPipeError):
        return None
    if isinstance(error, OSError) and error.strerror is not None:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if isinstance(error, ValueError | OSError | ImportError | SafetensorError | SubprocessError):
        return str(error)
    if isinstance(error, RuntimeError) and "loading state_dict" in str(error):
        problem = "".join(str(error).splitlines()[1:2]).partition(", ")[0]
        return f"the weights are another network's: {problem.strip().rstrip('.')}"
    return None
