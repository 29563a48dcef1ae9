"""`distill monitor`: what it tells of runs in every state, that it touches nothing, survives damage and ends when told to."""

from __future__ import annotations

import ast
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from awake import awake
from evaluated import exported_run, recipe
from monitored import STEP, evaluated_run, full_run, harvest, response, scrape, train

from shared.artifacts import Run, write_atomic
from shared.cli import main
from shared.errors import SettingsError
from shared.registry import promote, record_refusal, rollback
from student_trainer import run_metrics
from student_trainer.progress import STAGES, STATES
from student_trainer.run_metrics import METRICS, RunMetrics


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run.open(tmp_path / "runs" / "mine", recipe())


@pytest.fixture
def monitor(run: Run) -> RunMetrics:
    return RunMetrics(run.path.parent)


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with something in every part; to be copied by who changes it."""
    return full_run(tmp_path_factory.mktemp("full") / "mine").path


def begun(run: Run, stage: str, *rows: str) -> Path:
    """A file of a stage with these lines."""
    file = run.path / stage / "rows.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(row + "\n" for row in rows))
    return file


def test_a_run_that_has_just_begun_misses_every_stage(monitor: RunMetrics) -> None:
    found = scrape(monitor)
    states = found["distill_stage_state"]
    assert [labels for labels, value in states.items() if value] == [("mine", stage, "missing") for stage in STAGES]
    assert len(states) == len(STAGES) * len(STATES)
    assert found["distill_monitor_errors"] == {(): 0}
    assert set(found) == {"distill_stage_state", "distill_monitor_errors"}


def test_a_stage_is_in_one_state_with_its_rows_and_once_finished_its_seconds(run: Run, monitor: RunMetrics) -> None:
    file = begun(run, "dataset", "1", "2", "3")
    manifest = run.stage("dataset").finish([file], settings={})
    begun(run, "triplets/r0", "1")
    found = scrape(monitor)
    assert found["distill_stage_state"]["mine", "dataset", "done"] == 1
    assert found["distill_stage_state"]["mine", "triplets/r0", "partial"] == 1
    assert found["distill_stage_rows"] == {("mine", "dataset"): 3, ("mine", "triplets/r0"): 1}
    assert found["distill_stage_seconds"] == {("mine", "dataset"): manifest.seconds}


def test_answers_are_counted_as_they_arrive_and_failures_by_class_until_they_are_mended(run: Run, monitor: RunMetrics) -> None:
    harvest(run, response(0), response(1, "RequestRefused: a secret"), response(2, "empty"), response(3, "no class here"))
    found = scrape(monitor)
    assert found["distill_harvest_answers_total"] == {("mine",): 1}
    assert found["distill_harvest_failed_answers"] == {("mine", "RequestRefused"): 1, ("mine", "empty"): 1, ("mine", "other"): 1}
    harvest(run, response(4), response(1))
    found = scrape(monitor)
    assert found["distill_harvest_answers_total"] == {("mine",): 3}
    assert found["distill_harvest_failed_answers"] == {("mine", "empty"): 1, ("mine", "other"): 1}


def test_an_answer_that_was_asked_for_again_is_counted_once(run: Run, monitor: RunMetrics) -> None:
    harvest(run, response(0), response(1))
    assert scrape(monitor)["distill_harvest_answers_total"] == {("mine",): 2}
    harvest(run, response(0), response(1), response(1).model_copy(update={"example_id": "another that asks the same"}))
    assert scrape(monitor)["distill_harvest_answers_total"] == {("mine",): 3}


def test_a_line_that_is_being_written_is_counted_when_it_is_whole(run: Run, monitor: RunMetrics) -> None:
    ledger = harvest(run, response(0))
    line = response(1).model_dump_json()
    for part, answers in ((line[:9], 1), (line[9:], 1), ("\n", 2)):
        with ledger.open("a") as file:
            file.write(part)
        assert scrape(monitor)["distill_harvest_answers_total"] == {("mine",): answers}
    assert scrape(monitor)["distill_monitor_errors"] == {(): 0}


def test_what_was_read_is_not_read_again(run: Run, monitor: RunMetrics) -> None:
    ledger = harvest(run, response(0), response(1))
    scrape(monitor)
    content = ledger.read_bytes()
    with ledger.open("r+b") as file:
        file.write(b"#" * (len(content) - 1))
    found = scrape(monitor)
    assert (found["distill_harvest_answers_total"], found["distill_monitor_errors"]) == ({("mine",): 2}, {(): 0})


def test_a_ledger_that_was_replaced_is_counted_anew(run: Run, monitor: RunMetrics) -> None:
    ledger = harvest(run, response(0), response(1), response(2))
    scrape(monitor)
    write_atomic(ledger, response(7).model_dump_json() + "\n" + response(8).model_dump_json() + "\n")
    assert scrape(monitor)["distill_harvest_answers_total"] == {("mine",): 2}
    ledger.unlink()
    assert "distill_harvest_answers_total" not in scrape(monitor)


def test_the_harvest_wants_every_prompt_of_the_train_split_times_the_samples(tmp_path: Path) -> None:
    run = exported_run(tmp_path / "mine", harvest={"samples": 3})
    found = scrape(RunMetrics(tmp_path))
    prompts = len((run.path / "dataset" / "train.jsonl").read_bytes().splitlines())
    assert found["distill_harvest_prompts"] == {("mine",): prompts}
    assert found["distill_harvest_wanted_answers"] == {("mine",): 3 * prompts}


def test_training_is_told_by_its_last_step(run: Run, monitor: RunMetrics) -> None:
    train(run, step=1, loss=9.0)
    train(run)
    found = scrape(monitor)
    assert {name: found[name]["mine",] for name in run_metrics.STEP_GAUGES} == {
        "distill_training_step": 3,
        "distill_training_loss": 2.5,
        "distill_training_nll": 2.25,
        "distill_training_odds_ratio": 0.75,
        "distill_training_accuracy": 0.5,
        "distill_training_margin": 0.5,
        "distill_training_learning_rate": 1e-4,
        "distill_training_tokens_per_second": 800,
    }
    assert found["distill_training_wanted_steps"] == {("mine",): 18}  # 3 steps are half of one of 3 epochs


def test_without_rejected_responses_there_is_no_series_of_pairs(run: Run, monitor: RunMetrics) -> None:
    train(run, odds_ratio=None, accuracy=None, margin=None, logp_chosen=None, logp_rejected=None)
    found = scrape(monitor)
    assert found["distill_training_loss"] == {("mine",): 2.5}
    assert not {"distill_training_odds_ratio", "distill_training_accuracy", "distill_training_margin"} & found.keys()


def test_steps_given_by_the_recipe_are_the_wanted_ones(tmp_path: Path) -> None:
    train(Run.open(tmp_path / "mine", recipe(train={"max_steps": 40})))
    assert scrape(RunMetrics(tmp_path))["distill_training_wanted_steps"] == {("mine",): 40}


def test_a_line_of_the_log_is_what_the_trainer_writes() -> None:
    """Read off the source: importing the trainer takes torch."""
    source = Path(run_metrics.__file__).parent / "training" / "record.py"
    row = next(n for n in ast.walk(ast.parse(source.read_text())) if isinstance(n, ast.ClassDef) and n.name == "LogRow")
    fields = {n.target.id for n in row.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}
    assert set(STEP) == fields
    assert {field for field, _ in run_metrics.STEP_GAUGES.values()} <= fields


def test_scores_the_gain_over_the_baseline_and_the_promoted_version_are_told(full: Path) -> None:
    found = scrape(RunMetrics(full.parent))
    report = json.loads((full / "evaluation" / "report.json").read_text())
    scores = found["distill_evaluation_score"]
    assert scores == {("mine", s, m): v["value"] for s, of in report["systems"].items() for m, v in of["scores"].items()}
    gain = next(c for c in report["comparisons"] if (c["theirs"], c["metric"]) == ("student-zero-shot", "rougeL"))
    of_baseline = ("mine", "student-zero-shot", "rougeL")
    for end, value in (("", gain["gain"]), ("_low", gain["low"]), ("_high", gain["high"])):
        assert found[f"distill_evaluation_gain{end}"] == {of_baseline: value}
    pointer = json.loads((full / "registry" / "current.json").read_text())
    assert found["distill_promoted_info"] == {("mine", pointer["version"], "trial"): 1}
    assert found["distill_promoted_score"] == {("mine", metric): value for metric, value in pointer["scores"].items()}


def test_a_gain_without_an_interval_is_told_without_one(tmp_path: Path) -> None:
    evaluated_run(tmp_path / "mine", dataset={"name": "sample", "limit": 30, "test_limit": 1})
    found = scrape(RunMetrics(tmp_path))
    assert found["distill_evaluation_gain"]
    assert not {"distill_evaluation_gain_low", "distill_evaluation_gain_high"} & found.keys()


def test_a_registry_outside_the_runs_is_told_without_a_run_and_its_history_is_counted(tmp_path: Path) -> None:
    registry = tmp_path / "registry"
    for weights in ("one", "two"):
        run = exported_run(tmp_path / weights, weights)
        promote(registry, run.path / "model" / "serving", name="trial", task={}, scores={"bleu": 0.5}, run=weights, reason="a test")
    record_refusal(registry, reason="a test", run="two", scores={})
    back_to = rollback(registry)
    found = scrape(RunMetrics(tmp_path / "none", registry=registry))
    assert found["distill_promoted_info"] == {("", back_to.version, "trial"): 1}
    assert found["distill_promoted_score"] == {("", "bleu"): 0.5}
    events = {("", "promoted"): 2, ("", "canary"): 0, ("", "refused"): 1, ("", "rolled back"): 1}
    assert found["distill_registry_events_total"] == events


@pytest.mark.parametrize(
    ("file", "content", "lost"),
    [
        ("run.json", b"{", ("distill_harvest_wanted", "distill_training_wanted")),
        ("dataset/manifest.json", b"\xff", ()),
        ("responses/teacher/responses.jsonl", b"{}\n", ()),
        ("checkpoints/r0/log.jsonl", b'{"step": 1}\n', ("distill_training",)),
        ("checkpoints/r0/log.jsonl", json.dumps({**STEP, "epoch": 0}).encode() + b"\n", ("distill_training",)),
        ("evaluation/report.json", b'{"format": 2, "systems": [], "comparisons": []}', ("distill_evaluation",)),
        ("registry/current.json", b"{}", ("distill_promoted",)),
        ("registry/history.jsonl", b"{}\n", ("distill_registry",)),
        ("registry/format.json", b'{"format": 2}', ("distill_promoted", "distill_registry")),
    ],
)
def test_a_damaged_file_is_counted_and_named_once_and_the_rest_is_told(
    full: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, file: str, content: bytes, lost: tuple[str, ...]
) -> None:
    for name in ("damaged", "whole"):
        shutil.copytree(full, tmp_path / name)
    path = tmp_path / "damaged" / file
    path.write_bytes((path.read_bytes() if file.endswith(".jsonl") else b"") + content)
    monitor = RunMetrics(tmp_path)
    scrape(monitor)
    found = scrape(monitor)
    assert found["distill_monitor_errors"] == {(): 1}
    (told,) = caplog.records
    assert told.getMessage().startswith(str(path))
    of_runs = METRICS.keys() - {"distill_monitor_errors"}
    assert all(any("whole" in labels for labels in found[name]) for name in of_runs)
    missing = {name for name in of_runs if not any("damaged" in labels for labels in found[name])}
    assert missing == {name for name in of_runs if name.startswith(lost)}


class Locked(type(Path())):  # type: ignore[misc]
    """A folder that may not be entered; who tests as root has no other."""

    def is_file(self) -> bool:
        raise PermissionError(13, "Permission denied", str(self))


class Runs(type(Path())):  # type: ignore[misc]
    """A volume of runs with what a file system keeps for itself."""

    def iterdir(self) -> Iterator[Path]:
        yield Locked(self / "lost+found")
        yield from Path(self).iterdir()


def test_a_folder_that_may_not_be_entered_is_counted_and_the_runs_are_told(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    found = scrape(RunMetrics(Runs(run.path.parent)))
    assert found["distill_monitor_errors"] == {(): 1}
    assert "lost+found" in caplog.text
    assert found["distill_stage_state"]["mine", "dataset", "missing"] == 1


def test_only_the_newest_runs_are_told(tmp_path: Path) -> None:
    for number in range(run_metrics.MAX_RUNS + 2):
        run = Run.open(tmp_path / f"run-{number}", recipe())
        os.utime(run.path / "run.json", (number, number))
    (tmp_path / "no-run").mkdir()
    told = {labels[0] for labels in scrape(RunMetrics(tmp_path))["distill_stage_state"]}
    assert told == {f"run-{number}" for number in range(2, run_metrics.MAX_RUNS + 2)}


def test_nothing_is_written(full: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in full.rglob("*")}
    scrape(RunMetrics(full.parent))
    assert {path: path.stat().st_mtime_ns for path in full.rglob("*")} == before


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["monitor", "--runs", str(tmp_path / "none")]) == SettingsError.exit_code
    assert f"--runs {tmp_path / 'none'}: no such directory" in capsys.readouterr().err


def started(*options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "shared.cli", "monitor", *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_command_serves_what_it_reads_and_ends_with_0_when_told_to(tmp_path: Path, number: signal.Signals) -> None:
    run = Run.open(tmp_path / "mine", recipe())
    with started("--runs", str(tmp_path), "--port", "0") as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline().strip()
            assert line.startswith("monitor: metrics on http://127.0.0.1:")
            for answers in (1, 2):
                harvest(run, response(answers))
                text = httpx.get(line.rpartition(" ")[2], trust_env=False, timeout=60).text
                assert f'distill_harvest_answers_total{{run="mine"}} {answers}.0' in text
            process.send_signal(number)
            with awake() as seconds:
                assert process.communicate(timeout=60) == ("", "")
                assert seconds() < 3
            assert process.returncode == 0
        finally:
            process.kill()


TOLD_WHILE_IT_STARTS = """
import os, signal, sys, time
from shared import cli

class Early:
    def find_spec(self, name, *rest):
        if name == "prometheus_client":
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.3)

sys.meta_path.insert(0, Early())
cli.entry()
"""


def test_told_to_end_while_it_still_imports_what_it_needs_it_ends_with_0(tmp_path: Path) -> None:
    command = [sys.executable, "-c", TOLD_WHILE_IT_STARTS, "monitor", "--runs", str(tmp_path), "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_taken_port_is_named_with_the_remedy(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with started("--runs", str(tmp_path), "--port", str(port)) as process:
            _, said = process.communicate(timeout=20)
    assert process.returncode == SettingsError.exit_code
    assert f"--port {port}" in said
    assert "Traceback" not in said


def test_a_monitor_needs_neither_a_model_nor_the_libraries_of_a_server() -> None:
    code = "import sys, student_trainer.run_metrics, shared.http.metrics; print(*{m.partition('.')[0] for m in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "numpy", "fastapi", "starlette", "uvicorn", "ctranslate2"} & set(done.stdout.split())
