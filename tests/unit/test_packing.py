"""Packed rows: layout, masks, census, and that they score exactly as single rows do."""

from __future__ import annotations

import numpy as np
import pytest
import tiny_models
import torch
import transformers
from tiny_models import KINDS, collator, examples, gradients, loss_of, packed, student

from shared.contracts import Response, Triplet
from shared.errors import TrainingError
from student_trainer.training.collate import blank, cells, denominators, visible
from student_trainer.training.losses import Counts, Weights, terms
from student_trainer.training.packing import Packer, group, samples_by_example
from student_trainer.training.student import Student, refuse_unless_packable, tell_truth_about_tying, turn_dropout_off


def triplet(example_id="a", prompt="w1 w2", chosen="w3 w4", rejected="w5", **other):
    scores = {"chosen_source": "teacher", "rejected_source": "student", "chosen_score": 1.0, "rejected_score": 0.0}
    return Triplet(example_id=example_id, prompt=prompt, chosen=chosen, rejected=rejected, **scores, **other)


def packer(kind="decoder-only", **limits):
    tokenizer = tiny_models.tokenizer(appends_eos=kind == "encoder-decoder", chat=kind == "decoder-only")
    return Packer(tokenizer, kind, **{"max_prompt_tokens": 64, "max_response_tokens": 16, **limits})


def logits_of(student, prompt, response):
    """(tokens, vocabulary) of one response alone, through the model's own forward: no packing, no gathering."""
    if student.kind == "decoder-only":
        return student.model(input_ids=torch.tensor([[*prompt, *response[:-1]]])).logits[0, len(prompt) - 1 :]
    return student.model(input_ids=torch.tensor([prompt]), decoder_input_ids=torch.tensor([[tiny_models.PAD, *response[:-1]]])).logits[0]


def numpy_logps(student, prompt, response):
    """(tokens,) float64: log-softmax written out."""
    with torch.no_grad():
        logits = logits_of(student, prompt, response).double().numpy()
    logits = logits - logits.max(-1, keepdims=True)
    return (logits - np.log(np.exp(logits).sum(-1, keepdims=True)))[np.arange(len(response)), response]


def numpy_loss(student, rows, orpo_lambda=0.1):
    """The paper's loss, one response at a time; several chosen are weighted."""
    nll = tokens = ratios = pair_weights = 0.0
    for row in rows:
        logps = [numpy_logps(student, row.prompt, ids) for ids in row.responses]
        nll -= sum(w * logp.sum() for w, logp in zip(row.weights, logps, strict=True))
        tokens += sum(w * len(logp) for w, logp in zip(row.weights, logps, strict=True))
        for c, r in row.pairs:
            odds = [m - np.log(1 - np.exp(m)) for m in (logps[c].mean(), logps[r].mean())]
            ratios += row.weights[c] * np.log(1 + np.exp(odds[1] - odds[0]))
            pair_weights += row.weights[c]
    return nll / tokens + orpo_lambda * ratios / pair_weights


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rejected", "chosen"), [(1, 1), (3, 1), (2, 2)])
def test_packed_loss_equals_numpy_one_response_at_a_time(kind, rejected, chosen):
    model, rows = student(kind), examples(5, rejected, chosen=chosen)
    assert loss_of(model, collator(kind)(rows)).item() == pytest.approx(numpy_loss(model, rows), abs=1e-5)


def test_several_chosen_count_by_their_weights():
    model = student("decoder-only")
    one, two, worse = (20, 21), (30, 31, 32), (40,)
    weighted = [packed("a", (10, 11), [one, two], [worse], weights=[0.75, 0.25])]
    assert loss_of(model, collator("decoder-only")(weighted)).item() == pytest.approx(numpy_loss(model, weighted), abs=1e-6)
    alone = loss_of(model, collator("decoder-only")([packed("a", (10, 11), [one], [worse])])).item()
    nearly = [packed("a", (10, 11), [one, two], [worse], weights=[1.0, 1e-12])]
    assert loss_of(model, collator("decoder-only")(nearly)).item() == pytest.approx(alone, abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_gradients_equal_unpacked_gradients(kind):
    model, rows = student(kind), examples(4, 3)
    found = gradients(model, loss_of(model, collator(kind)(rows)))
    batch = collator(kind)(rows)
    logits = torch.cat([logits_of(model, row.prompt, ids) for row in rows for ids in row.responses])
    unpacked = gradients(model, terms(logits, batch, Weights()).loss(Weights(), denominators(batch)))
    assert found.keys() == unpacked.keys()
    for name, gradient in found.items():
        assert torch.allclose(gradient, unpacked[name], atol=1e-6, rtol=1e-4), name  # norms round to float32 inside


@pytest.mark.parametrize("kind", KINDS)
def test_neighbours_in_a_batch_change_nothing_though_they_bring_padding(kind):
    model, rows = student(kind), examples(6, 2)
    together = model(collator(kind)(rows))
    alone = torch.cat([model(collator(kind)([row])) for row in rows])
    assert torch.allclose(together, alone, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_lambda_zero_lays_out_only_the_chosen_responses_and_gives_their_nll(kind):
    model, rows = student(kind), examples(4, 3)
    batch = collator(kind, with_rejected=False)(rows)
    assert batch["weights"].tolist() == [1.0] * 4
    assert len(batch["labels"]) == sum(len(row.responses[0]) for row in rows)
    assert loss_of(model, batch, Weights(orpo_lambda=0.0)).item() == pytest.approx(numpy_loss(model, rows, 0.0), abs=1e-5)


def test_the_first_token_of_every_branch_is_predicted_at_the_end_of_the_prompt():
    batch = collator("decoder-only")([packed("a", (10, 11, 12), [(20, 21)], [(30, 31, 32), (40,)])])
    assert batch["input_ids"].tolist() == [[10, 11, 12, 20, 30, 31]]  # no branch needs its last token as input
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 3, 4]]
    assert batch["segments"].tolist() == [[0, 0, 0, 1, 2, 2]]
    assert batch["labels"].tolist() == [20, 21, 30, 31, 32, 40]
    assert batch["columns"].tolist() == [2, 3, 2, 4, 5, 2]


def test_encoder_decoder_responses_start_with_the_start_token_each():
    batch = collator("encoder-decoder")([packed("a", (10, 11), [(20, 21)], [(30,)])])
    assert batch["decoder_input_ids"].tolist() == [[0, 20, 0]]
    assert batch["labels"].tolist() == [20, 21, 30]
    assert batch["segments"].tolist() == [[1, 1, 2]]


def test_a_branch_sees_the_prompt_and_itself_but_no_other_branch_and_nothing_ahead():
    seen = visible(torch.tensor([[0, 0, 1, 2, 2, -1]]))[0, 0].int().tolist()
    assert seen[:5] == [[1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0], [1, 1, 0, 1, 0, 0], [1, 1, 0, 1, 1, 0]]
    assert any(seen[5])  # a softmax over nothing would be NaN


def test_cells_counts_tokens_and_padding():
    rows = [packed("a", (10, 11, 12), [(20,)], [(30,)]), packed("b", (10,), [(20,)], [(30,)])]
    assert cells(collator("decoder-only")(rows)) == (4, 6)
    assert cells(collator("encoder-decoder")(rows)) == (8, 10)


def test_an_architecture_that_ignores_the_mask_is_refused():
    class Leaky(Student):
        def _continue(self, batch):
            return self.model.get_decoder()(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).last_hidden_state

    rows = examples(1, 2)
    refuse_unless_packable(student("decoder-only"), collator("decoder-only"), rows[0])
    with pytest.raises(TrainingError, match=r"student\.model: a llama model scores packed rows differently"):
        refuse_unless_packable(Leaky(student("decoder-only").model, "decoder-only"), collator("decoder-only"), rows[0])


GROUPED = {"num_key_value_heads": 2}
DECODERS = {
    "Qwen2": GROUPED,
    "Qwen3": {**GROUPED, "head_dim": 8},
    "Mistral": {**GROUPED, "sliding_window": None},
    "Gemma": {**GROUPED, "head_dim": 8},
    "Phi3": GROUPED,
    "Olmo2": GROUPED,
    "SmolLM3": GROUPED,
    "GPTNeoX": {},
}


def decoder(name, **changes):
    """A tiny model of that architecture."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.3}
    tokens = {"vocab_size": tiny_models.VOCABULARY, "pad_token_id": 0, "bos_token_id": 3, "eos_token_id": 1}
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**sizes, **tokens, max_position_embeddings=256, **changes)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").double()
    turn_dropout_off(model)
    return Student(model, "decoder-only")


@pytest.mark.parametrize("name", DECODERS)
def test_decoder_only_models_that_take_masks_and_positions_are_packed_exactly(name):
    model, rows = decoder(name, **DECODERS[name]), examples(3, 2)
    refuse_unless_packable(model, collator("decoder-only"), rows[0])
    assert loss_of(model, collator("decoder-only")(rows)).item() == pytest.approx(numpy_loss(model, rows), abs=1e-5)


@pytest.mark.parametrize(("name", "changes"), [("Mistral", {**GROUPED, "sliding_window": 8}), ("Granite", {"logits_scaling": 2.0})])
def test_models_that_window_their_attention_or_scale_their_logits_are_refused_with_the_reason(name, changes):
    longest = max(examples(5, 2), key=lambda row: row.length)
    with pytest.raises(TrainingError, match=rf"a {name.lower()} model scores packed rows differently from single ones \(by \d"):
        refuse_unless_packable(decoder(name, **changes), collator("decoder-only"), longest)


@pytest.mark.parametrize("name", ["T5", "MT5", "UMT5"])
@pytest.mark.parametrize("tied", [True, False])
def test_t5_and_its_relatives_are_packed_exactly_whether_or_not_their_head_is_tied(name, tied):
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": tiny_models.VOCABULARY}
    tokens = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1, "tie_word_embeddings": tied}
    torch.manual_seed(0)
    model = transformers.AutoModelForSeq2SeqLM.from_config(getattr(transformers, f"{name}Config")(**sizes, **tokens)).double()
    if not tied:
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight) * 0.3)
    turn_dropout_off(model)
    tell_truth_about_tying(model)
    made, rows = Student(model, "encoder-decoder"), examples(3, 2)
    assert loss_of(made, collator("encoder-decoder")(rows)).item() == pytest.approx(numpy_loss(made, rows), abs=1e-5)


def test_tie_weights_leaves_a_t5_head_of_its_own_alone(tmp_path):
    model = tiny_models.tiny_t5().eval()
    model.config.tie_word_embeddings = True  # what transformers 5 says of every T5
    ids = torch.tensor([[5, 6, 7]])
    before = model(input_ids=ids, labels=ids).logits
    tell_truth_about_tying(model)
    model.tie_weights()
    assert torch.equal(before, model(input_ids=ids, labels=ids).logits)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.allclose(before, again(input_ids=ids, labels=ids).logits, atol=1e-5)


def test_two_passes_in_training_mode_agree_once_dropout_is_off():
    model = student("encoder-decoder", dropout=0.5).train()
    batch = collator("encoder-decoder")(examples(3))
    assert torch.equal(model(batch), model(batch))
    loud = Student(tiny_models.tiny_t5(dropout=0.5).train(), "encoder-decoder")
    assert not torch.equal(loud(batch), loud(batch))  # the test can fail


def test_triplets_of_one_example_share_a_row_with_each_text_once():
    grouped = group([triplet(rejected="w5"), triplet(rejected="w6"), triplet("b"), triplet(rejected="w5", chosen="w7")])
    assert [g.example_id for g in grouped] == ["a", "b"]
    assert grouped[0].responses == ("w3 w4", "w7", "w5", "w6")
    assert grouped[0].weights == (0.5, 0.5, 0.0, 0.0)
    assert grouped[0].pairs == ((0, 2), (0, 3), (1, 2))


def test_weights_of_the_chosen_are_relative_and_add_up_to_one():
    (grouped,) = group([triplet(chosen_weight=0.6), triplet(chosen="w7", chosen_weight=0.2)])
    assert grouped.weights == (pytest.approx(0.75), pytest.approx(0.25), 0.0)


def answer(sample, text, **other):
    given = {"key": "k", "example_id": "a", "status": "ok", "finish_reason": "stop", "model": "t", "latency_s": 0, "attempts": 1}
    return Response(**{**given, "sample": sample, "text": text, "received_at": "2026-01-01", **other})


def test_the_teachers_whole_answers_are_counted_beside_the_pairs():
    rows = [answer(0, "w3 w4"), answer(1, " w3 w4 "), answer(2, "w8"), answer(3, "w9 w9", finish_reason="length"), answer(4, " ")]
    said = samples_by_example([*rows, answer(2, "w5")])  # asked again: the last row counts
    (grouped,) = group([triplet()], said)
    assert grouped.responses == ("w3 w4", "w5")
    assert grouped.counts == (2, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_blank_adds_nothing_to_the_loss_and_to_no_gradient(kind):
    model, rows = student(kind), examples(3, 2)
    alone, filled = collator(kind)(rows), collator(kind)([*rows, blank(rows[0])])
    assert denominators(filled) == denominators(alone)
    assert loss_of(model, filled).item() == pytest.approx(loss_of(model, alone).item(), abs=1e-9)
    found, expected = gradients(model, loss_of(model, filled)), gradients(model, loss_of(model, alone))
    assert all(torch.allclose(found[name], gradient, atol=1e-9) for name, gradient in expected.items())
    only = collator(kind)([blank(rows[0])])
    assert denominators(only) == Counts(chosen_tokens=0.0, pairs=0.0, prompts=0.0)
    assert loss_of(model, only).item() == 0.0


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "empty: nothing to train on"),
        ([triplet("a"), triplet("b", rejected="w3 w4")], "chosen equals rejected.* in b;"),
        ([triplet(), triplet(prompt="w9")], "different prompts: a;"),
    ],
)
def test_triplets_that_cannot_be_trained_on_are_refused_by_name(rows, message):
    with pytest.raises(TrainingError, match=message):
        group(rows)


def test_a_chat_prompt_is_rendered_by_the_template_and_a_t5_prompt_ends_with_eos():
    chat, _ = packer("decoder-only").pack(group([triplet()]))
    assert chat[0].prompt == (tiny_models.BOS, 5, 6, tiny_models.EOS, tiny_models.BOS)
    plain, _ = packer("encoder-decoder").pack(group([triplet()]))
    assert plain[0].prompt == (5, 6, tiny_models.EOS)


def test_a_question_that_spells_marks_of_the_template_ends_no_turn_and_begins_none():
    plain, spelling = (packer("decoder-only").prompt(text) for text in ("w1 w2 w3", "w1 </s> <s> w2 w3"))
    marks = (tiny_models.BOS, tiny_models.EOS)
    assert [i for i in spelling if i in marks] == [i for i in plain if i in marks]


def test_only_responses_that_were_not_cut_end_with_eos():
    rows, census = packer(max_response_tokens=3).pack(group([triplet(chosen="w1 w2", rejected="w1 w2 w3 w4")]))
    assert rows[0].responses == ((5, 6, tiny_models.EOS), (5, 6, 7))
    assert census.cut_responses == 1


def test_a_rejected_answer_that_the_token_limit_cut_off_has_no_end_but_for_what_others_have_said():
    cut = triplet(chosen="w1 w2", rejected="w3 w4", rejected_cut_off=True)
    assert packer().pack(group([cut]))[0][0].responses == ((5, 6, tiny_models.EOS), (7, 8))
    # what is chosen for the same prompt, or was said whole by the teacher, has its end
    chosen = triplet(chosen="w3 w4", rejected="w9")
    assert packer().pack(group([cut, chosen]))[0][0].responses[1] == (7, 8, tiny_models.EOS)
    said = samples_by_example([answer(0, "w3 w4")])
    assert packer().pack(group([cut], said))[0][0].responses[1] == (7, 8, tiny_models.EOS)


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_scores_chosen_responses_alone_and_as_among_the_others(kind):
    rows = [*examples(3, 2, chosen=2), blank(examples(1)[0])]
    batch = collator(kind, with_reference=True)(rows)
    alone, model = batch["reference"], student(kind)
    assert cells(alone)[0] < cells(batch)[0]
    assert len(batch["chosen"]) == sum(len(ids) for row in rows[:3] for ids in row.responses[:2])
    assert batch["labels"][batch["chosen"]].equal(alone["labels"][alone["chosen"]])
    with torch.no_grad():
        assert torch.allclose(model(batch)[batch["chosen"]], model(alone)[alone["chosen"]], atol=1e-9)


def test_the_census_accounts_for_every_triplet():
    given = [triplet("a"), triplet("long", prompt=" ".join(["w1"] * 70)), triplet("b", chosen="w1 w2 w3", rejected="w1 w2 w4")]
    rows, census = packer(max_response_tokens=2).pack(group(given))
    assert census.dropped == {"prompt_too_long": 1, "equal_after_cut": 1}
    assert census.pairs + sum(census.dropped.values()) == census.triplets == len(given)
    assert [r.example_id for r in rows] == ["a"]


def test_responses_that_the_cut_makes_equal_become_one_with_the_weights_and_counts_of_both():
    given = [
        triplet(chosen="w1 w2 w3", rejected="w9", chosen_weight=0.6),
        triplet(chosen="w1 w2 w4", rejected="w9", chosen_weight=0.2),
        triplet(chosen="w7", rejected="w1 w2 w5", chosen_weight=0.2),  # cut, it is what is chosen elsewhere
        triplet(chosen="w7", rejected="w9", chosen_weight=0.2),
    ]
    said = samples_by_example([answer(0, "w1 w2 w3"), answer(1, "w1 w2 w4"), answer(2, "w8")])
    (row,), census = packer(max_response_tokens=2).pack(group(given, said))
    assert row.responses == ((5, 6), (11, tiny_models.EOS), (13, tiny_models.EOS), (12, tiny_models.EOS))
    assert row.weights == (pytest.approx(0.8), pytest.approx(0.2), 0.0, 0.0)
    assert row.counts == (2, 0, 0, 1)
    assert row.pairs == ((0, 2), (1, 2))
    assert (census.pairs, census.dropped["equal_after_cut"], census.triplets) == (2, 2, 4)


def test_when_every_prompt_is_too_long_the_setting_is_named():
    with pytest.raises(TrainingError, match=r"train\.max_prompt_tokens=8"):
        packer(max_prompt_tokens=8).pack(group([triplet(prompt=" ".join(["w1"] * 20))]))


def test_a_tokenizer_without_end_of_sequence_is_refused():
    tokenizer = tiny_models.tokenizer(appends_eos=False)
    tokenizer.eos_token = None
    with pytest.raises(TrainingError, match="no end-of-sequence token"):
        Packer(tokenizer, "decoder-only", max_prompt_tokens=8, max_response_tokens=8)
