"""The report as data: what stands in evaluation/report.json, computed from stored predictions and the run's manifests.

recipe, dataset        their names, and the rows of each split
test_rows              rows that were scored
systems                by system: rouge1, rouge2, rougeL, bleu in [0, 1]; empty, cut_off (answers); mean_words
comparisons            distilled against every other system: metric, gain, low, high (95%), p (one-sided, gain > 0), note
shots                  ids of the train rows that the few-shot systems were shown
metrics                how each number is defined
stages                 by stage so far: seconds, counts
notes                  what a reader must know before believing a number
versions               of everything that can change a number
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from evaluator.baselines import subject
from evaluator.scores import Scored, compare
from evaluator.systems import DISTILLED, TRIVIAL
from shared.artifacts import Run, versions
from shared.contracts import Example, Manifest, Split
from shared.errors import DataError

FEW_ROWS = 30

METRICS = {
    "rouge1": "ROUGE-1 F1, rouge_score, stemmed; mean over rows",
    "rouge2": "ROUGE-2 F1, rouge_score, stemmed; mean over rows",
    "rougeL": "ROUGE-L F1, rouge_score, stemmed; mean over rows",
    "bleu": "corpus BLEU-4, nltk corpus_bleu, SmoothingFunction method1 (epsilon 0.1), lower-cased, words and signs by regular expression",
    "empty": "answers without text (refused prompts among them); each scores 0",
    "cut_off": "answers that ended at the token limit",
    "mean_words": "words an answer, split at white space",
    "interval": "95%, paired bootstrap over test rows, percentile",
    "p": "one-sided, (1 + resampled gains <= 0) / (1 + resamples), paired bootstrap over test rows",
}


def build(run: Run, rows: Mapping[Split, Sequence[Example]], shots: Sequence[Example], scored: Mapping[str, Scored]) -> dict[str, Any]:
    """The report's values, ready for JSON. `rows`: the examples of each split; `scored`: every system, in the order to show."""
    recipe = run.recipe
    settings = {"resamples": recipe.evaluate.resamples, "seed": recipe.evaluate.seed}
    comparisons: dict[str, dict[str, Any]] = {}
    for name, other in scored.items():
        if name != DISTILLED:
            found = compare(scored[DISTILLED], other, recipe.promote.metric, **settings)
            comparisons[name] = {"metric": recipe.promote.metric, **_rounded(found.model_dump(exclude={"margin", "rows"}))}
    return {
        "recipe": recipe.name,
        "teacher": recipe.teacher.identity,
        "student": recipe.student.model,
        "dataset": {"name": recipe.dataset.name, **{split: len(examples) for split, examples in rows.items()}},
        "test_rows": len(scored[DISTILLED].ids),
        "systems": {name: found.summary() for name, found in scored.items()},
        "comparisons": comparisons,
        "bootstrap": settings,
        "shots": [shot.id for shot in shots],
        "metrics": METRICS,
        "stages": _stages(run),
        "notes": _notes(run, rows["test"], scored),
        "versions": versions(),
    }


def _notes(run: Run, test: Sequence[Example], scored: Mapping[str, Scored]) -> list[str]:
    ours, metric = scored[DISTILLED], run.recipe.promote.metric
    notes = ["Intervals speak of the choice of test rows, not of the luck of one training seed; no p is corrected for their number."]
    if len(ours.ids) < FEW_ROWS:
        notes.append(f"Only {len(ours.ids)} test rows: intervals and p values of so few rows are too hopeful.")
    with_subject = sum(subject(e.question) is not None for e in test)
    notes.append(f"subject-template: {with_subject} of {len(test)} messages have a SUBJECT line; the others give their first sentence.")
    if unscored := len(test) - len(ours.ids):
        notes.append(f"{unscored} test rows have no reference and were answered but not scored.")
    if beaten := [name for name in TRIVIAL if scored[name].value(metric) >= ours.value(metric)]:
        notes.append(f"The distilled student does not beat {', '.join(beaten)} in {metric}: that needs no model at all.")
    if run.recipe.student.model.startswith("random:"):
        notes.append("The student began from random weights: this run shows that the parts fit together, and nothing about learning.")
    notes += [f"{name}: {found.empty} of {len(found.ids)} answers are empty and score 0." for name, found in scored.items() if found.empty]
    return notes


def _stages(run: Run) -> dict[str, dict[str, Any]]:
    """Seconds and counts of every finished stage but this one, in the order in which they began."""
    found = []
    for file in sorted({*run.path.glob("*/manifest.json"), *run.path.glob("*/*/manifest.json")}):
        try:
            manifest = Manifest.model_validate_json(file.read_bytes())
        except (OSError, ValidationError) as exc:
            raise DataError(f"{file} is no manifest of a stage: {exc}; delete it and run that stage again") from exc
        if manifest.stage != "evaluation":
            found.append(manifest)
    return {m.stage: {"seconds": m.seconds, "counts": m.counts} for m in sorted(found, key=lambda m: m.started_at)}


def _rounded(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: round(value, 6) if isinstance(value, float) else value for name, value in values.items()}
