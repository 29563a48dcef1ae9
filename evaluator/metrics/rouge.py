"""ROUGE F1 of each row, with the rouge_score package (stemmed).

Text is lower-cased, everything but a-z and 0-9 separates words, and words of more than three letters are stemmed (Porter).
Source: Lin, "ROUGE: A Package for Automatic Evaluation of Summaries", 2004.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import DefaultTokenizer, Tokenizer


class _Remembering(Tokenizer):  # type: ignore[misc]
    """rouge_score's own tokenizer; every metric and every system asks for the words of the same references again."""

    def __init__(self) -> None:
        self._tokenize = lru_cache(maxsize=100_000)(DefaultTokenizer(use_stemmer=True).tokenize)

    def tokenize(self, text: str) -> list[str]:
        found: list[str] = self._tokenize(text)
        return found


_WORDS = _Remembering()


def rouge_rows(
    predictions: Sequence[str], references: Sequence[str], *, only: Sequence[str] = ("rouge1", "rouge2", "rougeL")
) -> dict[str, NDArray[np.float64]]:
    """F1 of every prediction against its reference: for each name an array (rows,), each in [0, 1]; empty text scores 0."""
    scorer = RougeScorer(list(only), tokenizer=_WORDS)
    rows = [scorer.score(reference, prediction) for prediction, reference in zip(predictions, references, strict=True)]
    return {name: np.array([row[name].fmeasure for row in rows], dtype=np.float64) for name in only}


def words(text: str) -> list[str]:
    """The words ROUGE compares."""
    return list(_WORDS.tokenize(text))


def rouge_l(first: Sequence[str], second: Sequence[str]) -> float:
    """ROUGE-L F1 of two texts given as `words`: their longest common subsequence against their mean length. Symmetric, in [0, 1].

    The same number as rouge_score gives; taking words saves stemming each text again where many are compared with many.
    """
    return 2 * _longest_common(first, second) / (len(first) + len(second)) if first and second else 0.0


def _longest_common(first: Sequence[str], second: Sequence[str]) -> int:
    lengths = [0] * (len(second) + 1)
    for word in first:
        diagonal = 0
        for column, other in enumerate(second, 1):
            above = lengths[column]
            lengths[column] = diagonal + 1 if word == other else max(above, lengths[column - 1])
            diagonal = above
    return lengths[-1]
