"""The report as a table for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

HEADERS = ("system", "ROUGE-1", "ROUGE-2", "ROUGE-L", "BLEU", "words", "gain of distilled", "p")


def table(report: Mapping[str, Any]) -> str:
    """One aligned line a system, scores in points (0 to 100), under a line that says what was compared."""
    rows = [HEADERS]
    for name, values in report["systems"].items():
        scores = [f"{100 * values[metric]:.1f}" for metric in ("rouge1", "rouge2", "rougeL", "bleu")]
        rows.append((name, *scores, f"{values['mean_words']:.1f}", *_gain(report["comparisons"].get(name))))
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADERS))]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]
    lines.insert(1, "-" * max(map(len, lines)))
    metric = next((c["metric"] for c in report["comparisons"].values()), "")
    head = f"{report['recipe']}: {report['test_rows']} test rows, points of 100; gains in {metric} with 95% intervals, p one-sided"
    return "\n".join([head, *lines, *(f"note: {note}" for note in report["notes"])])


def _gain(comparison: Mapping[str, Any] | None) -> tuple[str, str]:
    if comparison is None:
        return "", ""
    gain = f"{100 * comparison['gain']:+.1f}"
    if comparison["p"] is None:
        return f"{gain} (no interval)", ""
    return f"{gain} [{100 * comparison['low']:+.1f}, {100 * comparison['high']:+.1f}]", f"{comparison['p']:.4f}"
