"""Connections that cost a server nothing: silent ones are closed, endless headers are cut, and there is always room for the next."""

from __future__ import annotations

import asyncio
import re
import resource
from typing import TYPE_CHECKING, Any

from pydantic_core import to_json
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

if TYPE_CHECKING:
    from uvicorn._types import ASGI3Application

HEADERS_S = 10.0
"""Seconds in which a request's headers must have come, from the connection or from its first byte on; and the rest of a body that was
answered before it had come."""
HEADER_BYTES = 64 << 10
"""Most bytes of a request's line and headers."""
MOST_PIPELINED = 16
"""Requests that may wait on one connection for the answers to those before them."""
UNREAD_S = 60.0
"""Seconds after which a connection is cut whose other end has read nothing of what is to be sent."""
SPARE_FILES = 256
"""Open files that are not callers' connections."""
_UPGRADE = re.compile(rb"\r\n[Uu]pgrade:[^\r\n]*")


class BoundedProtocol(HttpToolsProtocol):
    """uvicorn's HTTP/1.1 protocol with bounds where it has none."""

    most = 0
    """Connections at a time; set by `bounded`."""

    _deadline: asyncio.TimerHandle | None = None
    _look: asyncio.TimerHandle | None = None
    _unsent = 0
    _in_head = True
    _head_bytes = 0
    """Bytes since the last of a body or the last end of a message: of headers, of trailers, of what frames chunks."""
    _brought = False
    """Some of a body was within the bytes that are being read."""
    _between = True
    """Nothing of a request has come since the last one."""
    _completed = False
    """A message has ended within the bytes that are being read."""
    _running: RequestResponseCycle | None = None
    """The request that is being answered."""
    _complaint = "this is no HTTP request"

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.most:
            transport.abort()
        else:
            self._start_clock()
            self._look = self.loop.call_later(UNREAD_S, self._cut_if_unread)

    def data_received(self, data: bytes) -> None:
        self._completed = False
        if self._in_head:
            if self._between and not data.strip(b"\r\n"):
                return  # some clients end a body with an empty line that is not counted
            if self._deadline is None:
                self._start_clock()
            if self._between:
                data = _without_upgrade(data)
        self._brought = False
        super().data_received(data)
        if not self._completed and not self._brought:
            self._head_bytes += len(data)
            if self._head_bytes > HEADER_BYTES:
                self._hang_up()

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_head:  # else it stands behind a body, and is none
            super().on_header(name, value)

    def on_body(self, body: bytes) -> None:
        self._brought, self._head_bytes = True, 0
        super().on_body(body)

    def on_headers_complete(self) -> None:
        self._in_head, self._head_bytes, self._brought = False, 0, True
        self._stop_clock()
        if sum(len(name) + len(value) for name, value in self.headers) + len(self.url) > HEADER_BYTES:
            self._complaint = f"the headers are larger than {HEADER_BYTES} bytes"
            raise ValueError(self._complaint)  # the parser gives up, and the next method answers
        if self.parser.should_upgrade():
            self._complaint = "this server speaks HTTP/1.1 and nothing else: leave the header Upgrade out"
            raise ValueError(self._complaint)
        super().on_headers_complete()
        if len(self.pipeline) > MOST_PIPELINED:
            self.transport.abort()

    def send_400_response(self, msg: str) -> None:
        if self._running is not None and not self._running.response_complete:
            self.transport.abort()  # the answer would pass for that of the request before
            return
        body = to_json({"error": {"message": self._complaint, "type": "invalid_request_error", "param": None, "code": None}})
        head = b"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n"
        self.transport.write(head % len(body) + body)
        self.transport.close()

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._in_head = self._between = self._completed = True
        self._head_bytes = 0
        self._stop_clock()
        if self.cycle.response_complete and not self.pipeline and self.timeout_keep_alive_task is None:
            # it was answered before its body had come; uvicorn has stopped its own clock since
            self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def on_message_begin(self) -> None:
        self._between = False
        super().on_message_begin()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self._in_head and self._deadline is None:
            self._start_clock()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._unsent = 0  # all was read meanwhile

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_clock()
        if self._look is not None:
            self._look.cancel()
        # uvicorn tells the last request alone, which of several is not the one that is being answered
        self.pipeline.clear()
        if self._running is not None and not self._running.response_complete:
            self._running.disconnected = True
            self._running.message_event.set()
        super().connection_lost(exc)

    def _start_clock(self) -> None:
        self._deadline = self.loop.call_later(HEADERS_S, self._hang_up)

    def _stop_clock(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _hang_up(self) -> None:
        if not self.transport.is_closing():
            self.transport.close()

    def _cut_if_unread(self) -> None:
        """A closed connection too waits for what is unsent, and for ever."""
        unsent = self.transport.get_write_buffer_size()
        if unsent and unsent == self._unsent:
            self.transport.abort()
            return
        self._unsent = unsent
        self._look = self.loop.call_later(UNREAD_S, self._cut_if_unread)


def _without_upgrade(data: bytes) -> bytes:
    """The beginning of a request without an offer to speak another protocol, which is to be ignored: the parser would read no body then.

    Some clients (Java's) make it with every first request.
    """
    if b"pgrade:" not in data:
        return data
    head, end, rest = data.partition(b"\r\n\r\n")
    return _UPGRADE.sub(b"", head) + end + rest


def bounded(spare: int) -> type[BoundedProtocol]:
    """The protocol, for as many connections as this process may hold, which takes all the open files that it is allowed.

    `spare`: files beside SPARE_FILES that something else needs.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    most = max(64, soft - SPARE_FILES - spare)
    fields: dict[str, Any] = {"most": most}
    return type("Protocol", (BoundedProtocol,), fields)
