"""`distill promote`: make the distilled student the served one, if it is provably better than the recipe's baseline."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from shared.commands import open_run, stage_parser
from shared.errors import DataError, PromotionRefused, SettingsError, StageOrder

if TYPE_CHECKING:
    from evaluator.significance import Comparison
    from shared.artifacts import Run
    from shared.registry import Promoted
    from shared.settings import PromoteSettings


def main(argv: list[str]) -> int:
    parser = stage_parser("promote", "Make the distilled student the served one, if it is provably better than the recipe's baseline.")
    parser.add_argument("--registry", type=Path, metavar="DIR", help="where promoted students are kept (default: registry/ in the run)")
    arguments = parser.parse_args(argv)
    run = open_run(arguments)
    promote(run, arguments.registry or run.path / "registry")
    return 0


def promote(run: Run, registry: Path) -> Promoted:
    """Promote the run's model, or record in the registry why not.

    Raises PromotionRefused with the numbers, StageOrder if this model has not been evaluated, DataError if a file is not the one
    that was evaluated, SettingsError for an unknown baseline, StorageError. Unless it returns, what is served stays served.
    """
    from evaluator.card import with_scores
    from evaluator.scores import METRICS, compare
    from evaluator.stage import scores_of
    from evaluator.systems import DISTILLED, SYSTEMS
    from shared import registry as store
    from shared.datasets.stage import prepare

    rule, bootstrap = run.recipe.promote, run.recipe.evaluate
    if rule.baseline not in SYSTEMS or rule.baseline == DISTILLED:
        others = ", ".join(name for name in SYSTEMS if name != DISTILLED)
        raise SettingsError(f"promote.baseline: {rule.baseline!r} is no system to compare with; choose one of {others}")
    if not run.stage("evaluation", ["dataset", "model"]).complete:
        raise StageOrder(f"{run.path} has no evaluation of its present model: run `distill evaluate` first")
    _check_unchanged(run, "evaluation", "evaluation/predictions.jsonl")
    _check_unchanged(run, "model", "model/serving/")
    scored = scores_of(run, prepare(run)["test"])
    comparison = compare(
        scored[DISTILLED], scored[rule.baseline], rule.metric, margin=rule.margin, resamples=bootstrap.resamples, seed=bootstrap.seed
    )
    scores = {metric: scored[DISTILLED].value(metric) for metric in METRICS}
    origin = str(run.path.resolve())
    if reason := refusal(comparison, rule):
        store.record_refusal(registry, reason=reason, run=origin, scores=scores)
        raise PromotionRefused(f"not promoted: {reason}; what was served stays served")
    before = store.current(registry)
    verdict, dataset = in_numbers(comparison, rule), run.recipe.dataset
    card = with_scores(_card(run), scored, name=run.recipe.name, dataset=dataset.hub or dataset.name, verdict=verdict)
    promoted = store.promote(
        registry,
        run.path / "model" / "serving",
        name=run.recipe.name,
        task=run.recipe.task.model_dump(mode="json"),
        scores=scores,
        run=origin,
        reason=verdict,
        attachments=[("README.md", card), *sorted((run.path / "evaluation").glob("report.*"))],
    )
    if promoted == before:
        print(f"promote: version {promoted.version} is served already, nothing to do")
    else:
        print(f"promoted: version {promoted.version}, {verdict}")
    return promoted


def _card(run: Run) -> str:
    """The model card as it was exported, or as somebody has improved it; empty if it has gone."""
    file = run.path / "model" / "README.md"
    try:
        return file.read_text(encoding="utf-8") if file.is_file() else ""
    except UnicodeDecodeError as exc:
        raise DataError(f"{file}: not UTF-8: {exc.reason}; save it as UTF-8") from exc


def refusal(comparison: Comparison, rule: PromoteSettings) -> str | None:
    """Why a comparison is not enough under a rule, in numbers; None if it is."""
    if comparison.p is None:
        return f"{in_numbers(comparison, rule)}: {comparison.note}"
    if comparison.gain <= rule.margin:
        return f"{in_numbers(comparison, rule)}: the gain is not above {_points(rule.margin)}"
    if comparison.p >= rule.alpha:
        return f"{in_numbers(comparison, rule)}: p is not below {rule.alpha:g}, so the gain may be chance"
    return None


def in_numbers(comparison: Comparison, rule: PromoteSettings) -> str:
    """A comparison in one phrase, in points of 100."""
    doubt = (
        "no interval"
        if comparison.low is None or comparison.high is None or comparison.p is None
        else f"95% interval {100 * comparison.low:+.1f} to {100 * comparison.high:+.1f}, p = {comparison.p:.4f}"
    )
    above = f" above a margin of {_points(rule.margin)}" if rule.margin else ""
    return f"{rule.metric} {100 * comparison.gain:+.1f} points over {rule.baseline} on {comparison.rows} test rows ({doubt}{above})"


def _points(value: float) -> str:
    return f"{100 * value:g} points"


def _check_unchanged(run: Run, stage: str, prefix: str) -> None:
    """Raises DataError if files of a stage are not those its manifest names: only what was evaluated is promoted."""
    from shared.artifacts import sha256_file

    manifest = run.manifest(stage)
    for file in manifest.outputs if manifest else ():
        if file.path.startswith(prefix) and sha256_file(run.path / file.path) != file.sha256:
            raise DataError(f"{run.path / file.path} has changed since the stage {stage} wrote it; remove {stage}/ and run it again")
