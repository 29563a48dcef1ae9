"""Both services as commands: what they print, how they end, what they refuse; and the student's own route."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from awake import awake
from tiny_servable import servable_llama

from shared.contracts import Completion, GenerationRequest, Message, Sampling
from shared.engines.convert import convert
from shared.engines.scripted import ScriptedEngine
from shared.errors import EngineError, RequestRefused, SettingsError
from shared.http.serve import DRAIN_S
from shared.prompts import zero_shot
from shared.registry import promote
from shared.settings import TaskSettings, load_settings
from student_trainer.serving.app import Student, generating_app
from student_trainer.serving.generate import DECODING
from student_trainer.serving.settings import StudentServiceSettings
from teacher_service.app import engine_of
from teacher_service.settings import TeacherServiceSettings

Start = Callable[..., "tuple[subprocess.Popen[str], str]"]


@pytest.fixture
def start() -> Iterator[Start]:
    """Start `distill` with the given options, wait until it listens or ends, give that line; ends what a test leaves running."""
    running: list[subprocess.Popen[str]] = []

    def begin(*options: str, **variables: str) -> tuple[subprocess.Popen[str], str]:
        command = [sys.executable, "-m", "shared.cli", *options]
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env={**os.environ, **variables})
        running.append(process)
        assert process.stdout is not None
        return process, next((line.strip() for line in process.stdout if "listening on" in line), "")

    yield begin
    for process in running:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def serving_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("student")
    return convert(str(servable_llama(root / "hf")), root / "serving", name="tiny", quantization="float32")


def url_of(line: str) -> str:
    return line.rpartition(" ")[2]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_service_tells_where_it_listens_answers_and_ends_with_0_when_told_to(start: Start, number: signal.Signals) -> None:
    process, line = start("teacher", "--no-auth", "--engine", "scripted", "--port", "0")
    assert line.startswith("teacher (scripted): listening on http://127.0.0.1:")
    base = url_of(line).removesuffix("/v1")
    assert httpx.get(f"{base}/readyz", trust_env=False).status_code == 200
    process.send_signal(number)
    said, complained = process.communicate(timeout=20)
    assert (said, process.returncode) == ("", 0)
    assert complained == "teacher (scripted): --no-auth: whoever reaches 127.0.0.1 may ask, without a key\n"


def test_a_request_in_flight_is_finished_before_a_service_ends(start: Start) -> None:
    process, line = start("teacher", "--no-auth", "--engine", "scripted", "--port", "0", TEACHER_DELAY_S="1.5")
    body = {"model": "teacher", "prompt": "Is migraine hereditary?"}

    async def ask_and_stop() -> httpx.Response:
        async with httpx.AsyncClient(trust_env=False, timeout=60) as client:
            asked = asyncio.create_task(client.post(f"{url_of(line)}/completions", json=body))
            await asyncio.sleep(0.7)
            process.send_signal(signal.SIGTERM)
            return await asked

    assert asyncio.run(ask_and_stop()).status_code == 200
    assert process.wait(20) == 0


def test_a_request_that_takes_longer_does_not_keep_a_service_from_ending_before_a_container_engine_kills_it(start: Start) -> None:
    process, line = start("teacher", "--no-auth", "--engine", "scripted", "--port", "0", TEACHER_DELAY_S="60")
    body = {"model": "teacher", "prompt": "Is migraine hereditary?"}

    async def ask_and_stop() -> tuple[httpx.Response, float]:
        async with httpx.AsyncClient(trust_env=False, timeout=60) as client:
            asked = asyncio.create_task(client.post(f"{url_of(line)}/completions", json=body))
            await asyncio.sleep(0.7)
            process.send_signal(signal.SIGTERM)
            begun = time.monotonic()
            with awake() as seconds:
                await asyncio.to_thread(process.wait, 90)
                assert seconds() < 10
            return await asked, time.monotonic() - begun

    answer, took = asyncio.run(ask_and_stop())
    assert process.returncode == 0
    assert took >= DRAIN_S
    assert answer.status_code == 503
    assert answer.json()["error"]["message"] == "the model is not available now; try again"
    assert "Traceback" not in process.communicate()[1]


ONLY_THREADS_END = """
import asyncio, sys, time
from contextlib import asynccontextmanager
from shared.engines.scripted import ScriptedEngine
from shared.http import serve
from shared.http.app import create_app

def work():
    print("at work", flush=True)
    time.sleep(30)

class Batch(ScriptedEngine):
    async def aclose(self):
        await asyncio.to_thread(work)

@asynccontextmanager
async def load():
    task = asyncio.create_task(asyncio.to_thread(work))
    yield
    task.cancel()

serve.DRAIN_S = 1
what = {"engine": Batch()} if sys.argv[1] == "batch" else {"engine": ScriptedEngine(), "beside": load}
sys.exit(serve.serve(create_app(**what, model="m", title="T"), host="127.0.0.1", port=0, name="test"))
"""
"""A server whose engine, at its end, waits for a long batch; or one that is loading a student, which a thread does."""


@pytest.mark.parametrize("what", ["batch", "load"])
def test_work_that_cannot_be_interrupted_does_not_keep_a_service_from_ending(what: str) -> None:
    with subprocess.Popen([sys.executable, "-c", ONLY_THREADS_END, what], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            assert any("listening on" in line for line in process.stdout)
            process.send_signal(signal.SIGTERM)
            begun = time.monotonic()
            with awake() as seconds:
                assert process.wait(60) == 0
                assert seconds() < 5
            assert time.monotonic() - begun >= 1
        finally:
            process.kill()


def test_a_service_can_end_with_the_process_that_started_it(start: Start) -> None:
    process, _ = start("teacher", "--no-auth", "--engine", "scripted", "--port", "0", "--until-stdin-closes")
    assert process.poll() is None
    process.communicate(timeout=20)  # closes its standard input
    assert process.returncode == 0


def test_a_taken_port_is_named_with_the_remedy(start: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
        process, line = start("teacher", "--no-auth", "--engine", "scripted", "--port", port)
        _, said = process.communicate(timeout=20)
    assert line == ""
    assert process.returncode == 2
    assert f"--port {port}" in said
    assert "Traceback" not in said


def test_the_student_is_served_by_its_folder_or_by_the_registry(start: Start, serving_folder: Path, tmp_path: Path) -> None:
    promoted = promote(
        tmp_path / "registry", serving_folder, name="tiny", task=TaskSettings(shots=0).model_dump(), scores={}, run="r", reason="a test"
    )
    for options, version in (
        (["--model-dir", str(serving_folder)], "unpromoted"),
        (["--registry", str(tmp_path / "registry")], promoted.version),
    ):
        process, line = start("serve", *options, "--port", "0")
        assert line.startswith("student: listening on http://127.0.0.1:"), process.communicate()
        if "--registry" in options:
            assert process.stdout is not None
            assert any(line.startswith(f"student: serving version {version}") for line in process.stdout)
        answer = httpx.post(f"{url_of(line)}/generate", json={"question": "word1 word2"}, trust_env=False).json()
        assert (answer["model"], answer["version"], len(answer["answers"])) == ("student", version, 1)
        process.terminate()
        assert process.wait(20) == 0


def test_a_folder_that_is_no_student_ends_the_command_at_once(start: Start, tmp_path: Path) -> None:
    process, line = start("serve", "--model-dir", str(tmp_path), "--port", "0")
    _, said = process.communicate(timeout=20)
    assert (line, process.returncode) == ("", EngineError.exit_code)
    assert "distill export" in said
    assert "Traceback" not in said


class Echo(ScriptedEngine):
    """Answers with the prompt; keeps requests; refuses the word `refuse`."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[GenerationRequest] = []

    async def generate(self, request: GenerationRequest) -> list[Completion]:
        self.asked.append(request)
        text = request.messages[-1].content if request.messages else request.prompt or ""
        if "refuse" in text:
            raise RequestRefused("refused")
        return [Completion(text=f" {text} ", finish_reason="stop")]


def generate(body: Any, *, kind: Any = "decoder-only") -> tuple[httpx.Response, list[GenerationRequest]]:
    async def run() -> tuple[httpx.Response, list[GenerationRequest]]:
        engine = Echo()
        app = generating_app(engine, Student(Path(), "v7", TaskSettings(instruction="Ask:")), kind=kind, public_name="student")
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client,
        ):
            return await client.post("/v1/generate", json=body), engine.asked

    return asyncio.run(run())


@pytest.mark.parametrize("kind", ["decoder-only", "encoder-decoder"])
def test_a_question_is_worded_by_the_students_own_task_and_decoded_greedily(kind: str) -> None:
    answer, asked = generate({"question": "My  head hurts"}, kind=kind)
    prompt = zero_shot(TaskSettings(instruction="Ask:"), "My  head hurts")
    assert answer.json() == {"model": "student", "version": "v7", "answers": [{"text": prompt, "finish_reason": "stop"}]}
    worded: dict[str, Any] = {"prompt": prompt} if kind == "encoder-decoder" else {"messages": (Message(role="user", content=prompt),)}
    assert asked == [GenerationRequest(sampling=DECODING, **worded)]
    assert Sampling(temperature=0).temperature == DECODING.temperature


def test_several_questions_are_answered_in_their_order() -> None:
    answer, _ = generate({"question": ["one", "two", "three"]})
    assert [a["text"].split()[-1] for a in answer.json()["answers"]] == ["one", "two", "three"]


@pytest.mark.parametrize(
    "body", [{}, {"question": ""}, {"question": " \n"}, {"question": []}, {"question": [""]}, {"question": 1}, {"question": "a", "n": 2}]
)
def test_what_is_no_question_is_refused_in_the_error_shape(body: Any) -> None:
    answer, asked = generate(body)
    assert answer.status_code == 422
    assert answer.json()["error"]["param"]
    assert asked == []


def test_one_refused_question_refuses_the_request_in_the_error_shape() -> None:
    answer, _ = generate({"question": ["one", "refuse"]})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == "refused"


def test_settings_name_what_is_missing_and_misspelt(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingsError, match=r"^engine upstream needs --upstream-url"):
        load_settings(TeacherServiceSettings, flags={"engine": "upstream"})
    with pytest.raises(SettingsError, match=r"^give exactly one of --registry DIR and --model-dir DIR"):
        load_settings(StudentServiceSettings, flags={})
    with pytest.raises(SettingsError, match=r"^--port: .*got 'http'"):
        load_settings(TeacherServiceSettings, flags={"port": "http"})
    monkeypatch.setenv("TEACHER_ENGIN", "local")
    with pytest.raises(SettingsError, match="TEACHER_ENGINE"):
        load_settings(TeacherServiceSettings, flags={})


def test_an_empty_variable_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("REGISTRY", "PORT", "PUBLIC_NAME"):
        monkeypatch.setenv(f"STUDENT_{name}", "")
    monkeypatch.setenv("STUDENT_MODEL_DIR", "model")
    assert load_settings(StudentServiceSettings, flags={}) == StudentServiceSettings(model_dir=Path("model"))


def test_a_missing_key_file_is_named(tmp_path: Path) -> None:
    settings = TeacherServiceSettings(
        engine="upstream", upstream_url="http://127.0.0.1:1/v1", upstream_model="m", upstream_key_file=tmp_path / "absent"
    )
    with pytest.raises(SettingsError, match="absent"):
        engine_of(settings)
