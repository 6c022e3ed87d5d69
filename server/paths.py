"""Paths that several modules compare with, and those that need no key.

A router names its own paths.
"""

from __future__ import annotations

from collections.abc import Iterable

# Health and metrics: on the operations port where there is one, and open to every host.
LIVENESS = "/healthz"
READINESS = "/readyz"
PROBES = (LIVENESS, "/health", READINESS)
METRICS = "/metrics"
HEALTH_PATHS = (*PROBES, METRICS)
# The path below which stored images are.
IMAGES = "/images/"
# Paths of AUTOMATIC1111's endpoints.
SDAPI = "/sdapi/"
# Files of the playground and of the API reference.
PLAYGROUND = "/playground/"
DOCS = "/docs"
OPENAPI = "/openapi.json"
# Entries of `open_paths`: paths that need no key, unless the setting names others.
OPEN_PATHS = ("/", f"{PLAYGROUND}*", *PROBES, f"{IMAGES}*")


class OpenPaths:
    """Match paths without a slash at their end against entries such as /docs and /playground/*."""

    def __init__(self, entries: Iterable[str]) -> None:
        entries = tuple(entries)
        self._exact = frozenset(path.rstrip("/") or "/" for path in entries)
        self._below = tuple(path[:-1] for path in entries if path.endswith("/*"))

    def __contains__(self, path: str) -> bool:
        """Return whether an entry opens the path."""
        return path in self._exact or path.startswith(self._below)
