"""API keys, and a header with one."""

from __future__ import annotations

KEY, OTHER = "a-key-of-the-house", "another-key-of-it"
AUTHORIZED = {"Authorization": f"Bearer {KEY}"}
