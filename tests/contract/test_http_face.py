"""The HTTP face: what may be asked, what comes back, and that nothing else does."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from shared.contracts import Completion, GenerationRequest, Message, Sampling
from shared.errors import EngineError, RequestRefused, TeacherRejected, TeacherUnavailable
from shared.http.app import create_app
from shared.http.problems import NotReady

SECRET = "http://engine-7:8000 vllm 0.33"
CHAT = {"model": "teacher", "messages": [{"role": "user", "content": "prompt-that-nobody-may-log"}]}
PLAIN = {"model": "teacher", "prompt": "prompt-that-nobody-may-log"}
ROUTES = [("/v1/chat/completions", CHAT), ("/v1/completions", PLAIN)]


class Engine:
    """Keeps what it is asked; answers, or raises `error`."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error, self.asked, self.closed = error, [], False

    async def generate(self, request: GenerationRequest) -> list[Completion]:
        self.asked.append(request)
        await self.check()
        return [Completion(text=f"answer {i}", finish_reason="length" if i else "stop") for i in range(request.n)]

    async def check(self) -> None:
        if self.error:
            raise self.error

    async def aclose(self) -> None:
        self.closed = True


def talk(engine: Engine, steps: Callable[[httpx.AsyncClient], Awaitable[httpx.Response]]) -> httpx.Response:
    async def run() -> httpx.Response:
        app = create_app(engine, model="teacher", title="Teacher")
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=httpx.ASGITransport(app, raise_app_exceptions=False), base_url="http://face") as client,
        ):
            return await steps(client)

    return asyncio.run(run())


def post(path: str, body: Any, engine: Engine | None = None) -> httpx.Response:
    return talk(engine or Engine(), lambda client: client.post(path, json=body))


def get(path: str, engine: Engine | None = None) -> httpx.Response:
    return talk(engine or Engine(), lambda client: client.get(path))


def error(response: httpx.Response) -> dict[str, Any]:
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    return dict(body["error"])


def test_a_chat_reaches_the_engine_as_asked_and_its_answer_has_the_fields_of_the_api_and_no_other() -> None:
    engine = Engine()
    more = {"max_tokens": 9, "temperature": 0.5, "top_p": 0.9, "n": 2, "stop": ["\n"], "seed": 4, "user": "me", "stream": False}
    answer = post("/v1/chat/completions", CHAT | more, engine).json()
    assert engine.asked == [
        GenerationRequest(
            messages=(Message(role="user", content="prompt-that-nobody-may-log"),),
            n=2,
            sampling=Sampling(max_tokens=9, temperature=0.5, top_p=0.9, stop=("\n",), seed=4),
        )
    ]
    assert answer.pop("id").startswith("chatcmpl-")
    assert isinstance(answer.pop("created"), int)
    assert answer == {
        "object": "chat.completion",
        "model": "teacher",
        "choices": [
            {"index": 0, "message": {"role": "assistant", "content": "answer 0"}, "finish_reason": "stop"},
            {"index": 1, "message": {"role": "assistant", "content": "answer 1"}, "finish_reason": "length"},
        ],
        "usage": {"prompt_characters": 26, "prompt_words": 1, "completion_characters": 16, "completion_words": 4},
    }


def test_a_plain_prompt_reaches_the_engine_as_asked_and_its_answer_has_the_fields_of_the_api_and_no_other() -> None:
    engine = Engine()
    answer = post("/v1/completions", PLAIN | {"stop": "x"}, engine).json()
    assert engine.asked == [GenerationRequest(prompt=PLAIN["prompt"], sampling=Sampling(max_tokens=16, temperature=1.0, stop=("x",)))]
    assert answer.pop("id").startswith("cmpl-")
    assert isinstance(answer.pop("created"), int)
    assert answer == {
        "object": "text_completion",
        "model": "teacher",
        "choices": [{"index": 0, "text": "answer 0", "finish_reason": "stop"}],
        "usage": {"prompt_characters": 26, "prompt_words": 1, "completion_characters": 8, "completion_words": 2},
    }


def test_null_means_absent() -> None:
    assert post("/v1/completions", PLAIN | {"stop": None, "seed": None, "n": None, "stream": None, "temperature": None}).status_code == 200


def test_both_names_of_the_length_bound_are_known_and_only_one_may_be_given() -> None:
    engine = Engine()
    post("/v1/chat/completions", CHAT | {"max_completion_tokens": 7}, engine)
    assert engine.asked[0].sampling.max_tokens == 7
    assert error(post("/v1/chat/completions", CHAT | {"max_completion_tokens": 7, "max_tokens": 7}))["param"] == "max_tokens"


@pytest.mark.parametrize(("path", "body"), ROUTES)
@pytest.mark.parametrize(
    "field", ["logprobs", "top_logprobs", "echo", "logit_bias", "return_token_ids", "logprob_token_ids", "tools", "best_of"]
)
def test_a_field_that_is_not_text_generation_is_refused_by_name_and_reaches_no_engine(path: str, body: dict[str, Any], field: str) -> None:
    engine = Engine()
    response = post(path, body | {field: None}, engine)
    assert response.status_code == 422
    assert error(response)["param"] == field
    assert field in error(response)["message"]
    assert engine.asked == []


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"stream": 1}, "stream"),
        ({"n": 0}, "n"),
        ({"n": 65}, "n"),
        ({"n": "2"}, "n"),
        ({"n": True}, "n"),
        ({"temperature": 2.1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"seed": -1}, "seed"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"prompt": [1, 2, 3]}, "prompt"),
        ({"prompt": ["a", "b"]}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"model": None}, "model"),
    ],
)
def test_a_wrong_value_is_refused_by_the_name_of_its_field(change: dict[str, Any], param: str) -> None:
    response = post("/v1/completions", PLAIN | change)
    assert response.status_code == 422
    assert str(error(response)["param"]).startswith(param)


@pytest.mark.parametrize(
    "messages",
    [
        [],
        "hello",
        [{"role": "tool", "content": "x"}],
        [{"role": "user", "content": [{"type": "text", "text": "x"}]}],
        [{"role": "user", "content": "x", "name": "y"}],
        [{"role": "user"}],
    ],
)
def test_messages_that_are_not_plain_turns_of_text_are_refused(messages: Any) -> None:
    response = post("/v1/chat/completions", CHAT | {"messages": messages})
    assert response.status_code == 422
    assert str(error(response)["param"]).startswith("messages")


def test_a_refusal_does_not_repeat_the_value_it_refuses() -> None:
    assert "secret words" not in post("/v1/completions", PLAIN | {"prompt": ["secret words"]}).text


def test_a_body_that_is_no_json_object_is_refused() -> None:
    for content in (b"{", b"[]", b""):
        response = talk(
            Engine(), lambda client, c=content: client.post("/v1/completions", content=c, headers={"content-type": "application/json"})
        )
        assert response.status_code == 400
        assert "JSON" in error(response)["message"]


@pytest.mark.parametrize(("path", "body"), ROUTES)
def test_another_model_name_is_not_found(path: str, body: dict[str, Any]) -> None:
    response = post(path, body | {"model": "gpt"})
    assert response.status_code == 404
    assert error(response)["code"] == "model_not_found"


def test_unknown_paths_and_methods_have_the_same_error_shape_and_there_are_no_docs_pages() -> None:
    for path in ("/", "/docs", "/redoc", "/metrics", "/tokenize", "/v1/embeddings"):
        assert get(path).status_code == 404
        error(get(path))
    assert get("/v1/completions").status_code == 405
    error(get("/v1/completions"))


@pytest.mark.parametrize(
    ("raised", "status"),
    [
        (TeacherUnavailable(SECRET, retry_after_s=1.2), 503),
        (TeacherRejected(SECRET), 502),
        (EngineError(SECRET), 500),
        (RuntimeError(SECRET), 500),
    ],
)
def test_an_engine_that_fails_shows_nothing_of_itself(raised: Exception, status: int) -> None:
    response = post("/v1/completions", PLAIN, Engine(raised))
    assert response.status_code == status
    assert "engine-7" not in response.text
    assert "vllm" not in response.text
    assert error(response)["type"] == "server_error"
    assert response.headers.get("retry-after") == ("2" if status == 503 else None)


def test_a_request_the_engine_refuses_is_told_why() -> None:
    response = post("/v1/completions", PLAIN, Engine(RequestRefused("the prompt is too long")))
    assert response.status_code == 400
    assert error(response)["message"] == "the prompt is too long"


def test_no_log_line_holds_a_prompt(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("DEBUG"):
        for raised in (None, TeacherUnavailable("x"), EngineError("y")):
            post("/v1/completions", PLAIN, Engine(raised))
    assert PLAIN["prompt"] not in caplog.text


def test_models_lists_the_public_name_alone() -> None:
    listed = get("/v1/models").json()
    assert [m["id"] for m in listed["data"]] == ["teacher"]


def test_a_server_lives_without_its_engine_but_is_not_ready() -> None:
    broken = Engine(TeacherUnavailable(SECRET))
    assert get("/healthz", broken).status_code == 200
    not_ready = get("/readyz", broken)
    assert not_ready.status_code == 503
    assert not_ready.json()["reason"] == "the model does not answer"
    assert "engine-7" not in not_ready.text
    assert get("/readyz").status_code == 200


def test_readiness_is_told_in_time_also_when_the_engine_does_not_say_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    class Silent(Engine):
        async def check(self) -> None:
            await asyncio.sleep(60)

    monkeypatch.setattr("shared.http.app.READY_S", 0.05)
    began = time.monotonic()
    not_ready = get("/readyz", Silent())
    assert (not_ready.status_code, not_ready.json()["reason"]) == (503, "the model does not answer")
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(("path", "body"), ROUTES)
def test_while_no_model_is_served_callers_are_told_what_it_waits_for_and_when_to_come_back(path: str, body: dict[str, Any]) -> None:
    waiting = Engine(NotReady("nothing is promoted yet", retry_after_s=5))
    answer = post(path, body, waiting)
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
    assert (error(answer)["message"], error(answer)["type"]) == ("nothing is promoted yet", "server_error")
    assert get("/healthz", waiting).status_code == 200
    not_ready = get("/readyz", waiting)
    assert not_ready.status_code == 503
    assert not_ready.json() == {"status": "not ready", "reason": "nothing is promoted yet"}


def test_waiting_for_a_model_fills_no_log(caplog: pytest.LogCaptureFixture) -> None:
    waiting = Engine(NotReady("nothing is promoted yet"))
    post("/v1/completions", PLAIN, waiting)
    get("/readyz", waiting)
    assert not [record for record in caplog.records if record.name.startswith("shared")]


def test_a_model_that_is_not_there_yet_is_not_listed() -> None:
    there = False
    app = create_app(Engine(), model="teacher", title="Teacher", models=lambda: [{"id": "teacher"}] if there else [])

    async def listed() -> list[Any]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://face") as client:
            return list((await client.get("/v1/models")).json()["data"])

    assert asyncio.run(listed()) == []
    there = True
    assert [m["id"] for m in asyncio.run(listed())] == ["teacher"]


def test_the_app_closes_its_engine_after_what_runs_beside_it() -> None:
    engine, order = Engine(), []

    @asynccontextmanager
    async def beside() -> AsyncIterator[None]:
        order.append("entered")
        yield
        order.append(f"left, engine closed: {engine.closed}")

    async def run() -> None:
        app = create_app(engine, model="teacher", title="Teacher", beside=beside)
        async with app.router.lifespan_context(app):
            order.append("serving")

    asyncio.run(run())
    assert order == ["entered", "serving", "left, engine closed: False"]
    assert engine.closed
