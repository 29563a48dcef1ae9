"""`distill train` on students, and checkpoints that are no good: exit 12 with the field or the folder, and never a traceback."""

from __future__ import annotations

import pytest
import torch
import transformers
from tiny_models import VOCABULARY, save_folder, tiny_llama, tokenizer
from trained import checkpoint, folder, run_with, triplets

from shared.cli import main
from student_trainer.training import stage as training
from student_trainer.training.rounds import BEST, checkpoints
from student_trainer.training.trainer import WEIGHTS

TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 3, "eos_token_id": 1}


def gpt2(positions: int) -> transformers.GPT2LMHeadModel:
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=positions, **TOKENS))


def falcon() -> transformers.FalconForCausalLM:
    config = transformers.FalconConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=True, **TOKENS)
    return transformers.FalconForCausalLM(config)


def small_embedding() -> transformers.LlamaForCausalLM:
    model = tiny_llama()
    model.resize_token_embeddings(60)
    return model


@pytest.mark.parametrize(
    ("made", "settings", "said"),
    [
        (falcon, {}, "student.model: a falcon model cannot read packed rows"),
        (lambda: gpt2(16), {}, "lower train.max_prompt_tokens or train.max_response_tokens"),
        (lambda: gpt2(16), {"trainer": "trl"}, "lower train.max_prompt_tokens or train.max_response_tokens"),
        (lambda: gpt2(60), {"validate_every": 1}, "lower task.max_question_chars or train.validation_max_tokens"),
        (small_embedding, {}, "but it has embeddings of 0 to 59 only"),
        (small_embedding, {"trainer": "trl"}, "but it has embeddings of 0 to 59 only"),
    ],
)
def test_a_student_that_cannot_be_trained_ends_with_exit_12_and_what_to_change(made, settings, said, tmp_path, capsys):
    model = save_folder(made(), tokenizer(appends_eos=False, chat=True), tmp_path / "model")
    assert main(run_with(tmp_path / "run", model, triplets(), max_steps=1, **settings)) == 12
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("trainer", ["packed", "trl"])
def test_lora_on_gpt2_trains(trainer, tmp_path):
    model = save_folder(gpt2(64), tokenizer(appends_eos=False, chat=True), tmp_path / "model")
    assert main(run_with(tmp_path / "run", model, triplets(), max_steps=1, lora_rank=2, trainer=trainer)) == 0
    student = transformers.AutoModelForCausalLM.from_pretrained(checkpoint(tmp_path / "run") / "student")
    assert not [name for name, _ in student.named_parameters() if "lora" in name]


def test_no_memory_for_the_longest_row_says_which_settings_to_lower(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(training, "refuse_unless_packable", lambda *arguments: torch.empty(10**15))
    assert main(run_with(tmp_path / "run", folder(tmp_path / "model"), triplets(), max_steps=1)) == 12
    assert "out of memory at step 1" in capsys.readouterr().err


class Killed(BaseException):
    """Nobody catches it."""


def killed_while_it_saves_the_student(arguments, monkeypatch):
    def kill(*given):
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(training, "save", kill)
        with pytest.raises(Killed):
            main(arguments)


def test_a_damaged_checkpoint_is_named_and_once_it_is_removed_the_same_command_goes_on(tmp_path, capsys, monkeypatch):
    arguments = run_with(tmp_path / "run", folder(tmp_path / "model"), triplets(), max_steps=2, checkpoint_steps=1, keep_checkpoints=2)
    killed_while_it_saves_the_student(arguments, monkeypatch)
    first, last = checkpoints(checkpoint(tmp_path / "run"))
    training.remove_checkpoint(last)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", WEIGHTS, "trainer_state.json"):
        whole = (first / name).read_bytes()
        (first / name).write_bytes(whole[:30])
        assert main(arguments) == 12
        said = capsys.readouterr().err
        assert f"{first} is damaged (" in said
        assert "remove it, and the same command goes on from what is left" in said
        if name != "trainer_state.json":
            (first / name).write_bytes(whole)
    training.remove_checkpoint(first)
    assert main(arguments) == 0


def test_damaged_best_weights_are_told_with_the_folder_to_remove(tmp_path, capsys, monkeypatch):
    arguments = run_with(tmp_path / "run", folder(tmp_path / "model"), triplets(), max_steps=1, validate_every=1.0, validation_rows=2)
    killed_while_it_saves_the_student(arguments, monkeypatch)
    (checkpoint(tmp_path / "run") / BEST).write_bytes(b"torn")
    assert main(arguments) == 12
    assert f"{checkpoint(tmp_path / 'run')} is damaged (" in capsys.readouterr().err
