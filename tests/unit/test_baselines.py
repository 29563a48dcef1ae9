"""The trivial systems."""

from __future__ import annotations

import pytest

from evaluator.baselines import constant, first_question, first_sentence, subject, subject_template


def test_the_constant_is_the_commonest_summary_whatever_its_case_and_punctuation():
    assert constant(["What is gout?", "what is gout", "How is flu treated?", "What causes acne?"], seed=0) == "What is gout?"


def test_where_no_summary_occurs_twice_the_constant_is_the_most_central_one():
    summaries = [
        "who makes insulin pumps",
        "what are the treatments for gout",
        "what are the symptoms of flu",
        "what are the treatments for flu",
    ]
    assert constant(summaries, seed=0) == "what are the treatments for flu"


def test_of_equally_common_summaries_the_more_central_one_is_the_constant():
    summaries = [
        "who sells cetirizine",
        "who sells cetirizine",
        "what treats flu",
        "what treats flu",
        "what treats gout",
        "what treats acne",
    ]
    assert constant(summaries, seed=0) == "what treats flu"


def test_the_constant_does_not_depend_on_chance_for_more_summaries_than_are_compared():
    summaries = [f"what treats illness number {i}" for i in range(260)]
    assert constant(summaries, seed=3) == constant(summaries, seed=3)


def test_without_summaries_the_constant_says_nothing():
    assert constant([], seed=0) == ""


@pytest.mark.parametrize(
    ("message", "sentence", "question"),
    [
        ("I have gout. What helps? Is it forever?", "I have gout.", "What helps?"),
        ("What helps gout? I have it.", "What helps gout?", "What helps gout?"),
        ("Tell me about gout", "Tell me about gout", "Tell me about gout"),
        ("I take 2.5 mg daily. Too much?", "I take 2.5 mg daily.", "Too much?"),
        ("First line\nsecond line. Why?", "First line", "Why?"),
        ("SUBJECT: gout\nMESSAGE: I have gout. What helps?", "I have gout.", "What helps?"),
        ("SUBJECT: gout MESSAGE: I have gout. What helps?", "I have gout.", "What helps?"),
        ("MESSAGE: What helps?", "What helps?", "What helps?"),
        ("Help! Why?! Tell me", "Help!", "Why?!"),
        ("SUBJECT: gout", "SUBJECT: gout", "SUBJECT: gout"),
    ],
)
def test_first_sentence_and_first_question_of_a_message(message, sentence, question):
    assert first_sentence(message) == sentence
    assert first_question(message) == question


@pytest.mark.parametrize(
    ("message", "topic"),
    [
        ("SUBJECT: kidney stones\nMESSAGE: help", "kidney stones"),
        ("subject: kidney  stones MESSAGE: help", "kidney stones"),
        ("  SUBJECT:  kidney stones", "kidney stones"),
        ("SUBJECT:\nMESSAGE: help", None),
        ("I was given the SUBJECT: kidney stones", None),
        ("kidney stones", None),
    ],
)
def test_the_subject_is_what_stands_on_its_line_at_the_beginning(message, topic):
    assert subject(message) == topic


def test_a_subject_becomes_a_question_and_its_absence_falls_back_to_the_first_sentence():
    assert subject_template("SUBJECT: kidney stones.\nMESSAGE: help") == "What are the treatments for kidney stones?"
    assert subject_template("I have stones. Help") == "I have stones."
