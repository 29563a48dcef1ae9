"""Streams: where pieces end depends on the text alone, and nobody works for a client that has left."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.http.streaming import RUN, ClientLeft, Events, Words, while_connected


def cut(text: str, at: list[int]) -> list[str]:
    """`text` in pieces as some engine might send it."""
    places = sorted({0, len(text), *(a % (len(text) + 1) for a in at)})
    return [text[a:b] for a, b in pairwise(places)]


def pieces(parts: list[str]) -> list[str]:
    words = Words()
    found = [piece for part in parts for piece in words.add(part)]
    return [*found, rest] if (rest := words.rest()) else found


TEXTS = st.text(st.sampled_from("ab \n\t.é猫\u00a0"), max_size=80)


@given(TEXTS, st.lists(st.integers(0, 1000), max_size=30), st.lists(st.integers(0, 1000), max_size=30))
def test_the_pieces_are_the_same_however_the_text_came(text: str, one: list[int], other: list[int]) -> None:
    assert pieces(cut(text, one)) == pieces(cut(text, other)) == pieces(list(text))


@given(TEXTS, st.lists(st.integers(0, 1000), max_size=30))
def test_the_pieces_together_are_the_text(text: str, at: list[int]) -> None:
    assert "".join(pieces(cut(text, at))) == text


def test_a_piece_is_a_word_with_the_white_space_before_it() -> None:
    assert pieces(["What ca", "uses mig", "raine?\n"]) == ["What", " causes", " migraine?", "\n"]


def test_a_word_is_given_as_soon_as_it_has_ended_and_a_long_one_in_parts() -> None:
    words = Words()
    assert words.add("Is") == []
    assert words.add(" it") == ["Is"]
    assert words.add("x" * RUN) == [" it" + "x" * (RUN - 2)]


def test_blanks_without_end_are_given_away_and_not_looked_at_again_and_again() -> None:
    words = Words()
    assert "".join(piece for _ in range(10_000) for piece in words.add(" " * 8)) + words.rest() == " " * 80_000
    assert pieces([" " * (2 * RUN + 1) + "end"]) == [" " * RUN, " " * RUN, " end"]


class Client:
    """One ASGI connection: hangs up when told to; keeps what it is sent."""

    def __init__(self) -> None:
        self.gone, self.sent = asyncio.Event(), []

    async def receive(self) -> dict[str, Any]:
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        self.sent.append(message)

    @property
    def body(self) -> bytes:
        return b"".join(m.get("body", b"") for m in self.sent)


def test_work_ends_when_the_client_leaves() -> None:
    async def run() -> None:
        client, ended = Client(), []
        asyncio.get_running_loop().call_later(0.01, client.gone.set)

        async def work() -> None:
            with while_connected(client.receive):
                try:
                    await asyncio.sleep(60)
                finally:
                    ended.append(True)

        with pytest.raises(ClientLeft):
            await work()
        assert ended
        await asyncio.sleep(0)  # this task goes on undisturbed

    asyncio.run(run())


def test_a_cancellation_from_elsewhere_stays_one() -> None:
    async def work() -> None:
        with while_connected(Client().receive):
            await asyncio.sleep(60)

    async def run() -> None:
        task = asyncio.create_task(work())
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())


class Source:
    """Events every 10 ms, for ever; knows whether it was ended."""

    def __init__(self) -> None:
        self.ended = False

    async def events(self) -> AsyncGenerator[bytes, None]:
        try:
            while True:
                await asyncio.sleep(0.01)
                yield b"more;"
        finally:
            self.ended = True


def test_a_stream_whose_client_leaves_ends_what_it_comes_from() -> None:
    async def run() -> None:
        client, source, told = Client(), Source(), []
        response = Events(b"first;", source.events(), cut=b"cut;", most_s=60, ended=told.append)
        asyncio.get_running_loop().call_later(0.05, client.gone.set)
        await response({"type": "http"}, client.receive, client.send)
        assert source.ended
        assert told == ["client_left"]
        assert client.body.startswith(b"first;more;")
        assert b"cut;" not in client.body

    asyncio.run(run())


def test_a_stream_that_the_server_cuts_says_so_in_its_last_event() -> None:
    async def run() -> None:
        client, source, told = Client(), Source(), []
        response = Events(b"first;", source.events(), cut=b"cut;", most_s=60, ended=told.append)
        task = asyncio.create_task(response({"type": "http"}, client.receive, client.send))
        await asyncio.sleep(0.03)
        task.cancel()
        await task
        assert source.ended
        assert client.body.endswith(b"cut;")
        assert told == ["shutting_down"]
        assert client.sent[-1] == {"type": "http.response.body", "body": b"", "more_body": False}

    asyncio.run(run())


def test_a_client_that_reads_slowly_for_ever_loses_its_place() -> None:
    class Slow(Client):
        async def send(self, message: Any) -> None:
            await asyncio.sleep(0.02)

    async def run() -> None:
        client, source, told = Slow(), Source(), []
        await Events(b"first;", source.events(), cut=b"", most_s=0.2, ended=told.append)({"type": "http"}, client.receive, client.send)
        assert source.ended
        assert told == ["slow_reader"]

    asyncio.run(run())
