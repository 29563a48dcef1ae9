"""The student's server that is up before anything is promoted: it waits, follows the registry, and shows a page."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import httpx
import pytest
from tiny_servable import servable_llama

from shared.contracts import Completion, GenerationRequest
from shared.engines.convert import convert
from shared.engines.scripted import ScriptedEngine
from shared.errors import EngineError, RunMismatch, TeacherUnavailable
from shared.http.problems import NotReady
from shared.registry import Promoted, promote, record_refusal, rollback
from shared.settings import TaskSettings
from student_trainer.serving import follow
from student_trainer.serving.app import app_over, generating_app, student_app
from student_trainer.serving.follow import LOOK_S, Follower, Loaded, Served, Student
from student_trainer.serving.load import Loader as StudentLoader
from student_trainer.serving.metrics import StudentMeters
from student_trainer.serving.settings import StudentServiceSettings

T = TypeVar("T")
ASKED = GenerationRequest(prompt="word1 word2")
NOTHING = {
    "reason": None,
    "version": None,
    "name": None,
    "scores": {},
    "promoted_at": None,
    "max_question_characters": None,
    "models": ["student"],
    "samples": [],
    "report": False,
    "run": False,
    "canary": None,
}
"""What GET /v1/student tells where there is nothing to tell."""
ROUTES = {
    "/v1/chat/completions": {"model": "student", "messages": [{"role": "user", "content": "word1"}], "max_tokens": 8},
    "/v1/completions": {"model": "student", "prompt": "word1"},
    "/v1/generate": {"question": "word1"},
}


@pytest.fixture
def registry(tmp_path: Path) -> Path:
    """Where nothing is yet, not even a folder."""
    return tmp_path / "run" / "registry"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("student")
    return convert(str(servable_llama(root / "hf")), root / "serving", name="tiny", quantization="float32")


def promoted(registry: Path, folder: Path, *, name: str) -> Promoted:
    """The folder promoted under a recipe's name; another name is another version."""
    scores = {"rouge1": 0.5, "rougeL": 0.4125}
    return promote(registry, folder, name=name, task=TaskSettings(shots=0).model_dump(), scores=scores, run="r", reason="a test")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What passes for a serving folder where nobody loads it."""
    made = tmp_path / "serving"
    made.mkdir()
    for file in ("serving.json", "model.bin", "tokenizer.json"):
        (made / file).write_text("{}")
    return made


class Gate:
    """An engine that answers with its version once it is let to; closing it refuses those that wait, as `LocalEngine` does."""

    def __init__(self, version: str) -> None:
        self.version, self.open, self.closed = version, asyncio.Event(), False

    async def generate(self, request: GenerationRequest) -> list[Completion]:
        await self.open.wait()
        if self.closed:
            raise TeacherUnavailable("shutting down")
        return [Completion(text=self.version, finish_reason="stop")]

    async def check(self) -> None:
        pass

    async def aclose(self) -> None:
        self.closed = True
        self.open.set()


class Loader:
    """Loads gates; keeps them; fails for the recipes named in `bad`."""

    def __init__(self, *, opened: bool = True, bad: tuple[str, ...] = ()) -> None:
        self.engines: dict[str, Gate] = {}
        self.opened, self.bad, self.loads = opened, bad, 0

    def __call__(self, student: Student) -> Loaded:
        self.loads += 1
        if student.name in self.bad:
            raise EngineError("no such layer")
        engine = self.engines[student.name] = Gate(student.version)
        if self.opened:
            engine.open.set()
        return Loaded(student, engine, "encoder-decoder")


async def answer(served: Served) -> str:
    return (await served.generate(ASKED))[0].text


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not true():
            await asyncio.sleep(0.01)


def talk(registry: Path, steps: Callable[[httpx.AsyncClient], Awaitable[T]]) -> T:
    """`steps` against the real application over a registry, once it has looked there."""

    async def run() -> T:
        app = student_app(StudentServiceSettings(registry=registry))
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client,
        ):
            async with asyncio.timeout(20):
                while (await client.get("/v1/student")).json()["reason"] == "starting":
                    await asyncio.sleep(0.01)
            return await steps(client)

    return asyncio.run(run())


class Server:
    """`distill serve --registry` as a process of its own."""

    def __init__(self, registry: Path) -> None:
        command = [sys.executable, "-m", "shared.cli", "serve", "--registry", str(registry), "--port", "0"]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env={**os.environ, "STUDENT_HOST": ""})
        assert self.process.stdout is not None
        self.told = next(line.strip() for line in self.process.stdout if "listening on" in line)
        self.client = httpx.Client(base_url=self.told.rpartition(" ")[2].removesuffix("/v1"), trust_env=False, timeout=20)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *error: object) -> None:
        self.client.close()
        self.process.kill()
        self.process.communicate()

    def wait_for(self, version: str) -> None:
        until = time.monotonic() + 20
        while self.client.get("/v1/student").json()["version"] != version:
            assert time.monotonic() < until, "nobody took up the promotion"
            time.sleep(0.05)

    def end(self) -> tuple[str, str]:
        self.process.send_signal(signal.SIGTERM)
        return self.process.communicate(timeout=20)


def test_a_server_that_is_up_first_serves_what_is_promoted_then_replaced_then_rolled_back_and_fails_no_request(
    registry: Path, tiny: Path
) -> None:
    with Server(registry) as server:
        assert server.told.startswith("student: listening on http://127.0.0.1:")
        assert server.client.get("/readyz").status_code == 503
        first = promoted(registry, tiny, name="first")
        server.wait_for(first.version)
        assert server.client.get("/readyz").status_code == 200
        stop = threading.Event()

        def keep_asking() -> list[tuple[int, str]]:
            seen = []
            while not stop.is_set():
                reply = server.client.post("/v1/generate", json={"question": "word1 word2"})
                seen.append((reply.status_code, reply.json().get("version", reply.text)))
            return seen

        with ThreadPoolExecutor(4) as pool:
            asking = [pool.submit(keep_asking) for _ in range(4)]
            try:
                second = promoted(registry, tiny, name="second")
                server.wait_for(second.version)
                rollback(registry)
                server.wait_for(first.version)
            finally:
                stop.set()
        replies = [reply for asked in asking for reply in asked.result()]
        assert set(replies) == {(200, first.version), (200, second.version)}
        out, err = server.end()
    assert server.process.returncode == 0
    assert err == f"student: no student is promoted yet; waiting for a promotion in {registry}\n"
    score = "(rouge1 0.500, rougeL 0.412)"
    lines = [f"student: serving version {p.version} of {p.name} {score}" for p in (first, second, first)]
    assert [line for line in out.splitlines() if "serving" in line] == lines


def test_until_something_is_promoted_every_generating_route_says_what_it_waits_for_and_no_model_is_listed(registry: Path) -> None:
    async def steps(client: httpx.AsyncClient) -> None:
        reason = "no student is promoted yet"
        assert (await client.get("/healthz")).status_code == 200
        ready = await client.get("/readyz")
        assert (ready.status_code, ready.json()) == (503, {"status": "not ready", "reason": reason})
        assert (await client.get("/v1/models")).json()["data"] == []
        for path, body in ROUTES.items():
            refused = await client.post(path, json=body)
            assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
            assert refused.json() == {"error": {"message": reason, "type": "server_error", "param": None, "code": None}}
        state = (await client.get("/v1/student")).json()
        assert state == {**NOTHING, "ready": False, "reason": reason}

    talk(registry, steps)


def test_a_directory_that_will_never_be_a_registry_is_refused_at_once(registry: Path) -> None:
    registry.mkdir(parents=True)
    (registry / "run.json").write_text("{}")
    with pytest.raises(RunMismatch, match="run directory"):
        student_app(StudentServiceSettings(registry=registry))


def test_what_was_promoted_before_the_start_is_served_as_soon_as_it_is_loaded(registry: Path, tiny: Path) -> None:
    version = promoted(registry, tiny, name="early")

    async def steps(client: httpx.AsyncClient) -> None:
        async with asyncio.timeout(20):
            while (await client.get("/readyz")).status_code != 200:
                await asyncio.sleep(0.01)
        for path, body in ROUTES.items():
            assert (await client.post(path, json=body)).status_code == 200
        assert [m["id"] for m in (await client.get("/v1/models")).json()["data"]] == ["student"]
        assert (await client.get("/v1/student")).json() == {
            **NOTHING,
            "ready": True,
            "max_question_characters": 900,
            "version": version.version,
            "name": "early",
            "scores": {"rouge1": 0.5, "rougeL": 0.4125},
            "promoted_at": version.promoted_at,
        }

    talk(registry, steps)


def test_a_student_out_of_a_plain_folder_has_no_name_and_no_scores() -> None:
    app = generating_app(ScriptedEngine(), Student(Path(), "unpromoted", TaskSettings()), kind="decoder-only", public_name="student")

    async def state() -> Any:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
            return (await client.get("/v1/student")).json()

    told = asyncio.run(state())
    assert told == {**NOTHING, "ready": True, "version": "unpromoted", "max_question_characters": 900}


def test_a_promotion_that_was_refused_is_told_with_its_reason(registry: Path) -> None:
    record_refusal(registry, reason="the gain of 0.001 is below 0.01", run="r", scores={})
    said = talk(registry, lambda client: client.get("/readyz")).json()["reason"]
    assert said == "no student is promoted yet (the last one was refused: the gain of 0.001 is below 0.01)"


@pytest.mark.parametrize("how", ["damaged later", "not loadable"])
def test_a_version_that_cannot_be_served_has_one_line_in_the_log_and_callers_are_told_nothing_of_what_is_inside(
    registry: Path, tiny: Path, folder: Path, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    bad = promoted(registry, tiny if how == "damaged later" else folder, name="bad")
    if how == "damaged later":
        (registry / bad.folder / "model.bin").write_bytes(b"other")

    async def steps(client: httpx.AsyncClient) -> None:
        reason = f"promoted version {bad.version} cannot be served; the log tells why"
        async with asyncio.timeout(60):
            while (await client.get("/readyz")).json()["reason"] != reason:
                await asyncio.sleep(0.01)
        await asyncio.sleep(2.5 * LOOK_S)
        assert (await client.get("/readyz")).json()["reason"] == reason
        assert (await client.get("/v1/student")).json()["reason"] == reason
        for path, body in ROUTES.items():
            assert (await client.post(path, json=body)).json()["error"]["message"] == reason

    talk(registry, steps)
    (line,) = caplog.messages
    error = "DataError" if how == "damaged later" else "EngineError"
    assert line.startswith(f"student: promoted version {bad.version} cannot be served: {error}: {registry}")


def test_what_cannot_be_served_leaves_the_one_before_in_place_and_the_next_is_served(
    registry: Path, folder: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    async def run() -> None:
        served, loader = Served(), Loader(bad=("bad",))
        follower = Follower(registry, served, load=loader)
        good = promoted(registry, folder, name="good")
        await follower.look()
        bad = promoted(registry, folder, name="bad")
        for _ in range(3):
            await follower.look()
        assert await answer(served) == good.version
        reason = f"promoted version {bad.version} cannot be served"
        assert served.reason == f"{reason}; the log tells why"
        assert caplog.messages == [f"student: {reason}: EngineError: no such layer; version {good.version} stays served"]
        assert loader.loads == 2
        assert not loader.engines["good"].closed
        better = promoted(registry, folder, name="better")
        await follower.look()
        assert await answer(served) == better.version
        assert served.reason is None
        (registry / "current.json").write_text("{")
        for _ in range(2):
            await follower.look()
        assert await answer(served) == better.version
        assert served.reason == "what is promoted cannot be told; the log tells why"
        assert len(caplog.messages) == 2
        assert "current.json" in caplog.messages[1]
        assert len(capsys.readouterr().out.splitlines()) == 2

    asyncio.run(run())


def test_what_could_not_be_served_is_tried_again_later_with_one_line_for_each_distinct_error(
    registry: Path, folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(follow, "time", SimpleNamespace(monotonic=lambda: now))
    errors = [OSError(116, "Stale file handle"), OSError(116, "Stale file handle"), MemoryError()]

    class Recovering(Loader):
        def __call__(self, student: Student) -> Loaded:
            if errors:
                raise errors.pop(0)
            return super().__call__(student)

    async def run() -> None:
        nonlocal now
        served = Served()
        follower = Follower(registry, served, load=Recovering(), retry_s=5)
        version = promoted(registry, folder, name="one")
        for left in (2, 1, 0):
            for _ in range(2):  # the second comes too early
                await follower.look()
                assert len(errors) == left
                assert served.loaded is None
                now += 4
        await follower.look()
        assert await answer(served) == version.version
        assert served.reason is None
        said = f"student: promoted version {version.version} cannot be served"
        assert caplog.messages == [f"{said}: OSError: [Errno 116] Stale file handle", f"{said}: MemoryError: "]

    asyncio.run(run())


def test_a_pointer_that_could_not_be_read_for_a_while_loads_nothing_again(registry: Path, folder: Path) -> None:
    async def run() -> None:
        served, loader = Served(), Loader()
        follower = Follower(registry, served, load=loader)
        promoted(registry, folder, name="one")
        await follower.look()
        pointer = registry / "current.json"
        content = pointer.read_bytes()
        pointer.write_text("{")
        await follower.look()
        assert served.reason is not None
        pointer.write_bytes(content)
        await follower.look()
        assert served.reason is None
        assert loader.loads == 1

    asyncio.run(run())


def test_an_engine_that_fails_to_close_does_not_end_the_following(registry: Path, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Unclosable(Gate):
        async def aclose(self) -> None:
            raise RuntimeError("a worker failed")

    async def run() -> None:
        served = Served()

        def seated(name: str) -> bool:
            return served.loaded is not None and served.loaded.student.name == name

        follower = Follower(registry, served, load=lambda student: Loaded(student, Unclosable(student.version), "encoder-decoder"))
        async with follower.following():
            for name in ("one", "two", "three"):
                promoted(registry, folder, name=name)
                await until(lambda name=name: seated(name))  # type: ignore[misc]
        assert "a worker failed" in caplog.text

    asyncio.run(run())


def test_while_the_first_student_is_loaded_the_server_lives_and_says_so(registry: Path, folder: Path) -> None:
    go = threading.Event()

    class SlowToLoad(Loader):
        def __call__(self, student: Student) -> Loaded:
            assert go.wait(20)
            return super().__call__(student)

    async def run() -> None:
        served = Served()
        version = promoted(registry, folder, name="one")
        app = app_over(served, public_name="student", following=Follower(registry, served, load=SlowToLoad()).following)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client,
        ):
            reason = f"loading promoted version {version.version}"
            await until(lambda: served.reason == reason)
            assert (await client.get("/healthz")).status_code == 200
            ready = await client.get("/readyz")
            assert (ready.status_code, ready.json()["reason"]) == (503, reason)
            go.set()
            await until(lambda: served.loaded is not None)
            assert (await client.get("/readyz")).status_code == 200

    asyncio.run(asyncio.wait_for(run(), 20))


def test_what_is_rolled_back_while_it_is_loaded_is_never_served(registry: Path, folder: Path) -> None:
    go = threading.Event()

    class SlowToLoad(Loader):
        def __call__(self, student: Student) -> Loaded:
            assert student.name == "good" or go.wait(20)
            return super().__call__(student)

    async def run() -> None:
        served, loader = Served(), SlowToLoad()
        follower = Follower(registry, served, load=loader)
        good = promoted(registry, folder, name="good")
        await follower.look()
        bad = promoted(registry, folder, name="bad")
        looking = asyncio.create_task(follower.look())
        await until(lambda: served.reason == f"loading promoted version {bad.version}")
        rollback(registry)
        go.set()
        await looking
        assert served.loaded is not None
        assert served.loaded.student.version == good.version
        assert loader.engines["bad"].closed
        await follower.look()
        assert served.reason is None
        assert loader.loads == 2

    asyncio.run(asyncio.wait_for(run(), 20))


def test_the_pointer_that_stays_loads_nothing_again(registry: Path, folder: Path) -> None:
    async def run() -> None:
        loader = Loader()
        follower = Follower(registry, Served(), load=loader)
        promoted(registry, folder, name="one")
        for _ in range(3):
            await follower.look()
        assert loader.loads == 1

    asyncio.run(run())


def test_a_request_in_flight_ends_on_the_student_it_began_with_which_is_closed_only_then(registry: Path, folder: Path) -> None:
    async def run() -> None:
        served, loader = Served(), Loader(opened=False)
        follower = Follower(registry, served, load=loader)
        old = promoted(registry, folder, name="old")
        await follower.look()
        asked = asyncio.create_task(answer(served))
        await asyncio.sleep(0)
        new = promoted(registry, folder, name="new")
        looking = asyncio.create_task(follower.look())
        await until(lambda: served.loaded is not None and served.loaded.student.version == new.version)
        loader.engines["new"].open.set()
        assert await answer(served) == new.version
        assert not loader.engines["old"].closed
        assert not asked.done()
        loader.engines["old"].open.set()
        assert await asked == old.version
        await looking
        await follower.settled()
        assert loader.engines["old"].closed

    asyncio.run(run())


def test_a_request_that_never_ends_holds_a_replaced_student_for_a_bounded_time(registry: Path, folder: Path) -> None:
    async def run() -> None:
        served, loader = Served(retire_s=0.05), Loader(opened=False)
        follower = Follower(registry, served, load=loader)
        promoted(registry, folder, name="old")
        await follower.look()
        asked = asyncio.create_task(answer(served))
        await asyncio.sleep(0)
        promoted(registry, folder, name="new")
        await follower.look()
        await follower.settled()
        assert loader.engines["old"].closed
        with pytest.raises(TeacherUnavailable):
            await asked

    asyncio.run(run())


def test_requests_that_queue_on_a_real_engine_are_answered_by_it_although_it_is_replaced(registry: Path, tiny: Path) -> None:
    async def run() -> None:
        served = Served()
        load = StudentLoader(StudentServiceSettings(registry=registry, max_queue=400), StudentMeters())
        follower = Follower(registry, served, load=load)
        promoted(registry, tiny, name="old")
        await follower.look()
        asked = [asyncio.create_task(served.generate(GenerationRequest(prompt=f"word{i % 50} word2"))) for i in range(400)]
        await asyncio.sleep(0)
        before = served.loaded
        assert before is not None
        assert before.in_flight == 400
        promoted(registry, tiny, name="new")
        await follower.look()
        await follower.settled()
        assert before.in_flight == 0
        assert served.loaded is not before
        assert len(await asyncio.gather(*asked)) == 400
        with pytest.raises(TeacherUnavailable):
            await before.engine.check()
        await served.check()
        await served.aclose()

    asyncio.run(run())


def test_questions_of_one_request_are_answered_by_one_version_which_is_the_one_that_the_answer_names() -> None:
    async def run() -> None:
        old, new = (Loaded(Student(Path(), v, TaskSettings()), Gate(v), "encoder-decoder") for v in ("old", "new"))
        served = Served(old)
        transport = httpx.ASGITransport(app_over(served, public_name="student"))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            asked = asyncio.create_task(client.post("/v1/generate", json={"question": ["one", "two", "three"]}))
            await until(lambda: old.in_flight == 1)
            (before,) = served.seat(new)
            replacing = asyncio.create_task(served.retire(before))
            assert (await client.get("/v1/student")).json()["version"] == "new"
            old.engine.open.set()
            reply = (await asked).json()
            await replacing
        assert [reply["version"], *(a["text"] for a in reply["answers"])] == ["old"] * 4

    asyncio.run(run())


def test_a_long_load_keeps_nobody_waiting_who_asks_the_student_before(registry: Path, folder: Path) -> None:
    go = threading.Event()

    class SlowToLoad(Loader):
        def __call__(self, student: Student) -> Loaded:
            if student.name == "new":
                assert go.wait(20)
            return super().__call__(student)

    async def run() -> None:
        served = Served()
        follower = Follower(registry, served, load=SlowToLoad())
        old = promoted(registry, folder, name="old")
        await follower.look()
        new = promoted(registry, folder, name="new")
        looking = asyncio.create_task(follower.look())
        await asyncio.sleep(0.1)
        assert await answer(served) == old.version
        go.set()
        await looking
        assert await answer(served) == new.version

    asyncio.run(run())


def test_following_ends_at_once_and_leaves_no_task(registry: Path) -> None:
    async def run() -> None:
        async with Follower(registry, Served(), load=Loader()).following():
            assert len(asyncio.all_tasks()) == 2
        assert len(asyncio.all_tasks()) == 1

    begun = time.monotonic()
    asyncio.run(run())
    assert time.monotonic() - begun < LOOK_S


def test_an_empty_seat_refuses_with_a_time_to_come_back() -> None:
    ask: list[Coroutine[Any, Any, Any]] = [Served().generate(ASKED), Served().check()]
    for asked in ask:
        with pytest.raises(NotReady) as raised:
            asyncio.run(asked)
        assert raised.value.retry_after_s == 5


@pytest.fixture(scope="module")
def page() -> httpx.Response:
    return talk(Path("nothing-is-here"), lambda client: client.get("/"))


def test_the_page_is_there_before_anything_is_served_and_may_speak_with_nobody_but_this_server(page: httpx.Response) -> None:
    assert page.status_code == 200
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    rules = dict(rule.strip().partition(" ")[::2] for rule in page.headers["content-security-policy"].split(";"))
    assert (rules["default-src"], rules["connect-src"]) == ("'none'", "'self'")
    assert not re.search(r"""(src|href)=["']?(https?:)?//|@import|url\(""", page.text)


def test_the_page_puts_foreign_text_in_as_text(page: httpx.Response) -> None:
    assert "textContent" in page.text
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b|new Function", page.text)


@pytest.mark.parametrize("what", ["gone", "two pointers in one"])
def test_a_registry_that_goes_or_says_two_things_leaves_who_is_served(
    registry: Path, folder: Path, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    async def run() -> None:
        served, loader = Served(), Loader()
        follower = Follower(registry, served, load=loader)
        version = promoted(registry, folder, name="one")
        await follower.look()
        pointer = registry / "current.json"
        content = pointer.read_bytes()
        if what == "gone":
            registry.rename(registry.with_name("away"))
        else:
            pointer.write_bytes(content * 2)
        for _ in range(3):
            await follower.look()
        assert await answer(served) == version.version
        assert served.reason is not None
        (line,) = caplog.messages
        assert line.endswith(f"version {version.version} stays served")
        if what == "gone":
            registry.with_name("away").rename(registry)
        else:
            pointer.write_bytes(content)
        await follower.look()
        assert (served.reason, loader.loads) == (None, 1)

    asyncio.run(run())


def tried(registry: Path, folder: Path, *, name: str, share: float = 0.25) -> Promoted:
    task = TaskSettings(shots=0).model_dump()
    return promote(registry, folder, name=name, task=task, scores={"rougeL": 0.6}, run="r", reason="a test", canary=share)


def test_a_canary_gets_its_share_and_is_not_loaded_again_when_it_is_promoted(registry: Path, folder: Path) -> None:
    async def run() -> None:
        served, loader, changes = Served(), Loader(), []
        follower = Follower(
            registry,
            served,
            load=loader,
            changed=lambda s: changes.append((s.loaded and s.loaded.student.name, s.tried and s.tried.student.name)),
        )
        old = promoted(registry, folder, name="old")
        await follower.look()
        new = tried(registry, folder, name="new")
        await follower.look()
        answers = [await answer(served) for _ in range(40)]
        assert (answers.count(old.version), answers.count(new.version)) == (30, 10)
        tried(registry, folder, name="new", share=0.5)
        await follower.look()
        assert [await answer(served) for _ in range(40)].count(new.version) == 20
        promoted(registry, folder, name="new")
        await follower.look()
        await follower.settled()
        assert {await answer(served) for _ in range(10)} == {new.version}
        assert (loader.loads, loader.engines["old"].closed, loader.engines["new"].closed) == (2, True, False)
        rollback(registry)
        await follower.look()
        assert {await answer(served) for _ in range(10)} == {old.version}
        assert [who for who, _ in groupby(changes)] == [("old", None), ("old", "new"), ("new", None), ("old", None)]

    asyncio.run(run())


def test_a_canary_that_is_withdrawn_finishes_what_it_has_begun(registry: Path, folder: Path) -> None:
    async def run() -> None:
        served, loader = Served(), Loader(opened=False)
        follower = Follower(registry, served, load=loader)
        promoted(registry, folder, name="old")
        await follower.look()
        new = tried(registry, folder, name="new", share=0.99)
        await follower.look()
        asked = [asyncio.create_task(answer(served)) for _ in range(2)]
        await asyncio.sleep(0)
        rollback(registry)
        looking = asyncio.create_task(follower.look())
        await until(lambda: served.tried is None)
        loader.engines["new"].open.set()
        loader.engines["old"].open.set()
        await looking
        await follower.settled()
        assert new.version in [await task for task in asked]
        assert loader.engines["new"].closed
        assert not loader.engines["old"].closed

    asyncio.run(run())


@pytest.mark.parametrize("how", ["not loadable", "damaged pointer"])
def test_a_canary_that_cannot_be_tried_changes_nothing_and_has_one_line_in_the_log(
    registry: Path, folder: Path, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    async def run() -> None:
        served = Served()
        follower = Follower(registry, served, load=Loader(bad=("bad",)), retry_s=0)
        version = promoted(registry, folder, name="good")
        await follower.look()
        tried(registry, folder, name="bad")
        if how == "damaged pointer":
            (registry / "canary.json").write_text("{")
        for _ in range(3):
            await follower.look()
        assert {await answer(served) for _ in range(10)} == {version.version}
        assert served.reason is None
        (line,) = caplog.messages
        assert ("canary.json" if how == "damaged pointer" else "no such layer") in line

    asyncio.run(run())


def test_a_slow_request_on_a_replaced_student_holds_up_no_rollback_and_keeps_no_canary(registry: Path, folder: Path) -> None:
    async def run() -> None:
        served, loader = Served(), Loader(opened=False)
        follower = Follower(registry, served, load=loader)
        first = promoted(registry, folder, name="first")
        await follower.look()
        slow = asyncio.create_task(answer(served))
        await asyncio.sleep(0)
        busy = loader.engines["first"]
        tried(registry, folder, name="canary")
        await follower.look()
        promoted(registry, folder, name="second")
        await asyncio.wait_for(follower.look(), 5)
        assert (served.loaded and served.loaded.student.name, served.tried) == ("second", None)
        rollback(registry)
        await asyncio.wait_for(follower.look(), 5)
        assert served.loaded is not None
        assert served.loaded.student.version == first.version
        assert not slow.done()
        busy.open.set()
        await asyncio.wait_for(asyncio.gather(slow, return_exceptions=True), 5)
        await asyncio.wait_for(follower.settled(), 5)

    asyncio.run(run())


def test_scores_of_a_version_that_is_evaluated_anew_are_told_without_loading_it_again(registry: Path, folder: Path) -> None:
    async def run() -> None:
        served, loader, told = Served(), Loader(), []
        follower = Follower(registry, served, load=loader, changed=lambda s: told.append(dict(s.loaded.student.scores) if s.loaded else {}))
        promoted(registry, folder, name="one")
        await follower.look()
        task = TaskSettings(shots=0).model_dump()
        promote(registry, folder, name="one", task=task, scores={"rougeL": 0.9}, run="r", reason="evaluated anew")
        for _ in range(2):
            await follower.look()
        assert told == [{"rouge1": 0.5, "rougeL": 0.4125}, {"rougeL": 0.9}]
        assert loader.loads == 1

    asyncio.run(run())
