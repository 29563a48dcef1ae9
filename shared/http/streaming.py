"""Answers as server-sent events: pieces that end where words end, and an end of the work when the client has gone."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, Callable
from typing import TYPE_CHECKING

from starlette.responses import Response

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

RUN = 12
"""Characters after which a piece ends: of a long word, of a language that does not part its words, or of blanks alone."""
CUT_S = 1.0
"""Seconds that the last event of a stream that is cut may take."""
# bounded in every direction: no run is looked at twice
_PIECE = re.compile(rf"\s{{{RUN}}}|\s{{0,{RUN - 1}}}(?:\S{{{RUN}}}|\S+(?=\s))")


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


class while_connected:
    """`with while_connected(receive)`: cancel the block when the client hangs up, and raise ClientLeft then.

    To be entered when the request's body has been read.
    """

    def __init__(self, receive: Receive) -> None:
        self._receive, self._left = receive, False

    def __enter__(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._watcher = asyncio.create_task(self._watch())

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._left = True
        self._task.cancel()

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, trace: object) -> None:
        self._watcher.cancel()
        if self._left and isinstance(exc, asyncio.CancelledError):
            self._task.uncancel()
            raise ClientLeft from None


class Events(Response):
    """A response of server-sent events; ends the generator they come from, also when the client leaves before the last of them."""

    media_type = "text/event-stream"

    def __init__(
        self, first: bytes, events: AsyncGenerator[bytes, None], *, cut: bytes, most_s: float, ended: Callable[[str | None], None]
    ) -> None:
        """`first`: what is sent before all `events`; `cut`: what is sent as the last one if the server must end meanwhile.

        `most_s`: seconds for all of it, however slowly the client reads. `ended` is called at the end, with the reason if it came early.
        """
        super().__init__()
        self._first, self._events, self._cut, self._most_s, self._ended = first, events, cut, most_s, ended
        self.raw_headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def say(event: bytes) -> None:
            await send({"type": "http.response.body", "body": event, "more_body": True})

        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        reason = None
        try:
            try:
                async with asyncio.timeout(self._most_s):
                    with while_connected(receive):
                        await say(self._first)
                        async for event in self._events:
                            await say(event)
            except asyncio.CancelledError:
                reason = "shutting_down"
                async with asyncio.timeout(CUT_S):
                    await say(self._cut)
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except ClientLeft:
            reason = "client_left"
        except TimeoutError:  # what is not completed, the server closes
            reason = reason or "slow_reader"
        finally:
            await self._events.aclose()
            self._ended(reason)
