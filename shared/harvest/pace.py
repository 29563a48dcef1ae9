"""How fast a teacher is asked: requests in flight, a rate, and one gate that a Retry-After closes for all."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable

FIRST = 16
"""In flight at first; it triples with every round of answers until the bound is reached or the teacher says no."""
LONGEST_GATE_S = 600.0
"""Longest pause of all requests, whatever a Retry-After asks for (it may be a day): then one asks again."""
FIRST_GATE_S = 1.0
"""Pause after a 429 that names no time; it doubles with every further one, to at most a minute."""
USED = 0.97
"""Of a rate that is allowed: clocks and networks bunch what was sent evenly."""
SPREAD, LONGEST_SPREAD_S, BURST_S = 0.6, 0.02, 0.003
"""How far apart requests are spread while the pace is still rising: as a share of an answer's time by the bound, at most, and how far
behind that they may be. What is sent at once comes back at once, for ever, and nothing is in flight while it is dealt with."""
BEHIND_S = 0.02
"""Requests that are due by the rate may follow each other at once if they are no later than this."""
SEARCH = 1.5
"""Growth a second of a rate that was never seen to be too much, after the first 429."""
RETURN, CREEP = 1.05, 1.002
"""Growth a second of a rate after it was too much: back to a little less than it was then, and beyond."""
LONGEST_GAP_S = 60.0
"""For which a rate grows at once, or by which it is told."""
FEW = 4
"""Accepted requests between two refusals from which nothing is learned: it is still the first refusal that lasts."""


class Pace:
    """What may be sent now. Knows nothing of what is asked; `clock` gives seconds that never jump.

    Concurrency: slow start, then one more a round of answers; cut by 30% after a 429 and by half after a time-out, once for all
    requests that were in flight together; no growth while answers take more than half of the time allowed.
    Rate: given, else learned from refusals. Between two refusals a teacher whose allowance fills up evenly accepts no more than it
    allows on average if pauses count, and no less if they do not: the next rate is between the two.
    """

    def __init__(
        self,
        most: int,
        *,
        requests_per_minute: float | None = None,
        tokens_per_minute: float | None = None,
        timeout_s: float = math.inf,
        clock: Callable[[], float] = time.monotonic,
        jitter: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self._most, self._timeout, self._clock, self._jitter = most, timeout_s, clock, jitter
        self._limit = float(min(FIRST, most))
        self._starting = True
        self._cut_at = -math.inf
        self._latency = 0.0
        self.changed: Callable[[], None] = lambda: None
        """To be called where `delay` has become shorter by something else than time and answers."""
        self.in_flight = 0
        self.refused = 0
        """Answers that said: not now (429)."""
        self.gate_until = -math.inf
        self._gates = 0
        self._allowed = USED * requests_per_minute / 60 if requests_per_minute else None
        self._tokens = USED * tokens_per_minute / 60 if tokens_per_minute else None
        self._tokens_due = -math.inf
        self._rate: float | None = self._allowed
        self._rate_at = 0.0
        self._ceiling = math.inf
        """A learned rate that was nearly too much."""
        self._due = -math.inf
        self._accepted = 0
        self._since: float | None = None
        """Of `_accepted`: the last refusal, or the first request."""

    @property
    def limit(self) -> int:
        """Requests that may be in flight."""
        return int(self._limit)

    @property
    def rate(self) -> float | None:
        """Requests/s at most, given or learned; None: no bound is known."""
        return self._rate

    def delay(self) -> float:
        """Seconds until the next request may be sent; infinity while as many as may be are in flight."""
        if self.in_flight >= self.limit:
            return math.inf
        return max(0.0, max(self.gate_until, self._due, self._tokens_due) - self._clock())

    def sent(self, tokens: int = 0) -> float:
        """Count a request of so many tokens, answer included. Returns the time, to be given back with what became of it."""
        now = self._clock()
        self.in_flight += 1
        if self._since is None:
            self._since = now
        if self._rate is not None:
            self._rate = self._grown(self._rate, now)
            self._due = max(self._due, now - BEHIND_S) + 1 / self._rate
        elif self._starting:
            self._due = max(self._due, now - BURST_S) + min(SPREAD * self._latency / self._limit, LONGEST_SPREAD_S)
        if self._tokens is not None:
            self._tokens_due = max(self._tokens_due, now) + tokens / self._tokens
        return now

    def answered(self, sent_at: float) -> None:
        """The teacher took it: an answer, or a refusal of this request alone."""
        now = self._clock()
        self.in_flight -= 1
        self._gates = 0
        self._accepted += self._since is not None and sent_at >= self._since  # else it was counted when it was in flight
        latency = now - sent_at
        self._latency = latency if not self._latency else 0.9 * self._latency + 0.1 * latency
        if self._latency > self._timeout / 2 or sent_at < self._cut_at:
            return  # it is slow as it is, or speaks of a time before the cut
        self._limit = min(self._most, self._limit + (2.0 if self._starting else 1.0 / self._limit))

    def busy(self, sent_at: float, retry_after_s: float | None) -> None:
        """429: close the gate, and learn from it once for all requests that were in flight together."""
        now = self._clock()
        self.in_flight -= 1
        self.refused += 1
        if sent_at >= self._cut_at:
            self._gates += 1
            self._cut(0.7, now)
            self._learn(now, retry_after_s)
        if retry_after_s is None:
            retry_after_s = self._jitter(0.5, 1.0) * min(60.0, FIRST_GATE_S * 2 ** min(self._gates - 1, 6))
        self.wait(retry_after_s)

    def late(self, sent_at: float) -> None:
        """No answer in time."""
        self.failed()
        if sent_at >= self._cut_at:
            self._cut(0.5, self._clock())

    def failed(self) -> None:
        """It went wrong in another way, which says nothing of the pace."""
        self.in_flight -= 1

    def wait(self, seconds: float) -> None:
        """Send nothing for so long, whoever was told so."""
        # not to the moment: others who were told the same come back then
        until = self._clock() + min(seconds, LONGEST_GATE_S) + self._jitter(0.005, 0.05)
        self.gate_until = max(self.gate_until, until)

    def _cut(self, factor: float, now: float) -> None:
        self._starting = False
        self._cut_at = now
        self._limit = max(1.0, self._limit * factor)

    def _grown(self, rate: float, now: float) -> float:
        """A rate creeps up again: the bound may have been a passing one."""
        gap = min(max(0.0, now - max(self._rate_at, self.gate_until)), LONGEST_GAP_S)
        self._rate_at = now
        if self._allowed is not None:
            return min(self._allowed, rate * math.pow(RETURN, gap))
        growth = SEARCH if self._ceiling == math.inf else RETURN if rate < USED * self._ceiling else CREEP
        return rate * math.pow(growth, gap)

    def _learn(self, now: float, retry_after_s: float | None) -> None:
        if self._since is None:
            return
        if self._accepted < FEW and self._rate is not None:
            return
        self._accepted += max(0, self.in_flight)  # most of them are on their way to an answer
        elapsed = max(now - self._since, 1e-3)
        if self._rate is None:
            # as many as it took, in the time it wants to be left alone
            told = FIRST_GATE_S if retry_after_s is None else min(retry_after_s, LONGEST_GAP_S)
            self._rate = max(1.0, self._accepted) / max(elapsed, told)
        elif self._allowed is None:
            asking = max(now - max(self._since, self.gate_until), 1e-3)
            with_pauses, without = self._accepted / elapsed, self._accepted / asking
            step = math.sqrt(SEARCH) if self._ceiling == math.inf else CREEP
            self._ceiling = max(self._rate / step, with_pauses)
            self._rate = min(with_pauses**0.2 * without**0.8, self._ceiling)  # weights and growth: by simulation, test_pace.py
        else:
            self._rate *= USED  # it was told a rate that is too high
        self._rate_at = self._due = now
        self._accepted, self._since = 0, now
