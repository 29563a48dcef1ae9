"""Rows of a collection and its census, and the collecting of answers of a model in this process, in chunks.

Only what the ledger does not hold yet is asked for, so that a run that was cut short ends with the same lines as one that was not.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from shared.artifacts import Ledger, now
from shared.commands import Progress
from shared.contracts import Completion, GenerationRequest, Response
from shared.harvest.ask import Ask
from shared.harvest.teacher import Refusal


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
    refused: int = 0
    """Requests of this call that the teacher did not take then (429)."""
    shared: int = 0
    """Rows of this call that another example's answer to the same request has filled."""
    several: int = 0
    """Prompts with several answers."""
    of_several: int = 0
    """Their answers."""
    varied: int = 0
    """Of these, those whose answers differ."""
    one_text: bool = False
    """Whether all answers to all prompts are one and the same text."""
    said: Mapping[str, str] = field(default_factory=dict)
    """What was said last, by the class of the failure."""
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
        """The census for a manifest, and beside it what this call has done; the rate is rows/s."""
        return {
            "prompts": self.prompts,
            "answers": self.answers,
            "failed": dict(sorted(self.failed.items())),
            "cut_off": self.cut_off,
            "distinct_fraction": round(self.distinct_fraction, 4),
            "last_command": {
                "rows": self.collected,
                "requests": self.requests,
                "refused": self.refused,
                "shared": self.shared,
                "seconds": round(self.seconds, 3),
                "rows_per_s": round(self.collected / self.seconds, 2) if self.seconds else 0.0,
            },
        }


TOO_LONG = Refusal("too_long", "the prompt and its answer exceed the model's context")


def row_of(
    ask: Ask, key: str, sample: int, choice: Completion | Refusal, *, latency_s: float, attempts: int, version: str | None = None
) -> Response:
    """The ledger line of a sample; `key`: its own; `version`: of the model, if it says so. An answer of blanks alone is a failed row."""
    if isinstance(choice, Completion) and not choice.text.strip():
        choice = Refusal("empty", "nothing but blanks")
    completion = choice if isinstance(choice, Completion) else None
    return Response(
        key=key,
        example_id=ask.example_id,
        sample=sample,
        status="ok" if completion else "failed",
        text=_whole(completion.text) if completion else "",
        finish_reason=completion.finish_reason if completion else None,
        reason=_whole(choice.reason) if isinstance(choice, Refusal) else None,
        model=version or ask.model,
        latency_s=round(latency_s, 4),
        attempts=attempts,
        received_at=now(),
    )


def _whole(text: str) -> str:
    """JSON can name half a character, a file cannot hold it."""
    return text.encode(errors="replace").decode()


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
    rows = {_name(row): row for row in ledger.rows()}
    return [[rows[name] for key in ask.sample_keys() if (name := (key, ask.example_id)) in rows] for ask in asks]


@dataclass(frozen=True)
class Chunk:
    """Prompts that are answered together: a batch shares one stream of random numbers, so only the same batch gives the same texts."""

    number: int
    requests: tuple[GenerationRequest, ...]
    seed: int | None


@dataclass(frozen=True)
class Answered:
    """The answers to a chunk, in its order; None for a prompt that is too long for the model."""

    number: int
    completions: tuple[list[Completion] | None, ...]
    seconds: float


def answered_by(model: OfflineModel, chunk: Chunk) -> Answered:
    """Raises EngineError."""
    began = time.monotonic()
    fits = [model.fits(request) for request in chunk.requests]
    fitting = [request for request, fit in zip(chunk.requests, fits, strict=True) if fit]
    found = iter(model.generate(fitting, seed=chunk.seed) if fitting else [])
    return Answered(chunk.number, tuple(next(found) if fit else None for fit in fits), time.monotonic() - began)


Answering = Callable[[Sequence[Chunk]], Iterable[Answered]]
"""Answers chunks, in any order. Raises EngineError."""


def in_process(model: OfflineModel) -> Answering:
    """By a model in this process."""
    return lambda chunks: (answered_by(model, chunk) for chunk in chunks)


def answer_offline(
    answering: Answering, asks: Sequence[Ask], ledger: Ledger[Response], *, chunk: int, what: str, seed: int | None
) -> Collected:
    """Have every ask answered that `ledger` does not hold, `chunk` prompts at a time, by a model in this process or on a cluster.

    The chunks and their seeds depend on `asks` and `seed` alone, and a chunk with anything missing is generated whole. Prompts too long
    for the model become failed rows, and so do empty answers. Raises EngineError, StorageError.
    """
    started = time.monotonic()
    # prompts of like length share a chunk: less padding
    ordered = sorted(asks, key=lambda ask: (_prompt_chars(ask.request), ask.example_id))
    held = {_name(row) for row in ledger.rows()}
    wanted = sum(ask.request.n for ask in asks)
    todo = sum(len(_missing(ask, held)) for ask in asks)
    progress = Progress(what, wanted, unit="answers", done=wanted - todo)
    batches = {number: ordered[first : first + chunk] for number, first in enumerate(range(0, len(ordered), chunk))}
    chunks = [
        Chunk(number, tuple(ask.request for ask in batch), _chunk_seed(seed, number))
        for number, batch in batches.items()
        if any(_missing(ask, held) for ask in batch)
    ]
    for answered in answering(chunks):
        for ask, completions in zip(batches[answered.number], answered.completions, strict=True):
            for sample in _missing(ask, held):
                made = TOO_LONG if completions is None else completions[sample]
                ledger.append(row_of(ask, ask.key(sample), sample, made, latency_s=answered.seconds, attempts=1))
                progress.step()
        ledger.sync()
    return _census(asks, ledger, requests=len(chunks), seconds=time.monotonic() - started, collected=todo)


def _name(row: Response) -> tuple[str, str]:
    """What a row answers: examples that ask the same share a key."""
    return row.key, row.example_id


def _missing(ask: Ask, held: set[tuple[str, str]]) -> list[int]:
    """The samples of an ask that are not held."""
    return [sample for sample, key in enumerate(ask.sample_keys()) if (key, ask.example_id) not in held]


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
