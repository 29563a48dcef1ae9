"""The leak probes against a real vLLM, bare and behind the gateway: what the one gives away, the other keeps."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import openai
import pytest
from leaks import ENGINE_NAME, FROM_A_CLIENT, PROBES, Probe, Target, ask, assert_bare, assert_engine_heard, assert_text_only

if TYPE_CHECKING:
    from conftest import Engine, Start

KEY = "a-long-key-for-leak-probes-0123456789-abcdefghij"


class Relay:
    """Passes on what a gateway says to its engine and what the engine answers; `heard` is every request that has gone through."""

    def __init__(self, port: int) -> None:
        self._engine = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.heard: list[tuple[str, Any]] = []
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._listener.getsockname()[1]}"

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                caller, _ = self._listener.accept()
            except OSError:
                return
            engine = socket.create_connection(("127.0.0.1", self._engine))
            for pump in (self._hear, self._pass):
                threading.Thread(target=pump, args=(caller, engine), daemon=True).start()

    def _hear(self, caller: socket.socket, engine: socket.socket) -> None:
        buffer = b""
        while data := _received(caller):
            buffer += data
            while b"\r\n\r\n" in buffer:
                head, _, rest = buffer.partition(b"\r\n\r\n")
                line, *headers = head.decode().split("\r\n")
                lengths = [int(h.partition(":")[2]) for h in headers if h.lower().startswith("content-length:")]
                length = lengths[0] if lengths else 0
                if len(rest) < length:
                    break
                # before it goes on: whoever has an answer finds its request here
                self.heard.append((line.removesuffix(" HTTP/1.1"), json.loads(rest[:length]) if length else None))
                engine.sendall(buffer[: len(head) + 4 + length])
                buffer = rest[length:]
        _hang_up(engine)

    def _pass(self, caller: socket.socket, engine: socket.socket) -> None:
        while data := _received(engine):
            try:
                caller.sendall(data)
            except OSError:
                break
        _hang_up(caller)
        _hang_up(engine)


def _received(connection: socket.socket) -> bytes:
    try:
        return connection.recv(1 << 16)
    except OSError:
        return b""


def _hang_up(connection: socket.socket) -> None:
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        return  # the other side was faster


@dataclass(frozen=True)
class Probed:
    """The engine as a target, the gateway as a target, and what passes between them."""

    bare: Target
    gateway: Target
    relay: Relay
    engine: str


@pytest.fixture(scope="module")
def probed(engine: Engine, start: Start) -> Iterator[Probed]:
    relay = Relay(engine.port)
    gateway = start(f"http://{relay.address}/v1", TEACHER_API_KEYS=f"prober={KEY}")
    secrets = (engine.address, relay.address, str(engine.model), str(engine.model.resolve()), KEY)
    target = Target(port=gateway.port, model="teacher", key=KEY, secrets=secrets)
    yield Probed(Target(port=engine.port, model=ENGINE_NAME), target, relay, engine.address)
    relay.close()


@pytest.mark.parametrize("probe", PROBES, ids=lambda probe: probe.name)
def test_the_bare_engine_answers_what_the_probe_says_it_does(probed: Probed, probe: Probe) -> None:
    answer = ask(probed.bare, probe.request(probed.bare, engine=probed.engine), method=probe.method)
    assert_bare(probe, answer)
    if probe.bare.shows:  # what it shows is what the gateway is tested for: with no gateway, these tests must fail
        with pytest.raises(AssertionError):
            assert_text_only(probe, answer, probed.bare)


@pytest.mark.parametrize("probe", PROBES, ids=lambda probe: probe.name)
def test_the_gateway_answers_text_or_a_refusal_and_the_engine_hears_of_no_refused_request(probed: Probed, probe: Probe) -> None:
    before = len(probed.relay.heard)
    answer = ask(probed.gateway, probe.request(probed.gateway, engine=probed.engine), method=probe.method)
    assert_text_only(probe, answer, probed.gateway)
    assert_engine_heard(probe, answer, probed.relay.heard[before:])


def test_no_probe_has_gone_to_the_engine_later_than_its_answer(probed: Probed) -> None:
    answered = [p for p in PROBES if p.shape in ("chat", "text") and p.answers == {200}]
    asked = [line for line, _ in probed.relay.heard if line.startswith("POST")]
    either = [p for p in PROBES if p.shape in ("chat", "text") and 200 in p.answers and p.answers != {200}]
    certain = len(answered) + sum(p.asks_engine for p in PROBES)
    assert certain <= len(asked) <= certain + len(either)


@pytest.mark.parametrize(("given", "param", "bare"), [pytest.param(*case, id=name) for name, *case in FROM_A_CLIENT])
def test_the_openai_client_gets_from_the_gateway_nothing_of_what_it_gets_from_the_bare_engine(
    probed: Probed, given: dict[str, Any], param: str, bare: str
) -> None:
    asked: dict[str, Any] = {"messages": [{"role": "user", "content": "What is a cold?"}], "max_tokens": 4} | given
    with openai.OpenAI(base_url=f"http://{probed.engine}/v1", api_key="none", max_retries=0) as client:
        said = client.chat.completions.create(model=ENGINE_NAME, **asked)
        shown = "".join(str(part) for part in said) if given.get("stream") else str(said)
        assert ENGINE_NAME in shown
        assert bare in shown
    heard = len(probed.relay.heard)
    with openai.OpenAI(base_url=f"http://127.0.0.1:{probed.gateway.port}/v1", api_key=KEY, max_retries=0) as client:
        with pytest.raises(openai.UnprocessableEntityError) as refused:
            client.chat.completions.create(model="teacher", **asked)
        assert refused.value.param == param
    assert [line for line, _ in probed.relay.heard[heard:] if line.startswith("POST")] == []
