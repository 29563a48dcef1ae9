"""Collecting answers: nothing asked twice, nothing lost, the same lines however often it was cut short."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.artifacts import Ledger
from shared.collect import Ask, Collected, answer_offline, answers, collect
from shared.contracts import Completion, GenerationRequest, Message, Response, Sampling
from shared.errors import EngineError, RequestRefused, StorageError, TeacherRejected, TeacherUnavailable

SAMPLES = 3


def asks_for(count: int, samples: int = SAMPLES, seed: int | None = 7) -> list[Ask]:
    sampling = Sampling(temperature=0.8, seed=seed)
    return [Ask(f"e{i}", GenerationRequest(prompt=f"prompt {i}", n=samples, sampling=sampling), "http://t/v1", "m") for i in range(count)]


def text_of(request: GenerationRequest, index: int) -> str:
    return f"{request.prompt} with seed {(request.sampling.seed or 0) + index}"


class FakeEngine:
    """Answers with the prompt and the seed of each sample; `hook` may raise, wait or answer otherwise before that."""

    def __init__(self, hook: Callable[[GenerationRequest, int], list[Completion] | None] | None = None, *, most: int = 64) -> None:
        self.hook, self.most = hook, most
        self.requests: list[GenerationRequest] = []
        self.in_flight = self.peak = 0

    async def generate(self, request: GenerationRequest) -> list[Completion]:
        self.requests.append(request)
        self.in_flight += 1
        self.peak = max(self.peak, self.in_flight)
        try:
            await asyncio.sleep(0)
            answer = self.hook(request, len(self.requests)) if self.hook else None
            if answer is not None:
                return answer
            return [Completion(text=text_of(request, i), finish_reason="stop") for i in range(min(request.n, self.most))]
        finally:
            self.in_flight -= 1

    async def check(self) -> None: ...

    async def aclose(self) -> None: ...

    @property
    def asked(self) -> Counter[tuple[str | None, int | None]]:
        """How often each (prompt, seed of a sample) was asked for."""
        return Counter((r.prompt, (r.sampling.seed or 0) + i) for r in self.requests for i in range(r.n))


def run(engine: FakeEngine, asks: Sequence[Ask], path: Path, *, concurrency: int = 4, retry_failed: bool = False) -> Collected:
    with Ledger(path, Response) as ledger:
        return asyncio.run(collect(engine, asks, ledger, concurrency=concurrency, what="test", retry_failed=retry_failed))


def lines(path: Path) -> list[tuple[str, str, int, str, str]]:
    """What a ledger says, without times: sorted, so that the order of arrival does not matter."""
    rows = [Response.model_validate_json(line) for line in path.read_text().splitlines()]
    return sorted((r.key, r.example_id, r.sample, r.status, r.text) for r in rows)


def expected(asks: Sequence[Ask]) -> list[tuple[str, str, int, str, str]]:
    return sorted((a.key(i), a.example_id, i, "ok", text_of(a.request, i)) for a in asks for i in range(a.request.n))


# keys


def test_a_key_changes_with_everything_that_is_asked_and_not_with_the_number_of_samples() -> None:
    base = Ask("e", GenerationRequest(prompt="p", n=2, sampling=Sampling(seed=1)), "http://a/v1", "m", "completions")
    others = [
        Ask("f", base.request, base.identity, base.model, base.protocol),
        Ask("e", base.request, "http://b/v1", base.model, base.protocol),
        Ask("e", base.request, base.identity, "n", base.protocol),
        Ask("e", base.request, base.identity, base.model, "chat"),
    ]
    requests = [
        GenerationRequest(prompt="q", n=2, sampling=Sampling(seed=1)),
        GenerationRequest(messages=(Message(role="user", content="p"),), n=2, sampling=Sampling(seed=1)),
        GenerationRequest(prompt="p", n=2, sampling=Sampling(seed=2)),
        GenerationRequest(prompt="p", n=2, sampling=Sampling(seed=1, temperature=0.5)),
        GenerationRequest(prompt="p", n=2, sampling=Sampling(seed=1, stop=("\n",))),
        GenerationRequest(prompt="p", n=2, sampling=Sampling(seed=1, max_tokens=9)),
    ]
    others += [Ask("e", request, base.identity, base.model, base.protocol) for request in requests]
    keys = [base.key(0), base.key(1), *(o.key(0) for o in others)]
    assert len(set(keys)) == len(keys)
    assert Ask("e", base.request.model_copy(update={"n": 9}), base.identity, base.model, base.protocol).key(1) == base.key(1)


# over a network


@pytest.mark.parametrize("prompts", [0, 1, 3, 4, 5])
def test_every_sample_of_every_prompt_has_one_line_and_one_request_asks_for_all_of_a_prompt(tmp_path: Path, prompts: int) -> None:
    engine, asks = FakeEngine(), asks_for(prompts)
    collected = run(engine, asks, tmp_path / "l.jsonl", concurrency=4)
    assert lines(tmp_path / "l.jsonl") == expected(asks)
    assert [r.n for r in engine.requests] == [SAMPLES] * prompts
    assert (collected.prompts, collected.answers, collected.failed, collected.missing) == (prompts, prompts * SAMPLES, {}, 0)
    assert (collected.requests, collected.collected) == (prompts, prompts * SAMPLES)
    assert engine.peak == min(4, prompts)


def test_a_second_collection_asks_for_nothing(tmp_path: Path) -> None:
    asks = asks_for(5)
    first = run(FakeEngine(), asks, tmp_path / "l.jsonl")
    engine = FakeEngine()
    again = run(engine, asks, tmp_path / "l.jsonl")
    assert engine.requests == []
    assert (again.answers, again.requests) == (first.answers, 0)


@settings(max_examples=60, deadline=None)
@given(prompts=st.integers(0, 6), samples=st.integers(1, 5), data=st.data())
def test_whatever_part_of_the_lines_is_there_already_the_rest_is_asked_for_once_and_the_lines_are_the_same(
    prompts: int, samples: int, data: st.DataObject
) -> None:
    asks = asks_for(prompts, samples)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "l.jsonl"
        run(FakeEngine(), asks, path)
        whole = path.read_text().splitlines(keepends=True)
        kept = data.draw(st.lists(st.sampled_from(whole), unique=True)) if whole else []
        path.write_text("".join(kept) + data.draw(st.sampled_from(["", '{"key": "torn'])))
        engine = FakeEngine(most=data.draw(st.integers(1, 5)))
        collected = run(engine, asks, path, concurrency=data.draw(st.integers(1, 8)))
        assert lines(path) == expected(asks)
        assert collected.collected == len(whole) - len(kept)
        if engine.most >= samples:
            assert max(engine.asked.values(), default=1) == 1
            assert sum(engine.asked.values()) == len(whole) - len(kept)


def test_missing_samples_that_are_not_neighbours_are_asked_for_apart_with_their_own_seeds(tmp_path: Path) -> None:
    asks, path = asks_for(1, samples=5, seed=100), tmp_path / "l.jsonl"
    run(FakeEngine(), asks, path)
    rows = [Response.model_validate_json(line) for line in path.read_text().splitlines()]
    path.write_text("".join(row.model_dump_json() + "\n" for row in rows if row.sample in (1, 2)))
    engine = FakeEngine()
    run(engine, asks, path)
    assert sorted((r.sampling.seed, r.n) for r in engine.requests) == [(100, 1), (103, 2)]
    assert lines(path) == expected(asks)


def test_without_a_seed_none_is_sent(tmp_path: Path) -> None:
    engine = FakeEngine()
    run(engine, asks_for(1, seed=None), tmp_path / "l.jsonl")
    assert [r.sampling.seed for r in engine.requests] == [None]


def test_a_teacher_that_gives_one_choice_however_many_are_asked_for_is_asked_again_for_the_rest(tmp_path: Path) -> None:
    engine, asks = FakeEngine(most=1), asks_for(2, samples=3)
    collected = run(engine, asks, tmp_path / "l.jsonl")
    assert lines(tmp_path / "l.jsonl") == expected(asks)
    assert collected.requests == 6


def test_a_teacher_that_gives_too_many_choices_has_the_surplus_ignored(tmp_path: Path) -> None:
    surplus = [Completion(text=str(i), finish_reason="stop") for i in range(9)]
    collected = run(FakeEngine(lambda r, i: surplus), asks_for(1), tmp_path / "l.jsonl")
    assert collected.answers == SAMPLES


def test_a_teacher_that_gives_no_choices_is_not_asked_for_ever(tmp_path: Path) -> None:
    engine = FakeEngine(lambda r, i: [])
    collected = run(engine, asks_for(2), tmp_path / "l.jsonl")
    assert collected.failed == {"TooFewChoices": 2 * SAMPLES}
    assert len(engine.requests) == 2


def test_empty_answers_are_failed_rows_and_cut_off_ones_are_counted(tmp_path: Path) -> None:
    answer = [
        Completion(text=" \n", finish_reason="stop"),
        Completion(text="a", finish_reason="length"),
        Completion(text="a", finish_reason="stop"),
    ]
    collected = run(FakeEngine(lambda r, i: answer), asks_for(2), tmp_path / "l.jsonl")
    assert (collected.answers, collected.failed, collected.cut_off) == (4, {"empty": 2}, 2)
    assert collected.failed_fraction == pytest.approx(1 / 3)
    assert collected.distinct_fraction == 0.5
    assert collected.explain() == "2 prompts, 4 answers, 2 failed (2 empty), 2 cut off"


def test_text_that_no_file_can_hold_is_mended_and_not_a_crash(tmp_path: Path) -> None:
    half = [Completion(text="half \ud83d of a smile", finish_reason="stop")]
    run(FakeEngine(lambda r, i: half), asks_for(1, samples=1), tmp_path / "l.jsonl")
    assert [text for *_, text in lines(tmp_path / "l.jsonl")] == ["half ? of a smile"]


def refuse_one(request: GenerationRequest, index: int) -> None:
    if request.prompt == "prompt 1":
        raise RequestRefused("HTTP 400: too long")


def test_a_refused_request_fails_its_own_rows_and_no_others_and_is_asked_again_only_on_demand(tmp_path: Path) -> None:
    asks, path = asks_for(3), tmp_path / "l.jsonl"
    collected = run(FakeEngine(refuse_one), asks, path)
    assert (collected.answers, collected.failed) == (2 * SAMPLES, {"RequestRefused": SAMPLES})
    failed = [r for line in path.read_text().splitlines() if (r := Response.model_validate_json(line)).status == "failed"]
    assert {(r.example_id, r.reason) for r in failed} == {("e1", "RequestRefused: HTTP 400: too long")}

    untouched = FakeEngine()
    assert run(untouched, asks, path).failed == {"RequestRefused": SAMPLES}
    assert untouched.requests == []

    retried = FakeEngine()
    collected = run(retried, asks, path, retry_failed=True)
    assert (collected.answers, collected.failed, len(retried.requests)) == (3 * SAMPLES, {}, 1)
    with Ledger(path, Response) as ledger:
        assert [[r.text for r in rows] for rows in answers(asks, ledger)] == [[text_of(a.request, i) for i in range(SAMPLES)] for a in asks]


@pytest.mark.parametrize("error", [TeacherUnavailable("gone"), TeacherRejected("HTTP 401"), EngineError("broken")])
def test_an_error_that_concerns_all_ends_the_collection_at_once_and_keeps_what_has_come(tmp_path: Path, error: Exception) -> None:
    def break_down(request: GenerationRequest, index: int) -> None:
        if index == 5:
            raise error

    engine, asks, path = FakeEngine(break_down), asks_for(100), tmp_path / "l.jsonl"
    with pytest.raises(type(error)) as caught:
        run(engine, asks, path, concurrency=2)
    assert caught.value is error
    assert len(engine.requests) < 10
    kept = lines(path)
    assert 2 * SAMPLES <= len(kept) < 10 * SAMPLES
    assert set(kept) <= set(expected(asks))
    run(FakeEngine(), asks, path)
    assert lines(path) == expected(asks)


def test_lines_of_other_asks_in_the_ledger_are_not_counted(tmp_path: Path) -> None:
    run(FakeEngine(), asks_for(4), tmp_path / "l.jsonl")
    collected = run(FakeEngine(), asks_for(2), tmp_path / "l.jsonl")
    assert (collected.prompts, collected.answers, collected.requests) == (2, 2 * SAMPLES, 0)


class CountingLedger(Ledger[Response]):
    """A ledger that notes how many lines were durable whenever it was made so; it never does so on appending."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, Response, sync_every_s=3600)
        self.durable = 0

    def sync(self) -> None:
        super().sync()
        self.durable = self.path.read_bytes().count(b"\n")


def test_lines_become_durable_while_the_teacher_pauses(tmp_path: Path) -> None:
    """The second request is answered only once the first one's lines are durable: without a sync of its own it would hang."""
    with CountingLedger(tmp_path / "l.jsonl") as ledger:

        class Pausing(FakeEngine):
            async def generate(self, request: GenerationRequest) -> list[Completion]:
                while self.requests and ledger.durable < SAMPLES:
                    await asyncio.sleep(0.01)
                return await super().generate(request)

        collected = asyncio.run(asyncio.wait_for(collect(Pausing(), asks_for(2), ledger, concurrency=1, what="test"), 30))
        assert collected.answers == ledger.durable == 2 * SAMPLES


def test_a_ledger_that_cannot_be_made_durable_ends_the_collection(tmp_path: Path) -> None:
    class Broken(Ledger[Response]):
        def sync(self) -> None:
            if self._dirty:
                raise StorageError("no space")

    ledger = Broken(tmp_path / "l.jsonl", Response, sync_every_s=3600)

    class Waiting(FakeEngine):
        async def generate(self, request: GenerationRequest) -> list[Completion]:
            if self.requests:
                await asyncio.sleep(3600)
            return await super().generate(request)

    with pytest.raises(StorageError, match="no space"):
        asyncio.run(asyncio.wait_for(collect(Waiting(), asks_for(2), ledger, concurrency=1, what="test"), 30))


CHILD = """
    import asyncio, sys
    from pathlib import Path
    from shared.artifacts import Ledger
    from shared.collect import Ask, collect
    from shared.contracts import Completion, FinishReason, GenerationRequest, Response, Sampling

    class Slow:
        async def generate(self, request):
            await asyncio.sleep(0.005)
            with open(sys.argv[2], "a") as asked:
                for i in range(request.n):
                    print(request.prompt, request.sampling.seed + i, file=asked)
            return [
                Completion(text=f"{request.prompt} with seed {request.sampling.seed + i}", finish_reason="stop")
                for i in range(request.n)
            ]

    sampling = Sampling(temperature=0.8, seed=7)
    asks = [Ask(f"e{i}", GenerationRequest(prompt=f"prompt {i}", n=3, sampling=sampling), "http://t/v1", "m") for i in range(150)]
    with Ledger(Path(sys.argv[1]), Response) as ledger:
        asyncio.run(collect(Slow(), asks, ledger, concurrency=4, what="child"))
    """


def test_a_collection_that_is_killed_again_and_again_ends_with_the_same_lines_and_repeats_only_what_was_in_flight(tmp_path: Path) -> None:
    path, asked, asks = tmp_path / "l.jsonl", tmp_path / "asked", asks_for(150)
    kills, chance = 0, random.Random(5)
    for _ in range(40):
        before = path.read_bytes().count(b"\n") if path.exists() else 0
        target = before + chance.randrange(30, 120)
        child = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(CHILD), path, asked],
            env={**os.environ, "PYTHONPATH": os.getcwd()},
            stderr=subprocess.DEVNULL,
        )
        while child.poll() is None:
            if path.exists() and path.read_bytes().count(b"\n") >= target:
                child.send_signal(signal.SIGKILL)
                child.wait()
            time.sleep(0.002)
        if child.returncode == 0:
            break
        assert child.returncode == -signal.SIGKILL
        kills += 1
    assert kills >= 2
    assert lines(path) == expected(asks)
    repeated = sum(count - 1 for count in Counter(asked.read_text().splitlines()).values())
    assert repeated <= kills * 4 * SAMPLES  # four requests in flight


# in this process


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
        return answer_offline(model, asks, ledger, chunk=chunk, what="test", seed=seed)


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
    assert (collected.answers, collected.failed) == (3 * SAMPLES, {"TooLong": 2})
    again = FakeModel(longest=20)
    offline(again, asks, tmp_path / "l.jsonl")
    assert again.batches == []


def test_without_a_seed_the_model_gets_none(tmp_path: Path) -> None:
    model = FakeModel()
    offline(model, asks_for(1), tmp_path / "l.jsonl", seed=None)
    assert [seed for _, seed in model.batches] == [None]
