"""How the run beside the server goes, read off its files alone: nothing is opened for writing and nothing locked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import AwareDatetime, BaseModel, Field, FiniteFloat, ValidationError

from shared.errors import DataError
from shared.http.wire import Answer
from student_trainer.harvest.watch import FRESH_S, PROGRESS
from student_trainer.progress import TEACHER_LEDGER, State, stage_manifest, stage_states, stages_of

MAX_POINTS = 200
"""Of a loss curve, however long the training."""
ModelT = TypeVar("ModelT", bound=BaseModel)


class StageState(Answer):
    stage: str
    state: State
    rows: int | None
    """Whole lines of its JSON Lines files; None where it has none."""
    seconds: float | None
    """Wall time, once it has finished."""


class HarvestState(Answer):
    state: Literal["running", "ended", "dead"]
    answers: int
    wanted: int | None
    rows_per_s: float | None
    """Over the last ten seconds; None for one that does not run."""
    failed: int


class TrainingState(Answer):
    """Of the newest round that has begun."""

    round: int
    step: int
    wanted_steps: int | None
    tokens_per_s: float
    loss: list[tuple[int, float]]
    """(step, loss), at most MAX_POINTS of the whole curve, its last step among them."""


class RunState(Answer):
    """GET /v1/run."""

    name: str
    """The recipe's."""
    begun_at: str | None
    """UTC, ISO 8601."""
    stages: list[StageState]
    """In the order in which they are run."""
    harvest: HarvestState | None
    training: TrainingState | None
    error: str | None
    """Why a part cannot be read; the rest is told all the same."""


class _Train(BaseModel):
    rounds: int = Field(ge=0, le=1000)
    epochs: FiniteFloat
    max_steps: int | None = None


class _Recipe(BaseModel):
    name: str
    train: _Train


class _RunFile(BaseModel):
    """What is read of run.json."""

    recipe: _Recipe
    created_at: str


class _Progress(BaseModel):
    """What is read of responses/teacher/progress.json (Standing in shared/harvest/scheduler.py)."""

    at: AwareDatetime
    state: Literal["running", "ending", "ended"]
    answers: int
    wanted: int | None
    rows_per_s: FiniteFloat
    failed: dict[str, int]


class _Step(BaseModel):
    """What is read of a line of checkpoints/rN/log.jsonl (LogRow in training/record.py)."""

    step: int
    epoch: float = Field(gt=0)
    loss: FiniteFloat | None
    """None: it was no number, and neither is it a point."""
    tokens_per_s: FiniteFloat


def live(run: Path) -> RunState:
    """How the run in a folder goes. Raises DataError for a folder that is no run, and for nothing else."""
    if not (run / "run.json").is_file():
        raise DataError(f"{run} is no run directory (it has no run.json); give the directory that a stage wrote to")
    errors: list[str] = []
    described, stages, harvest, training = None, [], None, None
    with _telling(errors):
        described = _parsed(_RunFile, (run / "run.json").read_bytes(), "run.json")
    rounds = described.recipe.train.rounds if described else 1
    with _telling(errors):
        stages = _stages(run, rounds, errors)
    with _telling(errors):
        harvest = _harvest(run)
    with _telling(errors):
        training = _training(run, rounds, described.recipe.train if described else None, errors)
    return RunState(
        name=described.recipe.name if described else run.name,
        begun_at=described.created_at if described else None,
        stages=stages,
        harvest=harvest,
        training=training,
        error="; ".join(errors).replace(f"{run}/", "") or None,  # where it lies is nobody's affair
    )


@contextmanager
def _telling(errors: list[str]) -> Iterator[None]:
    """What cannot be read in this block is noted; the block ends there. A file that has gone is none: the next look sees what came."""
    try:
        yield
    except FileNotFoundError:
        pass
    except (DataError, OSError) as exc:
        errors.append(str(exc).partition("\n")[0])


def _stages(run: Path, rounds: int, errors: list[str]) -> list[StageState]:
    names, manifests, rows = stages_of(rounds), {}, {}
    for name in names:
        with _telling(errors):
            if manifest := stage_manifest(run, name):
                manifests[name] = manifest
        with _telling(errors):
            files = sorted((run / name).glob("*.jsonl"))
            rows[name] = sum(_lines(file, *_version(file)) for file in files) if files else None
    states = stage_states(run, names, manifests)
    return [StageState(stage=n, state=states[n], rows=rows.get(n), seconds=manifests[n].seconds if n in manifests else None) for n in names]


def _version(file: Path) -> tuple[int, int, int]:
    status = file.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


@lru_cache(maxsize=1024)
def _lines(file: Path, inode: int, size: int, changed_ns: int) -> int:
    """Whole lines of this version of a file: a ledger's full segments, of 64 MiB each, are counted once."""
    with file.open("rb") as lines:
        return sum(chunk.count(b"\n") for chunk in iter(lambda: lines.read(2**20), b""))


def _harvest(run: Path) -> HarvestState | None:
    """As the harvest itself has told last."""
    told = _parsed(_Progress, (run / TEACHER_LEDGER / PROGRESS).read_bytes(), f"{TEACHER_LEDGER}/{PROGRESS}")
    state: Literal["running", "ended", "dead"] = "running"
    if told.state == "ended":
        state = "ended"
    elif (datetime.now(UTC) - told.at).total_seconds() > FRESH_S:
        # it may have been killed after its last answer, and another command have completed the stage
        state = "ended" if (run / TEACHER_LEDGER / "manifest.json").is_file() else "dead"
    return HarvestState(
        state=state,
        answers=told.answers,
        wanted=told.wanted,
        rows_per_s=told.rows_per_s if state == "running" else None,
        failed=sum(told.failed.values()),
    )


def _training(run: Path, rounds: int, settings: _Train | None, errors: list[str]) -> TrainingState | None:
    begun = [number for number in range(rounds) if (run / f"checkpoints/r{number}/log.jsonl").is_file()]
    if not begun:
        return None
    name = f"checkpoints/r{begun[-1]}/log.jsonl"
    lines = (run / name).read_bytes().split(b"\n")[:-1]  # a last line that is being written waits for its end
    # parsing costs more than reading: what is not drawn is not parsed
    most = min(len(lines), MAX_POINTS) - 1
    steps = []
    for number in (round(i * (len(lines) - 1) / (most or 1)) for i in range(most + 1)):
        with _telling(errors):
            steps.append(_parsed(_Step, lines[number], f"{name}, line {number + 1}"))
    if not steps:
        return None
    last = steps[-1]
    return TrainingState(
        round=begun[-1],
        step=last.step,
        wanted_steps=settings and (settings.max_steps or round(settings.epochs * last.step / last.epoch)),
        tokens_per_s=last.tokens_per_s,
        loss=[(step.step, step.loss) for step in steps if step.loss is not None],
    )


def _parsed(model: type[ModelT], content: bytes, name: str) -> ModelT:
    try:
        return model.model_validate_json(content)
    except ValidationError as exc:
        error = exc.errors()[0]
        raise DataError(f"{name}: {'.'.join(map(str, error['loc']))}: {error['msg']}") from exc
