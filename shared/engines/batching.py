"""A model in this process for a server: requests of many askers are gathered into batches, and answered as their tokens come."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tokenizers.decoders import DecodeStream

from shared.contracts import Completion, FinishReason, GenerationRequest
from shared.engines import Piece
from shared.engines.local import BATCH_ROWS, LocalModel, Prompt, holds_stop
from shared.engines.memory import give_back_now
from shared.errors import EngineError, RequestRefused, TeacherBusy, TeacherLate, TeacherUnavailable

if TYPE_CHECKING:
    from tokenizers import Tokenizer

log = logging.getLogger(__name__)

BATCH_TOKENS = {"decoder-only": 4096, "encoder-decoder": 16_384}
"""Tokens that are read in one batch: memory. A decoder-only model makes logits of every one, 0.2 MB each with 50,000 words."""
KEPT = 6
"""Tokens that are kept while answers are decoded take about this much less memory than those that are being read."""
GATHER_S = 0.003
"""Seconds without a new request after which those that were answered together are not going to ask together again."""
IDLE_S = 1.0
"""Seconds without a request after which memory that is free is given back: sooner, each lone request would have to get it anew."""
SHORT_TOKENS = 64
"""Answers bounded by so many tokens share batches; longer ones with those of twice as many, of four times as many, and so on."""
RETRY_MOST_S = 30.0
BROKEN = 3
"""Batches in a row whose failure is the engine's, as after an error of a GPU: it is not ready then, and tries on."""


@dataclass(eq=False)
class _Sample:
    """One completion while it is made."""

    ids: list[int] = field(default_factory=list)
    done: bool = False


class _Job:
    """A request on its way through the engine. Tokens come from a thread of the model; all else belongs to the event loop.

    It does not hold the model: that thread may be the last to let go of a request, and CTranslate2 aborts where a model of its ends itself.
    """

    def __init__(self, prompt: Prompt, tokenizer: Tokenizer, *, streams: bool) -> None:
        self.prompt, self._tokenizer, self._streams = prompt, tokenizer, streams
        self.samples = [_Sample() for _ in range(prompt.samples)]
        self.begun = self.left = False
        """Whether it is in a batch; whether nobody waits for it any more."""
        self.error: Exception | None = None
        self.clock: asyncio.TimerHandle | None = None
        """How long it may wait."""
        self.news = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._told = False

    @property
    def done(self) -> bool:
        return self.error is not None or all(sample.done for sample in self.samples)

    def heed(self, index: int, token: int, last: bool) -> bool:
        """Take a token of a sample, in the model's thread; returns whether the sample ends."""
        sample = self.samples[index]
        sample.ids.append(token)
        sampling = self.prompt.sampling
        sample.done = last or len(sample.ids) >= sampling.max_tokens or holds_stop(self._tokenizer, sample.ids, sampling.stop)
        if (self._streams or (sample.done and self.done)) and not self._told:
            self._told = True  # one waking of the loop for all tokens that come before it has woken
            self._loop.call_soon_threadsafe(self._tell)
        return sample.done or self.left

    def fail(self, error: Exception) -> None:
        self.error = error
        self.news.set()

    def _tell(self) -> None:
        self._told = False
        self.news.set()

    async def until_done(self) -> None:
        """Return when every sample is complete. Raises what has come in between."""
        while not self.done:
            await self.news.wait()
            self.news.clear()
        if self.error is not None:
            raise self.error


class LocalEngine:
    """An `Engine`, and a streaming one, over a `LocalModel`: while batches are decoded, requests queue up; those alike go out together.

    Alike are requests whose tokens are drawn alike, whose answers are bounded alike, and, for a decoder-only model, whose prompts are of
    like length: within LENGTH_SPREAD tokens. The oldest request is in the next batch, and with it those that suit it best. Each is
    answered when its own last token has come, not when the batch has ended; one whose asker has gone ends there and then.

    Seeds are not looked at (see `LocalModel.generate`). Belongs to the event loop that first asks it.
    """

    def __init__(
        self,
        model: LocalModel,
        *,
        max_batch: int = BATCH_ROWS,
        batch_tokens: int | None = None,
        max_waiting: int = 512,
        wait_s: float | None = None,
        deadline_s: float | None = None,
        told: Callable[[int], None] = lambda rows: None,
    ) -> None:
        """`max_batch`, `batch_tokens`: completions and tokens of one batch, where a longer prompt is read alone; `max_waiting`: requests in
        the queue, above it TeacherBusy; `wait_s`: seconds that each may wait there, then TeacherBusy.

        `deadline_s`: seconds for one answer, or for all of a streamed one. A request that still waits then gets TeacherBusy, one that is
        being answered TeacherLate. `told` hears how many requests each batch has.
        """
        self._told = told
        self._batch_tokens = batch_tokens or BATCH_TOKENS[model.config.kind]
        self._model, self._max_batch, self._max_waiting, self._deadline_s = model, max_batch, max_waiting, deadline_s
        self._wait_s = wait_s
        # a pool of its own: what else runs in threads of this process is not to keep batches waiting
        self._threads = ThreadPoolExecutor(model.workers, thread_name_prefix="decode")
        self._queue: list[_Job] = []
        self._arrived = asyncio.Event()
        self._workers: list[asyncio.Task[None]] = []
        self._running = 0
        """Requests that are being decoded."""
        self._closed = False
        self._failed = 0
        """Batches in a row that have failed."""
        self._pace = 0.0
        """Requests that end in a second, of late."""

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._queue)

    async def generate(self, request: GenerationRequest) -> list[Completion]:
        """`request.n` completions.

        Raises RequestRefused, TeacherBusy when the queue is full or too slow, TeacherLate, EngineError.
        """
        job = await self._enqueue(request, streams=False)
        try:
            async with asyncio.timeout(self._deadline_s):
                await job.until_done()
        except TimeoutError:
            raise self._late(job) from None
        finally:
            self._leave(job)
        completions = [self._model.completion(sample.ids, request.sampling.stop) for sample in job.samples]
        return completions * request.n if request.sampling.temperature == 0 else completions

    async def stream(self, request: GenerationRequest) -> AsyncGenerator[Piece, None]:
        """The pieces of `request.n` completions as they are decoded; together they are what `generate` gives. Raises as it does."""
        job = await self._enqueue(request, streams=True)
        texts = [_Text(self._model, request.sampling.stop) for _ in job.samples]
        choices = range(request.n) if request.sampling.temperature == 0 else None  # of greedy ones there is one text for all
        open_ = set(range(len(texts)))
        try:
            until = None if self._deadline_s is None else asyncio.get_running_loop().time() + self._deadline_s
            while open_:
                try:
                    async with asyncio.timeout_at(until):
                        await job.news.wait()
                except TimeoutError:
                    raise self._late(job) from None
                job.news.clear()
                if job.error is not None:
                    raise job.error
                for index in sorted(open_):
                    done = job.samples[index].done  # looked at before its tokens: none comes after
                    said, reason = texts[index].add(job.samples[index].ids, done)
                    if reason:
                        open_.discard(index)
                    if said or reason:
                        for choice in choices or (index,):
                            yield Piece(choice, said, reason)
        finally:
            self._leave(job)

    async def check(self) -> None:
        if self._closed:
            raise TeacherUnavailable("shutting down")
        if self._failed >= BROKEN:
            raise TeacherUnavailable(f"the last {self._failed} batches have failed")

    async def aclose(self) -> None:
        """Finish the batches that are being decoded, refuse those that wait."""
        self._closed = True
        self._arrived.set()
        await asyncio.gather(*self._workers)
        for job in self._queue:
            job.fail(TeacherUnavailable("shutting down"))
        self._threads.shutdown(wait=False)

    async def _enqueue(self, request: GenerationRequest, *, streams: bool) -> _Job:
        self._refuse_more()
        try:
            # on the event loop only what takes less than to hand it over
            prompt = self._model.encode(request) if self._model.quick(request) else await asyncio.to_thread(self._model.encode, request)
        except EngineError as exc:  # the chat template's: the turns are the caller's
            log.info("%s", exc)
            raise RequestRefused("the model's chat template refuses these messages; look at their roles and order") from None
        self._refuse_more()
        if not self._workers:
            self._workers = [asyncio.create_task(self._work()) for _ in range(self._model.workers)]
        job = _Job(prompt, self._model.tokenizer, streams=streams)
        if self._wait_s is not None:
            job.clock = asyncio.get_running_loop().call_later(self._wait_s, self._expire, job)
        self._queue.append(job)
        self._arrived.set()
        return job

    def _refuse_more(self) -> None:
        """Raises TeacherUnavailable once it closes, TeacherBusy where as many wait as may."""
        if self._closed:
            raise TeacherUnavailable("shutting down")
        if len(self._queue) >= self._max_waiting:
            later = len(self._queue) / self._pace if self._pace else 1.0
            raise TeacherBusy("too many requests are waiting; try again", retry_after_s=min(RETRY_MOST_S, max(1.0, later)))

    def _leave(self, job: _Job) -> None:
        """Nobody waits for this one any more."""
        job.left = True
        if job.clock is not None:
            job.clock.cancel()
        if not job.begun and job in self._queue:
            self._queue.remove(job)

    def _expire(self, job: _Job) -> None:
        """Give up on one that has waited long enough."""
        if not job.begun and job in self._queue:
            self._queue.remove(job)
            job.fail(TeacherBusy(f"not begun within {self._wait_s:g} s; try again", retry_after_s=RETRY_MOST_S))

    def _late(self, job: _Job) -> TeacherUnavailable:
        if job.begun:
            return TeacherLate(f"no whole answer within {self._deadline_s:g} s")
        return TeacherBusy(f"not begun within {self._deadline_s:g} s; try again", retry_after_s=min(RETRY_MOST_S, self._deadline_s or 1.0))

    async def _work(self) -> None:
        while not self._closed:
            batch = self._next_batch()
            if not batch:
                self._arrived.clear()
                await self._idle()
                continue
            for job in batch:
                job.begun = True
            self._told(len(batch))
            self._running += len(batch)
            began = time.monotonic()
            error: Exception = EngineError("the model ended without an answer")
            try:
                await asyncio.get_running_loop().run_in_executor(self._threads, self._decode, batch)
                self._failed = 0
            except Exception as exc:  # whatever it was, those who wait must hear of it and the next batch must go out
                error = exc
                self._failed += 1
            self._running -= len(batch)
            for job in batch:
                if not job.done:
                    job.fail(error)
            await self._gather(len(batch))
            pace = self._model.workers * len(batch) / max(time.monotonic() - began, 1e-3)
            self._pace = 0.8 * self._pace + 0.2 * pace if self._pace else pace

    async def _idle(self) -> None:
        """Wait for a request; what batches took of memory does not stay taken meanwhile."""
        with suppress(TimeoutError):
            async with asyncio.timeout(IDLE_S):
                await self._arrived.wait()
                return
        if not self._running:
            await asyncio.get_running_loop().run_in_executor(self._threads, give_back_now)
        await self._arrived.wait()

    async def _gather(self, rows: int) -> None:
        """Give those who were answered together the time to ask together again: a batch of the first of them would be a small one."""
        seen = -1
        while rows > 1 and seen < len(self._queue) < rows and not self._closed:
            seen = len(self._queue)
            await asyncio.sleep(GATHER_S)

    def _decode(self, batch: Sequence[_Job]) -> None:
        self._model.decode([job.prompt for job in batch], lambda row, sample, token, last: batch[row].heed(sample, token, last))

    def _next_batch(self) -> list[_Job]:
        """The oldest request and those that share its batch best."""
        if not self._queue:
            return []
        oldest = self._queue[0]
        kind = _kind(oldest.prompt)
        alike = [job for job in self._queue if _kind(job.prompt) == kind]
        batch = _window(alike, oldest, self._rows(len(alike), oldest.prompt.rows), self._model.spread, self._batch_tokens)
        taken = set(batch)
        self._queue = [job for job in self._queue if job not in taken]
        return batch

    def _rows(self, alike: int, each: int) -> int:
        """Requests of the next batch, of so many that are alike and take so many rows each: this worker's share of all that are here."""
        return min(max(1, self._max_batch // each), -(-(alike + self._running) // self._model.workers))


def _kind(prompt: Prompt) -> tuple[float, float, int, int, int, int]:
    """What requests of one batch have in common. Stop texts and the exact bound of an answer are each request's own."""
    sampling = prompt.sampling
    bound = ((sampling.max_tokens - 1) // SHORT_TOKENS).bit_length()
    return sampling.temperature, sampling.top_p, prompt.samples, prompt.beam_size, prompt.known, bound


def _window(jobs: list[_Job], oldest: _Job, rows: int, spread: int | None, tokens: int) -> list[_Job]:
    """At most `rows` of the jobs, the oldest of them among them, of lengths next to each other: as many as there may be.

    `spread`: most tokens by which their lengths may differ; None: any. `tokens`: most of a batch (see `_weight`). A prompt of one token is
    never beside longer ones where lengths matter (see `_batches` in local.py).
    """
    jobs = sorted(jobs, key=lambda job: job.prompt.length)
    place, best = jobs.index(oldest), (0, 0)
    for first in range(max(0, place - rows + 1), place + 1):
        end = first
        while end < len(jobs) and end - first < rows:
            longest, shortest = jobs[end].prompt.length, jobs[first].prompt.length
            if spread is not None and (longest - shortest > spread or shortest == 1 < longest):
                break
            if end > first and (end - first + 1) * _weight(jobs[end].prompt) > tokens:  # all are as long as the longest, there
                break
            end += 1
        if end > place and (end - first, _width(jobs, *best)) > (best[1] - best[0], _width(jobs, first, end)):
            best = first, end
    return jobs[best[0] : best[1]]


def _weight(prompt: Prompt) -> float:
    """What a request takes of a batch's tokens."""
    return prompt.length + prompt.rows * (len(prompt.tokens) + prompt.sampling.max_tokens) / KEPT


def _width(jobs: list[_Job], first: int, end: int) -> int:
    """Tokens by which the lengths of some jobs next to each other differ."""
    return jobs[end - 1].prompt.length - jobs[first].prompt.length if end > first else 0


class _Text:
    """The text of a completion as its tokens come, held back where it may turn out to be part of a stop text."""

    def __init__(self, model: LocalModel, stop: tuple[str, ...]) -> None:
        self._model, self._stop = model, stop
        self._tokenizer: Tokenizer = model.tokenizer
        self._decoder = DecodeStream(skip_special_tokens=True)
        self._read = 0
        self._text = ""
        self._searched = self._told = 0
        self._cut: int | None = None
        """Where the first stop text begins that was found."""

    def add(self, ids: list[int], done: bool) -> tuple[str, FinishReason | None]:
        """What is new since it was called last, and, of a completion that is `done`, why it ended. `ids`: all so far."""
        if done:
            whole = self._model.completion(ids, self._stop)
            return whole.text[self._told :], whole.finish_reason
        end = len(ids)
        for token in ids[self._read : end]:
            if not self._model.ends(token):
                self._text += self._step(token)
        self._read = end
        said = self._text[: self._safe()].lstrip()[self._told :]
        self._told += len(said)
        return said, None

    def _step(self, token: int) -> str:
        try:
            return self._decoder.step(self._tokenizer, token) or ""
        except Exception:  # tokenizers raises nothing more precise where bytes of no text came before: it begins anew behind them
            self._decoder = DecodeStream(skip_special_tokens=True)
            return self._decoder.step(self._tokenizer, token) or ""

    def _safe(self) -> int:
        """How much of the text is not, and will not be, part of a stop text."""
        text = self._text
        for stop in self._stop:
            if (at := text.find(stop, max(0, self._searched - len(stop)))) >= 0:
                self._cut = at if self._cut is None else min(self._cut, at)
        self._searched = len(text)
        safe = len(text) if self._cut is None else self._cut
        for stop in self._stop:
            at = text.find(stop[0], max(0, len(text) - len(stop) + 1))
            while at >= 0 and not stop.startswith(text[at:]):
                at = text.find(stop[0], at + 1)
            if at >= 0:
                safe = min(safe, at)
        return safe
