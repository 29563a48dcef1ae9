"""What stands in evaluation/report.json, field by field: `Report`. Scores are shares in [0, 1] unless a metric's definition says else."""

from __future__ import annotations

from typing import Any, Literal

from evaluator.significance import Comparison
from shared.contracts import Contract, FileRef
from shared.datasets.overlap import Overlap

Group = Literal["distilled", "student", "teacher", "extra", "trivial", "reference"]
"""distilled: this run's student, after each of its rounds. student: as it was before training. extra: given by evaluate.systems.
trivial: knows nothing. reference: the references themselves, the ceiling."""


class Definition(Contract):
    """How a metric is computed."""

    label: str
    """As people write it: ROUGE-L."""
    definition: str
    better: Literal["higher", "lower", "neither"]
    points: bool
    """Whether it is shown times 100."""


class Score(Contract):
    """A system's score on the test rows with its 95% bootstrap interval; no interval where resampling rows shows no spread."""

    value: float
    low: float | None = None
    high: float | None = None


class SystemReport(Contract):
    """One system on the scored test rows."""

    group: Group
    about: str
    """What it is, in one phrase."""
    scores: dict[str, Score]
    """By metric; all systems have the same."""
    mean_words: float
    """Words an answer, split at white space."""
    empty: int
    """Answers without text (refused prompts among them); each scores 0."""
    cut_off: int
    """Answers that ended at the token limit."""


class TrainingRound(Contract):
    """What training logged in one round."""

    round: int
    steps: list[dict[str, float]]
    """step, loss, nll and what else was logged (odds_ratio, accuracy, margin, logp_chosen, logp_rejected, ...); at most 400, evenly
    thinned."""
    validation: list[dict[str, float]]
    """step, rougeL (of greedy answers to validation rows, in [0, 1])."""


class Part(Contract):
    """The test rows of one length or question type."""

    label: str
    rows: int
    scores: dict[str, float]
    """Mean of the gate's metric by system; of ROUGE-L where that metric has no score of single rows."""


class ScoredRow(Contract):
    """One test row."""

    id: str
    words: int
    """Of the question."""
    type: str
    """See evaluator/report/parts.py."""
    scores: dict[str, float]
    """By system, as in `Part`."""


class Overlapping(Overlap):
    """A test row that shares text with a row of another split."""

    allowed: bool
    """By evaluate.allow_overlap; others end the evaluation."""


class JudgeVerdict(Contract):
    """A language model's choice between the distilled student and one other system, each pair shown in both orders."""

    theirs: str
    wins: int
    """Rows in which both orders chose the distilled student."""
    losses: int
    ties: int
    """Both orders said tie, or they contradicted each other."""
    contradictions: int
    """Of the ties: those where each order chose what stood first, or each what stood second."""
    unreadable: int
    """Rows with an answer that is no verdict, left out of all of the above."""
    win_rate: float | None
    """(wins + ties / 2) / rows judged; None without any."""
    low: float | None
    high: float | None
    """95% interval, bootstrap over rows."""


class Judge(Contract):
    """Who judged, and what came of it."""

    model: str
    asked: str
    """The judge's URL."""
    verdicts: list[JudgeVerdict]


class Gate(Contract):
    """Whether this student may replace what is served, and why."""

    rule: dict[str, Any]
    """The recipe's promote section."""
    passed: bool
    reasons: list[str]
    """Each condition in numbers; of those that failed, why."""


class Report(Contract):
    """One evaluation. Read it with `Report.model_validate_json`."""

    format: Literal[2] = 2
    recipe: str
    teacher: str
    student: str
    dataset: dict[str, Any]
    """Its name, and the rows of each split."""
    metric: str
    """The gate's: that of `pairs`, and what the page shows first."""
    baseline: str
    """The gate's."""
    test_rows: int
    """Scored rows."""
    systems: dict[str, SystemReport]
    """In the order to show."""
    not_scored: dict[str, str]
    """Systems of the recipe that could not be scored, and why."""
    comparisons: list[Comparison]
    """The distilled student against every other system but the reference, in every metric; p_holm within a metric."""
    pairs: list[Comparison]
    """Any two systems but the reference, in the gate's metric; p_holm over all of them."""
    resamples: int
    seed: int
    """Of the resampling."""
    shots: list[str]
    """Ids of the train rows that the few-shot systems were shown."""
    metrics: dict[str, Definition]
    training: list[TrainingRound]
    by_length: list[Part]
    by_type: list[Part]
    rows: list[ScoredRow]
    overlaps: list[Overlapping]
    judge: Judge | None
    gate: Gate
    stages: dict[str, dict[str, Any]]
    """By stage before this one: seconds, counts (the census of triplets and of the harvest among them)."""
    inputs: list[FileRef]
    """The files of the data set and the model that were evaluated, with their hashes."""
    settings: dict[str, Any]
    """The whole recipe, without its secrets."""
    versions: dict[str, str]
    notes: list[str]
    """What a reader must know before believing a number."""
