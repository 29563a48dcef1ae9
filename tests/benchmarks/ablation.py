"""Does the odds ratio pay where the teacher gives text alone? The whole grid, by one command that goes on where it was.

    python tests/benchmarks/ablation.py --meqsum meqsum.xlsx    # what `make ablation MEQSUM=meqsum.xlsx` runs: hours
    python tests/benchmarks/ablation.py --quick                 # two minutes: two arms, few rows, one seed, in a folder of its own
    python tests/benchmarks/ablation.py --table                 # the tables of results/ablation.jsonl; no model is loaded
    python tests/benchmarks/ablation.py --table --seed 0 1      # of these seeds alone, while others are not complete

Student: SmolLM2-135M-Instruct, its upper 15 of 30 layers trained with AdamW, learning rate 1e-4, 8 prompts a step, 2 epochs (2 rounds:
one each, so that all arms take as many steps). Teacher: the same with the embedded question adapter, asked over HTTP for 8 answers a
prompt; the student is asked for 8 as well. An arm with K teacher samples takes K of the 8, others for every seed. Chosen: the best of K
by ROUGE-L with the row's reference. No checkpoint is chosen by validation: each arm is scored after its last step, greedily, on the whole
test split. A cell (data set, arm, seed) is a run directory below runs/ablation and a line of results/ablation.jsonl, with the ROUGE-L of
every test row; the pool of answers lies beside it, so that a grid may be finished on another machine.

Intervals: 95%, percentile, 10,000 resamples of test rows and, with them, of seeds; gains are paired by row and seed.
Expected, written down before the first run (field notes' trial: 160 rows, one seed): SFT on the chosen 31.0, lambda 0.1 against the
teacher's worst 30.4, lambda 0.5 against the student's own 32.8. So: the teacher's worst as rejected gains nothing, the student's own a
point or two that three seeds may just show; K = 8 beats K = 4 beats K = 1 by more than that; a second round adds little.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import secrets
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from evaluator.metrics.rouge import rouge_rows
from shared.artifacts import Run, read_jsonl, sha256_file, write_atomic, write_jsonl
from shared.contracts import Response
from shared.datasets.stage import prepare
from shared.prompts import zero_shot
from shared.settings import Recipe, load_settings
from student_trainer.pipeline import launched_teacher, run_command
from student_trainer.training.packing import Packer
from student_trainer.training.rounds import train_rounds
from student_trainer.triplets.build import build

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "ablation.jsonl"
POOL = 8
"""Answers a prompt of teacher and student; arms take their part."""
SEEDS = (0, 1, 2)
STAGES = ("responses/teacher", "responses/student-r0")
BASE: dict[str, Any] = {
    "teacher": {"launch": {"engine": "local", "model": "embedded:smollm2-135m-questions"}},
    "student": {"model": "embedded:smollm2-135m"},
    "task": {"max_question_chars": 400, "shots": 1},
    "harvest": {"samples": POOL, "temperature": 0.8, "max_tokens": 40, "concurrency": 16},
    "sample": {"samples": POOL, "temperature": 0.8, "max_tokens": 24},
    "triplets": {"ranking": "reference", "max_rejected": 1, "rejected_from": ["student"]},
    "train": {
        "epochs": 2, "batch_size": 8, "learning_rate": 1e-4, "frozen_layers": 15, "max_response_tokens": 48, "validate_every": 0,
        "checkpoint_minutes": 60, "report_to": [],
    },
    "evaluate": {"max_tokens": 32},
}  # fmt: skip
DATA: dict[str, dict[str, Any]] = {
    "sample": {"name": "sample", "reserved_rows": 110},
    "meqsum": {"name": "meqsum", "limit": 160, "test_rows": 200},
}
SFT = {"train.orpo_lambda": 0.0}
OWN = {"train.orpo_lambda": 0.5}
ARMS: dict[str, tuple[int, dict[str, Any]]] = {
    "SFT, K=4": (4, SFT),
    "ORPO 0.5, own": (4, OWN),
    "ORPO 0.1, teacher's worst": (4, {"train.orpo_lambda": 0.1, "triplets.rejected_from": ["teacher"]}),
    "ORPO 0.5, own x3": (4, {**OWN, "triplets.max_rejected": 3}),
    "ORPO 0.5, own, 2 rounds": (4, {**OWN, "train.rounds": 2, "train.epochs": 1}),
    "SFT, K=1": (1, SFT),
    "SFT, K=8": (8, SFT),
    "ORPO 0.5, own, K=8": (8, OWN),
    "ORPO 1.0, own": (4, {"train.orpo_lambda": 1.0}),
    "ORPO 0.5, own, K=1": (1, OWN),
    "ORPO 0.1, own": (4, {"train.orpo_lambda": 0.1}),
    "ORPO 0.5, own, 2 rounds, on-policy": (4, {**OWN, "train.rounds": 2, "train.epochs": 1, "triplets.on_policy": 1.0}),
    "SFT + KL to samples 0.02, K=8": (8, {**SFT, "train.kl_teacher_sequence": 0.02}),
}
"""Name -> teacher samples a prompt, settings; in the order in which they are run."""
COMPARED = {arm: "SFT, K=4" for arm in ARMS} | {
    "ORPO 0.5, own, K=1": "SFT, K=1",
    "ORPO 0.5, own, K=8": "SFT, K=8",
    "SFT + KL to samples 0.02, K=8": "SFT, K=8",
    "ORPO 0.5, own, 2 rounds": "ORPO 0.5, own",
    "ORPO 0.5, own, 2 rounds, on-policy": "ORPO 0.5, own",
}
"""What each arm's gain is over: the same without the one thing that it tries."""


def recipe_file(data: str, work: Path, *, meqsum: Path | None, quick: bool) -> Path:
    """What all arms have in common, as a recipe."""
    dataset = dict(DATA[data])
    if data == "meqsum" and meqsum:
        dataset["path"] = str(meqsum.resolve())
    if quick:
        dataset |= {"limit": 16, "test_limit": 8}
    file = work / data / "recipe.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump({"name": f"ablation-{data}", "dataset": dataset, **BASE}))
    return file


def pool_file(data: str, work: Path, *, quick: bool) -> Path:
    """All answers that arms take their part of; kept with the results, since a teacher's samples are drawn anew every time."""
    return work / data / "pool.jsonl" if quick else RESULTS.with_name(f"ablation-pool-{data}.jsonl")


def fill_pool(data: str, work: Path, *, meqsum: Path | None, quick: bool) -> None:
    """Harvest the teacher and sample the student, unless that was done."""
    recipe, file = recipe_file(data, work, meqsum=meqsum, quick=quick), pool_file(data, work, quick=quick)
    if file.exists():
        return
    folder = work / data / "pool"
    run = Run.open(folder, load_settings(Recipe, flags={}, yaml_file=recipe))
    options = ["--recipe", str(recipe), "--out", str(folder)]
    run_command("prepare", options)
    if run.manifest("responses/teacher") is None:
        assert run.recipe.teacher.launch is not None
        key = secrets.token_urlsafe(32)
        with launched_teacher(run, run.recipe.teacher.launch, key) as url:
            run_command("harvest", [*options, "--teacher-url", url], {"DISTILL_TEACHER__API_KEY": key})
    run_command("sample", options)
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    for stage in STAGES:
        for row in read_jsonl(folder / stage / "responses.jsonl", Response):
            lines.append({"stage": stage, **row.model_dump(include={"example_id", "sample", "text", "finish_reason", "status", "model"})})
    write_atomic(file, "".join(json.dumps(line) + "\n" for line in lines))


def fill(run: Run, stage: str, samples: set[int], pool: Path) -> None:
    """The answers of a stage: those samples of the pool."""
    rows = []
    for line in map(json.loads, pool.read_text().splitlines()):
        if line.pop("stage") == stage and line["sample"] in samples:
            key = f"{line['example_id']}-{line['sample']}"
            rows.append(Response(**line, key=key, latency_s=0, attempts=1, received_at="in the pool"))
    made = run.stage(stage, inputs=["dataset"])
    write_jsonl(made.path / "responses.jsonl", rows)
    made.finish([made.path / "responses.jsonl"], settings={"samples": sorted(samples), "pool": sha256_file(pool)})


def cell(data: str, arm: str, seed: int, work: Path, pool: Path) -> dict[str, Any]:
    """Triplets, training and test answers of one arm and seed, in a process of its own."""
    begun = time.monotonic()
    samples, settings = ARMS[arm]
    mine = load_settings(Recipe, flags={**settings, "seed": seed}, yaml_file=work / data / "recipe.yaml")
    path = work / data / f"{list(ARMS).index(arm):02d}-seed{seed}"
    run = Run.open(path, mine)
    test = prepare(run)["test"]
    for stage, count in zip(STAGES, (samples, POOL), strict=True):
        fill(run, stage, {(seed * samples + i) % POOL for i in range(count)}, pool)
    build(run)
    train_rounds(run, before_training=lambda: None)
    train_s = time.monotonic() - begun
    rounds = mine.train.rounds
    from student_trainer.training.stage import uses_bf16  # torch, which tables can do without
    from student_trainer.training.student import load
    from student_trainer.training.validation import Answerer

    student, tokenizer = load(path / f"checkpoints/r{rounds - 1}/student", mine.train, bf16=False)
    student.bf16 = uses_bf16(mine.train, student.device)
    answer = Answerer(student.eval(), tokenizer, tokenizer.pad_token_id, mine.evaluate.max_tokens, mine.evaluate.stop)
    packer = Packer(tokenizer, student.kind, max_prompt_tokens=10**6, max_response_tokens=10**6)
    texts = answer([packer.prompt(zero_shot(mine.task, e.question)) for e in test])
    scores = rouge_rows(texts, [e.summary or "" for e in test])
    triplets = run.manifest(f"triplets/r{rounds - 1}")
    row = {
        "data": data, "arm": arm, "seed": seed, "train_rows": triplets.counts["prompts_kept"], "triplets": triplets.counts["triplets"],
        **{name: round(100 * float(np.mean(values)), 2) for name, values in scores.items()},
        "rows": [round(float(v), 4) for v in scores["rougeL"]],
        "train_s": round(train_s), "seconds": round(time.monotonic() - begun), "machine": machine(),
    }  # fmt: skip
    for number in range(rounds):  # half a gigabyte each
        shutil.rmtree(path / f"checkpoints/r{number}/student", ignore_errors=True)
    return row


def machine() -> str:
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "?"
    )
    return f"{os.cpu_count()} cores, {model}, Python {platform.python_version()}"


def results(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def resampled(cells: Sequence[Sequence[float]], draws: np.random.Generator, count: int = 10_000) -> tuple[float, float, float]:
    """Mean of (seeds, rows) scores and its 95% interval, rows and seeds resampled."""
    table = np.asarray(cells)
    seeds, rows = table.shape
    means = np.empty(count)
    for start in range(0, count, 1000):
        r = draws.integers(rows, size=(1000, rows))
        s = draws.integers(seeds, size=(1000, seeds))
        means[start : start + 1000] = table[s[:, :, None], r[:, None, :]].mean((1, 2))
    low, high = np.percentile(means, [2.5, 97.5])
    return float(table.mean()), float(low), float(high)


def tables(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Print a table a data set; returns the gains."""
    by_data: dict[str, dict[str, dict[int, dict[str, Any]]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        by_data[row["data"]][row["arm"]][row["seed"]] = row
    gains: dict[str, Any] = {}
    for data, arms in by_data.items():
        first = next(iter(next(iter(arms.values())).values()))
        print(f"\n{data}: {first['train_rows']} train rows, {len(first['rows'])} test rows, ROUGE of 100; {first['machine']}")
        print(f"{'arm':36} seeds  R-1   R-2   R-L   [95%]          gain in R-L over (paired)                 s a cell")
        for arm in [a for a in ARMS if a in arms]:
            cells, draws = arms[arm], np.random.default_rng(0)
            mean, low, high = resampled([c["rows"] for c in cells.values()], draws)
            line = f"{arm:36} {len(cells):>5}  " + "  ".join(
                f"{np.mean([c[m] for c in cells.values()]):4.1f}" for m in ("rouge1", "rouge2")
            )
            line += f"  {100 * mean:4.1f}  [{100 * low:4.1f}, {100 * high:4.1f}]"
            other = COMPARED[arm]
            both = sorted(cells.keys() & arms.get(other, {}).keys())
            if other != arm and both:
                pairs = [np.subtract(cells[s]["rows"], arms[other][s]["rows"]) for s in both]
                gain, low, high = (100 * v for v in resampled(pairs, draws))
                gains[f"{data}: {arm}"] = {
                    "over": other,
                    "gain": round(gain, 2),
                    "low": round(low, 2),
                    "high": round(high, 2),
                    "seeds": len(both),
                }
                line += f"  {gain:+5.1f} [{low:+5.1f}, {high:+5.1f}] {other:20}"
            else:
                line += " " * 43
            print(f"{line} {np.mean([c['seconds'] for c in cells.values()]):6.0f}")
    return gains


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--meqsum", type=Path, help="MeQSum's xlsx; without it only the embedded sample is used")
    parser.add_argument("--work", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--seed", type=int, nargs="+", help="with --table: of these seeds alone")
    parser.add_argument("--cell", nargs=3, metavar=("DATA", "ARM", "SEED"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    work, file = arguments.work, RESULTS
    if arguments.quick:
        work, file = work.with_name(work.name + "-quick"), work.with_name(work.name + "-quick") / "ablation.jsonl"
    if arguments.cell:
        data, arm, seed = arguments.cell
        print(json.dumps(cell(data, arm, int(seed), work, pool_file(data, work, quick=arguments.quick))))
        return 0
    if not arguments.table:
        arms, seeds = (list(ARMS)[:2], SEEDS[:1]) if arguments.quick else (list(ARMS), SEEDS)
        data = ["sample", *(["meqsum"] if arguments.meqsum else [])]
        wanted = [(d, arm, seed) for seed in seeds for arm in arms for d in data]
        done = {(r["data"], r["arm"], r["seed"]) for r in results(file)}
        file.parent.mkdir(parents=True, exist_ok=True)
        for number, (d, arm, seed) in enumerate(wanted, 1):
            if (d, arm, seed) in done:
                continue
            begun = time.monotonic()
            fill_pool(d, work, meqsum=arguments.meqsum, quick=arguments.quick)
            options = ["--work", str(arguments.work), *(["--quick"] if arguments.quick else [])]
            made = subprocess.run(
                [sys.executable, __file__, *options, "--cell", d, arm, str(seed)], stdout=subprocess.PIPE, text=True, check=True
            )
            row = made.stdout.splitlines()[-1]
            with file.open("a") as out:
                out.write(row + "\n")
            score = json.loads(row)["rougeL"]
            print(f"{number}/{len(wanted)} {d}, {arm}, seed {seed}: ROUGE-L {score} ({time.monotonic() - begun:.0f} s)", flush=True)
    rows = [row for row in results(file) if arguments.seed is None or row["seed"] in arguments.seed]
    gains = tables(rows)
    print(f"\n{len(rows)} cells, {sum(r['seconds'] for r in rows) / 3600:.1f} h")
    print(json.dumps(gains))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
