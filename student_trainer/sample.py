"""`distill sample`: let the undistilled student answer the same prompts."""

from __future__ import annotations

from shared.commands import cluster_options, open_run, stage_parser


def main(argv: list[str]) -> int:
    """Run the stage responses/student-r0. Returns the exit code."""
    parser = stage_parser("sample", "Let the undistilled student answer every training prompt. Run again, it goes on where it stopped.")
    cluster_options(parser)
    arguments = parser.parse_args(argv)

    from student_trainer.sampling import sample

    return sample(open_run(arguments), on=arguments.on, workers=arguments.workers)
