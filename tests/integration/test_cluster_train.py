"""Training on a real Ray cluster of processes on this machine: the losses of one process, also where a worker is lost on the way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from clusters import QUIET, Nodes, nodes
from trained import checkpoint, folder, run_with, triplets

from shared.cli import main
from shared.errors import INTERRUPTED, TERMINATED, SettingsError
from student_trainer.cluster import train
from student_trainer.training.rounds import checkpoints

STEPS = {"batch_size": 8, "epochs": 20, "learning_rate": 0.01, "checkpoint_steps": 2}
END_S = 240.0


@pytest.fixture(scope="module")
def cluster() -> Iterator[Nodes]:
    with nodes(2) as found:
        yield found


def started(arguments: list[str], cluster: Nodes | None, *more: str) -> subprocess.Popen[str]:
    paths = os.pathsep.join(sys.path)
    environment = {**os.environ, **QUIET, "HF_HUB_OFFLINE": "1", "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "shared.cli", *arguments, *(["--on", cluster.address] if cluster else []), *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (checkpoint(run) / "log.jsonl").read_text().splitlines()]


def test_two_nodes_train_as_one_process_and_a_lost_worker_means_to_begin_again_at_the_last_checkpoint(
    cluster: Nodes, tmp_path: Path
) -> None:
    model, rows = folder(tmp_path / "model"), triplets(count=16)
    assert main(run_with(tmp_path / "one", model, rows, **STEPS)) == 0
    arguments = run_with(tmp_path / "two", model, rows, **{**STEPS, "batch_size": 4})
    child = started(arguments, cluster)
    deadline = time.monotonic() + END_S
    while not checkpoints(checkpoint(tmp_path / "two")):
        assert child.poll() is None, child.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    processes = [process for process in psutil.Process().children(recursive=True) if "RayTrainWorker" in " ".join(process.cmdline())]
    assert processes
    processes[0].send_signal(signal.SIGKILL)
    said, _ = child.communicate(timeout=END_S)
    assert child.returncode == 0, said
    assert "train: 2 processes on 3 nodes, without GPUs" in said
    assert "all begin again from the last checkpoint" in said
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-4)
    counts = json.loads((checkpoint(tmp_path / "two") / "manifest.json").read_text())["counts"]
    assert counts["processes"] == 2


def test_what_is_wrong_with_a_training_is_told_once_and_in_its_own_words(cluster: Nodes, tmp_path: Path) -> None:
    arguments = run_with(tmp_path / "run", folder(tmp_path / "model"), triplets(), fsdp=True)
    child = started(arguments, cluster)
    said, _ = child.communicate(timeout=END_S)
    assert child.returncode == 12, said
    assert "train.fsdp: weights are sharded over GPUs only" in said.splitlines()[-1] + said.splitlines()[-2]
    child = started(arguments, cluster, "--require-gpu")
    said, _ = child.communicate(timeout=END_S)
    assert child.returncode == 12, said
    assert "has no GPU to give" in said


def test_ctrl_c_and_sigterm_end_a_training_on_a_cluster_as_they_do_everywhere_and_it_goes_on(tmp_path: Path) -> None:
    model, rows = folder(tmp_path / "model"), triplets(count=16)
    arguments = run_with(tmp_path / "run", model, rows, **{**STEPS, "epochs": 400, "batch_size": 4})  # more than there is time for
    for signum, code in ((signal.SIGINT, INTERRUPTED), (signal.SIGTERM, TERMINATED)):
        had = len(losses(tmp_path / "run")) if (checkpoint(tmp_path / "run") / "log.jsonl").exists() else 0
        child = started(arguments, None, "--on", "local-cluster:2")
        deadline = time.monotonic() + END_S
        while not (checkpoint(tmp_path / "run") / "log.jsonl").exists() or len(losses(tmp_path / "run")) < had + 4:
            assert child.poll() is None, child.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.05)
        child.send_signal(signum)
        said, _ = child.communicate(timeout=60)
        assert child.returncode == code, said
        ours = [line for line in said.splitlines() if "(TrainController pid=" not in line]  # Ray's own, which tells what it tries again
        assert not any("Traceback" in line for line in ours), said
        assert "--on local-cluster:2" in said.splitlines()[-1] or "the same command goes on" in said.splitlines()[-1]


def test_a_training_waits_for_another_node_and_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    have = iter([1.0, 1.0, 2.0])
    monkeypatch.setattr(train.time, "sleep", lambda _: None)
    train._wait_for_nodes(SimpleNamespace(cluster_resources=lambda: {"CPU": next(have)}), 2, gpus=False)
    monkeypatch.setattr(train, "NODE_S", 0.01)
    with pytest.raises(SettingsError, match="the cluster has 1 GPUs to give"):
        train._wait_for_nodes(SimpleNamespace(cluster_resources=lambda: {"CPU": 4.0, "GPU": 1.0}), 2, gpus=True)
