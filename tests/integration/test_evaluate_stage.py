"""The stage `evaluation` with fake models: what it asks, what it keeps, what it writes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from evaluated import FakeStudent, FakeTeacher, export, exported_run

from evaluator.run import main
from evaluator.stage import evaluate, score_again
from evaluator.systems import SYSTEMS
from shared.artifacts import read_jsonl
from shared.contracts import Prediction, Response
from shared.datasets.stage import prepare
from shared.errors import DataError, EngineError, RequestRefused, SettingsError, StageOrder, TeacherUnavailable
from shared.harvest.ledger import answer_files
from shared.prompts import zero_shot


def unasked():
    raise AssertionError("nothing is missing, so nobody should be asked")


def references(run):
    return {zero_shot(run.recipe.task, e.question): e.summary for e in prepare(run)["test"]}


def run_stage(run, *, teacher=None, base=None, distilled=None):
    """Evaluate with fakes; a fake that is not given must not be needed."""
    evaluate(
        run.stage("evaluation", ["dataset", "model"]),
        open_teacher=(lambda: teacher) if teacher else unasked,
        load_base=(lambda: base) if base else unasked,
        load_distilled=(lambda: distilled) if distilled else unasked,
    )


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


@pytest.fixture
def run(tmp_path):
    return exported_run(tmp_path / "run")


def test_every_system_answers_every_test_row_once_and_in_order(run):
    run_all(run)
    predictions = read_jsonl(run.path / "evaluation" / "predictions.jsonl", Prediction)
    ids = [e.id for e in prepare(run)["test"]]
    assert [(p.system, p.example_id) for p in predictions] == [(system, i) for system in SYSTEMS for i in ids]
    assert list(report(run)["systems"]) == list(SYSTEMS)
    assert run.stage("evaluation", ["dataset", "model"]).complete


def test_the_report_scores_the_perfect_system_one_and_tells_it_from_its_former_self(run):
    run_all(run)
    found = report(run)
    assert found["test_rows"] == 40
    assert [found["systems"]["distilled"][m] for m in ("rouge1", "rougeL", "bleu")] == pytest.approx([1, 1, 1])
    assert all(0 <= s[m] <= 1 for s in found["systems"].values() for m in ("rouge1", "rouge2", "rougeL", "bleu"))
    gain = found["comparisons"]["student-zero-shot"]
    assert gain["gain"] == pytest.approx(1 - found["systems"]["student-zero-shot"]["rougeL"], abs=1e-5)
    assert 0 < gain["low"] < gain["gain"] < gain["high"]
    assert gain["p"] < 0.01
    assert "distilled" not in found["comparisons"]


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
    assert report(run)["systems"]["distilled"]["rougeL"] == 0.0


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
    assert systems["teacher-zero-shot"]["rougeL"] == pytest.approx(38 / 40)
    assert systems["student-zero-shot"]["empty"] == 0
    assert systems["student-few-shot"]["empty"] == len(right) - sum(len(r.messages or ()) > 1 for r in base.asked) > 0
    assert any("teacher-zero-shot: 2 of 40 answers are empty" in note for note in report(run)["notes"])
    ledger = read_jsonl(run.path / "evaluation" / "answers" / "teacher-zero-shot.jsonl", Response)
    assert sum(row.status == "failed" for row in ledger) == 2


def test_scores_alone_can_be_computed_again_and_come_out_the_same(run):
    run_all(run)
    folder = run.path / "evaluation"
    before = {name: (folder / name).read_bytes() for name in ("report.json", "report.html")}
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
    with pytest.raises(DataError, match="student-zero-shot: the stored predictions are not one for each test row"):
        score_again(run.stage("evaluation", ["dataset", "model"]))


def test_a_test_split_without_references_is_refused_with_the_setting_that_names_them(tmp_path):
    rows = [json.dumps({"question": f"Question number {i} of many, is it {i}?"}) + "\n" for i in range(60)]
    (tmp_path / "rows.jsonl").write_text("".join(rows))
    settings = {"name": "file", "path": tmp_path / "rows.jsonl", "summary_column": None, "validation_rows": 5, "test_rows": 10}
    run = exported_run(tmp_path / "run", dataset=settings, task={"shots": 0})
    student = FakeStudent(lambda prompt: "What?")
    with pytest.raises(DataError, match=r"dataset\.summary_column"):
        run_stage(run, teacher=FakeTeacher(lambda prompt: "What?"), base=student, distilled=student)


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
