"""A load generator that costs little: closed-loop clients over kept connections, their HTTP/1.1 written by hand on uvloop.

    echo '{"url": "http://127.0.0.1:8000/v1", "model": "teacher", "in_flight": 64, "seconds": 2}' | python tests/benchmarks/load.py

reads one `Load` from standard input and prints one `Result`, both JSON. Every request holds a number of its own and every answer must be
that number's (see mock_upstream.py): a wrong status, another request's text or a torn stream ends it with exit code 1 and says what came.
`run` does the same in a process of its own.
"""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from itertools import count
from typing import Any
from urllib.parse import urlsplit

import uvloop
from mock_upstream import PROMPT, answer_of

LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
SAID = re.compile(rb'"(?:content|text)": *"[^"]')
"""The first piece of a stream that has text in it."""
CHUNKED_END = b"\r\n0\r\n\r\n"
PATIENCE_S = 60.0
"""Seconds past its time after which a load that does not end has failed."""


class WrongAnswer(Exception):
    """What came back is not the answer to what was asked."""


@dataclass(frozen=True, kw_only=True)
class Load:
    """What is asked, and for how long: `seconds`, or `requests` if that is given."""

    url: str
    """Base URL with its /v1."""
    model: str
    in_flight: int
    seconds: float = 2.0
    warm_up_s: float = 0.3
    """Seconds before the first answer that counts."""
    requests: int | None = None
    keys: list[str] = field(default_factory=list)
    """API keys; requests take turns at them, as those of many users would."""
    stream: bool = False
    first_number: int = 0
    """Two loads against one server must not share numbers, else a late answer to one would pass for the other's."""


@dataclass(frozen=True, kw_only=True)
class Result:
    requests: int
    answered: int
    """With those of the warm-up."""
    seconds: float
    p50_ms: float
    """From the request to the last byte of its answer."""
    p99_ms: float
    first_p50_ms: float | None
    """Streams: from the request to the first piece with text."""
    pieces: int
    """Streams: pieces with text that came."""

    @property
    def per_s(self) -> float:
        return self.requests / self.seconds


class Client(asyncio.Protocol):
    """One connection with one request in flight, always."""

    def __init__(self, run: Run) -> None:
        self._run = run

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport
        self._ask()

    def _ask(self) -> None:
        self._number = next(self._run.numbers)
        self._received = bytearray()
        self._whole = 0
        self._first: float | None = None
        request = self._run.request(self._number)
        self._asked = time.perf_counter()
        self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        received = self._received
        received += data
        if not self._whole:
            end = received.find(b"\r\n\r\n")
            if end < 0:
                return
            self._head = end + 4
            length = LENGTH.search(received, 0, end + 2)
            self._whole = self._head + int(length[1]) if length else -1  # -1: chunked
        if self._whole < 0:
            if self._first is None and SAID.search(received):
                self._first = time.perf_counter()
            if not received.endswith(CHUNKED_END):
                return
        elif len(received) < self._whole:
            return
        now = time.perf_counter()
        try:
            pieces = self._check()
        except WrongAnswer as exc:
            self._run.fail(exc)
            return
        run = self._run
        run.answered += 1
        # what ends within the time, whenever it was asked: else slow answers would count too little
        if now >= run.counts_from:
            run.latencies.append(now - self._asked)
            run.pieces += pieces
            if self._first is not None:
                run.firsts.append(self._first - self._asked)
            if run.load.requests is not None and len(run.latencies) >= run.load.requests:
                run.end(now)
                return
        if now >= run.counts_until and run.latencies:
            run.end(now)
        if not run.done.done():
            self._ask()

    def connection_lost(self, exc: Exception | None) -> None:
        self._run.fail(WrongAnswer(f"the connection was closed in mid-request ({exc})"))

    def _check(self) -> int:
        """The pieces with text in the answer. Raises WrongAnswer."""
        received, expected = bytes(self._received), answer_of(self._number)
        if not received.startswith(b"HTTP/1.1 200 "):
            raise WrongAnswer(received.decode(errors="replace")[:600])
        if not self._run.load.stream:
            if b'"%s"' % expected.encode() not in received:
                raise WrongAnswer(f"asked for {expected!r}, got {received.decode(errors='replace')[-600:]!r}")
            return 0
        pieces = _pieces(_dechunked(received[self._head :]))
        if "".join(pieces) != expected:
            raise WrongAnswer(f"asked for {expected!r}, got the pieces {pieces}")
        return len(pieces)


def _dechunked(body: bytes) -> bytes:
    out, at = bytearray(), 0
    while True:
        line = body.index(b"\r\n", at)
        size = int(body[at:line], 16)
        if not size:
            return bytes(out)
        out += body[line + 2 : line + 2 + size]
        at = line + 4 + size


def _pieces(events: bytes) -> list[str]:
    said = [event[6:] for event in events.decode().split("\n\n") if event.startswith("data: ")]
    if not said or said[-1] != "[DONE]":
        raise WrongAnswer(f"the stream did not end with [DONE]: {events[-300:]!r}")
    deltas = [choice["delta"].get("content") for event in said[:-1] for choice in json.loads(event).get("choices", [])]
    return [delta for delta in deltas if delta]


class Run:
    """All connections of one load."""

    def __init__(self, load: Load) -> None:
        self.load = load
        self.numbers = count(load.first_number)
        self.latencies: list[float] = []
        self.firsts: list[float] = []
        self.answered = 0
        self.pieces = 0
        self.done: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        self.counts_from = time.perf_counter() + load.warm_up_s
        self.counts_until = self.counts_from + load.seconds if load.requests is None else float("inf")
        body = {
            "model": load.model,
            "messages": [{"role": "user", "content": PROMPT}],
            "max_tokens": 64,
            "temperature": 0.8,
        }
        before, after = json.dumps(body | ({"stream": True} if load.stream else {})).encode().split(b"{}")
        self._before, self._after = before, after
        where = urlsplit(load.url)
        self._heads = [
            (
                f"POST {where.path}/chat/completions HTTP/1.1\r\nhost: {where.netloc}\r\naccept: */*\r\nuser-agent: load\r\n"
                f"content-type: application/json\r\n{authorization}content-length: "
            ).encode()
            for authorization in [f"authorization: Bearer {key}\r\n" for key in load.keys] or [""]
        ]

    def request(self, number: int) -> bytes:
        digits = b"%d" % number
        length = len(self._before) + len(digits) + len(self._after)
        return b"%s%d\r\n\r\n%s%s%s" % (self._heads[number % len(self._heads)], length, self._before, digits, self._after)

    def end(self, now: float) -> None:
        if not self.done.done():
            self.done.set_result(now)

    def fail(self, exc: WrongAnswer) -> None:
        if not self.done.done():
            self.done.set_exception(exc)

    async def result(self) -> Result:
        where = urlsplit(self.load.url)
        loop = asyncio.get_running_loop()
        # an error in a callback would else be logged and leave the load waiting
        loop.set_exception_handler(lambda loop, context: self.fail(WrongAnswer(f"{context['message']}: {context.get('exception')!r}")))
        connections = [loop.create_connection(lambda: Client(self), where.hostname, where.port) for _ in range(self.load.in_flight)]
        await asyncio.gather(*connections)
        async with asyncio.timeout(PATIENCE_S + (self.load.seconds if self.load.requests is None else self.load.requests / 20)):
            ended = await self.done
        return Result(
            requests=len(self.latencies),
            answered=self.answered,
            seconds=ended - self.counts_from,
            p50_ms=quantile(self.latencies, 0.5) * 1e3,
            p99_ms=quantile(self.latencies, 0.99) * 1e3,
            first_p50_ms=quantile(self.firsts, 0.5) * 1e3 if self.firsts else None,
            pieces=self.pieces,
        )


def quantile(values: list[float], q: float) -> float:
    """The value that a share `q` of `values` does not exceed: one of them, never a mean of two."""
    return sorted(values)[min(len(values) - 1, int(q * len(values)))]


def run(load: Load) -> Result:
    """`load` from a process of its own. Raises WrongAnswer with what it said if it failed."""
    child = subprocess.run([sys.executable, __file__], input=json.dumps(asdict(load)), capture_output=True, text=True)
    if child.returncode:
        raise WrongAnswer(f"{load.url}: {child.stderr.strip().splitlines()[-1] if child.stderr else 'it ended without a word'}")
    answer: dict[str, Any] = json.loads(child.stdout)
    return Result(**answer)


async def _main(load: Load) -> Result:
    return await Run(load).result()


if __name__ == "__main__":
    try:
        print(json.dumps(asdict(uvloop.run(_main(Load(**json.load(sys.stdin)))))))
    except (WrongAnswer, OSError, TimeoutError) as exc:
        sys.exit(" ".join(f"{type(exc).__name__}: {exc}".split()))  # one line, whatever came back
