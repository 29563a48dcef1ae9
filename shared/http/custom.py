"""A `Teacher` with an API of its own, as the recipe's `teacher.custom` declares it."""

from __future__ import annotations

import json
from typing import Any

import httpx
import jmespath

from shared.contracts import Completion, GenerationRequest
from shared.errors import (
    NotTheApi,
    RequestRefused,
    SettingsError,
    TeacherBusy,
    TeacherError,
    TeacherFailed,
    TeacherRejected,
    TeacherUnavailable,
)
from shared.harvest.custom_api import CustomApi, Ending, Outcome
from shared.harvest.teacher import Answer, Refusal
from shared.http.client import MOST_TOKENS, Exchange, Reply, encoded, headers_with, retry_after

ENDINGS: dict[str, Ending] = {"stop": "stop", "length": "length", "content_filter": "content_filter"}
READ = ("choices", "text", "finish_reason", "error", "retry_after_s", "input_tokens", "output_tokens")
REMEDY = "is this the URL of the API that teacher.custom describes, and does it answer in one piece, not in a stream?"


class CustomTeacher:
    """A `Teacher` over one URL that takes and gives JSON of any shape."""

    def __init__(
        self,
        url: str,
        api: CustomApi,
        *,
        model: str,
        api_key: str | None = None,
        timeout_s: float = 120.0,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        """`url`: the whole of it; `timeout_s`: seconds for one whole attempt; `transport` is what tests replace.

        Raises SettingsError for what is no http(s) URL, for a key that is missing, has no place or that no header can hold.
        """
        if api_key is None and "api_key" in api.used:
            raise SettingsError("teacher.api_key: teacher.custom sends one; give teacher.api_key_file or DISTILL_TEACHER__API_KEY")
        if api_key is not None and "api_key" not in api.used:
            raise SettingsError('teacher.api_key: nothing in teacher.custom holds "{api_key}": say where it is sent, or unset it')
        headers_with(api_key)  # refuses a key that no header can hold
        headers = {name.lower(): value.replace("{api_key}", api_key or "") for name, value in api.headers.items()}
        self._exchange = Exchange(
            url, headers={"user-agent": "blackbox-distill", **headers}, timeout_s=timeout_s, secrets=[api_key or ""], transport=transport
        )
        self._url, self._api, self._model, self._api_key = httpx.URL(url), api, model, api_key
        self._endings = ENDINGS | api.finish_reasons
        self._expressions = {field: jmespath.compile(text) for field in READ if (text := getattr(api, field)) is not None}

    @property
    def most_choices(self) -> int | None:
        return self._api.most_choices

    async def ask(self, request: GenerationRequest) -> Answer:
        """One attempt. Raises as `Teacher.ask` says."""
        reply = await self._exchange.send(self._api.method, self._url, encoded(self._body(request), self._model))
        try:
            answer = self._exchange.json(reply, self._url, remedy=REMEDY)
        except NotTheApi:
            self._exchange.judge(reply, self._url, remedy=REMEDY)  # a status says more than that its page is no JSON
            raise
        self._judge(reply, answer)
        choices = [answer]
        if self._api.choices is not None:
            choices = self._find("choices", answer)
            if not isinstance(choices, list) or not choices:
                raise NotTheApi(self._missed("choices", answer, reply))
        return Answer(
            tuple([self._choice(choice, reply) for choice in choices[: request.n]]),
            input_tokens=self._count("input_tokens", answer),
            output_tokens=self._count("output_tokens", answer),
        )

    def rendered(self, request: GenerationRequest) -> str:
        return self._exchange.rendered(self._api.method, self._url, self._body(request))

    async def aclose(self) -> None:
        await self._exchange.aclose()

    def _body(self, request: GenerationRequest) -> Any:
        return self._api.asked(request, model=self._model, api_key=self._api_key)

    def _judge(self, reply: Reply, answer: Any) -> None:
        """Raise what the declared error means, else what the status does."""
        error, wait = self._find("error", answer), _seconds(self._find("retry_after_s", answer))
        outcome = self._api.errors.get(_word(error)) if error else None
        if outcome is None:
            try:
                self._exchange.judge(reply, self._url, remedy=REMEDY)
            except TeacherUnavailable as exc:
                if wait is not None:
                    exc.retry_after_s = wait
                raise
            if not error:
                return
            outcome = "failed" if wait is None else "busy"
        if wait is None:
            wait = retry_after(reply.headers.get("retry-after"), reply.headers.get("date"))
        said = f"{self._url}: HTTP {reply.status}: teacher.custom.error ({self._api.error}) is {self._exchange.quote(_word(error))} in"
        raise _raised(outcome, f"{said} {self._exchange.quote(reply.body)}", wait)

    def _choice(self, choice: Any, reply: Reply) -> Completion | Refusal:
        ending: Ending | None = "stop"
        if self._api.finish_reason is not None:
            said = self._find("finish_reason", choice)
            if said is None:
                raise NotTheApi(self._missed("finish_reason", choice, reply))
            ending = self._endings.get(_word(said))
        if ending == "content_filter":
            return Refusal("content_filter", f"the teacher's filter kept the answer back: {self._exchange.quote(_word(said))}")
        text = self._find("text", choice)
        if text is None and self._api.finish_reason is None:
            raise NotTheApi(self._missed("text", choice, reply))
        if not isinstance(text, str):
            return Refusal("no_text", self._missed("text", choice, reply))
        if ending is None:
            return Refusal(
                "refused", f"an answer ended with {self._exchange.quote(_word(said))}, which teacher.custom.finish_reasons does not name"
            )
        return Completion(text=text, finish_reason=ending)

    def _find(self, field: str, within: Any) -> Any:
        """What the expression of `field` finds; None as well where it fails, or where the recipe has none."""
        expression = self._expressions.get(field)
        try:
            return None if expression is None else expression.search(within)
        except (ValueError, TypeError):  # jmespath's own errors are ValueErrors; a slice by 0 is Python's
            return None

    def _missed(self, field: str, within: Any, reply: Reply) -> str:
        try:
            found = self._expressions[field].search(within)
            what = "finds nothing" if found is None else f"finds {self._exchange.quote(_word(found))}"
        except (ValueError, TypeError) as exc:
            what = f"fails: {self._exchange.quote(str(exc))}"
        said = self._exchange.quote(reply.body)
        return f"{self._url}: teacher.custom.{field} ({getattr(self._api, field)}) {what} in an answer that begins: {said}"

    def _count(self, field: str, answer: Any) -> int | None:
        count = self._find(field, answer)
        return count if isinstance(count, int) and not isinstance(count, bool) and 0 <= count <= MOST_TOKENS else None


def _word(said: Any) -> str:
    """What an API says, as the recipe's words for it: a number 7 is "7"."""
    return said if isinstance(said, str) else json.dumps(said)


def _seconds(said: Any) -> float | None:
    """Of a number, of what a Retry-After may hold, and of texts like 1.5s and 200ms."""
    if isinstance(said, bool) or not isinstance(said, (int, float, str)):
        return None
    text = str(said).strip()
    if text.endswith("ms"):
        return None if (wait := retry_after(text.removesuffix("ms"))) is None else wait / 1000
    return retry_after(text.removesuffix("s"))


def _raised(outcome: Outcome, message: str, wait: float | None) -> TeacherError:
    match outcome:
        case "busy":
            return TeacherBusy(message, retry_after_s=wait)
        case "failed":
            return TeacherFailed(message, retry_after_s=wait)
        case "rejected":
            return TeacherRejected(message)
        case _:
            return RequestRefused(message, kind=outcome)
