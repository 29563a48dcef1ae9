"""The paired bootstrap: its definition on small numbers, and its error rates on simulated systems."""

from __future__ import annotations

import numpy as np
import pytest

from evaluator.scores import compare, score
from evaluator.significance import paired_bootstrap
from shared.contracts import Example, Prediction
from shared.errors import DataError


def rows(values):
    return {f"q{i}": np.array([value]) for i, value in enumerate(values)}


def bootstrap(ours, theirs, *, margin=0.0, resamples=1000, seed=0):
    return paired_bootstrap(rows(ours), rows(theirs), margin=margin, resamples=resamples, seed=seed)


def test_the_gain_is_the_difference_of_the_means():
    assert bootstrap([0.5, 0.7, 0.3], [0.1, 0.2, 0.3]).gain == pytest.approx(0.3)


def test_a_gain_on_every_row_has_the_smallest_p_there_is_one_in_resamples_plus_one():
    assert bootstrap([0.5, 0.7, 0.4], [0.1, 0.2, 0.3], resamples=999).p == pytest.approx(1 / 1000)


def test_with_gains_of_zero_and_one_a_quarter_of_resamples_gain_nothing_and_three_quarters_no_more_than_a_half():
    assert bootstrap([1, 0], [0, 0], resamples=20_000).p == pytest.approx(0.25, abs=0.015)
    assert bootstrap([1, 0], [0, 0], margin=0.5, resamples=20_000).p == pytest.approx(0.75, abs=0.015)


def test_the_interval_holds_the_gain_and_narrows_with_more_rows():
    few = bootstrap([0.1, 0.9] * 5, [0.0, 0.4] * 5)
    many = bootstrap([0.1, 0.9] * 50, [0.0, 0.4] * 50)
    assert few.low < few.gain < few.high
    assert many.high - many.low < (few.high - few.low) / 2


def test_the_same_seed_gives_the_same_numbers_and_more_resamples_than_a_block_are_all_drawn():
    ours, theirs = [0.5, 0.7, 0.4], [0.1, 0.2, 0.3]
    assert bootstrap(ours, theirs, resamples=2500) == bootstrap(ours, theirs, resamples=2500)
    assert bootstrap(ours, theirs, resamples=2500).p == pytest.approx(1 / 2501)


def test_systems_that_answered_different_rows_are_refused_and_the_rows_named():
    with pytest.raises(DataError, match="only one has q2, q3"):
        bootstrap([0.1, 0.2], [0.1, 0.2, 0.3, 0.4])


def test_no_rows_are_refused():
    with pytest.raises(DataError, match="no test rows"):
        bootstrap([], [])


def test_one_row_gives_no_interval_and_no_p_however_large_its_gain():
    found = bootstrap([1.0], [0.0])
    assert (found.low, found.high, found.p) == (None, None, None)
    assert "one test row" in found.note


@pytest.mark.parametrize("gain", [0.0, 0.2])
def test_the_same_gain_on_every_row_gives_no_interval(gain):
    found = bootstrap([0.1 + gain, 0.5 + gain, 0.3 + gain], [0.1, 0.5, 0.3])
    assert found.gain == pytest.approx(gain)
    assert found.p is None
    assert "same on every row" in found.note


def test_the_interval_covers_the_true_gain_about_19_times_in_20():
    random = np.random.default_rng(1)
    covered = 0
    for seed in range(300):
        theirs = random.uniform(0, 0.6, 40)
        found = bootstrap(theirs + random.normal(0.1, 0.2, 40), theirs, resamples=400, seed=seed)
        covered += found.low <= 0.1 <= found.high
    assert 0.90 <= covered / 300 <= 0.98


def test_of_systems_that_differ_by_noise_alone_about_one_in_twenty_looks_better():
    random = np.random.default_rng(2)
    better = 0
    for seed in range(300):
        theirs = random.uniform(0, 0.6, 40)
        better += bootstrap(theirs + random.normal(0, 0.2, 40), theirs, resamples=400, seed=seed).p < 0.05
    assert better / 300 <= 0.05 + 3 * (0.05 * 0.95 / 300) ** 0.5


def test_the_gain_in_bleu_is_the_difference_of_corpus_bleu_not_a_mean_over_rows():
    examples = [Example(id=f"q{i}", question="?", summary=s) for i, s in enumerate(["a b c d e", "f g h i j k", "l m n o"])]
    answers = {"one": ["a b c d e", "f g h x j k", "l m n o"], "other": ["a b c d", "f g h i", "z m n o"]}
    predictions = [
        Prediction(system=s, example_id=e.id, text=t) for s, texts in answers.items() for e, t in zip(examples, texts, strict=True)
    ]
    scored = score(predictions, examples)
    found = compare(scored["one"], scored["other"], "bleu", resamples=500, seed=0)
    assert found.gain == pytest.approx(scored["one"].bleu - scored["other"].bleu)
    assert found.low < found.gain < found.high
