"""The smoke run: the first prompts, asked before all others, of which most must be answered."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from shared.contracts import Response
from shared.harvest.ledger import kind_of

PROMPTS = 16
"""If too many of their samples fail, nothing more is sent."""


class Smoke:
    """Counts what requests gave, and not the rows that other examples share in."""

    def __init__(self, may_fail: float | None = 0.5) -> None:
        """`may_fail`: the share of the samples that must not be reached; None: passed already."""
        self._may_fail = may_fail or 0.0
        self.passed = may_fail is None
        self._left, self._samples, self._answered = PROMPTS, 0, 0
        self._failed: Counter[str] = Counter()
        self._said = ""

    @property
    def full(self) -> bool:
        """Whether to wait for what has been asked."""
        return not self.passed and self._left == 0

    @property
    def failed(self) -> bool:
        return self.full and self._failed.total() >= self._may_fail * self._samples

    def drew(self, *, missing: int, answered_before: bool) -> None:
        """A prompt of which so many samples are to be asked for. A teacher that has `answered_before` has passed."""
        self.passed = self.passed or answered_before
        if missing and not self.passed:
            self._left -= 1
            self._samples += missing
            self._judge()

    def came(self, rows: Sequence[Response]) -> None:
        if self.passed:
            return
        for row in rows:
            if row.status == "ok":
                self._answered += 1
            else:
                self._failed[kind_of(row)] += 1
                self._said = row.reason or ""
        self._judge()

    def _judge(self) -> None:
        self.passed = self._left == 0 and self._answered > (1 - self._may_fail) * self._samples

    def explain(self) -> str:
        """How many failed and by what, and what was said last."""
        kinds = ", ".join(f"{count} {kind}" for kind, count in self._failed.most_common())
        return f"{self._failed.total()} of {self._samples} answers failed ({kinds}; the last: {self._said})"
