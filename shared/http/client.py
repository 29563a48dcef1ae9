"""The client of any OpenAI-compatible API: an `Engine` behind a URL."""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from ipaddress import ip_address
from typing import Any, Literal

import aiohttp
import httpx
from httpx_aiohttp import HttpxAiohttpClient

from shared.contracts import Completion, GenerationRequest
from shared.errors import RequestRefused, SettingsError, TeacherRejected, TeacherUnavailable

MAX_WAIT_S = 60.0
"""Longest pause between two attempts, whatever a Retry-After asks for (it may be a day)."""
LONGEST_S = 7 * 86_400.0
"""What is made of a Retry-After that says never."""
FIRST_WAIT_S = 0.5
"""Upper bound of the first pause; it doubles with every attempt, and the pause is drawn from all below it (full jitter)."""
CONNECTIONS = 1024
"""More than any harvest has in flight: the caller bounds concurrency, not the connection pool."""
SHOWN = 200
"""Characters of a foreign answer that an error quotes."""


class HttpEngine:
    """An `Engine` over `POST BASE_URL/chat/completions` or `/completions`.

    Sends the standard fields alone. A server that ignores `n` gives fewer completions than asked for: they are returned as
    they came, and the caller asks again for the rest. Proxy variables of the environment are heeded, but not for loopback URLs.
    """

    def __init__(
        self,
        base_url: str,
        *,
        model: str,
        protocol: Literal["chat", "completions"] = "chat",
        api_key: str | None = None,
        timeout_s: float = 120.0,
        max_attempts: int = 5,
        transport: httpx.AsyncBaseTransport | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """`timeout_s`: seconds for one whole attempt; `transport` and `sleep` are what tests replace.

        Raises SettingsError for what is no http(s) URL and for a key that no header can hold.
        """
        self._base = parsed_url(base_url)
        self._model, self._protocol, self._api_key = model, protocol, api_key
        self._timeout_s, self._max_attempts, self._sleep = timeout_s, max_attempts, sleep
        # the aiohttp transport: plain httpx slows down with many connections (encode/httpx issue 3215)
        self._client = HttpxAiohttpClient(
            transport=transport,
            timeout=None,  # an attempt is bounded as a whole, below
            trust_env=not is_loopback(self._base.host),
            headers=headers_with(api_key),
            limits=httpx.Limits(max_connections=CONNECTIONS, max_keepalive_connections=CONNECTIONS),
        )

    async def generate(self, request: GenerationRequest) -> list[Completion]:
        """At most `request.n` completions, in the server's order.

        Raises TeacherUnavailable after `max_attempts` attempts, TeacherRejected if retrying cannot help, RequestRefused for
        this request alone: HTTP 400, 413, 422, or no answer that ended by a stop or at its length. Where some of several
        answers ended in another way (filtered, say), the others are returned.
        """
        path, body = self._body(request)
        choices = self._choices(await self._ask("POST", path, body), self._url(path))
        completions, refused = [], None
        for choice in choices[: request.n]:
            try:
                completions.append(self._completion(choice, self._url(path)))
            except RequestRefused as exc:
                refused = exc
        if refused is not None and not completions:
            raise refused
        return completions

    async def check(self) -> None:
        """Return if the server lists its models. One attempt. Raises TeacherUnavailable, TeacherRejected."""
        await self._attempt("GET", "models", None)

    async def aclose(self) -> None:
        await self._client.aclose()

    def _url(self, path: str) -> str:
        return f"{self._base}/{path}"

    def _body(self, request: GenerationRequest) -> tuple[str, dict[str, Any]]:
        sampling = request.sampling
        body: dict[str, Any] = {
            "model": self._model,
            "n": request.n,
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
        }
        if sampling.stop:
            body["stop"] = list(sampling.stop)
        if sampling.seed is not None:
            body["seed"] = sampling.seed
        if self._protocol == "chat":
            if request.messages is None:
                raise RequestRefused("a plain prompt cannot be asked by the chat protocol: give messages")
            return "chat/completions", body | {"messages": [m.model_dump() for m in request.messages]}
        if request.prompt is None:
            raise RequestRefused("chat messages cannot be asked by the completions protocol: give a plain prompt")
        return "completions", body | {"prompt": request.prompt}

    async def _ask(self, method: str, path: str, body: dict[str, Any] | None) -> Any:
        for attempt in range(1, self._max_attempts + 1):
            try:
                return await self._attempt(method, path, body)
            except TeacherUnavailable as exc:
                if attempt == self._max_attempts:
                    message = f"{exc} (attempt {attempt} of {self._max_attempts})"
                    raise TeacherUnavailable(message, retry_after_s=exc.retry_after_s) from exc
                jitter = random.uniform(0, min(MAX_WAIT_S, FIRST_WAIT_S * 2 ** (attempt - 1)))
                # all who were told the same time would come back at once
                await self._sleep(jitter if exc.retry_after_s is None else min(MAX_WAIT_S, exc.retry_after_s + jitter))
        raise AssertionError("unreachable: max_attempts is at least 1")

    async def _attempt(self, method: str, path: str, body: dict[str, Any] | None) -> Any:
        """One request; the parsed JSON of its answer."""
        url = self._url(path)
        try:
            async with asyncio.timeout(self._timeout_s):
                response = await self._client.request(method, url, json=body)
        except TimeoutError as exc:
            raise TeacherUnavailable(f"{url}: no answer within {self._timeout_s:g} s") from exc
        except (httpx.TransportError, aiohttp.ClientError) as exc:
            raise TeacherUnavailable(f"{url}: {str(exc) or type(exc).__name__}") from exc
        status, said = response.status_code, self._quote(response.text)
        if status in (408, 429) or status >= 500:
            raise TeacherUnavailable(f"{url}: HTTP {status}: {said}", retry_after_s=retry_after(response.headers.get("retry-after")))
        if status in (400, 413, 422):
            raise RequestRefused(f"{url}: HTTP {status}: {said}")
        if status != 200:
            raise TeacherRejected(f"{url}: HTTP {status}: {said}; {self._remedy(status)}")
        try:
            return response.json()
        except ValueError as exc:
            kind = response.headers.get("content-type", "no content type").partition(";")[0]
            raise TeacherRejected(f"{url} answered {kind}, not JSON: {said}; is the URL right? It should end in /v1") from exc

    def _choices(self, answer: Any, url: str) -> list[dict[str, Any]]:
        choices = answer.get("choices") if isinstance(answer, dict) else None
        if not isinstance(choices, list) or not all(isinstance(c, dict) for c in choices):
            said = self._quote(str(answer))
            raise TeacherRejected(f"{url} answered JSON without a list of choices: {said}; is this an OpenAI-compatible server?")
        return sorted(choices, key=lambda choice: choice["index"] if isinstance(choice.get("index"), int) else 0)

    def _completion(self, choice: dict[str, Any], url: str) -> Completion:
        reason = choice.get("finish_reason")
        if reason not in ("stop", "length"):
            raise RequestRefused(f"{url}: an answer ended with finish_reason {reason!r}; only stop and length are answers")
        if self._protocol == "completions":
            text = choice.get("text")
        else:
            message = choice.get("message")
            # null content is how some servers say that nothing was generated
            text = (message.get("content") or "") if isinstance(message, dict) else None
        if not isinstance(text, str):
            said = self._quote(str(choice))
            raise TeacherRejected(f"{url} answered a choice without text: {said}; is this an OpenAI-compatible server?")
        return Completion(text=text, finish_reason=reason)

    def _quote(self, text: str) -> str:
        """The beginning of a foreign answer, on one line; a server may repeat the key it refuses."""
        text = " ".join(text.split())
        if self._api_key:
            text = text.replace(self._api_key, "***")
        return text[:SHOWN] + ("..." if len(text) > SHOWN else "") or "(nothing)"

    def _remedy(self, status: int) -> str:
        if status in (401, 403):
            return "give the API key this server wants"
        if status == 404:
            return f"does the URL end in /v1, and does the server know the model {self._model!r}?"
        if 300 <= status < 400:
            return "the server is somewhere else; give its own URL"
        return "is this an OpenAI-compatible server?"


def headers_with(api_key: str | None) -> dict[str, str]:
    headers = {"user-agent": "blackbox-distill"}
    if api_key is not None:
        if not api_key.isascii() or not api_key.isprintable():
            raise SettingsError("api_key: it may hold printable ASCII characters only")  # and must not be quoted
        headers["authorization"] = f"Bearer {api_key}"
    return headers


def parsed_url(text: str) -> httpx.URL:
    try:
        url = httpx.URL(text.rstrip("/"))
    except httpx.InvalidURL as exc:
        raise SettingsError(f"teacher URL {text!r}: {exc}; expected one like http://127.0.0.1:8000/v1") from exc
    if url.scheme not in ("http", "https") or not url.host:
        raise SettingsError(f"teacher URL {text!r}: expected one like http://127.0.0.1:8000/v1")
    if url.userinfo:
        raise SettingsError("teacher URL: it holds a password; give the key by itself")
    return url


def is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def retry_after(header: str | None) -> float | None:
    """Seconds to wait, from a Retry-After of seconds or of a date; None if there is none that makes sense."""
    if header is None:
        return None
    try:
        seconds = float(header)
    except ValueError:
        try:
            when = parsedate_to_datetime(header)
        except ValueError:
            return None
        if when.tzinfo is None:
            when = when.replace(tzinfo=UTC)
        seconds = (when - datetime.now(UTC)).total_seconds()
    return None if math.isnan(seconds) else min(max(seconds, 0.0), LONGEST_S)
