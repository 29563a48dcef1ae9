"""How sure a score, and the gain of one system over another, is, given the test rows at hand.

Every metric is a function of sums over rows (evaluator/metrics/metric.py), so that one draw of rows serves all metrics and all systems
alike: the same rows for all, which is what makes the bootstrap paired. Two questions are asked of it:

- Intervals: rows are drawn with replacement, and the middle 95% of the resampled scores and gains is the interval (percentile bootstrap;
  Efron and Tibshirani, 1993; for corpus scores Koehn, 2004).
- Tests: under the hypothesis that two systems are alike, their answers to a row may change places; p is the share of such exchanges,
  each row with probability 1/2, whose gain is at least as far from 0 as the one observed (approximate randomisation; Noreen, 1989;
  Riezler and Maxwell, 2005). Two-sided.

Both speak of the choice of test rows, not of the luck of a training seed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from evaluator.metrics.metric import Metric
from shared.contracts import Contract
from shared.errors import DataError

CELLS = 2**22
"""Most numbers of one array that is drawn or summed up at once: bounds the memory to some 100 MB."""
NO_SPREAD = 1e-12
ONE_ROW = "one test row tells nothing about others"
ALL_EQUAL = "the same on every row: resampling shows no spread"

Floats = NDArray[np.float64]


class Comparison(Contract):
    """The gain of a system over another on the same test rows, in the metric's own unit."""

    ours: str
    theirs: str
    metric: str
    gain: float
    low: float | None = None
    """Lower end of the gain's 95% interval; None where no interval can be given."""
    high: float | None = None
    p: float | None = None
    """Two-sided, by approximate randomisation; not corrected. Of the gain being `margin`, or 0 for a score that is no mean over rows.
    None where no interval can be given, like the next two."""
    p_bootstrap: float | None = None
    """Two-sided, of the gain being `margin`, by the paired bootstrap."""
    p_holm: float | None = None
    """p, corrected for the number of comparisons it was made with (Holm, 1979)."""
    margin: float = 0.0
    effect: float | None = None
    """Cohen's d_z: the mean of the rows' gains in units of their standard deviation; None for scores that are no mean over rows."""
    wins: int | None = None
    """Rows on which ours is better, worse (losses) and equal (ties); None as for effect."""
    losses: int | None = None
    ties: int | None = None
    rows: int
    note: str | None = None
    """Why there is no interval."""


def bootstrap(
    statistics: Mapping[str, Mapping[str, Floats]], metrics: Sequence[Metric], *, resamples: int, seed: int
) -> dict[str, dict[str, Floats]]:
    """Scores on resampled test rows, (resamples,) each, by metric and system: the i-th of all of them are of the same rows.

    statistics: by system and metric, (rows, k). What rows are drawn depends on their number, `resamples` and `seed` alone.
    """
    systems, slices, table = list(statistics), _slices(statistics, metrics), _table(statistics, metrics)
    rows, width = len(table), table.shape[1] // len(systems)
    random = np.random.default_rng(seed)
    found: dict[str, list[Floats]] = {metric.name: [] for metric in metrics}
    for count in _blocks(resamples, max(table.shape)):
        drawn = random.integers(rows, size=(count, rows)) + np.arange(count)[:, np.newaxis] * rows
        often = np.bincount(drawn.ravel(), minlength=count * rows).reshape(count, rows).astype(np.float64)
        sums = (often @ table).reshape(count, len(systems), width)
        for metric in metrics:
            found[metric.name].append(metric.of_sums(sums[..., slices[metric.name]], rows))
    joined = {name: np.concatenate(blocks) for name, blocks in found.items()}
    return {name: dict(zip(systems, scores.T, strict=True)) for name, scores in joined.items()}


def exchange(
    statistics: Mapping[str, Mapping[str, Floats]],
    pairs: Sequence[tuple[str, str]],
    metrics: Sequence[Metric],
    *,
    resamples: int,
    seed: int,
) -> dict[str, list[float]]:
    """p of each pair by approximate randomisation, two-sided, by metric; (1 + exchanges at least as far) / (1 + resamples).

    The +1 counts what was observed and keeps p above 0 (Davison and Hinkley, 1997, 4.11). Exchanges depend on the number of rows,
    `resamples` and `seed` alone.
    """
    slices = _slices(statistics, metrics)
    width = sum(next(iter(statistics.values()))[metric.name].shape[1] for metric in metrics)
    tables = {name: _table({name: statistics[name]}, metrics) for name in {name for pair in pairs for name in pair}}
    sums = np.stack([np.stack([tables[name].sum(axis=0) for name in pair]) for pair in pairs])
    differences = np.concatenate([tables[ours] - tables[theirs] for ours, theirs in pairs], axis=1)
    rows = len(differences)
    observed = {m.name: m.of_sums(sums[:, 0, slices[m.name]], rows) - m.of_sums(sums[:, 1, slices[m.name]], rows) for m in metrics}
    as_far = {metric.name: np.ones(len(pairs)) for metric in metrics}
    random = np.random.default_rng([seed, 1])
    for count in _blocks(resamples, max(differences.shape)):
        changed = (random.random((count, rows)) < 0.5).astype(np.float64)
        moved = (changed @ differences).reshape(count, len(pairs), width)
        for metric in metrics:
            part = slices[metric.name]
            ours = metric.of_sums(sums[:, 0, part] - moved[..., part], rows)
            theirs = metric.of_sums(sums[:, 1, part] + moved[..., part], rows)
            as_far[metric.name] += (np.abs(ours - theirs) >= np.abs(observed[metric.name]) - NO_SPREAD).sum(axis=0)
    return {name: [float(p) for p in found / (1 + resamples)] for name, found in as_far.items()}


def comparison(
    pair: tuple[str, str],
    metric: Metric,
    statistics: Mapping[str, Mapping[str, Floats]],
    resampled: Mapping[str, Floats],
    p: float,
    *,
    margin: float = 0.0,
) -> Comparison:
    """What `bootstrap` (of this metric, by system) and `exchange` (p of this pair) say of a pair."""
    ours, theirs = (statistics[name][metric.name] for name in pair)
    rows = len(ours)
    gain = metric.score(ours) - metric.score(theirs)
    gains = resampled[pair[0]] - resampled[pair[1]]
    found = Comparison(ours=pair[0], theirs=pair[1], metric=metric.name, gain=gain, margin=margin, rows=rows)
    if metric.by_row:
        found = found.model_copy(update=_by_row((ours - theirs)[:, 0], higher=metric.better != "lower"))
    if np.ptp(gains) < NO_SPREAD:
        return found.model_copy(update={"effect": None, "note": ONE_ROW if rows == 1 else ALL_EQUAL})
    low, high = np.quantile(gains, (0.025, 0.975))
    tail = min(int((gains <= margin).sum()), int((gains >= margin).sum()))
    of_margin = min(1.0, 2 * (1 + tail) / (1 + len(gains)))
    return found.model_copy(update={"low": float(low), "high": float(high), "p": p, "p_bootstrap": of_margin})


def _by_row(gains: Floats, *, higher: bool) -> dict[str, float | int | None]:
    spread = float(gains.std(ddof=1)) if len(gains) > 1 else 0.0
    better = gains if higher else -gains
    return {
        "effect": float(gains.mean()) / spread if spread > NO_SPREAD else None,
        "wins": int((better > NO_SPREAD).sum()),
        "losses": int((better < -NO_SPREAD).sum()),
        "ties": int((np.abs(gains) <= NO_SPREAD).sum()),
    }


def interval(resampled: Floats) -> tuple[float, float] | None:
    """The middle 95% of resampled scores; None where they show no spread."""
    if np.ptp(resampled) < NO_SPREAD:
        return None
    low, high = np.quantile(resampled, (0.025, 0.975))
    return float(low), float(high)


def holm(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """The same, p corrected for their number (Holm, 1979): the chance of any false p_holm < alpha among them is at most alpha."""
    corrected = iter(holm_corrected([c.p for c in comparisons if c.p is not None]))
    return [c if c.p is None else c.model_copy(update={"p_holm": next(corrected)}) for c in comparisons]


def holm_corrected(p: Sequence[float]) -> list[float]:
    """Each p, in their order, as large as it must be where so many were tried (Holm, 1979)."""
    corrected, most = list(p), 0.0
    for rank, i in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        corrected[i] = most = max(most, min(1.0, (len(p) - rank) * p[i]))
    return corrected


def refuse_unpaired(ours: Sequence[str], theirs: Sequence[str]) -> None:
    """Return if two systems answered the same test ids. Raises DataError that names those which only one of them has."""
    if unpaired := sorted(set(ours) ^ set(theirs)):
        raise DataError(f"the two systems answered different test rows, so they cannot be compared; only one has {_some(unpaired)}")
    if not ours:
        raise DataError("no test rows to compare two systems on")


def _slices(statistics: Mapping[str, Mapping[str, Floats]], metrics: Sequence[Metric]) -> dict[str, slice]:
    """Where each metric's columns stand among those of a system."""
    first, at, found = next(iter(statistics.values())), 0, {}
    for metric in metrics:
        end = at + first[metric.name].shape[1]
        found[metric.name] = slice(at, end)
        at = end
    return found


def _table(statistics: Mapping[str, Mapping[str, Floats]], metrics: Sequence[Metric]) -> Floats:
    """(rows, systems x columns of all metrics)."""
    return np.concatenate([of_system[metric.name] for of_system in statistics.values() for metric in metrics], axis=1)


def _blocks(resamples: int, widest: int) -> list[int]:
    size = max(1, CELLS // widest)
    return [min(size, resamples - first) for first in range(0, resamples, size)]


def _some(ids: list[str], most: int = 5) -> str:
    return ", ".join(ids[:most]) + (f" and {len(ids) - most} more" if len(ids) > most else "")
