"""The stage responses/student-r0: the undistilled student's own sampled answers, the natural rejected side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from shared.artifacts import Ledger, Run
from shared.collect import answer_offline
from shared.contracts import Example, GenerationRequest, Response, Sampling
from shared.datasets.stage import prepare
from shared.harvest.ask import Ask
from shared.prompts import messages, plain
from shared.settings import Recipe

STAGE = "responses/student-r0"
LEDGER = "responses.jsonl"
CHUNK = 32
"""Prompts answered at once. Part of what is sampled: with other chunks the same seed gives other texts."""


def sample(run: Run) -> int:
    """Let the student answer what is missing and write the manifest. Returns the exit code. Raises EngineError, StorageError."""
    recipe = run.recipe
    train = prepare(run)["train"]
    stage = run.stage(STAGE, inputs=["dataset"])
    if stage.complete:
        print(f"{STAGE}: complete, nothing to do")
        return 0
    with Ledger(stage.path / LEDGER, Response) as ledger:
        if recipe.sample.samples:
            from shared.engines.local import LocalModel
            from shared.models import serving_folder

            model = LocalModel(serving_folder(recipe.student.model, recipe.export.quantization))
            asks = student_asks(recipe, train, model.config.kind)
            collected = answer_offline(model, asks, ledger, chunk=CHUNK, what="sample", seed=recipe.seed)
            counts = collected.counts()
            print(f"{STAGE}: {collected.explain()}")
        else:
            counts = {"prompts": 0, "answers": 0}
            print(f"{STAGE}: sample.samples is 0, no answers wanted")
    settings = {
        "student": recipe.student.model_dump(mode="json"),
        "quantization": recipe.export.quantization,
        "sample": recipe.sample.model_dump(mode="json"),
        "chunk": CHUNK,
    }
    stage.finish([stage.path / LEDGER], settings=settings, counts=counts)
    return 0


def student_asks(recipe: Recipe, examples: Sequence[Example], kind: Literal["encoder-decoder", "decoder-only"]) -> list[Ask]:
    """One zero-shot ask for each example: plain text for an encoder-decoder, a chat turn for a decoder-only model."""
    settings = recipe.sample
    sampling = Sampling(
        max_tokens=settings.max_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
        stop=settings.stop,
        seed=recipe.seed,
    )
    identity = f"{recipe.student.model} ({recipe.export.quantization})"
    asks = []
    for example in examples:
        if kind == "encoder-decoder":
            request = GenerationRequest(prompt=plain(recipe.task, example.question), n=settings.samples, sampling=sampling)
        else:
            request = GenerationRequest(messages=messages(recipe.task, example.question), n=settings.samples, sampling=sampling)
        asks.append(Ask(example.id, request, identity=identity, model=recipe.student.model, protocol="local"))
    return asks
