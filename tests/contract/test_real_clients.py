"""Clients that others wrote, unchanged, against a real server: the `openai` package in all its manners, aiohttp and curl."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import openai
import pytest
from gateways import ANSWER, ANSWER_S, QUESTION, Gateway, in_time, teacher

from shared.http.keys import digest

CHAT: list[Any] = [{"role": "user", "content": QUESTION}]
SAMPLED: dict[str, Any] = {"n": 2, "temperature": 0.8, "seed": 3, "max_tokens": 40, "stop": ["\n"], "user": "somebody"}
GREEDY: dict[str, Any] = {"model": "teacher", "prompt": QUESTION, "temperature": 0}
NAMES = ("alice", "revoked", "hurried", "throttled", "talkative")


def key_of(name: str) -> str:
    return f"key-of-{name}-0123456789abcdef"


LIMITS = {
    "revoked": ", revoked: true",
    "hurried": ", requests_per_minute: 1",
    "throttled": ", requests_per_minute: 1",
    "talkative": ", characters_per_day: 150",
}


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    folder = tmp_path_factory.mktemp("gateway")
    entries = [f"{name}: {{sha256: {digest(key_of(name)).hex()}{LIMITS.get(name, '')}}}\n" for name in NAMES]
    (folder / "keys.yaml").write_text("".join(entries))
    with teacher(folder / "stderr", "--api-keys-file", str(folder / "keys.yaml"), "--delay-s", "0.1") as gateway:
        yield gateway
        assert gateway.complaints() == []


Client = Callable[..., openai.OpenAI]


@pytest.fixture
def client(gateway: Gateway) -> Iterator[Client]:
    """Makes clients of a key's owner, that do not try again unless told so; closes them."""
    made: list[openai.OpenAI] = []

    def make(name: str = "alice", *, key: str | None = None, max_retries: int = 0) -> openai.OpenAI:
        made.append(openai.OpenAI(base_url=f"{gateway.url}/v1", api_key=key or key_of(name), max_retries=max_retries, timeout=ANSWER_S))
        return made[-1]

    yield make
    for one in made:
        one.close()


def asynchronously(gateway: Gateway, steps: Callable[[openai.AsyncOpenAI], Any]) -> Any:
    async def run() -> Any:
        async with openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key=key_of("alice"), max_retries=0, timeout=ANSWER_S) as client:
            return await steps(client)

    return asyncio.run(run())


def texts(answer: Any) -> list[tuple[str, str]]:
    """Of every choice: its text and why it ended."""
    return [(c.message.content if hasattr(c, "message") else c.text, c.finish_reason) for c in answer.choices]


class Gathered:
    """The choices of a stream."""

    def __init__(self, choices: int) -> None:
        self.said, self.reasons, self.chunks = [""] * choices, [""] * choices, 0
        self.ids: set[str] = set()

    def add(self, chunk: Any) -> None:
        self.chunks += 1
        self.ids.add(chunk.id)
        for choice in chunk.choices:
            assert not self.reasons[choice.index], "text after the end"
            self.said[choice.index] += (choice.delta.content or "") if hasattr(choice, "delta") else choice.text
            self.reasons[choice.index] = choice.finish_reason or ""

    def texts(self) -> list[tuple[str, str]]:
        assert len(self.ids) == 1
        assert self.chunks > 2 * len(self.said)
        return list(zip(self.said, self.reasons, strict=True))


def test_a_streamed_answer_has_the_text_of_the_whole_one(client: Client) -> None:
    chats, plain = client().chat.completions, client().completions
    gathered = Gathered(2)
    for chunk in chats.create(model="teacher", messages=CHAT, stream=True, **SAMPLED):
        gathered.add(chunk)
    assert gathered.texts() == texts(chats.create(model="teacher", messages=CHAT, **SAMPLED))
    gathered = Gathered(2)
    for chunk in plain.create(model="teacher", prompt=QUESTION, stream=True, **SAMPLED):
        gathered.add(chunk)
    assert gathered.texts() == texts(plain.create(model="teacher", prompt=QUESTION, **SAMPLED))


def test_a_streamed_answer_has_the_text_of_the_whole_one_for_asynchronous_clients(gateway: Gateway) -> None:
    async def ask(client: openai.AsyncOpenAI) -> None:
        for create, asked in (
            (client.chat.completions.create, {"messages": CHAT}),
            (client.completions.create, {"prompt": QUESTION}),
        ):
            gathered = Gathered(2)
            async for chunk in await create(model="teacher", stream=True, **asked, **SAMPLED):
                gathered.add(chunk)
            assert gathered.texts() == texts(await create(model="teacher", **asked, **SAMPLED))

    asynchronously(gateway, ask)


def test_many_asynchronous_requests_of_one_client_get_their_own_answers(gateway: Gateway) -> None:
    letters = [f"sickness{a}{b}" for a in "abcdefgh" for b in "abcdefgh"]

    async def ask(client: openai.AsyncOpenAI) -> list[str]:
        async def one(word: str) -> str:
            answer = await client.completions.create(model="teacher", prompt=word, temperature=0)
            return answer.choices[0].text

        return await asyncio.gather(*map(one, letters))

    assert asynchronously(gateway, ask) == [f"What should I know about {word}?" for word in letters]


def test_the_clients_helper_for_streams_gives_the_whole_answer_at_the_end(client: Client) -> None:
    with client().chat.completions.stream(model="teacher", messages=CHAT, temperature=0) as stream:
        kinds = [event.type for event in stream]
        assert stream.get_final_completion().choices[0].message.content == ANSWER
    assert kinds.count("content.delta") > 2
    assert kinds[-1] == "content.done"


def test_a_stream_left_in_the_middle_leaves_the_client_usable(client: Client) -> None:
    one = client()
    for _ in range(5):
        with one.completions.create(model="teacher", prompt=QUESTION, temperature=0, stream=True) as stream:
            assert next(iter(stream)).choices[0].text == "What"
    assert texts(one.completions.create(model="teacher", prompt=QUESTION, temperature=0)) == [(ANSWER, "stop")]


def test_the_models_are_listed(client: Client) -> None:
    assert [(m.id, m.object) for m in client().models.list()] == [("teacher", "model")]


def test_an_answers_request_id_is_the_one_in_the_servers_log(gateway: Gateway, client: Client) -> None:
    answer = client().completions.create(model="teacher", prompt=QUESTION)
    raw = client().chat.completions.with_raw_response.create(model="teacher", messages=CHAT)
    with client().completions.with_streaming_response.create(model="teacher", prompt=QUESTION, stream=True) as streamed:
        assert b"".join(streamed.iter_bytes()).endswith(b"data: [DONE]\n\n")
    with pytest.raises(openai.UnprocessableEntityError) as refused:
        client().completions.create(model="teacher", prompt=QUESTION, n=65)
    assert raw.parse()._request_id == raw.headers["x-request-id"]
    ids = [answer._request_id, raw.request_id, streamed.headers["x-request-id"], refused.value.request_id]
    assert len(set(ids)) == 4
    for request_id in ids:
        assert request_id
        assert in_time(lambda request_id=request_id: request_id in gateway.log.read_text())  # type: ignore[misc]
    assert QUESTION not in gateway.log.read_text()


def test_no_answer_has_other_headers_than_it_needs(client: Client) -> None:
    needed = {"date", "content-type", "content-length", "x-request-id"}
    assert set(client().completions.with_raw_response.create(model="teacher", prompt=QUESTION).headers) == needed
    with client().completions.with_streaming_response.create(model="teacher", prompt=QUESTION, stream=True) as streamed:
        assert set(streamed.headers) == needed - {"content-length"} | {"transfer-encoding", "cache-control"}


@pytest.mark.parametrize("key", ["EMPTY", "sk-0123456789abcdefghijklmnop", "key-of-alice-0123456789abcdeF"])
def test_an_unknown_key_is_an_authentication_error(client: Client, key: str) -> None:
    with pytest.raises(openai.AuthenticationError) as refused:
        client(key=key).chat.completions.create(model="teacher", messages=CHAT)
    assert refused.value.code == "invalid_api_key"
    assert refused.value.type == "authentication_error"
    assert key not in str(refused.value)
    with pytest.raises(openai.AuthenticationError):
        client(key=key).models.list()
    with pytest.raises(openai.AuthenticationError):
        client(key=key).completions.create(model="teacher", prompt=QUESTION, stream=True)


def test_a_revoked_key_is_a_permission_denied_error(client: Client) -> None:
    with pytest.raises(openai.PermissionDeniedError, match="revoked"):
        client("revoked").completions.create(model="teacher", prompt=QUESTION)


def test_too_many_requests_are_a_rate_limit_error_that_tells_when_to_come_back(client: Client) -> None:
    one = client("hurried").completions
    one.create(model="teacher", prompt=QUESTION)
    with pytest.raises(openai.RateLimitError, match="1 times a minute") as refused:
        one.create(model="teacher", prompt=QUESTION)
    assert refused.value.code == "rate_limit_exceeded"
    assert 1 <= int(refused.value.response.headers["retry-after"]) <= 60


def test_a_used_up_day_is_a_rate_limit_error_of_its_own_code(client: Client) -> None:
    one = client("talkative").completions
    with pytest.raises(openai.BadRequestError, match="lower n or max_tokens"):
        one.create(model="teacher", prompt=QUESTION, max_tokens=19)
    one.create(model="teacher", prompt=QUESTION, max_tokens=18)  # reserves 144 characters and takes some forty
    with pytest.raises(openai.RateLimitError, match="lower n or max_tokens, or wait") as refused:
        one.create(model="teacher", prompt=QUESTION, max_tokens=18)
    assert refused.value.code == "insufficient_quota"
    assert 1 <= int(refused.value.response.headers["retry-after"]) <= 86_400


def test_a_client_that_may_try_again_waits_as_long_as_it_was_told(tmp_path: Path) -> None:
    (tmp_path / "keys.yaml").write_text(f"single: {{sha256: {digest(key_of('single')).hex()}, concurrent_requests: 1}}\n")
    asked, answered = [], []
    hooks = {
        "request": [lambda _: asked.append(time.monotonic())],
        "response": [lambda r: answered.append((time.monotonic(), r.status_code))],
    }
    with (
        teacher(tmp_path / "stderr", "--api-keys-file", str(tmp_path / "keys.yaml"), "--delay-s", "3", "--metrics-port", "0") as slow,
        ThreadPoolExecutor() as threads,
        openai.OpenAI(base_url=f"{slow.url}/v1", api_key=key_of("single"), max_retries=0, timeout=ANSWER_S) as hasty,
        openai.OpenAI(
            base_url=f"{slow.url}/v1",
            api_key=key_of("single"),
            max_retries=20,
            http_client=openai.DefaultHttpxClient(event_hooks=hooks, timeout=ANSWER_S),
        ) as patient,
    ):
        assert slow.process.stdout is not None
        metrics = slow.process.stdout.readline().split()[-1]
        first = threads.submit(lambda: hasty.completions.create(**GREEDY))
        assert in_time(lambda: "distill_http_requests_in_flight 1.0" in httpx.get(metrics, trust_env=False, timeout=ANSWER_S).text)
        with pytest.raises(openai.RateLimitError, match="at a time") as refused:
            hasty.completions.create(**GREEDY)
        assert refused.value.response.headers["retry-after"] == "1"
        assert texts(patient.completions.create(**GREEDY)) == [(ANSWER, "stop")]
        assert texts(first.result()) == [(ANSWER, "stop")]
    *refusals, (_, last) = answered
    assert {status for _, status in refusals} == {429}
    assert last == 200
    # of its own it comes again after half a second
    assert min(again - told for again, (told, _) in zip(asked[1:], refusals, strict=True)) >= 1


def test_requests_that_are_wrong_are_the_clients_own_classes_of_errors(client: Client) -> None:
    one = client()
    with pytest.raises(openai.BadRequestError, match="at most 100000") as too_long:
        one.completions.create(model="teacher", prompt="a" * 100_001)
    assert (too_long.value.code, too_long.value.param) == ("context_length_exceeded", "prompt")
    with pytest.raises(openai.NotFoundError) as missing:
        one.completions.create(model="gpt-4o", prompt=QUESTION)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        one.embeddings.create(model="teacher", input=QUESTION)
    with pytest.raises(openai.NotFoundError):
        one.responses.create(model="teacher", input=QUESTION)
    with pytest.raises(openai.UnprocessableEntityError) as refused:
        one.completions.create(model="teacher", prompt=[QUESTION, QUESTION])
    assert refused.value.param == "prompt"
    with pytest.raises(openai.UnprocessableEntityError):
        one.completions.create(model="teacher", prompt=[1, 2, 3])
    with pytest.raises(openai.APIStatusError) as too_large:
        one.completions.create(model="teacher", prompt="a" * (1 << 20))
    assert too_large.value.status_code == 413


EXTRA = {
    "logprobs": 1,
    "top_logprobs": 5,
    "prompt_logprobs": 1,
    "logit_bias": {"50256": -100},
    "echo": True,
    "best_of": 3,
    "return_token_ids": True,
    "return_tokens_as_token_ids": True,
    "prompt_token_ids": [1, 2],
    "allowed_token_ids": [1],
    "tools": [],
    "response_format": {"type": "json_object"},
    "stream_options": {"include_usage": True},
    "guided_json": {},
    "min_tokens": 1,
    "anything_else": None,
}


@pytest.mark.parametrize("field", EXTRA)
def test_what_a_client_sends_beyond_text_is_refused_by_name(client: Client, field: str) -> None:
    for ask in (
        lambda **more: client().completions.create(model="teacher", prompt=QUESTION, **more),
        lambda **more: client().chat.completions.create(model="teacher", messages=CHAT, **more),
    ):
        for stream in (False, True):
            with pytest.raises(openai.UnprocessableEntityError, match=field) as refused:
                ask(extra_body={field: EXTRA[field]}, stream=stream)
            assert refused.value.param == field


@pytest.mark.parametrize(
    ("name", "size", "status"),
    [("nobody", 900_000, 401), ("revoked", 900_000, 403), ("throttled", 900_000, 429), ("alice", 3_000_000, 413)],
)
def test_a_refusal_reaches_those_as_well_who_still_send_a_long_body(gateway: Gateway, name: str, size: int, status: int) -> None:
    """aiohttp tells of a connection that breaks while it writes before it looks for an answer."""
    body = json.dumps({"model": "teacher", "prompt": "a" * size}).encode()
    headers = {"authorization": f"Bearer {key_of(name)}", "content-type": "application/json"}

    async def ask() -> set[int]:
        found = set()
        async with aiohttp.ClientSession() as session:
            if name == "throttled":
                await session.post(f"{gateway.url}/v1/completions", data=b"{}", headers=headers)
            for _ in range(20):
                async with session.post(f"{gateway.url}/v1/completions", data=body, headers=headers) as answer:
                    assert (await answer.json())["error"]["message"]
                    found.add(answer.status)
        return found

    assert asyncio.run(ask()) == {status}


def curl(gateway: Gateway, *options: str, body: bytes, path: str = "/v1/completions") -> tuple[int, str]:
    """The status and what was said."""
    if shutil.which("curl") is None:
        pytest.skip("there is no curl here")
    command = ["curl", "-s", "--max-time", str(int(ANSWER_S)), "--noproxy", "*", "-w", "\n%{http_code}", *options]
    command += ["-H", f"Authorization: Bearer {key_of('alice')}", "-H", "Content-Type: application/json", "--data-binary", "@-"]
    ran = subprocess.run([*command, f"{gateway.url}{path}"], input=body, capture_output=True)
    assert ran.returncode == 0, ran
    said, _, status = ran.stdout.decode().rpartition("\n")
    return int(status), said


@pytest.mark.parametrize("options", [[], ["--http1.0"], ["--http2"], ["-H", "Expect: 100-continue"], ["-H", "Transfer-Encoding: chunked"]])
def test_curl_is_answered_whatever_it_speaks(gateway: Gateway, options: list[str]) -> None:
    status, said = curl(gateway, *options, body=json.dumps(GREEDY).encode())
    assert (status, json.loads(said)["choices"][0]["text"]) == (200, ANSWER)


def test_curl_gets_a_stream_event_by_event(gateway: Gateway) -> None:
    status, said = curl(gateway, "-N", body=json.dumps(GREEDY | {"stream": True}).encode())
    *events, done = [line.removeprefix("data: ") for line in said.splitlines() if line]
    assert (status, done) == (200, "[DONE]")
    assert "".join(json.loads(event)["choices"][0]["text"] for event in events) == ANSWER


def test_curl_is_told_that_its_body_is_too_large(gateway: Gateway) -> None:
    for size in ((1 << 20) + 1, 20 << 20):
        status, said = curl(gateway, body=json.dumps(GREEDY | {"user": "u" * size}).encode())
        assert (status, json.loads(said)["error"]["type"]) == (413, "invalid_request_error")
