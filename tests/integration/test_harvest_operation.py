"""`distill harvest` as its users meet it: what it says beforehand, while it works and when it ends, and what it must never do."""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import signal
import ssl
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from awake import awake
from prometheus_client.parser import text_string_to_metric_families
from teachers import (
    CONCURRENCY,
    SAMPLES,
    Body,
    Said,
    Teacher,
    child,
    count_lines,
    empty,
    harvest,
    lines,
    listening,
    manifest,
    prompt_of,
    recipe,
    refusing,
    rows_of,
    saying,
    self_signed,
    stage_of,
    usual,
    wait_for_lines,
)

from shared.artifacts import Run
from shared.cli import main
from shared.datasets.stage import prepare
from shared.errors import BudgetSpent, DataError, HarvestTooThin, SettingsError, StorageError, TeacherError
from shared.harvest.ledger import AnswerLedger
from shared.harvest.smoke import PROMPTS as SMOKE
from shared.settings import Recipe, load_settings

KEY = "sk-geheim-0123456789"
CENSUS = re.compile(r"responses/teacher: (\d+) prompts, (\d+) answers")


@pytest.fixture
def teacher() -> Iterator[Teacher]:
    with listening() as teacher:
        yield teacher


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "run"


def kinds(out: Path) -> Counter[str]:
    """Rows by what became of them, of several for one sample the last."""
    last = {(row.key, row.example_id): row for row in rows_of(out)}
    return Counter("ok" if row.status == "ok" else str(row.reason).partition(":")[0] for row in last.values())


def every(number: int, wrong: Callable[[Body], Said], *, otherwise: Callable[[Body], Said] = usual) -> Callable[[Body], Said]:
    """Wrong for every so many prompts, whenever they are asked; `otherwise` for all others."""
    met: dict[str, int] = {}
    lock = threading.Lock()

    def answer(body: Body) -> Said:
        with lock:
            place = met.setdefault(prompt_of(body), len(met) + 1)
        return (otherwise if place % number else wrong)(body)

    return answer


def status(out: Path, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(["harvest", "status", str(out)]) == 0
    return capsys.readouterr().out


# before anything is sent


def test_a_dry_run_shows_three_requests_what_they_may_cost_and_sends_nothing(
    tmp_path: Path, teacher: Teacher, out: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISTILL_TEACHER__API_KEY", KEY)
    file = recipe(tmp_path, teacher.url, teacher="price: {input_per_million: 2, output_per_million: 10}", harvest="budget: {cost: 5}")
    assert harvest(file, out, "--dry-run") == 0
    said = capsys.readouterr().out
    assert teacher.bodies == []
    assert re.findall(r"^request (\d): POST (\S+)$", said, re.MULTILINE) == [(str(i), f"{teacher.url}/chat/completions") for i in (1, 2, 3)]
    assert said.count("My doctor spoke of condition") == 3
    assert "10 requests for 30 of 30 answers; nothing was sent" in said
    assert f"at most {30 * 48} out" in said
    assert "harvest.budget.cost is 5" in said
    assert KEY not in said
    cost = float(re.search(r"about (\S+) at most by teacher.price", said)[1])  # type: ignore[index]
    inputs = int(re.search(r"about (\d+) tokens in", said)[1])  # type: ignore[index]
    assert cost == pytest.approx((inputs * 2 + 30 * 48 * 10) / 1e6, rel=0.01)


def test_a_dry_run_shows_the_requests_that_would_be_sent(
    tmp_path: Path, teacher: Teacher, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = recipe(tmp_path, teacher.url, prompts=3)
    assert harvest(file, out, "--dry-run") == 0
    shown = [json.loads(body) for body in re.findall(r"^\{.*?^\}", capsys.readouterr().out, re.MULTILINE | re.DOTALL)]
    assert harvest(file, out) == 0
    assert sorted(shown, key=str) == sorted(teacher.bodies, key=str)


def test_a_dry_run_before_going_on_counts_what_is_missing_alone(
    tmp_path: Path, teacher: Teacher, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = recipe(tmp_path, teacher.url, harvest="budget: {requests: 4}")
    assert harvest(file, out) == BudgetSpent.exit_code
    assert harvest(file, out, "--dry-run") == 0
    assert "6 requests for 18 of 30 answers" in capsys.readouterr().out


def test_a_dry_run_commits_to_nothing(tmp_path: Path, teacher: Teacher, out: Path) -> None:
    file = recipe(tmp_path, teacher.url)
    assert harvest(file, out, "--dry-run") == 0
    assert harvest(file, out, "--dry-run", "--set", "harvest.max_tokens=32") == 0
    assert harvest(file, out, "--set", "harvest.samples=2") == 0


def test_a_budget_of_money_needs_a_price(tmp_path: Path, teacher: Teacher, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert harvest(recipe(tmp_path, teacher.url, harvest="budget: {cost: 5}"), out) == SettingsError.exit_code
    said = capsys.readouterr().err
    for part in ("harvest.budget.cost", "teacher.price.input_per_million", "harvest.budget.requests"):
        assert part in said
    assert not out.exists()


def test_a_misspelt_class_is_refused_with_those_there_are(
    tmp_path: Path, teacher: Teacher, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert harvest(recipe(tmp_path, teacher.url), out, "--retry-failed", "emtpy") == SettingsError.exit_code
    said = capsys.readouterr().err
    assert "'emtpy'" in said
    for name in ("empty", "content_filter", "cut_off", "over_long"):
        assert name in said
    assert not out.exists()


@pytest.mark.parametrize("hard", ["100", "4096"])
def test_more_requests_at_once_than_open_files_are_refused_before_the_first_one_or_allowed(
    tmp_path: Path, teacher: Teacher, out: Path, hard: str
) -> None:
    file = recipe(tmp_path, teacher.url, prompts=5)
    command = [sys.executable, "-m", "shared.cli", "harvest", "--recipe", str(file), "--out", str(out), "--set", "harvest.concurrency=1000"]
    done = subprocess.run(
        ["bash", "-c", f'ulimit -Sn 100; ulimit -Hn {hard}; exec "$@"', "limited", *command], capture_output=True, text=True, timeout=60
    )
    if hard == "100":
        assert done.returncode == SettingsError.exit_code
        assert "harvest.concurrency = 1000: this process may have no more than 100 files open" in done.stderr
        assert teacher.bodies == []
    else:
        assert done.returncode == 0, done.stderr


def test_a_metrics_file_that_cannot_be_written_is_refused_before_the_first_request(
    tmp_path: Path, teacher: Teacher, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert harvest(recipe(tmp_path, teacher.url), out, "--metrics-file", str(tmp_path / "file" / "h.prom")) == SettingsError.exit_code
    assert "--metrics-file" in capsys.readouterr().err
    assert teacher.bodies == []


# a teacher that is none


def test_a_wrong_path_ends_the_harvest_before_more_than_the_smoke_run_is_sent(
    tmp_path: Path, teacher: Teacher, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher.answer, teacher.delay_s = refusing(404, "no such page"), 0.05
    assert harvest(recipe(tmp_path, teacher.url, prompts=300), out, "--set", "harvest.concurrency=64") == TeacherError.exit_code
    said = capsys.readouterr().err
    for part in ("404", "no such page", "/v1"):
        assert part in said
    assert len(teacher.bodies) <= SMOKE
    assert count_lines(out) == 0


def test_a_404_in_the_middle_is_a_fault_like_others(tmp_path: Path, teacher: Teacher, out: Path) -> None:
    failed: set[str] = set()

    def once(body: Body) -> Said:
        if len(teacher.bodies) < 20 or len(failed) == 5 or prompt_of(body) in failed:
            return usual(body)
        failed.add(prompt_of(body))
        return refusing(404)(body)

    teacher.answer = once
    assert harvest(recipe(tmp_path, teacher.url, prompts=60), out, "--set", "teacher.max_attempts=3") == 0
    assert len(failed) == 5
    assert kinds(out) == {"ok": 60 * SAMPLES}


def test_a_key_that_is_refused_in_the_middle_ends_the_harvest_at_once_and_nothing_is_asked_twice(
    tmp_path: Path, teacher: Teacher, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher.answer = lambda body: usual(body) if len(teacher.bodies) <= 30 else refusing(401, "revoked")(body)
    file = recipe(tmp_path, teacher.url, prompts=80)
    assert harvest(file, out) == TeacherError.exit_code
    assert "teacher.api_key_file" in capsys.readouterr().err
    assert len(teacher.bodies) <= 30 + 2 * CONCURRENCY
    assert max(teacher.asked.values()) == 1
    assert 30 - CONCURRENCY <= count_lines(out) // SAMPLES <= 30
    teacher.answer = usual
    assert harvest(file, out) == 0
    assert kinds(out) == {"ok": 80 * SAMPLES}


def test_prompts_that_are_answered_with_403_are_failed_rows_among_others(tmp_path: Path, teacher: Teacher, out: Path) -> None:
    teacher.answer = every(20, refusing(403, "your input was flagged"))
    file = recipe(tmp_path, teacher.url, prompts=60, harvest="max_failed_fraction: 0.1")
    assert harvest(file, out) == 0
    assert kinds(out) == {"ok": 57 * SAMPLES, "refused": 3 * SAMPLES}
    assert all("your input was flagged" in str(row.reason) for row in rows_of(out) if row.status == "failed")


@pytest.mark.parametrize(
    "broke", [refusing(402, "pay"), lambda body: Said(b'{"error": {"code": "insufficient_quota"}}', 429)], ids=["402", "insufficient_quota"]
)
def test_an_account_without_credit_ends_the_harvest_at_once(
    tmp_path: Path, teacher: Teacher, out: Path, capsys: pytest.CaptureFixture[str], broke: Callable[[Body], Said]
) -> None:
    teacher.answer = broke
    assert harvest(recipe(tmp_path, teacher.url, prompts=50), out) == TeacherError.exit_code
    said = capsys.readouterr().err
    assert "must pay" in said or "no credit" in said
    assert len(teacher.bodies) <= 2 * CONCURRENCY


def test_a_certificate_that_is_not_trusted_ends_the_harvest_at_once_with_the_remedy(
    tmp_path: Path, teacher: Teacher, out: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pem, context = self_signed(tmp_path), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)
    teacher.server.socket = context.wrap_socket(teacher.server.socket, server_side=True)
    url = teacher.url.replace("http://127.0.0.1", "https://localhost")
    file = recipe(tmp_path, url)
    assert harvest(file, out) == TeacherError.exit_code
    assert "SSL_CERT_FILE" in capsys.readouterr().err
    assert teacher.bodies == []
    monkeypatch.setenv("SSL_CERT_FILE", str(pem.with_suffix(".crt")))
    assert harvest(file, out) == 0


def test_a_dead_teacher_is_waited_for_aloud_and_then_the_way_to_go_on_is_told(
    tmp_path: Path, teacher: Teacher, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher.answer = lambda body: usual(body) if len(teacher.bodies) <= 20 else refusing(503, "asleep")(body)
    file = recipe(tmp_path, teacher.url, prompts=100)
    with child(file, out, "--set", "teacher.patience_s=8") as process:
        wait_for_lines(out, 30, process)
        while "has not answered for" not in (told := status(out, capsys)):
            assert process.poll() is None
            time.sleep(0.1)
        assert "giving up in" in told
        _, said = process.communicate(timeout=60)
        assert process.returncode == TeacherError.exit_code
    for part in ("503", "asleep", "has not answered for", f"distill harvest --recipe {file} --out {out}"):
        assert part in said
    assert "Traceback" not in said
    assert set(kinds(out)) == {"ok"}
    assert len(teacher.bodies) < 20 + 8 + 2 * CONCURRENCY + 4  # a circuit that is open lets one through now and then
    teacher.answer = usual
    assert harvest(file, out) == 0
    assert kinds(out) == {"ok": 100 * SAMPLES}


def test_a_teacher_that_comes_back_is_asked_on_and_no_row_has_failed_by_its_absence(
    tmp_path: Path, teacher: Teacher, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    back = threading.Event()
    lock, met = threading.Lock(), [0]

    def answer(body: Body) -> Said:
        with lock:
            met[0] += 1
            number = met[0]
        if number > 20 and not back.is_set():
            while teacher.answered < 20:
                time.sleep(0.01)
            time.sleep(0.2)  # whoever was answered has read it
            return refusing(503, "asleep")(body)
        return usual(body)

    teacher.answer = answer
    with child(recipe(tmp_path, teacher.url, prompts=60), out, "--set", "teacher.patience_s=60") as process:
        while met[0] < 28 or "has not answered for" not in status(out, capsys):  # all in flight has failed, and one is sent now and then
            assert process.poll() is None
            time.sleep(0.05)
        back.set()
        assert process.wait(timeout=60) == 0
    assert kinds(out) == {"ok": 60 * SAMPLES}


# the smoke run


def test_when_the_first_prompts_fail_nothing_more_is_sent(
    tmp_path: Path, teacher: Teacher, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher.answer = empty
    file = recipe(tmp_path, teacher.url, prompts=60)
    assert harvest(file, out) == HarvestTooThin.exit_code
    assert len(teacher.bodies) == SMOKE
    said = capsys.readouterr().err
    for part in (f"first {SMOKE} prompts", " empty", "--retry-failed"):
        assert part in said
    teacher.answer = usual
    assert harvest(file, out, "--retry-failed") == 0
    assert kinds(out) == {"ok": 60 * SAMPLES}


def test_a_few_failures_among_the_first_prompts_stop_nobody(tmp_path: Path, teacher: Teacher, out: Path) -> None:
    teacher.answer = every(4, empty)
    assert harvest(recipe(tmp_path, teacher.url, prompts=100, harvest="max_failed_fraction: 0.3"), out) == 0
    assert kinds(out) == {"ok": 75 * SAMPLES, "empty": 25 * SAMPLES}


# failures are data


def tools(body: Body) -> Said:
    return saying(body, [None] * body["n"], "tool_calls")


def image(body: Body) -> Said:
    parts = {"role": "assistant", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]}
    return Said(json.dumps({"choices": [{"message": parts, "finish_reason": "stop"}] * body["n"]}).encode())


def number(body: Body) -> Said:
    return Said(json.dumps({"choices": [{"message": {"content": 42}, "finish_reason": "stop"}] * body["n"]}).encode())


def megabyte(body: Body) -> Said:
    return saying(body, ["word " * 200_000] * body["n"])


def half_a_character(body: Body) -> Said:
    message = {"role": "assistant", "content": None, "refusal": "no \ud800 way"}
    return Said(json.dumps({"choices": [{"message": message, "finish_reason": "stop"}] * body["n"]}).encode())


@pytest.mark.parametrize(
    ("wrong", "kind"),
    [
        (tools, "no_text"),
        (image, "no_text"),
        (number, "no_text"),
        (megabyte, "over_long"),
        (half_a_character, "refused"),
        (lambda body: saying(body, [None] * body["n"]), "empty"),
        (lambda body: saying(body, [" \n"] * body["n"]), "empty"),
        (lambda body: saying(body, ["a"] * body["n"], "content_filter"), "content_filter"),
        (refusing(413), "too_long"),
        (refusing(400), "refused"),
    ],
    ids=["tool calls", "image parts", "a number", "1 MB", "half a character", "null", "blanks", "filter", "413", "400"],
)
def test_what_is_no_answer_is_a_failed_row_of_its_class_and_can_be_asked_for_again(
    tmp_path: Path, teacher: Teacher, out: Path, wrong: Callable[[Body], Said], kind: str
) -> None:
    teacher.answer = every(10, wrong)
    file = recipe(tmp_path, teacher.url, prompts=20, harvest="max_failed_fraction: 0.1")
    assert harvest(file, out) == 0
    assert kinds(out) == {"ok": 18 * SAMPLES, kind: 2 * SAMPLES}
    assert manifest(out)["counts"]["failed"] == {kind: 2 * SAMPLES}
    assert all(row.text == "" for row in rows_of(out) if row.status == "failed")
    assert sum(file.stat().st_size for file in stage_of(out).iterdir()) < 100_000
    teacher.bodies.clear()
    teacher.answer = usual
    assert harvest(file, out, "--retry-failed", kind) == 0
    assert len(teacher.bodies) == 2
    assert manifest(out)["counts"]["failed"] == {}
    assert kinds(out) == {"ok": 20 * SAMPLES}


def test_half_a_character_in_an_answer_costs_a_question_mark(tmp_path: Path, teacher: Teacher, out: Path) -> None:
    teacher.answer = lambda body: saying(body, [f"{prompt_of(body)[-20:]} caf\ud800 {i}" for i in range(body["n"])])
    assert harvest(recipe(tmp_path, teacher.url), out) == 0
    assert all("caf? " in row.text for row in rows_of(out))


def test_a_class_alone_is_asked_for_again(tmp_path: Path, teacher: Teacher, out: Path) -> None:
    teacher.answer = every(20, empty, otherwise=every(19, tools))
    file = recipe(tmp_path, teacher.url, prompts=40, harvest="max_failed_fraction: 0.2")
    assert harvest(file, out) == 0
    assert kinds(out) == {"ok": 36 * SAMPLES, "empty": 2 * SAMPLES, "no_text": 2 * SAMPLES}
    teacher.bodies.clear()
    teacher.answer = usual
    assert harvest(file, out, "--retry-failed", "empty") == 0
    assert len(teacher.bodies) == 2
    assert kinds(out) == {"ok": 38 * SAMPLES, "no_text": 2 * SAMPLES}
    assert harvest(file, out) == 0
    assert len(teacher.bodies) == 2


def test_answers_that_were_cut_off_are_asked_for_again_if_somebody_wants_it(tmp_path: Path, teacher: Teacher, out: Path) -> None:
    teacher.answer = every(5, lambda body: saying(body, ["half an ans"] * body["n"], "length"))
    file = recipe(tmp_path, teacher.url)
    assert harvest(file, out) == 0
    assert manifest(out)["counts"]["cut_off"] == 2 * SAMPLES
    teacher.bodies.clear()
    teacher.answer = usual
    assert harvest(file, out, "--retry-failed") == 0
    assert teacher.bodies == []
    assert harvest(file, out, "--retry-failed", "cut_off") == 0
    assert len(teacher.bodies) == 2
    assert manifest(out)["counts"]["cut_off"] == 0


def test_more_failures_than_allowed_fail_the_stage_with_the_census_and_keep_the_answers(
    tmp_path: Path, teacher: Teacher, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher.answer = every(5, tools)
    file = recipe(tmp_path, teacher.url, prompts=50)
    assert harvest(file, out) == HarvestTooThin.exit_code
    said = capsys.readouterr().err
    for part in ("50 prompts, 120 answers, 30 failed (30 no_text)", "harvest.max_failed_fraction = 0.05", "--retry-failed"):
        assert part in said
    assert not (stage_of(out) / "manifest.json").exists()
    assert harvest(file, out, "--set", "harvest.max_failed_fraction=0.2") == 0
    assert len(teacher.bodies) == 50


# budgets


def test_a_cap_on_requests_is_met_exactly_and_raised_to_go_on(
    tmp_path: Path, teacher: Teacher, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher.delay_s = 0.02
    file = recipe(tmp_path, teacher.url, prompts=30, harvest="budget: {requests: 7}")
    assert harvest(file, out) == BudgetSpent.exit_code
    assert "harvest.budget.requests = 7 (7 made)" in capsys.readouterr().err
    assert len(teacher.bodies) == 7
    assert count_lines(out) == 7 * SAMPLES
    assert harvest(file, out) == BudgetSpent.exit_code
    assert len(teacher.bodies) == 7
    assert harvest(file, out, "--set", "harvest.budget.requests=30") == 0
    assert len(teacher.bodies) == 30
    counts = manifest(out)["counts"]
    assert (counts["answers"], counts["requests"]) == (30 * SAMPLES, 30)
    assert (counts["last_command"]["rows"], counts["last_command"]["requests"]) == (23 * SAMPLES, 23)
    assert counts["seconds"] == json.loads((stage_of(out) / "spent.json").read_text())["seconds"] > counts["last_command"]["seconds"] > 0


@pytest.mark.parametrize("tells", [True, False])
def test_a_cap_on_money_is_never_overshot_whether_the_teacher_counts_or_not(
    tmp_path: Path, teacher: Teacher, out: Path, capsys: pytest.CaptureFixture[str], tells: bool
) -> None:
    teacher.delay_s = 0.02
    usage = {"usage": {"prompt_tokens": 20, "completion_tokens": 30}} if tells else {}
    teacher.answer = lambda body: saying(body, [f"{i}" * 30 for i in range(body["n"])], **usage)
    cap = 1000
    file = recipe(
        tmp_path,
        teacher.url,
        prompts=60,
        teacher="price: {input_per_million: 0, output_per_million: 1000000}",
        harvest=f"budget: {{cost: {cap}}}",
    )
    assert harvest(file, out) == BudgetSpent.exit_code
    assert "harvest.budget.cost = 1000" in capsys.readouterr().err
    # 30 tokens a request, told or by rule (30 bytes are 10 tokens, three times); at most 3 x 48 are set aside
    sent = len(teacher.bodies)
    assert 30 * sent <= cap
    assert 30 * (sent + 1) > cap - 3 * 48
    assert json.loads((stage_of(out) / "spent.json").read_text())["cost"] == pytest.approx(30 * sent)
    assert "cost" in status(out, capsys)
    assert harvest(file, out, "--set", "harvest.budget.cost=10000") == 0
    assert len(teacher.bodies) == 60
    assert manifest(out)["counts"]["cost"] == pytest.approx(30 * 60)


def test_a_cap_on_time_ends_the_harvest_and_raised_it_goes_on(
    tmp_path: Path, teacher: Teacher, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher.delay_s = 0.1
    file = recipe(tmp_path, teacher.url, prompts=60, harvest="budget: {seconds: 0.5}")
    with awake() as seconds:
        assert harvest(file, out) == BudgetSpent.exit_code
        assert seconds() < 5
    assert "harvest.budget.seconds = 0.5" in capsys.readouterr().err
    sent = len(teacher.bodies)
    assert 0 < sent < 60
    assert count_lines(out) == sent * SAMPLES
    teacher.delay_s = 0
    assert harvest(file, out, "--set", "harvest.budget.seconds=60") == 0
    assert len(teacher.bodies) == 60


# ending it


def test_sigterm_lets_what_is_in_flight_arrive_and_ends_with_143(
    tmp_path: Path, teacher: Teacher, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher.delay_s = 0.3
    file = recipe(tmp_path, teacher.url, prompts=100)
    with child(file, out) as process:
        wait_for_lines(out, 20, process)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=20)
        assert process.returncode == 143
    assert "waiting for what is in flight" in said
    assert f"distill harvest --recipe {file} --out {out}" in said
    assert "Traceback" not in said
    assert count_lines(out) == len(teacher.bodies) * SAMPLES
    assert len(teacher.bodies) < 100
    assert "ended before it was complete" in status(out, capsys)
    teacher.delay_s = 0
    assert harvest(file, out) == 0
    assert max(teacher.asked.values()) == 1


def waiting_after(number: int, teacher: Teacher, freed: threading.Event) -> Callable[[Body], Said]:
    """So many requests are answered, all others once they are `freed`."""

    def answer(body: Body) -> Said:
        if len(teacher.bodies) > number:
            freed.wait(300)
        return usual(body)

    return answer


def wait_for_flight(answered: int, teacher: Teacher, process: subprocess.Popen[str]) -> None:
    """Until all that may be in flight after so many answers is."""
    while len(teacher.bodies) < answered + CONCURRENCY:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


@pytest.mark.parametrize(("blow", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_second_signal_ends_it_at_once(tmp_path: Path, teacher: Teacher, out: Path, blow: signal.Signals, code: int) -> None:
    file, freed = recipe(tmp_path, teacher.url, prompts=100), threading.Event()
    teacher.answer = waiting_after(20, teacher, freed)
    with child(file, out) as process:
        assert process.stderr is not None
        wait_for_flight(20, teacher, process)
        process.send_signal(blow)
        while "once more to end at once" not in process.stderr.readline():
            assert process.poll() is None
        process.send_signal(blow)
        with awake() as seconds:
            assert process.wait(timeout=60) == code
            assert seconds() < 3
    freed.set()
    assert harvest(file, out) == 0
    assert kinds(out) == {"ok": 100 * SAMPLES}


def test_what_never_comes_is_not_waited_for_longer_than_containers_are_given(tmp_path: Path, teacher: Teacher, out: Path) -> None:
    file, freed = recipe(tmp_path, teacher.url, prompts=50), threading.Event()
    teacher.answer = waiting_after(20, teacher, freed)
    with child(file, out, "--set", "teacher.timeout_s=120") as process:
        wait_for_flight(20, teacher, process)
        process.send_signal(signal.SIGTERM)
        with awake() as seconds:
            assert process.wait(timeout=90) == 143
            assert seconds() < 10
    freed.set()


# reading it


def test_status_tells_a_run_apart_that_is_not_begun_running_killed_ended_and_complete(
    tmp_path: Path, teacher: Teacher, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = recipe(tmp_path, teacher.url, prompts=150)
    assert main(["harvest", "status", str(out)]) == DataError.exit_code
    assert "no run directory" in capsys.readouterr().err
    teacher.delay_s = 0.1
    with child(file, out) as process:
        wait_for_lines(out, 30, process)
        while "running (process" not in (said := status(out, capsys)):  # it tells of itself once a second
            assert process.poll() is None
        assert f"running (process {process.pid}" in said
        assert re.search(r"answers   \d+ of 450", said)
        process.kill()
        process.wait()
    teacher.delay_s = 0
    said = status(out, capsys)
    assert "dead" in said
    assert "the same command goes on" in said
    assert harvest(file, out, "--set", "harvest.budget.requests=120") == BudgetSpent.exit_code
    assert "ended before it was complete" in status(out, capsys)
    assert harvest(file, out) == 0
    said = status(out, capsys)
    assert "complete" in said
    assert "answers   450 of 450" in said
    assert "failed    0" in said


def test_status_of_a_run_whose_harvest_has_not_begun_says_so(
    tmp_path: Path, teacher: Teacher, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = recipe(tmp_path, teacher.url)
    prepare(Run.open(out, load_settings(Recipe, flags={}, yaml_file=file)))
    assert "not begun" in status(out, capsys)


def test_status_disturbs_nothing(tmp_path: Path, teacher: Teacher, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = recipe(tmp_path, teacher.url, prompts=30, harvest="budget: {requests: 7}")
    assert harvest(file, out) == BudgetSpent.exit_code
    with (stage_of(out) / "responses-000001.jsonl").open("a") as torn:
        torn.write('{"key": "torn by a cra')

    def snapshot() -> dict[Path, tuple[int, bytes]]:
        return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in sorted(out.rglob("*")) if path.is_file()}

    before = snapshot()
    assert "answers   21 of 90" in status(out, capsys)
    assert snapshot() == before


def metrics(file: Path) -> dict[tuple[str, str], float]:
    """By name and reason."""
    samples = [sample for family in text_string_to_metric_families(file.read_text()) for sample in family.samples]
    assert {sample.labels["run"] for sample in samples} == {"run"}
    return {(sample.name, sample.labels.get("reason", "")): sample.value for sample in samples}


def test_a_metrics_file_tells_prometheus_while_it_runs_and_how_it_ended(tmp_path: Path, teacher: Teacher, out: Path) -> None:
    file, prom = recipe(tmp_path, teacher.url, prompts=150, harvest="max_failed_fraction: 0.5"), tmp_path / "textfile" / "harvest.prom"
    teacher.answer, teacher.delay_s = every(10, empty), 0.1
    with child(file, out, "--metrics-file", str(prom)) as process:
        wait_for_lines(out, 30, process)
        while not (prom.exists() and (found := metrics(prom))["distill_harvest_answers", ""]):  # it tells once a second
            assert process.poll() is None
            time.sleep(0.05)
        assert found["distill_harvest_wanted_answers", ""] == 450
        assert 0 < found["distill_harvest_answers", ""] < 450
        assert 0 < found["distill_harvest_in_flight", ""] <= CONCURRENCY
        assert found["distill_harvest_answers_per_second", ""] > 0
        assert found["distill_harvest_waiting", ""] == 0
        teacher.delay_s = 0
        assert process.wait(timeout=30) == 0
    found = metrics(prom)
    assert found["distill_harvest_answers", ""] == 135 * SAMPLES
    assert found["distill_harvest_failed_answers", "empty"] == 15 * SAMPLES
    assert found["distill_harvest_in_flight", ""] == 0
    assert found["distill_harvest_waiting", ""] == 0
    assert found["distill_harvest_requests", ""] == 150
    assert os.stat(prom).st_mode & 0o044 == 0o044  # the node exporter is another user


def test_a_metrics_file_that_no_exporter_would_read_is_refused(tmp_path: Path, teacher: Teacher, out: Path) -> None:
    assert harvest(recipe(tmp_path, teacher.url), out, "--metrics-file", str(tmp_path / "metrics.txt")) == SettingsError.exit_code


def test_a_log_gets_plain_lines_with_rows_rate_flight_refusals_and_cost(tmp_path: Path, teacher: Teacher, out: Path) -> None:
    told = threading.Event()

    def answer(body: Body) -> Said:
        if len(teacher.bodies) > 10 and not told.is_set():
            told.set()
            return refusing(429, "slowly", **{"retry-after": "1"})(body)
        return usual(body)

    teacher.answer = answer
    file = recipe(tmp_path, teacher.url, prompts=40, teacher="price: {input_per_million: 1, output_per_million: 1}")
    with child(file, out) as process:
        printed, said = process.communicate(timeout=30)
        assert process.returncode == 0
    first, *_, last = [line for line in said.splitlines() if line.startswith("harvest: ")]
    assert first.startswith("harvest: 0/120 answers")
    assert last.startswith("harvest: 120/120 answers")
    for part in ("/s", "1 x 429", "cost "):
        assert part in last
    assert "\r" not in said
    assert "\x1b" not in said
    assert CENSUS.findall(printed) == [("40", "120")]
    assert manifest(out)["counts"]["last_command"]["refused"] == 1


def test_the_ledger_is_lines_that_any_tool_reads(tmp_path: Path, teacher: Teacher, out: Path) -> None:
    pyarrow_json = pytest.importorskip("pyarrow.json")
    teacher.answer = every(10, empty)
    assert harvest(recipe(tmp_path, teacher.url, prompts=20, harvest="max_failed_fraction: 0.5"), out) == 0
    file = stage_of(out) / "responses.jsonl"
    found = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(found) == 20 * SAMPLES
    fields = {"key", "example_id", "sample", "status", "text", "finish_reason", "reason", "model", "latency_s", "attempts", "received_at"}
    assert all(set(row) == fields for row in found)
    assert all(row["attempts"] == 1 and 0 <= row["latency_s"] < 20 for row in found)
    table = pyarrow_json.read_json(file)
    assert table.num_rows == len(found)
    assert set(table.column_names) == fields
    if shutil.which("jq"):
        counted = subprocess.run(["jq", "-r", 'select(.status == "failed") | .reason', file], capture_output=True, text=True, check=True)
        assert counted.stdout.splitlines() == ["empty: nothing but blanks"] * 2 * SAMPLES


def exported(out: Path, to: Path) -> int:
    return main(["harvest", "export", str(out), str(to)])


def test_an_export_holds_every_row_once_as_parquet_and_as_a_data_set(
    tmp_path: Path, teacher: Teacher, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parquet, datasets = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("datasets")
    teacher.answer = every(10, empty)
    file = recipe(tmp_path, teacher.url, prompts=20, harvest="max_failed_fraction: 0.5")
    assert exported(out, tmp_path / "early.parquet") == DataError.exit_code
    assert harvest(file, out) == 0
    teacher.answer = usual
    assert harvest(file, out, "--retry-failed") == 0
    found = sorted((row.model_dump() for row in rows_of(out)), key=lambda row: row["key"])
    assert len(found) == 20 * SAMPLES
    for name, read in {
        "answers.parquet": lambda path: parquet.read_table(path).to_pylist(),
        "answers": lambda path: datasets.load_from_disk(str(path)).to_list(),
    }.items():
        capsys.readouterr()
        assert exported(out, tmp_path / "new" / name) == 0
        assert f"{20 * SAMPLES} rows" in capsys.readouterr().out
        assert sorted(read(tmp_path / "new" / name), key=lambda row: row["key"]) == found
    assert not [path for path in stage_of(out).iterdir() if "export" in path.name]


def test_what_is_there_is_exported_while_a_harvest_is_at_work(tmp_path: Path, teacher: Teacher, out: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    pytest.importorskip("datasets")
    assert harvest(recipe(tmp_path, teacher.url), out) == 0
    file = stage_of(out) / "responses.jsonl"
    with AnswerLedger(stage_of(out)):
        file.write_bytes(file.read_bytes() + b'{"key": "it is being writ')
        before = (stage_of(out).stat().st_mtime_ns, file.read_bytes())
        assert exported(out, tmp_path / "answers.parquet") == 0
        assert (stage_of(out).stat().st_mtime_ns, file.read_bytes()) == before
    assert parquet.read_table(tmp_path / "answers.parquet").num_rows == 10 * SAMPLES


def test_an_export_takes_the_place_of_nothing(tmp_path: Path, teacher: Teacher, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    assert harvest(recipe(tmp_path, teacher.url), out) == 0
    whole = lines(out)
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("five years")
    monkeypatch.chdir(tmp_path / "precious")
    for to in (tmp_path / "precious", out, stage_of(out), Path(), Path(".."), tmp_path / "precious" / "thesis.txt"):
        assert exported(out, to) == SettingsError.exit_code
    assert (tmp_path / "precious" / "thesis.txt").read_text() == "five years"
    assert lines(out) == whole


# clocks, disks, secrets


JUMPING = '''
import datetime, time

class Jumping(datetime.datetime):
    """A wall clock that somebody sets to yesterday, to tomorrow, and so on."""
    calls = 0
    @classmethod
    def now(cls, tz=None):
        cls.calls += 1
        return super().now(tz) + datetime.timedelta(days=cls.calls % 3 - 1)

def jumping():
    return Jumping.now(datetime.timezone.utc).timestamp()

datetime.datetime, time.time = Jumping, jumping
'''


def test_a_wall_clock_that_jumps_by_days_changes_no_pause_and_no_duration(tmp_path: Path, teacher: Teacher, out: Path) -> None:
    (tmp_path / "shim").mkdir()
    (tmp_path / "shim" / "sitecustomize.py").write_text(JUMPING)
    path = os.pathsep.join([str(tmp_path / "shim"), *filter(None, [os.environ.get("PYTHONPATH")])])
    refused = iter([refusing(429, **{"retry-after": "1"}), refusing(503)])
    teacher.answer = lambda body: next(refused, usual)(body) if len(teacher.bodies) > 30 else usual(body)
    teacher.delay_s = 0.02
    file = recipe(tmp_path, teacher.url, prompts=60, harvest="budget: {seconds: 60}")
    started = time.monotonic()
    with child(file, out, "--set", "teacher.max_attempts=3", PYTHONPATH=path) as process:
        _, said = process.communicate(timeout=60)
        assert process.returncode == 0, said
    assert time.monotonic() - started < 30
    found = rows_of(out)
    assert len({row.received_at[:10] for row in found}) == 3  # the clock did jump
    assert all(0 <= row.latency_s < 10 for row in found)
    assert 0 < manifest(out)["counts"]["seconds"] < 30
    assert 0 < json.loads((stage_of(out) / "spent.json").read_text())["seconds"] < 30


def without_overriding_rights() -> None:
    """Take from root what lets it write where it may not, from the next exec on; others never had it."""
    for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP


@pytest.mark.parametrize("where", ["", "responses/teacher"])
def test_a_folder_that_cannot_be_written_is_named_with_the_remedy(tmp_path: Path, teacher: Teacher, out: Path, where: str) -> None:
    command = [sys.executable, "-m", "shared.cli", "harvest", "--out", str(out)]
    command += ["--recipe", str(recipe(tmp_path, teacher.url, harvest="budget: {requests: 4}"))]
    if where:
        assert subprocess.run(command, capture_output=True, timeout=60).returncode == BudgetSpent.exit_code
    closed = out / where
    closed.mkdir(exist_ok=True)
    for path in [*closed.iterdir(), closed]:
        path.chmod(0o500 if path.is_dir() else 0o400)
    asked = len(teacher.bodies)
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=without_overriding_rights, timeout=60)
    assert done.returncode == StorageError.exit_code, done.stderr
    assert str(out) in done.stderr
    assert "permission denied" in done.stderr
    assert "Traceback" not in done.stderr
    assert len(teacher.bodies) == asked


def everything_in(folder: Path) -> str:
    return "\n".join(path.read_text(errors="replace") for path in sorted(folder.rglob("*")) if path.is_file())


@pytest.mark.parametrize("status", [400, 401, 500])
def test_a_key_is_in_no_file_and_on_no_screen_even_if_the_teacher_repeats_it(
    tmp_path: Path, teacher: Teacher, out: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    monkeypatch.setenv("DISTILL_TEACHER__API_KEY", KEY)
    teacher.answer = every(3, refusing(status, f"bad key {KEY}"))
    prom = tmp_path / "harvest.prom"
    harvest(recipe(tmp_path, teacher.url, prompts=30, harvest="max_failed_fraction: 0.9"), out, "--metrics-file", str(prom))
    assert teacher.keys == {f"Bearer {KEY}"}
    told = "".join(capsys.readouterr()) + everything_in(out) + prom.read_text()
    assert "bad key ***" in told
    assert "geheim" not in told


PRIVATE = ("jane.doe@example.org", "+1 650-253-0000", "10.11.12.13")


def test_redacted_texts_reach_neither_teacher_nor_ledger_and_are_counted(
    tmp_path: Path, teacher: Teacher, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    private = f"Write to {PRIVATE[0]} or call {PRIVATE[1]}, not {PRIVATE[2]}."
    rows = [{"question": f"I have condition {i}. {private} Is it bad?", "summary": f"Is {i} bad?"} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    teacher.answer = lambda body: saying(body, [f"{prompt_of(body)} {i}" for i in range(body["n"])])
    file = recipe(tmp_path, teacher.url, prompts=20, harvest="redact: [email, phone], shots: 2")
    # what all rows have in common makes them near copies of each other
    with file.open("a") as more:
        more.write("evaluate: {allow_overlap: [near-question]}\n")
    assert harvest(file, out, "--dry-run") == 0
    shown = capsys.readouterr().out
    assert "taken out before it would be sent: 20 email, 20 phone" in shown
    assert harvest(file, out) == 0
    received = json.dumps(teacher.bodies)
    for text in (received, shown, everything_in(out / "responses")):
        assert PRIVATE[0] not in text
        assert PRIVATE[1] not in text
    assert "[EMAIL]" in received
    assert "[PHONE]" in received
    assert PRIVATE[2] in received
    assert manifest(out)["counts"]["redacted"] == {"email": 20, "phone": 20}
