"""`distill harvest` of a real vLLM behind the gateway: its engine is killed in the middle, comes back, and no row is lost or paid twice."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from shared.contracts import Response
from shared.harvest.ledger import answer_files

if TYPE_CHECKING:
    from conftest import Engine, Start

PROMPTS, SAMPLES = 24, 2


def rows(out: Path) -> list[Response]:
    files = answer_files(out / "responses" / "teacher")
    return [Response.model_validate_json(line) for file in files for line in file.read_text().splitlines()]


def test_a_harvest_waits_out_an_engine_that_dies_and_ends_complete(tmp_path: Path, engine: Engine, start: Start) -> None:
    gateway = start(engine.url, "--no-auth")
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "run"
    recipe.write_text(
        f"name: vllm\ndataset: {{name: sample, limit: {PROMPTS}}}\n"
        f'teacher: {{url: "{gateway.base}/v1", timeout_s: 120, patience_s: 400}}\n'
        f"harvest: {{samples: {SAMPLES}, max_tokens: 16, concurrency: 4, max_failed_fraction: 0.5}}\n"
    )
    command = [sys.executable, "-m", "shared.cli", "harvest", "--recipe", str(recipe), "--out", str(out)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as harvest:
        until = time.monotonic() + 240
        while len(rows(out)) < 6 * SAMPLES:
            assert harvest.poll() is None, harvest.communicate()
            assert time.monotonic() < until, "no answers came"
            time.sleep(0.05)
        engine.kill()
        before = len(rows(out))
        time.sleep(5)
        assert harvest.poll() is None, harvest.communicate()
        while_dead = len(rows(out)) - before
        engine.start()
        said = harvest.communicate(timeout=400)
    assert harvest.returncode == 0, said
    assert while_dead <= 4 * SAMPLES  # what was on its way through the gateway
    assert "has not answered for" in said[1]
    counts = json.loads((out / "responses" / "teacher" / "manifest.json").read_text())["counts"]
    found = rows(out)
    assert Counter(row.example_id for row in found).total() == len({(row.example_id, row.sample) for row in found}) == PROMPTS * SAMPLES
    # an empty answer of so small a model is an honest failure; the outage is none
    assert set(counts["failed"]) <= {"empty"}
    assert all(row.model == "teacher" for row in found)
