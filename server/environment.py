"""`PAELLERA_*` environment variables: settings, those of other readers, Kubernetes', unknown.

An unknown name is refused, because a misspelt `PAELLERA_API_KEYS` would leave the server open.
Imports the standard library alone, for the health check.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any

PREFIX = "PAELLERA_"

# Variables that the server does not read, by the name without the prefix.
OTHER_READERS = {
    "ART": "make art",
    "BUNDLES": "docker/compose.yaml",
    "CLIENT_KEY": "examples and the playground's snippets",
    "CLIENT_URL": "examples",
}
# Former names, and names that others would try, whose closest match by letters is another.
SUGGESTIONS = {"URL": "CLIENT_URL", "KEY": "API_KEYS", "KEYS": "API_KEYS", "TOKEN": "API_KEYS"}

# Kubernetes sets these in every pod for a Service named `paellera` or `paellera-…` in its
# namespace, unless the pod says `enableServiceLinks: false`.
_SERVICE = re.compile(r"(\w+_)?SERVICE_(HOST|PORT(_\w+)?)")
_SERVICE_PORT = re.compile(r"(\w+_)?PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?")
_SERVICE_URL = re.compile(r"(tcp|udp|sctp)://\S+:\d+")


class UnknownVariableError(ValueError):
    """Environment variables with the prefix that nothing reads."""


def given_settings(environment: Mapping[str, str], fields: Iterable[str]) -> dict[str, str]:
    """Return the variable by field, for every field that the environment sets."""
    known = set(fields)
    return {
        field: name
        for name, field in _fields(environment)
        if field in known and environment[name].strip() and not _from_kubernetes(name, environment)
    }


def kubernetes_variables(environment: Mapping[str, str]) -> list[str]:
    """Return the variables that Kubernetes set for a Service of this name, sorted."""
    return sorted(name for name, _ in _fields(environment) if _from_kubernetes(name, environment))


def refuse_unknown(environment: Mapping[str, str], fields: Iterable[str]) -> None:
    """Raise UnknownVariableError, with a suggestion for each, if a variable has no reader."""
    known = sorted({field.upper() for field in fields} | OTHER_READERS.keys())
    unknown = sorted(
        name
        for name, field in _fields(environment)
        if field.upper() not in known and not _from_kubernetes(name, environment)
    )
    if unknown:
        raise UnknownVariableError("; ".join(_complaint(name, known) for name in unknown))


def without_blank(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values without texts that are empty or blank."""
    return {
        name: value
        for name, value in values.items()
        if not (isinstance(value, str) and not value.strip())
    }


def _fields(environment: Mapping[str, str]) -> list[tuple[str, str]]:
    """Return (variable, field) of every variable with the prefix, in any case."""
    return [
        (name, name[len(PREFIX) :].lower())
        for name in environment
        if name.upper().startswith(PREFIX)
    ]


def _from_kubernetes(name: str, environment: Mapping[str, str]) -> bool:
    rest = name.removeprefix(PREFIX)
    if _SERVICE.fullmatch(rest) or _SERVICE_PORT.fullmatch(rest):
        return True
    is_port = rest == "PORT" or rest.endswith("_PORT")
    return is_port and bool(_SERVICE_URL.fullmatch(environment[name]))


def _complaint(name: str, known: list[str]) -> str:
    rest = name[len(PREFIX) :].upper()
    close = [SUGGESTIONS[rest]] if rest in SUGGESTIONS else get_close_matches(rest, known, n=1)
    if close:
        return f"unknown variable {name[:80]}; did you mean {PREFIX}{close[0]}?"
    return f"unknown variable {name[:80]}; `paellera config` lists all settings"
