"""`distill export`: the trained checkpoint becomes RUN/model: a Hugging Face folder, a serving folder and a model card.

Before anything stands there, both folders answer the same prompts: what is served has to be what was trained.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from shared.commands import open_run, stage_parser, uninterrupted
from shared.errors import EngineError

if TYPE_CHECKING:
    from pathlib import Path

    from shared.artifacts import Run
    from shared.contracts import GenerationRequest
    from shared.settings import Recipe

PROMPTS = 32
"""Rows that both folders answer: of the validation split, then of the train split."""
LEAST_ALIKE = {"float32": 0.95, "float16": 0.85}
"""Mean ROUGE-L F1 of the two folders' answers below which the conversion is refused, by quantization. In float32 they differ by near-ties
only (1.0 was measured throughout, and at most 0.71 after a wrong rotary base, epsilon or order of layers), in float16 hardly more (0.94 and
above). int8 changes answers by itself (0.46 in tiny random models, rightly converted, 0.81 and 0.87 in SmolLM2-135M): there the same
conversion to float32 is looked at, which is made for that alone."""
EXACT = "float32"


def main(argv: list[str]) -> int:
    export(open_run(stage_parser("export", __doc__).parse_args(argv)))
    return 0


def export(run: Run) -> None:
    """Run the stage `model`. Raises StageOrder, EngineError, StorageError; DataError, SettingsError where the rows are not there yet."""
    last, recipe = f"checkpoints/r{run.recipe.train.rounds - 1}", run.recipe
    stage = run.stage("model", inputs=[last])
    before = run.manifest(stage.name) if stage.complete else None
    if before and before.settings.get("evaluate") == quoted(recipe):
        print("export: complete, nothing to do")
        return

    import os
    import shutil

    from shared.artifacts import new_directory, write_atomic
    from student_trainer.card import model_card, named

    origin = origin_of(recipe.student.model)
    # the manifest lies beside the model, and may be published with it
    base = {**origin, "reference": named(recipe.student.model)}
    settings = {**recipe.export.model_dump(mode="json"), "base_model": base, "evaluate": quoted(recipe)}
    made = [stage.path / name for name in ("hf", "adapter", "serving", "README.md")]
    if before:
        print("export: the model stays, its card is written anew: evaluate.max_tokens or evaluate.stop is another one", flush=True)
        write_atomic(stage.path / "README.md", model_card(run, stage.path, origin=origin, parity=in_words(before.counts)))
        stage.finish([path for path in made if path.exists()], settings=settings, counts=before.counts)
        return
    with uninterrupted():
        from shared.engines.convert import convert
        from student_trainer.training.student import ADAPTER

    for leftover in run.path.glob(".model.*.tmp"):  # of an export that was killed; the stage is ours alone
        shutil.rmtree(leftover, ignore_errors=True)
    print(f"export: converting the student to CTranslate2 {recipe.export.quantization}", flush=True)
    checkpoint = run.path / last
    with new_directory(stage.path) as folder:
        shutil.copytree(checkpoint / "student", folder / "hf", copy_function=_link)
        if (checkpoint / ADAPTER).exists():
            shutil.copytree(checkpoint / ADAPTER, folder / "adapter", copy_function=_link)
            name_the_base(folder / "adapter", recipe.student.model)
        student, served = str(checkpoint / "student"), folder / "serving"
        convert(student, served, name=recipe.name, quantization=recipe.export.quantization)
        exact = served
        if recipe.export.quantization not in LEAST_ALIKE:
            exact = convert(student, folder / EXACT, name=recipe.name, quantization=EXACT)
        found = parity(run, folder / "hf", served, exact)
        if exact != served:
            shutil.rmtree(exact)
        print(f"export: {in_words(found)}", flush=True)
        refuse_another_model(found)
        write_atomic(folder / "README.md", model_card(run, folder, origin=origin, parity=in_words(found)))
    stage.finish([path for path in made if path.exists()], settings=settings, counts=found)
    size = os.path.getsize(stage.path / "serving" / "model.bin")
    print(f"export: {stage.path}/serving, {recipe.export.quantization}, {size / 1e6:.0f} MB")


def quoted(recipe: Recipe) -> dict[str, Any]:
    """What the card says of the evaluation's settings, which may change after the export: then it is written anew."""
    return recipe.evaluate.model_dump(mode="json", include={"max_tokens", "stop"})


def name_the_base(adapter: Path, reference: str) -> None:
    """Let an exported adapter name its base model as others find it; peft has written where it lies on this machine, in a card as well."""
    from shared.artifacts import read_json, write_json
    from student_trainer.card import base_name

    (adapter / "README.md").unlink(missing_ok=True)
    file = adapter / "adapter_config.json"
    write_json(file, {**read_json(file), "base_model_name_or_path": base_name(reference)})


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


def parity(run: Run, hf: Path, served: Path, exact: Path) -> dict[str, dict[str, Any]]:
    """How alike a Hugging Face folder and serving folders answer PROMPTS rows, greedily, as `evaluate` bounds and ends answers.

    served: what is exported; exact: the same, or the same student in float32. Returns `parity` of the first and `conversion` of the
    second, each with `prompts` (fewer where rows are few or too long for the model), `identical`, `mean_rouge_l` (F1 in [0, 1], 1 for
    equal answers; None without prompts) and `quantization`. Raises EngineError.
    """
    from itertools import islice

    from shared.engines.local import LocalModel, read_config
    from student_trainer.triplets.ranking import rouge_l

    requests: list[GenerationRequest] | None = None
    answers: dict[Path, list[str]] = {}
    for folder in dict.fromkeys((served, exact)):
        model = LocalModel(folder)
        if requests is None:
            requests = list(islice((r for r in _asked(run, model.config.kind) if model.fits(r)), PROMPTS))
        answers[folder] = [completions[0].text.strip() for completions in model.generate(requests)]
        del model  # a large one may not fit beside another
    trained, similarity = _answers_of_transformers(hf, requests or []), rouge_l()

    def compared(folder: Path) -> dict[str, Any]:
        pairs = list(zip(trained, answers[folder], strict=True))
        # words of other scripts have no ROUGE-L: equal texts are equal all the same
        alike = [1.0 if ours == theirs else similarity(ours, theirs) for ours, theirs in pairs]
        return {
            "prompts": len(pairs),
            "identical": sum(ours == theirs for ours, theirs in pairs),
            "mean_rouge_l": round(sum(alike) / len(alike), 4) if alike else None,
            "quantization": read_config(folder).quantization,
        }

    return {"parity": compared(served), "conversion": compared(exact)}


def in_words(found: Mapping[str, Any]) -> str:
    """What `parity` has found in one phrase."""
    served = found["parity"]
    exact = found.get("conversion", served)
    if not served["prompts"]:
        return f"no prompt fits the model, so hf/ and serving/ ({served['quantization']}) were not compared"
    words = (
        f"hf/ and serving/ ({served['quantization']}) answer {served['identical']} of {served['prompts']} prompts identically, "
        f"mean ROUGE-L {served['mean_rouge_l']:.2f}"
    )
    if exact == served:
        return words
    return f"{words}; in {exact['quantization']} {exact['identical']} of {exact['prompts']}, mean ROUGE-L {exact['mean_rouge_l']:.2f}"


def refuse_another_model(found: Mapping[str, Any]) -> None:
    """Raises EngineError if `parity` found that the conversion is not the model that was trained."""
    exact = found["conversion"]
    quantization = exact["quantization"]
    if not exact["prompts"] or exact["mean_rouge_l"] >= LEAST_ALIKE[quantization]:
        return
    raise EngineError(
        f"the conversion changed the model: {in_words(found)}, where {LEAST_ALIKE[quantization]:.2f} in {quantization} is the least. "
        "Nothing was exported. "
        + ("" if quantization == EXACT else "Take export.quantization=float32 with another --out (with compose: RUN=name); ")
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
