"""Training on a cluster: the processes of `distill train`, started by Ray Train on several nodes instead of torchrun on one.

Whatever torchrun's processes do, these do (student_trainer/training): the run is on a file system that all nodes share, the first process
keeps its files, and a lost worker means that all begin again from the last checkpoint, which is what a killed run does anyway.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
import uuid
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Any

from shared.artifacts import Run
from shared.cluster.ways import connected, error_of, here, refuse_unless_ready, workers_of
from shared.errors import DistillError, SettingsError, TrainingError
from shared.settings import Recipe
from shared.storage import Storage
from student_trainer.training.rounds import PATIENCE, stage_name

ATTEMPTS = 3
"""Losses of workers in a row without a new checkpoint in between; then it is not bad luck."""
NODE_S = 120.0
"""Seconds in which a node that is lost may be replaced, as where nodes are started when they are needed."""
NOTES = ".ray-train"
"""Of Ray Train's own, in the run directory while it trains."""


class Board:
    """Where a process of the training writes why it ends, as an actor: Ray would tell of all processes at once, in its own words."""

    def __init__(self) -> None:
        self._error: tuple[str, str] | None = None

    def write(self, name: str, message: str) -> None:
        self._error = self._error or (name, message)

    def read(self) -> tuple[str, str] | None:
        return self._error


def train_on_cluster(run: Run, on: str, *, workers: int | None = None, require_gpu: bool = False) -> None:
    """As `train_rounds`, one process a GPU of the cluster, or a node where it has none, or `workers` of them.

    Raises what that raises, and SettingsError for a cluster that cannot be used.
    """
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")  # it makes two of every line
    with connected(on, logs=True) as ray:
        nodes = refuse_unless_ready(ray, Storage(str(run.path)))
        gpus = int(ray.cluster_resources().get("GPU", 0))
        if require_gpu and not gpus:
            raise TrainingError(f"--require-gpu: the cluster {on} has no GPU to give")
        nodes_with_processors = sum(node["Alive"] and node["Resources"].get("CPU", 0) > 0 for node in ray.nodes())
        number = workers_of(ray, workers if workers is not None else gpus or nodes_with_processors, gpus=bool(gpus))
        print(
            f"train: {number} processes on {nodes} node{'s' if nodes > 1 else ''}, {'one GPU each' if gpus else 'without GPUs'}", flush=True
        )
        board = ray.remote(Board).options(num_cpus=0, scheduling_strategy=here(ray)).remote()
        try:
            _attempts(ray, run, board, number=number, gpus=bool(gpus))
        finally:
            shutil.rmtree(run.path / NOTES, ignore_errors=True)


def _attempts(ray: Any, run: Run, board: Any, *, number: int, gpus: bool) -> None:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    reached, lost = _standing(run), 0
    while True:
        _wait_for_nodes(ray, number, gpus=gpus)
        trainer = TorchTrainer(
            _process,
            train_loop_config={"path": str(run.path.absolute()), "recipe": run.recipe, "board": board},
            scaling_config=ScalingConfig(num_workers=number, use_gpu=gpus),
            torch_config=TorchConfig(backend=None if gpus else "gloo", timeout_s=int(PATIENCE.total_seconds())),
            run_config=RunConfig(
                name=uuid.uuid4().hex[:12],
                storage_path=str((run.path / NOTES).absolute()),
                # by default it waits for ever for a node that is gone
                failure_config=FailureConfig(controller_failure_limit=0),
            ),
        )
        try:
            _fit(trainer)
            return
        except Exception as exc:
            if (told := ray.get(board.read.remote())) is not None:
                raise error_of(*told) from None
            now = _standing(run)
            reached, lost = now, 1 if now != reached else lost + 1
            if lost == ATTEMPTS:
                said = str(exc).strip().splitlines()
                raise TrainingError(f"{ATTEMPTS} times in a row a process was lost; the last time: {said[-1] if said else exc!r}") from exc
            print("train: a process was lost; all begin again from the last checkpoint", flush=True)


def _fit(trainer: Any) -> None:
    """`trainer.fit()` on another thread: on the main one Ray takes a Ctrl-C for itself. Raises what that raises."""
    outcome: Future[None] = Future()

    def fit() -> None:
        try:
            trainer.fit()
            outcome.set_result(None)
        except BaseException as exc:
            outcome.set_exception(exc)

    threading.Thread(target=fit, daemon=True).start()
    outcome.result()


def _wait_for_nodes(ray: Any, number: int, *, gpus: bool) -> None:
    """Return when the cluster has processors enough. Raises SettingsError where it has not after NODE_S."""
    deadline = time.monotonic() + NODE_S
    waiting = False
    while True:
        try:
            workers_of(ray, number, gpus=gpus)
            return
        except SettingsError:
            if time.monotonic() > deadline:
                raise
        if not waiting:
            print(f"train: a node was lost; waiting {NODE_S:g} s for another one", flush=True)
            waiting = True
        time.sleep(1)


def _process(config: dict[str, Any]) -> None:
    """What each process does."""
    from student_trainer.training.rounds import train_rounds

    recipe: Recipe = config["recipe"]
    try:
        train_rounds(Run.open(Path(config["path"]), recipe), before_training=lambda: None)
    except DistillError as exc:
        import ray

        with suppress(Exception):
            ray.get(config["board"].write.remote(type(exc).__name__, str(exc)))
        raise


def _standing(run: Run) -> list[str]:
    """The checkpoints that are there."""
    return sorted(str(path) for number in range(run.recipe.train.rounds) for path in (run.path / stage_name(number)).glob("checkpoint-*"))
