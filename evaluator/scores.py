"""From stored predictions to scores: of every row for the bootstrap, of every system for the report. No model is needed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from evaluator.metrics.bleu import bleu, bleu_counts, bleu_of_counts
from evaluator.metrics.rouge import ROUGE, rouge_rows
from evaluator.significance import Comparison, only_value, paired_bootstrap
from shared.contracts import Example, Prediction
from shared.errors import DataError

METRICS = (*ROUGE, "bleu")


@dataclass(frozen=True)
class Scored:
    """One system on the test rows. Arrays and `ids` share their order."""

    ids: tuple[str, ...]
    texts: tuple[str, ...]
    rouge: Mapping[str, NDArray[np.float64]]
    """F1 of each row by ROUGE metric, (rows,), in [0, 1]."""
    bleu_counts: NDArray[np.float64]
    """(rows, 10), see metrics/bleu.py."""
    bleu: float
    empty: int
    """Answers that are empty, among them refused prompts: each scores 0."""
    cut_off: int
    """Answers that ended at the token limit."""

    def value(self, metric: str) -> float:
        """The system's score, in [0, 1]: the mean over rows for ROUGE, the corpus score for BLEU."""
        return self.bleu if metric == "bleu" else float(self.rouge[metric].mean())

    def summary(self) -> dict[str, float | int]:
        """What the report says of the system; scores rounded to 6 digits."""
        return {
            **{metric: round(self.value(metric), 6) for metric in METRICS},
            "empty": self.empty,
            "cut_off": self.cut_off,
            "mean_words": round(sum(len(text.split()) for text in self.texts) / len(self.texts), 2),
        }


def score(predictions: Sequence[Prediction], test: Sequence[Example]) -> dict[str, Scored]:
    """The scores of every system on the test rows that have a reference.

    Raises DataError if there are none, or if a system's answers are not exactly one to each test row.
    """
    references = {e.id: e.summary for e in test if e.summary is not None}
    if not references:
        raise DataError("the test split has no references, so nothing can be scored; name their column in dataset.summary_column")
    by_system: dict[str, list[Prediction]] = defaultdict(list)
    for prediction in predictions:
        by_system[prediction.system].append(prediction)
    expected = [e.id for e in test]
    for system, found in by_system.items():
        if [p.example_id for p in found] != expected:
            raise DataError(f"{system}: the stored predictions are not one for each test row, in order; run `distill evaluate` again")
    return {system: _scored([p for p in found if p.example_id in references], references) for system, found in by_system.items()}


def compare(ours: Scored, theirs: Scored, metric: str, *, margin: float = 0.0, resamples: int, seed: int) -> Comparison:
    """The gain of one system over another in `metric`, by paired bootstrap. Raises DataError if their test rows differ."""
    if metric == "bleu":
        rows = len(ours.ids)
        return paired_bootstrap(
            dict(zip(ours.ids, ours.bleu_counts, strict=True)),
            dict(zip(theirs.ids, theirs.bleu_counts, strict=True)),
            margin=margin,
            resamples=resamples,
            seed=seed,
            score=lambda means: bleu_of_counts(means * rows),
        )
    return paired_bootstrap(_column(ours, metric), _column(theirs, metric), margin=margin, resamples=resamples, seed=seed, score=only_value)


def _column(scored: Scored, metric: str) -> dict[str, NDArray[np.float64]]:
    return dict(zip(scored.ids, scored.rouge[metric][:, np.newaxis], strict=True))


def _scored(predictions: Sequence[Prediction], references: Mapping[str, str]) -> Scored:
    texts = tuple(p.text for p in predictions)
    expected = [references[p.example_id] for p in predictions]
    return Scored(
        ids=tuple(p.example_id for p in predictions),
        texts=texts,
        rouge=rouge_rows(texts, expected),
        bleu_counts=np.stack([bleu_counts(text, reference) for text, reference in zip(texts, expected, strict=True)]),
        bleu=bleu(texts, expected),
        empty=sum(not text.strip() for text in texts),
        cut_off=sum(p.finish_reason == "length" for p in predictions),
    )
