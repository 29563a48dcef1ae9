"""The leakage guard: what counts as the same text, what does not, and what it says."""

from __future__ import annotations

import pytest
from evaluated import recipe

from shared.artifacts import Run
from shared.contracts import Example
from shared.datasets.overlap import overlaps, refuse_overlaps
from shared.datasets.rows import Dataset, Source
from shared.datasets.stage import prepare
from shared.errors import LeakageError

LONG = "my mother has had a rash on both of her hands since the beginning of last spring"


def rows(test, train=(), validation=()):
    def examples(split, pairs):
        return [Example(id=f"{split}-{i}", question=q, summary=s) for i, (q, s) in enumerate(pairs)]

    return {"train": examples("train", train), "validation": examples("validation", validation), "test": examples("test", test)}


def test_an_equal_question_is_found_through_case_punctuation_and_spaces():
    (found,) = overlaps(rows([("Is gout curable?", None)], train=[("x", None), ("is  GOUT, curable", None)]))
    assert (found.test_id, found.other_id, found.split, found.kind, found.share) == ("test-0", "train-1", "train", "question", 1.0)


def test_an_equal_summary_is_found_also_in_validation():
    (found,) = overlaps(rows([("a", "What is gout?")], validation=[("b", "what is gout")]))
    assert (found.other_id, found.split, found.kind) == ("validation-0", "validation", "summary")


def test_a_question_of_whose_8_grams_half_stand_in_another_is_nearly_a_copy_and_less_is_not():
    words = LONG.split()  # 17 words, 10 of the 8-grams
    assert len(words) == 17
    near = " ".join([*words[:12], "w", "x", "y", "z"])  # 5 of its own stand in the other: 5 of the test row's 10
    (found,) = overlaps(rows([(LONG, None)], train=[(near, None)]))
    assert (found.kind, found.share) == ("near-question", 0.5)
    assert overlaps(rows([(LONG, None)], train=[(" ".join([*words[:11], "w", "x", "y", "z"]), None)])) == []


def test_the_closest_row_is_told_and_texts_of_fewer_than_eight_words_are_near_to_none():
    more = LONG + " and it does not go away"
    (found,) = overlaps(rows([(LONG, None)], train=[(LONG + " x", None), (LONG, None), (more, None)]))
    assert found.other_id == "train-1"
    assert overlaps(rows([("is my gout curable by now", None)], train=[("is my gout curable by now or not", None)])) == []


def test_signs_that_nobody_sees_hide_no_copy():
    hidden = LONG.replace("mother", "mo\u00adther").replace("rash", "ra\u200bsh").replace("hands", "han\u2060ds")
    (found,) = overlaps(rows([(LONG, "What is gout?")], train=[("x", "What is go\u00adut?"), (hidden, None)]))
    assert (found.other_id, found.kind, found.share) == ("train-0", "summary", 1.0)
    (found,) = overlaps(rows([(LONG, None)], train=[(hidden, None)]))
    assert (found.kind, found.share) == ("question", 1.0)
    (found,) = overlaps(rows([(LONG, None)], train=[(f"{hidden} x", None)]))
    assert (found.kind, found.share) == ("near-question", 1.0)


def numbered(letter, count):
    """So many words that stand nowhere else."""
    return [f"{letter}{i}" for i in range(count)]


def test_a_question_that_stands_whole_in_a_longer_one_is_found_and_one_of_which_a_phrase_does_is_not():
    theirs = numbered("a", 40)  # 33 of the 8-grams
    longer = [*numbered("b", 20), *theirs, *numbered("c", 25)]
    assert len(longer) == 85  # 78
    (found,) = overlaps(rows([(" ".join(longer), None)], train=[(" ".join(theirs), None)]))
    assert (found.kind, found.share) == ("near-question", round(33 / 78, 4))
    polite = LONG.split()  # 17 words, 10 of the 8-grams: enough of them, and a third of the other question's
    both = [" ".join([*numbered("a", 23), *polite]), " ".join([*numbered("b", 68), *polite])]
    assert [len(text.split()) for text in both] == [40, 85]
    assert overlaps(rows([(both[1], None)], train=[(both[0], None)])) == []


def test_a_short_phrase_that_stands_whole_in_a_longer_question_is_no_copy():
    phrase = " ".join(LONG.split()[:16])  # 9 of the 8-grams
    assert overlaps(rows([(" ".join([phrase, *numbered("a", 40)]), None)], train=[(phrase, None)])) == []


def test_summaries_of_signs_alone_are_not_equal():
    assert overlaps(rows([("a", "?"), ("b", "-")], train=[("c", "-"), ("d", "?")], validation=[("e", "...")])) == []


def test_rows_of_test_alone_overlap_with_nothing_and_missing_summaries_are_not_equal():
    assert overlaps(rows([(LONG, None), ("b", None)], train=[("c", None)])) == []


def test_what_is_not_allowed_by_name_is_refused_with_both_ids_and_the_setting_to_give():
    found = overlaps(rows([("one", None), ("two", None)], train=[("one", None), ("two", None)]))
    with pytest.raises(
        LeakageError, match=r"1 test rows .*test-1 is a copy of train-1 \(train\).*evaluate\.allow_overlap=\[.test-1.\]"
    ) as refused:
        refuse_overlaps(found, ["test-0"])
    assert refused.value.exit_code == 5
    refuse_overlaps(found, ["test-0", "test-1"])
    refuse_overlaps(found, ["question"])


def test_a_run_over_such_rows_ends_before_anything_is_asked_and_goes_on_once_they_are_allowed(tmp_path):
    splits = {split: tuple(of_split) for split, of_split in rows([(LONG, "a")], train=[(LONG + " x", "b")]).items()}
    census = {"read": 2, "dropped": {}, "kept": {split: len(of_split) for split, of_split in splits.items()}}
    dataset = Dataset("file", splits, census, Source("here", "0"))
    with pytest.raises(LeakageError, match="nearly a copy"):
        prepare(Run.open(tmp_path / "run", recipe()), dataset)
    assert not (tmp_path / "run" / "dataset" / "manifest.json").exists()
    run = Run.open(tmp_path / "run", recipe(evaluate={"allow_overlap": ["test-0"], "resamples": 500}))
    assert len(prepare(run, dataset)["test"]) == 1
