"""Paths that several modules compare with. A router names its own paths."""

from __future__ import annotations

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
