"""Expected errors of the command line as one line and an exit code: 1 failed, 2 invalid request."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Never

import typer

FAILED, INVALID = 1, 2
MAX_LINE = 1000


def fail(message: str, code: int) -> Never:
    """Print the error as one line of printable text and exit: files may have quoted themselves."""
    line = " ".join("".join(c if c.isprintable() else " " for c in message).split())
    if len(line) > MAX_LINE:
        line = f"{line[:MAX_LINE]}…"
    typer.echo(f"paellera: {line}", err=True)
    raise typer.Exit(code)


@contextlib.contextmanager
def one_line_errors(invalid_code: int = INVALID) -> Iterator[None]:
    """Turn expected exceptions into one line and an exit code.

    Args:
        invalid_code: the exit code of an invalid request.
    """
    from pydantic import ValidationError
    from safetensors import SafetensorError

    from server.api.errors import ApiError, reason
    from server.api.validation import from_validation

    try:
        yield
    except ValidationError as error:
        where = "bundle.json: " if error.title.startswith("Bundle") else ""
        fail(where + from_validation(error).message, invalid_code)
    except ApiError as error:
        fail(error.message, invalid_code)
    except (ValueError, FileNotFoundError) as error:
        fail(reason(error), invalid_code)
    except (OSError, SafetensorError) as error:
        fail(str(error), FAILED)
