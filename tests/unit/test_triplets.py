"""Triplets: the best against the clearly worse, every answer accounted for, nothing of the test split let in."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.artifacts import Run, read_jsonl, write_jsonl
from shared.contracts import Example, Response, Source, Triplet
from shared.datasets import normalise
from shared.datasets.stage import prepare
from shared.errors import DataError, LeakageError, StageOrder
from shared.prompts import zero_shot
from shared.settings import DatasetSettings, Recipe, SampleSettings, TeacherSettings, TripletSettings
from student_trainer.triplets.build import TEACHER, build, make_triplets, refuse_leaks
from student_trainer.triplets.candidates import Candidate, gather
from student_trainer.triplets.pairs import pair
from student_trainer.triplets.ranking import by_consensus, by_reference, rouge_l
from student_trainer.triplets.references import readable, refuse_unrankable

STUDENT = "responses/student-r0"
ROUGE = rouge_l()


def response(example_id: str, text: str, sample: int = 0, **more: object) -> Response:
    fields = {"status": "ok", "finish_reason": "stop", "model": "m", "latency_s": 0.1, "attempts": 1, "received_at": "2026-01-01T00:00:00Z"}
    return Response(**{"key": f"{example_id}/{sample}", "example_id": example_id, "sample": sample, "text": text, **fields, **more})


def failed(example_id: str, sample: int = 0) -> Response:
    return response(example_id, "", sample, status="failed", finish_reason=None, reason="RequestRefused: no")


def recipe(ranking: str = "reference", *, samples: int = 2, **more: object) -> Recipe:
    return Recipe(
        name="t",
        teacher=TeacherSettings(url="http://127.0.0.1:9/v1"),
        dataset=DatasetSettings(limit=4),
        sample=SampleSettings(samples=samples),
        triplets=TripletSettings(ranking=ranking, **more),
    )


def example(identity: str = "a", summary: str | None = "one two three four") -> Example:
    return Example(id=identity, question=f"question {identity}", summary=summary)


def teacher(text: str, sample: int = 0) -> Candidate:
    return Candidate(text, "teacher", sample)


def student(text: str, sample: int = 0) -> Candidate:
    return Candidate(text, "student", sample)


# --- ranking


def test_rouge_l_of_three_of_four_words_in_order_is_three_quarters() -> None:
    assert ROUGE("one two three four", "one two three nine") == pytest.approx(0.75)
    assert ROUGE("running treatments", "run treatment") == 1.0  # stemmed
    assert ROUGE("one two", "") == 0.0


@settings(deadline=None)
@given(st.text("abc ", max_size=12), st.text("abc ", max_size=12))
def test_rouge_l_is_symmetric(one: str, other: str) -> None:
    assert ROUGE(one, other) == rouge_l()(other, one)


def test_by_reference_is_rouge_l_against_the_reference() -> None:
    assert by_reference([teacher("one two three four"), student("nine")], "one two three four", ROUGE) == [1.0, 0.0]


def test_consensus_is_the_mean_over_the_other_teacher_samples_with_repeats_voting_twice() -> None:
    candidates = [teacher("one two", 0), teacher("one two", 1), teacher("one nine", 2), student("one two", 0), student("nine", 1)]
    # one two / one nine: 0.5; nine / one nine: precision 1, recall 1/2: 2/3
    expected = [(1 + 0.5) / 2, (1 + 0.5) / 2, (0.5 + 0.5) / 2, (1 + 1 + 0.5) / 3, (0 + 0 + 2 / 3) / 3]
    assert by_consensus(candidates, ROUGE) == pytest.approx(expected)


def test_one_teacher_sample_is_no_consensus() -> None:
    assert by_consensus([teacher("one"), student("one")], ROUGE) is None


# --- candidates


def test_unusable_answers_are_dropped_by_reason_but_a_cut_off_student_stays() -> None:
    asked = [failed("a"), response("a", " ?! ", 1), response("a", "one two", 2, finish_reason="length"), response("a", " one ", 3)]
    own = [response("a", "two", 0, finish_reason="length"), failed("a", 1)]
    kept, dropped = gather({"teacher": asked, "student": own})
    assert kept == {"a": [teacher("one", 3), Candidate("two", "student", 0, cut_off=True)]}
    assert dropped == {"failed (teacher)": 1, "empty (teacher)": 1, "cut off (teacher)": 1, "failed (student)": 1}


def test_of_two_rows_for_one_sample_the_last_counts() -> None:
    kept, dropped = gather({"teacher": [failed("a"), response("a", "one")]})
    assert kept == {"a": [teacher("one")]}
    assert dropped == {"asked again": 1}


def test_the_order_of_the_ledger_does_not_matter() -> None:
    rows = [response("a", f"text {n}", n) for n in range(5)]
    assert gather({"teacher": rows}) == gather({"teacher": rows[::-1]})


# --- pairs


def test_the_student_is_rejected_first_and_the_worst_first_within_a_source() -> None:
    candidates = [teacher("best", 0), teacher("fair", 1), teacher("bad", 2), student("poor", 0), student("awful", 1)]
    made = pair(candidates, [0.9, 0.5, 0.2, 0.4, 0.1], TripletSettings(max_rejected=3), ROUGE)
    assert made.chosen == ((candidates[0], 0.9),)
    assert [c.text for c, _ in made.rejected] == ["awful", "poor", "bad"]
    assert made.dropped == {"over max_rejected": 1}


def test_a_better_student_is_neither_chosen_nor_rejected() -> None:
    made = pair([teacher("good"), student("better", 0), student("bad", 1)], [0.6, 0.8, 0.1], TripletSettings(), ROUGE)
    assert [c.text for c, _ in made.chosen] == ["good"]
    assert [c.text for c, _ in made.rejected] == ["bad"]
    assert made.dropped == {"better than the chosen (student)": 1}


def test_ties_near_equals_and_repeats_are_dropped_by_reason() -> None:
    same = "one two three four five six seven eight nine ten eleven"
    candidates = [teacher(same), teacher(same.upper() + "!", 1), student(same + " twelve"), student("close", 1), student("far", 2)]
    made = pair(candidates, [0.5, 0.5, 0.3, 0.48, 0.1], TripletSettings(margin=0.05, max_similarity=0.9), ROUGE)
    assert [c.text for c, _ in made.rejected] == ["far"]
    assert made.dropped == {"same text again (teacher)": 1, "near-equal to the chosen": 1, "tie with the chosen": 1}


def test_a_margin_of_zero_still_drops_equal_scores() -> None:
    made = pair([teacher("one"), student("two")], [0.5, 0.5], TripletSettings(margin=0), ROUGE)
    assert not made.chosen
    assert made.dropped == {"tie with the chosen": 1, "prompt without triplet: nothing to reject": 1}


def test_without_a_teacher_answer_there_is_no_pair() -> None:
    made = pair([student("one"), student("two", 1)], [0.1, 0.9], TripletSettings(), ROUGE)
    assert made.reason == "no usable teacher answer"
    assert made.dropped == {"prompt without triplet: no usable teacher answer": 2}


def test_ranking_first_takes_the_first_teacher_sample_against_the_students_alone() -> None:
    answers = [response("a", f"t{n}", n) for n in (1, 0)]
    own = [response("a", f"s{n}", n) for n in (1, 0)]
    triplets, census = make_triplets(recipe("first"), [example(summary=None)], {"teacher": answers, "student": own})
    assert [(t.chosen, t.rejected) for t in triplets] == [("t0", "s0"), ("t0", "s1")]
    assert census.dropped == {"not the first (teacher)": 1}


def test_whose_answers_are_rejected_is_a_setting() -> None:
    candidates, scores = [teacher("best"), teacher("bad", 1), student("awful")], [0.9, 0.2, 0.1]
    only = pair(candidates, scores, TripletSettings(rejected_from=("teacher",)), ROUGE)
    assert [c.text for c, _ in only.rejected] == ["bad"]
    assert only.dropped == {"not in rejected_from (student)": 1}
    first = pair(candidates, scores, TripletSettings(rejected_from=("teacher", "student")), ROUGE)
    assert [c.text for c, _ in first.rejected] == ["bad", "awful"]


def test_several_chosen_are_paired_with_what_each_of_them_beats() -> None:
    candidates = [teacher("best"), teacher("good", 1), teacher("fair", 2), student("poor"), student("awful", 1)]
    made = pair(candidates, [0.9, 0.7, 0.42, 0.4, 0.1], TripletSettings(max_chosen=3), ROUGE)
    assert [c.text for c, _ in made.chosen] == ["best", "good", "fair"]
    assert [c.text for c, _ in made.rejected] == ["awful", "poor"]
    assert made.pairs == ((0, 0), (0, 1), (1, 0), (1, 1), (2, 0))  # fair beats poor by less than the margin


def test_a_further_chosen_one_that_beats_nothing_is_dropped_by_reason() -> None:
    made = pair([teacher("best"), teacher("fair", 1), student("poor")], [0.9, 0.42, 0.4], TripletSettings(max_chosen=2), ROUGE)
    assert [c.text for c, _ in made.chosen] == ["best"]
    assert made.dropped == {"chosen, but beats nothing that is rejected": 1}


def current(text: str, sample: int = 0) -> Candidate:
    return Candidate(text, "current-student", sample)


@pytest.mark.parametrize(
    ("on_policy", "draw", "expected"),
    [
        (0.5, 0.0, ["c0", "c1", "s0", "s1"]),
        (0.0, 0.9, ["s0", "s1", "s2", "s3"]),
        (1.0, 0.0, ["c0", "c1", "c2", "c3"]),
        (0.3, 0.0, ["c0", "s0", "s1", "s2"]),  # 1.2 of 4
        (0.3, 0.85, ["c0", "c1", "s0", "s1"]),  # what falls to a prompt out of the 0.2
    ],
)
def test_of_the_students_answers_a_share_is_the_current_ones(on_policy: float, draw: float, expected: list[str]) -> None:
    candidates = [teacher("best"), *(student(f"s{n}", n) for n in range(5)), *(current(f"c{n}", n) for n in range(5))]
    scores = [0.9, *(n / 10 for n in range(5)), *(n / 10 for n in range(5))]
    made = pair(candidates, scores, TripletSettings(max_rejected=4, on_policy=on_policy), ROUGE, draw=draw)
    assert sorted(c.text for c, _ in made.rejected) == expected


def test_where_the_current_student_has_too_few_answers_the_initial_ones_fill_up_and_the_reverse() -> None:
    settings = TripletSettings(max_rejected=4, on_policy=0.5)
    few = pair([teacher("best"), *(student(f"s{n}", n) for n in range(4)), current("c0")], [0.9, 0, 0, 0, 0, 0], settings, ROUGE)
    assert Counter(c.source for c, _ in few.rejected) == {"student": 3, "current-student": 1}
    many = pair([teacher("best"), student("s0"), *(current(f"c{n}", n) for n in range(4))], [0.9, 0, 0, 0, 0, 0], settings, ROUGE)
    assert Counter(c.source for c, _ in many.rejected) == {"student": 1, "current-student": 3}


def test_with_one_rejected_answer_half_of_the_prompts_reject_a_current_one() -> None:
    train = [example(f"e{n}") for n in range(400)]
    answers = {
        "teacher": [response(e.id, e.summary or "", 0) for e in train],
        "student": [response(e.id, "nine", 0) for e in train],
        "current-student": [response(e.id, "ten", 0) for e in train],
    }
    triplets, _ = make_triplets(recipe(max_rejected=1), train, answers)  # type: ignore[arg-type]
    shares = Counter(t.rejected_source for t in triplets)
    assert len(triplets) == 400
    assert 160 <= shares["current-student"] <= 240  # 4 standard deviations


WORDS = st.lists(st.sampled_from(["one", "two", "three", "four", "Nine?", "!"]), max_size=5).map(" ".join)
Rows = list[tuple[str, int, str, str]]
ANSWERS = st.lists(
    st.tuples(st.sampled_from("abc"), st.integers(0, 4), WORDS, st.sampled_from(["stop", "stop", "length", "failed"])), max_size=24
)


@settings(max_examples=200, deadline=None)
@given(
    ANSWERS,
    ANSWERS,
    ANSWERS,
    st.sampled_from(["reference", "consensus", "first"]),
    st.sampled_from([0.0, 0.05, 0.4]),
    st.integers(1, 3),
    st.integers(1, 3),
)
def test_every_answer_and_prompt_is_accounted_for_and_each_pair_keeps_the_rules(
    asked: Rows, own: Rows, now: Rows, ranking: str, margin: float, most: int, best: int
) -> None:
    ledgers = {
        source: [failed(e, n) if end == "failed" else response(e, text, n, finish_reason=end) for e, n, text, end in rows]
        for source, rows in (("teacher", asked), ("student", own), ("current-student", now))
    }
    train = [example("a"), example("b", "two nine"), example("c", None)]
    chosen_recipe = recipe(ranking, margin=margin, max_rejected=most, max_chosen=best)
    triplets, census = make_triplets(chosen_recipe, train, ledgers)
    assert census.rows == len(asked) + len(own) + len(now) == census.kept + census.dropped.total()
    assert census.prompts == 3 == census.prompts_kept + census.prompts_dropped.total()
    assert census.triplets == len(triplets)
    sides = [{(t.example_id, text) for t, text in zip(triplets, texts, strict=True)} for texts in _columns(triplets)]
    assert census.prompts_kept == len({t.example_id for t in triplets})
    assert census.kept == sum(map(len, sides))
    assert census.rejected_sources.total() == len(sides[1])
    assert not sides[0] & sides[1]  # nothing is chosen and rejected
    for side, largest in zip(sides, (best, most), strict=True):
        assert max(Counter(e for e, _ in side).values(), default=0) <= largest
    whole = {(e, text.strip()) for e, _, text, end in asked if end == "stop"}
    for t in triplets:
        assert normalise(t.chosen) != normalise(t.rejected)
        assert ROUGE(t.chosen, t.rejected) <= 0.9
        assert t.chosen_score > t.rejected_score
        assert t.chosen_score - t.rejected_score >= margin
        assert t.chosen_source == "teacher"
        assert (t.example_id, t.chosen) in whole
        if ranking == "reference":
            reference = {e.id: e.summary for e in train}[t.example_id]
            assert t.chosen_score == ROUGE(t.chosen, reference or "")
    assert make_triplets(chosen_recipe, train, ledgers) == (triplets, census)


def _columns(triplets: Sequence[Triplet]) -> tuple[list[str], list[str]]:
    return [t.chosen for t in triplets], [t.rejected for t in triplets]


# --- the stage


def answered(run: Run, *, shuffled: bool = False) -> Run:
    """A run whose teacher gave the reference (and a worse second sample) and whose student rambled until it was cut off."""
    train = prepare(run)["train"]
    given = [
        response(e.id, text, n)
        for e in train
        for n, text in enumerate([f"unlike {e.id}", e.summary or f"What of {e.id}?", f"What of {e.id} then?"])
    ]
    own = [response(e.id, f"hello hello {n}", n, finish_reason="length") for e in train for n in range(run.recipe.sample.samples)]
    for name, rows in ((TEACHER, given), (STUDENT, own)):
        record(run, name, rows[::-1] if shuffled else rows)
    return run


def record(run: Run, name: str, rows: list[Response]) -> None:
    file = run.path / name / "responses.jsonl"
    write_jsonl(file, rows)
    run.stage(name).finish([file], settings={})


def test_the_stage_writes_triplets_of_the_zero_shot_prompt_and_a_census(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = answered(Run.open(tmp_path, recipe()))
    assert build(run) == 0
    triplets = read_jsonl(tmp_path / "triplets/r0/triplets.jsonl", Triplet)
    rows = {e.id: e for e in prepare(run)["train"]}
    assert len(triplets) == 8
    assert [t.example_id for t in triplets[::2]] == list(rows)
    for t in triplets:
        assert t.prompt == zero_shot(run.recipe.task, rows[t.example_id].question)
        assert t.chosen == rows[t.example_id].summary
        assert t.rejected_source == "student"
        assert t.rejected_cut_off
    manifest = run.manifest("triplets/r0")
    assert manifest is not None
    assert manifest.counts["rows"] == 20 == manifest.counts["kept"] + sum(manifest.counts["dropped"].values())
    assert manifest.counts["cut_off_rejected"] == 8
    assert {ref.path for ref in manifest.inputs} >= {f"{TEACHER}/responses.jsonl", f"{STUDENT}/responses.jsonl", "dataset/test.jsonl"}
    printed = capsys.readouterr().out
    assert "triplets/r0: 8 triplets from 4 of 4 prompts" in printed
    assert "over max_rejected" in printed


def test_a_ledger_in_another_order_gives_the_same_bytes(tmp_path: Path) -> None:
    runs = [answered(Run.open(tmp_path / name, recipe()), shuffled=name == "b") for name in "ab"]
    for run in runs:
        build(run)
    one, other = ((run.path / "triplets/r0/triplets.jsonl").read_bytes() for run in runs)
    assert one == other


def test_without_student_samples_the_teachers_worst_are_rejected(tmp_path: Path) -> None:
    run = answered(Run.open(tmp_path, recipe(samples=0)))
    build(run)
    triplets = read_jsonl(tmp_path / "triplets/r0/triplets.jsonl", Triplet)
    assert triplets
    assert {t.rejected_source for t in triplets} == {"teacher"}


def test_the_stage_needs_both_ledgers(tmp_path: Path) -> None:
    run = Run.open(tmp_path, recipe())
    prepare(run)
    record(run, TEACHER, [])
    with pytest.raises(StageOrder, match="responses/student-r0"):
        build(run)


def test_empty_ledgers_end_with_the_census_and_write_nothing(tmp_path: Path) -> None:
    run = Run.open(tmp_path, recipe())
    prepare(run)
    record(run, TEACHER, [])
    record(run, STUDENT, [])
    with pytest.raises(DataError, match=r"(?s)no triplet is left of 0 answers; the ledgers are empty.*no usable teacher answer +4"):
        build(run)
    assert not (tmp_path / "triplets/r0/triplets.jsonl").exists()


def test_a_teacher_that_never_finishes_a_sentence_is_named_in_the_message(tmp_path: Path) -> None:
    run = Run.open(tmp_path, recipe())
    train = prepare(run)["train"]
    record(run, TEACHER, [response(e.id, f"on and on {e.id}", finish_reason="length") for e in train])
    record(run, STUDENT, [])
    with pytest.raises(DataError, match=r"most went as 'cut off \(teacher\)'.*harvest.max_tokens"):
        build(run)


def test_ranking_first_without_student_samples_names_the_setting(tmp_path: Path) -> None:
    run = answered(Run.open(tmp_path, recipe("first", samples=0)))
    with pytest.raises(DataError, match=r"sample.samples is 0: raise it"):
        build(run)


def test_ranking_by_reference_without_references_names_the_other_ranking() -> None:
    with pytest.raises(DataError, match=r"triplets.ranking=consensus"):
        make_triplets(recipe(), [example(summary=None)], {"teacher": [], "student": []})


GREEK = [Example(id=f"e{n}", question=f"Τι είναι η ημικρανία; {n}", summary="Τι είναι η ημικρανία;") for n in range(5)]


def greek_answers() -> dict[Source, list[Response]]:
    said = ["Τι είναι η ημικρανία;", "Ποια είναι η αιτία;"]
    return {
        "teacher": [response(e.id, text, n) for e in GREEK for n, text in enumerate(said)],
        "student": [response(e.id, "Δεν ξέρω τίποτα") for e in GREEK],
    }


@pytest.mark.parametrize("ranking", ["reference", "consensus"])
def test_of_texts_that_rouge_cannot_read_the_ranking_that_needs_no_measure_is_named(ranking: str) -> None:
    with pytest.raises(DataError, match=rf"triplets\.ranking={ranking}: ROUGE-L reads a-z and 0-9 alone, .*; give triplets\.ranking=first"):
        make_triplets(recipe(ranking), GREEK, greek_answers())
    triplets, _ = make_triplets(recipe("first"), GREEK, greek_answers())
    assert len(triplets) == 5


@given(st.text(max_size=6))
def test_a_text_is_readable_where_rouge_gives_it_1_with_itself(text: str) -> None:
    assert readable(text) == (ROUGE(text, text) == 1.0)


def test_references_that_cannot_be_read_are_counted() -> None:
    assert refuse_unrankable([*GREEK, example(), example("b", None), example("c", "500 μg")]) == 5


LONG = "one two three four five six seven eight nine ten eleven"


@pytest.mark.parametrize(
    ("ranking", "settings", "said", "own", "told"),
    [
        ("first", {}, [LONG], [f"{LONG} twelve"], r"'near-equal to the chosen': raise triplets\.max_similarity"),
        ("first", {"rejected_from": ("teacher",)}, ["one"], ["two"], r"'not in rejected_from \(student\)': name student in triplets\.rej"),
        (
            "consensus",
            {"rejected_from": ("student",)},
            ["one two", "one"],
            [],
            r"'not in rejected_from \(teacher\)': name teacher in triplets",
        ),
        ("consensus", {"margin": 1.0}, ["one two", "one"], ["one ten"], r"'tie with the chosen': .* or lower triplets\.margin"),
    ],
)
def test_where_no_triplet_is_left_the_setting_that_helps_is_named(
    tmp_path: Path, ranking: str, settings: dict[str, object], said: list[str], own: list[str], told: str
) -> None:
    run = Run.open(tmp_path, recipe(ranking, **settings))
    train = prepare(run)["train"]
    for name, texts in ((TEACHER, said), (STUDENT, own)):
        record(run, name, [response(e.id, text, n) for e in train for n, text in enumerate(texts)])
    with pytest.raises(DataError, match=rf"{told}.*; in another --out, where --answers-from"):
        build(run)


@pytest.mark.parametrize("folder", [TEACHER, STUDENT])
@pytest.mark.parametrize("split", ["test", "validation"])
def test_an_answer_to_a_held_out_row_fails_the_stage(tmp_path: Path, folder: str, split: str) -> None:
    run = answered(Run.open(tmp_path, recipe()))
    leaked = prepare(run)[split][0]  # type: ignore[index]
    rows = read_jsonl(run.path / folder / "responses.jsonl", Response)
    write_jsonl(run.path / folder / "responses.jsonl", [*rows, response(leaked.id, "leak")])
    with pytest.raises(LeakageError, match=rf"{folder} holds rows of the {split} split \(1: {leaked.id}\)"):
        build(run)
    assert not (tmp_path / "triplets/r0").exists() or not list((tmp_path / "triplets/r0").iterdir())


@pytest.mark.parametrize(
    "copy",
    [
        Example(id="new", question="THE question!", summary="other"),
        Example(id="new", question="other", summary="the Answer"),
        Example(id="new", question="other", summary="the question"),
    ],
)
def test_a_train_row_that_says_what_a_test_row_says_fails_the_stage(copy: Example) -> None:
    splits = {"train": [copy], "validation": [], "test": [Example(id="t", question="the question", summary="the answer?")]}
    with pytest.raises(LeakageError, match="share a question or a summary with test rows"):
        refuse_leaks(splits, {})  # type: ignore[arg-type]


def test_a_triplet_of_a_test_row_and_an_answer_of_no_row_are_refused() -> None:
    splits = {"train": [example("a")], "validation": [], "test": [Example(id="t", question="x", summary="y")]}
    triplet = Triplet(
        example_id="t",
        prompt="p",
        chosen="c",
        rejected="r",
        chosen_source="teacher",
        rejected_source="student",
        chosen_score=1,
        rejected_score=0,
    )
    with pytest.raises(LeakageError, match="triplets/r0 holds rows of the test split"):
        refuse_leaks(splits, {"triplets/r0": [triplet]})  # type: ignore[arg-type]
    with pytest.raises(DataError, match="rows that this run does not have: stranger"):
        refuse_leaks(splits, {TEACHER: [response("stranger", "x")]})  # type: ignore[arg-type]


def test_the_command_builds_once_and_then_has_nothing_to_do(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("name: t\nteacher: {url: 'http://127.0.0.1:9/v1'}\ndataset: {limit: 4}\n")
    out = tmp_path / "run"
    answered(Run.open(out, recipe()))
    command = [sys.executable, "-m", "shared.cli", "triplets", "--recipe", str(file), "--out", str(out)]
    first = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "8 triplets from 4 of 4 prompts" in first.stdout
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert again.stdout == "triplets/r0: complete, nothing to do\n"
