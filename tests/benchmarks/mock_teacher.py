"""A teacher that limits its rate and fails on purpose, and counts all that it is asked: mock_upstream.py with a bad temper.

    python tests/benchmarks/mock_teacher.py --delay-ms 50 --per-s 40 --capacity 40 --faults 1

listens on a free port of the loopback and prints its URL. It answers POST /v1/chat/completions and /v1/completions of a prompt with
`#NUMBER` after the delay, with `n` choices, choice i being `text_of(NUMBER, seed + i)`, or 429 with a Retry-After where more than `--per-s`
requests come (a token bucket, full at the start). With `--faults` 11 of 100 calls go wrong, chosen by seed, prompt and how often the prompt
was asked before, so that every run meets the same faults; no prompt goes wrong more than `MOST_FAULTS` times.

GET /counts gives the `Counts`, GET /calls how often each prompt was asked. Times are CLOCK_MONOTONIC, which all processes share.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import socket
import struct
import time
from dataclasses import asdict, dataclass, field

import uvloop
from mock_upstream import CHAT, NUMBER, Mock, answer_of

SEED = re.compile(rb'"seed": *(\d+)')
CHOICES = re.compile(rb'"n": *(\d+)')
FAULTS = (("500", 0.05), ("reset", 0.02), ("hang", 0.01), ("garbage", 0.01), ("truncated", 0.01), ("charset", 0.01))
"""What goes wrong and in which share of calls."""
MOST_FAULTS = 3
ON_ITS_WAY_S = 0.1
"""A call that arrives so soon after the first 429 may have been sent before it was read: wasted, but not against what was told."""


def text_of(number: int, sample: int) -> str:
    """The one right answer to sample `sample` (the seed it was asked with) of the prompt with `#number`."""
    return f"{answer_of(number)} ({sample})"


@dataclass
class Counts:
    """What happened so far. Times are seconds of CLOCK_MONOTONIC, 0 before the first."""

    calls: int = 0
    answered: int = 0
    """Rightly: without the calls that went wrong."""
    refused: int = 0
    """With 429."""
    inside_gate: int = 0
    """Calls made though a Retry-After told to wait."""
    in_flight: int = 0
    """Calls that have no answer yet; of those that went wrong by a hang, too, until their answer was due."""
    most_in_flight: int = 0
    first_call_at: float = 0.0
    last_answer_at: float = 0.0
    faults: dict[str, int] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """From the first call to the last answer: without anybody's start."""
        return self.last_answer_at - self.first_call_at


class Teacher:
    """What all connections share."""

    def __init__(self, *, delay_s: float, per_s: float | None, capacity: float, retry_after_s: int, faults: int | None) -> None:
        self.delay_s, self.retry_after_s = delay_s, retry_after_s
        self._per_s, self._capacity, self._faults = per_s, capacity, faults
        self._tokens, self._filled_at = capacity, time.monotonic()
        self._gate_from = self._gate_until = 0.0
        self.counts = Counts()
        self.calls_of: dict[int, int] = {}

    def allows(self, now: float) -> bool:
        """Take one request out of the bucket, or tell to come back."""
        if self._per_s is None:
            return True
        if self._gate_from + ON_ITS_WAY_S < now < self._gate_until:
            self.counts.inside_gate += 1
        self._tokens = min(self._capacity, self._tokens + (now - self._filled_at) * self._per_s)
        self._filled_at = now
        if self._tokens >= 1:
            self._tokens -= 1
            return True
        if now >= self._gate_until:
            self._gate_from = now
        self._gate_until = now + self.retry_after_s
        self.counts.refused += 1
        return False

    def fault(self, number: int, earlier: int) -> str | None:
        """What goes wrong with a call for a prompt that was asked `earlier` times before."""
        if self._faults is None or earlier >= MOST_FAULTS:
            return None
        drawn = random.Random(f"{self._faults}/{number}/{earlier}").random()
        for name, share in FAULTS:
            if drawn < share:
                return name
            drawn -= share
        return None


class Connection(Mock):
    def __init__(self, teacher: Teacher) -> None:
        super().__init__(teacher.delay_s)
        self._teacher = teacher

    def _asked(self, path: bytes, request: bytes, end: int) -> None:
        teacher, counts = self._teacher, self._teacher.counts
        number = NUMBER.search(request, end)
        if path == b"/counts":
            self._send(200, json.dumps(asdict(counts)).encode())
        elif path == b"/calls":
            self._send(200, json.dumps(teacher.calls_of).encode())
        elif number is None or not path.endswith(b"/completions"):
            super()._asked(path, request, end)
        else:
            now = time.monotonic()
            counts.calls += 1
            counts.first_call_at = counts.first_call_at or now
            if not teacher.allows(now):
                said = b'{"error":{"message":"too many requests"}}'
                head = (
                    b"HTTP/1.1 429 Too Many Requests\r\nretry-after: %d\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s"
                )
                self._transport.write(head % (teacher.retry_after_s, len(said), said))
                return
            asked = int(number[1])
            earlier = teacher.calls_of.get(asked, 0)
            teacher.calls_of[asked] = earlier + 1
            counts.in_flight += 1
            counts.most_in_flight = max(counts.most_in_flight, counts.in_flight)
            seed, choices = SEED.search(request, end), CHOICES.search(request, end)
            first, n = int(seed[1]) if seed else 0, int(choices[1]) if choices else 1
            self._loop.call_later(self._delay_s, self._reply, path == CHAT, asked, range(first, first + n), teacher.fault(asked, earlier))

    def _reply(self, chat: bool, number: int, samples: range, fault: str | None) -> None:
        counts = self._teacher.counts
        counts.in_flight -= 1
        if self._transport.is_closing():  # who asked has been killed, or waited no longer
            return
        if fault is None:
            counts.answered += 1
            counts.last_answer_at = time.monotonic()
            self._send(200, _body(chat, number, samples))
            return
        counts.faults[fault] = counts.faults.get(fault, 0) + 1
        body = _body(chat, number, samples)
        if fault == "500":
            self._send(500, b'{"error":{"message":"the engine died"}}')
        elif fault == "garbage":
            self._send(200, b"upstream connect error \xff\x00 or disconnect/reset before headers")
        elif fault == "charset":
            self._send_in_wrong_charset(body, latin=number % 2 == 0)
        elif fault in ("reset", "truncated"):
            self._transport.write(
                b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body) + body[:80]
            )
            self._loop.call_later(0.002, self._reset if fault == "reset" else self._transport.close)

    def _send_in_wrong_charset(self, body: bytes, *, latin: bool) -> None:
        """Bytes that are no UTF-8 though it says so, or UTF-8 though it says something else: the text must never come out wrong."""
        charset = b"utf-16"
        if latin:
            charset, body = b"utf-8", body.replace(b"answer", b"r\xe9ponse")
        head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json; charset=%s\r\ncontent-length: %d\r\n\r\n%s"
        self._transport.write(head % (charset, len(body), body))

    def _reset(self) -> None:
        if not self._transport.is_closing():
            self._transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self._transport.abort()


def _body(chat: bool, number: int, samples: range) -> bytes:
    said = '"message":{"role":"assistant","content":"%s"}' if chat else '"text":"%s"'
    choices = ",".join(f'{{"index":{i},{said % text_of(number, sample)},"finish_reason":"stop"}}' for i, sample in enumerate(samples))
    kind, tokens = "chat.completion" if chat else "text_completion", 30 * len(samples)
    return (
        f'{{"id":"mock-{number}","object":"{kind}","created":1700000000,"model":"mock-7b","choices":[{choices}],'
        f'"usage":{{"prompt_tokens":90,"completion_tokens":{tokens},"total_tokens":{90 + tokens}}}}}'
    ).encode()


async def serve(teacher: Teacher, *, until_stdin_closes: bool) -> None:
    loop = asyncio.get_running_loop()
    end = asyncio.Event()
    server = await loop.create_server(lambda: Connection(teacher), "127.0.0.1", 0, backlog=1024)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1", flush=True)
    if until_stdin_closes:
        loop.add_reader(0, end.set)
    await end.wait()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--delay-ms", type=float, default=50.0, metavar="MS")
    parser.add_argument("--per-s", type=float, metavar="N", help="requests a second; more are answered with 429")
    parser.add_argument("--capacity", type=float, default=40.0, metavar="N", help="of the bucket: requests that may come at once")
    parser.add_argument("--retry-after-s", type=int, default=2, metavar="S")
    parser.add_argument("--faults", type=int, metavar="SEED", help="go wrong, as this seed draws it")
    parser.add_argument("--until-stdin-closes", action="store_true", help="end with the process that started this one")
    args = parser.parse_args()
    asked = Teacher(
        delay_s=args.delay_ms / 1000, per_s=args.per_s, capacity=args.capacity, retry_after_s=args.retry_after_s, faults=args.faults
    )
    uvloop.run(serve(asked, until_stdin_closes=args.until_stdin_closes))
