"""How much may be asked: per-key limits that hold across all workers of a server, and the bounded queue before an engine."""

from __future__ import annotations

import asyncio
import fcntl
import math
import mmap
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import IO

from shared.contracts import GenerationRequest
from shared.errors import RequestRefused, TeacherBusy
from shared.http.keys import Key

WINDOW_S = 60.0
CHARACTERS_A_TOKEN = 8
"""Reserved before a request is sent, since nobody knows yet what it will generate; natural languages stay below it."""
DAY_S = 86_400
_DOUBLE = 8


class Exhausted(TeacherBusy):
    """A key has used up one of its limits: 429. `limit` names it, `retry_after_s` is when there is room again, if that is known."""

    def __init__(self, limit: str, message: str, *, retry_after_s: float) -> None:
        super().__init__(message, retry_after_s=retry_after_s)
        self.limit = limit


class OverADay(RequestRefused):
    """A request for more than its key may have in a whole day: 400, since no waiting helps."""


class QueueFull(TeacherBusy):
    """The server has as many requests as it takes, waiting ones included: 429."""


@dataclass
class Lease:
    """What one admitted request holds until it ends."""

    key: Key
    reserved: int
    """Characters."""


class _Guarded:
    """`with` it, these numbers are this process's alone; one process needs no lock."""

    def __init__(self, numbers: memoryview[float], lock: IO[bytes] | None) -> None:
        self._numbers, self._lock = numbers, lock

    def __enter__(self) -> memoryview[float]:
        if self._lock is not None:
            fcntl.lockf(self._lock, fcntl.LOCK_EX)
        return self._numbers

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            fcntl.lockf(self._lock, fcntl.LOCK_UN)


class Counts:
    """What each key has used and holds, in memory that all workers of a server share: make it before they are forked.

    Of each key: the times of its last requests in a ring, the characters of the day; and of each key and worker: requests and
    characters that are held now, so that what a killed worker held can be given back. A lock on a file guards it, which the
    kernel opens when its holder dies.
    """

    def __init__(
        self, keys: Sequence[Key], *, workers: int = 1, clock: Callable[[], float] = time.monotonic, wall: Callable[[], float] = time.time
    ) -> None:
        """`clock`: seconds, the same in all processes; `wall`: Unix time, for the day."""
        self._workers, self._clock, self._wall = workers, clock, wall
        self.worker = 0
        """Which one this process is, from 0."""
        self._start = []
        size = 0
        for key in keys:
            self._start.append(size)
            size += 3 + 2 * workers + (key.limits.requests_per_minute or 0)
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as this is
        self._file.truncate(max(size, 1) * _DOUBLE)
        self._memory = mmap.mmap(self._file.fileno(), max(size, 1) * _DOUBLE)
        # per key: place in the ring | day | characters | requests held, by worker | characters held, by worker | the ring
        self._locked = _Guarded(memoryview(self._memory).cast("d"), self._file if workers > 1 else None)

    def ask(self, key: Key) -> None:
        """Count one request. Raises Exhausted, and does not count it, if the key has made all it may in the last 60 seconds."""
        limit = key.limits.requests_per_minute
        if limit is None:
            return
        at = self._start[key.index]
        ring = at + 3 + 2 * self._workers
        now = self._clock()
        with self._locked as d:
            place = int(d[at])
            oldest = d[ring + place]  # 0: the ring is not full yet
            if oldest and now - oldest < WINDOW_S:
                wait = WINDOW_S - (now - oldest)
                raise Exhausted("requests_per_minute", f"this API key may ask {limit} times a minute", retry_after_s=wait)
            d[ring + place] = now
            d[at] = (place + 1) % limit

    def hold(self, key: Key, *requests: GenerationRequest) -> Lease:
        """Reserve what the requests of one call may generate. Raises Exhausted, and OverADay if it is more than a whole day's."""
        at, limits = self._start[key.index], key.limits
        held = at + 3
        wish = sum(r.n * r.sampling.max_tokens for r in requests) * CHARACTERS_A_TOKEN if limits.characters_per_day else 0
        with self._locked as d:
            if limits.concurrent_requests is not None and sum(d[held : held + self._workers]) >= limits.concurrent_requests:
                many = limits.concurrent_requests
                raise Exhausted("concurrent_requests", f"this API key may ask {many} requests at a time", retry_after_s=1.0)
            if limits.characters_per_day is not None:
                if wish > limits.characters_per_day:
                    raise OverADay(
                        f"this request may generate {wish} characters ({CHARACTERS_A_TOKEN} a token), and this API key "
                        f"{limits.characters_per_day} a day: lower n or max_tokens"
                    )
                self._today(d, at)
                left = limits.characters_per_day - d[at + 2] - sum(d[held + self._workers : held + 2 * self._workers])
                if wish > left:
                    most, unused = limits.characters_per_day, max(0, int(left))
                    if wish <= most - d[at + 2]:
                        raise Exhausted(
                            "characters_reserved",
                            f"this API key may generate {most} characters a day (UTC); requests under way have reserved what is left",
                            retry_after_s=1.0,
                        )
                    raise Exhausted(
                        "characters_per_day",
                        f"this API key may generate {most} characters a day (UTC) and has {unused} left; this request reserves {wish} "
                        f"({CHARACTERS_A_TOKEN} a token): lower n or max_tokens, or wait",
                        retry_after_s=DAY_S - self._wall() % DAY_S,
                    )
            d[held + self.worker] += 1
            d[held + self._workers + self.worker] += wish
        return Lease(key, wish)

    def settle(self, lease: Lease, characters: int) -> None:
        """Give back what a request held, and count what it has generated."""
        at = self._start[lease.key.index]
        held = at + 3
        with self._locked as d:
            d[held + self.worker] -= 1
            d[held + self._workers + self.worker] -= lease.reserved
            self._today(d, at)
            d[at + 2] += characters

    def forget(self, worker: int) -> None:
        """Give back all that a worker held which is no more."""
        with self._locked as d:
            for start in self._start:
                d[start + 3 + worker] = d[start + 3 + self._workers + worker] = 0

    def _today(self, d: memoryview[float], at: int) -> None:
        day = self._wall() // DAY_S
        if d[at + 1] != day:
            d[at + 1], d[at + 2] = day, 0


class Slots:
    """At most `in_flight` requests at the engine, at most `waiting` before it, none of them longer than `wait_s` seconds."""

    def __init__(self, in_flight: int, waiting: int, wait_s: float, *, tell: Callable[[int], None] = lambda _: None) -> None:
        """`tell(+1)` when a request begins to wait, `tell(-1)` when it waits no more."""
        self._free = asyncio.Semaphore(in_flight)
        self._most, self._wait_s, self._tell = waiting, wait_s, tell
        self.waiting = 0

    async def take(self) -> bool:
        """Take a slot, to be given back; whether that took waiting.

        Raises QueueFull at once if as many wait as may, or after `wait_s` without a slot.
        """
        if not self._free.locked():
            await self._free.acquire()
            return False
        if self.waiting >= self._most:
            raise QueueFull("too many requests are waiting; try again", retry_after_s=1.0)
        self.waiting += 1
        self._tell(1)
        try:
            async with asyncio.timeout(self._wait_s):
                await self._free.acquire()
        except TimeoutError:
            raise QueueFull(f"no room within {self._wait_s:g} s; try again", retry_after_s=math.ceil(self._wait_s)) from None
        finally:
            self.waiting -= 1
            self._tell(-1)
        return True

    def give(self) -> None:
        self._free.release()
