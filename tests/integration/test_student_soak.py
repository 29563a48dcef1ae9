"""The short form of benchmarks/soak.py, on a tiny model: a mixture of all kinds of requests at twice what the server can do."""

from __future__ import annotations

import sys
from pathlib import Path

from tiny_servable import servable_llama

from shared.engines.convert import convert

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from soak import Words, soak

TINY = Words(
    short="word1 word2 word3",
    long="word4 word5 " * 15,
    overlong="word6 " * 500,
    short_tokens=16,
    long_tokens=80,
    samples=16,
)
"""For a model that reads 128 tokens."""
UNLOADED = "no request was refused: this was no soak"
"""The only problem where the machine stood still while the capacity was measured: then twice of it is no load."""


def test_an_overloaded_server_answers_all_that_it_accepts_and_is_as_before_afterwards(tmp_path: Path) -> None:
    folder = convert(str(servable_llama(tmp_path / "model")), tmp_path / "serving", name="tiny", quantization="float32")
    for _ in range(3):
        report = soak(folder, TINY, tmp_path / "log", seconds=20, capacity_s=4, options=("--max-queue", "32"))
        if report.problems != [UNLOADED]:
            break
    assert not report.problems, report.problems[:10]
    assert report.total("WRONG") == report.total("STUCK") == 0
