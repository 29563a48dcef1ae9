"""Resampling: its definition on small numbers, and its error rates on simulated systems."""

from __future__ import annotations

import numpy as np
import pytest

from evaluator.metrics.table import METRICS
from evaluator.scores import Scored, compare, compare_all, score
from evaluator.significance import Comparison, bootstrap, exchange, holm, interval
from shared.contracts import Example, Prediction
from shared.errors import DataError

ROUGE_L = METRICS["rougeL"]


def scored(name, values, ids=None):
    """A system whose rows have these scores, whatever the metric."""
    column = np.array(values, dtype=float)[:, np.newaxis]
    ids = tuple(ids or (f"q{i}" for i in range(len(values))))
    return Scored(name=name, ids=ids, texts=("",) * len(ids), statistics={"rougeL": column}, empty=0, cut_off=0)


def compared(ours, theirs, *, margin=0.0, resamples=1000, seed=0):
    return compare(scored("a", ours), scored("b", theirs), "rougeL", margin=margin, resamples=resamples, seed=seed)


def test_the_gain_is_the_difference_of_the_means_and_its_effect_that_in_standard_deviations():
    found = compared([0.5, 0.7, 0.3], [0.1, 0.2, 0.3])
    assert found.gain == pytest.approx(0.3)
    assert found.effect == pytest.approx(0.3 / np.std([0.4, 0.5, 0.0], ddof=1))
    assert (found.ours, found.theirs, found.metric, found.rows) == ("a", "b", "rougeL", 3)
    assert (found.wins, found.losses, found.ties) == (2, 0, 1)


def test_a_gain_above_the_margin_in_every_resample_has_the_smallest_p_there_is():
    assert compared([0.5, 0.7, 0.4], [0.1, 0.2, 0.3], resamples=999).p_bootstrap == pytest.approx(2 * 1 / 1000)


def test_with_gains_of_zero_and_one_a_quarter_of_resamples_gain_nothing_and_three_quarters_no_more_than_a_half():
    assert compared([1, 0], [0, 0], resamples=20_000).p_bootstrap == pytest.approx(2 * 0.25, abs=0.03)
    assert compared([1, 1, 0, 0], [0, 0, 0, 0], margin=0.5, resamples=20_000).p_bootstrap == 1.0  # as often above as below


def test_of_the_eight_exchanges_of_three_gains_two_are_as_far_from_zero_as_all_three_on_one_side():
    found = compared([0.5, 0.7, 0.4], [0.1, 0.2, 0.3], resamples=20_000)
    assert found.p == pytest.approx(2 / 8, abs=0.015)


def test_p_of_the_exchange_is_that_of_all_exchanges_of_a_row_mean():
    random = np.random.default_rng(5)
    ours, theirs = random.uniform(size=8), random.uniform(size=8)
    signs = np.array(np.meshgrid(*[[-1, 1]] * 8)).reshape(8, -1)
    exact = np.mean(np.abs((ours - theirs) @ signs) >= abs((ours - theirs).sum()) - 1e-12)
    assert compared(ours, theirs, resamples=20_000).p == pytest.approx(exact, abs=0.015)


def test_the_interval_holds_the_gain_and_narrows_with_more_rows():
    few = compared([0.1, 0.9] * 5, [0.0, 0.4] * 5)
    many = compared([0.1, 0.9] * 50, [0.0, 0.4] * 50)
    assert few.low < few.gain < few.high
    assert many.high - many.low < (few.high - few.low) / 2


def test_the_same_seed_gives_the_same_numbers_whatever_else_is_compared_and_however_rows_are_drawn_in_blocks(monkeypatch):
    ours, theirs = np.random.default_rng(0).uniform(size=(2, 30))
    alone = compared(ours, theirs)
    statistics = {name: {"rougeL": np.array(v)[:, np.newaxis]} for name, v in {"x": theirs / 2, "a": ours, "b": theirs}.items()}
    together = bootstrap(statistics, [ROUGE_L], resamples=1000, seed=0)["rougeL"]
    assert interval(together["a"] - together["b"]) == pytest.approx((alone.low, alone.high))
    assert exchange(statistics, [("x", "b"), ("a", "b")], [ROUGE_L], resamples=1000, seed=0)["rougeL"][1] == alone.p
    monkeypatch.setattr("evaluator.significance.CELLS", 30 * 7)
    assert compared(ours, theirs) == alone


def test_rows_in_another_order_are_paired_by_their_ids():
    ours, theirs = scored("a", [0.1, 0.5, 0.9]), scored("b", [0.8, 0.1, 0.4], ids=("q2", "q0", "q1"))
    assert compare(ours, theirs, "rougeL", resamples=500, seed=0).wins == 2


def test_systems_that_answered_different_rows_are_refused_and_the_rows_named():
    with pytest.raises(DataError, match="only one has q2, q3"):
        compared([0.1, 0.2], [0.1, 0.2, 0.3, 0.4])


def test_no_rows_are_refused():
    with pytest.raises(DataError, match="no test rows"):
        compared([], [])


def test_one_row_gives_no_interval_and_no_p_however_large_its_gain():
    found = compared([1.0], [0.0])
    assert (found.low, found.high, found.p, found.p_bootstrap, found.effect) == (None,) * 5
    assert "one test row" in found.note


@pytest.mark.parametrize("gain", [0.0, 0.2])
def test_the_same_gain_on_every_row_gives_no_interval(gain):
    found = compared([0.1 + gain, 0.5 + gain, 0.3 + gain], [0.1, 0.5, 0.3])
    assert found.gain == pytest.approx(gain)
    assert found.p is None
    assert "same on every row" in found.note


def test_the_interval_covers_the_true_gain_in_93_to_97_of_100_simulated_evaluations():
    random, covered, evaluations, rows = np.random.default_rng(1), 0, 1000, 100
    for seed in range(evaluations):
        theirs = random.beta(1.2, 2.5, rows)  # skewed as ROUGE-L is
        ours = np.clip(theirs + random.normal(0.1, 0.2, rows), 0, 1)
        # the truth of this population: clipping moves it, so it is measured on a large sample of it
        found = compared(ours, theirs, resamples=500, seed=seed)
        covered += found.low <= TRUE_GAIN <= found.high
    assert 0.93 <= covered / evaluations <= 0.97


def _true_gain():
    random = np.random.default_rng(2)
    theirs = random.beta(1.2, 2.5, 4_000_000)
    return float((np.clip(theirs + random.normal(0.1, 0.2, len(theirs)), 0, 1) - theirs).mean())


TRUE_GAIN = _true_gain()


def test_holms_correction_of_one_two_and_three_hundredths_is_three_four_and_four_hundredths():
    made = holm([Comparison(ours="a", theirs=f"b{p}", metric="m", gain=1, p=p, rows=9) for p in (0.02, None, 0.01, 0.03)])
    assert [c.p_holm for c in made] == [pytest.approx(0.04), None, pytest.approx(0.03), pytest.approx(0.04)]


def test_holms_correction_is_never_above_one_and_leaves_a_single_p_as_it_is():
    assert [c.p_holm for c in holm([Comparison(ours="a", theirs="b", metric="m", gain=1, p=p, rows=9) for p in (0.6, 0.7)])] == [1.0, 1.0]
    assert holm([Comparison(ours="a", theirs="b", metric="m", gain=1, p=0.2, rows=9)])[0].p_holm == 0.2


EXAMPLES = [Example(id=f"q{i}", question="?", summary=s) for i, s in enumerate(["a b c d e", "f g h i j k", "l m n o", "p q r s t"])]
ANSWERS = {
    "one": ["a b c d e", "f g h x j k", "l m n o", "p q r s"],
    "other": ["a b c d", "f g h i", "z m n o", "p q x s t"],
    "third": ["a", "f g", "l m n", ""],
}


def answered():
    return score(
        [Prediction(system=s, example_id=e.id, text=t) for s, of in ANSWERS.items() for e, t in zip(EXAMPLES, of, strict=True)], EXAMPLES
    )


@pytest.mark.parametrize("metric", ["bleu", "sacrebleu", "chrf"])
def test_the_gain_in_a_corpus_score_is_the_difference_of_corpus_scores_not_a_mean_over_rows(metric):
    systems = answered()
    found = compare(systems["one"], systems["other"], metric, resamples=500, seed=0)
    assert found.gain == pytest.approx(systems["one"].value(metric) - systems["other"].value(metric))
    assert found.low < found.gain < found.high
    assert found.effect is None


def test_each_system_has_an_interval_in_every_metric_and_any_two_are_compared_in_the_main_one():
    found = compare_all(answered(), "one", "rougeL", alone=["third"], resamples=500, seed=0)
    assert set(found.intervals) == {"one", "other", "third"}
    low, high = found.intervals["other"]["chrf"]
    assert 0 <= low < answered()["other"].value("chrf") < high <= 1
    assert {(c.ours, c.theirs) for c in found.first} == {("one", "other")}
    assert {c.metric for c in found.first} == set(METRICS)
    assert [(c.ours, c.theirs, c.metric) for c in found.pairs] == [("one", "other", "rougeL")]
    assert next(c for c in found.first if c.metric == "rougeL") == found.pairs[0]


def test_a_metric_in_which_less_is_better_counts_a_row_with_less_as_won():
    ours, theirs = scored("a", [0, 0, 1]), scored("b", [1, 1, 1])
    for system in (ours, theirs):
        system.statistics["cut_off"] = system.statistics.pop("rougeL")
    found = compare(ours, theirs, "cut_off", resamples=200, seed=0)
    assert (found.gain, found.wins, found.losses) == (pytest.approx(-2 / 3), 2, 0)
