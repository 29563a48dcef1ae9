"""ROUGE and BLEU on numbers that can be checked by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from evaluator.metrics.bleu import bleu, bleu_counts, bleu_of_counts
from evaluator.metrics.rouge import rouge_l, rouge_rows, words

TEXTS = st.lists(st.sampled_from(["the", "cat", "cats", "treatment", "treatments", "of", "?"]), max_size=9).map(" ".join)


def test_two_of_three_words_in_order_are_two_thirds_and_one_of_two_pairs_is_a_half():
    scores = rouge_rows(["the cat sat"], ["the cat ran"])
    assert scores["rouge1"][0] == pytest.approx(2 / 3)
    assert scores["rouge2"][0] == pytest.approx(1 / 2)
    assert scores["rougeL"][0] == pytest.approx(2 / 3)


def test_the_reversed_reference_has_every_word_but_only_one_in_order():
    scores = rouge_rows(["four three two one"], ["one two three four"])
    assert (scores["rouge1"][0], scores["rouge2"][0], scores["rougeL"][0]) == pytest.approx((1.0, 0.0, 0.25))


def test_inflected_words_count_as_the_same_word():
    assert rouge_rows(["treatments for rashes"], ["treatment for rash"])["rougeL"][0] == pytest.approx(1.0)


def test_f1_of_a_short_answer_is_between_its_precision_of_one_and_its_recall_of_a_quarter():
    assert rouge_rows(["gout"], ["what causes gout attacks"])["rouge1"][0] == pytest.approx(2 * 1 * 0.25 / 1.25)


@pytest.mark.parametrize("text", ["", "   ", "?!"])
def test_an_answer_without_words_scores_zero_in_every_rouge(text):
    assert all(values[0] == 0.0 for values in rouge_rows([text], ["what causes gout?"]).values())


@given(TEXTS, TEXTS)
@settings(max_examples=200, deadline=None)
def test_rouge_l_of_words_is_the_packages_own_number_and_symmetric(first, second):
    expected = RougeScorer(["rougeL"], use_stemmer=True).score(first, second)["rougeL"].fmeasure
    assert rouge_l(words(first), words(second)) == pytest.approx(expected)
    assert rouge_l(words(second), words(first)) == pytest.approx(expected)


def test_bleu_is_the_geometric_mean_of_five_sixths_three_fifths_a_half_and_a_third():
    assert bleu(["the cat sat on the mat"], ["the cat sat on a mat"]) == pytest.approx((5 / 6 * 3 / 5 * 1 / 2 * 1 / 3) ** 0.25)


def test_an_exact_answer_half_as_long_as_its_reference_is_cut_by_e_to_the_minus_one():
    assert bleu(["a b c d"], ["a b c d e f g h"]) == pytest.approx(math.exp(-1))


def test_orders_that_match_nowhere_count_a_tenth_of_a_match():
    assert bleu(["a b"], ["a c"]) == pytest.approx((1 / 2 * 0.1 * 0.1 * 0.1) ** 0.25)


def test_bleu_ignores_case_and_takes_signs_as_words_of_their_own():
    assert bleu(["What IS gout?"], ["what is gout ?"]) == pytest.approx(1.0)


def test_bleu_of_no_matching_word_and_of_empty_answers_is_zero():
    assert bleu(["x y z w"], ["a b c d"]) == 0.0
    assert bleu(["", ""], ["a b c d", "e f"]) == 0.0


@given(st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=6))
@settings(max_examples=200, deadline=None)
def test_summed_row_counts_give_the_same_bleu_as_nltk_on_the_whole_corpus(rows):
    counts = np.stack([bleu_counts(ours, theirs) for ours, theirs in rows])
    ours, theirs = zip(*rows, strict=True)
    assert float(bleu_of_counts(counts.sum(axis=0))) == pytest.approx(bleu(ours, theirs), abs=1e-12)
