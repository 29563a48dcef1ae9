"""What a metric is here: numbers of each row, and a score that is a function of their sums over rows.

That covers means over rows (ROUGE) and corpus scores (BLEU, chrF) alike, lets a bootstrap resample any of them by adding up rows anew,
and makes a score recomputable from a table of numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from shared.contracts import FinishReason

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Answered:
    """One scored row: what was asked, what a person answered, what the system did."""

    question: str
    reference: str
    text: str
    finish_reason: FinishReason | None = None


@dataclass(frozen=True)
class Metric:
    """One metric. Names are those of settings and files, labels those that people write."""

    name: str
    label: str
    definition: str
    statistics: Callable[[Sequence[Answered]], Floats]
    """(rows, k): what each row adds to the sums."""
    of_sums: Callable[[Floats, int], Floats]
    """Sums over so many rows (..., k) to scores (...)."""
    better: Literal["higher", "lower", "neither"] = "higher"
    points: bool = True
    """Whether it is shown times 100."""
    by_row: bool = False
    """Whether the score is the mean of the rows' own scores (k = 1)."""

    def score(self, statistics: Floats) -> float:
        """Of (rows, k) numbers."""
        return float(self.of_sums(statistics.sum(axis=0), len(statistics)))


def mean(sums: Floats, rows: int) -> Floats:
    """The score of a metric that is a mean over rows: (..., 1) to (...)."""
    means: Floats = sums[..., 0] / rows
    return means


def ratio(sums: Floats, rows: int) -> Floats:
    """The score of a metric that is one sum by another, (..., 2) to (...); 0 where the other is 0."""
    scores: Floats = np.divide(sums[..., 0], sums[..., 1], out=np.zeros_like(sums[..., 0]), where=sums[..., 1] > 0)
    return scores
