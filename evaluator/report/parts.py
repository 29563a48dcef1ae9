"""Test rows by length and by question type: where a student is good, and where it is not."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from evaluator.metrics.table import METRICS
from evaluator.report.contract import Part, ScoredRow
from evaluator.scores import Scored
from evaluator.systems import REFERENCE
from shared.contracts import Example

FEW = 3
"""Types with fewer rows are put together as "other"."""
OTHER = "other"
_TYPES = (
    ("treatment", r"\b(treat\w*|therap\w*|cure\w*|medic(ation|ine)s?|surger(y|ies))\b"),
    ("cause", r"\b(causes?|caused|risk factors?|reasons?)\b"),
    ("symptoms, diagnosis", r"\b(symptoms?|signs?|diagnos\w*|tests?|tested)\b"),
    ("side effects, interactions", r"\b(side effects?|interact\w*|adverse|safe|dangerous|harmful)\b"),
    ("prognosis", r"\b(prognosis|outlook|life expectancy|long[- ]term|survival|recover\w*)\b"),
    ("where to find", r"^where\b|\bfind (a |an )?(physicians?|doctors?|speciali\w*|hospitals?|information|support)\b"),
    ("genetics", r"\b(genetic\w*|inherit\w*|genes?|hereditary)\b"),
    ("how to", r"^how (do|can|to|should|long|often|much|many)\b"),
    ("yes or no", r"^(is|are|can|could|do|does|did|should|will|would|has|have|may)\b"),
    ("what is", r"^(what|tell me)\b"),
)
"""Name -> what the reference matches, the first that does. A rough sorting of consumers' medical questions; other tasks end up under
their first word's type."""


def question_type(reference: str) -> str:
    """The type of a row, by the words of its reference."""
    text = reference.lower().strip()
    return next((name for name, pattern in _TYPES if re.search(pattern, text)), OTHER)


def row_metric(metric: str) -> str:
    """What single rows are scored by: the gate's metric if it has row scores (BERTScore, which is not in the table, has), else ROUGE-L."""
    return metric if metric not in METRICS or METRICS[metric].by_row else "rougeL"


def scored_rows(scored: Mapping[str, Scored], examples: Mapping[str, Example], metric: str) -> list[ScoredRow]:
    """One for each scored test row, in their order."""
    systems = {name: found.rows(row_metric(metric)) for name, found in scored.items() if name != REFERENCE}
    ids = next(iter(scored.values())).ids
    types = [question_type(examples[i].summary or "") for i in ids]
    often = Counter(types)
    return [
        ScoredRow(
            id=i,
            words=len(examples[i].question.split()),
            type=kind if often[kind] >= FEW else OTHER,
            scores={name: round(float(rows[at]), 4) for name, rows in systems.items()},
        )
        for at, (i, kind) in enumerate(zip(ids, types, strict=True))
    ]


def by_length(rows: Sequence[ScoredRow]) -> list[Part]:
    """Rows in up to four parts of about equal size, by the words of the question."""
    words = [row.words for row in rows]
    borders = sorted({int(q) for q in np.quantile(words, (0.25, 0.5, 0.75))} | {max(words)})
    parts, above = [], 0
    for border in borders:
        inside = [row for row in rows if above < row.words <= border or (above == 0 and row.words == 0)]
        if inside:
            parts.append(_part(f"{above + 1} to {border} words", inside))
        above = border
    return parts


def by_type(rows: Sequence[ScoredRow]) -> list[Part]:
    """Rows by question type, the commonest first, "other" last."""
    return _grouped(rows, lambda row: row.type)


def _grouped(rows: Sequence[ScoredRow], key: Callable[[ScoredRow], str]) -> list[Part]:
    often = Counter(key(row) for row in rows)
    order = sorted(often, key=lambda label: (label == OTHER, -often[label], label))
    return [_part(label, [row for row in rows if key(row) == label]) for label in order]


def _part(label: str, rows: Sequence[ScoredRow]) -> Part:
    scores = {name: round(sum(row.scores[name] for row in rows) / len(rows), 6) for name in rows[0].scores}
    return Part(label=label, rows=len(rows), scores=scores)
