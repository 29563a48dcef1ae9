"""The report as a table for a terminal."""

from __future__ import annotations

from evaluator.report.contract import Report
from evaluator.significance import Comparison

COLUMNS = ("rouge1", "rouge2", "rougeL", "bleu", "chrf")


def table(report: Report) -> str:
    """One aligned line a system, scores in points (0 to 100), under a line that says what was compared."""
    gains = {c.theirs: c for c in report.comparisons if c.metric == report.metric}
    shown = COLUMNS if report.metric in COLUMNS else (*COLUMNS, report.metric)
    rows = [("system", *(report.metrics[metric].label for metric in shown), "words", "gain of distilled", "p", "p (Holm)")]
    for name, system in report.systems.items():
        scores = [f"{100 * system.scores[metric].value:.1f}" for metric in shown]
        rows.append((name, *scores, f"{system.mean_words:.1f}", *_gain(gains.get(name))))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]
    lines.insert(1, "-" * max(map(len, lines)))
    head = (
        f"{report.recipe}: {report.test_rows} test rows, points of 100; gains in {report.metrics[report.metric].label} with 95% intervals, "
        "p two-sided"
    )
    return "\n".join([head, *lines, *(f"note: {note}" for note in report.notes)])


def _gain(found: Comparison | None) -> tuple[str, str, str]:
    if found is None:
        return "", "", ""
    gain = f"{100 * found.gain:+.1f}"
    if found.p is None or found.low is None or found.high is None or found.p_holm is None:
        return f"{gain} (no interval)", "", ""
    return f"{gain} [{100 * found.low:+.1f}, {100 * found.high:+.1f}]", f"{found.p:.4f}", f"{found.p_holm:.4f}"
