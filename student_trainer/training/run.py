"""`distill train`: the student learns from the triplets."""

from __future__ import annotations

from shared.commands import cluster_options, open_run, stage_parser


def main(argv: list[str]) -> int:
    """Run all rounds. Returns 0. Raises DistillError."""
    parser = stage_parser("train", "Train the student on the triplets with ORPO; a killed run goes on from its last checkpoint.")
    parser.add_argument("--export", action="store_true", help="go on as `distill export` does, also when the training was complete before")
    parser.add_argument("--require-gpu", action="store_true", help="do not train on a CPU where torch can use no GPU")
    cluster_options(parser)
    arguments = parser.parse_args(argv)

    from student_trainer.export import export  # after parsing: --help must not wait for pydantic
    from student_trainer.training.rounds import is_first, train_rounds

    run = open_run(arguments)

    def refuse_without_gpu() -> None:
        if arguments.require_gpu:
            from student_trainer.training.stage import refuse_without_gpu

            refuse_without_gpu()

    if arguments.on:
        from student_trainer.cluster.train import train_on_cluster

        train_on_cluster(run, arguments.on, workers=arguments.workers, require_gpu=arguments.require_gpu)
    else:
        train_rounds(run, before_training=refuse_without_gpu)
    if arguments.export and is_first():
        export(run)
    return 0
