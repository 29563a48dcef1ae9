"""What one key may ask for: exact at the bound, told when to come back, shared by all workers, and the queue before the engine."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.contracts import GenerationRequest, Sampling
from shared.errors import RequestRefused
from shared.http.keys import Key, KeyLimits
from shared.http.limits import CHARACTERS_A_TOKEN, Counts, Exhausted, QueueFull, Slots


@dataclass
class Clock:
    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


def key(index: int = 0, **limits: int) -> Key:
    return Key(index, f"key{index}", b"", KeyLimits(**limits))


def asking(max_tokens: int = 10, n: int = 1) -> GenerationRequest:
    return GenerationRequest(prompt="x", n=n, sampling=Sampling(max_tokens=max_tokens))


def test_a_key_asks_as_often_as_it_may_in_a_minute_and_is_told_when_there_is_room_again() -> None:
    clock, alice = Clock(), key(requests_per_minute=2)
    counts = Counts([alice], clock=clock)
    counts.ask(alice)
    clock.now += 20
    counts.ask(alice)
    clock.now += 10
    with pytest.raises(Exhausted) as full:
        counts.ask(alice)
    assert (full.value.limit, full.value.retry_after_s) == ("requests_per_minute", 30)
    clock.now += 30
    counts.ask(alice)
    with pytest.raises(Exhausted) as full:
        counts.ask(alice)
    assert full.value.retry_after_s == 20


@settings(max_examples=60, deadline=None)
@given(limit=st.integers(1, 7), pauses=st.lists(st.floats(0, 40), max_size=60))
def test_in_no_60_seconds_are_there_more_requests_than_the_limit_and_none_is_refused_without_need(limit: int, pauses: list[float]) -> None:
    clock, alice = Clock(), key(requests_per_minute=limit)
    counts, taken = Counts([alice], clock=clock), []
    for pause in pauses:
        clock.now += pause
        recent = [t for t in taken if clock.now - t < 60]
        try:
            counts.ask(alice)
        except Exhausted:
            assert len(recent) == limit
        else:
            assert len(recent) < limit
            taken.append(clock.now)


def test_one_key_does_not_use_up_anothers_limit() -> None:
    keys = [key(0, requests_per_minute=1), key(1, requests_per_minute=1), key(2)]
    counts = Counts(keys)
    for one in keys:
        counts.ask(one)
    for one in keys[:2]:
        with pytest.raises(Exhausted):
            counts.ask(one)
    counts.ask(keys[2])


def test_as_many_requests_are_held_at_a_time_as_a_key_may() -> None:
    alice = key(concurrent_requests=2)
    counts = Counts([alice])
    leases = [counts.hold(alice, asking()) for _ in range(2)]
    with pytest.raises(Exhausted) as full:
        counts.hold(alice, asking())
    assert full.value.limit == "concurrent_requests"
    counts.settle(leases[0], 5)
    counts.hold(alice, asking())


def test_characters_are_reserved_before_they_are_generated_and_what_was_not_generated_is_given_back() -> None:
    wish = 10 * CHARACTERS_A_TOKEN
    alice = key(characters_per_day=2 * wish)
    counts = Counts([alice])
    first, second = counts.hold(alice, asking()), counts.hold(alice, asking())
    with pytest.raises(Exhausted) as full:  # nothing is generated yet, all is promised
        counts.hold(alice, asking(max_tokens=1))
    assert (full.value.limit, full.value.retry_after_s) == ("characters_reserved", 1.0)  # it may fit as soon as they are done
    counts.settle(first, 0)
    counts.settle(second, wish)
    counts.settle(counts.hold(alice, asking()), wish)
    with pytest.raises(Exhausted) as full:
        counts.hold(alice, asking(max_tokens=1))
    assert full.value.limit == "characters_per_day"


def test_a_new_day_begins_at_midnight_utc_and_the_key_is_told_when_that_is() -> None:
    wish, wall = CHARACTERS_A_TOKEN, Clock(86_400 * 20_000 + 80_000.0)
    alice = key(characters_per_day=wish)
    counts = Counts([alice], wall=wall)
    counts.settle(counts.hold(alice, asking(max_tokens=1)), wish)
    with pytest.raises(Exhausted) as full:
        counts.hold(alice, asking(max_tokens=1))
    assert full.value.retry_after_s == 6400
    wall.now += 6400
    counts.hold(alice, asking(max_tokens=1))


def test_a_request_for_more_than_a_day_can_give_is_refused_for_good_and_not_put_off() -> None:
    alice = key(characters_per_day=100)
    with pytest.raises(RequestRefused, match="lower n or max_tokens"):
        Counts([alice]).hold(alice, asking(max_tokens=10, n=2))


def test_workers_count_together_and_a_dead_one_gives_back_what_it_held() -> None:
    alice = key(requests_per_minute=100, concurrent_requests=4)
    counts = Counts([alice], workers=2)
    ready, told = os.pipe()
    child = os.fork()
    if not child:
        counts.worker = 1
        for _ in range(30):
            counts.ask(alice)
        for _ in range(4):
            counts.hold(alice, asking())
        os.write(told, b"x")
        signal.pause()
    os.read(ready, 1)
    for _ in range(70):
        counts.ask(alice)
    with pytest.raises(Exhausted):
        counts.ask(alice)
    with pytest.raises(Exhausted):
        counts.hold(alice, asking())
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    counts.forget(1)
    counts.hold(alice, asking())


def test_a_worker_killed_while_it_counts_does_not_stop_the_others() -> None:
    alice = key(requests_per_minute=1000)
    counts = Counts([alice], workers=2)
    ready, told = os.pipe()
    child = os.fork()
    if not child:
        with counts._locked:
            os.write(told, b"x")
            signal.pause()
    os.read(ready, 1)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    counts.ask(alice)


def test_processes_that_count_at_the_same_time_lose_nothing() -> None:
    alice = key(requests_per_minute=4000)
    counts = Counts([alice], workers=4)
    children = []
    for worker in range(4):
        child = os.fork()
        if not child:
            counts.worker = worker
            for _ in range(1000):
                counts.ask(alice)
            os._exit(0)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    with pytest.raises(Exhausted):
        counts.ask(alice)


async def hold(slots: Slots, gate: asyncio.Event) -> None:
    """Take a slot and keep it until the gate opens."""
    await slots.take()
    try:
        await gate.wait()
    finally:
        slots.give()


def test_what_finds_no_slot_waits_and_what_finds_no_place_to_wait_is_refused_at_once() -> None:
    async def run() -> None:
        told: list[int] = []
        slots, gate = Slots(1, 1, 60, tell=told.append), asyncio.Event()
        holder = asyncio.create_task(hold(slots, gate))
        await asyncio.sleep(0)
        waiter = asyncio.create_task(hold(slots, gate))
        await asyncio.sleep(0)
        assert slots.waiting == 1
        began = time.monotonic()
        with pytest.raises(QueueFull) as full:
            await hold(slots, gate)
        assert time.monotonic() - began < 1
        assert full.value.retry_after_s
        gate.set()
        await asyncio.gather(holder, waiter)
        assert (slots.waiting, told) == (0, [1, -1])

    asyncio.run(run())


def test_nothing_waits_longer_than_the_queue_allows_and_who_gives_up_leaves_no_trace() -> None:
    async def run() -> None:
        slots, gate = Slots(1, 5, 0.05), asyncio.Event()
        holder = asyncio.create_task(hold(slots, gate))
        await asyncio.sleep(0)
        with pytest.raises(QueueFull):
            await hold(slots, gate)
        left = asyncio.create_task(hold(slots, gate))
        await asyncio.sleep(0)
        left.cancel()
        await asyncio.wait([left])
        assert slots.waiting == 0
        gate.set()
        await holder
        await hold(slots, gate)

    asyncio.run(run())
