"""POST /v1/generate: questions as people write them, worded as the student was trained on them, answered as it was evaluated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator
from pydantic_core import to_json

from shared.contracts import Completion, FinishReason, GenerationRequest
from shared.engines import Engine
from shared.http.face import Asked, Bounds, Chosen, Route
from shared.http.problems import Refused
from shared.http.wire import Answer, CallBody, whole
from shared.settings import TaskSettings
from student_trainer.serving.follow import Loaded
from student_trainer.serving.load import DECODING, worded

DEFAULT = "(default)"
"""Stands for the student, whatever its public name is."""
MAX_QUESTIONS = 64
Question = Annotated[str, Field(min_length=1, pattern=r"\S")]
_ONE = {"type": "string", "minLength": 1, "pattern": r"\S"}
_SEVERAL = {"type": "array", "items": _ONE, "minItems": 1, "maxItems": MAX_QUESTIONS}


def _several(value: Any) -> Any:
    if not isinstance(value, str | list):
        raise ValueError("give one text, or a list of texts")
    return [value] if isinstance(value, str) else value


class GenerateBody(CallBody):
    """One question, or several to be answered in order."""

    asks_by = "question"
    model: str = DEFAULT
    """Default: the student."""
    question: Annotated[
        list[Question],
        Field(min_length=1, max_length=MAX_QUESTIONS),
        BeforeValidator(_several),
        WithJsonSchema({"anyOf": [_ONE, _SEVERAL]}),
    ]
    max_tokens: Annotated[int, Field(ge=1, le=4096), BeforeValidator(whole)] | None = None
    """Default 64."""
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    """Default 0: the likeliest answer."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    """Default 1."""
    beam_size: Annotated[int, Field(ge=1, le=8), BeforeValidator(whole)] | None = None
    """Default 1; above it the answer comes whole, and temperature must be 0."""
    truncate: bool | None = None
    """Cut the middle out of questions that are too long, instead of refusing them. Default false."""

    @model_validator(mode="after")
    def _fits_together(self) -> GenerateBody:
        if self.stream and len(self.question) > 1:
            raise ValueError("stream: one question at a time")
        if self.temperature and (self.beam_size or 1) > 1:
            raise ValueError("beam_size: a beam is searched at temperature 0")
        return self


class Generated(Answer):
    """One answer."""

    text: str
    finish_reason: FinishReason


class GenerateAnswer(Answer):
    """`answers` stand in the order of the questions: one for each."""

    model: str
    version: str | None
    """Of the student; null for others."""
    answers: list[Generated]


class GenerateChunk(Answer):
    """One event of a streamed answer."""

    model: str
    version: str | None
    text: str
    finish_reason: FinishReason | None
    """Null until the last of them."""


class Answering(Chosen):
    """Who answers the student's questions, and how they are put to it."""

    version: str | None = None
    task: TaskSettings

    def put(self, task: TaskSettings, question: str) -> GenerationRequest:
        """The question in the words of a task: its own, or one that cuts more out of long questions."""
        raise NotImplementedError

    def fits(self, request: GenerationRequest) -> bool:
        """Whether it can read the whole prompt and still answer."""
        return True


class Student(Answering):
    """The student, in one version."""

    def __init__(self, loaded: Loaded, model: str, *, ended: Callable[[str, int, float], None]) -> None:
        """`ended` is told the version, the status of the answer and the engine's seconds."""
        super().__init__(loaded.engine, model)
        self._loaded, self._ended = loaded, ended
        self.version, self.task = loaded.student.version, loaded.student.task
        self.headers = ((b"x-student-version", self.version.encode()),)

    def put(self, task: TaskSettings, question: str) -> GenerationRequest:
        return worded(task, self._loaded.kind, question, DECODING)

    def fits(self, request: GenerationRequest) -> bool:
        return self._loaded.fits(request)

    def ended(self, status: int, engine_s: float) -> None:
        assert self.version is not None
        self._ended(self.version, status, engine_s)


class Beside(Answering):
    """Somebody else who is asked the student's questions, to compare."""

    def __init__(self, engine: Engine, model: str, task: TaskSettings, *, chats: bool) -> None:
        """`chats`: whether it is asked by chat, or by plain prompt."""
        super().__init__(engine, model)
        self.task, self._kind = task, "decoder-only" if chats else "encoder-decoder"

    def put(self, task: TaskSettings, question: str) -> GenerationRequest:
        return worded(task, self._kind, question, DECODING)


class Generate(Route[GenerateBody]):
    """The route."""

    body = GenerateBody

    def asked(self, body: GenerateBody, chosen: Chosen, bounds: Bounds) -> Asked:
        assert isinstance(chosen, Answering)
        if len(body.question) > bounds.max_queue:  # they could never wait together
            raise Refused(422, "field", f"question: at most {bounds.max_queue} at once here", param="question")
        sampling = DECODING.model_copy(
            update={
                "max_tokens": body.max_tokens or min(DECODING.max_tokens, bounds.max_tokens),
                "temperature": body.temperature or 0.0,
                "top_p": body.top_p or 1.0,
            }
        )
        requests, cut = [], 0
        for place, question in enumerate(body.question):
            task = _room(chosen, question, f"question.{place}" if len(body.question) > 1 else "question", truncate=bool(body.truncate))
            as_it_is = {"sampling": sampling, "beam_size": body.beam_size or 1}
            request = chosen.put(task, question).model_copy(update=as_it_is)
            while body.truncate and task.max_question_chars > 1 and not chosen.fits(request):  # many tokens a character
                task = task.model_copy(update={"max_question_chars": task.max_question_chars * 3 // 4})
                request = chosen.put(task, question).model_copy(update=as_it_is)
            requests.append(request)
            cut += len(" ".join(question.split())) > task.max_question_chars
        return Asked(requests, ((b"x-truncated", str(cut).encode()),) if cut else ())

    def whole(self, chosen: Chosen, asked: Asked, answers: list[list[Completion]], *, with_usage: bool) -> bytes:
        said = [{"text": found[0].text.strip(), "finish_reason": found[0].finish_reason} for found in answers]
        return bytes(to_json({**self.head(chosen), "answers": said}))

    def head(self, chosen: Chosen) -> dict[str, Any]:
        assert isinstance(chosen, Answering)
        return {"model": chosen.model, "version": chosen.version}

    def event(self, head: dict[str, Any], index: int, text: str, finish_reason: str | None, *, first: bool) -> dict[str, Any]:
        return head | {"text": text, "finish_reason": finish_reason}


def _room(chosen: Answering, question: str, param: str, *, truncate: bool) -> TaskSettings:
    """The task that the question is put by. Raises Refused for one that is too long, unless it may be cut."""
    characters, most = len(" ".join(question.split())), chosen.task.max_question_chars
    if characters > most and not truncate:
        message = (
            f"{param}: {characters} characters, and this model reads {most}; shorten it, or send truncate: true to have its middle cut out"
        )
        raise Refused(400, "prompt_too_long", message, param=param, code="context_length_exceeded")
    return chosen.task
