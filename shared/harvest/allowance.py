"""What all workers of a harvest may send together: one rate, one gate and one budget, leased in blocks.

Nothing here knows of a cluster: an `Allowance` is asked by whoever carries a `Report` there and a `Lease` back.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from shared.harvest.budget import Account, reached
from shared.harvest.pace import BEHIND_S, Pace
from shared.settings import BudgetSettings

HORIZON_S = 0.25
"""A block is what a worker's share of the rate gives it in about this time: what is leased cannot be called back."""
LEASES_PER_S = 500
"""At most, for which blocks become larger: an actor of Ray's answers a thousand calls a second or a few."""
UNBOUND = 64
"""Requests of a block while no rate is known."""
LATER_S = 0.1
"""After which to ask again, where nothing can be leased now."""
LONGEST_LATER_S = 1.0
ACTIVE_S = 12.0
"""A worker that has reported within so many seconds is at work."""
SILENT_S = 30.0
"""A worker that has not reported for so long is dead: what it had leased counts as spent."""
AHEAD = 8
"""Blocks by which the account on disk is ahead of what is leased: it is written so much less often."""


@dataclass(frozen=True, slots=True)
class Report:
    """What a worker has done since it reported last, and what it wants."""

    worker: str
    want: int = 0
    """Requests."""
    number: int = 0
    """Of this report among the worker's, from 1: one that comes twice is taken note of once. 0: it cannot come twice."""
    tokens: float = 0.0
    """Of one of them on average, with the most it may be answered with."""
    most_cost: float = 0.0
    """Of one of them; the same in all reports of a worker."""
    sent: int = 0
    returned: int = 0
    """Leased and not used."""
    settled: int = 0
    """Sent and over."""
    spent: float = 0.0
    """What the settled ones have cost."""
    answered_s: tuple[float, ...] = ()
    """How long ago the requests were sent that were taken by the teacher."""
    refused_s: tuple[float, ...] = ()
    """The same of those that were refused with 429."""
    gate_s: float = 0.0
    """How long the teacher still wants to be left alone."""
    last: bool = False
    """Whether the worker is done: it returns all it has not used."""


@dataclass(frozen=True, slots=True)
class Lease:
    """What a worker may send: so many requests, the first in `start_s`, then one every `every_s`."""

    requests: int = 0
    start_s: float = 0.0
    every_s: float = 0.0
    gate_s: float = 0.0
    """How long nobody may send anything."""
    later_s: float = 0.0
    """After which to ask again, where there is nothing to lease now."""
    spent: str = ""
    """Which cap is reached: nothing more will be leased. Every lease says so once the time is up, whether more is wanted or not."""
    ending: bool = False
    """Whether the harvest ends, and what is in flight is waited for."""


@dataclass(slots=True)
class _Share:
    """What a worker has."""

    most_cost: float
    leased: int = 0
    """Neither settled nor returned."""
    flying: int = 0
    """Sent and not over."""
    heard: float = 0.0
    number: int = 0
    """Of its last report."""
    said: Lease | None = None
    """What that was answered with."""
    ended: bool = False


class _Timeline(Pace):
    """The pace of all together. Requests in flight are bounded where they are sent from."""

    def __init__(self, **options: float | Callable[[], float] | None) -> None:
        super().__init__(2**31, **options)  # type: ignore[arg-type]

    def lease(self, requests: int, tokens: float) -> tuple[float, float]:
        """The seconds until the first of so many requests and from each to the next."""
        now, every = self._clock(), 0.0
        start = now
        if self._rate is not None:
            self._rate = self._grown(self._rate, now)
            every = 1 / self._rate
            start = self._due = max(self._due, now - BEHIND_S)
        if self._tokens is not None and tokens:
            every = max(every, tokens / self._tokens)
            start = max(start, self._tokens_due)
            self._tokens_due = max(self._tokens_due, now) + requests * tokens / self._tokens
        if every:
            self._due = start + requests * every
        return max(0.0, start - now), every

    def were_sent(self, requests: int, oldest_s: float) -> None:
        """`oldest_s`: how long ago the first of them was sent."""
        if requests and self._since is None:
            self._since = self._clock() - oldest_s

    def were_taken(self, ages_s: tuple[float, ...]) -> None:
        for age_s in ages_s:
            self.answered(self._clock() - age_s)

    def were_refused(self, ages_s: tuple[float, ...], gate_s: float) -> None:
        for age_s in sorted(ages_s, reverse=True):
            self.busy(self._clock() - age_s, gate_s)
        if gate_s and not ages_s:
            self.wait(gate_s)

    @property
    def gate_s(self) -> float:
        return max(0.0, self.gate_until - self._clock())

    @property
    def ahead_s(self) -> float:
        """For how long requests are leased already."""
        return max(self._due, self._tokens_due) - self._clock()


class Allowance:
    """Leases what may be sent. The sum of what is leased never passes the rate or a cap, whatever becomes of the workers.

    `keep` makes the account durable. It counts as spent what is leased and a little more, so that it is true after this process has died
    at any instant; `close` writes what was really spent.
    """

    def __init__(
        self,
        caps: BudgetSettings,
        account: Account,
        keep: Callable[[Account], None],
        *,
        requests_per_minute: float | None = None,
        tokens_per_minute: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._caps, self._keep, self._clock = caps, keep, clock
        self._pace = _Timeline(requests_per_minute=requests_per_minute, tokens_per_minute=tokens_per_minute, clock=clock)
        self._requests, self._cost = account.requests, account.cost
        """Sent or leased, and what that may cost at most."""
        self._before_s, self._started = account.seconds, clock()
        self._kept = account
        self._shares: dict[str, _Share] = {}
        self._looked_at, self._active = -math.inf, 0
        self._flying = 0
        self.ending = False
        """To be set where nobody is to send anything more."""
        self.leases = 0

    def lease(self, report: Report) -> Lease:
        """Take note of a report and lease what is wanted, or a part of it; the same report again gets the same answer.

        Raises what `keep` raises: then nothing is leased.
        """
        now = self._clock()
        if now - self._looked_at >= HORIZON_S:  # not at every lease: there may be thousands of workers
            self._look(now)
        share = self._shares.setdefault(report.worker, _Share(report.most_cost))
        share.heard = now
        if report.number and report.number <= share.number:
            if share.said is not None or report.number < share.number:
                return share.said or self._nothing()
        else:
            share.number, share.said = report.number, None
            self._note(share, report)
        lease = self._nothing() if report.last or not report.want else self._leased(report, share)
        try:
            self._write()
        except BaseException:
            self._return(share, lease.requests)
            raise
        share.said = lease
        return lease

    def _leased(self, report: Report, share: _Share) -> Lease:
        if self.ending or self.late:
            return self._nothing()
        if (gate_s := self._pace.gate_s) > 0:
            return self._nothing(later_s=min(gate_s, LONGEST_LATER_S))
        if self._pace.ahead_s > max(LONGEST_LATER_S, HORIZON_S * len(self._shares)):
            return self._nothing(later_s=LATER_S)  # enough is leased for that long
        requests = self._affordable(min(report.want, self._block), share.most_cost)
        if not requests:
            # what others do not use of theirs may be enough
            hope = any(other.leased > 0 for other in self._shares.values())
            return self._nothing(later_s=LATER_S) if hope else self._nothing(spent=self._explain())
        start_s, every_s = self._pace.lease(requests, report.tokens)
        share.leased += requests
        self._requests += requests
        self._cost += requests * share.most_cost
        self.leases += 1
        return Lease(requests, start_s, every_s)

    def _nothing(self, *, later_s: float = 0.0, spent: str = "") -> Lease:
        spent = spent or (self._explain() if self.late else "")
        return Lease(gate_s=self._pace.gate_s, later_s=later_s, spent=spent, ending=self.ending)

    def _note(self, share: _Share, report: Report) -> None:
        pace = self._pace
        share.flying += report.sent
        self._flying += report.sent
        pace.in_flight = self._flying
        pace.were_sent(report.sent, max((*report.answered_s, *report.refused_s), default=0.0))
        pace.were_taken(report.answered_s)
        pace.were_refused(report.refused_s, report.gate_s)
        over = min(report.settled, share.flying)
        share.flying -= over
        self._flying -= over
        pace.in_flight = self._flying
        # of what was leased before this process began nothing is given back: the account it began with counts all of it
        settled = min(report.settled, share.leased)
        share.leased -= settled
        if settled:
            self._cost += report.spent * settled / report.settled - settled * share.most_cost
        self._return(share, min(report.returned, share.leased))
        if report.last:
            self._return(share, share.leased)
            self._flying -= share.flying
            share.flying, share.ended = 0, True

    def _return(self, share: _Share, requests: int) -> None:
        share.leased -= requests
        self._requests -= requests
        self._cost -= requests * share.most_cost

    def _look(self, now: float) -> None:
        """Count who is at work, and forget the dead: what they had leased stays spent."""
        self._looked_at = now
        for worker in [name for name, share in self._shares.items() if now - share.heard > SILENT_S]:
            self._flying -= self._shares.pop(worker).flying
        self._active = sum(not share.ended and now - share.heard < ACTIVE_S for share in self._shares.values())

    @property
    def _block(self) -> int:
        rate = self._pace.rate
        return UNBOUND if rate is None else max(int(rate * HORIZON_S / max(self._active, 1)), math.ceil(rate / LEASES_PER_S))

    def _affordable(self, requests: int, most_cost: float) -> int:
        caps = self._caps
        if caps.requests is not None:
            requests = min(requests, caps.requests - self._requests)
        if caps.cost is not None and most_cost:
            requests = min(requests, int((caps.cost - self._cost) / most_cost))
        return max(0, requests)

    @property
    def late(self) -> bool:
        """Whether the time is up."""
        return self._caps.seconds is not None and self._seconds >= self._caps.seconds

    @property
    def account(self) -> Account:
        """What is spent, with all that is leased."""
        return Account(requests=self._requests, cost=max(0.0, self._cost), seconds=round(self._seconds, 3))

    @property
    def _seconds(self) -> float:
        return self._before_s + self._clock() - self._started

    def _explain(self) -> str:
        return reached(self._caps, self.account, late=self.late)

    def _write(self) -> None:
        """Keep the account, if what is leased is not covered by what was kept."""
        account, caps = self.account, self._caps
        if account.requests <= self._kept.requests and account.cost <= self._kept.cost:
            return
        requests = AHEAD * self._block * max(1, self._active)
        cost = requests * max((share.most_cost for share in self._shares.values()), default=0.0)
        # where there is a cap, a process that dies may waste a twentieth of what is left
        if caps.requests is not None:
            requests = min(requests, (caps.requests - account.requests) // 20)
        if caps.cost is not None:
            cost = min(cost, (caps.cost - account.cost) / 20)
        kept = Account(requests=account.requests + max(0, requests), cost=account.cost + max(0.0, cost), seconds=account.seconds)
        self._keep(kept)
        self._kept = kept

    def close(self) -> None:
        """Lease nothing more, and keep what was really spent, and leased by workers that never came back. Raises what `keep` raises."""
        self.ending = True  # else what is leased from now on would not be in the account that is kept
        self._keep(self.account)
