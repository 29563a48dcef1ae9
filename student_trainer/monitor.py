"""`distill monitor`: how far the runs are, what training and evaluation say and what is promoted, for Prometheus."""

from __future__ import annotations

import argparse
import signal
from pathlib import Path
from queue import SimpleQueue

from shared.errors import SettingsError


def main(argv: list[str]) -> int:
    """Serve until SIGTERM or Ctrl-C. Returns 0. Raises SettingsError."""
    parser = argparse.ArgumentParser(
        prog="distill monitor",
        description="Tell Prometheus of the run directories below a folder. Reads only, at every scrape; safe while stages run.",
    )
    parser.add_argument("--runs", type=Path, required=True, metavar="DIR", help="the folder whose folders are run directories")
    parser.add_argument("--registry", type=Path, metavar="DIR", help="a registry beside those in the runs (RUN/registry)")
    parser.add_argument("--host", default="127.0.0.1", help="default 127.0.0.1: this machine alone")
    parser.add_argument("--port", type=int, default=9464, help="default 9464; 0 picks a free one")
    arguments = parser.parse_args(argv)
    if not arguments.runs.is_dir():
        raise SettingsError(f"--runs {arguments.runs}: no such directory; give the one that holds the run directories")
    told: SimpleQueue[int] = SimpleQueue()  # of all that wakes a thread, this may be used in a handler that interrupts the wait
    # before the imports below: from here on this is a server, which ends with 0
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: told.put(number))

    from prometheus_client import CollectorRegistry

    from shared.http.metrics import exposed
    from student_trainer.run_metrics import RunMetrics

    registry = CollectorRegistry()
    registry.register(RunMetrics(arguments.runs, registry=arguments.registry))
    with exposed(registry, host=arguments.host, port=arguments.port, option="--port") as url:
        print(f"monitor: metrics on {url}", flush=True)
        told.get()
    return 0
