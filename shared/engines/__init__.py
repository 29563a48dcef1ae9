"""Who answers: one small protocol for a teacher behind a URL, a model in this process and a script."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import NamedTuple, Protocol, runtime_checkable

from shared.contracts import Completion, FinishReason, GenerationRequest


class Engine(Protocol):
    """Answers requests with text. Safe to call from many tasks at once."""

    async def generate(self, request: GenerationRequest) -> list[Completion]:
        """`request.n` completions. Raises TeacherUnavailable, TeacherRejected, RequestRefused or EngineError."""
        ...

    async def check(self) -> None:
        """Return if a request would be answered now. Raises as `generate` does."""
        ...

    async def aclose(self) -> None:
        """Let go of connections and memory."""
        ...


class Piece(NamedTuple):
    """Some more text of completion number `choice`; its last piece says why it ended."""

    choice: int
    text: str
    finish_reason: FinishReason | None = None


@runtime_checkable
class StreamingEngine(Engine, Protocol):
    """An engine that gives text as it comes."""

    def stream(self, request: GenerationRequest) -> AsyncGenerator[Piece, None]:
        """The pieces of `request.n` completions, each ended by a finish reason. Raises as `generate` does, before or between pieces."""
        ...


def pieces(engine: Engine, request: GenerationRequest) -> AsyncGenerator[Piece, None]:
    """The answer in pieces: as they come from a `StreamingEngine`, else each completion whole. Raises as `Engine.generate` does."""
    return engine.stream(request) if isinstance(engine, StreamingEngine) else _whole(engine, request)


async def _whole(engine: Engine, request: GenerationRequest) -> AsyncGenerator[Piece, None]:
    for choice, completion in enumerate(await engine.generate(request)):
        yield Piece(choice, completion.text, completion.finish_reason)
