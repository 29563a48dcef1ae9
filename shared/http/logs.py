"""A server's log: JSON objects, one a line, on standard error. What callers ask and are answered is never in it."""

from __future__ import annotations

import asyncio
import logging
import sys
from contextlib import suppress
from datetime import UTC, datetime

from pydantic_core import to_json

WRITE_S = 0.1
"""Seconds that a line may wait to be written."""


class Lines(logging.Formatter):
    """{"time", "level", "message", ...}; what a call gives as `extra={"fields": {...}}` stands beside them."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
        }
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return str(to_json(line, fallback=str), "utf-8")


class Buffered(logging.Handler):
    """Writes to standard error what gathers within WRITE_S; a warning, and what was before it, at once. Else each line is a system call."""

    def __init__(self) -> None:
        super().__init__()
        self._lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.append(self.format(record) + "\n")
        if record.levelno < logging.WARNING:
            if len(self._lines) > 1:  # the first of them has seen to it
                return
            with suppress(RuntimeError):  # no event loop runs
                asyncio.get_running_loop().call_later(WRITE_S, self.flush)
                return
        self.flush()

    def flush(self) -> None:
        text = "".join(self._lines)
        self._lines.clear()
        if text:
            sys.stderr.write(text)
            sys.stderr.flush()


def configure(level: str) -> None:
    """Send the log of this process to standard error, from `level` (debug, info, warning, error) on."""
    # what no line shows need not be found out for each (see "Optimization" in logging's own how-to)
    for fact in ("logThreads", "logProcesses", "logMultiprocessing", "logAsyncioTasks"):
        setattr(logging, fact, False)
    logging._srcfile = None
    handler = Buffered()
    handler.setFormatter(Lines())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)  # libraries
    for name in ("shared", "teacher_service", "student_trainer"):
        logging.getLogger(name).setLevel(level.upper())
