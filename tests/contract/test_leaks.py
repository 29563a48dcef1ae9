"""The leak probes against the gateway over a local model, and over an engine that says everything to everybody; the checker itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import openai
import pytest
from leaks import ENGINE_NAME, FROM_A_CLIENT, PROBES, Answer, Probe, Target, ask, assert_engine_heard, assert_text_only, evidence, parsed
from tiny_servable import servable_llama

from shared.engines.convert import convert

KEY = "a-long-key-for-leak-probes-0123456789-abcdefghij"
PLAIN = {probe.name: probe for probe in PROBES}


class Blabbermouth(ThreadingHTTPServer):
    """An engine that adds to every answer whatever could be said, asked or not; `heard` is what it was asked."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Blabber)
        self.heard: list[tuple[str, Any]] = []

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server_address[1]}"


TOLD: dict[str, Any] = {
    "prompt_token_ids": [1, 9690, 198],
    "prompt_logprobs": [None, {"504": {"logprob": -0.1}}],
    "prompt_text": "<|im_start|>user",
    "kv_transfer_params": {"remote_host": "10.0.0.7"},
    "system_fingerprint": "vllm-0.32.0",
    "usage": {"prompt_tokens": 35, "completion_tokens": 4, "total_tokens": 39},
}
SAID: dict[str, Any] = {
    "logprobs": {"content": [{"token": "A", "logprob": -0.09, "bytes": [65], "top_logprobs": []}]},
    "token_ids": [49, 4011],
    "stop_reason": 253,
}


class _Blabber(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "uvicorn", "vLLM/0.32.0"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self._heard(None)
        model = {"id": ENGINE_NAME, "object": "model", "owned_by": "vllm", "root": "/models/secret", "max_model_len": 2048}
        self._say(200, {"object": "list", "data": [model]})

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self._heard(asked)
        chat = self.path.endswith("chat/completions")
        if len(str(asked.get("messages") or asked.get("prompt"))) > 4000:
            message = "This model's maximum context length is 2048 tokens. However, your prompt contains at least 2049 input tokens"
            return self._say(400, {"error": {"message": message, "type": "BadRequestError", "param": "input_tokens", "code": 400}})
        head = {"id": "chatcmpl-of-vllm", "created": 1, "model": ENGINE_NAME} | TOLD
        if not asked.get("stream"):
            said: Any = {"message": {"role": "assistant", "content": "A cold is", "reasoning": None}} if chat else {"text": "A cold is"}
            choices = [{"index": i, "finish_reason": "length"} | said | SAID for i in range(asked["n"])]
            return self._say(200, head | {"object": "chat.completion", "choices": choices})
        events = [
            head | {"choices": [{"index": i, "finish_reason": end} | ({"delta": {"content": text}} if chat else {"text": text}) | SAID]}
            for i in range(asked["n"])
            for text, end in (("A c", None), ("old", None), (" is", "length"))
        ]
        text = ": served by vllm 0.32.0\n\nevent: token_ids\nid: 4011\n" + "".join(
            f"data: {json.dumps(e)}\n\n" for e in [*events, head | {"choices": []}]
        )
        return self._say(200, text + "data: [DONE]\n\n")

    def _heard(self, body: Any) -> None:
        assert isinstance(self.server, Blabbermouth)
        self.server.heard.append((f"{self.command} {self.path}", body))

    def _say(self, status: int, content: Any) -> None:
        raw = (content if isinstance(content, str) else json.dumps(content)).encode()
        self.send_response(status)
        kind = "text/event-stream" if isinstance(content, str) else "application/json"
        said = {"content-type": kind, "content-length": str(len(raw)), "x-vllm-version": "0.32.0", "set-cookie": f"engine={ENGINE_NAME}"}
        for name, value in (said | {"x-prompt-tokens": "35", "x-request-id": "chatcmpl-of-vllm"}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(raw)


@dataclass
class Gateway:
    """A gateway under probe, and what its engine has heard if that can be known."""

    target: Target
    engine: str
    heard: list[tuple[str, Any]] | None = None

    def ask(self, probe: Probe) -> Answer | None:
        return ask(self.target, probe.request(self.target, engine=self.engine), method=probe.method)


@pytest.fixture(scope="module", params=["local", "upstream"])
def gateway(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """`distill teacher` as users start it, over a tiny local model or over the engine that tells all."""
    command = [sys.executable, "-m", "shared.cli", "teacher", "--engine", request.param, "--port", "0", "--until-stdin-closes"]
    blabber = Blabbermouth()
    threading.Thread(target=blabber.serve_forever, daemon=True).start()
    if request.param == "local":
        root = tmp_path_factory.mktemp("leaks")
        serving = convert(str(servable_llama(root / "secret-weights")), root / "serving", name="tiny", quantization="float32")
        command += ["--model-ref", str(serving)]
        secrets = (str(root), "secret-weights")
    else:
        command += ["--upstream-url", f"http://{blabber.address}/v1", "--upstream-model", ENGINE_NAME]
        secrets = (blabber.address, "chatcmpl-of-vllm", "/models/secret", "10.0.0.7")
    variables = os.environ | {"TEACHER_API_KEYS": f"prober={KEY}"}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=variables
    ) as process:
        assert process.stdout is not None
        line = next((line for line in process.stdout if "listening on" in line), "")
        assert line, "the gateway did not start"
        target = Target(port=int(line.strip().removesuffix("/v1").rpartition(":")[2]), model="teacher", key=KEY, secrets=(KEY, *secrets))
        yield Gateway(target, blabber.address, blabber.heard if request.param == "upstream" else None)
    blabber.shutdown()
    blabber.server_close()


@pytest.mark.parametrize("probe", PROBES, ids=lambda probe: probe.name)
def test_text_comes_out_or_a_refusal_and_the_engine_hears_of_no_refused_request(gateway: Gateway, probe: Probe) -> None:
    before = len(gateway.heard or ())
    answer = gateway.ask(probe)
    assert_text_only(probe, answer, gateway.target)
    if gateway.heard is not None:
        assert_engine_heard(probe, answer, gateway.heard[before:])


@pytest.mark.parametrize(("given", "param"), [pytest.param(given, param, id=name) for name, given, param, _ in FROM_A_CLIENT])
def test_the_openai_client_is_refused_whatever_gets_more_than_text_from_an_engine(
    gateway: Gateway, given: dict[str, Any], param: str
) -> None:
    with openai.OpenAI(base_url=f"http://127.0.0.1:{gateway.target.port}/v1", api_key=KEY, max_retries=0) as client:
        with pytest.raises(openai.UnprocessableEntityError) as refused:
            client.chat.completions.create(model="teacher", messages=[{"role": "user", "content": "What is a cold?"}], **given)
        assert refused.value.param == param


def test_there_are_probes_enough_and_each_has_a_name_of_its_own() -> None:
    assert len({probe.name for probe in PROBES}) == len(PROBES) >= 60
    assert sum(bool(probe.bare.shows) for probe in PROBES) > 60


GOOD: dict[str, Any] = {
    "id": "chatcmpl-0123456789abcdef",
    "object": "chat.completion",
    "created": 1,
    "model": "teacher",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "A cold"}, "finish_reason": "stop"}],
}
HEADS = {"content-type": "application/json", "date": "Mon, 23 Nov 2026 22:18:15 GMT", "x-request-id": "req-1"}
HERE = Target(port=1, model="teacher", secrets=("10.0.0.7",))


def made(content: Any, *, status: int = 200, **headers: str) -> Answer:
    """An answer as it would come from a server."""
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    heads = HEADS | {"content-length": str(len(body))} | {name.replace("_", "-"): value for name, value in headers.items()}
    head = f"HTTP/1.1 {status} X\r\n" + "".join(f"{name}: {value}\r\n" for name, value in heads.items()) + "\r\n"
    answer = parsed(head.encode() + body, "POST")
    assert answer is not None
    return answer


def choice(**changes: Any) -> dict[str, Any]:
    return GOOD | {"choices": [GOOD["choices"][0] | changes]}


def test_the_checker_lets_a_good_answer_pass() -> None:
    assert_text_only(PLAIN["chat: a plain question"], made(GOOD), HERE)


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(made(choice(logprobs=None)), id="a key too many in a choice"),
        pytest.param(made(choice(message={"role": "assistant", "content": "A", "token_ids": []})), id="a key too many in a message"),
        pytest.param(made(GOOD | {"usage": {"prompt_tokens": 1}}), id="the engine's usage"),
        pytest.param(made(GOOD | {"system_fingerprint": None}), id="a key too many"),
        pytest.param(made(choice(finish_reason="tool_calls")), id="another end"),
        pytest.param(made(choice(index=0.5)), id="another type"),
        pytest.param(made(choice(message={"role": "assistant", "content": ["A"]})), id="no text"),
        pytest.param(made(GOOD | {"model": ENGINE_NAME}), id="the engine's name"),
        pytest.param(made(GOOD | {"id": "chatcmpl-of-vllm"}), id="the engine's id"),
        pytest.param(made({"choices": []}), id="keys missing"),
        pytest.param(made(choice(message={"role": "assistant", "content": "at 10.0.0.7"})), id="a secret in the text"),
        pytest.param(made(GOOD, server="uvicorn"), id="a header"),
        pytest.param(made(GOOD, x_request_id="vllm-1"), id="a word in a header that is allowed"),
        pytest.param(made(GOOD, content_type="text/html"), id="another content type"),
        pytest.param(made(b"A cold"), id="no JSON"),
        pytest.param(made({"error": {"message": "no", "type": "a", "param": None, "code": None}}, status=500), id="another status"),
        pytest.param(None, id="no answer"),
    ],
)
def test_the_checker_refuses_an_answer_with(answer: Answer | None) -> None:
    with pytest.raises(AssertionError):
        assert_text_only(PLAIN["chat: a plain question"], answer, HERE)


def test_an_error_may_repeat_what_was_asked_and_tell_nothing_else() -> None:
    probe = PLAIN["chat: logprobs"]

    def refusal(message: str, param: str | None = "logprobs") -> Answer:
        return made({"error": {"message": message, "type": "invalid_request_error", "param": param, "code": None}}, status=422)

    assert_text_only(probe, refusal("logprobs: unknown field"), HERE)
    for answer in (
        refusal("vllm knows no logprobs"),
        refusal("no logprobs at 10.0.0.7"),
        refusal("logprobs: no", None),
        refusal("no", "echo"),
    ):
        with pytest.raises(AssertionError):
            assert_text_only(probe, answer, HERE)


def chunks(*events: Any) -> bytes:
    return b"".join(b"data: " + (e if isinstance(e, bytes) else json.dumps(e).encode()) + b"\n\n" for e in events)


CHUNK = GOOD | {"object": "chat.completion.chunk", "choices": [{"index": 0, "delta": {"content": "A"}, "finish_reason": None}]}


def test_the_checker_reads_streams_to_their_end() -> None:
    probe = PLAIN["chat: a plain question, streamed"]

    def streamed(body: bytes) -> Answer:
        return made(body, content_type="text/event-stream; charset=utf-8")

    assert_text_only(probe, streamed(chunks(CHUNK, b"[DONE]")), HERE)
    leaky = CHUNK | {"choices": [CHUNK["choices"][0] | {"token_ids": [1]}]}
    for body in (
        chunks(CHUNK),
        chunks(b"[DONE]"),
        chunks(CHUNK, leaky, b"[DONE]"),
        chunks(CHUNK | {"id": "chatcmpl-abcdef0123456789"}, CHUNK, b"[DONE]"),
        b": a comment\n\n" + chunks(CHUNK, b"[DONE]"),
        b"id: 4011\n" + chunks(CHUNK, b"[DONE]"),
    ):
        with pytest.raises(AssertionError):
            assert_text_only(probe, streamed(body), HERE)
    with pytest.raises(AssertionError):
        assert_text_only(probe, made(GOOD), HERE)


def test_the_engine_that_tells_all_does_so() -> None:
    blabber = Blabbermouth()
    threading.Thread(target=blabber.serve_forever, daemon=True).start()
    bare = replace(HERE, port=blabber.server_address[1], model=ENGINE_NAME)
    try:
        for name in (
            "chat: several samples",
            "text: several samples",
            "chat: several samples, streamed",
            "text: several samples, streamed",
        ):
            answer = ask(bare, PLAIN[name].request(bare, engine=blabber.address))
            assert answer is not None
            assert evidence(answer) >= {"log-probabilities", "token ids", "counts of tokens", "the engine's name", "the engine's kind"}
            with pytest.raises(AssertionError):
                assert_text_only(PLAIN[name], answer, bare)
    finally:
        blabber.shutdown()
        blabber.server_close()
