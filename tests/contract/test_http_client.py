"""The client of an OpenAI-compatible API: what it sends in its one attempt, and what it makes of every kind of answer."""

from __future__ import annotations

import asyncio
import gzip
import json
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from teachers import self_signed

from shared.contracts import Completion, GenerationRequest, Message, Sampling
from shared.errors import (
    NotTheApi,
    RequestForbidden,
    RequestRefused,
    SettingsError,
    TeacherBusy,
    TeacherError,
    TeacherFailed,
    TeacherLate,
    TeacherRejected,
    TeacherUnavailable,
)
from shared.harvest.teacher import Answer, Refusal
from shared.http.client import LONGEST_S, MAX_BODY_BYTES, OpenAITeacher, retry_after

URL = "http://teacher.example/v1"
KEY = "sk-very-secret"
CHAT = GenerationRequest(messages=(Message(role="user", content="hello"),), n=2, sampling=Sampling(max_tokens=5, temperature=0.5))
PLAIN = GenerationRequest(prompt="hello", sampling=Sampling(stop=("\n",), seed=7))
OK = {"choices": [{"index": 0, "message": {"content": "one"}, "finish_reason": "stop"}]}
ONE = (Completion(text="one", finish_reason="stop"),)


class Server:
    """A transport with one answer for all; keeps the requests."""

    def __init__(self, answer: httpx.Response | Exception) -> None:
        self.answer, self.requests = answer, []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    def ask(self, request: GenerationRequest = CHAT, *, url: str = URL, **options: Any) -> Answer:
        protocol = "chat" if request.messages else "completions"
        return asked(request, url, **{"protocol": protocol, "api_key": KEY, "transport": httpx.MockTransport(self), **options})


def asked(request: GenerationRequest, url: str, **options: Any) -> Answer:
    """What one attempt comes to."""

    async def run() -> Answer:
        teacher = OpenAITeacher(url, **{"model": "m", **options})
        try:
            return await teacher.ask(request)
        finally:
            await teacher.aclose()

    return asyncio.run(run())


def answer(status: int = 200, *, headers: dict[str, str] | None = None, **content: Any) -> httpx.Response:
    return httpx.Response(status, headers=headers, **(content or {"json": OK}))


def choices(*finish_reasons: str | None) -> httpx.Response:
    made = [{"index": i, "message": {"content": f"text {i}"}, "finish_reason": r} for i, r in enumerate(finish_reasons)]
    return answer(json={"choices": made})


def said(message: dict[str, Any] | None, finish_reason: str | None = "stop") -> Completion | Refusal:
    """What becomes of the one choice with this message."""
    choice = {"index": 0, "message": message, "finish_reason": finish_reason}
    (found,) = Server(answer(json={"choices": [choice]})).ask().choices
    return found


def failure(server: Server, **options: Any) -> TeacherError:
    with pytest.raises(TeacherError) as caught:
        server.ask(**options)
    assert KEY not in str(caught.value)
    return caught.value


def test_a_chat_is_asked_with_the_standard_fields_alone() -> None:
    server = Server(choices("stop", "length"))
    assert server.ask().choices == (
        Completion(text="text 0", finish_reason="stop"),
        Completion(text="text 1", finish_reason="length"),
    )
    (request,) = server.requests
    assert str(request.url) == f"{URL}/chat/completions"
    assert request.headers["authorization"] == f"Bearer {KEY}"
    expected = {"model": "m", "n": 2, "max_tokens": 5, "temperature": 0.5, "top_p": 1.0, "messages": [{"role": "user", "content": "hello"}]}
    assert json.loads(request.content) == expected


def test_a_plain_prompt_is_asked_with_the_standard_fields_alone() -> None:
    server = Server(answer(json={"choices": [{"index": 0, "text": " one", "finish_reason": "stop", "logprobs": {"x": 1}}], "usage": {}}))
    assert server.ask(PLAIN, api_key=None).choices == (Completion(text=" one", finish_reason="stop"),)
    (request,) = server.requests
    assert str(request.url) == f"{URL}/completions"
    assert "authorization" not in request.headers
    expected = {"model": "m", "n": 1, "max_tokens": 48, "temperature": 0.0, "top_p": 1.0, "prompt": "hello", "stop": ["\n"], "seed": 7}
    assert json.loads(request.content) == expected


def test_what_a_person_is_shown_is_what_is_sent_but_for_the_values_of_headers() -> None:
    server = Server(answer())
    server.ask(api_key=KEY)

    async def rendered() -> str:
        teacher = OpenAITeacher(URL, model="m", api_key=KEY)
        try:
            return teacher.rendered(CHAT)
        finally:
            await teacher.aclose()

    shown = asyncio.run(rendered())
    first, headers, body = shown.split("\n", 2)
    assert first == f"POST {URL}/chat/completions"
    assert json.loads(body) == json.loads(server.requests[0].content)
    assert "authorization" in headers
    assert KEY not in shown


def test_a_filtered_answer_keeps_its_place_and_does_not_cost_the_others() -> None:
    filtered, other = Server(choices("content_filter", "stop")).ask().choices
    assert isinstance(filtered, Refusal)
    assert filtered.kind == "content_filter"
    assert other == Completion(text="text 1", finish_reason="stop")


def test_a_slash_at_the_end_of_the_url_changes_nothing() -> None:
    server = Server(choices("stop"))
    server.ask(url=URL + "/")
    assert str(server.requests[0].url) == f"{URL}/chat/completions"


def test_choices_are_put_in_the_order_of_their_index_and_more_than_asked_for_are_left_out() -> None:
    mixed = [{"index": i, "message": {"content": str(i)}, "finish_reason": "stop"} for i in (2, 0, 1)]
    found = Server(answer(json={"choices": mixed})).ask().choices
    assert [choice.text for choice in found if isinstance(choice, Completion)] == ["0", "1"]


@pytest.mark.parametrize("index", [None, "1", 1.5, [], True])
def test_an_index_without_sense_is_passed_over(index: Any) -> None:
    strange = [{"index": index, "message": {"content": str(i)}, "finish_reason": "stop"} for i in (0, 1)]
    assert len(Server(answer(json={"choices": strange})).ask().choices) == 2


@pytest.mark.parametrize("reasons", [("stop",), ()])
def test_a_server_that_ignores_n_gives_what_it_has(reasons: tuple[str, ...]) -> None:
    assert len(Server(choices(*reasons)).ask().choices) == len(reasons)


def test_null_content_is_an_empty_answer() -> None:
    assert said({"role": "assistant", "content": None}) == Completion(text="", finish_reason="stop")
    assert said({"role": "assistant"}) == Completion(text="", finish_reason="stop")


@pytest.mark.parametrize(
    ("message", "finish_reason", "kind"),
    [
        ({"content": None, "tool_calls": [{"function": {"name": "look_up"}}]}, "tool_calls", "no_text"),
        ({"content": 42}, "stop", "no_text"),
        ({"content": {"text": "hello"}}, "stop", "no_text"),
        ({"content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]}, "stop", "no_text"),
        (None, "stop", "no_text"),
        ({"content": "half an ans"}, None, "refused"),
        ({"content": "text"}, "tool_calls", "refused"),
        ({"content": "text"}, "function_call", "refused"),
        ({"content": None}, "content_filter", "content_filter"),
        ({"content": "some of it"}, "content_filter", "content_filter"),
        ({"content": None, "refusal": "I cannot help with that."}, "stop", "refused"),
    ],
)
def test_what_is_no_whole_text_is_a_refusal_of_its_class(message: dict[str, Any] | None, finish_reason: str | None, kind: str) -> None:
    found = said(message, finish_reason)
    assert isinstance(found, Refusal)
    assert found.kind == kind
    assert found.reason.startswith(f"{kind}: ")


def test_a_refusal_tells_what_the_teacher_said_and_how_it_ended() -> None:
    assert "I cannot help" in said({"content": None, "refusal": "I cannot help with that."}).reason  # type: ignore[union-attr]
    assert "'tool_calls'" in said({"content": "text"}, "tool_calls").reason  # type: ignore[union-attr]
    assert "image_url" in said({"content": [{"type": "image_url"}]}).reason  # type: ignore[union-attr]
    assert "***" in said({"content": None, "refusal": f"not with {KEY}"}).reason  # type: ignore[union-attr]


def test_half_a_surrogate_pair_in_an_answer_is_an_answer() -> None:
    body = json.dumps({"choices": [{"message": {"content": "caf\ud800"}, "finish_reason": "stop"}]}).encode()
    assert Server(answer(content=body)).ask().choices == (Completion(text="caf\ud800", finish_reason="stop"),)


def test_half_a_surrogate_pair_in_a_prompt_is_this_requests_own_fault() -> None:
    broken = GenerationRequest(messages=(Message(role="user", content="caf\ud800"),))
    assert isinstance(failure(Server(answer()), request=broken), RequestRefused)


@pytest.mark.parametrize(
    ("usage", "counted"),
    [
        ({"prompt_tokens": 11, "completion_tokens": 7, "total_tokens": 18}, (11, 7)),
        ({"prompt_tokens": 0, "completion_tokens": 0}, (0, 0)),
        ({"prompt_tokens": 11}, (11, None)),
        ({"prompt_characters": 11}, (None, None)),
        ({"prompt_tokens": -1, "completion_tokens": 1.5}, (None, None)),
        ({"prompt_tokens": "11", "completion_tokens": None}, (None, None)),
        ({"prompt_tokens": 10**400, "completion_tokens": 10**9}, (None, 10**9)),
        ([], (None, None)),
        (None, (None, None)),
    ],
)
def test_usage_is_what_the_teacher_says_if_it_makes_sense(usage: Any, counted: tuple[int | None, int | None]) -> None:
    found = Server(answer(json={**OK, "usage": usage})).ask()
    assert (found.input_tokens, found.output_tokens) == counted


@pytest.mark.parametrize(
    ("reply", "kind"),
    [
        (answer(429), TeacherBusy),
        (answer(408), TeacherLate),
        (answer(500), TeacherFailed),
        (answer(502, html="<html>Bad gateway</html>"), TeacherFailed),
        (answer(503), TeacherFailed),
        (answer(529), TeacherFailed),
        (httpx.ReadError("reset"), TeacherFailed),
        (httpx.RemoteProtocolError("cut"), TeacherFailed),
        (httpx.ConnectError("refused"), TeacherUnavailable),
    ],
)
def test_what_may_pass_is_unavailable_by_its_class_and_asked_once(reply: httpx.Response | Exception, kind: type[TeacherError]) -> None:
    server = Server(reply)
    assert type(failure(server)) is kind
    assert len(server.requests) == 1


def test_only_what_may_have_been_answered_may_have_been_billed() -> None:
    billed = {name: failure(Server(exc)) for name, exc in {"cut": httpx.ReadError("reset"), "refused": httpx.ConnectError("no")}.items()}
    assert billed["cut"].maybe_billed  # type: ignore[attr-defined]
    assert not billed["refused"].maybe_billed  # type: ignore[attr-defined]


def test_an_error_tells_where_and_what() -> None:
    error = failure(Server(answer(503, text="overloaded")))
    for part in (URL, "503", "overloaded"):
        assert part in str(error)


@pytest.mark.parametrize("status", [429, 503, 408])
def test_a_retry_after_is_told_whatever_it_came_with(status: int) -> None:
    error = failure(Server(answer(status, headers={"retry-after": "7"})))
    assert isinstance(error, TeacherUnavailable)
    assert error.retry_after_s == 7


def test_a_retry_after_may_be_a_date() -> None:
    for zone in ("GMT", "-0000"):
        seconds = retry_after(format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True).replace("GMT", zone))
        assert seconds is not None
        assert 20 <= seconds <= 31


def test_a_retry_after_in_the_past_is_no_reason_to_wait() -> None:
    assert retry_after("Mon, 01 Jan 2001 00:00:00 GMT") == 0
    assert retry_after("-5") == 0


@pytest.mark.parametrize("header", ["inf", "1e300", "99999999999", format_datetime(datetime.now(UTC) + timedelta(days=900), usegmt=True)])
def test_a_retry_after_that_says_never_is_a_number(header: str) -> None:
    assert retry_after(header) == LONGEST_S


@pytest.mark.parametrize("header", [None, "soon", "nan", "", "1 2 3", "Mon, 32 Jan 2001 00:00:00 GMT", "\x00"])
def test_a_retry_after_without_sense_is_none(header: str | None) -> None:
    assert retry_after(header) is None


DATES = st.from_regex(r"[A-Z][a-z]{2}, \d{1,6} [A-Z][a-z]{2} \d{1,6} \d{1,4}:\d{1,4}:\d{1,4} ([A-Z]{3}|[+-]\d{1,12})", fullmatch=True)


@given(st.text(max_size=40) | DATES)
def test_no_retry_after_is_worse_than_none(header: str) -> None:
    seconds = retry_after(header)
    assert seconds is None or 0 <= seconds <= LONGEST_S


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_refused_request_is_refused_alone(status: int) -> None:
    error = failure(Server(answer(status, text="max_tokens is too large")))
    assert isinstance(error, RequestRefused)
    assert "max_tokens is too large" in str(error)


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (400, "context_length_exceeded", "too_long"),
        (413, "payload", "too_long"),
        (400, "content_filter", "content_filter"),
        (400, "invalid_value", "refused"),
        (422, "logprobs", "refused"),
    ],
)
def test_a_refused_request_is_of_the_class_of_its_row_and_costs_nothing(status: int, code: str, kind: str) -> None:
    error = failure(Server(answer(status, json={"error": {"message": "no", "code": code}})))
    assert isinstance(error, RequestRefused)
    assert (error.kind, error.maybe_billed) == (kind, False)


@pytest.mark.parametrize(
    ("status", "remedy", "kind"),
    [
        (401, "API key", TeacherRejected),
        (403, "API key", RequestForbidden),
        (402, "must pay", TeacherRejected),
        (404, "/v1", NotTheApi),
        (404, "'m'", NotTheApi),
        (405, "OpenAI-compatible", NotTheApi),
        (307, "somewhere else", NotTheApi),
        (418, "OpenAI-compatible", NotTheApi),
    ],
)
def test_a_teacher_that_rejects_tells_by_its_class_whom_and_names_the_remedy(status: int, remedy: str, kind: type[TeacherError]) -> None:
    server = Server(answer(status, text=f"no, not with {KEY} " + "x" * 500))
    error = failure(server)
    assert type(error) is kind
    for part in (URL, str(status), remedy, "no, not with ***"):
        assert part in str(error)
    assert "x" * 201 not in str(error)
    assert len(server.requests) == 1


@pytest.mark.parametrize("code", ["insufficient_quota", "billing_hard_limit_reached"])
def test_a_429_of_an_account_without_credit_is_not_waited_for(code: str) -> None:
    error = failure(Server(answer(429, headers={"retry-after": "1"}, json={"error": {"message": "You exceeded your quota", "code": code}})))
    assert type(error) is TeacherRejected
    assert "no credit" in str(error)


def test_a_redirect_is_not_followed_so_that_no_key_goes_elsewhere() -> None:
    server = Server(answer(302, headers={"location": "http://elsewhere.example/v1/chat/completions"}))
    failure(server)
    assert len(server.requests) == 1


def test_a_page_of_html_is_told_from_an_api() -> None:
    error = failure(Server(answer(html="<html>Welcome</html>")))
    assert type(error) is NotTheApi
    for part in ("text/html", "Welcome", "/v1"):
        assert part in str(error)


@pytest.mark.parametrize("body", [[], {"object": "list"}, {"choices": "x"}, {"choices": [1]}, {"choices": None}, "hello", 7, None])
def test_json_of_another_shape_is_told_from_an_api(body: Any) -> None:
    error = failure(Server(answer(json=body)))
    assert type(error) is NotTheApi
    assert "OpenAI-compatible" in str(error)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\x00\xff\xfe",
        b'{"choices": [',
        b'{"choices": [{"message": {"content": "caf\xe9"}, "finish_reason": "stop"}]}',
        b"[" * 100_000,
        b'{"choices": ' + b"9" * 5000 + b"}",
        b'data: {"choices": []}\n\ndata: [DONE]\n\n',
    ],
    ids=["empty", "binary", "cut", "latin-1", "deep", "long number", "stream"],
)
def test_a_body_that_is_no_json_is_quoted_and_told_from_an_api(body: bytes) -> None:
    error = failure(Server(answer(content=body, headers={"content-type": "application/json"})))
    assert type(error) is NotTheApi
    assert "not JSON" in str(error)
    assert len(str(error)) < 600


@pytest.mark.parametrize("charset", ["utf-16", "latin-1", "no-such-charset"])
def test_json_is_utf_8_whatever_charset_its_header_names(charset: str) -> None:
    body = json.dumps({"choices": [{"message": {"content": "café"}, "finish_reason": "stop"}]}, ensure_ascii=False).encode()
    found = Server(answer(content=body, headers={"content-type": f"application/json; charset={charset}"})).ask()
    assert found.choices == (Completion(text="café", finish_reason="stop"),)


def test_a_request_of_the_other_protocol_is_refused() -> None:
    assert isinstance(failure(Server(answer()), request=PLAIN, protocol="chat"), RequestRefused)
    assert isinstance(failure(Server(answer()), request=CHAT, protocol="completions"), RequestRefused)


@pytest.mark.parametrize(
    "url", ["teacher.example/v1", "ftp://teacher/v1", "http://", "", "http://user:password@teacher/v1", "http://[::1/v1"]
)
def test_what_is_no_url_is_refused_at_once_without_showing_a_password(url: str) -> None:
    with pytest.raises(SettingsError, match="teacher URL") as caught:
        OpenAITeacher(url, model="m")
    assert "password@" not in str(caught.value)


def test_a_key_no_header_can_hold_is_refused_without_being_shown() -> None:
    with pytest.raises(SettingsError, match="api_key") as caught:
        OpenAITeacher(URL, model="m", api_key="geheim\nschlüssel")
    assert "geheim" not in str(caught.value)


# over real connections: what a transport in memory cannot show


@contextmanager
def port(says: bytes | None, *, tls: ssl.SSLContext | None = None, abort: bool = False) -> Iterator[int]:
    """A port that reads a request, says these bytes (None: nothing, and keeps the connection) and hangs up."""
    held: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with suppress(OSError):  # ssl.SSLError is one
                    if tls is not None:
                        connection = tls.wrap_socket(connection, server_side=True)
                    connection.recv(65536)
                    if says is None:
                        held.append(connection)
                        continue
                    connection.sendall(says)
                    if abort:
                        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                connection.close()

        thread = threading.Thread(target=serve)
        thread.start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()
    for connection in held:
        connection.close()


def reply(body: bytes, *headers: str, length: int | None = None) -> bytes:
    lines = ["HTTP/1.1 200 OK", "content-type: application/json", f"content-length: {len(body) if length is None else length}", *headers]
    return "\r\n".join([*lines, "connection: close", "", ""]).encode() + body


def real_failure(number: int, *, scheme: str = "http", host: str = "127.0.0.1", **options: Any) -> TeacherError:
    """The error of one real request to a port of this machine."""
    with pytest.raises(TeacherError) as caught:
        asked(CHAT, f"{scheme}://{host}:{number}/v1", **{"timeout_s": 20, **options})
    return caught.value


BODY = json.dumps(OK).encode()


def test_a_port_where_nobody_listens_was_never_reached() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        number = listener.getsockname()[1]
    error = real_failure(number)
    assert type(error) is TeacherUnavailable
    assert not error.maybe_billed
    assert str(number) in str(error)


def test_a_name_that_does_not_exist_was_never_reached() -> None:
    error = real_failure(80, host="no-such-teacher.invalid")
    assert type(error) is TeacherUnavailable
    assert "no-such-teacher.invalid" in str(error)


def test_a_teacher_that_never_answers_is_late_and_may_have_billed() -> None:
    with port(None) as number:
        error = real_failure(number, timeout_s=0.2)
    assert type(error) is TeacherLate
    assert error.maybe_billed
    assert "0.2 s" in str(error)


def test_a_teacher_that_never_ends_its_answer_is_late() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def drip() -> None:
            connection, _ = listener.accept()
            with connection, suppress(OSError):
                connection.recv(65536)
                connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 100000\r\n\r\n")
                while True:
                    connection.sendall(b" ")
                    time.sleep(0.02)

        thread = threading.Thread(target=drip)
        thread.start()
        error = real_failure(listener.getsockname()[1], timeout_s=0.3)
        thread.join()
    assert type(error) is TeacherLate


@pytest.mark.parametrize(
    "says",
    [
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"",
        reply(BODY, length=len(BODY) + 50),
        b'HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\n{"cho',
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
        reply(b"\x1f\x8b no gzip", "content-encoding: gzip"),
    ],
    ids=["no HTTP", "hangs up", "shorter than said", "cut chunk", "bad chunk", "no gzip"],
)
def test_an_answer_that_breaks_off_has_failed_and_may_have_been_billed(says: bytes) -> None:
    with port(says) as number:
        error = real_failure(number)
    assert type(error) is TeacherFailed
    assert error.maybe_billed


@pytest.mark.parametrize("words", ["Service momentanément indisponible".encode("latin-1"), "服务不可用".encode(), b"\xff\xfe", b""])
def test_the_words_behind_a_status_may_be_of_any_bytes(words: bytes) -> None:
    with port(b"HTTP/1.1 503 " + words + b"\r\nretry-after: 3\r\ncontent-length: 0\r\nconnection: close\r\n\r\n") as number:
        error = real_failure(number)
    assert type(error) is TeacherFailed
    assert "HTTP 503" in str(error)
    assert error.retry_after_s == 3
    with port(reply(BODY).replace(b"200 OK", b"200 " + words)) as number:
        assert asked(CHAT, f"http://127.0.0.1:{number}/v1").choices == ONE


def test_a_connection_that_is_reset_in_mid_answer_has_failed() -> None:
    with port(reply(BODY, length=len(BODY) + 50), abort=True) as number:
        assert type(real_failure(number)) is TeacherFailed


def test_an_answer_compressed_though_nobody_asked_for_it_is_read() -> None:
    with port(reply(gzip.compress(BODY), "content-encoding: gzip")) as number:
        assert asked(CHAT, f"http://127.0.0.1:{number}/v1").choices == ONE


def test_an_answer_of_the_most_bytes_is_read_and_one_of_more_is_refused_alone() -> None:
    blanks = b" " * (MAX_BODY_BYTES - len(BODY))
    with port(reply(BODY + blanks)) as number:
        assert asked(CHAT, f"http://127.0.0.1:{number}/v1").choices == ONE
    with port(reply(BODY + blanks + b" ")) as number:
        error = real_failure(number)
    assert isinstance(error, RequestRefused)
    assert (error.kind, error.maybe_billed) == ("over_long", True)
    assert str(MAX_BODY_BYTES) in str(error)


def test_a_compressed_answer_is_measured_by_what_it_becomes() -> None:
    with port(reply(gzip.compress(b" " * (MAX_BODY_BYTES + 1)), "content-encoding: gzip")) as number:
        assert isinstance(real_failure(number), RequestRefused)


def test_a_proxy_of_the_environment_is_not_asked_for_loopback_urls(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://proxy.invalid:3128")
    with port(reply(BODY)) as number:
        assert asked(CHAT, f"http://127.0.0.1:{number}/v1").choices == ONE


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return self_signed(tmp_path_factory.mktemp("tls"))


@pytest.fixture
def tls(certificate: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    return context


def test_a_certificate_that_is_not_trusted_is_rejected_at_once_with_the_remedy(tls: ssl.SSLContext) -> None:
    with port(reply(BODY), tls=tls) as number:
        error = real_failure(number, scheme="https", host="localhost")
    assert type(error) is TeacherRejected
    for part in ("certificate", "SSL_CERT_FILE", str(number)):
        assert part in str(error)


def test_the_remedy_helps(tls: ssl.SSLContext, certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate.with_suffix(".crt")))
    with port(reply(BODY), tls=tls) as number:
        assert asked(CHAT, f"https://localhost:{number}/v1").choices == ONE


def test_a_certificate_of_another_name_is_rejected(tls: ssl.SSLContext, certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate.with_suffix(".crt")))
    with port(reply(BODY), tls=tls) as number:
        error = real_failure(number, scheme="https")
    assert type(error) is TeacherRejected
    assert "certificate" in str(error)


def test_a_server_without_tls_behind_an_https_url_is_rejected_as_that() -> None:
    with port(b"HTTP/1.1 400 Bad Request\r\n\r\n") as number:
        error = real_failure(number, scheme="https")
    assert type(error) is TeacherRejected
    assert "speaks no TLS" in str(error)


# open files


def with_limits(soft: int, hard: int, code: str) -> str:
    """What a process that may have so many files open prints."""
    code = f"""
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}))
from shared.http.client import refuse_too_many
{code}
print(resource.getrlimit(resource.RLIMIT_NOFILE))
"""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout


@pytest.mark.parametrize(("requests", "left"), [(100, (256, 512)), (192, (256, 512)), (193, (512, 512)), (448, (512, 512))])
def test_open_files_are_allowed_for_as_many_requests_as_may_be_in_flight(requests: int, left: tuple[int, int]) -> None:
    assert with_limits(256, 512, f"refuse_too_many({requests}, 'harvest.concurrency')") == f"{left}\n"


def test_more_requests_than_there_may_be_open_files_are_refused_with_the_setting_and_the_remedy() -> None:
    code = """
from shared.errors import SettingsError
try:
    refuse_too_many(449, "harvest.concurrency")
except SettingsError as exc:
    print(exc)
"""
    said = with_limits(256, 512, code)
    for part in ("harvest.concurrency = 449", "no more than 512 files", "lower harvest.concurrency to 448", "ulimit -Hn", "(256, 512)"):
        assert part in said
