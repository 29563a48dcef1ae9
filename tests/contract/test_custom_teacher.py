"""Teachers with APIs of their own, declared in a recipe: what is sent, what is made of every kind of answer, what is refused at load."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from shared.contracts import Completion, GenerationRequest, Message, Sampling
from shared.errors import (
    NotTheApi,
    RequestRefused,
    SettingsError,
    TeacherBusy,
    TeacherError,
    TeacherFailed,
    TeacherLate,
    TeacherRejected,
    TeacherUnavailable,
)
from shared.harvest.teacher import Answer, Refusal
from shared.http.client import teacher_of
from shared.http.custom import CustomTeacher
from shared.settings import Recipe, TeacherSettings, load_settings

KEY = "k-very-secret-42"
CHAT = GenerationRequest(
    messages=(
        Message(role="system", content="Be brief."),
        Message(role="user", content="a {seed}?"),
        Message(role="assistant", content="b"),
        Message(role="user", content="c"),
    ),
    n=2,
    sampling=Sampling(max_tokens=5, temperature=0.5, top_p=0.9, stop=("\n",), seed=7),
)
PLAIN = GenerationRequest(prompt="Größe?", sampling=Sampling(max_tokens=9))

IN_HOUSE = """
headers: {X-Team-Key: "{api_key}", X-Client: distill}
body:
  turns: "{messages}"
  engine: {name: "{model}", salt: "salt-{seed}"}
  limits: {length: "{max_tokens}", count: "{n}", ends: "{stop}", system: null}
message: {who: "{role}", says: "{content}"}
roles: {assistant: bot, user: human}
choices: results
text: said
finish_reason: why
finish_reasons: {done: stop, "2": length, unsafe: content_filter}
error: fault.code
errors: {slow_down: busy, too_big: too_long, bad_words: content_filter, nonsense: refused, no_contract: rejected, oops: failed}
retry_after_s: fault.again_in
input_tokens: cost.asked
output_tokens: cost.said
"""


class Server:
    """An HTTP server on a thread that answers everything with `status`, `headers` and `body`, and keeps what it was sent."""

    def __init__(self) -> None:
        self.status, self.body = 200, b""
        self.headers: dict[str, str] = {"content-type": "application/json"}
        self.seen: list[tuple[str, str, dict[str, str], Any]] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                sent = self.rfile.read(int(self.headers.get("content-length", 0)))
                names = {name.lower(): value for name, value in self.headers.items()}
                server.seen.append((self.command, self.path, names, json.loads(sent) if sent else None))
                self.send_response(server.status)
                for name, value in server.headers.items():
                    self.send_header(name, value)
                self.send_header("content-length", str(len(server.body)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(server.body)

            do_POST = do_PUT = do_HEAD = answer

            def log_message(self, format: str, *arguments: Any) -> None: ...

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v7/say/?lang=en"

    def says(self, answer: Any, *, status: int = 200, **headers: str) -> None:
        self.status, self.body = status, answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.headers = {"content-type": "application/json", **{name.replace("_", "-"): value for name, value in headers.items()}}


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.http.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.http.shutdown()
    server.http.server_close()
    thread.join()


def settings(tmp_path: Path, url: str, custom: str = IN_HOUSE, model: str = "m-1") -> TeacherSettings:
    """As a recipe with this section `teacher.custom` gives them."""
    file = tmp_path / "recipe.yaml"
    section = "\n".join("    " + line for line in custom.strip().splitlines())
    file.write_text(f'name: test\nteacher:\n  protocol: custom\n  url: "{url}"\n  model: {model}\n  custom:\n{section}\n')
    return load_settings(Recipe, flags={}, yaml_file=file).teacher


Ask = Callable[..., Answer]


@pytest.fixture
def ask(server: Server, tmp_path: Path) -> Ask:
    """Ask the server once, by the in-house API or the section given."""

    def ask(request: GenerationRequest = CHAT, custom: str = IN_HOUSE, key: str | None = KEY, timeout_s: float = 20.0) -> Answer:
        api = settings(tmp_path, server.url, custom).custom
        assert api is not None
        return run(CustomTeacher(server.url, api, model="m-1", api_key=key, timeout_s=timeout_s), lambda teacher: teacher.ask(request))

    return ask


def run(teacher: CustomTeacher, do: Callable[[CustomTeacher], Awaitable[Any]]) -> Any:
    async def once() -> Any:
        try:
            return await do(teacher)
        finally:
            await teacher.aclose()

    return asyncio.run(once())


def result(said: Any, why: Any = "done") -> dict[str, Any]:
    return {"said": said, "why": why}


def test_the_template_is_filled_with_values_of_their_types_and_prompts_are_not_templates(server: Server, ask: Ask) -> None:
    server.says({"results": [result("one"), result("two", 2)], "cost": {"asked": 12, "said": 5}})
    answer = ask()
    method, path, headers, body = server.seen[0]
    assert (method, path) == ("POST", "/v7/say/?lang=en")
    assert (headers["x-team-key"], headers["x-client"], headers["content-type"]) == (KEY, "distill", "application/json")
    assert body == {
        "turns": [
            {"who": "system", "says": "Be brief."},
            {"who": "human", "says": "a {seed}?"},
            {"who": "bot", "says": "b"},
            {"who": "human", "says": "c"},
        ],
        "engine": {"name": "m-1", "salt": "salt-7"},
        "limits": {"length": 5, "count": 2, "ends": ["\n"], "system": None},
    }
    assert answer == Answer(
        (Completion(text="one", finish_reason="stop"), Completion(text="two", finish_reason="length")), input_tokens=12, output_tokens=5
    )


def test_what_is_not_there_is_left_out_with_its_key_and_is_empty_within_a_text(server: Server, ask: Ask) -> None:
    custom = """
body: {q: "{prompt}", stop: "{stop}", seed: "{seed}", tag: "s{seed}", list: ["{seed}", "{top_p}"], temperature: "{temperature}"}
method: PUT
text: a
"""
    server.says({"a": "x"})
    assert ask(PLAIN, custom, key=None) == Answer((Completion(text="x", finish_reason="stop"),))
    assert server.seen[0][0] == "PUT"
    assert server.seen[0][3] == {"q": "Größe?", "tag": "s", "list": [1.0], "temperature": 0.0}


def test_a_request_asks_for_one_answer_unless_the_template_says_how_many(server: Server, tmp_path: Path) -> None:
    one = settings(tmp_path, server.url, 'body: ["{prompt}"]\ntext: a')
    many = settings(tmp_path, server.url, 'body: ["{prompt}", "{n}"]\nchoices: a\ntext: "@"')
    assert (teacher_of(one, None).most_choices, teacher_of(many, None).most_choices) == (1, None)


def test_more_answers_than_asked_for_are_left_and_a_filtered_one_does_not_shift_the_others(server: Server, ask: Ask) -> None:
    server.says({"results": [{"why": "unsafe"}, result("two"), result("three")]})
    first, second = ask().choices
    assert isinstance(first, Refusal)
    assert first.kind == "content_filter"
    assert second == Completion(text="two", finish_reason="stop")


@pytest.mark.parametrize("said", [None, 7, ["x"], {"x": 1}])
def test_an_answer_that_is_no_text_is_a_failed_row(server: Server, ask: Ask, said: Any) -> None:
    server.says({"results": [result(said), result("fine")]})
    first, second = ask().choices
    assert isinstance(first, Refusal)
    assert first.kind == "no_text"
    assert second == Completion(text="fine", finish_reason="stop")


def test_an_ending_nobody_has_named_is_a_failed_row_with_its_name(server: Server, ask: Ask) -> None:
    server.says({"results": [result("x", "tool_use")]})
    (refusal,) = ask().choices
    assert isinstance(refusal, Refusal)
    assert refusal.kind == "refused"
    assert "tool_use" in refusal.message


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("slow_down", TeacherBusy),
        ("oops", TeacherFailed),
        ("nobody named this", TeacherFailed),
        ("nonsense", RequestRefused),
        ("too_big", RequestRefused),
        ("bad_words", RequestRefused),
        ("no_contract", TeacherRejected),
    ],
)
def test_an_error_inside_a_200_is_what_the_recipe_says_it_is(server: Server, ask: Ask, code: str, kind: type[TeacherError]) -> None:
    server.says({"fault": {"code": code, "text": f"your key {KEY}"}})
    with pytest.raises(kind) as caught:
        ask()
    assert type(caught.value) is kind
    assert code in str(caught.value)
    assert KEY not in str(caught.value)
    if isinstance(caught.value, RequestRefused):
        assert caught.value.kind == {"too_big": "too_long", "bad_words": "content_filter"}.get(code, "refused")


@pytest.mark.parametrize("nothing", [None, 0, "", False])
def test_an_error_field_that_says_nothing_is_no_error(server: Server, ask: Ask, nothing: Any) -> None:
    server.says({"fault": {"code": nothing}, "results": [result("x")]})
    assert ask().choices == (Completion(text="x", finish_reason="stop"),)


@pytest.mark.parametrize(
    ("again_in", "seconds"),
    [(3, 3.0), (1.5, 1.5), ("2", 2.0), ("1.5s", 1.5), ("250ms", 0.25), ("soon", 9.0), (None, 9.0), (True, 9.0), ("nan", 9.0)],
)
def test_a_429_waits_as_its_body_says_else_as_its_header_does(server: Server, ask: Ask, again_in: Any, seconds: float) -> None:
    server.says({"fault": {"code": "quota", "again_in": again_in}}, status=429, retry_after="9")
    with pytest.raises(TeacherBusy) as caught:
        ask()
    assert caught.value.retry_after_s == seconds


def test_an_unnamed_error_inside_a_200_that_says_when_to_come_back_is_no_failure(server: Server, ask: Ask) -> None:
    server.says({"fault": {"code": "?", "again_in": "4s"}})
    with pytest.raises(TeacherBusy) as caught:
        ask()
    assert caught.value.retry_after_s == 4.0


@pytest.mark.parametrize(
    ("status", "kind"),
    [(400, RequestRefused), (401, TeacherRejected), (404, NotTheApi), (429, TeacherBusy), (500, TeacherFailed), (302, NotTheApi)],
)
@pytest.mark.parametrize("body", [b'{"fault": {"code": "unnamed"}}', b"<html>no</html>", b""])
def test_without_a_named_error_the_status_decides(server: Server, ask: Ask, status: int, kind: type[TeacherError], body: bytes) -> None:
    server.says(body, status=status)
    with pytest.raises(kind) as caught:
        ask()
    assert type(caught.value) is kind
    assert f"HTTP {status}" in str(caught.value)


def test_a_named_error_comes_before_its_status(server: Server, ask: Ask) -> None:
    server.says({"fault": {"code": "slow_down"}}, status=529, retry_after="2")
    with pytest.raises(TeacherBusy) as caught:
        ask()
    assert caught.value.retry_after_s == 2.0


@pytest.mark.parametrize(
    ("answer", "field"),
    [
        ({"outcome": "hello"}, "choices (results) finds nothing"),
        ({"results": []}, "choices (results) finds []"),
        ({"results": "hello"}, "choices (results) finds hello"),
        ([1, 2], "choices (results) finds nothing"),
        ({"results": [{"said": "cut off?"}]}, "finish_reason (why) finds nothing"),
    ],
)
def test_an_answer_of_another_shape_names_field_expression_and_first_bytes(server: Server, ask: Ask, answer: Any, field: str) -> None:
    server.says(answer)
    with pytest.raises(NotTheApi) as caught:
        ask()
    assert f"teacher.custom.{field} in an answer that begins: {json.dumps(answer)[:40]}" in str(caught.value)


def test_an_expression_that_fails_on_an_answer_says_why(server: Server, ask: Ask) -> None:
    server.says({"parts": [1, 2], "key": KEY})
    with pytest.raises(NotTheApi, match=r"fails: .*join") as caught:
        ask(PLAIN, "body: '{prompt}'\nheaders: {x-key: '{api_key}'}\ntext: join('', parts) || none")
    assert KEY not in str(caught.value)
    server.says({"parts": [1, 2]})
    with pytest.raises(NotTheApi, match="fails"):
        ask(PLAIN, "body: '{prompt}'\ntext: parts[::0]", key=None)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>Welcome</html>",
        b'{"results": [{"said": "br',
        b'{"a": 1}\n{"a": 2}\n',
        b"[" * 100_000,
        '{"results": "größe"}'.encode("latin-1"),
    ],
)
def test_what_is_no_json_is_not_the_api(server: Server, ask: Ask, body: bytes) -> None:
    server.says(body)
    with pytest.raises(NotTheApi, match="not JSON"):
        ask()


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("header", ["application/json; charset=iso-8859-1", "text/plain", "application/json; charset=klingon"])
def test_json_is_read_by_its_own_encoding_whatever_the_header_claims(server: Server, ask: Ask, encoding: str, header: str) -> None:
    server.says(json.dumps({"results": [result("Grüße, 世界 😀")]}, ensure_ascii=False).encode(encoding), content_type=header)
    assert ask().choices == (Completion(text="Grüße, 世界 😀", finish_reason="stop"),)


@pytest.mark.parametrize("count", [None, True, -1, "12", 1.5, [1]])
def test_a_token_count_that_makes_no_sense_is_none(server: Server, ask: Ask, count: Any) -> None:
    server.says({"results": [result("x")], "cost": {"asked": count, "said": count}})
    answer = ask()
    assert (answer.input_tokens, answer.output_tokens) == (None, None)


def test_no_answer_in_time_is_late_and_a_dead_server_unavailable(server: Server, ask: Ask) -> None:
    server.http.shutdown()  # the connection is taken, and nobody answers
    with pytest.raises(TeacherLate, match="no answer within"):
        ask(timeout_s=0.2)
    server.http.server_close()
    with pytest.raises(TeacherUnavailable):
        ask()


def test_the_rendered_request_shows_all_but_the_key(tmp_path: Path) -> None:
    custom = 'headers: {Authorization: "Bearer {api_key}"}\nbody: {q: "{prompt}", credentials: {key: "{api_key}"}}\ntext: a'
    api = settings(tmp_path, "http://say.example/x", custom).custom
    assert api is not None
    teacher = CustomTeacher("http://say.example/x", api, model="m", api_key=KEY)
    shown = teacher.rendered(PLAIN)
    asyncio.run(teacher.aclose())
    assert KEY not in shown
    assert "POST http://say.example/x" in shown
    assert "authorization" in shown
    assert "Größe?" in shown
    assert KEY not in repr(api) + api.model_dump_json()


def test_a_request_of_the_other_kind_is_refused_before_it_is_sent(server: Server, ask: Ask) -> None:
    with pytest.raises(RequestRefused, match="takes chats"):
        ask(PLAIN)
    with pytest.raises(RequestRefused, match="takes plain text"):
        ask(CHAT, 'body: "{prompt}"\ntext: a', key=None)
    assert not server.seen


@pytest.mark.parametrize(
    ("key", "custom", "message"),
    [
        (None, IN_HOUSE, "give teacher.api_key_file"),
        (KEY, 'body: "{prompt}"\ntext: a', "say where it is sent"),
        ("clé", IN_HOUSE, "printable ASCII"),
        ("a\nb", IN_HOUSE, "printable ASCII"),
    ],
)
def test_a_key_that_is_missing_or_has_no_place_is_a_mistake_of_the_recipe(
    tmp_path: Path, key: str | None, custom: str, message: str
) -> None:
    api = settings(tmp_path, "http://say.example/x", custom).custom
    assert api is not None
    with pytest.raises(SettingsError, match=message) as caught:
        CustomTeacher("http://say.example/x", api, model="m", api_key=key)
    assert key is None or key not in str(caught.value)


@pytest.mark.parametrize(
    ("custom", "message"),
    [
        ('body: {q: "{promt}"}\ntext: a', r"body: \{promt\}: unknown placeholder; did you mean prompt\?"),
        ("body: {q: {prompt}}\ntext: a", r'body: \{prompt\} without quotes is a mapping to YAML; write "\{prompt\}"'),
        ("body: {q: hello}\ntext: a", r'body: the template needs either "\{prompt\}"'),
        ('body: {q: "{prompt}", m: "{messages}"}\ntext: a', "not both"),
        ('body: {q: "{prompt}", s: "{system}"}\ntext: a', "goes with"),
        ('body: "Chat: {messages}"\ntext: a', "stand alone"),
        ('body: "{messages}"\nmessage: {r: "{role}"}\ntext: a', r"message: the template of a message needs"),
        ('body: "{messages}"\nmessage: {r: "{rolle}", c: "{content}"}\ntext: a', "did you mean role"),
        ('body: "{prompt}"\nroles: {user: human}\ntext: a', "message, roles: they shape"),
        ('body: "{messages}"\nroles: {human: x}\ntext: a', "roles.human"),
        ('body: ["{prompt}", "{n}"]\ntext: a', "choices: .* asks for several"),
        ('body: "{prompt}"', "custom.text: required"),
        ('body: "{prompt}"\ntext: "a["', "custom.text: no JMESPath expression"),
        ('body: "{prompt}"\ntext: ""', "custom.text: no JMESPath expression"),
        ('body: "{prompt}"\ntext: a\nerror: lenght(x)', r"custom.error: JMESPath has no function lenght\(\); did you mean length\?"),
        ('body: "{prompt}"\ntext: a\ntextt: b', "custom.textt: unknown setting; did you mean teacher.custom.text"),
        ('body: "{prompt}"\ntext: a\nfinish_reasons: {x: stop}', "finish_reasons: say in finish_reason"),
        ('body: "{prompt}"\ntext: a\nerrors: {x: busy}', "errors: say in error"),
        ('body: "{prompt}"\ntext: a\nerror: e\nerrors: {x: retry}', "errors.x: .*busy"),
        ('body: "{prompt}"\ntext: a\nmethod: GET', "method: .*POST"),
        ('body: "{prompt}"\ntext: a\nheaders: {version: 2023-06-01}', 'headers: version: without quotes .* write "2023-06-01"'),
        ('body: "{prompt}"\ntext: a\nheaders: {x-key: {api_key}}', r'headers: x-key: without quotes .* write "\{api_key\}"'),
        ('body: "{prompt}"\ntext: a\nheaders: {x-a: "{model}"}', r"headers: \{model\}: unknown placeholder"),
        ('body: "{prompt}"\ntext: a\nheaders: {"x a": b}', "no header has this name"),
        ('body: "{prompt}"\ntext: a\nheaders: {x-a: "b\\r\\nc: d"}', "no header has this name"),
        ('body: "{prompt}"\ntext: a\nheaders: {Content-Type: text/plain}', "set by the client"),
    ],
)
def test_a_wrong_description_is_refused_at_load_with_its_field_and_remedy(tmp_path: Path, custom: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        settings(tmp_path, "http://say.example/x", custom)


@pytest.mark.parametrize(
    "name", ["Authorization", "x-api-key", "X-ApiKey", "X-Auth-Token", "client_secret", "Cookie", "Ocp-Apim-Subscription-Key"]
)
def test_a_secret_written_into_a_recipe_is_refused_and_not_repeated(tmp_path: Path, name: str) -> None:
    with pytest.raises(SettingsError, match="a secret has no place in a recipe") as caught:
        settings(tmp_path, "http://say.example/x", f'body: "{{prompt}}"\ntext: a\nheaders: {{{name}: {KEY}}}')
    assert KEY not in str(caught.value)
    with pytest.raises(SettingsError, match="url: it holds a secret") as caught:
        settings(tmp_path, f"http://say.example/x?v=1&key={KEY}", 'body: "{prompt}"\ntext: a')
    assert KEY not in str(caught.value)


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        ("{url: http://x, protocol: custom}", "protocol, custom"),
        ('{url: http://x, custom: {body: "{prompt}", text: a}}', "protocol, custom"),
        ('{launch: {engine: scripted}, protocol: custom, custom: {body: "{prompt}", text: a}}', "url: give the whole URL"),
    ],
)
def test_description_and_protocol_and_url_belong_together(tmp_path: Path, teacher: str, message: str) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(f"name: test\nteacher: {teacher}\n")
    with pytest.raises(SettingsError, match=message):
        load_settings(Recipe, flags={}, yaml_file=file)


def test_a_budget_of_money_needs_a_template_that_bounds_the_answer(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    price = "{input_per_million: 1, output_per_million: 1}"

    def loaded(body: str) -> Recipe:
        custom = f"{{body: {body}, text: a}}"
        teacher = f"{{url: 'http://say.example/x', protocol: custom, price: {price}, custom: {custom}}}"
        file.write_text(f"name: test\nteacher: {teacher}\nharvest: {{budget: {{cost: 5}}}}\n")
        return load_settings(Recipe, flags={}, yaml_file=file)

    assert loaded('{in: "{prompt}", most: "{max_tokens}"}').harvest.budget.cost == 5
    with pytest.raises(
        SettingsError, match=r'harvest\.budget\.cost: teacher\.custom\.body .*write "\{max_tokens\}".*harvest\.budget\.requests'
    ):
        loaded('{in: "{prompt}"}')


def test_another_template_is_another_teacher_and_another_reading_of_errors_is_not(tmp_path: Path) -> None:
    url = "http://say.example/x"
    one = settings(tmp_path, url)
    assert settings(tmp_path, url, IN_HOUSE.replace("salt-", "pepper-")).identity != one.identity
    assert settings(tmp_path, url, IN_HOUSE.replace("text: said", "text: written")).identity != one.identity
    assert settings(tmp_path, url, IN_HOUSE.replace("oops: failed", "oops: busy")).identity == one.identity
    assert url in one.identity


def test_the_body_says_whether_turns_or_plain_text_are_asked(tmp_path: Path) -> None:
    assert settings(tmp_path, "http://x.example").chat
    assert not settings(tmp_path, "http://x.example", 'body: "{prompt}"\ntext: a').chat


GEMINI = """
headers: {x-goog-api-key: "{api_key}"}
body:
  systemInstruction: {parts: [{text: "{system}"}]}
  contents: "{messages}"
  generationConfig: {candidateCount: "{n}", maxOutputTokens: "{max_tokens}", temperature: "{temperature}", topP: "{top_p}",
    stopSequences: "{stop}", seed: "{seed}"}
message: {role: "{role}", parts: [{text: "{content}"}]}
roles: {assistant: model}
choices: candidates
text: join('', content.parts[?!thought].text)
finish_reason: finishReason
finish_reasons: {STOP: stop, MAX_TOKENS: length, SAFETY: content_filter, RECITATION: content_filter, PROHIBITED_CONTENT: content_filter}
error: error.status || promptFeedback.blockReason
errors: {SAFETY: content_filter, BLOCKLIST: content_filter, PROHIBITED_CONTENT: content_filter, OTHER: refused}
retry_after_s: error.details[?contains("@type", 'RetryInfo')].retryDelay | [0]
input_tokens: usageMetadata.promptTokenCount
output_tokens: sum(usageMetadata.[candidatesTokenCount, thoughtsTokenCount][?@])
"""
TGI = """
headers: {Authorization: "Bearer {api_key}"}
body:
  inputs: "{prompt}"
  parameters: {max_new_tokens: "{max_tokens}", do_sample: true, temperature: "{temperature}", top_p: "{top_p}", stop: "{stop}",
    seed: "{seed}", return_full_text: false, details: true}
text: generated_text
finish_reason: details.finish_reason
finish_reasons: {eos_token: stop, stop_sequence: stop}
error: error_type
errors: {overloaded: busy, generation: failed, incomplete_generation: failed}
output_tokens: details.generated_tokens
"""
OLLAMA = """
body:
  model: "{model}"
  prompt: "{prompt}"
  stream: false
  options: {num_predict: "{max_tokens}", temperature: "{temperature}", top_p: "{top_p}", stop: "{stop}", seed: "{seed}"}
text: response
finish_reason: done_reason
error: error
input_tokens: prompt_eval_count
output_tokens: eval_count
"""
SAMPLED = PLAIN.model_copy(update={"sampling": CHAT.sampling})


def test_anthropic_messages_by_the_shipped_recipe(server: Server) -> None:
    recipe = load_settings(Recipe, flags={}, yaml_file=Path(__file__).parents[2] / "recipes" / "custom-teacher.yaml")
    api = recipe.teacher.custom
    assert api is not None

    def ask() -> Answer:
        return run(CustomTeacher(server.url, api, model="claude-x", api_key=KEY), lambda teacher: teacher.ask(CHAT))

    blocks = [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    said = {
        "type": "message",
        "role": "assistant",
        "content": blocks,
        "stop_reason": "end_turn",
        "usage": {"input_tokens": 9, "output_tokens": 2},
    }
    server.says(said)
    assert ask() == Answer((Completion(text="Hello", finish_reason="stop"),), input_tokens=9, output_tokens=2)
    _, _, headers, body = server.seen[0]
    assert (headers["x-api-key"], headers["anthropic-version"]) == (KEY, "2023-06-01")
    assert "authorization" not in headers
    turns = [{"role": "user", "content": "a {seed}?"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    assert body == {"model": "claude-x", "system": "Be brief.", "messages": turns, "max_tokens": 5, "temperature": 0.5}
    server.says(said | {"stop_reason": "refusal", "content": []})
    (refusal,) = ask().choices
    assert isinstance(refusal, Refusal)
    assert refusal.kind == "content_filter"
    server.says({"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}, status=529)
    with pytest.raises(TeacherBusy):
        ask()
    server.says({"type": "error", "error": {"type": "invalid_request_error", "message": "max_tokens: required"}}, status=400)
    with pytest.raises(RequestRefused):
        ask()


def test_gemini_generate_content(server: Server, ask: Ask) -> None:
    thought = {"text": "hm", "thought": True}
    server.says(
        {
            "candidates": [
                {"content": {"role": "model", "parts": [thought, {"text": "Hel"}, {"text": "lo"}]}, "finishReason": "STOP", "index": 0},
                {"finishReason": "SAFETY", "index": 1},
            ],
            "usageMetadata": {"promptTokenCount": 9, "candidatesTokenCount": 2, "thoughtsTokenCount": 5, "totalTokenCount": 16},
        }
    )
    answer = ask(CHAT, GEMINI)
    assert answer.choices[0] == Completion(text="Hello", finish_reason="stop")
    assert isinstance(answer.choices[1], Refusal)
    assert answer.choices[1].kind == "content_filter"
    assert (answer.input_tokens, answer.output_tokens) == (9, 7)
    _, _, headers, body = server.seen[0]
    assert headers["x-goog-api-key"] == KEY
    assert body == {
        "systemInstruction": {"parts": [{"text": "Be brief."}]},
        "contents": [
            {"role": "user", "parts": [{"text": "a {seed}?"}]},
            {"role": "model", "parts": [{"text": "b"}]},
            {"role": "user", "parts": [{"text": "c"}]},
        ],
        "generationConfig": {
            "candidateCount": 2,
            "maxOutputTokens": 5,
            "temperature": 0.5,
            "topP": 0.9,
            "stopSequences": ["\n"],
            "seed": 7,
        },
    }
    server.says({"promptFeedback": {"blockReason": "SAFETY"}, "usageMetadata": {"promptTokenCount": 9}})
    with pytest.raises(RequestRefused) as refused:
        ask(CHAT, GEMINI)
    assert refused.value.kind == "content_filter"
    info = [{"@type": "type.googleapis.com/google.rpc.Help"}, {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "34.5s"}]
    server.says({"error": {"code": 429, "status": "RESOURCE_EXHAUSTED", "message": "quota", "details": info}}, status=429)
    with pytest.raises(TeacherBusy) as busy:
        ask(CHAT, GEMINI)
    assert busy.value.retry_after_s == 34.5


def test_text_generation_inference_generate(server: Server, ask: Ask) -> None:
    details = {"finish_reason": "stop_sequence", "generated_tokens": 3, "seed": 7, "prefill": [], "tokens": []}
    server.says({"generated_text": "five feet", "details": details})
    assert ask(SAMPLED, TGI) == Answer((Completion(text="five feet", finish_reason="stop"),), output_tokens=3)
    _, _, headers, body = server.seen[0]
    assert headers["authorization"] == f"Bearer {KEY}"
    assert body == {
        "inputs": "Größe?",
        "parameters": {
            "max_new_tokens": 5,
            "do_sample": True,
            "temperature": 0.5,
            "top_p": 0.9,
            "stop": ["\n"],
            "seed": 7,
            "return_full_text": False,
            "details": True,
        },
    }
    server.says({"error": "Model is overloaded", "error_type": "overloaded"}, status=429)
    with pytest.raises(TeacherBusy):
        ask(SAMPLED, TGI)
    server.says({"error": "Request failed during generation", "error_type": "generation"}, status=424)
    with pytest.raises(TeacherFailed):
        ask(SAMPLED, TGI)
    server.says({"error": "Input validation error", "error_type": "validation"}, status=422)
    with pytest.raises(RequestRefused):
        ask(SAMPLED, TGI)


def test_ollama_generate(server: Server, ask: Ask) -> None:
    server.says({"model": "m-1", "response": "blue", "done": True, "done_reason": "length", "prompt_eval_count": 26, "eval_count": 5})
    assert ask(SAMPLED, OLLAMA, key=None) == Answer((Completion(text="blue", finish_reason="length"),), input_tokens=26, output_tokens=5)
    assert server.seen[0][3] == {
        "model": "m-1",
        "prompt": "Größe?",
        "stream": False,
        "options": {"num_predict": 5, "temperature": 0.5, "top_p": 0.9, "stop": ["\n"], "seed": 7},
    }
    server.says({"error": "model 'm-1' not found"}, status=404)
    with pytest.raises(NotTheApi, match="not found"):
        ask(SAMPLED, OLLAMA, key=None)
