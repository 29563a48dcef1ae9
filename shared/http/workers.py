"""Several processes at one socket: a dead one is replaced, and all end with the one that started them."""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable

from shared.errors import EngineError

SOON_S = 2.0
"""A worker that dies within so many seconds of its start has not served."""
MOST_EARLY_DEATHS = 3
"""After so many such deaths in a row it is no accident."""


def supervise(
    work: Callable[[int], None],
    workers: int,
    *,
    started: Callable[[], None],
    died: Callable[[int, int], None],
    end_s: float,
    stopping: Callable[[], None],
    until_stdin_closes: bool = False,
) -> None:
    """Run `work(i)` in `workers` processes forked from this one, until SIGTERM or SIGINT; then let them end, for `end_s` seconds at most.

    `work` runs until SIGTERM; its process ends with it. `started` is called once all have been started, `died(i, pid)` before a worker that
    died takes up its work again, `stopping` before those that live are told to end. `until_stdin_closes`: end as well when standard input
    does. Raises EngineError if workers die as soon as they start.
    """
    lifeline, held = os.pipe()  # a worker reads the end of its parent from it
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)}
    earlier = signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    running: dict[int, tuple[int, float]] = {}
    early = 0
    stdin = [0] if until_stdin_closes else []

    def start(index: int) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid:
            running[pid] = index, time.monotonic()
            return
        code = 1
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for descriptor in (held, woken, wake):
                os.close(descriptor)
            threading.Thread(target=_end_with_parent, args=(lifeline,), daemon=True).start()
            work(index)
            code = 0
        except BaseException as exc:
            print(f"worker {index}: {exc!r}", file=sys.stderr, flush=True)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def reap() -> list[tuple[int, int, int, float]]:
        """Workers that have ended: index, process id, exit status, seconds they lived."""
        ended = []
        for pid, (index, since) in list(running.items()):
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                del running[pid]
                ended.append((index, pid, status, time.monotonic() - since))
        return ended

    try:
        for index in range(workers):
            start(index)
        started()
        stop = False
        while not stop:
            ready, _, _ = select.select([woken, *stdin], [], [], 1.0)
            stop = any(number in (signal.SIGTERM, signal.SIGINT) for number in _drained(woken)) or (0 in ready and not os.read(0, 4096))
            for index, pid, status, lived in reap():
                if stop:
                    continue
                early = early + 1 if lived < SOON_S else 0
                how = f"signal {status & 0x7F}" if status & 0x7F else f"exit code {status >> 8}"
                print(f"worker {index} died ({how}); another takes its place", file=sys.stderr, flush=True)
                if early > MOST_EARLY_DEATHS:
                    raise EngineError("the workers die as soon as they start; what they said stands above")
                died(index, pid)
                start(index)
    finally:
        stopping()
        for pid in running:
            os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + end_s
        while running and time.monotonic() < deadline:
            reap()
            select.select([woken], [], [], 0.05)
            _drained(woken)
        for pid in running:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        signal.set_wakeup_fd(earlier)
        for number, handler in before.items():
            signal.signal(number, handler)
        for descriptor in (lifeline, held, woken, wake):
            os.close(descriptor)


def _drained(descriptor: int) -> bytes:
    ready, _, _ = select.select([descriptor], [], [], 0)
    return os.read(descriptor, 4096) if ready else b""


def _end_with_parent(lifeline: int) -> None:
    os.read(lifeline, 1)  # returns when the parent is no more
    os.kill(os.getpid(), signal.SIGTERM)
