"""The client of an OpenAI-compatible API: what it sends, what it makes of every kind of answer, how long it waits."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import httpx
import pytest

from shared.contracts import Completion, GenerationRequest, Message, Sampling
from shared.errors import RequestRefused, SettingsError, TeacherError, TeacherRejected, TeacherUnavailable
from shared.http.client import HttpEngine

URL = "http://teacher.example/v1"
KEY = "sk-very-secret"
CHAT = GenerationRequest(messages=(Message(role="user", content="hello"),), n=2, sampling=Sampling(max_tokens=5, temperature=0.5))
PLAIN = GenerationRequest(prompt="hello", sampling=Sampling(stop=("\n",), seed=7))
OK = {"choices": [{"index": 0, "message": {"content": "one"}, "finish_reason": "stop"}]}


class Server:
    """A transport that answers from a list, the last answer for ever; keeps requests and pauses."""

    def __init__(self, *answers: httpx.Response | Exception) -> None:
        self.answers, self.requests, self.pauses = list(answers), [], []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)

    def ask(self, request: GenerationRequest = CHAT, **options: Any) -> list[Completion]:
        protocol = "chat" if request.messages else "completions"
        options = {"model": "m", "protocol": protocol, "api_key": KEY, "max_attempts": 3, "url": URL, **options}

        async def run() -> list[Completion]:
            engine = HttpEngine(options.pop("url"), transport=httpx.MockTransport(self), sleep=self.sleep, **options)
            try:
                return await engine.generate(request)
            finally:
                await engine.aclose()

        return asyncio.run(run())


def answer(status: int = 200, *, headers: dict[str, str] | None = None, **content: Any) -> httpx.Response:
    return httpx.Response(status, headers=headers, **(content or {"json": OK}))


def choices(*finish_reasons: str | None) -> httpx.Response:
    made = [{"index": i, "message": {"content": f"text {i}"}, "finish_reason": r} for i, r in enumerate(finish_reasons)]
    return answer(json={"choices": made})


def failure(server: Server, **options: Any) -> TeacherError:
    with pytest.raises(TeacherError) as caught:
        server.ask(**options)
    assert KEY not in str(caught.value)
    return caught.value


def test_a_chat_is_asked_with_the_standard_fields_alone() -> None:
    server = Server(choices("stop", "length"))
    assert server.ask() == [Completion(text="text 0", finish_reason="stop"), Completion(text="text 1", finish_reason="length")]
    (request,) = server.requests
    assert str(request.url) == f"{URL}/chat/completions"
    assert request.headers["authorization"] == f"Bearer {KEY}"
    expected = {"model": "m", "n": 2, "max_tokens": 5, "temperature": 0.5, "top_p": 1.0, "messages": [{"role": "user", "content": "hello"}]}
    assert httpx.Response(200, content=request.content).json() == expected


def test_a_plain_prompt_is_asked_with_the_standard_fields_alone() -> None:
    server = Server(answer(json={"choices": [{"index": 0, "text": " one", "finish_reason": "stop", "logprobs": {"x": 1}}], "usage": {}}))
    assert server.ask(PLAIN, api_key=None) == [Completion(text=" one", finish_reason="stop")]
    (request,) = server.requests
    assert str(request.url) == f"{URL}/completions"
    assert "authorization" not in request.headers
    expected = {"model": "m", "n": 1, "max_tokens": 48, "temperature": 0.0, "top_p": 1.0, "prompt": "hello", "stop": ["\n"], "seed": 7}
    assert httpx.Response(200, content=request.content).json() == expected


def test_one_filtered_answer_does_not_cost_the_others() -> None:
    server = Server(choices("content_filter", "stop"))
    assert server.ask() == [Completion(text="text 1", finish_reason="stop")]


def test_a_slash_at_the_end_of_the_url_changes_nothing() -> None:
    server = Server(choices("stop"))
    server.ask(url=URL + "/")
    assert str(server.requests[0].url) == f"{URL}/chat/completions"


def test_choices_are_put_in_the_order_of_their_index_and_more_than_asked_for_are_left_out() -> None:
    mixed = [{"index": i, "message": {"content": str(i)}, "finish_reason": "stop"} for i in (2, 0, 1)]
    assert [c.text for c in Server(answer(json={"choices": mixed})).ask()] == ["0", "1"]


def test_a_server_that_ignores_n_gives_what_it_has() -> None:
    assert len(Server(choices("stop")).ask()) == 1


def test_null_content_is_an_empty_answer() -> None:
    server = Server(answer(json={"choices": [{"message": {"role": "assistant", "content": None}, "finish_reason": "stop"}]}))
    assert server.ask() == [Completion(text="", finish_reason="stop")]


@pytest.mark.parametrize("reason", ["content_filter", "tool_calls", None])
def test_an_answer_that_ended_in_another_way_is_refused_by_its_reason(reason: str | None) -> None:
    error = failure(Server(choices(reason, reason)))
    assert isinstance(error, RequestRefused)
    assert repr(reason) in str(error)


@pytest.mark.parametrize(
    "passing", [answer(429), answer(500), answer(503), answer(408), httpx.ConnectError("refused"), httpx.ReadError("reset")]
)
def test_what_may_pass_is_tried_again(passing: httpx.Response | Exception) -> None:
    server = Server(passing, passing, answer())
    assert server.ask()[0].text == "one"
    assert len(server.pauses) == 2
    assert server.pauses[0] <= 0.5
    assert server.pauses[1] <= 1.0


def test_after_all_attempts_the_teacher_is_unavailable_and_the_error_tells_where_what_and_how_often() -> None:
    server = Server(answer(503, text="overloaded"))
    error = failure(server)
    assert isinstance(error, TeacherUnavailable)
    assert len(server.requests) == 3
    for part in (URL, "503", "overloaded", "attempt 3 of 3"):
        assert part in str(error)


def test_retry_after_in_seconds_is_heeded_with_some_jitter() -> None:
    server = Server(answer(429, headers={"retry-after": "7"}), answer())
    server.ask()
    assert 7 <= server.pauses[0] <= 7.5


def test_retry_after_as_a_date_is_heeded() -> None:
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True)
    server = Server(answer(503, headers={"retry-after": date}), answer())
    server.ask()
    assert 20 <= server.pauses[0] <= 31


@pytest.mark.parametrize("header", ["86400", format_datetime(datetime.now(UTC) + timedelta(days=1), usegmt=True), "inf"])
def test_a_retry_after_of_a_day_is_cut_to_a_minute(header: str) -> None:
    server = Server(answer(429, headers={"retry-after": header}), answer())
    server.ask()
    assert server.pauses == [60]


@pytest.mark.parametrize("header", ["soon", "nan", ""])
def test_a_retry_after_without_sense_is_passed_over(header: str) -> None:
    server = Server(answer(429, headers={"retry-after": header}), answer())
    server.ask()
    assert server.pauses[0] <= 0.5


def test_a_retry_after_in_the_past_is_no_reason_to_wait() -> None:
    server = Server(answer(429, headers={"retry-after": "Mon, 01 Jan 2001 00:00:00 GMT"}), answer())
    server.ask()
    assert server.pauses[0] <= 0.5


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_refused_request_is_refused_alone_and_not_repeated(status: int) -> None:
    server = Server(answer(status, text="too long"))
    error = failure(server)
    assert isinstance(error, RequestRefused)
    assert "too long" in str(error)
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("status", "remedy"),
    [(401, "API key"), (403, "API key"), (404, "/v1"), (404, "'m'"), (307, "somewhere else"), (418, "OpenAI-compatible")],
)
def test_a_teacher_that_rejects_is_not_asked_again_and_the_error_names_the_remedy(status: int, remedy: str) -> None:
    server = Server(answer(status, text=f"no, not with {KEY} " + "x" * 500))
    error = failure(server)
    assert isinstance(error, TeacherRejected)
    assert not isinstance(error, RequestRefused)
    for part in (URL, str(status), remedy, "no, not with ***"):
        assert part in str(error)
    assert "x" * 201 not in str(error)
    assert len(server.requests) == 1


def test_a_page_of_html_is_told_from_an_api() -> None:
    error = failure(Server(answer(html="<html>Welcome</html>")))
    assert type(error) is TeacherRejected
    for part in ("text/html", "Welcome", "/v1"):
        assert part in str(error)


@pytest.mark.parametrize(
    "body", [[], {"object": "list"}, {"choices": "x"}, {"choices": [1]}, {"choices": [{"finish_reason": "stop"}]}, "hello"]
)
def test_json_of_another_shape_is_told_from_an_api(body: Any) -> None:
    error = failure(Server(answer(json=body)))
    assert type(error) is TeacherRejected
    assert "OpenAI-compatible" in str(error)


def test_a_request_of_the_other_protocol_is_refused() -> None:
    assert isinstance(failure(Server(answer()), request=PLAIN, protocol="chat"), RequestRefused)
    assert isinstance(failure(Server(answer()), request=CHAT, protocol="completions"), RequestRefused)


@pytest.mark.parametrize(
    "url", ["teacher.example/v1", "ftp://teacher/v1", "http://", "", "http://user:password@teacher/v1", "http://[::1/v1"]
)
def test_what_is_no_url_is_refused_at_once_without_showing_a_password(url: str) -> None:
    with pytest.raises(SettingsError, match="teacher URL") as caught:
        HttpEngine(url, model="m")
    assert "password@" not in str(caught.value)


def test_a_key_no_header_can_hold_is_refused_without_being_shown() -> None:
    with pytest.raises(SettingsError, match="api_key") as caught:
        HttpEngine(URL, model="m", api_key="geheim\nschlüssel")
    assert "geheim" not in str(caught.value)


@pytest.fixture
def mute_port() -> Iterator[int]:
    """A port where connections are taken and nothing is ever said."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


@pytest.fixture
def babbling_port() -> Iterator[int]:
    """A port that says something that is not HTTP, and hangs up."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def babble() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    connection.recv(65536)
                    connection.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")

        threading.Thread(target=babble, daemon=True).start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)


def ask_for_real(port: int, **options: Any) -> TeacherError:
    """The error of one real request to a port of this machine."""

    async def run() -> None:
        engine = HttpEngine(f"http://127.0.0.1:{port}/v1", model="m", max_attempts=1, **options)
        try:
            await engine.generate(CHAT)
        finally:
            await engine.aclose()

    with pytest.raises(TeacherError) as caught:
        asyncio.run(run())
    return caught.value


def test_a_port_where_nobody_listens_is_unavailable() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    error = ask_for_real(port)
    assert isinstance(error, TeacherUnavailable)
    assert str(port) in str(error)


def test_a_teacher_that_never_answers_is_unavailable_after_the_timeout(mute_port: int) -> None:
    error = ask_for_real(mute_port, timeout_s=0.2)
    assert isinstance(error, TeacherUnavailable)
    assert "0.2 s" in str(error)


def test_a_server_that_speaks_no_http_is_unavailable(babbling_port: int) -> None:
    assert isinstance(ask_for_real(babbling_port), TeacherUnavailable)


def test_a_proxy_of_the_environment_is_not_asked_for_loopback_urls(monkeypatch: pytest.MonkeyPatch, mute_port: int) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://proxy.invalid:3128")
    monkeypatch.setenv("ALL_PROXY", "http://proxy.invalid:3128")
    assert "0.2 s" in str(ask_for_real(mute_port, timeout_s=0.2))


def checked(handler: Callable[[httpx.Request], httpx.Response]) -> None:
    async def run() -> None:
        engine = HttpEngine(URL, model="m", transport=httpx.MockTransport(handler))
        try:
            await engine.check()
        finally:
            await engine.aclose()

    asyncio.run(run())


def test_check_lists_the_models_once() -> None:
    server = Server(answer(json={"data": []}))
    checked(server)
    assert [str(r.url) for r in server.requests] == [f"{URL}/models"]
    server = Server(answer(503))
    with pytest.raises(TeacherUnavailable):
        checked(server)
    assert len(server.requests) == 1
