"""The rounds of training: each after the first lets the student as it then is answer, rejects some of that, and trains on.

Everything of a round is an artefact of its own (responses/student-rN, triplets/rN, checkpoints/rN); what is complete is not done again.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

from shared.artifacts import Run, Stage, temporary_name
from shared.commands import uninterrupted
from student_trainer.sampling import sample
from student_trainer.triplets.build import build

PATIENCE = timedelta(days=1)
"""How long torchrun's other processes wait while the first one samples, validates or writes."""
BEST = "best.safetensors"
"""The best weights so far of a round that is being trained, with what their validation said."""
T = TypeVar("T")


def train_rounds(run: Run, *, before_training: Callable[[], None]) -> None:
    """Run what is missing of all rounds. `before_training` is called before a round is trained and may refuse. Raises DistillError."""
    if several():
        _connect()
    for number in range(run.recipe.train.rounds):
        if first_does(lambda number=number: _is_to_be_trained(run, number)):  # type: ignore[misc]
            with uninterrupted():
                from student_trainer.training.stage import train  # torch: seconds, and only when there is something to train

            before_training()
            train(run, number)
        elif is_first():
            clear(run.path / stage_name(number))  # of a training that was killed between its manifest and its end
            print(f"{stage_name(number)}: complete, nothing to do")


def stage_name(number: int) -> str:
    return f"checkpoints/r{number}"


def checkpoint_stage(run: Run, number: int) -> Stage:
    """The stage checkpoints/rN. Raises StageOrder before what it reads is there."""
    inputs = [f"triplets/r{number}"]
    if number:
        inputs.append(stage_name(number - 1))
    if run.recipe.train.learns_samples:
        inputs.append("responses/teacher")
    if run.recipe.train.validate_every:
        inputs.append("dataset")
    return run.stage(stage_name(number), inputs=inputs)


def _is_to_be_trained(run: Run, number: int) -> bool:
    """After making the round's answers and triplets, if they are missing."""
    if number:
        sample(run, number)
        build(run, number)
    stage = checkpoint_stage(run, number)
    if stage.complete:
        return False
    stage.refuse_changed_inputs()
    return True


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints in `folder`, oldest first: they get their name only when every file is on the disk."""
    return sorted(folder.glob("checkpoint-*"), key=lambda p: int(p.name.rpartition("-")[2]))


def remove_checkpoint(checkpoint: Path) -> None:
    """Take its name away first, so that half a checkpoint is never taken for a whole one."""
    doomed = temporary_name(checkpoint)
    checkpoint.rename(doomed)
    shutil.rmtree(doomed)


def clear(folder: Path) -> None:
    """Remove what only a round that is being trained needs: its checkpoints and its best weights."""
    for checkpoint in checkpoints(folder):
        remove_checkpoint(checkpoint)
    (folder / BEST).unlink(missing_ok=True)
    sweep(folder)


def sweep(folder: Path) -> None:
    """Remove what killed processes left unfinished."""
    for leftover in folder.glob(".*.tmp"):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def several() -> bool:
    """Whether torchrun has started several processes."""
    return os.environ.get("WORLD_SIZE", "1") != "1"


def is_first() -> bool:
    """Whether this process keeps the run's files: the first of torchrun's, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def first_does(work: Callable[[], T]) -> T:
    """What `work()` returns in the first process, which alone calls it; the others wait for it."""
    if not several():
        return work()
    from accelerate.utils import broadcast_object_list

    found: list[T] = broadcast_object_list([work() if is_first() else None])
    return found[0]


def _connect() -> None:
    """Meet the other processes."""
    import torch
    from accelerate import PartialState

    PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)
