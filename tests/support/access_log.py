"""The access log's lines."""

from __future__ import annotations

from typing import Any

import pytest

from tests.conftest import wait_until


def said(access_log: pytest.LogCaptureFixture, request_id: str) -> dict[str, Any]:
    """The fields of this request's line, which is written after the answer."""

    def found() -> list[dict[str, Any]]:
        lines = [record.__dict__.get("fields", {}) for record in access_log.records]
        return [fields for fields in lines if fields.get("request_id") == request_id]

    wait_until(lambda: bool(found()))
    return found()[0]
