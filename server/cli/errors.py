"""Expected errors of the command line as one line and an exit code: 1 failed, 2 invalid request."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Container, Iterator
from typing import TYPE_CHECKING, Any, Never

import typer
from typer.core import TyperGroup

if TYPE_CHECKING:
    from pydantic import ValidationError

FAILED, INVALID = 1, 2
MAX_LINE = 1000
# Units of settings, by the end of their names.
UNITS = {"bytes": ", in bytes", "s": ", in seconds"}


def fail(message: str, code: int) -> Never:
    """Print the error as one line of printable text and exit: files may have quoted themselves."""
    line = " ".join("".join(c if c.isprintable() else " " for c in message).split())
    if len(line) > MAX_LINE:
        line = f"{line[:MAX_LINE]}…"
    typer.echo(f"paellera: {line}", err=True)
    raise typer.Exit(code)


class Commands(TyperGroup):
    """Commands whose failure to write their output, as on a full disk, is one line too."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any
    ) -> Any:
        """Parse the arguments, and print the help if they ask for it."""
        with _failed_output():
            return super().make_context(info_name, args, parent, **extra)

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        with _failed_output():
            return super().invoke(ctx)


@contextlib.contextmanager
def _failed_output() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise  # click ends silently.
    except OSError as error:
        # Or the interpreter would try to write the rest, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        fail(_words(error), FAILED)


def _words(error: Exception) -> str:
    """Return the exception's text, an OSError's without its number."""
    if not isinstance(error, OSError) or error.strerror is None:
        return str(error)
    return f"{error.filename}: {error.strerror}" if error.filename else error.strerror


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
    from server.settings import Settings

    try:
        yield
    except ValidationError as error:
        if error.title == Settings.__name__:
            fail(settings_problem(error), invalid_code)
        where = "bundle.json: " if error.title.startswith("Bundle") else ""
        fail(where + from_validation(error, whole="").message, invalid_code)
    except ApiError as error:
        fail(error.message, invalid_code)
    except ValueError as error:
        fail(reason(error), invalid_code)
    except FileNotFoundError as error:
        fail(_words(error), invalid_code)
    except BrokenPipeError:
        raise
    except (OSError, SafetensorError) as error:
        fail(_words(error), FAILED)


def settings_problem(error: ValidationError, options: Container[str] = ()) -> str:
    """Return what is wrong with the settings, by the variable or the option's name.

    Args:
        error: of `Settings`.
        options: the fields that options of the command line set.
    """
    from server.api.validation import from_validation
    from server.environment import PREFIX
    from server.settings import Settings

    found = from_validation(error, Settings, Settings.model_fields, whole="")
    if found.param is None:
        return found.message
    name = f"--{found.param}" if found.param in options else f"{PREFIX}{found.param.upper()}"
    unit = UNITS.get(found.param.rpartition("_")[2], "")
    return f"{name}{unit}{found.message.removeprefix(found.param)}"
