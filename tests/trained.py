"""Runs whose triplets are ready, for a tiny random student: what a training stage needs."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import tiny_models

from shared.artifacts import Run, write_jsonl
from shared.contracts import Triplet
from shared.settings import Recipe, load_settings

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

    def words(number: int) -> str:
        return " ".join(f"w{draw.randrange(tiny_models.WORDS)}" for _ in range(number))

    scores = {"chosen_source": "teacher", "rejected_source": "student", "chosen_score": 1.0, "rejected_score": 0.0}
    rows = []
    for i in range(count):
        prompt, chosen = words(draw.randint(4, 12)), words(4)
        rows += [Triplet(example_id=f"e{i}", prompt=prompt, chosen=chosen, rejected=words(3), **scores) for _ in range(2)]
    return rows


def run_with(path: Path, model: Path, rows: list[Triplet], **train: Any) -> list[str]:
    """A run whose triplets are ready; returns the arguments of `distill`."""
    recipe = path.with_suffix(".yaml")
    recipe.write_text(RECIPE % (model, json.dumps({**TRAIN, **train})))
    stage = Run.open(path, load_settings(Recipe, flags={}, yaml_file=recipe)).stage("triplets/r0")
    write_jsonl(stage.path / "triplets.jsonl", rows)
    stage.finish([stage.path / "triplets.jsonl"], settings={})
    return ["train", "--recipe", str(recipe), "--out", str(path)]


def checkpoint(run: Path, number: int = 0) -> Path:
    """The folder of a round of training."""
    return run / "checkpoints" / f"r{number}"
