"""The pace of a harvest, on a clock of its own: as fast as a teacher allows, and hardly ever refused."""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.harvest.pace import FIRST, FIRST_GATE_S, LONGEST_GATE_S, USED, Pace

RATE = 40.0
"""Requests/s that the simulated teachers allow."""


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def pace(most: int = 64, **how: Any) -> tuple[Pace, Clock]:
    """A pace that always draws the longest pause."""
    clock = Clock()
    return Pace(most, clock=clock, jitter=lambda low, high: high, **how), clock


class Teacher(Protocol):
    """Which requests a simulated teacher takes."""

    def takes(self, now: float) -> bool: ...


class Bucket:
    """So many tokens at most, filled up evenly."""

    def __init__(self, size: float) -> None:
        self._size, self._tokens, self._at = size, size, 0.0

    def takes(self, now: float) -> bool:
        self._tokens, self._at = min(self._size, self._tokens + (now - self._at) * RATE), now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True


class Window:
    """So many within any so many seconds."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self._taken = seconds, list[float]()

    def takes(self, now: float) -> bool:
        self._taken = [at for at in self._taken if at > now - self._seconds]
        if len(self._taken) >= RATE * self._seconds:
            return False
        self._taken.append(now)
        return True


class Slots:
    """So many at a time."""

    def __init__(self, slots: int, latency_s: float) -> None:
        self._slots, self._latency, self._busy = slots, latency_s, list[float]()

    def takes(self, now: float) -> bool:
        self._busy = [until for until in self._busy if until > now]
        if len(self._busy) >= self._slots:
            return False
        self._busy.append(now + self._latency)
        return True


@dataclass
class Outcome:
    seconds: float
    refused: int
    inside: int
    """Requests sent within a pause that had been asked for."""


def simulate(
    teacher: Teacher, prompts: int, *, seed: int, retry_after_s: float | None = 2.0, latency_s: float = 0.05, **how: float
) -> Outcome:
    """Harvest `prompts` answers, each after about `latency_s`; a refusal comes at once."""
    drawn, clock = random.Random(seed), Clock()
    paced = Pace(64, clock=clock, jitter=drawn.uniform, **how)
    events: list[tuple[float, int, bool, float]] = []
    left, done, calls, refused, inside = prompts, 0, 0, 0, 0
    closed_until = -math.inf
    while done < prompts:
        while left and paced.delay() == 0:
            sent_at = paced.sent()
            left, calls = left - 1, calls + 1
            inside += clock.now < closed_until
            taken = teacher.takes(clock.now)
            heapq.heappush(events, (clock.now + (latency_s * drawn.uniform(0.98, 1.02) if taken else 0.001), calls, taken, sent_at))
        ready_at = clock.now + paced.delay() if left else math.inf
        if not events or ready_at < events[0][0]:
            clock.now = ready_at + 1e-6
            continue
        clock.now, _, taken, sent_at = heapq.heappop(events)
        if taken:
            paced.answered(sent_at)
            done += 1
        else:
            paced.busy(sent_at, retry_after_s)
            closed_until = max(closed_until, clock.now + (retry_after_s or 0))
            left, refused = left + 1, refused + 1
    return Outcome(clock.now, refused, inside)


TEACHERS: dict[str, Callable[[], Teacher]] = {
    "bucket of a second": lambda: Bucket(RATE),
    "bucket of two seconds": lambda: Bucket(2 * RATE),
    "small bucket": lambda: Bucket(4),
    "window of a second": lambda: Window(1),
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", TEACHERS)
def test_a_rate_that_is_told_is_used_nearly_in_full_and_never_refused(name: str, seed: int) -> None:
    outcome = simulate(TEACHERS[name](), 400, seed=seed, requests_per_minute=60 * RATE)
    assert outcome.refused == 0
    assert 400 / RATE / outcome.seconds >= 0.95


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("name", "of_400", "of_4000"),
    [
        ("bucket of a second", 0.7, 0.8),
        ("bucket of two seconds", 0.9, 0.9),
        ("small bucket", 0.25, 0.7),
        ("window of a second", 0.55, 0.75),
    ],
)
def test_a_rate_that_nobody_told_is_found_with_few_refusals(name: str, of_400: float, of_4000: float, seed: int) -> None:
    """Every pause costs 2 s, be it asked for by one request too many: what is found out is paid for with it."""
    short, long = (simulate(TEACHERS[name](), prompts, seed=seed) for prompts in (400, 4000))
    assert short.inside == long.inside == 0
    assert short.refused / 400 <= 0.1
    assert long.refused / 4000 <= 0.05
    assert 400 / RATE / short.seconds >= of_400
    assert 4000 / RATE / long.seconds >= of_4000


def test_a_limit_by_the_minute_is_waited_for_and_not_hammered_at() -> None:
    """2,400 within any minute: the first are taken as fast as they come, and then none for the rest of the minute."""
    outcome = simulate(Window(60), 4000, seed=1)
    assert outcome.inside == 0
    assert outcome.refused <= 200
    assert outcome.seconds <= 1.5 * 60 * 2


def test_a_teacher_with_few_slots_is_kept_busy() -> None:
    """8 at a time of 50 ms each: 160/s."""
    outcome = simulate(Slots(8, 0.05), 4000, seed=1)
    assert outcome.refused / 4000 <= 0.1
    assert outcome.seconds <= 3 * 4000 / 160


def test_a_teacher_without_limits_is_asked_by_as_many_as_may_be_within_a_few_rounds() -> None:
    outcome = simulate(Slots(1000, 0.05), 6400, seed=1)
    assert outcome.refused == 0
    assert outcome.seconds <= 1.3 * 6400 / 64 * 0.05


# the gate


@settings(max_examples=100)
@given(
    waits=st.lists(st.tuples(st.floats(0, 5), st.one_of(st.none(), st.floats(0, 900))), min_size=1, max_size=6),
)
def test_nothing_may_be_sent_before_the_latest_of_all_pauses_is_over(waits: list[tuple[float, float | None]]) -> None:
    paced, clock = pace()
    until = 0.0
    for after, retry_after_s in waits:
        sent_at = paced.sent()
        clock.now += after
        paced.busy(sent_at, retry_after_s)
        until = max(until, clock.now + min(retry_after_s or 0, LONGEST_GATE_S))
        assert clock.now + paced.delay() >= until


@pytest.mark.parametrize("asked", [86_400.0, math.inf])
def test_a_pause_of_a_day_is_cut_to_ten_minutes_and_the_harvest_goes_on_after_it(asked: float) -> None:
    paced, clock = pace()
    paced.busy(paced.sent(), asked)
    assert paced.delay() == pytest.approx(LONGEST_GATE_S, abs=0.1)
    sent, begun = 0, clock.now + paced.delay()
    clock.now = begun
    while clock.now < begun + 300:
        if paced.delay() == 0:
            paced.answered(paced.sent())
            sent += 1
        clock.now += 0.1
    assert sent > 1000


@pytest.mark.parametrize("asked", [-5.0, math.nan, 0.0])
def test_a_pause_that_makes_no_sense_is_none(asked: float) -> None:
    paced, _ = pace()
    paced.busy(paced.sent(), asked)
    assert paced.delay() <= FIRST_GATE_S


def test_refusals_that_name_no_time_are_waited_out_longer_and_longer_up_to_a_minute() -> None:
    paced, clock = pace()
    pauses = []
    for _ in range(8):
        paced.busy(paced.sent(), None)
        pauses.append(round(paced.delay()))
        clock.now += paced.delay() + 1
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60]
    paced.answered(paced.sent())
    paced.busy(paced.sent(), None)
    assert round(paced.gate_until - clock.now) == 1


def test_refusals_without_end_are_no_crash() -> None:
    paced, clock = pace()
    for _ in range(3000):
        paced.busy(paced.sent(), None)
        clock.now = paced.gate_until
    paced.busy(paced.sent(), None)
    assert paced.gate_until - clock.now <= 61


@pytest.mark.parametrize("told", [None, 600.0])
def test_a_day_without_a_request_is_no_crash_and_no_burst(told: float | None) -> None:
    paced, clock = pace(requests_per_minute=told)
    for _ in range(6):
        paced.answered(paced.sent())
    paced.busy(paced.sent(), 1.0)
    clock.now += 86_400
    while paced.delay() == 0:
        paced.sent()
    assert paced.in_flight <= FIRST + 2 * 6  # by six answers
    assert paced.rate is not None
    assert math.isfinite(paced.rate)


# in flight


def test_no_more_are_in_flight_than_may_be_and_the_number_triples_with_every_round_until_then() -> None:
    paced, clock = pace(100)
    rounds = []
    for _ in range(4):
        sent = []
        while paced.delay() < math.inf:
            clock.now += paced.delay()
            sent.append(paced.sent())
        rounds.append(len(sent))
        clock.now += 10
        for at in sent:
            paced.answered(at)
    assert rounds == [16, 48, 100, 100]


@pytest.mark.parametrize("most", [1, 3, FIRST])
def test_the_bound_holds_from_the_first_request(most: int) -> None:
    paced, _ = pace(most)
    for _ in range(most):
        assert paced.delay() == 0
        paced.sent()
    assert paced.delay() == math.inf


def test_a_burst_of_refusals_counts_once_and_later_ones_again() -> None:
    paced, clock = pace()
    sent = [paced.sent() for _ in range(FIRST)]
    clock.now += 1
    for at in sent:
        paced.busy(at, 1.0)
    assert paced.limit == int(0.7 * FIRST)
    assert paced.refused == FIRST
    clock.now += 5
    paced.busy(paced.sent(), 1.0)
    assert paced.limit == int(0.7 * 0.7 * FIRST)


def test_a_burst_of_time_outs_halves_the_requests_in_flight_once() -> None:
    paced, clock = pace()
    sent = [paced.sent() for _ in range(FIRST)]
    clock.now += 120
    for at in sent:
        paced.late(at)
    assert (paced.limit, paced.in_flight) == (FIRST // 2, 0)


def test_at_least_one_may_always_be_in_flight() -> None:
    paced, clock = pace(2)
    for _ in range(50):
        clock.now += 1000
        at = paced.sent()
        clock.now += 1
        paced.late(at)
    assert paced.limit == 1


def test_answers_that_take_more_than_half_of_the_time_allowed_let_nothing_grow() -> None:
    paced, clock = pace(timeout_s=10)
    for _ in range(100):
        at = paced.sent()
        clock.now += 6
        paced.answered(at)
    assert paced.limit == FIRST
    for _ in range(100):
        at = paced.sent()
        clock.now += 1
        paced.answered(at)
    assert paced.limit > FIRST


def test_after_a_refusal_the_requests_in_flight_grow_by_one_a_round() -> None:
    paced, clock = pace()
    paced.busy(paced.sent(), 1.0)
    before = paced.limit
    for _ in range(5):
        clock.now += 100
        sent = [paced.sent() for _ in range(paced.limit)]
        clock.now += 100
        for at in sent:
            paced.answered(at)
    assert before + 4 <= paced.limit <= before + 6


def test_an_answer_from_before_a_cut_says_nothing_of_the_time_after_it() -> None:
    paced, clock = pace()
    old, refused = paced.sent(), paced.sent()
    clock.now += 1
    paced.busy(refused, 1.0)
    cut = paced.limit
    for _ in range(10):
        paced.answered(old)
        paced.in_flight += 1
    assert paced.limit == cut


# rates


def test_a_failure_of_another_kind_slows_nothing() -> None:
    paced, _ = pace()
    for _ in range(FIRST):
        paced.sent()
    for _ in range(FIRST):
        paced.failed()
    assert (paced.limit, paced.delay(), paced.rate, paced.in_flight) == (FIRST, 0, None, 0)


def test_tokens_by_the_minute_space_the_requests_by_what_they_may_cost() -> None:
    paced, clock = pace(1000, tokens_per_minute=60_000)
    sent_at = []
    for number in range(40):
        clock.now += paced.delay()
        sent_at.append(clock.now)
        paced.answered(paced.sent(500 if number % 2 else 1500))
    assert sent_at[-1] == pytest.approx(39_000 / (USED * 1000), rel=0.05)
    assert sent_at[1] >= 1.5


def test_requests_and_tokens_by_the_minute_hold_together() -> None:
    paced, clock = pace(1000, tokens_per_minute=60_000, requests_per_minute=60)
    for tokens, seconds in ((10, 1 / USED), (5000, 5 / USED)):
        for _ in range(3):
            clock.now += paced.delay()
            paced.answered(paced.sent(tokens))
        assert paced.delay() == pytest.approx(seconds, rel=0.1)


def test_a_told_rate_that_others_use_as_well_shrinks_and_comes_back() -> None:
    paced, clock = pace(requests_per_minute=600)
    told = paced.rate
    assert told is not None
    for _ in range(200):
        for _ in range(5):
            clock.now += paced.delay()
            paced.answered(paced.sent())
        clock.now += paced.delay()
        paced.busy(paced.sent(), 0.1)
    assert paced.rate is not None
    assert paced.rate < told
    for _ in range(3000):
        clock.now += paced.delay()
        paced.answered(paced.sent())
    assert paced.rate == pytest.approx(told)
