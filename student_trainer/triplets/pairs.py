"""From one prompt's scored answers to its preferences: the teacher's best against what is clearly worse."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from shared.datasets.rows import normalise
from shared.settings import TripletSettings
from student_trainer.triplets.candidates import Candidate
from student_trainer.triplets.ranking import Similarity


@dataclass(frozen=True)
class Pairs:
    """What became of one prompt's candidates: `chosen` (if there is one), `rejected`, and the others by reason.

    len(candidates) == (chosen is not None) + len(rejected) + dropped.total()
    """

    chosen: tuple[Candidate, float] | None
    rejected: tuple[tuple[Candidate, float], ...]
    dropped: Counter[str] = field(default_factory=Counter)
    reason: str = ""
    """Why the whole prompt gives no triplet; empty if it does."""


def pair(candidates: Sequence[Candidate], scores: Sequence[float], settings: TripletSettings, similarity: Similarity) -> Pairs:
    """Choose the teacher's best answer, and up to `max_rejected` answers to reject against it.

    candidates: in the order of `gather`; scores: one each, higher is better. Of equal scores the earlier candidate is the better.
    A rejected answer differs from the chosen one (ROUGE-L F1 at most `max_similarity`) and scores lower by `margin` or more.
    The student's come first: the odds-ratio term lowers what the student finds likely, and its own answers are that. Within a
    source the worst-scored come first: the wider the gap, the surer that the ranking is right about the pair.
    The ranking `first` knows no better and worse among the teacher's answers: it takes the first and rejects the student's only.
    """
    kept, dropped = _distinct(candidates, scores)
    teacher = [(c, s) for c, s in kept if c.source == "teacher"]
    if not teacher:
        return _nothing(kept, dropped, "no usable teacher answer")
    best, best_score = max(teacher, key=lambda scored: scored[1])  # the first of the best
    suitable = []
    for candidate, score in kept:
        if candidate is best:
            continue
        if settings.ranking == "first" and candidate.source == "teacher":
            dropped["not the first (teacher)"] += 1
        elif similarity(best.text, candidate.text) > settings.max_similarity:
            dropped["near-equal to the chosen"] += 1
        elif score > best_score:
            dropped["better than the chosen (student)"] += 1
        elif score == best_score or (settings.ranking != "first" and best_score - score < settings.margin):
            dropped["tie with the chosen"] += 1
        else:
            suitable.append((candidate, score))
    if not suitable:
        return _nothing([(best, best_score)], dropped, "nothing to reject")
    suitable.sort(key=lambda scored: (scored[0].source != "student", scored[1], scored[0].sample))
    if len(suitable) > settings.max_rejected:
        dropped["over max_rejected"] += len(suitable) - settings.max_rejected
    return Pairs((best, best_score), tuple(suitable[: settings.max_rejected]), dropped)


def _distinct(candidates: Sequence[Candidate], scores: Sequence[float]) -> tuple[list[tuple[Candidate, float]], Counter[str]]:
    """The first candidate of each normalised text: where teacher and student say the same, it is the teacher's."""
    kept: dict[str, tuple[Candidate, float]] = {}
    dropped: Counter[str] = Counter()
    for candidate, score in zip(candidates, scores, strict=True):
        if kept.setdefault(normalise(candidate.text), (candidate, score))[0] is not candidate:
            dropped[f"same text again ({candidate.source})"] += 1
    return list(kept.values()), dropped


def _nothing(left: Sequence[tuple[Candidate, float]], dropped: Counter[str], reason: str) -> Pairs:
    if left:
        dropped[f"prompt without triplet: {reason}"] += len(left)
    return Pairs(None, (), dropped, reason)
