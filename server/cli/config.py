"""The effective settings with their sources, for `paellera config`."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import SecretStr

from model.config import CONFIG_FILE, BundleConfig, find_bundle
from server.environment import PREFIX, given_settings, without_blank
from server.settings import Settings

Described = dict[str, dict[str, Any]]


def describe(settings: Settings, options: Mapping[str, object]) -> Described:
    """Return value and source of every setting by its variable's name, secrets masked.

    Args:
        settings: as `serve` would have them.
        options: the command line's, by field; None: not given.
    """
    given = {name for name, value in without_blank(options).items() if value is not None}
    variables = given_settings(os.environ, Settings.model_fields)
    described = {}
    for field in Settings.model_fields:
        source = "environment" if field in variables else "default"
        described[f"{PREFIX}{field.upper()}"] = {
            "value": _shown(_effective(settings, field)),
            "source": f"--{field}" if field in given else source,
        }
    return described


def check_sizes(settings: Settings) -> None:
    """Raise ValueError if a file of a bundle is missing or has another size than listed."""
    for directory in map(find_bundle, settings.bundles):
        for name, entry in BundleConfig.read(directory).files.items():
            path = directory / name
            found = path.stat().st_size if path.is_file() else None
            if found != entry.bytes:
                state = "is missing" if found is None else f"has {found} bytes"
                raise ValueError(f"{path} {state}; {CONFIG_FILE} lists {entry.bytes} bytes")


def lines(described: Described) -> Iterator[str]:
    """Return one line per setting: `NAME=value  # source`; a default's line is a comment."""
    for name, entry in described.items():
        value = entry["value"]
        text = str(value).lower() if isinstance(value, bool) else "" if value is None else value
        mark = "# " if entry["source"] == "default" else ""
        yield f"{mark}{name}={text}  # {entry['source']}"


def _effective(settings: Settings, field: str) -> object:
    """Return the setting, or what takes the place of an absent one."""
    if field == "open_paths":
        return ",".join(settings.paths_without_key)
    if field == "allowed_hosts" and not settings.hosts:
        return "localhost, *.localhost, IP addresses" if settings.is_local else "*"
    return getattr(settings, field)


def _shown(value: object) -> object:
    if isinstance(value, SecretStr):
        return "********" if value.get_secret_value() else ""
    return value
