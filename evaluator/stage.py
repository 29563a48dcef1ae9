"""The stage `evaluation`: answers of every system, predictions, and from these alone the scores and the report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from evaluator.answers import student_predictions, teacher_predictions
from evaluator.report.build import build
from evaluator.report.page import page
from evaluator.report.table import table
from evaluator.scores import Scored, score
from evaluator.systems import SYSTEMS, trivial_predictions
from shared.artifacts import Run, Stage, read_jsonl, write_atomic, write_json, write_jsonl
from shared.collect import OfflineModel
from shared.contracts import Example, Prediction, Split
from shared.datasets.stage import prepare, shots
from shared.errors import DataError, StageOrder
from shared.harvest.teacher import Teacher

Rows = Mapping[Split, Sequence[Example]]


def evaluate(
    stage: Stage,
    *,
    open_teacher: Callable[[], Teacher],
    load_base: Callable[[], OfflineModel],
    load_distilled: Callable[[], OfflineModel],
) -> None:
    """Let every system answer the test split, then score. What a ledger holds is not asked again, nor a model loaded for it.

    Raises TeacherError, HarvestTooThin, EngineError, DataError, StorageError.
    """
    run = stage.run
    rows = prepare(run)
    test, given = rows["test"], shots(run, rows["train"], run.recipe.task.shots)
    # the teacher first: if it does not answer, that is known before minutes are spent on the students
    of_teacher, asked = teacher_predictions(run, test, given, open_teacher=open_teacher)
    of_students, answered = student_predictions(run, test, given, load_base=load_base, load_distilled=load_distilled)
    predictions = [*of_teacher, *of_students, *trivial_predictions(run.recipe, rows["train"], test)]
    predictions.sort(key=lambda p: SYSTEMS.index(p.system))  # stable: the rows of a system keep their order
    write_jsonl(stage.path / "predictions.jsonl", predictions)
    _report(stage, rows, given, answered={**asked, **answered})


def score_again(stage: Stage) -> None:
    """Scores and reports from the stored predictions. Raises StageOrder if there are none of the present model and data set."""
    run, manifest = stage.run, stage.run.manifest("evaluation")
    inputs = [ref for name in ("dataset", "model") if (made := run.manifest(name)) for ref in made.outputs]
    if manifest is None or list(manifest.inputs) != inputs:
        raise StageOrder(f"{stage.path} has no predictions of the present model: run `distill evaluate` first, without --score-only")
    rows = prepare(run)
    _report(stage, rows, shots(run, rows["train"], run.recipe.task.shots), answered=manifest.counts.get("answers", {}))


def scores_of(run: Run, test: Sequence[Example]) -> dict[str, Scored]:
    """Every system's scores, computed from evaluation/predictions.jsonl. Raises DataError if a system is missing there."""
    file = run.path / "evaluation" / "predictions.jsonl"
    scored = score(read_jsonl(file, Prediction), test)
    if missing := [name for name in SYSTEMS if name not in scored]:
        raise DataError(f"{file} has no predictions of {', '.join(missing)}; run `distill evaluate` again")
    return {name: scored[name] for name in SYSTEMS}


def _report(stage: Stage, rows: Rows, given: Sequence[Example], *, answered: Mapping[str, Any]) -> None:
    """Write report.json and report.html, finish the stage, print the table. `answered`: the census of answers by system."""
    run, recipe = stage.run, stage.run.recipe
    scored = scores_of(run, rows["test"])
    report = build(run, rows, given, scored)
    write_json(stage.path / "report.json", report)
    write_atomic(stage.path / "report.html", page(report, rows["test"], scored))
    stage.finish(
        [*(stage.path / name for name in ("predictions.jsonl", "report.json", "report.html")), stage.path / "answers"],
        settings={name: getattr(recipe, name).model_dump(mode="json") for name in ("task", "evaluate", "promote")},
        counts={"test_rows": report["test_rows"], "answers": dict(answered)},
    )
    print(table(report))
    print(f"report: {stage.path / 'report.html'}")
