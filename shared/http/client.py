"""Clients of teachers over HTTP: one exchange with errors by class, and the OpenAI-compatible protocol on top of it."""

from __future__ import annotations

import asyncio
import json
import math
import resource
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from ipaddress import ip_address
from typing import Any, Literal

import aiohttp
import httpx
from aiohttp.connector import Connection
from httpx_aiohttp import AiohttpTransport
from pydantic_core import PydanticSerializationError, to_json

from shared.contracts import Completion, GenerationRequest
from shared.errors import (
    NotTheApi,
    RequestForbidden,
    RequestRefused,
    SettingsError,
    TeacherBusy,
    TeacherError,
    TeacherFailed,
    TeacherLate,
    TeacherRejected,
    TeacherUnavailable,
)
from shared.harvest.teacher import Answer, Refusal, Teacher
from shared.settings import TeacherSettings, read_secret

LONGEST_S = 7 * 86_400.0
"""What is made of a Retry-After that says never."""
CONNECTIONS = 1024
"""More than any harvest has in flight: the caller bounds concurrency, not the connection pool."""
MOST_TOKENS = 10**9
"""Of one answer: a larger count makes no sense."""
SPARE_FILES = 64
"""Open files that are not connections."""
SHOWN = 200
"""Characters of a foreign answer that an error quotes."""
MAX_BODY_BYTES = 16 * 2**20
"""Of an answer, decompressed: what is longer is no text anybody has asked for."""
SPENT = ("insufficient_quota", "billing_hard_limit_reached", "credit_balance_too_low")
"""Codes of a 429 that no waiting helps against."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back, whole."""

    status: int
    headers: httpx.Headers
    body: bytes


@dataclass(frozen=True, slots=True)
class Named:
    """What a user gives URL and key by, for messages."""

    url: str = "teacher URL"
    key: str = "teacher.api_key_file, DISTILL_TEACHER__API_KEY"


class _WithoutReason(aiohttp.ClientResponse):
    """The words behind a status may be of any bytes, and httpx_aiohttp fails at those that are no UTF-8; nobody reads them."""

    async def start(self, connection: Connection) -> aiohttp.ClientResponse:
        await super().start(connection)
        self.reason = None
        return self


class Exchange:
    """One HTTP request and its whole answer, with errors by what can be done about them.

    Proxy variables of the environment are heeded, but not for loopback URLs.
    """

    def __init__(
        self,
        base_url: str,
        *,
        headers: Mapping[str, str],
        timeout_s: float,
        secrets: Sequence[str] = (),
        named: Named = Named(),
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        """`timeout_s`: seconds for one whole exchange; `secrets`: what must not be quoted; `named`: for messages; `transport` is what tests
        replace.

        Raises SettingsError for what is no http(s) URL.
        """
        self.base = parsed_url(base_url, named.url)
        self._headers = {"accept": "application/json", "accept-encoding": "identity", "content-type": "application/json", **headers}
        self._timeout_s, self._named, self._secrets = timeout_s, named, [secret for secret in secrets if secret]
        # aiohttp below httpx: plain httpx slows down with many connections (encode/httpx issue 3215). The transport and not a client
        # on top of it: that one merges URLs, headers and cookies anew for each request, a quarter of the whole cost
        self._transport = transport or AiohttpTransport(client=self._session)

    def _session(self) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            # a context takes 50 ms to make
            connector=aiohttp.TCPConnector(limit=CONNECTIONS, ssl=httpx.create_ssl_context() if self.base.scheme == "https" else False),
            cookie_jar=aiohttp.DummyCookieJar(),
            response_class=_WithoutReason,
            trust_env=not is_loopback(self.base.host),
        )

    async def send(self, method: str, url: httpx.URL, content: bytes) -> Reply:
        """Raises TeacherUnavailable where nobody was reached, TeacherLate, TeacherFailed for an answer that broke off, and
        TeacherRejected for a certificate that is not trusted.
        """
        request = httpx.Request(method, url, headers=self._headers, content=content)
        try:
            async with asyncio.timeout(self._timeout_s):
                response = await self._transport.handle_async_request(request)
                try:
                    body = await self._read(response, str(url))
                finally:
                    await response.aclose()
        except TimeoutError as exc:
            raise TeacherLate(f"{url}: no answer within {self._timeout_s:g} s", maybe_billed=True) from exc
        except (httpx.TransportError, httpx.DecodingError, aiohttp.ClientError) as exc:
            raise _failure(str(url), exc) from exc
        return Reply(response.status_code, response.headers, body)

    async def _read(self, response: httpx.Response, url: str) -> bytes:
        pieces, size = [], 0
        # some compress what they were asked not to
        stream = response.aiter_bytes() if "content-encoding" in response.headers else response.stream
        async for piece in stream:  # type: ignore[union-attr]
            size += len(piece)
            if size > MAX_BODY_BYTES:
                raise RequestRefused(
                    f"{url}: an answer of more than {MAX_BODY_BYTES} bytes; it was not read to its end", kind="over_long", maybe_billed=True
                )
            pieces.append(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def judge(self, reply: Reply, url: httpx.URL, *, remedy: str) -> None:
        """Return for a status of 2xx; raise what any other one means. `remedy`: what to look at if this is not the API at all."""
        status = reply.status
        if 200 <= status < 300:
            return
        message = f"{url}: HTTP {status}: {self.quote(reply.body)}"
        if status == 429 and any(code.encode() in reply.body for code in SPENT):
            raise TeacherRejected(f"{message}; the account has no credit left: waiting does not help")
        wait = retry_after(reply.headers.get("retry-after"), reply.headers.get("date"))
        if status == 429:
            raise TeacherBusy(message, retry_after_s=wait)
        if status == 408:
            raise TeacherLate(message, retry_after_s=wait)
        if status >= 500:
            raise TeacherFailed(message, retry_after_s=wait)
        if status in (400, 413, 422):
            too_long = status == 413 or b"context_length_exceeded" in reply.body
            raise RequestRefused(
                message, kind="too_long" if too_long else "content_filter" if b"content_filter" in reply.body else "refused"
            )
        if status == 401:
            raise TeacherRejected(f"{message}; give the API key this server wants ({self._named.key})")
        if status == 403:
            raise RequestForbidden(
                f"{message}; if it says so to every request, give the API key this server wants ({self._named.key})",
                kind="content_filter" if b"content_filter" in reply.body else "refused",
            )
        if status == 402:
            raise TeacherRejected(f"{message}; the account must pay first")
        raise NotTheApi(f"{message}; {'the server is somewhere else; give its own URL' if 300 <= status < 400 else remedy}")

    def json(self, reply: Reply, url: httpx.URL, *, remedy: str) -> Any:
        """The parsed body of an answer, whatever charset its header names: JSON says its own. Raises NotTheApi."""
        try:
            return json.loads(reply.body)
        except (ValueError, RecursionError) as exc:
            kind = reply.headers.get("content-type", "no content type").partition(";")[0]
            raise NotTheApi(f"{url} answered {kind}, not JSON: {self.quote(reply.body)}; {remedy}") from exc

    def quote(self, said: bytes | str) -> str:
        """The beginning of a foreign answer, on one line; a server may repeat the key it refuses."""
        text = said if isinstance(said, str) else said[: 64 * SHOWN].decode(errors="replace")
        text = " ".join(text.split())
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text[:SHOWN] + ("..." if len(text) > SHOWN else "") or "(nothing)"

    def rendered(self, method: str, url: httpx.URL, body: Any) -> str:
        """A request for a person to read; headers by name, since some are secrets."""
        shown = json.dumps(body, indent=2, ensure_ascii=False)
        for secret in self._secrets:
            shown = shown.replace(secret, "***")
        return f"{method} {url}\nheaders: {', '.join(sorted(self._headers))}\n{shown}"

    async def aclose(self) -> None:
        await self._transport.aclose()


def encoded(body: Any, what: str) -> bytes:
    """A request's body. Raises RequestRefused for text that is none, such as half a surrogate pair."""
    try:
        return to_json(body)
    except (PydanticSerializationError, UnicodeError) as exc:
        raise RequestRefused(f"{what}: the prompt cannot be sent as JSON: {exc}") from exc


def _failure(url: str, exc: Exception) -> TeacherError:
    """What a failed exchange was. The transport's own classes say too little: a connection cut in mid-answer is a ConnectTimeout there."""
    cause = exc.__cause__ if isinstance(exc.__cause__, aiohttp.ClientError) else exc
    message = f"{url}: {str(cause) or type(cause).__name__}"
    if isinstance(cause, (aiohttp.ClientConnectorCertificateError, aiohttp.ClientConnectorSSLError)):
        return TeacherRejected(
            f"{message}; the server's certificate is not trusted here, or it speaks no TLS: mend the URL or the certificate "
            "(SSL_CERT_FILE names a file with your own authority)"
        )
    if isinstance(cause, aiohttp.ClientConnectorError):
        return TeacherUnavailable(f"{url}: cannot connect: {cause.os_error}")
    if isinstance(cause, httpx.ConnectError):
        return TeacherUnavailable(message)
    return TeacherFailed(message, maybe_billed=True)


class OpenAITeacher:
    """A `Teacher` over `POST BASE_URL/chat/completions` or `/completions`.

    Sends the standard fields alone. A server that ignores `n` gives fewer choices than asked for: they are returned as they came,
    and the caller asks again for the rest.
    """

    most_choices: int | None = None
    """Choices a request may ask for; None: as many as one likes."""

    def __init__(
        self,
        base_url: str,
        *,
        model: str,
        protocol: Literal["chat", "completions"] = "chat",
        api_key: str | None = None,
        timeout_s: float = 120.0,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        """`timeout_s`: seconds for one whole attempt; `transport` is what tests replace.

        Raises SettingsError for what is no http(s) URL and for a key that no header can hold.
        """
        self._exchange = Exchange(
            base_url, headers=headers_with(api_key), timeout_s=timeout_s, secrets=[api_key or ""], transport=transport
        )
        self._model, self._protocol = model, protocol
        self._url = httpx.URL(f"{self._exchange.base}/{'chat/completions' if protocol == 'chat' else 'completions'}")
        self._remedy = f"does the URL end in /v1, is it an OpenAI-compatible server, and does it know the model {model!r}?"

    async def ask(self, request: GenerationRequest) -> Answer:
        """One attempt; the choices in the order of their index. Raises as `Teacher.ask` says."""
        reply = await self._exchange.send("POST", self._url, encoded(self._body(request), self._model))
        self._exchange.judge(reply, self._url, remedy=self._remedy)
        answer = self._exchange.json(reply, self._url, remedy=self._remedy)
        choices = answer.get("choices") if isinstance(answer, dict) else None
        if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
            said = self._exchange.quote(reply.body)
            raise NotTheApi(f"{self._url} answered JSON without a list of choices: {said}; {self._remedy}")
        choices.sort(key=lambda choice: choice["index"] if isinstance(choice.get("index"), int) else 0)
        usage = answer.get("usage")
        return Answer(
            tuple([self._choice(choice) for choice in choices[: request.n]]),
            input_tokens=_count(usage, "prompt_tokens"),
            output_tokens=_count(usage, "completion_tokens"),
        )

    def rendered(self, request: GenerationRequest) -> str:
        return self._exchange.rendered("POST", self._url, self._body(request))

    async def aclose(self) -> None:
        await self._exchange.aclose()

    def _body(self, request: GenerationRequest) -> dict[str, Any]:
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
            body["messages"] = [{"role": message.role, "content": message.content} for message in request.messages]
        else:
            if request.prompt is None:
                raise RequestRefused("chat messages cannot be asked by the completions protocol: give a plain prompt")
            body["prompt"] = request.prompt
        return body

    def _choice(self, choice: dict[str, Any]) -> Completion | Refusal:
        said = choice.get("message") if self._protocol == "chat" else choice
        if not isinstance(said, dict):
            said = self._exchange.quote(str(choice))
            return Refusal("no_text", f"a choice without a message: {said}; is teacher.protocol {self._protocol} right?")
        text, reason = said.get("content" if self._protocol == "chat" else "text"), choice.get("finish_reason")
        if reason == "content_filter":
            return Refusal("content_filter", "the teacher's filter kept the answer back")
        if said.get("refusal"):
            return Refusal("refused", self._exchange.quote(str(said["refusal"])))
        # null content is how some servers say that nothing was generated
        if text is None and reason in ("stop", "length"):
            text = ""
        if not isinstance(text, str):
            return Refusal("no_text", f"an answer that is no text: {self._exchange.quote(str(choice))}")
        if reason not in ("stop", "length"):
            return Refusal("refused", f"an answer ended with finish_reason {reason!r}; only stop and length are answers")
        return Completion(text=text, finish_reason=reason)


def _count(usage: Any, field: str) -> int | None:
    """A number of tokens, if the teacher gives one that makes sense."""
    count = usage.get(field) if isinstance(usage, dict) else None
    return count if isinstance(count, int) and not isinstance(count, bool) and 0 <= count <= MOST_TOKENS else None


def teacher_of(settings: TeacherSettings, given: str | None) -> Teacher:
    """The client of a recipe's teacher. `given`: the URL at which a launched one is found today.

    Raises SettingsError where nobody has said where it answers, or for an unreadable key file.
    """
    url = settings.address(given)
    key = read_secret(settings.api_key, settings.api_key_file, "teacher.api_key")
    if settings.protocol == "custom":
        from shared.http.custom import CustomTeacher

        assert settings.custom is not None  # the settings refuse one without the other
        return CustomTeacher(url, settings.custom, model=settings.public_name, api_key=key, timeout_s=settings.timeout_s)
    return OpenAITeacher(url, model=settings.public_name, protocol=settings.protocol, api_key=key, timeout_s=settings.timeout_s)


def headers_with(api_key: str | None) -> dict[str, str]:
    headers = {"user-agent": "blackbox-distill"}
    if api_key is not None:
        if not api_key.isascii() or not api_key.isprintable():
            raise SettingsError("api_key: it may hold printable ASCII characters only")  # and must not be quoted
        headers["authorization"] = f"Bearer {api_key}"
    return headers


def parsed_url(text: str, named: str = "teacher URL") -> httpx.URL:
    try:
        url = httpx.URL(text.rstrip("/"))
    except httpx.InvalidURL as exc:
        raise SettingsError(f"{named} {text!r}: {exc}; expected one like http://127.0.0.1:8000/v1") from exc
    if url.scheme not in ("http", "https") or not url.host:
        raise SettingsError(f"{named} {text!r}: expected one like http://127.0.0.1:8000/v1")
    if url.userinfo:
        raise SettingsError(f"{named}: it holds a password; give the key by itself")
    return url


def refuse_too_many(requests: int, setting: str) -> None:
    """See to it that so many requests may be in flight: each holds a connection, which is an open file of this process.

    `setting`: what bounds them, for the message. Raises SettingsError where the hard limit of open files is too low for them.
    """
    needed = requests + SPARE_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise SettingsError(
            f"{setting} = {requests}: this process may have no more than {hard} files open, and that takes {needed}; lower {setting} to "
            f"{max(1, hard - SPARE_FILES)}, or raise the hard limit (ulimit -Hn, LimitNOFILE= of systemd, --ulimit nofile= of docker)"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed if hard == resource.RLIM_INFINITY else hard, hard))


def is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def retry_after(header: str | None, date: str | None = None) -> float | None:
    """Seconds to wait, from a Retry-After of seconds or of a date; None if there is none that makes sense.

    `date`: the answer's own Date, by the server's clock; without it a date is measured by this machine's.
    """
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
        seconds = (when - _server_time(date)).total_seconds()
    return None if math.isnan(seconds) else min(max(seconds, 0.0), LONGEST_S)


def _server_time(date: str | None) -> datetime:
    try:
        said = parsedate_to_datetime(date or "")
    except ValueError:
        return datetime.now(UTC)
    return said if said.tzinfo is not None else said.replace(tzinfo=UTC)
