"""`distill evaluate`: the stage `evaluation`, from a trained student to predictions of every system, scores and a report."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shared.commands import open_run, stage_parser
from shared.errors import SettingsError

if TYPE_CHECKING:
    from shared.http.client import HttpEngine
    from shared.settings import TeacherSettings


def main(argv: list[str]) -> int:
    parser = stage_parser("evaluate", "Score the distilled student, its teacher, its former self and trivial baselines on the test split.")
    parser.add_argument("--teacher-url", metavar="URL", help="where the teacher answers, with its /v1 (default: the recipe's teacher.url)")
    parser.add_argument("--teacher-model", metavar="NAME", help="the model name to ask for (default: the recipe's teacher.model)")
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

    url, model = arguments.teacher_url or teacher.url, arguments.teacher_model or teacher.model
    evaluate(
        stage,
        # a launched teacher is the same teacher on whatever port it is found today
        teacher_identity=arguments.teacher_url if arguments.teacher_url and teacher.url else teacher.identity,
        teacher_model=model,
        open_teacher=lambda: open_teacher(teacher, url, model),
        load_base=lambda: LocalModel(serving_folder(recipe.student.model, recipe.export.quantization)),
        load_distilled=lambda: LocalModel(run.path / "model" / "serving"),
    )
    return 0


def open_teacher(teacher: TeacherSettings, url: str | None, model: str) -> HttpEngine:
    """A client of the teacher. Raises SettingsError where nobody has said where it answers, or for an unreadable key file."""
    from shared.http.client import HttpEngine
    from shared.settings import read_secret

    if url is None:
        raise SettingsError("no teacher to ask: this recipe launches its own; start it with `distill teacher` and give --teacher-url")
    key = read_secret(teacher.api_key, teacher.api_key_file, "teacher.api_key")
    return HttpEngine(
        url, model=model, protocol=teacher.protocol, api_key=key, timeout_s=teacher.timeout_s, max_attempts=teacher.max_attempts
    )
