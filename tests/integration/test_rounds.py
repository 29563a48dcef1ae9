"""Rounds of mixed policy: the student as it is now is rejected, everything is an artefact, and no kill changes the outcome."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_models
import torch
from safetensors.torch import load_file
from trained import answered_run, checkpoint, folder
from transformers import TrainerControl, TrainerState

from shared.artifacts import Run, read_jsonl, write_jsonl
from shared.cli import main
from shared.contracts import Response, Triplet
from shared.datasets.stage import prepare
from shared.settings import Recipe, load_settings
from student_trainer.training import stage as training
from student_trainer.training.rounds import BEST, checkpoints
from student_trainer.triplets.build import build


def weights(run: Path, number: int) -> dict[str, torch.Tensor]:
    return load_file(checkpoint(run, number) / "student" / "model.safetensors")


def manifest(run: Path, stage: str) -> dict:
    return json.loads((run / stage / "manifest.json").read_text())


def killed_when(reached: Callable[[], bool], arguments: list[str]) -> None:
    """Begin a training, and kill it when that is reached."""
    threads = str(torch.get_num_threads())  # with another number sums are added in another order
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": threads, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen([sys.executable, "-m", "shared.cli", *arguments], env=environment)
    while not reached():
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


def test_killed_in_every_stage_of_its_rounds_it_ends_with_the_same_students(tmp_path):
    model = folder(tmp_path / "model")
    rounds = {"rounds": 2, "validate_every": 1.0, "epochs": 20}
    whole, again = tmp_path / "whole", tmp_path / "again"
    assert main(answered_run(whole, model, train=rounds)) == 0

    arguments = answered_run(again, model, train=rounds)
    killed_when(lambda: bool(checkpoints(checkpoint(again, 0))), arguments)
    killed_when(lambda: (again / "responses" / "student-r1").is_dir(), arguments)
    killed_when(lambda: bool(checkpoints(checkpoint(again, 1))), arguments)
    assert main(arguments) == 0

    for number in (0, 1):
        assert all(weight.equal(weights(again, number)[name]) for name, weight in weights(whole, number).items())
        for file in ("validation.jsonl",):
            assert (checkpoint(again, number) / file).read_text() == (checkpoint(whole, number) / file).read_text()
        steps = [json.loads(line)["step"] for line in (checkpoint(again, number) / "log.jsonl").read_text().splitlines()]
        assert steps == list(range(1, len(steps) + 1))
    assert (again / "triplets" / "r1" / "triplets.jsonl").read_bytes() == (whole / "triplets" / "r1" / "triplets.jsonl").read_bytes()


@pytest.mark.parametrize("kind", tiny_models.KINDS)
def test_a_second_round_rejects_the_current_students_answers_and_goes_on_from_the_first(kind, tmp_path, capsys):
    run = tmp_path / "run"
    arguments = answered_run(run, folder(tmp_path / "model", kind), train={"rounds": 2}, triplets={"on_policy": 1.0, "margin": 0.01})
    assert main(arguments) == 0
    triplets = read_jsonl(run / "triplets" / "r1" / "triplets.jsonl", Triplet)
    assert {t.rejected_source for t in triplets} >= {"current-student"}
    assert {t.chosen_source for t in triplets} == {"teacher"}
    read = {ref["path"] for ref in manifest(run, "checkpoints/r1")["inputs"]}
    assert "checkpoints/r0/student/model.safetensors" in read
    assert "triplets/r1/triplets.jsonl" in read
    assert any(ref["path"].startswith("responses/student-r1/serving/") for ref in manifest(run, "responses/student-r1")["outputs"])
    losses = [json.loads(line)["nll"] for number in (0, 1) for line in (checkpoint(run, number) / "log.jsonl").read_text().splitlines()]
    assert losses[len(losses) // 2] < losses[0]  # it begins where the first round ended
    capsys.readouterr()
    assert main(arguments) == 0
    assert capsys.readouterr().out.splitlines() == [
        "checkpoints/r0: complete, nothing to do",
        "responses/student-r1: complete, nothing to do",
        "triplets/r1: complete, nothing to do",
        "checkpoints/r1: complete, nothing to do",
    ]


def test_with_lora_a_second_round_goes_on_with_the_first_ones_adapter_over_the_initial_student(tmp_path):
    run, model = tmp_path / "run", folder(tmp_path / "model")
    given = {"rounds": 2, "lora_rank": 2, "kl_reference": 0.1, "learning_rate": 0.01}
    assert main(answered_run(run, model, train=given)) == 0
    first = json.loads((checkpoint(run, 1) / "log.jsonl").read_text().splitlines()[0])
    assert first["kl_reference"] > 0.001  # against the initial student, not against the one the round began with
    config = json.loads((checkpoint(run, 1) / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == 2
    initial, trained = load_file(model / "model.safetensors"), weights(run, 1)
    assert not trained["model.layers.0.mlp.up_proj.weight"].equal(initial["model.layers.0.mlp.up_proj.weight"])
    assert trained["model.embed_tokens.weight"].equal(initial["model.embed_tokens.weight"])


EARLY = {"epochs": 50, "validate_every": 1.0, "patience": 2, "learning_rate": 0.02, "scheduler": "constant", "warmup_fraction": 0.0}
LATE = {**EARLY, "validate_every": 0, "patience": None}


class Killed(BaseException):
    pass


def kill(*anything, **more):
    raise Killed


def killed_at_checkpoint(number: int, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Begin a training in this process, and end it after that checkpoint."""
    written = training.Checkpointing.on_save

    def write_and_kill(self, args, state, control, **more):
        written(self, args, state, control, **more)
        if state.global_step >= number:
            raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(training.Checkpointing, "on_save", write_and_kill)
        with pytest.raises(Killed):
            main(arguments)


def rows(run: Path, ledger: str) -> list[dict]:
    return [json.loads(line) for line in (checkpoint(run) / ledger).read_text().splitlines()]


def test_the_best_validated_student_is_taken_and_training_ends_when_it_gets_no_better(tmp_path, capsys):
    run, model = tmp_path / "run", folder(tmp_path / "model")
    assert main(answered_run(run, model, train={**EARLY, "checkpoint_steps": None, "report_to": ["tensorboard"]})) == 0
    rows = [json.loads(line) for line in (checkpoint(run) / "validation.jsonl").read_text().splitlines()]
    best = max(rows, key=lambda row: (row["rouge_l"], -row["step"]))
    assert manifest(run, "checkpoints/r0")["counts"]["best_validation"] == best
    assert rows[-1]["step"] < 50 * 4
    assert [row["step"] for row in rows][-3:].index(best["step"]) == 0  # and two validations after it
    assert "the best so far" in capsys.readouterr().out
    assert not list(checkpoint(run).glob("best*"))
    assert list((checkpoint(run) / "tensorboard").glob("events.out.tfevents.*"))

    until_then, further = tmp_path / "until-then", tmp_path / "further"
    assert main(answered_run(until_then, model, train={**LATE, "max_steps": best["step"]})) == 0
    assert main(answered_run(further, model, train={**LATE, "max_steps": rows[-1]["step"]})) == 0
    taken = weights(run, 0)
    assert all(weight.equal(taken[name]) for name, weight in weights(until_then, 0).items())
    assert not all(weight.equal(taken[name]) for name, weight in weights(further, 0).items())


def test_killed_after_an_early_stop_it_trains_no_further(tmp_path, monkeypatch):
    run = tmp_path / "run"
    arguments = answered_run(run, folder(tmp_path / "model"), train={**EARLY, "checkpoint_steps": 1})
    with monkeypatch.context() as patched:
        patched.setattr(training, "save", kill)
        with pytest.raises(Killed):
            main(arguments)
    before = (checkpoint(run) / "validation.jsonl").read_text()
    assert main(arguments) == 0
    assert (checkpoint(run) / "validation.jsonl").read_text() == before


def test_other_answers_of_the_teacher_begin_a_round_anew_where_they_are_learned_from(tmp_path):
    run, model = tmp_path / "run", folder(tmp_path / "model")
    arguments = answered_run(run, model, train={"kl_teacher_sequence": 0.5, "epochs": 30})
    killed_when(lambda: bool(checkpoints(checkpoint(run))), arguments)
    before = (checkpoint(run) / "log.jsonl").read_text().splitlines()
    stage = Run.open(run, load_settings(Recipe, flags={}, yaml_file=run.with_suffix(".yaml"))).stage("responses/teacher", ["dataset"])
    rows = read_jsonl(stage.path / "responses.jsonl", Response)
    write_jsonl(stage.path / "responses.jsonl", [row.model_copy(update={"text": f"{row.text} w7"}) for row in rows])
    stage.finish([stage.path / "responses.jsonl"], settings={})
    assert main(arguments) == 0
    assert (checkpoint(run) / "log.jsonl").read_text().splitlines()[0] != before[0]


def test_checkpoints_come_by_the_clock_and_the_oldest_go(tmp_path):
    state, control = TrainerState(), TrainerControl()
    for number in (1, 2, 10):
        (tmp_path / f"checkpoint-{number}").mkdir()
    callback = training.Checkpointing(tmp_path, every_s=0.0, every_steps=None, keep=2)
    callback.on_save(None, state, control)
    assert [folder.name for folder in checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-10"]
    callback.on_step_end(None, state, control)
    assert control.should_save
    later = TrainerControl()
    training.Checkpointing(tmp_path, every_s=60.0, every_steps=None, keep=2).on_step_end(None, state, later)
    assert not later.should_save


def with_references(run: Path, reference: str | None) -> None:
    """Let every validation row have this one."""
    stage = Run.open(run, load_settings(Recipe, flags={}, yaml_file=run.with_suffix(".yaml"))).stage("dataset")
    file = stage.path / "validation.jsonl"
    file.write_text("".join(json.dumps({**json.loads(line), "summary": reference}) + "\n" for line in file.read_text().splitlines()))
    stage.finish([stage.path / f"{split}.jsonl" for split in ("train", "validation", "test")], settings={})


def test_validation_without_references_is_refused_by_the_name_of_its_setting(tmp_path, capsys):
    arguments = answered_run(tmp_path / "run", folder(tmp_path / "model"), train={"validate_every": 1.0})
    with_references(tmp_path / "run", None)
    assert main(arguments) == 12
    assert "train.validate_every: no validation row has a reference" in capsys.readouterr().err


def test_validation_by_references_that_rouge_l_cannot_read_is_refused_instead_of_taking_the_first_student(tmp_path, capsys):
    arguments = answered_run(tmp_path / "run", folder(tmp_path / "model"), train={"validate_every": 1.0})
    with_references(tmp_path / "run", "Τι είναι η ημικρανία;")
    assert main(arguments) == 12
    assert "train.validate_every: ROUGE-L reads a-z and 0-9 alone" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["kl_reference", "kl_teacher_sequence", "kl_teacher_token"])
def test_each_kl_term_is_logged_and_lowers_what_it_measures(name, tmp_path):
    run = tmp_path / "run"
    arguments = answered_run(run, folder(tmp_path / "model"), train={name: 0.5, "epochs": 10})
    assert main(arguments) == 0
    rows = [json.loads(line) for line in (checkpoint(run) / "log.jsonl").read_text().splitlines()]
    assert all(row[name] is not None for row in rows)
    others = {"kl_reference", "kl_teacher_sequence", "kl_teacher_token"} - {name}
    assert all(row[other] is None for row in rows for other in others)
    if name == "kl_reference":
        assert rows[0][name] == pytest.approx(0.0, abs=1e-5)  # it begins at the reference
        assert rows[-1][name] > 0
    else:
        assert rows[-1][name] < rows[0][name]
        read = {ref["path"] for ref in manifest(run, "checkpoints/r0")["inputs"]}
        assert "responses/teacher/responses.jsonl" in read


def test_a_run_may_go_on_with_another_layout_of_the_same_step_but_not_with_other_steps(tmp_path, capsys):
    arguments = answered_run(tmp_path / "run", folder(tmp_path / "model"), train={"max_steps": 4})
    assert main([*arguments, "--set", "train.batch_size=2", "--set", "train.gradient_accumulation=2"]) == 0
    assert main([*arguments, "--set", "train.learning_rate=0.5"]) == 6
    assert "train.learning_rate" in capsys.readouterr().err


def test_layouts_of_the_same_step_validate_at_the_same_steps_and_count_the_same_epochs(tmp_path):
    """14 prompts, of which the last step of an epoch has two."""
    model, given = folder(tmp_path / "model"), {"epochs": 4, "validate_every": 0.55, "learning_rate": 0.02}
    assert main(answered_run(tmp_path / "one", model, train=given)) == 0
    micro = answered_run(tmp_path / "micro", model, train={**given, "batch_size": 1, "gradient_accumulation": 4})
    assert main(micro) == 0
    assert [row["step"] for row in rows(tmp_path / "one", "validation.jsonl")] == [3, 5, 7, 9, 11, 14, 16]
    for ledger in ("log.jsonl", "validation.jsonl"):
        counted = [[(row["step"], row["epoch"]) for row in rows(tmp_path / name, ledger)] for name in ("one", "micro")]
        assert counted[0] == counted[1]
        assert all(epoch == step / 4 for step, epoch in counted[0])


def test_a_training_validates_by_settings_of_its_own_whatever_it_is_evaluated_by_later(tmp_path, monkeypatch, capsys):
    model, given = folder(tmp_path / "model"), {"epochs": 8, "checkpoint_steps": 1, "validate_every": 1.0, "learning_rate": 0.02}
    assert main(answered_run(tmp_path / "whole", model, train=given)) == 0
    arguments = answered_run(tmp_path / "run", model, train=given)
    killed_at_checkpoint(18, arguments, monkeypatch)
    assert main([*arguments, "--set", "train.validation_max_tokens=1"]) == 6
    assert "train.validation_max_tokens: the run has 6, you ask for 1" in capsys.readouterr().err
    assert main([*arguments, "--set", "evaluate.max_tokens=1", "--set", "evaluate.stop=[w]"]) == 0
    assert rows(tmp_path / "run", "validation.jsonl") == rows(tmp_path / "whole", "validation.jsonl")


def test_what_a_round_killed_after_its_manifest_left_goes_with_the_next_command(tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    arguments = answered_run(run, folder(tmp_path / "model"), train={"validate_every": 1.0})
    with monkeypatch.context() as patched:
        patched.setattr(training, "clear", lambda folder: kill() if (folder / "manifest.json").exists() else None)
        with pytest.raises(Killed):
            main(arguments)
    assert checkpoints(checkpoint(run))
    assert (checkpoint(run) / BEST).exists()
    assert main(arguments) == 0
    assert "complete, nothing to do" in capsys.readouterr().out
    assert sorted(file.name for file in checkpoint(run).iterdir()) == [
        "inputs.json", "log.jsonl", "manifest.json", "student", "tensorboard", "validation.jsonl"
    ]  # fmt: skip


def test_a_changed_initial_student_begins_a_round_anew_and_is_named_by_its_contents(tmp_path, monkeypatch, capsys):
    run, model = tmp_path / "run", folder(tmp_path / "model")
    arguments = answered_run(run, model, train={"lora_rank": 2})
    killed_at_checkpoint(2, arguments, monkeypatch)
    os.utime(model / "model.safetensors", (1, 1))  # the same on another machine
    killed_at_checkpoint(4, arguments, monkeypatch)
    assert "beginning anew" not in capsys.readouterr().out
    shutil.rmtree(model)
    tiny_models.save_folder(tiny_models.tiny_llama(7), tiny_models.tokenizer(appends_eos=False, chat=True), model)
    assert main(arguments) == 0
    assert f"beginning anew, checkpoint-4 is of no use: initial_student is {model}@" in capsys.readouterr().out
    assert manifest(run, "checkpoints/r0")["settings"]["initial_student"] == training.known_as(str(model))
    assert main(answered_run(tmp_path / "other", model, train={"lora_rank": 2})) == 0
    assert [row["loss"] for row in rows(run, "log.jsonl")] == [row["loss"] for row in rows(tmp_path / "other", "log.jsonl")]


@pytest.mark.parametrize("needed", [{"lora_rank": 2}, {"kl_reference": 0.1}])
def test_a_later_round_that_needs_the_initial_student_refuses_another(needed, tmp_path, monkeypatch, capsys):
    run, model = tmp_path / "run", folder(tmp_path / "model")
    arguments = answered_run(run, model, train={"rounds": 2, **needed})
    with monkeypatch.context() as patched:
        patched.setattr("student_trainer.training.rounds.sample", kill)
        with pytest.raises(Killed):
            main(arguments)
    shutil.rmtree(model)
    tiny_models.save_folder(tiny_models.tiny_llama(7), tiny_models.tokenizer(appends_eos=False, chat=True), model)
    assert main(arguments) == 12
    said = capsys.readouterr().err
    assert "student.model: it is" in said
    assert "checkpoints/r0 was trained with" in said


def test_a_model_of_the_hub_is_known_by_its_commit(tmp_path, monkeypatch):
    snapshot = tmp_path / "snapshots" / "0123abc"
    monkeypatch.setattr(training, "offline_model", lambda reference: str(snapshot))
    assert training.known_as("google/flan-t5-base") == "google/flan-t5-base@0123abc"


def test_what_precision_auto_was_at_first_it_is_until_the_round_ends(tmp_path, monkeypatch, capsys):
    arguments = answered_run(tmp_path / "run", folder(tmp_path / "model"), train={"precision": "auto"})
    monkeypatch.setattr(training, "native_bf16", lambda device: True)
    killed_at_checkpoint(2, arguments, monkeypatch)
    monkeypatch.setattr(training, "native_bf16", lambda device: False)
    assert main(arguments) == 0
    assert "train.precision=auto goes on as it began, in bf16" in capsys.readouterr().out
    assert manifest(tmp_path / "run", "checkpoints/r0")["settings"]["bf16"] is True


@pytest.mark.parametrize("read", ["triplets/r0/triplets.jsonl", "dataset/validation.jsonl"])
def test_what_was_cut_after_its_stage_had_written_it_is_not_trained_on(read, tmp_path, capsys):
    run = tmp_path / "run"
    arguments = answered_run(run, folder(tmp_path / "model"), train={"validate_every": 1.0})
    file = run / read
    file.write_text("".join(line + "\n" for line in file.read_text().splitlines()[:3]))
    assert main(arguments) == 4
    assert f"{file} is not what `distill" in capsys.readouterr().err
    assert not checkpoint(run).exists()

    (file.parent / "manifest.json").unlink()  # as told
    opened = Run.open(run, load_settings(Recipe, flags={}, yaml_file=run.with_suffix(".yaml")))
    prepare(opened)
    build(opened)
    assert main(arguments) == 0
