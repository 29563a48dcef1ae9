"""Runs, stages, manifests and atomic files."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from shared.artifacts import (
    Run,
    alone_in,
    canonical,
    make_once,
    new_directory,
    read_jsonl,
    sha256_bytes,
    sha256_file,
    write_atomic,
    write_jsonl,
)
from shared.contracts import Prediction
from shared.errors import DataError, RunMismatch, StageOrder, StorageError
from shared.settings import HarvestSettings, Recipe, SampleSettings, TeacherSettings, TrainSettings


def recipe(**changes: object) -> Recipe:
    return Recipe(**{"name": "r", "teacher": TeacherSettings(url="http://t/v1"), **changes})  # type: ignore[arg-type]


def finished(run: Run, name: str, content: str, inputs: tuple[str, ...] = ()) -> Path:
    stage = run.stage(name, inputs=inputs)
    file = stage.path / "rows.jsonl"
    write_atomic(file, content)
    stage.finish([file], settings={"a": 1}, counts={"rows": 2})
    return file


# files


def test_an_atomic_write_that_does_not_fit_leaves_what_was_there_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "f"
    write_atomic(file, "old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
        with pytest.raises(StorageError, match="f: "):
            write_atomic(file, "x" * 101)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert file.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_a_directory_takes_the_place_of_the_old_one_only_when_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "d"
    with new_directory(target) as folder:
        (folder / "one").write_text("1")
    with pytest.raises(ZeroDivisionError), new_directory(target) as folder:
        (folder / "two").write_text(str(1 // 0))
    assert [p.name for p in target.iterdir()] == ["one"]
    with new_directory(target) as folder:
        (folder / "three").write_text("3")
    assert [p.name for p in target.iterdir()] == ["three"]
    assert [p.name for p in tmp_path.iterdir()] == ["d"]


def test_a_directory_is_never_left_with_a_part_of_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(BaseException):
        pass

    def kill_within(path: Path, ignore_errors: bool = False) -> None:
        if path.exists():
            next(path.iterdir()).unlink()
            raise Killed

    target = tmp_path / "d"

    def write(content: str, then: Callable[[], object] = lambda: None) -> None:
        with new_directory(target) as folder:
            for name in ("one", "two"):
                (folder / name).write_text(content)
            then()

    write("old")
    with monkeypatch.context() as patched, pytest.raises(Killed):
        write("new", then=lambda: patched.setattr("shared.artifacts.shutil.rmtree", kill_within))
    assert [(target / name).read_text() for name in ("one", "two")] == ["new", "new"]
    with new_directory(target):
        pass  # sweeps what was left
    assert list(tmp_path.iterdir()) == [target]


def test_a_directory_that_cannot_be_named_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*anything: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    target = tmp_path / "d"
    with new_directory(target) as folder:
        (folder / "one").write_text("1")
    with pytest.raises(StorageError), new_directory(target):
        monkeypatch.setattr(os, "replace", refuse)
    assert [p.name for p in target.iterdir()] == ["one"]
    assert list(tmp_path.iterdir()) == [target]


def test_processes_with_one_pid_in_two_containers_do_not_write_the_same_temporary(tmp_path: Path) -> None:
    (tmp_path / f".d.another-host.{os.getpid()}.tmp").mkdir()  # of a process in another container that is still at work
    with new_directory(tmp_path / "d") as folder:
        assert folder.name == f".d.{socket.gethostname()}.{os.getpid()}.tmp"
    assert sorted(p.name for p in tmp_path.iterdir()) == [f".d.another-host.{os.getpid()}.tmp", "d"]


@given(st.dictionaries(st.text(), st.one_of(st.integers(), st.text(), st.lists(st.booleans()))))
def test_the_hashed_form_does_not_depend_on_the_order_of_keys(value: dict[str, object]) -> None:
    assert canonical(value) == canonical(dict(reversed(value.items())))
    assert json.loads(canonical(value)) == value


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"system": "s", "example_id": "2"}', "line 2: text: Field required"),
        ('{"system": "s", "example_id": "2", "text": "t", "odd": 1}', "line 2: odd: Extra inputs are not permitted"),
        ("nonsense", "line 2: "),
        ("", "line 2: "),
    ],
)
def test_a_bad_row_is_named_by_file_line_and_field(tmp_path: Path, line: str, said: str) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text(f'{{"system": "s", "example_id": "1", "text": "t"}}\n{line}\n')
    with pytest.raises(DataError, match=f"p.jsonl, {said}"):
        read_jsonl(file, Prediction)


def test_rows_that_are_not_utf_8_and_files_that_are_not_there_are_data_errors(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_bytes(b'{"text": "\xff"}\n')
    with pytest.raises(DataError, match="not UTF-8"):
        read_jsonl(tmp_path / "p.jsonl", Prediction)
    with pytest.raises(DataError, match=r"none\.jsonl: No such file"):
        read_jsonl(tmp_path / "none.jsonl", Prediction)


@given(st.lists(st.text()))
def test_rows_survive_being_written_and_read(texts: list[str]) -> None:
    import tempfile

    rows = [Prediction(system="s", example_id=str(i), text=text) for i, text in enumerate(texts)]
    with tempfile.TemporaryDirectory() as folder:
        write_jsonl(Path(folder) / "p.jsonl", rows)
        assert read_jsonl(Path(folder) / "p.jsonl", Prediction) == rows


# runs


def test_a_run_goes_on_with_its_own_recipe_and_refuses_another_with_the_difference_shown(tmp_path: Path) -> None:
    Run.open(tmp_path / "run", recipe())
    (tmp_path / "run" / "dataset").mkdir()
    Run.open(tmp_path / "run", recipe())
    with pytest.raises(RunMismatch) as caught:
        Run.open(tmp_path / "run", recipe(seed=4, train=TrainSettings(epochs=9)))
    assert "seed: the run has 0, you ask for 4; train.epochs: the run has 3.0, you ask for 9.0" in str(caught.value)


def test_a_run_that_failed_before_it_did_anything_may_be_begun_again_with_mended_settings(tmp_path: Path) -> None:
    Run.open(tmp_path / "run", recipe())
    (tmp_path / "run" / ".locks").mkdir()
    (tmp_path / "run" / "teacher.log").touch()
    Run.open(tmp_path / "run", recipe(seed=4))
    (tmp_path / "run" / "dataset").mkdir()
    Run.open(tmp_path / "run", recipe(seed=4))
    with pytest.raises(RunMismatch, match="seed: the run has 4, you ask for 0"):
        Run.open(tmp_path / "run", recipe())


def test_a_teacher_that_has_answered_nothing_may_be_mended_and_nothing_else(tmp_path: Path) -> None:
    run, right = tmp_path / "run", {"teacher": TeacherSettings(url="http://right/v1"), "harvest": HarvestSettings(samples=2)}
    Run.open(run, recipe(**right)).stage("dataset").finish([], settings={})
    ledger = run / "responses" / "teacher" / "responses-000001.jsonl"
    ledger.parent.mkdir(parents=True)
    ledger.touch()
    (ledger.parent / "spent.json").write_text("{}")
    Run.open(run, recipe())
    with pytest.raises(RunMismatch, match=r"seed: the run has 0, you ask for 4"):
        Run.open(run, recipe(**right, seed=4))
    Run.open(run, recipe(**right))
    ledger.write_text("an answer\n")
    with pytest.raises(RunMismatch, match=r"harvest\.samples: .*; teacher\.url: the run has 'http://right/v1'"):
        Run.open(run, recipe())
    Run.open(run, recipe(**right, sample=SampleSettings(samples=7)))  # the student has answered nothing


@pytest.mark.parametrize(
    "there", ["responses/teacher/manifest.json", "responses/teacher/cluster.json", "responses/teacher/partitions/0/a.jsonl"]
)
def test_a_teacher_may_not_be_mended_where_answers_are_elsewhere_or_none_were_wanted(tmp_path: Path, there: str) -> None:
    Run.open(tmp_path / "run", recipe())
    (tmp_path / "run" / there).parent.mkdir(parents=True)
    (tmp_path / "run" / there).write_text("{}")
    with pytest.raises(RunMismatch, match=r"teacher\.model"):
        Run.open(tmp_path / "run", recipe(teacher=TeacherSettings(url="http://t/v1", model="m")))


def test_a_teacher_may_not_be_mended_while_another_process_asks_it(tmp_path: Path) -> None:
    Run.open(tmp_path, recipe())
    (tmp_path / "dataset").mkdir()
    mended = recipe(teacher=TeacherSettings(url="http://t/v1", model="m"))
    with asking_in_another_process(tmp_path), pytest.raises(RunMismatch, match=r"teacher\.model"):
        Run.open(tmp_path, mended)
    Run.open(tmp_path, mended).stage("responses/teacher")
    # and who had opened the run before, and begins only now, meets the one that has it
    assert "at work on the stage responses/teacher" in open_in_another_process(tmp_path, "responses/teacher")


def test_a_run_may_go_on_with_more_patience_and_another_concurrency(tmp_path: Path) -> None:
    Run.open(tmp_path / "run", recipe())
    (tmp_path / "run" / "responses" / "teacher").mkdir(parents=True)
    (tmp_path / "run" / "responses" / "teacher" / "responses-000001.jsonl").write_text("an answer\n")
    patient = Recipe(name="r", teacher=TeacherSettings(url="http://t/v1", timeout_s=999, max_attempts=9))
    Run.open(tmp_path / "run", patient)
    Run.open(tmp_path / "run", recipe(harvest=HarvestSettings(concurrency=1, max_failed_fraction=0.5)))
    with pytest.raises(RunMismatch, match=r"harvest\.samples"):
        Run.open(tmp_path / "run", recipe(harvest=HarvestSettings(concurrency=1, samples=2)))


def test_a_secret_is_never_written_and_does_not_make_another_run(tmp_path: Path) -> None:
    Run.open(tmp_path / "run", Recipe(name="r", teacher=TeacherSettings(url="http://t/v1", api_key=SecretStr("hush-hush"))))
    assert "hush" not in (tmp_path / "run" / "run.json").read_text()
    Run.open(tmp_path / "run", recipe())


def test_a_folder_of_somebody_else_is_refused_and_an_empty_one_taken(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.tex").write_text("years of work")
    with pytest.raises(RunMismatch, match="is no run directory"):
        Run.open(tmp_path / "taken", recipe())
    with pytest.raises(RunMismatch, match="is no run directory"):
        Run.open(tmp_path / "taken" / "thesis.tex", recipe())
    (tmp_path / "empty").mkdir()
    Run.open(tmp_path / "empty", recipe())


def test_a_fresh_volume_may_become_a_run(tmp_path: Path) -> None:
    (tmp_path / "run" / "lost+found").mkdir(parents=True)
    Run.open(tmp_path / "run", recipe())


def test_makers_in_one_cache_wait_for_each_other_and_sweep_what_killed_ones_left(tmp_path: Path) -> None:
    (tmp_path / ".model.elsewhere.7.tmp").mkdir()
    order: list[str] = []
    inside = threading.Event()

    def other() -> None:
        inside.wait()
        with alone_in(tmp_path):
            order.append("other")

    thread = threading.Thread(target=other)
    thread.start()
    with alone_in(tmp_path):
        assert not list(tmp_path.glob(".*.tmp"))
        inside.set()
        time.sleep(0.2)
        order.append("first")
    thread.join()
    assert order == ["first", "other"]


MAKE_ONCE = """
import sys, time
from pathlib import Path
from shared.artifacts import make_once, new_directory
def make(out):
    print("made", flush=True)
    time.sleep(0.3)
    with new_directory(out) as folder:
        (folder / "last").touch()
assert (make_once(Path(sys.argv[1]), "last", make) / "last").exists()
"""


def test_of_several_that_need_the_same_thing_of_a_cache_one_makes_it(tmp_path: Path) -> None:
    command = [sys.executable, "-c", MAKE_ONCE, str(tmp_path / "cache" / "model")]
    makers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert sorted(maker.communicate()[0] for maker in makers) == ["", "", "made\n"]
    assert [maker.returncode for maker in makers] == [0, 0, 0]


def test_what_a_cache_holds_needs_no_lock_and_what_is_missing_where_nothing_can_be_made_names_who_makes_it(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "last").touch()
    make_once(tmp_path / "model", "last", lambda out: pytest.fail("made again"))
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    with pytest.raises(StorageError, match=r"cannot be made here \(.*\); run `distill prepare` with the same recipe first") as caught:
        make_once(tmp_path / "model" / "last" / "other", "last", lambda out: pytest.fail("made without a place for it"))
    assert "--out" not in str(caught.value)


def test_a_run_killed_while_it_was_begun_can_be_begun_again(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".run.json.a-host.123.tmp").write_text('{"reci')
    Run.open(tmp_path / "run", recipe())


@pytest.mark.parametrize("content", ["{}", "[]", "nonsense"])
def test_a_damaged_run_file_is_a_data_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(DataError, match=r"run\.json"):
        Run.open(tmp_path, recipe())


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("theirs", [None, 1, 2])
def test_a_run_of_another_format_is_refused_with_the_remedy_before_anything_is_written(tmp_path: Path, theirs: int | None) -> None:
    Run.open(tmp_path, recipe())
    file = tmp_path / "run.json"
    description = json.loads(file.read_text())
    assert description.pop("format") == 3
    file.write_text(json.dumps(description | ({"format": theirs} if theirs else {})))
    before = content(tmp_path)
    said = rf"run\.json: format {theirs or 1}, .* format 3; use the one that wrote it, or give another --out .*RUN=name"
    with pytest.raises(RunMismatch, match=said):
        Run.open(tmp_path, recipe())
    assert content(tmp_path) == before


def test_a_registry_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "format.json").write_text('{"format": 1}')
    with pytest.raises(RunMismatch, match="is no run directory"):
        Run.open(tmp_path, recipe())
    assert content(tmp_path) == {"format.json": b'{"format": 1}'}


# stages


def test_a_stage_is_complete_exactly_when_its_manifest_is_there_and_true(tmp_path: Path) -> None:
    run = Run.open(tmp_path, recipe())
    assert not run.stage("a").complete
    file = finished(run, "a", "one\n")
    assert run.stage("a").complete
    with file.open("a") as rows:
        rows.write("two\n")
    assert not run.stage("a").complete
    file.write_text("one\n")
    assert run.stage("a").complete
    file.unlink()
    assert not run.stage("a").complete


def test_a_stage_is_no_longer_complete_when_what_it_read_was_made_anew_otherwise(tmp_path: Path) -> None:
    run = Run.open(tmp_path, recipe())
    finished(run, "a", "one\n")
    finished(run, "b", "two\n", inputs=("a",))
    assert run.stage("b", inputs=["a"]).complete
    finished(run, "a", "one\n")
    assert run.stage("b", inputs=["a"]).complete
    finished(run, "a", "other\n")
    assert not run.stage("b", inputs=["a"]).complete


@pytest.mark.parametrize("content", ["on", "two\n", None])
def test_what_a_stage_reads_is_what_its_own_stage_wrote(tmp_path: Path, content: str | None) -> None:
    run = Run.open(tmp_path, recipe())
    file = finished(run, "triplets/r0", "one\n")
    stage = run.stage("b", inputs=["triplets/r0"])
    stage.refuse_changed_inputs()
    file.unlink()
    if content is not None:
        file.write_text(content)
    with pytest.raises(DataError, match=r"rows\.jsonl is not what `distill triplets` wrote.*remove that manifest\.json and run"):
        stage.refuse_changed_inputs()


OPEN_A_STAGE = """
import sys
from pathlib import Path
from shared.artifacts import Run
from shared.errors import StorageError
from shared.settings import Recipe, TeacherSettings
try:
    Run(Path(sys.argv[1]), Recipe(name="r", teacher=TeacherSettings(url="http://t/v1"))).stage(sys.argv[2])
    print("opened")
except StorageError as exc:
    print(exc)
"""


@contextmanager
def asking_in_another_process(run: Path) -> Iterator[None]:
    """Its stage responses/teacher is open meanwhile."""
    command = [sys.executable, "-u", "-c", OPEN_A_STAGE + "input()", str(run), "responses/teacher"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "opened\n"
        yield
        process.communicate("\n")


def open_in_another_process(run: Path, stage: str) -> str:
    command = [sys.executable, "-c", OPEN_A_STAGE, str(run), stage]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_a_stage_that_one_process_has_opened_is_refused_to_others_until_it_ends(tmp_path: Path) -> None:
    run = Run.open(tmp_path, recipe())
    assert open_in_another_process(tmp_path, "a") == "opened\n"
    run.stage("a")
    run.stage("a")
    assert f"process {os.getpid()} on {socket.gethostname()} is at work on the stage a" in open_in_another_process(tmp_path, "a")
    assert open_in_another_process(tmp_path, "b") == "opened\n"


def test_a_stage_before_its_turn_is_refused_with_the_one_that_is_missing(tmp_path: Path) -> None:
    run = Run.open(tmp_path, recipe())
    with pytest.raises(StageOrder, match=r"triplets reads dataset/.* run `distill prepare` first"):
        run.stage("triplets", inputs=["dataset"])
    for missing, command in (("responses/teacher", "harvest"), ("responses/student-r1", "train"), ("triplets/r0", "triplets")):
        with pytest.raises(StageOrder, match=f"run `distill {command}` first"):
            run.stage("later", inputs=[missing])


def test_a_manifest_names_every_file_of_a_folder_with_its_hash_and_size_and_no_leftovers(tmp_path: Path) -> None:
    run = Run.open(tmp_path, recipe())
    stage = run.stage("model")
    write_atomic(stage.path / "serving" / "a.bin", b"abc")
    write_atomic(stage.path / "serving" / "deep" / "b.bin", b"")
    (stage.path / "serving" / ".b.bin.77.tmp").write_bytes(b"torn")
    manifest = stage.finish([stage.path / "serving"], settings={}, counts={"n": 1})
    assert [(o.path, o.sha256, o.bytes) for o in manifest.outputs] == [
        ("model/serving/a.bin", sha256_bytes(b"abc"), 3),
        ("model/serving/deep/b.bin", sha256_file(Path(os.devnull)), 0),
    ]
    assert run.manifest("model") == manifest
    assert manifest.versions["python"]


def test_a_damaged_manifest_is_a_data_error(tmp_path: Path) -> None:
    run = Run.open(tmp_path, recipe())
    finished(run, "a", "one\n")
    (tmp_path / "a" / "manifest.json").write_text("{}")
    with pytest.raises(DataError, match="not a readable manifest"):
        run.manifest("a")
