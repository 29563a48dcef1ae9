"""A worker's side of an `Allowance`: the pace and the purse of one harvest among several."""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from shared.contracts import GenerationRequest
from shared.harvest.allowance import Lease, Report
from shared.harvest.budget import Prices, Reserved
from shared.harvest.pace import Pace
from shared.harvest.teacher import Answer

STALE_S = 0.25
"""A request that was due so long ago is not sent any more: others have their turn now."""
LOST_S = 60.0
"""For which an allowance may be out of reach."""


@dataclass(slots=True)
class _Block:
    """Leased requests that are left."""

    requests: int
    at: float
    """When the next is due."""
    every_s: float


class LeasedPace(Pace):
    """Sends when it has leased a request and its own bound of requests in flight lets it. Belongs to one event loop."""

    def __init__(
        self,
        most: int,
        ask: Callable[[Report], Awaitable[Lease]],
        *,
        worker: str,
        left: Callable[[], int],
        tokens: float,
        most_cost: float,
        timeout_s: float = math.inf,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`ask`: the allowance; `worker`: a name no other has; `left`: prompts that have not been drawn; `tokens`: of a request, on
        average; `most_cost`: of any of them."""
        super().__init__(most, timeout_s=timeout_s, clock=clock)
        self._ask, self._worker, self._left, self._a_request, self.most_cost = ask, worker, left, tokens, most_cost
        self._blocks: deque[_Block] = deque()
        self._asking: asyncio.Task[None] | None = None
        self._ask_at = self._asked_at = -math.inf
        self._last_block = self._reports = 0
        self.spent = ""
        """Which cap is reached."""
        self.ending = False
        self.error: Exception | None = None
        """The allowance has been out of reach for too long."""
        # since the last report
        self._sent = self._returned = self._settled = 0
        self._cost = 0.0
        self._answered: list[float] = []
        self._refused: list[float] = []
        self._gate_is_news = False

    def delay(self) -> float:
        if self.error is not None:
            raise self.error
        own = super().delay()
        if own == math.inf:
            return own
        if self.spent:
            return own  # nothing is leased any more: what is asked for next is refused by the purse
        self._drop_stale()
        self._renew()
        if not self._blocks:
            return math.inf
        return max(own, self._blocks[0].at - self._clock())

    def sent(self, tokens: int = 0) -> float:
        block = self._blocks[0]
        block.requests -= 1
        block.at = max(block.at, self._clock() - STALE_S) + block.every_s
        if not block.requests:
            self._blocks.popleft()
        self._sent += 1
        return super().sent()

    def answered(self, sent_at: float) -> None:
        super().answered(sent_at)
        self._answered.append(sent_at)

    def busy(self, sent_at: float, retry_after_s: float | None) -> None:
        super().busy(sent_at, retry_after_s)
        self._refused.append(sent_at)
        self._tell()

    def settled(self, cost: float) -> None:
        """A request is over and has cost so much."""
        self._settled += 1
        self._cost += cost

    def wait(self, seconds: float) -> None:
        super().wait(seconds)
        self._gate_is_news = True
        self._tell()

    def tell(self, every_s: float) -> None:
        """Report, if the last time is so long ago."""
        if self._clock() - self._asked_at >= every_s:
            self._tell()

    async def aclose(self) -> None:
        """Report for the last time and return what is left. Raises what the allowance raises."""
        if self._asking is not None:
            await asyncio.gather(self._asking, return_exceptions=True)
        self._returned += self._leased
        self._blocks.clear()
        await self._carried(self._report(0, last=True))

    @property
    def _leased(self) -> int:
        return sum(block.requests for block in self._blocks)

    def _learn(self, now: float, retry_after_s: float | None) -> None:
        """Rates are learned where all refusals are known."""

    def _drop_stale(self) -> None:
        """What could not be sent when it was due would come on top of what others send now."""
        now, gate = self._clock(), self.gate_until
        if self._blocks and max(now, gate) - self._blocks[0].at > STALE_S and (self._blocks[0].every_s or gate > now):
            self._returned += self._leased
            self._blocks.clear()

    def _renew(self) -> None:
        """Ask for more before all is used up."""
        if 2 * self._leased <= self._last_block and self._clock() >= self._ask_at:
            room = self.limit - self.in_flight - self._leased
            if want := min(room, self._left() or 1):
                self._tell(want)

    def _tell(self, want: int = 0) -> None:
        if self._asking is None or self._asking.done():
            self._asking = asyncio.get_running_loop().create_task(self._exchange(want))

    async def _exchange(self, want: int) -> None:
        try:
            self._take(await self._carried(self._report(want)), want)
            if self._gate_is_news:  # it has come meanwhile
                self._take(await self._carried(self._report(0)), 0)
        except Exception as exc:
            self.error = exc
        self._asking = None  # what is changed may be to ask again
        self.changed()

    async def _carried(self, report: Report) -> Lease:
        began, pause_s = self._clock(), 0.1
        while True:
            try:
                return await self._ask(report)
            except Exception:
                if self._clock() - began > LOST_S:
                    raise
                await asyncio.sleep(pause_s)
                pause_s = min(5.0, 2 * pause_s)

    def _take(self, lease: Lease, want: int) -> None:
        now = self._clock()
        self.spent, self.ending = lease.spent or self.spent, lease.ending or self.ending
        if lease.gate_s:
            self.gate_until = max(self.gate_until, now + lease.gate_s)
        if lease.requests:
            self._blocks.append(_Block(lease.requests, now + lease.start_s, lease.every_s))
            self._last_block = lease.requests
        elif want and not self.spent:
            self._ask_at = now + lease.later_s
            asyncio.get_running_loop().call_later(lease.later_s, lambda: self.changed())

    def _report(self, want: int, *, last: bool = False) -> Report:
        now = self._asked_at = self._clock()
        self._reports += 1
        report = Report(
            worker=self._worker,
            want=want,
            number=self._reports,
            tokens=self._a_request,
            most_cost=self.most_cost,
            sent=self._sent,
            returned=self._returned,
            settled=self._settled,
            spent=self._cost,
            answered_s=tuple(now - at for at in self._answered),
            refused_s=tuple(now - at for at in self._refused),
            gate_s=max(0.0, self.gate_until - now) if self._gate_is_news else 0.0,
            last=last,
        )
        self._gate_is_news = False
        self._sent = self._returned = self._settled = 0
        self._cost = 0.0
        self._answered, self._refused = [], []
        return report


class LeasedPurse:
    """Pays for what is leased: every request of a lease has its most set aside already."""

    def __init__(self, pace: LeasedPace, prices: Prices) -> None:
        self._pace, self._prices, self.priced = pace, prices, prices.priced
        self._spent = 0.0

    def reserve(self, request: GenerationRequest) -> Reserved | None:
        """None once a cap is reached."""
        return None if self._pace.spent else Reserved(request, self._pace.most_cost)

    def settle(self, reserved: Reserved, answer: Answer | None, *, billed: bool) -> None:
        """As `Budget.settle`."""
        cost = reserved.cost if answer is None and billed else 0.0
        if answer is not None and self.priced:
            cost = self._prices.of(reserved.request, answer)
        self._spent += cost
        self._pace.settled(cost)

    @property
    def spent(self) -> float:
        return self._spent

    @property
    def late(self) -> bool:
        return bool(self._pace.spent)

    def explain(self) -> str:
        return self._pace.spent

    def sync(self) -> None:
        """Its account is kept where it was leased."""
