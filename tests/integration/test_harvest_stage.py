"""`distill harvest` against a real HTTP server: cut short, refused, misled and interrupted."""

from __future__ import annotations

import json
import re
import resource
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from teachers import (
    CONCURRENCY,
    SAMPLES,
    Body,
    Said,
    Teacher,
    child,
    count_lines,
    empty,
    harvest,
    html,
    lines,
    listening,
    manifest,
    prompt_of,
    recipe,
    refusing,
    rows_of,
    same,
    saying,
    stage_of,
    usual,
    wait_for_lines,
)

from shared.contracts import Example
from shared.errors import HarvestTooThin, RunMismatch, StorageError, TeacherError
from shared.harvest.ledger import AnswerLedger, AnswerReader, answer_files


@pytest.fixture
def teacher() -> Iterator[Teacher]:
    with listening() as teacher:
        yield teacher


def test_every_training_prompt_is_asked_once_for_all_its_samples_and_the_manifest_tells(tmp_path: Path, teacher: Teacher) -> None:
    file, out = recipe(tmp_path, teacher.url, prompts=11), tmp_path / "run"
    assert harvest(file, out) == 0
    assert len(teacher.bodies) == 11
    train = [Example.model_validate_json(line) for line in (out / "dataset" / "train.jsonl").read_text().splitlines()]
    assert sorted({example_id for _, example_id, *_ in lines(out)}) == sorted(e.id for e in train)
    assert len(lines(out)) == 11 * SAMPLES
    counts = manifest(out)["counts"]
    assert (counts["prompts"], counts["answers"], counts["failed"], counts["requests"]) == (11, 11 * SAMPLES, {}, 11)
    assert counts["distinct_fraction"] == 1.0
    assert teacher.keys == {None}


def test_a_second_harvest_asks_nothing_and_says_so(tmp_path: Path, teacher: Teacher, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = recipe(tmp_path, teacher.url), tmp_path / "run"
    harvest(file, out)
    asked = len(teacher.bodies)
    assert harvest(file, out) == 0
    assert len(teacher.bodies) == asked
    assert "responses/teacher: complete, nothing to do" in capsys.readouterr().out


def test_a_complete_harvest_needs_no_teacher_any_more(tmp_path: Path, teacher: Teacher) -> None:
    file, out = recipe(tmp_path, teacher.url), tmp_path / "run"
    file.write_text(file.read_text().replace(f'url: "{teacher.url}"', "launch: {engine: scripted}"))
    assert harvest(file, out) == 2
    assert harvest(file, out, "--teacher-url", teacher.url) == 0
    assert harvest(file, out) == 0


def test_another_run_takes_answers_over_and_asks_for_what_is_asked_otherwise(
    tmp_path: Path, teacher: Teacher, capsys: pytest.CaptureFixture[str]
) -> None:
    file, first = recipe(tmp_path, teacher.url, prompts=11), tmp_path / "first"
    harvest(file, first)
    paid = len(teacher.bodies)
    # trained otherwise: asked nothing, and not even whether the teacher is there
    other = recipe(tmp_path, teacher.url, prompts=11, more="train: {epochs: 7}")
    assert harvest(other, tmp_path / "other", "--dry-run", "--answers-from", str(first)) == 0
    assert "0 requests for 0 of" in capsys.readouterr().out
    assert harvest(other, tmp_path / "other", "--answers-from", str(first)) == 0
    assert len(teacher.bodies) == paid
    assert f"{11 * SAMPLES} answers taken over from {first}" in capsys.readouterr().out
    assert sorted(lines(tmp_path / "other")) == sorted(lines(first))
    found, expected = (manifest(run)["counts"] for run in (tmp_path / "other", first))
    assert (found["requests"], expected["requests"]) == (0, 11)
    assert {name: found[name] for name in ("prompts", "answers", "failed")} == {"prompts": 11, "answers": 11 * SAMPLES, "failed": {}}
    # two rows more, and what is there already is not taken twice
    more = recipe(tmp_path, teacher.url, prompts=13, more="train: {epochs: 7}")
    assert harvest(more, tmp_path / "more", "--answers-from", str(first)) == 0
    assert len(teacher.bodies) == paid + 2
    assert harvest(more, tmp_path / "more", "--answers-from", str(first)) == 0
    assert len(lines(tmp_path / "more")) == 13 * SAMPLES
    # asked otherwise: nothing of it will do
    warmer = recipe(tmp_path, teacher.url, prompts=11, harvest="temperature: 1.3")
    capsys.readouterr()
    assert harvest(warmer, tmp_path / "warmer", "--answers-from", str(first)) == 0
    assert f"responses/teacher: 0 answers taken over from {first}" in capsys.readouterr().out
    assert len(teacher.bodies) == paid + 2 + 11
    assert len(lines(tmp_path / "warmer")) == 11 * SAMPLES


def test_a_row_more_at_the_top_of_the_file_pays_for_no_other_row_again_and_the_dry_run_says_so(
    tmp_path: Path, teacher: Teacher, capsys: pytest.CaptureFixture[str]
) -> None:
    questions = [{"question": f"My doctor spoke of condition {i}, what is it?", "summary": f"What is {i}?"} for i in range(30)]
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in questions))
    file = recipe(tmp_path, teacher.url, prompts=20)
    assert harvest(file, tmp_path / "first") == 0
    paid = {prompt_of(body) for body in teacher.bodies}
    teacher.bodies.clear()
    rows.write_text(json.dumps({"question": "And what is this?", "summary": "What is this?"}) + "\n" + rows.read_text())
    more = ["--answers-from", str(tmp_path / "first")]
    assert harvest(file, tmp_path / "second", "--dry-run", *more) == 0
    told = re.search(r"(\d+) requests for (\d+) of 60 answers", capsys.readouterr().out)
    assert told is not None
    assert harvest(file, tmp_path / "second", *more) == 0
    asked = {prompt_of(body) for body in teacher.bodies}
    assert not asked & paid
    assert (int(told[1]), int(told[2])) == (len(teacher.bodies), len(teacher.bodies) * SAMPLES)
    assert len(asked) < 20
    train = [Example.model_validate_json(line) for line in (tmp_path / "second" / "dataset" / "train.jsonl").read_text().splitlines()]
    assert {(example, sample) for _, example, sample, *_ in lines(tmp_path / "second")} == {
        (e.id, i) for e in train for i in range(SAMPLES)
    }


def test_answers_are_taken_over_from_a_run_that_others_write_and_read_and_nothing_there_is_touched(
    tmp_path: Path, teacher: Teacher, capsys: pytest.CaptureFixture[str]
) -> None:
    file, first = recipe(tmp_path, teacher.url, prompts=20, harvest="max_failed_fraction: 0.5"), tmp_path / "first"
    teacher.answer = lambda body: empty(body) if len(teacher.bodies) % 4 == 0 else usual(body)
    assert harvest(file, first) == 0
    failed = sum(row.status == "failed" for row in rows_of(first)) // SAMPLES
    assert failed
    paid = len(teacher.bodies)
    teacher.answer = usual
    with AnswerLedger(stage_of(first)), AnswerReader(stage_of(first)):
        answers = stage_of(first) / "responses.jsonl"
        answers.write_bytes(answers.read_bytes() + b'{"key": "it is being writ')
        before = (stage_of(first).stat().st_mtime_ns, answers.read_bytes(), sorted(stage_of(first).iterdir()))
        assert harvest(file, tmp_path / "second", "--answers-from", str(first)) == 0
        assert (stage_of(first).stat().st_mtime_ns, answers.read_bytes(), sorted(stage_of(first).iterdir())) == before
    assert f"{(20 - failed) * SAMPLES} answers taken over from {first}" in capsys.readouterr().out
    assert len(teacher.bodies) == paid + failed
    assert {status for *_, status, _ in lines(tmp_path / "second")} == {"ok"}


def test_a_run_without_answers_this_run_itself_and_a_cluster_are_refused(
    tmp_path: Path, teacher: Teacher, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = recipe(tmp_path, teacher.url), tmp_path / "run"
    assert harvest(file, out, "--answers-from", str(tmp_path / "nothing")) == 2
    assert "--answers-from" in capsys.readouterr().err
    assert harvest(file, out, "--dry-run", "--answers-from", str(tmp_path / "nothing")) == 2
    assert "--answers-from" in capsys.readouterr().err
    assert not (tmp_path / "nothing").exists()
    assert harvest(file, out, "--answers-from", str(out)) == 2
    assert harvest(file, out, "--on", "local-cluster:2", "--answers-from", str(out)) == 2
    assert "--answers-from: a harvest on a cluster takes none over" in capsys.readouterr().err
    assert not teacher.bodies


def test_a_harvest_that_is_killed_ends_with_the_lines_of_one_that_was_not_and_repeats_only_what_was_in_flight(
    tmp_path: Path, teacher: Teacher
) -> None:
    file, whole, cut = recipe(tmp_path, teacher.url, prompts=60), tmp_path / "whole", tmp_path / "cut"
    assert harvest(file, whole) == 0
    teacher.bodies.clear()
    teacher.delay_s = 0.1
    for at in (20, 90):
        with child(file, cut) as process:
            wait_for_lines(cut, at, process)
            process.send_signal(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
        assert not (cut / "responses" / "teacher" / "manifest.json").exists()
    with answer_files(stage_of(cut))[-1].open("a") as torn:
        torn.write('{"key": "torn by a cra')
    time.sleep(0.1)  # requests of the killed process that are still being answered
    teacher.delay_s = 0.0
    assert harvest(file, cut) == 0
    assert lines(cut) == lines(whole)
    repeated = [pair for pair, count in teacher.asked.items() if count > 1]
    assert len(repeated) <= 2 * CONCURRENCY * SAMPLES
    assert harvest(file, cut) == 0


def test_a_second_harvest_at_the_same_time_is_refused_and_the_first_goes_on(
    tmp_path: Path, teacher: Teacher, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = recipe(tmp_path, teacher.url, prompts=40), tmp_path / "run"
    refused = threading.Event()

    def answer(body: Body) -> Said:
        assert len(teacher.bodies) <= 20 or refused.wait(60)
        return usual(body)

    teacher.answer = answer
    with child(file, out, "--set", "teacher.timeout_s=60") as process:
        wait_for_lines(out, 5, process)
        assert harvest(file, out) == StorageError.exit_code
        assert "wait for it or end it" in capsys.readouterr().err
        refused.set()
        assert process.wait() == 0
    assert len(lines(out)) == 40 * SAMPLES


def test_an_interrupted_harvest_keeps_its_answers_and_prints_how_to_go_on(tmp_path: Path, teacher: Teacher) -> None:
    file, out = recipe(tmp_path, teacher.url, prompts=100), tmp_path / "run"
    teacher.delay_s = 0.05
    with child(file, out) as process:
        wait_for_lines(out, 10, process)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate()
        assert process.returncode == 130
    assert "everything done so far is kept" in said
    assert f"distill harvest --recipe {file} --out {out}" in said
    assert "Traceback" not in said
    kept = count_lines(out)
    assert kept == teacher.answered * SAMPLES  # what was in flight is waited for
    assert 10 <= kept < 100 * SAMPLES
    teacher.delay_s = 0.0
    teacher.bodies.clear()
    assert harvest(file, out) == 0
    assert sum(b["n"] for b in teacher.bodies) == 100 * SAMPLES - kept


def test_a_teacher_that_refuses_connections_ends_the_harvest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}/v1"
    assert harvest(recipe(tmp_path, url), tmp_path / "run") == TeacherError.exit_code
    assert url in capsys.readouterr().err
    assert count_lines(tmp_path / "run") == 0


def test_a_teacher_that_does_not_answer_in_time_ends_the_harvest(
    tmp_path: Path, teacher: Teacher, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher.delay_s = 1.0
    assert harvest(recipe(tmp_path, teacher.url), tmp_path / "run", "--set", "teacher.timeout_s=0.1") == TeacherError.exit_code
    assert "no answer within 0.1 s" in capsys.readouterr().err
    teacher.delay_s = 0.0
    assert harvest(recipe(tmp_path, teacher.url), tmp_path / "run", "--set", "teacher.timeout_s=30") == 0


@pytest.mark.parametrize(
    ("wrong", "said"), [(html, "not JSON"), (refusing(401), "API key"), (refusing(404), "/v1")], ids=["html", "401", "404"]
)
def test_a_teacher_that_is_none_or_wants_a_key_is_asked_no_more_than_the_requests_in_flight(
    tmp_path: Path, teacher: Teacher, capsys: pytest.CaptureFixture[str], wrong: Callable[[Body], Said], said: str
) -> None:
    teacher.answer = wrong
    file = recipe(tmp_path, teacher.url, prompts=50)
    assert harvest(file, tmp_path / "run") == TeacherError.exit_code
    assert said in capsys.readouterr().err
    assert len(teacher.bodies) <= 2 * CONCURRENCY
    teacher.answer = usual
    assert harvest(file, tmp_path / "run") == 0
    assert len(lines(tmp_path / "run")) == 50 * SAMPLES


@pytest.mark.parametrize(("wrong", "reason"), [(empty, "30 empty"), (refusing(400), "30 refused")], ids=["empty", "400"])
def test_a_teacher_of_which_nothing_usable_comes_fails_with_its_census_and_can_be_asked_again(
    tmp_path: Path, teacher: Teacher, capsys: pytest.CaptureFixture[str], wrong: Callable[[Body], Said], reason: str
) -> None:
    file, out = recipe(tmp_path, teacher.url), tmp_path / "run"
    teacher.answer = wrong
    assert harvest(file, out) == HarvestTooThin.exit_code
    said = capsys.readouterr().err
    assert reason in said
    assert "--retry-failed" in said
    assert len(lines(out)) == 10 * SAMPLES
    assert not (out / "responses" / "teacher" / "manifest.json").exists()

    teacher.answer = usual
    asked = len(teacher.bodies)
    assert harvest(file, out) == HarvestTooThin.exit_code
    assert len(teacher.bodies) == asked
    assert harvest(file, out, "--retry-failed") == 0
    assert manifest(out)["counts"]["failed"] == {}


def test_samples_that_are_all_the_same_are_warned_of(tmp_path: Path, teacher: Teacher, capsys: pytest.CaptureFixture[str]) -> None:
    teacher.answer = lambda body: saying(body, [prompt_of(body)] * body["n"])
    assert harvest(recipe(tmp_path, teacher.url), tmp_path / "run") == 0
    assert "nearly always the same text" in capsys.readouterr().out
    assert manifest(tmp_path / "run")["counts"]["distinct_fraction"] == pytest.approx(1 / SAMPLES, abs=1e-4)


def test_one_text_for_all_prompts_is_warned_of(tmp_path: Path, teacher: Teacher, capsys: pytest.CaptureFixture[str]) -> None:
    teacher.answer = same
    assert harvest(recipe(tmp_path, teacher.url), tmp_path / "run") == 0
    assert "one and the same text whatever it is asked" in capsys.readouterr().out


def test_different_samples_are_not_warned_of(tmp_path: Path, teacher: Teacher, capsys: pytest.CaptureFixture[str]) -> None:
    harvest(recipe(tmp_path, teacher.url), tmp_path / "run")
    assert "warning" not in capsys.readouterr().out


def test_a_teacher_that_gives_one_choice_a_request_is_asked_until_all_samples_are_there(tmp_path: Path, teacher: Teacher) -> None:
    teacher.answer = lambda body: saying(body, [f"{prompt_of(body)[-20:]!r} {body['seed']}"])
    assert harvest(recipe(tmp_path, teacher.url), tmp_path / "run") == 0
    assert len(lines(tmp_path / "run")) == 10 * SAMPLES
    assert len(teacher.bodies) == 10 * SAMPLES


def test_shots_never_hold_the_row_that_is_asked(tmp_path: Path, teacher: Teacher) -> None:
    assert harvest(recipe(tmp_path, teacher.url), tmp_path / "run", "--set", "harvest.shots=4") == 0
    for body in teacher.bodies:
        *shots, question = [m["content"] for m in body["messages"] if m["role"] == "user"]
        assert len(shots) == 4
        assert question not in shots
        assert body["messages"][1]["role"] == "assistant"


def test_the_completions_protocol_is_asked_with_plain_text_and_the_key_is_sent(tmp_path: Path, teacher: Teacher) -> None:
    (tmp_path / "key").write_text("open-sesame\n")
    settings = ("--set", "teacher.protocol=completions", "--set", f"teacher.api_key_file={tmp_path / 'key'}")
    assert harvest(recipe(tmp_path, teacher.url), tmp_path / "run", *settings) == 0
    assert all(isinstance(body["prompt"], str) and "messages" not in body for body in teacher.bodies)
    assert teacher.keys == {"Bearer open-sesame"}
    assert not any("sesame" in f.read_text() for f in (tmp_path / "run").rglob("*") if f.is_file())


def test_another_teacher_cannot_slip_into_a_run(tmp_path: Path, teacher: Teacher, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = recipe(tmp_path, teacher.url), tmp_path / "run"
    assert harvest(file, out, "--teacher-url", "http://127.0.0.1:9/v1") == 2
    assert "give --set teacher.url=" in capsys.readouterr().err
    wrong = ("--set", "teacher.url=http://127.0.0.1:9/v1")
    assert harvest(file, out, *wrong) == TeacherError.exit_code
    assert teacher.bodies == []
    assert harvest(file, out) == 0  # nobody has answered there, so that it could be mended
    asked = len(teacher.bodies)
    capsys.readouterr()
    assert harvest(file, out, *wrong) == RunMismatch.exit_code
    assert "teacher.url" in capsys.readouterr().err
    assert len(teacher.bodies) == asked > 0


def test_a_full_disk_ends_the_harvest_with_whole_lines_kept(tmp_path: Path, teacher: Teacher, capsys: pytest.CaptureFixture[str]) -> None:
    file, whole, out = recipe(tmp_path, teacher.url, prompts=100), tmp_path / "whole", tmp_path / "run"
    assert harvest(file, whole) == 0
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        for room in (60_000, 100):  # enough for some lines; not even for the index of those that are there
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
            assert harvest(file, out) == StorageError.exit_code
            said = capsys.readouterr().err
            assert str(out) in said
            assert 0 < count_lines(out) < 100 * SAMPLES
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    with AnswerLedger(stage_of(out)) as ledger:
        assert ledger.repaired_bytes == 0
    assert harvest(file, out) == 0
    assert lines(out) == lines(whole)
