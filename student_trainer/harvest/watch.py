"""What a running harvest tells of itself: a file for `distill harvest status`, and one for Prometheus."""

from __future__ import annotations

import dataclasses
import os
import platform
from pathlib import Path

from shared.artifacts import now, write_json
from shared.harvest.scheduler import Standing

PROGRESS = "progress.json"
FRESH_S = 10.0
"""A harvest tells of itself once a second: one that has not for so long is no more, or stuck."""


class Watch:
    """Called with how the harvest stands about once a second, from a thread of its own. Raises StorageError."""

    def __init__(self, stage: Path, run: str, metrics_file: Path | None) -> None:
        self._file, self._run, self._metrics = stage / PROGRESS, run, metrics_file

    def __call__(self, standing: Standing) -> None:
        write_json(self._file, {"at": now(), "pid": os.getpid(), "host": platform.node(), **dataclasses.asdict(standing)})
        if self._metrics:
            self._write_metrics(self._metrics, standing)

    def _write_metrics(self, file: Path, standing: Standing) -> None:
        from prometheus_client import CollectorRegistry, Gauge, write_to_textfile

        from shared.errors import storage_error

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
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_to_textfile(str(file), registry)
        except OSError as exc:
            raise storage_error(exc, file) from exc
