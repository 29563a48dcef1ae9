"""The student's application: the shared HTTP face, a route that takes a question as it is and answers it, and a page to try it on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, nullcontext, suppress
from importlib import resources
from typing import Annotated, Literal

from fastapi import FastAPI
from fastapi.responses import HTMLResponse
from pydantic import Field

from shared.contracts import Completion, FinishReason, GenerationRequest, Sampling
from shared.engines import Engine
from shared.errors import DataError
from shared.http.app import create_app, cut_short
from shared.http.wire import Answer, Body
from shared.prompts import messages, plain
from shared.registry import current
from shared.settings import TaskSettings
from student_trainer.serving.follow import Follower, Loaded, Served, Student, load
from student_trainer.serving.settings import StudentServiceSettings

UNPROMOTED = "unpromoted"
"""The version of a student that is served out of a plain folder."""
DECODING = Sampling(max_tokens=64, stop=("\n",))
"""Greedy, one line: as students are evaluated, with some room."""
PAGE_HEADERS = {
    # the page may speak with this server and with nobody else
    "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "cache-control": "no-cache",
}
Question = Annotated[str, Field(min_length=1, pattern=r"\S")]


class GenerateBody(Body):
    """POST /v1/generate: one question, or several to be answered in order."""

    question: Question | Annotated[list[Question], Field(min_length=1, max_length=64)]


class Generated(Answer):
    """One answer."""

    text: str
    finish_reason: FinishReason


class GenerateAnswer(Answer):
    """`answers` stand in the order of the questions: one for each."""

    model: str
    version: str
    answers: list[Generated]


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


def student_app(settings: StudentServiceSettings) -> FastAPI:
    """The application over the folder that `settings` name, or over whatever their registry comes to hold.

    Raises EngineError for a folder that cannot be served, RunMismatch for a directory that is no registry and never will be one.
    """
    if settings.model_dir is not None:
        served = Served(load(Student(settings.model_dir, UNPROMOTED, TaskSettings())))
        return app_over(served, public_name=settings.public_name)
    assert settings.registry is not None
    with suppress(DataError, OSError):  # these may be mended while it waits
        current(settings.registry)
    served = Served()
    return app_over(served, public_name=settings.public_name, beside=Follower(settings.registry, served).following)


def generating_app(engine: Engine, student: Student, *, kind: Literal["encoder-decoder", "decoder-only"], public_name: str) -> FastAPI:
    """The application over one student that stays."""
    return app_over(Served(Loaded(student, engine, kind)), public_name=public_name)


def app_over(served: Served, *, public_name: str, beside: Callable[[], AbstractAsyncContextManager[None]] = nullcontext) -> FastAPI:
    """The shared face over `served`, plus POST /v1/generate, GET /v1/student and the page."""
    app = create_app(served, model=public_name, title="Student", listed=lambda: served.loaded is not None, beside=beside)
    page = resources.files("student_trainer.serving").joinpath("page.html").read_text(encoding="utf-8")

    @app.post("/v1/generate")
    async def generate(body: GenerateBody) -> GenerateAnswer:
        questions = [body.question] if isinstance(body.question, str) else body.question
        with served.borrow() as loaded, cut_short():  # one version for all of them
            try:
                async with asyncio.TaskGroup() as group:
                    tasks = [group.create_task(_answer(loaded, question)) for question in questions]
            except ExceptionGroup as errors:
                raise errors.exceptions[0] from None
        answers = [Generated(text=c.text.strip(), finish_reason=c.finish_reason) for c in (task.result() for task in tasks)]
        return GenerateAnswer(model=public_name, version=loaded.student.version, answers=answers)

    @app.get("/v1/student")
    async def state() -> State:
        if served.loaded is None:
            return State(ready=False, reason=served.reason)
        student = served.loaded.student
        return State(
            ready=True,
            reason=served.reason,
            version=student.version,
            name=student.name or None,
            scores=student.scores,
            promoted_at=student.promoted_at,
        )

    @app.get("/")
    async def index() -> HTMLResponse:
        return HTMLResponse(page, headers=PAGE_HEADERS)

    return app


async def _answer(loaded: Loaded, question: str) -> Completion:
    """Worded as the student was trained and evaluated: plain text for an encoder-decoder, else a chat."""
    if loaded.kind == "encoder-decoder":
        request = GenerationRequest(prompt=plain(loaded.student.task, question), sampling=DECODING)
    else:
        request = GenerationRequest(messages=messages(loaded.student.task, question), sampling=DECODING)
    return (await loaded.engine.generate(request))[0]
