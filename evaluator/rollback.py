"""`distill rollback`: serve the previously promoted student again."""

from __future__ import annotations

import argparse
from pathlib import Path


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="distill rollback", description="Serve again what was served before; asked again, go back one further."
    )
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--registry", type=Path, metavar="DIR", help="where promoted students are kept")
    where.add_argument("--out", type=Path, metavar="DIR", help="a run directory: the registry in it")
    parser.add_argument("--reason", default="asked for", metavar="TEXT", help="kept in the registry's history")
    arguments = parser.parse_args(argv)
    from shared.registry import rollback

    promoted = rollback(arguments.registry or arguments.out / "registry", reason=arguments.reason)
    print(f"rolled back: version {promoted.version} of {promoted.name} is served again")
    return 0
