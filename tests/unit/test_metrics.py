"""ROUGE and BLEU on numbers that can be checked by hand."""

from __future__ import annotations

import math

import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from evaluator.metrics import corpus
from evaluator.metrics.bleu import bleu, bleu_counts, bleu_of_counts
from evaluator.metrics.metric import Answered
from evaluator.metrics.rouge import rouge_l, rouge_rows, words
from evaluator.metrics.table import MAIN, METRICS
from evaluator.scores import distinct
from shared.datasets.load import load
from shared.settings import DatasetSettings

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
    ours, theirs = zip(*rows, strict=True)
    assert float(bleu_of_counts(bleu_counts(ours, theirs).sum(axis=0), len(rows))) == pytest.approx(bleu(ours, theirs), abs=1e-12)


SIGNED = st.lists(
    st.sampled_from(["the", "cat", "Cat's", "treatments", "of", "?", "1,000", "(e.g.", "naïve", "&quot;", "x-ray", " ", "\u00a0"]),
    max_size=9,
).map(" ".join)


@given(st.lists(st.tuples(SIGNED, SIGNED), min_size=1, max_size=6))
@settings(max_examples=200, deadline=None)
def test_summed_row_counts_give_sacrebleus_own_bleu_and_chrf_of_the_whole_corpus(rows):
    ours, theirs = (list(texts) for texts in zip(*rows, strict=True))
    blue = float(corpus.bleu_of_counts(corpus.bleu_counts(ours, theirs).sum(axis=0), len(rows)))
    assert blue == pytest.approx(sacrebleu.corpus_bleu(ours, [theirs]).score / 100, abs=1e-9)
    chrf = float(corpus.chrf_of_counts(corpus.chrf_counts(ours, theirs).sum(axis=0), len(rows)))
    assert chrf == pytest.approx(sacrebleu.corpus_chrf(ours, [theirs]).score / 100, abs=1e-9)


def test_scores_of_the_embedded_questions_are_the_packages_own():
    examples = [e for split in load(DatasetSettings(), None).splits.values() for e in split]
    answers = [Answered(e.question, e.summary, " ".join(e.question.split()[:12])) for e in examples]
    texts, references = [a.text for a in answers], [a.reference for a in answers]
    scores = {name: METRICS[name].score(METRICS[name].statistics(answers)) for name in (*MAIN, "rougeLsum")}
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL", "rougeLsum"], use_stemmer=True)
    own = [scorer.score(reference, text) for text, reference in zip(texts, references, strict=True)]
    for name in scorer.rouge_types:
        assert scores[name] == pytest.approx(sum(row[name].fmeasure for row in own) / len(own), abs=1e-9)
    assert scores["bleu"] == pytest.approx(bleu(texts, references), abs=1e-9)
    assert scores["sacrebleu"] == pytest.approx(sacrebleu.corpus_bleu(texts, [references]).score / 100, abs=1e-9)
    assert scores["chrf"] == pytest.approx(sacrebleu.corpus_chrf(texts, [references]).score / 100, abs=1e-9)
    assert all(0 < score < 1 for score in scores.values())


def test_the_signatures_are_sacrebleus_and_name_its_version():
    found = corpus.signatures()
    assert found["sacrebleu"] == f"nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:{sacrebleu.__version__}"
    assert found["chrf"].startswith("nrefs:1|case:mixed|eff:yes|nc:6|nw:0|space:no|version:")


def measured(metric, *rows):
    found = METRICS[metric]
    return found.score(found.statistics([Answered(*row) for row in rows]))


def test_an_answer_is_exact_but_for_case_spaces_and_punctuation():
    assert measured("exact_match", ("q", "What is gout?", " what is GOUT"), ("q", "What is gout?", "what gout is")) == 0.5


def test_the_length_ratio_is_all_words_by_all_words():
    assert measured("length_ratio", ("q", "a b c d", "a"), ("q", "a b", "a b c d e")) == 1.0


def test_of_three_3_grams_of_answers_one_stands_in_its_question():
    rows = (("I have had gout for years", "r", "had gout for ever"), ("had gout for", "r", "it is not"), ("q", "r", "too short"))
    assert measured("copied", *rows) == pytest.approx(1 / 3)


def test_empty_and_cut_off_answers_are_shares():
    assert measured("empty", ("q", "r", " \n"), ("q", "r", "x"), ("q", "r", "y"), ("q", "r", "z")) == 0.25
    assert measured("cut_off", ("q", "r", "x", "length"), ("q", "r", "x", "stop"), ("q", "r", "x", None)) == pytest.approx(1 / 3)


def test_of_four_words_two_are_different_and_of_two_pairs_one():
    assert distinct(["a b", "A b"], 1) == 0.5
    assert distinct(["a b", "A b"], 2) == 0.5
    assert distinct(["", ""], 1) == 0.0
