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
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import Literal

from shared.artifacts import now
from shared.collect import Collected
from shared.commands import Progress
from shared.contracts import CUT_OFF, Completion, GenerationRequest, Response
from shared.errors import (
    BudgetSpent,
    FailureClass,
    HarvestTooThin,
    NotTheApi,
    RequestRefused,
    StorageError,
    TeacherBusy,
    TeacherFailed,
    TeacherLate,
    TeacherRejected,
    TeacherUnavailable,
)
from shared.harvest.ask import Ask
from shared.harvest.budget import Budget, Reserved, estimated_tokens
from shared.harvest.circuit import Circuit
from shared.harvest.ledger import OK, AnswerLedger, kind_of
from shared.harvest.pace import Pace
from shared.harvest.teacher import Answer, Refusal, Teacher
from shared.settings import Recipe

SYNC_EVERY_S = 0.1
"""Twice as often as lines must become durable."""
WATCH_EVERY_S = 1.0
DRAIN_S = 8.0
"""How long what is in flight is waited for when a harvest is told to end: containers are given 10 s."""
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 60.0
"""Bounds of the pause before another attempt at one request; it is drawn from all below a bound that doubles (full jitter)."""
SMOKE = 16
"""Prompts that are asked before all others: if half of them fail, nothing more is sent."""
FEW_TEXTS = 8
"""Fewer answers may well be one and the same text."""
AT_ONCE = 256
"""Held prompts passed over before others of this process have their turn."""


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
    max_answer_chars: int = 100_000

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
    ledger: AnswerLedger,
    *,
    limits: Limits = Limits(),
    what: str = "harvest",
    total: int | None = None,
    retry: frozenset[str] = frozenset(),
    budget: Budget | None = None,
    watch: Callable[[Standing], None] | None = None,
    stopping: Callable[[], bool] | None = None,
) -> Collected:
    """Ask for every sample that `ledger` does not hold, and for those it holds as one of `retry`'s classes.

    `total`: rows wanted in the end, for the time that is left. `stopping` is asked often: once it says so nothing more is sent, what
    is in flight is waited for a few seconds, and what is missing is counted.

    One bad row is a failed row. Raises, with all answers so far in the ledger: TeacherUnavailable for a teacher that stays dead,
    TeacherRejected where asking cannot help, HarvestTooThin where half of the first prompts fail, BudgetSpent, StorageError, and
    what the source raises.
    """
    return await _Harvest(teacher, asks, ledger, limits, what, total, retry, budget, watch, stopping).run()


@dataclass(slots=True)
class _Prompt:
    """A prompt of which something is missing."""

    ask: Ask
    keys: list[str]
    open: int = 0
    answers: int = 0
    texts: set[int] = field(default_factory=set)


@dataclass(slots=True)
class _Job:
    """Consecutive samples of a prompt, asked for in one request."""

    prompt: _Prompt
    samples: range
    attempts: int = 0
    failures: int = 0
    """Attempts that count against the row."""
    error: str = ""


class _Smoke:
    """The first prompts, asked before all others: most of them must be answered."""

    def __init__(self) -> None:
        self._left, self._rows, self._ok, self._failed = SMOKE, 0, 0, 0
        self.passed = False

    @property
    def full(self) -> bool:
        """Whether to wait for what has been asked."""
        return not self.passed and self._left == 0

    def drew(self, *, missing: int, held: bool) -> None:
        if held or not missing:  # a teacher that has answered before has passed
            self.passed = self.passed or held
            return
        self._left -= 1
        self._rows += missing
        self._judge()

    def came(self, ok: int, failed: int) -> None:
        self._ok += ok
        self._failed += failed
        self._judge()

    def _judge(self) -> None:
        self.passed = self.passed or (self._left <= 0 and 2 * self._ok > self._rows)

    @property
    def failed(self) -> bool:
        return not self.passed and self._left <= 0 and 2 * self._failed >= self._rows


class _Harvest:
    def __init__(
        self,
        teacher: Teacher,
        asks: Iterable[Ask],
        ledger: AnswerLedger,
        limits: Limits,
        what: str,
        total: int | None,
        retry: frozenset[str],
        budget: Budget | None,
        watch: Callable[[Standing], None] | None,
        stopping: Callable[[], bool] | None,
    ) -> None:
        self._teacher, self._source, self._ledger, self._limits = teacher, iter(asks), ledger, limits
        self._what, self._total, self._retry, self._budget = what, total, retry, budget
        self._watch, self._stopping = watch or (lambda standing: None), stopping or (lambda: False)
        self._pace = Pace(
            limits.concurrency,
            requests_per_minute=limits.requests_per_minute,
            tokens_per_minute=limits.tokens_per_minute,
            timeout_s=limits.timeout_s,
        )
        self._circuit = Circuit(limits.patience_s)
        # jobs: fresh ones, those that failed and wait, those that failed for the last time unless the teacher turns out to be dead
        self._ready: deque[_Job] = deque()
        self._later: list[tuple[float, int, _Job]] = []
        self._suspects: list[_Job] = []
        self._order = count()
        self._exhausted = False
        self._asking: dict[str, list[tuple[_Prompt, int]]] = {}
        """Keys that are being asked for, each with the other examples that wait for the same answer."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._error: BaseException | None = None
        self._ending = False
        self._smoke = _Smoke()
        self._answered = 0
        """Rows answered in this call."""
        self._many_work = False
        # the census
        self._prompts = self._answers = self._cut_off = self._wanted = 0
        self._failed: Counter[str] = Counter()
        self._of_several = self._distinct = self._several = self._varied = 0
        self._said: dict[str, str] = {}
        self._texts: set[int] = set()
        self._requests = self._collected = self._shared = 0

    async def run(self) -> Collected:
        started = time.monotonic()
        self._loop = asyncio.get_running_loop()
        self._done: asyncio.Future[None] = self._loop.create_future()
        self._progress = Progress(self._what, self._total, unit="answers")
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
            await asyncio.gather(beat, *self._tasks, return_exceptions=True)  # nobody asks for more of them: they have been ended
            self._ledger.sync()
            self._progress.end()
            self._watch(self._standing("ended"))
        if self._error is not None:
            raise self._error
        return self._census(time.monotonic() - started)

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
            if self._budget is not None and self._budget.late and (self._ready or self._later or not self._exhausted):
                self._spent(self._budget)
                return None
            pause = self._pace.delay()
            if pause == math.inf:
                return pause
            pause = max(pause, self._circuit.delay())
            if pause > 0:
                return pause
            job = self._next()
            if job is None:
                if not self._exhausted and not self._smoke.full:
                    return 0.0  # many were held: let others have their turn
                if self._later:
                    return max(self._later[0][0] - time.monotonic(), 0.001)
                if self._tasks:
                    return math.inf
                self._judge_suspects()
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
        if not self._ready and not self._exhausted and not self._smoke.full:
            for _ in range(AT_ONCE):
                ask = next(self._source, None)
                if ask is None:
                    self._exhausted = True
                    break
                self._draw(ask)
                if self._ready:
                    break
        return self._ready.popleft() if self._ready else None

    def _draw(self, ask: Ask) -> None:
        """Count what the ledger has of a prompt, and make jobs of what it does not."""
        keys = ask.keys()
        prompt = _Prompt(ask, keys)
        self._prompts += 1
        self._wanted += len(keys)
        missing: list[int] = []
        had = 0
        for sample, key in enumerate(keys):
            mine = self._ledger.find(key, ask.example_id)
            if mine is not None and mine.kind not in self._retry:
                had += 1
                self._count(prompt, mine.kind, mine.text)
                if mine.kind in self._failed and mine.kind not in self._said:
                    self._said[mine.kind] = self._ledger.read(mine).reason or mine.kind
                continue
            prompt.open += 1
            twin = self._ledger.twin(key)
            if twin is not None:
                self._share(prompt, sample, self._ledger.read(twin))
            elif key in self._asking:
                self._asking[key].append((prompt, sample))
            else:
                self._asking[key] = []
                missing.append(sample)
        self._progress.had(had)
        self._smoke.drew(missing=len(missing), held=had > 0 and prompt.answers > 0)
        if not prompt.open:
            self._close(prompt)
        if missing:
            for samples in _runs(missing, self._teacher.most_choices):
                self._ready.append(_Job(prompt, samples))

    def _send(self, job: _Job, reserved: Reserved | None) -> None:
        request = job.prompt.ask.part(job.samples)
        sent_at = self._pace.sent(
            estimated_tokens(request) + request.n * request.sampling.max_tokens if self._limits.tokens_per_minute else 0
        )
        self._circuit.sent()
        self._requests += 1
        job.attempts += 1
        task = self._loop.create_task(self._attempt(job, request, reserved, sent_at))
        self._tasks.add(task)

    # one request

    async def _attempt(self, job: _Job, request: GenerationRequest, reserved: Reserved | None, sent_at: float) -> None:
        answer, billed = None, False
        try:
            try:
                answer = await self._teacher.ask(request)
            except (TeacherUnavailable, RequestRefused) as exc:
                billed = exc.maybe_billed
                raise
            except NotTheApi:
                billed = True  # a garbled answer is an answer
                raise
            except TeacherRejected:
                raise
            except BaseException:  # it is given up while it may still be answered
                billed = True
                raise
            finally:
                if reserved is not None and self._budget is not None:
                    self._budget.settle(reserved, answer, billed=billed)
            self._pace.answered(sent_at)
            self._keep(job, answer, time.monotonic() - sent_at)
        except TeacherBusy as exc:
            self._pace.busy(sent_at, exc.retry_after_s)
            self._circuit.lives()
            self._ready.appendleft(job)
        except RequestRefused as exc:
            self._pace.answered(sent_at)
            self._refused(job, exc, time.monotonic() - sent_at)
        except (TeacherUnavailable, NotTheApi) as exc:
            if isinstance(exc, TeacherLate):
                self._pace.late(sent_at)
            else:
                self._pace.failed()
            if isinstance(exc, NotTheApi) and not self._answered:
                self._end(exc)
            else:
                self._again(job, exc)
        except asyncio.CancelledError:
            self._pace.failed()
            raise
        except BaseException as exc:  # a key that is refused, a full disk, or a fault of ours: the end
            self._pace.failed()
            self._end(exc)
        finally:
            task = asyncio.current_task()
            if task is not None:
                self._tasks.discard(task)
        self._advance()

    def _keep(self, job: _Job, answer: Answer, latency_s: float) -> None:
        """Rows of what came, and another job for what did not."""
        self._circuit.lives()
        found = answer.choices[: len(job.samples)]
        if not found:
            self._give_up(job, "unanswered", f"none of {len(job.samples)} choices came", latency_s)
            return
        rows = []
        for sample, choice in zip(job.samples, found, strict=False):
            rows += self._rows(job, sample, choice, latency_s)
        self._write(rows)
        if len(found) > 1:
            self._many_work = True
        if len(found) < len(job.samples):
            self._ready.appendleft(_Job(job.prompt, job.samples[len(found) :], job.attempts))
        if self._suspects and any(row.status == "ok" for row in rows):
            suspects, self._suspects = self._suspects, []
            for suspect in suspects:
                self._unanswered(suspect)

    def _refused(self, job: _Job, exc: RequestRefused, latency_s: float) -> None:
        self._circuit.lives()
        if len(job.samples) > 1 and exc.kind == "refused" and not self._many_work:
            # some servers refuse to give several answers to one request
            self._ready.extendleft(_Job(job.prompt, range(s, s + 1), job.attempts) for s in reversed(job.samples))
            return
        self._give_up(job, exc.kind, str(exc), latency_s)

    def _again(self, job: _Job, exc: TeacherUnavailable | NotTheApi) -> None:
        """Another attempt, later; a row whose attempts are used up fails once the teacher is known to answer others."""
        wait_s = exc.retry_after_s if isinstance(exc, TeacherUnavailable) else None
        self._circuit.failed(str(exc))
        if wait_s:
            self._pace.wait(wait_s)
        job.error = str(exc)
        if isinstance(exc, (TeacherLate, TeacherFailed, NotTheApi)):  # else it was not even reached
            job.failures += 1
        if job.failures >= self._limits.max_attempts:
            self._suspects.append(job)
            return
        pause = random.uniform(0, min(LONGEST_WAIT_S, FIRST_WAIT_S * 2 ** max(job.failures - 1, 0)))
        heapq.heappush(self._later, (time.monotonic() + pause, next(self._order), job))

    def _judge_suspects(self) -> None:
        """Everything else is done. If nothing was ever answered, it is the teacher that failed and not the rows."""
        suspects, self._suspects = self._suspects, []
        if suspects and not self._answered:
            self._end(TeacherUnavailable(f"{suspects[0].error}; no request of {self._requests} was answered"))
            return
        for job in suspects:
            self._unanswered(job)

    def _unanswered(self, job: _Job) -> None:
        self._give_up(job, "unanswered", f"{job.error} (attempt {job.failures} of {self._limits.max_attempts})", 0.0)

    def _give_up(self, job: _Job, kind: FailureClass, message: str, latency_s: float) -> None:
        rows: list[Response] = []
        for sample in job.samples:
            rows += self._rows(job, sample, Refusal(kind, message), latency_s)
        self._write(rows)

    # rows and their census

    def _rows(self, job: _Job, sample: int, choice: Completion | Refusal, latency_s: float) -> list[Response]:
        """The row of a sample, and those of the other examples that ask the same."""
        ask = job.prompt.ask
        row = _row(ask, job.prompt.keys[sample], sample, self._judged(choice), latency_s, job.attempts)
        rows, prompts = [row], [job.prompt]
        for prompt, other in self._asking.pop(row.key, ()):
            rows.append(row.model_copy(update={"example_id": prompt.ask.example_id, "sample": other}))
            prompts.append(prompt)
            self._shared += 1
        for prompt, made in zip(prompts, rows, strict=True):
            prompt.open -= 1
            self._count(prompt, kind_of(made), hash(made.text))
            if not prompt.open:
                self._close(prompt)
        return rows

    def _judged(self, choice: Completion | Refusal) -> Completion | Refusal:
        if isinstance(choice, Completion):
            if not choice.text.strip():
                return Refusal("empty", "nothing but blanks")
            if len(choice.text) > self._limits.max_answer_chars:
                return Refusal("over_long", f"{len(choice.text)} characters, harvest.max_answer_chars is {self._limits.max_answer_chars}")
        return choice

    def _share(self, prompt: _Prompt, sample: int, row: Response) -> None:
        """Give a prompt the answer that another example has had for the same request."""
        made = row.model_copy(update={"example_id": prompt.ask.example_id, "sample": sample})
        prompt.open -= 1
        self._count(prompt, kind_of(made), hash(made.text))
        self._shared += 1
        self._write([made])

    def _write(self, rows: list[Response]) -> None:
        self._ledger.append(rows)
        self._collected += len(rows)
        answered = 0
        for row in rows:
            if row.status == "ok":
                answered += 1
            else:
                self._said[kind_of(row)] = row.reason or ""
        self._answered += answered
        self._progress.step(len(rows), note=self._note)
        if not self._smoke.passed:
            self._smoke.came(answered, len(rows) - answered)
            if self._smoke.failed:
                self._end(self._too_thin(rows))

    def _count(self, prompt: _Prompt, kind: str, text: int) -> None:
        if kind in (OK, CUT_OFF):
            self._answers += 1
            self._cut_off += kind == CUT_OFF
            prompt.answers += 1
            prompt.texts.add(text)
            if len(self._texts) < 2:
                self._texts.add(text)
        else:
            self._failed[kind] += 1

    def _close(self, prompt: _Prompt) -> None:
        """Nothing of a prompt is missing any more."""
        if prompt.answers > 1:
            self._of_several += prompt.answers
            self._distinct += len(prompt.texts)
            self._several += 1
            self._varied += len(prompt.texts) > 1

    def _too_thin(self, rows: list[Response]) -> HarvestTooThin:
        reasons = ", ".join(f"{number} {kind}" for kind, number in self._failed.most_common())
        last = next((row.reason for row in reversed(rows) if row.status == "failed"), "")
        return HarvestTooThin(
            f"{self._what}: of the answers to the first {SMOKE} prompts half or more failed ({reasons}), the last with: {last}. Nothing "
            "more was sent; mend the cause, then ask again for what failed (`distill harvest --retry-failed`)"
        )

    def _census(self, seconds: float) -> Collected:
        failed = self._failed.total()
        return Collected(
            prompts=self._prompts,
            answers=self._answers,
            failed=dict(self._failed),
            missing=self._wanted - self._answers - failed,
            cut_off=self._cut_off,
            distinct_fraction=self._distinct / self._of_several if self._of_several else 1.0,
            requests=self._requests,
            refused=self._pace.refused,
            shared=self._shared,
            several=self._several,
            varied=self._varied,
            one_text=len(self._texts) == 1 and self._answers >= FEW_TEXTS and self._prompts > 1,
            said=self._said,
            seconds=seconds,
            collected=self._collected,
        )

    # time

    async def _beat(self) -> None:
        """Everything that is due whether or not anything happens: durable lines, news, patience, the word to end."""
        watched = -math.inf
        try:
            while True:
                await asyncio.sleep(SYNC_EVERY_S)
                await self._sync()
                self._rate.tick(self._collected)
                self._progress.tick()
                if time.monotonic() - watched >= WATCH_EVERY_S:
                    watched = time.monotonic()
                    await asyncio.to_thread(self._watch, self._standing("ending" if self._ending else "running"))
                if self._circuit.left_s <= 0:
                    silent_s = self._circuit.silent_s
                    self._end(
                        TeacherUnavailable(f"the teacher has not answered for {silent_s:.0f} s, the last time: {self._circuit.error}")
                    )
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

    def _end(self, error: BaseException | None) -> None:
        """Send nothing more. The first error counts: what follows it is mostly the same of other requests."""
        self._ending = True
        self._error = self._error or error
        self._finish()

    def _spent(self, budget: Budget) -> None:
        self._end(BudgetSpent(f"{budget.explain()} is reached: nothing more is sent, and all answers are kept; raise it to go on"))

    def _finish(self) -> None:
        if not self._done.done():
            self._done.set_result(None)

    async def _drain(self) -> None:
        """Wait for what is in flight: it is paid for."""
        if self._tasks and not isinstance(self._error, StorageError):
            await asyncio.wait(self._tasks, timeout=DRAIN_S)

    def _waits_for(self) -> str:
        """Why nothing is being sent, if that is so."""
        if gate := max(0.0, self._pace.gate_until - time.monotonic()):
            return f"waiting {gate:.0f} s, as the teacher asks"
        return self._circuit.explain()

    def _note(self) -> str:
        """What the line of progress says beside numbers of rows."""
        notes = [f"{len(self._tasks)} in flight"]
        if self._pace.refused:
            notes.append(f"{self._pace.refused} x 429")
        if failed := self._failed.total():
            notes.append(f"{failed} failed")
        if self._budget is not None and self._budget.priced:
            notes.append(f"cost {self._budget.account.cost:.4g}")
        if waiting := self._waits_for():
            notes.append(waiting)
        return ", ".join(notes)

    def _standing(self, state: Literal["running", "ending", "ended"]) -> Standing:
        return Standing(
            state=state,
            wanted=self._total,
            answers=self._answers,
            failed=dict(self._failed),
            in_flight=len(self._tasks),
            concurrency=self._pace.limit,
            rows_per_s=self._rate.per_s,
            requests=self._requests,
            refused=self._pace.refused,
            cost=self._budget.account.cost if self._budget is not None and self._budget.priced else None,
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


def _row(ask: Ask, key: str, sample: int, choice: Completion | Refusal, latency_s: float, attempts: int) -> Response:
    refused = choice if isinstance(choice, Refusal) else None
    completion = choice if isinstance(choice, Completion) else None
    return Response(
        key=key,
        example_id=ask.example_id,
        sample=sample,
        status="failed" if refused else "ok",
        text=_whole(completion.text) if completion else "",
        finish_reason=completion.finish_reason if completion else None,
        reason=_whole(refused.reason) if refused else None,
        model=ask.model,
        latency_s=round(latency_s, 4),
        attempts=max(attempts, 1),
        received_at=now(),
    )


def _whole(text: str) -> str:
    """JSON can name half a character, a file cannot hold it."""
    return text.encode(errors="replace").decode()
