"""`distill evaluate`: the stage `evaluation`, from a trained student to predictions of every system, scores and a report."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from evaluator.promote import promote
from shared.commands import cluster_options, open_run, stage_parser
from shared.errors import SettingsError

if TYPE_CHECKING:
    from shared.artifacts import Run, Stage


def main(argv: list[str]) -> int:
    parser = stage_parser("evaluate", "Score the distilled student, its teacher, its former self and trivial baselines on the test split.")
    parser.add_argument("--teacher-url", metavar="URL", help="where the teacher answers, with its /v1, if the recipe has no teacher.url")
    parser.add_argument("--score-only", action="store_true", help="score the stored predictions again, without any model")
    parser.add_argument(
        "--promote", action="store_true", help="go on as `distill promote` does, also after --score-only or when there was nothing to do"
    )
    parser.add_argument("--registry", type=Path, metavar="DIR", help="with --promote: where to; default: registry/ in the run")
    cluster_options(parser)
    arguments = parser.parse_args(argv)
    if arguments.registry and not arguments.promote:
        raise SettingsError("--registry says where to promote to: give --promote as well, or leave it out")
    run = open_run(arguments)

    from evaluator.stage import is_complete, score_again
    from shared.registry import current, stays_rolled_back

    stage = run.stage("evaluation", ["dataset", "model"])
    registry = arguments.registry or run.path / "registry"
    if arguments.promote:
        current(registry)  # a folder that is no registry is refused before the work is done
    # asked now: what is evaluated anew is promoted by its new scores
    stays = arguments.promote and is_complete(stage) and stays_rolled_back(registry, run.path)
    if arguments.score_only:
        score_again(stage)
    elif is_complete(stage):
        print("evaluation: complete, nothing to do")
    else:
        evaluate_all(run, stage, arguments.teacher_url, on=arguments.on, workers=arguments.workers)
    if arguments.promote and not stays:
        promote(run, registry)
    return 0


def evaluate_all(run: Run, stage: Stage, teacher_url: str | None, *, on: str | None = None, workers: int | None = None) -> None:
    """Ask every system of the recipe and score the answers, those of students on a cluster where `on` names one.

    Raises as `evaluator.stage.evaluate` does.
    """
    from evaluator.judge import judge_of
    from evaluator.stage import evaluate
    from shared.engines.local import LocalModel
    from shared.http.client import OpenAITeacher, teacher_of
    from shared.models import serving_folder
    from shared.settings import read_secret

    recipe, elsewhere = run.recipe, None
    if on:
        from shared.cluster import answer

        elsewhere = partial(answer.elsewhere, on, quantization=recipe.export.quantization, workers=workers)
    evaluate(
        stage,
        open_teacher=lambda: teacher_of(recipe.teacher, teacher_url),
        load_base=lambda: LocalModel(serving_folder(recipe.student.model, recipe.export.quantization)),
        load=LocalModel,
        open_system=lambda system: OpenAITeacher(
            str(system.url),
            model=system.model,
            protocol=system.protocol,
            api_key=read_secret(None, system.api_key_file, f"evaluate.systems ({system.name}).api_key"),
            timeout_s=system.timeout_s,
        ),
        open_judge=judge_of,
        elsewhere=elsewhere,
    )
