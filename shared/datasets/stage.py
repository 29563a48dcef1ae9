"""The stage `dataset`: a run's rows, written once into the run and read from there by every other stage."""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Sequence
from typing import get_args

from shared.artifacts import Run, Stage, read_jsonl, write_jsonl
from shared.contracts import Example, Split
from shared.datasets.load import load
from shared.datasets.overlap import overlaps, refuse_overlaps
from shared.datasets.rows import Dataset
from shared.errors import DataError, StorageError
from shared.settings import cache_dir

STAGE = "dataset"
SPLITS: tuple[Split, ...] = get_args(Split)


def prepare(run: Run, dataset: Dataset | None = None) -> dict[Split, list[Example]]:
    """The rows of a run by split; the first call writes RUN/dataset/ and prints one line, later ones read it and print nothing.

    `dataset`: the recipe's, where it is loaded already. Two processes may call it at once: one writes, the other waits and reads.
    Raises RunMismatch, SettingsError, DataError, LeakageError if a test row shares text with one of another split, StorageError.
    """
    stage = None
    if run.manifest(STAGE) is None:
        # loaded before the stage is opened: it is locked while open, and two stages may begin together
        dataset = dataset or load(run.recipe.dataset, cache_dir())
        stage = _open(run)
    Run.open(run.path, run.recipe)  # until a run has rows, another recipe may have taken it over
    if stage is not None and dataset is not None and not stage.complete:
        # the evaluation would refuse it, after all that was paid
        refuse_overlaps(overlaps(dataset.splits), run.recipe.evaluate.allow_overlap)
        _write(stage, dataset)
        print(describe(dataset), flush=True)
    return {split: read_jsonl(run.path / STAGE / f"{split}.jsonl", Example) for split in SPLITS}


def _open(run: Run, *, patience_s: float = 10.0) -> Stage | None:
    """The stage, once no other process has it open; None if another has finished it in the meantime."""
    deadline = time.monotonic() + patience_s
    while run.manifest(STAGE) is None:
        try:
            return run.stage(STAGE)
        except StorageError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
    return None


def _write(stage: Stage, dataset: Dataset) -> None:
    files = [stage.path / f"{split}.jsonl" for split in SPLITS]
    for split, file in zip(SPLITS, files, strict=True):
        write_jsonl(file, dataset.splits[split])
    stage.finish(
        files,
        settings={"dataset": stage.run.recipe.dataset.model_dump(mode="json")},
        counts={**dataset.census, "source": dataclasses.asdict(dataset.source)},
    )


def describe(dataset: Dataset) -> str:
    """One line: the rows of each split, and how many rows were dropped and why."""
    kept = ", ".join(f"{count} {split}" for split, count in dataset.census["kept"].items())
    dropped = ", ".join(f"{count} {reason}" for reason, count in dataset.census["dropped"].items() if count)
    return f"dataset: {dataset.name}, {dataset.census['read']} rows read: {kept}; dropped: {dropped or 'none'}"


def shots(run: Run, train: Sequence[Example], k: int) -> tuple[Example, ...]:
    """`k` solved examples for few-shot prompts, drawn by the recipe's seed from the train rows that have a reference.

    They come from the shorter half by the length of the question: every shot is read again with every prompt, and a small model
    forgets what stood before a long one. Whoever asks about a train row must leave that row out of its own shots.
    Raises DataError if there are fewer than `k` such rows.
    """
    solved = sorted((e for e in train if e.summary is not None), key=lambda e: (len(e.question), e.id))
    if len(solved) < k:
        raise DataError(
            f"{k} shots need {k} train rows with a reference, and there are {len(solved)}; lower harvest.shots or task.shots, "
            "or give more rows"
        )
    return tuple(random.Random(run.recipe.seed).sample(solved[: max(k, (len(solved) + 1) // 2)], k))
