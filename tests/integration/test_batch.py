"""`distill batch` as its users meet it: whole files, each row with its answer or its error, and nothing asked twice."""

from __future__ import annotations

import csv
import io
import json
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from teachers import Body, Said, Teacher, html, listening, refusing

from shared.cli import main
from shared.errors import DataError, HarvestTooThin, RunMismatch, SettingsError, StorageError, TeacherError
from shared.harvest import circuit
from shared.harvest.ledger import AnswerLedger, answer_files

KEY = "sk-geheim-0123456789"
VERSION = "20261126T214000Z-5f3a9c1e0b2d"
AWKWARD = ["Was hilft gegen Übelkeit?", 'Dr. "Who" said:\nrest, and\r\nwater', " a, b\t", "\U0001f912 and now?", "a\rb"]
"""Questions with what formats stumble over."""


def said(text: str, finish_reason: str = "stop", version: str | None = VERSION) -> Said:
    answers = [{"text": text, "finish_reason": finish_reason}]
    return Said(json.dumps({"model": "student", "version": version, "answers": answers}).encode())


def answer_to(question: str) -> str:
    return f'Antwort: "{question}"\n'


def answering(body: Body) -> Said:
    return said(answer_to(body["question"]))


def too_long(body: Body) -> Said:
    error = {"message": "the question is too long", "type": "invalid_request_error", "param": None, "code": "context_length_exceeded"}
    return Said(json.dumps({"error": error}).encode(), 400)


@pytest.fixture
def student() -> Iterator[Teacher]:
    """A student's server, as far as a batch sees it."""
    with listening() as student:
        student.answer = answering
        yield student


def questions(count: int) -> list[dict[str, Any]]:
    return [{"id": i, "question": f"What is condition {i}?"} for i in range(1, count + 1)]


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def batch(source: Path, out: Path, student: Teacher | str, *more: str) -> int:
    """The exit code of `distill batch` in this process."""
    return main(["batch", str(source), "--out", str(out), "--url", student if isinstance(student, str) else student.url, *more])


def asked(student: Teacher) -> Counter[str]:
    return Counter(body["question"] for body in student.bodies)


@contextmanager
def child(source: Path, out: Path, student: Teacher, *more: str) -> Iterator[subprocess.Popen[str]]:
    """`distill batch` as a process of its own."""
    command = [sys.executable, "-m", "shared.cli", "batch", str(source), "--out", str(out), "--url", student.url, *more]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def kept(out: Path) -> set[str]:
    """The rows that have a whole line in the ledger of `out`."""
    lines = [line for file in answer_files(Path(f"{out}.batch")) for line in file.read_bytes().splitlines(keepends=True)]
    return {json.loads(line)["example_id"] for line in lines if line.endswith(b"\n")}


# what goes in and comes out


def test_every_row_of_a_jsonl_comes_back_in_its_place_with_its_answer_and_nothing_else_changed(tmp_path: Path, student: Teacher) -> None:
    rows = [{"n": i, "question": text, "more": {"x": [1.5, None, 10**20]}, "half": "\ud800"} for i, text in enumerate(AWKWARD)]
    source = jsonl(tmp_path / "in.jsonl", rows)
    assert batch(source, tmp_path / "out.jsonl", student) == 0
    added = {"finish_reason": "stop", "version": VERSION, "error": None}
    assert rows_of(tmp_path / "out.jsonl") == [{**row, "answer": answer_to(str(row["question"])), **added} for row in rows]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl", "out.jsonl.batch"]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_every_row_of_a_csv_comes_back_in_its_place_with_its_answer_and_the_ends_of_lines_it_had(
    tmp_path: Path, student: Teacher, end: str, mark: str
) -> None:
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator=end, quoting=csv.QUOTE_ALL)
    writer.writerows([["n", "question", "note, quoted"], *([i, question, ""] for i, question in enumerate(AWKWARD))])
    source = tmp_path / "in.csv"
    source.write_bytes((mark + text.getvalue()).encode())
    assert batch(source, tmp_path / "out.csv", student) == 0
    written = (tmp_path / "out.csv").read_bytes().decode()
    assert written.startswith(mark + 'n,question,"note, quoted",answer,finish_reason,version,error' + end)
    read = list(csv.DictReader(io.StringIO(written.removeprefix(mark), newline=""), strict=True))
    added = {"finish_reason": "stop", "version": VERSION, "error": ""}
    assert read == [{"n": str(i), "question": q, "note, quoted": "", "answer": answer_to(q), **added} for i, q in enumerate(AWKWARD)]


def test_equal_texts_are_asked_once_and_each_of_their_rows_has_the_answer(tmp_path: Path, student: Teacher) -> None:
    source = jsonl(tmp_path / "in.jsonl", [{"question": "Same?"}, {"question": "Other?"}, {"question": "Same?"}] * 20)
    assert batch(source, tmp_path / "out.jsonl", student) == 0
    assert asked(student) == {"Same?": 1, "Other?": 1}
    assert [row["answer"] for row in rows_of(tmp_path / "out.jsonl")] == [answer_to(f"{q}?") for q in ("Same", "Other", "Same")] * 20


def test_a_server_is_sent_only_what_was_asked_for(tmp_path: Path, student: Teacher) -> None:
    source = jsonl(tmp_path / "in.jsonl", [{"text": "Why?"}])
    assert batch(source, tmp_path / "a.jsonl", student, "--column", "text") == 0
    assert batch(source, tmp_path / "b.jsonl", student, "--column", "text", "--model", "base", "--truncate") == 0
    assert student.bodies == [{"question": "Why?"}, {"question": "Why?", "model": "base", "truncate": True}]


def test_a_key_comes_from_a_file_or_a_variable_and_is_shown_nowhere(
    tmp_path: Path, student: Teacher, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = jsonl(tmp_path / "in.jsonl", questions(2))
    file = tmp_path / "key"
    file.write_text(f"{KEY}\n")
    assert batch(source, tmp_path / "a.jsonl", student, "--api-key-file", str(file)) == 0
    monkeypatch.setenv("DISTILL_BATCH_API_KEY", KEY)
    assert batch(source, tmp_path / "b.jsonl", student) == 0
    assert student.keys == {f"Bearer {KEY}"}
    written = [path.read_text() for path in tmp_path.rglob("*") if path.is_file() and path != file]
    assert KEY not in "".join([*capsys.readouterr(), *written])


def test_answers_of_two_versions_can_be_told_apart(tmp_path: Path, student: Teacher, capsys: pytest.CaptureFixture[str]) -> None:
    student.answer = lambda body: said("yes", "length", "v1" if "condition 1?" in body["question"] else None)
    assert batch(jsonl(tmp_path / "in.jsonl", questions(3)), tmp_path / "out.jsonl", student) == 0
    assert [(row["version"], row["finish_reason"]) for row in rows_of(tmp_path / "out.jsonl")] == [
        ("v1", "length"),
        *[(None, "length")] * 2,
    ]
    assert "another student was promoted in between: 2 by student, 1 by v1" in capsys.readouterr().out


# going on


def test_a_batch_that_is_complete_asks_nothing_and_writes_the_same(tmp_path: Path, student: Teacher) -> None:
    source, out = jsonl(tmp_path / "in.jsonl", questions(30)), tmp_path / "out.jsonl"
    assert batch(source, out, student) == 0
    before, student.bodies[:] = out.read_bytes(), []
    out.unlink()
    assert batch(source, out, student) == 0
    assert out.read_bytes() == before
    assert student.bodies == []


def test_a_batch_killed_at_any_instant_ends_with_the_file_of_one_that_was_not_and_asks_again_only_what_was_in_flight(
    tmp_path: Path, student: Teacher
) -> None:
    count, at_once, drawn, kills = 240, 8, random.Random(3), 0
    source, out = jsonl(tmp_path / "in.jsonl", questions(count)), tmp_path / "out.jsonl"
    assert batch(source, tmp_path / "whole.jsonl", student) == 0
    student.bodies.clear()
    student.delay_s = 0.05
    held: set[str] = set()
    for _ in range(6):
        before = len(student.bodies)
        with child(source, out, student, "--concurrency", str(at_once)) as process:
            while len(student.bodies) == before and process.poll() is None:
                time.sleep(0.005)
            time.sleep(drawn.uniform(0, 0.25))
            process.kill()
            process.wait()
        time.sleep(2 * student.delay_s)  # what was in flight has come
        if process.returncode == 0:
            break
        kills += 1
        assert not out.exists()
        again = {f"row-{body['question'].split()[-1][:-1]}" for body in student.bodies[before:]}
        assert not again & held, "asked though it was answered"
        held = kept(out)
    assert kills >= 3
    student.delay_s = 0.0
    assert batch(source, out, student) == 0
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert set(asked(student).values()) <= set(range(1, kills + 2))
    assert asked(student).total() <= count + kills * at_once


@pytest.mark.parametrize(("blow", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_told_to_end_it_waits_for_what_is_in_flight_and_tells_how_to_go_on(
    tmp_path: Path, student: Teacher, blow: signal.Signals, code: int
) -> None:
    student.delay_s = 0.3
    source, out = jsonl(tmp_path / "in.jsonl", questions(200)), tmp_path / "out.jsonl"
    with child(source, out, student, "--concurrency", "4") as process:
        while len(student.bodies) < 4:
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        process.send_signal(blow)
        told, _ = process.communicate(timeout=60)
    assert process.returncode == code
    assert "waiting for what is in flight" in told
    assert f"distill batch {source} --out {out}" in told
    assert not out.exists()
    assert len(kept(out)) == len(student.bodies)
    student.delay_s = 0.0
    assert batch(source, out, student) == 0
    assert set(asked(student).values()) == {1}


def test_two_batches_of_one_file_do_not_get_in_each_others_way(
    tmp_path: Path, student: Teacher, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = jsonl(tmp_path / "in.jsonl", questions(2)), tmp_path / "out.jsonl"
    with AnswerLedger(Path(f"{out}.batch")):
        assert batch(source, out, student) == StorageError.exit_code
    assert "another process" in capsys.readouterr().err
    assert student.bodies == []
    assert batch(source, out, student) == 0


# a server that says no


def test_a_server_that_is_busy_is_asked_again_when_it_says_and_no_row_fails(tmp_path: Path, student: Teacher) -> None:
    lock, refused = threading.Lock(), [0]

    def busy(body: Body) -> Said:
        with lock:
            refused[0] += 1
            no = refused[0] % 7 == 3 and refused[0] < 40
        return refusing(429, "queue full", **{"retry-after": "0.1"})(body) if no else answering(body)

    student.answer = busy
    source = jsonl(tmp_path / "in.jsonl", questions(60))
    assert batch(source, tmp_path / "out.jsonl", student) == 0
    assert asked(student).total() > 60
    assert all(row["error"] is None for row in rows_of(tmp_path / "out.jsonl"))


def test_a_row_that_fails_is_kept_with_its_reason_and_asked_again_only_when_told_to(
    tmp_path: Path, student: Teacher, capsys: pytest.CaptureFixture[str]
) -> None:
    student.answer = lambda body: refusing(422, "not this")(body) if "condition 7?" in body["question"] else answering(body)
    source, out = jsonl(tmp_path / "in.jsonl", questions(20)), tmp_path / "out.jsonl"
    assert batch(source, out, student) == HarvestTooThin.exit_code
    told = capsys.readouterr()
    assert "20 prompts, 19 answers, 1 failed (1 refused), 0 cut off" in told.out
    assert "1 of 20 rows have no answer" in told.err
    assert "--retry-failed" in told.err
    failed = [row for row in rows_of(out) if row["error"] is not None]
    assert [(row["id"], row["answer"], row["finish_reason"]) for row in failed] == [(7, None, None)]
    assert failed[0]["error"].startswith("refused: ")
    assert "not this" in failed[0]["error"]
    student.answer = answering
    assert batch(source, out, student) == HarvestTooThin.exit_code
    assert asked(student).total() == 20
    assert batch(source, out, student, "--retry-failed") == 0
    assert asked(student).total() == 21
    assert all(row["answer"] == answer_to(row["question"]) for row in rows_of(out))


def test_most_rows_may_fail_and_the_others_have_their_answers_all_the_same(tmp_path: Path, student: Teacher) -> None:
    student.answer = lambda body: answering(body) if body["question"].endswith("0?") else too_long(body)
    assert batch(jsonl(tmp_path / "in.jsonl", questions(50)), tmp_path / "out.jsonl", student) == HarvestTooThin.exit_code
    assert [row["id"] for row in rows_of(tmp_path / "out.jsonl") if row["answer"]] == [10, 20, 30, 40, 50]


def test_if_all_of_the_first_rows_fail_nothing_more_is_asked(tmp_path: Path, student: Teacher, capsys: pytest.CaptureFixture[str]) -> None:
    student.answer = refusing(422, "truncate: unknown field")
    assert batch(jsonl(tmp_path / "in.jsonl", questions(50)), tmp_path / "out.jsonl", student) == HarvestTooThin.exit_code
    assert len(student.bodies) == 16
    assert "16 of 16 answers failed (16 refused; the last: refused: " in capsys.readouterr().err
    student.answer = answering
    assert batch(tmp_path / "in.jsonl", tmp_path / "out.jsonl", student, "--retry-failed") == 0


def test_what_was_too_long_is_cut_once_that_is_asked_for_and_not_the_other_way_round(
    tmp_path: Path, student: Teacher, capsys: pytest.CaptureFixture[str]
) -> None:
    student.answer = lambda body: too_long(body) if "7?" in body["question"] and not body.get("truncate") else answering(body)
    source, out = jsonl(tmp_path / "in.jsonl", questions(20)), tmp_path / "out.jsonl"
    assert batch(source, out, student) == HarvestTooThin.exit_code
    assert "--truncate" in capsys.readouterr().err
    assert batch(source, out, student, "--truncate") == 0
    assert asked(student).total() == 22
    assert batch(source, out, student) == RunMismatch.exit_code
    assert "truncate: the batch has True, you ask for False" in capsys.readouterr().err


def test_a_key_that_is_refused_ends_it_at_once_and_loses_nothing(
    tmp_path: Path, student: Teacher, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISTILL_BATCH_API_KEY", KEY)
    source, out = jsonl(tmp_path / "in.jsonl", questions(100)), tmp_path / "out.jsonl"
    student.answer = lambda body: answering(body) if len(student.bodies) <= 20 else refusing(401, f"no such key {KEY}")(body)
    assert batch(source, out, student, "--concurrency", "4") == TeacherError.exit_code
    told = capsys.readouterr().err
    assert "--api-key-file, DISTILL_BATCH_API_KEY" in told
    assert KEY not in told
    assert len(student.bodies) <= 20 + 4
    student.answer = answering
    assert batch(source, out, student) == 0
    assert asked(student).total() <= 100 + 4


def test_a_model_the_server_does_not_have_ends_it_and_another_may_take_its_place(
    tmp_path: Path, student: Teacher, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = jsonl(tmp_path / "in.jsonl", questions(100)), tmp_path / "out.jsonl"
    student.answer = refusing(404, "there is no model 'tutor'")
    assert batch(source, out, student, "--model", "tutor") == TeacherError.exit_code
    told = capsys.readouterr().err
    assert "no model 'tutor'" in told
    assert f"GET {student.url}/student" in told
    student.answer = answering
    assert batch(source, out, student) == 0


def test_an_answer_of_something_else_names_the_url_to_mend(tmp_path: Path, student: Teacher, capsys: pytest.CaptureFixture[str]) -> None:
    student.answer = html
    assert batch(jsonl(tmp_path / "in.jsonl", questions(3)), tmp_path / "out.jsonl", student) == TeacherError.exit_code
    assert "does the URL end in /v1, is it that of a `distill serve`?" in capsys.readouterr().err


def test_a_server_that_is_not_ready_is_waited_for(tmp_path: Path, student: Teacher) -> None:
    ready_at = time.monotonic() + 1.0
    waiting = refusing(503, "no student is promoted yet", **{"retry-after": "1"})
    student.answer = lambda body: answering(body) if time.monotonic() > ready_at else waiting(body)
    assert batch(jsonl(tmp_path / "in.jsonl", questions(40)), tmp_path / "out.jsonl", student) == 0
    assert all(row["answer"] for row in rows_of(tmp_path / "out.jsonl"))


def test_a_server_that_is_not_there_is_named_with_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(circuit, "AT_FIRST_S", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}/v1"
    assert batch(jsonl(tmp_path / "in.jsonl", questions(3)), tmp_path / "out.jsonl", url) == TeacherError.exit_code
    told = capsys.readouterr().err
    assert "the student has not answered for" in told
    assert "cannot connect" in told
    assert "`distill serve`" in told
    assert "once that is mended, to go on:\n  distill batch" in told


# another batch


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (["--model", "base"], "model: the batch has 'student', you ask for 'base'"),
        (["--column", "id2"], "column: the batch has 'question', you ask for 'id2'"),
        (["--url", "http://127.0.0.1:1/v1"], "you ask for 'http://127.0.0.1:1/v1'"),
    ],
)
def test_another_batch_with_the_same_out_is_refused_with_the_difference(
    tmp_path: Path, student: Teacher, capsys: pytest.CaptureFixture[str], change: list[str], difference: str
) -> None:
    source, out = jsonl(tmp_path / "in.jsonl", [{**row, "id2": "why?"} for row in questions(3)]), tmp_path / "out.jsonl"
    assert batch(source, out, student) == 0
    before = out.read_bytes()
    assert batch(source, out, student, *change) == RunMismatch.exit_code
    assert difference in capsys.readouterr().err
    assert len(student.bodies) == 3
    assert out.read_bytes() == before
    assert batch(source, out, student) == 0


def test_another_file_with_the_same_out_is_refused_and_the_same_one_under_another_name_is_not(
    tmp_path: Path, student: Teacher, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.jsonl"
    assert batch(jsonl(tmp_path / "a.jsonl", questions(3)), out, student) == 0
    assert batch(jsonl(tmp_path / "b.jsonl", questions(4)), out, student) == RunMismatch.exit_code
    told = capsys.readouterr().err
    assert "a.jsonl" in told
    assert "b.jsonl" in told
    assert batch(jsonl(tmp_path / "a.jsonl", questions(4)), out, student) == RunMismatch.exit_code
    told = capsys.readouterr().err
    assert "input_sha256: the batch has" in told
    assert "b.jsonl" not in told
    assert batch(jsonl(tmp_path / "c.jsonl", questions(3)), out, student) == 0
    assert len(student.bodies) == 3


def test_files_that_no_batch_has_made_are_left_alone(tmp_path: Path, student: Teacher, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = jsonl(tmp_path / "in.jsonl", questions(3)), jsonl(tmp_path / "out.jsonl", [{"mine": 1}])
    assert batch(source, out, student) == RunMismatch.exit_code
    assert "no batch has made it" in capsys.readouterr().err
    assert rows_of(out) == [{"mine": 1}]
    out.unlink()
    (tmp_path / "out.jsonl.batch").mkdir()
    (tmp_path / "out.jsonl.batch" / "mine").touch()
    assert batch(source, out, student) == RunMismatch.exit_code
    assert "no folder of a batch" in capsys.readouterr().err
    assert student.bodies == []


# bad input


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("in.jsonl", None, ["in.jsonl: No such file or directory", "give the path"]),
        ("in.jsonl", b"", ["in.jsonl: no rows"]),
        ("in.csv", b"question\n", ["in.csv: no rows"]),
        ("in.txt", b"Why?\n", ["in.txt: expected a file that ends in .jsonl or .csv"]),
        ("in.jsonl", b'{"question": "a"}\nWhy?\n', ["in.jsonl, line 2: not valid JSON"]),
        ("in.jsonl", b'{"question": "a"}\n["b"]\n', ["in.jsonl, line 2: expected a JSON object, found list"]),
        ("in.jsonl", b'{"question": "a"}\n{"question": "\xff"}\n', ["in.jsonl, line 2: not UTF-8"]),
        ("in.csv", b"id,question\n1,a\n2,b,c\n", ["in.csv, line 3: 3 fields, but the header names 2"]),
        ("in.csv", b'id,question\n1,"a\n', ["in.csv, line 2: not valid CSV"]),
        ("in.csv", b"id,text\n1,a\n", ["no column 'question'", "it has: id, text", "--column"]),
        ("in.csv", b"question,answer,error\na,b,c\n", ["the columns answer, error would be written over", "rename"]),
        ("in.jsonl", b'{"question": "a"}\n{"question": "b", "version": 1}\n', ["the column version would be written over"]),
        ("in.csv", b"id,question\n1,a\n2, \n", ["1 of 2 rows", "line 3: question is empty", "Fill them in"]),
    ],
)
def test_a_wrong_file_is_refused_before_anything_is_asked_with_place_and_remedy(
    tmp_path: Path, student: Teacher, capsys: pytest.CaptureFixture[str], name: str, content: bytes | None, parts: list[str]
) -> None:
    source = tmp_path / name
    if content is not None:
        source.write_bytes(content)
    assert batch(source, tmp_path / f"out{source.suffix}", student) == DataError.exit_code
    told = capsys.readouterr().err
    assert told.startswith("distill batch: ")
    for part in parts:
        assert part in told
    assert student.bodies == []
    assert [entry for entry in tmp_path.iterdir() if entry != source] == []


def test_all_rows_that_cannot_be_asked_are_counted_and_the_first_few_named(
    tmp_path: Path, student: Teacher, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong: list[dict[str, Any]] = [{}, {"question": None}, {"question": 5}, {"question": " \n"}, {"question": "\ud800"}]
    source = jsonl(tmp_path / "in.jsonl", [*questions(2), *[{"id": 0, **row} for row in wrong * 3]])
    assert batch(source, tmp_path / "out.jsonl", student) == DataError.exit_code
    told = capsys.readouterr().err
    assert (
        "15 of 17 rows cannot be asked, and nothing was: line 3: question is missing; line 4: question is null; "
        "line 5: question holds int, not text; line 6: question is empty; line 7: question holds half of a surrogate pair, "
        "which is no text; and 10 more. Fill them in or take them out"
    ) in told
    assert student.bodies == []


@pytest.mark.parametrize(
    ("out", "more", "part"),
    [
        ("in.jsonl", [], "the file that is to be read"),
        ("out.csv", [], "give a name that ends in .jsonl"),
        ("nowhere/out.jsonl", [], "there is no folder"),
        ("folder.jsonl", [], "a folder"),
        ("out.jsonl", ["--concurrency", "0"], "--concurrency 0: give a number from 1 to 1024"),
        ("out.jsonl", ["--url", "ftp://x"], "--url 'ftp://x': expected one like"),
        ("out.jsonl", ["--api-key-file", "/nowhere/key"], "cannot read /nowhere/key"),
    ],
)
def test_a_wrong_option_is_refused_before_anything_is_asked(
    tmp_path: Path, student: Teacher, capsys: pytest.CaptureFixture[str], out: str, more: list[str], part: str
) -> None:
    source = jsonl(tmp_path / "in.jsonl", questions(2))
    (tmp_path / "folder.jsonl").mkdir()
    assert batch(source, tmp_path / out, student, *more) == SettingsError.exit_code
    assert part in capsys.readouterr().err
    assert rows_of(source) == questions(2)
    assert student.bodies == []


def test_a_folder_that_cannot_be_written_to_is_named_before_anything_is_asked(
    tmp_path: Path, student: Teacher, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path("/proc/self")  # where not even root may make a folder
    assert batch(jsonl(tmp_path / "in.jsonl", questions(2)), folder / "out.jsonl", student) == StorageError.exit_code
    assert "/proc/self/out.jsonl.batch" in capsys.readouterr().err
    assert student.bodies == []


@contextmanager
def room(size: int) -> Iterator[None]:
    """No file may become larger than so many bytes, as on a disk that fills."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("answers", [lambda count: count // 2, lambda count: count], ids=["while it asks", "while it writes"])
def test_a_disk_that_fills_ends_it_with_all_answers_kept_and_no_part_of_a_file(
    tmp_path: Path, student: Teacher, capsys: pytest.CaptureFixture[str], answers: Callable[[int], int]
) -> None:
    count, line = 60, 3000
    rows = [{**row, "notes": "x" * line} for row in questions(count)]
    source, out = jsonl(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    # in the ledger a row is the answer, in the file the notes as well
    student.answer = lambda body: said("y" * 1000)
    with room(1350 * answers(count)):
        assert batch(source, out, student) == StorageError.exit_code
    assert f"{out}" in capsys.readouterr().err
    assert not out.exists()
    held = len(kept(out))
    assert held == count if answers(count) == count else 0 < held < count
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".tmp")]
    asked = -1
    while asked != len(student.bodies):  # what was sent and given up may still be read there
        asked = len(student.bodies)
        time.sleep(0.3)
    student.bodies.clear()
    assert batch(source, out, student) == 0
    assert len(student.bodies) == count - held
    assert len(rows_of(out)) == count


def test_more_requests_at_once_than_open_files_are_refused_before_the_first_one(tmp_path: Path, student: Teacher) -> None:
    source = jsonl(tmp_path / "in.jsonl", questions(3))
    command = [sys.executable, "-m", "shared.cli", "batch", str(source), "--out", str(tmp_path / "out.jsonl"), "--url", student.url]
    done = subprocess.run(
        ["bash", "-c", 'ulimit -n 200; exec "$@"', "limited", *command, "--concurrency", "500"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == SettingsError.exit_code
    assert "--concurrency = 500: this process may have no more than 200 files open" in done.stderr
    assert student.bodies == []
