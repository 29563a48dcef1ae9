"""Answers as server-sent events: pieces that end where words end, and an end of the work when the client has gone."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING

from starlette.responses import Response

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

RUN = 12
"""Characters without white space after which a piece ends: of a long word, or of a language that does not part its words."""
SEND_S = 60.0
"""Seconds that a client may take to read one event: then its connection is closed, and its place at the engine is another's."""
_PIECE = re.compile(rf"\s*(?:\S{{{RUN}}}|\S+(?=\s))")


class ClientLeft(Exception):
    """Nobody waits for this answer any more."""


class Words:
    """Text cut anew: where its pieces end depends on the text alone, not on how it came, so that no engine's tokens are seen in them."""

    def __init__(self) -> None:
        self._rest = ""

    def add(self, text: str) -> list[str]:
        """The pieces that are complete now."""
        self._rest += text
        complete, end = [], 0
        while match := _PIECE.match(self._rest, end):
            complete.append(match[0])
            end = match.end()
        self._rest = self._rest[end:]
        return complete

    def rest(self) -> str:
        """What is left when the text has ended."""
        rest, self._rest = self._rest, ""
        return rest


@asynccontextmanager
async def while_connected(receive: Receive) -> AsyncIterator[None]:
    """Cancel the block when the client hangs up. To be entered when the request's body has been read. Raises ClientLeft then."""
    task = asyncio.current_task()
    assert task is not None
    left = False

    async def watch() -> None:
        nonlocal left
        while (await receive())["type"] != "http.disconnect":
            pass
        left = True
        task.cancel()

    watcher = asyncio.create_task(watch())
    try:
        yield
    except asyncio.CancelledError:
        if not left:
            raise
        task.uncancel()
        raise ClientLeft from None
    finally:
        watcher.cancel()


class Events(Response):
    """A response of server-sent events; ends the generator they come from, also when the client leaves before the last of them."""

    media_type = "text/event-stream"

    def __init__(self, first: bytes, events: AsyncGenerator[bytes, None], *, cut: bytes, ended: Callable[[], None]) -> None:
        """`first`: what is sent before all `events`; `cut`: what is sent as the last one if the server must end meanwhile.

        `ended` is called after the last event or when the client has left.
        """
        super().__init__()
        self._first, self._events, self._cut, self._ended = first, events, cut, ended
        self.raw_headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def say(event: bytes) -> None:
            async with asyncio.timeout(SEND_S):
                await send({"type": "http.response.body", "body": event, "more_body": True})

        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            with suppress(ClientLeft, TimeoutError):  # what is not completed, the server closes
                try:
                    async with while_connected(receive):
                        await say(self._first)
                        async for event in self._events:
                            await say(event)
                except asyncio.CancelledError:
                    await say(self._cut)
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            await self._events.aclose()
            self._ended()
