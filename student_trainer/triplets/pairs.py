"""From one prompt's scored answers to its preferences: the teacher's best against what is clearly worse."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from shared.datasets.rows import normalise
from shared.settings import TripletSettings
from student_trainer.triplets.candidates import Candidate
from student_trainer.triplets.ranking import Similarity

Scored = tuple[Candidate, float]


@dataclass(frozen=True)
class Pairs:
    """What became of one prompt's candidates: those that are `chosen` and `rejected`, and the others by reason.

    len(candidates) == len(chosen) + len(rejected) + dropped.total()
    """

    chosen: tuple[Scored, ...] = ()
    """Best first."""
    rejected: tuple[Scored, ...] = ()
    pairs: tuple[tuple[int, int], ...] = ()
    """Indices in chosen and in rejected; each of either is in one."""
    dropped: Counter[str] = field(default_factory=Counter)
    reason: str = ""
    """Why the whole prompt gives no triplet; empty if it does."""


def pair(
    candidates: Sequence[Candidate], scores: Sequence[float], settings: TripletSettings, similarity: Similarity, *, draw: float = 0.0
) -> Pairs:
    """Choose the teacher's best answers, and up to `max_rejected` answers to reject against them.

    candidates: in the order of `gather`; scores: one each, higher is better. Of equal scores the earlier candidate is the better.
    A rejected answer differs from the best one (ROUGE-L F1 at most `max_similarity`) and scores lower by `margin` or more; so it must
    from every other chosen one that it is paired with. The student's come first by default: the odds-ratio term lowers what the student
    finds likely, and its own answers are that. Within a source the worst-scored come first: the wider the gap, the surer that the
    ranking is right about the pair. The ranking `first` knows no better and worse among the teacher's answers: it takes the first and
    rejects the student's only.
    draw: in [0, 1), where this prompt falls when `on_policy` leaves a fraction of an answer: one prompt in two, say, rejects a current one.
    """
    kept, dropped = _distinct(candidates, scores)
    teacher = sorted((scored for scored in kept if scored[0].source == "teacher"), key=lambda scored: -scored[1])  # stable
    if not teacher:
        return _nothing(kept, dropped, "no usable teacher answer")
    best, *others = teacher
    also = [o for o in others if settings.ranking != "first" and o[1] > 0][: settings.max_chosen - 1]
    suitable = []
    for scored in kept:
        if scored is best or any(scored is chosen for chosen in also):
            continue
        if why := _unsuitable(scored, best, settings, similarity):
            dropped[why] += 1
        else:
            suitable.append(scored)
    if not suitable:
        return _nothing([best, *also], dropped, "nothing to reject")
    rejected = _picked(suitable, settings, draw)
    dropped["over max_rejected"] += len(suitable) - len(rejected)
    chosen, pairs = [best], [(0, place) for place in range(len(rejected))]
    for scored in also:
        beaten = [place for place, other in enumerate(rejected) if not _unsuitable(other, scored, settings, similarity)]
        if beaten:
            pairs += [(len(chosen), place) for place in beaten]
            chosen.append(scored)
        else:
            dropped["chosen, but beats nothing that is rejected"] += 1
    return Pairs(tuple(chosen), tuple(rejected), tuple(pairs), +dropped)


def _unsuitable(scored: Scored, chosen: Scored, settings: TripletSettings, similarity: Similarity) -> str | None:
    """Why an answer may not be rejected against a chosen one."""
    (candidate, score), (better, best_score) = scored, chosen
    if settings.ranking == "first" and candidate.source == "teacher":
        return "not the first (teacher)"
    if _side(candidate) not in settings.rejected_from:
        return f"not in rejected_from ({candidate.source})"
    if similarity(better.text, candidate.text) > settings.max_similarity:
        return "near-equal to the chosen"
    if score > best_score:
        return "better than the chosen (student)"
    if score == best_score or (settings.ranking != "first" and best_score - score < settings.margin):
        return "tie with the chosen"
    return None


def _side(candidate: Candidate) -> Literal["student", "teacher"]:
    return "teacher" if candidate.source == "teacher" else "student"


def _picked(suitable: Sequence[Scored], settings: TripletSettings, draw: float) -> list[Scored]:
    """`max_rejected` of them: by side, the worst first; of the student's the `on_policy` share is the current one's, if it has as many."""
    ordered = sorted(suitable, key=lambda s: (settings.rejected_from.index(_side(s[0])), s[1], s[0].sample))
    current = [s for s in ordered if s[0].source == "current-student"]
    initial = [s for s in ordered if s[0].source == "student"]
    own = min(settings.max_rejected, len(current) + len(initial))
    wanted = int(settings.on_policy * own + draw) if current else 0
    taken = min(max(wanted, own - len(initial)), len(current))
    students = sorted(current[:taken] + initial[: own - taken], key=lambda s: (s[1], s[0].sample))
    teachers = [s for s in ordered if s[0].source == "teacher"]
    sides = {"student": students, "teacher": teachers}
    return [scored for side in settings.rejected_from for scored in sides[side]][: settings.max_rejected]


def _distinct(candidates: Sequence[Candidate], scores: Sequence[float]) -> tuple[list[Scored], Counter[str]]:
    """The first candidate of each normalised text: where teacher and student say the same, it is the teacher's."""
    kept: dict[str, Scored] = {}
    dropped: Counter[str] = Counter()
    for candidate, score in zip(candidates, scores, strict=True):
        if kept.setdefault(normalise(candidate.text), (candidate, score))[0] is not candidate:
            dropped[f"same text again ({candidate.source})"] += 1
    return list(kept.values()), dropped


def _nothing(left: Sequence[Scored], dropped: Counter[str], reason: str) -> Pairs:
    if left:
        dropped[f"prompt without triplet: {reason}"] += len(left)
    return Pairs(dropped=dropped, reason=reason)
