"""The options every stage command shares, and the way from them to a run."""

from __future__ import annotations

import argparse
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.errors import INTERRUPTED, TERMINATED, SettingsError, Stopped

if TYPE_CHECKING:
    from shared.artifacts import Run


def install(extra: str) -> str:
    """How to get the libraries of one of pyproject.toml's extras. The package itself is in no index, where its name is anybody's."""
    return f"in the checkout, pip install -e '.[{extra}]'"


def stage_parser(command: str, description: str) -> argparse.ArgumentParser:
    """An argument parser with --recipe, --out and --set."""
    parser = argparse.ArgumentParser(prog=f"distill {command}", description=description)
    parser.add_argument("--recipe", type=Path, required=True, metavar="YAML", help="what to do; recipes/ has some")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the run directory: everything is written there")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", dest="settings", help="one recipe setting, e.g. train.epochs=2"
    )
    return parser


def cluster_options(parser: argparse.ArgumentParser) -> None:
    """--on and --workers."""
    parser.add_argument(
        "--on",
        metavar="CLUSTER",
        help="do it on a Ray cluster: HOST:PORT on one of its nodes, auto as a job of it, ray://HOST:PORT from outside, or "
        "local-cluster:N, N processes of this machine",
    )
    parser.add_argument("--workers", type=int, metavar="N", help="with --on: how many processes; by default as many as the cluster can run")


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
        if name.rpartition(".")[2] == "api_key":
            variable = "DISTILL_" + name.upper().replace(".", "__")
            raise SettingsError(f"--set {name}: others can read a command line; give {variable} or {name}_file")
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


class Interruption:
    """Whether somebody wants this stage to end; calling it tells."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def __call__(self) -> bool:
        return self.signal is not None

    def raise_if_asked(self) -> None:
        """Raises KeyboardInterrupt after a Ctrl-C, Stopped after SIGTERM or the loss of the terminal."""
        if self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        if self.signal is not None:
            raise Stopped("told to end; everything done so far is kept")


@contextmanager
def interruptible() -> Iterator[Interruption]:
    """Note a first Ctrl-C or SIGTERM instead of ending there and then; a second one ends this process at once."""
    asked = Interruption()

    def note(signum: int, frame: object) -> None:
        if asked.signal is not None:
            os._exit(INTERRUPTED if signum == signal.SIGINT else TERMINATED)
        asked.signal = signum
        with suppress(OSError):  # the terminal may be what has gone
            os.write(2, b"\nending: waiting for what is in flight; once more to end at once\n")  # print may be what was interrupted

    if threading.current_thread() is not threading.main_thread():
        yield asked  # only the main thread may have handlers
        return
    # what this process was told to ignore (nohup), it goes on ignoring
    heard = [signum for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(signum) != signal.SIG_IGN]
    before = {signum: signal.signal(signum, note) for signum in heard}
    try:
        yield asked
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


class Progress:
    """How far a long stage is: rewritten in place on a terminal, a plain line at most every `every_s` seconds in a log."""

    def __init__(
        self,
        what: str,
        total: int | None,
        *,
        unit: str = "rows",
        done: int = 0,
        every_s: float = 10.0,
        note: Callable[[], str] | None = None,
    ) -> None:
        """`total`: None where nobody knows; `done`: units of it that were done before; `note`: knows what else to say."""
        self._what, self._total, self._unit, self._done, self._every = what, total, unit, done, every_s
        self._first, self._started = done, time.monotonic()
        self._said, self._note = "", note or (lambda: self._said)
        self._terminal = sys.stderr.isatty()
        self._told = -math.inf
        self._shown = 0
        if total is None or done < total:
            self._tell()

    def step(self, count: int = 1, note: str = "") -> None:
        """Count `count` more units as done. `note`: what else to say."""
        self._done, self._said = self._done + count, note
        if self._done == self._total:
            self._tell()
        else:
            self.tick()

    def had(self, count: int = 1) -> None:
        """Count `count` units that turn out to have been done before."""
        self._done, self._first = self._done + count, self._first + count

    def tick(self) -> None:
        """Say where things stand, if it is time to: for a stage that waits and counts nothing."""
        if time.monotonic() - self._told >= (0.2 if self._terminal else self._every):
            self._tell()

    def end(self) -> None:
        """Say where things stand at the end, whether all is done or not."""
        if self._shown != self._done:
            self._tell()
        if self._terminal and self._done != self._total:
            with suppress(OSError):
                print(file=sys.stderr, flush=True)

    def _tell(self) -> None:
        self._told, self._shown = time.monotonic(), self._done
        rate = (self._done - self._first) / max(self._told - self._started, 1e-9)
        note = self._note()
        of, left = "", ""
        if self._total is not None:
            of = f"/{self._total}"
        if self._total is not None and self._done < self._total:
            left = f", {(self._total - self._done) / rate:.0f} s left" if rate > 0 else ", time left not known yet"
        line = f"{self._what}: {self._done}{of} {self._unit}, {rate:.1f}/s{left}{', ' + note if note else ''}"
        try:
            self._print(line)
        except OSError:  # nobody listens any more, which is no reason to end
            self._told = math.inf

    def _print(self, line: str) -> None:
        if self._terminal:
            # one that is wrapped cannot be written over; a new terminal may say it is 0 wide
            line = line[: (os.get_terminal_size(sys.stderr.fileno()).columns or 80) - 1]
            print(f"\r\x1b[K{line}", end="\n" if self._done == self._total else "", file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)
