"""`distill train`: the student learns from the triplets."""

from __future__ import annotations

from shared.commands import open_run, stage_parser, uninterrupted
from student_trainer.export import export


def main(argv: list[str]) -> int:
    """Run the stage. Returns 0. Raises DistillError."""
    parser = stage_parser("train", "Train the student on the triplets with ORPO; a killed run goes on from its last checkpoint.")
    parser.add_argument("--export", action="store_true", help="go on as `distill export` does, also when the training was complete before")
    parser.add_argument("--require-gpu", action="store_true", help="do not train on a CPU where torch can use no GPU")
    arguments = parser.parse_args(argv)
    run = open_run(arguments)
    stage = run.stage("checkpoints", inputs=["triplets/r0"])
    if stage.complete:
        print("train: complete, nothing to do")
    else:
        print(f"train: loading {run.recipe.student.model}", flush=True)
        with uninterrupted():
            from student_trainer.training.stage import (  # torch: seconds, and only when there is something to train
                refuse_without_gpu,
                train,
            )

        if arguments.require_gpu:
            refuse_without_gpu()
        train(run, stage)
    if arguments.export:
        export(run)
    return 0
