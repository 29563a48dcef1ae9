"""GET /v1/run's answer: what is told of a run in every state, that nothing is touched, and that damage is told and hides nothing else."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from evaluated import exported_run, recipe
from monitored import STEP, full_run, harvest, response, train

from shared.artifacts import Run
from shared.errors import DataError
from student_trainer.progress import STAGES
from student_trainer.serving.live import MAX_POINTS, RunState, live

STANDING = {
    "state": "running", "wanted": 330, "answers": 212, "failed": {"empty": 2, "RequestRefused": 1}, "in_flight": 4, "concurrency": 8,
    "rows_per_s": 13.25, "requests": 60, "refused": 0, "cost": None, "waiting": "", "pid": 1, "host": "elsewhere",
}  # fmt: skip
"""What a harvest writes about itself, but for when."""


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run.open(tmp_path / "mine", recipe())


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return full_run(tmp_path_factory.mktemp("full") / "mine").path


@pytest.fixture
def full(made: Path, tmp_path: Path) -> Path:
    """A run with something in every part."""
    return Path(shutil.copytree(made, tmp_path / "full" / "mine"))


def tell(run: Path, *, seconds_ago: float = 0.0, **changes: object) -> Path:
    file = run / "responses" / "teacher" / "progress.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    at = (datetime.now(UTC) - timedelta(seconds=seconds_ago)).isoformat(timespec="milliseconds")
    file.write_text(json.dumps({"at": at, **STANDING, **changes}))
    return file


def stage(state: RunState, name: str) -> tuple[str, int | None, float | None]:
    (found,) = [s for s in state.stages if s.stage == name]
    return found.state, found.rows, found.seconds


def test_a_run_that_has_just_begun_misses_every_stage(run: Run) -> None:
    state = live(run.path)
    assert (state.name, state.harvest, state.training, state.error) == ("trial", None, None, None)
    assert state.begun_at == json.loads((run.path / "run.json").read_text())["created_at"]
    assert [(s.stage, s.state, s.rows, s.seconds) for s in state.stages] == [(name, "missing", None, None) for name in STAGES]


def test_stages_have_a_state_their_rows_and_once_they_have_finished_their_seconds(tmp_path: Path) -> None:
    run = exported_run(tmp_path / "mine")
    harvest(run, response(0), response(1))
    state = live(run.path)
    manifest = json.loads((run.path / "dataset" / "manifest.json").read_text())
    rows = sum(len(file.read_bytes().splitlines()) for file in (run.path / "dataset").glob("*.jsonl"))
    assert stage(state, "dataset") == ("done", rows, manifest["seconds"])
    assert stage(state, "responses/teacher") == ("partial", 2, None)


def test_rows_are_counted_as_they_come_and_the_last_one_once_it_is_whole(run: Run) -> None:
    ledger = harvest(run, response(0))
    assert stage(live(run.path), "responses/teacher")[1] == 1
    line = response(1).model_dump_json()
    for part, rows in ((line[:9], 1), (line[9:], 1), ("\n", 2)):
        with ledger.open("a") as file:
            file.write(part)
        assert stage(live(run.path), "responses/teacher")[1] == rows


def test_a_harvest_is_running_while_it_is_heard_of_dead_after_ten_seconds_and_ended_when_it_says_so(run: Run) -> None:
    tell(run.path)
    found = live(run.path).harvest
    assert found is not None
    assert found.model_dump() == {"state": "running", "answers": 212, "wanted": 330, "rows_per_s": 13.25, "failed": 3}
    tell(run.path, state="ending", wanted=None)
    found = live(run.path).harvest
    assert found is not None
    assert (found.state, found.wanted) == ("running", None)
    for seconds_ago, changes, state in ((11.0, {}, "dead"), (11.0, {"state": "ended"}, "ended"), (0.0, {"state": "ended"}, "ended")):
        tell(run.path, seconds_ago=seconds_ago, **changes)
        found = live(run.path).harvest
        assert found is not None
        assert (found.state, found.rows_per_s) == (state, None)


def test_a_stage_that_was_completed_after_its_harvest_was_killed_has_ended(run: Run) -> None:
    tell(run.path, seconds_ago=60.0)
    run.stage("responses/teacher").finish([harvest(run, response(0))], settings={})
    found = live(run.path).harvest
    assert found is not None
    assert found.state == "ended"


def test_training_is_told_by_its_last_step_with_the_steps_that_its_epochs_make(run: Run) -> None:
    train(run, step=1, epoch=0.25, loss=3.0)
    train(run, step=2, epoch=0.5, loss=2.5, tokens_per_s=640.0)
    found = live(run.path).training
    assert found is not None
    epochs = run.recipe.train.epochs
    assert found.model_dump() == {
        "round": 0,
        "step": 2,
        "wanted_steps": 4 * epochs,
        "tokens_per_s": 640.0,
        "loss": [(1, 3.0), (2, 2.5)],
    }


def test_steps_that_the_recipe_bounds_are_those_wanted(tmp_path: Path) -> None:
    run = Run.open(tmp_path / "mine", recipe(train={"max_steps": 7}))
    train(run)
    found = live(run.path).training
    assert found is not None
    assert found.wanted_steps == 7


def test_the_newest_round_is_told_and_every_round_has_its_stages(tmp_path: Path) -> None:
    run = Run.open(tmp_path / "mine", recipe(train={"rounds": 2}, triplets={"on_policy": 0.5}))
    first = train(run)
    second = run.path / "checkpoints" / "r1" / "log.jsonl"
    second.parent.mkdir()
    second.write_text(json.dumps({**STEP, "step": 1}) + "\n" + first.read_text()[:20])
    state = live(run.path)
    assert state.training is not None
    assert (state.training.round, state.training.step) == (1, 1)
    assert {"responses/student-r1", "triplets/r1", "checkpoints/r1"} <= {s.stage for s in state.stages}


def test_a_log_that_holds_no_whole_line_yet_is_no_training(run: Run) -> None:
    train(run).write_text('{"step": 1')
    state = live(run.path)
    assert (state.training, state.error) == (None, None)


@pytest.mark.parametrize(("steps", "points"), [(1, 1), (2, 2), (199, 199), (200, 200), (201, 200), (10_000, 200)])
def test_a_long_curve_is_thinned_over_its_whole_length(run: Run, steps: int, points: int) -> None:
    file = train(run)
    file.write_text("".join(json.dumps({**STEP, "step": s, "loss": s / 2}) + "\n" for s in range(1, steps + 1)))
    found = live(run.path).training
    assert found is not None
    at = [step for step, _ in found.loss]
    assert points <= MAX_POINTS
    assert (len(at), at[0], at[-1], found.step) == (points, 1, steps, steps)
    assert at == sorted(set(at))
    assert all(loss == step / 2 for step, loss in found.loss)
    gaps = [b - a for a, b in itertools.pairwise(at)]
    assert max(gaps, default=1) - min(gaps, default=1) <= 1


def test_a_log_of_ten_thousand_lines_is_told_in_less_than_fifty_milliseconds(run: Run) -> None:
    train(run).write_text((json.dumps(STEP) + "\n") * 10_000)
    harvest(run, *[response(n) for n in range(50)])
    tell(run.path)

    def seconds() -> float:
        begun = time.perf_counter()
        live(run.path)
        return time.perf_counter() - begun

    assert min(seconds() for _ in range(5)) < 0.05


def test_a_loss_that_is_no_number_is_no_point_and_all_that_is_told_is_json(run: Run) -> None:
    train(run, step=1, loss=2.0)
    train(run, step=2, loss=None)
    train(run, step=3, loss=float("nan"))
    train(run, step=4, loss=1.0)
    state = live(run.path)
    assert state.training is not None
    assert state.training.loss == [(1, 2.0), (4, 1.0)]
    assert state.error is not None
    assert "log.jsonl, line 3: loss" in state.error
    assert "NaN" not in state.model_dump_json()


@pytest.mark.parametrize("damage", [b"", b"{", b"[1]", b"\xff\xfe", b'{"at": "yesterday"}', b"null"])
@pytest.mark.parametrize(
    ("file", "part"),
    [
        ("responses/teacher/progress.json", "harvest"),
        ("dataset/manifest.json", None),
        ("run.json", None),
        ("evaluation/manifest.json", None),
    ],
)
def test_a_damaged_file_is_told_and_the_rest_all_the_same(full: Path, file: str, part: str | None, damage: bytes) -> None:
    tell(full)
    (full / file).write_bytes(damage)
    state = live(full)
    assert state.error is not None
    assert file in state.error
    assert "\n" not in state.error
    assert (state.harvest is None) == (part == "harvest")
    assert state.training is not None
    assert state.training.step == 3
    assert stage(state, "responses/teacher")[1] == 4
    assert state.name == ("mine" if file == "run.json" else "trial")


def test_what_nobody_may_read_and_folders_in_files_places_are_told(run: Run) -> None:
    tell(run.path).unlink()
    (run.path / "responses" / "teacher" / "progress.json").mkdir()
    train(run)
    state = live(run.path)
    assert state.error is not None
    assert "progress.json" in state.error
    assert state.training is not None
    (run.path / "triplets").write_text("no folder")
    assert live(run.path).training is not None


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(DataError, match=r"is no run directory \(it has no run.json\)"):
            live(folder)


def test_nothing_in_the_run_is_touched(full: Path) -> None:
    tell(full)
    before = {path: path.stat().st_mtime_ns for path in full.rglob("*")}
    live(full)
    assert {path: path.stat().st_mtime_ns for path in full.rglob("*")} == before


def test_a_ledger_that_is_compacted_meanwhile_is_counted_anew(run: Run) -> None:
    ledger = harvest(run, response(0), response(1), response(2))
    assert stage(live(run.path), "responses/teacher")[1] == 3
    replacement = ledger.with_suffix(".new")
    replacement.write_text(response(7).model_dump_json() + "\n")
    os.replace(replacement, ledger)
    assert stage(live(run.path), "responses/teacher")[1] == 1
