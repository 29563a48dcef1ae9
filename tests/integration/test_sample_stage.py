"""`distill sample` with a real model of random weights: deterministic, resumable, and nothing asked for where nothing is wanted."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from shared.cli import main
from shared.contracts import Response

PROMPTS, SAMPLES = 40, 2


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("DISTILL_CACHE", str(folder))
        yield folder


def recipe(folder: Path) -> Path:
    file = folder / "recipe.yaml"
    file.write_text(f"""
name: test
dataset: {{limit: {PROMPTS}}}
teacher: {{launch: {{engine: scripted}}}}
student: {{model: "random:tiny-t5"}}
sample: {{samples: {SAMPLES}, max_tokens: 8, stop: []}}
""")
    return file


def ledger_of(out: Path) -> Path:
    return out / "responses" / "student-r0" / "responses.jsonl"


def lines(out: Path) -> list[tuple[str, str, int, str, str]]:
    rows = [Response.model_validate_json(line) for line in ledger_of(out).read_text().splitlines()]
    return sorted((r.key, r.example_id, r.sample, r.status, r.text) for r in rows)


def sample(file: Path, out: Path, *more: str) -> int:
    return main(["sample", "--recipe", str(file), "--out", str(out), *more])


def test_a_student_cut_short_at_any_line_answers_as_one_that_was_not(
    tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = recipe(tmp_path), tmp_path / "run"
    assert sample(file, out) == 0
    whole = lines(out)
    assert len(whole) == PROMPTS * SAMPLES
    texts = [text for *_, status, text in whole if status == "ok"]
    assert len(set(texts)) > PROMPTS  # sampled, and not one answer for all

    assert sample(file, out) == 0
    assert "responses/student-r0: complete, nothing to do" in capsys.readouterr().out

    for kept in (0, 1, PROMPTS * SAMPLES // 2 + 1):
        rows = ledger_of(out).read_bytes().splitlines(keepends=True)
        ledger_of(out).write_bytes(b"".join(rows[:kept]) + b'{"torn')
        assert sample(file, out) == 0
        assert lines(out) == whole


def test_an_interrupted_student_keeps_its_answers_and_prints_how_to_go_on(tmp_path: Path, cache: Path) -> None:
    file, out = recipe(tmp_path), tmp_path / "run"
    options = ["--recipe", str(file), "--out", str(out), "--set", "sample.samples=16", "--set", "sample.max_tokens=64"]
    command = [sys.executable, "-m", "shared.cli", "sample", *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        while not ledger_of(out).exists() or not ledger_of(out).stat().st_size:
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate()
    assert process.returncode == 130
    assert f"distill sample --recipe {file} --out {out}" in said
    assert "Traceback" not in said
    assert 0 < len(lines(out)) < PROMPTS * 16


def test_another_seed_gives_other_answers(tmp_path: Path, cache: Path) -> None:
    file = recipe(tmp_path)
    sample(file, tmp_path / "a")
    sample(file, tmp_path / "b", "--set", "seed=1")
    assert {text for *_, text in lines(tmp_path / "a")} != {text for *_, text in lines(tmp_path / "b")}


def test_no_samples_leave_an_empty_ledger_and_a_manifest(tmp_path: Path) -> None:
    """No cache: without samples no model is needed."""
    assert sample(recipe(tmp_path), tmp_path / "run", "--set", "sample.samples=0") == 0
    assert ledger_of(tmp_path / "run").read_bytes() == b""
    manifest = json.loads((tmp_path / "run" / "responses" / "student-r0" / "manifest.json").read_text())
    assert manifest["counts"] == {"prompts": 0, "answers": 0}
    assert [output["path"] for output in manifest["outputs"]] == ["responses/student-r0/responses.jsonl"]
