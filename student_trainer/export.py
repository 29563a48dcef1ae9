"""`distill export`: the trained checkpoint becomes RUN/model: a Hugging Face folder, a serving folder and a model card.

Before anything stands there, both folders answer the same prompts: what is served has to be what was trained.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

from shared.commands import open_run, stage_parser, uninterrupted
from shared.errors import EngineError

if TYPE_CHECKING:
    from pathlib import Path

    from shared.artifacts import Run
    from shared.contracts import GenerationRequest

PROMPTS = 32
"""Rows that both folders answer: of the validation split, then of the train split."""
LEAST_ALIKE = 0.5
"""Mean ROUGE-L F1 of the two folders' answers below which the conversion is refused. In float32 they differ by near-ties only (1.0 was
measured throughout), in float16 hardly more (0.94 and above)."""
EXACT = ("float32", "float16")
"""Quantizations that are refused below LEAST_ALIKE. int8 is recorded alone: it was seen at 0.46 in tiny random models, rightly converted,
at 0.81 and 0.87 in SmolLM2-135M."""


def main(argv: list[str]) -> int:
    export(open_run(stage_parser("export", __doc__).parse_args(argv)))
    return 0


def export(run: Run) -> None:
    """Run the stage `model`. Raises StageOrder, EngineError, StorageError; DataError, SettingsError where the rows are not there yet."""
    last = f"checkpoints/r{run.recipe.train.rounds - 1}"
    stage = run.stage("model", inputs=[last])
    if stage.complete:
        print("export: complete, nothing to do")
        return

    import os
    import shutil

    from shared.artifacts import new_directory, write_atomic

    with uninterrupted():
        from shared.engines.convert import convert
        from student_trainer.training.student import ADAPTER

    from student_trainer.card import model_card

    for leftover in run.path.glob(".model.*.tmp"):  # of an export that was killed; the stage is ours alone
        shutil.rmtree(leftover, ignore_errors=True)
    print(f"export: converting the student to CTranslate2 {run.recipe.export.quantization}", flush=True)
    checkpoint, recipe = run.path / last, run.recipe
    origin = origin_of(recipe.student.model)
    with new_directory(stage.path) as folder:
        shutil.copytree(checkpoint / "student", folder / "hf", copy_function=_link)
        if (checkpoint / ADAPTER).exists():
            shutil.copytree(checkpoint / ADAPTER, folder / "adapter", copy_function=_link)
        convert(str(checkpoint / "student"), folder / "serving", name=recipe.name, quantization=recipe.export.quantization)
        found = parity(run, folder / "hf", folder / "serving")
        print(f"export: {in_words(found)}", flush=True)
        refuse_another_model(found)
        write_atomic(folder / "README.md", model_card(run, folder, origin=origin, parity=in_words(found)))
    made = [stage.path / name for name in ("hf", "adapter", "serving", "README.md")]
    settings = {**recipe.export.model_dump(mode="json"), "base_model": origin}
    stage.finish([path for path in made if path.exists()], settings=settings, counts={"parity": found})
    size = os.path.getsize(stage.path / "serving" / "model.bin")
    print(f"export: {stage.path}/serving, {recipe.export.quantization}, {size / 1e6:.0f} MB")


def _link(source: str, target: str) -> str:
    """A hard link where the file system has them: the checkpoint and the model are the same bytes."""
    import os
    import shutil

    try:
        os.link(source, target)
        return target
    except OSError:
        return str(shutil.copy2(source, target))


def origin_of(reference: str) -> dict[str, str]:
    """Where the undistilled student came from: name, and for embedded weights licence, package and hashes."""
    from pathlib import Path

    from shared.artifacts import read_json
    from shared.models import hugging_face_model

    file = Path(hugging_face_model(reference)) / "origin.json"
    return {"reference": reference, **(read_json(file) if file.exists() else {})}


def parity(run: Run, hf: Path, serving: Path) -> dict[str, Any]:
    """How alike a Hugging Face folder and a serving folder answer PROMPTS rows, greedily, as `evaluate` bounds and ends answers.

    Returns `prompts` (fewer where rows are few or too long for the model), `identical`, `mean_rouge_l` (F1 in [0, 1], 1 for equal
    answers; None without prompts) and `quantization`. Raises EngineError.
    """
    from itertools import islice

    from shared.engines.local import LocalModel
    from student_trainer.triplets.ranking import rouge_l

    model = LocalModel(serving)
    requests = list(islice((r for r in _asked(run, model.config.kind) if model.fits(r)), PROMPTS))
    served = [completions[0].text.strip() for completions in model.generate(requests)]
    del model  # a large one may not fit beside itself
    pairs = list(zip(_answers_of_transformers(hf, requests), served, strict=True))
    similarity = rouge_l()
    # words of other scripts have no ROUGE-L: equal texts are equal all the same
    alike = [1.0 if ours == theirs else similarity(ours, theirs) for ours, theirs in pairs]
    return {
        "prompts": len(pairs),
        "identical": sum(ours == theirs for ours, theirs in pairs),
        "mean_rouge_l": round(sum(alike) / len(alike), 4) if alike else None,
        "quantization": run.recipe.export.quantization,
    }


def in_words(found: dict[str, Any]) -> str:
    """What `parity` has found in one phrase."""
    if not found["prompts"]:
        return f"no prompt fits the model, so hf/ and serving/ ({found['quantization']}) were not compared"
    return (
        f"hf/ and serving/ ({found['quantization']}) answer {found['identical']} of {found['prompts']} prompts identically, "
        f"mean ROUGE-L {found['mean_rouge_l']:.2f}"
    )


def refuse_another_model(found: dict[str, Any]) -> None:
    """Raises EngineError if `parity` found a serving folder that is not the model that was trained."""
    if found["quantization"] not in EXACT or not found["prompts"] or found["mean_rouge_l"] >= LEAST_ALIKE:
        return
    exact = found["quantization"] == "float32"
    raise EngineError(
        f"the conversion changed the model: {in_words(found)}, where {LEAST_ALIKE:.2f} is the least. Nothing was exported. "
        + ("" if exact else "Take export.quantization=float32 with another --out (with compose: RUN=name); ")
        + "report this with the name of the model and the versions of torch, transformers and ctranslate2"
    )


def _asked(run: Run, kind: Literal["encoder-decoder", "decoder-only"]) -> Iterator[GenerationRequest]:
    """The rows of validation and train as the student is asked about them."""
    from shared.contracts import GenerationRequest, Sampling
    from shared.datasets.stage import prepare
    from shared.prompts import messages, plain

    rows, task = prepare(run), run.recipe.task
    greedy = Sampling(max_tokens=run.recipe.evaluate.max_tokens, stop=run.recipe.evaluate.stop)
    for example in (*rows["validation"], *rows["train"]):
        if kind == "encoder-decoder":
            yield GenerationRequest(prompt=plain(task, example.question), sampling=greedy)
        else:
            yield GenerationRequest(messages=messages(task, example.question), sampling=greedy)


def _answers_of_transformers(folder: Path, requests: Sequence[GenerationRequest]) -> list[str]:
    """Greedy answers of a Hugging Face folder in float32 on the processor, ended as `LocalModel` ends them; outer blanks removed."""
    from shared.engines.encoding import PromptEncoder
    from shared.settings import TrainSettings
    from student_trainer.training.student import load, padding_token
    from student_trainer.training.validation import Answerer

    if not requests:
        return []
    student, tokenizer = load(folder, TrainSettings(), bf16=False)
    encoder, asked = PromptEncoder.from_transformers(tokenizer), requests[0].sampling
    answer = Answerer(student, tokenizer, padding_token(tokenizer), asked.max_tokens, asked.stop)
    return answer([encoder.encode(request) for request in requests])
