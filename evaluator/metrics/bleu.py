"""Corpus BLEU-4 as nltk computes it, and the row counts it is made of, so that a bootstrap can resample rows.

Smoothing is nltk's method1 (Chen and Cherry, 2014): an n-gram order that matches nowhere in the whole corpus counts 0.1 matches. It
changes nothing for a system that matches at all four orders, and keeps a weak one above 0 so that weak ones can be told apart.
Words are runs of letters and digits, and single other signs, lower-cased: nltk's word_tokenize needs data that it downloads.
Source: Papineni et al., "BLEU: a Method for Automatic Evaluation of Machine Translation", 2002.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
from nltk.translate.bleu_score import SmoothingFunction, corpus_bleu
from numpy.typing import NDArray

ORDERS = 4
EPSILON = 0.1


def words(text: str) -> list[str]:
    """The words BLEU compares."""
    return re.findall(r"\w+|[^\w\s]", text.lower())


def bleu(predictions: Sequence[str], references: Sequence[str]) -> float:
    """BLEU of a whole corpus by nltk itself, one reference a row, in [0, 1]; 0 where not one word matches."""
    return float(
        corpus_bleu(
            [[words(reference)] for reference in references],
            [words(prediction) for prediction in predictions],
            smoothing_function=SmoothingFunction(epsilon=EPSILON).method1,
        )
    )


def bleu_counts(predictions: Sequence[str], references: Sequence[str]) -> NDArray[np.float64]:
    """(rows, 10), what each row adds: matches of 1- to 4-grams, n-grams of 1 to 4, words of the prediction, of the reference."""
    rows = np.zeros((len(predictions), 2 * ORDERS + 2))
    for row, prediction, reference in zip(rows, predictions, references, strict=True):
        ours, theirs = words(prediction), words(reference)
        for n in range(1, ORDERS + 1):
            a, b = Counter(_grams(ours, n)), Counter(_grams(theirs, n))
            # nltk counts at least one n-gram in every row, however short
            row[n - 1], row[ORDERS + n - 1] = (a & b).total(), max(1, a.total())
        row[-2:] = len(ours), len(theirs)
    return rows


def bleu_of_counts(sums: NDArray[np.float64], rows: int) -> NDArray[np.float64]:
    """BLEU of summed row counts (..., 10): an array (...), equal to `bleu` of the same rows."""
    matches, totals = sums[..., :ORDERS], sums[..., ORDERS : 2 * ORDERS]
    ours, theirs = sums[..., -2], sums[..., -1]
    precision = np.where(matches > 0, matches, EPSILON) / totals
    # an empty corpus matches nothing and is 0 below; its length must not divide
    brevity = np.exp(np.minimum(0.0, 1 - theirs / np.maximum(ours, 1)))
    scores: NDArray[np.float64] = np.where(matches[..., 0] > 0, brevity * np.exp(np.log(precision).mean(axis=-1)), 0.0)
    return scores


def _grams(found: list[str], n: int) -> list[tuple[str, ...]]:
    return list(zip(*(found[i:] for i in range(n)), strict=False))
