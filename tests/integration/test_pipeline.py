"""The whole pipeline as a user runs it: real processes, real HTTP, a random student, a scripted teacher."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import openai
import pytest
from teachers import count_lines, lines

RECIPE = Path(__file__).parents[2] / "recipes" / "smoke.yaml"
STAGES = ["dataset", "responses/teacher", "responses/student-r0", "triplets/r0", "checkpoints/r0", "model", "evaluation"]
SYSTEMS = {
    "student-zero-shot",
    "student-few-shot",
    "teacher-zero-shot",
    "teacher-few-shot",
    "distilled",
    "constant",
    "first-question",
    "first-sentence",
    "subject-template",
    "reference",
}


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "shared.cli", *arguments]


def run_smoke(out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command("run", "--recipe", str(RECIPE), "--out", str(out), "--no-serve", *more),
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes], seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"the process ended first, with {process.returncode}"
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.002)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "smoke"
    done = run_smoke(out)
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)
    return out


def test_one_command_ends_with_a_promoted_student_and_a_manifest_for_every_stage(finished: Path) -> None:
    for stage in STAGES:
        manifest = json.loads((finished / stage / "manifest.json").read_text())
        assert manifest["outputs"], stage
    assert json.loads((finished / "registry" / "current.json").read_text())["name"] == "smoke"


def test_the_report_scores_every_system_between_0_and_1(finished: Path) -> None:
    systems = json.loads((finished / "evaluation" / "report.json").read_text())["systems"]
    assert set(systems) >= SYSTEMS
    for name in SYSTEMS:
        for metric in ("rouge1", "rouge2", "rougeL", "bleu"):
            assert 0 <= systems[name]["scores"][metric]["value"] <= 1, (name, metric)
    rouge_l = {name: systems[name]["scores"]["rougeL"]["value"] for name in SYSTEMS}
    assert rouge_l["teacher-zero-shot"] > rouge_l["student-zero-shot"]
    assert "<table" in (finished / "evaluation" / "report.html").read_text()


def test_a_second_run_does_nothing_again_and_says_so(finished: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*") if p.is_file() and not {".locks", ".writer"} & {*p.parts}}
    done = run_smoke(finished)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("complete, nothing to do") == 6
    after = {p: p.stat().st_mtime_ns for p in finished.rglob("*") if p.is_file() and not {".locks", ".writer"} & {*p.parts}}
    assert after == before


def test_a_run_whose_models_have_left_the_cache_makes_them_again_only_if_a_stage_is_left(finished: Path, tmp_path: Path) -> None:
    out, empty = tmp_path / "run", {**os.environ, "DISTILL_CACHE": str(tmp_path / "cache")}
    shutil.copytree(finished, out)
    arguments = command("run", "--recipe", str(RECIPE), "--out", str(out), "--no-serve")
    assert subprocess.run(arguments, env=empty, check=False, capture_output=True).returncode == 0
    assert not (tmp_path / "cache").exists()
    shutil.rmtree(out / "responses" / "student-r0")
    done = subprocess.run(arguments, env=empty, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("converting") == 1
    assert done.stdout.index("converting random:tiny-t5") < done.stdout.index("responses/teacher: ")


def test_training_goes_on_with_the_export_and_evaluation_with_the_promotion(finished: Path, teacher: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    for folder in ("model", "evaluation", "registry"):
        shutil.rmtree(out / folder)
    shared = ["--recipe", str(RECIPE), "--out", str(out)]
    trained = subprocess.run(command("train", *shared, "--export"), capture_output=True, text=True, check=False)
    assert trained.returncode == 0, trained.stderr
    assert "checkpoints/r0: complete, nothing to do" in trained.stdout
    assert (out / "model" / "manifest.json").exists()
    registry = tmp_path / "registry"
    more = ["--teacher-url", f"{teacher}/v1", "--promote", "--registry", str(registry)]
    evaluated = subprocess.run(command("evaluate", *shared, *more), capture_output=True, text=True, check=False)
    assert evaluated.returncode == 0, evaluated.stderr
    assert "promoted: version" in evaluated.stdout
    assert json.loads((registry / "current.json").read_text())["name"] == "smoke"


def test_a_run_directory_refuses_other_settings_and_shows_the_difference(finished: Path) -> None:
    done = run_smoke(finished, "--set", "train.epochs=7")
    assert done.returncode == 6
    assert "train.epochs" in done.stderr
    assert "7" in done.stderr


def test_a_run_killed_in_harvest_and_in_training_finishes_with_the_same_triplets(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "killed"
    arguments = command("run", "--recipe", str(RECIPE), "--out", str(out), "--no-serve")

    slow = {**os.environ, "TEACHER_DELAY_S": "0.3"}
    process = subprocess.Popen(arguments, start_new_session=True, stdout=subprocess.DEVNULL, env=slow)
    wait_for(lambda: count_lines(out) >= 12, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (out / "responses" / "teacher" / "manifest.json").exists(), "killed too late to show anything"
    kept = count_lines(out)

    process = subprocess.Popen(arguments, start_new_session=True, stdout=subprocess.DEVNULL)
    wait_for(lambda: any((out / "checkpoints" / "r0").glob("checkpoint-*")), process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (out / "checkpoints" / "r0" / "manifest.json").exists(), "killed too late to show anything"
    assert count_lines(out) > kept

    done = run_smoke(out)
    assert done.returncode == 0, done.stdout + done.stderr
    keys = [key for key, *_ in lines(out)]
    assert len(keys) == len(set(keys)) == 48 * 4
    name = "triplets/r0/triplets.jsonl"
    assert (out / name).read_bytes() == (finished / name).read_bytes()


@pytest.fixture
def student(finished: Path) -> Iterator[str]:
    port = free_port()
    process = subprocess.Popen(command("serve", "--registry", str(finished / "registry"), "--port", str(port)))
    base = f"http://127.0.0.1:{port}"
    wait_for(lambda: _answers(base), process, 60)
    yield base
    process.terminate()
    assert process.wait(10) == 0


@pytest.fixture
def teacher() -> Iterator[str]:
    port = free_port()
    process = subprocess.Popen(command("teacher", "--no-auth", "--recipe", str(RECIPE), "--port", str(port)))
    base = f"http://127.0.0.1:{port}"
    wait_for(lambda: _answers(base), process, 60)
    yield base
    process.terminate()
    assert process.wait(10) == 0


def _answers(base: str) -> bool:
    try:
        return httpx.get(f"{base}/readyz", trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


def test_the_openai_client_speaks_to_teacher_and_student_alike(teacher: str, student: str) -> None:
    for base in (teacher, student):
        client = openai.OpenAI(base_url=f"{base}/v1", api_key="none", max_retries=0)
        model = client.models.list().data[0].id
        messages = [{"role": "user", "content": "I have had a headache for three days. What can I take?"}]
        answer = client.chat.completions.create(model=model, messages=messages, max_tokens=16, n=2)  # type: ignore[call-overload]
        assert len(answer.choices) == 2
        assert isinstance(answer.choices[0].message.content, str)
        assert answer.choices[0].logprobs is None


def test_the_student_summarises_a_question_by_its_own_route(student: str) -> None:
    answer = httpx.post(
        f"{student}/v1/generate", json={"question": "I have had a headache for three days. What can I take?"}, trust_env=False
    )
    assert answer.status_code == 200, answer.text
    assert "version" in answer.json()


def test_a_run_trained_otherwise_takes_over_all_answers_and_a_refused_promotion_ends_with_exit_code_3_and_serves_nothing(
    finished: Path, tmp_path: Path
) -> None:
    # one step at a rate that moves nothing: the student stays what it was
    out = tmp_path / "refused"
    done = run_smoke(out, "--answers-from", str(finished), "--set", "train.max_steps=1", "--set", "train.learning_rate=1e-12")
    assert done.returncode == 3, done.stdout + done.stderr
    assert f"responses/teacher: 192 answers taken over from {finished}" in done.stdout
    assert json.loads((out / "responses/teacher/manifest.json").read_text())["counts"]["requests"] == 0
    assert "rougeL" in done.stderr
    assert not (out / "registry" / "current.json").exists()


def test_ctrl_c_ends_the_stage_and_the_pipeline_with_130_and_the_command_to_go_on(tmp_path: Path) -> None:
    out = tmp_path / "interrupted"
    process = subprocess.Popen(
        command("run", "--recipe", str(RECIPE), "--out", str(out), "--no-serve"), start_new_session=True, stderr=subprocess.PIPE
    )
    wait_for(lambda: any((out / "checkpoints" / "r0").glob("checkpoint-*")), process)
    os.killpg(process.pid, signal.SIGINT)  # what a terminal sends
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said.decode()
    assert b"distill run --recipe" in said
    assert (out / "triplets" / "r0" / "manifest.json").exists()
    assert any((out / "checkpoints" / "r0").glob("checkpoint-*"))


@pytest.mark.parametrize("stage", ["harvest", "sample", "triplets", "train", "export", "evaluate"])
def test_ctrl_c_as_any_stage_begins_ends_it_with_130_and_the_same_command_finishes_it(stage: str, finished: Path, tmp_path: Path) -> None:
    folder = dict(zip(["harvest", "sample", "triplets", "train", "export", "evaluate"], STAGES[1:], strict=True))[stage]
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    shutil.rmtree(out / folder)
    lock = out / ".locks" / folder.replace("/", "-")
    lock.unlink()
    url = ["--teacher-url", "http://127.0.0.1:9/v1"] if stage in ("harvest", "evaluate") else []
    arguments = command(stage, "--recipe", str(RECIPE), "--out", str(out), *url)
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE)
    wait_for(lambda: lock.exists() and lock.read_text().startswith(f"{process.pid} on "), process)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said.decode()
    assert f"distill {stage} --recipe" in said.decode()
    if url:
        return  # nobody answers at that URL; that a harvest goes on is shown with a teacher elsewhere
    assert subprocess.run(arguments, check=False, capture_output=True).returncode == 0
    assert (out / folder / "manifest.json").exists()
