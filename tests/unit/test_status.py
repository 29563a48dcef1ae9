"""`distill status`: what it says of a run in every state, and that it touches nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from shared.artifacts import Ledger, Run, write_atomic, write_jsonl
from shared.cli import main
from shared.contracts import Prediction
from shared.errors import DataError
from shared.settings import Recipe, TeacherSettings
from student_trainer.progress import STAGES, report


def rows(count: int) -> list[Prediction]:
    return [Prediction(system="s", example_id=str(i), text="t") for i in range(count)]


def begun(folder: Path) -> Run:
    return Run.open(folder, Recipe(name="mine", teacher=TeacherSettings(url="http://t/v1")))


def finish(run: Run, name: str, count: int, inputs: tuple[str, ...] = ()) -> Path:
    stage = run.stage(name, inputs=inputs)
    file = stage.path / "rows.jsonl"
    write_jsonl(file, rows(count))
    stage.finish([file], settings={})
    return file


def states(run: Path) -> dict[str, tuple[str, str]]:
    """State and rows of each stage, as printed."""
    lines = [line.split() for line in report(run).splitlines()[3:]]
    return {line[0]: (line[1], line[2]) for line in lines}


def test_a_run_that_has_just_begun_misses_every_stage(tmp_path: Path) -> None:
    begun(tmp_path)
    assert report(tmp_path).startswith(f"{tmp_path}: recipe mine, begun 20")
    assert states(tmp_path) == dict.fromkeys((*STAGES, "registry"), ("missing", "-"))


def test_stages_are_done_partial_or_missing_with_their_rows(tmp_path: Path) -> None:
    run = begun(tmp_path)
    finish(run, "dataset", 3)
    with Ledger(tmp_path / "responses" / "teacher" / "responses.jsonl", Prediction) as ledger:
        for row in rows(5):
            ledger.append(row)
    write_atomic(tmp_path / "registry" / "current.json", "{}")
    found = states(tmp_path)
    assert (found["dataset"], found["responses/teacher"]) == (("done", "3"), ("partial", "5"))
    assert (found["responses/student-r0"], found["registry"]) == (("missing", "-"), ("done", "-"))


def test_a_stage_whose_file_has_grown_or_gone_is_partial_and_one_that_read_other_rows_is_outdated(tmp_path: Path) -> None:
    run = begun(tmp_path)
    finish(run, "dataset", 3)
    finish(run, "responses/teacher", 4, inputs=("dataset",))
    file = finish(run, "triplets/r0", 2, inputs=("responses/teacher",))
    assert states(tmp_path)["triplets/r0"] == ("done", "2")
    finish(run, "dataset", 9)
    assert states(tmp_path)["responses/teacher"] == ("outdated", "4")
    assert states(tmp_path)["triplets/r0"] == ("done", "2")
    file.unlink()
    assert states(tmp_path)["triplets/r0"] == ("partial", "-")


def test_a_ledger_that_is_being_written_is_read_without_its_torn_tail_and_left_alone(tmp_path: Path) -> None:
    begun(tmp_path)
    with Ledger(tmp_path / "responses" / "teacher" / "responses.jsonl", Prediction) as ledger:
        ledger.append(rows(1)[0])
        with ledger.path.open("ab") as other:
            other.write(b'{"half')
        before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
        assert states(tmp_path)["responses/teacher"] == ("partial", "1")
        assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--out", str(tmp_path / "none")]) == DataError.exit_code
    assert "is no run directory" in capsys.readouterr().err


def test_a_damaged_manifest_is_named(tmp_path: Path) -> None:
    run = begun(tmp_path)
    finish(run, "dataset", 3)
    (tmp_path / "dataset" / "manifest.json").write_text("{")
    with pytest.raises(DataError, match=r"dataset/manifest\.json: not a readable manifest"):
        report(tmp_path)


def test_the_table_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begun(tmp_path)
    assert main(["status", "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert all(stage in shown for stage in STAGES)
