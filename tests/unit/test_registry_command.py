"""`distill registry`: what it says of versions whole and damaged, and what it compares and refuses to compare."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from evaluator.registry import paired
from evaluator.report.contract import Definition, Gate, Report
from shared import registry as store
from shared.artifacts import write_jsonl
from shared.cli import main
from shared.contracts import Example, Prediction
from shared.errors import DataError

REFERENCE = "what is the cause of it"
TEST = [Example(id=f"row-{i}", question=f"question {i}", summary=f"{REFERENCE} {i}") for i in range(12)]


@pytest.fixture
def registry(tmp_path: Path) -> Path:
    return tmp_path / "registry"


def report(settings: dict[str, object]) -> str:
    """A report.json of format 2 that tells no more than a comparison reads."""
    return Report(
        recipe="demo", teacher="t", student="s", dataset={}, metric="rougeL", baseline="student-zero-shot", test_rows=12, systems={},
        not_scored={}, comparisons=[], pairs=[], resamples=500, seed=1, shots=[], training=[], by_length=[], by_type=[], rows=[],
        overlaps=[], judge=None, gate=Gate(rule={}, passed=True, reasons=[]), stages={}, inputs=[], settings=settings, versions={},
        notes=[], metrics={"words": Definition(label="Words", definition="words an answer", better="neither", points=False)},
    ).model_dump_json()  # fmt: skip


def promote(registry: Path, weights: str, **changes: object) -> store.Promoted:
    serving = registry.parent / f"serving-{weights}"
    serving.mkdir(exist_ok=True)
    for name, content in {"model.bin": weights, "serving.json": "{}", "tokenizer.json": "{}"}.items():
        (serving / name).write_text(content)
    scores = {"rouge1": 0.5, "rougeL": 0.4}
    values = {"name": "demo", "task": {"shots": 3}, "scores": scores, "run": f"runs/{weights}", "reason": f"{weights} is better"}
    return store.promote(registry, serving, **{**values, **changes})  # type: ignore[arg-type]


def kept(right: int, test: list[Example] = TEST, settings: dict[str, object] | None = None) -> list[tuple[str, str]]:
    """Attachments of a student that copies the first `right` references and says nothing to the others."""
    answers = [Prediction(system="distilled", example_id=e.id, text=(e.summary or "") if i < right else "") for i, e in enumerate(test)]
    others = [Prediction(system="constant", example_id=e.id, text="x") for e in test]
    found = [] if settings is None else [("report.json", report(settings))]
    return [*found, ("predictions.jsonl", lines([*others, *answers])), ("test.jsonl", lines(test))]


def lines(rows: list[Prediction] | list[Example]) -> str:
    return "".join(row.model_dump_json() + "\n" for row in rows)


def asked(registry: Path, *argv: str) -> int:
    return main(["registry", *argv, "--registry", str(registry)])


def listed(registry: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, dict[str, object]]:
    capsys.readouterr()
    assert asked(registry, "list", "--json") == 0
    return {row["version"]: row for row in json.loads(capsys.readouterr().out)["versions"]}


def test_a_list_shows_the_newest_first_and_which_is_served_and_what_a_rollback_would_serve(
    registry: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    versions = [promote(registry, weights).version for weights in "abc"]
    states = {version: row["state"] for version, row in listed(registry, capsys).items()}
    assert states == dict(zip(versions, ["earlier", "previous", "served"], strict=True))
    store.rollback(registry)
    assert asked(registry, "list") == 0
    head, *rows, last = capsys.readouterr().out.splitlines()
    assert head.split() == ["VERSION", "NAME", "PROMOTED", "(UTC)", "rouge1", "rougeL", "STATE", "RUN"]
    assert [row.split()[0] for row in rows] == sorted(versions, reverse=True)
    by_version = {row.split()[0]: row for row in rows}
    assert by_version[versions[1]].split()[4:] == ["50.0", "40.0", "served", "runs/b"]
    assert "rolled back" in by_version[versions[2]]
    assert last.startswith("rolled back 2")
    assert last.endswith(f": from {versions[2]}: asked for")


def test_a_list_shows_the_canary_with_its_share_and_later_that_it_was_tried(registry: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = promote(registry, "a"), promote(registry, "b", canary=0.125)
    assert asked(registry, "list") == 0
    shown = capsys.readouterr().out.splitlines()
    assert {line.split()[0]: line.split()[6:-1] for line in shown[1:3]} == {a.version: ["served"], b.version: ["canary", "12.5%"]}
    assert shown[3].endswith(f": version {b.version} gets 12.5% of the requests: b is better")
    assert asked(registry, "list", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["served"], told["canary"]) == (a.version, {"version": b.version, "share": 0.125})
    assert {row["version"]: row["state"] for row in told["versions"]} == {a.version: "served", b.version: "canary"}
    store.rollback(registry)
    assert asked(registry, "list", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["canary"] is None
    assert {row["version"]: row["state"] for row in told["versions"]} == {a.version: "served", b.version: "tried"}


def test_a_version_that_was_served_before_may_be_the_canary_and_is_compared_by_that_word(
    registry: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    promote(registry, "a")
    b = promote(registry, "b")
    again = promote(registry, "a", canary=0.5)
    assert {version: row["state"] for version, row in listed(registry, capsys).items()} == {b.version: "served", again.version: "canary"}
    assert asked(registry, "diff", "current", "canary") == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[:2] == [f"A  {b.version}  demo  runs/b", f"B  {again.version}  demo  runs/a"]


def test_a_canary_whose_folder_has_gone_is_listed_as_the_canary_and_damaged(registry: Path, capsys: pytest.CaptureFixture[str]) -> None:
    promote(registry, "a")
    tried = promote(registry, "b", canary=0.1)
    (registry / "versions" / tried.version).rename(registry / "elsewhere")
    row = listed(registry, capsys)[tried.version]
    assert (row["state"], row["name"], row["run"]) == ("canary", "demo", "runs/b")
    assert "is gone" in str(row["error"])


def test_a_list_as_json_has_every_score_and_what_was_refused_since(registry: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store.record_refusal(registry, reason="an old story", run="runs/z", scores={})
    promoted = promote(registry, "a", scores={"chrf": 0.31, "rougeL": 0.4})
    store.record_refusal(registry, reason="p = 0.4", run="runs/c", scores={"rougeL": 0.1})
    assert asked(registry, "list", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["served"] == promoted.version
    assert told["versions"] == [
        {
            "version": promoted.version, "state": "served", "error": None, "name": "demo", "promoted_at": promoted.promoted_at,
            "scores": {"chrf": 0.31, "rougeL": 0.4}, "run": "runs/a",
        }
    ]  # fmt: skip
    assert [(event["reason"], event["run"]) for event in told["refused"]] == [("p = 0.4", "runs/c")]


def test_a_list_tells_the_latest_refusals_and_counts_the_others(registry: Path, capsys: pytest.CaptureFixture[str]) -> None:
    promote(registry, "a")
    for number in range(7):
        store.record_refusal(registry, reason=f"refusal {number}", run="runs/c", scores={})
    assert asked(registry, "list") == 0
    shown = capsys.readouterr().out
    assert "refusal 6 (runs/c)" in shown
    assert "refusal 1 " not in shown
    assert "2 earlier refusals: `distill registry history`" in shown


def test_an_empty_registry_has_nothing_promoted_which_is_no_error_to_list_and_one_to_compare(
    registry: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert asked(registry, "list") == 0
    assert asked(registry, "history") == 0
    assert capsys.readouterr().out == (
        f"{registry}: nothing has been promoted yet (there is no such directory)\n{registry}: nothing has been promoted yet\n"
    )
    assert listed(registry, capsys) == {}
    assert asked(registry, "diff", "previous", "current") == DataError.exit_code
    assert "nothing has been promoted" in capsys.readouterr().err
    assert not registry.exists()


@pytest.mark.parametrize("which", ["a", "b"])
def test_a_damaged_version_is_named_and_listed_with_the_others(registry: Path, capsys: pytest.CaptureFixture[str], which: str) -> None:
    versions = {weights: promote(registry, weights).version for weights in "ab"}
    file = registry / "versions" / versions[which] / "promoted.json"
    file.write_text('{"version"')
    assert asked(registry, "list") == 0
    shown = capsys.readouterr().out
    assert f"damaged: {file}: " in shown
    rows = {line.split()[0]: line for line in shown.splitlines()[1:3]}
    states = {"a": "previous", "b": "served"}
    assert {weights: f"{states[weights]}, damaged" in rows[versions[weights]] for weights in "ab"} == {
        weights: weights == which for weights in "ab"
    }


def test_a_served_version_whose_folder_has_gone_is_listed_as_served_and_damaged(registry: Path, capsys: pytest.CaptureFixture[str]) -> None:
    promoted = promote(registry, "a")
    (registry / "versions").rename(registry / "elsewhere")
    row = listed(registry, capsys)[promoted.version]
    assert (row["state"], row["name"]) == ("served", "demo")
    assert "is gone" in str(row["error"])


@pytest.mark.parametrize("name", ["current.json", "canary.json", "history.jsonl"])
def test_a_damaged_pointer_or_history_is_an_error_after_all_that_can_still_be_told(
    registry: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    promoted = promote(registry, "a")
    (registry / name).write_text("{}\n")
    assert asked(registry, "list") == DataError.exit_code
    shown = capsys.readouterr()
    assert promoted.version in shown.out
    assert name in shown.err


def test_a_history_tells_every_event_with_what_was_served_after_it_and_why(registry: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = (promote(registry, weights).version for weights in "ab")
    store.record_refusal(registry, reason="p = 0.4", run="runs/c", scores={})
    store.rollback(registry, reason="it repeats itself")
    d = promote(registry, "d", canary=0.1).version
    store.rollback(registry, reason="no better")
    assert asked(registry, "history") == 0
    rows = [line.split(maxsplit=2)[2] for line in capsys.readouterr().out.splitlines()[1:]]
    assert [" ".join(row.split()) for row in rows] == [
        f"promoted {a} runs/a a is better",
        f"promoted {b} runs/b b is better",
        f"refused {b} runs/c p = 0.4",
        f"rolled back {a} runs/a from {b}: it repeats itself",
        f"canary {a} runs/d version {d} gets 10% of the requests: d is better",
        f"rolled back {a} runs/d canary {d}: no better",
    ]


def test_the_registry_of_a_run_is_the_one_in_it_and_a_folder_that_is_no_run_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["registry", "list", "--out", str(tmp_path / "run")]) == DataError.exit_code
    assert main(["rollback", "--out", str(tmp_path / "run")]) == DataError.exit_code
    assert capsys.readouterr().err.count("is no run directory") == 2
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    promoted = promote(tmp_path / "run" / "registry", "a")
    assert main(["registry", "list", "--out", str(tmp_path / "run")]) == 0
    assert promoted.version in capsys.readouterr().out


def test_a_diff_shows_settings_scores_and_files_that_differ_and_names_those_that_do_not(
    registry: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shared = {"task": {"shots": 3}, "student": {"model": "t5"}}
    a = promote(registry, "a", attachments=kept(3, settings={**shared, "train": {"epochs": 1}}))
    scores = {"rougeL": 0.55, "words": 8.5}
    b = promote(registry, "b", scores=scores, attachments=kept(9, settings={**shared, "train": {"epochs": 2}}))
    assert asked(registry, "diff", a.version.partition("-")[2][:8], "current") == 0
    shown = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["A", a.version, "demo", "runs/a"] in shown
    assert ["train.epochs", "1", "2"] in shown
    assert not any(line[:1] == ["student.model"] for line in shown)
    assert ["rougeL", "40.0", "55.0", "+15.0"] in shown
    assert ["rouge1", "50.0", "-", "-"] in shown
    assert ["words", "-", "8.500", "-"] in shown
    assert ["model.bin", a.sha256["model.bin"][:12], b.sha256["model.bin"][:12]] in shown
    assert ["the", "same:", "serving.json,", "tokenizer.json"] in shown
    (last,) = (" ".join(line) for line in shown if line[:1] == ["paired:"])
    assert last.startswith("paired: rougeL of B +50.0 points over A on the same 12 test rows (95% interval +")  # 6 rows of 12: 0 to 1


def test_a_diff_without_reports_compares_the_task_and_says_what_is_missing(registry: Path, capsys: pytest.CaptureFixture[str]) -> None:
    promote(registry, "a")
    promote(registry, "b", task={"shots": 0}, attachments=[("report.json", '{"recipe": "of format 1"}')])
    assert asked(registry, "diff", "previous", "current") == 0
    shown = capsys.readouterr().out
    assert "task.shots  3  0" in shown
    assert "of the task alone" in shown
    assert "no predictions and test rows were kept of A and B" in shown


def test_a_report_that_is_not_readable_is_said_and_the_rest_is_compared(registry: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for weights in "ab":
        promote(registry, weights, attachments=[*kept(2), ("report.json", '{"format": 2}')])
    assert asked(registry, "diff", "previous", "current") == 0
    shown = capsys.readouterr().out
    assert "the report of A is not readable: " in shown
    assert "paired: rougeL of B +0.0 points" in shown


@pytest.mark.parametrize(
    ("test", "said"),
    [
        ([*TEST[:11], Example(id="other", question="q", summary="s")], "other, row-11"),
        ([*TEST[:11], Example(id="row-11", question="another question", summary=TEST[11].summary)], "same ids and not the same text"),
    ],
)
def test_versions_scored_on_other_test_rows_are_not_compared_and_the_ids_are_named(
    registry: Path, capsys: pytest.CaptureFixture[str], test: list[Example], said: str
) -> None:
    promote(registry, "a", attachments=kept(3))
    promote(registry, "b", attachments=kept(3, test))
    assert asked(registry, "diff", "previous", "current") == DataError.exit_code
    shown = capsys.readouterr()
    assert "no paired comparison" in shown.err
    assert said in shown.err
    assert "B - A" not in shown.out  # a difference of scores on other rows is one of nothing
    assert "model.bin" in shown.out


def test_a_comparison_of_two_versions_has_the_sign_of_the_first_and_can_be_checked_by_hand(tmp_path: Path) -> None:
    for name, right in (("ours", 9), ("theirs", 3)):
        answers = [Prediction(system="distilled", example_id=e.id, text=(e.summary or "") if i < right else "") for i, e in enumerate(TEST)]
        write_jsonl(tmp_path / name / "predictions.jsonl", answers)
        write_jsonl(tmp_path / name / "test.jsonl", TEST)
    found = paired(tmp_path / "ours", tmp_path / "theirs", "rougeL", resamples=500, seed=0)
    assert (found.gain, found.rows) == (pytest.approx(0.5), 12)
    assert paired(tmp_path / "theirs", tmp_path / "ours", "rougeL", resamples=500, seed=0).gain == pytest.approx(-0.5)


def test_predictions_without_the_students_own_are_refused(registry: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nobody = [("predictions.jsonl", ""), ("test.jsonl", lines(TEST))]
    promote(registry, "a", attachments=nobody)
    promote(registry, "b", attachments=kept(3))
    assert asked(registry, "diff", "previous", "current") == DataError.exit_code
    assert "has no answers of the system distilled" in capsys.readouterr().err


def test_a_version_beside_itself_differs_in_nothing(registry: Path, capsys: pytest.CaptureFixture[str]) -> None:
    promoted = promote(registry, "a")
    assert asked(registry, "diff", "current", promoted.version) == 0
    assert "A and B are the same version" in capsys.readouterr().out


def test_a_registry_of_another_format_is_refused(registry: Path, capsys: pytest.CaptureFixture[str]) -> None:
    registry.mkdir()
    (registry / "format.json").write_text('{"format": 2}')
    assert asked(registry, "list") == 6
    assert "format 2" in capsys.readouterr().err
