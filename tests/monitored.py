"""A run directory with something in every part that a monitor tells of, and a scrape of it; no model is loaded."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from evaluated import FakeStudent, FakeTeacher, exported_run
from prometheus_client.registry import Collector

from evaluator.promote import promote
from evaluator.stage import evaluate
from shared.artifacts import Ledger, Run
from shared.contracts import Response
from shared.datasets.stage import prepare
from shared.prompts import zero_shot

STEP = {
    "step": 3, "epoch": 0.5, "loss": 2.5, "nll": 2.25, "odds_ratio": 0.75, "accuracy": 0.5, "logp_chosen": -2.0, "logp_rejected": -2.5,
    "margin": 0.5, "kl_reference": None, "kl_teacher_sequence": None, "kl_teacher_token": None, "grad_norm": 1.5, "learning_rate": 1e-4,
    "tokens_per_s": 800.0, "padding_ratio": 1.05,
}  # fmt: skip
"""A line of checkpoints/r0/log.jsonl."""

Series = dict[tuple[str, ...], float]


def response(number: int, reason: str | None = None) -> Response:
    """An answer, or the failure that `reason` tells."""
    return Response(
        key=hashlib.sha256(str(number).encode()).hexdigest(),
        example_id=str(number),
        sample=0,
        status="failed" if reason else "ok",
        text="" if reason else "What is it?",
        reason=reason,
        model="teacher",
        latency_s=0.1,
        attempts=1,
        received_at="2026-01-01T00:00:00.000+00:00",
    )


def harvest(run: Run, *rows: Response) -> Path:
    """Append to the teacher's ledger."""
    with Ledger(run.path / "responses" / "teacher" / "responses.jsonl", Response) as ledger:
        for row in rows:
            ledger.append(row)
    return ledger.path


def train(run: Run, **changes: float | None) -> Path:
    """Append a line to the log of the training."""
    file = run.path / "checkpoints" / "r0" / "log.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as log:
        log.write(json.dumps({**STEP, **changes}) + "\n")
    return file


def evaluated_run(path: Path, **changes: object) -> Run:
    """A run whose distilled student gives every reference, evaluated with fakes."""
    run = exported_run(path, **changes)
    right = {zero_shot(run.recipe.task, e.question): e.summary or "" for e in prepare(run)["test"]}
    evaluate(
        run.stage("evaluation", ["dataset", "model"]),
        open_teacher=lambda: FakeTeacher(right.__getitem__),
        load_base=lambda: FakeStudent(lambda prompt: "What is it?"),
        load=lambda folder: FakeStudent(right.__getitem__),
        open_system=lambda system: FakeTeacher(right.__getitem__),
        open_judge=lambda settings: FakeTeacher(right.__getitem__),
    )
    return run


def full_run(path: Path) -> Run:
    """A run harvested in part, trained three steps, evaluated and promoted."""
    run = evaluated_run(path)
    harvest(run, response(0), response(1), response(2, "RequestRefused: too long"), response(3, "empty"))
    train(run)
    promote(run, run.path / "registry")
    return run


def scrape(collector: Collector) -> dict[str, Series]:
    """Values by name of the series and by its labels' values."""
    found: dict[str, Series] = {}
    for family in collector.collect():
        for sample in family.samples:
            found.setdefault(sample.name, {})[tuple(sample.labels.values())] = sample.value
    return found
