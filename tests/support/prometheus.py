"""The mark of tests that need Prometheus."""

from __future__ import annotations

import shutil

import pytest

needs_prometheus = pytest.mark.skipif(
    shutil.which("promtool") is None,
    reason="no promtool: install prometheus, as `make prometheus` does",
)
