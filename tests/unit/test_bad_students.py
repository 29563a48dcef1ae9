"""Students that cannot be trained: each is refused with its field and a remedy, whatever its library would have raised."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_models
import torch
import transformers
from tiny_models import VOCABULARY, collator, examples, packed, student

from shared.errors import StorageError, TrainingError
from shared.settings import TrainSettings
from student_trainer.training.stage import event_writer
from student_trainer.training.student import Student, adapt, load, refuse_longer_texts, refuse_unless_it_fits, refuse_unless_packable

TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 3, "eos_token_id": 1}


def gpt2(**changes) -> transformers.GPT2LMHeadModel:
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.3, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    return transformers.GPT2LMHeadModel._from_config(transformers.GPT2Config(**sizes, **TOKENS, **changes), attn_implementation="sdpa")


def gptj(**changes) -> transformers.GPTJForCausalLM:
    return transformers.GPTJForCausalLM(transformers.GPTJConfig(n_embd=32, n_layer=1, n_head=4, rotary_dim=4, **TOKENS, **changes))


def changed(**values) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | values))

    return change


def unpickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"garbage")


def half_a_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (half_a_tokenizer, "KeyError: 'added_tokens'"),
        (unpickled, "UnpicklingError"),
        (changed(hidden_size="x"), "hidden_size"),
        (changed(hidden_size=64), "RuntimeError"),
        (changed(hidden_act="nosuch"), "KeyError: 'nosuch'"),
        (changed(quantization_config={"quant_method": "gptq", "bits": 4}), "ImportError"),
    ],
)
def test_a_folder_that_is_no_model_is_named_with_the_reason_of_whatever_class(change, reason, tmp_path):
    folder = tiny_models.save_folder(tiny_models.tiny_llama(), tiny_models.tokenizer(appends_eos=False), tmp_path)
    load(folder, TrainSettings(), bf16=False)
    change(folder)
    with pytest.raises(TrainingError, match=rf"(?s)student\.model: cannot load {folder}: .*{reason}"):
        load(folder, TrainSettings(), bf16=False)


def test_tensors_without_weights_are_refused_instead_of_being_random(tmp_path):
    folder = tiny_models.save_folder(tiny_models.tiny_llama(), tiny_models.tokenizer(appends_eos=False), tmp_path)
    changed(num_hidden_layers=3)(folder)
    with pytest.raises(TrainingError, match=r"has no weights for 9 tensors of its config\.json, .*\(model\.layers\.2\."):
        load(folder, TrainSettings(), bf16=False)


def test_no_memory_is_no_fault_of_the_model():
    class Large(Student):
        def _continue(self, batch):
            return torch.empty(10**15)

    with pytest.raises(RuntimeError, match="DefaultCPUAllocator"):
        refuse_unless_packable(Large(student("decoder-only").model, "decoder-only"), collator("decoder-only"), examples(1)[0])


def test_a_tokenizer_of_bytes_is_refused_in_the_words_of_prepare(tmp_path):
    tiny_models.tiny_t5().save_pretrained(tmp_path)
    transformers.ByT5Tokenizer().save_pretrained(tmp_path)
    with pytest.raises(TrainingError, match=r"has no fast tokenizer, which serving needs \(a tokenizer\.json\)"):
        load(tmp_path, TrainSettings(), bf16=False)


def test_a_model_that_fails_on_packed_rows_is_refused_by_its_architecture():
    config = transformers.FalconConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=True, **TOKENS)
    falcon = Student(transformers.FalconForCausalLM(config), "decoder-only")
    with pytest.raises(TrainingError, match=r"student\.model: a falcon model cannot read packed rows \(ValueError: .*Llama or T5") as told:
        refuse_unless_packable(falcon, collator("decoder-only"), examples(1, 2)[0])
    assert isinstance(told.value.__cause__, ValueError)


@pytest.mark.parametrize("made", [gpt2, gptj])
def test_positions_of_a_table_are_counted_and_a_row_beyond_the_last_is_refused(made):
    model = Student(made(n_positions=16), "decoder-only")
    rows = [packed("fits", tuple(range(4, 14)), [(5,) * 6], [(6,) * 2])]
    refuse_unless_it_fits(model, collator("decoder-only"), rows)
    too_long = packed("longer", tuple(range(4, 14)), [(5,)], [(6,) * 7])
    with pytest.raises(
        TrainingError, match=r"of 16 positions cannot .* 17 tokens .*lower train\.max_prompt_tokens or train\.max_response_"
    ):
        refuse_unless_it_fits(model, collator("decoder-only"), [*rows, too_long])


@pytest.mark.parametrize("kind", tiny_models.KINDS)
def test_positions_that_are_computed_have_no_end(kind):
    refuse_longer_texts(student(kind), 100_000, "nothing")


@pytest.mark.parametrize("odd", ["prompt", "response", "padding"])
def test_a_token_without_an_embedding_is_refused(odd):
    model = tiny_models.tiny_llama()
    model.resize_token_embeddings(60)
    high = {name: (60,) if name == odd else (59,) for name in ("prompt", "response")}
    padded = collator("decoder-only")
    padded.pad_token_id = 60 if odd == "padding" else 59
    with pytest.raises(TrainingError, match=r"student\.model: its tokenizer gives the token 60, but it has embeddings of 0 to 59 only"):
        refuse_unless_it_fits(Student(model, "decoder-only"), padded, [packed("a", high["prompt"], [high["response"]], [(5,)])])


def test_a_t5_whose_answers_begin_with_a_token_without_an_embedding_is_refused():
    model = student("encoder-decoder")
    model.model.config.decoder_start_token_id = VOCABULARY
    with pytest.raises(TrainingError, match=f"gives the token {VOCABULARY}"):
        refuse_unless_it_fits(model, collator("encoder-decoder"), examples(1))


def test_lora_stands_beside_the_transposed_layers_of_gpt2_and_merges_to_the_same_scores():
    model = Student(gpt2().double(), "decoder-only")
    adapt(model, 4)
    trained = model.trained()
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in trained} == {"c_attn", "c_proj", "c_fc"}
    with torch.no_grad():
        for weight in trained.values():
            weight.normal_(std=0.1)
    batch = collator("decoder-only")(examples(2))
    refuse_unless_packable(model, collator("decoder-only"), examples(1, 2)[0])
    before = model(batch)
    assert not torch.allclose(before, model.initial_logits(batch), atol=1e-2)
    model.model = model.merged()
    assert torch.allclose(before, model(batch), atol=1e-6)


def test_lora_is_refused_where_there_is_no_layer_for_it():
    model = student("decoder-only")
    model.requires_grad_(False)
    with pytest.raises(TrainingError, match=r"train\.lora_rank: a llama model has no linear layers .*set it to 0"):
        adapt(model, 4)


def test_a_damaged_adapter_of_the_round_before_is_named_with_the_folder_to_remove(tmp_path):
    first = student("decoder-only")
    adapt(first, 4)
    folder = tmp_path / "checkpoints" / "r0" / "adapter"
    first.adapted.save_pretrained(folder)
    shutil.copytree(folder, whole := tmp_path / "whole")
    (folder / "adapter_model.safetensors").write_bytes(b"torn")
    with pytest.raises(TrainingError, match=rf"{folder} cannot be read .*damaged; remove {folder.parent} to train that round anew"):
        adapt(student("decoder-only"), 4, folder)
    adapt(student("decoder-only"), 4, whole)


def test_activation_checkpointing_is_refused_by_name_where_a_model_has_none(tmp_path):
    model = transformers.CTRLLMHeadModel(transformers.CTRLConfig(n_embd=32, dff=64, n_layer=1, n_head=4, **TOKENS))
    tiny_models.save_folder(model, tiny_models.tokenizer(appends_eos=False), tmp_path)
    with pytest.raises(TrainingError, match=r"train\.activation_checkpointing: a ctrl model .*set it to false"):
        load(tmp_path, TrainSettings(activation_checkpointing=True), bf16=False)


@pytest.mark.parametrize("end", ["flush", "close"])
def test_a_disk_without_room_for_tensorboards_events_is_told(end, tmp_path):
    class Full:
        def flush(self):
            raise OSError(errno.ENOSPC, "No space left on device")

        close = flush

    writer = event_writer(tmp_path)
    files, writer.all_writers = writer.all_writers, {"": Full()}
    with pytest.raises(StorageError, match=rf"{tmp_path}/tensorboard: no space left on the device; free some"):
        getattr(writer, end)()
    writer.all_writers = files
    writer.close()


def test_a_folder_that_takes_no_events_is_told(tmp_path):
    (tmp_path / "tensorboard").write_text("a file")
    with pytest.raises(StorageError, match=f"{tmp_path}/tensorboard: "):
        event_writer(tmp_path)
