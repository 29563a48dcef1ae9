"""The scheduler of a harvest: from a source of asks to the ledger, as fast as the teacher allows.

One event loop, one task a request in flight, and `_advance`, which starts whatever may be started whenever something has changed.
Memory holds what is in flight or waits to be asked again, never the source nor the answers.
"""

from __future__ import annotations

import asyncio
import heapq
import math
import random
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import count, islice
from typing import Literal

from shared.collect import Collected, row_of
from shared.commands import Progress
from shared.contracts import CUT_OFF, Completion, GenerationRequest, Response
from shared.errors import (
    BudgetSpent,
    FailureClass,
    HarvestTooThin,
    NotTheApi,
    RequestForbidden,
    RequestRefused,
    StorageError,
    TeacherBusy,
    TeacherFailed,
    TeacherLate,
    TeacherRejected,
    TeacherUnavailable,
)
from shared.harvest.ask import Ask
from shared.harvest.budget import Purse, Reserved, estimated_tokens
from shared.harvest.census import Census, Prompt
from shared.harvest.circuit import Circuit
from shared.harvest.custom_api import CustomApi
from shared.harvest.ledger import OK, Answers, Held
from shared.harvest.pace import Pace
from shared.harvest.smoke import PROMPTS, Smoke
from shared.harvest.teacher import Answer, Refusal, Teacher
from shared.settings import Recipe

SYNC_EVERY_S = 0.1
"""Twice as often as lines must become durable."""
WATCH_EVERY_S = 1.0
DRAIN_S = 8.0
"""How long what is in flight is waited for when a harvest is told to end: containers are given 10 s."""
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 60.0
"""Bounds of the pause before another attempt at one request; it is drawn from all below a bound that doubles (full jitter)."""
MOST_WAITING = 4096
"""Rows that wait for another example's answer to the same request; then no more prompts are drawn until it comes."""
FORBIDDEN = 32
"""Answers of 403 in a row after which it is the key after all: one that was revoked would make failed rows of all that are left."""
AT_ONCE = 256
"""Held prompts passed over before others of this process have their turn."""
LOOKED_UP, MOST_MARKS = 64, 512
"""Prompts looked up in the ledger at once, and keys a query."""


@dataclass(frozen=True)
class Limits:
    """How a teacher may be asked; see TeacherSettings and HarvestSettings."""

    concurrency: int = 64
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    max_attempts: int = 5
    patience_s: float = 300.0
    timeout_s: float = 120.0
    """The teacher's own, by which slowness is judged."""
    custom: CustomApi | None = None
    """The teacher's own API: of its template all is sent, and counts for `tokens_per_minute`."""
    max_answer_chars: int = 100_000
    first_failures: float | None = 0.5
    """Share of the first prompts' answers: if so many fail, nothing more is sent. None: the first are like all others."""

    @classmethod
    def of(cls, recipe: Recipe) -> Limits:
        """Those of a recipe."""
        teacher, settings = recipe.teacher, recipe.harvest
        return cls(
            concurrency=settings.concurrency,
            requests_per_minute=settings.requests_per_minute,
            tokens_per_minute=settings.tokens_per_minute,
            max_attempts=teacher.max_attempts,
            patience_s=teacher.patience_s,
            timeout_s=teacher.timeout_s,
            custom=teacher.custom,
            max_answer_chars=settings.max_answer_chars,
        )


@dataclass(frozen=True)
class Standing:
    """How a harvest stands, for whoever watches it."""

    state: Literal["running", "ending", "ended"]
    """ending: nothing more is sent, and what is in flight is waited for."""
    wanted: int | None
    """Rows in the end, where that is known."""
    answers: int
    failed: dict[str, int]
    in_flight: int
    concurrency: int
    """Requests that may be in flight at present."""
    rows_per_s: float
    """Over the last ten seconds or so."""
    requests: int
    refused: int
    """429s."""
    cost: float | None
    waiting: str
    """What nothing is sent for at present, if that is so."""


async def harvest(
    teacher: Teacher,
    asks: Iterable[Ask],
    ledger: Answers,
    *,
    limits: Limits = Limits(),
    what: str = "harvest",
    whom: str = "the teacher",
    total: int | None = None,
    retry: frozenset[str] = frozenset(),
    budget: Purse | None = None,
    watch: Callable[[Standing], None] | None = None,
    stopping: Callable[[], bool] | None = None,
    pace: Pace | None = None,
) -> Collected:
    """Ask for every sample that `ledger` does not hold, and for those it holds as one of `retry`'s classes.

    `whom`: who is asked, for messages. `total`: rows wanted in the end, for the time that is left. `stopping` is asked often: once it
    says so nothing more is sent, what is in flight is waited for a few seconds, and what is missing is counted. `pace`: one that others
    share, instead of one by `limits`.

    One bad row is a failed row. Raises, with all answers so far in the ledger: TeacherUnavailable for a teacher that stays dead,
    TeacherRejected where asking cannot help, HarvestTooThin where too many of the first prompts fail, BudgetSpent, StorageError, and
    what the source raises.
    """
    return await _Harvest(teacher, asks, ledger, limits, what, whom, total, retry, budget, watch, stopping, pace).run()


@dataclass(slots=True)
class _Job:
    """Consecutive samples of a prompt, asked for in one request."""

    prompt: Prompt
    samples: range
    attempts: int = 0
    failures: int = 0
    """Attempts that count against the row."""
    error: str = ""
    split: bool = False
    """Whether it is one sample of several that the teacher would not give in one answer."""


class _Harvest:
    def __init__(
        self,
        teacher: Teacher,
        asks: Iterable[Ask],
        ledger: Answers,
        limits: Limits,
        what: str,
        whom: str,
        total: int | None,
        retry: frozenset[str],
        budget: Purse | None,
        watch: Callable[[Standing], None] | None,
        stopping: Callable[[], bool] | None,
        pace: Pace | None,
    ) -> None:
        self._teacher, self._ledger, self._limits = teacher, ledger, limits
        self._source = self._looked_up(iter(asks))
        self._what, self._whom, self._total, self._retry, self._budget = what, whom, total, retry, budget
        self._watch, self._stopping = watch or (lambda standing: None), stopping or (lambda: False)
        self._pace = pace or Pace(
            limits.concurrency,
            requests_per_minute=limits.requests_per_minute,
            tokens_per_minute=limits.tokens_per_minute,
            timeout_s=limits.timeout_s,
        )
        self._pace.changed = self._advance
        self._circuit = Circuit(limits.patience_s, whom=whom)
        # jobs: fresh ones, those that failed and wait, those that failed for the last time unless the teacher turns out to be dead
        self._ready: deque[_Job] = deque()
        self._later: list[tuple[float, int, _Job]] = []
        self._suspects: list[_Job] = []
        self._order = count()
        self._exhausted = False
        self._asking: dict[str, list[tuple[Prompt, int]]] = {}
        """Keys that are being asked for, each with the other examples that wait for the same answer."""
        self._waiting = 0
        """How many wait so."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._telling: asyncio.Task[None] | None = None
        """A thread that tells whoever watches: the end is told after it."""
        self._error: BaseException | None = None
        self._ending = False
        self._smoke = Smoke(limits.first_failures)
        self._answered = 0
        """Rows, by requests of this call and not by another example's answer."""
        self._several = self._singles = False
        """Whether one request was answered several times, or only once split."""
        self._doubt: TeacherRejected | None = None
        """Something has answered that is not the API, or with 403, and nothing else so far."""
        self._forbidden = 0
        """Answers of 403 since the last other one."""
        self._hopeless = False
        """Patience has ended, and all that is left has failed by itself before."""
        self._requests = 0
        self._census = Census()

    async def run(self) -> Collected:
        started = time.monotonic()
        self._loop = asyncio.get_running_loop()
        self._done: asyncio.Future[None] = self._loop.create_future()
        self._progress = Progress(self._what, self._total, unit="answers", note=self._note)
        self._rate = _Rate()
        beat = self._loop.create_task(self._beat())
        try:
            self._advance()
            await self._done
            await self._drain()
        finally:
            if self._timer:
                self._timer.cancel()
            beat.cancel()
            for task in self._tasks:
                task.cancel()
            # nobody asks for what became of them: they have been ended
            await asyncio.gather(beat, *self._tasks, *filter(None, [self._telling]), return_exceptions=True)
            self._ledger.sync()
            self._progress.end()
            self._watch(self._standing("ended"))
        if self._error is not None:
            raise self._error
        return self._census.collected_of(
            total=self._total, requests=self._requests, refused=self._pace.refused, seconds=time.monotonic() - started
        )

    # starting what may be started

    def _advance(self) -> None:
        """Start requests until something is in the way, then see to it that this is called again."""
        if self._timer:
            self._timer.cancel()
            self._timer = None
        try:
            pause = None if self._ending else self._start()
        except BaseException as exc:  # a source that breaks off, a full disk
            self._end(exc)
            return
        if pause is None:
            if not self._tasks or self._ending:
                self._finish()
        elif pause == 0:
            self._timer = self._loop.call_later(0, self._advance)
        elif pause < math.inf:
            self._timer = self._loop.call_later(pause, self._advance)

    def _start(self) -> float | None:
        """Seconds until more can be started; infinity: once a request in flight has ended; None: there is nothing more to start."""
        while True:
            if self._ending:
                return None
            if self._doubt is not None and not self._answered:
                if self._tasks:
                    return math.inf  # they will tell
                self._end(self._doubt)
                return None
            if self._budget is not None and self._budget.late and (self._ready or self._later):
                self._spent(self._budget)
                return None
            if not self._exhausted or self._ready or self._later:
                pause = self._pace.delay()
                if pause == math.inf:
                    return pause
                pause = max(pause, self._circuit.delay())
                if pause > 0:
                    return pause
            job = self._next()
            if job is None:
                if not self._exhausted and not self._smoke.full and self._waiting < MOST_WAITING:
                    return 0.0  # many were held: let others have their turn
                if self._later:
                    return max(self._later[0][0] - time.monotonic(), 0.001)
                if self._tasks:
                    return math.inf
                if self._suspects:
                    self._judge_suspects()
                    continue
                return None
            reserved = None
            if self._budget is not None:
                reserved = self._budget.reserve(job.prompt.ask.part(job.samples))
                if reserved is None:
                    self._ready.appendleft(job)
                    if self._tasks:
                        return math.inf  # what they do not use of their shares may be enough
                    self._spent(self._budget)
                    return None
            self._send(job, reserved)

    def _next(self) -> _Job | None:
        """What to ask for next: what has waited long enough, else what is new."""
        if self._later and self._later[0][0] <= time.monotonic():
            return heapq.heappop(self._later)[2]
        if not self._ready and not self._exhausted and not self._smoke.full and self._waiting < MOST_WAITING:
            for _ in range(AT_ONCE):
                drawn = next(self._source, None)
                if drawn is None:
                    self._exhausted = True
                    break
                self._draw(*drawn)
                if self._ready:
                    break
        return self._ready.popleft() if self._ready else None

    def _looked_up(self, source: Iterator[Ask]) -> Iterator[tuple[Ask, list[str], dict[tuple[str, int], Held]]]:
        """Asks with the keys of their samples and what the ledger had of them.

        Where it had anything at first many are looked up at once: to go on after 100,000 rows, all of them are passed over.
        """
        at_once = 1 if self._ledger.empty else LOOKED_UP
        while batch := list(islice(source, at_once)):
            keys = [ask.sample_keys() for ask in batch]
            wanted = [key for of_ask in keys for key in of_ask]
            held: dict[tuple[str, int], Held] = {}
            for first in range(0, len(wanted), MOST_MARKS):
                held |= self._ledger.find(wanted[first : first + MOST_MARKS])
            for ask, of_ask in zip(batch, keys, strict=True):
                yield ask, of_ask, held

    def _draw(self, ask: Ask, keys: list[str], held: dict[tuple[str, int], Held]) -> None:
        """Count what the ledger has of a prompt, and make jobs of what it does not."""
        prompt, example = self._census.prompt(ask, keys), hash(ask.example_id)
        missing: list[int] = []
        had, answered_before = 0, False
        for sample, key in enumerate(keys):
            mine = held.get((key, example))
            answered_before = answered_before or (mine is not None and mine.kind in (OK, CUT_OFF))
            if mine is not None and mine.kind not in self._retry:
                had += 1
                self._census.held(prompt, mine, self._ledger.read)
                continue
            prompt.open += 1
            if mine is not None and mine.kind == CUT_OFF:
                prompt.before = {**(prompt.before or {}), sample: mine}
            if twin := self._ledger.twin(key, CUT_OFF not in self._retry):
                row = self._ledger.read(twin).model_copy(update={"example_id": ask.example_id, "sample": sample})
                self._census.shared += 1
                self._write([(prompt, row)])
            elif key in self._asking:
                self._asking[key].append((prompt, sample))
                self._waiting += 1
            else:
                self._asking[key] = []
                missing.append(sample)
        self._progress.had(had)
        self._smoke.drew(missing=len(missing), answered_before=answered_before)
        if had == len(keys):
            self._census.close(prompt)
        if missing:
            most = 1 if self._singles else self._teacher.most_choices
            self._ready.extend(_Job(prompt, samples) for samples in _runs(missing, most))

    def _send(self, job: _Job, reserved: Reserved | None) -> None:
        request = job.prompt.ask.part(job.samples)
        tokens = 0
        if self._limits.tokens_per_minute:
            tokens = estimated_tokens(request, self._limits.custom) + request.n * request.sampling.max_tokens
        sent_at = self._pace.sent(tokens)
        probe = self._circuit.sent()
        self._requests += 1
        job.attempts += 1
        task = self._loop.create_task(self._attempt(job, request, reserved, sent_at, probe))
        self._tasks.add(task)

    # one request

    async def _attempt(self, job: _Job, request: GenerationRequest, reserved: Reserved | None, sent_at: float, probe: bool) -> None:
        try:
            await self._ask(job, request, reserved, sent_at, probe)
        except asyncio.CancelledError:
            raise
        except BaseException as exc:  # a key that is refused, a full disk, or a fault of ours: the end
            self._end(exc)
        finally:
            task = asyncio.current_task()
            if task is not None:
                self._tasks.discard(task)
        self._advance()

    async def _ask(self, job: _Job, request: GenerationRequest, reserved: Reserved | None, sent_at: float, probe: bool) -> None:
        try:
            answer = await self._paid(request, reserved)
        except TeacherBusy as exc:
            self._pace.busy(sent_at, exc.retry_after_s)
            self._circuit.lives()
            self._doubt = None
            self._ready.appendleft(job)
        except RequestRefused as exc:
            self._pace.answered(sent_at)
            self._forbidden += isinstance(exc, RequestForbidden)
            if isinstance(exc, RequestForbidden) and not self._answered:
                self._doubt = exc
                self._ready.appendleft(job)
            elif self._forbidden > FORBIDDEN:
                self._ready.appendleft(job)
                self._end(exc)
            else:
                self._doubt = None
                self._refused(job, exc, time.monotonic() - sent_at)
        except (TeacherUnavailable, NotTheApi) as exc:
            if isinstance(exc, TeacherLate):
                self._pace.late(sent_at)
            else:
                self._pace.failed()
            if isinstance(exc, NotTheApi) and not self._answered:
                self._doubt = exc
            self._again(job, exc, probe)
        except BaseException:
            self._pace.failed()
            raise
        else:
            self._pace.answered(sent_at)
            self._keep(job, answer, time.monotonic() - sent_at)

    async def _paid(self, request: GenerationRequest, reserved: Reserved | None) -> Answer:
        """Ask, and settle what was set aside for it."""
        answer, billed = None, True  # also where it is given up while it may still be answered, or where the answer is garbled
        try:
            said = await self._teacher.ask(request)
            if not said.choices:
                raise TeacherFailed(f"none of {request.n} choices came", maybe_billed=True)
            answer = said
            return answer
        except (TeacherUnavailable, RequestRefused) as exc:
            billed = exc.maybe_billed
            raise
        except TeacherRejected as exc:
            billed = isinstance(exc, NotTheApi)
            raise
        finally:
            if reserved is not None and self._budget is not None:
                self._budget.settle(reserved, answer, billed=billed)

    def _keep(self, job: _Job, answer: Answer, latency_s: float) -> None:
        """Rows of what came, and another job for what did not."""
        outage, self._hopeless, self._forbidden = self._circuit.open, False, 0
        self._circuit.lives()
        found = answer.choices[: len(job.samples)]
        answered = self._rows(job, zip(job.samples, found, strict=False), latency_s, version=answer.version)
        if answered and (len(found) > 1 or job.split):
            self._several, self._singles = self._several or len(found) > 1, self._singles or job.split
        if len(found) < len(job.samples):
            self._ready.appendleft(_Job(job.prompt, job.samples[len(found) :], job.attempts, split=job.split))
        if self._suspects and answered:
            suspects, self._suspects = self._suspects, []
            for suspect in suspects:
                if outage:  # it was the teacher that failed, and it is back
                    suspect.failures = 0
                    self._ready.append(suspect)
                else:
                    self._unanswered(suspect)

    def _refused(self, job: _Job, exc: RequestRefused, latency_s: float) -> None:
        self._circuit.lives()
        if len(job.samples) > 1 and exc.kind == "refused" and not self._several:
            # some servers refuse to give several answers to one request
            self._ready.extendleft(_Job(job.prompt, range(s, s + 1), job.attempts, split=True) for s in reversed(job.samples))
            return
        self._give_up(job, exc.kind, str(exc), latency_s)

    def _again(self, job: _Job, exc: TeacherUnavailable | NotTheApi, probe: bool) -> None:
        """Another attempt, later; a row whose attempts are used up fails once the teacher is known to answer others."""
        wait_s = exc.retry_after_s if isinstance(exc, TeacherUnavailable) else None
        if wait_s:
            self._pace.wait(wait_s)
        self._circuit.failed(str(exc), probe=probe, gate_until=self._pace.gate_until)
        job.error = str(exc)
        if isinstance(exc, (TeacherLate, TeacherFailed, NotTheApi)):  # else it was not even reached
            job.failures += 1
        if job.failures >= self._limits.max_attempts or (self._hopeless and job.failures):
            self._suspects.append(job)
            return
        if self._hopeless:
            self._end(self._dead())
            return
        pause = random.uniform(0, min(LONGEST_WAIT_S, FIRST_WAIT_S * 2 ** min(max(job.failures - 1, 0), 16)))
        heapq.heappush(self._later, (time.monotonic() + pause, next(self._order), job))

    def _judge_suspects(self) -> None:
        """Everything else is done. If nothing was ever answered, it is the teacher that failed and not the rows."""
        suspects, self._suspects = self._suspects, []
        if suspects and not self._census.answers:
            self._end(TeacherUnavailable(f"{suspects[0].error}; no request of {self._requests} was answered"))
            return
        for job in suspects:
            self._unanswered(job)

    def _unanswered(self, job: _Job) -> None:
        self._give_up(job, "unanswered", f"{job.error} (attempt {job.failures} of {self._limits.max_attempts})", 0.0)

    def _give_up(self, job: _Job, kind: FailureClass, message: str, latency_s: float) -> None:
        self._rows(job, [(sample, Refusal(kind, message)) for sample in job.samples], latency_s)

    # rows

    def _rows(self, job: _Job, made: Iterable[tuple[int, Completion | Refusal]], latency_s: float, *, version: str | None = None) -> int:
        """Write and count the rows of some samples, and those of other examples that ask the same. Returns how many were answered."""
        rows, came = [], []
        for sample, choice in made:
            key = job.prompt.keys[sample]
            row = row_of(job.prompt.ask, key, sample, self._judged(choice), latency_s=latency_s, attempts=job.attempts, version=version)
            came.append(row)
            waiting = self._asking.pop(row.key, ())
            self._waiting -= len(waiting)
            self._census.shared += len(waiting)
            for prompt, place in [(job.prompt, sample), *waiting]:
                before = prompt.before.get(place) if prompt.before else None
                if before is not None and row.status == "failed":
                    self._census.held(prompt, before, self._ledger.read)
                    self._progress.had()
                    self._left(prompt)
                else:
                    rows.append((prompt, row.model_copy(update={"example_id": prompt.ask.example_id, "sample": place}) if waiting else row))
        self._write(rows)
        answered = sum(row.status == "ok" for row in came)
        self._answered += answered
        self._smoke.came(came)
        if self._smoke.failed:
            self._end(
                HarvestTooThin(
                    f"the first {PROMPTS} prompts of {self._what}: {self._smoke.explain()}. Nothing more was sent; mend the cause, then "
                    "ask again for what failed (--retry-failed)"
                )
            )
        return answered

    def _write(self, rows: list[tuple[Prompt, Response]]) -> None:
        self._ledger.append([row for _, row in rows])
        for prompt, row in rows:
            self._census.made(prompt, row)
            self._left(prompt)
        self._progress.step(len(rows))

    def _left(self, prompt: Prompt) -> None:
        prompt.open -= 1
        if not prompt.open:
            self._census.close(prompt)

    def _judged(self, choice: Completion | Refusal) -> Completion | Refusal:
        most = self._limits.max_answer_chars
        if isinstance(choice, Completion) and len(choice.text) > most:
            return Refusal("over_long", f"{len(choice.text)} characters, harvest.max_answer_chars is {most}")
        return choice

    # time

    async def _beat(self) -> None:
        """Everything that is due whether or not anything happens: durable lines, news, patience, the word to end."""
        watched = -math.inf
        try:
            while True:
                await asyncio.sleep(SYNC_EVERY_S)
                await self._sync()
                self._rate.tick(self._census.collected)
                self._progress.tick()
                if time.monotonic() - watched >= WATCH_EVERY_S:
                    watched = time.monotonic()
                    told = asyncio.to_thread(self._watch, self._standing("ending" if self._ending else "running"))
                    self._telling = self._loop.create_task(told)
                    await asyncio.shield(self._telling)
                if self._circuit.left_s <= 0 and not self._hopeless:
                    self._lose_patience()
                elif self._stopping():
                    self._end(None)
                elif self._budget is not None and self._budget.late:
                    self._advance()
        except asyncio.CancelledError:
            raise
        except BaseException as exc:
            self._end(exc)

    async def _sync(self) -> None:
        if self._ledger.dirty:
            # in a thread: a disk takes its time, and answers go on coming
            await asyncio.to_thread(self._ledger.sync)
            if self._budget is not None:
                await asyncio.to_thread(self._budget.sync)

    def _lose_patience(self) -> None:
        """The teacher is dead; unless all that is left are rows that it was reached for and failed at, each by itself."""
        left = [*self._ready, *(job for _, _, job in self._later)]
        if self._exhausted and self._census.answers and all(job.failures for job in left):
            self._hopeless = True
            self._suspects += left
            self._ready.clear()
            self._later.clear()
            self._advance()
            return
        self._end(self._dead())

    def _dead(self) -> TeacherUnavailable:
        return TeacherUnavailable(f"{self._whom} has not answered for {self._circuit.silent_s:.0f} s, the last time: {self._circuit.error}")

    def _end(self, error: BaseException | None) -> None:
        """Send nothing more. The first error counts: what follows it is mostly the same of other requests."""
        self._ending = True
        self._error = self._error or error
        self._finish()

    def _spent(self, budget: Purse) -> None:
        self._end(BudgetSpent(f"{budget.explain()} is reached: nothing more is sent, and all answers are kept; raise it to go on"))

    def _finish(self) -> None:
        if not self._done.done():
            self._done.set_result(None)

    async def _drain(self) -> None:
        """Wait for what is in flight: it is paid for."""
        if self._tasks and not isinstance(self._error, StorageError):
            # whoever stops it wants a quick end; a budget has time
            patience_s = self._limits.timeout_s if isinstance(self._error, BudgetSpent) else DRAIN_S
            await asyncio.wait(self._tasks, timeout=patience_s)

    def _waits_for(self) -> str:
        """Why nothing is being sent, if that is so."""
        if gate := max(0.0, self._pace.gate_until - time.monotonic()):
            return f"waiting {math.ceil(gate)} s, as {self._whom} asks"
        return self._circuit.explain()

    def _note(self) -> str:
        """What the line of progress says beside numbers of rows."""
        notes = [f"{self._pace.in_flight} in flight"]
        if waiting := self._waits_for():
            notes.insert(0, waiting)  # a narrow terminal shows the beginning of a line
        if self._pace.refused:
            notes.append(f"{self._pace.refused} x 429")
        if failed := self._census.failed.total():
            notes.append(f"{failed} failed")
        if self._budget is not None and self._budget.priced:
            notes.append(f"cost {self._budget.spent:.4g}")
        return ", ".join(notes)

    def _standing(self, state: Literal["running", "ending", "ended"]) -> Standing:
        return Standing(
            state=state,
            wanted=self._total,
            answers=self._census.answers,
            failed=dict(self._census.failed),
            in_flight=len(self._tasks),
            concurrency=self._pace.limit,
            rows_per_s=self._rate.per_s,
            requests=self._requests,
            refused=self._pace.refused,
            cost=self._budget.spent if self._budget is not None and self._budget.priced else None,
            waiting=self._waits_for() if state == "running" else "",
        )


class _Rate:
    """Rows a second over the last ten seconds."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque([(time.monotonic(), 0)], maxlen=100)

    def tick(self, rows: int) -> None:
        self._seen.append((time.monotonic(), rows))

    @property
    def per_s(self) -> float:
        (since, before), (at, rows) = self._seen[0], self._seen[-1]
        return (rows - before) / (at - since) if at > since else 0.0


def _runs(missing: list[int], most: int | None) -> Iterator[range]:
    """Runs of consecutive samples, none longer than `most`."""
    first = 0
    for i in range(1, len(missing) + 1):
        if i == len(missing) or missing[i] != missing[i - 1] + 1 or i - first == most:
            yield range(missing[first], missing[i - 1] + 1)
            first = i
