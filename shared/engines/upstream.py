"""The engine behind other OpenAI-compatible servers, whose own words never reach the caller.

A request goes to the server that is answering fewest. One that cannot be reached, or that fails whoever asks, is set aside, and asked now
and then whether it is back; while all are, each request tries one of them all the same. A request is sent a second time only if the
connection failed before the head of an answer had come.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import re
import time
import traceback
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from itertools import count
from typing import Any, Literal

import aiohttp
from pydantic_core import from_json, to_json
from yarl import URL

from shared.contracts import Completion, FinishReason, GenerationRequest
from shared.engines import Piece
from shared.errors import RequestRefused, TeacherBusy, TeacherFailed, TeacherLate, TeacherRejected, TeacherUnavailable
from shared.http.client import headers_with, is_loopback, parsed_url, retry_after

CONNECT_S = 5.0
"""Seconds in which a server must take the connection."""
PROBE_S = 2.0
"""Seconds between two questions to a server that was set aside, and for each of their answers."""
END_S = 0.5
"""Seconds in which the end of a stream must follow its last event."""
MOST_PAUSE_S = 60.0
"""Seconds for which a server that asks for a pause is spared at most, while there are others."""
KEPT_S = 0.5
"""Seconds for which what a check has found holds: anybody may ask for it, without a key."""
MOST_BYTES = 64 << 20
"""Of one answer: more is not read."""
CHARACTERS_A_TOKEN = 3
"""What a model's limit comes to in characters of English, rather too few. One figure for all texts: it does not tell how they are cut."""
QUOTED = 300
"""Characters of a server's own words that the log gets, at DEBUG."""
_TOO_LONG = re.compile(
    r"context_length_exceeded|maximum (context|model) length|max_model_len|context (length|window)|too (long|many tokens)", re.I
)
_FINISH: dict[Any, FinishReason] = {"stop": "stop", "length": "length"}

log = logging.getLogger(__name__)


class Server:
    """One upstream server."""

    def __init__(self, url: str, *, api_key: str | None) -> None:
        """Raises SettingsError for what is no http(s) URL and for a key that no header can hold."""
        self.base = parsed_url(url)
        self.urls = {path: URL(f"{self.base}/{path}") for path in ("chat/completions", "completions", "models")}
        self._headers = headers_with(api_key) | {"content-type": "application/json", "accept-encoding": "identity"}
        self._session: aiohttp.ClientSession | None = None
        self.in_flight = 0
        self.aside = False
        """It could not be reached last time, or could not answer anybody."""
        self.busy_until = 0.0
        """By the loop's clock: it has asked for a pause until then."""
        self.reads_characters: int | None = None
        """About how much its model can read and write together; None while it has not said."""

    @property
    def session(self) -> aiohttp.ClientSession:
        if self._session is None:  # belongs to the event loop
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=4.0),  # uvicorn and others hang up after 5 s
                headers=self._headers,
                cookie_jar=aiohttp.DummyCookieJar(),  # what one request is given is none of the next one's affair
                trust_env=not is_loopback(self.base.host),
                read_bufsize=1 << 20,
            )
        return self._session

    async def aclose(self) -> None:
        if self._session is not None:
            await self._session.close()

    def set_aside(self, why: str) -> None:
        if not self.aside:
            log.warning("upstream %s is set aside: %s", self.base, why)
        self.aside = True

    def take_back(self) -> None:
        if self.aside:
            log.warning("upstream %s is back", self.base)
        self.aside = False

    async def check(self, timeout_s: float) -> None:
        """Return if it lists its models. Raises TeacherUnavailable, TeacherRejected."""
        try:
            async with asyncio.timeout(timeout_s), self.session.get(self.urls["models"], allow_redirects=False) as response:
                raw = await _read(response, str(self.base))
                if response.status < 500:
                    self.take_back()  # it answers; what of, not every server can list
                if response.status != 200:
                    raise _error_of(response, raw, self)
                listed = from_json(raw)
        except TimeoutError:
            self.set_aside(f"no answer within {timeout_s:g} s")
            raise TeacherLate(f"{self.base}: no answer within {timeout_s:g} s") from None
        except (aiohttp.ClientError, OSError) as exc:
            self.set_aside(_kind(exc))
            raise TeacherUnavailable(f"{self.base}: {_kind(exc)}") from None
        except ValueError as exc:
            raise TeacherRejected(f"{self.base}/models answered no JSON; is the URL right? It should end in /v1") from exc
        with contextlib.suppress(KeyError, IndexError, TypeError):  # vLLM says so; others need not
            self.reads_characters = int(listed["data"][0]["max_model_len"]) * CHARACTERS_A_TOKEN


class UpstreamEngine:
    """An `Engine`, and a streaming one, over several servers of one model. Belongs to the event loop that first asks it."""

    def __init__(self, urls: Sequence[str], *, model: str, api_key: str | None = None, timeout_s: float = 120.0) -> None:
        """`urls`: base URLs with their /v1; `timeout_s`: for one whole answer, or for the next piece of a streamed one.

        Raises SettingsError.
        """
        self.servers = [Server(url, api_key=api_key) for url in urls]
        self._model, self._timeout_s = model, timeout_s
        # a whole answer is bounded as one, a streamed one piece by piece
        self._patience = {
            stream: aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S, sock_read=timeout_s if stream else None)
            for stream in (False, True)
        }
        self._turn = count()
        self._checking, self._checked_until = asyncio.Lock(), 0.0
        self._amiss: BaseException | None = None

    async def generate(self, request: GenerationRequest) -> list[Completion]:
        """`request.n` completions; a server that ignores n gives fewer. Raises as `Engine.generate` does."""
        try:
            async with asyncio.timeout(self._timeout_s):
                server, response = await self._ask(request, stream=False)
                try:
                    raw = await _read(response, str(server.base))
                finally:
                    _leave(server, response)
        except TimeoutError:
            raise TeacherLate(f"no answer within {self._timeout_s:g} s") from None
        return _completions(raw, request, server)

    async def stream(self, request: GenerationRequest) -> AsyncGenerator[Piece, None]:
        """The completions in pieces, as the server sends them. Raises as `generate` does, before or between them."""
        try:
            async with asyncio.timeout(self._timeout_s):
                server, response = await self._ask(request, stream=True)
        except TimeoutError:
            raise TeacherLate(f"no answer within {self._timeout_s:g} s") from None
        try:
            if response.content_type != "text/event-stream":  # it does not stream
                for choice, completion in enumerate(_completions(await _read(response, str(server.base)), request, server)):
                    yield Piece(choice, completion.text, completion.finish_reason)
                return
            begun, ended, otherwise = set[int](), set[int](), False
            clock = asyncio.get_running_loop()
            until = clock.time() + self._timeout_s
            while True:
                try:
                    async with asyncio.timeout_at(until):  # comments and empty pieces keep a connection alive, and say nothing
                        line = await response.content.readline()
                except TimeoutError:
                    raise TeacherLate(f"{server.base}: nothing within {self._timeout_s:g} s") from None
                except (aiohttp.ClientError, OSError, ValueError) as exc:
                    raise TeacherFailed(f"{server.base}: the stream broke: {_kind(exc)}") from None
                if not line:
                    if len(ended) == request.n:  # all is said
                        break
                    raise TeacherFailed(f"{server.base}: the stream ended before the answer did")
                data = line.strip().removeprefix(b"data:").strip()
                if not line.startswith(b"data:") or not data:
                    continue
                if data == b"[DONE]":
                    with contextlib.suppress(TimeoutError, aiohttp.ClientError, OSError):  # read to its end, the connection serves again
                        async with asyncio.timeout(END_S):
                            await response.content.read()
                    break
                for piece in _pieces(data, request, server):
                    if piece is None:
                        otherwise = True
                    elif piece.choice in ended or not 0 <= piece.choice < request.n:
                        continue
                    else:
                        begun.add(piece.choice)
                        if piece.finish_reason:
                            ended.add(piece.choice)
                        yield piece
                        until = clock.time() + self._timeout_s
            if begun > ended or not begun:
                if otherwise:
                    raise _ended_otherwise(server)
                raise TeacherFailed(f"{server.base}: the stream ended before the answer did")
        finally:
            _leave(server, response)

    async def check(self) -> None:
        """Return if one of the servers lists its models. Raises TeacherUnavailable, TeacherRejected."""
        async with self._checking:
            if time.monotonic() >= self._checked_until:
                results = await asyncio.gather(*(server.check(2 * PROBE_S) for server in self.servers), return_exceptions=True)
                self._amiss = None if None in results else next(result for result in results if isinstance(result, BaseException))
                self._checked_until = time.monotonic() + KEPT_S
            if self._amiss is not None:
                raise self._amiss

    async def aclose(self) -> None:
        for server in self.servers:
            await server.aclose()

    @contextlib.asynccontextmanager
    async def probing(self) -> AsyncIterator[None]:
        """Beside the block, ask the servers that were set aside whether they are back."""
        task = asyncio.create_task(self._probe())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.wait([task])

    async def _probe(self) -> None:
        while True:
            await asyncio.sleep(PROBE_S)
            # what went wrong is told where it is set aside
            await asyncio.gather(*(server.check(PROBE_S) for server in self.servers if server.aside), return_exceptions=True)

    async def _ask(self, request: GenerationRequest, *, stream: bool) -> tuple[Server, aiohttp.ClientResponse]:
        """The answer of one server, of status 200 and not yet read; both to be left. Raises as `generate` does."""
        path, body = _body(request, self._model, stream=stream)
        tried: list[Server] = []
        while True:
            server = self._choose(tried)
            tried.append(server)
            server.in_flight += 1
            try:
                response = await server.session.post(server.urls[path], data=body, allow_redirects=False, timeout=self._patience[stream])
            except (aiohttp.ClientError, OSError) as exc:
                server.in_flight -= 1
                traceback.clear_frames(exc.__traceback__)  # aiohttp's refer to it, and hold the body, until Python looks for such rings
                if isinstance(exc, TimeoutError) and not isinstance(exc, aiohttp.ConnectionTimeoutError):
                    raise TeacherLate(f"{server.base}: no answer within {self._timeout_s:g} s") from None
                if not isinstance(exc, (OSError, aiohttp.ServerDisconnectedError)):  # something came, and was no HTTP
                    raise TeacherFailed(f"{server.base}: {_kind(exc)}") from None
                if getattr(exc, "errno", None) not in (errno.EMFILE, errno.ENFILE):  # it is our own files that are used up
                    server.set_aside(_kind(exc))
                if len(tried) > 1:
                    raise TeacherUnavailable(f"{server.base}: {_kind(exc)}") from None
                continue
            except BaseException:
                server.in_flight -= 1
                raise
            if response.status == 200:
                server.take_back()
                return server, response
            try:
                raw = await _read(response, str(server.base))
                if response.status == 429:
                    wait = min(retry_after(response.headers.get("retry-after")) or 1.0, MOST_PAUSE_S)
                    server.busy_until = asyncio.get_running_loop().time() + wait
                elif response.status >= 500 or response.status in (401, 403, 404):  # whoever asks it now fares alike
                    server.set_aside(f"HTTP {response.status}")
                raise await self._refusal(response, raw, request, server)
            finally:
                _leave(server, response)

    def _choose(self, tried: Sequence[Server]) -> Server:
        """The server that is answering fewest, of those not tried yet, not set aside and not pausing if there are any."""
        turn = next(self._turn)
        order = [self.servers[(turn + i) % len(self.servers)] for i in range(len(self.servers))]  # equals take turns
        now = asyncio.get_running_loop().time()
        return min(order, key=lambda s: (s in tried, s.aside, s.busy_until > now, s.in_flight))

    async def _refusal(self, response: aiohttp.ClientResponse, raw: bytes, request: GenerationRequest, server: Server) -> Exception:
        """What an answer of another status than 200 means."""
        if response.status not in (400, 413, 422):
            return _error_of(response, raw, server)
        # what the server says names itself, its address and its limits, and may quote the prompt: none of it may pass, nor be logged
        if not _TOO_LONG.search(raw.decode(errors="replace")):
            return RequestRefused("the model refused this request")
        if server.reads_characters is None:
            with contextlib.suppress(TeacherUnavailable, TeacherRejected):
                await server.check(PROBE_S)
        characters = len(request.prompt or "") + sum(len(m.content) for m in request.messages or ())
        answer = request.sampling.max_tokens * CHARACTERS_A_TOKEN
        most = server.reads_characters and _rounded(max(0, server.reads_characters - answer))
        room = "" if most is None else f"; beside such an answer about {most} of English text fit"
        return RequestRefused(
            f"the prompt ({characters} characters) with an answer of max_tokens {request.sampling.max_tokens} is too long for this "
            f"model{room}: shorten it, or lower max_tokens",
            kind="too_long",
        )


def _rounded(number: int) -> int:
    """Down to two digits: a caller needs no more, and shall not compute the engine's own limit from it."""
    digits = max(0, len(str(number)) - 2)
    step = int(10**digits)
    return number // step * step


def _body(request: GenerationRequest, model: str, *, stream: bool) -> tuple[Literal["chat/completions", "completions"], bytes]:
    """Where to and what: made anew of the standard fields, with nothing of the caller's own body in it."""
    sampling = request.sampling
    body: dict[str, Any] = {
        "model": model,
        "n": request.n,
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
    }
    if sampling.stop:
        body["stop"] = sampling.stop
    if sampling.seed is not None:
        body["seed"] = sampling.seed
    if stream:
        body["stream"] = True
    if request.messages is not None:
        body["messages"] = [{"role": m.role, "content": m.content} for m in request.messages]
        return "chat/completions", to_json(body)
    body["prompt"] = request.prompt
    return "completions", to_json(body)


def _kind(exc: BaseException) -> str:
    """What went wrong, in no words of the other end, and without what was sent to it: aiohttp's own words hold headers, and so the key."""
    said = getattr(exc, "strerror", None)
    return f"{type(exc).__name__}: {said}" if isinstance(said, str) else type(exc).__name__


def _leave(server: Server, response: aiohttp.ClientResponse) -> None:
    """Done with this answer; one that was not read to its end is not wanted any more, and its connection is closed."""
    server.in_flight -= 1
    if response.content.at_eof():
        response.release()
    else:
        response.close()


async def _read(response: aiohttp.ClientResponse, url: str) -> bytes:
    """The rest of an answer. Raises TeacherFailed if it breaks off or never ends."""
    parts, size = [], 0
    try:
        async for part in response.content.iter_any():
            parts.append(part)
            if (size := size + len(part)) > MOST_BYTES:
                response.close()
                raise TeacherFailed(f"{url}: an answer of more than {MOST_BYTES} bytes")
    except TimeoutError:
        raise TeacherLate(f"{url}: the answer did not go on") from None
    except (aiohttp.ClientError, OSError) as exc:
        raise TeacherFailed(f"{url}: the answer broke off: {_kind(exc)}") from None
    return b"".join(parts)


def _completions(raw: bytes, request: GenerationRequest, server: Server) -> list[Completion]:
    """At most `request.n` completions.

    Raises TeacherFailed for no JSON, TeacherRejected for another shape, RequestRefused if none ended by a stop or at its length.
    """
    try:
        answer = from_json(raw)
    except ValueError as exc:
        raise TeacherFailed(f"{server.base}: 200, but no JSON") from exc
    found: list[Completion] = []
    try:
        choices = answer["choices"]
        if not choices:
            raise TeacherFailed(f"{server.base}: 200, but no choices")
        for choice in sorted(choices, key=lambda c: c.get("index", 0))[: request.n]:
            text = choice["message"]["content"] if request.messages is not None else choice["text"]
            if reason := _FINISH.get(choice["finish_reason"]):
                found.append(Completion(text=text or "", finish_reason=reason))
    except (AttributeError, KeyError, IndexError, TypeError, ValueError) as exc:
        raise TeacherRejected(f"{server.base}: an answer without text; is this an OpenAI-compatible server?") from exc
    if not found:
        raise _ended_otherwise(server)
    return found


def _pieces(data: bytes, request: GenerationRequest, server: Server) -> list[Piece | None]:
    """The pieces in one event; None stands for a completion that ended in another way than by a stop or at its length."""
    try:
        event = from_json(data)
    except ValueError as exc:
        raise TeacherFailed(f"{server.base}: an event that is no JSON") from exc
    if isinstance(event, dict) and event.get("error"):
        raise TeacherFailed(f"{server.base}: an error in the stream")
    try:
        found: list[Piece | None] = []
        for choice in event["choices"]:
            text = (choice["delta"].get("content") if request.messages is not None else choice["text"]) or ""
            reason = choice.get("finish_reason")
            if not isinstance(text, str) or not isinstance(choice["index"], int):
                raise TypeError
            if reason and reason not in _FINISH:
                found.append(None)
            elif text or reason:
                found.append(Piece(choice["index"], text, _FINISH.get(reason)))
    except (KeyError, TypeError, AttributeError) as exc:
        raise TeacherRejected(f"{server.base}: an event without text; is this an OpenAI-compatible server?") from exc
    return found


def _ended_otherwise(server: Server) -> RequestRefused:
    log.info("upstream %s: an answer that ended neither by a stop nor at its length", server.base)
    return RequestRefused("the model ended its answer in another way than by a stop or at its length")


def _error_of(response: aiohttp.ClientResponse, raw: bytes, server: Server) -> Exception:
    """What an answer of another status than 200 means that is not about the request."""
    status = response.status
    said = f"{server.base}: HTTP {status}"
    log.debug("%s: %s", said, raw[:QUOTED].decode(errors="replace"))  # it may quote the prompt
    wait = retry_after(response.headers.get("retry-after"))
    if status == 429:
        return TeacherBusy(said, retry_after_s=wait)
    if status in (408, 503):
        return TeacherUnavailable(said, retry_after_s=wait)
    if status == 504:
        return TeacherLate(said)
    if status >= 500:
        return TeacherFailed(said)
    return TeacherRejected(said)
