"""The stages responses/student-rN: the student's own sampled answers before round N of training, the natural rejected side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from shared.artifacts import Ledger, Run, canonical, sha256_bytes
from shared.collect import answer_offline, in_process
from shared.commands import uninterrupted
from shared.contracts import Example, GenerationRequest, Response, Sampling
from shared.datasets.stage import prepare
from shared.harvest.ask import Ask
from shared.models import stamped
from shared.prompts import messages, plain
from shared.settings import Recipe

LEDGER = "responses.jsonl"
CHUNK = 32
"""Prompts answered at once. Part of what is sampled: with other chunks the same seed gives other texts."""


def stage_name(number: int) -> str:
    """Of the answers for a round of training."""
    return f"responses/student-r{number}"


def sample(run: Run, number: int = 0, *, on: str | None = None, workers: int | None = None) -> int:
    """Let the student answer what is missing and write the manifest. `on`: a cluster, with so many workers. Returns the exit code.

    number: of the round. Round 0 asks the undistilled student, a later one the student of the round before, which is converted for that
    into the stage's folder `serving`. Raises StageOrder, EngineError, StorageError.
    """
    recipe, name = run.recipe, stage_name(number)
    train = prepare(run)["train"]
    trained = f"checkpoints/r{number - 1}" if number else None
    stage = run.stage(name, inputs=["dataset", *([trained] if trained else [])])
    if stage.complete:
        print(f"{name}: complete, nothing to do")
        return 0
    quantization = recipe.export.quantization
    identity = f"{stamped(recipe.student.model)} ({quantization})"
    outputs = [stage.path / LEDGER]
    if trained:
        identity = f"{_weights(run, trained)} ({quantization})"
        outputs.append(stage.path / "serving")
    with Ledger(stage.path / LEDGER, Response) as ledger:
        if recipe.sample.samples:
            from shared.engines.local import LocalModel, read_config
            from shared.models import serving_folder

            folder = _converted(run, trained, stage.path / "serving") if trained else serving_folder(recipe.student.model, quantization)
            if on is None:
                answering = in_process(LocalModel(folder))
            else:
                from shared.cluster.answer import elsewhere

                answering = elsewhere(on, str(folder.absolute()) if trained else recipe.student.model, quantization, workers=workers)
            asks = student_asks(recipe, train, read_config(folder).kind, identity=identity)
            collected = answer_offline(answering, asks, ledger, chunk=CHUNK, what="sample", seed=recipe.seed + number)
            counts = collected.counts()
            print(f"{name}: {collected.explain()}")
        else:
            counts = {"prompts": 0, "answers": 0}
            print(f"{name}: sample.samples is 0, no answers wanted")
    settings = {
        "student": recipe.student.model_dump(mode="json"),
        "quantization": quantization,
        "sample": recipe.sample.model_dump(mode="json"),
        "chunk": CHUNK,
    }
    stage.finish([output for output in outputs if output.exists()], settings=settings, counts=counts)
    return 0


def _weights(run: Run, trained: str) -> str:
    """What tells a trained student from another: the hash of its weights."""
    manifest = run.manifest(trained)
    assert manifest is not None  # the stage that reads it has been opened
    return "sha256:" + sha256_bytes(canonical([ref.sha256 for ref in manifest.outputs if ref.path.endswith(".safetensors")]))


def _converted(run: Run, trained: str, out: Path) -> Path:
    """The student of a round as a serving folder."""
    with uninterrupted():
        from shared.engines.convert import convert

    quantization = run.recipe.export.quantization
    print(f"sample: converting the student of {trained} to CTranslate2 {quantization}", flush=True)
    return convert(str(run.path / trained / "student"), out, name=run.recipe.name, quantization=quantization)


def student_asks(
    recipe: Recipe, examples: Sequence[Example], kind: Literal["encoder-decoder", "decoder-only"], *, identity: str
) -> list[Ask]:
    """One zero-shot ask for each example: plain text for an encoder-decoder, a chat turn for a decoder-only model."""
    settings = recipe.sample
    sampling = Sampling(
        max_tokens=settings.max_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
        stop=settings.stop,
        seed=recipe.seed,
    )
    asks = []
    for example in examples:
        if kind == "encoder-decoder":
            request = GenerationRequest(prompt=plain(recipe.task, example.question), n=settings.samples, sampling=sampling)
        else:
            request = GenerationRequest(messages=messages(recipe.task, example.question), n=settings.samples, sampling=sampling)
        asks.append(Ask(example.id, request, identity=identity, model=recipe.student.model, protocol="local"))
    return asks
