"""The trainer: exact accumulation, the oracle, what is frozen, what is refused, what is learnt."""

from __future__ import annotations

import json
import math
import os
import resource

import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file
from tiny_models import KINDS, collator, examples, gradients, loss_of, student
from tokenizers import Tokenizer, models

from shared.errors import StorageError, TrainingError
from shared.settings import TrainSettings
from student_trainer.training.collate import LengthGrouped
from student_trainer.training.losses import Weights
from student_trainer.training.rounds import checkpoints, remove_checkpoint
from student_trainer.training.stage import Checkpointing
from student_trainer.training.student import adapt, freeze_lowest, load, native_bf16
from student_trainer.training.trainer import (
    WEIGHTS,
    OrpoTrainer,
    arguments,
    load_weights,
    weights_directory,
    write_weights,
)


def trainer(model, rows, folder, **settings):
    """An OrpoTrainer and the list its log rows are put in."""
    given = {"scheduler": "constant", "warmup_fraction": 0.0, "learning_rate": 1e-2, "checkpoint_steps": 20, "report_to": ()}
    chosen = TrainSettings(**{**given, **settings})
    log = []
    made = OrpoTrainer(
        model,
        rows,
        collator(model.kind, with_rejected=chosen.orpo_lambda > 0),
        arguments(chosen, folder, seed=0),
        weights=Weights(orpo_lambda=chosen.orpo_lambda),
        on_row=log.append,
    )
    made.add_callback(Checkpointing(folder, every_s=math.inf, every_steps=chosen.checkpoint_steps, keep=100))
    return made, log


@pytest.mark.parametrize("kind", KINDS)
def test_four_micro_batches_of_two_train_as_one_batch_of_eight(kind, tmp_path):
    rows, weights, losses = examples(16, 2), [], []
    for size, accumulation in ((8, 1), (2, 4)):
        model = student(kind)
        made, log = trainer(model, rows, tmp_path / str(size), batch_size=size, gradient_accumulation=accumulation, max_steps=4)
        made.train()
        losses.append([row.loss for row in log])
        weights.append(model.trained())
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    for name, weight in weights[0].items():
        assert torch.allclose(weight, weights[1][name], atol=1e-4), name


@pytest.mark.parametrize("kind", KINDS)
def test_the_odds_ratio_changes_no_batch(kind, tmp_path):
    """SFT and ORPO on the same triplets differ in the loss alone."""
    rows = examples(60, 2)
    orders = [list(trainer(student(kind), rows, tmp_path, batch_size=4, orpo_lambda=w)[0]._get_train_sampler()) for w in (0.0, 0.5)]
    assert sorted(orders[0]) == list(range(60))
    assert orders[0] == orders[1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rejected", [1, 3])
def test_loss_and_gradients_equal_those_of_trl(kind, rejected, tmp_path, monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from datasets import Dataset
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    model, rows = student(kind), examples(4, rejected)
    encoder_decoder = kind == "encoder-decoder"
    options = {"report_to": [], "bf16": False, "use_cpu": True, "gradient_checkpointing": False, "beta": 0.1}
    oracle = ORPOTrainer(
        model=model.model,
        args=ORPOConfig(output_dir=str(tmp_path), max_completion_length=32, max_length=64, **options),
        train_dataset=Dataset.from_dict({"prompt": ["w1"], "chosen": ["w2"], "rejected": ["w3"]}),
        processing_class=tiny_models.tokenizer(appends_eos=encoder_decoder),
    )

    def padded(sequences, value):
        return torch.nn.utils.rnn.pad_sequence([torch.tensor(s) for s in sequences], batch_first=True, padding_value=value)

    def batch(number):
        """TRL takes one rejected response a row: the `number`th."""
        sides = {"chosen": [r.responses[0] for r in rows], "rejected": [r.responses[1 + number] for r in rows]}
        prompts = [r.prompt for r in rows]
        found = {"prompt_input_ids": padded(prompts, 0), "prompt_attention_mask": padded([[1] * len(p) for p in prompts], 0)}
        for name, texts in sides.items():
            if encoder_decoder:
                found[f"{name}_labels"] = padded(texts, -100)
                continue
            found[f"{name}_input_ids"] = padded([[*p, *t] for p, t in zip(prompts, texts, strict=True)], 0)
            found[f"{name}_attention_mask"] = padded([[1] * (len(p) + len(t)) for p, t in zip(prompts, texts, strict=True)], 0)
            found[f"{name}_labels"] = padded([[*[-100] * len(p), *t] for p, t in zip(prompts, texts, strict=True)], -100)
        return found

    def trl_loss(number):
        if encoder_decoder:
            return oracle.get_batch_loss_metrics(model.model, batch(number))[0]
        # TRL's NLL of a decoder-only model includes the prompt; the paper's (and ours) is of the response alone
        chosen, rejected, *_ = oracle.concatenated_forward(model.model, batch(number))
        lengths = torch.tensor([len(r.responses[0]) for r in rows])
        return -(chosen * lengths).sum() / lengths.sum() - oracle.odds_ratio_loss(chosen, rejected)[0].mean()

    model.train()
    theirs = sum(trl_loss(number) for number in range(rejected)) / rejected  # the NLL is the same in each
    expected = gradients(model, theirs)
    ours = loss_of(model, collator(kind)(rows))
    found = gradients(model, ours)
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-5)
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, atol=1e-5, rtol=1e-4), name


@pytest.mark.parametrize("kind", KINDS)
def test_eight_examples_are_learnt_and_their_chosen_responses_preferred(kind, tmp_path):
    made, log = trainer(student(kind).float(), examples(8, 2), tmp_path, batch_size=8, max_steps=40, checkpoint_steps=1000)
    made.train()
    assert log[-1].accuracy == 1.0
    assert log[-1].nll < log[0].nll / 2
    assert log[-1].margin > log[0].margin


def test_lambda_zero_trains_without_pairs(tmp_path):
    made, log = trainer(student("decoder-only").float(), examples(4), tmp_path, batch_size=4, max_steps=2, orpo_lambda=0.0)
    made.train()
    assert log[-1].loss < log[0].loss
    assert log[0].loss == pytest.approx(log[0].nll)
    assert log[0].odds_ratio is None


def test_a_loss_that_is_not_finite_names_the_examples_and_keeps_the_checkpoint(tmp_path):
    model = student("decoder-only").float()
    made, log = trainer(model, examples(2), tmp_path, batch_size=2, max_steps=3, checkpoint_steps=1)

    def spoil(row):
        with torch.no_grad():
            next(iter(model.trained().values())).fill_(math.nan)

    made._on_row = lambda row: (log.append(row), spoil(row) if row.step == 2 else None)
    with pytest.raises(TrainingError, match=r"the loss is nan at step 3, on examples e[01], e[01]"):
        made.train()
    assert [row.step for row in log] == [1, 2]
    assert len(checkpoints(tmp_path)) == 2


def test_a_gradient_that_is_not_finite_names_the_examples_of_its_step(tmp_path):
    model = student("decoder-only").float()
    made, log = trainer(model, examples(3), tmp_path, batch_size=2, gradient_accumulation=2, max_steps=3)
    before = {name: weight.detach().clone() for name, weight in model.trained().items()}
    next(iter(model.trained().values())).register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(
        TrainingError, match=r"the gradient is not finite at step 1, on examples e\d, e\d, e\d; begin again in another --out"
    ):
        made.train()
    assert not log
    assert all(weight.equal(before[name]) for name, weight in model.trained().items())  # nobody validates or keeps a spoilt student


def on_a_gpu():
    raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("too_large", [on_a_gpu, lambda: torch.empty(10**15)])
def test_out_of_memory_says_which_settings_to_lower(too_large, tmp_path):
    model = student("decoder-only").float()
    made, _ = trainer(model, examples(2), tmp_path, batch_size=2, max_steps=3)
    model.register_forward_pre_hook(lambda *inputs: too_large())
    with pytest.raises(
        TrainingError, match=r"out of memory at step 1; go on with a lower train\.batch_size .*activation_checkpointing=true"
    ):
        made.go_on()


def test_another_error_of_torch_passes_as_it_is(tmp_path):
    model = student("decoder-only").float()
    made, _ = trainer(model, examples(2), tmp_path, batch_size=2, max_steps=3)
    model.register_forward_pre_hook(lambda *inputs: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="size"):
        made.go_on()


def save_tokenizer(weights, file):
    words = {f"w{i}": i for i in range(len(weights["w"]))}
    Tokenizer(models.WordLevel(words, unk_token="w0")).save(str(file))


@pytest.mark.parametrize("write", [save_file, torch.save, save_tokenizer])
def test_a_disk_that_is_full_is_told_and_leaves_what_was_there(write, tmp_path):
    with weights_directory(tmp_path / "kept") as folder:
        (folder / "before").touch()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, limits[1]))
    try:
        with (
            pytest.raises(StorageError, match=r"kept cannot be written: .*free some space"),
            weights_directory(tmp_path / "kept") as folder,
        ):
            write({"w": torch.zeros(40_000)}, folder / "weights")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [file.name for file in (tmp_path / "kept").iterdir()] == ["before"]
    assert len(list(tmp_path.iterdir())) == 1


def test_weights_for_which_there_is_no_room_leave_the_file_that_was_there(tmp_path):
    file = tmp_path / "kept.safetensors"
    write_weights({"w": torch.ones(4)}, file, metadata={"said": "a"})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, limits[1]))
    try:
        with pytest.raises(StorageError, match=r"kept\.safetensors.*free some space"):
            write_weights({"w": torch.zeros(40_000)}, file, metadata={})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert load_file(file)["w"].tolist() == [1.0] * 4
    assert list(tmp_path.iterdir()) == [file]


def test_other_steps_between_checkpoints_hold_from_the_next_start_on(tmp_path):
    def until(step):
        def stop(row):
            if row.step == step:
                raise InterruptedError

        return stop

    model = student("decoder-only").float()
    for every, step, expected in ((3, 5, [3]), (1, 6, [3, 4, 5])):
        made, _ = trainer(model, examples(8), tmp_path, batch_size=2, epochs=3, checkpoint_steps=every)
        made._on_row = until(step)
        with pytest.raises(InterruptedError):
            made.go_on()
        assert [int(found.name.removeprefix("checkpoint-")) for found in checkpoints(tmp_path)] == expected


@pytest.mark.parametrize(("name", "reason"), [("wandbb", "not supported"), ("wandb", "wandb")])
def test_reports_that_nobody_takes_are_refused_by_name(name, reason, tmp_path):
    with pytest.raises(TrainingError, match=rf"train\.report_to: {name}: .*{reason}"):
        arguments(TrainSettings(report_to=(name,)), tmp_path, seed=0)


def test_activation_checkpointing_keeps_less_and_changes_nothing(tmp_path):
    for kind in KINDS:
        folder = tmp_path / kind
        made = tiny_models.tiny_llama() if kind == "decoder-only" else tiny_models.tiny_t5()
        tiny_models.save_folder(made, tiny_models.tokenizer(appends_eos=kind == "encoder-decoder"), folder)
        batch, kept, found = collator(kind)(examples(4, 3)), [], []
        for checkpointing in (False, True):
            model, _ = load(folder, TrainSettings(activation_checkpointing=checkpointing), bf16=False)
            model.train()
            sizes = []
            with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t):
                loss = loss_of(model, batch)
            kept.append(sum(sizes))
            found.append(gradients(model, loss))
        assert kept[1] < 0.6 * kept[0]
        assert all(torch.allclose(found[0][name], gradient, atol=1e-6) for name, gradient in found[1].items())


def test_a_checkpoint_of_another_student_is_refused(tmp_path):
    trainer(student("decoder-only").float(), examples(4), tmp_path, batch_size=2, max_steps=2)[0].go_on()
    deeper, wider = student("decoder-only", layers=3).float(), student("decoder-only").float()
    wider.model.model.norm.weight = torch.nn.Parameter(torch.ones(33))
    for other in (deeper, wider):
        with pytest.raises(TrainingError, match=r"holds other weights than this student trains; remove .*checkpoint-2 to begin anew"):
            load_weights(other, tmp_path / "checkpoint-2" / WEIGHTS)


def test_killed_after_the_last_step_it_takes_the_weights_of_the_last_checkpoint_and_trains_no_further(tmp_path):
    first = student("decoder-only").float()
    trainer(first, examples(6), tmp_path, batch_size=2, epochs=1.5)[0].go_on()
    again = student("decoder-only").float()
    made, log = trainer(again, examples(6), tmp_path, batch_size=2, epochs=1.5)
    made.go_on()
    assert not log
    assert all(weight.equal(again.trained()[name]) for name, weight in first.trained().items())


def test_the_order_depends_on_seed_and_epoch_alone():
    lengths = [(n, 40 - n) for n in range(40)]
    sampler = LengthGrouped(lengths, 4, seed=1)
    first, again = list(sampler), list(sampler)
    torch.rand(7)
    assert first == again == list(LengthGrouped(lengths, 4, seed=1))
    sampler.set_epoch(1)
    assert list(sampler) != first
    assert sorted(sampler) == list(range(40))


def padding(sizes, order, batch_size):
    """All cells over those that hold a token, of both rows together."""
    batches = [[sizes[i] for i in order[k : k + batch_size]] for k in range(0, len(order), batch_size)]
    cells = sum(len(batch) * sum(map(max, zip(*batch, strict=True))) for batch in batches)
    return cells / sum(map(sum, sizes))


def test_both_lengths_of_an_encoder_decoder_are_grouped_and_every_epoch_has_other_batches():
    draw = torch.Generator().manual_seed(0)
    sides = [torch.randint(low, high, (800,), generator=draw).tolist() for low, high in ((20, 200), (6, 60))]
    sizes = list(zip(*sides, strict=True))
    sampler = LengthGrouped(sizes, 8, seed=0)
    order = list(sampler)
    assert sorted(order) == list(range(800))
    assert padding(sizes, order, 8) < 1.15 < 1.6 < padding(sizes, range(800), 8)
    sampler.set_epoch(1)
    again = list(sampler)
    first, second = ({frozenset(o[k : k + 8]) for k in range(0, 800, 8)} for o in (order, again))
    assert len(first & second) < 50  # of 100
    for found in (order, again):  # memory that does not suffice shows at once
        assert max(sum(sizes[i]) for i in found[:8]) == max(map(sum, sizes))


def test_the_order_is_filled_up_with_blanks_for_several_processes():
    assert list(LengthGrouped([(5, 1)] * 6, 4, seed=0, multiple_of=4))[6:] == [6, 6]
    assert len(LengthGrouped([(5, 1)] * 8, 4, seed=0, multiple_of=4)) == 8


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_blocks_and_embeddings_get_no_gradient_and_keep_no_activations(kind):
    model = student(kind)
    batch = collator(kind)(examples(2))

    def saved():
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            loss_of(model, batch)
        return sum(sizes)

    everything = saved()
    freeze_lowest(model, 1)
    assert saved() < 0.75 * everything
    found = gradients(model, loss_of(model, batch))
    assert found
    assert not [name for name in found if ".layers.0." in name or ".block.0." in name or "shared" in name or "embed" in name]


def test_freezing_every_layer_is_refused():
    with pytest.raises(TrainingError, match=r"train\.frozen_layers=2 leaves nothing to train: the student has 2 layers"):
        freeze_lowest(student("decoder-only"), 2)


def test_lora_trains_linear_layers_above_the_frozen_ones_and_merges_to_the_same_scores():
    model = student("decoder-only")
    freeze_lowest(model, 1)
    adapt(model, 4)
    trained = model.trained()
    assert trained
    assert all("lora_" in name and ".layers.1." in name for name in trained)
    with torch.no_grad():
        for weight in trained.values():
            weight.normal_(std=0.1)
    batch = collator("decoder-only")(examples(2))
    before = model(batch)
    merged = model.merged()
    model.model = merged
    assert torch.allclose(before, model(batch), atol=1e-6)


def test_bf16_scores_are_near_those_of_float32():
    model = student("decoder-only").float()
    batch = collator("decoder-only")(examples(4, 2))
    exact = loss_of(model, batch).item()
    model.bf16 = True
    rough = loss_of(model, batch).item()
    assert rough != exact
    assert rough == pytest.approx(exact, rel=0.02)


def test_a_model_of_absolute_positions_and_a_missing_folder_are_refused(tmp_path):
    from transformers import BartConfig, BartForConditionalGeneration

    tiny = {"d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8, "vocab_size": 94}
    bart = BartForConditionalGeneration(BartConfig(**tiny, encoder_attention_heads=1, decoder_attention_heads=1))
    tiny_models.save_folder(bart, tiny_models.tokenizer(appends_eos=True), tmp_path)
    with pytest.raises(TrainingError, match="encoder-decoder of type bart, whose absolute positions"):
        load(tmp_path, TrainSettings(), bf16=False)
    with pytest.raises(TrainingError, match=r"student\.model: cannot load"):
        load(tmp_path / "nothing", TrainSettings(), bf16=False)


def test_damaged_weights_and_a_t5_without_a_start_token_are_refused(tmp_path):
    torn = tiny_models.save_folder(tiny_models.tiny_llama(), tiny_models.tokenizer(appends_eos=False), tmp_path / "torn")
    (torn / "model.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(TrainingError, match=r"student\.model: cannot load"):
        load(torn, TrainSettings(), bf16=False)
    t5 = tiny_models.save_folder(tiny_models.tiny_t5(), tiny_models.tokenizer(appends_eos=True), tmp_path / "t5")
    config = json.loads((t5 / "config.json").read_text())
    del config["decoder_start_token_id"]
    (t5 / "config.json").write_text(json.dumps(config))
    with pytest.raises(TrainingError, match=r"has no decoder_start_token_id, with which every answer begins"):
        load(t5, TrainSettings(), bf16=False)


def test_apple_processors_compute_in_float32():
    assert not native_bf16(torch.device("mps"))


def test_a_checkpoint_goes_although_a_process_with_the_same_pid_in_another_container_was_killed_while_removing_it(tmp_path):
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / f".checkpoint-1.{os.getpid()}.tmp" / "half").mkdir(parents=True)
    remove_checkpoint(tmp_path / "checkpoint-1")
    assert checkpoints(tmp_path) == []
