"""The report: the same numbers for a program, a browser and a terminal."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest
from evaluated import exported_run

from evaluator.report.build import METRICS, build
from evaluator.report.page import chosen, page
from evaluator.report.table import table
from evaluator.scores import score
from evaluator.systems import SYSTEMS
from shared.contracts import Example, Prediction
from shared.datasets.stage import prepare

EVIL = "<script>alert('x')</script> & \"quotes\""


def predictions(examples, answers):
    """`answers[system](index, example)`; a system that is not given answers with a constant."""
    return [
        Prediction(system=s, example_id=e.id, text=answers.get(s, lambda i, e: "What is it?")(i, e))
        for s in SYSTEMS
        for i, e in enumerate(examples)
    ]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = exported_run(tmp_path_factory.mktemp("report") / "run")
    run.stage("triplets/r0").finish([], settings={}, counts={"kept": 12, "dropped": {"tie": 3, "cut off": 1}})
    return run


@pytest.fixture(scope="module")
def made(run):
    rows = prepare(run)
    scored = score(predictions(rows["test"], {"distilled": lambda i, e: EVIL if i == 0 else e.summary}), rows["test"])
    report = build(run, rows, rows["train"][:2], {name: scored[name] for name in SYSTEMS})
    return report, page(report, rows["test"], scored)


class Page(HTMLParser):
    """Collects tags, the addresses they load, and the text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.loads, self.text, self.open = [], [], "", []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.loads += [value for name, value in attributes if name in ("src", "href", "action", "srcset")]
        if tag not in ("meta", "link", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_report_says_how_each_of_its_numbers_is_defined(made):
    report, _ = made
    for values in report["systems"].values():
        assert set(values) <= set(METRICS)
    assert "method1" in METRICS["bleu"]
    assert report["dataset"] == {"name": "sample", "train": 30, "validation": 30, "test": 40}
    assert report["bootstrap"] == {"resamples": 500, "seed": 0}
    assert len(report["shots"]) == 2
    assert {"python", "rouge_score", "nltk"} <= set(report["versions"])


def test_the_report_holds_the_census_and_time_of_every_stage_before_it(made):
    report, _ = made
    assert {"dataset", "model", "triplets/r0"} <= set(report["stages"])
    assert report["stages"]["triplets/r0"]["counts"]["dropped"]["tie"] == 3


def test_a_student_below_a_trivial_baseline_is_told_so_by_name(run):
    rows = prepare(run)
    scored = score(predictions(rows["test"], {"constant": lambda i, e: e.summary}), rows["test"])
    notes = build(run, rows, (), {name: scored[name] for name in SYSTEMS})["notes"]
    assert any("does not beat constant, first-question" in note for note in notes)  # those that answer alike tie with it


def test_the_page_loads_nothing_from_anywhere_and_its_tags_are_closed(made):
    parsed = Page(made[1])
    assert parsed.loads == []
    assert parsed.open == []
    assert "script" not in parsed.tags
    assert "url(" not in made[1]
    assert "@import" not in made[1]


def test_what_a_model_said_is_shown_as_text_and_never_as_markup(made):
    assert "<script>" not in made[1]
    assert EVIL in Page(made[1]).text


def test_the_page_shows_every_system_its_points_the_census_and_follows_the_readers_theme_and_width(made):
    report, html = made
    text = Page(html).text
    for name, values in report["systems"].items():
        assert name in text
        assert f"{100 * values['rougeL']:.1f}" in text
    assert re.search(r"dropped / tie\s*3", text)
    assert "prefers-color-scheme: dark" in html
    assert 'name="viewport"' in html


def test_the_examples_are_the_best_middle_and_worst_by_gain_each_once():
    examples = [Example(id=f"q{i:02}", question=f"Question {i}?", summary="one two three four") for i in range(20)]
    words = ["one two three four", "one two three", "one two", "one", "zero"]
    scored = score(predictions(examples, {"distilled": lambda i, e: words[i // 4], "student-zero-shot": lambda i, e: "one"}), examples)
    shown = chosen(examples, scored)
    assert [e["id"] for e in shown if e["where"] == "best"] == ["q00", "q01", "q02", "q03"]
    assert [e["id"] for e in shown if e["where"] == "middle"] == ["q08", "q09", "q10", "q11"]
    assert [e["id"] for e in shown if e["where"] == "worst"] == ["q16", "q17", "q18", "q19"]
    assert shown[0]["gain"] == pytest.approx(1 - 0.4)
    assert [a["system"] for a in shown[0]["answers"]][:2] == ["distilled", "student-zero-shot"]


def test_how_many_messages_had_a_subject_line_is_told(run):
    rows = {**prepare(run)}
    rows["test"] = [Example(id=f"q{i}", question=q, summary="What?") for i, q in enumerate(["SUBJECT: gout\nMESSAGE: help", "Help"])]
    scored = score(predictions(rows["test"], {}), rows["test"])
    notes = build(run, rows, (), {name: scored[name] for name in SYSTEMS})["notes"]
    assert any("1 of 2 messages have a SUBJECT line" in note for note in notes)


def test_fewer_rows_than_examples_to_show_are_shown_once_each():
    examples = [Example(id=f"q{i}", question="?", summary="one two") for i in range(5)]
    shown = chosen(examples, score(predictions(examples, {}), examples))
    assert sorted(e["id"] for e in shown) == [e.id for e in examples]


def test_one_test_row_makes_a_page_that_says_there_is_no_interval(run):
    rows = {**prepare(run)}
    rows["test"] = rows["test"][:1]
    scored = score(predictions(rows["test"], {"distilled": lambda i, e: e.summary}), rows["test"])
    report = build(run, rows, (), {name: scored[name] for name in SYSTEMS})
    assert report["comparisons"]["constant"]["p"] is None
    assert "no interval: one test row" in Page(page(report, rows["test"], scored)).text
    assert "(no interval)" in table(report)


def test_the_terminal_table_is_aligned_in_points_and_names_every_system(made):
    lines = table(made[0]).splitlines()
    body = lines[3 : 3 + len(SYSTEMS)]
    assert [line.split()[0] for line in body] == list(SYSTEMS)
    column = lines[1].index("ROUGE-L") + len("ROUGE-L")
    for line, values in zip(body, made[0]["systems"].values(), strict=True):
        assert line[:column].endswith(f"{100 * values['rougeL']:.1f}")
    assert any(line.startswith("note: ") for line in lines)
