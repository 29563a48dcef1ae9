"""`distill status`: what a run directory has done and what is left."""

from __future__ import annotations

import argparse
from pathlib import Path


def main(argv: list[str]) -> int:
    """Print one line a stage. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="distill status", description="Show what a run directory has done. Reads only; safe while a stage runs."
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the run directory")
    arguments = parser.parse_args(argv)

    from student_trainer.progress import report

    print(report(arguments.out))
    return 0
