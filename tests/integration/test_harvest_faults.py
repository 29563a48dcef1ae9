"""A teacher that fails in six ways in 11 of 100 calls: the ledger is that of one that never does.

The long form is in benchmarks/harvest.py; what goes wrong, and how often, in benchmarks/mock_teacher.py.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from harvests import harvested, mock_teacher, recipe

PROMPTS, SAMPLES = 300, 2
SEED = "14"
"""One that draws every fault at least twice among so many prompts."""


def test_500s_resets_hangs_garbage_truncated_bodies_and_wrong_charsets_leave_no_trace_in_the_ledger(tmp_path: Path) -> None:
    file = recipe(tmp_path, PROMPTS, samples=SAMPLES)
    with mock_teacher("--delay-ms", "5") as teacher:
        whole = harvested(file, tmp_path / "whole", teacher)
    with mock_teacher("--delay-ms", "5", "--faults", SEED) as teacher:
        plagued = harvested(file, tmp_path / "plagued", teacher, "--set", "teacher.timeout_s=6")
        counts = teacher.counts()
    assert Counter(status for *_, status, _ in whole) == {"ok": PROMPTS * SAMPLES}
    assert plagued == whole
    assert min(counts["faults"].values()) >= 2
    assert len(counts["faults"]) == 6
    assert PROMPTS < counts["calls"] <= PROMPTS + sum(counts["faults"].values())
