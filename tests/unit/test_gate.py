"""The rule of promotion: what passes, what does not and why, and how often it is wrong."""

from __future__ import annotations

import numpy as np
import pytest
from evaluated import recipe

from evaluator.gate import decide, in_numbers, refusal
from evaluator.metrics.table import METRICS
from evaluator.scores import Scored, compare, score
from evaluator.significance import Comparison
from shared.contracts import Example, Prediction
from shared.errors import DataError
from shared.settings import Guarded, HigherIsBetter, PromoteSettings, SystemSettings

RULE = PromoteSettings(margin=0.01)


def comparison(**changes):
    values = {"gain": 0.10, "low": 0.04, "high": 0.16, "p": 0.001, "p_bootstrap": 0.001, "margin": 0.01, "rows": 80}
    return Comparison(ours="distilled", theirs="student-zero-shot", metric="rougeL", **{**values, **changes})


def test_a_gain_above_the_margin_with_two_small_ps_is_enough():
    assert refusal(comparison(), RULE) is None


def test_a_refusal_says_the_gain_the_rows_the_interval_and_the_p_that_were_not_enough():
    reason = refusal(comparison(gain=0.02, low=-0.01, p=0.2), RULE)
    assert "rougeL +2.0 points over student-zero-shot on 80 test rows" in reason
    assert "95% interval -1.0 to +16.0, p = 0.2000" in reason
    assert "p is not below 0.05" in reason


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"p": 0.05}, "p is not below"),
        ({"p_bootstrap": 0.05}, "p is not below"),
        ({"gain": 0.01, "p": 0.001}, "the gain is not above 1 points"),
        ({"gain": -0.3, "p": 0.001}, "the gain is not above"),
        ({"low": None, "high": None, "p": None, "p_bootstrap": None, "note": "one test row tells nothing"}, "one test row tells nothing"),
    ],
)
def test_the_edge_of_the_rule_and_everything_below_it_is_refused(changes, why):
    assert why in refusal(comparison(**changes), RULE)


def test_without_a_margin_none_is_spoken_of():
    assert "margin" not in in_numbers(comparison(margin=0.0), PromoteSettings())


def answered(ours, theirs, rows=30):
    """Both systems' answers to `rows` rows: a text, or a function of the row's number."""
    test = [Example(id=f"q{i}", question="?", summary=f"what is the treatment of disease {i}") for i in range(rows)]
    texts = {"distilled": ours, "student-zero-shot": theirs}
    return score([Prediction(system=s, example_id=e.id, text=t(i)) for s, t in texts.items() for i, e in enumerate(test)], test)


def better(i):
    return f"what is the treatment of disease {i}" if i % 3 else "no idea"


def worse(i):
    return f"what is the treatment of disease {i}" if i % 3 == 1 else "no idea"


def test_fewer_rows_than_the_rule_wants_decide_nothing_and_both_numbers_are_said():
    assert decide(answered(better, worse), recipe()).passed
    few = decide(answered(better, worse, rows=19), recipe())
    assert not few.passed
    assert few.failed == ("19 scored test rows: promote.min_rows is 20",)
    assert decide(answered(better, worse, rows=19), recipe(promote={"min_rows": 19})).passed


def test_a_loss_in_a_guarded_metric_refuses_with_both_scores_and_what_was_allowed():
    def of_baseline(i):  # worse in ROUGE-L, and exact on three rows
        return f"what is the treatment of disease {i}" if i < 3 else f"of disease {i}" + " or not" * (i % 2)

    exact = answered(lambda i: f"what is the treatment of {i}", of_baseline)
    assert decide(exact, recipe()).passed
    refused = decide(exact, recipe(promote={"no_regression": {"exact_match": 0.05}}))
    assert refused.failed == ("exact_match 0 points, student-zero-shot 10 points: 10 points worse, and 5 points are allowed",)
    assert decide(exact, recipe(promote={"no_regression": {"exact_match": 0.1}})).passed


def test_a_metric_in_which_less_is_better_is_guarded_the_other_way_round():
    test = [Example(id=f"q{i}", question="?", summary=f"one two three four {i}") for i in range(30)]
    found = score(
        [
            Prediction(system="distilled", example_id=e.id, text=e.summary, finish_reason="length" if i < 6 else "stop")
            for i, e in enumerate(test)
        ]
        + [Prediction(system="student-zero-shot", example_id=e.id, text=f"one {i % 7}", finish_reason="stop") for i, e in enumerate(test)],
        test,
    )
    refused = decide(found, recipe(promote={"no_regression": {"cut_off": 0.1}}))
    assert refused.failed == ("cut_off 20 points, student-zero-shot 0 points: 20 points worse, and 10 points are allowed",)
    assert decide(found, recipe(promote={"no_regression": {"cut_off": 0.2, "empty": 0}})).passed


def test_of_a_thousand_copies_of_one_system_with_noise_at_most_alpha_are_promoted():
    random, promoted, rows = np.random.default_rng(3), 0, 60
    ids, settings = tuple(f"q{i}" for i in range(rows)), recipe(evaluate={"resamples": 400})
    for seed in range(1000):
        system = random.beta(1.2, 2.5, rows)
        both = {
            name: Scored(name, ids, ("said",) * rows, {"rougeL": np.clip(system + random.normal(0, 0.15, rows), 0, 1)[:, np.newaxis]}, 0, 0)
            for name in ("distilled", "student-zero-shot")
        }
        mine = settings.model_copy(update={"evaluate": settings.evaluate.model_copy(update={"seed": seed})})
        promoted += decide(both, mine).passed
    assert promoted / 1000 <= settings.promote.alpha
    assert promoted > 0  # else nothing is ever promoted, and this test says nothing


def test_stored_predictions_without_exactly_one_to_each_row_are_refused_with_the_rows():
    test = [Example(id=f"q{i}", question="?", summary="what") for i in range(3)]
    found = [Prediction(system="s", example_id=i, text="what") for i in ("q0", "q0", "q9")]
    with pytest.raises(DataError, match=r"s: q0 answered more than once; q1, q2 not answered; q9 not in the test split"):
        score(found, test)


def test_rows_on_which_the_baseline_failed_are_no_gain_and_are_told():
    test = [Example(id=f"q{i}", question="?", summary=f"what is the treatment of disease {i}") for i in range(30)]

    def answers(system, failed=()):
        return [
            Prediction(
                system=system, example_id=e.id, text="" if i in failed else f"what is {i % 5}", failed="refused" if i in failed else None
            )
            for i, e in enumerate(test)
        ]

    found = score([*answers("distilled"), *answers("student-zero-shot", failed=range(8))], test)
    decision = decide(found, recipe())
    assert not decision.passed
    assert decision.comparison.rows == 22
    assert "8 rows on which student-zero-shot failed to answer are left out" in decision.failed[0]
    assert not decide(score([*answers("distilled", failed=range(8)), *answers("student-zero-shot")], test), recipe()).passed


def test_a_baseline_that_failed_on_every_row_lets_nobody_pass():
    test = [Example(id=f"q{i}", question="?", summary=f"what is {i}") for i in range(30)]
    found = score(
        [Prediction(system="distilled", example_id=e.id, text=e.summary) for e in test]
        + [Prediction(system="student-zero-shot", example_id=e.id, text="", failed="too_long") for e in test],
        test,
    )
    assert "failed to answer every test row" in decide(found, recipe()).failed[0]


def test_a_trivial_baseline_without_a_word_lets_nobody_pass_and_empty_answers_of_others_are_told():
    said = answered(better, lambda i: " " * (i % 2))
    told = decide(said, recipe())  # a student that has to learn to say anything at all
    assert told.passed
    assert told.met[0].endswith("p is below 0.05; 30 answers of student-zero-shot are empty")
    trivial = {"distilled": said["distilled"], "constant": said["student-zero-shot"]}
    (why,) = decide(trivial, recipe(promote={"baseline": "constant"})).failed
    assert why == "constant has nothing to say here, as where no train row has a reference: to be better than that is no gain"
    seldom = decide(answered(better, lambda i: "" if i % 10 == 0 else worse(i)), recipe())
    assert seldom.passed
    assert seldom.met[0].endswith("p is below 0.05; 3 answers of student-zero-shot are empty")
    assert "empty" not in decide(answered(better, worse), recipe()).met[0]


def test_the_exchange_tests_a_margin_as_the_bootstrap_does():
    random = np.random.default_rng(4)
    gains = 0.1 + random.normal(0, 0.05, 40)
    ours, theirs = np.full(40, 0.5) + gains, np.full(40, 0.5)
    found = {
        margin: compare(
            Scored("a", IDS, ("said",) * 40, {"rougeL": ours[:, np.newaxis]}, 0, 0),
            Scored("b", IDS, ("said",) * 40, {"rougeL": theirs[:, np.newaxis]}, 0, 0),
            "rougeL",
            margin=margin,
            resamples=2000,
            seed=0,
        )
        for margin in (0.0, float(gains.mean()))
    }
    assert found[0.0].p < 0.01
    assert [c.p > 0.9 and c.p_bootstrap > 0.9 for c in found.values()] == [False, True]


IDS = tuple(f"q{i}" for i in range(40))


def test_an_alpha_that_no_p_can_reach_is_refused_with_both_settings():
    with pytest.raises(ValueError, match=r"promote\.alpha, evaluate\.resamples: no p is below 0\.02"):
        recipe(evaluate={"resamples": 100}, promote={"alpha": 0.01})


def test_a_rule_may_name_every_metric_in_which_more_is_better_and_guard_those_in_which_less_is():
    assert set(HigherIsBetter.__args__) == {m.name for m in METRICS.values() if m.better == "higher"} | {"bertscore"}
    assert set(Guarded.__args__) == {m.name for m in METRICS.values() if m.better != "neither"} | {"bertscore"}


def test_a_system_needs_exactly_one_source():
    with pytest.raises(ValueError, match="exactly one of url, run and predictions"):
        SystemSettings(name="other")
    with pytest.raises(ValueError, match="exactly one of url, run and predictions"):
        SystemSettings(name="other", url="http://x/v1", run="runs/sft")
