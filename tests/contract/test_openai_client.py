"""The real `openai` client, and our own, against a real server: the API is the one they were written for."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
import uvicorn

from shared.contracts import GenerationRequest, Message, Sampling
from shared.engines.scripted import ScriptedEngine
from shared.engines.upstream import UpstreamEngine
from shared.errors import RequestRefused
from shared.http.app import create_app
from shared.http.client import OpenAITeacher
from shared.settings import TaskSettings
from student_trainer.serving.app import Student, generating_app

QUESTION = "I take ibuprofen against migraine."


@pytest.fixture(scope="module", params=["teacher", "student"])
def base_url(request: pytest.FixtureRequest) -> Iterator[str]:
    """A teacher and a student over the scripted engine, each on a free port."""
    name = request.param
    if name == "teacher":
        app = create_app(ScriptedEngine(), model=name, title=name)
    else:
        student = Student(Path(), "v1", TaskSettings())
        app = generating_app(ScriptedEngine(), student, kind="decoder-only", public_name=name)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        server.should_exit = True
        thread.join()


@pytest.fixture
def client(base_url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=base_url, api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def model(client: openai.OpenAI) -> str:
    (listed,) = client.models.list().data
    return listed.id


def test_a_chat_of_several_samples(client: openai.OpenAI, model: str) -> None:
    answer = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": QUESTION}], n=3, temperature=0.9, seed=1, stop=["\n"], max_tokens=4
    )
    assert answer.model == model
    assert [c.index for c in answer.choices] == [0, 1, 2]
    assert all(c.finish_reason in ("stop", "length") and c.message.content for c in answer.choices)
    assert all(c.logprobs is None for c in answer.choices)
    usage = answer.usage.model_dump()  # type: ignore[union-attr]
    assert usage["prompt_characters"] == len(QUESTION)
    assert usage["completion_characters"] == sum(len(c.message.content or "") for c in answer.choices)
    assert not usage.get("total_tokens")


def test_a_plain_completion(client: openai.OpenAI, model: str) -> None:
    answer = client.completions.create(model=model, prompt=QUESTION, temperature=0)
    assert answer.choices[0].text == "What should I know about ibuprofen and migraine?"
    assert answer.choices[0].finish_reason == "stop"


def test_errors_arrive_as_the_clients_own_classes_with_their_messages(client: openai.OpenAI, model: str) -> None:
    with pytest.raises(openai.NotFoundError, match="does not exist") as missing:
        client.completions.create(model="gpt", prompt=QUESTION)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.UnprocessableEntityError, match="logprobs") as refused:
        client.chat.completions.create(model=model, messages=[{"role": "user", "content": QUESTION}], logprobs=True)
    assert refused.value.param == "logprobs"
    with pytest.raises(openai.UnprocessableEntityError, match="prompt: it has no text"):
        client.completions.create(model=model, prompt=" ")


@pytest.mark.parametrize("n", [1, 4])
def test_our_own_client_gets_over_http_what_the_engine_says(base_url: str, model: str, n: int) -> None:
    request = GenerationRequest(
        messages=(Message(role="user", content=QUESTION),), n=n, sampling=Sampling(temperature=0.8, seed=3, max_tokens=6, stop=("\n",))
    )

    async def ask_both() -> None:
        teacher = OpenAITeacher(base_url, model=model)
        try:
            answer = await teacher.ask(request)
            assert list(answer.choices) == await ScriptedEngine().generate(request)
            assert answer.input_tokens is None  # the gateway counts characters and words: tokens would tell of its engine
        finally:
            await teacher.aclose()

    asyncio.run(ask_both())


def test_an_upstream_engine_asks_chats_and_plain_prompts_and_keeps_the_servers_own_words(base_url: str, model: str) -> None:
    async def ask() -> None:
        engine = UpstreamEngine([base_url], model=model, timeout_s=10)
        try:
            await engine.check()
            for request in (GenerationRequest(prompt=QUESTION), GenerationRequest(messages=(Message(role="user", content=QUESTION),))):
                assert await engine.generate(request) == await ScriptedEngine().generate(request)
            with pytest.raises(RequestRefused) as refused:
                await engine.generate(GenerationRequest(prompt=" "))
            assert "127.0.0.1" not in str(refused.value)
        finally:
            await engine.aclose()

    asyncio.run(ask())
