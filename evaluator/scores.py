"""From stored predictions to scores: of every row for the bootstrap, of every system for the report. No model is needed."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from evaluator.metrics import bleu
from evaluator.metrics.metric import Answered, Metric
from evaluator.metrics.table import METRICS
from evaluator.significance import Comparison, bootstrap, comparison, exchange, holm, interval, refuse_unpaired
from shared.contracts import Example, Prediction
from shared.errors import DataError

DESCRIPTIVE = {
    "distinct1": "different words of all answers, by all their words (Li et al., 2016); no interval, since it is no sum over rows",
    "distinct2": "different word pairs of all answers, by all their word pairs; no interval, since it is no sum over rows",
}
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Scored:
    """One system on the test rows. Arrays, `ids` and `texts` share their order."""

    name: str
    ids: tuple[str, ...]
    texts: tuple[str, ...]
    statistics: Mapping[str, Floats]
    """By metric, (rows, k): see evaluator/metrics/metric.py."""
    empty: int
    """Answers that are empty, among them refused prompts: each scores 0."""
    cut_off: int
    """Answers that ended at the token limit."""
    failed: frozenset[str] = frozenset()
    """Ids of the rows that have no answer, which are among the empty ones."""
    metrics: Mapping[str, Metric] = field(default_factory=lambda: METRICS)
    """Those it was scored by, in the order to show."""

    def value(self, metric: str) -> float:
        """The system's score on all rows."""
        return self.metrics[metric].score(self.statistics[metric])

    def values(self) -> dict[str, float]:
        """All scores, rounded to 6 digits, DESCRIPTIVE ones last."""
        found = {metric: round(self.value(metric), 6) for metric in self.metrics}
        return found | {f"distinct{n}": round(distinct(self.texts, n), 6) for n in (1, 2)}

    def rows(self, metric: str) -> Floats:
        """Each row's own score, (rows,), of a metric that has one."""
        return self.statistics[metric][:, 0]

    def without(self, ids: Collection[str]) -> Scored:
        """The same on the other rows."""
        kept = [at for at, i in enumerate(self.ids) if i not in ids]
        return replace(
            self,
            ids=tuple(self.ids[at] for at in kept),
            texts=tuple(self.texts[at] for at in kept),
            statistics={name: table[kept] for name, table in self.statistics.items()},
        )

    @property
    def mean_words(self) -> float:
        """Words an answer, split at white space."""
        return sum(len(text.split()) for text in self.texts) / len(self.texts)


def distinct(texts: Sequence[str], order: int) -> float:
    """Different n-grams of words by all of them; 0 where there is none."""
    grams: Counter[tuple[str, ...]] = Counter()
    for text in texts:
        found = bleu.words(text)
        grams.update(zip(*(found[i:] for i in range(order)), strict=False))
    return len(grams) / max(grams.total(), 1)


def score(predictions: Sequence[Prediction], test: Sequence[Example], metrics: Mapping[str, Metric] = METRICS) -> dict[str, Scored]:
    """The scores of every system on the test rows that have a reference.

    Raises DataError if there are none, or if a system's answers are not exactly one to each test row: it names the ids.
    """
    examples = {e.id: e for e in test if e.summary is not None}
    if not examples:
        raise DataError("the test split has no references, so nothing can be scored; name their column in dataset.summary_column")
    by_system: dict[str, list[Prediction]] = defaultdict(list)
    for prediction in predictions:
        by_system[prediction.system].append(prediction)
    scored = {}
    for system, found in by_system.items():
        if wrong := unanswered([p.example_id for p in found], [e.id for e in test]):
            raise DataError(f"{system}: {wrong}; run `distill evaluate` again")
        answered = {p.example_id: p for p in found}
        scored[system] = _scored(system, [answered[i] for i in examples], examples, metrics)
    return scored


def unanswered(found: Sequence[str], wanted: Sequence[str]) -> str | None:
    """What keeps answers with the ids `found` from being one to each of `wanted`, with up to five ids; None if nothing does."""
    twice = [i for i, count in Counter(found).items() if count > 1]
    missing, unknown = sorted(set(wanted) - set(found)), sorted(set(found) - set(wanted))
    parts = [(twice, "answered more than once"), (missing, "not answered"), (unknown, "not in the test split")]
    told = [f"{', '.join(ids[:5])}{f' and {len(ids) - 5} more' if len(ids) > 5 else ''} {what}" for ids, what in parts if ids]
    return "; ".join(told) or None


def compare(ours: Scored, theirs: Scored, metric: str, *, margin: float = 0.0, resamples: int, seed: int) -> Comparison:
    """The gain of one system over another. Raises DataError if their test rows differ."""
    refuse_unpaired(ours.ids, theirs.ids)
    at = {i: row for row, i in enumerate(theirs.ids)}
    order = [at[i] for i in ours.ids]
    # one name may stand on both sides: two versions of a student
    statistics = {"ours": ours.statistics, "theirs": {metric: theirs.statistics[metric][order]}}
    measured = ours.metrics[metric]
    resampled = bootstrap(statistics, [measured], resamples=resamples, seed=seed)[metric]
    shifted = statistics
    if margin and measured.by_row:  # of "no better than the margin": the rows' gains above it may change their sign
        shifted = {"ours": {metric: statistics["ours"][metric] - margin}, "theirs": statistics["theirs"]}
    p = exchange(shifted, [("ours", "theirs")], [measured], resamples=resamples, seed=seed)[metric][0]
    found = comparison(("ours", "theirs"), measured, statistics, resampled, p, margin=margin)
    return found.model_copy(update={"ours": ours.name, "theirs": theirs.name})


@dataclass(frozen=True)
class Compared:
    """All systems' intervals, and what sets them apart."""

    intervals: Mapping[str, Mapping[str, tuple[float, float] | None]]
    """By system and metric; None where resampling shows no spread."""
    first: list[Comparison]
    """The first system against every other, in every metric; p_holm within a metric."""
    pairs: list[Comparison]
    """Any two systems in one metric; p_holm over all of them."""


def compare_all(scored: Mapping[str, Scored], first: str, metric: str, *, alone: Sequence[str] = (), resamples: int, seed: int) -> Compared:
    """Every system's intervals; `first` against the others in every metric, any two in `metric`. `alone`: systems to compare with none.

    All systems must be scored on the same rows, as those of one call of `score` are.
    """
    statistics = {name: found.statistics for name, found in scored.items()}
    of_first_system = scored[first].metrics
    metrics, random = list(of_first_system.values()), {"resamples": resamples, "seed": seed}
    resampled = bootstrap(statistics, metrics, **random)
    compared = [name for name in scored if name not in alone]
    ahead = [(first, name) for name in compared if name != first]
    of_first = exchange(statistics, ahead, metrics, **random) if ahead else {}
    versus = [
        holm([comparison(pair, m, statistics, resampled[m.name], p) for pair, p in zip(ahead, of_first[m.name], strict=True)])
        for m in metrics
        if ahead
    ]
    any_two = [(a, b) for i, a in enumerate(compared) for b in compared[i + 1 :]]
    main = of_first_system[metric]
    of_pairs = exchange(statistics, any_two, [main], **random)[metric] if any_two else []
    pairs = [comparison(pair, main, statistics, resampled[metric], p) for pair, p in zip(any_two, of_pairs, strict=True)]
    return Compared(
        intervals={name: {m.name: interval(resampled[m.name][name]) for m in metrics} for name in scored},
        first=[found for of_metric in versus for found in of_metric],
        pairs=holm(pairs),
    )


def _scored(system: str, predictions: Sequence[Prediction], examples: Mapping[str, Example], metrics: Mapping[str, Metric]) -> Scored:
    rows = [Answered(examples[p.example_id].question, examples[p.example_id].summary or "", p.text, p.finish_reason) for p in predictions]
    return Scored(
        name=system,
        ids=tuple(p.example_id for p in predictions),
        texts=tuple(p.text for p in predictions),
        statistics={name: metric.statistics(rows) for name, metric in metrics.items()},
        empty=sum(not row.text.strip() for row in rows),
        cut_off=sum(row.finish_reason == "length" for row in rows),
        failed=frozenset(p.example_id for p in predictions if p.failed is not None),
        metrics=metrics,
    )
