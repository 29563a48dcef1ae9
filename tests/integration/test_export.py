"""The export of tiny random students: what is served is what was trained, and the card says what is known and no secret."""

from __future__ import annotations

import json
import random
import re
import shutil
from pathlib import Path

import pytest
import tiny_models
import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from evaluator.card import SECTION
from shared.artifacts import Run, sha256_file
from shared.contracts import GenerationRequest, Sampling
from shared.datasets.stage import prepare
from shared.engines import convert
from shared.engines.local import LocalModel
from shared.errors import EngineError, StageOrder
from shared.prompts import SUMMARISE_QUESTION, messages, zero_shot
from shared.settings import EvaluateSettings, Recipe
from student_trainer.card import SCORES, base_name, hub_name, public_url
from student_trainer.export import export
from student_trainer.training.stage import save
from student_trainer.training.student import load

URL = "http://teacher.example:8000/v1?tenant=hush"
BEST = {"step": 7, "epoch": 1.0, "rouge_l": 0.321}


def model(kind: str, seed: int, path: Path) -> Path:
    if kind == "decoder-only":
        return tiny_models.save_folder(tiny_models.tiny_llama(seed), tiny_models.tokenizer(appends_eos=False, chat=True), path)
    return tiny_models.save_folder(tiny_models.tiny_t5(seed), tiny_models.tokenizer(appends_eos=True), path)


def rows(path: Path, count: int = 60) -> Path:
    """A data set in the words that the tiny models know."""
    draw = random.Random(0)
    texts = [" ".join(f"w{draw.randrange(tiny_models.WORDS)}" for _ in range(draw.randint(4, 40))) for _ in range(2 * count)]
    path.write_text("".join(json.dumps({"question": q, "summary": s}) + "\n" for q, s in zip(texts[::2], texts[1::2], strict=True)))
    return path


def trained(folder: Path, kind: str, **changes) -> Run:
    """A run whose only round of training is complete."""
    values = {
        "name": "tiny",
        "dataset": {"name": "file", "path": rows(folder / "rows.jsonl"), "validation_rows": 20, "test_rows": 10},
        "teacher": {"url": URL, "model": "big-model", "api_key": "sk-very-secret"},
        "student": {"model": str(model(kind, 0, folder / "base"))},
        "export": {"quantization": "float32"},
        "evaluate": {"max_tokens": 24},
    }
    run = Run.open(folder / "run", Recipe(**{**values, **changes}))
    stage = run.stage("checkpoints/r0")
    model(kind, 1, stage.path / "student")
    stage.finish([stage.path / "student"], settings={}, counts={"best_validation": BEST})
    return run


def harvested(run: Run) -> None:
    """What the stages before the training have recorded."""
    run.stage("responses/teacher").finish([], settings={}, counts={"prompts": 30, "answers": 119})
    for number, triplets in enumerate((57, 61, 59)):
        sources = {"student": 50, **({"current-student": 10 + number} if number else {})}
        run.stage(f"triplets/r{number}").finish([], settings={}, counts={"triplets": triplets, "rejected_sources": sources})


def parity(run: Run) -> dict:
    return run.manifest("model").counts["parity"]


def conversion(run: Run) -> dict:
    """What decided whether it is exported."""
    return run.manifest("model").counts["conversion"]


def card(run: Run) -> str:
    return (run.path / "model" / "README.md").read_text()


@pytest.mark.parametrize("kind", tiny_models.KINDS)
def test_in_float32_both_folders_give_the_same_answer_to_each_of_32_prompts_and_the_manifest_says_so(kind, tmp_path, capsys):
    run = trained(tmp_path, kind)
    export(run)
    assert parity(run) == {"prompts": 32, "identical": 32, "mean_rouge_l": 1.0, "quantization": "float32"} == conversion(run)
    assert "export: hf/ and serving/ (float32) answer 32 of 32 prompts identically, mean ROUGE-L 1.00\n" in capsys.readouterr().out
    assert sha256_file(run.path / "model/hf/model.safetensors") == sha256_file(run.path / "checkpoints/r0/student/model.safetensors")


def test_penalties_in_the_generation_config_of_a_student_are_no_difference_between_the_folders(tmp_path):
    run = trained(tmp_path, "decoder-only")
    file = run.path / "checkpoints/r0/student/generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "repetition_penalty": 9.0, "min_new_tokens": 24}))
    export(run)
    assert parity(run)["identical"] == 32


def test_answers_end_at_the_same_stop_text_even_if_they_begin_with_it(tmp_path):
    run = trained(tmp_path, "decoder-only", evaluate={"max_tokens": 24, "stop": ["w5"]})  # w56 is where most answers begin
    export(run)
    assert parity(run)["identical"] == 32


def test_of_few_rows_all_are_asked_but_those_that_the_model_cannot_read(tmp_path):
    short = {"name": "file", "path": rows(tmp_path / "few.jsonl", 12), "validation_rows": 3, "test_rows": 3}
    (tmp_path / "few").mkdir()
    run = trained(tmp_path / "few", "decoder-only", dataset=short)
    export(run)
    assert parity(run)["prompts"] == 9

    (tmp_path / "none").mkdir()
    run = trained(tmp_path / "none", "decoder-only", evaluate={"max_tokens": 256})  # as many tokens as the model reads in all
    export(run)
    assert parity(run) == {"prompts": 0, "identical": 0, "mean_rouge_l": None, "quantization": "float32"}


@pytest.mark.parametrize("kind", tiny_models.KINDS)
def test_what_int8_changes_is_recorded_and_the_same_conversion_to_float32_is_looked_at_and_not_exported(kind, tmp_path):
    run = trained(tmp_path, kind, export={"quantization": "int8"})
    export(run)
    assert (parity(run)["prompts"], parity(run)["quantization"]) == (32, "int8")
    assert parity(run)["identical"] < 32
    assert conversion(run) == {"prompts": 32, "identical": 32, "mean_rouge_l": 1.0, "quantization": "float32"}
    assert re.search(r"\(int8\) answer \d+ of 32 .*; in float32 32 of 32, mean ROUGE-L 1\.00\.", card(run))
    assert sorted(file.name for file in (run.path / "model").iterdir()) == ["README.md", "hf", "manifest.json", "serving"]


@pytest.mark.parametrize("quantization", ["float32", "float16", "int8"])
def test_noise_of_5_percent_in_the_converted_weights_is_refused_though_most_words_are_the_same(quantization, tmp_path, monkeypatch):
    run, noisy, right = trained(tmp_path, "encoder-decoder", export={"quantization": quantization}), tmp_path / "noisy", convert.convert
    changed = load_file(shutil.copytree(run.path / "checkpoints/r0/student", noisy) / "model.safetensors")
    torch.manual_seed(0)
    for name, values in changed.items():
        if values.dim() == 2:
            changed[name] = values + torch.randn_like(values) * values.std() * 0.05
    save_file(changed, noisy / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.setattr(convert, "convert", lambda source, out, **options: right(str(noisy), out, **options))
    with pytest.raises(EngineError, match=r"the conversion changed the model: .* mean ROUGE-L 0\.[56]\d, where 0\.[89]5 in float"):
        export(run)
    assert not (run.path / "model").exists()


@pytest.mark.parametrize("quantization", ["float32", "float16", "int8"])
@pytest.mark.parametrize("kind", tiny_models.KINDS)
def test_a_serving_folder_of_other_weights_is_refused_and_nothing_is_exported(kind, quantization, tmp_path, monkeypatch):
    run, other, right = trained(tmp_path, kind, export={"quantization": quantization}), tmp_path / "other", convert.convert
    model(kind, 2, other)
    monkeypatch.setattr(convert, "convert", lambda source, out, **options: right(str(other), out, **options))
    with pytest.raises(
        EngineError, match=r"the conversion changed the model: .* of 32 prompts identically, mean ROUGE-L 0\.[0-4]"
    ) as refused:
        export(run)
    assert ("export.quantization=float32" in str(refused.value)) == (quantization == "float16")
    assert not (run.path / "model").exists()


def test_of_a_lora_student_the_adapter_is_exported_beside_the_merged_weights(tmp_path):
    run = trained(tmp_path, "decoder-only", train={"lora_rank": 2})
    stage = run.stage("checkpoints/r0")
    student, tokenizer = load(tmp_path / "base", run.recipe.train, bf16=False)
    for name, weights in student.trained().items():
        if "lora_B" in name:  # zeros before any training
            torch.nn.init.normal_(weights, std=0.3)
    save(student, tokenizer, stage.path)
    stage.finish([stage.path / "student", stage.path / "adapter"], settings={})
    export(run)

    exported, ids = run.path / "model", torch.tensor([[5, 6, 7, 8]])
    merged = AutoModelForCausalLM.from_pretrained(exported / "hf")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert not [name for name in merged.state_dict() if "lora" in name]
    assert not torch.allclose(base(ids).logits, merged(ids).logits)
    torch.testing.assert_close(PeftModel.from_pretrained(base, exported / "adapter")(ids).logits, merged(ids).logits)
    assert parity(run)["identical"] == 32
    assert "model/adapter/adapter_model.safetensors" in {output.path for output in run.manifest("model").outputs}
    assert f"`{sha256_file(exported / 'adapter/adapter_model.safetensors')}`" in card(run)
    assert json.loads((exported / "adapter/adapter_config.json").read_text())["base_model_name_or_path"] == "base"
    checkpoint = json.loads((stage.path / "adapter/adapter_config.json").read_text())
    assert checkpoint["base_model_name_or_path"] == str(tmp_path / "base")  # a later round finds it there
    texts = [file for file in exported.rglob("*") if file.is_file() and file.suffix not in (".safetensors", ".bin")]
    assert len(texts) > 8
    assert not [file for file in texts if str(tmp_path) in file.read_text()]


@pytest.mark.parametrize(("kind", "task"), [("decoder-only", "text-generation"), ("encoder-decoder", "summarization")])
def test_the_hub_reads_the_card_and_it_tells_what_a_user_must_know(kind, task, tmp_path, monkeypatch, capsys):
    run = trained(tmp_path, kind)
    export(run)
    read = ModelCard(card(run))
    assert read.data.pipeline_tag == task
    # of a file of somebody's nobody knows the language
    assert (read.data.language, read.data.library_name, read.data.license) == (None, "transformers", "other")
    assert read.data.tags == ["blackbox-distill", "orpo", "knowledge-distillation", "ctranslate2"]
    for file in ("hf/model.safetensors", "serving/model.bin", "serving/tokenizer.json"):
        assert f"| `{file}` | `{sha256_file(run.path / 'model' / file)}` |" in read.text
    source = run.manifest("dataset").counts["source"]
    assert f"`file` (30 train, 20 validation, 10 test rows), from `rows.jsonl`, SHA-256 `{source['sha256']}`" in read.text
    assert "Checkpoint: step 7, by validation ROUGE-L 32.1." in read.text
    assert "Validation ROUGE-L 32.1 (F1" in read.text
    assert "Not medical advice" in read.text
    assert "terms of use of the teacher" in read.text
    assert "32 of 32 prompts" in read.text
    (code,) = re.findall(r"```python\n(.*?)```", read.text, re.DOTALL)
    monkeypatch.chdir(run.path / "model")
    capsys.readouterr()
    exec(code, {})
    assert capsys.readouterr().out.strip()  # a random model says something


def test_no_secret_and_no_folder_of_this_machine_stands_in_the_card(tmp_path):
    run = trained(tmp_path, "decoder-only")
    export(run)
    assert "`big-model` at `http://teacher.example:8000/v1`" in card(run)
    for secret in ("hush", "sk-very-secret", str(tmp_path)):
        assert secret not in card(run), secret


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://api.example.com/v1", "https://api.example.com/v1"),
        ("https://user:p%40ss@api.example.com/v1", "https://api.example.com/v1"),
        ("https://key@[::1]:8000/v1?token=x#y", "https://[::1]:8000/v1"),
    ],
)
def test_of_a_url_neither_credentials_nor_query_are_shown(url, shown):
    assert public_url(url) == shown


def test_an_adapters_base_is_named_so_that_others_find_the_very_weights_or_none(tmp_path):
    assert base_name("google/flan-t5-base") == "google/flan-t5-base"
    assert base_name("embedded:smollm2-135m") == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert base_name("embedded:smollm2-135m-questions") == "embedded:smollm2-135m-questions"  # the Hub has others
    assert base_name(str(tmp_path / "base")) == "base"


def test_a_student_of_the_hub_is_named_there_and_a_folder_is_not(tmp_path):
    assert hub_name("google/flan-t5-base") == "google/flan-t5-base"
    assert hub_name("embedded:smollm2-135m") == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert [hub_name(name) for name in (str(tmp_path), "random:tiny-t5", "../base", "a/b/c", "x: y")] == [None] * 5


def test_an_instruction_of_any_letters_leaves_metadata_and_sections_whole(tmp_path):
    wild = "Say \"no\": `x` ''' {y}\n---\nlicense: mit\n---\n## Scores\n\n- a #b"
    run = trained(tmp_path, "decoder-only", task={"instruction": wild})
    export(run)
    read = ModelCard(card(run))
    assert read.data.license == "other"
    assert len(re.findall(rf"^{SCORES}$", read.text, re.MULTILINE)) == 1
    assert "Not medical advice" not in read.text
    assert "may be wrong" in read.text
    assert SUMMARISE_QUESTION not in read.text


@pytest.mark.parametrize("kind", tiny_models.KINDS)
def test_the_python_in_the_card_runs_and_says_what_the_server_says(kind, tmp_path, monkeypatch, capsys):
    run = trained(tmp_path, kind)
    export(run)
    (code,) = re.findall(r"```python\n(.*?)```", card(run), re.DOTALL)
    monkeypatch.chdir(run.path / "model")
    capsys.readouterr()
    exec(code, {})
    (question,) = re.findall(r'\+ "(.*?)"', code)
    task, sampling = run.recipe.task, Sampling(max_tokens=24, stop=("\n",))
    asked = {"prompt": zero_shot(task, question)} if kind == "encoder-decoder" else {"messages": messages(task, question)}
    ((answer,),) = LocalModel(Path("serving")).generate([GenerationRequest(**asked, sampling=sampling)])
    assert capsys.readouterr().out == f"{answer.text.strip()}\n"


def test_the_card_says_how_the_student_was_made(tmp_path):
    run = trained(tmp_path, "decoder-only", train={"orpo_lambda": 0.5, "kl_reference": 0.02, "epochs": 2, "validate_every": 0}, seed=5)
    harvested(run)
    export(run)
    for part in ("119 to 30 prompts", "a round: 57;", "lambda 0.5, kl_reference 0.02;", "2 epochs a round, seed 5", "Rounds: 1.\n"):
        assert part in card(run), part
    assert "kl_teacher" not in card(run)


def test_after_several_rounds_the_last_student_is_exported_and_the_triplets_of_each_are_told(tmp_path):
    run = trained(tmp_path, "decoder-only", train={"rounds": 2})
    harvested(run)
    with pytest.raises(StageOrder, match="checkpoints/r1"):
        export(run)
    stage = run.stage("checkpoints/r1")
    model("decoder-only", 2, stage.path / "student")
    stage.finish([stage.path / "student"], settings={}, counts={"best_validation": None})
    export(run)
    assert sha256_file(run.path / "model/hf/model.safetensors") == sha256_file(stage.path / "student/model.safetensors")
    assert "a round: 57, 61;" in card(run)
    assert "Rounds: 2; of the 61 answers that those after the first rejected, 11 were given by the student as it then was." in card(run)
    assert "No checkpoint was chosen by validation" in card(run)


def test_the_card_claims_nothing_of_rounds_whose_triplets_have_no_answers_of_the_student_as_it_then_was(tmp_path):
    run = trained(tmp_path, "decoder-only", train={"rounds": 2}, triplets={"on_policy": 0})
    run.stage("triplets/r1").finish([], settings={}, counts={"triplets": 61, "rejected_sources": {"student": 50, "teacher": 11}})
    shutil.copytree(run.path / "checkpoints/r0/student", run.path / "checkpoints/r1/student")
    run.stage("checkpoints/r1").finish([run.path / "checkpoints/r1/student"], settings={})
    export(run)
    assert "after the first rejected, 0 were given by the student as it then was." in card(run)


def test_with_another_bound_of_the_evaluation_the_card_is_written_anew_and_nothing_is_converted(tmp_path, monkeypatch, capsys):
    run = trained(tmp_path, "decoder-only")
    export(run)
    assert "max_new_tokens=24," in card(run)
    before, weights = run.manifest("model"), (run.path / "model/serving/model.bin").stat().st_mtime_ns
    monkeypatch.setattr(convert, "convert", None)
    longer = Run.open(run.path, run.recipe.model_copy(update={"evaluate": EvaluateSettings(max_tokens=64, stop=("w1", "w2"))}))
    capsys.readouterr()
    export(longer)
    assert "its card is written anew: evaluate.max_tokens or evaluate.stop is another one" in capsys.readouterr().out
    assert "max_new_tokens=64," in card(run)
    assert "after 64 tokens in the evaluation" in card(run)
    assert ".split('w1')[0].split('w2')[0]" in card(run)
    assert "answer 32 of 32 prompts" in card(run)
    assert run.manifest("model").counts == before.counts
    assert [ref.path for ref in run.manifest("model").outputs] == [ref.path for ref in before.outputs]
    assert (run.path / "model/serving/model.bin").stat().st_mtime_ns == weights
    monkeypatch.setattr("student_trainer.export.origin_of", None)  # a base model that has gone from the cache is not made again
    export(Run.open(run.path, longer.recipe.model_copy(update={"evaluate": EvaluateSettings(max_tokens=64, stop=("w1", "w2"), seed=1)})))
    assert capsys.readouterr().out == "export: complete, nothing to do\n"


def test_a_promotion_finds_the_section_that_it_rewrites():
    assert SCORES == SECTION


def test_the_data_set_is_made_where_a_run_has_none_yet(tmp_path):
    run = trained(tmp_path, "encoder-decoder", dataset={"name": "sample"})
    assert run.manifest("dataset") is None
    export(run)
    assert len(prepare(run)["validation"]) == 30
    assert "CC0 1.0" in card(run)
