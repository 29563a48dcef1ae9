"""The report as GitHub-flavoured Markdown, for a pull request or a model card: the page's numbers without its pictures."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

from evaluator.report import figures
from evaluator.report.contract import Report
from evaluator.systems import DISTILLED


def markdown(report: Report) -> str:
    """report.md. What comes from models, data or settings is escaped, so that it neither breaks a table nor becomes markup."""
    return "\n".join([*_head(report), *_scores(report), *_gains(report), *_data(report), *_notes(report), *_provenance(report)]) + "\n"


def _head(report: Report) -> Iterator[str]:
    gate = report.gate
    yield f"# {_text(report.recipe)}: evaluation"
    yield ""
    of = f"{report.test_rows:,} test rows of {_text(report.dataset['name'])}"
    yield f"{_text(report.student)}, taught by {_text(report.teacher)}; {of}."
    yield ""
    yield (
        "**Passes the gate**: this student may replace what is served."
        if gate.passed
        else ("**Does not pass the gate**: what is served stays served.")
    )
    yield ""
    yield from (f"- {_text(reason)}" for reason in gate.reasons)


def _scores(report: Report) -> Iterator[str]:
    metric = report.metrics[report.metric]
    main = figures.main_metrics(report)
    yield from ("", "## Scores", "")
    yield f"95% intervals by a bootstrap over rows.{' Points of 100.' if metric.points else ''}"
    yield ""
    labels = [_text(report.metrics[name].label) for name in main]
    rows = []
    for name, system in report.systems.items():
        shown = [figures.points(report.metrics[m], system.scores[m].value) for m in main]
        own = system.scores[report.metric]
        cells = [shown[0], figures.between(metric, own), *shown[1:], f"{system.mean_words:.1f}", str(system.empty), str(system.cut_off)]
        rows.append([_name(name), *cells])
    yield from _table(["system", labels[0], "95% interval", *labels[1:], "words", "empty", "cut off"], rows)


def _gains(report: Report) -> Iterator[str]:
    metric = report.metrics[report.metric]
    yield from ("", "## Gain of the distilled student", "")
    yield f"In {_text(metric.label)} on the same rows; p two-sided, by approximate randomisation; bold: below {figures.ALPHA} after Holm."
    yield ""
    rows = []
    for name, c in figures.gains(report, report.metric).items():
        gain = figures.signed(metric, c.gain)
        rows.append(
            [
                _name(name),
                f"**{gain}**" if figures.significant(c) else gain,
                _text(figures.gain_between(metric, c)),
                _text(figures.p_value(c.p)),
                _text(figures.p_value(c.p_holm)),
                figures.NONE if c.effect is None else f"{c.effect:+.2f}",
                figures.NONE if c.wins is None else f"{c.wins} / {c.ties} / {c.losses}",
            ]
        )
    yield from _table(["over", "gain", "95% interval", "p", "p, Holm", "effect", "wins / ties / losses"], rows)


def _data(report: Report) -> Iterator[str]:
    for name, stage in figures.stages(report, r"triplets/r\d+|responses/teacher").items():
        yield from ("", f"## {_text(name)}", "", f"{figures.seconds(stage['seconds'])}.", "")
        yield from _table(["counted", ""], ([_text(key), _text(value)] for key, value in figures.flat(stage["counts"])))
    if report.judge:
        yield from ("", "## Judge", "", f"{_text(report.judge.model)}, each pair in both orders.", "")
        rows = [
            [
                _name(v.theirs),
                f"{v.wins} / {v.ties} / {v.losses}",
                figures.NONE if v.win_rate is None else f"{100 * v.win_rate:.1f}%",
                figures.NONE if v.low is None or v.high is None else f"{100 * v.low:.1f} to {100 * v.high:.1f}%",
                str(v.contradictions),
                str(v.unreadable),
            ]
            for v in report.judge.verdicts
        ]
        yield from _table(["against", "wins / ties / losses", "win rate", "95% interval", "contradictions", "unreadable"], rows)


def _notes(report: Report) -> Iterator[str]:
    yield from ("", "## Caveats", "")
    yield from (f"- {_text(caveat)}" for caveat in report.notes)
    allowed = sum(o.allowed for o in report.overlaps)
    yield f"- Overlaps of test rows with train or validation: {len(report.overlaps)}, {allowed} of them allowed."


def _provenance(report: Report) -> Iterator[str]:
    yield from ("", "## Provenance", "")
    yield f"- Resampling: {report.resamples:,} resamples, seed {report.seed}"
    yield f"- Shots: {_text(', '.join(report.shots)) or 'none'}"
    yield f"- Versions: {_text(', '.join(f'{name} {version}' for name, version in report.versions.items()))}"
    yield ""
    yield from _table(["metric", "definition"], ([_text(m.label), _text(m.definition)] for m in report.metrics.values()), right=False)
    yield ""
    yield from _table(["file", "bytes", "SHA-256"], ([_text(f.path), f"{f.bytes:,}", f"`{f.sha256}`"] for f in report.inputs), right=False)


def _name(system: str) -> str:
    return f"**{_text(system)}**" if system == DISTILLED else _text(system)


def _text(value: str) -> str:
    """One line that Markdown shows as it is: every sign that could begin markup is escaped."""
    one_line = " ".join(str(value).split())
    escaped = re.sub(r"([\\`*\[\]|~])", r"\\\1", one_line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;"))
    # within a word an underscore is one; at its edge it opens emphasis
    return re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", escaped)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], *, right: bool = True) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"|---|{('---:|' if right else '---|') * (len(head) - 1)}"
    yield from (f"| {' | '.join(row)} |" for row in rows)
