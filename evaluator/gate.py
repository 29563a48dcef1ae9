"""The rule by which a student is promoted or refused, and its decision in numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from evaluator.scores import Scored, compare
from evaluator.significance import Comparison
from evaluator.systems import DISTILLED, TRIVIAL
from shared.settings import PromoteSettings, Recipe


@dataclass(frozen=True)
class Decision:
    """What the rule says of a student."""

    comparison: Comparison
    """With the baseline, in the rule's metric and against its margin."""
    met: tuple[str, ...]
    """The conditions that hold, in numbers."""
    failed: tuple[str, ...]
    """Those that do not, in numbers, and why."""

    @property
    def passed(self) -> bool:
        return not self.failed


def decide(scored: Mapping[str, Scored], recipe: Recipe) -> Decision:
    """Apply the recipe's promote section to the scores of its systems, the baseline's among them.

    Promoted is who gains more than `margin` with both tests' p below `alpha`, on at least `min_rows` rows, and loses no more than
    allowed in any metric of `no_regression`. Rows on which the baseline failed to answer are left out: they are no gain. Both p are
    two-sided: where the two systems are alike (exchangeable, margin 0), at most alpha / 2 are promoted by chance. With few rows that
    bound does not hold for every kind of difference: losses so rare and heavy that none is among the rows are seen by no test of them.
    """
    rule = recipe.promote
    lost = scored[rule.baseline].failed
    met: list[str] = []
    failed: list[str] = []
    if lost.issuperset(scored[DISTILLED].ids):
        failed.append(f"{rule.baseline} has failed to answer every test row, so nothing can be compared with it")
        lost = frozenset()
    ours, theirs = (scored[name].without(lost) for name in (DISTILLED, rule.baseline))
    silent = sum(not text.strip() for text in theirs.texts)
    if silent == len(theirs.texts) and rule.baseline in TRIVIAL:
        failed.append(f"{rule.baseline} has nothing to say here, as where no train row has a reference: to be better than that is no gain")
    found = compare(ours, theirs, rule.metric, margin=rule.margin, resamples=recipe.evaluate.resamples, seed=recipe.evaluate.seed)
    if found.rows < rule.min_rows:
        failed.append(f"{found.rows} scored test rows: promote.min_rows is {rule.min_rows}")
    why = refusal(found, rule)
    left_out = f"; {len(lost)} rows on which {rule.baseline} failed to answer are left out" if lost else ""
    if silent:
        left_out += f"; {silent} answers of {rule.baseline} are empty"
    (failed if why else met).append((why or f"{in_numbers(found, rule)}: p is below {rule.alpha:g}") + left_out)
    for metric, allowed in rule.no_regression.items():
        measured = ours.metrics[metric]
        loss = theirs.value(metric) - ours.value(metric)
        if measured.better == "lower":
            loss = -loss
        told = f"{metric} {_points(ours.value(metric))}, {rule.baseline} {_points(theirs.value(metric))}"
        # scores are sums of floats: what is equal on paper may differ in the last place
        if loss > allowed + 1e-12:
            failed.append(f"{told}: {_points(loss)} worse, and {_points(allowed)} are allowed")
        else:
            met.append(f"{told}: no more than {_points(allowed)} worse")
    return Decision(found, tuple(met), tuple(failed))


def refusal(found: Comparison, rule: PromoteSettings) -> str | None:
    """Why a comparison is not enough under a rule, in numbers; None if it is."""
    if found.p is None or found.p_bootstrap is None:
        return f"{in_numbers(found, rule)}: {found.note}"
    if found.gain <= rule.margin:
        return f"{in_numbers(found, rule)}: the gain is not above {_points(rule.margin)}"
    if max(found.p, found.p_bootstrap) >= rule.alpha:
        return f"{in_numbers(found, rule)}: p is not below {rule.alpha:g}, so the gain may be chance"
    return None


def in_numbers(found: Comparison, rule: PromoteSettings) -> str:
    """A comparison in one phrase, in points of 100."""
    doubt = (
        "no interval"
        if found.low is None or found.high is None or found.p is None or found.p_bootstrap is None
        else f"95% interval {100 * found.low:+.1f} to {100 * found.high:+.1f}, p = {max(found.p, found.p_bootstrap):.4f}"
    )
    above = f" above a margin of {_points(rule.margin)}" if rule.margin else ""
    return f"{rule.metric} {100 * found.gain:+.1f} points over {rule.baseline} on {found.rows} test rows ({doubt}{above})"


def _points(value: float) -> str:
    return f"{100 * value + 0.0:.4g} points"
