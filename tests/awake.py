"""A clock that stands still while the machine does: for bounds on how long something of ours may take."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

TICK_S, MOST_S = 0.02, 0.1
"""Seconds between two looks at the time, and most that one of them may add: more has passed where nothing ran."""


@contextmanager
def awake() -> Iterator[Callable[[], float]]:
    """Seconds since the block began in which this machine ran: one that is shared stands still for seconds, now and then for a minute.

    Never more than time.monotonic tells, so that it is no measure of how long something takes at least.
    """
    ran, ended = 0.0, threading.Event()

    def tick() -> None:
        nonlocal ran
        last = time.monotonic()
        while not ended.wait(TICK_S):
            now = time.monotonic()
            ran += min(now - last, MOST_S)
            last = now

    thread = threading.Thread(target=tick, daemon=True)
    thread.start()
    try:
        yield lambda: ran
    finally:
        ended.set()
        thread.join()
