"""`distill export`: the trained checkpoint becomes RUN/model: a Hugging Face folder, a serving folder and a model card."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shared.commands import open_run, stage_parser, uninterrupted

if TYPE_CHECKING:
    from shared.artifacts import Run


def main(argv: list[str]) -> int:
    export(open_run(stage_parser("export", __doc__).parse_args(argv)))
    return 0


def export(run: Run) -> None:
    """Run the stage `model`. Raises StageOrder, EngineError, StorageError."""
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

    for leftover in run.path.glob(".model.*.tmp"):  # of an export that was killed; the stage is ours alone
        shutil.rmtree(leftover, ignore_errors=True)
    print(f"export: converting the student to CTranslate2 {run.recipe.export.quantization}", flush=True)
    student, recipe = run.path / last / "student", run.recipe
    with new_directory(stage.path) as folder:
        shutil.copytree(student, folder / "hf", copy_function=_link)
        convert(str(student), folder / "serving", name=recipe.name, quantization=recipe.export.quantization)
        origin = origin_of(recipe.student.model)
        write_atomic(folder / "README.md", model_card(run, origin))
    settings = {**recipe.export.model_dump(mode="json"), "base_model": origin}
    stage.finish([stage.path / "hf", stage.path / "serving", stage.path / "README.md"], settings=settings)
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


def model_card(run: Run, origin: dict[str, str]) -> str:
    """The card in the Hub's format: what the model learned from whom."""
    recipe = run.recipe
    licence = f"license: {origin['license'].lower()}\n" if "license" in origin else ""
    came_from = "; ".join(f"{key} {value}" for key, value in origin.items())
    harvest, triplets = run.manifest("responses/teacher"), run.manifest(f"triplets/r{recipe.train.rounds - 1}")
    answers = harvest.counts.get("answers", "?") if harvest else "?"
    pairs = triplets.counts.get("triplets", "?") if triplets else "?"
    return f"""---
base_model: {recipe.student.model}
{licence}tags: [blackbox-distill, orpo, knowledge-distillation]
---
# {recipe.name}

`{recipe.student.model}` distilled from the answers of a black-box teacher (`{recipe.teacher.identity}`, model
`{recipe.teacher.public_name}`) with ORPO (lambda {recipe.train.orpo_lambda}) on {pairs} triplets chosen out of {answers} teacher answers;
data set `{recipe.dataset.name}`.

- `hf/`: Hugging Face format. `serving/`: CTranslate2, {recipe.export.quantization}.
- Base model: {came_from}.
- Task: {recipe.task.instruction or "summarise a health message as one short question"}
- The licences of the base model, of the teacher's terms of use and of the data apply.
- Not medical advice: it restates questions and must not be used to answer them.
"""
