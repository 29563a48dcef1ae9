"""Collecting answers into a ledger: of a teacher over HTTP, many requests in flight, or of a model in this process, in chunks.

Only what the ledger does not hold yet is asked for, so that a run that was cut short ends with the same lines as one that was not.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

from shared.artifacts import Ledger, canonical, now, sha256_bytes
from shared.commands import Progress
from shared.contracts import Completion, GenerationRequest, Response
from shared.engines import Engine
from shared.errors import RequestRefused

SYNC_EVERY_S = 0.2


@dataclass(frozen=True)
class Ask:
    """One prompt to be answered `request.n` times by one model."""

    example_id: str
    request: GenerationRequest
    identity: str
    """Who answers: a URL, or whatever else tells one model from all others."""
    model: str
    """The public name of the model that is asked for."""
    protocol: str = "chat"

    def key(self, sample: int) -> str:
        """The SHA-256 of all that is asked with sample `sample` (from 0); how many samples are wanted is no part of it."""
        return sha256_bytes(b"%s#%d" % (self._asked, sample))

    @cached_property
    def _asked(self) -> bytes:
        asked = {
            "identity": self.identity,
            "protocol": self.protocol,
            "model": self.model,
            "example_id": self.example_id,
            "request": self.request.model_dump(mode="json", exclude={"n"}),
        }
        return canonical(asked)


@dataclass(frozen=True)
class Collected:
    """What a ledger holds for some asks; every wanted answer is counted once: in `answers`, in `failed` or in `missing`."""

    prompts: int
    answers: int
    failed: dict[str, int]
    """Failed rows by the class of their reason."""
    missing: int
    """Wanted and neither answered nor failed: none after a complete collection."""
    cut_off: int
    """Answers that ended at the token limit."""
    distinct_fraction: float
    """Different texts / answers, within each prompt with several answers; 1.0 where no prompt has several."""
    requests: int = 0
    """Requests made by this call."""
    seconds: float = 0.0
    """Wall time of this call."""
    collected: int = 0
    """Rows this call added."""

    @property
    def failed_fraction(self) -> float:
        """Failed rows / rows; 0.0 without rows."""
        failed = sum(self.failed.values())
        return failed / max(failed + self.answers, 1)

    def explain(self) -> str:
        """The census in one line, for a message."""
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(self.failed.items()))
        failed = f"{sum(self.failed.values())} failed ({reasons})" if reasons else "none failed"
        return f"{self.prompts} prompts, {self.answers} answers, {failed}, {self.cut_off} cut off"

    def counts(self) -> dict[str, Any]:
        """The census for a manifest; the rate is rows/s."""
        return {
            "prompts": self.prompts,
            "answers": self.answers,
            "failed": dict(sorted(self.failed.items())),
            "cut_off": self.cut_off,
            "distinct_fraction": round(self.distinct_fraction, 4),
            "requests": self.requests,
            "seconds": round(self.seconds, 3),
            "rows_per_s": round(self.collected / self.seconds, 2) if self.seconds else 0.0,
        }


class OfflineModel(Protocol):
    """A model in this process that answers a batch at once, alike for the same batch and seed."""

    def fits(self, request: GenerationRequest) -> bool:
        """Whether the prompt is short enough to be answered."""
        ...

    def generate(self, requests: Sequence[GenerationRequest], *, seed: int | None) -> list[list[Completion]]:
        """`n` completions of each request, in order. Raises EngineError."""
        ...


def answers(asks: Sequence[Ask], ledger: Ledger[Response]) -> list[list[Response]]:
    """The rows of each ask, ok and failed, by sample index; of several rows for one sample the last. Absent samples are left out."""
    rows = {row.key: row for row in ledger.rows()}
    return [[rows[key] for sample in range(ask.request.n) if (key := ask.key(sample)) in rows] for ask in asks]


async def collect(
    engine: Engine, asks: Sequence[Ask], ledger: Ledger[Response], *, concurrency: int, what: str, retry_failed: bool = False
) -> Collected:
    """Ask `engine` for every sample that `ledger` does not hold, at most `concurrency` requests in flight.

    A refused request and an empty answer become failed rows, asked again only with `retry_failed`. Any other error ends the
    collection at once, with all rows so far durable. Sample i is asked for with the request's seed + i.
    Raises what `engine.generate` raises, but for RequestRefused, and StorageError.
    """
    started = time.monotonic()
    wanted = sum(ask.request.n for ask in asks)
    held = _held(ledger, retry_failed)
    # prompts of like length are in flight together: an engine batches them with less padding
    jobs = [(ask, samples) for ask in sorted(asks, key=lambda ask: _prompt_chars(ask.request)) for samples in _missing(ask, held)]
    todo = sum(len(samples) for _, samples in jobs)
    progress = Progress(what, wanted, unit="answers", done=wanted - todo)
    requests = 0
    waiting = iter(jobs)  # shared by all workers: each takes the next

    def keep(row: Response) -> None:
        ledger.append(row)
        progress.step()

    async def work() -> None:
        nonlocal requests
        for ask, samples in waiting:
            made = await _answer(engine, ask, samples, keep)
            requests += made  # not in one statement: others count while this one waits

    try:
        async with asyncio.TaskGroup() as group:
            syncing = group.create_task(_sync_forever(ledger, progress))
            async with asyncio.TaskGroup() as workers:
                for _ in range(min(concurrency, len(jobs))):
                    workers.create_task(work())
            syncing.cancel()
    except BaseExceptionGroup as errors:
        raise _first(errors) from None
    finally:
        ledger.sync()
    return _census(asks, ledger, requests=requests, seconds=time.monotonic() - started, collected=todo)


def answer_offline(
    model: OfflineModel, asks: Sequence[Ask], ledger: Ledger[Response], *, chunk: int, what: str, seed: int | None
) -> Collected:
    """Let a model in this process answer every ask that `ledger` does not hold, `chunk` prompts at a time.

    The chunks and their seeds depend on `asks` and `seed` alone, and a chunk with anything missing is generated whole: a batch
    shares one stream of random numbers, so only the same batch gives the same texts. Prompts too long for the model become
    failed rows, and so do empty answers. Raises EngineError, StorageError.
    """
    started = time.monotonic()
    # prompts of like length share a chunk: less padding
    ordered = sorted(asks, key=lambda ask: (_prompt_chars(ask.request), ask.key(0)))
    held = _held(ledger, retry_failed=False)
    wanted = sum(ask.request.n for ask in asks)
    todo = sum(len(samples) for ask in asks for samples in _missing(ask, held))
    progress = Progress(what, wanted, unit="answers", done=wanted - todo)
    requests = 0
    for number, first in enumerate(range(0, len(ordered), chunk)):
        batch = ordered[first : first + chunk]
        if not any(True for ask in batch for _ in _missing(ask, held)):
            continue
        asked_at = time.monotonic()
        fitting = [ask for ask in batch if model.fits(ask.request)]
        found = model.generate([ask.request for ask in fitting], seed=_chunk_seed(seed, number)) if fitting else []
        latency, requests = time.monotonic() - asked_at, requests + 1
        completions = dict(zip((ask.key(0) for ask in fitting), found, strict=True))
        for ask in batch:
            for samples in _missing(ask, held):
                for sample in samples:
                    if ask.key(0) in completions:
                        row = _row(ask, sample, completions[ask.key(0)][sample], latency_s=latency, attempts=1)
                    else:
                        row = _failed(
                            ask, sample, "TooLong: the prompt and its answer exceed the model's context", latency_s=0.0, attempts=1
                        )
                    ledger.append(row)
                    progress.step()
        ledger.sync()
    return _census(asks, ledger, requests=requests, seconds=time.monotonic() - started, collected=todo)


async def _answer(engine: Engine, ask: Ask, samples: range, keep: Callable[[Response], None]) -> int:
    """Ask for consecutive samples until all have a row; a teacher may give fewer than asked for. Returns the requests made."""
    requests = 0
    while samples:
        requests += 1
        asked_at = time.monotonic()
        try:
            found = await engine.generate(_part(ask.request, samples))
            reason = f"TooFewChoices: none of {len(samples)} choices came"
        except RequestRefused as exc:
            found, reason = [], f"{type(exc).__name__}: {exc}"
        latency = time.monotonic() - asked_at
        for sample, completion in zip(samples, found, strict=False):
            keep(_row(ask, sample, completion, latency_s=latency, attempts=requests))
        if not found:  # asking again cannot help
            for sample in samples:
                keep(_failed(ask, sample, reason, latency_s=latency, attempts=requests))
            break
        samples = samples[len(found) :]
    return requests


async def _sync_forever(ledger: Ledger[Response], progress: Progress) -> None:
    """Make rows durable, and say how things stand, while the teacher pauses and nothing is appended."""
    while True:
        await asyncio.sleep(SYNC_EVERY_S)
        ledger.sync()
        progress.tick()


def _held(ledger: Ledger[Response], retry_failed: bool) -> set[str]:
    rows = {row.key: row for row in ledger.rows()}
    return {key for key, row in rows.items() if row.status == "ok" or not retry_failed}


def _missing(ask: Ask, held: set[str]) -> Iterator[range]:
    """The samples of an ask that are not held, as runs of consecutive ones."""
    first = None
    for sample in range(ask.request.n + 1):
        absent = sample < ask.request.n and ask.key(sample) not in held
        if absent and first is None:
            first = sample
        elif not absent and first is not None:
            yield range(first, sample)
            first = None


def _part(request: GenerationRequest, samples: range) -> GenerationRequest:
    """The request for some samples of a request: a part asked for later is asked for as it was in the whole."""
    seed = request.sampling.seed
    sampling = request.sampling if seed is None else request.sampling.model_copy(update={"seed": seed + samples[0]})
    return request.model_copy(update={"n": len(samples), "sampling": sampling})


def _row(ask: Ask, sample: int, completion: Completion, *, latency_s: float, attempts: int) -> Response:
    if not completion.text.strip():
        return _failed(ask, sample, "empty", latency_s=latency_s, attempts=attempts)
    return Response(
        key=ask.key(sample),
        example_id=ask.example_id,
        sample=sample,
        status="ok",
        text=completion.text.encode(errors="replace").decode(),  # JSON can name half a character, a file cannot hold it
        finish_reason=completion.finish_reason,
        model=ask.model,
        latency_s=round(latency_s, 4),
        attempts=attempts,
        received_at=now(),
    )


def _failed(ask: Ask, sample: int, reason: str, *, latency_s: float, attempts: int) -> Response:
    return Response(
        key=ask.key(sample),
        example_id=ask.example_id,
        sample=sample,
        status="failed",
        reason=reason,
        model=ask.model,
        latency_s=round(latency_s, 4),
        attempts=attempts,
        received_at=now(),
    )


def _census(asks: Sequence[Ask], ledger: Ledger[Response], *, requests: int, seconds: float, collected: int) -> Collected:
    rows = answers(asks, ledger)
    texts = [[row.text for row in of_ask if row.status == "ok"] for of_ask in rows]
    several = [found for found in texts if len(found) > 1]
    reasons = Counter((row.reason or "unknown").partition(":")[0] for of_ask in rows for row in of_ask if row.status == "failed")
    return Collected(
        prompts=len(asks),
        answers=sum(map(len, texts)),
        failed=dict(reasons),
        missing=sum(ask.request.n - len(of_ask) for ask, of_ask in zip(asks, rows, strict=True)),
        cut_off=sum(row.finish_reason == "length" for of_ask in rows for row in of_ask if row.status == "ok"),
        distinct_fraction=sum(len(set(found)) for found in several) / sum(map(len, several)) if several else 1.0,
        requests=requests,
        seconds=seconds,
        collected=collected,
    )


def _prompt_chars(request: GenerationRequest) -> int:
    return len(request.prompt or "") + sum(len(m.content) for m in request.messages or ())


def _chunk_seed(seed: int | None, number: int) -> int | None:
    """An unsigned 32-bit seed of one chunk: what random number generators take, and unlike that of its neighbours."""
    return None if seed is None else int.from_bytes(hashlib.sha256(f"{seed}#{number}".encode()).digest()[:4], "big")


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The error that ended a task group; what follows it is mostly the same error of other workers."""
    exc = group.exceptions[0]
    return _first(exc) if isinstance(exc, BaseExceptionGroup) else exc
