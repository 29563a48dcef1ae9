"""`distill harvest`: ask the teacher for its answers, each kept in a ledger."""

from __future__ import annotations

from shared.commands import open_run, stage_parser


def main(argv: list[str]) -> int:
    """Run the stage responses/teacher. Returns the exit code."""
    parser = stage_parser(
        "harvest", "Ask the teacher for sampled answers to every training prompt. Run again, it asks for what is missing."
    )
    parser.add_argument("--teacher-url", metavar="URL", help="where the teacher answers, with its /v1, if the recipe has no teacher.url")
    parser.add_argument("--retry-failed", action="store_true", help="ask again for the samples that failed")
    arguments = parser.parse_args(argv)

    from student_trainer.harvest.stage import harvest

    return harvest(open_run(arguments), teacher_url=arguments.teacher_url, retry_failed=arguments.retry_failed)
