"""The way through the face: keys, limits, bounds, queue, streams, and what the log and the metrics tell of it."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from pydantic import TypeAdapter

from shared.contracts import Completion, GenerationRequest
from shared.engines import Piece
from shared.errors import RequestRefused, TeacherBusy, TeacherFailed, TeacherLate, TeacherUnavailable
from shared.http.app import create_app
from shared.http.face import Bounds
from shared.http.keys import KeyEntry, KeyLimits, Keys, digest
from shared.http.metrics import Meters
from shared.http.wire import ChatChunk, ErrorAnswer, TextChunk

CHAT, PLAIN = "/v1/chat/completions", "/v1/completions"
BODIES: dict[str, dict[str, Any]] = {
    CHAT: {"model": "m", "messages": [{"role": "user", "content": "prompt-that-nobody-may-log"}]},
    PLAIN: {"model": "m", "prompt": "prompt-that-nobody-may-log"},
}
ALICE, BOB = "alice-key-0123456789-abcdef", "bob-key-9876543210-ghijkl"
HEAD = {"authorization": f"Bearer {ALICE}"}


def entry(key: str, **more: Any) -> KeyEntry:
    return KeyEntry(sha256=digest(key).hex(), **more)


class Engine:
    """Streams `said` for every completion, or raises `error` after `said`; waits at its gate first; notices when it is left."""

    def __init__(self, *said: str, error: Exception | None = None) -> None:
        self.said, self.error = said or ("some ", "wo", "rds"), error
        self.gate, self.left, self.asked = asyncio.Event(), False, 0
        self.gate.set()

    async def generate(self, request: GenerationRequest) -> list[Completion]:
        self.asked += 1
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.left = True
            raise
        if self.error:
            raise self.error
        return [Completion(text="".join(self.said), finish_reason="stop") for _ in range(request.n)]

    async def stream(self, request: GenerationRequest) -> AsyncGenerator[Piece, None]:
        self.asked += 1
        try:
            for text in self.said if self.error is None or self.said != ("",) else ():
                for index in range(request.n):
                    yield Piece(index, text)
                await self.gate.wait()
            if self.error:
                raise self.error
            for index in range(request.n):
                yield Piece(index, "", "stop")
        except (asyncio.CancelledError, GeneratorExit):
            self.left = True
            raise

    async def check(self) -> None: ...

    async def aclose(self) -> None: ...


@asynccontextmanager
async def gate(engine: Engine | None = None, **options: Any) -> AsyncIterator[httpx.AsyncClient]:
    app = create_app(engine or Engine(), model="m", title="T", **options)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport, base_url="http://gate") as client:
        yield client


def through(steps: Callable[[httpx.AsyncClient], Awaitable[Any]], engine: Engine | None = None, **options: Any) -> Any:
    async def run() -> Any:
        async with gate(engine, **options) as client:
            return await steps(client)

    return asyncio.run(run())


def posted(path: str, change: dict[str, Any] | None = None, engine: Engine | None = None, **options: Any) -> httpx.Response:
    return through(lambda client: client.post(path, json=BODIES[path] | (change or {}), headers=HEAD), engine, **options)  # type: ignore[no-any-return]


def error(response: httpx.Response) -> dict[str, Any]:
    return TypeAdapter(ErrorAnswer).validate_json(response.content).error.model_dump()


def events(response: httpx.Response) -> list[Any]:
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.text.endswith("\n\n")
    lines = response.text.split("\n\n")[:-1]
    assert all(line.startswith("data: ") for line in lines)
    return [line[6:] if line == "data: [DONE]" else json.loads(line[6:]) for line in lines]


@pytest.mark.parametrize("path", BODIES)
def test_a_stream_is_the_same_text_as_the_answer_without_one(path: str) -> None:
    said = events(posted(path, {"stream": True, "n": 2}))
    assert said.pop() == "[DONE]"
    kind = ChatChunk if path == CHAT else TextChunk
    chunks: list[Any] = [kind.model_validate(event) for event in said]
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1
    whole = posted(path, {"n": 2}).json()
    for index in (0, 1):
        mine = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == index]
        assert [choice.finish_reason for choice in mine][-1] == "stop"
        assert {choice.finish_reason for choice in mine[:-1]} == {None}
        if path == CHAT:
            assert (mine[0].delta.role, mine[0].delta.content) == ("assistant", "")
            assert "".join(choice.delta.content or "" for choice in mine) == whole["choices"][index]["message"]["content"]
        else:
            assert "".join(choice.text for choice in mine) == whole["choices"][index]["text"]


def test_a_stream_shows_words_and_not_how_the_engine_cut_them() -> None:
    one = events(posted(PLAIN, {"stream": True}, Engine("mi", "gra", "ine", " au", "ra")))
    other = events(posted(PLAIN, {"stream": True}, Engine("migraine aura")))
    assert [e["choices"][0]["text"] for e in one[:-1]] == [e["choices"][0]["text"] for e in other[:-1]] == ["migraine", " aura", ""]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("raised", "status"),
    [
        (TeacherUnavailable("engine-7"), 503),
        (TeacherBusy("engine-7", retry_after_s=3), 429),
        (TeacherLate("engine-7"), 504),
        (TeacherFailed("engine-7"), 502),
        (RequestRefused("too long", kind="too_long"), 400),
        (RuntimeError("engine-7"), 500),
    ],
)
def test_an_engine_that_fails_before_its_first_word_gives_a_status_streamed_or_not(raised: Exception, status: int, stream: bool) -> None:
    response = posted(PLAIN, {"stream": stream}, Engine("", error=raised))
    assert response.status_code == status
    assert "engine-7" not in response.text
    assert (response.headers.get("retry-after") == "3") == (status == 429)
    assert (error(response)["code"] == "context_length_exceeded") == (status == 400)


def test_an_engine_that_fails_later_gives_an_error_as_the_last_event_and_no_done() -> None:
    said = events(posted(CHAT, {"stream": True}, Engine("some ", "words ", error=TeacherFailed("engine-7"))))
    assert said[-1] == {"error": {"message": "the model failed to answer; try again", "type": "server_error", "param": None, "code": None}}
    assert "[DONE]" not in said


def test_usage_can_be_left_out() -> None:
    assert posted(PLAIN).json()["usage"]["completion_words"] == 2
    assert "usage" not in posted(PLAIN, with_usage=False).json()


def test_an_error_nobody_foresaw_ends_a_stream_as_one_that_failed_and_is_told_to_nobody(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    answer = posted(CHAT, {"stream": True}, Engine("some ", "words ", error=Exception("words that the engine decoded")))
    assert answer.status_code == 200
    *_, last = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    assert json.loads(last)["error"]["type"] == "server_error"
    assert "decoded" not in answer.text
    assert "decoded" not in caplog.text
    (told,) = [record.fields for record in caplog.records if record.message == "request"]  # type: ignore[attr-defined]
    assert told["reason"] == "error"


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_the_work_for_it_and_gives_back_what_it_held(stream: bool) -> None:
    engine = Engine()
    engine.gate.clear()

    async def run() -> None:
        app = create_app(engine, model="m", title="T", keys=Keys({"alice": entry(ALICE, concurrent_requests=1)}))
        gone = asyncio.Event()
        body = [{"type": "http.request", "body": json.dumps(BODIES[PLAIN] | {"stream": stream}).encode(), "more_body": False}]

        async def receive() -> Any:
            if body:
                return body.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None: ...

        headers = [(b"authorization", HEAD["authorization"].encode()), (b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": PLAIN, "headers": headers, "query_string": b"", "http_version": "1.1"}
        task = asyncio.create_task(app(scope, receive, send))  # type: ignore[arg-type]
        await asyncio.sleep(0.05)
        assert not engine.left
        gone.set()
        async with asyncio.timeout(5):
            await task
        assert engine.left
        engine.gate.set()
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://gate") as client:
            assert (await client.post(PLAIN, json=BODIES[PLAIN], headers=HEAD)).status_code == 200

    asyncio.run(run())


KEYS = {"keys": Keys({"alice": entry(ALICE), "bob": entry(BOB, revoked=True)})}


@pytest.mark.parametrize(
    ("key", "status", "kind"), [(None, 401, "authentication_error"), ("x", 401, "authentication_error"), (BOB, 403, "permission_error")]
)
def test_without_a_good_key_nothing_is_answered_and_the_engine_is_not_asked(key: str | None, status: int, kind: str) -> None:
    engine = Engine()
    headers = {} if key is None else {"authorization": f"Bearer {key}"}

    async def steps(client: httpx.AsyncClient) -> list[httpx.Response]:
        posts = [await client.post(path, json=body, headers=headers) for path, body in BODIES.items()]
        return [*posts, await client.get("/v1/models", headers=headers)]

    for response in through(steps, engine, **KEYS):
        assert response.status_code == status
        assert error(response)["type"] == kind
        assert (response.headers.get("www-authenticate") == "Bearer") == (status == 401)
    assert engine.asked == 0


def test_health_and_schema_need_no_key() -> None:
    async def steps(client: httpx.AsyncClient) -> list[int]:
        return [(await client.get(path)).status_code for path in ("/healthz", "/readyz", "/openapi.json")]

    assert through(steps, **KEYS) == [200, 200, 200]


def test_a_key_that_has_asked_enough_is_told_when_to_come_back_and_others_go_on() -> None:
    keys = Keys({"alice": entry(ALICE, requests_per_minute=2), "bob": entry(BOB)})

    async def steps(client: httpx.AsyncClient) -> list[httpx.Response]:
        mine = [await client.post(PLAIN, json=BODIES[PLAIN], headers=HEAD) for _ in range(3)]
        return [*mine, await client.post(PLAIN, json=BODIES[PLAIN], headers={"authorization": f"Bearer {BOB}"})]

    answers = through(steps, keys=keys)
    assert [a.status_code for a in answers] == [200, 200, 429, 200]
    assert 58 <= int(answers[2].headers["retry-after"]) <= 60
    assert error(answers[2])["type"] == "rate_limit_error"


@pytest.mark.parametrize("stream", [False, True])
def test_characters_that_were_generated_are_counted_streamed_or_not(stream: bool) -> None:
    keys = Keys({}, KeyLimits(characters_per_day=30))

    async def steps(client: httpx.AsyncClient) -> list[httpx.Response]:
        body = BODIES[PLAIN] | {"max_tokens": 1, "stream": stream}
        return [await client.post(PLAIN, json=body) for _ in range(4)]

    answers = through(steps, Engine("ten letter"), keys=keys)
    assert [a.status_code for a in answers] == [200, 200, 200, 429]  # 30 - 3 x 10 < 8 that one token reserves
    assert error(answers[3])["code"] == "insufficient_quota"


def test_a_full_queue_is_said_at_once() -> None:
    engine = Engine()
    engine.gate.clear()

    async def steps(client: httpx.AsyncClient) -> tuple[httpx.Response, list[httpx.Response]]:
        waiting = [asyncio.create_task(client.post(PLAIN, json=BODIES[PLAIN])) for _ in range(3)]
        await asyncio.sleep(0.05)
        refused = await client.post(PLAIN, json=BODIES[PLAIN])
        engine.gate.set()
        return refused, await asyncio.gather(*waiting)

    refused, answered = through(steps, engine, bounds=Bounds(max_in_flight=1, max_queue=2))
    assert refused.status_code == 429
    assert refused.headers["retry-after"] == "1"
    assert [a.status_code for a in answered] == [200] * 3


@pytest.mark.parametrize(
    ("bounds", "change", "status", "param"),
    [
        ({"max_n": 2}, {"n": 3}, 422, "n"),
        ({"max_tokens": 20}, {"max_tokens": 21}, 422, "max_tokens"),
        ({"max_prompt_characters": 5}, {"prompt": "123456"}, 400, "prompt"),
        ({"max_body_bytes": 100}, {"prompt": "x" * 100}, 413, None),
        ({}, {"stop": "x" * 1001}, 422, "stop"),
    ],
)
def test_what_is_out_of_bounds_is_refused_with_the_bound(
    bounds: dict[str, int], change: dict[str, Any], status: int, param: str | None
) -> None:
    response = posted(PLAIN, change, bounds=Bounds(**bounds))  # type: ignore[arg-type]
    assert response.status_code == status
    assert error(response)["param"] == param
    assert str(next(iter(bounds.values()), 1000)) in error(response)["message"]
    within = {"prompt": "12345"} if "max_prompt_characters" in bounds else {}
    assert posted(PLAIN, within, bounds=Bounds(**bounds)).status_code == 200  # type: ignore[arg-type]


def test_a_chat_of_very_many_turns_is_refused() -> None:
    turns = [{"role": "user", "content": "x"}] * 1001
    assert error(posted(CHAT, {"messages": turns}))["message"] == "messages: at most 1000 turns here"
    assert posted(CHAT, {"messages": turns[1:]}).status_code == 200


def test_bodies_that_come_in_at_the_same_time_have_a_bound_together() -> None:
    async def run() -> list[int]:
        app = create_app(Engine(), model="m", title="T", bounds=Bounds(max_unread_bytes=5000, body_s=1))
        statuses: list[int] = []

        async def one() -> None:
            parts = [{"type": "http.request", "body": b" " * 2000, "more_body": True}]

            async def receive() -> Any:
                if parts:
                    return parts.pop()
                await asyncio.sleep(60)
                raise AssertionError("nobody waits so long")

            async def send(message: Any) -> None:
                if "status" in message:
                    statuses.append(message["status"])

            headers = [(b"content-type", b"application/json")]
            await app({"type": "http", "method": "POST", "path": PLAIN, "headers": headers, "query_string": b""}, receive, send)

        await asyncio.gather(*(one() for _ in range(4)))
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://gate") as client:
            statuses.append((await client.post(PLAIN, json=BODIES[PLAIN])).status_code)
        return statuses

    assert asyncio.run(run()) == [429, 429, 408, 408, 200]


def test_the_bound_of_a_prompt_is_that_of_all_turns_together() -> None:
    turns = [{"role": "user", "content": "123"}, {"role": "assistant", "content": "456"}]
    assert posted(CHAT, {"messages": turns}, bounds=Bounds(max_prompt_characters=5)).status_code == 400
    assert posted(CHAT, {"messages": turns}, bounds=Bounds(max_prompt_characters=6)).status_code == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"content-type": "text/plain"}, 415),
        ({"content-type": "application/x-www-form-urlencoded"}, 415),
        ({"content-type": "application/json; charset=latin-1"}, 415),
        ({"content-type": "application/json", "content-encoding": "gzip"}, 415),
        ({"content-type": "application/json; charset=UTF-8"}, 200),
        ({"content-type": "Application/JSON"}, 200),
    ],
)
def test_a_body_that_says_it_is_no_plain_json_is_refused_unread(headers: dict[str, str], status: int) -> None:
    response = through(lambda client: client.post(PLAIN, content=json.dumps(BODIES[PLAIN]), headers=headers))
    assert response.status_code == status


def test_a_body_that_does_not_come_is_not_waited_for() -> None:
    async def run() -> int:
        app = create_app(Engine(), model="m", title="T", bounds=Bounds(body_s=0.05))
        first = True

        async def receive() -> Any:
            nonlocal first
            if first:
                first = False
                return {"type": "http.request", "body": b'{"model"', "more_body": True}
            await asyncio.sleep(30)
            raise AssertionError("nobody waits so long")

        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": PLAIN, "headers": [(b"content-type", b"application/json")], "query_string": b""}
        await app(scope, receive, send)  # type: ignore[arg-type]
        assert (b"connection", b"close") in sent[0]["headers"]
        return int(sent[0]["status"])

    assert asyncio.run(run()) == 408


def test_every_request_has_an_id_that_stands_in_the_log_and_the_log_has_no_text(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        answers = [posted(path, {"stream": stream}, **KEYS) for path in BODIES for stream in (False, True)]
        answers.append(posted(PLAIN, {"logprobs": 1, "user": "user-of-a-caller"}, **KEYS))
    lines = [record.fields for record in caplog.records if record.getMessage() == "request"]  # type: ignore[attr-defined]
    assert [line["id"] for line in lines] == [a.headers["x-request-id"] for a in answers]
    assert [line["status"] for line in lines] == [200, 200, 200, 200, 422]
    assert {line["key"] for line in lines} == {"alice"}
    assert lines[0]["completion_characters"] == len("some words")
    logged = caplog.text + str(lines)
    for secret in ("prompt-that-nobody-may-log", "some words", ALICE, "user-of-a-caller"):
        assert secret not in logged


def test_metrics_tell_the_engines_time_from_ours_and_count_refusals_by_reason() -> None:
    meters, engine = Meters(), Engine()
    value = meters.registry.get_sample_value

    async def steps(client: httpx.AsyncClient) -> None:
        engine.gate.clear()
        asyncio.get_running_loop().call_later(1, engine.gate.set)
        await client.post(PLAIN, json=BODIES[PLAIN], headers=HEAD)
        await client.post(PLAIN, json=BODIES[PLAIN] | {"echo": True}, headers=HEAD)
        await client.post(PLAIN, json=BODIES[PLAIN])
        await client.post(PLAIN, json=BODIES[PLAIN] | {"stream": True}, headers=HEAD)

    through(steps, engine, meters=meters, **KEYS)
    assert (value("distill_engine_duration_seconds_sum") or 0) >= 1
    assert (value("distill_overhead_seconds_sum") or 1) < 1
    assert value("distill_engine_duration_seconds_count") == 2
    assert value("distill_refusals_total", {"reason": "field"}) == 1
    assert value("distill_refusals_total", {"reason": "no_key"}) == 1
    assert value("distill_characters_total", {"side": "completion"}) == 2 * len("some words")
    labels = {str(sample.labels) for family in meters.registry.collect() for sample in family.samples}
    assert not any(secret in label for label in labels for secret in ("alice", ALICE, "prompt-that", "some words"))
