"""Runs whose triplets are ready, for a tiny random student: what a training stage needs."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tiny_models

from shared.artifacts import Run, write_jsonl
from shared.contracts import Response, Triplet
from shared.datasets.stage import prepare
from shared.settings import Recipe, load_settings
from student_trainer.triplets.build import build

TRAIN = {"epochs": 30, "batch_size": 2, "learning_rate": 0.003, "checkpoint_steps": 5, "precision": "fp32", "validate_every": 0}
RECIPE = """\
name: tiny
teacher: {url: http://127.0.0.1:9/v1}
student: {model: %s}
train: %s
"""


def folder(path: Path, kind: str = "decoder-only") -> Path:
    """A random student in Hugging Face format."""
    if kind == "decoder-only":
        return tiny_models.save_folder(tiny_models.tiny_llama(), tiny_models.tokenizer(appends_eos=False, chat=True), path)
    return tiny_models.save_folder(tiny_models.tiny_t5(), tiny_models.tokenizer(appends_eos=True), path)


def triplets(seed: int = 0, *, count: int = 6) -> list[Triplet]:
    """Two pairs for each of `count` examples."""
    draw = random.Random(seed)
    scores = {"chosen_source": "teacher", "rejected_source": "student", "chosen_score": 1.0, "rejected_score": 0.0}
    rows = []
    for i in range(count):
        prompt, chosen = words(draw, draw.randint(4, 12)), words(draw, 4)
        rows += [Triplet(example_id=f"e{i}", prompt=prompt, chosen=chosen, rejected=words(draw, 3), **scores) for _ in range(2)]
    return rows


def run_with(path: Path, model: Path, rows: list[Triplet], **train: Any) -> list[str]:
    """A run whose triplets are ready; returns the arguments of `distill`."""
    recipe = path.with_suffix(".yaml")
    recipe.write_text(RECIPE % (model, json.dumps({**TRAIN, **train})))
    run = Run.open(path, load_settings(Recipe, flags={}, yaml_file=recipe))
    if run.recipe.train.validate_every:
        prepare(run)
    stage = run.stage("triplets/r0")
    write_jsonl(stage.path / "triplets.jsonl", rows)
    stage.finish([stage.path / "triplets.jsonl"], settings={})
    return ["train", "--recipe", str(recipe), "--out", str(path)]


def checkpoint(run: Path, number: int = 0) -> Path:
    """The folder of a round of training."""
    return run / "checkpoints" / f"r{number}"


def words(draw: random.Random, count: int) -> str:
    return " ".join(f"w{draw.randrange(tiny_models.WORDS)}" for _ in range(count))


def answered_run(path: Path, model: Path, *, seed: int = 0, train: Mapping[str, Any] = {}, **settings: Any) -> list[str]:
    """A run with rows of its own and with the answers of teacher and undistilled student; returns the arguments of `distill`."""
    draw = random.Random(seed)
    data, recipe = path.with_suffix(".jsonl"), path.with_suffix(".yaml")
    rows = [{"question": words(draw, 6), "summary": words(draw, 4)} for _ in range(24)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {
        "name": "tiny",
        "teacher": {"url": "http://127.0.0.1:9/v1"},
        "student": {"model": str(model)},
        "dataset": {"name": "file", "path": str(data), "validation_rows": 5, "test_rows": 5},
        "task": {"instruction": "w1"},
        "sample": {"samples": 2, "max_tokens": 6},
        "triplets": {"max_rejected": 1, "margin": 0.01},
        "export": {"quantization": "float32"},
        "train": {**TRAIN, "epochs": 3, "batch_size": 4, "checkpoint_steps": 2, "validation_max_tokens": 6, **train},
        **settings,
    }
    recipe.write_text(json.dumps(given))
    run = Run.open(path, load_settings(Recipe, flags={}, yaml_file=recipe))
    for name in ("responses/teacher", "responses/student-r0"):
        ledger = []
        for example in prepare(run)["train"]:
            for sample in range(3):
                said = example.summary if name == "responses/teacher" and sample == 0 else words(draw, 4)
                ledger.append(answer(example.id, sample, said or ""))
        stage = run.stage(name, ["dataset"])
        write_jsonl(stage.path / "responses.jsonl", ledger)
        stage.finish([stage.path / "responses.jsonl"], settings={})
    build(run)
    return ["train", "--recipe", str(recipe), "--out", str(path)]


def answer(example_id: str, sample: int, text: str) -> Response:
    """A line of a ledger."""
    return Response(
        key=f"{example_id}-{sample}",
        example_id=example_id,
        sample=sample,
        status="ok",
        text=text,
        finish_reason="stop",
        model="m",
        latency_s=0.1,
        attempts=1,
        received_at="2026-01-01T00:00:00.000+00:00",
    )
