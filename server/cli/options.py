"""Turn options of the image commands into settings, formats, files' contents and request fields.

A wrong value ends the command with a sentence that names the option.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from server.cli.errors import INVALID, fail, settings_problem

if TYPE_CHECKING:
    from server.settings import Settings

Weights = Annotated[
    str | None, typer.Option(help="Bundle name or path; default: PAELLERA_WEIGHTS, else tiny")
]
Device = Annotated[
    str | None,
    typer.Option(help="auto, cpu, cuda, cuda:1 or mps; default: PAELLERA_DEVICE, else auto"),
]
Fields = dict[str, Any]


def read_settings(**given: object) -> Settings:
    """Return the environment's settings, overridden by the given options. Raises ValueError."""
    from pydantic import ValidationError

    from server.settings import Settings

    options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    try:
        return Settings(**options)
    except ValidationError as error:
        raise ValueError(settings_problem(error, options)) from None


def format_of(output: Path, known: dict[str, str]) -> str:
    """Return the format by the name's end. Raises ValueError."""
    if not output.parent.is_dir():
        raise ValueError(f"output: there is no directory {str(output.parent)!r}")
    if output.suffix.lower() not in known:
        raise ValueError(f"output: the name must end in {', '.join(known)} (sent: {output.name!r})")
    return known[output.suffix.lower()]


def read_file(option: str, path: Path) -> bytes:
    """Return a file's content, or fail with the option's name."""
    try:
        return path.read_bytes()
    except OSError as error:
        fail(f"{option}: {path}: {error.strerror}", INVALID)


def read_files(option: str, paths: Sequence[Path] | None) -> list[bytes]:
    """Return the files' contents, or fail with the option's name."""
    return [read_file(option, path) for path in paths or ()]


def numbers_of(option: str, text: str | None) -> list[float] | None:
    """Return "2,8" as [2, 8]; the request checks count and bounds."""
    try:
        return None if text is None else [float(part) for part in text.split(",")]
    except ValueError:
        fail(f"{option}: must be comma-separated numbers (sent: {text!r})", INVALID)


def pair_of(option: str, text: str | None) -> list[float] | None:
    """Return "8" as [8, 8]."""
    numbers = numbers_of(option, text)
    return numbers * 2 if numbers and len(numbers) == 1 else numbers


def attention_weights_of(text: str | None) -> Fields | None:
    """Return "1.2,0.4" as {"text": 1.2, "image": 0.4}."""
    numbers = numbers_of("attention-weights", text)
    if numbers is None:
        return None
    if len(numbers) != 2:
        fail(f"attention-weights: must be two numbers, TEXT,IMAGE (sent: {text!r})", INVALID)
    return dict(zip(("text", "image"), numbers, strict=True))


def regions_of(texts: Sequence[str] | None) -> list[Fields]:
    """Return the regions written in JSON, with the contents of their masks' files."""
    entries = []
    for text in texts or ():
        try:
            entry = json.loads(text)
        except ValueError:
            example = '{"prompt": "a star", "box": [0, 0, 0.5, 1]}'
            fail(f"region: must be JSON such as {example} (sent: {text!r})", INVALID)
        if isinstance(entry, dict) and isinstance(entry.get("mask"), str):
            entry["mask"] = read_file("region", Path(entry["mask"]))
        entries.append(entry)
    return entries


def check_encoding(value: Any) -> None:
    """Fail if a text in the fields has bytes that the locale's encoding could not decode."""
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            check_encoding(inner)
    elif isinstance(value, str) and any("\udc80" <= character <= "\udcff" for character in value):
        encoding = sys.getfilesystemencoding()
        message = f"a text has bytes that the encoding of the locale, {encoding}, does not know"
        fail(f"{message}: set a UTF-8 locale, such as LC_ALL=C.UTF-8", INVALID)
