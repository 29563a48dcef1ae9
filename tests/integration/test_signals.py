"""SIGTERM, as containers are stopped: every job ends at once with 143, and what it has done is kept."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from awake import awake
from teachers import count_lines

RECIPE = Path(__file__).parents[2] / "recipes" / "smoke.yaml"
TOLD = "told to end; everything done so far is kept"
MOST_S = 5.0
"""Of the ten seconds that a container engine allows."""
BUSY = """
import hashlib, os, sys
from shared.cli import _end_when_told_to
_end_when_told_to()
print("busy", os.getpid(), flush=True)
hashlib.pbkdf2_hmac("sha256", b"", b"", 2_000_000_000)  # one call for minutes, as of a library written in C
"""
FORKING = """
import os, signal, time
from shared.cli import _end_when_told_to
_end_when_told_to()
ready, tell = os.pipe()
child = os.fork()
if child == 0:
    os.write(tell, b"x")
    time.sleep(60)
    os._exit(0)
os.read(ready, 1)
os.kill(child, signal.SIGTERM)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
time.sleep(0.5)
print("still here", flush=True)
"""


def distill(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "shared.cli", *arguments]


def shared(out: Path) -> list[str]:
    return ["--recipe", str(RECIPE), "--out", str(out)]


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start a process; ends what a test leaves running."""
    running: list[subprocess.Popen[str]] = []

    def begin(*arguments: str, **variables: str) -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        running.append(subprocess.Popen(arguments, env={**os.environ, **variables}, stdout=pipe, stderr=pipe, text=True))
        return running[-1]

    yield begin
    for process in running:
        process.kill()
        process.communicate()


def wait_for(condition: Callable[[], object], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.002)


def told_to_end(process: subprocess.Popen[str]) -> str:
    """Send SIGTERM; what the process said on its standard error, having ended with 143 in time."""
    assert process.poll() is None, process.communicate()
    with awake() as seconds:
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=90)
        assert seconds() < MOST_S
    assert process.returncode == 143, said
    return said


def running(out: Path) -> dict[int, str]:
    """Our processes that have a run directory in their command line, by pid."""
    found = {}
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = file.read_bytes().decode(errors="replace").replace("\0", " ")
        except OSError:
            continue
        if str(out) in words and "shared.cli" in words:
            found[int(file.parent.name)] = words
    return found


def children(pid: int) -> set[int]:
    """Direct children of a process."""
    found = set()
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(file.read_text().rpartition(")")[2].split()[1]) == pid:
                found.add(int(file.parent.name))
        except OSError:
            continue
    return found


def alive(pid: int) -> bool:
    """Whether a process does anything yet; one that only waits to be reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_harvest_ends_and_keeps_its_answers(tmp_path: Path, start: Callable[..., subprocess.Popen[str]]) -> None:
    teacher = start(*distill("teacher", "--no-auth", "--recipe", str(RECIPE), "--port", "0"), TEACHER_DELAY_S="0.3")
    assert teacher.stdout is not None
    url = teacher.stdout.readline().split()[-1]
    process = start(*distill("harvest", *shared(tmp_path / "run"), "--teacher-url", url))
    wait_for(lambda: count_lines(tmp_path / "run") >= 12)
    said = told_to_end(process)
    assert f"distill harvest: {TOLD}" in said
    assert "Traceback" not in said
    assert 12 <= count_lines(tmp_path / "run") < 48 * 4


@pytest.mark.parametrize("moment_s", [0.0, 0.3, 0.6, 1.0, 2.0])
def test_a_job_that_is_importing_its_libraries_or_making_its_models_ends(
    tmp_path: Path, start: Callable[..., subprocess.Popen[str]], moment_s: float
) -> None:
    process = start(*distill("prepare", *shared(tmp_path / "run")), DISTILL_CACHE=str(tmp_path / "cache"))
    wait_for((tmp_path / "run" / "run.json").exists)
    time.sleep(moment_s)
    if moment_s <= 0.3 or process.poll() is None:  # torch alone takes longer to load; later, a fast machine may be done
        assert told_to_end(process) == f"distill prepare: {TOLD}, and the same command goes on from there\n"


@pytest.mark.parametrize(("moment", "number"), [("harvest", signal.SIGTERM), ("harvest", signal.SIGKILL), ("train", signal.SIGTERM)])
def test_a_run_ends_with_its_stage_and_its_teacher(
    tmp_path: Path, start: Callable[..., subprocess.Popen[str]], moment: str, number: signal.Signals
) -> None:
    out = tmp_path / "run"
    delay = "0.2" if moment == "harvest" else "0"
    process = start(*distill("run", *shared(out), "--no-serve"), TEACHER_DELAY_S=delay)
    reached = (lambda: count_lines(out) >= 4) if moment == "harvest" else (lambda: any((out / "checkpoints" / "r0").glob("checkpoint-*")))
    wait_for(reached)
    others = children(process.pid)
    assert len(others) == 2, others  # the stage and the teacher
    if number == signal.SIGTERM:
        assert f"distill run: {TOLD}" in told_to_end(process)
    else:
        process.kill()
        process.communicate(timeout=MOST_S)  # ends when the last of them has let go of the pipe
    wait_for(lambda: not any(map(alive, others)), MOST_S)
    assert running(out) == {}


def test_a_long_call_into_a_library_does_not_delay_the_end(start: Callable[..., subprocess.Popen[str]]) -> None:
    process = start(sys.executable, "-c", BUSY)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("busy")
    time.sleep(0.2)
    assert TOLD in told_to_end(process)


def test_a_signal_to_a_forked_child_ends_the_child_alone() -> None:
    done = subprocess.run([sys.executable, "-c", FORKING], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n") == [str(-signal.SIGTERM), "still here", ""]


def can_unshare() -> bool:
    return (
        shutil.which("unshare") is not None and subprocess.run(["unshare", "-pf", "true"], check=False, capture_output=True).returncode == 0
    )


@pytest.mark.skipif(not can_unshare(), reason="needs the right to make a PID namespace")
def test_the_first_process_of_a_container_ends_as_well() -> None:
    # the kernel keeps from it every signal that it has no handler for
    command = ["unshare", "-pf", "--kill-child", sys.executable, "-c", BUSY]
    outer = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert outer.stdout is not None
        assert outer.stdout.readline() == "busy 1\n"
        (inner,) = children(outer.pid)
        with awake() as seconds:
            os.kill(inner, signal.SIGTERM)
            _, said = outer.communicate(timeout=90)
            assert seconds() < MOST_S
        assert outer.returncode == 143
        assert TOLD in said
    finally:
        outer.kill()
        outer.communicate()
