"""The gateway's engine: other servers over HTTP, of whom nothing passes but text, and who may be slow, dead, wrong or many."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web

from shared.contracts import Completion, GenerationRequest, Message, Sampling
from shared.engines import Piece, upstream
from shared.engines.upstream import UpstreamEngine
from shared.errors import DistillError, RequestRefused, TeacherBusy, TeacherFailed, TeacherLate, TeacherRejected, TeacherUnavailable

PLAIN = GenerationRequest(
    prompt="prompt-of-a-caller", n=2, sampling=Sampling(max_tokens=5, temperature=0.5, top_p=0.9, stop=("x",), seed=7)
)
CHAT = GenerationRequest(messages=(Message(role="user", content="prompt-of-a-caller"),))
LEAKY = {
    "id": "cmpl-engine",
    "model": "engine-name",
    "system_fingerprint": "vllm-0.32",
    "prompt_logprobs": [1],
    "usage": {"prompt_tokens": 3},
    "choices": [
        {"index": i, "text": f"text {i}", "finish_reason": reason, "stop_reason": 2, "token_ids": [1, 2], "logprobs": {"tokens": ["a"]}}
        for i, reason in enumerate(("stop", "length"))
    ],
}
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Fake:
    """An OpenAI-compatible server whose POSTs `handler` answers; counts them and can be shut and opened again at its port."""

    def __init__(self, handler: Handler) -> None:
        self.handler, self.bodies, self.headers, self.port, self.listed = handler, [], [], 0, {"data": [{"id": "m"}]}
        self.listings, self.models_status = 0, 200
        self._runner: web.AppRunner | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    async def open(self) -> None:
        app = web.Application()
        app.router.add_post("/v1/{path:.*}", self._post)
        app.router.add_get("/v1/models", self._models)
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def shut(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def _post(self, request: web.Request) -> web.StreamResponse:
        self.bodies.append((request.path, await request.json()))
        self.headers.append(dict(request.headers))
        return await self.handler(request)

    async def _models(self, request: web.Request) -> web.Response:
        self.listings += 1
        return web.json_response(self.listed, status=self.models_status)


def answers(status: int = 200, body: Any = LEAKY, headers: dict[str, str] | None = None) -> Handler:
    async def handle(request: web.Request) -> web.StreamResponse:
        text = body if isinstance(body, str) else json.dumps(body)
        return web.Response(status=status, text=text, content_type="application/json", headers=headers)

    return handle


def streams(*events: Any, end: str = "data: [DONE]\n\n", abort: bool = False) -> Handler:
    async def handle(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        for event in events:
            await response.write(f"data: {json.dumps(event)}\n\n".encode())
        if abort and request.transport:
            await asyncio.sleep(0.05)
            request.transport.abort()
            return response
        await response.write(end.encode())
        return response

    return handle


def text_event(index: int, text: str, reason: str | None = None, **more: Any) -> dict[str, Any]:
    return {"choices": [{"index": index, "text": text, "finish_reason": reason, **more}]}


@asynccontextmanager
async def engine_over(*fakes: Fake, timeout_s: float = 10.0) -> AsyncIterator[UpstreamEngine]:
    for fake in fakes:
        await fake.open()
    engine = UpstreamEngine([fake.url for fake in fakes], model="engine-name", api_key="key-of-the-engine", timeout_s=timeout_s)
    try:
        async with engine.probing():
            yield engine
    finally:
        await engine.aclose()
        for fake in fakes:
            await fake.shut()


@pytest.fixture(autouse=True)
def _checked_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream, "KEPT_S", 0)


def run(work: Callable[[], Awaitable[Any]]) -> Any:
    return asyncio.run(work())  # type: ignore[arg-type]


async def streamed(engine: UpstreamEngine, request: GenerationRequest) -> list[Piece]:
    return [piece async for piece in engine.stream(request)]


def generated(handler: Handler, request: GenerationRequest = PLAIN, **options: Any) -> tuple[Any, Fake]:
    """What the engine gives or raises over a server with this handler, and the server."""
    fake = Fake(handler)

    async def ask() -> Any:
        async with engine_over(fake, **options) as engine:
            try:
                return await engine.generate(request)
            except DistillError as exc:
                return exc

    return run(ask), fake


def pieces_of(handler: Handler, request: GenerationRequest = PLAIN, **options: Any) -> tuple[list[Piece], DistillError | None]:
    """The pieces until the end or an error, and that error."""
    found: list[Piece] = []

    async def ask() -> DistillError | None:
        async with engine_over(Fake(handler), **options) as engine:
            try:
                async for piece in engine.stream(request):
                    found.append(piece)
            except DistillError as exc:
                return exc
        return None

    return found, run(ask)


def test_the_server_is_asked_anew_with_the_standard_fields_and_answers_with_texts_alone() -> None:
    found, fake = generated(answers())
    assert found == [Completion(text="text 0", finish_reason="stop"), Completion(text="text 1", finish_reason="length")]
    assert fake.bodies == [
        (
            "/v1/completions",
            {
                "model": "engine-name",
                "prompt": "prompt-of-a-caller",
                "n": 2,
                "max_tokens": 5,
                "temperature": 0.5,
                "top_p": 0.9,
                "stop": ["x"],
                "seed": 7,
            },
        )
    ]
    assert fake.headers[0]["Authorization"] == "Bearer key-of-the-engine"


def test_a_chat_is_asked_as_a_chat() -> None:
    found, fake = generated(answers(body={"choices": [{"message": {"content": None}, "finish_reason": "stop"}]}), CHAT)
    assert found == [Completion(text="", finish_reason="stop")]
    path, body = fake.bodies[0]
    assert path == "/v1/chat/completions"
    assert body["messages"] == [{"role": "user", "content": "prompt-of-a-caller"}]
    assert "stop" not in body
    assert "seed" not in body


def test_more_completions_than_were_asked_for_do_not_pass() -> None:
    choices = [{"index": i, "text": str(i), "finish_reason": "stop"} for i in range(5)]
    assert len(generated(answers(body={"choices": choices}))[0]) == 2


def test_an_answer_that_ended_otherwise_is_refused_unless_others_did_not() -> None:
    def ended(*reasons: str) -> Handler:
        return answers(body={"choices": [{"index": i, "text": "t", "finish_reason": r} for i, r in enumerate(reasons)]})

    assert generated(ended("content_filter", "stop"))[0] == [Completion(text="t", finish_reason="stop")]
    assert isinstance(generated(ended("content_filter", "tool_calls"))[0], RequestRefused)


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (400, RequestRefused),
        (401, TeacherRejected),
        (404, TeacherRejected),
        (302, TeacherRejected),
        (408, TeacherUnavailable),
        (413, RequestRefused),
        (422, RequestRefused),
        (429, TeacherBusy),
        (500, TeacherFailed),
        (502, TeacherFailed),
        (503, TeacherUnavailable),
        (504, TeacherLate),
    ],
)
@pytest.mark.parametrize("ask", [generated, pieces_of])
def test_each_status_means_one_thing_and_is_asked_once(status: int, error: type[DistillError], ask: Any) -> None:
    asked = 0

    async def handle(request: web.Request) -> web.StreamResponse:
        nonlocal asked
        asked += 1
        return web.json_response({"error": {"message": "engine-name at 10.1.2.3 says prompt-of-a-caller"}}, status=status)

    result = ask(handle)
    raised = result[1] if ask is pieces_of else result[0]
    assert type(raised) is error
    assert asked == 1
    assert "prompt-of-a-caller" not in str(raised)


def test_a_retry_after_is_kept_however_long() -> None:
    assert generated(answers(429, headers={"retry-after": "7"}))[0].retry_after_s == 7
    assert generated(answers(429, headers={"retry-after": "3600"}))[0].retry_after_s == 3600
    assert generated(answers(429))[0].retry_after_s is None


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ("<html>", TeacherFailed),
        ('{"choices": [{"text": "cut', TeacherFailed),
        ({"choices": []}, TeacherFailed),
        ({"choices": [{"finish_reason": "stop"}]}, TeacherRejected),
        ({"choices": [{"text": 4, "finish_reason": "stop"}]}, TeacherRejected),
        ({}, TeacherRejected),
        ([], TeacherRejected),
        ("null", TeacherRejected),
    ],
)
def test_an_answer_of_another_shape_is_an_error_of_the_server(body: Any, error: type[DistillError]) -> None:
    assert type(generated(answers(body=body))[0]) is error


def test_a_prompt_too_long_for_the_model_is_told_in_characters_and_not_in_tokens() -> None:
    said = "This model's maximum context length is 2048 tokens. However, your request has 3141 input tokens."
    for listed, room in (
        ({"data": [{"id": "m", "max_model_len": 2048}]}, "about 6100 of English text fit"),
        ({"data": [{"id": "m"}]}, "model: "),
    ):
        fake = Fake(answers(400, {"error": {"message": said}}))
        fake.listed = listed

        async def ask(fake: Fake = fake) -> Any:
            async with engine_over(fake) as engine:
                return await engine.generate(PLAIN)

        with pytest.raises(RequestRefused) as refused:
            run(ask)
        assert refused.value.kind == "too_long"
        assert "the prompt (18 characters)" in str(refused.value)
        assert room in str(refused.value)
        assert "2048" not in str(refused.value)
        assert "3141" not in str(refused.value)


def test_a_stream_passes_text_and_reasons_alone() -> None:
    usage = {"choices": [], "usage": {"prompt_tokens": 4}}
    found, error = pieces_of(
        streams(
            text_event(0, "a", logprobs={"tokens": ["a"]}, token_ids=[5]),
            text_event(1, "b"),
            usage,
            text_event(1, "", "stop"),
            text_event(0, "c", "length"),
        )
    )
    assert error is None
    assert found == [Piece(0, "a"), Piece(1, "b"), Piece(1, "", "stop"), Piece(0, "c", "length")]


def test_a_streamed_chat_is_read_from_its_deltas() -> None:
    def delta(content: Any, reason: str | None = None) -> dict[str, Any]:
        return {"choices": [{"index": 0, "delta": content, "finish_reason": reason}]}

    found, error = pieces_of(streams(delta({"role": "assistant", "content": ""}), delta({"content": "hi"}), delta({}, "stop")), CHAT)
    assert (found, error) == ([Piece(0, "hi"), Piece(0, "", "stop")], None)


def test_text_after_the_end_of_a_completion_and_of_completions_nobody_asked_for_does_not_pass() -> None:
    found, _ = pieces_of(streams(text_event(0, "a", "stop"), text_event(0, "more"), text_event(7, "other"), text_event(1, "b", "stop")))
    assert found == [Piece(0, "a", "stop"), Piece(1, "b", "stop")]


def test_a_server_that_does_not_stream_is_heard_all_the_same() -> None:
    found, error = pieces_of(answers())
    assert (found, error) == ([Piece(0, "text 0", "stop"), Piece(1, "text 1", "length")], None)


@pytest.mark.parametrize(
    ("handler", "error"),
    [
        (streams(text_event(0, "a"), end=""), TeacherFailed),
        (streams(text_event(0, "a"), abort=True), TeacherFailed),
        (streams(text_event(0, "a"), {"error": {"message": "EngineDeadError at /opt/vllm"}}), TeacherFailed),
        (streams(text_event(0, "a"), end="data: {cut\n\n"), TeacherFailed),
        (streams(text_event(0, "a"), {"choices": [{"index": 0}]}), TeacherRejected),
        (streams(text_event(0, "a"), []), TeacherRejected),
        (streams(text_event(0, "a"), text_event(0, "", "content_filter"), text_event(1, "", "content_filter")), RequestRefused),
    ],
)
def test_a_stream_that_goes_wrong_gives_what_came_before_and_then_an_error(handler: Handler, error: type[DistillError]) -> None:
    found, raised = pieces_of(handler)
    assert found == [Piece(0, "a")]
    assert type(raised) is error
    assert "/opt" not in str(raised)


def test_a_stream_that_ends_before_all_completions_have_is_an_error_and_no_short_answer() -> None:
    found, raised = pieces_of(streams(text_event(0, "a", "stop"), text_event(1, "b")))
    assert found == [Piece(0, "a", "stop"), Piece(1, "b")]
    assert isinstance(raised, TeacherFailed)


async def _sleep(request: web.Request) -> web.StreamResponse:
    await asyncio.sleep(30)
    return web.Response()


def test_a_server_that_does_not_answer_in_time_is_late() -> None:
    assert isinstance(generated(_sleep, timeout_s=0.2)[0], TeacherLate)
    assert isinstance(pieces_of(_sleep, timeout_s=0.2)[1], TeacherLate)


def test_a_stream_of_comments_is_as_late_as_silence() -> None:
    told = 0

    async def comments(request: web.Request) -> web.StreamResponse:
        nonlocal told
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        for _ in range(100):
            await response.write(b": still at work\n\n")
            told += 1
            await asyncio.sleep(0.05)
        return response

    said, error = pieces_of(comments, timeout_s=0.3)
    assert (said, type(error)) == ([], TeacherLate)
    assert told < 40  # six, or it is not heard at once that nobody listens any more


class Cancelled:
    """Notices that its client has hung up."""

    def __init__(self, first: str | None) -> None:
        self.first, self.noticed, self.asked = first, asyncio.Event(), asyncio.Event()

    async def __call__(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        try:
            if self.first is not None:
                await response.prepare(request)
                await response.write(f"data: {json.dumps(text_event(0, self.first))}\n\n".encode())
            self.asked.set()
            await asyncio.sleep(30)
        finally:
            self.noticed.set()
        return response


@pytest.mark.parametrize("stream", [False, True])
def test_who_is_cancelled_hangs_up_on_the_server(stream: bool) -> None:
    async def ask() -> None:
        handler = Cancelled("a" if stream else None)
        async with engine_over(Fake(handler)) as engine:
            task = asyncio.create_task(streamed(engine, PLAIN) if stream else engine.generate(PLAIN))  # type: ignore[arg-type]
            await handler.asked.wait()
            await asyncio.sleep(0.05)
            task.cancel()
            async with asyncio.timeout(5):
                await handler.noticed.wait()
            assert engine.servers[0].in_flight == 0

    run(ask)


def test_a_connection_that_fails_before_an_answer_is_tried_once_more_and_no_later_one() -> None:
    hung_up = 0

    async def handle(request: web.Request) -> web.StreamResponse:
        nonlocal hung_up
        hung_up += 1
        if hung_up == 1 and request.transport:
            request.transport.abort()
            await asyncio.sleep(1)
        return await answers()(request)

    found, _ = generated(handle)
    assert len(found) == 2
    assert hung_up == 2

    async def never(request: web.Request) -> web.StreamResponse:
        nonlocal hung_up
        hung_up += 1
        assert request.transport
        request.transport.abort()
        await asyncio.sleep(1)
        return web.Response()

    hung_up = 0
    raised, _ = generated(never)
    assert type(raised) is TeacherUnavailable
    assert hung_up == 2


def test_an_answer_that_has_begun_is_not_asked_for_again() -> None:
    asked = 0

    async def handle(request: web.Request) -> web.StreamResponse:
        nonlocal asked
        asked += 1
        response = web.StreamResponse(headers={"content-type": "application/json", "content-length": "100"})
        await response.prepare(request)
        await response.write(b'{"choices"')
        await asyncio.sleep(0.05)
        assert request.transport
        request.transport.abort()
        return response

    assert isinstance(generated(handle)[0], TeacherFailed)
    assert asked == 1


def test_the_least_busy_server_is_asked() -> None:
    async def ask() -> None:
        gate = asyncio.Event()

        async def slow(request: web.Request) -> web.StreamResponse:
            await gate.wait()
            return await answers()(request)

        busy, idle = Fake(slow), Fake(answers())
        async with engine_over(busy, idle) as engine:
            waiting = []
            while not busy.bodies:  # whichever turn it is
                waiting.append(asyncio.create_task(engine.generate(PLAIN)))
                await asyncio.sleep(0.05)
            before = len(idle.bodies)
            for _ in range(6):
                await engine.generate(PLAIN)
            assert len(idle.bodies) == before + 6
            gate.set()
            await asyncio.gather(*waiting)

    run(ask)


def test_idle_servers_take_turns() -> None:
    async def ask() -> None:
        fakes = [Fake(answers()) for _ in range(3)]
        async with engine_over(*fakes) as engine:
            for _ in range(6):
                await engine.generate(PLAIN)
            assert [len(fake.bodies) for fake in fakes] == [2, 2, 2]

    run(ask)


def test_a_dead_server_costs_no_request_and_is_asked_again_when_it_is_back(monkeypatch: pytest.MonkeyPatch) -> None:
    async def ask() -> None:
        one, other = Fake(answers()), Fake(answers())
        async with engine_over(one, other) as engine:
            await one.shut()
            for _ in range(6):
                assert len(await engine.generate(PLAIN)) == 2
            assert (len(one.bodies), len(other.bodies)) == (0, 6)
            assert [server.aside for server in engine.servers] == [True, False]
            await one.open()
            async with asyncio.timeout(5):
                while engine.servers[0].aside:
                    await asyncio.sleep(0.02)
            for _ in range(4):
                await engine.generate(PLAIN)
            assert len(one.bodies) == 2

    monkeypatch.setattr(upstream, "PROBE_S", 0.1)
    run(ask)


def test_while_all_are_set_aside_the_next_request_tries_all_the_same() -> None:
    async def ask() -> None:
        fake = Fake(answers())
        async with engine_over(fake) as engine:
            await fake.shut()
            with pytest.raises(TeacherUnavailable):
                await engine.generate(PLAIN)
            with pytest.raises(TeacherUnavailable):
                await engine.check()
            await fake.open()
            assert len(await engine.generate(PLAIN)) == 2
            assert not engine.servers[0].aside
            await engine.check()

    run(ask)


def test_one_server_that_lists_its_models_is_enough_to_be_ready() -> None:
    async def ask() -> None:
        one, other = Fake(answers()), Fake(answers())
        async with engine_over(one, other) as engine:
            await one.shut()
            await engine.check()
            await other.shut()
            with pytest.raises(TeacherUnavailable):
                await engine.check()

    run(ask)


def test_a_cookie_of_one_answer_is_not_sent_with_the_next_request() -> None:
    async def ask() -> None:
        fake = Fake(answers(headers={"set-cookie": "who=first"}))
        async with engine_over(fake) as engine:
            await engine.generate(PLAIN)
            await engine.generate(PLAIN)
            assert "Cookie" not in fake.headers[1]

    run(ask)


def test_who_asks_often_whether_it_is_ready_does_not_ask_the_servers_as_often(monkeypatch: pytest.MonkeyPatch) -> None:
    async def ask() -> None:
        fake = Fake(answers())
        async with engine_over(fake) as engine:
            await asyncio.gather(*(engine.check() for _ in range(50)))
            assert fake.listings == 1

    monkeypatch.setattr(upstream, "KEPT_S", 60)
    run(ask)


def test_a_server_that_speaks_no_http_is_asked_once_and_neither_its_words_nor_the_key_are_told(caplog: pytest.LogCaptureFixture) -> None:
    asked = 0

    async def babble(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal asked
        asked += 1
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 2x0 your prompt was prompt-of-a-caller\r\n\r\n")
        await writer.drain()
        writer.close()

    async def ask() -> list[str]:
        async with await asyncio.start_server(babble, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            engine = UpstreamEngine([f"http://127.0.0.1:{port}/v1"], model="m", api_key="key-of-the-engine")
            told = []
            for work in (engine.generate(PLAIN), engine.check()):
                with pytest.raises((TeacherFailed, TeacherUnavailable)) as raised:
                    await work
                told.append(str(raised.value))
            await engine.aclose()
            return told

    with caplog.at_level("DEBUG"):
        told = str(run(ask)) + caplog.text
    assert asked == 2
    assert "key-of-the-engine" not in told
    assert "prompt-of-a-caller" not in told


@pytest.mark.parametrize("status", [500, 401, 404, 429])
def test_a_server_that_fails_at_once_does_not_draw_all_requests_to_itself(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    async def ask() -> None:
        async def slow(request: web.Request) -> web.StreamResponse:
            await asyncio.sleep(0.02)
            return await answers()(request)

        broken, sound = Fake(answers(status, headers={"retry-after": "60"})), Fake(slow)
        async with engine_over(broken, sound) as engine:
            results = await asyncio.gather(*(engine.generate(PLAIN) for _ in range(4)), return_exceptions=True)
            failed = sum(isinstance(result, DistillError) for result in results)
            for _ in range(20):
                await engine.generate(PLAIN)
            assert failed <= 2
            assert len(broken.bodies) == failed

    monkeypatch.setattr(upstream, "PROBE_S", 600)  # nobody asks meanwhile whether it is back
    run(ask)


def test_a_server_that_cannot_list_its_models_is_taken_back_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    async def ask() -> None:
        one, other = Fake(answers()), Fake(answers())
        one.models_status = 404
        async with engine_over(one, other) as engine:
            await one.shut()
            for _ in range(4):
                await engine.generate(PLAIN)
            assert engine.servers[0].aside
            await one.open()
            async with asyncio.timeout(5):
                while engine.servers[0].aside:
                    await asyncio.sleep(0.02)

    monkeypatch.setattr(upstream, "PROBE_S", 0.1)
    run(ask)


def test_a_stream_that_has_said_all_needs_no_done() -> None:
    found, error = pieces_of(streams(text_event(0, "a", "stop"), text_event(1, "b", "stop"), end=""))
    assert (len(found), error) == (2, None)


def test_completions_stand_in_the_order_of_their_indices() -> None:
    choices = [{"index": 1 - i, "text": f"text {1 - i}", "finish_reason": "stop"} for i in range(2)]
    assert [c.text for c in generated(answers(body={"choices": choices}))[0]] == ["text 0", "text 1"]
