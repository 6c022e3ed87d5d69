"""Log lines as JSON objects, one per line, on standard error, times in UTC.

The dict in a record's `extra={"fields": …}` becomes top-level keys.
"""

from __future__ import annotations

import logging
from typing import Any

from pythonjsonlogger.core import RESERVED_ATTRS
from pythonjsonlogger.json import JsonFormatter

RENAMED = {"levelname": "level", "name": "logger", "exc_info": "exception"}


class JSONFormatter(JsonFormatter):
    """Writes `level`, `logger`, `message`, `time`, the record's fields, and `exception` if any."""

    def __init__(self) -> None:
        super().__init__(
            ("levelname", "name", "message"),
            rename_fields=RENAMED,
            timestamp="time",
            # uvicorn adds the message with terminal colours.
            reserved_attrs=[*RESERVED_ATTRS, "color_message"],
        )

    def process_log_record(self, log_data: dict[str, Any]) -> dict[str, Any]:
        """Return the line's keys and values."""
        log_data["level"] = log_data["level"].lower()
        return log_data | log_data.pop("fields", {})


def configure(level: str) -> None:
    """Log this package's records from `level` upwards; call it once per process."""
    handler = logging.StreamHandler()
    handler.setFormatter(JSONFormatter())
    for name in ("server", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(level.upper())
        logger.propagate = False
    # Libraries' warnings, which have no handler of their own, and Python's.
    logging.lastResort = _library_handler()
    logging.captureWarnings(True)


def _library_handler() -> logging.Handler:
    handler = logging.StreamHandler()
    handler.setLevel(logging.WARNING)
    handler.setFormatter(JSONFormatter())
    return handler
