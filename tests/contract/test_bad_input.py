"""Whatever bytes reach a server: a right answer or a closed connection, never a crash and never another client's text."""

from __future__ import annotations

import asyncio
import json
import random
import resource
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any

import pytest
from gateways import ANSWER, QUESTION, Answer, Gateway, in_time, read_answers, running, teacher

MODEST: dict[str, Any] = {"model": "teacher", "prompt": QUESTION, "temperature": 0}
MODEST_BODY = json.dumps(MODEST).encode()
CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
LIMIT = 1 << 20
"""Bytes of a body, by default."""


def post(
    body: bytes,
    *,
    path: str = COMPLETIONS,
    content_type: str | None = "application/json",
    version: str = "1.1",
    length: int | None = None,
    more: bytes = b"",
    close: bool = True,
) -> bytes:
    """A POST as it goes over the wire. `length`: the Content-Length it claims, -1 for none; `more`: further header lines."""
    head = f"POST {path} HTTP/{version}\r\nhost: teacher\r\n".encode()
    if content_type is not None:
        head += f"content-type: {content_type}\r\n".encode()
    if length != -1:
        head += b"content-length: %d\r\n" % (len(body) if length is None else length)
    return head + (b"connection: close\r\n" if close else b"") + more + b"\r\n" + body


def chunked(*pieces: bytes) -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in (*pieces, b""))


def exchange(gateway: Gateway, sent: bytes, *, half_close: bool = False) -> list[Answer]:
    """All answers to these bytes, until the server closes."""
    with closing(gateway.connect()) as connection:
        # the server may close before it has read everything
        with suppress(ConnectionError):
            connection.sendall(sent)
            if half_close:
                connection.shutdown(socket.SHUT_WR)
        return read_answers(connection)


def answered(gateway: Gateway, sent: bytes) -> Answer:
    (answer,) = exchange(gateway, sent)
    return answer


def text_of(answer: Answer) -> str:
    assert answer.status == 200, answer
    choice = answer.json["choices"][0]
    return str(choice["text"] if "text" in choice else choice["message"]["content"])


@pytest.fixture(scope="module")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with teacher(tmp_path_factory.mktemp("log") / "stderr", "--no-auth") as gateway:
        yield gateway


HURRIED = """
import asyncio, sys
from shared.contracts import Completion
from shared.engines.scripted import ScriptedEngine
from shared.http import connections, serve as serving
from shared.http.app import create_app
from shared.http.face import Bounds
from shared.http.logs import configure

class Loquacious(ScriptedEngine):
    "Takes its time for `slow` prompts, and answers `long` ones at length."
    async def generate(self, request):
        prompt = request.prompt or ""
        if "slow" in prompt:
            await asyncio.sleep(20)
        if "pause" in prompt or "linger" in prompt:
            await asyncio.sleep(0.5 if "pause" in prompt else 2)
        if "long" in prompt:
            return [Completion(text="word " * 40_000, finish_reason="stop")] * request.n
        return await super().generate(request)

connections.HEADERS_S = connections.UNREAD_S = 1.0
serving.KEEP_ALIVE_S = 8
configure("info")
app = create_app(Loquacious(), model="teacher", title="Teacher", bounds=Bounds(body_s=1.0))
sys.exit(serving.serve(app, host="127.0.0.1", port=0, name="test", drain_s=1))
"""
"""A server whose patience with slow clients is a second, so that tests need not wait longer."""


@pytest.fixture(scope="module")
def hurried(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with running(["-c", HURRIED], tmp_path_factory.mktemp("log") / "stderr") as gateway:
        yield gateway


@pytest.fixture(autouse=True)
def _alive_afterwards(request: pytest.FixtureRequest) -> Iterator[None]:
    """After each test its server answers the next client, and its log tells of no error of its own."""
    gateways = [request.getfixturevalue(name) for name in ("scripted", "hurried") if name in request.fixturenames]
    before = [gateway.complaints() for gateway in gateways]
    yield
    for gateway, complaints in zip(gateways, before, strict=True):
        assert text_of(answered(gateway, post(MODEST_BODY))) == ANSWER
        assert gateway.complaints() == complaints


def nested(depth: int) -> list[bytes]:
    return [
        b"[" * depth,
        b'{"a":' * depth,
        b'{"model":"teacher","prompt":' + b"[" * depth + b"]" * depth + b"}",
        b'{"model":"teacher","prompt":"x","x":' + b'{"x":' * depth + b"1" + b"}" * depth + b"}",
    ]


NO_JSON = {
    "nothing": b"",
    "invalid UTF-8": b'{"model":"teacher","prompt":"\xff\xfe"}',
    "an overlong encoding": b'{"model":"teacher","prompt":"\xc0\xaf"}',
    "an encoded surrogate": b'{"model":"teacher","prompt":"\xed\xa0\x80"}',
    "a lone surrogate": rb'{"model":"teacher","prompt":"\ud800"}',
    "a lone surrogate in a field's name": rb'{"model":"teacher","prompt":"x","\udfff":1}',
    "a lone surrogate in the model's name": rb'{"model":"\udc00","prompt":"x"}',
    "an unescaped null byte": b'{"model":"teacher","prompt":"a\0b"}',
    "null bytes": b"\0" * 100,
    "truncated": MODEST_BODY[:-7],
    "truncated in an escape": rb'{"model":"teacher","prompt":"\u00',
    "two objects": MODEST_BODY * 2,
    "UTF-16": MODEST_BODY.decode().encode("utf-16"),
    "a byte order mark": b"\xef\xbb\xbf" + MODEST_BODY,
    "a list": b"[]",
    "a text": b'"prompt"',
    "null": b"null",
    "a form": b"model=teacher&prompt=x",
    **{f"nested {number}": body for number, body in enumerate(nested(100_000))},
}


@pytest.mark.parametrize("body", NO_JSON.values(), ids=NO_JSON.keys())
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_a_body_that_is_no_json_object_in_utf_8_is_a_400(scripted: Gateway, path: str, body: bytes) -> None:
    answer = answered(scripted, post(body, path=path))
    assert answer.status == 400
    assert "no JSON object" in answer.error["message"]


@pytest.mark.parametrize("body", nested(150), ids=range(4))
def test_what_is_nested_less_deep_is_refused_as_well(scripted: Gateway, body: bytes) -> None:
    assert answered(scripted, post(body)).status in (400, 422)


NUMBERS = ["NaN", "Infinity", "-Infinity", "1e308", "1e400", "-1", "1" + "0" * 400, "true", '"1"', "[1]", "{}"]


@pytest.mark.parametrize("number", NUMBERS, ids=[n[:10] for n in NUMBERS])
@pytest.mark.parametrize("field", ["n", "max_tokens", "max_completion_tokens", "temperature", "top_p", "seed"])
def test_an_absurd_number_is_refused_by_the_name_of_its_field(scripted: Gateway, field: str, number: str) -> None:
    messages = [{"role": "user", "content": QUESTION}]
    body = json.dumps({"model": "teacher", "messages": messages, field: 0}).replace(f'"{field}": 0', f'"{field}": {number}')
    answer = answered(scripted, post(body.encode(), path=CHAT))
    assert answer.status == 422
    assert answer.error["param"] == field


@pytest.mark.parametrize("field", ["n", "temperature"])
def test_a_number_of_five_thousand_digits_is_refused(scripted: Gateway, field: str) -> None:
    body = json.dumps(MODEST | {field: None}).replace("null", "1" * 5000)
    assert answered(scripted, post(body.encode())).status in (400, 422)


ROLES = ["robot", "tool", "developer", "", "User", "user\\u0000"]
NO_CHATS: list[tuple[str, int, str | None]] = [
    ("[]", 422, "messages"),
    ("{}", 422, "messages"),
    ("null", 422, "messages"),
    ('"x"', 422, "messages"),
    ("[[]]", 422, "messages.0"),
    ('[{"role": "user"}]', 422, "messages.0.content"),
    ('[{"content": "x"}]', 422, "messages.0.role"),
    ('[{"role": "user", "content": null}]', 422, "messages.0.content"),
    ('[{"role": "user", "content": [{"type": "text", "text": "x"}]}]', 422, "messages.0.content"),
    ('[{"role": "user", "content": "x", "name": "y"}]', 422, "messages.0.name"),
    *(
        (f'[{{"role": "{role}", "content": "x"}}]', 422, "messages.0.role")
        for role in ("robot", "tool", "developer", "", "User", "user\\u0000")
    ),
    ('[{"role": "user", "content": ""}]', 422, "messages"),
    ('[{"role": "user", "content": " \\n\\t"}]', 422, "messages"),
]


@pytest.mark.parametrize(("messages", "status", "param"), NO_CHATS)
def test_what_is_no_chat_is_refused_by_the_place_of_the_fault(scripted: Gateway, messages: str, status: int, param: str | None) -> None:
    answer = answered(scripted, post(f'{{"model": "teacher", "messages": {messages}}}'.encode(), path=CHAT))
    assert answer.status == status
    assert param is None or answer.error["param"] == param


@pytest.mark.parametrize("prompt", ["", " ", "\n\n", "\u3000"])
def test_an_empty_prompt_is_refused(scripted: Gateway, prompt: str) -> None:
    answer = answered(scripted, post(json.dumps(MODEST | {"prompt": prompt}).encode()))
    assert (answer.status, answer.error["param"]) == (422, "prompt")


@pytest.mark.parametrize("around", ["\0", "\u200b", "\x7f", "\U0001f600", "\ufeff", "\u202e", "\r\n", "\ufffe", "\u0301"])
def test_odd_characters_are_text_like_any_other(scripted: Gateway, around: str) -> None:
    answer = answered(scripted, post(json.dumps(MODEST | {"prompt": f"{around} migraine {around}"}).encode()))
    assert text_of(answer) == "What should I know about migraine?"
    assert answer.json["usage"]["prompt_characters"] == 2 * len(around) + 10


def test_the_name_of_an_unknown_field_is_told_but_not_all_of_a_long_one(scripted: Gateway) -> None:
    for name in ("a" * 900_000, "a b" * 300_000, "\U0001f600" * 80_000, "a\r\nset-cookie: x", '"', "\u202e"):
        answer = answered(scripted, post(json.dumps(MODEST | {name: 1}).encode()))
        assert answer.status == 422
        assert name[:1] in answer.error["message"] or "\\" in answer.error["message"]
        assert len(answer.body) < 4000
        assert "set-cookie" not in answer.headers


def test_the_name_of_an_unknown_model_is_told_but_not_all_of_a_long_one(scripted: Gateway) -> None:
    answer = answered(scripted, post(json.dumps(MODEST | {"model": "m" * 900_000}).encode()))
    assert (answer.status, answer.error["code"]) == (404, "model_not_found")
    assert len(answer.body) < 1000


@pytest.mark.parametrize(
    "content_type",
    [None, "", "text/plain", "text/json", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "application/jsonl"]
    + [f"application/json; charset={name}" for name in ("latin-1", "utf-16", "utf-7", "x" * 1000)],
)
def test_another_content_type_or_charset_is_a_415(scripted: Gateway, content_type: str | None) -> None:
    assert answered(scripted, post(MODEST_BODY, content_type=content_type)).status == 415


@pytest.mark.parametrize("content_type", ["application/json; charset=utf-8", 'APPLICATION/JSON;charset="UTF-8"', "application/json;"])
def test_json_in_utf_8_may_be_named_in_any_of_its_ways(scripted: Gateway, content_type: str) -> None:
    assert text_of(answered(scripted, post(MODEST_BODY, content_type=content_type))) == ANSWER


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "zstd", "gzip, identity", "x"])
def test_a_compressed_body_is_a_415_whatever_is_in_it(scripted: Gateway, encoding: str) -> None:
    bomb = b"\x1f\x8b\x08\0\0\0\0\0\0\xff" + b"\xed\xc1\x01\r\0\0\0\xc2\xa0\xf7Om\x0f\x07\x14" * 50
    assert answered(scripted, post(bomb, more=b"content-encoding: %s\r\n" % encoding.encode())).status == 415


def body_of(size: int) -> bytes:
    """A body of exactly so many bytes that would be answered."""
    return json.dumps(MODEST | {"user": "u" * (size - len(json.dumps(MODEST | {"user": ""})))}).encode()


@pytest.mark.parametrize("with_length", [True, False])
def test_a_body_of_the_limit_is_answered_and_one_of_a_byte_more_is_a_413(scripted: Gateway, with_length: bool) -> None:
    def ask(size: int) -> Answer:
        body = body_of(size)
        assert len(body) == size
        if with_length:
            return answered(scripted, post(body))
        pieces = [body[at : at + 60_000] for at in range(0, size, 60_000)]
        return answered(scripted, post(chunked(*pieces), length=-1, more=b"transfer-encoding: chunked\r\n"))

    assert text_of(ask(LIMIT)) == ANSWER
    refused = ask(LIMIT + 1)
    assert refused.status == 413
    assert str(LIMIT) in refused.error["message"]


@pytest.mark.parametrize("length", [LIMIT + 1, 10**12, 2**64 - 1])
def test_a_body_that_is_said_to_be_too_large_is_not_waited_for(scripted: Gateway, length: int) -> None:
    assert answered(scripted, post(b"{", length=length)).status == 413


def test_a_body_shorter_than_said_is_not_answered_when_the_client_goes(scripted: Gateway) -> None:
    assert exchange(scripted, post(MODEST_BODY, length=len(MODEST_BODY) + 10), half_close=True) == []


def test_a_body_longer_than_said_is_cut_and_the_rest_is_no_request(scripted: Gateway) -> None:
    for close in (True, False):
        for answer in exchange(scripted, post(MODEST_BODY, length=20, close=close)):
            assert answer.status == 400


CHUNKED_GARBAGE = {
    "no size": MODEST_BODY,
    "a negative size": b"-1\r\n" + MODEST_BODY,
    "a size in decimals": b"%d.5\r\n%s\r\n0\r\n\r\n" % (len(MODEST_BODY), MODEST_BODY),
    "a size over 64 bits": b"1" + b"0" * 16 + b"\r\n" + MODEST_BODY,
    "a size of 1000 digits": b"f" * 1000 + b"\r\n",
    "no end of a chunk": b"5\r\n{" + MODEST_BODY,
    "null bytes": b"\0" * 100,
}


@pytest.mark.parametrize("body", CHUNKED_GARBAGE.values(), ids=CHUNKED_GARBAGE.keys())
def test_garbage_where_chunks_should_be_is_a_400_or_a_closed_connection(scripted: Gateway, body: bytes) -> None:
    answers = exchange(scripted, post(body, length=-1, more=b"transfer-encoding: chunked\r\n"))
    assert [a.status for a in answers] in ([], [400])


REQUESTS = {
    "no HTTP": b"hello\r\n\r\n",
    "the begin of TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 200,
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "an unknown method": b"FOO /v1/models HTTP/1.1\r\nhost: x\r\n\r\n",
    "a tunnel": b"CONNECT engine:8000 HTTP/1.1\r\nhost: x\r\n\r\n",
    "two lengths": post(MODEST_BODY, more=b"content-length: 5\r\n"),
    "length and chunks": post(MODEST_BODY, more=b"transfer-encoding: chunked\r\n"),
    "an unknown transfer": post(MODEST_BODY, length=-1, more=b"transfer-encoding: gzip\r\n"),
    "a negative length": post(MODEST_BODY, length=-5),
    "a length of 5000 digits": post(MODEST_BODY, length=-1, more=b"content-length: " + b"9" * 5000 + b"\r\n"),
    "a length that is no number": post(MODEST_BODY, length=-1, more=b"content-length: \xb2\r\n"),
    "a blank in a header's name": post(MODEST_BODY, more=b"x y: z\r\n"),
    "a null byte in a header": post(MODEST_BODY, more=b"x: \0\r\n"),
    "a folded header": post(MODEST_BODY, more=b"x: a\r\n b\r\n"),
    "bare line feeds": post(MODEST_BODY).replace(b"\r\n", b"\n"),
    "a path beyond ASCII": b"GET /v1/\xff HTTP/1.1\r\nhost: x\r\n\r\n",
    "a broken address": b"GET http://[::1/v1/models HTTP/1.1\r\nhost: x\r\n\r\n",
    "a blank in the path": b"GET /v1/ models HTTP/1.1\r\nhost: x\r\n\r\n",
}


@pytest.mark.parametrize("request_bytes", REQUESTS.values(), ids=REQUESTS.keys())
def test_what_is_no_http_is_a_400_in_the_error_shape_or_a_closed_connection(scripted: Gateway, request_bytes: bytes) -> None:
    for answer in exchange(scripted, request_bytes):
        assert answer.status == 400
        assert answer.error["type"] == "invalid_request_error"


@pytest.mark.parametrize("host", [b"[::1", b"x/y?z#", b"\xff", b"a b", b"", b"x:99999999", b"x" * 10_000])
def test_an_odd_host_is_nobodys_concern(scripted: Gateway, host: bytes) -> None:
    for request in (post(MODEST_BODY), b"GET /v1/models HTTP/1.1\r\nhost: teacher\r\nconnection: close\r\n\r\n"):
        answer = answered(scripted, request.replace(b"host: teacher", b"host: " + host))
        assert answer.status in (200, 400)


OFFERS = {
    # Java's HTTP client makes this one with every first request
    "HTTP/2": b"upgrade: h2c\r\nhttp2-settings: AAMAAABkAARAAAAAAAIAAAAA\r\nconnection: upgrade, http2-settings\r\n",
    "a websocket": b"upgrade: websocket\r\nconnection: upgrade\r\nsec-websocket-version: 13\r\n",
}


@pytest.mark.parametrize("offer", OFFERS.values(), ids=OFFERS.keys())
def test_an_offer_of_another_protocol_is_ignored_or_refused_with_its_reason(scripted: Gateway, offer: bytes) -> None:
    with closing(scripted.connect()) as connection:
        connection.sendall(post(MODEST_BODY, more=offer, close=False))
        (answer,) = read_answers(connection, most=1)
    assert answer.status in (200, 400)
    assert "no JSON object" not in str(answer.json)


@pytest.mark.parametrize("pause_s", [0.0, 0.3])
def test_headers_of_100_kb_are_cut_however_they_come(scripted: Gateway, pause_s: float) -> None:
    request = post(MODEST_BODY, more=b"x: " + b"a" * 100_000 + b"\r\n")
    with closing(scripted.connect()) as connection, suppress(ConnectionError):
        connection.sendall(request[:50_000])
        time.sleep(pause_s)
        connection.sendall(request[50_000:])
        assert all(answer.status in (400, 431) for answer in read_answers(connection))


def test_headers_of_20_kb_are_taken(scripted: Gateway) -> None:
    assert text_of(answered(scripted, post(MODEST_BODY, more=b"x: " + b"a" * 20_000 + b"\r\n"))) == ANSWER


def test_endless_headers_behind_a_request_in_flight_are_cut(hurried: Gateway) -> None:
    slow = json.dumps(MODEST | {"prompt": "slow"}).encode()
    most = 32 << 20
    before = hurried.resident_bytes()
    with closing(hurried.connect()) as connection:
        connection.sendall(post(slow, close=False))
        sent = 0
        with suppress(ConnectionError):
            connection.sendall(b"GET /healthz HTTP/1.1\r\n")
            while sent < most:
                line = b"x: " + b"a" * 50_000 + b"\r\n"
                connection.sendall(line)
                sent += len(line)
        assert sent < most
        assert hurried.resident_bytes() - before < most / 2


@pytest.mark.parametrize("line", [b"x: " + b"a" * 50_000 + b"\r\n", b"a" * 50_000], ids=["many", "one"])
@pytest.mark.parametrize(
    "before", [b"%x\r\n%s\r\n0\r\nx: " % (len(MODEST_BODY), MODEST_BODY), b"5;"], ids=["trailers", "extensions of a chunk"]
)
def test_endless_trailers_and_extensions_of_chunks_are_cut(scripted: Gateway, before: bytes, line: bytes) -> None:
    most = 32 << 20
    held = scripted.resident_bytes()
    with closing(scripted.connect()) as connection:
        sent = 0
        with suppress(ConnectionError):
            connection.sendall(post(before, length=-1, more=b"transfer-encoding: chunked\r\n", close=False))
            while sent < most:
                connection.sendall(line)
                sent += len(line)
        assert sent < most
        assert scripted.resident_bytes() - held < most / 2


def test_a_trailer_is_no_header(scripted: Gateway) -> None:
    def ask(trailer: bytes, content_type: str | None) -> list[int]:
        body = chunked(MODEST_BODY).removesuffix(b"\r\n") + trailer + b"\r\n"
        return [
            a.status for a in exchange(scripted, post(body, content_type=content_type, length=-1, more=b"transfer-encoding: chunked\r\n"))
        ]

    assert ask(b"x: y\r\n", "application/json") in ([200], [400])
    assert ask(b"content-encoding: gzip\r\n", "application/json") in ([200], [400])
    assert ask(b"content-type: application/json\r\n", None) in ([415], [400])


def test_clients_that_leave_while_they_wait_leave_their_places_to_others(tmp_path: Path) -> None:
    with teacher(tmp_path / "stderr", "--no-auth", "--delay-s", "0.2", "--max-in-flight", "2", "--max-queue", "6") as gateway:
        for stream in (False, True):
            for _ in range(4):
                with ExitStack() as stack:
                    for number in range(12):
                        connection = stack.enter_context(closing(gateway.connect()))
                        connection.sendall(post(about(number, stream=stream), close=False))
                    time.sleep(0.1)
            with ExitStack() as stack:
                waiting = [stack.enter_context(closing(gateway.connect())) for _ in range(8)]
                assert in_time(lambda: answered(gateway, post(MODEST_BODY)).status == 200)
                for number, connection in enumerate(waiting):
                    connection.sendall(post(about(number)))
                texts = [text_of(answer) for connection in waiting for answer in read_answers(connection)]
            assert texts == [f"What should I know about {word(number)}?" for number in range(8)]
        assert gateway.complaints() == []


def test_a_connection_that_was_answered_before_its_body_came_is_closed_when_it_is_idle(hurried: Gateway) -> None:
    with closing(hurried.connect()) as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\n\r\n")
        assert [answer.status for answer in read_answers(connection, most=1)] == [200]
        time.sleep(0.3)
        with suppress(ConnectionError):  # a machine that stands still meanwhile closes it before
            connection.sendall(b"hello")
            assert connection.recv(65536) == b""


def test_a_head_that_comes_in_parts_behind_another_request_loses_none_of_its_line_ends(scripted: Gateway) -> None:
    head, _, body = post(MODEST_BODY).partition(b"\r\n\r\n")
    with closing(scripted.connect()) as connection:
        connection.sendall(post(MODEST_BODY, close=False) + head)
        for part in (b"\r\n", b"\r\n", body):
            time.sleep(0.2)
            connection.sendall(part)
        assert [text_of(answer) for answer in read_answers(connection)] == [ANSWER, ANSWER]


def test_a_client_that_gives_its_headers_by_the_byte_is_closed_and_holds_up_nobody(hurried: Gateway) -> None:
    with ExitStack() as stack:
        slow = [stack.enter_context(closing(hurried.connect())) for _ in range(20)]
        closed: set[int] = set()
        request = post(MODEST_BODY)
        for byte in range(len(request)):
            for number, connection in enumerate(slow):
                with suppress(ConnectionError):
                    connection.sendall(request[byte : byte + 1])
                    continue
                closed.add(number)
            assert text_of(answered(hurried, request)) == ANSWER
            if len(closed) == len(slow):
                break
            time.sleep(0.1)
        assert len(closed) == len(slow)


def test_a_client_that_says_nothing_is_closed(hurried: Gateway) -> None:
    with closing(hurried.connect()) as connection:
        assert connection.recv(1) == b""
    with closing(hurried.connect()) as connection:
        connection.sendall(post(MODEST_BODY)[:30])
        assert connection.recv(1) == b""


@pytest.mark.parametrize("with_length", [True, False])
def test_a_body_that_comes_by_the_byte_is_a_408_and_a_closed_connection(hurried: Gateway, with_length: bool) -> None:
    head = b"content-length: 500\r\n" if with_length else b"transfer-encoding: chunked\r\n"
    with closing(hurried.connect()) as connection:
        connection.sendall(post(b"", length=-1, more=head, close=False))
        ended = threading.Event()

        def drip() -> None:
            with suppress(OSError):
                while not ended.wait(0.1):
                    connection.sendall(b" " if with_length else b"1\r\n \r\n")

        dripping = threading.Thread(target=drip)
        dripping.start()
        (answer,) = read_answers(connection)
        ended.set()
        dripping.join()
    assert answer.status == 408
    assert answer.error["message"] == "the body did not come within 1 s"


def test_a_connection_whose_request_was_refused_early_can_be_used_again_later(hurried: Gateway) -> None:
    body = body_of(300_000)
    with closing(hurried.connect()) as connection:
        connection.sendall(b"POST /healthz HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body) + body[:1000])
        (refused,) = read_answers(connection, most=1)
        assert refused.status == 405
        connection.sendall(body[1000:])
        time.sleep(2)  # longer than headers may take, and much shorter than a connection may be idle
        connection.sendall(post(MODEST_BODY))
        (answer,) = read_answers(connection)
        assert text_of(answer) == ANSWER


def test_an_empty_line_behind_a_body_is_no_request(hurried: Gateway) -> None:
    # as some clients of old send it; this one waits for its answer for longer than headers may take
    with closing(hurried.connect()) as connection:
        connection.sendall(post(json.dumps(MODEST | {"prompt": "linger migraine"}).encode(), close=False) + b"\r\n")
        time.sleep(0.3)
        connection.sendall(b"\r\n")
        (answer,) = read_answers(connection, most=1)
    assert text_of(answer) == "What should I know about migraine and linger?"


@pytest.mark.parametrize(("stream", "n"), [(True, 2), (False, 64)])
def test_a_client_that_never_reads_is_closed_and_what_it_held_is_freed(hurried: Gateway, stream: bool, n: int) -> None:
    # more than the buffers of both ends hold
    request = post(json.dumps(MODEST | {"prompt": "long", "n": n, "stream": stream}).encode(), close=False)
    asked = {"stream": stream, "n": n, "prompt_characters": len("long")}
    before = hurried.open_files()
    with ExitStack() as stack:
        for _ in range(3):
            connection = stack.enter_context(closing(socket.socket()))
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(("127.0.0.1", hurried.port))
            connection.sendall(request)
        assert in_time(lambda: sum(asked.items() <= line.items() for line in hurried.told()) == 3)
        assert in_time(lambda: hurried.open_files() <= before, 20)


def test_ten_thousand_idle_connections_hold_up_nobody(scripted: Gateway) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    many = 10_000 if hard == resource.RLIM_INFINITY else min(10_000, hard - 1000)
    if many < 10_000:
        print(f"only {many} connections: a process may open no more than {hard} files here")
    idle: list[socket.socket] = []
    try:
        for number in range(many):
            connection = scripted.connect()
            # closed with a reset, so that no ports stay taken for a minute
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            idle.append(connection)
            if number % 1000 == 0:
                assert text_of(answered(scripted, post(MODEST_BODY))) == ANSWER
        # a server closes silent ones after a while; here they are all open at a time, or the machine is very slow
        took = []
        for _ in range(20):
            begun = time.monotonic()
            assert text_of(answered(scripted, post(MODEST_BODY))) == ANSWER
            took.append(time.monotonic() - begun)
        print(f"{len(idle)} idle connections, {scripted.open_files()} files open in the server, slowest answer {max(took):.3f} s")
        assert sorted(took)[10] < 1
    finally:
        for connection in idle:
            connection.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert in_time(lambda: scripted.open_files() < 200)


def test_http_1_0_gets_its_answer_and_a_closed_connection(scripted: Gateway) -> None:
    assert text_of(answered(scripted, post(MODEST_BODY, version="1.0", close=False))) == ANSWER


def test_http_1_0_gets_no_stream_in_a_framing_that_it_does_not_know(scripted: Gateway) -> None:
    answer = answered(scripted, post(json.dumps(MODEST | {"stream": True}).encode(), version="1.0", close=False))
    assert (answer.status, answer.error["param"]) == (422, "stream")


def word(number: int) -> str:
    """A word of its own for every number, in letters alone, as the scripted engine reads them."""
    return "word" + "".join(chr(ord("a") + int(digit)) for digit in f"{number:05d}")


def about(number: int, *, stream: bool = False) -> bytes:
    return json.dumps(MODEST | {"prompt": word(number), "stream": stream}).encode()


def streamed(body: bytes) -> str:
    """The text of a streamed completion that has come to its end."""
    events = [event.removeprefix(b"data: ") for event in body.split(b"\n\n") if event]
    assert events.pop() == b"[DONE]"
    return "".join(choice["text"] for event in events for choice in json.loads(event)["choices"])


def test_pipelined_requests_get_their_own_answers_in_order(scripted: Gateway) -> None:
    many = 12
    requests = [post(about(i, stream=i % 3 == 0), close=i == many - 1) for i in range(many)]
    answers = exchange(scripted, b"".join(requests))
    texts = [streamed(a.body) if i % 3 == 0 else text_of(a) for i, a in enumerate(answers)]
    assert texts == [f"What should I know about {word(i)}?" for i in range(many)]


def test_hundreds_of_pipelined_requests_get_their_own_answers_in_order_or_a_closed_connection(scripted: Gateway) -> None:
    answers = exchange(scripted, b"".join(post(about(i), close=False) for i in range(300)))
    assert [text_of(a) for a in answers] == [f"What should I know about {word(i)}?" for i in range(len(answers))]


def test_a_client_that_leaves_with_pipelined_requests_is_no_error(hurried: Gateway) -> None:
    pausing = json.dumps(MODEST | {"prompt": "pause"}).encode()
    for stream in (True, False):
        before = hurried.open_files()
        with closing(hurried.connect()) as connection:
            connection.sendall(post(pausing, close=False) + post(about(1, stream=stream), close=False) + post(MODEST_BODY))
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            time.sleep(0.1)
        time.sleep(1)
        assert in_time(lambda before=before: hurried.open_files() <= before)  # type: ignore[misc]


def test_a_refused_request_between_two_pipelined_ones_is_answered_in_its_place(scripted: Gateway) -> None:
    sent = post(about(1), close=False) + post(b"{", close=False) + post(about(2))
    first, refused, last = exchange(scripted, sent)
    assert (text_of(first), refused.status, text_of(last)) == (
        f"What should I know about {word(1)}?",
        400,
        f"What should I know about {word(2)}?",
    )


def test_a_client_that_half_closes_gets_its_answer_or_a_closed_connection(scripted: Gateway) -> None:
    for answer in exchange(scripted, post(MODEST_BODY, close=False), half_close=True):
        assert text_of(answer) == ANSWER


@pytest.mark.parametrize("workers", [1, 2])
def test_clients_that_ask_at_once_get_their_own_answers_whatever_others_do(tmp_path: Path, workers: int) -> None:
    """64 clients, ten questions each on one connection; a third of them leave in the middle of some and come again."""
    chance = random.Random(7)
    plans = [
        [(client * 100 + i, chance.random() < 0.5, client % 3 == 0 and chance.random() < 0.4) for i in range(10)] for client in range(64)
    ]

    async def client(port: int, plan: list[tuple[int, bool, bool]]) -> int:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        right = 0
        for number, stream, leaves in plan:
            writer.write(post(about(number, stream=stream), close=False))
            await writer.drain()
            if leaves:
                await asyncio.sleep(number % 7 / 100)
                writer.transport.abort()
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                continue
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200"), head
            if stream:
                body = b""
                while size := int(await reader.readline(), 16):
                    body += await reader.readexactly(size)
                    await reader.readline()
                await reader.readline()
                text = streamed(body)
            else:
                (length,) = (int(line.split(b":")[1]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
                text = json.loads(await reader.readexactly(length))["choices"][0]["text"]
            assert text == f"What should I know about {word(number)}?"
            right += 1
        writer.close()
        return right

    async def all_at_once(port: int) -> int:
        return sum(await asyncio.gather(*(client(port, plan) for plan in plans)))

    with teacher(tmp_path / "stderr", "--no-auth", "--delay-s", "0.05", "--workers", str(workers)) as gateway:
        asked = sum(not leaves for plan in plans for _, _, leaves in plan)
        assert asked > 500
        assert asyncio.run(asyncio.wait_for(all_at_once(gateway.port), 60)) == asked
        assert gateway.complaints() == []
