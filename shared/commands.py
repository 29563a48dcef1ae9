"""The options every stage command shares, and the way from them to a run."""

from __future__ import annotations

import argparse
import math
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.errors import SettingsError

if TYPE_CHECKING:
    from shared.artifacts import Run


def stage_parser(command: str, description: str) -> argparse.ArgumentParser:
    """An argument parser with --recipe, --out and --set."""
    parser = argparse.ArgumentParser(prog=f"distill {command}", description=description)
    parser.add_argument("--recipe", type=Path, required=True, metavar="YAML", help="what to do; recipes/ has some")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the run directory: everything is written there")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", dest="settings", help="one recipe setting, e.g. train.epochs=2"
    )
    return parser


def open_run(arguments: argparse.Namespace, flags: dict[str, Any] | None = None) -> Run:
    """The run that the shared options name. Raises SettingsError, RunMismatch."""
    from shared.artifacts import Run  # after parsing: --help must not wait for pydantic
    from shared.settings import Recipe, load_settings

    recipe = load_settings(Recipe, flags={**assignments(arguments.settings), **(flags or {})}, yaml_file=arguments.recipe)
    return Run.open(arguments.out, recipe)


def assignments(pairs: list[str]) -> dict[str, Any]:
    """NAME=VALUE pairs as a mapping, values read as YAML. Raises SettingsError."""
    import yaml

    values = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if name == "teacher.api_key":
            raise SettingsError(
                "--set teacher.api_key: others can read a command line; give DISTILL_TEACHER__API_KEY or teacher.api_key_file"
            )
        if not equals or not name:
            raise SettingsError(f"--set {pair}: expected NAME=VALUE, e.g. --set train.epochs=2")
        try:
            values[name] = yaml.safe_load(value)
        except yaml.YAMLError as exc:
            raise SettingsError(f"--set {pair}: the value is not readable YAML: {exc}") from exc
    return values


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Keep a Ctrl-C waiting until the block ends: libraries written in C++ abort when it meets them while they are imported."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


class Progress:
    """How far a long stage is: rewritten in place on a terminal, a plain line at most every `every_s` seconds in a log."""

    def __init__(self, what: str, total: int, *, unit: str = "rows", done: int = 0, every_s: float = 10.0) -> None:
        self._what, self._total, self._unit, self._done, self._every = what, total, unit, done, every_s
        self._first, self._started, self._note = done, time.monotonic(), ""
        self._terminal = sys.stderr.isatty()
        self._told = -math.inf
        if done < total:
            self._tell()

    def step(self, count: int = 1, note: str = "") -> None:
        """Count `count` more units as done."""
        self._done, self._note = self._done + count, note
        if self._done >= self._total:
            self._tell()
        else:
            self.tick()

    def tick(self) -> None:
        """Say where things stand, if it is time to: for a stage that waits and counts nothing."""
        if time.monotonic() - self._told >= (0.2 if self._terminal else self._every):
            self._tell()

    def _tell(self) -> None:
        self._told = time.monotonic()
        rate = (self._done - self._first) / max(self._told - self._started, 1e-9)
        left = f"{(self._total - self._done) / rate:.0f} s left" if rate > 0 else "time left not known yet"
        line = f"{self._what}: {self._done}/{self._total} {self._unit}, {rate:.1f}/s, {left}{', ' + self._note if self._note else ''}"
        if self._terminal:
            print(f"\r\x1b[K{line}", end="\n" if self._done >= self._total else "", file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)
