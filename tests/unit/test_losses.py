"""The ORPO loss against closed forms and NumPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from student_trainer.training.collate import Collator
from student_trainer.training.losses import (
    Counts,
    Terms,
    Weights,
    log1mexp,
    log_odds,
    odds_ratio_loss,
    prefix_tree_kl,
    sequence_kl,
    terms,
    token_kl,
    token_logps,
)
from student_trainer.training.packing import Packed


def test_log_odds_of_an_even_chance_is_zero_and_of_a_fifth_is_minus_log_4():
    odds = log_odds(torch.tensor([0.5, 0.2], dtype=torch.float64).log())
    assert odds.tolist() == pytest.approx([0.0, -math.log(4)], abs=1e-12)


def test_equal_responses_cost_log_2_and_a_worse_chosen_one_costs_more():
    even = torch.tensor([0.5], dtype=torch.float64).log()
    fifth = torch.tensor([0.2], dtype=torch.float64).log()
    assert odds_ratio_loss(even, even).item() == pytest.approx(math.log(2))
    assert odds_ratio_loss(even, fifth).item() == pytest.approx(math.log(1 + 1 / 4))  # odds 1 against 1/4
    assert odds_ratio_loss(fifth, even).item() == pytest.approx(math.log(1 + 4))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-12)])
def test_log1mexp_is_exact_from_minus_40_to_minus_1e_5(dtype, tolerance):
    x = torch.tensor([-1e-5, -1e-3, -0.1, -0.6931, -0.6932, -1.0, -5.0, -40.0], dtype=dtype)
    expected = np.log(-np.expm1(x.double().numpy()))
    assert np.allclose(log1mexp(x).double().numpy(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("logp", [0.0, -1e-9, -2e-8, -6e-8, 1e-7, -100.0])
def test_gradients_are_finite_when_a_response_becomes_certain_or_impossible(logp):
    certain = torch.tensor([logp], requires_grad=True)
    other = torch.tensor([-2.0], requires_grad=True)
    loss = (odds_ratio_loss(certain, other) + odds_ratio_loss(other, certain)).sum()
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(certain.grad).all()
    assert torch.isfinite(other.grad).all()


def test_the_gradient_of_the_odds_ratio_loss_is_its_numerical_derivative():
    chosen = torch.tensor([-0.3, -1.2, -3.0], dtype=torch.float64, requires_grad=True)
    rejected = torch.tensor([-0.9, -0.2, -3.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(odds_ratio_loss, (chosen, rejected))


def test_token_logps_of_bfloat16_logits_are_computed_in_float32():
    logits = torch.randn(5, 1000).bfloat16()
    labels = torch.arange(5)
    expected = F.log_softmax(logits.double(), -1)[labels, labels]
    assert token_logps(logits, labels).dtype == torch.float32
    assert torch.allclose(token_logps(logits, labels).double(), expected, atol=1e-5)


LABELS = torch.tensor([0, 0, 1, 2, 2, 2])


def logits(*probabilities):
    """(T, V) float64 logits of these rows of probabilities."""
    return torch.tensor(probabilities, dtype=torch.float64).log()


def batch(**changes):
    """Response 0 (chosen, weight 1): two tokens; response 1 (rejected): one; response 2 (chosen, weight 1/2, in no pair): three."""
    given = {
        "labels": LABELS,
        "response": torch.tensor([0, 0, 1, 2, 2, 2]),
        "weights": torch.tensor([1.0, 0.0, 0.5]),
        "shares": torch.zeros(3),
        "chosen": torch.tensor([0, 1, 3, 4, 5]),
        "pairs": torch.tensor([[0, 1]]),
    }
    return {**given, **changes}


HALF, FIFTH, QUARTER = (0.5, 0.25, 0.25), (0.6, 0.2, 0.2), (0.5, 0.25, 0.25)
GIVEN = logits(HALF, HALF, FIFTH, QUARTER, QUARTER, QUARTER)
COUNTS = Counts(chosen_tokens=3.5, pairs=1.0, prompts=0.0)


def test_the_loss_is_the_weighted_mean_over_chosen_tokens_plus_lambda_times_the_mean_over_pairs():
    nll = (2 * math.log(2) + 0.5 * 3 * math.log(4)) / 3.5
    found = terms(GIVEN, batch(), Weights())
    assert found.loss(Weights(orpo_lambda=0.0), COUNTS).item() == pytest.approx(nll)
    assert found.loss(Weights(orpo_lambda=0.1), COUNTS).item() == pytest.approx(nll + 0.1 * math.log(1.25))


def test_the_denominators_are_the_callers_so_that_micro_batches_add_up():
    found = terms(GIVEN, batch(), Weights())
    twice = Counts(chosen_tokens=7.0, pairs=2.0, prompts=0.0)
    assert found.loss(Weights(), twice).item() == pytest.approx(found.loss(Weights(), COUNTS).item() / 2)


def test_without_pairs_the_loss_is_the_negative_log_likelihood_alone():
    alone = terms(GIVEN, batch(pairs=torch.empty(0, 2, dtype=torch.int64)), Weights())
    assert alone.loss(Weights(), Counts(3.5, 0.0, 0.0)).item() == pytest.approx((2 * math.log(2) + 1.5 * math.log(4)) / 3.5)


def test_kl_to_the_reference_is_exact_over_the_vocabulary_and_zero_at_the_reference():
    even = torch.tensor([[0.5, 0.5, 0.0]], dtype=torch.float64).clamp(min=1e-300).log()
    skewed = torch.tensor([[0.25, 0.75, 0.0]], dtype=torch.float64).clamp(min=1e-300).log()
    assert token_kl(even, skewed).item() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    assert token_kl(even, even).item() == 0.0


def test_kl_to_the_reference_counts_chosen_tokens_by_their_weight():
    other = logits(FIFTH, HALF, FIFTH, QUARTER, QUARTER)
    found = terms(GIVEN, batch(), Weights(kl_reference=1.0), reference=other)
    one = sum(p * math.log(p / q) for p, q in zip(HALF, FIFTH, strict=True))
    assert found.kl_reference.item() == pytest.approx(one + 0.5 * one)  # the rejected token is not in it


def test_each_kl_term_is_in_the_loss_by_its_weight_and_its_own_denominator():
    zero = torch.zeros((), dtype=torch.float64)
    kl = {"kl_reference": zero + 3, "kl_teacher_sequence": zero + 5, "kl_teacher_token": zero + 7}
    found = Terms(nll=zero, odds_ratio=zero, chosen=zero, rejected=zero, **kl)
    weights = Weights(orpo_lambda=0.0, kl_reference=0.1, kl_teacher_sequence=0.2, kl_teacher_token=0.3)
    expected = 0.1 * 3 / 6 + 0.2 * 5 / 2 + 0.3 * 7 / 2
    assert found.loss(weights, Counts(chosen_tokens=6, pairs=0, prompts=2)).item() == pytest.approx(expected)


def test_kl_to_the_samples_is_their_nll_less_their_entropy_and_zero_when_the_student_says_just_that():
    sums = torch.tensor([0.3, 0.9, 0.7], dtype=torch.float64).log()
    shares = torch.tensor([0.75, 0.0, 0.25], dtype=torch.float64)
    expected = 0.75 * math.log(0.75 / 0.3) + 0.25 * math.log(0.25 / 0.7)
    assert sequence_kl(sums, shares).item() == pytest.approx(expected)
    assert sequence_kl(shares.clamp(min=1e-9).log(), shares).item() == pytest.approx(0.0, abs=1e-12)


def tree(responses, counts, *, weights=None, seed=0, vocabulary=7):
    """Random logits for these responses of one prompt, alike where branches share a prefix, and a batch with their prefix tree."""
    draw = torch.Generator().manual_seed(seed)
    rows = [Packed("a", (5,), tuple(responses), tuple(weights or [0.0] * len(responses)), tuple(counts), ())]
    made = Collator("decoder-only", pad_token_id=0, with_samples=True)(rows)
    node = {}
    found = []
    for ids in responses:
        for length in range(len(ids)):
            found.append(node.setdefault(ids[:length], torch.randn(vocabulary, generator=draw, dtype=torch.float64)))
    return torch.stack(found).requires_grad_(), made


RESPONSES, SAID = [(1, 2, 3), (1, 2, 4), (1, 5), (6,)], [3, 1, 2, 2]


def test_the_prefix_trees_kl_without_smoothing_is_the_kl_over_whole_answers():
    given, made = tree(RESPONSES, SAID)
    whole = terms(given, made, Weights(kl_teacher_sequence=1.0)).kl_teacher_sequence
    assert prefix_tree_kl(given, made, 0.0).item() == pytest.approx(whole.item(), abs=1e-6)


def test_the_prefix_trees_kl_with_one_sample_is_label_smoothing():
    given, made = tree([(1, 2, 3)], [1])
    epsilon = 0.5 / 1.5  # a / (1 + a)
    cross_entropy = F.cross_entropy(given, torch.tensor([1, 2, 3]), label_smoothing=epsilon, reduction="sum")
    q = torch.full((7,), epsilon / 7, dtype=torch.float64)
    q[0] += 1 - epsilon
    entropy = -(q * q.log()).sum()
    assert prefix_tree_kl(given, made, 0.5).item() == pytest.approx((cross_entropy - 3 * entropy).item(), abs=1e-6)


def test_the_prefix_trees_kl_equals_its_definition_node_by_node():
    given, made = tree(RESPONSES, SAID)
    a, size, total = 0.3, 7, sum(SAID)
    expected, at = 0.0, 0
    for ids, count in zip(RESPONSES, SAID, strict=True):
        for length in range(len(ids)):
            follows = [0.0] * size
            for other, times in zip(RESPONSES, SAID, strict=True):
                if other[:length] == ids[:length] and len(other) > length:
                    follows[other[length]] += times
            q = (torch.tensor(follows, dtype=torch.float64) + a / size) / (sum(follows) + a)
            expected += count / total * (q * (q.log() - given[at].log_softmax(-1))).sum().item()
            at += 1
    assert prefix_tree_kl(given, made, a).item() == pytest.approx(expected, abs=1e-6)
    assert torch.autograd.gradcheck(lambda x: prefix_tree_kl(x, made, a), (given,))


def test_a_chosen_response_that_the_teacher_never_said_adds_nothing_to_its_kl():
    given, made = tree([*RESPONSES, (2, 2)], [*SAID, 0], weights=[0.0, 0.0, 0.0, 0.0, 1.0])
    alone, without = tree(RESPONSES, SAID)
    assert len(given) == len(alone) + 2
    for a in (0.0, 1.0):
        assert prefix_tree_kl(given, made, a).item() == pytest.approx(prefix_tree_kl(alone, without, a).item())


def test_samples_of_a_known_teacher_at_temperature_1_give_its_cross_entropy_without_bias():
    teacher = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    student = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    draws = torch.multinomial(teacher.expand(20_000, 3), 4, replacement=True, generator=torch.Generator().manual_seed(0))
    shares = F.one_hot(draws, 3).double().mean(1)
    estimated = torch.stack([sequence_kl(student.log(), share) + torch.special.entr(share).sum() for share in shares[:4000]]).mean()
    assert estimated.item() == pytest.approx(-(teacher * student.log()).sum().item(), abs=0.01)
