"""The student's API over real students: what may be asked, how it is worded, who answers, and every way it refuses."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import httpx
import jsonschema_rs
import openai
import pytest
import schemathesis
from gateways import Gateway, running
from tiny_servable import WORDS, servable_llama, servable_t5
from transformers import AutoTokenizer

from shared.contracts import Completion, GenerationRequest
from shared.engines import Piece
from shared.engines.convert import convert
from shared.engines.scripted import ScriptedEngine
from shared.errors import EngineError
from shared.http.keys import KeyEntry, Keys, digest
from shared.prompts import zero_shot
from shared.registry import promote
from shared.settings import Recipe, TaskSettings, load_settings
from student_trainer.serving.app import app_over, student_app
from student_trainer.serving.follow import Loaded, Served, Student
from student_trainer.serving.load import DECODING, Base, Loader, worded
from student_trainer.serving.main import _unless_given, beside
from student_trainer.serving.metrics import StudentMeters
from student_trainer.serving.settings import StudentServiceSettings
from student_trainer.training.packing import Packer

T = TypeVar("T")
KEY = "a-key-for-tests-0123456789"
QUESTION = "word1 word2 word3"
TASK = TaskSettings(instruction="word9 word8", max_question_chars=60)
MAKERS = {"decoder-only": servable_llama, "encoder-decoder": servable_t5}
CHECKS = """
[checks]
positive_data_acceptance.expected-statuses = ["200", "404"]
negative_data_rejection.expected-statuses = ["400", "401", "404", "405", "413", "415", "422"]
# a question over the task's limit is a right one that this student refuses
[[operations]]
include-path = "/v1/generate"
checks.positive_data_acceptance.expected-statuses = ["200", "400"]
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Hugging Face folder and serving folder of each kind."""
    root, made = tmp_path_factory.mktemp("students"), {}
    for kind, make in MAKERS.items():
        hf = make(root / kind)
        made[kind] = hf, convert(str(hf), root / f"{kind}-serving", name=kind, quantization="float32")
    return made


@pytest.fixture(params=list(MAKERS))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def registry_of(folder: Path, root: Path, *, name: str = "tiny") -> Path:
    """A registry whose version has a report, and test rows."""
    (root / "report.html").write_text("<!doctype html><title>report</title>")
    rows = [json.dumps({"id": str(i), "question": f"word{i} word{i + 1}", "summary": "word"}) for i in range(20)]
    (root / "test.jsonl").write_text("\n".join(rows) + "\n")
    kept = [root / "report.html", root / "test.jsonl"]
    promote(root / "registry", folder, name=name, task=TASK.model_dump(), scores={"rougeL": 0.4}, run="r", reason="t", attachments=kept)
    return root / "registry"


def talk(app: Any, steps: Callable[[httpx.AsyncClient], Awaitable[T]]) -> T:
    async def run() -> T:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            async with asyncio.timeout(60):
                while (await client.get("/readyz")).status_code != 200:
                    await asyncio.sleep(0.01)
            return await steps(client)

    return asyncio.run(run())


def over(folder: Path, root: Path, **settings: Any) -> Any:
    """The real application over a registry."""
    return student_app(StudentServiceSettings(registry=registry_of(folder, root), **settings))


@pytest.mark.parametrize("with_keys", [False, True], ids=["as it is", "with keys"])
def test_a_server_does_what_its_schema_says_with_whatever_is_made_of_it(
    folders: dict[str, tuple[Path, Path]], tmp_path: Path, with_keys: bool
) -> None:
    """schemathesis: several hundred requests, right and wrong ones, all its checks."""
    registry = registry_of(folders["encoder-decoder"][1], tmp_path)
    (tmp_path / "keys.yaml").write_text(f"alice: {{sha256: {digest(KEY).hex()}}}\n")
    (tmp_path / "schemathesis.toml").write_text(CHECKS)
    keys = ["--api-keys-file", str(tmp_path / "keys.yaml")] if with_keys else []
    serve = ["-m", "shared.cli", "serve", "--registry", str(registry), "--port", "0", "--max-tokens", "20", "--log-level", "info", *keys]
    options = ["--checks", "all", "--max-examples", "20", "--seed", "1", "--generation-database", "none", "--continue-on-failure"]
    options += ["--no-color", "--output-sanitize", "false", "--exclude-path", "/metrics", "--exclude-path", "/report"]
    options += ["--header", f"Authorization: Bearer {KEY}"] if with_keys else []
    command = [sys.executable, "-c", "from schemathesis.cli import schemathesis; schemathesis()", "run", *options]
    with running(serve, tmp_path / "stderr") as server:
        ready(server)
        run = subprocess.run([*command, f"{server.url}/openapi.json"], cwd=tmp_path, capture_output=True, text=True, timeout=280)
        assert run.returncode == 0, run.stdout[-12_000:] + run.stderr[-2000:]
        assert server.complaints() == []


def ready(server: Gateway) -> None:
    until = 300
    while httpx.get(f"{server.url}/readyz", trust_env=False).status_code != 200:
        until -= 1
        assert until, server.log.read_text()


def test_the_schema_is_valid_and_says_what_wants_a_key_and_what_a_model_tells_of_itself(
    folders: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    keys = Keys({"alice": KeyEntry(sha256=digest(KEY).hex())})
    settings = StudentServiceSettings(registry=registry_of(folders["decoder-only"][1], tmp_path), base="embedded:none")
    app = student_app(settings, keys=keys)

    async def steps(client: httpx.AsyncClient) -> None:
        document = (await client.get("/openapi.json")).json()
        schemathesis.openapi.from_dict(document).validate()
        for path, methods in document["paths"].items():
            for method, operation in methods.items():
                answer = await client.request(method, path, json={} if method == "post" else None)
                assert (answer.status_code == 401) == ("security" in operation), path
        listing = document["paths"]["/v1/models"]["get"]["responses"]["200"]["content"]["application/json"]["schema"]
        found = (await client.get("/v1/models", headers={"authorization": f"Bearer {KEY}"})).json()
        jsonschema_rs.validator_for({"components": document["components"], **listing}).validate(found)
        student, base = found["data"]
        assert (student["id"], student["scores"], student["recipe"]) == ("student", {"rougeL": 0.4}, "tiny")
        assert base["id"] == "base"

    talk(app, steps)


def test_a_prompt_has_the_token_ids_that_it_had_in_training(folders: dict[str, tuple[Path, Path]], kind: str) -> None:
    hf, serving = folders[kind]
    packer = Packer(AutoTokenizer.from_pretrained(hf), kind=kind, max_prompt_tokens=128, max_response_tokens=8)
    load = Loader(StudentServiceSettings(model_dir=serving, threads="1x1"), StudentMeters())
    loaded = load(Student(serving, "v", TASK))
    model = loaded.engine._model  # type: ignore[attr-defined]
    for question in (QUESTION, "word4", " ".join(WORDS), "word1\n\n  word2\tunknown é"):
        trained = packer.prompt(zero_shot(TASK, question))
        served = [model.tokenizer.token_to_id(token) for token in model.encode(worded(TASK, kind, question, DECODING)).tokens]
        assert served == trained
    if kind == "decoder-only":  # what all questions have in common is read once
        assert model.encode(worded(TASK, kind, QUESTION, DECODING)).known >= len(["user", "word9", "word8"])


def test_a_stream_is_in_pieces_what_is_answered_whole_and_both_name_the_version(
    folders: dict[str, tuple[Path, Path]], tmp_path: Path, kind: str
) -> None:
    async def steps(client: httpx.AsyncClient) -> None:
        body = {"question": QUESTION, "max_tokens": 30}
        whole = await client.post("/v1/generate", json=body)
        version = whole.headers["x-student-version"]
        streamed = await client.post("/v1/generate", json=body | {"stream": True})
        assert streamed.headers["content-type"].startswith("text/event-stream")
        *events, done = [line.removeprefix("data: ") for line in streamed.text.split("\n\n") if line]
        chunks = [json.loads(event) for event in events]
        assert done == "[DONE]"
        assert streamed.headers["x-student-version"] == version == whole.json()["version"] == chunks[0]["version"]
        (answer,) = whole.json()["answers"]
        assert "".join(c["text"] for c in chunks).strip() == answer["text"]
        assert [c["finish_reason"] for c in chunks] == [None] * (len(chunks) - 1) + [answer["finish_reason"]]

    talk(over(folders[kind][1], tmp_path), steps)


def test_a_server_without_keys_answers_to_the_names_of_this_machine_alone_and_one_with_keys_to_any(
    folders: dict[str, tuple[Path, Path]], tmp_path: Path, kind: str
) -> None:
    """A page of anybody's can let its own name mean 127.0.0.1: it would be asked as one of this machine."""

    async def steps(client: httpx.AsyncClient) -> None:
        for host in ("localhost", "localhost:8080", "127.0.0.1:8080", "[::1]:8080", "LOCALHOST"):
            assert (await client.get("/v1/student", headers={"host": host})).status_code == 200, host
        for path, method in (("/v1/student", "GET"), ("/v1/generate", "POST"), ("/", "GET"), ("/readyz", "GET")):
            answer = await client.request(method, path, json={"question": QUESTION}, headers={"host": "evil.example:8080"})
            assert answer.status_code == 403, path
            assert "ask it as 127.0.0.1 or localhost" in answer.json()["error"]["message"]

    talk(over(folders[kind][1], tmp_path), steps)

    async def anywhere(client: httpx.AsyncClient) -> None:
        assert (await client.get("/readyz", headers={"host": "student.example"})).status_code == 200

    settings = StudentServiceSettings(model_dir=folders[kind][1], no_auth=True)
    talk(student_app(settings), anywhere)
    talk(student_app(settings.model_copy(update={"no_auth": False}), keys=Keys({"me": KeyEntry(sha256="0" * 64)})), anywhere)


def test_the_openai_client_streams_and_asks_for_several_from_a_real_student(
    folders: dict[str, tuple[Path, Path]], tmp_path: Path, kind: str
) -> None:
    serve = ["-m", "shared.cli", "serve", "--registry", str(registry_of(folders[kind][1], tmp_path)), "--port", "0"]
    with running(serve, tmp_path / "stderr") as server, openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        ready(server)
        asked: Any = {"model": "student", "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 12, "temperature": 0}
        whole = client.chat.completions.create(**asked)
        pieces = [chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(**asked, stream=True)]
        assert "".join(pieces) == whole.choices[0].message.content
        drawn = client.completions.create(model="student", prompt=QUESTION, n=4, temperature=1.5, max_tokens=12)
        assert len({choice.text for choice in drawn.choices}) > 1
        listed = client.models.list().data[0]
        assert listed.id == "student"
        assert listed.model_extra is not None
        assert listed.model_extra["scores"] == {"rougeL": 0.4}
        with pytest.raises(openai.BadRequestError) as refused:
            client.completions.create(model="student", prompt="word1 " * 2000)
        if kind == "decoder-only":
            assert refused.value.code == "context_length_exceeded"


BAD: list[tuple[str, Any, int, str, str]] = [
    ("no question", {}, 422, "question", "required"),
    ("blanks", {"question": " \n"}, 422, "question.0", "no text"),
    ("none of several", {"question": []}, 422, "question", "at least 1"),
    ("10,000 at once", {"question": ["word1"] * 10_000}, 422, "question", "at most 64"),
    ("a number", {"question": 7}, 422, "question", "list of texts"),
    ("an unknown field", {"question": "word1", "logprobs": 1}, 422, "logprobs", "unknown field"),
    ("an unknown model", {"question": "word1", "model": "gpt"}, 404, "model", "'student'"),
    ("no model", {"question": "word1", "model": ""}, 404, "model", "'student'"),
    ("a stream of several", {"question": ["word1", "word2"], "stream": True}, 422, "stream", "one question"),
    ("a beam of samples", {"question": "word1", "beam_size": 4, "temperature": 1}, 422, "beam_size", "temperature 0"),
    ("a wide beam", {"question": "word1", "beam_size": 9}, 422, "beam_size", "less than or equal to 8"),
    ("more tokens than the server gives", {"question": "word1", "max_tokens": 4000}, 422, "max_tokens", "at most 512"),
    ("a long question", {"question": "word1 " * 20}, 400, "question", "truncate"),
    ("a long question among others", {"question": ["word1", "word1 " * 20]}, 400, "question.1", "reads 60"),
]


def test_what_cannot_be_answered_is_refused_with_the_field_and_the_remedy(folders: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    async def steps(client: httpx.AsyncClient) -> None:
        for what, body, status, param, said in BAD:
            answer = await client.post("/v1/generate", json=body)
            assert (answer.status_code, answer.json()["error"]["param"]) == (status, param), (what, answer.text)
            assert said in answer.json()["error"]["message"], (what, answer.text)

    talk(over(folders["decoder-only"][1], tmp_path), steps)


def test_a_question_that_is_too_long_is_cut_where_that_is_asked_for_and_the_header_says_so(
    folders: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    async def steps(client: httpx.AsyncClient) -> None:
        long, many_tokens = "word1 " * 40, " ".join("x" * 29)
        for question, cut in ((QUESTION, None), (long, "1"), ([long, QUESTION, long], "2")):
            answer = await client.post("/v1/generate", json={"question": question, "truncate": True})
            assert answer.status_code == 200, answer.text
            assert answer.headers.get("x-truncated") == cut
        # within the task's characters, and yet more tokens than the model reads beside so long an answer
        asked = {"question": many_tokens, "max_tokens": 100}
        refused = await client.post("/v1/generate", json=asked)
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "context_length_exceeded")
        answer = await client.post("/v1/generate", json=asked | {"truncate": True})
        assert (answer.status_code, answer.headers.get("x-truncated")) == (200, "1")

    talk(over(folders["decoder-only"][1], tmp_path), steps)


def test_a_beam_is_answered_and_streamed_whole(folders: dict[str, tuple[Path, Path]], tmp_path: Path, kind: str) -> None:
    async def steps(client: httpx.AsyncClient) -> None:
        body = {"question": QUESTION, "beam_size": 4, "max_tokens": 10}
        whole = (await client.post("/v1/generate", json=body)).json()["answers"][0]["text"]
        streamed = await client.post("/v1/generate", json=body | {"stream": True})
        pieces = [json.loads(line.removeprefix("data: ")) for line in streamed.text.split("\n\n")[:-2]]
        assert "".join(p["text"] for p in pieces).strip() == whole

    talk(over(folders[kind][1], tmp_path), steps)


def test_the_page_and_health_are_open_and_all_else_wants_the_key(folders: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    keys = Keys({"alice": KeyEntry(sha256=digest(KEY).hex())})
    app = student_app(StudentServiceSettings(registry=registry_of(folders["decoder-only"][1], tmp_path)), keys=keys)

    async def steps(client: httpx.AsyncClient) -> None:
        for path in ("/", "/healthz", "/readyz", "/openapi.json"):
            assert (await client.get(path)).status_code == 200
        for path in ("/v1/student", "/v1/models", "/v1/run", "/report", "/metrics"):
            assert (await client.get(path)).status_code == 401
            assert (await client.get(path, headers={"authorization": "Bearer wrong"})).status_code == 401
        told = {"authorization": f"Bearer {KEY}"}
        assert (await client.get("/report", headers=told)).text == "<!doctype html><title>report</title>"
        state = (await client.get("/v1/student", headers=told)).json()
        assert state["samples"] == [f"word{i} word{i + 1}" for i in range(8)]
        assert (state["report"], state["max_question_characters"]) == (True, 60)
        assert (await client.get("/v1/run", headers=told)).json()["error"]["code"] == "no_run"
        assert (await client.post("/v1/generate", json={"question": "word1"})).status_code == 401
        assert (await client.post("/v1/generate", json={"question": "word1"}, headers=told)).status_code == 200

    talk(app, steps)


def test_metrics_tell_scores_shares_and_requests_by_version(folders: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    registry = registry_of(folders["decoder-only"][1], tmp_path)
    first = json.loads((registry / "current.json").read_text())["version"]
    tried = promote(
        registry,
        folders["encoder-decoder"][1],
        name="next",
        task=TASK.model_dump(),
        scores={"rougeL": 0.5},
        run="r",
        reason="t",
        canary=0.25,
    )

    async def steps(client: httpx.AsyncClient) -> None:
        while (await client.get("/v1/student")).json()["canary"] is None:
            await asyncio.sleep(0.01)
        versions = [(await client.post("/v1/generate", json={"question": "word1"})).json()["version"] for _ in range(20)]
        assert versions.count(tried.version) == 5
        assert versions.count(first) == 15
        state = (await client.get("/v1/student")).json()
        assert (state["version"], state["canary"]) == (first, {"version": tried.version, "share": 0.25, "scores": {"rougeL": 0.5}})
        lines = (await client.get("/metrics")).text.splitlines()
        for line in (
            f'distill_student_info{{name="tiny",role="served",version="{first}"}} 1.0',
            f'distill_student_info{{name="next",role="canary",version="{tried.version}"}} 1.0',
            f'distill_student_share{{version="{first}"}} 0.75',
            f'distill_student_score{{metric="rougeL",version="{tried.version}"}} 0.5',
            f'distill_student_requests_total{{status="200",version="{tried.version}"}} 5.0',
        ):
            assert line in lines

    talk(student_app(StudentServiceSettings(registry=registry)), steps)


class Chatty(ScriptedEngine):
    """Keeps what it is asked; streams word by word."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[GenerationRequest] = []

    async def generate(self, request: GenerationRequest) -> list[Completion]:
        self.asked.append(request)
        return [Completion(text="<b>bold</b> words", finish_reason="stop")]

    async def stream(self, request: GenerationRequest) -> AsyncIterator[Piece]:
        self.asked.append(request)
        yield Piece(0, "<b>bold</b> ")
        yield Piece(0, "words", "stop")


def test_whoever_stands_beside_the_student_is_asked_by_name_with_the_students_task() -> None:
    student, base, teacher = Chatty(), Chatty(), Chatty()
    served = Served(Loaded(Student(Path(), "v", TASK), student, "encoder-decoder"))
    app = app_over(served, public_name="mine", beside={"base": (base, False), "teacher": (teacher, True)})

    async def steps(client: httpx.AsyncClient) -> None:
        assert (await client.get("/v1/student")).json()["models"] == ["mine", "base", "teacher"]
        assert [m["id"] for m in (await client.get("/v1/models")).json()["data"]] == ["mine", "base", "teacher"]
        for name in ("base", "teacher"):
            answer = await client.post("/v1/generate", json={"question": QUESTION, "model": name, "stream": True})
            first = json.loads(answer.text.partition("\n\n")[0].removeprefix("data: "))
            assert (first["model"], first["version"]) == (name, None)
            assert "x-student-version" not in answer.headers
            chat = {"model": name, "messages": [{"role": "user", "content": "word1"}]}
            assert (await client.post("/v1/chat/completions", json=chat)).json()["choices"][0]["message"]["content"] == "<b>bold</b> words"

    talk(app, steps)
    assert student.asked == []
    assert base.asked[0].prompt == zero_shot(TASK, QUESTION)
    assert teacher.asked[0].messages is not None
    assert teacher.asked[0].messages[0].content == zero_shot(TASK, QUESTION)


def test_a_base_that_is_not_there_fails_its_own_requests_alone(folders: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    async def steps(client: httpx.AsyncClient) -> None:
        answer = await client.post("/v1/generate", json={"question": "word1", "model": "base"})
        assert answer.status_code == 500
        assert str(tmp_path) not in answer.text
        assert (await client.post("/v1/generate", json={"question": "word1"})).status_code == 200

    talk(over(folders["decoder-only"][1], tmp_path, base=str(tmp_path / "absent")), steps)


def test_a_base_is_loaded_when_it_is_asked_and_answers_as_its_kind_reads(
    folders: dict[str, tuple[Path, Path]], tmp_path: Path, kind: str
) -> None:
    async def steps(client: httpx.AsyncClient) -> None:
        for stream in (False, True):
            answer = await client.post("/v1/generate", json={"question": "word1", "model": "base", "stream": stream})
            assert answer.status_code == 200
        mine = (await client.post("/v1/generate", json={"question": "word1"})).json()["answers"]
        base = (await client.post("/v1/generate", json={"question": "word1", "model": "base"})).json()["answers"]
        assert mine == base  # it is the same folder, worded the same

    talk(over(folders[kind][1], tmp_path, base=str(folders[kind][1])), steps)


def test_a_teacher_that_is_not_there_is_no_reason_for_a_balancer_to_set_this_server_aside(
    folders: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    async def steps(client: httpx.AsyncClient) -> None:
        for path, asks in (
            ("/v1/generate", {"question": "word1"}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
        ):
            for stream in (False, True):
                answer = await client.post(path, json={**asks, "model": "teacher", "stream": stream})
                assert answer.status_code == 502, answer.text
        assert (await client.post("/v1/generate", json={"question": "word1"})).status_code == 200

    talk(over(folders["encoder-decoder"][1], tmp_path, teacher_url="http://127.0.0.1:1/v1"), steps)


def test_a_recipe_names_who_is_shown_beside_its_student(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTILL_TEACHER__URL", "http://127.0.0.1:9/v1")
    monkeypatch.setenv("DISTILL_TEACHER__MODEL", "big")
    flags = beside(load_settings(Recipe, flags={}, yaml_file=Path("recipes/offline-demo.yaml")))
    settings = load_settings(StudentServiceSettings, flags={**flags, "model_dir": "x"})
    assert (settings.base, settings.base_quantization) == ("embedded:smollm2-135m", "int8")
    assert (settings.teacher_url, settings.teacher_model) == ("http://127.0.0.1:9/v1", "big")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--host", "0.0.0.0"], "--no-auth"),
        (["--threads", "two"], "--threads: "),
        (["--device", "tpu"], "--device: "),
        (["--device-index", "a"], "--device-index: "),
        (["--max-queue", "0"], "--max-queue: "),
        (["--registry", "r"], "exactly one"),
    ],
)
def test_a_wrong_setting_is_named_before_anything_is_loaded(tmp_path: Path, options: list[str], said: str) -> None:
    command = [sys.executable, "-m", "shared.cli", "serve", "--model-dir", str(tmp_path), "--port", "0", *options]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert run.returncode == 2
    assert said in run.stderr
    assert "Traceback" not in run.stderr


def test_as_many_questions_as_may_be_asked_at_once_may_all_be_as_long_as_the_task_allows() -> None:
    engine = Chatty()
    served = Served(Loaded(Student(Path(), "v", TaskSettings()), engine, "decoder-only"))
    app = app_over(served, public_name="student", bounds=StudentServiceSettings(model_dir=Path("x")).bounds)

    async def steps(client: httpx.AsyncClient) -> None:
        answer = await client.post("/v1/generate", json={"question": ["x" * 900] * 64})
        assert (answer.status_code, len(answer.json()["answers"])) == (200, 64)
        assert (await client.post("/v1/completions", json={"model": "student", "prompt": "x" * 20_001})).status_code == 400
        assert (await client.post("/v1/completions", json={"model": "", "prompt": "x"})).status_code == 404

    talk(app, steps)


def test_a_base_is_loaded_once_however_many_leave_while_it_loads() -> None:
    loads: list[int] = []
    left = threading.Event()

    def slowly() -> Any:
        loads.append(1)
        assert left.wait(60)
        return Chatty(), True

    async def run() -> None:
        base = Base(slowly)
        for _ in range(3):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(base.generate(GenerationRequest(prompt="word1")), 0.01)
        left.set()
        assert (await base.generate(GenerationRequest(prompt="word1")))[0].text == "<b>bold</b> words"
        assert len(loads) == 1
        await base.aclose()

    asyncio.run(run())


def test_a_base_that_failed_to_load_is_tried_again() -> None:
    outcomes: list[Any] = [EngineError("not there yet"), (Chatty(), True)]

    def load() -> Any:
        outcome = outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    async def run() -> None:
        base = Base(load)
        with pytest.raises(EngineError):
            await base.generate(GenerationRequest(prompt="word1"))
        assert await base.generate(GenerationRequest(prompt="word1"))

    asyncio.run(run())


def test_the_recipes_key_is_for_the_recipes_teacher_alone_and_variables_go_before_the_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"base": "b", "base_quantization": "int8", "teacher_url": "u", "teacher_model": "m", "teacher_key_file": "k"}
    assert _unless_given(found, {}) == found
    assert _unless_given(found, {"teacher_url": "http://other/v1"}) == {"base": "b", "base_quantization": "int8"}
    monkeypatch.setenv("STUDENT_BASE", "mine")
    assert set(_unless_given(found, {})) == {"teacher_url", "teacher_model", "teacher_key_file"}


def test_a_chat_that_the_models_template_refuses_is_the_callers_mistake(folders: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders["decoder-only"][1], tmp_path / "strict"))
    config = json.loads((folder / "serving.json").read_text())
    refuse = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
    (folder / "serving.json").write_text(json.dumps(config | {"chat_template": refuse + config["chat_template"]}))

    async def steps(client: httpx.AsyncClient) -> None:
        turns = [{"role": "system", "content": "word1"}, {"role": "user", "content": "word1"}]
        refused = await client.post("/v1/chat/completions", json={"model": "student", "messages": turns, "max_tokens": 8})
        assert (refused.status_code, "roles" in refused.json()["error"]["message"]) == (400, True)
        assert (
            await client.post("/v1/chat/completions", json={"model": "student", "messages": turns[1:], "max_tokens": 8})
        ).status_code == 200

    talk(over(folder, tmp_path), steps)
