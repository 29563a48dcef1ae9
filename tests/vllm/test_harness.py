"""An evaluation harness that people use, unchanged: lm-eval (EleutherAI) asks the gateway for text, as it asks any such server."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from conftest import Engine, Gateway, Start

ROOT = Path(__file__).parents[2]
LM_EVAL = Path(os.environ.get("HARNESS_VENV") or ROOT / ".venv-lm-eval") / "bin/lm_eval"
KEY = "harness-key-0123456789-abcdef"
ROWS = [
    {"question": "I take ibuprofen against migraine.", "answer": "What should I know about ibuprofen and migraine?"},
    {"question": "Is eczema contagious?", "answer": "What should I know about contagious and eczema?"},
    {"question": "My grandmother has glaucoma.", "answer": "no"},
]
TASK = """
task: tiny
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
output_type: generate_until
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\n\\n"], max_gen_toks: 16, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""


def evaluated(gateway: Gateway, folder: Path, model: str, path: str, *options: str) -> tuple[float, list[str]]:
    """The harness's score of a task of three rows, and the answers it got."""
    if not LM_EVAL.exists():
        pytest.fail(f"{LM_EVAL} is not there: `make test-vllm` sets its environment up")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "tiny.yaml").write_text(TASK.format(rows=folder / "rows.jsonl"))
    asks = f"base_url={gateway.base}{path},model=teacher,tokenized_requests=False,tokenizer_backend=None,max_retries=1,num_concurrent=2"
    command = [str(LM_EVAL), "--model", model, "--model_args", asks, "--include_path", str(folder), "--tasks", "tiny"]
    command += ["--output_path", str(folder / "out"), "--log_samples", *options]
    variables = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "home"), "OPENAI_API_KEY": KEY, "NO_PROXY": "127.0.0.1"}
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    (results,) = (folder / "out").rglob("results*.json")
    (samples,) = (folder / "out").rglob("samples*.jsonl")
    answers = [json.loads(line)["filtered_resps"][0] for line in samples.read_text().splitlines()]
    return json.loads(results.read_text())["results"]["tiny"]["exact_match,none"], answers


@pytest.mark.parametrize(
    ("model", "path", "options"),
    [("local-completions", "/v1/completions", []), ("local-chat-completions", "/v1/chat/completions", ["--apply_chat_template"])],
)
def test_the_harness_gets_the_answers_and_scores_them(start: Start, tmp_path: Path, model: str, path: str, options: list[str]) -> None:
    gateway = start("", "--engine", "scripted", TEACHER_API_KEYS=f"harness={KEY}")
    score, answers = evaluated(gateway, tmp_path, model, path, *options)
    assert score == pytest.approx(2 / 3)
    assert answers[:2] == [row["answer"] for row in ROWS[:2]]


def test_the_harness_gets_the_answers_of_a_real_engine(engine: Engine, start: Start, tmp_path: Path) -> None:
    gateway = start(engine.url, TEACHER_API_KEYS=f"harness={KEY}")
    _, answers = evaluated(gateway, tmp_path, "local-chat-completions", "/v1/chat/completions", "--apply_chat_template")
    assert len(answers) == 3
    assert any(answer.strip() for answer in answers)  # what a model says is its own affair, to nothing it may come as well
