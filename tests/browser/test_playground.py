"""The student's page in a real Chromium, over a server that says what a test wants and then over the real one."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import subprocess
import sys

import pytest
from contrast import CONTRASTS, LEAST_CONTRAST
from evaluated import recipe
from monitored import train
from playwright.sync_api import expect
from scripted_student import NOTHING, RUN, SCORES, STATE, Script, serving
from tiny_servable import servable_t5

from shared.artifacts import Run
from shared.contracts import Example
from shared.engines.convert import convert
from shared.engines.scripted import ScriptedEngine
from shared.http.app import create_app
from shared.http.keys import KeyEntry, Keys
from shared.registry import promote
from shared.settings import TaskSettings
from student_trainer.serving.app import student_app
from student_trainer.serving.settings import StudentServiceSettings

EVIL = "</script><script>alert('x')</script> <img src=x onerror=alert(1)> **bold** [a](javascript:alert(2)) <b>&amp;</b>"
TRICKY = "It's \"5 mg\" for $5 or `id` or $(id) \\ \\n %s !!\n\n@next 'line' — Überdosis? 💊"
QUESTION = "I take ibuprofen against migraine."


@pytest.fixture
def visit(visited, student):
    """The page of the scripted student, once it knows who is served."""

    def visit(ready: bool = True, **how):
        found = visited(student.url, **how)
        if ready:
            expect(found.page.locator("#ask")).to_be_enabled()
        return found

    return visit


def card(page, model):
    return page.locator(".answer", has=page.get_by_role("heading", name=model, exact=True))


def said(page, model):
    return card(page, model).locator(".said")


def ask(page, question=QUESTION):
    page.get_by_label("Your question").fill(question)
    page.get_by_role("button", name="Ask").click()


def ended(page):
    expect(page.locator("#stop")).to_be_disabled()


def until(page, holds):
    """Give the server up to twenty seconds to notice."""
    for _ in range(200):
        if holds():
            return
        page.wait_for_timeout(100)
    assert holds()


def unlock(page, key):
    expect(page.get_by_label("API key", exact=True)).to_be_focused()
    page.keyboard.type(key)
    page.keyboard.press("Enter")
    expect(page.locator("#ask")).to_be_enabled()


def no_wider_than(page, width):
    return page.evaluate("document.documentElement.scrollWidth") <= width


def test_the_page_says_what_is_served_how_good_it_is_and_where_the_report_is(visit):
    page = visit().page
    expect(page.get_by_role("heading", name="Serving")).to_have_text(f"Serving {STATE['version']}")
    expect(page.locator("#about")).to_contain_text("Recipe offline-demo, promoted ")
    figures = page.locator("#scores div").all_inner_texts()
    assert [f.split() for f in figures] == [
        ["ROUGE-1", "45.1", "of", "100"],
        ["ROUGE-2", "22.0", "of", "100"],
        ["ROUGE-L", "41.1", "of", "100"],
        ["BLEU", "16.9", "of", "100"],
    ]
    assert page.get_by_role("link", name="the report").get_attribute("href") == "report"
    expect(page.locator("#canary")).to_be_hidden()


def test_a_canary_is_told_with_its_share_and_its_scores(visit, student):
    student.state["canary"] = {"version": "20261127-next", "share": 0.1, "scores": {"rougeL": 0.43}}
    expect(visit().page.locator("#canary")).to_have_text("Canary: 10 % of the requests go to 20261127-next (ROUGE-L 43.0).")


def test_what_there_is_not_is_not_shown(visit, student):
    student.state |= {"samples": [], "report": False, "models": ["student"], "scores": {}}
    page = visit().page
    for hidden in ("#pick", "#report", "#canary", "#run", "#lock", "#scores"):
        expect(page.locator(hidden)).to_be_hidden()
    assert page.locator(".answer").count() == 1


def test_a_page_in_use_asks_nobody_else_and_says_nothing_on_the_console(visit, student):
    student.run = RUN
    found = visit()
    ask(found.page)
    ended(found.page)
    found.page.wait_for_timeout(2500)
    assert found.messages == []
    assert all(url.startswith((f"{student.url}/", "data:")) for url in found.requests)


def test_all_models_are_asked_at_once_and_each_answer_comes_word_by_word_beside_the_others(visit, student):
    student.scripts = {
        "student": Script(("Which", " tablets?")),
        "base": Script(("ibuprofen", " ibuprofen"), pause_s=0.1),
        "teacher": Script(("Can I", " take it", " daily?"), pause_s=4.0),
    }
    page = visit().page
    ask(page)
    expect(said(page, "teacher")).to_have_text("Can I")
    expect(said(page, "student")).to_have_text("Which tablets?")
    expect(said(page, "base")).to_have_text("ibuprofen ibuprofen")
    expect(card(page, "teacher")).to_have_attribute("aria-busy", "true")
    expect(card(page, "student")).to_have_attribute("aria-busy", "false")
    ended(page)
    expect(said(page, "teacher")).to_have_text("Can I take it daily?")
    first, total = (int(text.removesuffix(" ms")) for text in card(page, "teacher").locator("dd").all_inner_texts())
    assert 4000 <= first < total - 4000
    assert total >= 12_000
    assert [body["model"] for body in student.asked] == ["student", "base", "teacher"]
    assert all(body | {"model": ""} == {"model": "", "question": QUESTION, "truncate": True, "stream": True} for body in student.asked)


def test_screen_readers_hear_that_models_are_asked_and_what_they_said_in_the_end_and_no_word_between(visit, student):
    student.scripts = {"student": Script(("Which", " tablets", " go?"), pause_s=0.1), "base": Script(status=503, error="busy")}
    student.state["models"] = ["student", "base"]
    page = visit().page
    page.evaluate("""() => {
      window.heard = [];
      new MutationObserver(() => heard.push(document.getElementById("spoken").textContent))
        .observe(document.getElementById("spoken"), {childList: true, characterData: true, subtree: true});
    }""")
    ask(page)
    ended(page)
    assert page.evaluate("heard") == ["Asking student, base.", "student: Which tablets go?\nbase: No answer: busy"]
    assert page.locator(".answer [aria-live], .answer [role=status], .answer [role=alert]").count() == 0


def test_an_answer_cut_at_its_length_and_a_question_that_was_cut_are_told(visit, student):
    student.scripts = {"student": Script(truncated=True), "base": Script(finish_reason="length"), "teacher": Script(pieces=("", " "))}
    page = visit().page
    ask(page, "long " * 100)
    ended(page)
    expect(page.locator("#size")).to_contain_text("499 of 400 characters: its middle will be cut")
    told = "The question was longer than the 400 characters this student reads; its middle was cut."
    expect(card(page, "student")).to_contain_text(told)
    expect(card(page, "base")).not_to_contain_text(told)
    expect(card(page, "base")).to_contain_text("Cut off at its length limit.")
    expect(card(page, "teacher")).to_contain_text("It said nothing.")


@pytest.mark.parametrize(
    ("script", "told"),
    [
        (Script(status=503, error="the teacher does not answer"), "No answer: the teacher does not answer"),
        (Script(error="the engine is gone"), "No answer: the engine is gone"),
        (Script(breaks_off=True), "No answer: the answer broke off"),
    ],
)
def test_an_error_stands_in_its_own_card_and_the_others_go_on(visit, student, script, told):
    student.scripts = {"teacher": script, "student": Script(("All", " well."), pause_s=0.2)}
    page = visit().page
    ask(page)
    expect(card(page, "teacher").locator(".bad")).to_have_text(told)
    ended(page)
    expect(said(page, "student")).to_have_text("All well.")
    assert page.locator(".answer .bad").count() == 1


def test_stop_ends_every_answer_keeps_what_came_and_hangs_up(visit, student):
    student.scripts = {"teacher": Script(("A",) * 100, pause_s=0.1), "student": Script(("Done.",))}
    page = visit().page
    ask(page)
    expect(said(page, "teacher")).to_have_text(re.compile("^A"))
    page.get_by_role("button", name="Stop").focus()
    page.keyboard.press("Enter")
    ended(page)
    assert page.evaluate("document.activeElement.id") == "ask"
    expect(card(page, "teacher")).to_contain_text(re.compile(r"Stopped after \d+ ms\."))
    kept = said(page, "teacher").inner_text()
    page.wait_for_timeout(400)
    assert said(page, "teacher").inner_text() == kept
    until(page, lambda: student.hung_up == ["teacher"])
    expect(said(page, "student")).to_have_text("Done.")


def test_asking_again_gives_up_what_was_asked_before_and_nothing_of_it_comes_in(visit, student):
    student.scripts = {"student": Script(("old ",) * 100, pause_s=0.05)}
    page = visit().page
    ask(page)
    expect(said(page, "student")).to_contain_text("old")
    student.scripts = {"student": Script(("new",))}
    ask(page, "Another?")
    ended(page)
    page.wait_for_timeout(300)
    expect(said(page, "student")).to_have_text("new")
    expect(card(page, "student")).not_to_contain_text("Stopped")
    until(page, lambda: student.hung_up == ["student"])


def test_nothing_is_sent_without_a_question(visit, student):
    page = visit().page
    ask(page, " \n ")
    expect(page.locator("#spoken")).to_have_text("Write a question first.")
    assert page.evaluate("document.activeElement.id") == "question"
    assert student.asked == []


def test_what_a_model_and_a_server_say_stays_text(visit, student):
    student.scripts = {"student": Script((EVIL[:12], EVIL[12:])), "base": Script(error=EVIL), "teacher": Script(status=500, error=EVIL)}
    student.state |= {"version": EVIL, "name": EVIL, "samples": [EVIL], "reason": EVIL}
    student.state["canary"] = {"version": EVIL, "share": 0.5, "scores": {EVIL: 1.0}}
    stage = {"stage": EVIL, "state": "done", "rows": 1, "seconds": 1.0}
    student.run = {**RUN, "name": EVIL, "error": EVIL, "stages": [stage]}
    found = visit()
    elements = found.page.locator("script, img, b, a").count()
    found.page.locator("#sample").select_option(index=1)
    found.page.get_by_role("button", name="Ask").click()
    ended(found.page)
    expect(found.page.locator("#run")).to_be_visible()
    assert said(found.page, "student").inner_text() == EVIL
    expect(card(found.page, "teacher").locator(".bad")).to_have_text(f"No answer: {EVIL}")
    assert found.dialogs == []
    assert found.page.locator("script").count() == 1
    assert found.page.locator("img").count() == 0
    assert found.page.locator("script, img, b, a").count() <= elements + 2  # the run's two lines have a <b> each
    assert all(url.startswith((f"{student.url}/", "data:image/svg")) for url in found.requests)


def test_a_page_that_came_too_early_recovers_by_itself(visit, student):
    student.state = NOTHING
    found = visit(ready=False)
    expect(found.page.locator("#state")).to_have_text("Nothing is served yet: no version is promoted in /registry yet")
    expect(found.page.locator("#ask")).to_be_disabled()
    found.page.get_by_label("Your question").fill(QUESTION)
    student.state = STATE
    expect(found.page.locator("#ask")).to_be_enabled(timeout=30_000)
    expect(found.page.locator("#state")).to_have_text(f"Serving {STATE['version']}")
    assert found.page.get_by_label("Your question").input_value() == QUESTION
    assert found.requests.count(f"{student.url}/") == 1


def test_a_server_that_does_not_answer_is_told_and_looked_for_again(visit):
    found = visit()
    found.page.route("**/v1/*", lambda route: route.abort())
    ask(found.page)
    expect(found.page.locator("#state")).to_have_text("Nothing can be asked at present: the server does not answer; trying again")
    expect(card(found.page, "student")).to_contain_text("No answer: the server does not answer")
    found.page.unroute("**/v1/*")
    expect(found.page.locator("#ask")).to_be_enabled(timeout=30_000)


def test_a_key_is_asked_for_and_is_in_no_url_no_storage_and_nowhere_in_the_page(visit, student):
    student.key, student.run = "sk-secret-key", RUN
    found = visit(ready=False)
    page = found.page
    field = page.get_by_label("API key", exact=True)
    expect(field).to_be_focused()
    assert field.get_attribute("type") == "password"
    assert field.get_attribute("autocomplete") == "off"
    assert field.get_attribute("name") is None
    expect(page.locator("#form")).to_be_hidden()
    page.keyboard.type("wrong")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("This key is not accepted: ")
    expect(field).to_be_focused()
    assert field.input_value() == ""
    page.keyboard.type("schlüssel")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("letters of ASCII alone")
    page.keyboard.type(student.key)
    page.keyboard.press("Enter")
    expect(page.locator("#lock")).to_be_hidden()
    expect(page.get_by_label("Your question")).to_be_focused()
    ask(page)
    ended(page)
    expect(said(page, "student")).to_have_text("What is a stye?")
    expect(page.locator("#run")).to_be_visible()
    expect(page.locator("#curl")).to_contain_text('-H "authorization: Bearer $KEY"')
    expect(page.locator("#Python")).to_contain_text('api_key=os.environ["KEY"]')
    assert student.key not in page.content()
    assert (
        page.evaluate("JSON.stringify([localStorage, sessionStorage, document.cookie, location.href, history.state])").count("secret") == 0
    )
    assert not [url for url in found.requests if "secret" in url or "wrong" in url or "?" in url]
    assert all("401" in message for message in found.messages)
    page.reload()
    expect(field).to_be_focused()


def test_a_question_that_a_key_ran_out_on_is_asked_again_with_the_next_one(visit, student):
    page = visit().page
    student.key = "sk-new"
    ask(page)
    expect(page.get_by_label("API key", exact=True)).to_be_focused()
    page.keyboard.type("sk-new")
    page.keyboard.press("Enter")
    expect(said(page, "teacher")).to_have_text("What is a stye?")
    assert [body["question"] for body in student.asked] == [QUESTION] * 3


@pytest.mark.parametrize("key", [None, "sk-secret-key"])
def test_the_report_opens_beside_the_page_with_and_without_a_key(visit, student, key):
    student.key = key
    found = visit(ready=key is None)
    if key:
        unlock(found.page, key)
    with found.page.context.expect_page() as opened:
        found.page.get_by_role("link", name="the report").click()
    expect(opened.value.get_by_role("heading", name="The report")).to_be_visible()
    assert opened.value.url.startswith("blob:" if key else f"{student.url}/report")
    assert not any("secret" in url for url in found.requests)


def test_the_run_is_told_stage_by_stage_with_how_far_it_is_and_its_loss(visit, student, keep_shot):
    student.run = {**RUN, "error": "evaluation/manifest.json is damaged"}
    page = visit().page
    expect(page.locator("#run-name")).to_contain_text("Run offline-demo begun ")
    rows = [row.split("\t") for row in page.locator("#stages tr").all_inner_texts()]
    assert [cell.strip() for cell in rows[1]] == ["responses/teacher", "● done", "440", "32.1"]
    assert [row[1].strip()[2:] for row in rows] == ["done", "done", "done", "outdated", "in part", "to come", "to come"]
    expect(page.locator("#harvest")).to_contain_text("212 of 440 answers · 13.3 a second · 3 failed")
    expect(page.locator("#training")).to_contain_text("47 of 90 steps · 803.2 tokens a second")
    assert page.locator("progress").evaluate_all("bars => bars.map(bar => bar.value / bar.max)") == [212 / 440, 47 / 90]
    expect(page.locator("#run-error")).to_contain_text("evaluation/manifest.json is damaged")
    curve = page.get_by_role("img", name="Loss of round 0")
    expect(curve.locator("desc")).to_have_text(re.compile(r"From 3\.\d+ at step 1 to .* at step 47; lowest "))
    assert {"Loss", "Optimizer step", "0"} <= set(curve.locator("text").all_text_contents())
    assert curve.locator("path").evaluate_all("paths => paths.map(path => path.getTotalLength() > 100)") == [True, True]
    box = curve.bounding_box()
    for text in curve.locator("text").all():
        inner = text.bounding_box()
        assert box["x"] - 1 <= inner["x"]
        assert inner["x"] + inner["width"] <= box["x"] + box["width"] + 1


@pytest.mark.parametrize(
    "loss", [[], [[1, 2.5]], [[1, 0.0], [2, 0.0]], [[1, -3.0], [2, -1.0]], [[s, 1e6 / s] for s in range(1, 201)], [[1, 1e-5], [2, 2e-5]]]
)
def test_a_loss_of_any_size_is_drawn(visit, student, loss):
    student.run = {**RUN, "harvest": None, "training": {**RUN["training"], "loss": loss, "wanted_steps": None}}
    found = visit(width=360)
    expect(found.page.locator("#training")).to_contain_text("47 steps")
    assert found.messages == []
    assert found.page.locator("#curve svg").count() == (1 if loss else 0)
    assert "NaN" not in found.page.locator("#curve").inner_html()
    assert 2 < found.page.locator("#curve text").count() < 16 or not loss
    assert no_wider_than(found.page, 360)


def test_the_run_is_followed_while_somebody_sees_the_page_and_only_then(visit, student):
    student.run = {**RUN, "harvest": {**RUN["harvest"], "answers": 5, "state": "dead", "rows_per_s": None}}
    page = visit().page
    expect(page.locator("#harvest")).to_contain_text("5 of 440 answers, not heard of any more · 3 failed")
    student.run = {**RUN, "harvest": {**RUN["harvest"], "answers": 440, "state": "ended", "rows_per_s": None}, "training": None}
    expect(page.locator("#harvest")).to_contain_text("440 of 440 answers, ended", timeout=30_000)
    expect(page.locator("#curve svg")).to_have_count(0)
    page.evaluate("""state => {
      Object.defineProperty(document, "visibilityState", {get: () => window.seen, configurable: true});
      window.seen = "hidden";
      document.dispatchEvent(new Event("visibilitychange"));
    }""")
    page.wait_for_timeout(300)
    before = len(student.looks)
    page.wait_for_timeout(2500)
    assert len(student.looks) == before
    page.evaluate("window.seen = 'visible'; document.dispatchEvent(new Event('visibilitychange'))")
    until(page, lambda: len(student.looks) == before + 1)


def test_a_run_that_is_not_there_is_not_asked_for_again_within_a_minute_and_then_it_is(visit, student):
    found = visit(before=lambda page: page.clock.install())
    page = found.page
    until(page, lambda: len(student.looks) == 1)
    page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    page.clock.run_for(50_000)
    page.wait_for_timeout(300)
    assert len(student.looks) == 1
    student.run = RUN
    page.clock.run_for(11_000)
    expect(page.locator("#run")).to_be_visible()


def test_a_sample_is_a_question_to_ask_and_to_change(visit, student):
    page = visit().page
    page.get_by_label("Or one of the test split").select_option(index=2)
    assert page.get_by_label("Your question").input_value() == STATE["samples"][1]
    expect(page.locator("#curl")).to_contain_text(STATE["samples"][1])
    page.get_by_label("Your question").press("End")
    page.keyboard.type(" Really?")
    assert page.locator("#sample").input_value() == ""
    page.keyboard.press("Control+Enter")
    ended(page)
    assert student.asked[0]["question"] == STATE["samples"][1] + " Really?"


def test_the_page_is_used_by_keyboard_alone_and_the_focus_can_be_seen(visit, student):
    student.run = RUN
    page = visit().page
    reached = []
    for _ in range(12):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.textContent"))
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
        if reached[-1] == "question":
            page.keyboard.type(QUESTION)
        if reached[-1] == "ask":
            page.keyboard.press("Enter")
            ended(page)
        if len(reached) > 2 and reached[-1].startswith("Everything"):
            break
    assert [name for name in reached if name in ("question", "sample", "ask", "curl", "Python")] == [
        "question",
        "sample",
        "ask",
        "curl",
        "Python",
    ]
    assert [body["question"] for body in student.asked] == [QUESTION] * 3


def test_every_field_and_button_has_a_name_and_headings_follow_one_another(visit, student):
    student.run = RUN
    page = visit().page
    levels = page.locator("h1:visible, h2:visible, h3:visible").evaluate_all("all => all.map(h => Number(h.tagName[1]))")
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    nameless = page.locator("button, select, textarea, input, progress").evaluate_all(
        "all => all.filter(e => !(e.ariaLabel || e.labels?.[0]?.textContent || e.textContent.trim())).map(e => e.outerHTML)"
    )
    assert nameless == []
    duplicates = page.evaluate("Array.from(document.querySelectorAll('[id]'), e => e.id).filter((id, i, all) => all.indexOf(id) !== i)")
    assert duplicates == []


@pytest.mark.parametrize("width", [360, 390, 800, 1280])
def test_nothing_is_wider_than_the_screen(visit, student, width):
    long = "pneumonoultramicroscopicsilicovolcanoconiosis" * 8
    student.run = {**RUN, "error": long}
    student.state |= {"version": long[:64], "samples": [long]}
    student.scripts = {"student": Script((long,)), "base": Script(error=long)}
    page = visit(width=width).page
    ask(page, long)
    ended(page)
    expect(page.locator("#run")).to_be_visible()
    assert no_wider_than(page, width)


def test_a_phone_that_asks_sees_the_first_answer(visit):
    page = visit(width=390).page
    ask(page)
    ended(page)
    expect(said(page, "student")).to_be_in_viewport()


def test_a_phone_shows_the_form_for_a_key_whole(visit, student):
    student.key = "k"
    page = visit(ready=False, width=360).page
    expect(page.locator("#lock")).to_be_visible()
    assert no_wider_than(page, 360)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_all_text_stands_out_from_what_is_under_it_by_day_and_by_night(visit, student, keep_shot, scheme, width):
    student.run = {**RUN, "error": "a part cannot be read"}
    student.state["canary"] = {"version": "20261127-next", "share": 0.1, "scores": {"rougeL": 0.43}}
    student.scripts = {"base": Script(finish_reason="length"), "teacher": Script(status=503, error="the teacher does not answer")}
    page = visit(width=width, color_scheme=scheme).page
    expect(page.locator("#run")).to_be_visible()
    ask(page)
    ended(page)
    keep_shot(page, f"playground-{width}-{scheme}")
    found = page.evaluate(CONTRASTS)
    assert len(found) > 60
    assert [text for contrast, text in found if contrast < LEAST_CONTRAST] == []
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number).every(v => v < 80)")
    assert dark == (scheme == "dark")


def test_nothing_moves_for_those_who_want_no_motion(visit, student):
    student.scripts = {"student": Script(("slow",), pause_s=10.0)}
    blinks = "getComputedStyle(document.querySelector('[aria-busy=true] .said'), '::after').animationName"
    page = visit().page
    ask(page)
    assert page.evaluate(blinks) == "blink"
    page = visit(reduced_motion="reduce").page
    ask(page)
    assert page.evaluate(blinks) == "none"


def test_the_curl_line_asks_through_a_shell_what_the_page_asks(visit, student, tmp_path):
    page = visit().page
    page.get_by_label("Your question").fill(TRICKY)
    shown = page.locator("#curl").text_content()
    (tmp_path / "curl").write_text(f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n")
    (tmp_path / "curl").chmod(0o755)
    done = subprocess.run(["bash", "-c", shown], env={"PATH": f"{tmp_path}:{os.environ['PATH']}"}, capture_output=True, text=True)
    assert done.stderr == ""
    url, *options = json.loads(done.stdout)
    assert url == f"{student.url}/v1/generate"
    assert options[:-1] == ["-H", "content-type: application/json", "-d"]
    assert json.loads(options[-1]) == {"question": TRICKY, "truncate": True}


@pytest.mark.parametrize("key", [None, "sk-secret-key"])
def test_the_python_lines_ask_what_the_page_asks(visit, student, key):
    student.key = key
    page = visit(ready=key is None).page
    if key:
        unlock(page, key)
    page.get_by_label("Your question").fill(TRICKY)
    shown = page.locator("#Python").text_content()
    done = subprocess.run([sys.executable, "-c", shown], env={**os.environ, "KEY": key or ""}, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("What is a stye?\n", "")
    assert student.asked == [{"question": TRICKY, "truncate": True}]


@pytest.mark.parametrize("allowed", [True, False])
def test_a_snippet_is_copied_whole_also_where_the_clipboard_may_not_be_written_to(visit, student, allowed):
    student.run = RUN
    hide = "Object.defineProperty(navigator, 'clipboard', {value: undefined})"
    found = visit(before=lambda page: None if allowed else page.add_init_script(hide), permissions=["clipboard-read", "clipboard-write"])
    page = found.page
    page.get_by_label("Your question").fill(TRICKY)
    page.get_by_role("button", name="Copy the curl snippet").click()
    expect(page.get_by_role("button", name="Copy the curl snippet")).to_have_text("Copied")
    if allowed:
        assert page.evaluate("navigator.clipboard.readText()") == page.locator("#curl").text_content()
    assert found.messages == []


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A serving folder of a random model."""
    root = tmp_path_factory.mktemp("tiny")
    return convert(str(servable_t5(root / "hf")), root / "serving", name="tiny", quantization="float32")


def promote_tiny(registry, folder):
    row = Example(id="q-1", question="word1 word2 word3", summary="word1?")
    attachments = [("report.html", "<!doctype html><title>r</title><h1>The report</h1>"), ("test.jsonl", row.model_dump_json() + "\n")]
    task = TaskSettings(shots=0, max_question_chars=40).model_dump()
    return promote(registry, folder, name="tiny", task=task, scores=SCORES, run="r", reason="a test", attachments=attachments)


def test_the_real_server_from_nothing_promoted_to_three_answers_side_by_side(visited, tiny, tmp_path):
    run = Run.open(tmp_path / "run", recipe())
    train(run)
    with serving(create_app(ScriptedEngine(), model="teacher", title="Teacher")) as teacher:
        settings = StudentServiceSettings(
            registry=tmp_path / "registry", base=str(tiny), teacher_url=f"{teacher}/v1", threads="1x1", run=run.path
        )
        with serving(student_app(settings)) as url:
            found = visited(url)
            page = found.page
            expect(page.locator("#state")).to_contain_text("Nothing is served yet: ")
            version = promote_tiny(tmp_path / "registry", tiny).version
            expect(page.locator("#state")).to_have_text(f"Serving {version}", timeout=20_000)
            page.locator("#sample").select_option(index=1)
            page.get_by_role("button", name="Ask").click()
            expect(said(page, "teacher")).to_have_text("What should I know about word?", timeout=20_000)
            expect(said(page, "student")).to_have_text(re.compile("word|end"))
            expect(said(page, "base")).to_have_text(said(page, "student").inner_text())
            ask(page, "word4 " * 20)
            ended(page)
            expect(card(page, "student")).to_contain_text("longer than the 40 characters this student reads")
            expect(page.locator("#run-name")).to_contain_text("Run trial")
            expect(page.locator("#training")).to_contain_text("3 of 18 steps")
            with page.context.expect_page() as opened:
                page.get_by_role("link", name="the report").click()
            expect(opened.value.get_by_role("heading", name="The report")).to_be_visible()
            assert found.messages == []
            assert found.requests.count(f"{url}/") == 1


def test_the_real_server_wants_its_key_and_the_page_and_its_lines_get_on_with_it(visited, tiny, tmp_path):
    promote_tiny(tmp_path / "registry", tiny)
    key = "a-key-of-43-letters-that-nobody-guesses-0123"
    keys = Keys({"me": KeyEntry(sha256=hashlib.sha256(key.encode()).hexdigest())})
    with serving(student_app(StudentServiceSettings(registry=tmp_path / "registry", threads="1x1"), keys=keys)) as url:
        found = visited(url)
        page = found.page
        field = page.get_by_label("API key", exact=True)
        expect(field).to_be_focused()
        page.keyboard.type("another")
        page.keyboard.press("Enter")
        expect(page.get_by_role("alert")).to_contain_text("This key is not accepted: ")
        unlock(page, key)
        ask(page, "word1 word2")
        ended(page)
        expect(said(page, "student")).to_have_text(re.compile("word|end"))
        shown = page.locator("#Python").text_content()
        done = subprocess.run([sys.executable, "-c", shown], env={**os.environ, "KEY": key}, capture_output=True, text=True, timeout=60)
        assert (done.stdout.strip(), done.stderr) == (said(page, "student").inner_text(), "")
        with page.context.expect_page() as opened:
            page.get_by_role("link", name="the report").click()
        expect(opened.value.get_by_role("heading", name="The report")).to_be_visible()
        assert not [asked for asked in found.requests if key in asked]
