"""The same training on any layout: one process, micro-batches, several processes. Real processes by torchrun, on the CPU (gloo)."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import tiny_models
from safetensors.torch import load_file
from trained import checkpoint, folder, run_with, triplets

from shared.cli import main
from student_trainer.training.rounds import checkpoints

STEPS = {"batch_size": 8, "epochs": 3, "learning_rate": 0.01, "checkpoint_steps": 2}


def torchrun(arguments: list[str], processes: int) -> list[str]:
    return [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), "-m", "shared.cli", *arguments
    ]  # fmt: skip


def environment() -> dict[str, str]:
    paths = os.pathsep.join(sys.path)
    return {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""}


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (checkpoint(run) / "log.jsonl").read_text().splitlines()]


def weights(run: Path) -> dict:
    return load_file(checkpoint(run) / "student" / "model.safetensors")


@pytest.mark.parametrize("kind", tiny_models.KINDS)
def test_two_processes_of_four_and_two_micro_batches_of_four_train_as_one_batch_of_eight(kind, tmp_path):
    """19 examples, so that every epoch ends with an uneven step; three epochs, so that the order changes."""
    model, rows = folder(tmp_path / "model", kind), triplets(count=19)
    given = {**STEPS, "validate_every": 1.0, "validation_rows": 5, "kl_reference": 0.1}
    assert main(run_with(tmp_path / "one", model, rows, **given)) == 0
    assert main(run_with(tmp_path / "micro", model, rows, **{**given, "batch_size": 4, "gradient_accumulation": 2})) == 0
    done = subprocess.run(
        torchrun(run_with(tmp_path / "two", model, rows, **{**given, "batch_size": 4}), 2),
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert len(losses(tmp_path / "one")) == 9
    for other in ("micro", "two"):
        assert losses(tmp_path / other) == pytest.approx(losses(tmp_path / "one"), abs=1e-4)
        found, expected = weights(tmp_path / other), weights(tmp_path / "one")
        assert max((found[name] - expected[name]).abs().max().item() for name in expected) < 1e-3
        assert (checkpoint(tmp_path / other) / "validation.jsonl").read_text().count("\n") == 3
    assert json.loads((checkpoint(tmp_path / "two") / "manifest.json").read_text())["counts"]["processes"] == 2


def kill_at_its_first_checkpoint(arguments: list[str], run: Path) -> None:
    process = subprocess.Popen(torchrun(arguments, 2), env=environment(), stderr=subprocess.DEVNULL)
    while not checkpoints(checkpoint(run)):
        assert process.poll() is None
        time.sleep(0.01)
    workers = psutil.Process(process.pid).children(recursive=True)  # in sessions of their own
    for one in (process, *workers):
        one.kill()
    process.wait()
    psutil.wait_procs(workers)
    assert not (checkpoint(run) / "manifest.json").exists()


def test_two_processes_that_are_killed_in_mid_epoch_go_on_from_their_checkpoint_in_two_and_in_one(tmp_path):
    """Four steps an epoch, and the checkpoint is in the second one, which has an order of its own."""
    model, rows = folder(tmp_path / "model"), triplets(count=32)
    given = {**STEPS, "epochs": 10, "checkpoint_steps": 6}
    assert main(run_with(tmp_path / "one", model, rows, **given)) == 0
    arguments = run_with(tmp_path / "two", model, rows, **{**given, "batch_size": 4})
    kill_at_its_first_checkpoint(arguments, tmp_path / "two")
    shutil.copytree(tmp_path / "two", tmp_path / "again")
    assert main([*arguments, "--set", "train.batch_size=8"]) == 0
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-3)
    again = [*arguments[:-1], str(tmp_path / "again")]
    done = subprocess.run(torchrun(again, 2), env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "again") == pytest.approx(losses(tmp_path / "one"), abs=1e-3)


def test_shards_are_refused_where_there_is_no_gpu_instead_of_being_copies_and_in_a_single_process(tmp_path, capsys):
    arguments = run_with(tmp_path / "run", folder(tmp_path / "model"), triplets(), fsdp=True)
    assert main(arguments) == 12
    assert "train.fsdp shards weights over several processes: start them with torchrun" in capsys.readouterr().err
    arguments = run_with(tmp_path / "two", tmp_path / "model", triplets(), fsdp=True)
    done = subprocess.run(torchrun(arguments, 2), env=environment(), capture_output=True, text=True)
    assert done.returncode != 0
    assert "train.fsdp: weights are sharded over GPUs only, and these processes have none; leave it out" in done.stderr


def test_fewer_validation_rows_than_processes_are_scored_as_in_one(tmp_path):
    model, rows = folder(tmp_path / "model"), triplets(count=16)
    given = {**STEPS, "epochs": 1, "validate_every": 1.0, "validation_rows": 1}
    assert main(run_with(tmp_path / "one", model, rows, **given)) == 0
    two = run_with(tmp_path / "two", model, rows, **{**given, "batch_size": 4})
    done = subprocess.run(torchrun(two, 2), env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ledgers = [(checkpoint(tmp_path / name) / "validation.jsonl").read_text() for name in ("one", "two")]
    assert ledgers[0] == ledgers[1]


def test_another_number_of_prompts_a_step_begins_the_round_anew_and_says_so(tmp_path, capsys):
    model, rows = folder(tmp_path / "model"), triplets(count=16)
    given = {**STEPS, "epochs": 20}
    arguments = run_with(tmp_path / "run", model, rows, **given)
    kill_at_its_first_checkpoint(arguments, tmp_path / "run")  # 8 prompts on each of two processes
    assert main(arguments) == 0
    assert "is of no use: prompts_a_step is 8 and was 16" in capsys.readouterr().out
    assert main(run_with(tmp_path / "one", model, rows, **given)) == 0
    assert losses(tmp_path / "run") == losses(tmp_path / "one")
