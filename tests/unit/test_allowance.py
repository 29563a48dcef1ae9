"""What workers of a cluster may send together: never more than the rate, the gate and the budget allow, whatever becomes of them."""

from __future__ import annotations

import asyncio
import dataclasses
import math
import sys
from bisect import bisect_left
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.artifacts import write_json
from shared.collect import Collected
from shared.contracts import Completion, GenerationRequest, Response, Sampling
from shared.errors import BudgetSpent, SettingsError, StorageError, TeacherBusy, TeacherUnavailable
from shared.harvest.allowance import AHEAD, SILENT_S, Allowance, Lease, Report
from shared.harvest.ask import Ask
from shared.harvest.budget import Account, Prices
from shared.harvest.census import together
from shared.harvest.leases import LeasedPace, LeasedPurse
from shared.harvest.ledger import AnswerLedger
from shared.harvest.pace import BEHIND_S
from shared.harvest.scheduler import Limits, harvest
from shared.harvest.segments import BASE, SegmentLedger, folder_of
from shared.harvest.teacher import Answer
from shared.settings import BudgetSettings, HarvestSettings, PriceSettings
from shared.storage import Storage
from student_trainer.cluster.harvest import MOST_DEATHS, Desk, Outcome, Partition, Worker
from student_trainer.harvest.stage import CLUSTER, answers_held

STEPS = ["want", "settle", "return", "die", "leave", "wait"]
NOTHING = Account(requests=0, cost=0.0, seconds=0.0)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def allowance(clock: Clock, kept: list[Account] | None = None, account: Account = NOTHING, **options: float | None) -> Allowance:
    caps = BudgetSettings(**{name: options.pop(name) for name in ("requests", "cost", "seconds") if name in options})  # type: ignore[arg-type]
    return Allowance(caps, account, (kept if kept is not None else []).append, clock=clock, **options)  # type: ignore[arg-type]


def due(lease: Lease, now: float) -> list[float]:
    return [now + lease.start_s + i * lease.every_s for i in range(lease.requests)]


@pytest.mark.parametrize(("per_s", "workers"), [(40, 2), (400, 4), (1000, 4), (5, 50)])
def test_requests_of_all_workers_are_due_one_after_the_other_at_the_given_rate(per_s: int, workers: int) -> None:
    clock = Clock()
    desk = allowance(clock, requests_per_minute=60 * per_s)
    times: list[float] = []
    ready = [0.0] * workers
    """When each worker has used up what it has."""
    while clock.now < 1020:
        for worker in range(workers):
            if ready[worker] <= clock.now:
                lease = desk.lease(Report(str(worker), want=64))
                mine = due(lease, clock.now)
                times += mine
                ready[worker] = mine[-1] if mine else clock.now + lease.later_s
        clock.now += 0.005
    times = sorted(t for t in times if t < 1020)
    assert len(times) == pytest.approx(0.97 * per_s * 20, rel=0.03)
    within_a_second = [bisect_left(times, t + 1) - i for i, t in enumerate(times)]
    assert max(within_a_second) <= 0.97 * per_s * (1 + BEHIND_S) + 1


def test_a_gate_closes_for_all_workers_and_opens_again() -> None:
    clock = Clock()
    desk = allowance(clock, requests_per_minute=6000)
    desk.lease(Report("a", want=10))
    desk.lease(Report("a", sent=1, settled=1, refused_s=(0.01,), gate_s=5.0))
    told = desk.lease(Report("b", want=10))
    assert told.requests == 0
    assert 5.0 <= told.gate_s < 5.1
    clock.now += 5.1
    assert desk.lease(Report("b", want=10)).requests > 0


def test_an_unknown_rate_is_learned_from_all_workers_refusals() -> None:
    clock = Clock()
    desk = allowance(clock)
    for worker in "ab":
        lease = desk.lease(Report(worker, want=50))
        assert (lease.requests, lease.every_s) == (50, 0.0)
    clock.now += 1.0
    desk.lease(Report("a", sent=50, settled=50, answered_s=(0.5,) * 40, refused_s=(0.5,) * 10, gate_s=1.0))
    clock.now += 1.2
    assert 20 < 1 / desk.lease(Report("b", want=50)).every_s < 110


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.sampled_from(["want", "settle", "return", "die", "leave", "wait"]), st.integers(1, 9)), max_size=120
    )
)
def test_no_cap_is_passed_and_the_account_on_disk_is_never_less_than_what_is_spent(steps: list[tuple[int, str, int]]) -> None:
    clock, kept = Clock(), [NOTHING]
    desk = allowance(clock, kept, requests=60, cost=5.0)
    names = {i: f"w{i}-0" for i in range(4)}
    held = dict.fromkeys(names, 0)
    sent = lost = 0
    cost = 0.0
    for worker, step, count in steps:
        n = min(count, held[worker])
        if step == "want":
            held[worker] += desk.lease(Report(names[worker], want=count, most_cost=0.1)).requests
        elif step == "settle":
            desk.lease(Report(names[worker], most_cost=0.1, sent=n, settled=n, spent=0.04 * n, answered_s=(0.1,) * n))
            held[worker], sent, cost = held[worker] - n, sent + n, cost + 0.04 * n
        elif step == "return":
            desk.lease(Report(names[worker], most_cost=0.1, returned=n))
            held[worker] -= n
        elif step == "leave":
            desk.lease(Report(names[worker], most_cost=0.1, last=True))
            held[worker], names[worker] = 0, names[worker] + "'"
        elif step == "die":  # all it held may have been sent
            sent, cost, lost = sent + held[worker], cost + 0.1 * held[worker], lost + held[worker]
            held[worker], names[worker] = 0, names[worker] + "+"
        else:
            clock.now += 10 * count
        out = sum(held.values())
        assert sent + out <= desk.account.requests <= 60
        assert cost + 0.1 * out <= desk.account.cost + 1e-9
        assert desk.account.cost <= 5.0 + 1e-9
        assert kept[-1].requests >= desk.account.requests
        assert kept[-1].cost >= desk.account.cost - 1e-9
        assert kept[-1].requests <= 60
    desk.close()
    assert kept[-1].requests == desk.account.requests


def test_all_of_a_budget_is_used_though_much_of_it_is_leased_and_returned() -> None:
    clock = Clock()
    desk = allowance(clock, requests=100)
    a, b = (desk.lease(Report(worker, want=64)).requests for worker in "ab")
    assert (a, b) == (64, 36)
    assert desk.lease(Report("b", want=1, sent=36, settled=36)).later_s > 0  # a may return some
    desk.lease(Report("a", sent=14, settled=14, last=True))
    assert desk.lease(Report("b", want=64)).requests == 50
    assert "harvest.budget.requests = 100" in desk.lease(Report("b", want=1, sent=50, settled=50)).spent


def test_what_a_dead_worker_had_leased_is_spent_and_is_waited_for_no_longer_than_that() -> None:
    clock = Clock()
    desk = allowance(clock, requests=10)
    desk.lease(Report("dead", want=10))
    assert not desk.lease(Report("b", want=1)).spent
    clock.now += SILENT_S + 1
    assert desk.lease(Report("b", want=1)).spent
    assert desk.account.requests == 10


def test_a_new_desk_goes_on_from_the_account_and_wastes_a_few_blocks_at_most() -> None:
    clock, kept = Clock(), [NOTHING]
    desk = allowance(clock, kept, requests=10_000, requests_per_minute=60 * 400)
    for _ in range(20):
        n = desk.lease(Report("a", want=64)).requests
        clock.now += n / 400
        desk.lease(Report("a", sent=n, settled=n))
    spent = desk.account.requests
    again = allowance(clock, kept, kept[-1], requests=10_000)
    assert spent <= again.account.requests <= spent + AHEAD * 100


def test_a_report_that_comes_twice_is_taken_note_of_once() -> None:
    desk = allowance(Clock(), cost=10.0)
    assert desk.lease(Report("a", want=10, number=1, most_cost=0.5)).requests == 10
    report = Report("a", want=1, number=2, most_cost=0.5, sent=4, settled=4, spent=0.4, returned=1)
    first, once = desk.lease(report), desk.account
    assert desk.lease(report) == first  # whose way back was cut off
    assert desk.account == once
    last = Report("a", number=3, most_cost=0.5, last=True)
    for _ in range(2):
        desk.lease(last)
        assert (desk.account.requests, desk.account.cost) == (4, pytest.approx(0.4))


def test_nothing_is_leased_that_is_not_on_the_disk() -> None:
    full, kept = True, [NOTHING]

    def keep(account: Account) -> None:
        if full:
            raise StorageError("no space left")
        kept.append(account)

    desk = Allowance(BudgetSettings(requests=1000), NOTHING, keep, clock=Clock())
    for _ in range(3):
        with pytest.raises(StorageError):
            desk.lease(Report("a", want=50, number=1))
        assert desk.account.requests == 0
    full = False
    assert desk.lease(Report("a", want=50, number=1)).requests == 50
    assert kept[-1].requests >= 50


def test_a_new_desk_gives_nothing_back_of_what_the_one_before_had_leased() -> None:
    clock, kept = Clock(), [NOTHING]
    desk = allowance(clock, kept, requests=1000, cost=100.0)
    desk.lease(Report("a", want=40, number=1, most_cost=1.0))
    again = allowance(clock, kept, kept[-1], requests=1000, cost=100.0)
    before = again.account
    again.lease(Report("a", number=2, most_cost=1.0, sent=0, settled=30, spent=3.0, answered_s=(0.1,) * 30))
    again.lease(Report("a", number=3, most_cost=1.0, returned=10, last=True))
    assert (again.account.requests, again.account.cost) == (before.requests, before.cost)
    # nor does it learn a rate from what it never saw being sent
    clock.now += 1
    again.lease(Report("b", number=1, want=10))
    again.lease(Report("b", number=2, sent=10, settled=10, answered_s=(0.5,) * 5, refused_s=(0.5,) * 5, gate_s=0.5))
    clock.now += 1
    assert again.lease(Report("b", number=3, want=10)).requests > 0


def test_of_a_small_budget_a_desk_that_dies_wastes_a_twentieth() -> None:
    kept = [NOTHING]
    desk = allowance(Clock(), kept, requests=500)
    leased = desk.lease(Report("a", want=16)).requests
    assert leased <= kept[-1].requests <= leased + (500 - leased) / 20


def test_time_is_a_cap_of_all_together() -> None:
    clock = Clock()
    desk = allowance(clock, account=Account(requests=0, cost=0.0, seconds=50.0), seconds=60.0)
    assert desk.lease(Report("a", want=1)).requests
    clock.now += 11
    assert "harvest.budget.seconds = 60" in desk.lease(Report("a", want=1)).spent


def test_every_lease_says_that_the_time_is_up_even_to_those_who_want_nothing() -> None:
    clock = Clock()
    desk = allowance(clock, seconds=60.0)
    assert desk.lease(Report("a", want=1)).spent == ""
    clock.now += 61
    assert "harvest.budget.seconds = 60" in desk.lease(Report("a", number=1)).spent
    assert not desk.ending


@pytest.mark.parametrize(("error", "ends"), [(BudgetSpent("harvest.budget.seconds = 60"), False), (TeacherUnavailable("dead"), True)])
def test_a_budget_that_is_spent_does_not_cut_off_what_others_have_in_flight_and_any_other_error_does(error: Exception, ends: bool) -> None:
    ended: list[bool] = []

    class Ends(Worker):
        async def _harvested(self, partition: Partition) -> Outcome:
            raise error

    desk = SimpleNamespace(end=SimpleNamespace(remote=lambda: ended.append(True)))
    found = Ends(SimpleNamespace(), desk)({"number": [0], "start": [0], "size": [0]})  # type: ignore[arg-type]
    assert type(error).__name__ in found["outcome"][0]
    assert bool(ended) == ends


# workers, in one event loop


class Teacher:
    """Answers by the prompt's text; takes `per_s` a second, if given, and says how many came."""

    most_choices = None

    def __init__(self, *, delay_s: float = 0.01, per_s: float | None = None) -> None:
        self.delay_s, self.per_s, self.calls, self.refused, self.asked = delay_s, per_s, 0, 0, []  # type: ignore[var-annotated]
        self._capacity = (per_s or 0.0) / 10
        self._tokens, self._at = self._capacity, 0.0

    async def ask(self, request: GenerationRequest) -> Answer:
        now = asyncio.get_running_loop().time()
        self.calls += 1
        if self.per_s:
            self._tokens = min(self._capacity, self._tokens + (now - (self._at or now)) * self.per_s)
            self._at = now
            if self._tokens < 1:
                self.refused += 1
                raise TeacherBusy("slowly", retry_after_s=0.2)
            self._tokens -= 1
        self.asked.append(request.prompt)
        await asyncio.sleep(self.delay_s)
        return Answer(tuple(Completion(text=f"{request.prompt} {i}", finish_reason="stop") for i in range(request.n)), 10, 5)

    def rendered(self, request: GenerationRequest) -> str:
        return ""

    async def aclose(self) -> None: ...


def asks_of(count: int, first: int = 0) -> list[Ask]:
    return [
        Ask(f"e{i}", GenerationRequest(prompt=f"question {i}", n=2, sampling=Sampling(max_tokens=5)), identity="t", model="t")
        for i in range(first, first + count)
    ]


async def worker_of(desk: Allowance, teacher: Teacher, asks: list[Ask], ledger: SegmentLedger | AnswerLedger, name: str) -> Collected:
    drawn = 0

    def counted() -> Iterator[Ask]:
        nonlocal drawn
        for drawn, ask in enumerate(asks, 1):  # noqa: B007
            yield ask

    async def carry(report: Report) -> Lease:
        await asyncio.sleep(0.001)
        return desk.lease(report)

    prices = Prices(PriceSettings(input_per_million=1e6, output_per_million=0))
    most = max(prices.most(ask.request) for ask in asks)
    pace = LeasedPace(32, carry, worker=name, left=lambda: len(asks) - drawn, tokens=10, most_cost=most)
    limits = Limits(patience_s=5, timeout_s=5, concurrency=32, first_failures=None)
    try:
        return await harvest(
            teacher, counted(), ledger, limits=limits, budget=LeasedPurse(pace, prices), pace=pace, stopping=lambda: pace.ending
        )
    finally:
        await pace.aclose()


def storage_at(path: Path) -> Storage:
    return Storage(str(path))


def run_workers(desk: Allowance, teacher: Teacher, tmp_path: Path, *, workers: int, prompts: int) -> list[Collected | BaseException]:
    async def all_of_them() -> list[Collected | BaseException]:
        ledgers = [SegmentLedger(storage_at(tmp_path), i, f"w{i}") for i in range(workers)]
        running = [worker_of(desk, teacher, asks_of(prompts, prompts * i), ledger, f"w{i}") for i, ledger in enumerate(ledgers)]
        done = await asyncio.gather(*running, return_exceptions=True)
        for ledger in ledgers:
            ledger.close()
        return done

    return asyncio.run(all_of_them())


def real(caps: BudgetSettings | None = None, **options: float | None) -> Allowance:
    return Allowance(caps or BudgetSettings(), NOTHING, lambda account: None, **options)  # type: ignore[arg-type]


def test_workers_reach_the_given_rate_together_and_are_not_refused(tmp_path: Path) -> None:
    desk, teacher = real(requests_per_minute=60 * 200), Teacher(per_s=200)
    done = run_workers(desk, teacher, tmp_path, workers=4, prompts=100)
    assert [c.answers for c in done if isinstance(c, Collected)] == [200] * 4
    assert sorted(teacher.asked) == sorted(f"question {i}" for i in range(400))
    assert teacher.refused <= 0.05 * teacher.calls
    assert desk.account.requests == teacher.calls


def test_workers_find_an_unknown_rate_together(tmp_path: Path) -> None:
    desk, teacher = real(), Teacher(per_s=150)
    done = run_workers(desk, teacher, tmp_path, workers=3, prompts=150)
    assert [c.answers for c in done if isinstance(c, Collected)] == [300] * 3
    assert teacher.calls - teacher.refused == 450
    assert teacher.refused > 0
    assert teacher.refused < 0.2 * teacher.calls


def test_a_budget_of_requests_ends_all_workers_and_is_used_to_the_last(tmp_path: Path) -> None:
    desk, teacher = real(BudgetSettings(requests=77)), Teacher()
    done = run_workers(desk, teacher, tmp_path, workers=3, prompts=60)
    assert all(isinstance(c, BudgetSpent) for c in done), done
    assert teacher.calls == 77 == desk.account.requests


def test_a_budget_of_money_is_never_passed(tmp_path: Path) -> None:
    desk, teacher = real(BudgetSettings(cost=3000.0)), Teacher()
    done = run_workers(desk, teacher, tmp_path, workers=3, prompts=200)
    assert any(isinstance(c, BudgetSpent) for c in done)
    assert teacher.calls * 10 == pytest.approx(desk.account.cost)  # ten tokens in each, at 1
    assert 3000 - 3 * 32 * 200 <= desk.account.cost <= 3000


def test_a_desk_out_of_reach_for_a_while_is_waited_for(tmp_path: Path) -> None:
    desk, failures = real(), 3
    lease = desk.lease

    def flaky(report: Report) -> Lease:
        nonlocal failures
        if failures:
            failures -= 1
            raise ConnectionError("restarting")
        return lease(report)

    desk.lease = flaky  # type: ignore[method-assign]
    (done,) = run_workers(desk, Teacher(), tmp_path, workers=1, prompts=5)
    assert isinstance(done, Collected)
    assert done.answers == 10
    assert failures == 0


def test_an_end_that_is_asked_for_ends_all_workers_with_everything_kept(tmp_path: Path) -> None:
    desk, teacher = real(requests_per_minute=6000), Teacher()

    async def steps() -> tuple[Collected, int]:
        with SegmentLedger(storage_at(tmp_path), 0, "w") as ledger:
            task = asyncio.create_task(worker_of(desk, teacher, asks_of(1000), ledger, "w"))
            await asyncio.sleep(0.5)
            desk.ending = True
            return await asyncio.wait_for(task, 5), teacher.calls

    collected, calls = asyncio.run(steps())
    assert 0 < collected.answers == 2 * calls < 2000


def test_the_census_of_partitions_is_that_of_the_whole(tmp_path: Path) -> None:
    def counted(asks: list[Ask], folder: Path) -> Collected:
        with AnswerLedger(folder) as ledger:
            return asyncio.run(worker_of(real(), Teacher(delay_s=0), asks, ledger, "w"))

    whole = counted(asks_of(40), tmp_path / "whole")
    parts = [counted(asks_of(20, first), tmp_path / str(first)) for first in (0, 20)]
    merged = together(parts, wanted=80, seconds=1.0)
    own = {"requests": 0, "seconds": 0.0}
    assert dataclasses.replace(merged, **own) == dataclasses.replace(whole, **own)  # type: ignore[arg-type]


# ledgers of partitions


def row(number: int, status: str = "ok", example: str | None = None) -> Response:
    return Response(
        key=f"{number:064x}", example_id=example or f"e{number}", sample=0, status=status, text=f"text {number}" if status == "ok" else "",  # type: ignore[arg-type]
        finish_reason="stop" if status == "ok" else None, reason=None if status == "ok" else "unanswered: dead", model="m", latency_s=0.1,
        attempts=1, received_at="2026-01-01T00:00:00+00:00",
    )  # fmt: skip


def bucket(path: Path) -> Storage:
    """Storage that is not taken for a local one, as a bucket is not: a folder behind fsspec."""
    path.mkdir(parents=True, exist_ok=True)
    storage = Storage(str(path))
    storage.local = False
    return storage


KINDS: dict[str, Callable[[Path], Storage]] = {"folder": storage_at, "bucket": bucket}


@pytest.mark.parametrize("kind", KINDS)
def test_the_next_owner_of_a_partition_has_all_that_was_durable(tmp_path: Path, kind: str) -> None:
    storage = KINDS[kind](tmp_path / "s")
    if kind == "bucket":
        (tmp_path / "s" / folder_of(3)).mkdir(parents=True)
    first = SegmentLedger(storage, 3, "a")
    first.append([row(1), row(2, "failed")])
    first.sync()
    first.append([row(3)])  # and it dies
    with SegmentLedger(storage, 3, "b") as second:
        kept = {1, 2, 3} if kind == "folder" else {1, 2}
        assert {key for key, _ in second.find([f"{n:064x}" for n in range(5)])} == {f"{n:064x}" for n in kept}
        second.append([row(2), row(3)])
        second.finish()
    assert storage.names(folder_of(3)) == [f"{folder_of(3)}/{BASE}"]
    third = SegmentLedger(storage, 3, "c")
    held = third.find([f"{2:064x}"])[f"{2:064x}", hash("e2")]
    assert (held.kind, third.read(held).text) == ("ok", "text 2")
    assert len(storage.read(f"{folder_of(3)}/{BASE}").splitlines()) == 3  # type: ignore[union-attr]


def test_without_pyarrow_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(SettingsError, match=r"pip install .*\[cluster\]"):
        Storage(str(tmp_path))


def test_objects_of_a_bucket_are_written_once_a_second_and_at_the_end(tmp_path: Path) -> None:
    storage = bucket(tmp_path / "s")
    (tmp_path / "s" / folder_of(0)).mkdir(parents=True)
    with SegmentLedger(storage, 0, "a") as ledger:
        for number in range(20):
            ledger.append([row(number)])
            ledger.sync()
        assert len(storage.names(folder_of(0))) == 1
    assert len(storage.names(folder_of(0))) == 2
    with SegmentLedger(storage, 0, "b") as again:
        assert len(again.find([f"{n:064x}" for n in range(20)])) == 20


def test_a_dead_owners_torn_line_is_left_out_and_its_neighbours_partition_untouched(tmp_path: Path) -> None:
    storage = storage_at(tmp_path)
    with SegmentLedger(storage, 0, "a") as ledger:
        ledger.append([row(1), row(2)])
    with SegmentLedger(storage, 1, "a") as other:
        other.append([row(7)])
    (segment,) = storage.names(folder_of(0))
    file = Path(storage.at(segment))
    file.write_bytes(file.read_bytes()[:-9])
    with SegmentLedger(storage, 0, "b") as again:
        assert len(again.find([f"{n:064x}" for n in (1, 2, 7)])) == 1


def test_two_owners_at_work_on_one_partition_lose_nothing_of_each_other(tmp_path: Path) -> None:
    storage = storage_at(tmp_path)
    dead = SegmentLedger(storage, 0, "a")
    dead.append([row(1), row(2)])
    alive = SegmentLedger(storage, 0, "b")
    alive.append([row(3), row(4)])
    dead.append([row(5)])  # it was not dead
    dead.finish()
    alive.append([row(6)])
    alive.finish()
    with SegmentLedger(storage, 0, "c") as ledger:
        assert len(ledger.find([f"{n:064x}" for n in range(1, 7)])) == 6
    assert storage.names(folder_of(0)) == [f"{folder_of(0)}/{BASE}"]


def test_another_examples_answer_to_the_same_request_is_found(tmp_path: Path) -> None:
    with SegmentLedger(storage_at(tmp_path), 0, "a") as ledger:
        ledger.append([row(1, example="x")])
        twin = ledger.twin(f"{1:064x}")
        assert twin is not None
        assert ledger.read(twin).example_id == "x"
        assert ledger.find([f"{1:064x}"]).keys() == {(f"{1:064x}", hash("x"))}
        assert ledger.twin(f"{2:064x}") is None


def test_a_storage_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file"):
        Storage(str(tmp_path / "file")).write("below/it", b"x")


def test_a_worker_that_could_not_send_in_time_returns_its_turn() -> None:
    async def steps() -> tuple[float, Report]:
        clock, reports = Clock(), []

        async def carry(report: Report) -> Lease:
            reports.append(report)
            return Lease(5, 0.0, 0.1) if report.want else Lease()

        pace = LeasedPace(8, carry, worker="w", left=lambda: 100, tokens=1, most_cost=0, clock=clock)
        assert pace.delay() == math.inf
        await asyncio.sleep(0.01)
        assert pace.delay() == 0.0
        clock.now += 5
        assert pace.delay() == math.inf  # what was due five seconds ago is not sent now
        await asyncio.sleep(0.01)
        return pace.delay(), reports[-1]

    delay, report = asyncio.run(steps())
    assert (delay, report.returned) == (0.0, 5)


def test_answers_in_partitions_are_counted_wherever_they_can_be_read(tmp_path: Path) -> None:
    stage = tmp_path / "stage"
    with AnswerLedger(stage) as ledger:
        ledger.append([row(1)])
    for where, numbers in ((stage, (1, 2)), (tmp_path / "store" / "mine", (2, 3))):
        with SegmentLedger(storage_at(where), 4, "a") as part:
            part.append([row(number) for number in numbers])
    assert set(answers_held(stage)[0].values()) == {"ok"}
    assert (len(answers_held(stage)[0]), answers_held(stage)[1]) == (2, "")
    for where, count, told in (("", 2, ""), (str(tmp_path / "store"), 3, ""), ("s3://bucket/run", 2, "s3://bucket/run")):
        write_json(stage / CLUSTER, {"storage": where, "folder": "mine"})
        assert (len(answers_held(stage)[0]), answers_held(stage)[1]) == (count, told)


def test_a_partition_at_which_worker_after_worker_dies_ends_the_harvest(tmp_path: Path) -> None:
    job = SimpleNamespace(storage=storage_at(tmp_path), recipe=SimpleNamespace(harvest=HarvestSettings()))
    desk = Desk(job)  # type: ignore[arg-type]
    for _ in range(MOST_DEATHS):
        assert desk.begin(3)
    assert desk.begin(4)
    with pytest.raises(StorageError, match="partition 3: 10 workers have died"):
        desk.begin(3)
    desk.end()
    assert not desk.begin(4)


def test_what_is_leased_after_the_close_is_nothing(tmp_path: Path) -> None:
    kept: list[Account] = []
    desk = Allowance(BudgetSettings(requests=1000), Account(requests=0, cost=0.0, seconds=0.0), kept.append)
    assert desk.lease(Report("a", want=10)).requests == 10
    desk.close()
    assert desk.lease(Report("b", want=10)).requests == 0
    assert kept[-1].requests == 10
