"""The report as data (evaluator/report/contract.py), computed from stored predictions and the run's files; no model is needed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from evaluator.baselines import subject
from evaluator.gate import decide
from evaluator.metrics.metric import Metric
from evaluator.metrics.table import METRICS
from evaluator.report.contract import Definition, Gate, Judge, Overlapping, Report, Score, SystemReport, TrainingRound
from evaluator.report.parts import by_length, by_type, row_metric, scored_rows
from evaluator.scores import DESCRIPTIVE, Compared, Scored, compare_all
from evaluator.systems import DISTILLED, REFERENCE, TRIVIAL, Evaluated, System
from shared.artifacts import Run, read_json, versions
from shared.contracts import Example, Manifest, Split
from shared.datasets.overlap import Overlap, too_short
from shared.errors import DataError

FEW_ROWS = 30
MOST_STEPS = 400


def build(
    run: Run,
    rows: Mapping[Split, Sequence[Example]],
    evaluated: Evaluated,
    scored: Mapping[str, Scored],
    *,
    overlaps: Sequence[Overlap] = (),
    judge: Judge | None = None,
    more_notes: Sequence[str] = (),
) -> Report:
    """rows: the examples of each split; scored: every system of `evaluated`, in its order; overlaps: what the guard found, all allowed."""
    recipe = run.recipe
    rule, settings = recipe.promote, {"resamples": recipe.evaluate.resamples, "seed": recipe.evaluate.seed}
    examples = {e.id: e for e in rows["test"]}
    compared = compare_all(scored, DISTILLED, rule.metric, alone=[REFERENCE], **settings)
    decision = decide(scored, recipe)
    by_row = scored_rows(scored, examples, rule.metric)
    return Report(
        recipe=recipe.name,
        teacher=recipe.teacher.identity,
        student=recipe.student.model,
        dataset={"name": recipe.dataset.hub or recipe.dataset.name, **{split: len(found) for split, found in rows.items()}},
        metric=rule.metric,
        baseline=rule.baseline,
        test_rows=len(scored[DISTILLED].ids),
        systems={system.name: _system(system, scored[system.name], compared) for system in evaluated.systems},
        not_scored=evaluated.not_scored,
        comparisons=[found.model_copy(update=_rounded(found)) for found in compared.first],
        pairs=[found.model_copy(update=_rounded(found)) for found in compared.pairs],
        **settings,
        shots=list(next((system.shots for system in evaluated.systems if system.shots), ())),
        metrics=definitions(scored[DISTILLED].metrics),
        training=_training(run),
        by_length=by_length(by_row),
        by_type=by_type(by_row),
        rows=by_row,
        overlaps=[Overlapping(**overlap.model_dump(), allowed=True) for overlap in overlaps],
        judge=judge,
        gate=Gate(rule=rule.model_dump(mode="json"), passed=decision.passed, reasons=[*decision.failed, *decision.met]),
        stages=_stages(run),
        inputs=[ref for name in ("dataset", "model") if (made := run.manifest(name)) for ref in made.outputs],
        settings=recipe.model_dump(mode="json"),
        versions=versions(),
        notes=[*_notes(run, rows["test"], evaluated, scored, overlaps), *more_notes],
    )


def definitions(metrics: Mapping[str, Metric] = METRICS) -> dict[str, Definition]:
    """How every metric of a report is computed."""
    found = {m.name: Definition(label=m.label, definition=m.definition, better=m.better, points=m.points) for m in metrics.values()}
    for name, definition in DESCRIPTIVE.items():
        found[name] = Definition(label=name.replace("distinct", "distinct-"), definition=definition, better="neither", points=True)
    return found


def _system(system: System, found: Scored, compared: Compared) -> SystemReport:
    scores = {}
    for metric, value in found.values().items():
        ends = compared.intervals[system.name].get(metric)
        scores[metric] = Score(value=value, low=round(ends[0], 6), high=round(ends[1], 6)) if ends else Score(value=value)
    return SystemReport(
        group=system.group,
        about=system.about,
        scores=scores,
        mean_words=round(found.mean_words, 2),
        empty=found.empty,
        cut_off=found.cut_off,
    )


def _notes(run: Run, test: Sequence[Example], evaluated: Evaluated, scored: Mapping[str, Scored], overlaps: Sequence[Overlap]) -> list[str]:
    ours, metric, rule = scored[DISTILLED], run.recipe.promote.metric, run.recipe.promote
    notes = [
        "Intervals and p values speak of the choice of test rows, not of the luck of one training seed.",
        "p_holm is corrected for the other systems compared with in the same metric, not for the number of metrics; the gate looks at one "
        f"comparison alone ({rule.metric} over {rule.baseline}), so nothing is corrected there.",
    ]
    if 1 < len(ours.ids) < FEW_ROWS:
        notes.append(f"Only {len(ours.ids)} test rows: intervals of so few are too narrow, and what is rare may not be among them.")
    began = read_json(run.path / "run.json").get("recipe", {}).get("promote")
    if began != rule.model_dump(mode="json"):
        notes.append("The rule of promotion is not the one that the run began with (run.json): it may have been chosen by the outcome.")
    if (read := scored[REFERENCE].value("rouge1")) < 0.999:
        notes.append(
            f"ROUGE reads the letters a-z and digits alone: the references themselves reach {100 * read:.1f} of 100 points in ROUGE-1, so "
            "that it says little here; chrF reads all letters (promote.metric=chrf)."
        )
    if short := too_short(test):
        notes.append(f"{short} of {len(test)} test questions have fewer than 8 words: near copies of them are not looked for.")
    if row_metric(metric) != metric:
        notes.append(f"{metric} is a corpus score: single rows, lengths and question types are scored by {row_metric(metric)}.")
    with_subject = sum(subject(e.question) is not None for e in test)
    notes.append(f"subject-template: {with_subject} of {len(test)} messages have a SUBJECT line; the others give their first sentence.")
    if unscored := len(test) - len(ours.ids):
        notes.append(f"{unscored} test rows have no reference and were answered but not scored.")
    if beaten := [name for name in TRIVIAL if scored[name].value(metric) >= ours.value(metric)]:
        notes.append(f"The distilled student does not beat {', '.join(beaten)} in {metric}: that needs no model at all.")
    if run.recipe.student.model.startswith("random:"):
        notes.append("The student began from random weights: this run shows that the parts fit together, and nothing about learning.")
    if overlaps:
        notes.append(
            f"{len(overlaps)} test rows share text with rows that were learned from, and were allowed to by evaluate.allow_overlap."
        )
    for name, found in scored.items():
        if found.empty:
            failed = f", {len(found.failed)} of them because it failed to answer" if found.failed else ""
            notes.append(f"{name}: {found.empty} of {len(found.ids)} answers are empty and score 0{failed}.")
    unknown = [s.name for s in evaluated.systems if s.group == "extra" and s.decoding is None]
    if unknown:
        notes.append(f"Whether answers of {', '.join(unknown)} were cut off is not known; they count as not cut off.")
    notes += [f"{name} is not scored: {why}." for name, why in evaluated.not_scored.items()]
    return notes


def _training(run: Run) -> list[TrainingRound]:
    """What each round has logged."""
    return [
        TrainingRound(round=number, steps=_thinned(_lines(folder / "log.jsonl")), validation=_validations(folder))
        for number in range(run.recipe.train.rounds)
        if (folder := run.path / f"checkpoints/r{number}").is_dir()
    ]


def _validations(folder: Path) -> list[dict[str, float]]:
    return [{"step": row["step"], "rougeL": row["rouge_l"]} for row in _lines(folder / "validation.jsonl") if "rouge_l" in row]


def _lines(file: Path) -> list[dict[str, float]]:
    """The numbers of each line of a log; nothing where there is none. Raises DataError."""
    try:
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []
        return [{name: value for name, value in row.items() if isinstance(value, int | float)} for row in rows]
    except (OSError, ValueError, AttributeError) as exc:
        raise DataError(f"{file}: not a readable training log: {exc}; move it away to report without it") from exc


def _thinned(steps: list[dict[str, float]]) -> list[dict[str, float]]:
    """At most MOST_STEPS of them, evenly, the last among them."""
    every = -(-len(steps) // MOST_STEPS) if steps else 1
    return steps[(len(steps) - 1) % every :: every]


def _stages(run: Run) -> dict[str, dict[str, Any]]:
    """Seconds and counts of every finished stage but this one, in the order in which they began."""
    found = []
    for file in sorted({*run.path.glob("*/manifest.json"), *run.path.glob("*/*/manifest.json")}):
        try:
            manifest = Manifest.model_validate(read_json(file))
        except ValidationError as exc:
            raise DataError(f"{file} is no manifest of a stage: {exc}; delete it and run that stage again") from exc
        if manifest.stage != "evaluation":
            found.append(manifest)
    return {m.stage: {"seconds": m.seconds, "counts": m.counts} for m in sorted(found, key=lambda m: m.started_at)}


def _rounded(found: Any) -> dict[str, Any]:
    return {name: round(value, 6) for name, value in found.model_dump().items() if isinstance(value, float)}
