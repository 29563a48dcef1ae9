"""The stage `evaluation`: answers of every system, predictions, and from these alone the scores and the report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from evaluator.answers import (
    Collected,
    Elsewhere,
    file_predictions,
    fingerprints,
    is_servable,
    student_predictions,
    teacher_predictions,
    url_predictions,
)
from evaluator.judge import Judged, ask_judge, judged, opponents
from evaluator.metrics import bertscore
from evaluator.metrics.table import METRICS
from evaluator.report.build import build
from evaluator.report.markdown import markdown
from evaluator.report.page import TestAnswers, page
from evaluator.report.table import table
from evaluator.scores import Scored, score
from evaluator.systems import (
    ALWAYS,
    DISTILLED,
    Evaluated,
    in_order,
    refuse_taken_names,
    refuse_unknown_baseline,
    round_name,
    simple_systems,
)
from shared.artifacts import Run, Stage, read_json, read_jsonl, sha256_file, write_atomic, write_json, write_jsonl
from shared.collect import OfflineModel
from shared.contracts import Example, Prediction, Split
from shared.datasets.overlap import Overlap, overlaps, refuse_overlaps
from shared.datasets.stage import prepare, shots
from shared.errors import DataError, StageOrder, TeacherUnavailable
from shared.harvest.teacher import Teacher
from shared.settings import JudgeSettings, SystemSettings, evaluation_settings

Rows = Mapping[Split, Sequence[Example]]
REPORTS = ("report.json", "report.html", "report.md")
KEPT = ("predictions.jsonl", "systems.json")
"""All that scores are computed from, beside the data set."""
BERTSCORE = "bertscore.jsonl"


def evaluate(
    stage: Stage,
    *,
    open_teacher: Callable[[], Teacher],
    load_base: Callable[[], OfflineModel],
    load: Callable[[Path], OfflineModel],
    open_system: Callable[[SystemSettings], Teacher],
    open_judge: Callable[[JudgeSettings], Teacher],
    elsewhere: Elsewhere | None = None,
) -> None:
    """Let every system answer the test split, then score. What a ledger holds is not asked again, nor a model loaded for it.

    load: of a serving folder. elsewhere: answers instead of loaded models. open_system: one of evaluate.systems with a URL. open_judge:
    evaluate.judge. Raises TeacherError, HarvestTooThin, EngineError, DataError, LeakageError, SettingsError, StorageError.
    """
    run = stage.run
    rows, read = prepare(run), fingerprints(stage.run.recipe)
    refuse_taken_names(run.recipe)
    _overlaps(run, rows)
    test, given = rows["test"], shots(run, rows["train"], run.recipe.task.shots)
    found = Collected()
    # files first, then the teacher: what cannot work is known before minutes are spent on the students
    extra = run.recipe.evaluate.systems
    for more in extra:
        if more.predictions is not None:
            found.add(file_predictions(test, more))
    names, settings = _names(run, found), run.recipe.evaluate
    wanted = [run.recipe.promote.baseline, *(settings.judge.against if settings.judge else ())]
    for name in wanted:
        if name in found.not_scored:
            raise DataError(f"{name} is to be compared with and cannot be scored: {found.not_scored[name]}")
    refuse_unknown_baseline(run.recipe, names)
    if settings.judge is not None:
        opponents(run.recipe, settings.judge, names)
    if settings.bertscore is not None:
        bertscore.check(settings.bertscore.model)
    found.add(teacher_predictions(run, test, given, open_teacher=open_teacher))
    for more in extra:
        if more.url is not None:
            found.add(url_predictions(run, test, given, more, open_system=partial(open_system, more)))
    found.add(student_predictions(run, test, given, load_base=load_base, load=load, elsewhere=elsewhere))
    for name in wanted:
        if name in found.not_scored:
            raise TeacherUnavailable(f"{name} is to be compared with: {found.not_scored[name]}")
    systems, predictions = simple_systems(run.recipe, rows["train"], test)
    found.add(Collected(systems, predictions))
    ordered = in_order(found.systems, run)
    place = {system.name: at for at, system in enumerate(ordered)}
    predictions = sorted(found.predictions, key=lambda p: place[p.system])  # stable: rows keep their order
    write_jsonl(stage.path / "predictions.jsonl", predictions)
    evaluated = Evaluated(systems=tuple(ordered), not_scored=found.not_scored)
    write_json(stage.path / "systems.json", evaluated.model_dump(mode="json"))
    answered = dict(found.census)
    if settings.judge is not None:
        examples, texts = _texts(predictions, test)
        answered |= ask_judge(run, settings.judge, examples, texts, open_judge=partial(open_judge, settings.judge))
    if settings.bertscore is not None:
        references = {e.id: e.summary for e in test if e.summary is not None}
        answered["bertscore"] = bertscore.write_scores(stage.path / BERTSCORE, settings.bertscore, predictions, references)
    _report(stage, rows, answered=answered, read=read)


def _texts(predictions: Sequence[Prediction], test: Sequence[Example]) -> tuple[list[Example], dict[str, list[str]]]:
    """The test rows that have a reference, and every system's answers to them in their order."""
    examples = [e for e in test if e.summary is not None]
    said = {(p.system, p.example_id): p.text for p in predictions}
    names = dict.fromkeys(p.system for p in predictions)
    return examples, {name: [said[name, e.id] for e in examples] for name in names}


def is_complete(stage: Stage) -> bool:
    """Whether the evaluation was finished on what stands there now, with the settings of now."""
    manifest, recipe = stage.run.manifest(stage.name), stage.run.recipe
    if not stage.complete or manifest is None or dict(manifest.settings) != evaluation_settings(recipe):
        return False
    return bool(manifest.counts.get("given") == fingerprints(recipe))


def score_again(stage: Stage) -> None:
    """Scores and reports from the stored predictions, by the resampling and the rule of now.

    Raises StageOrder if there are none of the present model, data set and settings of what is asked, or if they are not as they were.
    """
    run, manifest = stage.run, stage.run.manifest("evaluation")
    again = "run `distill evaluate` first, without --score-only"
    if manifest is None or manifest.inputs != stage.inputs:
        raise StageOrder(f"{stage.path} has no predictions of the present model: {again}")
    asked, now = _asking(manifest.settings), _asking(evaluation_settings(run.recipe))
    if other := [name for name in now if asked.get(name) != now[name]]:
        raise StageOrder(f"{stage.path}: its predictions were made with other settings ({', '.join(other)}): {again}")
    for output in manifest.outputs:
        file = run.path / output.path
        if file.name not in REPORTS and (not file.is_file() or sha256_file(file) != output.sha256):
            raise StageOrder(f"{file} is not what the evaluation wrote: {again}")
    # what files and other runs hold now was not answered by: as before, an evaluation of them is out of date
    _report(stage, prepare(run), answered=manifest.counts.get("answers", {}), read=manifest.counts.get("given", {}))


def _asking(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Of an evaluation's settings those that shape what is asked, by name."""
    evaluation = settings.get("evaluate", {})
    shaping = ("max_tokens", "stop", "systems", "judge", "bertscore")
    return {"task": settings.get("task"), **{f"evaluate.{name}": evaluation.get(name) for name in shaping}}


def evaluated_systems(run: Run) -> Evaluated:
    """Who was evaluated. Raises DataError for a file that does not say."""
    file = run.path / "evaluation" / "systems.json"
    try:
        return Evaluated.model_validate(read_json(file))
    except ValidationError as exc:
        raise DataError(f"{file}: {exc.errors()[0]['loc']}: {exc.errors()[0]['msg']}; run `distill evaluate` again") from exc


def scores_of(run: Run, test: Sequence[Example]) -> dict[str, Scored]:
    """Every system's scores, computed from evaluation/predictions.jsonl. Raises DataError if a system is missing there."""
    file, names = run.path / "evaluation" / "predictions.jsonl", [system.name for system in evaluated_systems(run).systems]
    metrics, wanted = METRICS, run.recipe.evaluate.bertscore
    if wanted is not None:
        metrics = {**METRICS, "bertscore": bertscore.stored_metric(file.with_name(BERTSCORE), wanted)}
    scored = score(read_jsonl(file, Prediction), test, metrics)
    if missing := [name for name in [*names, DISTILLED] if name not in scored]:
        raise DataError(f"{file} has no predictions of {', '.join(missing)}; run `distill evaluate` again")
    return {name: scored[name] for name in names}


def _names(run: Run, found: Collected) -> list[str]:
    """The systems that will be scored, before any was asked."""
    rounds = [round_name(number) for number in range(run.recipe.train.rounds - 1) if is_servable(run, number)]
    return [*ALWAYS, *rounds, *(system.name for system in run.recipe.evaluate.systems if system.name not in found.not_scored)]


def _overlaps(run: Run, rows: Rows) -> list[Overlap]:
    """Test rows that this run, or another one whose student is evaluated, has learned from. Raises LeakageError."""
    found = overlaps(rows)
    for given in run.recipe.evaluate.systems:
        if given.run is not None:
            seen: dict[Split, list[Example]] = {}
            for split in ("train", "validation"):
                file = given.run / "dataset" / f"{split}.jsonl"
                if not file.is_file():
                    raise DataError(
                        f"evaluate.systems: {given.name}: {file} is not there, so nobody can tell whether its student has seen the test "
                        "rows; put it back, or score its answers as a file of predictions"
                    )
                seen[split] = read_jsonl(file, Example)
            theirs = overlaps({**seen, "test": rows["test"]})
            known = {overlap.test_id for overlap in found}
            found += [o.model_copy(update={"other_id": f"{given.name}: {o.other_id}"}) for o in theirs if o.test_id not in known]
    refuse_overlaps(found, run.recipe.evaluate.allow_overlap)
    return found


def _report(stage: Stage, rows: Rows, *, answered: Mapping[str, Any], read: Mapping[str, str]) -> None:
    """Write the reports, finish the stage, print the table. `answered`: the census of answers by system; `read`: the `fingerprints` of
    what was read before the answers.
    """
    run, evaluated = stage.run, evaluated_systems(stage.run)
    found = _overlaps(run, rows)
    scored = scores_of(run, rows["test"])
    refuse_unknown_baseline(run.recipe, list(scored))
    settings, judged_by = run.recipe.evaluate, Judged(None, [])
    if settings.judge is not None:
        judged_by = judged(run, settings.judge, *_texts(read_jsonl(stage.path / "predictions.jsonl", Prediction), rows["test"]))
    report = build(run, rows, evaluated, scored, overlaps=found, judge=judged_by.judge, more_notes=judged_by.notes)
    examples = {e.id: e for e in rows["test"]}
    answers = [
        TestAnswers(
            id=i,
            question=examples[i].question,
            reference=examples[i].summary or "",
            texts={name: of_system.texts[at] for name, of_system in scored.items()},
        )
        for at, i in enumerate(scored[DISTILLED].ids)
    ]
    write_json(stage.path / "report.json", report.model_dump(mode="json"))
    write_atomic(stage.path / "report.html", page(report, answers))
    write_atomic(stage.path / "report.md", markdown(report))
    kept = [*KEPT, BERTSCORE] if settings.bertscore is not None else [*KEPT]
    stage.finish(
        [*(stage.path / name for name in (*kept, *REPORTS)), stage.path / "answers"],
        settings=evaluation_settings(run.recipe),
        counts={"test_rows": report.test_rows, "answers": dict(answered), "given": dict(read)},
    )
    print(table(report))
    print(f"report: {stage.path / 'report.html'}")
