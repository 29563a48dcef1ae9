"""Letting a model in this process answer: every prompt once, the same lines however often it was stopped."""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.artifacts import Ledger
from shared.collect import Collected, answer_offline, answers, in_process
from shared.contracts import Completion, GenerationRequest, Response, Sampling
from shared.harvest.ask import Ask

SAMPLES = 3


def asks_for(count: int, samples: int = SAMPLES) -> list[Ask]:
    sampling = Sampling(temperature=0.8, seed=7)
    return [Ask(f"e{i}", GenerationRequest(prompt=f"prompt {i}", n=samples, sampling=sampling), "m", "m", "local") for i in range(count)]


def lines(path: Path) -> list[tuple[str, str, int, str, str]]:
    """What a ledger says, without times: sorted, so that the order of arrival does not matter."""
    rows = [Response.model_validate_json(line) for line in path.read_text().splitlines()]
    return sorted((r.key, r.example_id, r.sample, r.status, r.text) for r in rows)


class FakeModel:
    """Texts depend on the whole batch and the seed, as with one stream of random numbers; it may stop in the middle of all."""

    def __init__(self, *, calls: int = 10**9, longest: int = 10**9) -> None:
        self.calls, self.longest = calls, longest
        self.batches: list[tuple[tuple[str | None, ...], int | None]] = []

    def fits(self, request: GenerationRequest) -> bool:
        return len(request.prompt or "") <= self.longest

    def generate(self, requests: Sequence[GenerationRequest], *, seed: int | None) -> list[list[Completion]]:
        if len(self.batches) == self.calls:
            raise KeyboardInterrupt
        self.batches.append((tuple(r.prompt for r in requests), seed))
        stream = random.Random(json.dumps(self.batches[-1]))
        return [[Completion(text=f"{r.prompt} {stream.random()}", finish_reason="stop") for _ in range(r.n)] for r in requests]


def offline(model: FakeModel, asks: Sequence[Ask], path: Path, *, chunk: int = 4, seed: int | None = 3) -> Collected:
    with Ledger(path, Response) as ledger:
        return answer_offline(in_process(model), asks, ledger, chunk=chunk, what="test", seed=seed)


@pytest.mark.parametrize("prompts", [0, 1, 3, 4, 5])
def test_a_model_in_this_process_answers_every_prompt_once_in_chunks(tmp_path: Path, prompts: int) -> None:
    model, asks = FakeModel(), asks_for(prompts)
    collected = offline(model, asks, tmp_path / "l.jsonl")
    assert (collected.answers, collected.missing) == (prompts * SAMPLES, 0)
    assert sorted(p or "" for batch, _ in model.batches for p in batch) == sorted(a.request.prompt or "" for a in asks)
    assert len(model.batches) == -(-prompts // 4)
    assert len({seed for _, seed in model.batches}) == len(model.batches)


@settings(max_examples=60, deadline=None)
@given(prompts=st.integers(0, 9), samples=st.integers(1, 3), chunk=st.integers(1, 5), data=st.data())
def test_a_model_stopped_anywhere_and_started_again_leaves_the_lines_of_one_that_was_not(
    prompts: int, samples: int, chunk: int, data: st.DataObject
) -> None:
    asks = asks_for(prompts, samples)
    with tempfile.TemporaryDirectory() as folder:
        whole, cut = Path(folder) / "whole.jsonl", Path(folder) / "cut.jsonl"
        offline(FakeModel(), asks, whole, chunk=chunk)
        content = whole.read_bytes()
        kept = int(data.draw(st.floats(0, 1)) * len(content))  # a share: latencies make the length differ from time to time
        cut.write_bytes(content[:kept])  # killed: the ledger ends at any byte
        try:
            offline(FakeModel(calls=data.draw(st.integers(0, 9))), asks, cut, chunk=chunk)
        except KeyboardInterrupt:
            offline(FakeModel(), asks, cut, chunk=chunk)
        assert lines(cut) == lines(whole)
        finished = FakeModel()
        offline(finished, asks, cut, chunk=chunk)
        assert finished.batches == []


def test_the_order_in_which_prompts_are_given_does_not_change_their_answers(tmp_path: Path) -> None:
    offline(FakeModel(), asks_for(9), tmp_path / "a.jsonl")
    offline(FakeModel(), asks_for(9)[::-1], tmp_path / "b.jsonl")
    assert lines(tmp_path / "a.jsonl") == lines(tmp_path / "b.jsonl")


def test_prompts_of_like_length_share_a_chunk(tmp_path: Path) -> None:
    sampling = Sampling()
    asks = [Ask(str(i), GenerationRequest(prompt="x" * (1 + i % 2 * 99), sampling=sampling), "m", "m") for i in range(8)]
    model = FakeModel()
    offline(model, asks, tmp_path / "l.jsonl")
    assert [{len(p or "") for p in batch} for batch, _ in model.batches] == [{1}, {100}]


def test_a_prompt_too_long_for_the_model_is_a_failed_row_and_the_others_are_answered(tmp_path: Path) -> None:
    asks = [*asks_for(3), Ask("long", GenerationRequest(prompt="x" * 99, n=2), "m", "m")]
    collected = offline(FakeModel(longest=20), asks, tmp_path / "l.jsonl")
    assert (collected.answers, collected.failed) == (3 * SAMPLES, {"too_long": 2})
    assert collected.explain() == "4 prompts, 9 answers, 2 failed (2 too_long), 0 cut off"
    again = FakeModel(longest=20)
    offline(again, asks, tmp_path / "l.jsonl")
    assert again.batches == []


def test_without_a_seed_the_model_gets_none(tmp_path: Path) -> None:
    model = FakeModel()
    offline(model, asks_for(1), tmp_path / "l.jsonl", seed=None)
    assert [seed for _, seed in model.batches] == [None]


def test_examples_that_ask_the_same_share_a_key_and_each_has_its_rows(tmp_path: Path) -> None:
    request = GenerationRequest(prompt="the same", n=2)
    asks = [Ask(example, request, "m", "m", "local") for example in ("a", "b")]
    collected = offline(FakeModel(), asks, tmp_path / "l.jsonl")
    assert (collected.answers, collected.missing) == (4, 0)
    with Ledger(tmp_path / "l.jsonl", Response) as ledger:
        found = answers(asks, ledger)
    assert [[(row.example_id, row.sample) for row in rows] for rows in found] == [[("a", 0), ("a", 1)], [("b", 0), ("b", 1)]]


def test_answers_come_by_ask_and_sample_the_last_of_several_lines_and_without_those_that_are_not_there(tmp_path: Path) -> None:
    asks, path = asks_for(2), tmp_path / "l.jsonl"
    offline(FakeModel(), asks, path)
    rows = [Response.model_validate_json(line) for line in path.read_text().splitlines()]
    kept = [row for row in rows if (row.example_id, row.sample) != ("e0", 1)]
    again = next(row for row in rows if row.example_id == "e1").model_copy(update={"text": "asked again"})
    path.write_text("".join(row.model_dump_json() + "\n" for row in [*kept, again]))
    with Ledger(path, Response) as ledger:
        first, second = answers(asks, ledger)
    assert [row.sample for row in first] == [0, 2]
    assert second[again.sample].text == "asked again"


def test_empty_answers_are_failed_rows_cut_off_ones_are_counted_and_half_characters_are_mended(tmp_path: Path) -> None:
    class Odd(FakeModel):
        def generate(self, requests: Sequence[GenerationRequest], *, seed: int | None) -> list[list[Completion]]:
            return [
                [
                    Completion(text=" \n", finish_reason="stop"),
                    Completion(text="half \ud83d of a smile", finish_reason="length"),
                    Completion(text="half ? of a smile", finish_reason="stop"),
                ]
                for _ in requests
            ]

    collected = offline(Odd(), asks_for(2), tmp_path / "l.jsonl")
    assert (collected.answers, collected.failed, collected.cut_off) == (4, {"empty": 2}, 2)
    assert collected.failed_fraction == pytest.approx(1 / 3)
    assert collected.distinct_fraction == 0.5
    assert {text for *_, text in lines(tmp_path / "l.jsonl")} == {"", "half ? of a smile"}


def test_a_census_of_nothing_divides_by_nothing() -> None:
    nothing = Collected(prompts=0, answers=0, failed={}, missing=0, cut_off=0, distinct_fraction=1.0)
    assert (nothing.failed_fraction, nothing.counts()["last_command"]["rows_per_s"]) == (0.0, 0.0)
    assert nothing.explain() == "0 prompts, 0 answers, none failed, 0 cut off"
