"""Paired bootstrap: how sure the gain of one system over another is, given the test rows at hand.

The test rows are resampled with replacement, the same rows for both systems, and the gain is computed on each resample (Efron and
Tibshirani, 1993; for corpus scores Koehn, 2004). It speaks of the choice of test rows, not of the luck of a training seed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from shared.contracts import Contract
from shared.errors import DataError

BLOCK = 1000
"""Resamples drawn at once: bounds the memory to BLOCK x rows numbers."""
NO_SPREAD = 1e-12

Score = Callable[[NDArray[np.float64]], NDArray[np.float64]]


class Comparison(Contract):
    """The gain of a system over another on the same test rows, in the metric's own unit (0 to 1)."""

    gain: float
    low: float | None
    """Lower end of the 95% interval; None where no interval can be given."""
    high: float | None
    p: float | None
    """One-sided: small if the gain exceeds `margin` on almost every resample. None where no interval can be given."""
    margin: float
    rows: int
    note: str | None = None
    """Why there is no interval."""


def only_value(means: NDArray[np.float64]) -> NDArray[np.float64]:
    """The score that is a mean over rows: (..., 1) to (...)."""
    return means[..., 0]


def paired_bootstrap(
    ours: Mapping[str, NDArray[np.float64]],
    theirs: Mapping[str, NDArray[np.float64]],
    *,
    margin: float = 0.0,
    resamples: int,
    seed: int,
    score: Score = only_value,
) -> Comparison:
    """Compare two systems by the values (k,) of each test id.

    `score` turns means over rows, (..., k), into scores (...). The interval is the middle 95% of the resampled gains, and
    p = (1 + number of resampled gains <= margin) / (1 + resamples): the +1 keeps it above 0 (Davison and Hinkley, 1997, 4.11).
    Raises DataError that names the ids which only one of the two has, or if there are none.
    """
    if unpaired := sorted(ours.keys() ^ theirs.keys()):
        raise DataError(f"the two systems answered different test rows, so they cannot be compared; only one has {_some(unpaired)}")
    if not ours:
        raise DataError("no test rows to compare two systems on")
    ids = list(ours)
    a, b = np.stack([ours[i] for i in ids]), np.stack([theirs[i] for i in ids])
    rows = len(ids)
    gain = float(score(a.mean(axis=0)) - score(b.mean(axis=0)))
    random = np.random.default_rng(seed)
    blocks = []
    for first in range(0, resamples, BLOCK):
        weights = random.multinomial(rows, np.full(rows, 1 / rows), size=min(BLOCK, resamples - first)) / rows
        blocks.append(score(weights @ a) - score(weights @ b))
    gains = np.concatenate(blocks)
    if np.ptp(gains) < NO_SPREAD:
        note = "one test row tells nothing about others" if rows == 1 else "the gain is the same on every row: resampling shows no spread"
        return Comparison(gain=gain, low=None, high=None, p=None, margin=margin, rows=rows, note=note)
    low, high = np.quantile(gains, (0.025, 0.975))
    p = (1 + int((gains <= margin).sum())) / (1 + resamples)
    return Comparison(gain=gain, low=float(low), high=float(high), p=p, margin=margin, rows=rows)


def _some(ids: list[str], most: int = 5) -> str:
    return ", ".join(ids[:most]) + (f" and {len(ids) - most} more" if len(ids) > most else "")
