"""Runs with a data set and an exported student, and fakes of all who answer, for tests of evaluation and promotion."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

from shared.artifacts import Run
from shared.contracts import Completion, GenerationRequest
from shared.datasets.stage import prepare
from shared.harvest.teacher import Answer
from shared.settings import Recipe

SERVING = {"name": "fake", "kind": "decoder-only", "eos_token": "</s>", "max_input_tokens": 512, "quantization": "int8"}


def recipe(**changes) -> Recipe:
    values = {
        "name": "trial",
        "dataset": {"name": "sample", "limit": 30, "test_limit": 40},
        "teacher": {"launch": {"engine": "scripted"}},
        "evaluate": {"resamples": 500},
    }
    return Recipe(**{**values, **changes})


def exported_run(path, weights: str = "weights", **changes) -> Run:
    """A run whose stages `dataset` and `model` are complete."""
    run = Run.open(path, recipe(**changes))
    prepare(run)
    export(run, weights)
    return run


def export(run: Run, weights: str, **serving) -> None:
    """The stage `model`, with fake weights."""
    folder = run.path / "model" / "serving"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "serving.json").write_text(json.dumps({**SERVING, **serving}))
    (folder / "model.bin").write_text(weights)
    (folder / "tokenizer.json").write_text("{}")
    (run.path / "model" / "README.md").write_text("# card\n")
    run.stage("model").finish([run.path / "model" / "README.md", folder], settings={})


def prompt(request: GenerationRequest) -> str:
    return request.messages[-1].content if request.messages else request.prompt


class FakeStudent:
    """Answers by a function of the prompt's last turn; counts what it was asked."""

    def __init__(self, answer: Callable[[str], str], longest: int = 10**6) -> None:
        self._answer, self._longest = answer, longest
        self.asked: list[GenerationRequest] = []

    def fits(self, request: GenerationRequest) -> bool:
        return sum(len(m.content) for m in request.messages or ()) + len(request.prompt or "") <= self._longest

    def generate(self, requests: Sequence[GenerationRequest], *, seed: int | None) -> list[list[Completion]]:
        self.asked += requests
        return [[Completion(text=self._answer(prompt(request)), finish_reason="stop")] for request in requests]


class FakeTeacher:
    """The same over HTTP's protocol, one attempt a call; an answer that is an error is raised."""

    most_choices: int | None = None

    def __init__(self, answer: Callable[[str], str | Exception]) -> None:
        self._answer, self.asked, self.closed = answer, 0, False

    async def ask(self, request: GenerationRequest) -> Answer:
        self.asked += 1
        answer = self._answer(prompt(request))
        if isinstance(answer, Exception):
            raise answer
        return Answer((Completion(text=answer, finish_reason="stop"),))

    def rendered(self, request: GenerationRequest) -> str:
        return prompt(request)

    async def check(self) -> None: ...

    async def aclose(self) -> None:
        self.closed = True
