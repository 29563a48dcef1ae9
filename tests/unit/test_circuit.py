"""The circuit: a dead teacher is asked now and then only, for as long as there is patience."""

from __future__ import annotations

import math

import pytest

from shared.harvest.circuit import AT_FIRST_S, FIRST_PROBE_S, IN_A_ROW, LONGEST_PROBE_S, Circuit


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def circuit(patience_s: float = 300.0) -> tuple[Circuit, Clock]:
    """A circuit that always draws the longest pause."""
    clock = Clock()
    return Circuit(patience_s, clock=clock, jitter=lambda low, high: high), clock


def opened(patience_s: float = 300.0, *, lived: bool = True) -> tuple[Circuit, Clock]:
    tested, clock = circuit(patience_s)
    if lived:
        tested.lives()
    for _ in range(IN_A_ROW):
        tested.failed("HTTP 500")
    return tested, clock


def test_it_opens_after_failures_in_a_row_and_not_before() -> None:
    tested, _ = circuit()
    for _ in range(IN_A_ROW - 1):
        tested.failed("x")
    assert (tested.open, tested.delay(), tested.left_s, tested.explain()) == (False, 0, math.inf, "")
    tested.failed("x")
    assert tested.open
    assert tested.delay() == FIRST_PROBE_S


def test_an_answer_among_failures_keeps_it_closed_and_one_closes_it_again() -> None:
    tested, _ = circuit()
    for _ in range(5):
        for _ in range(IN_A_ROW - 1):
            tested.failed("x")
        tested.lives()
    assert not tested.open
    for _ in range(IN_A_ROW + 5):
        tested.failed("x")
    tested.lives()
    assert (tested.open, tested.delay(), tested.left_s) == (False, 0, math.inf)


def test_while_it_is_open_one_request_is_sent_at_a_time_after_pauses_that_double_to_half_a_minute() -> None:
    tested, clock = opened()
    pauses = []
    for _ in range(8):
        pauses.append(tested.delay())
        clock.now += tested.delay()
        assert tested.delay() == 0
        assert tested.sent()
        assert tested.delay() == math.inf
        clock.now += 5
        tested.failed("x", probe=True)
    assert pauses == [1, 2, 4, 8, 16, LONGEST_PROBE_S, LONGEST_PROBE_S, LONGEST_PROBE_S]


def test_older_requests_that_fail_one_after_the_other_send_no_second_one_to_see() -> None:
    tested, clock = opened()
    clock.now += tested.delay()
    tested.sent()
    for _ in range(60):
        clock.now += 1
        tested.failed("x")
        assert tested.delay() == math.inf
    tested.failed("x", probe=True)
    assert tested.delay() == 2 * FIRST_PROBE_S


def test_pauses_begin_anew_with_every_outage() -> None:
    tested, clock = opened()
    for _ in range(4):
        clock.now += tested.delay()
        tested.failed("x", probe=tested.sent())
    tested.lives()
    for _ in range(IN_A_ROW):
        tested.failed("x")
    assert tested.delay() == FIRST_PROBE_S


def test_a_request_that_is_sent_while_it_is_closed_is_none_to_see_with() -> None:
    tested, _ = circuit()
    assert not tested.sent()
    assert tested.delay() == 0


def test_patience_counts_from_the_first_of_the_failures_and_anew_after_an_answer() -> None:
    tested, clock = circuit(patience_s=100)
    tested.lives()
    tested.failed("x")
    clock.now += 60
    for _ in range(IN_A_ROW):
        tested.failed("x")
    assert tested.left_s == 40
    clock.now += 41
    assert tested.left_s == -1
    tested.lives()
    for _ in range(IN_A_ROW):
        tested.failed("x")
    assert tested.left_s == 100


@pytest.mark.parametrize(("patience_s", "left_s"), [(300, AT_FIRST_S), (5, 5)])
def test_a_teacher_that_has_never_answered_is_given_up_sooner(patience_s: float, left_s: float) -> None:
    tested, _ = opened(patience_s, lived=False)
    assert tested.left_s == left_s


def test_patience_begins_when_a_pause_that_was_asked_for_ends_but_not_again_and_again() -> None:
    tested, clock = circuit(patience_s=100)
    tested.lives()
    for _ in range(IN_A_ROW):
        tested.failed("HTTP 503", gate_until=clock.now + 600)
    assert tested.left_s == 700
    given_up = clock.now + 700 + 600 + 100  # one more pause may begin before the 700 s are over, and is waited out as well
    while tested.left_s > 0:
        clock.now += 600
        tested.failed("HTTP 503", gate_until=clock.now + 600)
    assert given_up - 700 < clock.now <= given_up + 600


def test_it_says_what_it_waits_for() -> None:
    tested, clock = opened()
    assert tested.explain() == "the teacher has not answered for 0 s (HTTP 500); next try in 1 s, giving up in 300 s"
    clock.now += 12
    tested.sent()
    assert tested.explain() == "the teacher has not answered for 12 s (HTTP 500); asking now, giving up in 288 s"
    clock.now += 400
    assert tested.explain().endswith("giving up in 0 s")
