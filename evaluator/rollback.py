"""`distill rollback`: serve the previously promoted student again."""

from __future__ import annotations

import argparse

from evaluator.registry import add_where, where


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="distill rollback", description="Serve again what was served before; asked again, go back one further."
    )
    add_where(parser)
    parser.add_argument("--reason", default="asked for", metavar="TEXT", help="kept in the registry's history")
    arguments = parser.parse_args(argv)
    from shared.registry import rollback

    promoted = rollback(where(arguments), reason=arguments.reason)
    print(f"rolled back: version {promoted.version} of {promoted.name} is served again")
    return 0
