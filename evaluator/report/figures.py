"""Numbers as the page and the Markdown show them: one wording for both, so that neither rounds or chooses otherwise."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from math import isfinite
from typing import Any

from evaluator.report.contract import Definition, Report, Score
from evaluator.significance import Comparison
from evaluator.systems import DISTILLED

MAIN = ("rouge1", "rouge2", "rougeL", "bleu", "chrf")
"""Metrics of the headline table, as far as they were computed; all others are a click away."""
ALPHA = 0.05
"""Below it a corrected p is called significant."""
NONE = "–"


def points(definition: Definition, value: float | None) -> str:
    """A score: in points of 100 where its metric is shown so, in its own unit otherwise."""
    if value is None or not isfinite(value):
        return NONE
    return f"{100 * value:.1f}" if definition.points else f"{value:.2f}"


def signed(definition: Definition, value: float | None) -> str:
    """A gain, with its sign."""
    if value is None or not isfinite(value):
        return NONE
    return f"{100 * value:+.1f}" if definition.points else f"{value:+.2f}"


def between(definition: Definition, found: Score) -> str:
    """A score's 95% interval in words; a dash where there is none."""
    if found.low is None or found.high is None:
        return NONE
    return f"{points(definition, found.low)} to {points(definition, found.high)}"


def gain_between(definition: Definition, found: Comparison) -> str:
    """A gain's 95% interval in words, or why there is none."""
    if found.low is None or found.high is None:
        return f"no interval: {found.note}" if found.note else "no interval"
    return f"{signed(definition, found.low)} to {signed(definition, found.high)}"


def p_value(p: float | None) -> str:
    """Four decimals are what ten thousand resamples can tell."""
    if p is None:
        return NONE
    return "<0.0001" if p < 0.00005 else f"{p:.4f}"


def better(definition: Definition, gain: float) -> int:
    """1 where a gain is for the better, -1 for the worse, 0 where it is none or the metric has no better."""
    if definition.better == "neither" or not isfinite(gain) or gain == 0:
        return 0
    return 1 if (gain > 0) == (definition.better == "higher") else -1


def significant(found: Comparison) -> bool:
    """Whether a gain stands after Holm's correction."""
    return found.p_holm is not None and found.p_holm < ALPHA


def main_metrics(report: Report) -> list[str]:
    """The gate's metric, then the well-known ones that were computed."""
    return [report.metric, *(name for name in MAIN if name in report.metrics and name != report.metric)]


def gains(report: Report, metric: str) -> dict[str, Comparison]:
    """The distilled student's comparisons in a metric, by the other system, in the order to show."""
    found = {c.theirs: c for c in report.comparisons if c.metric == metric and c.ours == DISTILLED}
    return {name: found[name] for name in report.systems if name in found}


def stages(report: Report, pattern: str) -> dict[str, Mapping[str, Any]]:
    """The stages before this one whose name matches as a whole, in order."""
    return {name: stage for name, stage in report.stages.items() if re.fullmatch(pattern, name)}


def flat(values: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested values as rows of a two-column table."""
    if isinstance(values, Mapping) and (values or not prefix):
        for key, value in values.items():
            yield from flat(value, f"{prefix} / {key}" if prefix else str(key))
    elif isinstance(values, Mapping | Sequence) and not isinstance(values, str):
        yield prefix, ", ".join(map(plain, values)) if values else "none"
    else:
        yield prefix, plain(values)


def plain(value: Any) -> str:
    """A setting or count in as few signs as it needs."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:g}"
    text = str(value)
    # a line break or a blank alone would look like nothing
    return text if text.isprintable() and text == text.strip() != "" else json.dumps(text, ensure_ascii=False)


def seconds(value: float) -> str:
    """A duration as people say it."""
    if value < 60:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


def size(value: int) -> str:
    """Bytes in the unit that reads best."""
    amount = float(value)
    for unit in ("bytes", "kB", "MB"):
        if amount < 1000:
            return f"{value} bytes" if unit == "bytes" else f"{amount:.1f} {unit}"
        amount /= 1000
    return f"{amount:.1f} GB"
