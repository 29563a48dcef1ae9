"""Other ways to a cluster than its address: as a job of it, and through Ray Client."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from clusters import QUIET, Head, command, finished, head, started, wait_for_calls
from harvests import lines, mock_teacher, recipe
from trained import checkpoint, folder, run_with, triplets

from shared.errors import INTERRUPTED

PROMPTS = 600
SLOWLY = ("--set", "harvest.requests_per_minute=1200")  # 20/s: half a minute, in which it is ended twice
QUICKLY = ("--set", "harvest.requests_per_minute=12000")
PATIENTLY = json.dumps({"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "60"}})
JOB_S = 240


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    with head(tmp_path_factory.mktemp("ray")) as found:
        yield found


def job(node: Head, *arguments: str) -> list[str]:
    ray = Path(sys.executable).with_name("ray")
    return [str(ray), "job", *arguments[:1], "--address", node.dashboard, *arguments[1:]]


def ran(words: list[str]) -> str:
    done = subprocess.run(words, capture_output=True, text=True, timeout=JOB_S, env=os.environ | QUIET)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_job_that_is_stopped_keeps_everything_and_ray_client_goes_on_with_it(node: Head, tmp_path: Path) -> None:
    file, out = recipe(tmp_path, PROMPTS), tmp_path / "run"
    with mock_teacher("--delay-ms", "50") as teacher:
        harvest = command(file, out, teacher, "auto", *SLOWLY)
        submit = job(node, "submit", "--submission-id", "mine", "--runtime-env-json", PATIENTLY, "--", *harvest)
        submitted = subprocess.Popen(submit, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        wait_for_calls(teacher, 20, submitted)
        ran(job(node, "stop", "mine"))
        said = finished(submitted)[1]
        assert "ending: waiting for what is in flight" in said
        assert "Job 'mine' was stopped" in said
        stopped = teacher.settled()["calls"]
        assert 20 <= stopped < PROMPTS
        child = started(file, out, teacher, node.client, *SLOWLY)
        wait_for_calls(teacher, stopped + 20, child)
        child.send_signal(signal.SIGINT)
        code, said = finished(child)
        assert code == INTERRUPTED, said
        assert f"--on {node.client}" in said.splitlines()[-1]
        assert teacher.settled()["calls"] < PROMPTS
        code, said = finished(started(file, out, teacher, node.client, *QUICKLY))
        assert code == 0, said
        assert set(teacher.calls().values()) == {1}
    assert len(lines(out)) == PROMPTS


def test_a_training_as_a_job(node: Head, tmp_path: Path) -> None:
    arguments = run_with(tmp_path / "run", folder(tmp_path / "model"), triplets(), epochs=1)
    said = ran(job(node, "submit", "--", sys.executable, "-m", "shared.cli", *arguments, "--on", "auto", "--workers", "2"))
    assert "train: 2 processes on 1 node" in said
    assert json.loads((checkpoint(tmp_path / "run") / "manifest.json").read_text())["counts"]["processes"] == 2
