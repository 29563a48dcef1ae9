"""What the student's server tells Prometheus beside what every server does (see shared/http/metrics.py).

distill_student_info{version, name, role}               1 for the version that is served, and for the canary
distill_student_share{version}                          the share of the requests that a version gets
distill_student_score{version, metric}                  a version's score on its test split, 0 to 1 but for length_ratio
distill_student_requests_total{version, status}         requests that a version has answered, or failed to
distill_student_engine_duration_seconds{version}        what of an answer's time the engine took
distill_batch_rows                                      requests that were decoded together
distill_queue_length                                    requests that wait for a batch

A version that is replaced goes from the first three at once, from the others when the server ends.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import Counter, Gauge, Histogram

from shared.http.metrics import BUCKETS, Meters

if TYPE_CHECKING:
    from student_trainer.serving.follow import Served


class StudentMeters(Meters):
    """What a server counts about its students."""

    def __init__(self) -> None:
        super().__init__()
        registry = self.registry
        self._info = Gauge("distill_student_info", "Which versions answer.", ("version", "name", "role"), registry=registry)
        self._share = Gauge("distill_student_share", "Share of the requests.", ("version",), registry=registry)
        self._score = Gauge("distill_student_score", "Score on the test split.", ("version", "metric"), registry=registry)
        self._requests = Counter("distill_student_requests", "Requests by version.", ("version", "status"), registry=registry)
        self._engine = Histogram(
            "distill_student_engine_duration_seconds", "The engine's share.", ("version",), buckets=BUCKETS, registry=registry
        )
        self._rows = Histogram("distill_batch_rows", "Requests decoded together.", buckets=(1, 2, 4, 8, 16, 32, 64), registry=registry)

    def serves(self, served: Served) -> None:
        """Tell who answers from now on."""
        for gauge in (self._info, self._share, self._score):
            gauge.clear()
        shares = {"served": 1 - served.share, "canary": served.share}
        for role, loaded in (("served", served.loaded), ("canary", served.tried)):
            if loaded is None:
                continue
            student = loaded.student
            self._info.labels(student.version, student.name, role).set(1)
            self._share.labels(student.version).set(shares[role])
            for metric, score in student.scores.items():
                self._score.labels(student.version, metric).set(score)

    def ended(self, version: str, status: int, engine_s: float) -> None:
        """Count a request that a version was chosen for."""
        self._requests.labels(version, str(status)).inc()
        if engine_s:
            self._engine.labels(version).observe(engine_s)

    def batch(self, rows: int) -> None:
        """Count a batch of so many requests."""
        self._rows.observe(rows)
