"""The client of a student's POST /v1/generate, which takes a question as it is and puts the task's wording around it."""

from __future__ import annotations

from typing import Any

import httpx

from shared.contracts import Completion, GenerationRequest
from shared.errors import NotTheApi
from shared.harvest.teacher import Answer
from shared.http.client import Exchange, Named, encoded, headers_with

NAMED = Named(url="--url", key="--api-key-file, DISTILL_BATCH_API_KEY")


class StudentApi:
    """A `Teacher` over `POST URL/generate`: the prompt of a request is the question, and its sampling is the server's business."""

    most_choices = 1

    def __init__(
        self,
        url: str,
        *,
        model: str | None,
        truncate: bool,
        api_key: str | None,
        timeout_s: float,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        """`model`: None for the server's own student; `timeout_s`: seconds for one whole attempt; `transport` is what tests replace.

        Raises SettingsError for what is no http(s) URL and for a key that no header can hold.
        """
        self._exchange = Exchange(
            url, headers=headers_with(api_key), timeout_s=timeout_s, secrets=[api_key or ""], named=NAMED, transport=transport
        )
        self.base = str(self._exchange.base)
        self._url = httpx.URL(f"{self.base}/generate")
        # only what was asked for: a server may be older than an option
        self._options: dict[str, Any] = {**({"model": model} if model else {}), **({"truncate": True} if truncate else {})}
        known = f", and does it have the model {model!r} (GET {self.base}/student)" if model else ""
        self._remedy = f"does the URL end in /v1, is it that of a `distill serve`{known}?"

    async def ask(self, request: GenerationRequest) -> Answer:
        """One attempt at one question. Raises as `Teacher.ask` says."""
        reply = await self._exchange.send("POST", self._url, encoded(self._body(request), "question"))
        self._exchange.judge(reply, self._url, remedy=self._remedy)
        match answer := self._exchange.json(reply, self._url, remedy=self._remedy):
            case {"answers": [{"text": str(text), "finish_reason": "stop" | "length" as ended}]}:
                version = answer.get("version")
                return Answer((Completion(text=text, finish_reason=ended),), version=version if isinstance(version, str) else None)
        raise NotTheApi(f"{self._url} answered JSON that is no answer: {self._exchange.quote(reply.body)}; {self._remedy}")

    def rendered(self, request: GenerationRequest) -> str:
        return self._exchange.rendered("POST", self._url, self._body(request))

    async def aclose(self) -> None:
        await self._exchange.aclose()

    def _body(self, request: GenerationRequest) -> dict[str, Any]:
        return {"question": request.prompt, **self._options}
