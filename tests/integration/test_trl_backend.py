"""TRL's trainer in place of ours: the same tokens and numbers, the same checkpoints, no network."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_models
import torch
from safetensors.torch import load_file
from trained import checkpoint, folder, run_with
from transformers import AutoModelForCausalLM, AutoTokenizer

from shared.cli import main
from shared.contracts import Triplet
from student_trainer.training.losses import token_logps
from student_trainer.training.packing import Packer, group
from student_trainer.training.rounds import checkpoints

ALIKE = ("odds_ratio", "accuracy", "logp_chosen", "logp_rejected", "margin")


@pytest.fixture(autouse=True)
def looked_up(monkeypatch):
    """The host names that this process asks for: none, although nothing but our own code tells the libraries to stay offline."""
    asked = []

    def refuse(host, *rest, **options):
        asked.append(host)
        raise socket.gaierror(f"the test has no network: {host}")

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("CI", raising=False)  # TRL would take it for a reason to be silent
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    yield asked
    assert asked == []


def pairs() -> list[Triplet]:
    """One pair for each of six examples, all of other lengths; a seventh, whose prompt is longer than 16 tokens."""
    draw = random.Random(0)

    def words(count: int) -> str:
        return " ".join(f"w{draw.randrange(tiny_models.WORDS)}" for _ in range(count))

    scores = {"chosen_source": "teacher", "rejected_source": "student", "chosen_score": 1.0, "rejected_score": 0.0}
    return [
        Triplet(example_id=f"e{i}", prompt=words(4 + i + 20 * (i == 6)), chosen=words(2 + i), rejected=words(7 - i), **scores)
        for i in range(7)
    ]


def trl_run(path: Path, model: Path, **train) -> list[str]:
    """A run of TRL's whose triplets are ready; returns the arguments of `distill`. Prompts have up to 16 tokens, responses up to 6."""
    return run_with(path, model, pairs(), **{"trainer": "trl", "max_prompt_tokens": 16, "max_response_tokens": 6, **train})


def trained(path: Path, model: Path, **train) -> Path:
    """The folder of a round that was trained, by TRL unless told otherwise."""
    assert main(trl_run(path, model, **train)) == 0
    return checkpoint(path)


def log(done: Path) -> list[dict]:
    return [json.loads(line) for line in (done / "log.jsonl").read_text().splitlines()]


def manifest(done: Path) -> dict:
    return json.loads((done / "manifest.json").read_text())


def test_an_encoder_decoder_goes_the_same_way_under_both_trainers(tmp_path):
    model = folder(tmp_path / "model", "encoder-decoder")
    ours = trained(tmp_path / "ours", model, batch_size=3, epochs=3, trainer="packed")
    theirs = trained(tmp_path / "theirs", model, batch_size=3, epochs=3)
    assert [row["step"] for row in log(theirs)] == list(range(1, 7))
    for ours_row, theirs_row in zip(log(ours), log(theirs), strict=True):
        for name in ("loss", "nll", "grad_norm", "learning_rate", "epoch", *ALIKE):
            assert theirs_row[name] == pytest.approx(ours_row[name], abs=1e-4), (name, ours_row["step"])
    counts = manifest(theirs)["counts"]
    for name in ("triplets", "examples", "pairs", "dropped", "cut_responses", "response_tokens", "trained_parameters"):
        assert counts[name] == manifest(ours)["counts"][name], name
    assert counts["dropped"]["prompt_too_long"] == 1


def test_a_decoder_only_model_gets_the_same_scores_and_an_nll_with_the_prompt_in_it(tmp_path):
    model = folder(tmp_path / "model", "decoder-only")
    (ours,) = log(trained(tmp_path / "ours", model, batch_size=6, max_steps=1, trainer="packed"))
    (theirs,) = log(trained(tmp_path / "theirs", model, batch_size=6, max_steps=1))
    for name in ALIKE:
        assert theirs[name] == pytest.approx(ours[name], abs=1e-4), name

    tokenizer = AutoTokenizer.from_pretrained(model)
    rows, _ = Packer(tokenizer, "decoder-only", max_prompt_tokens=16, max_response_tokens=6).pack(group(pairs()))
    whole = [torch.tensor([*row.prompt, *row.responses[0]]) for row in rows]
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        logps = torch.cat([token_logps(plain(ids[None]).logits[0, :-1], ids[1:]) for ids in whole])
    assert theirs["nll"] == pytest.approx(-logps.mean().item(), abs=1e-4)
    assert theirs["loss"] == pytest.approx(theirs["nll"] + 0.1 * ours["odds_ratio"], abs=1e-4)

    lengths = [len(row.prompt) + len(ids) for row in rows for ids in row.responses]  # TRL pads them all to the longest
    assert theirs["padding_ratio"] == pytest.approx(len(lengths) * max(lengths) / sum(lengths))


def test_killed_after_its_first_checkpoint_and_rerun_it_ends_with_the_same_student_and_one_log(tmp_path):
    model = folder(tmp_path / "model", "encoder-decoder")
    settings = {"batch_size": 2, "epochs": 20}
    whole = trained(tmp_path / "whole", model, **settings)

    arguments = trl_run(tmp_path / "killed", model, **settings)
    threads = str(torch.get_num_threads())  # with another number sums are added in another order
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": threads, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen([sys.executable, "-m", "shared.cli", *arguments], env=environment, stderr=subprocess.PIPE, text=True)
    killed = checkpoint(tmp_path / "killed")
    while not checkpoints(killed):
        assert process.poll() is None, process.stderr and process.stderr.read()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (killed / "manifest.json").exists()
    assert main(arguments) == 0

    expected, found = (load_file(done / "student" / "model.safetensors") for done in (whole, killed))
    assert expected.keys() == found.keys()
    assert all(expected[name].equal(found[name]) for name in expected)
    assert [row["loss"] for row in log(killed)] == [row["loss"] for row in log(whole)]
    assert [row["step"] for row in log(killed)] == list(range(1, 61))
    assert manifest(killed)["settings"]["trainer"] == "trl"
    assert {file.name for file in killed.iterdir()} == {file.name for file in whole.iterdir()}
    assert not checkpoints(killed)
    assert not (killed / "README.md").exists()


def test_lora_in_bf16_is_trained_validated_and_merged(tmp_path):
    model = folder(tmp_path / "model", "decoder-only")
    options = {"lora_rank": 2, "frozen_layers": 1, "activation_checkpointing": True, "precision": "bf16", "batch_size": 6, "epochs": 20}
    options |= {"validate_every": 10, "validation_rows": 2}
    done = trained(tmp_path / "run", model, **options)
    rows = log(done)
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert (done / "adapter" / "adapter_model.safetensors").exists()
    student = AutoModelForCausalLM.from_pretrained(done / "student")
    assert student.dtype == torch.float32
    assert not [name for name, _ in student.named_parameters() if "lora" in name]
    assert manifest(done)["settings"]["bf16"]
    assert [json.loads(line)["step"] for line in (done / "validation.jsonl").read_text().splitlines()] == [10, 20]
    assert manifest(done)["counts"]["best_validation"]["step"] == 10  # this tokenizer knows none of the words: all answers score 0


def test_the_guard_of_these_tests_would_notice_a_telemetry_ping(looked_up, monkeypatch):
    from huggingface_hub.utils import get_session

    with pytest.raises(Exception, match="no network"):
        get_session().get("https://huggingface.co/api/telemetry")
    assert looked_up
    looked_up.clear()
