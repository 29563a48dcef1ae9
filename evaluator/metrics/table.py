"""All metrics, in the order to show them: what a report defines, a gate may name and a table has as columns."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from evaluator.metrics import bleu, corpus
from evaluator.metrics.metric import Answered, Metric, mean, ratio
from evaluator.metrics.rouge import rouge_rows
from shared.datasets.rows import normalise

COPIED_ORDER = 3
Floats = NDArray[np.float64]


def _pairs(
    counts: Callable[[Sequence[str], Sequence[str]], Floats],
) -> Callable[[Sequence[Answered]], Floats]:
    """A function of texts and references as one of answered rows."""
    return lambda rows: counts([row.text for row in rows], [row.reference for row in rows])


def _column(of_row: Callable[[Answered], float]) -> Callable[[Sequence[Answered]], Floats]:
    return lambda rows: np.array([[float(of_row(row))] for row in rows])


def _rouge(name: str) -> Callable[[Sequence[Answered]], Floats]:
    return lambda rows: rouge_rows([row.text for row in rows], [row.reference for row in rows], only=(name,))[name][:, np.newaxis]


def _copied(row: Answered) -> tuple[int, int]:
    """Word 3-grams of the answer that stand in the question, and all of them."""
    source, text = bleu.words(row.question), bleu.words(row.text)
    there = set(zip(*(source[i:] for i in range(COPIED_ORDER)), strict=False))
    ours = list(zip(*(text[i:] for i in range(COPIED_ORDER)), strict=False))
    return sum(gram in there for gram in ours), len(ours)


def _metrics() -> list[Metric]:
    named = corpus.signatures()
    of_rouge = {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L", "rougeLsum": "ROUGE-Lsum"}
    return [
        *(
            Metric(name, label, f"{label} F1, rouge_score, stemmed (Porter); mean over rows", _rouge(name), mean, by_row=True)
            for name, label in of_rouge.items()
        ),
        Metric(
            "bleu",
            "BLEU (nltk)",
            "corpus BLEU-4, nltk corpus_bleu, SmoothingFunction method1 (epsilon 0.1), lower-cased, words and signs by regular expression",
            _pairs(bleu.bleu_counts),
            bleu.bleu_of_counts,
        ),
        Metric(
            "sacrebleu",
            "BLEU (sacrebleu)",
            f"corpus BLEU-4, sacrebleu {named['sacrebleu']}",
            _pairs(corpus.bleu_counts),
            corpus.bleu_of_counts,
        ),
        Metric("chrf", "chrF", f"corpus chrF2, sacrebleu {named['chrf']}", _pairs(corpus.chrf_counts), corpus.chrf_of_counts),
        Metric(
            "exact_match",
            "exact match",
            "share of answers equal to the reference but for case, white space and punctuation",
            _column(lambda row: normalise(row.text) == normalise(row.reference) != ""),
            mean,
            by_row=True,
        ),
        Metric(
            "length_ratio",
            "length ratio",
            "words of all answers by words of all references, split at white space",
            lambda rows: np.array([[len(row.text.split()), len(row.reference.split())] for row in rows], dtype=np.float64),
            ratio,
            better="neither",
            points=False,
        ),
        Metric(
            "copied",
            "copied",
            "share of the answers' word 3-grams that stand in the question",
            lambda rows: np.array([_copied(row) for row in rows], dtype=np.float64),
            ratio,
            better="neither",
        ),
        Metric(
            "empty",
            "empty",
            "share of answers without text (refused prompts among them); each scores 0 elsewhere",
            _column(lambda row: not row.text.strip()),
            mean,
            better="lower",
            by_row=True,
        ),
        Metric(
            "cut_off",
            "cut off",
            "share of answers that ended at the token limit",
            _column(lambda row: row.finish_reason == "length"),
            mean,
            better="lower",
            by_row=True,
        ),
    ]


METRICS: dict[str, Metric] = {metric.name: metric for metric in _metrics()}
"""By name."""
MAIN = ("rouge1", "rouge2", "rougeL", "bleu", "sacrebleu", "chrf")
"""What a model card and a registry tell of a student."""
