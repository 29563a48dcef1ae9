"""Who is compared, and what each of them is asked."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

from pydantic import Field

from evaluator import baselines
from evaluator.report.contract import Group
from shared.artifacts import Run, canonical
from shared.contracts import Contract, Example, GenerationRequest, Prediction, Sampling
from shared.errors import SettingsError
from shared.harvest.ask import Ask
from shared.prompts import messages, plain
from shared.settings import Recipe

DISTILLED = "distilled"
REFERENCE = "reference"
STUDENTS = ("student-zero-shot", "student-few-shot")
TEACHERS = ("teacher-zero-shot", "teacher-few-shot")
TRIVIAL = ("constant", "first-question", "first-sentence", "subject-template")
ALWAYS = (*STUDENTS, *TEACHERS, DISTILLED, *TRIVIAL, REFERENCE)
"""What every evaluation has; beside it the student after earlier rounds, and evaluate.systems."""


class System(Contract):
    """One system of an evaluation, as evaluation/systems.json keeps it."""

    name: str
    group: Group
    about: str
    """What it is, in one phrase."""
    model: str | None = None
    """Who answered: a model reference, the hash of weights, a URL or a file; None for those that know nothing."""
    decoding: dict[str, Any] | None = None
    """Of its answers (shared/contracts.py Sampling); None where they were not asked for here."""
    shots: tuple[str, ...] = ()
    """Ids of the examples it was shown."""


class Evaluated(Contract):
    """evaluation/systems.json: who was evaluated, in the order to show, and who could not be."""

    systems: tuple[System, ...]
    not_scored: dict[str, str] = Field(default_factory=dict)
    """By name, why."""


def round_name(number: int) -> str:
    """Of the student after an earlier round of training."""
    return f"{DISTILLED}-r{number}"


def refuse_taken_names(recipe: Recipe) -> None:
    """Raises SettingsError for one of evaluate.systems with the name of another system."""
    taken = {*ALWAYS, *(round_name(number) for number in range(recipe.train.rounds))}
    for system in recipe.evaluate.systems:
        if system.name in taken:
            raise SettingsError(f"evaluate.systems: {system.name} is the name of a system that is always evaluated; choose another")


def refuse_unknown_baseline(recipe: Recipe, names: Sequence[str]) -> None:
    """Raises SettingsError if promote.baseline is none of the systems to compare with."""
    others = [name for name in names if name not in (DISTILLED, REFERENCE)]
    if recipe.promote.baseline not in others:
        raise SettingsError(
            f"promote.baseline: {recipe.promote.baseline!r} is no system to compare with; choose one of {', '.join(others)}"
        )


def sampling(recipe: Recipe) -> Sampling:
    """Greedy, for all alike."""
    return Sampling(max_tokens=recipe.evaluate.max_tokens, stop=recipe.evaluate.stop)


def asks(
    recipe: Recipe, examples: Sequence[Example], shots: Sequence[Example], *, identity: str, model: str, protocol: str, few_shot: bool
) -> list[Ask]:
    """One greedy answer to each example. `protocol` "chat" words it as messages, "completions" as one plain text."""
    decoding, given = sampling(recipe), tuple(shots) if few_shot else ()

    def request(question: str) -> GenerationRequest:
        if protocol == "chat":
            return GenerationRequest(messages=messages(recipe.task, question, given), sampling=decoding)
        return GenerationRequest(prompt=plain(recipe.task, question, given), sampling=decoding)

    return [Ask(e.id, request(e.question), identity, model, protocol) for e in examples]


def prompt_sha256(request: GenerationRequest) -> str:
    """Of the prompt, or of the chat turns as JSON with sorted keys."""
    asked = request.prompt if request.prompt is not None else [m.model_dump() for m in request.messages or ()]
    data = asked.encode(errors="surrogatepass") if isinstance(asked, str) else canonical(asked)
    return hashlib.sha256(data).hexdigest()


def simple_systems(recipe: Recipe, train: Sequence[Example], test: Sequence[Example]) -> tuple[list[System], list[Prediction]]:
    """The TRIVIAL systems and the reference with their answers, system by system in the order of `test`."""
    always = baselines.constant([e.summary for e in train if e.summary is not None], recipe.seed)
    answers: dict[str, tuple[str, Callable[[Example], str]]] = {
        "constant": ("the train summary that fits the others best, to every question", lambda e: always),
        "first-question": ("the message's first sentence with a question mark", lambda e: baselines.first_question(e.question)),
        "first-sentence": ("the message's first sentence", lambda e: baselines.first_sentence(e.question)),
        "subject-template": ('"What are the treatments for SUBJECT?"', lambda e: baselines.subject_template(e.question)),
        REFERENCE: ("the references themselves: the ceiling, and a check of the metrics", lambda e: e.summary or ""),
    }
    systems = [
        System(name=name, group="reference" if name == REFERENCE else "trivial", about=about) for name, (about, _) in answers.items()
    ]
    found = [Prediction(system=name, example_id=e.id, text=answer(e)) for name, (_, answer) in answers.items() for e in test]
    return systems, found


def in_order(found: Sequence[System], run: Run) -> list[System]:
    """As they are shown: students before, teachers, the distilled one by round, those of the recipe, trivial ones, the reference."""
    rounds = [round_name(number) for number in range(run.recipe.train.rounds)]
    extra = [system.name for system in run.recipe.evaluate.systems]
    order = [*STUDENTS, *TEACHERS, *rounds, DISTILLED, *extra, *TRIVIAL, REFERENCE]
    return sorted(found, key=lambda system: order.index(system.name))
