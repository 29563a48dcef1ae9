"""Does the odds ratio pay where the teacher gives text alone? The whole grid, by one command that goes on where it was.

    python tests/benchmarks/ablation.py --meqsum meqsum.xlsx    # what `make ablation MEQSUM=meqsum.xlsx` runs: hours
    python tests/benchmarks/ablation.py --quick                 # one minute: two arms, few rows, one seed, in a folder of its own
    python tests/benchmarks/ablation.py --table                 # the tables of results/ablation.jsonl; no model is loaded
    python tests/benchmarks/ablation.py --table --seed 0 1      # of these seeds alone, while others are not complete
    python tests/benchmarks/ablation.py --markdown              # both data sets in one table, as the README has it

Student: SmolLM2-135M-Instruct, its upper 15 of 30 layers trained with AdamW, learning rate 1e-4, 8 prompts a step, 2 epochs. In arms of
two rounds each has one of them, with a warm-up, a decay and an optimizer of its own. Teacher: the same with the embedded question adapter,
asked over HTTP for 8 answers a prompt; the student is asked for 8 as well, both at temperature 0.8 where an arm says no other. Chosen: the
best of K of the teacher's by ROUGE-L with the row's reference. Rejected: the worst of 4 of the student's, most of them cut off after 24
tokens. Where one side leaves nothing to reject the other stands in, so that all arms of the same chosen train on the same prompts.

A seed decides which K and which 4 of the 8 an arm takes of each prompt, at random (all 8 where K is 8), and the order of the rows; arms
that differ in the loss alone have the same triplets in the same batches. No checkpoint is chosen by validation: each arm is scored after
its last step, greedily, on the whole test split. A cell (data set, arm, seed) is a run directory below runs/ablation and a line of
results/ablation.jsonl, with the ROUGE-L of every test row; the pools of answers lie beside it, so that a grid may be finished on another
machine.

Gains are paired by row and seed. Intervals: 95%, for other seeds and other test rows alike: the variance of the mean of two crossed random
effects, its degrees of freedom by Satterthwaite (quasi-F; Clark, 1973). p: two-sided, by Holm over all comparisons of the table.
Expected, written down before the first run (field notes' trial: 160 rows, one seed): SFT on the chosen 31.0, lambda 0.1 against the
teacher's worst 30.4, lambda 0.5 against the student's own 32.8. So: the teacher's worst as rejected gains nothing, the student's own a
point or two that three seeds may just show; K = 8 beats K = 4 beats K = 1 by more than that; a second round adds little. Of temperature:
the best of 4 at 1.2 is no better than at 0.8 (more spread, worse on average); at which the student's own were drawn hardly matters.
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
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from evaluator.metrics.rouge import rouge_rows
from evaluator.significance import holm_corrected
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
OWN_SAMPLES = 4
"""Of the student's, that an arm takes."""
STAGES = {"responses/teacher": "harvest", "responses/student-r0": "sample"}
"""Stage -> the section of the recipe that says how its answers are drawn."""
BASE: dict[str, Any] = {
    "teacher": {"launch": {"engine": "local", "model": "embedded:smollm2-135m-questions"}},
    "student": {"model": "embedded:smollm2-135m"},
    "task": {"max_question_chars": 400, "shots": 1},
    "harvest": {"samples": POOL, "temperature": 0.8, "max_tokens": 40, "concurrency": 16},
    "sample": {"samples": POOL, "temperature": 0.8, "max_tokens": 24},
    "triplets": {"ranking": "reference", "max_rejected": 1, "rejected_from": ["student", "teacher"]},
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
TWO = {**OWN, "train.rounds": 2, "train.epochs": 1}
REFERENCES = "SFT on the references"
ARMS: dict[str, tuple[int, dict[str, Any]]] = {
    "SFT, K=4": (4, SFT),
    "ORPO 0.5": (4, OWN),
    "SFT, K=1": (1, SFT),
    "SFT, K=8": (8, SFT),
    "ORPO 0.5, K=1": (1, OWN),
    "ORPO 0.5, K=8": (8, OWN),
    "ORPO 0.1": (4, {"train.orpo_lambda": 0.1}),
    "ORPO 1.0": (4, {"train.orpo_lambda": 1.0}),
    "ORPO 0.5, teacher's worst": (4, {**OWN, "triplets.rejected_from": ["teacher", "student"]}),
    "ORPO 0.5, 3 rejected": (4, {**OWN, "triplets.max_rejected": 3}),
    "ORPO 0.5, own at 0.4": (4, {**OWN, "sample.temperature": 0.4}),
    "ORPO 0.5, own at 1.2": (4, {**OWN, "sample.temperature": 1.2}),
    "SFT, K=4 at 1.2": (4, {**SFT, "harvest.temperature": 1.2}),
    "SFT + KL to samples 0.02, K=8": (8, {**SFT, "train.kl_teacher_sequence": 0.02}),
    REFERENCES: (1, SFT),
    "ORPO 0.5, 2 rounds, phi 0": (4, {**TWO, "triplets.on_policy": 0.0}),
    "ORPO 0.5, 2 rounds, phi 0.5": (4, {**TWO, "triplets.on_policy": 0.5}),
    "ORPO 0.5, 2 rounds, phi 1": (4, {**TWO, "triplets.on_policy": 1.0}),
}
"""Name -> teacher samples a prompt, settings; in the order in which they are run."""
COMPARED = {arm: "SFT, K=4" for arm in ARMS} | {
    "ORPO 0.5, K=1": "SFT, K=1",
    "ORPO 0.5, K=8": "SFT, K=8",
    "SFT + KL to samples 0.02, K=8": "SFT, K=8",
    "ORPO 0.5, own at 0.4": "ORPO 0.5",
    "ORPO 0.5, own at 1.2": "ORPO 0.5",
    "ORPO 0.5, 2 rounds, phi 0": "ORPO 0.5",
    "ORPO 0.5, 2 rounds, phi 0.5": "ORPO 0.5, 2 rounds, phi 0",
    "ORPO 0.5, 2 rounds, phi 1": "ORPO 0.5, 2 rounds, phi 0",
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


def temperature(arm: str, stage: str) -> float:
    """At which a stage's answers of this arm are drawn."""
    section = STAGES[stage]
    return float(ARMS[arm][1].get(f"{section}.temperature", BASE[section]["temperature"]))


def pool_file(data: str, stage: str, heat: float, work: Path, *, quick: bool) -> Path:
    """A stage's answers at temperature `heat`, that arms take their part of; kept with the results: a teacher's are never the same."""
    name = f"pool-{data}-{STAGES[stage]}-{heat:g}.jsonl"
    return work / name if quick else RESULTS.with_name(f"ablation-{name}")


def fill_pool(data: str, arm: str, work: Path, *, meqsum: Path | None, quick: bool) -> None:
    """Harvest the teacher and sample the student at the temperatures that `arm` needs, unless that was done."""
    recipe = recipe_file(data, work, meqsum=meqsum, quick=quick)
    for stage in STAGES:
        heat = temperature(arm, stage)
        if not (file := pool_file(data, stage, heat, work, quick=quick)).exists():
            _draw(file, stage, heat, work / data / f"pool-{STAGES[stage]}-{heat:g}", recipe)


def _draw(file: Path, stage: str, heat: float, folder: Path, recipe: Path) -> None:
    section = STAGES[stage]
    run = Run.open(folder, load_settings(Recipe, flags={f"{section}.temperature": heat}, yaml_file=recipe))
    options = ["--recipe", str(recipe), "--out", str(folder), "--set", f"{section}.temperature={heat}"]
    run_command("prepare", options)
    if section == "sample":
        run_command("sample", options)
    else:
        assert run.recipe.teacher.launch is not None
        key = secrets.token_urlsafe(32)
        with launched_teacher(run, run.recipe.teacher.launch, key) as url:
            run_command("harvest", [*options, "--teacher-url", url], {"DISTILL_TEACHER__API_KEY": key})
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = read_jsonl(folder / stage / "responses.jsonl", Response)
    kept = {"example_id", "sample", "text", "finish_reason", "status", "model"}
    write_atomic(file, "".join(json.dumps(row.model_dump(include=kept)) + "\n" for row in rows))


def taken(example_id: str, stage: str, seed: int, count: int) -> set[int]:
    """Which `count` of a prompt's POOL answers a seed takes: any as likely as any other, those of a smaller count among them."""
    return set(np.random.default_rng([seed, *f"{stage}/{example_id}".encode()]).permutation(POOL)[:count].tolist())


def fill(run: Run, stage: str, seed: int, count: int, pool: Path, references: Mapping[str, str] | None = None) -> None:
    """The answers of a stage: `count` a prompt of the pool, or a prompt's reference in their place."""
    rows = []
    for line in map(json.loads, pool.read_text().splitlines()):
        key = f"{line['example_id']}-{line['sample']}"
        if references is not None:
            line["text"] = references[line["example_id"]]
        if line["sample"] in (taken(line["example_id"], stage, seed, count) if references is None else {0}):
            rows.append(Response(**line, key=key, latency_s=0, attempts=1, received_at="in the pool"))
    made = run.stage(stage, inputs=["dataset"])
    write_jsonl(made.path / "responses.jsonl", rows)
    made.finish([made.path / "responses.jsonl"], settings={"seed": seed, "samples": count, "pool": sha256_file(pool)})


def cell(data: str, arm: str, seed: int, work: Path, *, quick: bool) -> dict[str, Any]:
    """Triplets, training and test answers of one arm and seed, in a process of its own."""
    begun = time.monotonic()
    samples, settings = ARMS[arm]
    flags = {**settings, "seed": seed, "harvest.samples": samples, "sample.samples": OWN_SAMPLES}
    mine = load_settings(Recipe, flags=flags, yaml_file=work / data / "recipe.yaml")
    path = work / data / f"{list(ARMS).index(arm):02d}-seed{seed}"
    run = Run.open(path, mine)
    splits = prepare(run)
    test = splits["test"]
    for stage, count in zip(STAGES, (samples, OWN_SAMPLES), strict=True):
        gold = {e.id: e.summary or "" for e in splits["train"]} if (arm, stage) == (REFERENCES, "responses/teacher") else None
        fill(run, stage, seed, count, pool_file(data, stage, temperature(arm, stage), work, quick=quick), gold)
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
    kept = ("prompts_kept", "triplets", "cut_off_rejected", "mean_chosen_score", "mean_rejected_score")
    row = {
        "data": data, "arm": arm, "seed": seed, **{name: triplets.counts[name] for name in kept},
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


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and test rows, its 95% interval and its p against 0; of 100, but for p."""

    mean: float
    low: float
    high: float
    p: float


def estimate(cells: Sequence[Sequence[float]]) -> Estimate:
    """The mean of scores (seeds, rows), as one of all seeds and rows there might have been.

    Two crossed random effects: var(mean) = (MS seeds + MS rows - MS rest) / (seeds * rows), degrees of freedom by Satterthwaite. It is
    taken as MS rows at least: what few seeds make of their own share may be below nothing. Of one seed: as if all were like it.
    """
    table = 100 * np.asarray(cells, dtype=float)
    seeds, rows = table.shape
    mean, by_row = table.mean(), table.mean(0)
    ms_rows = seeds * by_row.var(ddof=1)
    variance, free = ms_rows, rows - 1.0
    if seeds > 1:
        by_seed = table.mean(1)
        ms_seeds = rows * by_seed.var(ddof=1)
        ms_rest = ((table - by_seed[:, None] - by_row + mean) ** 2).sum() / ((seeds - 1) * (rows - 1))
        if (both := ms_seeds + ms_rows - ms_rest) > ms_rows:
            variance = both
            free = both**2 / (ms_seeds**2 / (seeds - 1) + ms_rows**2 / (rows - 1) + ms_rest**2 / ((seeds - 1) * (rows - 1)))
    error = float(np.sqrt(variance / table.size))
    student_t = np.abs(np.random.default_rng(0).standard_t(free, 1_000_000))
    half = error * float(np.quantile(student_t, 0.95))
    p = float((student_t >= abs(mean) / error).mean()) if error else 1.0
    return Estimate(float(mean), float(mean) - half, float(mean) + half, p)


def tables(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Print a table a data set; returns the gains."""
    cells: dict[tuple[str, str], dict[int, dict[str, Any]]] = defaultdict(dict)
    for row in rows:
        cells[row["data"], row["arm"]][row["seed"]] = row
    gains: dict[tuple[str, str], tuple[int, Estimate]] = {}
    for (data, arm), mine in cells.items():
        other = cells.get((data, COMPARED[arm]), {})
        if COMPARED[arm] != arm and (both := sorted(mine.keys() & other.keys())):
            gains[data, arm] = len(both), estimate([np.subtract(mine[s]["rows"], other[s]["rows"]) for s in both])
    corrected = dict(zip(gains, holm_corrected([gain.p for _, gain in gains.values()]), strict=True))
    for data in {data: None for data, _ in cells}:
        arms = [arm for arm in ARMS if (data, arm) in cells]
        first = next(iter(cells[data, arms[0]].values()))
        print(f"\n{data}: {first['prompts_kept']} train prompts, {len(first['rows'])} test rows, ROUGE of 100; {first['machine']}")
        print(f"{'arm':30} prompts  R-1   R-2   R-L  by seed           gain in R-L [95%]       p  p (Holm)  over{'':24} s a cell")
        for arm in arms:
            mine = cells[data, arm].values()
            means = [np.mean([c[name] for c in mine]) for name in ("prompts_kept", "rouge1", "rouge2", "rougeL")]
            seeds = " ".join(f"{c['rougeL']:.1f}" for _, c in sorted(cells[data, arm].items()))
            line = f"{arm:30} {means[0]:>6.0f}  {means[1]:4.1f}  {means[2]:4.1f}  {means[3]:4.1f}  {seeds:16}"
            if (data, arm) in gains:
                gain = gains[data, arm][1]
                line += f"  {gain.mean:+5.1f} [{gain.low:+5.1f}, {gain.high:+5.1f}]  {gain.p:6.4f}   {corrected[data, arm]:6.4f}"
                line += f"  {COMPARED[arm]:26}"
            else:
                line += " " * 69
            print(f"{line} {np.mean([c['seconds'] for c in mine]):9.0f}")
    return {
        f"{data}: {arm}": {"over": COMPARED[arm], "seeds": seeds}
        | {name: round(value, 4) for name, value in asdict(gain).items()}
        | {"holm": round(corrected[data, arm], 4)}
        for (data, arm), (seeds, gain) in gains.items()
    }


def markdown(rows: list[dict[str, Any]], gains: dict[str, Any]) -> None:
    """Print the table of the README."""
    scores: dict[tuple[str, str], list[float]] = defaultdict(list)
    for row in rows:
        scores[row["data"], row["arm"]].append(row["rougeL"])
    names = list({row["data"]: None for row in rows})
    print("| arm |" + "".join(f" {data}: ROUGE-L | gain | p |" for data in names) + " over |")
    print("|---|" + "---:|---:|---:|" * len(names) + "---|")
    for arm in [arm for arm in ARMS if any((data, arm) in scores for data in names)]:
        line = f"| {arm} |"
        for data in names:
            mine, gain = scores.get((data, arm)), gains.get(f"{data}: {arm}")
            line += f" {np.mean(mine):.1f} |" if mine else " |"
            line += f" {gain['mean']:+.1f} [{gain['low']:+.1f}, {gain['high']:+.1f}] | {gain['p']:.3f} |" if gain else " | |"
        print(f"{line} {COMPARED[arm] if COMPARED[arm] != arm else ''} |")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--meqsum", type=Path, help="MeQSum's xlsx; without it only the embedded sample is used")
    parser.add_argument("--work", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--seed", type=int, nargs="+", help="with --table or --markdown: of these seeds alone")
    parser.add_argument("--cell", nargs=3, metavar=("DATA", "ARM", "SEED"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    work, file = arguments.work, RESULTS
    if arguments.quick:
        work, file = work.with_name(work.name + "-quick"), work.with_name(work.name + "-quick") / "ablation.jsonl"
    if arguments.cell:
        data, arm, seed = arguments.cell
        print(json.dumps(cell(data, arm, int(seed), work, quick=arguments.quick)))
        return 0
    if not (arguments.table or arguments.markdown):
        arms, seeds = (list(ARMS)[:2], SEEDS[:1]) if arguments.quick else (list(ARMS), SEEDS)
        data = ["sample", *(["meqsum"] if arguments.meqsum else [])]
        wanted = [(d, arm, seed) for seed in seeds for arm in arms for d in data]
        done = {(r["data"], r["arm"], r["seed"]) for r in results(file)}
        file.parent.mkdir(parents=True, exist_ok=True)
        for number, (d, arm, seed) in enumerate(wanted, 1):
            if (d, arm, seed) in done:
                continue
            begun = time.monotonic()
            fill_pool(d, arm, work, meqsum=arguments.meqsum, quick=arguments.quick)
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
    if arguments.markdown:
        print()
        markdown(rows, gains)
    print(f"\n{len(rows)} cells, {sum(r['seconds'] for r in rows) / 3600:.1f} h")
    print(json.dumps(gains))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
