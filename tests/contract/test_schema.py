"""The OpenAPI document of a server: valid, complete, and true of what the server does with inputs that nobody has thought of."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema_rs
import pytest
import schemathesis
from gateways import Gateway, teacher

from shared.contracts import Completion, GenerationRequest
from shared.engines.scripted import ScriptedEngine
from shared.errors import EngineError, RequestRefused, TeacherBusy, TeacherFailed, TeacherLate, TeacherRejected, TeacherUnavailable
from shared.http.app import create_app
from shared.http.face import Bounds
from shared.http.keys import KeyEntry, Keys, digest
from shared.http.problems import NotReady
from teacher_service.settings import TeacherServiceSettings

KEY, REVOKED, SPENT = "a-key-for-tests-0123456789", "a-revoked-key-0123456789", "a-spent-key-for-0123456789"
CHAT, COMPLETIONS, MODELS = "/v1/chat/completions", "/v1/completions", "/v1/models"
BODIES: dict[str, dict[str, Any]] = {
    CHAT: {"model": "teacher", "messages": [{"role": "user", "content": "Is migraine hereditary?"}]},
    COMPLETIONS: {"model": "teacher", "prompt": "Is migraine hereditary?"},
}

CHECKS = """
[checks]
# all that a schema can say of a request, this one says: nothing else than a success is right for a valid one
positive_data_acceptance.expected-statuses = ["200"]
# it is broken JSON and broken headers as well that are tried
negative_data_rejection.expected-statuses = ["400", "401", "404", "405", "413", "415", "422"]
"""

TIGHT = ["--max-n", "3", "--max-tokens", "20", "--max-prompt-characters", "200", "--max-body-bytes", "9000"]


@pytest.mark.parametrize(("with_keys", "limits"), [(False, []), (True, TIGHT)], ids=["as it is", "with keys and tight limits"])
def test_a_server_does_what_its_schema_says_with_whatever_is_made_of_it(tmp_path: Path, with_keys: bool, limits: list[str]) -> None:
    """schemathesis: several hundred requests, right and wrong ones, all its checks."""
    (tmp_path / "keys.yaml").write_text(f"alice: {{sha256: {digest(KEY).hex()}}}\n")
    (tmp_path / "schemathesis.toml").write_text(CHECKS)
    header = ["--header", f"Authorization: Bearer {KEY}"] if with_keys else []
    keys = ["--api-keys-file", str(tmp_path / "keys.yaml")] if with_keys else ["--no-auth"]
    options = ["--checks", "all", "--max-examples", "25", "--seed", "1", "--generation-database", "none", "--continue-on-failure"]
    options += ["--no-color", "--output-sanitize", "false", *header]
    command = [sys.executable, "-c", "from schemathesis.cli import schemathesis; schemathesis()", "run", *options]
    with teacher(tmp_path / "stderr", *keys, *limits) as gateway:
        url = f"{gateway.url}/openapi.json"
        run = subprocess.run([*command, url], cwd=tmp_path, capture_output=True, text=True, timeout=200)
        assert run.returncode == 0, run.stdout[-12_000:] + run.stderr[-2000:]
        document = httpx.get(url, trust_env=False).json()
        operations = len(document["paths"]) - 1  # each has one method; that of the schema itself is left out
        assert f"{operations} selected / {operations} total" in run.stdout
        assert gateway.complaints() == []


class Moody(ScriptedEngine):
    """Raises what it is told to."""

    def __init__(self, error: Exception | None = None) -> None:
        super().__init__()
        self.error = error

    async def check(self) -> None:
        if self.error:
            raise self.error

    async def generate(self, request: GenerationRequest) -> list[Completion]:
        await self.check()
        return await super().generate(request)


def app_of(error: Exception | None = None, *, bounds: Bounds | None = None, with_keys: bool = True) -> Any:
    entries = {
        "alice": KeyEntry(sha256=digest(KEY).hex()),
        "bob": KeyEntry(sha256=digest(REVOKED).hex(), revoked=True),
        "carol": KeyEntry(sha256=digest(SPENT).hex(), characters_per_day=100_000, requests_per_minute=1),
    }
    return create_app(Moody(error), model="teacher", title="Teacher", keys=Keys(entries if with_keys else {}), bounds=bounds)


def talk(app: Any, steps: Callable[[httpx.AsyncClient], Awaitable[Any]]) -> Any:
    async def run() -> Any:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport, base_url="http://face") as client:
            return await steps(client)

    return asyncio.run(run())


def described(app: Any) -> dict[str, Any]:
    async def ask(client: httpx.AsyncClient) -> Any:
        return (await client.get("/openapi.json")).json()

    return dict(talk(app, ask))


def valid(document: dict[str, Any], schema: dict[str, Any], value: Any) -> None:
    """Raises if a value is not what a schema of the document says."""
    jsonschema_rs.validator_for({"components": document["components"], **schema}).validate(value)


@pytest.mark.parametrize("with_keys", [False, True])
def test_the_schema_is_valid_openapi_3_1(with_keys: bool) -> None:
    document = described(app_of(with_keys=with_keys))
    assert document["openapi"].startswith("3.1.")
    schemathesis.openapi.from_dict(document).validate()
    for schema in document["components"]["schemas"].values():
        jsonschema_rs.meta.validate(schema)


WORDS = {
    "$ref",
    "additionalProperties",
    "anyOf",
    "const",
    "contains",
    "contentMediaType",
    "contentSchema",
    "default",
    "description",
    "enum",
}
WORDS |= {"exclusiveMaximum", "exclusiveMinimum", "items", "maxItems", "maxLength", "maximum", "minItems", "minLength", "minimum", "not"}
WORDS |= {"oneOf", "pattern", "properties", "required", "title", "type"}
"""What is used of JSON Schema."""


def words_of(schema: Any) -> set[str]:
    """All keywords of a schema and of those within it."""
    if isinstance(schema, list):
        return set().union(*map(words_of, schema))
    if not isinstance(schema, dict):
        return set()
    found = set(schema)
    for word, value in schema.items():
        found |= words_of(list(value.values()) if word == "properties" else [] if word in ("default", "enum", "const") else value)
    return found


def test_the_bounds_of_bodies_are_said_in_words_that_json_schema_knows() -> None:
    schemas = described(app_of())["components"]["schemas"]
    assert words_of(list(schemas.values())) <= WORDS
    for body in ("ChatBody", "CompletionBody"):
        for field, schema in schemas[body]["properties"].items():
            for kind in schema.get("anyOf", ()):
                if kind["type"] in ("integer", "number"):
                    assert {"minimum", "exclusiveMinimum"} & set(kind), field
                    assert {"maximum", "exclusiveMaximum"} & set(kind), field


def test_keys_are_described_where_they_are_asked_for_and_nowhere_else() -> None:
    document = described(app_of())
    assert document["components"]["securitySchemes"] == {"key": {"type": "http", "scheme": "bearer"}}
    secured = {path for path, methods in document["paths"].items() if any(o.get("security") == [{"key": []}] for o in methods.values())}
    assert secured == {CHAT, COMPLETIONS, MODELS}

    async def without_a_key(client: httpx.AsyncClient) -> set[str]:
        answers = [(p, await client.request(m, p, json=BODIES.get(p))) for p, methods in document["paths"].items() for m in methods]
        return {path for path, answer in answers if answer.status_code == 401}

    assert talk(app_of(), without_a_key) == secured
    open_to_all = described(app_of(with_keys=False))
    assert "securitySchemes" not in open_to_all["components"]
    assert not any("security" in o or "401" in o["responses"] for methods in open_to_all["paths"].values() for o in methods.values())


def header(key: str | None = KEY) -> dict[str, str]:
    return {} if key is None else {"authorization": f"Bearer {key}"}


async def never() -> AsyncIterator[bytes]:
    await asyncio.sleep(60)
    yield b""


Ask = Callable[[httpx.AsyncClient, str], Awaitable[httpx.Response]]


def asking(change: dict[str, Any] | None = None, key: str | None = KEY, **options: Any) -> Ask:
    async def ask(client: httpx.AsyncClient, path: str) -> httpx.Response:
        told = {"json": BODIES[path] | (change or {})} if path in BODIES else {}
        method = options.pop("method", "POST" if path in BODIES else "GET")
        return await client.request(method, path, headers=header(key) | options.pop("headers", {}), **(told | options))

    return ask


async def twice(client: httpx.AsyncClient, path: str) -> httpx.Response:
    await client.post(path, json=BODIES[path], headers=header(SPENT))
    return await client.post(path, json=BODIES[path], headers=header(SPENT))


def raising(error: Exception) -> Any:
    return app_of(error)


JSON = {"content-type": "application/json"}
PROBES: list[tuple[str, int, Callable[[], Any], Callable[[], Ask]]] = [
    ("no json", 400, app_of, lambda: asking(content=b"{", json=None, headers=JSON)),
    ("a long prompt", 400, lambda: app_of(bounds=Bounds(max_prompt_characters=5)), asking),
    ("a prompt over the model's limit", 400, lambda: raising(RequestRefused("too long", kind="too_long")), asking),
    ("no key", 401, app_of, lambda: asking(key=None)),
    ("an unknown key", 401, app_of, lambda: asking(key="x" * 30)),
    ("a revoked key", 403, app_of, lambda: asking(key=REVOKED)),
    ("an unknown model", 404, app_of, lambda: asking({"model": "gpt"})),
    ("an unknown method", 405, app_of, lambda: asking(method="PUT")),
    ("a slow body", 408, lambda: app_of(bounds=Bounds(body_s=0.05)), lambda: asking(content=never(), json=None, headers=JSON)),
    ("a large body", 413, lambda: app_of(bounds=Bounds(max_body_bytes=10)), asking),
    ("a form", 415, app_of, lambda: asking(data={"model": "teacher"}, json=None)),
    ("a compressed body", 415, app_of, lambda: asking(headers={"content-encoding": "gzip"})),
    ("an unknown field", 422, app_of, lambda: asking({"logprobs": 1})),
    ("a field out of its bounds", 422, app_of, lambda: asking({"n": 65})),
    ("a second request in the minute", 429, app_of, lambda: twice),
    ("more characters than a day's", 400, app_of, lambda: asking({"n": 64, "max_tokens": 4096}, SPENT)),
    ("a full queue", 429, lambda: app_of(bounds=Bounds(max_in_flight=0, max_queue=0)), asking),
    ("a busy engine", 429, lambda: raising(TeacherBusy("full", retry_after_s=3)), asking),
    ("an error", 500, lambda: raising(ZeroDivisionError()), asking),
    ("a broken engine", 500, lambda: raising(EngineError("broken")), asking),
    ("an engine that fails", 502, lambda: raising(TeacherFailed("500")), asking),
    ("an engine that refuses everything", 502, lambda: raising(TeacherRejected("401")), asking),
    ("an engine that is away", 503, lambda: raising(TeacherUnavailable("refused")), asking),
    ("no model yet", 503, lambda: raising(NotReady("waiting", retry_after_s=5)), asking),
    ("a late engine", 504, lambda: raising(TeacherLate("late")), asking),
]


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_every_error_that_can_be_provoked_is_described_and_every_one_described_can_be_provoked(path: str) -> None:
    document = described(app_of())
    responses = document["paths"][path]["post"]["responses"]
    provoked = {200}
    for what, status, app, ask in PROBES:
        answer = talk(app(), lambda client, ask=ask: ask()(client, path))  # type: ignore[misc]
        assert answer.status_code == status, (what, answer.text)
        response = responses[str(status)]
        valid(document, response["content"][answer.headers["content-type"]]["schema"], answer.json())
        unknown = set(answer.headers) - {"content-type", "content-length", "connection", "allow", "www-authenticate"}
        assert unknown <= set(response.get("headers", {})), what
        provoked.add(status)
    assert {int(status) for status in responses} == provoked


def test_the_other_paths_describe_their_errors_as_well() -> None:
    document = described(app_of())
    for path, status, app, ask in [
        (MODELS, 200, app_of(), asking()),
        (MODELS, 401, app_of(), asking(key=None)),
        (MODELS, 403, app_of(), asking(key=REVOKED)),
        ("/healthz", 200, app_of(), asking()),
        ("/readyz", 200, app_of(), asking()),
        ("/readyz", 503, raising(TeacherUnavailable("refused")), asking()),
        ("/readyz", 503, raising(TeacherRejected("refused")), asking()),
        ("/readyz", 503, raising(NotReady("waiting")), asking()),
        *((path, 405, app_of(), asking(method="DELETE")) for path in (MODELS, "/healthz", "/readyz")),
    ]:
        answer = talk(app, lambda client, ask=ask, path=path: ask(client, path))  # type: ignore[misc]
        assert answer.status_code == status, (path, answer.text)
        response = document["paths"][path]["get"]["responses"][str(status)]
        valid(document, response["content"]["application/json"]["schema"], answer.json())


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_the_events_of_a_stream_are_described_one_by_one(path: str) -> None:
    document = described(app_of())
    described_event = document["paths"][path]["post"]["responses"]["200"]["content"]["text/event-stream"]["schema"]
    (payload,) = [kind["contentSchema"] for kind in described_event["properties"]["data"]["anyOf"] if "contentSchema" in kind]
    answer = talk(app_of(), lambda client: asking({"stream": True, "n": 2})(client, path))
    *events, done = [event.removeprefix("data: ") for event in answer.text.split("\n\n") if event]
    assert done == "[DONE]"
    assert len(events) > 4
    for event in events:
        valid(document, described_event, {"data": event})
        valid(document, payload, json.loads(event))
    valid(document, payload, {"error": {"message": "m", "type": "server_error", "param": None, "code": None}})
    with pytest.raises(jsonschema_rs.ValidationError):
        valid(document, payload, {"choices": [], "logprobs": None})


LIMITS = {"max_n": 3, "max_tokens": 20, "max_prompt_characters": 50, "max_body_bytes": 2000}


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_the_limits_that_are_described_are_those_of_the_settings_and_those_that_hold(path: str) -> None:
    app = app_of(bounds=Bounds(**LIMITS))
    document = described(app)
    operation = document["paths"][path]["post"]
    body = document["components"]["schemas"]["ChatBody" if path == CHAT else "CompletionBody"]

    def most(field: str) -> int:
        (number,) = [kind["maximum"] for kind in body["properties"][field]["anyOf"] if kind.get("type") == "integer"]
        return int(number)

    assert (most("n"), most("max_tokens")) == (LIMITS["max_n"], LIMITS["max_tokens"])
    for limit in ("max_prompt_characters", "max_body_bytes"):
        assert f" {LIMITS[limit]} " in operation["description"]

    def prompt(characters: int) -> dict[str, Any]:
        text = "a" * characters
        return {"messages": [{"role": "user", "content": text}]} if path == CHAT else {"prompt": text}

    def of_bytes(size: int) -> dict[str, Any]:
        whole = len(httpx.Request("POST", "http://x", json=BODIES[path] | {"user": ""}).content)
        return {"user": "u" * (size - whole)}

    async def boundaries(client: httpx.AsyncClient) -> list[int]:
        changes = [{}, {"n": 3}, {"n": 4}, {"max_tokens": 20}, {"max_tokens": 21}, prompt(50), prompt(51), of_bytes(2000), of_bytes(2001)]
        return [(await asking(change)(client, path)).status_code for change in changes]

    assert talk(app, boundaries) == [200, 200, 422, 200, 422, 200, 400, 200, 413]


def test_the_settings_cannot_promise_more_than_the_bodies_take() -> None:
    document = described(app_of(bounds=Bounds()))
    defaults = TeacherServiceSettings(engine="scripted", no_auth=True)
    fields = document["components"]["schemas"]["ChatBody"]["properties"]
    assert fields["n"]["anyOf"][0]["maximum"] == defaults.max_n
    assert fields["max_completion_tokens"]["anyOf"][0]["maximum"] == defaults.max_tokens


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_a_whole_number_may_be_written_with_a_point(path: str) -> None:
    # JSON knows one kind of number, and a schema's "integer" takes 2.0; so do clients whose language has no other
    answer = talk(app_of(), lambda client: asking({"n": 2.0, "max_tokens": 5.0, "seed": 7.0})(client, path))
    assert answer.status_code == 200, answer.text
    assert len(answer.json()["choices"]) == 2


@pytest.fixture(scope="module")
def open_gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with teacher(tmp_path_factory.mktemp("log") / "stderr", "--no-auth") as gateway:
        yield gateway


def test_every_route_of_the_server_is_described(open_gateway: Gateway) -> None:
    document = httpx.get(f"{open_gateway.url}/openapi.json", trust_env=False).json()
    routes = {route.path for route in app_of().routes}
    assert set(document["paths"]) == routes
    assert httpx.get(f"{open_gateway.url}/docs", trust_env=False).status_code == 404
