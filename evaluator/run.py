"""`distill evaluate`: the stage `evaluation`, from a trained student to predictions of every system, scores and a report."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shared.commands import open_run, stage_parser

if TYPE_CHECKING:
    from shared.http.client import HttpEngine
    from shared.settings import TeacherSettings


def main(argv: list[str]) -> int:
    parser = stage_parser("evaluate", "Score the distilled student, its teacher, its former self and trivial baselines on the test split.")
    parser.add_argument("--teacher-url", metavar="URL", help="where the teacher answers, with its /v1, if the recipe has no teacher.url")
    parser.add_argument("--score-only", action="store_true", help="score the stored predictions again, without any model")
    arguments = parser.parse_args(argv)
    run = open_run(arguments)

    from evaluator.stage import evaluate, score_again
    from shared.models import serving_folder

    stage, recipe, teacher = run.stage("evaluation", ["dataset", "model"]), run.recipe, run.recipe.teacher
    if arguments.score_only:
        score_again(stage)
        return 0
    if stage.complete:
        print("evaluation: complete, nothing to do")
        return 0

    from shared.engines.local import LocalModel

    evaluate(
        stage,
        open_teacher=lambda: open_teacher(teacher, arguments.teacher_url),
        load_base=lambda: LocalModel(serving_folder(recipe.student.model, recipe.export.quantization)),
        load_distilled=lambda: LocalModel(run.path / "model" / "serving"),
    )
    return 0


def open_teacher(teacher: TeacherSettings, given: str | None) -> HttpEngine:
    """A client of the teacher. Raises SettingsError where nobody has said where it answers, or for an unreadable key file."""
    from shared.http.client import HttpEngine
    from shared.settings import read_secret

    url = teacher.address(given)
    key = read_secret(teacher.api_key, teacher.api_key_file, "teacher.api_key")
    return HttpEngine(
        url, model=teacher.model, protocol=teacher.protocol, api_key=key, timeout_s=teacher.timeout_s, max_attempts=teacher.max_attempts
    )
