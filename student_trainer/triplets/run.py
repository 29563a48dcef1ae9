"""`distill triplets`: rank the answers into (prompt, chosen, rejected)."""

from __future__ import annotations

from shared.commands import open_run, stage_parser


def main(argv: list[str]) -> int:
    """Build the triplets of a run. Returns the exit code."""
    arguments = stage_parser("triplets", "Rank the answers of teacher and student into (prompt, chosen, rejected).").parse_args(argv)
    from student_trainer.triplets.build import build  # after parsing: --help must not wait for pydantic

    return build(open_run(arguments))
