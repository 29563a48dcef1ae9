"""The leak probes: requests that try to get more than text out of a gateway, what a bare vLLM gives for each, what a gateway may answer.

Every probe says both. `bare` is what vLLM 0.32, started with all its hardening flags, answers to the very same bytes: a suite whose
probes are misspelt would pass against anything, and this is what keeps it honest. `answers` is what the gateway must answer.
Probes travel through a plain socket: no client may tidy up their paths, their headers or their JSON.
"""

from __future__ import annotations

import gzip
import http.client
import io
import json
import re
import socket
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, cast
from urllib.parse import unquote

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
ENGINE_NAME = "engine-7b-internal"
"""What the engine calls its model, wherever it can be told: a name that is recognised when it leaks."""

EVIDENCE = {
    "log-probabilities": re.compile(rb'"(logprob|token_logprobs|top_logprobs)"\s*:\s*(\[\s*)?-?\d'),
    "log-probabilities of the prompt": re.compile(rb'"prompt_logprobs"\s*:\s*\[\s*(null|\{)'),
    "token ids": re.compile(rb'"(token_ids|prompt_token_ids|tokens)"\s*:\s*\[\s*\d'),
    "token ids as words": re.compile(rb'"token_id:\d+"'),
    "counts of tokens": re.compile(rb'"(prompt_tokens|completion_tokens|total_tokens|input_tokens|max_model_len|count)"\s*:\s*\d'),
    "counts of tokens in words": re.compile(rb"(?i)\d+ (input |output )?tokens|max_model_len=\d+"),
    "the engine's name": re.compile(b'"(model|id)"\\s*:\\s*"%s"' % ENGINE_NAME.encode()),
    "the engine's kind": re.compile(rb"(?i)vllm|uvicorn"),
    "its version": re.compile(rb'"version"\s*:\s*"\d'),
    "the model's folder": re.compile(rb'"root"\s*:\s*"/'),
    "the prompt as the model sees it": re.compile(rb"<\|im_start\|>"),
    "the caller's own request id": re.compile(rb'"id"\s*:\s*"(chat)?cmpl-a-request-of-mine'),
    "its load": re.compile(rb'"server_load"\s*:'),
    "an answer": re.compile(rb'"(content|text|output|sequences|choices)"\s*:'),
    "its own address": re.compile(rb"(?i)location: http://"),
}
"""What a bare engine may be seen to give away, and how it is recognised in its answer, headers included."""

FORBIDDEN = (
    *("vllm", "uvicorn", "0.32.0", ENGINE_NAME, "smollm", "traceback", "pydantic", "starlette", "ctranslate2", "aiohttp", "prometheus"),
    *("logprob", "token_id", "token_offset", "tokenizer", "detokeniz", "im_start", "prompt_tokens", '"completion_tokens'),
    *("total_tokens", "input_tokens", "output_tokens", "cached_tokens", "system_fingerprint", "max_model_len", "kv_transfer"),
    *("prompt_text", "routed_experts", "stop_reason", "server_load"),
)
"""In lower case: what stands nowhere in an answer of a gateway, be it in its headers, its text or its errors."""

SENT_ON = frozenset({"model", "messages", "prompt", "max_tokens", "temperature", "top_p", "n", "stop", "seed", "stream"})
"""All that a gateway may say to its engine."""

HEADERS = {
    "cache-control": re.compile(r"no-cache"),
    "content-type": re.compile(r"application/json|text/event-stream(; charset=utf-8)?"),
    "content-length": re.compile(r"\d+"),
    "date": re.compile(r"\w{3}, \d\d \w{3} \d{4} [\d:]{8} GMT"),
    "x-request-id": re.compile(r"[\w.-]{1,128}"),
    "retry-after": re.compile(r"\d+"),
    "allow": re.compile(r"[A-Z]+(, ?[A-Z]+)*"),
    "www-authenticate": re.compile(r"Bearer.{0,60}"),
    # of the connection, not of the answer
    "connection": re.compile(r"(?i)close|keep-alive"),
    "transfer-encoding": re.compile(r"chunked"),
}
"""All headers that may leave a gateway, and what they may say."""

USAGE = {"prompt_characters": int, "prompt_words": int, "completion_characters": int, "completion_words": int}
HEAD = {"id": re.compile(r"(chatcmpl|cmpl)-[0-9a-f]{8,64}"), "created": int, "model": "@PUBLIC@"}
ENDS = ("stop", "length")
SHAPES: dict[str, Any] = {
    "chat": HEAD
    | {
        "object": "chat.completion",
        "choices": [{"index": int, "message": {"role": "assistant", "content": str}, "finish_reason": ENDS}],
        "usage?": USAGE,
    },
    "text": HEAD | {"object": "text_completion", "choices": [{"index": int, "text": str, "finish_reason": ENDS}], "usage?": USAGE},
    "chat chunk": HEAD
    | {
        "object": "chat.completion.chunk",
        "choices": [{"index": int, "delta": {"role?": "assistant", "content?": str}, "finish_reason": (*ENDS, None)}],
        "usage?": (USAGE, None),
    },
    "text chunk": HEAD
    | {"object": "text_completion", "choices": [{"index": int, "text": str, "finish_reason": (*ENDS, None)}], "usage?": (USAGE, None)},
    "error": {"error": {"message": str, "type": re.compile(r"[a-z_]+"), "param": (str, None), "code": (re.compile(r"[a-z_]+"), None)}},
    "models": {"object": "list", "data": [{"id": "@PUBLIC@", "object": "model", "created": int, "owned_by": "blackbox-distill"}]},
    "status": {"status": str, "reason?": str},
}
"""Every JSON that a gateway may answer with: these keys and no others. `?` marks one that may be left out, a tuple holds choices."""


@dataclass(frozen=True)
class Target:
    """A server to be probed: where it is, the model's name there, and the words that must not come out of it."""

    port: int
    model: str
    host: str = "127.0.0.1"
    key: str | None = None
    secrets: tuple[str, ...] = ()
    """Beside FORBIDDEN: the engine's address and the model's folder, say."""


@dataclass(frozen=True)
class Answer:
    """One HTTP answer, as it came."""

    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes
    raw: bytes
    """Everything the server sent, with whatever came after the answer."""

    def header(self, name: str) -> str:
        return next((value for key, value in self.headers if key.lower() == name), "")


@dataclass(frozen=True)
class Bare:
    """What a bare vLLM answers: its status, and kinds of EVIDENCE that its answer holds."""

    status: int | None
    """None: it closes the connection without an answer."""
    shows: tuple[str, ...] = ()


@dataclass(frozen=True)
class Probe:
    """One request.

    In path, headers and body @MODEL@ stands for the target's model, @HOST@ for its address, @KEY@ for its API key, and @ENGINE@ for
    the address of the engine behind the gateway.
    """

    name: str
    bare: Bare
    answers: frozenset[int | None]
    """What the gateway may answer; None: it closes the connection."""
    body: bytes = b""
    method: str = "POST"
    path: str = CHAT
    headers: tuple[tuple[str, str | None], ...] = ()
    """Beside or in place of the usual ones; None leaves one out."""
    param: str | None = None
    """The field that a refusal must name."""
    shape: str | None = None
    """Of an answer with 200."""
    streams: bool = False
    encode: Callable[[bytes], bytes] = bytes
    """What is done to the body before it is sent."""
    whole: bytes | None = None
    """The request as such, where even its framing is the trick."""
    asks_engine: bool = False
    """The engine is asked although the answer is no 200: only it knows that this cannot be answered."""

    def request(self, target: Target, *, engine: str) -> bytes:
        """The bytes that go out to `target`; `engine` is the HOST:PORT that a caller of the gateway should not be able to reach."""

        def filled(text: bytes) -> bytes:
            words = {"@MODEL@": target.model, "@HOST@": f"{target.host}:{target.port}", "@ENGINE@": engine, "@KEY@": target.key or "-"}
            for name, word in words.items():
                text = text.replace(name.encode(), word.encode())
            return text

        if self.whole is not None:
            return filled(self.whole)
        body = self.encode(filled(self.body))
        headers: dict[str, str | None] = {"host": "@HOST@", "content-type": "application/json", "connection": "close"}
        headers |= {"authorization": f"Bearer {target.key}"} if target.key else {}
        headers |= {"content-length": str(len(body))} if body or self.method not in ("GET", "HEAD", "OPTIONS", "TRACE") else {}
        given = {name.lower() for name, _ in self.headers}
        lines = [(name, value) for name, value in headers.items() if name not in given] + list(self.headers)
        head = f"{self.method} {self.path} HTTP/1.1\r\n" + "".join(f"{name}: {value}\r\n" for name, value in lines if value is not None)
        return filled(head.encode("latin-1")) + b"\r\n" + body

    def says(self) -> str:
        """Every word that this probe itself utters, also those hidden in escapes: an error may repeat them."""
        words = [(self.path + unquote(self.path) + str(self.headers)), self.body[:10000].decode("latin-1")]

        def collect(pairs: Iterable[tuple[str, Any]]) -> None:
            words.extend(key for key, _ in pairs)

        with suppress(ValueError, RecursionError):
            json.loads(self.body, object_pairs_hook=collect)
        return " ".join(words).lower()


def ask(target: Target, data: bytes, *, method: str = "POST", timeout_s: float = 120.0) -> Answer | None:
    """Send `data` and read until the server closes, or falls silent after a whole answer; None: it closed without an answer."""
    raw = b""
    with socket.create_connection((target.host, target.port), timeout_s) as connection:
        connection.settimeout(0.01)
        left, until = memoryview(data), time.monotonic() + timeout_s
        while time.monotonic() < until:
            # in turns: a server may answer, and close, before it has read a body that is too long for it
            try:
                if left:
                    left = left[connection.send(left[: 1 << 16]) :]
            except TimeoutError:
                pass
            except OSError:
                left = left[:0]
            try:
                connection.settimeout(0.001 if left else 0.5)
                piece = connection.recv(1 << 16)
                if not piece:
                    break
                raw += piece
            except TimeoutError:
                if not left and raw and parsed(raw, method) is not None:
                    break  # a connection that is kept alive
            except OSError:
                break
        else:
            raise TimeoutError(f"no end of an answer within {timeout_s:g} s: {raw[:500]!r}")
    return parsed(raw, method)


class _Bytes:
    """What http.client takes for a socket."""

    def __init__(self, raw: bytes) -> None:
        self._raw = raw

    def makefile(self, mode: str) -> io.BytesIO:
        return io.BytesIO(self._raw)


def parsed(raw: bytes, method: str) -> Answer | None:
    """The answer that `raw` begins with, None if it is not whole."""
    response = http.client.HTTPResponse(cast(socket.socket, _Bytes(raw)), method=method)
    try:
        response.begin()
        body = response.read()
    except (http.client.HTTPException, OSError):
        return None
    return Answer(response.status, tuple(response.getheaders()), body, raw)


def evidence(answer: Answer) -> set[str]:
    """The kinds of EVIDENCE that an answer holds."""
    return {kind for kind, pattern in EVIDENCE.items() if pattern.search(answer.raw)}


def assert_bare(probe: Probe, answer: Answer | None) -> None:
    """The bare engine answers to this probe what the probe says it does."""
    status = answer.status if answer else None
    shown = evidence(answer) if answer else set()
    came = answer.raw[:600] if answer else None
    assert status == probe.bare.status, f"{probe.name}: the bare engine answered {status}, not {probe.bare.status}: {came!r}"
    missing = set(probe.bare.shows) - shown
    assert not missing, f"{probe.name}: the bare engine does not show {missing}, but {shown}: {came!r}"


def assert_text_only(probe: Probe, answer: Answer | None, target: Target) -> None:
    """Nothing but text, a finish reason and the public name has left `target`; a refusal has the one shape and names its field."""
    if answer is None:
        assert None in probe.answers, f"{probe.name}: closed without an answer"
        return
    said = f"{probe.name}: {answer.raw[:1500]!r}"
    assert answer.status in probe.answers, f"expected {set(probe.answers)}, got {answer.status}; {said}"
    _assert_headers(answer, said)
    _assert_silent(probe, answer, target, said)
    if probe.method == "HEAD":
        assert answer.body == b"", said
        return
    if answer.status != 200:
        error = fits(_json(answer, said), SHAPES["error"], target.model, said)["error"]
        assert error["message"], said
        if probe.param is not None and answer.status in (400, 422):
            assert probe.param in (error["param"] or "").split("."), f"the refusal does not name {probe.param}; {said}"
    elif probe.streams:
        assert answer.header("content-type").startswith("text/event-stream"), said
        _assert_stream(answer, probe, target, said)
    elif probe.shape is not None:
        fits(_json(answer, said), SHAPES[probe.shape], target.model, said)


def assert_engine_heard(probe: Probe, answer: Answer | None, heard: Iterable[tuple[str, Any]]) -> None:
    """The engine has heard of this probe only if it was answered, and then once and in the gateway's own words.

    `heard`: method and path, and the parsed body, of every request that has reached the engine meanwhile.
    """
    asked = [(line, body) for line, body in heard if line != "GET /v1/models"]  # how a gateway sees whether its engine lives
    answered = answer is not None and answer.status == 200 and probe.shape in ("chat", "text")
    assert len(asked) == (answered or probe.asks_engine), f"{probe.name}: the engine has heard {asked!r:.600}"
    for line, body in asked:
        assert line in (f"POST {CHAT}", f"POST {TEXT}"), line
        assert set(body) <= SENT_ON, f"{probe.name}: the engine was sent {set(body) - SENT_ON}"
        assert body["model"] == ENGINE_NAME, body["model"]
        assert all(set(message) == {"role", "content"} for message in body.get("messages", ())), body


def _assert_headers(answer: Answer, said: str) -> None:
    for name, value in answer.headers:
        allowed = HEADERS.get(name.lower())
        assert allowed is not None, f"a header that must not be there: {name}; {said}"
        assert allowed.fullmatch(value), f"a header that says too much: {name}; {said}"
    once = [name.lower() for name, _ in answer.headers]
    assert len(once) == len(set(once)), f"a header given twice; {said}"


def _assert_silent(probe: Probe, answer: Answer, target: Target, said: str) -> None:
    raw = answer.raw.removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n")
    assert len(re.findall(rb"HTTP/\d\.\d \d{3}", raw)) == 1, f"more than one answer; {said}"
    head = raw.partition(b"\r\n\r\n")[0].decode("latin-1").lower()
    text = answer.body.decode("utf-8").lower()
    spoken = probe.says() if answer.status >= 400 else ""
    for word in (*FORBIDDEN, *(secret.lower() for secret in target.secrets)):
        assert word not in head, f"{word!r} is in the headers; {said}"
        # an error may repeat what it refuses; whatever else it knows, it keeps
        assert word not in text or word in spoken, f"{word!r} is in the answer; {said}"


def _json(answer: Answer, said: str) -> Any:
    assert answer.header("content-type") == "application/json", said
    try:
        return json.loads(answer.body)
    except ValueError:
        raise AssertionError(f"no JSON; {said}") from None


def events(body: bytes) -> Iterator[Any]:
    """The data of server-sent events, each parsed; the last one, [DONE], as it stands. Anything else is no such stream: AssertionError."""
    for block in body.decode("utf-8").split("\n\n")[:-1]:
        assert block.startswith("data: "), f"no event: {block!r}"
        assert "\n" not in block, f"more than data in an event: {block!r}"
        data = block.removeprefix("data: ")
        yield data if data == "[DONE]" else json.loads(data)


def _assert_stream(answer: Answer, probe: Probe, target: Target, said: str) -> None:
    *chunks, last = events(answer.body)
    assert last == "[DONE]", said
    assert chunks, said
    for chunk in chunks:
        fits(chunk, SHAPES[f"{probe.shape} chunk"], target.model, said)
    assert len({(chunk["id"], chunk["created"]) for chunk in chunks}) == 1, said


def fits(value: Any, shape: Any, public: str, said: str, at: str = "") -> Any:
    """`value`, if it is of the shape at every level. Raises AssertionError naming the place where it is not."""

    def check(holds: bool) -> None:
        assert holds, f"{at or 'answer'}: {value!r:.200} is not {shape!r:.200}; {said}"

    if isinstance(shape, tuple):
        check(any(_is(value, choice, public) for choice in shape))
    elif isinstance(shape, dict):
        check(isinstance(value, dict))
        check(set(value) <= {key.rstrip("?") for key in shape})
        for key, below in shape.items():
            check(key.endswith("?") or key in value)
            if key.rstrip("?") in value:
                fits(value[key.rstrip("?")], below, public, said, f"{at}.{key.rstrip('?')}")
    elif isinstance(shape, list):
        check(isinstance(value, list))
        for index, item in enumerate(value):
            fits(item, shape[0], public, said, f"{at}[{index}]")
    elif isinstance(shape, re.Pattern):
        check(isinstance(value, str) and shape.fullmatch(value) is not None)
    elif isinstance(shape, type):
        check(type(value) is shape)
    else:
        check(value == (public if shape == "@PUBLIC@" else shape))
    return value


def _is(value: Any, shape: Any, public: str) -> bool:
    try:
        fits(value, shape, public, "")
    except AssertionError:
        return False
    return True


REFUSED, MISSING, WRONG_METHOD, NO_JSON = frozenset({422}), frozenset({404}), frozenset({405}), frozenset({400})
FINE = frozenset({200})
NOT_HTTP = frozenset({400, None})
"""What is no HTTP is refused, or the connection is closed."""
ANY_READING = frozenset({200, 400, 422})
"""Answered or refused: what matters is that the engine is asked once, in the gateway's own words."""
EITHER = frozenset({400, 422})
"""What is no valid JSON, or valid JSON of no valid values: who reads decides which."""

ASKED = {"messages": [{"role": "user", "content": "What is a cold?"}], "max_tokens": 4, "temperature": 0}
CONTINUED = {"prompt": "A cold is", "max_tokens": 4, "temperature": 0}
COUNTS, NAMES = "counts of tokens", "the engine's name"
LOGPROBS, IDS = "log-probabilities", "token ids"
GIVES = Bare(200, (NAMES, COUNTS, "an answer", "the engine's kind"))
"""A plain answer of a bare engine already says too much."""


def gives(*shows: str) -> Bare:
    return Bare(200, (NAMES, *shows))


def chat(name: str, extra: dict[str, Any], bare: Bare = GIVES, *, param: str | None = None, **more: Any) -> Probe:
    """A chat with `extra` in its body, the first field of which is to be refused."""
    body = json.dumps({"model": "@MODEL@"} | ASKED | extra).encode()
    return Probe(f"chat: {name}", bare, **({"answers": REFUSED, "body": body, "param": _refused(extra, param)} | more))


def text(name: str, extra: dict[str, Any], bare: Bare = GIVES, *, param: str | None = None, **more: Any) -> Probe:
    """The same on the other endpoint."""
    body = json.dumps({"model": "@MODEL@"} | CONTINUED | extra).encode()
    return Probe(f"text: {name}", bare, **({"answers": REFUSED, "body": body, "param": _refused(extra, param), "path": TEXT} | more))


def _refused(extra: dict[str, Any], param: str | None) -> str | None:
    return next(iter(extra), None) if param is None else param or None


def written(name: str, fields: str, bare: Bare, answers: frozenset[int | None] = REFUSED, **more: Any) -> Probe:
    """A chat whose JSON is written by hand, since no library would write it so; `fields` follow the usual ones."""
    usual = '"model": "@MODEL@", "messages": [{"role": "user", "content": "What is a cold?"}], "max_tokens": 4'
    return Probe(f"JSON: {name}", bare, **({"answers": answers, "body": f"{{{usual}, {fields}}}".encode()} | more))


def at(path: str, bare: Bare, *, method: str = "POST", answers: frozenset[int | None] = MISSING, trick: str = "", **more: Any) -> Probe:
    """Another path, by default with a body that would be answered on the right one."""
    body = b"" if method in ("GET", "HEAD", "OPTIONS", "TRACE") else json.dumps({"model": "@MODEL@"} | ASKED).encode()
    return Probe(f"path: {method} {path}{trick}", bare, **({"answers": answers, "body": body, "method": method, "path": path} | more))


def with_headers(name: str, bare: Bare = GIVES, answers: frozenset[int | None] = FINE, **more: Any) -> Probe:
    """A good chat in odd clothes. Where it is answered, the answer is the usual one."""
    body = json.dumps({"model": "@MODEL@"} | ASKED).encode()
    return Probe(f"header: {name}", bare, **({"answers": answers, "body": body, "shape": "chat"} | more))


def _plain() -> Iterator[Probe]:
    """Good requests, whose bare answers give the engine away all the same."""
    for name, extra in (("a plain question", {}), ("several samples", {"n": 2, "temperature": 1, "seed": 1, "top_p": 0.9, "stop": ["\n"]})):
        yield chat(name, extra, answers=FINE, shape="chat")
        yield text(name, extra, answers=FINE, shape="text")
        streamed = extra | {"stream": True}
        yield chat(f"{name}, streamed", streamed, gives("the engine's kind"), answers=FINE, shape="chat", streams=True)
        yield text(f"{name}, streamed", streamed, gives("the engine's kind"), answers=FINE, shape="text", streams=True)


def _fields() -> Iterator[Probe]:
    """Fields that vLLM heeds, on both endpoints, streamed and not."""
    stream: dict[str, Any] = {"stream": True}
    yield chat("logprobs", {"logprobs": True}, gives(LOGPROBS))
    yield chat("logprobs, streamed", {"logprobs": True} | stream, gives(LOGPROBS))
    yield chat("logprobs false", {"logprobs": False})
    yield chat("logprobs as a number", {"logprobs": 1}, gives(LOGPROBS))
    yield chat("logprobs as a text", {"logprobs": "true"}, gives(LOGPROBS))
    yield chat("top_logprobs", {"top_logprobs": 5, "logprobs": True}, Bare(400), answers=REFUSED)
    yield chat("top_logprobs 0", {"top_logprobs": 0, "logprobs": True}, gives(LOGPROBS))
    yield chat("prompt_logprobs", {"prompt_logprobs": 0}, gives("log-probabilities of the prompt"))
    yield chat("logprob_token_ids", {"logprob_token_ids": [1, 2, 3], "logprobs": True}, gives(LOGPROBS))
    yield chat("return_token_ids", {"return_token_ids": True}, gives(IDS))
    yield chat("return_token_ids, streamed", {"return_token_ids": True} | stream, gives(IDS))
    yield chat("return_tokens_as_token_ids", {"return_tokens_as_token_ids": True, "logprobs": True}, gives("token ids as words"))
    yield chat("return_token_offsets", {"return_token_offsets": True})
    yield chat("return_prompt_text", {"return_prompt_text": True}, gives("the prompt as the model sees it"))
    yield chat("echo", {"echo": True})
    yield chat("logit_bias", {"logit_bias": {"504": 100}})
    yield chat("allowed_token_ids", {"allowed_token_ids": [504, 253]})
    yield chat("stop_token_ids", {"stop_token_ids": [253]})
    yield chat("bad_words", {"bad_words": ["cold"]})
    yield chat("skip_special_tokens", {"skip_special_tokens": False})
    yield chat("spaces_between_special_tokens", {"spaces_between_special_tokens": False})
    yield chat("add_special_tokens", {"add_special_tokens": True})
    yield chat("add_generation_prompt", {"add_generation_prompt": False})
    yield chat("continue_final_message", {"continue_final_message": True, "add_generation_prompt": False})
    yield chat("chat_template", {"chat_template": "{{ bos_token }}{{ messages }}"}, Bare(400))
    yield chat("chat_template_kwargs", {"chat_template_kwargs": {"a": 1}})
    yield chat("documents", {"documents": [{"title": "a", "text": "b"}]})
    yield chat("min_tokens", {"min_tokens": 2})
    yield chat("ignore_eos", {"ignore_eos": True})
    yield chat("include_stop_str_in_output", {"include_stop_str_in_output": True, "stop": ["cold"]})
    yield chat("truncate_prompt_tokens", {"truncate_prompt_tokens": 3})
    yield chat("use_beam_search", {"use_beam_search": True, "n": 2}, Bare(400))
    yield chat("best_of", {"best_of": 2})
    yield chat("top_k", {"top_k": 1})
    yield chat("min_p", {"min_p": 0.1})
    yield chat("repetition_penalty", {"repetition_penalty": 1.1})
    yield chat("frequency_penalty", {"frequency_penalty": 0.1})
    yield chat("presence_penalty", {"presence_penalty": 0.1})
    yield chat("tools", {"tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}], "tool_choice": "none"})
    yield chat("functions", {"functions": [{"name": "f", "parameters": {}}]})
    yield chat("response_format", {"response_format": {"type": "json_object"}})
    yield chat("structured_outputs", {"structured_outputs": {"choice": ["yes", "no"]}})
    yield chat("guided_choice", {"guided_choice": ["yes", "no"]})
    yield chat("guided_json", {"guided_json": {"type": "object"}})
    yield chat("vllm_xargs", {"vllm_xargs": {"a": 1}})
    yield chat("kv_transfer_params", {"kv_transfer_params": {"do_remote_decode": True}})
    yield chat("cache_salt", {"cache_salt": "a"})
    yield chat("priority", {"priority": 1})
    yield chat("request_id", {"request_id": "a-request-of-mine"}, gives("the caller's own request id"))
    yield chat("reasoning_effort", {"reasoning_effort": "low"})
    yield chat("include_reasoning", {"include_reasoning": True})
    yield chat("stream_interval", {"stream_interval": 3} | stream, gives())
    yield chat("usage in a stream", {"stream_options": {"include_usage": True}} | stream, gives(COUNTS))
    yield chat("usage in every chunk", {"stream_options": {"include_usage": True, "continuous_usage_stats": True}} | stream, gives(COUNTS))
    yield chat("log-probabilities hidden in stream_options", {"stream_options": {"logprobs": True}} | stream, gives())
    yield chat("audio", {"modalities": ["text", "audio"], "audio": {"voice": "alloy", "format": "wav"}})
    yield chat("store and metadata", {"store": True, "metadata": {"a": "b"}})
    yield chat("the openai client's extra_body, not unpacked", {"extra_body": {"logprobs": True}})
    yield chat("a field nobody has thought of", {"internal_state": True})
    yield text("logprobs", {"logprobs": 0}, gives(LOGPROBS))
    yield text("logprobs, streamed", {"logprobs": 0} | stream, gives(LOGPROBS))
    yield text("more logprobs than allowed", {"logprobs": 5}, Bare(400))
    yield text("the prompt's own logprobs", {"echo": True, "logprobs": 0, "max_tokens": 1}, gives(LOGPROBS))
    yield text("echo", {"echo": True})
    yield text("prompt_logprobs", {"prompt_logprobs": 0}, gives("log-probabilities of the prompt"))
    yield text("logprob_token_ids", {"logprob_token_ids": [1, 2, 3], "logprobs": 0}, gives(LOGPROBS))
    yield text("return_token_ids", {"return_token_ids": True}, gives(IDS))
    yield text("return_token_ids, streamed", {"return_token_ids": True} | stream, gives(IDS))
    yield text("return_tokens_as_token_ids", {"return_tokens_as_token_ids": True, "logprobs": 0}, gives("token ids as words"))
    yield text("logit_bias", {"logit_bias": {"504": 100}})
    yield text("suffix", {"suffix": "and so on"}, Bare(400))
    yield text("prompt_embeds", {"prompt_embeds": "AAAA"}, Bare(400))
    yield text("use_beam_search", {"use_beam_search": True, "n": 2}, Bare(400))
    yield text("best_of", {"best_of": 3})
    yield text("add_special_tokens", {"add_special_tokens": False})
    yield text("structured_outputs", {"structured_outputs": {"regex": "[0-9]+"}})
    yield text("usage in every chunk", {"stream_options": {"include_usage": True, "continuous_usage_stats": True}} | stream, gives(COUNTS))
    yield text("messages", {"messages": ASKED["messages"]})


def _values() -> Iterator[Probe]:
    """Known fields with values of another kind."""
    yield text("token ids as the prompt", {"prompt": [504, 4011, 314]})
    yield text("lists of token ids as the prompt", {"prompt": [[504, 4011], [314]]})
    yield text("a token id among texts", {"prompt": ["A cold", 314]}, Bare(400))
    yield text("an object as the prompt", {"prompt": {"prompt_token_ids": [504]}}, Bare(400))
    yield text("a number as the prompt", {"prompt": 504}, Bare(400))
    parts = [{"type": "image_url", "image_url": {"url": "http://@ENGINE@/metrics"}}]
    yield chat("an image at an address of the engine's", {"messages": [{"role": "user", "content": parts}]}, Bare(400), param="messages")
    hidden = ASKED["messages"][0] | {"logprobs": True}
    yield chat("log-probabilities hidden in a message", {"messages": [hidden]}, param="logprobs")
    yield chat("token ids hidden in a message", {"messages": [ASKED["messages"][0] | {"token_ids": [1]}]}, param="token_ids")
    yield chat("tool calls hidden in a message", {"messages": [{"role": "assistant", "tool_calls": []}]}, param="messages")
    yield chat("token ids as content", {"messages": [{"role": "user", "content": [504, 4011]}]}, Bare(400), param="content")
    yield chat("an unknown role", {"messages": [{"role": "root", "content": "What is a cold?"}]}, param="role")
    yield chat("stop as token ids", {"stop": [253]}, Bare(400))
    yield chat("stream as an object", {"stream": {"logprobs": True}}, Bare(400))
    yield chat("n as a text", {"n": "2"}, Bare(400))
    yield chat("n of a milliard", {"n": 10**9}, Bare(400))
    yield chat("a negative seed", {"seed": -1})
    yield chat("a bound of tokens that no model has", {"max_tokens": 10**9}, Bare(400, ("counts of tokens in words",)))
    yield chat("user as an object", {"user": {"logprobs": True}}, Bare(400))
    yield chat("another model's name", {"model": "gpt-4"}, Bare(404), answers=MISSING)
    yield chat("no name of a model", {"model": None}, GIVES)
    yield chat("the engine's own name for its model", {"model": ENGINE_NAME}, GIVES, answers=MISSING)
    long = {"messages": [{"role": "user", "content": "cold " * 3000}]}
    knows = Bare(400, ("counts of tokens in words",))
    yield chat("a prompt too long for the model", long, knows, answers=NO_JSON, asks_engine=True, param="")
    yield text("a prompt too long for the model", {"prompt": "cold " * 3000}, knows, answers=NO_JSON, asks_engine=True, param="")


def _json_tricks() -> Iterator[Probe]:
    """JSON that two readers may read in two ways."""
    yield written("a key in escapes", r'"log\u0070robs": true', gives(LOGPROBS), param="logprobs")
    yield written("a key all in escapes", r'"\u0065\u0063\u0068\u006f": true', GIVES, param="echo")
    yield written("a key twice, the first one refused", '"logprobs": true, "logprobs": false', GIVES)
    yield written("a key twice, the last one refused", '"logprobs": false, "logprobs": true', gives(LOGPROBS))
    yield written("a good key twice", '"max_tokens": 5', GIVES, ANY_READING, shape="chat")
    yield written("a good key twice, once in escapes", r'"n": 1, "\u006e": 2', GIVES, ANY_READING, shape="chat")
    yield written("the messages twice", r'"messages": [{"role": "user", "content": "A", "logprobs": true}]', GIVES, EITHER)
    yield written("a key in capitals", '"LogProbs": true', GIVES, param=None)
    yield written("a key with a blank", '" logprobs": true', GIVES)
    yield written("a key with a zero byte", r'"logprobs\u0000": true', GIVES)
    yield written("a key in full-width letters", r'"\uff4cogprobs": true', GIVES)
    yield written("a key with a dot", '"stream_options.include_usage": true', GIVES)
    yield written("a key of JavaScript's", '"__proto__": {"logprobs": true}', GIVES)
    yield written("an empty key", '"": 1', GIVES)
    yield written("NaN", '"temperature": NaN', Bare(400), EITHER)
    yield written("Infinity", '"top_p": Infinity', Bare(400), EITHER)
    yield written("1e308", '"temperature": 1e308', Bare(400), EITHER)
    yield written("1e999", '"temperature": 1e999', Bare(400), EITHER)
    yield written("a number of 5,000 digits", f'"max_tokens": {"9" * 5000}', Bare(400), EITHER)
    yield written("something after the end", '"user": "a"} {"logprobs": true', Bare(400), NO_JSON)
    yield written("a comment", '"user": "a" /* "logprobs": */', Bare(400), NO_JSON)
    yield written("half a surrogate pair", r'"messages": [{"role": "user", "content": "\ud800"}]', Bare(400), EITHER)
    deep = "[" * 100_000 + "]" * 100_000
    yield written("nested 100,000 deep", f'"user": {deep}', Bare(400), frozenset({400, 413, 422}))
    yield written("an unknown field nested 100,000 deep", f'"a": {deep}', Bare(400), frozenset({400, 413, 422}))
    yield Probe("JSON: a list", Bare(400), EITHER, b'[{"model": "@MODEL@"}]')
    yield Probe("JSON: a text", Bare(400), EITHER, b'"logprobs"')
    yield Probe("JSON: null", Bare(400), EITHER, b"null")
    yield Probe("JSON: nothing", Bare(400), EITHER, b"")
    yield Probe("JSON: cut off", Bare(400), NO_JSON, b'{"model": "@MODEL@", "logprobs": tr')
    yield Probe("JSON: no UTF-8", Bare(400), NO_JSON, b'{"model": "@MODEL@", "messages": [{"role": "user", "content": "\xff\xfe"}]}')
    huge = b'{"model": "@MODEL@", "padding": "' + b"x" * (8 << 20) + b'", "messages": [{"role": "user", "content": "A"}], "max_tokens": 1}'
    yield Probe("JSON: 8 MiB", GIVES, frozenset({413, None}), huge)


def _paths() -> Iterator[Probe]:
    """Paths that vLLM serves and a gateway must not, and ways to walk to them."""
    prompt = json.dumps({"model": "@MODEL@", "prompt": "A cold is"}).encode()
    yield at("/tokenize", Bare(200, (IDS, "counts of tokens")), body=prompt)
    yield at("/detokenize", Bare(200), body=b'{"model": "@MODEL@", "tokens": [504, 4011]}')
    yield at("/invocations", GIVES)
    yield at("/inference/v1/generate", Bare(403), body=b'{"token_ids": [504, 4011], "sampling_params": {"max_tokens": 2}}')
    yield at("/generative_scoring", Bare(400), body=b'{"model": "@MODEL@"}')
    yield at("/v1/chat/completions/render", Bare(403))
    yield at("/v1/completions/render", Bare(403), body=prompt)
    yield at("/v1/chat/completions/derender", Bare(403))
    yield at("/v1/chat/completions/batch", Bare(400))
    yield at("/v1/responses", gives(), body=b'{"model": "@MODEL@", "input": "A cold is", "max_output_tokens": 4}')
    yield at("/v1/messages", gives("counts of tokens"))
    yield at("/v1/messages/count_tokens", Bare(200, ("counts of tokens",)))
    yield at("/v1/embeddings", Bare(404))
    yield at("/v1/load_lora_adapter", Bare(404), body=b'{"lora_name": "a", "lora_path": "/"}')
    yield at("/metrics", Bare(200, ("the engine's kind",)), method="GET")
    yield at("/version", Bare(200, ("its version",)), method="GET")
    yield at("/load", Bare(200, ("its load",)), method="GET")
    yield at("/health", Bare(200), method="GET")
    yield at("/ping", Bare(200), method="GET")
    yield at("/kv_event_sources", Bare(200), method="GET")
    yield at("/docs", Bare(404), method="GET")
    yield at("/openapi.json", Bare(404), method="GET", answers=frozenset({200, 404}))
    yield at("/v1/models", Bare(200, (NAMES, "the model's folder", "counts of tokens")), method="GET", answers=FINE, shape="models")
    yield at(f"/v1/models/{ENGINE_NAME}", Bare(404), method="GET")
    yield at("/healthz", Bare(404), method="GET", answers=FINE, shape="status")
    yield at("/readyz", Bare(404), method="GET", answers=FINE, shape="status")
    yield at("/v1/chat/completions/", Bare(307, ("its own address",)))
    yield at("/v1/completions/?logprobs=1", Bare(307, ("its own address",)))
    yield at("//v1/chat/completions", Bare(404))
    yield at("/v1//chat/completions", Bare(404))
    yield at("/V1/Chat/Completions", Bare(404))
    yield at("/v1/../tokenize", Bare(404), body=prompt)
    yield at("/v1/chat/completions/../../../tokenize", Bare(404), body=prompt)
    yield at("/v1/%2e%2e/tokenize", Bare(404), body=prompt)
    yield at("/v1/..%2ftokenize", Bare(404), body=prompt)
    yield at("/%74okenize", Bare(200, (IDS,)), body=prompt)
    yield at("/v1/chat/completions%2f..%2f..%2f..%2ftokenize", Bare(404), body=prompt)
    yield at("/v1/chat/completions;logprobs=true", Bare(404))
    yield at("/v1/chat/completions%00", Bare(404))
    yield at("/v1/chat/completions%0d%0aX-Evil:%201", Bare(404))
    yield at("/v1\\..\\tokenize", Bare(404), body=prompt)
    yield at("/v1/chat/completions?logprobs=true&return_token_ids=true", GIVES, answers=frozenset({200, 422}), shape="chat")
    yield at("/v1/chat/completions#/../../tokenize", GIVES, answers=frozenset({200, 400, 404}), shape="chat")
    yield at("http://@HOST@/tokenize", Bare(200, (IDS,)), body=prompt)
    yield at("http://@ENGINE@/tokenize", Bare(200, (IDS,)), body=prompt)
    yield at("http://@ENGINE@/v1/chat/completions", GIVES, answers=frozenset({200, 400, 404}), shape="chat")
    yield at("file:///etc/hostname", Bare(400), method="GET", answers=frozenset({400, 404}))
    yield at("@ENGINE@", Bare(400), method="CONNECT", answers=frozenset({400, 404, 405, None}), body=b"")
    yield at("*", Bare(404), method="OPTIONS", answers=frozenset({400, 404, 405}))


def _methods() -> Iterator[Probe]:
    for method in ("GET", "HEAD", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"):
        yield at(CHAT, Bare(405), method=method, answers=WRONG_METHOD)
    yield at("/v1/models", Bare(405), method="DELETE", answers=WRONG_METHOD)
    yield at("/tokenize", Bare(405), method="PUT")
    yield at(CHAT, Bare(400), method="BREW", answers=frozenset({400, 405, None}))
    yield at(CHAT, Bare(405), method="GET", answers=WRONG_METHOD, headers=(("x-http-method-override", "POST"),), trick=" to be a POST")
    asking = (("origin", "http://a.example"), ("access-control-request-method", "POST"))
    yield at(CHAT, Bare(400), method="OPTIONS", answers=WRONG_METHOD, headers=asking, trick=" of another origin")


def _headers() -> Iterator[Probe]:
    """Headers that a proxy in the middle may obey."""
    yield with_headers("a method to use instead", headers=(("x-http-method-override", "GET"), ("x-method-override", "TRACE")))
    yield with_headers("a path to use instead", headers=(("x-original-url", "/tokenize"), ("x-rewrite-url", "/tokenize")))
    yield with_headers("another host", headers=(("host", "@ENGINE@"),))
    yield with_headers("forwarded", headers=(("x-forwarded-host", "@ENGINE@"), ("x-forwarded-prefix", "/tokenize"), ("forwarded", "for=1")))
    yield with_headers("a request id", headers=(("x-request-id", "a-request-of-mine"),), bare=gives("the caller's own request id"))
    yield with_headers("a trace", headers=(("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"),))
    yield with_headers("a rank to run on", headers=(("x-data-parallel-rank", "0"),))
    yield with_headers("only a stream is accepted", headers=(("accept", "text/event-stream"),))
    yield with_headers("only packed answers are accepted", headers=(("accept-encoding", "gzip, br;q=1, identity;q=0"),))
    yield with_headers("a part of the answer", headers=(("range", "bytes=0-3"),))
    yield with_headers("an origin", headers=(("origin", "http://a.example"),))
    yield with_headers("headers to drop", headers=(("connection", "close, authorization, content-length"),))
    newer = (("connection", "close, upgrade"), ("upgrade", "h2c"), ("http2-settings", "AAMAAABk"))
    yield with_headers("a newer protocol", Bare(400), frozenset({200, 400}), headers=newer)
    web_socket = (("upgrade", "websocket"), ("sec-websocket-version", "13"), ("sec-websocket-key", "A" * 22 + "=="))
    web_socket_too = (("connection", "upgrade"), *web_socket)
    yield at(CHAT, Bare(403), method="GET", answers=frozenset({400, 403, 405, 426}), headers=web_socket_too, trick=" as a web socket")
    yield with_headers("first a word that the body is welcome", headers=(("expect", "100-continue"),))
    yield with_headers("no type", Bare(400), frozenset({200, 400, 415}), headers=(("content-type", None),))
    yield with_headers("plain text", Bare(400), frozenset({200, 400, 415}), headers=(("content-type", "text/plain"),))
    yield with_headers("a form", Bare(400), frozenset({400, 415}), headers=(("content-type", "application/x-www-form-urlencoded"),))
    yield with_headers("another JSON", Bare(400), frozenset({200, 400, 415}), headers=(("content-type", "application/vnd.api+json"),))
    utf16 = (("content-type", "application/json; charset=utf-16"),)
    yield with_headers("UTF-16", GIVES, frozenset({400, 415}), headers=utf16, encode=lambda body: body.decode().encode("utf-16"))
    yield with_headers("a byte order mark", GIVES, frozenset({200, 400}), encode=lambda body: b"\xef\xbb\xbf" + body)
    for name, pack in (("gzip", gzip.compress), ("deflate", zlib.compress)):
        yield with_headers(f"a body in {name}", Bare(400), frozenset({400, 415}), headers=(("content-encoding", name),), encode=pack)
    bomb = {"headers": (("content-encoding", "gzip"),), "encode": lambda body: gzip.compress(body + b" " * (64 << 20), 1)}
    yield with_headers("64 MiB of blanks in gzip", Bare(400), frozenset({400, 413, 415}), **bomb)
    yield with_headers("in chunks", headers=(("content-length", None), ("transfer-encoding", "chunked")), encode=chunked)
    packed = (("content-length", None), ("transfer-encoding", "gzip, chunked"))
    chunks = {"headers": packed, "encode": lambda body: chunked(gzip.compress(body))}
    yield with_headers("packed in chunks", Bare(400), frozenset({400, 415, 501, None}), **chunks)
    yield with_headers("60 KB of header", GIVES, frozenset({200, 400, 431, None}), headers=(("x-long", "a" * 60_000),))
    yield with_headers("two keys", headers=(("authorization", "Bearer a"), ("x-api-key", "b")), answers=frozenset({200, 401}))


def chunked(body: bytes) -> bytes:
    """The body in two chunks."""
    halves = (body[: len(body) // 2], body[len(body) // 2 :])
    return b"".join(b"%x\r\n%s\r\n" % (len(half), half) for half in halves) + b"0\r\n\r\n"


def _framing() -> Iterator[Probe]:
    """Requests that end elsewhere for one reader than for another: what is left over must never be read as a second request."""
    hidden = b"POST /tokenize HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\n{}"
    line = b"POST /v1/chat/completions HTTP/1.1\r\nHost: @HOST@\r\nAuthorization: Bearer @KEY@\r\nContent-Type: application/json\r\n"

    def framed(name: str, whole: bytes, bare: Bare, answers: frozenset[int | None] = NOT_HTTP) -> Probe:
        return Probe(f"framing: {name}", bare, answers, whole=whole, shape="chat")

    both = line + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + hidden
    yield framed("a length and chunks", both, Bare(400))
    yield framed("two lengths", line + b"Content-Length: 2\r\nContent-Length: 60\r\n\r\n{}" + hidden, Bare(400))
    yield framed("a negative length", line + b"Content-Length: -1\r\n\r\n{}", Bare(400))
    yield framed("a chunk longer than any", line + b"Transfer-Encoding: chunked\r\n\r\nffffffffffffffffff\r\n{}", Bare(400))
    yield framed("chunks by another name", line + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n", Bare(400))
    yield framed("a blank before the colon", line + b"Content-Length : 2\r\n\r\n{}", Bare(400))
    yield framed("a header that goes on", line + b"X-A: b\r\n Content-Length: 2\r\n\r\n", Bare(400), frozenset({400, 422, None}))
    yield framed("a zero byte in a header", line + b"X-A: b\x00c\r\nContent-Length: 2\r\n\r\n{}", Bare(400))
    yield framed("HTTP/0.9", b"GET /metrics\r\n\r\n", Bare(200, ("the engine's kind",)), frozenset({400, 404, None}))
    yield framed("HTTP/2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", Bare(400), frozenset({400, 404, 405, None}))
    yield framed("no HTTP at all", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200), Bare(400))
    close = b"Connection: close\r\nContent-Length: "
    yield framed("a second request in the same packet", line + close + b"%d\r\n\r\n" % 2 + b"{}" + hidden, Bare(400), frozenset({400, 422}))


PROBES: tuple[Probe, ...] = tuple(
    probe for group in (_plain, _fields, _values, _json_tricks, _paths, _methods, _headers, _framing) for probe in group()
)
assert len({probe.name for probe in PROBES}) == len(PROBES)


FROM_A_CLIENT: tuple[tuple[str, dict[str, Any], str, str], ...] = (
    ("logprobs", {"logprobs": True}, "logprobs", "logprob=-"),
    ("extra_body", {"extra_body": {"return_token_ids": True}}, "return_token_ids", "token_ids=["),
    ("extra_body over a good field", {"extra_body": {"max_tokens": 3, "return_token_ids": True}}, "return_token_ids", "token_ids=["),
    ("extra_body, nested", {"extra_body": {"vllm_xargs": {"logprobs": True}}}, "vllm_xargs", "total_tokens="),
    ("extra_body in a stream", {"stream": True, "extra_body": {"return_token_ids": True}}, "return_token_ids", "token_ids=["),
    ("usage in a stream", {"stream": True, "stream_options": {"include_usage": True}}, "stream_options", "total_tokens="),
    ("logit_bias", {"logit_bias": {"504": 100}}, "logit_bias", "total_tokens="),
    ("a response format", {"response_format": {"type": "json_object"}}, "response_format", "total_tokens="),
)
"""What a person would give the `openai` client to get more than text, the field that is refused, and what it shows of a bare engine."""
