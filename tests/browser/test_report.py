"""The report in a real Chromium: drawn, quiet, legible on paper, on a phone and in the dark, its table filtered by hand and by keyboard."""

from __future__ import annotations

import pytest
from contrast import CONTRASTS, LEAST_CONTRAST
from reports import report_and_answers

from evaluator.report.page import page as report_page

# boxes of no size, and shapes that draw nothing
NOT_DRAWN = """() => Array.from(document.querySelectorAll("svg:not(.shape)")).filter((svg) => {
  if (!svg.checkVisibility()) return false;
  const box = svg.getBoundingClientRect();
  const paths = Array.from(svg.querySelectorAll("path")), shapes = svg.querySelectorAll("path, rect, circle, line");
  return box.width === 0 || box.height === 0 || shapes.length === 0 || paths.some((p) => !/^M[-\\d. ]/.test(p.getAttribute("d")));
}).map((svg) => svg.outerHTML.slice(0, 200))"""
SHOWN = "#rows-table tbody tr:not([hidden])"


def column(page, name):
    """A number of each shown row, in the order of the table."""
    return page.eval_on_selector_all(SHOWN, f"rows => rows.map(row => Number(row.dataset.{name}))")


def test_the_page_opens_without_a_message_and_asks_for_nothing_but_itself(opened, report_file):
    report = opened()
    report.page.wait_for_load_state("networkidle")
    assert report.messages == []
    assert report.requests == [report_file.as_uri()]


def test_every_chart_is_drawn_also_the_folded_ones(opened):
    page = opened().page
    page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    assert page.locator("svg.panel").count() >= 4
    assert page.locator("svg.whisker").count() >= 10
    assert page.evaluate(NOT_DRAWN) == []


def test_lines_of_training_have_a_length(opened):
    page = opened().page
    lengths = page.eval_on_selector_all("#training path.line:not(.raw)", "paths => paths.map(p => p.getTotalLength())")
    assert all(length > 0 for length in lengths)


def test_typing_leaves_the_rows_that_hold_every_word_and_says_how_many(opened):
    page = opened().page
    total = page.locator("#rows-table tbody tr").count()
    assert page.locator("#rows-count").inner_text() == f"{total} of {total} rows shown"
    wanted = page.locator("#rows-table tbody tr .said").first.inner_text().split()[:3]
    page.locator("#rows-text").fill(" ".join(wanted).upper())
    expected = page.eval_on_selector_all(
        "#rows-table tbody tr",
        """(rows, words) => rows.filter(row => {
             const text = Array.from(row.querySelectorAll('.said'), c => c.textContent).join(' ').toLowerCase();
             return words.every(w => text.includes(w.toLowerCase()));
           }).length""",
        wanted,
    )
    assert page.locator(SHOWN).count() == expected
    page.locator("#rows-text").fill("no row has zzqx in it")
    assert page.locator(SHOWN).count() == 0
    assert page.locator("#rows-count").inner_text() == f"0 of {total} rows shown"
    page.locator("#rows-text").fill("")
    assert page.locator(SHOWN).count() == total


def test_a_type_leaves_its_rows_and_goes_together_with_the_text(opened):
    page = opened().page
    kind = page.locator("#rows-type option").nth(1).get_attribute("value")
    page.locator("#rows-type").select_option(kind)
    assert set(page.eval_on_selector_all(SHOWN, "rows => rows.map(row => row.dataset.type)")) == {kind}
    page.locator("#rows-text").fill("no row has zzqx in it")
    assert page.locator(SHOWN).count() == 0


@pytest.mark.parametrize(
    ("order", "name", "down"),
    [("gain:down", "gain", True), ("gain:up", "gain", False), ("score:down", "score", True), ("length:up", "words", False)],
)
def test_an_order_sorts_the_rows_and_the_first_one_brings_back_that_of_the_test_split(opened, order, name, down):
    page = opened().page
    before = page.eval_on_selector_all(SHOWN, "rows => rows.map(row => row.cells[0].textContent)")
    page.locator("#rows-order").select_option(order)
    values = column(page, name)
    assert values == sorted(values, reverse=down)
    page.locator("#rows-order").select_option("index:up")
    assert page.eval_on_selector_all(SHOWN, "rows => rows.map(row => row.cells[0].textContent)") == before


def test_the_table_is_filtered_and_sorted_by_keyboard_alone_and_the_focus_can_be_seen(opened):
    page = opened().page
    page.locator("#rows-text").focus()
    page.keyboard.type("zzqx")
    assert page.locator(SHOWN).count() == 0
    page.keyboard.press("Escape")
    assert page.locator(SHOWN).count() > 0
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "rows-type"
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("ArrowDown")
    assert page.locator("#rows-type").input_value() != ""
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowDown")
    assert page.locator("#rows-order").input_value() == "gain:down"
    values = column(page, "gain")
    assert values == sorted(values, reverse=True)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.getAttribute('aria-label')") == "All test rows"


def test_without_scripts_all_rows_are_there_and_no_control_that_would_do_nothing(opened):
    page = opened(java_script_enabled=False).page
    assert page.locator("#rows-table tbody tr").count() == page.locator("#rows-table tbody tr:visible").count() > 0
    assert page.locator("#rows-controls").is_hidden()


@pytest.mark.parametrize("width", [320, 360, 390, 768, 1280])
def test_the_body_never_scrolls_sideways_with_everything_unfolded(opened, width):
    page = opened(width=width).page
    for unfold in (False, True):
        page.evaluate("open => document.querySelectorAll('details').forEach(d => { d.open = open; })", unfold)
        assert page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_all_text_stands_out_from_what_is_under_it_by_day_and_by_night(opened, keep_shot, scheme, width):
    page = opened(width=width, color_scheme=scheme).page
    keep_shot(page, f"report-{width}-{scheme}")
    page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    found = page.evaluate(CONTRASTS)
    assert len(found) > 100
    assert [text for contrast, text in found if contrast < LEAST_CONTRAST] == []
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number).every(v => v < 80)")
    assert dark == (scheme == "dark")


def test_print_is_dark_on_white_whatever_the_screen_without_controls_and_cuts_no_table_off(opened, keep_shot):
    page = opened(width=690, color_scheme="dark").page
    folded = page.locator("details:not([open])").count()
    page.emulate_media(media="print", color_scheme="dark")
    keep_shot(page, "report-print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert [text for contrast, text in page.evaluate(CONTRASTS) if contrast < LEAST_CONTRAST] == []
    assert page.locator("#rows-controls").is_hidden()
    assert page.locator("nav").is_hidden()
    assert page.locator("details:not([open])").count() == folded
    cut_off = "Array.from(document.querySelectorAll('.scroll')).filter(b => getComputedStyle(b).overflowX !== 'visible').length"
    assert page.evaluate(cut_off) == 0
    assert page.pdf(format="A4").startswith(b"%PDF")


def test_what_models_and_data_say_cannot_act(opened, tmp_path):
    file = tmp_path / "evil.html"
    file.write_text(report_page(*report_and_answers(evil=True, judge=True, overlaps=1)), encoding="utf-8")
    report = opened(file)
    report.page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    report.page.locator("#rows-text").fill("alert")
    report.page.locator("#rows-type").select_option(index=1)
    assert report.dialogs == []
    assert report.messages == []
    assert report.requests == [file.as_uri()]
    assert report.page.locator("script").count() == 1
    assert report.page.locator("img").count() == 0
    assert report.page.locator(SHOWN).count() >= 1
    assert report.page.evaluate("document.documentElement.scrollWidth") <= 1280


def test_a_script_that_got_in_all_the_same_would_not_be_run(opened, report_file, tmp_path):
    file = tmp_path / "broken.html"
    html = report_file.read_text(encoding="utf-8")
    file.write_text(
        html.replace("</main>", "<script>document.title = 'run'</script><img src='http://127.0.0.1:9/x'></main>"), encoding="utf-8"
    )
    report = opened(file)
    assert report.page.title() != "run"
    assert len([m for m in report.messages if "Content Security Policy" in m]) == 2
    # Chromium tells of a request that it then blocks: none may have been answered or tried on the network
    assert not any("127.0.0.1" in m and "ERR_CONNECTION" in m for m in report.messages)


def test_a_report_of_one_row_without_training_is_drawn_too(opened, tmp_path):
    file = tmp_path / "one.html"
    file.write_text(report_page(*report_and_answers(rows=1, rounds=0)), encoding="utf-8")
    report = opened(file, width=360)
    assert report.messages == []
    assert report.page.evaluate(NOT_DRAWN) == []
    assert report.page.evaluate("document.documentElement.scrollWidth") <= 360
    assert report.page.locator("#rows-count").inner_text() == "1 of 1 rows shown"
