"""The stages triplets/rN: all answers of a run ranked into preferences, every row accounted for, no test row let in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from shared.artifacts import Run, read_jsonl, sha256_bytes, write_jsonl
from shared.commands import Progress
from shared.contracts import Example, Response, Source, Split, Triplet
from shared.datasets.rows import normalise
from shared.datasets.stage import prepare
from shared.errors import DataError, LeakageError
from shared.prompts import zero_shot
from shared.settings import Recipe
from student_trainer.triplets.candidates import Candidate, gather
from student_trainer.triplets.pairs import Pairs, pair
from student_trainer.triplets.ranking import Similarity, by_consensus, by_reference, by_source, rouge_l
from student_trainer.triplets.references import refuse_unrankable, refuse_unreadable

TEACHER = "responses/teacher"
MORE_ANSWERS = "ask for more or longer answers (harvest.samples, harvest.max_tokens)"
REMEDIES = {
    "tie with the chosen": f"{MORE_ANSWERS}, or lower triplets.margin",
    "near-equal to the chosen": "raise triplets.max_similarity, or ask for answers that differ more (harvest.temperature)",
    "not in rejected_from (student)": "name student in triplets.rejected_from",
    "not in rejected_from (teacher)": "name teacher in triplets.rejected_from, or let the student answer (sample.samples)",
}
"""By the reason why most answers are in no triplet."""
INEVITABLE = ("prompt without triplet: nothing to reject", "not the first (teacher)")
"""Reasons that follow from another one, or from how answers are ranked."""
ANOTHER_RUN = "in another --out, where --answers-from and this run take over what the teacher has answered to the same requests"


def stage_name(number: int) -> str:
    """Of the triplets for a round of training."""
    return f"triplets/r{number}"


def sources(number: int) -> dict[Source, str]:
    """The stages whose answers are ranked for a round."""
    students: dict[Source, str] = {"student": "responses/student-r0"}
    if number:
        students["current-student"] = f"responses/student-r{number}"
    return {"teacher": TEACHER, **students}


@dataclass
class Census:
    """Where every ledger row and every train prompt went.

    Ledger rows: `rows` == `kept` + `dropped`.total(). Train prompts: `prompts` == `prompts_kept` + `prompts_dropped`.total().
    """

    rows: int = 0
    kept: int = 0
    """Rows whose text stands in a triplet: the chosen and the rejected."""
    dropped: Counter[str] = field(default_factory=Counter)
    prompts: int = 0
    prompts_kept: int = 0
    prompts_dropped: Counter[str] = field(default_factory=Counter)
    triplets: int = 0
    rejected_sources: Counter[str] = field(default_factory=Counter)
    cut_off_rejected: int = 0
    """Rejected answers of the student that ended at the token limit."""
    mean_chosen_score: float = 0.0
    mean_rejected_score: float = 0.0

    def counts(self) -> dict[str, Any]:
        """The census for a manifest."""
        return {
            "rows": self.rows,
            "kept": self.kept,
            "dropped": dict(sorted(self.dropped.items())),
            "prompts": self.prompts,
            "prompts_kept": self.prompts_kept,
            "prompts_dropped": dict(sorted(self.prompts_dropped.items())),
            "triplets": self.triplets,
            "rejected_sources": dict(sorted(self.rejected_sources.items())),
            "cut_off_rejected": self.cut_off_rejected,
            "mean_chosen_score": round(self.mean_chosen_score, 4),
            "mean_rejected_score": round(self.mean_rejected_score, 4),
        }

    def table(self) -> str:
        """The census as lines for a terminal."""
        lines = [("answers", self.rows), ("  kept", self.kept), ("  dropped", self.dropped.total())]
        lines += [(f"    {reason}", count) for reason, count in sorted(self.dropped.items())]
        lines += [("prompts", self.prompts), ("  with triplets", self.prompts_kept), ("  without", self.prompts_dropped.total())]
        lines += [(f"    {reason}", count) for reason, count in sorted(self.prompts_dropped.items())]
        lines += [("triplets", self.triplets)]
        lines += [(f"  rejected: the {source}'s", count) for source, count in sorted(self.rejected_sources.items())]
        lines += [("  rejected: cut off (student)", self.cut_off_rejected)]
        width = max(len(label) for label, _ in lines) + 2
        return "\n".join(f"{label:{width}}{count:>8}" for label, count in lines)


def build(run: Run, number: int = 0) -> int:
    """Read the ledgers, rank, check, write the triplets of a round and the manifest, print the census. Returns the exit code.

    The same inputs give the same bytes. Raises StageOrder before the answers are there; LeakageError if a row of test or validation
    would reach training; DataError if there is nothing to rank by or no triplet is left; StorageError.
    """
    name, read = stage_name(number), sources(number)
    stage = run.stage(name, inputs=["dataset", *read.values()])
    if stage.complete:
        print(f"{name}: complete, nothing to do")
        return 0
    splits = prepare(run)
    answers = {source: read_jsonl(run.path / folder / "responses.jsonl", Response) for source, folder in read.items()}
    refuse_leaks(splits, {read[source]: rows for source, rows in answers.items()})
    triplets, census = make_triplets(run.recipe, splits["train"], answers)
    if not triplets:
        raise DataError(f"no triplet is left of {census.rows} answers; {_remedy(run.recipe, census)}\n{census.table()}")
    refuse_leaks(splits, {name: triplets})
    file = stage.path / "triplets.jsonl"
    write_jsonl(file, triplets)
    settings = {"triplets": run.recipe.triplets.model_dump(mode="json"), "task": run.recipe.task.model_dump(mode="json")}
    stage.finish([file], settings=settings, counts=census.counts())
    print(
        f"{name}: {census.triplets} triplets from {census.prompts_kept} of {census.prompts} prompts, mean score by "
        f"{run.recipe.triplets.ranking}: chosen {census.mean_chosen_score:.3f}, rejected {census.mean_rejected_score:.3f}\n{census.table()}"
    )
    return 0


def refuse_leaks(splits: Mapping[Split, Sequence[Example]], used: Mapping[str, Iterable[Response | Triplet]]) -> None:
    """Raise LeakageError if a row of `used` (by the name of its folder) belongs to test or validation, or if a train row says what a
    test row says, question or summary, by normalised text. Raise DataError for an id that no split has.
    """
    train = {e.id for e in splits["train"]}
    for held_out, ids in (("test", {e.id for e in splits["test"]}), ("validation", {e.id for e in splits["validation"]})):
        _refuse(sorted(train & ids), f"train rows are in the {held_out} split, too")
        for folder, rows in used.items():
            _refuse(sorted({row.example_id for row in rows} & ids), f"{folder} holds rows of the {held_out} split")
    test_texts = {text for e in splits["test"] for text in _texts(e)}
    _refuse([e.id for e in splits["train"] if test_texts & set(_texts(e))], "train rows share a question or a summary with test rows")
    for folder, rows in used.items():
        strangers = sorted({row.example_id for row in rows} - train)
        if strangers:
            raise DataError(f"{folder} holds answers to rows that this run does not have: {_few(strangers)}; begin again in another --out")


def make_triplets(recipe: Recipe, train: Sequence[Example], answers: Mapping[Source, Sequence[Response]]) -> tuple[list[Triplet], Census]:
    """The triplets of all train rows, in their order, and the census.

    Raises DataError without references to rank by, and where ROUGE-L can read none of the texts it would compare answers with.
    """
    if recipe.triplets.ranking == "reference":
        refuse_unrankable(train)
    gathered, dropped = gather(answers)
    if recipe.triplets.ranking == "consensus":
        refuse_unreadable([c.text for candidates in gathered.values() for c in candidates if c.source == "teacher"])
    census = Census(rows=sum(map(len, answers.values())), dropped=dropped, prompts=len(train))
    similarity = rouge_l()
    triplets: list[Triplet] = []
    progress = Progress("triplets", len(train), unit="prompts")
    for example in train:
        pairs = _pairs(example, gathered.get(example.id, []), recipe, similarity)
        triplets += _triplets(example, pairs, recipe)
        _count(census, pairs)
        progress.step()
    if triplets:
        census.mean_chosen_score = sum(t.chosen_score for t in triplets) / len(triplets)
        census.mean_rejected_score = sum(t.rejected_score for t in triplets) / len(triplets)
    return triplets, census


def _pairs(example: Example, candidates: Sequence[Candidate], recipe: Recipe, similarity: Similarity) -> Pairs:
    scores: list[float] | None
    if recipe.triplets.ranking == "reference":
        scores = None if example.summary is None else by_reference(candidates, example.summary, similarity)
        reason = "no reference"
    elif recipe.triplets.ranking == "consensus":
        scores, reason = by_consensus(candidates, similarity), "fewer than two usable teacher answers"
    else:
        scores, reason = by_source(candidates), ""
    if scores is None:
        lost = Counter({f"prompt without triplet: {reason}": len(candidates)})
        return Pairs(dropped=+lost, reason=reason)
    draw = int(sha256_bytes(example.id.encode())[:8], 16) / 2**32
    return pair(candidates, scores, recipe.triplets, similarity, draw=draw)


def _triplets(example: Example, pairs: Pairs, recipe: Recipe) -> list[Triplet]:
    prompt, made = zero_shot(recipe.task, example.question), []
    for c, r in pairs.pairs:
        (chosen, score), (rejected, rejected_score) = pairs.chosen[c], pairs.rejected[r]
        made.append(
            Triplet(
                example_id=example.id,
                prompt=prompt,
                chosen=chosen.text,
                rejected=rejected.text,
                chosen_source=chosen.source,
                rejected_source=rejected.source,
                chosen_score=score,
                rejected_score=rejected_score,
                chosen_weight=score,
                rejected_cut_off=rejected.cut_off,
            )
        )
    return made


def _count(census: Census, pairs: Pairs) -> None:
    census.dropped.update(pairs.dropped)
    if not pairs.chosen:
        census.prompts_dropped[pairs.reason] += 1
        return
    census.prompts_kept += 1
    census.kept += len(pairs.chosen) + len(pairs.rejected)
    census.triplets += len(pairs.pairs)
    for rejected, _ in pairs.rejected:
        census.rejected_sources[rejected.source] += 1
        census.cut_off_rejected += rejected.cut_off


def _remedy(recipe: Recipe, census: Census) -> str:
    if recipe.triplets.ranking == "first" and recipe.sample.samples == 0:
        return "triplets.ranking=first rejects the student's answers alone, and sample.samples is 0: raise it"
    if not census.dropped:
        return "the ledgers are empty: harvest again"
    largest = max(census.dropped, key=lambda reason: (reason not in INEVITABLE, census.dropped[reason]))
    return f"most went as '{largest}': {REMEDIES.get(largest, MORE_ANSWERS)}; {ANOTHER_RUN}"


def _texts(example: Example) -> list[str]:
    return [text for text in (normalise(example.question), normalise(example.summary or "")) if text]


def _refuse(ids: Sequence[str], what: str) -> None:
    if ids:
        raise LeakageError(
            f"{what} ({len(ids)}: {_few(ids)}): a score on them would mean nothing; "
            "begin again in another --out with splits that are disjoint"
        )


def _few(ids: Sequence[str]) -> str:
    return ", ".join(ids[:5]) + (", ..." if len(ids) > 5 else "")
