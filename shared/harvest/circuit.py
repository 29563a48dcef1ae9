"""Whether the teacher is alive: after so many failures in a row it is asked now and then only, until it answers or patience ends."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable

IN_A_ROW = 8
"""Failures without an answer between them that open the circuit: too many for chance, where one request in ten fails."""
FIRST_PROBE_S, LONGEST_PROBE_S = 1.0, 30.0
"""Bounds of the pause before one request is sent to see; it doubles with every one that fails."""
AT_FIRST_S = 30.0
"""Longest patience with a teacher that has never answered: its URL may be wrong."""


class Circuit:
    """Open: nothing is sent but one request at a time, after a pause. `clock` gives seconds that never jump."""

    def __init__(
        self,
        patience_s: float,
        *,
        whom: str = "the teacher",
        clock: Callable[[], float] = time.monotonic,
        jitter: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self._patience, self._whom, self._clock, self._jitter = patience_s, whom, clock, jitter
        self._lived = False
        self._failures = 0
        self._since = self._due = self._ends = 0.0
        """Of the failures in a row: the first; the end of patience from there on; that from the last pause that was asked for before it."""
        self._pause = FIRST_PROBE_S
        self._probe_at = -math.inf
        self.error = ""
        """What the last failure said."""

    @property
    def open(self) -> bool:
        return self._failures >= IN_A_ROW

    def lives(self) -> None:
        """It has answered, if only to refuse."""
        self._lived, self._failures, self._pause, self._probe_at = True, 0, FIRST_PROBE_S, -math.inf

    def failed(self, error: str, *, probe: bool = False, gate_until: float = -math.inf) -> None:
        """It was not reached, broke off, was too late or answered that it failed.

        `probe`: what `sent` has said of this request; `gate_until`: the time until which it wants to be left alone, if it does.
        """
        now, was_open = self._clock(), self.open
        patience = self._patience if self._lived else min(self._patience, AT_FIRST_S)
        if not self._failures:
            self._since, self._due = now, max(now, gate_until) + patience
            self._ends = self._due
        elif now < self._due:  # a teacher that asks for pauses for ever is given up all the same
            self._ends = max(self._ends, gate_until + patience)
        self._failures += 1
        self.error = error
        if self.open and (probe or not was_open):
            self._probe_at = now + self._jitter(0.5, 1.0) * self._pause
            self._pause = min(LONGEST_PROBE_S, 2 * self._pause)

    def sent(self) -> bool:
        """A request is on its way. Returns whether it is the only one that is sent while the circuit is open."""
        if self.open:
            self._probe_at = math.inf
        return self.open

    def delay(self) -> float:
        """Seconds until something may be sent; infinity while the one request is on its way."""
        return max(0.0, self._probe_at - self._clock()) if self.open else 0.0

    @property
    def silent_s(self) -> float:
        """Seconds since the first of the failures in a row."""
        return self._clock() - self._since

    @property
    def left_s(self) -> float:
        """Seconds of patience that are left, which begins after a pause that was asked for; infinity while the circuit is closed."""
        return self._ends - self._clock() if self.open else math.inf

    def explain(self) -> str:
        """What is waited for, in one line; nothing while the circuit is closed."""
        if not self.open:
            return ""
        pause = self.delay()
        then = "asking now" if pause in (0.0, math.inf) else f"next try in {pause:.0f} s"
        left = max(0.0, self.left_s)
        return f"{self._whom} has not answered for {self.silent_s:.0f} s ({self.error}); {then}, giving up in {left:.0f} s"
