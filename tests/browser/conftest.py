"""A real Chromium and what it opens: the report of REPORT_HTML, or two of its own, and a student's page.

REPORT_SHOTS=DIR keeps screenshots.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright
from reports import report_and_answers
from scripted_student import ScriptedStudent, serving

from evaluator.report.page import page as report_page

REPOSITORY = Path(__file__).parents[2]
CHROMIUM = Path(os.environ.get("CHROMIUM", "/usr/bin/chromium"))
# no sandbox: containers run as root; the rest keeps Chromium itself from asking anybody anything
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]


expect.set_options(timeout=30_000)  # a machine may stand still for a while


@dataclass
class Opened:
    """A page and all that it did."""

    page: Page
    messages: list[str] = field(default_factory=list)
    """Console messages and uncaught errors."""
    requests: list[str] = field(default_factory=list)
    dialogs: list[str] = field(default_factory=list)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    if not CHROMIUM.exists():
        pytest.fail(f"{CHROMIUM} is not there: apt-get install chromium, or set CHROMIUM to where it is", pytrace=False)
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield launched
        launched.close()


@pytest.fixture(scope="session", params=["made", "smoke"])
def report_file(request, tmp_path_factory) -> Path:
    """made: with everything that a report can hold. smoke: of a run of the whole pipeline with recipes/smoke.yaml, a minute and a half."""
    if given := os.environ.get("REPORT_HTML"):
        return Path(given).resolve(strict=True)
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "smoke":
        command = [sys.executable, "-m", "shared.cli", "run", "--recipe", "recipes/smoke.yaml", "--no-serve", "--out", str(folder / "run")]
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return folder / "run" / "evaluation" / "report.html"
    file = folder / "report.html"
    file.write_text(report_page(*report_and_answers(rows=60, extra=3, rounds=2, steps=80, judge=True, overlaps=2)), encoding="utf-8")
    return file


@pytest.fixture
def visited(browser) -> Iterator[Callable[..., Opened]]:
    """visited(url, width=1280, ...) -> Opened; what else is named goes to the browser's context."""
    contexts = []

    def visit(url: str, *, width: int = 1280, before: Callable[[Page], object] = lambda page: None, **context) -> Opened:
        contexts.append(browser.new_context(viewport={"width": width, "height": 900}, **context))
        found = Opened(contexts[-1].new_page())
        found.page.on("console", lambda message: found.messages.append(message.text))
        found.page.on("pageerror", lambda error: found.messages.append(str(error)))
        found.page.on("request", lambda request: found.requests.append(request.url))
        found.page.on("dialog", lambda dialog: (found.dialogs.append(dialog.message), dialog.dismiss()))
        before(found.page)
        found.page.goto(url)
        return found

    yield visit
    for context in contexts:
        context.close()


@pytest.fixture
def opened(visited, report_file) -> Callable[..., Opened]:
    """opened(file=the report, width=1280, ...) -> Opened."""
    return lambda file=report_file, **how: visited(file.as_uri(), **how)


@pytest.fixture
def student() -> Iterator[ScriptedStudent]:
    scripted = ScriptedStudent()
    with serving(scripted.app()) as scripted.url:
        yield scripted


@pytest.fixture(scope="session")
def keep_shot() -> Callable[[Page, str], None]:
    """keep_shot(page, name): a screenshot of the whole page, if REPORT_SHOTS names a folder for it."""

    def keep(page: Page, name: str) -> None:
        if folder := os.environ.get("REPORT_SHOTS"):
            page.screenshot(path=Path(folder) / f"{name}.png", full_page=True)

    return keep
