"""The student's application: the shared HTTP face, a route that takes a question as it is and answers it, and a page to try it on."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager, nullcontext, suppress
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from fastapi import Request
from fastapi.responses import FileResponse, HTMLResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import Field

from shared.engines import Engine
from shared.errors import DataError, TeacherFailed, TeacherUnavailable
from shared.http.app import App, create_app, unknown_model
from shared.http.face import Bounds, Chosen
from shared.http.keys import Keys
from shared.http.problems import Refused
from shared.http.schema import Described, Generating, Read
from shared.http.settings import LOOPBACK, NAMES_OF_LOOPBACK
from shared.http.wire import Answer
from shared.models import serving_folder
from shared.registry import current
from shared.settings import TaskSettings, read_secret
from student_trainer.serving import live
from student_trainer.serving.follow import Follower, Loaded, Served, Student
from student_trainer.serving.generate import DEFAULT, Beside, Generate, GenerateAnswer, GenerateBody, GenerateChunk
from student_trainer.serving.generate import Student as Answering
from student_trainer.serving.load import Loader
from student_trainer.serving.metrics import StudentMeters
from student_trainer.serving.settings import StudentServiceSettings

log = logging.getLogger(__name__)

UNPROMOTED = "unpromoted"
"""The version of a student that is served out of a plain folder."""
BASE, TEACHER = "base", "teacher"
RETIRE_MORE_S = 5.0
"""Seconds beyond a request's own that a replaced student gets."""
RUN_S = 0.5
"""Seconds for which the state of a run is told as it was: to read it takes a thread and a few files."""
PAGE_HEADERS = {
    # the page may speak with this server and with nobody else
    "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "cache-control": "no-cache",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


class Trial(Answer):
    """A canary."""

    version: str
    share: float
    """Of the requests."""
    scores: dict[str, float]


class State(Answer):
    """GET /v1/student: what is served, or why nothing is."""

    ready: bool
    reason: str | None
    """Why nothing is served or, beside a student, why the one promoted last is not."""
    version: str | None = None
    name: str | None = None
    """The recipe's name."""
    scores: dict[str, float] = Field(default_factory=dict)
    """On the test split, each in [0, 1]."""
    promoted_at: str | None = None
    """UTC, ISO 8601."""
    max_question_characters: int | None = None
    """Longer questions are refused, or cut where that is asked for."""
    models: list[str] = Field(default_factory=list)
    """Who can be asked by name."""
    samples: list[str] = Field(default_factory=list)
    """Some questions of the test split."""
    report: bool = False
    """Whether GET /report has one."""
    run: bool = False
    """Whether GET /v1/run may have one."""
    canary: Trial | None = None


def student_app(settings: StudentServiceSettings, *, keys: Keys | None = None, meters: StudentMeters | None = None) -> App:
    """The application over the folder that `settings` name, or over whatever their registry comes to hold.

    Raises EngineError for a folder that cannot be served, RunMismatch for a directory that is no registry and never will be one, and
    SettingsError for a key of the teacher's that cannot be read.
    """
    meters = meters or StudentMeters()
    load = Loader(settings, meters)
    beside: dict[str, tuple[Engine, bool]] = {}
    if settings.base is not None:
        name, quantization = settings.base, settings.base_quantization
        beside[BASE] = load.base(lambda: serving_folder(name, quantization)), False
    if settings.teacher_url is not None:
        from shared.engines.upstream import UpstreamEngine

        key = read_secret(settings.teacher_key, settings.teacher_key_file, "teacher_key")
        teacher = UpstreamEngine([settings.teacher_url], model=settings.teacher_model, api_key=key, timeout_s=settings.deadline_s)
        beside[TEACHER] = teacher, True
    options: dict[str, Any] = {"keys": keys, "bounds": settings.bounds, "meters": meters, "beside": beside, "run": settings.run}
    if settings.host in LOOPBACK and not settings.no_auth and not (keys and keys.required):
        options["hosts"] = NAMES_OF_LOOPBACK
    if settings.model_dir is not None:
        served = Served(load(Student(settings.model_dir, UNPROMOTED, TaskSettings())))
        return app_over(served, public_name=settings.public_name, **options)
    assert settings.registry is not None
    with suppress(DataError, OSError):  # these may be mended while it waits
        current(settings.registry)
    served = Served(retire_s=settings.deadline_s + RETIRE_MORE_S)
    follower = Follower(settings.registry, served, load=load, changed=meters.serves)
    return app_over(served, public_name=settings.public_name, following=follower.following, **options)


def generating_app(engine: Engine, student: Student, *, kind: Literal["encoder-decoder", "decoder-only"], public_name: str) -> App:
    """The application over one student that stays."""
    return app_over(Served(Loaded(student, engine, kind)), public_name=public_name)


def app_over(
    served: Served,
    *,
    public_name: str,
    keys: Keys | None = None,
    bounds: Bounds | None = None,
    meters: StudentMeters | None = None,
    beside: Mapping[str, tuple[Engine, bool]] = MappingProxyType({}),
    run: Path | None = None,
    following: Callable[[], AbstractAsyncContextManager[None]] = nullcontext,
    hosts: tuple[str, ...] | None = None,
) -> App:
    """The shared face over `served`, and what only a student's server has.

    `beside`: who else can be asked, by name, and whether by chat. `run`: whose state GET /v1/run tells. `following` is entered before
    the first request and left after the last. `hosts`: the names it answers to, any by default.
    """
    meters = meters or StudentMeters()
    meters.serves(served)
    meters.queue.set_function(lambda: waiting(served))
    names = (public_name, *beside)
    teacher = beside[TEACHER][0] if TEACHER in beside else None

    @contextmanager
    def choose(name: str) -> Iterator[Chosen]:
        if name not in (*names, DEFAULT):
            raise unknown_model(name, *names)
        if name in beside and name != public_name:
            engine, chats = beside[name]
            task = served.loaded.student.task if served.loaded else TaskSettings()
            try:
                yield Beside(engine, name, task, chats=chats)
            except TeacherUnavailable as exc:
                if engine is teacher and type(exc) is TeacherUnavailable:  # 502: a 503 means this server, which a balancer would set aside
                    raise TeacherFailed(str(exc)) from exc
                raise
            return
        with served.borrow() as loaded:
            yield Answering(loaded, public_name, ended=meters.ended)

    def models() -> list[dict[str, Any]]:
        return [*([_listed(served.loaded, public_name)] if served.loaded else []), *({"id": name} for name in beside)]

    @asynccontextmanager
    async def running() -> AsyncIterator[None]:
        async with following():
            yield
        for engine, _ in beside.values():
            await engine.aclose()

    app = create_app(
        served,
        model=public_name,
        title="Student",
        keys=keys,
        bounds=bounds,
        meters=meters,
        choose=choose,
        models=models,
        routes={"/v1/generate": Generate()},
        described=_described(tuple(beside)),
        beside=running,
        names=hosts,
    )
    seen: list[tuple[float, live.RunState]] = []
    looking = asyncio.Lock()
    page = resources.files("student_trainer.serving").joinpath("page.html").read_text(encoding="utf-8")

    @app.get("/v1/student")
    async def state(request: Request) -> State:
        app.known(request)
        return _state(served, list(names)).model_copy(update={"run": run is not None})

    @app.get("/report")
    async def report(request: Request) -> Response:
        app.known(request)
        file = served.loaded.student.report if served.loaded else None
        if file is None or not await asyncio.to_thread(file.is_file):
            raise Refused(404, "no_report", "no report here: nothing is promoted, or it was promoted without one", code="no_report")
        return FileResponse(file, media_type="text/html", headers=PAGE_HEADERS)

    @app.get("/v1/run")
    async def run_state(request: Request) -> live.RunState:
        app.known(request)
        try:
            if run is not None:
                async with looking:  # one reader for all who ask
                    if not seen or time.monotonic() - seen[0][0] > RUN_S:
                        seen[:] = [(time.monotonic(), await asyncio.to_thread(live.live, run))]
                    return seen[0][1]
        except DataError as exc:
            log.info("no run: %s", exc)
        raise Refused(404, "no_run", "no run is shown here; --run DIR names one", code="no_run")

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        app.known(request)
        return Response(generate_latest(meters.registry), headers={"content-type": CONTENT_TYPE_LATEST})

    @app.get("/")
    async def index() -> HTMLResponse:
        return HTMLResponse(page, headers=PAGE_HEADERS)

    return app


def waiting(served: Served) -> int:
    """Requests in the queues of who is served and who is tried."""
    return sum(getattr(loaded.engine, "waiting", 0) for loaded in (served.loaded, served.tried) if loaded)


def _state(served: Served, names: list[str]) -> State:
    if served.loaded is None:
        return State(ready=False, reason=served.reason, models=names)
    student, tried = served.loaded.student, served.tried
    return State(
        ready=True,
        reason=served.reason,
        version=student.version,
        name=student.name or None,
        scores=student.scores,
        promoted_at=student.promoted_at,
        max_question_characters=student.task.max_question_chars,
        models=names,
        samples=list(student.samples),
        report=student.report is not None,
        canary=Trial(version=tried.student.version, share=served.share, scores=tried.student.scores) if tried else None,
    )


def _listed(loaded: Loaded, name: str) -> dict[str, Any]:
    student = loaded.student
    return {
        "id": name,
        "version": student.version,
        "recipe": student.name or None,
        "scores": student.scores,
        "promoted_at": student.promoted_at,
    }


def _described(beside: tuple[str, ...]) -> Described:
    text, number = {"type": ["string", "null"]}, {"type": "number"}
    return Described(
        reads=(
            Read("/v1/student", "Who is served, or why nobody is.", State),
            Read("/v1/run", "How the run beside the server goes.", live.RunState, missing="No run is shown here."),
            Read("/report", "The report of the served student's evaluation.", "text/html", missing="There is none."),
            Read("/metrics", "Numbers for Prometheus.", "text/plain"),
            Read("/", "A page to try the student on.", "text/html", keyed=False),
        ),
        generating=(Generating("/v1/generate", "Answer questions.", GenerateBody, GenerateAnswer, GenerateChunk),),
        names=beside,
        headers={
            "x-student-version": "The version that has answered; of the student's answers alone.",
            "x-truncated": "How many of the questions had their middle cut out, if any; of /v1/generate alone.",
        },
        listed={
            "version": text,
            "recipe": text,
            "promoted_at": text,
            "scores": {"type": "object", "additionalProperties": number},
        },
    )
