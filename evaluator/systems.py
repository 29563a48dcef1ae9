"""Who is compared, and what each of them is asked."""

from __future__ import annotations

from collections.abc import Sequence

from evaluator import baselines
from shared.contracts import Example, GenerationRequest, Prediction, Sampling
from shared.harvest.ask import Ask
from shared.prompts import messages, plain
from shared.settings import Recipe

DISTILLED = "distilled"
ASKED = ("student-zero-shot", "student-few-shot", "teacher-zero-shot", "teacher-few-shot", DISTILLED)
"""Systems that are models; each has a ledger of answers."""
TRIVIAL = ("constant", "first-question", "first-sentence", "subject-template")
SYSTEMS = (*ASKED, *TRIVIAL)


def asks(
    recipe: Recipe, examples: Sequence[Example], shots: Sequence[Example], *, identity: str, model: str, protocol: str, few_shot: bool
) -> list[Ask]:
    """One greedy answer to each example. `protocol` "chat" words it as messages, "completions" as one plain text."""
    sampling = Sampling(max_tokens=recipe.evaluate.max_tokens, stop=recipe.evaluate.stop)
    given = tuple(shots) if few_shot else ()

    def request(question: str) -> GenerationRequest:
        if protocol == "chat":
            return GenerationRequest(messages=messages(recipe.task, question, given), sampling=sampling)
        return GenerationRequest(prompt=plain(recipe.task, question, given), sampling=sampling)

    return [Ask(e.id, request(e.question), identity, model, protocol) for e in examples]


def trivial_predictions(recipe: Recipe, train: Sequence[Example], test: Sequence[Example]) -> list[Prediction]:
    """The answers of the TRIVIAL systems, system by system in the order of `test`."""
    always = baselines.constant([e.summary for e in train if e.summary is not None], recipe.seed)
    answers = {
        "constant": lambda question: always,
        "first-question": baselines.first_question,
        "first-sentence": baselines.first_sentence,
        "subject-template": baselines.subject_template,
    }
    return [Prediction(system=name, example_id=e.id, text=answers[name](e.question)) for name in TRIVIAL for e in test]
