"""A server's log: JSON objects, one a line, on standard error. What callers ask and are answered is never in it."""

from __future__ import annotations

import logging
import sys
from datetime import UTC, datetime

from pydantic_core import to_json


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


def configure(level: str) -> None:
    """Send the log of this process to standard error, from `level` (debug, info, warning, error) on."""
    # what no line shows need not be found out for each (see "Optimization" in logging's own how-to)
    for fact in ("logThreads", "logProcesses", "logMultiprocessing", "logAsyncioTasks"):
        setattr(logging, fact, False)
    logging._srcfile = None
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Lines())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)  # libraries
    for name in ("shared", "teacher_service", "student_trainer"):
        logging.getLogger(name).setLevel(level.upper())
