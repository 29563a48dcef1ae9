"""Collecting the answers of teacher, students and further systems to the test split, so that nothing that was answered is asked again."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

from pydantic import ConfigDict, ValidationError

from evaluator.metrics import bertscore
from evaluator.scores import unanswered
from evaluator.systems import DISTILLED, STUDENTS, TEACHERS, System, asks, prompt_sha256, round_name, sampling
from shared.artifacts import Ledger, Run, canonical, read_json, sha256_bytes, sha256_file
from shared.collect import Answering, OfflineModel, answer_offline, answers, in_process
from shared.contracts import Completion, Contract, Example, GenerationRequest, Manifest, Prediction, Response, ServingConfig
from shared.errors import DataError, FailureClass, HarvestTooThin, StageOrder
from shared.harvest.ask import Ask
from shared.harvest.ledger import AnswerLedger
from shared.harvest.scheduler import Limits, harvest
from shared.harvest.teacher import Answer, Teacher
from shared.models import stamped
from shared.redact import Redaction
from shared.settings import Recipe, SystemSettings

RETRIED = frozenset(get_args(FailureClass))
"""All that failed before is asked again: a teacher scored on what it was not heard to say is easy to beat."""
NOT_HEARD = ("unanswered", "no_text")
"""Failures of the way to a system, not of the system: scored as empty answers they would make it easy to beat."""
CHUNK = 32
"""Prompts a local student answers at once: what is lost at most to a kill."""

Elsewhere = Callable[[str], Answering]
"""What answers chunks of prompts by a model, given by its reference or its serving folder."""


@dataclass
class Collected:
    """Systems and their answers to the test rows."""

    systems: list[System] = field(default_factory=list)
    predictions: list[Prediction] = field(default_factory=list)
    census: dict[str, Any] = field(default_factory=dict)
    """By system that was asked: rows, failures, seconds."""
    not_scored: dict[str, str] = field(default_factory=dict)
    """By system, why."""

    def leave_out(self, system: str, why: str) -> None:
        """Do not score a system."""
        self.systems = [s for s in self.systems if s.name != system]
        self.predictions = [p for p in self.predictions if p.system != system]
        self.not_scored[system] = why

    def add(self, other: Collected) -> None:
        self.systems += other.systems
        self.predictions += other.predictions
        self.census |= other.census
        self.not_scored |= other.not_scored


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


def teacher_predictions(run: Run, test: Sequence[Example], shots: Sequence[Example], *, open_teacher: Callable[[], Teacher]) -> Collected:
    """Greedy answers of the teacher, zero- and few-shot.

    `open_teacher` is called only if something has to be asked; what failed before is asked again. Raises TeacherError,
    HarvestTooThin where more failed than harvest.max_failed_fraction allows (a teacher scored on nothing is easy to beat),
    StorageError.
    """
    recipe = run.recipe
    # a launched teacher is the same teacher on whatever port it is found today
    identity, model = recipe.teacher.identity, recipe.teacher.public_name
    protocol = "chat" if recipe.teacher.chat else "completions"
    questions, solved = _redacted(run, test), _redacted(run, shots)

    def wanted(few_shot: bool) -> list[Ask]:
        return asks(recipe, questions, solved, identity=identity, model=model, protocol=protocol, few_shot=few_shot)

    systems = [
        System(name=TEACHERS[0], group="teacher", about="the teacher, asked without examples", model=model, decoding=_decoding(run)),
        System(
            name=TEACHERS[1],
            group="teacher",
            about=f"the teacher, {_shown(shots)}",
            model=model,
            decoding=_decoding(run),
            shots=tuple(shot.id for shot in shots),
        ),
    ]
    return _asked(run, systems, {TEACHERS[0]: wanted(False), TEACHERS[1]: wanted(True)}, open_teacher)


def url_predictions(
    run: Run, test: Sequence[Example], shots: Sequence[Example], given: SystemSettings, *, open_system: Callable[[], Teacher]
) -> Collected:
    """Greedy answers of one of evaluate.systems with a URL. Raises as `teacher_predictions` does."""
    assert given.url is not None
    wanted = asks(
        run.recipe,
        _redacted(run, test),
        _redacted(run, shots),
        identity=given.url,
        model=given.model,
        protocol=given.protocol,
        few_shot=given.few_shot,
    )
    about = f"{given.model} at {given.url}" + (f", {_shown(shots)}" if given.few_shot else "")
    # the teacher's limits are the teacher's
    limits = replace(Limits.of(run.recipe), requests_per_minute=None, tokens_per_minute=None, timeout_s=given.timeout_s)
    return _asked(run, [_extra(run, given, about, f"{given.model} at {given.url}", shots)], {given.name: wanted}, open_system, limits)


def student_predictions(
    run: Run,
    test: Sequence[Example],
    shots: Sequence[Example],
    *,
    load_base: Callable[[], OfflineModel],
    load: Callable[[Path], OfflineModel],
    elsewhere: Elsewhere | None = None,
) -> Collected:
    """Greedy answers of the base student, zero- and few-shot, of the distilled one after each round, and of other runs' students.

    load_base loads the base student, `load` that of a serving folder; one after the other, so that only one model is in memory.
    `elsewhere`: answers instead of them, given a model reference or a serving folder.
    Raises EngineError, DataError, StageOrder for another run without an exported student, StorageError.
    """
    recipe, found = run.recipe, Collected()
    base = f"{stamped(recipe.student.model)}:{recipe.export.quantization}"
    named = {STUDENTS[0]: False, STUDENTS[1]: True}
    protocol = _protocol(run.path / "model" / "serving")
    found.add(
        _answered(
            run,
            elsewhere(recipe.student.model) if elsewhere else in_process(Student(load_base)),
            [
                System(
                    name=name,
                    group="student",
                    about=f"the student before training, {_shown(shots) if few_shot else 'asked without examples'}",
                    model=base,
                    decoding=_decoding(run),
                    shots=tuple(shot.id for shot in shots) if few_shot else (),
                )
                for name, few_shot in named.items()
            ],
            {
                name: asks(recipe, test, shots, identity=base, model=recipe.student.model, protocol=protocol, few_shot=few_shot)
                for name, few_shot in named.items()
            },
        )
    )

    def local(name: str, system: System, folder: Path, *, few_shot: bool = False) -> Collected:
        wanted = asks(
            recipe,
            test,
            shots,
            identity=str(system.model),
            model=recipe.student.model,
            protocol=_protocol(folder),
            few_shot=few_shot,
        )
        answering = elsewhere(str(folder.absolute())) if elsewhere else in_process(Student(lambda: load(folder)))
        return _answered(run, answering, [system], {name: wanted})

    rounds = recipe.train.rounds
    for number in range(rounds - 1):
        stage, name = f"responses/student-r{number + 1}", round_name(number)
        folder, about = run.path / stage / "serving", f"the student after round {number + 1} of {rounds}"
        if not is_servable(run, number):
            found.not_scored[name] = f"round {number + 1} was not sampled (sample.samples is 0), so its student was never made servable"
            continue
        weights = _content(run.manifest(stage), f"{stage}/serving/", run.path / stage)
        found.add(local(name, System(name=name, group="distilled", about=about, model=weights, decoding=_decoding(run)), folder))
    ours = System(
        name=DISTILLED,
        group="distilled",
        about="the student after training" if rounds == 1 else f"the student after all {rounds} rounds of training",
        model=_content(run.manifest("model"), "model/serving/", run.path / "model"),
        decoding=_decoding(run),
    )
    found.add(local(DISTILLED, ours, run.path / "model" / "serving"))
    for given in recipe.evaluate.systems:
        if given.run is not None:
            system = _extra(run, given, f"the student of {given.run}", _content_of(given), shots)
            found.add(local(given.name, system, given.run / "model" / "serving", few_shot=given.few_shot))
    return found


class _Line(Contract):
    """What is read of a line of a predictions file."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    example_id: str
    text: str


def is_servable(run: Run, number: int) -> bool:
    """Whether the student of an earlier round was made servable, as it is to be sampled for the next one."""
    return (run.path / f"responses/student-r{number + 1}" / "serving" / "serving.json").is_file()


def file_predictions(test: Sequence[Example], given: SystemSettings) -> Collected:
    """The answers of one of evaluate.systems in a file: not scored if they are not exactly one to each test row.

    Rows of no test row are not read. Raises DataError for a file that is not there, not UTF-8 or not such lines.
    """
    assert given.predictions is not None
    lines = _lines(given.predictions)
    wanted = {e.id for e in test}
    of_test = [line for line in lines if line.example_id in wanted]
    if wrong := unanswered([line.example_id for line in of_test], [e.id for e in test]):
        return Collected(not_scored={given.name: f"{given.predictions}: {wrong}"})
    texts = {line.example_id: line.text.strip() for line in of_test}
    return Collected(
        systems=[System(name=given.name, group="extra", about=f"the answers in {given.predictions}", model=str(given.predictions))],
        predictions=[Prediction(system=given.name, example_id=e.id, text=texts[e.id]) for e in test],
    )


def _lines(file: Path) -> list[_Line]:
    """As editors save them: with a mark of the byte order, with empty lines. Raises DataError."""
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")  # a text may hold other ends of lines
    except OSError as exc:
        raise DataError(f"{file}: {exc.strerror}") from exc
    except UnicodeDecodeError as exc:
        raise DataError(f"{file}: not UTF-8: {exc.reason}") from exc
    return [_line(line, f"{file}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]


def _line(line: str, place: str) -> _Line:
    try:
        return _Line.model_validate_json(line)
    except ValidationError as exc:
        error = exc.errors()[0]
        raise DataError(": ".join([place, *(".".join(map(str, error["loc"])),) * bool(error["loc"]), error["msg"]])) from exc


def _asked(
    run: Run,
    systems: Sequence[System],
    by_system: Mapping[str, Sequence[Ask]],
    open_teacher: Callable[[], Teacher],
    limits: Limits | None = None,
) -> Collected:
    """Answers over HTTP, within the teacher's limits unless others are given; a system that was not heard on every row is not scored.

    Raises as `teacher_predictions` does.
    """
    recipe = run.recipe
    limits = limits or Limits.of(recipe)

    async def ask_all() -> dict[str, Any]:
        teacher, census = LazyTeacher(open_teacher), {}
        try:
            for system, of_system in by_system.items():
                with _teacher_ledger(run, system) as ledger:
                    found = await harvest(teacher, of_system, ledger, limits=limits, what=system, total=len(of_system), retry=RETRIED)
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
    found = Collected(list(systems), _predictions(run, by_system), census)
    for name in by_system:
        lost = [p.example_id for p in found.predictions if p.system == name and p.failed in NOT_HEARD]
        if lost:
            more = f" and {len(lost) - 5} more" if len(lost) > 5 else ""
            found.leave_out(name, f"no answer was heard to {', '.join(lost[:5])}{more}; evaluate again to ask for these anew")
    return found


def _answered(run: Run, answering: Answering, systems: Sequence[System], by_system: Mapping[str, Sequence[Ask]]) -> Collected:
    """Answers of one model."""
    census = {}
    for system, of_system in by_system.items():
        with _ledger(run, system) as ledger:
            census[system] = answer_offline(answering, of_system, ledger, chunk=CHUNK, what=system, seed=None).counts()
    return Collected(list(systems), _predictions(run, by_system), census)


def _redacted(run: Run, examples: Sequence[Example]) -> list[Example]:
    redaction = Redaction(run.recipe.harvest.redact, region=run.recipe.harvest.redact_region)
    return [redaction.of(example) for example in examples]


def _extra(run: Run, given: SystemSettings, about: str, model: str, shots: Sequence[Example]) -> System:
    shown = tuple(shot.id for shot in shots) if given.few_shot else ()
    return System(name=given.name, group="extra", about=about, model=model, decoding=_decoding(run), shots=shown)


def _shown(shots: Sequence[Example]) -> str:
    return f"shown {len(shots)} example" + "s" * (len(shots) != 1)


def _decoding(run: Run) -> dict[str, Any]:
    return sampling(run.recipe).model_dump(mode="json")


def _protocol(serving: Path) -> str:
    """How a student is asked, read without loading a model."""
    file = serving / "serving.json"
    try:
        return "chat" if ServingConfig.model_validate(read_json(file)).kind == "decoder-only" else "completions"
    except ValidationError as exc:
        raise DataError(f"{file}: {exc.errors()[0]['loc']}: {exc.errors()[0]['msg']}; run `distill export` again") from exc


def _content(manifest: Manifest | None, serving: str, folder: Path) -> str:
    """What tells this student from one made before it: the hash of all that is served: a tokenizer or a template changes answers too."""
    files = {f.path.removeprefix(serving): f.sha256 for f in (manifest.outputs if manifest else ()) if f.path.startswith(serving)}
    if "model.bin" not in files:
        raise DataError(f"{folder}: its manifest names no serving/model.bin; run the stage that makes it again (`distill export`)")
    return f"sha256:{sha256_bytes(canonical(files))}"


def _content_of(given: SystemSettings) -> str:
    """The same of another run's student."""
    assert given.run is not None
    file = given.run / "model" / "manifest.json"
    if not file.is_file():
        raise StageOrder(f"evaluate.systems: {given.name}: {given.run} has no exported student (model/manifest.json); run it to its export")
    try:
        manifest = Manifest.model_validate(read_json(file))
    except ValidationError as exc:
        raise DataError(f"{file}: not a readable manifest; run `distill export` there again") from exc
    return _content(manifest, "model/serving/", given.run / "model")


def _ledger(run: Run, system: str) -> Ledger[Response]:
    return Ledger(run.path / "evaluation" / "answers" / f"{system}.jsonl", Response)


def _teacher_ledger(run: Run, system: str) -> AnswerLedger:
    return AnswerLedger(run.path / "evaluation" / "answers", system)


def _failure(row: Response) -> str | None:
    """The class of a failure, but for "empty": nothing is what that model had to say."""
    kind = (row.reason or "unknown").partition(":")[0] if row.status == "failed" else "empty"
    return None if kind == "empty" else kind


def _predictions(run: Run, by_system: Mapping[str, Sequence[Ask]]) -> list[Prediction]:
    found = []
    for system, wanted in by_system.items():
        with _ledger(run, system) as ledger:
            for ask, (row,) in zip(wanted, answers(wanted, ledger), strict=True):
                found.append(
                    Prediction(
                        system=system,
                        example_id=ask.example_id,
                        text=row.text.strip(),
                        finish_reason=row.finish_reason,
                        failed=_failure(row),
                        prompt_sha256=prompt_sha256(ask.request),
                    )
                )
    return found


def fingerprints(recipe: Recipe) -> dict[str, str]:
    """What evaluate.systems and evaluate.bertscore name on disk, as it is now: with other content, an evaluation is made anew.

    Raises DataError, StageOrder, SettingsError for what is not there.
    """
    found = {}
    for given in recipe.evaluate.systems:
        if given.predictions is not None:
            found[given.name] = f"sha256:{sha256_file(given.predictions)}"
        elif given.run is not None:
            found[given.name] = _content_of(given)
    if recipe.evaluate.bertscore is not None:
        found["bertscore"] = bertscore.scorer(recipe.evaluate.bertscore)
    return found
