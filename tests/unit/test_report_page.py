"""The report's page and Markdown, from reports made by hand: what they say, and that nothing in them can act or be lost."""

from __future__ import annotations

import hashlib
import re
from base64 import b64encode
from html import unescape
from html.parser import HTMLParser
from itertools import pairwise
from xml.etree import ElementTree

import pytest
from reports import EVIL, report_and_answers

from evaluator.report import charts, figures
from evaluator.report.markdown import markdown
from evaluator.report.page import census, chosen, compared, marked, missed, page
from evaluator.significance import ONE_ROW


class Page(HTMLParser):
    """Collects tags, what they load or run, the text of elements by id, and all text outside style and script."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.loads, self.handlers, self.text, self.open, self.attributes = [], [], [], "", [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes.append((tag, dict(attributes)))
        self.loads += [v for k, v in attributes if k in ("src", "href", "action", "srcset", "xlink:href") and not (v or "").startswith("#")]
        self.handlers += [k for k, _ in attributes if k.startswith("on")]
        if tag not in ("meta", "link", "img", "br", "input"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("style", "script"):
            self.text += data


def made(**arguments):
    report, answers = report_and_answers(**arguments)
    html = page(report, answers)
    return report, html, Page(html)


def section(html, name):
    return re.search(rf'<section[^>]* id="{name}">.*?</section>', html, re.DOTALL)[0]


def words(html):
    """Its text, with cells apart."""
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", html)).split())


def test_the_page_loads_nothing_closes_its_tags_and_lets_only_its_own_script_run():
    _, html, parsed = made()
    assert parsed.loads == []
    assert parsed.open == []
    assert parsed.handlers == []
    assert parsed.tags.count("script") == 1
    assert not re.search(r"url\(|@import|https?://(?!www\.w3\.org)[^<\s]*\.(js|css)", html)
    script = re.search(r"<script>(.*)</script>", html, re.DOTALL)[1]
    policy = next(a["content"] for tag, a in parsed.attributes if tag == "meta" and a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")
    assert f"script-src 'sha256-{b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" in policy
    assert "unsafe-inline" not in policy.split("script-src")[1]


def test_evil_text_is_shown_as_text_everywhere_and_adds_no_tag():
    _, plain_html, plain = made(judge=True)
    _, html, evil = made(judge=True, evil=True)
    assert html.count("<script") == plain_html.count("<script") == 1
    assert html.count("</script") == 1
    assert "<img" not in html
    assert evil.handlers == []
    assert evil.open == []
    assert EVIL in evil.text
    assert "49" not in section(html, "notes")
    assert set(evil.tags) <= set(plain.tags) | {"mark", "ins"}


def test_attributes_hold_evil_text_whole():
    _, _, parsed = made(evil=True)
    types = [a["data-type"] for tag, a in parsed.attributes if tag == "tr" and "data-type" in a]
    assert types[0] == EVIL


def test_ids_are_unique_every_anchor_has_its_section_and_headings_skip_no_level():
    _, _, parsed = made(judge=True, overlaps=2, rounds=2)
    ids = [a["id"] for _, a in parsed.attributes if "id" in a]
    assert len(ids) == len(set(ids))
    assert {a["href"][1:] for tag, a in parsed.attributes if tag == "a"} <= set(ids)
    levels = [int(tag[1]) for tag in parsed.tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))


def test_every_chart_is_read_aloud_or_hidden_from_it_and_every_heading_cell_has_a_scope():
    _, _, parsed = made(judge=True)
    outer = [a for tag, a in parsed.attributes if tag == "svg" and a.get("class") != "shape"]
    assert all(a.get("role") == "img" or a.get("aria-hidden") == "true" for a in outer)
    assert sum(a.get("role") == "img" for a in outer) >= 10
    assert all("scope" in a for tag, a in parsed.attributes if tag == "th")


def test_every_chart_that_stands_alone_is_well_formed_with_title_description_and_no_empty_path():
    _, html, _ = made(rounds=2, steps=80)
    panels = re.findall(r'<svg class="panel".*?</svg>', html, re.DOTALL)
    assert len(panels) >= 12
    for panel in panels:
        root = ElementTree.fromstring(panel)
        assert root[0].tag == "title"
        assert root[1].tag == "desc"
        assert root[0].text
        assert root[1].text
        assert not re.search(r"\bnan\b|\binf\b", panel)
        assert all(re.match(r"M[\d.-]", p.get("d")) for p in root.iter("path"))


def test_the_verdict_says_in_words_whether_the_student_passes_and_why():
    _, html, _ = made(passed=True)
    assert "Passes the gate" in words(section(html, "verdict"))
    report, html, _ = made(passed=False)
    said = words(section(html, "verdict"))
    assert "Does not pass the gate" in said
    assert report.gate.reasons[0] in said


def test_page_and_markdown_give_every_system_the_same_scores_with_their_intervals():
    report, html, _ = made(extra=4)
    shown, text = words(section(html, "scores")), markdown(report)
    for name, system in report.systems.items():
        score = system.scores["rougeL"]
        interval = f"{100 * score.low:.1f} to {100 * score.high:.1f}"
        assert re.search(rf"{re.escape(name)} .*? {100 * score.value:.1f}\b.*? {interval}", shown)
        assert re.search(rf"\| \**{re.escape(name)}\** \| {100 * score.value:.1f} \| {interval} \|", text)


def test_page_and_markdown_give_every_gain_its_interval_both_p_its_effect_and_its_wins():
    report, html, _ = made()
    rows = {c.theirs: c for c in report.comparisons if c.metric == "rougeL"}
    shown, text = words(section(html, "gains")), markdown(report)
    for name, c in rows.items():
        interval = f"{100 * c.low:+.1f} to {100 * c.high:+.1f}"
        numbers = f"{c.p:.4f} {c.p_holm:.4f} {c.effect:+.2f} {c.wins} {c.ties} {c.losses}"
        assert re.search(rf"{name} {re.escape(f'{100 * c.gain:+.1f}')} {re.escape(f'{interval} {numbers}')}", shown)
        assert f"{interval} | {c.p:.4f} | {c.p_holm:.4f} | {c.effect:+.2f} | {c.wins} / {c.ties} / {c.losses} |" in text


def test_where_lower_is_better_a_negative_gain_is_for_the_better():
    report, _ = report_and_answers()
    assert figures.better(report.metrics["ter"], -0.1) == 1
    assert figures.better(report.metrics["rougeL"], -0.1) == -1
    assert figures.better(report.metrics["length_ratio"], 0.1) == 0


def test_the_matrix_turns_a_pair_round_and_marks_what_is_significant_by_a_sign():
    _, html, _ = made()
    pairs = section(html, "pairs")
    assert 'title="distilled beats student-zero-shot:' in pairs
    assert 'title="student-zero-shot loses to distilled:' in pairs
    assert 'title="distilled is not told apart from teacher-zero-shot:' in pairs
    row = re.search(r"<tr><th[^>]*>.{0,400}?student-zero-shot</th>(.*?)</tr>", pairs)[1]
    assert "▼" in row
    assert row.count('class="self"') == 1


def test_one_test_row_makes_a_page_and_a_markdown_that_say_there_is_no_interval():
    report, html, parsed = made(rows=1)
    assert f"no interval: {ONE_ROW}" in words(section(html, "gains"))
    assert "1 test row of sample" in parsed.text
    assert f"no interval: {ONE_ROW}" in markdown(report)
    assert section(html, "examples").count('<article class="pair">') == 1


def test_a_run_without_a_training_log_judge_or_overlap_has_no_such_section_but_says_there_is_no_leak():
    _, html, parsed = made(rounds=0)
    assert 'id="training"' not in html
    assert 'id="judge"' not in html
    assert "None found" in words(section(html, "leakage"))
    assert "No triplets were counted" in parsed.text


def test_rounds_are_marked_and_their_steps_go_on_from_one_to_the_next():
    _, html, _ = made(rounds=3, steps=10)
    training = section(html, "training")
    assert {"round 0", "round 1", "round 2"} <= set(re.findall(r">(round \d)<", training))
    assert re.search(r"loss: [\d.]+ at step 1, [\d.]+ at step 30;", training)
    assert 'class="line line-1 dashed"' in training  # rejected differs from chosen without colour
    _, html, _ = made(rounds=1)
    assert ">round 0<" not in html


def test_what_is_not_finite_in_the_log_is_left_out_of_its_line():
    chart = charts.lines(charts.Lines("t", [charts.Line("loss", [(1, 2.0), (2, float("nan")), (3, float("inf")), (4, 1.0)])]))
    assert len(re.search(r'd="(M[^"]*)"', chart)[1].split("L")) == 2
    assert "2.00 at step 1, 1.00 at step 4" in chart


def test_a_logged_line_begins_anew_with_each_round_and_a_round_of_one_step_is_a_dot():
    points = [(float(step), 1 / step) for step in range(1, 12)]
    chart = charts.lines(charts.Lines("t", [charts.Line("loss", points)], [("round 0", 0.0), ("round 1", 5.0), ("round 2", 10.0)]))
    path = re.search(r'class="line line-0" d="([^"]*)"', chart)[1]
    assert [piece.count("L") for piece in path.split("M")[1:]] == [4, 4, 0]
    assert chart.count("<circle") == 1


def test_of_many_steps_a_running_mean_lies_over_the_line_and_does_not_reach_across_rounds():
    points = [(float(step), float(step > 50)) for step in range(1, 101)]
    chart = charts.lines(charts.Lines("t", [charts.Line("loss", points)], [("round 0", 0.0), ("round 1", 50.0)]))
    raw, mean = re.findall(r'class="line line-0[^"]*" d="([^"]*)"', chart)
    assert raw == mean  # level within each round


def test_one_value_alone_and_values_all_equal_can_be_drawn():
    for points in ([(1.0, 0.0)], [(1.0, 0.5), (2.0, 0.5)]):
        ElementTree.fromstring(charts.lines(charts.Lines("t", [charts.Line("x", points)])))
    assert charts.scale([0.0, 0.0], zero=True).high > 0
    assert charts.scale([0.5], zero=False).low < 0.5 < charts.scale([0.5], zero=False).high


def test_a_scale_has_round_ends_that_hold_all_its_values_and_zero_where_asked():
    on = charts.scale([0.1025, 0.4457], zero=True)
    assert (on.low, on.high) == (0.0, pytest.approx(0.5))
    assert on.ticks() == pytest.approx([0.0, 0.2, 0.4])
    assert charts.scale([-0.083, 0.356], zero=True).low == pytest.approx(-0.1)
    assert on.percent(0.25) == "50.00%"


def test_a_long_name_is_shortened_in_a_chart_but_read_aloud_whole():
    dot = charts.Dot("a-system-with-a-very-long-name", "extra", 0.5, None, None, "50.0")
    chart = charts.dots("ROUGE-L", [dot], points=True, explained="Systems:")
    assert ">a-system-with-a-ver…<" in chart
    assert "a-system-with-a-very-long-name 50.0" in chart


def test_the_census_shows_every_reason_once_largest_first_and_its_rows_add_up():
    found = census("triplets/r0", {"rows": 10, "kept": 4, "dropped": {"tie": 1, "over": 5}, "triplets": 2, "by": {"a": 1}})
    assert [(d.reason, d.count, d.share) for d in found.dropped] == [("over", 5, 0.5), ("tie", 1, 0.1)]
    assert found.kept + sum(d.count for d in found.dropped) == found.rows
    assert found.others == [("triplets", "2"), ("by / a", "1")]
    _, html, _ = made()
    assert "over max_rejected 268 48.7%" in words(section(html, "data"))


def test_harvest_cost_and_the_time_of_every_stage_are_told():
    report, html, _ = made()
    shown = words(section(html, "data"))
    assert "cost 0.25" in shown
    assert "checkpoints/r0 1 min 38 s" in shown
    assert "| cost | 0.25 |" in markdown(report)


def test_twenty_examples_are_the_seven_best_the_six_in_the_middle_and_the_seven_worst_by_gain_each_once():
    report, answers = report_and_answers(rows=101)
    shown = chosen(report, answers)
    gains = sorted((row.scores["distilled"] - row.scores["student-zero-shot"] for row in report.rows), reverse=True)
    assert [e.gain for e in shown] == [*gains[:7], *gains[47:53], *gains[-7:]]
    assert [e.where for e in shown] == ["best"] * 7 + ["middle"] * 6 + ["worst"] * 7
    assert len({e.row.id for e in shown}) == 20
    assert all(e.row.id == e.answers.id for e in shown)


@pytest.mark.parametrize("rows", [1, 5, 8, 14, 19, 20, 21])
def test_fewer_rows_than_examples_to_show_are_shown_once_each(rows):
    report, answers = report_and_answers(rows=rows)
    ids = [e.row.id for e in chosen(report, answers)]
    assert len(ids) == len(set(ids)) == min(rows, 20)


def test_rows_that_tie_are_taken_by_id():
    report, answers = report_and_answers(rows=30)
    level = [row.model_copy(update={"scores": dict.fromkeys(row.scores, 0.5)}) for row in report.rows]
    shown = chosen(report.model_copy(update={"rows": level}), answers)
    assert [e.row.id for e in shown][:4] == ["q-0", "q-1", "q-10", "q-11"]


def test_beside_the_distilled_student_stand_the_baseline_the_best_teacher_and_the_best_trivial_system():
    report, _ = report_and_answers()
    trivial = max(
        ("constant", "first-question", "first-sentence", "subject-template"), key=lambda n: report.systems[n].scores["rougeL"].value
    )
    assert compared(report) == ["distilled", "student-zero-shot", "teacher-zero-shot", trivial]


def test_words_that_differ_from_the_reference_are_marked_and_case_and_punctuation_are_no_difference():
    assert marked("What causes gout?", "what CAUSES a gout") == "What causes gout?"
    assert marked("How is gout treated now?", "How is asthma treated?") == "How is <ins>gout</ins> treated <ins>now?</ins>"
    assert missed("How is asthma treated today?", "How is gout treated?") == "How is <mark>asthma</mark> treated <mark>today?</mark>"
    assert marked("b a", "a b") in ("<ins>b</ins> a", "b <ins>a</ins>")  # in its order: one of the two is out of place
    assert marked("", "a") == ""
    assert marked("one  two\nthree", "") == "<ins>one  two\nthree</ins>"
    assert marked("why - now", "why now") == "why - now"
    assert marked("<b> x&y", "z") == "<ins>&lt;b&gt; x&amp;y</ins>"


def test_what_the_answer_lacks_is_marked_in_the_reference_and_not_the_other_way_round():
    _, html, _ = made()
    report, answers = report_and_answers()
    example = chosen(report, answers)[0].answers
    assert str(missed(example.reference, example.texts["distilled"])) in html
    assert str(marked(example.texts["distilled"], example.reference)) in html


def test_all_rows_stand_in_the_table_without_a_script_and_its_controls_are_hidden_until_one_runs():
    report, html, _ = made(rows=60)
    table = section(html, "rows")
    assert table.count("<tr data-type=") == 60
    assert re.search(r'id="rows-controls"[^>]* hidden>', table)
    assert {row.type for row in report.rows} == set(re.findall(r'<option value="(\w+)">', table))
    assert words(table).count("(empty)") == 1


def test_answers_that_are_not_one_a_row_are_refused():
    report, answers = report_and_answers(rows=5)
    with pytest.raises(ValueError, match="shorter"):
        page(report, answers[:-1])


def test_hashes_versions_seed_settings_caveats_and_what_was_not_scored_are_there_each_once():
    report, html, parsed = made()
    text = markdown(report)
    for found in (parsed.text, text):
        assert "ab" * 32 in found
        assert "0.1.2" in found
        assert "1,000 resamples, seed 3" in found
        assert found.count(report.notes[0]) == 1
        assert found.count("extra-down is not scored: no answer from http://127.0.0.1:9/v1.") == 1
    assert "harvest / samples" in parsed.text
    assert r'harvest / stop "\n"' in words(section(html, "provenance"))


def test_nothing_that_was_counted_or_set_looks_like_nothing():
    assert list(figures.flat({"failed": {}, "stop": ["\n", "a"], "shots": [], "key": "", "n": 1234, "on": True})) == [
        ("failed", "none"),
        ("stop", '"\\n", a'),
        ("shots", "none"),
        ("key", '""'),
        ("n", "1,234"),
        ("on", "yes"),
    ]


def test_the_judges_verdicts_and_the_overlaps_are_told_in_numbers():
    report, html, _ = made(judge=True, overlaps=3)
    verdict = report.judge.verdicts[0]
    assert f"{verdict.theirs} {verdict.wins} {verdict.ties} {verdict.losses} 62.5% 50.0 to 75.0% 5 0" in words(section(html, "judge"))
    leaks = words(section(html, "leakage"))
    assert "3 overlaps of test rows with other splits, 1 of them allowed" in leaks
    assert "q-2 t-2 train near-question 62% no" in leaks
    assert "| 20 / 10 / 10 | 62.5% |" in markdown(report)
    assert "train or validation: 3, 1 of them allowed" in markdown(report)


def test_markdown_escapes_what_would_break_its_tables_or_become_markup():
    report, _ = report_and_answers(evil=True, judge=True, overlaps=1)
    text = markdown(report)
    assert "<script" not in text
    assert "<img" not in text
    in_table = 0
    for line in text.splitlines():
        if line.startswith("|"):
            columns = len(re.findall(r"(?<!\\)\|", line))
            in_table = in_table or columns
            assert columns == in_table, line
        else:
            in_table = 0
    assert r"\| 'pipe' \`tick\`" in text


def test_markdown_leaves_names_with_underscores_whole():
    report, _ = report_and_answers()
    assert "over max_rejected" in markdown(report)
    assert "rouge_score 0.1.2" in markdown(report)


@pytest.mark.parametrize(
    ("value", "shown"), [(0.4, "0.4 s"), (59.99, "60.0 s"), (97.7, "1 min 38 s"), (3600, "1 h 00 min"), (7384, "2 h 03 min")]
)
def test_a_duration_is_said_in_its_largest_units(value, shown):
    assert figures.seconds(value) == shown


@pytest.mark.parametrize(
    ("value", "shown"), [(0, "0 bytes"), (999, "999 bytes"), (39143, "39.1 kB"), (10**8, "100.0 MB"), (538 * 10**7, "5.4 GB")]
)
def test_a_size_is_said_in_the_unit_that_fits(value, shown):
    assert figures.size(value) == shown


def test_p_is_never_shown_as_zero():
    assert figures.p_value(0.00001) == "<0.0001"
    assert figures.p_value(0.0001) == "0.0001"
    assert figures.p_value(None) == figures.NONE
