"""Log lines as JSON objects, one per line, on standard error, times in UTC.

The dict in a record's `extra={"fields": …}` becomes top-level keys. A thread writes the lines, so
that a reader of the log which stands still stops no request; lines beyond a bound, and those that
cannot be written, are dropped and counted.
"""

from __future__ import annotations

import io
import logging
import os
import sys
import threading
from collections import deque
from typing import Any

from pythonjsonlogger.core import RESERVED_ATTRS
from pythonjsonlogger.json import JsonFormatter

RENAMED = {"levelname": "level", "name": "logger", "exc_info": "exception"}
# Lines that wait for a reader, in bytes: seconds of a busy server.
MAX_WAITING_BYTES = 1024 * 1024
# Wait for the last lines at the end of the process and for a critical one, which precedes it.
FLUSH_TIMEOUT_S = 1.0


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


class BackgroundHandler(logging.Handler):
    """Writes records to a file descriptor in a thread; `emit` never waits for the reader.

    Attributes:
        dropped: lines that found no room, in the queue or on the disk.
    """

    def __init__(self, descriptor: int, max_bytes: int = MAX_WAITING_BYTES) -> None:
        super().__init__()
        self.setFormatter(JSONFormatter())
        self.dropped = 0
        self._descriptor, self._max_bytes = descriptor, max_bytes
        self._lines: deque[bytes] = deque()
        self._bytes = 0
        # Dropped lines that no written line has told of.
        self._untold = 0
        self._changed = threading.Condition()
        threading.Thread(target=self._write_all, name="log", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        """Queue the record, or drop it if the queue is full."""
        try:
            line = self.format(record).encode("utf-8", "backslashreplace") + b"\n"
        except Exception:
            self.handleError(record)
            return
        with self._changed:
            if self._bytes + len(line) > self._max_bytes:
                self.dropped += 1
                self._untold += 1
                return
            self._lines.append(line)
            self._bytes += len(line)
            self._changed.notify_all()
        if record.levelno >= logging.CRITICAL:
            self.flush()

    def flush(self) -> None:
        """Wait until all lines are written, at most `FLUSH_TIMEOUT_S`."""
        with self._changed:
            self._changed.wait_for(lambda: not self._bytes, FLUSH_TIMEOUT_S)

    def _write_all(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._lines)
                line = self._lines.popleft()
                untold, self._untold = self._untold, 0
            written = _write(self._descriptor, line)
            told = written and (not untold or _write(self._descriptor, self._told(untold)))
            with self._changed:
                self.dropped += not written
                self._untold += (not written) + (0 if told else untold)
                self._bytes -= len(line)
                self._changed.notify_all()

    def _told(self, dropped: int) -> bytes:
        record = logging.LogRecord(__name__, logging.WARNING, "", 0, "log lines dropped", (), None)
        record.fields = {"dropped": dropped}
        return self.format(record).encode() + b"\n"


def _write(descriptor: int, line: bytes) -> bool:
    """Write a whole line; return whether it was: the disk may be full, or the reader gone."""
    # Not through sys.stderr, whose lock the exiting interpreter would wait for.
    try:
        while line:
            line = line[os.write(descriptor, line) :]
    except OSError:
        return False
    return True


def configure(level: str) -> None:
    """Log this package's records from `level` upwards, others' warnings; call once per process.

    Without a standard error (`2>&-`), nothing is logged.
    """
    _open_standard_descriptors()
    handler: logging.Handler
    try:
        # None if it was closed.
        handler = BackgroundHandler(sys.stderr.fileno()) if sys.stderr else logging.NullHandler()
    except (OSError, io.UnsupportedOperation):
        # Standard error is no file.
        handler = logging.StreamHandler()
        handler.setFormatter(JSONFormatter())
    for name in ("server", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(level.upper())
        logger.propagate = False
    root = logging.getLogger()
    root.handlers = root.handlers or [handler]
    logging.captureWarnings(True)


def _open_standard_descriptors() -> None:
    """Open closed ones of descriptors 0 to 2 on /dev/null.

    Otherwise they become sockets and pipes, into which native code writes its messages.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)


def dropped_lines() -> int:
    """Return how many lines of this process were dropped."""
    handlers = logging.getLogger("server").handlers
    return sum(each.dropped for each in handlers if isinstance(each, BackgroundHandler))
