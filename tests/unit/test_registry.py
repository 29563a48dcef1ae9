"""The registry: what is served, what was, and what survives a kill."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from shared import registry as store
from shared.errors import DataError, PromotionRefused, RunMismatch, StorageError


@pytest.fixture
def registry(tmp_path):
    return tmp_path / "registry"


def folder(tmp_path, weights: str):
    path = tmp_path / f"serving-{weights}"
    path.mkdir(exist_ok=True)
    for name, content in {"model.bin": weights, "serving.json": "{}", "tokenizer.json": "{}"}.items():
        (path / name).write_text(content)
    return path


def promote(registry, serving, **changes):
    settings = {"name": "demo", "task": {"shots": 3}, "scores": {"rougeL": 0.4}, "run": "runs/demo", "reason": "better"}
    return store.promote(registry, serving, **{**settings, **changes})


def events(registry):
    return [(event.what, event.version) for event in store.history(registry)]


def test_before_the_first_promotion_nothing_is_served(registry):
    assert store.current(registry) is None
    assert store.history(registry) == []


def test_a_promoted_folder_is_copied_and_served_with_all_that_prompts_need(registry, tmp_path):
    card = tmp_path / "README.md"
    card.write_text("card")
    promoted = promote(registry, folder(tmp_path, "a"), attachments=[card])
    assert store.current(registry) == promoted
    assert (promoted.name, promoted.task, promoted.scores) == ("demo", {"shots": 3}, {"rougeL": 0.4})
    assert (store.serving_path(registry, promoted) / "model.bin").read_text() == "a"
    assert (registry / "versions" / promoted.version / "README.md").read_text() == "card"
    store.verify(registry, promoted)


def test_the_same_content_promoted_twice_is_one_version_and_one_event(registry, tmp_path):
    first = promote(registry, folder(tmp_path, "a"))
    assert promote(registry, folder(tmp_path, "a")) == first
    assert events(registry) == [("promoted", first.version)]


def test_the_same_weights_for_another_task_are_another_version(registry, tmp_path):
    first = promote(registry, folder(tmp_path, "a"))
    assert promote(registry, folder(tmp_path, "a"), task={"shots": 0}).version != first.version


def test_rollbacks_go_back_one_version_each_and_end_at_the_first(registry, tmp_path):
    a, b, c = (promote(registry, folder(tmp_path, weights)).version for weights in "abc")
    assert store.rollback(registry).version == b
    assert store.rollback(registry).version == a
    with pytest.raises(PromotionRefused, match=f"nothing was served before version {a}"):
        store.rollback(registry)
    assert store.current(registry).version == a
    assert events(registry) == [("promoted", a), ("promoted", b), ("promoted", c), ("rolled back", b), ("rolled back", a)]


def test_what_is_promoted_after_a_rollback_has_the_rolled_back_version_behind_it(registry, tmp_path):
    a, b = (promote(registry, folder(tmp_path, weights)).version for weights in "ab")
    store.rollback(registry)
    again = promote(registry, folder(tmp_path, "b"))
    assert again.version == b
    assert store.rollback(registry).version == a


def test_a_rollback_without_a_registry_makes_none(registry):
    with pytest.raises(PromotionRefused, match="nothing has been promoted"):
        store.rollback(registry)
    assert not registry.exists()


def test_a_rollback_to_a_damaged_version_is_refused_and_changes_nothing(registry, tmp_path):
    a, b = (promote(registry, folder(tmp_path, weights)) for weights in "ab")
    (store.serving_path(registry, a) / "model.bin").write_text("x")
    with pytest.raises(DataError, match=r"model\.bin"):
        store.rollback(registry)
    assert store.current(registry) == b


@pytest.mark.parametrize("damage", ["changed", "missing", "added"])
def test_verify_names_the_file_that_is_not_what_was_promoted(registry, tmp_path, damage):
    promoted = promote(registry, folder(tmp_path, "a"))
    file = store.serving_path(registry, promoted) / ("extra.json" if damage == "added" else "model.bin")
    file.unlink() if damage == "missing" else file.write_text("x")
    with pytest.raises(DataError, match=file.name):
        store.verify(registry, promoted)


def test_a_damaged_version_promoted_again_is_whole_again(registry, tmp_path):
    promoted = promote(registry, folder(tmp_path, "a"))
    promote(registry, folder(tmp_path, "b"))
    (store.serving_path(registry, promoted) / "model.bin").unlink()
    again = promote(registry, folder(tmp_path, "a"))
    store.verify(registry, again)
    assert store.current(registry) == again


def test_a_refusal_is_remembered_with_its_reason_and_changes_nothing(registry, tmp_path):
    promoted = promote(registry, folder(tmp_path, "a"))
    store.record_refusal(registry, reason="p = 0.4", run="runs/demo", scores={"rougeL": 0.2})
    assert store.current(registry) == promoted
    last = store.history(registry)[-1]
    assert (last.what, last.version, last.reason, last.scores) == ("refused", promoted.version, "p = 0.4", {"rougeL": 0.2})


def test_an_incomplete_serving_folder_is_refused_by_the_name_of_what_it_lacks(registry, tmp_path):
    serving = folder(tmp_path, "a")
    (serving / "tokenizer.json").unlink()
    with pytest.raises(DataError, match=r"tokenizer\.json"):
        promote(registry, serving)
    assert store.current(registry) is None


def test_a_second_writer_is_refused_while_the_first_is_at_work(registry, tmp_path):
    promoted = promote(registry, folder(tmp_path, "a"))
    with store._writing(registry, "promoting runs/other"):
        with pytest.raises(StorageError, match=r"another process is promoting runs/other \(process \d+ on .*changed nothing"):
            promote(registry, folder(tmp_path, "b"))
        assert store.current(registry) == promoted  # a reader needs no lock


def test_a_refusal_waits_for_the_promotion_under_way_instead_of_being_lost(registry, tmp_path):
    promote(registry, folder(tmp_path, "a"))
    with ThreadPoolExecutor() as pool:
        with store._writing(registry, "promoting runs/other"):
            noting = pool.submit(store.record_refusal, registry, reason="p = 0.4", run="runs/demo", scores={})
            time.sleep(0.2)
            assert not noting.done()
        noting.result(20)
    assert store.history(registry)[-1].reason == "p = 0.4"


def test_a_writer_that_was_killed_keeps_nobody_out_and_is_not_named_later(registry, tmp_path):
    promote(registry, folder(tmp_path, "a"))
    killed("copying", registry, folder(tmp_path, "b"))
    assert "promoting r (process" in (registry / ".writer").read_text()
    promote(registry, folder(tmp_path, "c"))
    assert (registry / ".writer").read_text() == ""


def test_half_written_files_of_a_killed_promotion_are_removed_by_the_next(registry, tmp_path):
    promote(registry, folder(tmp_path, "a"))
    (registry / ".current.json.host.1.tmp").write_text('{"version"')
    promote(registry, folder(tmp_path, "b"))
    assert not list(registry.rglob("*.tmp"))


def test_a_version_is_found_by_its_id_by_the_beginning_of_it_or_of_its_hash_and_by_two_words(registry, tmp_path):
    a, b = (promote(registry, folder(tmp_path, weights)) for weights in "ab")
    for promoted, word in ((a, "previous"), (b, "current")):
        stamp, _, digest = promoted.version.partition("-")
        for name in (word, promoted.version, f"{stamp}-{digest[:6]}", digest[:6]):
            assert store.find(registry, name) == promoted


@pytest.mark.parametrize("name", ["20", "ffff", "", "previous"])
def test_a_name_that_fits_no_version_or_several_is_refused_with_those_there_are(registry, tmp_path, name):
    a = promote(registry, folder(tmp_path, "a"))
    if name == "previous":
        with pytest.raises(DataError, match=f"nothing was served before version {a.version}"):
            store.find(registry, name)
        return
    b = promote(registry, folder(tmp_path, "b"))
    said = "may be any of" if name == "20" else "no version"
    with pytest.raises(DataError, match=said) as caught:
        store.find(registry, name)
    assert a.version in str(caught.value)
    assert b.version in str(caught.value)


def test_in_an_empty_registry_nothing_is_found_and_that_is_said(registry):
    with pytest.raises(DataError, match="nothing has been promoted"):
        store.find(registry, "current")


@pytest.mark.parametrize("damage", ["{", "{}", "of another"])
def test_a_damaged_version_is_an_error_in_its_place_and_the_others_are_told(registry, tmp_path, damage):
    a, b = (promote(registry, folder(tmp_path, weights)) for weights in "ab")
    file = registry / "versions" / a.version / "promoted.json"
    file.write_text(b.model_dump_json() if damage == "of another" else damage)
    found = store.versions(registry)
    assert found[b.version] == b
    assert str(file) in str(found[a.version])
    with pytest.raises(DataError, match=r"promoted\.json"):
        store.find(registry, a.version)


def test_a_damaged_pointer_is_told_not_taken_for_an_empty_registry(registry, tmp_path):
    promote(registry, folder(tmp_path, "a"))
    (registry / "current.json").write_text('{"version": "x"}')
    with pytest.raises(DataError, match=r"current\.json"):
        store.current(registry)


def test_a_registry_says_its_format_and_one_of_0_1_0_that_does_not_is_of_format_1(registry, tmp_path):
    promoted = promote(registry, folder(tmp_path, "a"))
    assert (registry / "format.json").read_text() == '{\n  "format": 1\n}\n'
    (registry / "format.json").unlink()
    assert store.current(registry) == promoted
    assert promote(registry, folder(tmp_path, "b")) == store.current(registry)
    assert (registry / "format.json").exists()


def ways(registry, tmp_path):
    """Everything that reads or writes a registry."""
    return {
        "current": lambda: store.current(registry),
        "history": lambda: store.history(registry),
        "promote": lambda: promote(registry, folder(tmp_path, "a")),
        "rollback": lambda: store.rollback(registry),
        "versions": lambda: store.versions(registry),
        "find": lambda: store.find(registry, "current"),
        "refusal": lambda: store.record_refusal(registry, reason="r", run="r", scores={}),
    }


@pytest.mark.parametrize("way", ways(None, None))
@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("format.json", r"format 2, .* format 1; use the one that wrote it, or give another --registry"),
        ("run.json", r"is a run directory and no registry; the run's own is .*registry/registry"),
        ("a-run/run.json", "is not empty and is no registry"),
    ],
)
def test_another_format_a_run_and_a_folder_of_runs_are_refused_and_left_as_they_are(registry, tmp_path, way, file, said):
    (registry / file).parent.mkdir(parents=True)
    (registry / file).write_text('{"format": 2}')
    with pytest.raises(RunMismatch, match=said):
        ways(registry, tmp_path)[way]()
    assert [p for p in registry.rglob("*") if p.is_file()] == [registry / file]


def test_a_file_is_no_registry_and_a_folder_with_nothing_but_hidden_files_may_become_one(registry, tmp_path):
    registry.write_text("x")
    with pytest.raises(RunMismatch, match="is no registry"):
        store.current(registry)
    registry.unlink()
    registry.mkdir()
    (registry / ".gitkeep").touch()
    assert store.current(registry) is None
    promote(registry, folder(tmp_path, "a"))


def test_a_rollback_stands_for_the_run_it_was_about_until_the_next_promotion(registry, tmp_path, capsys):
    def stays(run: str) -> bool:
        return store.stays_rolled_back(registry, Path(run))

    assert not stays("a")
    for run in "ab":
        promote(registry, folder(tmp_path, run), run=str(Path(run).resolve()))
    assert not stays("b")
    store.rollback(registry)
    store.record_refusal(registry, reason="r", run="r", scores={})
    assert stays("b")
    assert "left as it is" in capsys.readouterr().out
    assert not stays("c")  # it has never been promoted: a rollback of others is no word on it
    promote(registry, folder(tmp_path, "b"), run=str(Path("b").resolve()))
    assert not stays("b")


def test_a_fresh_volume_may_become_a_registry(registry, tmp_path):
    (registry / "lost+found").mkdir(parents=True)
    assert store.current(registry) is None
    promote(registry, folder(tmp_path, "a"))


KILLED = """
import os, sys
from pathlib import Path
from shared import registry as store
target, moment = Path(sys.argv[1]), sys.argv[2]
if moment == "copying":
    store.shutil.copytree = lambda source, to: (to.mkdir(), (to / "model.bin").write_text("half"), os._exit(9))
else:
    store.Ledger.append = lambda self, row: os._exit(9)
store.promote(target, Path(sys.argv[3]), name="demo", task={}, scores={}, run="r", reason="better")
"""


def killed(moment, registry, serving):
    command = [sys.executable, "-c", textwrap.dedent(KILLED), str(registry), moment, str(serving)]
    assert subprocess.run(command, check=False).returncode == 9


def test_a_promotion_killed_while_copying_leaves_what_was_served_and_can_be_repeated(registry, tmp_path):
    before = promote(registry, folder(tmp_path, "a"))
    killed("copying", registry, folder(tmp_path, "b"))
    assert store.current(registry) == before
    after = promote(registry, folder(tmp_path, "b"))
    store.verify(registry, after)
    assert sorted(p.name for p in (registry / "versions").iterdir()) == sorted([before.version, after.version])


def test_a_promotion_killed_before_its_line_of_history_gets_the_line_from_the_next_writer(registry, tmp_path):
    before = promote(registry, folder(tmp_path, "a"))
    killed("telling", registry, folder(tmp_path, "b"))
    served = store.current(registry)
    assert served.version != before.version
    assert store.rollback(registry).version == before.version
    assert events(registry) == [("promoted", before.version), ("promoted", served.version), ("rolled back", before.version)]


def test_a_torn_last_line_of_history_is_not_read(registry, tmp_path):
    promoted = promote(registry, folder(tmp_path, "a"))
    with (registry / "history.jsonl").open("a") as file:
        file.write('{"at": "2026')
    assert events(registry) == [("promoted", promoted.version)]
