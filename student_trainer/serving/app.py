"""The student's application: the shared HTTP face, and a route that takes a question as it is and answers it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from fastapi import FastAPI
from pydantic import Field, ValidationError

from shared.contracts import Completion, FinishReason, GenerationRequest, Sampling
from shared.engines import Engine
from shared.errors import DataError, EngineError
from shared.http.app import create_app
from shared.http.wire import Answer, Body
from shared.prompts import messages, plain
from shared.registry import current, serving_path, verify
from shared.settings import TaskSettings
from student_trainer.serving.settings import StudentServiceSettings

UNPROMOTED = "unpromoted"
"""The version of a student that is served out of a plain folder."""
DECODING = Sampling(max_tokens=64, stop=("\n",))
"""Greedy, one line: as students are evaluated, with some room."""
Question = Annotated[str, Field(min_length=1, pattern=r"\S")]


@dataclass(frozen=True)
class Student:
    """What is served: a folder, the task it was trained for, and which version of it this is."""

    folder: Path
    version: str
    task: TaskSettings


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


def chosen(settings: StudentServiceSettings) -> Student:
    """The student that `settings` name. Raises EngineError if nothing is promoted, DataError if what is was tampered with."""
    if settings.model_dir is not None:
        return Student(settings.model_dir, UNPROMOTED, TaskSettings())
    assert settings.registry is not None
    promoted = current(settings.registry)
    if promoted is None:
        raise EngineError(f"{settings.registry}: nothing is promoted there yet; run `distill promote`, or serve a folder by --model-dir")
    verify(settings.registry, promoted)
    try:
        task = TaskSettings.model_validate(promoted.task)
    except ValidationError as exc:
        raise DataError(f"{settings.registry}: the task of version {promoted.version} is not readable: {exc.errors()[0]['msg']}") from exc
    return Student(serving_path(settings.registry, promoted), promoted.version, task)


def student_app(settings: StudentServiceSettings) -> FastAPI:
    """The application over the student that `settings` name. Raises EngineError, DataError."""
    from shared.engines.local import LocalEngine, LocalModel

    student = chosen(settings)
    model = LocalModel(student.folder)
    return generating_app(LocalEngine(model), student, kind=model.config.kind, public_name=settings.public_name)


def generating_app(engine: Engine, student: Student, *, kind: Literal["encoder-decoder", "decoder-only"], public_name: str) -> FastAPI:
    """The shared face over `engine`, plus POST /v1/generate."""
    app = create_app(engine, model=public_name, title="Student")

    def worded(question: str) -> GenerationRequest:
        """As the student was trained and evaluated: plain text for an encoder-decoder, else a chat."""
        if kind == "encoder-decoder":
            return GenerationRequest(prompt=plain(student.task, question), sampling=DECODING)
        return GenerationRequest(messages=messages(student.task, question), sampling=DECODING)

    async def answer(question: str) -> Completion:
        return (await engine.generate(worded(question)))[0]

    @app.post("/v1/generate")
    async def generate(body: GenerateBody) -> GenerateAnswer:
        questions = [body.question] if isinstance(body.question, str) else body.question
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(answer(question)) for question in questions]
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        answers = [Generated(text=c.text.strip(), finish_reason=c.finish_reason) for c in (task.result() for task in tasks)]
        return GenerateAnswer(model=public_name, version=student.version, answers=answers)

    return app
