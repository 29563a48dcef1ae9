"""`distill keygen`: a new API key, shown once, and its entry for a keys file."""

from __future__ import annotations

import argparse
import secrets
import sys


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="distill keygen",
        description="Make an API key, show it once on standard error, and print its entry for a keys file (--api-keys-file).",
    )
    parser.add_argument("name", help="whose key it is; requests are logged under this name")
    parser.add_argument("--hash", action="store_true", help="make none: read a key that exists from standard input, print its entry")
    arguments = parser.parse_args(argv)

    from shared.http.keys import digest, named, refuse_weak

    name = named(arguments.name)
    if arguments.hash:
        key = sys.stdin.readline().strip()
        refuse_weak(name, key)
    else:
        key = secrets.token_urlsafe(32)
        print(f"{name}'s key, shown only now: {key}", file=sys.stderr)
    print(f"{name}: {{sha256: {digest(key).hex()}}}")
    return 0
