"""The training stage with real processes: killed, interrupted and resumed, it ends with the same student."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_models
import torch
from awake import awake
from safetensors.torch import load_file
from tensorboardX.proto.event_pb2 import Event, SessionLog
from trained import folder, run_with, triplets

from shared.cli import main
from student_trainer.training import stage as training
from student_trainer.training.rounds import checkpoints
from student_trainer.training.trainer import WEIGHTS

STEPS = 30 * 3


def start(arguments: list[str]) -> subprocess.Popen[str]:
    # as many threads as here: with another number sums are added in another order, and weights differ in their last bits
    threads = str(torch.get_num_threads())
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": threads, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen([sys.executable, "-m", "shared.cli", *arguments], env=environment, stderr=subprocess.PIPE, text=True)


def when_first_checkpoint_stands(process: subprocess.Popen[str], run: Path) -> None:
    while not checkpoints(run / "checkpoints" / "r0"):
        assert process.poll() is None, process.stderr and process.stderr.read()
        time.sleep(0.01)


def log(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "checkpoints" / "r0" / "log.jsonl").read_text().splitlines()]


def weights(run: Path) -> dict:
    return load_file(run / "checkpoints" / "r0" / "student" / "model.safetensors")


@pytest.mark.parametrize("kind", tiny_models.KINDS)
def test_killed_after_its_first_checkpoint_and_rerun_it_ends_with_the_same_student_and_one_log(kind, tmp_path):
    model = folder(tmp_path / "model", kind)
    assert main(run_with(tmp_path / "whole", model, triplets())) == 0

    arguments = run_with(tmp_path / "killed", model, triplets())
    process = start(arguments)
    when_first_checkpoint_stands(process, tmp_path / "killed")
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "killed" / "checkpoints" / "r0" / "manifest.json").exists()
    assert main(arguments) == 0

    whole, resumed = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert whole.keys() == resumed.keys()
    assert all(whole[name].equal(resumed[name]) for name in whole)
    assert [row["step"] for row in log(tmp_path / "killed")] == list(range(1, STEPS + 1))
    assert [row["loss"] for row in log(tmp_path / "killed")] == [row["loss"] for row in log(tmp_path / "whole")]
    assert not checkpoints(tmp_path / "killed" / "checkpoints" / "r0")
    assert not list((tmp_path / "killed" / "checkpoints" / "r0").glob(".*.tmp"))


def test_ctrl_c_keeps_the_checkpoint_and_prints_the_command_that_goes_on(tmp_path):
    arguments = run_with(tmp_path / "run", folder(tmp_path / "model"), triplets(), epochs=3000)
    process = start(arguments)
    when_first_checkpoint_stands(process, tmp_path / "run")
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "distill train --recipe" in errors
    assert checkpoints(tmp_path / "run" / "checkpoints" / "r0")


def test_told_to_end_it_ends_at_once_and_keeps_the_checkpoint(tmp_path):
    process = start(run_with(tmp_path / "run", folder(tmp_path / "model"), triplets(), epochs=3000))
    when_first_checkpoint_stands(process, tmp_path / "run")
    with awake() as seconds:
        process.terminate()
        _, errors = process.communicate(timeout=90)
        assert seconds() < 5
    assert process.returncode == 143, errors
    assert "distill train: told to end; everything done so far is kept" in errors
    assert checkpoints(tmp_path / "run" / "checkpoints" / "r0")


def test_training_goes_on_with_the_export_if_asked(tmp_path, capsys):
    arguments = run_with(tmp_path / "run", folder(tmp_path / "model"), triplets(), max_steps=1)
    leftover = tmp_path / "run" / ".model.another-host.7.tmp"
    leftover.mkdir()
    assert main([*arguments, "--export"]) == 0
    assert (tmp_path / "run" / "model" / "serving" / "model.bin").exists()
    assert not leftover.exists()
    assert main([*arguments, "--export"]) == 0
    assert capsys.readouterr().out.endswith("checkpoints/r0: complete, nothing to do\nexport: complete, nothing to do\n")


def test_a_torn_checkpoint_is_never_gone_on_from(tmp_path):
    """What SIGKILL leaves behind in the middle of a checkpoint has a name that no one resumes from, and is swept away."""
    arguments = run_with(tmp_path / "run", folder(tmp_path / "model"), triplets(), max_steps=2)
    torn = tmp_path / "run" / "checkpoints" / "r0" / ".checkpoint-1.99.tmp" / "checkpoint-1"
    torn.mkdir(parents=True)
    (torn / WEIGHTS).write_bytes(b"half")
    assert main(arguments) == 0
    assert [row["step"] for row in log(tmp_path / "run")] == [1, 2]
    assert not torn.parent.exists()


def test_other_triplets_begin_anew_instead_of_going_on(tmp_path):
    model = folder(tmp_path / "model")
    process = start(run_with(tmp_path / "run", model, triplets()))
    when_first_checkpoint_stands(process, tmp_path / "run")
    process.kill()
    process.wait()
    assert main(run_with(tmp_path / "run", model, triplets(seed=1))) == 0
    assert main(run_with(tmp_path / "other", model, triplets(seed=1))) == 0
    assert [row["loss"] for row in log(tmp_path / "run")] == [row["loss"] for row in log(tmp_path / "other")]


def events(run: Path) -> list[Event]:
    """What TensorBoard is told, file after file."""
    found = []
    for file in sorted((run / "checkpoints" / "r0" / "tensorboard").iterdir()):
        data = file.read_bytes()
        while data:  # a record: its length, a checksum, the event, a checksum
            size = int.from_bytes(data[:8], "little")
            found.append(Event.FromString(data[12 : 12 + size]))
            data = data[16 + size :]
    return found


def shown(run: Path) -> list[int]:
    """Steps whose loss TensorBoard shows: an event that begins a session takes away those of before from its own step on."""
    steps: list[int] = []
    for event in events(run):
        if event.session_log.status == SessionLog.START:
            steps = [step for step in steps if step < event.step]
        steps += [event.step for value in event.summary.value if value.tag == "train/loss"]
    return steps


def test_tensorboard_shows_each_step_once_also_after_a_kill_and_after_other_triplets(tmp_path):
    run, model = tmp_path / "run", folder(tmp_path / "model")
    arguments = run_with(run, model, triplets(), checkpoint_steps=20)
    process = start(arguments)
    when_first_checkpoint_stands(process, run)
    while len(log(run)) < 24:  # some steps after the checkpoint, which come again
        assert process.poll() is None, process.stderr and process.stderr.read()
        time.sleep(0.001)
    process.kill()
    process.wait()
    assert main(arguments) == 0
    assert shown(run) == [row["step"] for row in log(run)] == list(range(1, STEPS + 1))
    assert len(list((run / "checkpoints" / "r0" / "tensorboard").iterdir())) == 2
    assert main(run_with(run, model, triplets(seed=1), checkpoint_steps=20)) == 0
    assert len(list((run / "checkpoints" / "r0" / "tensorboard").iterdir())) == 1
    assert shown(run) == list(range(1, STEPS + 1))


def test_the_student_and_the_manifest_say_what_was_done(tmp_path, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    arguments = run_with(tmp_path / "run", folder(tmp_path / "model"), triplets(), max_steps=2, lora_rank=2, frozen_layers=1)
    assert main(arguments) == 0
    student = tmp_path / "run" / "checkpoints" / "r0" / "student"
    assert AutoTokenizer.from_pretrained(student).chat_template == tiny_models.CHAT_TEMPLATE
    assert not [name for name, _ in AutoModelForCausalLM.from_pretrained(student).named_parameters() if "lora" in name]
    manifest = json.loads((tmp_path / "run" / "checkpoints" / "r0" / "manifest.json").read_text())
    assert manifest["counts"]["examples"] == 6
    assert manifest["counts"]["pairs"] == manifest["counts"]["triplets"] == 12
    assert manifest["counts"]["padding_ratio"] >= 1
    assert manifest["counts"]["trained_parameters"] < manifest["counts"]["parameters"]
    assert main(arguments) == 0
    assert "complete, nothing to do" in capsys.readouterr().out


def test_a_tokenizer_without_padding_pads_with_its_end(tmp_path):
    tokenizer = tiny_models.tokenizer(appends_eos=False, chat=True)
    tokenizer.pad_token = None
    model = tiny_models.save_folder(tiny_models.tiny_llama(), tokenizer, tmp_path / "model")
    assert main(run_with(tmp_path / "run", model, triplets(), max_steps=2, validate_every=1.0, validation_rows=2)) == 0
    assert len(log(tmp_path / "run")) == 2


def test_what_is_not_trained_on_as_it_was_given_is_told(tmp_path, capsys):
    rows = triplets()
    rows[0] = rows[0].model_copy(update={"prompt": " ".join(["w1"] * 60), "example_id": "long"})
    assert main(run_with(tmp_path / "run", folder(tmp_path / "model"), rows, max_steps=1, max_prompt_tokens=40, max_response_tokens=4)) == 0
    told = capsys.readouterr().out
    assert "train: 11 of 12 triplets; left out: 1 prompt too long (train.max_prompt_tokens, max_response_tokens)" in told
    assert "train: 6 responses are longer than train.max_response_tokens and learnt without their end" in told


def test_a_student_for_which_there_is_no_memory_is_told_before_the_first_step(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(training, "students", lambda *arguments, **options: torch.empty(10**15))
    assert main(run_with(tmp_path / "run", folder(tmp_path / "model"), triplets())) == 12
    assert "out of memory before the first step" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rows", "message"),
    [([], "nothing to train on"), ([triplets()[0].model_copy(update={"rejected": triplets()[0].chosen})], "chosen equals rejected")],
)
def test_triplets_that_teach_nothing_end_with_exit_12(rows, message, tmp_path, capsys):
    assert main(run_with(tmp_path / "run", folder(tmp_path / "model"), rows)) == 12
    assert message in capsys.readouterr().err
