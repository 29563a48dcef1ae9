"""Collecting the answers of teacher and students to the test split, so that nothing that was answered is asked again."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, get_args

from pydantic import ValidationError

from evaluator.systems import DISTILLED, asks
from shared.artifacts import Ledger, Run, read_json
from shared.collect import OfflineModel, answer_offline, answers
from shared.contracts import Completion, Example, GenerationRequest, Prediction, Response, ServingConfig
from shared.errors import DataError, FailureClass, HarvestTooThin
from shared.harvest.ask import Ask
from shared.harvest.ledger import AnswerLedger
from shared.harvest.scheduler import Limits, harvest
from shared.harvest.teacher import Answer, Teacher
from shared.redact import Redaction

RETRIED = frozenset(get_args(FailureClass))
"""All that failed before is asked again: a teacher scored on what it was not heard to say is easy to beat."""
CHUNK = 32
"""Prompts a local student answers at once: what is lost at most to a kill."""


class Student:
    """A model in this process that is loaded when it is first asked."""

    def __init__(self, load: Callable[[], OfflineModel]) -> None:
        self._load = load

    @cached_property
    def _model(self) -> OfflineModel:
        return self._load()

    def fits(self, request: GenerationRequest) -> bool:
        return self._model.fits(request)

    def generate(self, requests: Sequence[GenerationRequest], *, seed: int | None) -> list[list[Completion]]:
        return self._model.generate(requests, seed=seed)


class LazyTeacher:
    """A teacher that is opened when it is first asked: where nothing is missing, none has to run."""

    def __init__(self, open_teacher: Callable[[], Teacher]) -> None:
        self._open = open_teacher

    @cached_property
    def _teacher(self) -> Teacher:
        return self._open()

    @property
    def most_choices(self) -> int | None:
        return self._teacher.most_choices

    async def ask(self, request: GenerationRequest) -> Answer:
        return await self._teacher.ask(request)

    def rendered(self, request: GenerationRequest) -> str:
        return self._teacher.rendered(request)

    async def aclose(self) -> None:
        if "_teacher" in self.__dict__:
            await self._teacher.aclose()


def teacher_predictions(
    run: Run,
    test: Sequence[Example],
    shots: Sequence[Example],
    *,
    open_teacher: Callable[[], Teacher],
) -> tuple[list[Prediction], dict[str, Any]]:
    """Greedy answers of the teacher, zero- and few-shot, and their census by system.

    `open_teacher` is called only if something has to be asked; what failed before is asked again. Raises TeacherError,
    HarvestTooThin where more failed than harvest.max_failed_fraction allows (a teacher scored on nothing is easy to beat),
    StorageError.
    """
    recipe = run.recipe
    # a launched teacher is the same teacher on whatever port it is found today
    identity, model = recipe.teacher.identity, recipe.teacher.public_name

    redaction = Redaction(recipe.harvest.redact, region=recipe.harvest.redact_region)
    questions, solved = [redaction.of(example) for example in test], [redaction.of(shot) for shot in shots]
    protocol = "chat" if recipe.teacher.chat else "completions"

    def wanted(few_shot: bool) -> list[Ask]:
        return asks(recipe, questions, solved, identity=identity, model=model, protocol=protocol, few_shot=few_shot)

    by_system = {"teacher-zero-shot": wanted(False), "teacher-few-shot": wanted(True)}

    async def ask_all() -> dict[str, Any]:
        teacher, census = LazyTeacher(open_teacher), {}
        try:
            for system, of_system in by_system.items():
                with _teacher_ledger(run, system) as ledger:
                    found = await harvest(
                        teacher, of_system, ledger, limits=Limits.of(recipe), what=system, total=len(of_system), retry=RETRIED
                    )
                    ledger.compact()
                if found.failed_fraction > recipe.harvest.max_failed_fraction:
                    raise HarvestTooThin(
                        f"{system}: {found.explain()}: more than harvest.max_failed_fraction = {recipe.harvest.max_failed_fraction:g} "
                        "failed; mend the cause and run the same command again: what was answered is kept"
                    )
                census[system] = found.counts()
        finally:
            await teacher.aclose()
        return census

    census = asyncio.run(ask_all())
    return _predictions(run, by_system), census


def student_predictions(
    run: Run,
    test: Sequence[Example],
    shots: Sequence[Example],
    *,
    load_base: Callable[[], OfflineModel],
    load_distilled: Callable[[], OfflineModel],
) -> tuple[list[Prediction], dict[str, Any]]:
    """Greedy answers of the base student, zero- and few-shot, and of the distilled one, and their census by system.

    Raises EngineError, DataError, StorageError.
    """
    recipe = run.recipe
    protocol = "chat" if _kind(run) == "decoder-only" else "completions"
    base = f"{recipe.student.model}:{recipe.export.quantization}"

    def wanted(identity: str, few_shot: bool) -> list[Ask]:
        return asks(recipe, test, shots, identity=identity, model=recipe.student.model, protocol=protocol, few_shot=few_shot)

    by_student: list[tuple[Callable[[], OfflineModel], dict[str, list[Ask]]]] = [
        (load_base, {"student-zero-shot": wanted(base, False), "student-few-shot": wanted(base, True)}),
        (load_distilled, {DISTILLED: wanted(_content(run), False)}),
    ]
    census: dict[str, Any] = {}
    for load, by_system in by_student:
        student = Student(load)  # one after the other, so that only one model is in memory
        for system, of_system in by_system.items():
            with _ledger(run, system) as ledger:
                census[system] = answer_offline(student, of_system, ledger, chunk=CHUNK, what=system, seed=None).counts()
    return _predictions(run, {system: of_system for _, by_system in by_student for system, of_system in by_system.items()}), census


def _kind(run: Run) -> str:
    """The architecture of both students, read without loading a model."""
    file = run.path / "model" / "serving" / "serving.json"
    try:
        return ServingConfig.model_validate(read_json(file)).kind
    except ValidationError as exc:
        raise DataError(f"{file}: {exc.errors()[0]['loc']}: {exc.errors()[0]['msg']}; run `distill export` again") from exc


def _content(run: Run) -> str:
    """What tells this distilled student from one exported before it: the hash of its weights."""
    manifest = run.manifest("model")
    for file in manifest.outputs if manifest else ():
        if file.path == "model/serving/model.bin":
            return f"sha256:{file.sha256}"
    raise DataError(f"{run.path / 'model'}: its manifest names no serving/model.bin; run `distill export` again")


def _ledger(run: Run, system: str) -> Ledger[Response]:
    return Ledger(run.path / "evaluation" / "answers" / f"{system}.jsonl", Response)


def _teacher_ledger(run: Run, system: str) -> AnswerLedger:
    return AnswerLedger(run.path / "evaluation" / "answers", system)


def _predictions(run: Run, by_system: Mapping[str, Sequence[Ask]]) -> list[Prediction]:
    found = []
    for system, wanted in by_system.items():
        with _ledger(run, system) as ledger:
            for ask, (row,) in zip(wanted, answers(wanted, ledger), strict=True):
                found.append(Prediction(system=system, example_id=ask.example_id, text=row.text.strip(), finish_reason=row.finish_reason))
    return found
