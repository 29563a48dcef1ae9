"""A judge over HTTP: fair, biased, senseless, dead and slow ones, and a process that is killed while it asks."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from evaluated import recipe
from teachers import listening, prompt_of, refusing, saying

from evaluator.judge import ask_judge, judge_of, judged
from shared.artifacts import Run
from shared.contracts import Example
from shared.errors import TeacherRejected, TeacherUnavailable
from shared.harvest.ledger import answer_files
from shared.settings import JudgeSettings

BASELINE = "student-zero-shot"
ROWS = [Example(id=f"r{i}", question=f"I have symptom number {i}, is it serious?", summary="?") for i in range(20)]
# the distilled student's answers are the longer ones on all rows but every fourth
TEXTS = {"distilled": [f"What is {i}?" if i % 4 else f"{i}?" for i in range(20)], BASELINE: [f"Is {i}?" for i in range(20)]}
CHILD = """
import sys
from pathlib import Path
sys.path[:0] = sys.argv[3:]
from test_judge_stage import ROWS, TEXTS, run_at, settings_for
from evaluator.judge import ask_judge, judge_of
settings = settings_for(sys.argv[2], concurrency=1)
ask_judge(run_at(Path(sys.argv[1])), settings, ROWS, TEXTS, open_judge=lambda: judge_of(settings))
"""


def run_at(path):
    return Run.open(path, recipe(teacher={"launch": {"engine": "scripted"}, "max_attempts": 1, "patience_s": 0.5}))


def settings_for(url, **more):
    return JudgeSettings(url=url, model="judge-1", timeout_s=20, **more)


@pytest.fixture
def server():
    with listening() as server:
        yield server


@pytest.fixture
def run(tmp_path):
    return run_at(tmp_path / "run")


def longer(body):
    a, b = re.search(r"ANSWER A>>>\n(.*)\n<<<END.*ANSWER B>>>\n(.*)\n<<<END", prompt_of(body), re.DOTALL).groups()
    return saying(body, ["A" if len(a) > len(b) else "B"])


def always(text):
    return lambda body: saying(body, [text])


def judge(run, server, **more):
    settings = settings_for(server.url, **more)
    ask_judge(run, settings, ROWS, TEXTS, open_judge=lambda: judge_of(settings))
    found = judged(run, settings, ROWS, TEXTS)
    assert (found.judge.model, found.judge.asked) == ("judge-1", server.url)
    (of_baseline,) = found.judge.verdicts
    return of_baseline, found.notes


def test_a_fair_judge_is_asked_greedily_in_both_orders_and_its_choices_become_verdicts(run, server, tmp_path):
    (tmp_path / "key").write_text("secret\n")
    server.answer = longer
    found, notes = judge(run, server, api_key_file=tmp_path / "key")
    assert (found.wins, found.losses, found.ties, found.unreadable, notes) == (15, 5, 0, 0, [])
    assert found.win_rate == 0.75
    assert 0.5 < found.low < 0.75 < found.high < 1
    assert Counter(Counter(prompt_of(body) for body in server.bodies).values()) == {1: 40}
    assert {(body["temperature"], body["n"], body["max_tokens"], body["model"]) for body in server.bodies} == {(0, 1, 64, "judge-1")}
    assert server.keys == {"Bearer secret"}


@pytest.mark.parametrize("place", ["A", "B"])
def test_a_judge_that_always_chooses_one_place_contradicts_itself_everywhere_and_says_nothing(run, server, place):
    server.answer = always(place)
    found, (note,) = judge(run, server)
    assert (found.wins, found.losses, found.ties, found.contradictions) == (0, 0, 20, 20)
    assert (found.win_rate, found.low, found.high) == (0.5, None, None)
    assert "chose the place and not the answer on 20 of 20 rows" in note


def test_a_judge_that_always_says_tie_is_tied_and_no_contradiction(run, server):
    server.answer = always("TIE")
    found, notes = judge(run, server)
    assert (found.ties, found.contradictions, found.win_rate, notes) == (20, 0, 0.5, [])


@pytest.mark.parametrize("said", ["As a language model I have no opinion.", "  "])
def test_a_judge_that_answers_nonsense_or_nothing_fails_no_evaluation_and_has_no_win_rate(run, server, said):
    server.answer = always(said)
    found, (note,) = judge(run, server)
    assert found.unreadable == 20
    assert (found.win_rate, found.low, found.high) == (None, None, None)
    assert "20 have no readable verdict of judge-1 and are left out; it judged nothing at all" in note


def test_rows_the_judge_refuses_are_left_out_and_counted(run, server):
    server.answer = lambda body: refusing(400)(body) if "number 7," in prompt_of(body) else longer(body)
    found, (note,) = judge(run, server)
    assert (found.wins, found.losses, found.unreadable) == (14, 5, 1)
    assert "of 20 rows against student-zero-shot, 1 have no readable verdict" in note


def test_a_dead_judge_ends_the_command_so_that_it_can_go_on_later_and_is_named_as_the_judge(run, server):
    server.answer = refusing(500)
    with pytest.raises(TeacherUnavailable, match=r"the judge \(settings evaluate\.judge") as failure:
        judge(run, server)
    assert failure.value.exit_code == 7
    assert failure.value.goes_on
    server.answer = longer
    assert judge(run, server)[0].wins == 15


def test_a_judge_that_refuses_the_key_is_named_as_the_judge(run, server):
    server.answer = refusing(401)
    with pytest.raises(TeacherRejected, match=r"the judge \(settings evaluate\.judge"):
        judge(run, server)


def test_what_a_killed_process_was_answered_is_not_asked_again(run, server):
    ended = threading.Event()

    def nine_answers(body):
        if len(server.bodies) > 9:
            ended.wait(60)
        return longer(body)

    server.answer = nine_answers
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    process = subprocess.Popen([sys.executable, "-c", CHILD, str(run.path), server.url, *paths], stderr=subprocess.PIPE, text=True)
    while sum(file.read_bytes().count(b"\n") for file in answer_files(run.path / "evaluation" / "answers", f"judge-{BASELINE}")) < 9:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    ended.set()
    before = [prompt_of(body) for body in server.bodies]
    assert len(before) == 10
    assert judge(run, server)[0].wins == 15
    after = [prompt_of(body) for body in server.bodies][10:]
    # the tenth was on its way when the process died
    assert len(after) == 40 - 9
    assert not set(after) & set(before[:9])
    assert judge(run, server)[0].wins == 15
    assert len(server.bodies) == 10 + 31
