"""How good is an answer: ROUGE-L against the reference, against the other samples, or the order of arrival."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import DefaultTokenizer

from student_trainer.triplets.candidates import Candidate

CACHED = 65_536
"""Texts and scores kept: many times one prompt's, and a bound on memory whatever the number of prompts."""
Similarity = Callable[[str, str], float]
"""ROUGE-L F1 of two texts, in [0, 1]; symmetric."""


class _Tokenizer:
    """rouge_score's own tokenizer, each text tokenised and stemmed once: stemming is most of the cost of a score."""

    def __init__(self) -> None:
        self.tokenize = lru_cache(CACHED)(DefaultTokenizer(use_stemmer=True).tokenize)


def rouge_l() -> Similarity:
    """ROUGE-L F1 with Porter's stemmer (Lin, 2004; package rouge_score), each pair of texts scored once.

    Its words are runs of a-z and 0-9: in other scripts every score is 0, and only the ranking `first` makes triplets.
    """
    scorer = RougeScorer(["rougeL"], tokenizer=_Tokenizer())

    @lru_cache(CACHED)
    def score(one: str, other: str) -> float:
        return float(scorer.score(one, other)["rougeL"].fmeasure)

    return lambda one, other: score(*sorted((one, other)))


def by_reference(candidates: Sequence[Candidate], reference: str, similarity: Similarity) -> list[float]:
    """Each candidate's similarity to what a person wrote."""
    return [similarity(reference, c.text) for c in candidates]


def by_consensus(candidates: Sequence[Candidate], similarity: Similarity) -> list[float] | None:
    """Each candidate's mean similarity to the teacher's samples other than itself (minimum Bayes risk; Kumar and Byrne, 2004).

    A text sampled twice votes twice: how often the teacher says a thing is what the samples tell of its distribution.
    None with fewer than two teacher samples: one answer agrees with nobody.
    """
    voters = [c for c in candidates if c.source == "teacher"]
    if len(voters) < 2:
        return None
    scores = []
    for candidate in candidates:
        others = [similarity(candidate.text, v.text) for v in voters if v is not candidate]
        scores.append(sum(others) / len(others))
    return scores


def by_source(candidates: Sequence[Candidate]) -> list[float]:
    """1 for the teacher's answers and 0 for the student's: all that is known without a measure."""
    return [float(c.source == "teacher") for c in candidates]
