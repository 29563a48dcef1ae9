"""Who answers: one small protocol for a teacher behind a URL, a model in this process and a script."""

from __future__ import annotations

from typing import Protocol

from shared.contracts import Completion, GenerationRequest


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
