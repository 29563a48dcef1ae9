"""How far a run is, read off its files alone: nothing is opened for writing and nothing locked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import ValidationError

from shared.artifacts import read_json
from shared.contracts import FileRef, Manifest
from shared.errors import DataError

TEACHER_LEDGER = "responses/teacher"


def stages_of(rounds: int) -> tuple[str, ...]:
    """The stages of a run with so many rounds of training, in order."""
    names = ["dataset", TEACHER_LEDGER]
    for number in range(rounds):
        names += [f"responses/student-r{number}", f"triplets/r{number}", f"checkpoints/r{number}"]
    return (*names, "model", "evaluation")


STAGES = stages_of(1)
State = Literal["missing", "partial", "done", "outdated"]
STATES: tuple[State, ...] = get_args(State)


def report(run: Path) -> str:
    """A table of the stages and what is served. Raises DataError for a folder that is no run, and for a damaged manifest."""
    if not (run / "run.json").is_file():
        raise DataError(f"{run} is no run directory (it has no run.json); give --out the directory that a stage wrote to")
    description = read_json(run / "run.json")
    try:
        name, created = description["recipe"]["name"], description["created_at"]
    except (KeyError, TypeError) as exc:
        raise DataError(f"{run / 'run.json'}: no recipe.name and created_at in it; it is damaged") from exc
    stages = stages_of(_rounds(description))
    manifests = {stage: manifest for stage in stages if (manifest := stage_manifest(run, stage))}
    states = stage_states(run, stages, manifests)
    table = [("stage", "state", "rows", "seconds", "when")]
    table += [_line(run, stage, states[stage], manifests.get(stage)) for stage in stages]
    table.append(_served(run / "registry"))
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    lines = [f"{s:{widths[0]}}  {t:{widths[1]}}  {r:>{widths[2]}}  {u:>{widths[3]}}  {w}".rstrip() for s, t, r, u, w in table]
    return "\n".join([f"{run}: recipe {name}, begun {created}", "", *lines])


def unfinished(run: Path) -> list[str]:
    """The stages that are missing, partial or outdated. Raises DataError for a damaged manifest."""
    stages = stages_of(_rounds(read_json(run / "run.json")))
    manifests = {stage: manifest for stage in stages if (manifest := stage_manifest(run, stage))}
    return [stage for stage, state in stage_states(run, stages, manifests).items() if state != "done"]


def _rounds(description: Any) -> int:
    """Rounds of training that the recipe of a run wants. Raises DataError for a damaged run.json."""
    try:
        return int(description["recipe"]["train"]["rounds"])
    except (KeyError, TypeError, ValueError) as exc:
        raise DataError(f"run.json has no whole recipe in it (train.rounds: {exc!r}); it is damaged") from exc


def stage_states(run: Path, stages: Sequence[str], manifests: Mapping[str, Manifest]) -> dict[str, State]:
    """How each stage stands. `manifests`: those there are, by stage."""
    made = {ref for manifest in manifests.values() for ref in manifest.outputs}
    return {stage: _state(run, stage, manifests.get(stage), made) for stage in stages}


def _state(run: Path, stage: str, manifest: Manifest | None, made: set[FileRef]) -> State:
    if manifest is None:
        return "partial" if (run / stage).is_dir() and any((run / stage).iterdir()) else "missing"
    if any((run / stage).glob("responses-*.jsonl")):
        return "partial"  # some answers are being asked for again
    if any(not (run / ref.path).is_file() or (run / ref.path).stat().st_size != ref.bytes for ref in manifest.outputs):
        return "partial"  # a file is gone, or has grown since
    return "done" if made.issuperset(manifest.inputs) else "outdated"  # what it read has been made anew since


def _line(run: Path, stage: str, state: State, manifest: Manifest | None) -> tuple[str, str, str, str, str]:
    rows = _rows(run / stage)
    if manifest is None:
        return stage, state, rows, "-", "-" if state == "missing" else _modified(run / stage)
    return stage, state, rows, f"{manifest.seconds:.1f}", manifest.started_at


def _served(registry: Path) -> tuple[str, str, str, str, str]:
    served = (registry / "current.json").is_file()
    return "registry", "done" if served else "missing", "-", "-", _modified(registry) if served else "-"


def stage_manifest(run: Path, stage: str) -> Manifest | None:
    """The manifest of a stage, None where it has none. Raises DataError for a damaged one."""
    file = run / stage / "manifest.json"
    try:
        return Manifest.model_validate_json(file.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as exc:
        raise DataError(f"{file}: not a readable manifest; remove it and run its stage again: {exc}") from exc


def _rows(folder: Path) -> str:
    """Whole lines of the JSON Lines files of a stage; '-' where it has none."""
    files = sorted(folder.glob("*.jsonl"))
    count = 0
    for file in files:
        with file.open("rb") as lines:
            count += sum(line.endswith(b"\n") for line in lines)
    return str(count) if files else "-"


def _modified(folder: Path) -> str:
    """When anything in a folder last changed: UTC, ISO 8601."""
    newest = max(path.stat().st_mtime for path in (folder, *folder.iterdir()))
    return datetime.fromtimestamp(newest, UTC).isoformat(timespec="milliseconds")
