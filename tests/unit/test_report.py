"""The report as data and as a table for a terminal: computed from stored predictions and the run's files."""

from __future__ import annotations

import json

import pytest
from evaluated import exported_run

from evaluator.metrics.table import METRICS
from evaluator.report.build import build
from evaluator.report.contract import Report
from evaluator.report.parts import OTHER, by_length, by_type, question_type, scored_rows
from evaluator.report.table import table
from evaluator.scores import DESCRIPTIVE, score
from evaluator.systems import ALWAYS, Evaluated, System
from shared.artifacts import Run
from shared.contracts import Example, Prediction
from shared.datasets.stage import prepare
from shared.settings import PromoteSettings

SYSTEMS = Evaluated(
    systems=tuple(System(name=name, group="distilled" if name == "distilled" else "trivial", about="a test") for name in ALWAYS),
    not_scored={"theirs": "q1 not answered"},
)


def scores(examples, answers):
    """`answers[system](index, example)`; a system that is not given answers with a constant."""
    predictions = [
        Prediction(system=s, example_id=e.id, text=answers.get(s, lambda i, e: "What is it?")(i, e))
        for s in ALWAYS
        for i, e in enumerate(examples)
    ]
    return score(predictions, examples)


def built(run, answers, **changes):
    rows = {**prepare(run), **changes}
    return build(run, rows, SYSTEMS, scores(rows["test"], answers))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = exported_run(tmp_path_factory.mktemp("report") / "run")
    run.stage("triplets/r0").finish([], settings={}, counts={"kept": 12, "dropped": {"tie": 3, "cut off": 1}})
    return run


@pytest.fixture(scope="module")
def report(run):
    return built(run, {"distilled": lambda i, e: e.summary})


def test_the_report_says_how_each_of_its_numbers_is_defined_and_reads_back_as_it_was_written(report):
    for system in report.systems.values():
        assert system.scores.keys() == report.metrics.keys() == METRICS.keys() | DESCRIPTIVE.keys()
    assert "method1" in report.metrics["bleu"].definition
    assert "tok:13a" in report.metrics["sacrebleu"].definition
    assert report.dataset == {"name": "sample", "train": 30, "validation": 30, "test": 40}
    assert (report.resamples, report.seed) == (500, 0)
    assert {"python", "rouge_score", "nltk", "sacrebleu"} <= set(report.versions)
    assert Report.model_validate_json(json.dumps(report.model_dump(mode="json"))) == report


def test_every_score_that_varies_over_rows_lies_in_its_interval(report):
    varied = [s for system in report.systems.values() for name, s in system.scores.items() if name in METRICS and s.low is not None]
    assert len(varied) > 20
    assert all(s.low <= s.value <= s.high for s in varied)
    assert report.systems["distilled"].scores["rougeL"].low is None  # 1.0 on every row


def test_all_pairs_but_those_with_the_reference_are_compared_in_the_gates_metric(report):
    systems = len(ALWAYS) - 1
    assert len(report.pairs) == systems * (systems - 1) // 2
    assert {c.metric for c in report.pairs} == {"rougeL"}
    assert len(report.comparisons) == (systems - 1) * len(METRICS)
    assert all(c.p_holm is None or c.p <= c.p_holm <= 1 for c in report.pairs)


def test_the_gate_tells_its_rule_and_its_decision_in_numbers(report):
    assert report.gate.passed
    assert report.gate.rule["baseline"] == "student-zero-shot"
    assert "points over student-zero-shot on 40 test rows" in report.gate.reasons[0]


def test_the_report_holds_the_census_and_time_of_every_stage_before_it(report):
    assert {"dataset", "model", "triplets/r0"} <= set(report.stages)
    assert report.stages["triplets/r0"]["counts"]["dropped"]["tie"] == 3
    assert {ref.path for ref in report.inputs} >= {"dataset/test.jsonl", "model/serving/model.bin"}


def test_a_secret_of_the_recipe_is_not_in_the_report(tmp_path):
    run = exported_run(tmp_path / "run", teacher={"url": "http://127.0.0.1:9/v1", "api_key": "sk-secret"})
    assert "sk-secret" not in json.dumps(built(run, {}).model_dump(mode="json"))


def test_a_student_below_a_trivial_baseline_is_told_so_by_name(run):
    notes = built(run, {"constant": lambda i, e: e.summary}).notes
    assert any("does not beat constant, first-question" in note for note in notes)  # those that answer alike tie with it


def test_how_many_messages_had_a_subject_line_and_who_is_not_scored_is_told(run):
    test = [Example(id=f"q{i}", question=q, summary="What?") for i, q in enumerate(["SUBJECT: gout\nMESSAGE: help", "Help"])]
    notes = built(run, {}, test=test).notes
    assert any("1 of 2 messages have a SUBJECT line" in note for note in notes)
    assert "theirs is not scored: q1 not answered." in notes
    assert any("Only 2 test rows" in note for note in notes)


def test_references_that_rouge_cannot_read_are_told_with_what_they_reach_and_others_are_not(run):
    def told(*references):
        test = [Example(id=f"q{i}", question="Help", summary=reference) for i, reference in enumerate(references)]
        notes = built(run, {"reference": lambda i, e: e.summary}, test=test).notes
        return [note for note in notes if note.startswith("ROUGE reads")]

    (greek,) = told("\u03a4\u03b9 \u03b5\u03af\u03bd\u03b1\u03b9;", "What is gout?")
    assert "the references themselves reach 50.0 of 100 points in ROUGE-1" in greek
    assert "promote.metric=chrf" in greek
    assert told("What is gout?", "Qu'est-ce que la m\u00e9nopause\u00a0?") == []


def test_the_training_log_is_thinned_to_400_steps_with_the_last_and_validations_are_told(tmp_path):
    run = exported_run(tmp_path / "run")
    folder = run.path / "checkpoints" / "r0"
    folder.mkdir(parents=True)
    (folder / "log.jsonl").write_text("".join(json.dumps({"step": i, "loss": 1.0, "odds_ratio": None}) + "\n" for i in range(1, 1002)))
    (folder / "validation.jsonl").write_text(json.dumps({"step": 500, "epoch": 1.0, "rouge_l": 0.25}) + "\n")
    (of_round,) = built(run, {}).training
    assert len(of_round.steps) <= 400
    assert of_round.steps[-1] == {"step": 1001, "loss": 1.0}
    assert of_round.validation == [{"step": 500, "rougeL": 0.25}]


def test_rows_are_parted_by_the_length_of_their_question_into_four_and_each_row_is_in_one(run):
    examples = [Example(id=f"q{i}", question=" ".join(["word"] * (i + 1)), summary="what is it") for i in range(40)]
    rows = scored_rows(scores(examples, {}), {e.id: e for e in examples}, "rougeL")
    parts = by_length(rows)
    assert [part.rows for part in parts] == [10, 10, 10, 10]
    assert (parts[0].label, parts[-1].label) == ("1 to 10 words", "31 to 40 words")
    assert sum(part.rows * part.scores["distilled"] for part in parts) == pytest.approx(
        sum(row.scores["distilled"] for row in rows), abs=1e-3
    )


@pytest.mark.parametrize(
    ("reference", "kind"),
    [
        ("What are the treatments for gout?", "treatment"),
        ("What causes gout?", "cause"),
        ("Where can I find information on gout?", "where to find"),
        ("Is gout contagious?", "yes or no"),
        ("What is gout?", "what is"),
        ("Gout", OTHER),
    ],
)
def test_the_type_of_a_question_is_read_off_its_reference(reference, kind):
    assert question_type(reference) == kind


def test_types_with_few_rows_are_put_together_and_come_last(run):
    texts = ["What causes gout?"] * 4 + ["What is gout?"] * 5 + ["Is gout bad?"]
    examples = [Example(id=f"q{i}", question="?", summary=text) for i, text in enumerate(texts)]
    parts = by_type(scored_rows(scores(examples, {}), {e.id: e for e in examples}, "bleu"))
    assert [(part.label, part.rows) for part in parts] == [("what is", 5), ("cause", 4), (OTHER, 1)]


def test_one_test_row_makes_a_report_that_says_there_is_no_interval(run):
    found = built(run, {"distilled": lambda i, e: e.summary}, test=prepare(run)["test"][:1])
    assert all(c.p is None and "one test row" in c.note for c in found.comparisons)
    assert "(no interval)" in table(found)


def test_the_terminal_table_is_aligned_in_points_and_names_every_system(report):
    lines = table(report).splitlines()
    body = lines[3 : 3 + len(ALWAYS)]
    assert [line.split()[0] for line in body] == list(ALWAYS)
    column = lines[1].index("ROUGE-L") + len("ROUGE-L")
    for line, system in zip(body, report.systems.values(), strict=True):
        assert line[:column].endswith(f"{100 * system.scores['rougeL'].value:.1f}")
    assert any(line.startswith("note: ") for line in lines)


def test_the_gates_metric_has_a_column_of_the_table_whatever_it_is(run):
    other = Run.open(run.path, run.recipe.model_copy(update={"promote": PromoteSettings(metric="exact_match")}))
    assert "exact match" in table(built(other, {})).splitlines()[1]
