"""BLEU as sacrebleu computes it, and chrF: corpus scores from counts of rows, which a bootstrap can add up anew.

The counts and the formulas are sacrebleu's with its default settings (SIGNATURES; Post, 2018; Popović, 2015); tests hold them equal to
its own scores to 1e-9. sacrebleu itself makes the words (tokenizer 13a).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from sacrebleu.metrics import BLEU, CHRF
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

BLEU_ORDERS, CHRF_ORDERS, BETA = 4, 6, 2
Floats = NDArray[np.float64]

_tokenize = lru_cache(maxsize=100_000)(Tokenizer13a())


def signatures() -> dict[str, str]:
    """What sacrebleu calls these settings: by metric, its full signature for one reference a row."""
    return {name: str(metric.get_signature()) for name, metric in (("sacrebleu", _used(BLEU())), ("chrf", _used(CHRF())))}


def _used(metric: BLEU | CHRF) -> BLEU | CHRF:
    metric.corpus_score(["a"], [["a"]])  # how many references there are belongs to the signature, and is known from then on
    return metric


def bleu_counts(predictions: Sequence[str], references: Sequence[str]) -> Floats:
    """(rows, 10): matches of 1- to 4-grams, n-grams of 1 to 4, words of the prediction, words of the reference."""
    rows = np.zeros((len(predictions), 2 * BLEU_ORDERS + 2))
    for row, prediction, reference in zip(rows, predictions, references, strict=True):
        ours, theirs = _tokenize(prediction.rstrip()).split(), _tokenize(reference.rstrip()).split()
        for n in range(1, BLEU_ORDERS + 1):
            a = Counter(zip(*(ours[i:] for i in range(n)), strict=False))
            b = Counter(zip(*(theirs[i:] for i in range(n)), strict=False))
            row[n - 1], row[BLEU_ORDERS + n - 1] = (a & b).total(), a.total()
        row[-2:] = len(ours), len(theirs)
    return rows


def bleu_of_counts(sums: Floats, rows: int) -> Floats:
    """BLEU in [0, 1] of summed counts (..., 10) to (...); exponential smoothing of orders without a match, as in mteval-v13a."""
    matches, totals = sums[..., :BLEU_ORDERS], sums[..., BLEU_ORDERS : 2 * BLEU_ORDERS]
    ours, theirs = sums[..., -2], sums[..., -1]
    halved = 2.0 ** -np.cumsum(matches == 0, axis=-1)
    precision = np.where(matches > 0, matches, halved) / np.maximum(totals, 1)
    brevity = np.where(ours < theirs, np.exp(1 - theirs / np.maximum(ours, 1)), 1.0)
    scored = (matches.sum(axis=-1) > 0) & (totals.min(axis=-1) > 0)
    scores: Floats = np.where(scored, brevity * np.exp(np.log(precision).mean(axis=-1)), 0.0)
    return scores


def chrf_counts(predictions: Sequence[str], references: Sequence[str]) -> Floats:
    """(rows, 18): for character 1- to 6-grams those of the prediction, of the reference, and of both. White space is left out."""
    rows = np.zeros((len(predictions), 3 * CHRF_ORDERS))
    for row, prediction, reference in zip(rows, predictions, references, strict=True):
        ours, theirs = "".join(prediction.split()), "".join(reference.split())
        for n in range(1, CHRF_ORDERS + 1):
            a = Counter(ours[i : i + n] for i in range(len(ours) - n + 1))
            b = Counter(theirs[i : i + n] for i in range(len(theirs) - n + 1))
            # a reference too short for this order counts for nothing, nor does what is held against it
            row[3 * (n - 1) : 3 * n] = a.total() if b else 0, b.total(), (a & b).total()
    return rows


def chrf_of_counts(sums: Floats, rows: int) -> Floats:
    """chrF2 in [0, 1] of summed counts (..., 18) to (...): F with recall weighing twice, of mean precision and mean recall."""
    ours, theirs, matches = sums[..., 0::3], sums[..., 1::3], sums[..., 2::3]
    there = (ours > 0) & (theirs > 0)
    orders = np.maximum(there.sum(axis=-1), 1)
    precision = np.where(there, matches / np.maximum(ours, 1), 0.0).sum(axis=-1) / orders
    recall = np.where(there, matches / np.maximum(theirs, 1), 0.0).sum(axis=-1) / orders
    below = BETA**2 * precision + recall
    scores: Floats = np.divide((1 + BETA**2) * precision * recall, below, out=np.zeros_like(below), where=below > 0)
    return scores
