"""The engine behind another OpenAI-compatible server, whose own words never reach the caller."""

from __future__ import annotations

from shared.contracts import Completion, GenerationRequest
from shared.errors import RequestRefused
from shared.http.client import HttpEngine


class UpstreamEngine:
    """An `Engine` that asks chats and plain prompts of one server, each by its own protocol."""

    def __init__(self, chat: HttpEngine, completions: HttpEngine) -> None:
        self._chat, self._completions = chat, completions

    @classmethod
    def at(cls, url: str, *, model: str, api_key: str | None, timeout_s: float, max_attempts: int) -> UpstreamEngine:
        """The engine of the server at `url` (with its /v1). Raises SettingsError for what is no URL."""
        return cls(
            HttpEngine(url, model=model, protocol="chat", api_key=api_key, timeout_s=timeout_s, max_attempts=max_attempts),
            HttpEngine(url, model=model, protocol="completions", api_key=api_key, timeout_s=timeout_s, max_attempts=max_attempts),
        )

    async def generate(self, request: GenerationRequest) -> list[Completion]:
        """`request.n` completions; a server that ignores n gives fewer. Raises as `HttpEngine.generate` does."""
        engine = self._chat if request.messages is not None else self._completions
        try:
            return await engine.generate(request)
        except RequestRefused:
            # what the server says names itself, its address and its limits, and may quote the prompt: none of it may pass
            raise RequestRefused("the model refused this request; is the prompt too long for it?") from None

    async def check(self) -> None:
        await self._chat.check()

    async def aclose(self) -> None:
        await self._chat.aclose()
        await self._completions.aclose()
