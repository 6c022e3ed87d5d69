"""List mutants that change no behaviour a client, an operator or the worker could notice, each with the reason."""

from __future__ import annotations

EQUIVALENT: dict[str, str] = {}
