"""A harvest that is killed at any instant: nothing lost, nothing twice, nothing paid again but what was in flight.

The long form, 50 kills in 2,000 prompts, is in benchmarks/harvest.py.
"""

from __future__ import annotations

from pathlib import Path

from harvests import harvested, killed, mock_teacher, recipe

PROMPTS, SAMPLES, CONCURRENCY, KILLS = 300, 2, 16, 8
FEW_AT_ONCE = ("--set", f"harvest.concurrency={CONCURRENCY}")


def test_a_harvest_killed_eight_times_ends_with_the_lines_of_one_that_was_not_and_asks_again_only_what_was_in_flight(
    tmp_path: Path,
) -> None:
    file = recipe(tmp_path, PROMPTS, samples=SAMPLES)
    with mock_teacher("--delay-ms", "50") as teacher:
        whole = harvested(file, tmp_path / "whole", teacher)
    with mock_teacher("--delay-ms", "50") as teacher:
        cut = killed(file, tmp_path / "cut", teacher, *FEW_AT_ONCE, kills=KILLS, spread_s=0.2, seed=5)
        calls = teacher.calls()
    assert len(whole) == PROMPTS * SAMPLES
    assert cut.lines == whole
    assert cut.kills >= KILLS // 2
    assert max(cut.asked_again) <= CONCURRENCY
    assert len(calls) == PROMPTS
    assert sum(calls.values()) == PROMPTS + sum(cut.asked_again)
