"""The line of progress: rewritten on a terminal, sparse in a log, and truthful about what was done before."""

from __future__ import annotations

import os
import pty
import re
import signal
import subprocess
import sys
import termios
import textwrap
import threading
import time

import pytest

from shared.commands import Interruption, Progress, interruptible
from shared.errors import Stopped

UNKNOWN = "time left not known yet"


def log(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Lines so far, without rates and times."""
    return [re.sub(r"[0-9.]+/s(, [0-9]+ s left)?", "RATE", line) for line in capsys.readouterr().err.splitlines()]


def test_a_log_gets_a_line_at_the_start_and_one_at_the_end_and_none_in_between_in_a_short_time(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress("harvest", 100, unit="answers")
    for _ in range(100):
        progress.step()
        progress.tick()
    progress.end()
    assert log(capsys) == [f"harvest: 0/100 answers, RATE, {UNKNOWN}", "harvest: 100/100 answers, RATE"]


def test_a_log_gets_a_line_when_its_time_has_come_whether_or_not_anything_was_done(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress("harvest", 3, every_s=0.0, note=lambda: "waiting")
    progress.tick()
    progress.step()
    assert log(capsys) == [f"harvest: 0/3 rows, RATE, {UNKNOWN}, waiting"] * 2 + ["harvest: 1/3 rows, RATE, waiting"]


def test_what_else_there_is_to_say_is_asked_for_when_a_line_is_written(capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[int] = []

    def note() -> str:
        asked.append(len(asked))
        return f"{asked[-1]} in flight"

    progress = Progress("harvest", 50, note=note)
    for _ in range(50):
        progress.step()
    assert asked == [0, 1]
    assert log(capsys)[-1] == "harvest: 50/50 rows, RATE, 1 in flight"


def test_a_note_with_a_step_is_the_last_word(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress("train", 2)
    progress.step(note="loss 2")
    progress.step(note="loss 1")
    assert log(capsys)[-1] == "train: 2/2 rows, RATE, loss 1"


def test_the_rate_speaks_of_this_command_alone(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress("harvest", 1000, every_s=0.0)
    progress.had(900)
    progress.tick()
    assert capsys.readouterr().err.splitlines()[-1] == f"harvest: 900/1000 rows, 0.0/s, {UNKNOWN}"
    progress.had(100)
    progress.end()
    assert capsys.readouterr().err == "harvest: 1000/1000 rows, 0.0/s\n"


def test_a_stage_that_ends_early_says_how_far_it_came_and_one_that_did_nothing_more_says_nothing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    progress = Progress("harvest", 10)
    progress.step(4)
    progress.end()
    assert [line.split(",")[0] for line in log(capsys)] == ["harvest: 0/10 rows", "harvest: 4/10 rows"]
    idle = Progress("harvest", 10)
    idle.end()
    assert len(log(capsys)) == 1


def test_without_a_total_there_is_no_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress("harvest", None)
    progress.step(3)
    progress.end()
    assert [re.sub(r"[0-9.]+/s", "RATE", line) for line in log(capsys)] == ["harvest: 0 rows, RATE", "harvest: 3 rows, RATE"]


def test_a_stage_with_nothing_to_do_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    Progress("harvest", 0).end()
    assert log(capsys) == []


def on_a_terminal(code: str, *, columns: int = 80) -> str:
    """What a program writes to standard error where that is a terminal."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(ours, (24, columns))
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stderr=theirs, env=environment) as child:
        os.close(theirs)
        written = b""
        while True:
            try:
                written += os.read(ours, 65536)
            except OSError:  # it has ended
                break
        assert child.wait() == 0
    os.close(ours)
    return written.decode()


def test_a_terminal_sees_one_line_that_is_written_over_and_never_wraps() -> None:
    written = on_a_terminal(
        """
        import time
        from shared.commands import Progress

        progress = Progress("harvest", 3, note=lambda: "x" * 200)
        for _ in range(3):
            time.sleep(0.25)
            progress.step()
        progress.end()
        """,
        columns=60,
    )
    shown = written.split("\r\x1b[K")[1:]
    assert [line.split(" ")[1] for line in shown] == ["0/3", "1/3", "2/3", "3/3"]
    assert [line.count("\n") for line in shown] == [0, 0, 0, 1]
    assert max(len(line.rstrip()) for line in shown) < 60


def test_what_is_written_after_a_stage_that_ended_early_has_a_line_of_its_own() -> None:
    written = on_a_terminal(
        """
        import sys
        from shared.commands import Progress

        progress = Progress("harvest", 3)
        progress.step()
        progress.end()
        print("error", file=sys.stderr)
        """
    )
    assert written.endswith("\r\nerror\r\n")


# being told to end


@pytest.mark.parametrize(("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Stopped)])
def test_a_first_signal_is_noted_and_handlers_are_put_back(
    number: signal.Signals, error: type[BaseException], capfd: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(number)
    with interruptible() as asked:
        assert not asked()
        asked.raise_if_asked()
        os.kill(os.getpid(), number)
        assert asked()
    assert signal.getsignal(number) == before
    assert "waiting for what is in flight; once more to end at once" in capfd.readouterr().err
    with pytest.raises(error):
        asked.raise_if_asked()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_second_signal_ends_the_process_at_once(number: signal.Signals, code: int) -> None:
    program = """
        import time
        from shared.commands import interruptible

        with interruptible():
            print("ready", flush=True)
            time.sleep(60)
            time.sleep(60)
        """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    ) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        assert child.stdout.readline() == "ready\n"
        child.send_signal(number)
        while "in flight" not in child.stderr.readline():
            time.sleep(0.01)
        child.send_signal(number)
        assert child.wait(timeout=20) == code


def test_another_thread_than_the_main_one_has_no_signals_and_no_crash() -> None:
    found: list[Interruption] = []

    def work() -> None:
        with interruptible() as asked:
            found.append(asked)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert [asked() for asked in found] == [False]


def test_a_terminal_that_goes_away_ends_a_stage_as_told_and_not_with_an_error() -> None:
    """Where a terminal is closed its programs get SIGHUP, and writing to it fails from then on."""
    program = """
        import signal, time
        from shared.commands import Progress, interruptible

        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whoever runs the tests may ignore it, as nohup does
        with interruptible() as asked:
            progress = Progress("harvest", 100)
            print("ready", flush=True)
            while not asked():
                time.sleep(0.3)
                progress.step()
            progress.end()
        print("ended", flush=True)
        """
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)],
        stdout=subprocess.PIPE,
        stderr=theirs,
        text=True,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    ) as child:
        os.close(theirs)
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        os.close(ours)
        child.send_signal(signal.SIGHUP)
        assert child.stdout.read() == "ended\n"
