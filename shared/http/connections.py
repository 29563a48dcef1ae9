"""Connections that cost a server nothing: silent ones are closed, endless headers are cut, and there is always room for the next."""

from __future__ import annotations

import asyncio
import resource
from typing import Any

from pydantic_core import to_json
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEADERS_S = 10.0
"""Seconds in which a request's headers must have come, from the connection or from its first byte on."""
HEADER_BYTES = 64 << 10
"""Most bytes of a request's line and headers."""
MOST_PIPELINED = 16
"""Requests that may wait on one connection for the answers to those before them."""
SPARE_FILES = 256
"""Open files that are not callers' connections."""


class BoundedProtocol(HttpToolsProtocol):
    """uvicorn's HTTP/1.1 protocol with bounds where it has none."""

    most = 0
    """Connections at a time; set by `bounded`."""

    _deadline: asyncio.TimerHandle | None = None
    _head_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.most:
            transport.abort()
        else:
            self._deadline = self.loop.call_later(HEADERS_S, self._hang_up)

    def data_received(self, data: bytes) -> None:
        between = self.cycle is None or self.cycle.response_complete
        if between and self._deadline is None:
            self._deadline = self.loop.call_later(HEADERS_S, self._hang_up)
        super().data_received(data)
        if self._deadline is not None:  # the headers are not complete yet
            self._head_bytes += len(data)
            if self._head_bytes > HEADER_BYTES:
                self._hang_up()

    def on_headers_complete(self) -> None:
        self._stop_clock()
        super().on_headers_complete()
        if len(self.pipeline) > MOST_PIPELINED:
            self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_clock()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """To what is no HTTP."""
        body = to_json({"error": {"message": msg, "type": "invalid_request_error", "param": None, "code": None}})
        head = b"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n"
        self.transport.write(head % len(body) + body)
        self.transport.close()

    def _stop_clock(self) -> None:
        self._head_bytes = 0
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _hang_up(self) -> None:
        if not self.transport.is_closing():
            self.transport.close()


def bounded() -> type[BoundedProtocol]:
    """The protocol, for as many connections as this process may hold: it takes all the open files that it is allowed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    most = max(64, soft - SPARE_FILES)
    fields: dict[str, Any] = {"most": most}
    return type("Protocol", (BoundedProtocol,), fields)
