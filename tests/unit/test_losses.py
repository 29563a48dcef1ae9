"""The ORPO loss against closed forms and NumPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from student_trainer.training.losses import log1mexp, log_odds, odds_ratio_loss, score, token_logps


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


def scores():
    """Response 0 (chosen): mean log 1/2; response 1 (rejected): mean log 1/5; response 2 (chosen, in no pair): 3 tokens of log 1/4."""
    logps = torch.tensor([0.5, 0.5, 0.2, 0.25, 0.25, 0.25], dtype=torch.float64).log()
    return score(logps, torch.tensor([0, 0, 1, 2, 2, 2]), torch.tensor([True, False, True]), torch.tensor([[0, 1]]))


def test_the_loss_is_the_mean_over_chosen_tokens_plus_lambda_times_the_mean_over_pairs():
    nll = (2 * math.log(2) + 3 * math.log(4)) / 5
    assert scores().loss(0.0, chosen_tokens=5, pairs=1).item() == pytest.approx(nll)
    assert scores().loss(0.1, chosen_tokens=5, pairs=1).item() == pytest.approx(nll + 0.1 * math.log(1.25))


def test_the_denominators_are_the_callers_so_that_micro_batches_add_up():
    assert scores().loss(0.1, chosen_tokens=10, pairs=2).item() == pytest.approx(scores().loss(0.1, chosen_tokens=5, pairs=1).item() / 2)


def test_without_pairs_the_loss_is_the_negative_log_likelihood_alone():
    logps = torch.tensor([0.5, 0.5]).log()
    alone = score(logps, torch.tensor([0, 0]), torch.tensor([True]), torch.empty(0, 2, dtype=torch.int64))
    assert alone.loss(0.1, chosen_tokens=2, pairs=0).item() == pytest.approx(math.log(2))
