"""What a running harvest tells of itself: a file for `distill harvest status`, and one for Prometheus."""

from __future__ import annotations

import dataclasses
import errno
import os
import platform
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from shared.artifacts import now, write_json
from shared.errors import SettingsError, StorageError
from shared.harvest.scheduler import Standing

PROGRESS = "progress.json"
FRESH_S = 10.0
"""A harvest tells of itself once a second: one that has not for so long is no more, or stuck."""


class Watch:
    """Called with how the harvest stands about once a second, from a thread of its own.

    To tell is not the work: of a file that cannot be written a warning is given, once, and the harvest goes on.
    """

    def __init__(self, stage: Path, run: str, metrics_file: Path | None) -> None:
        """Raises SettingsError for a metrics file that cannot be written."""
        self._file, self._run, self._metrics = stage / PROGRESS, run, metrics_file
        self._warned: set[Path] = set()
        if metrics_file is not None:
            try:
                metrics_file.parent.mkdir(parents=True, exist_ok=True)
                if metrics_file.is_dir():
                    raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
                with tempfile.TemporaryFile(dir=metrics_file.parent):
                    pass  # it is written beside its place and moved there
            except OSError as exc:
                raise SettingsError(f"--metrics-file {metrics_file}: cannot be written ({exc.strerror}); give another place") from exc

    def __call__(self, standing: Standing) -> None:
        told = {"at": now(), "pid": os.getpid(), "host": platform.node(), **dataclasses.asdict(standing)}
        self._tried(self._file, lambda: write_json(self._file, told), "`distill harvest status` is told nothing new")
        if metrics := self._metrics:
            self._tried(metrics, lambda: self._write_metrics(metrics, standing), "mend what --metrics-file names")

    def _tried(self, file: Path, write: Callable[[], None], what: str) -> None:
        try:
            write()
        except (StorageError, OSError) as exc:
            if file not in self._warned:
                self._warned.add(file)
                why = exc.__cause__ if isinstance(exc, StorageError) else exc
                with suppress(OSError):  # nobody listens any more
                    print(f"harvest: warning: {file} cannot be written ({why}); the harvest goes on without it; {what}", file=sys.stderr)

    def _write_metrics(self, file: Path, standing: Standing) -> None:
        from prometheus_client import CollectorRegistry, Gauge, write_to_textfile

        registry = CollectorRegistry()

        def tell(name: str, text: str, value: float, **labels: str) -> None:
            labels = {"run": self._run, **labels}
            gauge = known.get(name) or known.setdefault(name, Gauge(f"distill_harvest_{name}", text, list(labels), registry=registry))
            gauge.labels(**labels).set(value)

        known: dict[str, Gauge] = {}
        if standing.wanted is not None:
            tell("wanted_answers", "Prompts by samples a prompt.", standing.wanted)
        tell("answers", "Answers the ledger has.", standing.answers)
        for kind, count in standing.failed.items():
            tell("failed_answers", "Answers that failed, by the class of the reason.", count, reason=kind)
        tell("answers_per_second", "Over the last ten seconds.", standing.rows_per_s)
        tell("in_flight", "Requests in flight.", standing.in_flight)
        tell("concurrency", "Requests that may be in flight at present.", standing.concurrency)
        tell("requests", "Requests of this command.", standing.requests)
        tell("refused_requests", "Of these, refused with 429.", standing.refused)
        tell("waiting", "1 while nothing is sent: the teacher asked for a pause, or does not answer.", bool(standing.waiting))
        if standing.cost is not None:
            tell("cost", "Spent, in the currency of teacher.price, all commands together.", standing.cost)
        write_to_textfile(str(file), registry)
