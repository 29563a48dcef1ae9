"""The way of a request from its bytes to the engine and of the answer back: key, limits, body, queue, engine, text."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, TypeVar

from fastapi import Request
from fastapi.responses import Response
from pydantic import ValidationError
from pydantic_core import to_json

from shared.contracts import Completion, GenerationRequest
from shared.engines import Engine, pieces
from shared.errors import DistillError, TeacherUnavailable
from shared.http.keys import Key, Keys
from shared.http.limits import Counts, QueueFull, Slots
from shared.http.metrics import Meters
from shared.http.problems import Refused, error_answer, problem, problem_body, reason_of, wrong_body
from shared.http.streaming import ClientLeft, Events, Words, while_connected
from shared.http.wire import CallBody, ChatBody, CompletionBody, chat_completion, new_id, text_completion, usage

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Bounds:
    """What one request may be, and how many at a time."""

    max_body_bytes: int = 1 << 20
    max_prompt_characters: int = 100_000
    """Over all turns of a chat."""
    max_n: int = 64
    max_tokens: int = 4096
    body_s: float = 30.0
    """Seconds in which a body must have come."""
    max_unread_bytes: int = 256 << 20
    """Of all bodies together that have begun to come and are not complete."""
    stream_s: float = 600.0
    """Seconds that a streamed answer may take in all: who reads slowly holds a place at the engine."""
    max_in_flight: int = 1024
    """Requests at the engine; others wait."""
    max_queue: int = 1024
    """Requests that wait; others are refused."""
    queue_s: float = 60.0
    """Seconds that a request may wait."""

    @property
    def max_messages(self) -> int:
        """Turns of one chat: empty ones cost an engine as well."""
        return min(1000, self.max_body_bytes // 64)


class Chosen:
    """Who answers a request."""

    headers: tuple[tuple[bytes, bytes], ...] = ()
    """Told with the answer."""

    def __init__(self, engine: Engine, model: str) -> None:
        """`model`: its public name."""
        self.engine, self.model = engine, model

    def ended(self, status: int, engine_s: float) -> None:
        """Told when the request has ended: the status of its answer, and the seconds that the engine took."""


Choose = Callable[[str], AbstractContextManager[Chosen]]
"""Who answers to a public name, until the block ends. Raises Refused for one that nobody has, NotReady."""


class Asked(NamedTuple):
    """What one call asks the engine for."""

    requests: list[GenerationRequest]
    headers: tuple[tuple[bytes, bytes], ...] = ()
    """Told with the answer."""


BodyT = TypeVar("BodyT", bound=CallBody)


class Route(Generic[BodyT]):
    """One kind of call: its body, what the engine is asked for it, and how answers look, whole and in events."""

    body: type[BodyT]
    opens = False
    """Whether each choice of a stream begins with an event without text."""

    def asked(self, body: BodyT, chosen: Chosen, bounds: Bounds) -> Asked:
        """Raises Refused for what is out of bounds."""
        raise NotImplementedError

    def whole(self, chosen: Chosen, asked: Asked, answers: list[list[Completion]], *, with_usage: bool) -> bytes:
        """The body of the answer."""
        raise NotImplementedError

    def head(self, chosen: Chosen) -> dict[str, Any]:
        """What all events of a stream have in common."""
        raise NotImplementedError

    def event(self, head: dict[str, Any], index: int, text: str, finish_reason: str | None, *, first: bool) -> dict[str, Any]:
        """One event of a stream."""
        raise NotImplementedError


class Chat(Route[ChatBody]):
    """POST /v1/chat/completions."""

    body, opens = ChatBody, True

    def asked(self, body: ChatBody, chosen: Chosen, bounds: Bounds) -> Asked:
        if len(body.messages) > bounds.max_messages:
            raise Refused(422, "field", f"messages: at most {bounds.max_messages} turns here", param="messages")
        return Asked([body.request(bounds.max_tokens)])

    def whole(self, chosen: Chosen, asked: Asked, answers: list[list[Completion]], *, with_usage: bool) -> bytes:
        return chat_completion(chosen.model, answers[0], usage(asked.requests[0], answers[0]) if with_usage else None)

    def head(self, chosen: Chosen) -> dict[str, Any]:
        return _head("chatcmpl", "chat.completion.chunk", chosen.model)

    def event(self, head: dict[str, Any], index: int, text: str, finish_reason: str | None, *, first: bool) -> dict[str, Any]:
        delta = {"role": "assistant", "content": ""} if first else {} if finish_reason else {"content": text}
        return head | {"choices": [{"index": index, "delta": delta, "finish_reason": finish_reason}]}


class Complete(Route[CompletionBody]):
    """POST /v1/completions."""

    body = CompletionBody

    def asked(self, body: CompletionBody, chosen: Chosen, bounds: Bounds) -> Asked:
        return Asked([body.request(bounds.max_tokens)])

    def whole(self, chosen: Chosen, asked: Asked, answers: list[list[Completion]], *, with_usage: bool) -> bytes:
        return text_completion(chosen.model, answers[0], usage(asked.requests[0], answers[0]) if with_usage else None)

    def head(self, chosen: Chosen) -> dict[str, Any]:
        return _head("cmpl", "text_completion", chosen.model)

    def event(self, head: dict[str, Any], index: int, text: str, finish_reason: str | None, *, first: bool) -> dict[str, Any]:
        return head | {"choices": [{"index": index, "text": text, "finish_reason": finish_reason}]}


def _head(kind: str, name: str, model: str) -> dict[str, Any]:
    return {"id": new_id(kind), "object": name, "created": int(time.time()), "model": model}


@dataclass
class _Told:
    """What the log and the metrics tell of one request."""

    began: float
    route: str
    id: str = field(default_factory=lambda: new_id("req"))
    key: str | None = None
    stream: bool = False
    n: int = 0
    prompt_characters: int = 0
    completion_characters: int = 0
    body_s: float = 0.0
    queued: bool = False
    queue_s: float = 0.0
    engine_s: float = 0.0
    reason: str | None = None
    """Why it was refused or failed."""
    chosen: Chosen | None = None


class Face:
    """The way of a request from its bytes to the engine and of the answer back: key, limits, body, queue."""

    def __init__(self, choose: Choose, *, keys: Keys, counts: Counts, bounds: Bounds, meters: Meters, with_usage: bool) -> None:
        self._choose, self._keys, self._counts = choose, keys, counts
        self._bounds, self._meters, self._with_usage = bounds, meters, with_usage
        self._slots: Slots | None = None
        self._unread = 0
        """Bytes of bodies that are not complete."""

    def known(self, request: Request) -> Key:
        """Whose request this is. Raises Unauthorised, Forbidden."""
        return self._keys.known(_header(request, b"authorization"))

    async def answer(self, request: Request, route: Route[Any]) -> Response:
        """The response to one POST of this kind, errors included; tells the log and the metrics."""
        told = _Told(time.perf_counter(), request.scope["path"])
        try:
            response = await self._answer(request, route, told)
        except ClientLeft:
            told.reason = "client_left"
            response = Response(status_code=499)  # reaches nobody
        except asyncio.CancelledError:  # the server must end, and does this to what is still in flight
            told.reason = "shutting_down"
            response = problem(TeacherUnavailable("shutting down"))
        except DistillError as exc:
            told.reason = reason_of(exc)
            response = problem(exc, told.id)
        except Exception:
            log.exception("an error in this service, at request %s", told.id)
            told.reason = "error"
            response = error_answer(500, "an error in this service; its log tells which")
        response.raw_headers.append((b"x-request-id", told.id.encode()))
        if not isinstance(response, Events):
            self._tell(told, response.status_code)
        return response

    async def _answer(self, request: Request, route: Route[Any], told: _Told) -> Response:
        key = self.known(request)
        told.key = key.name
        self._counts.ask(key)
        asked_for = time.perf_counter()
        raw = await self._body(request)
        told.body_s = time.perf_counter() - asked_for
        try:
            body = route.body.model_validate_json(raw)
        except ValidationError as exc:
            raise wrong_body(exc.errors(include_url=False, include_context=False)[0]) from None
        with ExitStack() as held:
            chosen = told.chosen = held.enter_context(self._choose(body.model))
            asked = route.asked(body, chosen, self._bounds)
            self._check(request, body, asked, told)
            with while_connected(request.receive):
                if not body.stream:
                    response = await self._whole(key, route, chosen, asked, told)
                else:
                    events = self._events(key, route, chosen, asked, told, held.pop_all())
                    first = await anext(events)
                    response = Events(first, events, cut=CUT, most_s=self._bounds.stream_s, ended=lambda reason: self._ended(told, reason))
        response.raw_headers += [*chosen.headers, *asked.headers]
        return response

    def _ended(self, told: _Told, reason: str | None) -> None:
        told.reason = told.reason or reason
        self._tell(told, 200)

    async def _body(self, request: Request) -> bytes:
        """The bytes of a JSON body. Raises Refused for one that is of another kind, too large or too slow, QueueFull if too many come."""
        bounds = self._bounds
        most = refuse_unread(request, bounds.max_body_bytes)
        body = bytearray()
        try:
            async with asyncio.timeout(bounds.body_s):
                while True:
                    message = await request.receive()
                    if message["type"] == "http.disconnect":
                        raise ClientLeft
                    part = message.get("body", b"")
                    if len(body) + len(part) > bounds.max_body_bytes:
                        raise most
                    if not message.get("more_body", False):
                        return bytes(body + part) if body else part
                    body += part
                    self._unread += len(part)
                    if self._unread > bounds.max_unread_bytes:
                        raise QueueFull("too many large bodies are coming in; try again", retry_after_s=1.0)
        except TimeoutError:
            raise Refused(408, "body_too_slow", f"the body did not come within {bounds.body_s:g} s") from None
        finally:
            self._unread -= len(body)

    def _check(self, request: Request, body: CallBody, asked: Asked, told: _Told) -> None:
        """Raises Refused for what is out of bounds."""
        bounds, first = self._bounds, asked.requests[0]
        for name, value, most in (("n", first.n, bounds.max_n), ("max_tokens", first.sampling.max_tokens, bounds.max_tokens)):
            if value > most:
                raise Refused(422, "field", f"{name}: at most {most} here", param=name)
        if body.stream and request.scope.get("http_version") == "1.0":
            raise Refused(422, "field", "stream: HTTP/1.0 knows no answer of unknown length; use HTTP/1.1", param="stream")
        told.stream, told.n = bool(body.stream), sum(one.n for one in asked.requests)
        told.prompt_characters = sum(map(_characters, asked.requests))
        longest = max(_characters(one) for one in asked.requests)
        if longest > bounds.max_prompt_characters:
            message = f"the prompt has {longest} characters; at most {bounds.max_prompt_characters} are taken here"
            raise Refused(400, "prompt_too_long", message, param=body.asks_by, code="context_length_exceeded")

    async def _take(self, told: _Told) -> None:
        """Wait for a place at the engine. Raises QueueFull."""
        if self._slots is None:  # belongs to the event loop
            b = self._bounds
            self._slots = Slots(b.max_in_flight, b.max_queue, b.queue_s, tell=self._meters.queue.inc)
        began = time.perf_counter()
        told.queued = await self._slots.take()
        told.queue_s = time.perf_counter() - began

    def _give(self) -> None:
        assert self._slots is not None
        self._slots.give()

    async def _whole(self, key: Key, route: Route[Any], chosen: Chosen, asked: Asked, told: _Told) -> Response:
        lease = self._counts.hold(key, *asked.requests)
        try:
            await self._take(told)
            began = time.perf_counter()
            try:
                answers = await _all(chosen.engine, asked.requests)
            finally:
                told.engine_s = time.perf_counter() - began
                self._give()
            told.completion_characters = sum([len(c.text) for completions in answers for c in completions])
        finally:
            self._counts.settle(lease, told.completion_characters)
        return Response(route.whole(chosen, asked, answers, with_usage=self._with_usage), media_type="application/json")

    async def _events(
        self, key: Key, route: Route[Any], chosen: Chosen, asked: Asked, told: _Told, held: ExitStack
    ) -> AsyncGenerator[bytes, None]:
        """The events of a streamed answer; `held` is let go at its end.

        Raises what the engine raises before the first of them; later that is an event, the last.
        """
        head = route.head(chosen)
        begun = False

        def event(index: int, text: str, finish_reason: str | None = None, *, first: bool = False) -> bytes:
            nonlocal begun
            begun = True
            return _event(route.event(head, index, text, finish_reason, first=first))

        words: dict[int, Words] = {}
        with held:
            try:
                lease = self._counts.hold(key, *asked.requests)
                try:
                    await self._take(told)
                    stream = pieces(chosen.engine, asked.requests[0])
                    try:
                        while True:
                            began = time.perf_counter()
                            piece = await anext(stream, None)
                            told.engine_s += time.perf_counter() - began
                            if piece is None:
                                break
                            index, text, reason = piece
                            told.completion_characters += len(text)
                            said = []
                            if index not in words:
                                words[index] = Words()
                                if route.opens:
                                    said.append(event(index, "", first=True))
                            said += [event(index, word) for word in words[index].add(text)]
                            if reason:
                                if rest := words[index].rest():
                                    said.append(event(index, rest))
                                said.append(event(index, "", reason))
                            if said:
                                yield b"".join(said)
                    finally:
                        try:
                            await stream.aclose()
                        finally:
                            self._give()
                finally:
                    self._counts.settle(lease, told.completion_characters)
                yield b"data: [DONE]\n\n"
            except DistillError as exc:
                if not begun:
                    raise
                told.reason = reason_of(exc)
                yield _event(problem_body(exc, told.id))
            except Exception as exc:  # nobody foresaw it; the stream ends as one that failed, and the log gets no text
                if not begun:
                    raise
                log.error("an error in this service: %s", type(exc).__name__, extra={"fields": {"id": told.id}})
                told.reason = "error"
                yield _event(problem_body(DistillError("an error in this service"), told.id))

    def _tell(self, told: _Told, status: int) -> None:
        seconds = time.perf_counter() - told.began
        own_s = seconds - told.body_s - told.queue_s - told.engine_s
        meters = self._meters
        if told.reason is not None:
            meters.refused(told.reason)
        if told.chosen is not None:
            told.chosen.ended(status, told.engine_s)
        if told.engine_s:  # it was asked
            meters.engine_s.observe(told.engine_s)
            if told.queued:
                meters.queue_s.observe(told.queue_s)
            if not told.stream:  # else the caller's reading would count as ours
                meters.own_s.observe(own_s)
            meters.prompt.inc(told.prompt_characters)
            meters.completion.inc(told.completion_characters)
        if log.isEnabledFor(logging.INFO):
            fields = {
                "id": told.id,
                "route": told.route,
                "key": told.key,
                "status": status,
                "reason": told.reason,
                "stream": told.stream,
                "n": told.n,
                "prompt_characters": told.prompt_characters,
                "completion_characters": told.completion_characters,
                "seconds": round(seconds, 4),
                "engine_seconds": round(told.engine_s, 4),
                "queue_seconds": round(told.queue_s, 4),
            }
            log.info("request", extra={"fields": fields})


def _characters(request: GenerationRequest) -> int:
    """Of its prompt, over all turns."""
    return len(request.prompt) if request.prompt is not None else sum(len(m.content) for m in request.messages or ())


async def _all(engine: Engine, requests: list[GenerationRequest]) -> list[list[Completion]]:
    """The completions of each request. Raises the first error that comes, and lets the others go then."""
    if len(requests) == 1:
        return [await engine.generate(requests[0])]
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(engine.generate(request)) for request in requests]
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]


def _header(request: Request, name: bytes) -> str | None:
    """The first header of this name; Starlette's own mapping decodes all of them for each question."""
    for key, value in request.scope["headers"]:
        if key == name:
            return str(value, "latin-1")
    return None


def refuse_unread(request: Request, limit: int) -> Refused:
    """Raises Refused for a body whose headers say that it is no JSON or too large; returns the error for one that turns out to be."""
    kind, _, parameters = (_header(request, b"content-type") or "").partition(";")
    charset = parameters.strip().lower().removeprefix("charset=").strip('"')
    if kind.strip().lower() != "application/json" or charset not in ("", "utf-8", "utf8"):
        raise Refused(415, "content_type", "send JSON in UTF-8, with the header content-type: application/json")
    if (_header(request, b"content-encoding") or "identity").lower() != "identity":
        raise Refused(415, "content_encoding", "send the body as it is: compressed ones are not taken")
    too_large = Refused(413, "body_too_large", f"the body is larger than {limit} bytes, the most that is taken here")
    length = _header(request, b"content-length") or ""
    if length.isdigit() and int(length) > limit:
        raise too_large
    return too_large


def _event(content: Any) -> bytes:
    text = bytes(to_json(content))
    return b"data: " + text + b"\n\n"


CUT = _event({"error": {"message": "this service is shutting down; try again", "type": "server_error", "param": None, "code": None}})
"""The last event of a stream that a server cuts because it must end."""
