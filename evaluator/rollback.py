"""`distill rollback`: serve the previously promoted student again."""

from __future__ import annotations

import argparse

from evaluator.registry import add_where, where


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="distill rollback",
        description="End the canary, if one is tried; else serve again what was served before. Asked again, go back one further.",
    )
    add_where(parser)
    parser.add_argument("--reason", default="asked for", metavar="TEXT", help="kept in the registry's history")
    arguments = parser.parse_args(argv)
    from shared.registry import canary, rollback

    registry = where(arguments)
    tried = canary(registry)
    promoted = rollback(registry, reason=arguments.reason)
    if tried:
        print(f"rolled back: the canary, version {tried.promoted.version}, is over; version {promoted.version} stays served")
    else:
        print(f"rolled back: version {promoted.version} of {promoted.name} is served again")
    return 0
