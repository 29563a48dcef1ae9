"""`distill harvest`: ask the teacher for its answers, each kept in a ledger; `distill harvest status` and `export` read it."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import get_args

from shared.commands import cluster_options, open_run, stage_parser
from shared.errors import SettingsError

ALL = "all"


def main(argv: list[str]) -> int:
    """Run the stage responses/teacher, or tell how it stands. Returns the exit code."""
    if argv[:1] == ["status"]:
        return _status(argv[1:])
    if argv[:1] == ["export"]:
        return _export(argv[1:])
    parser = stage_parser(
        "harvest",
        "Ask the teacher for sampled answers to every training prompt. Run again, it asks for what is missing. "
        "`distill harvest status DIR` tells how a harvest stands, `distill harvest export DIR FILE` writes its answers as Parquet.",
    )
    parser.add_argument("--teacher-url", metavar="URL", help="where the teacher answers, with its /v1, if the recipe has no teacher.url")
    parser.add_argument(
        "--retry-failed",
        nargs="?",
        const=ALL,
        metavar="CLASS,...",
        help="ask again for what failed: for all of it, or for some classes (refused, content_filter, empty, ...; cut_off for answers "
        "that ended at the token limit)",
    )
    parser.add_argument("--dry-run", action="store_true", help="print requests, their number and what they may cost, and send nothing")
    parser.add_argument(
        "--metrics-file", type=Path, metavar="PROM", help="keep this file up to date for Prometheus's node exporter (textfile collector)"
    )
    parser.add_argument(
        "--answers-from",
        type=Path,
        metavar="RUN",
        help="first take what that run's teacher has answered to just what would be asked here: to train otherwise is to pay nothing again",
    )
    cluster_options(parser)
    parser.add_argument(
        "--storage",
        metavar="URI",
        help="with --on: a folder or bucket that all nodes share (s3://..., gs://..., whatever pyarrow or fsspec reads), where answers "
        "are kept until all are there; by default the run directory, which is then on a shared file system",
    )
    arguments = parser.parse_args(argv)
    retry = _classes(arguments.retry_failed)
    if arguments.metrics_file and arguments.metrics_file.suffix != ".prom":
        raise SettingsError(f"--metrics-file {arguments.metrics_file}: the node exporter reads files that end in .prom")
    if arguments.answers_from and arguments.on:
        raise SettingsError("--answers-from: a harvest on a cluster takes none over; begin without --on, which may go on with it then")

    from student_trainer.harvest.stage import dry_run, run_stage

    if arguments.dry_run:
        with tempfile.TemporaryDirectory() as nowhere:
            if not (arguments.out / "run.json").exists():
                arguments.out = Path(nowhere) / "run"  # to look at the price must not bind the run to these settings
            return dry_run(open_run(arguments), teacher_url=arguments.teacher_url, retry=retry, answers_from=arguments.answers_from)
    run = open_run(arguments)
    if arguments.on:
        from student_trainer.cluster.harvest import run_on_cluster

        return run_on_cluster(
            run,
            arguments.on,
            workers=arguments.workers,
            storage=arguments.storage,
            teacher_url=arguments.teacher_url,
            retry=retry,
            metrics_file=arguments.metrics_file,
        )
    return run_stage(
        run,
        teacher_url=arguments.teacher_url,
        retry=retry,
        metrics_file=arguments.metrics_file,
        answers_from=arguments.answers_from,
    )


def _classes(given: str | None) -> frozenset[str]:
    from shared.contracts import CUT_OFF
    from shared.errors import FailureClass

    if given is None:
        return frozenset()
    if given == ALL:
        return frozenset(get_args(FailureClass))
    known = {*get_args(FailureClass), CUT_OFF}
    wanted = {name.strip() for name in given.split(",")}
    if unknown := sorted(wanted - known):
        raise SettingsError(f"--retry-failed {given}: no class of failures is called {unknown[0]!r}; there are {', '.join(sorted(known))}")
    return frozenset(wanted)


def _status(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="distill harvest status", description="How a harvest stands, running or not. Reads only; disturbs nothing."
    )
    parser.add_argument("run", type=Path, metavar="DIR", help="the run directory")
    arguments = parser.parse_args(argv)

    from student_trainer.harvest.status import report

    print(report(arguments.run))
    return 0


def _export(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="distill harvest export",
        description="Write the teacher's answers as Parquet, or as a folder for datasets.load_from_disk.",
    )
    parser.add_argument("run", type=Path, metavar="DIR", help="the run directory")
    parser.add_argument("to", type=Path, metavar="FILE", help="a name that ends in .parquet, or that of a folder")
    arguments = parser.parse_args(argv)

    from student_trainer.harvest.export import export

    print(f"{arguments.to}: {export(arguments.run / 'responses' / 'teacher', arguments.to)} rows")
    return 0
