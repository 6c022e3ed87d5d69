"""Log lines are JSON, whatever is in them."""

from __future__ import annotations

import json
import logging
import sys
from datetime import datetime

import pytest

from server.logs import JSONFormatter


def test_a_line_is_one_json_object_with_the_records_fields() -> None:
    record = logging.LogRecord(
        "server.access", logging.INFO, __file__, 1, "got %s", ('a "quoted"\nline',), None
    )
    record.fields = {"status": 200}
    text = JSONFormatter().format(record)
    line = json.loads(text)
    assert (line["message"], line["status"], line["level"]) == ('got a "quoted"\nline', 200, "info")
    assert datetime.fromisoformat(line["time"]).timestamp() == pytest.approx(
        record.created, abs=1e-3
    )
    assert "\n" not in text


def test_an_exception_is_part_of_its_line() -> None:
    try:
        raise ValueError("why")
    except ValueError:
        record = logging.LogRecord(
            "server", logging.ERROR, __file__, 1, "failed", (), sys.exc_info()
        )
    assert "ValueError: why" in json.loads(JSONFormatter().format(record))["exception"]
