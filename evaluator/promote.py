"""`distill promote`: make the distilled student the served one, if it is provably better than the recipe's baseline."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from shared.commands import open_run, stage_parser
from shared.errors import DataError, PromotionRefused, SettingsError, StageOrder, StorageError

if TYPE_CHECKING:
    from shared.artifacts import Run
    from shared.registry import Promoted


def main(argv: list[str]) -> int:
    parser = stage_parser("promote", "Make the distilled student the served one, if it is provably better than the recipe's baseline.")
    parser.add_argument("--registry", type=Path, metavar="DIR", help="where promoted students are kept (default: registry/ in the run)")
    parser.add_argument(
        "--canary", metavar="SHARE", help="try it on this share of the requests, e.g. 0.1; the others go to what is served, which stays so"
    )
    arguments = parser.parse_args(argv)
    canary = None if arguments.canary is None else _share(arguments.canary)
    run = open_run(arguments)
    promote(run, arguments.registry or run.path / "registry", canary=canary)
    return 0


def _share(text: str) -> float:
    """What --canary says. Raises SettingsError."""
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share < 1:
        raise SettingsError(f"--canary {text}: give the share of the requests as a number above 0 and below 1, e.g. --canary 0.1 for 10%")
    return share


def promote(run: Run, registry: Path, *, canary: float | None = None) -> Promoted:
    """Promote the run's model, or record in the registry why not. `canary`: make it the canary instead, with this share of the
    requests, by the same rule.

    Raises PromotionRefused with the numbers, or for a canary that has nothing to be tried beside; StageOrder if this model has not been
    evaluated, DataError if a file is not the one that was evaluated, SettingsError for an unknown baseline, StorageError. Unless it
    returns, what is served stays served.
    """
    from evaluator.card import with_scores
    from evaluator.gate import decide, in_numbers
    from evaluator.metrics.table import MAIN
    from evaluator.stage import BERTSCORE, KEPT, REPORTS, is_complete, scores_of
    from evaluator.systems import DISTILLED, refuse_unknown_baseline
    from shared import registry as store
    from shared.datasets.stage import prepare

    rule, stage = run.recipe.promote, run.stage("evaluation", ["dataset", "model"])
    if not stage.complete:
        raise StageOrder(f"{run.path} has no evaluation of its present model: run `distill evaluate` first")
    for name, prefix in (("dataset", "dataset/test.jsonl"), ("evaluation", "evaluation/")):
        _check_unchanged(run, name, prefix)
    expected = _evaluated_files(run)
    scored = scores_of(run, prepare(run)["test"])
    refuse_unknown_baseline(run.recipe, list(scored))
    if not is_complete(stage):  # another rule: the report must not tell of the old one
        raise StageOrder(
            f"{run.path} was evaluated with other settings (evaluate, promote): run `distill evaluate` again; what was answered is kept"
        )
    decision = decide(scored, run.recipe)
    scores = {metric: scored[DISTILLED].value(metric) for metric in MAIN}
    origin = str(run.path.resolve())
    if not decision.passed:
        reason = "; ".join(decision.failed)
        refused = f"not promoted: {reason}; what was served stays served"
        try:
            store.record_refusal(registry, reason=reason, run=origin, scores=scores)
        except StorageError as exc:
            raise PromotionRefused(f"{refused} (the registry could not note it: {exc})") from exc
        raise PromotionRefused(refused)
    tried = store.canary(registry)
    before = store.current(registry) if canary is None else tried and tried.promoted
    verdict, dataset = in_numbers(decision.comparison, rule), run.recipe.dataset
    card = with_scores(_card(run), scored, name=run.recipe.name, dataset=dataset.hub or dataset.name, verdict=verdict)
    kept = [file for name in (*KEPT, BERTSCORE, *REPORTS) if (file := run.path / "evaluation" / name).is_file()]
    promoted = store.promote(
        registry,
        run.path / "model" / "serving",
        name=run.recipe.name,
        task=run.recipe.task.model_dump(mode="json"),
        scores=scores,
        run=origin,
        reason="; ".join(decision.met),
        # with the test rows, so that versions can be compared when their runs have gone
        attachments=[("README.md", card), run.path / "dataset" / "test.jsonl", *kept],
        expected=expected,
        canary=canary,
    )
    if promoted == before:
        print(f"promote: version {promoted.version} is {'served' if canary is None else 'the canary'} already, nothing to do")
    elif canary is not None:
        gets = f"version {promoted.version} gets {canary * 100:g}% of the requests"
        print(f"canary: {gets}; `distill promote` makes it the served one, `distill rollback` ends it")
    else:
        print(f"promoted: version {promoted.version}, {verdict}")
        if tried and tried.promoted.version != promoted.version:
            print(f"promote: the canary, version {tried.promoted.version}, is over")
    return promoted


def _card(run: Run) -> str:
    """The model card as it was exported, or as somebody has improved it; empty if it has gone."""
    file = run.path / "model" / "README.md"
    try:
        return file.read_text(encoding="utf-8") if file.is_file() else ""
    except UnicodeDecodeError as exc:
        raise DataError(f"{file}: not UTF-8: {exc.reason}; save it as UTF-8") from exc


def _evaluated_files(run: Run) -> dict[str, str]:
    """The SHA-256 of each file of the serving folder, by its path in there, as the export wrote them."""
    manifest, prefix = run.manifest("model"), "model/serving/"
    return {file.path.removeprefix(prefix): file.sha256 for file in (manifest.outputs if manifest else ()) if file.path.startswith(prefix)}


def _check_unchanged(run: Run, stage: str, prefix: str) -> None:
    """Raises DataError if files of a stage are not those its manifest names: only what was evaluated is promoted."""
    from shared.artifacts import sha256_file

    manifest = run.manifest(stage)
    for file in manifest.outputs if manifest else ():
        where = run.path / file.path
        if file.path.startswith(prefix) and (not where.is_file() or sha256_file(where) != file.sha256):
            raise DataError(f"{where} has changed since the stage {stage} wrote it; remove {stage}/ and run it again")
