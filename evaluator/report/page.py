"""The report as one self-contained HTML page: no script, no font, no picture from anywhere else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from evaluator.scores import Scored
from evaluator.systems import DISTILLED
from shared.contracts import Example

BESIDE = ("student-zero-shot", "teacher-zero-shot", "teacher-few-shot")
"""Systems whose answers are shown beside the distilled student's."""
EACH = 4
"""Examples shown of the best, the middle and the worst."""


def page(report: Mapping[str, Any], test: Sequence[Example], scored: Mapping[str, Scored]) -> str:
    """The page. Every text in it is escaped."""
    environment = Environment(
        loader=PackageLoader("evaluator.report", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["points"] = lambda value: f"{100 * value:.1f}"
    environment.filters["gain"] = lambda value: f"{100 * value:+.1f}"
    return environment.get_template("page.html.j2").render(
        report=report,
        distilled=DISTILLED,
        gain_scale=_gain_scale(report["comparisons"]),
        stages={name: {"seconds": s["seconds"], "counts": _flat(s["counts"])} for name, s in report["stages"].items()},
        examples=chosen(test, scored),
    )


def chosen(test: Sequence[Example], scored: Mapping[str, Scored]) -> list[dict[str, Any]]:
    """The best, middle and worst EACH rows by ROUGE-L gain of the distilled student over its zero-shot self, each row once."""
    examples = {e.id: e for e in test}
    ours, before = scored[DISTILLED], scored[BESIDE[0]]
    at = {i: index for index, i in enumerate(ours.ids)}
    gains = {i: float(gain) for i, gain in zip(ours.ids, ours.rouge["rougeL"] - before.rouge["rougeL"], strict=True)}
    order = sorted(gains, key=lambda i: (-gains[i], i))
    middle = max(0, (len(order) - EACH) // 2)
    picked: dict[str, str] = {}
    for where, ids in (("best", order[:EACH]), ("middle", order[middle : middle + EACH]), ("worst", order[-EACH:])):
        for example_id in ids:
            picked.setdefault(example_id, where)
    return [
        {
            "where": where,
            "id": i,
            "question": examples[i].question,
            "reference": examples[i].summary,
            "gain": gains[i],
            "answers": [
                {"system": name, "text": scored[name].texts[at[i]], "rougeL": float(scored[name].rouge["rougeL"][at[i]])}
                for name in (DISTILLED, *BESIDE)
            ],
        }
        for i, where in picked.items()
    ]


def _gain_scale(comparisons: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """The range that the drawn intervals share, zero always inside."""
    values = [c[end] for c in comparisons.values() for end in ("gain", "low", "high") if c[end] is not None]
    low, high = min(0.0, *values), max(0.0, *values)
    return {"low": low, "width": (high - low) or 1.0}


def _flat(counts: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Nested counts as rows of a two-column table."""
    if isinstance(counts, Mapping):
        return [row for key, value in counts.items() for row in _flat(value, f"{prefix} / {key}" if prefix else str(key))]
    return [(prefix, f"{counts:g}" if isinstance(counts, float) else str(counts))]
