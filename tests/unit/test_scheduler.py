"""The scheduler of a harvest: nothing asked twice, nothing lost, and nobody pushed, whatever the teacher does."""

from __future__ import annotations

import asyncio
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from awake import awake
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.collect import Collected
from shared.contracts import Completion, FinishReason, GenerationRequest, Response, Sampling
from shared.errors import (
    BudgetSpent,
    HarvestTooThin,
    NotTheApi,
    RequestForbidden,
    RequestRefused,
    SettingsError,
    StorageError,
    TeacherBusy,
    TeacherFailed,
    TeacherLate,
    TeacherRejected,
    TeacherUnavailable,
)
from shared.harvest.ask import Ask
from shared.harvest.budget import Budget, estimated_tokens, tokens_of
from shared.harvest.ledger import AnswerLedger, answer_files
from shared.harvest.scheduler import FORBIDDEN, Limits, Standing, harvest
from shared.harvest.smoke import PROMPTS as SMOKE
from shared.harvest.teacher import Answer, Refusal
from shared.settings import BudgetSettings, PriceSettings
from student_trainer.harvest.watch import PROGRESS, Watch

SAMPLES = 3
Line = tuple[str, str, int, str, str]
Said = Answer | None
Hook = Callable[[GenerationRequest, int], Said | Awaitable[Said]]
FINISHED: FinishReason = "stop"


@pytest.fixture(autouse=True)
def _drawn_alike() -> None:
    """The pauses between attempts are drawn at random."""
    random.seed(5)


def ask_for(example: str, content: str, *, samples: int = SAMPLES, seed: int | None = 7) -> Ask:
    request = GenerationRequest(prompt=content, n=samples, sampling=Sampling(temperature=0.8, seed=seed, max_tokens=20))
    return Ask(example, request, "http://t/v1", "m")


def asks_for(count: int, samples: int = SAMPLES, seed: int | None = 7) -> list[Ask]:
    return [ask_for(f"e{i}", f"prompt {i}", samples=samples, seed=seed) for i in range(count)]


def text_of(request: GenerationRequest, index: int) -> str:
    return f"{request.prompt} with seed {(request.sampling.seed or 0) + index}"


def completions(*texts: str) -> Answer:
    return Answer(tuple(Completion(text=text, finish_reason=FINISHED) for text in texts))


class FakeTeacher:
    """Answers with the prompt and the seed of each sample; `hook` may raise, wait or answer otherwise before that."""

    def __init__(self, hook: Hook | None = None, *, gives: int = 64, most_choices: int | None = None) -> None:
        self.hook, self.gives, self.most_choices = hook, gives, most_choices
        self.requests: list[GenerationRequest] = []
        self.answered = self.in_flight = self.peak = 0

    async def ask(self, request: GenerationRequest) -> Answer:
        self.requests.append(request)
        index = len(self.requests)
        self.in_flight += 1
        self.peak = max(self.peak, self.in_flight)
        try:
            await asyncio.sleep(0)
            said = self.hook(request, index) if self.hook else None
            if isinstance(said, Awaitable):
                said = await said
            self.answered += 1
            return said or completions(*(text_of(request, i) for i in range(min(request.n, self.gives))))
        finally:
            self.in_flight -= 1

    def rendered(self, request: GenerationRequest) -> str:
        return request.prompt or ""

    async def check(self) -> None: ...

    async def aclose(self) -> None: ...

    @property
    def asked(self) -> Counter[tuple[str | None, int]]:
        """How often each (prompt, seed of a sample) was asked for."""
        return Counter((r.prompt, (r.sampling.seed or 0) + i) for r in self.requests for i in range(r.n))

    @property
    def prompts(self) -> Counter[str | None]:
        """Requests by prompt."""
        return Counter(r.prompt for r in self.requests)


def run(
    teacher: FakeTeacher, asks: Iterable[Ask], folder: Path, *, segment_bytes: int = 2**20, limits: Limits | None = None, **how: Any
) -> Collected:
    with AnswerLedger(folder, segment_bytes=segment_bytes) as ledger:
        return run_into(ledger, teacher, asks, limits=limits, **how)


def run_into(ledger: AnswerLedger, teacher: FakeTeacher, asks: Iterable[Ask], *, limits: Limits | None = None, **how: Any) -> Collected:
    harvested = harvest(teacher, asks, ledger, limits=limits or Limits(concurrency=4), what="test", **how)
    return asyncio.run(asyncio.wait_for(harvested, 60))


def rows(folder: Path) -> list[Response]:
    """All lines of a ledger, each as often as it stands there."""
    return [Response.model_validate_json(line) for file in answer_files(folder) for line in file.read_bytes().splitlines()]


def lines(folder: Path) -> list[Line]:
    """What a ledger says, without times: sorted, so that the order of arrival does not matter."""
    return sorted((r.key, r.example_id, r.sample, r.status, r.text) for r in rows(folder))


def expected(asks: Iterable[Ask]) -> list[Line]:
    return sorted((a.key(i), a.example_id, i, "ok", text_of(a.request, i)) for a in asks for i in range(a.request.n))


def reasons(folder: Path) -> dict[str, str | None]:
    """Why rows failed, by example."""
    return {row.example_id: row.reason for row in rows(folder) if row.status == "failed"}


def among(prompts: Iterable[int], error: Callable[[], Exception]) -> Hook:
    """Some prompts end in an error, by their numbers."""
    chosen = {f"prompt {number}" for number in prompts}

    def hook(request: GenerationRequest, index: int) -> None:
        if request.prompt in chosen:
            raise error()

    return hook


def refused() -> Exception:
    return RequestRefused("HTTP 400: no")


def failed() -> Exception:
    return TeacherFailed("HTTP 500: no")


def unreachable() -> Exception:
    return TeacherUnavailable("connection refused")


# all of it, once


@settings(max_examples=50, deadline=None)
@given(
    prompts=st.sampled_from([0, 1, 2, SMOKE - 1, SMOKE, SMOKE + 1, 2 * SMOKE + 1]),
    samples=st.integers(1, 3),
    concurrency=st.sampled_from([1, 2, SMOKE - 1, SMOKE, SMOKE + 1, 64]),
    segment_bytes=st.sampled_from([1, 700, 1400, 2**20]),
)
def test_every_sample_of_every_prompt_has_one_line_and_one_request_asks_for_all_of_a_prompt(
    prompts: int, samples: int, concurrency: int, segment_bytes: int
) -> None:
    teacher, asks = FakeTeacher(), asks_for(prompts, samples)
    with tempfile.TemporaryDirectory() as folder:
        limits = Limits(concurrency=concurrency)
        collected = run(teacher, iter(asks), Path(folder), segment_bytes=segment_bytes, limits=limits)
        assert lines(Path(folder)) == expected(asks)
    assert [r.n for r in teacher.requests] == [samples] * prompts
    assert (collected.prompts, collected.answers, collected.failed, collected.missing) == (prompts, prompts * samples, {}, 0)
    assert (collected.requests, collected.collected, collected.shared) == (prompts, prompts * samples, 0)
    assert teacher.peak <= concurrency


@settings(max_examples=50, deadline=None)
@given(prompts=st.integers(0, 6), samples=st.integers(1, 5), data=st.data())
def test_whatever_part_of_the_lines_is_there_already_the_rest_is_asked_for_once_and_the_lines_are_the_same(
    prompts: int, samples: int, data: st.DataObject
) -> None:
    asks = asks_for(prompts, samples)
    with tempfile.TemporaryDirectory() as whole_folder, tempfile.TemporaryDirectory() as cut_folder:
        run(FakeTeacher(), asks, Path(whole_folder))
        whole = [line for file in answer_files(Path(whole_folder)) for line in file.read_text().splitlines(keepends=True)]
        kept = data.draw(st.lists(st.sampled_from(whole), unique=True)) if whole else []
        compacted = data.draw(st.integers(0, len(kept)))
        folder = Path(cut_folder)
        (folder / "responses.jsonl").write_text("".join(kept[:compacted]))
        torn = data.draw(st.sampled_from(["", "\x00", '{"key": "torn']))
        (folder / "responses-000001.jsonl").write_text("".join(kept[compacted:]) + torn)
        teacher = FakeTeacher(gives=data.draw(st.integers(1, 5)), most_choices=data.draw(st.sampled_from([None, 1, 2])))
        limits = Limits(concurrency=data.draw(st.integers(1, 8)))
        collected = run(teacher, asks, folder, limits=limits, segment_bytes=data.draw(st.sampled_from([1, 700, 2**20])))
        assert lines(folder) == expected(asks)
    assert (collected.answers, collected.collected) == (len(whole), len(whole) - len(kept))
    assert max((r.n for r in teacher.requests), default=1) <= (teacher.most_choices or 64)
    if teacher.gives >= samples:
        assert max(teacher.asked.values(), default=1) == 1
        assert sum(teacher.asked.values()) == len(whole) - len(kept)


def test_a_second_harvest_asks_for_nothing_and_has_the_same_census(tmp_path: Path) -> None:
    asks = asks_for(SMOKE + 4)
    first = run(FakeTeacher(), asks, tmp_path)
    teacher = FakeTeacher()
    again = run(teacher, asks, tmp_path)
    assert teacher.requests == []
    assert (again.prompts, again.answers, again.distinct_fraction) == (first.prompts, first.answers, first.distinct_fraction)


def test_missing_samples_that_are_not_neighbours_are_asked_for_apart_with_their_own_seeds(tmp_path: Path) -> None:
    asks = asks_for(1, samples=5, seed=100)
    run(FakeTeacher(), asks, tmp_path)
    kept = [row.model_dump_json() + "\n" for row in rows(tmp_path) if row.sample in (1, 2)]
    answer_files(tmp_path)[0].write_text("".join(kept))
    teacher = FakeTeacher()
    run(teacher, asks, tmp_path)
    assert sorted((r.sampling.seed, r.n) for r in teacher.requests) == [(100, 1), (103, 2)]
    assert lines(tmp_path) == expected(asks)


def test_without_a_seed_none_is_sent(tmp_path: Path) -> None:
    teacher = FakeTeacher()
    run(teacher, asks_for(1, seed=None), tmp_path)
    assert [r.sampling.seed for r in teacher.requests] == [None]


def test_lines_of_other_asks_in_the_ledger_are_not_counted(tmp_path: Path) -> None:
    run(FakeTeacher(), asks_for(4), tmp_path)
    collected = run(FakeTeacher(), asks_for(2), tmp_path)
    assert (collected.prompts, collected.answers, collected.requests) == (2, 2 * SAMPLES, 0)


def test_one_added_row_asks_for_one_row(tmp_path: Path) -> None:
    run(FakeTeacher(), asks_for(30), tmp_path)
    teacher = FakeTeacher()
    run(teacher, asks_for(31), tmp_path)
    assert teacher.prompts == {"prompt 30": 1}


# the same request for several examples


@settings(max_examples=50, deadline=None)
@given(
    contents=st.lists(st.integers(0, 3), max_size=9),
    refusing=st.sets(st.integers(0, 3), max_size=1),
    concurrency=st.sampled_from([1, 2, 16]),
    data=st.data(),
)
def test_equal_prompts_are_paid_for_once_and_every_example_has_its_rows(
    contents: list[int], refusing: set[int], concurrency: int, data: st.DataObject
) -> None:
    """Whether the other is in flight, was answered before, or by an earlier command."""
    asks = [ask_for(f"e{i}", f"prompt {content}", samples=2) for i, content in enumerate(contents)]
    earlier = data.draw(st.integers(0, len(asks)))
    teacher = FakeTeacher(among(refusing, refused))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run(teacher, asks[:earlier], folder, limits=Limits(concurrency=concurrency))
        collected = run(teacher, asks, folder, limits=Limits(concurrency=concurrency))
        found = {(row.example_id, row.sample): (row.status, row.text) for row in rows(folder)}
        assert len(rows(folder)) == len(found)
    for ask, content in zip(asks, contents, strict=True):
        for i in range(2):
            assert found[ask.example_id, i] == (("failed", "") if content in refusing else ("ok", text_of(ask.request, i)))
    assert all(count == 1 for prompt, count in teacher.prompts.items() if prompt not in {f"prompt {c}" for c in refusing})
    assert collected.missing == 0
    assert collected.answers + sum(collected.failed.values()) == 2 * len(asks)


def test_who_waits_for_the_answer_to_another_example_gets_its_failure_too(tmp_path: Path) -> None:
    teacher = FakeTeacher(among([0], refused))
    collected = run(teacher, [ask_for(f"e{i}", "prompt 0", samples=1) for i in range(4)], tmp_path)
    assert (len(teacher.requests), collected.failed, collected.shared) == (1, {"refused": 4}, 3)


def test_an_answer_that_was_cut_off_is_shared_like_any_other(tmp_path: Path) -> None:
    cut = Answer((Completion(text="half of", finish_reason="length"),))
    run(FakeTeacher(lambda r, i: cut), [ask_for("a", "p", samples=1)], tmp_path)
    teacher = FakeTeacher()
    collected = run(teacher, [ask_for("b", "p", samples=1)], tmp_path)
    assert (teacher.requests, collected.cut_off) == ([], 1)


def test_an_example_that_wants_more_samples_of_the_same_prompt_asks_for_the_others_alone(tmp_path: Path) -> None:
    asks = [ask_for("a", "p", samples=2), ask_for("b", "p", samples=5)]
    teacher = FakeTeacher()
    run(teacher, asks, tmp_path)
    assert sorted((r.sampling.seed, r.n) for r in teacher.requests) == [(7, 2), (9, 3)]
    assert lines(tmp_path) == expected(asks)


# answers that are not as wished for


def test_a_teacher_that_gives_one_choice_however_many_are_asked_for_is_asked_again_for_the_rest(tmp_path: Path) -> None:
    teacher, asks = FakeTeacher(gives=1), asks_for(2, samples=3)
    assert run(teacher, asks, tmp_path).requests == 6
    assert lines(tmp_path) == expected(asks)


def test_a_teacher_that_gives_too_many_choices_has_the_surplus_ignored(tmp_path: Path) -> None:
    assert run(FakeTeacher(lambda r, i: completions(*"abcdefghi")), asks_for(1), tmp_path).answers == SAMPLES


def test_an_answer_without_choices_is_asked_for_again_and_not_for_ever(tmp_path: Path) -> None:
    teacher, asks = FakeTeacher(lambda r, i: Answer(()) if i == 20 or r.prompt == "prompt 5" else None), asks_for(40)
    assert run(teacher, asks, tmp_path, limits=Limits(concurrency=4, max_attempts=2)).failed == {"unanswered": SAMPLES}
    assert "none of 3 choices came (attempt 2 of 2)" in str(reasons(tmp_path)["e5"])
    assert teacher.prompts["prompt 5"] == 2
    assert [line for line in lines(tmp_path) if line[3] == "ok"] == expected(ask for ask in asks if ask.example_id != "e5")


def test_an_answer_without_choices_may_have_been_billed(tmp_path: Path) -> None:
    with Budget(tmp_path / "spent.json", BudgetSettings(), PRICE) as budget:
        run(FakeTeacher(lambda r, i: Answer((), 0, 0) if i == 1 else completions("a")), asks_for(1, samples=1), tmp_path, budget=budget)
        answered = Budget(tmp_path / "probe.json", BudgetSettings(), PRICE).reserve(asks_for(1, samples=1)[0].request)
        assert answered is not None
        assert budget.account.requests == 2
        assert budget.account.cost > answered.cost


def test_a_teacher_that_refuses_several_answers_to_one_request_is_asked_for_one_at_a_time(tmp_path: Path) -> None:
    def one_only(request: GenerationRequest, index: int) -> None:
        if request.n > 1:
            raise RequestRefused("HTTP 400: n must be 1")

    teacher, asks = FakeTeacher(one_only), asks_for(40, samples=2)
    run(teacher, asks, tmp_path)
    assert lines(tmp_path) == expected(asks)
    assert sum(r.n > 1 for r in teacher.requests) <= 4  # those that were in flight before one was answered alone


def test_empty_and_endless_answers_are_failed_rows_and_cut_off_ones_are_counted(tmp_path: Path) -> None:
    choices = (
        Completion(text=" \n", finish_reason="stop"),
        Completion(text="a", finish_reason="length"),
        Completion(text="a", finish_reason="stop"),
        Completion(text="a" * 11, finish_reason="stop"),
        Refusal("content_filter", "it would not say"),
    )
    limits = Limits(concurrency=2, max_answer_chars=10)
    collected = run(FakeTeacher(lambda r, i: Answer(choices)), asks_for(2, samples=5), tmp_path, limits=limits)
    assert (collected.answers, collected.failed, collected.cut_off) == (4, {"empty": 2, "over_long": 2, "content_filter": 2}, 2)
    assert (collected.failed_fraction, collected.distinct_fraction) == (0.6, 0.5)
    assert {row.text for row in rows(tmp_path)} == {"", "a"}
    assert collected.explain() == "2 prompts, 4 answers, 6 failed (2 content_filter, 2 empty, 2 over_long), 2 cut off"


def test_text_that_no_file_can_hold_is_mended_and_not_a_crash(tmp_path: Path) -> None:
    def half(request: GenerationRequest, index: int) -> Answer:
        if request.prompt == "prompt 1":
            raise RequestRefused("HTTP 400: half \ud83d of a smile")
        return completions("half \ud83d of a smile")

    run(FakeTeacher(half), asks_for(2, samples=1), tmp_path)
    assert {(row.text, row.reason) for row in rows(tmp_path)} == {
        ("half ? of a smile", None),
        ("", "refused: HTTP 400: half ? of a smile"),
    }


def test_equal_answers_are_noticed_within_a_prompt_and_over_all(tmp_path: Path) -> None:
    same = run(FakeTeacher(lambda r, i: completions("yes", "yes")), asks_for(8, samples=2), tmp_path / "same")
    assert (same.several, same.varied, same.one_text, same.distinct_fraction) == (8, 0, True, 0.5)
    by_prompt = run(FakeTeacher(lambda r, i: completions(*[r.prompt or ""] * 2)), asks_for(8, samples=2), tmp_path / "prompt")
    assert (by_prompt.varied, by_prompt.one_text) == (0, False)
    several = run(FakeTeacher(), asks_for(8, samples=2), tmp_path / "several")
    assert (several.varied, several.one_text, several.distinct_fraction) == (8, False, 1.0)


# refused rows


def test_a_refused_request_fails_its_own_rows_and_no_others_and_is_asked_again_only_on_demand(tmp_path: Path) -> None:
    asks = asks_for(3)
    collected = run(FakeTeacher(among([1], refused)), asks, tmp_path)
    assert (collected.answers, collected.failed) == (2 * SAMPLES, {"refused": SAMPLES})
    assert reasons(tmp_path) == {"e1": "refused: HTTP 400: no"}

    untouched = FakeTeacher()
    resumed = run(untouched, asks, tmp_path)
    assert (resumed.failed, resumed.said, untouched.requests) == ({"refused": SAMPLES}, {"refused": "refused: HTTP 400: no"}, [])

    other_class = FakeTeacher()
    run(other_class, asks, tmp_path, retry=frozenset({"empty"}))
    assert other_class.requests == []

    retried = FakeTeacher()
    collected = run(retried, asks, tmp_path, retry=frozenset({"refused"}))
    assert (collected.answers, collected.failed, retried.prompts) == (3 * SAMPLES, {}, {"prompt 1": 1})
    with AnswerLedger(tmp_path) as ledger:
        compacted = ledger.compact()
    assert [file.name for file in answer_files(tmp_path)] == [compacted.name]
    assert lines(tmp_path) == expected(asks)


@pytest.mark.parametrize(
    ("error", "kind"),
    [(RequestRefused("x", kind="too_long"), "too_long"), (RequestRefused("x", kind="content_filter"), "content_filter")],
)
def test_a_refusal_names_its_class(tmp_path: Path, error: Exception, kind: str) -> None:
    assert run(FakeTeacher(among([0], lambda: error)), asks_for(2, samples=1), tmp_path).failed == {kind: 1}


def test_a_cut_off_answer_that_is_asked_for_again_is_not_lost_when_it_is_refused_then(tmp_path: Path) -> None:
    cut = Answer((Completion(text="half of", finish_reason="length"),))
    run(FakeTeacher(lambda r, i: cut), asks_for(1, samples=1), tmp_path)
    teacher = FakeTeacher(among([0], refused))
    collected = run(teacher, asks_for(1, samples=1), tmp_path, retry=frozenset({"cut_off"}))
    assert (len(teacher.requests), collected.answers) == (1, 1)
    assert (run(FakeTeacher(), asks_for(1, samples=1), tmp_path).answers) == 1


def test_nor_is_that_of_an_example_that_waits_for_the_same_answer(tmp_path: Path) -> None:
    cut = Answer((Completion(text="half of", finish_reason="length"),))
    asks = [ask_for("a", "prompt 0", samples=1), ask_for("b", "prompt 0", samples=1)]
    run(FakeTeacher(lambda r, i: cut), asks, tmp_path)
    collected = run(FakeTeacher(among([0], refused)), asks, tmp_path, retry=frozenset({"cut_off"}))
    assert (collected.answers, collected.failed) == (2, {})


def test_when_every_cut_off_answer_is_refused_on_asking_again_all_of_them_stay(tmp_path: Path) -> None:
    cut = Answer((Completion(text="half of", finish_reason="length"),))
    asks = asks_for(SMOKE + 4, samples=1)
    run(FakeTeacher(lambda r, i: cut), asks, tmp_path)
    collected = run(FakeTeacher(among(range(SMOKE + 4), refused)), asks, tmp_path, retry=frozenset({"cut_off"}))
    assert (collected.answers, collected.cut_off, collected.failed) == (SMOKE + 4, SMOKE + 4, {})


# a teacher that says: not now


def test_a_429_uses_up_no_attempts_and_loses_no_row(tmp_path: Path) -> None:
    seen: Counter[str | None] = Counter()

    def busy_twice(request: GenerationRequest, index: int) -> None:
        seen[request.prompt] += 1
        if seen[request.prompt] <= 2:
            raise TeacherBusy("HTTP 429", retry_after_s=0.0)

    asks = asks_for(6)
    collected = run(FakeTeacher(busy_twice), asks, tmp_path, limits=Limits(concurrency=4, max_attempts=1))
    assert lines(tmp_path) == expected(asks)
    assert (collected.refused, collected.requests, collected.failed) == (12, 18, {})
    assert {row.attempts for row in rows(tmp_path)} == {3}


def test_nothing_is_sent_inside_a_gate_whoever_was_told_of_it(tmp_path: Path) -> None:
    gate_s, told_at, inside = 0.5, -math.inf, list[float]()

    def hook(request: GenerationRequest, index: int) -> None:
        nonlocal told_at
        now = time.monotonic()
        if index in (20, 60):
            told_at = now
        if now < told_at + gate_s:
            inside.append(now - told_at)
            raise TeacherBusy("HTTP 429", retry_after_s=gate_s)

    asks = asks_for(80, samples=1)
    collected = run(FakeTeacher(hook), asks, tmp_path, limits=Limits(concurrency=16))
    assert lines(tmp_path) == expected(asks)
    assert collected.refused == len(inside) >= 2
    assert max(inside) < gate_s / 2  # on their way when the gate closed


def test_a_pause_that_comes_with_a_failure_holds_for_all_requests(tmp_path: Path) -> None:
    times: list[float] = []

    def hook(request: GenerationRequest, index: int) -> None:
        times.append(time.monotonic())
        if index == 3:
            raise TeacherFailed("HTTP 503", retry_after_s=0.3)

    run(FakeTeacher(hook), asks_for(9, samples=1), tmp_path, limits=Limits(concurrency=1))
    assert times[3] - times[2] >= 0.3


# a teacher that fails


@pytest.mark.parametrize(
    ("error", "counts"),
    [
        (TeacherFailed("x"), True),
        (TeacherLate("x"), True),
        (NotTheApi("x"), True),
        (TeacherUnavailable("x"), False),
        (TeacherBusy("x", retry_after_s=0.0), False),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_only_attempts_that_reached_the_teacher_count_against_a_row(tmp_path: Path, error: Exception, counts: bool) -> None:
    seen: Counter[str | None] = Counter()

    def hook(request: GenerationRequest, index: int) -> None:
        seen[request.prompt] += 1
        if request.prompt == "prompt 1" and seen[request.prompt] <= 2:
            raise error

    asks = asks_for(20, samples=1)
    collected = run(FakeTeacher(hook), asks, tmp_path, limits=Limits(concurrency=1, max_attempts=2))
    assert collected.failed == ({"unanswered": 1} if counts else {})
    assert seen["prompt 1"] == (2 if counts else 3)
    assert {row.attempts for row in rows(tmp_path) if row.example_id == "e1"} == {seen["prompt 1"]}


def test_prompts_that_break_the_teacher_become_failed_rows_while_others_go_on(tmp_path: Path) -> None:
    teacher = FakeTeacher(among([3, 20, 37], failed))
    collected = run(teacher, asks_for(40, samples=2), tmp_path, limits=Limits(concurrency=8, max_attempts=2))
    assert (collected.answers, collected.failed, collected.missing) == (37 * 2, {"unanswered": 6}, 0)
    assert reasons(tmp_path).keys() == {"e3", "e20", "e37"}
    assert reasons(tmp_path)["e3"] == "unanswered: HTTP 500: no (attempt 2 of 2)"
    assert [teacher.prompts[f"prompt {number}"] for number in (3, 20, 37)] == [2, 2, 2]


@pytest.mark.parametrize("held", [True, False])
def test_prompts_that_break_the_teacher_end_as_failed_rows_even_if_nothing_else_is_left(tmp_path: Path, held: bool) -> None:
    """Many failures in a row look like a dead teacher; but it has answered all others, in this call or in the one before."""
    good, bad = asks_for(6, samples=1), asks_for(11, samples=1)[6:]
    if held:
        run(FakeTeacher(), good, tmp_path)
    teacher = FakeTeacher(among(range(6, 11), failed))
    collected = run(teacher, [*good, *bad], tmp_path, limits=Limits(concurrency=8, max_attempts=3, patience_s=1.5))
    assert (collected.answers, collected.failed) == (6, {"unanswered": 5})


def test_a_teacher_that_was_never_reached_ends_the_harvest_when_patience_does_and_records_nothing(tmp_path: Path) -> None:
    teacher = FakeTeacher(lambda r, i: raised(unreachable()))
    with pytest.raises(TeacherUnavailable, match="connection refused"):
        run(teacher, asks_for(1000), tmp_path, limits=Limits(concurrency=64, patience_s=0.3))
    assert rows(tmp_path) == []
    assert len(teacher.requests) <= 40


def test_a_teacher_that_fails_at_a_few_prompts_and_answers_none_is_dead_and_they_are_not_failed_rows(tmp_path: Path) -> None:
    with pytest.raises(TeacherUnavailable, match=r"HTTP 500: no.*no request of 6 was answered"):
        run(FakeTeacher(lambda r, i: raised(failed())), asks_for(3), tmp_path, limits=Limits(concurrency=4, max_attempts=2))
    assert rows(tmp_path) == []


def test_a_teacher_that_dies_half_way_ends_the_harvest_with_all_answers_and_no_failed_rows(tmp_path: Path) -> None:
    def dies(request: GenerationRequest, index: int) -> None:
        if index > 40:
            raise unreachable()

    asks = asks_for(200, samples=1)
    with pytest.raises(TeacherUnavailable):
        run(FakeTeacher(dies), asks, tmp_path, limits=Limits(concurrency=16, patience_s=0.3))
    assert [row.status for row in rows(tmp_path)] == ["ok"] * 40
    teacher = FakeTeacher()
    run(teacher, asks, tmp_path)
    assert len(teacher.requests) == 160
    assert lines(tmp_path) == expected(asks)


def test_a_pause_longer_than_patience_is_waited_out_and_the_teacher_asked_again(tmp_path: Path) -> None:
    began = time.monotonic()

    def maintained(request: GenerationRequest, index: int) -> None:
        left_s = began + 2 - time.monotonic()
        if left_s > 0:
            raise TeacherFailed("HTTP 503: maintenance", retry_after_s=left_s)

    teacher, asks = FakeTeacher(maintained), asks_for(40, samples=1)
    assert run(teacher, asks, tmp_path, limits=Limits(concurrency=16, patience_s=1, max_attempts=50)).failed == {}
    assert lines(tmp_path) == expected(asks)
    assert len(teacher.requests) <= 40 + 16


def test_an_outage_is_waited_out_with_few_requests(tmp_path: Path) -> None:
    begun, within = 0.0, 0

    def outage(request: GenerationRequest, index: int) -> None:
        nonlocal begun, within
        if index == 40:
            begun = time.monotonic()
        if begun and time.monotonic() < begun + 1.2:
            within += 1
            raise failed()

    asks = asks_for(200, samples=1)
    seen: list[Standing] = []
    run(FakeTeacher(outage), asks, tmp_path, limits=Limits(concurrency=16, max_attempts=3), watch=seen.append)
    assert lines(tmp_path) == expected(asks)
    assert within <= 2 * 16
    assert any("HTTP 500: no" in standing.waiting for standing in seen)


def raised(error: Exception) -> Answer:
    raise error


@pytest.mark.parametrize("seed", range(3))
def test_whatever_goes_wrong_on_the_way_the_lines_are_those_of_a_harvest_without_faults(tmp_path: Path, seed: int) -> None:
    drawn = random.Random(seed)

    async def faulty(request: GenerationRequest, index: int) -> Answer | None:
        await asyncio.sleep(drawn.uniform(0, 0.01))
        fate = drawn.random()
        if fate < 0.20:
            raise drawn.choice([unreachable(), failed(), TeacherLate("late"), NotTheApi("<html>")])
        if fate < 0.21:
            raise TeacherBusy("HTTP 429", retry_after_s=0.05)
        return completions(text_of(request, 0)) if fate < 0.3 else None

    asks = asks_for(150, samples=2)
    doubles = [ask_for(f"double {i}", f"prompt {i}", samples=2) for i in range(20)]
    collected = run(FakeTeacher(faulty), [*asks, *doubles], tmp_path, limits=Limits(concurrency=16, max_attempts=30), segment_bytes=5000)
    assert lines(tmp_path) == expected([*asks, *doubles])
    assert (collected.missing, collected.failed, collected.shared) == (0, {}, 40)


# errors that concern all


@pytest.mark.parametrize("error", [TeacherRejected("HTTP 401"), StorageError("no space"), ValueError("a fault of ours")])
def test_an_error_that_concerns_all_ends_the_harvest_at_once_and_keeps_what_has_come(tmp_path: Path, error: Exception) -> None:
    def break_down(request: GenerationRequest, index: int) -> None:
        if index == 5:
            raise error

    teacher, asks = FakeTeacher(break_down), asks_for(100)
    with pytest.raises(type(error)) as caught:
        run(teacher, asks, tmp_path, limits=Limits(concurrency=2))
    assert caught.value is error
    assert len(teacher.requests) < 10
    kept = lines(tmp_path)
    assert 2 * SAMPLES <= len(kept) < 10 * SAMPLES
    assert set(kept) <= set(expected(asks))
    run(FakeTeacher(), asks, tmp_path)
    assert lines(tmp_path) == expected(asks)


def test_what_is_in_flight_when_the_end_comes_is_paid_for_and_kept(tmp_path: Path) -> None:
    async def slow(request: GenerationRequest, index: int) -> None:
        if index == 8:
            raise TeacherRejected("HTTP 401")
        await asyncio.sleep(0.3)

    teacher = FakeTeacher(slow)
    with pytest.raises(TeacherRejected):
        run(teacher, asks_for(50, samples=1), tmp_path, limits=Limits(concurrency=8))
    assert len(rows(tmp_path)) == len(teacher.requests) - 1 == 7


def test_a_403_is_of_one_request_where_others_are_answered_even_if_it_comes_first(tmp_path: Path) -> None:
    async def moderated(request: GenerationRequest, index: int) -> None:
        if request.prompt in ("prompt 0", "prompt 60"):
            raise RequestForbidden("HTTP 403: flagged")
        await asyncio.sleep(0.05)

    teacher, asks = FakeTeacher(moderated), asks_for(100, samples=1)
    assert run(teacher, asks, tmp_path, limits=Limits(concurrency=8)).failed == {"refused": 2}
    assert reasons(tmp_path) == {"e0": "refused: HTTP 403: flagged", "e60": "refused: HTTP 403: flagged"}
    assert len(teacher.requests) == 101  # the first was in doubt
    again = FakeTeacher()
    assert run(again, asks, tmp_path, retry=frozenset({"refused"})).answers == 100
    assert len(again.requests) == 2


def test_a_403_before_any_answer_ends_the_harvest_and_no_row_has_failed(tmp_path: Path) -> None:
    teacher = FakeTeacher(lambda r, i: raised(RequestForbidden("HTTP 403: give the key")))
    with pytest.raises(RequestForbidden, match="give the key"):
        run(teacher, asks_for(1000), tmp_path, limits=Limits(concurrency=64))
    assert len(teacher.requests) <= SMOKE
    assert rows(tmp_path) == []


def test_a_key_that_is_revoked_meanwhile_ends_the_harvest_before_all_rows_have_failed(tmp_path: Path) -> None:
    async def revoked(request: GenerationRequest, index: int) -> None:
        await asyncio.sleep(0.001)
        if index > 100:
            raise RequestForbidden("HTTP 403: give the key")

    teacher, asks = FakeTeacher(revoked), asks_for(1000, samples=1)
    with pytest.raises(RequestForbidden, match="give the key"):
        run(teacher, asks, tmp_path, limits=Limits(concurrency=16))
    assert len(teacher.requests) < 100 + 2 * FORBIDDEN
    assert len(rows(tmp_path)) <= 100 + FORBIDDEN
    again = FakeTeacher()
    assert run(again, asks, tmp_path, retry=frozenset({"refused"})).answers == 1000


def test_a_wrong_url_ends_the_harvest_within_its_first_requests(tmp_path: Path) -> None:
    teacher = FakeTeacher(lambda r, i: raised(NotTheApi("HTTP 404: page not found")))
    with pytest.raises(NotTheApi):
        run(teacher, asks_for(1000), tmp_path, limits=Limits(concurrency=64))
    assert len(teacher.requests) <= SMOKE
    assert rows(tmp_path) == []


def test_a_wrong_url_is_noticed_even_if_the_ledger_can_fill_rows_by_itself(tmp_path: Path) -> None:
    run(FakeTeacher(), [ask_for("a", "p")], tmp_path)
    teacher = FakeTeacher(lambda r, i: raised(NotTheApi("HTTP 404: page not found")))
    with pytest.raises(NotTheApi):
        run(teacher, [ask_for("b", "p"), *asks_for(100)], tmp_path, limits=Limits(concurrency=64, patience_s=1))


def test_a_garbled_answer_among_good_ones_is_asked_for_again(tmp_path: Path) -> None:
    def garbled(request: GenerationRequest, index: int) -> None:
        if index % 10 == 5:
            raise NotTheApi("<html>")

    asks = asks_for(60, samples=1)
    run(FakeTeacher(garbled), asks, tmp_path, limits=Limits(concurrency=4))
    assert lines(tmp_path) == expected(asks)


def test_a_garbled_first_answer_is_no_wrong_url_if_others_are_right(tmp_path: Path) -> None:
    async def garbled(request: GenerationRequest, index: int) -> None:
        if index == 1:
            raise NotTheApi("<html>")
        await asyncio.sleep(0.05)

    asks = asks_for(40, samples=1)
    run(FakeTeacher(garbled), asks, tmp_path, limits=Limits(concurrency=4))
    assert lines(tmp_path) == expected(asks)


# the first prompts


def test_when_the_first_prompts_fail_nothing_more_is_sent(tmp_path: Path) -> None:
    teacher = FakeTeacher(lambda r, i: raised(refused()))
    with pytest.raises(HarvestTooThin, match="HTTP 400: no"):
        run(teacher, asks_for(100, samples=1), tmp_path, limits=Limits(concurrency=64))
    assert len(teacher.requests) == SMOKE
    assert len(reasons(tmp_path)) == SMOKE


@pytest.mark.parametrize("concurrency", [1, 64])
@pytest.mark.parametrize(("failing", "passes"), [(SMOKE // 2 - 1, True), (SMOKE // 2, False)])
def test_the_first_prompts_fail_when_half_of_them_do(tmp_path: Path, failing: int, passes: bool, concurrency: int) -> None:
    teacher, limits = FakeTeacher(among(range(failing), refused)), Limits(concurrency=concurrency)
    if passes:
        assert run(teacher, asks_for(40, samples=1), tmp_path, limits=limits).failed == {"refused": failing}
        assert len(teacher.requests) == 40
    else:
        with pytest.raises(HarvestTooThin):
            run(teacher, asks_for(40, samples=1), tmp_path, limits=limits)
        assert len(teacher.requests) == SMOKE


def test_no_more_than_the_first_prompts_are_asked_until_most_of_them_are_answered(tmp_path: Path) -> None:
    before: list[int] = []

    async def hook(request: GenerationRequest, index: int) -> None:
        await asyncio.sleep(0.01 * index if index <= SMOKE else 0)
        if teacher.answered < SMOKE // 2:
            before.append(index)

    teacher = FakeTeacher(hook)
    run(teacher, asks_for(60, samples=1), tmp_path, limits=Limits(concurrency=64))
    assert before
    assert max(before) <= SMOKE


def test_a_source_of_fewer_than_the_first_prompts_is_harvested_whatever_fails(tmp_path: Path) -> None:
    teacher = FakeTeacher(lambda r, i: raised(refused()))
    assert run(teacher, asks_for(SMOKE - 1, samples=1), tmp_path).failed == {"refused": SMOKE - 1}


def test_a_harvest_that_goes_on_needs_no_first_prompts_again(tmp_path: Path) -> None:
    run(FakeTeacher(), asks_for(1, samples=1), tmp_path)
    teacher = FakeTeacher(lambda r, i: raised(refused()))
    assert run(teacher, asks_for(60, samples=1), tmp_path).failed == {"refused": 59}


def test_one_refused_prompt_with_many_doubles_is_one_of_the_first_prompts_and_not_most_of_them(tmp_path: Path) -> None:
    asks = [*(ask_for(f"double {i}", "prompt 0", samples=1) for i in range(20)), *asks_for(60, samples=1)[1:]]
    collected = run(FakeTeacher(among([0], refused)), asks, tmp_path, limits=Limits(concurrency=SMOKE))
    assert (collected.answers, collected.failed) == (59, {"refused": 20})


# who waits for whom


def test_a_straggler_holds_nobody_up(tmp_path: Path) -> None:
    """The first request is answered last: were it waited for, this would never end."""

    async def straggling(request: GenerationRequest, index: int) -> None:
        while index == 1 and teacher.answered < 99:
            await asyncio.sleep(0.001)

    teacher = FakeTeacher(straggling)
    assert run(teacher, asks_for(100, samples=1), tmp_path, limits=Limits(concurrency=2)).answers == 100


def test_a_source_is_never_drawn_much_further_than_what_is_in_flight(tmp_path: Path) -> None:
    drawn, ahead = 0, 0

    def source() -> Iterator[Ask]:
        nonlocal drawn
        for ask in asks_for(600, samples=1):
            drawn += 1
            yield ask

    def hook(request: GenerationRequest, index: int) -> None:
        nonlocal ahead
        ahead = max(ahead, drawn - teacher.answered)
        if index % 100 == 50:
            raise TeacherBusy("HTTP 429", retry_after_s=0.0)
        if index % 100 == 70:
            raise failed()

    teacher = FakeTeacher(hook)
    assert run(teacher, source(), tmp_path, limits=Limits(concurrency=8)).answers == 600
    assert ahead <= 8 + 8  # in flight and just answered


def test_an_endless_row_of_equal_prompts_is_not_drawn_while_the_first_is_in_flight(tmp_path: Path) -> None:
    drawn, most = 0, 20_000

    def source() -> Iterator[Ask]:
        nonlocal drawn
        for number in range(most):
            drawn += 1
            yield ask_for(f"e{number}", "the same", samples=1)

    async def waits(request: GenerationRequest, index: int) -> Answer:
        await asyncio.sleep(0.5)
        return raised(TeacherRejected("HTTP 401"))

    with pytest.raises(TeacherRejected):
        run(FakeTeacher(waits), source(), tmp_path)
    assert drawn < most / 2


def test_prompts_that_are_held_are_passed_over_without_stopping_others(tmp_path: Path) -> None:
    run(FakeTeacher(), asks_for(2000, samples=1), tmp_path, limits=Limits(concurrency=64))
    asks = [ask_for("new", "new", samples=1), *asks_for(2001, samples=1)]
    teacher = FakeTeacher()
    collected = run(teacher, asks, tmp_path)
    assert (collected.answers, len(teacher.requests)) == (2002, 2)


# ends of other kinds


def test_an_interrupted_harvest_sends_nothing_more_and_keeps_what_is_in_flight(tmp_path: Path) -> None:
    async def slow(request: GenerationRequest, index: int) -> None:
        await asyncio.sleep(0.02)

    teacher, asks = FakeTeacher(slow), asks_for(5000, samples=1)
    collected = run(teacher, asks, tmp_path, stopping=lambda: teacher.answered >= 20)
    assert len(teacher.requests) < 1000  # some forty where no disk holds up the question whether to end
    assert collected.answers == len(rows(tmp_path)) == len(teacher.requests)
    assert set(lines(tmp_path)) <= set(expected(asks))


def test_what_was_on_its_way_back_to_the_queue_when_the_end_came_is_missing_and_not_failed(tmp_path: Path) -> None:
    teacher = FakeTeacher(among([0], failed))
    started = time.monotonic()
    collected = run(teacher, asks_for(2, samples=1), tmp_path, stopping=lambda: teacher.answered == 1 and time.monotonic() > started)
    assert (collected.answers, collected.failed, collected.missing) in [(1, {}, 1), (1, {"unanswered": 1}, 0)]


def test_a_source_that_breaks_off_ends_the_harvest_with_its_own_error_and_what_was_asked_is_kept(tmp_path: Path) -> None:
    def source() -> Iterator[Ask]:
        yield from asks_for(5)
        raise LookupError("row 6")

    with pytest.raises(LookupError, match="row 6"):
        run(FakeTeacher(), source(), tmp_path)
    assert lines(tmp_path) == expected(asks_for(5))


class FullLedger(AnswerLedger):
    """Takes so many rows."""

    room = 10

    def append(self, rows: Sequence[Response]) -> None:
        self.room -= len(rows)
        if self.room < 0:
            raise StorageError("no space")
        super().append(rows)


def test_a_full_disk_ends_the_harvest_and_does_not_wait_for_answers_that_have_no_room(tmp_path: Path) -> None:
    async def slow(request: GenerationRequest, index: int) -> None:
        await asyncio.sleep(3600 if index > 12 else 0)

    with FullLedger(tmp_path) as ledger, pytest.raises(StorageError, match="no space"):
        run_into(ledger, FakeTeacher(slow), asks_for(100, samples=1), limits=Limits(concurrency=4))
    assert len(rows(tmp_path)) == 10


class CountingLedger(AnswerLedger):
    """Notes how many lines were durable whenever they were made so, and how long the oldest had waited for it."""

    def __init__(self, folder: Path, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(folder)
        self.durable, self.behind_s, self._clock, self._waits = 0, 0.0, clock, list[float]()

    def append(self, rows: Sequence[Response]) -> None:
        super().append(rows)
        self._waits += [self._clock()] * len(rows)

    def sync(self) -> None:
        waited = len(self._waits)
        super().sync()
        self.durable += waited
        self.behind_s = max([self.behind_s, *(self._clock() - at for at in self._waits[:waited])])
        del self._waits[:waited]


def test_lines_become_durable_while_the_teacher_pauses(tmp_path: Path) -> None:
    """The second request is answered only once the first one's lines are durable: without a sync of its own it would hang."""
    with CountingLedger(tmp_path) as ledger:

        async def pausing(request: GenerationRequest, index: int) -> None:
            while index > 1 and ledger.durable < SAMPLES:
                await asyncio.sleep(0.01)

        collected = run_into(ledger, FakeTeacher(pausing), asks_for(2), limits=Limits(concurrency=1))
        assert collected.answers == ledger.durable == 2 * SAMPLES


def test_lines_are_durable_at_most_a_fifth_of_a_second_after_they_came(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda file: None)  # what the disk takes is its own affair

    async def steady(request: GenerationRequest, index: int) -> None:
        await asyncio.sleep(0.004)

    with awake() as clock, CountingLedger(tmp_path, clock) as ledger:
        run_into(ledger, FakeTeacher(steady), asks_for(400, samples=1))
        assert ledger.durable == 400
        assert ledger.behind_s < 0.2 + 0.4  # the second is what a busy machine may add


def test_a_ledger_that_cannot_be_made_durable_ends_the_harvest(tmp_path: Path) -> None:
    class Broken(AnswerLedger):
        def sync(self) -> None:
            if self.dirty:
                raise StorageError("no space")

    async def waiting(request: GenerationRequest, index: int) -> None:
        await asyncio.sleep(3600 if index > 1 else 0)

    with pytest.raises(StorageError, match="no space"):
        run_into(Broken(tmp_path), FakeTeacher(waiting), asks_for(2), limits=Limits(concurrency=1))


def test_who_watches_sees_the_end(tmp_path: Path) -> None:
    seen: list[Standing] = []
    run(FakeTeacher(), asks_for(5), tmp_path, total=15, watch=seen.append)
    assert (seen[-1].state, seen[-1].answers, seen[-1].wanted, seen[-1].in_flight) == ("ended", 15, 15, 0)


def test_who_watches_is_told_one_thing_at_a_time_and_the_end_last(tmp_path: Path) -> None:
    told: list[str] = []

    def slow_watch(standing: Standing) -> None:
        told.append(f"{standing.state} begins")
        time.sleep(0.3 if standing.state == "running" else 0)
        told.append(f"{standing.state} is told")

    async def slow(request: GenerationRequest, index: int) -> None:
        while not told:  # the first news are being told when the last answer comes
            await asyncio.sleep(0.01)

    run(FakeTeacher(slow), asks_for(1), tmp_path, watch=slow_watch)
    assert told == ["running begins", "running is told", "ended begins", "ended is told"]


def test_news_that_cannot_be_told_are_warned_of_once_and_the_harvest_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async def slow(request: GenerationRequest, index: int) -> None:
        await asyncio.sleep(0.6)

    stage, prom = tmp_path / "stage", tmp_path / "textfile" / "h.prom"
    watch = Watch(stage, "run", prom)
    for folder in (prom, stage / PROGRESS):  # stand where files belong from here on
        folder.mkdir(parents=True)
    teacher, asks = FakeTeacher(slow), asks_for(16, samples=1)
    run(teacher, asks, stage, watch=watch, limits=Limits(concurrency=4))
    assert lines(stage) == expected(asks)
    assert len(teacher.requests) == 16
    warnings = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert len(warnings) == 2
    assert str(stage / PROGRESS) in warnings[0]
    for part in (str(prom), "--metrics-file", "goes on without it"):
        assert part in warnings[1]


@pytest.mark.parametrize("name", ["folder", "file/h.prom"])
def test_a_metrics_file_that_cannot_be_written_is_refused_beforehand(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(SettingsError, match=f"--metrics-file {tmp_path / name}: cannot be written"):
        Watch(tmp_path, "run", tmp_path / name)
    assert {path.name for path in tmp_path.iterdir()} == {"folder", "file"}


# what it may cost

PRICE = PriceSettings(input_per_million=1.0, output_per_million=10.0)
FATES = ["told", "not told", "failed", "late", "refused"]


@settings(max_examples=40, deadline=None)
@given(
    prompts=st.integers(1, 30),
    cap=st.integers(1, 40),
    concurrency=st.sampled_from([1, 3, 16]),
    fates=st.lists(st.sampled_from(FATES), max_size=5),
)
def test_a_cap_on_requests_is_reached_and_not_passed_and_another_command_goes_on_with_what_is_left(
    prompts: int, cap: int, concurrency: int, fates: list[str]
) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder, asked = Path(name), 0
        for allowed in (cap, cap + 5):
            teacher = FakeTeacher(Fates(fates))
            with Budget(folder / "spent.json", BudgetSettings(requests=allowed)) as budget:
                until_spent(teacher, asks_for(prompts, samples=1), folder, budget, concurrency)
            asked += len(teacher.requests)
            assert asked <= allowed
            assert budget.account.requests == asked


@settings(max_examples=40, deadline=None)
@given(
    prompts=st.integers(1, 30),
    cap=st.floats(0.0001, 0.006),
    concurrency=st.sampled_from([1, 3, 16]),
    fates=st.lists(st.sampled_from(FATES), max_size=5),
)
def test_a_cap_on_cost_is_never_passed_whatever_the_teacher_says_or_fails_to_say(
    prompts: int, cap: float, concurrency: int, fates: list[str]
) -> None:
    fate = Fates(fates)
    teacher = FakeTeacher(fate)
    with tempfile.TemporaryDirectory() as name, Budget(Path(name) / "spent.json", BudgetSettings(cost=cap), PRICE) as budget:
        spent = until_spent(teacher, asks_for(prompts, samples=2), Path(name), budget, concurrency)
        assert fate.charged <= budget.account.cost + 1e-12
        assert budget.account.cost <= cap + 1e-12
        if not spent:
            assert len(rows(Path(name))) == 2 * prompts


class Fates:
    """What becomes of each request in turn, and what the teacher takes for it: all that was asked for where it does not say."""

    def __init__(self, fates: list[str]) -> None:
        self._fates, self.charged = [*fates, "told"], 0.0

    def __call__(self, request: GenerationRequest, index: int) -> Answer | None:
        fate = self._fates[index % len(self._fates)]
        words = [text_of(request, i) for i in range(request.n)]
        tokens_in, tokens_out = estimated_tokens(request), sum(tokens_of(word) for word in words)
        if fate == "refused":
            raise refused()
        self.charged += (1.0 * tokens_in + 10.0 * tokens_out) / 1e6
        if fate in ("failed", "late"):
            error = TeacherFailed if fate == "failed" else TeacherLate
            raise error("no", maybe_billed=True)
        choices = completions(*words).choices
        return Answer(choices, tokens_in, tokens_out) if fate == "told" else Answer(choices)


def until_spent(teacher: FakeTeacher, asks: list[Ask], folder: Path, budget: Budget, concurrency: int) -> bool:
    """Whether the budget ended the harvest."""
    limits = Limits(concurrency=concurrency, max_attempts=1)
    try:
        run(teacher, asks, folder, limits=limits, budget=budget)
    except BudgetSpent:
        return True
    except (TeacherUnavailable, HarvestTooThin):
        return True  # all of the first fates were bad ones
    return False


def test_a_budget_that_is_spent_says_which_and_keeps_all_answers(tmp_path: Path) -> None:
    teacher = FakeTeacher()
    with (
        Budget(tmp_path / "spent.json", BudgetSettings(requests=7)) as budget,
        pytest.raises(BudgetSpent, match=r"harvest\.budget\.requests = 7 \(7 made\)"),
    ):
        run(teacher, asks_for(20, samples=1), tmp_path, budget=budget)
    assert len(rows(tmp_path)) == len(teacher.requests) == 7


def test_a_budget_just_large_enough_ends_no_harvest(tmp_path: Path) -> None:
    with Budget(tmp_path / "spent.json", BudgetSettings(requests=7)) as budget:
        assert run(FakeTeacher(), asks_for(7), tmp_path, budget=budget).missing == 0


def test_shares_that_come_back_let_a_tight_budget_go_on(tmp_path: Path) -> None:
    """Room for two at a time by what they may cost, for ten by what they do."""
    request = asks_for(1, samples=1)[0].request
    with Budget(tmp_path / "probe.json", BudgetSettings(cost=1), PRICE) as probe:
        most = probe.reserve(request)
        assert most is not None
    cheap = Answer(completions("a").choices, 1, 1)
    with Budget(tmp_path / "spent.json", BudgetSettings(cost=2.5 * most.cost), PRICE) as budget:
        teacher = FakeTeacher(lambda r, i: cheap)
        assert run(teacher, asks_for(10, samples=1), tmp_path, budget=budget).answers == 10
        assert teacher.peak == 2
        assert budget.account.cost == pytest.approx(10 * 11e-6)


def test_time_that_is_up_ends_a_harvest_that_waits_and_none_that_lacks_nothing(tmp_path: Path) -> None:
    async def slow(request: GenerationRequest, index: int) -> None:
        await asyncio.sleep(0.1)

    asks = asks_for(100, samples=1)
    with Budget(tmp_path / "spent.json", BudgetSettings(seconds=0.5)) as budget, pytest.raises(BudgetSpent, match=r"seconds = 0\.5"):
        run(FakeTeacher(slow), asks, tmp_path, budget=budget)
    had = len(rows(tmp_path))
    assert 4 <= had < 100
    with Budget(tmp_path / "spent.json", BudgetSettings(seconds=0.5)) as budget:
        held = [ask for ask in asks if ask.example_id in {row.example_id for row in rows(tmp_path)}]
        assert run(FakeTeacher(), held, tmp_path, budget=budget).answers == had


# killed

CHILD = """
    import asyncio, sys
    from pathlib import Path
    from shared.contracts import Completion, GenerationRequest, Sampling
    from shared.harvest.ask import Ask
    from shared.harvest.ledger import AnswerLedger
    from shared.harvest.scheduler import Limits, harvest
    from shared.harvest.teacher import Answer

    class Slow:
        most_choices = None

        async def ask(self, request):
            await asyncio.sleep(0.02)
            with open(sys.argv[2], "a") as asked:
                for i in range(request.n):
                    print(request.prompt, request.sampling.seed + i, file=asked)
            return Answer(tuple(
                Completion(text=f"{request.prompt} with seed {request.sampling.seed + i}", finish_reason="stop")
                for i in range(request.n)
            ))

    sampling = Sampling(temperature=0.8, seed=7, max_tokens=20)
    asks = [Ask(f"e{i}", GenerationRequest(prompt=f"prompt {i}", n=3, sampling=sampling), "http://t/v1", "m") for i in range(150)]
    with AnswerLedger(Path(sys.argv[1]), segment_bytes=9000) as ledger:
        asyncio.run(harvest(Slow(), asks, ledger, limits=Limits(concurrency=4), what="child"))
        ledger.compact()
    """


def test_a_harvest_that_is_killed_again_and_again_ends_with_the_same_lines_and_repeats_only_what_was_in_flight(tmp_path: Path) -> None:
    folder, asked, asks = tmp_path / "ledger", tmp_path / "asked", asks_for(150)
    kills, chance = 0, random.Random(5)
    for _ in range(40):
        target = held(folder) + chance.randrange(100, 200)
        child = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(CHILD), folder, asked],
            env={**os.environ, "PYTHONPATH": os.getcwd()},
            stderr=subprocess.DEVNULL,
        )
        while child.poll() is None:
            if held(folder) >= target:
                child.send_signal(signal.SIGKILL)
                child.wait()
            time.sleep(0.002)
        if child.returncode == 0:
            break
        assert child.returncode == -signal.SIGKILL
        kills += 1
    assert kills >= 2
    assert [file.name for file in answer_files(folder)] == ["responses.jsonl"]
    assert lines(folder) == expected(asks)
    repeated = sum(count - 1 for count in Counter(asked.read_text().splitlines()).values())
    assert repeated <= kills * 4 * SAMPLES  # four requests in flight


def held(folder: Path) -> int:
    """Lines in a ledger that another process is writing."""
    count = 0
    for file in answer_files(folder):
        try:
            count += file.read_bytes().count(b"\n")
        except FileNotFoundError:  # it has just been compacted
            return 0
    return count
