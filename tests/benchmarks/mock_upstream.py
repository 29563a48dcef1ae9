"""An upstream that costs almost nothing: an OpenAI-compatible server for benchmarks, its HTTP/1.1 written by hand on uvloop.

    python tests/benchmarks/mock_upstream.py --delays-ms 0 50

listens on one free port of the loopback for each delay and prints them, one line each ("0 http://127.0.0.1:PORT/v1"). It answers
POST /v1/chat/completions and /v1/completions, streamed or not, after the delay, and GET /v1/models at once. A prompt holds `#NUMBER`; the
answer is `answer_of(NUMBER)`, so that whoever asks can tell its own answer from every other. It knows no more of HTTP than its clients
need: Content-Length or nothing, keep-alive, no pipelining of streams.
"""

from __future__ import annotations

import argparse
import asyncio
import re

import uvloop

WORDS = "what are the causes and the treatments of a slow heart in older people who take one pill a day for their blood pressure".split()  # noqa: SIM905
GAP_S = 0.005
"""Seconds between two pieces of a stream: about what a fast engine needs for a token, 200 tokens/s."""

NUMBER = re.compile(rb"#(\d+)")
LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
STREAM = re.compile(rb'"stream": *true')
CHAT = b"/v1/chat/completions"


def answer_of(number: int) -> str:
    """The one right answer to a prompt with `#number`: plain ASCII without quotes, so that it stands in any JSON as it is here."""
    return f"answer #{number}: {' '.join(WORDS)}"


PROMPT = "Summarize the question. #{}: " + "My mother is 80 and keeps falling at night. She takes a water pill for her heart. " * 4
"""A prompt of the length that the project's data sets have (MeQSum: 68 tokens in the median); {} stands for the number."""


class Mock(asyncio.Protocol):
    """One connection."""

    def __init__(self, delay_s: float) -> None:
        self._delay_s = delay_s
        self._loop = asyncio.get_running_loop()
        self._received = b""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._received = self._received + data if self._received else data
        while (end := self._received.find(b"\r\n\r\n")) >= 0:
            length = LENGTH.search(self._received, 0, end + 2)
            whole = end + 4 + (int(length[1]) if length else 0)
            if len(self._received) < whole:
                return
            request, self._received = self._received[:whole], self._received[whole:]
            path = request[: request.index(b"\r\n")].split(b" ")[1]
            if path == b"/v1/models":
                self._send(200, b'{"object":"list","data":[{"id":"mock-7b","object":"model","created":1,"owned_by":"mock"}]}')
            else:
                self._asked(path, request, end)

    def _asked(self, path: bytes, request: bytes, end: int) -> None:
        """Answer a whole request whose head ends at `end`."""
        number = NUMBER.search(request, end)
        if number is None or not path.endswith(b"/completions"):
            self._send(400, b'{"error":{"message":"a benchmark asks for completions of a prompt with #NUMBER, with a Content-Length"}}')
            return
        answer = self._stream if STREAM.search(request, end) else self._answer
        if self._delay_s:
            self._loop.call_later(self._delay_s, answer, path == CHAT, int(number[1]))
        else:
            answer(path == CHAT, int(number[1]))

    def _send(self, status: int, body: bytes) -> None:
        self._transport.write(
            b"HTTP/1.1 %d OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s" % (status, len(body), body)
        )

    def _answer(self, chat: bool, number: int) -> None:
        text = answer_of(number).encode()
        said = b'"message":{"role":"assistant","content":"%s"}' % text if chat else b'"text":"%s"' % text
        kind = b"chat.completion" if chat else b"text_completion"
        self._send(
            200,
            b'{"id":"mock-%d","object":"%s","created":1700000000,"model":"mock-7b","choices":[{"index":0,%s,"finish_reason":"stop"}],'
            b'"usage":{"prompt_tokens":90,"completion_tokens":30,"total_tokens":120}}' % (number, kind, said),
        )

    def _stream(self, chat: bool, number: int) -> None:
        self._transport.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
            + (_event(b'{"role":"assistant","content":""}', chat=True, number=number) if chat else b"")
        )
        self._piece(chat, number, answer_of(number).split(" "), 0)

    def _piece(self, chat: bool, number: int, words: list[str], i: int) -> None:
        if self._transport.is_closing():
            return
        if i == len(words):
            end = _event(b"{}" if chat else b"", chat=chat, number=number, reason=b'"stop"')
            self._transport.write(end + b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")
            return
        word = (words[i] if i == 0 else " " + words[i]).encode()
        self._transport.write(_event(b'{"content":"%s"}' % word if chat else word, chat=chat, number=number))
        self._loop.call_later(GAP_S, self._piece, chat, number, words, i + 1)


def _event(said: bytes, *, chat: bool, number: int, reason: bytes = b"null") -> bytes:
    """One server-sent event as one HTTP chunk."""
    said = b'"delta":%s' % said if chat else b'"text":"%s"' % said
    kind = b"chat.completion.chunk" if chat else b"text_completion"
    event = (
        b'data: {"id":"mock-%d","object":"%s","created":1700000000,"model":"mock-7b",'
        b'"choices":[{"index":0,%s,"finish_reason":%s}]}\n\n' % (number, kind, said, reason)
    )
    return b"%x\r\n%s\r\n" % (len(event), event)


async def serve(delays_ms: list[float], *, until_stdin_closes: bool) -> None:
    loop = asyncio.get_running_loop()
    end = asyncio.Event()
    for delay_ms in delays_ms:
        server = await loop.create_server(lambda delay_s=delay_ms / 1000: Mock(delay_s), "127.0.0.1", 0, backlog=1024)
        print(f"{delay_ms:g} http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1", flush=True)
    if until_stdin_closes:
        loop.add_reader(0, end.set)
    await end.wait()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--delays-ms", type=float, nargs="+", default=[0.0, 50.0], metavar="MS")
    parser.add_argument("--until-stdin-closes", action="store_true", help="end with the process that started this one")
    args = parser.parse_args()
    uvloop.run(serve(args.delays_ms, until_stdin_closes=args.until_stdin_closes))
