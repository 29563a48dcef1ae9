"""What scores, intervals and tests cost, beside the loops that people write: the same numbers, in one run.

    python tests/benchmarks/evaluate.py            # 8 systems, 1,000 rows, 10,000 resamples, 6 metrics: two minutes
    python tests/benchmarks/evaluate.py --quick    # 200 rows, 1,000 resamples: under a minute

The systems answer with their references, words left out and exchanged at random. Beside ours:
- scores: rouge_score's RougeScorer, nltk's corpus_bleu and sacrebleu's corpus_bleu and corpus_chrf, called once a system as their
  documentation does;
- bootstrap: a loop over resamples that draws rows, and computes each system's scores of these rows from counts of rows that were made
  beforehand (numpy means for ROUGE, sacrebleu's compute_bleu on summed counts for BLEU); it is measured on a part of the resamples and
  scaled up. To call nltk or sacrebleu on the texts of every resample, as such loops often do, takes far longer still.
Hugging Face's `evaluate` fetches the scripts that call these libraries from a hub, so it is no line of its own.

Expected, written down before the first run: scores cost what the libraries' own cost, since they do the same work (0.8 to 1.2 of it,
less where references are tokenized once); all intervals and tests of 8 x 6 take 2 to 4 s, under a thirtieth of the loop. Found: 0.7 s, and
a seventeenth: the loop was thought slower than one that has its counts is.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import sacrebleu
from nltk.translate.bleu_score import SmoothingFunction, corpus_bleu
from rouge_score.rouge_scorer import RougeScorer

from evaluator.metrics import bleu, corpus
from evaluator.metrics.rouge import _WORDS
from evaluator.metrics.table import METRICS
from evaluator.scores import compare_all, score
from shared.contracts import Example, Prediction
from shared.datasets.load import load
from shared.settings import DatasetSettings

MEASURED = ("rouge1", "rouge2", "rougeL", "bleu", "sacrebleu", "chrf")
SYSTEMS = 8


def made(rows: int) -> tuple[list[Example], list[Prediction]]:
    """Rows from the embedded sample, repeated under other ids, and eight systems' answers, the first the best."""
    draw = random.Random(0)
    examples = [e for split in load(DatasetSettings(), Path()).splits.values() for e in split]
    test = [examples[i % len(examples)].model_copy(update={"id": f"row-{i}"}) for i in range(rows)]
    vocabulary = sorted({word for e in examples for word in (e.summary or "").split()})
    predictions = []
    for system in range(SYSTEMS):
        for e in test:
            kept = [word if draw.random() > 0.2 + 0.08 * system else draw.choice(vocabulary) for word in (e.summary or "").split()]
            predictions.append(Prediction(system=f"system-{system}", example_id=e.id, text=" ".join(kept), finish_reason="stop"))
    return test, predictions


def loops(texts: dict[str, list[str]], references: list[str]) -> dict[str, dict[str, float]]:
    """Every score by the packages' own calls."""
    found = {}
    for name, of_system in texts.items():
        scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
        rows = [scorer.score(reference, text) for reference, text in zip(references, of_system, strict=True)]
        found[name] = {metric: float(np.mean([row[metric].fmeasure for row in rows])) for metric in ("rouge1", "rouge2", "rougeL")}
        words = [bleu.words(text) for text in of_system]
        smooth = SmoothingFunction(epsilon=bleu.EPSILON).method1
        found[name]["bleu"] = float(corpus_bleu([[bleu.words(r)] for r in references], words, smoothing_function=smooth))
        found[name]["sacrebleu"] = sacrebleu.corpus_bleu(of_system, [references]).score / 100
        found[name]["chrf"] = sacrebleu.corpus_chrf(of_system, [references]).score / 100
    return found


def bootstrap_loop(statistics: dict[str, dict[str, np.ndarray]], resamples: int) -> None:
    """Resample by resample, system by system, metric by metric."""
    draw = np.random.default_rng(0)
    rows = len(next(iter(statistics.values()))["rouge1"])
    for _ in range(resamples):
        drawn = draw.integers(rows, size=rows)
        for of_system in statistics.values():
            for metric in ("rouge1", "rouge2", "rougeL"):
                of_system[metric][drawn].mean()
            bleu.bleu_of_counts(of_system["bleu"][drawn].sum(axis=0), rows)
            counts = of_system["sacrebleu"][drawn].sum(axis=0).astype(int).tolist()
            sacrebleu.BLEU.compute_bleu(counts[:4], counts[4:8], counts[8], counts[9], smooth_method="exp")
            corpus.chrf_of_counts(of_system["chrf"][drawn].sum(axis=0), rows)


def timed(work: Any) -> tuple[float, Any]:
    begun = time.perf_counter()
    result = work()
    return time.perf_counter() - begun, result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    rows, resamples, part = (200, 1000, 50) if arguments.quick else (1000, 10_000, 200)
    test, predictions = made(rows)
    texts: dict[str, list[str]] = {}
    for p in predictions:
        texts.setdefault(p.system, []).append(p.text)
    references = [e.summary or "" for e in test]
    metrics = {name: METRICS[name] for name in MEASURED}
    score(predictions[: 2 * rows], test, metrics)  # imports and caches of the libraries, for both sides
    _WORDS._tokenize.cache_clear()
    corpus._tokenize.cache_clear()
    ours_s, scored = timed(lambda: score(predictions, test, metrics))
    theirs_s, own = timed(lambda: loops(texts, references))
    worst = max(abs(own[name][metric] - scored[name].value(metric)) for name in own for metric in MEASURED)
    assert worst < 1e-9, f"not the same numbers: {worst}"
    compared_s, _ = timed(lambda: compare_all(scored, "system-0", "rougeL", resamples=resamples, seed=0))
    statistics = {name: dict(found.statistics) for name, found in scored.items()}
    loop_s, _ = timed(lambda: bootstrap_loop(statistics, part))
    loop_s *= resamples / part
    processor = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "?"
    )
    print(f"{SYSTEMS} systems, {rows:,} rows, {len(MEASURED)} metrics, {resamples:,} resamples; {os.cpu_count()} cores, {processor}, "
          f"Python {platform.python_version()}\n")  # fmt: skip
    print(f"{'':58}{'ours, s':>10}{'loops, s':>10}{'loops / ours':>14}")
    print(f"{'scores (largest difference ' + format(worst, '.0e') + ')':58}{ours_s:10.2f}{theirs_s:10.2f}{theirs_s / ours_s:14.2f}")
    what = "intervals of all, tests of one against all and of all pairs"
    print(f"{what:58}{compared_s:10.2f}{loop_s:10.1f}{loop_s / compared_s:14.1f}   (loop: intervals alone, scaled up)")
    print(
        json.dumps(
            {
                "bootstrap_s": round(compared_s, 2),
                "vs_loops": round(loop_s / compared_s, 1),
                "scores_vs_libraries": round(theirs_s / ours_s, 2),
            }
        )
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
