"""Reports without an evaluation: plausible values, the same for the same arguments, so that page and Markdown can be tested alone."""

from __future__ import annotations

import random

from evaluator.report.contract import (
    Definition,
    Gate,
    Judge,
    JudgeVerdict,
    Overlapping,
    Part,
    Report,
    Score,
    ScoredRow,
    SystemReport,
    TrainingRound,
)
from evaluator.report.page import TestAnswers
from evaluator.significance import ONE_ROW, Comparison
from shared.contracts import FileRef

EVIL = "</script><script>alert('x')</script> <img src=x onerror=alert(1)> & \"quotes\" | 'pipe' `tick` {{ 7 * 7 }}"
GROUPS = {
    "distilled": "distilled",
    "student-zero-shot": "student",
    "student-few-shot": "student",
    "teacher-zero-shot": "teacher",
    "teacher-few-shot": "teacher",
    "constant": "trivial",
    "first-question": "trivial",
    "first-sentence": "trivial",
    "subject-template": "trivial",
    "reference": "reference",
}
LEVELS = {"distilled": 0.41, "student-zero-shot": 0.11, "student-few-shot": 0.17, "teacher-zero-shot": 0.45, "teacher-few-shot": 0.38}
DEFINITIONS = {
    "rouge1": Definition(label="ROUGE-1", definition="F1 of words, stemmed; mean over rows", better="higher", points=True),
    "rouge2": Definition(label="ROUGE-2", definition="F1 of pairs of words; mean over rows", better="higher", points=True),
    "rougeL": Definition(label="ROUGE-L", definition="F1 of the longest common subsequence; mean over rows", better="higher", points=True),
    "bleu": Definition(label="BLEU", definition="corpus BLEU-4, method1", better="higher", points=True),
    "chrf": Definition(label="chrF", definition="corpus chrF2", better="higher", points=True),
    "ter": Definition(label="TER", definition="edits by reference words", better="lower", points=False),
    "length_ratio": Definition(label="Length ratio", definition="words by reference words", better="neither", points=False),
}
OF_METRIC = {"rouge1": 1.1, "rouge2": 0.5, "rougeL": 1.0, "bleu": 0.4, "chrf": 0.9}
TYPES = ("treatment", "diagnosis", "cause", "other")
TEXT = "how is a cough of two weeks treated when no fever stands beside it and which test tells more"


def report_and_answers(
    *,
    rows: int = 40,
    extra: int = 0,
    rounds: int = 1,
    steps: int = 30,
    passed: bool = True,
    judge: bool = False,
    overlaps: int = 0,
    evil: bool = False,
    metric: str = "rougeL",
) -> tuple[Report, list[TestAnswers]]:
    """A report and the answers of its test rows. One row has no interval. `evil`: every text tries to act. `rounds` 0: no training log."""
    rng = random.Random(7)
    groups = {**GROUPS, **{f"extra-{n}": "extra" for n in range(extra)}}
    one = rows == 1
    scored, answers = [], []
    for i in range(rows):
        levels = {name: _clipped(rng.gauss(_level(name), 0.12)) for name in groups}
        kind = EVIL if evil and i == 0 else TYPES[i % len(TYPES)]
        scored.append(ScoredRow(id=f"q-{i}", words=20 + 7 * (i % 9), type=kind, scores={n: round(v, 6) for n, v in levels.items()}))
        reference = " ".join(rng.sample(TEXT.split(), 8)).capitalize() + "?"
        texts = {name: " ".join(rng.sample(reference.split(), 4) + rng.sample(TEXT.split(), 4)) for name in groups}
        question = f"Message {i}: " + " ".join(rng.choices(TEXT.split(), k=scored[-1].words))
        if i == 1:
            texts["distilled"] = ""
        if evil:
            question, reference, texts = f"{EVIL} {i}", EVIL, {name: EVIL for name in groups}
        answers.append(TestAnswers(id=f"q-{i}", question=question, reference=reference, texts=texts))
    means = {name: sum(row.scores[name] for row in scored) / rows for name in groups}
    systems = {
        name: SystemReport(
            group=group,
            about=EVIL if evil else f"{group}, as {name} has it",
            scores={m: _score(means[name], m, one) for m in DEFINITIONS},
            mean_words=9.5,
            empty=1 if name == "distilled" and rows > 1 else 0,
            cut_off=3 if group == "student" else 0,
        )
        for name, group in groups.items()
    }
    others = [name for name, group in groups.items() if group not in ("distilled", "reference")]
    named = ["distilled", *others]
    pairs = [(a, b) for n, a in enumerate(named) for b in named[n + 1 :]]
    down = EVIL if evil else "no answer from http://127.0.0.1:9/v1"
    text = EVIL if evil else "Intervals speak of the choice of test rows, not of the luck of one training seed."
    report = Report(
        recipe=EVIL if evil else "offline-demo",
        teacher=EVIL if evil else "launch:local:embedded:teacher",
        student=EVIL if evil else "embedded:student",
        dataset={"name": EVIL if evil else "sample", "train": 110, "validation": 30, "test": rows},
        metric=metric,
        baseline="student-zero-shot",
        test_rows=rows,
        systems=systems,
        not_scored={"extra-down": down},
        comparisons=[_compared("distilled", b, m, means, scored, one) for m in DEFINITIONS for b in others],
        pairs=[_compared(a, b, metric, means, scored, one) for a, b in pairs],
        resamples=1000,
        seed=3,
        shots=["q-181"],
        metrics=DEFINITIONS,
        training=[_round(r, rng, steps) for r in range(rounds)],
        by_length=_parts(scored, lambda row: "up to 40 words" if row.words <= 40 else "over 40 words", groups),
        by_type=_parts(scored, lambda row: row.type, groups),
        rows=scored,
        overlaps=[
            Overlapping(test_id=f"q-{n}", other_id=f"t-{n}", split="train", kind="near-question", share=0.625, allowed=n == 0)
            for n in range(overlaps)
        ],
        judge=_judge(others, rows, evil) if judge else None,
        gate=Gate(
            rule={"metric": metric, "baseline": "student-zero-shot", "margin": 0.0, "alpha": 0.05},
            passed=passed,
            reasons=[text if evil else "rougeL +30.1 points over student-zero-shot" if passed else "p is not below 0.05"],
        ),
        stages=_stages(rounds, evil),
        inputs=[
            FileRef(path="dataset/test.jsonl", sha256="ab" * 32, bytes=39143),
            FileRef(path="model/m.bin", sha256="cd" * 32, bytes=10**8),
        ],
        settings={"name": EVIL if evil else "offline-demo", "harvest": {"samples": 4, "stop": ["\n"], "redact": None}},
        versions={"python": "3.11.7", "rouge_score": "0.1.2"},
        notes=[text, f"extra-down is not scored: {down}."],
    )
    return report, answers


def _level(name: str) -> float:
    return 1.0 if name == "reference" else LEVELS.get(name, 0.2)


def _clipped(value: float) -> float:
    return min(1.0, max(0.0, value))


def _in(metric: str, level: float) -> float:
    if metric == "ter":
        return 1.2 - level
    return 1.0 + level / 10 if metric == "length_ratio" else level * OF_METRIC[metric]


def _score(level: float, metric: str, one: bool) -> Score:
    value = round(_in(metric, level), 6)
    return Score(value=value) if one else Score(value=value, low=round(value - 0.04, 6), high=round(value + 0.04, 6))


def _compared(ours: str, theirs: str, metric: str, means, scored, one: bool) -> Comparison:
    gain = _in(metric, means[ours]) - _in(metric, means[theirs])
    if one:
        return Comparison(ours=ours, theirs=theirs, metric=metric, gain=gain, rows=1, note=ONE_ROW)
    by_row = metric in ("rouge1", "rouge2", "rougeL")
    p = 0.0001 if abs(gain) > 0.06 else 0.4321
    gains = [row.scores[ours] - row.scores[theirs] for row in scored]
    return Comparison(
        ours=ours,
        theirs=theirs,
        metric=metric,
        gain=gain,
        low=gain - 0.05,
        high=gain + 0.05,
        p=p,
        p_bootstrap=p,
        p_holm=min(1.0, p * 9),
        effect=gain / 0.17 if by_row else None,
        wins=sum(g > 0 for g in gains) if by_row else None,
        losses=sum(g < 0 for g in gains) if by_row else None,
        ties=sum(g == 0 for g in gains) if by_row else None,
        rows=len(scored),
    )


def _round(number: int, rng: random.Random, steps: int) -> TrainingRound:
    logged = []
    for step in range(1, steps + 1):
        near = 1 - step / (steps + 5) + rng.uniform(-0.1, 0.1)
        values = {"loss": 0.6 + 2 * near, "nll": 0.5 + 1.6 * near, "odds_ratio": 0.02 + 0.8 * abs(near), "accuracy": _clipped(1.1 - near)}
        values |= {"margin": 3.5 * (1 - near), "logp_chosen": -0.6 - 1.5 * near, "logp_rejected": -4.1 + 2 * near, "grad_norm": 3 + near}
        logged.append({"step": float(step), **values})
    return TrainingRound(
        round=number, steps=logged, validation=[{"step": steps / 2, "rougeL": 0.44}, {"step": float(steps), "rougeL": 0.43}]
    )


def _parts(scored, label, groups) -> list[Part]:
    found: dict[str, list[ScoredRow]] = {}
    for row in scored:
        found.setdefault(label(row), []).append(row)
    return [
        Part(label=name, rows=len(rows), scores={s: sum(r.scores[s] for r in rows) / len(rows) for s in groups})
        for name, rows in found.items()
    ]


def _judge(others, rows: int, evil: bool) -> Judge:
    won, tied = rows // 2, rows // 4
    verdicts = [
        JudgeVerdict(
            theirs=name,
            wins=won,
            losses=rows - won - tied,
            ties=tied,
            contradictions=tied // 2,
            unreadable=0,
            win_rate=(won + tied / 2) / rows,
            low=0.5,
            high=0.75,
        )
        for name in others[:3]
    ]
    return Judge(model=EVIL if evil else "a-judge", asked="http://127.0.0.1:9/v1", verdicts=verdicts)


def _stages(rounds: int, evil: bool) -> dict[str, dict]:
    dropped = {"tie with the chosen": 50, "over max_rejected": 268, EVIL if evil else "same text again (teacher)": 14}
    census = {"rows": 550, "kept": 218, "dropped": dropped, "triplets": 109, "mean_chosen_score": 0.4793}
    return {
        "dataset": {"seconds": 0.01, "counts": {"read": 330, "source": {"location": "embedded"}}},
        "responses/teacher": {"seconds": 32.1, "counts": {"prompts": 110, "answers": 440, "failed": {}, "requests": 110, "cost": 0.25}},
        **{f"triplets/r{r}": {"seconds": 0.1, "counts": census} for r in range(rounds)},
        **{f"checkpoints/r{r}": {"seconds": 97.7, "counts": {"examples": 109}} for r in range(rounds)},
    }
