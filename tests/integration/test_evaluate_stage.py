"""The stage `evaluation` with fake models: what it asks, what it keeps, what it writes."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from evaluated import SERVING, FakeStudent, FakeTeacher, export, exported_run

from evaluator.report.contract import Report
from evaluator.run import main
from evaluator.stage import evaluate, is_complete, score_again
from evaluator.systems import ALWAYS, TRIVIAL
from shared.artifacts import Run, canonical, read_jsonl, write_jsonl
from shared.collect import answered_by
from shared.contracts import Prediction, Response
from shared.datasets.stage import prepare
from shared.errors import DataError, EngineError, LeakageError, RequestRefused, SettingsError, StageOrder, TeacherFailed, TeacherUnavailable
from shared.harvest.ledger import answer_files
from shared.prompts import zero_shot
from shared.settings import EvaluateSettings, PromoteSettings


def unasked():
    raise AssertionError("nothing is missing, so nobody should be asked")


def references(run):
    return {zero_shot(run.recipe.task, e.question): e.summary for e in prepare(run)["test"]}


def run_stage(run, *, teacher=None, base=None, distilled=None, others=(), systems=(), judge=None, elsewhere=None):
    """Evaluate with fakes; a fake that is not given must not be needed. others: by serving folder; systems: by name."""
    students = {run.path / "model" / "serving": distilled, **dict(others)}
    evaluate(
        run.stage("evaluation", ["dataset", "model"]),
        open_teacher=(lambda: teacher) if teacher else unasked,
        load_base=(lambda: base) if base else unasked,
        load=lambda folder: students[folder] or unasked(),
        open_system=lambda system: dict(systems)[system.name],
        open_judge=lambda settings: judge or unasked(),
        elsewhere=elsewhere,
    )


def test_students_that_answer_elsewhere_are_asked_by_their_reference_and_loaded_nowhere(tmp_path):
    run, here = exported_run(tmp_path / "there"), exported_run(tmp_path / "here")
    right, asked = references(run), []
    students = {
        run.recipe.student.model: FakeStudent(lambda prompt: "What is it?"),
        str(run.path / "model" / "serving"): FakeStudent(right.get),
    }

    def elsewhere(reference):
        asked.append(reference)
        return lambda chunks: [answered_by(students[reference], chunk) for chunk in reversed(chunks)]

    run_stage(run, teacher=FakeTeacher(lambda prompt: right[prompt]), elsewhere=elsewhere)
    run_all(here)
    assert asked == list(students)
    theirs, ours = (read_jsonl(r.path / "evaluation" / "predictions.jsonl", Prediction) for r in (run, here))
    assert theirs == ours


def run_all(run):
    right = references(run)
    fakes = {
        "teacher": FakeTeacher(lambda prompt: right[prompt]),
        "base": FakeStudent(lambda prompt: "What is it?"),
        "distilled": FakeStudent(lambda prompt: right[prompt]),
    }
    run_stage(run, **fakes)
    return fakes


def report(run):
    return json.loads((run.path / "evaluation" / "report.json").read_text())


def value(run, system, metric="rougeL"):
    return report(run)["systems"][system]["scores"][metric]["value"]


@pytest.fixture
def run(tmp_path):
    return exported_run(tmp_path / "run")


def test_every_system_answers_every_test_row_once_and_in_order(run):
    run_all(run)
    predictions = read_jsonl(run.path / "evaluation" / "predictions.jsonl", Prediction)
    ids = [e.id for e in prepare(run)["test"]]
    assert [(p.system, p.example_id) for p in predictions] == [(system, i) for system in ALWAYS for i in ids]
    assert list(report(run)["systems"]) == list(ALWAYS)
    assert run.stage("evaluation", ["dataset", "model"]).complete


def test_the_report_scores_the_perfect_system_one_and_tells_it_from_its_former_self(run):
    run_all(run)
    found = report(run)
    assert found["test_rows"] == 40
    assert [value(run, "distilled", m) for m in ("rouge1", "rougeL", "bleu", "chrf", "exact_match")] == pytest.approx([1] * 5)
    assert all(0 <= s["scores"][m]["value"] <= 1 for s in found["systems"].values() for m in ("rouge1", "rougeL", "bleu", "copied"))
    gain = next(c for c in found["comparisons"] if (c["theirs"], c["metric"]) == ("student-zero-shot", "rougeL"))
    assert gain["gain"] == pytest.approx(1 - value(run, "student-zero-shot"), abs=1e-5)
    assert 0 < gain["low"] < gain["gain"] < gain["high"]
    assert gain["p"] <= gain["p_holm"] < 0.05
    assert not {"distilled", "reference"} & {c["theirs"] for c in found["comparisons"]}
    assert found["gate"]["passed"]
    assert Report.model_validate(found).model_dump(mode="json") == found


def test_few_shot_systems_are_shown_the_shots_and_zero_shot_systems_none(run):
    fakes = run_all(run)
    turns = [len(request.messages) for request in fakes["base"].asked]
    assert sorted(set(turns)) == [1, 1 + 2 * run.recipe.task.shots]
    train = {e.id for e in prepare(run)["train"]}
    assert len(report(run)["shots"]) == run.recipe.task.shots
    assert set(report(run)["shots"]) <= train
    assert all(len(request.messages) == 1 for request in fakes["distilled"].asked)


def test_an_encoder_decoder_student_is_asked_in_plain_text(tmp_path):
    run = exported_run(tmp_path / "run")
    export(run, "weights", kind="encoder-decoder")
    student = FakeStudent(lambda prompt: "What?")
    run_stage(run, teacher=FakeTeacher(lambda prompt: "What?"), base=student, distilled=student)
    assert all(request.prompt and request.messages is None for request in student.asked)


def test_a_serving_folder_that_does_not_say_what_it_is_names_the_file_and_the_command_to_run(run):
    export(run, "weights", kind="diffusion")
    with pytest.raises(DataError, match=r"serving\.json.*distill export"):
        run_stage(run, teacher=FakeTeacher(lambda prompt: "What?"))


def test_what_was_answered_before_a_crash_is_not_asked_again_and_no_model_is_loaded_for_it(run, tmp_path):
    right = references(run)

    def broken(prompt):
        raise EngineError("out of memory")

    teacher = FakeTeacher(lambda prompt: right[prompt])
    with pytest.raises(EngineError):
        run_stage(run, teacher=teacher, base=FakeStudent(lambda prompt: "What is it?"), distilled=FakeStudent(broken))
    assert teacher.closed
    run_stage(run, distilled=FakeStudent(lambda prompt: right[prompt]))
    whole = exported_run(tmp_path / "whole")
    run_all(whole)
    assert (run.path / "evaluation" / "predictions.jsonl").read_bytes() == (whole.path / "evaluation" / "predictions.jsonl").read_bytes()


def test_a_newly_exported_student_answers_anew_and_the_others_are_not_asked_again(run):
    run_all(run)
    export(run, "other weights")
    assert not run.stage("evaluation", ["dataset", "model"]).complete
    run_stage(run, distilled=FakeStudent(lambda prompt: "no idea"))
    assert value(run, "distilled") == 0.0


@pytest.mark.parametrize(
    ("file", "content"),
    [("tokenizer.json", '{"lowercase": true}'), ("serving.json", json.dumps({**SERVING, "max_input_tokens": 256}))],
)
def test_the_same_weights_served_with_another_tokenizer_or_other_settings_answer_anew(run, file, content):
    run_all(run)
    before = report(run)["systems"]["distilled"]
    model = run.path / "model"
    (model / "serving" / file).write_text(content)
    run.stage("model").finish([model / "README.md", model / "serving"], settings={})
    student = FakeStudent(lambda prompt: "no idea")
    run_stage(run, distilled=student)  # and nobody else is asked
    assert len(student.asked) == 40
    assert (before["scores"]["rougeL"]["value"], value(run, "distilled")) == (pytest.approx(1.0), 0.0)


def test_refused_empty_and_too_long_prompts_score_zero_and_are_counted(run):
    right = references(run)
    first, second = list(right)[:2]
    answers = {first: RequestRefused("too long"), second: "   "}
    teacher = FakeTeacher(lambda prompt: answers.get(prompt, right[prompt]))
    longest = max(len(prompt) for prompt in right)
    base = FakeStudent(lambda prompt: "What is it?", longest=longest)
    run_stage(run, teacher=teacher, base=base, distilled=FakeStudent(lambda prompt: right[prompt]))
    systems = report(run)["systems"]
    assert systems["teacher-zero-shot"]["empty"] == 2
    assert value(run, "teacher-zero-shot") == pytest.approx(38 / 40)
    assert systems["student-zero-shot"]["empty"] == 0
    assert systems["student-few-shot"]["empty"] == len(right) - sum(len(r.messages or ()) > 1 for r in base.asked) > 0
    assert any("teacher-zero-shot: 2 of 40 answers are empty" in note for note in report(run)["notes"])
    ledger = read_jsonl(run.path / "evaluation" / "answers" / "teacher-zero-shot.jsonl", Response)
    assert sum(row.status == "failed" for row in ledger) == 2


def test_scores_alone_can_be_computed_again_and_come_out_the_same(run):
    run_all(run)
    folder = run.path / "evaluation"
    before = {name: (folder / name).read_bytes() for name in ("report.json", "report.html", "report.md")}
    for name in before:
        (folder / name).unlink()
    score_again(run.stage("evaluation", ["dataset", "model"]))
    assert {name: (folder / name).read_bytes() for name in before} == before
    assert run.stage("evaluation", ["dataset", "model"]).complete


def test_predictions_of_another_student_are_not_scored_as_this_ones(run):
    with pytest.raises(StageOrder, match="no predictions of the present model"):
        score_again(run.stage("evaluation", ["dataset", "model"]))
    run_all(run)
    export(run, "other weights")
    with pytest.raises(StageOrder, match="no predictions of the present model"):
        score_again(run.stage("evaluation", ["dataset", "model"]))


def test_predictions_with_a_row_missing_are_refused(run):
    run_all(run)
    file = run.path / "evaluation" / "predictions.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(StageOrder, match=r"predictions\.jsonl is not what the evaluation wrote"):
        score_again(run.stage("evaluation", ["dataset", "model"]))


def test_a_test_split_without_references_is_refused_with_the_setting_that_names_them(tmp_path):
    rows = [json.dumps({"question": f"Question number {i} of many, is it {i}?"}) + "\n" for i in range(60)]
    (tmp_path / "rows.jsonl").write_text("".join(rows))
    settings = {"name": "file", "path": tmp_path / "rows.jsonl", "summary_column": None, "validation_rows": 5, "test_rows": 10}
    run = exported_run(tmp_path / "run", dataset=settings, task={"shots": 0})
    student = FakeStudent(lambda prompt: "What?")
    with pytest.raises(DataError, match=r"dataset\.summary_column"):
        run_stage(run, teacher=FakeTeacher(lambda prompt: "What?"), base=student, distilled=student)


def answering(run, **systems):
    """The fakes of `run_all`, and what more is given."""
    right = references(run)
    return {
        "teacher": FakeTeacher(lambda prompt: right[prompt]),
        "base": FakeStudent(lambda prompt: "What is it?"),
        "distilled": FakeStudent(lambda prompt: right[prompt]),
        **systems,
    }


def reopened(run, **changes):
    """The run with other settings of how it is judged."""
    return Run.open(run.path, run.recipe.model_copy(update={"evaluate": EvaluateSettings(resamples=500, **changes)}))


def test_every_answer_is_stored_with_the_hash_of_its_prompt_and_every_system_with_its_decoding_and_shots(run):
    run_all(run)
    predictions = read_jsonl(run.path / "evaluation" / "predictions.jsonl", Prediction)
    first = next(p for p in predictions if p.system == "student-zero-shot")
    example = next(e for e in prepare(run)["test"] if e.id == first.example_id)
    turns = [{"role": "user", "content": zero_shot(run.recipe.task, example.question)}]
    assert first.prompt_sha256 == hashlib.sha256(canonical(turns)).hexdigest()
    assert all((p.prompt_sha256 is None) == (p.system in (*TRIVIAL, "reference")) for p in predictions)
    systems = {s["name"]: s for s in json.loads((run.path / "evaluation" / "systems.json").read_text())["systems"]}
    assert systems["teacher-few-shot"]["decoding"]["max_tokens"] == 48
    assert systems["teacher-few-shot"]["shots"] == systems["student-few-shot"]["shots"] == report(run)["shots"]
    assert systems["distilled"]["model"].startswith("sha256:")


def test_the_reference_is_the_ceiling_in_every_metric_in_which_more_is_better(run):
    run_all(run)
    for metric, definition in report(run)["metrics"].items():
        if definition["better"] == "higher":
            assert value(run, "reference", metric) == pytest.approx(1.0), metric


def test_the_student_of_every_earlier_round_is_evaluated_and_one_that_was_never_made_servable_is_named(tmp_path):
    run = exported_run(tmp_path / "run", train={"rounds": 3})
    folder = run.path / "responses" / "student-r1" / "serving"
    shutil.copytree(run.path / "model" / "serving", folder)
    run.stage("responses/student-r1").finish([folder], settings={})
    run_stage(run, **answering(run), others={folder: FakeStudent(lambda prompt: "What is this?")})
    found = report(run)
    assert [name for name in found["systems"] if name.startswith("distilled")] == ["distilled-r0", "distilled"]
    assert found["systems"]["distilled-r0"]["about"] == "the student after round 1 of 3"
    assert "round 2 was not sampled" in found["not_scored"]["distilled-r1"]


def test_systems_by_url_by_run_and_by_file_are_compared_like_all_others(run, tmp_path):
    other = exported_run(tmp_path / "sft", weights="sft")
    lines = [{"example_id": e.id, "text": e.summary, "more": 1} for e in prepare(run)["test"]] + [{"example_id": "else", "text": "x"}]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = reopened(
        run,
        systems=[
            {"name": "mistral", "url": "http://127.0.0.1:9/v1", "model": "mistral-7b", "few_shot": True},
            {"name": "sft", "run": other.path},
            {"name": "theirs", "predictions": tmp_path / "answers.jsonl"},
        ],
    )
    mistral, sft = FakeTeacher(lambda prompt: "What is gout?"), FakeStudent(lambda prompt: "What is that?")
    run_stage(run, **answering(run), others={other.path / "model" / "serving": sft}, systems={"mistral": mistral})
    found = report(run)
    assert list(found["systems"])[5:8] == ["mistral", "sft", "theirs"]
    assert all(found["systems"][name]["group"] == "extra" for name in ("mistral", "sft", "theirs"))
    assert (mistral.asked, len(sft.asked), mistral.closed) == (40, 40, True)
    assert value(run, "theirs") == pytest.approx(1.0)
    assert {"mistral", "sft", "theirs"} <= {c["theirs"] for c in found["comparisons"]}


@pytest.mark.parametrize(
    ("edit", "why"),
    [
        (lambda lines: lines[2:], "not answered"),
        (lambda lines: [*lines, lines[0]], "answered more than once"),
    ],
)
def test_a_file_without_exactly_one_answer_to_each_row_is_not_scored_and_the_rows_are_named(run, tmp_path, edit, why):
    lines = [{"example_id": e.id, "text": "What?"} for e in prepare(run)["test"]]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in edit(lines)))
    run = reopened(run, systems=[{"name": "theirs", "predictions": tmp_path / "answers.jsonl"}])
    run_stage(run, **answering(run))
    found = report(run)
    assert "theirs" not in found["systems"]
    assert why in found["not_scored"]["theirs"]
    assert lines[0]["example_id"] in found["not_scored"]["theirs"]
    assert any("theirs is not scored" in note for note in found["notes"])


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"\xff\xfe", "not UTF-8"),
        (b'{"example_id": "a"}\n', "line 1: text"),
        (b'\xef\xbb\xbf{"example_id": "a", "text": "\xe2\x80\xa8"}\r\n\r\n{"example_id": "b", "te\r\n', "line 3: .*Invalid JSON"),
        (None, "No such file"),
    ],
)
def test_a_file_that_cannot_be_read_ends_the_evaluation_before_anybody_is_asked(run, tmp_path, content, why):
    if content is not None:
        (tmp_path / "answers.jsonl").write_bytes(content)
    run = reopened(run, systems=[{"name": "theirs", "predictions": tmp_path / "answers.jsonl"}])
    with pytest.raises(DataError, match=f"answers.jsonl.*{why}"):
        run_stage(run)


def test_a_run_that_was_never_exported_and_a_name_that_is_taken_are_refused_with_the_setting(run, tmp_path):
    with pytest.raises(StageOrder, match=r"evaluate\.systems: sft: .*no exported student"):
        run_stage(reopened(run, systems=[{"name": "sft", "run": tmp_path}]), **answering(run))
    with pytest.raises(SettingsError, match=r"evaluate\.systems: constant is the name of a system"):
        run_stage(reopened(run, systems=[{"name": "constant", "url": "http://127.0.0.1:9/v1"}]))


def test_an_unknown_baseline_is_refused_before_anybody_is_asked(tmp_path):
    run = exported_run(tmp_path / "run", promote={"baseline": "sft"})
    with pytest.raises(SettingsError, match=r"promote\.baseline: 'sft'"):
        run_stage(run)


def test_another_rule_makes_the_evaluation_anew_from_the_answers_it_has(run, tmp_path, capsys):
    run_all(run)
    other = Run.open(run.path, run.recipe.model_copy(update={"promote": PromoteSettings(metric="bleu")}))
    assert not is_complete(other.stage("evaluation", ["dataset", "model"]))
    run_stage(other)  # nobody is asked
    assert is_complete(other.stage("evaluation", ["dataset", "model"]))
    assert report(run)["metric"] == "bleu"
    assert {c["metric"] for c in report(run)["pairs"]} == {"bleu"}
    assert any("bleu is a corpus score" in note for note in report(run)["notes"])


def test_test_rows_that_were_learned_from_end_the_evaluation_unless_allowed_by_name_and_show_in_the_report(run):
    rows = prepare(run)
    leaked = [rows["test"][0].model_copy(update={"id": "leak"}), *rows["train"]]
    write_jsonl(run.path / "dataset" / "train.jsonl", leaked)
    with pytest.raises(LeakageError, match=f"{rows['test'][0].id} is a copy of leak"):
        run_stage(run)
    allowed = reopened(run, allow_overlap=[rows["test"][0].id])
    run_stage(allowed, **answering(run))
    assert [(o["test_id"], o["other_id"], o["allowed"]) for o in report(run)["overlaps"]] == [(rows["test"][0].id, "leak", True)]
    assert any("1 test rows share text" in note for note in report(run)["notes"])


def test_a_judge_is_asked_in_both_orders_and_its_verdicts_are_read_from_the_ledger_without_it(run):
    right = references(run)
    run = reopened(run, judge={"url": "http://127.0.0.1:9/v1", "model": "judge", "against": ["student-zero-shot", "constant"]})

    def prefer_the_right_one(prompt):
        first = prompt.partition("<<<ANSWER A>>>\n")[2].partition("\n<<<END")[0]
        return "A" if first in right.values() else "B"

    judge = FakeTeacher(prefer_the_right_one)
    run_stage(run, **answering(run), judge=judge)
    (of_base, of_constant) = report(run)["judge"]["verdicts"]
    assert (of_base["theirs"], of_base["wins"], of_base["unreadable"]) == ("student-zero-shot", 40, 0)
    assert of_constant["wins"] + of_constant["ties"] + of_constant["losses"] == 40
    asked = judge.asked
    run_stage(run)
    score_again(run.stage("evaluation", ["dataset", "model"]))
    assert judge.asked == asked
    assert len(report(run)["judge"]["verdicts"]) == 2


def test_a_judge_of_an_unknown_system_is_refused_before_anybody_is_asked(run):
    with pytest.raises(SettingsError, match=r"evaluate\.judge\.against: nobody"):
        run_stage(reopened(run, judge={"url": "http://127.0.0.1:9/v1", "model": "judge", "against": ["nobody"]}))


def test_bertscore_without_a_folder_of_a_model_is_refused_before_anybody_is_asked(run, tmp_path):
    with pytest.raises(SettingsError, match=r"evaluate\.bertscore\.model"):
        run_stage(reopened(run, bertscore={"model": tmp_path}))


def test_scores_alone_are_refused_where_the_predictions_were_made_with_other_settings_or_are_not_as_they_were(run):
    run_all(run)
    for changes in ({"max_tokens": 7}, {"systems": [{"name": "other", "url": "http://127.0.0.1:9/v1"}]}):
        with pytest.raises(StageOrder, match=f"other settings .evaluate.{next(iter(changes))}"):
            score_again(reopened(run, **changes).stage("evaluation", ["dataset", "model"]))
    score_again(reopened(run, seed=1).stage("evaluation", ["dataset", "model"]))
    file = run.path / "evaluation" / "predictions.jsonl"
    file.write_text(file.read_text().replace("What is it?", "What is gout?"))
    with pytest.raises(StageOrder, match=r"predictions\.jsonl is not what the evaluation wrote"):
        score_again(run.stage("evaluation", ["dataset", "model"]))


def test_another_content_of_a_predictions_file_makes_the_evaluation_anew(run, tmp_path):
    file = tmp_path / "answers.jsonl"
    file.write_text("".join(json.dumps({"example_id": e.id, "text": "What?"}) + "\n" for e in prepare(run)["test"]))
    run = reopened(run, systems=[{"name": "theirs", "predictions": file}])
    run_stage(run, **answering(run))
    assert is_complete(run.stage("evaluation", ["dataset", "model"]))
    file.write_text(file.read_text().replace("What?", "What is it?"))
    assert not is_complete(run.stage("evaluation", ["dataset", "model"]))


def test_scores_computed_again_do_not_pass_for_an_evaluation_of_a_file_that_has_changed_and_need_it_no_more(run, tmp_path):
    file = tmp_path / "answers.jsonl"
    file.write_text("".join(json.dumps({"example_id": e.id, "text": "What?"}) + "\n" for e in prepare(run)["test"]))
    run = reopened(run, systems=[{"name": "theirs", "predictions": file}])
    run_stage(run, **answering(run))
    stage, scored = run.stage("evaluation", ["dataset", "model"]), report(run)["systems"]["theirs"]
    file.write_text(file.read_text().replace("What?", "What is it?"))
    assert not is_complete(stage)
    score_again(stage)
    assert not is_complete(stage)
    file.unlink()
    score_again(stage)
    assert report(run)["systems"]["theirs"] == scored


def test_a_predictions_file_is_read_as_an_editor_of_another_system_saves_it(run, tmp_path):
    ids = [e.id for e in prepare(run)["test"]]
    said = ["What is it?\u2028Is it serious?", *("What?" for _ in ids[1:])]
    lines = [json.dumps({"example_id": i, "text": text}, ensure_ascii=False) for i, text in zip(ids, said, strict=True)]
    lines.insert(1, "")
    (tmp_path / "answers.jsonl").write_bytes("\r\n".join([*lines, ""]).encode("utf-8-sig"))
    run = reopened(run, systems=[{"name": "theirs", "predictions": tmp_path / "answers.jsonl"}])
    run_stage(run, **answering(run))
    predictions = read_jsonl(run.path / "evaluation" / "predictions.jsonl", Prediction)
    assert [p.text for p in predictions if p.system == "theirs"] == said


def test_a_teacher_that_was_not_heard_on_every_row_is_not_scored_and_as_baseline_ends_the_evaluation(tmp_path):
    run = exported_run(tmp_path / "run", teacher={"launch": {"engine": "scripted"}, "max_attempts": 1})
    right = references(run)
    lost = next(iter(right))
    deaf = FakeTeacher(lambda prompt: TeacherFailed("HTTP 500") if prompt == lost else right[prompt])
    run_stage(run, **answering(run, teacher=deaf))
    first = prepare(run)["test"][0].id
    assert set(report(run)["not_scored"]) == {"teacher-zero-shot", "teacher-few-shot"}
    assert f"no answer was heard to {first}" in report(run)["not_scored"]["teacher-zero-shot"]
    assert "teacher-zero-shot" not in report(run)["systems"]
    strict = Run.open(run.path, run.recipe.model_copy(update={"promote": PromoteSettings(baseline="teacher-zero-shot")}))
    with pytest.raises(TeacherUnavailable, match="teacher-zero-shot is to be compared with: no answer was heard"):
        run_stage(strict, **answering(run, teacher=deaf))
    run_stage(strict, **answering(run))
    assert "teacher-zero-shot" in report(run)["systems"]


def test_a_baseline_that_cannot_be_scored_is_refused_with_the_reason_before_anybody_is_asked(tmp_path):
    (tmp_path / "answers.jsonl").write_text("")
    run = exported_run(
        tmp_path / "run",
        promote={"baseline": "theirs"},
        evaluate={"systems": [{"name": "theirs", "predictions": tmp_path / "answers.jsonl"}]},
    )
    with pytest.raises(DataError, match=r"theirs is to be compared with and cannot be scored: .*not answered"):
        run_stage(run)
    rounds = exported_run(tmp_path / "rounds", train={"rounds": 2}, promote={"baseline": "distilled-r0"})
    with pytest.raises(SettingsError, match=r"promote\.baseline: 'distilled-r0'"):
        run_stage(rounds)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_another_run_whose_student_has_learned_from_a_test_row_or_was_chosen_by_it_is_told(run, tmp_path, split):
    other, row = exported_run(tmp_path / "sft", weights="sft"), prepare(run)["test"][3]
    write_jsonl(other.path / "dataset" / f"{split}.jsonl", [row])
    with pytest.raises(LeakageError, match=rf"{row.id} is a copy of sft: {row.id} \({split}\)"):
        run_stage(reopened(run, systems=[{"name": "sft", "run": other.path}]))


@pytest.mark.parametrize("split", ["train", "validation"])
def test_another_run_that_no_longer_has_what_its_student_has_seen_is_refused_and_the_file_is_named(run, tmp_path, split):
    other = exported_run(tmp_path / "sft", weights="sft")
    file = other.path / "dataset" / f"{split}.jsonl"
    file.unlink()
    with pytest.raises(DataError, match=rf"evaluate\.systems: sft: {re.escape(str(file))} is not there"):
        run_stage(reopened(run, systems=[{"name": "sft", "run": other.path}]))


@pytest.mark.parametrize("name", ["ckpt-000500", "judge-x", "bertscore"])
def test_a_name_under_which_answers_of_something_else_are_kept_is_refused(name):
    with pytest.raises(ValueError, match="choose another"):
        EvaluateSettings(systems=[{"name": name, "url": "http://127.0.0.1:9/v1"}])


@pytest.mark.parametrize("url", ["http://u:s3cr3t@127.0.0.1:9/v1", "http://127.0.0.1:9/v1?key=s3cr3t"])
def test_a_secret_in_a_url_is_refused_before_a_file_is_written_and_not_repeated(tmp_path, url):
    for settings in ({"systems": [{"name": "other", "url": url}]}, {"judge": {"url": url, "model": "m"}}):
        (tmp_path / "recipe.yaml").write_text(
            json.dumps({"name": "x", "teacher": {"launch": {"engine": "scripted"}}, "evaluate": settings})
        )
        with pytest.raises(SettingsError, match=r"would be told in reports.*api_key_file") as refused:
            main(["--recipe", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "run")])
        assert "s3cr3t" not in str(refused.value)
        assert not (tmp_path / "run").exists()


def recipe_file(run, path):
    path.write_text(run.recipe.model_dump_json())  # JSON is YAML
    return ["--recipe", str(path), "--out", str(run.path)]


def test_the_command_does_nothing_where_the_stage_is_complete_and_scores_again_where_asked(run, tmp_path, capsys):
    run_all(run)
    arguments = recipe_file(run, tmp_path / "recipe.yaml")
    capsys.readouterr()
    assert main(arguments) == 0
    assert capsys.readouterr().out == "evaluation: complete, nothing to do\n"
    assert main([*arguments, "--score-only"]) == 0
    assert "distilled" in capsys.readouterr().out


def test_the_command_without_a_trained_student_says_which_stage_is_missing(tmp_path):
    run = exported_run(tmp_path / "run")
    (run.path / "model" / "manifest.json").unlink()
    with pytest.raises(StageOrder, match="model/"):
        main(recipe_file(run, tmp_path / "recipe.yaml"))


def test_a_launched_teacher_that_nobody_started_is_asked_for_by_the_flag_to_give(run, tmp_path):
    with pytest.raises(SettingsError, match="--teacher-url"):
        main(recipe_file(run, tmp_path / "recipe.yaml"))


def test_a_teacher_that_is_not_there_ends_the_command_before_any_student_is_loaded(tmp_path):
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        run = exported_run(tmp_path / "run", teacher={"launch": {"engine": "scripted"}, "patience_s": 0.5})
        with pytest.raises(TeacherUnavailable):
            main([*recipe_file(run, tmp_path / "recipe.yaml"), "--teacher-url", f"http://127.0.0.1:{held.getsockname()[1]}/v1"])


def test_answers_of_a_launched_teacher_are_kept_when_its_port_changes(run, tmp_path, capsys):
    run_all(run)
    (run.path / "evaluation" / "manifest.json").unlink()
    assert main([*recipe_file(run, tmp_path / "recipe.yaml"), "--teacher-url", "http://127.0.0.1:9/v1"]) == 0
    assert "40 test rows" in capsys.readouterr().out


class FifthAnswerIsTheLast(BaseHTTPRequestHandler):
    """A teacher that answers five requests over HTTP, and lets the sixth wait until the server is told to end."""

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.server.answered += 1
        if self.server.answered > 5:
            self.server.ended.wait()
            return
        choice = {"index": 0, "message": {"role": "assistant", "content": "What is it?"}, "finish_reason": "stop"}
        body = json.dumps({"object": "chat.completion", "choices": [choice]}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments): ...


@pytest.fixture
def stuck_teacher():
    server = ThreadingHTTPServer(("127.0.0.1", 0), FifthAnswerIsTheLast)
    server.answered, server.ended = 0, threading.Event()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.ended.set()
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(("blow", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_a_stopped_evaluation_keeps_every_answer_that_came_and_goes_on_from_there(tmp_path, stuck_teacher, blow, code):
    run = exported_run(tmp_path / "run", harvest={"concurrency": 1})
    command = [sys.executable, "-m", "shared.cli", "evaluate", *recipe_file(run, tmp_path / "recipe.yaml"), "--teacher-url", stuck_teacher]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    while sum(file.read_bytes().count(b"\n") for file in answer_files(run.path / "evaluation" / "answers", "teacher-zero-shot")) < 5:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    process.send_signal(blow)
    _, said = process.communicate()
    assert process.returncode == code
    if blow == signal.SIGINT:
        assert "To go on:\n  distill evaluate" in said
        assert "Traceback" not in said
    right = references(run)
    teacher = FakeTeacher(lambda prompt: right[prompt])
    run_stage(run, teacher=teacher, base=FakeStudent(lambda prompt: "What is it?"), distilled=FakeStudent(lambda prompt: right[prompt]))
    assert teacher.asked == 40 - 5 + 40


def test_a_key_file_that_cannot_be_read_is_named(tmp_path, run):
    url = ["--teacher-url", "http://127.0.0.1:9/v1", "--set", f"teacher.api_key_file={tmp_path / 'none'}"]
    with pytest.raises(SettingsError, match="none"):
        main([*recipe_file(run, tmp_path / "recipe.yaml"), *url])
