"""The report as one self-contained HTML page: nothing is loaded from anywhere, and no text of a model or a data set can act.

The page's policy lets run the one script beside this module, by its hash. The script filters and sorts the table of test rows that is
there without it.
"""

from __future__ import annotations

import hashlib
import re
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from evaluator.report import charts, figures
from evaluator.report.contract import Report, ScoredRow
from evaluator.report.parts import row_metric
from evaluator.significance import Comparison
from evaluator.systems import DISTILLED

HERE = Path(__file__).parent
EACH = (7, 6, 7)
"""Examples shown of the best, the middle and the worst."""
CURVES = {
    "loss": "Loss",
    "nll": "Loss of the chosen answer (nll, nats a token)",
    "odds_ratio": "Odds-ratio term",
    "margin": "Margin: log p of chosen above rejected",
    "accuracy": "Accuracy: chosen is likelier than rejected",
}
"""Series of the training log that are shown first; logp_chosen and logp_rejected share a panel, all others are a click away."""
PAIR = ("logp_chosen", "logp_rejected")
VALIDATION = "rougeL"


@dataclass(frozen=True)
class TestAnswers:
    """One scored test row with what every system answered."""

    id: str
    question: str
    reference: str
    texts: Mapping[str, str]
    """By system."""


@dataclass(frozen=True)
class Shown:
    """A test row picked to be shown."""

    where: Literal["best", "middle", "worst"]
    row: ScoredRow
    answers: TestAnswers
    gain: float
    """Of the distilled student over the baseline in `ScoredRow.scores`' metric."""


@dataclass(frozen=True)
class Cell:
    """One system against another in the matrix of pairs."""

    shown: str
    sign: str
    """Which way, where it is significant; empty where it is not."""
    title: str


@dataclass(frozen=True)
class Dropped:
    """One reason of a census."""

    reason: str
    count: int
    share: float
    """Of all rows."""


@dataclass(frozen=True)
class Census:
    """What became of the candidates of a stage, and what else it counted."""

    stage: str
    rows: int
    kept: int
    dropped: Sequence[Dropped]
    others: Sequence[tuple[str, str]]


def page(report: Report, answers: Sequence[TestAnswers]) -> str:
    """The page. `answers`: one a row of the report, in its order. Every text in it is escaped."""
    script = (HERE / "page.js").read_text(encoding="utf-8")
    environment = Environment(
        loader=PackageLoader("evaluator.report", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("page.html.j2").render(
        report=report,
        distilled=DISTILLED,
        gate_metric=report.metrics[report.metric],
        row_metric=report.metrics[row_metric(report.metric)],
        style=Markup((HERE / "page.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_hash=b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        f=figures,
        charts=charts,
        main=figures.main_metrics(report),
        gains=figures.gains(report, report.metric),
        gains_elsewhere={m: found for m in report.metrics if m != report.metric and (found := figures.gains(report, m))},
        score_scale=charts.scale(
            # the references' own score would press all others together
            [v for s in report.systems.values() if s.group != "reference" for v in _ends(s.scores[report.metric])],
            zero=True,
        ),
        gain_scale=charts.scale([v for c in figures.gains(report, report.metric).values() for v in _ends_of_gain(c)], zero=True),
        best_teacher=_best(report, "teacher"),
        panels=_panels(report),
        matrix=_matrix(report),
        curves=_curves(report),
        compared=compared(report),
        part_scale=charts.scale([v for p in (*report.by_length, *report.by_type) for v in p.scores.values()], zero=True),
        censuses=[census(name, stage["counts"]) for name, stage in figures.stages(report, r"triplets/r\d+").items()],
        harvest=report.stages.get("responses/teacher"),
        longest=max((float(s["seconds"]) for s in report.stages.values()), default=0.0) or 1.0,
        examples=chosen(report, answers),
        marked=marked,
        missed=missed,
        rows=[(row, answer, _gain(report, row)) for row, answer in zip(report.rows, answers, strict=True)],
        types=sorted({row.type for row in report.rows}),
    )


def chosen(report: Report, answers: Sequence[TestAnswers], each: tuple[int, int, int] = EACH) -> list[Shown]:
    """The best, middle and worst rows by the row's gain of the distilled student over the baseline, each row once.

    Of fewer rows than asked for, the best come first, then the worst; the middle has what is left. Rows that tie are taken by id.
    """
    order = sorted(zip(report.rows, answers, strict=True), key=lambda pair: (-_goodness(report, _gain(report, pair[0])), pair[0].id))
    best, rest = order[: each[0]], order[each[0] :]
    worst = rest[-each[2] :] if each[2] else []
    rest = rest[: len(rest) - len(worst)]
    start = max(0, (len(rest) - each[1]) // 2)
    picked: list[tuple[Literal["best", "middle", "worst"], list[tuple[ScoredRow, TestAnswers]]]] = [
        ("best", best),
        ("middle", rest[start : start + each[1]]),
        ("worst", worst),
    ]
    return [Shown(where, row, answer, _gain(report, row)) for where, rows in picked for row, answer in rows]


def compared(report: Report) -> list[str]:
    """The systems shown beside the distilled student where there is no room for all: baseline, best teacher, best trivial."""
    others = (report.baseline, _best(report, "teacher"), _best(report, "trivial"))
    return list(dict.fromkeys([DISTILLED, *(name for name in others if name is not None and name in report.systems)]))


def marked(text: str, reference: str) -> Markup:
    """`text` with what the reference does not say, word for word and in its order, in <ins>. Case and punctuation are no difference."""
    return _with_tag(text, _aligned(text, reference), "ins")


def missed(reference: str, text: str) -> Markup:
    """The reference with the words that `text` lacks in <mark>."""
    return _with_tag(reference, _aligned(reference, text), "mark")


def census(stage: str, counts: Mapping[str, Any]) -> Census:
    """What a stage counted, its kept and dropped rows apart from the rest."""
    dropped = {str(k): int(v) for k, v in counts.get("dropped", {}).items()}
    kept = int(counts.get("kept", 0))
    total = int(counts.get("rows", kept + sum(dropped.values())))
    return Census(
        stage=stage,
        rows=total,
        kept=kept,
        dropped=[Dropped(k, n, n / (total or 1)) for k, n in sorted(dropped.items(), key=lambda item: -item[1])],
        others=list(figures.flat({k: v for k, v in counts.items() if k not in ("rows", "kept", "dropped")})),
    )


def _gain(report: Report, row: ScoredRow) -> float:
    return row.scores[DISTILLED] - row.scores[report.baseline]


def _goodness(report: Report, value: float) -> float:
    """Higher is better, whatever the metric of the rows."""
    return -value if report.metrics[row_metric(report.metric)].better == "lower" else value


def _best(report: Report, group: str) -> str | None:
    lower = report.metrics[report.metric].better == "lower"
    found = {name: s.scores[report.metric].value for name, s in report.systems.items() if s.group == group}
    return max(found, key=lambda name: -found[name] if lower else found[name]) if found else None


def _ends(score: Any) -> tuple[float | None, ...]:
    return score.value, score.low, score.high


def _ends_of_gain(found: Comparison) -> tuple[float | None, ...]:
    return found.gain, found.low, found.high


def _panels(report: Report) -> list[Markup]:
    """A dot chart for each of the main metrics, systems by score; the references are left out, whose score is no news."""
    panels = []
    for metric in figures.main_metrics(report):
        definition = report.metrics[metric]
        systems = [(name, s) for name, s in report.systems.items() if s.group != "reference"]
        systems.sort(key=lambda pair: pair[1].scores[metric].value, reverse=definition.better != "lower")
        rows = [
            charts.Dot(
                name=name,
                group=s.group,
                value=s.scores[metric].value,
                low=s.scores[metric].low,
                high=s.scores[metric].high,
                shown=figures.points(definition, s.scores[metric].value),
                ours=name == DISTILLED,
            )
            for name, s in systems
        ]
        label = f"{definition.label}{' (lower is better)' if definition.better == 'lower' else ''}"
        panels.append(charts.dots(label, rows, points=definition.points, explained="Systems by score, with 95% intervals:"))
    return panels


def _matrix(report: Report) -> list[tuple[str, list[Cell | None]]]:
    """Every system against every other; None against itself and where the report has no such pair."""
    names = [name for name in report.systems if any(name in (c.ours, c.theirs) for c in report.pairs)]
    by_pair = {(c.ours, c.theirs): c for c in report.pairs}
    return [(ours, [_cell(report, by_pair, ours, theirs) for theirs in names]) for ours in names]


def _cell(report: Report, by_pair: Mapping[tuple[str, str], Comparison], ours: str, theirs: str) -> Cell | None:
    found, turned = by_pair.get((ours, theirs)), by_pair.get((theirs, ours))
    pair = found or turned
    if pair is None:
        return None
    definition = report.metrics[report.metric]
    gain = pair.gain if found else -pair.gain
    way = figures.better(definition, gain) if figures.significant(pair) else 0
    says = {1: "beats", -1: "loses to", 0: "is not told apart from"}[way]
    return Cell(
        shown=figures.signed(definition, gain),
        sign={1: "▲", -1: "▼", 0: ""}[way],
        title=f"{ours} {says} {theirs}: {figures.signed(definition, gain)}, p after Holm {figures.p_value(pair.p_holm)}",
    )


def _curves(report: Report) -> tuple[list[Markup], list[Markup]]:
    """Panels of training, the ones to look at first and the others. Steps of later rounds go on from those of the round before."""
    series: dict[str, list[tuple[float, float]]] = {}
    validation: list[tuple[float, float]] = []
    rounds: list[tuple[str, float]] = []
    before = 0.0
    for r in report.training:
        rounds.append((f"round {r.round}", before))
        for entry in r.steps:
            for name, value in entry.items():
                if name not in ("step", "epoch"):
                    series.setdefault(name, []).append((before + entry["step"], value))
        validation += [(before + entry["step"], entry[VALIDATION]) for entry in r.validation if VALIDATION in entry]
        before += max((entry["step"] for entry in (*r.steps, *r.validation)), default=0.0)

    def one(title: str, name: str) -> Markup:
        return charts.lines(charts.Lines(title, [charts.Line(name, series[name])], rounds))

    drawable = {name for name, found in series.items() if any(abs(v) < float("inf") for _, v in found)}
    first = [one(title, name) for name, title in CURVES.items() if name in drawable]
    if pair := [name for name in PAIR if name in drawable]:
        both = [charts.Line(name.removeprefix("logp_"), series[name], dashed=name == PAIR[1]) for name in pair]
        first.append(charts.lines(charts.Lines("log p a token of chosen and rejected", both, rounds)))
    if validation:
        line = charts.Line("ROUGE-L", validation, marked=True)
        first.append(charts.lines(charts.Lines("ROUGE-L on validation rows", [line], rounds, points=True)))
    return first, [one(name.replace("_", " "), name) for name in series if name in drawable and name not in (*CURVES, *PAIR)]


def _aligned(text: str, other: str) -> list[tuple[str, bool]]:
    """The words of `text`, each with whether it stands in the longest common subsequence with `other`."""
    words, theirs = re.findall(r"\S+", text), [key for word in other.split() if (key := _key(word))]
    # signs that stand alone are no words: neither told apart nor in the way
    ours = [(at, key) for at, word in enumerate(words) if (key := _key(word))]
    table = [[0] * (len(theirs) + 1)]
    for _, key in reversed(ours):
        below, line = table[-1], [0] * (len(theirs) + 1)
        for j in range(len(theirs) - 1, -1, -1):
            line[j] = below[j + 1] + 1 if key == theirs[j] else max(below[j], line[j + 1])
        table.append(line)
    table.reverse()
    common = {at for at, word in enumerate(words) if not _key(word)}
    i = j = 0
    while i < len(ours) and j < len(theirs):
        if ours[i][1] == theirs[j]:
            common.add(ours[i][0])
            i, j = i + 1, j + 1
        elif table[i + 1][j] >= table[i][j + 1]:
            i += 1
        else:
            j += 1
    return [(word, at in common) for at, word in enumerate(words)]


def _key(word: str) -> str:
    return re.sub(r"\W+", "", word).lower()


def _with_tag(text: str, words: Sequence[tuple[str, bool]], tag: str) -> Markup:
    """`text` as it is, each run of words that are not common in a tag; runs are tagged whole, so that they are read aloud whole."""
    parts, at, opened = [], 0, False
    for word, common in words:
        start = text.index(word, at)
        if opened and common:
            parts.append(Markup(f"</{tag}>"))
        parts.append(escape(text[at:start]))
        if not opened and not common:
            parts.append(Markup(f"<{tag}>"))
        opened = not common
        parts.append(escape(word))
        at = start + len(word)
    if opened:
        parts.append(Markup(f"</{tag}>"))
    return Markup("").join([*parts, escape(text[at:])])
