"""The harvest on a cluster: partitions of the prompts on Ray Data's actors, what they may send leased from one place.

RUN/responses/teacher, or a folder of its own in --storage, is on a file system or in a bucket that all nodes share. Each partition has a
ledger of its own there (shared/harvest/segments.py), which whoever works on it after another has died reads first. When all are done their
lines become responses.jsonl, and the run is as if one machine had harvested it.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import math
import os
import signal
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from shared.artifacts import Run, Stage, temporary_name, write_atomic, write_json
from shared.cluster.ways import connected, error_of, here, refuse_unless_ready, workers_of
from shared.collect import Collected
from shared.commands import Interruption, Progress, interruptible
from shared.contracts import Example, Response
from shared.datasets.stage import prepare
from shared.errors import INTERRUPTED, TERMINATED, BudgetSpent, DataError, DistillError, RunMismatch, StorageError, storage_error
from shared.harvest.allowance import Allowance, Lease, Report
from shared.harvest.budget import Account, Prices, estimated_tokens
from shared.harvest.census import together
from shared.harvest.leases import LeasedPace, LeasedPurse
from shared.harvest.ledger import PARTITIONS, AnswerLedger, answer_files
from shared.harvest.scheduler import Limits, Standing, harvest
from shared.harvest.segments import BASE, SegmentLedger, folder_of
from shared.http.client import refuse_too_many, teacher_of
from shared.settings import Recipe
from shared.storage import Storage
from student_trainer.harvest.stage import ACCOUNT, CLUSTER, STAGE, Prompts, check, drawn_shots, finish
from student_trainer.harvest.watch import Watch

PARTITION_ROWS = 1024
"""Prompts of a partition at most: what one worker has in memory, and what is read again when it dies."""
PARTITIONS_A_WORKER = 4
"""Of a small harvest, so that no worker is idle for long at its end."""
LEAST_ROWS = 16
POLL_S = 0.5
TELLING = 100
"""Workers that tell how they stand in a second."""
LONGEST_TELL_S = 10.0
MOST_DEATHS = 10
"""Of workers at one partition: Ray would go on for ever."""
LOOK_S = 5.0
"""Seconds between two looks whether there are nodes to work on."""
CALL_S = 20.0
"""Seconds in which the desk must have answered; then it is asked again."""
ROWS = "train.jsonl"


@dataclass(frozen=True)
class Partition:
    """Consecutive lines of the training rows."""

    number: int
    start: int
    """Bytes."""
    size: int


@dataclass(frozen=True)
class Job:
    """What every worker knows."""

    recipe: Recipe
    storage: Storage
    teacher_url: str | None
    retry: frozenset[str]
    drawn: tuple[Example, ...]
    tell_every_s: float
    """How often a worker tells how it stands: the more there are, the less often."""


NOTHING = Collected(prompts=0, answers=0, failed={}, missing=0, cut_off=0, distinct_fraction=1.0)


class Layout(BaseModel):
    """How a harvest was cut into partitions, for whoever goes on with it."""

    model_config = ConfigDict(extra="forbid")

    storage: str
    """The URI that was given; empty for the stage's folder."""
    folder: str
    """Of this harvest alone, below it: nobody else's files are there."""
    partition_rows: int = Field(ge=1)

    def opened(self, stage: Path) -> Storage:
        return Storage(self.storage or str(stage), self.folder)


@dataclass(frozen=True)
class Outcome:
    """What became of a partition. `error`: the name of its class and its message."""

    collected: Collected
    redacted: dict[str, int]
    error: tuple[str, str] | None = None


def run_on_cluster(
    run: Run,
    on: str,
    *,
    workers: int | None = None,
    storage: str | None = None,
    teacher_url: str | None = None,
    retry: frozenset[str] = frozenset(),
    metrics_file: Path | None = None,
) -> int:
    """As `student_trainer.harvest.stage.run_stage`, on a cluster. Returns the exit code.

    Raises what that raises, and SettingsError for a cluster that cannot be used, before anything is asked.
    """
    recipe = run.recipe
    recipe.teacher.address(teacher_url)  # nobody to ask is found out here
    train = prepare(run)["train"]
    stage = run.stage(STAGE, inputs=["dataset"])
    if stage.complete and not retry and len(answer_files(stage.path)) == 1 and not (stage.path / CLUSTER).exists():
        print(f"{STAGE}: complete, nothing to do")
        return 0
    began = time.monotonic()
    wanted, shared = len(train) * recipe.harvest.samples, Storage(storage or str(stage.path))
    watch = Watch(stage.path, run.path.name, metrics_file)
    with connected(on) as ray, interruptible() as stopping:
        key = recipe.teacher.api_key_file
        nodes = refuse_unless_ready(ray, shared, readable=[key] if key else [])
        number = workers_of(ray, workers)
        store, plan = planned(stage, shared.uri if storage else "", run.path / "dataset" / ROWS, rows=len(train), workers=number)
        print(f"{STAGE}: {number} workers on {nodes} node{'s' if nodes > 1 else ''}, {len(plan)} partitions", flush=True)
        job = Job(recipe, store, teacher_url, retry, drawn_shots(run, train), tell_every_s=min(LONGEST_TELL_S, max(1.0, number / TELLING)))
        outcomes, account = carried_out(ray, job, plan, workers=number, watch=watch, total=wanted, stopping=stopping)
    write_atomic(stage.path / ACCOUNT, account_line(account).decode())
    collected = together([outcome.collected for outcome in outcomes], wanted=wanted, seconds=time.monotonic() - began)
    for outcome in outcomes:
        if outcome.error is not None:
            raise error_of(*outcome.error)
    stopping.raise_if_asked()
    check(recipe, collected)
    answers = gathered(stage, store, plan, rows=collected.answers + sum(collected.failed.values()))
    redacted: Counter[str] = Counter()
    for outcome in outcomes:
        redacted.update(outcome.redacted)
    finish(stage, answers, collected, teacher_url=teacher_url, account=account, redacted=redacted)
    return 0


# what is to be done


def planned(stage: Stage, storage: str, file: Path, *, rows: int, workers: int) -> tuple[Storage, list[Partition]]:
    """Where the answers are kept, and the partitions of the rows, the same at every call; what one machine has harvested and spent is
    dealt out at the first.

    Raises RunMismatch where the harvest was begun with another storage.
    """
    note = stage.path / CLUSTER
    if note.exists():
        layout = _layout(note)
        if layout.storage != storage:
            theirs = f"with --storage {layout.storage}" if layout.storage else "without --storage"
            raise RunMismatch(f"{stage.path}: this harvest was begun {theirs}; go on like that")
    else:
        each = min(PARTITION_ROWS, max(LEAST_ROWS, -(-rows // (PARTITIONS_A_WORKER * workers))))
        layout = Layout(storage=storage, folder=f"harvest-{uuid.uuid4().hex[:16]}" if storage else "", partition_rows=each)
        write_json(note, layout.model_dump())
    store, partitions = layout.opened(stage.path), list(cut(file, layout.partition_rows))
    if not store.has(ROWS):  # the last that is written, and the first that is removed
        store.discard(PARTITIONS)
        deal(stage.path, store, partitions, file)
        spent = max(account_in(store), account_in(Storage(str(stage.path))), key=lambda account: (account.requests, account.cost))
        store.write(ACCOUNT, account_line(spent))
        store.write(ROWS, file.read_bytes())
    return store, partitions


def _layout(note: Path) -> Layout:
    try:
        return Layout.model_validate_json(note.read_bytes())
    except ValidationError as exc:
        raise DataError(f"{note}: not readable; remove it to harvest anew") from exc


def cut(file: Path, rows: int) -> Iterator[Partition]:
    """Partitions of so many lines of a file."""
    start = end = count = number = 0
    with file.open("rb") as lines:
        for line in lines:
            end, count = end + len(line), count + 1
            if count == rows:
                yield Partition(number, start, end - start)
                start, count, number = end, 0, number + 1
    if count:
        yield Partition(number, start, end - start)


def deal(stage: Path, storage: Storage, partitions: Sequence[Partition], file: Path) -> None:
    """Give every partition what a harvest on one machine has of its prompts."""
    if not answer_files(stage):
        return
    where = {}
    with file.open("rb") as lines:
        for partition in partitions:
            for line in lines.read(partition.size).splitlines():
                where[json.loads(line)["id"]] = partition.number
    rows: dict[int, list[Response]] = {}
    with AnswerLedger(stage) as ledger:
        for row in ledger.rows():
            if row.example_id in where:
                rows.setdefault(where[row.example_id], []).append(row)
    for number, found in rows.items():
        data = b"".join(row.model_dump_json().encode() + b"\n" for row in found)
        storage.write(f"{folder_of(number)}/{BASE}", data)


def gathered(stage: Stage, storage: Storage, partitions: Sequence[Partition], *, rows: int) -> Path:
    """All lines in one file, RUN/responses/teacher/responses.jsonl; the partitions are removed after that.

    Raises StorageError, also where there are not as many lines as `rows`, which were counted when they were made.
    """
    out, count = stage.path / BASE, 0
    temporary = temporary_name(out)
    try:
        with temporary.open("wb") as file:
            for partition in partitions:
                found = storage.read(f"{folder_of(partition.number)}/{BASE}") or b""
                count += found.count(b"\n")
                file.write(found)
            file.flush()
            os.fsync(file.fileno())
        if count != rows:
            raise StorageError(f"{storage.at(PARTITIONS)}: {count} answers are there, and {rows} were counted; run the same command again")
        os.replace(temporary, out)
        for other in answer_files(stage.path):
            if other != out:
                other.unlink()
    except OSError as exc:
        raise storage_error(exc, out) from exc
    finally:
        temporary.unlink(missing_ok=True)
    storage.remove(ROWS)
    storage.discard("" if _layout(stage.path / CLUSTER).storage else PARTITIONS)
    (stage.path / CLUSTER).unlink()
    return out


# who does it


class Desk:
    """The one place that leases what may be sent, as an actor: it is started again where it dies, and goes on from the account on disk."""

    def __init__(self, job: Job) -> None:
        self._job, self._storage = job, job.storage
        self._standings: dict[int, Standing] = {}
        """By partition: of two workers at the same one the later counts."""
        self._begun: Counter[int] = Counter()

    @cached_property
    def _allowance(self) -> Allowance:
        settings = self._job.recipe.harvest  # not at the start: an actor that fails then is never started again
        return Allowance(
            settings.budget,
            account_in(self._storage),
            self._keep,
            requests_per_minute=settings.requests_per_minute,
            tokens_per_minute=settings.tokens_per_minute,
        )

    def _keep(self, account: Account) -> None:
        self._storage.write(ACCOUNT, account_line(account))

    def lease(self, report: Report) -> Lease:
        return self._allowance.lease(report)

    def watch(self, partition: int, standing: Standing) -> None:
        self._standings[partition] = standing

    def end(self) -> None:
        self._allowance.ending = True

    def begin(self, partition: int) -> bool:
        """Whether to work on it. Raises StorageError for one at which worker after worker has died."""
        self._begun[partition] += 1
        if self._begun[partition] > MOST_DEATHS:
            raise StorageError(
                f"partition {partition}: {MOST_DEATHS} workers have died at it, most likely for want of memory; lower "
                "harvest.concurrency or give the nodes more, and run the same command again"
            )
        return not self._allowance.ending

    def standing(self) -> tuple[list[Standing], Account]:
        """How the workers stand, and what is spent."""
        return list(self._standings.values()), self._allowance.account

    def close(self) -> None:
        self._allowance.close()


class Worker:
    """An actor of Ray Data's: harvests one partition after another."""

    def __init__(self, job: Job, desk: Any) -> None:
        self._job, self._desk = job, desk
        self._passed = False
        """Whether the first prompts of a partition have shown that the teacher answers."""

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        partition = Partition(*(int(batch[name][0]) for name in ("number", "start", "size")))
        try:
            outcome = asyncio.run(self._harvested(partition))
        except Exception as exc:
            error = desks_own(exc)
            if error is None:
                raise  # a fault of ours: all of it is told
            if not isinstance(error, BudgetSpent):  # which others are told with their leases: what they have in flight is paid for
                with suppress(Exception):
                    self._desk.end.remote()  # nobody else need find out the same
            outcome = Outcome(NOTHING, {}, (type(error).__name__, f"{error} (on {os.uname().nodename})"))
        return {"outcome": [json.dumps(dataclasses.asdict(outcome))]}

    async def _harvested(self, partition: Partition) -> Outcome:
        job, recipe = self._job, self._job.recipe
        refuse_too_many(recipe.harvest.concurrency, "harvest.concurrency")
        if not await asyncio.wait_for(self._desk.begin.remote(partition.number), CALL_S * 3):
            return Outcome(NOTHING, {})
        lines = job.storage.range(ROWS, partition.start, partition.size).splitlines()
        prompts = Prompts(recipe, [Example.model_validate_json(line) for line in lines], job.drawn)
        asks, prices = list(prompts), Prices(recipe.teacher.price, recipe.teacher.custom)
        owner = f"{os.uname().nodename}-{uuid.uuid4().hex[:12]}"
        drawn = 0
        limits = Limits.of(recipe)
        if self._passed:
            limits = dataclasses.replace(limits, first_failures=None)

        def counted() -> Iterator[Any]:
            nonlocal drawn
            for drawn, ask in enumerate(asks, 1):  # noqa: B007
                yield ask

        async def ask(report: Report) -> Lease:
            lease: Lease = await asyncio.wait_for(self._desk.lease.remote(report), CALL_S)
            return lease

        pace = LeasedPace(
            recipe.harvest.concurrency,
            ask,
            worker=owner,
            left=lambda: len(asks) - drawn,
            tokens=sum(estimated_tokens(a.request, limits.custom) + a.request.n * a.request.sampling.max_tokens for a in asks) / len(asks),
            most_cost=max(prices.most(a.request) for a in asks),
            timeout_s=recipe.teacher.timeout_s,
        )
        loop = asyncio.get_running_loop()

        told_at = -math.inf

        def watch(standing: Standing) -> None:
            nonlocal told_at
            if standing.state == "ended" or time.monotonic() - told_at >= job.tell_every_s:
                told_at = time.monotonic()
                self._desk.watch.remote(partition.number, standing)
                loop.call_soon_threadsafe(pace.tell, job.tell_every_s)

        teacher = teacher_of(recipe.teacher, job.teacher_url)
        try:
            with SegmentLedger(job.storage, partition.number, owner) as ledger:
                try:
                    collected = await harvest(
                        teacher,
                        counted(),
                        ledger,
                        limits=limits,
                        total=len(asks) * recipe.harvest.samples,
                        retry=job.retry,
                        budget=LeasedPurse(pace, prices),
                        watch=watch,
                        stopping=lambda: pace.ending,
                        pace=pace,
                    )
                finally:
                    with suppress(Exception):  # then what is left of its lease counts as spent
                        await pace.aclose()
                ledger.finish()
        finally:
            await teacher.aclose()
        self._passed = self._passed or collected.answers > 0
        return Outcome(collected, dict(prompts.redaction.counts))


def desks_own(exc: BaseException) -> DistillError | None:
    """What a user can act on: an error of ours, or Ray's, which may hold one of ours that the desk has raised."""
    import ray

    if isinstance(exc, ray.exceptions.RayTaskError) and isinstance(exc.cause, DistillError):
        return type(exc.cause)(str(exc.cause))
    if isinstance(exc, (ray.exceptions.RayError, TimeoutError)):
        said = (str(exc).strip() or "no answer").splitlines()[-1]
        return StorageError(f"the actor that leases what may be sent cannot be reached: {said}; run the same command again")
    return exc if isinstance(exc, DistillError) else None


def account_line(account: Account) -> bytes:
    return (account.model_dump_json() + "\n").encode()


def account_in(storage: Storage) -> Account:
    """The account of the harvest so far. Raises DataError."""
    found = storage.read(ACCOUNT)
    try:
        return Account.model_validate_json(found) if found and found.strip() else Account(requests=0, cost=0.0, seconds=0.0)
    except ValidationError as exc:
        raise DataError(
            f"{storage.at(ACCOUNT)}: not a readable account of what the harvest has cost; write there what you know it has"
        ) from exc


def carried_out(
    ray: Any, job: Job, plan: Sequence[Partition], *, workers: int, watch: Watch, total: int, stopping: Interruption
) -> tuple[list[Outcome], Account]:
    """Every partition once. Returns what became of each, and what was spent by all commands together."""
    account_in(job.storage)  # a damaged one is found out here
    options = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1, "scheduling_strategy": here(ray)}
    desk = ray.remote(Desk).options(**options).remote(job)
    rows = ray.data.from_items([dataclasses.asdict(partition) for partition in plan], override_num_blocks=len(plan))
    done = rows.map_batches(Worker, fn_constructor_args=(job, desk), batch_size=1, concurrency=min(workers, len(plan)), num_cpus=1)
    outcomes: list[Outcome] = []
    over = threading.Event()
    teller = threading.Thread(target=_tell, args=(ray, desk, watch, total, stopping, over), daemon=True)
    teller.start()
    try:
        for row in done.iter_rows():
            found = json.loads(row["outcome"])
            error = tuple(found["error"]) if found["error"] else None
            outcomes.append(Outcome(Collected(**found["collected"]), found["redacted"], error))
    finally:
        over.set()
        teller.join(timeout=10)
        with suppress(ray.exceptions.RayError):  # else it counts more as spent than was
            ray.get(desk.close.remote(), timeout=CALL_S)
    return outcomes, account_in(job.storage)


def _tell(ray: Any, desk: Any, watch: Watch, total: int, stopping: Interruption, over: threading.Event) -> None:
    """Progress, and the word to end, until it is over."""
    with ExitStack() as at_end:
        note = ""
        progress = Progress("harvest", total, unit="answers", note=lambda: note)
        at_end.callback(progress.end)
        before, processors, looked = 0, 1.0, -math.inf
        ended = False
        while True:
            last = over.wait(POLL_S)
            if time.monotonic() - looked > LOOK_S and not last:
                processors, looked = ray.cluster_resources().get("CPU", 0), time.monotonic()
            if stopping() and not processors:
                os.write(2, b"harvest: no node is left to wait for; everything done so far is kept, and the same command goes on\n")
                os._exit(INTERRUPTED if stopping.signal == signal.SIGINT else TERMINATED)
            try:
                standings, account = ray.get(desk.standing.remote(), timeout=30)
            except Exception:
                if last:
                    return
                continue  # it is being started again
            if stopping():
                ended = True
                desk.end.remote()  # every time: it may have been started again
            now = summed(standings, total, account, ended=ended, last=last)
            waiting = now.waiting if processors else "no node is left: waiting for one"
            note = ", ".join(filter(None, [waiting, f"{now.in_flight} in flight", f"{now.refused} x 429" if now.refused else ""]))
            watch(now)
            rows = now.answers + sum(now.failed.values())
            if rows > before:
                progress.step(rows - before)
                before = rows
            else:
                progress.tick()
            if last:
                return


def summed(standings: Sequence[Standing], total: int, account: Account, *, ended: bool, last: bool) -> Standing:
    """How all workers stand together."""
    failed: Counter[str] = Counter()
    for standing in standings:
        failed.update(standing.failed)
    running = [standing for standing in standings if standing.state != "ended"]
    waiting = [standing.waiting for standing in running]
    return Standing(
        state="ended" if last else "ending" if ended else "running",
        wanted=total,
        answers=sum(standing.answers for standing in standings),
        failed=dict(failed),
        in_flight=sum(standing.in_flight for standing in running),
        concurrency=sum(standing.concurrency for standing in running),
        rows_per_s=sum(standing.rows_per_s for standing in running),
        requests=sum(standing.requests for standing in standings),
        refused=sum(standing.refused for standing in standings),
        cost=account.cost if any(standing.cost is not None for standing in standings) else None,
        waiting=waiting[0] if waiting and all(waiting) else "",
    )
