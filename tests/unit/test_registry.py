"""The registry: what is served, what was, and what survives a kill."""

from __future__ import annotations

import contextlib
import json
import re
import resource
import shutil
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


def lose(registry, promoted, how):
    """Take a version's folder away, or change a file of it."""
    if how == "gone":
        shutil.rmtree(registry / "versions" / promoted.version)
    else:
        (store.serving_path(registry, promoted) / "model.bin").write_text("x")


def test_a_rollback_passes_over_versions_that_are_gone_or_damaged_and_its_reason_says_so(registry, tmp_path):
    a, b, c, d, e = (promote(registry, folder(tmp_path, weights)) for weights in "abcde")
    lose(registry, c, "damaged")
    lose(registry, d, "gone")
    found = store.rollback(registry, reason="it repeats itself")
    assert found == store.current(registry)
    assert (found.version, found.served_before) == (b.version, (a.version,))
    last = store.history(registry)[-1]
    assert (last.what, last.version) == ("rolled back", b.version)
    assert last.reason.startswith(f"from {e.version}: it repeats itself; passed over: version {d.version} is gone; passed over: ")
    assert f"version {c.version} is not what was promoted (model.bin changed" in last.reason
    assert store.rollback(registry).version == a.version


def test_a_rollback_where_no_version_before_is_whole_is_refused_with_every_one_and_changes_nothing(registry, tmp_path):
    a, b, c = (promote(registry, folder(tmp_path, weights)) for weights in "abc")
    lose(registry, a, "damaged")
    lose(registry, b, "gone")
    told = events(registry)
    with pytest.raises(DataError, match=f"version {b.version} is gone; .*version {a.version} is not what was .*; {c.version} stays served"):
        store.rollback(registry)
    assert store.current(registry) == c
    assert events(registry) == told


def test_a_rollback_never_goes_back_to_the_version_that_is_served(registry, tmp_path):
    a, b, again = (promote(registry, folder(tmp_path, weights)) for weights in "aba")
    lose(registry, b, "gone")
    with pytest.raises(DataError, match=f"version {b.version} is gone; {a.version} stays served"):
        store.rollback(registry)
    assert store.current(registry) == again


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
    version = promote(registry, folder(tmp_path, "a")).version
    for place, name in ((registry, "current"), (registry / "versions" / version, "promoted")):
        (place / f".{name}.json.host.1.tmp").write_text('{"version"')
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


@pytest.mark.parametrize("damage", ["{", '{"share": 0.1}', "a share of 1"])
def test_a_damaged_canary_is_told_with_the_remedy_which_leaves_what_is_served_and_is_written_down(registry, tmp_path, damage):
    served = promote(registry, folder(tmp_path, "a"))
    promote(registry, folder(tmp_path, "b"), canary=0.1)
    file = registry / "canary.json"
    file.write_text(file.read_text().replace("0.1", "1.0") if damage == "a share of 1" else damage)
    for way in (lambda: store.canary(registry), lambda: promote(registry, folder(tmp_path, "c")), lambda: store.rollback(registry)):
        with pytest.raises(DataError, match=r"canary\.json: .*; remove this file and set the canary again .* what is served stays served"):
            way()
    assert store.current(registry) == served
    file.unlink()
    c = promote(registry, folder(tmp_path, "c"), canary=0.2)
    assert events(registry) == [(what, served.version) for what in ("promoted", "canary", "rolled back", "canary")]
    assert "or canary.json was removed" in store.history(registry)[2].reason
    assert store.canary(registry).promoted == c


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
        "canary": lambda: store.canary(registry),
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


@pytest.mark.parametrize("end", ["rolled back", "still tried", "replaced"])
def test_a_canary_of_a_run_stands_like_a_rollback_until_the_next_promotion(registry, tmp_path, capsys, end):
    def stays(run: str) -> bool:
        return store.stays_rolled_back(registry, Path(run))

    def of(run: str) -> dict[str, str]:
        return {"run": str(Path(run).resolve())}

    promote(registry, folder(tmp_path, "a"), **of("a"))
    promote(registry, folder(tmp_path, "b"), canary=0.1, **of("b"))
    if end == "rolled back":
        store.rollback(registry)
    elif end == "replaced":
        promote(registry, folder(tmp_path, "d"), canary=0.1, **of("d"))
    assert stays("b")
    said = "since it was rolled back" if end == "rolled back" else "since a canary is tried"
    assert said in capsys.readouterr().out
    assert stays("a")  # promoting what is served anew would end the canary that somebody asked for
    assert not stays("c")
    promote(registry, folder(tmp_path, "c"), **of("c"))
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
elif moment == "ending the canary":
    store._end_canary = lambda registry: os._exit(9)
else:
    store.Ledger.append = lambda self, row: os._exit(9)
if sys.argv[3] == "rollback":
    store.rollback(target)
canary = float(sys.argv[4]) if len(sys.argv) > 4 else None
store.promote(target, Path(sys.argv[3]), name="demo", task={}, scores={}, run="r", reason="better", canary=canary)
"""


def killed(moment, registry, *what):
    command = [sys.executable, "-c", textwrap.dedent(KILLED), str(registry), moment, *map(str, what)]
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


def test_a_rollback_from_a_version_served_twice_and_killed_before_its_line_of_history_was_rolled_back_not_promoted(registry, tmp_path):
    a, b, _ = (promote(registry, folder(tmp_path, weights)).version for weights in "aba")
    killed("telling", registry, "rollback")
    assert store.current(registry).version == b
    refuse(registry)
    assert events(registry) == [("promoted", a), ("promoted", b), ("promoted", a), ("rolled back", b), ("refused", b)]


@contextlib.contextmanager
def room_for(size):
    """No file grows beyond so many bytes, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))  # Python ignores the signal of it
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("what", ["promoted", "rolled back"])
def test_a_full_disk_while_the_history_is_told_says_that_the_version_is_served_and_the_next_writer_tells_it(registry, tmp_path, what):
    a, b = (promote(registry, folder(tmp_path, weights)).version for weights in "ab")
    serving = folder(tmp_path, "c")
    store.record_refusal(registry, reason="long " * 2000, run="r", scores={})  # beside it all other files are small
    with room_for((registry / "history.jsonl").stat().st_size), pytest.raises(StorageError) as caught:
        promote(registry, serving) if what == "promoted" else store.rollback(registry)
    served = store.current(registry).version
    assert (served == a, served == b) == (what == "rolled back", False)
    assert re.match(rf"version {served} is served now, and the history could not be told: .*history\.jsonl", str(caught.value))
    refuse(registry)
    assert events(registry)[-2:] == [(what, served), ("refused", served)]


def test_the_served_version_promoted_anew_and_killed_before_its_line_of_history_was_promoted_not_rolled_back(registry, tmp_path):
    serving = folder(tmp_path, "a")
    a = promote(registry, serving, task={})
    killed("telling", registry, serving)  # other scores
    assert store.current(registry).scores == {}
    store.record_refusal(registry, reason="r", run="r", scores={})
    assert events(registry) == [("promoted", a.version), ("promoted", a.version), ("refused", a.version)]


def tried_beside(registry, tmp_path):
    """A registry with a canary: what is served, and the canary."""
    return promote(registry, folder(tmp_path, "a")), promote(registry, folder(tmp_path, "b"), canary=0.1)


def refuse(registry):
    """The least that a writer can do."""
    store.record_refusal(registry, reason="r", run="r", scores={})


def test_a_canary_is_a_whole_version_that_is_tried_while_what_is_served_stays_served(registry, tmp_path):
    served, tried = tried_beside(registry, tmp_path)
    assert store.current(registry) == served
    assert store.canary(registry) == store.Canary(promoted=tried, share=0.1)
    store.verify(registry, tried)
    assert set(store.versions(registry)) == {served.version, tried.version}
    last = store.history(registry)[-1]
    assert (last.what, last.version, last.at, last.run) == ("canary", served.version, tried.promoted_at, "runs/demo")
    assert last.reason == f"version {tried.version} gets 10% of the requests: better"
    assert store.find(registry, "canary") == store.find(registry, tried.version) == tried


def test_without_a_canary_there_is_none_to_find(registry, tmp_path):
    promote(registry, folder(tmp_path, "a"))
    assert store.canary(registry) is None
    with pytest.raises(DataError, match="there is no canary; `distill promote --canary"):
        store.find(registry, "canary")


def test_a_registry_that_never_had_a_canary_holds_nothing_that_the_version_before_could_not_read(registry, tmp_path):
    first, _ = (promote(registry, folder(tmp_path, weights)) for weights in "ab")
    store.rollback(registry)
    fields = {"version", "folder", "name", "task", "scores", "sha256", "run", "promoted_at", "served_before"}
    for file in (registry / "current.json", registry / "versions" / first.version / "promoted.json"):
        assert json.loads(file.read_text()).keys() == fields
    assert {path.name for path in registry.iterdir()} == {"format.json", "versions", "current.json", "history.jsonl", ".writer"}
    keys = [set(json.loads(line)) for line in (registry / "history.jsonl").read_text().splitlines()]
    assert keys == [{"at", "what", "version", "reason", "run", "scores"}] * 3
    assert (registry / "format.json").read_text() == '{\n  "format": 1\n}\n'


def test_a_canary_where_nothing_is_served_is_refused_with_the_remedy_and_makes_no_registry(registry, tmp_path):
    with pytest.raises(PromotionRefused, match=r"nothing is served yet .* promote without --canary"):
        promote(registry, folder(tmp_path, "a"), canary=0.1)
    assert not registry.exists()


def test_the_served_version_is_refused_as_a_canary_and_the_canary_there_is_stays(registry, tmp_path):
    served, tried = tried_beside(registry, tmp_path)
    with pytest.raises(PromotionRefused, match=f"version {served.version} is served already.* nothing to try"):
        promote(registry, folder(tmp_path, "a"), canary=0.5)
    assert store.canary(registry).promoted == tried
    assert len(events(registry)) == 2


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, 10.0, float("nan")])
def test_a_share_that_is_none_is_refused_before_anything_is_copied(registry, tmp_path, share):
    served = promote(registry, folder(tmp_path, "a"))
    with pytest.raises(ValueError, match="no share between 0 and 1"):
        promote(registry, folder(tmp_path, "b"), canary=share)
    assert set(store.versions(registry)) == {served.version}


def test_a_second_canary_takes_the_place_of_the_first_and_the_same_once_more_is_nothing_to_do(registry, tmp_path):
    served, first = tried_beside(registry, tmp_path)
    assert promote(registry, folder(tmp_path, "b"), canary=0.1) == first
    wider = promote(registry, folder(tmp_path, "b"), canary=0.5)
    assert (wider.version, store.canary(registry).share) == (first.version, 0.5)
    other = promote(registry, folder(tmp_path, "c"), canary=0.5)
    assert store.canary(registry) == store.Canary(promoted=other, share=0.5)
    assert events(registry) == [("promoted", served.version)] + [("canary", served.version)] * 3
    assert store.current(registry) == served


@pytest.mark.parametrize("weights", ["a", "b", "c"])
def test_a_promotion_ends_the_canary_be_it_of_the_canary_of_another_or_of_what_is_served(registry, tmp_path, weights):
    served, tried = tried_beside(registry, tmp_path)
    promoted = promote(registry, folder(tmp_path, weights))
    assert store.current(registry) == promoted
    assert (promoted.version == tried.version, promoted.version == served.version) == (weights == "b", weights == "a")
    assert promoted.served_before == (() if weights == "a" else (served.version,))
    assert store.canary(registry) is None
    assert not (registry / "canary.json").exists()
    assert events(registry) == [("promoted", served.version), ("canary", served.version), ("promoted", promoted.version)]


def test_the_first_rollback_ends_the_canary_and_nothing_else_the_next_goes_back(registry, tmp_path):
    first = promote(registry, folder(tmp_path, "first"))
    served = promote(registry, folder(tmp_path, "a"), run="runs/a")
    tried = promote(registry, folder(tmp_path, "b"), run="runs/b", canary=0.1)
    assert store.rollback(registry, reason="it repeats itself") == served == store.current(registry)
    assert store.canary(registry) is None
    last = store.history(registry)[-1]
    assert (last.what, last.version, last.run) == ("rolled back", served.version, "runs/b")
    assert last.reason == f"canary {tried.version}: it repeats itself"
    assert store.rollback(registry).version == first.version
    assert store.history(registry)[-1].reason == f"from {served.version}: asked for"


def test_a_canary_beside_the_first_version_can_be_rolled_back_and_then_nothing_else(registry, tmp_path):
    served, _ = tried_beside(registry, tmp_path)
    assert store.rollback(registry) == served
    with pytest.raises(PromotionRefused, match="nothing was served before"):
        store.rollback(registry)


def test_a_canary_that_is_promoted_after_another_promotion_has_that_one_behind_it(registry, tmp_path):
    served, tried = tried_beside(registry, tmp_path)
    between = promote(registry, folder(tmp_path, "c"))
    assert promote(registry, folder(tmp_path, "b")).served_before == (served.version, between.version)
    assert store.current(registry).version == tried.version


@pytest.mark.parametrize("weights", ["b", "c"])
def test_a_promotion_killed_before_the_canary_is_removed_has_ended_it_for_readers_and_the_next_writer_removes_it(
    registry, tmp_path, weights
):
    served, tried = tried_beside(registry, tmp_path)
    serving = folder(tmp_path, weights)
    if weights == "b":  # the version that is tried, and no other with its weights
        tried = promote(registry, serving, task={}, canary=0.1)
    killed("ending the canary", registry, serving)
    now = store.current(registry)
    assert (now.version == tried.version) == (weights == "b")
    assert (registry / "canary.json").exists()
    assert store.canary(registry) is None
    refuse(registry)
    assert not (registry / "canary.json").exists()
    assert events(registry)[-2:] == [("promoted", now.version), ("refused", now.version)]
    assert store.rollback(registry).version == served.version


def test_what_is_served_promoted_anew_and_killed_before_the_canary_is_removed_leaves_that_to_the_next_writer(registry, tmp_path):
    serving = folder(tmp_path, "a")
    promote(registry, serving, task={})
    tried = promote(registry, folder(tmp_path, "b"), canary=0.1)
    killed("ending the canary", registry, serving)  # other scores
    assert store.canary(registry).promoted == tried  # beside the same version as before: as if it had not been promoted yet
    refuse(registry)
    assert store.canary(registry) is None
    assert [what for what, _ in events(registry)] == ["promoted", "canary", "promoted", "refused"]


def test_a_canary_killed_while_it_is_copied_leaves_the_one_before(registry, tmp_path):
    _, tried = tried_beside(registry, tmp_path)
    killed("copying", registry, folder(tmp_path, "c"), 0.3)
    assert store.canary(registry) == store.Canary(promoted=tried, share=0.1)
    again = promote(registry, folder(tmp_path, "c"), canary=0.3)
    assert store.canary(registry).promoted == again
    store.verify(registry, again)


def test_a_canary_killed_before_its_line_of_history_gets_the_line_from_the_next_writer(registry, tmp_path):
    served = promote(registry, folder(tmp_path, "a"))
    killed("telling", registry, folder(tmp_path, "b"), 0.25)
    tried = store.canary(registry)
    assert tried.share == 0.25
    refuse(registry)
    told = store.history(registry)[1]
    assert (told.what, told.version, told.at, told.run) == ("canary", served.version, tried.promoted.promoted_at, "r")
    assert told.reason.startswith(f"version {tried.promoted.version} gets 25% of the requests: written down late")
    assert store.canary(registry) == tried


def test_a_canary_rolled_back_and_killed_before_the_line_of_history_is_over_and_told_once_by_the_next_writer(registry, tmp_path):
    served = promote(registry, folder(tmp_path, "a"))
    promote(registry, folder(tmp_path, "b"), run=str(tmp_path / "b"), canary=0.1)
    killed("telling", registry, "rollback")
    assert store.canary(registry) is None
    for _ in range(2):
        refuse(registry)
    assert events(registry) == [(what, served.version) for what in ("promoted", "canary", "rolled back", "refused", "refused")]
    assert store.history(registry)[2].run == str(tmp_path / "b")
    assert store.stays_rolled_back(registry, tmp_path / "b")


def test_a_torn_last_line_of_history_is_not_read(registry, tmp_path):
    promoted = promote(registry, folder(tmp_path, "a"))
    with (registry / "history.jsonl").open("a") as file:
        file.write('{"at": "2026')
    assert events(registry) == [("promoted", promoted.version)]
