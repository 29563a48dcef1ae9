"""The gateway before a real vLLM: what it answers, what it frees when callers leave, and how it takes the death of its engine."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeVar

import httpx
import pytest
from leaks import CHAT, TEXT, events

if TYPE_CHECKING:
    from conftest import Engine, Gateway, Start

T = TypeVar("T")
QUESTION = "How is the common cold treated?"
OPENS = {CHAT: {"messages": [{"role": "user", "content": QUESTION}]}, TEXT: {"prompt": "The common cold is treated with"}}
LOAD = 16
"""Requests in flight when the engine is killed."""
SOON_S = 10.0


@pytest.fixture(scope="module")
def gateway(engine: Engine, start: Start) -> Gateway:
    return start(engine.url, "--no-auth")


def asked(gateway: Gateway, path: str = CHAT, **fields: Any) -> httpx.Response:
    body = {"model": "teacher", "max_tokens": 24, "temperature": 0} | OPENS[path] | fields
    return httpx.post(gateway.base + path, json=body, timeout=180, trust_env=False)


def texts(answer: httpx.Response) -> list[str]:
    """The text of each choice, whole or out of a stream."""
    assert answer.status_code == 200, answer.text
    if answer.headers["content-type"] == "application/json":
        return [c["message"]["content"] if "message" in c else c["text"] for c in answer.json()["choices"]]
    return ["".join(pieces) for pieces in streamed(answer).values()]


def streamed(answer: httpx.Response) -> dict[int, list[str]]:
    """The pieces of each choice of a stream, in the choices' order; every choice ends once, and nothing follows."""
    *chunks, last = events(answer.content)
    assert last == "[DONE]"
    pieces: dict[int, list[str]] = {}
    ended: list[int] = []
    for choice in (choice for chunk in chunks for choice in chunk["choices"]):
        assert choice["index"] not in ended
        if piece := (choice["delta"].get("content") if "delta" in choice else choice["text"]):
            pieces.setdefault(choice["index"], []).append(piece)
        if choice["finish_reason"]:
            ended.append(choice["index"])
    assert sorted(ended) == sorted(pieces)
    return dict(sorted(pieces.items()))


def eventually(holds: Callable[[], bool], *, within_s: float = SOON_S) -> float:
    """Seconds until it holds; the test fails if it does not, however often it looks."""
    began, looks = time.monotonic(), 1
    while not holds():
        # a core of a shared host may stand still for a minute: one late look is none
        assert time.monotonic() - began < within_s or looks < 20, f"not within {within_s:g} s"
        time.sleep(0.1)
        looks += 1
    return time.monotonic() - began


def undisturbed(tried: Callable[[], T], *, usual_s: float) -> T:
    """What `tried` gives; anew, at most twice, where it took longer: then the machine stood still, and it tells nothing of a gateway."""
    for _ in range(2):
        began = time.monotonic()
        try:
            given = tried()
        except AssertionError:
            if time.monotonic() - began < usual_s:
                raise
        else:
            if time.monotonic() - began < usual_s:
                return given
    return tried()


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_one_answer_under_the_public_name(gateway: Gateway, path: str) -> None:
    answer = asked(gateway, path)
    (text,) = texts(answer)
    assert text.strip()
    assert answer.json()["model"] == "teacher"
    assert answer.json()["choices"][0]["finish_reason"] in ("stop", "length")


@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize("stream", [False, True])
def test_four_samples_of_one_prompt_differ(gateway: Gateway, path: str, stream: bool) -> None:
    samples = texts(asked(gateway, path, n=4, temperature=1.5, stream=stream))
    assert len(samples) == 4
    assert all(samples)
    assert len(set(samples)) > 1


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_a_stream_says_what_the_whole_answer_says(gateway: Gateway, path: str) -> None:
    asked(gateway, path)  # from now on the engine has the prompt in its cache, which may move a bit of its arithmetic
    assert texts(asked(gateway, path, stream=True)) == texts(asked(gateway, path))


def test_a_stream_comes_piece_by_piece_and_ends_where_words_do_not_where_tokens_do(gateway: Gateway) -> None:
    answer = asked(gateway, max_tokens=120, stream=True)
    (pieces,) = streamed(answer).values()
    assert len(pieces) > 10
    for piece, following in pairwise(pieces):
        assert following[0].isspace() or len(piece.strip()) >= 12, (piece, following)
    arrived: list[float] = []
    body = {"model": "teacher", "max_tokens": 60, "temperature": 0, "stream": True} | OPENS[CHAT]
    with httpx.stream("POST", gateway.base + CHAT, json=body, timeout=180, trust_env=False) as response:
        arrived.extend(time.monotonic() for line in response.iter_lines() if line)
    assert arrived[-1] - arrived[0] > 0.2


def test_an_answer_ends_before_its_stop_text(gateway: Gateway) -> None:
    for stream in (False, True):
        answer = asked(gateway, TEXT, prompt="One, two, three, four, five, six,", stop=[",", "."], stream=stream)
        (text,) = texts(answer)
        assert "," not in text
        assert '"finish_reason":"stop"' in answer.text


def test_an_answer_that_reaches_its_bound_says_so(gateway: Gateway) -> None:
    assert asked(gateway, max_tokens=2).json()["choices"][0]["finish_reason"] == "length"


def test_a_seed_repeats_a_sample_and_another_seed_does_not(gateway: Gateway) -> None:
    def sample(seed: int) -> list[str]:
        return texts(asked(gateway, temperature=1.5, seed=seed, max_tokens=16))

    sample(1)
    assert sample(1) == sample(1)
    assert len({sample(seed)[0] for seed in (1, 2, 3, 4)}) > 1


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_usage_is_what_anybody_can_count_in_the_texts(gateway: Gateway, path: str) -> None:
    answer = asked(gateway, path, n=2, temperature=1)
    prompt = OPENS[path].get("prompt") or QUESTION
    said = texts(answer)
    assert answer.json()["usage"] == {
        "prompt_characters": len(prompt),
        "prompt_words": len(prompt.split()),
        "completion_characters": sum(map(len, said)),
        "completion_words": sum(len(text.split()) for text in said),
    }


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("fields", [{"content": "cold " * 5000, "max_tokens": 8}, {"content": "cold", "max_tokens": 4000}])
def test_what_is_too_long_for_the_model_is_a_400_that_counts_in_characters(gateway: Gateway, fields: dict[str, Any], stream: bool) -> None:
    messages = [{"role": "user", "content": fields["content"]}]
    answer = asked(gateway, messages=messages, max_tokens=fields["max_tokens"], stream=stream)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert f"{len(fields['content'])} characters" in error["message"]
    # no count of tokens but the bound that the caller gave
    assert "token" not in error["message"].replace("max_tokens", "")
    assert not re.search(r"\b20(48|49|5\d)\b", answer.text)


@pytest.mark.parametrize("stream", [False, True])
def test_a_caller_who_leaves_frees_the_engine(gateway: Gateway, engine: Engine, stream: bool) -> None:
    def finished() -> float:
        return sum(engine.metric("vllm:request_success_total", finished_reason=reason) for reason in ("stop", "length"))

    def running() -> float:
        return engine.metric("vllm:num_requests_running") + engine.metric("vllm:num_requests_waiting")

    body = {"model": "teacher", "n": 4, "max_tokens": 1900, "temperature": 1.5, "stream": stream, **OPENS[CHAT]}
    raw = json.dumps(body).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: {len(raw)}\r\n\r\n"

    def completed() -> float:
        """Of the four answers of a caller who leaves."""
        eventually(lambda: running() == 0)
        before = finished()
        with socket.create_connection(("127.0.0.1", gateway.port)) as caller:
            caller.sendall(head.encode() + raw)
            eventually(lambda: running() > 0)
            if stream:
                assert caller.recv(1 << 16).startswith(b"HTTP/1.1 200")
        eventually(lambda: running() == 0)
        return finished() - before

    # given up, not completed: four answers of that length take a minute. Now and then one ends by itself, after its first words
    assert undisturbed(completed, usual_s=20) < 4


@dataclass
class Ended:
    """How one request of the load ended."""

    stream: bool
    status: int
    body: bytes
    at: float
    """Seconds after the kill; below 0 where it ended before."""


@dataclass
class Story:
    """What was seen while the engine was killed under load and came back, with one gateway from before and one from meanwhile."""

    ended: list[Ended] = field(default_factory=list)
    unready_s: float = 0.0
    """Seconds from the kill until /readyz said 503."""
    meanwhile: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    """Status and seconds of /healthz, /readyz and a question, of each gateway, while no engine was there."""
    ready_s: dict[str, float] = field(default_factory=dict)
    """Seconds from the engine's return until /readyz said 200."""
    afterwards: dict[str, int] = field(default_factory=dict)
    same_processes: bool = False


@pytest.fixture(scope="module", params=["all its processes", "its core"])
def story(request: pytest.FixtureRequest, engine: Engine, gateway: Gateway, start: Start) -> Story:
    return undisturbed(lambda: _story(request.param, engine, gateway, start), usual_s=150)


def _story(what: str, engine: Engine, gateway: Gateway, start: Start) -> Story:
    seen = Story()
    asyncio.run(_killed_under_load(engine, gateway, what, seen))
    engine.kill()
    late = start(engine.url, "--no-auth")
    gateways = {"before": gateway, "meanwhile": late}
    for name, one in gateways.items():
        seen.meanwhile[name] = []
        for ask in (lambda one=one: _get(one, "/healthz"), lambda one=one: _get(one, "/readyz"), lambda one=one: asked(one)):
            began = time.monotonic()
            seen.meanwhile[name].append((ask().status_code, time.monotonic() - began))
    engine.start()
    for name, one in gateways.items():
        seen.ready_s[name] = eventually(lambda one=one: _get(one, "/readyz").status_code == 200, within_s=30)
        seen.afterwards[name] = asked(one).status_code
    seen.same_processes = gateway.process.poll() is None and late.process.poll() is None
    return seen


def _get(gateway: Gateway, path: str) -> httpx.Response:
    return httpx.get(gateway.base + path, timeout=30, trust_env=False)


async def _killed_under_load(engine: Engine, gateway: Gateway, what: str, seen: Story) -> None:
    """LOAD requests at any time, every other one streamed, until the kill; how each ended and when /readyz turned."""
    killed = 0.0

    async def asks(client: httpx.AsyncClient, stream: bool) -> None:
        while not killed:
            await one(client, stream)

    async def one(client: httpx.AsyncClient, stream: bool) -> None:
        body = {"model": "teacher", "max_tokens": 1500, "temperature": 1.2, "stream": stream} | OPENS[CHAT]
        async with client.stream("POST", gateway.base + CHAT, json=body) as response:
            raw = b"".join([part async for part in response.aiter_raw()])
        seen.ended.append(Ended(stream, response.status_code, raw, time.monotonic() - killed if killed else -1.0))

    async with httpx.AsyncClient(timeout=180, trust_env=False) as client:
        asked = [asyncio.create_task(asks(client, stream=bool(index % 2))) for index in range(LOAD)]
        await asyncio.to_thread(eventually, lambda: engine.metric("vllm:num_requests_running") >= LOAD - 2, within_s=120)
        killed = time.monotonic()
        threading.Thread(target=engine.kill if what == "all its processes" else engine.kill_core).start()
        while (await client.get(f"{gateway.base}/readyz")).status_code != 503:
            assert time.monotonic() - killed < 60, "/readyz never turned"
            await asyncio.sleep(0.1)
        seen.unready_s = time.monotonic() - killed
        await asyncio.gather(*asked)


def test_every_request_in_flight_at_a_kill_gets_its_whole_answer_or_a_clean_502_or_503(story: Story) -> None:
    in_flight = [one for one in story.ended if one.at >= 0]
    assert len(in_flight) >= LOAD // 2, "the engine was not under load"
    for one in in_flight:
        if one.status == 200 and one.stream:
            *_, last = events(one.body)
            assert last == "[DONE]" or last["error"]["type"] == "server_error", one
        elif one.status == 200:
            assert json.loads(one.body)["choices"][0]["message"]["content"], one
        else:
            assert one.status in (502, 503), one
            assert set(json.loads(one.body)["error"]) == {"message", "type", "param", "code"}, one
        for word in (b"vllm", b"127.0.0.1", b"EngineCore", b"EngineDead", b"Traceback"):
            assert word not in one.body, one
    assert max(one.at for one in in_flight) < SOON_S


def test_readyz_turns_soon_after_a_kill(story: Story) -> None:
    assert story.unready_s < SOON_S


def test_without_an_engine_a_gateway_lives_is_not_ready_and_refuses_at_once_also_one_started_then(story: Story) -> None:
    for name, seen in story.meanwhile.items():
        assert [status for status, _ in seen] == [200, 503, 503], name
        assert max(seconds for _, seconds in seen) < SOON_S, name


def test_when_the_engine_is_back_both_gateways_answer_and_nobody_has_touched_them(story: Story) -> None:
    assert story.afterwards == {"before": 200, "meanwhile": 200}
    assert max(story.ready_s.values()) < SOON_S
    assert story.same_processes
